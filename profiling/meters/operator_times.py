"""A profile of one configuration: its stages and heaviest operators, and a trace for TensorBoard and Perfetto."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from profiling.cases.workload import Workload
from profiling.meters import stage_times

ACTIVE = 3


def breakdown(work: Workload, device: str) -> dict[str, list[dict[str, Any]]]:
    """Time per stage and operator, over three profiled steps; profiling slows them slightly.

    Returns:
        ``stages``: from profiling.meters.stage_times.shares; empty if the module has no stages.
        ``heaviest_operators``: the ten with the most self time: ``name``, ``calls`` per step, ``self_ms`` per step
        and ``share`` of all operators.
    """
    profiler = _profile(work, device)
    return {
        "stages": stage_times.shares(profiler.events(), ACTIVE, device, work.mode == "forward_backward"),
        "heaviest_operators": _heaviest(profiler, device),
    }


def write_trace(work: Workload, device: str, folder: str) -> None:
    """Write a trace of three steps into ``folder``, with shapes, memory and the modules of the operators.

    On CUDA, also write a snapshot of the allocator's memory. Separate from :func:`breakdown`, because this detail
    slows the steps.
    """
    profiler = _profile(work, device, record_shapes=True, profile_memory=True, with_stack=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    # The name that TensorBoard's plugin expects: worker.time.pt.trace.json.
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
    # acc_events: without it, PyTorch 2.11 warns in every process. There is one cycle, so nothing accumulates.
    with work.settings(), profile(activities=activities, schedule=steps, acc_events=True, **detail) as profiler:
        for _ in range(2 + ACTIVE):
            work.step()
            profiler.step()
    return profiler


def sdpa_backend(step: Callable[[], object]) -> str | None:
    """Which fused kernel scaled_dot_product_attention runs in ``step``; None if it runs none (or is not called)."""
    # Profiled, because compiled code does not run under a dispatch mode. acc_events: as in _profile.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        step()
    prefix = "aten::_scaled_dot_product_"
    names = {event.name for event in profiler.events()}
    kernels = [n.removeprefix(prefix) for n in names if n.startswith(prefix) and not n.endswith("_backward")]
    return " ".join(sorted(kernels)) or None


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
