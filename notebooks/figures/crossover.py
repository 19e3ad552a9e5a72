"""The grid from which BRA is cheaper than full or window attention: figure, table and findings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from notebooks.figures.curves import log_ticks, side_axis
from notebooks.figures.latency import timed_modes
from notebooks.lib.export import publish
from notebooks.lib.limits import MODES, Line, cells, resolution
from notebooks.lib.plots import DASHES, FAINT, INK, SETTING, Results, caption, needs, number, save, say, series, style

OURS, RIVALS = "bra", ("full", "window")
MEMORY, MACS = "memory_predicted_bytes", "macs_counted"


@dataclass(frozen=True)
class Crossing:
    """Where the ratio of two costs passes 1.

    Attributes:
        side: tokens per side, interpolated linearly in log-log between measured grids.
        low, high: interval in which the quartiles are inconclusive; None: up to the end of the grids.
        falling: whether the ratio falls below 1 there as the grid grows.
    """

    side: float
    low: float | None
    high: float | None
    falling: bool

    def interval(self) -> str:
        """The interval in words; empty if it has no width."""
        if self.low == self.high == self.side:
            return ""
        low = "the smallest grid" if self.low is None else f"{self.low:.0f}"
        high = "the largest grid" if self.high is None else f"{self.high:.0f}"
        return f" (between {low} and {high})"

    def __str__(self) -> str:
        return f"near {self.side:.0f}{self.interval()}"


def roots(sides: np.ndarray, ratio: np.ndarray) -> list[tuple[float, bool]]:
    """Where ``ratio`` passes 1, interpolated in log-log between neighbours, and whether it falls there."""
    x, y = np.log(sides), np.log(ratio)
    return [
        (float(np.exp(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))), bool(y[i] > 0))
        for i in range(len(x) - 1)
        if (y[i] > 0) != (y[i + 1] > 0)
    ]


def crossings(ratio: pd.DataFrame) -> list[Crossing]:
    """Where the middle of ``ratio`` (columns low, middle, high; by tokens per side) passes 1, never extrapolated.

    Its interval extends from where the first of the low and the high ratio passes 1 to where the last does.
    """
    ratio = ratio.dropna().sort_index()
    sides = ratio.index.to_numpy(float)
    passes = {column: roots(sides, ratio[column].to_numpy(float)) for column in ratio}
    result = []
    for side, falling in passes["middle"]:
        first, last = ("low", "high") if falling else ("high", "low")
        below = [end for end, falls in passes[first] if end <= side and falls == falling]
        above = [end for end, falls in passes[last] if end >= side and falls == falling]
        result.append(Crossing(side, max(below, default=None), min(above, default=None), falling))
    return result


def pairs(rows: pd.DataFrame) -> Iterator[tuple[Line, str, pd.DataFrame]]:
    """Each line of BRA with each rival that was run in the same SETTING: the line, the rival, the rival's cells."""
    ours = [line for line in series(rows) if line[0] == OURS]
    for rank, (name, label, _, part) in enumerate(ours):
        alike = (rows[SETTING].astype(str) == part[SETTING].astype(str).iloc[0]).all(axis=1)
        for rival in RIVALS:
            theirs = rows[alike & (rows["name"] == rival)]
            if len(theirs):
                yield (name, label, DASHES[rank % len(DASHES)], cells(part)), rival, cells(theirs)


