"""From the shards of a campaign to the results that a run on one machine would have left."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ablations.launch import Report, Settings
from ablations.shard import Shard, place, place_of
from ablations.store import FAILED, Store, exclusive, read
from profiling.rows import KEY


def merge(campaign: Path, settings: Settings, sweeps: Iterable[str], report: Report) -> None:
    """Put every row of the campaign's shards into ``<results>/<device>/<sweep>.csv``; done twice, it changes nothing.

    Raises:
        StoreError: another run holds the folder of a device; the rows stay in the shards.
    """
    shards = [Shard(path) for path in sorted((campaign / "shards").iterdir())]
    order: dict[str, int] = {}
    rows: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    peaks: dict[str, Path] = {}
    for shard in shards:
        for path in shard.files():
            rows[path.parent.name, path.stem].extend(read(path))
            peaks.setdefault(path.parent.name, path.with_name("peaks.csv"))
        for number, (name, _, case) in enumerate(shard.order()[1]):
            # Dealt in turn: the first of every shard came before the second of any.
            order[place(name, case)] = number * len(shards) + int(shard.folder.name)
    for model in sorted({model for model, _ in rows}):
        with exclusive(settings.results / model):
            if not (settings.results / model / "peaks.csv").exists() and peaks[model].exists():
                shutil.copy(peaks[model], settings.results / model / "peaks.csv")
            for sweep in sorted(sweep for of, sweep in rows if of == model):
                store = _store(campaign, settings, model, sweep)
                store.merge(sorted(rows[model, sweep], key=lambda row: order[place_of(row)]))
    _tell(rows, campaign, settings, sweeps, report)


def _store(campaign: Path, settings: Settings, model: str, sweep: str) -> Store:
    """The results file; if all is to start anew, with its old rows put aside, once."""
    store = Store(settings.results / model / f"{sweep}.csv")
    aside = record(campaign)["aside"]
    if settings.fresh and [model, sweep] not in aside:
        store.set_aside()
        keep(campaign, aside=[*aside, [model, sweep]])
    return store


def _tell(
    rows: Mapping[tuple[str, str], list[list[str]]],
    campaign: Path,
    settings: Settings,
    sweeps: Iterable[str],
    report: Report,
) -> None:
    models = sorted({model for model, _ in rows} | set(record(campaign).get("models", [])))
    keep(campaign, models=models)
    report.statuses = Counter({place_of(row): row[len(KEY)] for found in rows.values() for row in found}.values())
    paths = (settings.results / model / f"{sweep}.csv" for model in models for sweep in sweeps)
    report.files = [path for path in paths if path.exists()]


def finished(models: list[str], settings: Settings) -> set[str]:
    """The cells that have a row on any of these devices, which is not one of a failure to be retried."""
    return {
        place_of(row)
        for model in models
        for path in (settings.results / model).glob("*.csv")
        if path.name != "peaks.csv"
        for row in read(path)
        if not (settings.retry_failed and row[len(KEY)] in FAILED)
    }


def record(campaign: Path) -> dict[str, Any]:
    """What is kept of a campaign beside its shards; empty if there is none."""
    path = campaign / "campaign.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(campaign: Path, **changes: Any) -> None:
    """Change what is kept, all or nothing."""
    beside = campaign / "campaign.tmp"
    beside.write_text(json.dumps(record(campaign) | changes))
    beside.replace(campaign / "campaign.json")
