"""Draw what an attention attends to: ``python -m attention_zoo --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attention_zoo import InvalidOption, draw, load_plugin, names, options

EXAMPLES = """examples:
  python -m attention_zoo axial                          axial.png
  python -m attention_zoo bra --topk 8 --query 20,30     the options of the attention are flags
  python -m attention_zoo gallery --out results/figures/reach.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, or 2 with one line on stderr if the input is wrong."""
    try:
        print(_run(list(sys.argv[1:] if arguments is None else arguments)))
    except InvalidOption as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise InvalidOption(message)


def _run(arguments: list[str]) -> Path:
    parser = _Parser(
        prog="python -m attention_zoo",
        description="Draw which positions a query's output depends on, over a picture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help=f"gallery, or one of: {', '.join(names())}")
    parser.add_argument("--image", metavar="FILE", help="a picture of yours (default: a photograph of Grace Hopper)")
    parser.add_argument("--query", metavar="Y,X", default="20,24", help="position in the 56 x 56 grid (default: 20,24)")
    parser.add_argument("--out", metavar="FILE", help="where to save (default: NAME.png)")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours")
    given, rest = parser.parse_known_args(arguments)
    for plugin in given.plugin:
        load_plugin(plugin)
    picture = draw.read_image(given.image) if given.image else draw.sample_image()
    out = given.out or f"{given.name}.png"
    if given.name == "gallery":
        if rest:
            raise InvalidOption(f"gallery takes no option {rest[0]!r}")
        return draw.gallery(picture, _query(given.query), out)
    return draw.save(given.name, picture, _query(given.query), out, **_options(given.name, rest))


def _options(name: str, rest: list[str]) -> dict[str, object]:
    declared = options(name)
    parser = _Parser(allow_abbrev=False, prog=name)
    for option in declared.values():
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=option.parse, default=argparse.SUPPRESS)
    chosen, unknown = parser.parse_known_args(rest)
    if unknown:
        raise InvalidOption(f"{name!r} has no option {unknown[0]!r}; valid: {', '.join(declared) or 'none'}")
    return vars(chosen)


def _query(text: str) -> tuple[int, int]:
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise InvalidOption(f"--query {text!r} is not valid; valid: two integers Y,X") from None
    if not (0 <= y < draw.GRID and 0 <= x < draw.GRID):
        raise InvalidOption(f"--query {text} is not valid; valid: 0 to {draw.GRID - 1} for both")
    return y, x


if __name__ == "__main__":
    raise SystemExit(main())
