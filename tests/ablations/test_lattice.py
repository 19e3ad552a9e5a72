"""Closed forms of memory and MACs: read off storages, and equal to exact predictions where they were never fitted."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations.__main__ import main
from ablations.analysis import lattice
from ablations.analysis.closed_form import CHANNEL, SPATIAL, Rounding, Shape, evaluate, identify, table
from ablations.analysis.timeline import Recorder, counted, timelines
from attention_zoo import InvalidOption, names
from profiling.cases.case import Case
from profiling.execution.benchmark import Job, static_analysis
from profiling.meters.peak_memory import predict

FILE = json.loads((Path(__file__).resolve().parents[2] / "results" / "predictions.json").read_text())
ENTRIES: list[dict[str, Any]] = [entry for entry in FILE["configurations"] if "failed" not in entry]
SHAPES = [
    Shape(14, 35, 32, 2), Shape(20, 51, 64, 4), Shape(33, 14, 96, 3), Shape(57, 90, 128, 4), Shape(100, 61, 32, 2),
    Shape(200, 75, 64, 2), Shape(141, 333, 256, 8), Shape(500, 29, 96, 6),
]  # fmt: skip


def factors(**terms: float) -> np.ndarray:
    result = np.zeros(len(SPATIAL) * len(CHANNEL))
    for name, factor in terms.items():
        spatial, _, channel = name.partition("_")
        result[SPATIAL.index(spatial) * len(CHANNEL) + CHANNEL.index(channel or "1")] = factor
    return result


@pytest.mark.parametrize(
    "exact",
    [
        factors(HW_d=4), factors(AB_h=196), factors(AWW_h=28), factors(HWAB_h=0.5),
        # Tokens with a border of one on each side, and a row with its column without the token itself.
        factors(**{"AB_d": 4.0, "A_d": 8.0, "B_d": 8.0, "1_d": 16.0}), factors(HHW_h=4, HWW_h=4, HW_h=-4),
        factors(HH=4, WW=4),
    ],
)  # fmt: skip
def test_a_size_is_read_off_eight_shapes(exact: np.ndarray) -> None:
    terms = table(SHAPES, Rounding(7))
    found = identify(terms @ exact, terms)
    assert found is not None
    other = table([Shape(64, 1000, 512, 16), Shape(815, 17, 192, 12)], Rounding(7))
    assert other @ found == pytest.approx(other @ exact, rel=1e-9)


def test_what_is_no_sum_of_few_monomials_is_not_explained() -> None:
    terms = table(SHAPES, Rounding())
    assert identify(np.array([float(shape.height // 3 * shape.width) for shape in SHAPES]), terms) is None


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize(("name", "impl"), [("window", "sdpa"), ("bra", "reference"), ("pseudo_conv", "reference")])
def test_a_timeline_has_the_predicted_peak(name: str, impl: str, mode: Any) -> None:
    case = Case(name, 20, 31, 32, 2, (("auto_pad", True),) if name == "bra" else (), impl=impl, mode=mode)
    for device in ("cpu", "cuda"):
        recorder = Recorder()
        memory = predict(case.workload("meta"), device, recorder)
        line = recorder.timeline(device)
        assert (line.alive()[0], line.peak()) == (memory.base, memory.peak)
    lines = dict(timelines(case))
    for word, line in lines.items():
        device, dtype, each = word.split()
        one = replace(case, mode=each, dtype=dtype)  # type: ignore[arg-type]
        assert line.peak() == predict(one.workload("meta"), device).peak
    assert set(lines) == {
        f"{variant} {mode}" for variant in ("cpu fp32", "cuda fp32", "cuda bf16") for mode in lattice.MODES
    }


def test_forms_that_grow_in_steps_are_exact_where_they_are_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer than for the file.
    for name, value in {"COUNTS": 8, "HELD_OUT": 2, "TRIED": 300}.items():
        monkeypatch.setattr(lattice, name, value)
    configuration = next(c for c in lattice.configurations() if (c.name, c.impl) == ("window", "sdpa"))
    entry, word = lattice.entry(configuration), "cuda bf16 forward_backward"
    by_padding = entry["memory"][word]
    assert any(isinstance(form, dict) for form in by_padding[0])
    for height, width, dim in ((56, 56, 64), (56, 61, 64), (224, 210, 128), (700, 714, 96)):
        shape = Shape(height, width, dim, dim // 32)
        exact = predict(configuration.case(shape, dtype="bf16").workload("meta"), "cuda").peak
        assert lattice.memory(entry, word, shape) == pytest.approx(exact, rel=1e-6)
    # At 56 x 56 the sum decides.
    small = Shape(56, 56, 64, 2)
    others = [form for form in by_padding[0] if isinstance(form, list)]
    assert evaluate(others, small, lattice.rounding_of(entry)) < 0.8 * lattice.memory(entry, word, small)


def test_the_file_has_every_attention_and_no_form_that_was_found_wrong() -> None:
    assert {entry["name"] for entry in ENTRIES} == set(names())
    expected = [(c.name, c.impl, c.changed()) for c in lattice.configurations()]
    assert [(entry["name"], entry["impl"], entry["options"]) for entry in FILE["configurations"]] == expected
    for entry in ENTRIES:
        known = set(entry["memory"]) | ({"macs"} if entry["macs"] else set())
        assert known.isdisjoint(entry["left_out"])
        assert all(entry["error"][word] <= lattice.WORST for word in known)


def errors(count: int, seed: int) -> list[tuple[float, str]]:
    """Relative errors of forms of the file at random shapes, against the exact prediction or count."""
    draw, result = random.Random(seed), []
    by_head = {(c.name, c.impl, json.dumps(c.changed())): c for c in lattice.configurations()}
    while len(result) < count:
        entry = draw.choice(ENTRIES)
        configuration = by_head[entry["name"], entry["impl"], json.dumps(entry["options"])]
        shape, word = lattice.random_shape(draw), draw.choice([*entry["memory"], "macs"])
        if word == "macs" and not entry["macs"]:
            continue
        if word.startswith("cpu") and FILE["cpu"] != lattice.CPU:
            # Kernels have other scratch with other vector instructions.
            continue
        try:
            if word == "macs":
                exact = counted(configuration.case(shape))[0]
                value = evaluate([entry["macs"]["forward"]], shape, lattice.rounding_of(entry))
            else:
                device, dtype, mode = word.split()
                exact = static_analysis(Job(configuration.case(shape, mode, device, dtype)))["memory_predicted_bytes"]
                value = lattice.memory(entry, word, shape)
        except InvalidOption:
            continue
        result.append((abs(value / exact - 1), f"{entry['name']} {entry['impl']} {word} {shape}"))
    return result


def test_forms_are_within_2_percent_of_exact_predictions_at_some_shapes() -> None:
    assert max(errors(10, seed=1)) < (0.02, "")


@pytest.mark.slow
def test_forms_are_within_2_percent_of_exact_predictions_at_500_shapes() -> None:
    worst = sorted(errors(500, seed=2), reverse=True)
    assert worst[0][0] < 0.02, worst[:10]


def test_predictions_of_another_processor_are_not_mixed_with_those_of_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps({"cpu": "ANOTHER", "configurations": []}))
    assert main(["lattice", "--out", str(file)]) == 2
    assert f"is of a CPU with ANOTHER, and this one has {lattice.CPU}; --fresh makes it anew" in capsys.readouterr().err
