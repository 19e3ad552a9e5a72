"""Options that reach the layout of the authors' code, each against loops over tokens written from that layout."""

from collections import defaultdict
from itertools import product
from typing import Any

import pytest
import torch
from test_windows_zoo import DIM, HEADS, assert_close, global_oracle, grid, softmax_of, with_gradients, zoo
from torch import Tensor, nn

from attention_zoo import InvalidOption, build, get

GRIDS = [(8, 8), (5, 7), (2, 9), (4, 4), (16, 16)]
QK_SCALE = ["window", "shifted_window", "cross_shaped", "dilated", "pooled", "spatially_separable", "criss_cross",
            "neighborhood"]  # fmt: skip


def zero_padded(x: Tensor, rows: range, cols: range) -> Tensor:
    """The grid seen from ``rows`` and ``cols``: zeros where these are outside."""
    out = x.new_zeros(len(rows), len(cols), x.shape[-1])
    for (i, row), (j, col) in product(enumerate(rows), enumerate(cols)):
        if 0 <= row < x.shape[0] and 0 <= col < x.shape[1]:
            out[i, j] = x[row, col]
    return out


def ceil_to(length: int, multiple: int) -> int:
    while length % multiple:
        length += 1
    return length


def swin_oracle(module: Any, x: Tensor, shift: int, table: Tensor | None) -> tuple[Tensor, list[int]]:
    """Swin's attention of one padded image (rows, columns, channels), and the number of keys of each token.

    After the cyclic shift an axis is three regions: all but the last window, the last window's part before the
    seam, and the part after it. Tokens attend to those of the same window and region, padding among them.
    """
    size, (height, width) = module.window_size, x.shape[:2]
    shape = ceil_to(height, size), ceil_to(width, size)
    padded = zero_padded(x, range(shape[0]), range(shape[1]))

    def cell(at: int, length: int) -> tuple[int, int, int]:
        rolled = (at - shift) % length
        region = 0 if rolled < length - size else 1 if shift == 0 or rolled < length - shift else 2
        return rolled // size, region, rolled % size

    members = defaultdict(list)
    for row, col in product(range(shape[0]), range(shape[1])):
        (window_y, region_y, y), (window_x, region_x, z) = cell(row, shape[0]), cell(col, shape[1])
        members[window_y, region_y, window_x, region_x].append((row, col, y, z))
    out, keys = x.new_zeros(height, width, x.shape[-1]), []
    for tokens in members.values():
        q, k, v = module.qkv(torch.stack([padded[row, col] for row, col, *_ in tokens])).chunk(3, -1)
        bias = None
        if table is not None:
            rows = [[(a - c + size - 1) * (2 * size - 1) + b - d + size - 1 for *_, c, d in tokens]
                    for *_, a, b in tokens]  # fmt: skip
            bias = table[torch.tensor(rows)].permute(2, 0, 1)
        mixed = softmax_of(q, k, v, module.num_heads, bias)
        for i, (row, col, *_) in enumerate(tokens):
            if row < height and col < width:
                out[row, col] = mixed[i]
                keys.append(len(tokens))
    return module.proj(out), keys


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window_size": 3}),
        ("window", {"window_size": 3, "relative_position_bias": True, "shift": 2}),
        ("window", {"window_size": 7, "relative_position_bias": True}),
        ("shifted_window", {"window_size": 4}),
        ("shifted_window", {"window_size": 7}),
    ],
)
def test_swin_attends_to_padding(name: str, options: dict[str, Any], impl: str) -> None:
    module = zoo(name, impl, attend_padding=True, **options)
    shift = options.get("shift", options["window_size"] // 2 if name == "shifted_window" else 0)
    for size in GRIDS:
        x = grid(*size, batch=1)

        def run(x: Tensor) -> Tensor:
            return swin_oracle(module, x[0], shift, module.relative_position_bias_table)[0][None]

        assert_close(with_gradients(module, module, x), with_gradients(run, module, x))
        keys = swin_oracle(module, x[0], shift, None)[1]
        assert module.kv_tokens_per_query(*size) == pytest.approx(sum(keys) / len(keys), rel=1e-12)


@pytest.mark.parametrize("name", ["window", "shifted_window", "spatially_separable", "cross_shaped", "neighborhood"])
def test_padding_is_masked_by_default_and_matters_only_where_there_is_some(name: str) -> None:
    options = {"kernel_size": 7} if name == "neighborhood" else {}
    masked, attended = zoo(name, **options), zoo(name, attend_padding=True, **options)
    assert torch.equal(zoo(name, attend_padding=False, **options)(grid(5, 16)), masked(grid(5, 16)))
    assert (masked(grid(5, 16)) - attended(grid(5, 16))).abs().max() > 1e-3
    assert (masked(grid(14, 14)) - attended(grid(14, 14))).abs().max() < 1e-12


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 9)])
def test_twins_attends_to_padding(size: tuple[int, int], impl: str) -> None:
    module = zoo("spatially_separable", impl, window_size=3, sr_ratio=2, attend_padding=True)

    def run(x: Tensor) -> Tensor:
        return global_oracle(module.sub_sampled, swin_oracle(module.local, x[0], 0, None)[0][None])

    x = grid(*size, batch=1)
    assert_close(with_gradients(module, module, x), with_gradients(run, module, x))


