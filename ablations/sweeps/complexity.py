"""Does the cost grow as the theory says?

    python run_all.py --only complexity

``notebooks/complexity_tables.ipynb`` fits the exponents and shows them beside the theory.
"""

from ablations.harness.sweep import Sweep, attentions
from profiling.cases.case import Case
from profiling.meters.latency import StoppingRule


def auto_and_small(case: Case) -> bool:
    """BRA with n_win auto, from 28 to 224 tokens per side: the resolution sweep measures all others."""
    return dict(case.options).get("n_win") == "auto" and 28 <= case.height <= 224


SWEEP = Sweep(
    question="With which power of HW do MACs, memory and latency of every attention grow, beside the theory?",
    expect="in MACs of attention and routing: full 2, axial 3/2, window 1, BRA 4/3 with n_win auto and 2 with n_win 7.",
    axes={
        "grid": (14, 28, 56, 112, 224, 448, 896, 1792, 4096),
        "name": attentions,
        "n_win": (7, "auto"),
        "mode": ("forward", "forward_backward"),
    },
    fixed={
        "dim": 64, "num_heads": 2, "impl": "reference",
        "topk": 4, "auto_pad": True, "side_dwconv": 5, "window_size": 7,
    },
    smoke={"grid": (56, 112, 1792), "mode": ("forward",)},
    measured=auto_and_small,
    most_macs_on_cpu=18e9,
    stopping=StoppingRule(max_seconds=0.1),
)  # fmt: skip
