"""Pooled, deformable, quadtree and linear attention by definition; neighborhood is in test_neighborhood.py."""

from functools import partial
from itertools import product
from typing import Any

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, build, get
from attention_zoo.attentions import quadtree
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
    "deformable": [{}, {"stride": 3, "offset_groups": 3, "relative_position_bias": True}, {"offset_range_factor": 0}],
    "quadtree": [{"levels": 2, "topk": 2}, {"levels": 3, "topk": 3}, {"levels": 1}],
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


# Deformable


def bilinear(values: Tensor, y: float, x: float) -> Tensor:
    """Interpolate (h, w, channels) at a position in tokens, zero outside."""
    near = [
        (1 - (torch.arange(side).double() - at).abs()).clamp_min(0)
        for side, at in zip(values.shape, (y, x), strict=False)
    ]
    return torch.einsum("y,x,yxc->c", *near, values)


def spread(points: int, length: int) -> list[float]:
    """Positions, in tokens, of points from the first token to the last; of one point, the middle."""
    return [i * (length - 1) / (points - 1) for i in range(points)] if points > 1 else [(length - 1) / 2]


@torch.no_grad()
@pytest.mark.parametrize("offsets", ["none", "zero", "predicted"])
@pytest.mark.parametrize(("stride", "grid"), [(2, (6, 8)), (3, (7, 5)), (2, (1, 5)), (4, (3, 4))])
def test_deformable_point_by_point(stride: int, grid: tuple[int, int], offsets: str) -> None:
    chosen = {"stride": stride, "offset_groups": 3, "relative_position_bias": True}
    module, x = made("deformable", offset_range_factor=0 if offsets == "none" else 2.5, **chosen), image(*grid, batch=1)
    rows, cols = -(-grid[0] // stride), -(-grid[1] // stride)
    assert module.kv_tokens_per_query(*grid) == rows * cols
    shift = torch.zeros(3, rows, cols, 2, dtype=torch.float64)
    if offsets == "zero":
        nn.init.zeros_(module.offset.to_offset.weight)
    if offsets == "predicted":
        weight = module.offset.depthwise.weight.repeat(3, 1, 1, 1), module.offset.depthwise.bias.repeat(3)
        seen = F.conv2d(module.q(x).movedim(-1, 1), *weight, stride=stride, padding=2, groups=DIM)
        normed = F.layer_norm(
            seen.view(3, 4, rows, cols).movedim(1, -1), [4], module.offset.norm.weight, module.offset.norm.bias
        )
        shift = torch.tanh(F.gelu(normed) @ module.offset.to_offset.weight.T) * 2.5 / 2
    keys, places = [], []
    for (i, y), (j, z) in product(enumerate(spread(rows, grid[0])), enumerate(spread(cols, grid[1]))):
        at = []
        for group in range(3):
            dx, dy = shift[group, i, j].tolist()
            spacing = [(side - 1) / max(count - 1, 1) for side, count in zip(grid, (rows, cols), strict=True)]
            at.append((y + dy * spacing[0], z + dx * spacing[1]))
        places.append(at)
        keys.append(torch.cat([bilinear(part, *where) for part, where in zip(x[0].chunk(3, -1), at, strict=True)]))
    k, v = module.kv(torch.stack(keys)).chunk(2, -1)
    bias = torch.stack([position_bias(module, head, places, grid) for head in range(HEADS)])
    out = module.proj(softmax_attention(module.q(x[0]).flatten(0, 1), k, v, bias))
    assert_close(module(x)[0], out.view_as(x[0]))


def position_bias(module: nn.Module, head: int, places: list[Any], grid: tuple[int, int]) -> Tensor:
    """The table at half the displacement, its side being the grid's twice over."""
    table = module.relative_position_bias_table[head][..., None]
    rows = []
    for row, col in product(range(grid[0]), range(grid[1])):
        entries = []
        for at in places:
            scaled = [
                (there - here) / (side - 1) if side > 1 else there - here
                for there, here, side in zip((row, col), at[head], grid, strict=True)
            ]
            entries.append(bilinear(table, *((part + 1) * 13 for part in scaled)))
        rows.append(torch.cat(entries))
    return torch.stack(rows)


def test_fixed_points_on_every_token_are_full_attention() -> None:
    module, x = made("deformable", stride=1, offset_range_factor=0), image(5, 7)
    assert_close(module(x), full(module, x))


def test_invalid_deformable_options_are_rejected() -> None:
    for chosen, said in (({"offset_groups": 2}, "does not divide"), ({"offset_kernel": 4}, "odd")):
        with pytest.raises(InvalidOption, match=said):
            build("deformable", dim=DIM, num_heads=HEADS, **chosen)


# Quadtree


def test_z_order_keeps_quadtree_cells_contiguous() -> None:
    grid = torch.arange(8 * 12).view(1, 8, 12, 1)
    order = quadtree.to_z_order(grid, 2)[0, :, 0]
    for level in (1, 2):
        for family in order.view(-1, 4**level):
            places = torch.stack([family // 12, family % 12]) // 2**level
            assert (places == places[:, :1]).all()
    assert torch.equal(quadtree.from_z_order(order[None, :, None], 8, 12, 2), grid)


def quadtree_by_hand(module: nn.Module, x: Tensor, levels: int, topk: int) -> Tensor:
    """Head by head and token by token, on row-major grids of one image, from the coarsest to the finest."""
    height, width = x.shape[:2]
    weight = torch.softmax(module.weight, 0)
    q, k, v = module.qkv(x).chunk(3, -1)
    out = torch.zeros_like(x)
    for head in range(HEADS):
        part = slice(head * SIZE, (head + 1) * SIZE)
        looked_at: dict[tuple[int, int], list[tuple[int, int]]] = {}
        said = torch.zeros(height, width, SIZE, dtype=x.dtype)
        for level in range(levels):
            cell = 2 ** (levels - 1 - level)
            a, b, c = (averages(t[..., part], cell) for t in (q, k, v))
            places = list(product(range(a.shape[0]), range(a.shape[1])))
            looking = {}
            for y, z in places:
                keys = places
                if level:
                    parents = looked_at[y // 2, z // 2]
                    children = ((2 * i + di, 2 * j + dj) for i, j in parents for di, dj in product((0, 1), (0, 1)))
                    keys = [key for key in children if key[0] < a.shape[0] and key[1] < a.shape[1]]
                scores = torch.stack([a[y, z] @ b[key] for key in keys]) / SIZE**0.5
                message = torch.softmax(scores, 0) @ torch.stack([c[key] for key in keys])
                said[y * cell : (y + 1) * cell, z * cell : (z + 1) * cell] += weight[level] * message
                looking[y, z] = [keys[i] for i in scores.argsort(descending=True)[:topk].tolist()]
            looked_at = looking
        out[..., part] = said
    return module.proj(out)


def averages(values: Tensor, cell: int) -> Tensor:
    """Over squares of cell x cell tokens, of those that are there."""
    rows = [values[top : top + cell] for top in range(0, values.shape[0], cell)]
    return torch.stack(
        [torch.stack([row[:, i : i + cell].mean((0, 1)) for i in range(0, row.shape[1], cell)]) for row in rows]
    )


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(
    ("levels", "topk", "grid"),
    [(2, 2, (6, 8)), (3, 2, (8, 8)), (3, 3, (4, 12)), (2, 3, (5, 7)), (3, 2, (7, 9)), (2, 99, (4, 6)), (3, 99, (5, 6))],
)
def test_quadtree_token_by_token(levels: int, topk: int, grid: tuple[int, int], impl: str) -> None:
    """With a large topk too, where every level attends to all of its keys."""
    module, x = made("quadtree", impl, levels=levels, topk=topk), image(*grid)
    with torch.no_grad():
        assert_close(module(x), torch.stack([quadtree_by_hand(module, one, levels, topk) for one in x]))


@pytest.mark.parametrize("impl", get("quadtree").impls)
@pytest.mark.parametrize(("levels", "grid"), [(1, (6, 5)), (3, (1, 9)), (2, (1, 1))])
def test_one_level_is_full_attention(levels: int, grid: tuple[int, int], impl: str) -> None:
    module, x = made("quadtree", impl, levels=levels), image(*grid)
    assert module.depth(*grid) == 0
    assert_close(module(x), full(module, x))


def test_every_level_attends_to_everything_with_a_large_topk() -> None:
    """All children of all keys: each level is full attention among its own averages."""
    module, x = made("quadtree", levels=2, topk=12), image(6, 8, batch=1)
    coarse = F.avg_pool2d(module.qkv(x).movedim(-1, 1), 2).movedim(1, -1)
    messages = []
    for tokens in (coarse, module.qkv(x)):
        q, k, v = tokens[0].flatten(0, 1).chunk(3, -1)
        messages.append(softmax_attention(q, k, v).view(*tokens.shape[1:3], DIM))
    spread_out = messages[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    weight = torch.softmax(module.weight, 0)
    assert_close(module(x)[0], module.proj(weight[0] * spread_out + weight[1] * messages[1]))
    assert module.kv_tokens_per_query(6, 8) == 12 + 48


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
