"""The notebooks run without PyTorch, report findings that match the data, and report missing data."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from made_up_rows import ablations, environment, growth, precision, profile, resolution, speeds, trained
from nbclient import NotebookClient

from notebooks.figures import one_config
from profiling.schema.capability import validate as validate_trained
from profiling.schema.row import validate

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
TABLES |= {f"bra_{what}_{mode}" for what in ("speed", "memory") for mode in ("forward", "forward_backward")}


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
