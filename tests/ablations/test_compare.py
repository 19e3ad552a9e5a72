"""The comparison of two runs, on synthetic rows with a known answer."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from rich.console import Console

from ablations.__main__ import main
from ablations.analysis.compare import ONE_PROCESS, Comparison, Thresholds, classify, compare, read, welch_ratio
from ablations.analysis.compare_page import markdown, show
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.schema.row import SchemaError, validate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"torch": "2.13.0", "python": "3.11.7", "threads": 2}


def row(height: int = 14, latency: Sequence[float] | float = 10.0, **changes: Any) -> dict[str, Any]:
    """A row with a latency: the median and its interval, or the median with an interval of 1 % on either side."""
    low, mid, high = (0.99 * latency, latency, 1.01 * latency) if isinstance(latency, float) else latency
    case = Case("full", height, 14, replicate=changes.pop("replicate", 0))
    times = {"latency_low_ms": low, "latency_p50_ms": mid, "latency_high_ms": high}
    return case.key_columns("s", "Paper CPU") | ENVIRONMENT | times | {"status": "ok"} | changes


def failed(height: int = 14, status: str = "oom", **changes: Any) -> dict[str, Any]:
    """A row without a latency."""
    none = dict.fromkeys(("latency_low_ms", "latency_p50_ms", "latency_high_ms"))
    return row(height) | none | {"status": status, "reason": "a reason"} | changes


def compared(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Comparison:
    both = validate([*a, *b])
    return compare(both.iloc[: len(a)], both.iloc[len(a) :])


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    validate(list(rows)).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("low", "ratio", "high", "expected"),
    [
        (0.97, 1.0, 1.03, "SAME"),
        (1.01, 1.04, 1.08, "SAME"),
        (1.01, 1.06, 1.2, "SLOWER"),
        (0.99, 1.06, 1.2, "UNCLEAR"),
        (0.99, 1.06, 1.09, "SAME"),
        (0.8, 1.0, 1.05, "UNCLEAR"),
        (0.8, 0.9, 0.99, "FASTER"),
        (0.8, 0.9, 1.01, "UNCLEAR"),
        (float("nan"), 1.0, float("nan"), "UNCLEAR"),
    ],
)
def test_classify(low: float, ratio: float, high: float, expected: str) -> None:
    assert classify(low, ratio, high, Thresholds(effect=0.05, same=0.1)) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((9.9, 10.0, 10.1), (9.9, 10.0, 10.1), "SAME"),
        ((9.9, 10.0, 10.1), (11.9, 12.0, 12.1), "SAME"),
        ((9.9, 10.0, 10.1), (12.5, 12.6, 12.7), "SLOWER"),
        ((9.9, 10.0, 10.1), (7.8, 7.9, 8.0), "FASTER"),
        ((9.0, 10.0, 30.0), (19.0, 20.0, 21.0), "UNCLEAR"),
    ],
)
def test_one_process_on_a_side_detects_only_large_changes(
    a: Sequence[float], b: Sequence[float], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compared([row(latency=a)], [row(latency=b)])
    assert list(result.cells["verdict"]) == [expected] and list(result.cells["processes"]) == [1]
    assert result.cells["ratio"].iloc[0] == pytest.approx(b[1] / a[1])
    assert result.worse == (expected == "SLOWER")
    assert f"only a change of over {ONE_PROCESS.effect:.0%} counts" in " ".join(shown(result, capsys).split())


def test_the_interval_of_processes_is_welchs() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(500):
        a, b = np.exp(rng.normal(0, 0.01, 3)), 1.1 * np.exp(rng.normal(0, 0.04, 5))
        low, ratio, high = welch_ratio(a, b)
        assert low <= ratio <= high
        inside.append(low <= 1.1 <= high)
    assert 0.93 <= np.mean(inside) <= 0.98
    assert welch_ratio([2.0, 2.0], [3.0, 3.0]) == (1.5, 1.5, 1.5)


def test_replicates_are_one_cell() -> None:
    slow = [row(latency=latency, replicate=n) for n, latency in enumerate((12.0, 12.2, 12.1))]
    fast = [row(latency=latency, replicate=n) for n, latency in enumerate((9.9, 10.0, 10.1))]
    found = compared(fast, slow)
    assert len(found.cells) == 1
    cell = found.cells.iloc[0]
    assert (cell["a_ms"], cell["b_ms"], cell["verdict"]) == (pytest.approx(10.0), pytest.approx(12.1), "SLOWER")
    assert not found.missing and not found.new


def test_cell_has_the_status_of_its_worst_replicate() -> None:
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
    message = capsys.readouterr().out
    assert message.index("2.14.0") < message.index("SLOWER") < message.index("2 cells in both")
    assert "Environment" not in shown(compared([row()], [row()]), capsys)


def shown(found: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    show(found, Console(width=200))
    return capsys.readouterr().out


def test_unchanged_cells_are_counted_and_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    a = [row(h) for h in (7, 14, 28, 56)]
    b = [row(7), row(14, 5.0), row(28, 20.0), row(56, (9.0, 13.0, 17.0))]
    message = shown(compared(a, b), capsys)
    assert "4 cells in both: 1 FASTER, 1 SAME, 1 SLOWER, 1 UNCLEAR; 0 with a worse status." in message
    assert "height=7 " not in message and "height=14" in message and "height=28" in message
    assert message.index("SLOWER") < message.index("UNCLEAR") < message.index("FASTER")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((9.9, 10.0, 10.1), (10.9, 11.0, 11.1), "SLOWER"),
        ((9.9, 10.0, 10.1), (10.1, 10.2, 10.3), "SAME"),
        ((9.0, 10.0, 11.0), (10.0, 11.0, 12.0), "UNCLEAR"),
        ((9.5, 10.5), (10.9, 11.6), "UNCLEAR"),
        ((9.9, 10.0, 10.1, 10.0, 13.0), (10.9, 11.0, 11.1, 11.0, 11.1), "UNCLEAR"),
    ],
)
def test_several_processes_detect_small_changes(a: Sequence[float], b: Sequence[float], expected: str) -> None:
    sides = [[row(latency=ms, replicate=n) for n, ms in enumerate(side)] for side in (a, b)]
    result = compared(*sides)
    assert list(result.cells["verdict"]) == [expected]
    assert list(result.cells["processes"]) == [len(a)]


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


def test_times_with_kept_and_returned_memory_are_not_compared() -> None:
    for kept, expected in (("kept", "SLOWER"), ("returned", "UNCLEAR")):
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
    counts = "0 FASTER, 1 SAME, 1 SLOWER, 0 UNCLEAR, 1 without a time on both sides; 1 with a worse status."
    assert lines[0].startswith(f"3 cells in both: {counts}")
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
        ([row(latency=(9.0, 13.0, 17.0))], 0),
        ([row(latency=20.0)], 1),
        ([failed()], 1),
        ([row(28)], 0),
        ([row(memory_peak_bytes=7)], 0),
    ],
    ids=["same", "faster", "unclear", "slower", "failed", "another case", "another memory"],
)
def test_the_exit_status_is_that_of_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], b: list[dict[str, Any]], status: int
) -> None:
    one, two = write(tmp_path / "a.csv", row()), write(tmp_path / "b.csv", *b)
    assert main(["compare", str(one), str(two)]) == status
    assert main(["compare", str(one), str(two), "--markdown"]) == status
    message = capsys.readouterr()
    assert message.err == "" and message.out.count("cells in both") == 2


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_regression(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.csv", row()), write(tmp_path / "b.csv", row())
    process = subprocess.Popen(
        [sys.executable, "-m", "ablations", "compare", str(one), str(two)], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


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


def test_path_without_results_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.csv"):
        with pytest.raises(InvalidOption, match="no results there"):
            read(path)
    with pytest.raises(SchemaError, match="another schema"):
        read(tmp_path / "other.csv")


def test_file_without_rows_has_no_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.csv", row())
    empty.write_text(empty.read_text().splitlines()[0] + "\n")
    full = write(tmp_path / "full.csv", row())
    for one, two in ((empty, empty), (empty, full), (full, empty)):
        assert main(["compare", str(one), str(two)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("0 cells in both")


def a_run(rng: np.random.Generator, times: NDArray[np.float64], processes: int) -> pd.DataFrame:
    """Rows of a run whose processes are 2 % apart."""
    return validate(
        [
            row(cell + 1, float(time * np.exp(rng.normal(0, 0.02))), replicate=number)
            for cell, time in enumerate(times)
            for number in range(processes)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "found"), [(3, 0.6), (5, 0.95)])
def test_noise_is_unclear_and_slowdown_is_detected(processes: int, found: float) -> None:
    rng = np.random.default_rng(0)
    times = rng.lognormal(2, 1, 200)
    before = a_run(rng, times, processes)
    again = compare(before, a_run(rng, times, processes)).cells["verdict"]
    slower = compare(before, a_run(rng, 1.1 * times, processes)).cells["verdict"]
    assert again.isin(["FASTER", "SLOWER"]).mean() <= 0.02
    assert (slower == "SLOWER").mean() >= found
    assert (slower == "FASTER").mean() == 0
