"""Count: every token names a colour and asks how many marks of that colour the image has.

A global aggregate, as in the counting questions of CLEVR (Johnson et al., CVPR 2017).
"""

import numpy as np

from ablations.capability.task import Batch, Task, distinct, one_hot

MOST = 6
"""Counts are 1 to MOST."""
COLOURS = 2


def generate(rng: np.random.Generator, count: int, grid: tuple[int, int], clutter: int = 8) -> Batch:
    """Marks of COLOURS colours and of another one at random places; the number of all marks does not vary.

    ``clutter`` is the least number of marks of the other colour.
    """
    height, width = grid
    numbers = rng.integers(1, MOST + 1, size=(count, COLOURS))
    slots = np.full((count, COLOURS * MOST + clutter), COLOURS)
    for colour in range(COLOURS):
        part = slots[:, colour * MOST : (colour + 1) * MOST]
        part[:] = np.where(np.arange(MOST) < numbers[:, colour, None], colour, COLOURS)
    marks = np.full((count, height * width), -1)
    np.put_along_axis(marks, distinct(rng, count, height * width, slots.shape[1]), slots, axis=1)
    named = rng.integers(COLOURS, size=(count, height * width))
    label = np.take_along_axis(numbers, named, axis=1) - 1
    images = np.concatenate([one_hot(marks, COLOURS + 1), one_hot(named, COLOURS)], axis=1)
    return Batch(images.reshape(count, -1, height, width), label.reshape(count, height, width))


TASK = Task(
    ability="sum over the whole image",
    generate=generate,
    channels=2 * COLOURS + 1,
    classes=MOST,
    levels={"easy": {"clutter": 0}, "medium": {"clutter": 4}, "hard": {"clutter": 24}},
    steps=900,
    citation="Johnson et al., CLEVR, CVPR 2017 (counting)",
)
