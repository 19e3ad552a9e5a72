"""How BRA's Triton kernels are cut into tiles: the place to tune."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_HEAD = 128
"""Channels per head."""


class Tile(NamedTuple):
    """How a kernel is cut up and what it is compiled for."""

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

    def constants(self) -> tuple[Any, ...]:
        """The ``constexpr`` arguments of every attention kernel, in order."""
        e, c = _fit(self.e), _fit(self.c)
        shape = self.heads, self.side, *self.region, *self.kv_region, self.e, self.c, e, c
        return *shape, self.queries, self.keys, self.packed, self.precision

    def options(self) -> dict[str, int]:
        """What Triton's launcher is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def query_programs(self, q: Tensor) -> int:
        """Programs of a kernel that has one for each tile of queries."""
        return len(q) * self.side**2 * self.heads * -(-self.region[0] * self.region[1] // self.queries)

    def key_programs(self, q: Tensor) -> int:
        """Programs of a kernel that has one for each tile of keys."""
        return len(q) * self.side**2 * self.heads * -(-self.kv_region[0] * self.kv_region[1] // self.keys)

    def parts(self) -> int:
        """Tiles, of all heads, that have a part in the gradient of one factor."""
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
    ("queries", False, 128): (32, 32, 8, 2),
    ("keys", True, 32): (128, 64, 8, 2),
    ("keys", True, 64): (64, 64, 4, 2),
    ("keys", True, 128): (64, 64, 8, 2),
    ("keys", False, 32): (32, 32, 4, 2),
    ("keys", False, 64): (32, 32, 8, 2),
    ("keys", False, 128): (32, 32, 8, 2),
}
"""A program keeps ``rows`` tokens of its own region and walks through the tokens it meets ``step`` at a time.

Chosen as the largest of which nothing, or next to nothing, spills from registers on compute capability 8.0 and 9.0, as
compiled, and whose shared memory an 8.6 has too (99 KiB). Which of these is fastest has not been measured. fp32 takes
smaller ones: its numbers need twice the registers, and in full precision every thread holds whole rows."""


def tile_of(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, heads: int, side: int, topk: int, factor: Tensor | None
) -> Tile:
    """How ``kernel`` (forward, queries: gradients of queries, keys: of keys and values) is cut up."""
    e, c = q.shape[3] // heads, v.shape[3] // heads
    region, kv_region = ((grid.shape[1] // side, grid.shape[2] // side) for grid in (q, k))
    own, met = region[0] * region[1], kv_region[0] * kv_region[1]
    if kernel == "keys":
        own, met = met, own
    widest = next(width for width in (32, 64, LARGEST_HEAD) if max(e, c) <= width)
    most, step, warps, stages = TILES[kernel, q.dtype.itemsize == 2, widest]
    # The gradient of a factor is summed over tiles, so no tile may have two.
    mixed = kernel != "queries" or factor is None
    rows, step = min(most, _fit(own)), min(step, _fit(topk * met if mixed else met))
    if q.dtype.itemsize == 2:
        # Fewer rows need fewer warps; but wide ones need registers, and a Hopper multiplies 64 rows by 4 warps.
        warps = max(warps * rows // most, 4 if rows >= 64 or widest == LARGEST_HEAD else 2)
    queries, keys = (step, rows) if kernel == "keys" else (rows, step)
    packed = mixed and -(-met // step) * step > 1.125 * met
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    precision = "tf32" if tf32 else "ieee"
    return Tile(heads, side, region, kv_region, e, c, queries, keys, packed, warps, stages, precision)


def power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _fit(tokens: int) -> int:
    # Triton multiplies no fewer than 16 rows.
    return max(16, power_of_two(tokens))