def cswin_oracle(module: Any, x: Tensor) -> Tensor:
    """CSWin's attention of one image: after the projection, zeros on both sides complete the last stripe."""
    across, size = module.stripe_width, x.shape[-1] // module.num_heads
    split = (module.num_heads + 1) // 2 * size
    height, width = x.shape[:2]
    projected, halves = module.qkv(x).chunk(3, -1), []
    for half, part in enumerate((slice(0, split), slice(split, None))):
        # The first half has stripes of columns: its padding is left and right.
        rows, cols = (height, ceil_to(width, across)) if half == 0 else (ceil_to(height, across), width)
        top, left = (rows - height) // 2, (cols - width) // 2
        q, k, v = (zero_padded(one[..., part], range(-top, rows - top), range(-left, cols - left)) for one in projected)
        weight, bias = module.lepe[half].weight[:, 0], module.lepe[half].bias
        out = torch.zeros_like(q)
        for first in range(0, cols if half == 0 else rows, across):
            stripe = [
                (row, col)
                for row, col in product(range(rows), range(cols))
                if first <= (col if half == 0 else row) < first + across
            ]
            at = tuple(torch.tensor(stripe).T)
            mixed = softmax_of(q[at], k[at], v[at], q.shape[-1] // size)
            for i, (row, col) in enumerate(stripe):
                local = bias + sum(
                    weight[:, dy + 1, dx + 1] * v[row + dy, col + dx]
                    for dy, dx in product((-1, 0, 1), repeat=2)
                    if (row + dy, col + dx) in stripe
                )
                out[row, col] = mixed[i] + local
        halves.append(out[top : top + height, left : left + width])
    return module.proj(torch.cat(halves, -1))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("size", [(6, 6), (5, 7), (2, 4)])
def test_cswin_attends_to_padding_on_both_sides(size: tuple[int, int], heads: int, impl: str) -> None:
    module = zoo("cross_shaped", impl, dim=6, heads=heads, stripe_width=3, attend_padding=True)
    x = grid(*size, batch=1, dim=6)
    result = with_gradients(module, module, x)
    assert_close(result, with_gradients(lambda x: cswin_oracle(module, x[0])[None], module, x))
    # A vertical stripe has three whole columns, a horizontal one three whole rows.
    first, second = (heads + 1) // 2, heads // 2
    mean = 3 * size[0] * first + 3 * size[1] * second
    assert module.kv_tokens_per_query(*size) == pytest.approx(mean / heads, rel=1e-12)


def test_cross_shaped_accepts_odd_heads_but_not_one() -> None:
    assert zoo("cross_shaped", dim=6, heads=3).dims == [4, 2]
    with pytest.raises(InvalidOption, match="num_heads=1 has no halves; valid for dim=6: 2, 3, 6"):
        build("cross_shaped", dim=6, num_heads=1)


def position_bias(mlp: Any, dy: int, dx: int) -> Tensor:
    """CrossFormer's position bias of one displacement, channel by channel."""
    values = [w[0] * dy + w[1] * dx + b for w, b in zip(mlp.pos_proj.weight, mlp.pos_proj.bias, strict=True)]
    for norm, _, linear in (mlp.pos1, mlp.pos2, mlp.pos3):
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / len(values) + norm.eps) ** 0.5
        values = [
            ((value - mean) / deviation * w + b).clamp_min(0)
            for value, w, b in zip(values, norm.weight, norm.bias, strict=True)
        ]
        values = [
            sum(w * value for w, value in zip(row, values, strict=True)) + b
            for row, b in zip(
                linear.weight, len(linear.weight) * [0] if linear.bias is None else linear.bias, strict=True
            )
        ]
    return torch.stack(values)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(("dim", "hidden"), [(8, 16), (64, 4), (96, 6)])
