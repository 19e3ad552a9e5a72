"""A table of typed, checked columns that is kept as CSV. No torch here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandas.api.types import is_scalar


class SchemaError(ValueError):
    """A table is not of this schema; the message says where."""


class Schema:
    """Reads, checks and types tables of one model.

    Attributes:
        columns: all of them, in order.
        key: those that identify a row: the columns before ``outcome``.
        kinds: the type of each column.
        renamed: columns of older files and what they are called now; ``python -m ablations convert`` uses it.
        dropped: columns of older files that are no more.
    """

    def __init__(
        self,
        model: type[pa.DataFrameModel],
        outcome: str,
        renamed: Mapping[str, str] | None = None,
        dropped: Sequence[str] = (),
    ) -> None:
        self.model, self.renamed, self.dropped = model, dict(renamed or {}), tuple(dropped)
        columns = model.to_schema().columns
        self.columns: tuple[str, ...] = tuple(columns)
        self.key: tuple[str, ...] = self.columns[: self.columns.index(outcome)]
        self.kinds: dict[str, str] = {name: str(column.dtype).lower() for name, column in columns.items()}

    def validate(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """Convert rows to a table of this schema; SchemaError if they violate it."""
        unknown = {name for row in rows for name in row} - set(self.columns)
        if unknown:
            raise SchemaError(f"not columns of this schema: {', '.join(sorted(unknown))}")
        texts = [{name: as_text(row.get(name)) for name in self.columns} for row in rows]
        return self._typed(pd.DataFrame(texts, columns=list(self.columns)), "row")

    def load(self, *paths: str | Path) -> pd.DataFrame:
        """Read result files into one table; SchemaError if a file is of another schema."""
        tables = [self._typed(self._read(Path(path)), str(path)) for path in paths]
        if not tables:
            return self._typed(pd.DataFrame(columns=list(self.columns), dtype=str), "")
        return pd.concat(tables, ignore_index=True)

    def _read(self, path: Path) -> pd.DataFrame:
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as problem:
            raise SchemaError(f"{path} is not a results file: {problem}") from problem
        if {*self.renamed, *self.dropped} & set(table.columns):
            raise SchemaError(
                f"{path} holds columns of an older schema; convert it with: python -m ablations convert {path.parent}"
            )
        if tuple(table.columns) != self.columns:
            odd = sorted(set(table.columns) ^ set(self.columns))
            differ = ", ".join(odd) or "their order"
            raise SchemaError(f"{path} holds a CSV of another schema (columns that differ: {differ})")
        return table

    def _typed(self, table: pd.DataFrame, where: str) -> pd.DataFrame:
        typed = table.replace("", pd.NA)
        for name, kind in self.kinds.items():
            try:
                typed[name] = _converted(typed[name], kind)
            except (KeyError, TypeError, ValueError) as problem:
                raise SchemaError(f"{where}: column {name} holds what is no {kind}: {problem}") from problem
        try:
            return self.model.validate(typed)
        except (pa.errors.SchemaError, pa.errors.SchemaErrors) as problem:
            first_line = " ".join(str(problem).split())[:300]
            raise SchemaError(f"{where}: {first_line}") from problem


def missing(value: Any) -> bool:
    """Whether a cell has no value."""
    return value is None or value is pd.NA or value != value


def as_text(value: Any) -> str:
    """The text of a value in a CSV cell; keys are compared in this form."""
    if value is None or (is_scalar(value) and pd.isna(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    return " ".join(str(value).replace("\0", " ").encode(errors="replace").decode().split())


def _converted(column: pd.Series, kind: str) -> pd.Series:
    """Convert text to the column's type; invalid text raises an error."""
    if kind == "boolean":
        return column.map({"True": True, "False": False}.__getitem__, na_action="ignore").astype("boolean")
    if kind == "int64":
        # Via a list: pandas would convert a column with gaps through float and lose digits.
        whole = [pd.NA if missing(value) else int(value) for value in column.tolist()]
        return pd.Series(pd.array(whole, dtype="Int64"), index=column.index)
    return column.map(float, na_action="ignore").astype("float64") if kind == "float64" else column
