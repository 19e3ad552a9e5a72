"""From cases to rows: plan, predict, measure in isolation, append."""

import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.cells import Cell, append, count, run, verdict
from ablations.devices import Device, find
from ablations.schedule import schedule
from ablations.store import Store, exclusive
from ablations.sweep import Sweep
from profiling import environment, isolation, roofline
from profiling.case import Case
from profiling.cell import Job, theory
from profiling.isolation import Outcome
from profiling.latency import QUICK
from profiling.replicates import settled


@dataclass(frozen=True)
class Settings:
    """How to run, as the command line says it."""

    device: str = "cpu"
    results: Path = Path("results")
    smoke: bool = False
    fresh: bool = False
    retry_failed: bool = False
    plugins: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    minutes: float = math.inf


@dataclass
class Report:
    """What a run has done, and how many cells it had no time for."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    left: int = 0


class Launcher:
    """Runs sweeps on the devices of this machine, one cell at a time on each.

    Every model of device has a results folder of its own, and runs every cell; devices of one model share them.
    """

    def __init__(self, settings: Settings, devices: Sequence[Device] | None = None) -> None:
        self.settings = settings
        isolation.start()
        self.devices = list(devices or find(settings.device, settings.gpus))
        self.models: dict[str, list[Device]] = {}
        for device in self.devices:
            self.models.setdefault(environment.slug(device.facts["device_name"]), []).append(device)
        self.facts = self.devices[0].facts
        self.folder = settings.results / next(iter(self.models))
        self.report = Report(self.folder)
        self._known: dict[Case, Outcome] = {}
        self._until = math.inf

    def run(self, sweeps: dict[str, Sweep]) -> Iterator[tuple[Cell, int, int]]:
        """Run what is not finished; yields each cell before it runs, with its number and their total.

        Every case of every sweep is run once before any is run again. Where a sweep wants several processes for a
        case, more of them follow until they agree. Once the time is up no cell is begun.
        """
        self.report = Report(self.folder)
        self._until = time.monotonic() + 60 * self.settings.minutes
        with contextlib.ExitStack() as held:
            for model in self.models:
                held.enter_context(exclusive(self.settings.results / model))
            # All are opened before the first is changed: one may be refused.
            stores = {model: self._stores(sweeps, model) for model in self.models}
            plans = [self._plan(sweeps, model, opened) for model, opened in stores.items()]
            together = itertools.chain.from_iterable(itertools.zip_longest(*plans))
            cells = list(filter(None, together))
            for number, replicate in enumerate(sorted({cell.case.replicate for cell in cells}) or [0]):
                if number:
                    # So that the luck of one server's layout is not that of the run.
                    isolation.restart()
                before = sum(cell.case.replicate < replicate for cell in cells)
                for cell, done, _ in self.work([cell for cell in cells if cell.case.replicate == replicate]):
                    yield cell, before + done, len(cells)
            while time.monotonic() < self._until and (more := self._more(sweeps, stores)):
                isolation.restart()
                yield from self.work(more)

    def _more(self, sweeps: dict[str, Sweep], stores: dict[str, dict[str, Store]]) -> list[Cell]:
        return [cell for model, opened in stores.items() for cell in self._unsettled(sweeps, model, opened)]

    def work(self, cells: Sequence[Cell]) -> Generator[tuple[Cell, int, int], None, None]:
        """Run these cells; yields as :meth:`run` does."""
        self.peaks = {
            model: roofline.stored(self.settings.results / model, self.settings.device, devices[0].ask)
            for model, devices in self.models.items()
        }
        done = 0
        beside = self.settings.device != "cpu"
        in_time = itertools.takewhile(lambda _: time.monotonic() < self._until, cells)
        for finished, cell, row in schedule(in_time, self._count, self._measure, self.models, beside):
            if finished and row:
                self.report.statuses[append(cell, row, self.models[cell.group][0])] += 1
                done += 1
            elif not finished:
                yield cell, done, len(cells)
        self.report.left += len(cells) - done

    def plan(self, sweep: Sweep) -> Iterator[tuple[Case, dict[str, Any], str]]:
        """Every case of a sweep with its theory and what would become of it; nothing is run or written."""
        for case in sweep.cases(self.settings.device, self.settings.smoke):
            if case.replicate:
                continue
            outcome = isolation.call(theory, self._job(case, sweep), timeout=sweep.timeout)
            columns = outcome.value or {"reason": f"{outcome.status}: {outcome.reason}"}
            yield case, columns, verdict(columns, case, sweep, self.devices[0])

    def cell(self, name: str, sweep: Sweep, case: Case, store: Store, model: str) -> Cell:
        """A case of the sweep of this name, to be run on this model of device."""
        return Cell(name, case, self._job(case, sweep), store, sweep, model)

    def _job(self, case: Case, sweep: Sweep) -> Job:
        patience = QUICK if self.settings.smoke else sweep.patience
        return Job(case, self.settings.plugins, patience, sweep.freed_memory)

    def _stores(self, sweeps: dict[str, Sweep], model: str) -> dict[str, Store]:
        return {name: Store(self.settings.results / model / f"{name}.csv") for name in sweeps}

    def _plan(self, sweeps: dict[str, Sweep], model: str, stores: dict[str, Store]) -> Iterator[Cell]:
        device = self.models[model][0].facts["device_name"]
        for name, sweep in sweeps.items():
            store = stores[name]
            if self.settings.fresh:
                store.set_aside()
            self.report.files.append(store.path)
            for case in dealt(sweep, self.settings):
                if store.finished(case.key(name, device), self.settings.retry_failed):
                    self.report.skipped += 1
                else:
                    yield self.cell(name, sweep, case, store, model)

    def _unsettled(self, sweeps: dict[str, Sweep], model: str, stores: dict[str, Store]) -> Iterator[Cell]:
        """One more process for every case whose processes do not agree yet."""
        device = self.models[model][0].facts["device_name"]
        for name, sweep in sweeps.items():
            if sweep.replicates == 1 or self.settings.smoke:
                continue
            times = stores[name].times()
            for case in dict.fromkeys(replace(case, replicate=0) for case in dealt(sweep, self.settings)):
                processes = (replace(case, replicate=n) for n in itertools.count())
                keys = (process.key(name, device) for process in processes)
                found = [times[key] for key in itertools.takewhile(times.__contains__, keys)]
                if found and None not in found and not settled([ms for ms in found if ms is not None]):
                    yield self.cell(name, sweep, replace(case, replicate=len(found)), stores[name], model)

    def _count(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        return count(cells, self.models[cells[0].group][0], self._known)

    def _measure(self, cell: Cell, row: dict[str, Any], device: Device) -> dict[str, Any]:
        if time.monotonic() >= self._until:
            return {}
        return run(cell, row, device, self.peaks[cell.group])


def dealt(sweep: Sweep, settings: Settings) -> list[Case]:
    """The cases of a sweep in the order in which they are run: at random, always the same, if there are replicates."""
    cases = sweep.cases(settings.device, settings.smoke)
    if sweep.replicates > 1:
        random.Random(0).shuffle(cases)
    return cases