def latency_ratio(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Ratio of the two latencies at the grids where both were timed: low, middle and high."""
    first, second = ours["latency_p50_ms"], theirs["latency_p50_ms"]
    low = ours["latency_p25_ms"].fillna(first) / theirs["latency_p75_ms"].fillna(second)
    high = ours["latency_p75_ms"].fillna(first) / theirs["latency_p25_ms"].fillna(second)
    return pd.DataFrame({"low": low, "middle": first / second, "high": high}).dropna()


def exact_ratio(ours: pd.DataFrame, theirs: pd.DataFrame, column: str) -> pd.DataFrame:
    """As :func:`latency_ratio`, for an exactly known cost: its interval has no width."""
    ratio = (ours[column] / theirs[column]).dropna()
    return pd.DataFrame({name: ratio for name in ("low", "middle", "high")})


def described(ratio: pd.DataFrame) -> str:
    """A ratio in words: where BRA becomes cheaper or dearer, or that it does not."""
    if ratio.empty:
        return "not measured"
    result = [f"{'cheaper' if one.falling else 'dearer'} from {one} on" for one in crossings(ratio)]
    if result:
        return "; ".join(result)
    low, high = (f"{number(end)}x" for end in (ratio["middle"].min(), ratio["middle"].max()))
    span = low if low == high else f"{low} to {high}"
    return f"no break-even from {ratio.index[0]} to {ratio.index[-1]}: {span} the cost"


@needs("resolution")
def table(results: Results) -> None:
    """Table: break-even of BRA against its rivals in latency, memory and MACs."""
    result = []
    for mode, words in MODES.items():
        for (_, label, _, ours), rival, theirs in pairs(resolution(results, mode)):
            result.append({
                f"{OURS} against": f"{rival}" + f", {label}" * (label != OURS),
                "mode": words,
                "latency": described(latency_ratio(ours, theirs)),
                "memory, predicted": described(exact_ratio(ours, theirs, MEMORY)),
                "MACs of the forward pass": described(exact_ratio(ours, theirs, MACS)),
            })  # fmt: skip
    if not result:
        say(f"The `resolution` sweep holds no rows of {OURS} beside {' or '.join(RIVALS)} in the same setting.")
        return
    note = (
        "In tokens per side of a square grid, by a straight line in log-log between two grids, and never beyond them. "
        "Between: where the quartiles of the two latencies leave open which is faster."
    )
    publish(pd.DataFrame(result), "break_even", note)


@needs("resolution")
def figure(results: Results) -> Figure | None:
    """A panel per mode: latency of BRA over its rivals', with the quartiles' band and the break-even marked."""
    drawn = {mode: _timed_pairs(results, mode) for mode in timed_modes(results)}
    drawn = {mode: result for mode, result in drawn.items() if result}
    if not drawn:
        say(f"No break-even of {OURS} can be drawn: it was timed at no grid at which {' or '.join(RIVALS)} was.")
        return None
    fig, axes = plt.subplots(1, len(drawn), figsize=(2.6 + 4.7 * len(drawn), 4.8), squeeze=False, sharey=True,
                             layout="constrained")  # fmt: skip
    for ax, (mode, result) in zip(axes[0], drawn.items(), strict=True):
        for rank, (dash, rival, ratio) in enumerate(result):
            _draw(ax, dash, rival, ratio, above=rank < len(result) / 2)
        ax.axhline(1, color=INK, linewidth=1.2)
        side_axis(ax, sorted({int(side) for *_, ratio in result for side in ratio.index}))
        ax.set_yscale("log")
        ax.set_title(MODES[mode].capitalize())
    _finish(fig, axes[0], results)
    return save(fig, "break_even")


def _timed_pairs(results: Results, mode: str) -> list[tuple[str, str, pd.DataFrame]]:
    result = pairs(resolution(results, mode))
    ratios = [(line[2], rival, latency_ratio(line[3], theirs)) for line, rival, theirs in result]
    return [(dash, rival, ratio) for dash, rival, ratio in ratios if len(ratio)]


def _draw(ax: Axes, dash: str, rival: str, ratio: pd.DataFrame, above: bool) -> None:
    colour, marker = style(rival)
    ax.fill_between(ratio.index.to_numpy(float), ratio["low"], ratio["high"], color=colour, alpha=0.2, linewidth=0)
    ax.plot(ratio.index, ratio["middle"], dash, color=colour, marker=marker, markersize=8, markeredgecolor="white")
    side: dict[str, Any] = {"xytext": (7, 7), "ha": "left", "va": "bottom"}
    if not above:
        side = {"xytext": (-7, -7), "ha": "right", "va": "top"}
    for one in crossings(ratio):
        low, high = one.low or float(ratio.index[0]), one.high or float(ratio.index[-1])
        ax.plot([low, high], [1, 1], color=colour, linewidth=5, alpha=0.9, solid_capstyle="butt", zorder=3)
        ax.plot(one.side, 1, "o", color="white", markeredgecolor=colour, markeredgewidth=2, markersize=10, zorder=4)
        ax.annotate(f"{one.side:.0f}", (one.side, 1), **side, textcoords="offset points", weight="bold",
                    color=colour, zorder=5)  # fmt: skip


def _finish(fig: Figure, axes: np.ndarray, results: Results) -> None:
    log_ticks(axes[0].yaxis)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0.8), max(high, 1.25))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(f"latency of {OURS} / of the other\n(below 1: {OURS} is faster)")
    rows = results.sweep("resolution")
    rivals = [
        Line2D([], [], color=style(rival)[0], marker=style(rival)[1], markeredgecolor="white", label=f"against {rival}")
        for rival in RIVALS if (rows["name"] == rival).any()
    ]  # fmt: skip
    ring = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=FAINT, markeredgewidth=2,
                  markersize=9, label="ring: break-even")  # fmt: skip
    ours = {label: dash for mode in MODES for (_, label, dash, _), *_ in pairs(resolution(results, mode))}
    dashes: list[Any] = [Line2D([], [], color=FAINT, label=label) for label in ours] if len(ours) > 1 else []
    for handle, dash in zip(dashes, ours.values(), strict=False):
        handle.set_linestyle(dash)
    band = Line2D([], [], color=FAINT, linewidth=8, alpha=0.3, label="band: quartiles")
    handles = [*rivals, Line2D([], [], linestyle="", label=" "), *dashes, ring, band]
    axes[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=0.6)
    fig.suptitle(f"Where {OURS} breaks even", x=0.01, ha="left", weight="bold", fontsize=14)
    compared = rows[rows["name"].isin((OURS, *RIVALS))]
    caption(fig, compared, "Straight lines in log-log between measured grids. Bar: where the quartiles leave it open.")


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the resolution sweep; none without the rows."""
    result = []
    for mode, words in MODES.items():
        for (_, label, _, ours), rival, theirs in pairs(resolution(results, mode)):
            ratio = latency_ratio(ours, theirs)
            if len(ratio):
                result.append(f"{words.capitalize()}, {_setting(results, label)} against {rival}: {_said(ratio)}.")
    say(*result)
    return result


def _setting(results: Results, label: str) -> str:
    impls = results.sweep("resolution")["impl_requested"].unique()
    return f"{label} ({impls[0]} implementations)" if len(impls) == 1 else label


def _said(ratio: pd.DataFrame) -> str:
    result = crossings(ratio)
    if not result:
        way = "slower" if ratio["middle"].iloc[-1] > 1 else "faster"
        ends = ratio["middle"].iloc[sorted({0, len(ratio) - 1})]
        at = " and ".join(f"{number(value)}x at {side}" for side, value in ends.items())
        return f"no break-even in the measured range; it is {way} throughout, and takes {at} the other's time"
    parts = [f"{'faster' if one.falling else 'slower'} from {one} tokens per side on" for one in result]
    last, value = ratio.index[-1], ratio["middle"].iloc[-1]
    return f"{'; '.join(parts)}; at {last} x {last} it takes {number(value)}x the other's time"
