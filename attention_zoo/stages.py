"""Names for the stages of an attention, so that a profile of it reads like its paper."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler


def stage(name: str) -> AbstractContextManager[object]:
    """A range of that name in the trace of a running profiler; nothing at all where none runs, or under a compiler.

    Args:
        name: such as ``bra.route``. Stages are not nested.
    """
    # A range is an operator: without this test it would cost microseconds and be seen by tracers and fake tensors.
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(name)
