"""Texture: every token asks which of four textures surrounds it. Local, the control that all must pass."""

import numpy as np

from ablations.capability.task import IGNORED, Batch, Task, one_hot

TEXTURES = 4


def generate(rng: np.random.Generator, count: int, grid: tuple[int, int], noise: float = 0.05, parts: int = 3) -> Batch:
    """``parts`` regions of rows, columns, chequers or one colour; a share ``noise`` of tokens is flipped.

    Only tokens whose 5 x 5 neighbourhood lies in one texture are asked.
    """
    height, width = grid
    row, column = np.ogrid[:height, :width]
    seeds = rng.random((count, parts, 2)) * grid
    squared = (row - seeds[:, :, 0, None, None]) ** 2 + (column - seeds[:, :, 1, None, None]) ** 2
    textures = rng.integers(TEXTURES, size=(count, parts))
    texture = textures[np.arange(count)[:, None, None], squared.argmin(axis=1)]
    phase = rng.integers(2, size=(count, 1, 1))
    patterns = np.stack(np.broadcast_arrays(row + phase, column + phase, row + column + phase, 0 * row + 0 * phase))
    pattern = np.take_along_axis(patterns, texture[None], axis=0)[0] % 2
    pattern ^= rng.random(pattern.shape, dtype=np.float32) < noise
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(texture, ((0, 0), (2, 2), (2, 2)), mode="edge"), (5, 5), axis=(1, 2)
    )
    pure = (around == texture[..., None, None]).all(axis=(3, 4))
    return Batch(one_hot(pattern, 2), np.where(pure, texture, IGNORED))


TASK = Task(
    ability="local statistics",
    generate=generate,
    channels=2,
    classes=TEXTURES,
    levels={"easy": {"noise": 0.0}, "medium": {"noise": 0.05}, "hard": {"noise": 0.15}},
    steps=200,
    local=True,
)
