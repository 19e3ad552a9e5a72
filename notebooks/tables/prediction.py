"""Accuracy of the predicted memory by implementation, over every cell of every sweep that measured it."""

import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.limits import MODES
from notebooks.lib.plots import Results, say


def errors(results: Results) -> pd.Series:
    """Predicted over measured peak, less 1, of every cell that has both, in the order of the rows."""
    rows = results.rows.dropna(subset=["memory_predicted_bytes", "memory_peak_bytes"])
    return (rows["memory_predicted_bytes"].astype(float) / rows["memory_peak_bytes"].astype(float) - 1).rename("error")


def table(results: Results) -> None:
    """Table: for each attention's implementation and mode, the number of cells and their prediction error."""
    off = errors(results)
    if off.empty:
        say("No cell has both a predicted and a measured peak memory.")
        return
    rows = results.rows.loc[off.index].assign(error=off, off=off.abs())
    rows["impl"] = rows["impl"].fillna(rows["impl_requested"])
    lines = []
    for (name, impl, mode), part in rows.groupby(["name", "impl", "mode"], sort=False):
        worst = part.loc[part["off"].idxmax()]
        lines.append({
            "attention": name, "implementation": impl, "mode": MODES[mode], "cells": len(part),
            "median error": f"{part['error'].median():+.3%}", "largest": f"{worst['error']:+.3%}",
            "where": "{height} x {width}, {dtype}, batch {batch}, {sweep}".format(**worst),
        })  # fmt: skip
    note = f"Predicted over measured peak memory of a step, less 1. {results.rows['device_name'].iloc[0]}."
    publish(pd.DataFrame(lines), "memory_prediction", note)


def findings(results: Results) -> list[str]:
    """The accuracy of the predictions, in one sentence."""
    off = errors(results).abs()
    result = []
    if len(off) and off.max() == 0:
        result.append(f"Predicted and measured peak memory are equal in all {len(off)} measured cells.")
    elif len(off):
        worst = results.rows.loc[off.idxmax()]
        impl = worst["impl_requested"] if pd.isna(worst["impl"]) else worst["impl"]
        result.append(
            f"Predicted and measured peak memory differ by at most {off.max():.3%} in {len(off)} measured cells "
            f"({worst['name']}, {impl}, {MODES[worst['mode']]} at {worst['height']} x {worst['width']}, "
            f"{worst['dtype']}); {(off > 0.03).sum()} cells by more than 3 %."
        )
    say(*result)
    return result
