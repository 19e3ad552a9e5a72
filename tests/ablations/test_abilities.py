"""Accuracies in recommendations and in the README's table."""

from pathlib import Path
from typing import Any

import pytest

from ablations.__main__ import main
from ablations.analysis import abilities, readme_table
from ablations.analysis.abilities import Abilities
from ablations.analysis.candidates import Candidate
from ablations.analysis.latency_lookup import Latency
from ablations.analysis.recommend import Device, Limits, Question, judge, rank, worst
from ablations.analysis.recommend_page import as_json
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution.subprocess_runner import Outcome
from profiling.schema.capability import validate
from profiling.schema.row import load


def row(name: str, task: str, accuracy: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    status = {"status": "ok"} if accuracy is not None else {"status": "diverged", "reason": "nan"}
    return {
        "sweep": "capability", "name": name, "task": task, "difficulty": "medium", "height": 14, "width": 14, "dim": 32,
        "num_heads": 2, "depth": 2, "batch": 8, "steps": 500, "optimiser": "AdamW one-cycle", "learning_rate": 0.01,
        "dtype": "fp32", "device": "cpu", "seed": seed, "device_name": "d", "chance": 0.125, "accuracy": accuracy,
    } | status | more  # fmt: skip


ROWS = [
    row("full", "recall", 1.0), row("full", "offset", 0.96),
    row("window", "recall", 0.3), row("window", "offset", 0.12),
    row("linear", "recall", 0.5, 0), row("linear", "recall", 0.9, 1), row("linear", "offset", 0.5),
    row("axial", "recall", None), row("axial", "offset", 0.2),
    row("full", "recall", 0.0, difficulty="hard"), row("full", "recall", 0.0, sweep="capability_pilot"),
    row("bra", "recall", 0.6, topk=4, n_win="7"), row("bra", "offset", 0.6, topk=4, n_win="7"),
    row("bra", "recall", 0.8, sweep="capability_bra", topk=16, n_win="7", options="topk=16"),
]  # fmt: skip
NEEDS = ("recall", "offset")


def known() -> Abilities:
    return Abilities(validate(ROWS))


def asked(needs: tuple[str, ...] = NEEDS) -> Question:
    return Question(Case("full", 56, 56), Limits(2**30), Device("cpu", None, load()), (), needs, known())


def predicted(name: str, **options: Any) -> tuple[Candidate, Outcome]:
    columns = {"memory_predicted_bytes": 2**20, "macs_counted": 10**6, "macs_backward_counted": None}
    return Candidate(Case(name, 56, 56, options=tuple(sorted(options.items())))), Outcome("ok", columns)


def test_an_accuracy_is_the_mean_over_seeds_at_medium_difficulty() -> None:
    assert known().of("linear", {}) == pytest.approx({"recall": 0.7, "offset": 0.5})
    assert known().of("full", {"qkv_bias": False}) == {"recall": 1.0, "offset": 0.96}
    assert known().of("axial", {}) == {"offset": 0.2} and known().of("pooled", {}) == {}


def test_options_that_differ_from_the_defaults_are_another_training() -> None:
    assert known().of("bra", {"topk": 16, "n_win": 7, "auto_pad": True, "side_dwconv": 5}) == {"recall": 0.8}
    assert known().of("bra", {"topk": 4}) == {"recall": 0.6, "offset": 0.6}
    assert known().of("bra", {"topk": 8}) == {} and known().of("window", {"window_size": 14}) == {}


def test_recommendations_are_ranked_by_the_worst_accuracy_at_what_is_needed() -> None:
    several = [predicted(name) for name in ("pooled", "window", "axial", "linear", "bra", "full")]
    answer = judge(several, asked())
    result = [candidate.case.name for candidate in answer.fits]
    assert result[:4] == ["full", "bra", "linear", "window"] and set(result[4:]) == {"pooled", "axial"}
    assert [worst(candidate, NEEDS) for candidate in answer.fits[:4]] == pytest.approx([0.96, 0.6, 0.5, 0.12])
    assert worst(answer.fits[-1], NEEDS) is None
    assert [c.case.name for c in judge(several, asked(("recall",))).fits][:3] == ["full", "linear", "bra"]


def test_what_learns_alike_is_ranked_by_latency() -> None:
    def candidate(accuracy: float, ms: float) -> Candidate:
        return Candidate(Case("full", 8, 8), latency=Latency(ms, "measured"), abilities={"recall": accuracy})

    best, fast, poor = candidate(1.0, 9.0), candidate(0.96, 1.0), candidate(0.5, 0.1)
    ordered = sorted([poor, best, fast], key=lambda c: rank(c, ("recall",)))
    assert ordered == [fast, best, poor] and sorted(ordered, key=rank) == [poor, fast, best]


def test_json_has_accuracies_and_what_was_asked() -> None:
    answer = as_json(judge([predicted("full")], asked()), asked())
    assert answer["asked"]["needs"] == ["recall", "offset"]
    assert answer["fits"][0]["learns"] == {"recall": 1.0, "offset": 0.96}


def test_an_unknown_task_is_refused_with_the_valid_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidOption, match=r"no accuracy at 'count'; valid: offset, recall"):
        known().needed(["recall", "count"])
    with pytest.raises(InvalidOption, match=r"python run_all\.py --only capability makes them"):
        abilities.read(tmp_path).needed(["recall"])
    words = "recommend --height 8 --width 8 --memory 1GiB --needs recall"
    assert main([*words.split(), "--results", str(tmp_path)]) == 2
    assert main([*words.split(), "--model", "biformer_tiny"]) == 2
    assert "--needs is for one attention" in capsys.readouterr().err


def test_the_table_shows_the_tasks_of_the_headline() -> None:
    assert abilities.HEADLINE == ("recall", "offset", "count", "match_digits")
    assert readme_table._learns(known().of("full", {})) == "100 / 96 / - / -" and readme_table._learns({}) == ""
