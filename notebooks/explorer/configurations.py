"""Configurations: an attention with its options and code, as rows hold it and as predictions name it.

A row holds every option that has a column, a prediction only the options that differ from the attention's defaults.
Both become one key: the options of the resolution sweep, with those that differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from profiling.schema.row import KEY, as_text

OPTION_COLUMNS = KEY[KEY.index("n_win") : KEY.index("other_options")]
KV_OPTIONS = ("kv_per_win", "kv_downsample_ratio", "kv_downsample_kernel")
PAD = "auto_pad"
"""It decides whether a grid is refused, not what is computed."""
Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Key:
    """What tells configurations apart; options as text, without PAD and without those that have no effect."""

    name: str
    options: Options
    impl: str
    compiled: bool = False
    cuda_graph: bool = False
    deterministic: bool = False


@dataclass
class Configuration:
    """One configuration.

    Attributes:
        options: those that its command names.
        label: the options in which it differs from the resolution sweep's.
        usual: whether there are none.
        padded: whether its command allows grids that its options do not divide.
        prediction: its place in the predictions; None without one.
    """

    key: Key
    options: Options
    label: str
    usual: bool
    padded: bool = False
    prediction: int | None = None


@dataclass
class Configurations:
    """All configurations of rows and predictions, in the order in which they were added."""

    usual: Mapping[str, Mapping[str, str]]
    members: dict[Key, Configuration] = field(default_factory=dict)

    def of_row(self, row: Mapping[str, Any]) -> int:
        """The place of a row's configuration."""
        given = _options_of_row(row)
        impl = row["impl"] if pd.notna(row["impl"]) else row["impl_requested"]
        flags = [bool(row[name]) for name in ("compiled", "cuda_graph", "deterministic")]
        key = Key(row["name"], _effective(given), str(impl), *flags)
        return self._place(key, key.options, given.get(PAD) == "true", None)

    def of_prediction(self, number: int, candidate: Mapping[str, Any]) -> int:
        """The place of a predicted candidate's configuration."""
        name = candidate["attention"]
        given = {option: _text(value) for option, value in candidate["options"].items()}
        key = Key(name, _effective({**self.usual.get(name, {}), **given}), candidate["impl"])
        options = tuple(sorted((option, value) for option, value in given.items() if option != PAD))
        return self._place(key, options, given.get(PAD) == "true", number)

    def _place(self, key: Key, options: Options, padded: bool, prediction: int | None) -> int:
        known = self.members.get(key)
        if known is None:
            usual = self.usual.get(key.name, {})
            differ = [(option, value) for option, value in key.options if usual.get(option) != value]
            label = ", ".join(f"{option} {value}" for option, value in differ)
            known = self.members[key] = Configuration(key, options, label, not differ)
        known.padded |= padded
        if prediction is not None:
            # Shorter: without the options at their defaults.
            known.options, known.prediction = options, prediction
        return list(self.members).index(key)


def usual_options(rows: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Per attention, the options that most rows of the resolution sweep have; of other sweeps where that has none.

    Of the device that measured it last: defaults may have changed since another did.
    """
    result: dict[str, dict[str, str]] = {}
    for name, of_name in rows.groupby("name"):
        part = of_name[of_name["sweep"] == "resolution"]
        part = part if len(part) else of_name
        part = part[part["device_name"] == part.sort_values("started_at")["device_name"].iloc[-1]]
        modes = {option: part[option].dropna().mode() for option in OPTION_COLUMNS}
        result[str(name)] = {option: _text(values.iloc[0]) for option, values in modes.items() if len(values)}
    return result


def _options_of_row(row: Mapping[str, Any]) -> dict[str, str]:
    options = {option: _text(row[option]) for option in OPTION_COLUMNS if pd.notna(row[option])}
    others: Iterable[str] = () if pd.isna(row["other_options"]) else str(row["other_options"]).split()
    return options | {name: _text(value) for name, _, value in (pair.partition("=") for pair in others)}


def _effective(options: Mapping[str, str]) -> Options:
    """Without PAD, and without the options of kv_downsample that its mode does not read."""
    mode = options.get("kv_downsample_mode", "identity")
    if mode == "identity":
        unread: tuple[str, ...] = KV_OPTIONS
    else:
        unread = ("kv_downsample_ratio", "kv_downsample_kernel") if mode.startswith("ada_") else ("kv_per_win",)
    return tuple(sorted((name, value) for name, value in options.items() if name not in (PAD, *unread)))


def _text(value: Any) -> str:
    """The text of an option's value on a command line."""
    text = as_text(value)
    if value is None:
        return "none"
    return text.lower() if text in ("True", "False", "None") else text
