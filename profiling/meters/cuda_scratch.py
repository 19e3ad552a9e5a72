"""Scratch memory that a CUDA kernel allocates and frees inside one operator, invisible to dispatch modes.

Each rule is what PyTorch's kernels allocate, or what cuDNN asked for on an NVIDIA H100 with PyTorch 2.11: with them,
the predicted peaks are those measured there, most to the byte. Operators are seen on fake CPU tensors, so the CPU's
fused attention stands for CUDA's: cuDNN's in half precision, the memory-efficient kernel in fp32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from profiling.meters.operator_call import Call, Spec

_aten = torch.ops.aten
_SUMS = _aten.sum.dim_IntList, _aten.mean.dim
_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SMS, THREADS_PER_SM = 132, 2048
"""Multiprocessors of an H100 (SXM) and an H200, and their threads. A sum over very many rows depends on them."""
CUDNN_BYTES = 272
"""Bytes of cuDNN's workspace, and of the random state of a dropout, that no size changes."""
EFFICIENT_TILE = 64
"""Queries, and channels, per tile of the memory-efficient kernel's backward pass."""
FLASH_CHANNELS = 8
"""In half precision, channels per head that are no multiple go to FlashAttention, padded to the next."""


def is_opaque(func: Any) -> bool:
    """Whether the operator's kernel has scratch that dispatch modes cannot observe."""
    return func in _RULES


def scratch(call: Call) -> int:
    """Peak bytes of the call's kernel beyond what remains allocated after it."""
    return _RULES[call.func](call)


bound = scratch


