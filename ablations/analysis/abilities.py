"""Accuracies of attentions at tasks, from the capability sweeps of any device: learning does not depend on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attention_zoo import InvalidOption, options
from profiling.schema.capability import load, summary
from profiling.schema.table import as_text

COMMAND = "python run_all.py --only capability"
HEADLINE = ("recall", "offset", "count", "match_digits")
"""Tasks that need more than a convolution, and that full attention learns."""
Key = tuple[str, str]
"""An attention, and the options that differ from its defaults."""


class Abilities:
    """Mean accuracy over seeds at the medium difficulty, by attention, options and task."""

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = rows[(rows["difficulty"] == "medium") & rows["sweep"].isin(("capability", "capability_bra"))]
        result = summary(rows.assign(sweep="")).dropna(subset=["accuracy"])
        # Several settings of the network: the one that most rows have.
        self._known: dict[Key, dict[str, float]] = {}
        for row in result.sort_values("seeds", kind="stable").to_dict("records"):
            text = "" if pd.isna(row["options"]) else row["options"]
            self._known.setdefault((row["name"], text), {})[row["task"]] = row["accuracy"]

    @property
    def tasks(self) -> list[str]:
        """Every task with an accuracy."""
        return sorted({task for known in self._known.values() for task in known})

    def of(self, name: str, chosen: Mapping[str, Any]) -> dict[str, float]:
        """Accuracies by task of an attention with these options; empty where it was not trained."""
        declared = options(name)
        changed = {
            option: value for option, value in sorted(chosen.items())
            if value != declared[option].default and option not in ("auto_pad", "mask_padding", "side_dwconv")
        }  # fmt: skip
        return self._known.get((name, " ".join(f"{o}={as_text(v)}" for o, v in changed.items())), {})

    def needed(self, tasks: Sequence[str]) -> None:
        """InvalidOption unless all of ``tasks`` have an accuracy of some attention."""
        for task in tasks:
            if task not in self.tasks:
                valid = ", ".join(self.tasks) or f"none yet; {COMMAND} makes them"
                raise InvalidOption(f"--needs: no accuracy at {task!r}; valid: {valid}")


def read(results: Path) -> Abilities:
    """The accuracies in a results folder, of all devices."""
    return Abilities(load(*sorted(results.glob("*/capability.csv")), *sorted(results.glob("*/capability_bra.csv"))))
