"""Exponents: the fit, its interval, and the fits of every attention's formulas on the grids of the sweep."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_rows import cell

from ablations.sweeps.complexity import SWEEP
from attention_zoo import build, names
from notebooks.lib import exponents, plots
from notebooks.lib.exponents import T95, fit
from notebooks.tables import growth
from profiling.schema.row import validate


def powers(exponent: float, sides: tuple[int, ...], factor: float = 3.0) -> tuple[pd.Series, pd.Series]:
    tokens = pd.Series([float(side**2) for side in sides])
    return tokens, factor * tokens**exponent


@pytest.mark.parametrize("exponent", [1.0, 4 / 3, 2.0])
def test_a_power_is_fitted_exactly(exponent: float) -> None:
    result = fit(*powers(exponent, (7, 14, 28, 56, 112)))
    assert result is not None
    assert result.exponent == pytest.approx(exponent, abs=1e-12) and result.margin == pytest.approx(0, abs=1e-6)


def test_small_grids_are_left_out_but_for_four() -> None:
    tokens, cost = powers(1.5, (2, 4, 8, 16, 32, 64, 128, 256, 512))
    cost[:4] += 10**9
    result = fit(tokens, cost)
    assert result is not None and result.exponent == pytest.approx(1.5) and result.tokens == tuple(tokens[4:])
    few = fit(tokens[:5], cost[:5])
    assert few is not None and few.tokens == tuple(tokens[1:5])


def test_the_interval_by_hand() -> None:
    """Points of y = x with residuals (e, -e, -e, e), which do not change the slope."""
    x, e = np.array([0.0, 1.0, 2.0, 3.0]), 0.1
    y = x + e * np.array([1, -1, -1, 1])
    result = fit(pd.Series(np.exp(x)), pd.Series(np.exp(y)))
    assert result is not None and result.exponent == pytest.approx(1.0)
    # Two degrees of freedom; the squared distances of x from its mean sum up to 5.
    assert result.margin == pytest.approx(4.303 * np.sqrt(4 * e**2 / 2 / 5))
    assert str(result) == f"1.00 ± {result.margin:.2f}"


def test_two_points_have_no_interval_and_one_no_slope() -> None:
    two = fit(*powers(2.0, (4, 8)))
    assert two is not None and two.exponent == pytest.approx(2.0) and np.isnan(two.margin) and str(two) == "2.00"
    assert fit(*powers(2.0, (4,))) is None
    assert fit(pd.Series([4.0, 16.0]), pd.Series([pd.NA, pd.NA], dtype="Int64")) is None


def test_replicates_count_once() -> None:
    tokens, cost = powers(1.0, (2, 4, 8, 16))
    noisy = pd.concat([cost, cost, 100 * cost])
    result = fit(pd.concat([tokens] * 3), noisy)
    assert result is not None and result.exponent == pytest.approx(1.0) and len(result.tokens) == 4


@pytest.mark.parametrize("freedom", range(1, len(T95) + 1))
def test_students_t(freedom: int) -> None:
    """Between -t and t lies 95 % of the density (1 + x^2 / n) ^ (-(n + 1) / 2), integrated with x = sqrt(n) tan(u)."""
    u = np.linspace(0, np.pi / 2, 2_000_001)[:-1]
    density = np.cos(u) ** (freedom - 1)
    inside = u <= np.arctan(T95[freedom - 1] / np.sqrt(freedom))
    assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=5e-5)


def formulas() -> dict[str, tuple[float, exponents.Fit]]:
    """Theory, and the fit of attention and routing by the modules' own formulas over the sweep's grids."""
    theory: dict[str, float] = {}
    costs: dict[str, dict[float, float]] = defaultdict(dict)
    for case in SWEEP.cases("cpu"):
        if case.mode == "forward" and case.name in names():
            options = dict(case.options)
            with torch.device("meta"):
                module = build(case.name, dim=64, num_heads=2, **options)
            cost = module.macs(case.height, case.width)
            label = f"{case.name} {options.get('n_win', '')}".strip()
            theory[label] = module.exponent
            costs[label][case.height * case.width] = cost.attention + cost.routing
    fitted = {label: fit(pd.Series(of.keys()), pd.Series(of.values())) for label, of in costs.items()}
    return {label: (theory[label], result) for label, result in fitted.items() if result is not None}


def test_every_attention_grows_as_its_theory_says() -> None:
    result = formulas()
    assert set(names()) - {label.split()[0] for label in result} == {"pseudo_conv"}
    quadtree_theory, quadtree_fitted = result.pop("quadtree")
    for label, (theory, fitted) in result.items():
        assert fitted.exponent == pytest.approx(theory, abs=0.015), label
        assert fitted.margin < 0.03, label
    expected = {"bra auto": 4 / 3, "bra 7": 2, "window": 1, "axial": 1.5, "full": 2}
    assert {label: result[label][0] for label in expected} == pytest.approx(expected)
    assert quadtree_theory == 2
    tokens = pd.Series([float(side**2) for side in SWEEP.axes["grid"]])
    of_the_law = fit(tokens, quadtree_pairs(tokens, SWEEP.fixed["topk"]))
    assert of_the_law is not None and quadtree_fitted.exponent == pytest.approx(of_the_law.exponent, abs=1e-9)


def quadtree_pairs(tokens: pd.Series, topk: int) -> pd.Series:
    """Of four levels: full attention among HW / 64 tokens, then 4 topk keys for HW / 16, HW / 4 and HW queries.

    The square is below the rest on half of the sweep's grids, up to 293 tokens per side with its topk of 4.
    """
    return (tokens / 64) ** 2 + 4 * topk * (tokens / 16 + tokens / 4 + tokens)


def test_quadtree_grows_with_the_square_of_large_grids() -> None:
    sides = (2**14, 2**15)
    with torch.device("meta"):
        module = build("quadtree", dim=64, num_heads=2)
    costs = [module.macs(side, side).attention for side in sides]
    assert costs == [2 * 64 * quadtree_pairs(pd.Series([side**2]), topk=8)[0] for side in sides]
    assert np.log(costs[1] / costs[0]) / np.log(4) == pytest.approx(module.exponent, abs=0.001)


def test_latency_is_of_the_same_configuration() -> None:
    """Cells of another topk, or that failed, are excluded: the complexity sweep counts another attention."""
    rows = [cell("complexity", "bra", "forward", side, side**2, None, topk=4) for side in (8, 16, 32, 64)]
    rows += [
        cell("resolution", "bra", "forward", side, side**2, side**3.0, topk=4, macs_counted=10**6 * side**2)
        for side in (8, 16, 32, 64)
    ]
    rows += [cell("resolution", "bra", "forward", side, side**2, 1.0, topk=8) for side in (8, 16, 32, 64)]
    rows += [cell("resolution", "full", "forward", side, side**2, 1.0) for side in (8, 16, 32, 64)]
    results = plots.Results(validate(rows))
    (part,) = exponents.growths(results).values()
    result = exponents.fits(part)["latency, forward"]
    assert result is not None and result.exponent == pytest.approx(1.5)
    (sentence,) = (text for text in growth.findings(results) if "Forward latency" in text)
    assert "with 0 of 1 attentions. Furthest apart is bra, 1.50 ± 0.00 instead of 1.00" in sentence
    assert "it does 0.125 to 0.0156 G MACs per second from 8 to 64 tokens per side." in sentence
