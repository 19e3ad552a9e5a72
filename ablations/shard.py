"""A shard: the share of a campaign's cells that one Slurm task runs, and its folder, which is all that is known of it.

A shard's folder holds its cells, and one folder per attempt at them. A task writes into its own attempt alone, so no
file has two writers and nothing is locked across nodes: safe on NFS.
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

from ablations.cells import Cell, append, who
from ablations.launch import Launcher, Settings
from ablations.store import FAILED, Store, read
from ablations.sweep import Sweep
from attention_zoo import load_plugin
from profiling.case import Case
from profiling.rows import KEY

Dealt = tuple[str, Sweep, Case]
"""A case, and the sweep it is of with its name."""
FATAL = 2
"""A cell that was in hand at so many sudden deaths of its task is not run again."""


def place(sweep: str, case: Case) -> str:
    """What tells a cell from others, whatever device it runs on."""
    return "\n".join(case.key(sweep, "")[:-1])


def place_of(row: list[str]) -> str:
    """The same, of a row as it stands in a file."""
    return "\n".join(row[: len(KEY) - 1])


@dataclass(frozen=True)
class Shard:
    """The folder of a shard."""

    folder: Path

    def create(self, settings: Settings, cells: Mapping[str, Dealt]) -> None:
        """Write down what is to be done, by place; ``settings.results`` is where finished rows may be already."""
        self.folder.mkdir(parents=True)
        (self.folder / "places.json").write_text(json.dumps(list(cells)))
        (self.folder / "cells.pkl").write_bytes(_pickled((settings, list(cells.values()))))

    def order(self) -> tuple[Settings, list[Dealt]]:
        """What is to be done."""
        return pickle.loads((self.folder / "cells.pkl").read_bytes())

    def places(self) -> list[str]:
        """The places of the cells in their order: kept, since to find them takes longer than to merge their rows."""
        return json.loads((self.folder / "places.json").read_text())

    def attempts(self) -> list[Path]:
        """The folders of all attempts, oldest first."""
        return sorted((path.parent for path in self.folder.glob("*/journal")), key=lambda path: _numbers(path.name))

    def files(self) -> Iterator[Path]:
        """All result files, of the oldest attempt first: ``<attempt>/<device>/<sweep>.csv``."""
        for attempt in self.attempts():
            yield from (path for path in sorted(attempt.glob("*/*.csv")) if path.name != "peaks.csv")

    def journal(self, attempt: Path) -> list[dict[str, Any]]:
        """What an attempt has written down, but for a line that is not whole."""
        return [json.loads(line) for line in (attempt / "journal").read_text().splitlines(True) if line.endswith("\n")]

    def deaths(self) -> Counter[int]:
        """How many attempts ended without notice while a cell, by its number, was in hand."""
        found: Counter[int] = Counter()
        done = {place_of(row) for path in self.files() for row in read(path)}
        places = self.places()
        for attempt in self.attempts():
            lines = self.journal(attempt)
            begun = {line["begin"] for line in lines if "begin" in line}
            if not any("end" in line for line in lines):
                found.update(number for number in begun if places[number] not in done)
        return found


def work(folder: str) -> None:
    """The task: run what is left of a shard. Slurm's signals end it: near the limit, after the cell in hand."""
    shard = Shard(Path(folder))
    settings, dealt = shard.order()
    for plugin in settings.plugins:
        load_plugin(plugin)
    deaths = shard.deaths()
    done = {place_of(row) for path in shard.files() for row in read(path)}
    # Every task of an array has a job id of its own; Slurm counts how often it started that anew by itself.
    attempt = shard.folder / f"{os.environ['SLURM_JOB_ID']}_{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    attempt.mkdir(exist_ok=True)
    journal = Journal(attempt / "journal")
    # The server of the cells, and they, inherit deafness: Slurm signals all processes of a step, and a cell that
    # it ends would pass for one that crashed.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _forget_main()
    launcher = Launcher(replace(settings, results=attempt))
    signal.signal(signal.SIGTERM, journal.end_now)
    signal.signal(signal.SIGUSR2, journal.end_soon)
    places = shard.places()
    left = [(number, one) for number, one in enumerate(dealt) if places[number] not in done]
    try:
        _run(launcher, journal, settings, left, deaths)
    except BaseException as problem:
        journal.write(end=repr(problem))
        raise
    journal.write(end="done")


class Journal:
    """What a task leaves behind beside its rows, so that its death can be understood."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.ending = False

    def write(self, **words: Any) -> None:
        """Add a line, and see it on disk."""
        os.write(self._file, (json.dumps(words) + "\n").encode())
        os.fsync(self._file)

    def end_now(self, number: int, frame: Any) -> None:
        """Told to go, by scancel, preemption or the time limit: the cell in hand is not to blame."""
        self.write(end=signal.Signals(number).name)
        os._exit(128 + number)

    def end_soon(self, number: int, frame: Any) -> None:
        """Near the time limit: begin nothing more."""
        self.ending = True


def _run(
    launcher: Launcher, journal: Journal, settings: Settings, left: list[tuple[int, Dealt]], deaths: Counter[int]
) -> None:
    device, model = launcher.devices[0], next(iter(launcher.models))
    if deaths:
        # The next one shall have one cell to blame on each device.
        for one in launcher.devices:
            one.at_once = 1
    if limit := os.environ.get("SLURM_MEM_PER_NODE"):
        device.available = min(device.available, int(limit) << 20)
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
        append(cell, who(cell, device) | {"status": "crash", "reason": _blame(deaths[number])}, device)
    numbers = {id(cell): number for number, cell in cells.items()}
    with closing(launcher.work(list(cells.values()))) as running:
        for cell, _, _ in running:
            if journal.ending:
                break
            journal.write(begin=numbers[id(cell)])


def _blame(deaths: int) -> str:
    return f"the Slurm task that ran it died without notice {deaths} times while it was in hand"


def _finished(folder: Path, settings: Settings, left: list[tuple[int, Dealt]], device: str) -> list[int]:
    """Which cells have a row among the results already, as an earlier run on this device left them."""
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
    """Have cells not import the program of this task, which is submitit's: it costs each of them its start."""
    import __main__

    __main__.__spec__ = None
    vars(__main__).pop("__file__", None)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("_") if part.isdigit())


def _pickled(value: Any) -> bytes:
    # Sweeps hold functions without a name, and plugins may hold sweeps.
    import cloudpickle

    return cloudpickle.dumps(value)
