"""The child's side of :mod:`profiling.execution.subprocess_runner`: run requests and report each one's outcome."""

import ctypes
import faulthandler
import gc
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

SHOW_STACK = signal.SIGUSR1
_asked_by: Connection | None = None
"""In a child: the caller to notify when it needs exclusive use of the device."""
_spoiled = False
"""In a child: whether it is marked as unusable for other calls."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a call: a row's status, the returned value if ``ok``, and a one-line reason if not."""

    status: str
    value: Any = None
    reason: str = ""
    seconds: float = 0.0


def serve(caller: Connection, stack: Connection, environment: Mapping[str, str], kept: bool) -> None:
    """In a child: process requests until there are no more; on SHOW_STACK, write the main thread's stack."""
    _die_with_parent()
    faulthandler.register(SHOW_STACK, stack.fileno(), all_threads=False)
    os.environ.update(environment)
    with suppress(EOFError, OSError):
        while True:
            outcome = _answered(caller, caller.recv_bytes())
            # Tidy before answering, while the caller still holds the device.
            caller.send((outcome, not (kept and _tidied())))


def _answered(caller: Connection, request: bytes) -> Outcome:
    global _asked_by
    try:
        function, arguments, memory, takes_turns = pickle.loads(request)
        _asked_by = caller if takes_turns else None
        _limit(memory)
        outcome = Outcome("ok", function(*arguments))
    except BaseException as problem:
        # The traceback still holds the function's allocations, so lift the limit.
        _limit(None)
        outcome = Outcome(_status_of(problem), reason=_one_line(problem))
    return outcome


def _tidied() -> bool:
    """Release all resources of the last call; False if this process cannot run another call."""
    gc.collect()
    torch = sys.modules.get("torch")
    if _spoiled or torch is None or not torch.cuda.is_initialized():
        return not _spoiled
    try:
        torch.cuda.synchronize()
        # Workspaces of every stream that a graph was recorded on. There is no public API.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except Exception:
        return False
    return True


def _limit(memory: int | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if memory is None else memory, most))


def _status_of(problem: BaseException) -> str:
    name, text = type(problem).__name__, str(problem)
    if isinstance(problem, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return "oom"
    return "unsupported" if name == "Unsupported" else "error"


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]


def _die_with_parent() -> None:
    """Have the system kill this process when the run that started it dies."""
    # The server runs until the last copy of this descriptor is closed: children and server would keep each other alive.
    with suppress(AttributeError, OSError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def spoil() -> None:
    """In a child: mark this process as modified, so that no other call runs in it."""
    global _spoiled
    _spoiled = True


@contextmanager
def alone() -> Iterator[None]:
    """In a child: use the device exclusively within the context, if the caller shares it among several."""
    _wait_for(True)
    try:
        yield
    finally:
        _wait_for(False)


def _wait_for(alone: bool) -> None:
    if _asked_by is not None:
        _asked_by.send(alone)
        _asked_by.recv()


def each(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Outcome]:
    """Run ``function`` on each of ``jobs`` in this process; one that fails does not end the others."""
    return [_ended(function, job) for job in jobs]


def _ended(function: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return Outcome("ok", function(*arguments))
    except BaseException as problem:
        return Outcome(_status_of(problem), reason=_one_line(problem))
