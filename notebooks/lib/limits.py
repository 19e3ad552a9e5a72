"""Where each attention runs out of memory, and the findings about memory and resolution: numbers, no drawing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from notebooks.lib.export import markdown, publish
from notebooks.lib.plots import GIB, Results, needs, number, say, series, size

DEFAULT_MEMORY = 24 * GIB
MODES = {"forward": "forward", "forward_backward": "forward and backward"}
Line = tuple[str, str, str, pd.DataFrame]
"""Name, label, line style and cells of one line of a figure."""


@dataclass(frozen=True)
class Crossing:
    """Where a curve of predicted memory passes a limit.

    Attributes:
        side: tokens per side, by straight lines between points in log-log; None where the curve stays below.
        below: the largest grid of the curve that fits, None if none does.
        above: the smallest that does not, None if all do.
    """

    side: float | None
    below: int | None
    above: int | None

    def __str__(self) -> str:
        if self.above is None:
            return f"fits at {self.below}"
        if self.side is None:
            return f"does not fit at {self.above}"
        return f"near {self.side:.0f} (fits at {self.below}, not at {self.above})"


def crossing(curve: pd.Series, limit: float) -> Crossing:
    """Where ``curve`` (bytes, indexed by tokens per side) first exceeds ``limit``; interpolated in log-log."""
    curve = curve.dropna().sort_index()
    over = [int(side) for side in curve.index[curve > limit]]
    under = [int(side) for side in curve.index if not over or side < over[0]]
    below, above = (under[-1] if under else None), (over[0] if over else None)
    if below is None or above is None:
        return Crossing(None, below, above)
    (x0, y0), (x1, y1) = ((np.log(side), np.log(float(curve[side]))) for side in (below, above))
    return Crossing(float(np.exp(x0 + (np.log(limit) - y0) / (y1 - y0) * (x1 - x0))), below, above)


def device_memory(results: Results) -> tuple[float, str]:
    """Bytes that were free on the device, from the reasons of its oom rows or assumed, and a label for them."""
    reasons = results.rows.loc[results.rows["status"] == "oom", "reason"].dropna().astype(str)
    free = [float(result[1]) for reason in reasons if (result := re.search(r"([\d.]+) GiB are free", reason))]
    if free:
        return float(np.median(free)) * GIB, f"{np.median(free):.1f} GiB free on this device"
    return DEFAULT_MEMORY, f"{DEFAULT_MEMORY / GIB:.0f} GiB (assumed)"


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per grid, by tokens per side; replicates and seeds become the median and the widest interval."""
    side = np.sqrt(rows["height"].astype(float) * rows["width"].astype(float)).round().astype(int).rename("side")
    numbers = {"memory_predicted_bytes": "max", "memory_peak_bytes": "max", "macs_counted": "first",
               "latency_p50_ms": "median", "latency_p25_ms": "min", "latency_p75_ms": "max",
               "latency_low_ms": "min", "latency_high_ms": "max"}  # fmt: skip
    # A grid that was measured once counts as measured, so ok goes first.
    ranked = rows.assign(rank=(rows["status"] != "ok")).sort_values("rank", kind="stable")
    merged = ranked.groupby(side.loc[ranked.index]).agg(numbers | {"status": "first", "reason": "first"})
    return merged.astype({name: float for name in numbers})


def lines(rows: pd.DataFrame) -> Iterator[Line]:
    """The lines of a figure as in ``plots.series``, each with its cells, in descending order of memory."""
    result = [(name, label, dash, cells(part)) for name, label, dash, part in series(rows)]
    yield from sorted(result, key=lambda line: -line[3]["memory_predicted_bytes"].fillna(0).max())


def resolution(results: Results, mode: str) -> pd.DataFrame:
    """The rows of the resolution sweep in one mode."""
    return results.sweep("resolution").query("mode == @mode")


