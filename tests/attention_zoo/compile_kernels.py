"""Compiles BRA's Triton kernels for a GPU that need not be there: python compile_kernels.py 90 SPEC ...

A SPEC is dtype,channels per head,heads,grid side,regions per side,topk,with (f: factors, v: masked keys, 4 or 8: the
number of warps of the attention's kernels, instead of that of their tiles). The operators run as usual, on CPU tensors
of those shapes, but every launch is compiled instead, for its types, sizes and constants. Prints one JSON object per
kernel. Not with TRITON_INTERPRET.

python compile_kernels.py report 90 compiles all types and head dimensions at a grid of 112, prints a table in Markdown,
and fails if anything spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from attention_zoo.attentions.bra import triton_kernels as kernels
from attention_zoo.attentions.bra import triton_ops as bra

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Tell = Callable[[dict[str, Any]], None]
HEADS = 16, 32, 64, 96, 128
NAMES = (
    "pool_regions", "choose_routes", "attend_forward", "add_depthwise", "attend_backward_queries",
    "attend_backward_keys", "finish_keys", "sum_columns",
)  # fmt: skip

ORIGINALS = {name: getattr(kernels, name) for name in NAMES}


class Device:
    """The driver interface that Triton needs to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that compiles its launches and reports them."""

    def __init__(self, kernel: Any, spec: str, tell: Tell) -> None:
        self.kernel, self.spec, self.tell = kernel, spec, tell

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_for(*args: Any, **options: Any) -> None:
            warps = re.search("[48]", "".join(self.spec.split(",")[6:]))
            if warps and self.kernel.fn.__name__.startswith("attend"):
                options["num_warps"] = int(warps[0])
            made = self.kernel.run(*args, grid=grid, warmup=True, **options)
            facts = {"kernel": self.kernel.fn.__name__, "spec": self.spec, "shared": made.metadata.shared}
            facts |= resources(made.asm["cubin"]) | {"warps": made.metadata.num_warps, "grid": grid}
            self.tell(facts)

        return compile_for


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack per thread, which hold spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def run_all(dtype: str, head: int, heads: int, grid: int, side: int, topk: int, extras: str) -> None:
    """Run forward and backward pass of one shape."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    dim = heads * head
    tokens = torch.zeros(1, grid, grid, 3 * dim, dtype=DTYPES[dtype])
    index, strength, _ = bra.bra_route(tokens, dim, side, topk, 0.1)
    factor = strength if "f" in extras else None
    valid = torch.ones(grid, grid, dtype=torch.bool) if "v" in extras else None
    given = tokens, None, index, factor, valid, torch.zeros(25, dim), torch.zeros(dim)
    out, _, lse = bra.bra_attend(*given, dim, heads, side, 0.1, True)
    bra.bra_backward(*given, out, lse, out, dim, heads, side, 0.1)
    bra.bra_sum_columns(tokens, torch.float32)


def compile_all(capability: str, specs: Iterable[str], tell: Tell) -> None:
    """Compile all kernels for each SPEC."""
    driver.set_active(Device(int(capability)))
    for spec in specs:
        for name, kernel in ORIGINALS.items():
            setattr(kernels, name, Compiled(kernel, spec, tell))
        dtype, head, heads, grid, side, topk, *extras = spec.split(",")
        run_all(dtype, int(head), int(heads), int(grid), int(side), int(topk), "".join(extras))


def report(capability: str) -> int:
    """Print registers and bytes of shared memory of every kernel; returns how many spill."""
    result: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    spilled = 0
    for dtype in ("bf16", "fp32", "tf32"):
        for extras in ("", ",fv") if dtype != "tf32" else ("",):
            for head in HEADS:

                def note(facts: dict[str, Any], row: str = dtype + extras, head: int = head) -> None:
                    nonlocal spilled
                    spilled += facts["stack"] > 0
                    spill = f", **{facts['stack']} B spilled**" if facts["stack"] else ""
                    text = f"{facts['registers']}, {facts['shared'] / 1024:.0f}, {facts['warps']}{spill}"
                    result[facts["kernel"], row].setdefault(head, text)

                compile_all(capability, [f"{dtype},{head},2,112,7,4{extras}"], note)
                print(capability, dtype, extras, head, spilled, file=sys.stderr)
    print(f"| sm_{capability}, Triton {triton.__version__}: kernel | type |", *(f" {head} |" for head in HEADS), sep="")
    print("|---|---|" + "---|" * len(HEADS))
    for (kernel, row), by_head in sorted(result.items(), key=lambda item: NAMES.index(item[0][0])):
        print(f"| {kernel} | {row} |", *(f" {by_head[head]} |" for head in HEADS), sep="")
    return spilled


def main(first: str, *rest: str) -> int:
    """Compile; returns how many kernels of a report spill."""
    if first == "report":
        return report(*rest)
    compile_all(first, rest, lambda facts: print(json.dumps(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
