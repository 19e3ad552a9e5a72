"""From cases to rows: plan, predict, measure in isolation, append."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ablations.store import Store, exclusive
from ablations.sweep import Sweep
from profiling import environment, isolation, roofline
from profiling.case import Case
from profiling.cell import Job, measure, theory
from profiling.latency import QUICK
from profiling.rows import SchemaError, agree

HEADROOM = 0.9
"""Share of the free memory that a cell may be predicted to need."""


class LaunchError(RuntimeError):
    """The run cannot start on this device; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How to run, as the command line says it."""

    device: str = "cpu"
    results: Path = Path("results")
    smoke: bool = False
    fresh: bool = False
    retry_failed: bool = False
    plugins: tuple[str, ...] = ()


@dataclass
class Report:
    """What a run has done."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    skipped: int = 0


@dataclass(frozen=True)
class Cell:
    """A case to run, and where its row goes."""

    sweep: str
    case: Case
    job: Job
    store: Store
    plan: Sweep


class Launcher:
    """Runs sweeps on one device of this machine, one cell at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        isolation.start()
        self.facts = self._ask(environment.describe, settings.device)
        self.available = self._ask(environment.available_bytes, settings.device)
        self.folder = settings.results / environment.slug(self.facts["device_name"])

    def run(self, sweeps: dict[str, Sweep]) -> Iterator[tuple[Cell, int, int]]:
        """Run what is not finished; yields each cell before it runs, with its number and their total."""
        self.report = Report(self.folder)
        with exclusive(self.folder):
            cells = list(self._plan(sweeps, self.report))
            peaks = roofline.stored(self.folder, self.settings.device, self._ask)
            done = 0
            started: list[tuple[Cell, dict[str, Any]]] = []
            for cell, row in self._theories(cells):
                yield cell, done, len(cells)
                if row["status"] == "measure":
                    started.append((cell, row))
                else:
                    self._finish(cell, row)
                    done += 1
            for cell, row in started:
                yield cell, done, len(cells)
                self._finish(cell, self._measured(cell, row, peaks))
                done += 1

    def _theories(self, cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The row of each cell so far, its status ``measure`` where it is to be measured.

        On all processors at once, before anything is timed.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                yield from zip(cells, pool.map(self._theory, cells), strict=True)
            finally:
                pool.shutdown(cancel_futures=True)

    def _finish(self, cell: Cell, row: dict[str, Any]) -> None:
        if cell.case.compiled:
            # What was predicted is the step as written; the compiler fuses some of it away.
            row["memory_predicted_bytes"] = None
        try:
            cell.store.append(row)
        except SchemaError as problem:
            # What an attention says of itself may be no number: that costs its row, not the run.
            row = self._who(cell) | {"status": "error", "reason": f"no valid row: {problem}"}
            cell.store.append(row)
        self.report.statuses[row["status"]] += 1

    def plan(self, sweep: Sweep) -> Iterator[tuple[Case, dict[str, Any], str]]:
        """Every case of a sweep with its theory and what would become of it; nothing is run or written."""
        for case in sweep.cases(self.settings.device, self.settings.smoke):
            outcome = isolation.call(theory, self._job(case, sweep), timeout=sweep.timeout)
            columns = outcome.value or {"reason": f"{outcome.status}: {outcome.reason}"}
            yield case, columns, self._verdict(columns, case, sweep)

    def _plan(self, sweeps: dict[str, Sweep], report: Report) -> Iterator[Cell]:
        # All of them are opened before the first is changed: one may be refused.
        stores = {name: Store(self.folder / f"{name}.csv") for name in sweeps}
        for name, sweep in sweeps.items():
            store = stores[name]
            if self.settings.fresh:
                store.set_aside()
            report.files.append(store.path)
            cases = sweep.cases(self.settings.device, self.settings.smoke)
            if sweep.replicates > 1:
                random.Random(0).shuffle(cases)
            for case in cases:
                if store.finished(case.key(name, self.facts["device_name"]), self.settings.retry_failed):
                    report.skipped += 1
                else:
                    job = self._job(case, sweep)
                    yield Cell(name, case, job, store, sweep)

    def _job(self, case: Case, sweep: Sweep) -> Job:
        return Job(case, self.settings.plugins, QUICK if self.settings.smoke else sweep.patience)

    def _theory(self, cell: Cell) -> dict[str, Any]:
        row = self._who(cell) | {"started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        outcome = isolation.call(theory, cell.job, timeout=cell.plan.timeout, memory=self._limit())
        row |= (outcome.value or {}) | {"cell_seconds": outcome.seconds}
        if outcome.status != "ok":
            return row | {"status": outcome.status, "reason": outcome.reason}
        verdict = self._verdict(row, cell.case, cell.plan)
        return row | {"status": verdict, "reason": self._why(row, verdict)}

    def _measured(self, cell: Cell, row: dict[str, Any], peaks: roofline.Peaks) -> dict[str, Any]:
        row["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        outcome = isolation.call(measure, cell.job, timeout=cell.plan.timeout, memory=self._limit())
        row["cell_seconds"] += outcome.seconds
        row |= {"status": outcome.status, "reason": outcome.reason} | (outcome.value or {})
        if row["status"] == "ok":
            row |= roofline.columns(row, cell.case, peaks)
            row["macs_agree"] = agree(row.get("macs_analytic"), row["macs_counted"], row["macs_fvcore"])
        return row

    def _who(self, cell: Cell) -> dict[str, Any]:
        return cell.case.who(cell.sweep, self.facts["device_name"]) | self.facts

    def _verdict(self, columns: dict[str, Any], case: Case, sweep: Sweep) -> str:
        """What to do with a case, from its theory: measure, or leave it predicted, or oom since it cannot fit."""
        if not sweep.measured(case):
            return "predicted"
        predicted = columns.get("memory_predicted_bytes")
        if predicted and predicted > HEADROOM * self.available and not sweep.oversized:
            return "oom"
        macs = (columns.get("macs_counted") or 0) + (columns.get("macs_backward_counted") or 0)
        return "predicted" if case.device == "cpu" and macs > sweep.most_macs_on_cpu else "measure"

    def _why(self, row: dict[str, Any], verdict: str) -> str:
        if verdict == "oom":
            needs, has = row["memory_predicted_bytes"] / 2**30, self.available / 2**30
            return f"predicted: needs {needs:.1f} GiB, {has:.1f} GiB are free"
        return "counted and predicted only, as the sweep asks" if verdict == "predicted" else ""

    def _limit(self) -> int | None:
        return self.available if self.settings.device == "cpu" else None

    def _ask(self, question: Any, *arguments: Any) -> Any:
        outcome = isolation.call(question, *arguments)
        if outcome.status != "ok":
            raise LaunchError(f"cannot use {self.settings.device}: {outcome.reason}")
        return outcome.value
