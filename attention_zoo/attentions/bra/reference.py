"""BRA as published, in cost as well as in result: gather, full score matrix, softmax.

It copies keys and values topk times, and autograd scatters their gradients through regions x regions x tokens.
Do not make it faster: it is the baseline of every stated speed-up.

Shape legend: b batch, h w padded grid, p regions, q query tokens, k routed regions, y x tokens of a region per side,
s tokens of a region after kv downsampling, m heads, c dim, e qk_dim.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attention_zoo.core.profiler_ranges import stage
from attention_zoo.ops import regions

if TYPE_CHECKING:
    from attention_zoo.attentions.bra import BiLevelRoutingAttention


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int, valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes: (b, q, k) in region order with ``per_token_routing``.

    Args:
        bra: the module, for its weights and options.
        x: a grid that ``side`` divides.
        side: regions per side.
        valid: True where the grid holds a real token; None: attend to everything, including padding.
    """
    with stage("bra.project"):
        q, kv = bra.qkv(regions.to_regions(x, side, side)).split([bra.qk_dim, bra.qk_dim + bra.dim], dim=-1)
        valid_pyx = None if valid is None else regions.to_regions(valid[None, :, :, None], side, side)[0, ..., 0]
        kv_bpsd, valid_bps = _downsample(bra, kv, valid_pyx)
        # With per_token_routing every query token is routed like a region of its own.
        alike = rearrange(q, "b p y x e -> b (p y x) 1 1 e") if bra.per_token_routing else q
    with stage("bra.route"):
        index, weight = bra.router(
            _descriptor(alike, None if bra.per_token_routing else valid_pyx),
            _descriptor(kv[..., : bra.qk_dim], valid_pyx),
            # Computed after the reduction: a single fracpool cell may miss the real tokens of a region.
            None if valid_bps is None else ~valid_bps.any(-1),
        )
    lepe = _lepe(bra, kv[..., bra.qk_dim :], side, valid)
    with stage("bra.attend"):
        gather = _gather_for_tokens if bra.per_token_routing else _gather
        routed = gather(kv_bpsd, index)
        if bra.soft_routing:
            routed = weight[..., None, None] * routed
        elif bra.diff_routing:
            # Adds exactly zero: the values do not change, and the weight gets its gradient.
            routed = routed * (1 + (weight - weight.detach()))[..., None, None]
        queries = rearrange(alike, "b p y x e -> b p (y x) e")
        mask = None if valid_bps is None else rearrange(gather(valid_bps[..., None], index), "b p k s 1 -> b p (k s)")
        out = _attend(bra, queries, routed, mask)
        out = regions.from_regions(out.view(*q.shape[:-1], bra.dim), side, side)
    if lepe is not None:
        with stage("bra.lepe"):
            out = out + lepe
    if bra.coarse_gate is not None:
        with stage("bra.coarse"):
            coarse = _attend_regions(bra, q, kv, valid_pyx)[:, :, None, None].expand(*q.shape[:-1], bra.dim)
            out = out + bra.coarse_gate(x) * regions.from_regions(coarse, side, side)
    return out, index, weight


def _descriptor(x: Float[Tensor, "b p y x e"], valid: Bool[Tensor, "p y x"] | None) -> Float[Tensor, "b p e"]:
    """The mean over a region's tokens."""
    if valid is None:
        return x.mean(dim=(2, 3))
    count = valid.sum(dim=(1, 2)).clamp_min(1)
    return x.masked_fill(~valid[None, ..., None], 0.0).sum(dim=(2, 3)) / count[None, :, None]


def _downsample(
    bra: "BiLevelRoutingAttention", kv: Float[Tensor, "b p y x d"], valid: Bool[Tensor, "p y x"] | None
) -> tuple[Float[Tensor, "b p s d"], Bool[Tensor, "b p s"] | None]:
    batch = kv.shape[0]
    flat = rearrange(kv, "b p y x d -> (b p) d y x")
    if valid is None:
        return rearrange(bra.kv_down(flat), "(b p) d y x -> b p (y x) d", b=batch), None
    reduced, seen = bra.kv_down.masked(flat, valid.repeat(batch, 1, 1)[:, None])
    tokens = rearrange(reduced, "(b p) d y x -> b p (y x) d", b=batch)
    return tokens, rearrange(seen, "(b p) 1 y x -> b p (y x)", b=batch)


def _gather(kv: Shaped[Tensor, "b p s d"], index: Int[Tensor, "b p k"]) -> Shaped[Tensor, "b p k s d"]:
    """For each query region, the tokens of its routed regions, in routing order."""
    batch, count, tokens, channels = kv.shape
    everywhere = kv[:, None].expand(batch, count, count, tokens, channels)
    return torch.gather(everywhere, 2, index[..., None, None].expand(-1, -1, -1, tokens, channels))


def _gather_for_tokens(kv: Shaped[Tensor, "b p s d"], index: Int[Tensor, "b q k"]) -> Shaped[Tensor, "b q k s d"]:
    """For each query token, the tokens of its routed regions.

    Its backward pass adds up in place; that of :func:`_gather` would scatter through tokens x regions x tokens.
    """
    batch, count = kv.shape[:2]
    place = index + count * torch.arange(batch, device=index.device)[:, None, None]
    return kv.flatten(0, 1).index_select(0, place.flatten()).view(*index.shape, *kv.shape[2:])


def _attend_regions(
    bra: "BiLevelRoutingAttention",
    q: Float[Tensor, "b p y x e"],
    kv: Float[Tensor, "b p y x d"],
    valid: Bool[Tensor, "p y x"] | None,
) -> Float[Tensor, "b p c"]:
    """Multi-head attention among the means of the regions; regions without real tokens are no keys."""
    q_mean, kv_mean = _descriptor(q, valid), _descriptor(kv, valid)
    inhabited = None if valid is None else valid.flatten(1).any(-1).expand(len(q), 1, -1)
    return _attend(bra, q_mean[:, None], kv_mean[:, None, None], inhabited)[:, 0]


def _attend(
    bra: "BiLevelRoutingAttention",
    q: Float[Tensor, "b p n e"],
    routed: Float[Tensor, "b p k s d"],
    mask: Bool[Tensor, "b p ks"] | None,
) -> Float[Tensor, "b p n c"]:
    batch, heads = q.shape[0], bra.num_heads
    k, v = routed.split([bra.qk_dim, bra.dim], dim=-1)
    k = rearrange(k, "b p k s (m e) -> (b p) m e (k s)", m=heads)
    v = rearrange(v, "b p k s (m c) -> (b p) m (k s) c", m=heads)
    q = rearrange(q, "b p n (m e) -> (b p) m n e", m=heads)
    scores = (q * bra.scale) @ k
    if mask is not None:
        scores = scores.masked_fill(~rearrange(mask, "b p t -> (b p) 1 1 t"), float("-inf"))
    scores = torch.softmax(scores, dim=-1)  # Reuses the name, so that scores are freed as in the published code.
    out = scores @ v
    return rearrange(out, "(b p) m n c -> b p n (m c)", b=batch)


def _lepe(
    bra: "BiLevelRoutingAttention", v: Float[Tensor, "b p y x c"], side: int, valid: Bool[Tensor, "h w"] | None
) -> Float[Tensor, "b h w c"] | None:
    if bra.lepe is None:
        return None
    with stage("bra.lepe"):
        grid = rearrange(v, "b (r q) y x c -> b c (r y) (q x)", r=side, q=side).contiguous()
        if valid is not None:
            grid = grid.masked_fill(~valid, 0.0)
        return rearrange(bra.lepe(grid), "b c h w -> b h w c")
