"""BRA's Triton kernels as PyTorch operators: routes, attention with LePE, its gradients, and a bias gradient.

As operators they work under torch.compile, in FLOP counters and on meta tensors, where Triton is not needed.
Everything a kernel writes is an output of its operator, so memory predictions include it. They are registered without
``custom_op``: its checks take longer on the host than a small grid takes on the device.

Shape legend: b batch, h w grid of queries, y x grid of keys, p regions (S x S), k routed regions, n tokens of a grid,
m heads, e qk_dim, c dim, d any channels, f taps of LePE, j slots (parts of the gradient of regions of many visits).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_zoo.attentions.bra.triton_tiles import Tile, chunk_of, power_of_two, slots_of, tile_of
from attention_zoo.core.base import Unsupported

LOG2_E = 1.4426950408889634
ROWS = 64
"""Tokens per tile of the kernels that process a grid token by token."""
BUSY = 264
"""Number of programs that keep a GPU busy. With more tiles, each program takes several."""
MOST_PARTS = 1024
"""Most programs that each write a partial sum. With more tiles, each program takes several."""
ONE_PASS = 4096
"""Most rows summed in one launch. More are first summed in parts, by as many programs as keep a GPU busy."""


class Shapes(NamedTuple):
    """Shapes of an attention: grids of queries and of keys and values; channels of queries and of values."""

    batch: int
    grid: tuple[int, int]
    kv_grid: tuple[int, int]
    e: int
    c: int

    @staticmethod
    def of(tokens: Tensor, small: Tensor | None, qk_dim: int) -> "Shapes":
        """From ``tokens`` (b, h, w, 2e + c), or from ``tokens`` (b, h, w, e) and ``small`` (b, y, x, e + c)."""
        batch, height, width, channels = tokens.shape
        if small is None:
            return Shapes(batch, (height, width), (height, width), qk_dim, channels - 2 * qk_dim)
        _, tall, wide, channels = small.shape
        return Shapes(batch, (height, width), (tall, wide), qk_dim, channels - qk_dim)

    def tile(self, kernel: str, dtype: torch.dtype, heads: int, side: int, topk: int, factor: bool, long: bool) -> Tile:
        """Tile sizes of a kernel."""
        return tile_of(kernel, dtype, *self[1:], heads, side, topk, factor, long)

    def slices(self, tokens: Tensor, small: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (n, d) each: views, if the memory layout of the grids permits."""
        flat = _flat(tokens)
        if small is None:
            return torch.split_with_sizes(flat, [self.e, self.e, self.c], 1)  # type: ignore[return-value]
        return flat, *torch.split_with_sizes(_flat(small), [self.e, self.c], 1)  # type: ignore[return-value]

    def long(self, q: Tensor, k: Tensor) -> bool:
        """Whether offsets within an image take 64 bits; offsets of images always do."""
        (h, w), (y, x) = self.grid, self.kv_grid
        return h * w * q.stride(0) >= 2**31 or y * x * k.stride(0) >= 2**31


