"""The parser of every command line of this project."""

import argparse
from typing import Any, NoReturn

from attention_zoo.core.base import InvalidOption


class Parser(argparse.ArgumentParser):
    """A parser that raises InvalidOption instead of printing its usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"] and action.option_strings:
            # From --flag=--, which Python 3.11 turns into an empty list.
            raise argparse.ArgumentError(action, "expected a value, not --")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise InvalidOption; for an unknown flag, list the valid flags."""
        if message.startswith("unrecognized arguments"):
            flags = [a.option_strings[0] for a in self._actions if a.option_strings and a.help != argparse.SUPPRESS]
            message += f"; valid: {', '.join(flags)}"
        raise InvalidOption(message)
