"""A campaign on Slurm: deal the cells to array tasks, watch, resubmit what was left undone, merge the shards.

All that is known stands in ``<results>/slurm/<campaign>/``, so the driver may die at any moment: the same command
finds the campaign, asks squeue which of its tasks are alive, and goes on.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations import merging
from ablations.devices import LaunchError
from ablations.launch import Report, Settings, dealt
from ablations.shard import Shard, place, place_of, work
from ablations.store import exclusive
from ablations.sweep import Sweep
from attention_zoo import InvalidOption
from profiling.environment import ROOT
from profiling.rows import KEY

POLL = 10.0
"""Seconds between two questions to Slurm."""
TRIES = 3
"""How often a shard is submitted without one more cell done, at most."""
DEFAULTS: dict[str, Any] = {"time": 60}
LISTS = ("setup", "teardown", "srun_args")
OWN = ("job_name", "comment")


@dataclass
class State:
    """How far a campaign is, for a line of progress."""

    total: int
    done: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def __str__(self) -> str:
        tasks = ", ".join(f"{count} {state}" for state, count in sorted(self.tasks.items())) or "no tasks"
        cells = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items())) or "no rows yet"
        return f"{tasks}; {cells}" + (f"; {self.note}" if self.note else "")


def options(text: str) -> dict[str, Any]:
    """What ``--slurm key=value,...`` says; a part without ``=`` belongs to the value before it."""
    found: dict[str, str] = {}
    last = ""
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if equals:
            last = name.strip().replace("-", "_")
            found[last] = value
        elif last:
            found[last] += f",{part}"
        if not last or last in OWN:
            raise InvalidOption(f"--slurm: {part!r} is not valid; valid: key=value, with an option of sbatch as key")
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: str) -> Any:
    if name in LISTS:
        return [value]
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def on_gpus(given: dict[str, Any]) -> bool:
    """Whether these options ask Slurm for GPUs."""
    return any("gpu" in f"{name}={value}" for name, value in given.items() if name not in (*LISTS, "partition"))


class Campaign:
    """Sweeps, dealt to ``shards`` tasks of Slurm.

    Raises:
        LaunchError: Slurm or submitit is not there, or Slurm refuses the job; with Slurm's own words.
    """

    def __init__(self, settings: Settings, sweeps: dict[str, Sweep], given: dict[str, Any], shards: int) -> None:
        if not shutil.which("sbatch"):
            raise LaunchError("--launcher slurm: there is no Slurm on this machine (sbatch is not found)")
        self.settings = replace(settings, results=settings.results.resolve())
        self.sweeps, self.given, self.shards = sweeps, DEFAULTS | given, shards
        self.name = f"attention-{_identity(self.settings, sweeps)}"
        self.folder = self.settings.results / "slurm" / self.name
        self.report = Report(self.folder)
        # Before anything is written: an option that submitit refuses.
        self._executor(0)

    def run(self) -> Iterator[State]:
        """Run to the end; yields how far it is, now and then. What cannot be done ends in a LaunchError, last."""
        with exclusive(self.folder):
            if self._record().get("finished", True):
                self._start()
            merging.merge(self.folder, self.settings, self.sweeps, self.report)
            undone = yield from self._watch()
            merging.merge(self.folder, self.settings, self.sweeps, self.report)
            if undone:
                raise LaunchError(undone)
            self._keep(finished=True)

    def _start(self) -> None:
        """Deal what no device of this campaign has a row of already."""
        there = set() if self.settings.fresh else merging.finished(self._record().get("models", []), self.settings)
        cells = [
            (name, sweep, case)
            for name, sweep in self.sweeps.items()
            for case in dealt(sweep, self.settings)
        ]  # fmt: skip
        left = [cell for cell in cells if place(cell[0], cell[2]) not in there]
        self.report.skipped = len(cells) - len(left)
        for part in ("shards", "submissions", "logs"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / part).mkdir()
        number = min(self.shards, len(left))
        for shard in range(number):
            Shard(self.folder / "shards" / f"{shard:04d}").create(self.settings, left[shard::number])
        self._keep(finished=False, aside=[])

    def _watch(self) -> Generator[State, None, str]:
        """Until every shard is done or given up; returns what is undone, in a line, or nothing."""
        progress = Watched(self.folder)
        tries: Counter[int] = Counter()
        before: dict[int, int] = {}
        silent: set[int] = set()
        while True:
            tasks = self._tasks()
            progress.read()
            left = progress.left()
            if not left and not tasks:
                return ""
            # Asleep twice, since a file may be seen on this machine some seconds after its writer has ended.
            dead = {shard for shard in left if tasks is not None and shard not in tasks}
            due = [shard for shard in dead if shard in silent or not progress.begun(shard)]
            for shard in due:
                tries[shard] = tries[shard] + 1 if before.get(shard) == left[shard] else 1
                before[shard] = left[shard]
            given_up = [shard for shard in dead if tries[shard] > TRIES]
            if due := [shard for shard in due if shard not in given_up]:
                self._submit(due)
                continue
            silent = dead
            yield progress.state(tasks)
            if given_up and not tasks and dead == set(given_up):
                return self._undone(given_up, sum(left[shard] for shard in given_up))
            if left or tasks:
                time.sleep(POLL)

    def _tasks(self) -> dict[int, str] | None:
        """Which shards have a task that waits or runs, and its state; None if Slurm does not answer."""
        asked = ["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%k|%K|%T|%r"]
        answer = subprocess.run(asked, capture_output=True, text=True)
        if answer.returncode:
            return None
        found: dict[int, str] = {}
        for line in answer.stdout.splitlines():
            submission, index, state, reason = line.split("|", 3)
            path = self.folder / "submissions" / f"{submission}.json"
            if path.exists():
                shards = json.loads(path.read_text())
                waits = state == "PENDING" and reason not in ("None", "Priority")
                found[shards[int(index) if index.isdecimal() else 0]] = (
                    f"{state.lower()} ({reason})" if waits else state.lower()
                )
        return found

    def _submit(self, shards: list[int]) -> None:
        """Submit an array of these shards, after writing down that it is theirs."""
        number = len(list((self.folder / "submissions").iterdir()))
        (self.folder / "submissions" / f"{number}.json").write_text(json.dumps(shards))
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        folders = [str(self.folder / "shards" / f"{shard:04d}") for shard in shards]
        try:
            # What Slurm says goes into our own line, and not there beside.
            with contextlib.redirect_stderr(io.StringIO()):
                self._executor(number).map_array(work, folders)
        except (FailedJobError, FailedSubmissionError) as problem:
            raise LaunchError(f"Slurm refuses the job: {problem}") from problem

    def _executor(self, submission: int) -> Any:
        try:
            import submitit
        except ImportError:
            raise LaunchError("--launcher slurm needs submitit: pip install submitit") from None
        executor = submitit.SlurmExecutor(self.folder / "logs")
        known = set(executor._valid_parameters())
        given = {name: value for name, value in self.given.items() if name in known}
        other = {name: value for name, value in self.given.items() if name not in known}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        given["setup"] = [f"export PYTHONPATH={path}", *given.get("setup", [])]
        try:
            executor.update_parameters(
                **given, additional_parameters=other, job_name=self.name, comment=str(submission)
            )
        except (ValueError, TypeError, AssertionError) as problem:
            raise InvalidOption(f"--slurm: {problem}") from problem
        return executor

    def _undone(self, shards: list[int], cells: int) -> str:
        logs = sorted((self.folder / "logs").glob("*.err"), key=lambda path: path.stat().st_mtime)
        lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
        said = [line for line in lines if "rror" in line][-1:] or lines[-1:] or ["nothing"]
        return (
            f"{cells} cells are undone: {len(shards)} tasks ended {TRIES} times without one more done; "
            f"the last said: {said[0]} ({logs[-1] if logs else self.folder})"
        )

    def _record(self) -> dict[str, Any]:
        return merging.record(self.folder)

    def _keep(self, **changes: Any) -> None:
        merging.keep(self.folder, **changes)


class Watched:
    """What the shards of a campaign have done, read as it grows."""

    def __init__(self, folder: Path) -> None:
        self.shards = [Shard(path) for path in sorted((folder / "shards").iterdir())]
        self.undone = [{place(name, case) for name, _, case in shard.order()[1]} for shard in self.shards]
        self.places = [[place(name, case) for name, _, case in shard.order()[1]] for shard in self.shards]
        self.total = sum(map(len, self.places))
        self.statuses: dict[str, str] = {}
        self.skipped: set[str] = set()
        self.seen: dict[Path, int] = {}

    def read(self) -> None:
        """Take in what was written since the last time."""
        for number, shard in enumerate(self.shards):
            if not self.undone[number]:
                continue
            for path in shard.files():
                for row in self._grown(path):
                    self.statuses[place_of(row)] = row[len(KEY)]
                    self.undone[number].discard(place_of(row))
            for attempt in shard.attempts():
                for line in shard.journal(attempt):
                    self.undone[number] -= {self.places[number][skipped] for skipped in line.get("skip", ())}

    def left(self) -> dict[int, int]:
        """How many cells of each shard are undone, for those where any are."""
        return {number: len(undone) for number, undone in enumerate(self.undone) if undone}

    def begun(self, shard: int) -> bool:
        """Whether any task of the shard has begun its work."""
        return bool(self.shards[shard].attempts())

    def state(self, tasks: dict[int, str] | None) -> State:
        """For a line of progress."""
        done = self.total - sum(map(len, self.undone))
        states = Counter((tasks or {}).values())
        return State(
            self.total,
            done,
            states,
            Counter(self.statuses.values()),
            "" if tasks is not None else "Slurm does not answer",
        )

    def _grown(self, path: Path) -> Iterator[list[str]]:
        with path.open("rb") as file:
            file.seek(self.seen.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        first = path not in self.seen
        self.seen[path] = self.seen.get(path, 0) + len(whole)
        rows = csv.reader(io.StringIO(whole.decode(), newline=""))
        if first:
            next(rows, None)
        yield from rows


def _identity(settings: Settings, sweeps: dict[str, Sweep]) -> str:
    """What makes two commands the same campaign: all but how Slurm is asked."""
    said = [str(settings.results), settings.device, settings.smoke, settings.fresh, settings.retry_failed]
    return hashlib.sha256(json.dumps([*said, *settings.plugins, sorted(sweeps)]).encode()).hexdigest()[:8]
