"""The meters against numbers worked out by hand, and prediction against measurement."""

import doctest
import json
import mmap
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profiling
from attention_zoo import load_plugin
from attention_zoo.bra import sdpa
from profiling import agreement, environment, latency, macs, memory, roofline, steady, trace
from profiling.case import Case
from profiling.latency import Latency, Patience
from profiling.rows import COLUMNS
from profiling.trace import sdpa_backend
from profiling.workload import Dtype, Mode, Workload

FAULTS = Path(__file__).parent / "plugins" / "faults.py"
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
    predicted, measured = memory.predict(work), memory.measure(work)
    assert predicted.base == measured.base > 0 and measured.reserved is None
    # The scratch of the fused kernel's backward depends on how many threads find work.
    room = 0.01 if (name, mode) == ("fused attention", "forward_backward") else 0.0
    assert measured.peak > measured.base and abs(predicted.peak - measured.peak) <= room * measured.peak


@pytest.mark.parametrize("name", ["linear", "mlp", "gather"])
def test_a_prediction_from_shapes_alone_is_the_same(name: str) -> None:
    real, shapes = (workload(name, "forward_backward", device=device) for device in ("cpu", "meta"))
    assert memory.predict(real) == memory.predict(shapes)


def test_double_precision_is_predicted_too() -> None:
    work = Workload(nn.Linear(64, 32).double(), torch.randn(2, 50, 64).double(), "forward_backward", "fp64")
    assert memory.predict(work) == memory.measure(work)


