"""Names of attentions in figures: beside their lines, or in a legend where marks lie too close."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from notebooks.lib.limits import Line
from notebooks.lib.plots import INK, style

FONT_SIZE = 9.0
MARK, TEXT = 1.05, 1.07
"""Where marks and names stand, in widths of the panel."""


def label_lines(ax: Axes, drawn: list[Line], column: str) -> None:
    """Write each line's name right of the panel, at the height of its last value and none over another.

    Axes have their final limits and scales before.
    """
    ends = [(name, label, dash, line[column].dropna()) for name, label, dash, line in drawn]
    ends = [end for end in ends if len(end[3])]
    if not ends:
        return
    to_panel = ax.transData + ax.transAxes.inverted()
    points = to_panel.transform([(values.index[-1], values.iloc[-1]) for *_, values in ends])
    order = np.argsort(points[:, 1], kind="stable")
    for place, height in zip(order, _spread(points[order, 1], _line_height(ax)), strict=True):
        (name, label, dash, _), (x, y) = ends[place], points[place]
        (colour, marker), around = style(name), dict[str, Any](transform=ax.transAxes, clip_on=False)
        ax.plot([x, MARK - 0.02, MARK], [y, height, height], "-", color=colour, linewidth=0.6, alpha=0.7, **around)
        ax.plot([MARK], [height], linestyle=dash, marker=marker, color=colour, markeredgecolor="white",
                markeredgewidth=0.5, markersize=6.5, **around)  # fmt: skip
        ax.annotate(label, (TEXT, height), xycoords="axes fraction", va="center", fontsize=FONT_SIZE, color=INK)


def _line_height(ax: Axes) -> float:
    """The height of a name, as a share of the panel's, which is about 0.8 of its share of the figure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    specification = ax.get_subplotspec()
    rows = specification.get_gridspec().nrows if specification else 1
    return 1.25 * FONT_SIZE / (72 * 0.8 * figure.get_figheight() / rows)


def _spread(heights: np.ndarray, least: float) -> np.ndarray:
    """The nearest heights, in the least squares, that lie ``least`` apart, between 0 and 1 if there is room."""
    steps = least * np.arange(len(heights))
    moved = isotonic_regression(heights - steps).x
    return np.clip(moved, 0, max(0.0, 1 - steps[-1])) + steps


def legend(ax: Axes, drawn: list[Line], *notes: Line2D) -> None:
    """Right of the panel: the curves in their order, then ``notes`` for other lines and marks."""
    handles = [_handle(name, label, dash) for name, label, dash, _ in drawn]
    handles += [Line2D([], [], linestyle="", label=" "), *notes] if notes and handles else notes
    many = len(handles) > 16
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9 if many else 10,
              labelspacing=0.3 if many else 0.6, ncols=1 + len(handles) // 26)  # fmt: skip


def _handle(name: str, label: str, dash: Any) -> Line2D:
    colour, marker = style(name)
    return Line2D([], [], linestyle=dash, color=colour, marker=marker, markeredgecolor="white", label=label)
