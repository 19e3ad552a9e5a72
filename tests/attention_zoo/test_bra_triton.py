"""BRA's Triton kernels: against the fp64 reference, by the interpreter where there is no GPU; compiled for one anyway.

The interpreter takes some milliseconds for each program of a kernel, so shapes are small: a program is one tile of one
region for one head.
"""

import gc
import importlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo import Unsupported, build
from attention_zoo.attentions.bra import triton, triton_tiles
from attention_zoo.attentions.bra import triton_ops as bra
from attention_zoo.attentions.bra.kv_downsample import MODES
from attention_zoo.attentions.bra.routing import Router
from attention_zoo.attentions.bra.triton_tiles import VISITS, chunk_of
from profiling.cases.case import Case
from profiling.meters import correctness, macs, peak_memory

pytest.importorskip("triton", reason="Triton is not installed")
kernels = importlib.import_module("attention_zoo.attentions.bra.triton_kernels")

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="the interpreter cannot")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in HALVES)]
SHARED = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10}
"""Bytes of shared memory that one program can have, by compute capability."""


class Launches:
    """In place of a kernel: its launches are noted, and nothing is launched."""

    def __init__(self, noted: list[str], name: str = "") -> None:
        self.noted, self.name = noted, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.noted.append(self.name)


@pytest.fixture
def bf16_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as integers, multiplies these and drops digits: here it has the numbers, rounded."""
    if GPU:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(number: Any) -> Any:
        if number.dtype.scalar != tl.bfloat16:
            return number
        return TensorHandle((number.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def multiply_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    def cast_rounded(self: Any, number: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return cast(self, widened(number), dtype)
        if number.dtype.scalar == tl.bfloat16:
            return number
        rounded = torch.from_numpy(np.array(number.data, np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_numbers)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounded)
    monkeypatch.setattr(triton, "INTERPRETS_BF16", True)


def made(impl: str, dtype: torch.dtype, dim: int, heads: int, **chosen: Any) -> nn.Module:
    """With the same weights for each impl, large enough that the softmax is far from uniform."""
    torch.manual_seed(1)
    module = build("bra", dim=dim, num_heads=heads, impl=impl, **chosen).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return module.to(DEVICE, dtype)


def results(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and every parameter."""
    dtype = next(module.parameters()).dtype
    x = x.detach().clone().to(DEVICE, dtype).requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(x)
    out.backward(grad.to(out))
    result = {"output": out, "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: value.detach().double().clone() for name, value in result.items() if value is not None}


def check(
    grid: tuple[int, int], batch: int, dim: int, heads: int, dtype: torch.dtype = torch.float32, **chosen: Any
) -> None:
    """Errors against the fp64 reference must be about as small as those of the reference in the same type.

    All have the parameters of that type, and the routes that the kernels chose: half precision decides ties otherwise.
    """
    torch.manual_seed(2)
    x, grad = torch.randn(2, batch, *grid, dim).to(dtype).unbind()
    fast, own, exact = (made(impl, dtype, dim, heads, **chosen) for impl in ("triton", "reference", "reference"))
    fast.keep_routes = True
    result = results(fast, x, grad)
    if dtype != torch.float32:
        own.router.imposed = exact.router.imposed = fast.kept_routes
    allowed, expected = results(own, x, grad), results(exact.double(), x, grad)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.norm().clamp_min(1e-9)
        room = correctness.ROOM * max(((allowed[name] - value).norm() / scale).item(), 1e-6)
        error = ((result[name] - value).norm() / scale).item()
        assert error <= room, (name, error, room)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Any options, for kernels of few programs."""
    side = draw(st.integers(1, 3))
    heads = draw(st.integers(1, 3 if side == 1 else 2 if side == 2 else 1))
    batch = draw(st.integers(1, 2 if side * heads < 3 else 1))
    longest = 16 if side * heads * batch == 1 else 5
    region = [draw(st.integers(1, longest)) for _ in range(2)]
    ragged = [draw(st.integers(0, min(size, 3) - 1)) for size in region]
    head, qk_head = (draw(st.sampled_from([3, 5, 16, 24, 32, 64, 96, 128])) for _ in range(2))
    return dict(
        grid=tuple(side * size - cut for size, cut in zip(region, ragged, strict=True)),
        batch=batch,
        dim=head * heads,
        qk_dim=qk_head * heads,
        heads=heads,
        n_win=side,
        topk=draw(st.integers(1, side**2)),
        kv_downsample_mode=draw(st.sampled_from(MODES)) if min(region) > 2 else "identity",
        kv_downsample_ratio=2,
        kv_per_win=2,
        soft_routing=draw(st.booleans()),
        diff_routing=draw(st.booleans()),
        side_dwconv=draw(st.sampled_from([0, 3])),
        auto_pad=True,
        mask_padding=draw(st.booleans()),
    )


FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@FEW
@given(shape=shapes())
def test_random_shapes_equal_the_reference(shape: dict[str, Any]) -> None:
    check(**shape)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16_interpreted")
@settings(FEW, max_examples=8)
@given(shape=shapes(), dtype=st.sampled_from(HALVES))
def test_random_shapes_in_half_precision_equal_the_reference(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check(**shape, dtype=dtype)


CASES: dict[str, dict[str, Any]] = {
    "tiles of several regions": dict(grid=(6, 9), n_win=3, topk=7),
    "one token per region": dict(grid=(3, 3), n_win=3, topk=4),
    "tiles that divide a region": dict(grid=(16, 16), n_win=1, topk=1, heads=1),
    "tiles that do not": dict(grid=(10, 15), n_win=1, topk=1, heads=1),
    "96 channels": dict(grid=(4, 6), n_win=2, dim=192, qk_dim=32),
    "factors": dict(grid=(6, 6), n_win=2, soft_routing=True, diff_routing=True, param_routing=True),
    "a factor of one": dict(grid=(6, 6), n_win=2, diff_routing=True),
    "masked": dict(grid=(5, 7), n_win=3, topk=5, auto_pad=True, mask_padding=True),
    "masked, whole regions": dict(grid=(5, 5), n_win=3, topk=9, auto_pad=True, mask_padding=True, heads=1),
    "masked, factors": dict(
        grid=(5, 7), n_win=2, auto_pad=True, mask_padding=True, soft_routing=True, diff_routing=True
    ),
}  # fmt: skip


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    check(**dict(batch=1, dim=32, heads=2, topk=2, dtype=dtype) | CASES[name])


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_masked_and_reduced_keys_equal_the_reference(mode: str, dtype: torch.dtype) -> None:
    check((7, 8), 1, 16, 1, dtype, n_win=2, topk=2, auto_pad=True, mask_padding=True, kv_per_win=2,
          kv_downsample_mode=mode, kv_downsample_ratio=2)  # fmt: skip


@pytest.mark.skipif(GPU, reason="knows bf16")
def test_bf16_is_refused_where_the_interpreter_does_not_know_it() -> None:
    with pytest.raises(Unsupported, match="bf16"):
        made("triton", torch.bfloat16, 16, 1, n_win=2, topk=2)(torch.zeros(1, 4, 4, 16, dtype=torch.bfloat16))


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["tf32", "bf16", "fp16", "bf16_params"])
def test_other_types_pass_the_agreement_gate(dtype: str) -> None:
    # All regions: routes that nearly tie would be chosen by rounding errors.
    case = Case("bra", 6, 6, dim=32, num_heads=2, impl="triton", dtype=dtype, device=DEVICE,
                options=(("n_win", 2), ("topk", 4)))  # fmt: skip
    result = correctness.check(case)
    assert result is not None and result.ok, result


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_comparison_can_fail(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bra, "LOG2_E", bra.LOG2_E * (1 + error))
    with pytest.raises(AssertionError, match="output"):
        check((4, 4), 1, 16, 1, dtype, n_win=2, topk=2)


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


def arguments(dtype: torch.dtype = torch.float32, **other: Any) -> dict[str, Any]:
    """Of the attention: one projection, factors, a mask."""
    torch.manual_seed(4)
    tokens = torch.randn(2, 4, 6, 40, dtype=dtype, device=DEVICE)
    index = torch.tensor([[1, 0], [2, 3], [3, 1], [2, 1]], device=DEVICE).repeat(2, 1, 1)
    valid = torch.arange(24, device=DEVICE).view(4, 6) % 5 != 0
    given = dict(tokens=tokens, small=None, index=index, factor=torch.rand(2, 4, 2, device=DEVICE), valid=valid,
                 taps=None, bias=None, qk_dim=12, heads=2, side=2, scale=0.4)  # fmt: skip
    return given | other


def backward(grad: Tensor, given: dict[str, Any]) -> list[Tensor]:
    out, total, lse = bra.bra_attend(*given.values(), True)
    return [out, total, lse, *bra.bra_backward(*list(given.values())[:7], out, lse, grad, *list(given.values())[7:])]


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


@pytest.mark.slow
def test_operators_say_what_they_are() -> None:
    """Schema and result on shapes alone, as PyTorch checks them."""
    given, grad = arguments(), torch.randn(2, 4, 6, 16, device=DEVICE)
    out, _, lse, *_ = backward(grad, given)
    calls = {
        bra.bra_route: (given["tokens"], 12, 2, 3, 0.4),
        bra.bra_attend: (*given.values(), True),
        bra.bra_backward: (*list(given.values())[:7], out, lse, grad, *list(given.values())[7:]),
    }
    for operator, values in calls.items():
        torch.library.opcheck(operator, values, test_utils=("test_schema", "test_faketensor"))


class Operations(TorchDispatchMode):
    """Notes PyTorch's operations that launch something on a GPU, also those within operators of BRA."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "attention_zoo":
            with self:
                return operation.redispatch(torch._C.DispatchKeySet(DEVICE.upper()), *args, **kwargs or {})
        name = operation.name().partition("::")[2].partition(".")[0]
        # The tests fill what nobody wrote.
        if not (operation.is_view or "empty" in name or name in ("_unsafe_view", "detach", "fill_")):
            self.noted.append(name)
        return operation(*args, **kwargs or {})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would have been launched."""
    noted: list[str] = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Launches(noted, name))
    monkeypatch.setattr(triton, "INTERPRETS_BF16", True)
    return noted


KERNELS = ("pool_regions", "choose_routes", "attend_forward", "add_depthwise", "attend_backward_queries",
           "attend_backward_keys", "finish_keys", "sum_columns")  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "options", "sums"),
    [
        (28, {}, {}),
        (112, {}, {}),
        (28, {"soft_routing": True}, {"sum": 1}),
        (28, {"side_dwconv": 0}, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_launches_few_kernels(
    dtype: torch.dtype, grid: int, options: dict[str, Any], sums: dict[str, int], launched: list[str]
) -> None:
    """Parameters in bf16 take an input in bf16 as it is: nothing is cast."""
    module = build("bra", dim=64, num_heads=2, n_win=7, topk=4, impl="triton", **options).to(DEVICE, dtype)
    x = torch.randn(1, grid, grid, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    lepe = module.lepe is not None
    for gradients in (False, True):
        launched.clear()
        with Operations() as operations, torch.set_grad_enabled(gradients):
            out = module(x)
        assert launched == [*KERNELS[:3], *KERNELS[3:4] * lepe]
        # The projections, and LePE's taps side by side.
        assert sorted(operations.noted) == ["addmm", "addmm", *["clone"] * lepe]
    launched.clear()
    grad = torch.randn_like(out)
    with Operations() as operations:
        out.backward(grad)
    of_bias = ["sum_columns"] * (1 if grid**2 <= bra.ONE_PASS else 2)
    assert launched == [*of_bias, *KERNELS[4:7], *["sum_columns"] * lepe, *of_bias]
    assert Counter(operations.noted) == {"mm": 4} | sums
    assert len(launched) + sum(sums.values()) <= 8
    assert all(tensor.grad.dtype == dtype for tensor in (x, *module.parameters()))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_as_one_graph(soft: bool) -> None:
    # Convolutions of cuDNN may change their algorithm, and with it the last bit.
    options: dict[str, Any] = dict(n_win=2, topk=2, soft_routing=soft, diff_routing=soft, side_dwconv=0 if GPU else 3)
    module = made("triton", torch.float32, 16, 1, **options)
    x, grad = torch.randn(2, 1, 4, 4, 16).unbind()
    expected = results(module, x, grad)
    module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    result = results(module, x, grad)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def case(mode: str, *options: tuple[str, Any]) -> Case:
    given = ("n_win", 2), ("topk", 2), *options
    return Case("bra", 8, 8, dim=16, num_heads=2, impl="triton", mode=mode, options=given, device=DEVICE)


@pytest.mark.parametrize(
    "options", [(), (("qk_dim", 24),), (("kv_downsample_mode", "maxpool"), ("kv_downsample_ratio", 2))]
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_macs_are_counted_alike_three_times(options: tuple[tuple[str, Any], ...]) -> None:
    one = case("forward_backward", *options)
    work = one.workload("meta")
    counted, backward = macs.counted(work)
    split = work.module.macs(8, 8)
    assert split.total == counted == macs.by_fvcore(one.workload(DEVICE))
    # Backward of the reference: two products for each of its two. Here two kernels compute q k and grad v both.
    e, c = work.module.qk_dim, work.module.dim
    bare = replace(one, impl="reference", options=(*one.options, ("side_dwconv", 0)))
    lepe = 2 * split.local_conv
    if "kv_downsample_mode" in dict(one.options):
        # Then LePE is PyTorch's convolution, whose gradient PyTorch counts as that of a dense one.
        bare, lepe = replace(one, impl="reference"), 0
    published = macs.counted(bare.workload("meta"))[1]
    assert backward == published + lepe + split.attention * (4 * e + 3 * c) // (e + c) - 2 * split.attention


@pytest.fixture
def tidy_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter leaves cycles that hold on to tensors; a GPU holds on to none."""
    if GPU:
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def launch_and_tidy(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        gc.collect(1)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_tidy)


FACTORS = ("soft_routing", True), ("diff_routing", True)
REDUCED = ("kv_downsample_mode", "ada_avgpool"), ("kv_per_win", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("tidy_interpreter")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("forward", ()), ("forward_backward", ()), ("forward_backward", FACTORS), ("forward_backward", REDUCED)],
)
def test_predicted_memory_is_the_measured(mode: str, options: tuple[tuple[str, Any], ...]) -> None:
    # Workspaces of cuDNN are what no rule covers, and outweigh so small a grid.
    one = case(mode, *options, *([("side_dwconv", 0)] if GPU else []))
    measured = peak_memory.measure(one.workload(DEVICE))
    predicted = peak_memory.predict(one.workload("meta"), DEVICE)
    assert predicted.base == measured.base
    assert predicted.peak == pytest.approx(measured.peak, rel=2e-2 if GPU else 1e-3)


