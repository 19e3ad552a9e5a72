"""A side of an interleaved comparison: what is to be measured, and the interpreter that measures it."""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attention_zoo import InvalidOption
from profiling.execution.cpu_allocator import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
OPENMP = {"GOMP_SPINCOUNT": "1000"}
"""Threads that wait for one another sleep after some microseconds. By default they spin for milliseconds. On cores that
other programs use too, they then keep one another from running, and a step takes ten times as long."""
TIMEOUT = 600.0
"""Seconds that a side may take to start or for one block."""


class SideError(RuntimeError):
    """A side cannot be measured; the message says which one and why."""


@dataclass(frozen=True)
class Side:
    """What one side runs.

    Attributes:
        name: ``A`` or ``B``.
        flags: of ``python -m profiling``.
        root: the checkout whose code runs.
        environment: variables of its processes.
    """

    name: str
    flags: tuple[str, ...]
    root: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)


class SideProcess:
    """The interpreter of a side, which forks a process for each pair."""

    def __init__(self, side: Side) -> None:
        self.side = side
        own = next((side.root / "ablations").rglob("interleave_side.py"), None)
        script = own or Path(__file__).with_name("interleave_side.py")
        path = os.pathsep.join(filter(None, [str(side.root), os.environ.get("PYTHONPATH")]))
        # Closed by close().
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # -P: the folder of the script is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            text=True, start_new_session=True,
            env=OPENMP | os.environ | side.environment | {"PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, **words: Any) -> None:
        """Send a request."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()

    def request(self, **words: Any) -> dict[str, Any]:
        """Send a request, and wait for the answer."""
        self.ask(**words)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; SideError if it says that the side failed, or if there is none."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._kill()
            self._said.seek(0)
            last = (self._said.read().strip() or "it said nothing").splitlines()[-1]
            why = f"ended with status {self._process.returncode}: {last}" if ready else f"no answer in {TIMEOUT:g} s"
            raise SideError(f"side {self.side.name}: {why}")
        answer = json.loads(line)
        if answer.get("failed") == "invalid":
            raise InvalidOption(f"side {self.side.name}: {answer['reason'].removeprefix('InvalidOption: ')}")
        if "failed" in answer:
            raise SideError(f"side {self.side.name}: {answer['failed']}: {answer['reason']}")
        return answer

    def close(self) -> None:
        """End it and what it has forked."""
        self._kill()
        self._said.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@contextmanager
def side(name: str, spec: str, flags: Sequence[str]) -> Iterator[Side]:
    """The side that a specification names; a checkout that it needs is there meanwhile.

    Raises:
        InvalidOption: the specification cannot be understood.
    """
    own, root = list(flags), ROOT
    with ExitStack() as stack:
        for word in shlex.split(spec):
            key, _, value = word.partition("=")
            if key == "checkout":
                root = stack.enter_context(_checkout(name, value))
            elif key == "plugin":
                own += ["--plugin", str(Path(value).resolve())]
            else:
                own += [f"--{key.replace('_', '-')}" + ("=" + value if "=" in word else "")]
        freed_memory = next((f.split("=")[1] for f in own if f.startswith("--freed-memory=")), "kept")
        if "--freed-memory" in own:
            freed_memory = own[own.index("--freed-memory") + 1]
        variables = next((dict(values) for kind, values in VARIABLES.items() if kind == freed_memory), {})
        yield Side(name, tuple(own), root, variables)


@contextmanager
def _checkout(name: str, value: str) -> Iterator[Path]:
    """A folder, or a temporary worktree of a revision."""
    if Path(value).is_dir():
        yield Path(value).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="interleave-") as folder:
        path = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--detach", str(path), value], capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip()
            raise InvalidOption(f"side {name}: checkout={value} is neither a folder nor a revision: {why}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], capture_output=True)
