"""How much faster than the published BRA is each implementation, and how near to what is possible?

python run_all.py --only bra_speed
"""

from typing import Any

from ablations.harness.sweep import MODES, Axes, Axis, Sweep, Values
from profiling.cases.case import available_impls
from profiling.meters.latency import StoppingRule

SHAPE = ("dim", "num_heads", "grid", "topk", "n_win", "window_size")
EIGHT = (
    (64, 2, 56, 1, 7, 7), (128, 4, 28, 4, 7, 7), (256, 8, 14, 16, 7, 7), (64, 2, 112, 4, 7, 7), (64, 2, 224, 4, 7, 7),
    (128, 4, 64, 4, 8, 8), (64, 2, 256, 1, 16, 8), (64, 2, 256, 4, 16, 8),
)  # fmt: skip
USERS = ((20, 1, (600, 500), 4, 50, 7),)
"""Of 100 GB: 20 channels are one head; 50 divides both sides, near the best n_win, 76."""
MORE = tuple((64, 2, grid, topk, 7, 7) for grid, topk in ((56, 2), (56, 4), (56, 8), (56, 16), (14, 4), (28, 4)))
BASELINES = [(name, "sdpa") for name in ("bra_pregathered", "window", "full")]
COMPILED = [("bra", "reference"), ("bra", "sdpa")]
WHO, LAUNCH = ("name", "impl"), ("compiled", "cuda_graph")


def affordable(values: Values) -> bool:
    """On a CPU: only cases that take less than minutes, and no Triton kernels."""
    shape, impl = tuple(values[name] for name in SHAPE), values["impl"]
    if values["device"] != "cpu":
        return True
    if values["compiled"]:
        return shape == EIGHT[0] and (values["name"], impl) in COMPILED
    return impl != "triton" and (impl != "flex" or shape in EIGHT[:3])


def bra(*without: str) -> list[tuple[str, str]]:
    """BRA with each of its implementations except these."""
    return [("bra", impl) for impl in available_impls("bra") if impl not in without]


FEW = [("bra", "reference"), ("bra", "triton"), ("window", "sdpa"), ("bra_pregathered", "sdpa")]
MOST = [*FEW[:2], ("bra", "sdpa"), *FEW[2:]]
EAGER, GRAPH, BOTH = [(False, False)], [(False, True)], [(False, False), (False, True)]
HALF: dict[Axis, Any] = {"dtype": ("bf16",)}
ON_CUDA: tuple[Axes, ...] = (
    {**HALF, SHAPE: EIGHT, WHO: lambda: [*bra("flex"), *BASELINES], **MODES},
    {**HALF, SHAPE: EIGHT, WHO: FEW, LAUNCH: GRAPH, **MODES},
    {**HALF, "batch": (128,), SHAPE: EIGHT[:3], WHO: MOST, LAUNCH: BOTH, **MODES},
    {"dtype": ("bf16_params",), SHAPE: EIGHT[:2], WHO: FEW[:2], **MODES},  # Without autocast's six casts a step.
    {SHAPE: (EIGHT[0], EIGHT[3], EIGHT[7]), WHO: lambda: bra("flex"), **MODES},
    {**HALF, SHAPE: USERS, WHO: lambda: bra("flex"), **MODES},
    # Last, what takes half a minute to compile: FlexAttention where its blocks divide the regions.
    {**HALF, SHAPE: (EIGHT[0], *EIGHT[3:]), WHO: [("bra", "flex")], **MODES},
    {**HALF, SHAPE: (EIGHT[0], EIGHT[3]), WHO: COMPILED[:1], "mode": ("forward",), LAUNCH: [(True, False)]},
)

SWEEP = Sweep(
    question="How fast is each implementation of BRA, beside pre-gathered keys, windows and full attention?",
    expect="sdpa beats the reference most in training, where that scatters; pre-gathered is near it. 25 min.",
    axes={
        SHAPE: EIGHT + USERS + MORE, WHO: lambda: [*bra(), *BASELINES], **MODES, LAUNCH: [(False, False), (True, False)]
    },
    on_cuda=ON_CUDA, fixed={"side_dwconv": 5, "compiled": False, "cuda_graph": False}, freed_memory="returned",
    smoke={SHAPE: EIGHT[2:3], WHO: [*COMPILED, *BASELINES], LAUNCH: EAGER},
    keep=affordable, most_macs_on_cpu=200e9, stopping=StoppingRule(max_seconds=0.3), timeout=600,
)  # fmt: skip
