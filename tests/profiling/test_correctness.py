"""What is wrong is found before it is timed, and what is right passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_modules import MODES
from torch import Tensor

from attention_zoo import load_plugin
from attention_zoo.attentions.bra import sdpa
from profiling.cases.case import Case
from profiling.cases.workload import Dtype, Mode
from profiling.execution import subprocess_runner
from profiling.meters import correctness

FAULTS = Path(__file__).parents[1] / "plugins" / "faults.py"


@pytest.fixture
def faults() -> None:
    """The planted faults, registered for one test."""
    load_plugin(FAULTS)


@pytest.mark.parametrize("impl", ["fast", "auto"])
@pytest.mark.parametrize(
    ("name", "where", "error"),
    [
        ("fault_output", "output", 0.001),
        ("fault_gradient", "gradient of", 0.7),
        ("fault_no_gradient", "gradient of", 1.0),
        ("fault_nan", "output", float("inf")),
    ],
)
def test_a_wrong_implementation_is_found(faults: None, name: str, where: str, error: float, impl: str) -> None:
    for mode in MODES:
        result = correctness.check(Case(name, 4, 4, 8, 2, impl=impl, mode=mode))
        assert result is not None and not result.ok
        assert result.where.startswith(where)
        assert result.error == pytest.approx(error, rel=0.2) and result.error > 100 * result.tolerance


def test_output_without_gradients_is_checked(faults: None) -> None:
    wrong, right = (correctness.check(Case("fault_without_gradients", 4, 4, 8, 2, impl="fast", mode=m)) for m in MODES)
    assert wrong is not None and not wrong.ok and wrong.where == "output without gradients"
    assert wrong.error == pytest.approx(0.001, rel=1e-3)
    assert right is not None and right.ok


def test_a_right_implementation_passes(faults: None) -> None:
    result = correctness.check(Case("fault_right", 4, 4, 8, 2, impl="fast"))
    assert result is not None and result.ok and 0 < result.error <= result.tolerance < 1e-5


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("full", "fp32", "attention"),
        ("window", "bf16", "attention"),
        ("full", "fp64", "attention"),
        ("window", "fp32", "block"),
    ],
)
def test_the_fused_implementations_of_the_zoo_pass(name: str, dtype: Dtype, kind: str) -> None:
    result = correctness.check(Case(name, 14, 14, 16, 2, impl="sdpa", dtype=dtype, kind=kind))
    assert result is not None and result.ok
    assert result.tolerance < (0.1 if dtype == "bf16" else 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_routed_attention_is_compared_on_its_own_routes(mode: Mode, dtype: Dtype) -> None:
    result = correctness.check(Case("bra", 28, 28, 16, 2, impl="sdpa", mode=mode, dtype=dtype))
    assert result is not None and result.ok and result.flipped is not None
    assert result.flipped <= (0.05 if dtype == "bf16" else 0.0) and 0.02 <= result.flips_allowed <= 0.1


def test_wrong_routes_are_found_where_all_else_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = sdpa.forward

    def elsewhere(bra: Any, x: Tensor, side: int) -> Any:
        count = side**2
        # Route to neighbouring regions in row order, not to those of the best scores.
        bra.router.imposed = (
            (torch.arange(count)[:, None] + torch.arange(bra.topk)).remainder(count).expand(len(x), -1, -1)
        )
        out = forward(bra, x, side)
        bra.router.imposed = None
        return out

    monkeypatch.setattr(sdpa, "forward", elsewhere)
    result = correctness.check(Case("bra", 28, 28, 16, 2, impl="sdpa"))
    assert result is not None and not result.ok and result.error <= result.tolerance
    assert (
        result.flipped is not None and result.flipped > 0.5 and "of its routes are not those of fp64" in result.reason
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_that_are_zero_may_be_rounded(dtype: Dtype) -> None:
    """With one key, the softmax is constant, so the queries' gradients are zero but for rounding."""
    for seed in range(3):
        case = Case("pooled", 8, 8, 64, 2, (("sr_ratio", 14),), impl="sdpa", mode="forward_backward", dtype=dtype,
                    batch=2, seed=seed)  # fmt: skip
        result = correctness.check(case)
        assert result is not None and result.ok, result


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_two_numbers_are_judged_on_several_inputs(seed: int) -> None:
    """On one input the reference's own error in them can be small by chance, and with it the tolerance."""
    case = Case("dilated", 7, 7, 36, 1, (("dynamic_position_bias", True), ("qkv_bias", False)), kind="block",
                impl="sdpa", mode="forward_backward", dtype="bf16", seed=seed)  # fmt: skip
    result = correctness.check(case)
    assert result is not None and result.ok, result


