"""The sweeps: their questions and cases, and that all of them run from end to end."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from ablations import sweeps
from ablations.__main__ import main as work_on_results
from ablations.analysis.run_summary import findings
from ablations.cli import run_all as command
from ablations.cli import run_capability
from ablations.harness import local_runner
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.sweep import Sweep, attentions, discover, select
from attention_zoo import InvalidOption, load_plugin, names, options
from profiling.meters.latency import QUICK
from profiling.schema.row import KEY, load

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / "tests" / "plugins" / "plain.py"
PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
SWEEPS = discover()
each_sweep = pytest.mark.parametrize("name", SWEEPS)


def test_required_sweeps_exist() -> None:
    assert {"resolution", "topk", "kv_downsample", "models"} <= set(SWEEPS)


@each_sweep
def test_sweep_has_question_expectation_and_command(name: str) -> None:
    sweep = SWEEPS[name]
    assert sweep.question.endswith("?") and len(sweep.question) > 20
    assert len(sweep.expect) > 20 and sweep.axes
    text = (ROOT / "ablations" / "sweeps" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 65
    assert f"python run_all.py --only {name}\n" in text


@each_sweep
@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
def test_cases_of_a_sweep_have_distinct_keys(name: str, smoke: bool) -> None:
    cases = SWEEPS[name].cases("cpu", smoke)
    assert cases and len({case.key(name, "d") for case in cases}) == len(cases)


@each_sweep
def test_smoke_is_a_small_part_of_the_sweep(name: str) -> None:
    sweep = SWEEPS[name]
    smoke, full = sweep.cases("cpu", smoke=True), sweep.cases("cpu")
    assert set(sweep.smoke) <= set(sweep.axes)
    assert len(smoke) <= len(full) / 2
    assert sum(map(sweep.measured, smoke)) <= 2 * len(names())


@each_sweep
def test_options_go_to_the_attentions_that_declare_them(name: str) -> None:
    for case in SWEEPS[name].cases("cpu"):
        if case.kind != "model":
            assert {option for option, _ in case.options} <= set(options(case.name))


def test_the_topk_sweep_routes_to_no_more_regions_than_there_are() -> None:
    cases = [dict(case.options) for case in SWEEPS["topk"].cases("cpu")]
    assert all(1 <= case["topk"] <= case["n_win"] ** 2 for case in cases)
    assert {case["topk"] for case in cases if case["n_win"] == 7} >= {1, 4, 49}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_topk_sweep_has_few_cells_of_bras_further_options_and_names_them_in_no_other(device: str) -> None:
    for sweep in (SWEEPS["topk"], SWEEPS["topk"].in_full()):
        cases = [dict(case.options) for case in sweep.cases(device) if case.replicate == 0]
        more = [case for case in cases if {"coarse_gate", "per_token_routing"} & set(case)]
        assert 4 <= len(more) <= len(cases) / 4
        assert {tuple(sorted(name for name, value in case.items() if value is True)) for case in more} >= {
            ("coarse_gate",), ("per_token_routing",)
        }  # fmt: skip
        # Beside each there is the same cell without it.
        without = [{n: v for n, v in case.items() if n not in ("coarse_gate", "per_token_routing")} for case in more]
        assert all(case in cases for case in without)
    assert len(SWEEPS["topk"].cases("cpu")) == 38


def test_further_products_follow_the_axes_but_not_in_a_smoke_run() -> None:
    fixed = {"name": "window", "dim": 8}
    sweep = Sweep("q?", "e", axes={"grid": (4, 8)}, also=[{"grid": (8,), "window_size": (2,)}], fixed=fixed)
    assert [(c.height, c.options) for c in sweep.cases("cpu")] == [(4, ()), (8, ()), (8, (("window_size", 2),))]
    assert [(c.height, c.options) for c in sweep.cases("cpu", smoke=True)] == [(4, ()), (8, ())]


def test_the_kv_downsample_sweep_has_every_mode() -> None:
    modes = {dict(case.options)["kv_downsample_mode"] for case in SWEEPS["kv_downsample"].cases("cpu")}
    assert modes == {"identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool", "fracpool", "conv"}


def test_the_resolution_sweep_has_every_attention_at_every_grid() -> None:
    cases = SWEEPS["resolution"].cases("cpu")
    assert {case.name for case in cases} == set(names())
    assert {case.height for case in cases if SWEEPS["resolution"].measured(case)} >= {14, 28, 56, 112}
    full = SWEEPS["resolution"].in_full()
    assert {case.height for case in full.cases("cpu") if full.measured(case)} >= {14, 28, 56, 112, 256}
    assert {(case.name, case.height) for case in cases} >= {(name, 1024) for name in names()}


def test_the_models_sweep_has_the_published_models() -> None:
    cases = SWEEPS["models"].in_full().cases("cpu")
    assert {(case.name, case.height) for case in cases} == {
        (name, side)
        for name in ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl")
        for side in (224, 384, 512)
    }


def test_a_sweep_is_a_product_of_its_axes() -> None:
    sweep = Sweep(
        "q?", "e", axes={"name": ("full", "window"), "grid": (4, 8), "window_size": (2, 4)}, fixed={"dim": 8},
        keep=lambda values: values["grid"] > values["window_size"],
    )  # fmt: skip
    result = [(c.name, c.height, c.width, c.dim, dict(c.options)) for c in sweep.cases("cpu")]
    assert result == [
        ("full", 4, 4, 8, {}), ("full", 8, 8, 8, {}),
        ("window", 4, 4, 8, {"window_size": 2}), ("window", 8, 8, 8, {"window_size": 2}),
        ("window", 8, 8, 8, {"window_size": 4}),
    ]  # fmt: skip


def test_replicates_are_cases_of_their_own_except_in_smoke() -> None:
    sweep = Sweep("q?", "e", axes={"grid": (4, 8)}, fixed={"name": "full"}, replicates=3)
    assert [(c.height, c.replicate) for c in sweep.cases("cpu")] == [(g, r) for r in range(3) for g in (4, 8)]
    assert {c.replicate for c in sweep.cases("cpu", smoke=True)} == {0}


def test_a_new_sweep_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from ablations.harness.sweep import Sweep\n"
        "SWEEP = Sweep(question='Mine?', expect='yes', axes={'grid': (2, 4)}, fixed={'name': 'full'})\n"
    )
    monkeypatch.setattr(sweeps, "__path__", [*sweeps.__path__, str(tmp_path)])
    assert discover()["mine"].question == "Mine?" and len(select("mine, topk")) == 2
    sys.modules.pop("ablations.sweeps.mine")


def test_sweeps_are_chosen_by_name() -> None:
    assert list(select(" topk ,models,")) == ["topk", "models"]
    assert select(None) == SWEEPS
    for bad in ("topk,none", "", " , "):
        with pytest.raises(InvalidOption, match=r"valid: .*kv_downsample.*resolution.*topk"):
            select(bad)


def without_peaks(launcher: Launcher) -> Launcher:
    """The launcher with a file of peaks, so that it measures none."""
    launcher.folder.mkdir(parents=True, exist_ok=True)
    (launcher.folder / "peaks.csv").write_text(PEAKS)
    return launcher


@pytest.mark.slow
def test_freed_memory_is_kept_unless_set_or_large(tmp_path: Path) -> None:
    fixed = {"name": "full", "dim": 8, "num_heads": 2, "mode": "forward", "impl": "reference"}
    kept = Sweep("q?", "e", axes={"grid": (8, 84)}, fixed=fixed, stopping=QUICK)
    launcher = without_peaks(Launcher(Settings(results=tmp_path)))
    needs = {case.height: columns["memory_predicted_bytes"] for case, columns, _ in launcher.plan(kept)}
    launcher.devices[0].available = 3 * needs[84]
    list(launcher.run({"kept": kept, "returned": replace(kept, freed_memory="returned")}))
    result = {name: load(launcher.folder / f"{name}.csv") for name in ("kept", "returned")}
    assert all((rows["status"] == "ok").all() for rows in result.values())
    assert list(result["kept"].set_index("height")["freed_memory"].loc[[8, 84]]) == ["kept", "returned"]
    assert list(result["returned"]["freed_memory"]) == ["returned"] * 2


@pytest.mark.slow
def test_every_case_is_run_once_before_any_is_run_again(tmp_path: Path) -> None:
    sweep = Sweep("q?", "e", axes={"grid": (4, 8)}, fixed={"name": "full", "dim": 8}, replicates=3, stopping=QUICK)
    launcher = without_peaks(Launcher(Settings(results=tmp_path)))
    ran = [(cell.sweep, cell.case.replicate) for cell, _, _ in launcher.run({"a": sweep, "b": sweep})]
    assert [replicate for _, replicate in ran] == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(name for name, _ in ran[:4]) == ["a", "a", "b", "b"]
    for _, cell in load(launcher.folder / "a.csv").groupby("height"):
        assert sorted(cell["replicate"]) == [0, 1, 2] and cell["latency_p50_ms"].notna().all()
        assert cell["memory_predicted_bytes"].nunique() == 1 and cell["memory_predicted_bytes"].notna().all()
        assert list(cell.loc[cell["memory_peak_bytes"].notna(), "replicate"]) == [0]
    assert not list(Launcher(Settings(results=tmp_path)).run({"a": sweep, "b": sweep}))


@pytest.mark.slow
def test_no_cell_starts_after_the_time_limit_and_run_is_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(
        "q?", "e", axes={"seed": tuple(range(40))}, fixed={"name": "full", "dim": 8, "grid": 4}, stopping=QUICK
    )
    now, measured = [0.0], local_runner.run

    def a_minute_each(*arguments: Any) -> dict[str, Any]:
        now[0] += 60
        return measured(*arguments)

    monkeypatch.setattr(local_runner, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(local_runner, "run", a_minute_each)
    for minutes, expected in ((0, 0), (5, 5), (math.inf, 35)):
        launcher = without_peaks(Launcher(Settings(results=tmp_path, minutes=minutes)))
        begun = len(list(launcher.run({"tiny": sweep})))
        done = sum(launcher.report.statuses.values())
        assert done + launcher.report.skipped + launcher.report.left == 40
        assert done == expected <= begun
    assert launcher.report.left == 0 and len(load(launcher.folder / "tiny.csv")) == 40


def test_an_attention_of_a_plugin_takes_part_in_the_resolution_sweep() -> None:
    assert load_plugin(PLAIN) == ["plain"]
    cases = [case for case in SWEEPS["resolution"].cases("cpu") if case.name == "plain"]
    grids = {case.height for case in SWEEPS["resolution"].cases("cpu")}
    assert {case.height for case in cases} == grids and len(cases) == 2 * len(grids) * SWEEPS["resolution"].replicates
    assert {case.options for case in cases} == {(("window_size", 7),)}


def test_a_dry_run_shows_every_cell_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(SWEEPS["resolution"], axes={"grid": (14, 512, 1024), "name": attentions}, smoke={})
    small = replace(small, measured=lambda case: case.height != 1024, keep=lambda v: v["name"] in ("plain", "full"))
    monkeypatch.setattr(run_capability, "select", lambda only: ({"resolution": small}, {}))
    monkeypatch.setenv("COLUMNS", "160")
    assert command.main(["--dry-run", "--device", "cpu", "--results", str(tmp_path), "--plugin", str(PLAIN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, side, mebibytes, message in (
        ("plain", 14, "0.1", "run"), ("plain", 1024, "512.0", "predict only"), ("full", 512, "1,048,", "not fit"),
    ):  # fmt: skip
        (line,) = (line for line in lines if f"{name} {side}x{side}x64" in line)
        assert mebibytes in line and message in line
    assert lines[-1].startswith("6 cells on ")
    assert not list(tmp_path.iterdir())


def test_oversized_case_is_an_oom_row_and_runs_only_if_requested(tmp_path: Path) -> None:
    large = Sweep(
        "q?", "e", axes={"grid": (128,)}, fixed={"name": "full", "dim": 8, "num_heads": 2, "impl": "reference"},
        stopping=QUICK,
    )  # fmt: skip
    launcher = Launcher(Settings(results=tmp_path))
    launcher.devices[0].available = 2 << 30
    launcher.folder.mkdir()
    (launcher.folder / "peaks.csv").write_text(PEAKS)
    list(launcher.run({"refused": large, "asked": replace(large, oversized=True)}))
    table = load(*launcher.report.files).set_index("sweep")
    assert set(table["status"]) == {"oom"}
    assert table.loc["refused", "reason"] == "predicted: needs 4.0 GiB, 2.0 GiB are free"
    assert "allocate memory" in table.loc["asked", "reason"]
    assert (table["memory_predicted_bytes"] > 4 << 30).all() and (table["macs_counted"] > 0).all()


def run_all(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of run_all.py in a new process."""
    return subprocess.run(
        [sys.executable, "run_all.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A smoke run of everything, with a plugin."""
    results = tmp_path_factory.mktemp("smoke")
    return results, run_all("--device", "cpu", "--smoke", "--results", results, "--plugin", PLAIN)


def test_a_sweep_runs_to_its_report(tmp_path: Path) -> None:
    without_peaks(Launcher(Settings(results=tmp_path)))
    done = run_all("--device", "cpu", "--smoke", "--only", "topk", "--timeout", "60", "--results", tmp_path)
    assert done.returncode == 0 and set(tables(tmp_path)["topk"]["status"]) == {"ok"}, done.stderr
    assert Path(done.stdout.splitlines()[-1].removeprefix("Report: ")).name == "report.html"


def tables(results: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: load(path) for path in sorted(results.glob("*/*.csv")) if path.stem != "peaks"}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_smoke_run_measures_everything(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results, run = smoke
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    result = tables(results)
    assert set(result) == set(SWEEPS)
    load_plugin(PLAIN)
    for name, table in result.items():
        expected = {case.key(name, "d")[:-1] for case in SWEEPS[name].cases("cpu", smoke=True)}
        assert len(table) == len(expected) and not table.duplicated(list(KEY)).any()
        assert set(table["status"]) <= {"ok", "predicted"}, table["reason"].dropna().unique()
        assert table["macs_agree"].dropna().all()
    assert (result["resolution"]["status"] == "ok").any() and "plain" in set(result["resolution"]["name"])


def test_a_summary_begins_with_counts_that_disagree(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = load(*smoke[0].glob("*/[!p]*.csv"))
    whole = findings(rows)
    rows.loc[rows["name"] == "plain", "macs_agree"] = False
    assert findings(rows)[1:] == whole and re.search(r"disagree in \d+ cells .*: plain\.", findings(rows)[0])


def test_a_smoke_run_ends_with_a_summary(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results, run = smoke
    lines = run.stdout.splitlines()
    cells = sum(map(len, tables(results).values()))
    ok = sum((table["status"] == "ok").sum() for table in tables(results).values())
    assert any(line.startswith(f"Cells: {ok} ok, {cells - ok} predicted.") for line in lines)
    for name in SWEEPS:
        assert any(line.strip().endswith(f"/{name}.csv") for line in lines)
    result = [line.strip().removeprefix("- ") for line in lines if line.startswith("  - ")]
    assert result == findings(load(*results.glob("*/[!p]*.csv"))) and len(result) == 3
    assert f"[{cells}/{cells}, " in run.stderr
    assert Path(lines[-1].removeprefix("Report: ")).read_text().startswith("<!doctype html>")


def test_predicted_memory_is_that_of_the_smoke_run(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    for name, table in tables(smoke[0]).items():
        measured = table[(table["status"] == "ok") & (table["kind"] == "attention")]
        off = (measured["memory_predicted_bytes"] / measured["memory_peak_bytes"] - 1).abs()
        assert (off <= 0.02).all(), (name, measured.loc[off > 0.02, "name"].tolist())


def test_a_second_smoke_run_changes_nothing(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results, _ = smoke
    before = contents(results)
    again = run_all("--device", "cpu", "--smoke", "--results", results, "--plugin", PLAIN)
    assert again.returncode == 0 and "Cells: nothing new; " in again.stdout
    assert contents(results) == before


def test_run_compared_with_itself_has_no_change(
    smoke: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = str(smoke[0])
    assert work_on_results(["compare", results, results]) == 0
    message = " ".join(capsys.readouterr().out.split())
    ok = sum((table["status"] == "ok").sum() for table in tables(smoke[0]).values())
    counts = re.search(r"0 FASTER, (\d+) SAME, 0 SLOWER, (\d+) UNCLEAR(?:, \d+ without .*?)?; 0 with a worse", message)
    # A few samples of a smoke run may scatter too much to say that nothing changed.
    assert counts and int(counts[1]) + int(counts[2]) == ok
    assert f" {ok} were measured by one process on a side" in message
