"""The Pareto front of the attentions in latency, memory and MACs at one grid."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from notebooks.figures.curves import CROSS, FAILED, failed_marks, log_ticks, short_reason
from notebooks.figures.labels import name_points
from notebooks.lib.export import publish
from notebooks.lib.limits import MODES, cells
from notebooks.lib.plots import (
    DASHES,
    FAINT,
    INK,
    MIB,
    Results,
    caption,
    needs,
    number,
    save,
    say,
    series,
    style,
    usual,
)
from notebooks.tables.complexity import at_shape, shape

COSTS = ["latency", "memory", "macs"]
AXES = {"macs": "MACs of the step, millions", "memory": "peak memory, MiB", "keys": "keys that a query attends to"}
MARGIN = 1.5
"""Factor by which the horizontal axes exceed their data."""
FILLS = dict(zip(DASHES, ("full", "none", "left", "bottom"), strict=True))
"""Fill of the marks of one attention's variants, by the line style of their curves."""
CERTAIN, POSSIBLE = "yes", "within noise"
RINGS = [
    Line2D([], [], linestyle="", marker="o", fillstyle="none", color=colour, markersize=13, markeredgewidth=width,
           label=label)
    for colour, width, label in ((INK, 1.8, "ring: on the front"), (FAINT, 1.0, "faint: within noise"))
]  # fmt: skip


def points(results: Results, mode: str) -> pd.DataFrame:
    """Costs of each attention at the grid of comparison: latency in ms with quartiles, MiB, millions of MACs."""
    rows = usual(at_shape(results).query("mode == @mode"))
    result = {}
    for name, label, dash, part in series(rows):
        cell, first = cells(part).iloc[0], part.iloc[0]
        memory = cell["memory_peak_bytes"] if pd.notna(cell["memory_peak_bytes"]) else cell["memory_predicted_bytes"]
        backward = 0 if pd.isna(first["macs_backward_counted"]) else first["macs_backward_counted"]
        result[label] = {
            "name": name, "fill": FILLS[dash],
            "latency": cell["latency_p50_ms"], "low": cell["latency_p25_ms"], "high": cell["latency_p75_ms"],
            "memory": memory / MIB, "macs": (cell["macs_counted"] + backward) / 1e6,
            "keys": first["kv_tokens_per_query"], "status": cell["status"], "reason": cell["reason"],
        }  # fmt: skip
    frame = pd.DataFrame.from_dict(result, orient="index")
    numbers = [*COSTS, "low", "high", "keys"]
    return frame.astype({column: float for column in numbers}) if len(frame) else frame


def front(costs: pd.DataFrame) -> pd.Series:
    """Whether no other row is at least as good in every column and better in one; less is better."""
    values = costs.to_numpy(float)
    return pd.Series([not _beaten(row, values) for row in values], index=costs.index, dtype=bool)


def _beaten(row: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others <= row).all(axis=1) & (others < row).any(axis=1)).any())


