"""Run one function in a child process and return its result or the status of its failure.

Children are forked from a server that has imported PyTorch but never used CUDA or run a kernel, so starting a child
takes tens of milliseconds. A segfault, a hang, an endless allocation and an exception each give an outcome. Each
treatment of freed memory has its own server, because glibc reads its variables only when a program starts.
"""

import atexit
import importlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from profiling.execution import child_process
from profiling.execution.child_process import Outcome
from profiling.execution.cpu_allocator import VARIABLES, FreedMemory

ROOT = str(Path(__file__).resolve().parents[2])
_context = multiprocessing.get_context("forkserver")
_BOOKKEEPING = threading.Lock()
"""Starting a process collects the exit status of others, so no other thread may wait for it meanwhile."""
_RUNNING: set[BaseProcess] = set()
_SERVERS: dict[FreedMemory, forkserver.ForkServer] = {}
CALL = re.compile(r'File "(.+)", line (\d+) in (\S+)')
"""A call in the stack that faulthandler writes."""
LIBRARIES = tuple(
    path.encode("ascii", "backslashreplace").decode()
    for path in (os.path.dirname(os.__file__), str(Path(__file__).parent), "<")
)
"""Where paths of calls begin that the reason of a timeout does not name; nor those in site-packages elsewhere.

In ASCII, as faulthandler writes them.
"""
CALLS = 3
"""Number of calls that the reason of a timeout names."""
ANSWERS, PAUSE = 1.0, 0.1
"""Seconds in which a child begins to show its stack, and after which it has ended."""
HARMLESS = ("ok", "unsupported")
"""Statuses after which the process can run another call."""


class StartError(RuntimeError):
    """No process can be started for a cell; the message says why."""


def start() -> None:
    """Start the server with freed memory kept, unless it runs; it imports what cells need."""
    outcome = call(_preload)
    if outcome.status != "ok":
        raise StartError(f"cannot start processes: {outcome.reason}")


def restart() -> None:
    """Fork later children from new servers; no call may be running.

    All children of a server inherit its code and heap addresses, which make a step some percent faster or slower.
    """
    retire()
    for server in _SERVERS.values():
        # There is no public API to stop it.
        server._stop()  # type: ignore[attr-defined]
    _SERVERS.clear()
    start()


@contextmanager
def _server(freed_memory: FreedMemory) -> Iterator[None]:
    """Within the context, fork children from the server of this kind; start it if necessary."""
    server = _SERVERS.setdefault(freed_memory, forkserver.ForkServer())
    server.set_forkserver_preload(["profiling.execution.forkserver_preload"])
    # The server finds its modules only through PYTHONPATH.
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, **VARIABLES[freed_memory]}
    before = {name: os.environ.get(name) for name in variables}
    connect = forkserver.connect_to_new_process
    os.environ.update(variables)
    try:
        server.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    # multiprocessing supports one server only, under this name.
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = connect


def call(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 600.0,
    memory: int | None = None,
    environment: Mapping[str, str] | None = None,
    take: Callable[[bool], None] | None = None,
    freed_memory: FreedMemory = "kept",
) -> Outcome:
    """Call ``function(*arguments)`` in a new child and block until the child ends.

    Args:
        function: importable by name from the child; it and its arguments and result are pickled.
        timeout: seconds until the child is killed.
        memory: bytes of private memory the child may have; None sets no limit.
        environment: variables to set in the child before anything else, such as the visible GPU.
        take: called with True when the child enters :func:`profiling.execution.child_process.alone`, and with False
            when it exits that; the child waits until ``take`` returns. This wait does not count as the child's time.
        freed_memory: what glibc does in the child with freed memory, see :mod:`profiling.execution.cpu_allocator`.
    """
    worker = Worker(environment, kept=False, freed_memory=freed_memory)
    try:
        return worker.call(function, *arguments, timeout=timeout, memory=memory, take=take)
    finally:
        worker.close()


