"""A profile of one configuration: its heaviest operators, and a trace for TensorBoard and Perfetto."""

import socket
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from profiling.workload import Workload

ACTIVE = 3


def profile_steps(work: Workload, device: str, folder: str | None = None) -> list[dict[str, Any]]:
    """The ten operators with the most time of their own, over three steps; with ``folder``, a trace in it too.

    Returns:
        Per operator its ``name``, ``calls`` per step, ``self_ms`` per step and ``share`` of all.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    detail = folder is not None
    with (
        work.settings(),
        profile(
            activities=activities, schedule=schedule(wait=1, warmup=1, active=ACTIVE),
            record_shapes=detail, profile_memory=detail, with_stack=detail, with_modules=detail,
        ) as profiler,
    ):  # fmt: skip
        for _ in range(2 + ACTIVE):
            work.step()
            profiler.step()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # The name TensorBoard's plugin looks for: worker.time.pt.trace.json.
        name = f"{socket.gethostname()}.{time.time_ns() // 1_000_000}.pt.trace.json"
        profiler.export_chrome_trace(str(Path(folder) / name))
    return _heaviest(profiler, device)


def _heaviest(profiler: profile, device: str) -> list[dict[str, Any]]:
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not e.key.startswith(("ProfilerStep", "[memory]"))]
    total = sum(getattr(e, clock) for e in events) or 1.0
    top = sorted(events, key=lambda e: -getattr(e, clock))[:10]
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
