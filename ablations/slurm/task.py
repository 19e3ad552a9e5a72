"""A shard: the share of a campaign's cells that one Slurm task runs. Its folder holds all of its state.

The folder holds the cells and one folder per attempt. A task writes only into the folder of its attempt, so no file
has two writers and nothing is locked across nodes: safe on NFS.
"""

import json
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ablations.harness.cell_runner import Cell, append, key_columns
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import FAILED, Store, read
from ablations.harness.sweep import Sweep
from attention_zoo import load_plugin
from profiling.cases.case import Case
from profiling.schema.row import KEY

Dealt = tuple[str, Sweep, Case]
"""The name of a sweep, the sweep, and one of its cases."""
FATAL = 2
"""Number of sudden task deaths during a cell after which the cell is not run again."""


def place(sweep: str, case: Case) -> str:
    """Return the key of a cell without the device name."""
    return "\n".join(case.key(sweep, "")[:-1])


def place_of(row: list[str]) -> str:
    """Return the same key from a row of a results file."""
    return "\n".join(row[: len(KEY) - 1])


@dataclass(frozen=True)
class Shard:
    """The folder of a shard."""

    folder: Path

    def create(self, settings: Settings, cells: Mapping[str, Dealt]) -> None:
        """Write the settings and the cells by place; ``settings.results`` may already hold finished rows."""
        self.folder.mkdir(parents=True)
        (self.folder / "places.json").write_text(json.dumps(list(cells)))
        (self.folder / "cells.pkl").write_bytes(_pickled((settings, list(cells.values()))))

    def order(self) -> tuple[Settings, list[Dealt]]:
        """Load the settings and the cells."""
        return pickle.loads((self.folder / "cells.pkl").read_bytes())

    def places(self) -> list[str]:
        """Load the places of the cells in order: stored, since computing them takes longer than merging the rows."""
        return json.loads((self.folder / "places.json").read_text())

    def attempts(self) -> list[Path]:
        """The folders of all attempts, oldest first."""
        return sorted((path.parent for path in self.folder.glob("*/journal")), key=lambda path: _numbers(path.name))

    def files(self) -> Iterator[Path]:
        """All results files, oldest attempt first: ``<attempt>/<device>/<sweep>.csv``."""
        for attempt in self.attempts():
            yield from (path for path in sorted(attempt.glob("*/*.csv")) if path.name != "peaks.csv")

    def journal(self, attempt: Path) -> list[dict[str, Any]]:
        """Return the journal of an attempt, without an incomplete line."""
        return [json.loads(line) for line in (attempt / "journal").read_text().splitlines(True) if line.endswith("\n")]

    def deaths(self) -> Counter[int]:
        """Count, by cell number, the attempts that ended without notice while the cell was in progress."""
        result: Counter[int] = Counter()
        done = {place_of(row) for path in self.files() for row in read(path)}
        places = self.places()
        for attempt in self.attempts():
            lines = self.journal(attempt)
            begun = {line["begin"] for line in lines if "begin" in line}
            if not any("end" in line for line in lines):
                result.update(number for number in begun if places[number] not in done)
        return result


def work(folder: str) -> None:
    """Run the unfinished cells of a shard. SIGTERM ends the task at once, SIGUSR2 after the cell in progress."""
    shard = Shard(Path(folder))
    settings, ordered_cases = shard.order()
    for plugin in settings.plugins:
        load_plugin(plugin)
    deaths = shard.deaths()
    done = {place_of(row) for path in shard.files() for row in read(path)}
    # Every task of an array has its own job id; Slurm counts how often it restarted the job.
    attempt = shard.folder / f"{os.environ['SLURM_JOB_ID']}_{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    attempt.mkdir(exist_ok=True)
    journal = Journal(attempt / "journal")
    # The fork server and the cells inherit SIG_IGN: Slurm signals all processes of a step, and a cell killed by
    # that signal would count as crashed.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _forget_main()
    launcher = Launcher(replace(settings, results=attempt))
    signal.signal(signal.SIGTERM, journal.end_now)
    signal.signal(signal.SIGUSR2, journal.end_soon)
    places = shard.places()
    left = [(number, one) for number, one in enumerate(ordered_cases) if places[number] not in done]
    try:
        _run(launcher, journal, settings, left, deaths)
    except BaseException as problem:
        journal.write(end=repr(problem))
        raise
    journal.write(end="done")


class Journal:
    """Log of a task beside its rows: the cells it started and how it ended."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.ending = False

    def write(self, **words: Any) -> None:
        """Append a line and sync it to disk."""
        os.write(self._file, (json.dumps(words) + "\n").encode())
        os.fsync(self._file)

    def end_now(self, number: int, frame: Any) -> None:
        """Handle scancel, preemption and the time limit: log the end, so that no cell is blamed, and exit."""
        self.write(end=signal.Signals(number).name)
        os._exit(128 + number)

    def end_soon(self, number: int, frame: Any) -> None:
        """Handle the warning before the time limit: start no further cell."""
        self.ending = True


def _run(
    launcher: Launcher, journal: Journal, settings: Settings, left: list[tuple[int, Dealt]], deaths: Counter[int]
) -> None:
    device, model = launcher.devices[0], next(iter(launcher.models))
    if deaths:
        # One cell at a time on each device, so that another death has one suspect per device.
        for one in launcher.devices:
            one.at_once = 1
    earlier = settings.results / model
    _copy(earlier / "peaks.csv", launcher.folder / "peaks.csv")
    stores = {name: Store(launcher.folder / f"{name}.csv") for name in {name for _, (name, _, _) in left}}
    there = _finished(earlier, settings, left, device.facts["device_name"])
    journal.write(model=model, device=device.facts["device_name"], skip=there)
    cells: dict[int, Cell] = {}
    for number, (name, sweep, case) in left:
        if number not in there:
            cells[number] = launcher.cell(name, sweep, case, stores[name], model)
    for number in [number for number in cells if deaths[number] >= FATAL]:
        cell = cells.pop(number)
        append(cell, key_columns(cell, device) | {"status": "crash", "reason": _blame(deaths[number])}, device)
    numbers = {id(cell): number for number, cell in cells.items()}
    with closing(launcher.work(list(cells.values()))) as running:
        for cell, _, _ in running:
            if journal.ending:
                break
            journal.write(begin=numbers[id(cell)])


def _blame(deaths: int) -> str:
    return f"the Slurm task that ran it died without notice {deaths} times while it was in hand"


def _finished(folder: Path, settings: Settings, left: list[tuple[int, Dealt]], device: str) -> list[int]:
    """Return the numbers of cells that have a row from an earlier run on this device."""
    if settings.fresh:
        return []
    there = {
        tuple(row[: len(KEY)])
        for name in {name for _, (name, _, _) in left}
        for row in read(folder / f"{name}.csv")
        if not (settings.retry_failed and row[len(KEY)] in FAILED)
    }
    return [number for number, (name, _, case) in left if case.key(name, device) in there]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.exists():
        shutil.copy(source, target)


def _forget_main() -> None:
    """Keep cells from importing this task's main module, submitit's, which would slow every start."""
    import __main__

    __main__.__spec__ = None
    vars(__main__).pop("__file__", None)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("_") if part.isdigit())


def _pickled(value: Any) -> bytes:
    # Sweeps contain lambdas, and plugins may contain sweeps.
    import cloudpickle

    return cloudpickle.dumps(value)
