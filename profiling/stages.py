"""The time of a module's stages: of its ``record_function`` ranges, and of the backward pass of what ran in them.

A node of the backward pass carries the thread and sequence number of the operator that made it, and so belongs to
the range in which that operator ran. What accumulates the gradients of parameters belongs to no stage.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

STAGE = re.compile(r"[A-Za-z_]\w*\.\w+")
"""How a stage is named: ``attention.stage``; other ranges are those of PyTorch itself."""
NODE = "autograd::engine::evaluate_function"


def shares(events: Iterable[FunctionEvent], steps: int, device: str, backward: bool) -> list[dict[str, Any]]:
    """Where the time of a step goes, by stage: wall time on a CPU, time of kernels on a GPU.

    Args:
        events: of a profiler that saw ``steps`` steps.
        backward: whether a step has a backward pass.

    Returns:
        Per stage, in the order of the forward pass, its ``name``, ``forward_ms`` and ``backward_ms`` (None without
        a backward pass) per step, and their ``share`` of the step.
    """
    # Ranges and kernels stand a second time on the GPU's own time line.
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


def _times(found: Iterable[tuple[str, FunctionEvent]], clock: str) -> dict[str, float]:
    times: dict[str, float] = {}
    for name, event in found:
        times[name] = times.get(name, 0.0) + getattr(event, clock)
    return times


def _backward(events: Iterable[FunctionEvent]) -> Iterable[tuple[str, FunctionEvent]]:
    """The nodes of the backward pass that belong to a stage, with its name."""
    owner = _stage_of_nodes(events)
    for event in events:
        name = owner.get((event.fwd_thread, event.sequence_nr))
        # A node inside another recomputes a part of the forward pass: its time is in the outer one's.
        if name and event.name.startswith(NODE) and not any(up.name.startswith(NODE) for up in _above(event)):
            yield name, event


def _stage_of_nodes(events: Iterable[FunctionEvent]) -> dict[tuple[int | None, int], str]:
    """The stage in which each node of the backward pass was made, by its thread and sequence number."""
    makers: dict[tuple[int | None, int], FunctionEvent] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        # Operators that make no node show the number of the next one, so the last with a number made it.
        if event.sequence_nr >= 0 and not event.name.startswith(NODE) and event.scope == 0:
            makers[event.thread, event.sequence_nr] = event
    found = {key: next((up.name for up in _above(maker) if _is_stage(up)), None) for key, maker in makers.items()}
    return {key: name for key, name in found.items() if name is not None}


def _above(event: FunctionEvent) -> Iterable[FunctionEvent]:
    up = event.cpu_parent
    while up is not None:
        yield up
        up = up.cpu_parent


def _is_stage(event: FunctionEvent) -> bool:
    return bool(event.is_user_annotation and STAGE.fullmatch(event.name))
