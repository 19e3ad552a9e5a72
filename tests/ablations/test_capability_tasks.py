"""The tasks: the same images for the same seed, and labels that a slow reading of the images confirms."""

import importlib.util
from collections import Counter

import numpy as np
import pytest

from ablations.capability.task import IGNORED, LEVELS, MEDIUM, Batch, Task, discover, get
from ablations.capability.tasks import connect, match_digits, offset, recall, texture
from attention_zoo import InvalidOption

TASKS = discover()
GRID = (14, 14)
each_task = pytest.mark.parametrize("name", TASKS)
needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
HERE = [pytest.param(name, marks=needs_digits if task.package else ()) for name, task in TASKS.items()]
each_task_here = pytest.mark.parametrize("name", HERE)


def one(name: str, level: str = MEDIUM, count: int = 64, grid: tuple[int, int] = GRID) -> tuple[Task, Batch]:
    return TASKS[name], TASKS[name].batch(5, count, grid, level)


def test_there_are_the_six_tasks() -> None:
    assert set(TASKS) == {"texture", "recall", "offset", "count", "connect", "match_digits"}
    with pytest.raises(InvalidOption, match=r"unknown task 'x'; valid: .*recall"):
        get("x")


@each_task
def test_a_task_says_what_it_needs_at_every_level(name: str) -> None:
    task = TASKS[name]
    assert task.name == name and len(task.ability) > 10 and set(task.levels) == set(LEVELS)
    assert 50 <= task.steps <= 2000 and (task.local or name != "texture")
    with pytest.raises(InvalidOption, match="valid: easy, medium, hard"):
        task.batch(0, 1, GRID, "impossible")


@each_task_here
@pytest.mark.parametrize("level", LEVELS)
def test_images_depend_on_the_seed_alone(name: str, level: str) -> None:
    task = TASKS[name]
    first, again, other = (task.batch(seed, 8, GRID, level) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.images, other.images) and not np.array_equal(first.labels, other.labels)


@each_task_here
@pytest.mark.parametrize("grid", [(14, 14), (28, 28), (14, 21)])
def test_shapes_and_types(name: str, grid: tuple[int, int]) -> None:
    task, batch = one(name, count=4, grid=grid)
    assert batch.images.shape == (4, task.channels, task.patch * grid[0], task.patch * grid[1])
    assert batch.labels.shape == (4, *grid)
    assert batch.images.dtype == np.float32 and batch.labels.dtype == np.int64
    assert batch.labels.min() >= IGNORED and batch.labels.max() < task.classes
    assert np.isfinite(batch.images).all()


@each_task_here
@pytest.mark.parametrize("level", LEVELS)
def test_the_best_guess_is_right_as_often_as_chance_says(name: str, level: str) -> None:
    task, batch = one(name, level, count=600)
    asked = batch.labels[batch.labels != IGNORED]
    shares = np.bincount(asked, minlength=task.classes) / len(asked)
    assert shares.max() == pytest.approx(task.chance, abs=0.03)
    if task.chance == 1 / task.classes:
        assert shares.min() == pytest.approx(task.chance, abs=0.03)


@each_task_here
def test_every_image_asks_something_of_several_tokens(name: str) -> None:
    _, batch = one(name, count=64)
    asked = (batch.labels != IGNORED).sum(axis=(1, 2))
    assert (asked > 0).mean() > 0.7 and asked.mean() > 5


def test_recall_asks_for_the_value_beside_the_same_key() -> None:
    for level in LEVELS:
        options = TASKS["recall"].levels[level]
        _, (images, labels) = one("recall", level, count=16)
        for image, label in zip(images, labels, strict=True):
            key, value = image[: recall.KEYS], image[recall.KEYS :]
            pairs = {int(key[:, y, x].argmax()): (y, x) for y, x in np.argwhere(value.any(axis=0))}
            assert len(pairs) == options["pairs"]
            for y, x in np.argwhere(label != IGNORED):
                row, column = pairs[int(key[:, y, x].argmax())]
                assert label[y, x] == value[:, row, column].argmax() and not value[:, y, x].any()
                assert max(abs(row - y), abs(column - x)) >= options.get("distance", 0)


def test_offset_asks_for_the_value_at_the_named_displacement() -> None:
    for level in LEVELS:
        options = TASKS["offset"].levels[level]
        _, (images, labels) = one("offset", level, count=16)
        directions = set()
        for image, label in zip(images, labels, strict=True):
            for y, x in np.argwhere(label != IGNORED):
                named = int(image[offset.VALUES :, y, x].argmax())
                down, right = options["distance"] * offset.DIRECTIONS[named]
                assert label[y, x] == image[: offset.VALUES, y + down, x + right].argmax()
                assert image[: offset.VALUES, y + down, x + right].sum() == 1
                directions.add(named)
        assert len(directions) == options["directions"]


