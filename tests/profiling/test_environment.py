"""How the machine and the code are named in rows."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from profiling.execution import environment
from profiling.schema.row import COLUMNS


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz, 2 threads", "intel-xeon-e5-2690-v4"),
        ("Intel(R) Xeon(R) Processor, 2 threads", "intel-xeon-2-threads"),
        ("NVIDIA H200", "nvidia-h200"),
        ("../../etc", "etc"),
    ],
)
def test_device_name_becomes_a_folder_name(name: str, folder: str) -> None:
    assert environment.slug(name).startswith(folder)
    assert "/" not in environment.slug(name)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model\t\t: 106\nmodel name\t: Intel(R) Xeon(R) Gold 6330  CPU", "Intel(R) Xeon(R) Gold 6330 CPU"),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC", "AMD EPYC family 26 model 2"),
        ("processor\t: 0\nCPU architecture: 8", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_a_cpu_whose_number_is_hidden_is_named_by_family_and_model(
    cpuinfo: str | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\n{cpuinfo}\nflags\t\t: fpu vme\n")
    assert environment._cpu_model(path) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [({}, (None, None)), ({"COMMIT": "abc"}, ("abc", None)), ({"COMMIT": "abc", "DIRTY": "0"}, ("abc", False)),
     ({"COMMIT": "abc", "DIRTY": "1"}, ("abc", True))],
)  # fmt: skip
def test_commit_without_a_repository_comes_from_the_environment(
    message: dict[str, str], expected: tuple[str | None, bool | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("COMMIT", "DIRTY"):
        monkeypatch.delenv(f"VISION_ATTENTION_{name}", raising=False)
    for name, value in message.items():
        monkeypatch.setenv(f"VISION_ATTENTION_{name}", value)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment._repository.__wrapped__() == expected


def test_the_environment_is_described_in_columns() -> None:
    facts = environment.describe("cpu")
    assert set(facts) <= set(COLUMNS)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["cuda"] is None
    assert 2**20 < environment.available_bytes("cpu") < 2**50


def written(folder: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


def test_memory_is_limited_by_every_group_above_and_cached_files_are_free(tmp_path: Path) -> None:
    written(tmp_path, {"proc/self/cgroup": "0::/slurm/job_1/step_0", "sys/fs/cgroup/cgroup.procs": ""})
    job = tmp_path / "sys/fs/cgroup/slurm/job_1"
    written(job / "step_0", {"memory.max": "max", "memory.current": 300, "memory.stat": "inactive_file 0"})
    assert not list(environment._free_in_groups(tmp_path))
    stat = "anon 200\ninactive_file 250\nworkingset_x 3"
    written(job, {"memory.max": 1000, "memory.current": 700, "memory.stat": stat})
    assert list(environment._free_in_groups(tmp_path)) == [550]
    written(job.parent, {"memory.max": 900, "memory.current": 800, "memory.stat": "anon 800"})
    assert list(environment._free_in_groups(tmp_path)) == [550, 100]


def test_memory_is_limited_by_groups_of_version_1_and_by_that_of_a_container(tmp_path: Path) -> None:
    written(tmp_path, {"proc/self/cgroup": "5:cpu:/\n4:memory:/docker/0af\n0::/docker/0af"})
    stat = "inactive_file 1\ntotal_inactive_file 40"
    files = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 700, "memory.stat": stat}
    # A container mounts its own group as the root; the path is that of the host.
    written(tmp_path / "sys/fs/cgroup/memory", files)
    assert list(environment._free_in_groups(tmp_path)) == [340]
    assert not list(environment._free_in_groups(tmp_path / "nothing"))


def test_memory_without_a_limit_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_free_in_groups", lambda: iter(()))
    monkeypatch.setattr(environment, "_slurm_limits", lambda variables: iter(()))
    assert 2**20 < environment.available_bytes("cpu") < 2**50


@pytest.mark.parametrize(
    "limits",
    [{"MEM_PER_NODE": "100", "MEM_PER_CPU": "0"}, {"MEM_PER_CPU": "50", "CPUS_ON_NODE": "2"}, {"MEM_PER_CPU": "100"}],
)
def test_memory_is_limited_by_the_slurm_job(limits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert environment.available_bytes("cpu") == 100 << 20
    # The memory of a job is the host's; a GPU has its own.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    assert environment.available_bytes("cuda") == 80 << 30
