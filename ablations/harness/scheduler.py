"""Schedule counting and measuring: up to ``at_once`` cells per device; on a CPU nothing runs beside a measurement."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from ablations.harness.devices import Device, ending, processors

AHEAD = 64
"""Maximum number of cells counted and not yet timed: it bounds the memory of a run."""
BATCH = 8
"""Maximum number of cells counted in one process."""
Row = dict[str, Any]


class Task(Protocol):
    """A schedulable item, with the group of devices that may run it."""

    @property
    def group(self) -> str:
        """The name of the device group."""


T = TypeVar("T", bound=Task)


def schedule(
    cells: Iterable[T],
    count: Callable[[Sequence[T]], list[Row]],
    measure: Callable[[T, Row, Device], Row],
    groups: Mapping[str, Sequence[Device]],
    concurrent: bool,
) -> Iterator[tuple[bool, T, Row]]:
    """Count every cell, then measure those whose status is ``measure``, on any device of their group.

    Args:
        concurrent: whether cells may be counted while others are measured, as on GPUs.

    Yields:
        In the caller's thread, (False, cell, row) before a cell is measured and (True, cell, row) when it is done;
        one after the other for a cell that is only counted.
    """
    # Round-robin, so that the first cells are distributed over all devices.
    turns = range(max(device.at_once for devices in groups.values() for device in devices))
    idle = {
        g: [device for turn in turns for device in devices if turn < device.at_once] for g, devices in groups.items()
    }
    workers = sum(map(len, idle.values()))
    todo, ready = _batches(cells), deque[tuple[T, Row]]()
    counting: dict[Future[list[Row]], list[T]] = {}
    measuring: dict[Future[Row], tuple[T, Device]] = {}
    with _pool(processors() - (workers if concurrent else 0)) as counters, _pool(workers) as measurers:
        while True:
            for cell, row in _can_start(ready, idle) if concurrent or not counting else ():
                yield False, cell, row
                device = idle[cell.group].pop()
                measuring[measurers.submit(measure, cell, row, device)] = cell, device
            while (concurrent or not (ready or measuring)) and BATCH * len(counting) + len(ready) <= AHEAD - BATCH:
                if not (batch := next(todo, [])):
                    break
                counting[counters.submit(count, batch)] = batch
            if not counting and not measuring:
                return
            # Keep the order of the cells: a counted batch waits for earlier batches.
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
    """Yield batches to count together: consecutive cells of one group."""
    for _, group in itertools.groupby(cells, key=lambda cell: cell.group):
        while batch := list(itertools.islice(group, BATCH)):
            yield batch


def _can_start(ready: deque[tuple[T, Row]], idle: Mapping[str, list[Device]]) -> Iterator[tuple[T, Row]]:
    """Pop the cells with an idle device from ``ready``; the others keep their order."""
    for _ in range(len(ready)):
        cell, row = ready.popleft()
        if idle[cell.group]:
            yield cell, row
        else:
            ready.append((cell, row))


class _pool(ThreadPoolExecutor):
    """Thread pool joined at the end of the block; an exception cancels its tasks and kills running cells."""

    def __init__(self, threads: int) -> None:
        super().__init__(max(1, threads))

    def __exit__(self, kind: Any, problem: Any, traceback: Any) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            with ending():
                self.shutdown(wait=True)
