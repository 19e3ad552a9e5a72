"""Exponents of each attention's cost in the number of tokens, where they deviate from theory, and why."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from notebooks.lib.exponents import ATTENTION, LEAST_GRIDS, Fit, fit, fits, growths
from notebooks.lib.export import publish
from notebooks.lib.plots import Results, needs, number, say

APART = 0.03
"""Smaller differences of exponents are not reported."""
Rows = dict[str, pd.DataFrame]
Fits = dict[str, dict[str, Fit | None]]


@needs("complexity")
def table(results: Results) -> None:
    """Table of the exponents."""
    lines, timed = [], False
    for label, rows in growths(results).items():
        theory = rows["exponent_theory"].iloc[0]
        line = {"attention": label, "theory": "" if pd.isna(theory) else f"{theory:.2f}"}
        lines.append(line | {what: "" if result is None else str(result) for what, result in fits(rows).items()})
        timed |= bool(rows["latency_p50_ms"].notna().any())
    sides = sorted(results.sweep("complexity")["height"].unique())
    device = results.sweep("complexity")["device_name"].iloc[0]
    note = (
        f"Exponent of HW ± half its 95 % interval, fitted by least squares in log-log over the upper half, and at "
        f"least {LEAST_GRIDS}, of the grids that a cost is known at: MACs and memory at {len(sides)} grids from "
        f"{sides[0]} to {sides[-1]} tokens per side, counted and predicted; latency at those measured on "
        f"{device}{'' if timed else ' (none)'}. Counts and predictions have no noise: their interval tells how far "
        "they depart from a pure power of HW. Theory: of the MACs of attention and routing; projections and local "
        "convolutions, which are linear in HW, come on top."
    )
    publish(pd.DataFrame(lines).fillna(""), "growth", note)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the complexity sweep, and latencies; none without rows."""
    if results.sweep("complexity").empty:
        return []
    rows = growths(results)
    fitted = {label: fits(part) for label, part in rows.items()}
    result = [
        *_attention(rows, fitted), *_linear_parts(rows, fitted), *_memory(rows, fitted), *_training(rows, fitted),
        *_latency(rows, fitted),
    ]  # fmt: skip
    say(*result)
    return result


def _attention(rows: Rows, fitted: Fits) -> Iterator[str]:
    theory = {label: part["exponent_theory"].iloc[0] for label, part in rows.items()}
    off = {label: abs(f.exponent - theory[label]) for label, of in fitted.items() if (f := of[ATTENTION])}
    off = {label: gap for label, gap in off.items() if not np.isnan(gap)}
    if off:
        worst = max(off, key=lambda label: off[label])
        yield (
            f"The fitted exponents of the MACs of attention and routing differ from theory by at most {off[worst]:.2f} "
            f"({worst}), over {len(off)} attentions."
        )


def _linear_parts(rows: Rows, fitted: Fits) -> Iterator[str]:
    said = []
    for label, of in fitted.items():
        part, whole = of[ATTENTION], of["all MACs"]
        if part and whole and part.exponent - whole.exponent > APART:
            counted = _at(rows[label], "forward", ("macs_projection", "macs_local_conv", "macs_counted"))
            linear = (counted["macs_projection"] + counted["macs_local_conv"]) / counted["macs_counted"]
            first, last = (linear.loc[side] for side in (whole.tokens[0], whole.tokens[-1]))
            said.append(f"{label} {whole.exponent:.2f} instead of {part.exponent:.2f} (from {first:.0%} to {last:.0%})")
            span = _span(whole)
    if said:
        yield (
            f"All MACs grow more slowly than those of attention and routing where linear maps and convolutions still "
            f"count, in brackets with their share {span}: {', '.join(said)}."
        )


