"""Tables as Markdown and LaTeX files."""

from typing import Any

import pandas as pd

from notebooks.lib.plots import number, say, tables_folder


def publish(frame: pd.DataFrame, name: str, note: str) -> None:
    """Show a table of texts and write it as Markdown and as LaTeX (booktabs)."""
    text = markdown(frame) + f"\n{note}\n"
    if folder := tables_folder():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        (folder / f"{name}.tex").write_text(latex(frame, note), encoding="utf-8")
    say(text)


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table, numbers right-aligned and words left-aligned."""
    rule = ["---:" if right else "---" for right in _numbers(frame)]
    lines = [list(frame.columns), rule, *frame.astype(str).to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _numbers(frame: pd.DataFrame) -> list[bool]:
    """For each column, whether most of its cells are numeric: numbers, intervals, sizes such as 7 x 7."""
    texts = [column.astype(str)[column.astype(str).str.strip() != ""] for _, column in frame.items()]
    return [len(text) > 0 and bool(text.str.fullmatch(r"[\d\s.,:%+/x()\[\]-]+").mean() > 0.5) for text in texts]


def latex(frame: pd.DataFrame, note: str) -> str:
    """The frame as a booktabs tabular with its note as caption."""
    body = "\n".join(" & ".join(map(_escape, line)) + r" \\" for line in frame.astype(str).to_numpy().tolist())
    head = " & ".join(map(_escape, frame.columns))
    sides = "".join("r" if right else "l" for right in _numbers(frame))
    return (
        "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n\\caption{" + _escape(note) + "}\n"
        f"\\begin{{tabular}}{{{sides}}}\n\\toprule\n" + head + " \\\\\n\\midrule\n" + body
        + "\n\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )  # fmt: skip


def _escape(text: str) -> str:
    for character in ("\\", "%", "_", "&", "#"):
        text = text.replace(character, r"\textbackslash{}" if character == "\\" else "\\" + character)
    return text


def scaled(count: Any, unit: float, digits: int = 3) -> str:
    """A count in ``unit``, such as millions; empty if missing."""
    return "" if pd.isna(count) else f"{count / unit:,.{digits}f}"


def latency(rows: pd.DataFrame) -> str:
    """Median and interval in ms of rows of one case; the status if none was timed, empty if there are no rows."""
    if rows["latency_p50_ms"].isna().all():
        return str(rows["status"].iloc[0]) if len(rows) else ""
    low, high = rows["latency_low_ms"].min(), rows["latency_high_ms"].max()
    interval = "" if pd.isna(low) or pd.isna(high) else f" [{number(low)}, {number(high)}]"
    return number(rows["latency_p50_ms"].median()) + interval
