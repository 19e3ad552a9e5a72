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
from ablations.analysis.model_candidates import grids, stages
from ablations.analysis.model_candidates import in_words as stages_in_words
from ablations.analysis.recommend import Answer, Device, Question, worst
from ablations.analysis.time_candidates import TIME_IS_UP, Timed
from ablations.analysis.units import in_words, short
from profiling.cases.case import PUBLISHED, Case, stages_as_text

WIDTH = 80


def show(answer: Answer, asked: Question, console: Console, top: int, timed: Timed | None = None) -> None:
    """Print fitting and unknown candidates, best first, ``top`` rows of each; then why the rest does not fit.

    With ``timed``, also what of it was measured just now and what was not.
    """

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    tell(_headline(answer, asked))
    if answer.fits:
        console.print(_ranked(f"Fits, {_order(answer.fits, asked)}", answer.fits[:top], asked))
        tell(_rest(len(answer.fits) - top))
    if answer.unknown:
        console.print(_ranked(_what_lacks(answer.unknown), answer.unknown[:top], asked))
        commands = [_folded(command(candidate.case, asked.plugins)) for candidate in answer.unknown[:top]]
        tell("\n".join(["Measure with:", *commands, _rest(len(answer.unknown) - top)]))
    if answer.refused:
        console.print(_refused(answer.refused))
    shown = [*answer.fits[:top], *answer.unknown[:top]]
    tell("\n" + "\n".join(textwrap.fill(line, WIDTH) for line in [*_timing(timed), *_legend(shown, answer, asked)]))


def as_json(answer: Answer, asked: Question, timed: Timed | None = None) -> dict[str, Any]:
    """Return the complete answer for scripts.

    Keys: ``asked``, the request with the device's name; ``fits``, ``unknown`` (a number is missing to decide) and
    ``does_not_fit``, lists of candidates, the best first; ``timed``, null without ``--measure``, else the ``file`` of
    the new rows, their ``count``, and in ``not_timed`` the candidates without a row and ``why_not``. A number that is
    not known is null. In a candidate of a model, ``attention`` is the one in all stages, ``published``, or null with
    the four in ``stages``.
    """
    fields = ("height", "width", "dim", "num_heads", "batch", "mode", "dtype")
    question: dict[str, Any] = {"model": asked.size.name if asked.size.kind == "model" else None}
    question |= {name: getattr(asked.size, name) for name in fields}
    question |= {"device": asked.device.kind, "device_name": asked.device.name}
    question |= {"needs": list(asked.needs)}
    question |= {"memory_bytes": asked.limits.memory, "latency_ms": asked.limits.latency}
    groups = {"fits": answer.fits, "unknown": answer.unknown, "does_not_fit": answer.refused}
    result = {"asked": question} | {name: [_entry(c, asked.plugins) for c in group] for name, group in groups.items()}
    return result | {"timed": timed and _timed_entry(timed, asked)}


def label(candidate: Candidate) -> str:
    """The attention, and the options that differ from its base variant; of a model, the attentions of its stages."""
    if candidate.case.kind == "model":
        return stages_in_words(stages(candidate.case))
    words = [candidate.case.name, *(f"{name}={value}" for name, value in candidate.changed)]
    return " ".join([*words, *(["padded"] if candidate.padded else [])])


def _entry(candidate: Candidate, plugins: Sequence[str]) -> dict[str, Any]:
    case, latency = candidate.case, candidate.latency
    options: dict[str, Any] = dict(case.options)
    inside: dict[str, Any] = {"attention": case.name}
    if case.kind == "model":
        attention = options.pop("attention", None)
        per_stage = isinstance(attention, tuple)
        inside = {
            "model": case.name, "attention": None if per_stage else attention or PUBLISHED,
            "stages": (stages_as_text(attention) or "").split(",") if per_stage else None,
        }  # fmt: skip
    return inside | {
        "options": options, "impl": case.impl, "padded": candidate.padded,
        "memory_predicted_bytes": candidate.memory, "macs": candidate.macs,
        "learns": dict(candidate.abilities),
        "latency_ms": latency.ms, "latency_source": latency.source, "latency_grids": latency.grids,
        "why_not": candidate.why_not, "measure_with": " ".join(command(case, plugins)),
    }  # fmt: skip


def _timed_entry(timed: Timed, asked: Question) -> dict[str, Any]:
    skipped = [_entry(candidate, asked.plugins) | {"why_not": why} for candidate, why in timed.skipped]
    return {"file": str(timed.path), "count": timed.count, "seconds": timed.seconds, "not_timed": skipped}


def _headline(answer: Answer, asked: Question) -> str:
    size, limits = asked.size, asked.limits
    count = len(answer.fits) + len(answer.unknown) + len(answer.refused)
    limit = in_words(limits.memory).replace(" ", "\xa0") + (f" and {limits.latency:g} ms" if limits.latency else "")
    batch = f"batch {size.batch}, " if size.batch > 1 else ""
    what = f"{size.height} x {size.width} tokens, {batch}dim {size.dim}, {size.num_heads} heads"
    if size.kind == "model":
        what = f"{size.name}, {size.height} x {size.width} pixels{batch and ', '}{batch.removesuffix(', ')}"
    text = (
        f"{what}, {size.mode}, "
        f"{size.dtype}: {len(answer.fits)} of {count} candidates fit {limit}. {_where(asked.device)}"
    )
    return textwrap.fill(text, WIDTH).replace("\xa0", " ") + "\n"


