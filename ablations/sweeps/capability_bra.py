"""What do BRA's routing options buy in ability?

python run_all.py --only capability_bra
"""

from typing import Any

from ablations.capability.sweep import CapabilitySweep
from ablations.harness.sweep import Axis

TOPK: dict[Axis, Any] = {"name": ("bra",), "topk": (1, 2, 4, 8, 16, 49)}
RECALL: dict[Axis, Any] = {"name": ("bra",), "task": ("recall",)}
OTHERS: dict[Axis, Any] = {"name": ("bra",), "task": ("offset", "match_digits")}
OPTIONS: tuple[dict[Axis, Any], ...] = (
    {"n_win": (2, 7, 14, "auto")},
    {("soft_routing", "diff_routing"): [(True, False), (False, True), (True, True)]},
    {"coarse_gate": (True,)},
    {"per_token_routing": (True,)},
    # One key is left of a region's four.
    {("kv_downsample_mode", "kv_downsample_ratio"): [(mode, 2) for mode in ("avgpool", "maxpool", "fracpool", "conv")]},
    {("kv_downsample_mode", "kv_per_win"): [("ada_avgpool", 1)]},
)

SWEEP = CapabilitySweep(
    question="What do topk, n_win, soft and differentiable routing, the gate and downsampled keys buy BRA in ability?",
    expect="accuracy rises with topk where keys must be found, at the price that the topk sweep measures. 15 min.",
    products=[
        {"task": ("recall",), **TOPK},
        {"task": ("match_digits",), **TOPK},
        *(RECALL | option for option in OPTIONS),
        {"task": ("offset",), **TOPK},
    ],
    smoke={"name": ("bra",), "topk": (1, 4), "task": ("recall",), "steps": (20,)},
    full=[*(OTHERS | option for option in OPTIONS), {"n_win": (14,), "task": ("recall",), **TOPK}],
    seeds=3,
)
