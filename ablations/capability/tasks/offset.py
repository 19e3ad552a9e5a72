"""Offset: every token asks for the value of the token at the displacement that it names.

Position-addressed: what is there does not matter to where the query looks.
"""

import numpy as np

from ablations.capability.task import IGNORED, Batch, Task, distinct, one_hot

VALUES = 8
DIRECTIONS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])


def generate(
    rng: np.random.Generator, count: int, grid: tuple[int, int], distance: int = 7, directions: int = 2,
    values: int = 32,
) -> Batch:  # fmt: skip
    """``values`` tokens have a value; for each, the token ``distance`` away in one of ``directions`` asks for it."""
    height, width = grid
    image = np.arange(count)[:, None]
    row, column = np.divmod(distinct(rng, count, height * width, values), width)
    value = np.full((count, height, width), IGNORED)
    value[image, row, column] = drawn = rng.integers(VALUES, size=row.shape)
    named = rng.integers(directions, size=row.shape)
    row, column = (at - distance * DIRECTIONS[named, axis] for axis, at in enumerate((row, column)))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = np.broadcast_to(image, row.shape)[inside]
    label, code = np.full((2, count, height, width), IGNORED)
    # Where two values are asked for by one token, the last stands, with its direction.
    label[image, row[inside], column[inside]] = drawn[inside]
    code[image, row[inside], column[inside]] = named[inside]
    return Batch(np.concatenate([one_hot(value, VALUES), one_hot(code, len(DIRECTIONS))], axis=1), label)


TASK = Task(
    ability="look at a given place, whatever is there",
    generate=generate,
    channels=VALUES + len(DIRECTIONS),
    classes=VALUES,
    levels={
        "easy": {"distance": 4, "directions": 1}, "medium": {"distance": 7, "directions": 2},
        "hard": {"distance": 9, "directions": 4},
    },
    steps=1000,
    places=True,
)  # fmt: skip
