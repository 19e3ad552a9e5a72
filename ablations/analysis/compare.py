"""Compare two runs: times by their intervals, other columns exactly.

The ratio of a cell is the median over the processes of B, divided by that of A. If both sides have two processes or
more, its interval is Welch's t interval of the logarithms of the processes' medians. With one process on a side it
comes from the intervals of the medians within the processes. These do not cover the variation between processes, so
that only a large change counts (:data:`ONE_PROCESS`).

Runs at different times differ by the other load of the machine. :mod:`ablations.analysis.interleave` measures both
sides in turn and detects far smaller changes. If the folders hold several devices, each is compared with itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from attention_zoo import InvalidOption
from profiling.schema.replicates import replicate_interval
from profiling.schema.row import KEY, STATUSES, load


@dataclass(frozen=True)
class Thresholds:
    """What counts as a change of a time.

    Attributes:
        effect: the smallest relative change reported as FASTER or SLOWER.
        same: SAME requires that the interval excludes a larger relative change than this.
    """

    effect: float
    same: float


SEVERAL_PROCESSES = Thresholds(effect=0.05, same=0.10)
"""On the committed CPU results, three processes of a run were called FASTER or SLOWER than three others of the same run
in 1 % of the cells."""
ONE_PROCESS = Thresholds(effect=0.25, same=0.25)
"""Two processes of a run differed by more than 15 %, beyond both intervals, in 2 % of the cells on one machine and in
27 % on a busier one; by more than 5 % in 28 % and 44 %."""
CASE = [column for column in KEY if column not in ("device_name", "replicate", "seed")]
ENVIRONMENT = ["device_name", "threads", "driver", "torch", "cuda", "triton", "python", "commit", "dirty"]
EXACT = ["impl", "sdpa_backend", "freed_memory", "params", "macs_analytic", "macs_counted", "macs_fvcore",
         "memory_predicted_bytes", "memory_peak_bytes"]  # fmt: skip
COLUMNS = ["case", "verdict", "ratio", "ratio_low", "ratio_high", "a_ms", "b_ms", "processes", "status", "got_worse",
           "changes"]  # fmt: skip
BARE = ("sweep", "kind", "name", "impl_requested", "mode", "dtype", "device")
WORSE = {status: rank for rank, status in enumerate(STATUSES)}


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two runs.

    Attributes:
        cells: one row per case in both runs: ``case``, ``verdict`` (empty without two times), ``ratio`` of the
            times B / A with ``ratio_low`` and ``ratio_high``, ``a_ms``, ``b_ms``, ``processes`` on the side that has
            fewer, ``status`` where it changed, ``changes`` of exact columns.
        environment: per differing column, its values in A and in B.
        missing: cases only in A.
        new: cases only in B.
    """

    cells: pd.DataFrame
    environment: dict[str, tuple[str, str]]
    missing: list[str]
    new: list[str]

    @property
    def worse(self) -> bool:
        """Whether a cell got slower or its status got worse."""
        return bool((self.cells["verdict"] == "SLOWER").any() or self.cells["got_worse"].any())


def read(path: Path) -> pd.DataFrame:
    """All rows of a CSV, or of every sweep's CSV in a folder and the folders in it; InvalidOption if there are none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.csv") if _is_sweep(p))
    if not files:
        raise InvalidOption(f"{path}: no results there; give a results folder or a CSV that run_all.py wrote")
    return load(*files)


def compare(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    """Compare run B with run A: device by device, or the only one of A with the only one of B.

    Raises:
        InvalidOption: no device is in both and a side has several; the message lists the devices.
    """
    devices = [sorted(rows["device_name"].unique()) for rows in (a, b)]
    shared = sorted(set(devices[0]) & set(devices[1]))
    if not shared and max(map(len, devices)) > 1:
        raise InvalidOption(
            f"no device is in both: A has {' and '.join(devices[0])}, B has {' and '.join(devices[1])}; "
            "give the folder of one device on either side"
        )
    if not shared:
        return _compare(a, b)
    result = [_compare(*(rows[rows["device_name"] == name] for rows in (a, b))) for name in shared]
    if len(shared) > 1:
        result = list(map(_of_device, shared, result))
    environment = {what: sides for part in result for what, sides in part.environment.items()}
    if devices[0] != devices[1]:
        message = (", ".join(name if name in shared else f"{name} (left out)" for name in side) for side in devices)
        environment["device_name"] = next(message), next(message)
    return Comparison(
        pd.concat([part.cells for part in result], ignore_index=True),
        environment,
        [case for part in result for case in part.missing],
        [case for part in result for case in part.new],
    )


def _of_device(name: str, result: Comparison) -> Comparison:
    """Prefix every case with the device name."""
    return Comparison(
        result.cells.assign(case=f"{name}: " + result.cells["case"]),
        {f"{name}: {what}": sides for what, sides in result.environment.items()},
        [f"{name}: {case}" for case in result.missing],
        [f"{name}: {case}" for case in result.new],
    )


def _compare(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    one, two = _by_case(a), _by_case(b)
    both = [case for case in one.index if case in two.index]
    cells = pd.DataFrame(
        [_cell(case, one.loc[case], two.loc[case]) for case in both],
        columns=COLUMNS,
    )
    return Comparison(
        cells,
        _environment(a, b),
        [case for case in one.index if case not in two.index],
        [case for case in two.index if case not in one.index],
    )


def classify(low: float, ratio: float, high: float, thresholds: Thresholds) -> str:
    """FASTER, SAME, SLOWER or UNCLEAR, from the ratio of the times B / A and its interval."""
    if low > 1 and ratio > 1 + thresholds.effect:
        return "SLOWER"
    if high < 1 and ratio < 1 / (1 + thresholds.effect):
        return "FASTER"
    return "SAME" if high <= 1 + thresholds.same and low >= 1 / (1 + thresholds.same) else "UNCLEAR"


def welch_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Low end, ratio B / A of the medians, and high end of a 95 % interval, from two processes or more on each side."""
    ratio = float(np.median(b) / np.median(a))
    log_a, log_b = np.log(a), np.log(b)
    if np.ptp(log_a) == 0 == np.ptp(log_b):
        return ratio, ratio, ratio
    ends = stats.ttest_ind(log_b, log_a, equal_var=False).confidence_interval(0.95)
    return min(ratio, float(np.exp(ends.low))), ratio, max(ratio, float(np.exp(ends.high)))


