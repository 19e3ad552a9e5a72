"""Cross-shaped window attention: half of the heads in vertical stripes, half in horizontal ones.

Shape legend: b batch, h w grid, p stripes, y z rows and columns of a stripe, e channels of a half.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
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
    """Heads in two halves: the first attends within vertical stripes, the second within horizontal ones.

    Each half adds a locally-enhanced position encoding: a 3x3 depthwise convolution of its values within the
    stripe. The order of the halves is that of the authors' code, so that its weights load; the paper names the
    horizontal stripes first. Of an odd number of heads, which the publication never has, the first half has one more;
    the authors' code would make one head fewer, and all of them wider. Where one stripe covers the whole grid, as in
    the published last stage, the publication runs all heads in one call; here the halves compute the same in two.

    A grid that stripe_width does not divide is zero-padded at the bottom and right after the projection. By default
    the padding is masked: the last stripe is narrower, and its convolution reads zeros beyond it. The authors' code
    for segmentation pads evenly on both sides, which displaces the stripes, and does not mask the padding, whose keys
    and values are zero. ``attend_padding=True`` computes that. Their code for classification refuses such a grid and
    every grid that is not square. In both, the last stage attends to the whole grid whatever its size: set a stripe as
    wide as the grid.

    Args:
        stripe_width: tokens across a stripe; published: 1, 2, 7, 7 by stage.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
        attend_padding: pad on both sides and do not mask the padding, as the code for segmentation.

    Raises:
        InvalidOption: num_heads is 1, which has no halves.
    """

    family = "axial"
    attends_to = "a stripe of rows, and one of columns"
    citation = "Dong et al., CSWin Transformer, CVPR 2022 (H-Attention, V-Attention, LePE)"
    equation = "attention in horizontal stripes by one half of the heads, in vertical ones by the other, + LePE"
    left_open = "odd heads: the first half gets one more"
    departs = (
        "padding masked, at the end (theirs: attend_padding, on both sides); the last stage is not global by itself"
    )
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
        qk_scale: float | int | None = None,
        attend_padding: bool = False,
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
        self.attend_padding = attend_padding
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = nn.ModuleList(depthwise(channels, 3, "lepe") for channels in self.dims)
        self.proj = nn.Linear(dim, dim)

    def stripes(self, height: int, width: int) -> tuple[TokenPartition, TokenPartition]:
        """The vertical and the horizontal stripes of a ``height x width`` grid."""
        sizes = (height, self.stripe_width), (self.stripe_width, width)
        first, second = (TokenPartition(height, width, size, mask_padding=not self.attend_padding) for size in sizes)
        return first, second

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        halves = self.qkv(x).split(3 * self.dims, dim=-1)
        stripes = self.stripes(*x.shape[1:3])
        half = self._half_between_padding if self.attend_padding else self._half
        out = [half(halves[i::2], stripes[i], i, self.chosen_impl(x)) for i in range(2)]
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

    def _half_between_padding(
        self, qkv: tuple[Float[Tensor, "b h w e"], ...], stripes: TokenPartition, half: int, impl: str
    ) -> Float[Tensor, "b h w e"]:
        """The same with the padding on both sides; of an odd number of rows or columns, one more at the end."""
        height, width = stripes.padded
        rows, cols = height - stripes.height, width - stripes.width
        top, left = rows // 2, cols // 2
        padded = tuple(F.pad(part, (0, 0, left, cols - left, top, rows - top)) for part in qkv)
        out = self._half(padded, replace(stripes, height=height, width=width), half, impl)
        return out[:, top : top + stripes.height, left : left + stripes.width]

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        padded = [stripes.padded[0] * stripes.padded[1] for stripes in self.stripes(height, width)]
        keys = self.stripe_width * height, self.stripe_width * width
        return Macs(
            projection=4 * n * self.dim**2,
            attention=sum(2 * tokens * seen * dim for tokens, seen, dim in zip(padded, keys, self.dims, strict=True)),
            local_conv=sum(9 * tokens * dim for tokens, dim in zip(padded, self.dims, strict=True)),
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        stripes = self.stripes(height, width)
        return sum(s.mean_keys() * dim for s, dim in zip(stripes, self.dims, strict=True)) / self.dim
