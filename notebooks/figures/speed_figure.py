"""The figure of speed-ups: every implementation of BRA beside its baselines."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from notebooks.figures.curves import log_ticks
from notebooks.lib.limits import MODES
from notebooks.lib.plots import INK, STYLES, Results, caption, needs, save, style
from notebooks.tables.speed import DEVICE_TIME, GRAPH, OTHERS, TIME, ratios, wide

EAGER = "eager wall time"
COLOURS = {"reference": "#000000", "sdpa": "#0072B2", "flex": "#E69F00", "triton": "#CC79A7", "pre-gathered": INK}
COLOURS |= {name: STYLES[name][0] for name in ("window", "full")}
MARKERS = {"": "o", "compiled": "s", "CUDA graph": "o", EAGER: "^"}


@needs("bra_speed")
def figure(results: Results) -> Figure:
    """Speed-up over the reference: a panel per dtype and mode, with a mark per shape and contestant."""
    rows = results.sweep("bra_speed")
    on_gpu = (rows["device"] == "cuda").all()
    shown = _on_gpu(rows) if on_gpu else ratios(wide(rows, TIME))
    shown = shown.drop(columns="reference", errors="ignore").dropna(how="all").dropna(axis=1, how="all")
    dtypes = sorted({label[1] for label in shown.index})
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    most = max(shown.groupby(level=["mode", "dtype"]).size())
    # A panel with many shapes needs the width of a page.
    across = len(modes) if most <= 12 else 1
    down = len(dtypes) * len(modes) // across
    size = 2.6 + across * max(6.2, 0.62 * most), 1.6 + 3.3 * down
    fig, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    panels = [(mode, dtype) for dtype in dtypes for mode in modes]
    for (mode, dtype), ax in zip(panels, axes.flat, strict=True):
        part = shown[[label[:2] == (mode, dtype) for label in shown.index]]
        _panel(ax, part.sort_index(level="batch", sort_remaining=False, kind="stable"))
        ax.set_title(f"{MODES[mode]}, {dtype}")
    handles = [Line2D([], [], linestyle="", label=variant, **_look(variant)) for variant in shown.columns]
    fig.legend(handles=handles, loc="outside right center")
    fig.suptitle("BRA: times as fast as the published implementation", x=0.01, ha="left", weight="bold", fontsize=14)
    note = "Pre-gathered: SDPA on keys and values gathered already. Window and full: SDPA, without LePE."
    if (shown.index.get_level_values("batch") != 1).any():
        note = f"b: batch. {note}"
    if on_gpu:
        note += "\nTime on the device, each replayed from a CUDA graph where it can be; triangles: wall time, eager."
    caption(fig, rows, note)
    return save(fig, "bra_speed")


def _on_gpu(rows: pd.DataFrame) -> pd.DataFrame:
    """Ratios of device times, from CUDA graphs if available, and of the Triton kernels' eager wall times."""
    device, wall = (ratios(wide(rows, column)) for column in (DEVICE_TIME, TIME))
    table = pd.DataFrame()
    for variant in device:
        if not variant.endswith(GRAPH):
            eager = device[variant]
            table[variant] = device[variant + GRAPH].fillna(eager) if variant + GRAPH in device else eager
    return table.assign(**{f"triton, {EAGER}": wall["triton"]}) if "triton" in wall else table


def _panel(ax: Axes, times: pd.DataFrame) -> None:
    places = range(len(times))
    for variant in times.columns:
        ax.plot(
            places,
            times[variant],
            linestyle="",
            zorder=2 if variant.split(", ")[0] in OTHERS.values() else 3,
            **_look(variant),
        )
    ax.axhline(1, color=INK, linewidth=1)
    ax.set_yscale("log")
    log_ticks(ax.yaxis)
    ax.set_xticks(places, [_place(label) for label in times.index], fontsize=8)
    ax.set_ylabel("times as fast as the reference")


def _place(label: tuple) -> str:
    _, _, batch, height, width, dim, _, topk, _ = label
    return f"{height}x{width}\n{dim} ch\ntopk {topk}" + (f"\nb={batch}" if batch != 1 else "")


def _look(variant: str) -> dict[str, Any]:
    """Marker of a contestant: a dash for pre-gathered, hollow for other attentions, its shape by launch."""
    first, _, launch = variant.partition(", ")
    colour = COLOURS.get(first) or style(first)[0]
    if first == "pre-gathered":
        return {"marker": "_", "color": colour, "markersize": 16, "markeredgewidth": 1 + 2 * (not launch)}
    face = "none" if first in OTHERS.values() or launch == EAGER else colour
    return {"marker": MARKERS.get(launch, "D"), "color": colour, "markerfacecolor": face, "markersize": 7}
