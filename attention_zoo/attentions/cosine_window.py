"""Scaled cosine attention within windows, with a position bias from log-spaced coordinates (Swin Transformer V2).

Shape legend: b batch, p windows, n tokens of a window, m heads, e channels of a head.
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.window import WindowAttention, relative_index
from attention_zoo.core.base import Impl, Macs
from attention_zoo.core.options import AtLeast0, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads, unit_length

LARGEST_SCALE = 100.0
"""Largest factor of the cosine: the temperature is at least 0.01."""
HIDDEN = 512
"""Hidden channels of the network that computes the position bias."""


@register("cosine_window")
class CosineWindowAttention(WindowAttention):
    """Attention within windows by cosine instead of dot product: softmax(cos(q, k) / tau + B) v.

    tau is learned per head, at least 0.01 and 0.1 at first. B is 16 * sigmoid of a two-layer network of the relative
    position in log-spaced coordinates, so that it extends to other window sizes. The keys' projection has no bias.
    The paper has no sigmoid, and takes log(1 + displacement). As in the published code, the displacement is a share of
    the largest, times 8, and the logarithm is to base 8.

    A grid that the window does not divide is padded at the bottom and right, and the padding is masked; the published
    code refuses such a grid. The publication alternates windows without and with a shift of half a window. A shift
    masks pairs from opposite borders with -inf, the published code with -100. Other scores range from -scale to
    scale + 16: from a scale of 42 on, such a pair can outweigh an unmasked one there. A scale is 10 at first and at
    most 100. The published code drops the shift and shrinks the window if the shorter side is no longer than a window;
    here neither changes: choose them to reach it.

    Args:
        window_size: tokens per side of a window, at least 2: one token has no relative position; published: 8 or 16,
            and 12 or 24 for models pretrained at 192 x 192 pixels.
        shift: displacement of the windows in tokens, less than window_size; published: half a window in every second
            block.
        pretrained_window_size: the window size by which coordinates are normalised, as for a model trained with
            another window; None: window_size.
        qkv_bias: whether the projections to q and v have a bias.

    Attributes:
        table_dtype: dtype in which coordinates are computed; None: that of the input, at least fp32. The published
            code computes them in fp32 for every input.
    """

    family = "local"
    attends_to = "its window, by cosine"
    citation = "Liu et al., Swin Transformer V2, CVPR 2022, equations 2 to 4 (scaled cosine attention, log-spaced CPB)"
    equation = "softmax(cos(q, k)/τ + 16 sigmoid(MLP(log-spaced Δ))) v in windows (eq. 2 to 4)"
    left_open = "padding: masked; shift per block: an option, 0; window: 8; sigmoid and scale of Δ: as the code"
    departs = (
        "ragged grids accepted; mask of -inf instead of -100; window and shift do not shrink on small grids; for fp64 "
        "coordinates in fp64 (theirs: fp32)"
    )
    table_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: Annotated[int, Range(2)] = 8,
        shift: AtLeast0 = 0,
        pretrained_window_size: Annotated[int, Range(2)] | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl, window_size=window_size, shift=shift, qkv_bias=False)
        self.pretrained_window_size = pretrained_window_size
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log())
        self.position_bias = PositionNetwork(num_heads, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        groups = self.groups(x.shape[1], x.shape[2])
        q, k, v = (split_heads(part, self.num_heads) for part in self._qkv(groups.partition(x)).chunk(3, dim=-1))
        largest = torch.full((), LARGEST_SCALE, device=x.device).log()
        scale = torch.clamp(self.logit_scale, max=largest).exp()
        q, k = unit_length(q) * scale, unit_length(k)
        mask, bias = groups.mask(v), self._position_bias(v)
        out = softmax_attention(
            q.to(v.dtype), k.to(v.dtype), v, 1, bias if mask is None else mask + bias, self.chosen_impl(x)
        )
        return self.proj(groups.merge(merge_heads(out)))

    def _qkv(self, windows: Float[Tensor, "b p n c"]) -> Float[Tensor, "b p n threec"]:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv(windows)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return F.linear(windows, self.qkv.weight, bias)

    def _position_bias(self, like: Tensor) -> Float[Tensor, "m n n"]:
        size = self.window_size
        dtype = self.table_dtype or torch.promote_types(self.logit_scale.dtype, torch.float32)
        steps = torch.arange(1 - size, size, dtype=dtype, device=like.device)
        axis = log_spaced(steps, self.pretrained_window_size or size)
        table = 16 * torch.sigmoid(self.position_bias(axis, axis)).flatten(0, 1)
        bias = table[relative_index(size, like.device)]
        # Contiguous: otherwise fused attention copies it once per window.
        return rearrange(bias, "q k m -> m q k").to(like.dtype).contiguous()

    def macs(self, height: int, width: int) -> Macs:
        positions = (2 * self.window_size - 1) ** 2
        return super().macs(height, width) + Macs(shared=self.position_bias.macs(positions))


class PositionNetwork(nn.Module):
    """Two layers from a relative position (y, x) to one number per head, with 512 channels between them."""

    def __init__(self, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, HIDDEN)
        self.out = nn.Linear(HIDDEN, num_heads, bias=bias)

    def forward(self, y: Float[Tensor, " r"], x: Float[Tensor, " c"]) -> Float[Tensor, "r c m"]:
        """The numbers of every pair of a coordinate along the columns and one along the rows."""
        positions = torch.stack(torch.broadcast_tensors(y[:, None], x[None, :]), dim=-1)
        return self.out(F.relu(self.hidden(positions.to(self.hidden.weight.dtype))))

    def macs(self, positions: int) -> int:
        """The cost of that many relative positions."""
        return positions * (self.hidden.weight.numel() + self.out.weight.numel())


def log_spaced(displacement: Float[Tensor, "*n"], side: int) -> Float[Tensor, "*n"]:
    """Displacements in tokens, as shares of a side of ``side`` tokens times 8, on a logarithmic scale to base 8."""
    scaled = displacement / max(side - 1, 1) * 8
    return torch.sign(scaled) * torch.log2(scaled.abs() + 1) / 3
