"""Results files of an older schema: rejected with the command that converts them, and converted without loss."""

import csv
from pathlib import Path

import pytest

from ablations.__main__ import main
from ablations.analysis.convert import convert
from profiling.schema.row import COLUMNS, RENAMED, SchemaError, load

VALUES = {
    "sweep": "s", "kind": "attention", "name": "full", "impl_requested": "auto", "compiled": "False",
    "cuda_graph": "False", "deterministic": "False", "mode": "forward", "dtype": "fp32", "device": "cpu", "batch": "1",
    "height": "7", "width": "7", "seed": "0", "replicate": "0", "device_name": "Paper CPU", "status": "ok",
    "latency_p50_ms": "0.123456789", "machine_speed_probe_ms": "0.25", "correctness_error": "1e-07",
    "correctness_tolerance": "4.76837158e-07",
}  # fmt: skip


def older(path: Path, **changed: str) -> Path:
    """A file as it was written before columns were renamed, one was dropped and another added."""
    back = {new: old for old, new in RENAMED.items()}
    cells = {back.get(name, name): VALUES.get(name, "") for name in COLUMNS if name != "routes_flipped"}
    cells |= {"yardstick_memory_ms": "5.5"} | changed
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([list(cells), list(cells.values())])
    return path


def test_an_older_file_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=f"older schema; convert it with: python -m ablations convert {tmp_path}"):
        load(older(tmp_path / "s.csv"))


def test_converted_cells_are_the_same_text_under_new_names(tmp_path: Path) -> None:
    path = older(tmp_path / "s.csv")
    assert convert(path) and not convert(path)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {name: VALUES.get(name, "") for name in COLUMNS}
    assert len(load(path)) == 1 and [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_a_flag_by_an_older_rule_is_stated_anew(tmp_path: Path) -> None:
    values = VALUES | {"macs_analytic": "100", "macs_counted": "100", "macs_fvcore": "103", "macs_agree": "False"}
    path = tmp_path / "s.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{','.join(values.get(name, '') for name in COLUMNS)}\n")
    with pytest.raises(SchemaError, match=r"macs_agree .* python -m ablations convert"):
        load(path)
    assert convert(path) and not convert(path)
    assert load(path)["macs_agree"].tolist() == [True]


@pytest.mark.parametrize("damage", [b"\xbd", b"x" * 200_000], ids=["not UTF-8", "too long a field"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    path = older(tmp_path / "s.csv")
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(SchemaError, match=f"{path} is not a results file: "):
        convert(path)


@pytest.mark.parametrize("changed", [{"mine": "1"}, {"status": "odd"}, {"macs_counted": "many"}])
def test_file_that_cannot_be_converted_is_unchanged(tmp_path: Path, changed: dict[str, str]) -> None:
    path = older(tmp_path / "s.csv", **changed)
    before = path.read_bytes()
    with pytest.raises(SchemaError):
        convert(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_folder_is_converted_except_files_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "device").mkdir()
    older(tmp_path / "device" / "s.csv")
    (tmp_path / "device" / "peaks.csv").write_text("what,per_second,unit\n")
    assert main(["convert", str(tmp_path)]) == 0 == main(["convert", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'device' / 's.csv'}: converted", "1 of 1 files converted", "0 of 1 files converted"
    ]  # fmt: skip
    assert (tmp_path / "device" / "peaks.csv").read_text() == "what,per_second,unit\n"
    assert main(["convert", str(tmp_path / "none")]) == 2
