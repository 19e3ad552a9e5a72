"""The meters against numbers computed by hand, and prediction against measurement."""

import doctest
import json
import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profiling
from attention_zoo import load_plugin
from attention_zoo.attentions.bra import sdpa
from profiling.cases.case import Case
from profiling.cases.workload import Dtype, Mode, Workload
from profiling.execution import benchmark, child_process, cpu_allocator, environment, subprocess_runner
from profiling.execution.cpu_allocator import FreedMemory
from profiling.meters import correctness, latency, macs, operator_times, peak_memory, roofline
from profiling.meters.latency import LatencySamples, StoppingRule, WallLatency
from profiling.meters.operator_times import sdpa_backend
from profiling.schema.row import COLUMNS

FAULTS = Path(__file__).parents[1] / "plugins" / "faults.py"
MODES: tuple[Mode, ...] = ("forward", "forward_backward")


class NHWC(nn.Module):
    """A convolution of an NHWC tensor, by way of a view of it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Fused(nn.Module):
    """PyTorch's fused attention; queries, keys and values are thirds of the last axis. A learned bias unfuses it."""

    def __init__(self, *bias: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, self.bias)


class Gather(nn.Module):
    """Every token receives some tokens of its image, chosen by content."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        values = self.mix(x)
        chosen = (x @ x.transpose(1, 2)).topk(4, dim=-1).indices
        pairs = values.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        return torch.gather(pairs, 2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[2])).sum(2)


class Tied(nn.Module):
    """One weight under two names, and a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 32), (2, 50, 64)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 20, 20)),
    "strided convolution": (lambda: nn.Conv2d(8, 16, 2, stride=2), (1, 8, 30, 26)),
    "convolution, channels last": (lambda: NHWC(nn.Conv2d(16, 24, 3, padding=1)), (2, 20, 20, 16)),
    "depthwise convolution": (lambda: nn.Conv2d(32, 32, 5, padding=2, groups=32), (1, 32, 24, 24)),
    "depthwise, channels last": (lambda: NHWC(nn.Conv2d(32, 32, 5, padding=2, groups=32)), (1, 24, 24, 32)),
    "mlp": (lambda: mlp(32), (2, 100, 32)),
    "fused attention": (Fused, (2, 2, 150, 48)),
    "attention with a learned bias": (lambda: Fused(2, 150, 150), (2, 2, 150, 48)),
    "gather": (lambda: Gather(16), (2, 60, 16)),
    "tied weights": (lambda: Tied(40), (1, 9, 40)),
    "softmax": (lambda: nn.Sequential(nn.Linear(24, 24), nn.Softmax(-1)), (3, 7, 24)),
}


def workload(name: str, mode: Mode = "forward", dtype: Dtype = "fp32", device: str = "cpu") -> Workload:
    """One of MODULES on random numbers."""
    make, shape = MODULES[name]
    with torch.device(device):
        return Workload(make(), torch.randn(shape), mode, dtype)


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_a_module_in_the_modes_it_was_in(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
    module[1].eval()
    if fails:
        monkeypatch.setattr(macs, "FlopCountAnalysis", lambda *arguments: [][0])
    with pytest.raises(IndexError) if fails else nullcontext():
        macs.by_fvcore(Workload(module, torch.randn(1, 4)))
    assert [part.training for part in module.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 2 * 50 * 64 * 32),
        ("convolution", 2 * 20 * 20 * 24 * 16 * 9),
        ("strided convolution", 15 * 13 * 16 * 8 * 4),
        ("convolution, channels last", 2 * 20 * 20 * 24 * 16 * 9),
        ("depthwise convolution", 24 * 24 * 32 * 25),
        ("fused attention", 2 * 2 * 150 * 150 * 16 * 2),
        ("tied weights", 2 * 9 * 40 * 40),
    ],
)
def test_macs_by_hand_counted_and_by_fvcore(name: str, expected: int) -> None:
    for device in ("cpu", "meta"):
        assert macs.counted(workload(name, device=device)) == (expected, 0)
    assert macs.by_fvcore(workload(name)) == expected


def test_macs_of_the_backward_pass() -> None:
    forward = 2 * 50 * 64 * 32
    assert macs.counted(workload("linear", "forward_backward")) == (forward, 2 * forward)
    no_input = Workload(nn.Linear(64, 32), torch.randn(2, 50, 64), "forward_backward", input_gradient=False)
    assert macs.counted(no_input) == (forward, forward)


