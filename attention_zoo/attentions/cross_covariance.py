"""Cross-covariance attention: channels attend to channels, by their covariance over all tokens.

Shape legend: b batch, h w grid, n tokens, m heads, d channels of a head.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, split_heads, unit_length


@register("cross_covariance")
class CrossCovarianceAttention(Attention):
    """Attention among the channels of a head: a d x d softmax, the same for every token of an image.

    Each channel of q and k, a vector over all tokens, is normalised to length 1. The weights are the softmax over key
    channels of their products, multiplied by a learned temperature per head, which starts at 1. The paper divides by
    the temperature; the published code multiplies, as does this class.

    It has no position encoding and fits every grid. The paper's local patch interaction is not part of it: that is a
    layer of the block, with its own LayerNorm, scale and residual.

    There is no ``sdpa``: with channels as tokens, a "head" would have as many channels as the image has tokens, which
    PyTorch's fused kernels do not take. The d x d weights are small.

    Args:
        qkv_bias: whether the qkv projection has a bias, as in the published models.
    """

    family = "channel"
    attends_to = "its own channels, by their covariance over all tokens"
    citation = "El-Nouby et al., XCiT: Cross-Covariance Image Transformers, NeurIPS 2021, section 3.2 (XCA)"
    equation = "v softmax(k̂ᵀ q̂ τ) among the channels of a head"
    left_open = "temperature: multiplied, as the code; local patch interaction: left to the block"
    departs = "nothing"
    exponent = 1

    def __init__(self, dim: int, num_heads: int, impl: Impl = "auto", *, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, impl)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        self.chosen_impl(x)
        tokens = rearrange(x, "b h w c -> b (h w) c")
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        q, k = unit_length(q, dim=-2), unit_length(k, dim=-2)
        weights: Float[Tensor, "b m d d"] = torch.softmax(q.transpose(-2, -1) @ k * self.temperature, dim=-1)
        out = merge_heads(v @ weights.transpose(-2, -1))
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1]))

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        return Macs(projection=4 * n * self.dim**2, attention=2 * n * self.dim**2 // self.num_heads)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return height * width
