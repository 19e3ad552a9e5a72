"""Closed forms of sizes: sums of monomials in grid, channels and heads, with grids rounded as an attention pads them.

A form is a list of [factor, spatial, channel], indices into :data:`SPATIAL` and :data:`CHANNEL`. Where an operator's
scratch on CUDA grows in steps, it is a mapping: the form ``alive`` of what is alive then, and of one of :data:`STEPS`,
named by ``rule``, the forms of two ``sizes`` and the ``constants`` that follow them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from profiling.meters.cuda_scratch import ColumnSum, TiledBackward

SPATIAL = (
    "1", "H", "W", "A", "B", "C", "D", "HW", "AB", "CD", "AW", "HB", "HH", "WW", "AA", "BB", "HHW", "HWW", "AAB", "ABB",
    "AWW", "HHB", "HHWW", "AABB", "HWAB", "CDHW", "CDAB", "CCDD",
)  # fmt: skip
"""Products of H and W, of A and B, which are H and W rounded up, and of C and D, which are A and B rounded again."""
CHANNEL = ("1", "d", "h", "dd", "dd/h")
"""Products of channels d and heads h."""
EXACT = 1e-9
"""Relative error up to which a form is the size itself."""
PADDING = ("nothing", "width", "height", "both")
"""Padded grids have forms of their own: padding and cropping copy, but to crop rows at the end is a view."""
SUMS = tuple(
    tuple(map(SPATIAL.index, names))
    for names in (("1", "H", "W", "HW"), ("1", "A", "B", "AB"), ("1", "C", "D", "CD"), ("HW", "HHW", "HWW"))
)
"""Sums that are tried before all others: of rows and columns around a grid, and of a row and a column."""
STEPS: dict[str, type[ColumnSum] | type[TiledBackward]] = {"sum": ColumnSum, "tiles": TiledBackward}
"""Scratch that grows in steps."""
SIZES = 2
"""How many of their fields differ from shape to shape, the first ones; the others are constants."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rounding:
    """How a grid is rounded: up to multiples of ``up``; then to multiples of ``coarse``, up or down."""

    up: int = 1
    coarse: int = 1
    down: bool = False

    def __call__(self, side: int) -> tuple[int, int]:
        """The side rounded up, and that rounded again."""
        up = -(-side // self.up) * self.up
        return up, (up // self.coarse if self.down else -(-up // self.coarse)) * self.coarse

    def padding(self, height: int, width: int) -> int:
        """Index into :data:`PADDING`: what rounding up changes."""
        return bool(width % self.up) + 2 * bool(height % self.up)


ROUNDINGS = (
    Rounding(),
    *(Rounding(up) for up in (7, 8, 14, 16, 2, 4, 32, 28, 56)),
    *(Rounding(1, coarse, down) for down in (True, False) for coarse in (2, 4, 7, 8, 16)),
    *(Rounding(up, coarse, down) for up, coarse in ((7, 14), (7, 28), (8, 16), (16, 32)) for down in (False, True)),
)
"""Tried in this order; the first that explains every storage is taken."""


@dataclass(frozen=True)
class Shape:
    """Grid, channels and heads."""

    height: int
    width: int
    dim: int
    heads: int

    def spatial(self, rounding: Rounding) -> Array:
        """Every spatial monomial."""
        a, c = rounding(self.height)
        b, d = rounding(self.width)
        sides = dict(zip("1HWABCD", (1, self.height, self.width, a, b, c, d), strict=True))
        return np.array([np.prod([float(sides[letter]) for letter in name]) for name in SPATIAL])

    def channel(self) -> Array:
        """Every channel monomial."""
        dim, heads = float(self.dim), float(self.heads)
        return np.array((1.0, dim, heads, dim * dim, dim * dim / heads))

    def terms(self, rounding: Rounding) -> Array:
        """Every product of a spatial and a channel monomial."""
        return np.outer(self.spatial(rounding), self.channel()).ravel()


def table(shapes: Sequence[Shape], rounding: Rounding) -> Array:
    """The terms of every shape, a row each."""
    return np.array([shape.terms(rounding) for shape in shapes])


def identify(values: Array, terms: Array, thorough: bool = True) -> Array | None:
    """The factors of the one monomial, or of the two to four in the same channels, that are the values; None if none.

    Args:
        values: a size at each shape.
        terms: those of :func:`table`.
        thorough: whether to try more sums than the usual.
    """
    factors = np.zeros(terms.shape[1])
    if not values.any():
        return factors
    # A monomial that is 0 at some shape, as of a small grid rounded down, has no ratio there.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values[:, None] / terms
        spread = abs(ratios / ratios.mean(axis=0) - 1).max(axis=0)
    for place in np.flatnonzero(spread < EXACT):
        factors[place] = ratios[0, place]
        return factors
    for channel in range(len(CHANNEL)):
        places = np.arange(len(SPATIAL)) * len(CHANNEL) + channel
        found = _sum(values, terms[:, places], thorough)
        if found is not None:
            factors[places] = found
            return factors
    return None


def _sum(values: Array, terms: Array, thorough: bool) -> Array | None:
    # Monomials that are equal at all these shapes, as A and H where nothing is padded.
    _, first = np.unique(np.round(terms / terms.max(axis=0), 12), axis=1, return_index=True)
    allowed = sorted(map(int, first))
    more = (itertools.combinations(allowed, count) for count in (2, 3) if thorough)
    for places in itertools.chain(SUMS, *more):
        if len(places) + 2 > len(values):
            continue
        part = terms[:, places] / values[:, None]
        scale = part.max(axis=0)
        solved = np.linalg.lstsq(part / scale, np.ones(len(values)), rcond=None)[0]
        if abs(part / scale @ solved - 1).max() < EXACT:
            result = np.zeros(terms.shape[1])
            result[list(places)] = _significant(solved) / scale
            return result
    return None


def fit(values: Array, terms: Array) -> Array:
    """The factors, none negative, whose form is closest to the values in relative terms."""
    used = np.flatnonzero(values)
    factors = np.zeros(terms.shape[1])
    if len(used):
        part = terms[used] / values[used, None]
        scale = part.max(axis=0)
        factors = _significant(nnls(part / scale, np.ones(len(used)), maxiter=50 * part.shape[1])[0]) / scale
    return factors


def _significant(shares: Array) -> Array:
    """The largest share of each term in a value; 0 where it is what rounding leaves."""
    return np.where(abs(shares) < EXACT, 0, shares)


def as_form(factors: Array) -> list[list[float]]:
    """The factors that are not zero, as a form."""
    places = np.flatnonzero(abs(factors) > 1e-12)
    return [[float(f"{factors[k]:.9g}"), *divmod(int(k), len(CHANNEL))] for k in places]


def evaluate(forms: Sequence[Any], shape: Shape, rounding: Rounding) -> float:
    """The largest of several forms at a shape."""
    terms = shape.terms(rounding)

    def value(form: Sequence[Sequence[float]]) -> float:
        return float(sum(factor * terms[int(s) * len(CHANNEL) + int(c)] for factor, s, c in form))

    def whole(form: Any) -> float:
        if not isinstance(form, Mapping):
            return value(form)
        sizes = (round(value(size)) for size in form["sizes"])
        return value(form["alive"]) + STEPS[form["rule"]](*sizes, *form["constants"]).scratch()

    return max(map(whole, forms))
