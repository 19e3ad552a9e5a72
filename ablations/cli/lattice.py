"""The command line of ``python -m ablations lattice``."""

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ablations.analysis.lattice import CPU, Configuration, configurations, entry, shapes
from ablations.cli.progress import progress
from attention_zoo import InvalidOption, names
from profiling.cli.arguments import Parser

EXAMPLES = """examples:
  python -m ablations lattice                       what is not in the file yet
  python -m ablations lattice --only quadtree,deformable     these anew
  python -m ablations lattice --fresh               all anew: 10 to 20 minutes on 2 cores
"""
DESCRIPTION = """\
Write the predictions that the explorer shows: memory and MACs of every
attention, as closed forms in grid, channels and heads, fitted to exact
predictions of 12 to 40 shapes each. Each form comes with its largest error on
shapes that were held out. Configurations are written as they are done, and the
same command goes on from there. The memory of CPUs is that of this processor's
vector instructions, whose kernels have scratch of their own.
"""
THREADS = 2
"""Threads for which the scratch of CPU kernels is predicted."""


def add(command: Parser) -> None:
    """Add the arguments of ``python -m ablations lattice``."""
    command.description, command.epilog = DESCRIPTION, EXAMPLES
    command.add_argument("--only", metavar="NAME,...", help="predict these attentions anew")
    command.add_argument("--fresh", action="store_true", help="predict all anew")
    command.add_argument(
        "--out", type=Path, default=Path("results/predictions.json"), metavar="FILE",
        help="default: results/predictions.json",
    )  # fmt: skip
    command.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    only = set(args.only.split(",")) if args.only else set()
    if unknown := only - set(names()):
        raise InvalidOption(f"--only {','.join(sorted(unknown))}: unknown; valid: {', '.join(names())}")
    if args.processes < 1:
        raise InvalidOption(f"--processes {args.processes} is not valid; valid: an integer >= 1")
    every = list(configurations())
    kept = {} if args.fresh else {_key(old): old for old in _read(args.out) if old["name"] not in only}
    todo = [one for one in every if (not only or one.name in only) and _key(_head(one)) not in kept]
    order = [_key(_head(one)) for one in every]
    with progress() as tell:
        for number, new in enumerate(_entries(todo, args.processes)):
            kept[_key(new)] = new
            _write(args.out, (kept[key] for key in order if key in kept))
            tell(number + 1, len(todo), f"{new['name']} {new['impl']}", f"[{number + 1}/{len(todo)}] ")
    worst = max((error for one in kept.values() for error in one.get("error", {}).values()), default=0.0)
    print(f"{args.out}: {len(kept)} configurations, {len(todo)} of them new; largest error {100 * worst:.2f} %")
    return 0


def _entries(todo: list[Configuration], processes: int) -> Iterator[dict[str, Any]]:
    # Not forked: threads of PyTorch do not survive it.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (THREADS,)) as pool:
        # The usual options first, so that a run that is ended leaves most.
        futures = [pool.submit(entry, one) for one in sorted(todo, key=_urgency)]
        yield from (future.result() for future in as_completed(futures))


def _head(one: Configuration) -> dict[str, Any]:
    return {"name": one.name, "impl": one.impl, "options": one.changed()}


def _urgency(one: Configuration) -> tuple[int, bool]:
    changed = set(one.changed()) & {"topk", "n_win", "kv_downsample_mode"}
    return int(one.name == "bra" and bool(changed)), one.impl != "reference"


def _key(one: dict[str, Any]) -> str:
    return json.dumps([one["name"], one["impl"], one["options"]], sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        made_on, entries = file["cpu"], list(file["configurations"])
    except (ValueError, KeyError, TypeError) as problem:
        raise InvalidOption(f"{path} holds no predictions ({problem!r}); --fresh makes it anew") from None
    if made_on != CPU:
        raise InvalidOption(f"{path} is of a CPU with {made_on}, and this one has {CPU}; --fresh makes it anew")
    return entries


def _write(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the file whole, one configuration a line, so that a change shows what it changed."""
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in entries)
    head = json.dumps(shapes(), separators=(",", ":"))[:-1]
    new = path.with_suffix(".new")
    new.write_text(f'{head},"configurations":[\n{lines}\n]}}\n', encoding="utf-8")
    new.replace(path)
