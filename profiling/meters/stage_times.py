"""The time of a module's stages: its ``record_function`` ranges, and the backward pass of the operators in them.

A backward node carries the thread and sequence number of the operator that created it, so it belongs to the range in
which that operator ran. Nodes that accumulate parameter gradients belong to no stage.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

STAGE = re.compile(r"[A-Za-z_]\w*\.\w+")
"""Stage names have the form ``attention.stage``; other ranges are PyTorch's own."""
NODE = "autograd::engine::evaluate_function"


def shares(events: Iterable[FunctionEvent], steps: int, device: str, backward: bool) -> list[dict[str, Any]]:
    """Time of a step by stage: wall time on a CPU, kernel time on a GPU.

    Args:
        events: of a profiler that recorded ``steps`` steps.
        backward: whether a step has a backward pass.

    Returns:
        Per stage, in the order of the forward pass, its ``name``, ``forward_ms`` and ``backward_ms`` (None without
        a backward pass) per step, and their ``share`` of the step.
    """
    # The GPU's own timeline repeats ranges and kernels.
    events = [e for e in events if e.device_type == DeviceType.CPU]
    clock = "device_time_total" if device == "cuda" else "cpu_time_total"
    forward = _times(((e.name, e) for e in events if _is_stage(e)), clock)
    behind = _times(_backward(events), clock)
    if device == "cuda":
        total = sum(e.self_device_time_total for e in events)
    else:
        total = sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep"))
    return [
        {
            "name": name,
            "forward_ms": forward[name] / 1e3 / steps,
            "backward_ms": behind.get(name, 0.0) / 1e3 / steps if backward else None,
            "share": (forward[name] + behind.get(name, 0.0)) / (total or 1.0),
        }
        for name in forward
    ]


def _times(result: Iterable[tuple[str, FunctionEvent]], clock: str) -> dict[str, float]:
    times: dict[str, float] = {}
    for name, event in result:
        times[name] = times.get(name, 0.0) + getattr(event, clock)
    return times


def _backward(events: Iterable[FunctionEvent]) -> Iterable[tuple[str, FunctionEvent]]:
    """The nodes of the backward pass that belong to a stage, with its name."""
    owner = _stage_of_nodes(events)
    for event in events:
        name = owner.get((event.fwd_thread, event.sequence_nr))
        # A nested node recomputes part of the forward pass; the outer node's time includes it.
        if name and event.name.startswith(NODE) and not any(up.name.startswith(NODE) for up in _above(event)):
            yield name, event


def _stage_of_nodes(events: Iterable[FunctionEvent]) -> dict[tuple[int | None, int], str]:
    """The stage that created each backward node, by the node's thread and sequence number."""
    makers: dict[tuple[int | None, int], FunctionEvent] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        # Operators that create no node carry the next node's number, so the last one with it is the creator.
        if event.sequence_nr >= 0 and not event.name.startswith(NODE) and event.scope == 0:
            makers[event.thread, event.sequence_nr] = event
    result = {key: next((up.name for up in _above(maker) if _is_stage(up)), None) for key, maker in makers.items()}
    return {key: name for key, name in result.items() if name is not None}


def _above(event: FunctionEvent) -> Iterable[FunctionEvent]:
    up = event.cpu_parent
    while up is not None:
        yield up
        up = up.cpu_parent


def _is_stage(event: FunctionEvent) -> bool:
    return bool(event.is_user_annotation and STAGE.fullmatch(event.name))
