from typing import Any

import numpy as np
import pandas as pd
import pytest

from profiling.cases.case import Case
from profiling.schema.replicates import aggregate_replicates, replicate_interval
from profiling.schema.row import validate


def row(replicate: int, ms: float | None, **columns: Any) -> dict[str, Any]:
    times = {"latency_p25_ms": ms, "latency_p50_ms": ms, "latency_p75_ms": ms, "latency_p95_ms": ms}
    times |= {"latency_low_ms": ms, "latency_high_ms": ms and 1.01 * ms, "status": "ok", "device_name": "Paper"}
    return Case("full", 14, 14, replicate=replicate).key_columns("s", "Paper") | times | columns


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([12.0], (12.0, 12.0)),
        ([12.0, 10.0, 11.0], (10.0, 12.0)),
        ([float(n) for n in range(8)], (0.0, 7.0)),
        ([float(n) for n in range(9)], (1.0, 7.0)),
    ],
)
def test_interval_is_of_order_statistics(medians: list[float], expected: tuple[float, float]) -> None:
    assert replicate_interval(medians) == expected


@pytest.mark.parametrize(("processes", "coverage"), [(3, 0.75), (6, 0.969), (9, 0.961), (20, 0.959)])
def test_interval_covers_the_true_median(processes: int, coverage: float) -> None:
    draws = np.random.default_rng(0).lognormal(size=(4000, processes))
    ends = np.array([replicate_interval(list(draw)) for draw in draws])
    assert np.mean((ends[:, 0] <= 1) & (ends[:, 1] >= 1)) == pytest.approx(coverage, abs=0.02)


def test_processes_become_their_median_with_an_interval() -> None:
    rows = validate(
        [
            row(0, 12.0, memory_peak_bytes=7),
            row(1, 10.0),
            row(2, 10.5),
            row(3, None, status="crash", reason="killed by SIGSEGV"),
        ]
    )
    found = aggregate_replicates(rows)
    assert len(found) == 1 and list(found.columns) == list(rows.columns)
    middle = found.iloc[0]
    assert (middle["replicate"], middle["latency_p50_ms"], middle["latency_p75_ms"]) == (2, 10.5, 10.5)
    assert (middle["latency_low_ms"], middle["latency_high_ms"]) == (10.0, 12.0)
    assert middle["memory_peak_bytes"] == 7 and middle["status"] == "ok"


def test_counts_that_disagree_in_one_process_disagree() -> None:
    counts = {"macs_analytic": 100, "macs_counted": 100, "macs_agree": True}
    traced = row(0, 12.0, **counts | {"macs_fvcore": 150, "macs_agree": False})
    rows = validate([traced, row(1, 10.0, **counts), row(2, 10.5, **counts), row(0, 3.0, seed=1)])
    result = aggregate_replicates(rows).sort_values("seed")
    assert [bool(value) if value is not pd.NA else None for value in result["macs_agree"]] == [False, None]


def test_an_even_number_of_processes_has_its_median_between_two() -> None:
    rows = validate([row(n, ms) for n, ms in enumerate((10.0, 13.0, 11.0, 12.0))] + [row(0, 3.0, seed=1)])
    result = aggregate_replicates(rows).sort_values("seed")
    assert list(result["latency_p50_ms"]) == [11.5, 3.0]
    assert list(result["latency_high_ms"]) == pytest.approx([13.0, 3.03])


def test_a_case_that_never_ran_keeps_its_reason() -> None:
    rows = validate([row(n, None, status="oom", reason="predicted") for n in range(3)])
    assert list(aggregate_replicates(rows)["reason"]) == ["predicted"]


def test_single_rows_are_left_as_they_are() -> None:
    rows = validate([row(0, 12.0), row(0, 3.0, seed=1)])
    pd.testing.assert_frame_equal(aggregate_replicates(rows), rows)
