"""Agents, feature maps, channels, full attention and its controls, each against loops over tokens by its equations."""

from collections.abc import Callable
from functools import partial
from itertools import product
from math import ceil, floor
from typing import Any

import conftest
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, build, get
from profiling.cases.case import Case
from profiling.meters import peak_memory

DIM, HEADS = 8, 2
SIZE = DIM // HEADS
NEW = ("agent", "focused_linear", "cross_covariance", "relu_linear")
GRIDS = [(14, 14), (28, 20), (13, 31), (1, 9), (1, 1)]
Oracle = Callable[[nn.Module, Tensor], Tensor]
"""Maps a module and one image (h, w, channels) to its output, with nothing of the module but its parameters."""

made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)


def assert_equal(module: nn.Module, x: Tensor, oracle: Oracle, tolerance: float = 1e-12) -> None:
    """Output and gradients of the input and every parameter, against the oracle's, image by image."""
    x = x.clone().requires_grad_()
    of = {"input": x, **dict(module.named_parameters())}
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    outs = module(x), torch.stack([oracle(module, one) for one in x])
    gradients = [torch.autograd.grad((out * weight).sum(), list(of.values())) for out in outs]
    for name, result, exact in zip(("output", *of), (outs[0], *gradients[0]), (outs[1], *gradients[1]), strict=True):
        error = (result - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert error < tolerance, f"{name}: {error:.2g}"


def places(x: Tensor) -> list[tuple[int, int]]:
    return list(product(range(x.shape[0]), range(x.shape[1])))


def linear(layer: nn.Module, token: Tensor) -> Tensor:
    out = (layer.weight.flatten(1) * token).sum(1)
    return out if layer.bias is None else out + layer.bias


def mapped(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of one token, applied to each."""
    return torch.stack([torch.stack([function(token) for token in row]) for row in x])


def head(x: Tensor, number: int) -> Tensor:
    return x[..., number * SIZE : (number + 1) * SIZE]


def depthwise(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Tap by tap; taps outside of the image are left out."""
    reach = weight.shape[-1] // 2
    out = {}
    for row, col in places(x):
        total = torch.zeros_like(x[0, 0]) if bias is None else bias
        for dy, dx in product(range(-reach, reach + 1), repeat=2):
            if 0 <= row + dy < x.shape[0] and 0 <= col + dx < x.shape[1]:
                total = total + weight[:, 0, dy + reach, dx + reach] * x[row + dy, col + dx]
        out[row, col] = total
    return torch.stack([torch.stack([out[row, col] for col in range(x.shape[1])]) for row in range(x.shape[0])])


def softmax(scores: Tensor) -> Tensor:
    shares = (scores - scores.max()).exp()
    return shares / shares.sum()


def attended(q: Tensor, k: list[Tensor], v: list[Tensor], bias: list[Tensor] | None = None) -> Tensor:
    """One query of one head."""
    scores = torch.stack([(q * key).sum() / SIZE**0.5 for key in k])
    shares = softmax(scores if bias is None else scores + torch.stack(bias))
    return torch.stack([share * value for share, value in zip(shares, v, strict=True)]).sum(0)


def resampled(values: Tensor, size: int) -> list[Tensor]:
    """Linear interpolation along the first axis: the outer edges coincide, positions beyond a centre are clamped."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(values) / size - 0.5, 0.0), len(values) - 1.0)
        low = int(at)
        out.append((1 - at + low) * values[low] + (at - low) * values[min(low + 1, len(values) - 1)])
    return out


def on_grid(table: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of a table (rows, columns, ...)."""
    return torch.stack([torch.stack(resampled(row, width)) for row in resampled(table, height)])


# Full attention and its controls


def full_by_hand(module: nn.Module, x: Tensor, source: str | None = None) -> Tensor:
    q, k, v = mapped(partial(linear, module.qkv), x).chunk(3, -1)
    local = None
    if source is not None:
        local = depthwise(module.lepe.weight, module.lepe.bias, x if source == "input" else v)

    def out(row: int, col: int) -> Tensor:
        parts = []
        for number in range(HEADS):
            keys, values = ([head(part[at], number) for at in places(x)] for part in (k, v))
            parts.append(attended(head(q[row, col], number), keys, values))
        return linear(module.proj, torch.cat(parts) + (0 if local is None else local[row, col]))

    return torch.stack([torch.stack([out(row, col) for col in range(x.shape[1])]) for row in range(x.shape[0])])


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("grid", [(3, 4), (1, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_full_attention_token_by_token(bias: bool, grid: tuple[int, int], impl: str) -> None:
    assert_equal(made("full", impl, qkv_bias=bias), image(*grid), full_by_hand)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(("source", "kernel"), [("input", 5), ("input", 3), ("values", 3)])
def test_lepe_token_by_token(source: str, kernel: int, impl: str) -> None:
    module = made("lepe", impl, side_dwconv=kernel, lepe_of=source, qkv_bias=True)
    assert_equal(module, image(3, 4), partial(full_by_hand, source=source))


def test_pseudo_conv_token_by_token() -> None:
    def by_hand(module: nn.Module, x: Tensor) -> Tensor:
        first, middle, last = module.children()
        return mapped(partial(linear, last), depthwise(middle.weight, middle.bias, mapped(partial(linear, first), x)))

    for grid in ((3, 7), (1, 2)):
        assert_equal(made("pseudo_conv"), image(*grid), by_hand)


@pytest.mark.parametrize("eps", [0, 1e-6, 0.5])
def test_linear_attention_token_by_token(eps: float) -> None:
    """The published code adds 1e-6 to the denominator, the paper nothing."""

    def by_hand(module: nn.Module, x: Tensor) -> Tensor:
        def phi(t: Tensor) -> Tensor:
            return torch.stack([value + 1 if value > 0 else value.exp() for value in t])

        q, k, v = mapped(partial(linear, module.qkv), x).chunk(3, -1)
        parts = []
        for number in range(HEADS):
            keys = [(phi(head(k[at], number)), head(v[at], number)) for at in places(x)]

            def of_head(token: Tensor, number: int = number, keys: list[tuple[Tensor, Tensor]] = keys) -> Tensor:
                shares = [(phi(head(token, number)) * key).sum() for key, _ in keys]
                mixed = [share * value for share, (_, value) in zip(shares, keys, strict=True)]
                return torch.stack(mixed).sum(0) / (torch.stack(shares).sum() + eps)

            parts.append(mapped(of_head, q))
        return mapped(partial(linear, module.proj), torch.cat(parts, -1))

    assert_equal(made("linear", eps=eps), image(3, 4), by_hand)


# Agents


def agent_bias_by_hand(bias: nn.Module, height: int, width: int) -> Tensor:
    """(height, width, heads, agents)."""
    first = partial(torch.movedim, source=(2, 3), destination=(0, 1))
    rows, columns = (first(table) for table in (bias.rows, bias.columns))
    return (
        on_grid(first(bias.block), height, width)
        + torch.stack(resampled(rows, height))
        + torch.stack(resampled(columns[0], width))[None]
    )


def agent_by_hand(module: nn.Module, x: Tensor) -> Tensor:
    height, width, side = *x.shape[:2], module.agents_per_side
    q, k, v = mapped(partial(linear, module.qkv), x).chunk(3, -1)
    agents = []
    for i, j in product(range(side), repeat=2):
        ys, xs = ((floor(n * of / side), ceil((n + 1) * of / side)) for n, of in ((i, height), (j, width)))
        part = [q[at] for at in product(range(*ys), range(*xs))]
        agents.append(sum(part) / len(part))
    biases = [
        None if bias is None else agent_bias_by_hand(bias, height, width)
        for bias in (module.gather_bias, module.broadcast_bias)
    ]
    local = 0 * v if module.dwc is None else depthwise(module.dwc.weight, module.dwc.bias, v)
    parts = []
    for number in range(HEADS):
        keys, values = ([head(part[at], number) for at in places(x)] for part in (k, v))
        agents_of_head = [head(agent, number) for agent in agents]
        gathered = [
            attended(agent, keys, values, None if biases[0] is None else [biases[0][at][number, a] for at in places(x)])
            for a, agent in enumerate(agents_of_head)
        ]
        out = {
            at: attended(
                head(q[at], number),
                agents_of_head,
                gathered,
                None if biases[1] is None else list(biases[1][at][number]),
            )
            for at in places(x)
        }
        parts.append(torch.stack([torch.stack([out[row, col] for col in range(width)]) for row in range(height)]))
    return mapped(partial(linear, module.proj), torch.cat(parts, -1) + local)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("grid", "chosen"),
    [
        ((4, 4), {}),
        ((5, 3), {}),
        ((1, 3), {}),
        ((4, 5), {"agents_per_side": 3, "table_side": 7, "dwc_kernel": 5}),
        ((3, 4), {"agent_bias": False, "qkv_bias": False}),
        ((3, 4), {"agents_per_side": 1, "dwc_kernel": 0}),
    ],
)
def test_agent_attention_token_by_token(grid: tuple[int, int], chosen: dict[str, Any], impl: str) -> None:
    module = made("agent", impl, **({"agents_per_side": 2, "table_side": 4} | chosen))
    assert_equal(module, image(*grid), agent_by_hand)


def test_agent_bias_on_its_own_grid_is_the_tables_themselves() -> None:
    bias = made("agent", table_side=7, agents_per_side=2).gather_bias
    exact = bias.block + bias.rows + bias.columns
    assert (bias(7, 7) - exact.flatten(2)).abs().max() < 1e-14


def test_agent_with_an_agent_per_token_and_no_bias_is_full_attention_twice() -> None:
    """Agents are then the queries: q attends to q, which has attended to k."""
    module, x = made("agent", agents_per_side=3, agent_bias=False, dwc_kernel=0), image(3, 3)
    q, k, v = (part.unflatten(-1, (HEADS, SIZE)).movedim(2, 1) for part in module.qkv(x.flatten(1, 2)).chunk(3, -1))
    once = torch.softmax(q @ k.mT / SIZE**0.5, -1) @ v
    twice = torch.softmax(q @ q.mT / SIZE**0.5, -1) @ once
    assert (module(x) - module.proj(twice.movedim(1, 2).flatten(2)).view_as(x)).abs().max() < 1e-12


# Feature maps


def focused_by_hand(module: nn.Module, x: Tensor) -> Tensor:
    height, width, power = *x.shape[:2], module.focusing_factor
    q, k, v = mapped(partial(linear, module.qkv), x).chunk(3, -1)
    if module.positional_encoding is not None:
        table = module.positional_encoding[0]
        side = round(len(table) ** 0.5)
        k = k + on_grid(torch.stack([table[row * side : (row + 1) * side] for row in range(side)]), height, width)
    scale = (1 + module.scale[0, 0].exp()).log()

    def phi(token: Tensor) -> Tensor:
        token = (torch.stack([value if value > 0 else 0 * value for value in token]) + 1e-6) / scale
        raised = torch.stack([value**power for value in token])
        return (token**2).sum().sqrt() / (raised**2).sum().sqrt() * raised

    q, k = mapped(phi, q), mapped(phi, k)
    parts = []
    for number in range(HEADS):
        keys = [(head(k[at], number), head(v[at], number)) for at in places(x)]

        def of_head(token: Tensor, number: int = number, keys: list[tuple[Tensor, Tensor]] = keys) -> Tensor:
            shares = [(head(token, number) * key).sum() / len(keys) for key, _ in keys]
            mixed = [share * value for share, (_, value) in zip(shares, keys, strict=True)]
            return torch.stack(mixed).sum(0) / (torch.stack(shares).sum() + 1e-6)

        out = mapped(of_head, q)
        parts.append(
            out if module.dwc is None else out + depthwise(module.dwc.weight, module.dwc.bias, head(v, number))
        )
    return mapped(partial(linear, module.proj), torch.cat(parts, -1))


@pytest.mark.parametrize(
    ("grid", "chosen"),
    [
        ((4, 4), {}),
        ((5, 3), {}),
        ((1, 3), {"table_side": 1}),
        ((3, 4), {"focusing_factor": 1, "dwc_kernel": 0}),
        ((3, 4), {"focusing_factor": 5, "dwc_kernel": 5, "positional_encoding": False, "qkv_bias": False}),
    ],
)
def test_focused_linear_attention_token_by_token(grid: tuple[int, int], chosen: dict[str, Any]) -> None:
    module = made("focused_linear", **({"dwc_kernel": 3, "table_side": 4} | chosen))
    assert_equal(module, image(*grid), focused_by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [3, 32])
def test_the_focused_map_keeps_norms_and_stays_in_the_range_of_numbers(power: int, dtype: torch.dtype) -> None:
    module = build("focused_linear", dim=DIM, num_heads=HEADS, focusing_factor=power, table_side=4).to(dtype)
    x = image(2, 3).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = -1, 1e3
    out, tokens = module(x), torch.relu(x.flatten(1, 2)) + 1e-6
    norms = (tokens.double() / torch.log(torch.tensor(2.0))).norm(dim=-1)
    focused = module._focused(x.flatten(1, 2)).double().norm(dim=-1)
    assert ((focused / norms - 1).abs() < (1e-5 if dtype == torch.float32 else 3e-2)).all()
    assert out.isfinite().all()
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def grouped(weight: Tensor, bias: Tensor | None, token: Tensor) -> Tensor:
    """A linear map of the channels of each of q, k and v of a head."""
    rows = [(row * token[i // SIZE * SIZE : (i // SIZE + 1) * SIZE]).sum() for i, row in enumerate(weight)]
    return torch.stack(rows) + (0 if bias is None else bias)


def relu_by_hand(module: nn.Module, x: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
    scales = [mapped(partial(linear, module.qkv), x)]
    for aggregate in module.aggregation:
        local = depthwise(aggregate[0].weight, aggregate[0].bias, scales[0])
        scales.append(mapped(partial(grouped, aggregate[1].weight[:, :, 0, 0], aggregate[1].bias), local))
    parts = []
    for scale, number in product(scales, range(HEADS)):
        q, k, v = (head(scale, 3 * number + part) for part in range(3))
        keys = [(k[at].clamp_min(0), v[at]) for at in places(x)]

        def of_head(token: Tensor, keys: list[tuple[Tensor, Tensor]] = keys) -> Tensor:
            shares = [(token.clamp_min(0) * key).sum() for key, _ in keys]
            mixed = [share * value for share, (_, value) in zip(shares, keys, strict=True)]
            return torch.stack(mixed).sum(0) / (torch.stack(shares).sum() + 1e-15)

        parts.append(mapped(of_head, q))
    out = mapped(partial(linear, module.proj), torch.cat(parts, -1))
    if module.norm is None:
        return out
    mean, variance = statistics or (module.norm.running_mean, module.norm.running_var)
    return (out - mean) / (variance + 1e-5).sqrt() * module.norm.weight + module.norm.bias


@pytest.mark.parametrize(
    ("grid", "chosen"),
    [
        ((3, 4), {}),
        ((5, 2), {"scales": 5}),
        ((3, 3), {"scales": "3,5", "qkv_bias": True}),
        ((3, 4), {"scales": 0, "proj_norm": False}),
        ((1, 2), {"scales": 1}),
    ],
)
def test_relu_linear_attention_token_by_token(grid: tuple[int, int], chosen: dict[str, Any]) -> None:
    module = made("relu_linear", **({"scales": 3} | chosen))
    if module.norm is not None:
        nn.init.normal_(module.norm.running_mean)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
    assert_equal(module, image(*grid), relu_by_hand)


def test_relu_linear_attention_in_training_is_normalised_by_the_batch() -> None:
    module, x = made("relu_linear", scales=3), image(3, 2)
    without = nn.ModuleDict(module.named_children())
    without.norm = None
    raw = torch.stack([relu_by_hand(without, one) for one in x])
    statistics = raw.mean((0, 1, 2)), raw.var((0, 1, 2), correction=0)
    exact = torch.stack([relu_by_hand(module, one, statistics) for one in x])
    assert (module.train()(x) - exact).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_the_relu_sets_to_zero_gets_nothing(dtype: torch.dtype) -> None:
    module = build("relu_linear", dim=DIM, num_heads=HEADS, scales=0, proj_norm=False, qkv_bias=True).to(dtype)
    nn.init.zeros_(module.qkv.weight)
    nn.init.constant_(module.qkv.bias, -1.0)
    out = module(image(2, 3).to(dtype))
    assert (out == 0).all()
    out.sum().backward()
    assert (module.qkv.weight.grad == 0).all()


def test_a_single_token_can_be_trained() -> None:
    module = build("relu_linear", dim=DIM, num_heads=HEADS)
    x = torch.randn(1, 1, 1, DIM)
    out = module(x)
    out.sum().backward()
    assert torch.equal(out, module.eval()(x)) and out.isfinite().all()


@pytest.mark.parametrize("scales", [2, "3,4", "3,", "x", "none", "0", -1])
def test_invalid_scales_are_rejected(scales: int | str) -> None:
    with pytest.raises(InvalidOption, match=r"scales=.* is not valid; valid: "):
        build("relu_linear", dim=DIM, num_heads=HEADS, scales=scales)


# Channels


def test_cross_covariance_channel_by_channel() -> None:
    def by_hand(module: nn.Module, x: Tensor) -> Tensor:
        q, k, v = mapped(partial(linear, module.qkv), x).chunk(3, -1)
        out = []
        for channel in range(DIM):
            number = channel // SIZE
            first = q[..., channel] / (q[..., channel] ** 2).sum().sqrt()
            scores = []
            for other in range(number * SIZE, (number + 1) * SIZE):
                second = k[..., other] / (k[..., other] ** 2).sum().sqrt()
                scores.append(torch.stack([first[at] * second[at] for at in places(x)]).sum())
            shares = softmax(torch.stack(scores) * module.temperature[number, 0, 0])
            out.append(sum(share * head(v, number)[..., i] for i, share in enumerate(shares)))
        return mapped(partial(linear, module.proj), torch.stack(out, -1))

    for grid, bias in product(((3, 5), (1, 1)), (False, True)):
        assert_equal(made("cross_covariance", qkv_bias=bias), image(*grid), by_hand)


def test_cross_covariance_does_not_see_where_tokens_are_and_mixes_no_heads() -> None:
    module, x = made("cross_covariance"), image(4, 3)
    order = torch.randperm(12)
    permuted = module(x.flatten(1, 2)[:, order].view_as(x))
    assert (permuted.flatten(1, 2) - module(x).flatten(1, 2)[:, order]).abs().max() < 1e-12
    module.proj.weight.data.copy_(torch.eye(DIM))
    before = module(x)
    for part in range(3):
        module.qkv.weight.data[part * DIM : part * DIM + SIZE] *= -2
    changed = (module(x) != before).any(dim=2).any(dim=1).any(dim=0)
    assert changed[:SIZE].all() and not changed[SIZE:].any()


def test_a_token_of_zeros_has_finite_gradients() -> None:
    module = made("cross_covariance", qkv_bias=False)
    x = torch.zeros(1, 2, 2, DIM, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.isfinite().all()


# All of them


@pytest.mark.parametrize("name", [*NEW, "linear", "lepe", "pseudo_conv"])
def test_macs_equal_the_count_at_every_size(name: str) -> None:
    chosen: list[dict[str, Any]] = [{}, get(name).minimal_options]
    if name == "relu_linear":
        chosen += [{"scales": "3,7"}, {"scales": 0, "proj_norm": False}]
    for impl, options, (height, width) in product(get(name).impls, chosen, GRIDS):
        module = build(name, dim=12, num_heads=3, impl=impl, **options).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.empty(1, height, width, 12, device="meta"))
        assert module.macs(height, width).total == counter.get_total_flops() // 2, (options, height, width)


@pytest.mark.parametrize("name", NEW)
def test_cost_is_linear_in_the_tokens(name: str) -> None:
    with torch.device("meta"):
        module = build(name, dim=64, num_heads=2)
    small, large = module.macs(14, 28), module.macs(56, 112)
    assert module.exponent == 1 and large.attention == 16 * small.attention and large.total == 16 * small.total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in NEW for impl in get(name).impls])
def test_predicted_memory_of_a_ragged_grid_is_the_measured(name: str, impl: str) -> None:
    case = Case(name, 13, 31, impl=impl, mode="forward_backward", batch=2)
    measured, predicted = peak_memory.measure(case.workload("cpu")), peak_memory.predict(case.workload("meta"))
    assert predicted.base == measured.base
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


@pytest.mark.parametrize("name", NEW)
def test_low_precision_is_close_to_fp64(name: str) -> None:
    exact, x = made(name, **get(name).minimal_options), image(9, 7)
    expected = exact(x)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        module = made(name, **get(name).minimal_options).to(dtype)
        result = module(x.to(dtype))
        assert result.dtype == dtype
        assert (result.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["agent", "focused_linear"])
def test_even_kernels_are_rejected(name: str) -> None:
    with pytest.raises(InvalidOption, match=r"dwc_kernel=4 is even .*; valid: 0 or an odd integer"):
        build(name, dim=DIM, num_heads=HEADS, dwc_kernel=4)
