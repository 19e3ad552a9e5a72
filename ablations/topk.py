"""What does it cost to route to more regions, and how many regions should there be?

python run_all.py --only topk
"""

from ablations.sweep import Sweep
from profiling.latency import Patience

SWEEP = Sweep(
    question="What do topk and n_win cost BRA at the grid of its first stage?",
    expect="cost is linear in topk; at equal topk, twice the regions per side is a quarter of the keys. 4 min.",
    axes={
        "n_win": (4, 7, 8, 14),
        "topk": (1, 2, 4, 8, 16, 32, 49, 64, 128, 196),
        "mode": ("forward", "forward_backward"),
    },
    fixed={"name": "bra", "grid": 56, "dim": 64, "num_heads": 2, "impl": "reference", "side_dwconv": 5},
    smoke={"n_win": (7,), "topk": (1, 49), "mode": ("forward",)},
    keep=lambda values: values["topk"] <= values["n_win"] ** 2,
    replicates=3,
    patience=Patience(seconds=0.4),
)
