"""BRA without full gathered copies: PyTorch's fused attention on chunks of query regions, on any device.

Keys and values are gathered only for the current chunk, and again in the backward pass, which accumulates their
gradients chunk by chunk: nothing of the size of topk x tokens, tokens x keys or regions x regions x tokens
is materialised.

With ``per_token_routing`` every query token takes the place of a region of queries.

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

from attention_zoo.attentions.bra import coarse_gate
from attention_zoo.core.base import Unsupported
from attention_zoo.core.memory_simulation import device_type, memory_is_simulated
from attention_zoo.core.profiler_ranges import stage
from attention_zoo.ops import regions
from attention_zoo.ops.softmax_attention import merge_heads, split_heads

if TYPE_CHECKING:
    from attention_zoo.attentions.bra import BiLevelRoutingAttention

CHUNK_BYTES = {"cpu": 4 << 20, "meta": 1 << 62}
"""Size of the gathered keys and values of a chunk: small enough for a cache; meta tensors need no memory."""

CHUNK_BYTES_ON_A_GPU = 256 << 20
"""The same on any other device: large enough to keep all its cores busy."""

LARGEST_BATCH = 65_535
"""Most query regions of a chunk: CUDA's fused kernels put them on an axis of their launch grid that holds no more."""

CONVOLVED_FROM = 500_000
"""Input elements from which on a 1 x 1 convolution is faster on a CPU than a product and a bias addition."""

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
        alike = q.flatten(1, 2)[:, :, None] if bra.per_token_routing else q
    with stage("bra.route"):
        k_mean = _pooled(k, tall, wide)
        index, strength = bra.router(alike.mean(dim=2), k_mean)
    with stage("bra.attend"):
        factor = _factor(bra, strength)
        routed = pieces.index_select(0, index.flatten()).view(batch, -1)
        if batch > 1:
            per_image = len(few_k) // batch
            routed = routed + torch.arange(0, len(few_k), per_image, device=x.device)[:, None]
        routed = routed.view(batch * alike.shape[1], -1)
        if factor is not None:
            factor = factor.flatten(0, 1).repeat_interleave(pieces.shape[1], dim=1)
        arguments = alike.flatten(0, 1), few_k, few_v, routed, factor, bra.num_heads, bra.scale
        # Without gradients the Function is bypassed, since tracers cannot see into it.
        out = _RoutedAttention.apply(*arguments)[0] if torch.is_grad_enabled() else _attend_routed(*arguments)
        out = out.reshape(batch, side, side, tall, wide, dim).transpose(2, 3)
    if bra.lepe is not None:
        with stage("bra.lepe"):
            local = bra.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            # The sum takes the layout of its first term, that of the grid. Under autograd an in-place sum would copy.
            local = local.reshape(out.shape)
            out = local + out if torch.is_grad_enabled() or bra.lepe._forward_hooks else local.add_(out)
    if bra.coarse_gate is not None:
        with stage("bra.coarse"):
            means = q.mean(dim=2), k_mean, _pooled(v, tall, wide)
            out = coarse_gate.add(bra, out.reshape(x.shape), x, side, *means)
    with stage("bra.output"):
        return out.reshape(x.shape), index, strength


