"""Find the fastest tiles of BRA's Triton kernels on this GPU: ``python -m ablations.gpu_visit.tune --help``.

Each kernel is tuned separately, by coordinate descent from its tile in ``triton_tiles.TILES``. A tile that does not fit
the device or gives another result is rejected. The table is not changed: the best tiles are printed, and every trial
is written to a file as evidence for an edit.
"""

import contextlib
import csv
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo import build
from attention_zoo.attentions.bra import triton_ops, triton_tiles
from profiling.cases.workload import AUTOCAST
from profiling.cli.arguments import Parser, run_reporting
from profiling.execution import environment, subprocess_runner
from profiling.meters import latency

Key = tuple[str, bool, int]
Tile = tuple[int, int, int, int]
Launch = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[Launch], float]
CHOICES: dict[str, tuple[int, ...]] = {
    "rows": (64, 128), "step": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)
}  # fmt: skip
GAIN = 0.99
"""A tile replaces another if it takes less than this share of its time."""
KERNELS = ("forward", "queries", "keys")


class Shape(NamedTuple):
    """Input shape of BRA. SHAPES are shapes of the bra_speed sweep that keep a GPU busy; each trial runs on all."""

    batch: int
    dim: int
    heads: int
    grid: int
    topk: int
    n_win: int


SHAPES = (Shape(1, 64, 2, 224, 4, 7), Shape(1, 64, 2, 256, 4, 16), Shape(128, 64, 2, 56, 1, 7))
STOPPING = latency.StoppingRule(min_samples=20, max_seconds=0.1, min_samples_at_limit=20)
COMPILERS = 14
"""Number of processes that compile candidates before any is timed."""


class Trial(NamedTuple):
    """One tile of one kernel: the median time at each shape in ms, infinite where it cannot run."""

    key: Key
    tile: Tile
    milliseconds: tuple[float, ...]
    reason: str = ""

    @property
    def cost(self) -> float:
        """The geometric mean over the shapes."""
        return math.exp(sum(map(math.log, self.milliseconds)) / len(self.milliseconds))


def launches(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Launch]:
    """Return launchers of the attention kernels: forward, and the backward pass twice, for its two large kernels.

    The input is standard normal and the weights are freshly initialised. The resulting routes visit a few regions most
    often.
    """
    torch.manual_seed(0)
    batch, dim, heads, grid, topk, side = shape
    bra: Any = build("bra", dim=dim, num_heads=heads, n_win=side, topk=topk)
    with torch.no_grad():
        tokens = bra.qkv(torch.randn(batch, grid, grid, dim)).to(device, dtype)
    grad = torch.randn(batch, grid, grid, dim, device=device, dtype=dtype)
    index = triton_ops.bra_route(tokens, dim, side, topk, dim**-0.5)[0]
    args, where = (tokens, None, index, None, None, None, None), (dim, heads, side, dim**-0.5)
    out, _, lse = triton_ops.bra_attend(*args, *where, True)

    def backward() -> tuple[Tensor, ...]:
        return tuple(triton_ops.bra_backward(*args, out, lse, grad, *where)[:1])

    return {
        "forward": lambda: triton_ops.bra_attend(*args, *where, True)[:1],
        "queries": backward,
        "keys": backward,
    }


def compile_all(names: Sequence[str], dtype: torch.dtype, seconds: float) -> None:
    """Compile every candidate in several processes, so that the search only loads it."""
    tiles = list(itertools.product(*CHOICES.values()))
    jobs = [(names, dtype, tiles[start::COMPILERS]) for start in range(COMPILERS)]
    subprocess_runner.start()
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(lambda job: subprocess_runner.call(_compile, *job, timeout=seconds), jobs))


def _compile(names: Sequence[str], dtype: torch.dtype, tiles: Sequence[Tile]) -> None:
    for shape in SHAPES:
        kernels = launches(shape, dtype, "cuda")
        for name, tile in itertools.product(names, tiles):
            key = name, dtype.itemsize == 2, 32
            before = triton_tiles.TILES[key]
            triton_tiles.TILES[key] = tile
            # Ignore tiles that do not fit: their trials fail again.
            with contextlib.suppress(Exception):
                kernels[name]()
            triton_tiles.TILES[key] = before


