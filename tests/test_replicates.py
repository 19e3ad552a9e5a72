from typing import Any

import pandas as pd
import pytest

from profiling.case import Case
from profiling.replicates import (
    BETWEEN_RUNS,
    CACHED_BYTES,
    FOLLOWS,
    FOLLOWS_BOTH,
    MOST,
    YARDSTICKS,
    at_speed,
    interval,
    settled,
    speed,
    typical,
)
from profiling.rows import validate


def row(replicate: int, ms: float | None, **columns: Any) -> dict[str, Any]:
    times = {"latency_p25_ms": ms, "latency_p50_ms": ms, "latency_p75_ms": ms, "latency_p95_ms": ms}
    times |= {"latency_low_ms": ms, "latency_high_ms": ms and 1.01 * ms, "status": "ok", "device_name": "Paper"}
    return Case("full", 14, 14, replicate=replicate).who("s", "Paper") | times | columns


def at(cores: float, memory: float | None = None) -> pd.Series:
    return pd.Series([cores, memory], index=YARDSTICKS, dtype="float64")


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([12.0, 10.0, 11.0], (10.0, 11.0, 12.0)),
        ([12.0, 10.0, 30.0, 11.0], (10.0, 15.75, 30.0)),
        ([12.0, 10.0, 30.0, 11.0, 13.0], (11.0, 12.0, 13.0)),
        ([float(n) for n in range(9)], (2.0, 4.0, 6.0)),
    ],
)
def test_the_interval_reaches_from_quartile_to_quartile(medians: list[float], expected: tuple[float, ...]) -> None:
    assert interval(medians) == expected


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([], False), ([10.0], False), ([10.0, 10.0], False), ([10.0, 10.1, 10.3], True), ([10.0, 10.1, 10.5], False),
        ([30.0, 10.1, 9.0, 10.0, 10.3], True), ([10.0 * 1.1**n for n in range(MOST - 1)], False),
        ([10.0 * 1.1**n for n in range(MOST)], True),
    ],
)  # fmt: skip
def test_a_case_is_settled_when_three_agree_or_enough_were_asked(medians: list[float], expected: bool) -> None:
    assert settled(medians) is expected


def test_at_the_same_speed_only_what_the_kernel_did_stays() -> None:
    shares = (0.0, 1.0, 0.5)
    rows = validate([row(n, 11.0, yardstick_ms=1.21, system_share=share) for n, share in enumerate(shares)])
    found = at_speed(rows, at(1.0), at(1.0))
    assert list(found["latency_p50_ms"]) == pytest.approx([11.0 / 1.21**0.75, 11.0, 11.0 / 1.1**0.75])
    assert list(found["latency_p95_ms"]) == list(found["latency_p50_ms"])
    assert list(rows["latency_p50_ms"]) == [11.0] * 3


def test_a_time_follows_the_yardstick_beside_it_by_three_quarters() -> None:
    yardsticks = (1.0, 16.0, None)
    rows = validate([row(n, 16.0, yardstick_ms=y, system_share=y and 0.0) for n, y in enumerate(yardsticks)])
    assert list(at_speed(rows, at(1.0))["latency_p50_ms"]) == pytest.approx([16.0, 2.0, 16.0])
    assert list(at_speed(rows, at(16.0))["latency_p50_ms"]) == pytest.approx([128.0, 16.0, 16.0])


def test_a_time_follows_memory_too_where_no_cache_holds_what_it_needs() -> None:
    small, large = CACHED_BYTES, CACHED_BYTES + 1
    beside = {"yardstick_ms": 4.0, "system_share": 0.0}
    rows = validate(
        [
            row(0, 10.0, **beside, yardstick_memory_ms=32.0, memory_predicted_bytes=small),
            row(1, 10.0, **beside, yardstick_memory_ms=32.0, memory_predicted_bytes=large),
            row(2, 10.0, **beside, memory_predicted_bytes=large),
            row(3, 10.0, **beside, yardstick_memory_ms=32.0),
        ]
    )
    by_cores = 10.0 / 4.0**FOLLOWS
    by_both = 10.0 / (4.0 ** FOLLOWS_BOTH[0] * 2.0 ** FOLLOWS_BOTH[1])
    further = 10.0 / (4.0 ** BETWEEN_RUNS[0] * 2.0 ** BETWEEN_RUNS[1])
    assert list(at_speed(rows, at(1.0, 16.0))["latency_p50_ms"]) == pytest.approx(
        [by_cores, by_both, by_cores, by_cores]
    )
    assert list(at_speed(rows, speed(rows), at(1.0, 16.0))["latency_p50_ms"]) == pytest.approx(
        [by_cores, further, by_cores, by_cores]
    )
    assert list(at_speed(rows, at(1.0))["latency_p50_ms"]) == pytest.approx([by_cores] * 4)
    assert list(at_speed(rows, speed(rows), at(1.0))["latency_p50_ms"]) == pytest.approx([by_cores] * 4)
    assert list(speed(rows)) == [4.0, 32.0]


def test_the_one_in_the_middle_stands_for_all_and_lacks_nothing() -> None:
    rows = validate(
        [
            row(0, 12.0, memory_peak_bytes=7),
            row(1, 10.0),
            row(2, 10.5),
            row(3, None, status="crash", reason="killed by SIGSEGV"),
        ]
    )
    found = typical(rows)
    assert len(found) == 1 and list(found.columns) == list(rows.columns)
    middle = found.iloc[0]
    assert (middle["replicate"], middle["latency_p50_ms"], middle["latency_p75_ms"]) == (2, 10.5, 10.5)
    assert (middle["latency_low_ms"], middle["latency_high_ms"]) == (10.0, 12.0)
    assert middle["memory_peak_bytes"] == 7 and middle["status"] == "ok"


def test_a_case_that_never_ran_keeps_its_reason() -> None:
    rows = validate([row(n, None, status="oom", reason="predicted") for n in range(3)])
    assert list(typical(rows)["reason"]) == ["predicted"]


def test_single_rows_are_left_as_they_are() -> None:
    rows = validate([row(0, 12.0), row(0, 3.0, seed=1)])
    pd.testing.assert_frame_equal(typical(rows), rows)