def _projected(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b p n e"], Float[Tensor, "b h w e"], Float[Tensor, "b h w c"]]:
    """Queries in region order; keys and values in grid order, which LePE also reads."""
    parts = [bra.qk_dim, bra.qk_dim, bra.dim]
    if not (is_plain(bra.qkv.qkv) and has_no_hooks(bra.qkv)):
        q, k, v = bra.qkv(x).split(parts, dim=-1)
        return regions.to_regions(q, side, side).flatten(2, 3), k, v
    # Three products instead of one, so that each result is contiguous in memory.
    to_q, to_k, to_v = bra.qkv.qkv.weight.split(parts)
    q_bias, k_bias, v_bias = bra.qkv.qkv.bias.split(parts)
    q = project(regions.to_regions(x, side, side).flatten(2, 3), to_q, q_bias)
    # A key bias adds a constant to all region and token scores of a query, which cancels in the softmax, unless
    # keys are first scaled or passed through a learned map.
    seen = bra.soft_routing or bra.diff_routing or bra.kv_down.mode != "identity"
    return q, project(x, to_k, k_bias if seen else None), project(x, to_v, v_bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is an unmodified nn.Linear: no adapter, no pruning, no hook."""
    return type(module) is nn.Linear and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether the module has no forward or backward hooks."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks)


def project(
    tokens: Float[Tensor, "b y x c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b y x d"]:
    """``F.linear``, optimised for CPUs."""
    if device_type(tokens) != "cpu":
        return F.linear(tokens, weight, bias)
    large = tokens.dtype == torch.float32 and tokens.numel() >= CONVOLVED_FROM
    if large and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        # oneDNN's convolution, which fuses the bias.
        return F.conv2d(tokens.permute(0, 3, 1, 2), weight[..., None, None], bias).permute(0, 2, 3, 1)
    if bias is None:
        return F.linear(tokens, weight)
    # On a CPU, F.linear with a bias would first fill the output with it and then add the product.
    return F.linear(tokens, weight).add_(bias)


def _pieces(
    bra: "BiLevelRoutingAttention", k: Float[Tensor, "b h w e"], v: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "g s e"], Float[Tensor, "g s c"], Int[Tensor, "p t"]]:
    """Keys and values split into the pieces that are gathered, and the indices of a region's t pieces in its image.

    A piece is a row of a region, contiguous in the grid, or a whole downsampled region.
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


def _pooled(x: Float[Tensor, "b h w d"], tall: int, wide: int) -> Float[Tensor, "b p d"]:
    """The means of regions of ``tall x wide`` tokens."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), (tall, wide)).permute(0, 2, 3, 1).flatten(1, 2)


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"] | None:
    """The factor of gathered keys and values, or None."""
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
    """Attention of each query region to its routed pieces times ``factor``; writes the log-sum-exp into ``lse``."""
    out = v.new_empty(*q.shape[:2], v.shape[2])
    for part in _chunks(k, v, index):
        near_k, near_v = (_gathered(t, index[part], factor, part) for t in (k, v))
        result, found_lse = _attend(q[part], near_k, near_v, heads, scale)
        if lse is not None:
            lse[part] = found_lse
        if result.shape == out.shape:
            out = result
        else:
            out[part] = result
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
            for whole, dwhole, result in ((k, dk, dnear_k), (v, dv, dnear_v)):
                result = result.reshape(-1, *whole.shape[1:])
                if dfactor is not None:
                    dfactor[part] += (result * whole[index[part].flatten()]).sum(dim=(1, 2)).view_as(dfactor[part])
                    result = result * factor[part].flatten()[:, None, None]
                # Under autocast the factor is of another type than keys and values.
                dwhole.index_add_(0, index[part].flatten(), result.to(dwhole.dtype))
        return dq, dk, dv, None, dfactor, None, None


def _chunks(k: Float[Tensor, "g s e"], v: Float[Tensor, "g s c"], index: Int[Tensor, "r i"]) -> Iterator[slice]:
    per_region = index.shape[1] * k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()
    most = max(1, CHUNK_BYTES.get(device_type(k), CHUNK_BYTES_ON_A_GPU) // per_region)
    if device_type(k) == "cuda":
        most = min(most, LARGEST_BATCH)
    step = -(-len(index) // -(-len(index) // most))
    starts: Iterable[int] = range(0, len(index), step)
    if memory_is_simulated():
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
    """Whether the CPU's own kernel can be called, which returns what its backward pass needs."""
    return device_type(q) == "cpu" and q.shape[-1] == v.shape[-1]


def _attend(
    q: Float[Tensor, "a n e"], k: Float[Tensor, "a l e"], v: Float[Tensor, "a l c"], heads: int, scale: float | int
) -> tuple[Float[Tensor, "a n c"], Float[Tensor, "..."]]:
    """The output, and the log-sum-exp of the scores (a n m) where the kernel returns it."""
    fused = _is_fused(q, v)
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    if fused:
        out, lse = _flash(q, k, v, scale=scale)
        return merge_heads(out), lse.transpose(1, 2)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=scale)), q.new_zeros(())


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float | int
) -> list[Tensor]:
    """The gradients of q, k and v in :func:`_attend`."""
    if _is_fused(q, v):
        by_head = (split_heads(t, heads) for t in (grad, q, k, v, out))
        return [merge_heads(t) for t in _flash_backward(*by_head, lse.transpose(1, 2), 0.0, False, scale=scale)]
    # Not autograd.grad: a compiler cannot trace a tensor that starts to require a gradient within the step.
    gradients: Any = torch.func.vjp(lambda q, k, v: _attend(q, k, v, heads, scale)[0], q, k, v)[1]
    return list(gradients(grad))