def test_any_size_is_predicted_and_nothing_allocated() -> None:
    tokens = 6_000_000
    with torch.device("meta"):
        work = Workload(nn.Linear(64, 4096), torch.empty(1, tokens, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = memory.predict(work)
    assert found.base == 4 * (64 * tokens + 65 * 4096)
    assert found.peak == found.base + 4 * 4096 * tokens > 90 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_what_two_names_share_is_counted_once() -> None:
    work = workload("tied weights")
    assert work.base_bytes() == memory.predict(work).base == 4 * (40 * 40 + 40 + 9 * 40)


def test_a_prediction_for_cuda_casts_as_autocast_does_there() -> None:
    class Scores(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(super().forward(x), dim=-1)

    kib, x = 1 << 10, torch.randn(64, 64)
    # Input 16 KiB and weight 64; scores in bf16 32; then these in fp32 64, and their softmax 64.
    found = memory.predict(Workload(Scores(64, 256, bias=False), x, dtype="bf16"), "cuda")
    assert (found.base, found.peak) == (80 * kib, 240 * kib)


def test_a_prediction_for_cuda_takes_the_way_that_is_taken_there() -> None:
    work = Case("bra", 56, 56, options=(("n_win", 7), ("topk", 16)), impl="sdpa").workload("meta")
    gathered = 2 * 4 * 49 * 16 * 64 * 64
    here, there = memory.predict(work, "cpu").peak, memory.predict(work, "cuda:0").peak
    assert here < gathered < there < here + 1.1 * gathered


def test_the_state_of_a_gpu_tells_others_from_this_run_and_heat_from_power(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_repeats_itself_takes_no_more_memory(mode: Mode, qk_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 regions of 16 tokens in 18 chunks, the last not full; with another qk_dim attention runs once more.
    options = (("n_win", 16), ("topk", 4), ("qk_dim", qk_dim))
    work = Case("bra", 64, 64, options=options, impl="sdpa", mode=mode).workload("meta")
    monkeypatch.setattr(sdpa, "CHUNK_BYTES", {"cpu": 15 * 4 * 16 * (64 + qk_dim) * 4})
    some = memory.predict(work)
    monkeypatch.setattr(sdpa, "only_memory_is_followed", lambda: False)
    assert memory.predict(work) == some


def test_a_prediction_leaves_the_module_alone() -> None:
    work = workload("mlp", "forward_backward")
    before = {name: p.clone() for name, p in work.module.named_parameters()}
    memory.predict(work)
    macs.counted(work)
    for name, parameter in work.module.named_parameters():
        assert type(parameter) is nn.Parameter and torch.equal(parameter, before[name]) and parameter.grad is None


class Clock:
    """A clock that steps move on, each by the next of some durations in ms, over and over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *durations: float) -> None:
        self.now, self.steps, self.durations = 0.0, 0, durations
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self) -> None:
        self.now += self.durations[self.steps % len(self.durations)] / 1e3
        self.steps += 1


def test_a_steady_step_converges_with_the_fewest_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 4.0)
    found = latency.measure(clock.step, "cpu", Patience(width=0.02, least=15, seconds=100))
    assert found.stop == "converged" and len(found.samples) == 15
    assert found.samples == pytest.approx([4.0] * 15)


def test_an_unsteady_step_is_sampled_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2.0, 10.0)
    found = latency.measure(clock.step, "cpu", Patience(width=0.02, least=15, seconds=1.0))
    assert found.stop == "time_limit"
    assert 1.1 <= clock.now <= 1.2 and len(found.samples) >= 150


def test_an_unsteady_step_is_sampled_no_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2.0, 10.0)
    found = latency.measure(clock.step, "cpu", Patience(width=0.02, least=15, seconds=100, most=60))
    assert found.stop == "max_samples" and len(found.samples) == 60


def test_a_very_slow_step_still_gets_a_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 40_000.0)
    patience = Patience(least=15, seconds=0.5, floor=2)
    found = latency.measure(clock.step, "cpu", patience)
    assert found.stop == "time_limit" and patience.floor <= len(found.samples) <= patience.floor + 1
    assert found.quantile(0.5) == pytest.approx(40_000.0)


def test_the_first_step_is_not_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 500.0, *[3.0] * 400)
    found = latency.measure(clock.step, "cpu", Patience(least=15, seconds=100))
    assert max(found.samples) == pytest.approx(3.0)


def test_what_settles_in_the_first_steps_is_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, *[9.0] * 20, *[3.0] * 400)
    found = latency.measure(clock.step, "cpu", Patience(least=15, seconds=100, warm_up=0.17))
    assert max(found.samples) == pytest.approx(9.0) and found.samples.count(max(found.samples)) <= 1
    clock = Clock(monkeypatch, *[9.0] * 20, *[3.0] * 400)
    assert max(latency.measure(clock.step, "cpu", Patience(warm_up=0.2)).samples) == pytest.approx(3.0)


def test_a_sample_of_a_short_step_is_the_mean_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 0.01)
    found = latency.measure(clock.step, "cpu", Patience(least=15, seconds=100))
    assert clock.steps >= len(found.samples) * latency.SAMPLE_MS / 0.01
    assert found.samples == pytest.approx([0.01] * len(found.samples))


def test_a_little_noise_converges_once_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(10.0, 0.3, 5000)
    clock = Clock(monkeypatch, *noise)
    found = latency.measure(clock.step, "cpu", Patience(width=0.02, least=15, seconds=1e9, most=100_000))
    low, high = found.interval
    assert found.stop == "converged" and high - low <= 0.02 * found.quantile(0.5)
    assert 15 <= len(found.samples) < 200


def test_a_time_on_a_cpu_comes_with_a_yardstick_and_the_kernels_share() -> None:
    matrix = torch.ones(400, 400)

    def pages() -> None:
        with mmap.mmap(-1, 8 << 20) as memory:
            memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)

    steps = (pages, lambda: matrix @ matrix)
    asks, multiplies = (latency.measure(step, "cpu", latency.QUICK).columns() for step in steps)
    for columns in (asks, multiplies):
        assert 1e-3 < columns["yardstick_ms"] < 1e3 and 0 <= columns["system_share"] <= 1
        assert columns["yardstick_memory_ms"] is None or 0.1 < columns["yardstick_memory_ms"] < 1e4
    assert asks["system_share"] > multiplies["system_share"] + 0.1


@pytest.mark.parametrize(("made", "passes"), [(steady.cores, 3), (steady.memory, 1)])
def test_a_round_of_a_yardstick_takes_a_tenth_of_the_time(made: Callable[[], steady.Yardstick], passes: int) -> None:
    yardstick = made()
    assert yardstick.due()
    yardstick.round()
    assert len(yardstick._milliseconds) == passes and not yardstick.due()
    yardstick._last -= 2.0
    assert yardstick.due()
    yardstick.round()
    counted = yardstick._milliseconds[passes:]
    assert len(counted) > passes
    assert 1e-3 * sum(counted[:-1]) < 0.2


def test_the_step_after_the_yardsticks_took_their_memory_is_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps to warm up, the first sample, and the step that has to find memory again.
    clock = Clock(monkeypatch, 40.0, 40.0, 40.0, 500.0, *[40.0] * 5000)
    found = latency.measure(clock.step, "cpu", Patience(warm_up=0.0, seconds=1e9))
    assert max(found.samples) == pytest.approx(40.0)


def test_memory_is_asked_only_beside_steps_that_are_long_enough_to_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for ms, asked in ((0.5, False), (2.0, True)):
        columns = latency.measure(Clock(monkeypatch, *[ms] * 5000).step, "cpu", Patience(seconds=1e9)).columns()
        assert (columns["yardstick_memory_ms"] is not None) is asked


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 101])
def test_quantiles_are_numpys(n: int) -> None:
    samples = list(np.random.default_rng(n).lognormal(size=n))
    for q in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0):
        assert Latency(samples, "converged").quantile(q) == pytest.approx(np.quantile(samples, q))


def test_the_columns_of_a_latency() -> None:
    columns = Latency([5.0, 1.0, 3.0, 2.0, 4.0], "max_samples").columns()
    assert set(columns) <= set(COLUMNS)
    assert [columns[f"latency_p{q}_ms"] for q in (25, 50, 75)] == [2.0, 3.0, 4.0]
    assert columns["latency_p95_ms"] == pytest.approx(4.8)
    assert (columns["latency_low_ms"], columns["latency_high_ms"]) == (1.0, 5.0)
    assert (columns["latency_samples"], columns["latency_stop"]) == (5, "max_samples")


def test_the_interval_holds_the_median_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (1, 2, 5, 20, 100, 1000):
        found = Latency(list(rng.normal(10, 1, n)), "converged")
        low, high = found.interval
        assert low <= found.quantile(0.5) <= high
        widths.append(high - low)
    assert widths[3] > widths[4] > widths[5] > 0
    assert widths[5] == pytest.approx(2 * 1.96 * 1.2533 / np.sqrt(1000), rel=0.3)


@pytest.mark.parametrize("n", [8, 15, 40, 150])
def test_the_interval_holds_the_true_median_95_times_in_100(n: int) -> None:
    draws = np.random.default_rng(n).lognormal(size=(2000, n))
    intervals = [Latency(list(draw), "converged").interval for draw in draws]
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
        found = agreement.check(Case(name, 4, 4, 8, 2, impl=impl, mode=mode))
        assert found is not None and not found.ok
        assert found.where.startswith(where)
        assert found.error == pytest.approx(error, rel=0.2) and found.error > 100 * found.tolerance


def test_what_runs_without_gradients_is_checked_where_it_is_timed(faults: None) -> None:
    wrong, right = (agreement.check(Case("fault_without_gradients", 4, 4, 8, 2, impl="fast", mode=m)) for m in MODES)
    assert wrong is not None and not wrong.ok and wrong.where == "output without gradients"
    assert wrong.error == pytest.approx(0.001, rel=1e-3)
    assert right is not None and right.ok


def test_a_right_implementation_passes(faults: None) -> None:
    found = agreement.check(Case("fault_right", 4, 4, 8, 2, impl="fast"))
    assert found is not None and found.ok and 0 < found.error <= found.tolerance < 1e-5


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
    found = agreement.check(Case(name, 14, 14, 16, 2, impl="sdpa", dtype=dtype, kind=kind))
    assert found is not None and found.ok
    assert found.tolerance < (0.1 if dtype == "bf16" else 1e-4)


def test_the_reference_is_not_checked_against_itself() -> None:
    assert agreement.check(Case("full", 6, 6, 8, 2, impl="reference")) is None


def test_a_large_grid_is_checked_at_a_small_size() -> None:
    found = agreement.check(Case("window", 700, 1400, 8, 2, impl="sdpa"))
    assert found is not None and found.ok


def test_the_tolerance_follows_the_precision() -> None:
    wide, narrow = (agreement.check(Case("full", 8, 8, 16, 2, impl="sdpa", dtype=d)) for d in ("bf16", "fp32"))
    assert wide is not None and narrow is not None
    assert wide.tolerance > 100 * narrow.tolerance


def test_what_runs_is_said_and_checked_inside_a_block_too() -> None:
    case = Case("full", 6, 6, 16, 2, kind="block")
    work = case.workload("cpu")
    assert case.implementation(work) == "sdpa" and sdpa_backend(work.step) == "flash_attention_for_cpu"
    assert agreement.check(case) is not None


@pytest.mark.parametrize(("name", "option", "value"), [("bra", "kv_downsample_mode", "identity"), ("bra", "topk", 4)])
def test_the_row_of_a_block_states_what_the_block_has(name: str, option: str, value: object) -> None:
    case = Case(name, 14, 14, kind="block")
    assert case.who("s", "d")[option] == value
    own = Case(name, 14, 14).module()
    inside = case.module().attn
    assert {n: p.shape for n, p in inside.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert str(inside) == str(own)


def test_the_example_of_measure_is_true() -> None:
    results = doctest.testmod(profiling)
    assert results.attempted >= 3 and results.failed == 0


@pytest.mark.parametrize("mode", MODES)
def test_measure_takes_any_module(mode: Mode) -> None:
    found = profiling.measure(nn.Conv2d(4, 8, 3), torch.randn(2, 4, 10, 10), mode)
    assert set(found) <= set(COLUMNS)
    assert found["params"] == 8 * 4 * 9 + 8
    assert found["macs_counted"] == found["macs_fvcore"] == 2 * 8 * 8 * 8 * 4 * 9 and found["macs_agree"]
    assert (found["macs_backward_counted"] is None) == (mode == "forward")
    assert found["memory_predicted_bytes"] == found["memory_peak_bytes"]
    assert 0 < found["latency_p25_ms"] <= found["latency_p50_ms"] <= found["latency_p75_ms"] <= found["latency_p95_ms"]


def test_measure_lives_without_fvcore() -> None:
    class Untraceable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise TypeError("not me")
            return super().forward(x)

    found = profiling.measure(Untraceable(4, 4), torch.randn(2, 4))
    assert found["macs_fvcore"] is None and found["macs_agree"] is None and found["macs_counted"] == 32


def test_roofline_by_hand() -> None:
    peaks = {"fp32": 1e12, "fp64": 5e11, "copy": 1e10}
    case = Case("full", 10, 10, 50, 2)
    row = {"macs_counted": 10**9, "params": 5000, "latency_p50_ms": 4.0}
    moved = 4 * (5000 + 2 * 100 * 50)
    found = roofline.columns(row, case, peaks)
    assert found["achieved_tflops"] == pytest.approx(0.5)
    assert found["arithmetic_intensity"] == pytest.approx(2e9 / moved)
    assert found["roofline_fraction"] == pytest.approx(0.5)
    both = row | {"macs_backward_counted": 2 * 10**9, "device_time_p50_ms": 3.0}
    backward = roofline.columns(both, Case("full", 10, 10, 50, 2, mode="forward_backward"), peaks)
    assert backward["achieved_tflops"] == pytest.approx(2.0)
    assert backward["arithmetic_intensity"] == pytest.approx(3 * 2e9 / moved / 2)
    assert backward["roofline_fraction"] == pytest.approx(2.0)


def test_roofline_of_little_work_is_that_of_memory() -> None:
    row = {"macs_counted": 1000, "params": 0, "latency_p50_ms": 8.0}
    found = roofline.columns(row, Case("full", 100, 100, 100, 2), {"fp32": 1e12, "copy": 1e9})
    assert found["roofline_fraction"] == pytest.approx(8e6 / 1e9 / 8e-3)


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
    found = trace.breakdown(workload("convolution"), "cpu")["heaviest_operators"]
    assert 1 <= len(found) <= 10
    assert any("convolution" in operator["name"] and operator["calls"] == 1 for operator in found)
    shares = [operator["share"] for operator in found]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.0001


def test_a_trace_is_one_that_the_viewers_open(tmp_path: Path) -> None:
    trace.write_trace(workload("linear"), "cpu", str(tmp_path / "new" / "folder"))
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name.endswith(".pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) == trace.ACTIVE
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
def test_a_device_is_a_folder(name: str, folder: str) -> None:
    assert environment.slug(name).startswith(folder)
    assert "/" not in environment.slug(name)


def test_the_environment_is_described_in_columns() -> None:
    facts = environment.describe("cpu")
    assert set(facts) <= set(COLUMNS)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["cuda"] is None
    assert 2**20 < environment.available_bytes("cpu") < 2**50


FAULTS_OF_A_STEP = """
import resource, sys, torch
from profiling import steady
steady.keep_freed_memory(large_blocks=bool(int(sys.argv[1])))
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one, two = torch.ones(4 << 20), torch.ones(int(sys.argv[2]) << 18)
    del one, two
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is the allocator of glibc that is told")
@pytest.mark.parametrize(("large_blocks", "mebibytes", "kept"), [(0, 16, True), (0, 64, False), (1, 64, True)])
def test_what_is_freed_is_kept_for_the_next_step(large_blocks: int, mebibytes: int, kept: bool) -> None:
    # Pages of 4 KiB, to be faulted in anew had they been given back.
    words = [sys.executable, "-c", FAULTS_OF_A_STEP, str(large_blocks), str(mebibytes)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 if kept else int(done.stdout) > 10_000
