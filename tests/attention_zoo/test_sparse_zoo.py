"""What pooled, neighborhood, deformable, quadtree and linear attention share; pooled and linear by definition."""

from functools import partial
from itertools import product
from typing import Any

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import build, get
from profiling.cases.case import Case
from profiling.meters import peak_memory

DIM, HEADS = 12, 3
SIZE = DIM // HEADS
NAMES = ("pooled", "neighborhood", "deformable", "quadtree", "linear")
IMPLS = [(name, impl) for name in NAMES for impl in get(name).impls if impl != "flex"]
GRIDS = [(14, 14), (28, 20), (56, 56), (13, 31), (1, 9), (1, 1)]
SMALL: dict[str, list[dict[str, Any]]] = {
    "pooled": [{"sr_ratio": 2}, {"sr_ratio": 3}, {"pool": "avg", "pool_size": 3}],
    "neighborhood": [
        {"kernel_size": 3},
        {"kernel_size": 5, "relative_position_bias": True},
        {"dilation": 2, "stride": 3},
    ],
    "deformable": [
        {},
        {"stride": 3, "offset_kernel": 5, "offset_groups": 3, "offset_range_factor": 2, "reference_points": "paper"},
        {"stride": 1, "offset_kernel": 3, "offset_range_factor": 2, "reference_points": "centres", "table_side": 7},
        {"stride": 2, "offset_kernel": 5, "offset_groups": 3, "relative_position_bias": False},
        {"stride": 2, "offset_range_factor": 0},
    ],
    "quadtree": [
        {"levels": 2, "topk": 2},
        {"levels": 3, "topk": 3, "value_pooling": "average", "lepe": False, "qkv_bias": False},
        {"levels": 3, "topk": 2, "value_pooling": "average"},
        {"levels": 2, "topk": 3, "activation": "relu", "lepe": False},
        {"levels": 1},
    ],
    "linear": [{}],
}
CHOSEN = [(name, impl, chosen) for name, impl in IMPLS for chosen in SMALL[name]]