def test_fvcore_counts_normalisations_and_leaves_the_module_as_it_was() -> None:
    work = workload("mlp", "forward_backward")
    assert macs.by_fvcore(work) > macs.counted(work)[0] == 2 * 2 * 100 * 32 * 96
    assert work.module.training


def test_macs_by_formula() -> None:
    module = Case("full", 6, 5, 16, 2).module()
    formula = macs.analytic(module, 6, 5)
    assert formula is not None
    assert (formula.projection, formula.attention, formula.total) == (4 * 30 * 256, 2 * 900 * 16, 30720 + 28800)
    assert macs.analytic(nn.Linear(3, 3), 6, 5) is None


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


def test_gpu_state_separates_foreign_processes_and_thermal_throttling(monkeypatch: pytest.MonkeyPatch) -> None:
    running, reasons = [os.getpid(), 1], [4]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0,
        nvmlClocksThrottleReasonGpuIdle=1, nvmlClocksThrottleReasonApplicationsClocksSetting=2,
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: reasons[0],
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [SimpleNamespace(pid=pid) for pid in running],
        nvmlDeviceGetClockInfo=lambda gpu, clock: 1980, nvmlDeviceGetTemperature=lambda gpu, sensor: 50,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="x"))
    state = environment.gpu_state()
    assert state == {"sm_clock_mhz": 1980, "temperature_c": 50, "throttled": False, "foreign_processes": 1}
    running[:], reasons[:] = [99_999_999], [4 | 64]
    assert environment.gpu_state() == state | {"throttled": True, "foreign_processes": None}


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


