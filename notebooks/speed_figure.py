"""The figure of speed-ups: every implementation of BRA beside its bound, windows and full attention."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from notebooks.curves import log_ticks
from notebooks.limits import MODES
from notebooks.plots import INK, STYLES, Results, caption, needs, save, style
from notebooks.speed import OTHERS, TIME, ratios, setting_words, wide

COLOURS = {"reference": "#000000", "sdpa": "#0072B2", "flex": "#E69F00", "triton": "#CC79A7", "bound": INK}
COLOURS |= {name: STYLES[name][0] for name in ("window", "full")}
MARKERS = {"": "o", "compiled": "s", "CUDA graph": "^"}


@needs("bra_speed")
def figure(results: Results) -> Figure:
    """Speed-up over the reference, a panel per setting and mode below one another, the shapes side by side."""
    rows = results.sweep("bra_speed")
    times = ratios(wide(rows, TIME))
    shown = times.drop(columns="reference", errors="ignore").dropna(how="all").dropna(axis=1, how="all")
    settings = sorted({label[1:3] for label in times.index}, key=str)
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    panels = [(mode, dtype, batch) for dtype, batch in settings for mode in modes]
    size = 2.4 + max(6.2, 0.62 * len(shown) / len(panels)), 1.2 + 3.4 * len(panels)
    fig, axes = plt.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes[:, 0], strict=True):
        _panel(ax, shown[[label[:3] == panel for label in shown.index]])
        ax.set_title(MODES[panel[0]] + setting_words(panel))
    handles = [Line2D([], [], linestyle="", label=who, **_look(who)) for who in shown.columns]
    fig.legend(handles=handles, loc="outside right center")
    fig.suptitle("BRA: times as fast as the published implementation", x=0.01, ha="left", weight="bold", fontsize=14)
    caption(fig, rows, "The median of the processes that measured each. Bound: keys and values gathered already.")
    return save(fig, "bra_speed")


def _panel(ax: Axes, times: pd.DataFrame) -> None:
    places = range(len(times))
    for who in times.columns:
        ax.plot(
            places, times[who], linestyle="", zorder=2 if who.split(", ")[0] in OTHERS.values() else 3, **_look(who)
        )
    ax.axhline(1, color=INK, linewidth=1)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    ax.set_xticks(places, [_place(label) for label in times.index], fontsize=8)
    ax.set_ylabel("times as fast as the reference")


def _place(label: tuple) -> str:
    _, _, _, height, width, dim, _, topk, _ = label
    return f"{height}x{width}\n{dim} ch\ntopk {topk}"


def _look(who: str) -> dict[str, Any]:
    """How a contestant is drawn: a bound as a dash, a yardstick hollow, launches by their marker."""
    first, _, launch = who.partition(", ")
    colour = COLOURS.get(first) or style(first)[0]
    if first == "bound":
        return {"marker": "_", "color": colour, "markersize": 16, "markeredgewidth": 1 + 2 * (not launch)}
    face = "none" if first in OTHERS.values() else colour
    return {"marker": MARKERS.get(launch, "D"), "color": colour, "markerfacecolor": face, "markersize": 7}
