"""With which power of the number of tokens the cost of each attention grows."""

import numpy as np
import pandas as pd

from notebooks.export import publish
from notebooks.plots import Results, needs, say, series


def exponent(tokens: pd.Series, cost: pd.Series) -> float | None:
    """Slope of log cost over log tokens by least squares, in the upper half of the grids; None if it cannot be had."""
    known = pd.DataFrame({"tokens": tokens.astype(float), "cost": cost.astype(float)}).dropna().query("cost > 0")
    known = known[known["tokens"] >= known["tokens"].median()]
    if known["tokens"].nunique() < 2:
        return None
    return float(np.polyfit(np.log(known["tokens"]), np.log(known["cost"]), 1)[0])


def exponents(results: Results) -> pd.DataFrame:
    """Fitted exponents by attention, from the complexity sweep."""
    found = {}
    for _, label, _, part in series(results.sweep("complexity")):
        forward, both = (part[part["mode"] == mode] for mode in ("forward", "forward_backward"))
        found[label] = {
            "theory": part["exponent_theory"].iloc[0],
            "MACs of attention and routing": _fit(forward, forward["macs_attention"] + forward["macs_routing"]),
            "all MACs": _fit(forward, forward["macs_counted"]),
            "memory, forward": _fit(forward, forward["memory_predicted_bytes"]),
            "memory, forward and backward": _fit(both, both["memory_predicted_bytes"]),
        }
    return pd.DataFrame.from_dict(found, orient="index").astype(float)


def _fit(rows: pd.DataFrame, cost: pd.Series) -> float | None:
    return exponent(rows["height"] * rows["width"], cost)


@needs("complexity")
def table(results: Results) -> None:
    """Table of the exponents."""
    sides = sorted(results.sweep("complexity")["height"].unique())
    texts = exponents(results).map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    note = (
        f"Exponent of HW, fitted by least squares in log-log over the upper half of {len(sides)} grids from {sides[0]} "
        f"to {sides[-1]} tokens per side. Counted and predicted, nothing here was measured. Theory: of the MACs of "
        "attention and routing; projections and local convolutions, which are linear in HW, come on top."
    )
    publish(texts.rename_axis("attention").reset_index(), "growth", note)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the complexity sweep; none without rows."""
    if results.sweep("complexity").empty:
        return []
    fitted = exponents(results)
    off = (fitted["MACs of attention and routing"] - fitted["theory"]).abs().dropna()
    found = []
    if len(off):
        found.append(
            f"The fitted exponents of the MACs of attention and routing differ from theory by at most {off.max():.2f} "
            f"({off.idxmax()}), over {len(off)} attentions."
        )
    grows = fitted["memory, forward and backward"] - fitted["memory, forward"]
    if grows.notna().any() and grows.max() > 0.1:
        worst, gap = grows.idxmax(), fitted.loc[grows.idxmax()]
        found.append(
            f"Training costs {worst} the most beyond its forward pass: its memory grows with HW to the power "
            f"{gap['memory, forward and backward']:.2f} instead of {gap['memory, forward']:.2f}."
        )
    say(*found)
    return found
