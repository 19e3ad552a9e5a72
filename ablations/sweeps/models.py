"""What do the four published models cost at 224, and at the sizes of detection and segmentation?

python run_all.py --only models
"""

from ablations.harness.sweep import MODES, Sweep
from profiling.meters.latency import BRIEF

NAMES = ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl")
BOTH = ("reference", "auto")
SWEEP = Sweep(
    question="What do BiFormer-T, -S, -B and -STL cost at 224 (--full: 384, 512, training), as published (n_win 7)?",
    expect="2.2, 4.5, 9.8 and 4.6 G MACs at 224; attention grows with the square of the pixels.",
    axes={
        "grid": (224,),
        "name": NAMES,
        "mode": ("forward",),
    },
    # As in practice: half precision, and for inference the batch size of the published throughput.
    on_cuda=[
        {"grid": (224,), "dtype": ("bf16",), "batch": (128,), "name": NAMES[1:] + NAMES[:1], "impl": BOTH},
        {"grid": (224,), "dtype": ("bf16",), **MODES, "name": NAMES, "impl": BOTH},
    ],
    fixed={"kind": "model", "impl": "reference", "n_win": 7, "auto_pad": True},
    smoke={"grid": (224,), "name": ("biformer_tiny",), "mode": ("forward",)},
    measured=lambda case: case.height == 224 or case.device == "cuda",
    most_macs_on_cpu=35e9,
    timeout=600,
    stopping=BRIEF,
    full={"axes": {"grid": (224, 384, 512), **MODES}},
)
