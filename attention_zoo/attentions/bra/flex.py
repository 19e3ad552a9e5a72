"""BRA with PyTorch's FlexAttention: a region is a block, and the routes are the list of blocks to visit.

Tokens are laid out region by region, so that every visited block is dense. The block mask is built from the routes in
every step.

Shape legend: b batch, h w grid, p regions (row-major), k routed regions, n tokens of a region, s tokens of a region
after kv downsampling, m heads, c dim, e qk_dim.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attention_zoo.attentions.bra import coarse_gate
from attention_zoo.ops import flex_backend, regions

if TYPE_CHECKING:
    from attention_zoo.attentions.bra import BiLevelRoutingAttention

REGION_SIDE = 8
"""Tokens per side of a region that all of FlexAttention's CUDA kernels support."""
SMALLEST_TILE, LARGEST_TILE = 16, 128
"""Tokens per side of the tiles of FlexAttention's CUDA kernels; a block is a whole number of tiles."""


def unsupported(bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"]) -> str | None:
    """Why FlexAttention cannot run ``bra`` on ``x``; None if it can."""
    if bra.per_token_routing:
        return (
            "a block of FlexAttention's mask is a region of queries, which per_token_routing=True routes apart; "
            "valid with it: reference, sdpa"
        )
    if bra.soft_routing or bra.diff_routing:
        return "FlexAttention weighs no values by their region, which soft_routing and diff_routing ask for"
    if x.is_meta:
        return None
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *bra.parameters()))
    head_dim = min(bra.qk_dim, bra.dim) // bra.num_heads
    if reason := flex_backend.unsupported(x, head_dim, gradients):
        return reason
    tile = _tile_asked_for(x, head_dim, gradients) if x.is_cuda else 1
    side = bra.regions_per_side(*x.shape[1:3])
    region = -(-x.shape[1] // side), -(-x.shape[2] // side)
    for tokens, what in ((region, "regions"), (bra.kv_down.out_size(*region), "keys and values of a region")):
        if tokens[0] * tokens[1] % tile:
            return f"FlexAttention needs a multiple of {tile} tokens here, and {what} are {tokens[0]} x {tokens[1]}"
    return None


def _tile_asked_for(x: Tensor, head_dim: int, gradients: bool) -> int:
    """The required divisor of a block's tokens on CUDA: forward tiles can be chosen, backward tiles cannot."""
    half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    if not (gradients and half):
        return SMALLEST_TILE
    return 64 if head_dim < 64 and torch.cuda.get_device_capability(x.device) == (9, 0) else LARGEST_TILE


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; ``side`` regions per side divide the grid."""
    batch, e = x.shape[0], bra.qk_dim
    q, kv = bra.qkv(regions.to_regions(x, side, side)).split([e, e + bra.dim], dim=-1)
    index, strength = bra.router(q.mean(dim=(2, 3)), kv[..., :e].mean(dim=(2, 3)))
    small = bra.kv_down(rearrange(kv, "b p y x d -> (b p) d y x"))
    k, v = small.split([e, bra.dim], dim=1)
    k, v = (rearrange(t, "(b p) (m d) y x -> b m (p y x) d", b=batch, m=bra.num_heads) for t in (k, v))
    blocks = q.shape[2] * q.shape[3], small.shape[2] * small.shape[3]
    out = flex_backend.compiled()(
        rearrange(q, "b p y x (m e) -> b m (p y x) e", m=bra.num_heads), k, v,
        block_mask=block_mask(index, *blocks), scale=bra.scale, kernel_options=_tiles(*blocks) if x.is_cuda else None,
    )  # fmt: skip
    out = rearrange(out, "b m (p y x) c -> b p y x (m c)", p=side**2, y=q.shape[2])
    out = regions.from_regions(out, side, side)
    if bra.lepe is not None:
        grid = rearrange(regions.from_regions(kv[..., e:], side, side), "b h w c -> b c h w")
        out = out + rearrange(bra.lepe(grid), "b c h w -> b h w c")
    if bra.coarse_gate is not None:
        means = q.mean(dim=(2, 3)), *kv.mean(dim=(2, 3)).split([e, bra.dim], dim=-1)
        out = coarse_gate.add(bra, out, x, side, *means)
    return out, index, strength


def block_mask(index: Int[Tensor, "b p k"], queries: int, keys: int) -> BlockMask:
    """The routes as a block mask: block (i, j) holds the ``queries`` of region i and the ``keys`` of region j."""
    batch, count, topk = index.shape
    chosen = F.pad(index.int(), (0, count - topk))[:, None]
    visited = torch.full_like(chosen[..., 0], topk)
    # Only uncompiled FlexAttention evaluates this mask, on every query-key pair: visited blocks are dense.
    routed = torch.zeros(batch, count, count, dtype=torch.bool, device=index.device).scatter_(2, index, True)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(visited), torch.zeros_like(chosen), visited, chosen, (queries, keys),
        lambda image, head, query, key: routed[image, query // queries, key // keys],
    )  # fmt: skip


def _tiles(*blocks: int) -> dict[str, int]:
    """The forward kernel's tiles, set where its default, at most LARGEST_TILE, may not divide the blocks."""
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N")
    return {name: min(block & -block, 64) for name, block in zip(names, blocks, strict=True) if block % LARGEST_TILE}
