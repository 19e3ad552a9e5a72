"""The results store: whatever ends a run, written rows stay, and the next run resumes."""

import errno
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import ROOT

from ablations.harness import results_store as store_module
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import Store, StoreError, check_results_folder, exclusive
from ablations.harness.sweep import Sweep
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution import subprocess_runner
from profiling.meters.latency import QUICK
from profiling.schema.row import COLUMNS, KEY, SchemaError, load

PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
HEADER = ",".join(COLUMNS) + "\n"
DEVICE = "Paper CPU"
FOREIGN = [
    b"a,b\n1,2\n",
    b"a,b\n1,2",
    b"not a table",
    HEADER.encode()[:40] + b"x,y\n1",
    b"\xff\xfe",
    HEADER.encode()[1:],
]
TINY = Sweep(
    question="Does it survive?",
    expect="it does",
    axes={"name": ("pseudo_conv", "full"), "grid": (2, 3, 4), "mode": ("forward", "forward_backward")},
    fixed={"dim": 4, "num_heads": 1, "impl": "reference"},
    stopping=QUICK,
)
KILLS = 10


def case(height: int = 14) -> Case:
    return Case("full", height, 14)


def row(height: int = 14, status: str = "ok", **changes: Any) -> dict[str, Any]:
    """A row of ``case(height)``."""
    outcome = {"latency_p50_ms": 2.0} if status == "ok" else {"reason": "a reason, with a comma"}
    return case(height).key_columns("s", DEVICE) | {"status": status} | outcome | changes


def heights(path: Path) -> list[int]:
    return list(load(path)["height"])


def test_a_new_file_has_the_header_and_nothing_else(tmp_path: Path) -> None:
    opened = Store(tmp_path / "deep" / "er" / "s.csv")
    assert opened.path.read_text() == HEADER and len(opened.frame()) == 0


def test_rows_are_appended_and_nothing_before_them_changes(tmp_path: Path) -> None:
    opened = Store(tmp_path / "s.csv")
    before = opened.path.read_bytes()
    for height in (14, 7, 28):
        opened.append(row(height))
        assert opened.path.read_bytes().startswith(before)
        before = opened.path.read_bytes()
    assert list(opened.frame()["height"]) == [14, 7, 28]


def test_a_bad_row_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    opened = Store(tmp_path / "s.csv")
    opened.append(row())
    before = opened.path.read_bytes()
    for bad in (row(28, colour="red"), row(28, status="fine"), row(28, latency_p50_ms=None)):
        with pytest.raises(SchemaError):
            opened.append(bad)
    assert opened.path.read_bytes() == before and not opened.finished(case(28).key("s", DEVICE))


def test_finished_cells_are_known_after_reopening(tmp_path: Path) -> None:
    Store(tmp_path / "s.csv").append(row(14))
    again = Store(tmp_path / "s.csv")
    assert again.finished(case(14).key("s", DEVICE))
    assert not again.finished(case(28).key("s", DEVICE))
    assert not again.finished(case(14).key("another sweep", DEVICE))
    assert not again.finished(case(14).key("s", "another device"))


@pytest.mark.parametrize("status", ["oom", "timeout", "crash", "incorrect", "unsupported", "error"])
def test_a_failed_cell_is_finished_unless_it_is_to_be_retried(tmp_path: Path, status: str) -> None:
    Store(tmp_path / "s.csv").append(row(status=status))
    again, key = Store(tmp_path / "s.csv"), case().key("s", DEVICE)
    assert again.finished(key) and not again.finished(key, retry_failed=True)


@pytest.mark.parametrize("status", ["ok", "predicted"])
def test_cell_that_did_not_fail_is_never_retried(tmp_path: Path, status: str) -> None:
    opened = Store(tmp_path / "s.csv")
    opened.append(row(status=status))
    assert opened.finished(case().key("s", DEVICE), retry_failed=True)


def test_retried_row_replaces_the_failed_one(tmp_path: Path) -> None:
    opened = Store(tmp_path / "s.csv")
    for one in (row(7), row(14, "error"), row(28)):
        opened.append(one)
    opened.append(row(14, latency_p50_ms=3.5))
    frame = Store(opened.path).frame().set_index("height")
    assert sorted(frame.index) == [7, 14, 28]
    assert frame.loc[14, "status"] == "ok" and frame.loc[14, "latency_p50_ms"] == 3.5
    assert frame.loc[7, "latency_p50_ms"] == frame.loc[28, "latency_p50_ms"] == 2.0


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    opened = Store(path)
    opened.append(row(7))
    whole = path.read_bytes()
    opened.append(row(14, "error", reason="½, torn in the middle of a character"))
    full = path.read_bytes()
    half = full.index("½".encode()) + 1
    for end in {len(whole) + 1, half, len(full) - 1}:
        path.write_bytes(full[:end])
        again = Store(path)
        assert path.read_bytes() == whole and heights(path) == [7]
        assert not again.finished(case(14).key("s", DEVICE))
    again.append(row(28))
    assert heights(path) == [7, 28]


