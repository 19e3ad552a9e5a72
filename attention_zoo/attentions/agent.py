"""Agent attention: a few pooled queries gather from all tokens, and every token reads from them.

Shape legend: b batch, h w grid, n tokens, a agents, m heads, d channels of a head.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast0, AtLeast1, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads

BLOCK_SIDE = 7
"""Side of the block bias, as published for every stage."""


@register("agent")
class AgentAttention(Attention):
    """Two softmax attentions: agents attend to all tokens, then all tokens attend to the agents.

    softmax(q a^T / sqrt(d) + B2) softmax(a k^T / sqrt(d) + B1) v + DWConv(v). Agents a are the queries, averaged over
    agents_per_side x agents_per_side parts of the grid. On a side with fewer tokens than agents, agents repeat.

    B1 and B2 have the form of the published code: each is the sum of a 7 x 7 block bias, interpolated to the grid, and
    of a row and a column bias, all per head and agent. The published classification models have rows and columns of
    one square grid. They refuse another number of tokens; PVT's accepts as many in another shape, and adds the biases
    in the order of the tokens. Here rows and columns are interpolated bilinearly, as in the authors' backbone for
    dense prediction. On a grid of table_side x table_side tokens they are used as they are.

    Departs from the published code: one qkv projection replaces the two of PVT, no class token as in DeiT, and no
    sub-sampling of keys and values, which the released models leave at 1. The backbone for dense prediction also
    interpolates the biases between agents, to have more agents than were trained; not here.

    Args:
        agents_per_side: agents per side of the grid. Published: 3, 4, 7, 7 in the four stages; 7 for DeiT.
        agent_bias: whether there are B1 and B2. With one agent there is no B2: it has no effect.
        table_side: tokens per side for which rows and columns have entries. Published: the grid at 224 x 224 pixels,
            56, 28, 14, 7 in the four stages; 14 for DeiT.
        dwc_kernel: kernel of the depthwise convolution of v, odd; 0: none.
        qkv_bias: whether the qkv projection has a bias.
    """

    family = "linear"
    attends_to = "a few agents, which attend to every token"
    citation = "Han et al., Agent Attention, ECCV 2024 (agent attention with agent bias and depthwise convolution)"
    equation = "softmax(q aᵀ/√d + B2) softmax(a kᵀ/√d + B1) v + DWConv(v), agents a: pooled queries"
    left_open = "other grids: tables of B1, B2 interpolated; fewer tokens than agents: agents repeat"
    departs = (
        "any grid (theirs for classification: one number of tokens); one qkv layer (PVT: two); no class token (DeiT); "
        "no sub-sampling; biases not interpolated between agents"
    )
    impls = ("reference", "sdpa")
    exponent = 1
    minimal_options = {"agents_per_side": 2, "table_side": 4}
    by_stage = {"agents_per_side": (3, 4, 7, 7), "table_side": (56, 28, 14, 7)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        agents_per_side: AtLeast1 = 7,
        agent_bias: bool = True,
        table_side: Annotated[int, Range(2)] = 14,
        dwc_kernel: AtLeast0 = 3,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.agents_per_side = agents_per_side
        self.table_side = table_side
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = depthwise(dim, dwc_kernel, "dwc_kernel") if dwc_kernel else None
        agents = agents_per_side**2
        self.gather_bias = AgentBias(num_heads, agents, table_side) if agent_bias else None
        # A softmax over one agent does not depend on a bias.
        self.broadcast_bias = AgentBias(num_heads, agents, table_side) if agent_bias and agents > 1 else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl = self.chosen_impl(x)
        qkv = self.qkv(x).chunk(3, dim=-1)
        agents = split_heads(self._pooled(qkv[0]), self.num_heads)
        q, k, v = (split_heads(rearrange(part, "b h w c -> b (h w) c"), self.num_heads) for part in qkv)
        gather, broadcast = self._biases(x.shape[1], x.shape[2], q.dtype)
        gathered: Float[Tensor, "b m a d"] = softmax_attention(agents, k, v, self.scale, gather, impl)
        out = merge_heads(softmax_attention(q, agents, gathered, self.scale, broadcast, impl))
        out = rearrange(out, "b (h w) c -> b h w c", h=x.shape[1])
        if self.dwc is not None:
            out = out + rearrange(self.dwc(rearrange(qkv[2], "b h w c -> b c h w")), "b c h w -> b h w c")
        return self.proj(out)

    def _pooled(self, q: Float[Tensor, "b h w c"]) -> Float[Tensor, "b a c"]:
        agents = F.adaptive_avg_pool2d(rearrange(q, "b h w c -> b c h w"), self.agents_per_side)
        return rearrange(agents, "b c y x -> b (y x) c")

    def _biases(
        self, height: int, width: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "m a n"] | None, Float[Tensor, "m n a"] | None]:
        gather, broadcast = (
            None if bias is None else bias(height, width).to(dtype) for bias in (self.gather_bias, self.broadcast_bias)
        )
        return gather, None if broadcast is None else broadcast.transpose(-2, -1)

    def macs(self, height: int, width: int) -> Macs:
        n, agents = height * width, self.agents_per_side**2
        kernel = 0 if self.dwc is None else self.dwc.kernel_size[0]
        return Macs(
            projection=4 * n * self.dim**2, attention=4 * n * agents * self.dim, local_conv=n * self.dim * kernel**2
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.agents_per_side**2


class AgentBias(nn.Module):
    """A learned bias per head, agent and token: a block, a row and a column bias, each interpolated to the grid."""

    def __init__(self, heads: int, agents: int, side: int) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.empty(heads, agents, BLOCK_SIDE, BLOCK_SIDE))
        self.rows = nn.Parameter(torch.empty(heads, agents, side, 1))
        self.columns = nn.Parameter(torch.empty(heads, agents, 1, side))
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, height: int, width: int) -> Float[Tensor, "m a n"]:
        block = F.interpolate(self.block, (height, width), mode="bilinear")
        rows = F.interpolate(self.rows, (height, 1), mode="bilinear")
        columns = F.interpolate(self.columns, (1, width), mode="bilinear")
        return (block + (rows + columns)).flatten(2)
