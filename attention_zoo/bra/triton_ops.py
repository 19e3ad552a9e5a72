"""BRA's Triton kernels as operators of PyTorch: results on shapes alone, derivatives, and how they are counted.

So they work under torch.compile, in FLOP counters and on meta tensors, where Triton is not needed. All that a kernel
writes is an output of its operator: a memory prediction sees it.

Shape legend: b batch, h w grid of queries, y x grid of keys, p regions (S x S), k routed regions, n tokens of a grid,
m heads, e qk_dim, c dim, d any channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from attention_zoo.bra.triton_tiles import power_of_two, tile_of
from attention_zoo.contract import Unsupported

LOG2_E = 1.4426950408889634


@custom_op("attention_zoo::bra_pool", mutates_args=())
def bra_pool(x: Tensor, side: int) -> Tensor:
    """The mean of each region of (b, h, w, d), in fp32: (b, p, d). No gradient."""
    from attention_zoo.bra.triton_kernels import pool_regions

    batch, height, width, channels = x.shape
    tokens, pooled = _flat(x), _pooled(x, side)
    region, block = (height // side, width // side), 64
    _launch(
        pool_regions, (side**2, -(-channels // block), batch), tokens, pooled, tokens.stride(0), channels, side,
        *region, min(64, power_of_two(region[0] * region[1])), block,
    )  # fmt: skip
    return pooled


@bra_pool.register_fake
def _pooled(x: Tensor, side: int) -> Tensor:
    return x.new_empty(x.shape[0], side**2, x.shape[3], dtype=torch.float32)


@custom_op("attention_zoo::bra_route", mutates_args=())
def bra_route(pooled: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Routed regions (b, p, k), best first, and the softmax of their scores, of descriptors (b, p, 2e)."""
    from attention_zoo.bra.triton_kernels import choose_routes

    batch, regions, channels = pooled.shape
    index, strength = _routed(pooled, topk, scale)
    rows = power_of_two(regions)
    # A program reads rows x columns numbers at a time: as many as its registers hold.
    columns = max(8, min(64, 8192 // rows))
    _launch(
        choose_routes, (regions, batch), pooled, index, strength, channels // 2, scale, regions, topk, rows,
        power_of_two(topk), columns,
    )  # fmt: skip
    return index, strength


@bra_route.register_fake
def _routed(pooled: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = *pooled.shape[:2], topk
    return pooled.new_empty(shape, dtype=torch.int64), pooled.new_empty(shape)


@custom_op("attention_zoo::bra_attend", mutates_args=())
def bra_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    heads: int,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each region's queries to the tokens of its routed regions.

    Args:
        q: (b, h, w, e).
        k, v: (b, y, x, e) and (b, y, x, c); S divides y and x.
        index: (b, p, k), the routed regions.
        factor: (b, p, k) in fp32, what the routed keys and values are multiplied by.
        valid: (y, x), False where a key is not to be seen.
        heads, side, scale: m, S, factor of the scores.

    Returns:
        (b, h, w, c), and the base-2 log-sum-exp of the scores, (m, b, h, w) in fp32.
    """
    from attention_zoo.bra.triton_kernels import attend_forward

    out, lse = _attended(q, k, v, index, factor, valid, heads, side, scale)
    tile = tile_of("forward", q, k, v, heads, side, index.shape[2], factor)
    flat = _flat(q), _flat(k), _flat(v)
    _launch(
        attend_forward, (tile.query_programs(q),), *flat, *_dense(index, factor, valid), out, lse, *_pitches(flat),
        index.shape[2], lse[0].numel(), scale * LOG2_E, *tile.constants(), **tile.options(),
    )  # fmt: skip
    return out, lse


@bra_attend.register_fake
def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    heads: int,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(heads, *q.shape[:3], dtype=torch.float32)


@custom_op("attention_zoo::bra_attend_queries", mutates_args=())
def bra_attend_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    heads: int,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the backward pass: the gradient of ``q``; rowsum(out x grad), (m, b, h, w); parts of that of ``factor``."""
    from attention_zoo.bra.triton_kernels import attend_backward_queries

    tile = tile_of("queries", q, k, v, heads, side, index.shape[2], factor)
    found = _queries_differentiated(q, k, v, index, factor, valid, out, lse, grad, heads, side, scale)
    flat = _flat(q), _flat(k), _flat(v), _flat(grad)
    _launch(
        attend_backward_queries, (tile.query_programs(q),), *flat[:3], *_dense(index, factor, valid), out, lse, flat[3],
        *found, *_pitches(flat), index.shape[2], lse[0].numel(), scale, scale * LOG2_E, *tile.constants(),
        **tile.options(),
    )  # fmt: skip
    return found


@bra_attend_queries.register_fake
def _queries_differentiated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    heads: int,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = lse.new_empty(0)
    if factor is not None:
        parts = lse.new_empty(*index.shape, tile_of("queries", q, k, v, heads, side, index.shape[2], factor).parts())
    return q.new_empty(q.shape), lse.new_empty(lse.shape), parts


@custom_op("attention_zoo::bra_invert", mutates_args=())
def bra_invert(index: Tensor) -> tuple[Tensor, Tensor]:
    """The places in ``index`` (b, p, k) that hold region 0, then 1, ...: (b, p * k); where each begins: (b, p + 1)."""
    from attention_zoo.bra.triton_kernels import invert_routes

    batch, regions, topk = index.shape
    visitors, starts = _inverted(index)
    block = min(1024, power_of_two(regions * topk))
    _launch(invert_routes, (regions, batch), *_dense(index), visitors, starts, regions * topk, regions, block)
    return visitors, starts


@bra_invert.register_fake
def _inverted(index: Tensor) -> tuple[Tensor, Tensor]:
    batch, regions, topk = index.shape
    return (
        index.new_empty(batch, regions * topk, dtype=torch.int32),
        index.new_empty(batch, regions + 1, dtype=torch.int32),
    )


@custom_op("attention_zoo::bra_attend_keys", mutates_args=())
def bra_attend_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visitors: Tensor,
    starts: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    heads: int,
    side: int,
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Of the backward pass: the gradients of ``k`` and ``v``."""
    from attention_zoo.bra.triton_kernels import attend_backward_keys

    tile = tile_of("keys", q, k, v, heads, side, topk, factor)
    found = _keys_differentiated(q, k, v, visitors, starts, factor, valid, lse, grad, delta, heads, side, topk, scale)
    flat = _flat(q), _flat(k), _flat(v), _flat(grad)
    _launch(
        attend_backward_keys, (tile.key_programs(q),), *flat[:3], visitors, starts, *_dense(factor, valid), lse,
        flat[3], delta, *found, *_pitches(flat), topk, lse[0].numel(), scale, scale * LOG2_E, *tile.constants(),
        **tile.options(),
    )  # fmt: skip
    return found


@bra_attend_keys.register_fake
def _keys_differentiated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visitors: Tensor,
    starts: Tensor,
    factor: Tensor | None,
    valid: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    heads: int,
    side: int,
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise Unsupported("impl='triton' has no second derivative; impl='reference' has")
    q, k, v, index, factor, valid, out, lse = ctx.saved_tensors
    heads, side, scale = ctx.settings
    dq, delta, parts = bra_attend_queries(q, k, v, index, factor, valid, out, lse, grad, heads, side, scale)
    visitors, starts = bra_invert(index)
    dk, dv = bra_attend_keys(
        q, k, v, visitors, starts, factor, valid, lse, grad, delta, heads, side, index.shape[2], scale
    )  # fmt: skip
    return dq, dk, dv, None, None if factor is None else parts.sum(-1), None, None, None, None


bra_attend.register_autograd(_differentiate, setup_context=_remember)


def _launch(kernel: Any, programs: tuple[int, ...], *args: Any, **options: int) -> None:
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(args[0]):
        kernel[programs](*args, **options)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _flat(grid: Tensor) -> Tensor:
    """(n, d), tokens at equal distance and channels next to one another: a view, unless the grid lies otherwise."""
    tokens = grid.reshape(-1, grid.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def _pitches(flat: tuple[Tensor, ...]) -> list[int]:
    return [tokens.stride(0) for tokens in flat]


@register_flop_formula(torch.ops.attention_zoo.bra_route)
def _route_flops(pooled: Any, topk: int, scale: float, out_shape: Any = None, **_: Any) -> int:
    batch, regions, channels = pooled
    return batch * regions**2 * channels


def _pair_flops(per_pair: int, q: Any, k: Any, side: int, topk: int) -> int:
    """Of matrix products that take ``per_pair`` multiply-accumulates for each query and key that meet."""
    queries, keys = q[0] * q[1] * q[2], topk * (k[1] // side) * (k[2] // side)
    return 2 * queries * keys * per_pair


@register_flop_formula(torch.ops.attention_zoo.bra_attend)
def _attend_flops(q: Any, k: Any, v: Any, index: Any, *rest: Any, out_shape: Any = None) -> int:
    return _pair_flops(q[3] + v[3], q, k, rest[3], index[2])


@register_flop_formula(torch.ops.attention_zoo.bra_attend_queries)
def _attend_queries_flops(q: Any, k: Any, v: Any, index: Any, *rest: Any, out_shape: Any = None) -> int:
    return _pair_flops(2 * q[3] + v[3], q, k, rest[6], index[2])


@register_flop_formula(torch.ops.attention_zoo.bra_attend_keys)
def _attend_keys_flops(q: Any, k: Any, v: Any, visitors: Any, *rest: Any, out_shape: Any = None) -> int:
    return _pair_flops(2 * q[3] + 2 * v[3], q, k, rest[7], rest[8])
