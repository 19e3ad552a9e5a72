"""One configuration under the profiler: the output of ``python -m profiling --json`` as table and figure."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from notebooks.figures.cost_split import PARTS
from notebooks.lib.export import markdown
from notebooks.lib.plots import FAINT, MIB, number, save, say
from notebooks.lib.programs import results_folder, run, torch_is_there

CONFIG = "--attention bra --impl reference --height 56 --width 56 --dim 64 --num-heads 2 --n-win 7 --topk 4"
STORED = "profile_one_config.json"
Found = dict[str, Any]


def profile(config: str = CONFIG) -> Found | None:
    """The output of ``python -m profiling CONFIG --json``; without PyTorch, the last stored output.

    Returns:
        The JSON plus ``config`` and ``started_at``; None if there is neither PyTorch nor a stored result.
    """
    path = results_folder() / STORED
    if torch_is_there():
        result = {"config": config, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        result |= json.loads(run("profiling", *config.split(), "--json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"Measured just now on **{result['device_name']}**, and kept in `results/{STORED}`.")
        return result
    if not path.exists():
        say(f"There is no PyTorch here, and no kept result: where there is PyTorch, this notebook writes `{STORED}`.")
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    say(
        f"There is no PyTorch here: this is the result kept on {result['started_at'][:10]}, of {result['device_name']}."
    )
    return result


def table(result: Found | None) -> None:
    """Table: cost by three counters, memory predicted and measured, latency with its interval."""
    if result is None:
        return
    say(f"`python -m profiling {result['config']}`")
    if result["status"] != "ok":
        say(f"**{result['status']}**: {result['reason']}")
    rows = [*_cost(result), *_memory(result), *_latency(result)]
    say(markdown(pd.DataFrame(rows, columns=["what", "value", "note"])))


def _cost(result: Found) -> Iterator[tuple[str, str, str]]:
    yield "parameters", _count(result.get("params")), ""
    formula = result.get("macs_analytic")
    yield "MACs, by formula", _count(formula), ""
    for name, words in (("macs_counted", "MACs, counted by operator"), ("macs_fvcore", "MACs, by fvcore")):
        value = result.get(name)
        yield words, _count(value), f"{value / formula - 1:+.2%} against the formula" if value and formula else ""
    yield "MACs of the backward pass", _count(result.get("macs_backward_counted")), ""


def _memory(result: Found) -> Iterator[tuple[str, str, str]]:
    predicted, peak = result.get("memory_predicted_bytes"), result.get("memory_peak_bytes")
    yield "peak memory, predicted (MiB)", _scaled(predicted, MIB), ""
    note = f"prediction off by {predicted / peak - 1:+.2%}" if predicted and peak else ""
    yield "peak memory, measured (MiB)", _scaled(peak, MIB), note


def _latency(result: Found) -> Iterator[tuple[str, str, str]]:
    low, high = result.get("latency_low_ms"), result.get("latency_high_ms")
    note = f"95 % interval {number(low)} to {number(high)}" if low and high else ""
    yield "latency, median (ms)", _scaled(result.get("latency_p50_ms"), 1), note
    quartiles = [_scaled(result.get(f"latency_{name}_ms"), 1) for name in ("p25", "p75")]
    yield "latency, quartiles (ms)", " / ".join(quartiles), f"{_count(result.get('latency_samples'))} samples"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else number(value / unit)


def figure(result: Found | None) -> Figure | None:
    """Bars: MACs by part, time by stage where the profiler names stages, and the heaviest operators."""
    panels = list(_panels(result)) if result else []
    if not panels:
        return None
    widths = [max(map(len, shares.index)) for _, shares, _ in panels]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 0.08 * sum(widths), 4.4), squeeze=False,
                             layout="constrained")  # fmt: skip
    longest = max(len(shares) for _, shares, _ in panels)
    for ax, (title, shares, unit) in zip(axes[0], panels, strict=True):
        _bars(ax, shares, longest)
        ax.set(title=title, xlabel=f"share of {unit}, %")
    first = result or {}
    fig.suptitle(f"{first['name']} at {first['height']} x {first['width']} under the profiler", x=0.01, ha="left",
                 weight="bold", fontsize=14)  # fmt: skip
    facts = (first["device_name"], first["started_at"][:10], f"impl {first.get('impl')}", first["dtype"], first["mode"])
    fig.supxlabel("; ".join(facts) + f"; PyTorch {first['torch']}.", x=0.01, ha="left", fontsize=9, color=FAINT)
    return save(fig, "profile_one_config")


def _panels(result: Found) -> Iterator[tuple[str, pd.Series, str]]:
    """Title, shares in percent and their base, of each panel for which the result has numbers."""
    formula = result.get("macs_analytic")
    if formula and result.get("macs_attention") is not None:
        parts = pd.Series({part.replace("_", " "): 100 * result[f"macs_{part}"] / formula for part in PARTS})
        yield "MACs by part", parts, "the MACs"
    if stages := result.get("stages"):
        yield "Time by stage", pd.Series({stage["name"]: 100 * stage["share"] for stage in stages}), "the step's time"
    if operators := result.get("heaviest_operators"):
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


def findings(result: Found | None) -> list[str]:
    """Sentences computed from the profiler's numbers; none without them."""
    said = [] if result is None else [*_said_of_cost(result), *_said_of_time(result)]
    say(*said)
    return said


def _said_of_cost(result: Found) -> Iterator[str]:
    counts = {name: result.get(f"macs_{name}") for name in ("analytic", "counted", "fvcore")}
    known = {name: count for name, count in counts.items() if count}
    if len(known) > 1:
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[least] == known[most]:
            yield f"{len(known)} counters of MACs say the same: {known[least]:,}."
        else:
            off = known[most] / known[least] - 1
            yield f"The counters of MACs differ by {off:.2%}: {known[least]:,} ({least}) to {known[most]:,} ({most})."
    predicted, peak = result.get("memory_predicted_bytes"), result.get("memory_peak_bytes")
    if predicted and peak:
        yield f"Memory was predicted as {predicted / MIB:.2f} MiB and measured as {peak / MIB:.2f} MiB."


def _said_of_time(result: Found) -> Iterator[str]:
    low, high, median = (result.get(f"latency_{name}_ms") for name in ("low", "high", "p50"))
    if low and high and median:
        yield f"A step takes {number(median)} ms; the median lies between {number(low)} and {number(high)} ms."
    for words, parts in (("stage", result.get("stages")), ("operator", result.get("heaviest_operators"))):
        if parts:
            top = max(parts, key=lambda part: part["share"])
            yield f"The heaviest {words}, {top['name']}, takes {top['share']:.0%} of the step's time."
