"""Dilated windows: tokens attend within windows that skip the tokens in between."""

from attention_zoo.attentions.window import WindowAttention
from attention_zoo.core.base import Impl
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.token_partition import TokenPartition


@register("dilated")
class DilatedWindowAttention(WindowAttention):
    """Attention within windows of window_size x window_size tokens that are ``dilation`` tokens apart.

    The windows do not overlap: along each axis a token at position (i * window_size + j) * dilation + r, with
    j < window_size and r < dilation, attends to the tokens of equal i and r. This is the fixed-interval sampling
    of CrossFormer's long-distance attention (LDA), in windows of bounded size. In one dimension it equals
    LongNet's dilated segments (2023) with all offsets r. In CrossFormer itself a group spans the whole grid, so
    its size grows with the grid. DilateFormer (TMM 2023) centres a dilated window on each query instead; such
    sliding windows overlap and have different keys for each query.
    Choices: no position bias (CrossFormer learns one by an MLP), the same dilation for all heads and both axes.

    Args:
        dilation: distance of neighbours within a window, in tokens; 1 is ``window``.
        window_size: tokens per side of a window.
        qkv_bias: whether the qkv projection has a bias.
    """

    attends_to = "a window's worth of tokens, spaced apart"
    citation = "Wang et al., CrossFormer, ICLR 2022 (long-distance attention, LDA), in windows"
    minimal_options = {"window_size": 2, "dilation": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        dilation: AtLeast1 = 2,
        window_size: AtLeast1 = 7,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl, window_size=window_size, qkv_bias=qkv_bias)
        self.dilation = dilation

    def groups(self, height: int, width: int) -> TokenPartition:
        size = self.window_size
        return TokenPartition(height, width, (size, size), dilation=(self.dilation, self.dilation))
