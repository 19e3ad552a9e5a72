"""Two variants measured in turn in one run: ``python -m ablations compare --interleave --help``.

Each variant runs in a process of its own. The two processes of a pair take short blocks of samples in turn, in random
order, while the other one waits, so that whatever else the machine does meets both alike. Every pair is new, with
memory displaced at random, because a process keeps the memory layout that it happens to get. What two sides of one
checkout inherit from the interpreters that fork them is swapped from pair to pair. The ratio B / A of two neighbouring
blocks is one paired sample. The interval is a bootstrap over pairs of processes.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from ablations.analysis.compare import Thresholds, classify
from ablations.analysis.interleave_process import Side, SideProcess, side
from ablations.harness.devices import DeviceLease, find
from attention_zoo import InvalidOption
from profiling.cli.arguments import Parser, integer

THRESHOLDS = Thresholds(effect=0.04, same=0.06)
"""A change of less than 4 % is none; SAME is said where a change of more than 6 % is excluded. With 3 %, one of 20
comparisons of a variant with itself was called SLOWER, on two cores on which other tests ran."""
TRIM = 0.2
"""Share of the pairs that is left out at either end, for what happened to one process alone."""
BLOCK_MS = 20.0
"""A block of samples takes about this long."""
BLOCKS = 30
"""Blocks of each side in a pair of processes, at most."""
SAMPLING_SECONDS = 1.0
"""Sampling of a pair of processes ends after this long, at the earliest after :data:`FEWEST_BLOCKS` blocks."""
FEWEST_BLOCKS = 5
PAIRS = 6
"""Pairs of processes, by default; more follow while the verdict is UNCLEAR."""
WARM_UP = 0.1
"""Seconds of steps before the first block."""
EXAMPLES = """examples:
  python -m ablations compare --interleave --a impl=reference --b impl=sdpa \\
      --attention bra --height 56 --width 56
  python -m ablations compare --interleave --a topk=4 --b 'topk=8 impl=sdpa'
  python -m ablations compare --interleave --a plugin=old.py --b plugin=new.py \\
      --attention mine --height 28 --width 28 --json
  python -m ablations compare --interleave --a checkout=HEAD~1 --b ''
"""
DESCRIPTION = """\
Measure two variants of one case in turn, in one run: FASTER, SAME, SLOWER or
UNCLEAR, from the ratio of their times and its interval. The case is given by
the flags of `python -m profiling`. A side is given by some more of them as
name=value, separated by spaces, and may name a plugin, or a checkout: a folder
or a revision of this repository. Each side is checked for correctness before it
is timed. Exits with 1 if B is slower.
"""


@dataclass(frozen=True)
class Ratio:
    """The result by one clock.

    Attributes:
        a_ms, b_ms: the median over blocks, and then over pairs of processes.
        ratio: B / A.
        low, high: a 95 % interval of it.
        verdict: FASTER, SAME, SLOWER or UNCLEAR.
        pairs: the ratio within each pair of processes.
    """

    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float
    verdict: str
    pairs: list[float]


Blocks = list[tuple[float, float]]
"""Of one pair of processes: the least times in neighbouring blocks of A and of B in ms."""


def evaluate(pairs: Sequence[Blocks]) -> Ratio:
    """The ratio B / A over pairs of processes, with a bootstrap interval.

    Within a pair the median of the ratios of neighbouring blocks counts, over pairs the trimmed mean of the logarithms.
    """
    logs: list[float] = []
    for blocks in pairs:
        a, b = np.log(np.array(blocks)).T
        logs.append(float(np.median(b - a)))
    ratio, low, high = (float(np.exp(value)) for value in _bootstrap(np.array(logs)))
    verdict = classify(low, ratio, high, THRESHOLDS) if len(pairs) > 1 else "UNCLEAR"
    a_ms, b_ms = np.median([np.median(np.array(blocks), axis=0) for blocks in pairs], axis=0)
    return Ratio(float(a_ms), float(b_ms), ratio, low, high, verdict, [float(np.exp(value)) for value in logs])


def _bootstrap(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The trimmed mean and its 95 % interval by the bootstrap, which of few values is too narrow, and made wider."""
    mean, n = float(stats.trim_mean(values, TRIM)), len(values)
    if n < 2:
        return mean, -math.inf, math.inf
    if np.ptp(values) == 0:
        return mean, mean, mean
    result = stats.bootstrap(
        (values,), partial(stats.trim_mean, proportiontocut=TRIM), method="percentile", n_resamples=4999,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    # The spread of n values is underestimated by sqrt((n - 1) / n), and few values follow Student's distribution.
    wider = math.sqrt(n / (n - 1)) * float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975))
    low, high = result.confidence_interval
    return mean, mean - (mean - float(low)) * wider, mean + (float(high) - mean) * wider


