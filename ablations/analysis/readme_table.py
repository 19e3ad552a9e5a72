"""Tables of all attentions, from the registry and from results: ``python -m ablations table --help``."""

import re
import textwrap
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ablations.analysis import abilities
from ablations.analysis.abilities import Abilities
from ablations.analysis.units import in_words, short
from attention_zoo import InvalidOption, get, names
from attention_zoo.core.base import FAMILIES
from profiling.cases.case import available_impls
from profiling.schema.row import load

ROWS_FROM = "complexity"
GRID, IMPL = 224, "reference"
BEGIN, END = "<!-- attentions: python -m ablations table README.md -->", "<!-- end of attentions -->"
PUBLICATIONS = "<!-- publications: python -m ablations table attention_zoo/attentions/README.md -->"
"""Begins the place of the table of equations instead."""
POWERS = {"1": "HW", "1.33": "(HW)^4/3", "1.5": "(HW)^3/2", "2": "(HW)^2"}


def markdown(results: Path) -> str:
    """Return the table by family, least memory first, and a note on its numbers; what no result tells is empty.

    Raises:
        InvalidOption: no folder of ``results`` holds the sweep.
    """
    rows = _rows(results)
    known = [row for row in rows.sort_values("memory_predicted_bytes").to_dict("records") if row["name"] in names()]
    missing = set(names()) - {row["name"] for row in known}
    learned = abilities.read(results)
    lines = ["| family | name | a query attends to | impls | MACs grow as | MACs | memory | learns | source |"]
    lines.append("|---|---|---|---|---|--:|--:|---|---|")
    cells = [(str(row["name"]), row) for row in known] + [(name, {}) for name in sorted(missing)]
    lines += [_line(*cell, learned) for family in FAMILIES for cell in cells if _family(cell[0]) == family]
    first = rows.iloc[0]
    note = (
        f"At {GRID} x {GRID} tokens (HW = {GRID**2:,}), batch {first['batch']}, dim {first['dim']}, "
        f"{first['num_heads']} heads, {first['dtype']}: MACs of the forward pass, and peak memory of a training step, "
        f'predicted for `impl="{IMPL}"` on {first["device_name"]}. In a family, least memory first. '
        f"Learns: accuracy in % at {', '.join(abilities.HEADLINE)}, mean over seeds, of two blocks at 14 x 14 tokens "
        "with default options (the capability sweep); notebooks/capability.ipynb says which of these count, and how "
        "far seeds differ."
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, 110, break_on_hyphens=False), ""])


def rewrite(page: Path, results: Path) -> bool:
    """Put the table between the two comments of ``page``; returns whether that changed it.

    Raises:
        InvalidOption: ``page`` has no such comments.
    """
    text = page.read_text(encoding="utf-8")
    about_publications = PUBLICATIONS in text
    before, begin, rest = text.partition(PUBLICATIONS if about_publications else BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InvalidOption(f"{page}: no place for the table; put it between {BEGIN} and {END}")
    table = publications() if about_publications else markdown(results)
    new = f"{before}{begin}\n\n{table}\n{END}{after}"
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text


def publications() -> str:
    """The equation of each attention, what its publication leaves open, and where it departs from the authors' code."""
    lines = ["| attention | computes | left open, and chosen here | departs from the authors' code in |"]
    lines.append("|---|---|---|---|")
    for name in names():
        cells = [getattr(get(name), part, "") for part in ("equation", "left_open", "departs")]
        lines.append(f"| `{name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _rows(results: Path) -> pd.DataFrame:
    """The sweep's training steps at the grid, of the first device that has any, one for each attention and n_win."""
    for path in sorted(results.glob(f"*/{ROWS_FROM}.csv")):
        rows = load(path)
        square = (rows["height"] == GRID) & (rows["width"] == GRID)
        rows = rows[square & (rows["mode"] == "forward_backward") & (rows["impl"] == IMPL)]
        if len(rows):
            return rows.drop_duplicates(["name", "n_win"])
    command = f"python run_all.py --only {ROWS_FROM}"
    raise InvalidOption(f"{results}: no results at {GRID} x {GRID}; make them with: {command}")


def _family(name: str) -> str:
    return getattr(get(name), "family", "other")


def _line(name: str, row: Mapping[Hashable, Any], learned: Abilities) -> str:
    macs, memory, n_win, power = (
        None if pd.isna(value) else value
        for value in map(row.get, ("macs_counted", "memory_predicted_bytes", "n_win", "exponent_theory"))
    )
    cells = [
        _family(name), f"`{name}`" + (f", n_win {n_win}" if n_win else ""), getattr(get(name), "attends_to", ""),
        ", ".join(available_impls(name)), POWERS.get(f"{power:.3g}", "") if power else "",
        short(macs) if macs else "", in_words(memory) if memory else "",
        _learns(learned.of(name, {"n_win": n_win} if n_win == "auto" else {})), source(name),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _learns(known: Mapping[str, float]) -> str:
    """Percentages at the tasks of the headline, a dash where one is not known."""
    if not known:
        return ""
    return " / ".join(f"{100 * known[task]:.0f}" if task in known else "-" for task in abilities.HEADLINE)


def source(name: str) -> str:
    """Title and year of an attention's citation, without authors, subtitle and place in the text."""
    result = re.match(r"(?:.*? et al\., )?(.*?\b\d{4})\b", getattr(get(name), "citation", ""))
    return re.sub(r": [^,]*,", ",", result[1]) if result else ""
