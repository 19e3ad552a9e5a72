"""In which tiles BRA's Triton kernels are fastest on this GPU: ``python -m profiling.tune --help``.

Each kernel apart, by descent along one coordinate at a time from what stands in ``triton_tiles.TILES``. A tile that
does not fit the device, or whose result is another, is out. Nothing is changed: what was found is printed, and every
trial kept, so that whoever edits the table can say why.
"""

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.bra import triton_ops, triton_tiles
from profiling import environment, latency
from profiling.arguments import Parser, run_reporting
from profiling.workload import AUTOCAST

Key = tuple[str, bool, int]
Tile = tuple[int, int, int, int]
Launch = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[Launch], float]
CHOICES: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128), "step": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2, 3, 4)
}  # fmt: skip
GAIN = 0.99
"""A tile replaces another if it takes less than this share of its time."""
KERNELS = ("forward", "queries", "keys")


class Shape(NamedTuple):
    """An input of BRA: some of the bra_speed sweep's that keep a GPU busy. Every trial is compiled for each."""

    batch: int
    dim: int
    heads: int
    grid: int
    topk: int
    n_win: int


SHAPES = (
    Shape(1, 64, 2, 112, 4, 7), Shape(1, 64, 2, 256, 4, 16), Shape(128, 64, 2, 56, 1, 7), Shape(128, 256, 8, 14, 16, 7),
)  # fmt: skip


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
    """The three kernels of attention on random inputs and routes, ready to be launched."""
    torch.manual_seed(0)
    batch, dim, heads, grid, topk, side = shape
    q, k, v = torch.randn(batch, grid, grid, 3 * dim, device=device, dtype=dtype).chunk(3, dim=-1)
    grad = torch.randn(batch, grid, grid, dim, device=device, dtype=dtype)
    index = torch.rand(batch, side**2, side**2, device=device).topk(topk).indices
    where = heads, side, dim**-0.5
    out, lse = triton_ops.bra_attend(q, k, v, index, None, None, *where)
    _, delta, _ = triton_ops.bra_attend_queries(q, k, v, index, None, None, out, lse, grad, *where)
    visitors, starts = triton_ops.bra_invert(index)
    return {
        "forward": lambda: triton_ops.bra_attend(q, k, v, index, None, None, *where)[:1],
        "queries": lambda: triton_ops.bra_attend_queries(q, k, v, index, None, None, out, lse, grad, *where)[:1],
        "keys": lambda: triton_ops.bra_attend_keys(
            q, k, v, visitors, starts, None, None, lse, grad, delta, heads, side, topk, dim**-0.5
        ),
    }


def descend(key: Key, kernels: Sequence[Launch], clock: Clock, until: float) -> Iterator[Trial]:
    """Trials of one kernel from the present tile on; the cheapest one is what it should be. TILES is as it was after.

    Args:
        key: whose tile, in TILES.
        kernels: the kernel at each shape.
        clock: a launch's time in ms.
        until: monotonic time after which no more is tried.
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
        for launch, wanted in zip(kernels, right, strict=True):
            if not all(_close(found, exact) for found, exact in zip(launch(), wanted, strict=True)):
                return Trial(key, tile, impossible, "its result is another")
        return Trial(key, tile, tuple(map(clock, kernels)))
    except Exception as problem:  # Triton has exceptions of its own for what does not fit, or does not compile.
        return Trial(key, tile, impossible, f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:200])


def _close(found: Tensor, exact: Tensor) -> bool:
    # Tiles sum in another order, half of the precision rounds what is multiplied; not a number is never close.
    room = (4 if exact.dtype.itemsize == 2 else 64) * torch.finfo(exact.dtype).eps
    return bool((found.double() - exact.double()).norm() <= room * exact.double().norm())


def tune(kernels: Mapping[str, Sequence[Launch]], half: bool, clock: Clock, minutes: float) -> list[Trial]:
    """All trials for heads of 32 channels, which all of SHAPES have, each kernel given an equal share of the time."""
    found: list[Trial] = []
    for name, of_kernel in kernels.items():
        until = time.monotonic() + 60 * minutes / len(kernels)
        trials = list(descend((name, half, 32), of_kernel, clock, until))
        best = min(trials, key=lambda trial: trial.cost)
        print(
            f"{best.key}: {trials[0].tile} -> {best.tile}, {trials[0].cost / best.cost:.2f}x as fast over "
            f"{len(of_kernel)} shapes, {len(trials)} trials",
            flush=True,
        )
        found += trials
    return found


def write(trials: Sequence[Trial], path: Path) -> None:
    """Every trial as a line: kernel, tile, time at each shape, why there is none."""
    with path.open("w", newline="") as file:
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
    parser = Parser(prog="python -m profiling.tune", description="Find the fastest tiles of BRA's Triton kernels.")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--kernels", default=",".join(KERNELS), metavar="NAME,...", help="default: all three")
    parser.add_argument("--minutes", type=float, default=6.0, metavar="N", help="default: 6")
    parser.add_argument("--out", type=Path, default=Path("tune.csv"), metavar="FILE", help="default: tune.csv")
    given = parser.parse_args(arguments)
    names = [name for name in given.kernels.split(",") if name]
    for name in names:
        if name not in KERNELS:
            parser.error(f"--kernels: there is no {name!r}; valid: {', '.join(KERNELS)}")
    if reason := environment.check_device("cuda"):
        parser.error(f"tiles are timed on a GPU: {reason}")
    dtype = AUTOCAST.get(given.dtype, torch.float32)
    of_shapes = [launches(shape, dtype, "cuda") for shape in SHAPES]
    kernels = {name: [of_shape[name] for of_shape in of_shapes] for name in names}
    write(tune(kernels, dtype.itemsize == 2, _on_device, given.minutes), given.out)
    print(f"Trials: {given.out}")
    return 0


def _on_device(launch: Launch) -> float:
    return latency.measure_device(launch, latency.QUICK).quantile(0.5)


if __name__ == "__main__":
    sys.exit(main())
