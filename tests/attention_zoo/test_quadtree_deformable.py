"""Quadtree and deformable attention against loops over tokens, with weights in the layout of the authors' code.

The loops and the layouts are in ``sampled_oracles.py``.
"""

import math
from collections.abc import Callable
from functools import partial

import conftest
import pytest
import torch
from sampled_oracles import (
    DIM,
    HEADS,
    Place,
    State,
    deformable_from,
    deformable_oracle,
    deformable_shapes,
    drawn,
    quadtree_from,
    quadtree_oracle,
    quadtree_shapes,
)
from torch import Tensor, nn

from attention_zoo import InvalidOption, build, get, options
from attention_zoo.attentions import quadtree

made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)


def loaded(module: nn.Module, mapped: State) -> nn.Module:
    module.load_state_dict(mapped, strict=True)
    return module


def with_input_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = run(x)
    direction = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out.detach(), torch.autograd.grad(out, x, direction)[0]


def assert_equal(module: nn.Module, oracle: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Output and input gradient of one image, relative to their largest value."""
    exact = with_input_gradient(lambda x: oracle(x[0])[None], x)
    for result, value in zip(with_input_gradient(module, x), exact, strict=True):
        assert (result - value).abs().max() < 1e-12 * value.abs().max()


# Deformable


@pytest.mark.parametrize("impl", get("deformable").impls)
@pytest.mark.parametrize(
    ("kind", "factor", "stride", "kernel", "side", "grid"),
    [
        ("shifted", -1, 8, 9, 12, (12, 12)),
        ("shifted", -1, 2, 5, 7, (5, 7)),
        ("shifted", 2, 2, 5, 6, (6, 6)),
        ("shifted", 0, 2, 3, 4, (4, 5)),
        ("centres", 2, 1, 3, 4, (4, 4)),
        ("centres", 2, 1, 5, 5, (3, 5)),
        ("centres", 2.5, 3, 5, 5, (7, 5)),
        ("centres", -1, 2, 5, 5, (5, 4)),
        ("paper", 2.5, 3, 3, 5, (7, 5)),
        ("paper", -1, 2, 5, 7, (6, 8)),
        ("paper", 0, 1, 3, 4, (3, 4)),
        ("paper", 2, 2, 5, 3, (1, 5)),
        ("shifted", -1, 4, 7, 3, (3, 9)),
    ],
)
def test_deformable_point_by_point(
    kind: str, factor: float, stride: int, kernel: int, side: int, grid: Place, impl: str
) -> None:
    """The code of 2022: centres, factor 2, stride 1, table and grid of one size. That of 2023: shifted, factor -1."""
    state = drawn(deformable_shapes(kernel, 2, side))
    chosen = {"stride": stride, "offset_kernel": kernel, "table_side": side, "offset_groups": 2}
    module = made("deformable", impl, offset_range_factor=factor, reference_points=kind, **chosen)
    loaded(module, deformable_from(state, offsets=factor != 0))
    oracle = partial(deformable_oracle, state, stride=stride, groups=2, kind=kind, factor=factor)
    assert_equal(module, oracle, image(*grid, batch=1))
    assert module.kv_tokens_per_query(*grid) == math.ceil(grid[0] / stride) * math.ceil(grid[1] / stride)


def test_deformable_without_position_bias() -> None:
    state = drawn(deformable_shapes(5, 4, 2))
    module = made("deformable", stride=2, offset_kernel=5, offset_groups=4, relative_position_bias=False)
    loaded(module, deformable_from(state, biased=False))
    oracle = partial(deformable_oracle, state, stride=2, groups=4, kind="shifted", factor=-1, biased=False)
    assert_equal(module, oracle, image(5, 6, batch=1))


def test_deformable_stages_are_those_of_dat_plus_plus_tiny() -> None:
    """Stride, kernel, groups and table per stage, whose heads are 2, 4, 8, 16; the defaults are the first."""
    stages = [dict(zip(get("deformable").by_stage, values, strict=True))
              for values in zip(*get("deformable").by_stage.values(), strict=True)]  # fmt: skip
    assert [tuple(stage.values()) for stage in stages] == [(8, 9, 1, 56), (4, 7, 2, 28), (2, 5, 4, 14), (1, 3, 8, 7)]
    for stage, (dim, heads) in zip(stages, ((64, 2), (128, 4), (256, 8), (512, 16)), strict=True):
        with torch.device("meta"):
            module = build("deformable", dim=dim, num_heads=heads, **stage)
        side = 2 * stage["table_side"] - 1
        assert module.relative_position_bias_table.shape == (heads, side, side)
        assert module.offset.depthwise.weight.shape == (
            dim // stage["offset_groups"],
            1,
            *2 * (stage["offset_kernel"],),
        )
        assert module.kv_tokens_per_query(stage["table_side"], stage["table_side"]) == 49
    with torch.device("meta"):
        module = build("deformable", dim=64, num_heads=2)
    assert (module.stride, module.groups, module.reach, module.reference_points) == (8, 1, -1, "shifted")


def test_fixed_points_on_every_token_are_full_attention() -> None:
    chosen = {"stride": 1, "offset_range_factor": 0, "relative_position_bias": False}
    module, x = made("deformable", reference_points="paper", **chosen), image(5, 7)
    full = made("full", qkv_bias=True)
    full.qkv.weight.data, full.qkv.bias.data = (
        torch.cat([getattr(module.q, kind), getattr(module.kv, kind)]).data for kind in ("weight", "bias")
    )
    full.proj.load_state_dict(module.proj.state_dict())
    assert (module(x) - full(x)).abs().max() < 1e-12


def test_invalid_deformable_options_are_rejected() -> None:
    for chosen, said in (
        ({"offset_groups": 3}, "does not divide"),
        ({"offset_kernel": 4}, "odd"),
        ({"offset_range_factor": -2}, "valid: -1, a number >= 0"),
        ({"reference_points": "corners"}, "valid: paper, centres, shifted"),
        ({"table_side": 1}, "an integer >= 2"),
    ):
        with pytest.raises(InvalidOption, match=said):
            build("deformable", dim=DIM, num_heads=HEADS, **chosen)


# Quadtree


BACKBONE = [
    (3, 2, (8, 8)), (2, 2, (6, 8)), (3, 3, (4, 12)), (2, 3, (5, 7)), (3, 2, (7, 9)), (2, 99, (4, 6)), (1, 8, (3, 4)),
    (4, 8, (6, 5)), (3, 2, (1, 3)),
]  # fmt: skip
"""Levels, topk and grid; the last two grids are too small for all levels."""


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(("levels", "topk", "grid"), BACKBONE)
def test_quadtree_of_the_backbone_token_by_token(levels: int, topk: int, grid: Place, impl: str) -> None:
    state = drawn(quadtree_shapes(levels))
    module = loaded(made("quadtree", impl, levels=levels, topk=topk), quadtree_from(state))
    used = module.depth(*grid) + 1
    assert used == min(levels, 1 + int(math.log2(min(grid))))
    assert_equal(module, partial(quadtree_oracle, state, topk=topk, levels=used), image(*grid, batch=1))


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(("learned", "lepe"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("levels", "topk", "grid"), [(3, 2, (8, 8)), (3, 2, (7, 9)), (2, 3, (5, 6))])
def test_quadtree_of_feature_matching_token_by_token(
    levels: int, topk: int, grid: Place, learned: bool, lepe: bool, impl: str
) -> None:
    """Without bias, averaged values and no LePE: as published; and each of the two alone."""
    state = drawn(quadtree_shapes(levels, bias=False))
    pooling = "learned" if learned else "average"
    module = made("quadtree", impl, levels=levels, topk=topk, value_pooling=pooling, lepe=lepe, qkv_bias=False)
    loaded(module, quadtree_from(state, learned, lepe))
    oracle = partial(quadtree_oracle, state, topk=topk, levels=levels, learned=learned, lepe=lepe)
    assert_equal(module, oracle, image(*grid, batch=1))


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(("topk", "coarsest"), [(2, 4), (3, 1)])
def test_the_coarsest_level_has_a_topk_of_its_own(topk: int, coarsest: int, impl: str) -> None:
    state = drawn(quadtree_shapes(3, bias=False))
    chosen = {"topk": topk, "coarsest_topk": coarsest, "value_pooling": "average", "lepe": False, "qkv_bias": False}
    module = loaded(made("quadtree", impl, levels=3, **chosen), quadtree_from(state, False, False))
    oracle = partial(quadtree_oracle, state, topk=topk, coarsest_topk=coarsest, levels=3, learned=False, lepe=False)
    assert_equal(module, oracle, image(8, 12, batch=1))
    assert module.kv_tokens_per_query(8, 12) == 6 + 4 * coarsest + 4 * topk


def test_quadtree_of_detection_has_relu() -> None:
    state = drawn(quadtree_shapes(3))
    module = loaded(made("quadtree", levels=3, topk=3, activation="relu"), quadtree_from(state))
    oracle = partial(quadtree_oracle, state, topk=3, levels=3, activation=lambda x: x.clamp_min(0))
    assert_equal(module, oracle, image(7, 8, batch=1))


def test_quadtree_stages_are_the_published() -> None:
    assert get("quadtree").by_stage == {"levels": (4, 3, 2, 1)}
    defaults = {name: option.default for name, option in options("quadtree").items()}
    assert defaults == {
        "levels": 4, "topk": 8, "coarsest_topk": None, "value_pooling": "learned", "activation": "gelu", "lepe": True,
        "qkv_bias": True,
    }  # fmt: skip
    for side, levels in zip((56, 28, 14, 7), (4, 3, 2, 1), strict=True):
        module = build("quadtree", dim=DIM, num_heads=HEADS, levels=levels)
        assert module.depth(side, side) == levels - 1
        assert module.kv_tokens_per_query(side, side) == 49 + 32 * (levels - 1)


def test_z_order_keeps_quadtree_cells_contiguous() -> None:
    grid = torch.arange(8 * 12).view(1, 8, 12, 1)
    order = quadtree.to_z_order(grid, 2)[0, :, 0]
    for level in (1, 2):
        for family in order.view(-1, 4**level):
            places = torch.stack([family // 12, family % 12]) // 2**level
            assert (places == places[:, :1]).all()
    assert torch.equal(quadtree.from_z_order(order[None, :, None], 8, 12, 2), grid)


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(("levels", "grid"), [(1, (6, 5)), (3, (1, 9)), (2, (1, 1))])
def test_one_level_without_lepe_is_full_attention(levels: int, grid: Place, impl: str) -> None:
    module, x = made("quadtree", impl, levels=levels, lepe=False), image(*grid)
    full = made("full", qkv_bias=True)
    full.load_state_dict({name: value for name, value in module.state_dict().items() if name[:4] in ("qkv.", "proj")})
    assert module.depth(*grid) == 0
    assert (module(x) - full(x)).abs().max() < 1e-12