def test_there_is_no_second_derivative() -> None:
    module, x = made("triton", torch.float32, 16, 1, n_win=2, topk=1), torch.randn(1, 4, 4, 16, device=DEVICE)
    with pytest.raises(Unsupported, match="no second derivative"):
        torch.autograd.grad(module(x.requires_grad_()).sum(), x, create_graph=True)


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 4, 256)
    options = dict(dim=256, num_heads=2, n_win=2, topk=1)
    assert build("bra", **options).chosen_impl(x) == build("bra", **options).chosen_impl(x.to("meta")) == "sdpa"
    named = build("bra", **options, impl="triton")
    with pytest.raises(Unsupported, match="fp64"):
        named.chosen_impl(x.double())
    with pytest.raises(Unsupported, match="at most 128 channels per head, not 256"):
        build("bra", **options | dict(num_heads=1), impl="triton").chosen_impl(x)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(Unsupported, match="do not run on cpu"):
        named.chosen_impl(x)
    monkeypatch.setattr(triton, "INSTALLED", False)
    with pytest.raises(Unsupported, match="not installed"):
        named.chosen_impl(x)
    assert named.chosen_impl(x.to("meta")) == "triton"


def test_the_zoo_does_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import attention_zoo, profiling.execution.benchmark, torch\n"
        "attention_zoo.build('bra', dim=8, num_heads=2, n_win=2, topk=1)(torch.zeros(1, 4, 4, 8))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "specs"),
    [
        ("80", ["bf16,128,2,112,7,4", "fp32,32,2,28,7,4,fv"]),
        ("90", ["bf16,32,2,56,7,4", "fp16,96,2,14,7,16,fv", "tf32,64,2,112,7,4"]),
        ("100", ["bf16,32,2,56,7,4"]),
    ],
)  # fmt: skip
def test_compiles_for_a_gpu_without_one(capability: str, specs: list[str], tmp_path: Path) -> None:
    """The interpreter runs what no compiler would take, and knows no registers and no shared memory."""
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_kernels.py")), capability, *specs]
    environment = without | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = [json.loads(line) for line in done.stdout.splitlines()]
    # The sum of many rows takes two launches.
    assert len(result) in range(9 * len(specs), 10 * len(specs) + 1)
    for kernel in result:
        assert kernel["shared"] <= SHARED[capability] and kernel["stack"] <= 16, kernel


@needs_gpu
def test_runs_in_a_cuda_graph() -> None:
    module = made("triton", torch.float32, 32, 2, n_win=2, topk=2).requires_grad_(False)
    x = torch.randn(1, 8, 8, 32, device=DEVICE)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@needs_gpu
def test_offsets_beyond_32_bits() -> None:
    pitch = 2**31 // 4000
    wide = torch.zeros(1, 64, 64, pitch, dtype=torch.bfloat16, device=DEVICE)
    narrow = torch.randn(1, 64, 64, 96, dtype=torch.bfloat16, device=DEVICE)
    wide[..., :96] = narrow
    index = torch.tensor([[[3, 1], [3, 0], [3, 2], [2, 3]]], device=DEVICE)
    rest = None, index, None, None, None, None, 32, 1, 2, 0.2, False
    assert torch.equal(bra.bra_attend(wide[..., :96], *rest)[0], bra.bra_attend(narrow, *rest)[0])
