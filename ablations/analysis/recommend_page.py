"""Output of ``python -m ablations recommend``: a page for an 80-column terminal, or JSON."""

import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.analysis.candidates import Candidate, command
from ablations.analysis.latency_lookup import Latency
from ablations.analysis.recommend import Answer, Device, Question, in_words
from profiling.cases.case import Case

WIDTH = 80


def show(answer: Answer, asked: Question, console: Console, top: int) -> None:
    """Print fitting and unknown candidates, best first, ``top`` rows of each; then why the rest does not fit."""

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    tell(_headline(answer, asked))
    if answer.fits:
        console.print(_ranked(f"Fits, {_order(answer.fits)}", answer.fits[:top], asked.size))
        tell(_rest(len(answer.fits) - top))
    if answer.unknown:
        console.print(_ranked(_what_lacks(answer.unknown), answer.unknown[:top], asked.size))
        commands = [_folded(command(candidate.case, asked.plugins)) for candidate in answer.unknown[:top]]
        tell("\n".join(["Measure with:", *commands, _rest(len(answer.unknown) - top)]))
    if answer.refused:
        console.print(_refused(answer.refused))
    tell(_legend([*answer.fits[:top], *answer.unknown[:top]], answer.refused))


def as_json(answer: Answer, asked: Question) -> dict[str, Any]:
    """Return the complete answer for scripts."""
    fields = ("height", "width", "dim", "num_heads", "batch", "mode", "dtype")
    question = {name: getattr(asked.size, name) for name in fields}
    question |= {"device": asked.device.kind, "device_name": asked.device.name}
    question |= {"memory_bytes": asked.limits.memory, "latency_ms": asked.limits.latency}
    groups = {"fits": answer.fits, "unknown": answer.unknown, "does_not_fit": answer.refused}
    return {"asked": question} | {name: [_entry(c, asked.plugins) for c in group] for name, group in groups.items()}


def label(candidate: Candidate) -> str:
    """The attention, and the options that differ from its base variant."""
    words = [candidate.case.name, *(f"{name}={value}" for name, value in candidate.changed)]
    return " ".join([*words, *(["padded"] if candidate.padded else [])])


def _entry(candidate: Candidate, plugins: Sequence[str]) -> dict[str, Any]:
    case, latency = candidate.case, candidate.latency
    return {
        "attention": case.name, "options": dict(case.options), "impl": case.impl, "padded": candidate.padded,
        "memory_predicted_bytes": candidate.memory, "macs": candidate.macs,
        "latency_ms": latency.ms, "latency_source": latency.source, "latency_grids": latency.grids,
        "why_not": candidate.why_not, "measure_with": " ".join(command(case, plugins)),
    }  # fmt: skip


def _headline(answer: Answer, asked: Question) -> str:
    size, limits = asked.size, asked.limits
    count = len(answer.fits) + len(answer.unknown) + len(answer.refused)
    limit = in_words(limits.memory).replace(" ", "\xa0") + (f" and {limits.latency:g} ms" if limits.latency else "")
    batch = f"batch {size.batch}, " if size.batch > 1 else ""
    text = (
        f"{size.height} x {size.width} tokens, {batch}dim {size.dim}, {size.num_heads} heads, {size.mode}, "
        f"{size.dtype}: {len(answer.fits)} of {count} candidates fit {limit}. {_where(asked.device)}"
    )
    return textwrap.fill(text, WIDTH).replace("\xa0", " ") + "\n"


def _where(device: Device) -> str:
    if device.name is None:
        return f"No {device.kind} device is here: predicted only."
    where = f"Latency on {device.name}"
    return f"{where}." if len(device.rows) else f"{where}: no results yet; python run_all.py measures."


def _order(group: Sequence[Candidate]) -> str:
    known = [candidate.latency.ms is not None for candidate in group]
    if not any(known):
        return "least MACs first"
    return "fastest first" if all(known) else "fastest first, then by MACs where latency is unknown"


def _what_lacks(group: Sequence[Candidate]) -> str:
    if all(candidate.memory is None for candidate in group):
        return "Memory cannot be predicted"
    both = any(candidate.memory is None for candidate in group)
    return f"Fits in memory{' where predicted' if both else ''}, latency unknown, least MACs first"


def _table(title: str, *columns: tuple[str, int]) -> Table:
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        padding=0,
    )  # fmt: skip
    for name, width in columns:
        right = name in ("memory", "MACs", "latency ms")
        table.add_column(name, width=width, justify="right" if right else "left", overflow="fold")
    return table


def _ranked(title: str, group: Sequence[Candidate], size: Case) -> Table:
    columns = (("attention", 31), ("impl", 9), ("memory", 9), ("MACs", 7), ("latency ms", 10), ("source", 9))
    table = _table(title, *columns)
    for candidate in group:
        ms = candidate.latency.ms
        table.add_row(
            escape(label(candidate)), escape(candidate.case.impl),
            "-" if candidate.memory is None else in_words(candidate.memory), short(candidate.macs or 0),
            "-" if ms is None else f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}", _grids(candidate.latency, size),
        )  # fmt: skip
    return table


def _refused(group: Sequence[Candidate]) -> Table:
    table = _table("Does not fit", ("attention", 31), ("impl", 9), ("why", 38))
    # Of variants refused for the same reason, show the first only.
    different = {(c.case.name, c.case.impl, c.why_not): c for c in reversed(group)}
    for candidate in reversed(different.values()):
        table.add_row(escape(label(candidate)), escape(candidate.case.impl), escape(candidate.why_not))
    return table


def _grids(latency: Latency, size: Case) -> str:
    """The source of a latency, as one word."""
    if latency.source in ("measured", "none"):
        return latency.source
    low, high = (f"{h}" if h == w else f"{h}x{w}" for h, w in latency.grids)
    if latency.source == "interpolated":
        return f"{low}..{high}"
    return f"> {high}" if size.height > latency.grids[-1][0] else f"< {low}"


def _legend(group: Sequence[Candidate], refused: Sequence[Candidate]) -> str:
    lines = ["memory: predicted peak of one step. MACs: of one step, backward included where there is one."]
    sources = {candidate.latency.source for candidate in group}
    words = {
        "measured": "measured: this very cell", "interpolated": "a..b: interpolated between these measured grids",
        "outside": "> a, < a: beyond the measured grids, so not known", "none": "none: never measured",
    }  # fmt: skip
    if message := [text for source, text in words.items() if source in sources]:
        lines.append(f"source: {'; '.join(message)}.")
    if sources & {"none", "outside"}:
        lines.append("`python -m profiling --attention NAME` with the same size times one of them here.")
    if any(candidate.padded for candidate in (*group, *refused)):
        lines.append("padded: n_win does not divide the grid, which auto_pad fills up with zeros.")
    lines.append("Options not shown are those of the resolution sweep; --json has them all.")
    return "\n" + "\n".join(textwrap.fill(line, WIDTH) for line in lines)


def _rest(count: int) -> str:
    return f"... and {count} more: --top N shows more, --json all\n" if count > 0 else ""


def short(count: int) -> str:
    """Format a count with three digits and a unit: M, G or T."""
    unit, scale = next((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1)) if count >= s or not u)
    value = count / scale
    return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"


def _folded(words: Sequence[str]) -> str:
    """Wrap a command over several shell lines, each flag on the line of its value."""
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < WIDTH - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)
