"""Run the suite's commands from a notebook in a separate process, without importing them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from notebooks.lib.plots import ROOT


def torch_is_there() -> bool:
    """Whether PyTorch can be found, without loading it."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ImportError:
        return False


def run(*words: str, folder: Path = ROOT) -> str:
    """The output of ``python -m *words``, run in ``folder``.

    Raises:
        ValueError: the command rejected its input (exit status 2); with the command's message.
        RuntimeError: the command failed otherwise.
    """
    # A notebook's kernel sets the backend to one that draws into notebooks.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if done.returncode == 2:
        raise ValueError(f"python -m {' '.join(words)}: {last}")
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        raise RuntimeError(f"python -m {' '.join(words)}: exit status {done.returncode}: {last}")
    return done.stdout


def results_folder() -> Path:
    """Where results are: the folder that ATTENTION_RESULTS names."""
    return ROOT / os.environ.get("ATTENTION_RESULTS", "results")


def figures_folder() -> Path:
    """Where figures are: the folder that ATTENTION_FIGURES names."""
    return ROOT / os.environ.get("ATTENTION_FIGURES", "results/figures")
