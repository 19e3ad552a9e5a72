"""The row of a capability sweep: one network trained once on one task. No torch here."""

from typing import Any

import pandas as pd
import pandera.pandas as pa
from pandera.typing import Series

from profiling.schema.table import Schema

STATUSES = ("ok", "diverged", "oom", "timeout", "crash", "unsupported", "error")


def _text(description: str) -> Any:
    return pa.Field(nullable=True, description=description)


def _number(description: str) -> Any:
    return pa.Field(nullable=True, ge=0, description=description)


def _share(description: str) -> Any:
    return pa.Field(nullable=True, ge=0, le=1, description=description)


class CapabilityRow(pa.DataFrameModel):
    """One row per training. A number is there only if it was obtained."""

    # key
    sweep: Series[str] = pa.Field(description="Which sweep the training belongs to.")
    name: Series[str] = pa.Field(description="Registered name of the attention.")
    options: Series[pd.StringDtype] = _text("Options that differ from its defaults, as name=value name=value.")
    topk: Series[pd.Int64Dtype] = _number("bra: routed regions per query region.")
    n_win: Series[pd.StringDtype] = _text("bra: regions per side, or auto.")
    task: Series[str] = pa.Field(description="What was learned.")
    difficulty: Series[str] = pa.Field(isin=("easy", "medium", "hard"), description="Its level.")
    height: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Tokens per column.")
    width: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Tokens per row.")
    dim: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Channels of the network.")
    num_heads: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Heads of every attention.")
    depth: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Blocks of the network.")
    batch: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Images per step.")
    steps: Series[pd.Int64Dtype] = pa.Field(ge=1, description="Training steps, each on new images.")
    optimiser: Series[str] = pa.Field(description="Optimiser and schedule.")
    learning_rate: Series[float] = pa.Field(gt=0, description="Its largest value.")
    dtype: Series[str] = pa.Field(isin=("fp32", "bf16"), description="bf16: autocast over fp32 parameters.")
    device: Series[str] = pa.Field(isin=("cpu", "cuda"), description="Kind of device.")
    seed: Series[pd.Int64Dtype] = pa.Field(ge=0, description="Seed of weights and images.")
    device_name: Series[str] = pa.Field(description="The device, as it names itself.")
    # outcome
    status: Series[str] = pa.Field(isin=STATUSES, description="ok: trained. diverged: the loss is no number.")
    reason: Series[pd.StringDtype] = _text("Why the status is not ok, or why a test has no number, in one line.")
    impl: Series[pd.StringDtype] = _text("The implementation that ran.")
    chance: Series[float] = _share("Share of right answers of the best guess without the image's far parts.")
    accuracy: Series[float] = _share("Share of right answers on new images of the same grid.")
    accuracy_double: Series[float] = _share("The same at twice the tokens per side, without training there.")
    accuracy_double_auto: Series[float] = _share("bra: the same with n_win auto at that grid.")
    loss: Series[float] = _number("Cross-entropy, mean over the last tenth of the steps.")
    answers: Series[pd.Int64Dtype] = _number("Tokens that the accuracy is a share of.")
    # cost
    params: Series[pd.Int64Dtype] = _number("Learnable parameters of the network.")
    macs_counted: Series[pd.Int64Dtype] = _number("MACs of the network's forward pass for one image.")
    memory_predicted_bytes: Series[pd.Int64Dtype] = _number("Peak memory of a training step, without the optimiser.")
    step_p50_ms: Series[float] = _number("Median wall time of a training step, beside other cells: no benchmark.")
    train_seconds: Series[float] = _number("Processor time of the training.")
    data_share: Series[float] = _share("Part of it that generated images.")
    # provenance
    threads: Series[pd.Int64Dtype] = _number("CPU threads of this training.")
    at_once: Series[pd.Int64Dtype] = _number("Trainings that ran side by side.")
    torch: Series[pd.StringDtype] = _text("PyTorch version.")
    python: Series[pd.StringDtype] = _text("Python version.")
    commit: Series[pd.StringDtype] = _text("Git commit of this suite.")
    dirty: Series[pd.BooleanDtype] = _text("Whether the working tree differed from that commit.")
    started_at: Series[pd.StringDtype] = _text("When the cell started, UTC.")
    cell_seconds: Series[float] = _number("Wall time of the whole cell, process start included.")

    class Config:
        """No column more, none less, in this order."""

        strict = True
        ordered = True
        coerce = True

    @pa.dataframe_check(error="only a row with status ok has an accuracy; any other has a reason")
    def outcome_complete(cls, df: pd.DataFrame) -> pd.Series:
        """Every row has an outcome."""
        ok = df["status"] == "ok"
        return (ok & df["accuracy"].notna()) | (~ok & df["accuracy"].isna() & df["reason"].notna())


CAPABILITY = Schema(CapabilityRow, "status")
validate, load = CAPABILITY.validate, CAPABILITY.load
SETTING = [column for column in CAPABILITY.key if column not in ("seed", "device_name")]
"""Columns in which trainings of several seeds agree."""
SOLVED = 0.95
"""Accuracy from which a task counts as solved."""


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting: the mean accuracy of its seeds, the least and largest, and how many there are.

    Three seeds give no more than a range. A training that diverged or failed counts in ``failed`` only.
    """
    groups = rows.assign(failed=rows["status"] != "ok").groupby(SETTING, dropna=False, sort=False)
    result = groups.agg(
        accuracy=("accuracy", "mean"), low=("accuracy", "min"), high=("accuracy", "max"),
        double=("accuracy_double", "mean"), double_auto=("accuracy_double_auto", "mean"),
        chance=("chance", "first"), seeds=("accuracy", "count"), failed=("failed", "sum"),
        params=("params", "first"), macs=("macs_counted", "first"), memory=("memory_predicted_bytes", "first"),
    )  # fmt: skip
    return result.reset_index()
