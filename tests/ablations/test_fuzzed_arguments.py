"""Random arguments give no traceback."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from commands import PLUGINS, Main, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import profiling.__main__ as profiler
from ablations.__main__ import main as work_on_results
from ablations.cli import run_all
from attention_zoo import InvalidOption, names, options
from profiling.execution.benchmark import Job

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