made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of (queries, dim) to (keys, dim), head by head; ``bias`` is (heads, queries, keys)."""
    out = []
    for head in range(HEADS):
        a, b, c = (t[:, head * SIZE : (head + 1) * SIZE] for t in (q, k, v))
        shares = (a @ b.T / SIZE**0.5 + (0 if bias is None else bias[head])).exp()
        out.append(shares / shares.sum(1, keepdim=True) @ c)
    return torch.cat(out, 1)


def full(module: nn.Module, x: Tensor) -> Tensor:
    """Full attention of x with the projections of ``module``."""
    weight = [module.qkv] if hasattr(module, "qkv") else [module.q, module.kv]
    q, k, v = torch.cat([linear(x) for linear in weight], -1).flatten(1, 2).chunk(3, -1)
    return module.proj(torch.stack([softmax_attention(*one) for one in zip(q, k, v, strict=True)]).view_as(x))


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    result = torch.autograd.grad(out, list(inputs.values()), torch.randn_like(out), allow_unused=True)
    return {name: g for name, g in zip(inputs, result, strict=True) if g is not None}


def assert_close(result: Tensor, exact: Tensor, tolerance: float = 1e-11) -> None:
    assert result.shape == exact.shape
    assert (result - exact).abs().max() < tolerance * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize(("name", "impl", "chosen"), CHOSEN)
def test_macs_equal_the_count(name: str, impl: str, chosen: dict[str, Any]) -> None:
    for options, (height, width) in product((chosen, {}), GRIDS):
        module = build(name, dim=DIM, num_heads=HEADS, impl=impl, **options).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.empty(1, height, width, DIM, device="meta"))
        assert module.macs(height, width).total == counter.get_total_flops() // 2, (options, height, width)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_predicted_memory_of_a_ragged_grid_is_the_measured(name: str, impl: str) -> None:
    case = Case(name, 13, 31, impl=impl, mode="forward_backward")
    measured, predicted = peak_memory.measure(case.workload("cpu")), peak_memory.predict(case.workload("meta"))
    assert predicted.base == measured.base
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


@pytest.mark.parametrize(("name", "impl", "chosen"), CHOSEN)
def test_images_of_a_batch_are_independent(name: str, impl: str, chosen: dict[str, Any]) -> None:
    module, x = made(name, impl, **chosen), image(7, 9, batch=3)
    together = module(x)
    assert_close(together, torch.cat([module(one[None]) for one in x]))
    assert_close(module(x.flip(0)), together.flip(0))


@pytest.mark.parametrize(("name", "chosen"), [(n, c) for n, i, c in CHOSEN if i == "sdpa"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (2, 5)])
def test_fused_attention_equals_the_reference(name: str, chosen: dict[str, Any], grid: tuple[int, int]) -> None:
    result = []
    for impl in ("reference", "sdpa"):
        module, x = made(name, impl, **chosen), image(*grid).requires_grad_()
        out = module(x)
        result.append({"output": out} | gradients(out, {"input": x, **dict(module.named_parameters())}))
    assert result[0].keys() == result[1].keys()
    for key, exact in result[0].items():
        assert_close(result[1][key], exact, 1e-10)


@pytest.mark.parametrize(("name", "chosen"), [(n, c) for n, i, c in CHOSEN if i == "reference"])
def test_gradients_by_finite_differences(name: str, chosen: dict[str, Any]) -> None:
    module, x = made(name, **chosen), image(4, 5, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, x, fast_mode=True, eps=1e-7, atol=1e-5)
    parameters = dict(module.named_parameters())

    def of_parameters(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), x.detach())

    assert torch.autograd.gradcheck(of_parameters, tuple(parameters.values()), fast_mode=True, eps=1e-7, atol=1e-5)


# Pooled


@pytest.mark.parametrize("impl", get("pooled").impls)
def test_pooling_by_one_is_full_attention(impl: str) -> None:
    module, x = made("pooled", impl, sr_ratio=1), image(5, 7)
    assert_close(module(x), full(module, x))
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"q", "kv", "proj"}


@pytest.mark.parametrize(("ratio", "grid"), [(2, (6, 8)), (3, (7, 5)), (4, (1, 9)), (8, (3, 2))])
def test_pooled_keys_are_a_convolution_of_each_square(ratio: int, grid: tuple[int, int]) -> None:
    """Square by square; missing tokens at the border count as zero."""
    module, x = made("pooled", sr_ratio=ratio), image(*grid)
    for one, out in zip(x, module(x), strict=True):
        keys = []
        for top, left in product(range(0, grid[0], ratio), range(0, grid[1], ratio)):
            square = one[top : top + ratio, left : left + ratio]
            weight = module.sr.weight[:, :, : square.shape[0], : square.shape[1]]
            keys.append(torch.einsum("yxi,oiyx->o", square, weight) + module.sr.bias)
        k, v = module.kv(module.norm(torch.stack(keys))).chunk(2, -1)
        q = module.q(one).flatten(0, 1)
        assert_close(out, module.proj(softmax_attention(q, k, v)).view_as(out))
    assert module.kv_tokens_per_query(*grid) == len(keys)


@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (2, 4), (1, 9)])
def test_average_pooled_keys_are_the_mean_of_each_part(grid: tuple[int, int]) -> None:
    module, x = made("pooled", pool="avg", pool_size=3), image(*grid)
    rows, cols = ([(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side in grid for n in [min(3, side)])
    for one, out in zip(x, module(x), strict=True):
        means = torch.stack([one[a:b, c:d].mean((0, 1)) for (a, b), (c, d) in product(rows, cols)])
        mixed = means @ module.sr.weight[:, :, 0, 0].T + module.sr.bias
        k, v = module.kv(F.gelu(module.norm(mixed))).chunk(2, -1)
        assert_close(out, module.proj(softmax_attention(module.q(one).flatten(0, 1), k, v)).view_as(out))
    assert module.kv_tokens_per_query(*grid) == len(means)


# Linear


def test_linear_attention_is_its_quadratic_form() -> None:
    module, x = made("linear"), image(5, 7)
    for one, out in zip(x, module(x), strict=True):
        q, k, v = module.qkv(one).flatten(0, 1).chunk(3, -1)
        heads = []
        for a, b, c in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
            a, b = (torch.where(t > 0, t + 1, t.exp()) for t in (a, b))
            shares = a @ b.T
            heads.append(shares / shares.sum(1, keepdim=True) @ c)
        assert_close(out, module.proj(torch.cat(heads, 1)).view_as(out))


def test_linear_attention_has_no_zero_denominator() -> None:
    module = made("linear")
    nn.init.zeros_(module.qkv.weight)
    nn.init.constant_(module.qkv.bias, -200.0)
    assert module(image(3, 3)).isfinite().all()
