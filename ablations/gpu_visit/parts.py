"""The parts of a visit to a GPU (``gpu_visit``): each runs within a time limit in seconds and returns a summary.

A part writes its results into the visit's folder as it runs, so that it may be ended at any moment.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch

from ablations.harness import results_store, static_analysis_cache
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.sweep import Sweep, Values, select
from profiling.cases.case import Case
from profiling.cases.workload import compile_in_process
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, measure
from profiling.meters.correctness import check
from profiling.meters.latency import QUICK, StoppingRule
from profiling.schema.row import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
VISIT = StoppingRule(max_seconds=0.12, warm_up_seconds=0.03)
"""Stopping rule for a visit of minutes: the intervals in the rows are wider."""
TESTS = tuple(
    f"tests/attention_zoo/test_{name}.py"
    for name in ("bra_triton", "bra_triton_kernels", "bra_triton_operators", "kernels_on_device")
)
SWEEPS = "models,kv_downsample,resolution,precision,topk"
TIMEOUT = 150.0
"""Time limit of a cell in seconds; torch.compile takes most of it."""
AT_ONCE = 12
"""Number of processes that share the GPU while nothing is timed."""
FAREWELL = 12.0
"""Seconds for which an interrupted tool may report; pytest takes ten to end its workers."""
NEEDED = ("fvcore", "pandera", "jaxtyping", "einops", "rich", "submitit", "beartype", "pytest", "xdist", "pynvml")


class Failed(RuntimeError):
    """A part did not succeed; the message says how."""


class Skipped(RuntimeError):
    """A part has nothing to do here; the message says why."""


@dataclass
class Visit:
    """A visit: its folder and its device.

    Attributes:
        out: the folder.
        device: ``cuda``, or ``cpu`` for a rehearsal with the cells of a smoke run.
        static_analysis: the file written by ``ablations prepare``.
        tests: the test files of the kernels.
        log: of the running part.
    """

    out: Path
    device: str = "cuda"
    static_analysis: Path | None = None
    tests: tuple[str, ...] = TESTS
    log: TextIO = field(default=sys.stderr)

    @cached_property
    def launcher(self) -> Launcher:
        """Launcher shared by all parts, since probing a GPU takes seconds."""
        smoke = self.device == "cpu"
        return Launcher(Settings(self.device, self.out / "results", smoke=smoke, static_analysis=self.static_analysis))

    def say(self, text: str) -> None:
        """Write a line to the log."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.log, flush=True)


def preflight(visit: Visit, seconds: float) -> str:
    """Check a forked child on the device, a whole cell, and the static analysis; describe the machine."""
    visit.say(f"{sys.version}\ntorch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} processors")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if visit.device == "cuda":
        subprocess.run(["nvidia-smi"], stdout=visit.log, stderr=visit.log, timeout=20, check=False)
    _check(visit, "a backward pass", subprocess_runner.call(backward, visit.device, timeout=seconds))
    impl = "triton" if visit.device == "cuda" else "sdpa"
    case = Case("bra", 14, 14, options=(("n_win", 7), ("topk", 4)), impl=impl, device=visit.device,
                mode="forward_backward", dtype="bf16" if visit.device == "cuda" else "fp32")  # fmt: skip
    device = visit.launcher.devices[0]
    visit.say(f"{device.facts}, {device.available / 2**30:.1f} GiB, {device.at_once} cells at once")
    _check(visit, str(case), device.call_concurrent(1 << 30, measure, Job(case, stopping=QUICK), timeout=seconds))
    known = "no static analysis"
    if visit.static_analysis:
        cases = [case for sweep in select(None).values() for case in sweep.cases(visit.device)]
        loaded, distinct = (
            static_analysis_cache.load(visit.static_analysis, cases),
            {static_analysis_cache.same(case) for case in cases},
        )
        if not loaded:
            raise Failed(f"{visit.static_analysis} has no case of this code on {visit.device}: prepare it anew")
        known = f"static analysis of {len(loaded)} of {len(distinct)} cases"
    return f"{device.facts['device_name']}, torch {torch.__version__}, {known}, lacks {missing or 'nothing'}"


