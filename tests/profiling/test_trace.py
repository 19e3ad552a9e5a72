"""Which kernels and operators a step runs, and its trace."""

import json
from pathlib import Path

import pytest
from small_modules import MODES, workload

from profiling.cases.workload import Mode
from profiling.meters import operator_times
from profiling.meters.operator_times import sdpa_backend


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
