"""Gains of bf16 over fp32: table and findings from the precision sweep and the resolution sweep's fp32 rows."""

from collections.abc import Iterator

import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.limits import MODES
from notebooks.lib.plots import Results, needs, number, say
from notebooks.tables.speed import geometric_mean

CELL = ["name", "height", "width", "mode", "dim", "num_heads", "batch", "impl_requested"]


def gains(results: Results, column: str) -> pd.DataFrame:
    """Ratio fp32 / bf16 of a column, where both were measured: a row per attention, a column per mode and grid."""
    rows = pd.concat([results.sweep("precision"), results.sweep("resolution")])
    rows = rows[(rows["status"] == "ok") & rows[column].notna() & ~rows["compiled"] & ~rows["cuda_graph"]]
    both = rows.pivot_table(index=CELL, columns="dtype", values=column, aggfunc="median", dropna=False)
    if not {"fp32", "bf16"} <= set(both.columns):
        return pd.DataFrame()
    gain = (both["fp32"] / both["bf16"]).dropna().rename("gain").reset_index()
    return gain.pivot_table(index="name", columns=["mode", "height"], values="gain", aggfunc="median")


@needs("precision")
def table(results: Results) -> None:
    """Table: how many times faster a step is in bf16, by attention, mode and grid."""
    faster = gains(results, "latency_p50_ms")
    if faster.empty:
        say("No attention was measured in both fp32 and bf16 on this device.")
        return
    head = {(mode, side): f"{MODES[mode]}, {side} x {side}" for mode, side in faster.columns}
    frame = faster.map(lambda times: "" if pd.isna(times) else f"{number(times)}x")
    frame.columns = pd.Index([head[column] for column in faster.columns])
    note = (
        "How many times faster a step is under bf16 autocast than in fp32: median over median, both as published. "
        f"Parameters stay fp32, so casts are part of the step. {results.sweep('precision')['device_name'].iloc[0]}."
    )
    publish(frame.rename_axis("attention").reset_index(), "precision", note)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows; none without."""
    result = [] if results.sweep("precision").empty else list(_sentences(results))
    say(*result)
    return result


def _sentences(results: Results) -> Iterator[str]:
    faster, smaller = gains(results, "latency_p50_ms"), gains(results, "memory_peak_bytes")
    for mode, side in faster.columns:
        times = faster[mode, side].dropna()
        text = (
            f"bf16 instead of fp32, {MODES[mode]} at {side} x {side}: {number(geometric_mean(times))}x as fast "
            f"(geometric mean of {len(times)}; from {number(times.min())}x, {times.idxmin()}, to "
            f"{number(times.max())}x, {times.idxmax()})"
        )
        less = smaller[mode, side].dropna() if (mode, side) in smaller.columns else times.iloc[:0]
        yield text + (f", with {number(geometric_mean(less))}x less memory." if len(less) else ".")
