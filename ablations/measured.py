"""What results know about the latency of a case: measured, or between two grids that were."""

import math
from dataclasses import dataclass

import pandas as pd

from profiling.case import Case
from profiling.replicates import typical
from profiling.rows import KEY, as_text

ASIDE = {"sweep", "impl_requested", "seed", "replicate", "device_name", "height", "width", "auto_pad"}
"""Key columns in which rows of one computation may differ. auto_pad decides whether a grid is refused, no more."""
KV_OPTIONS = ("kv_per_win", "kv_downsample_ratio", "kv_downsample_kernel")


@dataclass(frozen=True)
class Latency:
    """Median wall time of one step in ms, if known, and from where.

    Attributes:
        ms: the time; None if it is not known.
        source: ``measured``, ``interpolated``, ``outside`` the measured grids, or ``none`` measured at all.
        grids: (height, width) of the measured grids it lies between; of the smallest and largest if outside.
    """

    ms: float | None = None
    source: str = "none"
    grids: tuple[tuple[int, int], ...] = ()


class Measured:
    """The rows of one device, to be asked for cases."""

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = typical(rows)
        self._rows = rows[~rows["status"].isin(("predicted", "oom"))]
        self._text = self._rows[list(KEY)].map(as_text)

    def latency(self, case: Case) -> Latency:
        """The case's latency; between the two nearest measured grids of its shape by a power law, never beyond them.

        Of several processes the one in the middle counts; of the same case in several sweeps, the median of those
        that kept freed memory, if any did.
        """
        rows = self._same(case)
        rows = rows[(rows["status"] == "ok") & (rows["height"] * case.width == rows["width"] * case.height)]
        returned = rows["freed_memory"] == "returned"
        known = _medians(rows[~returned.fillna(False)]).combine_first(_medians(rows))
        grids = sorted((int(height), int(width)) for height, width in known.index)
        wanted = (case.height, case.width)
        if wanted in grids:
            return Latency(float(known[wanted]), "measured", (wanted,))
        if not grids:
            return Latency()
        below, above = (max((g for g in grids if g < wanted), default=None),
                        min((g for g in grids if g > wanted), default=None))  # fmt: skip
        if below is None or above is None:
            return Latency(None, "outside", (grids[0], grids[-1]))
        share = math.log(case.height / below[0]) / math.log(above[0] / below[0])
        ms = float(known[below]) ** (1 - share) * float(known[above]) ** share
        return Latency(ms, "interpolated", (below, above))

    def failure(self, case: Case) -> str | None:
        """How exactly this case failed, if it was run and never succeeded; running out of memory aside."""
        rows = self._same(case)
        rows = rows[(rows["height"] == case.height) & (rows["width"] == case.width)]
        if rows.empty or (rows["status"] == "ok").any():
            return None
        return f"{rows['status'].iloc[0]}: {rows['reason'].iloc[0]}"

    def _same(self, case: Case) -> pd.DataFrame:
        """Rows of the case at any grid, run by its implementation."""
        who = case.who("", "")
        same = self._rows["impl"] == case.impl
        for column in set(KEY) - ASIDE - _irrelevant(case):
            same &= self._text[column] == as_text(who.get(column))
        return self._rows[same]


def _medians(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby(["height", "width"])["latency_p50_ms"].median()


def _irrelevant(case: Case) -> set[str]:
    """Options of kv_downsample that its mode does not read."""
    mode = dict(case.options).get("kv_downsample_mode", "identity")
    if mode == "identity":
        return set(KV_OPTIONS)
    return {"kv_downsample_ratio", "kv_downsample_kernel"} if mode.startswith("ada_") else {"kv_per_win"}
