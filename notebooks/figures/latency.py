"""Latency against resolution: figure and findings."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from notebooks.figures.curves import CROSS, latency_panel, side_axis, tried, untimed
from notebooks.figures.labels import label_lines
from notebooks.lib.export import publish
from notebooks.lib.limits import MODES, lines, resolution
from notebooks.lib.plots import Results, caption, needs, number, save, say

QUARTILES = ("latency_p25_ms", "latency_p75_ms")


def timed_modes(results: Results) -> list[str]:
    """The modes in which a cell of the resolution sweep was timed."""
    return [mode for mode in MODES if resolution(results, mode)["latency_p50_ms"].notna().any()]


@needs("resolution")
def figure(results: Results) -> Figure | None:
    """A panel per mode and dtype: latency of every attention against tokens per side, bars between the quartiles."""
    modes = timed_modes(results)
    if not modes:
        say("No cell of the `resolution` sweep was timed on this device: `python run_all.py --only resolution --fresh`")
        return None
    rows = results.sweep("resolution").dropna(subset=["dtype"])
    dtypes = list(rows["dtype"].unique())
    fig, axes = plt.subplots(len(dtypes), len(modes), figsize=(7.2 * len(modes), 0.6 + 6 * len(dtypes)),
                             squeeze=False, layout="constrained")  # fmt: skip
    note = ""
    for row_of_axes, dtype in zip(axes, dtypes, strict=True):
        for ax, mode in zip(row_of_axes, modes, strict=True):
            part = rows[(rows["mode"] == mode) & (rows["dtype"] == dtype)]
            if part.empty:
                ax.set_axis_off()
                continue
            sides, drawn = tried(part), list(lines(part))
            side_axis(ax, sides)
            note = untimed(drawn, sides) or note
            latency_panel(ax, drawn, QUARTILES)
            label_lines(ax, drawn, "latency_p50_ms")
            ax.set_title(MODES[mode].capitalize() + f", {dtype}" * (len(dtypes) > 1))
            ax.set_ylabel("latency of one step, ms (median and quartiles)")
    fig.legend(handles=[CROSS], loc="outside upper right")
    fig.suptitle("One step of one attention layer against resolution", x=0.01, ha="left", weight="bold", fontsize=14)
    caption(fig, rows, note, labelled=True)
    return save(fig, "latency")


@needs("resolution")
def launches(results: Results) -> None:
    """Table: wall time over device time, by attention, mode and grid: well above 1, launches cost more than work."""
    rows = results.sweep("resolution").dropna(subset=["launch_bound"])
    if rows.empty:
        say("Whether launches cost more than the work they start is a question of GPUs: no row here has a device time.")
        return
    shares = rows.pivot_table(index="name", columns=["mode", "height"], values="launch_bound", aggfunc="median")
    shares = shares.reindex(columns=[(mode, side) for mode in MODES for side in sorted(set(rows["height"]))])
    frame = shares.map(lambda share: "" if pd.isna(share) else number(share))
    frame.columns = pd.Index([f"{MODES[mode]}, {side} x {side}" for mode, side in shares.columns])
    note = f"Wall time over time on the device with a cold L2 cache; fp32. {rows['device_name'].iloc[0]}."
    publish(frame.rename_axis("attention").reset_index(), "launches", note)


def findings(results: Results) -> list[str]:
    """Sentences computed from the timed rows of the resolution sweep; none without."""
    result = [sentence for mode in timed_modes(results) for sentence in _spread_and_scale(results, mode)]
    result += _launched(results)
    say(*result)
    return result


def _spread_and_scale(results: Results, mode: str) -> Iterator[str]:
    times = pd.DataFrame({label: line["latency_p50_ms"] for _, label, _, line in lines(resolution(results, mode))})
    for side in _ends(times.dropna(how="all")):
        at = times.loc[side].dropna()
        yield (
            f"{MODES[mode].capitalize()} at {side} x {side}: from {number(at.min())} ms with {at.idxmin()} to "
            f"{number(at.max())} ms with {at.idxmax()}, over {len(at)} attentions."
        )


def _launched(results: Results) -> Iterator[str]:
    for mode, rows in results.sweep("resolution").dropna(subset=["launch_bound"]).groupby("mode", sort=False):
        bound = [int(side) for side, part in rows.groupby("height") if part["launch_bound"].median() > 2]
        if bound:
            yield (
                f"{MODES[str(mode)].capitalize()}: up to {max(bound)} x {max(bound)} launching takes most attentions "
                "more than twice as long as the work that is launched."
            )


def _ends(times: pd.DataFrame) -> list[int]:
    """The smallest and the largest grid at which two or more were timed."""
    several = [int(side) for side in times.index[times.notna().sum(axis=1) > 1]]
    return sorted({several[0], several[-1]}) if several else []
