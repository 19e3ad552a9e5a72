"""Several devices on one machine: each times one cell at a time, across runs, and all devices are used."""

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ablations.harness import cell_runner, devices
from ablations.harness.devices import Device, LaunchError, find
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import StoreError
from ablations.harness.scheduler import schedule
from ablations.harness.sweep import Sweep
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution import child_process, environment, subprocess_runner
from profiling.meters.latency import QUICK
from profiling.schema.row import KEY, load

PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
TINY = Sweep(
    question="Who runs it?",
    expect="whoever is free",
    axes={"name": ("pseudo_conv", "full"), "seed": (0, 1, 2)},
    fixed={"grid": 3, "dim": 4, "num_heads": 1, "impl": "reference"},
    stopping=QUICK,
)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    subprocess_runner.start()


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOCKS", tmp_path)
    # These cells run on the CPU, but must be treated as on a GPU.
    monkeypatch.setattr(cell_runner, "process_options", lambda job: {})


def machine(*names: str) -> list[Device]:
    """Devices of these models, each with its own name and lock, which run cells on the CPU."""
    facts, room = environment.describe("cpu"), environment.available_bytes("cpu")
    return [
        Device(facts | {"device_name": name}, room, f"GPU-{number}", {"CUDA_VISIBLE_DEVICES": str(number)})
        for number, name in enumerate(names)
    ]


def run(results: Path, given: list[Device]) -> Launcher:
    launcher = Launcher(Settings(results=results), given)
    for model in launcher.models:
        (results / model).mkdir(parents=True, exist_ok=True)
        (results / model / "peaks.csv").write_text(PEAKS)
    for _ in launcher.run({"tiny": TINY}):
        pass
    return launcher


def test_devices_of_one_model_share_its_cells(tmp_path: Path) -> None:
    given = machine("Paper GPU", "Paper GPU")
    taken: Counter[str] = Counter()
    for device in given:
        call = device.call
        device.call = lambda *a, device=device, call=call, **k: taken.update([device.uuid]) or call(*a, **k)  # type: ignore[method-assign]
    launcher = run(tmp_path, given)
    table = load(tmp_path / "paper-gpu" / "tiny.csv")
    assert launcher.report.statuses == {"ok": 6} and set(table["device_name"]) == {"Paper GPU"}
    assert not table.duplicated(list(KEY)).any() and len(table) == 6
    assert sum(taken.values()) == 6 and set(taken) == {"GPU-0", "GPU-1"}


def test_every_model_has_a_folder_and_runs_every_cell(tmp_path: Path) -> None:
    launcher = run(tmp_path, machine("Paper GPU", "Parchment GPU", "Paper GPU"))
    assert [path.parent.name for path in launcher.report.files] == ["paper-gpu", "parchment-gpu"]
    for path, name in zip(launcher.report.files, ("Paper GPU", "Parchment GPU"), strict=True):
        table = load(path)
        assert len(table) == 6 and set(table["device_name"]) == {name} and set(table["status"]) == {"ok"}
    assert not run(tmp_path, machine("Parchment GPU")).report.statuses


def test_cell_sees_only_its_device() -> None:
    (_, second) = machine("Paper GPU", "Paper GPU")
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert second.ask(os.getenv, "CUDA_VISIBLE_DEVICES") == "1"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def in_a_run_of_its_own(uuid: str, folder: str, seconds: float) -> None:
    """One of several independent runs: hold the GPU and record when."""
    devices.LOCKS = Path(folder)
    turns = devices.DeviceLock(uuid)
    with closing(devices.DeviceLease(turns)) as turn:
        turn.take(exclusive=True)
        begin = time.monotonic()
        (Path(folder) / "held").touch()
        time.sleep(seconds)
        with (Path(folder) / "spans").open("a") as file:
            file.write(f"{begin} {time.monotonic()}\n")


def another_run(uuid: str, folder: Path, seconds: float) -> BaseProcess:
    process = subprocess_runner._context.Process(target=in_a_run_of_its_own, args=(uuid, str(folder), seconds))
    process.start()
    return process


