"""One page of everything in a results folder: ``python -m notebooks.report results/<device>`` writes report.html.

It also writes the page's figures and tables into ``figures`` and ``tables`` beside it.

The page is one file without scripts, and opens offline. It needs the ``notebooks`` extra: matplotlib, seaborn, Jinja.
"""

import base64
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from notebooks.figures import (
    bra_options,
    capability,
    capability_costs,
    cost_split,
    crossover,
    curves,
    latency,
    pareto,
    speed_figure,
)
from notebooks.lib import limits
from notebooks.lib.plots import Results, kept, trained
from notebooks.tables import (
    break_even,
    complexity,
    growth,
    precision,
    prediction,
    published,
    speed,
    stl,
    targets,
    trainings,
)
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import SchemaError, holds_costs
from profiling.schema.row import load as load_rows

NAME = "report.html"
USAGE = """usage: python -m notebooks.report results/<device>

Write report.html into this folder, from the CSVs in it."""
DPI, CSS_PIXELS_PER_INCH = 150, 84
STEP = 15
"""Between the levels of a colour's channels in a page's pictures; 255 is a multiple, so white stays white."""
FACTS = ("device_name", "threads", "driver", "torch", "cuda", "triton", "python")
"""Columns with the device and software of the measurements."""
Step = Callable[[Results], Any]


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, the question it answers, its figures and tables, its findings."""

    anchor: str
    question: str
    shown: Sequence[Step]
    findings: Sequence[Callable[[Results], list[str]]] = field(default=())


BOTH = ("forward", "forward_backward")
SECTIONS = (
    Section("memory", "Which attention fits at my resolution?",
            [*(partial(curves.figure, mode=mode) for mode in BOTH), limits.limits, prediction.table],
            [limits.findings, prediction.findings]),
    Section("latency", "Which attention is fast at my resolution?",
            [latency.figure, latency.launches, precision.table], [latency.findings, precision.findings]),
    Section("break-even", "From where on does BRA pay?", [crossover.figure, crossover.table], [crossover.findings]),
    Section("pareto", "Which attention is not beaten?",
            [partial(show, mode=mode) for mode in BOTH for show in (pareto.figure, pareto.table)], [pareto.findings]),
    Section("bra", "What do topk, the number of regions and kv downsampling buy?",
            [bra_options.topk_maps, bra_options.kv_curves, bra_options.kv_maps, cost_split.figure],
            [bra_options.findings, cost_split.findings]),
    Section("capability", "What does a cheaper attention lose?",
            [capability.heat_map, trainings.tasks, capability_costs.pareto, capability_costs.topk, trainings.transfer,
             trainings.options],
            [capability.findings, capability_costs.findings]),
    Section("speed", "How much faster than as published is each implementation of BRA?",
            [speed_figure.figure, *(partial(show, mode=mode) for mode in BOTH for show in (speed.speed_table,
             speed.memory_table)), break_even.table, targets.table], [speed.findings]),
    Section("complexity", "What does each attention cost on paper?",
            [published.models, complexity.attentions, growth.table, stl.table],
            [complexity.findings, growth.findings]),
    Section("failed", "Which cells failed, and why?", [limits.failures]),
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write the report of the folder given; returns the exit status: 0, or 2 with one line if the input is wrong."""
    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print(write(Path(arguments[0])))
    except (FileNotFoundError, SchemaError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def write(folder: Path) -> Path:
    """Write report.html into a device's folder of results; returns its path.

    Raises:
        FileNotFoundError: there is no sweep's CSV in ``folder``.
        SchemaError: a CSV there is of another schema.
    """
    files = sorted(path for path in folder.glob("*.csv") if holds_costs(path) and path.name != "recommend.csv")
    if not files:
        raise FileNotFoundError(f"{folder} holds no results of a sweep; `python run_all.py` makes results/<device>")
    path = folder / NAME
    path.write_text(page(load_rows(*files), [file.name for file in files], folder), encoding="utf-8")
    return path


def page(rows: pd.DataFrame, files: list[str], folder: Path) -> str:
    """The page as HTML, from the rows of one device and the names of their files.

    Args:
        folder: where figures and tables are written.
    """
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    started = rows["started_at"].dropna().astype(str).str[:10]
    results = Results(aggregate_replicates(rows), trained(folder))
    # Drawing takes seconds per figure, so sections are drawn in parallel.
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        sections = list(pool.map(partial(_rendered, results=results, folder=folder), range(len(SECTIONS))))
    said: set[str] = set()
    for section in sections:
        # Report each missing sweep once.
        section["parts"] = [part for part in section["parts"] if part not in said]
        said.update(section["parts"])
    return jinja.get_template("report.html.jinja").render(
        device=" and ".join(rows["device_name"].unique()),
        dates=" to ".join(sorted({started.min(), started.max()})) if len(started) else "date not recorded",
        cells=len(rows),
        explorer=(folder.parent / "explorer.html").exists(),
        sections=[section for section in sections if section["parts"] or section["findings"]],
        facts=list(_facts(rows)),
        statuses=sorted(rows["status"].unique(), key=lambda status: (status != "ok", status)),
        sweeps=list(_sweeps(rows, files)),
    )


def _rendered(number: int, results: Results, folder: Path) -> dict[str, Any]:
    section = SECTIONS[number]
    with kept(folder) as shown:
        for show in section.shown:
            show(results)
    with kept():
        findings = [sentence for find in section.findings for sentence in find(results)]
    parts = [_image(part, folder) if isinstance(part, Figure) else _html(part) for part in dict.fromkeys(shown)]
    return {"anchor": section.anchor, "question": section.question, "findings": findings, "parts": parts}


def _html(text: str) -> Markup:
    """Markdown as HTML; each table has a frame that scrolls in a narrow window."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return Markup(html.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>"))


def _image(fig: Figure, folder: Path) -> Markup:
    """A figure as an image within the page, and as a file; its title is the image's alt text."""
    drawn, file = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, dpi=DPI, bbox_inches="tight", pad_inches=0.12, facecolor="white")
    path = folder / "figures" / f"{fig.get_label()}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.getvalue())
    # Half the size, and lines stay sharp. A palette made for the picture would change the colours of small marks.
    few = Image.open(drawn).convert("RGB").point([round(level / STEP) * STEP for level in range(256)] * 3)
    few.save(file, "WEBP", lossless=True)
    data = base64.b64encode(file.getvalue()).decode()
    width = round(fig.get_size_inches()[0] * CSS_PIXELS_PER_INCH)
    text = '<figure><img alt="{}" width="{}" src="data:image/webp;base64,{}"></figure>'
    return Markup(text).format(fig.get_suptitle(), width, data)


def _facts(rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Device and software of the measurements: name and value, where recorded."""
    for column in FACTS:
        if values := [str(value) for value in rows[column].dropna().unique()]:
            yield column.replace("_", " "), ", ".join(values)
    changed = set(rows.loc[rows["dirty"].fillna(False).astype(bool), "commit"].dropna())
    commits = [
        f"{commit} (with changes)" if commit in changed else commit for commit in rows["commit"].dropna().unique()
    ]
    yield "commit", ", ".join(commits) or "not recorded"
    yield "time taken by the cells", f"{rows['cell_seconds'].sum():,.0f} s"


def _sweeps(rows: pd.DataFrame, files: list[str]) -> Iterator[dict[str, Any]]:
    """Each file with its cells by status and the days it was measured on."""
    for name in files:
        of_sweep = rows[rows["sweep"] == name.removesuffix(".csv")]
        days = of_sweep["started_at"].dropna().astype(str).str[:10]
        yield {
            "file": name, "counts": of_sweep["status"].value_counts().to_dict(),
            "days": " to ".join(sorted({days.min(), days.max()})) if len(days) else "",
        }  # fmt: skip
