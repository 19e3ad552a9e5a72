"""Focused linear attention: a feature map that sharpens directions and keeps norms, and a convolution of the values.

Shape legend: b batch, h w grid, n tokens, m heads, d channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast0, AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, split_heads

EPSILON = 1e-6
"""Added to the feature map and to the denominator, as in the published code."""


@register("focused_linear")
class FocusedLinearAttention(Attention):
    """Linear attention with phi(x) = f(ReLU(x)), f(x) = |x| / |x^p| x^p per element, plus a convolution of the values.

    O = phi(q) (phi(k)^T v) / (phi(q) sum phi(k)^T) + DWConv(v).

    The paper's equations are those of one head; in the published code, and here, norms are over all channels of a
    token. Open in the paper, and here as in the code: queries and keys are divided by the softplus of a learned scale
    per channel. A learned position encoding is added to the keys. 1e-6 is added after the ReLU and to the denominator,
    which uses the mean of the keys. The convolution has one kernel per channel of a head, which the heads share.

    The published position encoding has the size of one square grid. The code refuses another number of tokens; that
    of PVT accepts as many in another shape, and adds the encoding in the order of the tokens. Here it is interpolated
    bilinearly, as the authors do with the position embedding of their PVT. On a grid of table_side x table_side
    tokens it is used as it is.

    Departs from the published code: one qkv projection replaces the two of PVT, and there is no sub-sampling of keys
    and values, which the released models leave at 1. The variant of CSWin keeps that model's 3x3 convolution of v
    beside this one; not here. Before the power, a token is divided by its largest channel. The map does not depend on
    that factor, which keeps the power of a large p in the range of numbers.

    Args:
        focusing_factor: the power p.
        dwc_kernel: kernel of the depthwise convolution of v, odd; 0: none.
        positional_encoding: add the position encoding to the keys.
        table_side: tokens per side of the position encoding. Published: the grid at 224 x 224 pixels, 56, 28, 14, 7
            in the four stages.
        qkv_bias: whether the qkv projection has a bias.
    """

    family = "linear"
    attends_to = "a summary of all tokens, plus a local convolution"
    citation = (
        "Han et al., FLatten Transformer, ICCV 2023, eq. 4 (linear attention), 6 (focused function) and 12 (with "
        "convolution)"
    )
    equation = "φ(q)(φ(k)ᵀv) / φ(q)Σφ(k)ᵀ + DWConv(v), φ(x) = f(ReLU(x)), f(x) = |x|/|xᵖ| xᵖ (eq. 4, 6, 12)"
    left_open = (
        "norms: over all channels (equations: of a head); learned scale and position encoding: as the code; other "
        "grids: encoding interpolated"
    )
    departs = (
        "any grid (theirs: one number of tokens); one qkv layer (PVT: two); no sub-sampling; no second convolution "
        "(CSWin); tokens divided by their largest channel before the power, which changes no value"
    )
    exponent = 1
    minimal_options = {"dwc_kernel": 3, "table_side": 4}
    by_stage = {"table_side": (56, 28, 14, 7)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        focusing_factor: AtLeast1 = 3,
        dwc_kernel: AtLeast0 = 5,
        positional_encoding: bool = True,
        table_side: AtLeast1 = 56,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.focusing_factor = focusing_factor
        self.table_side = table_side
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = depthwise(dim // num_heads, dwc_kernel, "dwc_kernel") if dwc_kernel else None
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, table_side**2, dim)) if positional_encoding else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        self.chosen_impl(x)
        height, width = x.shape[1:3]
        q, k, v = self.qkv(rearrange(x, "b h w c -> b (h w) c")).chunk(3, dim=-1)
        if self.positional_encoding is not None:
            k = k + self._positions(self.positional_encoding, height, width)
        q, k, v = (split_heads(part, self.num_heads) for part in (self._focused(q), self._focused(k), v))
        summary: Float[Tensor, "b m d d"] = k.transpose(-2, -1) @ v / (height * width)
        total: Float[Tensor, "b m n 1"] = q @ k.mean(dim=-2)[..., None]
        out = merge_heads(q @ summary / (total + EPSILON))
        if self.dwc is not None:
            local = self.dwc(rearrange(v, "b m (h w) d -> (b m) d h w", h=height))
            out = out + rearrange(local, "(b m) d h w -> b (h w) (m d)", m=self.num_heads)
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=height))

    def _focused(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = (F.relu(x) + EPSILON) / F.softplus(self.scale)
        power = (x / x.detach().amax(dim=-1, keepdim=True)) ** self.focusing_factor
        return power * (x.norm(dim=-1, keepdim=True) / power.norm(dim=-1, keepdim=True))

    def _positions(self, table: Float[Tensor, "1 s c"], height: int, width: int) -> Float[Tensor, "1 n c"]:
        image = rearrange(table, "1 (y x) c -> 1 c y x", y=self.table_side)
        return rearrange(F.interpolate(image, (height, width), mode="bilinear"), "1 c h w -> 1 (h w) c")

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        kernel = 0 if self.dwc is None else self.dwc.kernel_size[0]
        return Macs(
            projection=4 * n * self.dim**2,
            attention=n * self.dim * (2 * self.dim // self.num_heads + 1),
            local_conv=n * self.dim * kernel**2,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return height * width
