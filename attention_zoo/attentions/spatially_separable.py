"""Spatially separable attention: within windows, then to a sub-sampled grid."""

from jaxtyping import Float
from torch import Tensor

from attention_zoo.attentions.pooled import PooledAttention
from attention_zoo.attentions.window import WindowAttention
from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register


@register("spatially_separable")
class SpatiallySeparableAttention(Attention):
    """Two attention layers in sequence: locally grouped (windows), then global to sub-sampled keys and values.

    Each layer has its own projections. The second is ``pooled`` with its convolution, as published: keys and
    values come from a convolution of kernel and stride sr_ratio and a LayerNorm; with sr_ratio 1 there is
    neither. The paper compares several sub-sampling methods and selects this one. The published residual and
    MLP after each layer belong to the surrounding block, so here the layers are applied directly in sequence,
    as in ``axial``.

    A grid that the window does not divide is zero-padded, and the padding is masked. The authors' code for detection
    and segmentation pads too, but does not mask it; ``attend_padding=True`` computes that. Their code for
    classification refuses such a grid. Where sr_ratio does not divide the grid, see ``pooled``.

    Args:
        window_size: tokens per side of a window; 7 in all published models.
        sr_ratio: reduction per side of the second layer's keys and values; published: 8, 4, 2, 1 by stage.
        qkv_bias: whether the projections to q, k and v have a bias, in both layers; published: true.
        qk_scale: factor of the scores in both layers; None or 0: head_dim ** -0.5.
        attend_padding: do not mask the padding of a grid that window_size does not divide.
    """

    family = "pooled"
    attends_to = "its window, then a sub-sampled grid"
    citation = "Chu et al., Twins, NeurIPS 2021 (Twins-SVT: LSA, then GSA)"
    equation = "LSA: attention in windows; then GSA: attention to a sub-sampled grid"
    left_open = "ragged grids: masked padding"
    departs = "padding masked (theirs: attend_padding); residual and MLP left to the block"
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"window_size": 2, "sr_ratio": 2}
    by_stage = {"sr_ratio": (8, 4, 2, 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast1 = 7,
        sr_ratio: AtLeast1 = 8,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.local = WindowAttention(
            dim,
            num_heads,
            impl,
            window_size=window_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attend_padding=attend_padding,
        )
        self.sub_sampled = PooledAttention(
            dim, num_heads, impl, sr_ratio=sr_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale
        )

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.sub_sampled(self.local(x))

    def grid_multiple(self, height: int, width: int) -> int:
        return self.local.window_size

    def macs(self, height: int, width: int) -> Macs:
        return self.local.macs(height, width) + self.sub_sampled.macs(height, width)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.local.kv_tokens_per_query(height, width) + self.sub_sampled.kv_tokens_per_query(height, width)
