"""What several processes that measured the same case say together.

Whatever disturbs a process only ever slows it down: another tenant of the machine, a lower clock, pages that lie badly
in memory. So the fastest process is the nearest to the code's own time, and others that come as near, at other moments
of the run, are the evidence that it was no accident.
"""

from collections.abc import Sequence

import pandas as pd

from profiling.rows import KEY

AGREEMENT = 0.04
"""By how much the three fastest processes may differ before more of them are asked."""
MOST = 9
"""Processes that are asked at most."""


def interval(medians: Sequence[float]) -> tuple[float, float]:
    """The median of the fastest process and of the runner-up, of at least two."""
    low, high = sorted(medians)[:2]
    return low, high


def settled(medians: Sequence[float]) -> bool:
    """Whether the three fastest processes agree, or there were as many as are asked at most."""
    if len(medians) < 3:
        return False
    low, _, third = sorted(medians)[:3]
    return third <= low * (1 + AGREEMENT) or len(medians) >= MOST


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case, of several processes the fastest; its interval then reaches up to the runner-up's median.

    What the fastest did not measure, another one did: it is filled in.
    """
    case = [column for column in KEY if column != "replicate"]
    if not rows.duplicated(case).any():
        return rows
    ranked = rows.sort_values("latency_p50_ms", kind="stable")
    groups = ranked.groupby(ranked.groupby(case, dropna=False, sort=False).ngroup())
    found, runner_up = groups.first(), groups["latency_p50_ms"].apply(lambda medians: medians.iloc[:2].max())
    found["latency_high_ms"] = found["latency_high_ms"].where(found["latency_high_ms"] > runner_up, runner_up)
    return found.reset_index(drop=True)[list(rows.columns)].astype(rows.dtypes.to_dict())
