"""Window attention: tokens attend within fixed-size windows that do not overlap, optionally shifted.

Shape legend: b batch, p windows, n tokens of a window, m heads, d channels of a head.
"""

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo import regions
from attention_zoo.attend import attend, merge_heads, split_heads
from attention_zoo.contract import Attention, Impl, InvalidOption, Macs
from attention_zoo.options import AtLeast0, AtLeast1
from attention_zoo.registry import register


@register("window")
class WindowAttention(Attention):
    """Attention within non-overlapping windows of window_size x window_size tokens.

    A grid that the window does not divide is padded at the bottom and right, and padding is masked out: a
    window at the border is simply smaller. A shift rolls the grid by ``shift`` tokens first and masks
    what the roll brings together from opposite borders.

    Args:
        window_size: tokens per side of a window.
        shift: how far the windows are displaced, less than window_size; 0 is none.
        relative_position_bias: add a learned bias per head and relative position (Swin, eq. 4).
        qkv_bias: whether the qkv projection has a bias.
    """

    citation = "Liu et al., Swin Transformer, ICCV 2021, section 3.2"
    impls = ("reference", "sdpa")
    smallest = {"window_size": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast1 = 7,
        shift: AtLeast0 = 0,
        relative_position_bias: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if shift >= window_size:
            raise InvalidOption(f"shift={shift} is not valid; valid: 0 to window_size - 1 = {window_size - 1}")
        self.window_size = window_size
        self.shift = shift
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty((2 * window_size - 1) ** 2, num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        size, (height, width) = self.window_size, x.shape[1:3]
        padded = regions.pad_to_multiple(x, size, size)
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), dims=(1, 2))
        rows, cols = padded.shape[1] // size, padded.shape[2] // size
        windows = rearrange(regions.to_regions(padded, rows, cols), "b p y x c -> b p (y x) c")
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(windows).chunk(3, dim=-1))
        bias = self._bias(height, width, padded.shape[1:3], q)
        out = merge_heads(attend(q, k, v, self.scale, bias, self.chosen_impl(x)))
        out = regions.from_regions(rearrange(out, "b p (y x) c -> b p y x c", y=size), rows, cols)
        if self.shift:
            out = out.roll((self.shift, self.shift), dims=(1, 2))
        return self.proj(regions.crop(out, height, width))

    def _bias(self, height: int, width: int, padded: torch.Size, like: Tensor) -> Tensor | None:
        """Relative position bias (m, n, n) and mask (p, 1, n, n), added; None where neither is needed."""
        bias = None
        if self.relative_position_bias_table is not None:
            index = relative_index(self.window_size, like.device)
            bias = rearrange(self.relative_position_bias_table[index], "q k m -> m q k").to(like.dtype)
        if self.shift or tuple(padded) != (height, width):
            labels = self._labels(height, width, padded, like.device)
            mask = torch.zeros((), dtype=like.dtype, device=like.device).masked_fill(
                labels[:, None, :, None] != labels[:, None, None, :], float("-inf")
            )
            bias = mask if bias is None else mask + bias
        return bias

    def _labels(self, height: int, width: int, padded: torch.Size, device: torch.device) -> Int[Tensor, "p n"]:
        """Which tokens may meet: equal labels only. Padding has one of its own, and so has each side of a roll."""
        rows, cols = torch.arange(padded[0], device=device), torch.arange(padded[1], device=device)
        wrapped = (rows < self.shift).int()[:, None] * 2 + (cols < self.shift).int()[None, :]
        labels = torch.where(regions.inside(height, width, (padded[0], padded[1]), device), wrapped, -1)
        if self.shift:
            labels = labels.roll((-self.shift, -self.shift), dims=(0, 1))
        size = self.window_size
        cut = regions.to_regions(labels[None, :, :, None], padded[0] // size, padded[1] // size)
        return rearrange(cut, "1 p y x 1 -> p (y x)")

    def macs(self, height: int, width: int) -> Macs:
        size = self.window_size
        padded = -(-height // size) * -(-width // size) * size**2
        return Macs(
            projection=(3 * padded + height * width) * self.dim**2,
            attention=2 * padded * size**2 * self.dim,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float:
        return self._mean_length(height) * self._mean_length(width)

    def _mean_length(self, length: int) -> float:
        """Mean over tokens of the length of the piece of a window, per axis, that a token shares."""
        size, shift = self.window_size, self.shift
        cuts = sorted({0, length, *range(shift, length, size)})
        return sum((b - a) ** 2 for a, b in pairwise(cuts)) / length


def relative_index(size: int, device: torch.device) -> Int[Tensor, "n n"]:
    """For each pair of tokens of a size x size window, the row of the relative position bias table."""
    y, x = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(size, device=device), torch.arange(size, device=device), indexing="ij")
    )
    dy = y[:, None] - y[None, :] + size - 1
    dx = x[:, None] - x[None, :] + size - 1
    return dy * (2 * size - 1) + dx
