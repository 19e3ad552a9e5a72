"""BiFormer-STL with each attention in place of BRA."""

from collections.abc import Iterator

import pandas as pd

from notebooks.lib.export import latency, publish, scaled
from notebooks.lib.plots import MIB, Results, needs, series

SWIN_T = 28_288_354
"""Parameters of Swin-T as its authors released it; the paper rounds them to 28.29 M."""


@needs("stl")
def table(results: Results) -> None:
    """Table: the Swin-T layout with each attention in all of its stages."""
    rows = results.sweep("stl")
    rows = rows.assign(name=rows["attention"].fillna("as published"))
    lines = [{"attention": label} | dict(_columns(part)) for _, label, _, part in series(rows)]
    note = (
        f"Image sizes in pixels per side, batch {rows['batch'].iloc[0]}, {rows['dtype'].iloc[0]}; "
        f"{rows['device_name'].iloc[0]}. MACs: of the forward pass. Memory: predicted peak of a forward step / of a "
        "forward and backward step. Latency: median of the forward pass, and its 95 % interval in brackets; predicted: "
        "not measured, as too long for this device; oom: would not fit it. Options of an attention are those that its "
        "publication gives for the stage, or the defaults." + _swin(rows)
    )
    publish(pd.DataFrame(lines).fillna(""), "stl", note)


def _swin(rows: pd.DataFrame) -> str:
    swin = rows.loc[rows["name"] == "shifted_window", "params"]
    if swin.empty:
        return ""
    return (
        f" With shifted_window it has {swin.iloc[0]:,} parameters, Swin-T has {SWIN_T:,}: {SWIN_T - swin.iloc[0]:,} "
        "more, which are 4 C for each patch merging of C = 96, 192 and 384 channels. There Swin normalises 4 C "
        "channels (8 C parameters) before a linear map without bias; here C channels are normalised (2 C) before a "
        "convolution with bias (2 C)."
    )


def _columns(part: pd.DataFrame) -> Iterator[tuple[str, str]]:
    forward, both = (part[part["mode"] == mode] for mode in ("forward", "forward_backward"))
    yield "params (M)", scaled(part["params"].iloc[0], 1e6, 1)
    sides = sorted(part["height"].unique())
    for side in sides:
        yield f"MACs at {side} (G)", scaled(part.loc[part["height"] == side, "macs_counted"].iloc[0], 1e9, 1)
    for side in sides:
        needed = [rows.loc[rows["height"] == side, "memory_predicted_bytes"].max() for rows in (forward, both)]
        yield f"memory at {side} (MiB)", " / ".join(scaled(count, MIB, 0) or "-" for count in needed)
    for side in sides:
        yield f"latency at {side} (ms)", latency(forward[forward["height"] == side])
