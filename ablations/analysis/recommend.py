"""Which attention can I afford? Every attention and a few variants of each, judged by memory and latency.

Memory and MACs are predicted for exactly the requested grid; latency comes from results, or is unknown.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ablations.analysis.candidates import Candidate, candidates
from ablations.analysis.compare import read
from ablations.analysis.latency_lookup import LatencyLookup
from ablations.harness.sweep import discover
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job
from profiling.execution.static_analysis import analyze_batch
from profiling.execution.subprocess_runner import Outcome
from profiling.schema.row import load

BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Limits:
    """Limits of one step: memory in bytes, and latency in milliseconds if it is limited."""

    memory: float
    latency: float | None = None


@dataclass(frozen=True)
class Device:
    """Where the step would run: ``cpu`` or ``cuda``, the device's name if known, and what was measured on it."""

    kind: str
    name: str | None
    rows: pd.DataFrame


@dataclass(frozen=True)
class Question:
    """A request for recommendations.

    Attributes:
        size: grid, channels, heads, batch, mode and dtype; its name and options are ignored.
        limits: of one step.
        device: where the step would run, from :func:`resolve`.
        plugins: files whose attentions are registered here already, for the processes that predict.
    """

    size: Case
    limits: Limits
    device: Device
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The candidates in groups, each with the best first.

    Attributes:
        fits: those that fit.
        unknown: those for which a number is missing to decide.
        refused: those that do not fit.
    """

    fits: list[Candidate]
    unknown: list[Candidate]
    refused: list[Candidate]


def recommend(asked: Question, progress: Progress | None = None) -> Answer:
    """Judge every candidate; ``progress`` is called with the numbers of candidates judged and of all."""
    result = list(candidates(replace(asked.size, device=asked.device.kind)))
    measured = LatencyLookup(asked.device.rows)
    subprocess_runner.start()
    judged: list[Candidate] = []
    jobs = [Job(candidate.case, asked.plugins) for candidate in result]
    for candidate, outcome in zip(result, analyze_batch(jobs), strict=True):
        judged.append(_judge(candidate, outcome, measured, asked.limits))
        if progress:
            progress(len(judged), len(result))
    open_, refused = [c for c in judged if not c.why_not], [c for c in judged if c.why_not]
    return Answer(
        sorted((c for c in open_ if not _lacks(c, asked.limits)), key=rank),
        sorted((c for c in open_ if _lacks(c, asked.limits)), key=rank),
        sorted(refused, key=lambda c: c.memory or math.inf),
    )


def rank(candidate: Candidate) -> tuple[float, ...]:
    """The order in which candidates are shown: by latency where it is known, then by MACs, then by memory."""
    known = candidate.latency.ms
    return (math.inf if known is None else known, candidate.macs or 0, candidate.memory or 0)


def resolve(text: str, results: Path) -> Device:
    """Return the device ``cpu``, ``cuda`` or ``auto`` of this machine, or that of a folder in ``results``.

    Prediction works for an absent GPU too. InvalidOption if there is no such device or folder.
    """
    folders = sorted(path.name for path in results.iterdir() if _has_rows(path)) if results.is_dir() else []
    if text in folders:
        rows = read(results / text)
        if rows.empty:
            raise InvalidOption(f"{results / text}: its files hold no rows yet")
        return Device(rows["device"].iloc[0], rows["device_name"].iloc[0], rows)
    if text not in ("cpu", "cuda", "auto"):
        raise InvalidOption(f"--device {text!r} is not valid; valid: {', '.join(['cpu', 'cuda', 'auto', *folders])}")
    if text == "auto":
        text = "cpu" if environment.check_device("cuda") else "cuda"
    if environment.check_device(text):
        return Device(text, None, load())
    subprocess_runner.start()
    name = subprocess_runner.call(environment.device_name, text).value
    folder = environment.slug(name or "")
    return Device(text, name, read(results / folder) if folder in folders else load())


def amount(text: str, units: Mapping[str, float]) -> float:
    """The number that ``text`` states in one of ``units``, such as 8GiB; InvalidOption if it states none."""
    result = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([A-Za-z]+)", text.strip(), re.ASCII)
    unit = result and {name.lower(): factor for name, factor in units.items()}.get(result[2].lower())
    if result is None or not unit or not 0 < float(result[1]) * unit < math.inf:
        example = f"8{[*units][-2]}"
        raise InvalidOption(f"{text!r} is not valid; valid: a number and one of {', '.join(units)}, such as {example}")
    return float(result[1]) * unit


def in_words(size: float) -> str:
    """Bytes, in the binary unit that leaves the fewest digits."""
    unit = next(unit for unit in reversed(BYTES) if size >= BYTES[unit] or unit == "KiB")
    value = size / BYTES[unit]
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def _judge(candidate: Candidate, outcome: Outcome, measured: LatencyLookup, limits: Limits) -> Candidate:
    if outcome.status != "ok":
        return replace(candidate, why_not=outcome.reason.removeprefix("InvalidOption: ").removeprefix("Unsupported: "))
    case, columns = candidate.case, outcome.value
    side = columns.get("regions_per_side")
    judged = replace(
        candidate,
        padded=bool(side) and any(size % side for size in (case.height, case.width)),
        memory=columns["memory_predicted_bytes"],
        macs=columns["macs_counted"] + (columns["macs_backward_counted"] or 0),
        latency=measured.latency(case),
    )
    return replace(judged, why_not=measured.failure(case) or _exceeds(judged, limits))


def _exceeds(candidate: Candidate, limits: Limits) -> str:
    if candidate.memory is not None and candidate.memory > limits.memory:
        return f"needs {in_words(candidate.memory)}"
    ms = candidate.latency.ms
    if limits.latency is not None and ms is not None and ms > limits.latency:
        return f"takes {ms:.3g} ms ({candidate.latency.source})"
    return ""


def _lacks(candidate: Candidate, limits: Limits) -> bool:
    """Whether a number is missing to decide that it fits."""
    return candidate.memory is None or (limits.latency is not None and candidate.latency.ms is None)


def _has_rows(folder: Path) -> bool:
    return bool({path.stem for path in folder.glob("*.csv")} & set(discover()))
