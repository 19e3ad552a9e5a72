"""The comparison of two runs, on rows made up so that the right answer is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from rich.console import Console

from ablations.__main__ import main
from ablations.compare import Comparison, compare, markdown, read, show, verdict
from attention_zoo import InvalidOption
from profiling.case import Case
from profiling.replicates import FOLLOWS, settled
from profiling.rows import SchemaError, validate

ENVIRONMENT = {"torch": "2.13.0", "python": "3.11.7", "threads": 2}


def row(height: int = 14, latency: Sequence[float] | float = 10.0, **changes: Any) -> dict[str, Any]:
    """A row with a latency: its quartiles, or its median with quartiles 1 % away."""
    low, mid, high = (0.99 * latency, latency, 1.01 * latency) if isinstance(latency, float) else latency
    case = Case("full", height, 14, replicate=changes.pop("replicate", 0))
    times = {"latency_p25_ms": low, "latency_p50_ms": mid, "latency_p75_ms": high}
    return case.who("s", "Paper CPU") | ENVIRONMENT | times | {"status": "ok"} | changes


def failed(height: int = 14, status: str = "oom", **changes: Any) -> dict[str, Any]:
    """A row without a latency."""
    none = dict.fromkeys(("latency_p25_ms", "latency_p50_ms", "latency_p75_ms"))
    return row(height) | none | {"status": status, "reason": "a reason"} | changes


def compared(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Comparison:
    both = validate([*a, *b])
    return compare(both.iloc[: len(a)], both.iloc[len(a) :])


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    validate(list(rows)).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((9.9, 10.0, 10.1), (9.9, 10.0, 10.1), "SAME"),
        ((9.9, 10.0, 10.1), (10.3, 10.4, 10.5), "SAME"),
        ((9.9, 10.0, 10.1), (9.5, 9.6, 9.7), "SAME"),
        ((9.9, 10.0, 10.1), (10.9, 11.0, 11.1), "SLOWER"),
        ((9.9, 10.0, 10.1), (8.9, 9.0, 9.1), "FASTER"),
        ((9.0, 10.0, 11.0), (10.0, 11.0, 12.0), "AMBIGUOUS"),
        ((9.0, 10.0, 11.0), (8.0, 9.0, 10.0), "AMBIGUOUS"),
        ((9.0, 10.0, 30.0), (19.0, 20.0, 21.0), "AMBIGUOUS"),
        ((9.9, 10.0, 10.1), (19.0, 20.0, 30.0), "SLOWER"),
    ],
)
def test_verdicts(a: Sequence[float], b: Sequence[float], expected: str) -> None:
    assert verdict(a, b) == expected
    found = compared([row(latency=a)], [row(latency=b)])
    assert list(found.cells["verdict"]) == [expected]
    assert found.cells["ratio"].iloc[0] == pytest.approx(b[1] / a[1])
    assert found.worse == (expected == "SLOWER")


def test_replicates_are_one_cell() -> None:
    slow = [row(latency=latency, replicate=n) for n, latency in enumerate((12.0, 12.2, 12.1))]
    fast = [row(latency=latency, replicate=n) for n, latency in enumerate((9.9, 10.0, 10.1))]
    found = compared(fast, slow)
    assert len(found.cells) == 1
    cell = found.cells.iloc[0]
    assert (cell["a_ms"], cell["b_ms"], cell["verdict"]) == (pytest.approx(10.0), pytest.approx(12.1), "SLOWER")
    assert not found.missing and not found.new


def test_runs_on_one_device_are_compared_at_the_same_speed() -> None:
    a = [row(h, 10.0, yardstick_ms=0.2, system_share=0.0) for h in (7, 14, 28)]
    b = [row(h, ms, yardstick_ms=0.22, system_share=0.0) for h, ms in ((7, 11.0), (14, 10.0), (28, 12.1))]
    slower = 1.1**0.75
    found = compared(a, b)
    assert list(found.cells["verdict"]) == ["SAME", "FASTER", "SLOWER"]
    assert list(found.cells["ratio"]) == pytest.approx([1.1 / slower, 1.0 / slower, 1.21 / slower])
    assert found.environment["yardstick_ms"] == ("0.2", "0.22, allowed for")
    beside = [[one | {"yardstick_memory_ms": ms} for one in rows] for rows, ms in ((a, 5.0), (b, 6.0))]
    assert compared(*beside).environment["yardstick_memory_ms"] == ("5", "6, allowed for")
    # A yardstick that only one of them took is left out of both.
    slow = [one | {"memory_predicted_bytes": 1 << 30, "yardstick_memory_ms": 5.0 + n} for n, one in enumerate(a)]
    older = compared(slow, b)
    assert list(older.cells["ratio"]) == pytest.approx(list(found.cells["ratio"]))
    assert "yardstick_memory_ms" not in older.environment
    # What only one run has says nothing of how they differ.
    alone = [row(h, 10.0, sweep="t", yardstick_ms=0.5, system_share=0.0) for h in (7, 14, 28, 56)]
    assert list(compared(a, [*b, *alone]).cells["ratio"]) == pytest.approx(list(found.cells["ratio"]))
    # With another PyTorch the yardstick itself may have become another.
    newer = compared(a, [one | {"torch": "2.14.0"} for one in b])
    assert list(newer.cells["verdict"]) == ["SLOWER", "SAME", "SLOWER"] and "yardstick_ms" not in newer.environment


def test_a_cell_is_as_bad_as_its_worst_replicate() -> None:
    found = compared([row(replicate=0), row(replicate=1)], [row(replicate=0), failed(status="crash", replicate=1)])
    assert found.cells["status"].iloc[0] == "ok -> crash" and found.worse


@pytest.mark.parametrize("status", ["oom", "timeout", "crash", "incorrect", "unsupported", "error"])
def test_a_status_that_got_worse(status: str) -> None:
    found = compared([row()], [failed(status=status)])
    assert found.cells["status"].iloc[0] == f"ok -> {status}"
    assert found.cells["verdict"].iloc[0] == "" and found.worse
    assert not compared([failed(status=status)], [row()]).worse
    assert not compared([failed(status=status)], [failed(status=status)]).worse


def test_exact_columns_are_compared_exactly() -> None:
    before = row(memory_peak_bytes=1_000_000_000_000, memory_predicted_bytes=7, macs_counted=5, params=3)
    after = before | {"memory_peak_bytes": 1_000_000_000_001, "macs_counted": None, "macs_fvcore": 5}
    found = compared([before], [after])
    changes = found.cells["changes"].iloc[0]
    assert changes == "macs_counted: 5 -> none; macs_fvcore: none -> 5; " + (
        "memory_peak_bytes: 1000000000000 -> 1000000000001"
    )
    assert not found.worse
    assert compared([before], [dict(before)]).cells["changes"].iloc[0] == ""


def test_cells_in_one_run_only() -> None:
    found = compared([row(7), row(14)], [row(14), row(28), row(56)])
    assert len(found.cells) == 1 and not found.worse
    assert [f"height={h}" in case for case, h in zip(found.missing, (7,), strict=True)] == [True]
    assert [f"height={h}" in case for case, h in zip(found.new, (28, 56), strict=True)] == [True, True]


@pytest.mark.parametrize(
    "changed",
    [{"mode": "forward_backward"}, {"dtype": "bf16"}, {"impl_requested": "sdpa"}, {"batch": 2}, {"sweep": "t"}],
)
def test_cases_that_differ_are_not_compared(changed: dict[str, Any]) -> None:
    found = compared([row()], [row(**changed)])
    assert len(found.cells) == 0 and len(found.missing) == len(found.new) == 1


def test_the_same_case_on_another_device_is_compared_and_the_device_shown() -> None:
    found = compared([row()], [row(device_name="Cardboard CPU", threads=4)])
    assert len(found.cells) == 1
    assert found.environment == {"device_name": ("Paper CPU", "Cardboard CPU"), "threads": ("2", "4")}


def test_differences_of_the_environment_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared([row(), row(28)], [row(latency=20.0, torch="2.14.0"), row(28, torch="2.14.0")])
    show(found, Console(width=200))
    told = capsys.readouterr().out
    assert told.index("2.14.0") < told.index("SLOWER") < told.index("2 cells in both")
    assert "Environment" not in shown(compared([row()], [row()]), capsys)


def shown(found: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    show(found, Console(width=200))
    return capsys.readouterr().out


def test_what_is_the_same_is_counted_and_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    a = [row(h) for h in (7, 14, 28, 56)]
    b = [row(7), row(14, 5.0), row(28, 20.0), row(56, (9.0, 11.0, 13.0))]
    told = shown(compared(a, b), capsys)
    assert "4 cells in both: 1 FASTER, 1 SAME, 1 SLOWER, 1 AMBIGUOUS; 0 with a worse status." in told
    assert "height=7 " not in told and "height=14" in told and "height=28" in told
    assert told.index("SLOWER") < told.index("AMBIGUOUS") < told.index("FASTER")


def test_cells_that_a_run_left_open_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    def run(height: int, *latencies: float) -> list[dict[str, Any]]:
        return [row(height, latency, replicate=number) for number, latency in enumerate(latencies)]

    agreed = [*run(7, 9.9, 10.0, 10.1), *run(14, 9.9, 10.0, 10.1), *run(28, 9.9, 10.0, 10.1), failed(56)]
    asked = [*run(7, 9.8, 10.0, 10.1), *run(14, 9.0, 10.0, 11.0), *run(28, 10.0, 10.0), failed(56)]
    found = compared(agreed, asked)
    assert found.cells["settled"].tolist() == [True, False, False, False]
    assert shown(found, capsys).endswith("2 are not settled: fewer than three processes measured them, or these do "
                                         "not agree.\n")  # fmt: skip
    assert "not settled" not in shown(compared(agreed, agreed), capsys)


@pytest.mark.parametrize(
    ("processes", "expected"),
    # By chance all of one run lie on one side in 2 of 20 orders, 2 of 70, 2 of 252.
    [(1, "SLOWER"), (3, "AMBIGUOUS"), (4, "AMBIGUOUS"), (5, "SLOWER")],
)
def test_processes_that_do_not_agree_need_to_be_many(processes: int, expected: str) -> None:
    loose = [9.0, 10.0, 9.5, 9.8, 9.2][:processes]
    runs = [[row(latency=1.3**b * ms, replicate=n) for n, ms in enumerate(loose)] for b in (0, 1)]
    assert compared(*runs).cells["verdict"].tolist() == [expected]
    overlap = [row(latency=1.3 * ms, replicate=n) for n, ms in enumerate([*loose[:-1], 7.0])]
    if processes > 1:
        assert compared(runs[0], overlap).cells["verdict"].tolist() == ["AMBIGUOUS"]


def test_processes_that_agree_need_not_be_many() -> None:
    runs = [[row(latency=1.1**b * ms, replicate=n) for n, ms in enumerate((9.9, 10.0, 10.1))] for b in (0, 1)]
    assert compared(*runs).cells["verdict"].tolist() == ["SLOWER"]


def test_each_device_is_compared_with_itself() -> None:
    def on(name: str, latency: float, height: int = 14) -> dict[str, Any]:
        return row(height, latency, device_name=name)

    found = compared([on("X", 10.0), on("Y", 30.0)], [on("Y", 30.0), on("Z", 10.0)])
    assert found.cells["verdict"].tolist() == ["SAME"] and not found.missing and not found.new
    assert found.environment == {"device_name": ("X (left out), Y", "Y, Z (left out)")}
    found = compared([on("X", 10.0), on("Y", 30.0)], [on("X", 20.0), on("Y", 30.0), on("Y", 30.0, 28)])
    assert found.cells["verdict"].tolist() == ["SLOWER", "SAME"]
    assert [case.split(": ")[0] for case in [*found.cells["case"], *found.new]] == ["X", "Y", "Y"]
    with pytest.raises(InvalidOption, match="A has X and Y, B has Z; give the folder of one device"):
        compared([on("X", 10.0), on("Y", 30.0)], [on("Z", 10.0)])


def test_a_time_with_memory_kept_is_not_held_against_one_with_memory_returned() -> None:
    for kept, expected in (("kept", "SLOWER"), ("returned", "AMBIGUOUS")):
        found = compared([row(freed_memory="kept")], [row(latency=20.0, freed_memory=kept)])
        assert found.cells["verdict"].tolist() == [expected]
        assert found.cells["changes"].tolist() == ["" if kept == "kept" else "freed_memory: kept -> returned"]


def test_square_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"other_options": "reach=[/bold]"}
    assert "reach=[/bold]" in shown(compared([row(**odd)], [row(latency=20.0, **odd)]), capsys)
    assert "reach=[/bold]" in shown(compared([row(**odd)], [row(28, **odd)]), capsys)


def test_markdown() -> None:
    a = [row(7), row(14, memory_peak_bytes=100), row(28), row(56)]
    b = [row(7, 20.0), row(14, memory_peak_bytes=200), failed(28), row(112, torch="2.14.0")]
    lines = markdown(compared(a, b)).splitlines()
    assert lines[0].startswith("3 cells in both: 0 FASTER, 1 SAME, 1 SLOWER, 0 AMBIGUOUS; 1 with a worse status.")
    assert "| torch | 2.13.0 | 2.13.0, 2.14.0 |" in lines
    assert any(line.startswith("| SLOWER | 2 | 10 | 20 |") and "height=7" in line for line in lines)
    assert any("memory_peak_bytes: 100 -> 200" in line for line in lines)
    assert any(line.startswith("| ok -> oom |") and "height=28" in line for line in lines)
    assert any(line.startswith("Only in A: ") and "height=56" in line for line in lines)
    assert any(line.startswith("Only in B: ") and "height=112" in line for line in lines)
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 6}


@pytest.mark.parametrize(
    ("b", "status"),
    [
        ([row()], 0),
        ([row(latency=5.0)], 0),
        ([row(latency=(9.0, 11.0, 13.0))], 0),
        ([row(latency=20.0)], 1),
        ([failed()], 1),
        ([row(28)], 0),
        ([row(memory_peak_bytes=7)], 0),
    ],
    ids=["same", "faster", "ambiguous", "slower", "failed", "another case", "another memory"],
)
def test_the_exit_status_is_that_of_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], b: list[dict[str, Any]], status: int
) -> None:
    one, two = write(tmp_path / "a.csv", row()), write(tmp_path / "b.csv", *b)
    assert main(["compare", str(one), str(two)]) == status
    assert main(["compare", str(one), str(two), "--markdown"]) == status
    told = capsys.readouterr()
    assert told.err == "" and told.out.count("cells in both") == 2


def test_folders_are_read_with_all_that_is_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "paper-cpu" / "s.csv", row(7), row(14))
        write(tmp_path / name / "paper-cpu" / "t.csv", row(7, sweep="t"))
        (tmp_path / name / "paper-cpu" / "peaks.csv").write_text("what,per_second,unit\n")
        (tmp_path / name / "paper-cpu" / "s.20250101.csv.old").write_text("old")
        (tmp_path / name / "published_models.csv").write_text("model,published_params\n")
        (tmp_path / name / "folder.csv").mkdir()
    assert len(read(tmp_path / "a")) == 3
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "3 cells in both: 0 FASTER, 3 SAME" in capsys.readouterr().out


def test_nothing_to_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.csv"):
        with pytest.raises(InvalidOption, match="no results there"):
            read(path)
    with pytest.raises(SchemaError, match="another schema"):
        read(tmp_path / "other.csv")


def test_a_header_alone_compares_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.csv", row())
    empty.write_text(empty.read_text().splitlines()[0] + "\n")
    full = write(tmp_path / "full.csv", row())
    for one, two in ((empty, empty), (empty, full), (full, empty)):
        assert main(["compare", str(one), str(two)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("0 cells in both")


Quartiles = NDArray[np.float64]
CELLS = 200


def a_run(rng: np.random.Generator, times: Quartiles, speed: float, apart: float, least: int) -> pd.DataFrame:
    """Rows of a run on a machine of this speed, which wavers; cells feel it by half to all of what the yardstick does.

    Samples are 3 % apart within a process, processes ``apart`` for reasons of their own, and one in ten is slower by
    a quarter on average.

    Every cell is measured ``least`` times or, if that is several times, until it is settled.
    """
    rows = []
    feels = np.random.default_rng(1).uniform(0.5, 1.0, len(times))
    for cell, time in enumerate(times):
        medians: list[float] = []
        while len(medians) < least or (least > 1 and not settled(medians)):
            waver = np.exp(rng.normal(0, 0.03 if least > 1 else 0.0))
            own = np.exp(rng.normal(0, apart)) * (1 + (apart > 0 and rng.random() < 0.1) * rng.exponential(0.25))
            slow = (speed * waver) ** feels[cell]
            samples = time * slow * own * np.exp(rng.normal(0, 0.03, 30))
            quartiles = np.quantile(samples, [0.25, 0.5, 0.75])
            beside = {"yardstick_ms": 0.2 * speed * waver, "system_share": 0.0}
            rows.append(row(cell + 1, tuple(quartiles), replicate=len(medians), **beside))
            medians.append(float(quartiles[1]) / (speed * waver) ** FOLLOWS)
    return validate(rows)


@pytest.mark.parametrize(("apart", "least"), [(0.0, 1), (0.01, 3), (0.02, 3)])
def test_noise_raises_no_alarm_and_a_slowdown_does(apart: float, least: int) -> None:
    rng = np.random.default_rng(0)
    times = rng.lognormal(2, 1, CELLS)
    before = a_run(rng, times, 1.0, apart, least)
    again = compare(before, a_run(rng, times, 1.04, apart, least)).cells["verdict"]
    slower = compare(before, a_run(rng, 1.1 * times, 1.04, apart, least)).cells["verdict"]
    assert len(again) == len(slower) == CELLS
    assert again.isin(["FASTER", "SLOWER"]).mean() <= 0.02
    assert (slower == "SLOWER").mean() >= 0.95
    assert (slower == "FASTER").mean() == 0
