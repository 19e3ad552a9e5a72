"""Provenance of the measurements: device, software, state of this repository."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
V1_NAMES, V2_NAMES = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")
"""Names in a control group, by version: the files of its limit and usage, and the line of its statistics on cache."""
THREADS_BESIDE_GPU = 1
"""CPU threads of a cell on a GPU. Many such cells prepare at once, and threads of one wait busily for each other: with
as many threads as processors, twelve processes initialised a model seven times slower than with one each."""


def device_name(device: str) -> str:
    """The device's own name; for a CPU, with the number of threads PyTorch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device's name as a folder name."""
    unmodified = re.sub(r"\((r|tm)\)|cpu|processor|@.*ghz", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", unmodified).strip("-")


def available_bytes(device: str) -> int:
    """Memory that a cell may use: free on the GPU, or free on the machine within its control groups and Slurm job."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = dict(re.findall(r"(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))) if _linux() else {}
    free = int(meminfo.get("MemAvailable", 0)) * 1024 or 8 << 30
    return min([free, *_free_in_groups(), *_slurm_limits(os.environ)])


def _free_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the free bytes of each control group that limits this process: its own and all above, of version 1 or 2.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    mount = root / "sys/fs/cgroup"
    # Version 2 has one hierarchy, with an empty list of controllers; in version 1 memory has its own.
    versions = {"": (mount, V2_NAMES), "memory": (mount / "memory", V1_NAMES)}
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in versions:
                hierarchy, names = versions[controllers]
                for group in [path, *map(str, PurePosixPath(path).parents)]:
                    yield from _free_in_group(hierarchy / group.strip("/"), *names)


def _free_in_group(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    # A group without a limit says "max", the root of version 2 has no such file, and a container does not show the
    # groups above it.
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((folder / f"memory.{name}").read_text()) for name in (limit, usage))
        found = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        # Cached files count as used, but the kernel drops them when memory is short.
        yield most - used + int(found[1] if found else 0)


def _slurm_limits(variables: Mapping[str, str]) -> Iterator[int]:
    """Yield the memory of this Slurm job on this node, if it has a limit."""
    # 0 asks for all memory of the node.
    if limit := int(variables.get("SLURM_MEM_PER_NODE", 0)):
        yield limit << 20
    if limit := int(variables.get("SLURM_MEM_PER_CPU", 0)):
        yield limit * int(variables.get("SLURM_CPUS_ON_NODE", 1)) << 20


def describe(device: str) -> dict[str, Any]:
    """The provenance columns of a row, except those that differ between cells."""
    commit, dirty = _repository()
    cuda = device == "cuda"
    return {
        "device_name": device_name(device),
        "threads": THREADS_BESIDE_GPU if cuda else torch.get_num_threads(),
        "driver": _driver() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
    }


def gpu_state() -> dict[str, Any]:
    """Clock, temperature, throttling and other processes of the GPU, as columns; empty where NVML cannot be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        # Running at the power limit is normal for a GPU under such a load.
        harmless = (
            pynvml.nvmlClocksThrottleReasonGpuIdle
            | pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting
            | pynvml.nvmlClocksThrottleReasonSwPowerCap
        )
        running = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
        others = [pid for pid in running if not _of_this_run(pid)]
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "throttled": bool(reasons & ~harmless),
            # In a container, NVML may report PIDs that are invalid there, including this process's.
            "foreign_processes": len(others) if os.getpid() in running else None,
        }
    except Exception:  # NVML is optional: the measurement is valid without it.
        return {}


def _of_this_run(pid: int) -> bool:
    """Whether a process was forked from the same server as this one."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == os.getppid()
    except (OSError, ValueError):
        return pid == os.getpid()


def check_device(device: str) -> str | None:
    """Why ``device`` cannot be used here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available to this PyTorch"
    return None


@cache
def _repository() -> tuple[str | None, bool | None]:
    if (args := _given_commit(os.environ))[0]:
        return args

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # Exclude results: a run writes them, and they do not affect measurements.
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":!results"))
    except (OSError, subprocess.SubprocessError):
        return args


def _given_commit(variables: Mapping[str, str]) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of a copy outside its repository: VISION_ATTENTION_COMMIT, _DIRTY (0 or 1)."""
    commit, dirty = (variables.get(f"VISION_ATTENTION_{what}") or None for what in ("COMMIT", "DIRTY"))
    return commit, None if dirty is None else dirty != "0"


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    facts = dict(re.findall(r"(\w[\w ]*?)\s*: *(.+)", cpuinfo.read_text(encoding="utf-8"))) if cpuinfo.exists() else {}
    name = " ".join(facts.get("model name", "").split())
    if name and not re.search(r"\d", name) and "cpu family" in facts:
        # Virtual machines hide the number of the model, and CPUs of different speed would share a name.
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name or platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _linux() -> bool:
    return os.path.exists("/proc/meminfo")
