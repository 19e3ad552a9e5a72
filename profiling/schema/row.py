"""The row: one case measured once. One fixed header for every sweep; the unit is in the column's name.

Everything above the CSV writes through this schema and everything below it reads through it. No torch here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandas.api.types import is_scalar
from pandera.typing import Series

STATUSES = ("ok", "predicted", "oom", "timeout", "crash", "incorrect", "unsupported", "error")


class SchemaError(ValueError):
    """A table is not of this schema; the message says where."""


def _text(description: str, **checks: Any) -> Any:
    return pa.Field(nullable=True, description=description, **checks)


def _count(description: str) -> Any:
    return pa.Field(nullable=True, ge=0, description=description)


def _number(description: str) -> Any:
    return pa.Field(nullable=True, ge=0, description=description)


class Row(pa.DataFrameModel):
    """One row per cell. A number is there only if it was obtained."""

    # key
    sweep: Series[str] = pa.Field(description="Which sweep the cell belongs to.")
    kind: Series[str] = pa.Field(
        isin=("attention", "block", "model"), description="What was built around the attention."
    )
    name: Series[str] = pa.Field(description="Registered name of the attention, or name of the model.")
    impl_requested: Series[str] = pa.Field(
        description="The implementation asked for; auto picks the fastest that can run."
    )
    compiled: Series[pd.BooleanDtype] = pa.Field(description="Whether the module ran under torch.compile.")
    cuda_graph: Series[pd.BooleanDtype] = pa.Field(
        description="Whether the timed steps were replays of one recorded CUDA graph."
    )
    deterministic: Series[pd.BooleanDtype] = pa.Field(description="Whether deterministic kernels were required.")
    mode: Series[str] = pa.Field(
        isin=("forward", "forward_backward"),
        description="forward: no gradients. forward_backward: of parameters and input, less a model's image.",
    )
    dtype: Series[str] = pa.Field(
        isin=("fp64", "fp32", "tf32", "bf16", "fp16"),
        description="bf16, fp16: autocast over fp32 parameters; tf32: fp32 with rounded matrix products.",
    )
    device: Series[str] = pa.Field(isin=("cpu", "cuda"), description="Kind of device.")
    batch: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Images per step.")
    height: Series[pd.Int64Dtype] = pa.Field(
        ge=1, description="Tokens (attention, block) or pixels (model) per column."
    )
    width: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Tokens (attention, block) or pixels (model) per row.")
    dim: Series[pd.Int64Dtype] = _count("Channels; empty for models, which have several.")
    num_heads: Series[pd.Int64Dtype] = _count("Heads; empty for models.")
    attention: Series[pd.StringDtype] = _text("Model: the attention in place of the published one, in every stage.")
    n_win: Series[pd.StringDtype] = _text("bra: regions per side, or auto.")
    topk: Series[pd.Int64Dtype] = _count("bra: routed regions per query region.")
    qk_dim: Series[pd.Int64Dtype] = _count("bra: channels of queries and keys.")
    kv_downsample_mode: Series[pd.StringDtype] = _text("bra: reduction of a region's keys and values.")
    kv_per_win: Series[pd.Int64Dtype] = _count("bra: tokens per side that ada_* modes leave of a region.")
    kv_downsample_ratio: Series[pd.Int64Dtype] = _count("bra: reduction per side of the other modes.")
    kv_downsample_kernel: Series[pd.Int64Dtype] = _count("bra: kernel of conv and fracpool.")
    soft_routing: Series[pd.BooleanDtype] = _text("bra: keys and values scaled by routing weights.")
    diff_routing: Series[pd.BooleanDtype] = _text("bra: gradients flow through routing scores.")
    auto_pad: Series[pd.BooleanDtype] = _text("bra: pads grids that n_win does not divide.")
    mask_padding: Series[pd.BooleanDtype] = _text("bra: padding is left out of the attention.")
    side_dwconv: Series[pd.Int64Dtype] = _count("bra, lepe: kernel of the LePE convolution.")
    window_size: Series[pd.Int64Dtype] = _count("window: tokens per side.")
    shift: Series[pd.Int64Dtype] = _count("window: displacement in tokens.")
    relative_position_bias: Series[pd.BooleanDtype] = _text("window: learned bias per relative position.")
    other_options: Series[pd.StringDtype] = _text("Options without a column of their own, as name=value name=value.")
    seed: Series[pd.Int64Dtype] = pa.Field(description="Seed of weights and input (standard normal).")
    replicate: Series[pd.Int64Dtype] = pa.Field(ge=0, description="Which of several processes measured the same case.")
    device_name: Series[str] = pa.Field(description="The device, as it names itself.")
    # outcome
    status: Series[str] = pa.Field(
        isin=STATUSES, description="ok: measured. predicted: by request not measured. Else how the cell failed."
    )
    reason: Series[pd.StringDtype] = _text("Why the status is not ok, in one line.")
    impl: Series[pd.StringDtype] = _text("The implementation that ran.")
    # cost
    params: Series[pd.Int64Dtype] = _count("Learnable parameters.")
    macs_analytic: Series[pd.Int64Dtype] = _count(
        "MACs of the forward pass by the module's formula; what papers call FLOPs."
    )
    macs_counted: Series[pd.Int64Dtype] = _count(
        "The same, counted operator by operator (FlopCounterMode on meta tensors)."
    )
    macs_fvcore: Series[pd.Int64Dtype] = _count(
        "The same by fvcore, which counts normalisations too; empty where it cannot trace, and on CUDA."
    )
    macs_agree: Series[pd.BooleanDtype] = _text(
        "Analytic and counted are equal, fvcore within 1 %; empty with fewer than two counts."
    )
    macs_backward_counted: Series[pd.Int64Dtype] = _count("MACs of the backward pass, counted.")
    macs_projection: Series[pd.Int64Dtype] = _count(
        "Part of macs_analytic: linear maps of queries, keys, values, output."
    )
    macs_routing: Series[pd.Int64Dtype] = _count("Part of macs_analytic: choosing what to attend to.")
    macs_attention: Series[pd.Int64Dtype] = _count("Part of macs_analytic: scores and weighted sums.")
    macs_local_conv: Series[pd.Int64Dtype] = _count("Part of macs_analytic: depthwise convolutions.")
    exponent_theory: Series[float] = _number("Power of HW with which attention and routing grow, by theory.")
    kv_tokens_per_query: Series[float] = _number("Key tokens that one query attends to, mean over queries.")
    regions_per_side: Series[pd.Int64Dtype] = _count("bra: S, resolved where n_win is auto.")
    # memory
    memory_predicted_bytes: Series[pd.Int64Dtype] = _count(
        "Most bytes that one step has asked for at once, base included, predicted without a run; see below."
    )
    memory_peak_bytes: Series[pd.Int64Dtype] = _count("The same, measured.")
    memory_base_bytes: Series[pd.Int64Dtype] = _count(
        "Bytes there before the step: parameters, buffers, input, output gradient."
    )
    memory_reserved_bytes: Series[pd.Int64Dtype] = _count("CUDA: most bytes the allocator held.")
    # time
    latency_p50_ms: Series[float] = _number("Median wall time of one step.")
    latency_p25_ms: Series[float] = _number("Lower quartile.")
    latency_p75_ms: Series[float] = _number("Upper quartile.")
    latency_p95_ms: Series[float] = _number("95th percentile.")
    latency_low_ms: Series[float] = _number("Lower end of the 95 % interval of the median.")
    latency_high_ms: Series[float] = _number("Upper end of the 95 % interval of the median.")
    latency_samples: Series[pd.Int64Dtype] = _count("Samples taken; a sample of a short step is the mean of several.")
    latency_stop: Series[pd.StringDtype] = _text(
        "Why sampling stopped: converged, time_limit or max_samples.", isin=("converged", "time_limit", "max_samples")
    )
    machine_speed_probe_ms: Series[float] = _number(
        "CPU, diagnostic: median time of a fixed matrix product run between samples; no time is corrected by it."
    )
    system_share: Series[float] = _number(
        "CPU: share of the steps' processor time spent in the kernel, mostly on pages given anew."
    )
    compile_ms: Series[float] = _number("First call under torch.compile.")
    device_time_p50_ms: Series[float] = _number(
        "CUDA: median time on the device, L2 cache cold; of many launches by a CUDA graph, empty if none can be made."
    )
    launch_bound: Series[float] = _number(
        "CUDA: wall time over device time; well above 1, launches cost more than work."
    )
    sdpa_backend: Series[pd.StringDtype] = _text("Which fused kernel scaled_dot_product_attention ran; empty if none.")
    achieved_tflops: Series[float] = _number("2 x MACs of the step over its time (device time on CUDA).")
    arithmetic_intensity: Series[float] = _number("FLOPs per byte if parameters, input and output crossed memory once.")
    roofline_fraction: Series[float] = _number("The least time the device's measured peaks allow, over the time taken.")
    # correctness and provenance
    correctness_error: Series[float] = _number(
        "Largest relative error of output and gradients against the fp64 reference."
    )
    correctness_tolerance: Series[float] = _number(
        "The error allowed: a multiple of the reference's own in this dtype."
    )
    routes_flipped: Series[float] = _number(
        "Share of routes, 0 to 1, that fp64 would choose otherwise; empty where nothing routes or was compared."
    )
    threads: Series[pd.Int64Dtype] = _count("CPU threads PyTorch used.")
    freed_memory: Series[pd.StringDtype] = _text(
        "CPU: kept: all that a step frees serves the next. returned: blocks over 32 MiB go back, as glibc has it.",
        isin=("kept", "returned"),
    )
    driver: Series[pd.StringDtype] = _text("CUDA driver.")
    torch: Series[pd.StringDtype] = _text("PyTorch version.")
    cuda: Series[pd.StringDtype] = _text("CUDA version PyTorch was built with.")
    triton: Series[pd.StringDtype] = _text("Triton version.")
    python: Series[pd.StringDtype] = _text("Python version.")
    commit: Series[pd.StringDtype] = _text("Git commit of this suite.")
    dirty: Series[pd.BooleanDtype] = _text("Whether the working tree differed from that commit.")
    started_at: Series[pd.StringDtype] = _text("When the cell started, UTC.")
    cell_seconds: Series[float] = _number("Wall time of the whole cell, process start included.")
    sm_clock_mhz: Series[pd.Int64Dtype] = _count("CUDA: clock right after the timing.")
    temperature_c: Series[pd.Int64Dtype] = _count("CUDA: temperature right after the timing.")
    throttled: Series[pd.BooleanDtype] = _text("CUDA: whether the device slowed itself down while timing.")
    foreign_processes: Series[pd.Int64Dtype] = _count("CUDA: other processes on the device while timing.")

    class Config:
        """No column more, none less, in this order."""

        strict = True
        ordered = True
        coerce = True

    @pa.dataframe_check(error="only a cell with status ok has measured times and memory")
    def measured_only_if_ok(cls, df: pd.DataFrame) -> pd.Series:
        """Only cells with status ok have measured values."""
        return _each(df, _measured_only_if_ok)

    @pa.dataframe_check(error="a cell with status ok has a time; any other has a reason")
    def outcome_complete(cls, df: pd.DataFrame) -> pd.Series:
        """Every cell has an outcome."""
        return _each(df, _outcome_complete)

    @pa.dataframe_check(error="macs_agree contradicts the counts")
    def agreement_consistent(cls, df: pd.DataFrame) -> pd.Series:
        """macs_agree is consistent with the counts."""
        return _each(df, _agreement_consistent)


COLUMNS: tuple[str, ...] = tuple(Row.to_schema().columns)
KEY: tuple[str, ...] = COLUMNS[: COLUMNS.index("status")]
KINDS: dict[str, str] = {name: str(column.dtype).lower() for name, column in Row.to_schema().columns.items()}
MEASURED: tuple[str, ...] = tuple(
    column
    for column in COLUMNS
    if column.startswith(
        (
            "latency_", "device_time", "memory_peak", "memory_reserved", "machine_speed_probe", "system_", "achieved_",
            "roofline_",
        )
    )
)  # fmt: skip
RENAMED = {
    "agreement_error": "correctness_error",
    "agreement_tolerance": "correctness_tolerance",
    "yardstick_ms": "machine_speed_probe_ms",
}
"""Columns of older result files and what they are called now; ``python -m ablations convert`` uses it."""
DROPPED = ("yardstick_memory_ms",)
"""Columns of older result files that are no more."""


def agree(analytic: Any, counted: Any, fvcore: Any) -> bool | None:
    """Whether the available MAC counts agree, fvcore's within 1 %; None with fewer than two counts."""
    exact = [int(n) for n in (analytic, counted) if not _missing(n)]
    loose = [] if _missing(fvcore) else [int(fvcore)]
    if len(exact) + len(loose) < 2:
        return None
    return len(set(exact)) <= 1 and all(abs(n - exact[0]) <= 0.01 * exact[0] for n in loose if exact)


