"""Scratch memory that a CPU kernel allocates and frees inside one operator, invisible to dispatch modes.

The scratch of oneDNN's convolutions and PyTorch's fused attention depends on the processor, the thread count and
internal thresholds. So it is measured: the same operator runs on shrunken inputs. Their scratch equals that of the
full input (attention), or grows linearly with pixels (large convolution), rows (softmax of unfused attention) or
channels (large pooling or interpolation). A small convolution runs as it is, since oneDNN may choose another algorithm
for another size. Of operators that only copy what is not contiguous, no measurement is needed.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from profiling.meters.operator_call import Call, Spec

_aten = torch.ops.aten
Shrunk = tuple[int, tuple[Any, ...], dict[str, Any]]
"""Size that the scratch is linear in, arguments, keyword arguments."""
SIDE = 56
"""A large convolution of more pixels per side is probed at this size and half of it."""
WHOLE_MACS, WHOLE_VALUES = 4 << 30, 16 << 20
"""The most MACs and input values of a convolution that is probed as it is, in a fraction of a second."""
CHANNELS = 16
"""A large pooling or interpolation is probed with this many channels and half of them."""
ROWS = 32
"""A softmax is probed at this many rows and half of them."""
LENGTH = 1024
"""A longer sequence is probed at this length: beyond it, the CPU kernel works in blocks of constant size."""


def is_opaque(func: Any) -> bool:
    """Whether the operator's kernel has scratch that dispatch modes cannot observe."""
    return func in _SHRINK or func in _FORMULAS


def bound(call: Call) -> int:
    """Upper bound of the call's scratch in bytes; cheap, so that most calls need no probe."""
    if call.func in (_aten.convolution.default, _aten.convolution_backward.default):
        sizes = [a.nbytes for a in call.args if isinstance(a, Spec)]
        weight = sizes[-1] if call.func is _aten.convolution_backward.default else sizes[1]
        return 4 * sum(sizes) + 300 * weight
    if call.func is _aten._safe_softmax.default:
        return 2 * call.args[0].nbytes
    if call.func in _FORMULAS:
        return _FORMULAS[call.func](call)
    if call.func in _PER_CHANNEL:
        return 4 * _values_per_channel(call) * _size(call) * call.args[0].dtype.itemsize
    return torch.get_num_threads() * (16 << 20) + _copied(call)


@cache
def scratch(call: Call) -> int:
    """Peak bytes of the call's kernel beyond what remains allocated after it."""
    if call.func in _FORMULAS:
        return _FORMULAS[call.func](call)
    points = [(size, _probe(call.func, args, kwargs)) for size, args, kwargs in _SHRINK[call.func](call)]
    if len(points) == 1:
        return points[0][1] + _copied(call)
    (n1, s1), (n2, s2) = points
    return round(s2 + (s2 - s1) / (n2 - n1) * (_size(call) - n2))


def _copied(call: Call) -> int:
    """Bytes of what fused attention copies: a mask whose keys are not adjacent, and an output gradient.

    The gradient is copied unless its layout is (batch, tokens, heads, channels). These are the only parts of that
    kernel's scratch that grow with the batch, so probes do not measure them.
    """
    if call.func not in _ATTENTION:
        return 0
    mask = dict(call.kwargs).get("attn_mask")
    copied = 0 if mask is None or mask.stride[-1] in (0, 1) else mask.copied_nbytes
    if call.func is not _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return copied
    grad, dense = call.args[0], 1
    for axis in (3, 1, 2, 0):
        if grad.shape[axis] > 1 and grad.stride[axis] != dense:
            return copied + grad.nbytes
        dense *= grad.shape[axis]
    return copied