@needs("resolution")
def limits(results: Results) -> pd.DataFrame:
    """Table: where each attention exceeds the device's memory, and how its memory grows with the tokens."""
    memory, how = device_memory(results)
    table: dict[str, dict[str, str]] = {}
    for mode, words in MODES.items():
        for _, label, _, line in lines(resolution(results, mode)):
            curve = line["memory_predicted_bytes"].dropna()
            entry = table.setdefault(label, {})
            limit = str(crossing(curve, memory)) if len(curve) else "not predicted"
            entry[f"{words}: runs out at tokens per side"] = limit
            entry[f"{words}: growth"] = f"{growth(curve):.2f}" if len(curve) > 1 else ""
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("attention").reset_index().fillna("")
    note = (
        f"Memory: {how}. Where a predicted curve passes it lies between two grids and is interpolated, by a straight "
        "line in log-log. Growth: the exponent of memory in the number of tokens, between the two largest grids."
    )
    publish(frame, "memory_limits", note)
    return frame


def failures(results: Results) -> None:
    """Table: every cell that failed or whose MACs are in doubt, and why; without columns that are empty for all."""
    doubted = results.rows["macs_agree"].eq(False).fillna(False)
    reasons = results.rows["reason"].mask(doubted, "the counts of MACs disagree: see macs_agree")
    failed = results.rows.assign(reason=reasons)[doubted | ~results.rows["status"].isin(("ok", "predicted"))]
    columns = ["sweep", "name", "attention", "impl_requested", "mode", "batch", "height", "width", "n_win", "topk",
               "status", "reason"]  # fmt: skip
    if len(failed):
        say(markdown(failed[columns].dropna(axis="columns", how="all").astype(object).fillna("")))
    elif len(results.rows):
        say("No cell failed.")


def growth(curve: pd.Series) -> float:
    """Exponent of memory in the number of tokens, between the two largest grids."""
    (x0, x1), (y0, y1) = curve.index[-2:], curve.iloc[-2:]
    return float(np.log(y1 / y0) / np.log(x1 / x0) / 2)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the resolution sweep; none without rows."""
    result = [sentence for mode in MODES for sentence in _limit_sentences(results, mode)]
    if sentence := _spread(results):
        result.append(sentence)
    say(*result)
    return result


def _limit_sentences(results: Results, mode: str) -> Iterator[str]:
    memory, how = device_memory(results)
    curves = {label: line["memory_predicted_bytes"].dropna() for _, label, _, line in lines(resolution(results, mode))}
    result = {label: crossing(curve, memory) for label, curve in curves.items() if len(curve)}
    out = sorted((limit.side, label) for label, limit in result.items() if limit.side)
    stay = [label for label, limit in result.items() if limit.above is None]
    if out:
        listed = ", ".join(f"{label} near {side:.0f}" for side, label in out)
        yield f"{MODES[mode].capitalize()}, {how}: memory runs out at these tokens per side (interpolated): {listed}."
    if stay:
        largest = max(result[label].below or 0 for label in stay)
        need = size(max(curves[label].iloc[-1] for label in stay))
        yield f"{MODES[mode].capitalize()}: {', '.join(stay)} still fit at {largest} x {largest}, with at most {need}."


def _spread(results: Results) -> str | None:
    rows = results.sweep("resolution").dropna(subset=["latency_p50_ms"])
    training = rows[rows["mode"] == "forward_backward"]
    rows, words = (training, MODES["forward_backward"]) if len(training) else (rows, MODES["forward"])
    times = pd.DataFrame({label: cells(part)["latency_p50_ms"] for _, label, _, part in series(rows)}).dropna()
    if times.empty or times.shape[1] < 2:
        return None
    side, last = times.index[-1], times.iloc[-1]
    slow, fast = f"{last.idxmax()} ({number(last.max())} ms)", f"{last.idxmin()} ({number(last.min())} ms)"
    return (
        f"At {side} x {side}, the largest grid that all were measured at, a step ({words}) takes "
        f"{last.max() / last.min():.1f}x as long with {slow} as with {fast}."
    )
