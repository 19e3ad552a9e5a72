"""Queries for code that runs on fake tensors, which simulate a device to predict its memory use."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_simulated: str | None = None


@contextmanager
def simulated_device(device: str) -> Iterator[None]:
    """Within this context, :func:`device_type` of every tensor is ``device``."""
    global _simulated
    before, _simulated = _simulated, device
    try:
        yield
    finally:
        _simulated = before


def device_type(tensor: Tensor) -> str:
    """The real or simulated device type of a tensor, for device-dependent code."""
    return _simulated or tensor.device.type


def memory_is_simulated() -> bool:
    """Whether the step runs on fake tensors to predict its memory. If so, a loop needs only one iteration."""
    return _simulated is not None
