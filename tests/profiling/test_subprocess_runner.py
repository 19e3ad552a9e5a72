"""A process per cell: every kind of end becomes a row, and other cells continue."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.sweep import Sweep
from attention_zoo import load_plugin
from attention_zoo.core import registry
from profiling.execution import child_process, subprocess_runner
from profiling.execution.preflight import CHECKS, preflight
from profiling.execution.subprocess_runner import Outcome, call
from profiling.meters.latency import QUICK
from profiling.schema.row import MEASURED, load

ROOT = Path(__file__).resolve().parents[2]
FAULTS = str(Path(__file__).parents[1] / "plugins" / "faults.py")
PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
EXPECTED = {
    "fault_none": "ok",
    "fault_segfault": "crash",
    "fault_loop": "timeout",
    "fault_hoard": "oom",
    "fault_raise": "error",
    "fault_output": "incorrect",
    "fault_gradient": "incorrect",
    "fault_no_gradient": "incorrect",
    "fault_nan": "incorrect",
    "fault_without_gradients": "incorrect",
    "fault_right": "ok",
    "fault_count": "error",
    "fault_crash_on_shapes": "crash",
    "fault_says_nonsense": "error",
    "fault_names": "ok",
    "pseudo_conv": "ok",
}
GATED = [name for name in EXPECTED if name in ("fault_output", "fault_gradient", "fault_nan", "fault_right")]
TIMEOUT = 4.0


def forget_plugins() -> None:
    """Make plugins load again when they are requested again."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")) == FAULTS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def own_registry() -> Iterator[None]:
    """Unregister the attentions of plugins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
        yield
    forget_plugins()


@pytest.fixture(scope="module")
def fault_run(own_registry: None, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The rows of one run over all planted faults."""
    load_plugin(FAULTS)
    sweep = Sweep(
        question="What survives?",
        expect="everything but the faults themselves",
        axes={"name": tuple(EXPECTED), "impl": ("auto", "fast")},
        fixed={"grid": 4, "dim": 8, "num_heads": 2},
        keep=lambda values: (values["impl"] == "fast") == (values["name"] in GATED),
        stopping=QUICK,
        timeout=TIMEOUT,
    )
    launcher = Launcher(Settings(results=tmp_path_factory.mktemp("faults"), plugins=(FAULTS,)))
    launcher.devices[0].available = 3 << 29
    launcher.folder.mkdir(parents=True)
    (launcher.folder / "peaks.csv").write_text(PEAKS)
    for _ in launcher.run({"faults": sweep}):
        pass
    return load(launcher.folder / "faults.csv").set_index("name")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    subprocess_runner.start()


def test_every_fault_is_a_row_with_its_status(fault_run: pd.DataFrame) -> None:
    assert fault_run["status"].to_dict() == EXPECTED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fault_segfault", "SIGSEGV"),
        ("fault_loop", f"no result within {TIMEOUT:g} s"),
        ("fault_hoard", "memory"),
        ("fault_raise", 'ValueError: wrong, and "quoted", over [/two] lines: ½'),
        ("fault_output", "output is off by 0.001"),
        ("fault_gradient", "gradient of"),
        ("fault_no_gradient", " is off by 1"),
        ("fault_nan", "output is off by inf"),
        ("fault_crash_on_shapes", "SIGSEGV"),
        ("fault_says_nonsense", "kv_tokens_per_query"),
    ],
)
def test_the_reason_says_what_happened(fault_run: pd.DataFrame, name: str, message: str) -> None:
    assert message in fault_run.loc[name, "reason"]


def test_a_wrong_cell_carries_its_error_and_no_measurement(fault_run: pd.DataFrame) -> None:
    wrong = fault_run[fault_run["status"] == "incorrect"]
    assert (wrong["correctness_error"] > wrong["correctness_tolerance"]).all()
    assert fault_run.loc["fault_output", "correctness_error"] == pytest.approx(0.001, rel=1e-3)
    assert fault_run.loc["fault_gradient", "correctness_error"] > 0.1
    assert fault_run.loc[fault_run["status"] != "ok", list(MEASURED)].isna().all(axis=None)


