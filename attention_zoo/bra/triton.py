"""BRA in Triton kernels: keys and values are read through the routes, straight from where the projection put them.

Nothing is gathered and no score is written: a forward pass leaves the output and one log-sum-exp per query and head.
The backward pass computes scores again, and finds the gradients of a region's keys by the list of query regions that
were routed to it, in a fixed order: no atomic additions, so the same bits in every run.

Shape legend: b batch, h w padded grid, y x grid of keys (after kv downsampling), p regions (S x S), k routed regions,
m heads, c dim, e qk_dim, d any channels.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from attention_zoo.contract import Unsupported

if TYPE_CHECKING:
    from attention_zoo.bra import BiLevelRoutingAttention

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on a CPU, to check them."""
LARGEST_HEAD = 128
LARGEST_ROUTED = 1024
"""Of more regions the routes are chosen by PyTorch: a program holds a score of each."""
LOG2_E = 1.4426950408889634


def unsupported(bra: "BiLevelRoutingAttention", x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``; None if they can. Shapes alone need none, if they are asked for by name."""
    head = max(bra.qk_dim, bra.dim) // bra.num_heads
    if x.dtype == torch.float64:
        return "its kernels add up in fp32, and do not run in fp64"
    if head > LARGEST_HEAD:
        return f"its kernels hold at most {LARGEST_HEAD} channels per head, not {head}"
    if bra.impl == "triton" and (x.is_meta or isinstance(x, FakeTensor)):
        return None
    if not INSTALLED:
        return "Triton is not installed; on Linux: pip install triton"
    if x.is_cuda:
        major = torch.cuda.get_device_properties(x.device).major
        return None if major >= 8 else f"its kernels need compute capability 8.0, and this device has {major}.x"
    if bra.impl == "triton" and INTERPRETED and x.device.type == "cpu":
        return None
    return f"its kernels do not run on {x.device.type}, except to be checked, with TRITON_INTERPRET=1"


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int, valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; arguments as of ``reference.forward``."""
    e = bra.qk_dim
    qkv = bra.qkv(x)
    q, k, v = qkv.split([e, e, bra.dim], dim=-1)
    keys, values, seen = k, v, valid
    if bra.kv_down.mode != "identity":
        keys, values, seen = _downsample(bra, torch.cat([k, v], dim=-1), side, valid)
    index, strength = _routes(bra, qkv[..., : 2 * e], side, valid, seen)
    factor = None
    if bra.soft_routing:
        factor = strength.float()
    elif bra.diff_routing:
        factor = 1 + (strength - strength.detach()).float()
    out = bra_attend(q, keys, values, index, factor, seen, bra.num_heads, side, float(bra.scale))[0]
    if bra.lepe is None:
        return out, index, strength
    grid = rearrange(v if valid is None else v.where(valid[..., None], 0), "b h w c -> b c h w")
    return out + rearrange(bra.lepe(grid), "b c h w -> b h w c"), index, strength


def _downsample(
    bra: "BiLevelRoutingAttention", kv: Float[Tensor, "b h w d"], side: int, valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "b y x e"], Float[Tensor, "b y x c"], Bool[Tensor, "y x"] | None]:
    """Keys, values and which of them count, as grids whose regions are rows of 1 x s tokens."""
    # Channels last, for PyTorch's pooling: only a view of it moves them.
    tiles = rearrange(kv, "b (r y) (q x) d -> (b r q) y x d", r=side, q=side).movedim(-1, 1)
    seen = None
    if valid is None:
        small = bra.kv_down(tiles)
    else:
        real = rearrange(valid, "(r y) (q x) -> (r q) 1 y x", r=side, q=side)
        small, kept = bra.kv_down.masked(tiles, real.repeat(len(kv), 1, 1, 1))
        seen = rearrange(kept[: side**2], "(r q) 1 y x -> r (q y x)", r=side)
    grid = rearrange(small, "(b r q) d y x -> b r (q y x) d", r=side, q=side).to(kv.dtype)
    k, v = grid.split([bra.qk_dim, bra.dim], dim=-1)
    return k, v, seen


