"""Axial attention: along rows, then along columns."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads


@register("axial")
class AxialAttention(Attention):
    """Two attention layers in sequence: each token attends to its row, then to its column.

    Each layer has its own projections, as published; together they cover the whole grid. The publication leaves the
    order of the axes open. Its code attends to rows first, as here; a third party's port for PyTorch
    (lucidrains/axial-attention) attends to columns first, and its layer adds both instead of chaining them.

    The authors' code surrounds each layer by LayerNorm, a residual and an MLP, which belong to the surrounding block,
    so here the layers are applied directly in sequence. It masks later tokens in the layers of its decoder; here no
    token is masked. Its projections to q, k and v have biases; here they are off by default.

    Args:
        qkv_bias: whether the projections to q, k and v have a bias; in the authors' code: true.
    """

    family = "axial"
    attends_to = "its row, then its column"
    citation = "Ho et al., Axial Attention in Multidimensional Transformers, 2019 (row attention, column attention)"
    equation = "attention along rows, then along columns"
    left_open = "order: rows first, as theirs"
    departs = "biases of q, k, v off by default; no masks; normalisation, residual and MLP left to the block"
    impls = ("reference", "sdpa")
    exponent = 1.5

    def __init__(self, dim: int, num_heads: int, impl: Impl = "auto", *, qkv_bias: bool = False) -> None:
        super().__init__(dim, num_heads, impl)
        self.scale = (dim // num_heads) ** -0.5
        self.qkv_rows = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_rows = nn.Linear(dim, dim)
        self.qkv_cols = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_cols = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl = self.chosen_impl(x)
        x = self._along_last(x, self.qkv_rows, self.proj_rows, impl)
        columns = self._along_last(rearrange(x, "b h w c -> b w h c"), self.qkv_cols, self.proj_cols, impl)
        return rearrange(columns, "b w h c -> b h w c")

    def _along_last(
        self, x: Float[Tensor, "b l n c"], qkv: nn.Linear, proj: nn.Linear, impl: str
    ) -> Float[Tensor, "b l n c"]:
        q, k, v = (split_heads(part, self.num_heads) for part in qkv(x).chunk(3, dim=-1))
        return proj(merge_heads(softmax_attention(q, k, v, self.scale, impl=impl)))

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        return Macs(projection=8 * n * self.dim**2, attention=2 * n * (height + width) * self.dim)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return height + width