_LIBRARY = torch.library.Library("attention_zoo", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operator on every device, and ``fake`` for shapes alone."""

    def register(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attention_zoo::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.attention_zoo, name).default

    return register


def _routed(tokens: Tensor, qk_dim: int, side: int, topk: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(tokens), side**2
    fp32 = torch.float32
    return (
        tokens.new_empty(*shape, topk, dtype=torch.int64),
        tokens.new_empty(*shape, topk, dtype=fp32),
        tokens.new_empty(*shape, 2 * qk_dim, dtype=fp32),
    )


@_operator("bra_route(Tensor tokens, int qk_dim, int side, int topk, float scale) -> (Tensor, Tensor, Tensor)", _routed)
def bra_route(tokens: Tensor, qk_dim: int, side: int, topk: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Routed regions of a projection (b, h, w, 2e or more channels: queries, then keys). No gradient.

    Returns:
        The regions (b, p, k), best first; the softmax of their scores; the region means, (b, p, 2e) in fp32.
    """
    from attention_zoo.attentions.bra.triton_kernels import choose_routes, pool_regions

    index, strength, pooled = result = _routed(tokens, qk_dim, side, topk, scale)
    flat, height, width = _flat(tokens), tokens.shape[1] // side, tokens.shape[2] // side
    regions = side**2
    held, rows = min(128, power_of_two(height * width)), power_of_two(regions)
    block = min(power_of_two(2 * qk_dim), max(64, 4096 // held))
    # A program reads rows x columns numbers at a time: as many as its registers hold.
    columns = max(8, min(64, 8192 // rows))
    with torch.cuda.device_of(tokens):
        pool_regions[regions, -(-2 * qk_dim // block), len(tokens)](
            flat, pooled, flat.stride(0), 2 * qk_dim, side, height, width, held, block
        )
        # With few scores, one warp finds the maximum without waiting for others.
        choose_routes[regions, len(tokens)](
            pooled, index, strength, qk_dim, scale, regions, topk, rows, power_of_two(topk), columns,
            num_warps=1 if rows <= 128 else 4,
        )  # fmt: skip
    return result


def _attended(
    tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
    taps: Tensor | None, bias: Tensor | None, qk_dim: int, heads: int, side: int, scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, grid, _, _, dim = Shapes.of(tokens, small, qk_dim)
    out = tokens.new_empty(batch, *grid, dim)
    total = torch.empty_like(out) if taps is not None and keep else out.new_empty(0)
    return out, total, tokens.new_empty(heads, batch, *grid, dtype=torch.float32)


_OPTIONS = "Tensor? factor, Tensor? valid, Tensor? taps, Tensor? bias, "
_PLACE = "int qk_dim, int heads, int side, float scale"


@_operator(
    f"bra_attend(Tensor tokens, Tensor? small, Tensor index, {_OPTIONS}{_PLACE}, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _attended,
)
def bra_attend(
    tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
    taps: Tensor | None, bias: Tensor | None, qk_dim: int, heads: int, side: int, scale: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of each region's queries to the tokens of its routed regions, plus LePE.

    Args:
        tokens: (b, h, w, 2e + c), queries, keys and values; or (b, h, w, e), queries alone.
        small: keys and values, (b, y, x, e + c), if they are not in ``tokens``; S divides y and x.
        index: (b, p, k), the routed regions.
        factor: (b, p, k) in fp32, the factors of the routed keys and values.
        valid: (y, x), False for masked keys.
        taps, bias: of LePE, (f f, c) and (c), or none; then keys and values are in ``tokens``.
        qk_dim, heads, side, scale: e, m, S, the positive factor of the scores.
        keep: whether the output without LePE is needed later.

    Returns:
        The output (b, h, w, c), with LePE unless ``keep``; with ``keep`` and LePE their sum, else an empty tensor; the
        base-2 log-sum-exp of the scores, (m, b, h, w) in fp32.
    """
    from attention_zoo.attentions.bra.triton_kernels import attend_forward

    out, total, lse = _attended(
        tokens, small, index, factor, valid, taps, bias, qk_dim, heads, side, scale, keep
    )  # fmt: skip
    shapes, topk = Shapes.of(tokens, small, qk_dim), index.shape[2]
    q, k, v = shapes.slices(tokens, small)
    tile = shapes.tile("forward", tokens.dtype, heads, side, topk, factor is not None, shapes.long(q, k))
    with torch.cuda.device_of(tokens):
        attend_forward[tile.query_programs(shapes.batch),](
            q, k, v, *_dense(index, factor, valid), out, lse, *_pitches(q, k, v), topk, q.shape[0], scale * LOG2_E,
            *tile.constants, **tile.options,
        )  # fmt: skip
        if taps is not None:
            _add_depthwise(v, taps, bias, _flat(out), _flat(total if keep else out), shapes.kv_grid)
    return out, total, lse


def _differentiated(
    tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
    taps: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor, qk_dim: int, heads: int,
    side: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    shapes = Shapes.of(tokens, small, qk_dim)
    batch, regions, topk = index.shape
    slots, fp32 = slots_of(regions, topk, math.prod(shapes.grid) // regions), torch.float32
    tile = shapes.tile("queries", tokens.dtype, heads, side, topk, factor is not None, False)
    keys = math.prod(shapes.kv_grid) // regions
    sums = 0 if taps is None else (len(taps) + 1) * taps.shape[1]
    return [
        tokens.new_empty(tokens.shape),
        tokens.new_empty(0 if small is None else small.shape),
        lse.new_empty(lse.shape),
        lse.new_empty(0 if factor is None else (*index.shape, tile.parts())),
        lse.new_empty(batch, slots, keys, shapes.e + shapes.c, dtype=fp32),
        lse.new_empty(_finishing(grad[..., 0].numel(), grad.dtype)[1] if sums else 0, sums),
        (lse if taps is None else taps).new_empty(sums),
        index.new_empty(batch, regions * topk, dtype=torch.int32),
        index.new_empty(batch, 2 * regions + 1 + slots, dtype=torch.int32),
    ]


@_operator(
    f"bra_backward(Tensor tokens, Tensor? small, Tensor index, {_OPTIONS}Tensor out, Tensor lse, Tensor grad, {_PLACE})"
    " -> Tensor[]",
    _differentiated,
)
def bra_backward(
    tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
    taps: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor, qk_dim: int, heads: int,
    side: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of :func:`bra_attend`; ``out`` is without LePE.

    Returns:
        The gradients of ``tokens`` and ``small``; rowsum(out x grad), (m, b, h, w); partial gradients of ``factor``,
        (b, p, k, .); partial gradients of keys and values, (b, j, y x / p, e + c); partial gradients of LePE; the
        gradients of LePE, weight (c, f, f) and then bias (c), flat; the visits of each region, (b, p * k); and the
        tables that :func:`tables_of` splits. Results that do not apply are empty.
    """
    from attention_zoo.attentions.bra import triton_kernels as kernels

    result = _differentiated(
        tokens, small, index, factor, valid, taps, bias, out, lse, grad, qk_dim, heads, side, scale
    )  # fmt: skip
    dtokens, dsmall, delta, dfactor, parts, weight_parts, dlepe, visitors, tables = result
    shapes, topk = Shapes.of(tokens, small, qk_dim), index.shape[2]
    q, k, v = shapes.slices(tokens, small)
    dq, dk, dv = shapes.slices(dtokens, None if small is None else dsmall)
    slope, routes, (gates, seen) = _flat(grad), index.contiguous(), _dense(factor, valid)
    cut = tokens.dtype, heads, side, topk, factor is not None, shapes.long(q, k)
    batch, shared, regions = shapes.batch, parts.shape[1], side**2
    starts, first_slots, slots = tables_of(tables, regions)
    scales = topk, q.shape[0], shared, scale, scale * LOG2_E
    with torch.cuda.device_of(tokens):
        tile = shapes.tile("queries", *cut)
        chunk = chunk_of(tile.region[0] * tile.region[1])
        kernels.attend_backward_queries[tile.query_programs(batch),](
            q, k, v, routes, gates, seen, out, lse, slope, dq, delta, dfactor, visitors, starts, slots, first_slots,
            *_pitches(q, k, v, slope, dq), *scales, *tile.constants, chunk, power_of_two(regions + 1),
            min(1024, power_of_two(regions * topk)), **tile.options,
        )  # fmt: skip
        tile = shapes.tile("keys", *cut)
        kernels.attend_backward_keys[tile.key_programs(batch, shared),](
            q, k, v, visitors, starts, slots, first_slots, gates, seen, lse, slope, delta, dk, dv, parts,
            *_pitches(q, k, v, slope, dk, dv), *scales, *tile.constants, chunk, **tile.options,
        )  # fmt: skip
        if shared or taps is not None:
            field, tokens_of_keys = 1 if taps is None else taps.shape[0], v.shape[0]
            (rows, programs, steps), columns = _finishing(tokens_of_keys, grad.dtype), 32
            blocks = -(-shapes.c // columns) + (-(-shapes.e // columns) if shared else 0)
            kernels.finish_keys[programs, blocks](
                parts, starts, first_slots, dk, dv, v, slope, taps, weight_parts, *_pitches(dk, dv, v, slope), shared,
                tokens_of_keys, steps, side, *tile.kv_region, shapes.e, shapes.c, chunk, shared > 0, math.isqrt(field),
                _long(dk, dv, v, slope), rows, columns, power_of_two(field + 1), num_warps=1,
            )  # fmt: skip
        if taps is not None:
            _sum_rows(weight_parts, dlepe)
    return result


def tables_of(tables: Tensor, regions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the tables (b, 2p + 1 + j) that :func:`bra_backward` returns.

    Returns:
        The start of each region's visits, (b, p + 1); its first slot, (b, p); the region of each slot, (b, j), -1 if
        the slot is unused.
    """
    batch = len(tables)
    sizes = [batch * size for size in (regions + 1, regions, tables.shape[1] - 2 * regions - 1)]
    starts, first_slots, slots = tables.view(-1).split(sizes)
    return starts.view(batch, -1), first_slots.view(batch, -1), slots.view(batch, -1)


def _finishing(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Launch sizes of ``finish_keys`` for ``tokens`` tokens: rows per tile, programs, tiles per program."""
    # A small grid needs small tiles to keep a GPU busy; in fp32 a warp holds no larger ones.
    rows = 32 if tokens >= 32 * BUSY and dtype.itemsize == 2 else 16
    tiles = -(-tokens // rows)
    steps = -(-tiles // MOST_PARTS)
    return rows, -(-tiles // steps), steps


def _long(*flat: Tensor) -> bool:
    """Whether offsets within these need 64 bits."""
    return max(tokens.shape[0] * tokens.stride(0) for tokens in flat) >= 2**31


def _summed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    few = x[..., 0].numel() <= ONE_PASS
    parts = x.new_empty(0 if few else _parts(x)[0], x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape[-1], dtype=dtype), parts


@_operator("bra_sum_columns(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", _summed)
def bra_sum_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum over all but the last axis of (., d), accumulated in fp32; and its partial sums, if any."""
    total, parts = result = _summed(x, dtype)
    flat = _flat(x)
    with torch.cuda.device_of(x):
        if not parts.shape[0]:
            _sum_rows(flat, total)
            return result
        from attention_zoo.attentions.bra.triton_kernels import sum_columns

        columns = min(128, power_of_two(flat.shape[1]))
        sum_columns[len(parts), -(-flat.shape[1] // columns)](
            flat, parts, flat.stride(0), flat.shape[1], len(flat), _parts(x)[1], _long(flat), ROWS, columns
        )
        _sum_rows(parts, total)
    return result


def _parts(x: Tensor) -> tuple[int, int]:
    """Programs that sum the rows of (., d) in tiles of ROWS, and tiles per program."""
    tiles = -(-x[..., 0].numel() // ROWS)
    steps = max(1, min(64, tiles // BUSY))
    return -(-tiles // steps), steps


def _sum_rows(flat: Tensor, total: Tensor) -> None:
    """Sum (n, d) over n in one launch: each program takes few columns and all rows."""
    from attention_zoo.attentions.bra.triton_kernels import sum_columns

    (tokens, channels), columns = flat.shape, 16
    rows = min(512, power_of_two(tokens))
    sum_columns[1, -(-channels // columns)](
        flat, total, flat.stride(0), channels, tokens, -(-tokens // rows), _long(flat), rows, columns,
        num_warps=8 if rows > 128 else 4,
    )  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.types = [None if t is None else t.dtype for t in (x, weight, bias)]
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            half = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported("impl='triton' has no second derivative; impl='reference' has")
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = (rows @ weight).view(x.shape).to(ctx.types[0]) if ctx.needs_input_grad[0] else None
        dweight = (rows.T @ x.reshape(len(rows), -1)).to(ctx.types[1])
        dbias = None if ctx.types[2] is None else bra_sum_columns(grad, ctx.types[2])[0]
        return dx, dweight, dbias


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)`` with its own bias gradient: PyTorch sums many rows of few columns slower than it multiplies them."""
    if torch.is_grad_enabled():
        return _Linear.apply(x, layer.weight, layer.bias)
    return F.linear(x, layer.weight, layer.bias)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, *settings: Any,
    ) -> Tensor:  # fmt: skip
        taps = _taps_of(weight)
        out, total, lse = bra_attend(tokens, small, index, factor, valid, taps, bias, *settings, True)
        ctx.settings = settings
        ctx.save_for_backward(tokens, small, index, factor, valid, taps, bias, out, lse)
        return out if weight is None else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported("impl='triton' has no second derivative; impl='reference' has")
        _, small, _, factor, _, taps, bias, *_ = ctx.saved_tensors
        dtokens, dsmall, _, dfactor, _, _, dlepe, *_ = bra_backward(*ctx.saved_tensors, grad, *ctx.settings)
        dweight = dbias = None
        if taps is not None:
            kernel, channels = math.isqrt(len(taps)), taps.shape[1]
            dweight = dlepe[:-channels].view(channels, 1, kernel, kernel)
            dbias = None if bias is None else dlepe[-channels:]
        return (
            dtokens, None if small is None else dsmall, None, None if factor is None else dfactor.sum(-1), None,
            dweight, dbias, *[None] * len(ctx.settings),
        )  # fmt: skip


def attend(
    tokens: Tensor, small: Tensor | None, index: Tensor, factor: Tensor | None, valid: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, qk_dim: int, heads: int, side: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attention plus LePE, (b, h, w, c), with gradients: arguments of ``bra_attend``, LePE's weight (c, 1, f, f)."""
    settings = qk_dim, heads, side, scale
    if torch.is_grad_enabled():
        return _Attention.apply(tokens, small, index, factor, valid, weight, bias, *settings)
    return bra_attend(tokens, small, index, factor, valid, _taps_of(weight), bias, *settings, False)[0]


def _taps_of(weight: Tensor | None) -> Tensor | None:
    """LePE's weight (c, 1, f, f) as (f f, c): contiguous channels, as in a grid."""
    return None if weight is None else weight.flatten(1).T.contiguous()


def _add_depthwise(
    x: Tensor, taps: Tensor, bias: Tensor | None, base: Tensor, out: Tensor, grid: tuple[int, int]
) -> None:
    from attention_zoo.attentions.bra.triton_kernels import add_depthwise

    channels, kernel = taps.shape[1], math.isqrt(taps.shape[0])
    columns = min(64, power_of_two(channels))
    # A small grid needs small tiles to keep a GPU busy.
    tokens = x.shape[0]
    rows = ROWS if tokens >= ROWS * BUSY else 16
    add_depthwise[-(-tokens // rows), -(-channels // columns)](
        x, taps, bias, base, out, *_pitches(x, base, out), channels, tokens, *grid, kernel,
        _long(x, base, out), rows, columns,
    )  # fmt: skip


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _flat(grid: Tensor) -> Tensor:
    """(n, d) with a constant token stride and contiguous channels: a view, if the grid's memory layout permits."""
    tokens = grid.reshape(-1, grid.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def _pitches(*flat: Tensor) -> list[int]:
    return [tokens.stride(0) for tokens in flat]
