"""BRA's Triton kernels one by one: routes, their inverse, sums; layouts, equal bits and long offsets."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bra_triton_setting import DEVICE, FEW, GPU, Launches, arguments, backward, kernels, made, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_zoo import build
from attention_zoo.attentions.bra import triton_ops as bra
from attention_zoo.attentions.bra import triton_tiles
from attention_zoo.attentions.bra.routing import Router
from attention_zoo.attentions.bra.triton_tiles import VISITS, chunk_of


@pytest.mark.parametrize(("side", "topk", "channels"), [(1, 1, 3), (3, 9, 40), (7, 4, 32), (14, 16, 24)])
def test_routes_are_those_of_the_router(side: int, topk: int, channels: int) -> None:
    side = min(side, 14 if GPU else 4)
    tokens = torch.randn(1, side, side, 2 * channels + 5, device=DEVICE)
    index, strength, pooled = bra.bra_route(tokens, channels, side, min(topk, side**2), 0.3)
    assert torch.equal(pooled, tokens[..., : 2 * channels].flatten(1, 2))
    q, k = pooled.double().chunk(2, dim=-1)
    expected, weight = Router(channels, index.shape[2], 0.3, False, False)(q, k)
    assert torch.equal(index, expected)
    assert (strength - weight).abs().max() < 1e-6


def test_equal_scores_and_scores_that_are_not_numbers_stay_inside_the_grid() -> None:
    tokens = torch.ones(2, 2, 2, 8, device=DEVICE)
    tokens[1] = float("nan")
    index = bra.bra_route(tokens, 4, 2, 4, 1.0)[0]
    assert index[0].tolist() == [[0, 1, 2, 3]] * 4
    assert index.min() >= 0 and index.max() < 4


def test_pooled_regions_are_means() -> None:
    x = torch.randn(2, 6, 15, 70, device=DEVICE)[..., 1:68]
    means = x[..., :66].double().unflatten(2, (3, 5)).unflatten(1, (3, 2)).mean((2, 4)).flatten(1, 2)
    assert (bra.bra_route(x, 33, 3, 1, 1.0)[2] - means).abs().max() < 1e-6


def inverted(index: Tensor) -> tuple[Tensor, ...]:
    """What a backward pass over regions of one token each leaves: the visits, where they begin, slots."""
    batch, regions = index.shape[:2]
    side = math.isqrt(regions)
    grid = torch.zeros(batch, side, side, 48, device=DEVICE)
    given = arguments(tokens=grid, index=index, factor=None, valid=None, qk_dim=16, heads=1, side=side)
    with pytest.MonkeyPatch.context() as patch:
        # The kernel of the queries inverts routes; to interpret the others would take most of a minute.
        for name in ("attend_forward", "attend_backward_keys", "finish_keys"):
            patch.setattr(kernels, name, Launches([]))
        *_, visitors, tables = backward(torch.zeros_like(grid[..., :16]), given)
    return visitors, *bra.tables_of(tables, regions)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where regions are small."""
    monkeypatch.setattr(triton_tiles, "QUERIES", 1)


def test_inverted_routes() -> None:
    index = torch.tensor([[[0, 2], [2, 1], [2, 0], [1, 2]], [[3, 3], [3, 3], [3, 3], [3, 3]]], device=DEVICE)
    visitors, starts, *_ = inverted(index)
    assert visitors.tolist() == [[0, 5, 3, 6, 1, 2, 4, 7], list(range(8))]
    assert starts.tolist() == [[0, 2, 4, 8, 8], [0, 0, 0, 0, 8]]


def hub(regions: int, topk: int) -> Tensor:
    """Every region is routed to region 1, and to its own and the next ones."""
    chosen = [[1, *[(own + at) % regions for at in range(regions) if (own + at) % regions != 1][: topk - 1]]
              for own in range(regions)]  # fmt: skip
    return torch.tensor([chosen], device=DEVICE)


