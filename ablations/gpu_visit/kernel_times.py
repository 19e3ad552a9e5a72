"""Device time of each kernel of a step on a GPU: ``python -m ablations.gpu_visit.kernel_times --out kernels.csv``.

Measured by PyTorch's profiler over several steps with a warm cache, to explain missed targets. BRA runs twice: on its
own routes, which visit a few regions most often, and on evenly distributed routes. Pre-gathered keys run with and
without cuDNN, which PyTorch prefers to its own kernels on some devices.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.cli.arguments import Parser, run_reporting

STEPS = 10
NO_CUDNN = "no cuDNN"
SHAPES = (
    (1, 64, 2, 56, 1, 7), (1, 128, 4, 28, 4, 7), (1, 256, 8, 14, 16, 7), (1, 64, 2, 112, 4, 7), (1, 64, 2, 224, 4, 7),
    (1, 128, 4, 64, 4, 8), (1, 64, 2, 256, 1, 16), (1, 64, 2, 256, 4, 16), (128, 64, 2, 56, 1, 7),
    (128, 128, 4, 28, 4, 7), (128, 256, 8, 14, 16, 7),
)  # fmt: skip
"""Batch, dim, heads, grid, topk, regions per side."""
COLUMNS = ("name", "impl", "routes", "batch", "dim", "num_heads", "grid", "topk", "n_win", "most_visits", "kernel",
           "launches", "device_us")  # fmt: skip


def kernels(work: Workload) -> dict[str, tuple[float, float]]:
    """Launches and microseconds of one step, by kernel."""
    with work.settings():
        for _ in range(3):
            work.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(STEPS):
                work.step()
            torch.cuda.synchronize()
    result: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches, total = result[event.name]
            result[event.name] = launches + 1 / STEPS, total + event.device_time_total / STEPS
    return dict(result)


def rows(shape: Sequence[int], contestants: Sequence[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """Yield one row per kernel of a bf16 training step of each contestant (name, impl, kind of routes)."""
    batch, dim, heads, grid, topk, n_win = shape
    for name, impl, routes in contestants:
        chosen: dict[str, Any] = {"window_size": 8 if grid in (64, 256) else 7}
        if name.startswith("bra"):
            chosen = {"n_win": n_win, "topk": topk, "side_dwconv": 5}
        case = Case(name, grid, grid, dim, heads, tuple(chosen.items()), impl=impl, mode="forward_backward",
                    dtype="bf16", device="cuda", batch=batch)  # fmt: skip
        torch.backends.cuda.enable_cudnn_sdp(routes != NO_CUDNN)
        work = case.workload("cuda")
        most = None
        if name == "bra":
            most = _choose_routes(work, routes)
        key_columns = dict(zip(COLUMNS, (name, impl, routes, *shape, most), strict=False))
        for kernel, (launches, microseconds) in kernels(work).items():
            yield key_columns | {"kernel": kernel[:120], "launches": launches, "device_us": round(microseconds, 3)}


def _choose_routes(work: Workload, kind: str) -> int:
    """Use the module's own routes, or impose even ones; returns the maximum number of visits to a region."""
    module: Any = work.module
    with work.settings():
        index = module.routes(work.x)[0]
    if kind == "even":
        regions, topk = index.shape[1:]
        own = torch.arange(regions, device=index.device)[:, None]
        index = ((own + torch.arange(topk, device=index.device)) % regions).expand_as(index).contiguous()
        module.router.imposed = index
    return int(torch.stack([image.flatten().bincount().max() for image in index]).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, or 2 with one line on stderr if the input is wrong."""
    return run_reporting(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m ablations.gpu_visit.kernel_times", description="Device time of each kernel of a step."
    )
    parser.add_argument("--out", type=Path, default=Path("kernels.csv"), metavar="FILE", help="default: kernels.csv")
    parser.add_argument("--all", action="store_true", help="windows, pre-gathered keys and the reference too")
    args = parser.parse_args(arguments)
    contestants = [("bra", "triton", "own"), ("bra", "triton", "even")]
    if args.all:
        contestants += [("bra", "reference", "own"), ("bra_pregathered", "sdpa", ""),
                        ("bra_pregathered", "sdpa", NO_CUDNN), ("window", "sdpa", "")]  # fmt: skip
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for shape in SHAPES:
            for row in rows(shape, contestants):
                writer.writerow(row)
                file.flush()
                if row["impl"] == "triton":
                    print(*shape, row["routes"], row["most_visits"], f"{row['device_us']:.1f}", row["kernel"][:50])
    return 0


if __name__ == "__main__":
    sys.exit(main())
