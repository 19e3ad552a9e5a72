"""The recommendation: what fits, known latencies and no others, and why the rest does not fit."""

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import profiling.__main__ as profiler
from ablations.__main__ import main
from ablations.analysis import recommend_page
from ablations.analysis.candidates import Candidate, candidates, command
from ablations.analysis.latency_lookup import Latency, LatencyLookup
from ablations.analysis.recommend import Answer, Device, Limits, Question, rank
from ablations.analysis.units import BYTES, MILLISECONDS, amount, in_words
from ablations.capability.sweep import discover as capability_sweeps
from ablations.cli import run_all as run_all
from ablations.harness.sweep import discover
from attention_zoo import InvalidOption, load_plugin, names
from profiling.cases.case import Case, available_impls
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, static_analysis
from profiling.execution.static_analysis import analyze_batch
from profiling.schema.row import load, validate

ROOT = Path(__file__).resolve().parents[2]
FAULTS, PLAIN = (ROOT / "tests" / "plugins" / name for name in ("faults.py", "plain.py"))


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    subprocess_runner.start()


def row(case: Case, ms: float | None, **changes: Any) -> dict[str, Any]:
    """A row of a case that took ``ms``, or failed."""
    times = {"status": "ok", "latency_p50_ms": ms} if ms else {"status": "oom", "reason": "too large"}
    return case.key_columns("resolution", "Paper CPU") | {"impl": case.impl} | times | changes


def case(side: int = 14, name: str = "full", impl: str = "reference", **changes: Any) -> Case:
    return Case(name, changes.pop("height", side), changes.pop("width", side), impl=impl, **changes)


def measured(*rows: dict[str, Any]) -> LatencyLookup:
    return LatencyLookup(validate(list(rows)))


@pytest.mark.parametrize(
    ("text", "units", "expected"),
    [
        ("8GiB", BYTES, 8 * 2**30), ("1.5 MiB", BYTES, 1.5 * 2**20), (".5kib", BYTES, 512), ("2TiB", BYTES, 2**41),
        ("4096bytes", BYTES, 4096), ("5ms", MILLISECONDS, 5), ("2 s", MILLISECONDS, 2000),
        ("250us", MILLISECONDS, 0.25),
    ],
)  # fmt: skip
def test_amounts_with_units(text: str, units: dict[str, float], expected: float) -> None:
    assert amount(text, units) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["8", "8GB", "8MB", "GiB", "", "-1GiB", "0GiB", "nanGiB", "1e9GiB", "٣GiB", "9" * 400 + "GiB"]
)
def test_an_amount_without_a_valid_unit_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"valid: a number and one of bytes, KiB, MiB, GiB, TiB, such as 8GiB"):
        amount(text, BYTES)


@pytest.mark.parametrize(
    ("size", "words"),
    [(512, "0.5 KiB"), (2**20, "1 MiB"), (999 * 2**20, "999 MiB"), (1.234 * 2**30, "1.23 GiB"), (2**43, "8 TiB"),
     (2**55, "32,768 TiB")],
)  # fmt: skip
def test_sizes_in_words(size: float, words: str) -> None:
    assert in_words(size) == words


def test_a_measured_cell_is_its_middle_process() -> None:
    rows = [row(case(replicate=replicate), ms) for replicate, ms in enumerate((9.0, 1.0, 4.0))]
    assert measured(*rows).latency(case()) == Latency(4.0, "measured", ((14, 14),))


def test_a_cell_that_kept_freed_memory_is_taken_before_one_that_returned_it() -> None:
    returned = [row(case(side), 9.0) | {"sweep": "other", "freed_memory": "returned"} for side in (14, 28)]
    result = measured(row(case(), 4.0) | {"freed_memory": "kept"}, *returned)
    assert (result.latency(case()).ms, result.latency(case(28)).ms) == (4.0, 9.0)


def test_of_several_sweeps_the_least_disturbed_is_taken() -> None:
    quiet = row(case(), 4.0) | {"sweep": "precision"}
    assert measured(row(case(), 7.0), quiet, row(case(28), 9.0)).latency(case()).ms == 4.0


def test_between_grids_latency_follows_the_power_law_through_them() -> None:
    # 3 us per token to the power 1.5.
    result = measured(*(row(case(side), 0.003 * side**3) for side in (8, 16, 64, 128))).latency(case(32))
    assert result.ms == pytest.approx(0.003 * 32**3)
    assert (result.source, result.grids) == ("interpolated", ((16, 16), (64, 64)))


