"""How much faster than the published BRA is each implementation, and how near to what is possible?

python run_all.py --only bra_speed
"""

from ablations.sweep import Sweep, Values
from profiling.case import available_impls
from profiling.latency import Patience

SHAPE = ("dim", "num_heads", "grid", "topk", "n_win", "window_size")
SHAPES = (  # The last is a user's, of 100 GB: 20 channels are one head; 50 divides both sides, near the best n_win, 76.
    (64, 2, 56, 1, 7, 7), (128, 4, 28, 4, 7, 7), (256, 8, 14, 16, 7, 7), (64, 2, 112, 4, 7, 7), (64, 2, 224, 4, 7, 7),
    (128, 4, 64, 4, 8, 8), (64, 2, 256, 1, 16, 8), (64, 2, 256, 4, 16, 8), (20, 1, (600, 500), 4, 50, 7),
)  # fmt: skip
MORE = tuple((64, 2, grid, topk, 7, 7) for grid, topk in ((56, 2), (56, 4), (56, 8), (56, 16), (14, 4), (28, 4)))
BOUNDS = [(name, "sdpa") for name in ("bra_gathered", "window", "full")]
COMPILED = [("bra", "reference"), ("bra", "sdpa")]


def kept(values: Values) -> bool:
    """Large batches of small grids; on a GPU fp32 as it is, bf16 in every way; on a CPU what takes it no minutes."""
    small, compiled, graph = values["grid"] in (14, 28, 56), values["compiled"], values["cuda_graph"]
    impl, shape = values["impl"], tuple(values[name] for name in SHAPE)
    peer = (values["name"], impl) in COMPILED and shape in SHAPES
    if (compiled and not peer) or (values["batch"] > 1 and not small):
        return False
    if values["device"] == "cuda":
        return values["dtype"] == "bf16" or not (compiled or graph)
    slow = (compiled and shape != SHAPES[0]) or (impl == "flex" and not (small and shape in SHAPES))
    return not (slow or values["dtype"] == "bf16" or values["batch"] > 1 or graph or impl == "triton")


SWEEP = Sweep(
    question="How fast is each implementation of BRA, beside its bound, windows and full attention at equal width?",
    expect="sdpa beats the reference most in training, where that scatters; its bound is near at large grids. 25 min.",
    axes={
        SHAPE: SHAPES + MORE,
        ("name", "impl"): lambda: [("bra", impl) for impl in available_impls("bra")] + BOUNDS,
        "mode": ("forward", "forward_backward"), "dtype": ("fp32", "bf16"), "batch": (1, 128),
        ("compiled", "cuda_graph"): ((False, False), (True, False), (False, True)),
    },
    fixed={"side_dwconv": 5}, freed_memory="returned",
    smoke={SHAPE: SHAPES[2:3], ("name", "impl"): [*COMPILED, *BOUNDS], ("compiled", "cuda_graph"): [(False, False)]},
    keep=kept, most_macs_on_cpu=200e9, replicates=3, patience=Patience(seconds=0.3), timeout=600,
)  # fmt: skip
