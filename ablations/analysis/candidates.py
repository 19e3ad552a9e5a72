"""The candidates of a recommendation: every attention, a few variants of each, in each implementation."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ablations.analysis.latency_lookup import Latency
from ablations.sweeps import resolution
from attention_zoo import InvalidOption, get, names, options
from attention_zoo.core.options import Option
from profiling.cases.case import Case, available_impls, stages_as_text

VARIANTS: Mapping[str, Sequence[Any]] = {
    "topk": (1, 4, 16),
    "n_win": (7, 8, 16, "auto"),
    "kv_downsample_mode": ("avgpool", "ada_avgpool", "fracpool", "conv"),
    "window_size": (7, 14),
    "kernel_size": (7, 13),
    "stripe_width": (1, 7),
    "sr_ratio": (4, 8),
    "stride": (2, 4, 8),
    "recurrence": (1, 2),
}
"""Values to try per option, one option at a time, for every attention that has it.

The max-pooling modes of kv_downsample are left out: they cost the same as the mean-pooling ones.
"""


@dataclass(frozen=True)
class Candidate:
    """An attention with its options and implementation, and what is known about it.

    Attributes:
        case: what would run.
        changed: the options that set it apart from the attention as the resolution sweep measures it.
        padded: whether the grid is padded, because n_win does not divide it.
        memory: predicted peak bytes of one step; None if that cannot be predicted.
        macs: of one step, counted; backward included where there is one.
        latency: of one step.
        why_not: why it does not fit; empty if it fits or may fit.
        abilities: accuracy at each task, where it was trained with these options.
    """

    case: Case
    changed: tuple[tuple[str, Any], ...] = ()
    padded: bool = False
    memory: int | None = None
    macs: int | None = None
    latency: Latency = field(default_factory=Latency)
    why_not: str = ""
    abilities: Mapping[str, float] = field(default_factory=dict)


def candidates(size: Case) -> Iterator[Candidate]:
    """Yield all candidates at the size, mode, dtype and device of ``size``; its name and options are ignored.

    With auto_pad, as in the resolution sweep: a grid that n_win does not divide is padded, not refused. Values that the
    attention refuses are left out, such as a stride above the kernel of ``neighborhood``.
    """
    for name in names():
        declared = options(name)
        base = {o: value for o, value in resolution.SWEEP.fixed.items() if o in declared and _valid(declared[o], value)}
        for changed in ({}, *_variants(declared, base)):
            chosen = tuple(sorted((base | changed).items()))
            if changed and _refused(replace(size, name=name, options=chosen, impl="reference")):
                continue
            for impl in available_impls(name):
                yield Candidate(replace(size, name=name, options=chosen, impl=impl), tuple(changed.items()))


def command(case: Case, plugins: Sequence[str] = ()) -> list[str]:
    """Return the command that measures a case, one word per flag with its value; defaults are left out.

    Of ``plugins``, which are absolute paths, it contains those that define the attentions.
    """
    model = case.kind == "model"
    # A model takes the options of BRA for its blocks.
    declared, given = options("bra" if model else case.name), dict(case.options)
    stages = given.pop("attention", None) if model else case.name
    chosen = {name: value for name, value in given.items() if value != declared[name].default}
    usual = {"batch": 1, "mode": "forward", "dtype": "fp32", "device": "cpu"}
    usual = usual if model else {"dim": 64, "num_heads": 2} | usual
    args: dict[str, Any] = {"model": case.name} if model else {}
    args |= {} if stages is None else {"attention": stages_as_text(stages)}
    args |= {"height": case.height, "width": case.width}
    args |= {name: getattr(case, name) for name, value in usual.items() if getattr(case, name) != value}
    inside = [stages] if isinstance(stages, str) else [name for name in stages or () if name is not None]
    modules = [get(name).__module__ for name in inside]
    words = [f"--plugin {shlex.quote(path)}" for path in plugins if any(module.endswith(path) for module in modules)]
    words += [f"--{name.replace('_', '-')} {_written(value)}" for name, value in (args | chosen).items()]
    return ["python -m profiling", *words, f"--impl {case.impl}"]


def _written(value: Any) -> str:
    """Format a value for the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else shlex.quote(str(value))


def _variants(declared: Mapping[str, Option], base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, option in declared.items():
        usual = base.get(name, option.default)
        yield from ({name: value} for value in VARIANTS.get(name, ()) if value != usual and _valid(option, value))


def _refused(case: Case) -> bool:
    """Whether the attention refuses its options, each of them valid, together."""
    try:
        with torch.device("meta"):
            case.module()
    except InvalidOption:
        return True
    except Exception:
        # Of another failure the analysis gives the reason.
        return False
    return False


def _valid(option: Option, value: Any) -> bool:
    try:
        option.check(value)
    except InvalidOption:
        return False
    return True
