"""Colours, marks and names of attentions in figures."""

import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from attention_zoo import get, names
from notebooks.figures import labels
from notebooks.lib import plots


def test_styles_are_fixed_and_distinct() -> None:
    assert len(set(plots.STYLES.values())) == len({colour for colour, _ in plots.STYLES.values()}) == len(plots.STYLES)
    assert plots.style("bra") == ("#0072B2", "D")
    assert plots.style("my_plugin") in plots.OTHERS and plots.style("my_plugin") not in plots.STYLES.values()


def test_families_are_those_that_the_attentions_declare() -> None:
    built_in = [name for name in names() if get(name).__module__.startswith("attention_zoo.")]
    assert {name: plots.family(name) for name in built_in} == {name: get(name).family for name in built_in}


def test_names_beside_lines_do_not_overlap() -> None:
    fig, ax = plt.subplots(figsize=(8, 5))
    ax.set(xlim=(1, 4), ylim=(0, 10))
    ends = {"a": 5.0, "b": 5.0, "c": 5.1, "low": 0.0, "lower": 0.0, "short": 9.0}
    grid = {name: [1, 4] if name != "short" else [1, 2] for name in ends}
    drawn = [(name, name, "-", pd.DataFrame({"cost": [1.0, end]}, index=grid[name])) for name, end in ends.items()]
    labels.label_lines(ax, [*drawn, ("none", "none", "-", pd.DataFrame({"cost": [float("nan")]}, index=[1]))], "cost")
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert list(boxes) == ["low", "lower", "a", "b", "c", "short"]
    for below, above in itertools.pairwise(boxes.values()):
        assert below.y1 <= above.y0
    middle = {name: (box.y0 + box.y1) / 2 for name, box in boxes.items()}
    assert middle["b"] == pytest.approx(ax.transData.transform((4, 5.03))[1], abs=1)
    assert middle["short"] == pytest.approx(ax.transData.transform((2, 9))[1], abs=1)
    plt.close(fig)