@pytest.mark.slow
def test_two_runs_take_turns_on_a_gpu(tmp_path: Path) -> None:
    for run in [another_run("GPU-x", tmp_path, 0.3) for _ in range(3)]:
        run.join()
    found = sorted([float(word) for word in line.split()] for line in (tmp_path / "spans").read_text().splitlines())
    assert len(found) == 3
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found))


def spans_of(folder: str, name: str, seconds: float) -> None:
    """A cell that prepares, is timed exclusively, and then does more work; it records the times."""
    spans = [time.monotonic()]
    time.sleep(seconds)
    with child_process.alone():
        spans.append(time.monotonic())
        time.sleep(seconds)
        spans.append(time.monotonic())
    time.sleep(seconds)
    # The lock is released and re-acquired in between, so the shared spans begin and end with the cell.
    (Path(folder) / name).write_text(" ".join(map(str, [*spans, time.monotonic()])))


def several_cells(uuid: str, locks: str, folder: str, name: str) -> None:
    """A run with three concurrent cells on a GPU."""
    devices.LOCKS = Path(locks)
    subprocess_runner.start()
    device = Device(uuid=uuid, available=100, at_once=3)
    with ThreadPoolExecutor(3) as pool:
        names = [f"{name}{number}" for number in range(6)]
        outcomes = list(
            pool.map(lambda n: device.call_concurrent(1, spans_of, folder, n, 0.1, fresh=False, timeout=60), names)
        )
    assert {outcome.status for outcome in outcomes} == {"ok"}


@pytest.mark.slow
def test_cells_prepare_concurrently_and_are_timed_exclusively_across_runs(tmp_path: Path) -> None:
    (tmp_path / "spans").mkdir()
    start = subprocess_runner._context.Process
    runs = [start(target=several_cells, args=("GPU-z", str(tmp_path), str(tmp_path / "spans"), n)) for n in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    found = [list(map(float, path.read_text().split())) for path in (tmp_path / "spans").iterdir()]
    assert len(found) == 12
    exclusive = sorted((begin, end) for _, begin, end, _ in found)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(exclusive))
    # Each preparation sleeps for at least 0.1 s; no exclusive span of another cell may overlap it.
    ready = [(begin, begin + 0.09) for begin, *_ in found] + [(end - 0.09, end) for *_, end in found]
    assert not any(a < end and begin < b for a, b in exclusive for begin, end in ready)
    assert sum(a < end and begin < b for (a, b), (begin, end) in itertools.combinations(ready, 2)) >= 4


def test_waiting_for_the_lock_does_not_count_towards_timeout(tmp_path: Path) -> None:
    device = Device(uuid="GPU-w", available=100, at_once=2)
    with ThreadPoolExecutor(1) as pool, closing(devices.DeviceLease(device.turns)) as other:
        other.take(exclusive=False)
        waiting = pool.submit(device.call_concurrent, 1, spans_of, str(tmp_path), "spans", 0.1, timeout=1.0)
        time.sleep(1.5)
        other.close()
        outcome = waiting.result()
    assert outcome.status == "ok" and 0.3 <= outcome.seconds < 1.0


def test_memory_reservation_waits_in_order_of_arrival_until_it_fits() -> None:
    turns = devices.DeviceLock("GPU-r")
    message: list[str] = []

    def one(name: str, needs: int, seconds: float) -> None:
        with turns.room(needs, 100):
            message.append(f"{name} in")
            time.sleep(seconds)
            message.append(f"{name} out")

    with ThreadPoolExecutor(4) as pool:
        for name, needs, seconds in (("small", 40, 0.3), ("beside", 50, 0.5), ("large", 500, 0.1), ("later", 5, 0.1)):
            pool.submit(one, name, needs, seconds)
            time.sleep(0.05)
    order = ["small in", "beside in", "small out", "beside out", "large in", "large out", "later in", "later out"]
    assert message == order


