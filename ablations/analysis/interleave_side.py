"""One side of an interleaved comparison: an interpreter that forks a process for each pair, which takes samples.

It is run by path, with ``PYTHONPATH`` at the checkout whose code is to be measured: that checkout's own copy of this
file if it has one. It reads one JSON object a line and answers each with one:

- ``{"flags": [...], "check": bool}``: fork a process that builds the case of these flags of ``python -m profiling`` and
  checks it if asked to: ``{"case": ..., "impl": ...}``, or ``{"failed": status, "reason": ...}``. It answers the rest.
- ``{"warm_up": seconds}``: run steps for so long: ``{"step_ms": median}``.
- ``{"samples": n}``: take n samples of the step, after one that is discarded because it finds the caches of another
  process: ``{"wall": [ms, ...], "device": [ms, ...]}``, the latter null on a CPU or where device time cannot be told.
- ``{"end": true}``: end the process: ``{}``.
"""

import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TextIO

import torch

from attention_zoo import InvalidOption, Unsupported
from profiling.__main__ import parse
from profiling.cases.workload import Workload
from profiling.execution.benchmark import prepare
from profiling.meters import correctness, latency

LAYOUTS = 1 << 16
"""Multiples of 64 bytes by which the memory of a process may be displaced."""


def main() -> None:
    """Fork a process for each pair, until there are no more requests."""
    # Whatever it imports must not touch CUDA or run a kernel: a child could then not do so any more.
    import profiling.execution.forkserver_preload  # noqa: F401

    # What a library prints shall not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            _run(answers, json.loads(line))
        _, status = os.waitpid(child, 0)
        if status:
            say(answers, failed="crash", reason=f"its process ended with status {os.waitstatus_to_exitcode(status)}")


def _run(answers: TextIO, request: dict[str, Any]) -> None:
    """In the child: serve, and end it."""
    try:
        serve(answers, request["flags"], request["check"])
    except Exception as problem:
        status = {InvalidOption: "invalid", Unsupported: "unsupported"}.get(type(problem), "error")
        say(answers, failed=status, reason=" ".join(f"{type(problem).__name__}: {problem}".split())[:500])
    finally:
        os._exit(0)


def serve(answers: TextIO, flags: list[str], check: bool) -> None:
    """Build the case, check it, and answer requests until the end."""
    # Processes forked from one interpreter would all have the same memory layout, and the same luck with it.
    padding = bytearray(64 * random.SystemRandom().randrange(LAYOUTS))
    job = parse(flags)
    prepare(job)
    case = job.case
    work = case.workload(case.device)
    if case.compiled:
        work.compile()
    result = correctness.check(case) if check else None
    if result is not None and not result.ok:
        say(answers, failed="incorrect", reason=result.reason)
        return
    impl = case.implementation(work)
    with work.settings():
        work.step()
    with work.settings(), work.replayed() if case.cuda_graph else nullcontext():
        wall = latency.WallSampler(work.step, case.device)
        device = device_sampler(work, case.device, case.cuda_graph)
        say(answers, case=str(case), impl=impl)
        while line := sys.stdin.readline():
            request = json.loads(line)
            if "end" in request:
                break
            if "warm_up" in request:
                wall.warm_up(request["warm_up"])
                say(answers, step_ms=statistics.median(wall.sample() for _ in range(5)))
            else:
                wall.sample()
                times = [wall.sample() for _ in range(request["samples"])]
                on_device = [device() for _ in range(request["samples"])] if device else None
                say(answers, wall=times, device=on_device)
    del padding
    say(answers)


def device_sampler(work: Workload, device: str, replayed: bool) -> Callable[[], float] | None:
    """What takes a sample of the time on the device, or None where that cannot be told."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    return latency.device_sampler(work.step) if replayed or latency.fits_queue(work.step) else None


def say(answers: TextIO, **words: Any) -> None:
    """Answer with one line."""
    answers.write(json.dumps(words) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