class Clock:
    """A clock that each step advances by the next of the given durations in ms, cyclically."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *durations: float) -> None:
        self.now, self.steps, self.durations = 0.0, 0, durations
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self) -> None:
        self.now += self.durations[self.steps % len(self.durations)] / 1e3
        self.steps += 1


def test_a_steady_step_converges_with_the_fewest_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 4.0)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(rel_ci_width=0.02, min_samples=15, max_seconds=100))
    assert result.stop == "converged" and len(result.samples) == 15
    assert result.samples == pytest.approx([4.0] * 15)


def test_an_unsteady_step_is_sampled_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2.0, 10.0)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(rel_ci_width=0.02, min_samples=15, max_seconds=1.0))
    assert result.stop == "time_limit"
    assert 1.1 <= clock.now <= 1.2 and len(result.samples) >= 150


def test_an_unsteady_step_is_sampled_no_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2.0, 10.0)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(max_seconds=100, max_samples=60))
    assert result.stop == "max_samples" and len(result.samples) == 60


def test_very_slow_step_has_a_minimum_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 40_000.0)
    rule = StoppingRule(min_samples=15, max_seconds=0.5, min_samples_at_limit=2)
    result = latency.measure_wall(clock.step, "cpu", rule)
    assert result.stop == "time_limit" and len(result.samples) in (2, 3)
    assert result.quantile(0.5) == pytest.approx(40_000.0)


def test_the_first_step_is_not_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 500.0, *[3.0] * 400)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(min_samples=15, max_seconds=100))
    assert max(result.samples) == pytest.approx(3.0)


def test_warm_up_steps_are_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # 180 ms of slow steps: a shorter warm-up leaves some of them to the samples, a longer one none.
    for seconds, slowest in ((0.12, 9.0), (0.2, 3.0)):
        clock = Clock(monkeypatch, *[9.0] * 20, *[3.0] * 400)
        rule = StoppingRule(min_samples=15, max_seconds=100, warm_up_seconds=seconds)
        assert max(latency.measure_wall(clock.step, "cpu", rule).samples) == pytest.approx(slowest)


def test_a_sample_of_a_short_step_is_the_mean_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 0.01)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(min_samples=15, max_seconds=100))
    assert clock.steps >= len(result.samples) * latency.SAMPLE_MS / 0.01
    assert result.samples == pytest.approx([0.01] * len(result.samples))


def test_a_little_noise_converges_once_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(10.0, 0.3, 5000)
    clock = Clock(monkeypatch, *noise)
    result = latency.measure_wall(clock.step, "cpu", StoppingRule(max_seconds=1e9, max_samples=100_000))
    low, high = result.interval
    assert result.stop == "converged" and high - low <= 0.02 * result.quantile(0.5)
    assert 15 <= len(result.samples) < 200


def test_latency_on_a_cpu_comes_with_the_machine_speed_and_the_kernels_share() -> None:
    matrix = torch.ones(400, 400)

    def pages() -> None:
        with mmap.mmap(-1, 8 << 20) as memory:
            memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)

    steps = (pages, lambda: matrix @ matrix)
    asks, multiplies = (latency.measure_wall(step, "cpu", latency.QUICK).columns() for step in steps)
    for columns in (asks, multiplies):
        assert columns["machine_speed_probe_ms"] > 0 and 0 <= columns["system_share"] <= 1
    assert asks["system_share"] > multiplies["system_share"] + 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 101])
def test_quantiles_are_numpys(n: int) -> None:
    samples = list(np.random.default_rng(n).lognormal(size=n))
    for q in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0):
        assert LatencySamples(samples, "converged").quantile(q) == pytest.approx(np.quantile(samples, q))


def test_the_columns_of_a_latency() -> None:
    columns = WallLatency([5.0, 1.0, 3.0, 2.0, 4.0], "max_samples").columns()
    assert set(columns) <= set(COLUMNS)
    assert [columns[f"latency_p{q}_ms"] for q in (25, 50, 75)] == [2.0, 3.0, 4.0]
    assert columns["latency_p95_ms"] == pytest.approx(4.8)
    assert (columns["latency_low_ms"], columns["latency_high_ms"]) == (1.0, 5.0)
    assert (columns["latency_samples"], columns["latency_stop"]) == (5, "max_samples")


def test_the_interval_holds_the_median_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (1, 2, 5, 20, 100, 1000):
        result = LatencySamples(list(rng.normal(10, 1, n)), "converged")
        low, high = result.interval
        assert low <= result.quantile(0.5) <= high
        widths.append(high - low)
    assert widths[3] > widths[4] > widths[5] > 0
    assert widths[5] == pytest.approx(2 * 1.96 * 1.2533 / np.sqrt(1000), rel=0.3)


@pytest.mark.parametrize("n", [8, 15, 40, 150])
def test_the_interval_holds_the_true_median_95_times_in_100(n: int) -> None:
    draws = np.random.default_rng(n).lognormal(size=(2000, n))
    intervals = [LatencySamples(list(draw), "converged").interval for draw in draws]
    assert np.mean([low <= 1.0 <= high for low, high in intervals]) >= 0.945


@pytest.fixture
def faults() -> None:
    """The planted faults, registered for one test."""
    load_plugin(FAULTS)


@pytest.mark.parametrize("impl", ["fast", "auto"])
@pytest.mark.parametrize(
    ("name", "where", "error"),
    [
        ("fault_output", "output", 0.001),
        ("fault_gradient", "gradient of", 0.7),
        ("fault_no_gradient", "gradient of", 1.0),
        ("fault_nan", "output", float("inf")),
    ],
)
def test_a_wrong_implementation_is_found(faults: None, name: str, where: str, error: float, impl: str) -> None:
    for mode in MODES:
        result = correctness.check(Case(name, 4, 4, 8, 2, impl=impl, mode=mode))
        assert result is not None and not result.ok
        assert result.where.startswith(where)
        assert result.error == pytest.approx(error, rel=0.2) and result.error > 100 * result.tolerance


def test_output_without_gradients_is_checked(faults: None) -> None:
    wrong, right = (correctness.check(Case("fault_without_gradients", 4, 4, 8, 2, impl="fast", mode=m)) for m in MODES)
    assert wrong is not None and not wrong.ok and wrong.where == "output without gradients"
    assert wrong.error == pytest.approx(0.001, rel=1e-3)
    assert right is not None and right.ok


def test_a_right_implementation_passes(faults: None) -> None:
    result = correctness.check(Case("fault_right", 4, 4, 8, 2, impl="fast"))
    assert result is not None and result.ok and 0 < result.error <= result.tolerance < 1e-5


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("full", "fp32", "attention"),
        ("window", "bf16", "attention"),
        ("full", "fp64", "attention"),
        ("window", "fp32", "block"),
    ],
)
def test_the_fused_implementations_of_the_zoo_pass(name: str, dtype: Dtype, kind: str) -> None:
    result = correctness.check(Case(name, 14, 14, 16, 2, impl="sdpa", dtype=dtype, kind=kind))
    assert result is not None and result.ok
    assert result.tolerance < (0.1 if dtype == "bf16" else 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_routed_attention_is_compared_on_its_own_routes(mode: Mode, dtype: Dtype) -> None:
    result = correctness.check(Case("bra", 28, 28, 16, 2, impl="sdpa", mode=mode, dtype=dtype))
    assert result is not None and result.ok and result.flipped is not None
    assert result.flipped <= (0.05 if dtype == "bf16" else 0.0) and 0.02 <= result.flips_allowed <= 0.1


def test_wrong_routes_are_found_where_all_else_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = sdpa.forward

    def elsewhere(bra: Any, x: Tensor, side: int) -> Any:
        count = side**2
        # Route to neighbouring regions in row order, not to those of the best scores.
        bra.router.imposed = (
            (torch.arange(count)[:, None] + torch.arange(bra.topk)).remainder(count).expand(len(x), -1, -1)
        )
        out = forward(bra, x, side)
        bra.router.imposed = None
        return out

    monkeypatch.setattr(sdpa, "forward", elsewhere)
    result = correctness.check(Case("bra", 28, 28, 16, 2, impl="sdpa"))
    assert result is not None and not result.ok and result.error <= result.tolerance
    assert (
        result.flipped is not None and result.flipped > 0.5 and "of its routes are not those of fp64" in result.reason
    )


def test_the_share_of_flipped_routes_by_hand() -> None:
    exact = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    taken = torch.tensor([[[1, 4], [2, 5]]])
    # One of the three routes of non-zero weight is missing; the order is irrelevant.
    assert correctness._flipped({"a": taken}, {"a": exact}) == pytest.approx(1 / 3)


def test_attention_without_routing_has_no_flipped_routes() -> None:
    result = correctness.check(Case("window", 8, 8, 16, 2, impl="sdpa", options=(("window_size", 4),)))
    assert result is not None and result.ok and result.flipped is None


@pytest.mark.slow
def test_a_compiled_step_keeps_its_routes_too() -> None:
    subprocess_runner.start()
    case = Case("bra", 8, 8, 8, 2, impl="reference", compiled=True, options=(("n_win", 4),))
    outcome = subprocess_runner.call(correctness.check, case)
    assert outcome.status == "ok", outcome.reason
    assert outcome.value.ok and outcome.value.flipped == 0.0


def test_the_reference_is_not_checked_against_itself() -> None:
    assert correctness.check(Case("full", 6, 6, 8, 2, impl="reference")) is None


def test_a_large_grid_is_checked_at_a_small_size() -> None:
    result = correctness.check(Case("window", 700, 1400, 8, 2, impl="sdpa"))
    assert result is not None and result.ok


def test_the_tolerance_follows_the_precision() -> None:
    wide, narrow = (correctness.check(Case("full", 8, 8, 16, 2, impl="sdpa", dtype=d)) for d in ("bf16", "fp32"))
    assert wide is not None and narrow is not None
    assert wide.tolerance > 100 * narrow.tolerance


def test_implementation_is_reported_and_checked_inside_a_block() -> None:
    case = Case("full", 6, 6, 16, 2, kind="block")
    work = case.workload("cpu")
    assert case.implementation(work) == "sdpa" and sdpa_backend(work.step) == "flash_attention_for_cpu"
    assert correctness.check(case) is not None


@pytest.mark.parametrize(("name", "option", "value"), [("bra", "kv_downsample_mode", "identity"), ("bra", "topk", 4)])
def test_the_row_of_a_block_states_what_the_block_has(name: str, option: str, value: object) -> None:
    case = Case(name, 14, 14, kind="block")
    assert case.key_columns("s", "d")[option] == value
    own = Case(name, 14, 14).module()
    inside = case.module().attn
    assert {n: p.shape for n, p in inside.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert str(inside) == str(own)


def test_doctest_of_measure_passes() -> None:
    results = doctest.testmod(profiling)
    assert results.attempted >= 3 and results.failed == 0


@pytest.mark.parametrize("mode", MODES)
def test_measure_takes_any_module(mode: Mode) -> None:
    result = profiling.measure(nn.Conv2d(4, 8, 3), torch.randn(2, 4, 10, 10), mode)
    assert set(result) <= set(COLUMNS)
    assert result["params"] == 8 * 4 * 9 + 8
    assert result["macs_counted"] == result["macs_fvcore"] == 2 * 8 * 8 * 8 * 4 * 9 and result["macs_agree"]
    assert (result["macs_backward_counted"] is None) == (mode == "forward")
    assert result["memory_predicted_bytes"] == result["memory_peak_bytes"]
    assert (
        0 < result["latency_p25_ms"] <= result["latency_p50_ms"] <= result["latency_p75_ms"] <= result["latency_p95_ms"]
    )


def test_measure_works_without_fvcore() -> None:
    class Untraceable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise TypeError("not me")
            return super().forward(x)

    result = profiling.measure(Untraceable(4, 4), torch.randn(2, 4))
    assert result["macs_fvcore"] is None and result["macs_agree"] is None and result["macs_counted"] == 32


def test_roofline_by_hand() -> None:
    peaks = {"fp32": 1e12, "fp64": 5e11, "copy": 1e10}
    case = Case("full", 10, 10, 50, 2)
    row = {"macs_counted": 10**9, "params": 5000, "latency_p50_ms": 4.0}
    moved = 4 * (5000 + 2 * 100 * 50)
    result = roofline.columns(row, case, peaks)
    assert result["achieved_tflops"] == pytest.approx(0.5)
    assert result["arithmetic_intensity"] == pytest.approx(2e9 / moved)
    assert result["roofline_fraction"] == pytest.approx(0.5)
    both = row | {"macs_backward_counted": 2 * 10**9, "device_time_p50_ms": 3.0}
    backward = roofline.columns(both, Case("full", 10, 10, 50, 2, mode="forward_backward", device="cuda"), peaks)
    assert backward["achieved_tflops"] == pytest.approx(2.0)
    assert backward["arithmetic_intensity"] == pytest.approx(3 * 2e9 / moved / 2)
    assert backward["roofline_fraction"] == pytest.approx(2.0)


def test_roofline_of_few_macs_is_memory_bound() -> None:
    row = {"macs_counted": 1000, "params": 0, "latency_p50_ms": 8.0}
    result = roofline.columns(row, Case("full", 100, 100, 100, 2), {"fp32": 1e12, "copy": 1e9})
    assert result["roofline_fraction"] == pytest.approx(8e6 / 1e9 / 8e-3)


def test_roofline_on_a_gpu_needs_device_time() -> None:
    row = {"macs_counted": 1000, "params": 0, "latency_p50_ms": 8.0}
    assert roofline.columns(row, Case("full", 4, 4, device="cuda"), {"fp32": 1e12, "copy": 1e9}) == {}


@pytest.fixture
def paper_gpu(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A step of too many launches for the queue; its device time is 2 if it was timed as a replay, else 1."""
    work = workload("mlp", "forward")
    monkeypatch.setattr(latency, "fits_queue", lambda step: False)
    monkeypatch.setattr(latency, "measure_device", lambda *args: LatencySamples([2.0 if work._recorded else 1.0], ""))
    monkeypatch.setattr(child_process, "_spoiled", False)
    return work