def test_dynamic_position_bias(dim: int, hidden: int, impl: str) -> None:
    module = zoo("dilated", impl, dim=dim, window_size=2, dilation=2, dynamic_position_bias=True)
    assert module.pos.pos_proj.out_features == hidden

    def run(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for row, col in product(range(x.shape[1]), range(x.shape[2])):
            met = [
                (y, z)
                for y, z in product(range(x.shape[1]), range(x.shape[2]))
                if (y // 4, y % 2, z // 4, z % 2) == (row // 4, row % 2, col // 4, col % 2)
            ]
            at = tuple(torch.tensor(met).T)
            q, (k, v) = module.qkv(x[0, row, col])[:dim], module.qkv(x[0][at])[:, dim:].chunk(2, -1)
            bias = torch.stack([position_bias(module.pos, (row - y) // 2, (col - z) // 2) for y, z in met], 1)
            out[0, row, col] = softmax_of(q[None], k, v, HEADS, bias[:, None])[0]
        return module.proj(out)

    x = grid(5, 3, batch=1, dim=dim)
    assert_close(with_gradients(module, module, x), with_gradients(run, module, x))


def test_published_intervals_make_one_group_span_the_grid_of_each_stage() -> None:
    for side, dilation in zip((56, 28, 14, 7), get("dilated").by_stage["dilation"], strict=True):
        assert build("dilated", dim=DIM, num_heads=HEADS, dilation=dilation).groups(side, side).extent == (side, side)


def test_criss_cross_as_published() -> None:
    """One head, queries and keys of dim / 8, no scale, no projection, a residual: token by token."""
    module = zoo("criss_cross", dim=16, heads=1, qk_reduction=8, qk_scale=1, out_proj=False, residual=True)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"qkv", "gamma"}

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = module.qkv(x[0]).split([2, 2, 16], -1)
            out = torch.zeros_like(x)
            for row, col in product(range(x.shape[1]), range(x.shape[2])):
                met = [(row, c) for c in range(x.shape[2])] + [(r, col) for r in range(x.shape[1]) if r != row]
                shares = torch.stack([(q[row, col] * k[place]).sum() for place in met]).exp()
                out[0, row, col] = sum(s * v[place] for s, place in zip(shares, met, strict=True)) / shares.sum()
            x = module.gamma * out + x
        return x

    x = grid(4, 5, batch=1, dim=16)
    assert_close(with_gradients(module, module, x), with_gradients(run, module, x))
    with torch.device("meta"):
        expected = 2 * 20 * (16 * (2 + 2 + 16) + 9 * (2 + 16))
        assert module.macs(4, 5).total == expected


@pytest.mark.parametrize("name", QK_SCALE)
def test_qk_scale_is_a_factor_of_the_queries(name: str) -> None:
    scaled, unmodified, x = zoo(name, qk_scale=0.25), zoo(name), grid(8, 9)
    factor = 0.25 * (DIM / HEADS) ** 0.5
    for layer in unmodified.modules():
        q = getattr(layer, "qkv", getattr(layer, "q", None))
        if isinstance(q, nn.Linear):
            q.weight.data[:DIM] *= factor
            q.bias.data[:DIM] *= factor
    assert (scaled(x) - unmodified(x)).abs().max() < 1e-12
    for default in (None, 0):
        assert torch.equal(zoo(name, qk_scale=default)(x), zoo(name)(x))


def test_separable_layers_without_biases() -> None:
    module = zoo("spatially_separable", qkv_bias=False)
    assert [layer.bias for layer in (module.local.qkv, module.sub_sampled.q, module.sub_sampled.kv)] == [None] * 3
