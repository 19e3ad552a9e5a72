"""What is the gain of half precision?

python run_all.py --only precision
"""

from ablations.harness.sweep import MODES, Sweep, attentions
from profiling.meters.latency import StoppingRule

SWEEP = Sweep(
    question="How much faster is every attention in bf16 than in fp32, and how much less memory does it take?",
    expect="A GPU gains where products dominate; a CPU little, since casts cost it a pass over every tensor. 3 min.",
    axes={
        "grid": (56, 112, 256),
        "name": attentions,
        **MODES,
        "dtype": ("fp32", "bf16"),
    },
    # The resolution sweep measures them in fp32.
    on_cuda=[
        {"grid": (56, 112), "name": attentions, "dtype": ("bf16",), **MODES},
        {"grid": (256,), "name": attentions, "dtype": ("bf16",)},
        {"grid": (56, 112), "name": ("bra",), "impl": ("auto",), "dtype": ("bf16",), **MODES},
    ],
    fixed={
        "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "auto_pad": True, "side_dwconv": 5, "window_size": 7,
    },
    smoke={"grid": (56,), "name": ("bra", "window")},
    # The grid that a CPU can afford.
    keep=lambda values: values["grid"] == 56 or values["device"] != "cpu",
    stopping=StoppingRule(max_seconds=0.4),
)  # fmt: skip
