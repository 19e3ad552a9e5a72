"""Match digits: handwritten digits on a canvas with clutter; which equal the one in the corner, which are the others?

Recognition and comparison of real images: the digits of scikit-learn (Alpaydin and Kaynak, UCI, 1998).
"""

from functools import cache

import numpy as np

from ablations.capability.task import IGNORED, Batch, Task

PATCH, SIDE, CELL = 4, 8, 3
"""Pixels per side of a token and of a digit; tokens per side of the cell in which a digit is placed at random."""
MATCH = 10
"""Label of a digit that equals the one in the corner; any other digit has its own number."""
HELD_OUT = 4
"""One digit of so many is kept for tests."""


def generate(
    rng: np.random.Generator,
    count: int,
    grid: tuple[int, int],
    share: float = 0.5,
    clutter: float = 0.02,
    held_out: bool = False,
) -> Batch:
    """A ``share`` of cells holds a digit, half of these the one in the corner; a share ``clutter`` of pixels is set.

    Every fourth digit of a class is ``held_out``: a training never sees it, and a test sees no other.
    """
    down, across = grid[0] // CELL, grid[1] // CELL
    cells, inside = down * across, SIDE // PATCH
    images_of, start = _digits(held_out)
    same = rng.random((count, cells)) < 0.5
    asked = rng.integers(10, size=(count, 1))
    digit = np.where(same, asked, (asked + rng.integers(1, 10, size=(count, cells))) % 10)
    there = rng.random((count, cells)) < share
    digit[:, 0], there[:, 0] = asked[:, 0], True
    number = start[digit] + (rng.random(digit.shape) * (start[digit + 1] - start[digit])).astype(int)
    shift = rng.integers(CELL - inside + 1, size=(2, count, cells))
    rows = CELL * (np.arange(cells) // across) + shift[0]
    columns = CELL * (np.arange(cells) % across) + shift[1]
    images = np.zeros((count, 2, PATCH * grid[0], PATCH * grid[1]), dtype=np.float32)
    canvas, marked = images[:, 0], images[:, 1]
    # Bytes: these are most of the random numbers.
    canvas[:] = rng.integers(256, size=canvas.shape, dtype=np.uint8) < round(256 * clutter)
    marked[:, : PATCH * CELL, : PATCH * CELL] = 1
    label = np.full((count, *grid), IGNORED)
    image, cell = np.nonzero(there)
    row, column, at = rows[image, cell][:, None, None], columns[image, cell][:, None, None], image[:, None, None]
    pixels, tokens = np.arange(SIDE), np.arange(inside)
    canvas[at, PATCH * row + pixels[:, None], PATCH * column + pixels] = images_of[number[image, cell]]
    answer = np.where(same, MATCH, digit)[image, cell]
    label[at, row + tokens[:, None], column + tokens] = np.where(cell == 0, IGNORED, answer)[:, None, None]
    return Batch(images, label)


@cache
def _digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Digits from 0 to 1, sorted by class, and where each class begins; those held out or all others."""
    # Only this task needs it.
    from sklearn.datasets import load_digits

    data = load_digits()
    of_class = [np.flatnonzero(data.target == number) for number in range(10)]
    order = np.concatenate([each[(np.arange(len(each)) % HELD_OUT == 0) == held_out] for each in of_class])
    return (data.images[order] / 16).astype(np.float32), np.searchsorted(data.target[order], np.arange(11))


TASK = Task(
    ability="recognise, and compare with a far place",
    generate=generate,
    channels=2,
    classes=MATCH + 1,
    levels={"easy": {"clutter": 0.0}, "medium": {"clutter": 0.02}, "hard": {"clutter": 0.1}},
    steps=2000,
    patch=PATCH,
    guess=0.5,
    held_out={"held_out": True},
    package="scikit-learn",
)
