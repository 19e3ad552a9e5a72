"""The row of one cell: from its theory, then from its measurement, each in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ablations.devices import Device
from ablations.store import Store
from ablations.sweep import Sweep
from profiling import isolation, roofline
from profiling.case import Case
from profiling.cell import Job, measure, theory
from profiling.isolation import Outcome
from profiling.rows import SchemaError, agree

HEADROOM = 0.9
"""Share of the free memory that a cell may be predicted to need."""
KEPT = 0.3
"""Share of the free memory above which a cell may not keep what it frees: in pieces, that could be twice as much."""
ROOM, STARTED = 2, 1 << 30
"""What a cell on a GPU is given room for: so many times its predicted memory, for its check and for what the allocator
keeps, and the bytes that CUDA and its libraries take in every process."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A case to run, where its row goes, and which model of device is to run it."""

    sweep: str
    case: Case
    job: Job
    store: Store
    plan: Sweep
    group: str


def who(cell: Cell, device: Device) -> Row:
    """What a row says of its cell before anything is known: the key, and what it is taken with."""
    return cell.case.who(cell.sweep, device.facts["device_name"]) | device.facts


def count(cells: Sequence[Cell], device: Device, known: dict[Case, Outcome]) -> list[Row]:
    """The rows of cells by theory alone, their status ``measure`` where they are to be measured.

    Replicates have one theory: it is put into ``known``, and taken from there.
    """
    first = {replace(cell.case, replicate=0): cell for cell in cells}
    missing = {case: cell for case, cell in first.items() if case not in known}
    if missing:
        limits = {"timeout": max(cell.plan.timeout for cell in cells), "memory": _limit(cells[0], device)}
        jobs = [cell.job for cell in missing.values()]
        # Beside whatever runs on the device: theory needs to see it, and does not use it.
        outcomes = isolation.call_each(theory, jobs, environment=device.variables, **limits)
        found = dict(zip(missing, outcomes, strict=True))
        known |= {case: replace(found[case], seconds=0.0) for case in found if missing[case].plan.replicates > 1}
    else:
        found = {}
    whose = [(cell, replace(cell.case, replicate=0)) for cell in cells]
    return [_counted(cell, found.get(case) or known[case], device) for cell, case in whose]


def _counted(cell: Cell, outcome: Outcome, device: Device) -> Row:
    row = who(cell, device) | {"started_at": _now(), "cell_seconds": outcome.seconds} | (outcome.value or {})
    if outcome.status != "ok":
        return row | {"status": outcome.status, "reason": outcome.reason}
    decided = verdict(row, cell.case, cell.plan, device)
    return row | {"status": decided, "reason": _why(row, decided, device)}


def run(cell: Cell, row: Row, device: Device, peaks: roofline.Peaks) -> Row:
    """The row of a counted cell with its measurement, or how that failed."""
    job = cell.job
    if (row.get("memory_predicted_bytes") or 0) > KEPT * device.available:
        job = replace(job, freed_memory="returned")
    limits = {"timeout": cell.plan.timeout, "memory": _limit(cell, device)}
    predicted = row.get("memory_predicted_bytes")
    needs = ROOM * predicted + STARTED if predicted else device.available // 8
    outcome = device.call_beside(needs, measure, job, **limits)
    if outcome.status == "oom" and device.at_once > 1:
        # Others may have held what it lacked.
        outcome = device.call(measure, job, **limits)
    row["started_at"] = _now()
    row["cell_seconds"] += outcome.seconds
    row |= {"status": outcome.status, "reason": outcome.reason} | (outcome.value or {})
    if row["status"] == "ok":
        row |= roofline.columns(row, cell.case, peaks)
        row["macs_agree"] = agree(row.get("macs_analytic"), row["macs_counted"], row.get("macs_fvcore"))
    return row


def append(cell: Cell, row: Row, device: Device) -> str:
    """Put a finished row into its store; returns its status."""
    if cell.case.compiled:
        # What was predicted is the step as written; the compiler fuses some of it away.
        row["memory_predicted_bytes"] = None
    try:
        cell.store.append(row)
    except SchemaError as problem:
        # What an attention says of itself may be no number: that costs its row, not the run.
        row = who(cell, device) | {"status": "error", "reason": f"no valid row: {problem}"}
        cell.store.append(row)
    return row["status"]


def verdict(columns: Row, case: Case, sweep: Sweep, device: Device) -> str:
    """What to do with a case, from its theory: measure, or leave it predicted, or oom since it cannot fit."""
    if not sweep.measured(case):
        return "predicted"
    predicted = columns.get("memory_predicted_bytes")
    if predicted and predicted > HEADROOM * device.available and not sweep.oversized:
        return "oom"
    macs = (columns.get("macs_counted") or 0) + (columns.get("macs_backward_counted") or 0)
    return "predicted" if case.device == "cpu" and macs > sweep.most_macs_on_cpu else "measure"


def _why(row: Row, decided: str, device: Device) -> str:
    if decided == "oom":
        needs, has = row["memory_predicted_bytes"] / 2**30, device.available / 2**30
        return f"predicted: needs {needs:.1f} GiB, {has:.1f} GiB are free"
    return "counted and predicted only, as the sweep asks" if decided == "predicted" else ""


def _limit(cell: Cell, device: Device) -> int | None:
    return device.available if cell.case.device == "cpu" else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
