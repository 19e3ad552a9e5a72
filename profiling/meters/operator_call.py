"""An operator that was called and its arguments, their shapes in place of their values."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Shape, layout and type of a tensor argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values, or of a contiguous copy."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copied_nbytes(self) -> int:
        """Bytes of the copy that a kernel makes which needs a contiguous tensor: none of one that is contiguous."""
        dense = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != dense:
                return self.nbytes
            dense *= size
        return 0

    def make(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of another shape, with the same memory order of axes, expanded or with gaps if this one is."""
        order = sorted(range(len(shape)), key=lambda axis: (-self.stride[axis], axis))
        sizes = [shape[axis] if self.stride[axis] else 1 for axis in order]
        gap = 0 if self._is_dense() else 1
        last = max((at for at, axis in enumerate(order) if self.stride[axis]), default=0)
        stored = [size + gap if at == last else size for at, size in enumerate(sizes)]
        dense = torch.zeros(stored, dtype=self.dtype).narrow(last, 0, sizes[last])
        return dense.permute([order.index(axis) for axis in range(len(shape))]).expand(shape)

    def _is_dense(self) -> bool:
        axes = [(size, stride) for size, stride in zip(self.shape, self.stride, strict=True) if stride]
        return sum((size - 1) * stride for size, stride in axes) + 1 == math.prod(size for size, _ in axes)


class Call(NamedTuple):
    """An operator and its arguments, tensors as Specs, for rerunning it at another size."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """A Call from an operator's arguments."""
        return cls(func, tuple(map(_freeze, args)), tuple((k, _freeze(v)) for k, v in kwargs.items()))


def _freeze(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Spec(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, list) else value
