"""Multi-axis attention: within windows, then within a sparse grid that spans the image.

Shape legend: b batch, h w grid, r relative positions, m heads.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.window import WindowAttention
from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import Range
from attention_zoo.core.registry import register
from attention_zoo.ops.token_partition import TokenPartition

AtLeast2 = Annotated[int, Range(2)]


class BlockAttention(WindowAttention):
    """Attention within windows, whose bias table may have the relative positions of another window size.

    Such a table is resized bilinearly whenever it is used.

    Args:
        window_size: tokens per side of a window.
        pretrained_window_size: the window size for which the bias table has entries; None: window_size.
        relative_position_bias: whether there is a bias.
        qkv_bias: whether the qkv projection has a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: int = 7,
        pretrained_window_size: int | None = None,
        relative_position_bias: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            impl,
            window_size=window_size,
            relative_position_bias=relative_position_bias,
            qkv_bias=qkv_bias,
        )
        self.pretrained_window_size = pretrained_window_size or window_size
        if relative_position_bias and self.pretrained_window_size != window_size:
            table = torch.empty((2 * self.pretrained_window_size - 1) ** 2, num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def _bias_table(self) -> Float[Tensor, "r m"] | None:
        table = super()._bias_table()
        if table is None or self.pretrained_window_size == self.window_size:
            return table
        image = rearrange(table, "(y x) m -> 1 m y x", y=2 * self.pretrained_window_size - 1)
        side = 2 * self.window_size - 1
        return rearrange(F.interpolate(image, (side, side), mode="bilinear"), "1 m y x -> (y x) m")


class GridAttention(BlockAttention):
    """Attention among window_size x window_size tokens spread evenly over a grid of any size.

    Along each axis of length L the tokens of a group are ceil(L / window_size) apart. Where window_size does
    not divide L, some groups have fewer tokens; their padding is masked.
    """

    def groups(self, height: int, width: int) -> TokenPartition:
        size = self.window_size
        return TokenPartition(height, width, (size, size), dilation=(-(-height // size), -(-width // size)))


@register("block_grid")
class BlockGridAttention(Attention):
    """Two attention layers in sequence: within windows (block attention), then within a sparse grid.

    Each layer has its own projections and relative position bias, as published. The publication adds a residual
    and an MLP after each layer and a convolution block before both. Those belong to the surrounding block, so
    here the layers are applied directly in sequence, as in ``axial``.

    The published models have windows of 7 tokens per side for images of 224 x 224 pixels, 12 for 384 x 384 and 16 for
    512 x 512, where the bias tables are still those of 7 and are resized bilinearly: pretrained_window_size=7.

    The authors' code refuses a grid that window_size or grid_size does not divide; here its padding is masked. Its
    bias table is indexed by key minus query, ours (and timm's) by query minus key: its weights load with the table
    reversed along both axes. Its softmax is computed in fp32 whatever the dtype, here in that of the scores.

    Args:
        window_size: tokens per side of a window, at least 2 (the publication's P).
        grid_size: tokens per side of the sparse grid, at least 2 (the publication's G).
        pretrained_window_size: the window size for which both bias tables have entries, resized to window_size and
            grid_size; None: no resizing.
        relative_position_bias: add a learned bias per head and relative position, in both layers.
        qkv_bias: whether the qkv projections have a bias.
    """

    family = "sampled"
    attends_to = "its window, then a sparse grid"
    citation = "Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022 (Max-SA: block, then grid attention)"
    equation = "attention in windows, then in a sparse grid over the image, each with B"
    left_open = "ragged grids: masked padding"
    departs = (
        "theirs refuses ragged grids; its bias table is reversed on both axes; softmax in the dtype of the scores "
        "(theirs: fp32)"
    )
    impls = ("reference", "sdpa")
    exponent = 1
    minimal_options = {"window_size": 2, "grid_size": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast2 = 7,
        grid_size: AtLeast2 = 7,
        pretrained_window_size: AtLeast2 | None = None,
        relative_position_bias: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        shared: dict[str, Any] = {
            "pretrained_window_size": pretrained_window_size,
            "relative_position_bias": relative_position_bias,
            "qkv_bias": qkv_bias,
        }
        self.block = BlockAttention(dim, num_heads, impl, window_size=window_size, **shared)
        self.grid = GridAttention(dim, num_heads, impl, window_size=grid_size, **shared)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.grid(self.block(x))

    def grid_multiple(self, height: int, width: int) -> int:
        return self.block.window_size

    def macs(self, height: int, width: int) -> Macs:
        return self.block.macs(height, width) + self.grid.macs(height, width)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.block.kv_tokens_per_query(height, width) + self.grid.kv_tokens_per_query(height, width)
