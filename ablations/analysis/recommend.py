"""Which attention can I afford? Every attention and a few variants of each, judged by memory and latency.

Memory and MACs are predicted for exactly the requested grid; latency comes from results, or is unknown.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from ablations.analysis import model_candidates, prediction_cache
from ablations.analysis.abilities import Abilities
from ablations.analysis.candidates import Candidate, candidates
from ablations.analysis.compare import read
from ablations.analysis.latency_lookup import LatencyLookup
from ablations.analysis.units import in_words
from ablations.harness.sweep import discover
from attention_zoo import InvalidOption
from profiling.cases.case import Case
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job
from profiling.execution.subprocess_runner import Outcome
from profiling.schema.capability import SOLVED
from profiling.schema.row import load

STEP = 0.05
"""Accuracies that differ by less rank alike."""
RECOMMEND = "recommend"
"""Name of the file of results with the rows that recommendations have measured, and their ``sweep``."""
Progress = Callable[[int, int], None]
Predicted = tuple[Candidate, Outcome]
"""A candidate and its static analysis."""


@dataclass(frozen=True)
class Limits:
    """Limits of one step: memory in bytes, and latency in milliseconds if it is limited."""

    memory: float
    latency: float | None = None


@dataclass(frozen=True)
class Device:
    """Where the step would run.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: the device's name, if known.
        rows: what was measured on it.
        here: whether it is a device of this machine.
    """

    kind: str
    name: str | None
    rows: pd.DataFrame
    here: bool = False


@dataclass(frozen=True)
class Question:
    """A request for recommendations.

    Attributes:
        size: grid, channels, heads, batch, mode and dtype; its name and options are ignored. Or a model: its name,
            pixels, batch, mode and dtype.
        limits: of one step.
        device: where the step would run, from :func:`resolve`.
        plugins: files whose attentions are registered here already, for the processes that predict.
        needs: tasks that it must have learned; the candidates are ranked by the worst of their accuracies first.
        abilities: the accuracies that are known.
    """

    size: Case
    limits: Limits
    device: Device
    plugins: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    abilities: Abilities | None = None


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


def predict(asked: Question, progress: Progress | None = None) -> list[Predicted]:
    """Analyze every candidate; ``progress`` is called with the numbers of candidates done and of all so far.

    In a model, an attention that exceeds the limits is tried again from a later stage on.
    """
    size = replace(asked.size, device=asked.device.kind)
    subprocess_runner.start()
    if size.kind != "model":
        return _analyzed(list(candidates(size)), asked, [], progress)
    result = _analyzed(list(model_candidates.in_all_stages(size)), asked, [], progress)
    for stage in range(1, model_candidates.STAGES):
        answer = judge(result, asked)
        exceeding = [candidate for candidate in answer.refused if exceeds(candidate, asked.limits)]
        more = model_candidates.from_stage(stage, exceeding, [*answer.fits, *answer.unknown])
        result = _analyzed(list(more), asked, result, progress)
    return result


def judge(predicted: Sequence[Predicted], asked: Question) -> Answer:
    """Judge every candidate by its prediction, the results of the device, and the limits."""
    measured = LatencyLookup(asked.device.rows)
    judged = [_able(_judge(candidate, outcome, measured, asked.limits), asked) for candidate, outcome in predicted]
    open_, refused = [c for c in judged if not c.why_not], [c for c in judged if c.why_not]
    key = partial(rank, needs=asked.needs)
    return Answer(
        sorted((c for c in open_ if not _lacks(c, asked.limits)), key=key),
        sorted((c for c in open_ if _lacks(c, asked.limits)), key=key),
        sorted(refused, key=lambda c: c.memory or math.inf),
    )


def rank(candidate: Candidate, needs: Sequence[str] = ()) -> tuple[float, ...]:
    """The order in which candidates are shown: by latency where it is known, then by MACs, then by memory.

    With ``needs``, before all else by the worst accuracy at these tasks, in steps of STEP: those that solve all come
    first, and those that were not trained last.
    """
    known = candidate.latency.ms
    able = worst(candidate, needs)
    step = 0 if not needs else 1 if able is None else -min(round(able / STEP), round(SOLVED / STEP))
    return (step, math.inf if known is None else known, candidate.macs or 0, candidate.memory or 0)


def resolve(text: str, results: Path) -> Device:
    """Return the device ``cpu``, ``cuda`` or ``auto`` of this machine, or that of a folder in ``results``.

    Prediction works for an absent GPU too. InvalidOption if there is no such device or folder.
    """
    folders = sorted(path.name for path in results.iterdir() if _has_rows(path)) if results.is_dir() else []
    if text in folders:
        rows = read(results / text)
        if rows.empty:
            raise InvalidOption(f"{results / text}: its files hold no rows yet")
        kind, name = rows["device"].iloc[0], rows["device_name"].iloc[0]
        return Device(kind, name, rows, here=_name_here(kind) == name)
    if text not in ("cpu", "cuda", "auto"):
        raise InvalidOption(f"--device {text!r} is not valid; valid: {', '.join(['cpu', 'cuda', 'auto', *folders])}")
    if text == "auto":
        text = "cpu" if environment.check_device("cuda") else "cuda"
    name = _name_here(text)
    folder = environment.slug(name or "")
    return Device(text, name, read(results / folder) if folder in folders else load(), here=name is not None)


def exceeds(candidate: Candidate, limits: Limits) -> str:
    """Which limit a candidate exceeds, in words; empty if none, as far as known."""
    if candidate.memory is not None and candidate.memory > limits.memory:
        return f"needs {in_words(candidate.memory)}"
    ms = candidate.latency.ms
    if limits.latency is not None and ms is not None and ms > limits.latency:
        return f"takes {ms:.3g} ms ({candidate.latency.source})"
    return ""


def worst(candidate: Candidate, needs: Sequence[str]) -> float | None:
    """The least accuracy of a candidate at these tasks; None if it was not trained at all of them."""
    known = [candidate.abilities.get(task) for task in needs]
    return None if not known or None in known else min(filter(None, known), default=0.0)


def _able(candidate: Candidate, asked: Question) -> Candidate:
    if asked.abilities is None or not asked.needs:
        return candidate
    return replace(candidate, abilities=asked.abilities.of(candidate.case.name, dict(candidate.case.options)))


def _analyzed(
    more: Sequence[Candidate], asked: Question, before: Sequence[Predicted], progress: Progress | None
) -> list[Predicted]:
    """The predictions ``before``, and those of ``more`` candidates."""
    result = list(before)
    for candidate, outcome in zip(
        more, prediction_cache.analyze([Job(c.case, asked.plugins) for c in more]), strict=True
    ):
        result.append((candidate, outcome))
        if progress:
            progress(len(result), len(before) + len(more))
    return result


def _name_here(kind: str) -> str | None:
    """The name of this machine's device of a kind; None if it has none."""
    if environment.check_device(kind):
        return None
    subprocess_runner.start()
    return subprocess_runner.call(environment.device_name, kind).value


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
    return replace(judged, why_not=measured.failure(case) or exceeds(judged, limits))


def _lacks(candidate: Candidate, limits: Limits) -> bool:
    """Whether a number is missing to decide that it fits."""
    return candidate.memory is None or (limits.latency is not None and candidate.latency.ms is None)


def _has_rows(folder: Path) -> bool:
    return bool({path.stem for path in folder.glob("*.csv")} & {*discover(), RECOMMEND})
