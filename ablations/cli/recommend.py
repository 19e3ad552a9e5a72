"""The command line of ``python -m ablations recommend``."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ablations.analysis import abilities, model_candidates, recommend_page
from ablations.analysis.candidates import Candidate
from ablations.analysis.recommend import Limits, Predicted, Question, judge, predict, resolve
from ablations.analysis.time_candidates import Timed, time_best
from ablations.analysis.units import BYTES, MILLISECONDS, amount
from ablations.cli.progress import progress
from ablations.harness.results_store import check_results_folder
from attention_zoo import MODELS, InvalidOption, load_plugin
from profiling.cases.case import CHOICES, Case
from profiling.cli.arguments import Parser, integer

EXAMPLES = """examples:
  python -m ablations recommend --height 512 --width 512 --memory 8GiB
  python -m ablations recommend --height 96 --width 160 --dim 96 --num-heads 3 \\
      --memory 1GiB --measure 8
  python -m ablations recommend --height 56 --width 56 --memory 1GiB \\
      --needs recall,offset
  python -m ablations recommend --model biformer_stl --height 512 --width 512 \\
      --memory 8GiB --mode forward_backward
  python -m ablations recommend --height 56 --width 56 --memory 1GiB \\
      --latency 5ms --mode forward_backward --json
  python -m ablations recommend --height 128 --width 128 --memory 24GiB \\
      --dtype bf16 --device cuda --plugin my.py
"""
DESCRIPTION = """\
Which attentions and options fit your grid, memory and time, best first: by
latency where it is known, then by MACs. Memory and MACs are predicted for
exactly this grid, results or not. Latency is what the results of the device
hold for the same cell, or interpolated (log-log) between two measured grids of
the same shape, never beyond them. With --latency, what fits in memory and was
never timed is listed apart, with the command that times it. A grid that n_win
does not divide is padded, and marked so. Exits with 1 if nothing fits.

With --needs, those that learned these tasks best come first: ranked by the
worst of their accuracies in the capability sweep (small networks, small grid),
in steps of 5 %, then as above. What was not trained comes last.

With --measure, the best of them are timed here first, one after the other and
each in a process of its own, correct before timed. Their rows are kept in
results/<device>/recommend.csv, and used by every later recommendation.

With --model, the candidates are that model with each attention in all of its
stages, and where that needs too much, from a later stage on: with the published
attention before it, or if that does not fit either, with the lightest.
"""
SIZES = {"dim": 64, "num_heads": 2}
"""Defaults of an attention's size."""
DEFAULT_SECONDS = 60.0


def add(command: Parser, begin: float) -> None:
    """Add the arguments of ``python -m ablations recommend``, which began at monotonic time ``begin``."""
    command.description, command.epilog = DESCRIPTION, EXAMPLES
    command.add_argument("--model", metavar="NAME", help=f"a whole model: {', '.join(MODELS)}")
    for name in ("height", "width"):
        command.add_argument(f"--{name}", type=integer, required=True, metavar="N", help="tokens, or pixels of a model")
    for name, default in SIZES.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=integer, metavar="N", help=f"(default: {default}; a model has its own)")
    command.add_argument("--batch", type=integer, default=1, metavar="N", help="(default: 1)")
    command.add_argument("--memory", required=True, metavar="SIZE", help=f"such as 8GiB; units: {', '.join(BYTES)}")
    command.add_argument("--latency", metavar="TIME", help=f"such as 5ms; units: {', '.join(MILLISECONDS)}")
    command.add_argument("--mode", choices=CHOICES["mode"], default="forward", help="(default: forward)")
    dtypes = f"{', '.join(CHOICES['dtype'])} (default: fp32)"
    command.add_argument("--dtype", choices=CHOICES["dtype"], default="fp32", metavar="DTYPE", help=dtypes)
    message = "rank by what was learned: tasks of the capability sweep, such as recall,offset"
    command.add_argument("--needs", metavar="TASK,...", default="", help=message)
    message = "cpu, cuda, auto (cuda if there is one; the default), or a folder of --results"
    command.add_argument("--device", default="auto", metavar="DEVICE", help=message)
    message = "time the N best here; without N, as many as --seconds allow"
    command.add_argument("--measure", type=integer, nargs="?", const=math.inf, metavar="N", help=message)
    message = f"with --measure: answer within so long, predictions included (default: {DEFAULT_SECONDS:g})"
    command.add_argument("--seconds", type=float, metavar="S", help=message)
    command.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    command.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours"
    )
    command.add_argument(
        "--top", type=integer, default=10, metavar="N", help="rows to show of each table (default: 10)"
    )
    command.add_argument("--json", action="store_true", help="print JSON on stdout")
    command.set_defaults(run=_run, begin=begin)


