"""Grid <-> groups of tokens that attend among themselves: windows, stripes, dilated windows, sparse grids.

Shape legend: b batch, h w grid, p groups, n tokens of a group, q k the same as queries and as keys, d channels.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from attention_zoo import regions


@dataclass(frozen=True)
class Groups:
    """A partition of a ``height x width`` grid into groups of ``size[0] x size[1]`` tokens.

    Neighbours within a group are ``dilation`` tokens apart; the tokens in between belong to other groups. A
    grid that the groups do not divide is zero-padded at the bottom and right, and :meth:`mask` leaves the
    padding out: a group at the border is simply smaller. All pairs are (along the columns, along the rows).

    Args:
        height: rows of the grid.
        width: columns of the grid.
        size: tokens of a group per side.
        dilation: distance of a group's neighbours, in tokens.
        shift: how far the groups are displaced, in tokens, at most ``size * dilation``; :meth:`mask` keeps apart
            what is rolled together from opposite borders.
    """

    height: int
    width: int
    size: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    shift: tuple[int, int] = (0, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """Tokens per side of the smallest rectangle that whole groups fill."""
        return self.size[0] * self.dilation[0], self.size[1] * self.dilation[1]

    @property
    def padded(self) -> tuple[int, int]:
        """The grid's size with padding."""
        rows, cols = self.reach
        return -(-self.height // rows) * rows, -(-self.width // cols) * cols

    def cut(self, x: Shaped[Tensor, "b h w d"]) -> Shaped[Tensor, "b p n d"]:
        """Pad and cut a grid into groups; groups and the tokens of each are in row-major order."""
        x = regions.pad_to_multiple(x, *self.reach)
        x = _roll(x, -self.shift[0], -self.shift[1])
        (y, z), (r, s) = self.size, self.dilation
        return rearrange(x, "b (i y r) (j z s) d -> b (i j r s) (y z) d", y=y, z=z, r=r, s=s)

    def join(self, tokens: Shaped[Tensor, "b p n d"]) -> Shaped[Tensor, "b h w d"]:
        """Undo :meth:`cut`."""
        (y, z), (r, s), rows = self.size, self.dilation, self.padded[0] // self.reach[0]
        x = rearrange(tokens, "b (i j r s) (y z) d -> b (i y r) (j z s) d", i=rows, y=y, z=z, r=r, s=s)
        return regions.crop(_roll(x, *self.shift), self.height, self.width)

    def mask(self, like: Tensor) -> Float[Tensor, "p 1 q k"] | Float[Tensor, "p 1 1 k"] | None:
        """To be added to scores: -inf where a query and a key must not meet; None if all may."""
        if any(self.shift):
            labels = self._labels(like.device)
            apart = labels[:, None, :, None] != labels[:, None, None, :]
        elif self.padded != (self.height, self.width):
            real = self._cut_plane(regions.inside(self.height, self.width, self.padded, like.device))
            # A group that is padding throughout keeps its keys: a softmax over none would be NaN.
            apart = (~real & real.any(dim=1, keepdim=True))[:, None, None, :]
        else:
            return None
        return torch.zeros((), dtype=like.dtype, device=like.device).masked_fill(apart, float("-inf"))

    def _labels(self, device: torch.device) -> Int[Tensor, "p n"]:
        """Which tokens may meet: equal labels only. Padding has one of its own, and so has each side of a roll."""
        rows, cols = (torch.arange(length, device=device) for length in self.padded)
        wrapped = (rows < self.shift[0]).int()[:, None] * 2 + (cols < self.shift[1]).int()[None, :]
        return self._cut_plane(torch.where(regions.inside(self.height, self.width, self.padded, device), wrapped, -1))

    def _cut_plane(self, plane: Shaped[Tensor, "hp wp"]) -> Shaped[Tensor, "p n"]:
        return self.cut(plane[None, :, :, None])[0, :, :, 0]

    def mean_keys(self) -> float:
        """Real tokens in the group of a token, the mean over tokens."""
        return self._mean_along(0, self.height) * self._mean_along(1, self.width)

    def _mean_along(self, axis: int, length: int) -> float:
        step, reach, shift = self.dilation[axis], self.reach[axis], self.shift[axis]
        members = Counter(((at - shift) // reach, (at - shift) % step) for at in range(length))
        return sum(count**2 for count in members.values()) / length


def _roll(x: Shaped[Tensor, "b h w d"], down: int, right: int) -> Shaped[Tensor, "b h w d"]:
    # Axis by axis, as PyTorch does within one call, so that the copy in between can be seen from outside.
    x = x.roll(down, dims=1) if down else x
    return x.roll(right, dims=2) if right else x
