"""Imported once by the server that forks cells: everything a cell needs, and nothing that starts threads."""

import atexit
import gc
import os
from unittest import mock

# Imported modules that check for a GPU must query NVML: CUDA cannot start in a child of a process that has queried CUDA
# itself.
ASKED = "PYTORCH_NVML_BASED_CUDA_CHECK"
before = os.environ.get(ASKED)
os.environ[ASKED] = "1"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch import nn  # noqa: E402

import attention_zoo  # noqa: E402, F401
from profiling.cases.workload import Workload  # noqa: E402
from profiling.execution import benchmark, preflight  # noqa: E402, F401
from profiling.meters import macs, peak_memory  # noqa: E402

# The first prediction imports and caches much; on shapes alone it runs no kernel. FakeTensorMode checks for a GPU too,
# and would try another way after a negative result. Forward only: the first backward of a process starts threads for
# every device, and after that no child can run a backward or start CUDA.
with mock.patch("torch.cuda.is_available", lambda: True), torch.device("meta"):
    peak_memory.predict(Workload(nn.Linear(8, 8), torch.empty(1, 8)))
    macs.counted(Workload(nn.Linear(8, 8), torch.empty(1, 8)))

if before is None:
    del os.environ[ASKED]
else:
    os.environ[ASKED] = before

# Garbage collections in the cells skip the frozen heap that they inherit.
gc.collect()
gc.freeze()

# Libraries that check for leaks at interpreter exit (Triton's do) would report the whole frozen heap.
atexit.register(os._exit, 0)
