"""Latency of a step: sampled until the evidence suffices, reported as quartiles and an interval.

On CUDA there are two clocks: wall time of a step as a program sees it, and device time with a cold L2 cache.
"""

import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from profiling import steady


@dataclass(frozen=True)
class Patience:
    """When to stop sampling.

    Attributes:
        width: stop as soon as the 95 % interval of the median is narrower than this share of the median, ...
        least: ... but not with fewer samples than this;
        seconds: stop after this long, ...
        floor: ... but not with fewer samples than this;
        most: stop at this many samples.
        warm_up: seconds of steps before the first sample, at least two steps: after one, the memory that all later
            ones will use again is not all there yet.
    """

    width: float = 0.02
    least: int = 15
    seconds: float = 0.5
    floor: int = 3
    most: int = 2000
    warm_up: float = 0.1


STANDARD = Patience()
"""For results that others read."""
QUICK = Patience(least=3, seconds=0.05, warm_up=0.01)
"""For smoke runs."""
SAMPLE_MS = 1.0
"""A sample of a shorter step is the mean of several steps that take about this long together."""
LONG_MS = 30.0
"""A longer step does not feel what the caches hold when it begins."""
L2_FLUSH_BYTES = 256 << 20
LONGEST_PAUSE = 0.05
"""Seconds: a step that the host takes longer to queue keeps the device busy meanwhile."""


@dataclass(frozen=True)
class Latency:
    """Samples of one clock, in milliseconds, and why sampling stopped.

    Attributes:
        samples: the samples.
        stop: why there are no more.
        yardstick: CPU: the time of the cores' yardstick between them, in ms.
        memory_yardstick: CPU: that of memory's, where a step is long enough to need memory.
        system_share: CPU: the share of their processor time that was spent in the kernel.
    """

    samples: list[float]
    stop: str
    yardstick: float | None = None
    memory_yardstick: float | None = None
    system_share: float | None = None

    def quantile(self, q: float) -> float:
        """The q-quantile, interpolated."""
        ordered = sorted(self.samples)
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def interval(self) -> tuple[float, float]:
        """A distribution-free 95 % interval of the median: two order statistics (the extremes below 6 samples)."""
        return _interval(sorted(self.samples))

    def columns(self) -> dict[str, float | int | str | None]:
        """As columns of a row."""
        low, high = self.interval
        return {
            "latency_p50_ms": self.quantile(0.5), "latency_p25_ms": self.quantile(0.25),
            "latency_p75_ms": self.quantile(0.75), "latency_p95_ms": self.quantile(0.95),
            "latency_low_ms": low, "latency_high_ms": high,
            "latency_samples": len(self.samples), "latency_stop": self.stop,
            "yardstick_ms": self.yardstick, "yardstick_memory_ms": self.memory_yardstick,
            "system_share": self.system_share,
        }  # fmt: skip


def measure(step: Callable[[], object], device: str, patience: Patience = STANDARD) -> Latency:
    """Wall time of ``step``, the device synchronised before and after each sample; on a CPU beside yardsticks."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing

    def run(times: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(times):
            step()
        wait()
        return (time.perf_counter() - start) * 1e3 / times

    end = time.perf_counter() + patience.warm_up
    run(1)
    run(1)
    while time.perf_counter() < end:
        run(1)
    first = run(1)
    repeats = max(1, math.ceil(SAMPLE_MS / max(first, 1e-4)))
    kept = [first] if repeats == 1 else []
    if device == "cuda":
        return _collect(lambda: run(repeats), patience, kept)
    cores, memory = steady.cores(), steady.memory() if first >= SAMPLE_MS else None
    if memory:
        # Its tensors may lie where steps had been: these get other pages, and not within a sample.
        run(1)
    spent = _ProcessorTime()

    def sample() -> float:
        due = [yardstick for yardstick in (cores, memory) if yardstick and yardstick.due()]
        for yardstick in due:
            yardstick.round()
        if due and first < LONG_MS:
            # A short step would feel that the caches hold something else.
            run(1)
        with spent:
            return run(repeats)

    found = replace(_collect(sample, patience, kept), yardstick=cores.median(), system_share=spent.system_share)
    return replace(found, memory_yardstick=memory.median()) if memory else found


def measure_device(step: Callable[[], object], patience: Patience = STANDARD) -> Latency:
    """CUDA: time on the device between two events around ``step``, with everything evicted from L2 before."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    # Long enough a pause on the device for the host to queue the whole step behind it, at up to 2 GHz.
    pause = int(2e9 * min(2 * queued + 1e-3, LONGEST_PAUSE))

    def sample() -> float:
        flush.zero_()
        torch.cuda._sleep(pause)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    sample()
    return _collect(sample, patience)


def _collect(sample: Callable[[], float], patience: Patience, samples: list[float] | None = None) -> Latency:
    samples = samples or []
    start = time.perf_counter()
    check_at = patience.least
    while True:
        samples.append(sample())
        n = len(samples)
        if n >= check_at:
            low, high = _interval(sorted(samples))
            if high - low <= patience.width * statistics.median(samples):
                return Latency(samples, "converged")
            check_at = math.ceil(n * 1.2)
        if n >= patience.floor and time.perf_counter() - start > patience.seconds:
            return Latency(samples, "time_limit")
        if n >= patience.most:
            return Latency(samples, "max_samples")


def _interval(ordered: list[float]) -> tuple[float, float]:
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]


class _ProcessorTime:
    """Processor time of this process over all that ran under it."""

    def __init__(self) -> None:
        self._user = self._system = 0.0

    def __enter__(self) -> None:
        self._before = resource.getrusage(resource.RUSAGE_SELF)

    def __exit__(self, *exception: object) -> None:
        now = resource.getrusage(resource.RUSAGE_SELF)
        self._user += now.ru_utime - self._before.ru_utime
        self._system += now.ru_stime - self._before.ru_stime

    @property
    def system_share(self) -> float:
        """The share of it that was spent in the kernel."""
        return self._system / max(self._user + self._system, 1e-9)


def _nothing() -> None:
    pass
