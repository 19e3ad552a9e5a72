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
from attention_zoo.core.options import argument_type
from profiling.cases.case import CHOICES, PUBLISHED, Case, available_impls, impls_of_model, stages_from_text
from profiling.cli import result_page
from profiling.cli.arguments import Parser, integer, run_reporting
from profiling.execution import environment, subprocess_runner
from profiling.execution.benchmark import Job, breakdown, process_options, static_analysis
from profiling.execution.benchmark import measure as measure_cell
from profiling.execution.cpu_allocator import FreedMemory
from profiling.schema.row import agree

EXAMPLES = """examples:
  python -m profiling --attention bra --height 56 --width 56 --n-win 7 --topk 4
  python -m profiling --kv-downsample-mode avgpool --mode forward_backward
  python -m profiling --attention window --window-size 8 --impl sdpa --json
  python -m profiling --model biformer_small --trace traces/small
  python -m profiling --attention bra --help       the options of one attention
"""
INVALID = f"{InvalidOption.__name__}: "
"""Prefix of the reason of a cell with invalid options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 1 if the configuration failed, 2 if the input is wrong."""
    return run_reporting(
        lambda: _run(list(sys.argv[1:] if arguments is None else arguments)), subprocess_runner.StartError
    )


def _run(arguments: list[str]) -> int:
    args, job = _parsed(arguments)
    case = job.case
    if reason := environment.check_device(case.device):
        raise InvalidOption(f"--device {case.device}: {reason}; valid here: cpu")
    if args.trace and not _writable(Path(args.trace)):
        raise InvalidOption(f"--trace {args.trace}: no permission to write there")
    with Console(stderr=True).status("measuring, in processes of its own"):
        row, parts = _measure(job, args.trace)
    if args.json:
        print(json.dumps(row | parts, indent=2))
    else:
        result_page.show(case, row, parts, Console())
        if args.trace and row["status"] == "ok":
            print(f"Trace in {args.trace}, for https://ui.perfetto.dev or\nmake tensorboard DIR={args.trace}")
            if case.device == "cuda":
                print("Memory snapshot beside it, for https://docs.pytorch.org/memory_viz")
    return 0 if row["status"] == "ok" else 1


def parse(arguments: list[str]) -> Job:
    """Parse flags of ``python -m profiling`` into a job; InvalidOption if they are invalid."""
    return _parsed(arguments)[1]


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, Job]:
    parser, declared = _parser(arguments)
    args = parser.parse_args(arguments)
    case = _case(args, {name: getattr(args, name) for name in declared if hasattr(args, name)})
    plugins = tuple(str(Path(plugin).resolve()) for plugin in args.plugin)
    return args, Job(case, plugins, freed_memory=args.freed_memory)


def _measure(job: Job, trace: str | None) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    subprocess_runner.start()
    # A step that needs more than the free memory fails as out of memory before the OOM killer acts.
    memory = environment.available_bytes("cpu") if job.case.device == "cpu" else None
    outcome = subprocess_runner.call(static_analysis, job)
    if outcome.reason.startswith(INVALID):
        raise InvalidOption(outcome.reason.removeprefix(INVALID))
    nothing: dict[str, list[dict[str, Any]]] = {"stages": [], "heaviest_operators": []}
    facts = environment.describe(job.case.device)
    row: dict[str, Any] = job.case.key_columns("profiling", facts["device_name"]) | facts
    row |= outcome.value or {}
    row |= {"status": outcome.status, "reason": outcome.reason}
    if outcome.status == "ok":
        outcome = subprocess_runner.call(measure_cell, job, memory=memory, **process_options(job))
        row |= {"status": outcome.status, "reason": outcome.reason} | (outcome.value or {})
        row["macs_agree"] = agree(row.get("macs_analytic"), row["macs_counted"], row.get("macs_fvcore"))
        if job.case.compiled:
            # The prediction is for the uncompiled step; the compiler fuses part of it.
            row["memory_predicted_bytes"] = None
    if row["status"] != "ok":
        return row, nothing
    folder = trace and str(Path(trace).resolve())
    profiled = subprocess_runner.call(breakdown, job, folder, memory=memory, **process_options(job))
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
    if chosen.block is not None and (chosen.model or chosen.attention) is not None:
        raise InvalidOption(
            "--block NAME stands alone; valid with --attention: --model, which takes it into its stages"
        )
    parser = Parser(
        prog="python -m profiling", epilog=EXAMPLES,
        description="Cost, memory, latency, stages and heaviest operators of one attention or\nmodel, at one size.",
    )  # fmt: skip
    _add_choice(parser)
    _add_common(parser, chosen)
    declared = _add_options(parser, chosen)
    return parser, declared


def _add_choice(parser: Parser) -> None:
    message = (
        f"one of: {', '.join(names())} (default: bra); with --model the attention of all stages, or of "
        f"each of the four as NAME,NAME,NAME,NAME, where {PUBLISHED} keeps the model's own"
    )
    parser.add_argument("--attention", metavar="NAME", default=None, help=message)
    parser.add_argument("--block", metavar="NAME", help="a whole Block around that attention")
    parser.add_argument("--model", metavar="NAME", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a file with attentions of yours")


def _add_common(parser: Parser, chosen: argparse.Namespace) -> None:
    side = 224 if chosen.model else 56
    for name, default, text in (
        ("height", side, "tokens, or pixels of a model"), ("width", side, "tokens, or pixels of a model"),
        ("dim", 64, "channels"), ("num-heads", 2, "heads"), ("batch", 1, "images per step"),
    ):  # fmt: skip
        text += f" (default: {default})"
        parser.add_argument(f"--{name}", type=integer, default=default, metavar="N", help=text)
    stages = stages_from_text(chosen.attention or PUBLISHED) if chosen.model else None
    impls = impls_of_model(stages) if chosen.model else available_impls(_name(chosen))
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
        # A model has one topk per stage.
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


def _case(args: argparse.Namespace, chosen: dict[str, Any]) -> Case:
    if args.model and args.attention:
        chosen["attention"] = stages_from_text(args.attention)
    kind = "model" if args.model else "attention" if args.block is None else "block"
    return Case(
        args.model or _name(args), args.height, args.width,
        None if args.model else args.dim, None if args.model else args.num_heads,
        tuple(sorted(chosen.items())), kind, args.impl, args.mode, args.dtype, args.device,
        args.batch, args.compiled, args.cuda_graph, args.deterministic, args.seed,
    )  # fmt: skip


def _writable(folder: Path) -> bool:
    nearest = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


if __name__ == "__main__":
    raise SystemExit(main())
