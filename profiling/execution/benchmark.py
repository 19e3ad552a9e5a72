"""One cell: the static analysis of a case (counts and predictions) and its measurement, as columns of a row.

Both run in a child process; static analysis needs no device and no memory at any size.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import Unsupported, load_plugin
from profiling.cases.case import Case
from profiling.cases.workload import Workload, check_compiler, check_graphs, compile_in_process
from profiling.execution import child_process, cpu_allocator, environment
from profiling.execution.cpu_allocator import FreedMemory
from profiling.meters import correctness, latency, macs, operator_times, peak_memory
from profiling.meters.operator_times import sdpa_backend
from profiling.schema.row import agree

ATTEMPTS = 3
"""Maximum number of timings of a cell on a throttling GPU."""
DEVICE_SECONDS = 0.3
"""Time limit for sampling device time, which varies less than wall time."""


@dataclass(frozen=True)
class Job:
    """A case, and what a fresh process needs to run it.

    Attributes:
        case: what is measured.
        plugins: files to import first.
        stopping: when to stop timing.
        freed_memory: CPU: what the C library does with memory that a step frees. It is fixed at process start:
            :func:`process_options` passes it to :mod:`profiling.execution.subprocess_runner`.
    """

    case: Case
    plugins: tuple[str, ...] = ()
    stopping: latency.StoppingRule = latency.STANDARD
    freed_memory: FreedMemory = "kept"

    def load(self) -> None:
        """Import the plugins."""
        for plugin in self.plugins:
            load_plugin(plugin)


def process_options(job: Job) -> dict[str, Any]:
    """Options of :func:`subprocess_runner.call` for the process of this job."""
    return {"freed_memory": job.freed_memory} if job.case.device == "cpu" else {}


def static_analysis(job: Job) -> dict[str, Any]:
    """Counts and predictions for a case, for any resolution, on any machine."""
    job.load()
    return static_analysis_of(job.case)


def static_analysis_of(case: Case) -> dict[str, Any]:
    """As :func:`static_analysis`, in this process."""
    work = case.workload("meta")
    size = case.height, case.width
    attention = getattr(work.module, "attn", work.module)
    formula = macs.analytic(work.module, *size)
    forward, backward = macs.counted(work)
    columns: dict[str, Any] = {
        "impl": case.implementation(work),
        "params": sum(p.numel() for p in work.module.parameters()),
        "macs_counted": forward,
        "macs_backward_counted": backward if case.mode == "forward_backward" else None,
        "exponent_theory": None if case.kind == "model" else getattr(attention, "exponent", None),
        "kv_tokens_per_query": _declared(attention, "kv_tokens_per_query", case),
        "regions_per_side": _declared(attention, "regions_per_side", case),
        "memory_predicted_bytes": _predicted(work, case.device),
    }
    if formula is not None:
        formula = formula.of_batch(case.batch)
        columns["macs_analytic"] = formula.total
        for part in ("projection", "routing", "attention", "local_conv"):
            columns[f"macs_{part}"] = getattr(formula, part)
    columns["macs_agree"] = agree(columns.get("macs_analytic"), forward, None)
    return columns


def measure(job: Job) -> dict[str, Any]:
    """Check correctness, measure time, measure memory, count by fvcore: in this order, since each disturbs the next.

    An implementation that disagrees with the reference is not timed: its status is ``incorrect``. Only this process
    compiles. On CUDA, fvcore is skipped, because its trace of a model takes longer than all other steps.

    Raises:
        Unsupported: the implementation, a CUDA graph or torch.compile cannot run here.
    """
    prepare(job)
    case = job.case
    columns: dict[str, Any] = {}
    work = case.workload(case.device)
    # Before the check, which compiles the same code: a second compilation is much faster.
    compilation = {"compile_ms": _compile(work, case.device)} if case.compiled else {}
    result = correctness.check(case)
    if result is not None:
        columns = {"correctness_error": result.error, "correctness_tolerance": result.tolerance}
        columns["routes_flipped"] = result.flipped
        if not result.ok:
            return columns | {"status": "incorrect", "reason": result.reason}
    columns |= compilation | {"impl": case.implementation(work)}
    columns["freed_memory"] = cpu_allocator.freed_memory() if case.device == "cpu" else None
    if columns["impl"] != "reference":
        with work.settings():
            columns["sdpa_backend"] = sdpa_backend(work.step)
    if case.device == "cuda":
        # The first step compiles and selects kernels, in parallel with other cells.
        with work.settings():
            work.step()
        torch.cuda.synchronize()
        # The fp64 check needed more memory than the remaining steps.
        torch.cuda.empty_cache()
    with child_process.alone():
        columns |= time_workload(work, case.device, job.stopping, case.cuda_graph)
    if case.replicate > 0:
        # The rest is equal in all replicates, so only the first measures it.
        return columns
    traced = not case.compiled and case.device == "cpu"
    return columns | memory_columns(work) | {"macs_fvcore": _fvcore(work) if traced else None}


def prepare(job: Job) -> None:
    """Prepare this process for the job's step.

    Raises:
        Unsupported: a CUDA graph or compilation is requested but unavailable here.
    """
    job.load()
    if job.case.device == "cuda":
        torch.set_num_threads(environment.THREADS_BESIDE_GPU)
    if job.case.cuda_graph:
        check_graphs(job.case.device)
    if job.case.compiled:
        check_compiler(job.case.device)
    if job.case.may_compile:
        compile_in_process()
    if job.case.deterministic:
        # cuBLAS reads it when CUDA starts, and is nondeterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def measure_module(module: nn.Module, x: Tensor, mode: str, dtype: str) -> dict[str, Any]:
    """Counts, prediction, time and memory of any module, in this process."""
    work = Workload(module, x, mode, dtype)  # type: ignore[arg-type]
    forward, backward = macs.counted(work)
    columns: dict[str, Any] = {
        "params": sum(p.numel() for p in module.parameters()),
        "macs_counted": forward,
        "macs_backward_counted": backward if mode == "forward_backward" else None,
        "memory_predicted_bytes": _predicted(work, x.device.type),
    }
    columns |= time_workload(work, x.device.type, latency.STANDARD) | memory_columns(work)
    columns["macs_fvcore"] = _fvcore(work)
    return columns | {"macs_agree": agree(None, forward, columns["macs_fvcore"])}


def breakdown(job: Job, folder: str | None) -> dict[str, list[dict[str, Any]]]:
    """Stages and heaviest operators of a case; with ``folder``, write a trace there.

    Profiles the step as it is timed: compiled, or replayed from a CUDA graph, if requested.
    """
    prepare(job)
    case = job.case
    work = case.workload(case.device)
    if case.compiled:
        work.compile()
    with work.settings(), work.replayed() if case.cuda_graph else nullcontext():
        result = operator_times.breakdown(work, case.device)
        if folder is not None:
            operator_times.write_trace(work, case.device, folder)
    return result


def time_workload(work: Workload, device: str, rule: latency.StoppingRule, cuda_graph: bool = False) -> dict[str, Any]:
    """Time of any workload, as columns of a row."""
    with work.settings(), work.replayed() if cuda_graph else nullcontext():
        return _time(work, device, rule, cuda_graph)


def memory_columns(work: Workload) -> dict[str, Any]:
    """Memory of a timed workload, as columns of a row; without a CUDA graph, which retains its memory."""
    result = peak_memory.measure(work, warm=True)
    return {
        "memory_peak_bytes": result.peak,
        "memory_base_bytes": result.base,
        "memory_reserved_bytes": result.reserved,
    }


def _time(work: Workload, device: str, rule: latency.StoppingRule, replayed: bool) -> dict[str, Any]:
    """Latency by all clocks; repeated if the GPU throttles, up to ATTEMPTS times in total."""
    if device != "cuda":
        return dict(latency.measure_wall(work.step, device, rule).columns())
    for _ in range(ATTEMPTS):
        columns: dict[str, Any] = dict(latency.measure_wall(work.step, device, rule).columns())
        on_device = _on_device(work, rule, replayed)
        launch_bound = None if on_device is None else columns["latency_p50_ms"] / on_device
        columns |= {"device_time_p50_ms": on_device, "launch_bound": launch_bound}
        columns |= environment.gpu_state()
        if not columns.get("throttled"):
            break
    return columns


def _on_device(work: Workload, rule: latency.StoppingRule, replayed: bool) -> float | None:
    """Median device time of a step in ms; None if it cannot be measured.

    Replays the step from a CUDA graph if the host cannot queue all of it before the device starts it.
    """
    rule = replace(rule, max_seconds=min(rule.max_seconds, DEVICE_SECONDS))
    if replayed or latency.fits_queue(work.step):
        return latency.measure_device(work.step, rule).quantile(0.5)
    try:
        with work.replayed():
            return latency.measure_device(work.step, rule).quantile(0.5)
    except Exception:
        # Not every step can be recorded, and a failed capture may change CUDA's state.
        child_process.spoil()
        return None


def _compile(work: Workload, device: str) -> float:
    """Time of the compilation plus one step, in ms."""
    start = time.perf_counter()
    work.compile()
    with work.settings():
        work.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _fvcore(work: Workload) -> int | None:
    try:
        return macs.by_fvcore(work)
    except Exception:
        # jit.trace does not support every module; the cell is valid without this count.
        return None


def _predicted(work: Workload, device: str) -> int | None:
    try:
        return peak_memory.predict(work, device).peak if peak_memory.predictable(work, device) else None
    except Unsupported:
        # Runs on the device only, so its allocations cannot be tracked here.
        return None


def _declared(module: nn.Module, method: str, case: Case) -> Any:
    """The value that an attention declares at this size; None if undeclared."""
    if case.kind == "model" or not hasattr(module, method):
        return None
    try:
        return getattr(module, method)(case.height, case.width)
    except NotImplementedError:
        return None
