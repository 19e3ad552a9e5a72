"""The page and the JSON of the profiler."""

import io
import json
import re
from pathlib import Path

import pytest
from commands import PLUGINS, SMALL
from rich.console import Console

import profiling.__main__ as profiler
from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.cli import result_page
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, breakdown
from profiling.schema.row import COLUMNS


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    subprocess_runner.start()


def test_json_holds_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiler.main([*SMALL, "--kv-downsample-mode", "avgpool", "--kv-downsample-ratio", "2", "--json"]) == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out)
    assert shown.err == ""
    assert set(row) <= {*COLUMNS, "stages", "heaviest_operators"}
    assert (row["name"], row["height"], row["n_win"], row["topk"]) == ("bra", 8, 2, 1)
    assert (row["kv_downsample_mode"], row["kv_downsample_ratio"]) == ("avgpool", 2)
    assert row["freed_memory"] == "kept"
    assert row["status"] == "ok" and row["macs_agree"] and row["macs_counted"] == row["macs_analytic"]
    # 4 x 4 tokens of a region, halved per side, from 1 region.
    assert row["kv_tokens_per_query"] == 4
    assert row["memory_predicted_bytes"] == row["memory_peak_bytes"] > row["memory_base_bytes"]
    assert 0 < row["latency_low_ms"] <= row["latency_p50_ms"] <= row["latency_high_ms"]
    assert 1 <= len(row["heaviest_operators"]) <= 10
    stages = {stage["name"]: stage["share"] for stage in row["stages"]}
    assert set(stages) == {"bra.project", "bra.route", "bra.attend", "bra.lepe", "bra.output"}
    assert 0 < sum(stages.values()) <= 1


def test_the_page_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiler.main([*SMALL, "--mode", "forward_backward", "--freed-memory", "returned"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "\x1b" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    for message in (
        "bra 8x8x8 n_win=2 topk=1 forward_backward",
        "counts agree",
        "prediction off by",
        "freed memory is returned",
        "Heaviest operators",
    ):
        assert message in shown.out


def test_a_profile_of_a_plugin_leaves_out_what_it_does_not_declare(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plugin", str(PLUGINS / "plain.py"), "--attention", "plain", *SMALL[:8], "--window-size", "3"]
    assert profiler.main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["window_size"] == 3 and row["kv_tokens_per_query"] is None and "macs_analytic" not in row
    assert row["macs_counted"] == row["macs_fvcore"] == 8 * 8 * 8 * 8
    assert profiler.main(arguments) == 0
    assert re.search(r"MACs, by formula +- ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("fault_segfault", "crash", "killed by SIGSEGV"),
        ("fault_raise", "error", "over [/two] lines: ½"),
        ("fault_output", "incorrect", "is off by 0.001"),
        ("fault_crash_on_shapes", "crash", "killed by SIGSEGV"),
    ],
)
def test_a_profile_that_fails_says_so_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], name: str, status: str, message: str
) -> None:
    arguments = ["--plugin", str(PLUGINS / "faults.py"), "--attention", name, *SMALL[:8]]
    assert profiler.main([*arguments, "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == status and message in row["reason"] and "latency_p50_ms" not in row
    assert profiler.main(arguments) == 1
    shown = capsys.readouterr()
    assert status in shown.out and message in " ".join(shown.out.split()) and "Traceback" not in shown.out + shown.err


def test_a_step_larger_than_memory_ends_as_out_of_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "available_bytes", lambda device: 1 << 30)
    arguments = ["--attention", "full", "--impl", "reference", "--height", "120", "--width", "120", "--dim", "8"]
    assert profiler.main([*arguments, "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "oom" and row["memory_predicted_bytes"] > 1 << 30 and "latency_p50_ms" not in row


def test_a_profile_is_of_the_step_that_is_timed(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Workload] = []
    monkeypatch.setattr(Workload, "compile", lambda work: compiled.append(work))
    job = Job(Case("pseudo_conv", 4, 4, 8, 2, compiled=True))
    assert breakdown(job, None)["heaviest_operators"]
    assert len(compiled) == 1


def test_a_trace_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert profiler.main([*SMALL, "--trace", str(tmp_path / "deep" / "trace")]) == 0
    (path,) = (tmp_path / "deep" / "trace").iterdir()
    assert json.loads(path.read_text())["traceEvents"]
    assert "make tensorboard DIR=" in capsys.readouterr().out


ROW = {"device_name": "Paper [CPU]", "torch": "2", "status": "error", "reason": "[/red] x", "macs_agree": False}


@pytest.mark.parametrize("color", [True, False])
def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, color: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    result_page.show(Case("full", 4, 4), ROW, {}, Console(file=out, force_terminal=True, width=80))
    shown = out.getvalue()
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)) == color
    assert "Paper [CPU]" in shown and "[/red] x" in shown and "DISAGREE" in shown
