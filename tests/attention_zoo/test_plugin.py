"""An attention in a single file is included in the sweeps, the contract test and the gallery."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ablations.harness.sweep import discover
from attention_zoo import __main__ as drawing
from attention_zoo import load_plugin
from attention_zoo.core import registry
from attention_zoo.visualize import receptive_field

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).parents[1] / "plugins" / "row_mean.py"


def test_in_every_sweep_over_attentions() -> None:
    load_plugin(PLUGIN)
    taking_part = {
        name
        for name, sweep in discover().items()
        for case in sweep.cases("cpu")
        if "row_mean" in (case.name, dict(case.options).get("attention"))
    }
    assert {"resolution", "complexity", "stl"} <= taking_part


@pytest.mark.slow
def test_in_the_contract_test(tmp_path: Path) -> None:
    """An attention with a wrong formula fails the test of the formula."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(PLUGIN.read_text().replace("row_mean", "wrong_mean").replace("2 * height", "3 * height"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/attention_zoo/test_contract.py",
        "-k",
        "_mean",
        "-rA",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, "--plugin", str(PLUGIN), "--plugin", str(wrong)], cwd=ROOT, capture_output=True, text=True
    )
    outcomes = re.findall(
        r"^(PASSED|FAILED|ERROR) tests/attention_zoo/test_contract.py::(\w+)\[([^ \]-]*)", run.stdout, re.MULTILINE
    )
    passed = [test for outcome, test, name in outcomes if outcome == "PASSED" and "row_mean" in name]
    assert len(passed) >= 10 and "test_predicted_memory_is_the_measured" in passed, (
        run.returncode,
        run.stdout[-2000:],
        run.stderr[-2000:],
    )
    others = {(test, name) for outcome, test, name in outcomes if outcome != "PASSED"}
    assert others == {("test_macs_equal_the_count", "wrong_mean")}


@pytest.mark.slow
def test_in_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its panel shows the query's row, and nothing else."""
    panels: dict[str, torch.Tensor] = {}
    reach = receptive_field.reach

    def remember(name: str, *arguments: Any, **options: Any) -> torch.Tensor:
        panels[name] = reach(name, *arguments, **options)
        return panels[name]

    monkeypatch.setattr(receptive_field, "reach", remember)
    out = tmp_path / "gallery.png"
    query = f"{20.5 / receptive_field.GRID},{24.5 / receptive_field.GRID}"
    assert drawing.main(["gallery", "--plugin", str(PLUGIN), "--query", query, "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.stat().st_size > 100_000
    assert list(panels) == registry.names()
    reached = torch.zeros(receptive_field.GRID, receptive_field.GRID, dtype=torch.bool)
    reached[20] = True
    assert torch.equal(panels["row_mean"] > receptive_field.FAINTEST, reached)
