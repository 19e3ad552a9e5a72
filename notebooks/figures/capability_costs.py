"""Accuracy beside cost: against latency and memory, and with topk."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from notebooks.figures.curves import log_ticks
from notebooks.figures.labels import name_points
from notebooks.figures.pareto import points
from notebooks.lib.limits import MODES
from notebooks.lib.plots import FAINT, INK, MIB, SETTING, Results, needs, save, say, style, usual, without_more
from notebooks.tables.complexity import shape
from notebooks.tables.trainings import counted, settings

MODE = "forward_backward"
COLOURS = {"recall": "#0072B2", "offset": "#D55E00", "match_digits": "#009E73", "count": "#CC79A7"}
COSTS = {"latency": "latency of one layer's training step, ms (median)", "memory": "its peak memory, MiB"}


def joined(results: Results) -> pd.DataFrame:
    """Attentions that are trained at every task that counts and whose cost is measured: mean accuracy and costs.

    ``low`` and ``high`` of the accuracy are means over tasks of the least and the largest of the seeds.
    """
    result, names = settings(results), counted(results)
    result = result[result["task"].isin(names)]
    whole = result.groupby("name").filter(lambda part: part["accuracy"].notna().sum() == len(names))
    if not names or whole.empty or results.sweep("resolution").empty:
        return pd.DataFrame()
    accuracy = whole.groupby("name")[["accuracy", "low", "high"]].mean().add_prefix("accuracy_")
    costs = points(results, MODE)
    costs = costs.drop_duplicates("name").set_index("name")[["latency", "low", "high", "memory"]]
    return accuracy.join(costs, how="inner").dropna(subset=["latency", "memory"])


def on_front(result: pd.DataFrame, cost: str) -> list[str]:
    """Attentions that no other beats: none is at most as costly and clearly more accurate.

    Clearly: its least mean over seeds is above the other's largest.
    """
    return [
        name for name, row in result.iterrows()
        if not ((result[cost] <= row[cost]) & (result["accuracy_low"] > row["accuracy_high"])).any()
    ]  # fmt: skip


@needs("capability")
@needs("resolution")
def pareto(results: Results) -> Figure | None:
    """Mean accuracy against latency and memory of one layer at the grid of comparison."""
    result = joined(results)
    if result.empty:
        return None
    fig, axes = plt.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    for ax, (cost, words) in zip(axes, COSTS.items(), strict=True):
        _scatter(ax, result, cost)
        ax.set(xscale="log", xlabel=words, ylim=(0, 104))
        ax.set_xlim(result[cost].min() / 1.4, result[cost].max() * 1.4)
        log_ticks(ax.xaxis, room=2.2)
    axes[0].set_ylabel("accuracy, %, mean over the tasks that count")
    side = shape(results)
    fig.suptitle(f"Accuracy against cost at {side} x {side} tokens", x=0.01, ha="left", weight="bold", fontsize=14)
    note = (
        f"Accuracy: mean over {', '.join(counted(results))}; bars: mean over tasks of the least and the largest of the "
        "seeds.\nCost: of the resolution sweep, median with quartiles. Ring, on the front: nothing that costs less is "
        "more accurate beyond the seeds' range."
    )
    fig.supxlabel(note, x=0.01, ha="left", fontsize=9, color=FAINT)
    for ax, cost in zip(axes, COSTS, strict=True):
        name_points(ax, result[cost], 100 * result["accuracy_accuracy"])
    return save(fig, "capability_pareto")


def _scatter(ax: Axes, result: pd.DataFrame, cost: str) -> None:
    front = on_front(result, cost)
    for name, row in result.iterrows():
        colour, marker = style(str(name))
        up, down = row["accuracy_high"] - row["accuracy_accuracy"], row["accuracy_accuracy"] - row["accuracy_low"]
        sides = None
        if cost == "latency":
            low, high = row[["low", "high"]].fillna(row[cost])
            sides = [[max(0, row[cost] - low)], [max(0, high - row[cost])]]
        ends = [[100 * down], [100 * up]]
        ax.errorbar(row[cost], 100 * row["accuracy_accuracy"], xerr=sides, yerr=ends, color=colour, marker=marker,
                    markersize=9, markeredgecolor="white", markeredgewidth=0.7, elinewidth=1.3)  # fmt: skip
        if name in front:
            ax.plot(row[cost], 100 * row["accuracy_accuracy"], "o", markeredgecolor=INK, markersize=17,
                    markeredgewidth=1.8, fillstyle="none", zorder=4)  # fmt: skip


def with_topk(results: Results) -> pd.DataFrame:
    """BRA with n_win 7 and no other option, by topk and task."""
    result = settings(results, "capability_bra")
    alone = result["options"].isna() | result["options"].fillna("").str.fullmatch(r"topk=\d+")
    return result[alone & (result["n_win"] == "7")].sort_values("topk")


@needs("capability_bra")
def topk(results: Results) -> Figure | None:
    """Accuracy against topk, and beside it the cost of a layer against topk."""
    result = with_topk(results)
    if result["accuracy"].isna().all():
        return None
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for task, part in result.groupby("task", sort=False):
        colour = COLOURS.get(str(task), INK)
        bars = [100 * (part["accuracy"] - part["low"]), 100 * (part["high"] - part["accuracy"])]
        axes[0].errorbar(part["topk"].astype(float), 100 * part["accuracy"], yerr=bars, color=colour, marker="D",
                         label=task, capsize=3)  # fmt: skip
        seeds = results.sweep("capability_bra").merge(part[["task", "options", "topk", "n_win"]])
        axes[0].plot(seeds["topk"].astype(float), 100 * seeds["accuracy"], ".", color=colour, alpha=0.6)
        axes[0].axhline(100 * part["chance"].iloc[0], color=colour, linestyle=":", linewidth=1, zorder=1)
    axes[0].set(title="What it buys", ylabel="accuracy, %", ylim=(0, 104))
    axes[0].legend(loc="lower right", frameon=True, facecolor="white", edgecolor="none", framealpha=0.9)
    side = _cost_panel(axes[1], results)
    for ax in axes:
        ax.set(xscale="log", xlabel="topk (routed regions of 49)")
        ax.xaxis.set_major_locator(FixedLocator(sorted(result["topk"].unique())))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
    fig.suptitle("BRA: accuracy and cost with topk", x=0.01, ha="left", weight="bold", fontsize=14)
    grid = int(result["height"].iloc[0])
    note = (
        f"Left: a network of two blocks at {grid} x {grid} tokens, n_win 7; mean and range over seeds, dots: each; "
        "dotted: chance."
    )
    if side is not None:
        note += f"\nRight: one layer at {side} x {side} tokens, n_win 7, {MODES[MODE]}, of the topk sweep."
    fig.supxlabel(note, x=0.01, ha="left", fontsize=9, color=FAINT)
    return save(fig, "capability_topk")


def _cost_panel(ax: Axes, results: Results) -> int | None:
    """Latency and memory against topk; returns the tokens per side, None if there are no rows."""
    rows = usual(without_more(results.sweep("topk")), SETTING)
    rows = rows[(rows["n_win"] == "7") & (rows["mode"] == MODE) & (rows["status"] == "ok")].sort_values("topk")
    if rows.empty:
        ax.set_visible(False)
        return None
    for column, words, dash, unit in (
        ("latency_p50_ms", "latency, ms", "o-", 1.0), ("memory_peak_bytes", "memory, MiB", "s--", MIB)
    ):  # fmt: skip
        ax.plot(rows["topk"].astype(float), rows[column].astype(float) / unit, dash, color=INK, label=words)
    ax.set(title="What it costs", ylabel="latency, ms; memory, MiB", yscale="log")
    log_ticks(ax.yaxis)
    ax.legend(loc="upper left")
    return int(rows["height"].iloc[0])


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the capability and cost sweeps."""
    result = [*_front(results), *_topk(results)]
    say(*result)
    return result


def _front(results: Results) -> Iterator[str]:
    result = pd.DataFrame() if results.sweep("capability").empty else joined(results)
    if len(result) < 2:
        return
    for cost, words in (("latency", "latency"), ("memory", "memory")):
        ordered = result.loc[on_front(result, cost)].sort_values(cost)
        listed = [f"{name} ({100 * row['accuracy_accuracy']:.0f} %)" for name, row in ordered.iterrows()]
        yield f"On the front of accuracy and {words} of {len(result)} attentions, cheapest first: {', '.join(listed)}."


def _topk(results: Results) -> Iterator[str]:
    if results.sweep("capability_bra").empty:
        return
    for task, part in with_topk(results).dropna(subset=["accuracy"]).groupby("task", sort=False):
        if len(part) > 1:
            curve = ", ".join(f"{row['topk']}: {100 * row['accuracy']:.0f} %" for _, row in part.iterrows())
            yield f"{task} with topk {curve}."
