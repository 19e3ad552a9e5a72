"""Predictions for any grid, width and heads, as closed forms that are read off the exact predictions of few shapes.

``python -m ablations lattice`` writes them to results/predictions.json, which the explorer's page reads.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ablations.analysis.closed_form import (
    CHANNEL,
    PADDING,
    ROUNDINGS,
    SIZES,
    SPATIAL,
    STEPS,
    Array,
    Rounding,
    Shape,
    as_form,
    evaluate,
    fit,
    identify,
    table,
)
from ablations.analysis.timeline import MODES, Timeline, counted, devices_alike, timelines
from ablations.sweeps import resolution
from attention_zoo import InvalidOption, Unsupported, names, options
from profiling.cases.case import Case, available_impls

CPU = torch.backends.cpu.get_cpu_capability()
"""Vector instructions of this processor: the scratch of CPU kernels depends on them."""
SIDES, DIMS, HEAD_DIMS = (14, 1024), (32, 64, 96, 128, 192, 256, 384, 512), (16, 32, 64)
"""The range of shapes: tokens per side, channels, and channels per head; with two heads or more."""
SAMPLES, COUNTS, HELD_OUT = 7, 60, 6
"""Shapes to read forms off, for each kind of padding; shapes whose MACs are counted; shapes to tell the error, for each
kind of padding, of small grids, and of any."""
SMALL = 2 * SIDES[0]
"""Sides of a small grid, at most: there, with many channels, other operators are the peak."""
TRIED = 2000
"""Random shapes, and small ones, at which the forms of all operators are compared: one that is nowhere the largest is
left out."""
REFUSED = 20
"""Refused shapes for each that is taken, at most: regions of a small grid may be too small to pool."""
WORST = 0.005
"""Forms with a larger error at a held-out shape are left out: those that are read off storages have none."""
PROBE = "cuda fp32 forward_backward"
BRA_TOPK, BRA_WINDOWS = (1, 4, 16), (7, 8, 16)
NO_FORM = ("aggregated", "cross_shaped", "manhattan")
"""Attentions whose operators, or roundings, depend on the shape in other ways than padding: memory is left out."""
KV_MODES = ("avgpool", "ada_avgpool", "fracpool", "conv")
IMPLS = ("reference", "sdpa")
Runs = Mapping[Shape, Mapping[str, Timeline]]


@dataclass(frozen=True)
class Configuration:
    """An attention, its implementation and the options that the predictions are for."""

    name: str
    impl: str
    options: tuple[tuple[str, Any], ...]

    def case(self, shape: Shape, mode: Any = "forward_backward", device: str = "cuda", dtype: Any = "fp32") -> Case:
        """This configuration at a shape."""
        size = shape.height, shape.width, shape.dim, shape.heads
        return Case(self.name, *size, self.options, impl=self.impl, mode=mode, dtype=dtype, device=device)

    def changed(self) -> dict[str, Any]:
        """The options that differ from the attention's defaults."""
        declared = options(self.name)
        return {name: value for name, value in self.options if value != declared[name].default}


def configurations() -> Iterator[Configuration]:
    """Every attention as the resolution sweep has it, and BRA with other options; without compiled code."""
    for name in names():
        declared = options(name)
        base = {o: value for o, value in resolution.SWEEP.fixed.items() if o in declared}
        variants: list[dict[str, Any]] = [{}]
        impls = [impl for impl in available_impls(name) if impl in IMPLS]
        if name == "bra":
            # Its other implementations choose the size of their chunks by the shape, which no closed form follows.
            impls = ["reference"]
            variants += [{"topk": k} for k in BRA_TOPK if k != 4] + [{"n_win": n} for n in BRA_WINDOWS if n != 7]
            variants += [{"kv_downsample_mode": mode} for mode in KV_MODES]
        for changed, impl in itertools.product(variants, impls):
            yield Configuration(name, impl, tuple(sorted((base | changed).items())))


def entry(configuration: Configuration) -> dict[str, Any]:
    """The configuration's part of the file, or why it has no closed form."""
    head = {"name": configuration.name, "impl": configuration.impl, "options": configuration.changed()}
    try:
        return head | analyze(configuration)
    except (InvalidOption, Unsupported) as problem:
        return head | {"failed": str(problem)}


def shapes() -> dict[str, Any]:
    """The range of shapes of the forms, and the vector instructions of the CPU that they are of, for the file."""
    return {"cpu": CPU, "sides": SIDES, "dims": DIMS, "head_dims": HEAD_DIMS, "spatial": SPATIAL, "channel": CHANNEL}


