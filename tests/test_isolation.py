"""A process per cell: every way to end is a row, and the cells beside it go on."""

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

from ablations.launch import Launcher, Settings
from ablations.sweep import Sweep
from attention_zoo import load_plugin, registry
from profiling import isolation, steady
from profiling.isolation import Outcome, call
from profiling.latency import QUICK
from profiling.rows import MEASURED, load

ROOT = Path(__file__).resolve().parent.parent
FAULTS = str(Path(__file__).parent / "plugins" / "faults.py")
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
    """Have plugins load anew when they are asked for again."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")) == FAULTS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def own_registry() -> Iterator[None]:
    """Take back what plugins registered."""
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
        patience=QUICK,
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
    isolation.start()


def test_every_fault_is_a_row_with_its_status(fault_run: pd.DataFrame) -> None:
    assert fault_run["status"].to_dict() == EXPECTED


@pytest.mark.parametrize(
    ("name", "told"),
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
def test_the_reason_says_what_happened(fault_run: pd.DataFrame, name: str, told: str) -> None:
    assert told in fault_run.loc[name, "reason"]


def test_a_wrong_cell_carries_its_error_and_no_measurement(fault_run: pd.DataFrame) -> None:
    wrong = fault_run[fault_run["status"] == "incorrect"]
    assert (wrong["agreement_error"] > wrong["agreement_tolerance"]).all()
    assert fault_run.loc["fault_output", "agreement_error"] == pytest.approx(0.001, rel=1e-3)
    assert fault_run.loc["fault_gradient", "agreement_error"] > 0.1
    assert fault_run.loc[fault_run["status"] != "ok", list(MEASURED)].isna().all(axis=None)


def test_a_right_implementation_is_checked_and_timed(fault_run: pd.DataFrame) -> None:
    right = fault_run.loc["fault_right"]
    assert right["impl"] == "fast" and right["latency_p50_ms"] > 0
    assert 0 <= right["agreement_error"] <= right["agreement_tolerance"] < 1e-5


def test_an_implementation_that_auto_may_have_chosen_is_not_taken_for_the_reference(fault_run: pd.DataFrame) -> None:
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
    """How a child ends that runs these statements."""
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
def test_a_death_is_told_from_a_hang(source: str, status: str, reason: str, again: int) -> None:
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


def test_a_hang_that_gave_up_its_pipe_ends_too() -> None:
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
    # PyTorch built for CUDA refuses that once its parent has as much as asked whether there is a GPU.
    isolation.start()
    assert call(in_a_bad_fork).value is False


def test_the_child_is_another_process_and_gone_afterwards() -> None:
    pids = {call(os.getpid).value for _ in range(3)}
    assert len(pids) == 3 and os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_a_child_that_has_answered_cannot_linger() -> None:
    source = "import threading, time, os; threading.Thread(target=time.sleep, args=(600,)).start()"
    assert ending(source).status == "ok"


def test_a_child_dies_with_the_run(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(600)"
    script = f"from profiling import isolation\nif __name__ == '__main__': isolation.call(exec, {child!r})"
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
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_cannot_import_what_cells_need_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fvcore").mkdir()
    (tmp_path / "fvcore" / "__init__.py").write_text("raise ImportError('fvcore is broken here')")
    try:
        with monkeypatch.context() as patch:
            # Where the server looks, and where its children do.
            patch.setattr(isolation, "ROOT", os.pathsep.join([str(tmp_path), isolation.ROOT]))
            patch.syspath_prepend(str(tmp_path))
            with pytest.raises(isolation.StartError, match="cannot start processes: ImportError: fvcore is broken"):
                isolation.restart()
    finally:
        isolation.restart()


def test_what_kills_the_child_of_several_costs_the_others_nothing() -> None:
    jobs = ["import signal; signal.raise_signal(signal.SIGSEGV)", "1", "raise KeyError('k')"]
    assert [outcome.status for outcome in isolation.call_each(exec, jobs, timeout=20)] == ["crash", "ok", "error"]
    assert [outcome.value for outcome in isolation.call_each(len, ["", "a", "ab"])] == [0, 1, 2]
    (first, second) = isolation.call_each(eval, ["__import__('os').getpid()"] * 2)
    assert first.value == second.value and first.seconds == second.seconds > 0


def address(displaced: bool) -> int:
    """Where a tensor of a new process lies."""
    steady.keep_freed_memory()
    if displaced:
        steady.displace_memory()
    return torch.empty(1 << 20).data_ptr()


def test_processes_of_one_server_share_their_layout_until_it_is_displaced() -> None:
    alike, apart = ({call(address, displaced).value for _ in range(6)} for displaced in (False, True))
    assert None not in alike | apart and len(apart) > len(alike)
