"""PyTorch's FlexAttention, compiled, and the limits of its kernels."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import flex_attention

from attention_zoo.core import compilers

SMALLEST_HEAD = 16
VECTORS = torch.backends.cpu.get_cpu_capability()
"""The vector instructions of this CPU; found here, since a compiler cannot trace the question."""
VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
"""The width of those that FlexAttention runs with on a CPU."""


def compiled() -> Callable[..., Tensor]:
    """``flex_attention`` as one kernel."""
    if torch.compiler.is_compiling():
        # It is compiled with what surrounds it.
        return flex_attention
    return _compiled()


@cache
def _compiled() -> Callable[..., Tensor]:
    # Uncompiled FlexAttention silently materialises all scores of the grid; fullgraph forbids that fallback.
    # The option says what PyTorch chooses anyway. It is there for the key of PyTorch's cache of compiled code, which
    # lacks it: code for AVX-512 is found again and gives wrong results on a CPU with AVX2 that shares the cache.
    options: dict[str, Any] = {"cpp.simdlen": VECTOR_BITS[VECTORS]} if VECTORS in VECTOR_BITS else {}
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, options=options)


def unsupported(x: Tensor, head_dim: int, gradients: bool) -> str | None:
    """Why FlexAttention's kernels cannot run on ``x``, with ``gradients`` or without; None if they can."""
    if isinstance(x, FakeTensor):
        return "what FlexAttention's kernels allocate cannot be followed on shapes alone"
    if gradients and not x.is_cuda:
        return f"FlexAttention has no backward pass on {x.device.type}; valid there: steps under torch.no_grad()"
    if x.dtype == torch.float64:
        return "FlexAttention's kernels do not run in fp64"
    if x.device.type == "cpu" and VECTORS not in VECTOR_BITS:
        return f"FlexAttention needs a CPU with AVX2, and PyTorch uses {VECTORS} here"
    if x.is_cuda and head_dim < SMALLEST_HEAD:
        return f"FlexAttention needs at least {SMALLEST_HEAD} channels per head, not {head_dim}"
    return compilers.pytorch_lacks(x.device.type)
