"""Summary at the end of a run: cells by status, files written, main findings, and two HTML pages."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from ablations.harness.local_runner import Report
from profiling.schema.capability import load as load_trained
from profiling.schema.capability import summary
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import holds_costs, load

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


def show(report: Report, seconds: float) -> None:
    """Print the summary of a run to stdout."""
    _show(report, seconds, findings(aggregate_replicates(load(*report.files))))
    _write_pages(report.folders)


def show_trained(report: Report, seconds: float) -> None:
    """As :func:`show`, of a run of capability sweeps."""
    _show(report, seconds, capability_findings(load_trained(*report.files)))
    _write_pages([folder for folder in report.folders if any(map(holds_costs, folder.glob("*.csv")))])


def _show(report: Report, seconds: float, result: list[str]) -> None:
    ran = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items())) or "nothing new"
    skipped = f"; {report.skipped} were there already" if report.skipped else ""
    print(f"\nCells: {ran}{skipped}. {seconds:.0f} s.")
    if report.left:
        print(f"Time limit reached; {report.left} cells not started. The same command without --fresh resumes.")
    print("Files:")
    for path in report.files:
        print(f"  {path}")
    if result:
        print("Findings:")
        for finding in result:
            print(f"  - {finding}")


def _write_pages(folders: list[Path]) -> None:
    # Each links to the other where that is there.
    new = [folder for folder in folders if not (folder / "report.html").exists()]
    for root in {folder.parent for folder in folders}:
        write_explorer(root)
    for folder in folders:
        write_page(folder)
    for root in {folder.parent for folder in new}:
        _write("", "notebooks.explorer", root, "explorer.html", "explorer")


def write_page(folder: Path) -> None:
    """Write report.html into the folder of a device; print its path, or on stderr why there is none."""
    _write("Report", "notebooks.report", folder, "report.html", "notebooks")


def write_explorer(root: Path) -> None:
    """Write explorer.html into the folder of all devices; print its path, or on stderr why there is none."""
    _write("Explorer", "notebooks.explorer", root, "explorer.html", "explorer")


def _write(label: str, module: str, folder: Path, name: str, extra: str) -> None:
    """Write a page in a process of its own: it is drawn by the notebooks' code, which nothing here imports.

    Without a ``label`` nothing is printed.
    """
    command = [sys.executable, "-m", module, str(folder.resolve())]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"}, capture_output=True, text=True)
    if not label:
        return
    if done.returncode == 0:
        print(f"{label}: {folder / name}")
    else:
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        cure = f"; it needs pip install '.[{extra}]'" if why.startswith("ModuleNotFoundError") else ""
        print(f"No {name}: {why.removeprefix('error: ')}{cure}", file=sys.stderr)


def findings(rows: pd.DataFrame) -> list[str]:
    """Return up to four sentences, each computed from the rows; fewer if the rows do not suffice."""
    return [sentence for find in (_disagreement, _memory_limit, _topk, _models) if (sentence := find(rows))]


def _disagreement(rows: pd.DataFrame) -> str | None:
    wrong = rows[rows["macs_agree"].eq(False).fillna(False)]
    if wrong.empty:
        return None
    names = ", ".join(wrong["name"].unique())
    return f"The counts of MACs disagree in {len(wrong)} cells (macs_agree is false): {names}."


def _memory_limit(rows: pd.DataFrame) -> str | None:
    cells = rows[(rows["sweep"] == "resolution") & (rows["mode"] == "forward_backward")]
    grids = sorted(cells["height"].unique())
    pairs = cells.pivot_table(index="height", columns="name", values="memory_predicted_bytes", aggfunc="first")
    if not {"full", "bra", "window"} <= set(pairs.columns) or not grids:
        return None
    top = pairs.loc[grids[-1]] / 2**30
    return (
        f"At {grids[-1]} x {grids[-1]} tokens a training step needs {top['window']:,.1f} GiB with window attention, "
        f"{top['bra']:,.0f} GiB with BRA as published and {top['full']:,.0f} GiB with full attention (predicted)."
    )


def _topk(rows: pd.DataFrame) -> str | None:
    cells = _measured(rows, "topk")
    cells = cells[(cells["n_win"] == "7") & cells["other_options"].isna()]
    if cells["topk"].nunique() < 2:
        return None
    by_topk = cells.groupby("topk")[["latency_p50_ms", "macs_counted"]].median()
    low, high = by_topk.index.min(), by_topk.index.max()
    time, macs = (by_topk.loc[high, column] / by_topk.loc[low, column] for column in by_topk.columns)
    return f"BRA with topk {high} instead of {low} (n_win 7) takes {time:.1f}x the time for {macs:.1f}x the MACs."


def _measured(rows: pd.DataFrame, sweep: str) -> pd.DataFrame:
    return rows[(rows["sweep"] == sweep) & (rows["mode"] == "forward") & (rows["status"] == "ok")]


def _models(rows: pd.DataFrame) -> str | None:
    cells = _measured(rows, "models")
    cells = cells[cells["height"] == 224]
    if cells.empty:
        return None
    parts = [
        f"{name.replace('biformer_', '')} {row['macs_counted'] / 1e9:.2f} G MACs in {row['latency_p50_ms']:.0f} ms"
        for name, row in cells.groupby("name").first().iterrows()
    ]
    return f"BiFormer at 224 x 224, batch 1: {', '.join(parts)}."


def capability_findings(rows: pd.DataFrame) -> list[str]:
    """Return a sentence for each task, with the attentions that solve it and those at chance."""
    result = []
    for task, part in summary(rows[rows["options"].isna() & (rows["difficulty"] == "medium")]).groupby("task"):
        chance = part["chance"].iloc[0]
        solved = ", ".join(part.loc[part["accuracy"] >= 0.95, "name"]) or "none"
        lost = ", ".join(part.loc[part["accuracy"] <= chance + 0.05, "name"]) or "none"
        result.append(f"{task}: solved by {solved}; at chance ({chance:.0%}): {lost}.")
    return result
