"""A visit to a GPU in parts, run on a CPU, and the static analysis file that it uses."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ablations.__main__ import main
from ablations.gpu_visit import parts
from ablations.gpu_visit import visit as gpu_visit
from ablations.gpu_visit.parts import Failed, Visit
from ablations.gpu_visit.visit import PARTS, Part
from ablations.harness import cell_runner, local_runner, static_analysis_cache
from ablations.harness.devices import Device
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.sweep import Sweep, discover, select
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, static_analysis
from profiling.meters.latency import QUICK
from profiling.schema.row import load

ROOT = Path(__file__).resolve().parents[2]
PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
TINY = Sweep(
    "q?", "e", axes={"name": ("full", "window"), "grid": (4, 8)}, fixed={"dim": 8, "impl": "reference"}, stopping=QUICK
)


@pytest.fixture(autouse=True)
def caches_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


# Static analysis


def test_static_analysis_is_saved_and_loaded_for_every_replicate(tmp_path: Path) -> None:
    subprocess_runner.start()
    cases = TINY.cases("cuda")
    known = static_analysis_cache.counted([Job(case) for case in cases], 60.0, {})
    assert list(known) != [] and set(known) == set(cases)
    static_analysis_cache.save(tmp_path / "static_analysis.json", known)
    again = [replace(case, replicate=2) for case in cases[1:]]
    result = static_analysis_cache.load(tmp_path / "static_analysis.json", [*again, Case("full", 5, 5, device="cuda")])
    assert result.keys() == set(cases[1:])
    for case in cases[1:]:
        assert result[case].value == static_analysis(Job(case))


def test_static_analysis_of_other_code_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("full", 4, 4)
    static_analysis_cache.save(
        tmp_path / "static_analysis.json", {case: subprocess_runner.Outcome("ok", {"params": 1})}
    )
    assert static_analysis_cache.load(tmp_path / "static_analysis.json", [case])
    monkeypatch.setattr(static_analysis_cache, "code", lambda: "another")
    assert not static_analysis_cache.load(tmp_path / "static_analysis.json", [case])
    (tmp_path / "static_analysis.json").write_text("[]")
    with pytest.raises(InvalidOption, match="holds no static analysis"):
        static_analysis_cache.load(tmp_path / "static_analysis.json", [case])


def test_static_analysis_for_a_gpu_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "static_analysis.json"
    small = replace(select("models")["models"], on_cuda=[{"grid": (224,), "name": ("biformer_stl",), "batch": (128,)}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ablations.__main__.select", lambda only: {"models": small})
        assert main(["prepare", "--device", "cuda", "--out", str(file)]) == 0
    assert "the static analysis of 1 cases; 0 could not be counted" in capsys.readouterr().out
    (value,) = json.loads(file.read_text())["cases"].values()
    assert value["macs_counted"] == pytest.approx(128 * 4.6e9, rel=0.02) and value["memory_predicted_bytes"] > 2**30


@pytest.mark.parametrize("carried", [False, True])
def test_on_a_gpu_nothing_is_counted_once_a_cell_is_timed(
    carried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess_runner.start()
    cases, file = TINY.cases("cuda"), tmp_path / "static_analysis.json"
    if carried:
        static_analysis_cache.save(file, static_analysis_cache.counted([Job(case) for case in cases], 60.0, {}))
    events: list[Any] = []
    counted = static_analysis_cache.counted
    monkeypatch.setattr(static_analysis_cache, "counted", lambda jobs, *a: events.append("count") or counted(jobs, *a))
    monkeypatch.setattr(
        cell_runner.subprocess_runner, "call_each", lambda *a, **k: pytest.fail("counted anew")
    ) if carried else None

    def timed(cell: Any, row: dict[str, Any], *_: Any) -> dict[str, Any]:
        events.append(cell.case)
        return row | {"status": "ok", "latency_p50_ms": 1.0}

    monkeypatch.setattr(local_runner, "run", timed)
    facts = environment.describe("cpu") | {"device_name": "Paper GPU"}
    (tmp_path / "paper-gpu").mkdir()
    (tmp_path / "paper-gpu" / "peaks.csv").write_text(PEAKS)
    settings = Settings("cuda", tmp_path, static_analysis=file if carried else None)
    launcher = Launcher(settings, [Device(facts, 1 << 34, "GPU-paper", at_once=2)])
    list(launcher.run({"tiny": TINY}))
    assert events[: not carried] == ["count"] * (not carried) and set(events[not carried :]) == set(cases)
    assert load(tmp_path / "paper-gpu" / "tiny.csv")["macs_counted"].gt(0).all()


# The visit


def test_number_of_cells_of_a_visit_is_bounded() -> None:
    sized = {name: replace(sweep, replicates=1) for name, sweep in discover().items()}
    cells = [c for name in ("bra_speed", *parts.SWEEPS.split(",")) for c in sized[name].cases("cuda")]
    measured = [case for name, sweep in sized.items() for case in sweep.cases("cuda") if sweep.measured(case)]
    assert sum(case in set(cells) for case in measured) <= 800
    first = [case for sweep in parts._headline().values() for case in replace(sweep, replicates=1).cases("cuda")]
    last = [case for sweep in parts._compiled().values() for case in replace(sweep, replicates=1).cases("cuda")]
    assert [*first, *last] == sized["bra_speed"].cases("cuda") and 0 < len(last) < 20


def visit(folder: Path, *arguments: str) -> int:
    return main(["gpu_visit", "--device", "cpu", "--out", str(folder), "--minutes", "5", *arguments])


@pytest.fixture
def fake_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that do nothing but succeed; returns their names as they are run."""
    ran: list[str] = []

    def run(name: str) -> Any:
        return lambda visit, seconds: ran.append(name) or "fine"

    for name, part in list(PARTS.items()):
        monkeypatch.setitem(PARTS, name, part._replace(run=run(name)))
    return ran


