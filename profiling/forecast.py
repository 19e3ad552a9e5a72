"""The theory of many cases at once: as profiling.cell.theory, but several cases share a process.

A process takes longer to warm up than most cases take to count and predict.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import torch

from attention_zoo import Attention, Unsupported
from profiling import isolation
from profiling.case import Case
from profiling.cell import Job, theory
from profiling.isolation import Outcome

TOGETHER = 4
"""Cases that share a process, at most: few enough to keep all processors busy to the end."""


def forecast(jobs: Sequence[Job], timeout: float = 120.0) -> Iterator[Outcome]:
    """The theory of each job, in their order; ``unsupported`` where the implementation cannot run on the device.

    What the device refuses is known only where there is such a device. Call isolation.start() before.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for outcomes in pool.map(lambda group: isolation.call_each(_theory, group, timeout=timeout), _groups(jobs)):
                yield from outcomes
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Neighbours of one attention together, so that a crash concerns no other."""
    groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.case.name)]
    return [group[i : i + TOGETHER] for group in groups for i in range(0, len(group), TOGETHER)]


def _theory(job: Job) -> dict[str, Any]:
    job.load()
    if reason := _refusal(job.case):
        raise Unsupported(reason)
    return theory(job)


def _refusal(case: Case) -> str | None:
    """Why the case's implementation cannot run on its device, if that device is here; shapes alone do not tell."""
    with torch.device("meta"):
        module = case.module()
    if not isinstance(module, Attention) or type(module).unsupported is Attention.unsupported or case.impl == "auto":
        return None
    if case.device == "cuda" and not torch.cuda.is_available():
        return None
    dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    # One element, whatever the size.
    return module.unsupported(case.impl, torch.empty((), dtype=dtype, device=case.device).expand(case.shape()))
