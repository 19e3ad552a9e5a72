"""One cell: the theory of a case (counts and predictions) and its measurement, as columns of a row.

Both run in a child process; theory needs no device and no memory, whatever the size.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attention_zoo import Unsupported, load_plugin
from profiling import agreement, environment, isolation, latency, macs, memory, steady, trace
from profiling.case import Case
from profiling.rows import agree
from profiling.trace import sdpa_backend
from profiling.workload import Workload, check_graphs

FreedMemory = Literal["kept", "returned"]
ATTEMPTS = 3
"""How often a cell is timed, at most, on a GPU that throttles."""


@dataclass(frozen=True)
class Job:
    """A case, and what a fresh process needs to run it.

    Attributes:
        case: what is measured.
        plugins: files to import first.
        patience: when to stop timing.
        freed_memory: CPU: whether the C library keeps what a step frees for the next one, or large blocks are
            returned to the system at once, as by default.
    """

    case: Case
    plugins: tuple[str, ...] = ()
    patience: latency.Patience = latency.STANDARD
    freed_memory: FreedMemory = "kept"

    def load(self) -> None:
        """Import the plugins."""
        for plugin in self.plugins:
            load_plugin(plugin)


def theory(job: Job) -> dict[str, Any]:
    """Counts and predictions for a case, for any resolution, on any machine."""
    job.load()
    return theory_of(job.case)


def theory_of(case: Case) -> dict[str, Any]:
    """As :func:`theory`, in this process."""
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
        columns["macs_analytic"] = formula.total * case.batch
        for part in ("projection", "routing", "attention", "local_conv"):
            columns[f"macs_{part}"] = getattr(formula, part) * case.batch
    columns["macs_agree"] = agree(columns.get("macs_analytic"), forward, None)
    return columns


def measure(job: Job) -> dict[str, Any]:
    """Check, then time, then measure memory, then let fvcore count: in that order, since each disturbs the next.

    An implementation that disagrees with the reference is not timed: its status is ``incorrect``.

    Raises:
        Unsupported: the implementation, or a CUDA graph, cannot run here.
    """
    told = _prepare(job)
    case = job.case
    columns: dict[str, Any] = {}
    work = case.workload(case.device)
    # Before the check compiles the same code: for the second time it takes a fraction.
    compilation = {"compile_ms": _compile(work, case.device)} if case.compiled else {}
    found = agreement.check(case)
    if found is not None:
        columns = {"agreement_error": found.error, "agreement_tolerance": found.tolerance}
        if not found.ok:
            return columns | {"status": "incorrect", "reason": f"{found.where} is off by {found.error:.2g}"}
    columns |= compilation | {"impl": case.implementation(work)}
    columns["freed_memory"] = job.freed_memory if told else None
    if columns["impl"] != "reference":
        with work.settings():
            columns["sdpa_backend"] = sdpa_backend(work.step)
    if case.device == "cuda":
        # What is compiled or chosen in a first step is so beside other cells.
        with work.settings():
            work.step()
        torch.cuda.synchronize()
        # The check in fp64 took more than the rest will.
        torch.cuda.empty_cache()
    with isolation.alone():
        columns |= time_workload(work, case.device, job.patience, case.cuda_graph)
    if case.replicate > 0:
        # The rest is the same in every process: the first one tells.
        return columns
    return columns | memory_columns(work) | {"macs_fvcore": None if case.compiled else _fvcore(work)}


def _prepare(job: Job) -> bool:
    """Make this process ready for the job's step; returns whether the C library was told what to do with memory.

    Raises:
        Unsupported: a CUDA graph is asked for, and cannot be had here.
    """
    job.load()
    told = job.case.device == "cpu" and steady.keep_freed_memory(large_blocks=job.freed_memory == "kept")
    if job.case.device == "cpu":
        steady.displace_memory()
    if job.case.cuda_graph:
        check_graphs(job.case.device)
    if job.case.deterministic:
        # cuBLAS reads it when CUDA starts, and is not deterministic without.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return told


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
    """Stages and heaviest operators of a case, as profiling.trace gives them; with ``folder``, a trace in it.

    Of the step that is timed: compiled, or replayed from a CUDA graph, if that is asked for.
    """
    _prepare(job)
    case = job.case
    work = case.workload(case.device)
    if case.compiled:
        work.compile()
    with work.settings(), work.replayed() if case.cuda_graph else nullcontext():
        found = trace.breakdown(work, case.device)
        if folder is not None:
            trace.write_trace(work, case.device, folder)
    return found


def time_workload(work: Workload, device: str, patience: latency.Patience, cuda_graph: bool = False) -> dict[str, Any]:
    """Time of any workload, as columns of a row."""
    with work.settings(), work.replayed() if cuda_graph else nullcontext():
        return _time(work, device, patience)


def memory_columns(work: Workload) -> dict[str, Any]:
    """Memory of a workload that was timed, as columns of a row; without a CUDA graph, which keeps what it uses."""
    found = memory.measure(work, warm=True)
    return {
        "memory_peak_bytes": found.peak,
        "memory_base_bytes": found.base,
        "memory_reserved_bytes": found.reserved,
    }


def _time(work: Workload, device: str, patience: latency.Patience) -> dict[str, Any]:
    """Latency by all clocks; on a GPU that slowed itself down meanwhile, once more, a bounded number of times."""
    if device != "cuda":
        return dict(latency.measure(work.step, device, patience).columns())
    for _ in range(ATTEMPTS):
        columns: dict[str, Any] = dict(latency.measure(work.step, device, patience).columns())
        on_device = latency.measure_device(work.step, patience).quantile(0.5)
        columns |= {"device_time_p50_ms": on_device, "launch_bound": columns["latency_p50_ms"] / on_device}
        columns |= environment.gpu_state()
        if not columns.get("throttled"):
            break
    return columns


def _compile(work: Workload, device: str) -> float:
    """How long the compilation takes, with one step, in ms."""
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
        # jit.trace cannot follow every module; then there is no count, and the cell is none the worse.
        return None


def _predicted(work: Workload, device: str) -> int | None:
    try:
        return memory.predict(work, device).peak if memory.predictable(work, device) else None
    except Unsupported:
        # Runs on the device only, so that nothing can follow its allocations here.
        return None


def _declared(module: nn.Module, method: str, case: Case) -> Any:
    """What an attention says of itself at this size, or None if it does not say."""
    if case.kind == "model" or not hasattr(module, method):
        return None
    try:
        return getattr(module, method)(case.height, case.width)
    except NotImplementedError:
        return None
