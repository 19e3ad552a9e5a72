"""Work on results: ``python -m ablations --help``."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import ablations
from ablations.analysis import interleave, interleave_process, readme_table
from ablations.analysis.compare import compare, read
from ablations.analysis.compare_page import as_json, markdown, show
from ablations.analysis.convert import convert, result_files
from ablations.cli import lattice, recommend
from ablations.gpu_visit import visit
from ablations.harness import static_analysis_cache
from ablations.harness.devices import LaunchError
from ablations.harness.results_store import StoreError
from ablations.harness.sweep import select
from attention_zoo import InvalidOption
from profiling.cases.case import CHOICES
from profiling.cli.arguments import Parser, run_reporting
from profiling.execution import subprocess_runner
from profiling.execution.benchmark import Job
from profiling.execution.subprocess_runner import StartError

RESULTS = Path("results")
COMPARE = """examples:
  python -m ablations compare results/intel-xeon-2-threads /tmp/again
  python -m ablations compare before.csv after.csv --markdown > comment.md
  python -m ablations compare --interleave --help      two variants in turn
"""
TABLE = """examples:
  python -m ablations table README.md          rewrite the table in the README
  python -m ablations table > attentions.md
  python -m ablations table attention_zoo/attentions/README.md    equations
"""
PREPARE = """examples:
  python -m ablations prepare --device cuda --out static_analysis.json   here, without a GPU
  python run_all.py --device cuda --static-analysis static_analysis.json          there
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 1 if B is worse than A or nothing fits, 2 if the input is wrong."""
    begin = ablations.STARTED if arguments is None else time.monotonic()
    return run_reporting(
        lambda: _run(list(sys.argv[1:] if arguments is None else arguments), begin),
        StartError, LaunchError, StoreError, interleave_process.SideError,
    )  # fmt: skip


def _run(arguments: list[str], begin: float) -> int:
    if arguments[:1] == ["compare"] and "--interleave" in arguments:
        # Its other flags are those of the profiler.
        return interleave.main([word for word in arguments[1:] if word != "--interleave"])
    parser = Parser(
        prog="python -m ablations", epilog=COMPARE + (recommend.EXAMPLES + TABLE).replace("examples:\n", "")
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_compare(commands.add_parser("compare", help="FASTER, SAME, SLOWER or UNCLEAR, cell by cell", epilog=COMPARE))
    recommend.add(commands.add_parser("recommend", help="which attentions fit a grid, a memory and a latency"), begin)
    _add_table(commands.add_parser("table", help="the table of attentions of the README", epilog=TABLE))
    _add_prepare(commands.add_parser("prepare", help="count and predict the cells of a run elsewhere", epilog=PREPARE))
    lattice.add(commands.add_parser("lattice", help="memory and MACs at any shape, for the explorer's page"))
    _add_convert(commands.add_parser("convert", help="bring result files of an older schema up to date, in place"))
    visit.add(commands.add_parser("gpu_visit", help="all that is worth measuring on a GPU in minutes"))
    given = parser.parse_args(arguments)
    return given.run(given)


def _add_compare(command: Parser) -> None:
    command.add_argument("a", type=Path, metavar="A", help="results folder or CSV: the run to compare with")
    command.add_argument("b", type=Path, metavar="B", help="results folder or CSV: the run to judge")
    message = "instead of two runs, measure two variants in turn; --interleave --help says more"
    command.add_argument("--interleave", action="store_true", help=message)
    command.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    command.add_argument("--json", action="store_true", help="print JSON on stdout")
    command.set_defaults(run=_compare)


def _compare(given: argparse.Namespace) -> int:
    result = compare(read(given.a), read(given.b))
    if given.json:
        print(json.dumps(as_json(result), indent=2))
    elif given.markdown:
        print(markdown(result))
    else:
        show(result, Console())
    return 1 if result.worse else 0


def _add_table(command: Parser) -> None:
    message = "rewrite the table between its two comments in this file (default: print it)"
    command.add_argument("page", type=Path, nargs="?", metavar="PAGE", help=message)
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results")
    command.set_defaults(run=_table)


def _table(given: argparse.Namespace) -> int:
    if given.page is None:
        print(readme_table.markdown(given.results), end="")
    else:
        changed = readme_table.rewrite(given.page, given.results)
        print(f"{given.page}: {'rewritten' if changed else 'up to date'}", file=sys.stderr)
    return 0


def _add_prepare(command: Parser) -> None:
    command.add_argument("--device", choices=CHOICES["device"], default="cuda", help="of that run (default: cuda)")
    command.add_argument("--only", metavar="SWEEP,...", help="these sweeps instead of all")
    command.add_argument(
        "--out", type=Path, default=Path("static_analysis.json"), metavar="FILE", help="default: static_analysis.json"
    )
    command.set_defaults(run=_prepare)


def _prepare(given: argparse.Namespace) -> int:
    jobs = [Job(case) for sweep in select(given.only).values() for case in sweep.cases(given.device)]
    subprocess_runner.start()
    known = static_analysis_cache.counted(jobs, timeout=300.0, environment={})
    static_analysis_cache.save(given.out, known)
    failed = [f"{case}: {outcome.reason}" for case, outcome in known.items() if outcome.status != "ok"]
    for line in failed:
        print(line, file=sys.stderr)
    print(f"{given.out}: the static analysis of {len(known) - len(failed)} cases; {len(failed)} could not be counted")
    return 0


def _add_convert(command: Parser) -> None:
    command.add_argument("path", type=Path, metavar="DIR", help="results folder or CSV")
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    files = list(result_files(args.path))
    if not files:
        raise InvalidOption(f"{args.path}: no results there; give a results folder or a CSV that run_all.py wrote")
    converted = 0
    for path in files:
        if convert(path):
            converted += 1
            print(f"{path}: converted")
    print(f"{converted} of {len(files)} files converted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
