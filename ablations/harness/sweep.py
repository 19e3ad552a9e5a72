"""A sweep: a question and the cases that answer it. A sweep file defines one sweep and nothing else."""

import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attention_zoo import InvalidOption, names, options
from profiling.cases.case import Case
from profiling.execution.cpu_allocator import FreedMemory
from profiling.meters.latency import STANDARD, StoppingRule

CASE_FIELDS = {f.name for f in fields(Case)} - {"options"}
Values = Mapping[str, Any]
Axis = str | tuple[str, ...]
Axes = Mapping[Axis, Sequence[Any] | Callable[[], Sequence[Any]]]
SWEEPS = "ablations.sweeps"
"""The package whose files are the sweeps."""
MODES: dict[Axis, Any] = {"mode": ("forward", "forward_backward")}
"""An axis of most sweeps."""


@dataclass(frozen=True)
class Sweep:
    """The cases in a product of axes.

    Attributes:
        question: what the sweep answers, in one sentence.
        expect: what a reader should find, and how long the sweep takes.
        axes: values of fields of a Case, of options, or of ``grid`` (height and width at once, or a pair of them).
            A tuple of names is one axis, whose values are tuples too. The values may be a function, called when the
            sweep runs, so that it sees plugins.
        also: further products of axes, run after the others except under ``--smoke``; an option that only they name
            takes its default elsewhere.
        on_cuda: products of axes to run on CUDA instead, in order, the most valuable first: GPU time is short. A case
            in several products is run once.
        fixed: as axes, with one value each; axes override them.
        smoke: axes to use instead under ``--smoke``.
        full: fields of the sweep that differ under ``--full``; its ``axes`` are added to the others.
        keep: selects the combinations that are cases, by their values and the ``device``; all by default.
        measured: which cases are run; the others are counted and predicted only.
        most_macs_on_cpu: on a CPU, cases of more MACs per step are predicted only. They would take minutes and add
            nothing to the prediction.
        replicates: number of processes that measure each case, in random order if more than one. A published run sets
            more by ``--replicates``: see :mod:`profiling.schema.replicates`.
        stopping: when to stop timing a case.
        freed_memory: CPU: how the C library handles memory that a step frees, see
            :mod:`profiling.execution.cpu_allocator`.
        timeout: seconds a cell may take.
        oversized: run cells even where they are predicted not to fit the device.
    """

    question: str
    expect: str
    axes: Axes
    also: Sequence[Axes] = ()
    on_cuda: Sequence[Axes] = ()
    fixed: Values = field(default_factory=dict)
    smoke: Axes = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)
    keep: Callable[[Values], bool] = lambda values: True
    measured: Callable[[Case], bool] = lambda case: True
    most_macs_on_cpu: float = math.inf
    replicates: int = 1
    stopping: StoppingRule = STANDARD
    freed_memory: FreedMemory = "kept"
    timeout: float = 300.0
    oversized: bool = False

    def in_full(self) -> "Sweep":
        """Return the sweep for published results: more cells, samples and processes."""
        changes: dict[str, Any] = {"stopping": STANDARD, "replicates": 3, **self.full}
        return replace(self, **changes | {"axes": {**self.axes, **self.full.get("axes", {})}})

    def cases(self, device: str, smoke: bool = False) -> list[Case]:
        """All cases in the order of the axes, each once per replicate."""
        products = [dict(self.axes) | dict(self.smoke)] if smoke else [self.axes, *self.also]
        if device == "cuda" and self.on_cuda and not smoke:
            products = list(self.on_cuda)
        chosen = [case for axes in products for case in self._product(axes, device)]
        return [
            replace(case, replicate=replicate)
            for replicate in range(1 if smoke else self.replicates)
            for case in dict.fromkeys(chosen)
        ]

    def _product(self, args: Axes, device: str) -> Iterator[Case]:
        """The cases of one product of axes."""
        axes = [[_named(axis, value) for value in (values() if callable(values) else values)]
                for axis, values in args.items()]  # fmt: skip
        fixed = {"device": device, **self.fixed}
        _check_names([*itertools.chain(*(axis[0] for axis in axes if axis)), *fixed])
        for parts in itertools.product(*axes):
            values = fixed | dict(itertools.chain(*map(dict.items, parts)))
            if self.keep(values):
                yield _case(dict(values))


def _named(axis: Axis, value: Any) -> dict[str, Any]:
    """Map one value of an axis to its name, or the values of a coupled axis to their names."""
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
    """All sweeps, by the name of their file."""
    package = importlib.import_module(SWEEPS)
    return dict(_sweeps(package.__path__))


def _sweeps(path: Sequence[str]) -> Iterator[tuple[str, Sweep]]:
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            result = getattr(importlib.import_module(f"{SWEEPS}.{module.name}"), "SWEEP", None)
            if isinstance(result, Sweep):
                yield module.name, result


def _case(values: dict[str, Any]) -> Case:
    if "grid" in values:
        grid = values.pop("grid")
        values["height"], values["width"] = grid if isinstance(grid, tuple) else (grid, grid)
    chosen = {name: value for name, value in values.items() if name in CASE_FIELDS}
    rest = {name: value for name, value in values.items() if name not in CASE_FIELDS}
    if chosen.get("kind") != "model":
        declared = options(chosen["name"])
        # A sweep over attentions lists the options of all of them; keep those that this one declares.
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
