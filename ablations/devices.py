"""What cells run on: the CPU as a whole, or GPUs, on each of which one cell is timed at a time, of whichever run."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from attention_zoo import InvalidOption
from profiling import environment, isolation
from profiling.isolation import Outcome

MOST_AT_ONCE = 6
"""Cells in hand on one GPU: one that is timed, and others that start CUDA, compile, or are checked meanwhile."""
LOCKS = Path("/tmp")
"""A folder of this machine alone that all its users share, as they share its GPUs."""


class LaunchError(RuntimeError):
    """The run cannot start on this device; the message says why."""


@dataclass
class Device:
    """One device. It times one cell at a time; on a GPU others may get ready for that together.

    Attributes:
        facts: the provenance columns of its rows, ``device_name`` among them.
        available: bytes that a cell may use.
        uuid: the GPU's; None for a CPU, which is not locked.
        variables: what its cells find in their environment: which GPU they see.
        at_once: cells in hand, at most.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    available: int = 0
    uuid: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    at_once: int = 1

    def __post_init__(self) -> None:
        self._turns = Turns(self.uuid)

    def call(self, function: Callable[..., Any], *arguments: Any, **limits: Any) -> Outcome:
        """As :func:`profiling.isolation.call`, in a child that sees this device alone and has it to itself."""
        with closing(Turn(self._turns)) as turn:
            turn.take(alone=True)
            return isolation.call(function, *arguments, environment=self.variables, **limits)

    def call_beside(self, needs: int, function: Callable[..., Any], *arguments: Any, **limits: Any) -> Outcome:
        """As :meth:`call`, but the child has the device to itself only where it asks, by :func:`isolation.alone`.

        Args:
            needs: bytes of the device's memory; what does not fit beside the others waits for them.
            function, arguments, limits: as there.
        """
        if self.at_once == 1:
            return self.call(function, *arguments, **limits)
        with self._turns.room(needs, self.available), closing(Turn(self._turns)) as turn:
            turn.take(alone=False)
            return isolation.call(function, *arguments, environment=self.variables, take=turn.take, **limits)

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of a call; LaunchError if there is none."""
        outcome = self.call(question, *arguments)
        if outcome.status != "ok":
            raise LaunchError(f"cannot use {self.uuid or 'the device'}: {outcome.reason}")
        return outcome.value


def find(kind: str, wanted: Sequence[int] = ()) -> list[Device]:
    """The CPU, or the GPUs that are visible here, or those ``wanted`` of them, numbered as nvidia-smi does.

    Raises:
        InvalidOption: ``wanted`` names a GPU that is not there, or any with a CPU.
        LaunchError: a device does not answer.
    """
    if kind == "cpu" and wanted:
        raise InvalidOption("--gpus chooses among GPUs, and this run is on a CPU; leave it out")
    devices = [Device()] if kind == "cpu" else [_gpu(*found) for found in enumerate(_uuids())]
    for number in wanted:
        if number not in range(len(devices)):
            raise InvalidOption(f"--gpus: there is no GPU {number}; valid: {', '.join(map(str, range(len(devices))))}")
    chosen = [devices[number] for number in dict.fromkeys(wanted)] or devices
    if kind == "cuda":
        # Getting ready keeps a processor busy, and timing another one.
        each = max(1, min(MOST_AT_ONCE, processors() // len(chosen) - 1))
        chosen = [replace(device, at_once=each) for device in chosen]
    for device in chosen:
        device.facts = device.ask(environment.describe, kind)
        device.available = device.ask(environment.available_bytes, kind)
    return chosen


def _uuids() -> list[str]:
    outcome = isolation.call(_visible_uuids, environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    if not outcome.value:
        raise LaunchError(f"cannot use cuda: {outcome.reason or 'no GPU is visible'}")
    return outcome.value


def _visible_uuids() -> list[str]:
    """Asked in a child: a process that has touched CUDA holds memory, and cannot be forked from."""
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def _gpu(number: int, uuid: str) -> Device:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # By position among those visible: a part of a GPU (MIG) has no other name that both CUDA and PyTorch know.
    name = visible.split(",")[number].strip() if visible else str(number)
    return Device(uuid=uuid, variables={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": name})


def processors() -> int:
    """How many processors this process may use."""
    # Not every system says.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_ENDING = threading.Event()


def _going_on() -> bool:
    if _ENDING.is_set():
        raise LaunchError("the run has ended")
    return True


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Within: cells that run are killed, and those that wait for a device give up."""
    _ENDING.set()
    isolation.stop_all()
    try:
        yield
    finally:
        _ENDING.clear()


class Turns:
    """Who may use a GPU: cells that get ready, any number together, or one cell alone, to be timed.

    Once a cell waits to be alone no more of its run begin to get ready, so that all that are in hand are timed one
    after the other. Between runs, whatever process they are of, a lock on a file keeps the same order.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._change = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False
        self._lock: int | None = None
        self._needed: list[int] = []

    def enter(self, alone: bool) -> None:
        """Wait for a turn and take it; LaunchError once the run has ended."""
        with self._change:
            self._waiting += alone
            try:
                while _going_on() and not (self._free(alone) and self._locked(alone)):
                    self._change.wait(0.01)
            finally:
                self._waiting -= alone
            self._alone = alone
            self._together += not alone

    def leave(self, alone: bool) -> None:
        """Give the turn back."""
        with self._change:
            self._alone = False
            self._together -= not alone
            if self._together == 0 and self._lock is not None:
                os.close(self._lock)
                self._lock = None
            self._change.notify_all()

    @contextlib.contextmanager
    def room(self, needs: int, available: int) -> Iterator[None]:
        """Hold so many bytes of memory once others leave them, or once there are no others."""
        with self._change:
            while _going_on() and self._needed and sum(self._needed) + needs > available:
                self._change.wait(0.1)
            self._needed.append(needs)
        try:
            yield
        finally:
            with self._change:
                self._needed.remove(needs)
                self._change.notify_all()

    def _free(self, alone: bool) -> bool:
        return not (self._alone or (self._together if alone else self._waiting))

    def _locked(self, alone: bool) -> bool:
        if self._uuid is None or self._lock is not None:
            return True
        descriptor = _opened(LOCKS / f"vision-attention-bench-{self._uuid}.lock")
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True


class Turn:
    """One cell's turn, of either kind."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._alone: bool | None = None

    def take(self, alone: bool) -> None:
        """Give back what there is, and wait for the other kind."""
        self.close()
        self._turns.enter(alone)
        self._alone = alone

    def close(self) -> None:
        """Give back what there is."""
        if self._alone is not None:
            self._turns.leave(self._alone)
        self._alone = None


def _opened(path: Path) -> int:
    """Open a lock that any user may have made, and any may use."""
    while True:
        # Linux refuses O_CREAT on what another user has put into a shared folder, even where the file is there.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
