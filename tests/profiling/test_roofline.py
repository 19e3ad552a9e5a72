"""Rooflines by hand, and when a step has none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_modules import workload

from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.execution import benchmark, child_process
from profiling.meters import latency, roofline
from profiling.meters.latency import LatencySamples


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
