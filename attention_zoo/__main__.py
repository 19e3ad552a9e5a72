"""Draw what an attention attends to: ``python -m attention_zoo --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attention_zoo import InvalidOption, load_plugin, names, options
from attention_zoo.core.arguments import Parser
from attention_zoo.core.options import Option, argument_type
from attention_zoo.models.biformer import MODELS
from attention_zoo.models.checkpoint import load_model
from attention_zoo.visualize import receptive_field

EXAMPLES = """examples:
  python -m attention_zoo axial                    what a query depends on
  python -m attention_zoo bra --query 0.4,0.5      where BRA routes it, by topk
  python -m attention_zoo bra --image cat.jpg --query 120,80 --n-win 8 --topk 4
  python -m attention_zoo bra --image cat.jpg --query 120,80 --stage 2 \\
      --model biformer_small --weights biformer_small.pth
  python -m attention_zoo gallery --output results/figures/reach.png
  python -m attention_zoo bra --help               the options of one attention
"""
DESCRIPTION = """Draw what a query depends on, over a picture: every position that its output
has a gradient to. For bra with --query or --weights: the regions that the
query's region is routed to, for several topk, by colour and gradients or by a
trained model. Prints the name of the file it writes."""
QUERY = "0.37,0.44"
ROUTES = "results/figures/routes.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 0, or 2 with one line on stderr for invalid input."""
    try:
        print(_run(list(sys.argv[1:] if arguments is None else arguments)))
    except (InvalidOption, OSError) as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except ImportError as problem:
        print(f"error: {problem}; drawing needs pip install '.[notebooks]'", file=sys.stderr)
        return 2
    return 0


def _run(arguments: list[str]) -> Path:
    parser, declared = _parser(arguments)
    args = parser.parse_args(arguments)
    chosen = {name: getattr(args, name) for name in declared if hasattr(args, name)}
    _check(args)
    picture = receptive_field.read_image(args.image) if args.image is not None else receptive_field.sample_image()
    query = _pixel(QUERY if args.query is None else args.query, picture)
    if args.name == "bra" and (args.query is not None or args.weights is not None):
        return _routes(args, picture, query, chosen)
    if args.name == "gallery":
        return receptive_field.gallery(picture, query, args.output or "gallery.png")
    return receptive_field.save(args.name, picture, query, args.output or f"{args.name}.png", **chosen)


def _routes(
    args: argparse.Namespace, picture: Float[Tensor, "3 h w"], query: tuple[int, int], chosen: dict[str, Any]
) -> Path:
    from attention_zoo.visualize import route_figure, routes

    if args.weights is None:
        result = routes.by_appearance(picture, query, **chosen)
    else:
        topk = chosen.pop("topk", None)
        model = load_model(args.model, args.weights, impl="auto", **chosen)
        stage, block = (default if n is None else n for n, default in ((args.stage, 3), (args.block, 1)))
        result = routes.of_model(model, picture, query, stage, block, topk)
    path = route_figure.save(result, picture, query, args.output or ROUTES)
    print(f"routes {result.source}", file=sys.stderr)
    return path


def _parser(arguments: list[str]) -> tuple[Parser, list[str]]:
    """The parser for the chosen attention, and the names of its options."""
    first = Parser(add_help=False)
    first.add_argument("--plugin", action="append", default=[])
    for plugin in first.parse_known_args(arguments)[0].plugin:
        load_plugin(plugin)
    # A missing or unknown name is rejected later, by the full parser or by _check.
    chosen = next((word for word in arguments if word in names()), None)
    declared = options(chosen) if chosen else {}
    parser = Parser(
        prog="python -m attention_zoo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    _add_common(parser)
    if chosen:
        _add_options(parser, chosen, declared)
    return parser, list(declared)


def _add_options(parser: Parser, name: str, declared: dict[str, Option]) -> None:
    group = parser.add_argument_group(f"options of {name}")
    taken = {flag for action in parser._actions for flag in action.option_strings}
    for option in declared.values():
        flag = f"--{option.name.replace('_', '-')}"
        if flag in taken:
            valid = ", ".join(sorted(taken))
            raise InvalidOption(f"option {option.name!r} of {name!r} has the name of a flag; taken: {valid}")
        text = f"{option.describe()} (default: {option.default})".replace("%", "%%")
        group.add_argument(
            flag, type=argument_type(option), metavar=option.name.upper().rsplit("_")[-1], default=argparse.SUPPRESS,
            nargs="?" if option.default is False else None, const=True if option.default is False else None, help=text,
        )  # fmt: skip


def _add_common(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"gallery, or one of: {', '.join(names())}")
    parser.add_argument("--image", metavar="FILE", help="a picture of yours (default: a photograph of Grace Hopper)")
    text = "row and column: whole pixels of the picture, or fractions of its sides if both are at most 1"
    parser.add_argument("--query", metavar="Y,X", help=f"{text} (default: {QUERY}; if given, bra draws routes)")
    parser.add_argument("--output", metavar="FILE", help=f"where to save (default: NAME.png; routes: {ROUTES})")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours")
    group = parser.add_argument_group("routes of a trained model, for bra")
    group.add_argument("--weights", metavar="FILE", help="its checkpoint, loaded without running code of it")
    group.add_argument("--model", metavar="NAME", help=f"one of: {', '.join(MODELS)}")
    group.add_argument("--stage", type=int, metavar="N", help="counted from 1 (default: 3)")
    group.add_argument("--block", type=int, metavar="M", help="counted from 1 (default: 1)")


def _check(args: argparse.Namespace) -> None:
    if args.name not in (*names(), "gallery"):
        raise InvalidOption(f"unknown attention {args.name!r}; valid: gallery, {', '.join(names())}")
    trained = [f"--{flag}" for flag in ("weights", "model", "stage", "block") if getattr(args, flag) is not None]
    if trained and args.name != "bra":
        raise InvalidOption(f"{trained[0]} is about routes, which {args.name!r} has none of; valid: bra")
    if args.weights is not None and args.model is None:
        raise InvalidOption(f"--weights needs --model; valid: {', '.join(MODELS)}")
    if trained and args.weights is None:
        raise InvalidOption(f"{trained[0]} needs --weights, a checkpoint: without one, a model's routes are random")
    if args.output is not None:
        receptive_field.check_format(args.output)


def _pixel(text: str, picture: Float[Tensor, "3 h w"]) -> tuple[int, int]:
    """The pixel given by ``--query``."""
    height, width = picture.shape[1:]
    valid = f"valid: two whole pixels Y,X from 0,0 to {height - 1},{width - 1}, or two fractions from 0 to 1"
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise InvalidOption(f"--query {text!r} is not valid; {valid}") from None
    if 0 <= y <= 1 and 0 <= x <= 1:
        return min(int(y * height), height - 1), min(int(x * width), width - 1)
    if not (y.is_integer() and x.is_integer() and 0 <= y < height and 0 <= x < width):
        raise InvalidOption(f"--query {text} is not in the {height} x {width} picture; {valid}")
    return int(y), int(x)


if __name__ == "__main__":
    raise SystemExit(main())
