"""Figures of memory and latency against resolution."""

import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from notebooks.figures.labels import label_lines
from notebooks.lib.limits import MODES, Line, cells, device_memory, lines, resolution
from notebooks.lib.plots import FAINT, INK, Results, caption, needs, save, say, series, size, style, usual

FAILED = ("oom", "timeout", "crash", "incorrect", "unsupported", "error")
MOST_LINES = 32
PREDICTED = Line2D([], [], color=FAINT, label="line: predicted")
MEASURED = Line2D([], [], color=FAINT, marker="o", linestyle="", label="mark: measured")
CROSS = Line2D([], [], color=FAINT, marker="X", markeredgecolor=INK, markersize=9, linestyle="", label="cross: failed")


@needs("resolution")
def figure(results: Results, mode: str) -> Figure | None:
    """Two panels for one mode: memory, predicted as lines and measured as marks, and latency with intervals."""
    rows = drawable(resolution(results, mode))
    if rows.empty:
        say(f"The `resolution` sweep has no {MODES[mode]} cells here; without `--smoke`, run_all.py makes them.")
        return None
    fig, (left, right) = plt.subplots(1, 2, figsize=(15, 6.6), layout="constrained")
    drawn = list(lines(rows))
    for line, layer in zip(drawn, layers(drawn), strict=True):
        memory_line(left, line, layer)
    limit_line(left, *device_memory(results))
    sides = tried(rows)
    side_axis(right, sides)
    latency_panel(right, drawn, ("latency_low_ms", "latency_high_ms"))
    memory_axis(left, sorted(cells(rows).index), "peak memory of one step")
    right.set_ylabel("latency of one step, ms (median, 95 % interval)")
    left.set_title("Peak memory")
    right.set_title("Latency")
    fig.suptitle(f"One step of one attention layer, {MODES[mode]}", x=0.01, ha="left", weight="bold", fontsize=14)
    label_lines(left, drawn, "memory_predicted_bytes")
    label_lines(right, drawn, "latency_p50_ms")
    fig.legend(handles=[PREDICTED, MEASURED, CROSS], loc="outside upper right", ncols=3)
    caption(fig, rows, untimed(drawn, sides), labelled=True)
    return save(fig, f"resolution_{mode}")


def drawable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows; if they give too many lines for one panel, only those of the most common setting."""
    return rows if sum(1 for _ in series(rows)) <= MOST_LINES else usual(rows)


def memory_line(ax: Axes, drawn: Line, layer: tuple[float, float, float]) -> None:
    """One attention's predicted curve, its measured points, and a cross at every cell that failed."""
    name, _, dash, line = drawn
    (colour, marker), (wide, big, order) = style(name), layer
    predicted = line["memory_predicted_bytes"].dropna()
    ax.plot(predicted.index, predicted, dash, color=colour, linewidth=wide, zorder=order)
    measured = line["memory_peak_bytes"].dropna()
    ax.plot(measured.index, measured, marker, color=colour, markersize=big, markeredgecolor="white",
            markeredgewidth=0.7, zorder=order + 2)  # fmt: skip
    failed = line[line["status"].isin(FAILED)]["memory_predicted_bytes"].dropna()
    ax.plot(failed.index, failed, "X", color=colour, markersize=big + 3, markeredgecolor=INK, zorder=order + 4)


def layers(drawn: list[Line]) -> list[tuple[float, float, float]]:
    """Line width, mark size and z-order of each line: one that the next would hide is wider and below it."""
    result = []
    for rank, (*_, line) in enumerate(drawn):
        after = drawn[rank + 1][3] if rank + 1 < len(drawn) else None
        hidden = after is not None and _coincide(line["memory_predicted_bytes"], after["memory_predicted_bytes"])
        result.append((4.4, 11.0, 2.0) if hidden else (1.8, 7.5, 2.5))
    return result


def _coincide(one: pd.Series, other: pd.Series) -> bool:
    ratio = (one / other).dropna()
    return len(ratio) > 0 and bool(ratio.between(0.9, 1.1).mean() > 0.5)


def limit_line(ax: Axes, limit: float, how: str) -> None:
    """The device's memory as a horizontal line."""
    ax.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (6, 3)), zorder=1)
    ax.annotate(how, (0.01, limit), xycoords=("axes fraction", "data"), xytext=(0, -5), textcoords="offset points",
                va="top", fontsize=9, color=INK)  # fmt: skip


def tried(rows: pd.DataFrame) -> list[int]:
    """The grids, in tokens per side, with a cell that is not just predicted; all if there are none."""
    return sorted(cells(rows[rows["status"] != "predicted"]).index) or sorted(cells(rows).index)


def untimed(drawn: list[Line], sides: list[int]) -> str:
    """What a line of latency that ends before the last of ``sides`` without a cross means; empty without one."""
    early = any((line["status"].reindex(sides[-1:]) == "predicted").any() for *_, line in drawn)
    return "Where a line of latency ends early, without a cross, the larger grids were not run." if early else ""


