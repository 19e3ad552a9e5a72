"""What BRA's coarse_gate and per_token_routing cost."""

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from bra_options_oracle import BOTH, CASES, CHOSEN, GATE, TOKEN
from bra_oracle import draw, run_or_skip
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import MODELS, Unsupported, build, get
from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.meters import macs, peak_memory

IMPLS = get("bra").impls


def test_macs_by_hand() -> None:
    """A 56 x 56 grid of 7 x 7 regions, dim 64, topk 4: the split of each option against that without."""
    off, gate, token, both = (
        build("bra", dim=64, num_heads=2, n_win=7, topk=4, **chosen).macs(56, 56)  # type: ignore[operator]
        for chosen in ({}, GATE, TOKEN, BOTH)
    )
    assert (off.projection, off.routing, off.attention) == (4 * 3136 * 64**2, 49**2 * 64, 3136 * 256 * 128)
    assert (gate.projection, gate.routing) == (5 * 3136 * 64**2, 49**2 * 64)
    assert (token.projection, token.routing, token.attention) == (off.projection, 3136 * 49 * 64, off.attention)
    assert gate.attention == off.attention + 49**2 * 128 == both.attention
    assert (both.projection, both.routing) == (gate.projection, token.routing)
    assert len({part.local_conv for part in (off, gate, token, both)}) == 1


@pytest.mark.parametrize("chosen", CASES)
def test_macs_and_key_count_are_what_runs(chosen: dict[str, Any]) -> None:
    for impl in IMPLS:
        drawn = draw(impl, **chosen)
        height, width = drawn.x.shape[1:3]
        module = drawn.module.float().to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad(), suppress(Unsupported):
            module(drawn.x[:1].float().to("meta"))
            assert module.macs(height, width).total == counter.get_total_flops() // 2, impl  # type: ignore[operator]
        assert counter.get_total_flops() or impl != "reference"
    without = draw(impl, **chosen | dict(coarse_gate=False)).module
    coarse = module.regions_per_side(height, width) ** 2 if chosen.get("coarse_gate") else 0  # type: ignore[operator]
    keys = (m.kv_tokens_per_query(height, width) for m in (module, without))  # type: ignore[operator]
    assert next(keys) == next(keys) + coarse


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_fvcore_counts_them(chosen: dict[str, Any], impl: str, unchecked: None) -> None:
    drawn = draw(impl, **chosen, topk=3)
    run_or_skip(drawn.module, drawn.x)
    assert macs.by_fvcore(Workload(drawn.module, drawn.x)) == drawn.module.macs(8, 8).total  # type: ignore[operator]


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("auto_pad", [False, True])
@pytest.mark.parametrize("grid", [(56, 56), (16, 64), (60, 36), (37, 37)])
def test_auto_regions_cost_least(grid: tuple[int, int], auto_pad: bool, chosen: dict[str, Any]) -> None:
    def built(n_win: int | str) -> Any:
        return build("bra", dim=8, num_heads=2, n_win=n_win, topk=4, auto_pad=auto_pad, **chosen)

    admissible = [s for s in range(2, min(grid) + 1) if auto_pad or not (grid[0] % s or grid[1] % s)]
    if admissible:
        assert built("auto").macs(*grid).total == min(built(s).macs(*grid).total for s in admissible)


def test_exponents() -> None:
    def exponent(**chosen: Any) -> float:
        return build("bra", dim=8, num_heads=2, **chosen).exponent  # type: ignore[return-value]

    assert [exponent(n_win="auto", **chosen) for chosen in CHOSEN.values()] == [4 / 3, 3 / 2, 3 / 2]
    assert [exponent(**chosen) for chosen in CHOSEN.values()] == [2, 2, 2]
    for chosen, power in (({}, 4 / 3), (TOKEN, 3 / 2)):
        # From 64 to 4096 tokens per side the best S grows by a whole number of doublings.
        auto = build("bra", dim=8, num_heads=2, n_win="auto", **chosen)
        costs = [auto.macs(side, side) for side in (2**6, 2**12)]  # type: ignore[operator]
        small, large = (cost.routing + cost.attention for cost in costs)
        assert math.log(large / small, 2**12) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_predicted_memory_is_the_measured(chosen: dict[str, Any], impl: str, mode: Any) -> None:
    case = Case("bra", 28, 28, options=tuple(chosen.items()), impl=impl, mode=mode)
    measured, predicted = peak_memory.measure(case.workload("cpu")), peak_memory.predict(case.workload("meta"))
    assert predicted.base == measured.base < predicted.peak
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


def test_a_model_with_them_counts_its_macs() -> None:
    with torch.device("meta"):
        model, x = MODELS["biformer_tiny"](**BOTH), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        assert model.macs(224, 224).total == counter.get_total_flops() // 2  # type: ignore[operator]