def test_every_part_is_logged_and_not_repeated(
    tmp_path: Path, fake_parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visit(tmp_path) == 0 and fake_parts == list(PARTS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(PARTS) and all(": fine [" in line for line in lines)
    with tarfile.open(tmp_path / "visit.tar.gz") as tar:
        assert {f"log/{name}.txt" for name in PARTS} <= set(tar.getnames())
    assert visit(tmp_path) == 0 and fake_parts == list(PARTS)
    assert visit(tmp_path, "--parts", "tiles,kernels,preflight") == 0
    assert fake_parts[len(PARTS) :] == ["preflight", "tiles", "kernels"]


@pytest.mark.parametrize(("name", "stops"), [("correctness", True), ("headline", False)])
def test_only_a_deciding_part_stops_the_visit_on_failure(
    name: str, stops: bool, tmp_path: Path, fake_parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(visit: Visit, seconds: float) -> str:
        raise Failed("3 failed, 4 passed")

    monkeypatch.setitem(PARTS, name, PARTS[name]._replace(run=fail))
    assert visit(tmp_path) == 1
    assert fake_parts == (list(PARTS)[:1] if stops else [other for other in PARTS if other != name])
    assert "3 failed, 4 passed" in (tmp_path / "log" / f"{name}.txt").read_text()


def test_part_ends_at_its_time_limit(
    tmp_path: Path, fake_parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(visit: Visit, seconds: float) -> str:
        visit.say("as far as this")
        time.sleep(600)
        return "never"

    monkeypatch.setattr(gpu_visit, "LEAST", 0.0)
    monkeypatch.setattr(gpu_visit, "GRACE", 0.0)
    monkeypatch.setitem(PARTS, "warm", Part(hang, 0.2))
    assert visit(tmp_path) == 0 and fake_parts == [name for name in PARTS if name != "warm"]
    assert "warm: stopped at its time limit" in capsys.readouterr().out
    assert "as far as this" in (tmp_path / "log" / "warm.txt").read_text()
    assert "warm" not in (tmp_path / "done").read_text()


def test_results_are_packed_while_a_part_runs(
    tmp_path: Path, fake_parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed() -> bytes:
        with contextlib.suppress(FileNotFoundError, KeyError), tarfile.open(tmp_path / "visit.tar.gz") as tar:
            log = tar.extractfile("log/warm.txt")
            return log.read() if log else b""
        return b""

    def wait(visit: Visit, seconds: float) -> str:
        visit.say("as far as this")
        until = time.monotonic() + 60
        while b"as far as this" not in packed():
            if time.monotonic() > until:
                return "never"
            time.sleep(0.01)
        return "packed"

    monkeypatch.setattr(gpu_visit, "EVERY", 0.05)
    monkeypatch.setitem(PARTS, "warm", Part(wait, 90))
    assert visit(tmp_path, "--parts", "warm") == 0
    assert (tmp_path / "log" / "warm.txt").read_text().endswith(" packed\n")


def test_tool_may_report_at_the_time_limit(tmp_path: Path) -> None:
    tool = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('1 failed')"
    with (tmp_path / "log.txt").open("w") as log:
        assert parts._python(Visit(tmp_path, log=log), 6.0, "-c", tool) == -1
    assert (tmp_path / "log.txt").read_text().endswith("1 failed\n")


def test_stale_static_analysis_fails_the_preflight(tmp_path: Path) -> None:
    file = tmp_path / "static_analysis.json"
    file.write_text(json.dumps({"code": "another", "cases": {}}))
    with pytest.raises(Failed, match="has no case of this code on cpu: prepare it anew"):
        parts.preflight(Visit(tmp_path, "cpu", file), 60.0)


def test_unknown_part_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visit(tmp_path, "--parts", "headline,none") == 2
    assert "there is no 'none'; valid: preflight, correctness" in capsys.readouterr().err


def test_kernels_of_layers_models_and_flex_are_compiled_first() -> None:
    cases = parts._kernel_cases("cuda")
    kinds = {(case.kind, case.impl) for case in cases}
    assert kinds == {("attention", "triton"), ("model", "auto"), ("attention", "flex")}
    assert not any(case.cuda_graph for case in cases)


def test_compiled_kernels_are_packed_and_restored(tmp_path: Path, fake_parts: list[str]) -> None:
    here = tmp_path / "here"
    (here / "cache" / "triton" / "k").mkdir(parents=True)
    for name in ("a.cubin", "a.json", "a.ttir"):
        (here / "cache" / "triton" / "k" / name).write_text(name)
    assert visit(here, "--parts", "warm", "--keep-caches", "--take", str(tmp_path)) == 0
    packed, there = tmp_path / "caches.tar.gz", tmp_path / "there"
    assert visit(there, "--parts", "warm", "--caches", str(packed)) == 0
    assert sorted(path.name for path in (there / "cache").rglob("a.*")) == ["a.cubin", "a.json"]
    with tarfile.open(tmp_path / "visit.tar.gz") as tar:
        assert not [name for name in tar.getnames() if "cache" in name]


@pytest.mark.slow
def test_visit_on_a_cpu_runs_the_same_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ablations", "gpu_visit", "--device", "cpu", "--minutes", "20", "--out", tmp_path,
         "--parts", "preflight,correctness,headline,kernels", "--tests", "tests/test_layering.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    message = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert "passed" in message["correctness"] and message["kernels"].startswith("skipped: it needs a GPU")
    (path,) = tmp_path.glob("results/*/bra_speed.csv")
    expected = len(replace(discover()["bra_speed"], replicates=1).cases("cpu", smoke=True))
    assert set(load(path)["status"]) == {"ok"} and len(load(path)) == expected
    assert message["headline"].startswith(f"{expected} ok; 0 were there, 0 left")


@pytest.mark.slow
def test_visit_ended_by_sigterm_packs_its_results(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ablations", "gpu_visit", "--device", "cpu", "--minutes", "20", "--out", tmp_path,
         "--parts", "preflight,headline,sweeps"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline().startswith("preflight: ")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "visit.tar.gz") as tar:
        assert "log/preflight.txt" in tar.getnames()


def test_failures_of_a_part_are_grouped_by_kind(tmp_path: Path) -> None:
    rows: Sequence[dict[str, Any]] = [
        Case("full", side, 4).key_columns("s", "d") | {"status": "error", "reason": "no such kernel"} for side in (4, 5)
    ]
    store = parts.results_store.Store(tmp_path / "s.csv")
    for row in rows:
        store.append(row)
    assert parts._failures([store.path]) == ["2 x s: full auto: error: no such kernel"]
