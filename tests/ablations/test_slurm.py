"""Campaigns on a Slurm started for the tests: whatever process dies, every cell gets one row, without manual work."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ablations.cli import run_all
from ablations.harness import sweep
from ablations.harness.local_runner import Settings
from ablations.harness.sweep import Sweep
from ablations.slurm import driver as campaign
from ablations.slurm import sbatch
from ablations.slurm.task import Shard
from attention_zoo import InvalidOption, load_plugin
from profiling.execution import environment
from profiling.meters.latency import QUICK
from profiling.schema.row import KEY, load

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(Path(__file__).parents[1] / "plugins" / "campaign.py")
PEAKS = "what,per_second,unit\nfp32,1e11,FLOP\ncopy,1e10,byte\n"
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=short Nodes=one,two Default=YES MaxTime=60
"""


def waited_for(question: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true answer; an error if none comes."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return answer


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm of two nodes on this machine, stopped after the tests."""
    if missing := [name for name in (*DAEMONS, "sbatch", "squeue") if not shutil.which(name, path=PATH)]:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o600)
    user = ask("id", "-un").strip()
    text = CONFIG.format(host=socket.gethostname().split(".")[0], ports=free_ports(3), folder=folder, user=user)
    (folder / "slurm.conf").write_text(text)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", PATH)
        patch.setenv("OMP_NUM_THREADS", "1")
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{flag}={folder / 'munge' / name}" for flag, name in munge.items()]
        commands = [["munged", "--foreground", "--force", *paths], ["slurmctld", "-D"]]
        for one in [*commands, *(["slurmd", "-D", "-N", node] for node in ("one", "two"))]:
            output = stack.enter_context((folder / f"{one[0]}.out").open("ab"))
            daemon = subprocess.Popen(one, stdout=output, stderr=output, start_new_session=True)
            stack.callback(ended, daemon)
            if one[0] == "munged":
                waited_for((folder / "munge" / "socket").exists)
        waited_for(lambda: ask("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"])
        yield
        subprocess.run(["scancel", "--user", user, "--signal=KILL"], check=False)
        waited_for(lambda: not ask("squeue", "--noheader"))


def ended(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.fixture
def plugin() -> None:
    """Register the cells of campaigns."""
    load_plugin(PLUGIN)


def of(names: tuple[str, ...], seeds: int) -> Sweep:
    axes = {"name": names, "seed": tuple(range(seeds))}
    fixed = {"grid": 4, "dim": 8, "num_heads": 2}
    return Sweep("Does it survive?", "it does", axes, fixed=fixed, stopping=QUICK)


def with_peaks(results: Path) -> Path:
    """The folder of the tasks' device, with peaks in it, so that no task measures any."""
    folder = results / environment.slug(f"{environment._cpu_model()}, 1 threads")
    folder.mkdir(parents=True)
    (folder / "peaks.csv").write_text(PEAKS)
    return folder


DRIVER = """
import sys
sys.path[:0] = {paths!r}
import test_slurm
from ablations.cli import run_all
from ablations.harness import sweep
from ablations.slurm import driver
driver.POLL = 0.5
sweep.discover = lambda: {{"campaign": test_slurm.of({names!r}, {seeds})}}
raise SystemExit(run_all.main(sys.argv[1:]))
"""


def arguments(results: Path, shards: int, *more: str) -> list[str]:
    return [
        "--launcher", "slurm", "--shards", str(shards), "--results", str(results), "--plugin", PLUGIN,
        "--device", "cpu", *more,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, planned: Sweep, *words: str) -> int:
    """Run the command in this process."""
    monkeypatch.setattr(campaign, "POLL", 0.5)
    monkeypatch.setattr(sweep, "discover", lambda: {"campaign": planned})
    return run_all.main(list(words))


def attempts(results: Path) -> int:
    return sum(len(Shard(folder).attempts()) for folder in results.glob("slurm/*/shards/*"))


def ends(results: Path) -> list[dict[str, Any]]:
    shards = [Shard(folder) for folder in results.glob("slurm/*/shards/*")]
    lines = [line for shard in shards for attempt in shard.attempts() for line in shard.journal(attempt)]
    return [line for line in lines if "end" in line]


def every_key_once(table: pd.DataFrame, cells: int) -> bool:
    return len(table) == cells and not table.duplicated(list(KEY)).any()


def test_crashing_cell_and_cell_that_kills_its_task_are_recorded_as_crash(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_peaks(tmp_path)
    planned = of(("task_fine", "task_segfault", "task_killer"), 3)
    planned = sweep.replace(planned, keep=lambda values: values["name"] != "task_killer" or values["seed"] == 0)
    assert run(monkeypatch, planned, *arguments(tmp_path, 2)) == 0
    table = load(folder / "campaign.csv")
    assert every_key_once(table, 7)
    result = {name: set(rows["status"]) for name, rows in table.groupby("name")}
    assert result == {"task_fine": {"ok"}, "task_segfault": {"crash"}, "task_killer": {"crash"}}
    (reason,) = table[table["name"] == "task_killer"]["reason"]
    assert "died without notice 2 times" in reason
    assert attempts(tmp_path) == 4
    shown = capsys.readouterr()
    assert "Cells: 4 crash, 3 ok." in shown.out and str(folder / "campaign.csv") in shown.out
    before = (folder / "campaign.csv").read_bytes()
    assert run(monkeypatch, planned, *arguments(tmp_path, 2)) == 0
    assert (folder / "campaign.csv").read_bytes() == before
    assert "7 were there already" in capsys.readouterr().out and not ask("squeue", "--noheader")


def test_resume_after_scancel_and_killed_driver_loses_no_row(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_peaks(tmp_path)
    names, seeds = ("task_slow", "task_fine"), 6
    code = DRIVER.format(paths=[str(ROOT), str(Path(__file__).parent)], names=names, seeds=seeds)
    driver = subprocess.Popen([sys.executable, "-c", code, *arguments(tmp_path, 2)], stderr=subprocess.DEVNULL)
    try:
        rows = lambda: [path for path in tmp_path.glob("slurm/*/shards/*/*/*/campaign.csv") if lines(path) > 1]  # noqa: E731
        waited_for(lambda: len(rows()) == 2 or driver.poll())
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finally:
        driver.kill()
    (cancelled, *_) = ask("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
    subprocess.run(["scancel", cancelled], check=True)
    assert run(monkeypatch, of(names, seeds), *arguments(tmp_path, 2)) == 0
    table = load(folder / "campaign.csv")
    assert every_key_once(table, 12) and set(table["status"]) == {"ok"}
    # Two tasks, and one more for the unfinished cells of the cancelled one.
    assert attempts(tmp_path) == 3
    assert sorted(end["end"] for end in ends(tmp_path)) == ["SIGTERM", "done", "done"]


def test_retry_failed_and_fresh_rerun_cells(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, planned = with_peaks(tmp_path), of(("task_fine", "task_flaky"), 2)

    def statuses() -> dict[str, list[str]]:
        table = load(folder / "campaign.csv")
        assert every_key_once(table, 4)
        return {name: list(rows["status"]) for name, rows in table.groupby("name")}

    assert run(monkeypatch, planned, *arguments(tmp_path, 2)) == 0
    assert statuses() == {"task_fine": ["ok", "ok"], "task_flaky": ["crash", "crash"]}
    times = load(folder / "campaign.csv").set_index(["name", "seed"])["started_at"].loc["task_fine"]
    monkeypatch.setenv("CAMPAIGN_MENDED", "1")
    assert run(monkeypatch, planned, *arguments(tmp_path, 2)) == 0
    assert statuses()["task_flaky"] == ["crash", "crash"]
    capsys.readouterr()
    assert run(monkeypatch, planned, *arguments(tmp_path, 2, "--retry-failed")) == 0
    assert "2 were there already" in capsys.readouterr().out
    assert statuses() == {"task_fine": ["ok", "ok"], "task_flaky": ["ok", "ok"]}
    retried = load(folder / "campaign.csv").set_index(["name", "seed"])["started_at"].loc["task_fine"]
    assert (retried == times).all()
    assert run(monkeypatch, planned, *arguments(tmp_path, 2, "--fresh")) == 0
    assert statuses() == {"task_fine": ["ok", "ok"], "task_flaky": ["ok", "ok"]}
    anew = load(folder / "campaign.csv").set_index(["name", "seed"])["started_at"].loc["task_fine"]
    assert (anew > times).all()
    (aside,) = folder.glob("campaign.*.csv.old")
    assert lines(aside) == 5


def test_replicates_get_a_fork_server_each_and_pages_are_written(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_peaks(tmp_path / "results")
    monkeypatch.setenv("CAMPAIGN_SERVERS", str(tmp_path / "servers"))
    # The shell of a task must take it as one word.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "it's a folder"))
    planned = sweep.replace(of(("task_served",), 1), axes={"name": ("task_served",), "dim": (8, 16)}, fixed={
        "grid": 4, "num_heads": 2
    })  # fmt: skip
    assert run(monkeypatch, planned, *arguments(tmp_path / "results", 1, "--replicates", "2")) == 0
    assert every_key_once(load(folder / "campaign.csv"), 4)
    servers = dict.fromkeys((tmp_path / "servers").read_text().split())
    assert len(servers) == 2
    shown = capsys.readouterr()
    assert f"Explorer: {tmp_path / 'results' / 'explorer.html'}" in shown.out, shown.err
    assert f"Report: {folder / 'report.html'}" in shown.out and (folder / "report.html").exists()


def test_failing_shard_is_given_up_and_resumed_once_fixed(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, planned = with_peaks(tmp_path), of(("task_fine",), 2)
    monkeypatch.setenv("CAMPAIGN_DOOMED", "1")
    assert run(monkeypatch, planned, *arguments(tmp_path, 1)) == 2
    message = capsys.readouterr().err
    assert "error: 2 cells are undone, after 3 tries; the last task said: " in message
    assert "the disk of this node is gone" in message and not ask("squeue", "--noheader")
    assert len(list(tmp_path.glob("slurm/*/submissions/*"))) == campaign.TRIES
    monkeypatch.delenv("CAMPAIGN_DOOMED")
    assert run(monkeypatch, planned, *arguments(tmp_path, 1)) == 0
    assert every_key_once(load(folder / "campaign.csv"), 2)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_rejected_job_reports_slurms_message_in_one_line(
    cluster: None, plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in (
        ("partition=nowhere", "invalid partition specified: nowhere"),
        ("frobnicate=1", "frobnicate"),
    ):
        assert run(monkeypatch, of(("task_fine",), 1), *arguments(tmp_path, 1, "--slurm", args)) == 2
        shown = capsys.readouterr()
        assert re.fullmatch(rf"error: Slurm refuses the job: [^\n]*{message}[^\n]*\n", shown.err), shown.err
        assert shown.out == "" and not ask("squeue", "--noheader")


def test_commands_share_a_campaign_unless_they_ask_for_other_cells(tmp_path: Path) -> None:
    def named(*names: str, **settings: Any) -> str:
        # Made anew, as in another process: with other functions.
        sweeps = {name: sweep.replace(of(("full",), 2), keep=lambda values: True) for name in names}
        return campaign._identity(Settings(results=tmp_path, **settings), sweeps)

    assert named("a", "b") == named("b", "a") != named("a")
    assert named("a") != named("a", smoke=True)
    whole = of(("full",), 2)
    variants = [whole, whole.in_full(), sweep.replace(whole, replicates=2), sweep.replace(whole, timeout=9.0)]
    variants.append(sweep.replace(whole, axes={"name": ("full",), "seed": (0,)}))
    assert len({campaign._identity(Settings(results=tmp_path), {"a": each}) for each in variants}) == len(variants)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "Traceback:\n    raise error\nzoo.InvalidOption: no 'x'\nsrun: error: two: exit code 1",
            "zoo.InvalidOption: no 'x'",
        ),
        ("slurmstepd: error: DUE TO TIME LIMIT\nsrun: error: two: Terminated", "slurmstepd: error: DUE TO TIME LIMIT"),
        ("ValueError: bad\n/a/b.py:3: UserWarning: late\n  warnings.warn(", "ValueError: bad"),
        ("starting\nsrun: error: two: Killed", "srun: error: two: Killed"),
        ("", "nothing"),
    ],
)
def test_the_last_error_of_a_log_is_found(log: str, said: str) -> None:
    assert sbatch.last_error(log.splitlines()) == said


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", {}),
        ("partition=gpu,gpus-per-node=1,time=120", {"partition": "gpu", "gpus_per_node": 1, "time": 120}),
        ("exclude=n1,n2,exclusive=true", {"exclude": "n1,n2", "exclusive": True}),
        ("setup=module load cuda,gres=gpu:a100:1", {"setup": ["module load cuda"], "gres": "gpu:a100:1"}),
    ],
)
def test_slurm_options_are_parsed(text: str, result: dict[str, Any]) -> None:
    assert sbatch.options(text) == result
    assert sbatch.on_gpus(result) == ("gpus" in text or "gres" in text)


@pytest.mark.parametrize("text", ["gpu", "job_name=mine", "partition=a,comment=b"])
def test_invalid_slurm_options_are_rejected(text: str) -> None:
    with pytest.raises(InvalidOption, match="valid: key=value, the key an option of sbatch"):
        sbatch.options(text)


def test_missing_slurm_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_all.main(["--launcher", "slurm", "--results", str(tmp_path / "results")]) == 2
    assert "there is no Slurm on this machine" in capsys.readouterr().err and not (tmp_path / "results").exists()
