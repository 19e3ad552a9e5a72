"""Run trials: each in a process of its own on one thread, as many at once as there are processors; append the rows."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ablations.capability.sweep import CapabilitySweep
from ablations.capability.training import TEST_IMAGES, Job, count, train
from ablations.capability.trial import Trial
from ablations.harness.devices import Device, ending, find, processors
from ablations.harness.local_runner import Report, Settings
from ablations.harness.results_store import Store, exclusive
from profiling.execution import environment, subprocess_runner
from profiling.execution.subprocess_runner import Outcome
from profiling.schema.capability import CAPABILITY
from profiling.schema.table import SchemaError

THREADS, SMOKE_IMAGES = 1, 8
FACTS = ("torch", "python", "commit", "dirty")
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A trial to run, and the store of its row."""

    sweep: str
    trial: Trial
    store: Store
    timeout: float


class CapabilityLauncher:
    """Runs capability sweeps on this machine: on a CPU one cell per processor, on GPUs one per GPU."""

    def __init__(self, settings: Settings, devices: Sequence[Device] | None = None) -> None:
        self.settings = settings
        subprocess_runner.start()
        self.devices = list(devices or find(settings.device, settings.gpus))
        self.facts = self.devices[0].facts
        self.folder = settings.results / environment.slug(self.facts["device_name"])
        self.report = Report()
        # Accuracy does not depend on what runs beside, unlike latency.
        self._slots = self.devices * (processors() if settings.device == "cpu" else 1)

    def run(self, sweeps: dict[str, CapabilitySweep]) -> Iterator[tuple[str, int, int]]:
        """Run the unfinished cells; yields news, the number of cells done and the total, as cells end."""
        self.report = Report()
        until = time.monotonic() + 60 * self.settings.minutes
        with ExitStack() as held:
            held.enter_context(exclusive(self.folder))
            cells = self._unfinished(sweeps)
            todo, idle, running = iter(cells), list(self._slots), dict[Future[Row], tuple[Cell, Device]]()
            pool = held.enter_context(_Pool(len(self._slots)))
            known: dict[Trial, Row] = {}
            yield f"{len(cells)} trainings", 0, len(cells)
            for done in range(len(cells)):
                while idle and time.monotonic() < until and (cell := next(todo, None)):
                    device = idle.pop()
                    running[pool.submit(self._row, cell, device, known)] = cell, device
                if not running:
                    self.report.left = len(cells) - done
                    return
                future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                cell, device = running.pop(future)
                idle.append(device)
                row = self._append(cell, future.result())
                yield _news(cell, row), done + 1, len(cells)

    def plan(self, sweep: CapabilitySweep) -> Iterator[tuple[Trial, Row]]:
        """Yield every trial of a sweep with what is counted of it; nothing is trained or written."""
        trials = sweep.trials(self.settings.device, self.settings.smoke)
        different = list(dict.fromkeys(trial.same_cost() for trial in trials))
        jobs = [Job(trial, self.settings.plugins, THREADS) for trial in different]
        outcomes = subprocess_runner.call_each(count, jobs, environment=self.devices[0].variables)
        known = {
            trial: outcome.value or {"status": outcome.status, "reason": outcome.reason}
            for trial, outcome in zip(different, outcomes, strict=True)
        }
        for trial in trials:
            yield trial, known[trial.same_cost()]

    def _unfinished(self, sweeps: dict[str, CapabilitySweep]) -> list[Cell]:
        stores = {name: Store(self.folder / f"{name}.csv", CAPABILITY) for name in sweeps}
        cells = []
        for name, store in stores.items():
            if self.settings.fresh:
                store.archive()
            self.report.files.append(store.path)
            for trial in sweeps[name].trials(self.settings.device, self.settings.smoke):
                if store.finished(trial.key(name, self.facts["device_name"]), self.settings.retry_failed):
                    self.report.skipped += 1
                else:
                    cells.append(Cell(name, trial, store, sweeps[name].timeout))
        return cells

    def _row(self, cell: Cell, device: Device, known: dict[Trial, Row]) -> Row:
        row = self._key_columns(cell) | {"started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {"threads": THREADS, "at_once": len(self._slots), "cell_seconds": 0.0}
        counted = self._counted(cell.trial, cell.timeout, known)
        if "status" in counted:
            return row | counted
        outcome = self._call(train, cell.trial, cell.timeout, device)
        row |= {"cell_seconds": outcome.seconds, "status": outcome.status, "reason": outcome.reason}
        return row | counted | (outcome.value or {})

    def _counted(self, trial: Trial, timeout: float, known: dict[Trial, Row]) -> Row:
        """Counts of a trial, or the status and reason of their failure."""
        same = trial.same_cost()
        if same not in known:
            outcome = self._call(count, same, timeout, self.devices[0])
            known[same] = outcome.value or {"status": outcome.status, "reason": outcome.reason}
        return known[same]

    def _call(self, function: Any, trial: Trial, timeout: float, device: Device) -> Outcome:
        images = SMOKE_IMAGES if self.settings.smoke else TEST_IMAGES
        job = Job(trial, self.settings.plugins, THREADS, images)
        memory = device.available if trial.device == "cpu" else None
        return subprocess_runner.call(function, job, timeout=timeout, memory=memory, environment=device.variables)

    def _key_columns(self, cell: Cell) -> Row:
        facts = {name: self.facts.get(name) for name in FACTS}
        return cell.trial.key_columns(cell.sweep, self.facts["device_name"]) | facts

    def _append(self, cell: Cell, row: Row) -> Row:
        try:
            cell.store.append(row)
        except SchemaError as problem:
            row = self._key_columns(cell) | {"status": "error", "reason": f"no valid row: {problem}"}
            cell.store.append(row)
        self.report.statuses[row["status"]] += 1
        return row


def _news(cell: Cell, row: Row) -> str:
    what = f"{cell.sweep}: {cell.trial}"
    if row["status"] != "ok":
        return f"{what}: {row['status']}: {row['reason']}"
    return f"{what}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%} (chance {row['chance']:.1%})"


class _Pool(ThreadPoolExecutor):
    """Joined at the end of the block; an exception kills running cells."""

    def __exit__(self, kind: Any, problem: Any, traceback: Any) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            with ending():
                self.shutdown(wait=True)
