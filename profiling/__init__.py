"""Measuring attention modules: MACs, memory and latency of one step, on any ``nn.Module``."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# The profiler's libraries print progress to stderr by default; they read these variables when loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def measure(module: "nn.Module", x: "Tensor", mode: str = "forward", dtype: str = "fp32") -> dict[str, Any]:
    """Count, predict and time one step of any module, in this process.

    The module keeps its training mode; its gradients are cleared.

    >>> import torch
    >>> found = measure(torch.nn.Linear(64, 64), torch.randn(1, 196, 64))
    >>> found["macs_counted"], found["memory_predicted_bytes"] == found["memory_peak_bytes"]
    (802816, True)

    Args:
        module: any module from one tensor to one tensor, on the device of ``x``.
        x: its input.
        mode: ``forward`` or ``forward_backward``.
        dtype: ``fp64`` and ``fp32`` run unchanged; ``tf32``, ``bf16`` and ``fp16`` as in profiling.cases.workload.

    Returns:
        Columns of a row, as defined in ``results/README.md``; unavailable values are None.
    """
    # Imported here, so that the schema can be read on a machine without PyTorch.
    from profiling.execution.benchmark import measure_module

    return measure_module(module, x, mode, dtype)
