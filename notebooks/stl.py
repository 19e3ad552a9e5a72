"""BiFormer-STL with each attention in place of BRA."""

import pandas as pd

from notebooks.export import latency, publish, scaled
from notebooks.plots import MIB, Results, needs, series


@needs("stl")
def table(results: Results) -> None:
    """Table: the Swin-T layout with each attention in all of its stages."""
    rows = results.sweep("stl")
    rows = rows.assign(name=rows["attention"].fillna("as published"))
    smallest = rows["height"].min()
    lines = []
    for _, label, _, part in series(rows):
        line = {"attention": label, "params (M)": scaled(part["params"].iloc[0], 1e6, 1)}
        for side, cells in part.groupby("height"):
            line[f"MACs at {side} (G)"] = scaled(cells["macs_counted"].iloc[0], 1e9, 1)
        for side, cells in part[part["mode"] == "forward_backward"].groupby("height"):
            line[f"training memory at {side} (MiB)"] = scaled(cells["memory_predicted_bytes"].max(), MIB, 0)
        line[f"latency at {smallest} (ms)"] = latency(part[(part["mode"] == "forward") & (part["height"] == smallest)])
        lines.append(line)
    note = (
        f"Image sizes in pixels per side, batch {rows['batch'].iloc[0]}, {rows['dtype'].iloc[0]}; "
        f"{rows['device_name'].iloc[0]}. Memory: predicted peak of forward and backward. Latency: median of the "
        "forward pass, and its 95 % interval in brackets."
    )
    publish(pd.DataFrame(lines).fillna(""), "stl", note)
