"""Names of attentions in figures, beside their lines or marks."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression

from notebooks.lib.limits import Line
from notebooks.lib.plots import FAINT, INK, style

FONT_SIZE = 9.0
MARK, TEXT = 1.05, 1.07
"""Where marks and names stand, in widths of the panel."""
RADIUS, MARGIN = 9.5, 2
"""Of a mark with a ring, and left and right of a name, in points."""
GAPS, ANGLES = (0, 7, 15, 25, 37, 50), (0, 180, 60, -60, 120, -120, 30, -30, 150, -150, 90, -90)
"""Where a name may stand beside its mark, the best first: points beyond the ring, and degrees."""
OVER, OVER_BAR, FAR = 9.0, 1 / 3, 1 / 300
"""What makes a place bad: the share of a name over others or outside, that over error bars, and points of gap."""
HALO = [withStroke(linewidth=2, foreground="white")]


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


def name_points(ax: Axes, x: pd.Series, y: pd.Series) -> None:
    """Write each name beside its mark, where it hides the least of marks, error bars and other texts.

    A thin line leads to a mark that is not next to its name. Axes have their final limits, scales and marks before.

    Args:
        ax: the panel that has the marks.
        x, y: where the marks are, by name; a name without both has no mark.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # The layout gives the panel its place only now.
    point, panel = figure.dpi / 72, np.array([ax.get_window_extent().extents])
    points = pd.DataFrame({"x": x, "y": y}).dropna()
    marks = dict(zip(points.index, ax.transData.transform(points), strict=True))
    taken = [np.concatenate([mark - RADIUS * point, mark + RADIUS * point]) for mark in marks.values()]
    taken += [np.array(text.get_window_extent().extents) for text in ax.texts]
    bars = np.array([
        np.concatenate([ends.min(axis=0) - point, ends.max(axis=0) + point])
        for lines in ax.collections if isinstance(lines, LineCollection)
        for ends in map(ax.transData.transform, lines.get_segments())
    ]).reshape(-1, 4)  # fmt: skip
    for name, mark in sorted(marks.items(), key=lambda item: -item[1][1]):
        text = ax.annotate(name, points.loc[name], xytext=(0, 0), textcoords="offset points", va="center",
                           fontsize=FONT_SIZE, path_effects=HALO)  # fmt: skip
        width, height = text.get_window_extent().size
        size = np.array([width + 2 * MARGIN * point, height])
        places = {(gap, angle): _beside(mark, size, (RADIUS + gap) * point, angle) for gap in GAPS for angle in ANGLES}
        badness = {
            place: FAR * place[0]
            + OVER * (_overlap(box, np.array(taken)) - _overlap(box, panel)) / size.prod()
            + OVER_BAR * _overlap(box, bars) / size.prod()
            for place, box in places.items()
        }
        gap, angle = min(badness, key=badness.__getitem__)
        box = places[gap, angle]
        taken.append(box)
        text.set_position(((box[0] - mark[0]) / point + MARGIN, ((box[1] + box[3]) / 2 - mark[1]) / point))
        if gap:
            end = (np.clip(mark, box[:2], box[2:]) - mark) / point
            ax.annotate("", points.loc[name], xytext=tuple(end), textcoords="offset points",
                        arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0})  # fmt: skip


def _beside(mark: np.ndarray, size: np.ndarray, reach: float, angle: float) -> np.ndarray:
    """The box of a name whose nearest end, or middle, is ``reach`` from its mark: left, bottom, right and top."""
    x, y = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    corner = mark + reach * np.array([x, y]) - size * [(1 - np.sign(np.round(x, 9))) / 2, 0.5]
    return np.concatenate([corner, corner + size])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that a box shares with others."""
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(shared.clip(0).prod(axis=1).sum())
