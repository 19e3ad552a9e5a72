"""Windowed attentions against tokens grouped one by one: each grouping rule is written out per position."""

from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import Attention, InvalidOption, build, get
from attention_zoo.attentions.block_grid import GridAttention
from attention_zoo.ops.token_partition import TokenPartition
from profiling.cases.case import Case
from profiling.meters import peak_memory

DIM, HEADS = 8, 2
NAMES = ("shifted_window", "criss_cross", "cross_shaped", "dilated", "block_grid", "spatially_separable")
GRIDS = [(8, 8), (6, 9), (5, 3), (1, 9), (7, 7)]
"""Divided by the windows below, not divided, smaller than a window, and with groups that are padding throughout."""
Place = tuple[int, int]


def drawn(module: nn.Module) -> nn.Module:
    """In fp64, with weights far from those that training starts from; equal for modules of equal shape."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return module


def zoo(name: str, impl: str = "reference", dim: int = DIM, heads: int = HEADS, **options: Any) -> nn.Module:
    return drawn(build(name, dim=dim, num_heads=heads, impl=impl, **options))


def grid(height: int, width: int, batch: int = 2, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, height, width, dim, generator=generator, dtype=torch.float64)


def with_gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    out = run(leaves[0])
    direction = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def assert_close(result: list[Tensor], exact: list[Tensor]) -> None:
    for a, b in zip(result, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def softmax_of(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention of (queries, channels) to (keys, channels), each weight written out; bias is (heads, q, k)."""
    size, out = q.shape[1] // heads, []
    for head in range(heads):
        part, values = slice(head * size, (head + 1) * size), v.chunk(heads, -1)[head]
        weights = (q[:, part] @ k[:, part].T / size**0.5 + (0 if bias is None else bias[head])).exp()
        out.append(weights @ values / weights.sum(1, keepdim=True))
    return torch.cat(out, -1)


def by_groups(
    x: Tensor, group: Callable[[int, int], Hashable], mix: Callable[[Tensor, list[Place]], Tensor], out_dim: int
) -> Tensor:
    """``mix`` applied to the tokens of equal ``group``, image by image."""
    members: dict[Hashable, list[Place]] = defaultdict(list)
    for place in product(range(x.shape[1]), range(x.shape[2])):
        members[group(*place)].append(place)
    out = x.new_zeros(*x.shape[:3], out_dim)
    for image, places in product(range(len(x)), members.values()):
        rows, cols = map(list, zip(*places, strict=True))
        out[image, rows, cols] = mix(x[image, rows, cols], places)
    return out