class ColumnSum(NamedTuple):
    """A sum over the rows of a matrix, such as the gradient of a bias.

    Attributes:
        rows: values per sum.
        columns: sums.
        vector: sums that a thread takes at once: 4, or as many as divide the sums that are adjacent in memory.
        itemsize: bytes of the type in which is summed.
    """

    rows: int
    columns: int
    vector: int = 4
    itemsize: int = 4

    def scratch(self) -> int:
        """Bytes in which blocks of threads leave what they summed, if several share a sum; else 0.

        There is a place for every sum, block and column of a block's threads. So it can exceed the matrix: for the
        gradient of a bias in bf16, of a width that 128 divides, it takes up to four times as much.
        Source: ``setReduceConfig`` and ``global_memory_size`` in PyTorch's aten/src/ATen/native/cuda/Reduce.cuh.
        """
        threads, outputs = 512 // self.vector, self.columns // self.vector
        width = min(_power_of_2(outputs, threads), 32)
        height = min(_power_of_2(self.rows, threads), threads // width)
        width = min(_power_of_2(outputs, threads), threads // height)
        each, grid = -(-self.rows // height), -(-outputs // width)
        room = SMS * (THREADS_PER_SM // (width * height))
        if self.rows < min(16 * height, 256) or each < 256 or grid > room:
            return 0
        blocks = max(min(-(-room // grid), -(-each // 16)), -(-each // 256))
        # And a counter for every column of blocks.
        return 0 if blocks == 1 else self.itemsize * self.columns * blocks * width * self.vector + 4 * grid


class TiledBackward(NamedTuple):
    """The backward pass of the memory-efficient kernel.

    Attributes:
        heads: those of all batches.
        tokens: queries of each.
        width: channels per head, rounded up to whole tiles.
    """

    heads: int
    tokens: int
    width: int

    def scratch(self) -> int:
        """Bytes of a sum per query, and of the queries' gradient in tiles, each after a lock of 16 bytes."""
        tiles = self.heads * -(-self.tokens // EFFICIENT_TILE)
        return 4 * self.heads * self.tokens + tiles * (16 + 4 * EFFICIENT_TILE * self.width)


def irregular(call: Call) -> ColumnSum | TiledBackward | None:
    """What the call's scratch is made of, if it grows in steps; None if it does not, or has none."""
    if call.func in _SUMS:
        return _column_sum(call)
    return _tiled(call) if call.func is _BACKWARD else None


def _column_sum(call: Call) -> ColumnSum | None:
    """The sum over rows that the call is; None if it is one along adjacent values, which takes little."""
    x: Spec = call.args[0]
    over = call.args[1] if len(call.args) > 1 and call.args[1] else range(len(x.shape))
    reduced = {axis % len(x.shape) for axis in over}
    axes = sorted((axis for axis, size in enumerate(x.shape) if size > 1), key=lambda axis: x.stride[axis])
    if not axes or axes[0] in reduced or 0 in x.shape:
        return None
    run = 1
    for axis in axes:
        if axis in reduced or x.stride[axis] != run:
            break
        run *= x.shape[axis]
    rows = math.prod(x.shape[axis] for axis in reduced)
    return ColumnSum(rows, math.prod(x.shape) // rows, math.gcd(4, run), max(4, x.dtype.itemsize))


def _power_of_2(number: int, limit: int) -> int:
    return limit if number >= limit else 1 << (number.bit_length() - 1)


def _tiled(call: Call) -> TiledBackward | None:
    query: Spec = call.args[1]
    batch, heads, tokens, channels = query.shape
    if query.dtype is not torch.float32:
        return None
    return TiledBackward(batch * heads, tokens, _rounded(channels, EFFICIENT_TILE))


def _of_steps(call: Call) -> int:
    found = irregular(call)
    return found.scratch() if found else 0


def _softmax_backward(call: Call) -> int:
    """The product of the gradient and the probabilities."""
    grad, probabilities = call.args[:2]
    return math.prod(grad.shape) * max(grad.dtype.itemsize, probabilities.dtype.itemsize)


def _layer_norm(call: Call) -> int:
    """A contiguous copy of the input: PyTorch's aten/src/ATen/native/cuda/layer_norm_kernel.cu; not yet measured."""
    return call.args[0].copied_nbytes


def _layer_norm_backward(call: Call) -> int:
    return call.args[1].copied_nbytes


def _attention(call: Call) -> int:
    """FlashAttention's copies with padded channels, and what its output then takes more."""
    query, key, value = call.args[:3]
    return sum(map(_padded, (query, key, value))) + _padding(query) if _is_padded(query) else 0


def _attention_backward(call: Call) -> int:
    query: Spec = call.args[1]
    if query.dtype is torch.float32:
        return _of_steps(call)
    return _flash_backward(*call.args[:4]) if _is_padded(query) else _cudnn_backward(query)


def _cudnn_backward(query: Spec) -> int:
    """A sum per query, and the queries' gradient in fp32."""
    return 4 * math.prod(query.shape[:-1]) + 4 * math.prod(query.shape) + CUDNN_BYTES


def _flash_backward(grad: Spec, query: Spec, key: Spec, value: Spec) -> int:
    """Padded copies, what outputs and gradients take more, a sum per query, and the queries' gradient in fp32."""
    batch, heads, tokens, channels = query.shape
    sums = batch * heads * _rounded(tokens, 128)
    copies = sum(map(_padded, (grad, query, key, value))) + sum(map(_padding, (query, query, key, value)))
    return copies + 4 * sums + 4 * sums * _rounded(channels, 32)


def _is_padded(query: Spec) -> bool:
    return query.dtype.itemsize == 2 and query.shape[-1] % FLASH_CHANNELS > 0


def _padded(tensor: Spec) -> int:
    """Bytes with channels rounded up as FlashAttention needs them."""
    *sizes, channels = tensor.shape
    return math.prod(sizes) * _rounded(channels, FLASH_CHANNELS) * tensor.dtype.itemsize


def _padding(tensor: Spec) -> int:
    return _padded(tensor) - tensor.nbytes


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step


_RULES: dict[Any, Callable[[Call], int]] = {
    **dict.fromkeys(_SUMS, _of_steps),
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _BACKWARD: _attention_backward,
}
