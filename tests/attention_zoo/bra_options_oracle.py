"""BRA with coarse_gate and per_token_routing, by loops over images, tokens and heads."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from bra_oracle import COARSE, MASKED, ODD, PADDED, WHOLE_REGIONS, Drawn, convolve, kv, reduce_region
from torch import Tensor

from attention_zoo import options

DEFAULTS = {name: option.default for name, option in options("bra").items()}
GATE: dict[str, Any] = dict(coarse_gate=True)
TOKEN: dict[str, Any] = dict(per_token_routing=True)
BOTH: dict[str, Any] = GATE | TOKEN
CHOSEN = {"gate": GATE, "token": TOKEN, "both": BOTH}
AROUND: dict[str, dict[str, Any]] = {
    "unmodified": dict(topk=3),
    "topk all, 3 heads": dict(topk=16, heads=3),
    "one region": dict(n_win=1, topk=1),
    "one token per region, batch 2": dict(grid=(5, 5), n_win=5, topk=7, batch=2),
    "qk_dim, qk_scale, no projection": dict(qk_dim=6, qk_scale=0.13, param_attention="qkv", side_dwconv=0),
    "n_win auto": dict(n_win="auto", grid=(6, 4), topk=2),
    "avgpool": COARSE | kv("avgpool", downsample_ratio=3),
    "ada_maxpool, remainder": ODD | kv("ada_maxpool", per_win=2),
    "fracpool": COARSE | kv("fracpool", downsample_ratio=2),
    "conv, batch 2": COARSE | kv("conv", downsample_ratio=3) | dict(batch=2),
    "soft": dict(soft_routing=True),
    "diff": dict(diff_routing=True, batch=2),
    "param, diff": dict(param_routing=True, diff_routing=True, heads=3),
    "param, diff, soft, pooled": COARSE
    | kv("maxpool", downsample_ratio=2)
    | dict(param_routing=True, diff_routing=True, soft_routing=True),
    "padded": PADDED,
    "padded, soft, batch 2": PADDED | dict(soft_routing=True, batch=2),
    "masked": MASKED,
    "masked, whole regions": WHOLE_REGIONS | dict(mask_padding=True, topk=5),
    "masked, param, diff, soft": MASKED | dict(param_routing=True, diff_routing=True, soft_routing=True),
} | {
    f"masked, {mode}": dict(grid=(7, 8), n_win=3, topk=3, auto_pad=True, mask_padding=True)
    | kv(mode, per_win=2, downsample_ratio=2)
    for mode in ("avgpool", "ada_maxpool", "fracpool", "conv")
}  # fmt: skip
CASES = [
    pytest.param(chosen | around, id=f"{name}: {how}")
    for (name, chosen), (how, around) in itertools.product(CHOSEN.items(), AROUND.items())
]


class Oracle(NamedTuple):
    """The output; per region, or per token, its routed regions and their weights."""

    out: Tensor
    index: list[Tensor]
    weight: list[Tensor]


def oracle(
    weights: dict[str, Tensor], x: Tensor, heads: int, hard_at: list[Tensor] | None = None, **args: Any
) -> Oracle:  # fmt: skip
    """One image after another, one token after another, one head after another.

    ``hard_at``: routing weights about which differentiable hard routing is linearised; by default its own.
    """
    o = DEFAULTS | args
    (batch, height, width, dim), side = x.shape, o["n_win"]
    e = o["qk_dim"] or dim
    scale = o["qk_scale"] or e**-0.5
    tall, wide = math.ceil(height / side), math.ceil(width / side)
    padded = torch.zeros(batch, side * tall, side * wide, dim, dtype=x.dtype)
    padded[:, :height, :width] = x
    real = torch.full(padded.shape[1:3], not o["mask_padding"])
    real[:height, :width] = True
    tiles = [
        (slice(r * tall, r * tall + tall), slice(c * wide, c * wide + wide)) for r in range(side) for c in range(side)
    ]
    inhabited = [r for r, tile in enumerate(tiles) if real[tile].any()]
    result = Oracle(torch.zeros_like(x), [], [])
    for image in range(batch):
        projected = padded[image] @ weights["qkv.qkv.weight"].T + weights["qkv.qkv.bias"]
        q, k, v = projected.split([e, e, dim], dim=-1)
        mean_q, mean_k, mean_v = ({r: t[tiles[r]][real[tiles[r]]].mean(0) for r in inhabited} for t in (q, k, v))
        fewer = {r: reduce_region(projected[tiles[r]][..., e:], real[tiles[r]], weights, o) for r in inhabited}
        # Whose tokens all fall between the cells of fracpool, a region has nothing to be routed to.
        keys = {r: key for r, key in mean_k.items() if len(fewer[r])}
        by_region: dict[int, tuple[list[int], Tensor]] = {}
        if not o["per_token_routing"]:
            by_region = {r: route(mean_q[r], keys, scale, weights, o) for r in inhabited}
        asked = [by_region[r] for r in inhabited] if by_region else []
        local = (
            0 if not o["side_dwconv"] else convolve(v * real[..., None], weights["lepe.weight"], weights["lepe.bias"])
        )
        rows = []
        for row, column in itertools.product(range(height), range(width)):
            region = row // tall * side + column // wide
            if o["per_token_routing"]:
                asked.append(route(q[row, column], keys, scale, weights, o))
            index, weight = asked[-1] if o["per_token_routing"] else by_region[region]
            at = len(asked) - 1 if o["per_token_routing"] else inhabited.index(region)
            gate = factor(weight, None if hard_at is None else hard_at[image][at], o)
            near = torch.cat([gate[i] * fewer[r] for i, r in enumerate(index)])
            one = weighted(q[row, column], near[:, :e], near[:, e:], heads, scale)
            if o["side_dwconv"]:
                one = one + local[row, column]
            if o["coarse_gate"]:
                all_k, all_v = (torch.stack(list(mean.values())) for mean in (mean_k, mean_v))
                coarse = weighted(mean_q[region], all_k, all_v, heads, scale)
                one = one + coarse * (
                    weights["coarse_gate.weight"] @ x[image, row, column] + weights["coarse_gate.bias"]
                )
            if o["param_attention"] == "qkvo":
                one = weights["wo.weight"] @ one + weights["wo.bias"]
            rows.append(one)
        result.out[image] = torch.stack(rows).view(height, width, dim)
        result.index.append(torch.tensor([index for index, _ in asked]))
        result.weight.append(torch.stack([weight for _, weight in asked]))
    return result


def route(
    q: Tensor, k: dict[int, Tensor], scale: float, weights: dict[str, Tensor], o: dict[str, Any]
) -> tuple[list[int], Tensor]:
    """The regions of one region's or token's query, best first, and the softmax over their scores."""

    def described(t: Tensor) -> Tensor:
        t = t if o["diff_routing"] else t.detach()
        return weights["router.emb.weight"] @ t + weights["router.emb.bias"] if o["param_routing"] else t

    scores = {r: scale * described(q) @ described(key) for r, key in k.items()}
    best = sorted(scores, key=lambda r: -scores[r].item())[: o["topk"]]
    shares = torch.stack([(scores[r] - scores[best[0]].detach()).exp() for r in best])
    return best, shares / shares.sum()


def factor(weight: Tensor, hard_at: Tensor | None, o: dict[str, Any]) -> Tensor:
    if o["soft_routing"]:
        return weight
    return 1 + weight - (weight.detach() if hard_at is None else hard_at)


def weighted(q: Tensor, keys: Tensor, values: Tensor, heads: int, scale: float) -> Tensor:
    """Multi-head attention of one query to (n, e) keys."""
    out = []
    for one, of_k, of_v in zip(q.chunk(heads), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True):
        scores = scale * of_k @ one
        shares = (scores - scores.max().detach()).exp()
        out.append((shares[:, None] * of_v).sum(0) / shares.sum())
    return torch.cat(out)


def exact(drawn: Drawn, weights: dict[str, Tensor] | None = None, x: Tensor | None = None, **more: Any) -> Oracle:
    chosen = drawn.options | more
    x = drawn.x if x is None else x
    if chosen["n_win"] == "auto":
        chosen["n_win"] = drawn.module.regions_per_side(*x.shape[1:3])  # type: ignore[operator]
    return oracle(drawn.weights() if weights is None else weights, x, drawn.heads, **chosen)
