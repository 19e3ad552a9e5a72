"""Work on results: ``python -m ablations --help``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ablations.compare import compare, markdown, read, show
from profiling.arguments import Parser, run_reporting

EXAMPLES = """examples:
  python -m ablations compare results/intel-xeon-2-threads /tmp/again
  python -m ablations compare before.csv after.csv --markdown > comment.md
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 if B is worse than A, 2 if the input is wrong, else 0."""
    return run_reporting(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    parser = Parser(prog="python -m ablations", epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    command = commands.add_parser("compare", help="FASTER, SAME, SLOWER or AMBIGUOUS, cell by cell", epilog=EXAMPLES)
    command.add_argument("a", type=Path, metavar="A", help="results folder or CSV: the run to compare with")
    command.add_argument("b", type=Path, metavar="B", help="results folder or CSV: the run to judge")
    command.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    given = parser.parse_args(arguments)
    found = compare(read(given.a), read(given.b))
    if given.markdown:
        print(markdown(found))
    else:
        show(found, Console())
    return 1 if found.worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
