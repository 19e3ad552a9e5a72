"""Predictions are kept for the same jobs and code, and for nothing else."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ablations.analysis import prediction_cache
from profiling.cases.case import Case
from profiling.execution import subprocess_runner
from profiling.execution.benchmark import Job
from profiling.execution.child_process import Outcome
from profiling.execution.static_analysis import analyze_batch

JOBS = [Job(Case("window", 8, 8, 16)), Job(Case("bra", 8, 8, 16, options=(("n_win", 5),)))]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(prediction_cache, "FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def analyzed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Job]]:
    """What was really analyzed; the outcome of each job is ``ok`` with the number of the call."""
    calls: list[Sequence[Job]] = []

    def analyze(jobs: Sequence[Job]) -> Iterator[Outcome]:
        calls.append(jobs)
        yield from (Outcome("ok", {"call": len(calls)}) for _ in jobs)

    monkeypatch.setattr(prediction_cache, "analyze_batch", analyze)
    return calls


def test_kept_outcomes_equal_those_of_the_analysis() -> None:
    subprocess_runner.start()
    expected = list(analyze_batch(JOBS))
    assert [outcome.status for outcome in expected] == ["ok", "error"]
    for _ in range(2):
        got = list(prediction_cache.analyze(JOBS))
        assert [(o.status, o.value, o.reason) for o in got] == [(o.status, o.value, o.reason) for o in expected]


def test_the_same_jobs_are_analyzed_once(analyzed: list[Sequence[Job]]) -> None:
    first, second = list(prediction_cache.analyze(JOBS)), list(prediction_cache.analyze(JOBS))
    assert first == second and len(analyzed) == 1
    assert list(prediction_cache.analyze([])) == []


@pytest.mark.parametrize("what", ["case", "plugin", "code", "torch", "broken", "shorter"])
def test_anything_else_is_analyzed_again(
    what: str, analyzed: list[Sequence[Job]], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    list(prediction_cache.analyze(JOBS))
    jobs = {"case": JOBS[:1], "plugin": [Job(JOBS[0].case, ("mine.py",)), JOBS[1]]}.get(what, JOBS)
    if what == "code":
        monkeypatch.setattr(prediction_cache, "code", lambda: "other")
    if what == "torch":
        monkeypatch.setattr("torch.__version__", "9.9")
    (path,) = folder.iterdir()
    if what == "broken":
        path.write_text("{")
    if what == "shorter":
        path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    assert [outcome.value for outcome in prediction_cache.analyze(jobs)] == [{"call": 2}] * len(jobs)
    if what == "plugin":
        list(prediction_cache.analyze(jobs))
        assert len(analyzed) == 3


def test_an_outcome_that_may_change_is_not_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    outcome = Outcome("timeout", reason="took more than 120 s")
    monkeypatch.setattr(prediction_cache, "analyze_batch", lambda jobs: iter([outcome] * len(jobs)))
    assert list(prediction_cache.analyze(JOBS)) == [outcome, outcome] and not folder.exists()


def test_a_folder_that_cannot_be_written_is_as_none(analyzed: list[Sequence[Job]], folder: Path) -> None:
    folder.write_text("a file")
    assert len(list(prediction_cache.analyze(JOBS))) == 2


def test_a_user_without_a_home_keeps_nothing(
    analyzed: list[Sequence[Job]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prediction_cache.user_folder() == tmp_path / "vision-attention-bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(prediction_cache, "FOLDER", prediction_cache.user_folder())
    for _ in range(2):
        assert len(list(prediction_cache.analyze(JOBS))) == 2
    assert len(analyzed) == 2
