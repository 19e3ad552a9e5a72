"""Exponents of cost over number of tokens, fitted to the rows."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from notebooks.lib.plots import VARIANTS, Results, series

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t of a two-sided 95 % interval, for 1 to 10 degrees of freedom; more use the last, which is wider."""
LEAST_GRIDS = 4
MODES = {"forward": "forward", "forward_backward": "forward and backward"}
ATTENTION = "MACs of attention and routing"


class Fit(NamedTuple):
    """A straight line through log cost over log tokens.

    Attributes:
        exponent: its slope.
        margin: half the width of the slope's 95 % interval (t, from the residuals); NaN with two points.
        tokens: the numbers of tokens it was fitted at.
    """

    exponent: float
    margin: float
    tokens: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if np.isnan(self.margin) else f" ± {self.margin:.2f}")


def fit(tokens: pd.Series, cost: pd.Series) -> Fit | None:
    """Least squares in log-log over the upper half of the grids, at least four; None with fewer than two.

    Small grids are excluded, because slowly growing parts of a cost are significant there. Several costs at one grid
    (replicates) are replaced by their median.
    """
    known = cost.astype(float)[cost.notna()].groupby(tokens.astype(float)).median()
    known = known[known > 0].tail(max(LEAST_GRIDS, (len(known) + 1) // 2))
    if len(known) < 2:
        return None
    x, y = np.log(known.index.to_numpy()), np.log(known.to_numpy())
    slope, intercept = np.polyfit(x, y, 1)
    margin, freedom = float("nan"), len(x) - 2
    if freedom:
        variance = ((y - slope * x - intercept) ** 2).sum() / freedom
        margin = T95[min(freedom, len(T95)) - 1] * float(np.sqrt(variance / ((x - x.mean()) ** 2).sum()))
    return Fit(float(slope), margin, tuple(known.index))


def growths(results: Results) -> dict[str, pd.DataFrame]:
    """The rows for each attention's fits: the complexity sweep's, and the resolution sweep's timed ones."""
    result = {}
    for _, label, _, part in series(results.sweep("complexity")):
        result[label] = pd.concat([part, _timed(results, part.iloc[0])])
    return result


def _timed(results: Results, like: pd.Series) -> pd.DataFrame:
    """The resolution sweep's measured rows of the same configuration."""
    rows = results.sweep("resolution")
    same = (rows["status"] == "ok") & (rows["name"] == like["name"])
    for column in VARIANTS:
        same &= rows[column].isna() if pd.isna(like[column]) else (rows[column] == like[column]).fillna(False)
    return rows[same]


def fits(rows: pd.DataFrame) -> dict[str, Fit | None]:
    """The fits of one attention's costs, by name of the cost."""
    tokens = rows["height"] * rows["width"]
    counted = rows["mode"].eq("forward") & rows["sweep"].eq("complexity")
    result = {
        ATTENTION: fit(tokens[counted], (rows["macs_attention"] + rows["macs_routing"])[counted]),
        "all MACs": fit(tokens[counted], rows["macs_counted"][counted]),
    }
    for column, what in (("memory_predicted_bytes", "memory"), ("latency_p50_ms", "latency")):
        for mode, words in MODES.items():
            chosen = rows["mode"].eq(mode) & (rows["sweep"].eq("complexity") | (what == "latency"))
            result[f"{what}, {words}"] = fit(tokens[chosen], rows[column][chosen])
    return result