def analyze(configuration: Configuration) -> dict[str, Any]:
    """Closed forms of memory and MACs of a configuration, and their largest error at shapes that were held out.

    Raises:
        InvalidOption: the attention takes hardly any of the shapes.
    """
    draw = random.Random(repr(configuration))
    runs = dict(_ran(configuration, draw, SAMPLES + 5))
    rounding = _rounding(runs)
    if rounding.up > 1:
        for padding in range(len(PADDING)):
            have = sum(rounding.padding(shape.height, shape.width) == padding for shape in runs)
            runs |= dict(_ran(configuration, draw, max(0, SAMPLES - have), rounding, padding))
    held_out = dict(_held_out(configuration, draw, rounding))
    macs, macs_error = _macs(configuration, draw, rounding)
    memory, errors = {}, {}
    for word in next(iter(runs.values())):
        memory[word] = [_peaks(runs, word, rounding, padding, draw) for padding in range(len(PADDING))]
        errors[word] = max(
            abs(_memory(memory[word], rounding, shape) / lines[word].peak() - 1) for shape, lines in held_out.items()
        )
    if configuration.name in NO_FORM:
        errors = dict.fromkeys(errors, float("inf"))
    known = {word: float(f"{error:.2g}") for word, error in (errors | {"macs": macs_error}).items() if error <= WORST}
    return {
        "rounding": [rounding.up, rounding.coarse, int(rounding.down)],
        "macs": macs if "macs" in known else {},
        "memory": {word: forms for word, forms in memory.items() if word in known},
        "error": known,
        "left_out": sorted({*errors, "macs"} - {*known}),
    }


def memory(forms: Mapping[str, Any], word: str, shape: Shape) -> float:
    """Predicted bytes of a shape from an entry; ``word`` names device, dtype and mode."""
    return _memory(forms["memory"][word], rounding_of(forms), shape)


def rounding_of(forms: Mapping[str, Any]) -> Rounding:
    """How an entry's forms round a grid."""
    up, coarse, down = forms["rounding"]
    return Rounding(up, coarse, bool(down))


