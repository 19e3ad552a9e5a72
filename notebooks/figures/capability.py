"""What each attention learns: a heat map of accuracy by attention and task, and findings in words."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from notebooks.lib.plots import FAINT, INK, Results, needs, save, say
from notebooks.tables.trainings import (
    APART,
    CONTROL,
    LOCAL,
    counted,
    judged,
    percent,
    settings,
    table_of,
)
from profiling.schema.capability import SOLVED


def ranked(results: Results) -> pd.DataFrame:
    """Accuracy of attentions by tasks, the best on average over the tasks that count first."""
    table = table_of(settings(results))
    names = counted(results) or list(table.columns)
    order = table[names].mean(axis=1).sort_values(ascending=False, kind="stable").index
    return table.loc[order]


@needs("capability")
def heat_map(results: Results) -> Figure:
    """Accuracy of every attention at every task, darker where it is higher."""
    table, result = ranked(results), settings(results)
    low, high = table_of(result, "low"), table_of(result, "high")
    texts = pd.DataFrame(
        {task: [_cell(table, low, high, name, task) for name in table.index] for task in table}, index=table.index
    )
    chance = result.groupby("task")["chance"].first()
    fig, ax = plt.subplots(figsize=(2.4 + 1.45 * table.shape[1], 2.2 + 0.36 * len(table)), layout="constrained")
    sns.heatmap(
        100 * table, ax=ax, vmin=0, vmax=100, cmap="YlGnBu", annot=texts, fmt="", linewidths=1, cbar=False,
        annot_kws={"fontsize": 10},
    )  # fmt: skip
    ax.grid(False)
    names = counted(results)
    heads = [
        f"{task}\nchance {percent(chance[task])} %{'' if task in names else chr(10) + _aside(task)}" for task in table
    ]
    ax.set_xticklabels(heads, rotation=0)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="", ylabel="")
    for word, task in zip(ax.get_xticklabels(), table, strict=True):
        word.set_color(INK if task in names else FAINT)
    fig.suptitle("What each attention learns: accuracy, %", x=0.01, ha="left", weight="bold", fontsize=14)
    _caption(fig, results.sweep("capability"))
    return save(fig, "capability")


def _aside(task: str) -> str:
    return "local: the control" if task in LOCAL else "not counted"


def _cell(table: pd.DataFrame, low: pd.DataFrame, high: pd.DataFrame, name: str, task: str) -> str:
    """The mean in percent, with the range over seeds where it is wider than ten points."""
    if pd.isna(table.loc[name, task]):
        return ""
    text, wide = percent(table.loc[name, task]), high.loc[name, task] - low.loc[name, task] > 0.1
    return f"{text} ({percent(low.loc[name, task])} to {percent(high.loc[name, task])})" if wide else text


def _caption(fig: Figure, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    seeds = rows.groupby("name")["seed"].nunique()
    three = f"{(seeds >= 3).sum()} attentions with three seeds, {(seeds < 3).sum()} with fewer"
    text = (
        f"{', '.join(rows['device_name'].unique())}; {first['height']} x {first['width']} tokens, {first['depth']} "
        f"blocks, dim {first['dim']}, {first['num_heads']} heads, {first['optimiser']}, learning rate "
        f"{first['learning_rate']:g}.\nDefault options. {three}. In brackets: range over seeds, if over 10 points. "
        "Best on average first."
    )
    fig.supxlabel(text, x=0.01, ha="left", fontsize=9, color=FAINT)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the capability sweep."""
    result = [] if results.sweep("capability").empty else list(_sentences(results))
    say(*result)
    return result


def _sentences(results: Results) -> Iterator[str]:
    table, tasks = ranked(results), judged(results)
    names, chance = counted(results), {task.name: task.chance for task in tasks}
    apart = [task.name for task in tasks if task.name in names and task.apart > APART]
    words = "task that counts separates" if len(apart) == 1 else "tasks that count separate"
    yield f"{len(apart)} {words} attentions by more than 20 points: {', '.join(apart) or 'none'}."
    aside = [f"{task.name} ({task.why_not})" for task in tasks if task.why_not]
    if aside:
        yield f"Not counted: {'; '.join(aside)}."
    if names:
        whole = table[names].dropna()
        solved = list(whole.index[(whole >= SOLVED).all(axis=1)])
        yield f"All of {', '.join(names)} are solved by {', '.join(solved) or 'none'}, of {len(whole)} attentions."
    for task in names:
        lost = list(table.index[table[task] <= chance[task] + 0.05])
        best = [
            f"{name} {percent(value)} %"
            for name, value in table[task].drop("full", errors="ignore").nlargest(3).items()
        ]
        yield f"{task}: after full the best are {', '.join(best)}; at chance: {', '.join(lost) or 'none'}."
    if {"bra", "window"} <= set(table.index) and names:
        gain = {task: 100 * (table.loc["bra", task] - table.loc["window", task]) for task in names}
        words = ", ".join(f"{task} {value:+.0f}" for task, value in gain.items())
        yield f"BRA (topk 4 of 49 regions) against windows of 7 x 7, in points: {words}."
    result = settings(results)
    three = result[(result["seeds"] >= 3) & result["task"].isin(names)]
    if len(three):
        spread = three["high"] - three["low"]
        worst = three.loc[spread.idxmax()]
        yield (
            f"Range over three seeds: median {percent(spread.median())} points, largest {percent(spread.max())} "
            f"({worst['name']}, {worst['task']})."
        )
    lost_rows = results.sweep("capability").query("status != 'ok'")
    if len(lost_rows):
        yield f"{len(lost_rows)} trainings have no accuracy: {', '.join(sorted(lost_rows['status'].unique()))}."
    if CONTROL in table.index and names:
        reached = [f"{percent(table.loc[CONTROL, task])} % ({task})" for task in names]
        yield f"The convolution {CONTROL} reaches {', '.join(reached)}."