def _run(args: argparse.Namespace) -> int:
    asked = _question(args)
    predicted = _predict(asked)
    timed = None
    if args.measure is not None:
        timed = _time(args, asked, predicted)
        asked = replace(asked, device=timed.device)
    answer = judge(predicted, asked)
    if args.json:
        print(json.dumps(recommend_page.as_json(answer, asked, timed), indent=2))
    else:
        recommend_page.show(answer, asked, Console(), args.top, timed)
    return 0 if answer.fits or answer.unknown else 1


def _predict(asked: Question) -> list[Predicted]:
    console = Console(stderr=True)
    columns = (TextColumn("predicting"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("")
        return predict(asked, lambda done, total: bar.update(task, completed=done, total=total))


def _time(args: argparse.Namespace, asked: Question, predicted: list[Predicted]) -> Timed:
    check_results_folder(args.results)
    with progress() as tell:

        def show(number: int, total: int, left: float, candidate: Candidate) -> None:
            what = f"{recommend_page.label(candidate)} {candidate.case.impl}"
            tell(number, total, f"{left:.0f} s left: {what}", f"[{number + 1}/{total}] ")

        seconds = args.seconds or DEFAULT_SECONDS
        return time_best(
            predicted,
            asked,
            None if args.measure == math.inf else args.measure,
            seconds,
            args.begin,
            args.results,
            show,
        )


def _question(args: argparse.Namespace) -> Question:
    _check(args)
    size = _size(args)
    limits = Limits(amount(args.memory, BYTES), args.latency and amount(args.latency, MILLISECONDS))
    for plugin in args.plugin:
        load_plugin(plugin)
    plugins = tuple(str(Path(plugin).resolve()) for plugin in args.plugin)
    needs = tuple(dict.fromkeys(word.strip() for word in args.needs.split(",") if word.strip()))
    known = abilities.read(args.results) if needs else None
    if known is not None:
        known.needed(needs)
    asked = Question(size, limits, resolve(args.device, args.results), plugins, needs, known)
    if args.measure is not None and not asked.device.here:
        name = asked.device.name or f"a {asked.device.kind} device"
        raise InvalidOption(f"--measure: {name} is not on this machine; valid here: --device auto")
    return asked


def _check(args: argparse.Namespace) -> None:
    """InvalidOption if a flag has an invalid value, or is not for this request."""
    for flag, value in (("--top", args.top), ("--measure", 1 if args.measure is None else args.measure)):
        if value < 1:
            raise InvalidOption(f"{flag} {value} is not valid; valid: an integer >= 1")
    if args.needs and args.model is not None:
        raise InvalidOption("--needs is for one attention: networks of one attention were trained, not models")
    if args.seconds is not None and (args.measure is None or not 0 < args.seconds < float("inf")):
        raise InvalidOption(f"--seconds {args.seconds:g} is not valid; valid: a number above 0, with --measure")
    if not args.results.is_dir() and args.results != Path("results") and args.measure is None:
        raise InvalidOption(f"--results {args.results}: no such folder")


def _size(args: argparse.Namespace) -> Case:
    shared = {"mode": args.mode, "dtype": args.dtype, "batch": args.batch}
    if args.model is not None:
        if any(getattr(args, name) is not None for name in SIZES):
            raise InvalidOption("--dim and --num-heads are for one attention; a model has its own in each stage")
        size = Case(args.model, args.height, args.width, None, None, kind="model", **shared)
        model_candidates.grids(size)
        return size
    dim, heads = (default if getattr(args, name) is None else getattr(args, name) for name, default in SIZES.items())
    size = Case("full", args.height, args.width, dim, heads, **shared)
    # Reject heads that do not divide the channels here, instead of once per candidate.
    replace(size, height=1, width=1, mode="forward").workload("meta")
    return size
