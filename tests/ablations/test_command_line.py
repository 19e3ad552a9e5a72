"""Every command rejects bad input in one line, leaves results alone, and helps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PLUGINS, ROOT, SMALL, Main, outcome

import profiling.__main__ as profiler
from ablations.__main__ import main as work_on_results
from ablations.cli import run_all
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import exclusive
from ablations.harness.sweep import discover
from attention_zoo import MODELS, names, options
from profiling.cli.arguments import run_reporting
from profiling.execution import environment
from profiling.schema.row import COLUMNS

FAULTS = str(PLUGINS / "faults.py")
MAINS: dict[str, Main] = {
    "profiling": profiler.main,
    "run_all": lambda arguments: run_all.main(list(arguments)),
    "ablations": work_on_results,
}


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
        ("profiling", f"--plugin {'x' * 300}", "plugin .*xxx: not a Python file"),
        ("profiling", f"--plugin {shlex.quote(FAULTS)} --attention fault_flags", "option 'mode' .* taken: .*--mode"),
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
        ("ablations", f"compare {shlex.quote(str(ROOT / 'README.md'))} none", "README.md"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], which: str, arguments: str, message: str) -> None:
    assert re.search(message, refused(capsys, which, *shlex.split(arguments)))


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


def test_missing_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none.md"
    assert refused(capsys, "ablations", "table", str(missing)) == f"error: {missing}: No such file or directory\n"


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


def test_help_of_recommend_tells_devices_from_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    outcome(work_on_results, ["recommend", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--device DEVICE cpu, cuda, auto .* or a folder of --results", shown)
    assert re.search(r"--needs TASK,... rank by what was learned", shown)


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
