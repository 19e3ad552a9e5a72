"""Plot style, input and output of every notebook: load results, save figures.

Environment variables, all optional; relative paths start at the repository's root. Input: ATTENTION_RESULTS, the
folder of results, and ATTENTION_DEVICE, one of its folders. Output: ATTENTION_FIGURES and ATTENTION_TABLES; the
defaults are ``figures`` and ``tables`` in the folder of the loaded device.
"""

import contextlib
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from profiling.schema.capability import load as load_trained
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import SchemaError, holds_costs
from profiling.schema.row import load as load_rows

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30
INK, FAINT = "#222222", "#6b6b6b"

# After Okabe and Ito: a hue per family, from dark to light within it. Marks tell apart what a hue does not.
FAMILIES: dict[str, dict[str, tuple[str, str]]] = {
    "full": {"full": ("#D55E00", "o"), "lepe": ("#F0875A", "s")},
    "local": {
        "pseudo_conv": ("#00412F", "P"), "window": ("#00704F", "^"), "shifted_window": ("#009E73", "<"),
        "cosine_window": ("#4DBD99", ">"), "neighborhood": ("#8FD6BF", "H"),
    },
    "axial": {
        "axial": ("#7A2C5A", "v"), "criss_cross": ("#A84A80", ">"), "cross_shaped": ("#CC79A7", "p"),
        "manhattan": ("#E3B1CC", "d"),
    },
    "pooled": {
        "pooled": ("#8A5A00", "s"), "spatially_separable": ("#B87A00", "8"), "aggregated": ("#E69F00", "D"),
        "super_token": ("#F2C766", "o"),
    },
    "sampled": {"dilated": ("#6B6A00", "h"), "block_grid": ("#A3A000", "P"), "deformable": ("#D9D334", "v")},
    "routed": {"bra": ("#0072B2", "D"), "quadtree": ("#56B4E9", "s")},
    "linear": {
        "linear": ("#3A3A3A", "^"), "focused_linear": ("#6A6A6A", "o"), "relu_linear": ("#8F8F8F", "p"),
        "agent": ("#B5B5B5", "<"),
    },
    "channel": {"cross_covariance": ("#000000", "s")},
}  # fmt: skip
"""Colour and marker of the zoo's attentions; a name not listed here takes one of OTHERS, as a plugin's does."""
STYLES = {name: pair for members in FAMILIES.values() for name, pair in members.items()}
OTHERS = [(colour, marker) for colour in ("#5E3C99", "#8E6BBF", "#4B0082", "#A05195") for marker in "D<>pHd8"]
DASHES = ("-", "--", ":", "-.")
VARIANTS = ("impl_requested", "compiled", "cuda_graph", "deterministic", "dtype", "batch", "dim", "num_heads", "n_win",
            "topk")  # fmt: skip
"""Columns that split one attention's rows into several lines if their values differ."""
SETTING = [column for column in VARIANTS if column not in ("n_win", "topk")]
"""VARIANTS without the options of BRA."""
SHAPE = ("dtype", "batch", "dim", "num_heads", "deterministic")
"""VARIANTS that define what is computed, not which code computes it."""
SHARED = {"impl_requested": "impl", "dtype": "", "batch": "batch", "dim": "dim", "n_win": "n_win", "topk": "topk",
          "window_size": "window_size", "torch": "PyTorch"}  # fmt: skip
"""Columns that a caption states if all rows share the value, and their labels."""
_loaded: list[Path] = []
"""The folder of the device that was loaded last."""
_KEPT: ContextVar[list[str | Figure] | None] = ContextVar("_KEPT", default=None)
_FOLDER: ContextVar[Path | None] = ContextVar("_FOLDER", default=None)

