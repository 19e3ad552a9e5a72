"""Manhattan, cosine-window, aggregated and super token attention against loops over tokens, and what options change."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import conftest
import pytest
import torch
from softmax_oracles import DIM, HEADS, ORACLES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, Unsupported, build, get
from profiling.cases.case import Case
from profiling.meters import peak_memory

GRIDS = [(4, 6), (5, 7), (1, 4), (1, 1)]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "manhattan": [
        {"lce_kernel": 3},
        {"decomposed": False, "initial_decay": 1.5, "decay_range": 3},
        {"rotary": False, "lce_kernel": 0, "qkv_bias": False},
        {"decomposed": False, "normalise_decay": False, "lce_kernel": 0},
        {"normalise_decay": False},
    ],
    "cosine_window": [
        {"window_size": 2},
        {"window_size": 3, "shift": 1, "pretrained_window_size": 6},
        {"window_size": 8, "qkv_bias": False},
        {"window_size": 4, "shift": 2},
    ],
    "aggregated": [
        {"sr_ratio": 2},
        {"sr_ratio": 3, "window_size": 5, "pretrained_size": 9, "qkv_bias": False},
        {"sr_ratio": 2, "pool_size": 3, "window_size": 1},
        {"sr_ratio": 1},
        {"sr_ratio": 2, "pretrained_size": 5, "position_bias": "interpolated"},
        {"sr_ratio": 1, "pretrained_size": 3, "position_bias": "interpolated"},
        {"sr_ratio": 2, "pretrained_size": 3, "position_bias": "interpolated", "bias_size": 7},
    ],
    "super_token": [
        {"super_token_size": 2},
        {"super_token_size": 3, "iterations": 2, "detach_association": False, "qk_scale": 0.7},
        {"super_token_size": 4, "mask_padding": False},
        {"super_token_size": 2, "refine": "conv", "iterations": 3},
        {"super_token_size": 3, "refine": "none", "detach_association": False, "mask_padding": False},
        {"super_token_size": 1, "qkv_bias": False},
    ],
}
LARGER = [(14, 14), (56, 56), (13, 31), (1, 9)]
CHOSEN = [(name, chosen) for name, of in OPTIONS.items() for chosen in of]
CASES = [(name, impl, chosen) for name, chosen in CHOSEN for impl in get(name).impls]


made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)


def with_gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter; 0 where there is none."""
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    out = run(leaves[0])
    direction = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    found = torch.autograd.grad(out, leaves, direction, allow_unused=True)
    return [out, *(torch.zeros_like(at) if g is None else g for g, at in zip(found, leaves, strict=True))]


