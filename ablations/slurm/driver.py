"""A campaign: distribute sweeps over Slurm tasks, monitor them, resubmit unfinished shards, and merge the rows.

All state is in ``<results>/slurm/<campaign>/``, so the driver may be killed at any moment: the same command finds the
campaign, queries squeue for its live tasks, and resumes.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from ablations.harness.devices import LaunchError
from ablations.harness.local_runner import Report, Settings, ordered_cases
from ablations.harness.results_store import exclusive
from ablations.harness.sweep import Sweep
from ablations.slurm.merge import finished, load_state, merge, save_state
from ablations.slurm.progress import State, Watched
from ablations.slurm.sbatch import Queue
from ablations.slurm.task import Shard, place

POLL = 10.0
"""Seconds between two queries to Slurm."""
TRIES = 3
"""Maximum number of submissions of a shard without a newly finished cell."""


class Campaign:
    """Sweeps, distributed over ``shards`` Slurm tasks.

    Raises:
        LaunchError: Slurm is not installed, rejects the job, or cannot finish it.
    """

    def __init__(self, settings: Settings, sweeps: dict[str, Sweep], args: dict[str, Any], shards: int) -> None:
        # Absolute: tasks may have another working directory.
        self.settings = replace(settings, results=settings.results.resolve())
        self.sweeps, self.shards = sweeps, shards
        self.folder = self.settings.results / "slurm" / f"attention-{_identity(self.settings, sweeps)}"
        self.queue = Queue(self.folder, args)
        self.report = Report()

    def run(self) -> Iterator[State]:
        """Run to the end; yields the state at intervals. LaunchError at the end if cells remain undone."""
        with exclusive(self.folder):
            if load_state(self.folder).get("finished", True):
                self._deal()
            self._merge()
            undone = yield from self._watch(Watched(self.folder))
            self._merge()
            if undone:
                raise LaunchError(undone)
            save_state(self.folder, finished=True)

    def _deal(self) -> None:
        """Distribute cells without a row on any device of the campaign, round-robin, to spread the large ones."""
        there = set() if self.settings.fresh else finished(load_state(self.folder).get("models", []), self.settings)
        cells = {
            place(name, case): (name, sweep, case)
            for name, sweep in self.sweeps.items()
            for case in ordered_cases(sweep, self.settings)
        }
        left = [one for one in cells.items() if one[0] not in there]
        self.report.skipped = len(cells) - len(left)
        for part in ("shards", "submissions", "logs"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / part).mkdir()
        number = min(self.shards, len(left))
        for shard in range(number):
            Shard(self.folder / "shards" / f"{shard:04d}").create(self.settings, dict(left[shard::number]))
        save_state(self.folder, finished=False, aside=[])

    def _merge(self) -> None:
        merge(self.folder, self.settings, self.sweeps, self.report)

    def _watch(self, watched: Watched) -> Generator[State, None, str]:
        """Monitor until every shard is done or given up; returns one line on undone cells, or an empty string."""
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
            # Dead in two polls: on NFS, a task's last rows may become visible seconds after its end.
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
    """Return the hash by which commands share a campaign: of the settings and sweeps, not of the Slurm options.

    ``--full``, ``--replicates`` and ``--timeout`` change the sweeps, so with them it is another campaign.
    """
    said = [str(settings.results), settings.device, settings.smoke, settings.fresh, settings.retry_failed]
    for name, sweep in sorted(sweeps.items()):
        # Without functions: their text holds an address, which differs from process to process.
        axes = {str(axis): list(values) for axis, values in sweep.axes.items() if not callable(values)}
        said += [name, str(sweep.replicates), str(sweep.timeout), str(sweep.stopping), str(axes)]
    return hashlib.sha256(json.dumps([*said, *settings.plugins]).encode()).hexdigest()[:8]
