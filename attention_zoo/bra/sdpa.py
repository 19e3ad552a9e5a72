"""BRA without gathered copies: PyTorch's fused attention, a few query regions at a time, on any device.

Keys and values are gathered only for the query regions in hand, and again in the backward pass, whose gradients
are added piece by piece: nothing of the size of topk x tokens, tokens x keys or regions x regions x tokens
ever exists.

Shape legend: b batch, h w grid, p regions, r regions of the whole batch, a some of these, k routed regions,
n tokens of a region, g pieces of the whole batch in which keys and values are gathered, s tokens of a piece,
t pieces of a region, i pieces and l keys of a query region, m heads, c dim, e qk_dim.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo import regions
from attention_zoo.attend import merge_heads, split_heads
from attention_zoo.contract import Unsupported, device_type, only_memory_is_followed
from attention_zoo.stages import stage

if TYPE_CHECKING:
    from attention_zoo.bra import BiLevelRoutingAttention

CHUNK_BYTES = {"cpu": 4 << 20, "meta": 1 << 62}
"""Gathered keys and values in hand at a time: small enough for a cache; shapes alone need no memory."""

CHUNK_BYTES_ON_A_GPU = 256 << 20
"""Large enough to keep all cores of any other device busy."""

CONVOLVED_FROM = 500_000
"""Numbers in an input from which on a convolution of 1 x 1 is faster on a CPU than a product and the bias's sum."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; ``side`` regions per side divide the grid."""
    batch, height, width, dim = x.shape
    tall, wide = height // side, width // side
    with stage("bra.project"):
        q, k, v = _projected(bra, x, side)
        few_k, few_v, pieces = _pieces(bra, k, v, side)
    with stage("bra.route"):
        k_mean = F.avg_pool2d(k.permute(0, 3, 1, 2), (tall, wide)).permute(0, 2, 3, 1).flatten(1, 2)
        index, strength = bra.router(q.mean(dim=2), k_mean)
    with stage("bra.attend"):
        factor = _factor(bra, strength)
        routed = pieces.index_select(0, index.flatten()).view(batch, -1)
        if batch > 1:
            per_image = len(few_k) // batch
            routed = routed + torch.arange(0, len(few_k), per_image, device=x.device)[:, None]
        routed = routed.view(batch * side**2, -1)
        if factor is not None:
            factor = factor.flatten(0, 1).repeat_interleave(pieces.shape[1], dim=1)
        arguments = q.flatten(0, 1), few_k, few_v, routed, factor, bra.num_heads, bra.scale
        # What needs no gradient stays outside of a Function, into which no tracer looks.
        out = _RoutedAttention.apply(*arguments)[0] if torch.is_grad_enabled() else _attend_routed(*arguments)
        out = out.reshape(batch, side, side, tall, wide, dim).transpose(2, 3)
    if bra.lepe is not None:
        with stage("bra.lepe"):
            local = bra.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            # The grid's own layout first: it is the sum's, too. Autograd would copy what is written in place.
            local = local.reshape(out.shape)
            out = local + out if torch.is_grad_enabled() or bra.lepe._forward_hooks else local.add_(out)
    with stage("bra.output"):
        return out.reshape(x.shape), index, strength


