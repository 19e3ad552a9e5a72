"""Command lines that report invalid input in one line."""

import argparse
import io
import sys
from collections.abc import Callable

from attention_zoo import InvalidOption, Unsupported
from attention_zoo.core.arguments import Parser
from profiling.schema.row import SchemaError

__all__ = ["Parser", "integer", "run_reporting"]


def integer(text: str) -> int:
    """The value of a flag that takes an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def run_reporting(run: Callable[[], int], *expected: type[Exception]) -> int:
    """Call ``run``; errors that the user can fix become one line on stderr and exit status 2.

    These are InvalidOption, Unsupported, SchemaError, OSError and the exceptions in ``expected``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character, such as rich's ellipsis in ASCII, is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    mendable: tuple[type[Exception], ...] = (InvalidOption, Unsupported, SchemaError, OSError, *expected)
    try:
        return run()
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except SystemExit as ending:
        # Rich exits with 1 when the reader of stdout has gone; here 1 is a verdict.
        if isinstance(ending.__context__, BrokenPipeError):
            return 0
        raise
    except mendable as problem:
        print(f"error: {' '.join(_words(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept, and the same command goes on from there", file=sys.stderr)
        return 130


def _words(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem)
