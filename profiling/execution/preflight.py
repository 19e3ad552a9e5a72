"""Check once that a device supports what every cell needs, before hundreds of cells fail for the same reason."""

from collections.abc import Callable

import torch
from torch import nn

from profiling.cases.workload import Mode, Workload

SIZE = 64


def preflight(device: str) -> None:
    """Run once what every cell runs, in a process forked in the same way.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        RuntimeError: a check fails; the message names the check and the error.
    """
    for what, attempt in CHECKS.items():
        if device == "cuda" or what not in ON_CUDA:
            try:
                attempt(device)
            except Exception as problem:
                raise RuntimeError(f"{what} fails: {type(problem).__name__}: {problem}") from problem


def _start(device: str) -> None:
    torch.cuda.init()
    torch.cuda.synchronize()


def _multiply(device: str) -> None:
    ones = torch.ones(SIZE, SIZE, device=device)
    if (ones @ ones).sum().item() != SIZE**3:
        raise ArithmeticError("a product of ones is wrong")


def _forward(device: str) -> None:
    if not _workload(device, "forward").step().isfinite().all():
        raise ArithmeticError("its result is not finite")


def _backward(device: str) -> None:
    work = _workload(device)
    work.step()
    _check_gradient(work)


def _graph(device: str) -> None:
    work = _workload(device)
    with work.replayed():
        work.step()
    _check_gradient(work)


def _workload(device: str, mode: Mode = "forward_backward") -> Workload:
    return Workload(nn.Linear(SIZE, SIZE, device=device), torch.ones(1, SIZE, device=device), mode)


def _check_gradient(work: Workload) -> None:
    if work.x.grad is None or not work.x.grad.isfinite().all():
        raise ArithmeticError("its gradient is not there or not finite")


CHECKS: dict[str, Callable[[str], None]] = {
    "starting CUDA": _start,
    "a matrix product": _multiply,
    "a forward pass": _forward,
    "a backward pass": _backward,
    "a CUDA graph of both": _graph,
}
"""The checks, in order."""
ON_CUDA = ("starting CUDA", "a CUDA graph of both")
