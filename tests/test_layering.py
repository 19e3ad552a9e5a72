"""Imports go one way: run_all -> ablations -> profiling -> attention_zoo; what reads results needs no PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["attention_zoo", "profiling", "ablations"]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_one_above(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"run_all", "notebooks", "tests"}
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, path


def test_schema_and_plots_load_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['attention_zoo'] = None\n"
        "import profiling.rows; assert len(profiling.rows.COLUMNS) > 50"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_optional_packages_are_imported_only_where_used() -> None:
    optional = {"triton", "submitit", "pynvml", "jupyter", "seaborn", "matplotlib", "tensorboard"}
    # Kernels are written in Triton from their first line; they are imported where one is run.
    kernels = ROOT / "attention_zoo" / "bra" / "triton_kernels.py"
    for layer in LAYERS:
        for path in set((ROOT / layer).rglob("*.py")) - {kernels}:
            tree = ast.parse(path.read_text())
            top = {a.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for a in node.names}
            top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
            assert not top & optional, path
            within = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
            assert "attention_zoo.bra.triton_kernels" not in within, path
