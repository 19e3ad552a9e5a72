"""BRA in Triton kernels: keys and values are read through the routes, directly from the projection's output.

Nothing is gathered and no score is written: a forward pass stores the output and one log-sum-exp per query and head.
The backward pass recomputes scores, and sums the gradients of a region's keys over the list of query regions routed
to it, in a fixed order. It uses no atomic additions, so results are bitwise reproducible.

Shape legend: b batch, h w padded grid, y x grid of keys (after kv downsampling), p regions (S x S), k routed regions,
m heads, c dim, e qk_dim, d any channels.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from attention_zoo.attentions.bra import coarse_gate, sdpa, triton_macs, triton_ops  # noqa: F401 (triton_macs registers)
from attention_zoo.attentions.bra.triton_tiles import LARGEST_HEAD
from attention_zoo.core import compilers
from attention_zoo.core.base import Unsupported
from attention_zoo.core.memory_simulation import device_type
from attention_zoo.core.profiler_ranges import stage

if TYPE_CHECKING:
    from attention_zoo.attentions.bra import BiLevelRoutingAttention

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on a CPU, to check them."""
INTERPRETS_BF16 = False
"""The interpreter multiplies bf16 bits as integers and rounds towards zero. Tests patch that, then set this flag."""
LARGEST_ROUTED = 1024
"""With more regions PyTorch chooses the routes, since a program of the kernel holds one score per region."""


def unsupported(bra: "BiLevelRoutingAttention", x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``; None if they can. Shapes alone need no Triton if ``impl`` is explicit."""
    head = max(bra.qk_dim, bra.dim) // bra.num_heads
    if bra.per_token_routing:
        return (
            "its kernels route whole regions of queries, and per_token_routing=True routes each token; "
            "valid with it: reference, sdpa"
        )
    if bra.scale <= 0:
        return f"its kernels need a positive scale, and qk_scale is {bra.scale}"
    if x.dtype == torch.float64:
        return "its kernels add up in fp32, and do not run in fp64"
    if head > LARGEST_HEAD:
        return f"its kernels hold at most {LARGEST_HEAD} channels per head, not {head}"
    fake = x.is_meta or isinstance(x, FakeTensor)
    # "auto" takes on a simulated GPU what it would take on a GPU.
    if fake and (bra.impl == "triton" or device_type(x) == "cuda"):
        return None
    if not INSTALLED:
        return "Triton is not installed; on Linux: pip install triton"
    if x.is_cuda:
        major = torch.cuda.get_device_properties(x.device).major
        if major < 8:
            return f"its kernels need compute capability 8.0, and this device has {major}.x"
        return compilers.triton_lacks()
    if bra.impl == "triton" and INTERPRETED and x.device.type == "cpu":
        return None
    return f"its kernels do not run on {x.device.type}, except to be checked, with TRITON_INTERPRET=1"


def forward(
    bra: "BiLevelRoutingAttention", x: Float[Tensor, "b h w c"], side: int, valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    """BRA before its output projection, and its routes; arguments as of ``reference.forward``."""
    e = bra.qk_dim
    with stage("bra.project"):
        unmodified = sdpa.is_plain(bra.qkv.qkv) and sdpa.has_no_hooks(bra.qkv)
        qkv = triton_ops.linear(x, bra.qkv.qkv) if unmodified else bra.qkv(x)
        if INTERPRETED and qkv.dtype == torch.bfloat16 and not INTERPRETS_BF16:
            raise Unsupported("impl='triton': Triton's interpreter multiplies no matrices of bf16; a GPU does")
        small, seen = _downsample(bra, qkv[..., e:], side, valid)
    with stage("bra.route"):
        index, strength = _routes(bra, qkv, side, valid, seen)
    fused = valid is None and small is None and type(bra.lepe) is nn.Conv2d and sdpa.has_no_hooks(bra.lepe)
    weight, bias = (bra.lepe.weight, bra.lepe.bias) if bra.lepe is not None and fused else (None, None)
    with stage("bra.attend"):
        tokens, factor = qkv if small is None else qkv[..., :e], _factor(bra, strength)
        out = triton_ops.attend(
            tokens, small, index, factor, seen, weight, bias, e, bra.num_heads, side, float(bra.scale)
        )
    if bra.lepe is not None and not fused:
        with stage("bra.lepe"):
            v = qkv[..., 2 * e :]
            grid = rearrange(v if valid is None else v.where(valid[..., None], 0), "b h w c -> b c h w")
            out = out + rearrange(bra.lepe(grid), "b c h w -> b h w c")
    if bra.coarse_gate is not None:
        with stage("bra.coarse"):
            q, k, v = coarse_gate.means(qkv, side, valid).split([e, e, bra.dim], dim=-1)
            out = coarse_gate.add(bra, out, x, side, q, k, v, valid)
    return out, index, strength


def _factor(bra: "BiLevelRoutingAttention", strength: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"] | None:
    """The factor of routed keys and values, or None."""
    if bra.soft_routing:
        return strength.float()
    return 1 + (strength - strength.detach()).float() if bra.diff_routing else None


def _downsample(
    bra: "BiLevelRoutingAttention", kv: Float[Tensor, "b h w d"], side: int, valid: Bool[Tensor, "h w"] | None
) -> tuple[Float[Tensor, "b y x d"] | None, Bool[Tensor, "y x"] | None]:
    """Reduced keys and values as a grid with regions of 1 x s tokens (None: not reduced); which keys are valid."""
    if bra.kv_down.mode == "identity":
        return None, valid
    # Channels last in memory, for PyTorch's pooling; movedim returns a view.
    tiles = rearrange(kv, "b (r y) (q x) d -> (b r q) y x d", r=side, q=side).movedim(-1, 1)
    seen = None
    if valid is None:
        small = bra.kv_down(tiles)
    else:
        real = rearrange(valid, "(r y) (q x) -> (r q) 1 y x", r=side, q=side)
        small, kept = bra.kv_down.masked(tiles, real.repeat(len(kv), 1, 1, 1))
        seen = rearrange(kept[: side**2], "(r q) 1 y x -> r (q y x)", r=side, q=side)
    return rearrange(small, "(b r q) d y x -> b r (q y x) d", r=side, q=side).to(kv.dtype).contiguous(), seen


def _routes(
    bra: "BiLevelRoutingAttention",
    qkv: Float[Tensor, "b h w d"],
    side: int,
    valid: Bool[Tensor, "h w"] | None,
    seen: Bool[Tensor, "y x"] | None,
) -> tuple[Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
    by_kernel = valid is None and not bra.diff_routing and bra.router.imposed is None
    if by_kernel and side**2 <= LARGEST_ROUTED:
        return triton_ops.bra_route(qkv.detach(), bra.qk_dim, side, bra.topk, float(bra.scale))[:2]
    tiles = rearrange(qkv[..., : 2 * bra.qk_dim], "b (r y) (q x) d -> b r q y x d", r=side, q=side)
    if valid is None or seen is None:
        q, k = tiles.mean(dim=(3, 4)).flatten(1, 2).chunk(2, dim=-1)
        return bra.router(q, k)
    real = rearrange(valid, "(r y) (q x) -> r q y x 1", r=side, q=side)
    mean = tiles.where(real, 0).sum(dim=(3, 4)) / real.sum(dim=(2, 3)).clamp_min(1)
    q, k = mean.flatten(1, 2).chunk(2, dim=-1)
    empty = ~rearrange(seen, "(r y) (q x) -> (r q) (y x)", r=side, q=side).any(dim=1)
    return bra.router(q, k, empty.expand(len(qkv), -1))
