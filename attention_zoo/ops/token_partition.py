"""Grid <-> groups of tokens that attend among themselves: windows, stripes, dilated windows, sparse grids.

Shape legend: b batch, h w grid, p groups, n tokens of a group, q k the same tokens as queries and as keys, d channels.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from attention_zoo.ops import regions


@dataclass(frozen=True)
class TokenPartition:
    """A partition of a ``height x width`` grid into groups of ``size[0] x size[1]`` tokens.

    Neighbours within a group are ``dilation`` tokens apart; the tokens in between belong to other groups. A
    grid that the groups do not divide is zero-padded at the bottom and right. :meth:`mask` excludes the
    padding, so groups at the border are smaller. All pairs are (along the columns, along the rows).

    Args:
        height: rows of the grid.
        width: columns of the grid.
        size: tokens of a group per side.
        dilation: distance of a group's neighbours, in tokens.
        shift: displacement of the groups in tokens, at most ``size * dilation``; :meth:`mask` excludes query-key
            pairs that the roll brings together from opposite borders.
        mask_padding: whether :meth:`mask` excludes the padding. If not, padding is a key like any other.
    """

    height: int
    width: int
    size: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    shift: tuple[int, int] = (0, 0)
    mask_padding: bool = True

    @property
    def extent(self) -> tuple[int, int]:
        """Tokens per side of the smallest rectangle that whole groups fill."""
        return self.size[0] * self.dilation[0], self.size[1] * self.dilation[1]

    @property
    def padded(self) -> tuple[int, int]:
        """The grid's size with padding."""
        rows, cols = self.extent
        return -(-self.height // rows) * rows, -(-self.width // cols) * cols

    def partition(self, x: Shaped[Tensor, "b h w d"]) -> Shaped[Tensor, "b p n d"]:
        """Pad and cut a grid into groups; groups and the tokens of each are in row-major order."""
        x = regions.pad_to_multiple(x, *self.extent)
        x = _roll(x, -self.shift[0], -self.shift[1])
        (y, z), (r, s) = self.size, self.dilation
        return rearrange(x, "b (i y r) (j z s) d -> b (i j r s) (y z) d", y=y, z=z, r=r, s=s)

    def merge(self, tokens: Shaped[Tensor, "b p n d"]) -> Shaped[Tensor, "b h w d"]:
        """Undo :meth:`partition`."""
        (y, z), (r, s), rows = self.size, self.dilation, self.padded[0] // self.extent[0]
        x = rearrange(tokens, "b (i j r s) (y z) d -> b (i y r) (j z s) d", i=rows, y=y, z=z, r=r, s=s)
        return regions.crop(_roll(x, *self.shift), self.height, self.width)

    def mask(self, like: Tensor) -> Float[Tensor, "p 1 q k"] | Float[Tensor, "p 1 1 k"] | None:
        """Additive mask of the scores: -inf for excluded query-key pairs; None if no pair is excluded."""
        if any(self.shift):
            labels = self._labels(like.device)
            apart = labels[:, None, :, None] != labels[:, None, None, :]
        elif self.mask_padding and self.padded != (self.height, self.width):
            real = self._partition_plane(regions.inside(self.height, self.width, self.padded, like.device))
            # A group of padding only keeps its keys: a softmax over no keys would be NaN.
            apart = (~real & real.any(dim=1, keepdim=True))[:, None, None, :]
        else:
            return None
        return torch.zeros((), dtype=like.dtype, device=like.device).masked_fill(apart, float("-inf"))

    def _labels(self, device: torch.device) -> Int[Tensor, "p n"]:
        """Labels of tokens: a query attends only to keys of its label. Masked padding has one, the sides of a roll."""
        rows, cols = (torch.arange(length, device=device) for length in self.padded)
        wrapped = (rows < self.shift[0]).int()[:, None] * 2 + (cols < self.shift[1]).int()[None, :]
        if self.mask_padding:
            wrapped = torch.where(regions.inside(self.height, self.width, self.padded, device), wrapped, -1)
        return self._partition_plane(wrapped)

    def _partition_plane(self, plane: Shaped[Tensor, "hp wp"]) -> Shaped[Tensor, "p n"]:
        return self.partition(plane[None, :, :, None])[0, :, :, 0]

    def mean_keys(self) -> float:
        """The number of keys in a token's group, averaged over real tokens; padding counts unless it is masked."""
        return self._mean_along(0, self.height) * self._mean_along(1, self.width)

    def _mean_along(self, axis: int, length: int) -> float:
        step, extent, shift = self.dilation[axis], self.extent[axis], self.shift[axis]
        groups = [((at - shift) // extent, (at - shift) % step) for at in range(self.padded[axis])]
        members = Counter(groups[:length] if self.mask_padding else groups)
        return sum(members[group] for group in groups[:length]) / length


def _roll(x: Shaped[Tensor, "b h w d"], down: int, right: int) -> Shaped[Tensor, "b h w d"]:
    # One axis per call, as PyTorch does internally, so that the intermediate copy is visible from outside.
    x = x.roll(down, dims=1) if down else x
    return x.roll(right, dims=2) if right else x
