"""What does half the precision buy?

python run_all.py --only precision
"""

from ablations.sweep import Sweep, attentions
from profiling.latency import Patience

SWEEP = Sweep(
    question="How much faster is every attention in bf16 than in fp32, and how much less memory does it take?",
    expect="A GPU gains where products dominate; a CPU little, since casts cost it a pass over every tensor. 3 min.",
    axes={
        "grid": (56, 112, 256),
        "name": attentions,
        "mode": ("forward", "forward_backward"),
        "dtype": ("fp32", "bf16"),
    },
    fixed={
        "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "auto_pad": True, "side_dwconv": 5, "window_size": 7,
    },
    smoke={"grid": (56,), "name": ("bra", "window")},
    # On a GPU fp32 is in the resolution sweep already; on a CPU both are here, side by side, at the grid it can afford.
    keep=lambda values: values["grid"] == 56 if values["device"] == "cpu" else values["dtype"] == "bf16",
    replicates=3,
    patience=Patience(seconds=0.4),
)  # fmt: skip
