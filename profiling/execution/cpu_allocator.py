"""What glibc does with memory that a step frees, set by environment variables before a process starts.

By default glibc may return a freed block to the system, depending on adjacent blocks. It always returns blocks of more
than 32 MiB, so every step obtains new pages for them. That can take half of a step's time.
"""

import os
import platform
from collections.abc import Mapping
from typing import Literal

FreedMemory = Literal["kept", "returned"]
"""kept: the next step reuses all freed memory, as PyTorch does on a GPU. returned: blocks of 32 MiB or more return to
the system at once, as by default; smaller ones are kept."""
_KEPT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 60), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
VARIABLES: Mapping[FreedMemory, Mapping[str, str]] = {
    "kept": _KEPT | {"MALLOC_MMAP_MAX_": "0"},
    "returned": _KEPT | {"MALLOC_MMAP_MAX_": "65536"},
}
"""Environment variables required at process start. 65536 is glibc's own default."""


def freed_memory() -> FreedMemory | None:
    """What this process does with freed memory; None if it was started with neither set of variables."""
    if platform.libc_ver()[0] != "glibc":
        return None
    for name, variables in VARIABLES.items():
        if all(os.environ.get(variable) == value for variable, value in variables.items()):
            return name
    return None
