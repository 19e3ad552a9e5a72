"""Two runs side by side: what got faster or slower, by intervals; what else changed, exactly.

A cell that several processes measured is taken at their mean and interval (``replicates``). Where they do not agree,
it is faster or slower only if all of one run lie on one side of all of the other, and are too many for chance. With one
process, the interval goes from the lower to the upper quartile of its samples, which says nothing of what differs
between processes: expect more AMBIGUOUS, and false alarms on a busy machine.

Two runs on the same device with the same PyTorch are compared at the same speed of the machine, as the yardsticks
beside every cell tell it; that speed is shown with the environment. Of folders that hold several devices, each is
compared with itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attention_zoo import InvalidOption
from profiling.replicates import YARDSTICKS, at_speed, interval, settled, speed
from profiling.rows import KEY, STATUSES, load

TOLERANCE = 0.057
"""A smaller change of the median, as a share, is no change.

If both scatter alike, as little as 1 % of the cells that did not change lie beyond it on either side, with 95 % of
those that take 10 % longer: 1.1 ** (2.33 / (2.33 + 1.64)), where 2.33 and 1.64 are the normal quantiles.
"""
CHANCE = 0.02
"""How likely it may be that processes which do not agree, put in any order, come to lie run by run."""
CASE = [column for column in KEY if column not in ("device_name", "replicate", "seed")]
ENVIRONMENT = ["device_name", "threads", "driver", "torch", "cuda", "triton", "python", "commit", "dirty"]
EXACT = ["impl", "sdpa_backend", "freed_memory", "params", "macs_analytic", "macs_counted", "macs_fvcore",
         "memory_predicted_bytes", "memory_peak_bytes"]  # fmt: skip
BARE = ("sweep", "kind", "name", "impl_requested", "mode", "dtype", "device")
VERDICTS = ("FASTER", "SAME", "SLOWER", "AMBIGUOUS")
WORSE = {status: rank for rank, status in enumerate(STATUSES)}


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and what not.

    Attributes:
        cells: one row per case in both runs: ``case``, ``verdict`` (empty without two times), ``ratio`` of the
            times B / A, ``a_ms``, ``b_ms``, ``settled`` where the processes of both runs agree (``replicates``),
            ``status`` where it changed, ``changes`` of exact columns.
        environment: per differing column, its values in A and in B.
        missing: cases only in A.
        new: cases only in B.
    """

    cells: pd.DataFrame
    environment: dict[str, tuple[str, str]]
    missing: list[str]
    new: list[str]

    @property
    def worse(self) -> bool:
        """Whether a cell got slower or its status got worse."""
        return bool((self.cells["verdict"] == "SLOWER").any() or self.cells["got_worse"].any())


