"""The commands as functions, and a small case."""

from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugins"
SMALL = ("--height", "8", "--width", "8", "--dim", "8", "--num-heads", "2", "--n-win", "2", "--topk", "1")
Main = Callable[[Sequence[str]], int]


def outcome(main: Main, arguments: Sequence[str]) -> int:
    """The exit status, also if argparse raises SystemExit, as after --help."""
    try:
        return main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)
