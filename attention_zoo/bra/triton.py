"""BRA in Triton kernels: keys and values are read through the routes, straight from where the projection put them.

Nothing is gathered and no score is written: a forward pass leaves the output and one log-sum-exp per query and head.
The backward pass computes scores again, and finds the gradients of a region's keys by the list of query regions that
were routed to it, in a fixed order: no atomic additions, so the same bits in every run.

Shape legend: b batch, h w padded grid, y x grid of keys (after kv downsampling), p regions (S x S), k routed regions,
m heads, c dim, e qk_dim, d any channels.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attention_zoo.bra.triton_ops import bra_attend, bra_pool, bra_route
from attention_zoo.bra.triton_tiles import LARGEST_HEAD
from attention_zoo.contract import Unsupported
from attention_zoo.stages import stage

if TYPE_CHECKING:
    from attention_zoo.bra import BiLevelRoutingAttention

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on a CPU, to check them."""
LARGEST_ROUTED = 1024
"""Of more regions the routes are chosen by PyTorch: a program holds a score of each."""


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
    with stage("bra.project"):
        qkv = bra.qkv(x)
        if INTERPRETED and qkv.dtype == torch.bfloat16:
            raise Unsupported("impl='triton': Triton's interpreter multiplies no matrices of bf16; a GPU does")
        q, k, v = qkv.split([e, e, bra.dim], dim=-1)
        keys, values, seen = _downsample(bra, k, v, side, valid)
    with stage("bra.route"):
        index, strength = _routes(bra, qkv[..., : 2 * e], side, valid, seen)
    with stage("bra.attend"):
        factor = _factor(bra, strength)
        out = bra_attend(q, keys, values, index, factor, seen, bra.num_heads, side, float(bra.scale))[0]
    if bra.lepe is not None:
        with stage("bra.lepe"):
            grid = rearrange(v if valid is None else v.where(valid[..., None], 0), "b h w c -> b c h w")
            out = out + rearrange(bra.lepe(grid), "b c h w -> b h w c")
    return out, index, strength


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"] | None:
    """What routed keys and values are multiplied by, if anything."""
    if bra.soft_routing:
        return strength.float()
    return 1 + (strength - strength.detach()).float() if bra.diff_routing else None


def _downsample(
    bra: "BiLevelRoutingAttention",
    k: Float[Tensor, "b h w e"],
    v: Float[Tensor, "b h w c"],
    side: int,
    valid: Bool[Tensor, "h w"] | None,
) -> tuple[Float[Tensor, "b y x e"], Float[Tensor, "b y x c"], Bool[Tensor, "y x"] | None]:
    """Keys, values and which of them count; reduced ones as grids whose regions are rows of 1 x s tokens."""
    if bra.kv_down.mode == "identity":
        return k, v, valid
    kv = torch.cat([k, v], dim=-1)
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
    return *grid.split([bra.qk_dim, bra.dim], dim=-1), seen


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
