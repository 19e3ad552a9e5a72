"""The command line of run_all.py."""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.analysis import run_summary
from ablations.capability.launcher import CapabilityLauncher
from ablations.capability.sweep import CapabilitySweep
from ablations.capability.sweep import discover as discover_trained
from ablations.cli import run_capability
from ablations.cli.progress import progress
from ablations.harness.devices import LaunchError
from ablations.harness.local_runner import Launcher, Settings
from ablations.harness.results_store import StoreError, check_results_folder
from ablations.harness.sweep import Sweep
from ablations.slurm import sbatch
from ablations.slurm.driver import Campaign
from attention_zoo import InvalidOption, load_plugin
from profiling.cli.arguments import Parser, run_reporting
from profiling.execution.environment import check_device
from profiling.execution.subprocess_runner import StartError

EXAMPLES = """examples:
  python run_all.py                               all sweeps on this machine
  python run_all.py --smoke --results /tmp/try    all of it, small, in a minute
  python run_all.py --full                        to the published depth
  python run_all.py --only resolution --dry-run   what would run, and fit
  python run_all.py --plugin my_attention.py      your own beside the others
  python run_all.py --device cuda --gpus 0,2      on two GPUs of this machine
  python run_all.py --device cuda --minutes 9     what fits, each case once first
  python run_all.py --launcher slurm --slurm partition=gpu,gpus_per_node=1
                                                  on a cluster, as 8 tasks

On Slurm, the same command finds its tasks again if it was ended meanwhile.
"""

