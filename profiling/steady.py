"""What lets the times of one process be compared with another's, at another moment, on a machine that others share."""

import ctypes
import mmap
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch

SHARE = 0.1
"""How long a round of a yardstick takes, of the time since the last one."""
PRODUCT = 384
"""Rows of the matrices of the cores' yardstick, which a core's own cache holds."""
STREAM_BYTES = 64 << 20
"""What memory's yardstick reads, and as much it writes: more than others leave of a shared cache."""
_held: list[object] = []


def keep_freed_memory(large_blocks: bool = True) -> bool:
    """Have the C library keep what is freed for the next step, as PyTorch does by itself on a GPU.

    By default glibc gives blocks back to the system or not, by what happens to lie beside them: the same luck for all
    processes forked from one server, and up to 2.7x the time between one run and the next. Blocks of more than 32 MiB
    it gives back at once, always, so that every step gets its pages anew: half of the time, or nine tenths on a
    virtual machine whose host hands them out slowly. Without ``large_blocks`` these still go back.

    Returns:
        Whether the C library can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt(trim_threshold, -1)
    mallopt(mmap_threshold, 32 << 20)
    if large_blocks:
        mallopt(mmap_max, 0)
    return True


def displace_memory() -> None:
    """Take random amounts of memory, for good, so that what follows lies elsewhere than in other processes.

    Processes forked from one server inherit its layout. What that does to a case, 2 to 6 % between one run and the
    next, would be the same in all processes of a run, so that no number of them would show it.
    """
    _take_what_is_free()
    anywhere = random.SystemRandom()
    _held.append(mmap.mmap(-1, mmap.PAGESIZE * anywhere.randrange(1, 2048)))
    _held.append(bytearray(64 * anywhere.randrange(1, 4096)))
    _held.extend(bytearray(64 * anywhere.randrange(1, 16384)) for _ in range(4))


def _take_what_is_free() -> None:
    """Take the gaps in the heap that the server left, so that what follows lies where its order alone puts it."""
    library = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(library, "sbrk"):
        return
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    end = library.sbrk(0)
    for size in (1024 << power for power in range(10, -1, -1)):
        while (taken := library.malloc(size)) and taken < end:
            _held.append(taken)
        library.free(taken)


class Yardstick:
    """Some work that never changes, done between the samples of a step.

    How long it takes says how fast the machine was just then. On a shared machine that explains most of what differs
    between processes, and between runs; what the kernel does for a step, such as giving it pages, not at all.

    Args:
        work: what is done.
        every: seconds of sampling between two rounds.
        passes: passes of a round at least.
        warm_up: how many of them, the first ones, do not count.
    """

    def __init__(self, work: Callable[[], object], every: float, passes: int, warm_up: int) -> None:
        self._work, self._every, self._passes, self._warm_up = work, every, passes, warm_up
        self._milliseconds: list[float] = []
        self._last = -float("inf")

    def due(self) -> bool:
        """Whether it is time for another round."""
        return time.perf_counter() - self._last >= self._every

    @torch.no_grad()
    def round(self) -> None:
        """Some passes."""
        start = time.perf_counter()
        end = start + SHARE * (start - self._last) if self._milliseconds else start
        passes = 0
        while passes < self._passes or time.perf_counter() < end:
            begin = time.perf_counter()
            self._work()
            if passes >= self._warm_up:
                self._milliseconds.append(1e3 * (time.perf_counter() - begin))
            passes += 1
        self._last = time.perf_counter()

    def median(self) -> float:
        """The time of the work in ms, the median of all passes."""
        return statistics.median(self._milliseconds)


def cores() -> Yardstick:
    """A matrix product, which tells how fast the cores compute."""
    a, b = torch.ones(PRODUCT, PRODUCT), torch.ones(PRODUCT, PRODUCT)
    product = torch.empty(PRODUCT, PRODUCT)
    return Yardstick(lambda: torch.mm(a, b, out=product), every=0.03, passes=4, warm_up=1)


def memory() -> Yardstick:
    """Large tensors read and written, which tells how fast memory is, and how much of a shared cache others leave."""
    before = torch.ones(STREAM_BYTES // 4)
    after = torch.zeros_like(before)
    return Yardstick(lambda: torch.add(before, 1.0, out=after), every=0.2, passes=1, warm_up=0)
