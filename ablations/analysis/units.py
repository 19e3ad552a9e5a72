"""Amounts with units, as people write and read them: 8GiB, 5ms, 1.2 G."""

import math
import re
from collections.abc import Mapping

from attention_zoo import InvalidOption

BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


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


def short(count: int) -> str:
    """Format a count with three digits and a unit: M, G or T."""
    unit, scale = next((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1)) if count >= s or not u)
    value = count / scale
    return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