def _by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case, over its replicates: times, worst status, exact columns."""
    names = [_named(values) for values in rows[CASE].itertuples(index=False, name=None)]
    rows = rows.assign(case=names, rank=rows["status"].map(WORSE))
    groups = rows.groupby("case", sort=False)
    # As objects: otherwise extracting a row would turn integers into floats.
    result = groups.agg({"rank": "max"} | {column: "first" for column in EXACT}).astype(object)
    result["times"] = pd.Series({case: _times(group) for case, group in groups}, dtype=object)
    return result


@dataclass(frozen=True)
class _Times:
    """The medians of the processes of one case in ms, and an interval of their median."""

    medians: list[float]
    low: float
    high: float


def _times(rows: pd.DataFrame) -> _Times | None:
    """None if the case was never timed."""
    timed = rows.dropna(subset="latency_p50_ms")
    if timed.empty:
        return None
    medians = [float(median) for median in timed["latency_p50_ms"]]
    if len(medians) > 1:
        return _Times(medians, *replicate_interval(medians))
    return _Times(medians, *(float(timed[f"latency_{end}_ms"].iloc[0]) for end in ("low", "high")))


def _ratio(a: _Times, b: _Times) -> tuple[tuple[float, float, float], Thresholds]:
    if min(len(a.medians), len(b.medians)) > 1:
        return welch_ratio(a.medians, b.medians), SEVERAL_PROCESSES
    return (b.low / a.high, float(np.median(b.medians) / np.median(a.medians)), b.high / a.low), ONE_PROCESS


def _named(values: tuple[object, ...]) -> str:
    """Format a case: its key without empty and default values."""
    message = [(c, v) for c, v in zip(CASE, values, strict=True) if not (pd.isna(v) or v is False or v == "")]
    return " ".join(str(v) if c in BARE else f"{c}={v}" for c, v in message if (c, v) != ("batch", 1))


def _cell(case: str, a: pd.Series, b: pd.Series) -> tuple[object, ...]:
    left, right = a["times"], b["times"]
    changes = [f"{c}: {_shown(a[c])} -> {_shown(b[c])}" for c in EXACT if _shown(a[c]) != _shown(b[c])]
    status = "" if a["rank"] == b["rank"] else f"{STATUSES[int(a['rank'])]} -> {STATUSES[int(b['rank'])]}"
    verdict, low, ratio, high, processes = "", None, None, None, 0
    if left is not None and right is not None:
        (low, ratio, high), thresholds = _ratio(left, right)
        processes = min(len(left.medians), len(right.medians))
        # Times with kept and with returned memory are not comparable.
        same_kind = _shown(a["freed_memory"]) == _shown(b["freed_memory"])
        verdict = classify(low, ratio, high, thresholds) if same_kind else "UNCLEAR"
    medians = (float(np.median(side.medians)) if side is not None else None for side in (left, right))
    return (
        case, verdict, ratio, low, high, *medians, processes, status, bool(b["rank"] > a["rank"]), "; ".join(changes),
    )  # fmt: skip


def _environment(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[str, str]]:
    values = {c: tuple(", ".join(sorted({_shown(v) for v in side[c]})) for side in (a, b)) for c in ENVIRONMENT}
    return {column: (left, right) for column, (left, right) in values.items() if left != right}


def _shown(value: object) -> str:
    return "none" if pd.isna(value) else str(value)


def _is_sweep(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(f"{KEY[0]},{KEY[1]},")
