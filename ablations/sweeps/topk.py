"""What does it cost to route to more regions, and how many regions should there be?

python run_all.py --only topk
"""

from typing import Any

from ablations.harness.sweep import MODES, Axis, Sweep
from profiling.meters.latency import BRIEF

TOPK = (1, 2, 4, 8, 16, 32, 49, 64, 128, 196)
AT_4: dict[Axis, Any] = {"n_win": (7,), "topk": (4,), **MODES}
GATE: dict[Axis, Any] = {"coarse_gate": (True,)}
TOKEN: dict[Axis, Any] = {"per_token_routing": (True,)}
SWEEP = Sweep(
    question="What do topk, n_win, a coarse gate and routing by token cost BRA at the grid of its first stage?",
    expect="cost is linear in topk; at equal topk, twice the regions per side is a quarter of the keys. The gate adds "
    "a projection, 8 % of the MACs; tokens that route alone copy their keys alone: 9 times the memory in training.",
    axes={
        "n_win": (7, 14),
        "topk": TOPK,
        **MODES,
    },
    also=[AT_4 | GATE, AT_4 | TOKEN],
    on_cuda=[
        {"n_win": (7,), "topk": TOPK, ("impl", "dtype"): [("reference", "fp32"), ("auto", "bf16")], **MODES},
        {"n_win": (14,), "topk": TOPK, **MODES},
        {"n_win": (7,), "topk": TOPK, "dtype": ("bf16",), **MODES},
        *({**AT_4, "impl": ("auto",), "dtype": ("bf16",), **option} for option in (GATE, TOKEN)),
    ],
    fixed={"name": "bra", "grid": 56, "dim": 64, "num_heads": 2, "impl": "reference", "side_dwconv": 5},
    smoke={"n_win": (7,), "topk": (1, 49), "mode": ("forward",)},
    keep=lambda values: values["topk"] <= values["n_win"] ** 2,
    stopping=BRIEF,
    full={
        "axes": {"n_win": (4, 7, 8, 14)},
        "also": [
            *({**AT_4, "topk": (1, 4), **option} for option in (GATE, TOKEN, GATE | TOKEN)),
            *({**AT_4, "impl": ("sdpa",), **option} for option in ({}, GATE, TOKEN)),
        ],
    },
)
