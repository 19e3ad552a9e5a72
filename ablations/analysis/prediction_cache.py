"""Predictions kept between recommendations: the next request mostly has other limits and the same candidates."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ablations.harness.static_analysis_cache import code
from attention_zoo.core import compilers
from profiling.execution import environment
from profiling.execution.benchmark import Job
from profiling.execution.child_process import Outcome
from profiling.execution.static_analysis import analyze_batch


def user_folder() -> Path | None:
    """The folder of this user's kept predictions. None without a home directory, as for a container's unnamed user."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "vision-attention-bench"


FOLDER = user_folder()
LASTING = ("ok", "unsupported", "error")
"""Outcomes that would be the same again; a timeout may not be."""


def analyze(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """The static analysis of each job, in order, as from :func:`analyze_batch`.

    The outcomes are kept in a file of :data:`FOLDER`, and read from there by the next call with the same jobs, code,
    PyTorch and processor. Those of plugins, whose code may import other files, are not kept. A folder that cannot be
    used is as none.
    """
    if FOLDER is None or not jobs or any(job.plugins for job in jobs):
        yield from analyze_batch(jobs)
        return
    path = FOLDER / f"{_digest(jobs)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = [Outcome(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
        if len(kept) == len(jobs):
            yield from kept
            return
    outcomes = []
    for outcome in analyze_batch(jobs):
        outcomes.append(outcome)
        yield outcome
    if all(outcome.status in LASTING for outcome in outcomes):
        with contextlib.suppress(OSError):
            _write(path, json.dumps([asdict(outcome) for outcome in outcomes]))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _digest(jobs: Sequence[Job]) -> str:
    """Of all that the outcomes depend on: the cases, the code, PyTorch, and what this machine can run."""
    device = jobs[0].case.device
    here = (
        code(), torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(),
        compilers.pytorch_lacks(device),
    )  # fmt: skip
    cases = [job.case.key("", "") for job in jobs]
    return hashlib.sha256(repr((here, environment.check_device(device), cases)).encode()).hexdigest()[:24]
