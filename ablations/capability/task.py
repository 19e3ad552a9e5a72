"""A task: images and a label per token, from a seed. A file in ``tasks`` defines one task and nothing else."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from attention_zoo import InvalidOption

TASKS = "ablations.capability.tasks"
"""The package whose files are the tasks."""
IGNORED = -1
"""Label of a token that nothing is asked of."""
EASY, MEDIUM, HARD = LEVELS = ("easy", "medium", "hard")


class Batch(NamedTuple):
    """Images of float32, (n, channels, height, width), and labels of int64, (n, rows of tokens, columns of tokens)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        ability: what an attention needs for it, in a few words.
        generate: ``generate(rng, count, (height, width), **options)`` gives a Batch on a grid of tokens.
        channels: of an image.
        classes: labels are 0 to ``classes - 1``, or IGNORED.
        levels: the options of ``generate`` at each level of difficulty.
        steps: training steps.
        patch: pixels per side of a token.
        places: whether it asks for places, so that the network is told where each token is.
        local: whether a convolution can solve it.
        guess: share of right answers of the best guess, where classes are not equally frequent.
        held_out: options of ``generate`` for test images, where what training saw must not return.
        citation: the published task it follows, if it follows one.
        package: what must be installed to generate it, beyond the suite's own requirements.
    """

    ability: str
    generate: Callable[..., Batch]
    channels: int
    classes: int
    levels: Mapping[str, Mapping[str, Any]]
    steps: int
    patch: int = 1
    places: bool = False
    local: bool = False
    guess: float | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)
    citation: str = ""
    package: str = ""
    name: str = field(default="", compare=False)

    @property
    def chance(self) -> float:
        """Share of right answers of the best guess."""
        return self.guess or 1 / self.classes

    def batch(
        self, seed: int | Sequence[int], count: int, grid: tuple[int, int], level: str = MEDIUM, test: bool = False
    ) -> Batch:
        """``count`` images of a level on a grid of tokens, for training or for a ``test``; the same for a seed."""
        if level not in self.levels:
            raise InvalidOption(f"{self.name} has no difficulty {level!r}; valid: {', '.join(self.levels)}")
        options = {**self.levels[level], **(self.held_out if test else {})}
        return self.generate(np.random.default_rng(seed), count, grid, **options)


@cache
def discover() -> dict[str, Task]:
    """All tasks, by the name of their file."""
    package = importlib.import_module(TASKS)
    result = {}
    for module in pkgutil.iter_modules(package.__path__):
        task: Task = importlib.import_module(f"{TASKS}.{module.name}").TASK
        object.__setattr__(task, "name", module.name)
        result[module.name] = task
    return result


def get(name: str) -> Task:
    """The task of this name; InvalidOption if there is none."""
    tasks = discover()
    if name not in tasks:
        raise InvalidOption(f"unknown task {name!r}; valid: {', '.join(tasks)}")
    return tasks[name]


def one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    """Float32 channels after the first axis: (n, ...) to (n, classes, ...); a negative value gives zeros."""
    return (values[:, None] == np.arange(classes).reshape(1, classes, *(1,) * (values.ndim - 1))).astype(np.float32)


def distinct(rng: np.random.Generator, count: int, among: int, take: int) -> np.ndarray:
    """``count`` rows of ``take`` different numbers below ``among``, in random order."""
    return rng.random((count, among), dtype=np.float32).argsort(axis=1)[:, :take]