@pytest.mark.parametrize("side", [7, 65])
def test_nothing_is_extrapolated(side: int) -> None:
    rows = [row(case(8), 1.0), row(case(64), 2.0), row(case(128), None)]
    assert measured(*rows).latency(case(side)) == Latency(None, "outside", ((8, 8), (64, 64)))


@pytest.mark.parametrize(
    "other",
    [
        {"impl": "sdpa"}, {"mode": "forward_backward"}, {"dtype": "bf16"}, {"device": "cuda"}, {"batch": 2},
        {"dim": 32}, {"num_heads": 4}, {"compiled": True}, {"deterministic": True}, {"name": "linear"},
        {"kind": "block"}, {"options": (("qkv_bias", True),)}, {"height": 28, "width": 7},
    ],
)  # fmt: skip
def test_the_latency_of_another_computation_is_not_taken(other: dict[str, Any]) -> None:
    assert measured(row(case(**other), 1.0)).latency(case()) == Latency()


def test_grids_of_one_shape_are_interpolated_between() -> None:
    rows = [row(case(height=8, width=16), 1.0), row(case(height=32, width=64), 16.0), row(case(16), 99.0)]
    result = measured(*rows).latency(case(height=16, width=32))
    assert result.ms == pytest.approx(4.0) and result.grids == ((8, 16), (32, 64))


def bra(**options: Any) -> Case:
    return case(name="bra", options=tuple(sorted(options.items())))


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ({"auto_pad": True}, {}),
        ({"kv_per_win": 2}, {"kv_downsample_ratio": 8}),
        ({"kv_downsample_mode": "avgpool"}, {"kv_downsample_mode": "avgpool", "kv_per_win": 8}),
        ({"kv_downsample_mode": "ada_avgpool"}, {"kv_downsample_mode": "ada_avgpool", "kv_downsample_ratio": 1}),
    ],
)
def test_irrelevant_option_is_ignored_in_lookup(asked: dict[str, Any], stored: dict[str, Any]) -> None:
    assert measured(row(bra(**stored), 3.0)).latency(bra(**asked)).ms == 3.0


@pytest.mark.parametrize(
    "stored",
    [{"topk": 2}, {"n_win": 14}, {"kv_downsample_mode": "avgpool"}, {"side_dwconv": 5}, {"qk_dim": 32}],
)
def test_relevant_option_is_not_ignored_in_lookup(stored: dict[str, Any]) -> None:
    assert measured(row(bra(**stored), 3.0)).latency(bra()).ms is None


def test_failure_is_reported_except_for_oom() -> None:
    bad = {"status": "incorrect", "reason": "output is off by 1", "latency_p50_ms": None}
    assert measured(row(case(), 1.0, **bad)).failure(case()) == "incorrect: output is off by 1"
    assert measured(row(case(), 1.0, **bad)).failure(case(28)) is None
    assert measured(row(case(), 1.0, **bad), row(case(replicate=1), 1.0)).failure(case()) is None
    assert measured(row(case(), None)).failure(case()) is None


def test_every_attention_and_implementation_is_a_candidate() -> None:
    load_plugin(PLAIN)
    result = list(candidates(case(56)))
    assert {(c.case.name, c.case.impl) for c in result} == {(n, impl) for n in names() for impl in available_impls(n)}
    assert "plain" in {c.case.name for c in result}
    assert len({c.case for c in result}) == len(result)
    changed = {c.changed for c in result if c.case.name == "bra"}
    assert {(), (("topk", 1),), (("topk", 16),), (("n_win", 8),), (("n_win", 16),), (("n_win", "auto"),)} <= changed
    assert (("kv_downsample_mode", "avgpool"),) in changed
    assert (("window_size", 14),) in {c.changed for c in result if c.case.name == "plain"}


