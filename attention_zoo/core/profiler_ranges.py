"""Named profiler ranges for the stages of an attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler


def stage(name: str) -> AbstractContextManager[object]:
    """A range of that name in a running profiler's trace; a null context without a profiler or under a compiler.

    Args:
        name: such as ``bra.route``. Stages are not nested.
    """
    # record_function is an operator: without this check it costs microseconds and reaches tracers and fake tensors.
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(name)
