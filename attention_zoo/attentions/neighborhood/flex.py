"""Neighborhood attention with PyTorch's FlexAttention, which computes only score blocks that contain a key.

A block is a rectangle of TILE tokens, since a neighborhood overlaps fewer rectangles than rows of the grid.
Shape legend: b batch, h w grid, p tiles (row-major), m heads, n tokens (tile by tile), e channels of a head.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attention_zoo.ops import flex_backend, regions

TILE = (8, 16)
BLOCK = TILE[0] * TILE[1]


def unsupported(x: Tensor, head_dim: int) -> str | None:
    """Why FlexAttention cannot run forward and backward on ``x``; None if it can."""
    return flex_backend.unsupported(x, head_dim, gradients=True)


def attend(
    qkv: Float[Tensor, "b h w threec"], heads: int, kernel: int, scale: float, table: Float[Tensor, "m y x"] | None
) -> Float[Tensor, "b h w c"]:
    """Attention of each token to its kernel x kernel neighborhood.

    Args:
        qkv: queries, keys and values.
        heads: number of heads.
        kernel: tokens per side of a neighborhood.
        scale: factor of the scores.
        table: the relative position bias by displacement, from -(kernel - 1) on; None: no bias.
    """
    height, width = qkv.shape[1:3]
    padded = regions.pad_to_multiple(qkv, *TILE)
    rows, cols = padded.shape[1] // TILE[0], padded.shape[2] // TILE[1]
    tiles = regions.to_regions(padded, rows, cols)
    q, k, v = rearrange(tiles, "b p y x (t m e) -> t b m (p y x) e", t=3, m=heads)
    mask = block_mask(height, width, kernel, qkv.device)
    out = flex_backend.compiled()(q, k, v, _biased(table, kernel, cols), mask, scale)
    out = rearrange(out, "b m (p y x) e -> b p y x (m e)", y=TILE[0], x=TILE[1])
    return regions.crop(regions.from_regions(out, rows, cols), height, width)


def block_mask(height: int, width: int, kernel: int, device: torch.device) -> BlockMask:
    """The block mask: pairs of tiles with query-key pairs, and the token mask within them."""
    near_rows = _tiles_that_meet(height, kernel, TILE[0], device)
    near_cols = _tiles_that_meet(width, kernel, TILE[1], device)
    meet = rearrange(near_rows[:, None, :, None] & near_cols[None, :, None, :], "r c y x -> (r c) (y x)")
    order = meet.int().argsort(dim=1, descending=True, stable=True).int()
    cols = len(near_cols)

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (qy, qx), (ky, kx) = _place(query, cols), _place(key, cols)
        return _near(qy, ky, height, kernel) & _near(qx, kx, width, kernel)

    return BlockMask.from_kv_blocks(
        meet.sum(1, dtype=torch.int32)[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=allowed
    )


def _tiles_that_meet(length: int, kernel: int, tile: int, device: torch.device) -> Bool[Tensor, "p p"]:
    """Along one axis: whether a query of the first tile has a key in the second."""
    size = min(kernel, length)
    first = torch.arange(0, length, tile, device=device)
    last = (first + tile - 1).clamp_max(length - 1)
    from_tile = (first - size // 2).clamp(0, length - size) // tile
    to_tile = ((last - size // 2).clamp(0, length - size) + size - 1) // tile
    other = torch.arange(len(first), device=device)
    return (from_tile[:, None] <= other) & (other <= to_tile[:, None])


def _near(query: Tensor, key: Tensor, length: int, kernel: int) -> Tensor:
    size = min(kernel, length)
    start = (query - size // 2).clamp(0, length - size)
    return (key >= start) & (key < start + size)


def _place(token: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Row and column of a token index in tile-by-tile order."""
    tile, within = token // BLOCK, token % BLOCK
    return tile // cols * TILE[0] + within // TILE[1], tile % cols * TILE[1] + within % TILE[1]


def _biased(table: Tensor | None, kernel: int, cols: int) -> Callable[..., Tensor] | None:
    if table is None:
        return None

    def biased(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (qy, qx), (ky, kx) = _place(query, cols), _place(key, cols)
        # Scores are biased before they are masked, so the displacement of a masked score may be outside the table.
        dy, dx = (d.clamp(1 - kernel, kernel - 1) + kernel - 1 for d in (ky - qy, kx - qx))
        return score + table[head, dy, dx]

    return biased
