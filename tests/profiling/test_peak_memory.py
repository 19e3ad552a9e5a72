"""Predicted memory against measured memory, to the byte."""

import resource

import pytest
import torch
from small_modules import MODES, MODULES, workload
from torch import nn

from attention_zoo.attentions.bra import sdpa
from profiling.cases.case import Case
from profiling.cases.workload import Mode, Workload
from profiling.meters import macs, peak_memory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODULES)
def test_predicted_memory_is_measured_memory_to_the_byte(name: str, mode: Mode) -> None:
    work = workload(name, mode)
    predicted, measured = peak_memory.predict(work), peak_memory.measure(work)
    assert predicted.base == measured.base > 0 and measured.reserved is None
    # The scratch of the fused kernel's backward depends on how many threads find work.
    room = 0.01 if (name, mode) == ("fused attention", "forward_backward") else 0.0
    assert measured.peak > measured.base and abs(predicted.peak - measured.peak) <= room * measured.peak


@pytest.mark.parametrize("name", ["linear", "mlp", "gather"])
def test_a_prediction_from_shapes_alone_is_the_same(name: str) -> None:
    real, shapes = (workload(name, "forward_backward", device=device) for device in ("cpu", "meta"))
    assert peak_memory.predict(real) == peak_memory.predict(shapes)


def test_double_precision_is_predicted_too() -> None:
    work = Workload(nn.Linear(64, 32).double(), torch.randn(2, 50, 64).double(), "forward_backward", "fp64")
    assert peak_memory.predict(work) == peak_memory.measure(work)


def test_any_size_is_predicted_and_nothing_allocated() -> None:
    tokens = 6_000_000
    with torch.device("meta"):
        work = Workload(nn.Linear(64, 4096), torch.empty(1, tokens, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = peak_memory.predict(work)
    assert result.base == 4 * (64 * tokens + 65 * 4096)
    assert result.peak == result.base + 4 * 4096 * tokens > 90 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_shared_memory_is_counted_once() -> None:
    work = workload("tied weights")
    assert work.base_bytes() == peak_memory.predict(work).base == 4 * (40 * 40 + 40 + 9 * 40)


def test_a_prediction_for_cuda_casts_as_autocast_does_there() -> None:
    class Scores(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(super().forward(x), dim=-1)

    kib, x = 1 << 10, torch.randn(64, 64)
    # Input 16 KiB and weight 64; scores in bf16 32; then these in fp32 64, and their softmax 64.
    result = peak_memory.predict(Workload(Scores(64, 256, bias=False), x, dtype="bf16"), "cuda")
    assert (result.base, result.peak) == (80 * kib, 240 * kib)


def test_auto_is_predicted_as_what_it_takes_on_each_device() -> None:
    def predicted(impl: str, device: str) -> int:
        case = Case("bra", 14, 14, options=(("n_win", 7), ("topk", 4)), impl=impl)
        return peak_memory.predict(case.workload("meta"), device).peak

    assert predicted("auto", "cuda") == predicted("triton", "cuda") < predicted("sdpa", "cuda")
    assert predicted("auto", "cpu") == predicted("sdpa", "cpu")


def test_the_gradient_of_an_output_in_half_precision_is_in_half_precision() -> None:
    layer, x = nn.Linear(64, 256, bias=False, device="meta"), torch.randn(64, 64, device="meta")
    result = peak_memory.predict(Workload(layer, x, "forward_backward", "bf16"), "cuda")
    # Input and weight in fp32, and the output's gradient in bf16.
    assert result.base == 4 * (64 * 64 + 256 * 64) + 2 * 64 * 256


def test_prediction_for_cuda_uses_the_cuda_code_path() -> None:
    work = Case("bra", 56, 56, options=(("n_win", 7), ("topk", 16)), impl="sdpa").workload("meta")
    gathered = 2 * 4 * 49 * 16 * 64 * 64
    here, there = peak_memory.predict(work, "cpu").peak, peak_memory.predict(work, "cuda:0").peak
    assert here < gathered < there < here + 1.1 * gathered


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("qk_dim", [64, 32])
def test_skipping_chunks_keeps_the_predicted_peak(mode: Mode, qk_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 regions of 16 tokens in 18 chunks, the last not full; with another qk_dim attention runs once more.
    options = (("n_win", 16), ("topk", 4), ("qk_dim", qk_dim))
    work = Case("bra", 64, 64, options=options, impl="sdpa", mode=mode).workload("meta")
    monkeypatch.setattr(sdpa, "CHUNK_BYTES", {"cpu": 15 * 4 * 16 * (64 + qk_dim) * 4})
    some = peak_memory.predict(work)
    monkeypatch.setattr(sdpa, "memory_is_simulated", lambda: False)
    assert peak_memory.predict(work) == some


def test_a_prediction_leaves_the_module_alone() -> None:
    work = workload("mlp", "forward_backward")
    before = {name: p.clone() for name, p in work.module.named_parameters()}
    peak_memory.predict(work)
    macs.counted(work)
    for name, parameter in work.module.named_parameters():
        assert type(parameter) is nn.Parameter and torch.equal(parameter, before[name]) and parameter.grad is None


@pytest.mark.parametrize(("height", "width"), [(14, 750), (28, 375)])
def test_a_convolution_of_narrow_grids_is_predicted_on_every_processor(height: int, width: int) -> None:
    # With AVX2, oneDNN reorders the input of a strided convolution at some widths and not at others.
    case = Case("pooled", height, width, 512, 8, impl="reference")
    assert peak_memory.predict(case.workload("meta")) == peak_memory.measure(case.workload("cpu"))
