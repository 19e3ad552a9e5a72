"""The contract of every registered attention, and window, axial, full and convolutional attention by definition.

Of an attention of yours: ``pytest --plugin my_attention.py tests/attention_zoo/test_contract.py -k my_attention``.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, Unsupported, build, get, names, options
from profiling.cases.case import Case
from profiling.meters import correctness, macs, peak_memory
from profiling.schema.row import agree

DIM, HEADS = 8, 2
SHAPES = [(8, 8), (4, 12), (7, 9), (5, 3)]
META_SHAPES = [(4, 12), (7, 9)]
VALUES = (None, False, True, 0, 1, 2, 3, 0.3)
"""Values to try on every option; invalid ones are skipped."""


def impls(name: str) -> tuple[str, ...]:
    return getattr(get(name), "impls", ("reference",))


def minimal_options(name: str) -> dict[str, Any]:
    """The smallest options, with padding where it is an option, so that every shape is valid."""
    padding = {"auto_pad": True} if "auto_pad" in options(name) else {}
    return getattr(get(name), "minimal_options", {}) | padding


def variants(name: str) -> Iterator[dict[str, Any]]:
    """The smallest options, then each option in turn at other values, as a command line would give them."""
    base = minimal_options(name)
    yield base
    for option in options(name).values():
        seen = [base.get(option.name, option.default)]
        literals = [alternative.literal for alternative in option.alternatives if alternative.literal is not None]
        for text in map(str, (*VALUES, *literals)):
            try:
                value = option.parse(text)
            except InvalidOption:
                continue
            if value not in seen and not refused(name, base | {option.name: value}):
                seen.append(value)
                yield base | {option.name: value}


def refused(name: str, chosen: dict[str, Any]) -> bool:
    try:
        build(name, dim=DIM, num_heads=HEADS, **chosen)
    except InvalidOption:
        return True
    except Exception:
        return False
    return False


def label(chosen: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in chosen.items())


NAMES = names()
OWN = [name for name in NAMES if get(name).__module__.startswith("attention_zoo.")]
"""Without plugins, which torch.jit may be unable to trace."""
IMPLS = [(name, impl) for name in NAMES for impl in impls(name)]
FAST = [(name, impl) for name, impl in IMPLS if impl != impls(name)[0]]
VARIANTS = [pytest.param(name, chosen, id=f"{name} {label(chosen)}") for name in NAMES for chosen in variants(name)]


made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)


def run_or_skip(module: nn.Module, x: Tensor) -> Tensor:
    try:
        return module(x)
    except Unsupported as reason:
        pytest.skip(str(reason))


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and every parameter."""
    x = x.clone().requires_grad_()
    out = run_or_skip(module, x)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    result = {"output": out.detach(), "input": x.grad}
    return result | {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(result: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert result.keys() == exact.keys()
    for name, value in exact.items():
        error = (result[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", NAMES)
def test_class_declares_citation_docstring_and_options(name: str) -> None:
    cls = get(name)
    assert cls.citation.strip() and cls.__doc__.strip().splitlines()[0].endswith((".", ";", ","))
    if name in OWN:
        assert cls.equation and cls.left_open and cls.departs
    assert cls.impls[0] == "reference"
    assert cls.minimal_options.keys() <= options(name).keys()


@pytest.mark.parametrize(("name", "impl"), IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_keeps_the_shape_and_repeats_itself(name: str, impl: str, shape: tuple[int, int]) -> None:
    module, x = made(name, impl, **minimal_options(name)), image(*shape)
    out = run_or_skip(module, x)
    assert out.shape == x.shape and out.isfinite().all()
    assert torch.equal(out, module(x))


@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_images_of_a_batch_are_independent(name: str, impl: str) -> None:
    module, x = made(name, impl, **minimal_options(name)), image(7, 9, batch=3)
    together = run_or_skip(module, x)
    alone = torch.cat([module(one[None]) for one in x])
    assert (together - alone).abs().max() < 1e-11
    assert (module(x.flip(0)) - together.flip(0)).abs().max() < 1e-11


@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_macs_equal_the_count(name: str, chosen: dict[str, Any]) -> None:
    """On meta tensors, where fused attention is split into the matrix products that can be counted."""
    for impl, (height, width), images in product(impls(name), META_SHAPES, (1, 3)):
        module = build(name, dim=DIM, num_heads=HEADS, impl=impl, **chosen).to("meta")
        x = torch.empty(images, height, width, DIM, device="meta")
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x)
        except Unsupported:
            continue
        except InvalidOption:
            with pytest.raises(InvalidOption):
                module.macs(height, width)
            continue
        expected = module.macs(height, width).of_batch(images).total
        assert expected == counter.get_total_flops() // 2 > 0, (impl, height, width, images)


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n, i in IMPLS if n in OWN and i not in ("flex", "triton")])
@pytest.mark.parametrize("shape", META_SHAPES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_same_macs(name: str, impl: str, shape: tuple[int, int], unchecked: None) -> None:
    """fvcore counts a trace, where sizes are tensors: never equal in a set, and without the methods of an int."""
    module, x = made(name, impl, **minimal_options(name)), image(*shape)
    counts = []
    for run in (module, partial(torch.jit.trace, module, check_trace=False)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(x)
        counts.append(int(counter.get_total_flops()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["attention", "block"])
@pytest.mark.parametrize("name", OWN)
def test_fvcore_agrees_with_the_count(name: str, kind: str, unchecked: None) -> None:
    work = Case(name, 28, 28, kind=kind, impl="reference").workload("cpu")
    assert agree(None, macs.counted(work)[0], macs.by_fvcore(work))


@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_gradients_reach_every_parameter(name: str, chosen: dict[str, Any]) -> None:
    for tensor, gradient in gradients(made(name, **chosen), image(8, 8)).items():
        assert gradient.isfinite().all(), tensor
        assert gradient.abs().max() > 1e-6, tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_half_precision_stays_finite(name: str, chosen: dict[str, Any], dtype: torch.dtype) -> None:
    """Where a grid is padded too. Heads of 16 channels: of fewer, a ReLU often sets all to zero."""
    grid = (8, 8) if chosen.get("auto_pad") is False else (7, 9)
    x = torch.randn(2, *grid, 32, requires_grad=True)
    module = build(name, dim=32, num_heads=HEADS, **chosen)
    with torch.autocast("cpu", dtype):
        out = module(x)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    tensors = {"output": out, "input": x.grad} | {key: weight.grad for key, weight in module.named_parameters()}
    assert [key for key, tensor in tensors.items() if not tensor.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_has_twice_the_macs_at_most(name: str) -> None:
    chosen = tuple(sorted(minimal_options(name).items()))
    case = Case(name, 7, 9, DIM, HEADS, chosen, impl="reference", mode="forward_backward")
    forward, backward = macs.counted(case.workload("meta"))
    assert 0 < backward <= 2 * forward


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str) -> None:
    module, x = made(name, **minimal_options(name)), image(5, 4, batch=1).requires_grad_()
    state = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(state, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *state.values()), fast_mode=True, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize(("name", "impl"), FAST)
def test_fast_implementations_equal_the_reference(name: str, impl: str) -> None:
    for chosen, shape in product(variants(name), [(8, 8), (7, 9)]):
        x = image(*shape)
        try:
            exact = gradients(made(name, **chosen), x)
        except InvalidOption:
            continue
        assert_same(gradients(made(name, impl, **chosen), x), exact)


@pytest.mark.parametrize(
    ("name", "impl"), [pytest.param(*fast, marks=[pytest.mark.slow] * ("triton" in fast)) for fast in FAST]
)
@pytest.mark.parametrize("size", [(8, 8), (14, 10)])
def test_fast_implementations_pass_the_agreement_gate(name: str, impl: str, size: tuple[int, int]) -> None:
    case = Case(name, *size, dim=16, num_heads=4, options=tuple(minimal_options(name).items()), impl=impl, batch=2)
    try:
        result = correctness.check(case)
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert result is not None and result.ok, result


@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_auto_is_the_fastest_that_can_run(name: str, impl: str) -> None:
    x = image(8, 8)
    automatic = made(name, "auto", **minimal_options(name))
    assert automatic.chosen_impl(x) in impls(name)
    if automatic.unsupported(impls(name)[-1], x) is None:
        assert automatic.chosen_impl(x) == impls(name)[-1]
    if automatic.unsupported(impl, x) is None:
        assert made(name, impl, **minimal_options(name)).chosen_impl(x) == impl


@pytest.mark.parametrize("mode", [pytest.param("forward", marks=pytest.mark.slow), "forward_backward"])
@pytest.mark.parametrize(("name", "impl"), IMPLS)
def test_predicted_memory_is_the_measured(name: str, impl: str, mode: str) -> None:
    if impl == "triton":
        pytest.skip("its interpreter holds on to tensors; test_bra_triton_operators.py knows how to measure it")
    case = Case(name, 28, 28, dim=64, num_heads=2, impl=impl, mode=mode)
    try:
        measured = peak_memory.measure(case.workload("cpu"))
        predicted = peak_memory.predict(case.workload("meta"))
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert predicted.base == measured.base
    assert predicted.peak > predicted.base
    # What the fused kernel allocates for fewer queries than one of its blocks is not modelled.
    fused = 3e-2 if name == "agent" else 2e-2
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else fused)


def attention_of(x: Tensor, qkv: nn.Linear, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention among all tokens of (tokens, channels), head by head; ``bias`` is (heads, tokens, tokens)."""
    q, k, v = qkv(x).chunk(3, dim=-1)
    out = []
    for head, (a, b, c) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)):
        scores = a @ b.T / a.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias[head]
        shares = scores.exp()
        out.append(shares / shares.sum(-1, keepdim=True) @ c)
    return torch.cat(out, -1)


def by_hand(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Like :func:`gradients`, for another forward pass with the same parameters."""
    module.zero_grad(set_to_none=True)
    module.forward = forward
    result = gradients(module, x)
    del module.forward
    module.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n, i in IMPLS if n in ("full", "lepe")])
@pytest.mark.parametrize("chosen", [{}, {"qkv_bias": True}])
def test_full_attention_by_hand(name: str, impl: str, chosen: dict[str, Any]) -> None:
    module, x = made(name, impl, dim=12, heads=3, **chosen), image(5, 7, dim=12)

    def forward(x: Tensor) -> Tensor:
        out = torch.stack([attention_of(one.flatten(0, 1), module.qkv, 3).view_as(one) for one in x])
        if name == "lepe":
            lepe = F.conv2d(x.movedim(-1, 1), module.lepe.weight, module.lepe.bias, padding=2, groups=12)
            out = out + lepe.movedim(1, -1)
        return module.proj(out)

    assert_same(gradients(module, x), by_hand(module, x, forward))


def test_full_attention_does_not_see_where_tokens_are() -> None:
    module, x = made("full"), image(6, 5)
    order = torch.randperm(30)
    permuted = x.flatten(1, 2)[:, order].view_as(x)
    assert (module(permuted).flatten(1, 2) - module(x).flatten(1, 2)[:, order]).abs().max() < 1e-12
    located, fixed = made("lepe")(permuted), made("lepe")(x)
    assert (located.flatten(1, 2) - fixed.flatten(1, 2)[:, order]).abs().max() > 1e-3


def test_lepe_without_its_convolution_is_full_attention() -> None:
    x = image(6, 5)
    assert torch.equal(made("lepe", side_dwconv=0)(x), made("full")(x))


def test_pseudo_conv_by_hand() -> None:
    module, x = made("pseudo_conv"), image(6, 9)
    state = module.state_dict()

    def forward(x: Tensor) -> Tensor:
        x = F.conv2d(x.movedim(-1, 1), state["1.weight"], state["1.bias"])
        x = F.conv2d(x, state["2.weight"], state["2.bias"], padding=2, groups=DIM)
        return F.conv2d(x, state["3.weight"], state["3.bias"]).movedim(1, -1)

    assert (module(x) - forward(x)).abs().max() < 1e-12


@pytest.mark.parametrize("impl", impls("axial"))
def test_axial_attention_is_rows_then_columns(impl: str) -> None:
    module, x = made("axial", impl, dim=12, heads=3), image(5, 7, dim=12)

    def forward(x: Tensor) -> Tensor:
        rows = [torch.stack([attention_of(row, module.qkv_rows, 3) for row in one]) for one in x]
        x = module.proj_rows(torch.stack(rows))
        columns = [torch.stack([attention_of(one[:, i], module.qkv_cols, 3) for i in range(7)], 1) for one in x]
        return module.proj_cols(torch.stack(columns))

    assert_same(gradients(module, x), by_hand(module, x, forward))


def test_axial_attention_of_one_row_is_full_attention() -> None:
    axial, full, x = made("axial"), made("full"), image(1, 11)
    full.qkv.load_state_dict(axial.qkv_rows.state_dict())
    full.proj.load_state_dict(axial.proj_rows.state_dict())
    alone_in_its_column = axial.proj_cols(axial.qkv_cols(full(x))[..., -DIM:])
    assert (axial(x) - alone_in_its_column).abs().max() < 1e-12


WINDOWS = [
    dict(size=4, shift=0, grid=(8, 12)),
    dict(size=4, shift=2, grid=(8, 8)),
    dict(size=4, shift=0, grid=(7, 9)),
    dict(size=4, shift=1, grid=(7, 9)),
    dict(size=4, shift=3, grid=(6, 10)),
    dict(size=3, shift=2, grid=(8, 1)),
    dict(size=5, shift=4, grid=(3, 11)),
    dict(size=9, shift=0, grid=(5, 7)),
    dict(size=9, shift=4, grid=(5, 7)),
    dict(size=1, shift=0, grid=(3, 4)),
]


def pieces(length: int, size: int, shift: int) -> list[slice]:
    """The segments of an axis cut by the windows."""
    cuts = [0, *range(shift or size, length, size), length]
    return [slice(a, b) for a, b in pairwise(cuts)]


def window_by_hand(module: nn.Module, x: Tensor, size: int, shift: int) -> Tensor:
    """Each window by itself, its relative position bias looked up pair by pair."""
    out = torch.zeros_like(x)
    for one, ys, xs in product(
        range(len(x)), pieces(x.shape[1], size, shift), pieces(x.shape[2], size, shift)
    ):  # fmt: skip
        tile = x[one, ys, xs]
        places = list(product(range(tile.shape[0]), range(tile.shape[1])))
        bias = None
        if module.relative_position_bias_table is not None:
            entry = [[(a - c + size - 1) * (2 * size - 1) + b - d + size - 1 for c, d in places] for a, b in places]
            bias = module.relative_position_bias_table[torch.tensor(entry)].movedim(-1, 0)
        mixed = attention_of(tile.flatten(0, 1), module.qkv, HEADS, bias)
        out[one, ys, xs] = mixed.view_as(tile)
    return module.proj(out)


@pytest.mark.parametrize("impl", impls("window"))
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", WINDOWS, ids=label)
def test_windows_equal_each_window_by_itself(case: dict[str, Any], biased: bool, impl: str) -> None:
    size, shift, grid = case.values()
    module = made("window", impl, window_size=size, shift=shift, relative_position_bias=biased)
    x = image(*grid)
    exact = by_hand(module, x, lambda x: window_by_hand(module, x, size, shift))
    assert_same(gradients(module, x), exact)


@pytest.mark.parametrize("case", WINDOWS, ids=label)
def test_window_keys_are_the_tokens_that_a_query_depends_on(case: dict[str, Any]) -> None:
    size, shift, (height, width) = case.values()
    module = made("window", window_size=size, shift=shift)
    met = dependence(module, image(height, width, batch=1))
    assert module.kv_tokens_per_query(height, width) == pytest.approx(met.sum(1).double().mean().item(), rel=1e-12)
    for ys, xs in product(pieces(height, size, shift), pieces(width, size, shift)):
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[ys, xs] = True
        assert met[inside.flatten()].eq(inside.flatten()).all()


@pytest.mark.parametrize(("name", "chosen"), [("full", {}), ("lepe", {"side_dwconv": 0}), ("pseudo_conv", {})])
@pytest.mark.parametrize("grid", [(5, 7), (3, 9), (1, 4)])
def test_keys_are_the_tokens_that_a_query_depends_on(name: str, chosen: dict[str, Any], grid: tuple[int, int]) -> None:
    module = made(name, **chosen)
    met = dependence(module, image(*grid, batch=1))
    assert module.kv_tokens_per_query(*grid) == pytest.approx(met.sum(1).double().mean().item(), rel=1e-12)


def test_axial_key_count() -> None:
    module = made("axial")
    rows, columns = dependence(module, image(1, 6, batch=1)), dependence(module, image(5, 1, batch=1))
    assert rows.all() and columns.all()
    assert module.kv_tokens_per_query(5, 6) == len(rows) + len(columns) == 11


def dependence(module: nn.Module, x: Tensor) -> Tensor:
    """Whether output token i depends on input token j, as (i, j)."""
    tokens, channels = x.shape[1] * x.shape[2], x.shape[3]
    jacobian = torch.autograd.functional.jacobian(module, x, vectorize=True)
    return jacobian.view(tokens, channels, tokens, channels).abs().amax((1, 3)) > 1e-14


def test_a_window_over_the_whole_grid_is_full_attention() -> None:
    full = made("full", qkv_bias=True)
    for size, grid in ((8, (8, 8)), (8, (5, 8)), (9, (4, 7))):
        window, x = made("window", window_size=size), image(*grid)
        window.load_state_dict(full.state_dict())
        assert (window(x) - full(x)).abs().max() < 1e-12


def test_no_shift_is_the_default_and_a_shift_matters() -> None:
    x = image(8, 8)
    unmodified = made("window", window_size=4)(x)
    assert torch.equal(made("window", window_size=4, shift=0)(x), unmodified)
    assert (made("window", window_size=4, shift=2)(x) - unmodified).abs().max() > 1e-3


@pytest.mark.parametrize("impl", impls("window"))
def test_nothing_crosses_the_border_that_a_shift_rolls_together(impl: str) -> None:
    module, x = made("window", impl, window_size=4, shift=2, relative_position_bias=True), image(8, 8, batch=1)
    before = module(x)
    for row, column in ((0, 3), (7, 3), (3, 0), (3, 7), (0, 0), (7, 7)):
        moved = x.clone()
        moved[0, row, column] += 100
        changed = (module(moved) != before).any(-1)[0]
        inside = torch.zeros(8, 8, dtype=torch.bool)
        ys, xs = (next(p for p in pieces(8, 4, 2) if p.start <= at < p.stop) for at in (row, column))
        inside[ys, xs] = True
        assert changed[row, column] and not changed[~inside].any()