RETRY = """
import sys
from pathlib import Path
from test_results_store import Store, row
from profiling.cli.arguments import run_reporting

def retry():
    store = Store(Path(sys.argv[1]))
    store.append(row(7, "error", reason=chr(0xBD)))
    print(store.frame()["reason"].str.cat())
    return 0

run_reporting(retry)
"""


def test_a_locale_that_knows_ascii_only(tmp_path: Path) -> None:
    """Files are read as they were written; what cannot be printed is a question mark."""
    opened = Store(tmp_path / "s.csv")
    opened.append(row(7, "error", reason="½"))
    opened.append(row(14, "error", reason="µ"))
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", RETRY, str(opened.path)], env=os.environ | ascii_only | {"PYTHONPATH": path},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout == b"??\n", done.stderr
    assert set(load(opened.path)["reason"]) == {"½", "µ"}


@pytest.mark.parametrize("end", [0, 1, len(HEADER) // 2, len(HEADER) - 1])
def test_a_torn_header_is_repaired(tmp_path: Path, end: int) -> None:
    path = tmp_path / "s.csv"
    path.write_text(HEADER[:end])
    Store(path).append(row())
    assert path.read_text().startswith(HEADER) and heights(path) == [14]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_another_schema_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"s\.csv"):
        Store(path)
    assert path.read_bytes() == content


def test_fresh_archives_the_old_file(tmp_path: Path) -> None:
    opened = Store(tmp_path / "s.csv")
    assert opened.archive() is None
    contents = []
    for height in (7, 14, 28):
        opened.append(row(height))
        contents.append(opened.path.read_bytes())
        aside = opened.archive()
        assert aside is not None and aside.read_bytes() == contents[-1]
        assert opened.path.read_text() == HEADER and not opened.finished(case(height).key("s", DEVICE))
    assert len(list(tmp_path.iterdir())) == 4
    assert list(tmp_path.glob("*.csv")) == [opened.path]


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        message = re.escape(f"{tmp_path} is in use by another run (process {os.getpid()}); wait for it to end")
        with pytest.raises(StoreError, match=message), exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())


