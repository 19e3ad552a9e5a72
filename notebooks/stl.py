"""BiFormer-STL with each attention in place of BRA."""

from collections.abc import Iterator

import pandas as pd

from notebooks.export import latency, publish, scaled
from notebooks.plots import MIB, Results, needs, series


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
        "publication gives for the stage, or the defaults."
    )
    publish(pd.DataFrame(lines).fillna(""), "stl", note)


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
