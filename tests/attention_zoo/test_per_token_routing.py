"""BRA whose tokens, not regions, choose key regions."""

from typing import Any

import pytest
import torch
from bra_options_oracle import AROUND, GATE, TOKEN, exact
from bra_oracle import draw, relative

from attention_zoo import Unsupported
from attention_zoo.visualize import receptive_field, routes


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("more", [{}, dict(soft_routing=True), GATE], ids=str)
def test_regions_of_one_token_are_routed_as_their_token(more: dict[str, Any], impl: str) -> None:
    tokens, whole = (draw(impl, grid=(6, 6), n_win=6, topk=5, per_token_routing=on, **more) for on in (True, False))
    assert relative(tokens.module(tokens.x), whole.module(whole.x)) < 1e-12


def test_routing_to_all_regions_is_alike_for_tokens_and_regions() -> None:
    tokens, whole = (draw(topk=16, per_token_routing=on) for on in (True, False))
    assert relative(tokens.module(tokens.x), whole.module(whole.x)) < 1e-12
    fewer, some = (draw(topk=3, per_token_routing=on) for on in (True, False))
    assert relative(fewer.module(fewer.x), some.module(some.x)) > 1e-3


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_token_looks_only_at_its_own_regions(impl: str) -> None:
    """One head, unlike its neighbour, reads no token of a region that it did not choose."""
    drawn = draw(impl, **TOKEN, topk=2, heads=1, side_dwconv=0)
    index = drawn.module.routes(drawn.x)[0]  # type: ignore[operator]
    assert any(len(set(map(tuple, tile.sort(-1).values.flatten(0, 1).tolist()))) > 1 for tile in index[0].split(2, 1))
    for row, column in ((0, 0), (3, 5), (7, 7)):
        x = drawn.x.clone().requires_grad_()
        drawn.module(x)[0, row, column].sum().backward()
        met = x.grad.abs().sum(-1)[0].view(4, 2, 4, 2).sum((1, 3)).flatten() > 1e-12
        own = {row // 2 * 4 + column // 2}
        assert set(met.nonzero().flatten().tolist()) | own == set(index[0, row, column].tolist()) | own


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "around",
    ["unmodified", "masked, whole regions", "padded"],
)
def test_routes_of_tokens_lie_on_the_grid(around: str, impl: str) -> None:
    drawn = draw(impl, **TOKEN | AROUND[around] | (dict(grid=(7, 11), batch=2) if around == "padded" else {}))
    try:
        index, weight = drawn.module.routes(drawn.x)  # type: ignore[operator]
    except Unsupported as reason:
        pytest.skip(str(reason))
    expected = exact(drawn)
    assert index.shape == weight.shape == (*drawn.x.shape[:3], expected.index[0].shape[-1])
    assert torch.equal(index.flatten(1, 2), torch.stack(expected.index))
    assert relative(weight.flatten(1, 2), torch.stack(expected.weight)) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_routes_of_tokens_can_be_imposed(impl: str) -> None:
    drawn = draw(impl, **TOKEN, topk=3)
    drawn.module.keep_routes = True
    before = drawn.module(drawn.x)
    router: Any = drawn.module.router
    router.imposed = drawn.module.kept_routes.flip(-1)
    assert relative(drawn.module(drawn.x), before) < 1e-12
    router.imposed = (drawn.module.kept_routes + 1) % 16
    assert relative(drawn.module(drawn.x), before) > 1e-3


def test_drawn_routes_are_those_of_the_token_asked_for() -> None:
    picture = torch.rand(3, 40, 60)
    side, channels = 7, receptive_field.DIM
    grid = side * -(-receptive_field.GRID // side)
    x = receptive_field.features(picture, grid, grid)[0]
    keys = x.view(side, grid // side, side, grid // side, channels).mean((1, 3)).flatten(0, 1)
    drawn = set()
    for query in ((39, 30), (36, 26), (0, 0)):
        result = routes.by_appearance(picture, query, **TOKEN)
        token = x[query[0] * grid // 40, query[1] * grid // 60]
        best, index = (token @ keys.T * channels**-0.5).topk(8)
        assert result.ranked[8][0] == index.tolist()
        torch.testing.assert_close(torch.tensor(result.ranked[8][1]), best.softmax(0))
        drawn.add((result.region, tuple(result.ranked[8][0])))
    assert len(drawn) == 3 and len({region for region, _ in drawn}) == 2
