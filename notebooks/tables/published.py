"""BiFormer as published and as counted here, and other models as published."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from notebooks.lib.export import publish, scaled
from notebooks.lib.plots import ROOT, Results, needs

MODELS = {
    "biformer_tiny": "BiFormer-T",
    "biformer_small": "BiFormer-S",
    "biformer_base": "BiFormer-B",
    "biformer_stl": "BiFormer-STL",
}


def published() -> pd.DataFrame:
    """The figures that the models' authors published, as texts with the digits they gave."""
    return pd.read_csv(ROOT / "results" / "published_models.csv", dtype=str, keep_default_na=False)


def recounted(results: Results) -> pd.DataFrame:
    """Parameters and MACs of the published models at 224 x 224, as counted here."""
    rows = results.sweep("models")
    rows = rows[(rows["height"] == 224) & (rows["width"] == 224) & (rows["batch"] == 1) & rows["attention"].isna()]
    rows = rows[rows["name"].isin(list(MODELS))].drop_duplicates("name")
    return rows.set_index(rows["name"].map(MODELS))[["params", "macs_fvcore", "macs_counted"]]


@needs("models")
def models(results: Results) -> None:
    """Table: BiFormer's published figures, the counts here, and the difference."""
    counted, table = recounted(results), []
    for line in published().to_dict("records"):
        if line["model"] in counted.index:
            ours = counted.loc[line["model"]]
            table.append({
                "model": line["model"],
                "params, published (M)": line["published_params_m"],
                "params, recounted (M)": scaled(ours["params"], 1e6),
                "difference, params": difference(line["published_params_m"], ours["params"], 1e6),
                "MACs, published (G)": line["published_macs_g"],
                "MACs, fvcore's convention (G)": scaled(ours["macs_fvcore"], 1e9),
                "difference, MACs": difference(line["published_macs_g"], ours["macs_fvcore"], 1e9),
                "MACs of conv, linear and matmul (G)": scaled(ours["macs_counted"], 1e9),
                "top-1, published (%)": line["published_top1"],
            })  # fmt: skip
    note = (
        "At 224 x 224, batch 1. What the authors call FLOPs are MACs by fvcore's convention, which counts "
        "normalisations too. A difference in brackets is within the rounding of the published figure."
    )
    publish(pd.DataFrame(table), "published_models", note)


def others() -> None:
    """Table: published figures of other models. Nothing in it was measured here."""
    rest = published().query("model not in @names", local_dict={"names": list(MODELS.values())}).copy()
    rest.columns = pd.Index(["model", "params, published (M)", "MACs, published (G)", "top-1, published (%)", "source"])
    note = "All figures as published by the source, at 224 x 224; empty where the source gives none."
    publish(rest, "other_models", note)


def rounds_to(text: str, count: float, unit: float) -> bool:
    """Whether ``count`` in ``unit`` rounds to the published ``text``."""
    digits = len(text.partition(".")[2])
    return f"{count / unit:.{digits}f}" == f"{float(text):.{digits}f}"


def difference(text: str, count: Any, unit: float) -> str:
    """Recounted minus published, in percent of the published; in brackets if within rounding."""
    if not text or pd.isna(count):
        return ""
    percent = f"{float(count) / unit / float(text) - 1:+.2%}"
    return f"({percent})" if rounds_to(text, float(count), unit) else percent


def sentences(results: Results) -> Iterator[str]:
    """How well the counts reproduce the published figures."""
    counted = recounted(results)
    lines = [line for line in published().to_dict("records") if line["model"] in counted.index]
    columns = (
        ("published_params_m", "params", 1e6, "parameter counts"),
        ("published_macs_g", "macs_fvcore", 1e9, "MACs (fvcore's convention)"),
    )
    for args, column, unit, words in columns:
        pairs = [(str(line[args]), counted.loc[line["model"], column]) for line in lines]
        known = [(text, float(count)) for text, count in pairs if text and not pd.isna(count)]
        if known:
            same = sum(rounds_to(text, count, unit) for text, count in known)
            worst = max(abs(count / unit / float(text) - 1) for text, count in known)
            yield (
                f"{same} of {len(known)} recounted {words} of BiFormer round to the published figure; "
                f"the largest difference is {worst:.2%}."
            )
