"""Weights of a trained model, loaded without executing code from the file."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo.core.base import InvalidOption
from attention_zoo.models.biformer import MODELS, BiFormer

WRAPPINGS = ("model", "state_dict")
"""Keys under which training scripts store the weights in a larger file."""


def load_model(name: str, path: str | Path, **options: Any) -> BiFormer:
    """The model ``name`` with the weights and the number of classes of a checkpoint, in eval mode.

    Args:
        path: a state dict saved by torch.save, by itself or under the key ``model`` or ``state_dict`` of a larger
            dictionary, with or without the prefix ``module.`` of DataParallel.
        options: of the model; those that create parameters must be as in training.

    Raises:
        InvalidOption: the file cannot be read, contains code, or does not match the model's parameter names and shapes.
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
        message = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems if keys)
        raise InvalidOption(f"--weights {path} does not fit {name}: {message}")
    model.load_state_dict(state)
    return model.eval()


def _state_dict(path: str | Path) -> dict[str, Tensor]:
    try:
        # Training scripts often save their arguments with the weights; a Namespace of plain values is safe.
        with torch.serialization.safe_globals([argparse.Namespace]):
            result = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        # A file of another format can cause any error. An OSError with a file name is a failure to open the file.
        if isinstance(problem, OSError) and problem.filename is not None:
            raise InvalidOption(f"--weights {path}: {problem.strerror}") from problem
        why = "not a checkpoint, or one with more than tensors and plain values in it, which could run code"
        raise InvalidOption(f"--weights {path}: {why}; valid: torch.save(model.state_dict(), ...)") from problem
    while isinstance(result, dict) and (inner := next((key for key in WRAPPINGS if key in result), None)):
        result = result[inner]
    if not isinstance(result, dict) or not result or not all(isinstance(value, Tensor) for value in result.values()):
        raise InvalidOption(
            f"--weights {path}: no state dict in it; valid: one by itself, or as {' or '.join(map(repr, WRAPPINGS))}"
        )
    return {str(key).removeprefix("module."): value for key, value in result.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