sns.set_theme(style="ticks", context="notebook")
plt.rcParams.update(
    {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.labelsize": 11,
        "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.frameon": False, "legend.fontsize": 10,
        "text.color": INK, "axes.labelcolor": INK, "figure.dpi": 80,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The rows of one device.

    Attributes:
        rows: of all its sweeps, one per case.
        trained: of its capability sweeps, one per training.
        missing: sweeps without rows that a figure needs.
    """

    rows: pd.DataFrame
    trained: pd.DataFrame = field(default_factory=load_trained)
    missing: set[str] = field(default_factory=set)

    def sweep(self, name: str) -> pd.DataFrame:
        """The rows of one sweep."""
        rows = self.trained if name.startswith("capability") else self.rows
        return rows[rows["sweep"] == name]


def load(having: str = "") -> Results:
    """Read the results of one device, ATTENTION_DEVICE or else the one with most sweeps; show its name.

    Args:
        having: a sweep that the device must have, if any has it and ATTENTION_DEVICE does not choose.
    """
    files: dict[str, list[Path]] = {}
    root = ROOT / os.environ.get("ATTENTION_RESULTS", "results")
    for path in sorted(root.glob("*/*.csv")):
        if holds_costs(path) and path.name != "recommend.csv":
            files.setdefault(path.parent.name, []).append(path)
    tables = {}
    for folder, paths in files.items():
        try:
            tables[folder] = load_rows(*paths)
        except SchemaError as problem:
            say(f"Folder `{folder}` is left out: {problem}. `python run_all.py --fresh` starts it anew.")
    if not tables:
        say("There are no results of any device here.")
        return Results(load_rows())
    able = {folder: rows for folder, rows in tables.items() if (root / folder / f"{having}.csv").exists()}
    chosen = os.environ.get("ATTENTION_DEVICE") or _preferred(able or tables)
    if chosen not in tables:
        raise ValueError(f"ATTENTION_DEVICE={chosen!r} has no results; valid: {', '.join(tables)}")
    _loaded[:] = [root / chosen]
    others = [folder for folder in tables if folder != chosen]
    rest = f" Also there: {', '.join(others)}; `ATTENTION_DEVICE` chooses." if others else ""
    say(f"Device: **{' and '.join(tables[chosen]['device_name'].unique())}**, folder `{chosen}`.{rest}")
    return Results(aggregate_replicates(tables[chosen]), trained(root / chosen))


def trained(folder: Path) -> pd.DataFrame:
    """The rows of the capability sweeps in a device's folder."""
    return load_trained(*sorted(folder.glob("capability*.csv")))


def _preferred(tables: dict[str, pd.DataFrame]) -> str:
    def ranked(folder: str) -> tuple[int, bool, int]:
        rows = tables[folder]
        return rows["sweep"].nunique(), bool((rows["device"] == "cuda").any()), int((rows["replicate"] == 0).sum())

    return max(tables, key=ranked)


def needs(sweep: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For functions of Results: if the sweep has no rows, show only, and once, the command that creates them."""

    def decorate(draw: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(draw)
        def drawn(results: Results, *arguments: Any, **options: Any) -> Any:
            if not results.sweep(sweep).empty:
                return draw(results, *arguments, **options)
            if sweep not in results.missing:
                results.missing.add(sweep)
                say(f"No rows of the `{sweep}` sweep: `python run_all.py --only {sweep}` makes them.")
            return None

        return drawn

    return decorate


@contextlib.contextmanager
def kept(folder: Path | None = None) -> Iterator[list[str | Figure]]:
    """Within the context, collect output in the yielded list instead of showing it.

    Args:
        folder: where tables are written; nowhere if None. Figures are not written; their label is their name.
    """
    shown: list[str | Figure] = []
    tokens = _KEPT.set(shown), _FOLDER.set(folder)
    try:
        yield shown
    finally:
        _KEPT.reset(tokens[0])
        _FOLDER.reset(tokens[1])


def tables_folder() -> Path | None:
    """The folder that tables are written to; None where they are only shown."""
    if _KEPT.get() is None:
        return output("tables")
    folder = _FOLDER.get()
    return folder and folder / "tables"


def say(*paragraphs: str) -> None:
    """Show Markdown; several paragraphs become a list."""
    if paragraphs:
        text = "\n".join(f"- {text}" for text in paragraphs) if len(paragraphs) > 1 else paragraphs[0]
        shown = _KEPT.get()
        if shown is None:
            display(Markdown(text))
        else:
            shown.append(text)


def style(name: str) -> tuple[str, str]:
    """Colour and marker of an attention: always the same, also for a name not in STYLES."""
    return STYLES.get(name) or OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def family(name: str) -> str:
    """The group of an attention; ``other`` for a name not in FAMILIES."""
    return next((group for group, members in FAMILIES.items() if name in members), "other")


def series(rows: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Name, label, line style and rows of each line: one attention, split by the VARIANTS that differ.

    A label lists the values other than the most common ones, which the caption states.
    """
    differing = [column for column in VARIANTS if rows[column].nunique() > 1]
    common = {column: rows[column].mode().iloc[0] for column in differing}
    for name, of_name in rows.groupby("name", sort=False):
        parts = of_name.groupby(differing, sort=False, dropna=False) if differing else [((), of_name)]
        for number, (values, part) in enumerate(parts):
            pairs = zip(differing, values, strict=True)
            words = [_word(column, value) for column, value in pairs if pd.notna(value) and value != common[column]]
            yield str(name), f"{name} ({', '.join(words)})" if words else str(name), DASHES[number % len(DASHES)], part


def usual(rows: pd.DataFrame, among: Iterable[str] = SHAPE) -> pd.DataFrame:
    """Comparable rows: those with the most common value of each column in ``among``, the first in case of a tie."""
    for column in among:
        if rows[column].nunique() > 1:
            counts = rows[column].value_counts(sort=False)
            rows = rows[rows[column] == counts.idxmax()]
    return rows


def without_more(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that set no option without a column of its own, such as BRA's coarse_gate."""
    return rows[rows["other_options"].isna()]


def _word(column: str, value: Any) -> str:
    if column in ("compiled", "cuda_graph", "deterministic"):
        words = column.replace("_", " ")
        return words if value else f"not {words}"
    return str(value) if column in ("impl_requested", "dtype") else f"{column} {value}"


def number(value: float) -> str:
    """Three digits without an exponent: 0.450, 5.10, 1,234."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def size(count: float) -> str:
    """Bytes in binary units, to three digits: 1.5 GiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB)):
        if count >= 0.9995 * factor:
            return f"{count / factor:{'.0f' if count >= 100 * factor else '.3g'}} {unit}"
    return f"{count / 2**10:.3g} KiB"


def caption(fig: Figure, rows: pd.DataFrame, note: str = "", labelled: bool = False) -> None:
    """Below the figure, small: device, date and the values that all rows share (or most, if ``labelled``)."""
    started = rows["started_at"].dropna().astype(str).str[:10]
    dates = " to ".join(sorted({started.min(), started.max()})) if len(started) else "date not recorded"
    parts = [*rows["device_name"].unique(), dates]
    for column, label in SHARED.items():
        values = rows[column].dropna()
        if values.nunique() == 1 or (labelled and column in VARIANTS and len(values)):
            parts.append(f"{label} {values.mode().iloc[0]}".strip() + " unless labelled" * (values.nunique() > 1))
    fig.supxlabel("; ".join(parts) + f".\n{note}".rstrip("\n"), x=0.01, ha="left", fontsize=9, color=FAINT)


def output(kind: str) -> Path:
    """The folder for figures or tables: from the environment, else in the loaded device's folder."""
    folder = os.environ.get(f"ATTENTION_{kind.upper()}")
    return ROOT / folder if folder else (_loaded[0] if _loaded else ROOT / "results") / kind


def save(fig: Figure, name: str) -> Figure:
    """Write the figure as a PNG; returned, so that a notebook shows it."""
    fig.set_label(name)
    if (shown := _KEPT.get()) is not None:
        shown.append(fig)
        plt.close(fig)
        return fig
    folder = output("figures")
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight", pad_inches=0.12, facecolor="white")
    plt.close(fig)
    return fig
