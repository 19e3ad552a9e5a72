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
    and parameters equal those of the plain one (``window`` with relative_position_bias). The published code
    drops the shift on a grid no larger than one window. Here an axis that one window covers is not shifted,
    which is the same on square grids. The published code also shrinks the window to such a grid; here the rest
    of the window is masked padding, so that the bias table's size does not depend on the input.

    Args:
        window_size: tokens per side of a window, at least 2: one token can be neither shifted nor biased.
        qkv_bias: whether the qkv projection has a bias.
    """

    attends_to = "its window, displaced by half a window"
    citation = "Liu et al., Swin Transformer, ICCV 2021, section 3.2 (shifted windows, relative position bias)"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: Annotated[int, Range(2)] = 7,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            impl,
            window_size=window_size,
            shift=window_size // 2,
            relative_position_bias=True,
            qkv_bias=qkv_bias,
        )

    def groups(self, height: int, width: int) -> TokenPartition:
        size = self.window_size
        down, right = (self.shift if side > size else 0 for side in (height, width))
        return TokenPartition(height, width, (size, size), shift=(down, right))