@pytest.mark.parametrize("norm", [0.0, 1e-8])
def test_gradients_that_should_be_zero_are_compared_with_the_largest(norm: float) -> None:
    exact = {"gradient of v": torch.full((4,), 50.0), "gradient of q": torch.full((4,), norm / 2)}
    for error, ok in ((1e-7, True), (1e-3, False)):
        squares = correctness._squares(exact, exact | {"gradient of q": torch.full((4,), 50 * error)}, exact)
        result = correctness._judge(list(exact), squares, torch.zeros(2, 2))
        assert result.ok == ok and result.where == "gradient of q"
        assert result.error == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize(
    ("weights", "chosen", "taken", "missed"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [1, 0], (0, 2)),  # in another order
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [0, 2], (1, 2)),
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [1, 1], (1, 2)),  # the same one twice
        ([0.6, 0.4, 0.0, 0.0], [0, 1, 2], [0, 2, 3], (1, 2)),  # a weight of zero does not count
        ([0.4, 0.2, 0.2, 0.2], [0, 1], [0, 3], (0, 2)),  # a tie
        ([0.4, 0.2, 0.2, 0.2], [0, 1], [2, 3], (1, 2)),  # a tie, in place of a better one
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [2, 3], (2, 2)),
    ],
)
def test_missed_routes_by_hand(weights: list[float], chosen: list[int], taken: list[int], missed: object) -> None:
    exact = torch.tensor([[chosen]]), torch.tensor([[weights]], dtype=torch.float64)
    assert correctness._missed({"a": torch.tensor([[taken]])}, {"a": exact}) == missed


def test_attention_without_routing_has_no_flipped_routes() -> None:
    result = correctness.check(Case("window", 8, 8, 16, 2, impl="sdpa", options=(("window_size", 4),)))
    assert result is not None and result.ok and result.flipped is None


@pytest.mark.slow
def test_a_compiled_step_keeps_its_routes_too(compiler: None) -> None:
    subprocess_runner.start()
    case = Case("bra", 8, 8, 8, 2, impl="reference", compiled=True, options=(("n_win", 4),))
    outcome = subprocess_runner.call(correctness.check, case)
    assert outcome.status == "ok", outcome.reason
    assert outcome.value.ok and outcome.value.flipped == 0.0


def test_the_reference_is_not_checked_against_itself() -> None:
    assert correctness.check(Case("full", 6, 6, 8, 2, impl="reference")) is None


def test_a_large_grid_is_checked_at_a_small_size() -> None:
    result = correctness.check(Case("window", 700, 1400, 8, 2, impl="sdpa"))
    assert result is not None and result.ok


@pytest.mark.parametrize(("mode", "batch"), [("forward", 1), ("forward_backward", 2)])
def test_a_model_whose_last_stage_is_one_place_is_checked_on_several_images(mode: Mode, batch: int) -> None:
    options = (("attention", "window"),)
    case = Case("biformer_tiny", 32, 32, None, None, options, kind="model", impl="sdpa", mode=mode, batch=batch)
    result = correctness.check(case)
    assert result is not None and result.ok, result


def test_the_tolerance_follows_the_precision() -> None:
    wide, narrow = (correctness.check(Case("full", 8, 8, 16, 2, impl="sdpa", dtype=d)) for d in ("bf16", "fp32"))
    assert wide is not None and narrow is not None
    assert wide.tolerance > 100 * narrow.tolerance