def walks(starts: Tensor, slots: Tensor, first_slots: Tensor) -> list[int]:
    """How many visits each program that does something walks through, of one image."""
    counts = starts[0].diff().tolist()
    owners = [region for region in slots[0].tolist() if region >= 0]
    split = [min(VISITS, counts[r] - VISITS * (at - first_slots[0, r].item())) for at, r in enumerate(owners)]
    return [count for count in counts if count <= VISITS] + split


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("regions", "topk"), [(49, 4), (16, 1), (100, 4), (25, 25)])
def test_a_region_that_all_choose_is_split_into_short_walks(regions: int, topk: int) -> None:
    _, starts, first_slots, slots = inverted(hub(regions, topk))
    result = walks(starts, slots, first_slots)
    assert starts[0].diff()[1] == regions
    assert max(result) <= VISITS and sum(result) == regions * topk


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("grid", "n_win", "topk"), [(112, 7, 4), (224, 7, 4), (256, 16, 1), (256, 16, 4)])
def test_no_program_walks_far_with_routes_of_a_router(grid: int, n_win: int, topk: int) -> None:
    module = build("bra", dim=64, num_heads=2, n_win=n_win, topk=topk, impl="reference").to(DEVICE)
    with torch.no_grad():
        _, index, _ = module.forward_with_routes(torch.randn(1, grid, grid, 64, device=DEVICE))  # type: ignore[operator]
    _, starts, first_slots, slots = inverted(index)
    result = walks(starts, slots, first_slots)
    assert max(result) <= VISITS == chunk_of((grid // n_win) ** 2) and sum(result) == n_win**2 * topk


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
@given(st.integers(1, 5), st.randoms(use_true_random=False))
@settings(FEW, max_examples=8)
def test_any_routes_fit_into_the_slots(side: int, random: Any) -> None:
    topk = random.randint(1, side**2)
    rows = [random.sample(range(side**2), topk) for _ in range(side**2)]
    _, starts, first_slots, slots = inverted(torch.tensor([rows], device=DEVICE))
    assert sum(walks(starts, slots, first_slots)) == side**2 * topk
    assert (slots >= 0).sum() == sum(-(-n // VISITS) for n in starts[0].diff().tolist() if n > VISITS)


@pytest.mark.parametrize(("rows", "channels"), [(1, 3), (200, 70), (2100, 20)])
def test_sums_of_columns(rows: int, channels: int) -> None:
    x = torch.randn(2, rows, channels + 5, device=DEVICE)[..., 2 : channels + 2]
    result = bra.bra_sum_columns(x, torch.float32)[0]
    assert (result - x.double().sum((0, 1))).abs().max() < 1e-4


def lepe(dim: int = 16, kernel: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(taps=torch.randn(kernel**2, dim, device=DEVICE), bias=torch.randn(dim, device=DEVICE))


@pytest.mark.usefixtures("short_chunks")
def test_a_region_that_all_choose_has_the_gradient_of_the_reference() -> None:
    """The parts of a split list add up: routes as of the hub, imposed on both."""
    result = []
    for impl, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        module = made(impl, dtype, 16, 1, n_win=4, topk=2)
        module.router.imposed = hub(16, 2)
        torch.manual_seed(2)
        x, grad = torch.randn(2, 1, 8, 8, 16).unbind()
        result.append(results(module, x, grad))
    for name, exact in result[0].items():
        assert (result[1][name] - exact).norm() <= 2e-6 * exact.norm().clamp_min(1), name


@pytest.mark.slow
def test_layout_does_not_matter() -> None:
    given = arguments(valid=None, **lepe())
    grad = torch.randn(2, 4, 6, 16, device=DEVICE)
    tokens = given["tokens"]
    expected = backward(grad, given)
    wide = torch.empty(2, 4, 6, 50, device=DEVICE)
    wide[..., 3:43] = tokens
    odd = tokens.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for other in (wide[..., 3:43], odd):
        same(backward(grad, given | {"tokens": other}), expected)
    one = torch.ones((), device=DEVICE).expand_as(grad)
    same(backward(one, given), backward(one.contiguous(), given))


def same(result: list[Tensor], expected: list[Tensor]) -> None:
    """To the bit, but for the parts of slots that no region needed, which nobody writes or reads."""
    assert all(torch.equal(a, b) for n, (a, b) in enumerate(zip(result, expected, strict=True)) if n != 7)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_two_runs_give_equal_bits() -> None:
    given = arguments(torch.float16, valid=None, **lepe())
    grad = torch.randn(2, 4, 6, 16, device=DEVICE, dtype=torch.float16)
    same(backward(grad, given), backward(grad, given))


@pytest.mark.skipif(not GPU, reason="the interpreter cannot")
def test_offsets_beyond_32_bits() -> None:
    pitch = 2**31 // 4000
    wide = torch.zeros(1, 64, 64, pitch, dtype=torch.bfloat16, device=DEVICE)
    narrow = torch.randn(1, 64, 64, 96, dtype=torch.bfloat16, device=DEVICE)
    wide[..., :96] = narrow
    index = torch.tensor([[[3, 1], [3, 0], [3, 2], [2, 3]]], device=DEVICE)
    rest = None, index, None, None, None, None, 32, 1, 2, 0.2, False
    assert torch.equal(bra.bra_attend(wide[..., :96], *rest)[0], bra.bra_attend(narrow, *rest)[0])
