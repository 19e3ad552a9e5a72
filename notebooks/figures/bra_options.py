"""Costs of BRA by topk, number of regions and kv downsampling: figures and findings."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from notebooks.figures.curves import FAILED, failed_marks, log_ticks, short_reason
from notebooks.lib.limits import MODES
from notebooks.lib.plots import (
    FAINT,
    MIB,
    SETTING,
    VARIANTS,
    Results,
    caption,
    needs,
    number,
    save,
    say,
    usual,
    without_more,
)

METRICS = {"latency_p50_ms": ("latency, ms (median)", 1.0), "memory_peak_bytes": ("peak memory, MiB", MIB)}
KV_STYLES = {
    "identity": ("#000000", "*"),
    "avgpool": ("#0072B2", "o"),
    "maxpool": ("#D55E00", "s"),
    "ada_avgpool": ("#56B4E9", "^"),
    "ada_maxpool": ("#E69F00", "v"),
    "fracpool": ("#009E73", "D"),
    "conv": ("#CC79A7", "P"),
}


@needs("topk")
def topk_maps(results: Results) -> Figure:
    """Heat maps of latency and memory over topk and regions per side, a column of panels per mode."""
    rows = usual(without_more(results.sweep("topk")), SETTING)
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    topks = sorted(rows["topk"].dropna().unique())
    width, height = 1 + (2.4 + 0.42 * len(topks)) * len(modes), 2.8 + 0.8 * rows["n_win"].nunique()
    fig, axes = plt.subplots(2, len(modes), figsize=(max(width, 6.5), height), squeeze=False, layout="constrained")
    for metric, row_of_axes in zip(METRICS, axes, strict=True):
        for mode, ax in zip(modes, row_of_axes, strict=True):
            _heat_map(ax, rows[rows["mode"] == mode], metric, ("n_win", "topk"))
            ax.set(title=_panel(metric, mode), xlabel="topk (routed regions per query region)", ylabel="n_win")
    _title(fig, rows, "topk and regions per side")
    caption(
        fig,
        rows,
        f"Darker is more, on a log scale of each panel. Empty: topk exceeds the regions there are.{_why(rows)}",
    )
    return save(fig, "topk")


@needs("kv_downsample")
def kv_maps(results: Results) -> Figure:
    """Heat maps of latency and memory over kv_downsample_mode and remaining keys, a column of panels per mode."""
    rows = usual(results.sweep("kv_downsample"), SETTING)
    rows = rows.assign(keys=rows["kv_tokens_per_query"].astype(float))
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    height = 2.4 + 0.68 * rows["kv_downsample_mode"].nunique()
    fig, axes = plt.subplots(2, len(modes), figsize=(1.5 + 4.5 * len(modes), height), squeeze=False,
                             layout="constrained")  # fmt: skip
    for metric, row_of_axes in zip(METRICS, axes, strict=True):
        for mode, ax in zip(modes, row_of_axes, strict=True):
            _heat_map(ax, rows[rows["mode"] == mode], metric, ("kv_downsample_mode", "keys"))
            ax.set(title=_panel(metric, mode), xlabel="keys that a query attends to", ylabel="")
    _title(fig, rows, "ways to reduce keys and values")
    caption(fig, rows, f"Darker is more, on a log scale of each panel. Empty: the mode was not run so.{_why(rows)}")
    return save(fig, "kv_downsample_map")


def _why(rows: pd.DataFrame) -> str:
    """For the caption: why cells failed; empty if none did."""
    reasons = sorted({short_reason(row) for _, row in rows[rows["status"].isin(FAILED)].iterrows()})
    return f" Red: failed ({'; '.join(reasons)})." if reasons else ""


def _panel(metric: str, mode: str) -> str:
    return f"{METRICS[metric][0]}: {MODES[mode]}"


def _heat_map(ax: Axes, rows: pd.DataFrame, metric: str, over: tuple[str, str]) -> None:
    """One metric over two columns, down and across; failed cells show their status."""
    (down, across), unit = over, METRICS[metric][1]
    table = rows.pivot_table(index=down, columns=across, values=metric, aggfunc="median", dropna=False)
    table = table.loc[sorted(table.index, key=_order)].astype(float) / unit
    table = table.loc[:, table.columns.notna()]
    table.columns = [int(value) for value in table.columns]
    texts = table.map(lambda value: "" if pd.isna(value) else number(value))
    if table.notna().any(axis=None):
        sns.heatmap(table, ax=ax, norm=LogNorm(), cmap="YlGnBu", annot=texts, fmt="", linewidths=1,
                    annot_kws={"fontsize": 9}, cbar=False)  # fmt: skip
    ax.grid(False)
    for row in rows[rows["status"] != "ok"].dropna(subset=[across]).to_dict("records"):
        spot = table.columns.get_loc(int(row[across])) + 0.5, table.index.get_loc(row[down]) + 0.5
        ax.text(*spot, str(row["status"]), ha="center", va="center", fontsize=8, color="#B00020")
    ax.tick_params(length=0, rotation=0)


def _order(value: str) -> tuple[int, int]:
    """Regions per side by number, auto last; kv_downsample modes in the order of KV_STYLES."""
    if value.isdigit():
        return 0, int(value)
    return 1, list(KV_STYLES).index(value) if value in KV_STYLES else len(KV_STYLES)


def _title(fig: Figure, rows: pd.DataFrame, what: str) -> None:
    text = f"BRA at {rows['height'].iloc[0]} x {rows['width'].iloc[0]} tokens: {what}"
    fig.suptitle(text, x=0.01, ha="left", weight="bold", fontsize=14)


@needs("kv_downsample")
def kv_curves(results: Results) -> Figure:
    """Latency and memory against the keys that a query attends to, a line per kv_downsample_mode."""
    rows = usual(results.sweep("kv_downsample"), SETTING)
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    fig, axes = plt.subplots(2, len(modes), figsize=(1.8 + 5.2 * len(modes), 7.6), squeeze=False, layout="constrained")
    for metric, row_of_axes in zip(METRICS, axes, strict=True):
        for mode, ax in zip(modes, row_of_axes, strict=True):
            _kv_panel(ax, rows[rows["mode"] == mode], metric, mode)
    shown = {name: pair for name, pair in KV_STYLES.items() if (rows["kv_downsample_mode"] == name).any()}
    handles = [Line2D([], [], color=colour, marker=marker, label=name) for name, (colour, marker) in shown.items()]
    fig.legend(handles=handles, loc="outside right center", title="kv_downsample_mode")
    _title(fig, rows, "fewer keys and values per region")
    caption(fig, rows, "Dotted: identity, nothing is reduced. Crosses: failed.")
    return save(fig, "kv_downsample")


def _kv_panel(ax: Axes, rows: pd.DataFrame, metric: str, mode: str) -> None:
    words, unit = METRICS[metric]
    failed: list[tuple[float, str, str, str]] = []
    for rank, (name, (colour, marker)) in enumerate(KV_STYLES.items()):
        part = rows[(rows["kv_downsample_mode"] == name)].sort_values("kv_tokens_per_query")
        keys, values = part["kv_tokens_per_query"].astype(float), part[metric].astype(float) / unit
        # Later lines are narrower, so that coinciding lines stay visible.
        ax.plot(keys, values, marker=marker, color=colour, linewidth=4.4 - 0.5 * rank, markersize=14 - 1.3 * rank,
                markeredgecolor="white", markeredgewidth=0.7, zorder=3 if name == "identity" else 2)  # fmt: skip
        if name == "identity" and values.notna().any():
            ax.axhline(values.median(), color=FAINT, linestyle=":", zorder=1)
        if metric == "latency_p50_ms":
            for x, row in zip(keys, part.itertuples(), strict=True):
                if pd.notna(row.latency_low_ms) and pd.notna(row.latency_high_ms):
                    ax.plot([x, x], [row.latency_low_ms, row.latency_high_ms], color=colour, linewidth=1)
        gone = part[part["status"].isin(FAILED)].dropna(subset=["kv_tokens_per_query"])
        failed += [(row["kv_tokens_per_query"], colour, name, short_reason(row)) for _, row in gone.iterrows()]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(rows["kv_tokens_per_query"].dropna().unique())))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yscale("log")
    failed_marks(ax, failed)
    log_ticks(ax.yaxis)
    ax.set(title=f"{words}: {MODES[mode]}", xlabel="keys that a query attends to", ylabel=words)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the topk and kv_downsample sweeps."""
    result = [sentence for mode in MODES for part in (_topk, _routing, _kv) for sentence in part(results, mode)]
    say(*result)
    return result


