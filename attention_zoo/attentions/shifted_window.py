"""Shifted-window attention: Swin's second kind of block, with windows across the borders of the first kind's."""

from typing import Annotated

from attention_zoo.attentions.window import WindowAttention
from attention_zoo.core.base import Impl
from attention_zoo.core.options import Range
from attention_zoo.core.registry import register
from attention_zoo.ops.token_partition import TokenPartition


@register("shifted_window")
class ShiftedWindowAttention(WindowAttention):
    """Windows displaced by half their size, with a learned bias per relative position: softmax(q k^T / sqrt(d) + B) v.

    The publication alternates plain and shifted windows from block to block. This is the shifted one; its cost
    and parameters equal those of the plain one (``window`` with relative_position_bias).

    The authors have two codes, which differ on a grid no larger than a window, or not divided by it:

    - That of classification drops the shift of both axes where the shorter side is no longer than a window, and
      shrinks the window to that side. Here only an axis that one window covers is not shifted, which is the same on
      square grids. The rest of the window is masked padding, so that the bias table's size does not depend on the
      input. Other grids that the window does not divide are refused there; here their padding is masked.
    - That of detection and segmentation pads every grid, does not mask the padding, and always shifts.
      ``attend_padding=True`` computes that.

    Args:
        window_size: tokens per side of a window, at least 2: one token can be neither shifted nor biased.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
        attend_padding: shift every axis, and do not mask the padding, as the code of detection and segmentation.
    """

    family = "local"
    attends_to = "its window, displaced by half a window"
    citation = "Liu et al., Swin Transformer, ICCV 2021, section 3.2 (shifted windows), equations 3 and 4"
    equation = "softmax(q kᵀ/√d + B) v in displaced windows (Swin, eq. 3, 4)"
    left_open = "small grids: an axis that one window covers is not displaced"
    departs = (
        "padding masked (theirs: attend_padding); mask of -inf instead of -100; the window does not shrink on small "
        "grids, and each axis keeps or drops its own shift"
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: Annotated[int, Range(2)] = 7,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            impl,
            window_size=window_size,
            shift=window_size // 2,
            relative_position_bias=True,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attend_padding=attend_padding,
        )

    def groups(self, height: int, width: int) -> TokenPartition:
        down, right = (self.shift if self.attend_padding or side > self.window_size else 0 for side in (height, width))
        return self._partition(height, width, shift=(down, right))
