"""The row: one case measured once. One fixed header for every sweep; the unit is in the column's name.

Everything above the CSV writes through this schema and everything below it reads through it. No torch here.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from profiling.schema.table import Schema, SchemaError, as_text, missing

__all__ = ["COLUMNS", "KEY", "KINDS", "Row", "SchemaError", "agree", "as_text", "holds_costs", "load", "validate"]
STATUSES = ("ok", "predicted", "oom", "timeout", "crash", "incorrect", "unsupported", "error")


def _text(description: str, **checks: Any) -> Any:
    return pa.Field(nullable=True, description=description, **checks)


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
        isin=("fp64", "fp32", "tf32", "bf16", "fp16", "bf16_params"),
        description="bf16, fp16: autocast over fp32 parameters; bf16_params: without; tf32: fp32, products rounded.",
    )
    device: Series[str] = pa.Field(isin=("cpu", "cuda"), description="Kind of device.")
    batch: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Images per step.")
    height: Series[pd.Int64Dtype] = pa.Field(
        ge=1, description="Tokens (attention, block) or pixels (model) per column."
    )
    width: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Tokens (attention, block) or pixels (model) per row.")
    dim: Series[pd.Int64Dtype] = _number("Channels; empty for models, which have several.")
    num_heads: Series[pd.Int64Dtype] = _number("Heads; empty for models.")
    attention: Series[pd.StringDtype] = _text(
        "Model: the attention in place of the published one: a name for all stages, or one per stage."
    )
    n_win: Series[pd.StringDtype] = _text("bra: regions per side, or auto.")
    topk: Series[pd.Int64Dtype] = _number("bra: routed regions per query region.")
    qk_dim: Series[pd.Int64Dtype] = _number("bra: channels of queries and keys.")
    kv_downsample_mode: Series[pd.StringDtype] = _text("bra: reduction of a region's keys and values.")
    kv_per_win: Series[pd.Int64Dtype] = _number("bra: tokens per side that ada_* modes leave of a region.")
    kv_downsample_ratio: Series[pd.Int64Dtype] = _number("bra: reduction per side of the other modes.")
    kv_downsample_kernel: Series[pd.Int64Dtype] = _number("bra: kernel of conv and fracpool.")
    soft_routing: Series[pd.BooleanDtype] = _text("bra: keys and values scaled by routing weights.")
    diff_routing: Series[pd.BooleanDtype] = _text("bra: gradients flow through routing scores.")
    auto_pad: Series[pd.BooleanDtype] = _text("bra: pads grids that n_win does not divide.")
    mask_padding: Series[pd.BooleanDtype] = _text("bra: padding is left out of the attention.")
    side_dwconv: Series[pd.Int64Dtype] = _number("bra, lepe: kernel of the LePE convolution.")
    window_size: Series[pd.Int64Dtype] = _number("window: tokens per side.")
    shift: Series[pd.Int64Dtype] = _number("window: displacement in tokens.")
    relative_position_bias: Series[pd.BooleanDtype] = _text(
        "block_grid, deformable, neighborhood, window: learned bias per relative position."
    )
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
    params: Series[pd.Int64Dtype] = _number("Learnable parameters.")
    macs_analytic: Series[pd.Int64Dtype] = _number(
        "MACs of the forward pass by the module's formula; what papers call FLOPs."
    )
    macs_counted: Series[pd.Int64Dtype] = _number(
        "The same, counted operator by operator (FlopCounterMode on meta tensors)."
    )
    macs_fvcore: Series[pd.Int64Dtype] = _number(
        "The same by fvcore, which counts normalisations too; empty where it cannot trace, and on CUDA."
    )
    macs_agree: Series[pd.BooleanDtype] = _text(
        "Analytic and counted are equal, fvcore at most 4 % more; empty with fewer than two counts."
    )
    macs_backward_counted: Series[pd.Int64Dtype] = _number("MACs of the backward pass, counted.")
    macs_projection: Series[pd.Int64Dtype] = _number(
        "Part of macs_analytic: linear maps of queries, keys, values, output."
    )
    macs_routing: Series[pd.Int64Dtype] = _number("Part of macs_analytic: choosing what to attend to.")
    macs_attention: Series[pd.Int64Dtype] = _number("Part of macs_analytic: scores and weighted sums.")
    macs_local_conv: Series[pd.Int64Dtype] = _number("Part of macs_analytic: depthwise convolutions.")
    exponent_theory: Series[float] = _number("Power of HW with which attention and routing grow, by theory.")
    kv_tokens_per_query: Series[float] = _number("Key tokens that one query attends to, mean over queries.")
    regions_per_side: Series[pd.Int64Dtype] = _number("bra: S, resolved where n_win is auto.")
    # memory
    memory_predicted_bytes: Series[pd.Int64Dtype] = _number(
        "Most bytes that one step has asked for at once, base included, predicted without a run; see below."
    )
    memory_peak_bytes: Series[pd.Int64Dtype] = _number("The same, measured.")
    memory_base_bytes: Series[pd.Int64Dtype] = _number(
        "Bytes there before the step: parameters, buffers, input, output gradient."
    )
    memory_reserved_bytes: Series[pd.Int64Dtype] = _number("CUDA: most bytes the allocator held.")
    # time
    latency_p50_ms: Series[float] = _number("Median wall time of one step.")
    latency_p25_ms: Series[float] = _number("Lower quartile.")
    latency_p75_ms: Series[float] = _number("Upper quartile.")
    latency_p95_ms: Series[float] = _number("95th percentile.")
    latency_low_ms: Series[float] = _number("Lower end of the 95 % interval of the median.")
    latency_high_ms: Series[float] = _number("Upper end of the 95 % interval of the median.")
    latency_samples: Series[pd.Int64Dtype] = _number("Samples taken; a sample of a short step is the mean of several.")
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
    roofline_fraction: Series[float] = _number(
        "The least time that the measured peaks allow, over the time taken; above 1 where caches hold the data."
    )
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
    threads: Series[pd.Int64Dtype] = _number("CPU threads PyTorch used.")
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
    sm_clock_mhz: Series[pd.Int64Dtype] = _number("CUDA: clock right after the timing.")
    temperature_c: Series[pd.Int64Dtype] = _number("CUDA: temperature right after the timing.")
    throttled: Series[pd.BooleanDtype] = _text("CUDA: whether the device slowed itself down while timing.")
    foreign_processes: Series[pd.Int64Dtype] = _number("CUDA: other processes on the device while timing.")

    class Config:
        """No column more, none less, in this order."""

        strict = True
        ordered = True
        coerce = True

    @pa.dataframe_check(error="only a cell with status ok has measured times and memory")
    def measured_only_if_ok(cls, df: pd.DataFrame) -> pd.Series:
        """Only cells with status ok have measured values."""
        return (df["status"] == "ok") | df[list(MEASURED)].isna().all(axis=1)

    @pa.dataframe_check(error="a cell with status ok has a time; any other has a reason")
    def outcome_complete(cls, df: pd.DataFrame) -> pd.Series:
        """Every cell has an outcome."""
        return df["latency_p50_ms"].where(df["status"] == "ok", df["reason"]).notna()

    @pa.dataframe_check(
        error="macs_agree contradicts the counts; if by an older rule, state it anew: python -m ablations convert DIR"
    )
    def agreement_consistent(cls, df: pd.DataFrame) -> pd.Series:
        """macs_agree is consistent with the counts."""
        counts = zip(df["macs_analytic"], df["macs_counted"], df["macs_fvcore"], strict=True)
        stated = (None if missing(value) else bool(value) for value in df["macs_agree"])
        consistent = [agree(*count) == value for count, value in zip(counts, stated, strict=True)]
        return pd.Series(consistent, index=df.index, dtype=bool)


ROW = Schema(
    Row,
    "status",
    {
        "agreement_error": "correctness_error",
        "agreement_tolerance": "correctness_tolerance",
        "yardstick_ms": "machine_speed_probe_ms",
    },
    ("yardstick_memory_ms",),
)
COLUMNS, KEY, KINDS = ROW.columns, ROW.key, ROW.kinds
RENAMED, DROPPED = ROW.renamed, ROW.dropped
validate, load = ROW.validate, ROW.load
_MEASURED = ("latency_", "device_time", "memory_peak", "memory_reserved", "machine_speed_probe", "system_", "achieved_",
             "roofline_")  # fmt: skip
MEASURED: tuple[str, ...] = tuple(column for column in COLUMNS if column.startswith(_MEASURED))


def agree(analytic: Any, counted: Any, fvcore: Any) -> bool | None:
    """Whether the available MAC counts agree; None with fewer than two counts.

    fvcore's may be up to 4 % more, since it counts normalisations too: 2 % of a block with 64 channels, 3.4 % with 32.
    """
    exact = [int(n) for n in (analytic, counted) if not missing(n)]
    loose = [] if missing(fvcore) else [int(fvcore)]
    if len(exact) + len(loose) < 2:
        return None
    return len(set(exact)) <= 1 and all(exact[0] <= n <= 1.04 * exact[0] for n in loose if exact)


def holds_costs(path: Path) -> bool:
    """Whether a CSV in a folder of results is of this schema, by its name; peaks, accuracies and papers' are not."""
    return path.name not in ("peaks.csv", "published_models.csv") and not path.name.startswith("capability")
