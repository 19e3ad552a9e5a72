"""BRA on grids that n_win does not divide: what masked padding must not change."""

from typing import Any

import pytest
import torch
from bra_oracle import COARSE, MASKED, WHOLE_REGIONS, draw, full_attention, kv, pad_with_noise, relative

from attention_zoo.attentions.bra.kv_downsample import MODES, KVDownsample
from attention_zoo.ops import regions


@pytest.mark.parametrize("case", [MASKED | dict(topk=16), WHOLE_REGIONS | dict(topk=49, mask_padding=True)])
def test_all_regions_with_masked_padding_are_full_attention_of_the_unpadded_grid(case: dict[str, Any]) -> None:
    drawn = draw(**case, batch=2)
    assert relative(drawn.module(drawn.x), full_attention(drawn)) < 1e-12
    attends_padding = draw(**case | dict(mask_padding=False), batch=2)
    assert relative(attends_padding.module(drawn.x), full_attention(drawn)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("grid", "n_win"), [((10, 11), 3), ((8, 8), 7)])
def test_masked_padding_does_not_reach_a_real_token(
    mode: str, grid: tuple[int, int], n_win: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = kv(mode, per_win=2, downsample_ratio=2)
    masked = draw(grid=grid, n_win=n_win, auto_pad=True, mask_padding=True, **small)
    open_to_it = draw(grid=grid, n_win=n_win, auto_pad=True, **small)
    before = masked.module(masked.x), open_to_it.module(masked.x)
    monkeypatch.setattr(regions, "pad_to_multiple", pad_with_noise)
    assert relative(masked.module(masked.x), before[0]) < 1e-12
    assert relative(open_to_it.module(masked.x), before[1]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_masking_changes_nothing_where_nothing_is_padded(mode: str) -> None:
    options = COARSE | dict(auto_pad=True) | kv(mode, per_win=2, downsample_ratio=2)
    unmodified, masked = draw(**options), draw(**options, mask_padding=True)
    assert torch.equal(unmodified.module(unmodified.x), masked.module(unmodified.x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("topk", [1, 3, 9])
@pytest.mark.parametrize(("grid", "n_win"), [((8, 8), 7), ((7, 7), 3), ((9, 4), 4)])
def test_masked_results_and_gradients_are_finite(mode: str, topk: int, grid: tuple[int, int], n_win: int) -> None:
    routing = dict(diff_routing=True, soft_routing=True, param_routing=True, auto_pad=True, mask_padding=True)
    smallest_side = min(-(-side // n_win) for side in grid)
    for ratio in range(1, min(2, smallest_side) + 1):
        drawn = draw(grid=grid, n_win=n_win, topk=topk, **routing, **kv(mode, per_win=2, downsample_ratio=ratio))
        x = drawn.x.clone().requires_grad_()
        out = drawn.module(x)
        out.square().sum().backward()
        assert out.isfinite().all()
        for gradient in (x.grad, *(p.grad for p in drawn.module.parameters())):
            assert gradient.isfinite().all() and (gradient.any() or topk == 1)


def test_masked_average_is_of_real_tokens_only() -> None:
    tile = torch.arange(32.0).reshape(1, 2, 4, 4)
    valid = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    valid[..., :3, :2] = True
    for mode, options in (("avgpool", (4, 2)), ("ada_avgpool", (2, 4))):
        reduced, seen = KVDownsample(2, mode, *options, None).masked(tile, valid)
        assert seen.tolist() == [[[[True, False], [True, False]]]]
        assert reduced[0, :, :, 0].tolist() == [[2.5, 8.5], [18.5, 24.5]]


def test_masked_routes_end_with_regions_of_padding_at_weight_zero() -> None:
    drawn = draw(**WHOLE_REGIONS, mask_padding=True, topk=20)
    index, weight = drawn.module.routes(drawn.x)
    exact = drawn.oracle()
    real = torch.tensor([7 * row + column for row in range(4) for column in range(4)])
    assert torch.equal(index[0, real, :16], exact.index[0, real])
    assert relative(weight[0, real, :16], exact.weight[0, real]) < 1e-12
    assert torch.isin(index[..., :16], real).all() and not torch.isin(index[..., 16:], real).any()
    assert not weight[..., 16:].any()
