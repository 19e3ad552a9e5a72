"""One measurement as a whole: the columns of a row, and profiling.measure."""

import doctest

import pytest
import torch
from small_modules import MODES
from torch import Tensor, nn

import profiling
from profiling.cases.case import Case
from profiling.cases.workload import Mode
from profiling.execution.benchmark import Job, prepare
from profiling.meters import correctness
from profiling.meters.operator_times import sdpa_backend
from profiling.schema.row import COLUMNS


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


@pytest.mark.parametrize(("device", "limits"), [("cuda", [1]), ("cpu", [])])
def test_only_a_cell_on_a_gpu_limits_cpu_threads(
    device: str, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    prepare(Job(Case("full", 4, 4, device=device)))
    assert calls == limits


def test_measure_works_without_fvcore() -> None:
    class Untraceable(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise TypeError("not me")
            return super().forward(x)

    result = profiling.measure(Untraceable(4, 4), torch.randn(2, 4))
    assert result["macs_fvcore"] is None and result["macs_agree"] is None and result["macs_counted"] == 32
