"""Multiply-accumulates (MACs), counted by three independent methods.

All are MACs of the forward pass of the whole batch: what papers and fvcore call FLOPs. 1 MAC = 2 FLOPs.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo.core.base import Macs
from attention_zoo.core.operator_macs import OPERATOR_MACS
from profiling.cases.workload import Workload, with_fake_tensors

# fvcore scripts functions as it is loaded, and traces to count; PyTorch 2.14 says each time that both are deprecated.
with warnings.catch_warnings(action="ignore", category=FutureWarning):
    from fvcore.nn import FlopCountAnalysis


def analytic(module: nn.Module, height: int, width: int) -> Macs | None:
    """By the module's own formula, batch 1; None if the module or an attention inside it has no formula."""
    if not hasattr(module, "macs"):
        return None
    try:
        return module.macs(height, width)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def counted(work: Workload) -> tuple[int, int]:
    """Forward and backward MACs, counted per operator on ``meta`` tensors, which need no memory.

    On meta, fused attention decomposes into its matrix products, so all are counted.
    """
    rules = {torch.ops.aten.convolution_backward: _convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=rules)
    with with_fake_tensors(work, _meta) as imitation, imitation.settings(), counter:
        if work.mode == "forward":
            imitation.step()
            return counter.get_total_flops() // 2, 0
        out = imitation.module(imitation.x)
        forward = counter.get_total_flops()
        out.backward(imitation.grad)
        return forward // 2, (counter.get_total_flops() - forward) // 2


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *options: Any, **shapes: Any
) -> int:
    """FLOPs: the gradient of the input needs as many as the forward pass, and so does the gradient of the weight.

    PyTorch 2.13 and earlier do not divide those of the weight by the groups (pytorch/pytorch#183405).
    """
    *_, transposed, _output_padding, _groups, wanted = options
    positions = x if transposed else grad
    return 2 * sum(wanted[:2]) * math.prod(positions[2:]) * grad[0] * math.prod(weight)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def by_fvcore(work: Workload) -> int:
    """By fvcore's convention, as in the paper. Runs the module once on its real input, in eval mode."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    training = {module: module.training for module in work.module.modules()}
    try:
        with work.settings(), torch.no_grad(), warnings.catch_warnings(action="ignore", category=FutureWarning):
            analysis = FlopCountAnalysis(work.module.eval(), work.x.detach())
            analysis.set_op_handle(**FUSED, **OPERATOR_MACS, **RESAMPLING)
            return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
    finally:
        for module, was in training.items():
            module.training = was


def _no_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


RESAMPLING = dict.fromkeys(("aten::upsample_bilinear2d", "aten::adaptive_avg_pool2d", "aten::grid_sampler"), _no_macs)
"""Operators that fvcore counts, and neither formulas nor FlopCounterMode do."""


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


FUSED: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
}
"""PyTorch operators that fvcore does not support and would count as zero."""
