"""Attentions whose training fails in some way."""

import torch
from torch import Tensor, nn

from attention_zoo import register


class Mix(nn.Module):
    """A linear map of the channels."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


@register("untrainable_nan")
class NotANumber(Mix):
    """Gives no number from its third training step on."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += not x.is_meta
        return self.mix(x) * (float("nan") if self.steps > 2 else 1.0)


@register("untrainable_raise")
class Raise(Mix):
    """Raises on real tensors."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not x.is_meta:
            raise ValueError("no")
        return self.mix(x)


@register("untrainable_large")
class OneGrid(Mix):
    """Learns its grid by heart, and fits no other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.place = nn.Parameter(torch.zeros(14, 14, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) + self.place