def descend(key: Key, kernels: Sequence[Launch], clock: Clock, until: float) -> Iterator[Trial]:
    """Yield trials of one kernel, starting from the present tile; the cheapest is the best. Restores TILES.

    Args:
        key: of the tile, in TILES.
        kernels: the kernel at each shape.
        clock: a launch's time in ms.
        until: monotonic time after which no trial starts.
    """
    present = triton_tiles.TILES[key]
    right = [launch() for launch in kernels]
    try:
        best = _try(key, present, kernels, right, clock)
        yield best
        tried, improved = {present}, True
        while improved:
            improved = False
            for place, choices in enumerate(CHOICES.values()):
                for choice in choices:
                    tile: Any = (*best.tile[:place], choice, *best.tile[place + 1 :])
                    if tile in tried or time.monotonic() >= until:
                        continue
                    tried.add(tile)
                    trial = _try(key, tile, kernels, right, clock)
                    yield trial
                    if trial.cost < GAIN * best.cost:
                        best, improved = trial, True
    finally:
        triton_tiles.TILES[key] = present


def _try(key: Key, tile: Tile, kernels: Sequence[Launch], right: Sequence[tuple[Tensor, ...]], clock: Clock) -> Trial:
    triton_tiles.TILES[key] = tile
    impossible = (math.inf,) * len(kernels)
    try:
        for launch, expected in zip(kernels, right, strict=True):
            if not all(_close(result, exact) for result, exact in zip(launch(), expected, strict=True)):
                return Trial(key, tile, impossible, "its result is another")
        return Trial(key, tile, tuple(map(clock, kernels)))
    except Exception as problem:  # Triton has its own exceptions for tiles that do not fit or compile.
        return Trial(key, tile, impossible, f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:200])


def _close(result: Tensor, exact: Tensor) -> bool:
    # Tiles sum in another order, and half precision rounds the factors; NaN is never close.
    room = (4 if exact.dtype.itemsize == 2 else 64) * torch.finfo(exact.dtype).eps
    return bool((result.double() - exact.double()).norm() <= room * exact.double().norm())


def tune(kernels: Mapping[str, Sequence[Launch]], half: bool, clock: Clock, minutes: float) -> list[Trial]:
    """Return all trials for heads of 32 channels, as in all SHAPES; each kernel gets an equal share of the time."""
    result: list[Trial] = []
    for name, of_kernel in kernels.items():
        until = time.monotonic() + 60 * minutes / len(kernels)
        trials = list(descend((name, half, 32), of_kernel, clock, until))
        best = min(trials, key=lambda trial: trial.cost)
        print(
            f"{best.key}: {trials[0].tile} -> {best.tile}, {trials[0].cost / best.cost:.2f}x as fast over "
            f"{len(of_kernel)} shapes, {len(trials)} trials",
            flush=True,
        )
        result += trials
    return result


def write(trials: Sequence[Trial], path: Path) -> None:
    """Write one line per trial: kernel, tile, time at each shape, and the reason if there is none."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        shapes = ["x".join(map(str, shape)) + "_ms" for shape in SHAPES]
        writer.writerow(["kernel", "half", "width", *CHOICES, *shapes, "reason"])
        for trial in trials:
            times = ("" if ms == math.inf else f"{ms:.5f}" for ms in trial.milliseconds)
            writer.writerow([*trial.key, *trial.tile, *times, trial.reason])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, or 2 with one line on stderr if the input is wrong."""
    return run_reporting(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m ablations.gpu_visit.tune", description="Find the fastest tiles of BRA's Triton kernels."
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--kernels", default=",".join(KERNELS), metavar="NAME,...", help="default: all three")
    parser.add_argument("--minutes", type=float, default=6.0, metavar="N", help="half of it to compile; default: 6")
    parser.add_argument("--out", type=Path, default=Path("tune.csv"), metavar="FILE", help="default: tune.csv")
    args = parser.parse_args(arguments)
    names = [name for name in args.kernels.split(",") if name]
    for name in names:
        if name not in KERNELS:
            parser.error(f"--kernels: there is no {name!r}; valid: {', '.join(KERNELS)}")
    if reason := environment.check_device("cuda"):
        parser.error(f"tiles are timed on a GPU: {reason}")
    dtype = AUTOCAST.get(args.dtype, torch.float32)
    compile_all(names, dtype, seconds=30 * args.minutes)
    of_shapes = [launches(shape, dtype, "cuda") for shape in SHAPES]
    kernels = {name: [of_shape[name] for of_shape in of_shapes] for name in names}
    write(tune(kernels, dtype.itemsize == 2, _on_device, args.minutes / 2), args.out)
    print(f"Trials: {args.out}")
    return 0


def _on_device(launch: Launch) -> float:
    return latency.measure_device(launch, STOPPING).quantile(0.5)


if __name__ == "__main__":
    sys.exit(main())
