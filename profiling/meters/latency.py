"""Latency of a step: sampled until a stopping rule holds, reported as quartiles and an interval.

The module measures wall time; on CUDA also device time, with a cold L2 cache.
"""

import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class StoppingRule:
    """When to stop sampling.

    Attributes:
        rel_ci_width: stop once the 95 % interval of the median is narrower than this share of the median.
        min_samples: samples before the width of the interval is checked.
        max_seconds: stop after this time.
        min_samples_at_limit: minimum number of samples, even beyond ``max_seconds``.
        max_samples: stop at this number of samples.
        warm_up_seconds: time of unmeasured steps before the first sample; at least two steps, because the second
            one still allocates memory that all later steps reuse.
    """

    rel_ci_width: float = 0.02
    min_samples: int = 15
    max_seconds: float = 0.5
    min_samples_at_limit: int = 3
    max_samples: int = 2000
    warm_up_seconds: float = 0.1


STANDARD = StoppingRule()
"""For published results."""
BRIEF = StoppingRule(max_seconds=0.1, warm_up_seconds=0.05)
"""For a first result within minutes; ``--full`` uses STANDARD."""
QUICK = StoppingRule(min_samples=3, max_seconds=0.05, warm_up_seconds=0.01)
"""For smoke runs."""
SAMPLE_MS = 1.0
"""A sample of a shorter step is the mean of several steps with about this total time."""
PROBE_SIZE, PROBE_PASSES = 384, 10
"""Rows of the speed probe's matrices, which fit a core's own cache; products before and again after sampling."""
L2_FLUSH_BYTES = 256 << 20
QUEUE_SECONDS = 3e-3
"""A step that takes longer to queue may exceed CUDA's launch queue: about 1,024 launches of 3 microseconds or more."""
LONGEST_PAUSE = 0.05
"""Maximum device pause in seconds; a step that takes longer to queue keeps the device busy."""


@dataclass(frozen=True)
class LatencySamples:
    """Samples of one clock, in milliseconds, and why sampling stopped."""

    samples: list[float]
    stop: str

    def quantile(self, q: float) -> float:
        """The q-quantile, interpolated."""
        return float(np.quantile(self.samples, q))

    @property
    def interval(self) -> tuple[float, float]:
        """The distribution-free 95 % interval of the median: two order statistics.

        Their ranks come from the normal approximation of the binomial distribution. With fewer than 6 samples they
        are the extremes, and cover less than 95 %.
        """
        return _interval(sorted(self.samples))


@dataclass(frozen=True)
class WallLatency(LatencySamples):
    """Wall times of a step.

    Attributes:
        machine_speed_probe: CPU: median time in ms of a fixed matrix product before and after the samples. It is a
            diagnostic; no time is corrected by it.
        system_share: CPU: share of the processor time that was spent in the kernel.
    """

    machine_speed_probe: float | None = None
    system_share: float | None = None

    def columns(self) -> dict[str, float | int | str | None]:
        """As columns of a row."""
        low, high = self.interval
        return {
            "latency_p50_ms": self.quantile(0.5), "latency_p25_ms": self.quantile(0.25),
            "latency_p75_ms": self.quantile(0.75), "latency_p95_ms": self.quantile(0.95),
            "latency_low_ms": low, "latency_high_ms": high,
            "latency_samples": len(self.samples), "latency_stop": self.stop,
            "machine_speed_probe_ms": self.machine_speed_probe, "system_share": self.system_share,
        }  # fmt: skip


def measure_wall(step: Callable[[], object], device: str, rule: StoppingRule = STANDARD) -> WallLatency:
    """Wall time of ``step``; synchronises the device before and after each sample."""
    sampler = WallSampler(step, device)
    sampler.warm_up(rule.warm_up_seconds)
    if device == "cuda":
        samples = _collect(sampler.sample, rule)
        return WallLatency(samples.samples, samples.stop)
    probe = _probe_machine_speed()
    # Re-warm caches after the probe.
    sampler.sample()
    before = resource.getrusage(resource.RUSAGE_SELF)
    samples = _collect(sampler.sample, rule)
    after = resource.getrusage(resource.RUSAGE_SELF)
    probe += _probe_machine_speed()
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    share = system / max(user + system, 1e-9)
    return WallLatency(samples.samples, samples.stop, statistics.median(probe), share)


class WallSampler:
    """Takes samples of the wall time of a step.

    Attributes:
        steps_per_sample: number of steps averaged per sample; set by :meth:`warm_up`.
    """

    def __init__(self, step: Callable[[], object], device: str) -> None:
        self._step = step
        self._synchronize: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.steps_per_sample = 1

    def warm_up(self, seconds: float) -> None:
        """Run steps for ``seconds``, at least two; then set the number of steps per sample."""
        end = time.perf_counter() + seconds
        self.sample()
        self.sample()
        while time.perf_counter() < end:
            self.sample()
        self.steps_per_sample = max(1, math.ceil(SAMPLE_MS / max(self.sample(), 1e-4)))

    def sample(self) -> float:
        """The time of one step in ms."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.steps_per_sample):
            self._step()
        self._synchronize()
        return (time.perf_counter() - start) * 1e3 / self.steps_per_sample


@torch.no_grad()
def _probe_machine_speed() -> list[float]:
    """Times of a fixed matrix product in ms, without the first one, which loads the cache."""
    a, b = torch.ones(PROBE_SIZE, PROBE_SIZE), torch.ones(PROBE_SIZE, PROBE_SIZE)
    product, times = torch.empty(PROBE_SIZE, PROBE_SIZE), []
    for _ in range(PROBE_PASSES + 1):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def fits_queue(step: Callable[[], object]) -> bool:
    """CUDA: whether the host can queue all of ``step`` before the device starts it; else launch gaps would be timed."""
    return min(_seconds_to_queue(step) for _ in range(3)) < QUEUE_SECONDS


def _seconds_to_queue(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    return queued


def measure_device(step: Callable[[], object], rule: StoppingRule = STANDARD) -> LatencySamples:
    """CUDA: device time between two events around ``step``, after flushing the L2 cache.

    ``step`` must satisfy :func:`fits_queue` or replay a CUDA graph.
    """
    sample = device_sampler(step)
    sample()
    return _collect(sample, rule)


def device_sampler(step: Callable[[], object]) -> Callable[[], float]:
    """CUDA: a function that takes one sample of :func:`measure_device`, in ms."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    queued = _seconds_to_queue(step)
    # The device pauses until the host has queued the whole step, at clocks up to 2 GHz.
    pause = int(2e9 * min(2 * queued + 1e-3, LONGEST_PAUSE))

    def sample() -> float:
        flush.zero_()
        torch.cuda._sleep(pause)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    return sample


def _collect(sample: Callable[[], float], rule: StoppingRule) -> LatencySamples:
    samples: list[float] = []
    start = time.perf_counter()
    check_at = rule.min_samples
    while True:
        samples.append(sample())
        n = len(samples)
        if n >= check_at:
            low, high = _interval(sorted(samples))
            if high - low <= rule.rel_ci_width * statistics.median(samples):
                return LatencySamples(samples, "converged")
            check_at = math.ceil(n * 1.2)
        if n >= rule.min_samples_at_limit and time.perf_counter() - start > rule.max_seconds:
            return LatencySamples(samples, "time_limit")
        if n >= rule.max_samples:
            return LatencySamples(samples, "max_samples")


def _interval(ordered: list[float]) -> tuple[float, float]:
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]
