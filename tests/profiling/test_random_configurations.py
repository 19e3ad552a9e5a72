"""Random configurations, which nobody would list: counted and predicted exactly, and right in every implementation."""

import random
from typing import Any

import pytest
import torch

from attention_zoo import InvalidOption, Unsupported, get, names, options
from attention_zoo.core.options import Option
from profiling.cases.case import Case, available_impls
from profiling.execution.benchmark import static_analysis_of
from profiling.meters import correctness, peak_memory

OWN = [name for name in names() if get(name).__module__.startswith("attention_zoo.attentions.")]
SLOW = {"flex", "triton"}
"""Implementations that are compiled or interpreted."""


def a_value(draw: random.Random, option: Option) -> Any:
    """A valid value of an option by itself, near its least."""
    alternative = draw.choice(option.alternatives)
    if alternative.literal is not None or alternative.kind is type(None):
        return alternative.literal
    if alternative.kind is bool:
        return draw.random() < 0.5
    low = max(alternative.range.low, 0)
    return int(low) + draw.choice([0, 1, 2, 3, 4, 6, 7, 13]) if alternative.kind is int else low + draw.random()


def a_case(draw: random.Random, name: str) -> Case:
    """Some options of an attention, at any shape."""
    height, width = draw.choice([(7, 7), (14, 14), (28, 28), (draw.randint(1, 40), draw.randint(1, 40))])
    heads = draw.choice([1, 2, 3, 4])
    chosen = {option.name: a_value(draw, option) for option in options(name).values() if draw.random() < 0.35}
    return Case(
        name, height, width, heads * draw.choice([8, 12, 16, 32]), heads, tuple(chosen.items()),
        kind=draw.choice(["attention", "block"]),
        impl=draw.choice([impl for impl in available_impls(name) if impl not in SLOW]),
        mode=draw.choice(["forward", "forward_backward"]),
        batch=draw.choice([1, 1, 2, 3]),
        seed=draw.randrange(100),
    )  # fmt: skip


def analysed(draw: random.Random, name: str) -> tuple[Case, dict[str, Any]]:
    """A valid case and its static analysis."""
    while True:
        case = a_case(draw, name)
        try:
            return case, static_analysis_of(case)
        except (InvalidOption, Unsupported):
            continue


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("name", OWN)
def test_any_configuration_is_counted_predicted_and_right(name: str, seed: int) -> None:
    case, columns = analysed(random.Random(f"{name} {seed}"), name)
    assert columns["macs_agree"], (case, columns)
    work = case.workload("cpu")
    predicted, measured = columns["memory_predicted_bytes"], peak_memory.measure(work).peak
    # Buffers of a few numbers within operators are not followed.
    assert abs(predicted - measured) <= max(0.005 * measured, 4096), (case, predicted, measured)
    result = correctness.check(case)
    assert result is None or result.ok, (case, result)
    with torch.no_grad():
        assert work.module(work.x).isfinite().all()
