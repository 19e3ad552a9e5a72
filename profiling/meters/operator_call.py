"""An operator that was called and its arguments, their shapes in place of their values."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Shape, layout and type of a tensor argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of another shape, with the same memory order of axes, and with gaps if this one has gaps."""
        order = sorted(range(len(shape)), key=lambda axis: (-self.stride[axis], axis))
        sizes = [shape[axis] for axis in order]
        gap = 0 if self._is_dense() else 1
        dense = torch.zeros([*sizes[:-1], sizes[-1] + gap], dtype=self.dtype)[..., : sizes[-1]]
        return dense.permute([order.index(axis) for axis in range(len(shape))])

    def _is_dense(self) -> bool:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return last + 1 == torch.Size(self.shape).numel()


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