class Worker:
    """One child that runs calls one after the other, for libraries that take seconds to start, such as CUDA.

    A call starts the child if necessary. A call that ends other than ``ok`` or ``unsupported`` kills it, and the next
    call starts a new one. So no state of that process or of the GPU in it persists.

    Args:
        environment: variables to set in the child before anything else.
        kept: whether the child prepares for another call after each.
        freed_memory: as for :func:`call`.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, kept: bool = True, freed_memory: FreedMemory = "kept"
    ) -> None:
        self._given = dict(environment or {}), kept
        self._freed_memory: FreedMemory = freed_memory
        self._child: BaseProcess | None = None

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = 600.0,
        memory: int | None = None,
        take: Callable[[bool], None] | None = None,
    ) -> Outcome:
        """As :func:`call`, one at a time."""
        clock = _Clock(timeout)
        outcome, spoiled, exitcode = None, True, 0
        child = self._started()
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._pipe.send((function, arguments, memory, take is not None))
            outcome, spoiled = self._answer(child, clock, take)
        finally:
            if spoiled or outcome is None or outcome.status not in HARMLESS:
                exitcode = self.close()
        return replace(outcome or _died(exitcode), seconds=clock.spent())

    def close(self) -> int:
        """Kill the child, if there is one; returns its exit code. A later call starts a new child."""
        if self._child is None:
            return 0
        child, self._child = self._child, None
        with _BOOKKEEPING:
            _RUNNING.discard(child)
            child.kill()
            child.join()
        self._pipe.close()
        self._stack.close()
        return child.exitcode or 0

    def _started(self) -> BaseProcess:
        """The child; a new one if there is none or if it has died or been killed."""
        if self._child is not None and (self._child not in _RUNNING or wait([self._child.sentinel], 0)):
            self.close()
        if self._child is None:
            self._pipe, theirs = _context.Pipe()
            self._stack, stack = _context.Pipe(duplex=False)
            child = _context.Process(target=child_process.serve, args=(theirs, stack, *self._given), daemon=True)
            with _BOOKKEEPING, _server(self._freed_memory):
                child.start()
                _RUNNING.add(child)
            theirs.close()
            stack.close()
            self._child = child
        return self._child

    def _answer(
        self, child: BaseProcess, clock: "_Clock", take: Callable[[bool], None] | None
    ) -> tuple[Outcome | None, bool]:
        """The call's outcome, None if the child died, and whether to discard the child."""
        while True:
            wait([self._pipe, child.sentinel], clock.left())
            answer = _received(self._pipe)
            if take is None or not isinstance(answer, bool):
                break
            with clock.stopped():
                take(answer)
            with suppress(OSError):
                self._pipe.send(None)
        if answer is None:
            # A dying child's end of the pipe closes shortly before its exit status is available.
            wait([child.sentinel], clock.left())
        if answer is None and not wait([child.sentinel], 0):
            return Outcome("timeout", reason=f"no result within {clock.timeout:g} s{self._where(child)}"), True
        return answer or (None, True)

    def _where(self, child: BaseProcess) -> str:
        """Which calls the child is in now, innermost first, without those in libraries; empty if it does not answer."""
        text = b""
        with suppress(OSError):
            if child.pid is not None:
                os.kill(child.pid, child_process.SHOW_STACK)
            # Plain text in pieces, not messages; nothing marks its end.
            while wait([self._stack], PAUSE if text else ANSWERS) and (piece := os.read(self._stack.fileno(), 1 << 16)):
                text += piece
        calls = [call for call in CALL.findall(text.decode(errors="replace")) if not _of_library(call[0])]
        return "".join(f", in {name} ({Path(file).name}:{line})" for file, line, name in calls[:CALLS])


def _of_library(file: str) -> bool:
    return file.startswith(LIBRARIES) or "site-packages" in file or "dist-packages" in file


class _Clock:
    """Seconds of a call, excluding those in which it waits for others."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._begin, self._waited = time.perf_counter(), 0.0

    def spent(self) -> float:
        return time.perf_counter() - self._begin - self._waited

    def left(self) -> float:
        return max(0.0, self.timeout - self.spent())

    @contextmanager
    def stopped(self) -> Iterator[None]:
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked


def call_each(function: Callable[[Any], Any], jobs: Sequence[Any], **limits: Any) -> list[Outcome]:
    """As :func:`call` for each of ``jobs``: all in one child; if that child fails, each in its own.

    For short jobs that are not timed, for which the child is most of the cost.
    """
    together = call(child_process.each, function, jobs, **limits)
    if together.status == "ok":
        share = together.seconds / len(jobs)
        return [replace(outcome, seconds=share) for outcome in together.value]
    return [call(function, job, **limits) for job in jobs]


def stop_all() -> None:
    """Kill every child, whichever thread waits for it; its call returns as if the system had killed it.

    Children of idle workers are killed too; the next call of such a worker starts a new child.
    """
    with _BOOKKEEPING:
        for child in _RUNNING:
            child.kill()
        _RUNNING.clear()


def retire() -> None:
    """Kill the children of idle workers and wait until they end; no call may be running."""
    with _BOOKKEEPING:
        for child in _RUNNING:
            child.kill()
            child.join()
        _RUNNING.clear()


# At interpreter exit, multiprocessing sends its children a signal to end and waits; they may ignore it.
atexit.register(retire)


def _received(connection: Connection) -> Any:
    with suppress(EOFError, OSError):
        if connection.poll():
            return connection.recv()
    return None


def _died(exitcode: int) -> Outcome:
    if exitcode == -signal.SIGKILL:
        return Outcome("oom", reason="killed by SIGKILL, as the system does when memory runs out")
    if exitcode < 0:
        return Outcome("crash", reason=f"killed by {signal.Signals(-exitcode).name}")
    return Outcome("crash", reason=f"exited with status {exitcode} and no result")


def _preload() -> None:
    # The server ignores a failure to import this; a child reports it.
    importlib.import_module("profiling.execution.forkserver_preload")
