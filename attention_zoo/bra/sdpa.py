"""BRA without gathered copies: PyTorch's fused attention, a few query regions at a time, on any device.

Keys and values are gathered only for the query regions in hand, and again in the backward pass, whose gradients
are added region by region: nothing of the size of topk x tokens, tokens x keys or regions x regions x tokens
ever exists.

Shape legend: b batch, h w grid, p regions, r regions of the whole batch, a some of these, k routed regions,
y x n tokens of a region (per column, per row, all), s after kv downsampling, m heads, c dim, e qk_dim.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo import regions
from attention_zoo.attend import merge_heads, split_heads
from attention_zoo.contract import Unsupported, device_type, only_memory_is_followed
from attention_zoo.stages import stage

if TYPE_CHECKING:
    from attention_zoo.bra import BiLevelRoutingAttention

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Gathered keys and values in hand at a time: small enough for a cache, large enough to keep all cores busy."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; ``side`` regions per side divide the grid."""
    batch, e, dim = x.shape[0], bra.qk_dim, x.shape[3]
    with stage("bra.project"):
        tokens = regions.to_regions(x, side, side)
        parts = zip(*(t.split([e, e, dim]) for t in (bra.qkv.qkv.weight, bra.qkv.qkv.bias)), strict=True)
        # Three products instead of one, so that each result lies by itself in memory.
        q, k, v = (F.linear(tokens, weight, bias) for weight, bias in parts)
        few_k, few_v = _downsampled(bra, k, v)
    with stage("bra.route"):
        index, strength = bra.router(q.mean(dim=(2, 3)), k.mean(dim=(2, 3)))
    with stage("bra.attend"):
        factor = _factor(bra, strength)
        everywhere = torch.arange(batch, device=x.device)[:, None, None] * side**2 + index
        flat = [None if t is None else t.flatten(0, 1) for t in (q.flatten(2, 3), few_k, few_v, everywhere, factor)]
        # What needs no gradient stays outside of a Function, into which no tracer looks.
        attend: Any = _RoutedAttention.apply if torch.is_grad_enabled() else _attend_routed
        out, _ = attend(*flat, bra.num_heads, bra.scale)
        out = rearrange(out, "(b r c) (y x) d -> b r y c x d", b=batch, r=side, y=tokens.shape[2])
    if bra.lepe is not None:
        with stage("bra.lepe"):
            grid = rearrange(regions.from_regions(v, side, side), "b h w c -> b c h w")
            # The grid's own layout first: it is the sum's, too.
            out = rearrange(bra.lepe(grid), "b d (r y) (c x) -> b r y c x d", r=side, c=side) + out
    with stage("bra.output"):
        return rearrange(out, "b r y c x d -> b (r y) (c x) d"), index, strength


def _downsampled(
    bra: "BiLevelRoutingAttention", k: Float[Tensor, "b p y x e"], v: Float[Tensor, "b p y x c"]
) -> tuple[Float[Tensor, "b p s e"], Float[Tensor, "b p s c"]]:
    if bra.kv_down.mode == "identity":
        return k.flatten(2, 3), v.flatten(2, 3)
    both = rearrange(torch.cat([k, v], dim=-1), "b p y x d -> (b p) d y x")
    few = rearrange(bra.kv_down(both), "(b p) d y x -> b p (y x) d", b=len(k))
    return few[..., : bra.qk_dim].contiguous(), few[..., bra.qk_dim :].contiguous()


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"] | None:
    """What gathered keys and values are multiplied by, if anything."""
    if bra.soft_routing:
        return strength
    return 1 + (strength - strength.detach()) if bra.diff_routing else None


