"""A capability sweep: a question and the trials that answer it, and how its cells are run."""

import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ablations.capability.trial import Trial
from ablations.harness.sweep import SWEEPS, Axes, Axis
from attention_zoo import options

FIELDS = {field.name for field in fields(Trial)} - {"options"}


@dataclass(frozen=True)
class CapabilitySweep:
    """The trials in products of axes.

    Attributes:
        question, expect: as of :class:`ablations.harness.sweep.Sweep`.
        products: products of axes, the most valuable first; a trial in several is run once. Names are fields of a
            Trial or options of the attention; an option that an attention does not declare is left out.
        smoke: the only product under ``--smoke``.
        full: more products under ``--full``.
        seeds: trainings of each trial: seeds 0, 1, ...; in a product all trials of a seed come before the next seed's.
        timeout: seconds a cell may take.
    """

    question: str
    expect: str
    products: Sequence[Axes]
    smoke: Axes
    full: Sequence[Axes] = ()
    seeds: int = 1
    timeout: float = 300.0

    def in_full(self) -> "CapabilitySweep":
        """The sweep for published results."""
        return replace(self, products=[*self.products, *self.full], seeds=max(3, self.seeds))

    def trials(self, device: str, smoke: bool = False) -> list[Trial]:
        """All trials, in order."""
        products = [self.smoke] if smoke else self.products
        seeds = range(1 if smoke else self.seeds)
        several = (list(_product(axes, device)) for axes in products)
        chosen = (replace(trial, seed=trial.seed + seed) for trials in several for seed in seeds for trial in trials)
        return list(dict.fromkeys(chosen))


def _product(axes: Axes, device: str) -> Iterator[Trial]:
    names, values = list(axes), [values() if callable(values) else values for values in axes.values()]
    for combination in itertools.product(*values):
        yield _trial(dict(_named(names, combination)), device)


def _named(names: Sequence[Axis], combination: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for axis, value in zip(names, combination, strict=True):
        yield from [(axis, value)] if isinstance(axis, str) else zip(axis, value, strict=True)


def _trial(values: Mapping[str, Any], device: str) -> Trial:
    declared = options(values["name"])
    chosen = {name: value for name, value in values.items() if name not in FIELDS and name in declared}
    changed = sorted((name, value) for name, value in chosen.items() if value != declared[name].default)
    # Training under autocast is what a GPU is used for.
    dtype = "bf16" if device == "cuda" else "fp32"
    return Trial(
        **{"dtype": dtype} | {name: value for name, value in values.items() if name in FIELDS},
        options=tuple(changed), device=device,
    )  # fmt: skip


def discover() -> dict[str, CapabilitySweep]:
    """All capability sweeps, by the name of their file."""
    package = importlib.import_module(SWEEPS)
    result = {}
    for module in pkgutil.iter_modules(package.__path__):
        sweep = getattr(importlib.import_module(f"{SWEEPS}.{module.name}"), "SWEEP", None)
        if isinstance(sweep, CapabilitySweep):
            result[module.name] = sweep
    return result
