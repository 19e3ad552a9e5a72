"""Deformable attention: every token attends to a few sampled points, displaced by offsets predicted from the image.

Shape legend: b batch, h w grid, u v reference grid, n tokens, s points (u v), g offset groups, m heads, d channels
of a group.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads

CLAMPED = -1
"""The ``offset_range_factor`` of positions that are clamped to the grid, their offsets not limited."""

ReferencePoints = Literal["paper", "centres", "shifted"]


@register("deformable")
class DeformableAttention(Attention):
    """Keys and values are sampled at the points of a coarse grid, each displaced by an offset that the queries predict.

    The offset network is shared by the groups: depthwise convolution, LayerNorm, GELU, 1x1 convolution to two
    numbers, rows first. Sampling is bilinear, with corner points on corner tokens (``align_corners``) and zero outside
    the image. Where the reference points are and how far they move differs between the paper and its two codes:

    ========= ======================================= ================ ======================
    option    reference point i of n, from -1 to 1    half the spacing queries, for the bias
    ========= ======================================= ================ ======================
    paper     2i / (n - 1) - 1, corner to corner      1 / (n - 1)      corner to corner
    centres   (2i + 1) / n - 1, as the code of 2022   1 / n            at centres, too
    shifted   (2i + 1) / (n - 1) - 1, as that of 2023 1 / (n - 1)      corner to corner
    ========= ======================================= ================ ======================

    A tanh limits an offset to ``offset_range_factor`` times half the points' spacing. Factor -1 leaves offsets as they
    are and clamps the displaced points to the grid. The defaults are the first stage of DAT++-T in the code of 2023:
    shifted points, factor -1, the bias in every stage. DAT-T of 2022 uses ``reference_points="centres",
    offset_range_factor=2, stride=1``, in its last two stages only, with 3 and 6 groups.

    The code of 2022 refuses, with its bias, grids other than the one it is built for, and, in its first version, a
    stage that has none of 7, 12, 14, 24, 28, 48, 56, 96 tokens on a side. There a factor of 0 leaves offsets as they
    are, and -1 takes the tanh of the displaced points instead of clamping them; no model has either. The code of 2023
    divides by zero for a side of one token or point (a clamped point is then at the far border); here that point is in
    the middle. It does not pad for a kernel equal to the stride, which no model has. Both have ceil(side / stride)
    points, as here. For fixed points (no_off) the code of 2023 averages squares of stride x stride tokens, drops the
    bias and refuses a grid that the stride does not divide; factor 0 here samples, and keeps the bias. Three other
    position encodings of the code of 2023 (dwc_pe, fixed_pe, log_cpb), which no published model has, are left out.

    Args:
        stride: tokens per reference point and side, r in the paper.
        offset_kernel: side of the depthwise convolution, odd.
        offset_groups: groups of channels with separate offsets; must divide num_heads. Published: 1, 2, 4, 8 by stage,
            with 2, 4, 8, 16 heads.
        offset_range_factor: range of the offsets, s in the paper. -1: no limit, but positions are clamped to the grid.
            0: fixed points, without an offset network.
        reference_points: where the points are before they are displaced.
        relative_position_bias: add a learned bias per head, interpolated at the displacement between query and point.
        table_side: tokens per side of the grid that the bias table is made for; others are interpolated. Published:
            the grid at 224 x 224 pixels.
    """

    family = "sampled"
    attends_to = "points sampled where the image asks for it"
    citation = (
        "Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, section 3.2 (deformable attention); "
        "defaults: DAT++, arXiv 2023"
    )
    equation = "softmax(q k̃ᵀ/√d + B) ṽ over tokens sampled at reference points plus offsets"
    left_open = "offset range, reference points: as the code of 2023 (options: the paper, the code of 2022)"
    departs = (
        "a side of one point has it in the middle (the code of 2023 divides by zero); fixed points are sampled and "
        "keep the bias (theirs averages squares, without bias); kernel = stride is padded; one kv layer; no dwc_pe, "
        "fixed_pe, log_cpb"
    )
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"stride": 2, "offset_kernel": 3, "table_side": 4}
    by_stage = {
        "stride": (8, 4, 2, 1),
        "offset_kernel": (9, 7, 5, 3),
        "offset_groups": (1, 2, 4, 8),
        "table_side": (56, 28, 14, 7),
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        stride: AtLeast1 = 8,
        offset_kernel: AtLeast1 = 9,
        offset_groups: AtLeast1 = 1,
        offset_range_factor: Literal[-1] | Annotated[float | int, Range(0)] = -1,
        reference_points: ReferencePoints = "shifted",
        relative_position_bias: bool = True,
        table_side: Annotated[int, Range(2)] = 56,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if num_heads % offset_groups:
            raise InvalidOption(f"offset_groups={offset_groups} does not divide num_heads={num_heads}")
        self.stride, self.groups, self.reach = stride, offset_groups, offset_range_factor
        self.reference_points = reference_points
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.offset = OffsetNetwork(dim // offset_groups, offset_kernel, stride) if offset_range_factor else None
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty(num_heads, 2 * table_side - 1, 2 * table_side - 1)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.01))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        q = self.q(x)
        points = self.points(q)
        sampled = F.grid_sample(self._grouped(x), points.flip(-1), mode="bilinear", align_corners=True)
        sampled = rearrange(sampled, "(b g) d u v -> b (u v) (g d)", g=self.groups)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(sampled).chunk(2, dim=-1))
        bias = self._bias(points, x.shape[1], x.shape[2], q.dtype)
        q = split_heads(rearrange(q, "b h w c -> b (h w) c"), self.num_heads)
        out = merge_heads(softmax_attention(q, k, v, self.scale, bias, self.chosen_impl(x)))
        return self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1]))

    def points(self, q: Float[Tensor, "b h w c"]) -> Float[Tensor, "bg u v 2"]:
        """The sampling points as (y, x): -1 is the first token's centre, 1 the last one's."""
        counts = self._points_per_side(q.shape[1], q.shape[2])
        fixed = _grid(*counts, self.reference_points, q)
        if self.offset is None:
            return repeat(fixed, "u v yx -> bg u v yx", bg=q.shape[0] * self.groups)
        offset = self.offset(self._grouped(q))
        if self.reach == CLAMPED:
            return (fixed + offset).clamp(-1, 1)
        shorter = 0 if self.reference_points == "centres" else 1
        reach = [self.reach / max(count - shorter, 1) for count in counts]
        return fixed + torch.tanh(offset) * torch.tensor(reach, dtype=q.dtype, device=q.device)

    def _grouped(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "bg d h w"]:
        # Channels first in memory, as published: otherwise the convolution's kernel depends on the batch's stride.
        return rearrange(x, "b h w (g d) -> (b g) d h w", g=self.groups).contiguous()

    def _bias(
        self, points: Float[Tensor, "bg u v 2"], height: int, width: int, dtype: torch.dtype
    ) -> Float[Tensor, "b m n s"] | None:
        if self.relative_position_bias_table is None:
            return None
        corners: ReferencePoints = "centres" if self.reference_points == "centres" else "paper"
        queries = rearrange(_grid(height, width, corners, points), "h w yx -> (h w) 1 yx")
        displacement = (queries - rearrange(points, "bg u v yx -> bg 1 (u v) yx")) / 2
        table = repeat(
            self.relative_position_bias_table, "(g m) y x -> (b g) m y x", b=len(points) // self.groups, g=self.groups
        )
        bias = F.grid_sample(table, displacement.flip(-1), mode="bilinear", align_corners=True)
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
    """Maps the queries of a group to two numbers, rows first, for each reference point."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InvalidOption(f"offset_kernel={kernel} is even and would shift the points; valid: an odd integer")
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.to_offset = nn.Linear(channels, 2, bias=False)

    def forward(self, q: Float[Tensor, "b d h w"]) -> Float[Tensor, "b u v 2"]:
        return self.to_offset(F.gelu(self.norm(rearrange(self.depthwise(q), "b d u v -> b u v d"))))


def _grid(rows: int, cols: int, kind: ReferencePoints, like: Tensor) -> Float[Tensor, "u v 2"]:
    """The coordinates (y, x) of rows x cols points; 0 where a side has one point."""
    y, x = (_axis(count, kind, like) for count in (rows, cols))
    return torch.stack(torch.broadcast_tensors(y[:, None], x[None, :]), dim=-1)


def _axis(count: int, kind: ReferencePoints, like: Tensor) -> Float[Tensor, " n"]:
    if kind == "centres" or count == 1:
        first, last = 1 / count - 1, 1 - 1 / count
    else:
        shift = 1 / (count - 1) if kind == "shifted" else 0.0
        first, last = shift - 1, shift + 1
    return torch.linspace(first, last, count, dtype=like.dtype, device=like.device)