def full_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let the disk be full after ``room`` more bytes."""
    write = os.write
    left = [room]

    def short(descriptor: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(store_module.os, "write", short)


@pytest.mark.parametrize("room", [0, 50])
@pytest.mark.parametrize("replacing", [False, True], ids=["new row", "retried row"])
def test_full_disk_keeps_rows_and_run_is_resumable(tmp_path: Path, room: int, replacing: bool) -> None:
    opened = Store(tmp_path / "s.csv")
    opened.append(row(7))
    opened.append(row(14, "error"))
    before = opened.path.read_bytes()
    height = 14 if replacing else 28
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, room)
        with pytest.raises(StoreError, match=r"cannot write .*s\.csv: No space left on device"):
            opened.append(row(height))
        assert opened.path.read_bytes() == before
    for later in (opened, Store(opened.path)):
        assert not later.finished(case(height).key("s", DEVICE), retry_failed=True)
    opened.append(row(height))
    assert sorted(heights(opened.path)) == sorted({7, 14, height})


def test_full_disk_at_the_start_raises_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, 10)
    with pytest.raises(StoreError, match="No space left on device"):
        Store(tmp_path / "s.csv")
    monkeypatch.undo()
    assert len(Store(tmp_path / "s.csv").frame()) == 0


def test_invalid_results_folder_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below", Path("/dev/null/x")):
        with pytest.raises(InvalidOption, match="is not a folder"):
            check_results_folder(folder)
    check_results_folder(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    subprocess_runner.start()
    yield


def run(results: Path, sweeps: dict[str, Sweep], **settings: Any) -> Launcher:
    """Run sweeps to their end, without measuring the device's peaks."""
    launcher = Launcher(Settings(results=results, **settings))
    launcher.folder.mkdir(parents=True, exist_ok=True)
    (launcher.folder / "peaks.csv").write_text(PEAKS)
    for _ in launcher.run(sweeps):
        pass
    return launcher


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of an uninterrupted run of TINY."""
    return run(tmp_path_factory.mktemp("undisturbed"), {"tiny": TINY}).folder / "tiny.csv"


def test_a_finished_run_has_every_cell_once(undisturbed: Path) -> None:
    table = load(undisturbed)
    device = table["device_name"].iloc[0]
    assert sorted(keys(undisturbed)) == sorted(case.key("tiny", device) for case in TINY.cases("cpu"))
    assert len(table) == 12 and set(table["status"]) == {"ok"}


def test_a_rerun_does_nothing_and_changes_nothing(undisturbed: Path) -> None:
    before = undisturbed.read_bytes()
    launcher = run(undisturbed.parent.parent, {"tiny": TINY})
    assert launcher.report.skipped == 12 and not launcher.report.statuses
    assert undisturbed.read_bytes() == before


def test_retry_failed_runs_only_failed_cells(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / undisturbed.parent.name
    folder.mkdir()
    lines = undisturbed.read_text().splitlines(keepends=True)
    path = folder / "tiny.csv"
    path.write_text("".join(lines))
    store = Store(path)
    broken = TINY.cases("cpu")[5]
    device = load(path)["device_name"].iloc[0]
    store.append(broken.key_columns("tiny", device) | {"status": "timeout", "reason": "once"})
    assert run(tmp_path, {"tiny": TINY}).report.skipped == 12
    again = run(tmp_path, {"tiny": TINY}, retry_failed=True)
    assert again.report.statuses == {"ok": 1} and again.report.skipped == 11
    assert sorted(keys(path)) == sorted(keys(undisturbed)) and set(load(path)["status"]) == {"ok"}


def test_fresh_changes_no_file_if_one_has_another_schema(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / undisturbed.parent.name
    folder.mkdir()
    (folder / "a.csv").write_bytes(undisturbed.read_bytes())
    (folder / "b.csv").write_bytes(b"a,b\n1,2")
    with pytest.raises(SchemaError, match=r"b\.csv"):
        run(tmp_path, {"a": TINY, "b": TINY}, fresh=True)
    assert (folder / "a.csv").read_bytes() == undisturbed.read_bytes()
    assert (folder / "b.csv").read_bytes() == b"a,b\n1,2"
    assert not list(folder.glob("*.old"))


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "what,per_second,unit\nfp32,fast,FLOP\n", "what,per_second,unit\n"]
)
def test_invalid_peaks_file_is_rejected(tmp_path: Path, content: str) -> None:
    launcher = Launcher(Settings(results=tmp_path))
    launcher.folder.mkdir()
    (launcher.folder / "peaks.csv").write_text(content)
    with pytest.raises(SchemaError, match=r"peaks\.csv"):
        list(launcher.run({}))
    assert (launcher.folder / "peaks.csv").read_text() == content


def run_tiny(results: str) -> None:
    """The run of a victim; its cells have their own fork server, which dies with it."""
    list(Launcher(Settings(results=Path(results))).run({"tiny": TINY}))


def victim(results: Path) -> BaseProcess:
    """A process that runs TINY, forked from one that has imported PyTorch, which saves seconds."""
    process = subprocess_runner._context.Process(target=run_tiny, args=(str(results),))
    process.start()
    return process


def killed_and_resumed(results: Path, name: str, kills: int, chance: random.Random) -> int:
    """Kill a run at random moments after each has added a row, until ``kills`` or its end; then let it finish."""
    path = results / name / "tiny.csv"
    path.parent.mkdir(parents=True)
    (path.parent / "peaks.csv").write_text(PEAKS)
    done = 0
    while done < kills:
        before = max(lines(path), 1)
        process = victim(results)
        while process.is_alive() and lines(path) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        done += 1
    victim(results).join()
    return done


@pytest.mark.slow
def test_resume_after_sigkill_loses_no_row(undisturbed: Path, tmp_path: Path) -> None:
    # Two series at once, one per processor.
    series = [(tmp_path / str(seed), undisturbed.parent.name, KILLS // 2, random.Random(seed)) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        kills = list(pool.map(lambda arguments: killed_and_resumed(*arguments), series))
    assert sum(kills) == KILLS
    for results, name, _, _ in series:
        path = results / name / "tiny.csv"
        assert sorted(keys(path)) == sorted(keys(undisturbed))
        assert set(load(path)["status"]) == {"ok"}
        assert path.read_bytes().endswith(b"\n")


def keys(path: Path) -> list[tuple[str, ...]]:
    """The key of every row, as text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return list(table[list(KEY)].itertuples(index=False, name=None))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
