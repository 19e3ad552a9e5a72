"""Merge the shards of a campaign into the results that a run on one machine would write."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ablations.harness.local_runner import Report, Settings
from ablations.harness.results_store import FAILED, Store, exclusive, read
from ablations.slurm.task import Shard, place_of
from profiling.schema.row import KEY, holds_costs


def merge(campaign: Path, settings: Settings, sweeps: Iterable[str], report: Report) -> None:
    """Merge every row of the campaign's shards into ``<results>/<device>/<sweep>.csv``; idempotent.

    Raises:
        StoreError: another run has locked the folder of a device; the rows stay in the shards.
    """
    shards = [Shard(path) for path in sorted((campaign / "shards").iterdir())]
    order: dict[str, int] = {}
    rows: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    peaks: dict[str, Path] = {}
    for shard in shards:
        for path in shard.files():
            rows[path.parent.name, path.stem].extend(read(path))
            peaks.setdefault(path.parent.name, path.with_name("peaks.csv"))
        for number, place in enumerate(shard.places()):
            # Undo the round-robin: the first cells of all shards precede the second ones.
            order[place] = number * len(shards) + int(shard.folder.name)
    for model in sorted({model for model, _ in rows}):
        with exclusive(settings.results / model):
            if not (settings.results / model / "peaks.csv").exists() and peaks[model].exists():
                shutil.copy(peaks[model], settings.results / model / "peaks.csv")
            for sweep in sorted(sweep for of, sweep in rows if of == model):
                store = _store(campaign, settings, model, sweep)
                store.merge(sorted(rows[model, sweep], key=lambda row: order[place_of(row)]))
    _tell(rows, campaign, settings, sweeps, report)


def _store(campaign: Path, settings: Settings, model: str, sweep: str) -> Store:
    """Open the results file; with ``fresh``, archive its old rows once."""
    store = Store(settings.results / model / f"{sweep}.csv")
    aside = load_state(campaign)["aside"]
    if settings.fresh and [model, sweep] not in aside:
        store.archive()
        save_state(campaign, aside=[*aside, [model, sweep]])
    return store


def _tell(
    rows: Mapping[tuple[str, str], list[list[str]]],
    campaign: Path,
    settings: Settings,
    sweeps: Iterable[str],
    report: Report,
) -> None:
    models = sorted({model for model, _ in rows} | set(load_state(campaign).get("models", [])))
    save_state(campaign, models=models)
    report.statuses = Counter({place_of(row): row[len(KEY)] for result in rows.values() for row in result}.values())
    paths = (settings.results / model / f"{sweep}.csv" for model in models for sweep in sweeps)
    report.files = [path for path in paths if path.exists()]


def finished(models: list[str], settings: Settings) -> set[str]:
    """Return the cells with a row on any of these devices, other than of a failure to be retried."""
    return {
        place_of(row)
        for model in models
        for path in (settings.results / model).glob("*.csv")
        if holds_costs(path)
        for row in read(path)
        if not (settings.retry_failed and row[len(KEY)] in FAILED)
    }


def load_state(campaign: Path) -> dict[str, Any]:
    """Load the stored state of a campaign; empty if there is none."""
    path = campaign / "campaign.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save_state(campaign: Path, **changes: Any) -> None:
    """Update the stored state atomically."""
    concurrent = campaign / "campaign.tmp"
    concurrent.write_text(json.dumps(load_state(campaign) | changes))
    concurrent.replace(campaign / "campaign.json")
