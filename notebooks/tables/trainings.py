"""Accuracies of trained networks: which tasks count, who survives another resolution, what routing options buy."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.plots import Results, needs
from profiling.schema.capability import SOLVED, summary

CONTROL, REFERENCE = "pseudo_conv", "full"
LOCAL = ("texture",)
"""Tasks that a convolution must solve; it must fail at all others."""
ORDER = ("recall", "offset", "count", "match_digits", "connect", "texture")
AGREE, BELOW, APART = 0.1, 0.2, 0.2
"""Accuracies: largest range over seeds of the two controls; how far below full attention the convolution must be; from
which range over attentions on a task separates."""


@dataclass(frozen=True)
class Task:
    """A task as the rows show it: how the controls did, the range over attentions, and why it does not count."""

    name: str
    full: pd.Series
    control: pd.Series
    chance: float
    apart: float
    seeds: int
    why_not: str


def settings(results: Results, sweep: str = "capability", difficulty: str = "medium") -> pd.DataFrame:
    """One row for each setting of a sweep at one difficulty, over its seeds."""
    rows = results.sweep(sweep)
    return summary(rows[rows["difficulty"] == difficulty])


def table_of(result: pd.DataFrame, column: str = "accuracy") -> pd.DataFrame:
    """Attentions by tasks, in the order of ORDER."""
    table = result.pivot_table(index="name", columns="task", values=column, aggfunc="first")
    return table[[task for task in ORDER if task in table.columns]]


def judged(results: Results) -> list[Task]:
    """Every task, and whether it counts: full attention solves it, the convolution does as it must, seeds agree."""
    result = settings(results)
    return [_judge(name, result[result["task"] == name]) for name in ORDER if (result["task"] == name).any()]


def counted(results: Results) -> list[str]:
    """The tasks that count and are not local: those of the headline."""
    return [task.name for task in judged(results) if not task.why_not and task.name not in LOCAL]


def _judge(name: str, rows: pd.DataFrame) -> Task:
    by_name = rows.set_index("name")
    nothing = pd.Series({"accuracy": float("nan"), "low": float("nan"), "high": float("nan"), "seeds": 0})
    full, control = (by_name.loc[who] if who in by_name.index else nothing for who in (REFERENCE, CONTROL))
    apart = rows["accuracy"].max() - rows["accuracy"].min()
    seeds = int(min(full["seeds"], control["seeds"]))
    why = list(_why_not(name, full, control, apart, seeds))
    return Task(name, full, control, rows["chance"].iloc[0], apart, seeds, "; ".join(why))


def _why_not(name: str, full: pd.Series, control: pd.Series, apart: float, seeds: int) -> Iterator[str]:
    if not full["accuracy"] >= SOLVED:
        yield "full attention does not solve it"
    if name in LOCAL and not control["accuracy"] >= SOLVED - 0.05:
        yield "the convolution fails at it"
    if name not in LOCAL and not control["accuracy"] <= full["accuracy"] - BELOW:
        yield "the convolution is not far below full attention"
    if seeds < 3:
        yield f"{seeds} seeds"
    elif max(full["high"] - full["low"], control["high"] - control["low"]) > AGREE:
        yield "the seeds of a control disagree"
    if name not in LOCAL and apart < APART:
        yield "it separates nothing"


def percent(value: float) -> str:
    """Without decimals; empty if missing."""
    return "" if pd.isna(value) else f"{100 * value:.0f}"


@needs("capability")
def tasks(results: Results) -> None:
    """Table: the tasks, how the controls did, and which count."""
    lines = [
        {
            "task": task.name, "full, %": _with_range(task.full), f"{CONTROL}, %": _with_range(task.control),
            "chance, %": percent(task.chance), "range over attentions, points": percent(task.apart),
            "seeds": str(task.seeds), "counts": (task.why_not and f"no: {task.why_not}") or "yes",
        } for task in judged(results)
    ]  # fmt: skip
    note = (
        "Mean over seeds, and in brackets the least and the largest. A task counts if full attention solves it (at "
        f"least {100 * SOLVED:.0f} %), the convolution {CONTROL} is at least {100 * BELOW:.0f} points below it (at "
        f"texture: is near it), and three seeds of both agree within {100 * AGREE:.0f} points."
    )
    publish(pd.DataFrame(lines), "capability_tasks", note)


@needs("capability")
def transfer(results: Results) -> None:
    """Table: accuracy at the grid of training and at twice that."""
    result, names = settings(results), counted(results)
    result = result[result["task"].isin(names)]
    if result.empty:
        return
    side = int(result["height"].iloc[0])
    parts = {"": "accuracy", f" at {2 * side}": "double", f" at {2 * side}, n_win auto": "double_auto"}
    columns = {
        f"{task}{words}, %": table_of(result, value)[task].map(percent)
        for task in names for words, value in parts.items()
        if task in table_of(result, value).columns and table_of(result, value)[task].notna().any()
    }  # fmt: skip
    texts = pd.DataFrame(columns).fillna("").rename_axis("attention").reset_index()
    note = (
        f"Trained at {side} x {side} tokens, tested there and at {2 * side} x {2 * side} without more training, mean "
        "over seeds. Regions and windows that are a number per image grow with the grid; those that are a number of "
        "tokens do not."
    )
    publish(texts, "capability_transfer", note)


@needs("capability_bra")
def options(results: Results) -> None:
    """Table: BRA with each routing option."""
    result = settings(results, "capability_bra")
    result = result.assign(options=result["options"].fillna("topk=4, as by default"))
    by_topk = result["options"].str.startswith("topk=")
    result = pd.concat([result[by_topk].sort_values("topk"), result[~by_topk]])
    wide = {
        f"{task}, %": result[result["task"] == task].set_index("options").apply(_with_range, axis=1)
        for task in ORDER if (result["task"] == task).any()
    }  # fmt: skip
    texts = pd.DataFrame(wide).reindex(result["options"].unique()).fillna("").rename_axis("options").reset_index()
    note = (
        "Mean over seeds, and in brackets the least and the largest. Options not named have their defaults (n_win 7)."
    )
    publish(texts, "capability_bra", note)


def _with_range(row: pd.Series) -> str:
    if pd.isna(row["accuracy"]):
        return ""
    return f"{percent(row['accuracy'])} ({percent(row['low'])} to {percent(row['high'])})"
