"""The search for tiles: with real kernels in the interpreter, and a clock with a known fastest tile."""

import csv
import math
import time
from pathlib import Path

import pytest
import torch

from ablations.gpu_visit import tune
from attention_zoo.attentions.bra import triton_tiles

pytest.importorskip("triton", reason="Triton is not installed")

GPU = torch.cuda.is_available()
SMALL = tune.Shape(batch=1, dim=16, heads=1, grid=8, topk=2, n_win=2)
KEY = ("forward", False, 32)
CHOICES = {"rows": (16, 32, 64, 128), "step": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2, 3, 4)}
WANTED = (16, 64, 8, 1)


def distance(launch: tune.Launch) -> float:
    """A clock whose time grows with the distance of the tile in use from the wanted one."""
    launch()
    return 1.0 + sum(abs(math.log2(a / b)) for a, b in zip(triton_tiles.TILES[KEY], WANTED, strict=True))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, tune.Launch]:
    monkeypatch.setattr(tune, "CHOICES", CHOICES)
    return tune.launches(SMALL, torch.float32, "cuda" if GPU else "cpu")


@pytest.mark.slow
def test_the_search_ends_at_the_fastest_tile_and_leaves_the_table_alone(kernels: dict[str, tune.Launch]) -> None:
    before = dict(triton_tiles.TILES)
    trials = list(tune.descend(KEY, [kernels["forward"]] * 2, distance, time.monotonic() + 600))
    assert before == triton_tiles.TILES and trials[0].tile == before[KEY]
    best = min(trials, key=lambda trial: trial.cost)
    assert best.tile == WANTED and best.cost == pytest.approx(1.0) and len(best.milliseconds) == 2
    assert len({trial.tile for trial in trials}) == len(trials) and all(not trial.reason for trial in trials)


@pytest.mark.slow
def test_tile_with_wrong_result_or_exception_is_rejected(kernels: dict[str, tune.Launch]) -> None:
    def wrong_in_some_tiles() -> tuple[torch.Tensor, ...]:
        rows, step, *_ = triton_tiles.TILES[KEY]
        if step == 128:
            raise RuntimeError("out of resource:\nshared memory")
        (out,) = kernels["forward"]()
        return (out * (math.nan if rows == 16 else 1.01 if rows == 32 else 1.0),)

    trials = list(tune.descend(KEY, [wrong_in_some_tiles], distance, time.monotonic() + 600))
    reasons = {trial.tile: trial.reason for trial in trials}
    assert all(("another" in why) == (rows in (16, 32)) for (rows, step, *_), why in reasons.items() if step != 128)
    assert {why for (_, step, *_), why in reasons.items() if step == 128} == {
        "RuntimeError: out of resource: shared memory"
    }
    assert min(trials, key=lambda trial: trial.cost).tile == (64, *WANTED[1:])


def test_only_the_present_tile_is_tried_after_the_time_limit(kernels: dict[str, tune.Launch]) -> None:
    (only,) = tune.descend(KEY, [kernels["forward"]], distance, time.monotonic() - 1)
    assert only.tile == triton_tiles.TILES[KEY]


@pytest.mark.slow
def test_every_kernel_is_tuned_and_every_trial_kept(
    kernels: dict[str, tune.Launch], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHOICES", {"rows": (16,), "step": (16,), "warps": (4,), "stages": (2,)})
    monkeypatch.setattr(tune, "SHAPES", (SMALL,))
    trials = tune.tune({name: [kernels[name]] for name in tune.KERNELS}, False, distance, minutes=10)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("'")[1] for line in said] == list(tune.KERNELS) and all(
        "x as fast over 1 shapes" in s for s in said
    )
    tune.write(trials, tmp_path / "tune.csv")
    with (tmp_path / "tune.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(trials) >= 6 and {line["kernel"] for line in lines} == set(tune.KERNELS)
    assert all(float(line["1x16x1x8x2x2_ms"]) >= 1 and line["width"] == "32" for line in lines)


@pytest.mark.skipif(GPU, reason="says why there is no GPU")
def test_command_reports_missing_gpu_and_valid_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "timed on a GPU" in capsys.readouterr().err
    assert tune.main(["--kernels", "forward,sideways"]) == 2
    assert "valid: forward, queries, keys" in capsys.readouterr().err