def _projected(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b p n e"], Float[Tensor, "b h w e"], Float[Tensor, "b h w c"]]:
    """Queries region by region, keys and values as the grid lies, which LePE reads, too."""
    parts = [bra.qk_dim, bra.qk_dim, bra.dim]
    if not (is_plain(bra.qkv.qkv) and has_no_hooks(bra.qkv)):
        q, k, v = bra.qkv(x).split(parts, dim=-1)
        return regions.to_regions(q, side, side).flatten(2, 3), k, v
    # Three products instead of one, so that each result lies by itself in memory.
    to_q, to_k, to_v = bra.qkv.qkv.weight.split(parts)
    q_bias, k_bias, v_bias = bra.qkv.qkv.bias.split(parts)
    q = project(regions.to_regions(x, side, side).flatten(2, 3), to_q, q_bias)
    # A bias of the keys adds the same to all scores of a query, of regions and of tokens: no softmax sees it,
    # unless keys are multiplied or go through a learned map first.
    seen = bra.soft_routing or bra.diff_routing or bra.kv_down.mode != "identity"
    return q, project(x, to_k, k_bias if seen else None), project(x, to_v, v_bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear map and nothing but its weight and bias: no adapter, no pruning, no hook."""
    return type(module) is nn.Linear and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether nothing wants to be told, or to meddle, when this module runs."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks)


def project(
    tokens: Float[Tensor, "b y x c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b y x d"]:
    """``F.linear``, as fast as it gets on a CPU."""
    if device_type(tokens) != "cpu":
        return F.linear(tokens, weight, bias)
    large = tokens.dtype == torch.float32 and tokens.numel() >= CONVOLVED_FROM
    if large and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        # oneDNN's, which has the bias done within.
        return F.conv2d(tokens.permute(0, 3, 1, 2), weight[..., None, None], bias).permute(0, 2, 3, 1)
    if bias is None:
        return F.linear(tokens, weight)
    # On a CPU PyTorch would write the bias everywhere first, for the product to be added to.
    return F.linear(tokens, weight).add_(bias)


def _pieces(
    bra: "BiLevelRoutingAttention", k: Float[Tensor, "b h w e"], v: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "g s e"], Float[Tensor, "g s c"], Int[Tensor, "p t"]]:
    """Keys and values in the pieces in which they are gathered, and the numbers of a region's t pieces in its image.

    A piece is a row of a region, as it lies in the grid, or all that downsampling leaves of a region.
    """
    height, width = k.shape[1:3]
    if bra.kv_down.mode != "identity":
        both = rearrange(torch.cat([k, v], dim=-1), "b (r y) (c x) d -> (b r c) d y x", r=side, c=side)
        few = rearrange(bra.kv_down(both), "g d y x -> g (y x) d")
        pieces = torch.arange(side**2, device=k.device)[:, None]
        return few[..., : bra.qk_dim].contiguous(), few[..., bra.qk_dim :].contiguous(), pieces
    pieces = torch.arange(height * side, device=k.device).view(side, -1, side).mT.flatten(0, 1)
    few_k, few_v = (t.reshape(-1, width // side, t.shape[3]) for t in (k, v))
    return few_k, few_v, pieces


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"] | None:
    """What gathered keys and values are multiplied by, if anything."""
    if bra.soft_routing:
        return strength
    return 1 + (strength - strength.detach()) if bra.diff_routing else None


def _attend_routed(
    q: Float[Tensor, "r n e"],
    k: Float[Tensor, "g s e"],
    v: Float[Tensor, "g s c"],
    index: Int[Tensor, "r i"],
    factor: Float[Tensor, "r i"] | None,
    heads: int,
    scale: float | int,
    lse: Float[Tensor, "r n m"] | None = None,
) -> Float[Tensor, "r n c"]:
    """Every query region to the pieces it is routed to, times ``factor``; the softmax's log-sum-exp into ``lse``."""
    out = v.new_empty(*q.shape[:2], v.shape[2])
    for part in _chunks(k, v, index):
        near_k, near_v = (_gathered(t, index[part], factor, part) for t in (k, v))
        found, found_lse = _attend(q[part], near_k, near_v, heads, scale)
        if lse is not None:
            lse[part] = found_lse
        if found.shape == out.shape:
            out = found
        else:
            out[part] = found
    return out


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, factor: Tensor | None, heads: int, scale: float | int
    ) -> tuple[Tensor, Tensor]:
        lse = q.new_empty(*q.shape[:2], heads, dtype=torch.promote_types(q.dtype, torch.float32))
        out = _attend_routed(q, k, v, index, factor, heads, scale, lse)
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
                # Under autocast the factor is of another type than keys and values.
                dwhole.index_add_(0, index[part].flatten(), found.to(dwhole.dtype))
        return dq, dk, dv, None, dfactor, None, None


def _chunks(k: Float[Tensor, "g s e"], v: Float[Tensor, "g s c"], index: Int[Tensor, "r i"]) -> Iterator[slice]:
    per_region = index.shape[1] * k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()
    most = max(1, CHUNK_BYTES.get(device_type(k), CHUNK_BYTES_ON_A_GPU) // per_region)
    step = -(-len(index) // -(-len(index) // most))
    starts: Iterable[int] = range(0, len(index), step)
    if only_memory_is_followed():
        starts = sorted({0, step, (len(index) - 1) // step * step} & set(starts))
    return (slice(start, start + step) for start in starts)


def _gathered(
    t: Float[Tensor, "g s d"], index: Int[Tensor, "a i"], factor: Float[Tensor, "r i"] | None, part: slice
) -> Float[Tensor, "a l d"]:
    """Keys or values of the pieces that some query regions are routed to, in routing order."""
    near = t.index_select(0, index.flatten())
    if factor is not None:
        near *= factor[part].flatten()[:, None, None]
    return near.view(len(index), -1, t.shape[2])


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """Whether the CPU's own kernel can be called, which hands out what its backward pass needs."""
    return device_type(q) == "cpu" and q.shape[-1] == v.shape[-1]


def _attend(
    q: Float[Tensor, "a n e"], k: Float[Tensor, "a l e"], v: Float[Tensor, "a l c"], heads: int, scale: float | int
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
