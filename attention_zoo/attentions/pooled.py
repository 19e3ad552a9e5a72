"""Pooled attention: every token attends to a reduced grid of keys and values.

Shape legend: b batch, h w grid, r c reduced grid, n s tokens of both, m heads.
"""

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops import regions
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads


@register("pooled")
class PooledAttention(Attention):
    """Spatial-reduction attention (PVT): keys and values come from a strided convolution of the grid.

    ``conv`` is a convolution of kernel and stride sr_ratio and a LayerNorm. It is published for grids that sr_ratio
    divides. On others the authors' code drops the tokens beyond the last whole square, and it refuses a grid with a
    side shorter than sr_ratio. Here the bottom and right are zero-padded instead, so that every token contributes to
    a key.
    ``avg`` is the linear variant (PVT v2's linear SRA): an adaptive average to a fixed grid, a 1x1 convolution,
    LayerNorm, GELU. On a side with fewer than pool_size tokens, adaptive averages of the authors' code overlap: it
    makes pool_size keys all the same, some of them several times, which weighs tokens unequally. Here that side
    keeps its tokens, each once.

    Args:
        sr_ratio: for conv: reduction per side (published: 8, 4, 2, 1 in the four stages). 1 is full attention,
            without convolution and LayerNorm, as published.
        pool: how keys and values are reduced.
        pool_size: for avg: tokens per side after the reduction.
        qkv_bias: whether the projections to q, k and v have a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
    """

    family = "pooled"
    attends_to = "a sub-sampled grid"
    citation = "Wang et al., Pyramid Vision Transformer, ICCV 2021 (SRA); avg: PVT v2, CVMJ 2022 (linear SRA)"
    equation = "softmax(q SR(k)ᵀ/√d) SR(v); avg: SR is average pooling to a fixed size"
    left_open = "ragged grids: padded with zeros; small grids: short sides kept"
    departs = "theirs drops the border, refuses a side below sr_ratio, and repeats keys in avg"
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"sr_ratio": 2, "pool_size": 2}
    by_stage = {"sr_ratio": (8, 4, 2, 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        sr_ratio: AtLeast1 = 8,
        pool: Literal["conv", "avg"] = "conv",
        pool_size: AtLeast1 = 7,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.sr_ratio, self.pool, self.pool_size = sr_ratio, pool, pool_size
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.sr = self.norm = None
        if pool == "avg" or sr_ratio > 1:
            kernel = 1 if pool == "avg" else sr_ratio
            self.sr = nn.Conv2d(dim, dim, kernel, stride=kernel)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        q = split_heads(rearrange(self.q(x), "b h w c -> b (h w) c"), self.num_heads)
        reduced = rearrange(self._reduced(x), "b r c d -> b (r c) d")
        k, v = (split_heads(part, self.num_heads) for part in self.kv(reduced).chunk(2, dim=-1))
        out = merge_heads(softmax_attention(q, k, v, self.scale, impl=self.chosen_impl(x)))
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1]))

    def _reduced(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b r c d"]:
        if self.sr is None or self.norm is None:
            return x
        if self.pool == "conv":
            x = regions.pad_to_multiple(x, self.sr_ratio, self.sr_ratio)
        image = rearrange(x, "b h w d -> b d h w")
        if self.pool == "avg":
            image = F.adaptive_avg_pool2d(image, self._reduced_size(x.shape[1], x.shape[2]))
        reduced = self.norm(rearrange(self.sr(image), "b d r c -> b r c d"))
        return F.gelu(reduced) if self.pool == "avg" else reduced

    def _reduced_size(self, height: int, width: int) -> tuple[int, int]:
        if self.pool == "avg":
            return min(self.pool_size, height), min(self.pool_size, width)
        return -(-height // self.sr_ratio), -(-width // self.sr_ratio)

    def macs(self, height: int, width: int) -> Macs:
        n, (rows, cols) = height * width, self._reduced_size(height, width)
        reduced = rows * cols
        kernel = 0 if self.sr is None else self.sr.kernel_size[0] * self.sr.kernel_size[1]
        return Macs(
            projection=2 * (n + reduced) * self.dim**2,
            attention=2 * n * reduced * self.dim,
            local_conv=reduced * kernel * self.dim**2,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        rows, cols = self._reduced_size(height, width)
        return rows * cols
