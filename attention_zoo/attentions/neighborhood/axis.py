"""The windows of neighborhood attention along one axis of the grid.

Shape legend: n tokens of the axis, k keys of a token.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: which tokens each token attends to.

    Tokens of equal position modulo ``dilation`` form a group, and attend among themselves.

    Args:
        length: tokens.
        kernel: tokens of a window.
        dilation: distance of a window's tokens.
        stride: tokens of a group that share a window.
    """

    length: int
    kernel: int
    dilation: int = 1
    stride: int = 1

    @property
    def most_keys(self) -> int:
        """The keys of a token in the largest group."""
        return min(self.kernel, -(-self.length // self.dilation))

    @property
    def ragged(self) -> bool:
        """Whether tokens differ in their number of keys."""
        return self.most_keys > min(self.kernel, max(self.length // self.dilation, 1))

    def mean_keys(self, tokens: int) -> float | int:
        """The number of keys of a token, averaged over the first ``tokens`` tokens; an integer if all are equal."""
        if not self.ragged:
            return self.most_keys
        groups = [range(at % self.dilation, self.length, self.dilation) for at in range(tokens)]
        return sum(min(self.kernel, len(group)) for group in groups) / tokens

    def keys(self, device: torch.device) -> Int[Tensor, "n k"]:
        """The keys of each token; where its group has fewer than ``most_keys``, the last one again."""
        at = torch.arange(self.length, device=device)[:, None]
        return torch.minimum(self._members(device), self._sizes(device) - 1) * self.dilation + at % self.dilation

    def present(self, device: torch.device) -> Bool[Tensor, "n k"]:
        """Whether each of :meth:`keys` is a key, not a repetition."""
        return self._members(device) < self._sizes(device)

    def displacements(self, device: torch.device) -> Int[Tensor, "n k"]:
        """Key minus query for each of :meth:`keys`, in tokens of the group."""
        at = torch.arange(self.length, device=device)[:, None]
        return torch.minimum(self._members(device), self._sizes(device) - 1) - at // self.dilation

    def _members(self, device: torch.device) -> Int[Tensor, "n k"]:
        """The keys of each token by their place in its group."""
        place, sizes = torch.arange(self.length, device=device)[:, None] // self.dilation, self._sizes(device)
        leader = torch.minimum(place // self.stride * self.stride + self.stride // 2, sizes - 1)
        start = torch.minimum(leader - self.kernel // 2, sizes - self.kernel).clamp_min(0)
        return start + torch.arange(self.most_keys, device=device)

    def _sizes(self, device: torch.device) -> Int[Tensor, "n 1"]:
        """The number of tokens in each token's group."""
        group = torch.arange(self.length, device=device)[:, None] % self.dilation
        return (self.length - 1 - group) // self.dilation + 1