def _memory(rows: Rows, fitted: Fits) -> Iterator[str]:
    """Memory as a sum of a part linear in HW and one with the attention's theoretical exponent."""
    below = {}
    for label, of in fitted.items():
        theory, result = rows[label]["exponent_theory"].iloc[0], of["memory, forward"]
        if result and theory - result.exponent > APART:
            below[label] = theory - result.exponent
    for label in sorted(below, key=lambda name: -below[name])[:1]:
        theory, result = rows[label]["exponent_theory"].iloc[0], fitted[label]["memory, forward"]
        assert result is not None
        memory = _at(rows[label], "forward", ("memory_predicted_bytes",))["memory_predicted_bytes"]
        memory = memory.loc[list(result.tokens)]
        tokens = memory.index.to_numpy()
        # Relative to the memory itself, so that all grids have equal weight.
        parts = np.stack([tokens, tokens**theory], axis=1) / memory.to_numpy()[:, None]
        factors, *_ = np.linalg.lstsq(parts, np.ones(len(tokens)), rcond=None)
        share, error = (factors[0] * parts[:, 0]).clip(0, 1), abs(parts @ factors - 1).max()
        yield (
            f"Forward memory stays furthest below the theory of its MACs with {label}, {result.exponent:.2f} instead "
            f"of {theory:.2f}: what is linear in HW is {share[0]:.0%} to {share[-1]:.0%} of it {_span(result)}, "
            f"by a fit of a linear part and one of the power {theory:.2f} that is off by at most {error:.1%}."
        )


def _training(rows: Rows, fitted: Fits) -> Iterator[str]:
    gaps = {}
    for label, of in fitted.items():
        forward, both = of["memory, forward"], of["memory, forward and backward"]
        if forward and both and both.exponent - forward.exponent > APART:
            gaps[label] = both.exponent - forward.exponent, forward, both
    if not gaps:
        return
    worst = max(gaps, key=lambda label: gaps[label][0])
    _, forward, both = gaps[worst]
    sentence = (
        f"Training costs {worst} the most beyond its forward pass: its memory grows with HW to the power "
        f"{both.exponent:.2f} instead of {forward.exponent:.2f}."
    )
    part = rows[worst]
    regions = fit(part["height"] * part["width"], part["regions_per_side"].astype("Float64") ** 2)
    if regions:
        sentence += (
            f" Its regions multiply with the power {regions.exponent:.2f}, and the gradient of the gathered keys and "
            f"values, as published, is as large as regions times tokens: {regions.exponent + 1:.2f}."
        )
    yield sentence


def _latency(rows: Rows, fitted: Fits) -> Iterator[str]:
    gaps = {}
    for label, of in fitted.items():
        if time := of["latency, forward"]:
            timed = rows[label].query("mode == 'forward' and status == 'ok'")
            macs = timed["macs_counted"].astype(float).groupby(timed["height"] * timed["width"]).first()
            macs = macs.loc[macs.index.isin(time.tokens)]
            if counted := fit(pd.Series(macs.index, macs.index), macs):
                ms = timed.groupby(timed["height"] * timed["width"])["latency_p50_ms"].median()
                rate = macs / ms.loc[macs.index] / 1e6
                gaps[label] = time.exponent - counted.exponent, time, counted, rate
    if gaps:
        slower = [label for label, (gap, *_) in gaps.items() if gap < -APART]
        worst = max(gaps, key=lambda label: abs(gaps[label][0]))
        _, time, counted, rate = gaps[worst]
        yield (
            f"Forward latency grows more slowly than the MACs at the same grids with {len(slower)} of {len(gaps)} "
            f"attentions. Furthest apart is {worst}, {time} instead of {counted.exponent:.2f}: it does "
            f"{number(rate.iloc[0])} to {number(rate.iloc[-1])} G MACs per second {_span(time)}."
        )


def _at(rows: pd.DataFrame, mode: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """Columns of the complexity sweep by number of tokens; 0 where a cost has no such part."""
    chosen = rows[(rows["mode"] == mode) & (rows["sweep"] == "complexity")]
    tokens = (chosen["height"] * chosen["width"]).astype(float)
    return chosen[list(columns)].astype(float).fillna(0.0).groupby(tokens).first()


def _span(result: Fit) -> str:
    first, last = (round(float(np.sqrt(tokens))) for tokens in (result.tokens[0], result.tokens[-1]))
    return f"from {first} to {last} tokens per side"
