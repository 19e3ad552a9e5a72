"""Which cell is counted or run when: as many at once on each device as it takes, and nothing beside a CPU."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from ablations.devices import Device, ending, processors

AHEAD = 64
"""Cells counted and not yet timed, at most: what a run holds in memory does not grow with it."""
BATCH = 8
"""Cells counted in one process, at most."""
Row = dict[str, Any]


class Task(Protocol):
    """What can be scheduled: it says which devices may take it."""

    @property
    def group(self) -> str:
        """The name of these devices."""


T = TypeVar("T", bound=Task)


def schedule(
    cells: Iterable[T],
    count: Callable[[Sequence[T]], list[Row]],
    measure: Callable[[T, Row, Device], Row],
    groups: Mapping[str, Sequence[Device]],
    beside: bool,
) -> Iterator[tuple[bool, T, Row]]:
    """Count every cell, then measure those whose status is ``measure``, on any device of their group.

    Args:
        beside: whether cells may be counted while others are measured, as on GPUs.

    Yields:
        In the caller's thread, (False, cell, row) before a cell is measured and (True, cell, row) when it is done;
        both at once where counting is all there is to it.
    """
    # In turn, so that the first cells are dealt to all devices.
    turns = range(max(device.at_once for devices in groups.values() for device in devices))
    idle = {
        g: [device for turn in turns for device in devices if turn < device.at_once] for g, devices in groups.items()
    }
    workers = sum(map(len, idle.values()))
    todo, ready = _batches(cells), deque[tuple[T, Row]]()
    counting: dict[Future[list[Row]], list[T]] = {}
    measuring: dict[Future[Row], tuple[T, Device]] = {}
    with _pool(processors() - (workers if beside else 0)) as counters, _pool(workers) as measurers:
        while True:
            for cell, row in _can_start(ready, idle) if beside or not counting else ():
                yield False, cell, row
                device = idle[cell.group].pop()
                measuring[measurers.submit(measure, cell, row, device)] = cell, device
            while (beside or not (ready or measuring)) and BATCH * len(counting) + len(ready) <= AHEAD - BATCH:
                if not (batch := next(todo, [])):
                    break
                counting[counters.submit(count, batch)] = batch
            if not counting and not measuring:
                return
            # In the order of the cells: what is counted waits for what came before it.
            awaited: list[Future[Any]] = [*itertools.islice(counting, 1), *measuring]
            wait(awaited, return_when=FIRST_COMPLETED)
            for future in [future for future in measuring if future.done()]:
                cell, device = measuring.pop(future)
                idle[cell.group].append(device)
                yield True, cell, future.result()
            while counting and (first := next(iter(counting))).done():
                for cell, row in zip(counting.pop(first), first.result(), strict=True):
                    if row["status"] == "measure":
                        ready.append((cell, row))
                    else:
                        yield False, cell, row
                        yield True, cell, row


def _batches(cells: Iterable[T]) -> Iterator[list[T]]:
    """Cells to be counted together: consecutive ones of one group."""
    for _, group in itertools.groupby(cells, key=lambda cell: cell.group):
        while batch := list(itertools.islice(group, BATCH)):
            yield batch


def _can_start(ready: deque[tuple[T, Row]], idle: Mapping[str, list[Device]]) -> Iterator[tuple[T, Row]]:
    """Take from ``ready`` what has an idle device; the order stays."""
    for _ in range(len(ready)):
        cell, row = ready.popleft()
        if idle[cell.group]:
            yield cell, row
        else:
            ready.append((cell, row))


class _pool(ThreadPoolExecutor):
    """Threads that are gone when the block is left, with what they were at if it is left early."""

    def __init__(self, threads: int) -> None:
        super().__init__(max(1, threads))

    def __exit__(self, kind: Any, problem: Any, traceback: Any) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            with ending():
                self.shutdown(wait=True)
