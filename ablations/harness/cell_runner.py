"""Produce the row of one cell: static analysis, then measurement, each in a child process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ablations.harness.devices import Device
from ablations.harness.results_store import Store
from ablations.harness.sweep import Sweep
from profiling.cases.case import Case
from profiling.execution import subprocess_runner
from profiling.execution.benchmark import Job, measure, process_options, static_analysis
from profiling.execution.subprocess_runner import Outcome
from profiling.meters import roofline
from profiling.schema.row import SchemaError, agree

HEADROOM = 0.9
"""Maximum predicted memory of a cell, as a share of the free memory."""
KEPT = 0.3
"""Share of the free memory above which a cell returns freed memory: fragmentation could double it."""
ROOM, STARTED = 2, 1 << 30
"""Memory reserved for a cell on a GPU: ROOM times its predicted memory, for its check and the allocator's cache, plus
STARTED bytes for CUDA and its libraries in every process."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A case to run, the store of its row, and the device model that runs it."""

    sweep: str
    case: Case
    job: Job
    store: Store
    plan: Sweep
    group: str


def key_columns(cell: Cell, device: Device) -> Row:
    """Return the columns of a row that are known before any analysis: the key and the provenance."""
    return cell.case.key_columns(cell.sweep, device.facts["device_name"]) | device.facts


def count(cells: Sequence[Cell], device: Device, known: dict[Case, Outcome]) -> list[Row]:
    """Return the rows of cells after static analysis; status ``measure`` marks cells to be measured.

    Replicates share one static analysis, which is cached in ``known``.
    """
    first = {replace(cell.case, replicate=0): cell for cell in cells}
    missing = {case: cell for case, cell in first.items() if case not in known}
    if missing:
        limits = {"timeout": max(cell.plan.timeout for cell in cells), "memory": _limit(cells[0], device)}
        jobs = [cell.job for cell in missing.values()]
        # No lease: static analysis needs a visible device but does not use it.
        outcomes = subprocess_runner.call_each(static_analysis, jobs, environment=device.variables, **limits)
        result = dict(zip(missing, outcomes, strict=True))
        known |= {case: replace(result[case], seconds=0.0) for case in result if missing[case].plan.replicates > 1}
    else:
        result = {}
    whose = [(cell, replace(cell.case, replicate=0)) for cell in cells]
    return [_counted(cell, result.get(case) or known[case], device) for cell, case in whose]


def _counted(cell: Cell, outcome: Outcome, device: Device) -> Row:
    row = key_columns(cell, device) | {"started_at": _now(), "cell_seconds": outcome.seconds} | (outcome.value or {})
    if outcome.status != "ok":
        return row | {"status": outcome.status, "reason": outcome.reason}
    decided = plan_action(row, cell.case, cell.plan, device)
    return row | {"status": decided, "reason": _why(row, decided, device)}


def run(cell: Cell, row: Row, device: Device, peaks: roofline.Peaks) -> Row:
    """Return the row of a counted cell with its measurement, or with the status and reason of the failure."""
    job = cell.job
    if (row.get("memory_predicted_bytes") or 0) > KEPT * device.available:
        job = replace(job, freed_memory="returned")
    limits: dict[str, Any] = {"timeout": cell.plan.timeout, "memory": _limit(cell, device)} | process_options(job)
    predicted = row.get("memory_predicted_bytes")
    needs = ROOM * predicted + STARTED if predicted else device.available // 8
    outcome = device.call_concurrent(needs, measure, job, fresh=cell.case.needs_fresh_process, **limits)
    if outcome.status == "oom" and device.at_once > 1:
        # Concurrent cells may have held the missing memory.
        outcome = device.call(measure, job, **limits)
    row["started_at"] = _now()
    row["cell_seconds"] += outcome.seconds
    row |= {"status": outcome.status, "reason": outcome.reason} | (outcome.value or {})
    if row["status"] == "ok":
        row |= roofline.columns(row, cell.case, peaks)
        row["macs_agree"] = agree(row.get("macs_analytic"), row["macs_counted"], row.get("macs_fvcore"))
    return row


def append(cell: Cell, row: Row, device: Device) -> str:
    """Append a finished row to its store; returns its status."""
    if cell.case.compiled:
        # The prediction is for the step in eager mode; the compiler fuses some operations.
        row["memory_predicted_bytes"] = None
    try:
        cell.store.append(row)
    except SchemaError as problem:
        # An attention may declare an invalid number: its row becomes an error, and the run continues.
        row = key_columns(cell, device) | {"status": "error", "reason": f"no valid row: {problem}"}
        cell.store.append(row)
    return row["status"]


def plan_action(columns: Row, case: Case, sweep: Sweep, device: Device) -> str:
    """Decide from the static analysis of a case: ``measure``, ``predicted`` (no run) or ``oom`` (does not fit)."""
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