def _attend_routed(
    q: Float[Tensor, "r n e"],
    k: Float[Tensor, "r s e"],
    v: Float[Tensor, "r s c"],
    index: Int[Tensor, "r k"],
    factor: Float[Tensor, "r k"] | None,
    heads: int,
    scale: float | int,
) -> tuple[Float[Tensor, "r n c"], Float[Tensor, "r n m"]]:
    """Every query region to its routed regions, times ``factor``: the output, and the softmax's log-sum-exp."""
    out = v.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(*q.shape[:2], heads, dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _chunks(k, v, index):
        near_k, near_v = (_gathered(t, index[part], factor, part) for t in (k, v))
        found, lse[part] = _attend(q[part], near_k, near_v, heads, scale)
        if found.shape == out.shape:
            out = found
        else:
            out[part] = found
    return out, lse


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, factor: Tensor | None, heads: int, scale: float | int
    ) -> tuple[Tensor, Tensor]:
        out, lse = _attend_routed(q, k, v, index, factor, heads, scale)
        ctx.settings = heads, scale
        ctx.save_for_backward(q, k, v, index, factor, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported("impl='sdpa' has no second derivative; impl='reference' has")
        q, k, v, index, factor, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dfactor = None if factor is None else torch.zeros_like(factor)
        for part in _chunks(k, v, index):
            near_k, near_v = (_gathered(t, index[part], factor, part) for t in (k, v))
            dq[part], dnear_k, dnear_v = _gradients(
                grad[part], q[part], near_k, near_v, out[part], lse[part], *ctx.settings
            )
            for whole, dwhole, found in ((k, dk, dnear_k), (v, dv, dnear_v)):
                found = found.reshape(-1, *whole.shape[1:])
                if dfactor is not None:
                    dfactor[part] += (found * whole[index[part].flatten()]).sum(dim=(1, 2)).view_as(dfactor[part])
                    found = found * factor[part].flatten()[:, None, None]
                dwhole.index_add_(0, index[part].flatten(), found)
        return dq, dk, dv, None, dfactor, None, None


def _chunks(k: Float[Tensor, "r s e"], v: Float[Tensor, "r s c"], index: Int[Tensor, "r k"]) -> Iterator[slice]:
    per_region = index.shape[1] * k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()
    step = max(1, CHUNK_BYTES.get(device_type(k), 1 << 62) // per_region)
    starts: Iterable[int] = range(0, len(index), step)
    if only_memory_is_followed():
        starts = sorted({0, step, (len(index) - 1) // step * step} & set(starts))
    return (slice(start, start + step) for start in starts)


def _gathered(
    t: Float[Tensor, "r s d"], index: Int[Tensor, "a k"], factor: Float[Tensor, "r k"] | None, part: slice
) -> Float[Tensor, "a ks d"]:
    """Keys or values of the routed regions of some query regions, in routing order."""
    near = t.index_select(0, index.flatten())
    if factor is not None:
        near *= factor[part].flatten()[:, None, None]
    return near.view(len(index), -1, t.shape[2])


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """Whether the CPU's own kernel can be called, which hands out what its backward pass needs."""
    return device_type(q) == "cpu" and q.shape[-1] == v.shape[-1]


def _attend(
    q: Float[Tensor, "a n e"], k: Float[Tensor, "a ks e"], v: Float[Tensor, "a ks c"], heads: int, scale: float | int
) -> tuple[Float[Tensor, "a n c"], Float[Tensor, "..."]]:
    """The output and, where they come for free, the logarithms of the softmax's denominators (a n m)."""
    fused = _is_fused(q, v)
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    if fused:
        out, lse = _flash(q, k, v, scale=scale)
        return merge_heads(out), lse.transpose(1, 2)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=scale)), q.new_zeros(())


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float | int
) -> list[Tensor]:
    """Of q, k and v of :func:`_attend`."""
    if _is_fused(q, v):
        by_head = (split_heads(t, heads) for t in (grad, q, k, v, out))
        return [merge_heads(t) for t in _flash_backward(*by_head, lse.transpose(1, 2), 0.0, False, scale=scale)]
    # Not by autograd.grad: a compiler cannot follow a tensor that comes to need a gradient within the step.
    gradients: Any = torch.func.vjp(lambda q, k, v: _attend(q, k, v, heads, scale)[0], q, k, v)[1]
    return list(gradients(grad))