def test_a_step_of_many_launches_is_timed_as_a_replay(paper_gpu: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def replayed() -> Iterator[None]:
        paper_gpu._recorded = SimpleNamespace(), torch.empty(0)  # type: ignore[assignment]
        yield
        paper_gpu._recorded = None

    monkeypatch.setattr(paper_gpu, "replayed", replayed)
    assert benchmark._on_device(paper_gpu, latency.QUICK, replayed=False) == 2.0
    assert benchmark._on_device(paper_gpu, latency.QUICK, replayed=True) == 1.0
    monkeypatch.setattr(latency, "fits_queue", lambda step: True)
    assert benchmark._on_device(paper_gpu, latency.QUICK, replayed=False) == 1.0
    assert not child_process._spoiled


def test_a_step_that_cannot_be_recorded_has_no_time_and_its_process_is_replaced(paper_gpu: Workload) -> None:
    assert benchmark._on_device(paper_gpu, latency.QUICK, replayed=False) is None
    assert child_process._spoiled


@pytest.mark.parametrize("row", [{}, {"macs_counted": 5}, {"latency_p50_ms": 5.0}, {"macs_counted": 0}])
def test_no_roofline_without_a_count_and_a_time(row: dict[str, float]) -> None:
    assert roofline.columns(row, Case("full", 4, 4), {"fp32": 1.0, "copy": 1.0}) == {}


def test_peaks_are_measured_once(tmp_path: Path) -> None:
    asked = []

    def ask(question: Callable[[str], dict[str, float]], device: str) -> dict[str, float]:
        asked.append((question, device))
        return {"fp32": 1.25e11, "copy": 2e10}

    for _ in range(2):
        assert roofline.stored(tmp_path, "cpu", ask) == {"fp32": 1.25e11, "copy": 2e10}
    assert asked == [(roofline.measure_peaks, "cpu")]
    assert (tmp_path / "peaks.csv").read_text().splitlines()[1:] == ["fp32,1.25e+11,FLOP", "copy,2e+10,byte"]


@pytest.mark.parametrize("mode", MODES)
def test_the_fused_kernel_is_named(mode: Mode) -> None:
    assert sdpa_backend(workload("fused attention", mode).step) == "flash_attention_for_cpu"
    assert sdpa_backend(workload("mlp", mode).step) is None


def test_the_heaviest_operators() -> None:
    result = operator_times.breakdown(workload("convolution"), "cpu")["heaviest_operators"]
    assert 1 <= len(result) <= 10
    assert any("convolution" in operator["name"] and operator["calls"] == 1 for operator in result)
    shares = [operator["share"] for operator in result]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.0001


def test_a_trace_is_one_that_the_viewers_open(tmp_path: Path) -> None:
    operator_times.write_trace(workload("linear"), "cpu", str(tmp_path / "new" / "folder"))
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name.endswith(".pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) == operator_times.ACTIVE
    assert any(event.get("name") == "[memory]" for event in events)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_settings_hold_inside_and_are_restored(dtype: Dtype) -> None:
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    work = Workload(nn.Linear(4, 4), torch.randn(2, 4), dtype=dtype, deterministic=True)
    with work.settings():
        assert torch.get_float32_matmul_precision() == ("high" if dtype == "tf32" else "highest")
        assert torch.are_deterministic_algorithms_enabled()
        assert work.step().dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_step_starts_without_gradients() -> None:
    work = workload("linear", "forward_backward")
    work.step()
    first = work.x.grad
    weights = [p.grad for p in work.module.parameters()]
    work.step()
    assert first is not None and work.x.grad is not first and torch.equal(work.x.grad, first)
    for parameter, gradient in zip(work.module.parameters(), weights, strict=True):
        assert gradient is not None and torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz, 2 threads", "intel-xeon-e5-2690-v4"),
        ("Intel(R) Xeon(R) Processor, 2 threads", "intel-xeon-2-threads"),
        ("NVIDIA H200", "nvidia-h200"),
        ("../../etc", "etc"),
    ],
)
def test_device_name_becomes_a_folder_name(name: str, folder: str) -> None:
    assert environment.slug(name).startswith(folder)
    assert "/" not in environment.slug(name)


