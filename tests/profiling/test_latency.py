"""When sampling stops, and the statistics of its samples."""

import mmap
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from profiling.execution import environment
from profiling.meters import latency
from profiling.meters.latency import LatencySamples, StoppingRule, WallLatency
from profiling.schema.row import COLUMNS


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
