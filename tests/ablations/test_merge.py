"""Merging shards into results: one row per cell for any set of attempts, and idempotent."""

import json
from pathlib import Path
from typing import Any

import pytest

from ablations.harness.local_runner import Report, Settings
from ablations.harness.results_store import Store, StoreError, exclusive
from ablations.harness.sweep import Sweep
from ablations.slurm.merge import finished, load_state, merge, save_state
from ablations.slurm.progress import Watched
from ablations.slurm.task import Shard, place
from profiling.cases.case import Case
from profiling.schema.row import load

SWEEP = Sweep("Which row?", "the last", axes={})
DEVICE = "Paper GPU"


def case(height: int) -> Case:
    return Case("full", height, 14)


def row(height: int, status: str = "ok", latency: float = 2.0) -> dict[str, Any]:
    outcome = {"latency_p50_ms": latency} if status == "ok" else {"reason": "a reason"}
    return case(height).key_columns("s", DEVICE) | {"status": status} | outcome


def shard(campaign: Path, number: int, *heights: int) -> Shard:
    one = Shard(campaign / "shards" / f"{number:04d}")
    one.create(Settings(), {place("s", case(height)): ("s", SWEEP, case(height)) for height in heights})
    return one


def attempt(one: Shard, name: str, rows: list[dict[str, Any]], *journal: dict[str, Any]) -> Path:
    """An attempt with these rows and this journal; returns its results file."""
    (one.folder / name).mkdir()
    (one.folder / name / "journal").write_text("".join(json.dumps(line) + "\n" for line in journal))
    store = Store(one.folder / name / "paper-gpu" / "s.csv")
    for each in rows:
        store.append(each)
    return store.path


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """Two shards: one done at once, the other in two attempts, the first of which was cut off within a row."""
    folder = tmp_path / "slurm" / "one"
    folder.mkdir(parents=True)
    save_state(folder, finished=False, aside=[])
    first, second = shard(folder, 0, 10, 12, 14), shard(folder, 1, 11, 13)
    (attempt(first, "7_0", [row(14), row(10, "error"), row(12)]).parent / "peaks.csv").write_text("mine")
    path = attempt(second, "8_0", [row(11, latency=1.0), row(13)], {"begin": 0}, {"begin": 1})
    path.write_bytes(path.read_bytes()[:-5])
    attempt(second, "10_0", [row(11, latency=3.0)], {"begin": 0}, {"end": "SIGTERM"})
    return folder


def merged(campaign: Path, **settings: Any) -> Report:
    report = Report()
    merge(campaign, Settings(results=campaign.parent.parent, **settings), ["s"], report)
    return report


def test_rows_are_merged_by_key_in_the_order_in_which_cells_were_dealt(campaign: Path, tmp_path: Path) -> None:
    report = merged(campaign)
    path = tmp_path / "paper-gpu" / "s.csv"
    table = load(path)
    assert list(table["height"]) == [10, 11, 12, 14] and list(table["status"]) == ["error", "ok", "ok", "ok"]
    # The row of the later attempt, in numeric and not alphabetic order: 8 before 10.
    assert list(table["latency_p50_ms"])[1:] == [3.0, 2.0, 2.0]
    assert report.files == [path] and report.statuses == {"ok": 3, "error": 1}
    assert (tmp_path / "paper-gpu" / "peaks.csv").read_text() == "mine"
    before = path.read_bytes()
    assert merged(campaign).statuses == report.statuses and path.read_bytes() == before


def test_merge_keeps_existing_rows_and_replaces_failed_ones(campaign: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "paper-gpu" / "s.csv")
    store.append(row(28))
    store.append(row(12, "timeout"))
    merged(campaign)
    table = load(store.path).set_index("height")
    assert sorted(table.index) == [10, 11, 12, 14, 28] and table.loc[12, "status"] == "ok"
    assert {place("s", case(height)) for height in (11, 12, 14, 28)} == finished(
        ["paper-gpu"], Settings(results=tmp_path, retry_failed=True)
    )


def test_fresh_campaign_archives_existing_rows_once(campaign: Path, tmp_path: Path) -> None:
    Store(tmp_path / "paper-gpu" / "s.csv").append(row(28))
    for _ in range(2):
        merged(campaign, fresh=True)
        assert sorted(load(tmp_path / "paper-gpu" / "s.csv")["height"]) == [10, 11, 12, 14]
    (aside,) = (tmp_path / "paper-gpu").glob("*.old")
    assert list(load(aside)["height"]) == [28]
    assert load_state(campaign)["models"] == ["paper-gpu"]


def test_nothing_is_merged_beside_another_run(campaign: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "paper-gpu"), pytest.raises(StoreError, match="in use by another run"):
        merged(campaign)
    assert not (tmp_path / "paper-gpu" / "s.csv").exists()


def test_deaths_count_only_attempts_without_an_end_entry(campaign: Path) -> None:
    first, second = (Shard(path) for path in sorted((campaign / "shards").iterdir()))
    assert first.deaths() == {} and second.deaths() == {1: 1}
    attempt(second, "12_0", [], {"begin": 1})
    attempt(second, "14_0", [], {"begin": 1}, {"end": "SIGTERM"})
    assert second.deaths() == {1: 2}


def test_progress_is_read_incrementally(campaign: Path) -> None:
    watched = Watched(campaign)
    watched.look()
    assert watched.left() == {1: 1}
    assert str(watched.state({1: "running"})) == "1 running; 1 error, 3 ok"
    assert str(watched.state(None)) == "Slurm does not answer; 1 error, 3 ok"
    attempt(Shard(campaign / "shards" / "0001"), "12_0", [], {"skip": [0, 1]})
    watched.look()
    assert watched.left() == {} and watched.skipped == 1
    assert watched.state({}).done == watched.state({}).total == 5
