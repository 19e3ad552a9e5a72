"""Imports of optional packages; import-linter holds the layers, by the contracts in pyproject.toml."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["attention_zoo", "profiling", "ablations"]


def test_schema_loads_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['attention_zoo'] = None\n"
        "import profiling.schema.row; assert len(profiling.schema.row.COLUMNS) > 50"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_optional_packages_are_imported_only_where_used() -> None:
    optional = {"triton", "submitit", "pynvml", "jupyter", "seaborn", "matplotlib", "tensorboard"}
    # Kernel modules import Triton at the top; they are imported only where a kernel is run.
    kernels = ROOT / "attention_zoo" / "attentions" / "bra" / "triton_kernels.py"
    for layer in LAYERS:
        for path in set((ROOT / layer).rglob("*.py")) - {kernels}:
            tree = ast.parse(path.read_text())
            top = {a.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for a in node.names}
            top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
            assert not top & optional, path
            within = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
            assert "attention_zoo.attentions.bra.triton_kernels" not in within, path
