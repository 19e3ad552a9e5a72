"""Capability sweeps on the command line of run_all.py: chosen by name, listed, dry-run and run."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.analysis import run_summary
from ablations.capability.launcher import CapabilityLauncher
from ablations.capability.sweep import CapabilitySweep, discover
from ablations.cli.progress import progress
from ablations.harness import sweep as harness
from ablations.harness.sweep import Sweep
from attention_zoo import InvalidOption

ONLY_WHEN_NAMED = "runs only when named: --only"
Sweeps = dict[str, CapabilitySweep]


def select(chosen: str | None) -> tuple[dict[str, Sweep], Sweeps]:
    """The cost sweeps and the capability sweeps of a comma-separated list; without one all cost sweeps and no other.

    Raises:
        InvalidOption: a name is unknown, or both kinds are named.
    """
    trained = discover()
    names = [name.strip() for name in (chosen or "").split(",") if name.strip()]
    known = {name: trained[name] for name in names if name in trained}
    rest = [name for name in names if name not in trained]
    if not known:
        try:
            return harness.select(chosen), {}
        except InvalidOption as problem:
            raise InvalidOption(f"{problem}, {', '.join(trained)}") from None
    if rest:
        raise InvalidOption(f"{', '.join(known)}: name no others with them; they train, and run beside each other")
    return {}, known


def adjusted(sweeps: Sweeps, full: bool, seeds: int | None, timeout: float | None) -> Sweeps:
    """The sweeps as the flags change them: ``--full``, ``--replicates``, ``--timeout``."""
    deep = {name: sweep.in_full() if full else sweep for name, sweep in sweeps.items()}
    return {
        name: replace(sweep, seeds=seeds or sweep.seeds, timeout=timeout or sweep.timeout)
        for name, sweep in deep.items()
    }


def dry_run(launcher: CapabilityLauncher, sweeps: Sweeps, as_json: bool) -> int:
    """Show every training with its parameters and the predicted memory of a step."""
    planned = {name: list(launcher.plan(sweep)) for name, sweep in sweeps.items()}
    if as_json:
        cells = [{"sweep": name, "cell": str(trial)} | row for name, rows in planned.items() for trial, row in rows]
        print(json.dumps({"device_name": launcher.facts["device_name"], "cells": cells}, indent=2))
        return 0
    console = Console()
    for name, rows in planned.items():
        table = Table("training", "parameters", "predicted MiB", title=name, title_justify="left", box=box.SIMPLE_HEAD)
        for trial, row in rows:
            size = row.get("memory_predicted_bytes")
            table.add_row(
                escape(str(trial)), escape(str(row.get("params") or row.get("reason"))),
                "" if size is None else f"{size / 2**20:.1f}",
            )  # fmt: skip
        console.print(table)
    print(f"{sum(map(len, planned.values()))} trainings on {launcher.facts['device_name']}")
    return 0


def run(launcher: CapabilityLauncher, sweeps: Mapping[str, CapabilitySweep]) -> int:
    """Run the trainings, with loss and accuracy of each as it ends; then the summary."""
    start = time.perf_counter()
    with progress() as tell:
        for news, done, total in launcher.run(dict(sweeps)):
            tell(done, total, news, f"[{done}/{total}] ")
    run_summary.show_trained(launcher.report, time.perf_counter() - start)
    return 0
