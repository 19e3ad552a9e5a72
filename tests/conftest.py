"""What every test runs under: a fixed seed, and memory that nobody wrote full of NaN."""

import os
from collections.abc import Callable, Iterator

# Before PyTorch is loaded. Threads that spin while they wait make small tests ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jaxtyping
import pytest
import torch
from torch import Tensor

# Before Triton is loaded: without a GPU its kernels are interpreted. What is compiled for a CPU is none of Triton's.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A torch.device context remembers, at its first use, which functions make tensors: before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks: a wrong value reaches the code that refuses it, and a tracer may pass sizes as tensors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floating-point tensors with NaN, so that a read of what nobody wrote shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned
