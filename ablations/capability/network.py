"""The network that is trained on every task: a linear stem, a few Blocks around one attention, a linear head."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo import Block, options


class Network(nn.Module):
    """(b, channels, patch h, patch w) to scores (b, classes, h, w).

    It knows no position but by the depthwise convolutions of its blocks; tasks that need one draw it into the image.

    Args:
        attention: a registered name; its ``options`` take their own defaults, except that grids are padded if needed.
    """

    def __init__(
        self, attention: str, channels: int, classes: int, patch: int, dim: int, num_heads: int, depth: int,
        **chosen: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        values = block_options(attention) | chosen
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads=num_heads, mlp_ratio=2, attention=attention, impl="auto", **values)
              for _ in range(depth))
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.embed.weight, std=1 / patch)
        nn.init.normal_(self.embed.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        x = self.blocks(self.embed(x)).permute(0, 2, 3, 1)
        return self.head(self.norm(x)).permute(0, 3, 1, 2)


def block_options(attention: str) -> dict[str, Any]:
    """The attention's own defaults of the options that Block has defaults for, which differ."""
    shared = set(inspect.signature(Block).parameters)
    values = {name: option.default for name, option in options(attention).items() if name in shared}
    return values | ({"auto_pad": True} if "auto_pad" in values else {})