def _measured_only_if_ok(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" or all(_missing(row[name]) for name in MEASURED)


def _outcome_complete(row: Mapping[str, Any]) -> bool:
    return not _missing(row["latency_p50_ms"] if row["status"] == "ok" else row["reason"])


def _agreement_consistent(row: Mapping[str, Any]) -> bool:
    stated = None if _missing(row["macs_agree"]) else bool(row["macs_agree"])
    return agree(row["macs_analytic"], row["macs_counted"], row["macs_fvcore"]) == stated


RULES = (_measured_only_if_ok, _outcome_complete, _agreement_consistent)
RULED = ("status", "reason", "macs_analytic", "macs_counted", "macs_fvcore", "macs_agree", *MEASURED)
"""The columns that the rules of a whole row look at."""


def _each(df: pd.DataFrame, rule: Callable[[Mapping[str, Any]], bool]) -> pd.Series:
    values = zip(*(df[name].tolist() for name in RULED), strict=True)
    return pd.Series([rule(dict(zip(RULED, row, strict=True))) for row in values], index=df.index, dtype=bool)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def fits(column: str, value: Any) -> bool:
    """Whether a value is valid in a column; only integer and boolean columns restrict it."""
    kind = KINDS[column]
    if value is None or kind not in ("int64", "boolean"):
        return True
    return isinstance(value, bool) if kind == "boolean" else type(value) is int and value >= 0


def as_text(value: Any) -> str:
    """The text of a value in a CSV cell; keys are compared in this form."""
    if value is None or (is_scalar(value) and pd.isna(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    return " ".join(str(value).replace("\0", " ").encode(errors="replace").decode().split())


def validate(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Convert rows to a table of this schema; SchemaError if they violate it."""
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    if unknown:
        raise SchemaError(f"not columns of this schema: {', '.join(sorted(unknown))}")
    table = pd.DataFrame([{name: as_text(row.get(name)) for name in COLUMNS} for row in rows], columns=list(COLUMNS))
    return _typed(table, "row")


def check(row: dict[str, Any]) -> list[str]:
    """Check one row by the rules of :func:`validate`, a hundred times faster; returns its cells as text.

    Raises:
        SchemaError: a value or the row breaks a rule; the message says which.
    """
    if unknown := sorted(set(row) - set(COLUMNS)):
        raise SchemaError(f"not columns of this schema: {', '.join(unknown)}")
    text = [as_text(row.get(name)) for name in COLUMNS]
    typed = {name: _parsed(name, value) for name, value in zip(COLUMNS, text, strict=True)}
    for rule in RULES:
        if not rule(typed):
            raise SchemaError(f"row: {rule.__name__.strip('_').replace('_', ' ')} does not hold")
    return text


def _parsed(name: str, text: str) -> Any:
    """Parse a cell and check it by the rules of its column."""
    try:
        value = PARSERS.get(KINDS[name], str)(text) if text else None
    except (KeyError, ValueError) as problem:
        raise SchemaError(f"row: column {name} holds what is no {KINDS[name]}: {problem}") from problem
    value = None if _missing(value) else value
    nullable, allowed, least = LIMITS[name]
    missing = value is None and not nullable
    wrong = value is not None and (value not in (allowed or (value,)) or (least is not None and value < least))
    if missing or wrong:
        raise SchemaError(f"row: column {name} cannot be {text!r}")
    return value


PARSERS: dict[str, Callable[[str], Any]] = {
    "boolean": {"True": True, "False": False}.__getitem__,
    "int64": int,
    "float64": float,
}


def _limits(column: Any) -> tuple[bool, tuple[Any, ...] | None, float | None]:
    """Constraints of a schema column: whether it is nullable, its allowed values, its minimum."""
    stated: dict[str, Any] = {}
    for rule in column.checks:
        stated |= rule.statistics
    if set(stated) - {"allowed_values", "min_value"}:
        raise NotImplementedError(f"a check of one row does not know all the rules of column {column.name}")
    return column.nullable, stated.get("allowed_values"), stated.get("min_value")


LIMITS = {name: _limits(column) for name, column in Row.to_schema().columns.items()}


def load(*paths: str | Path) -> pd.DataFrame:
    """Read result files into one table; SchemaError if a file is of another schema."""
    tables = [_typed(_read(Path(path)), str(path)) for path in paths]
    return (
        pd.concat(tables, ignore_index=True) if tables else _typed(pd.DataFrame(columns=list(COLUMNS), dtype=str), "")
    )


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as problem:
        raise SchemaError(f"{path} is not a results file: {problem}") from problem
    if {*RENAMED, *DROPPED} & set(table.columns):
        raise SchemaError(
            f"{path} holds columns of an older schema; convert it with: python -m ablations convert {path.parent}"
        )
    if tuple(table.columns) != COLUMNS:
        odd = sorted(set(table.columns) ^ set(COLUMNS))
        differ = ", ".join(odd) or "their order"
        raise SchemaError(f"{path} holds a CSV of another schema (columns that differ: {differ})")
    return table


def _typed(table: pd.DataFrame, where: str) -> pd.DataFrame:
    typed = table.replace("", pd.NA)
    for name, kind in KINDS.items():
        try:
            typed[name] = _converted(typed[name], kind)
        except (KeyError, TypeError, ValueError) as problem:
            raise SchemaError(f"{where}: column {name} holds what is no {kind}: {problem}") from problem
    try:
        return Row.validate(typed)
    except (pa.errors.SchemaError, pa.errors.SchemaErrors) as problem:
        first_line = " ".join(str(problem).split())[:300]
        raise SchemaError(f"{where}: {first_line}") from problem


def _converted(column: pd.Series, kind: str) -> pd.Series:
    """Convert text to the column's type; invalid text raises an error."""
    if kind == "boolean":
        return column.map({"True": True, "False": False}.__getitem__, na_action="ignore").astype("boolean")
    if kind == "int64":
        # Via a list: pandas would convert a column with gaps through float and lose digits.
        whole = [pd.NA if _missing(value) else int(value) for value in column.tolist()]
        return pd.Series(pd.array(whole, dtype="Int64"), index=column.index)
    return column.map(float, na_action="ignore").astype("float64") if kind == "float64" else column


def dictionary() -> str:
    """The data dictionary, as Markdown, generated from the schema."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for name, column in Row.to_schema().columns.items():
        kind = {"int64": "integer", "float64": "number", "boolean": "true/false"}.get(str(column.dtype).lower(), "text")
        lines.append(f"| `{name}` | {kind} | {column.description} |")
    return "\n".join(lines) + "\n"


README = """# Results

One folder per device, one CSV per sweep in it, one row per cell: one case, measured once. All files have the
same columns, so they concatenate: `profiling.schema.row.load("results/<device>/topk.csv", ...)` gives one typed
pandas table. An empty cell was not obtained or does not apply; it never stands for zero.

- A row's key is every column from `sweep` to `device_name`. A rerun skips keys that have a row.
- `peaks.csv` beside the sweeps holds the device's own peaks, measured once: FLOP/s of a large matrix product
  by dtype, and bytes per second of a large copy, read plus written.
- `report.html` beside the sweeps shows all of them on one page that opens offline; every run writes it anew, and
  `python -m notebooks.report results/<device>` does so from the files alone.
- `figures/` and `tables/` are written by the notebooks, from these files alone. `profile_one_config.json` is what
  the profiler said of the one configuration in the notebook of that name.
- `published_models.csv` holds figures from papers, in columns named `published_*`. None of them was measured here.

`memory_predicted_bytes` is empty under torch.compile, which fuses steps away, and for bf16 and fp16 on a CPU, whose
kernels work on copies that no rule covers.

## State of these results

- `intel-xeon-2-threads`: every sweep; three processes or more for each timed cell. `bra_speed` is of an earlier
  version of `impl="sdpa"`.
- `amd-epyc-2-threads`: other programs used the machine. In 17 of 1,361 timed rows the 95 % interval of the median
  became narrower than 2 % (`latency_stop` is `converged`); in the others the time limit ended sampling. Ratios within
  a sweep are usable, single latencies are not.
- `nvidia-h100-80gb-hbm3`: `bra_speed` and `topk` are whole. Parts of `models` and `kv_downsample` are there;
  `resolution`, `precision` and `stl` are not measured yet. One process a cell. The kernels of `impl="triton"` have
  changed since. Predictions were computed again on 2026-11-28 by mended rules, except for training by
  `impl="triton"`; those of `auto` in training are of the new kernels, and up to 16 % above the peak measured with the
  old ones. Forward they are within 1 % of the measured peak, except for `sdpa` at 600 x 500 (1.72 times as much) and
  `triton` there (5 % more). In training `sdpa` takes up to 1.6 times as much as predicted, in every attention, and
  `reference` with many scores up to 1.33 times, by what cuDNN and PyTorch allocate within a backward pass; all else
  is within 1 %.

## Units

MACs are multiply-accumulates (what papers and fvcore call FLOPs); FLOPs = 2 x MACs. Bytes are bytes; figures
show MiB. This page is generated: `python -m profiling.schema.row > results/README.md`.

## Columns

"""

if __name__ == "__main__":
    print(README + dictionary(), end="")
