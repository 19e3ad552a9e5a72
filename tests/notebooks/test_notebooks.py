"""The notebooks run without PyTorch, report findings that match the data, and report missing data."""

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from notebooks.figures import cost_split, crossover, latency, one_config, pareto, routes  # fmt: skip
from notebooks.lib import export, limits, plots, programs  # fmt: skip
from notebooks.tables import break_even, prediction, published, speed, targets  # fmt: skip
from profiling.schema.capability import validate as validate_trained
from profiling.schema.row import agree, load, validate

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {
    "readme", "resolution_forward", "resolution_forward_backward", "topk", "kv_downsample", "kv_downsample_map",
    "cost_split", "latency", "break_even", "pareto_forward", "pareto_forward_backward", "profile_one_config",
    "bra_speed", "capability", "capability_pareto", "capability_topk",
}  # fmt: skip
TABLES = {
    "published_models",
    "other_models",
    "attentions",
    "memory_limits",
    "growth",
    "stl",
    "break_even",
    "bra_break_even",
    "precision",
    "memory_prediction",
    "targets_cpu",
}
TABLES |= {"pareto_forward", "pareto_forward_backward"}
TABLES |= {"capability_tasks", "capability_transfer", "capability_bra"}
PARTS = {"macs_projection": 50, "macs_routing": 10, "macs_attention": 30, "macs_local_conv": 10, "macs_analytic": 100}
TABLES |= {f"bra_{what}_{mode}" for what in ("speed", "memory") for mode in ("forward", "forward_backward")}
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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with all sweeps of one device, and a file beside them that is no sweep."""
    folder = tmp_path_factory.mktemp("results")
    device = folder / "round-numbers"
    device.mkdir()
    (device / "peaks.csv").write_text("what,per_second,unit\nfp32,1e9,FLOP\n")
    table = validate([*resolution(), *ablations(), *growth(), *speeds(), *precision()])
    for sweep, rows in table.groupby("sweep"):
        rows.to_csv(device / f"{sweep}.csv", index=False)
    for sweep, rows in validate_trained(list(trained())).groupby("sweep"):
        rows.to_csv(device / f"{sweep}.csv", index=False)
    (folder / one_config.STORED).write_text(json.dumps(profile()))
    return folder


def environment(results: Path, out: Path, blocked: bool = True) -> dict[str, str]:
    """Environment of a process that uses temporary folders; if blocked, it cannot import PyTorch and the zoo."""
    (out / "block").mkdir(parents=True, exist_ok=True)
    (out / "block" / "sitecustomize.py").write_text(BLOCK if blocked else "")
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("ATTENTION_")}
    folders = {"RESULTS": results, "FIGURES": out / "figures", "TABLES": out / "tables"}
    chosen |= {f"ATTENTION_{name}": str(folder) for name, folder in folders.items()}
    return chosen | {"PYTHONPATH": str(out / "block"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def run(environments: dict[str, dict[str, str]], notebooks: list[Path]) -> dict[tuple[str, str], str]:
    """The output of every notebook in each environment, as text; runs one notebook per processor."""

    async def one(path: Path, env: dict[str, str], free: asyncio.Semaphore) -> str:
        where = {"metadata": {"path": path.parent}}
        for left in (2, 1, 0):
            notebook = nbformat.read(path, as_version=4)
            client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where)
            try:
                async with free:
                    await client.async_execute(env=env)
                break
            except RuntimeError as problem:
                # Kernels that start at the same moment may choose the same port; the later one then dies.
                if "Kernel died before replying" not in str(problem) or not left:
                    raise
        outputs = [output for part in notebook.cells if part.cell_type == "code" for output in part.outputs]
        return "\n".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)

    async def everything() -> list[str | BaseException]:
        free = asyncio.Semaphore(os.cpu_count() or 2)
        runs = (one(path, env, free) for env in environments.values() for path in notebooks)
        return await asyncio.gather(*runs, return_exceptions=True)

    texts = asyncio.run(everything())
    if failed := [text for text in texts if not isinstance(text, str)]:
        raise failed[0]
    keys = [(case, path.stem) for case in environments for path in notebooks]
    return dict(zip(keys, map(str, texts), strict=True))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def shown(results: Path, out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    nothing = tmp_path_factory.mktemp("nothing")
    return run({"data": environment(results, out), "empty": environment(nothing, out / "empty")}, NOTEBOOKS)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "bra_ablations", "bra_speed", "capability", "complexity_tables", "latency_and_pareto",
        "memory_resolution_curves", "profile_one_config", "routing_gallery",
    }  # fmt: skip


def test_one_notebook_needs_no_pytorch_and_writes_its_figures(results: Path, tmp_path: Path) -> None:
    (notebook,) = (path for path in NOTEBOOKS if path.stem == "memory_resolution_curves")
    texts = run({"data": environment(results, tmp_path)}, [notebook])
    assert "no rows of" not in "".join(texts.values()).lower()
    assert {"resolution_forward", "resolution_forward_backward", "readme"} <= {
        path.stem for path in (tmp_path / "figures").glob("*.png")
    }


@pytest.mark.parametrize("module", ["torch", "attention_zoo"])
def test_blocked_modules_cannot_be_imported(module: str, results: Path, out: Path) -> None:
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, env=environment(results, out), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and f"{module} is not there" in result.stderr


def test_figures_and_tables_are_written(shown: dict[tuple[str, str], str], out: Path) -> None:
    assert {path.stem for path in (out / "figures").glob("*.png")} == FIGURES
    assert all((out / "figures" / f"{name}.png").stat().st_size > 10_000 for name in FIGURES)
    for suffix in ("md", "tex"):
        assert {path.stem for path in (out / "tables").glob(f"*.{suffix}")} == TABLES


@pytest.mark.parametrize(
    ("notebook", "sentence"),
    [
        ("memory_resolution_curves", "memory runs out at these tokens per side (interpolated): full near 32."),
        ("memory_resolution_curves", "bra, my_plugin still fit at 128 x 128, with at most 256 MiB."),
        ("memory_resolution_curves", "Predicted and measured peak memory are equal in all 58 measured cells."),
        ("memory_resolution_curves", "| full | reference | forward | 3 | +0.000% | +0.000% | 56 x 56, fp32, batch 1, "),
        ("memory_resolution_curves", "takes 48.0x as long with full (48.0 ms) as with my_plugin (1.00 ms)."),
        ("memory_resolution_curves", "| full | near 32 (fits at 16, not at 64) | 2.00 |"),
        ("memory_resolution_curves", "| bra | fits at 128 | 1.00 |"),
        ("complexity_tables", "| BiFormer-T | 13.1 | 13.143 | (+0.33%) | 2.2 | 2.228 | (+1.27%) | 2.216 | 81.4 |"),
        ("complexity_tables", "1 of 1 recounted parameter counts of BiFormer round to the published figure"),
        ("complexity_tables", "At 64 x 64 tokens, batch 1, dim 64, 2 heads, fp32; Round Numbers."),
        ("complexity_tables", "64.0 / 64.0 | 8.00 [7.20, 8.80] |"),
        ("complexity_tables", "| bra | 2.00 | 2.00 ± 0.00 | 1.00 ± 0.00 | 2.00 ± 0.00 | 2.00 ± 0.00 |  |  |"),
        ("complexity_tables", "| bra (n_win auto) | 1.33 | 1.50 ± 0.00 | 1.00 ± 0.00 | 1.50 ± 0.00 | 2.00 ± 0.00 |"),
        ("complexity_tables", "differ from theory by at most 0.17 (bra (n_win auto)), over 2 attentions."),
        ("complexity_tables", "its memory grows with HW to the power 2.00 instead of 1.50."),
        ("complexity_tables", "| window | 13.1 | 2.2 | 64 / 64 | 80.0 [72.0, 88.0] |"),
        ("complexity_tables", "28,285,666 parameters, Swin-T has 28,288,354: 2,688 more"),
        ("complexity_tables", "| Swin-T | 28 | 4.5 | 81.2 |"),
        ("bra_ablations", "topk 16 instead of 1 costs 1.0x the MACs, 15.0x the time and 16.0x the memory."),
        ("bra_ablations", "coarse_gate=True costs 1.50x the MACs, 2.00x the time and 2.00x the memory."),
        ("bra_ablations", "reference, topk 4: per_token_routing=True costs 1.50x the MACs, 8.00x the time and 8.00x"),
        ("bra_speed", "| shape | reference | sdpa | pre-gathered | window | full |"),
        ("bra_speed", "| 56 x 56 x 64, topk 1, n_win 7 | 8.00 | 2.00x | 4.00x | 8.00x | 4.00x |"),
        ("bra_speed", "| 224 x 224 x 64, topk 4, n_win 7 | oom | 50.0 | 25.0 | 8.00 | oom |"),
        ("bra_speed", "| geometric mean of the eight shapes |  | 6.00x | 8.94x | 19.0x | 4.24x |"),
        ("bra_speed", "| 224 x 224 x 64, topk 4, n_win 7 | 896 | 4.00x | 4.00x | 4.00x | 4.00x |"),
        ("bra_speed", "| shape | reference | flex | sdpa | pre-gathered | window | full |"),
        ("bra_speed", "| 56 x 56 x 64, topk 1, n_win 7 | 8.00 | unsupported | 2.00x | 4.00x | 8.00x | 4.00x |"),
        ("bra_speed", "| sdpa | forward | fp32 | near 71 (not faster at 56, faster at 112) |"),
        ("bra_speed", "| reference | forward | fp32 | not faster up to 112, the largest grid measured with both |"),
        ("bra_speed", "Forward, sdpa: 6.00x (geometric mean of 2; least 2.00x, at 56 x 56 x 64, topk 1, n_win 7)"),
        ("bra_speed", "reference, 4.00x (geometric mean of 3; least 4.00x, at 56 x 56 x 64, topk 1, n_win 7) less"),
        ("bra_speed", "BRA takes of the time of windows: reference 19.0x (2 shapes), sdpa 3.16x (2 shapes)."),
        ("bra_speed", "fp32, as fast, geometric mean | forward | 2.50x | 6.00x (mean of 2) | 2.00x | 56 x 56 x 64"),
        ("bra_speed", "fp32, less memory, each | forward | 1.00x | 4.00x (mean of 3) | 4.00x | 56 x 56 x 64"),
        ("bra_ablations", "avgpool from 64 to 16 keys per query, takes 25% of the time and 25% of the memory"),
        ("bra_ablations", "from 1 to 16: projection goes from 50% to 50% of the MACs; routing is 10.00% to 10.00%."),
        ("latency_and_pareto", "Forward at 16 x 16: from 1.00 ms with my_plugin to 48.0 ms with full, over 4"),
        ("latency_and_pareto", "| bra | 8.00 | 64.0 | 4.10 | 4.00 | yes | yes |"),
        ("latency_and_pareto", "| full | oom | 16,384 | 4.10 | 4.00 |  |  |"),
        ("latency_and_pareto", "| full | forward | no break-even from 8 to 16: 0.0417x the cost | no break-even from "),
        ("latency_and_pareto", "it is faster throughout, and takes 0.0417x at 8 and 0.0417x at 16 the other's time."),
        ("latency_and_pareto", "| attention | forward, 56 x 56 |"),
        ("latency_and_pareto", "| bra | 0.500x |"),
        ("latency_and_pareto", "forward at 56 x 56: 1.41x as fast (geometric mean of 2; from 0.500x, bra, to 4.00x"),
        ("latency_and_pareto", "no row here has a device time."),
        ("profile_one_config", "this is the result kept on 2026-01-02, of Round Numbers."),
        ("profile_one_config", "| MACs, by fvcore | 1,010 | +1.00% against the formula |"),
        ("profile_one_config", "The counters of MACs differ by 1.00%: 1,000 (analytic) to 1,010 (fvcore)."),
        ("profile_one_config", "The heaviest stage, bra.attend, takes 60% of the step's time."),
        ("capability", "1 task that counts separates attentions by more than 20 points: recall."),
        ("capability", "| recall | 100 (100 to 100) | 12 (12 to 12) | 12 | 88 | 3 | yes |"),
        ("capability", "recall with topk 1: 25 %, 4: 50 %, 16: 100 %."),
        ("routing_gallery", "| 7 x 7 | 4 | 256 | 8.2% | 10.00% |"),
        ("routing_gallery", "With 7 x 7 regions, topk 1 reaches 2.0% of the tokens and topk 16 33%"),
        ("routing_gallery", "no picture: `python -m attention_zoo bra --query 0.37,0.44` draws one."),
    ],
)  # fmt: skip
def test_findings_follow_from_the_rows(notebook: str, sentence: str, shown: dict[tuple[str, str], str]) -> None:
    assert sentence in shown["data", notebook]


def test_failed_cells_are_listed_with_their_reasons(shown: dict[tuple[str, str], str]) -> None:
    listed = shown["data", "memory_resolution_curves"]
    assert "| oom | predicted: needs 16.0 GiB, 1.0 GiB are free |" in listed
    assert "| crash | killed by signal 11 |" in listed


@pytest.mark.parametrize(
    ("notebook", "sweeps"),
    [
        ("memory_resolution_curves", ["resolution"]),
        ("complexity_tables", ["models", "resolution", "complexity", "stl"]),
        ("bra_ablations", ["topk", "kv_downsample"]),
        ("latency_and_pareto", ["resolution", "precision"]),
        ("routing_gallery", ["topk"]),
        ("capability", ["capability", "capability_bra"]),
        ("bra_speed", ["bra_speed"]),
    ],
)
def test_without_data_the_command_is_named_once(
    notebook: str, sweeps: list[str], shown: dict[tuple[str, str], str], out: Path
) -> None:
    for sweep in sweeps:
        assert shown["empty", notebook].count(f"`python run_all.py --only {sweep}` makes them.") == 1
    assert not list((out / "empty").glob("figures/*"))


@pytest.mark.parametrize(
    ("ours", "full", "side", "words"),
    [
        ({8: 4.0, 32: 4.0}, {8: 1.0, 32: 16.0}, 16.0, "near 16 (not faster at 8, faster at 32)"),
        (
            {8: 1.0, 16: 9.0, 32: 1.0},
            {8: 2.0, 16: 1.0, 32: 9.0},
            16 * 2**0.5,
            "near 23 (not faster at 16, faster at 32)",
        ),
        ({8: 1.0, 64: 1.0}, {8: 2.0, 32: 1.0}, None, "faster at every measured grid, from 8"),
        ({8: 3.0, 16: 3.0}, {8: 2.0, 16: 3.0}, None, "not faster up to 16, the largest grid measured with both"),
        ({8: 3.0}, {16: 3.0}, None, "not measured at one grid"),
    ],
)
def test_break_even(ours: dict[int, float], full: dict[int, float], side: float | None, words: str) -> None:
    result = break_even.break_even(pd.Series(ours), pd.Series(full))
    assert result[1] == words and result[0] == (None if side is None else pytest.approx(side))


def test_gpu_targets_are_listed_beside_measurements() -> None:
    rows = []
    for impl, ms, graph in (
        ("reference", 10.0, True),
        ("triton", 1.0, True),
        ("triton", 1.0, False),
        ("flex", 1.2, False),
    ):
        more = {"impl_requested": impl, "dtype": "bf16", "device": "cuda", "cuda_graph": graph}
        for batch in (1, 128):
            at_56 = 2.0 if batch > 1 else ms
            for side, topk, time in ((112, 4, ms), (56, 1, at_56)):
                shape = {"n_win": "7", "topk": topk, "batch": batch, speed.DEVICE_TIME: time}
                rows.append(cell("bra_speed", "bra", "forward", side, 2**20, 2 * time, **more, **shape))
    with plots.kept() as shown:
        targets.table(plots.Results(validate(rows)))
    (table,) = map(str, shown)
    at = "112 x 112 x 64, topk 4, n_win 7"
    where = "at 112, 224, 256, bf16, as fast, each | forward"
    kernels, published = "triton, CUDA graph", "reference, CUDA graph"
    assert f"| {kernels} against {published}, {where} | 8.00x | 10.0x (mean of 1) | 10.0x | {at} | yes |" in table
    assert f"| triton against flex, {where} | 1.30x | 1.20x (mean of 1) | 1.20x | {at} | no |" in table
    assert f"| triton against reference, compiled, {where} | 3.00x |  |  |  |  |" in table
    small = "at 56, 28, 14, batch 128, bf16, as fast, each | forward | 1.00x | 1.00x (mean of 1) | 1.00x"
    assert f"| {kernels} against {published}, {small} | 56 x 56 x 64, topk 1, n_win 7, batch 128 | yes |" in table
    assert "sdpa" not in table


def test_wrong_prediction_is_reported_with_its_cell() -> None:
    rows = [cell("topk", "bra", "forward", side, 2**20, 1.0, n_win="7", topk=1, impl="sdpa") for side in (7, 14)]
    rows[1]["memory_peak_bytes"] = 2**19
    with plots.kept():
        result = prediction.findings(plots.Results(validate(rows)))
    assert result == [
        "Predicted and measured peak memory differ by at most 100.00% in 2 measured cells (bra, sdpa, forward at "
        "14 x 14, fp32); 1 cells by more than 3 %."
    ]


def test_launch_bound_grids_are_reported_for_a_gpu() -> None:
    timed = ((8, 3.0), (16, 2.5), (64, 1.0))
    rows = [cell("resolution", "full", "forward", n, 1, 1.0, device="cuda", launch_bound=x) for n, x in timed]
    results = plots.Results(validate(rows))
    with plots.kept() as shown:
        latency.launches(results)
        result = latency.findings(results)
    assert "| full | 3.00 | 2.50 | 1.00 |" in str(shown[0])
    assert any("up to 16 x 16 launching" in sentence for sentence in result)


def test_speed_ups_keep_settings_launches_and_batches_apart() -> None:
    more = {"n_win": "7", "topk": 1}
    rows = [cell("bra_speed", "bra", "forward", 56, 2**20, 8.0, **more)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, ms, compiled=True, replicate=r, **more)
             for r, ms in enumerate((1.0, 2.0, 9.0))]  # fmt: skip
    big = {"device": "cuda", "dtype": "bf16", "batch": 128} | more
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 6.0, **big)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 4.0, cuda_graph=True, **big)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 2.0, cuda_graph=True, impl_requested="triton", **big)]
    times = speed.ratios(speed.wide(validate(rows), speed.TIME))
    assert times.columns.tolist() == ["reference", "reference, CUDA graph", "reference, compiled", "triton, CUDA graph"]
    unmodified, graph = times["reference, compiled"].dropna(), times["triton, CUDA graph"].dropna()
    assert unmodified.index.tolist() == [("forward", "fp32", 1, 56, 56, 64, 2, 1, "7")] and unmodified.tolist() == [4.0]
    assert graph.index.tolist() == [("forward", "bf16", 128, 56, 56, 64, 2, 1, "7")] and graph.tolist() == [2.0]
    assert speed.geometric_mean(pd.Series([2.0, 18.0, None])) == pytest.approx(6.0)
    other = cell("bra_speed", "bra", "forward", 56, 2**20, 8.0, n_win="7", topk=8)
    assert len(speed.of_the_eight(speed.wide(validate([*rows, other]), speed.TIME))) == 2


@pytest.mark.parametrize(
    ("curve", "limit", "expected"),
    [
        ({10: 100, 20: 1600}, 400, (math.sqrt(200), 10, 20)),
        ({10: 100, 20: 400, 40: 1600}, 400, (20.0, 20, 40)),
        ({10: 100, 20: 200}, 300, (None, 20, None)),
        ({10: 500, 20: 600}, 300, (None, None, 10)),
    ],
)
def test_crossing(curve: dict[int, float], limit: float, expected: tuple[float | None, int | None, int | None]) -> None:
    result = limits.crossing(pd.Series(curve), limit)
    assert (result.below, result.above) == expected[1:]
    assert result.side == (None if expected[0] is None else pytest.approx(expected[0]))


def test_device_memory_is_assumed_and_labelled_without_an_oom_row(results: Path) -> None:
    rows = load(*results.glob("*/resolution.csv"))
    assert limits.device_memory(plots.Results(rows)) == (2**30, "1.0 GiB free on this device")
    assert limits.device_memory(plots.Results(rows[rows["status"] == "ok"])) == (24 * 2**30, "24 GiB (assumed)")


def test_replicates_become_a_median_and_the_widest_interval() -> None:
    times = enumerate((1.0, 4.0, 2.0))
    rows = [cell("resolution", "bra", "forward", 8, 100, ms, replicate=replicate) for replicate, ms in times]
    row = limits.cells(validate(rows)).loc[8]
    assert (row["latency_p50_ms"], row["latency_low_ms"], row["latency_high_ms"]) == pytest.approx((2.0, 0.9, 4.4))


def test_a_line_for_each_implementation() -> None:
    rows = [cell("resolution", name, "forward", 8, 100, 1.0) for name in ("full", "bra")]
    rows.append(cell("resolution", "bra", "forward", 8, 100, 1.0, impl_requested="triton"))
    assert [label for _, label, *_ in plots.series(validate(rows))] == ["full", "bra", "bra (triton)"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "0.5 KiB"), (2**20, "1 MiB"), (1023.9 * 2**20, "1 GiB"), (1.5 * 2**30, "1.5 GiB"), (2**44, "16 TiB")],
)
def test_sizes_in_binary_units(count: float, text: str) -> None:
    assert plots.size(count) == text


def test_published_figures_are_only_published() -> None:
    table = published.published()
    assert list(table.columns) == ["model", "published_params_m", "published_macs_g", "published_top1", "source"]
    assert set(published.MODELS.values()) <= set(table["model"])
    assert (table["source"] != "").all() and (table["published_macs_g"].astype(float) > 0).all()


@pytest.mark.parametrize(
    ("text", "count", "shown"), [("13.1", 13.142, "(+0.32%)"), ("13.1", 13.16, "+0.46%"), ("", 1.0, "")]
)
def test_difference_is_in_brackets_if_it_is_rounding(text: str, count: float, shown: str) -> None:
    assert published.difference(text, count, 1.0) == shown


def test_the_device_can_be_chosen_and_a_gpu_or_the_most_cases_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, device, grids in (("a-cpu", "cpu", [56]), ("b-gpu", "cuda", [56]), ("c-cpu", "cpu", [56, 112])):
        (tmp_path / folder).mkdir()
        of_it = {"device": device, "device_name": folder}
        rows = [cell("topk", "bra", "forward", grid, 100, 1.0, **of_it) for grid in grids]
        validate(rows).to_csv(tmp_path / folder / "topk.csv", index=False)
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    monkeypatch.delenv("ATTENTION_DEVICE", raising=False)
    assert plots.load().rows["device_name"].tolist() == ["b-gpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "a-cpu")
    assert plots.load().rows["device_name"].tolist() == ["a-cpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "c-tpu")
    with pytest.raises(ValueError, match="valid: a-cpu, b-gpu, c-cpu"):
        plots.load()
    monkeypatch.delenv("ATTENTION_DEVICE")
    (tmp_path / "b-gpu" / "topk.csv").unlink()
    assert plots.load().rows["device_name"].unique().tolist() == ["c-cpu"]


def test_file_of_another_schema_is_reported_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "topk.csv").write_text("name,ms\nbra,1\n")
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(plots, "say", said.append)
    assert plots.load().rows.empty
    assert said[0].startswith("Folder `old` is left out:") and "another schema" in said[0]


@pytest.mark.slow
def test_commands_run_where_pytorch_is_installed(tmp_path: Path) -> None:
    live = [path for path in NOTEBOOKS if path.stem in ("profile_one_config", "routing_gallery")]
    said = run({"live": environment(tmp_path, tmp_path, blocked=False)}, live)
    kept = json.loads((tmp_path / one_config.STORED).read_text())
    assert (kept["name"], kept["config"], kept["status"]) == ("bra", one_config.CONFIG, "ok")
    assert f"Measured just now on **{kept['device_name']}**" in said["live", "profile_one_config"]
    assert f"| MACs, by formula | {kept['macs_analytic']:,} |" in said["live", "profile_one_config"]
    assert "Drawn just now" in said["live", "routing_gallery"]
    assert (tmp_path / "figures" / "routes.png").stat().st_size > 10_000


def test_rejected_command_raises_with_its_message() -> None:
    with pytest.raises(ValueError, match=r"unknown attention 'none'; valid: .*bra"):
        programs.run("profiling", "--attention", "none", "--json")
    with pytest.raises(RuntimeError, match="No module named none"):
        programs.run("none")


def ratio(low: list[float], middle: list[float], high: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"low": low, "middle": middle, "high": high}, index=[10, 20, 40][: len(low)])


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (ratio([2, 0.5, 0.125], [4, 1, 0.25], [8, 2, 0.5]), [(20, math.sqrt(200), math.sqrt(800), True)]),
        (ratio([0.125, 0.5], [0.5, 2], [2, 8]), [(math.sqrt(200), None, None, False)]),
        (ratio([0.125, 0.5, 1], [0.5, 2, 4], [0.5, 2, 4]), [(math.sqrt(200), math.sqrt(200), None, False)]),
        (ratio([2, 3, 2], [2, 3, 2], [2, 3, 2]), []),
        (ratio([1, 1], [1, 1], [1, 1]), []),
        (ratio([0.1], [0.1], [0.1]), []),
        (ratio([], [], []), []),
        (
            ratio([4, 0.25, 4], [4, 0.25, 4], [4, 0.25, 4]),
            [
                (math.sqrt(200), math.sqrt(200), math.sqrt(200), True),
                (math.sqrt(800), math.sqrt(800), math.sqrt(800), False),
            ],
        ),
    ],
    ids=["interval", "open at both ends", "open above", "none", "equal", "one grid", "no grid", "twice"],
)
def test_crossings(measured: pd.DataFrame, expected: list[tuple[float, float | None, float | None, bool]]) -> None:
    def close(value: float | None) -> Any:
        return None if value is None else pytest.approx(value)

    result = [(one.side, one.low, one.high, one.falling) for one in crossover.crossings(measured)]
    assert result == [(close(side), close(low), close(high), falling) for side, low, high, falling in expected]


def measured(times: dict[str, list[Any]], **more: Any) -> plots.Results:
    """A resolution sweep at grids of 8 and 16 with these times."""
    pairs = [(name, side, ms) for name, both in times.items() for side, ms in zip((8, 16), both, strict=True)]
    return plots.Results(
        validate([cell("resolution", name, "forward", side, 100, ms, **more) for name, side, ms in pairs])
    )


def test_break_even_is_reported_with_its_interval() -> None:
    # 1/2 to 2 passes 1 half way in log-log; with quartiles of 0.8 and 1.25, so does 0.32 to 1.28, and 0.78 to 3.1.
    results = measured({"bra": [1, 2], "window": [2, 1], "full": [4, 8]})
    low, high = (8 * 2 ** (math.log(1 / start) / math.log(4)) for start in (0.78125, 0.32))
    with plots.kept():
        said = crossover.findings(results)
    assert said == [
        "Forward, bra (reference implementations) against full: no break-even in the measured range; it is faster "
        "throughout, and takes 0.250x at 8 and 0.250x at 16 the other's time.",
        f"Forward, bra (reference implementations) against window: slower from near 11 (between {low:.0f} and "
        f"{high:.0f}) tokens per side on; at 16 x 16 it takes 2.00x the other's time.",
    ]
    assert (round(low), round(high)) == (9, 14)


def test_one_common_grid_is_no_range() -> None:
    with plots.kept():
        said = crossover.findings(measured({"bra": [1, None], "full": [2, None]}))
    assert len(said) == 1 and said[0].endswith("it is faster throughout, and takes 0.500x at 8 the other's time.")


def test_break_even_compares_only_equal_settings() -> None:
    rows = [cell("resolution", "bra", "forward", side, 100, 1.0, impl_requested="sdpa") for side in (8, 16)]
    rows += [cell("resolution", "full", "forward", side, 100, 1.0) for side in (8, 16)]
    with plots.kept() as shown:
        crossover.table(plots.Results(validate(rows)))
    assert shown == ["The `resolution` sweep holds no rows of bra beside full or window in the same setting."]


def test_pareto_front() -> None:
    costs = pd.DataFrame({"ms": [1, 2, 3, 1, 4], "bytes": [4, 2, 1, 4, 4]}, index=list("abcde"))
    assert pareto.front(costs).to_dict() == {"a": True, "b": True, "c": True, "d": True, "e": False}


def test_membership_of_the_front_accounts_for_noise() -> None:
    columns = {"latency": [1.0, 1.1, 5.0, 0.5], "low": [0.9, 0.95, 4.9, 0.4], "high": [1.2, 1.3, 5.1, 0.6]}
    columns |= {"memory": [1.0, 1.0, 1.0, 9.0], "macs": [1.0, 1.0, 1.0, 1.0]}
    result = pd.DataFrame(columns, index=["fast", "alike", "slow", "large"])
    result.loc["unknown"] = [float("nan"), float("nan"), float("nan"), 1.0, 1.0]
    expected = {"fast": "within noise", "alike": "within noise", "slow": "no", "large": "yes", "unknown": ""}
    assert pareto.membership(result, pareto.COSTS).to_dict() == expected


def test_costs_of_a_step_count_the_backward_pass() -> None:
    row = cell(
        "resolution", "bra", "forward_backward", 16, 2**20, 1.0, macs_counted=1_000_000, macs_backward_counted=2_000_000
    )
    point = pareto.points(plots.Results(validate([row])), "forward_backward").loc["bra"]
    assert (point["macs"], point["memory"], point["low"], point["high"]) == (3.0, 1.0, 0.8, 1.25)


def test_shares_of_the_cost() -> None:
    row = cell("topk", "bra", "forward", 56, 100, 1.0, n_win="7", topk=4, macs_counted=100, **PARTS)
    assert cost_split.split(validate([row])).iloc[0].tolist() == [0.5, 0.1, 0.3, 0.1]


def test_regions_and_keys_reached_by_topk() -> None:
    more = {"n_win": "7", "topk": 4, "regions_per_side": 7, "kv_tokens_per_query": 256, "macs_counted": 100} | PARTS
    result = routes.reached(plots.Results(validate([cell("topk", "bra", "forward", 56, 100, 1.0, **more)]))).iloc[0]
    assert (result["regions"], result["keys"], result["share"], result["routing"]) == (49, 256, 256 / 3136, 0.1)


def test_numbers_are_right_aligned_and_words_left_aligned() -> None:
    table = pd.DataFrame(
        {"a": ["full", "bra"], "b": ["1,234", ""], "c": ["2.5 [2, 3]", "oom"], "d": ["7 x 7", "(+1%)"]}
    )
    assert export.markdown(table).splitlines()[1] == "| --- | ---: | --- | ---: |"
    assert r"\begin{tabular}{lrlr}" in export.latex(table, "")


def test_kept_output_is_neither_shown_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("ATTENTION_TABLES", str(tmp_path / "tables"))
    with plots.kept() as shown:
        figure = crossover.figure(measured({"bra": [1, 2], "full": [2, 1]}))
        export.publish(pd.DataFrame({"a": ["1"]}), "name", "note")
        plots.say("one", "two")
    assert shown == [figure, "| a |\n| ---: |\n| 1 |\n\nnote\n", "- one\n- two"] and not list(tmp_path.iterdir())
