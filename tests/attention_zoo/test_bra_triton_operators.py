"""BRA's Triton kernels as PyTorch's operators: what they launch, compile to, count, allocate, refuse."""

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bra_triton_setting import DEVICE, GPU, Launches, arguments, backward, kernels, made, results
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo import Unsupported, build
from attention_zoo.attentions.bra import triton
from attention_zoo.attentions.bra import triton_ops as bra
from profiling.cases.case import Case
from profiling.meters import macs, peak_memory

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10}
"""Bytes of shared memory that one program can have, by compute capability."""
STACK = {"80": 16, "90": 16, "100": 32}
"""Bytes of spilled registers that are accepted; for 10.0, whose tiles were not chosen, what Triton 3.7 spills."""


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
        assert kernel["shared"] <= SHARED[capability] and kernel["stack"] <= STACK[capability], kernel


@pytest.mark.skipif(not GPU, reason="the interpreter cannot")
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