def memory_events(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) within ``call()``; its result is kept."""
    # acc_events: without it, PyTorch 2.11 warns in every process.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = call()
    del kept
    kineto: Any = profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of(events: list[int]) -> int:
    """The highest running sum."""
    live = peak = 0
    for nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak


def _probe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    func(*args, **kwargs)
    events = memory_events(lambda: func(*args, **kwargs))
    return peak_of(events) - sum(events)


def _size(call: Call) -> int:
    """Pixels of a convolution, rows of a softmax, channels of a pooling or interpolation."""
    x = _input(call)
    if call.func in _PER_CHANNEL:
        return x.shape[1]
    if call.func is _aten._safe_softmax.default:
        return math.prod(x.shape[:-1])
    return x.shape[0] * x.shape[2] * x.shape[3]


def _input(call: Call) -> Spec:
    return call.args[1 if call.func is _aten.convolution_backward.default else 0]


def _small_convolutions(call: Call) -> list[Shrunk]:
    side, values = max(_input(call).shape[2:]), math.prod(_input(call).shape)
    small = side <= SIDE or (_macs(call) <= WHOLE_MACS and values <= WHOLE_VALUES)
    return [_convolution(call, size) for size in ((side,) if small else (SIDE // 2, SIDE))]


def _macs(call: Call) -> int:
    """MACs of the forward pass of a convolution."""
    backward = call.func is _aten.convolution_backward.default
    weight, stride = (call.args[2], call.args[4]) if backward else (call.args[1], call.args[3])
    return math.prod(weight.shape) * _size(call) // math.prod(stride)


def _convolution(call: Call, side: int) -> Shrunk:
    x = _input(call)
    shape = (*x.shape[:2], min(x.shape[2], side), min(x.shape[3], side))
    pixels = shape[0] * shape[2] * shape[3]
    if call.func is _aten.convolution.default:
        weight, bias, *rest = call.args[1:]
        return pixels, (x.make(shape), _dense(weight), _dense(bias), *map(_thaw, rest)), {}
    grad, _, weight, bias, stride, padding, dilation, *rest = call.args
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    )
    tensors = grad.make((*grad.shape[:2], *out)), x.make(shape), _dense(weight)
    return pixels, (*tensors, *map(_thaw, (bias, stride, padding, dilation, *rest))), {}


def _few_rows(call: Call) -> list[Shrunk]:
    x, *rest = call.args
    ones = (1,) * (len(x.shape) - 2)
    return [(rows, (x.make((*ones, rows, x.shape[-1])), *rest), dict(call.kwargs)) for rows in (ROWS // 2, ROWS)]


def _values_per_channel(call: Call) -> int:
    """Values per channel of all arguments and the output; a little more, since a kernel's sides count as a grid."""
    batch = _input(call).shape[0]
    grids = [value.shape[2:] for value in call.args if isinstance(value, Spec) and len(value.shape) == 4]
    grids += [value[-2:] for value in call.args if isinstance(value, tuple) and len(value) in (2, 4)]
    return batch * sum(map(math.prod, grids))


def _few_channels(call: Call) -> list[Shrunk]:
    channels = _input(call).shape[1]
    small = channels <= CHANNELS or channels * _values_per_channel(call) <= WHOLE_VALUES

    def shrink(value: Any, count: int) -> Any:
        if isinstance(value, Spec):
            return value.make((value.shape[0], count, *value.shape[2:]) if len(value.shape) == 4 else (count,))
        return [value[0], count, *value[2:]] if isinstance(value, tuple) and len(value) == 4 else _thaw(value)

    counts = (channels,) if small else (CHANNELS // 2, CHANNELS)
    return [(count, tuple(shrink(value, count) for value in call.args), {}) for count in counts]


def _small_attention(call: Call) -> list[Shrunk]:
    def shrink(value: Any) -> Any:
        if not isinstance(value, Spec):
            return _thaw(value)
        # A mask may lack batch and heads, and the sums of the softmax lack channels.
        outer = 0 if len(value.shape) == 2 else 2
        return value.make((*[1] * outer, *(min(size, LENGTH) for size in value.shape[outer:])))

    args, arguments = [*map(shrink, call.args)], {name: shrink(value) for name, value in call.kwargs}
    # Their copies are counted at full size.
    if call.func is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        args[0] = args[0].contiguous()
    if (mask := arguments.get("attn_mask")) is not None:
        arguments["attn_mask"] = mask.contiguous()
    return [(0, tuple(args), arguments)]


def _copies(call: Call) -> int:
    """Contiguous copies of the arguments that are not contiguous."""
    return sum(value.copied_nbytes for value in call.args if isinstance(value, Spec))


def _layer_norm_backward(call: Call) -> int:
    """Copies, and in each thread a sum for the gradient of the weight and of the bias."""
    _, x, shape, *_, wanted = call.args
    sums = 2 * torch.get_num_threads() * math.prod(shape) * x.dtype.itemsize if wanted[1] or wanted[2] else 0
    return _copies(call) + sums


def _unfold(call: Call) -> int:
    return _copies(call) + call.args[0].nbytes


def _dense(spec: Spec | None) -> Tensor | None:
    return None if spec is None else spec.make(spec.shape)


def _thaw(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
_PER_CHANNEL = (
    _aten.upsample_bilinear2d.default,
    _aten.upsample_bilinear2d_backward.default,
    _aten._adaptive_avg_pool2d.default,
    _aten._adaptive_avg_pool2d_backward.default,
    _aten.avg_pool2d_backward.default,
    _aten.native_batch_norm_backward.default,
)
_FORMULAS: dict[Any, Callable[[Call], int]] = {
    _aten._softmax.default: _copies,
    _aten._softmax_backward_data.default: _copies,
    _aten.im2col.default: _unfold,
    _aten.native_layer_norm.default: _copies,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
}
_SHRINK: dict[Any, Callable[[Call], list[Shrunk]]] = {
    _aten.convolution.default: _small_convolutions,
    _aten.convolution_backward.default: _small_convolutions,
    **dict.fromkeys(_ATTENTION, _small_attention),
    **dict.fromkeys(_PER_CHANNEL, _few_channels),
    _aten._safe_softmax.default: _few_rows,
}
