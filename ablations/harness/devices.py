"""Devices that run cells: the whole CPU, or GPUs. Each GPU times one cell at a time, across all runs."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attention_zoo import InvalidOption
from profiling.execution import environment, subprocess_runner
from profiling.execution.preflight import preflight
from profiling.execution.subprocess_runner import Outcome, Worker

MOST_AT_ONCE = 12
"""Maximum number of cells on one GPU: one is timed while others start CUDA, compile or are checked."""
LOCKS = Path("/tmp")
"""Folder of the lock files: local to this machine and shared by its users, as its GPUs are."""


class LaunchError(RuntimeError):
    """The run cannot start on this device; the message says why."""


@dataclass
class Device:
    """One device. It times one cell at a time; on a GPU other cells may prepare concurrently.

    Attributes:
        facts: the provenance columns of its rows, ``device_name`` among them.
        available: bytes that a cell may use.
        uuid: of the GPU; None for a CPU, which is not locked.
        variables: environment variables of its cells, which select the visible GPU.
        at_once: maximum number of concurrent cells.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    available: int = 0
    uuid: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    at_once: int = 1

    def __post_init__(self) -> None:
        self.turns = DeviceLock(self.uuid)
        self._waiting: list[Worker] = []

    def call(self, function: Callable[..., Any], *arguments: Any, fresh: bool = True, **limits: Any) -> Outcome:
        """Like :func:`subprocess_runner.call`, in a child that sees only this device and has an exclusive lease of it.

        Args:
            function, arguments, limits: as there.
            fresh: use a new child, after stopping idle workers; else, on a GPU, reuse a worker that has started CUDA.
        """
        with closing(DeviceLease(self.turns)) as turn:
            turn.take(exclusive=True)
            if fresh:
                self.close()
            with self._worker(fresh) as run:
                return run(function, *arguments, **limits)

    def call_concurrent(
        self, needs: int, function: Callable[..., Any], *arguments: Any, fresh: bool = True, **limits: Any
    ) -> Outcome:
        """Like :meth:`call`, but the child has an exclusive lease only within :func:`child_process.alone`.

        Args:
            needs: bytes of device memory; the call waits until they fit beside those of other calls.
            function, arguments, fresh, limits: as there.
        """
        if self.at_once == 1:
            return self.call(function, *arguments, fresh=fresh, **limits)
        with self.turns.room(needs, self.available), closing(DeviceLease(self.turns)) as turn:
            turn.take(exclusive=False)
            with self._worker(fresh) as run:
                return run(function, *arguments, take=turn.take, **limits)

    @contextlib.contextmanager
    def _worker(self, fresh: bool) -> Iterator[Callable[..., Outcome]]:
        """Yield the runner of a call: a new child, or on a GPU a kept worker, since CUDA takes seconds to start."""
        if fresh or self.uuid is None:
            yield partial(subprocess_runner.call, environment=self.variables)
            return
        try:
            worker = self._waiting.pop()
        except IndexError:
            worker = Worker(self.variables)
        try:
            yield worker.call
        finally:
            self._waiting.append(worker)

    def close(self) -> None:
        """Stop the idle workers, which releases their device memory."""
        while self._waiting:
            self._waiting.pop().close()

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value of a call; LaunchError if the call fails."""
        outcome = self.call(question, *arguments, fresh=False)
        if outcome.status != "ok":
            raise LaunchError(f"cannot use {self.uuid or 'the device'}: {outcome.reason}")
        return outcome.value


def find(kind: str, numbers: Sequence[int] = ()) -> list[Device]:
    """Return the CPU, or all visible GPUs, or those with these ``numbers``, as nvidia-smi numbers them.

    Raises:
        InvalidOption: ``numbers`` contains a GPU that does not exist, or is given for a CPU.
        LaunchError: a device cannot be used or fails the preflight.
    """
    if kind == "cpu" and numbers:
        raise InvalidOption("--gpus chooses among GPUs, and this run is on a CPU; leave it out")
    devices = [Device()] if kind == "cpu" else [_gpu(*result) for result in enumerate(_uuids())]
    for number in numbers:
        if number not in range(len(devices)):
            raise InvalidOption(f"--gpus: there is no GPU {number}; valid: {', '.join(map(str, range(len(devices))))}")
    chosen = [devices[number] for number in dict.fromkeys(numbers)] or devices
    if kind == "cuda":
        # Each preparing cell occupies one processor, and timing another one.
        each = max(1, min(MOST_AT_ONCE, processors() // len(chosen) - 1))
        chosen = [replace(device, at_once=each) for device in chosen]
    for device in chosen:
        device.ask(preflight, kind)
        device.facts = device.ask(environment.describe, kind)
        device.available = device.ask(environment.available_bytes, kind)
    return chosen


def _uuids() -> list[str]:
    outcome = subprocess_runner.call(_visible_uuids, environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    if not outcome.value:
        raise LaunchError(f"cannot use cuda: {outcome.reason or 'no GPU is visible'}")
    return outcome.value


def _visible_uuids() -> list[str]:
    """Run in a child: a process that has initialised CUDA holds memory and cannot be forked from."""
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def _gpu(number: int, uuid: str) -> Device:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # By position among the visible GPUs: a MIG instance has no other name that both CUDA and PyTorch accept.
    name = visible.split(",")[number].strip() if visible else str(number)
    return Device(uuid=uuid, variables={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": name})


def processors() -> int:
    """How many processors this process may use."""
    # Not every system has sched_getaffinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_ENDING = threading.Event()


def _going_on() -> bool:
    if _ENDING.is_set():
        raise LaunchError("the run has ended")
    return True


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Kill running cells; within the block, cells that wait for a device raise LaunchError."""
    _ENDING.set()
    subprocess_runner.stop_all()
    try:
        yield
    finally:
        _ENDING.clear()