def assert_close(result: list[Tensor], exact: list[Tensor]) -> None:
    for a, b in zip(result, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-11 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize(("name", "impl", "chosen"), CASES)
def test_token_by_token(name: str, impl: str, chosen: dict[str, Any]) -> None:
    """Output, input gradient and every parameter's."""
    for grid in GRIDS:
        module, x = made(name, impl, **chosen), image(*grid, batch=2 if grid == (4, 6) else 1)
        try:
            result = with_gradients(module, module, x)
        except Unsupported:
            assert (impl, chosen["normalise_decay"]) == ("sdpa", False)
            continue
        exact = with_gradients(lambda x, m=module: torch.stack([ORACLES[name](m, one) for one in x]), module, x)
        assert_close(result, exact)


@pytest.mark.parametrize(("name", "impl", "chosen"), CASES)
def test_macs_equal_the_count(name: str, impl: str, chosen: dict[str, Any]) -> None:
    for options, (height, width) in product((chosen, {}), LARGER):
        module = build(name, dim=DIM, num_heads=HEADS, impl=impl, **options).to("meta")
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(torch.empty(1, height, width, DIM, device="meta"))
        except Unsupported:
            continue
        assert module.macs(height, width).total == counter.get_total_flops() // 2, (options, height, width)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "impl", "chosen"), CASES)
def test_predicted_memory_of_a_ragged_grid_is_the_measured(name: str, impl: str, chosen: dict[str, Any]) -> None:
    case = Case(name, 13, 31, impl=impl, mode="forward_backward", options=tuple(chosen.items()))
    try:
        measured, predicted = peak_memory.measure(case.workload("cpu")), peak_memory.predict(case.workload("meta"))
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert predicted.base == measured.base
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


@pytest.mark.parametrize(("name", "chosen"), CHOSEN)
def test_gradients_by_finite_differences(name: str, chosen: dict[str, Any]) -> None:
    if name == "super_token":
        chosen = chosen | {"detach_association": False}
    module, x = made(name, **chosen), image(3, 4, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, x, fast_mode=True, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize(("name", "chosen"), CHOSEN)
def test_bf16_is_near_fp64(name: str, chosen: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module, x = build(name, dim=DIM, num_heads=HEADS, impl="reference", **chosen).double(), image(9, 10)
    with torch.no_grad():
        exact, rounded = module(x), module.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("name", ["manhattan", "cosine_window", "aggregated"])
def test_tables_can_be_rounded_as_published(name: str) -> None:
    module, x = made(name), image(9, 10)
    exact = module(x)
    module.table_dtype = torch.float32
    assert 0 < (module(x) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_decay_of_one_row_is_the_same_along_the_axes_and_over_the_grid() -> None:
    x = image(1, 9)
    assert_close([made("manhattan")(x)], [made("manhattan", decomposed=False)(x)])


def test_without_decay_and_rotation_manhattan_does_not_see_where_tokens_are() -> None:
    module, x = made("manhattan", decomposed=False, rotary=False, lce_kernel=0, initial_decay=60), image(4, 5)
    order = torch.randperm(20)
    assert_close([module(x.flatten(1, 2)[:, order].view_as(x))], [module(x).flatten(1, 2)[:, order].view_as(x)])


def test_exponents_follow_the_options() -> None:
    for name, chosen, exponent in (
        ("manhattan", {}, 1.5),
        ("manhattan", {"decomposed": False}, 2),
        ("aggregated", {}, 2),
        ("aggregated", {"pool_size": 7}, 1),
        ("aggregated", {"pool_size": 7, "sr_ratio": 1}, 2),
        ("super_token", {}, 2),
        ("super_token", {"refine": "conv"}, 1),
        ("cosine_window", {}, 1),
    ):
        module = build(name, dim=DIM, num_heads=HEADS, **chosen)
        small, large = (module.macs(side, side) for side in (896, 1792))
        growth = (large.attention + large.routing) / max(small.attention + small.routing, 1)
        assert module.exponent == exponent
        if small.attention:
            assert growth == pytest.approx(4**exponent, rel=5e-3), (name, chosen)


def test_the_cosine_has_a_largest_scale() -> None:
    module, x = made("cosine_window", window_size=4), image(4, 4)
    with torch.no_grad():
        module.logit_scale.fill_(torch.tensor(100.0, dtype=torch.float64).log())
        largest = module(x)
        module.logit_scale.fill_(9.0)
        assert (module(x) - largest).abs().max() < 1e-5 * largest.abs().max()
        module.logit_scale.fill_(2.0)
        assert (module(x) - largest).abs().max() > 1e-3 * largest.abs().max()


def test_the_length_of_queries_and_keys_does_not_matter_to_a_cosine() -> None:
    for name in ("cosine_window", "aggregated"):
        module, x = made(name, qkv_bias=False), image(8, 9)
        before = module(x)
        with torch.no_grad():
            (module.q if name == "aggregated" else module.qkv).weight[:DIM] *= 3
        assert_close([module(x)], [before])


def test_padding_lowers_the_averages_of_super_tokens_unless_masked() -> None:
    """An image of one value stays so, whatever its size, if padding belongs to no super token."""
    x = torch.ones(1, 5, 7, DIM, dtype=torch.float64)
    masked = made("super_token", super_token_size=4, refine="none")
    padded = made("super_token", super_token_size=4, refine="none", mask_padding=False)
    shares = masked(x)[..., 0]
    assert (shares <= 1 + 1e-12).all() and (shares > 0.5).any()
    assert (padded(x)[..., 0] < shares + 1e-12).all() and (padded(x)[..., 0] < shares - 0.01).any()


def test_a_detached_association_changes_gradients_only() -> None:
    x = image(6, 8).requires_grad_()
    out = [made("super_token", super_token_size=2, detach_association=detach)(x) for detach in (True, False)]
    assert torch.equal(*out)
    detached, whole = (torch.autograd.grad(one.square().sum(), x)[0] for one in out)
    assert (detached - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("manhattan", {"num_heads": 4}, "even number of channels per head, not dim / num_heads = 3"),
        ("manhattan", {"lce_kernel": 4}, "lce_kernel=4 is even"),
        ("manhattan", {"initial_decay": 0}, "initial_decay=0 is not valid; valid: a number >= 0.01"),
        ("cosine_window", {"window_size": 1}, "window_size=1 is not valid; valid: an integer >= 2"),
        ("cosine_window", {"shift": 8}, "valid: 0 to window_size - 1 = 7"),
        ("cosine_window", {"pretrained_window_size": 1}, "valid: an integer >= 2, none"),
        ("aggregated", {"window_size": 4}, "window_size=4 is even"),
        ("aggregated", {"position_bias": "interpolated"}, "needs pretrained_size; valid: an integer >= 2"),
        ("aggregated", {"bias_size": 9}, "bias_size=9 needs position_bias='interpolated'"),
        ("super_token", {"super_token_size": 1, "refine": "none"}, "valid refine: attention, conv"),
    ],
)
def test_invalid_options_are_rejected_with_the_valid(name: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        build(name, **({"dim": DIM, "num_heads": HEADS} | chosen))