@pytest.mark.parametrize(
    ("message", "expected"),
    [({}, (None, None)), ({"COMMIT": "abc"}, ("abc", None)), ({"COMMIT": "abc", "DIRTY": "0"}, ("abc", False)),
     ({"COMMIT": "abc", "DIRTY": "1"}, ("abc", True))],
)  # fmt: skip
def test_commit_without_a_repository_comes_from_the_environment(
    message: dict[str, str], expected: tuple[str | None, bool | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("COMMIT", "DIRTY"):
        monkeypatch.delenv(f"VISION_ATTENTION_{name}", raising=False)
    for name, value in message.items():
        monkeypatch.setenv(f"VISION_ATTENTION_{name}", value)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment._repository.__wrapped__() == expected


def test_the_environment_is_described_in_columns() -> None:
    facts = environment.describe("cpu")
    assert set(facts) <= set(COLUMNS)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["cuda"] is None
    assert 2**20 < environment.available_bytes("cpu") < 2**50


def page_faults_of_a_step(mebibytes: int) -> int:
    """Page faults of the tenth step, which allocates 16 MiB and ``mebibytes`` MiB, and frees them."""
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one, two = torch.ones(4 << 20), torch.ones(mebibytes << 18)
        del one, two
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc reads these variables")
@pytest.mark.parametrize(
    ("freed_memory", "mebibytes", "kept"), [("returned", 16, True), ("returned", 64, False), ("kept", 64, True)]
)
def test_freed_memory_is_kept_or_returned(freed_memory: FreedMemory, mebibytes: int, kept: bool) -> None:
    assert subprocess_runner.call(cpu_allocator.freed_memory, freed_memory=freed_memory).value == freed_memory
    faults = subprocess_runner.call(page_faults_of_a_step, mebibytes, freed_memory=freed_memory).value
    # Memory returned to the system would cause a page fault per 4 KiB.
    assert faults < 100 if kept else faults > 10_000


def test_a_process_started_without_the_variables_says_so() -> None:
    assert cpu_allocator.freed_memory() is None
