"""A comparison of two runs as tables in a terminal, as JSON and as Markdown."""

from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ablations.analysis.compare import ONE_PROCESS, Comparison

CLASSES = ("FASTER", "SAME", "SLOWER", "UNCLEAR")


def show(result: Comparison, console: Console) -> None:
    """Print the comparison as tables."""
    if result.environment:
        table = Table("differs", "A", "B", title="Environment")
        for column, (left, right) in result.environment.items():
            table.add_row(column, left, right)
        console.print(table)
    noteworthy = _noteworthy(result)
    if len(noteworthy):
        columns = "verdict", "B / A", "interval", Column("cell", overflow="fold")
        table = Table(*columns, title="Cells that differ, or may")
        for cell in noteworthy.itertuples():
            ratio = "" if pd.isna(cell.ratio) else f"{cell.ratio:.2f}"
            interval = "" if pd.isna(cell.ratio) else f"{cell.ratio_low:.2f} to {cell.ratio_high:.2f}"
            text = escape("; ".join(filter(None, [cell.case, cell.changes])))
            table.add_row(cell.verdict or cell.status, ratio, interval, text)
        console.print(table)
    for title, cases in (("Only in A", result.missing), ("Only in B", result.new)):
        if cases:
            listed = [f"  {case}" for case in cases]
            console.print(f"{title} ({len(cases)}):", *listed, sep="\n", highlight=False, markup=False)
    console.print(_counts(result), highlight=False)


def as_json(result: Comparison) -> dict[str, Any]:
    """The comparison for scripts: every cell; a number that was not obtained is null."""
    cells = result.cells.astype(object).where(result.cells.notna(), None)
    environment = {column: {"a": left, "b": right} for column, (left, right) in result.environment.items()}
    return {
        "worse": result.worse, "cells": cells.to_dict("records"), "environment": environment,
        "only_in_a": result.missing, "only_in_b": result.new,
    }  # fmt: skip


def markdown(result: Comparison) -> str:
    """The comparison for a pull request."""
    lines = [_counts(result), ""]
    if result.environment:
        lines += ["| environment | A | B |", "|---|---|---|"]
        lines += [f"| {name} | {left} | {right} |" for name, (left, right) in result.environment.items()] + [""]
    noteworthy = _noteworthy(result)
    if len(noteworthy):
        lines += ["| verdict | B / A | A ms | B ms | cell |", "|---|--:|--:|--:|---|"]
        for cell in noteworthy.itertuples():
            numbers = ["" if pd.isna(n) else f"{n:.3g}" for n in (cell.ratio, cell.a_ms, cell.b_ms)]
            text = "; ".join(filter(None, [cell.case, cell.changes]))
            lines.append(f"| {cell.verdict or cell.status} | {' | '.join(numbers)} | {text} |")
        lines.append("")
    for title, cases in (("Only in A", result.missing), ("Only in B", result.new)):
        lines += [f"{title}: {', '.join(cases)}", ""] if cases else []
    return "\n".join(lines)


def _noteworthy(result: Comparison) -> pd.DataFrame:
    cells = result.cells
    chosen = cells[~cells["verdict"].isin(["", "SAME"]) | (cells["status"] != "") | (cells["changes"] != "")]
    return chosen.sort_values("ratio", ascending=False)


def _counts(result: Comparison) -> str:
    cells = result.cells
    counts = cells["verdict"].value_counts()
    message = ", ".join(f"{counts.get(name, 0)} {name}" for name in CLASSES)
    if untimed := len(cells) - sum(counts.get(name, 0) for name in CLASSES):
        message += f", {untimed} without a time on both sides"
    line = f"{len(cells)} cells in both: {message}; {int(cells['got_worse'].sum())} with a worse status."
    if single := int((cells["processes"] == 1).sum()):
        line += (
            f" {single} were measured by one process on a side, so that only a change of over {ONE_PROCESS.effect:.0%} "
            "counts; --replicates 3 or more for both runs says more, compare --interleave most."
        )
    return line
