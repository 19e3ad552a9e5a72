"""The schema of a row: which rows it rejects, and that valid rows round-trip through a file."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.cases.case import Case
from profiling.schema import data_dictionary
from profiling.schema.capability import CAPABILITY
from profiling.schema.row import (
    COLUMNS,
    KEY,
    MEASURED,
    STATUSES,
    SchemaError,
    agree,
    as_text,
    holds_costs,
    load,
    validate,
)

RESULTS = Path(__file__).resolve().parents[2] / "results"
CASE = Case("bra", 14, 28, options=(("n_win", 7), ("topk", 4)))


def row(**changes: Any) -> dict[str, Any]:
    """A row of a measured cell, with changes."""
    measured = {"status": "ok", "latency_p50_ms": 1.5, "memory_peak_bytes": 4096, "params": 640}
    return CASE.key_columns("made_up", "Paper CPU") | measured | changes


def failed(**changes: Any) -> dict[str, Any]:
    """A row of a cell that failed, with changes."""
    return CASE.key_columns("made_up", "Paper CPU") | {"status": "error", "reason": "a reason"} | changes


TYPED = validate([row()])


def write(path: Path, *given_rows: dict[str, Any]) -> Path:
    """The rows as a file, as the store writes them."""
    text = [{name: as_text(one.get(name)) for name in COLUMNS} for one in given_rows]
    pd.DataFrame(text, columns=list(COLUMNS)).to_csv(path, index=False, lineterminator="\n")
    return path


def test_a_good_row_becomes_typed_columns() -> None:
    table = validate([row(compiled=True, kv_tokens_per_query=64)])
    assert tuple(table.columns) == COLUMNS
    result = table.loc[0]
    assert result["height"] == 14 and result["width"] == 28 and result["n_win"] == "7" and result["topk"] == 4
    assert result["compiled"] and result["latency_p50_ms"] == 1.5 and result["kv_tokens_per_query"] == 64.0
    assert pd.isna(result["window_size"]) and pd.isna(result["reason"]) and pd.isna(result["macs_agree"])


def test_failed_statuses_have_a_reason_and_no_measurements() -> None:
    failures = [status for status in STATUSES if status != "ok"]
    assert list(validate([failed(status=status) for status in failures])["status"]) == failures


def measurement(column: str) -> dict[str, Any]:
    return {column: "converged" if column == "latency_stop" else 1}


def test_an_ok_cell_may_have_every_measurement() -> None:
    table = validate([row(**measurement(column)) for column in MEASURED])
    for line, column in enumerate(MEASURED):
        assert not pd.isna(table.loc[line, column])


@pytest.mark.parametrize("column", MEASURED)
def test_only_an_ok_cell_has_measurements(column: str) -> None:
    with pytest.raises(SchemaError, match="only a cell with status ok"):
        validate([failed(**measurement(column))])


def test_measurements_are_those_of_time_and_measured_memory() -> None:
    assert {"latency_p50_ms", "latency_stop", "device_time_p50_ms", "memory_peak_bytes", "roofline_fraction"} <= set(
        MEASURED
    )
    assert not {"memory_predicted_bytes", "memory_base_bytes", "macs_counted", "correctness_error"} & set(MEASURED)


BAD = [
    row(latency_p50_ms=None),
    failed(reason=None),
    failed(reason="  \n "),
    row(status="fine"),
    row(status=None),
    row(colour="red"),
    row(latency_p50_ms=-1.0),
    row(memory_peak_bytes=-1),
    row(params=-1),
    row(topk=-1),
    row(height=0),
    row(batch=0),
    row(height=None),
    row(height=1.5),
    row(params="many"),
    row(latency_p25_ms="fast"),
    row(compiled=None),
    row(compiled="yes"),
    row(soft_routing="maybe"),
    row(mode="backward"),
    row(dtype="fp8"),
    row(device="abacus"),
    row(kind="thing"),
    row(latency_stop="bored"),
    row(sweep=None),
    row(device_name=""),
    row(latency_p50_ms=float("nan")),
    row(macs_counted=7.5),
]


@pytest.mark.parametrize(
    "bad",
    BAD,
    ids=lambda bad: " ".join(f"{k}={v}" for k, v in bad.items() if row().get(k, failed().get(k)) != v) or "no reason",
)
def test_a_bad_row_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        validate([bad])


AGREEMENTS = [
    (100, 100, 100, True),
    (100, 100, None, True),
    (100, 100, 104, True),
    (100, 100, 105, False),
    (100, 100, 99, False),
    (100, 101, None, False),
    (100, 101, 100, False),
    (100, None, 103, True),
    (None, 1000, 1041, False),
    (None, 1000, 999, False),
    (None, 100, None, None),
    (None, None, None, None),
    (0, 0, 0, True),
    (0, 0, 1, False),
    (pd.NA, 7, float("nan"), None),
]


def counts(analytic: Any, counted: Any, fvcore: Any) -> dict[str, Any]:
    return {"macs_analytic": analytic, "macs_counted": counted, "macs_fvcore": fvcore}


def test_agreement_of_the_counts() -> None:
    for *result, expected in AGREEMENTS:
        assert agree(*result) is expected
    stated = [row(**counts(*result), macs_agree=expected) for *result, expected in AGREEMENTS]
    assert len(validate(stated)) == len(AGREEMENTS)


@pytest.mark.parametrize("case", AGREEMENTS, ids=str)
def test_a_flag_that_contradicts_the_counts_is_refused(case: tuple[Any, ...]) -> None:
    *result, expected = case
    with pytest.raises(SchemaError, match="macs_agree contradicts"):
        validate([row(**counts(*result), macs_agree=not expected)])


TEXTS = [
    "one, two, three",
    'he said "no"',
    '"',
    "it's; [a] {b} | c \\ \\n",
    "½ µs, naïve, 注意力, 🙂",
    "NA",
    "nan",
    "None",
    "-1",
    "1.0",
    "True",
    "=1+1",
    "#comment",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator",
]


def test_text_survives_a_file_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", *(failed(reason=reason, seed=seed) for seed, reason in enumerate(TEXTS)))
    assert list(load(path)["reason"]) == TEXTS


@pytest.mark.parametrize(
    ("reason", "stored"),
    [("two\nlines", "two lines"), ("\r\n tabs\tand \v more\f ", "tabs and more"), ("a\x00b", "a b"), ("\ud800", "?")],
)
def test_a_cell_is_one_line(tmp_path: Path, reason: str, stored: str) -> None:
    path = write(tmp_path / "x.csv", failed(reason=reason))
    assert len(path.read_bytes().splitlines()) == 2
    assert load(path).loc[0, "reason"] == stored


@settings(deadline=None)
@given(
    reason=st.text(min_size=1).filter(lambda text: as_text(text) != ""),
    latency=st.floats(min_value=1e-6, max_value=1e9),
    memory=st.integers(min_value=0, max_value=2**62),
    flag=st.sampled_from([True, False, None]),
)
def test_any_row_round_trips_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, reason: str, latency: float, memory: int, flag: bool | None
) -> None:
    numbers = {"latency_p50_ms": latency, "memory_peak_bytes": memory, "memory_reserved_bytes": None, "throttled": flag}
    path = write(tmp_path_factory.mktemp("any") / "x.csv", row(**numbers), failed(reason=reason, seed=1))
    table = load(path)
    assert table.loc[0, "latency_p50_ms"] == pytest.approx(latency, rel=1e-8)
    assert table.loc[0, "memory_peak_bytes"] == memory
    assert (None if pd.isna(table.loc[0, "throttled"]) else bool(table.loc[0, "throttled"])) is flag
    assert table.loc[1, "reason"] == as_text(reason)
    assert table.dtypes.equals(TYPED.dtypes)


def test_several_files_are_one_table(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", row(), row(height=28))
    second = write(tmp_path / "b.csv", failed(height=56))
    table = load(first, str(second))
    assert list(table["height"]) == [14, 28, 56] and list(table.index) == [0, 1, 2]
    assert list(table["status"]) == ["ok", "ok", "error"]
    assert len(load()) == 0 and tuple(load().columns) == COLUMNS
    assert len(load(write(tmp_path / "empty.csv"))) == 0


def test_a_file_of_another_schema_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", row())
    table = pd.read_csv(good, dtype=str, keep_default_na=False)
    more, less, moved = tmp_path / "more.csv", tmp_path / "less.csv", tmp_path / "moved.csv"
    table.assign(colour="red").to_csv(more, index=False)
    table.drop(columns="params").to_csv(less, index=False)
    table[list(COLUMNS[::-1])].to_csv(moved, index=False)
    for path, message in ((more, "colour"), (less, "params"), (moved, "their order")):
        with pytest.raises(SchemaError, match=message) as refusal:
            load(good, path)
        assert str(path) in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b"a,b\n1,2,3\n4\n", b'"', b"\x00" * 100])
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"x\.csv"):
        load(path)


def test_a_file_with_a_wrong_value_is_refused_and_the_column_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", row())
    text = path.read_text().replace(",640,", ",six hundred,")
    path.write_text(text)
    with pytest.raises(SchemaError, match="params"):
        load(path)


def test_the_key_tells_cases_apart() -> None:
    assert len(set(KEY)) == len(KEY) and KEY[0] == "sweep" and KEY[-1] == "device_name"
    assert not {"status", "params", "impl", "torch", "started_at"} & set(KEY)
    variants = [
        {"height": 15}, {"width": 15}, {"dim": 32}, {"num_heads": 4}, {"batch": 2}, {"kind": "block"},
        {"name": "window"}, {"impl": "reference"}, {"mode": "forward_backward"}, {"dtype": "fp64"}, {"device": "cuda"},
        {"compiled": True}, {"deterministic": True}, {"seed": 1}, {"replicate": 1}, {"options": (("topk", 5),)},
        {"options": (("qk_scale", 0.5),)}, {"options": (("qk_scale", 0.25),)},
    ]  # fmt: skip
    base = {"name": "bra", "height": 14, "width": 14}
    keys = [Case(**(base | changed)).key("s", "d") for changed in ({}, *variants)]
    keys += [Case(**base).key("t", "d"), Case(**base).key("s", "e")]
    assert len(set(keys)) == len(variants) + 3


def test_an_option_given_at_its_default_is_the_same_case() -> None:
    assert Case("bra", 14, 14).key("s", "d") == Case("bra", 14, 14, options=(("topk", 4),)).key("s", "d")


@pytest.mark.parametrize("name", ["axial", "bra", "full", "lepe", "pseudo_conv", "window"])
def test_the_key_of_a_case_is_the_key_of_its_row(tmp_path: Path, name: str) -> None:
    case = Case(name, 14, 14)
    path = write(tmp_path / "x.csv", case.key_columns("s", "d") | {"status": "error", "reason": "r"})
    stored = pd.read_csv(path, dtype=str, keep_default_na=False).loc[0, list(KEY)]
    assert tuple(stored) == case.key("s", "d")


def test_the_data_dictionary_is_generated_from_the_schema() -> None:
    assert (RESULTS / "README.md").read_text() == data_dictionary.page()


def test_every_column_is_explained_in_a_sentence() -> None:
    lines = data_dictionary.dictionary().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(COLUMNS)
    trained = data_dictionary.dictionary(CAPABILITY).splitlines()[2:]
    assert [line.split("`")[1] for line in trained] == list(CAPABILITY.columns)
    for line in lines + trained:
        meaning = line.split(" | ")[2].removesuffix(" |")
        assert len(meaning) > 8 and meaning.endswith("."), line


def test_committed_results_are_of_this_schema() -> None:
    files = [path for path in RESULTS.glob("*/*.csv") if path.parent.name not in ("tables", "figures")]
    sweeps = [path for path in files if path.name != "peaks.csv"]
    trained = [path for path in sweeps if not holds_costs(path)]
    sweeps = [path for path in sweeps if holds_costs(path)]
    for path in trained:
        table = CAPABILITY.load(path)
        assert not table.duplicated(list(CAPABILITY.key)).any() and set(table["sweep"]) == {path.stem}, path
    for path in sweeps:
        table = load(path)
        assert not table.duplicated(list(KEY)).any(), path
        assert set(table["sweep"]) == {path.stem}, path
        assert not table["macs_agree"].eq(False).any(), path
