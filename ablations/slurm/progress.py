"""Progress of a campaign, read incrementally from the files of its tasks, so that polling is cheap."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ablations.slurm.task import Shard, place_of
from profiling.schema.row import COLUMNS, KEY


@dataclass
class State:
    """Progress of a campaign, printed as one line."""

    total: int
    done: int
    tasks: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    answers: bool = True

    def __str__(self) -> str:
        tasks = ", ".join(f"{count} {state}" for state, count in sorted(self.tasks.items())) or "no tasks"
        cells = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items())) or "no rows yet"
        return f"{tasks if self.answers else 'Slurm does not answer'}; {cells}"


class Watched:
    """Progress of the shards of a campaign."""

    def __init__(self, folder: Path) -> None:
        self.shards = [Shard(path) for path in sorted((folder / "shards").iterdir())]
        self.places = [shard.places() for shard in self.shards]
        self.undone = [set(places) for places in self.places]
        self.total = sum(map(len, self.places))
        self.skipped = 0
        self.statuses: dict[str, str] = {}
        self.seen: Counter[Path] = Counter()

    def look(self) -> None:
        """Read what was written since the last call."""
        for number, shard in enumerate(self.shards):
            if self.undone[number]:
                for attempt in shard.attempts():
                    self._read_journal(number, attempt / "journal")
                for path in shard.files():
                    self._read_rows(number, path)

    def left(self) -> dict[int, int]:
        """Number of undone cells by shard, for shards that have any."""
        return {number: len(undone) for number, undone in enumerate(self.undone) if undone}

    def begun(self, shard: int) -> bool:
        """Whether any task of the shard has started."""
        return bool(self.shards[shard].attempts())

    def state(self, tasks: Mapping[int, str] | None) -> State:
        """Return the progress, with the task states from Slurm."""
        done = self.total - sum(map(len, self.undone))
        statuses = Counter(self.statuses.values())
        return State(self.total, done, Counter((tasks or {}).values()), statuses, tasks is not None)

    def _read_journal(self, number: int, path: Path) -> None:
        for line in self._new(path):
            there = {self.places[number][cell] for cell in json.loads(line).get("skip", ())}
            self.skipped += len(there & self.undone[number])
            self.undone[number] -= there

    def _read_rows(self, number: int, path: Path) -> None:
        for row in csv.reader(self._new(path)):
            if row != list(COLUMNS):
                self.statuses[place_of(row)] = row[len(KEY)]
                self.undone[number].discard(place_of(row))

    def _new(self, path: Path) -> list[str]:
        """Return the complete lines added since the last call."""
        with path.open("rb") as file:
            file.seek(self.seen[path])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.seen[path] += len(whole)
        return whole.decode().splitlines()