def read(path: Path) -> pd.DataFrame:
    """All rows of a CSV, or of every sweep's CSV in a folder and the folders in it; InvalidOption if there are none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.csv") if _is_sweep(p))
    if not files:
        raise InvalidOption(f"{path}: no results there; give a results folder or a CSV that run_all.py wrote")
    return load(*files)


def compare(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    """Compare run B with run A: device by device, or the only one of A with the only one of B.

    Raises:
        InvalidOption: neither is there; the message lists the devices.
    """
    devices = [sorted(rows["device_name"].unique()) for rows in (a, b)]
    shared = sorted(set(devices[0]) & set(devices[1]))
    if not shared and max(map(len, devices)) > 1:
        raise InvalidOption(
            f"no device is in both: A has {' and '.join(devices[0])}, B has {' and '.join(devices[1])}; "
            "give the folder of one device on either side"
        )
    if not shared:
        return _compare(a, b)
    found = [_compare(*(rows[rows["device_name"] == name] for rows in (a, b))) for name in shared]
    if len(shared) > 1:
        found = list(map(_of_device, shared, found))
    environment = {what: sides for part in found for what, sides in part.environment.items()}
    if devices[0] != devices[1]:
        told = (", ".join(name if name in shared else f"{name} (left out)" for name in side) for side in devices)
        environment["device_name"] = next(told), next(told)
    return Comparison(
        pd.concat([part.cells for part in found], ignore_index=True),
        environment,
        [case for part in found for case in part.missing],
        [case for part in found for case in part.new],
    )


def _of_device(name: str, found: Comparison) -> Comparison:
    """The same with the device named in every case."""
    return Comparison(
        found.cells.assign(case=f"{name}: " + found.cells["case"]),
        {f"{name}: {what}": sides for what, sides in found.environment.items()},
        [f"{name}: {case}" for case in found.missing],
        [f"{name}: {case}" for case in found.new],
    )


def _compare(a: pd.DataFrame, b: pd.DataFrame) -> Comparison:
    shared = set(a["sweep"]) & set(b["sweep"])
    speeds = _speed(*(rows[rows["sweep"].isin(shared)] for rows in (a, b)))
    if speeds:
        # By what both runs took: an older one has no yardstick of memory.
        taken = speeds[0].notna() & speeds[1].notna()
        a, b = (at_speed(rows, run.where(taken), speeds[0]) for rows, run in zip((a, b), speeds, strict=True))
    one, two = _by_case(a), _by_case(b)
    both = [case for case in one.index if case in two.index]
    cells = pd.DataFrame(
        [_cell(case, one.loc[case], two.loc[case]) for case in both],
        columns=["case", "verdict", "ratio", "a_ms", "b_ms", "settled", "status", "got_worse", "changes"],
    )
    return Comparison(
        cells,
        _environment(a, b) | _told(speeds),
        [case for case in one.index if case not in two.index],
        [case for case in two.index if case not in one.index],
    )


def verdict(a: Sequence[float], b: Sequence[float]) -> str:
    """FASTER, SAME, SLOWER or AMBIGUOUS, from the low, middle and high time of A and B."""
    ratio = b[1] / a[1]
    if max(ratio, 1 / ratio) <= 1 + TOLERANCE:
        return "SAME"
    if ratio > 1:
        return "SLOWER" if b[0] > a[2] else "AMBIGUOUS"
    return "FASTER" if b[2] < a[0] else "AMBIGUOUS"


def show(found: Comparison, console: Console) -> None:
    """Print the comparison as tables."""
    if found.environment:
        table = Table("differs", "A", "B", title="Environment")
        for column, (left, right) in found.environment.items():
            table.add_row(column, left, right)
        console.print(table)
    noteworthy = _noteworthy(found)
    if len(noteworthy):
        table = Table("verdict", "B / A", "cell", title="Cells that differ")
        for cell in noteworthy.itertuples():
            ratio = "" if pd.isna(cell.ratio) else f"{cell.ratio:.2f}"
            text = escape("; ".join(filter(None, [cell.case, cell.changes])))
            table.add_row(cell.verdict or cell.status, ratio, text)
        console.print(table)
    for title, cases in (("Only in A", found.missing), ("Only in B", found.new)):
        if cases:
            listed = [f"  {case}" for case in cases]
            console.print(f"{title} ({len(cases)}):", *listed, sep="\n", highlight=False, markup=False)
    console.print(_counts(found), highlight=False)


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison for scripts: every cell; a number that was not obtained is null."""
    cells = found.cells.astype(object).where(found.cells.notna(), None)
    environment = {column: {"a": left, "b": right} for column, (left, right) in found.environment.items()}
    return {
        "worse": found.worse, "cells": cells.to_dict("records"), "environment": environment,
        "only_in_a": found.missing, "only_in_b": found.new,
    }  # fmt: skip


def markdown(found: Comparison) -> str:
    """The comparison for a pull request."""
    lines = [_counts(found), ""]
    if found.environment:
        lines += ["| environment | A | B |", "|---|---|---|"]
        lines += [f"| {name} | {left} | {right} |" for name, (left, right) in found.environment.items()] + [""]
    noteworthy = _noteworthy(found)
    if len(noteworthy):
        lines += ["| verdict | B / A | A ms | B ms | cell |", "|---|--:|--:|--:|---|"]
        for cell in noteworthy.itertuples():
            numbers = ["" if pd.isna(n) else f"{n:.3g}" for n in (cell.ratio, cell.a_ms, cell.b_ms)]
            text = "; ".join(filter(None, [cell.case, cell.changes]))
            lines.append(f"| {cell.verdict or cell.status} | {' | '.join(numbers)} | {text} |")
        lines.append("")
    for title, cases in (("Only in A", found.missing), ("Only in B", found.new)):
        lines += [f"{title}: {', '.join(cases)}", ""] if cases else []
    return "\n".join(lines)


def _speed(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.Series, pd.Series] | None:
    """The yardsticks of both runs in ms; None if it is not the same work on the same device, or there is none."""
    sides = [rows.dropna(subset="yardstick_ms") for rows in (a, b)]
    if any(side.empty for side in sides) or pd.concat(sides)[["device_name", "torch"]].drop_duplicates().shape[0] > 1:
        return None
    return speed(sides[0]), speed(sides[1])


