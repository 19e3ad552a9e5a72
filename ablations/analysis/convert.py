"""Convert result files of an older schema, in place: ``python -m ablations convert DIR``.

Columns are renamed and dropped according to ``RENAMED`` and ``DROPPED`` of :mod:`profiling.schema.row`. A missing
column is added empty. Cells are copied as text, so that no number changes; only ``macs_agree``, which
follows from other columns, is stated anew by the present rule.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from profiling.schema.row import COLUMNS, DROPPED, KEY, RENAMED, SchemaError, agree, load
from profiling.schema.table import as_text


def convert(path: Path) -> bool:
    """Convert one file; returns whether it was of an older schema.

    The new file is validated by the schema, then replaces the old one atomically.

    Raises:
        SchemaError: it is not a table in UTF-8, holds other columns too, or a value that the schema does not allow.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
    except (csv.Error, UnicodeDecodeError) as problem:
        raise SchemaError(f"{path} is not a results file: {problem}") from problem
    names = [RENAMED.get(name, name) for name in header]
    if unknown := sorted(set(names) - {*COLUMNS, *DROPPED}):
        raise SchemaError(f"{path} holds columns that no schema of this suite had: {', '.join(unknown)}")
    try:
        converted = [_converted(dict(zip(names, row, strict=True))) for row in rows]
    except ValueError as problem:
        raise SchemaError(f"{path}: {problem}") from problem
    if tuple(header) == COLUMNS and converted == rows:
        return False
    concurrent = path.with_suffix(".tmp")
    try:
        with concurrent.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(converted)
            file.flush()
            os.fsync(file.fileno())
        load(concurrent)
        concurrent.replace(path)
    finally:
        concurrent.unlink(missing_ok=True)
    return True


def _converted(cells: dict[str, str]) -> list[str]:
    counts = (cells.get(name) or None for name in ("macs_analytic", "macs_counted", "macs_fvcore"))
    cells |= {"macs_agree": as_text(agree(*counts))}
    return [cells.get(name, "") for name in COLUMNS]


def result_files(path: Path) -> Iterator[Path]:
    """Yield a results CSV, or those in a folder and its subfolders, of any schema version."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.csv")):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            if lines.readline().startswith(f"{KEY[0]},{KEY[1]},"):
                yield file
