"""The notebooks run on a machine without PyTorch, say what the data say, and say so when there are none."""

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from notebooks import limits, plots, published
from profiling.rows import agree, load, validate

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"readme", "resolution_forward", "resolution_forward_backward", "topk", "kv_downsample"}
TABLES = {"published_models", "other_models", "attentions", "memory_limits", "growth", "stl"}
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
        "deterministic": False, "mode": mode, "dtype": "fp32", "device": "cpu", "batch": 1, "height": side,
        "width": side, "dim": 64, "num_heads": 2, "seed": 0, "replicate": 0, "device_name": "Round Numbers",
        "params": 64, "macs_counted": 1000 * side**2, "memory_predicted_bytes": memory, "kv_tokens_per_query": 4,
        "started_at": "2026-01-02T03:04:05+00:00", "status": "predicted", "reason": "as the sweep asks",
    } | more  # fmt: skip
    if ms is not None:
        row |= {"status": "ok", "reason": None, "memory_peak_bytes": memory, "latency_p50_ms": ms}
        row |= {"latency_low_ms": 0.9 * ms, "latency_high_ms": 1.1 * ms}
    counts = (row.get(column) for column in ("macs_analytic", "macs_counted", "macs_fvcore"))
    return row | {"macs_agree": agree(*counts)}


def resolution() -> Iterator[dict[str, Any]]:
    """Full attention takes 1 KiB times side to the fourth, so that it leaves 1 GiB at 32 exactly; bra never does.

    Of ``bare`` nothing is known but its time, as of a plugin that declares nothing.
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
        yield cell("topk", "bra", "forward", 56, 2**20 * topk, ms, n_win="7", topk=topk)
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


def growth() -> Iterator[dict[str, Any]]:
    """Costs that are powers of the side from 32 on, and something else below, which the fit has to leave out."""
    for side in (8, 16, 32, 64, 128, 256, 512):
        for n_win, power in (("7", 4), ("auto", 3)):
            more = {"macs_attention": side**power + (side < 32) * 10**9, "macs_routing": 0}
            more |= {"n_win": n_win, "exponent_theory": 2 if n_win == "7" else 4 / 3}
            yield cell("complexity", "bra", "forward", side, side**power, None, **more)
            yield cell("complexity", "bra", "forward_backward", side, side**4, None, **more)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with all sweeps of one device, and a file beside them that is no sweep."""
    folder = tmp_path_factory.mktemp("results")
    device = folder / "round-numbers"
    device.mkdir()
    (device / "peaks.csv").write_text("what,per_second,unit\nfp32,1e9,FLOP\n")
    table = validate([*resolution(), *ablations(), *growth()])
    for sweep, rows in table.groupby("sweep"):
        rows.to_csv(device / f"{sweep}.csv", index=False)
    return folder


def environment(results: Path, out: Path) -> dict[str, str]:
    """Of a process in which PyTorch and the zoo cannot be imported, that reads and writes in temporary folders."""
    (out / "block").mkdir(parents=True, exist_ok=True)
    (out / "block" / "sitecustomize.py").write_text(BLOCK)
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("ATTENTION_")}
    folders = {"RESULTS": results, "FIGURES": out / "figures", "TABLES": out / "tables"}
    chosen |= {f"ATTENTION_{name}": str(folder) for name, folder in folders.items()}
    return chosen | {"PYTHONPATH": str(out / "block"), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def run(environments: dict[str, dict[str, str]]) -> dict[tuple[str, str], str]:
    """What every notebook shows in each environment, as text; all at once."""

    async def one(path: Path, env: dict[str, str]) -> str:
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": path.parent}}
        client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources=where)
        await client.async_execute(env=env)
        outputs = [output for part in notebook.cells if part.cell_type == "code" for output in part.outputs]
        return "\n".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)

    async def everything() -> list[str | BaseException]:
        runs = (one(path, env) for env in environments.values() for path in NOTEBOOKS)
        return await asyncio.gather(*runs, return_exceptions=True)

    texts = asyncio.run(everything())
    if failed := [text for text in texts if not isinstance(text, str)]:
        raise failed[0]
    keys = [(case, path.stem) for case in environments for path in NOTEBOOKS]
    return dict(zip(keys, map(str, texts), strict=True))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def shown(results: Path, out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    nothing = tmp_path_factory.mktemp("nothing")
    return run({"data": environment(results, out), "empty": environment(nothing, out / "empty")})


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"bra_ablations", "complexity_tables", "memory_resolution_curves"}


@pytest.mark.parametrize("module", ["torch", "attention_zoo"])
def test_the_block_blocks(module: str, results: Path, out: Path) -> None:
    command = [sys.executable, "-c", f"import {module}"]
    found = subprocess.run(command, env=environment(results, out), cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and f"{module} is not there" in found.stderr


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
        ("memory_resolution_curves", "Predicted and measured peak memory are equal in all 14 measured cells."),
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
        ("bra_ablations", "avgpool from 64 to 16 keys per query, takes 25% of the time and 25% of the memory"),
    ],
)  # fmt: skip
def test_what_is_said_follows_from_the_rows(notebook: str, sentence: str, shown: dict[tuple[str, str], str]) -> None:
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
    ],
)
def test_without_data_the_command_is_named_once(
    notebook: str, sweeps: list[str], shown: dict[tuple[str, str], str], out: Path
) -> None:
    for sweep in sweeps:
        assert shown["empty", notebook].count(f"run `python run_all.py --only {sweep}`, then this notebook again.") == 1
    assert not list((out / "empty").glob("figures/*"))


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
    found = limits.crossing(pd.Series(curve), limit)
    assert (found.below, found.above) == expected[1:]
    assert found.side == (None if expected[0] is None else pytest.approx(expected[0]))


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


def test_styles_are_fixed_and_distinct() -> None:
    assert len(set(plots.STYLES.values())) == len({colour for colour, _ in plots.STYLES.values()}) == len(plots.STYLES)
    assert plots.style("bra") == ("#0072B2", "D")
    assert plots.style("my_plugin") == ("#5A5A5A", ">")


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


def test_the_device_can_be_chosen_and_a_gpu_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, device in (("a-cpu", "cpu"), ("b-gpu", "cuda")):
        (tmp_path / folder).mkdir()
        row = cell("topk", "bra", "forward", 56, 100, 1.0, device=device, device_name=folder)
        validate([row]).to_csv(tmp_path / folder / "topk.csv", index=False)
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    monkeypatch.delenv("ATTENTION_DEVICE", raising=False)
    assert plots.load().rows["device_name"].tolist() == ["b-gpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "a-cpu")
    assert plots.load().rows["device_name"].tolist() == ["a-cpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "c-tpu")
    with pytest.raises(ValueError, match="valid: a-cpu, b-gpu"):
        plots.load()


def test_a_file_of_another_schema_is_said_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "topk.csv").write_text("name,ms\nbra,1\n")
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(plots, "say", said.append)
    assert plots.load().rows.empty
    assert said[0].startswith("Folder `old` is left out:") and "another schema" in said[0]
