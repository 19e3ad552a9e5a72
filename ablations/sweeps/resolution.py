"""Which attention can I afford at my resolution?

python run_all.py --only resolution
"""

from ablations.harness.sweep import MODES, Sweep, attentions
from profiling.cases.case import available_impls
from profiling.meters.latency import BRIEF


def with_others() -> list[str]:
    """The attentions with more than one implementation."""
    return [name for name in attentions() if len(available_impls(name)) > 1]


SWEEP = Sweep(
    question="How do MACs, memory and latency of every attention grow with the grid?",
    expect="24 GiB end near 180 tokens per side for full, near 330 for BRA; windows fit at 1024.",
    axes={
        "grid": (14, 28, 56, 112, 256, 512, 1024),
        "name": attentions,
        **MODES,
    },
    on_cuda=[
        {"grid": (56, 112, 256, 28), "name": attentions, **MODES},
        {"grid": (56, 256), "name": with_others, "impl": ("auto",), "mode": ("forward_backward",)},
        {"grid": (512, 1024), "name": attentions, **MODES},
    ],
    fixed={
        "dim": 64, "num_heads": 2, "impl": "reference",
        "n_win": 7, "topk": 4, "auto_pad": True, "side_dwconv": 5, "window_size": 7,
    },
    smoke={"grid": (14, 1024)},
    measured=lambda case: case.height <= (256 if case.device == "cuda" else 112),
    most_macs_on_cpu=6e9,
    stopping=BRIEF,
    full={"most_macs_on_cpu": 18e9, "measured": lambda case: case.height <= 256},
)  # fmt: skip
