"""What cells run on: the CPU as a whole, or GPUs, each held by one cell at a time whichever run it belongs to."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attention_zoo import InvalidOption
from profiling import environment, isolation
from profiling.isolation import Outcome

LOCKS = Path("/tmp")
"""A folder of this machine alone that all its users share, as they share its GPUs."""


class LaunchError(RuntimeError):
    """The run cannot start on this device; the message says why."""


@dataclass
class Device:
    """One device, for one cell at a time.

    Attributes:
        facts: the provenance columns of its rows, ``device_name`` among them.
        available: bytes that a cell may use.
        uuid: the GPU's; None for a CPU, which is not locked.
        variables: what its cells find in their environment: which GPU they see.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    available: int = 0
    uuid: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    def call(self, function: Callable[..., Any], *arguments: Any, **limits: Any) -> Outcome:
        """As :func:`profiling.isolation.call`, in a child that sees this device alone; waits for its turn."""
        with _turn(self.uuid):
            return isolation.call(function, *arguments, environment=self.variables, **limits)

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


_ENDING = threading.Event()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Within: cells that run are killed, and those that wait for a device give up."""
    _ENDING.set()
    isolation.stop_all()
    try:
        yield
    finally:
        _ENDING.clear()


@contextlib.contextmanager
def _turn(uuid: str | None) -> Iterator[None]:
    """Hold the GPU of this UUID; wait while another cell, of this run or of another, does."""
    if uuid is None:
        yield
        return
    descriptor = _opened(LOCKS / f"vision-attention-bench-{uuid}.lock")
    try:
        while not _locked(descriptor):
            if _ENDING.is_set():
                raise LaunchError("the run has ended")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    """Open a lock that any user may have made, and any may use."""
    while True:
        # Linux refuses O_CREAT on what another user has put into a shared folder, even where the file is there.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
