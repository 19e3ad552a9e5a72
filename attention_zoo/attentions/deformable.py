"""Deformable attention: every token attends to a few sampled points, displaced by offsets predicted from the image.

Shape legend: b batch, h w grid, u v reference grid, n tokens, s points (u v), g offset groups, m heads, d channels
of a group.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads

TABLE_SIDE = 2 * 14 - 1
"""Side of the relative position bias table, as published for the stage of 14 x 14 tokens. Positions are relative to the
grid's size and interpolated, so the table fits every grid."""


@register("deformable")
class DeformableAttention(Attention):
    """Keys and values are sampled at the points of a coarse grid, each displaced by an offset that the queries predict.

    The offset network is shared by the groups: depthwise convolution, LayerNorm, GELU, 1x1 convolution to two
    numbers. A tanh limits an offset to ``offset_range_factor`` times half the points' spacing. Sampling is
    bilinear, with corner points on corner tokens (``align_corners``) and zero outside the image. The reference
    points span the grid from corner to corner, as in the paper. The published code shifts them half a spacing
    down and right, and divides by zero for a side of one point; here that point is the middle.

    The published model of 2022 uses this in the stages of 14 and 7 tokens per side, with a stride of 1. Its
    successor (DAT++) uses it in all four, with strides 8, 4, 2, 1 and kernels 9, 7, 5, 3; the third values are the
    defaults here. A side that the stride does not divide has ceil(side / stride) points.

    Args:
        stride: tokens per reference point and side, r in the paper.
        offset_kernel: side of the depthwise convolution, odd.
        offset_groups: groups of channels with separate offsets; must divide num_heads.
        offset_range_factor: range of the offsets. 0: fixed points, without an offset network.
        relative_position_bias: add a learned bias per head, interpolated at the displacement between query
            and point (on in the published model).
    """

    family = "sampled"
    attends_to = "points sampled where the image asks for it"
    citation = "Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, section 3.2 (deformable attention)"
    equation = "softmax(q k̃ᵀ/√d + B) ṽ over tokens sampled at reference points plus offsets"
    left_open = "offset range and reference points: as the paper's text"
    departs = (
        "both published codes: the first has points at cell centres and a range of 1/H, the second shifts "
        "them by half a spacing"
    )
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"stride": 2, "offset_kernel": 3}
    by_stage = {"stride": (8, 4, 2, 1), "offset_kernel": (9, 7, 5, 3)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        stride: AtLeast1 = 2,
        offset_kernel: AtLeast1 = 5,
        offset_groups: AtLeast1 = 1,
        offset_range_factor: Annotated[float | int, Range(0)] = 2.0,
        relative_position_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if num_heads % offset_groups:
            raise InvalidOption(f"offset_groups={offset_groups} does not divide num_heads={num_heads}")
        self.stride, self.groups, self.reach = stride, offset_groups, offset_range_factor
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.offset = OffsetNetwork(dim // offset_groups, offset_kernel, stride) if offset_range_factor else None
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty(num_heads, TABLE_SIDE, TABLE_SIDE)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.01))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        q = self.q(x)
        points = self.points(q)
        image = self._grouped(x)
        sampled = F.grid_sample(image, points, mode="bilinear", align_corners=True)
        sampled = rearrange(sampled, "(b g) d u v -> b (u v) (g d)", g=self.groups)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(sampled).chunk(2, dim=-1))
        bias = self._bias(points, x.shape[1], x.shape[2], q.dtype)
        q = split_heads(rearrange(q, "b h w c -> b (h w) c"), self.num_heads)
        out = merge_heads(softmax_attention(q, k, v, self.scale, bias, self.chosen_impl(x)))
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1]))

    def points(self, q: Float[Tensor, "b h w c"]) -> Float[Tensor, "bg u v 2"]:
        """The sampling points as (x, y): -1 is the first token's centre, 1 the last one's."""
        rows, cols = self._points_per_side(q.shape[1], q.shape[2])
        fixed = _span(rows, cols, q)
        if self.offset is None:
            return repeat(fixed, "u v xy -> bg u v xy", bg=q.shape[0] * self.groups)
        offset = self.offset(self._grouped(q))
        sides = (cols, q.shape[2]), (rows, q.shape[1])
        reach = [self.reach / max(points - 1, 1) if tokens > 1 else 0.0 for points, tokens in sides]
        return fixed + torch.tanh(offset) * torch.tensor(reach, dtype=q.dtype, device=q.device)

    def _grouped(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "bg d h w"]:
        # Channels first in memory, as published: otherwise the convolution's kernel depends on the batch's stride.
        return rearrange(x, "b h w (g d) -> (b g) d h w", g=self.groups).contiguous()

    def _bias(
        self, points: Float[Tensor, "bg u v 2"], height: int, width: int, dtype: torch.dtype
    ) -> Float[Tensor, "b m n s"] | None:
        if self.relative_position_bias_table is None:
            return None
        queries = rearrange(_span(height, width, points), "h w xy -> (h w) 1 xy")
        displacement = (queries - rearrange(points, "bg u v xy -> bg 1 (u v) xy")) / 2
        table = repeat(
            self.relative_position_bias_table, "(g m) y x -> (b g) m y x", b=len(points) // self.groups, g=self.groups
        )
        bias = F.grid_sample(table, displacement, mode="bilinear", align_corners=True)
        return rearrange(bias, "(b g) m n s -> b (g m) n s", g=self.groups).to(dtype)

    def _points_per_side(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def macs(self, height: int, width: int) -> Macs:
        n, points = height * width, int(self.kv_tokens_per_query(height, width))
        kernel = 0 if self.offset is None else self.offset.depthwise.kernel_size[0]
        return Macs(
            projection=2 * (n + points) * self.dim**2,
            routing=0 if self.offset is None else points * self.dim * (kernel**2 + 2),
            attention=2 * n * points * self.dim,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        rows, cols = self._points_per_side(height, width)
        return rows * cols


class OffsetNetwork(nn.Module):
    """Maps the queries of a group to two numbers for each reference point."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InvalidOption(f"offset_kernel={kernel} is even and would shift the points; valid: an odd integer")
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.to_offset = nn.Linear(channels, 2, bias=False)

    def forward(self, q: Float[Tensor, "b d h w"]) -> Float[Tensor, "b u v 2"]:
        return self.to_offset(F.gelu(self.norm(rearrange(self.depthwise(q), "b d u v -> b u v d"))))


def _span(rows: int, cols: int, like: Tensor) -> Float[Tensor, "u v 2"]:
    """The coordinates (x, y) of rows x cols points that span [-1, 1] squared; 0 where a side has one point."""
    y, x = (torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) * (side > 1) for side in (rows, cols))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
