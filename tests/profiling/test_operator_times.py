"""Stages of BRA in a profile, and its trace in the viewers: TensorBoard's plugin over HTTP, and Perfetto's format."""

import copy
import gzip
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import profiler

from attention_zoo import MODELS, build
from attention_zoo.core.profiler_ranges import stage
from profiling.cases.case import Case
from profiling.cases.workload import Mode, Workload
from profiling.cli import result_page
from profiling.meters import operator_times

STAGES = {"bra.project", "bra.route", "bra.attend", "bra.lepe", "bra.output"}
ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = dict(dim=8, num_heads=2, n_win=2, topk=1)


def work_on_bra(mode: Mode = "forward_backward", impl: str = "reference", **chosen: Any) -> Workload:
    return Workload(build("bra", impl=impl, **SMALL | chosen), torch.randn(1, 8, 8, 8), mode)


def by_name(work: Workload) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in operator_times.breakdown(work, "cpu")["stages"]}


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_every_stage_has_its_share_of_the_step(impl: str) -> None:
    result = by_name(work_on_bra(impl=impl))
    assert set(result) == STAGES
    for name, part in result.items():
        assert part["forward_ms"] > 0 and 0 < part["share"] < 1
        # Descriptors are detached: routing has no backward pass, every other stage has.
        assert (part["backward_ms"] > 0) == (name != "bra.route")
    assert 0 < sum(part["share"] for part in result.values()) <= 1


def test_routing_that_is_learned_has_a_backward_pass() -> None:
    assert by_name(work_on_bra(diff_routing=True))["bra.route"]["backward_ms"] > 0


def test_a_forward_step_has_no_backward_pass() -> None:
    result = by_name(work_on_bra("forward"))
    assert set(result) == STAGES and all(part["backward_ms"] is None for part in result.values())


def test_disabled_parts_have_no_stage() -> None:
    assert set(by_name(work_on_bra("forward", side_dwconv=0))) == STAGES - {"bra.lepe"}
    assert by_name(Workload(build("full", dim=8, num_heads=2), torch.randn(1, 8, 8, 8))) == {}


