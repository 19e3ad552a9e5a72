"""The static analysis of many cases at once. Several cases share a process, unlike in :mod:`benchmark`.

A process takes longer to warm up than most cases take to count and predict.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import torch

from attention_zoo import Attention, Unsupported
from profiling.cases.case import Case
from profiling.cases.workload import PARAMETERS
from profiling.execution import subprocess_runner
from profiling.execution.benchmark import Job, static_analysis
from profiling.execution.subprocess_runner import Outcome

TOGETHER = 4
"""Maximum number of cases per process: few enough to keep all processors busy to the end."""


def analyze_batch(jobs: Sequence[Job], timeout: float = 120.0) -> Iterator[Outcome]:
    """The static analysis of each job, in order; ``unsupported`` where the implementation cannot run on the device.

    Device support is checked only on a machine with such a device. Call subprocess_runner.start() before.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for outcomes in pool.map(
                lambda group: subprocess_runner.call_each(_theory, group, timeout=timeout), _groups(jobs)
            ):
                yield from outcomes
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group adjacent jobs by attention, so that a crash affects no other one."""
    groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.case.name)]
    return [group[i : i + TOGETHER] for group in groups for i in range(0, len(group), TOGETHER)]


def _theory(job: Job) -> dict[str, Any]:
    job.load()
    if reason := _refusal(job.case):
        raise Unsupported(reason)
    return static_analysis(job)


def _refusal(case: Case) -> str | None:
    """Why the case's implementation cannot run on its device; None if it can, or if the device is not here."""
    if case.impl == "auto" or (case.device == "cuda" and not torch.cuda.is_available()):
        return None
    with torch.device("meta"):
        module = case.module()
    dtype = PARAMETERS.get(case.dtype, torch.float32)
    inside = [m for m in module.modules() if isinstance(m, Attention)]
    for attention in (m for m in inside if type(m).unsupported is not Attention.unsupported):
        # One element at any size.
        x = torch.empty((), dtype=dtype, device=case.device).expand(case.batch, 1, 1, attention.dim)
        with torch.set_grad_enabled(case.mode != "forward"):
            if reason := attention.unsupported(case.impl, x if case.kind == "model" else x.expand(case.shape())):
                return reason
    return None
