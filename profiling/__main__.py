"""Profile one configuration: ``python -m profiling --help``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from attention_zoo import MODELS, InvalidOption, load_plugin, names, options
from attention_zoo.options import argument_type
from profiling import environment, isolation, page
from profiling.arguments import Parser, integer, run_reporting
from profiling.case import CHOICES, Case, available_impls
from profiling.cell import FreedMemory, Job, breakdown, theory
from profiling.cell import measure as measure_cell
from profiling.rows import agree

EXAMPLES = """examples:
  python -m profiling --attention bra --height 56 --width 56 --n-win 7 --topk 4
  python -m profiling --kv-downsample-mode avgpool --mode forward_backward
  python -m profiling --attention window --window-size 8 --impl sdpa --json
  python -m profiling --model biformer_small --trace traces/small
  python -m profiling --attention bra --help       the options of one attention
"""
INVALID = f"{InvalidOption.__name__}: "
"""How the reason of a cell begins that was refused for its options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 1 if the configuration failed, 2 if the input is wrong."""
    return run_reporting(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)), isolation.StartError)


def _run(arguments: list[str]) -> int:
    parser, declared = _parser(arguments)
    given = parser.parse_args(arguments)
    case = _case(given, {name: getattr(given, name) for name in declared if hasattr(given, name)})
    if reason := environment.check_device(case.device):
        raise InvalidOption(f"--device {case.device}: {reason}; valid here: cpu")
    if given.trace and not _writable(Path(given.trace)):
        raise InvalidOption(f"--trace {given.trace}: no permission to write there")
    with Console(stderr=True).status("measuring, in processes of its own"):
        plugins = tuple(str(Path(p).resolve()) for p in given.plugin)
        row, parts = _measure(Job(case, plugins, freed_memory=given.freed_memory), given.trace)
    if given.json:
        print(json.dumps(row | parts, indent=2))
    else:
        page.show(case, row, parts, Console())
        if given.trace and row["status"] == "ok":
            print(f"Trace in {given.trace}, for https://ui.perfetto.dev or\nmake tensorboard DIR={given.trace}")
            if case.device == "cuda":
                print("Memory snapshot beside it, for https://docs.pytorch.org/memory_viz")
    return 0 if row["status"] == "ok" else 1


def _measure(job: Job, trace: str | None) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    isolation.start()
    # A step that needs more than is free ends as out of memory, before the system begins to kill.
    memory = environment.available_bytes("cpu") if job.case.device == "cpu" else None
    outcome = isolation.call(theory, job)
    if outcome.reason.startswith(INVALID):
        raise InvalidOption(outcome.reason.removeprefix(INVALID))
    nothing: dict[str, list[dict[str, Any]]] = {"stages": [], "heaviest_operators": []}
    facts = environment.describe(job.case.device)
    row: dict[str, Any] = job.case.who("profiling", facts["device_name"]) | facts
    row |= outcome.value or {}
    row |= {"status": outcome.status, "reason": outcome.reason}
    if outcome.status == "ok":
        outcome = isolation.call(measure_cell, job, memory=memory)
        row |= {"status": outcome.status, "reason": outcome.reason} | (outcome.value or {})
        row["macs_agree"] = agree(row.get("macs_analytic"), row["macs_counted"], row.get("macs_fvcore"))
        if job.case.compiled:
            # What was predicted is the step as written; the compiler fuses some of it away.
            row["memory_predicted_bytes"] = None
    if row["status"] != "ok":
        return row, nothing
    profiled = isolation.call(breakdown, job, trace and str(Path(trace).resolve()), memory=memory)
    if trace and profiled.status != "ok":
        raise OSError(f"--trace {trace}: {profiled.reason}")
    if profiled.status != "ok":
        print(f"no stages and operators: {profiled.status}: {profiled.reason}", file=sys.stderr)
    return row, profiled.value or nothing


def _parser(arguments: list[str]) -> tuple[Parser, list[str]]:
    """The parser for the chosen attention, and the names of its options."""
    first = Parser(add_help=False)
    _add_choice(first)
    chosen = first.parse_known_args(arguments)[0]
    for plugin in chosen.plugin:
        load_plugin(plugin)
    if chosen.model is not None and chosen.model not in MODELS:
        raise InvalidOption(f"unknown model {chosen.model!r}; valid: {', '.join(MODELS)}")
    parser = Parser(
        prog="python -m profiling", epilog=EXAMPLES,
        description="Cost, memory, latency, stages and heaviest operators of one attention or\nmodel, at one size.",
    )  # fmt: skip
    _add_choice(parser)
    _add_common(parser, chosen)
    declared = _add_options(parser, chosen)
    return parser, declared


def _add_choice(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--attention", metavar="NAME", default=None, help=f"one of: {', '.join(names())} (default: bra)")
    what.add_argument("--block", metavar="NAME", help="a whole Block around that attention")
    what.add_argument("--model", metavar="NAME", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours")


def _add_common(parser: Parser, chosen: argparse.Namespace) -> None:
    side = 224 if chosen.model else 56
    for name, default, text in (
        ("height", side, "tokens, or pixels of a model"), ("width", side, "tokens, or pixels of a model"),
        ("dim", 64, "channels"), ("num-heads", 2, "heads"), ("batch", 1, "images per step"),
    ):  # fmt: skip
        text += f" (default: {default})"
        parser.add_argument(f"--{name}", type=integer, default=default, metavar="N", help=text)
    impls = ("reference", "sdpa") if chosen.model else available_impls(_name(chosen))
    parser.add_argument("--impl", choices=("auto", *impls), default="auto", help="which code runs it")
    for name in ("mode", "dtype", "device"):
        parser.add_argument(f"--{name}", choices=CHOICES[name], default=CHOICES[name][0] if name != "dtype" else "fp32")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--cuda-graph", action="store_true", help="replay the step from a recorded CUDA graph")
    parser.add_argument("--deterministic", action="store_true", help="deterministic kernels only")
    parser.add_argument(
        "--freed-memory", choices=get_args(FreedMemory), default="kept",
        help="CPU: what a step frees is kept for the next one, or large blocks are returned to the system, as the "
        "C library has it (default: kept)",
    )  # fmt: skip
    parser.add_argument("--seed", type=integer, default=0, metavar="N")
    parser.add_argument("--trace", metavar="DIR", help="write a trace for TensorBoard and Perfetto")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def _add_options(parser: Parser, chosen: argparse.Namespace) -> list[str]:
    declared = options("bra") if chosen.model else options(_name(chosen))
    if chosen.model:
        # It has one per stage.
        del declared["topk"]
    whose = "bra inside the model" if chosen.model else _name(chosen)
    group = parser.add_argument_group(f"options of {whose}")
    taken = {flag for action in parser._actions for flag in action.option_strings}
    for name, option in declared.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in taken:
            raise InvalidOption(
                f"option {name!r} of {whose!r} has the name of a flag; taken: {', '.join(sorted(taken))}"
            )
        text = f"{option.describe()} (default: {option.default})".replace("%", "%%")
        group.add_argument(
            flag, type=argument_type(option), metavar=name.upper().rsplit("_")[-1], default=argparse.SUPPRESS,
            help=text, nargs="?" if option.default is False else None, const=True if option.default is False else None,
        )  # fmt: skip
    return list(declared)


def _name(chosen: argparse.Namespace) -> str:
    return next((name for name in (chosen.block, chosen.attention) if name is not None), "bra")


def _case(given: argparse.Namespace, chosen: dict[str, Any]) -> Case:
    kind = "model" if given.model else "attention" if given.block is None else "block"
    return Case(
        given.model or _name(given), given.height, given.width,
        None if given.model else given.dim, None if given.model else given.num_heads,
        tuple(sorted(chosen.items())), kind, given.impl, given.mode, given.dtype, given.device,
        given.batch, given.compiled, given.cuda_graph, given.deterministic, given.seed,
    )  # fmt: skip


def _writable(folder: Path) -> bool:
    nearest = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


if __name__ == "__main__":
    raise SystemExit(main())
