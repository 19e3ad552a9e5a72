"""The grid from which BRA is faster than full attention."""

import numpy as np
import pandas as pd

from notebooks.lib.export import publish
from notebooks.lib.limits import MODES
from notebooks.lib.plots import Results, needs
from notebooks.tables.speed import OTHERS, TIME, contestant


def break_even(ours: pd.Series, full: pd.Series) -> tuple[float | None, str]:
    """The tokens per side from which ``ours`` is faster than ``full`` (both indexed by these), and a description.

    Interpolated linearly in log-log between the last measured grid where it is not faster and the next; None if no
    two measured grids enclose it. Nothing is extrapolated.
    """
    both = pd.DataFrame({"ours": ours, "full": full}).dropna().sort_index()
    if both.empty:
        return None, "not measured at one grid"
    lead = np.log((both["full"] / both["ours"]).astype(float))
    slower = lead.index[lead <= 0]
    if slower.empty:
        return None, f"faster at every measured grid, from {lead.index[0]}"
    last = slower[-1]
    if last == lead.index[-1]:
        return None, f"not faster up to {last}, the largest grid measured with both"
    after = lead.index[lead.index > last][0]
    share = -lead[last] / (lead[after] - lead[last])
    side = float(np.exp(np.log(last) + share * (np.log(after) - np.log(last))))
    return side, f"near {side:.0f} (not faster at {last}, faster at {after})"


@needs("bra_speed")
def table(results: Results) -> None:
    """Table: the grid from which each contestant with topk 4 and n_win 7 is faster than full attention by SDPA."""
    lines = []
    for (mode, dtype), rows in _comparable(results).groupby(["mode", "dtype"]):
        side = rows.assign(contestant=rows.apply(contestant, axis=1)).groupby(["contestant", "height"])[TIME].median()
        curves = {str(variant): part.droplevel(0) for variant, part in side.groupby(level=0)}
        for variant, curve in curves.items():
            if variant.split(", ")[0] in OTHERS.values():
                continue
            against = ", ".join(["full", *variant.split(", ")[1:]])
            full = curves.get(against, curves.get("full", pd.Series(dtype=float)))
            lines.append(
                {"contestant": variant, "mode": MODES[mode], "dtype": dtype, "faster": break_even(curve, full)[1]}
            )
    note = (
        "64 channels, 2 heads, batch 1, topk 4, n_win 7; full attention by SDPA, launched in the same way if that was "
        "measured. Grids in tokens per side, from the bra_speed and resolution sweeps; interpolated in log-log."
    )
    publish(pd.DataFrame(lines, columns=["contestant", "mode", "dtype", "faster"]), "bra_break_even", note)


def _comparable(results: Results) -> pd.DataFrame:
    """Timed rows of both sweeps at one width: BRA with topk 4 and n_win 7, and full attention by SDPA."""
    rows = results.rows.query(
        "sweep in ('bra_speed', 'resolution') and dim == 64 and num_heads == 2 and batch == 1 and height == width"
    ).dropna(subset=[TIME])
    bra = (rows["name"] == "bra") & (rows["topk"] == 4) & (rows["n_win"] == "7")
    return rows[bra.fillna(False) | ((rows["name"] == "full") & (rows["impl_requested"] == "sdpa"))]