FEWEST_CELLS = 5
"""Number of finished cells from which the remaining time is estimated."""
SMOKE_TIMEOUT = 20.0
"""Time limit of a cell in seconds with --smoke."""


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status: 0, or 2 with one line on stderr if the input is wrong."""
    return run_reporting(lambda: _run(_parse(arguments)), StoreError, LaunchError, StartError)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="run_all.py",
        description="Sweep attentions over resolutions and options; write tidy CSVs.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--only", metavar="SWEEP,...", help="these sweeps instead of all that measure")
    parser.add_argument("--smoke", action="store_true", help="few, small cells; seconds instead of minutes")
    parser.add_argument("--list", action="store_true", help="name the sweeps and their questions, and stop")
    parser.add_argument("--dry-run", action="store_true", help="show every cell with its predicted memory, and stop")
    parser.add_argument("--json", action="store_true", help="print --list or --dry-run as JSON on stdout")
    parser.add_argument("--fresh", action="store_true", help="start anew; old files are kept beside")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again too")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours")
    parser.add_argument(
        "--gpus", metavar="N,...", type=_numbers, default=(), help="these GPUs, as nvidia-smi numbers them"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=math.inf,
        metavar="N",
        help="begin no cell after so long; run again to go on",
    )
    parser.add_argument(
        "--replicates",
        type=_at_least_one,
        metavar="N",
        help="processes for each case, or seeds for each training; default: as the sweep says",
    )
    parser.add_argument("--full", action="store_true", help="as published: more cells and samples, 3 processes a case")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="give a cell up after S seconds; 20 with --smoke",
    )
    parser.add_argument(
        "--static-analysis",
        type=Path,
        metavar="FILE",
        help="what python -m ablations prepare has counted; the rest is counted",
    )
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="where cells run; default: local"
    )
    parser.add_argument(
        "--slurm", metavar="KEY=VALUE,...", default="", help="options of sbatch, the time in minutes; default: time=60"
    )
    parser.add_argument("--shards", type=_at_least_one, default=8, metavar="N", help="tasks on Slurm; default: 8")
    options = parser.parse_args(arguments)
    if options.launcher == "local" and options.slurm:
        raise InvalidOption("--slurm is for --launcher slurm")
    if options.launcher == "slurm" and (options.gpus or options.dry_run or options.minutes < math.inf):
        raise InvalidOption(
            "--gpus, --minutes and --dry-run are for --launcher local; on Slurm, --slurm gpus_per_node=1,time=60 asks "
            "for GPUs and minutes"
        )
    return options


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; valid: such as 0,2")
    return tuple(int(part) for part in text.split(","))


def _seconds(text: str) -> float:
    return _minutes(text, "seconds")


def _minutes(text: str, unit: str = "minutes") -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; valid: a number of {unit} above 0")
    return minutes


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; valid: an integer >= 1")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    for plugin in options.plugin:
        load_plugin(plugin)
    sweeps, trained = run_capability.select(options.only)
    trained = run_capability.adjusted(trained, options.full, options.replicates, options.timeout)
    sweeps = {name: _adjusted(sweep, options) for name, sweep in sweeps.items()}
    if options.json and not (options.list or options.dry_run):
        raise InvalidOption("--json is for --list and --dry-run; a run itself writes CSVs")
    if options.list:
        return _list(sweeps, trained if options.only else discover_trained(), options.json)
    args = sbatch.options(options.slurm)
    if options.device == "auto":
        there = sbatch.on_gpus(args) if options.launcher == "slurm" else not check_device("cuda")
        options.device = "cuda" if there else "cpu"
    settings = Settings(
        options.device, options.results, options.smoke, options.fresh, options.retry_failed,
        tuple(str(Path(plugin).resolve()) for plugin in options.plugin), options.gpus, options.minutes,
        options.static_analysis and options.static_analysis.resolve(),
    )  # fmt: skip
    if trained and options.launcher == "slurm":
        raise InvalidOption(f"--launcher slurm is not for {', '.join(trained)}; valid: --launcher local")
    if options.launcher == "slurm":
        check_results_folder(options.results)
        return _campaign(Campaign(settings, sweeps, args, options.shards))
    if reason := check_device(options.device):
        raise InvalidOption(f"--device {options.device}: {reason}; valid here: cpu, auto")
    if trained:
        check_results_folder(options.results)
        trainer = CapabilityLauncher(settings)
        if options.dry_run:
            return run_capability.dry_run(trainer, trained, options.json)
        return run_capability.run(trainer, trained)
    if options.dry_run:
        launcher = Launcher(settings)
        return _dry_run_json(launcher, sweeps) if options.json else _dry_run(launcher, sweeps)
    check_results_folder(options.results)
    return _measure(Launcher(settings), sweeps)


def _adjusted(sweep: Sweep, options: argparse.Namespace) -> Sweep:
    if options.full:
        sweep = sweep.in_full()
    timeout = options.timeout or (min(SMOKE_TIMEOUT, sweep.timeout) if options.smoke else sweep.timeout)
    return replace(sweep, replicates=options.replicates or sweep.replicates, timeout=timeout)


def _list(sweeps: dict[str, Sweep], trained: run_capability.Sweeps, as_json: bool) -> int:
    named: dict[str, Sweep | CapabilitySweep] = {**sweeps, **trained}
    if as_json:
        message = [
            {"sweep": name, "question": sweep.question, "expect": sweep.expect, "only_when_named": name in trained}
            for name, sweep in named.items()
        ]
        print(json.dumps(message, indent=2))
        return 0
    for name, sweep in named.items():
        print(f"{name}: {sweep.question}\n    expect: {sweep.expect}")
        if name in trained:
            print(f"    {run_capability.ONLY_WHEN_NAMED} {name}")
    return 0


def _dry_run(launcher: Launcher, sweeps: dict[str, Sweep]) -> int:
    console = Console()
    verdicts = {"measure": "run", "predicted": "predict only", "oom": "not fit"}
    cells = 0
    for name, sweep in sweeps.items():
        table = Table("cell", "predicted MiB", "will", title=name, title_justify="left", box=box.SIMPLE_HEAD)
        table.columns[1].justify = "right"
        with Console(stderr=True).status(f"counting {name}"):
            plan = list(launcher.plan(sweep))
        for case, columns, verdict in plan:
            size = columns.get("memory_predicted_bytes")
            will = columns.get("reason") or verdicts[verdict]
            table.add_row(escape(str(case)), "" if size is None else f"{size / 2**20:,.1f}", escape(will))
            cells += 1
        console.print(table)
    print(f"{cells} cells on {launcher.facts['device_name']}, {launcher.devices[0].available / 2**30:.1f} GiB free")
    return 0


def _dry_run_json(launcher: Launcher, sweeps: dict[str, Sweep]) -> int:
    cells = [
        {"sweep": name, "cell": str(case), "will": verdict} | columns
        for name, sweep in sweeps.items()
        for case, columns, verdict in launcher.plan(sweep)
    ]
    facts = {"device_name": launcher.facts["device_name"], "available_bytes": launcher.devices[0].available}
    print(json.dumps(facts | {"cells": cells}, indent=2, default=str))
    return 0


def _measure(launcher: Launcher, sweeps: dict[str, Sweep]) -> int:
    start, first = time.perf_counter(), 0.0
    with progress() as tell:
        for cell, number, total in launcher.run(sweeps):
            first = first or time.perf_counter()
            tell(number, total, f"{cell.sweep}: {cell.case}", f"[{number + 1}/{total}{_left(first, number, total)}] ")
    run_summary.show(launcher.report, time.perf_counter() - start)
    return 0


def _left(start: float, done: int, total: int) -> str:
    """Remaining time at the present rate; empty if too few cells are done for an estimate."""
    if done < FEWEST_CELLS:
        return ""
    seconds = (time.perf_counter() - start) / done * (total - done)
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def _campaign(campaign: Campaign) -> int:
    start = time.perf_counter()
    try:
        with progress() as tell:
            for state in campaign.run():
                tell(state.done, state.total, str(state), f"[{state.done}/{state.total}] ")
    except KeyboardInterrupt:
        print(f"the tasks go on without this; to end them: scancel --name={campaign.folder.name}", file=sys.stderr)
        raise
    finally:
        if campaign.report.files:
            run_summary.show(campaign.report, time.perf_counter() - start)
    return 0
