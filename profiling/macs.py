"""Multiply-accumulates, counted in three ways that share nothing.

All are MACs of the forward pass of the whole batch: what papers and fvcore call FLOPs. 1 MAC = 2 FLOPs.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo.contract import Macs
from profiling.workload import Workload, imitated


def analytic(module: nn.Module, height: int, width: int) -> Macs | None:
    """By the module's own formula, batch 1; None if it, or an attention inside it, declares none."""
    if not hasattr(module, "macs"):
        return None
    try:
        return module.macs(height, width)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def counted(work: Workload) -> tuple[int, int]:
    """Forward and backward MACs, operator by operator, on ``meta`` tensors: costs no memory.

    On meta, fused attention is split into its matrix products, so that none goes uncounted.
    """
    with imitated(work, _meta) as imitation, imitation.settings(), FlopCounterMode(display=False) as counter:
        if work.mode == "forward":
            imitation.step()
            return counter.get_total_flops() // 2, 0
        out = imitation.module(imitation.x)
        forward = counter.get_total_flops()
        out.backward(imitation.grad)
        return forward // 2, (counter.get_total_flops() - forward) // 2


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def by_fvcore(work: Workload) -> int:
    """By fvcore's convention: the paper's own. Runs the module once on its real input, in eval mode."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    training = {module: module.training for module in work.module.modules()}
    try:
        with work.settings(), torch.no_grad():
            analysis = FlopCountAnalysis(work.module.eval(), work.x.detach())
            analysis.set_op_handle(**FUSED)
            return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
    finally:
        for module, was in training.items():
            module.training = was


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _bra_attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value, index = (tensor.type().sizes() for tensor in inputs[:4])
    keys = index[2] * math.prod(key[1:3]) // index[1]
    return math.prod(query[:3]) * keys * (query[3] + value[3])


def _bra_routing(inputs: list[Any], outputs: list[Any]) -> int:
    batch, regions, channels = inputs[0].type().sizes()
    return batch * regions**2 * channels // 2


FUSED: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "attention_zoo::bra_attend": _bra_attention,
    "attention_zoo::bra_route": _bra_routing,
}
"""Operators that fvcore does not know and would count as nothing."""