def test_a_right_implementation_is_checked_and_timed(fault_run: pd.DataFrame) -> None:
    right = fault_run.loc["fault_right"]
    assert right["impl"] == "fast" and right["latency_p50_ms"] > 0
    assert 0 <= right["correctness_error"] <= right["correctness_tolerance"] < 1e-5


def test_auto_is_not_recorded_as_the_reference(fault_run: pd.DataFrame) -> None:
    assert fault_run.loc["fault_no_gradient", "impl_requested"] == "auto"
    assert fault_run.loc["fault_no_gradient", "impl"] == "auto"


def test_options_with_the_names_of_columns_are_kept_apart(fault_run: pd.DataFrame) -> None:
    row = fault_run.loc["fault_names"]
    assert pd.isna(row["topk"]) and pd.isna(row["shift"])
    assert row["other_options"] == "topk=0.5 shift=-1"


def test_faults_leave_counts_and_predictions(fault_run: pd.DataFrame) -> None:
    real = ["fault_none", "fault_segfault", "fault_loop", "fault_hoard", "fault_raise"]
    assert set(fault_run.loc[real, "macs_counted"]) == {4 * 4 * 8 * 8}
    assert fault_run.loc[real, "memory_predicted_bytes"].nunique() == 1


def ending(source: str) -> Outcome:
    """The outcome of a child that runs these statements."""
    return call(exec, source, timeout=20)


@pytest.mark.parametrize("again", range(5))
@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("import os; os._exit(0)", "crash", "exited with status 0 and no result"),
        ("import os; os._exit(7)", "crash", "exited with status 7 and no result"),
        ("import os; os.abort()", "crash", "killed by SIGABRT"),
        ("import signal; signal.raise_signal(signal.SIGSEGV)", "crash", "killed by SIGSEGV"),
        ("import signal; signal.raise_signal(signal.SIGKILL)", "oom", "killed by SIGKILL, as the system does"),
    ],
)
def test_death_and_hang_have_different_statuses(source: str, status: str, reason: str, again: int) -> None:
    outcome = ending(source)
    assert outcome.status == status and outcome.reason.startswith(reason)
    assert outcome.value is None


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise KeyError('k')", "error", "KeyError: 'k'"),
        ("raise ValueError('two\\n  lines')", "error", "ValueError: two lines"),
        ("raise ValueError('x' * 10**6)", "error", "ValueError: " + "x" * 288),
        ("import sys; sys.exit('gone')", "error", "SystemExit: gone"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt:"),
        ("def f(): f()\nglobals().update(f=f)\nf()", "error", "RecursionError: maximum recursion depth exceeded"),
        ("from attention_zoo import Unsupported; raise Unsupported('here')", "unsupported", "Unsupported: here"),
        ("from attention_zoo import InvalidOption; raise InvalidOption('x=1')", "error", "InvalidOption: x=1"),
        ("raise MemoryError('all of it')", "oom", "MemoryError: all of it"),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory')", "oom", "OutOfMemoryError: CUDA"),
        ("import torch; torch.empty(1 << 60)", "oom", "RuntimeError:"),
    ],
)
def test_an_exception_is_a_status_and_one_line(source: str, status: str, reason: str) -> None:
    outcome = ending(source)
    assert outcome.status == status
    assert outcome.reason.startswith(reason) and "\n" not in outcome.reason and len(outcome.reason) <= 300


def test_memory_is_limited_where_asked() -> None:
    assert call(bytearray, 1 << 30, memory=1 << 29).status == "oom"
    assert call(len, "abc", memory=1 << 29).value == 3


