"""The figure on the README's first screen."""

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from notebooks.figures.curves import (
    CROSS,
    MEASURED,
    PREDICTED,
    drawable,
    layers,
    limit_line,
    memory_axis,
    memory_line,
)
from notebooks.figures.labels import label_lines
from notebooks.lib.limits import Line, cells, crossing, device_memory, lines, resolution
from notebooks.lib.plots import Results, caption, needs, save, size, style


@needs("resolution")
def figure(results: Results) -> Figure:
    """Memory of one attention layer's training step against the grid, and where it runs out."""
    mode = "forward_backward" if len(resolution(results, "forward_backward")) else "forward"
    step = "layer's training step" if mode == "forward_backward" else "layer's forward pass"
    rows, (memory, how) = drawable(resolution(results, mode)), device_memory(results)
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    drawn = list(lines(rows))
    for line, layer in zip(drawn, layers(drawn), strict=True):
        memory_line(ax, line, layer)
    limit_line(ax, memory, how)
    memory_axis(ax, sorted(cells(rows).index), f"peak memory of one {step}")
    _mark_crossings(ax, drawn, memory)
    text = "\n".join(textwrap.wrap(_headline(rows, drawn, memory, step).replace(" x ", "\u00a0x\u00a0"), 86))
    fig.suptitle(text, x=0.01, ha="left", weight="bold", fontsize=13)
    label_lines(ax, drawn, "memory_predicted_bytes")
    ax.legend(handles=[PREDICTED, MEASURED, CROSS], loc="upper left")
    caption(fig, rows, labelled=True)
    return save(fig, "readme")


def _mark_crossings(ax: Axes, drawn: list[Line], limit: float) -> None:
    """A ring where full attention and BRA exceed the memory, and below it, at the axis, the grid."""
    bottom, stacked = ax.get_ylim()[0], {True: 0, False: 0}
    for name, label, _, line in drawn:
        side = crossing(line["memory_predicted_bytes"], limit).side
        if name in ("full", "bra") and side:
            colour, leftwards = style(name)[0], name == "full" or side > 0.37 * ax.get_xlim()[1]
            ax.plot([side, side], [bottom, limit], ":", color=colour, linewidth=1.4, zorder=1.5)
            ax.plot(side, limit, "o", color="white", markeredgecolor=colour, markeredgewidth=2, markersize=9, zorder=8)
            text, height = f"{label} runs out\nnear {side:.0f} x {side:.0f}", 0.03 + 0.12 * stacked[leftwards]
            ax.annotate(text, (side, height), xycoords=ax.get_xaxis_transform(), xytext=(-6 if leftwards else 6, 0),
                        textcoords="offset points", va="bottom", ha="right" if leftwards else "left", fontsize=11,
                        weight="bold", color=colour, zorder=9,
                        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})  # fmt: skip
            stacked[leftwards] += 1
    ax.set_ylim(bottom=bottom)


def _headline(rows: pd.DataFrame, drawn: list[Line], limit: float, step: str) -> str:
    """Title: the grids at which full attention and BRA run out, and how many attentions fit at the largest."""
    published = rows.loc[rows["name"] == "bra", "impl_requested"].eq("reference").any()
    words = {"full": "full attention", "bra": "BRA as published" if published else "BRA"}
    curves = [(name, line["memory_predicted_bytes"].dropna()) for name, _, _, line in drawn]
    curves = [(name, curve) for name, curve in curves if len(curve)]
    ends = {name: crossing(curve, limit).side for name, curve in reversed(curves) if name in words}
    parts = [f"{side:.0f} x {side:.0f} with {words[name]}" for name, side in sorted(ends.items(), reverse=True) if side]
    largest = max((int(curve.index[-1]) for _, curve in curves), default=0)
    fit = {name for name, curve in curves if int(curve.index[-1]) == largest and curve.iloc[-1] <= limit}
    rest = f"{len(fit)} of {len({name for name, _ in curves})} attentions still fit at {largest} x {largest}"
    if not parts:
        return f"In {size(limit)}, {rest} tokens"
    fitting = " and ".join(parts).replace(" with", " tokens with", 1)
    return f"{size(limit)} hold one {step} of about {fitting}; {rest}"
