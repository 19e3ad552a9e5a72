"""Speed-up of each implementation over the published BRA: numbers, no drawing."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.limits import MODES
from notebooks.lib.plots import MIB, Results, needs, number, say

GRID = ["height", "width", "dim", "num_heads"]
SHAPE = [*GRID, "topk", "n_win"]
SETTING = ["mode", "dtype", "batch"]
EIGHT = {(56, 1), (28, 4), (14, 16), (112, 4), (224, 4), (64, 4), (256, 1), (256, 4)}
"""Grid and topk of the shapes that geometric means are taken over."""
DIMS = {56: 64, 28: 128, 14: 256, 112: 64, 224: 64, 64: 128, 256: 64}
"""Channels by grid."""
TIME, DEVICE_TIME, MEMORY = "latency_p50_ms", "device_time_p50_ms", "memory"
GRAPH = ", CUDA graph"
OTHERS = {"bra_pregathered": "pre-gathered", "window": "window", "full": "full"}
STYLES = {"compiled": "compiled", "cuda_graph": "CUDA graph"}


def contestant(row: pd.Series) -> str:
    """Label of what ran: an implementation of BRA or a baseline, and how it was launched."""
    variant = OTHERS.get(row["name"], row["impl_requested"])
    return ", ".join([variant, *(words for column, words in STYLES.items() if row[column])])


def wide(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per mode, dtype, batch and shape; a column per contestant, the reference first, the baselines last.

    Replicates become their median. Windows and full attention have no topk and no n_win, so they are repeated for
    every shape of their grid, channels and heads.
    """
    predicted = rows["memory_predicted_bytes"].where(rows["status"].isin(("ok", "oom", "predicted")))
    memory = rows["memory_peak_bytes"].fillna(predicted)
    rows = rows.assign(contestant=rows.apply(contestant, axis=1), memory=memory)
    how = "first" if column == "status" else "median"
    routed, unmodified = rows[rows["n_win"].notna()], rows[rows["n_win"].isna()]
    table = routed.groupby([*SETTING, *SHAPE, "contestant"])[column].agg(how).unstack()
    beside = unmodified.groupby([*SETTING, *GRID, "contestant"])[column].agg(how).unstack()
    table = table.join(beside, on=[*SETTING, *GRID])
    return table[sorted(table.columns, key=_rank)]


def _rank(variant: str) -> tuple[int, str]:
    order = ["reference", *OTHERS.values()]
    first = variant.split(", ")[0]
    return (0 if variant == "reference" else 1 + order.index(first) if first in OTHERS.values() else 1), variant


def ratios(values: pd.DataFrame) -> pd.DataFrame:
    """The reference's value over each contestant's, row by row.

    A replay from a CUDA graph is compared with the reference from a CUDA graph, if that was measured.
    """
    values = values.astype(float)
    if "reference" not in values:
        return values * np.nan
    eager = values["reference"]
    graph = values.get("reference" + GRAPH, eager)
    return pd.DataFrame(
        {variant: (graph if variant.endswith(GRAPH) else eager) / values[variant] for variant in values},
        values.index,
    )


def geometric_mean(values: pd.Series) -> float:
    """Geometric mean of the values without gaps; NaN if empty."""
    return float(np.exp(np.log(values.dropna().astype(float)).mean()))


