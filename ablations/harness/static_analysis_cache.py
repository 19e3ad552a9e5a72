"""Static analysis on all processors before any timing, so that nothing runs beside a timed cell; cached in a file.

``python -m ablations prepare --device cuda --out static_analysis.json`` analyzes the cells on a machine without a GPU.
A run on a GPU loads the file by ``run_all.py --static-analysis static_analysis.json``.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ablations.harness.devices import ending, processors
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution.benchmark import Job, static_analysis
from profiling.execution.subprocess_runner import Outcome, call_each

TOGETHER = 8
"""Maximum number of cases per process."""
ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "attention_zoo/**/*.py",
    "profiling/cases/*.py",
    *(f"profiling/meters/{name}.py" for name in ("macs", "peak_memory", "operator_call")),
    "profiling/meters/c*_scratch.py",
    *(f"profiling/execution/{name}.py" for name in ("benchmark", "static_analysis")),
)
"""The code that static analysis depends on."""
Known = dict[Case, Outcome]
"""Outcomes of static analysis by case, with replicate 0: all replicates share one static analysis."""


def same(case: Case) -> Case:
    """Return replicate 0 of the case, which has the same static analysis."""
    return replace(case, replicate=0)


def counted(jobs: Iterable[Job], timeout: float, environment: Mapping[str, str]) -> Known:
    """Run the static analysis of these jobs on all processors; a failure is an outcome too."""
    first = {same(job.case): job for job in jobs}
    batches = [[job for _, job in batch] for batch in _batches(list(first.items()))]
    with ThreadPoolExecutor(processors()) as pool:
        try:
            run = [
                pool.submit(call_each, static_analysis, batch, timeout=timeout, environment=environment)
                for batch in batches
            ]
            found = list(itertools.chain.from_iterable(future.result() for future in run))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with ending():
                pool.shutdown()
            raise
    order = [same(job.case) for job in itertools.chain.from_iterable(batches)]
    return dict(zip(order, found, strict=True))


def _batches(jobs: Sequence[tuple[Case, Job]]) -> list[list[tuple[Case, Job]]]:
    """Batch jobs with a stride: neighbours have similar cost, so that each batch mixes large and small jobs."""
    number = -(-len(jobs) // TOGETHER)
    return [list(jobs[first::number]) for first in range(number)]


def save(path: Path, known: Known) -> None:
    """Save the successful outcomes."""
    cases = {_name(case): outcome.value for case, outcome in known.items() if outcome.status == "ok"}
    path.write_text(json.dumps({"code": code(), "cases": cases}), encoding="utf-8")


def load(path: Path, cases: Iterable[Case]) -> Known:
    """Load the outcomes of these cases; empty if the file was written by other code.

    Raises:
        InvalidOption: the file was not written by :func:`save`.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same_code, values = kept["code"] == code(), dict(kept["cases"])
    except (ValueError, KeyError, TypeError) as problem:
        raise InvalidOption(
            f"{path} holds no static analysis ({problem!r}); make it with python -m ablations prepare"
        ) from None
    if not same_code:
        return {}
    expected = {_name(case): same(case) for case in cases}
    return {case: Outcome("ok", values[name]) for name, case in expected.items() if name in values}


def code() -> str:
    """A digest of the code that static analysis depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _name(case: Case) -> str:
    return "\n".join(same(case).key("", ""))