def test_a_hang_ends_at_its_timeout() -> None:
    outcome = call(time.sleep, 600, timeout=0.5)
    assert outcome.status == "timeout" and outcome.reason == "no result within 0.5 s"
    assert outcome.seconds >= 0.5


def test_a_timeout_names_the_calls_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "slow_plugin.py").write_text(
        "import time\ndef forward():\n    time.sleep(600)\ndef layer():\n    forward()\n"
    )
    source = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import slow_plugin; slow_plugin.layer()"
    subprocess_runner.start()
    reason = call(exec, source, timeout=3).reason
    assert reason == "no result within 3 s, in forward (slow_plugin.py:3), in layer (slow_plugin.py:5)"


def test_hang_with_closed_pipe_times_out() -> None:
    outcome = call(exec, "import os, time; os.closerange(3, 100); time.sleep(600)", timeout=0.5)
    assert outcome.status == "timeout"


@pytest.mark.parametrize("size", [1, 1 << 16, 1 << 20, 20 << 20])
def test_a_result_larger_than_the_pipe_arrives_whole(size: int) -> None:
    outcome = call(bytes, size, timeout=20)
    assert outcome.status == "ok" and outcome.value == bytes(size)


def test_arguments_larger_than_the_pipe_arrive_whole() -> None:
    assert call(len, bytes(5 << 20), timeout=20).value == 5 << 20


def in_a_bad_fork() -> bool:
    return torch.cuda._is_in_bad_fork()


def test_cuda_can_start_in_a_child() -> None:
    # PyTorch built for CUDA rejects that if its parent has queried for a GPU.
    subprocess_runner.start()
    assert call(in_a_bad_fork).value is False


