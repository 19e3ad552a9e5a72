"""Measuring attention modules: MACs, memory and latency of one step, on any ``nn.Module``."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# The profiler's libraries print their progress to stderr unless told not to; they read this when loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def measure(module: "nn.Module", x: "Tensor", mode: str = "forward", dtype: str = "fp32") -> dict[str, Any]:
    """Count, predict and time one step of any module, in this process.

    The module stays as it is, in training mode or not; its gradients are cleared.

    >>> import torch
    >>> found = measure(torch.nn.Linear(64, 64), torch.randn(1, 196, 64))
    >>> found["macs_counted"], found["memory_predicted_bytes"] == found["memory_peak_bytes"]
    (802816, True)

    Args:
        module: any module from one tensor to one tensor, on the device of ``x``.
        x: its input.
        mode: ``forward`` or ``forward_backward``.
        dtype: ``fp64`` and ``fp32`` run as they are, ``tf32``, ``bf16`` and ``fp16`` as in profiling.workload.

    Returns:
        Columns of a row, as ``results/README.md`` explains them; what cannot be had is None.
    """
    # Imported here, so that the schema can be read on a machine without PyTorch.
    from profiling.cell import measure_module

    return measure_module(module, x, mode, dtype)
