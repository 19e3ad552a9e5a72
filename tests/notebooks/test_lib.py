"""What all notebooks share: loading rows, limits of memory, sizes, tables as text, commands."""

import math
from pathlib import Path

import pandas as pd
import pytest
from made_up_rows import cell, resolution

from notebooks.figures import crossover
from notebooks.lib import export, limits, plots, programs
from profiling.schema.row import validate


@pytest.mark.parametrize(
    ("curve", "limit", "expected"),
    [
        ({10: 100, 20: 1600}, 400, (math.sqrt(200), 10, 20)),
        ({10: 100, 20: 400, 40: 1600}, 400, (20.0, 20, 40)),
        ({10: 100, 20: 200}, 300, (None, 20, None)),
        ({10: 500, 20: 600}, 300, (None, None, 10)),
    ],
)
def test_crossing(curve: dict[int, float], limit: float, expected: tuple[float | None, int | None, int | None]) -> None:
    result = limits.crossing(pd.Series(curve), limit)
    assert (result.below, result.above) == expected[1:]
    assert result.side == (None if expected[0] is None else pytest.approx(expected[0]))


def test_device_memory_is_assumed_and_labelled_without_an_oom_row() -> None:
    rows = validate(list(resolution()))
    assert limits.device_memory(plots.Results(rows)) == (2**30, "1.0 GiB free on this device")
    assert limits.device_memory(plots.Results(rows[rows["status"] == "ok"])) == (24 * 2**30, "24 GiB (assumed)")


def test_failed_models_are_told_apart_by_their_attention_and_batch() -> None:
    oom = {"kind": "model", "status": "oom", "reason": "predicted"}
    differing = ({"attention": "full"}, {"attention": "lepe"}, {"attention": "full", "batch": 128})
    rows = [cell("stl", "biformer_stl", "forward", 1024, None, None, **oom, **one) for one in differing]
    with plots.kept() as shown:
        limits.failures(plots.Results(validate(rows)))
    head, _, *lines = str(shown[0]).splitlines()
    assert len({*lines}) == 3 and "attention" in head and "topk" not in head


def test_a_cell_whose_macs_disagree_is_listed_with_the_failed_ones() -> None:
    whole = cell("resolution", "full", "forward", 8, 100, 1.0, macs_fvcore=64_000)
    doubted = cell("resolution", "bra", "forward", 8, 100, 1.0, macs_fvcore=90_000)
    with plots.kept() as shown:
        limits.failures(plots.Results(validate([whole, doubted])))
    _, _, line = str(shown[0]).splitlines()
    assert "bra" in line and "| ok " in line and "macs_agree" in line


def test_replicates_become_a_median_and_the_widest_interval() -> None:
    times = enumerate((1.0, 4.0, 2.0))
    rows = [cell("resolution", "bra", "forward", 8, 100, ms, replicate=replicate) for replicate, ms in times]
    row = limits.cells(validate(rows)).loc[8]
    assert (row["latency_p50_ms"], row["latency_low_ms"], row["latency_high_ms"]) == pytest.approx((2.0, 0.9, 4.4))


def test_a_line_for_each_implementation() -> None:
    rows = [cell("resolution", name, "forward", 8, 100, 1.0) for name in ("full", "bra")]
    rows.append(cell("resolution", "bra", "forward", 8, 100, 1.0, impl_requested="triton"))
    assert [label for _, label, *_ in plots.series(validate(rows))] == ["full", "bra", "bra (triton)"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "0.5 KiB"), (2**20, "1 MiB"), (1023.9 * 2**20, "1 GiB"), (1.5 * 2**30, "1.5 GiB"), (2**44, "16 TiB")],
)
def test_sizes_in_binary_units(count: float, text: str) -> None:
    assert plots.size(count) == text


def test_the_device_can_be_chosen_and_a_gpu_or_the_most_cases_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, device, grids in (("a-cpu", "cpu", [56]), ("b-gpu", "cuda", [56]), ("c-cpu", "cpu", [56, 112])):
        (tmp_path / folder).mkdir()
        of_it = {"device": device, "device_name": folder}
        rows = [cell("topk", "bra", "forward", grid, 100, 1.0, **of_it) for grid in grids]
        validate(rows).to_csv(tmp_path / folder / "topk.csv", index=False)
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    monkeypatch.delenv("ATTENTION_DEVICE", raising=False)
    assert plots.load().rows["device_name"].tolist() == ["b-gpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "a-cpu")
    assert plots.load().rows["device_name"].tolist() == ["a-cpu"]
    monkeypatch.setenv("ATTENTION_DEVICE", "c-tpu")
    with pytest.raises(ValueError, match="valid: a-cpu, b-gpu, c-cpu"):
        plots.load()
    monkeypatch.delenv("ATTENTION_DEVICE")
    (tmp_path / "b-gpu" / "topk.csv").unlink()
    assert plots.load().rows["device_name"].unique().tolist() == ["c-cpu"]


def test_file_of_another_schema_is_reported_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "topk.csv").write_text("name,ms\nbra,1\n")
    monkeypatch.setenv("ATTENTION_RESULTS", str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(plots, "say", said.append)
    assert plots.load().rows.empty
    assert said[0].startswith("Folder `old` is left out:") and "another schema" in said[0]


def test_rejected_command_raises_with_its_message() -> None:
    with pytest.raises(ValueError, match=r"unknown attention 'none'; valid: .*bra"):
        programs.run("profiling", "--attention", "none", "--json")
    with pytest.raises(RuntimeError, match="No module named none"):
        programs.run("none")


def test_numbers_are_right_aligned_and_words_left_aligned() -> None:
    table = pd.DataFrame(
        {"a": ["full", "bra"], "b": ["1,234", ""], "c": ["2.5 [2, 3]", "oom"], "d": ["7 x 7", "(+1%)"]}
    )
    assert export.markdown(table).splitlines()[1] == "| --- | ---: | --- | ---: |"
    assert r"\begin{tabular}{lrlr}" in export.latex(table, "")


CROSSING = [("bra", 8, 1.0), ("bra", 16, 2.0), ("full", 8, 2.0), ("full", 16, 1.0)]


def test_kept_output_is_neither_shown_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("ATTENTION_TABLES", str(tmp_path / "tables"))
    with plots.kept() as shown:
        rows = [cell("resolution", name, "forward", side, 1, ms) for name, side, ms in CROSSING]
        figure = crossover.figure(plots.Results(validate(rows)))
        export.publish(pd.DataFrame({"a": ["1"]}), "name", "note")
        plots.say("one", "two")
    assert shown == [figure, "| a |\n| ---: |\n| 1 |\n\nnote\n", "- one\n- two"] and not list(tmp_path.iterdir())
