"""Colours, marks and names of attentions in figures."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
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


def test_names_beside_marks_hide_no_mark_and_no_name_nor_do_their_lines() -> None:
    fig, ax = plt.subplots(figsize=(8, 5))
    ax.set(xscale="log", yscale="log", xlim=(1, 1000), ylim=(1, 1000))
    points = {"alone": (300.0, 3.0), "edge": (990.0, 500.0), "by_a_text": (10.0, 500.0)}
    points |= {f"one_of_many_{place}": (30 * 1.05**place, 30 * 1.02 ** (place % 3)) for place in range(7)}
    for place in points.values():
        ax.plot(*place, "o", markersize=9)
    other = ax.annotate("a text that is there before", points["by_a_text"], xytext=(12, -4), textcoords="offset points")
    x, y = ({name: place[axis] for name, place in points.items()} for axis in (0, 1))
    labels.name_points(ax, pd.Series(x), pd.Series(y | {"not_timed": float("nan")}))
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text() and text is not other}
    assert set(boxes) == set(points)
    panel = ax.get_window_extent()
    for name, box in boxes.items():
        assert panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1, name
        assert not any(box.contains(*ax.transData.transform(point)) for point in points.values()), name
    for one, two in itertools.combinations([*boxes.values(), other.get_window_extent()], 2):
        assert not one.overlaps(two)
    near = ax.transData.transform(points["alone"])
    assert 0 < boxes["alone"].x0 - near[0] < 20 and boxes["alone"].y0 < near[1] < boxes["alone"].y1
    assert boxes["edge"].x1 < ax.transData.transform(points["edge"])[0]
    lines = [text for text in ax.texts if not text.get_text()]
    assert lines and {tuple(text.xy) for text in lines} <= {points[n] for n in points if n.startswith("one_of_many")}
    for line in lines:
        begin = ax.transData.transform(line.xy)
        end = begin + np.array(line.get_position()) * fig.dpi / 72
        for x, y in np.linspace(begin, end, 50)[:-1]:
            assert not any(box.contains(x, y) for box in boxes.values()), line.xy
            apart = [ax.transData.transform(place) for place in points.values() if place != line.xy]
            assert all(np.hypot(*(mark - (x, y))) > 2 or np.hypot(*(mark - begin)) < 9 for mark in apart), line.xy
    plt.close(fig)
