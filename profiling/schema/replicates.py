"""Aggregation of the processes that measured the same case into one row.

Memory layout and load differ between processes, so the variance between processes exceeds that within one. The row
holds the median of the processes' medians; its interval comes from the spread of these medians.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from profiling.schema.row import KEY


def replicate_interval(medians: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median over processes; with fewer than nine, the range of their medians.

    Distribution-free: its ends are two order statistics with ranks from the binomial distribution. The range of three
    medians covers the true median in 75 % of cases, that of six in 97 %.
    """
    ordered = np.sort(np.asarray(medians, dtype=float))
    low = max(0, int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1)
    return float(ordered[low]), float(ordered[-1 - low])


def aggregate_replicates(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case: the median of the processes' medians in ``latency_p50_ms``, and its interval.

    The other columns come from the process nearest to that median; values it lacks come from the next nearest.
    ``macs_agree`` is false where it is in any process, since only one of them counts by fvcore.
    """
    case = [column for column in KEY if column != "replicate"]
    if not rows.duplicated(case).any():
        return rows
    number = rows.groupby(case, dropna=False, sort=False).ngroup()
    times = rows["latency_p50_ms"].groupby(number)
    distance = (rows["latency_p50_ms"] - times.transform("median")).abs()
    ranked = rows.assign(number=number, distance=distance).sort_values("distance", kind="stable")
    result = ranked.groupby("number").first()
    result["macs_agree"] = rows["macs_agree"].groupby(number).min()
    several = times.agg(lambda medians: list(medians.dropna()))
    several = several[several.map(len) > 1]
    result.loc[several.index, "latency_p50_ms"] = several.map(np.median).astype(float)
    for name, end in (("latency_low_ms", 0), ("latency_high_ms", 1)):
        ends = several.map(lambda medians, end=end: replicate_interval(medians)[end])
        result.loc[several.index, name] = ends.astype(float)
    return result.reset_index(drop=True)[list(rows.columns)].astype(rows.dtypes.to_dict())