def of_the_eight(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the eight shapes."""
    places = zip(*(table.index.get_level_values(level) for level in ("height", "width", "topk", "dim")), strict=True)
    return table[[h == w and (h, topk) in EIGHT and dim == DIMS[h] for h, w, topk, dim in places]]


@needs("bra_speed")
def speed_table(results: Results, mode: str) -> None:
    """Table: the reference's time and how many times faster the others are, shape by shape."""
    note = (
        "The reference: median wall time in ms. The others: how many times faster; those from a CUDA graph, than the "
        "reference from one. Pre-gathered: SDPA on keys and values that lie gathered already, with BRA's projections "
        "and LePE. Windows and full attention: SDPA, at equal channels and heads, without LePE. A word says how a cell "
        "failed; a time in ms that the reference has none."
    )
    _table(results, mode, TIME, 1.0, "bra_speed", note)


@needs("bra_speed")
def memory_table(results: Results, mode: str) -> None:
    """Table: the reference's peak memory and how many times less the others need, shape by shape."""
    note = (
        "The reference: peak memory in MiB. The others: how many times less; in MiB where the reference has none. Of a "
        "cell that did not run, its predicted memory."
    )
    _table(results, mode, MEMORY, MIB, "bra_memory", note)


def _table(results: Results, mode: str, column: str, unit: float, name: str, note: str) -> None:
    rows = results.sweep("bra_speed").query("mode == @mode")
    if rows.empty:
        say(f"The `bra_speed` sweep has no {MODES[mode]} cells here.")
        return
    values, status = wide(rows, column), wide(rows, "status")
    times = ratios(values)
    lines = [_line(label, values.loc[label], times.loc[label], status.loc[label], unit) for label in values.index]
    for setting, part in of_the_eight(times).groupby(level=SETTING):
        counted = part.drop(columns=["reference", "reference" + GRAPH], errors="ignore")
        means = {variant: _times(geometric_mean(counted[variant])) for variant in counted}
        lines.append({"shape": f"geometric mean of the eight shapes{setting_words(setting)}", "reference": ""} | means)
    note += f" {MODES[mode].capitalize()}; {rows.iloc[0]['device_name']}."
    publish(pd.DataFrame(lines).fillna(""), f"{name}_{mode}", note)


def _line(label: tuple, values: pd.Series, times: pd.Series, status: pd.Series, unit: float) -> dict[str, str]:
    texts = {
        variant: ("" if pd.isna(status[variant]) else str(status[variant])) if pd.isna(value)
        else number(value / unit) if variant in ("reference", "reference" + GRAPH) or pd.isna(times[variant])
        else _times(times[variant])
        for variant, value in values.items()
    }  # fmt: skip
    return {"shape": shape_words(label) + setting_words(label[:3])} | texts


def shape_words(label: tuple) -> str:
    """Grid, channels and routes of a row of :func:`wide`."""
    _, _, _, height, width, dim, _, topk, n_win = label
    return f"{height} x {width} x {dim}, topk {topk}, n_win {n_win}"


def setting_words(label: tuple) -> str:
    """Dtype and batch, if not fp32 and 1."""
    _, dtype, batch = label
    return (f", {dtype}" if dtype != "fp32" else "") + (f", batch {batch}" if batch != 1 else "")


def _times(ratio: float) -> str:
    return "" if pd.isna(ratio) else f"{number(ratio)}x"


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the bra_speed sweep; none without rows."""
    rows = results.sweep("bra_speed")
    result = [] if rows.empty else list(_sentences(rows))
    say(*result)
    return result


def _sentences(rows: pd.DataFrame) -> Iterator[str]:
    time, memory = (of_the_eight(ratios(wide(rows, column))) for column in (TIME, MEMORY))
    for (mode, dtype, batch), faster in time.groupby(level=SETTING):
        smaller = memory.xs((mode, dtype, batch), level=SETTING, drop_level=False)
        for variant in faster.columns:
            of_who, less = faster[variant].dropna(), smaller[variant].dropna()
            if variant in ("reference", "reference" + GRAPH, *OTHERS.values()) or of_who.empty:
                continue
            text = f"{MODES[mode].capitalize()}{setting_words((mode, dtype, batch))}, {variant}: "
            text += f"{_spread(of_who)} as fast as the reference"
            yield text + (f", {_spread(less)} less memory." if len(less) else ".")
        yield from _beside_windows(faster, (mode, dtype, batch))


def _beside_windows(faster: pd.DataFrame, setting: tuple) -> Iterator[str]:
    """The throughput gap to windows that the paper concedes, as published and with each implementation."""
    if "window" not in faster:
        return
    result = {}
    for variant in [variant for variant in faster.columns if variant not in OTHERS.values() and "," not in variant]:
        slower = (faster["window"] / faster[variant]).dropna()
        if len(slower):
            result[variant] = f"{_times(geometric_mean(slower))} ({len(slower)} shapes)"
    if result:
        message = ", ".join(f"{variant} {times}" for variant, times in result.items())
        yield f"{MODES[setting[0]].capitalize()}{setting_words(setting)}, BRA takes of the time of windows: {message}."


def _spread(values: pd.Series) -> str:
    worst = shape_words(values.idxmin())
    return (
        f"{_times(geometric_mean(values))} (geometric mean of {len(values)}; least {_times(values.min())}, at {worst})"
    )
