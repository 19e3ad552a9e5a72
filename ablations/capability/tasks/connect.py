"""Connect: two curves that do not touch, one marked at its beginning; every token of a curve asks if it is that one.

Many hops along a path. After Pathfinder of Long Range Arena (Tay et al., ICLR 2021), with a label for every token.
"""

import numpy as np

from ablations.capability.task import IGNORED, Batch, Task

SIDES = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])


def generate(rng: np.random.Generator, count: int, grid: tuple[int, int], length: int = 8, beyond: int = 3) -> Batch:
    """Two random walks of up to ``length`` tokens, side by side; tokens after the first ``beyond`` are asked."""
    height, width = grid
    image = np.arange(count)
    # A border of two, so that every neighbour of a neighbour exists.
    taken = np.ones((count, height + 4, width + 4), dtype=np.int8)
    taken[:, 2:-2, 2:-2] = 0
    wall = taken.astype(bool)
    order = np.full((2, count, height + 4, width + 4), IGNORED)
    beginnings = _beginnings(rng, count, grid)
    for at in beginnings:
        taken[image, at[:, 0], at[:, 1]] = 1
    for curve, at in enumerate(beginnings):
        for number in range(length):
            taken[image, at[:, 0], at[:, 1]] = 1
            seen = order[curve, image, at[:, 0], at[:, 1]]
            order[curve, image, at[:, 0], at[:, 1]] = np.where(seen < 0, number, seen)
            at = _next(rng, at, taken, wall)
    order = order[:, :, 2:-2, 2:-2]
    first, second = order
    # Both curves are as long as the shorter one: their lengths tell nothing.
    shorter = np.minimum(first.max(axis=(1, 2)), second.max(axis=(1, 2)))[:, None, None]
    kept = [(part >= 0) & (part <= shorter) for part in order]
    label = np.full(first.shape, IGNORED)
    for value, part, there in zip((1, 0), order, kept, strict=True):
        label[there & (part >= beyond)] = value
    images = np.stack([kept[0] | kept[1], first == 0], axis=1).astype(np.float32)
    return Batch(images, label)


def _beginnings(rng: np.random.Generator, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two places two tokens apart, in coordinates that count the border."""
    low, high = np.array([4, 4]), np.array(grid)
    one = rng.integers(low, high, size=(count, 2))
    other = one + 2 * SIDES[rng.integers(4, size=count)]
    return one, other


def _next(rng: np.random.Generator, at: np.ndarray, taken: np.ndarray, wall: np.ndarray) -> np.ndarray:
    """A free neighbour that touches nothing but ``at``; ``at`` itself if there is none."""
    image = np.arange(len(at))[:, None]
    to = at[:, None] + SIDES
    row, column = to[..., 0], to[..., 1]
    occupied = taken & ~wall
    touching = sum(occupied[image, row + down, column + right] for down, right in SIDES)
    free = (taken[image, row, column] == 0) & (touching == 1)
    choice = (rng.random(free.shape) * free).argmax(axis=1)
    moved = to[image[:, 0], choice]
    return np.where(free.any(axis=1)[:, None], moved, at)


TASK = Task(
    ability="follow a path, hop by hop",
    generate=generate,
    channels=2,
    classes=2,
    levels={
        "easy": {"length": 5, "beyond": 1},
        "medium": {"length": 7, "beyond": 3},
        "hard": {"length": 12, "beyond": 6},
    },
    steps=600,
    citation="Tay et al., Long Range Arena, ICLR 2021 (Pathfinder)",
)
