"""Spatially separable attention: within windows, then to a sub-sampled grid."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo import regions
from attention_zoo.attend import attend, merge_heads, split_heads
from attention_zoo.contract import Attention, Impl, Macs
from attention_zoo.options import AtLeast1
from attention_zoo.registry import register
from attention_zoo.window import WindowAttention


class SubSampledAttention(Attention):
    """Every token attends to the grid reduced by ``sr_ratio`` per side: a strided convolution and a LayerNorm.

    A grid that sr_ratio does not divide is zero-padded at the bottom and right before the convolution, so that
    every token is seen and every key sees one at least; the published code drops the remainder.
    """

    impls = ("reference", "sdpa")

    def __init__(
        self, dim: int, num_heads: int, impl: Impl = "auto", *, sr_ratio: AtLeast1 = 8, qkv_bias: bool = True
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.sr_ratio = sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        q = split_heads(rearrange(self.q(x), "b h w c -> b (h w) c"), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(self._reduce(x)).chunk(2, dim=-1))
        out = merge_heads(attend(q, k, v, self.scale, impl=self.chosen_impl(x)))
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1]))

    def _reduce(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b s c"]:
        if self.sr is None or self.norm is None:
            return rearrange(x, "b h w c -> b (h w) c")
        padded = regions.pad_to_multiple(x, self.sr_ratio, self.sr_ratio)
        return self.norm(rearrange(self.sr(rearrange(padded, "b h w c -> b c h w")), "b c h w -> b (h w) c"))

    def macs(self, height: int, width: int) -> Macs:
        n, keys = height * width, self._keys(height, width)
        return Macs(
            projection=2 * (n + keys) * self.dim**2,
            attention=2 * n * keys * self.dim,
            local_conv=keys * (self.sr_ratio * self.dim) ** 2 if self.sr is not None else 0,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float:
        return self._keys(height, width)

    def _keys(self, height: int, width: int) -> int:
        return -(-height // self.sr_ratio) * -(-width // self.sr_ratio)


@register("spatially_separable")
class SpatiallySeparableAttention(Attention):
    """Two attention layers in sequence: locally grouped (windows), then global to sub-sampled keys and values.

    The second layer's keys and values come from a convolution of kernel and stride sr_ratio, followed by a
    LayerNorm, as published; with sr_ratio 1 there is neither. Each layer has projections of its own. The residual
    and MLP that the publication puts after each layer belong to the block around an attention.

    Args:
        window_size: tokens per side of a window; 7 in all published models.
        sr_ratio: reduction per side of the second layer's keys and values; published: 8, 4, 2, 1 by stage.
        qkv_bias: whether the projections to queries, keys and values have a bias.
    """

    citation = "Chu et al., Twins, NeurIPS 2021, section 3.2, eq. 5 and 6 (Twins-SVT)"
    impls = ("reference", "sdpa")
    smallest = {"window_size": 2, "sr_ratio": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast1 = 7,
        sr_ratio: AtLeast1 = 8,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.local = WindowAttention(dim, num_heads, impl, window_size=window_size, qkv_bias=qkv_bias)
        self.sub_sampled = SubSampledAttention(dim, num_heads, impl, sr_ratio=sr_ratio, qkv_bias=qkv_bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.sub_sampled(self.local(x))

    def macs(self, height: int, width: int) -> Macs:
        return self.local.macs(height, width) + self.sub_sampled.macs(height, width)

    def kv_tokens_per_query(self, height: int, width: int) -> float:
        return self.local.kv_tokens_per_query(height, width) + self.sub_sampled.kv_tokens_per_query(height, width)
