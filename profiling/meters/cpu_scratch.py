"""Scratch memory that a CPU kernel allocates and frees inside one operator, invisible to dispatch modes.

The scratch of oneDNN's convolutions and PyTorch's fused attention depends on the processor, the thread count and
internal thresholds. So it is measured: the same operator runs on shrunken inputs. Their scratch equals that of the
full input (attention), or grows linearly with pixels (large convolution) or rows (softmax of unfused attention). A
small convolution runs as it is, since oneDNN may choose another algorithm for another size.
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
ROWS = 32
"""A softmax is probed at this many rows and half of them."""
LENGTH = 1024
"""A longer sequence is probed at this length: beyond it, the CPU kernel works in blocks of constant size."""


def is_opaque(func: Any) -> bool:
    """Whether the operator's kernel has scratch that dispatch modes cannot observe."""
    return func in _SHRINK


def bound(call: Call) -> int:
    """Upper bound of the call's scratch in bytes; cheap, so that most calls need no probe."""
    if call.func in (_aten.convolution.default, _aten.convolution_backward.default):
        sizes = [torch.Size(a.shape).numel() * a.dtype.itemsize for a in call.args if isinstance(a, Spec)]
        weight = sizes[-1] if call.func is _aten.convolution_backward.default else sizes[1]
        return 4 * sum(sizes) + 300 * weight
    if call.func is _aten._safe_softmax.default:
        return 2 * torch.Size(call.args[0].shape).numel() * call.args[0].dtype.itemsize
    return torch.get_num_threads() * (16 << 20) + _copied(call)


@cache
def scratch(call: Call) -> int:
    """Peak bytes of the call's kernel beyond what remains allocated after it."""
    points = [(size, _probe(call.func, args, kwargs)) for size, args, kwargs in _SHRINK[call.func](call)]
    if len(points) == 1:
        return points[0][1] + _copied(call)
    (n1, s1), (n2, s2) = points
    return round(s2 + (s2 - s1) / (n2 - n1) * (_size(call) - n2))


def _copied(call: Call) -> int:
    """Bytes of the output gradient if fused attention copies it: unless its layout is (batch, tokens, heads, channels).

    It is the only part of that kernel's scratch that grows with the batch, so probes do not measure it.
    """
    if call.func is not _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    grad, dense = call.args[0], 1
    for axis in (3, 1, 2, 0):
        if grad.shape[axis] > 1 and grad.stride[axis] != dense:
            return torch.Size(grad.shape).numel() * grad.dtype.itemsize
        dense *= grad.shape[axis]
    return 0


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
    """Pixels of a convolution, rows of a softmax."""
    x = _input(call)
    if call.func is _aten._safe_softmax.default:
        return torch.Size(x.shape[:-1]).numel()
    return x.shape[0] * x.shape[2] * x.shape[3]


def _input(call: Call) -> Spec:
    return call.args[1 if call.func is _aten.convolution_backward.default else 0]


def _small_convolutions(call: Call) -> list[Shrunk]:
    side, values = max(_input(call).shape[2:]), torch.Size(_input(call).shape).numel()
    small = side <= SIDE or (_macs(call) <= WHOLE_MACS and values <= WHOLE_VALUES)
    return [_convolution(call, size) for size in ((side,) if small else (SIDE // 2, SIDE))]


def _macs(call: Call) -> int:
    """MACs of the forward pass of a convolution."""
    backward = call.func is _aten.convolution_backward.default
    weight, stride = (call.args[2], call.args[4]) if backward else (call.args[1], call.args[3])
    return torch.Size(weight.shape).numel() * _size(call) // math.prod(stride)


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


def _small_attention(call: Call) -> list[Shrunk]:
    def shrink(value: Any) -> Any:
        if not isinstance(value, Spec):
            return _thaw(value)
        if len(value.shape) == 4:
            return value.make((1, 1, min(value.shape[2], LENGTH), min(value.shape[3], LENGTH)))
        return value.make((1, 1, min(value.shape[2], LENGTH)))

    return [(0, tuple(map(shrink, call.args)), {name: shrink(value) for name, value in call.kwargs})]


def _dense(spec: Spec | None) -> Tensor | None:
    return None if spec is None else spec.make(spec.shape)


def _thaw(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_SHRINK: dict[Any, Callable[[Call], list[Shrunk]]] = {
    _aten.convolution.default: _small_convolutions,
    _aten.convolution_backward.default: _small_convolutions,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _small_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _small_attention,
    _aten._safe_softmax.default: _few_rows,
}
