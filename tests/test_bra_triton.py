"""BRA's Triton kernels: against the fp64 reference, by the interpreter where there is no GPU; compiled for one anyway.

The interpreter takes some milliseconds for each program of a kernel, so shapes are small: a program is one tile of one
region for one head.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attention_zoo import Unsupported, build
from attention_zoo.bra import triton
from attention_zoo.bra import triton_ops as bra
from attention_zoo.bra.kv_downsample import MODES
from attention_zoo.bra.routing import Router
from profiling import agreement, macs, memory
from profiling.case import Case

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="the interpreter cannot")
SHARED = {"80": 163 << 10, "90": 227 << 10}
"""Bytes of shared memory that one program can have, by compute capability."""


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
    found = {"output": out, "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: value.detach().double().clone() for name, value in found.items() if value is not None}


def check(grid: tuple[int, int], batch: int, dim: int, heads: int, **chosen: Any) -> None:
    """Errors against the fp64 reference must be about as small as those of the fp32 reference."""
    torch.manual_seed(2)
    x, grad = torch.randn(2, batch, *grid, dim).unbind()
    exact = results(made("reference", torch.float64, dim, heads, **chosen), x, grad)
    own = results(made("reference", torch.float32, dim, heads, **chosen), x, grad)
    found = results(made("triton", torch.float32, dim, heads, **chosen), x, grad)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        scale = value.norm().clamp_min(1e-9)
        allowed = agreement.ROOM * max(((own[name] - value).norm() / scale).item(), 1e-6)
        assert ((found[name] - value).norm() / scale).item() <= allowed, name


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


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(shape=shapes())
def test_random_shapes_equal_the_reference(shape: dict[str, Any]) -> None:
    check(**shape)


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


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str) -> None:
    check(**dict(batch=1, dim=32, heads=2, topk=2) | CASES[name])


@pytest.mark.parametrize("mode", MODES)
def test_masked_and_reduced_keys_equal_the_reference(mode: str) -> None:
    check((7, 8), 1, 16, 1, n_win=2, topk=2, auto_pad=True, mask_padding=True, kv_per_win=2, kv_downsample_mode=mode,
          kv_downsample_ratio=2)  # fmt: skip


@pytest.mark.parametrize("dtype", ["tf32", "bf16", "fp16"])
def test_other_types_pass_the_agreement_gate(dtype: str) -> None:
    # All regions: routes that nearly tie would be chosen by rounding errors.
    case = Case("bra", 6, 6, dim=32, num_heads=2, impl="triton", dtype=dtype, device=DEVICE,
                options=(("n_win", 2), ("topk", 4)))  # fmt: skip
    if dtype == "bf16" and not GPU:
        with pytest.raises(Unsupported, match="bf16"):
            agreement.check(case)
        return
    found = agreement.check(case)
    assert found is not None and found.ok, found


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bra, "LOG2_E", bra.LOG2_E * 1.001)
    with pytest.raises(AssertionError, match="output"):
        check((4, 4), 1, 16, 1, n_win=2, topk=2)


@pytest.mark.parametrize(("regions", "topk", "channels"), [(1, 1, 3), (9, 9, 40), (49, 4, 32), (196, 16, 24)])
def test_routes_are_those_of_the_router(regions: int, topk: int, channels: int) -> None:
    pooled = torch.randn(1, regions, 2 * channels, device=DEVICE)
    pooled = pooled[:, :9] if regions > 49 and not GPU else pooled
    index, strength = bra.bra_route(pooled, min(topk, pooled.shape[1]), 0.3)
    q, k = pooled.double().chunk(2, dim=-1)
    wanted, weight = Router(channels, index.shape[2], 0.3, False, False)(q, k)
    assert torch.equal(index, wanted)
    assert (strength - weight).abs().max() < 1e-6


def test_equal_scores_and_scores_that_are_not_numbers_stay_inside_the_grid() -> None:
    pooled = torch.ones(2, 5, 8, device=DEVICE)
    pooled[1] = float("nan")
    index = bra.bra_route(pooled, 5, 1.0)[0]
    assert index[0].tolist() == [[0, 1, 2, 3, 4]] * 5
    assert index.min() >= 0 and index.max() < 5


def test_pooled_regions_are_means() -> None:
    x = torch.randn(2, 6, 15, 70, device=DEVICE)[..., 1:68]
    means = x.double().unflatten(2, (3, 5)).unflatten(1, (3, 2)).mean((2, 4)).flatten(1, 2)
    assert (bra.bra_pool(x, 3) - means).abs().max() < 1e-6


def test_inverted_routes() -> None:
    index = torch.tensor([[[0, 2], [2, 1], [2, 0], [1, 2]], [[3, 3], [3, 3], [3, 3], [3, 3]]], device=DEVICE)
    visitors, starts = bra.bra_invert(index)
    assert visitors.tolist() == [[0, 5, 3, 6, 1, 2, 4, 7], list(range(8))]
    assert starts.tolist() == [[0, 2, 4, 8, 8], [0, 0, 0, 0, 8]]


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of the attention: slices of one projection, factors, a mask."""
    torch.manual_seed(4)
    q, k, v = torch.randn(2, 4, 6, 40, dtype=dtype, device=DEVICE).split([12, 12, 16], dim=-1)
    index = torch.tensor([[1, 0], [2, 3], [3, 1], [2, 1]], device=DEVICE).repeat(2, 1, 1)
    valid = torch.arange(24, device=DEVICE).view(4, 6) % 5 != 0
    return q, k, v, index, torch.rand(2, 4, 2, device=DEVICE), valid, 2, 2, 0.4


def backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    q, k, v, index, factor, valid, heads, side, scale = given
    out, lse = bra.bra_attend(*given)
    first = bra.bra_attend_queries(q, k, v, index, factor, valid, out, lse, grad, heads, side, scale)
    visitors, starts = bra.bra_invert(index)
    rest = q, k, v, visitors, starts, factor, valid, lse, grad, first[1], heads, side, index.shape[2], scale
    return out, lse, *first, *bra.bra_attend_keys(*rest)


def test_layout_does_not_matter() -> None:
    given = arguments()
    grad = torch.randn(2, 4, 6, 16, device=DEVICE)
    dense = [t.contiguous() for t in given[:3]]
    odd = [t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for t in given[:3]]
    wanted = backward(grad, *given)
    for q, k, v in (dense, odd):
        assert all(torch.equal(a, b) for a, b in zip(backward(grad, q, k, v, *given[3:]), wanted, strict=True))
    one = torch.ones((), device=DEVICE)
    expanded = backward(one.expand_as(grad), *given)
    assert all(
        torch.equal(a, b)
        for a, b in zip(expanded, backward(one.expand_as(grad).contiguous(), *given), strict=True)
    )  # fmt: skip


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_two_runs_give_equal_bits() -> None:
    given, grad = arguments(torch.float16), torch.randn(2, 4, 6, 16, device=DEVICE, dtype=torch.float16)
    first, second = backward(grad, *given), backward(grad, *given)
    assert all(a.any() and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_say_what_they_are() -> None:
    """Schema, result on shapes alone and derivative, as PyTorch checks them."""
    given, grad = arguments(), torch.randn(2, 4, 6, 16, device=DEVICE)
    q, k, v, index, factor, valid, heads, side, scale = given
    out, lse, _, delta, *_ = backward(grad, *given)
    visitors, starts = bra.bra_invert(index)
    pooled = bra.bra_pool(q, side)
    calls = {
        bra.bra_pool: (q, side),
        bra.bra_route: (pooled, 3, scale),
        bra.bra_attend: (q.clone().requires_grad_(), *given[1:]),
        bra.bra_attend_queries: (*given[:6], out, lse, grad, heads, side, scale),
        bra.bra_invert: (index,),
        bra.bra_attend_keys: (q, k, v, visitors, starts, factor, valid, lse, grad, delta, heads, side, 2, scale),
    }
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for operator, values in calls.items():
        torch.library.opcheck(operator, values, test_utils=checks)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_as_one_graph(soft: bool) -> None:
    # Convolutions of cuDNN may change their algorithm, and with it the last bit.
    options: dict[str, Any] = dict(n_win=2, topk=2, soft_routing=soft, diff_routing=soft, side_dwconv=0 if GPU else 3)
    module = made("triton", torch.float32, 16, 1, **options)
    x, grad = torch.randn(2, 1, 4, 4, 16).unbind()
    wanted = results(module, x, grad)
    module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = results(module, x, grad)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


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
    published = macs.counted(replace(one, impl="reference").workload("meta"))[1]
    assert backward == published + split.attention * (4 * e + 3 * c) // (e + c) - 2 * split.attention


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


@pytest.mark.usefixtures("tidy_interpreter")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("forward", ()), ("forward_backward", ()), ("forward_backward", FACTORS), ("forward_backward", REDUCED)],
)
def test_predicted_memory_is_the_measured(mode: str, options: tuple[tuple[str, Any], ...]) -> None:
    # Workspaces of cuDNN are what no rule covers, and outweigh so small a grid.
    one = case(mode, *options, *([("side_dwconv", 0)] if GPU else []))
    measured = memory.measure(one.workload(DEVICE))
    predicted = memory.predict(one.workload("meta"), DEVICE)
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
        "import attention_zoo, profiling.cell, torch\n"
        "attention_zoo.build('bra', dim=8, num_heads=2, n_win=2, topk=1)(torch.zeros(1, 4, 4, 8))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("capability", "specs"),
    [
        ("80", ["bf16,128,2,112,7,4", "fp32,32,2,28,7,4,fv"]),
        ("90", ["bf16,32,2,56,7,4", "fp16,96,2,14,7,16,fv", "tf32,64,2,112,7,4"]),
    ],
)  # fmt: skip
def test_compiles_for_a_gpu_without_one(capability: str, specs: list[str], tmp_path: Path) -> None:
    """The interpreter runs what no compiler would take, and knows no registers and no shared memory."""
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "compile_kernels.py"), capability, *specs]
    environment = without | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 6 * len(specs)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability] and kernel["stack"] <= 16, kernel


@needs_gpu
def test_runs_in_a_cuda_graph() -> None:
    module = made("triton", torch.float32, 32, 2, n_win=2, topk=2).requires_grad_(False)
    x = torch.randn(1, 8, 8, 32, device=DEVICE)
    wanted = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)


@needs_gpu
def test_offsets_beyond_32_bits() -> None:
    pitch = 2**31 // 4000
    wide = torch.zeros(1, 64, 64, pitch, dtype=torch.bfloat16, device=DEVICE)
    narrow = torch.randn(1, 64, 64, 32, dtype=torch.bfloat16, device=DEVICE)
    wide[..., :32] = narrow
    index = torch.tensor([[[3, 1], [3, 0], [3, 2], [2, 3]]], device=DEVICE)
    rest = index, None, None, 1, 2, 0.2
    assert torch.equal(
        bra.bra_attend(*[wide[..., :32]] * 3, *rest)[0], bra.bra_attend(*[narrow] * 3, *rest)[0]
    )  # fmt: skip