def test_batch_analysis_equals_single_analysis_and_isolates_a_crash(compiler: None) -> None:
    plugins = (str(FAULTS),)
    load_plugin(FAULTS)
    sizes = [case(name="full"), case(name="full", impl="sdpa"), case(name="fault_crash_on_shapes"), bra(n_win=5)]
    flex_cases = [case(name="neighborhood", impl="flex", mode=mode) for mode in ("forward", "forward_backward")]
    full, sdpa, crash, refused, flex, trained = analyze_batch([Job(c, plugins) for c in [*sizes, *flex_cases]])
    assert full.value == static_analysis(Job(sizes[0])) and sdpa.value == static_analysis(Job(sizes[1]))
    assert (crash.status, crash.reason) == ("crash", "killed by SIGSEGV")
    assert refused.reason.startswith("InvalidOption: n_win=5 does not divide the 14 x 14 grid")
    assert flex.status == "ok" and flex.value["memory_predicted_bytes"] is None
    assert trained.status == "unsupported" and "no backward pass on cpu" in trained.reason


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON answer at 16 x 16 within 2 MiB and 2 ms; full took 1 ms, window 3 ms, axial crashed."""
    folder = tmp_path_factory.mktemp("results") / "paper"
    folder.mkdir()
    fixed = {"dim": 16, "num_heads": 2}
    windows = (("window_size", 7),)
    rows = [
        row(case(16, **fixed), 1.0), row(case(16, name="window", options=windows, **fixed), 3.0),
        row(case(16, name="axial", **fixed), 1.0, status="crash", reason="killed by SIGSEGV", latency_p50_ms=None),
        row(case(8, name="linear", **fixed), 0.375), row(case(32, name="linear", **fixed), 6.0),
    ]  # fmt: skip
    validate(rows).to_csv(folder / "resolution.csv", index=False)
    words = ["recommend", "--height", "16", "--width", "16", "--dim", "16", "--memory", "2MiB", "--latency", "2ms"]
    words += ["--results", str(folder.parent), "--device", "paper", "--plugin", str(PLAIN), "--json"]
    run = subprocess.run([sys.executable, "-m", "ablations", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    return json.loads(run.stdout), folder


def group(result: dict[str, Any], name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(e["attention"], e["impl"], json.dumps(e["options"])): e for e in result[name]}


@pytest.mark.slow
def test_fitting_candidates_are_ranked_by_latency(answered: tuple[dict[str, Any], Path]) -> None:
    result = answered[0]
    assert result["asked"]["device_name"] == "Paper CPU" and result["asked"]["memory_bytes"] == 2**21
    fits = [(e["attention"], e["impl"], e["latency_ms"], e["latency_source"]) for e in result["fits"]]
    assert fits == [("full", "reference", 1.0, "measured"), ("linear", "reference", pytest.approx(1.5), "interpolated")]
    assert result["fits"][1]["latency_grids"] == [[8, 8], [32, 32]]


def test_refused_candidates_have_a_reason(answered: tuple[dict[str, Any], Path]) -> None:
    refused = answered[0]["does_not_fit"]
    why = {(e["attention"], e["impl"]): e["why_not"] for e in refused if e["latency_ms"] or e["attention"] == "axial"}
    assert why[("window", "reference")] == "takes 3 ms (measured)"
    assert why[("axial", "reference")] == "crash: killed by SIGSEGV"
    needs = [e for e in refused if e["why_not"].startswith("needs ")]
    assert needs and all(e["memory_predicted_bytes"] > 2**21 for e in needs)
    assert all(e["why_not"] for e in refused)


def test_untimed_candidates_are_listed_with_their_command(
    compiler: None, answered: tuple[dict[str, Any], Path]
) -> None:
    unknown = answered[0]["unknown"]
    assert [e["macs"] for e in unknown] == sorted(e["macs"] for e in unknown)
    predicted = [e for e in unknown if e["memory_predicted_bytes"] is not None]
    assert all(e["latency_ms"] is None and e["memory_predicted_bytes"] <= 2**21 for e in predicted)
    # FlexAttention compiles itself, so that its memory is not predicted.
    assert {e["impl"] for e in unknown if e not in predicted} == {"flex"}
    assert {e["attention"] for e in unknown} >= {"plain", "bra", "pseudo_conv"}
    for entry in unknown:
        words = shlex.split(entry["measure_with"])[3:]
        parser, declared = profiler._parser(words)
        args = parser.parse_args(words)
        meant = profiler._case(args, {name: getattr(args, name) for name in declared if hasattr(args, name)})
        assert (meant.name, meant.impl, meant.shape()) == (entry["attention"], entry["impl"], (1, 16, 16, 16))
        assert {n: v for n, v in meant.all_options().items() if n in entry["options"]} == entry["options"] | {
            n: v for n, v in meant.options
        }


def test_predictions_equal_the_static_analysis(answered: tuple[dict[str, Any], Path]) -> None:
    result = answered[0]
    entries = [e for name in ("fits", "unknown") for e in result[name] if e["attention"] in ("bra", "full", "quadtree")]
    assert len(entries) > 5
    for entry in entries[::4]:
        options = tuple(sorted(entry["options"].items()))
        columns = static_analysis(Job(case(16, entry["attention"], entry["impl"], options=options, dim=16)))
        assert entry["memory_predicted_bytes"] == columns["memory_predicted_bytes"]
        assert entry["macs"] == columns["macs_counted"]
        side = columns["regions_per_side"]
        assert entry["padded"] == bool(side and 16 % side)


def test_every_candidate_is_in_the_answer_once(answered: tuple[dict[str, Any], Path]) -> None:
    load_plugin(PLAIN)
    result = answered[0]
    groups = [group(result, name) for name in ("fits", "unknown", "does_not_fit")]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(list(candidates(case(16, dim=16))))


def test_candidates_have_options_that_go_together() -> None:
    tried = {one.changed for one in candidates(case(56, dim=64, num_heads=2)) if one.case.name == "neighborhood"}
    assert tried == {(), (("kernel_size", 13),), (("stride", 2),), (("stride", 4),)}
    with pytest.raises(InvalidOption, match="stride=8"):
        case(56, "neighborhood", dim=64, num_heads=2, options=(("stride", 8),)).module()


def candidate(name: str, *, ms: float | None = None, why: str = "", **changes: Any) -> Candidate:
    latency = Latency(ms, "measured", ((56, 56),)) if ms else Latency(None, "outside", ((8, 8), (28, 28)))
    numbers = {"memory": 3 * 2**20, "macs": 10**9} | changes
    return Candidate(case(56, name), latency=latency, why_not=why, **numbers)


def test_rank_is_latency_then_macs_then_memory() -> None:
    fast, slow = candidate("full", ms=1.0, macs=9), candidate("full", ms=2.0, macs=1)
    small, light, large = (candidate("bra", macs=m, memory=b) for m, b in ((5, 7), (5, 9), (6, 1)))
    assert sorted([large, light, small, slow, fast], key=rank) == [fast, slow, small, light, large]


LONG = Candidate(
    Case("spatially_separable", 56, 56, impl="reference", options=(("window_size", 14),), mode="forward_backward"),
    (("kv_downsample_mode", "ada_avgpool"),), True, 2**40, 123_456_789_012,
    Latency(123.4, "interpolated", ((112, 112), (256, 256))),
)  # fmt: skip
ANSWER = Answer(
    [LONG, candidate("full", ms=1.0)],
    [candidate("neighborhood"), candidate("window")],
    [candidate("lepe", why="needs 16 GiB [/red]"), candidate("linear", why="word " * 30)],
)
ASKED = Question(case(56), Limits(2**33, 5.0), Device("cpu", "Paper [CPU]", load()), ("/a/long/path/" * 6,))


def shown(answer: Answer = ANSWER, top: int = 10, **settings: Any) -> str:
    out = io.StringIO()
    recommend_page.show(answer, ASKED, Console(file=out, width=80, **settings), top)
    return out.getvalue()


def test_the_page_fits_a_terminal_and_is_plain_in_a_pipe() -> None:
    page = shown()
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80
    words = " ".join(page.split())
    for message in (
        "56 x 56 tokens, dim 64, 2 heads, forward, fp32: 2 of 6 candidates fit 8 GiB and 5 ms.",
        "spatially_separable reference 1 TiB 123 G 123 112..256",
        "full reference 3 MiB 1 G 1 measured",
        "neighborhood reference 3 MiB 1 G - > 28",
        "--attention window --height 56",
        "lepe reference needs 16 GiB [/red]",
        "Paper [CPU]",
        "n_win does not divide the grid",
    ):
        assert message in words


def test_a_long_option_is_broken_after_its_name() -> None:
    page = io.StringIO()
    long = Answer([replace(LONG, changed=(("kv_downsample_mode", "fracpool"),))], [], [])
    recommend_page.show(long, replace(ASKED, needs=("recall",)), Console(file=page, width=80), 1)
    assert "kv_downsample_mode= " in page.getvalue() and re.search(r"^fracpool", page.getvalue(), re.MULTILINE)


def test_a_page_shows_the_top_and_counts_the_rest() -> None:
    page = shown(top=1)
    assert page.count("... and 1 more: --top N shows more, --json all") == 2
    assert "--attention neighborhood" in page and "--attention window" not in page


@pytest.mark.parametrize("color", [True, False])
def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, color: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown(force_terminal=True))) is False
    assert "\x1b[1m" in shown(force_terminal=True)


def test_a_command_can_be_pasted_over_several_lines(tmp_path: Path) -> None:
    plugin = tmp_path / "my file.py"
    plugin.write_text(PLAIN.read_text())
    load_plugin(plugin)
    unmodified = case(56, "plain", options=(("window_size", 14),), mode="forward_backward")
    words = command(unmodified, ("/another.py", str(plugin)))
    folded = recommend_page._folded(words)
    assert shlex.split(folded.replace("\\\n", " ")) == shlex.split(" ".join(words))
    assert f"--plugin '{plugin}'" in folded and "another.py" not in folded and folded.count("\\\n") >= 1
    assert "--mode forward_backward" in folded and "--window-size 14" in folded
    assert "--plugin" not in " ".join(command(LONG.case, (str(plugin),)))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    try:
        status = main(list(words))
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    message = capsys.readouterr()
    assert status == 2 and message.out == "" and re.fullmatch(r"error: [^\n]+\n", message.err)
    return message.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: --height, --width, --memory"),
        ("--height 8 --width 8", "required: --memory"),
        ("--height 8 --width x --memory 1GiB", "--width: 'x' is not an integer"),
        ("--height 0 --width 8 --memory 1GiB", "height=0 is not valid; valid: an integer from 1 to 65536"),
        ("--height 8 --width 8 --memory 8GB", "'8GB' is not valid; valid: .* bytes, KiB, MiB, GiB, TiB, such as 8GiB"),
        ("--height 8 --width 8 --memory 8GiB --latency 5", "'5' is not valid; valid: .* us, ms, s, such as 8ms"),
        (
            "--height 8 --width 8 --memory 8GiB --dim 63",
            "dim=63 is not divisible by num_heads=2; valid num_heads: 1, 3",
        ),
        ("--height 8 --width 8 --memory 8GiB --mode train", "invalid choice: 'train' .*forward.*forward_backward"),
        ("--height 8 --width 8 --memory 8GiB --dtype fp8", "invalid choice: 'fp8' .*fp64.*fp16"),
        ("--height 8 --width 8 --memory 8GiB --device tpu", "'tpu' is not valid; valid: cpu, cuda, auto, .*intel-"),
        ("--height 8 --width 8 --memory 8GiB --results none", "--results none: no such folder"),
        ("--height 8 --width 8 --memory 8GiB --plugin none.py", "none.py: not a Python file"),
        ("--height 8 --width 8 --memory 8GiB --top 0", "--top 0 is not valid; valid: an integer >= 1"),
        ("--height 8 --width 8 --memory 8GiB --fast", "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert re.search(message, refused(capsys, "recommend", *words.split()))


def test_it_works_without_results_for_a_gpu_that_is_not_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    few = [c for c in candidates(case()) if c.case.name in ("full", "pseudo_conv")]
    monkeypatch.setattr("ablations.analysis.recommend.candidates", lambda size: iter(few))
    assert main(["recommend", "--height", "14", "--width", "14", "--memory", "8GiB", "--device", "cuda"]) == 0
    message = capsys.readouterr()
    assert message.err == "" and "No cuda device is here: predicted only." in " ".join(message.out.split())
    assert [line.split()[0] for line in message.out.splitlines() if " KiB " in line] == ["pseudo_conv", "full", "full"]
    assert main(["recommend", "--height", "14", "--width", "14", "--memory", "8KiB", "--device", "cuda"]) == 1


@pytest.mark.parametrize("which", ["recommend", "table", "compare"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], which: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([which, "--help"])
    message = capsys.readouterr().out
    assert leaving.value.code == 0 and "examples:" in message and f"python -m ablations {which}" in message
    assert max(map(len, message.splitlines())) <= 80


def test_the_comparison_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    interval = {"latency_low_ms": 0.9, "latency_high_ms": 1.1}
    slow = {"latency_low_ms": 1.9, "latency_high_ms": 2.1}
    for name, rows in {
        "a": [row(case(), 1.0, **interval), row(case(28), None), row(case(56), 1.0, **interval)],
        "b": [row(case(), 2.0, **slow), row(case(28), None)],
    }.items():
        validate(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    assert main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["worse"] is True and len(result["only_in_a"]) == 1 and result["only_in_b"] == []
    assert [(c["verdict"], c["ratio"]) for c in result["cells"]] == [("SLOWER", 2.0), ("", None)]


def test_sweeps_and_plans_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_all.main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {entry["sweep"]: entry["question"] for entry in listed} == {
        name: sweep.question for name, sweep in (discover() | capability_sweeps()).items()
    }
    words = ["--dry-run", "--smoke", "--only", "kv_downsample", "--device", "cpu", "--results", str(tmp_path), "--json"]
    assert run_all.main(words) == 0
    message = capsys.readouterr()
    cells = json.loads(message.out)["cells"]
    assert message.err == "" and not list(tmp_path.iterdir())
    assert len(cells) == 7 and all(cell["memory_predicted_bytes"] > 0 and cell["will"] == "measure" for cell in cells)
    assert run_all.main(["--json"]) == 2
    assert "--json is for --list and --dry-run" in capsys.readouterr().err