def backward(device: str) -> float:
    """A backward pass; the result is 2."""
    x = torch.ones(8, 8, device=device, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    return x.grad.mean().item()


def _check(visit: Visit, what: str, outcome: subprocess_runner.Outcome) -> None:
    visit.say(f"{what}: {outcome}")
    status = (outcome.value or {}).get("status", "ok") if isinstance(outcome.value, dict) else outcome.status
    if outcome.status != "ok" or status != "ok":
        raise Failed(f"{what}: {outcome.status} {outcome.reason} {outcome.value or ''}")


def correctness(visit: Visit, seconds: float) -> str:
    """Run the tests of the kernels."""
    tests = [name for name in visit.tests if (ROOT / name).exists()]
    workers = str(AT_ONCE if visit.device == "cuda" else 2)
    command = ["-m", "pytest", "-n", workers, "-p", "no:cacheprovider", "--tb=short", "-rfE", "--durations=10"]
    code = _python(visit, seconds, *command, f"--junitxml={visit.out / 'log' / 'correctness.xml'}", *tests)
    lines = (visit.out / "log" / "correctness.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    message = next((line for line in reversed(lines) if " passed" in line or " failed" in line or " error" in line), "")
    if code:
        broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        how = "at the time limit" if code < 0 else f"exit status {code}"
        raise Failed("\n  ".join([f"{how}: {message.strip('= ')}", *(line[:160] for line in broken[:20])]))
    return message.strip("= ")


def warm(visit: Visit, seconds: float) -> str:
    """Compile the Triton and FlexAttention kernels once, so that cells load them from the caches on disk."""
    cases = _kernel_cases(visit.device)
    if visit.device == "cpu":
        raise Skipped("a CPU compiles no kernels of these")
    ordered_cases = [cases[first::AT_ONCE] for first in range(min(AT_ONCE, len(cases)))]
    variables = visit.launcher.devices[0].variables
    call = lambda part: subprocess_runner.call(run_once, part, timeout=seconds, environment=variables)  # noqa: E731
    with ThreadPoolExecutor(len(ordered_cases)) as pool:
        outcomes = list(pool.map(call, ordered_cases))
    lines = [line for outcome in outcomes for line in (outcome.value or [f"{outcome.status}: {outcome.reason}"])]
    for line in lines:
        visit.say(line)
    return f"{sum(' ok ' in line for line in lines)} of {len(cases)} cases"


def _kernel_cases(device: str) -> list[Case]:
    """The cases of BRA's Triton kernels, those of models that use them, and those of FlexAttention."""
    # The slowest to compile first, since the time limit may cut off the last.
    chosen = [("flex", _compiled()), ("auto", select("models")), ("triton", _headline())]
    cases = [(impl, case) for impl, named in chosen for sweep in named.values() for case in sweep.cases(device)]
    return [case for impl, case in cases if case.impl == impl and not case.cuda_graph]


def run_once(cases: Iterable[Case]) -> list[str]:
    """Check each case as its cell does, and run one step of it; returns one line per case."""
    message = []
    compile_in_process()
    torch.set_num_threads(environment.THREADS_BESIDE_GPU)
    for case in cases:
        start, how = time.perf_counter(), "ok"
        try:
            check(case)
            work = case.workload(case.device)
            with work.settings():
                work.step()
            if case.device == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            how = f"{type(problem).__name__}: {problem}"[:200]
        message.append(f"{case}: {how} after {time.perf_counter() - start:.1f} s")
    return message


def headline(visit: Visit, seconds: float) -> str:
    """Run bra_speed, except for cases that take long to compile."""
    return _launch(visit, seconds, _headline())


def sweeps(visit: Visit, seconds: float) -> str:
    """Run the other sweeps."""
    return _launch(visit, seconds, select(SWEEPS))


def compiled(visit: Visit, seconds: float) -> str:
    """Run the rest of bra_speed."""
    return _launch(visit, seconds, _compiled())


def kernels(visit: Visit, seconds: float) -> str:
    """Measure the time of each kernel."""
    return _tool(visit, seconds, "kernels.csv", "-m", "ablations.gpu_visit.kernel_times")


def tiles(visit: Visit, seconds: float) -> str:
    """Search for the fastest tiles."""
    # Reserve time for imports and for the trial in progress at the time limit.
    minutes = max(0.1, (seconds - 20) / 60)
    return _tool(visit, seconds, "tune.csv", "-m", "ablations.gpu_visit.tune", "--minutes", f"{minutes:.2f}")


def _headline() -> dict[str, Sweep]:
    return _part_of_bra_speed(lambda values: not _slow(values))


def _compiled() -> dict[str, Sweep]:
    return _part_of_bra_speed(_slow)


def _slow(values: Values) -> bool:
    return values["compiled"] or values["impl"] == "flex"


def _part_of_bra_speed(include: Callable[[Values], bool]) -> dict[str, Sweep]:
    (whole,) = select("bra_speed").values()
    return {"bra_speed": replace(whole, keep=lambda values: whole.keep(values) and include(values))}


def _launch(visit: Visit, seconds: float, chosen: dict[str, Sweep]) -> str:
    """Run sweeps as run_all.py does, each case once."""
    launcher = visit.launcher
    sized = {name: replace(s, replicates=1, stopping=VISIT, timeout=TIMEOUT) for name, s in chosen.items()}
    launcher.settings = replace(launcher.settings, minutes=seconds / 60)
    try:
        for cell, done, total in launcher.run(sized):
            visit.say(f"[{done + 1}/{total}] {cell.sweep}: {cell.case}")
    finally:
        result = launcher.report
        for line in _failures(result.files):
            visit.say(line)
    failures = "".join(f"\n  {line[:160]}" for line in _failures(result.files)[:8])
    counts = ", ".join(f"{number} {status}" for status, number in sorted(result.statuses.items())) or "nothing new"
    return f"{counts}; {result.skipped} were there, {result.left} left{failures}"


def _failures(files: Iterable[Path]) -> list[str]:
    """A line for every kind of failure in these files, the most frequent first."""
    kinds: Counter[str] = Counter()
    for path in files:
        for text in results_store.read(path):
            row = dict(zip(COLUMNS, text, strict=True))
            if row["status"] in results_store.FAILED:
                kinds[f"{row['sweep']}: {row['name']} {row['impl_requested']}: {row['status']}: {row['reason']}"] += 1
    return [f"{number} x {kind}" for kind, number in kinds.most_common()]


def _tool(visit: Visit, seconds: float, name: str, *arguments: str) -> str:
    if visit.device == "cpu":
        raise Skipped("it needs a GPU")
    code = _python(visit, seconds, *arguments, "--out", str(visit.out / name))
    lines = sum(1 for _ in (visit.out / name).open()) if (visit.out / name).exists() else 0
    if code:
        raise Failed(f"exit status {code}, {lines} lines in {name}")
    return f"{lines} lines in {name}"


def _python(visit: Visit, seconds: float, *arguments: str) -> int:
    """Run Python in its own process group; returns the exit status, negative if the time limit was reached."""
    visit.say(f"python {' '.join(arguments)}")
    # A visit in the background of a shell ignores interrupts, and its children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=visit.log, stderr=visit.log, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # pytest reports on an interrupt what has failed so far; its workers must receive it too.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=FAREWELL)
        return -1
    finally:
        _end_group(process)


def _end_group(process: "subprocess.Popen[Any]") -> None:
    """Kill the process group of a process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
