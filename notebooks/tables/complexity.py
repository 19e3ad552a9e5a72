"""Every attention at one shape: table and findings."""

from collections.abc import Iterator

import pandas as pd

from notebooks.lib.export import latency, publish, scaled
from notebooks.lib.plots import MIB, Results, needs, say, series
from notebooks.tables import published

PARTS = ("projection", "routing", "attention", "local_conv")
SHAPE = 56
"""Tokens per side at which attentions are compared; the nearest grid if this one was not measured."""


def shape(results: Results) -> int:
    """The grid at which attentions are compared: SHAPE, or the nearest that was measured."""
    rows = results.sweep("resolution")
    measured = rows.loc[(rows["status"] == "ok") & (rows["height"] == rows["width"]), "height"].astype(int)
    sides = measured if len(measured) else rows["height"].astype(int)
    return int(min(sides, key=lambda side: abs(side - SHAPE)))


def at_shape(results: Results) -> pd.DataFrame:
    """The resolution sweep's rows at that grid."""
    rows = results.sweep("resolution")
    return rows[(rows["height"] == shape(results)) & (rows["width"] == shape(results))]


@needs("resolution")
def attentions(results: Results) -> None:
    """Table: every attention at one shape."""
    rows = at_shape(results)
    table = [{"attention": label} | dict(_columns(part)) for _, label, _, part in series(rows)]
    first = rows.iloc[0]
    note = (
        f"At {first['height']} x {first['width']} tokens, batch {first['batch']}, dim {first['dim']}, "
        f"{first['num_heads']} heads, {first['dtype']}; {first['device_name']}. MACs of the forward pass. Memory: "
        "predicted / measured peak of one step. Latency: median, and the 95 % interval of the median in brackets."
    )
    publish(pd.DataFrame(table).fillna(""), "attentions", note)


def _columns(part: pd.DataFrame) -> Iterator[tuple[str, str]]:
    first = part.iloc[0]
    for name in PARTS:
        yield f"{name.replace('_', ' ')} (M MACs)", scaled(first[f"macs_{name}"], 1e6, 2)
    yield "all (M MACs)", scaled(first["macs_counted"], 1e6, 2)
    yield "keys per query", "" if pd.isna(first["kv_tokens_per_query"]) else f"{first['kv_tokens_per_query']:,.0f}"
    for mode, short in (("forward", "fwd"), ("forward_backward", "fwd+bwd")):
        of_mode = part[part["mode"] == mode]
        if len(of_mode):
            yield f"memory {short} (MiB)", _memory(of_mode)
            yield f"latency {short} (ms)", latency(of_mode)


def _memory(rows: pd.DataFrame) -> str:
    values = (rows["memory_predicted_bytes"].max(), rows["memory_peak_bytes"].max())
    return " / ".join("-" if pd.isna(value) else f"{value / MIB:,.1f}" for value in values)


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the models and resolution sweeps."""
    result = [*published.sentences(results), *_shape_sentences(results)]
    say(*result)
    return result


def _shape_sentences(results: Results) -> Iterator[str]:
    if results.sweep("resolution").empty:
        return
    rows, side = at_shape(results), shape(results)
    timed = rows[(rows["mode"] == "forward") & (rows["status"] == "ok")].dropna(subset=["macs_counted"])
    firsts = {label: part.iloc[0] for _, label, _, part in series(timed)}
    macs = pd.Series({label: float(row["macs_counted"]) for label, row in firsts.items()}).sort_values()
    time = pd.Series({label: float(row["latency_p50_ms"]) for label, row in firsts.items()})
    if len(macs) > 1:
        yield from _macs_and_time(macs, time, side)
    if "bra" in firsts:
        bra = firsts["bra"]
        shares = {name: bra[f"macs_{name}"] / bra["macs_counted"] for name in PARTS if pd.notna(bra[f"macs_{name}"])}
        listed = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares.items())
        yield f"The MACs of bra at {side} x {side}: {listed}."


def _macs_and_time(macs: pd.Series, time: pd.Series, side: int) -> Iterator[str]:
    least, most = macs.index[0], macs.index[-1]
    yield (
        f"At {side} x {side} the forward pass of {most} has {macs[most] / macs[least]:.1f}x the MACs of {least} and "
        f"takes {time[most] / time[least]:.1f}x its time."
    )
    rate = time / macs
    yield (
        f"Time per MAC differs by {rate.max() / rate.min():.1f}x: most with {rate.idxmax()}, least with "
        f"{rate.idxmin()}. Over {len(macs)} attentions, the rank correlation of MACs and time is "
        f"{macs.rank().corr(time.rank()):.2f}."
    )
