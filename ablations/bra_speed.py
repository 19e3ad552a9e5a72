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
BOUNDS, SMALL = [(name, "sdpa") for name in ("bra_gathered", "window", "full")], (14, 28, 56)
COMPILED, GRAPHED = [("bra", "reference"), ("bra", "sdpa")], [*BOUNDS[1:2], ("bra", "reference"), ("bra", "triton")]


def kept(values: Values) -> bool:
    """Ways to launch for a few contestants, large batches of small grids; on a CPU what takes it no minutes."""
    compiled, graph, batch, impl, grid = (values[n] for n in ("compiled", "cuda_graph", "batch", "impl", "grid"))
    who, shape, plain = (values["name"], impl), tuple(values[n] for n in SHAPE), not (compiled or graph)
    odd = (compiled and who not in COMPILED) or (graph and who not in GRAPHED) or (batch > 1 and grid not in SMALL)
    if odd or (batch > 1 and not plain) or ((batch > 1 or not plain) and shape not in SHAPES):
        return False
    if values["device"] == "cpu":
        slow = (compiled and shape != SHAPES[0]) or (impl == "flex" and shape not in SHAPES[:3])
        return not (slow or graph or batch > 1 or impl == "triton" or values["dtype"] == "bf16")
    once = plain and batch == 1 and shape in SHAPES and values["name"] == "bra" and impl != "flex"
    return once if values["dtype"] == "fp32" else plain or grid in ((56, 112, 256) if compiled else (*SMALL, 112))


SWEEP = Sweep(
    question="How fast is each implementation of BRA, beside its bound, windows and full attention at equal width?",
    expect="sdpa beats the reference most in training, where that scatters; its bound is near at large grids. 25 min.",
    axes={
        SHAPE: SHAPES + MORE, ("name", "impl"): lambda: [("bra", impl) for impl in available_impls("bra")] + BOUNDS,
        "mode": ("forward", "forward_backward"), "dtype": ("fp32", "bf16"), "batch": (1, 128),
        ("compiled", "cuda_graph"): ((False, False), (True, False), (False, True)),
    },
    fixed={"side_dwconv": 5}, freed_memory="returned",
    smoke={SHAPE: SHAPES[2:3], ("name", "impl"): [*COMPILED, *BOUNDS], ("compiled", "cuda_graph"): [(False, False)]},
    keep=kept, most_macs_on_cpu=200e9, replicates=3, patience=Patience(seconds=0.3), timeout=600,
)  # fmt: skip
