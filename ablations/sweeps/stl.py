"""What would BiFormer-STL cost with another attention in place of BRA?

python run_all.py --only stl
"""

from ablations.harness.sweep import Sweep, attentions
from profiling.meters.latency import StoppingRule

SWEEP = Sweep(
    question="What does the Swin-T layout cost with each attention in all of its stages?",
    expect="at 224 all cost nearly the same; at 1024 full attention needs 100 times the memory of windows. 7 min.",
    axes={
        "grid": (224, 512, 1024),
        "attention": attentions,
        "mode": ("forward", "forward_backward"),
    },
    fixed={"kind": "model", "name": "biformer_stl", "impl": "reference", "auto_pad": True},
    smoke={"grid": (224,), "attention": ("bra", "window"), "mode": ("forward",)},
    measured=lambda case: case.mode == "forward",
    most_macs_on_cpu=200e9,
    timeout=600,
    stopping=StoppingRule(max_seconds=0.3),
)
