"""Multi-axis attention: within windows, then within a sparse grid that spans the image."""

from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Attention, Impl, Macs
from attention_zoo.groups import Groups
from attention_zoo.options import Range
from attention_zoo.registry import register
from attention_zoo.window import WindowAttention

AtLeast2 = Annotated[int, Range(2)]


class GridAttention(WindowAttention):
    """Attention among window_size x window_size tokens spread evenly over the grid, however large it is.

    Along each axis of length L the tokens of a group are ceil(L / window_size) apart. Where window_size does
    not divide L, some groups have fewer tokens; the padding that fills them is masked out.
    """

    def groups(self, height: int, width: int) -> Groups:
        size = self.window_size
        return Groups(height, width, (size, size), dilation=(-(-height // size), -(-width // size)))


@register("block_grid")
class BlockGridAttention(Attention):
    """Two attention layers in sequence: within windows (block attention), then within a sparse grid.

    Each layer has projections and a relative position bias of its own, as published. The publication puts a
    residual and an MLP after each and a convolution block before both; those belong to the block around an
    attention, so the layers follow one another directly here, as in ``axial``.

    Args:
        window_size: tokens per side of a window, at least 2 (the publication's P).
        grid_size: tokens per side of the sparse grid, at least 2 (the publication's G).
        relative_position_bias: add a learned bias per head and relative position, in both layers.
        qkv_bias: whether the qkv projections have a bias.
    """

    attends_to = "its window, then a sparse grid"
    citation = "Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022 (Max-SA: block, then grid attention)"
    impls = ("reference", "sdpa")
    exponent = 1
    smallest = {"window_size": 2, "grid_size": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast2 = 7,
        grid_size: AtLeast2 = 7,
        relative_position_bias: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        shared = {"relative_position_bias": relative_position_bias, "qkv_bias": qkv_bias}
        self.block = WindowAttention(dim, num_heads, impl, window_size=window_size, **shared)
        self.grid = GridAttention(dim, num_heads, impl, window_size=grid_size, **shared)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.grid(self.block(x))

    def macs(self, height: int, width: int) -> Macs:
        return self.block.macs(height, width) + self.grid.macs(height, width)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.block.kv_tokens_per_query(height, width) + self.grid.kv_tokens_per_query(height, width)
