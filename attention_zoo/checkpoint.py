"""Weights of a trained model, read without running anything that a file may hold."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo.contract import InvalidOption
from attention_zoo.models import MODELS, BiFormer

WRAPPINGS = ("model", "state_dict")
"""Names under which training scripts put the weights into a larger file."""


def load_model(name: str, path: str | Path, **options: Any) -> BiFormer:
    """The model ``name`` with the weights of a checkpoint, in eval mode; as many classes as the checkpoint has.

    Args:
        path: a state dict as torch.save writes it, by itself or as ``model`` or ``state_dict`` of a larger
            dictionary, with or without the prefix ``module.`` of DataParallel.
        options: of the model; those that make parameters must be as in training.

    Raises:
        InvalidOption: the file cannot be read, holds code, or its names and shapes are not those of the model.
    """
    if name not in MODELS:
        raise InvalidOption(f"unknown model {name!r}; valid: {', '.join(MODELS)}")
    state = _state_dict(path)
    classes = len(state["head.weight"]) if "head.weight" in state and state["head.weight"].ndim else 0
    model = MODELS[name](num_classes=classes, **options)
    expected = model.state_dict()
    problems = (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
        ("of another shape", [k for k in expected if k in state and state[k].shape != expected[k].shape]),
    )
    if any(keys for _, keys in problems):
        told = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems if keys)
        raise InvalidOption(f"--weights {path} does not fit {name}: {told}")
    model.load_state_dict(state)
    return model.eval()


def _state_dict(path: str | Path) -> dict[str, Tensor]:
    try:
        # Training scripts like to save their arguments beside the weights: plain values, and harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        # What the bytes of some other file lead to can be any error; one that names the file is about opening it.
        if isinstance(problem, OSError) and problem.filename is not None:
            raise InvalidOption(f"--weights {path}: {problem.strerror}") from problem
        why = "not a checkpoint, or one with more than tensors and plain values in it, which could run code"
        raise InvalidOption(f"--weights {path}: {why}; valid: torch.save(model.state_dict(), ...)") from problem
    while isinstance(found, dict) and (inner := next((key for key in WRAPPINGS if key in found), None)):
        found = found[inner]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InvalidOption(
            f"--weights {path}: no state dict in it; valid: one by itself, or as {' or '.join(map(repr, WRAPPINGS))}"
        )
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
