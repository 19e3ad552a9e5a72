"""Options of an attention, derived from the signature of its class: names, types, defaults, valid values.

``window_size: AtLeast1 = 7`` declares an option with a default and a range; ``mode: Literal["a", "b"] = "a"``
declares one with a list of choices.
"""

import argparse
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from attention_zoo.core.base import InvalidOption

NOT_OPTIONS = ("self", "dim", "num_heads", "impl")


class Range(NamedTuple):
    """Valid values of a number, both ends included; for use in ``Annotated[int, Range(1)]``."""

    low: float
    high: float = float("inf")


AtLeast0 = Annotated[int, Range(0)]
AtLeast1 = Annotated[int, Range(1)]


class _Alternative(NamedTuple):
    kind: type
    literal: Any = None
    range: Range = Range(float("-inf"))

    def admits(self, value: Any) -> bool:
        if self.literal is not None:
            return value == self.literal and type(value) is self.kind
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            return False
        return not isinstance(value, (int, float)) or self.range.low <= value <= self.range.high

    def __str__(self) -> str:
        if self.literal is not None:
            return str(self.literal)
        if self.kind is type(None):
            return "none"
        if self.kind is bool:
            return "true, false"
        name = {int: "an integer", float: "a number"}.get(self.kind, f"a {self.kind.__name__}")
        low, high = self.range
        return name + (f" >= {low:g}" if low > float("-inf") else "") + (f" <= {high:g}" if high < float("inf") else "")


@dataclass(frozen=True)
class Option:
    """One option: its name, its default and its valid values."""

    name: str
    default: Any
    alternatives: tuple[_Alternative, ...]

    def describe(self) -> str:
        """The valid values in words."""
        return ", ".join(map(str, self.alternatives)) or "any"

    def check(self, value: Any) -> None:
        """Raise InvalidOption unless ``value`` is valid."""
        if self.alternatives and not any(a.admits(value) for a in self.alternatives):
            raise InvalidOption(f"{self.name}={value!r} is not valid; valid: {self.describe()}")

    def parse(self, text: str) -> Any:
        """Parse ``text`` from a command line or a CSV cell; InvalidOption if it is not valid."""
        for alternative in self.alternatives or (_Alternative(str),):
            try:
                value = _read(alternative, text)
            except ValueError:
                continue
            if alternative.admits(value):
                return value
        raise InvalidOption(f"{self.name}={text!r} is not valid; valid: {self.describe()}")


def options_of(cls: type) -> dict[str, Option]:
    """The options that ``cls`` takes beyond dim and num_heads, in the order of its signature."""
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    return {
        name: Option(
            name,
            None if parameter.default is parameter.empty else parameter.default,
            tuple(_alternatives(hints.get(name, Any))),
        )
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in NOT_OPTIONS and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def takes_any(cls: type) -> bool:
    """Whether the class takes ``**options`` of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())


def argument_type(option: Option) -> Callable[[str], Any]:
    """An argparse ``type`` for the option, which reports invalid values with the option's own message."""

    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except InvalidOption as problem:
            # argparse passes on the message of this exception only.
            raise argparse.ArgumentTypeError(str(problem)) from None

    return parse


def _alternatives(hint: Any) -> list[_Alternative]:
    if hint is Any:
        return []
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *extras = get_args(hint)
        ranges = [extra for extra in extras if isinstance(extra, Range)]
        return [a._replace(range=ranges[0]) if ranges else a for a in _alternatives(inner)]
    if origin is Literal:
        return [_Alternative(type(value), value) for value in get_args(hint)]
    if origin in (Union, types.UnionType):
        return [a for part in get_args(hint) for a in _alternatives(part)]
    return [_Alternative(hint)] if isinstance(hint, type) else []


def _read(alternative: _Alternative, text: str) -> Any:
    if alternative.kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if alternative.kind is type(None):
        return None if text.lower() in ("none", "") else text
    return alternative.kind(text)
