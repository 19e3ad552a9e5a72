"""Cross-shaped window attention: half of the heads in horizontal stripes, half in vertical ones."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads
from attention_zoo.ops.token_partition import TokenPartition


@register("cross_shaped")
class CrossShapedAttention(Attention):
    """Heads in two halves: the first attends within horizontal stripes, the second within vertical ones.

    Each half adds a locally-enhanced position encoding: a 3x3 depthwise convolution of its values within the
    stripe. A grid that stripe_width does not divide is padded after the projection, and the padding is masked:
    the last stripe is narrower, and its convolution reads zeros beyond it. The order of the halves is that of
    the paper; the published code reverses it. If one stripe covers the whole grid, the publication runs all
    heads in one call; here the halves compute the same in two calls.

    Args:
        stripe_width: tokens across a stripe; published: 1, 2, 7, 7 by stage.
        qkv_bias: whether the qkv projection has a bias.

    Raises:
        InvalidOption: num_heads is odd.
    """

    attends_to = "a stripe of rows, and one of columns"
    citation = "Dong et al., CSWin Transformer, CVPR 2022 (H-Attention, V-Attention, LePE)"
    impls = ("reference", "sdpa")
    exponent = 1.5
    minimal_options = {"stripe_width": 2}
    by_stage = {"stripe_width": (1, 2, 7, 7)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        stripe_width: AtLeast1 = 7,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if num_heads < 2:
            valid = [str(heads) for heads in range(2, dim + 1) if dim % heads == 0]
            raise InvalidOption(
                f"num_heads={num_heads} has no halves; valid for dim={dim}: {', '.join(valid) or 'none'}"
            )
        self.heads = num_heads - num_heads // 2, num_heads // 2
        self.dims = [heads * (dim // num_heads) for heads in self.heads]
        self.stripe_width = stripe_width
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = nn.ModuleList(depthwise(channels, 3, "lepe") for channels in self.dims)
        self.proj = nn.Linear(dim, dim)

    def stripes(self, height: int, width: int) -> tuple[TokenPartition, TokenPartition]:
        """The horizontal and the vertical stripes of a ``height x width`` grid."""
        across = self.stripe_width
        return TokenPartition(height, width, (across, width)), TokenPartition(height, width, (height, across))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        halves = self.qkv(x).split(3 * self.dims, dim=-1)
        stripes = self.stripes(*x.shape[1:3])
        out = [self._half(halves[i::2], stripes[i], i, self.chosen_impl(x)) for i in range(2)]
        return self.proj(torch.cat(out, dim=-1))

    def _half(
        self, qkv: tuple[Float[Tensor, "b h w e"], ...], stripes: TokenPartition, half: int, impl: str
    ) -> Float[Tensor, "b h w e"]:
        q, k, v = (stripes.partition(part) for part in qkv)
        heads = self.heads[half]
        by_head = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
        out = merge_heads(softmax_attention(*by_head, self.scale, stripes.mask(q), impl))
        planes = rearrange(v, "b p (y z) e -> (b p) e y z", y=stripes.size[0])
        local = rearrange(self.lepe[half](planes), "(b p) e y z -> b p (y z) e", b=len(v))
        return stripes.merge(out + local)

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        padded = [stripes.padded[0] * stripes.padded[1] for stripes in self.stripes(height, width)]
        keys = self.stripe_width * width, self.stripe_width * height
        return Macs(
            projection=4 * n * self.dim**2,
            attention=sum(2 * tokens * seen * dim for tokens, seen, dim in zip(padded, keys, self.dims, strict=True)),
            local_conv=sum(9 * tokens * dim for tokens, dim in zip(padded, self.dims, strict=True)),
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        stripes = self.stripes(height, width)
        return sum(s.mean_keys() * dim for s, dim in zip(stripes, self.dims, strict=True)) / self.dim
