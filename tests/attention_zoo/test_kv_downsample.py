"""Regions of keys and values, reduced."""

import pytest
import torch
from bra_oracle import ODD, draw, kv, relative

from attention_zoo import InvalidOption
from attention_zoo.attentions.bra.kv_downsample import MODES, KVDownsample


def test_fracpool_is_fixed_in_eval_and_random_in_training() -> None:
    drawn = draw(**ODD, **kv("fracpool", downsample_ratio=2))
    assert torch.equal(drawn.module(drawn.x), drawn.module(drawn.x))
    drawn.module.train()
    first, *others = [drawn.module(drawn.x) for _ in range(4)]
    assert any(relative(other, first) > 1e-3 for other in others)
    torch.manual_seed(5)
    again = drawn.module(drawn.x)
    torch.manual_seed(5)
    assert torch.equal(drawn.module(drawn.x), again)


def test_fracpool_samples_all_channels_of_a_region_alike() -> None:
    pool = KVDownsample(6, "fracpool", 4, 2, 2).train()
    one = torch.randn(40, 1, 9, 11)
    pooled = pool(one.expand(-1, 6, -1, -1).contiguous())
    assert torch.equal(pooled, pooled[:, :1].expand_as(pooled))
    same_region = pool(one[:1].expand(40, 6, -1, -1).contiguous())
    assert len({tuple(region.flatten().tolist()) for region in same_region}) > 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ratio", "kernel"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (3, 5)])
def test_predicted_sizes_of_reduced_regions(mode: str, ratio: int, kernel: int) -> None:
    pool = KVDownsample(4, mode, 3, ratio, kernel).eval()
    for height in range(3, 12):
        tile = torch.randn(2, 4, height, 7)
        try:
            size = pool.out_size(height, 7)
        except InvalidOption:
            with pytest.raises(InvalidOption):
                pool(tile)
            continue
        reduced = pool(tile)
        assert size == tuple(reduced.shape[2:])
        assert reduced.isfinite().all()
