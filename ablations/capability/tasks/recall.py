"""Recall: tokens hold a key and a value, every other token holds a key and asks for its value.

Content-addressed and long-range. Follows multi-query associative recall (Arora et al., Zoology, ICLR 2024), on a grid.
"""

import numpy as np

from ablations.capability.task import IGNORED, Batch, Task, distinct, one_hot

KEYS, VALUES = 8, 8


def generate(
    rng: np.random.Generator, count: int, grid: tuple[int, int], pairs: int = 4, queries: int = 24, distance: int = 0
) -> Batch:
    """``pairs`` keys of an image have a value; queries nearer than ``distance`` tokens to theirs are not counted."""
    height, width = grid
    image = np.arange(count)[:, None]
    places = distinct(rng, count, height * width, pairs)
    keys = distinct(rng, count, KEYS, pairs)
    values = rng.integers(VALUES, size=(count, pairs))
    asked = rng.integers(pairs, size=(count, height * width))
    key, label = keys[image, asked], values[image, asked]
    key = np.where(rng.random(key.shape) < queries / (height * width), key, IGNORED)
    label = np.where(key >= 0, label, IGNORED)
    value = np.full_like(key, IGNORED)
    target = places[image, asked]
    token = np.arange(height * width)
    far = np.maximum(abs(target // width - token // width), abs(target % width - token % width)) >= distance
    label = np.where(far, label, IGNORED)
    key[image, places], value[image, places], label[image, places] = keys, values, IGNORED
    images = np.concatenate([one_hot(key, KEYS), one_hot(value, VALUES)], axis=1)
    return Batch(images.reshape(count, -1, height, width), label.reshape(count, height, width))


TASK = Task(
    ability="find the token with the same content, wherever it is",
    generate=generate,
    channels=KEYS + VALUES,
    classes=VALUES,
    levels={"easy": {"pairs": 2}, "medium": {"pairs": 4}, "hard": {"pairs": 8, "distance": 4}},
    steps=1200,
    citation="Arora et al., Zoology, ICLR 2024 (multi-query associative recall)",
)
