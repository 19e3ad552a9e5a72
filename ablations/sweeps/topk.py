"""What does it cost to route to more regions, and how many regions should there be?

python run_all.py --only topk
"""

from ablations.harness.sweep import MODES, Sweep
from profiling.meters.latency import BRIEF

TOPK = (1, 2, 4, 8, 16, 32, 49, 64, 128, 196)
SWEEP = Sweep(
    question="What do topk and n_win cost BRA at the grid of its first stage?",
    expect="cost is linear in topk; at equal topk, twice the regions per side is a quarter of the keys.",
    axes={
        "n_win": (7, 14),
        "topk": TOPK,
        **MODES,
    },
    on_cuda=[
        {"n_win": (7,), "topk": TOPK, ("impl", "dtype"): [("reference", "fp32"), ("auto", "bf16")], **MODES},
        {"n_win": (14,), "topk": TOPK, **MODES},
        {"n_win": (7,), "topk": TOPK, "dtype": ("bf16",), **MODES},
    ],
    fixed={"name": "bra", "grid": 56, "dim": 64, "num_heads": 2, "impl": "reference", "side_dwconv": 5},
    smoke={"n_win": (7,), "topk": (1, 49), "mode": ("forward",)},
    keep=lambda values: values["topk"] <= values["n_win"] ** 2,
    stopping=BRIEF,
    full={"axes": {"n_win": (4, 7, 8, 14)}},
)
