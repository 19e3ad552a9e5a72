"""What is the gain of downsampling keys and values before they are gathered?

python run_all.py --only kv_downsample
"""

from typing import Any

from ablations.harness.sweep import Axis, Sweep
from profiling.meters.latency import BRIEF


def _tells_apart(values: object) -> bool:
    """Keep one case per mode and value of the option that it reads: kv_per_win for ada_*, the ratio otherwise."""
    mode, ratio, per_win = (values[name] for name in ("kv_downsample_mode", "kv_downsample_ratio", "kv_per_win"))  # type: ignore[index]
    if mode == "identity":
        return ratio == 1 and per_win == 8
    return (ratio == 1) if mode.startswith("ada_") else (per_win == 8 and ratio > 1)


AXES: dict[Axis, Any] = {
    "kv_downsample_mode": ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool", "fracpool", "conv"),
    "kv_downsample_ratio": (1, 2, 4, 8),
    "kv_per_win": (8, 4, 2, 1),
    "mode": ("forward", "forward_backward"),
}
SWEEP = Sweep(
    question="What does each kv_downsample mode buy BRA, at each reduction?",
    expect="memory falls with the square of the reduction until the projections dominate.",
    axes=AXES,
    on_cuda=[AXES, {**AXES, "mode": ("forward_backward",), "impl": ("auto",), "dtype": ("bf16",)}],
    fixed={
        "name": "bra", "grid": 56, "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "side_dwconv": 5,
    },
    smoke={"kv_downsample_ratio": (1, 4), "kv_per_win": (8,), "mode": ("forward",)},
    keep=_tells_apart,
    stopping=BRIEF,
)  # fmt: skip
