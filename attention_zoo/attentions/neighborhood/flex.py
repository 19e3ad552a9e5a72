"""Neighborhood attention with PyTorch's FlexAttention, which computes only score blocks that contain a key.

A block is a rectangle of TILE tokens, since a neighborhood overlaps fewer rectangles than rows of the grid. With a
dilation, rows and columns are first sorted so that the tokens of a neighborhood are adjacent. Functions that the
compiler traces are marked no_type_check: it cannot trace the checks that tests add.

Shape legend: b batch, h w grid, p tiles (row-major), m heads, n tokens (tile by tile), e channels of a head.
"""

from collections.abc import Callable
from typing import no_type_check

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attention_zoo.attentions.neighborhood.axis import Axis
from attention_zoo.ops import flex_backend, regions

TILE = (8, 16)
BLOCK = TILE[0] * TILE[1]


def attend(
    qkv: Float[Tensor, "b h w threec"],
    heads: int,
    axes: tuple[Axis, Axis],
    scale: float | int,
    table: Float[Tensor, "m y x"] | None,
) -> Float[Tensor, "b h w c"]:
    """Attention of each token to its neighborhood.

    Args:
        qkv: queries, keys and values.
        heads: number of heads.
        axes: rows and columns.
        scale: factor of the scores.
        table: the relative position bias by displacement, from -(kernel - 1) on; None: no bias.
    """
    height, width = qkv.shape[1:3]
    padded = regions.pad_to_multiple(_by_group(qkv, axes), *TILE)
    rows, cols = padded.shape[1] // TILE[0], padded.shape[2] // TILE[1]
    tiles = regions.to_regions(padded, rows, cols)
    q, k, v = rearrange(tiles, "b p y x (t m e) -> t b m (p y x) e", t=3, m=heads)
    mask = block_mask(axes, qkv.device)
    out = flex_backend.compiled()(q, k, v, _biased(table, axes[0].kernel, cols), mask, scale)
    out = rearrange(out, "b m (p y x) e -> b p y x (m e)", y=TILE[0], x=TILE[1])
    return _by_group(regions.crop(regions.from_regions(out, rows, cols), height, width), axes, undo=True)


def _by_group(x: Float[Tensor, "b h w d"], axes: tuple[Axis, Axis], undo: bool = False) -> Float[Tensor, "b h w d"]:
    """Sort rows and columns by their position modulo the dilation, so that a window is adjacent tokens."""
    for dim, axis in enumerate(axes, start=1):
        if axis.dilation > 1:
            position = torch.arange(axis.length, device=x.device)
            order = torch.cat([position[group :: axis.dilation] for group in range(axis.dilation)])
            x = x.index_select(dim, order.argsort() if undo else order)
    return x


def block_mask(axes: tuple[Axis, Axis], device: torch.device) -> BlockMask:
    """The block mask: pairs of tiles with query-key pairs, and the token mask within them."""
    near_rows, near_cols = (_tiles_that_meet(axis, tile, device) for axis, tile in zip(axes, TILE, strict=True))
    meet = rearrange(near_rows[:, None, :, None] & near_cols[None, :, None, :], "r c y x -> (r c) (y x)")
    order = meet.int().argsort(dim=1, descending=True, stable=True).int()
    cols = len(near_cols)

    @no_type_check
    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (qy, qx), (ky, kx) = _place(query, cols), _place(key, cols)
        return _near(qy, ky, axes[0]) & _near(qx, kx, axes[1])

    return BlockMask.from_kv_blocks(
        meet.sum(1, dtype=torch.int32)[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=allowed
    )


def _tiles_that_meet(axis: Axis, tile: int, device: torch.device) -> Bool[Tensor, "p p"]:
    """Along one axis: whether a query of the first tile has a key in the second."""
    first = torch.arange(0, axis.length, tile, device=device)
    # The windows of adjacent queries overlap or adjoin, across groups too, so the two ends bound them all.
    from_tile = _window(first, axis)[0] // tile
    start, keys = _window((first + tile - 1).clamp_max(axis.length - 1), axis)
    to_tile = (start + keys - 1) // tile
    other = torch.arange(len(first), device=device)
    return (from_tile[:, None] <= other) & (other <= to_tile[:, None])


@no_type_check
def _near(query: Tensor, key: Tensor, axis: Axis) -> Tensor:
    # Queries of the padding have the keys of the last token: a softmax over no keys would be NaN.
    start, keys = _window(query.clamp_max(axis.length - 1), axis)
    return (key >= start) & (key < start + keys)


@no_type_check
def _window(query: Tensor, axis: Axis) -> tuple[Tensor, Tensor | int]:
    """The first key of each query and the number of its keys, by positions in the order of :func:`_by_group`."""
    # Of ``dilation`` groups the first ``longer`` have ``size + 1`` tokens, the others ``size``.
    size, longer = divmod(axis.length, axis.dilation)
    if axis.dilation == 1:
        start, keys = _start(query, size, axis), min(axis.kernel, size)
        return start, keys
    in_longer = query < longer * (size + 1)
    place = torch.where(in_longer, query % (size + 1), (query - longer * (size + 1)) % max(size, 1))
    tokens = torch.where(in_longer, size + 1, size)
    return query - place + _start(place, tokens, axis), tokens.clamp_max(axis.kernel)


@no_type_check
def _start(place: Tensor, tokens: Tensor | int, axis: Axis) -> Tensor:
    """The place of the first key in a group of ``tokens`` tokens, for the query at ``place``."""
    last = torch.zeros_like(place) + (tokens - 1)
    leader = torch.minimum(place // axis.stride * axis.stride + axis.stride // 2, last)
    return torch.minimum(leader - axis.kernel // 2, last + 1 - axis.kernel).clamp_min(0)


@no_type_check
def _place(token: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Row and column of a token index in tile-by-tile order."""
    tile, within = token // BLOCK, token % BLOCK
    return tile // cols * TILE[0] + within // TILE[1], tile % cols * TILE[1] + within % TILE[1]


def _biased(table: Tensor | None, kernel: int, cols: int) -> Callable[..., Tensor] | None:
    if table is None:
        return None

    @no_type_check
    def biased(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (qy, qx), (ky, kx) = _place(query, cols), _place(key, cols)
        # Scores are biased before they are masked, so the displacement of a masked score may be outside the table.
        dy, dx = (d.clamp(1 - kernel, kernel - 1) + kernel - 1 for d in (ky - qy, kx - qx))
        return score + table[head, dy, dx]

    return biased
