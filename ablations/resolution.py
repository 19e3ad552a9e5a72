"""Which attention can I afford at my resolution?

python run_all.py --only resolution
"""

from ablations.sweep import Sweep, attentions
from profiling.latency import Patience

SWEEP = Sweep(
    question="How do MACs, memory and latency of every attention grow with the grid?",
    expect="24 GiB end near 180 tokens per side for full, near 330 for BRA; windows fit at 1024. 11 min.",
    axes={
        "grid": (14, 28, 56, 112, 256, 512, 1024),
        "name": attentions,
        "mode": ("forward", "forward_backward"),
    },
    fixed={
        "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "auto_pad": True, "side_dwconv": 5, "window_size": 7,
    },
    smoke={"grid": (14, 1024)},
    measured=lambda case: case.height <= 256,
    most_macs_on_cpu=18e9,
    replicates=3,
    patience=Patience(seconds=0.4),
)  # fmt: skip
