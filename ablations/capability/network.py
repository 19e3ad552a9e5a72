"""The network that is trained on every task: a linear stem, a few Blocks around one attention, a linear head."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablations.capability.task import Task
from attention_zoo import Block, options

PERIODS = (4, 8, 16, 32, 64)
"""Of the sines and cosines of a position, in tokens."""
BIAS, POSITION = 0.5, 0.15
"""Initial scales of the stem's bias and of the position, beside content of scale 1."""


class Network(nn.Module):
    """(b, channels, patch h, patch w) to scores (b, classes, h, w).

    It knows no position but by the depthwise convolutions of its blocks. For tasks that ask for places the stem adds a
    linear map of sines and cosines of row and column, the same for every attention.

    Args:
        attention: a registered name; its ``options`` take their own defaults, except that grids are padded if needed.
    """

    def __init__(self, attention: str, task: Task, dim: int, num_heads: int, depth: int, **chosen: Any) -> None:
        super().__init__()
        self.embed = nn.Conv2d(task.channels, dim, task.patch, stride=task.patch, bias=False)
        self.bias = nn.Parameter(BIAS * torch.randn(dim, 1, 1))
        self.position = nn.Conv2d(4 * len(PERIODS), dim, 1, bias=False) if task.places else None
        values = block_options(attention) | chosen
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads=num_heads, mlp_ratio=2, attention=attention, impl="auto", **values)
              for _ in range(depth))
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, task.classes)
        # As large as an embedding of words: the usual small weights hide content behind the first normalisation.
        nn.init.normal_(self.embed.weight, std=1 / task.patch)
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=POSITION)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        """Scores of each class for each token."""
        x = self.embed(x) + self.bias
        if self.position is not None:
            x = x + self.position(coordinates(x))
        x = self.blocks(x).permute(0, 2, 3, 1)
        return self.head(self.norm(x)).permute(0, 3, 1, 2)


def block_options(attention: str) -> dict[str, Any]:
    """The attention's own defaults of the options that Block has other defaults for; grids are padded if needed."""
    shared = set(inspect.signature(Block).parameters)
    values = {name: option.default for name, option in options(attention).items() if name in shared}
    return values | ({"auto_pad": True} if "auto_pad" in values else {})


def coordinates(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 p h w"]:
    """Sines and cosines of row and column, on the grid of ``x``."""
    waves = []
    for axis in (-2, -1):
        shape = [1, 1, 1]
        shape[axis] = x.shape[axis]
        at = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype).reshape(shape)
        angle = 2 * torch.pi * at / torch.tensor(PERIODS, device=x.device, dtype=x.dtype).reshape(-1, 1, 1)
        waves += [wave.expand(-1, *x.shape[-2:]) for wave in (angle.sin(), angle.cos())]
    return torch.cat(waves)[None]
