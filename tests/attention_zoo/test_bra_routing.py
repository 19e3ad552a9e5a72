"""BRA's routes: how they are chosen, their gradients, and the number of regions."""

from contextlib import suppress

import pytest
import torch
from bra_oracle import Drawn, as_function, draw, inputs, kv, oracle, relative, run_or_skip
from torch import Tensor, nn

from attention_zoo import Unsupported, build, get
from attention_zoo.attentions.bra.routing import optimal_regions_per_side


def test_routes() -> None:
    drawn = draw(batch=2, grid=(8, 12), topk=5)
    index, weight = drawn.module.routes(drawn.x)
    exact = drawn.oracle()
    assert torch.equal(index, exact.index)
    assert relative(weight, exact.weight) < 1e-12
    assert index.shape == weight.shape == (2, 16, 5)
    assert torch.allclose(weight.sum(-1), torch.ones(2, 16, dtype=weight.dtype), atol=1e-12)
    assert (weight.diff(dim=-1) <= 0).all() and weight[..., 0].min() > weight[..., -1].max() / 10
    assert all(len(set(row)) == 5 for row in index.flatten(0, 1).tolist())
    assert not weight.requires_grad


def gradients(drawn: Drawn, output_gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = drawn.module(drawn.x)
    return out, dict(
        zip(
            dict(drawn.module.named_parameters()),
            torch.autograd.grad(out, list(drawn.module.parameters()), output_gradient),
            strict=True,
        )
    )


def test_differentiable_hard_routing_is_plain_forward_and_soft_backward() -> None:
    unmodified, hard = draw(), draw(diff_routing=True)
    output_gradient = torch.randn_like(unmodified.x)
    (out, detached), (same, through) = gradients(unmodified, output_gradient), gradients(hard, output_gradient)
    assert torch.equal(out, same)
    assert relative(through["qkv.qkv.weight"][:24], detached["qkv.qkv.weight"][:24]) > 1e-3
    assert relative(through["qkv.qkv.weight"][24:], detached["qkv.qkv.weight"][24:]) < 1e-12


def test_differentiable_hard_routing_by_finite_differences() -> None:
    """Linearised about its routing weights, hard routing is differentiable."""
    drawn = draw(param_routing=True, diff_routing=True, topk=3)
    output_gradient = torch.randn_like(drawn.x)
    result = gradients(drawn, output_gradient)[1]
    at = drawn.oracle().weight.detach()

    def loss(name: str, entry: tuple[int, ...], step: float) -> float:
        weights = drawn.weights()
        weights[name].data[entry] += step
        return (oracle(weights, drawn.x, 2, at, **drawn.options).out * output_gradient).sum().item()

    for name, entry in (("router.emb.weight", (2, 5)), ("router.emb.bias", (7,)), ("qkv.qkv.weight", (13, 4))):
        slope = (loss(name, entry, 1e-5) - loss(name, entry, -1e-5)) / 2e-5
        assert abs(slope) > 1e-3
        assert result[name][entry].item() == pytest.approx(slope, rel=1e-6)


def test_soft_routing_alone_sends_nothing_back_through_the_routes() -> None:
    soft, both = draw(soft_routing=True), draw(soft_routing=True, diff_routing=True)
    output_gradient = torch.randn_like(soft.x)
    (out, detached), (same, through) = gradients(soft, output_gradient), gradients(both, output_gradient)
    assert torch.equal(out, same)
    fixed = soft.oracle().weight.detach()
    hard = soft.options | dict(soft_routing=False)

    def loss(step: float) -> float:
        weights = soft.weights()
        weights["qkv.qkv.weight"].data[13, 4] += step
        # Linear hard routing has the gate 1 + weight - hard_at: this makes it ``fixed``, whatever the weights.
        hard_at = 1 + oracle(weights, soft.x, 2, **hard).weight - fixed
        return (oracle(weights, soft.x, 2, hard_at, **hard).out * output_gradient).sum().item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert detached["qkv.qkv.weight"][13, 4].item() == pytest.approx(slope, rel=1e-6)
    assert through["qkv.qkv.weight"][13, 4].item() != pytest.approx(slope, rel=1e-2)


def test_routing_parameters_get_gradients() -> None:
    for soft in (False, True):
        drawn = draw(param_routing=True, diff_routing=True, soft_routing=soft)
        result = gradients(drawn, torch.randn_like(drawn.x))[1]
        assert result["router.emb.weight"].norm() > 1e-3 and result["router.emb.bias"].norm() > 1e-3


STAGES = [(56, 1, 13.0, 14), (28, 4, 10.4, 14), (14, 16, 8.2, 7)]


@pytest.mark.parametrize(("side", "topk", "optimum", "chosen"), STAGES)
def test_auto_regions_of_the_models_stages(side: int, topk: int, optimum: float, chosen: int) -> None:
    assert round(optimal_regions_per_side(side * side, topk), 1) == optimum
    auto = build("bra", dim=8, num_heads=2, n_win="auto", topk=topk)
    admissible = [s for s in range(1, side + 1) if side % s == 0 and s * s >= topk]
    cost = {s: build("bra", dim=8, num_heads=2, n_win=s, topk=topk).macs(side, side).total for s in admissible}
    assert auto.regions_per_side(side, side) == min(cost, key=cost.__getitem__) == chosen
    assert auto.macs(side, side).total == cost[chosen]


@pytest.mark.parametrize("auto_pad", [False, True])
@pytest.mark.parametrize("topk", [1, 4, 9])
@pytest.mark.parametrize("grid", [(56, 56), (28, 42), (16, 64), (60, 36), (37, 37), (100, 40)])
def test_auto_regions_cost_least(grid: tuple[int, int], topk: int, auto_pad: bool) -> None:
    def built(n_win: int | str) -> nn.Module:
        return build("bra", dim=8, num_heads=2, n_win=n_win, topk=topk, auto_pad=auto_pad)

    admissible = [
        s for s in range(1, min(grid) + 1) if s * s >= topk and (auto_pad or not (grid[0] % s or grid[1] % s))
    ]
    assert built("auto").macs(*grid).total == min(built(s).macs(*grid).total for s in admissible)


def test_auto_regions_give_the_result_of_that_number() -> None:
    auto = draw(n_win="auto", topk=2, grid=(12, 12))
    chosen = auto.module.regions_per_side(12, 12)
    assert 12 % chosen == 0
    fixed = draw(n_win=chosen, topk=2, grid=(12, 12))
    assert torch.equal(auto.module(auto.x), fixed.module(auto.x))


TINY = {
    "plain": dict(),
    "pooled by a convolution": kv("conv", downsample_ratio=2),
    "soft and differentiable": dict(param_routing=True, diff_routing=True, soft_routing=True),
    "masked": dict(grid=(3, 3), auto_pad=True, mask_padding=True),
    "masked, soft, pooled": dict(grid=(3, 3), auto_pad=True, mask_padding=True, diff_routing=True, soft_routing=True)
    | kv("ada_avgpool", per_win=1),
}


@pytest.mark.parametrize("impl", get("bra").impls)
@pytest.mark.parametrize("name", TINY)
def test_gradcheck(name: str, impl: str) -> None:
    drawn = draw(impl, **dict(dim=4, grid=(4, 4), n_win=2, topk=2, side_dwconv=3) | TINY[name])
    run_or_skip(drawn.module, drawn.x)
    assert torch.autograd.gradcheck(as_function(drawn.module), tuple(inputs(drawn)), fast_mode=True)


@pytest.mark.parametrize("impl", get("bra").impls)
def test_second_derivatives_are_correct_or_unsupported(impl: str) -> None:
    drawn = draw(impl, dim=4, grid=(4, 4), n_win=2, topk=2, side_dwconv=0)
    with suppress(Unsupported):
        assert torch.autograd.gradgradcheck(as_function(drawn.module), tuple(inputs(drawn)), fast_mode=True)
