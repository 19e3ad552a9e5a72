"""One page that answers for a resolution and a budget: ``python -m notebooks.explorer [results ...]``.

It holds the rows of every device, the predictions of ``python -m ablations lattice`` where they exist, and Vega-Lite;
it opens offline. It needs the ``explorer`` extra: vl-convert-python, and what the report needs.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from notebooks.explorer.colours import marks
from notebooks.explorer.configurations import Configurations, usual_options
from notebooks.explorer.predictions import NAME as PREDICTIONS
from notebooks.explorer.predictions import load as load_predictions
from profiling.schema.capability import load as load_trained
from profiling.schema.capability import summary
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import SchemaError, holds_costs
from profiling.schema.row import load as load_rows

NAME = "explorer.html"
HERE = Path(__file__).parent
SCRIPTS = ("state.js", "forms.js", "data.js", "ranking.js", "table.js", "specs.js", "views.js", "charts.js", "main.js")
CAPABILITY = "capability.csv"
VEGA_LITE = "6.4"
USAGE = """usage: python -m notebooks.explorer [results ...]

Write explorer.html into the first of these folders (default: results), from the rows of every device in them."""
NUMBERS = {
    "memory_predicted_bytes": "predicted", "memory_peak_bytes": "peak", "macs_counted": "macs",
    "macs_backward_counted": "backward", "latency_p50_ms": "ms", "latency_low_ms": "low", "latency_high_ms": "high",
    "device_time_p50_ms": "deviceMs",
}  # fmt: skip
"""Columns of numbers that the page uses, and their names in it."""
WORDS = ("sweep", "mode", "dtype", "status", "reason", "freed_memory")
SIZES = ("batch", "height", "width", "dim", "num_heads")


def main(arguments: Sequence[str]) -> int:
    """Write the page of the folders given; returns the exit status: 0, or 2 with one line if it cannot be."""
    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if any(argument.startswith("-") for argument in arguments):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print(write([Path(argument) for argument in arguments] or [Path("results")]))
    except ModuleNotFoundError as problem:
        print(f"error: {problem}; it needs pip install '.[explorer]'", file=sys.stderr)
        return 2
    except (FileNotFoundError, SchemaError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def write(roots: Sequence[Path]) -> Path:
    """Write explorer.html into the first folder of results; returns its path.

    Args:
        roots: folders of results, each with a folder per device; several show several runs beside each other.

    Raises:
        FileNotFoundError: no folder holds rows.
        ModuleNotFoundError: vl-convert-python is not installed.
    """
    import vl_convert

    shown = data(roots)
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    content = json.dumps(shown, separators=(",", ":"), ensure_ascii=False)
    scripts = [HERE / name for name in SCRIPTS]
    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = jinja.get_template("explorer.html.jinja").render(
        reports=[
            (device["folder"], device["name"])
            for device in shown["devices"]
            if (roots[0] / device["folder"] / "report.html").exists()
        ],
        left_out=shown["leftOut"],
        predictions=shown["predictions"] is not None,
        accuracy=_accuracy(shown["predictions"]),
        cpu=(shown["predictions"] or {}).get("cpu"),
        # No text in the data may end its element.
        data=Markup(content.replace("<", "\\u003c")),
        style=Markup((HERE / "explorer.css").read_text(encoding="utf-8")),
        library=Markup(library.replace("</script", "<\\/script")),
        script=Markup("\n".join(path.read_text(encoding="utf-8") for path in scripts)),
    )
    path = roots[0] / NAME
    path.write_text(html, encoding="utf-8")
    return path


def data(roots: Sequence[Path]) -> dict[str, Any]:
    """All that the page shows, as JSON: devices, configurations, rows by column, predictions, colours and marks."""
    devices: list[dict[str, Any]] = []
    tables, capability, left_out = [], [], []
    for folder in _folders(roots):
        files = sorted(path for path in folder.glob("*.csv") if holds_costs(path))
        try:
            rows = aggregate_replicates(load_rows(*files)) if files else load_rows()
        except SchemaError as problem:
            left_out.append(f"{folder.name}: {problem}")
            continue
        rows = rows[rows["kind"] == "attention"]
        if rows.empty:
            continue
        capability += [{"device": len(devices), **row} for row in _capability(folder / CAPABILITY)]
        devices.append({"folder": folder.name, "name": " and ".join(rows["device_name"].unique()),
                        "kind": str(rows["device"].mode().iloc[0]), "days": _days(rows)})  # fmt: skip
        tables.append(rows.assign(device_number=len(devices) - 1))
    if not devices:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise FileNotFoundError(f"{roots[0]} holds no results of any device{why}; `python run_all.py` makes them")
    _name_runs(devices)
    rows = pd.concat(tables, ignore_index=True)
    predictions = None
    for path in [path for root in roots if (path := root / PREDICTIONS).exists()][:1]:
        try:
            predictions = load_predictions(path)
        except ValueError as problem:
            left_out.append(f"{PREDICTIONS}: {problem}; `python -m ablations lattice --fresh` makes it anew")
    known = Configurations(usual_options(rows))
    for number, candidate in enumerate(predictions["candidates"] if predictions else ()):
        known.of_prediction(number, candidate)
    places = [known.of_row(row) for row in rows.to_dict("records")]
    return {
        "devices": devices,
        "leftOut": left_out,
        "configurations": [
            {
                "name": one.key.name, "options": one.options, "label": one.label, "usual": one.usual,
                "padded": one.padded, "impl": one.key.impl, "compiled": one.key.compiled,
                "cudaGraph": one.key.cuda_graph, "deterministic": one.key.deterministic, "prediction": one.prediction,
                "topk": dict(one.key.options).get("topk"), "regions": dict(one.key.options).get("n_win"),
                "reduction": dict(one.key.options).get("kv_downsample_mode"),
            }
            for one in known.members.values()
        ],
        "rows": _columns(rows.assign(configuration=places)),
        "predictions": predictions,
        "capability": capability,
        "marks": marks(sorted({one.key.name for one in known.members.values()})),
    }  # fmt: skip


def _accuracy(predictions: dict[str, Any] | None) -> str:
    """How exact predictions between shapes of the lattice are, for the key of the table."""
    if not predictions or not predictions.get("error"):
        return ""
    return f", within {100 * max(predictions['error'].values()):.2g} % of the exact prediction"


def _folders(roots: Sequence[Path]) -> Iterator[Path]:
    """The folders of devices; a root that holds CSVs of rows itself counts as one."""
    for root in roots:
        inside = sorted({path.parent for path in root.glob("*/*.csv")})
        yield from inside or ([root] if list(root.glob("*.csv")) else [])


def _columns(rows: pd.DataFrame) -> dict[str, Any]:
    """Rows by column; text as places in a list of its values, numbers to five digits."""
    result: dict[str, Any] = {"device": rows["device_number"].tolist(), "configuration": rows["configuration"].tolist()}
    for name in WORDS:
        codes, values = pd.factorize(rows[name])
        result[name] = {"values": [str(value) for value in values], "codes": codes.tolist()}
    for name in SIZES:
        result[name] = rows[name].astype(object).where(rows[name].notna(), None).tolist()
    for column, name in NUMBERS.items():
        result[name] = [None if pd.isna(value) else _short(value) for value in rows[column].tolist()]
    kernel = rows["kv_downsample_ratio"], rows["kv_per_win"]
    result["ratio"], result["perWindow"] = (
        [None if pd.isna(value) else int(value) for value in part] for part in kernel
    )
    return result


def _short(value: float) -> float | int:
    """Bytes and MACs are exact; times have five digits."""
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def _days(rows: pd.DataFrame) -> str:
    days = rows["started_at"].dropna().astype(str).str[:10]
    return " to ".join(sorted({days.min(), days.max()})) if len(days) else "date not recorded"


def _name_runs(devices: list[dict[str, Any]]) -> None:
    """Runs of one device are told apart by their days, and by their number where these are equal."""
    names = [device["name"] for device in devices]
    for device in devices:
        if names.count(device["name"]) > 1:
            device["name"] += f" ({device['folder']}, {device['days']})"
    seen: dict[str, int] = {}
    for device in devices:
        seen[device["name"]] = seen.get(device["name"], 0) + 1
        if seen[device["name"]] > 1:
            device["name"] += f" {seen[device['name']]}"


def _capability(path: Path) -> list[dict[str, Any]]:
    """Accuracy by attention, as it comes, and task, where it was measured: the mean over seeds."""
    if not path.exists():
        return []
    trained = load_trained(path)
    means = summary(trained[trained["options"].isna() & (trained["difficulty"] == "medium")]).dropna(subset="accuracy")
    return [
        {"attention": row["name"], "task": row["task"], "accuracy": round(float(row["accuracy"]), 5)}
        for row in means.to_dict("records")
    ]
