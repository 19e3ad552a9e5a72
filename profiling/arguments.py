"""Command lines that answer bad input with one line."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from attention_zoo import InvalidOption, Unsupported
from profiling.rows import SchemaError


class Parser(argparse.ArgumentParser):
    """A parser that raises InvalidOption instead of printing its usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"] and action.option_strings:
            # As in --flag=--, of which Python 3.11 makes an empty list.
            raise argparse.ArgumentError(action, "expected a value, not --")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise the message, with the valid flags where a flag was not one of them."""
        if message.startswith("unrecognized arguments"):
            flags = [a.option_strings[0] for a in self._actions if a.option_strings and a.help != argparse.SUPPRESS]
            message += f"; valid: {', '.join(flags)}"
        raise InvalidOption(message)


def integer(text: str) -> int:
    """The value of a flag that takes an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def run_reporting(run: Callable[[], int], *expected: type[Exception]) -> int:
    """Call ``run``; what the user can mend becomes one line on stderr and exit status 2.

    ``expected`` are exceptions to treat so, beside InvalidOption, Unsupported, SchemaError and OSError.
    """
    mendable: tuple[type[Exception], ...] = (InvalidOption, Unsupported, SchemaError, OSError, *expected)
    try:
        return run()
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except mendable as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept, and the same command goes on from there", file=sys.stderr)
        return 130
