"""Run cases: plan, predict, measure in isolation, append the row."""

import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.harness import static_analysis_cache
from ablations.harness.cell_runner import Cell, append, count, plan_action, run
from ablations.harness.devices import Device, find
from ablations.harness.results_store import Store, exclusive
from ablations.harness.scheduler import schedule
from ablations.harness.sweep import Sweep
from profiling.cases.case import Case
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job
from profiling.execution.subprocess_runner import Outcome
from profiling.meters import roofline
from profiling.meters.latency import QUICK


@dataclass(frozen=True)
class Settings:
    """Settings of a run, from the command line."""

    device: str = "cpu"
    results: Path = Path("results")
    smoke: bool = False
    fresh: bool = False
    retry_failed: bool = False
    plugins: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    minutes: float = math.inf
    static_analysis: Path | None = None


@dataclass
class Report:
    """Outcome of a run; ``left`` counts the cells not run before the time limit."""

    files: list[Path] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    left: int = 0

    @property
    def folders(self) -> list[Path]:
        """The results folders of the device models that ran."""
        return sorted({path.parent for path in self.files})


class Launcher:
    """Runs sweeps on the devices of this machine; each device times one cell at a time.

    Each device model has its own results folder and runs every cell; devices of one model share the cells.
    """

    def __init__(self, settings: Settings, devices: Sequence[Device] | None = None) -> None:
        self.settings = settings
        subprocess_runner.start()
        self.devices = list(devices or find(settings.device, settings.gpus))
        self.models: dict[str, list[Device]] = {}
        for device in self.devices:
            self.models.setdefault(environment.slug(device.facts["device_name"]), []).append(device)
        self.facts = self.devices[0].facts
        self.folder = settings.results / next(iter(self.models))
        self.report = Report()
        self._known: dict[Case, Outcome] = {}
        self._until = math.inf

    def run(self, sweeps: dict[str, Sweep]) -> Iterator[tuple[Cell, int, int]]:
        """Run the unfinished cells; yields each cell before it runs, with its number and the total.

        Every case of every sweep runs once before any case is repeated. No cell starts after the time limit.
        """
        self.report = Report()
        self._until = time.monotonic() + 60 * self.settings.minutes
        with contextlib.ExitStack() as held:
            for model in self.models:
                held.enter_context(exclusive(self.settings.results / model))
            # Open all files before changing any: opening one may fail.
            stores = {model: self._stores(sweeps, model) for model in self.models}
            plans = [self._plan(sweeps, model, opened) for model, opened in stores.items()]
            together = itertools.chain.from_iterable(itertools.zip_longest(*plans))
            yield from self.work(list(filter(None, together)))

    def work(self, cells: Sequence[Cell]) -> Generator[tuple[Cell, int, int], None, None]:
        """Run these cells; yields as :meth:`run` does."""
        self.peaks = {
            model: roofline.stored(self.settings.results / model, self.settings.device, devices[0].ask)
            for model, devices in self.models.items()
        }
        done = 0
        concurrent = self.settings.device != "cpu"
        timeout = max((cell.plan.timeout for cell in cells), default=0.0) if concurrent else None
        self._know([cell.job for cell in cells], timeout)
        for number, replicate in enumerate(sorted({cell.case.replicate for cell in cells})):
            if number:
                # Children of one fork server share a memory layout; replicates need different ones.
                subprocess_runner.restart()
            group = (cell for cell in cells if cell.case.replicate == replicate)
            in_time = itertools.takewhile(lambda _: time.monotonic() < self._until, group)
            for finished, cell, row in schedule(in_time, self._count, self._measure, self.models, concurrent):
                if finished and row:
                    self.report.statuses[append(cell, row, self.models[cell.group][0])] += 1
                    done += 1
                elif not finished:
                    yield cell, done, len(cells)
        self.report.left += len(cells) - done

    def plan(self, sweep: Sweep) -> Iterator[tuple[Case, dict[str, Any], str]]:
        """Yield every case of a sweep with its static analysis and planned action; nothing is run or written."""
        cases = [case for case in sweep.cases(self.settings.device, self.settings.smoke) if not case.replicate]
        self._know([self._job(case, sweep) for case in cases], sweep.timeout)
        for case in cases:
            outcome = self._known[case]
            columns = outcome.value or {"reason": f"{outcome.status}: {outcome.reason}"}
            yield case, columns, plan_action(columns, case, sweep, self.devices[0])

    def cell(self, name: str, sweep: Sweep, case: Case, store: Store, model: str) -> Cell:
        """Return the cell of a case of this sweep on this device model."""
        return Cell(name, case, self._job(case, sweep), store, sweep, model)

    def _job(self, case: Case, sweep: Sweep) -> Job:
        stopping = QUICK if self.settings.smoke else sweep.stopping
        return Job(case, self.settings.plugins, stopping, sweep.freed_memory)

    def _stores(self, sweeps: dict[str, Sweep], model: str) -> dict[str, Store]:
        return {name: Store(self.settings.results / model / f"{name}.csv") for name in sweeps}

    def _plan(self, sweeps: dict[str, Sweep], model: str, stores: dict[str, Store]) -> Iterator[Cell]:
        device = self.models[model][0].facts["device_name"]
        for name, sweep in sweeps.items():
            store = stores[name]
            if self.settings.fresh:
                store.archive()
            self.report.files.append(store.path)
            for case in ordered_cases(sweep, self.settings):
                if store.finished(case.key(name, device), self.settings.retry_failed):
                    self.report.skipped += 1
                else:
                    yield self.cell(name, sweep, case, store, model)

    def _know(self, jobs: Sequence[Job], timeout: float | None) -> None:
        """Load the static analysis of these jobs, and count the rest now, unless ``timeout`` is None."""
        missing = {static_analysis_cache.same(job.case): job for job in jobs}
        missing = {case: job for case, job in missing.items() if case not in self._known}
        if missing and self.settings.static_analysis:
            self._known |= static_analysis_cache.load(self.settings.static_analysis, missing)
        left = [job for case, job in missing.items() if case not in self._known]
        if left and timeout is not None:
            self._known |= static_analysis_cache.counted(left, timeout, self.devices[0].variables)

    def _count(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        return count(cells, self.models[cells[0].group][0], self._known)

    def _measure(self, cell: Cell, row: dict[str, Any], device: Device) -> dict[str, Any]:
        if time.monotonic() >= self._until:
            return {}
        return run(cell, row, device, self.peaks[cell.group])


def ordered_cases(sweep: Sweep, settings: Settings) -> list[Case]:
    """Return the cases of a sweep in run order: shuffled with a fixed seed if there are replicates."""
    cases = sweep.cases(settings.device, settings.smoke)
    if sweep.replicates > 1:
        random.Random(0).shuffle(cases)
    return cases
