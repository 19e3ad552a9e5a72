"""Does the cost grow as the theory says?

    python run_all.py --only complexity

``notebooks/complexity_tables.ipynb`` fits the exponents and shows them beside the theory.
"""

from ablations.sweep import Sweep, attentions

SWEEP = Sweep(
    question="With which power of HW do MACs and memory of every attention grow, beside what theory says?",
    expect="in MACs of attention and routing: full 2, axial 3/2, window 1, BRA 4/3 with n_win auto and 2 with 7.",
    axes={
        "grid": (56, 112, 224, 448, 896, 1792),
        "name": attentions,
        "n_win": (7, "auto"),
        "mode": ("forward", "forward_backward"),
    },
    fixed={"dim": 64, "num_heads": 2, "impl": "reference", "topk": 4, "auto_pad": True, "window_size": 7},
    smoke={"grid": (56, 112, 1792), "mode": ("forward",)},
    measured=lambda case: False,
)
