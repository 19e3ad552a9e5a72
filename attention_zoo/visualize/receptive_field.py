"""Figures of the receptive field of a query, computed from the modules.

A module's reach is the gradient of its output at the query with respect to its input at every position. To
show structure instead of random weights, linear maps are set to the identity and the input is computed from the
picture's colours, so that a query scores positions of similar appearance highest.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import InvalidOption
from attention_zoo.core.registry import build, get, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIM, HEADS, GRID = 32, 2, 56
SHARPNESS = 6.0
"""Norm of the feature vectors: how strongly a query prefers positions of similar appearance."""


def sample_image() -> Float[Tensor, "3 h w"]:
    """A photograph that comes with matplotlib (Grace Hopper, US Navy, public domain), its upper square."""
    from matplotlib import cbook

    return read_image(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))[:, :512, :512]


def read_image(path: str | Path) -> Float[Tensor, "3 h w"]:
    """An image file as RGB in [0, 1], rotated by its EXIF orientation; InvalidOption if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise InvalidOption(f"--image {path}: not an image that can be read ({problem})") from problem
    values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return values.view(pixels.height, pixels.width, 3).permute(2, 0, 1).float().div(255).contiguous()


def check_format(path: str | Path) -> None:
    """Raise InvalidOption unless the suffix of ``path`` is a supported figure format."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in formats:
        raise InvalidOption(f"--output {path}: no picture ends so; valid: .{', .'.join(sorted(formats))}")


def features(picture: Float[Tensor, "3 h w"], height: int, width: int, dim: int = DIM) -> Float[Tensor, "1 h2 w2 d"]:
    """Colour and gradient features of a picture on a grid, mapped to ``dim`` channels of equal length."""
    small = F.interpolate(picture[None], (height, width), mode="area")
    dy, dx = F.pad(small.diff(dim=2), (0, 0, 0, 1)), F.pad(small.diff(dim=3), (0, 1))
    cues = torch.cat([small, 2 * dy.abs(), 2 * dx.abs()], dim=1)
    cues = (cues - cues.mean((2, 3), keepdim=True)) / (cues.std() + 1e-6)
    # A fixed random Fourier map: similar cues get similar directions, spread over all channels.
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(dim // 2, cues.shape[1], generator=generator)
    phase = torch.einsum("dc,bchw->bhwd", wave, cues)
    x = torch.cat([phase.cos(), phase.sin()], dim=-1)
    return SHARPNESS * F.normalize(x, dim=-1)


def reach(name: str, x: Float[Tensor, "1 h w d"], query: tuple[int, int], **options: Any) -> Float[Tensor, "h w"]:
    """How much the output of the attention ``name`` at ``query`` (row, column) depends on each input position."""
    torch.manual_seed(0)
    module = build(name, dim=x.shape[-1], num_heads=HEADS, **({"impl": "reference"} | options)).eval()
    _show_structure(module)
    x = x.clone().requires_grad_()
    out = module(x)[0, query[0], query[1]]
    # Several random directions, so that a gradient that cancels along one of them hides no position.
    total = torch.zeros(x.shape[1:3])
    for direction in torch.randn(8, len(out), generator=torch.Generator().manual_seed(1)):
        (gradient,) = torch.autograd.grad(out @ direction, x, retain_graph=True)
        total += gradient[0].norm(dim=-1)
    return total / total.max()


def draw(name: str, picture: Float[Tensor, "3 h w"], query: tuple[int, int], axes: "Axes", **options: Any) -> None:
    """Draw the reach of one attention over a picture, the query marked.

    Args:
        query: row and column of a pixel.
        options: of the attention; the defaults show its structure on this grid.
    """
    height, width = picture.shape[1:]
    row, column = query[0] * GRID // height, query[1] * GRID // width
    values = reach(name, features(picture, GRID, GRID), (row, column), **(SHOWN.get(name, {}) | options))
    axes.imshow(picture.mean(0).numpy(), cmap="gray", vmin=-0.6, vmax=1.2, extent=(0, width, height, 0))
    # Attentions differ in which positions they reach at all: a logarithmic scale also shows small values.
    strength = (1 + values.clamp_min(1e-6).log10() / 6).where(values > FAINTEST, torch.tensor(math.nan))
    axes.imshow(strength.numpy(), cmap="viridis", alpha=0.75, vmin=0, vmax=1, extent=(0, width, height, 0))
    y, x = ((at + 0.5) * side / GRID for at, side in ((row, height), (column, width)))
    axes.plot(x, y, "s", markersize=7, markerfacecolor="white", markeredgecolor="crimson", markeredgewidth=2)
    axes.set_title(name, fontsize=10)
    axes.set_axis_off()


def gallery(picture: Float[Tensor, "3 h w"], query: tuple[int, int], path: str | Path) -> Path:
    """Draw every registered attention on one picture and save it."""
    from matplotlib.figure import Figure

    chosen = names()
    columns = min(6, max(3, math.ceil(math.sqrt(1.5 * len(chosen)))))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for name, axes in zip(chosen, grid.flat, strict=False):
        draw(name, picture, query, axes)
    figure.suptitle(
        "What the query (white square) depends on, of 56 x 56 tokens:\nbrighter is more, uncoloured is nothing"
    )
    figure.savefig(path, dpi=150)
    return Path(path)


FAINTEST = 1e-5
SHOWN: dict[str, dict[str, Any]] = {
    "bra": {"n_win": 7, "topk": 4, "side_dwconv": 0},
    "criss_cross": {"recurrence": 1},
    "quadtree": {"value_pooling": "average", "lepe": False},
}
"""Options of the pictures where the defaults do not show the structure."""


def save(name: str, picture: Float[Tensor, "3 h w"], query: tuple[int, int], path: str | Path, **options: Any) -> Path:
    """Draw one attention and save it; InvalidOption for an unknown name or option."""
    from matplotlib.figure import Figure

    summary = (get(name).__doc__ or "").strip().split("\n")[0]
    figure = Figure(figsize=(5, 5.4), layout="constrained")
    axes = figure.subplots()
    draw(name, picture, query, axes, **options)
    axes.set_title(f"{name}: {summary}", fontsize=9, wrap=True)
    figure.savefig(path, dpi=150)
    return Path(path)


def _show_structure(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            row = torch.arange(layer.out_features) % layer.in_features
            layer.weight.data.copy_(torch.eye(layer.in_features)[row])
            if layer.bias is not None:
                layer.bias.data.zero_()
