"""MACs of custom operators, for fvcore, which counts unregistered operators as zero."""

from collections.abc import Callable
from typing import Any

Formula = Callable[[list[Any], list[Any]], int]
"""Maps the inputs and outputs of a traced call (``torch.jit`` values) to MACs."""
OPERATOR_MACS: dict[str, Formula] = {}
"""Formulas by operator name, such as ``library::operator``; filled by the attention that defines the operator."""


def sizes(value: Any) -> list[int]:
    """The shape of a traced tensor; empty for other values."""
    return value.type().sizes() if value.isCompleteTensor() else []
