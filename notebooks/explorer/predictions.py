"""Predictions of ``python -m ablations lattice``, as the page evaluates them (forms.js)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "predictions.json"
KEYS = {"cpu", "sides", "dims", "head_dims", "spatial", "channel", "configurations"}

KINDS_OF_PADDING = 4


def load(path: Path) -> dict[str, Any]:
    """The predicted candidates with the range of their shapes and their largest errors.

    Keys: ``cpu``, the vector instructions of the CPU; ``range`` of side, dim and heads; ``error`` of memory and macs;
    the names of the ``spatial`` and ``channel`` monomials; ``candidates``, each with its attention, options, impl and
    forms: ``memory`` by device, dtype and mode, ``macs`` by mode. A form is the grid's rounding, and for each kind of
    padding the sums whose largest is the value; on CUDA some have scratch that grows in steps besides.

    Raises:
        ValueError: the file is of another form.
    """
    file = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(file, dict) or not set(file) >= KEYS:
        raise ValueError("it is of another form")
    entries = [entry for entry in file["configurations"] if "failed" not in entry]
    errors = [(word == "macs", error) for entry in entries for word, error in entry["error"].items()]
    return {
        "cpu": file["cpu"],
        "range": {
            "side": file["sides"], "dim": [min(file["dims"]), max(file["dims"])],
            "heads": [2, max(file["dims"]) // min(file["head_dims"])],
        },
        "error": {
            name: max((error for macs, error in errors if macs == (name == "macs")), default=0.0)
            for name in ("memory", "macs")
        },
        "spatial": file["spatial"], "channel": file["channel"],
        "candidates": [_candidate(entry) for entry in entries],
    }  # fmt: skip


def _candidate(entry: Mapping[str, Any]) -> dict[str, Any]:
    rounding, macs = entry["rounding"], entry["macs"]
    # The parts of one sum.
    whole = {"forward": macs["forward"], "forward_backward": macs["forward"] + macs["forward_backward"]} if macs else {}
    return {
        "attention": entry["name"], "impl": entry["impl"], "options": entry["options"],
        "memory": {word: [rounding, forms] for word, forms in entry["memory"].items()},
        "macs": {mode: [rounding, [[form]] * KINDS_OF_PADDING] for mode, form in whole.items()},
    }  # fmt: skip
