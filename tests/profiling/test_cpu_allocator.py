"""What the C library does with freed memory."""

import platform
import resource

import pytest
import torch

from profiling.execution import cpu_allocator, subprocess_runner
from profiling.execution.cpu_allocator import FreedMemory


def page_faults_of_a_step(mebibytes: int) -> int:
    """Page faults of the tenth step, which allocates 16 MiB and ``mebibytes`` MiB, and frees them."""
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one, two = torch.ones(4 << 20), torch.ones(mebibytes << 18)
        del one, two
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc reads these variables")
@pytest.mark.parametrize(
    ("freed_memory", "mebibytes", "kept"), [("returned", 16, True), ("returned", 64, False), ("kept", 64, True)]
)
def test_freed_memory_is_kept_or_returned(freed_memory: FreedMemory, mebibytes: int, kept: bool) -> None:
    assert subprocess_runner.call(cpu_allocator.freed_memory, freed_memory=freed_memory).value == freed_memory
    faults = subprocess_runner.call(page_faults_of_a_step, mebibytes, freed_memory=freed_memory).value
    # Memory returned to the system would cause a page fault per 4 KiB.
    assert faults < 100 if kept else faults > 10_000


def test_a_process_started_without_the_variables_says_so() -> None:
    assert cpu_allocator.freed_memory() is None
