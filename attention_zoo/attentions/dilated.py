"""Dilated windows: tokens attend within windows that skip the tokens in between.

Shape legend: r relative positions, m heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.window import WindowAttention
from attention_zoo.core.base import Impl, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.token_partition import TokenPartition

SMALLEST_HIDDEN = 16


@register("dilated")
class DilatedWindowAttention(WindowAttention):
    """Attention within windows of window_size x window_size tokens that are ``dilation`` tokens apart.

    The windows do not overlap: along each axis a token at position (i * window_size + j) * dilation + r, with
    j < window_size and r < dilation, attends to the tokens of equal i and r. This is CrossFormer's long-distance
    attention (LDA): window_size is its group size G, dilation its interval I. In one dimension it equals LongNet's
    dilated segments (2023) with all offsets r. DilateFormer (TMM 2023) centres a dilated window on each query
    instead; such sliding windows overlap, as in ``neighborhood`` with its dilation.

    The paper lets a group span the grid. Its code for classification keeps 7 x 7 tokens per group in every stage and
    sets the interval along an axis to side / 7, which is 8, 4, 2, 1 at 224 x 224 pixels; a side that 7 does not divide
    is refused. Its code for detection keeps both fixed and masks the padding, as here. On a grid with a side no longer
    than a group, both codes group adjacent tokens instead, in groups as wide as the shorter side (classification) or
    the longer one (detection). Here such a grid is dilated too: set dilation 1 and that window_size there.

    CrossFormer adds the dynamic position bias in every released model. Here it is off by default, so that ``dilated``
    differs from ``window`` in its windows only. The same dilation holds for all heads and both axes.

    Args:
        dilation: distance of neighbours within a window, in tokens; 1 is ``window``; published: 8, 4, 2, 1 by stage.
        window_size: tokens per side of a window; published: 7.
        dynamic_position_bias: add the bias of :class:`DynamicPositionBias`; published: true.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
    """

    family = "sampled"
    attends_to = "a window's worth of tokens, spaced apart"
    citation = "Wang et al., CrossFormer, ICLR 2022 (long-distance attention, LDA; dynamic position bias, DPB)"
    equation = "softmax(q kᵀ/√d + DPB(Δ)) v among tokens at a fixed interval"
    left_open = "ragged grids: masked padding"
    departs = (
        "DPB off by default, without its last bias, which has no effect; small grids are still dilated; one dilation "
        "for both axes (theirs for classification: side / 7 along each)"
    )
    minimal_options = {"window_size": 2, "dilation": 2}
    by_stage = {"dilation": (8, 4, 2, 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        dilation: AtLeast1 = 2,
        window_size: AtLeast1 = 7,
        dynamic_position_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, impl, window_size=window_size, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.dilation = dilation
        self.pos = DynamicPositionBias(dim, num_heads, window_size) if dynamic_position_bias else None

    def groups(self, height: int, width: int) -> TokenPartition:
        return self._partition(height, width, dilation=(self.dilation, self.dilation))

    def _bias_table(self) -> Float[Tensor, "r m"] | None:
        return None if self.pos is None else self.pos()

    def macs(self, height: int, width: int) -> Macs:
        cost = super().macs(height, width)
        return cost if self.pos is None else cost + Macs(shared=self.pos.macs())


class DynamicPositionBias(nn.Module):
    """A bias per head and relative position, from an MLP of the displacement (rows, columns) within a group.

    The displacement counts members of the group, so it does not depend on the dilation. A linear map to D channels is
    followed, three times, by LayerNorm, ReLU and a linear map, the last one to a channel per head. D is dim // 16, as
    in the authors' code; the paper says dim / 4. Below 16 channels their D would be 0; here it is 16. The modules have
    the authors' names. Their last bias is left out: it shifts all scores of a head alike, which softmax ignores.

    Args:
        dim: channels of the attention.
        num_heads: heads.
        size: tokens per side of a group.
    """

    def __init__(self, dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.size, self.num_heads = size, num_heads
        self.hidden = dim // 16 or SMALLEST_HIDDEN
        self.pos_proj = nn.Linear(2, self.hidden)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(self.hidden), nn.ReLU(), nn.Linear(self.hidden, out, bias=out_bias))
            for out, out_bias in ((self.hidden, True), (self.hidden, True), (num_heads, False))
        )

    def forward(self) -> Float[Tensor, "r m"]:
        """The bias of every displacement from (1 - size, 1 - size) to (size - 1, size - 1), in row-major order."""
        weight = self.pos_proj.weight
        axis = torch.arange(1 - self.size, self.size, device=weight.device, dtype=weight.dtype)
        displacements = torch.cartesian_prod(axis, axis)
        out: Tensor = self.pos3(self.pos2(self.pos1(self.pos_proj(displacements))))
        return out

    def macs(self) -> int:
        """The cost of one call."""
        return (2 * self.size - 1) ** 2 * self.hidden * (2 + 2 * self.hidden + self.num_heads)