def test_concurrent_oom_is_retried_exclusively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = machine("Paper GPU")
    device.at_once = 2
    concurrent = lambda *a, **k: subprocess_runner.Outcome("oom", reason="others were there")  # noqa: E731
    monkeypatch.setattr(device, "call_concurrent", concurrent)
    assert run(tmp_path, [device]).report.statuses == {"ok": 6}


def test_lock_of_a_killed_run_is_released(tmp_path: Path) -> None:
    holder = another_run("GPU-y", tmp_path, 600)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    holder.kill()
    holder.join()
    assert Device(uuid="GPU-y").ask(len, "abc") == 3


class Piece:
    """A cell with only a number; ten of group a, ten of b, and so on."""

    def __init__(self, number: int) -> None:
        self.number, self.group = number, "ab"[number // 10 % 2]


class Watch:
    """Counts concurrent work by place."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.now, self.most, self.begun = Counter[str](), Counter[str](), Counter[str]()
        self.mixed = False

    def work(self, *places: str, until: Callable[[], bool] = lambda: True) -> None:
        """Count as working at these places until ``until`` is true."""
        with self.change:
            self.now.update(places)
            self.begun.update(places)
            for place in places:
                self.most[place] = max(self.most[place], self.now[place])
            self.mixed |= bool(self.now["count"] and self.now["measure"])
            self.change.notify_all()
            assert self.change.wait_for(until, timeout=60)
            self.now.subtract(places)


@pytest.mark.parametrize("concurrent", [False, True])
def test_one_cell_per_device_and_counting_only_beside_gpus(concurrent: bool) -> None:
    watch = Watch()
    groups = {"a": [Device(uuid="1"), Device(uuid="2")], "b": [Device(uuid="3")]}

    def count(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        watch.work("count")
        return [{"status": "predicted" if piece.number % 5 == 0 else "measure"} for piece in pieces]

    def measure(piece: Piece, row: dict[str, Any], device: Device) -> dict[str, Any]:
        assert device in groups[piece.group]
        counted = watch.begun["count"]
        # The first three wait for each other; if concurrent, a later one waits for a count during it.
        number = watch.begun["measure"]
        others = lambda: watch.begun["measure"] >= 3  # noqa: E731
        another = lambda: watch.begun["count"] > counted  # noqa: E731
        waits = {0: others, 1: others, 2: others, 30: another if concurrent else others}
        watch.work("measure", str(device.uuid), until=waits.get(number, lambda: True))
        return row | {"status": "ok"}

    events = list(schedule(map(Piece, range(300)), count, measure, groups, concurrent))
    ends = [(piece.number, row["status"]) for done, piece, row in events if done]
    assert sorted(ends) == [(n, "predicted" if n % 5 == 0 else "ok") for n in range(300)]
    assert sorted(piece.number for done, piece, _ in events if not done) == list(range(300))
    assert watch.most["measure"] == 3 and all(watch.most[uuid] == 1 for uuid in "123")
    assert watch.mixed == concurrent


def test_device_runs_at_most_at_once_cells() -> None:
    watch = Watch()
    groups = {"a": [Device(uuid="1", at_once=3)], "b": [Device(uuid="2"), Device(uuid="3", at_once=2)]}

    def measure(piece: Piece, row: dict[str, Any], device: Device) -> dict[str, Any]:
        number = watch.begun["measure"]
        everyone = lambda: watch.begun["measure"] >= 6  # noqa: E731
        watch.work("measure", str(device.uuid), until=everyone if number < 6 else lambda: True)
        return row | {"status": "ok"}

    count = lambda pieces: [{"status": "measure"}] * len(pieces)  # noqa: E731
    ends = [piece.number for done, piece, _ in schedule(map(Piece, range(100)), count, measure, groups, True) if done]
    assert sorted(ends) == list(range(100))
    assert [watch.most[name] for name in ("measure", "1", "2", "3")] == [6, 3, 1, 2]


def test_exception_in_the_run_kills_running_cells(tmp_path: Path) -> None:
    given = machine("Paper GPU", "Paper GPU")
    pieces = [Piece(0), Piece(1)]

    def measure(piece: Piece, row: dict[str, Any], device: Device) -> dict[str, Any]:
        code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(600)"
        return {"status": device.call(exec, code).status}

    running = schedule(
        pieces, lambda pieces: [{"status": "measure"}] * len(pieces), measure, {"a": given}, concurrent=True
    )
    # When the second begins to be measured, the first is already running.
    assert [next(running)[0], next(running)[0]] == [False, False]
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    begin = time.monotonic()
    with pytest.raises(StoreError):
        running.throw(StoreError("the disk is full"))
    assert time.monotonic() - begin < 60


def test_gpu_numbers_are_rejected_on_cpu() -> None:
    with pytest.raises(InvalidOption, match="--gpus chooses among GPUs, and this run is on a CPU"):
        find("cpu", (0,))


def test_gpus_are_selected_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_uuids", lambda: ["u0", "u1", "u2"])
    monkeypatch.setattr(Device, "ask", lambda self, question, kind: {"device_name": self.uuid})
    assert [device.uuid for device in find("cuda")] == ["u0", "u1", "u2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc, 6")
    chosen = find("cuda", (2, 1, 2))
    assert [device.uuid for device in chosen] == ["u2", "u1"]
    assert [device.variables["CUDA_VISIBLE_DEVICES"] for device in chosen] == ["6", "GPU-abc"]
    with pytest.raises(InvalidOption, match="--gpus: there is no GPU 3; valid: 0, 1, 2"):
        find("cuda", (0, 3))


@pytest.mark.skipif(not environment.check_device("cuda"), reason="there is a GPU here")
def test_missing_gpu_raises_launch_error() -> None:
    with pytest.raises(LaunchError, match="cannot use cuda: no GPU is visible"):
        find("cuda")


def broken(kind: str) -> None:
    raise RuntimeError(f"a backward pass fails on {kind}")


def test_failed_preflight_raises_launch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "preflight", broken)
    with pytest.raises(LaunchError, match=r"^cannot use the device: RuntimeError: a backward pass fails on cpu$"):
        find("cpu")


def test_gpu_reuses_workers_and_cpu_does_not() -> None:
    gpu, cpu = Device(uuid="GPU-k", available=100, at_once=2), Device(available=100)
    with closing(gpu):
        kept = {gpu.call_concurrent(1, os.getpid, fresh=False).value for _ in range(3)} | {gpu.ask(os.getpid)}
        assert len(kept) == 1
        fresh = [gpu.call_concurrent(1, os.getpid).value, gpu.call(os.getpid).value]
        assert len({*fresh, *kept}) == 3
        # The exclusive call in a new child stopped the idle worker first.
        assert gpu.ask(os.getpid) not in kept
    assert len({cpu.call(os.getpid, fresh=False).value for _ in range(3)}) == 3


def test_idle_workers_do_not_exceed_concurrent_calls() -> None:
    with closing(Device(uuid="GPU-p", available=100, at_once=3)) as gpu, ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            list(pool.map(lambda _: gpu.call_concurrent(1, time.sleep, 0.2, fresh=False), range(3)))
        assert 2 <= len(gpu._waiting) <= 3


@pytest.mark.parametrize(
    ("case", "fresh"),
    [
        (Case("bra", 14, 14), False),
        (Case("bra", 14, 14, impl="sdpa", cuda_graph=True), False),
        (Case("bra", 14, 14, impl="flex"), True),
        (Case("bra", 14, 14, compiled=True), True),
        (Case("bra", 14, 14, deterministic=True), True),
        (Case("neighborhood", 14, 14), True),
        (Case("neighborhood", 14, 14, impl="sdpa"), False),
        (Case("biformer_tiny", 224, 224, kind="model"), False),
        (Case("biformer_tiny", 224, 224, kind="model", options=(("attention", "neighborhood"),)), True),
    ],
)
def test_cases_that_need_a_fresh_process(case: Case, fresh: bool) -> None:
    assert case.needs_fresh_process == fresh
