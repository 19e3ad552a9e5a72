"""Figures, tables and findings of the capability sweeps, from rows made by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_up_rows import ablations, cell, trained, training
from matplotlib.figure import Figure

from notebooks.figures import capability, capability_costs
from notebooks.lib import plots
from notebooks.lib.plots import Results
from notebooks.tables import trainings
from profiling.schema.capability import validate as validate_trained
from profiling.schema.row import validate


def costs() -> Iterator[dict[str, Any]]:
    for name, memory, ms in (("full", 100, 10.0), ("bra", 20, 4.0), ("my_plugin", 10, 6.0), ("window", 5, 2.0)):
        yield cell("resolution", name, "forward_backward", 56, memory * 2**20, ms)


def results(rows: list[dict[str, Any]] | None = None) -> Results:
    return Results(validate([*costs(), *ablations()]), validate_trained(list(trained()) if rows is None else rows))


def shown(draw: Any, *arguments: Any) -> tuple[str, list[Figure]]:
    with plots.kept() as parts:
        draw(*arguments)
    return "\n".join(part for part in parts if isinstance(part, str)), [p for p in parts if isinstance(p, Figure)]


def test_a_task_counts_only_if_the_controls_do_as_they_must() -> None:
    judged = {task.name: task.why_not for task in trainings.judged(results())}
    assert judged == {
        "recall": "", "count": "the convolution is not far below full attention; it separates nothing",
        "connect": "full attention does not solve it",
    }  # fmt: skip
    assert trainings.counted(results()) == ["recall"]


@pytest.mark.parametrize(
    ("accuracies", "why_not"),
    [
        ({"full": (1.0, 0.98, 0.99), "pseudo_conv": (0.1, 0.1, 0.1)}, ""),
        ({"full": (1.0, 0.98), "pseudo_conv": (0.1, 0.1)}, "2 seeds"),
        ({"full": (1.0, 1.0, 0.86), "pseudo_conv": (0.1, 0.1, 0.1)}, "the seeds of a control disagree"),
        ({"full": (0.9, 0.9, 0.9), "pseudo_conv": (0.1, 0.1, 0.1)}, "full attention does not solve it"),
        ({"full": (1.0, 1.0, 1.0)}, "the convolution is not far below full attention; 0 seeds; it separates nothing"),
    ],
)
def test_why_a_task_does_not_count(accuracies: dict[str, tuple[float, ...]], why_not: str) -> None:
    rows = [
        training(name, "recall", value, seed)
        for name, values in accuracies.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    (task,) = trainings.judged(results(rows))
    assert task.why_not == why_not


def test_the_local_task_is_a_control_and_no_headline() -> None:
    rows = [training(name, "texture", 0.97, seed) for name in ("full", "pseudo_conv") for seed in range(3)]
    assert [task.why_not for task in trainings.judged(results(rows))] == [""] and not trainings.counted(results(rows))
    rows = [row | ({"accuracy": 0.5} if row["name"] == "pseudo_conv" else {}) for row in rows]
    assert [task.why_not for task in trainings.judged(results(rows))] == ["the convolution fails at it"]


def test_the_heat_map_has_every_attention_and_task_the_best_first() -> None:
    _, (fig,) = shown(capability.heat_map, results())
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "bra", "my_plugin", "pseudo_conv"]
    heads = [label.get_text() for label in ax.get_xticklabels()]
    assert heads == ["recall\nchance 12 %", "count\nchance 12 %\nnot counted", "connect\nchance 12 %\nnot counted"]
    assert [text.get_text() for text in ax.texts][:3] == ["100", "100", "60"]


def test_the_range_over_seeds_is_shown_where_it_is_wide() -> None:
    rows = [training("full", "recall", value, seed) for seed, value in enumerate((1.0, 0.5, 0.9))]
    _, (fig,) = shown(capability.heat_map, results(rows))
    assert fig.axes[0].texts[0].get_text() == "80 (50 to 100)"


def test_a_failed_training_is_an_empty_cell_and_a_sentence() -> None:
    lost = training("bra", "recall", 0.0) | {
        "accuracy": None,
        "accuracy_double": None,
        "status": "diverged",
        "reason": "nan",
    }
    rows = [training("full", "recall", 1.0), training("bra", "count", 0.5), lost]
    assert any("1 trainings have no accuracy: diverged." in text for text in capability.findings(results(rows)))
    shown(capability.heat_map, results(rows))


def test_the_front_keeps_what_nothing_cheaper_beats_beyond_the_seeds() -> None:
    joined = capability_costs.joined(results())
    assert set(joined.index) == {"full", "bra", "my_plugin"} and joined.loc["bra", "memory"] == 20
    assert joined.loc["bra", "accuracy_accuracy"] == pytest.approx(0.78)
    assert set(capability_costs.on_front(joined, "latency")) == {"full", "bra"}
    assert set(capability_costs.on_front(joined, "memory")) == {"full", "bra", "my_plugin"}
    near = pd.DataFrame(
        {"latency": [1.0, 2.0], "accuracy_low": [0.5, 0.4], "accuracy_high": [0.7, 0.6]}, index=["a", "b"]
    )
    assert capability_costs.on_front(near, "latency") == ["a", "b"]


def test_figures_of_cost_and_topk_show_every_point() -> None:
    _, (fig,) = shown(capability_costs.pareto, results())
    assert len(fig.axes) == 2 and all(len(ax.containers) == 3 for ax in fig.axes)
    _, (fig,) = shown(capability_costs.topk, results())
    line = fig.axes[0].containers[0].lines[0]
    assert list(line.get_xdata()) == [1, 4, 16] and list(line.get_ydata()) == [25, 50, 100]


def test_without_costs_there_is_no_figure_and_the_command_is_named() -> None:
    rows = Results(validate([]), validate_trained(list(trained())))
    _, (fig,) = shown(capability_costs.topk, rows)
    assert [ax.get_visible() for ax in fig.axes] == [True, False]
    text, figures = shown(capability_costs.pareto, rows)
    assert not figures and "`python run_all.py --only resolution` makes them." in text


def test_transfer_has_both_grids() -> None:
    text, _ = shown(trainings.transfer, results())
    assert "| attention | recall, % | recall at 28, % |" in text and "| full | 100 | 50 |" in text


def test_options_have_their_range() -> None:
    text, _ = shown(trainings.options, results())
    assert "| topk=4, as by default | 50 (50 to 50) |" in text and "| topk=16 | 100 (100 to 100) |" in text


def test_findings_name_who_solves_and_who_is_at_chance() -> None:
    sentences = capability.findings(results())
    assert "All of recall are solved by full, of 4 attentions." in sentences
    assert any(
        s.startswith("recall: after full the best are bra 78 %") and "at chance: pseudo_conv." in s for s in sentences
    )
    assert any("Range over three seeds: median 0 points, largest 4 (bra, recall)." in s for s in sentences)


def test_the_device_with_trainings_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, rows in (("many", [*costs(), *ablations()]), ("trained", list(costs()))):
        (tmp_path / folder).mkdir()
        for sweep, part in validate(rows).groupby("sweep"):
            part.to_csv(tmp_path / folder / f"{sweep}.csv", index=False)
    validate_trained(list(trained())).query("sweep == 'capability'").to_csv(
        tmp_path / "trained" / "capability.csv", index=False
    )
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    monkeypatch.delenv("ATTENTION_DEVICE", raising=False)
    with plots.kept() as said:
        assert plots.load().trained.empty and len(plots.load("capability").trained) == 36
    assert ["folder `many`" in str(text) for text in said] == [True, False]
