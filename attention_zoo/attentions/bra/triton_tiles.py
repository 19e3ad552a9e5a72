"""Tile sizes of BRA's Triton kernels. Tune them here."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

LARGEST_HEAD = 128
"""Most channels per head."""
FP32_PRECISION = "tf32x3"
"""Precision of fp32 products: three tf32 products on tensor cores are as exact as ``ieee``, which uses none."""
VISITS, QUERIES = 8, 512
"""Limits of one program of the keys' gradient, since few regions get most visits: VISITS visits or, if regions are
small, visits of QUERIES queries in total."""


@dataclass(frozen=True)
class Tile:
    """Tile sizes of a kernel and the values it is compiled for."""

    heads: int
    side: int
    region: tuple[int, int]
    kv_region: tuple[int, int]
    e: int
    c: int
    queries: int
    keys: int
    packed: bool
    warps: int
    stages: int
    precision: str
    long: bool

    @cached_property
    def constants(self) -> tuple[Any, ...]:
        """The ``constexpr`` arguments of every attention kernel, in order."""
        e, c = _fit(self.e), _fit(self.c)
        shape = self.heads, self.side, *self.region, *self.kv_region, self.e, self.c, e, c
        return *shape, self.queries, self.keys, self.packed, self.precision, self.long

    @cached_property
    def options(self) -> dict[str, int]:
        """Options of Triton's launcher."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def query_programs(self, batch: int) -> int:
        """Programs of a kernel with one for each tile of queries."""
        return batch * self.side**2 * self.heads * -(-self.region[0] * self.region[1] // self.queries)

    def key_programs(self, batch: int, slots: int) -> int:
        """Programs of a kernel with one for each tile of keys of each region and slot."""
        tiles = -(-self.kv_region[0] * self.kv_region[1] // self.keys)
        return batch * (self.side**2 + slots) * self.heads * tiles

    def parts(self) -> int:
        """Number of tiles, over all heads, that contribute to the gradient of one factor."""
        queries, keys = self.region[0] * self.region[1], self.kv_region[0] * self.kv_region[1]
        return -(-keys // self.keys) * -(-queries // self.queries) * self.heads


TILES = {
    # Kernel, two bytes per number, channels per head up to: rows, step, warps, stages.
    ("forward", True, 32): (128, 64, 4, 3),
    ("forward", True, 64): (128, 64, 4, 3),
    ("forward", True, 128): (128, 64, 8, 2),
    ("forward", False, 32): (64, 32, 4, 2),
    ("forward", False, 64): (32, 32, 4, 2),
    ("forward", False, 128): (32, 32, 8, 2),
    ("queries", True, 32): (128, 64, 8, 2),
    ("queries", True, 64): (64, 64, 4, 2),
    ("queries", True, 128): (64, 64, 8, 2),
    ("queries", False, 32): (64, 32, 4, 2),
    ("queries", False, 64): (32, 32, 8, 2),
    ("queries", False, 128): (16, 32, 8, 2),
    ("keys", True, 32): (128, 32, 4, 2),
    ("keys", True, 64): (64, 64, 4, 2),
    ("keys", True, 128): (64, 64, 8, 2),
    ("keys", False, 32): (32, 32, 4, 2),
    ("keys", False, 64): (32, 32, 8, 2),
    ("keys", False, 128): (16, 32, 8, 2),
}
"""A program keeps ``rows`` tokens of its own region and iterates over the tokens of its visits ``step`` at a time.

These are the largest tiles that, as compiled for compute capability 8.0 and 9.0, spill no or almost no registers and
that fit the shared memory of 8.6 (99 KiB). Which tiles are fastest has not been measured. fp32 takes smaller ones: its
numbers need twice the registers, and in full precision every thread holds whole rows."""


def tile_of(
    kernel: str, dtype: torch.dtype, grid: tuple[int, int], kv_grid: tuple[int, int], e: int, c: int, heads: int,
    side: int, topk: int, factor: bool, long: bool
) -> Tile:  # fmt: skip
    """Tile sizes of ``kernel`` (forward; queries: gradients of queries; keys: gradients of keys and values).

    Args:
        grid, kv_grid: of queries, and of keys and values; ``side`` divides them.
        e, c: channels of all heads.
        factor: whether keys and values are multiplied by factors.
        long: whether offsets within an image take 64 bits.
    """
    e, c = e // heads, c // heads
    widest = 32 if max(e, c) <= 32 else 64 if max(e, c) <= 64 else LARGEST_HEAD
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    precision = "tf32" if tf32 else FP32_PRECISION
    half = dtype.itemsize == 2
    return _cut(
        kernel, half, widest, TILES[kernel, half, widest], precision, grid, kv_grid, e, c, heads, side, topk, factor,
        long,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _cut(
    kernel: str, half: bool, widest: int, tile: tuple[int, int, int, int], precision: str, grid: tuple[int, int],
    kv_grid: tuple[int, int], e: int, c: int, heads: int, side: int, topk: int, factor: bool, long: bool,
) -> Tile:  # fmt: skip
    # Cached, since the host takes longer to compute a tile than a GPU takes to process a small one.
    region, kv_region = (grid[0] // side, grid[1] // side), (kv_grid[0] // side, kv_grid[1] // side)
    own, met = region[0] * region[1], kv_region[0] * kv_region[1]
    if kernel == "keys":
        own, met = met, own
    most, step, warps, stages = tile
    # The gradient of a factor is summed over tiles, so no tile may span two factors.
    mixed = kernel != "queries" or not factor
    rows, step = min(most, _fit(own)), min(step, _fit(topk * met if mixed else met))
    if half:
        # Fewer rows need fewer warps. But wide rows need registers, and Hopper multiplies 64 rows with 4 warps.
        warps = max(warps * rows // most, 4 if rows >= 64 or widest == LARGEST_HEAD else 2)
    queries, keys = (step, rows) if kernel == "keys" else (rows, step)
    packed = mixed and -(-met // step) * step > 1.125 * met
    return Tile(heads, side, region, kv_region, e, c, queries, keys, packed, warps, stages, precision, long)


def chunk_of(region: int) -> int:
    """Most visits, of ``region`` queries each, that one program of the keys' gradient processes."""
    return max(VISITS, QUERIES // region)


def slots_of(regions: int, topk: int, region: int) -> int:
    """Most chunks over all regions that have more visits than one chunk; chunk + 1 visits make two chunks."""
    chunk = chunk_of(region)
    # A region visits another at most once.
    return 2 * regions * topk // (chunk + 1) if regions > chunk else 0


def power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _fit(tokens: int) -> int:
    # Triton's matrix product needs at least 16 rows.
    return max(16, power_of_two(tokens))