def _told(speeds: tuple[pd.Series, pd.Series] | None) -> dict[str, tuple[str, str]]:
    if speeds is None:
        return {}
    told = {column: tuple(f"{side[column]:.3g}" for side in speeds) for column in YARDSTICKS}
    return {
        column: (one, f"{two}, allowed for")
        for column, (one, two) in told.items()
        if one != two and "nan" not in (one, two)
    }


def _by_case(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case, over its replicates: interval, whether it is settled, worst status, exact columns."""
    names = [_named(values) for values in rows[CASE].itertuples(index=False, name=None)]
    rows = rows.assign(case=names, rank=rows["status"].map(WORSE))
    groups = rows.groupby("case", sort=False)
    # As objects: else a row of it, taken out, would turn whole numbers into floats.
    found = groups.agg({"rank": "max"} | {column: "first" for column in EXACT}).astype(object)
    found["interval"] = pd.Series({case: _interval(group) for case, group in groups}, dtype=object)
    found["medians"] = groups["latency_p50_ms"].agg(lambda medians: list(medians.dropna()))
    found["settled"] = found["medians"].map(settled)
    return found


def _tells(a: pd.Series, b: pd.Series) -> bool:
    """Whether two times of a case can be held against each other."""
    if _shown(a["freed_memory"]) != _shown(b["freed_memory"]):
        return False
    one, two = a["medians"], b["medians"]
    if (a["settled"] and b["settled"]) or min(len(one), len(two)) < 2:
        return True
    apart = max(one) < min(two) or max(two) < min(one)
    return apart and 2 / math.comb(len(one) + len(two), len(one)) <= CHANCE


def _interval(rows: pd.DataFrame) -> tuple[float, float, float] | None:
    """Low, middle and high time of one case in ms; None if it was never timed."""
    timed = rows.dropna(subset="latency_p50_ms")
    if timed.empty:
        return None
    if len(timed) == 1:
        low, middle, high = (float(timed[f"latency_{q}_ms"].iloc[0]) for q in ("p25", "p50", "p75"))
        return low, middle, high
    return interval([float(median) for median in timed["latency_p50_ms"]])


def _named(values: tuple[object, ...]) -> str:
    """A case in words: its key, without what is empty or the default."""
    told = [(c, v) for c, v in zip(CASE, values, strict=True) if not (pd.isna(v) or v is False or v == "")]
    return " ".join(str(v) if c in BARE else f"{c}={v}" for c, v in told if (c, v) != ("batch", 1))


def _cell(case: str, a: pd.Series, b: pd.Series) -> tuple[object, ...]:
    left, right = a["interval"], b["interval"]
    timed = left is not None and right is not None
    changes = [f"{c}: {_shown(a[c])} -> {_shown(b[c])}" for c in EXACT if _shown(a[c]) != _shown(b[c])]
    status = "" if a["rank"] == b["rank"] else f"{STATUSES[int(a['rank'])]} -> {STATUSES[int(b['rank'])]}"
    found = verdict(left, right) if timed else ""
    if found not in ("", "SAME") and not _tells(a, b):
        found = "AMBIGUOUS"
    return (
        case, found, right[1] / left[1] if timed else None,
        left and left[1], right and right[1], bool(a["settled"] and b["settled"]),
        status, bool(b["rank"] > a["rank"]), "; ".join(changes),
    )  # fmt: skip


def _environment(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[str, str]]:
    values = {c: tuple(", ".join(sorted({_shown(v) for v in side[c]})) for side in (a, b)) for c in ENVIRONMENT}
    return {column: (left, right) for column, (left, right) in values.items() if left != right}


def _noteworthy(found: Comparison) -> pd.DataFrame:
    cells = found.cells
    chosen = cells[~cells["verdict"].isin(["", "SAME"]) | (cells["status"] != "") | (cells["changes"] != "")]
    return chosen.sort_values("ratio", ascending=False)


def _counts(found: Comparison) -> str:
    cells = found.cells
    counts = cells["verdict"].value_counts()
    told = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    line = f"{len(cells)} cells in both: {told}; {int(cells['got_worse'].sum())} with a worse status."
    if loose := int((~cells["settled"].astype(bool) & (cells["verdict"] != "")).sum()):
        line += f" {loose} are not settled: fewer than three processes measured them, or these do not agree."
    return line


def _shown(value: object) -> str:
    return "none" if pd.isna(value) else str(value)


def _is_sweep(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(errors="replace") as file:
        return file.readline().startswith(f"{KEY[0]},{KEY[1]},")
