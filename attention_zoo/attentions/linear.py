"""Linear attention: a product of feature maps replaces the softmax, and keys are summed once for all queries.

Shape legend: b batch, m heads, n tokens, d channels of a head.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, split_heads


@register("linear")
class LinearAttention(Attention):
    """Attention with weights phi(q) . phi(k), phi(x) = elu(x) + 1: a control whose cost is linear in tokens.

    As published, the feature map is applied to unscaled queries and keys. The equations have no term that keeps the
    denominator from zero: here it is at least the smallest normal number. The published code adds 1e-6 to it instead
    (``eps``), and has separate projections of q, k and v.

    Args:
        eps: added to the denominator; published code: 1e-6. 0: none, as in the paper.
        qkv_bias: whether the qkv projection has a bias (the published layer has one).
    """

    family = "linear"
    attends_to = "a summary of all tokens"
    citation = "Katharopoulos et al., Transformers are RNNs, ICML 2020, eq. 5 (linearised attention) and 7 (elu + 1)"
    equation = "φ(q)(φ(k)ᵀv) / φ(q)Σφ(k)ᵀ, φ(x) = elu(x) + 1 (eq. 5, 7)"
    left_open = "denominator near 0: clamped, or eps"
    departs = "eps is 0 (code: 1e-6); one qkv layer"
    impls = ("reference",)
    exponent = 1

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        eps: Annotated[float | int, Range(0)] = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        tokens = rearrange(x, "b h w c -> b (h w) c")
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summary: Float[Tensor, "b m d d"] = k.transpose(-2, -1) @ v
        total: Float[Tensor, "b m n 1"] = q @ k.sum(dim=-2)[..., None]
        total = total + self.eps if self.eps else total.clamp_min(torch.finfo(total.dtype).tiny)
        out = q @ summary / total
        return self.proj(rearrange(merge_heads(out), "b (h w) c -> b h w c", h=x.shape[1]))

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        return Macs(projection=4 * n * self.dim**2, attention=n * self.dim * (2 * self.dim // self.num_heads + 1))

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return height * width
