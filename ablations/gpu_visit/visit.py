"""A short visit to a GPU: the most valuable part first, a time limit per part, all results in one file.

    python -m ablations gpu_visit --minutes 9 --out /tmp/visit --take results_of_the_visit

A failed part does not stop later ones, except for preflight and correctness, without which no number is valid.
Results are packed while parts run, and finished parts are recorded, so that the same command resumes the visit.
"""

import argparse
import contextlib
import os
import signal
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ablations.gpu_visit import parts
from ablations.gpu_visit.parts import Failed, Skipped, Visit
from attention_zoo import InvalidOption
from profiling.cases.case import CHOICES
from profiling.cli.arguments import Parser
from profiling.execution import subprocess_runner


class Part(NamedTuple):
    """A function, its time limit in seconds, and whether its failure ends the visit."""

    run: Callable[[Visit, float], str]
    seconds: float
    decides: bool = False


PARTS = {
    "preflight": Part(parts.preflight, 60, True),
    "correctness": Part(parts.correctness, 180, True),
    "warm": Part(parts.warm, 75),
    "headline": Part(parts.headline, 200),
    "compiled": Part(parts.compiled, 90),
    "kernels": Part(parts.kernels, 60),
    "sweeps": Part(parts.sweeps, 400),
    "tiles": Part(parts.tiles, 120),
}
GRACE = 15.0
"""Seconds after the time limit in which a part may finish its current work."""
EVERY = 30.0
"""Seconds between two packings of the results, so that a visit that is killed loses only the last ones."""
LEAST = 5.0
"""Remaining seconds below which no part starts."""
BULKY = (".ttir", ".ttgir", ".llir", ".source", ".ptx")
"""Suffixes of files in Triton's cache that it does not read again."""
LARGEST = 16 << 20
"""Size in bytes above which a file may be too large to transfer."""


class TimeUp(BaseException):
    """The part reached its time limit. Not an Exception, so that no handler in the part treats it as a failure."""


def add(command: Parser) -> None:
    """Add the arguments of ``python -m ablations gpu_visit``."""
    command.add_argument("--minutes", type=float, required=True, metavar="N", help="of all parts together")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="its folder; a second run resumes")
    command.add_argument("--take", type=Path, metavar="DIR", help="where to put visit.tar.gz (default: --out)")
    command.add_argument("--device", choices=CHOICES["device"], default="cuda", help="cpu: a rehearsal")
    command.add_argument(
        "--parts", default=",".join(PARTS), metavar="NAME,...", help=f"in this order, of {', '.join(PARTS)}"
    )
    command.add_argument(
        "--static-analysis", type=Path, metavar="FILE", help="what python -m ablations prepare has counted"
    )
    command.add_argument("--tests", metavar="FILE,...", help="the tests of the part correctness")
    command.add_argument("--keep-caches", action="store_true", help="put compiled kernels into caches.tar.gz too")
    command.add_argument("--caches", type=Path, metavar="FILE", help="a caches.tar.gz of a visit with the same --out")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    chosen = [name for name in args.parts.split(",") if name]
    for name in chosen:
        if name not in PARTS:
            raise InvalidOption(f"--parts: there is no {name!r}; valid: {', '.join(PARTS)}")
    out = args.out.resolve()
    (out / "log").mkdir(parents=True, exist_ok=True)
    _use_caches(out, args.caches)
    visit = Visit(out, args.device, args.static_analysis and args.static_analysis.resolve())
    if args.tests:
        visit.tests = tuple(args.tests.split(","))
    take = (args.take or out).resolve()
    take.mkdir(parents=True, exist_ok=True)
    with _deaf_children():
        try:
            with _packing(out, take / "visit.tar.gz"):
                fine = visit_all(visit, chosen, time.monotonic() + 60 * args.minutes)
        finally:
            if args.keep_caches:
                _pack(out / "cache", take / "caches.tar.gz", caches=True)
    return 0 if fine else 1