def membership(result: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Whether each attention is on the front: yes, within noise, or no; empty where a cost is unknown.

    Yes: even with its latency at its upper quartile, and all others at their lower ones. Within noise: only with its
    latency at its lower quartile, and all others at their upper ones.
    """
    known = result.dropna(subset=columns)
    low, high = (known[end].fillna(known["latency"]) for end in ("low", "high"))
    texts = pd.Series("", index=result.index)
    for label in known.index:
        worst, best = (known[columns].assign(latency=others) for others in (low, high))
        worst.loc[label, "latency"], best.loc[label, "latency"] = high[label], low[label]
        texts[label] = CERTAIN if front(worst)[label] else POSSIBLE if front(best)[label] else "no"
    return texts


def fronts(result: pd.DataFrame) -> pd.DataFrame:
    """Membership of the front of the three costs, and of the one where more keys per query count as better."""
    against = result.assign(unreached=-result["keys"])
    return pd.DataFrame(
        {"costs": membership(result, COSTS), "costs and keys": membership(against, [*COSTS, "unreached"])}
    )


@needs("resolution")
def table(results: Results, mode: str) -> None:
    """Table: the costs of each attention at one grid, and whether it is on the fronts."""
    result = points(results, mode)
    if result.empty or result["latency"].isna().all():
        say(f"Nothing was timed at {shape(results)} x {shape(results)}, {MODES[mode]}: there is no front to draw.")
        return
    result = result.join(fronts(result)).sort_values(COSTS)
    texts = pd.DataFrame({
        "attention": result.index,
        "latency (ms)": [_or_status(*pair) for pair in zip(result["latency"], result["status"], strict=True)],
        "memory (MiB)": [_text(value) for value in result["memory"]],
        "MACs of the step (M)": [_text(value) for value in result["macs"]],
        "keys per query": [_text(value) for value in result["keys"]],
        "on the front of the costs": result["costs"],
        "on the front of costs and keys": result["costs and keys"],
    })  # fmt: skip
    note = (
        f"At {shape(results)} x {shape(results)} tokens, {MODES[mode]}; latency: median. Yes: nothing else is at least "
        "as good in every column and better in one, even if its latency were its upper quartile and all others' their "
        "lower ones. Within noise: so only the other way round. Second front: more keys per query count as better, "
        "which says how far a query sees and nothing of how well."
    )
    publish(texts, f"pareto_{mode}", note)


def _text(value: float) -> str:
    return "" if pd.isna(value) else number(value)


def _or_status(value: float, status: str) -> str:
    return status if pd.isna(value) else number(value)


@needs("resolution")
def figure(results: Results, mode: str) -> Figure | None:
    """Latency against MACs, memory and keys per query at one grid, with rings around the front."""
    result = points(results, mode)
    if result.empty or result["latency"].isna().all():
        return None
    on = fronts(result)
    fig, axes = plt.subplots(1, 3, figsize=(15, 6), sharey=True, layout="constrained")
    shown = result[result["latency"].notna() | result["status"].isin(FAILED)]
    for ax, (column, words) in zip(axes, AXES.items(), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=words)
        if shown[column].notna().any():
            ax.set_xlim(shown[column].min() / MARGIN, shown[column].max() * MARGIN)
        _scatter(ax, result, column, on["costs and keys" if column == "keys" else "costs"])
    for ax in axes:
        log_ticks(ax.xaxis, room=2.2)
    failed = result[result["status"].isin(FAILED)]
    limits = axes[0].get_ylim()
    for ax, column in zip(axes, AXES, strict=True):
        known = failed.dropna(subset=[column])
        failed_marks(ax, [(row[column], style(row["name"])[0], str(label), short_reason(row)) for label, row in
                          known.iterrows()], limits)  # fmt: skip
    log_ticks(axes[0].yaxis)
    axes[0].set_ylabel("latency of one step, ms (median, quartiles)")
    for ax, title in zip(axes, ("MACs", "Memory", "Keys: more are better"), strict=True):
        ax.set_title(title)
    fig.legend(handles=[*RINGS, *([CROSS] if len(failed) else [])], loc="outside upper right", ncols=3)
    fig.suptitle(f"Costs at {shape(results)} x {shape(results)} tokens, {MODES[mode]}", x=0.01, ha="left",
                 weight="bold", fontsize=14)  # fmt: skip
    note = "Rings, left and middle: the Pareto front of latency, memory and MACs. Right: with keys per query as a gain."
    caption(fig, usual(at_shape(results).query("mode == @mode")), note, labelled=True)
    for ax, column in zip(axes, AXES, strict=True):
        name_points(ax, result[column], result["latency"])
    return save(fig, f"pareto_{mode}")


def _scatter(ax: Axes, result: pd.DataFrame, column: str, on: pd.Series) -> None:
    for label, row in result.dropna(subset=[column, "latency"]).iterrows():
        colour, marker = style(row["name"])
        bars = [[max(row["latency"] - row["low"], 0)], [max(row["high"] - row["latency"], 0)]]
        edge = "white" if row["fill"] == "full" else colour
        ax.errorbar(row[column], row["latency"], yerr=np.nan_to_num(bars), color=colour, marker=marker, markersize=9,
                    markeredgecolor=edge, markeredgewidth=0.7, elinewidth=1.3, fillstyle=row["fill"])  # fmt: skip
        if on[label] in (CERTAIN, POSSIBLE):
            ax.plot(row[column], row["latency"], "o", color="none", markeredgecolor=INK, markersize=17,
                    markeredgewidth=1.8, linestyle="", zorder=4, fillstyle="none")  # fmt: skip
            if on[label] == POSSIBLE:
                ax.lines[-1].set(markeredgewidth=1.0, alpha=0.55)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows at the grid of comparison; none without the rows."""
    result = [] if results.sweep("resolution").empty else [s for mode in MODES for s in _sentences(results, mode)]
    say(*result)
    return result


def _sentences(results: Results, mode: str) -> Iterator[str]:
    result, side = points(results, mode), shape(results)
    timed = result.dropna(subset=COSTS) if len(result) else result
    if len(timed) < 2:
        return
    on = fronts(timed)
    sure, maybe = (list(timed.index[on["costs"] == word]) for word in (CERTAIN, POSSIBLE))
    yield (
        f"{MODES[mode].capitalize()} at {side} x {side}, on the Pareto front of latency, memory and MACs of "
        f"{len(timed)} attentions: {', '.join(sure) or 'none for certain'}"
        f"{'; within noise also ' + ', '.join(maybe) if maybe else ''}."
    )
    reach = list(timed.index[on["costs and keys"].isin((CERTAIN, POSSIBLE))])
    out = list(timed.index[~on["costs and keys"].isin((CERTAIN, POSSIBLE)) & timed["keys"].notna()])
    if timed["keys"].notna().any() and out:
        yield (
            f"{MODES[mode].capitalize()} at {side} x {side}, if more keys per query count as better too: "
            f"{', '.join(reach)} are not beaten; {', '.join(out)} are, in all four."
        )