def _topk(results: Results, mode: str) -> Iterator[str]:
    rows = usual(without_more(results.sweep("topk")), SETTING).query("mode == @mode and status == 'ok'")
    counts = rows.groupby("n_win")["topk"].nunique().sort_values(kind="stable")
    if counts.empty or counts.iloc[-1] < 2:
        return
    n_win = "7" if counts.get("7", 0) > 1 else str(counts.index[-1])
    columns = ["macs_counted", "latency_p50_ms", "memory_peak_bytes"]
    values = rows[rows["n_win"] == n_win].groupby("topk")[columns].median().astype(float)
    low, high = values.index.min(), values.index.max()
    macs, time, memory = values.loc[high] / values.loc[low]
    yield (
        f"{MODES[mode].capitalize()}, n_win {n_win}: topk {high} instead of {low} costs {macs:.1f}x the MACs, "
        f"{time:.1f}x the time and {memory:.1f}x the memory."
    )


def _routing(results: Results, mode: str) -> Iterator[str]:
    """What each further option of the topk sweep costs beside the same cells without it."""
    rows = results.sweep("topk").query("mode == @mode and status == 'ok'")
    columns = ["macs_counted", "latency_p50_ms", "memory_peak_bytes"]
    cells = rows.set_index(list(VARIANTS))[columns].astype(float)
    more = rows["other_options"].notna().to_numpy()
    without = cells[~more].groupby(level=list(VARIANTS)).median()
    for options, impl in rows.loc[more, ["other_options", "impl_requested"]].drop_duplicates().itertuples(index=False):
        chosen = ((rows["other_options"] == options) & (rows["impl_requested"] == impl)).fillna(False).to_numpy()
        ratios = (cells[chosen].groupby(level=list(VARIANTS)).median() / without).dropna(how="all")
        if len(ratios):
            macs, time, memory = ratios.median()
            topks = ", ".join(str(topk) for topk in sorted(set(ratios.index.get_level_values("topk"))))
            yield (
                f"{MODES[mode].capitalize()}, {impl}, topk {topks}: {options} costs {macs:.2f}x the MACs, "
                f"{time:.2f}x the time and {memory:.2f}x the memory."
            )


def _kv(results: Results, mode: str) -> Iterator[str]:
    rows = usual(results.sweep("kv_downsample"), SETTING).query("mode == @mode and status == 'ok'")
    whole, reduced = rows[rows["kv_downsample_mode"] == "identity"], rows[rows["kv_downsample_mode"] != "identity"]
    if whole.empty or reduced.empty:
        return
    unmodified, best = whole.iloc[0], reduced.loc[reduced["latency_p50_ms"].idxmin()]
    time, memory = (best[column] / unmodified[column] for column in ("latency_p50_ms", "memory_peak_bytes"))
    yield (
        f"{MODES[mode].capitalize()}: the fastest reduction, {best['kv_downsample_mode']} from "
        f"{unmodified['kv_tokens_per_query']:.0f} to {best['kv_tokens_per_query']:.0f} keys per query, "
        f"takes {time:.0%} of the time and {memory:.0%} of the memory of identity."
    )
