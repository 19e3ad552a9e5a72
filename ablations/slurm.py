"""Slurm, as far as a campaign needs it: which options it is given, what it runs of ours, and one more job for it."""

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ablations.devices import LaunchError
from ablations.shard import work
from attention_zoo import InvalidOption
from profiling.environment import ROOT

DEFAULTS: dict[str, Any] = {"time": 60}
LISTS = ("setup", "teardown", "srun_args")
"""Options of which submitit takes a list."""
OWN = ("job_name", "comment")
"""Options by which a campaign knows its jobs."""


def options(text: str) -> dict[str, Any]:
    """What ``--slurm key=value,...`` says; a part without ``=`` belongs to the value before it.

    Raises:
        InvalidOption: there is no key, or one that is not the user's to set.
    """
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
            raise InvalidOption(
                f"--slurm: {part!r} is not valid; valid: key=value, the key an option of sbatch but {', '.join(OWN)}"
            )
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: str) -> Any:
    if name in LISTS:
        return [value]
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def on_gpus(given: dict[str, Any]) -> bool:
    """Whether these options ask Slurm for GPUs."""
    return any("gpu" in f"{name}={value}" for name, value in given.items() if name not in (*LISTS, "partition"))


class Queue:
    """The jobs of one campaign, by their name; which task runs which shard is written down before it is submitted.

    Raises:
        LaunchError: Slurm or submitit is not there, or Slurm refuses a job; with Slurm's own words.
        InvalidOption: submitit refuses an option.
    """

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        if not shutil.which("sbatch"):
            raise LaunchError("--launcher slurm: there is no Slurm on this machine (sbatch is not found)")
        self.folder, self.given, self.name = folder, DEFAULTS | given, folder.name
        # Before anything is written: what submitit refuses.
        self._executor(0)

    def tasks(self) -> dict[int, str] | None:
        """Which shards have a task that waits or runs, and its state; None if Slurm does not answer."""
        # Not by way of submitit, which asks sacct: many clusters keep no accounts.
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
                why = f" ({reason})" if state == "PENDING" and reason != "None" else ""
                found[shards[int(index) if index.isdecimal() else 0]] = state.lower() + why
        return found

    def submit(self, shards: list[int]) -> None:
        """Submit an array with a task for each of these shards."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        number = len(list((self.folder / "submissions").iterdir()))
        (self.folder / "submissions" / f"{number}.json").write_text(json.dumps(shards))
        folders = [str(self.folder / "shards" / f"{shard:04d}") for shard in shards]
        try:
            # What Slurm says goes into our own line, and not there beside.
            with contextlib.redirect_stderr(io.StringIO()):
                self._executor(number).map_array(work, folders)
        except (FailedJobError, FailedSubmissionError) as problem:
            raise LaunchError(f"Slurm refuses the job: {problem}") from problem

    def last_words(self) -> str:
        """The last error in the logs of the tasks, and where it stands."""
        logs = sorted((self.folder / "logs").glob("*.err"), key=lambda path: path.stat().st_mtime)
        lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
        # srun's own last word is but that there was an error.
        errors = sorted((line for line in lines if "rror" in line), key=lambda line: not line.startswith("srun:"))
        said = errors[-1:] or lines[-1:] or ["nothing"]
        return f"{said[0]} ({logs[-1] if logs else self.folder})"

    def _executor(self, submission: int) -> Any:
        try:
            import submitit
        except ImportError:
            raise LaunchError("--launcher slurm needs submitit: pip install submitit") from None
        executor = submitit.SlurmExecutor(self.folder / "logs")
        known = set(executor._valid_parameters())
        given = {name: value for name, value in self.given.items() if name in known}
        # What submitit does not know goes to sbatch as it is, which says what it thinks of it.
        other = {name: value for name, value in self.given.items() if name not in known}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        given["setup"] = [f"export PYTHONPATH={path}", *given.get("setup", [])]
        try:
            executor.update_parameters(
                **given, additional_parameters=other, job_name=self.name, comment=str(submission)
            )
        except (ValueError, TypeError) as problem:
            raise InvalidOption(f"--slurm: {problem}") from problem
        return executor