def test_count_asks_for_the_number_of_marks_of_the_named_colour() -> None:
    _, (images, labels) = one("count", count=32)
    for image, label in zip(images, labels, strict=True):
        marks = [int(image[colour].sum()) for colour in range(2)]
        named = image[3:].argmax(axis=0)
        assert np.array_equal(label + 1, np.where(named == 0, *marks))


def test_texture_asks_only_where_one_texture_surrounds_a_token() -> None:
    image, label = (part[0] for part in TASKS["texture"].batch(1, 1, (40, 40), "easy"))
    pattern = image.argmax(axis=0)
    seen = set()
    for y, x in np.argwhere(label != IGNORED):
        part = pattern[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        across, down = (part[:, 1:] == part[:, :-1]).mean(), (part[1:] == part[:-1]).mean()
        expected = {(1.0, 0.0): 0, (0.0, 1.0): 1, (0.0, 0.0): 2, (1.0, 1.0): 3}[across, down]
        assert label[y, x] == expected
        seen.add(expected)
    assert len(seen) > 1 and texture.TEXTURES == 4


def test_connect_labels_the_tokens_that_a_flood_from_the_mark_reaches() -> None:
    options = TASKS["connect"].levels[MEDIUM]
    _, (images, labels) = one("connect", count=64)
    answers = Counter[int]()
    for image, label in zip(images, labels, strict=True):
        curve, reached, step = image[0] > 0, {tuple(at) for at in np.argwhere(image[1] > 0)}, 0
        assert len(reached) == 1
        distance = {}
        while new := reached - set(distance):
            distance |= dict.fromkeys(new, step)
            step += 1
            around = {(y + down, x + right) for y, x in new for down, right in connect.SIDES}
            reached |= {(y, x) for y, x in around if 0 <= y < 14 and 0 <= x < 14 and curve[y, x]}
        for y, x in np.argwhere(label != IGNORED):
            assert curve[y, x] and (label[y, x] == 1) == ((y, x) in distance)
            if label[y, x] == 1:
                assert distance[y, x] >= options["beyond"]
            answers[int(label[y, x])] += 1
    assert answers[0] == answers[1] > 50


@needs_digits
def test_match_digits_labels_whole_digits_and_never_the_one_in_the_corner() -> None:
    _, (images, labels) = one("match_digits", count=64)
    size = match_digits.SIDE // match_digits.PATCH
    for image, label in zip(images, labels, strict=True):
        corner = match_digits.CELL
        assert (label[:corner, :corner] == IGNORED).all() and image[0, : 4 * corner, : 4 * corner].sum() > 10
        for y, x in np.argwhere(label != IGNORED):
            same = (label[max(0, y - 1) : y + size, max(0, x - 1) : x + size] == label[y, x]).sum()
            assert same >= size * size


@needs_digits
def test_match_digits_compares_by_class() -> None:
    """The digit of a matching cell is, pixel by pixel, one of the class of the corner's."""
    images, start = match_digits._digits(held_out=False)
    known = {
        tuple(digit.ravel()): int(np.searchsorted(start, number, side="right")) - 1
        for number, digit in enumerate(images)
    }
    _, (canvas, labels) = one("match_digits", "easy", count=16)
    checked = 0
    for image, label in zip(canvas[:, 0], labels, strict=True):

        def digit_at(y: int, x: int, image: np.ndarray = image) -> int | None:
            return known.get(tuple(image[4 * y : 4 * y + 8, 4 * x : 4 * x + 8].ravel()))

        corner = next(d for y in (0, 1) for x in (0, 1) if (d := digit_at(y, x)) is not None)
        for y in range(13):
            for x in range(13):
                if (digit := digit_at(y, x)) is not None and (label[y : y + 2, x : x + 2] != IGNORED).all():
                    assert (label[y : y + 2, x : x + 2] == (match_digits.MATCH if digit == corner else digit)).all()
                    checked += 1
    assert checked > 50


@needs_digits
def test_no_digit_of_a_test_is_seen_in_training() -> None:
    seen, asked = ({digit.tobytes() for digit in match_digits._digits(held)[0]} for held in (False, True))
    assert not seen & asked and len(seen) > 1300 and len(asked) > 400
    assert all(np.diff(match_digits._digits(True)[1]) > 40)
    task, size = TASKS["match_digits"], match_digits.SIDE
    training, test = (task.batch(5, 16, GRID, "easy", test=test).images[:, 0] for test in (False, True))

    def corners(canvas: np.ndarray) -> set[bytes]:
        places = [(4 * y, 4 * x) for y in (0, 1) for x in (0, 1)]
        return {image[y : y + size, x : x + size].tobytes() for image in canvas for y, x in places}

    assert len(corners(training) & seen) >= 16 and not corners(training) & asked
    assert len(corners(test) & asked) >= 16 and not corners(test) & seen
