"""What several processes that measured the same case say together.

Processes differ by the moment, since others share the machine, and by where their memory lies (``steady``). What the
moment does, the yardsticks beside them tell in part; the rest is averaged, without the outermost.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import pandas as pd

from profiling.rows import COLUMNS, KEY

AGREEMENT = 0.04
"""How wide the interval of the processes may be, as a share of its middle, before more of them are asked."""
MOST = 9
"""Processes that are asked at most."""
YARDSTICKS = ["yardstick_ms", "yardstick_memory_ms"]
FOLLOWS = 0.75
"""The power by which the time of a step that a cache holds follows the cores' yardstick."""
CACHED_BYTES = 12 << 20
"""A step that needs more memory than this waits for it: ..."""
FOLLOWS_BOTH = 0.5, 0.3
"""... its time follows the yardsticks of cores and memory by these powers, which are typical: regressions over a
quarter of an hour and 16 cells found 0.4 to 0.7 and, for those that wait, 0.1 to 0.9."""
BETWEEN_RUNS = 0.5, 1.0
"""The same from one run to another. The median of a run is known well; what memory's yardstick says beside a single
cell is noisy, which weakens a regression on it. All six pairs of four runs, up to two hours apart, agree better with 1
than with 0.3."""
TIMES = [column for column in COLUMNS if column.startswith("latency_") and column.endswith("_ms")]


def interval(medians: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the processes between their quartiles, and these; of fewer than five, mean and extremes of all."""
    ordered = sorted(medians)
    cut = len(ordered) // 4 if len(ordered) > 4 else 0
    inner = ordered[cut : len(ordered) - cut]
    return inner[0], statistics.fmean(inner), inner[-1]


def settled(medians: Sequence[float]) -> bool:
    """Whether there are three processes and they agree, or as many as are asked at most."""
    if len(medians) < 3:
        return False
    low, middle, high = interval(medians)
    return high - low <= AGREEMENT * middle or len(medians) >= MOST


def speed(rows: pd.DataFrame) -> pd.Series:
    """How fast the machine was: the median of each yardstick in ms; NaN where none was taken."""
    return rows[YARDSTICKS].median()


def at_speed(rows: pd.DataFrame, run: pd.Series, other: pd.Series | None = None) -> pd.DataFrame:
    """The rows with the times that they would have, had the yardsticks beside them always said the same.

    The kernel's share of a time is left alone: no yardstick tells how fast it gives out pages. A row without a
    yardstick, as on CUDA, stays as it is.

    Args:
        rows: rows of one run.
        run: the speed of that run.
        other: another's, at which the times shall be; by default at its own. A yardstick that one of the two did not
            take is left out.
    """
    beside = np.log(run / rows[YARDSTICKS])
    between = np.log((run if other is None else other) / run)
    waits = (rows["memory_predicted_bytes"] > CACHED_BYTES).fillna(False).astype(bool)
    waits &= beside["yardstick_memory_ms"].notna() & pd.notna(between["yardstick_memory_ms"])
    by_cores = FOLLOWS * (beside["yardstick_ms"] + between["yardstick_ms"])
    powers = zip(YARDSTICKS, FOLLOWS_BOTH, BETWEEN_RUNS, strict=True)
    by_both = sum(near * beside[name] + far * between[name] for name, near, far in powers)
    factor = np.exp(by_cores.where(~waits, by_both) * (1 - rows["system_share"]))
    times = rows[TIMES].mul(factor.fillna(1.0), axis=0)
    return rows.assign(**{column: times[column] for column in TIMES})


def typical(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case: of several processes the one in the middle, with the interval of them all.

    What it did not measure, another one did: that is filled in.
    """
    case = [column for column in KEY if column != "replicate"]
    if not rows.duplicated(case).any():
        return rows
    number = rows.groupby(case, dropna=False, sort=False).ngroup()
    medians = rows["latency_p50_ms"].groupby(number)
    from_middle = (rows["latency_p50_ms"] - medians.transform("median")).abs()
    ranked = rows.assign(number=number, from_middle=from_middle).sort_values("from_middle", kind="stable")
    found = ranked.groupby("number").first()
    several = medians.agg(list).map(lambda times: [time for time in times if time == time])
    for name, place in (("latency_low_ms", 0), ("latency_high_ms", 2)):
        together = several.map(lambda times, place=place: interval(times)[place] if len(times) > 1 else None)
        found[name] = together.astype("float64").fillna(found[name])
    return found.reset_index(drop=True)[list(rows.columns)].astype(rows.dtypes.to_dict())