def random_shape(
    draw: random.Random, rounding: Rounding | None = None, padding: int = 0, high: int = SIDES[1]
) -> Shape:
    """A shape within the range, uniform on a logarithmic scale; of that padding if there is a rounding."""
    low = SIDES[0]
    while True:
        height, width = (round(low * (high / low) ** draw.random()) for _ in range(2))
        if rounding:
            height, width = (-(-side // rounding.up) * rounding.up for side in (height, width))
            width -= draw.randrange(1, rounding.up) if padding in (1, 3) else 0
            height -= draw.randrange(1, rounding.up) if padding in (2, 3) else 0
        if min(height, width) >= low:
            break
    dim = draw.choice(DIMS)
    # With one head, other tensors are views.
    return Shape(height, width, dim, dim // draw.choice([size for size in HEAD_DIMS if dim % size == 0 and size < dim]))


def _held_out(
    configuration: Configuration, draw: random.Random, rounding: Rounding
) -> Iterator[tuple[Shape, dict[str, Timeline]]]:
    """Timelines of shapes that tell the error."""
    yield from _ran(configuration, draw, HELD_OUT)
    yield from _ran(configuration, draw, HELD_OUT, high=SMALL)
    # Without padding is one shape of many at random, and most shapes that are asked for.
    for padding in range(len(PADDING)) if rounding.up > 1 else ():
        yield from _ran(configuration, draw, HELD_OUT, rounding, padding)


def _ran(
    configuration: Configuration,
    draw: random.Random,
    count: int,
    rounding: Rounding | None = None,
    padding: int = 0,
    high: int = SIDES[1],
) -> Iterator[tuple[Shape, dict[str, Timeline]]]:
    """Timelines of so many random shapes that the attention takes."""
    refused, alike, most = 0, False, REFUSED * count
    while count:
        shape = random_shape(draw, rounding, padding, high)
        try:
            yield shape, (lines := dict(timelines(configuration.case(shape), alike)))
            count -= 1
            alike = devices_alike(lines)
        except InvalidOption:
            refused += 1
            if refused > most:
                raise


def _rounding(runs: Runs) -> Rounding:
    """The rounding for which monomials explain most storages of the shapes that it pads alike."""
    best, most = Rounding(), -1.0
    for rounding in ROUNDINGS:
        padding = 0 if rounding.up == 1 else 3
        shapes, lines = _alike(runs, PROBE, rounding, padding)
        if len(shapes) < 4:
            continue
        terms, sizes = table(shapes, rounding), np.array([line.sizes for line in lines], dtype=float).T
        share = float(np.mean([identify(values, terms, thorough=False) is not None for values in sizes]))
        if share > most + 1e-9:
            best, most = rounding, share
        if share == 1:
            break
    return best


def _alike(runs: Runs, word: str, rounding: Rounding, padding: int) -> tuple[list[Shape], list[Timeline]]:
    """The shapes of one padding that run the same operators, as most do, and their timelines."""
    groups: dict[Any, list[Shape]] = defaultdict(list)
    for shape, lines in runs.items():
        if rounding.padding(shape.height, shape.width) == padding:
            groups[lines[word].lifetimes].append(shape)
    most = max(groups.values(), key=len, default=[])
    return most, [runs[shape][word] for shape in most]


@dataclass(frozen=True)
class _Steps:
    """An operator whose scratch grows in steps: factors of what is alive and of its sizes, and its constants."""

    rule: str
    alive: Array
    sizes: tuple[Array, ...]
    constants: tuple[int, ...]

    def values(self, terms: Array) -> Array:
        """Bytes alive within the operator at each shape of a table."""
        sizes = np.rint([terms @ factors for factors in self.sizes]).astype(int).T.tolist()
        scratch = [STEPS[self.rule](*each, *self.constants).scratch() for each in sizes]
        return terms @ self.alive + np.array(scratch, dtype=float)

    def form(self) -> dict[str, Any]:
        """Its closed form."""
        sizes = [as_form(size) for size in self.sizes]
        return {"alive": as_form(self.alive), "rule": self.rule, "sizes": sizes, "constants": self.constants}


def _peaks(runs: Runs, word: str, rounding: Rounding, padding: int, draw: random.Random) -> list[Any]:
    """A form for every operator that is the peak at some shape of that padding."""
    shapes, lines = _alike(runs, word, rounding, padding)
    if not shapes:
        return []
    terms, sizes = table(shapes, rounding), np.array([line.sizes for line in lines], dtype=float).T
    known: dict[tuple[float, ...], Array] = {}
    storages = []
    for sizes_at in sizes:
        key = tuple(sizes_at)
        if key not in known:
            found = identify(sizes_at, terms)
            known[key] = fit(sizes_at, terms) if found is None else found
        storages.append(known[key])
    change = np.zeros((lines[0].moments + 1, terms.shape[1]))
    for factors, (born, died) in zip(storages, lines[0].lifetimes, strict=True):
        change[born] += factors
        change[min(died, lines[0].moments)] -= factors
    alive = np.cumsum(change[:-1], axis=0)
    # Sums and differences of factors leave what rounding leaves.
    alive[abs(alive) < 1e-6 * abs(change).max(axis=0)] = 0
    candidates = [*alive, *(alive[moment] + factors for moment, factors in _scratch(lines, terms))]
    steps = list(_steps(lines, terms, alive))
    limits = (SIDES[1], SMALL)
    tried = table([random_shape(draw, rounding, padding, high) for high in limits for _ in range(TRIED)], rounding)
    values = np.column_stack([tried @ np.array(candidates).T, *(one.values(tried) for one in steps)])
    forms = [*map(as_form, candidates), *(one.form() for one in steps)]
    return [forms[place] for place in sorted(set(map(int, values.argmax(axis=1))))]


def _scratch(lines: Sequence[Timeline], terms: Array) -> Iterator[tuple[int, Array]]:
    """Moments at which a kernel's scratch may be the peak, and its form."""
    for moment in sorted({moment for line in lines for moment in line.scratch}):
        values = np.array([float(line.scratch.get(moment, 0)) for line in lines])
        found = identify(values, terms, thorough=False) if values.all() else None
        yield moment, fit(values, terms) if found is None else found


def _steps(lines: Sequence[Timeline], terms: Array, alive: Array) -> Iterator[_Steps]:
    """The operators whose scratch grows in steps, if their sizes have forms."""
    rules = {kind: rule for rule, kind in STEPS.items()}
    for moment, first in lines[0].steps.items():
        found = [line.steps[moment] for line in lines if moment in line.steps]
        if len(found) < len(lines) or not any(one.scratch() for one in found):
            continue
        sizes = [identify(size, terms, thorough=False) for size in np.array(found, dtype=float).T[:SIZES]]
        # A thread takes as many sums at once as at every shape.
        constants = tuple(map(min, zip(*(one[SIZES:] for one in found), strict=True)))
        known = tuple(size for size in sizes if size is not None)
        if len(known) == SIZES:
            yield _Steps(rules[type(first)], alive[moment], known, constants)


def _macs(configuration: Configuration, draw: random.Random, rounding: Rounding) -> tuple[dict[str, Any], float]:
    """The form of either mode, and the largest error at shapes that were held out; backward alone in the second."""
    counts = dict(_counts(configuration, draw))
    shapes = list(counts)
    fitted, checked = shapes[: COUNTS * 3 // 4], shapes[COUNTS * 3 // 4 :]
    forms, worst = {}, 0.0
    for i, mode in enumerate(MODES):
        values = np.array([float(counts[shape][i]) for shape in fitted])
        forms[mode] = as_form(fit(values, table(fitted, rounding)))
        for shape in checked:
            if counts[shape][i]:
                worst = max(worst, abs(evaluate([forms[mode]], shape, rounding) / counts[shape][i] - 1))
    return forms, worst


def _counts(configuration: Configuration, draw: random.Random) -> Iterator[tuple[Shape, tuple[int, int]]]:
    for _ in range(COUNTS):
        shape = random_shape(draw)
        try:
            yield shape, counted(configuration.case(shape))
        except InvalidOption:
            continue


def _memory(forms: Sequence[Sequence[Any]], rounding: Rounding, shape: Shape) -> float:
    # Of a padding that has no shapes of its own, such as a rounding of 1.
    usable = forms[rounding.padding(shape.height, shape.width)] or forms[0] or forms[3]
    return evaluate(usable, shape, rounding)
