"""Imported once by the server from which cells are forked: everything a cell needs, and nothing that starts threads."""

import atexit
import gc
import os
from unittest import mock

import fvcore.nn  # noqa: F401
import torch
import torch._dynamo
from torch import nn

import attention_zoo  # noqa: F401
from profiling import cell, macs, memory  # noqa: F401
from profiling.workload import Workload

# The first prediction imports and caches much; on shapes alone it runs no kernel. But FakeTensorMode asks whether there
# is a GPU, and once asked, CUDA refuses to start in what is forked from here; "no" would have it ask some other way.
with mock.patch("torch.cuda.is_available", lambda: True), torch.device("meta"):
    memory.predict(Workload(nn.Linear(8, 8), torch.empty(1, 8), "forward_backward"))
    macs.counted(Workload(nn.Linear(8, 8), torch.empty(1, 8), "forward_backward"))

# Cells then inherit a heap that no garbage collection of theirs walks through.
gc.collect()
gc.freeze()

# With the heap frozen, libraries that look for leaks when the interpreter ends (Triton's do) would report all of it.
atexit.register(os._exit, 0)
