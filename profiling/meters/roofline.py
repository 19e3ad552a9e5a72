"""The device's measured peaks, and the fraction of them that a cell achieves."""

import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from profiling.cases.case import Case
from profiling.schema.row import SchemaError

Peaks = dict[str, float]
"""FLOP/s by dtype, and bytes/s under ``copy`` (read plus written)."""
HEADER = ("what", "per_second", "unit")
MATMUL = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
ENOUGH_SECONDS = 1.0
"""Time limit for repeating a product: half-precision products take seconds on a CPU without units for them."""
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def measure_peaks(device: str) -> Peaks:
    """Best of several large matrix products per dtype on random numbers, and of several large copies."""
    peaks: Peaks = {}
    n = MATMUL[device]
    for name, dtype in DTYPES.items():
        if device == "cpu" and name == "tf32":
            continue
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        peaks[name] = 2 * n**3 / _fastest(partial(torch.matmul, a, b), device)
    torch.set_float32_matmul_precision("highest")
    source = torch.randint(0, 255, (COPY_BYTES[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peaks["copy"] = 2 * COPY_BYTES[device] / _fastest(lambda: target.copy_(source), device)
    return peaks


def stored(folder: Path, device: str, ask: Callable[..., Peaks]) -> Peaks:
    """The peaks in ``folder/peaks.csv``, measured by ``ask(measure_peaks, device)`` if the file is missing."""
    path = folder / "peaks.csv"
    if not path.exists():
        peaks = ask(measure_peaks, device)
        beside = path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows(
                [what, f"{value:.4g}", "byte" if what == "copy" else "FLOP"] for what, value in peaks.items()
            )
        beside.replace(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            peaks = {line["what"]: float(line["per_second"]) for line in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as problem:
        raise SchemaError(f"{path} holds no peaks ({problem!r}); remove it, and they are measured anew") from problem
    if not {"fp32", "copy"} <= set(peaks):
        raise SchemaError(f"{path} lacks the peak of fp32 or copy; remove it, and they are measured anew")
    return peaks


def _multiplied(case: Case) -> str:
    """The dtype of the case's products."""
    return case.dtype.removesuffix("_params")


def columns(row: dict[str, Any], case: Case, peaks: Peaks) -> dict[str, float]:
    """Achieved TFLOP/s, arithmetic intensity, and the fraction of the roofline."""
    macs, size = row.get("macs_counted"), torch.empty(0, dtype=DTYPES[_multiplied(case)]).element_size()
    milliseconds = row.get("device_time_p50_ms" if case.device == "cuda" else "latency_p50_ms")
    if not macs or not milliseconds:
        return {}
    flops = 2 * (macs + (row.get("macs_backward_counted") or 0))
    elements = row["params"] + 2 * case.batch * case.height * case.width * (case.dim or 3)
    moved = size * elements * (1 if case.mode == "forward" else 2)
    least = max(flops / peaks.get(_multiplied(case), peaks["fp32"]), moved / peaks["copy"])
    return {
        "achieved_tflops": flops / milliseconds / 1e9,
        "arithmetic_intensity": flops / moved,
        "roofline_fraction": least / (milliseconds / 1e3),
    }


def _fastest(run: Callable[[], Any], device: str) -> float:
    best, end = float("inf"), time.perf_counter() + ENOUGH_SECONDS
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best
