"""The interface to Slurm: parse sbatch options, list a campaign's tasks, submit jobs."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ablations.harness.devices import LaunchError
from ablations.slurm.task import work
from attention_zoo import InvalidOption
from profiling.execution.environment import ROOT

DEFAULTS: dict[str, Any] = {"time": 60}
LISTS = ("setup", "teardown", "srun_args")
"""Options that submitit takes as a list."""
OWN = ("job_name", "comment")
"""Options that identify the jobs of a campaign; users cannot set them."""
ERROR = re.compile(r"(?!srun:)(?=\S)([\w.]+: |.*[Ee]rror)")
"""A line that names an error: not a traceback's indented source, nor srun's own line, which gives no cause."""


def options(text: str) -> dict[str, Any]:
    """Parse ``--slurm key=value,...``; a part without ``=`` continues the preceding value.

    Raises:
        InvalidOption: a key is missing or reserved.
    """
    result: dict[str, str] = {}
    last = ""
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if equals:
            last = name.strip().replace("-", "_")
            result[last] = value
        elif last:
            result[last] += f",{part}"
        if not last or last in OWN:
            raise InvalidOption(
                f"--slurm: {part!r} is not valid; valid: key=value, the key an option of sbatch but {', '.join(OWN)}"
            )
    return {name: _value(name, value) for name, value in result.items()}


def _value(name: str, value: str) -> Any:
    if name in LISTS:
        return [value]
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def on_gpus(args: dict[str, Any]) -> bool:
    """Whether these options request GPUs."""
    return any("gpu" in f"{name}={value}" for name, value in args.items() if name not in (*LISTS, "partition"))


def last_error(lines: list[str]) -> str:
    """Return the last error in a log; its last line if there is none."""
    return ([line for line in lines if ERROR.match(line)] or lines or ["nothing"])[-1]


class Queue:
    """The jobs of one campaign, found by name; the shards of an array are written to disk before its submission.

    Raises:
        LaunchError: Slurm or submitit is not installed, or Slurm rejects a job; the message quotes Slurm.
        InvalidOption: submitit rejects an option.
    """

    def __init__(self, folder: Path, args: dict[str, Any]) -> None:
        if not shutil.which("sbatch"):
            raise LaunchError("--launcher slurm: there is no Slurm on this machine (sbatch is not found)")
        self.folder, self.args, self.name = folder, DEFAULTS | args, folder.name
        # Raise submitit's errors before anything is written.
        self._executor(0)

    def tasks(self) -> dict[int, str] | None:
        """Return the states of pending and running tasks by shard; None if squeue fails."""
        # Not through submitit, which queries sacct: many clusters have no accounting.
        asked = ["squeue", "--noheader", "--array", f"--name={self.name}", "--format=%k|%K|%T|%r"]
        answer = subprocess.run(asked, capture_output=True, text=True)
        if answer.returncode:
            return None
        result: dict[int, str] = {}
        for line in answer.stdout.splitlines():
            submission, index, state, reason = line.split("|", 3)
            path = self.folder / "submissions" / f"{submission}.json"
            if path.exists():
                shards = json.loads(path.read_text())
                why = f" ({reason})" if state == "PENDING" and reason != "None" else ""
                result[shards[int(index) if index.isdecimal() else 0]] = state.lower() + why
        return result

    def submit(self, shards: list[int]) -> None:
        """Submit an array with a task for each of these shards."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        number = len(list((self.folder / "submissions").iterdir()))
        (self.folder / "submissions" / f"{number}.json").write_text(json.dumps(shards))
        folders = [str(self.folder / "shards" / f"{shard:04d}") for shard in shards]
        try:
            # Slurm's message goes into the LaunchError only, not to stderr as well.
            with contextlib.redirect_stderr(io.StringIO()):
                self._executor(number).map_array(work, folders)
        except (FailedJobError, FailedSubmissionError) as problem:
            raise LaunchError(f"Slurm refuses the job: {problem}") from problem

    def last_words(self) -> str:
        """Return the last error in the logs of the tasks, and the path of the log."""
        logs = sorted((self.folder / "logs").glob("*.err"), key=lambda path: path.stat().st_mtime)
        said = last_error(logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()) if logs else "nothing"
        return f"{said} ({logs[-1] if logs else self.folder})"

    def _executor(self, submission: int) -> Any:
        try:
            import submitit
        except ImportError:
            raise LaunchError("--launcher slurm needs submitit: pip install submitit") from None
        executor = submitit.SlurmExecutor(self.folder / "logs")
        known = set(executor._valid_parameters())
        args = {name: value for name, value in self.args.items() if name in known}
        # Options unknown to submitit go to sbatch unchanged, which validates them.
        other = {name: value for name, value in self.args.items() if name not in known}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        args["setup"] = [f"export PYTHONPATH={shlex.quote(path)}", *args.get("setup", [])]
        try:
            executor.update_parameters(**args, additional_parameters=other, job_name=self.name, comment=str(submission))
        except (ValueError, TypeError) as problem:
            raise InvalidOption(f"--slurm: {problem}") from problem
        return executor