def _routes(
    bra: "BiLevelRoutingAttention",
    qk: Float[Tensor, "b h w d"],
    side: int,
    valid: Bool[Tensor, "h w"] | None,
    seen: Bool[Tensor, "y x"] | None,
) -> tuple[Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    if valid is None and not bra.diff_routing and side**2 <= LARGEST_ROUTED:
        return bra_route(bra_pool(qk.detach(), side), bra.topk, float(bra.scale))
    tiles = rearrange(qk, "b (r y) (q x) d -> b r q y x d", r=side, q=side)
    if valid is None or seen is None:
        q, k = tiles.mean(dim=(3, 4)).flatten(1, 2).chunk(2, dim=-1)
        return bra.router(q, k)
    real = rearrange(valid, "(r y) (q x) -> r q y x 1", r=side, q=side)
    mean = tiles.where(real, 0).sum(dim=(3, 4)) / real.sum(dim=(2, 3)).clamp_min(1)
    q, k = mean.flatten(1, 2).chunk(2, dim=-1)
    empty = ~rearrange(seen, "(r y) (q x) -> (r q) (y x)", r=side, q=side).any(dim=1)
    return bra.router(q, k, empty.expand(len(qk), -1))


@custom_op("attention_zoo::bra_pool", mutates_args=())
def bra_pool(x: Tensor, side: int) -> Tensor:
    """The mean of each region of (b, h, w, d), in fp32: (b, p, d). No gradient."""
    from attention_zoo.bra.triton_kernels import pool_regions

    batch, height, width, channels = x.shape
    tokens, pooled = _flat(x), _pooled(x, side)
    region, block = (height // side, width // side), 64
    pool_regions[(side**2, -(-channels // block), batch)](
        tokens, pooled, tokens.stride(0), channels, side, *region, min(64, _power(region[0] * region[1])), block
    )
    return pooled


@bra_pool.register_fake
def _pooled(x: Tensor, side: int) -> Tensor:
    return x.new_empty(x.shape[0], side**2, x.shape[3], dtype=torch.float32)


@custom_op("attention_zoo::bra_route", mutates_args=())
def bra_route(pooled: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Routed regions (b, p, k), best first, and the softmax of their scores, from (b, p, 2e): q, then k. No gradient."""
    from attention_zoo.bra.triton_kernels import choose_routes

    batch, regions, channels = pooled.shape
    index, strength = _routed(pooled, topk, scale)
    rows = _power(regions)
    # A program reads rows x columns numbers at a time: as many as its registers hold.
    columns = max(8, min(64, 8192 // rows))
    choose_routes[(regions, batch)](
        pooled, index, strength, channels // 2, scale, regions, topk, rows, _power(topk), columns
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

    if INTERPRETED and q.dtype == torch.bfloat16:
        raise Unsupported("impl='triton': Triton's interpreter multiplies no matrices of bf16; a GPU does")
    out, lse = _attended(q, k, v, index, factor, valid, heads, side, scale)
    tile = _tile("forward", q, k, v, heads, side, factor)
    flat = _flat(q), _flat(k), _flat(v)
    attend_forward[(tile.query_programs(q),)](
        *flat, index, factor, valid, out, lse, *_pitches(flat), index.shape[2], lse[0].numel(), scale * LOG2_E,
        *tile.constants(), **tile.options(),
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

    tile = _tile("queries", q, k, v, heads, side, factor)
    found = _queries_differentiated(q, k, v, index, factor, valid, out, lse, grad, heads, side, scale)
    flat = _flat(q), _flat(k), _flat(v), _flat(grad)
    attend_backward_queries[(tile.query_programs(q),)](
        *flat[:3], index, factor, valid, out, lse, flat[3], *found, *_pitches(flat), index.shape[2], lse[0].numel(),
        scale, scale * LOG2_E, *tile.constants(), **tile.options(),
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
        parts = lse.new_empty(*index.shape, _tile("queries", q, k, v, heads, side, factor).parts())
    return q.new_empty(q.shape), lse.new_empty(lse.shape), parts


@custom_op("attention_zoo::bra_invert", mutates_args=())
def bra_invert(index: Tensor) -> tuple[Tensor, Tensor]:
    """The places in ``index`` (b, p, k) that hold region 0, then 1, ...: (b, p * k); where each begins: (b, p + 1)."""
    from attention_zoo.bra.triton_kernels import invert_routes

    batch, regions, topk = index.shape
    visitors, starts = _inverted(index)
    block = min(1024, _power(regions * topk))
    invert_routes[(regions, batch)](index, visitors, starts, regions * topk, regions, block)
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

    tile = _tile("keys", q, k, v, heads, side, factor)
    found = _keys_differentiated(q, k, v, visitors, starts, factor, valid, lse, grad, delta, heads, side, topk, scale)
    flat = _flat(q), _flat(k), _flat(v), _flat(grad)
    attend_backward_keys[(tile.key_programs(q),)](
        *flat[:3], visitors, starts, factor, valid, lse, flat[3], delta, *found, *_pitches(flat), topk,
        lse[0].numel(), scale, scale * LOG2_E, *tile.constants(), **tile.options(),
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


class Tile(NamedTuple):
    """How a kernel is cut up and what it is compiled for."""

    heads: int
    side: int
    region: tuple[int, int]
    kv_region: tuple[int, int]
    e: int
    c: int
    queries: int
    keys: int
    packed: bool
    warps: int
    stages: int
    precision: str

    def constants(self) -> tuple[Any, ...]:
        """The ``constexpr`` arguments of every attention kernel, in order."""
        e, c = (max(16, _power(channels)) for channels in (self.e, self.c))
        shape = self.heads, self.side, *self.region, *self.kv_region, self.e, self.c, e, c
        return *shape, self.queries, self.keys, self.packed, self.precision

    def options(self) -> dict[str, int]:
        """What Triton's launcher is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def query_programs(self, q: Tensor) -> int:
        """Programs of a kernel that has one for each tile of queries."""
        return len(q) * self.side**2 * self.heads * -(-self.region[0] * self.region[1] // self.queries)

    def key_programs(self, q: Tensor) -> int:
        """Programs of a kernel that has one for each tile of keys."""
        return len(q) * self.side**2 * self.heads * -(-self.kv_region[0] * self.kv_region[1] // self.keys)

    def parts(self) -> int:
        """Tiles, of all heads, that have a part in the gradient of one factor."""
        queries, keys = self.region[0] * self.region[1], self.kv_region[0] * self.kv_region[1]
        return -(-keys // self.keys) * -(-queries // self.queries) * self.heads


TILES = {
    # Kernel, two bytes per number, channels per head up to: queries, keys, warps, stages.
    ("forward", True, 32): (128, 64, 4, 3),
    ("forward", True, 64): (128, 64, 4, 3),
    ("forward", True, 128): (128, 64, 8, 2),
    ("forward", False, 32): (64, 32, 4, 2),
    ("forward", False, 64): (32, 32, 4, 2),
    ("forward", False, 128): (32, 32, 8, 2),
    ("queries", True, 32): (128, 64, 8, 2),
    ("queries", True, 64): (64, 64, 4, 2),
    ("queries", True, 128): (64, 64, 8, 2),
    ("queries", False, 32): (64, 32, 4, 2),
    ("queries", False, 64): (32, 32, 8, 2),
    ("queries", False, 128): (32, 32, 8, 2),
    ("keys", True, 32): (64, 128, 8, 2),
    ("keys", True, 64): (64, 64, 4, 2),
    ("keys", True, 128): (64, 64, 8, 2),
    ("keys", False, 32): (32, 32, 4, 2),
    ("keys", False, 64): (32, 32, 8, 2),
    ("keys", False, 128): (32, 32, 8, 2),
}
"""The place to tune. Chosen so that nothing spills to memory on compute capability 8.0 and 9.0, as compiled; which of
those choices is fastest has not been measured. fp32 has smaller tiles: its numbers take twice the registers."""


def _tile(kernel: str, q: Tensor, k: Tensor, v: Tensor, heads: int, side: int, factor: Tensor | None) -> Tile:
    e, c = q.shape[3] // heads, v.shape[3] // heads
    region, kv_region = (tuple(size // side for size in grid.shape[1:3]) for grid in (q, k))
    widest = next(width for width in (32, 64, 128) if max(e, c) <= width)
    queries, keys, warps, stages = TILES[kernel, q.dtype.itemsize == 2, widest]
    tokens, kv_tokens = region[0] * region[1], kv_region[0] * kv_region[1]
    if kernel == "keys":
        rows, walked, packable = kv_tokens, tokens, True
        keys = min(keys, max(16, _power(kv_tokens)))
        step, rows_of_tile = queries, keys
    else:
        rows, walked, packable = tokens, kv_tokens, kernel == "forward" or factor is None
        queries = min(queries, max(16, _power(tokens)))
        step, rows_of_tile = keys, queries
    packed = packable and -(-walked // step) * step > 1.125 * walked
    if rows_of_tile <= 32 and q.dtype.itemsize == 2:
        warps = min(warps, 2 if widest < LARGEST_HEAD else 4)
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return Tile(
        heads, side, region, kv_region, e, c, queries, keys, packed, warps, stages, "tf32" if tf32 else "ieee"
    )  # fmt: skip


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


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