def visit_all(visit: Visit, chosen: Sequence[str], until: float) -> bool:
    """Run the chosen parts until monotonic ``until``, in this order after those that decide; whether none failed.

    If all parts are chosen, finished ones do not run again.
    """
    fine, done = True, visit.out / "done"
    before = set(done.read_text().split()) if done.exists() else set()
    for name in sorted(dict.fromkeys(chosen), key=lambda name: not PARTS[name].decides):
        if name in before and len(chosen) == len(PARTS):
            continue
        if (seconds := min(PARTS[name].seconds, until - time.monotonic())) < LEAST:
            print(f"{name}: no time is left", flush=True)
            continue
        state = _do(visit, name, seconds)
        fine &= state != "failed"
        if state == "done":
            with done.open("a") as file:
                print(name, file=file)
        if state == "failed" and PARTS[name].decides:
            print(f"Nothing more, since {name} failed; --parts chooses others.", flush=True)
            break
    return fine


def _do(visit: Visit, name: str, seconds: float) -> str:
    """Run a part; returns ``done``, ``left`` if it is incomplete, or ``failed``."""
    begin, state = time.monotonic(), "failed"
    with (visit.out / "log" / f"{name}.txt").open("a", encoding="utf-8") as visit.log:
        try:
            with _alarm(seconds + GRACE):
                message = PARTS[name].run(visit, seconds)
            state = "done" if " left" not in message or " 0 left" in message else "left"
        except Skipped as reason:
            message, state = f"skipped: {reason}", "done"
        except Failed as problem:
            message = f"FAILED: {problem}"
        except TimeUp:
            message, state = "stopped at its time limit", "left"
        except Exception as problem:
            traceback.print_exc(file=visit.log)
            message = f"FAILED: {type(problem).__name__}: {problem}"
        visit.say(message)
    print(f"{name}: {message} [{time.monotonic() - begin:.0f} of {seconds:.0f} s]", flush=True)
    return state


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeUp in this thread after ``seconds``."""

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _packing(folder: Path, tar: Path) -> Iterator[None]:
    """Pack the folder every EVERY seconds in another thread, and at the end."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(EVERY):
            _pack(folder, tar)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _pack(folder, tar)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Exit cleanly on SIGTERM; the fork server and the cells inherit SIG_IGN."""

    ended = False

    def end(*_: Any) -> None:
        nonlocal ended
        ended = True
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        subprocess_runner.start()
        signal.signal(signal.SIGTERM, end)
        yield
        if ended:
            # Python ignores exceptions that a signal raises within a finalizer.
            raise SystemExit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def _use_caches(out: Path, packed: Path | None) -> None:
    """Set the cache folders of Triton and Inductor inside ``out``; unpack the archive ``packed`` into it."""
    for name, variable in (("triton", "TRITON_CACHE_DIR"), ("inductor", "TORCHINDUCTOR_CACHE_DIR")):
        os.environ[variable] = str(out / "cache" / name)
        (out / "cache" / name).mkdir(parents=True, exist_ok=True)
    if packed:
        with tarfile.open(packed) as tar:
            # Not as an argument, which Python 3.11.2, that of Debian 12, does not know.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(out)


def _pack(folder: Path, tar: Path, caches: bool = False) -> None:
    """Pack a folder into one file, replaced atomically: without compiled kernels, or with ``caches`` only those."""
    concurrent = tar.with_suffix(".tmp")
    roots = [folder] if caches else [path for path in folder.iterdir() if path.name != "cache"]
    left_out, inside = (BULKY, Path("cache")) if caches else ((".tar.gz", ".tmp"), Path())
    with tarfile.open(concurrent, "w:gz") as file:
        for path in sorted(path for root in roots for path in (root, *root.rglob("*")) if path.is_file()):
            # A part may replace its files at any moment.
            with contextlib.suppress(FileNotFoundError):
                if not path.name.endswith(left_out):
                    file.add(path, inside / path.relative_to(folder))
    concurrent.replace(tar)
    if tar.stat().st_size > LARGEST:
        print(f"{tar} has {tar.stat().st_size / 2**20:.0f} MiB", flush=True)