class DeviceLock:
    """Lock of a GPU: shared by any number of preparing cells, or exclusive for one timed cell.

    While a cell waits for the exclusive lock, no other cell of its run gets the shared one. Thus all cells in progress
    are timed one after the other. A file lock excludes other runs in the same way, also in other processes.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._change = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False
        self._lock: int | None = None
        self._needed: list[int] = []
        self._queue: list[object] = []

    def enter(self, exclusive: bool) -> None:
        """Acquire the lock, blocking; LaunchError once the run has ended."""
        with self._change:
            self._waiting += exclusive
            try:
                while _going_on() and not (self._free(exclusive) and self._locked(exclusive)):
                    self._change.wait(0.01)
            finally:
                self._waiting -= exclusive
            self._alone = exclusive
            self._together += not exclusive

    def leave(self, exclusive: bool) -> None:
        """Release the lock."""
        with self._change:
            self._alone = False
            self._together -= not exclusive
            if self._together == 0 and self._lock is not None:
                os.close(self._lock)
                self._lock = None
            self._change.notify_all()

    @contextlib.contextmanager
    def room(self, needs: int, available: int) -> Iterator[None]:
        """Reserve ``needs`` bytes; wait until they fit into ``available`` or nothing else is reserved.

        In order of arrival, so that small cells do not keep a large one waiting.
        """
        place = object()
        with self._change:
            self._queue.append(place)
            try:
                while _going_on() and not (self._queue[0] is place and self._fits(needs, available)):
                    self._change.wait(0.1)
            finally:
                self._queue.remove(place)
                self._change.notify_all()
            self._needed.append(needs)
        try:
            yield
        finally:
            with self._change:
                self._needed.remove(needs)
                self._change.notify_all()

    def _fits(self, needs: int, available: int) -> bool:
        return not self._needed or sum(self._needed) + needs <= available

    def _free(self, exclusive: bool) -> bool:
        return not (self._alone or (self._together if exclusive else self._waiting))

    def _locked(self, exclusive: bool) -> bool:
        if self._uuid is None or self._lock is not None:
            return True
        descriptor = _opened(LOCKS / f"vision-attention-bench-{self._uuid}.lock")
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True


class DeviceLease:
    """The lock as held by one cell, shared or exclusive."""

    def __init__(self, turns: DeviceLock) -> None:
        self._turns = turns
        self._alone: bool | None = None

    def take(self, exclusive: bool) -> None:
        """Release the lock, if held, and acquire it in the given mode."""
        self.close()
        self._turns.enter(exclusive)
        self._alone = exclusive

    def close(self) -> None:
        """Release the lock, if held."""
        if self._alone is not None:
            self._turns.leave(self._alone)
        self._alone = None


def _opened(path: Path) -> int:
    """Open a lock file that any user may have created and any user may lock."""
    while True:
        # In a shared folder Linux rejects O_CREAT on another user's file, even if the file exists.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
