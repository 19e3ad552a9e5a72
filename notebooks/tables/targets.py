"""Targets of the fast BRA, and the measured values: a table computed from the bra_speed sweep.

On CUDA, time is device time of steps replayed from a CUDA graph; steps that cannot be captured are launched from
Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.limits import MODES
from notebooks.lib.plots import Results, needs, number
from notebooks.tables.speed import (
    DEVICE_TIME,
    DIMS,
    EIGHT,
    GRAPH,
    MEMORY,
    SETTING,
    TIME,
    geometric_mean,
    shape_words,
    wide,
)


@dataclass(frozen=True)
class Target:
    """One target on one kind of device.

    Attributes:
        device: cpu or cuda.
        side: the contestant.
        against: its baseline.
        least: required speed-up, or reduction of memory, over the baseline.
        of: whether the geometric mean or each shape must reach it.
        column: wall time, time on the device, or memory.
        sides: the grids it applies to; all if empty.
        dtype: of the cells.
        batches: of the cells.
    """

    device: str
    side: str
    against: str
    mode: str
    least: float
    of: Literal["mean", "each"] = "each"
    column: str = TIME
    sides: tuple[int, ...] = ()
    dtype: str = "bf16"
    batches: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        what = "less memory" if self.column == MEMORY else "as fast"
        where = "at " + ", ".join(map(str, self.sides)) if self.sides else "the eight shapes"
        batch = f", batch {' and '.join(map(str, self.batches))}" if self.batches != (1,) else ""
        kind = "geometric mean" if self.of == "mean" else "each"
        return f"{self.side} against {self.against}, {where}{batch}, {self.dtype}, {what}, {kind}"


LARGE, SMALL = (112, 224, 256), (56, 28, 14)
KERNELS = "triton" + GRAPH
TARGETS = (
    Target("cpu", "sdpa", "reference", "forward", 2.5, "mean", dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward_backward", 4.0, "mean", dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward", 3.0, "mean", MEMORY, dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward_backward", 8.0, "mean", MEMORY, dtype="fp32"),
    *(Target("cpu", "sdpa", "reference", mode, 1.0, "each", column, dtype="fp32")
      for mode in MODES for column in (TIME, MEMORY)),
    *(Target("cuda", side, against, mode, least, column=column, sides=LARGE) for mode in MODES
      for side, against, least, column in (
          (KERNELS, "reference" + GRAPH, 8.0, DEVICE_TIME), (KERNELS, "pre-gathered" + GRAPH, 1 / 1.3, DEVICE_TIME),
          ("triton", "reference, compiled", 3.0, DEVICE_TIME), ("triton", "flex", 1.3, DEVICE_TIME),
          ("triton", "reference", 8.0, TIME), ("triton", "window", 1 / 1.3, MEMORY))),
    *(Target("cuda", KERNELS, against, mode, least, column=DEVICE_TIME, sides=SMALL, batches=(128,)) for mode in MODES
      for against, least in (("reference" + GRAPH, 1.0), ("window" + GRAPH, 1 / 1.2))),
    *(Target("cuda", KERNELS, "reference" + GRAPH, mode, 1.0, column=DEVICE_TIME, sides=SMALL) for mode in MODES),
)  # fmt: skip


@needs("bra_speed")
def table(results: Results) -> None:
    """Table: every target of this kind of device, the measured value, and the shape furthest from the target."""
    rows = results.sweep("bra_speed")
    device = rows["device"].iloc[0]
    tables = {column: wide(rows, column) for column in (TIME, DEVICE_TIME, MEMORY)}
    lines = [_line(target, tables[target.column]) for target in TARGETS if target.device == device]
    note = (
        "How many times faster, or how many times less memory; below 1: slower, or more. Nothing measured stays empty. "
        + ("Time on the device; where no CUDA graph is named and all is eager, wall time. " if device == "cuda" else "")
        + f"{rows['device_name'].iloc[0]}."
    )
    publish(pd.DataFrame(lines), f"targets_{device}", note)


def _line(target: Target, values: pd.DataFrame) -> dict[str, str]:
    result = _found(target, values)
    line = {"what": str(target), "mode": MODES[target.mode], "target": f"{number(target.least)}x"}
    if result.empty:
        return line | {"measured": "", "least": "", "at": "", "met": ""}
    reached = geometric_mean(result) if target.of == "mean" else result.min()
    words = {
        "measured": f"{number(geometric_mean(result))}x (mean of {len(result)})",
        "least": f"{number(result.min())}x",
    }
    at = shape_words(result.idxmin()) + (f", batch {result.idxmin()[2]}" if target.batches != (1,) else "")
    return line | words | {"at": at, "met": "yes" if reached >= target.least else "no"}


def _found(target: Target, values: pd.DataFrame) -> pd.Series:
    """The ratios of the shapes that a target covers."""
    if not {target.side, target.against} <= set(values.columns):
        return pd.Series(dtype=float)
    meant = values[list(_meant(target, values))]
    return (meant[target.against].astype(float) / meant[target.side].astype(float)).dropna()


def _meant(target: Target, values: pd.DataFrame) -> Iterator[bool]:
    names = [*SETTING, "height", "width", "dim", "topk"]
    places = zip(*(values.index.get_level_values(name) for name in names), strict=True)
    for mode, dtype, batch, height, width, dim, topk in places:
        one_of_eight = height == width and (height, topk) in EIGHT and dim == DIMS[height]
        setting = mode == target.mode and dtype == target.dtype and batch in target.batches
        yield setting and one_of_eight and (not target.sides or height in target.sides)
