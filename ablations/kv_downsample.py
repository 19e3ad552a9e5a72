"""What does it buy to shrink keys and values before they are gathered?

python run_all.py --only kv_downsample
"""

from ablations.sweep import Sweep
from profiling.latency import Patience


def _tells_apart(values: object) -> bool:
    """A case per mode and setting that the mode reads: kv_per_win for ada_*, the ratio for the others."""
    mode, ratio, per_win = (values[name] for name in ("kv_downsample_mode", "kv_downsample_ratio", "kv_per_win"))  # type: ignore[index]
    if mode == "identity":
        return ratio == 1 and per_win == 8
    return (ratio == 1) if mode.startswith("ada_") else (per_win == 8 and ratio > 1)


SWEEP = Sweep(
    question="What does each kv_downsample mode buy BRA, at each reduction?",
    expect="memory falls with the square of the reduction until the projections dominate. 2 min.",
    axes={
        "kv_downsample_mode": ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool", "fracpool", "conv"),
        "kv_downsample_ratio": (1, 2, 4, 8),
        "kv_per_win": (8, 4, 2, 1),
        "mode": ("forward", "forward_backward"),
    },
    fixed={
        "name": "bra", "grid": 56, "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "side_dwconv": 5,
    },
    smoke={"kv_downsample_ratio": (1, 4), "kv_per_win": (8,), "mode": ("forward",)},
    keep=_tells_apart,
    replicates=3,
    patience=Patience(seconds=0.4),
)  # fmt: skip
