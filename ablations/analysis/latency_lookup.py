"""Latency of a case from results: measured, or interpolated between two measured grids."""

import math
from dataclasses import dataclass

import pandas as pd

from profiling.cases.case import Case
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import KEY, as_text

ASIDE = {"sweep", "impl_requested", "seed", "replicate", "device_name", "height", "width", "auto_pad"}
"""Key columns in which rows of one computation may differ. auto_pad only decides whether a grid is rejected."""
KV_OPTIONS = ("kv_per_win", "kv_downsample_ratio", "kv_downsample_kernel")


@dataclass(frozen=True)
class Latency:
    """Median wall time of one step in ms, if known, and its source.

    Attributes:
        ms: the time; None if it is not known.
        source: ``measured``, ``interpolated``, ``outside`` the measured grids, or ``none`` measured at all.
        grids: (height, width) of the measured grids it lies between; of the smallest and largest if outside.
    """

    ms: float | None = None
    source: str = "none"
    grids: tuple[tuple[int, int], ...] = ()


class LatencyLookup:
    """Latencies of cases, from the rows of one device."""

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = aggregate_replicates(rows)
        self._rows = rows[~rows["status"].isin(("predicted", "oom"))]
        self._text = self._rows[list(KEY)].map(as_text)
        self._groups = self._rows.groupby(["name", "impl"]).indices

    def latency(self, case: Case) -> Latency:
        """Return the case's latency; by a power law between the nearest measured grids of its aspect ratio.

        It is never extrapolated. Several processes are reduced to their median; the same case in several sweeps, to
        the least of those that kept freed memory, if any did: other programs can only lengthen a sweep's latencies.
        """
        rows = self._same(case)
        rows = rows[(rows["status"] == "ok") & (rows["height"] * case.width == rows["width"] * case.height)]
        returned = rows["freed_memory"] == "returned"
        known = _least(rows[~returned.fillna(False)]).combine_first(_least(rows))
        grids = sorted((int(height), int(width)) for height, width in known.index)
        grid = (case.height, case.width)
        if grid in grids:
            return Latency(float(known[grid]), "measured", (grid,))
        if not grids:
            return Latency()
        below, above = (max((g for g in grids if g < grid), default=None),
                        min((g for g in grids if g > grid), default=None))  # fmt: skip
        if below is None or above is None:
            return Latency(None, "outside", (grids[0], grids[-1]))
        share = math.log(case.height / below[0]) / math.log(above[0] / below[0])
        ms = float(known[below]) ** (1 - share) * float(known[above]) ** share
        return Latency(ms, "interpolated", (below, above))

    def failure(self, case: Case) -> str | None:
        """How exactly this case failed, if it was run and never succeeded; running out of memory is ignored."""
        rows = self._same(case)
        rows = rows[(rows["height"] == case.height) & (rows["width"] == case.width)]
        if rows.empty or (rows["status"] == "ok").any():
            return None
        return f"{rows['status'].iloc[0]}: {rows['reason'].iloc[0]}"

    def _same(self, case: Case) -> pd.DataFrame:
        """Rows of the case at any grid, run by its implementation."""
        key_columns = case.key_columns("", "")
        # Comparing the texts of all rows would take most of a recommendation's time.
        places = self._groups.get((case.name, case.impl), [])
        text, columns = self._text.iloc[places], sorted(set(KEY) - ASIDE - _irrelevant(case))
        return self._rows.iloc[places][(text[columns] == [as_text(key_columns.get(c)) for c in columns]).all(axis=1)]


def _least(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby(["height", "width"])["latency_p50_ms"].min()


def _irrelevant(case: Case) -> set[str]:
    """Options of kv_downsample that its mode does not read."""
    mode = dict(case.options).get("kv_downsample_mode", "identity")
    if mode == "identity":
        return set(KV_OPTIONS)
    return {"kv_downsample_ratio", "kv_downsample_kernel"} if mode.startswith("ada_") else {"kv_per_win"}
