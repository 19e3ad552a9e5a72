"""Neighborhood attention: every token attends to the kernel_size x kernel_size tokens around it.

Shape legend: b batch, h w grid, n tokens, k keys of a token, m heads, e channels of a head.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.attentions.neighborhood import flex
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import softmax_attention


@register("neighborhood")
class NeighborhoodAttention(Attention):
    """A window centred on its query; at the border it stays inside the grid (NAT).

    Every query has exactly kernel_size ** 2 keys; along a side shorter than kernel_size the window spans that side.

    Args:
        kernel_size: tokens per side of a window, odd.
        relative_position_bias: add a learned bias per head and relative position (on in the published model).
        qkv_bias: whether the qkv projection has a bias.
        impl: ``reference`` and ``sdpa`` gather the keys of each query; ``flex`` is PyTorch's FlexAttention with a
            block mask that is built in every step.
    """

    attends_to = "the tokens around it"
    citation = "Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (neighborhood attention)"
    impls = ("reference", "sdpa", "flex")
    exponent = 1
    minimal_options = {"kernel_size": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        kernel_size: AtLeast1 = 7,
        relative_position_bias: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if kernel_size % 2 == 0:
            raise InvalidOption(f"kernel_size={kernel_size} is even and has no middle; valid: an odd integer")
        self.kernel_size = kernel_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl, qkv, table = self.chosen_impl(x), self.qkv(x), self.relative_position_bias_table
        if impl == "flex" and not x.is_meta:
            mixed = flex.attend(qkv, self.num_heads, self.kernel_size, self.scale, table)
        else:
            mixed = self._gathered(qkv, impl)
        return self.proj(mixed)

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        """Why ``impl`` cannot run on ``x``."""
        # On meta tensors flex counts the products of the gathered implementation, which are the same.
        if impl != "flex" or (x.is_meta and self.impl == "flex"):
            return None
        return flex.unsupported(x, self.dim // self.num_heads)

    def _gathered(self, qkv: Float[Tensor, "b h w threec"], impl: str) -> Float[Tensor, "b h w c"]:
        height, width = qkv.shape[1:3]
        tokens = rearrange(qkv, "b h w c -> b (h w) c")
        q, kv = tokens.split([self.dim, 2 * self.dim], dim=-1)
        rows, cols = (neighbours(side, self.kernel_size, qkv.device) for side in (height, width))
        index = rearrange(rows[:, None, :, None] * width + cols[None, :, None, :], "h w y x -> (h w) (y x)")
        near = kv.contiguous().index_select(1, index.flatten())
        k, v = rearrange(near, "b (n k) (t m e) -> t b n m k e", n=len(index), t=2, m=self.num_heads)
        q = rearrange(q, "b n (m e) -> b n m 1 e", m=self.num_heads)
        out = softmax_attention(q, k, v, self.scale, self._bias(rows, cols, q.dtype), impl)
        return rearrange(out, "b (h w) m 1 e -> b h w (m e)", h=height)

    def _bias(self, rows: Int[Tensor, "h y"], cols: Int[Tensor, "w x"], dtype: torch.dtype) -> Tensor | None:
        """The bias of each token's keys, (n, m, 1, k), or None."""
        if self.relative_position_bias_table is None:
            return None
        dy, dx = (
            near - torch.arange(len(near), device=near.device)[:, None] + self.kernel_size - 1 for near in (rows, cols)
        )
        index = dy[:, None, :, None] * (2 * self.kernel_size - 1) + dx[None, :, None, :]
        bias = self.relative_position_bias_table.flatten(1).index_select(1, index.flatten())
        return rearrange(bias, "m (n k) -> n m 1 k", n=len(rows) * len(cols)).to(dtype)

    def macs(self, height: int, width: int) -> Macs:
        n, keys = height * width, int(self.kv_tokens_per_query(height, width))
        return Macs(projection=4 * n * self.dim**2, attention=2 * n * keys * self.dim)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return min(self.kernel_size, height) * min(self.kernel_size, width)


def neighbours(length: int, kernel: int, device: torch.device) -> Int[Tensor, "n k"]:
    """The keys of each token along one axis of ``length`` tokens."""
    size = min(kernel, length)
    start = (torch.arange(length, device=device) - size // 2).clamp(0, length - size)
    return start[:, None] + torch.arange(size, device=device)