def _where(device: Device) -> str:
    if device.name is None:
        return f"No {device.kind} device is here: predicted only."
    return f"Latency on {device.name}{'.' if len(device.rows) else ': no results yet.'}"


def _timing(timed: Timed | None) -> list[str]:
    """What was timed, and what was not."""
    if timed is None:
        return []
    lines = [f"{timed.count} candidates timed now, rows in {timed.path}."] if timed.count else []
    late = sum(why == TIME_IS_UP for _, why in timed.skipped)
    lines += [f"Not timed: {label(c)} {c.case.impl}: {why}." for c, why in timed.skipped if why != TIME_IS_UP]
    if late:
        message = "the same command again goes on with them, and --seconds gives more time"
        lines.append(f"{late} more were not begun within {timed.seconds:g} s: {message}.")
    return lines or ["Nothing to time: all of these have been measured at this size."]


def _order(group: Sequence[Candidate], asked: Question) -> str:
    if asked.needs:
        return f"best at {', '.join(asked.needs)} first"
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
        right = name in ("memory", "MACs", "latency ms", "learns")
        table.add_column(name, width=width, justify="right" if right else "left", overflow="fold")
    return table


def _ranked(title: str, group: Sequence[Candidate], asked: Question) -> Table:
    columns = (("attention", 31), ("impl", 9), ("memory", 9), ("MACs", 7), ("latency ms", 10), ("source", 9))
    # One line holds 80 characters.
    shown = (("attention", 25), ("learns", 6), *columns[1:]) if asked.needs else columns
    table = _table(title, *shown)
    for candidate in group:
        ms = candidate.latency.ms
        able = worst(candidate, asked.needs)
        table.add_row(
            _name(candidate, shown[0][1]), *([] if not asked.needs else ["-" if able is None else f"{able:.0%}"]),
            escape(candidate.case.impl), "-" if candidate.memory is None else in_words(candidate.memory),
            short(candidate.macs or 0),
            "-" if ms is None else f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}", _grids(candidate.latency, asked.size),
        )  # fmt: skip
    return table


def _name(candidate: Candidate, width: int) -> str:
    """The label, with options too long for a line broken after their name."""
    words = label(candidate).split()
    return escape(" ".join(word.replace("=", "=\n", 1) if len(word) > width else word for word in words))


def _refused(group: Sequence[Candidate]) -> Table:
    columns = (("attention", 31), ("impl", 9), ("why", 38))
    table = _table("Does not fit", *columns)
    # Of variants refused for the same reason, show the first only.
    different = {(_kind_of(c), c.case.impl, c.why_not): c for c in reversed(group)}
    for candidate in reversed(different.values()):
        table.add_row(_name(candidate, columns[0][1]), escape(candidate.case.impl), escape(candidate.why_not))
    return table


def _kind_of(candidate: Candidate) -> str:
    return label(candidate) if candidate.case.kind == "model" else candidate.case.name


def _grids(latency: Latency, size: Case) -> str:
    """The source of a latency, as one word."""
    if latency.source in ("measured", "none"):
        return latency.source
    low, high = (f"{h}" if h == w else f"{h}x{w}" for h, w in latency.grids)
    if latency.source == "interpolated":
        return f"{low}..{high}"
    return f"> {high}" if size.height > latency.grids[-1][0] else f"< {low}"


def _legend(shown: Sequence[Candidate], answer: Answer, asked: Question) -> list[str]:
    lines = ["memory: predicted peak of one step. MACs: of one step, backward included where there is one."]
    sources = {candidate.latency.source for candidate in shown}
    words = {
        "measured": "measured: this very cell", "interpolated": "a..b: interpolated between these measured grids",
        "outside": "> a, < a: beyond the measured grids, so not known", "none": "none: never measured",
    }  # fmt: skip
    if message := [text for source, text in words.items() if source in sources]:
        lines.append(f"source: {'; '.join(message)}.")
    if sources - {"measured"}:
        lines.append(_how_to_measure(asked.device))
    if asked.needs:
        lines.append("learns: worst accuracy at the tasks asked for, of two blocks at 14 x 14 tokens; -: not trained.")
    if any(candidate.padded for candidate in (*shown, *answer.refused)):
        lines.append("padded: n_win does not divide the grid, which auto_pad fills up with zeros.")
    if asked.size.kind == "model":
        grids_ = ", ".join(f"{height} x {width}" for height, width in grids(asked.size))
        lines.append(f"The stages have {grids_} tokens. One that does not fit in all is tried from a later one on.")
        lines.append("Options are those of the publications, by stage where they say so; n_win 7, padded.")
    else:
        lines.append("Options not shown are those of the resolution sweep; --json has them all.")
    return lines


def _how_to_measure(device: Device) -> str:
    if device.here:
        return "The same command with --measure times the best here: as many as 60 s allow, or --measure N of them."
    return f"The same command with --measure times the best, on a machine with {device.name or device.kind}."


def _rest(count: int) -> str:
    return f"... and {count} more: --top N shows more, --json all\n" if count > 0 else ""


def _folded(words: Sequence[str]) -> str:
    """Wrap a command over several shell lines, each flag on the line of its value."""
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < WIDTH - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)