def window_oracle(module: Any, x: Tensor, group: Callable[[int, int], Hashable], step: Place = (1, 1)) -> Tensor:
    """A window attention whose windows are ``group``, with tokens ``step`` apart for the position bias."""

    def mix(tokens: Tensor, places: list[Place]) -> Tensor:
        bias, table, size = None, module.relative_position_bias_table, module.window_size
        if table is not None:
            table = resized(table, 2 * getattr(module, "pretrained_window_size", size) - 1, 2 * size - 1)
            offsets = [[((a - c) // step[0], (b - d) // step[1]) for c, d in places] for a, b in places]
            rows = [[(dy + size - 1) * (2 * size - 1) + dx + size - 1 for dy, dx in line] for line in offsets]
            bias = table[torch.tensor(rows)].permute(2, 0, 1)
        return softmax_of(*module.qkv(tokens).chunk(3, -1), module.num_heads, bias)

    return module.proj(by_groups(x, group, mix, x.shape[-1]))


def resized(table: Tensor, side: int, to: int) -> Tensor:
    """A table of side x side rows at to x to positions: bilinear, outer edges coincide, clamped beyond the centres."""
    at = [min(max((i + 0.5) * side / to - 0.5, 0.0), side - 1.0) for i in range(to)]
    corners = [(int(p), min(int(p) + 1, side - 1), p - int(p)) for p in at]
    return torch.stack(
        [
            (1 - u) * ((1 - v) * table[a * side + c] + v * table[a * side + d])
            + u * ((1 - v) * table[b * side + c] + v * table[b * side + d])
            for (a, b, u), (c, d, v) in product(corners, repeat=2)
        ]
    )


def unmodified(size: int) -> Callable[[int, int], Hashable]:
    return lambda row, col: (row // size, col // size)


def shifted(size: int, height: int, width: int) -> Callable[[int, int], Hashable]:
    down, right = (size // 2 if side > size else 0 for side in (height, width))
    return lambda row, col: ((row - down) // size, (col - right) // size)


def dilated(size: int, step: int) -> Callable[[int, int], Hashable]:
    return lambda row, col: (row // (size * step), row % step, col // (size * step), col % step)


def spread(size: int, height: int, width: int) -> tuple[Callable[[int, int], Hashable], Place]:
    down, right = -(-height // size), -(-width // size)
    return lambda row, col: (row % down, col % right), (down, right)


def cross_oracle(module: Any, x: Tensor) -> Tensor:
    """Row and column of each token, itself once."""
    q, k, v = module.qkv(x).split([module.qk_dim, module.qk_dim, module.dim], -1)
    out = torch.zeros_like(x)
    for image, row, col in product(range(len(x)), range(x.shape[1]), range(x.shape[2])):
        met = [(row, c) for c in range(x.shape[2])] + [(r, col) for r in range(x.shape[1]) if r != row]
        rows, cols = map(list, zip(*met, strict=True))
        keys, values = k[image, rows, cols], v[image, rows, cols]
        out[image, row, col] = softmax_of(q[image, row, col][None], keys, values, module.num_heads)[0]
    return module.proj(out)


def stripes_oracle(module: Any, x: Tensor) -> Tensor:
    """Half of the heads by columns, half by rows, each with the 3x3 sums of the values in the same stripe.

    Of an odd number of heads the first half has one more.
    """
    width, size = module.stripe_width, x.shape[-1] // module.num_heads
    half = (module.num_heads + 1) // 2
    q, k, v = module.qkv(x).chunk(3, -1)
    out = []
    for branch, group in enumerate((lambda row, col: col // width, lambda row, col: row // width)):
        heads = module.num_heads - half if branch else half
        part = slice(half * size, None) if branch else slice(0, half * size)
        together = torch.cat([q[..., part], k[..., part], v[..., part]], -1)
        kernel, bias = module.lepe[branch].weight[:, 0], module.lepe[branch].bias

        def mix(
            tokens: Tensor, places: list[Place], kernel: Tensor = kernel, bias: Tensor = bias, heads: int = heads
        ) -> Tensor:
            tq, tk, tv = tokens.chunk(3, -1)
            y, x = (torch.tensor(axis) for axis in zip(*places, strict=True))
            # Zeros around the kernel cover positions beyond its reach.
            dy, dx = ((axis[None] - axis[:, None]).clamp(-2, 2) + 2 for axis in (y, x))
            near = F.pad(kernel, (1, 1, 1, 1))[:, dy, dx].permute(1, 2, 0)
            return softmax_of(tq, tk, tv, heads) + (near * tv[None]).sum(1) + bias

        out.append(by_groups(together, group, mix, heads * size))
    return module.proj(torch.cat(out, -1))


def global_oracle(module: Any, x: Tensor) -> Tensor:
    """Every token with one key per sr_ratio x sr_ratio block: the block's weighted sum, normalised over channels."""
    ratio, out = module.sr_ratio, torch.zeros_like(x)
    for image in range(len(x)):
        keys = []
        for top, left in product(range(0, x.shape[1], ratio), range(0, x.shape[2], ratio)):
            block = x[image, top : top + ratio, left : left + ratio]
            weight = module.sr.weight[:, :, : block.shape[0], : block.shape[1]]
            keys.append(torch.einsum("ocyx,yxc->o", weight, block) + module.sr.bias)
        reduced = F.layer_norm(torch.stack(keys), (x.shape[-1],), module.norm.weight, module.norm.bias)
        mixed = softmax_of(module.q(x[image].flatten(0, 1)), *module.kv(reduced).chunk(2, -1), module.num_heads)
        out[image] = mixed.view(x.shape[1:])
    return module.proj(out)


def oracle(name: str, module: Any, x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    if name == "shifted_window":
        return window_oracle(module, x, shifted(module.window_size, height, width))
    if name == "dilated":
        step = module.dilation
        return window_oracle(module, x, dilated(module.window_size, step), (step, step))
    if name == "block_grid":
        x = window_oracle(module.block, x, unmodified(module.block.window_size))
        return window_oracle(module.grid, x, *spread(module.grid.window_size, height, width))
    if name == "spatially_separable":
        return global_oracle(module.sub_sampled, window_oracle(module.local, x, unmodified(module.local.window_size)))
    if name == "cross_shaped":
        return stripes_oracle(module, x)
    for _ in range(module.recurrence):
        crossed = cross_oracle(module, x)
        x = crossed if module.gamma is None else module.gamma * crossed + x
    return x


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("shifted_window", dict(window_size=4)),
    ("shifted_window", dict(window_size=3, qkv_bias=False)),
    ("dilated", dict(window_size=2, dilation=2)),
    ("dilated", dict(window_size=2, dilation=3)),
    ("block_grid", dict(window_size=4, grid_size=4)),
    ("block_grid", dict(window_size=2, grid_size=3, relative_position_bias=False)),
    ("block_grid", dict(window_size=4, grid_size=2, pretrained_window_size=3)),
    ("spatially_separable", dict(window_size=4, sr_ratio=4)),
    ("spatially_separable", dict(window_size=3, sr_ratio=2)),
    ("cross_shaped", dict(stripe_width=2)),
    ("cross_shaped", dict(stripe_width=3, qkv_bias=False)),
    ("criss_cross", dict(recurrence=1)),
    ("criss_cross", dict(recurrence=2, qk_reduction=2, residual=True)),
]
CASES = [
    pytest.param(name, impl, options, id=f"{name} {impl} {' '.join(f'{k}={v}' for k, v in options.items())}")
    for name, options in OPTIONS
    for impl in get(name).impls
]


@pytest.mark.parametrize(("name", "impl", "options"), CASES)
def test_equals_tokens_grouped_one_by_one(name: str, impl: str, options: dict[str, Any]) -> None:
    """Also where windows do not divide the grid: masked padding does not affect any token."""
    module = zoo(name, impl, **options)
    for size in GRIDS:
        exact = with_gradients(lambda x: oracle(name, module, x), module, grid(*size))
        assert_close(with_gradients(module, module, grid(*size)), exact)


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_equals_the_reference_and_images_do_not_meet(name: str) -> None:
    for impl in get(name).impls:
        module, reference, x = zoo(name, impl), zoo(name), grid(9, 16, batch=3)
        result = with_gradients(module, module, x)
        assert_close(result, with_gradients(reference, reference, x))
        torch.testing.assert_close(torch.cat([module(one[None]) for one in x]), result[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module(x.flip(0)), result[0].flip(0), rtol=1e-10, atol=1e-12)


def full_like(qkv: nn.Linear, proj: nn.Linear) -> nn.Module:
    full = build("full", dim=qkv.in_features, num_heads=HEADS, impl="reference", qkv_bias=True).double()
    full.qkv.load_state_dict(qkv.state_dict())
    full.proj.load_state_dict(proj.state_dict())
    return full


@pytest.mark.parametrize("size", [(6, 6), (5, 6), (1, 6)])
def test_windows_as_large_as_the_grid_are_full_attention(size: tuple[int, int]) -> None:
    x = grid(*size)
    unbiased = {"relative_position_bias": False}
    shifted_window, dilated_window = zoo("shifted_window", window_size=6), zoo("dilated", window_size=6, dilation=1)
    nn.init.zeros_(shifted_window.relative_position_bias_table)
    for module in (shifted_window, dilated_window):
        assert (module(x) - full_like(module.qkv, module.proj)(x)).abs().max() < 1e-12
    both = zoo("block_grid", window_size=6, grid_size=6, **unbiased)
    layers = [full_like(layer.qkv, layer.proj) for layer in (both.block, both.grid)]
    assert (both(x) - layers[1](layers[0](x))).abs().max() < 1e-12
    separable = zoo("spatially_separable", window_size=6, sr_ratio=1)
    local, last = separable.local, separable.sub_sampled
    joined = nn.Linear(DIM, 3 * DIM).double()
    joined.weight.data = torch.cat([last.q.weight, last.kv.weight])
    joined.bias.data = torch.cat([last.q.bias, last.kv.bias])
    expected = full_like(joined, last.proj)(full_like(local.qkv, local.proj)(x))
    assert (separable(x) - expected).abs().max() < 1e-12


def test_one_stripe_over_the_grid_is_full_attention_with_lepe() -> None:
    module, x = zoo("cross_shaped", stripe_width=6), grid(5, 6)
    q, k, v = module.qkv(x).flatten(1, 2).chunk(3, -1)
    full = torch.stack([softmax_of(*one, HEADS) for one in zip(q, k, v, strict=True)]).view_as(x)
    weight, bias = (torch.cat([getattr(conv, part) for conv in module.lepe]) for part in ("weight", "bias"))
    planes = v.view_as(x).movedim(-1, 1)
    lepe = F.conv2d(planes, weight, bias, padding=1, groups=DIM).movedim(1, -1)
    assert (module(x) - module.proj(full + lepe)).abs().max() < 1e-12


def test_one_row_criss_crossed_is_full_attention() -> None:
    for size in ((1, 11), (11, 1)):
        module, x = zoo("criss_cross", recurrence=1), grid(*size)
        assert (module(x) - full_like(module.qkv, module.proj)(x)).abs().max() < 1e-12


def test_recurrence_applies_the_same_weights_again() -> None:
    once, thrice, x = zoo("criss_cross", recurrence=1), zoo("criss_cross", recurrence=3), grid(4, 5)
    assert sum(p.numel() for p in once.parameters()) == sum(p.numel() for p in thrice.parameters())
    assert torch.equal(thrice(x), once(once(once(x))))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_no_shift_and_no_dilation_is_plain_window_attention(impl: str) -> None:
    swin = zoo("shifted_window", impl, window_size=4)
    plain_window = zoo("window", impl, window_size=4, relative_position_bias=True)
    shifted_window = zoo("window", impl, window_size=4, relative_position_bias=True, shift=2)
    assert swin.state_dict().keys() == plain_window.state_dict().keys()
    for size in ((4, 4), (3, 4), (1, 1)):
        assert torch.equal(swin(grid(*size)), plain_window(grid(*size)))
    for size in ((8, 8), (5, 9)):
        assert torch.equal(swin(grid(*size)), shifted_window(grid(*size)))
        assert (swin(grid(*size)) - plain_window(grid(*size))).abs().max() > 1e-3
    for size in ((8, 8), (5, 9)):
        undilated = zoo("dilated", impl, window_size=4, dilation=1)
        assert torch.equal(undilated(grid(*size)), zoo("window", impl, window_size=4)(grid(*size)))


def dependence(module: nn.Module, size: tuple[int, int]) -> Tensor:
    """Whether the output at token i depends on the input at token j, as (i, j)."""
    jacobian = torch.autograd.functional.jacobian(module, grid(*size, batch=1), vectorize=True)
    tokens = size[0] * size[1]
    return jacobian.view(tokens, DIM, tokens, DIM).abs().amax((1, 3)) > 1e-14


def met_by(group: Callable[[int, int], Hashable], size: tuple[int, int]) -> Tensor:
    labels = [group(*place) for place in product(range(size[0]), range(size[1]))]
    return torch.tensor([[a == b for b in labels] for a in labels])


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 8)])
def test_nothing_crosses_a_border_and_keys_are_counted(size: tuple[int, int]) -> None:
    sparse, _ = spread(3, *size)
    rules: list[tuple[Any, Callable[[int, int], Hashable]]] = [
        (zoo("shifted_window", window_size=3), shifted(3, *size)),
        (zoo("dilated", window_size=2, dilation=2), dilated(2, 2)),
        (drawn(GridAttention(DIM, HEADS, "sdpa", window_size=3, relative_position_bias=True)), sparse),
    ]
    for module, group in rules:
        expected = met_by(group, size)
        assert torch.equal(dependence(module, size), expected)
        mean = expected.sum(1).double().mean().item()
        assert module.kv_tokens_per_query(*size) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 8)])
def test_reach_of_criss_cross_stripes_and_separable_layers(size: tuple[int, int]) -> None:
    rows, cols = met_by(lambda row, col: row, size), met_by(lambda row, col: col, size)
    crossed = zoo("criss_cross", recurrence=1)
    assert torch.equal(dependence(crossed, size), rows | cols)
    assert crossed.kv_tokens_per_query(*size) == (rows | cols).sum(1)[0]
    assert dependence(zoo("criss_cross", recurrence=2), size).all()
    striped = zoo("cross_shaped", stripe_width=2)
    across, along = met_by(lambda row, col: row // 2, size), met_by(lambda row, col: col // 2, size)
    assert torch.equal(dependence(striped, size), across | along)
    mean = (across.sum() + along.sum()).item() / (2 * len(across))
    assert striped.kv_tokens_per_query(*size) == pytest.approx(mean, rel=1e-12)
    blocks = met_by(unmodified(2), size)
    separable = zoo("spatially_separable", window_size=2, sr_ratio=3)
    assert dependence(separable, size).all()
    keys = -(-size[0] // 3) * -(-size[1] // 3)
    expected = blocks.sum(1).double().mean().item() + keys
    assert separable.kv_tokens_per_query(*size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name: str) -> None:
    module = zoo(name, dim=4, **get(name).minimal_options)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    x = grid(3, 4, batch=1, dim=4).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("size", [(14, 14), (28, 20), (56, 56), (13, 31), (1, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_macs_equal_the_count_at_the_defaults(name: str, size: tuple[int, int]) -> None:
    for impl in get(name).impls:
        with torch.device("meta"):
            module, x = build(name, dim=64, num_heads=2, impl=impl), torch.empty(1, *size, 64)
        assert isinstance(module, Attention)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        assert module.macs(*size).total == counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_predicted_memory_is_the_measured_on_a_ragged_grid(name: str) -> None:
    for impl, mode in zip(get(name).impls, ("forward_backward", "forward"), strict=False):
        case = Case(name, 13, 31, impl=impl, mode=mode)
        result, measured = peak_memory.predict(case.workload("meta")), peak_memory.measure(case.workload("cpu"))
        assert result.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


@pytest.mark.parametrize("shift", [(0, 0), (1, 3)])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_groups_cut_and_join_every_token_once(size: tuple[int, int], shift: tuple[int, int]) -> None:
    groups = TokenPartition(*size, size=(2, 3), dilation=(3, 2), shift=shift)
    x = torch.arange(1, size[0] * size[1] + 1).view(1, *size, 1)
    cut = groups.partition(x)
    assert cut.shape[2] == 6 and sorted(cut[cut > 0].tolist()) == x.flatten().tolist()
    assert torch.equal(groups.merge(cut), x)
    mask = groups.mask(torch.zeros((), dtype=torch.float64))
    assert mask is None or mask.eq(0).any(-1).all()


@pytest.mark.parametrize(
    ("name", "heads", "options", "valid"),
    [
        ("cross_shaped", 1, {}, "num_heads=1 has no halves.*valid for dim=8: 2, 4, 8"),
        ("shifted_window", 2, {"window_size": 1}, "window_size=1.*>= 2"),
        ("block_grid", 2, {"grid_size": 1}, "grid_size=1.*>= 2"),
        ("block_grid", 2, {"pretrained_window_size": 1}, "pretrained_window_size=1.*>= 2"),
        ("criss_cross", 2, {"qk_reduction": 3}, "qk_reduction=3.*valid: 1, 2, 4"),
        ("dilated", 2, {"dilation": 0}, "dilation=0.*>= 1"),
        ("criss_cross", 2, {"impl": "sdpa"}, "'sdpa' is not one of: auto, reference"),
    ],
)
def test_invalid_options_name_the_valid_ones(name: str, heads: int, options: dict[str, Any], valid: str) -> None:
    with pytest.raises(InvalidOption, match=valid):
        build(name, dim=DIM, num_heads=heads, **options)