@pytest.mark.slow
def test_forkserver_preload_runs_no_backward_and_no_cuda_query() -> None:
    # Either would prevent children from starting CUDA. Without CUDA here, the test checks which functions are called.
    script = """
import torch
def refused(*given, **named):
    raise AssertionError("not before the fork")
torch.autograd._engine_run_backward = refused
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refused
try:
    torch.ones(1, requires_grad=True).backward()
except AssertionError:
    import profiling.execution.forkserver_preload
    print("done", flush=True)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


def test_the_child_is_another_process_and_gone_afterwards() -> None:
    pids = {call(os.getpid).value for _ in range(3)}
    assert len(pids) == 3 and os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_child_ends_after_its_answer() -> None:
    source = "import threading, time, os; threading.Thread(target=time.sleep, args=(600,)).start()"
    assert ending(source).status == "ok"


def test_a_child_dies_with_the_run(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(600)"
    script = f"from profiling.execution.subprocess_runner import call\nif __name__ == '__main__': call(exec, {child!r})"
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        pid = int(waited_for(lambda: pid_file.exists() and pid_file.read_text().endswith(" ") and pid_file.read_text()))
        assert alive(pid)
    finally:
        run.kill()
        run.wait()
    try:
        assert waited_for(lambda: not alive(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def waited_for(question, seconds: float = 30.0):  # type: ignore[no-untyped-def]
    """The first true answer; the last answer if none comes."""
    end = time.monotonic() + seconds
    while not (answer := question()) and time.monotonic() < end:
        time.sleep(0.02)
    return answer


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_cannot_import_what_cells_need_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fvcore").mkdir()
    (tmp_path / "fvcore" / "__init__.py").write_text("raise ImportError('fvcore is broken here')")
    try:
        with monkeypatch.context() as patch:
            # The import paths of the server and of its children.
            patch.setattr(subprocess_runner, "ROOT", os.pathsep.join([str(tmp_path), subprocess_runner.ROOT]))
            patch.syspath_prepend(str(tmp_path))
            with pytest.raises(
                subprocess_runner.StartError, match="cannot start processes: ImportError: fvcore is broken"
            ):
                subprocess_runner.restart()
    finally:
        subprocess_runner.restart()


def test_call_each_isolates_a_crash() -> None:
    jobs = ["import signal; signal.raise_signal(signal.SIGSEGV)", "1", "raise KeyError('k')"]
    assert [outcome.status for outcome in subprocess_runner.call_each(exec, jobs, timeout=20)] == [
        "crash",
        "ok",
        "error",
    ]
    assert [outcome.value for outcome in subprocess_runner.call_each(len, ["", "a", "ab"])] == [0, 1, 2]
    (first, second) = subprocess_runner.call_each(eval, ["__import__('os').getpid()"] * 2)
    assert first.value == second.value and first.seconds == second.seconds > 0


@pytest.fixture
def worker() -> Iterator[subprocess_runner.Worker]:
    kept = subprocess_runner.Worker({"TOLD": "this"})
    yield kept
    kept.close()


def test_a_worker_runs_call_after_call_in_one_process(worker: subprocess_runner.Worker) -> None:
    pid = worker.call(os.getpid).value
    assert worker.call(os.getenv, "TOLD").value == "this"
    unsupported = worker.call(exec, "from attention_zoo import Unsupported; raise Unsupported('here')")
    assert (unsupported.status, unsupported.reason) == ("unsupported", "Unsupported: here")
    assert worker.call(len, bytes(5 << 20)).value == 5 << 20
    assert worker.call(os.getpid).value == pid and alive(pid)
    worker.close()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("import os; os.abort()", "crash"),
        ("import signal; signal.raise_signal(signal.SIGKILL)", "oom"),
        ("raise KeyError('k')", "error"),
        ("raise MemoryError", "oom"),
        ("import time; time.sleep(600)", "timeout"),
        ("from profiling.execution import child_process; child_process.spoil()", "ok"),
    ],
)
def test_worker_is_replaced_after_a_failed_call(worker: subprocess_runner.Worker, source: str, status: str) -> None:
    pid = worker.call(os.getpid).value
    assert worker.call(exec, source, timeout=2 if status == "timeout" else 20).status == status
    assert not alive(pid)
    assert worker.call(os.getpid).value not in (pid, None)


def test_memory_limit_does_not_carry_over_to_the_next_call(worker: subprocess_runner.Worker) -> None:
    assert worker.call(len, "abc", memory=1 << 29).value == 3
    assert worker.call(exec, "bytearray(1 << 30)").status == "ok"


@pytest.mark.slow
def test_workers_end_with_the_run_and_restart_on_call(worker: subprocess_runner.Worker) -> None:
    for end in (subprocess_runner.stop_all, subprocess_runner.retire, subprocess_runner.restart):
        pid = worker.call(os.getpid).value
        end()
        assert waited_for(lambda pid=pid: not alive(pid))
        assert worker.call(os.getpid).value not in (pid, None)


@pytest.mark.slow
def test_worker_ignoring_sigterm_does_not_block_exit() -> None:
    script = """
import signal
from profiling.execution import subprocess_runner
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess_runner.start()
    worker = subprocess_runner.Worker()
    print(worker.call(len, "abc").value)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "3\n", run.stderr


def in_turns() -> int:
    for _ in range(2):
        with child_process.alone():
            pass
    return os.getpid()


def test_every_call_of_a_worker_takes_its_own_turns(worker: subprocess_runner.Worker) -> None:
    first, second, third = [], [], worker.call(in_turns)
    outcomes = [worker.call(in_turns, take=message.append) for message in (first, second)]
    assert first == second == [True, False, True, False]
    assert {outcome.value for outcome in outcomes} == {third.value}


def test_a_device_that_does_what_cells_need_passes_the_preflight() -> None:
    assert call(preflight, "cpu").status == "ok"


@pytest.mark.parametrize("what", ["a forward pass", "a backward pass"])
def test_the_preflight_says_what_fails(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> None:
        raise OSError("no such luck")

    monkeypatch.setitem(CHECKS, what, broken)
    with pytest.raises(RuntimeError, match=f"{what} fails: OSError: no such luck"):
        preflight("cpu")
