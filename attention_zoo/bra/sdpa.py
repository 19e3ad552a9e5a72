"""BRA through PyTorch's fused attention, a few query regions at a time, on any device.

Keys and values are gathered only for the query regions in hand, and again in the backward pass, whose gradients
are added region by region: nothing of the size of topk x tokens, tokens x keys or regions x regions x tokens
ever exists.

Shape legend: b batch, h w grid, p regions, r query regions of the whole batch, k routed regions, n tokens of a
region, s tokens of a region after kv downsampling, m heads, c dim, e qk_dim, d e + c.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo import regions
from attention_zoo.attend import merge_heads, split_heads
from attention_zoo.contract import Unsupported
from attention_zoo.stages import stage

if TYPE_CHECKING:
    from attention_zoo.bra import BiLevelRoutingAttention

CHUNK_BYTES = 2 << 20
"""Gathered keys and values in hand at a time: small enough for a cache, large enough to keep all cores busy."""


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; ``side`` regions per side divide the grid."""
    batch, e = x.shape[0], bra.qk_dim
    with stage("bra.project"):
        tokens = regions.to_regions(x, side, side)
        weight, bias = bra.qkv.qkv.weight, bra.qkv.qkv.bias
        # Two products instead of one, so that each result lies by itself in memory.
        q, kv = F.linear(tokens, weight[:e], bias[:e]), F.linear(tokens, weight[e:], bias[e:])
        small = rearrange(bra.kv_down(rearrange(kv, "b p y x d -> (b p) d y x")), "r d y x -> r (y x) d").contiguous()
    with stage("bra.route"):
        index, strength = bra.router(q.mean(dim=(2, 3)), kv[..., :e].mean(dim=(2, 3)))
    with stage("bra.attend"):
        everywhere = torch.arange(batch, device=x.device)[:, None, None] * side**2 + index
        out = _RoutedAttention.apply(
            rearrange(q, "b p y x e -> (b p) (y x) e"),
            small,
            everywhere.flatten(0, 1),
            _factor(bra, strength),
            bra.num_heads,
            bra.scale,
            e,
        )
        out = rearrange(out, "(b p) (y x) c -> b p y x c", b=batch, y=tokens.shape[2])
        out = regions.from_regions(out, side, side)
    if bra.lepe is None:
        return out, index, strength
    with stage("bra.lepe"):
        grid = rearrange(regions.from_regions(kv[..., e:], side, side), "b h w c -> b c h w")
        return out + rearrange(bra.lepe(grid), "b c h w -> b h w c"), index, strength


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "r k"] | None:
    """What gathered keys and values are multiplied by, if anything."""
    if bra.soft_routing:
        return strength.flatten(0, 1)
    if bra.diff_routing:
        return (1 + (strength - strength.detach())).flatten(0, 1)
    return None


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "r n e"],
        kv: Float[Tensor, "r s d"],
        index: Int[Tensor, "r k"],
        factor: Float[Tensor, "r k"] | None,
        heads: int,
        scale: float | int,
        e: int,
    ) -> Float[Tensor, "r n c"]:
        ctx.save_for_backward(q, kv, index, factor)
        ctx.settings = heads, scale, e
        out = q.new_empty(*q.shape[:2], kv.shape[2] - e)
        for part in _chunks(kv, index):
            gathered = kv[index[part].flatten()]
            out[part] = _attend(q[part], gathered, None if factor is None else factor[part], heads, scale, e)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "r n c"]) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported("impl='sdpa' has no second derivative; impl='reference' has")
        q, kv, index, factor = ctx.saved_tensors
        dq, dkv = torch.empty_like(q), torch.zeros_like(kv)
        dfactor = None if factor is None else torch.empty_like(factor)
        for part in _chunks(kv, index):
            chosen = index[part].flatten()
            leaves = [q[part].detach(), kv[chosen].detach()] + ([] if factor is None else [factor[part].detach()])
            with torch.enable_grad():
                leaves = [leaf.requires_grad_() for leaf in leaves]
                out = _attend(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, *ctx.settings)
            found = torch.autograd.grad(out, leaves, grad[part])
            dq[part] = found[0]
            dkv.index_add_(0, chosen, found[1])
            if dfactor is not None:
                dfactor[part] = found[2]
        return dq, dkv, None, dfactor, None, None, None


def _chunks(kv: Float[Tensor, "r s d"], index: Int[Tensor, "r k"]) -> Iterator[slice]:
    per_region = index.shape[1] * kv.shape[1] * kv.shape[2] * kv.element_size()
    step = max(1, CHUNK_BYTES // per_region)
    return (slice(start, start + step) for start in range(0, len(index), step))


def _attend(
    q: Float[Tensor, "r n e"],
    gathered: Float[Tensor, "rk s d"],
    factor: Float[Tensor, "r k"] | None,
    heads: int,
    scale: float | int,
    e: int,
) -> Float[Tensor, "r n c"]:
    if factor is not None:
        gathered = gathered * factor.flatten()[:, None, None]
    gathered = rearrange(gathered, "(r k) s d -> r (k s) d", r=len(q))
    k, v = gathered.split([e, gathered.shape[2] - e], dim=-1)
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=scale))
