"""Time the best candidates of a recommendation here, as cells of a sweep.

Each is measured in a process of its own, one after the other, and is checked before it is timed.
The rows are of the usual schema, in ``results/<device>/recommend.csv``, and the next recommendation reads them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ablations.analysis.candidates import Candidate
from ablations.analysis.compare import read
from ablations.analysis.recommend import RECOMMEND, Device, Predicted, Question, judge, rank
from ablations.harness import devices
from ablations.harness.cell_runner import Cell, append, count, run
from ablations.harness.results_store import Store, exclusive
from ablations.harness.sweep import Sweep
from profiling.cases.case import Case
from profiling.execution import environment
from profiling.execution.benchmark import Job
from profiling.execution.subprocess_runner import Outcome
from profiling.meters import roofline

PLAN = Sweep(
    question="How fast are the best candidates of a recommendation on this device?",
    expect="what the recommendation asked for",
    axes={},
    timeout=600,
)
"""How a candidate is measured; its cells are chosen by recommendations."""
LEAST_SECONDS = 1.0
"""Time below which no candidate is begun."""
SECONDS_TO_ANSWER = 1.0
"""Part of the time limit that is left for judging and printing."""
TIME_IS_UP = "the time was up"
SHARE = 0.5
"""Share of the time left that a candidate may take, unless it is the last: one that is slow to check leaves time for
others."""
Tell = Callable[[int, int, float, Candidate], None]
"""Called before a candidate is timed, with its number, their total, and the seconds left."""


@dataclass
class Timed:
    """What was timed.

    Attributes:
        device: the device, with the new rows.
        path: the file of the new rows.
        seconds: the time limit.
        count: candidates that have a new row.
        skipped: candidates without a latency, and why; the others that failed have a row with the reason.
    """

    device: Device
    path: Path
    seconds: float
    count: int = 0
    skipped: list[tuple[Candidate, str]] = field(default_factory=list)


def time_best(
    predicted: Sequence[Predicted], asked: Question, most: int | None, seconds: float, begin: float, results: Path,
    tell: Tell,
) -> Timed:  # fmt: skip
    """Time the ``most`` best candidates (None: all) that have no latency measured at this size, the best first.

    Args:
        predicted: all candidates.
        asked: the request; its device must be here.
        most: how many of the best to look at; those measured before count too.
        seconds: time limit, from ``begin`` on. What would take longer is ended and has no row.
        begin: monotonic time at which the limit begins.
        results: the folder of all devices' results.
        tell: called before each candidate.

    Raises:
        LaunchError: it cannot be used.
        StoreError: another run uses the results of this device, or they cannot be written.
    """
    folder = results / environment.slug(asked.device.name or "")
    timed = Timed(asked.device, folder / f"{RECOMMEND}.csv", seconds)
    answer = judge(predicted, asked)
    best = sorted([*answer.fits, *answer.unknown], key=rank)[:most]
    if todo := [candidate for candidate in best if candidate.latency.source != "measured"]:
        with exclusive(folder):
            store = Store(timed.path)
            known = {candidate.case: outcome for candidate, outcome in predicted}
            _time(todo, known, asked, store, begin + seconds - SECONDS_TO_ANSWER, timed, tell)
        timed.device = replace(asked.device, rows=read(folder))
    return timed


def _time(
    todo: Sequence[Candidate], known: dict[Case, Outcome], asked: Question, store: Store, until: float, timed: Timed,
    tell: Tell,
) -> None:  # fmt: skip
    """Time these candidates until monotonic ``until``; adds to ``timed``."""
    device = next(d for d in devices.find(asked.device.kind) if d.facts["device_name"] == asked.device.name)
    peaks = roofline.stored(store.path.parent, asked.device.kind, device.ask)
    for number, candidate in enumerate(todo):
        if (left := until - time.monotonic()) < LEAST_SECONDS:
            timed.skipped += [(one, TIME_IS_UP) for one in todo[number:]]
            return
        tell(number, len(todo), left, candidate)
        allowed = min(PLAN.timeout, left if number == len(todo) - 1 else SHARE * left)
        job = Job(candidate.case, asked.plugins, PLAN.stopping, PLAN.freed_memory)
        cell = Cell(RECOMMEND, candidate.case, job, store, replace(PLAN, timeout=allowed), device.facts["device_name"])
        (row,) = count([cell], device, known)
        if row["status"] == "measure":
            row = run(cell, row, device, peaks)
        if row["status"] == "timeout" and allowed < PLAN.timeout:
            # The limit was that of the request: no failure of the candidate, so no row.
            timed.skipped.append((candidate, f"not done within {allowed:.0f} s"))
            continue
        timed.count += 1
        if append(cell, row, device) == "oom":
            timed.skipped.append((candidate, f"oom: {row['reason']}"))