def sample_pair(
    sides: Sequence[Side], processes: Sequence[SideProcess], check: bool, rng: random.Random
) -> tuple[dict[str, Blocks], list[dict[str, Any]]]:
    """Fork a process for either side and measure them in turn.

    Returns:
        The blocks of each clock, and what the sides said of themselves.
    """
    for one, process in zip(sides, processes, strict=True):
        process.side = one
        process.ask(flags=one.flags, check=check)
    facts = [process.answer() for process in processes]
    steps = [process.request(warm_up=WARM_UP)["step_ms"] for process in processes]
    samples = max(1, round(BLOCK_MS / max(*steps, 1.0)))
    clocks: dict[str, Blocks] = {"wall": [], "device": []}
    start = time.perf_counter()
    for number in range(BLOCKS):
        if number >= FEWEST_BLOCKS and time.perf_counter() - start > SAMPLING_SECONDS:
            break
        answers: list[dict[str, Any]] = [{}, {}]
        for which in rng.sample((0, 1), 2):
            answers[which] = processes[which].request(samples=samples)
        for clock, blocks in clocks.items():
            times = [answer[clock] for answer in answers]
            if all(times):
                # The least: what others do at that moment only ever adds to a time.
                blocks.append((min(times[0]), min(times[1])))
    for process in processes:
        process.request(end=True)
    return {clock: blocks for clock, blocks in clocks.items() if blocks}, facts


def interleave(
    a: Side, b: Side, least: int, seconds: float, tell: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Ratio], list[dict[str, Any]]]:
    """Measure pairs of processes: ``least`` of them, and more while a verdict is UNCLEAR and the time is not up.

    Returns:
        The result by each clock (``wall``, on CUDA ``device`` too), and what the sides said of themselves.
    """
    rng, start = random.Random(), time.monotonic()
    pairs: list[dict[str, Blocks]] = []
    facts: list[dict[str, Any]] = []
    results: dict[str, Ratio] = {}
    with ExitStack() as stack:
        processes = [stack.enter_context(closing(SideProcess(side))) for side in (a, b)]
        alike = (a.root, a.environment) == (b.root, b.environment)
        while len(pairs) < least or (_unclear(results) and time.monotonic() - start < seconds):
            blocks, message = sample_pair((a, b), processes, check=not pairs, rng=rng)
            if alike:
                processes.reverse()
            facts = facts or message
            pairs.append(blocks)
            shared = [clock for clock in pairs[0] if all(clock in pair for pair in pairs)]
            results = {clock: evaluate([pair[clock] for pair in pairs]) for clock in shared}
            tell(f"{len(pairs)} pairs of processes; " + "; ".join(_line(*result) for result in results.items()))
    return results, facts


def _unclear(results: dict[str, Ratio]) -> bool:
    return any(result.verdict == "UNCLEAR" for result in results.values())


def _line(clock: str, result: Ratio) -> str:
    return (
        f"{clock} time: B / A {result.ratio:.3f}, 95 % interval {result.low:.3f} to {result.high:.3f}: {result.verdict}"
    )


def as_json(results: dict[str, Ratio], sides: Sequence[Side], facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result for scripts."""
    return {
        "a": {"flags": list(sides[0].flags), **facts[0]}, "b": {"flags": list(sides[1].flags), **facts[1]},
        "clocks": {clock: vars(result) for clock, result in results.items()},
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status: 0, or 1 if B is slower by any clock."""
    parser = Parser(prog="python -m ablations compare --interleave", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--a", default="", metavar="SPEC", help="the side to compare with, as name=value ...")
    parser.add_argument("--b", default="", metavar="SPEC", help="the side to judge")
    message = f"pairs of processes (default: {PAIRS})"
    parser.add_argument("--pairs", type=integer, default=PAIRS, metavar="N", help=message)
    parser.add_argument(
        "--minutes", type=float, default=1.0, metavar="N", help="more pairs until so long, while unclear (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    args, flags = parser.parse_known_args(list(arguments))
    if args.pairs < 2:
        raise InvalidOption(f"--pairs {args.pairs} is not valid; valid: an integer >= 2")
    console = Console(stderr=True)
    with ExitStack() as stack:
        sides = [stack.enter_context(side(name, spec, flags)) for name, spec in (("A", args.a), ("B", args.b))]
        if any(part in ("cuda", "--device=cuda") for one in sides for part in one.flags):
            # Other runs of this suite wait meanwhile.
            turn = stack.enter_context(closing(DeviceLease(find("cuda")[0].turns)))
            turn.take(exclusive=True)
        with console.status("measuring both sides in turn") as status:
            results, facts = interleave(sides[0], sides[1], args.pairs, 60 * args.minutes, status.update)
    if args.json:
        print(json.dumps(as_json(results, sides, facts), indent=2))
    else:
        for one, fact, spec in zip("AB", facts, (args.a, args.b), strict=True):
            print(f"{one}: {fact['case']} ({spec or 'as given'}), {fact['impl']}")
        for clock, result in results.items():
            print(f"A {result.a_ms:.3f} ms, B {result.b_ms:.3f} ms. {_line(clock, result)}")
    return 1 if any(result.verdict == "SLOWER" for result in results.values()) else 0
