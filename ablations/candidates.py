"""What there is to choose from: every attention, a few variants of each, in each of its implementations."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ablations import resolution
from ablations.measured import Latency
from attention_zoo import InvalidOption, get, names, options
from attention_zoo.options import Option
from profiling.case import Case, available_impls

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
"""Values to try of an option of that name, one option at a time, with every attention that has it.

The modes of kv_downsample that take a maximum cost what those that take a mean do.
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
        why_not: why it does not fit; empty if it does, or may.
    """

    case: Case
    changed: tuple[tuple[str, Any], ...] = ()
    padded: bool = False
    memory: int | None = None
    macs: int | None = None
    latency: Latency = field(default_factory=Latency)
    why_not: str = ""


def candidates(size: Case) -> Iterator[Candidate]:
    """All of them at the size, mode, dtype and device of ``size``, whose name and options do not matter.

    With auto_pad, as in the resolution sweep: a grid that n_win does not divide is padded, not refused.
    """
    for name in names():
        declared = options(name)
        base = {o: value for o, value in resolution.SWEEP.fixed.items() if o in declared and _valid(declared[o], value)}
        for changed in ({}, *_variants(declared, base)):
            chosen = tuple(sorted((base | changed).items()))
            for impl in available_impls(name):
                yield Candidate(replace(size, name=name, options=chosen, impl=impl), tuple(changed.items()))


def command(case: Case, plugins: Sequence[str] = ()) -> list[str]:
    """The command that measures a case alone, a flag with its value at a time; a flag's default is left out.

    Of ``plugins``, absolute paths, it names the one that the attention comes from.
    """
    declared = options(case.name)
    chosen = {name: value for name, value in case.options if value != declared[name].default}
    usual = {"dim": 64, "num_heads": 2, "batch": 1, "mode": "forward", "dtype": "fp32", "device": "cpu"}
    given = {"attention": case.name, "height": case.height, "width": case.width}
    given |= {name: getattr(case, name) for name, value in usual.items() if getattr(case, name) != value}
    module = get(case.name).__module__
    words = [f"--plugin {shlex.quote(plugin)}" for plugin in plugins if module.endswith(plugin)]
    words += [f"--{name.replace('_', '-')} {_written(value)}" for name, value in (given | chosen).items()]
    return ["python -m profiling", *words, f"--impl {case.impl}"]


def _written(value: Any) -> str:
    """As a command line takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else shlex.quote(str(value))


def _variants(declared: Mapping[str, Option], base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, option in declared.items():
        usual = base.get(name, option.default)
        yield from ({name: value} for value in VARIANTS.get(name, ()) if value != usual and _valid(option, value))


def _valid(option: Option, value: Any) -> bool:
    try:
        option.check(value)
    except InvalidOption:
        return False
    return True
