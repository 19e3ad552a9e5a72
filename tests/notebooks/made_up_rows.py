"""Made-up rows of every sweep, whose findings can be worked out by hand."""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from profiling.schema.row import agree

PARTS = {"macs_projection": 50, "macs_routing": 10, "macs_attention": 30, "macs_local_conv": 10, "macs_analytic": 100}
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "attention_zoo"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
"""


def cell(
    sweep: str, name: str, mode: str, side: int, memory: int | None, ms: float | None, **more: Any
) -> dict[str, Any]:
    """A row of round numbers; without ``ms`` it was not measured."""
    row = {
        "sweep": sweep, "kind": "attention", "name": name, "impl_requested": "reference", "compiled": False,
        "cuda_graph": False, "deterministic": False, "mode": mode, "dtype": "fp32", "device": "cpu", "batch": 1,
        "height": side, "width": side, "dim": 64, "num_heads": 2, "seed": 0, "replicate": 0,
        "device_name": "Round Numbers", "params": 64,
        "macs_counted": 1000 * side**2, "memory_predicted_bytes": memory, "kv_tokens_per_query": 4,
        "started_at": "2026-01-02T03:04:05+00:00", "status": "predicted", "reason": "as the sweep asks",
    } | more  # fmt: skip
    if ms is not None:
        row |= {"status": "ok", "reason": None, "memory_peak_bytes": memory, "latency_p50_ms": ms}
        row |= {"latency_low_ms": 0.9 * ms, "latency_high_ms": 1.1 * ms}
        row |= {"latency_p25_ms": 0.8 * ms, "latency_p75_ms": 1.25 * ms}
    counts = (row.get(column) for column in ("macs_analytic", "macs_counted", "macs_fvcore"))
    return row | {"macs_agree": agree(*counts)}


def resolution() -> Iterator[dict[str, Any]]:
    """Full attention takes 1 KiB times side to the fourth, so that it reaches 1 GiB at exactly 32; bra never does.

    ``bare`` has only a time, like a plugin that declares nothing.
    """
    for side in (8, 16):
        yield cell("resolution", "bare", "forward", side, None, 2.0, macs_counted=None)
    for mode in ("forward", "forward_backward"):
        for side in (8, 16, 64, 128):
            small = side < 64
            oom = {"status": "oom", "reason": "predicted: needs 16.0 GiB, 1.0 GiB are free"} if side == 64 else {}
            yield cell("resolution", "bra", mode, side, 2**14 * side**2, side / 8 if side < 128 else None, topk=2)
            yield cell("resolution", "full", mode, side, 2**10 * side**4, 3.0 * side if small else None, **oom)
            yield cell("resolution", "my_plugin", mode, side, 2**12 * side**2, 1.0 if small else None)


def ablations() -> Iterator[dict[str, Any]]:
    for topk, ms in ((1, 2.0), (4, 5.0), (16, 30.0)):
        spent = {"macs_counted": 100, "regions_per_side": 7, "kv_tokens_per_query": 64 * topk} | PARTS
        yield cell("topk", "bra", "forward", 56, 2**20 * topk, ms, n_win="7", topk=topk, **spent)
    for options, factor in (("coarse_gate=True", 2), ("per_token_routing=True", 8)):
        more = {"macs_counted": 150, "regions_per_side": 7, "kv_tokens_per_query": 305} | PARTS
        at = {"n_win": "7", "topk": 4, "other_options": options}
        yield cell("topk", "bra", "forward", 56, factor * 2**22, 5.0 * factor, **at, **more)
    crash = {"status": "crash", "reason": "killed by signal 11"}
    yield cell("topk", "bra", "forward", 56, 2**20, None, n_win="14", topk=1, **crash)
    kinds = (("identity", 64, 10.0), ("avgpool", 16, 2.5), ("conv", 16, 5.0))
    for kind, keys, ms in kinds:
        more = {"kv_downsample_mode": kind, "kv_tokens_per_query": keys, "n_win": "7", "topk": 4}
        yield cell("kv_downsample", "bra", "forward", 56, 2**20 * keys, ms, **more)
    model = {"kind": "model", "dim": None, "num_heads": None, "params": 13_142_760, "kv_tokens_per_query": None}
    macs = {"macs_counted": 2_215_901_568, "macs_fvcore": 2_228_044_160}
    yield cell("models", "biformer_tiny", "forward", 224, 2**26, 80.0, **model, **macs)
    for mode in ("forward", "forward_backward"):
        measured = 80.0 if mode == "forward" else None
        yield cell("stl", "biformer_stl", mode, 224, 2**26, measured, attention="window", **model, **macs)
        swin = model | {"params": 28_285_666}
        yield cell("stl", "biformer_stl", mode, 224, 2**26, None, attention="shifted_window", **swin, **macs)


def precision() -> Iterator[dict[str, Any]]:
    for name, fp32, bf16 in (("full", 8.0, 2.0), ("bra", 3.0, 6.0)):
        yield cell("precision", name, "forward", 56, 2**21, fp32)
        yield cell("precision", name, "forward", 56, None, bf16, dtype="bf16", memory_peak_bytes=2**20)
    yield cell("precision", "window", "forward", 56, None, 1.0, dtype="bf16")


def growth() -> Iterator[dict[str, Any]]:
    """Costs that are powers of the side from 32 on, and other values below, which the fit must exclude."""
    for side in (8, 16, 32, 64, 128, 256, 512):
        for n_win, power in (("7", 4), ("auto", 3)):
            more = {"macs_attention": side**power + (side < 32) * 10**9, "macs_routing": 0}
            more |= {"n_win": n_win, "exponent_theory": 2 if n_win == "7" else 4 / 3}
            yield cell("complexity", "bra", "forward", side, side**power, None, **more)
            yield cell("complexity", "bra", "forward_backward", side, side**4, None, **more)


def profile() -> dict[str, Any]:
    """Output of a profiler with fvcore one percent off and two stages."""
    result = cell(
        "profiling", "bra", "forward", 56, 2**20, 2.0, macs_analytic=1000, macs_counted=1000, macs_fvcore=1010
    )
    stages = [{"name": f"bra.{name}", "share": share} for name, share in (("route", 0.1), ("attend", 0.6))]
    operators = [{"name": "aten::bmm", "calls": 2, "self_ms": 1.0, "share": 0.5}]
    said = {"config": "--attention bra", "started_at": "2026-01-02T03:04:05+00:00", "torch": "2.13.0", "impl": "sdpa"}
    return result | said | {"stages": stages, "heaviest_operators": operators}


def speeds() -> Iterator[dict[str, Any]]:
    """Times per implementation at (grid, topk); the reference does not fit at the largest."""
    places = ((56, 1), (56, 4), (112, 4), (224, 4))
    times = {
        ("bra", "reference"): (8.0, 16.0, 90.0, None), ("bra", "sdpa"): (4.0, 4.0, 5.0, 50.0),
        ("bra_pregathered", "sdpa"): (2.0, 3.0, 4.5, 25.0), ("full", "sdpa"): (2.0, 2.0, 20.0, None),
        ("window", "sdpa"): (1.0, 1.0, 2.0, 8.0),
    }  # fmt: skip
    for ((name, impl), of_name), mode in product(times.items(), ("forward", "forward_backward")):
        for (side, topk), ms in zip(places, of_name, strict=True):
            more: dict[str, Any] = {"impl_requested": impl}
            if name.startswith("bra"):
                more |= {"n_win": "7", "topk": topk}
            elif (side, topk) == (56, 4):
                continue
            memory = 2**20 * side * (4 if impl == "reference" else 1)
            failed = {"status": "oom", "reason": "predicted: needs 2.0 GiB, 1.0 GiB are free"} if ms is None else {}
            yield cell("bra_speed", name, mode, side, memory, ms, **more, **failed)
    bare = {"impl_requested": "flex", "n_win": "7", "topk": 1, "status": "unsupported", "reason": "not here"}
    yield cell("bra_speed", "bra", "forward_backward", 56, None, None, **bare)


def training(
    name: str, task: str, accuracy: float, seed: int = 0, sweep: str = "capability", **more: Any
) -> dict[str, Any]:
    """A row of a capability sweep."""
    return {
        "sweep": sweep, "name": name, "task": task, "difficulty": "medium", "height": 14, "width": 14, "dim": 32,
        "num_heads": 2, "depth": 2, "batch": 8, "steps": 500, "optimiser": "AdamW one-cycle", "learning_rate": 0.01,
        "dtype": "fp32", "device": "cpu", "seed": seed, "device_name": "Round Numbers", "status": "ok", "chance": 0.125,
        "accuracy": accuracy, "accuracy_double": accuracy / 2, "loss": 0.5, "answers": 1000,
        "started_at": "2026-01-02T03:04:05+00:00",
    } | more  # fmt: skip


def trained() -> Iterator[dict[str, Any]]:
    """Accuracies of a task that counts, of one at which the convolution is as good, and of one that is not solved."""
    of_task = {
        "recall": {"full": 1.0, "bra": 0.8, "my_plugin": 0.5, "pseudo_conv": 0.125},
        "count": {"full": 1.0, "bra": 0.9, "my_plugin": 0.9, "pseudo_conv": 0.9},
        "connect": {"full": 0.6, "bra": 0.6, "my_plugin": 0.5, "pseudo_conv": 0.1},
    }
    for task, seed in product(of_task, range(3)):
        for name, accuracy in of_task[task].items():
            yield training(name, task, accuracy - 0.02 * seed * (name == "bra"), seed)
    for topk, accuracy in ((1, 0.25), (4, 0.5), (16, 1.0)):
        options = {"topk": topk, "n_win": "7"} | ({"options": f"topk={topk}"} if topk != 4 else {})
        yield training("bra", "recall", accuracy, sweep="capability_bra", accuracy_double_auto=0.25, **options)


def environment(results: Path, out: Path, blocked: bool = True) -> dict[str, str]:
    """Environment of a process that uses temporary folders; if blocked, it cannot import PyTorch and the zoo."""
    (out / "block").mkdir(parents=True, exist_ok=True)
    (out / "block" / "sitecustomize.py").write_text(BLOCK if blocked else "")
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("ATTENTION_")}
    folders = {"RESULTS": results, "FIGURES": out / "figures", "TABLES": out / "tables"}
    chosen |= {f"ATTENTION_{name}": str(folder) for name, folder in folders.items()}
    return chosen | {"PYTHONPATH": str(out / "block"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
