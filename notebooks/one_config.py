"""One configuration under the profiler: what ``python -m profiling --json`` says of it, as table and figure."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from notebooks.cost_split import PARTS
from notebooks.export import markdown
from notebooks.plots import FAINT, MIB, number, save, say
from notebooks.programs import results_folder, run, torch_is_there

CONFIG = "--attention bra --impl reference --height 56 --width 56 --dim 64 --num-heads 2 --n-win 7 --topk 4"
STORED = "profile_one_config.json"
Found = dict[str, Any]


def profile(config: str = CONFIG) -> Found | None:
    """What ``python -m profiling CONFIG --json`` says; without PyTorch, what it said when it was last kept.

    Returns:
        The JSON with ``config`` and ``started_at`` beside it; None if there is neither PyTorch nor a kept result.
    """
    path = results_folder() / STORED
    if torch_is_there():
        found = {"config": config, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        found |= json.loads(run("profiling", *config.split(), "--json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(f"Measured just now on **{found['device_name']}**, and kept in `results/{STORED}`.")
        return found
    if not path.exists():
        say(f"There is no PyTorch here, and no kept result: where there is PyTorch, this notebook writes `{STORED}`.")
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    say(f"There is no PyTorch here: this is the result kept on {found['started_at'][:10]}, of {found['device_name']}.")
    return found


def table(found: Found | None) -> None:
    """Table: cost by three counters, memory predicted and measured, latency with its interval."""
    if found is None:
        return
    say(f"`python -m profiling {found['config']}`")
    if found["status"] != "ok":
        say(f"**{found['status']}**: {found['reason']}")
    rows = [*_cost(found), *_memory(found), *_latency(found)]
    say(markdown(pd.DataFrame(rows, columns=["what", "value", "note"])))


def _cost(found: Found) -> Iterator[tuple[str, str, str]]:
    yield "parameters", _count(found.get("params")), ""
    formula = found.get("macs_analytic")
    yield "MACs, by formula", _count(formula), ""
    for name, words in (("macs_counted", "MACs, counted by operator"), ("macs_fvcore", "MACs, by fvcore")):
        value = found.get(name)
        yield words, _count(value), f"{value / formula - 1:+.2%} against the formula" if value and formula else ""
    yield "MACs of the backward pass", _count(found.get("macs_backward_counted")), ""


def _memory(found: Found) -> Iterator[tuple[str, str, str]]:
    predicted, peak = found.get("memory_predicted_bytes"), found.get("memory_peak_bytes")
    yield "peak memory, predicted (MiB)", _scaled(predicted, MIB), ""
    note = f"prediction off by {predicted / peak - 1:+.2%}" if predicted and peak else ""
    yield "peak memory, measured (MiB)", _scaled(peak, MIB), note


def _latency(found: Found) -> Iterator[tuple[str, str, str]]:
    low, high = found.get("latency_low_ms"), found.get("latency_high_ms")
    note = f"95 % interval {number(low)} to {number(high)}" if low and high else ""
    yield "latency, median (ms)", _scaled(found.get("latency_p50_ms"), 1), note
    quartiles = [_scaled(found.get(f"latency_{name}_ms"), 1) for name in ("p25", "p75")]
    yield "latency, quartiles (ms)", " / ".join(quartiles), f"{_count(found.get('latency_samples'))} samples"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else number(value / unit)


def figure(found: Found | None) -> Figure | None:
    """Bars: MACs by part, time by stage where the profiler names stages, and the heaviest operators."""
    panels = list(_panels(found)) if found else []
    if not panels:
        return None
    widths = [max(map(len, shares.index)) for _, shares, _ in panels]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 0.08 * sum(widths), 4.4), squeeze=False,
                             layout="constrained")  # fmt: skip
    longest = max(len(shares) for _, shares, _ in panels)
    for ax, (title, shares, unit) in zip(axes[0], panels, strict=True):
        _bars(ax, shares, longest)
        ax.set(title=title, xlabel=f"share of {unit}, %")
    first = found or {}
    fig.suptitle(f"{first['name']} at {first['height']} x {first['width']} under the profiler", x=0.01, ha="left",
                 weight="bold", fontsize=14)  # fmt: skip
    facts = (first["device_name"], first["started_at"][:10], f"impl {first.get('impl')}", first["dtype"], first["mode"])
    fig.supxlabel("; ".join(facts) + f"; PyTorch {first['torch']}.", x=0.01, ha="left", fontsize=9, color=FAINT)
    return save(fig, "profile_one_config")


def _panels(found: Found) -> Iterator[tuple[str, pd.Series, str]]:
    """Title, shares in percent and what of, of each panel that the result has the numbers for."""
    formula = found.get("macs_analytic")
    if formula and found.get("macs_attention") is not None:
        parts = pd.Series({part.replace("_", " "): 100 * found[f"macs_{part}"] / formula for part in PARTS})
        yield "MACs by part", parts, "the MACs"
    if stages := found.get("stages"):
        yield "Time by stage", pd.Series({stage["name"]: 100 * stage["share"] for stage in stages}), "the step's time"
    if operators := found.get("heaviest_operators"):
        names = [_short(operator["name"]) for operator in operators]
        yield "Heaviest operators", pd.Series([100 * o["share"] for o in operators], index=names), "the step's time"


def _short(name: str) -> str:
    name = name.removeprefix("aten::").strip("_")
    return name if len(name) < 34 else name[:31] + "..."


def _bars(ax: Axes, shares: pd.Series, places: int) -> None:
    colours = [PARTS.get(str(name).replace(" ", "_"), "#0072B2") for name in shares.index]
    ax.barh(range(len(shares)), shares, color=colours, height=0.75)
    for place, value in enumerate(shares):
        ax.text(value, place, f" {value:.1f}", va="center", fontsize=9)
    ax.set_yticks(range(len(shares)), list(shares.index))
    ax.set(xlim=(0, 1.15 * shares.max()), ylim=(places - 0.4, -0.6))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def findings(found: Found | None) -> list[str]:
    """Sentences computed from the profiler's numbers; none without them."""
    said = [] if found is None else [*_said_of_cost(found), *_said_of_time(found)]
    say(*said)
    return said


def _said_of_cost(found: Found) -> Iterator[str]:
    counts = {name: found.get(f"macs_{name}") for name in ("analytic", "counted", "fvcore")}
    known = {name: count for name, count in counts.items() if count}
    if len(known) > 1:
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[least] == known[most]:
            yield f"{len(known)} counters of MACs say the same: {known[least]:,}."
        else:
            off = known[most] / known[least] - 1
            yield f"The counters of MACs differ by {off:.2%}: {known[least]:,} ({least}) to {known[most]:,} ({most})."
    predicted, peak = found.get("memory_predicted_bytes"), found.get("memory_peak_bytes")
    if predicted and peak:
        yield f"Memory was predicted as {predicted / MIB:.2f} MiB and measured as {peak / MIB:.2f} MiB."


def _said_of_time(found: Found) -> Iterator[str]:
    low, high, median = (found.get(f"latency_{name}_ms") for name in ("low", "high", "p50"))
    if low and high and median:
        yield f"A step takes {number(median)} ms; the median lies between {number(low)} and {number(high)} ms."
    for words, parts in (("stage", found.get("stages")), ("operator", found.get("heaviest_operators"))):
        if parts:
            top = max(parts, key=lambda part: part["share"])
            yield f"The heaviest {words}, {top['name']}, takes {top['share']:.0%} of the step's time."
