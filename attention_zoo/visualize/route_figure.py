"""The figure of routes: one panel per topk, routed regions bright and outlined by weight, the others dimmed."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.visualize.routes import Routes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUERY = "#D55E00"
"""Vermilion of Okabe and Ito's palette: distinct from all colours of viridis, also for colour-blind readers."""
VEIL = (1.0, 1.0, 1.0, 0.7)
"""The overlay (RGBA) of regions that are not routed to."""


def save(routes: Routes, picture: Float[Tensor, "3 h w"], query: tuple[int, int], path: str | Path) -> Path:
    """Draw the routes over their picture and save it, creating the folder if needed.

    Args:
        query: row and column of the query pixel.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # This resolution saves a megabyte and keeps the numbers legible.
    figure_of(routes, picture, query).savefig(path, dpi=100)
    return Path(path)


def figure_of(routes: Routes, picture: Float[Tensor, "3 h w"], query: tuple[int, int]) -> "Figure":
    """The picture with its regions, then a panel for each topk."""
    from matplotlib.figure import Figure

    panels = 1 + len(routes.ranked)
    columns = min(panels, 3)
    rows = math.ceil(panels / columns)
    width = 8.7 / columns
    height = width * min(2.0, max(0.5, picture.shape[1] / picture.shape[2])) + 0.2
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, topk in zip(grid.flat, (None, *routes.ranked), strict=False):
        _panel(axes, routes, picture, query, topk)
    figure.suptitle("\n".join(textwrap.wrap(f"Routes of BRA {routes.source}", 100)), fontsize=10)
    _legend(figure, list(grid.flat))
    return figure


def _panel(
    axes: "Axes", routes: Routes, picture: Float[Tensor, "3 h w"], query: tuple[int, int], topk: int | None
) -> None:
    """The panel of one topk; None: the picture and its regions."""
    height, width = picture.shape[1:]
    side, extent = routes.side, (0, width, height, 0)
    axes.imshow(picture.permute(1, 2, 0).numpy(), extent=extent)
    if topk is None:
        for line in range(1, side):
            axes.axhline(line * height / side, color="white", linewidth=0.5, alpha=0.7)
            axes.axvline(line * width / side, color="white", linewidth=0.5, alpha=0.7)
        axes.set_title(f"the query and {side} x {side} regions", fontsize=9)
    else:
        regions, weights = routes.ranked[topk]
        veil = torch.tensor(VEIL).repeat(side**2, 1)
        veil[regions, 3] = 0
        axes.imshow(veil.view(side, side, 4).numpy(), extent=extent, interpolation="nearest")
        for rank, (region, weight) in enumerate(zip(regions, weights, strict=True), 1):
            _routed(axes, routes, picture, region, rank, weight / weights[0])
        message = f"weights {weights[0]:.2f} to {weights[-1]:.2f}" if topk > 1 else "weight 1"
        axes.set_title(f"topk = {topk}, {message}", fontsize=9)
    _outline(axes, routes, picture, routes.region, QUERY, 0.12)
    axes.plot(query[1] + 0.5, query[0] + 0.5, "o", markersize=5, color=QUERY, markeredgecolor="white")
    axes.set(xlim=(0, width), ylim=(height, 0))


def _routed(
    axes: "Axes", routes: Routes, picture: Float[Tensor, "3 h w"], region: int, rank: int, strength: float | int
) -> None:
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    _outline(axes, routes, picture, region, colormaps["viridis"](strength), 0.03)
    top, left, height, width = _box(routes, picture, region)
    axes.text(
        left + 0.5 * width, top + 0.5 * height, str(rank), fontsize=min(9.0, 63 / routes.side),
        ha="center", va="center",
        color="white", path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )  # fmt: skip


def _outline(
    axes: "Axes", routes: Routes, picture: Float[Tensor, "3 h w"], region: int, color: object, margin: float
) -> None:
    """A rectangle inside a region, at a distance of ``margin`` times its sides from its edge."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, withStroke

    top, left, height, width = _box(routes, picture, region)
    line = min(2.2, 15 / routes.side)
    axes.add_patch(
        Rectangle(
            (left + margin * width, top + margin * height), (1 - 2 * margin) * width, (1 - 2 * margin) * height,
            fill=False, edgecolor=color, linewidth=line,
            path_effects=[withStroke(linewidth=1.6 * line, foreground="black"), Normal()],
        )
    )  # fmt: skip


def _box(routes: Routes, picture: Float[Tensor, "3 h w"], region: int) -> tuple[float, float, float, float]:
    """Top, left, height and width of a region in pixels."""
    height, width = (pixels / routes.side for pixels in picture.shape[1:])
    return region // routes.side * height, region % routes.side * width, height, width


def _legend(figure: "Figure", panels: "list[Axes]") -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    scale = ScalarMappable(cmap="viridis")
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, ax=panels, location="right", shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("outline: weight over\nthe panel's largest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    handles = (
        Line2D([], [], marker="o", linestyle="none", color=QUERY, markeredgecolor="white", label="query"),
        Patch(fill=False, edgecolor=QUERY, linewidth=2, label="its region"),
        Patch(fill=False, edgecolor=colormaps["viridis"](0.8), linewidth=2, label="routed to, numbered best first"),
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
