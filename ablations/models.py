"""What do the four published models cost at 224, and at the sizes of detection and segmentation?

python run_all.py --only models
"""

from ablations.sweep import Sweep
from profiling.latency import Patience

SWEEP = Sweep(
    question="What do BiFormer-T, -S, -B and -STL cost at 224, 384 and 512 pixels, as published (n_win 7)?",
    expect="2.2, 4.5, 9.8 and 4.6 G MACs at 224; attention grows with the square of the pixels. 1 min.",
    axes={
        "grid": (224, 384, 512),
        "name": ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl"),
        "mode": ("forward", "forward_backward"),
    },
    fixed={"kind": "model", "impl": "reference", "n_win": 7, "auto_pad": True},
    smoke={"grid": (224,), "name": ("biformer_tiny",), "mode": ("forward",)},
    measured=lambda case: case.height == 224 or case.device == "cuda",
    most_macs_on_cpu=35e9,
    timeout=600,
    replicates=3,
    patience=Patience(seconds=0.3),
)
