"""What CPU kernels allocate within an operator, predicted from shapes and small probes, against the operator itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from profiling.meters import cpu_scratch
from profiling.meters.operator_call import Call

aten = torch.ops.aten
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "rows and columns swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of several threads, those that find no work allocate nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(func: Any, *args: Any, room: int = 0, **kwargs: Any) -> int:
    call, measured = Call.of(func, args, kwargs), cpu_scratch._probe(func, args, kwargs)
    assert abs(cpu_scratch.scratch(call) - measured) <= room, (func, measured)
    assert cpu_scratch.bound(call) >= measured
    return measured


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_and_interpolation_from_few_channels(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_scratch, "WHOLE_VALUES", 0)
    size, small = (2, 40, 21, 26), (2, 40, 9, 8)
    x, grad = LAYOUTS[layout](torch.randn(size)), torch.randn(small)
    weight = torch.ones(40)
    # Of the few values per channel that a normalisation keeps, and the tables of an interpolation, some are missed.
    found = [
        check(aten.upsample_bilinear2d.default, x, [31, 52], False, room=2048),
        check(aten.upsample_bilinear2d_backward.default, x, [21, 26], [*small], False, room=2048),
        check(aten._adaptive_avg_pool2d.default, x, [9, 8], room=2048),
        check(aten._adaptive_avg_pool2d_backward.default, grad, x, room=2048),
        check(aten.avg_pool2d_backward.default, torch.randn(2, 40, 10, 13), x, [2, 2], [2, 2], [0, 0], False, True,
              None, room=2048),
        check(aten.native_batch_norm_backward.default, x, x, weight, weight, weight, weight, weight, True, 1e-5,
              [True] * 3, room=2048),
    ]  # fmt: skip
    assert max(found) >= x.numel() * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_of_what_is_not_contiguous(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 24, 14, 10))
    weight, mean = torch.ones(10), torch.zeros(2, 24, 14, 1)
    found = {
        check(aten._softmax.default, x, -1, False),
        check(aten.native_layer_norm.default, x, [10], weight, weight, 1e-5),
        check(aten._softmax_backward_data.default, x, x, -1, torch.float32) // 2,
        check(aten.im2col.default, x, [3, 3], [1, 1], [1, 1], [1, 1]) - x.numel() * 4,
    }
    assert found == {0 if x.is_contiguous() else x.numel() * 4}
    check(aten.native_layer_norm_backward.default, x, x, [10], mean, mean, weight, weight, [True] * 3)


@pytest.mark.parametrize("tokens", [(64, 96), (5, 1), (1, 7), (1100, 70)])
def test_masks_of_fused_attention(tokens: tuple[int, int], one_thread: None) -> None:
    (n, m), batch, heads = tokens, 3, 2
    q, k, v = (torch.randn(batch, size, heads, 16).transpose(1, 2) for size in (n, m, m))
    masks = {
        "none": None,
        "of a row": torch.randn(n, m),
        "of all": torch.randn(batch, heads, n, m),
        "of heads": torch.randn(1, heads, n, m).expand(batch, heads, n, m),
        "of keys": torch.randn(batch, 1, 1, m).expand(batch, heads, n, m),
        "of keys first": torch.randn(batch, heads, m, n).transpose(2, 3),
        "of heads, keys first": torch.randn(1, heads, m, n).transpose(2, 3).expand(batch, heads, n, m),
        "with gaps": torch.randn(batch, heads, n, m + 1)[..., :m],
    }
    forward, backward = cpu_scratch._ATTENTION
    found = {}
    for name, mask in masks.items():
        found[name] = check(forward, q, k, v, 0.0, False, attn_mask=mask)
        out, sums = forward(q, k, v, 0.0, False, attn_mask=mask)
        for grad in (torch.randn_like(out), torch.randn(batch, heads, n, 16)):
            check(backward, grad, q, k, v, out, sums, 0.0, False, attn_mask=mask)
    copied = 4 * batch * heads * n * m if m > 1 and n > 1 else 0
    assert found["of keys first"] - found["of all"] == copied
