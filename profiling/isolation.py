"""Run one function in a process of its own, and say in one word how it ended.

Children are forked from a server that has imported PyTorch but never touched CUDA or run a kernel, so a child
costs tens of milliseconds. A segfault, a hang, an endless allocation and an exception are each an outcome.
"""

import ctypes
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)
_context = multiprocessing.get_context("forkserver")
_BOOKKEEPING = threading.Lock()
"""Starting a process collects the exit status of others: not to be done while another thread waits for it."""
_RUNNING: set[BaseProcess] = set()
_asked_by: Connection | None = None
"""In a child: who wants to know when it needs the device for itself."""


class StartError(RuntimeError):
    """No process can be started for a cell; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended: a status of a row, the value it returned if ``ok``, and a one-line reason if not."""

    status: str
    value: Any = None
    reason: str = ""
    seconds: float = 0.0


def start() -> None:
    """Start the server from which children are forked, unless it runs; it imports what cells need."""
    _context.set_forkserver_preload(["profiling.preload"])
    # The server finds its modules by PYTHONPATH alone.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, before]))
    try:
        outcome = call(_preload)
        if outcome.status != "ok":
            raise StartError(f"cannot start processes: {outcome.reason}")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def restart() -> None:
    """Have what follows forked from another server; nothing may be running.

    All children of a server inherit where its code and its heap lie, which makes a step some percent faster or slower.
    """
    # There is no public way to end it.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    start()


def call(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 600.0,
    memory: int | None = None,
    environment: Mapping[str, str] | None = None,
    take: Callable[[bool], None] | None = None,
) -> Outcome:
    """Call ``function(*arguments)`` in a child and wait, asleep, for its end.

    Args:
        function: importable by name from the child; it and its arguments and result are pickled.
        timeout: seconds until the child is killed.
        memory: bytes of private memory the child may have; None sets no limit.
        environment: variables to set in the child before anything else, such as the GPU that it may see.
        take: called with True when the child comes to an :func:`alone`, and with False when it is past that; the
            child waits until it returns. That time is not the child's.
    """
    begin = time.perf_counter()
    ours, theirs = _context.Pipe()
    given = (theirs, function, arguments, memory, dict(environment or {}), take is not None)
    child = _context.Process(target=_child, args=given, daemon=True)
    with _BOOKKEEPING:
        child.start()
        _RUNNING.add(child)
    theirs.close()
    waited = 0.0
    try:
        while True:
            wait([ours, child.sentinel], max(0.0, timeout + waited - (time.perf_counter() - begin)))
            outcome = _received(ours)
            if take is None or not isinstance(outcome, bool):
                break
            asked = time.perf_counter()
            take(outcome)
            waited += time.perf_counter() - asked
            with suppress(OSError):
                ours.send(None)
        if outcome is None:
            # A dying child's end of the pipe closes a moment before its exit status is known.
            wait([child.sentinel], max(0.0, timeout + waited - (time.perf_counter() - begin)))
        if outcome is None and not wait([child.sentinel], 0):
            outcome = Outcome("timeout", reason=f"no result within {timeout:g} s")
    finally:
        with _BOOKKEEPING:
            _RUNNING.discard(child)
            child.kill()
            child.join()
        ours.close()
    outcome = outcome or _died(child.exitcode or 0)
    return replace(outcome, seconds=time.perf_counter() - begin - waited)


@contextmanager
def alone() -> Iterator[None]:
    """In a child: have its device to itself meanwhile, if its caller lends that to several at once."""
    _wait_for(True)
    try:
        yield
    finally:
        _wait_for(False)


def _wait_for(alone: bool) -> None:
    if _asked_by is not None:
        _asked_by.send(alone)
        _asked_by.recv()


def call_each(function: Callable[[Any], Any], jobs: Sequence[Any], **limits: Any) -> list[Outcome]:
    """As :func:`call` for each of ``jobs``: all in one child, or should that die, each in its own.

    For what is so short that the child is most of its cost, and whose time nobody measures.
    """
    together = call(_each, function, jobs, **limits)
    if together.status == "ok":
        share = together.seconds / len(jobs)
        return [replace(outcome, seconds=share) for outcome in together.value]
    return [call(function, job, **limits) for job in jobs]


def _each(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Outcome]:
    return [_ended(function, job) for job in jobs]


def _ended(function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return Outcome("ok", function(*arguments))
    except BaseException as problem:
        return Outcome(_status_of(problem), reason=_one_line(problem))


def stop_all() -> None:
    """Kill every child, whichever thread waits for it; its call returns as if the system had killed it."""
    with _BOOKKEEPING:
        for child in _RUNNING:
            child.kill()


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


def _child(
    caller: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    memory: int | None,
    environment: dict[str, str],
    takes_turns: bool,
) -> None:
    global _asked_by
    _die_with_parent()
    os.environ.update(environment)
    _asked_by = caller if takes_turns else None
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.RLIM_INFINITY))
    try:
        outcome = Outcome("ok", function(*arguments))
    except BaseException as problem:
        # What the function allocated is still held by its traceback: make room for what follows.
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome = Outcome(_status_of(problem), reason=_one_line(problem))
    with suppress(BrokenPipeError):
        caller.send(outcome)
    caller.close()


def _status_of(problem: BaseException) -> str:
    name, text = type(problem).__name__, str(problem)
    if isinstance(problem, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return "oom"
    return "unsupported" if name == "Unsupported" else "error"


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]


def _die_with_parent() -> None:
    """Have the system kill this process when the run that asked for it dies."""
    # The server lives until the last copy of this descriptor is closed: children would keep it, and it them, alive.
    with suppress(AttributeError, OSError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _preload() -> None:
    # The server says nothing when it cannot import this; a child does.
    importlib.import_module("profiling.preload")
