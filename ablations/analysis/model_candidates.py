"""The candidates for a whole model: each attention in all of its stages, or from a later stage on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ablations.analysis.candidates import Candidate
from ablations.sweeps import models, stl
from attention_zoo import MODELS, InvalidOption, names
from profiling.cases.case import PUBLISHED, Case, impls_of_model, stages_as_text

STAGES = 4
Stages = str | tuple[str | None, ...] | None
"""The argument ``attention`` of a model."""


def in_all_stages(size: Case) -> Iterator[Candidate]:
    """Yield the model as published, then with each attention in all of its stages, in each implementation.

    Options are those of the sweeps ``models`` and ``stl``, so that their rows hold the latencies.
    """
    for attention in (None, *names()):
        for impl in impls_of_model(attention):
            yield Candidate(_case(size, attention, impl))


def from_stage(stage: int, exceeding: Sequence[Candidate], fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield, for each attention that exceeds the limits one stage earlier, the model with it from ``stage`` on.

    The earlier stages hold what :func:`_base` chooses. The number of tokens falls by four from stage to stage, so an
    attention that needs too much in the first may fit in the others.

    Args:
        stage: 0 to 3; the attention is in this stage and the later ones.
        exceeding: candidates that exceed the limits.
        fitting: candidates that do not.
    """
    for candidate in exceeding:
        case, attention = candidate.case, stages(candidate.case)
        base = _base(case.impl, fitting)
        if attention is None or first_stage(attention) != stage - 1 or not base:
            continue
        name = attention if isinstance(attention, str) else attention[-1]
        yield Candidate(_case(case, (*base,) * stage + (name,) * (STAGES - stage), case.impl))


def grids(size: Case) -> list[tuple[int, int]]:
    """Rows and columns of tokens in each stage; InvalidOption if the image is so small that a stage has none."""
    with torch.device("meta"):
        result = MODELS[size.name]().grids(size.height, size.width)
    if min(min(grid) for grid in result) < 1:
        least = 2 ** (STAGES + 1)
        raise InvalidOption(
            f"{size.height} x {size.width} pixels leave no token for the last stage of {size.name}; valid: at least "
            f"{least} x {least}"
        )
    return result


def stages(case: Case) -> Stages:
    """The attention in all stages of a model, or the four; None as published."""
    return dict(case.options).get("attention")


def first_stage(attention: Stages) -> int:
    """The first stage, 0 to 3, that holds the attention of the last one."""
    return 0 if attention is None or isinstance(attention, str) else attention.index(attention[-1])


def in_words(attention: Stages) -> str:
    """The attentions of a model, for a table."""
    if attention is None:
        return "as published"
    if isinstance(attention, str):
        return attention
    start = first_stage(attention)
    if len({*attention[:start]}) == 1 and len({*attention[start:]}) == 1:
        return f"{attention[-1]} from stage {start + 1}, else {attention[0] or PUBLISHED}"
    return stages_as_text(attention) or ""


def _base(impl: str, fitting: Sequence[Candidate]) -> list[str | None]:
    """The attention for the earlier stages: as published, or if that does not fit, the one of least memory, if any."""
    whole = [(stages(c.case), c.memory or 0) for c in fitting if c.case.impl == impl]
    named = sorted((memory, name) for name, memory in whole if isinstance(name, str))
    return [None] if any(name is None for name, _ in whole) else [name for _, name in named[:1]]


def _case(size: Case, attention: Stages, impl: str) -> Case:
    sweep = models.SWEEP if attention is None else stl.SWEEP
    options = {name: sweep.fixed[name] for name in ("n_win", "auto_pad") if name in sweep.fixed}
    if attention is not None:
        options["attention"] = attention
    return replace(size, options=tuple(sorted(options.items())), impl=impl)
