"""Full attention: every token attends to every token of its image."""

from collections.abc import Callable

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads


@register("full")
class FullAttention(Attention):
    """Multi-head self-attention over the whole grid, scaled by head_dim ** -0.5; the Block's topk = -1.

    The paper's projections have no biases. The output projection has one here, as in vision transformers and in
    BiFormer's Block.

    Args:
        qkv_bias: whether the qkv projection has a bias (the paper and BiFormer's Block have none, ViT has one).
        impl: ``reference`` materialises the attention matrix, ``sdpa`` is PyTorch's fused attention.
    """

    family = "full"
    attends_to = "every token"
    citation = "Vaswani et al., Attention Is All You Need, NeurIPS 2017, eq. 1 (scaled dot-product attention)"
    equation = "softmax(q kᵀ/√d) v (eq. 1)"
    left_open = "biases: an option"
    departs = "an output projection with bias, as ViT; no masks, no dropout"
    impls = ("reference", "sdpa")
    exponent = 2

    def __init__(self, dim: int, num_heads: int, impl: Impl = "auto", *, qkv_bias: bool = False) -> None:
        super().__init__(dim, num_heads, impl)
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.proj(self._mix(x))

    def _mix(
        self, x: Float[Tensor, "b h w c"], local: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """Attention without the output projection, plus ``local`` of the values (b, h, w, c) if given."""
        height = x.shape[1]
        tokens = rearrange(x, "b h w c -> b (h w) c")
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        out = softmax_attention(q, k, v, self.scale, impl=self.chosen_impl(x))
        out = rearrange(merge_heads(out), "b (h w) c -> b h w c", h=height)
        return out if local is None else out + local(rearrange(v, "b m (h w) d -> b h w (m d)", h=height))

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        return Macs(projection=4 * n * self.dim**2, attention=2 * n**2 * self.dim)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return height * width
