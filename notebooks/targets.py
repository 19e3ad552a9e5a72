"""What the fast BRA was meant to reach, and what it reached: a table computed from the bra_speed sweep."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from notebooks.export import publish
from notebooks.limits import MODES
from notebooks.plots import Results, needs, number
from notebooks.speed import DIMS, EIGHT, MEMORY, SETTING, TIME, geometric_mean, shape_words, wide


@dataclass(frozen=True)
class Target:
    """One thing to reach, on one kind of device.

    Attributes:
        device: cpu or cuda.
        who: the contestant.
        against: whom it is compared with.
        least: how many times faster, or smaller, it is to be than that.
        of: whether a geometric mean or each shape is to reach it.
        column: time or memory.
        sides: the grids it is meant for; all if none are named.
        dtype: of the cells.
        batches: of the cells.
    """

    device: str
    who: str
    against: str
    mode: str
    least: float
    of: Literal["mean", "each"] = "each"
    column: str = TIME
    sides: tuple[int, ...] = ()
    dtype: str = "bf16"
    batches: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        what = "as fast" if self.column == TIME else "less memory"
        where = "at " + ", ".join(map(str, self.sides)) if self.sides else "the eight shapes"
        batch = f", batch {' and '.join(map(str, self.batches))}" if self.batches != (1,) else ""
        kind = "geometric mean" if self.of == "mean" else "each"
        return f"{self.who} against {self.against}, {where}{batch}, {self.dtype}, {what}, {kind}"


LARGE, SMALL = (112, 224, 256), (56, 28, 14)
TARGETS = (
    Target("cpu", "sdpa", "reference", "forward", 2.5, "mean", dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward_backward", 4.0, "mean", dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward", 3.0, "mean", MEMORY, dtype="fp32"),
    Target("cpu", "sdpa", "reference", "forward_backward", 8.0, "mean", MEMORY, dtype="fp32"),
    *(Target("cpu", "sdpa", "reference", mode, 1.0, "each", column, dtype="fp32")
      for mode in MODES for column in (TIME, MEMORY)),
    *(Target("cuda", "triton", against, mode, least, column=column, sides=LARGE) for mode in MODES
      for against, least, column in (("reference", 8.0, TIME), ("reference, compiled", 3.0, TIME), ("flex", 1.3, TIME),
                                     ("bound", 1 / 1.3, TIME), ("window", 1 / 1.3, MEMORY))),
    *(Target("cuda", "triton", against, mode, least, sides=SMALL, batches=(1, 128)) for mode in MODES
      for against, least in (("reference", 1.0), ("window", 1 / 1.2))),
)  # fmt: skip


@needs("bra_speed")
def table(results: Results) -> None:
    """Table: every target of this kind of device, what was measured, and the shape that is furthest from it."""
    rows = results.sweep("bra_speed")
    device = rows["device"].iloc[0]
    tables = {column: wide(rows, column) for column in (TIME, MEMORY)}
    lines = [_line(target, tables[target.column]) for target in TARGETS if target.device == device]
    note = (
        "How many times faster, or how many times less memory; below 1: slower, or more. Nothing measured stays empty. "
        f"{rows['device_name'].iloc[0]}."
    )
    publish(pd.DataFrame(lines), f"targets_{device}", note)


def _line(target: Target, values: pd.DataFrame) -> dict[str, str]:
    found = _found(target, values)
    line = {"what": str(target), "mode": MODES[target.mode], "target": f"{number(target.least)}x"}
    if found.empty:
        return line | {"measured": "", "least": "", "at": "", "met": ""}
    reached = geometric_mean(found) if target.of == "mean" else found.min()
    words = {"measured": f"{number(geometric_mean(found))}x (mean of {len(found)})", "least": f"{number(found.min())}x"}
    at = shape_words(found.idxmin()) + (f", batch {found.idxmin()[2]}" if target.batches != (1,) else "")
    return line | words | {"at": at, "met": "yes" if reached >= target.least else "no"}


def _found(target: Target, values: pd.DataFrame) -> pd.Series:
    """The ratios of the shapes that a target is about."""
    if not {target.who, target.against} <= set(values.columns):
        return pd.Series(dtype=float)
    meant = values[list(_meant(target, values))]
    return (meant[target.against].astype(float) / meant[target.who].astype(float)).dropna()


def _meant(target: Target, values: pd.DataFrame) -> Iterator[bool]:
    names = [*SETTING, "height", "width", "dim", "topk"]
    places = zip(*(values.index.get_level_values(name) for name in names), strict=True)
    for mode, dtype, batch, height, width, dim, topk in places:
        one_of_eight = height == width and (height, topk) in EIGHT and dim == DIMS[height]
        setting = mode == target.mode and dtype == target.dtype and batch in target.batches
        yield setting and one_of_eight and (not target.sides or height in target.sides)
