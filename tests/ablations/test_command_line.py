"""The command lines: bad input gives one line and exit status 2, good input a page or JSON; never a traceback."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import profiling.__main__ as profiler
from ablations.__main__ import main as work_on_results
from ablations.cli import run_all
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import exclusive
from ablations.harness.sweep import discover
from attention_zoo import MODELS, InvalidOption, names, options
from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.cli import result_page
from profiling.cli.arguments import run_reporting
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, breakdown
from profiling.schema.row import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugins"
SMALL = ("--height", "8", "--width", "8", "--dim", "8", "--num-heads", "2", "--n-win", "2", "--topk", "1")
Main = Callable[[Sequence[str]], int]
MAINS: dict[str, Main] = {
    "profiling": profiler.main,
    "run_all": lambda arguments: run_all.main(list(arguments)),
    "ablations": work_on_results,
}


def outcome(main: Main, arguments: Sequence[str]) -> int:
    """The exit status, also if argparse raises SystemExit, as after --help."""
    try:
        return main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)


def refused(capsys: pytest.CaptureFixture[str], which: str, *arguments: str) -> str:
    """The one line on stderr that rejects a command line."""
    assert outcome(MAINS[which], arguments) == 2
    message = capsys.readouterr()
    assert message.out == "" and message.err.startswith("error: ") and message.err.endswith("\n")
    assert message.err.count("\n") == 1 and "Traceback" not in message.err
    return message.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("profiling", "--attention none", "unknown attention 'none'; valid: .*bra, .*full, .*window"),
        ("profiling", "--attention=", "unknown attention ''; valid: .*bra"),
        ("profiling", "--block none", "unknown attention 'none'; valid: .*bra"),
        ("profiling", "--model none", "unknown model 'none'; valid: biformer_tiny, .*biformer_stl"),
        ("profiling", "--model=", "unknown model ''; valid: biformer_tiny"),
        ("profiling", "--block window --attention bra", "--block NAME stands alone; valid with --attention: --model"),
        ("profiling", "--model biformer_tiny --attention full,none,bra,bra", "unknown attention 'none'; valid: .*bra"),
        ("profiling", "--model biformer_tiny --attention full,bra", "a model has four stages; name one or four"),
        ("profiling", "--window-size 7", "unrecognized arguments: --window-size 7; valid: .*--n-win, --topk"),
        (
            "profiling",
            "--attention window --topk 4",
            "unrecognized arguments: --topk 4; valid: .*--window-size, --shift",
        ),
        ("profiling", "--heigth 14", "unrecognized arguments: --heigth 14; valid: .*--height"),
        ("profiling", "bra", "unrecognized arguments: bra"),
        ("profiling", "--topk x", "--topk: topk='x' is not valid; valid: an integer >= 1"),
        ("profiling", "--topk 0", "--topk: topk='0' is not valid; valid: an integer >= 1"),
        ("profiling", "--kv-downsample-mode max", "'max' is not valid; valid: identity, avgpool, .*fracpool, conv"),
        ("profiling", "--auto-pad maybe", "'maybe' is not valid; valid: true, false"),
        ("profiling", "--topk 50", r"topk=50 exceeds the 49 regions of n_win=7; valid: 1 to 49"),
        ("profiling", "--dim 63", "dim=63 is not divisible by num_heads=2; valid num_heads: 1, 3, 7, 9, 21, 63"),
        ("profiling", "--height 55", "n_win=7 does not divide the 55 x 56 grid; pass auto_pad=True"),
        ("profiling", "--height 55 --mode forward_backward --json", "n_win=7 does not divide the 55 x 56 grid"),
        ("profiling", "--n-win auto --topk 4000 --height 14", "n_win='auto': no common divisor"),
        ("profiling", "--height 0", "height=0 is not valid; valid: an integer from 1 to 65536"),
        ("profiling", "--width -3", "width=-3 is not valid; valid: an integer from 1 to"),
        ("profiling", "--batch 99999999999999999999", "batch=9+ is not valid; valid: an integer from 1 to"),
        ("profiling", "--dim 0", "dim=0 is not valid; valid: an integer from 1 to"),
        ("profiling", "--seed 99999999999999999999", "seed=9+ is not valid; valid: an integer from 0 to"),
        ("profiling", "--height 1e3", "--height: '1e3' is not an integer"),
        ("profiling", "--height", "--height: expected one argument"),
        ("profiling", "--impl fast", "--impl: invalid choice: 'fast' .*auto.*reference"),
        ("profiling", "--attention pseudo_conv --impl sdpa", "--impl: invalid choice: 'sdpa' .*auto.*reference"),
        ("profiling", "--mode train", "--mode: invalid choice: 'train' .*forward.*forward_backward"),
        ("profiling", "--dtype fp8", "--dtype: invalid choice: 'fp8' .*fp64.*fp16"),
        ("profiling", "--device tpu", "--device: invalid choice: 'tpu' .*cpu.*cuda"),
        ("profiling", "--trace /dev/null/x", "--trace /dev/null/x: no permission to write there"),
        ("profiling", "--plugin none.py", "plugin .*none.py: not a Python file"),
        ("profiling", f"--plugin {'x' * 300}", "File name too long"),
        ("profiling", f"--plugin {PLUGINS / 'faults.py'} --attention fault_flags", "option 'mode' .* taken: .*--mode"),
        ("run_all", "--only none", "unknown sweep 'none'; valid: .*kv_downsample, .*models, .*resolution, .*topk"),
        ("run_all", "--only topk,none", "unknown sweep 'none'; valid: .*topk"),
        ("run_all", "--only=", "--only names no sweep; valid: .*topk"),
        ("run_all", "--device tpu", "--device: invalid choice: 'tpu' .*cpu.*cuda.*auto"),
        ("run_all", "--smok", "unrecognized arguments: --smok; valid: .*--smoke"),
        ("run_all", "topk", "unrecognized arguments: topk"),
        ("run_all", "--results /dev/null/x", "--results /dev/null/x: /dev/null is not a folder"),
        ("run_all", f"--results {'x' * 300}", "File name too long"),
        ("run_all", "--results /proc/x --only topk", "/proc/x"),
        ("run_all", "--plugin none.py --list", "plugin .*none.py: not a Python file"),
        ("run_all", "--gpus 0,x", "--gpus: '0,x' is not a list of numbers; valid: such as 0,2"),
        ("run_all", "--device cpu --gpus 0 --only stl", "--gpus chooses among GPUs, and this run is on a CPU"),
        ("run_all", "--launcher cloud", "--launcher: invalid choice: 'cloud' .*local.*slurm"),
        ("run_all", "--slurm partition=gpu", "--slurm is for --launcher slurm"),
        ("run_all", "--launcher slurm --slurm gpu", "--slurm: 'gpu' is not valid; valid: key=value"),
        ("run_all", "--launcher slurm --gpus 0", "--gpus, --minutes and --dry-run are for --launcher local"),
        ("run_all", "--minutes soon", "--minutes: 'soon' is not valid; valid: a number of minutes above 0"),
        ("run_all", "--minutes 0", "--minutes: '0' is not valid; valid: a number of minutes above 0"),
        ("run_all", "--launcher slurm --minutes 5", "--gpus, --minutes and --dry-run are for --launcher local"),
        ("run_all", "--launcher slurm --shards 0", "--shards: '0' is not valid; valid: an integer >= 1"),
        ("ablations", "", "COMMAND"),
        ("ablations", "contrast a b", "invalid choice: 'contrast' .*compare"),
        ("ablations", "compare a", "the following arguments are required: B"),
        ("ablations", "compare none.csv none.csv", "none.csv: no results there; give a results folder or a CSV"),
        ("ablations", f"compare {ROOT / 'README.md'} none", "README.md"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], which: str, arguments: str, message: str) -> None:
    assert re.search(message, refused(capsys, which, *arguments.split()))


@pytest.mark.parametrize("which", ["profiling", "run_all"])
def test_cuda_without_cuda(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    assert re.search("--device cuda: no CUDA device .*; valid here: cpu", refused(capsys, which, "--device", "cuda"))


PLUGIN = "from torch import nn\nfrom attention_zoo import register\n@register({name!r})\nclass Mine(nn.Module): pass\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('two\\nlines [/red]')\n", r"RuntimeError: two lines \[/red\]"),
        ("x = 1\n", "registers no attention; decorate a class with @register"),
        (PLUGIN.format(name="bra"), "'bra' is already registered; taken names: .*full"),
        ("", "registers no attention"),
    ],
)
@pytest.mark.parametrize("which", ["profiling", "run_all"])
def test_invalid_plugin_is_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, which: str, source: str, message: str
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(source)
    before = names()
    assert re.search(f"plugin {plugin}: .*{message}", refused(capsys, which, "--plugin", str(plugin)))
    assert names() == before


@pytest.mark.parametrize("content", [b"a,b\n1,2", b"", b"model,published_params\n"], ids=["torn", "empty", "foreign"])
@pytest.mark.parametrize("fresh", [False, True], ids=["", "fresh"])
def test_results_of_another_schema_are_unchanged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, fresh: bool
) -> None:
    folder = Launcher(Settings(results=tmp_path)).folder
    folder.mkdir()
    (folder / "kv_downsample.csv").write_text(",".join(COLUMNS) + "\n")
    (folder / "topk.csv").write_bytes(content or b"\x00")
    before = contents(tmp_path)
    flags = ["--fresh"] if fresh else []
    message = refused(
        capsys, "run_all", "--device", "cpu", "--only", "kv_downsample,topk", "--results", str(tmp_path), *flags
    )
    assert "topk.csv" in message
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) <= {str(folder / "run.lock")}


@pytest.mark.parametrize(
    "arguments",
    ["--only none", "--device tpu", "--plugin none.py", "--fresh --retry-failed --results", "--fresh --bogus"],
)
def test_bad_input_leaves_results_untouched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    folder = Launcher(Settings(results=tmp_path / "results")).folder
    folder.mkdir(parents=True)
    for name in discover():
        (folder / f"{name}.csv").write_text(",".join(COLUMNS) + "\n")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(capsys, "run_all", *arguments.split())
    assert contents(tmp_path) == before


def test_a_second_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = Launcher(Settings(results=tmp_path)).folder
    with exclusive(folder):
        message = refused(capsys, "run_all", "--device", "cpu", "--only", "topk", "--results", str(tmp_path))
    assert f"{folder} is in use by another run (process {os.getpid()}); wait for it to end" in message
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_interrupted_run_prints_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_reporting(interrupted) == 130
    assert capsys.readouterr().err.startswith("interrupted; finished cells are kept")


def test_a_results_folder_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        assert f"{file} is not a folder" in refused(capsys, "run_all", "--results", str(path))
    assert file.read_text() == "mine"


def test_unwritable_trace_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trace /proc/x: " in refused(capsys, "profiling", *SMALL, "--trace", "/proc/x")


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("profiling", ("--help",), "python -m profiling --attention bra --height 56"),
        ("profiling", ("--attention", "bra", "--help"), "options of bra:"),
        ("profiling", ("--attention", "window", "-h"), "--window-size"),
        ("profiling", ("--model", "biformer_tiny", "--help"), "options of bra inside the model"),
        ("profiling", ("--plugin", str(PLUGINS / "plain.py"), "--attention", "plain", "--help"), "options of plain:"),
        ("run_all", ("--help",), "python run_all.py --only resolution --dry-run"),
        ("ablations", ("--help",), "python -m ablations compare results/"),
        ("ablations", ("compare", "--help"), "python -m ablations compare results/"),
    ],
)
def test_help_helps(capsys: pytest.CaptureFixture[str], which: str, arguments: tuple[str, ...], message: str) -> None:
    assert outcome(MAINS[which], arguments) == 0
    shown = capsys.readouterr()
    assert message in shown.out and "examples:" in shown.out and shown.err == ""


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["--model", "biformer_tiny", "--help"]):
        outcome(profiler.main, arguments)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    outcome(profiler.main, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in (*names(), *MODELS):
        assert name in shown
    for name, option in options("bra").items():
        assert f"--{name.replace('_', '-')}" in shown and f"(default: {option.default})" in shown


@pytest.mark.parametrize("name", names())
def test_every_attention_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert outcome(profiler.main, ["--attention", name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in options(name).values():
        assert f"--{option.name.replace('_', '-')}" in shown and option.describe() in shown


@pytest.mark.slow
def test_the_commands_run_as_programs() -> None:
    started = [
        subprocess.Popen([sys.executable, *words, "none"], cwd=ROOT, text=True, stdout=-1, stderr=-1)
        for words in (["-m", "profiling", "--attention"], ["run_all.py", "--only"], ["-m", "ablations"])
    ]
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and "'none'" in err


def test_the_list_of_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name, sweep in discover().items():
        assert f"{name}: {sweep.question}\n    expect: {sweep.expect}\n" in shown


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


def test_a_profile_is_of_the_step_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
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


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12)
VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "1", "2", "7", "-1", "4", "auto", "none", "true", "false", "nan", "inf", "1e9", "avgpool", "bra",
         "window", "full", "--", "-", "fp32", "bf16", "cpu", "cuda", "forward", "biformer_tiny", "½",
         "\uff11\uff12", "%s", "[/red]", "/dev/null", "/dev/null/x", str(PLUGINS / "plain.py"), str(10**30), "9" * 5000,
         "x" * 300]
    ),
    st.integers().map(str), st.floats().map(str), TEXT,
)  # fmt: skip


def flags(*extra: str) -> list[str]:
    declared = {option for name in (*names(), "bra") for option in options(name)}
    return [*(f"--{name.replace('_', '-')}" for name in sorted(declared)), *extra]


PROFILER_FLAGS = flags(
    "--attention", "--block", "--model", "--plugin", "--height", "--width", "--dim", "--num-heads", "--batch", "--impl",
    "--mode", "--dtype", "--device", "--compiled", "--cuda-graph",
    "--deterministic", "--freed-memory", "--seed", "--trace", "--json", "--help", "--no",
)  # fmt: skip
RUN_ALL_FLAGS = [
    "--gpus", "--launcher", "--slurm", "--shards", "--device", "--only",
    "--smoke", "--fresh", "--retry-failed", "--results", "--plugin", "--lis", "-h",
]  # fmt: skip


def command_lines(known: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Lists of flags and values, in pairs or not."""
    pair = st.tuples(st.sampled_from(known), VALUES).map(list)
    joined = pair.map(lambda both: ["=".join(both)])
    part = st.one_of(pair, pair, joined, st.sampled_from(known).map(lambda flag: [flag]), TEXT.map(lambda text: [text]))
    return st.lists(part, max_size=5).map(lambda parts: [word for part in parts for word in part])


