"""MACs of the operators in ``triton_ops``, for PyTorch's counter and for fvcore. The two share no formula."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from attention_zoo.attentions.bra import triton_ops  # noqa: F401 (defines the operators)
from attention_zoo.core.operator_macs import OPERATOR_MACS, sizes


@register_flop_formula(torch.ops.attention_zoo.bra_route)
def _route_flops(tokens: Any, qk_dim: int, side: int, *rest: Any, out_shape: Any = None) -> int:
    return 2 * tokens[0] * side**4 * qk_dim


def _pairs(tokens: Any, small: Any, index: Any) -> int:
    """The number of query-key pairs, from shapes."""
    keys = tokens if small is None else small
    return tokens[0] * tokens[1] * tokens[2] * index[2] * (keys[1] * keys[2] // index[1])


def _dim(tokens: Any, small: Any, qk_dim: int) -> int:
    return tokens[3] - 2 * qk_dim if small is None else small[3] - qk_dim


def _lepe_macs(tokens: Any, taps: Any) -> int:
    return 0 if taps is None else tokens[0] * tokens[1] * tokens[2] * taps[0] * taps[1]


@register_flop_formula(torch.ops.attention_zoo.bra_attend)
def _attend_flops(tokens: Any, small: Any, index: Any, *rest: Any, out_shape: Any = None) -> int:
    taps, qk_dim = rest[2], rest[4]
    return 2 * (_pairs(tokens, small, index) * (qk_dim + _dim(tokens, small, qk_dim)) + _lepe_macs(tokens, taps))


@register_flop_formula(torch.ops.attention_zoo.bra_backward)
def _backward_flops(tokens: Any, small: Any, index: Any, *rest: Any, out_shape: Any = None) -> int:
    # Two kernels recompute the scores and grad v: seven products instead of four.
    taps, qk_dim = rest[2], rest[7]
    channels = 4 * qk_dim + 3 * _dim(tokens, small, qk_dim)
    return 2 * (_pairs(tokens, small, index) * channels + 2 * _lepe_macs(tokens, taps))


def _macs_of_attention(inputs: list[Any], outputs: list[Any]) -> int:
    tokens, small, index, taps = (sizes(inputs[place]) for place in (0, 1, 2, 5))
    keys, dim, qk_dim = small or tokens, sizes(outputs[0])[3], inputs[7].toIValue()
    met = index[2] * math.prod(keys[1:3]) // index[1]
    lepe = math.prod(taps) if taps else 0
    return math.prod(tokens[:3]) * (met * (qk_dim + dim) + lepe)


def _macs_of_routing(inputs: list[Any], outputs: list[Any]) -> int:
    batch, regions, channels = sizes(outputs[2])
    return batch * regions**2 * channels // 2


OPERATOR_MACS["attention_zoo::bra_attend"] = _macs_of_attention
OPERATOR_MACS["attention_zoo::bra_route"] = _macs_of_routing
