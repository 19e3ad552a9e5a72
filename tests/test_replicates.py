from typing import Any

import pandas as pd
import pytest

from profiling.case import Case
from profiling.replicates import MOST, fastest, interval, settled
from profiling.rows import validate


def row(replicate: int, ms: float | None, **columns: Any) -> dict[str, Any]:
    times = {"latency_p25_ms": ms, "latency_p50_ms": ms, "latency_p75_ms": ms, "latency_p95_ms": ms}
    times |= {"latency_low_ms": ms, "latency_high_ms": ms and 1.01 * ms, "status": "ok", "device_name": "Paper"}
    return Case("full", 14, 14, replicate=replicate).who("s", "Paper") | times | columns


def test_the_interval_reaches_from_the_fastest_to_the_runner_up() -> None:
    assert interval([12.0, 10.0, 30.0, 11.0]) == (10.0, 11.0)


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([], False), ([10.0], False), ([10.0, 10.0], False), ([10.0, 10.1, 10.3], True), ([10.0, 10.1, 10.5], False),
        ([30.0, 10.1, 20.0, 10.0, 10.3], True), ([10.0 * 1.1**n for n in range(MOST - 1)], False),
        ([10.0 * 1.1**n for n in range(MOST)], True),
    ],
)  # fmt: skip
def test_a_case_is_settled_when_three_agree_or_enough_were_asked(medians: list[float], expected: bool) -> None:
    assert settled(medians) is expected


def test_the_fastest_stands_for_all_and_lacks_nothing() -> None:
    rows = validate(
        [
            row(0, 12.0, memory_peak_bytes=7),
            row(1, 10.0),
            row(2, 10.5),
            row(3, None, status="crash", reason="killed by SIGSEGV"),
        ]
    )
    found = fastest(rows)
    assert len(found) == 1 and list(found.columns) == list(rows.columns)
    best = found.iloc[0]
    assert (best["replicate"], best["latency_p50_ms"], best["latency_p75_ms"]) == (1, 10.0, 10.0)
    assert (best["latency_low_ms"], best["latency_high_ms"]) == (10.0, 10.5)
    assert best["memory_peak_bytes"] == 7 and best["status"] == "ok"


def test_a_case_that_never_ran_keeps_its_reason() -> None:
    rows = validate([row(n, None, status="oom", reason="predicted") for n in range(3)])
    assert list(fastest(rows)["reason"]) == ["predicted"]


def test_single_rows_are_left_as_they_are() -> None:
    rows = validate([row(0, 12.0), row(0, 3.0, seed=1)])
    pd.testing.assert_frame_equal(fastest(rows), rows)