any_order = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fuzzed(capsys: pytest.CaptureFixture[str], main: Main, arguments: list[str]) -> None:
    status = outcome(main, arguments)
    message = capsys.readouterr()
    assert status in (0, 1, 2) and "Traceback" not in message.err
    if status == 2:
        assert re.fullmatch(r"error: [^\n]+\n", message.err)


@any_order
@given(arguments=command_lines(PROFILER_FLAGS))
def test_fuzzed_profiler_arguments_give_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def no_measurement(job: Job, trace: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        return job.case.key_columns("profiling", "Paper CPU") | {
            "torch": "2",
            "status": "error",
            "reason": "not run",
        }, {}

    monkeypatch.setattr(profiler, "_measure", no_measurement)
    fuzzed(capsys, profiler.main, arguments)


@any_order
@given(arguments=command_lines(RUN_ALL_FLAGS))
def test_fuzzed_run_all_arguments_give_no_traceback(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    fuzzed(capsys, lambda words: run_all.main(["--list", *words]), arguments)


@any_order
@given(arguments=command_lines(["compare", "--markdown", "--help"]))
def test_fuzzed_compare_arguments_give_no_traceback(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    fuzzed(capsys, work_on_results, ["compare", *arguments])


OPTIONS = [(name, option) for name in names() for option in options(name)]


@settings(deadline=None)
@given(which=st.sampled_from(OPTIONS), text=VALUES)
def test_option_accepts_a_valid_value_or_lists_valid_ones(which: tuple[str, str], text: str) -> None:
    option = options(which[0])[which[1]]
    try:
        value = option.parse(text)
    except InvalidOption as refusal:
        assert str(refusal).startswith(f"{option.name}={text!r} is not valid; valid: ")
        assert str(refusal).endswith(option.describe())
    else:
        option.check(value)


@settings(deadline=None)
@given(which=st.sampled_from(OPTIONS))
def test_the_default_of_an_option_is_valid_and_can_be_written(which: tuple[str, str]) -> None:
    option = options(which[0])[which[1]]
    option.check(option.default)
    assert option.parse(
        str(option.default).lower() if option.default in (True, False, None) else str(option.default)
    ) == (option.default)
