"""A profile of one configuration: its stages and heaviest operators, and a trace for TensorBoard and Perfetto."""

import re
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode

from profiling.workload import Workload

ACTIVE = 3
STAGE = re.compile(r"[A-Za-z_]\w*\.\w+")
"""How a stage is named: ``attention.stage``; other ranges are those of PyTorch itself."""
NODE = "autograd::engine::evaluate_function"


def breakdown(work: Workload, device: str) -> dict[str, list[dict[str, Any]]]:
    """Where the time of a step goes, over three steps under the profiler, which slows them a little.

    Returns:
        ``stages``: per ``record_function`` range named ``attention.stage`` its ``name``, ``forward_ms`` and
        ``backward_ms`` (None without a backward pass) per step, and their ``share`` of the step; wall time on a
        CPU, kernel time on a GPU. Empty where the module names no stages.
        ``heaviest_operators``: the ten with the most time of their own: ``name``, ``calls`` per step, ``self_ms``
        per step and ``share`` of all operators.
    """
    profiler = _profile(work, device)
    return {
        "stages": _stages(profiler.events(), device, work.mode == "forward_backward"),
        "heaviest_operators": _heaviest(profiler, device),
    }


def write_trace(work: Workload, device: str, folder: str) -> None:
    """Write a trace of three steps into ``folder``, with shapes, memory and the modules the operators belong to.

    On CUDA with a snapshot of the allocator's memory beside it. Apart from :func:`breakdown`, because so much
    detail slows the steps down.
    """
    profiler = _profile(work, device, record_shapes=True, profile_memory=True, with_stack=True, with_modules=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    # The name TensorBoard's plugin looks for: worker.time.pt.trace.json.
    name = f"{socket.gethostname()}.{time.time_ns() // 1_000_000}"
    profiler.export_chrome_trace(str(Path(folder) / f"{name}.pt.trace.json"))
    if device == "cuda":
        _write_snapshot(work, Path(folder) / f"{name}.memory.pickle")


def _write_snapshot(work: Workload, path: Path) -> None:
    """Every allocation of one step with its stack, for https://docs.pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history()
    try:
        with work.settings():
            work.step()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _profile(work: Workload, device: str, **detail: Any) -> profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    steps = schedule(wait=1, warmup=1, active=ACTIVE)
    with work.settings(), profile(activities=activities, schedule=steps, **detail) as profiler:
        for _ in range(2 + ACTIVE):
            work.step()
            profiler.step()
    return profiler


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def sdpa_backend(step: Callable[[], object]) -> str | None:
    """Which fused kernel scaled_dot_product_attention runs in ``step``; None if it runs none (or is not called)."""
    with _Operators() as seen:
        step()
    prefix = "_scaled_dot_product_"
    kernels = [n.removeprefix(prefix) for n in seen.names if n.startswith(prefix) and not n.endswith("_backward")]
    return " ".join(sorted(kernels)) or None


def _stages(events: Iterable[FunctionEvent], device: str, backward: bool) -> list[dict[str, Any]]:
    # Ranges and kernels stand a second time on the GPU's own time line.
    events = [e for e in events if e.device_type == DeviceType.CPU]
    clock = "device_time_total" if device == "cuda" else "cpu_time_total"
    forward = {e.name: 0.0 for e in events if _is_stage(e)}
    for event in filter(_is_stage, events):
        forward[event.name] += getattr(event, clock)
    owner = _stage_of_nodes(events)
    behind = dict.fromkeys(forward, 0.0)
    for event in events:
        name = owner.get((event.fwd_thread, event.sequence_nr))
        # A node inside another recomputes a part of the forward pass: its time is in the outer one's.
        if name and event.name.startswith(NODE) and not any(up.name.startswith(NODE) for up in _above(event)):
            behind[name] += getattr(event, clock)
    total = sum(e.self_device_time_total for e in events) if device == "cuda" else _wall(events)
    return [
        {
            "name": name,
            "forward_ms": forward[name] / 1e3 / ACTIVE,
            "backward_ms": behind[name] / 1e3 / ACTIVE if backward else None,
            "share": (forward[name] + behind[name]) / (total or 1.0),
        }
        for name in forward
    ]


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


def _wall(events: Iterable[FunctionEvent]) -> float:
    return sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep"))


def _heaviest(profiler: profile, device: str) -> list[dict[str, Any]]:
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    operators = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU and not e.is_user_annotation]
    total = sum(getattr(e, clock) for e in operators) or 1.0
    top = sorted(operators, key=lambda e: -getattr(e, clock))[:10]
    return [
        {
            "name": e.key,
            "calls": e.count / ACTIVE,
            "self_ms": getattr(e, clock) / 1e3 / ACTIVE,
            "share": getattr(e, clock) / total,
        }
        for e in top
        if getattr(e, clock) > 0
    ]
