"""A sweep: a question, and the cases whose rows answer it. A sweep file holds nothing but one of these."""

import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attention_zoo import InvalidOption, names, options
from profiling.case import Case
from profiling.cell import FreedMemory
from profiling.latency import STANDARD, Patience

CASE_FIELDS = {f.name for f in fields(Case)} - {"options"}
Values = Mapping[str, Any]
Axis = str | tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A product of axes over cases.

    Attributes:
        question: what the sweep answers, in one sentence.
        expect: what a reader should find, and how long the sweep takes.
        axes: values of fields of a Case, of options, or of ``grid`` (height and width at once, or a pair of them).
            A tuple of names is one axis, whose values are tuples too. The values may be a function, called when the
            sweep runs, so that it sees plugins.
        fixed: as axes, with one value each.
        smoke: axes to use instead under ``--smoke``.
        keep: which combinations are cases, by their values and the ``device``; all by default.
        measured: which cases are run; the others are counted and predicted only.
        most_macs_on_cpu: cases of more MACs per step are predicted only on a CPU, where they would take minutes and
            tell no more than their prediction does.
        replicates: processes that measure each case, interleaved in random order; if several, more of them are asked
            until they agree (``profiling.replicates``).
        patience: when to stop timing a case.
        freed_memory: CPU: whether memory that a step frees is kept for the next one, or large blocks are returned to
            the system, as the C library does by default.
        timeout: seconds a cell may take.
        oversized: run cells even where they are predicted not to fit the device.
    """

    question: str
    expect: str
    axes: Mapping[Axis, Sequence[Any] | Callable[[], Sequence[Any]]]
    fixed: Values = field(default_factory=dict)
    smoke: Mapping[Axis, Sequence[Any] | Callable[[], Sequence[Any]]] = field(default_factory=dict)
    keep: Callable[[Values], bool] = lambda values: True
    measured: Callable[[Case], bool] = lambda case: True
    most_macs_on_cpu: float = math.inf
    replicates: int = 1
    patience: Patience = STANDARD
    freed_memory: FreedMemory = "kept"
    timeout: float = 300.0
    oversized: bool = False

    def cases(self, device: str, smoke: bool = False) -> list[Case]:
        """All cases in the order of the axes, each once per replicate."""
        given = dict(self.axes) | (dict(self.smoke) if smoke else {})
        axes = [[_named(axis, value) for value in (values() if callable(values) else values)]
                for axis, values in given.items()]  # fmt: skip
        fixed = {"device": device, **self.fixed}
        _check_names([*itertools.chain(*(axis[0] for axis in axes if axis)), *fixed])
        products = (fixed | dict(itertools.chain(*map(dict.items, parts))) for parts in itertools.product(*axes))
        chosen = [_case(dict(values)) for values in products if self.keep(values)]
        return [
            replace(case, replicate=replicate)
            for replicate in range(1 if smoke else self.replicates)
            for case in dict.fromkeys(chosen)
        ]


def _named(axis: Axis, value: Any) -> dict[str, Any]:
    """One value of an axis: by its name, or by the names of a coupled one."""
    return {axis: value} if isinstance(axis, str) else dict(zip(axis, value, strict=True))


def _check_names(axes: Iterable[str]) -> None:
    known = CASE_FIELDS | {"grid", "attention"} | {option for name in names() for option in options(name)}
    for name in axes:
        if name not in known:
            raise InvalidOption(f"a sweep has no axis {name!r}; valid: {', '.join(sorted(known))}")


def attentions() -> list[str]:
    """Every registered attention: for the ``name`` axis."""
    return names()


def discover() -> dict[str, Sweep]:
    """All sweeps of this package, by the name of their file."""
    import ablations

    return dict(_sweeps(ablations.__path__))


def _sweeps(path: Sequence[str]) -> Iterator[tuple[str, Sweep]]:
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            found = getattr(importlib.import_module(f"ablations.{module.name}"), "SWEEP", None)
            if isinstance(found, Sweep):
                yield module.name, found


def _case(values: dict[str, Any]) -> Case:
    if "grid" in values:
        grid = values.pop("grid")
        values["height"], values["width"] = grid if isinstance(grid, tuple) else (grid, grid)
    chosen = {name: value for name, value in values.items() if name in CASE_FIELDS}
    rest = {name: value for name, value in values.items() if name not in CASE_FIELDS}
    if chosen.get("kind") != "model":
        declared = options(chosen["name"])
        # A sweep over attentions states the options of all of them; each takes its own.
        rest = {name: value for name, value in rest.items() if name in declared}
    return Case(**chosen, options=tuple(sorted(rest.items())))


def select(chosen: str | None) -> dict[str, Sweep]:
    """The sweeps named in a comma-separated list, or all; InvalidOption for an unknown name."""
    sweeps = discover()
    if chosen is None:
        return sweeps
    picked = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in picked:
        if name not in sweeps:
            raise InvalidOption(f"unknown sweep {name!r}; valid: {', '.join(sweeps)}")
    if not picked:
        raise InvalidOption(f"--only names no sweep; valid: {', '.join(sweeps)}")
    return {name: sweeps[name] for name in picked}