class Sleeping(torch.autograd.Function):
    """Sleeps for given times, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: float, back: float) -> Tensor:
        ctx.back = back
        time.sleep(forth)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.back)
        return grad, None, None


class Sleeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = Sleeping.apply(x, 0.0, 0.02)
        with stage("mine.first"):
            x = x.detach() + Sleeping.apply(x, 0.01, 0.03)
        with stage("mine.second"):
            return Sleeping.apply(x, 0.04, 0.0)


def test_time_goes_to_the_stage_that_spends_it() -> None:
    """This includes the backward pass, and excludes time outside of all stages."""
    result = by_name(Workload(Sleeper(), torch.randn(4), "forward_backward"))
    first, second = result["mine.first"], result["mine.second"]
    assert first["forward_ms"] >= 10 and first["backward_ms"] >= 30
    assert second["forward_ms"] >= 40 and second["backward_ms"] < first["backward_ms"]
    whole = (first["forward_ms"] + first["backward_ms"]) / first["share"]
    assert whole >= 20 + 10 + 30 + 40
    assert sum(part["share"] for part in result.values()) <= 1 - 20 / whole


def test_stages_are_recorded_only_under_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was recorded")

    monkeypatch.setattr(profiler, "record_function", refuse)
    assert work_on_bra().step().isfinite().all()
    with torch.profiler.profile(), pytest.raises(AssertionError, match=r"bra\.project was recorded"):
        work_on_bra().step()


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_profiler_changes_no_number(impl: str) -> None:
    work = copy.deepcopy(work_on_bra("forward", impl))
    unmodified = work.step()
    with torch.profiler.profile():
        assert torch.equal(work.step(), unmodified)


COMPILED = """
import torch
from attention_zoo import build
bra, x = build("bra", dim=8, num_heads=2, impl="reference", n_win=2, topk=1).eval(), torch.randn(1, 8, 8, 8)
with torch.no_grad():
    plain = bra(x)
    bra.compile(fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(bra(x), plain)
    with torch.profiler.profile() as profiler, torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(bra(x), plain)
assert not [event.name for event in profiler.events() if event.name.startswith("bra.")]
"""


@pytest.mark.slow
def test_one_compiled_graph_serves_with_and_without_a_profiler() -> None:
    """In a new process: the compiler cannot trace the shape checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_page_draws_a_bar_for_each_stage(encoding: str, tmp_path: Path) -> None:
    stages = [
        {"name": "bra.attend", "forward_ms": 3.0, "backward_ms": None, "share": 0.75},
        {"name": "bra.route", "forward_ms": 0.5, "backward_ms": None, "share": 0.125},
    ]
    row = {"device_name": "Paper CPU", "torch": "2", "status": "ok"}
    out = tmp_path / "page.txt"
    with out.open("w", encoding=encoding) as file:
        result_page.show(Case("bra", 4, 4), row, {"stages": stages}, Console(file=file))
    lines = out.read_text(encoding).splitlines()
    assert max(map(len, lines)) <= 80
    bar = {line.split()[0].strip("|"): line.rstrip("| ").split("%")[-1].strip("| ") for line in lines if "%" in line}
    full, half = ("█", "█" * 2 + "▌") if encoding == "utf-8" else ("#", "#" * 2)
    assert bar == {"bra.attend": full * 15, "bra.route": half, "the": half}
    assert [line for line in lines if "75.0 %" in line and "3.000" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: an attention by itself, and a model."""
    where = tmp_path_factory.mktemp("traces")
    operator_times.write_trace(work_on_bra(), "cpu", str(where / "attention"))
    model = MODELS["biformer_tiny"](n_win=2, topk=(1, 1, 1, -2)).eval()
    operator_times.write_trace(Workload(model, torch.randn(1, 3, 32, 32)), "cpu", str(where / "model"))
    return where


def test_trace_has_the_format_of_perfetto(folder: Path) -> None:
    """Chrome's trace format: complete events with times and threads, stages inside of steps, forward-backward links."""
    (path,) = (folder / "attention").iterdir()
    events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert all({"name", "pid", "tid", "ts", "dur"} <= set(event) for event in complete)
    steps = [event for event in complete if event["name"].startswith("ProfilerStep") and event["cat"] != "Trace"]
    assert len(steps) == operator_times.ACTIVE
    for name in STAGES:
        result = [event for event in complete if event["name"] == name and event["cat"] == "user_annotation"]
        assert len(result) == operator_times.ACTIVE * (2 if name == "bra.lepe" else 1)
        assert all(any(inside(event, step) for step in steps) for event in result)
    arrows = {event["ph"] for event in events if event.get("cat") == "fwdbwd"}
    assert arrows == {"s", "f"}


def inside(event: dict[str, Any], step: dict[str, Any]) -> bool:
    return step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"]


Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def tensorboard(folder: Path) -> Iterator[Ask]:
    """A query to the profiler plugin of a running TensorBoard that has loaded both runs."""
    pytest.importorskip("torch_tb_profiler")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", str(folder), "--host", "localhost", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(route: str, **query: str) -> Any:
        words = "&".join(f"{key}={value}" for key, value in query.items())
        address = f"http://localhost:{port}/data/plugin/pytorch_profiler/{route}?{words}"
        with urllib.request.urlopen(address, timeout=60) as reply:
            content = reply.read()
        if reply.headers["Content-Encoding"] == "gzip":
            content = gzip.decompress(content)
        return json.loads(content)

    try:
        wait_for(lambda: set(get("runs")["runs"]) == {"attention", "model"}, server)
        yield get
    finally:
        server.terminate()
        server.wait()


def wait_for(ready: Callable[[], bool], server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "tensorboard ended"
        try:
            if ready():
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError("tensorboard did not read the runs")


RUNS = pytest.mark.parametrize("run", ["attention", "model"])


def profile_of(tensorboard: Ask, run: str, route: str, **more: str) -> Any:
    (worker,) = tensorboard("workers", run=run, view="Overview")
    (span,) = tensorboard("spans", run=run, worker=worker)
    return tensorboard(route, run=run, worker=worker, span=span, **more)


@RUNS
def test_tensorboard_lists_its_views(tensorboard: Ask, run: str) -> None:
    assert tensorboard("views", run=run) == ["Overview", "Operator", "Trace", "Memory", "Module"]


@RUNS
def test_tensorboard_overview(tensorboard: Ask, run: str) -> None:
    result = profile_of(tensorboard, run, "overview")
    assert len(result["steps"]["rows"]) == operator_times.ACTIVE
    assert result["performance"][0]["name"] == "Average Step Time" and result["performance"][0]["value"] > 0


@RUNS
def test_tensorboard_operators(tensorboard: Ask, run: str) -> None:
    rows = profile_of(tensorboard, run, "operation/table", group_by="Operation")["data"]
    calls = {row["name"]: row["calls"] for row in rows}
    # One gather of keys and values per block of BRA (12 in the model) and step.
    assert calls["aten::gather"] == operator_times.ACTIVE * (12 if run == "model" else 1)
    assert all(row["host_total_duration"] >= row["host_self_duration"] for row in rows)


@RUNS
def test_tensorboard_trace_names_the_stages(tensorboard: Ask, run: str) -> None:
    named = {event.get("name") for event in profile_of(tensorboard, run, "trace")["traceEvents"]}
    assert named >= STAGES


@RUNS
def test_tensorboard_memory(tensorboard: Ask, run: str) -> None:
    rows = profile_of(tensorboard, run, "memory", memory_metric="KB")["rows"]["CPU"]
    assert any(
        row[0] == "aten::gather" and row[1] == operator_times.ACTIVE * (12 if run == "model" else 1) for row in rows
    )
    curve = profile_of(tensorboard, run, "memory_curve")["rows"]["CPU"]
    assert len(curve) > 10 and max(point[1] for point in curve) > 0


@RUNS
def test_tensorboard_modules(tensorboard: Ask, run: str) -> None:
    def below(modules: list[dict[str, Any]]) -> Iterator[str]:
        for module in modules:
            yield module["name"]
            yield from below(module["children"])

    result = set(below(profile_of(tensorboard, run, "module")["data"]))
    assert result >= {"BiLevelRoutingAttention_0", "Router_0", "QKVLinear_0"}
    assert ("Block_0" in result) == (run == "model")
