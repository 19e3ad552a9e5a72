"""The coarse term beside a fast implementation: attention among regions, times a learned gate.

It is added outside of the kernels, from the projections that they read. ``reference`` has code of its own.

Shape legend: b batch, h w padded grid, p regions (S x S), c dim, e qk_dim, d any channels.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads

if TYPE_CHECKING:
    from attention_zoo.attentions.bra import BiLevelRoutingAttention


def add(
    bra: "BiLevelRoutingAttention",
    out: Float[Tensor, "b h w c"],
    x: Float[Tensor, "b h w c"],
    side: int,
    q: Float[Tensor, "b p e"],
    k: Float[Tensor, "b p e"],
    v: Float[Tensor, "b p c"],
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h w c"]:
    """``out`` plus the gated term.

    Args:
        bra: the module, for its gate and options.
        out: attention to the routed regions, LePE included.
        x: the padded input, from which the gate is projected.
        side: regions per side.
        q, k, v: means of the regions.
        valid: True where the grid holds a real token; regions without any are no keys.
    """
    assert bra.coarse_gate is not None
    bias = None
    if valid is not None:
        empty = ~_tiles(valid[None, :, :, None], side).any(dim=4).any(dim=2).flatten()
        bias = torch.zeros_like(empty, dtype=q.dtype).masked_fill(empty, float("-inf"))[None, None, None]
    by_head = [split_heads(t, bra.num_heads) for t in (q, k, v)]
    coarse = merge_heads(softmax_attention(by_head[0], by_head[1], by_head[2], bra.scale, bias, impl="sdpa"))
    of_region, gate = coarse.view(len(x), side, 1, side, 1, bra.dim), _tiles(bra.coarse_gate(x), side)
    return torch.addcmul(_tiles(out, side), gate, of_region).reshape(x.shape)


def means(x: Float[Tensor, "b h w d"], side: int, valid: Bool[Tensor, "h w"] | None = None) -> Float[Tensor, "b p d"]:
    """Means over the real tokens of each of ``side x side`` regions; zero where there are none."""
    if valid is None:
        return _tiles(x, side).mean(dim=(2, 4)).flatten(1, 2)
    count = _tiles(valid[None, :, :, None], side).sum(dim=(2, 4)).clamp_min(1)
    return (_tiles(x.where(valid[..., None], 0), side).sum(dim=(2, 4)) / count).flatten(1, 2)


def _tiles(x: Tensor, side: int) -> Tensor:
    """(b, h, w, d) as (b, S, h / S, S, w / S, d)."""
    return x.unflatten(2, (side, -1)).unflatten(1, (side, -1))
