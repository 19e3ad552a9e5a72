"""A campaign: sweeps dealt to tasks of Slurm, watched, submitted again where undone, and merged.

All that is known stands in ``<results>/slurm/<campaign>/``, so the driver may die at any moment: the same command
finds the campaign, asks squeue which of its tasks are alive, and goes on.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from ablations.devices import LaunchError
from ablations.launch import Report, Settings, dealt
from ablations.merging import finished, keep, merge, record
from ablations.shard import Shard, place
from ablations.slurm import Queue
from ablations.store import exclusive
from ablations.sweep import Sweep
from ablations.watching import State, Watched

POLL = 10.0
"""Seconds between two questions to Slurm."""
TRIES = 3
"""How often a shard is submitted without one more cell done, at most."""


class Campaign:
    """Sweeps, dealt to ``shards`` tasks of Slurm.

    Raises:
        LaunchError: Slurm is not there, refuses the job, or could not finish it.
    """

    def __init__(self, settings: Settings, sweeps: dict[str, Sweep], given: dict[str, Any], shards: int) -> None:
        # Tasks may run elsewhere.
        self.settings = replace(settings, results=settings.results.resolve())
        self.sweeps, self.shards = sweeps, shards
        self.folder = self.settings.results / "slurm" / f"attention-{_identity(self.settings, sweeps)}"
        self.queue = Queue(self.folder, given)
        self.report = Report(self.folder)

    def run(self) -> Iterator[State]:
        """Run to the end; yields how far it is, now and then. What cannot be done ends in a LaunchError, last."""
        with exclusive(self.folder):
            if record(self.folder).get("finished", True):
                self._deal()
            self._merge()
            undone = yield from self._watch(Watched(self.folder))
            self._merge()
            if undone:
                raise LaunchError(undone)
            keep(self.folder, finished=True)

    def _deal(self) -> None:
        """Deal what no device of this campaign has a row of, in turn, so that no shard has all the large cells."""
        there = set() if self.settings.fresh else finished(record(self.folder).get("models", []), self.settings)
        cells = [(name, sweep, case) for name, sweep in self.sweeps.items() for case in dealt(sweep, self.settings)]
        left = [cell for cell in cells if place(cell[0], cell[2]) not in there]
        self.report.skipped = len(cells) - len(left)
        for part in ("shards", "submissions", "logs"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / part).mkdir()
        number = min(self.shards, len(left))
        for shard in range(number):
            Shard(self.folder / "shards" / f"{shard:04d}").create(self.settings, left[shard::number])
        keep(self.folder, finished=False, aside=[])

    def _merge(self) -> None:
        merge(self.folder, self.settings, self.sweeps, self.report)

    def _watch(self, watched: Watched) -> Generator[State, None, str]:
        """Until every shard is done or given up; returns what is undone, in a line, or nothing."""
        tries: Counter[int] = Counter()
        before: dict[int, int] = {}
        silent: set[int] = set()
        while True:
            tasks = self.queue.tasks()
            watched.look()
            left = watched.left()
            if not left and not tasks:
                self.report.skipped += watched.skipped
                return ""
            dead = {shard for shard in left if tasks is not None and shard not in tasks}
            # Found so twice: on NFS, a task's last rows may be seen here some seconds after its end.
            due = [shard for shard in sorted(dead) if shard in silent or not watched.begun(shard)]
            for shard in due:
                tries[shard] = tries[shard] + 1 if before.get(shard) == left[shard] else 1
                before[shard] = left[shard]
            given_up = {shard for shard in dead if tries[shard] > TRIES}
            silent = dead
            if again := [shard for shard in due if shard not in given_up]:
                self.queue.submit(again)
                continue
            yield watched.state(tasks)
            if given_up and not tasks and dead == given_up:
                cells = sum(left[shard] for shard in given_up)
                return f"{cells} cells are undone, after {TRIES} tries; the last task said: {self.queue.last_words()}"
            time.sleep(POLL)


def _identity(settings: Settings, sweeps: dict[str, Sweep]) -> str:
    """What makes two commands the same campaign: all but how Slurm is asked."""
    said = [str(settings.results), settings.device, settings.smoke, settings.fresh, settings.retry_failed]
    return hashlib.sha256(json.dumps([*said, *settings.plugins, sorted(sweeps)]).encode()).hexdigest()[:8]
