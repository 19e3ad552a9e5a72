"""Recommendations that measure, and those for whole models: small sizes, and no test of a time."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ablations.__main__ import main
from ablations.analysis import model_candidates, time_candidates
from ablations.analysis.candidates import candidates, command
from ablations.analysis.model_candidates import from_stage, in_all_stages, stages
from ablations.analysis.recommend import Limits, Question, judge, predict, resolve
from attention_zoo import InvalidOption
from profiling.__main__ import parse
from profiling.cases.case import Case
from profiling.execution.benchmark import Job, static_analysis
from profiling.meters import roofline
from profiling.schema.row import load

SIZE = ["--height", "8", "--width", "8", "--dim", "16", "--memory", "1GiB", "--device", "cpu", "--json"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attentions only, and peaks that need no measurement."""
    chosen = ("pseudo_conv", "window")
    monkeypatch.setattr(
        "ablations.analysis.recommend.candidates",
        lambda size: (c for c in candidates(size) if c.case.name in chosen and not c.changed),
    )
    monkeypatch.setattr(roofline, "stored", lambda *_: {"fp32": 1e9, "copy": 1e9})


def answered(capsys: pytest.CaptureFixture[str], results: Path, *words: str) -> dict[str, Any]:
    assert main(["recommend", *SIZE, "--results", str(results), *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_measured_candidates_are_kept_and_used_next_time(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = answered(capsys, tmp_path, "--measure", "2", "--seconds", "600")
    assert first["timed"]["count"] == 2 and first["timed"]["not_timed"] == []
    assert [e["latency_source"] for e in first["fits"]].count("measured") == 2
    rows = load(first["timed"]["file"])
    assert set(rows["sweep"]) == {"recommend"} and set(rows["status"]) == {"ok"} and len(rows) == 2
    later = answered(capsys, tmp_path)
    assert later["fits"] == first["fits"] and later["timed"] is None
    assert answered(capsys, tmp_path, "--measure", "2", "--seconds", "600")["timed"]["count"] == 0


def test_no_candidate_is_begun_after_the_time_limit(few: None, tmp_path: Path) -> None:
    asked = Question(Case("full", 8, 8, 16), Limits(2**30), resolve("cpu", tmp_path))
    predicted = predict(asked)
    long_ago = time.monotonic() - 100
    timed = time_candidates.time_best(predicted, asked, None, 60, long_ago, tmp_path, lambda *_: None)
    assert timed.count == 0 and {why for _, why in timed.skipped} == {time_candidates.TIME_IS_UP}
    assert len(timed.skipped) == len(predicted) and load(timed.path).empty


def test_failed_candidate_is_a_row_and_its_reason_is_shown(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(cell: Any, row: dict[str, Any], *_: Any) -> dict[str, Any]:
        return row | {"status": "crash", "reason": "killed by SIGSEGV"}

    monkeypatch.setattr(time_candidates, "run", crash)
    result = answered(capsys, tmp_path, "--measure", "1", "--seconds", "600")
    assert [e["why_not"] for e in result["does_not_fit"]] == ["crash: killed by SIGSEGV"]
    assert list(load(result["timed"]["file"])["status"]) == ["crash"]


def test_later_stages_take_what_the_first_cannot() -> None:
    size = Case("biformer_stl", 64, 64, None, None, kind="model")
    whole = [replace(c, memory=1) for c in in_all_stages(size) if c.case.impl == "reference"]
    full = next(c for c in whole if stages(c.case) == "full")
    published = [c for c in whole if stages(c.case) is None]
    (mixed,) = from_stage(1, [full], published)
    assert stages(mixed.case) == (None, "full", "full", "full")
    (later,) = from_stage(2, [mixed, full], published)
    assert model_candidates.in_words(stages(later.case)) == "full from stage 3, else published"
    light = [replace(c, memory=7 if stages(c.case) == "axial" else 9) for c in whole if stages(c.case)]
    assert stages(next(from_stage(1, [full], light)).case) == ("axial", "full", "full", "full")
    assert not list(from_stage(1, [full], []))


def test_prediction_of_a_model_is_the_static_analysis_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Case("biformer_stl", 64, 64, None, None, kind="model")
    some = [c for c in in_all_stages(size) if stages(c.case) in (None, "full") and c.case.impl == "reference"]
    monkeypatch.setattr(model_candidates, "in_all_stages", lambda size: iter(some))
    asked = Question(size, Limits(math.inf), resolve("cpu", tmp_path))
    known = {stages(c.case): c.memory for c in judge(predict(asked), asked).fits}
    assert known == {stages(c.case): static_analysis(Job(c.case))["memory_predicted_bytes"] for c in some}


@pytest.mark.parametrize("attention", [None, "window", (None, "window", "full", "full")])
def test_command_of_a_model_builds_the_same_model(attention: Any) -> None:
    case = model_candidates._case(Case("biformer_tiny", 64, 96, None, None, kind="model"), attention, "reference")
    parsed = parse(" ".join(command(case)[1:]).split()).case
    assert stages(parsed) == attention and (parsed.height, parsed.width) == (64, 96)
    assert parsed.impl == "reference" and dict(parsed.options)["auto_pad"] is True


def test_too_small_an_image_is_rejected() -> None:
    with pytest.raises(InvalidOption, match="leave no token for the last stage of biformer_stl; valid: at least 32"):
        model_candidates.grids(Case("biformer_stl", 16, 64, None, None, kind="model"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--measure 0x", "'0x' is not an integer"),
        ("--measure 0", "--measure 0 is not valid; valid: an integer >= 1"),
        ("--measure -1", "--measure -1 is not valid; valid: an integer >= 1"),
        ("--seconds 5", "--seconds 5 is not valid; valid: a number above 0, with --measure"),
        ("--model biformer_tiny", "--dim and --num-heads are for one attention"),
    ],
)
def test_invalid_input_is_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    try:
        assert main(["recommend", *SIZE, *words.split()]) == 2
    except SystemExit as leaving:
        assert leaving.code == 2
    assert message in capsys.readouterr().err
