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
RADIUS, SIZE, MARGIN = 9.5, 4.5, 2
"""Of a mark with a ring, of a mark alone, and left and right of a name, in points."""
GAPS, ANGLES = (0, 7, 15, 25, 37, 50), (0, 180, 60, -60, 120, -120, 30, -30, 150, -150, 90, -90)
"""Where a name may stand beside its mark, the best first: points beyond the ring, and degrees."""
OVER, OVER_BAR, THROUGH, FAR = 9.0, 1 / 3, 2.0, 1 / 300
"""What makes a place bad: the share of a name over others or outside, that over error bars, the shares of its line
through others and of others' through it, and points of gap."""
ROUNDS = 3
"""How often each name is placed, the later times with all others in their places."""
STEPS = np.linspace(0, 1, 25)[:, None]
"""Where a line is sampled, from a mark to its name."""
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
    points = pd.DataFrame({"x": x, "y": y}).dropna().sort_values("y", ascending=False, kind="stable")
    marks = dict(zip(points.index, ax.transData.transform(points), strict=True))
    before = np.array([text.get_window_extent().extents for text in ax.texts]).reshape(-1, 4)
    bars = np.array([
        np.concatenate([ends.min(axis=0) - point, ends.max(axis=0) + point])
        for lines in ax.collections if isinstance(lines, LineCollection)
        for ends in map(ax.transData.transform, lines.get_segments())
    ]).reshape(-1, 4)  # fmt: skip
    texts = {name: ax.annotate(name, points.loc[name], xytext=(0, 0), textcoords="offset points", va="center",
                               fontsize=FONT_SIZE, path_effects=HALO) for name in marks}  # fmt: skip
    sizes = {name: np.array(text.get_window_extent().size) for name, text in texts.items()}
    for name, (box, gap) in _arrange(marks, sizes, before, bars, panel, point).items():
        mark = marks[name]
        texts[name].set_position(((box[0] - mark[0]) / point + MARGIN, ((box[1] + box[3]) / 2 - mark[1]) / point))
        if gap:
            end = (np.clip(mark, box[:2], box[2:]) - mark) / point
            ax.annotate("", points.loc[name], xytext=tuple(end), textcoords="offset points",
                        arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0})  # fmt: skip


def _arrange(
    marks: dict[str, np.ndarray],
    sizes: dict[str, np.ndarray],
    texts: np.ndarray,
    bars: np.ndarray,
    panel: np.ndarray,
    point: float,
) -> dict[str, tuple[np.ndarray, int]]:
    """The box of each name and its gap to its mark: the least bad place, sought ROUNDS times for each name in turn.

    Args:
        marks, sizes: of each name, in pixels.
        texts, bars, panel: boxes of other texts, of error bars, and the panel's, in pixels.
        point: in pixels.
    """
    rings = np.array([*(_around(mark, RADIUS * point) for mark in marks.values()), *texts])
    found: dict[str, tuple[np.ndarray, int]] = {}
    for name in [*marks] * ROUNDS:
        mark, size = marks[name], sizes[name] + [2 * MARGIN * point, 0]
        others = {other: placed for other, placed in found.items() if other != name}
        names = np.array([box for box, _ in others.values()]).reshape(-1, 4)
        lines = np.array([_line(marks[other], box) for other, (box, gap) in others.items() if gap]).reshape(-1, 2)
        apart = [_around(at, SIZE * point) for at in marks.values() if np.abs(at - mark).max() > SIZE * point]
        solid = np.array([*apart, *texts, *names]).reshape(-1, 4)
        places = {(gap, angle): _beside(mark, size, (RADIUS + gap) * point, angle) for gap in GAPS for angle in ANGLES}
        badness = {
            place: FAR * place[0]
            + OVER * (_overlap(box, rings) + _overlap(box, names) - _overlap(box, panel)) / size.prod()
            + OVER_BAR * _overlap(box, bars) / size.prod()
            + THROUGH * (_inside(lines, box[None]) + (_inside(_line(mark, box), solid) if place[0] else 0))
            for place, box in places.items()
        }
        best = min(badness, key=badness.__getitem__)
        found[name] = places[best], best[0]
    return found


def _around(centre: np.ndarray, reach: float) -> np.ndarray:
    """The box of this half width and height around a point."""
    return np.concatenate([centre - reach, centre + reach])


def _beside(mark: np.ndarray, size: np.ndarray, reach: float, angle: float) -> np.ndarray:
    """The box of a name whose nearest end, or middle, is ``reach`` from its mark: left, bottom, right and top."""
    x, y = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    corner = mark + reach * np.array([x, y]) - size * [(1 - np.sign(np.round(x, 9))) / 2, 0.5]
    return np.concatenate([corner, corner + size])


def _line(mark: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Points of the line from a mark to the nearest point of its name."""
    return mark + STEPS * (np.clip(mark, box[:2], box[2:]) - mark)


def _inside(points: np.ndarray, boxes: np.ndarray) -> float:
    """How many points are inside any of the boxes, as a share of a line's."""
    within = np.all((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:]), axis=2)
    return np.count_nonzero(np.any(within, axis=1)) / len(STEPS)


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that a box shares with others."""
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(shared.clip(0).prod(axis=1).sum())
