"""The MACs of BRA by part: projection, routing, attention and local convolution."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from notebooks.lib.plots import FAINT, INK, Results, caption, needs, number, save, say, without_more

PARTS = {"projection": "#0072B2", "routing": "#D55E00", "attention": "#009E73", "local_conv": "#E69F00"}


def split(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of each part in the MACs by the attention's formula, with ``PARTS`` as columns."""
    parts = rows[[f"macs_{part}" for part in PARTS]].astype(float)
    parts.columns = pd.Index(list(PARTS))
    return parts.div(rows["macs_analytic"].astype(float), axis=0)


def panels(results: Results) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title of each panel and its forward rows, by label, with the other option held fixed."""
    topk = _forward(results, "topk")
    if len(topk):
        n_win = "7" if (topk["n_win"] == "7").any() else topk["n_win"].mode().iloc[0]
        few = 4 if (topk["topk"] == 4).any() else topk["topk"].mode().iloc[0]
        yield f"topk, with n_win {n_win}", _labelled(topk[topk["n_win"] == n_win], "topk")
        yield f"n_win, with topk {few}", _labelled(topk[topk["topk"] == few], "n_win")
    kv = _forward(results, "kv_downsample").dropna(subset=["kv_tokens_per_query"])
    if len(kv):
        yield "kv_downsample", _alike(kv)


def _alike(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per number of keys and MACs, most keys first, labelled by the first mode and the count of others."""
    first = []
    for (keys, _), part in rows.groupby(["kv_tokens_per_query", "macs_analytic"], sort=False):
        modes = list(dict.fromkeys(part["kv_downsample_mode"]))
        more = f" + {len(modes) - 1}" if len(modes) > 1 else ""
        first.append(part.iloc[:1].assign(label=f"{keys:,.0f} keys: {modes[0]}{more}"))
    return pd.concat(first).sort_values("kv_tokens_per_query", ascending=False, kind="stable").set_index("label")


def _forward(results: Results, sweep: str) -> pd.DataFrame:
    return (
        without_more(results.sweep(sweep)).query("mode == 'forward'").dropna(subset=["macs_analytic", "macs_attention"])
    )


def _labelled(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    rows = rows.assign(number=pd.to_numeric(rows[column], errors="coerce")).sort_values("number")
    return rows.assign(label=rows[column].astype(str)).drop_duplicates("label").set_index("label")


@needs("topk")
def figure(results: Results) -> Figure | None:
    """Stacked shares of the forward pass's MACs over topk, n_win and kv_downsample, the total beside each bar."""
    shown = list(panels(results))
    if not shown:
        say("No row here says what its MACs are spent on.")
        return None
    longest = max(len(rows) for _, rows in shown)
    fig, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 2 + 0.4 * longest), squeeze=False,
                             layout="constrained")  # fmt: skip
    for ax, (title, rows) in zip(axes[0], shown, strict=True):
        _bars(ax, rows, longest)
        ax.set_title(f"over {title}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
    labels = [part.replace("_", " ") for part in PARTS]
    fig.legend(handles, labels, loc="outside upper right", ncols=len(PARTS))
    rows = pd.concat([rows.reset_index(drop=True) for _, rows in shown])
    title = f"What BRA's MACs are spent on at {rows['height'].iloc[0]} x {rows['width'].iloc[0]} tokens"
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=14)
    caption(
        fig,
        rows,
        "Of the forward pass, by formula; beside each bar, the total. + 4: as many other modes cost the same.",
    )
    return save(fig, "cost_split")


def _bars(ax: Axes, rows: pd.DataFrame, places: int) -> None:
    shares, left = split(rows), pd.Series(0.0, index=rows.index)
    for part, colour in PARTS.items():
        width = 100 * shares[part]
        ax.barh(rows.index, width, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.8)
        for place, (value, start) in enumerate(zip(width, left, strict=True)):
            if value >= 10:
                ax.text(start + value / 2, place, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white",
                        weight="bold")  # fmt: skip
        left += width
    for place, macs in enumerate(rows["macs_analytic"].astype(float)):
        ax.text(101.5, place, f"{number(macs / 1e6)} M", va="center", fontsize=9, color=INK)
    ax.set(xlim=(0, 100), ylim=(places - 0.5, -0.5), xlabel="share of the MACs, %")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.label.set_color(FAINT)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the topk and kv_downsample sweeps."""
    result = []
    for title, rows in panels(results):
        if len(rows) > 1:
            shares = split(rows)
            first, last = shares.iloc[0], shares.iloc[-1]
            moved = (last - first).abs().idxmax()
            result.append(
                f"Over {title}, from {rows.index[0]} to {rows.index[-1]}: {moved.replace('_', ' ')} goes from "
                f"{first[moved]:.0%} to {last[moved]:.0%} of the MACs; routing is {shares['routing'].min():.2%} to "
                f"{shares['routing'].max():.2%}."
            )
    say(*result)
    return result
