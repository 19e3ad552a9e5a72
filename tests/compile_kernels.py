"""Compiles BRA's Triton kernels for a GPU that need not be there: python tests/compile_kernels.py 90 SPEC ...

A SPEC is dtype,channels per head,heads,grid side,regions per side,topk,with (f: factors, v: masked keys). The operators
run as ever, on CPU tensors of those shapes, but every launch is compiled instead: for just the types, sizes and
constants that it would have had. Prints one JSON object per kernel. Not with TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_zoo.bra import triton_kernels as kernels
from attention_zoo.bra import triton_ops as bra

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = (
    "pool_regions", "choose_routes", "attend_forward", "attend_backward_queries", "invert_routes",
    "attend_backward_keys",
)  # fmt: skip


class Device:
    """What Triton asks a driver for, to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel whose launches are compiled and printed."""

    def __init__(self, kernel: Any, spec: str) -> None:
        self.kernel, self.spec = kernel, spec

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_for(*args: Any, **options: Any) -> None:
            made = self.kernel.run(*args, grid=grid, warmup=True, **options)
            facts = {"kernel": self.kernel.fn.__name__, "spec": self.spec, "shared": made.metadata.shared}
            print(json.dumps(facts | resources(made.asm["cubin"]) | {"warps": made.metadata.num_warps, "grid": grid}))

        return compile_for


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack per thread: what did not fit them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def run_all(dtype: str, head: int, heads: int, grid: int, side: int, topk: int, extras: str) -> None:
    """Forward and backward pass of one shape."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    qkv = torch.zeros(1, grid, grid, 3 * heads * head, dtype=DTYPES[dtype])
    q, k, v = qkv.chunk(3, dim=-1)
    index, strength = bra.bra_route(bra.bra_pool(qkv[..., : 2 * heads * head], side), topk, 0.1)
    factor = strength if "f" in extras else None
    valid = torch.ones(grid, grid, dtype=torch.bool) if "v" in extras else None
    out, lse = bra.bra_attend(q, k, v, index, factor, valid, heads, side, 0.1)
    _, delta, _ = bra.bra_attend_queries(q, k, v, index, factor, valid, out, lse, out, heads, side, 0.1)
    visitors, starts = bra.bra_invert(index)
    bra.bra_attend_keys(q, k, v, visitors, starts, factor, valid, lse, out, delta, heads, side, topk, 0.1)


def main(capability: str, *specs: str) -> None:
    """Compile all kernels for each SPEC."""
    driver.set_active(Device(int(capability)))
    originals = {name: getattr(kernels, name) for name in NAMES}
    for spec in specs:
        for name, kernel in originals.items():
            setattr(kernels, name, Compiled(kernel, spec))
        dtype, head, heads, grid, side, topk, *extras = spec.split(",")
        run_all(dtype, int(head), int(heads), int(grid), int(side), int(topk), "".join(extras))


if __name__ == "__main__":
    main(*sys.argv[1:])
