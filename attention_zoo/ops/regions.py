"""Grid <-> regions: the mathematics shared by all windowed attentions.

Shape legend: b batch, h w grid, p regions (row-major), r c regions per column and per row,
y x tokens of one region per side, d channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Shaped
from torch import Tensor


def pad_to_multiple(x: Shaped[Tensor, "b h w d"], rows: int, cols: int) -> Shaped[Tensor, "b hp wp d"]:
    """Zero-pad bottom and right until the height divides by ``rows`` and the width by ``cols``."""
    bottom, right = -x.shape[1] % rows, -x.shape[2] % cols
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def crop(x: Shaped[Tensor, "b hp wp d"], height: int, width: int) -> Shaped[Tensor, "b h w d"]:
    """Undo :func:`pad_to_multiple`."""
    return x if x.shape[1:3] == (height, width) else x[:, :height, :width].contiguous()


def to_regions(x: Shaped[Tensor, "b h w d"], rows: int, cols: int) -> Shaped[Tensor, "b p y x d"]:
    """Cut the grid into ``rows x cols`` rectangles of equal size, in row-major order."""
    return rearrange(x, "b (r y) (c x) d -> b (r c) y x d", r=rows, c=cols)


def from_regions(x: Shaped[Tensor, "b p y x d"], rows: int, cols: int) -> Shaped[Tensor, "b h w d"]:
    """Undo :func:`to_regions`."""
    return rearrange(x, "b (r c) y x d -> b (r y) (c x) d", r=rows, c=cols)


def inside(height: int, width: int, padded: tuple[int, int], device: torch.device) -> Bool[Tensor, "hp wp"]:
    """True where a padded grid holds a real token."""
    rows = torch.arange(padded[0], device=device) < height
    cols = torch.arange(padded[1], device=device) < width
    return rows[:, None] & cols[None, :]
