"""Criss-cross attention: each token attends to its row and its column in one softmax, several times over.

Shape legend: b batch, h w grid, m heads, e channels of a head, y x the keys along a column and along a row.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, split_heads


@register("criss_cross")
class CrissCrossAttention(Attention):
    """Each token attends to the height + width - 1 tokens of its row and column, ``recurrence`` times.

    All passes share their weights; after two passes every token depends on every other. The token itself is
    counted once: its score along the column is masked, as published.

    Choices made to compare attentions at equal width: queries and keys of ``dim`` channels, several heads,
    scores scaled by head_dim ** -0.5, an output projection, and no residual. Published: queries and keys
    of dim / 8, one head, no scale, no projection, and a residual with a learned factor that starts at zero. That is
    num_heads 1, qk_reduction 8, qk_scale 1, out_proj false, residual true.

    There is no ``sdpa``: one softmax over two sets of keys needs either the normalisers, which PyTorch's fused
    attention does not return, or height * width masked keys per query.

    Args:
        recurrence: number of passes (the publication's R).
        qk_reduction: channels of queries and keys are dim / qk_reduction; published: 8.
        residual: each pass returns gamma * attention(x) + x, with gamma learned from 0.
        qkv_bias: whether the qkv projection has a bias, as published.
        qk_scale: factor of the scores; None or 0: channels of a head's queries ** -0.5; published: 1.
        out_proj: whether each pass ends with a linear map; published: false.

    Raises:
        InvalidOption: num_heads * qk_reduction does not divide dim.
    """

    family = "axial"
    attends_to = "its row and column at once, repeatedly"
    citation = "Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019 (affinity, aggregation)"
    equation = "softmax over row and column of q kᵀ, times v, repeated with shared weights"
    left_open = "nothing"
    departs = "defaults: heads, scale and output projection; the published layout by options"
    exponent = 1.5
    minimal_options = {"recurrence": 1}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        recurrence: AtLeast1 = 2,
        qk_reduction: AtLeast1 = 1,
        residual: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
        out_proj: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if dim % (num_heads * qk_reduction):
            valid = [str(ratio) for ratio in range(1, dim + 1) if dim % (num_heads * ratio) == 0]
            raise InvalidOption(f"qk_reduction={qk_reduction} is not valid; valid: {', '.join(valid)}")
        self.recurrence = recurrence
        self.qk_dim = dim // qk_reduction
        self.scale = qk_scale or (self.qk_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim) if out_proj else None
        self.gamma = nn.Parameter(torch.zeros(1)) if residual else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        self.chosen_impl(x)
        for _ in range(self.recurrence):
            crossed = self._cross(x)
            if self.proj is not None:
                crossed = self.proj(crossed)
            x = crossed if self.gamma is None else self.gamma * crossed + x
        return x

    def _cross(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        weights = torch.softmax(self._scores(q * self.scale, k), dim=-1)
        along_row, along_column = weights.split([x.shape[2], x.shape[1]], dim=-1)
        rows = merge_heads(along_row @ split_heads(v, self.num_heads))
        columns = merge_heads(rearrange(along_column, "b h m w y -> b w m h y") @ self._columns(v))
        return rows + rearrange(columns, "b w h c -> b h w c")

    def _scores(self, q: Float[Tensor, "b h w d"], k: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h m w l"]:
        """Scores of each query with its row, then with its column; l is width + height."""
        rows = split_heads(q, self.num_heads) @ split_heads(k, self.num_heads).transpose(-2, -1)
        columns = self._columns(q) @ self._columns(k).transpose(-2, -1)
        itself = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
        columns = columns.masked_fill(itself, float("-inf"))
        return torch.cat([rows, rearrange(columns, "b w m h y -> b h m w y")], dim=-1)

    def _columns(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b w m h e"]:
        return split_heads(rearrange(x, "b h w d -> b w h d"), self.num_heads)

    def macs(self, height: int, width: int) -> Macs:
        n = self.recurrence * height * width
        projected = 2 * self.qk_dim + (1 if self.proj is None else 2) * self.dim
        return Macs(
            projection=n * self.dim * projected,
            attention=n * (height + width) * (self.qk_dim + self.dim),
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.recurrence * (height + width - 1)