def latency_panel(ax: Axes, drawn: list[Line], ends: tuple[str, str]) -> None:
    """Median latency against tokens per side, with bars between the two columns ``ends``, and failed cells."""
    for (name, _, dash, line), (wide, big, order) in zip(drawn, layers(drawn), strict=True):
        timed, (colour, marker) = line.dropna(subset=["latency_p50_ms"]), style(name)
        middle = timed["latency_p50_ms"]
        bars = [(middle - timed[ends[0]]).fillna(0).clip(lower=0), (timed[ends[1]] - middle).fillna(0).clip(lower=0)]
        ax.errorbar(timed.index, middle, yerr=bars, linestyle=dash, color=colour, marker=marker, markersize=big,
                    markeredgecolor="white", markeredgewidth=0.7, linewidth=wide, elinewidth=1.5, capsize=3,
                    zorder=order)  # fmt: skip
    ax.set_yscale("log")
    failures(ax, drawn)
    log_ticks(ax.yaxis)


def log_ticks(axis: Axis, room: float = 3) -> None:
    """Ticks in plain numbers; more ticks if the axis spans at most ``room`` decades."""
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    steps = (1.0,) if decades > room else (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(base=10, subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def failures(ax: Axes, drawn: list[Line]) -> None:
    """List failed cells, which have no latency, above the curves at their grid."""
    failed = [(float(side), style(name)[0], label, short_reason(row)) for name, label, _, line in drawn
              for side, row in line[line["status"].isin(FAILED)].iterrows()]  # fmt: skip
    failed_marks(ax, failed)


def failed_marks(
    ax: Axes, failed: list[tuple[float, str, str, str]], limits: tuple[float, float] | None = None
) -> None:
    """Crosses above the curves of a log-log panel, from x, colour, name and reason; one row per x and reason.

    Args:
        ax: the panel.
        failed: the failed cells.
        limits: of the curves, where panels share the axis and another one may have taken room above them already.
    """
    rows: dict[tuple[float, str], list[tuple[str, str]]] = {}
    for x, colour, name, reason in sorted(failed, key=lambda item: -item[0]):
        rows.setdefault((x, reason), []).append((colour, name))
    if not rows:
        return
    low, high = limits or ax.get_ylim()
    step = min(0.06, 0.6 / len(rows))
    top = high * (high / low) ** (step * len(rows) / (1 - step * len(rows)))
    ax.set_ylim(low, max(top, ax.get_ylim()[1]))
    middle = np.sqrt(np.prod(ax.get_xlim()))
    for rank, ((x, reason), members) in enumerate(rows.items()):
        text = f"{textwrap.shorten(', '.join(name for _, name in members), 34, placeholder=' ...')}: {reason}"
        _crosses(ax, (x, 1 - step * (rank + 0.5)), [colour for colour, _ in members], text, x > middle)


def _crosses(ax: Axes, place: tuple[float, float], colours: list[str], text: str, leftwards: bool) -> None:
    """A cross of each colour side by side, and a text."""
    way, inches = -1 if leftwards else 1, ax.get_figure().dpi_scale_trans  # type: ignore[union-attr]
    for number, colour in enumerate(colours):
        moved = ScaledTranslation(way * number * 11 / 72, 0, inches)
        ax.plot(*place, "X", color=colour, markersize=9, markeredgecolor=INK, clip_on=False,
                transform=ax.get_xaxis_transform() + moved)  # fmt: skip
    ax.annotate(text, place, xycoords=ax.get_xaxis_transform(), xytext=(way * (11 * len(colours) - 2), 0),
                textcoords="offset points", ha="right" if leftwards else "left", va="center", fontsize=9)  # fmt: skip


def short_reason(row: pd.Series) -> str:
    """Status and shortened reason of a failed cell, for a figure."""
    reason = str(row["reason"]) if pd.notna(row["reason"]) else ""
    if needs_memory := re.search(r"needs ([\d.]+ GiB)", reason):
        return f"{row['status']}, needs {needs_memory[1]}"
    return f"{row['status']}, {textwrap.shorten(reason, 24, placeholder=' ...')}".rstrip(", ")


def side_axis(ax: Axes, sides: list[int]) -> None:
    """Tokens per side of square grids, logarithmic, with a tick at each of ``sides``."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(sides[0] / 1.25, sides[-1] * 1.25)
    ax.xaxis.set_major_locator(FixedLocator([float(side) for side in sides]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.set_xlabel("tokens per side of a square grid")


def memory_axis(ax: Axes, sides: list[int], ylabel: str) -> None:
    """Tokens per side against memory in binary units, both logarithmic."""
    side_axis(ax, sides)
    ax.set_ylabel(ylabel)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=16))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    ax.yaxis.set_minor_locator(NullLocator())
