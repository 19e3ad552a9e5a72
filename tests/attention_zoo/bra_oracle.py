"""BRA written from its definition with loops over images, regions and heads: what its implementations must equal."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from attention_zoo import Unsupported, build

DEFAULTS: dict[str, Any] = dict(
    n_win=7, topk=4, qk_dim=None, qk_scale=None, kv_downsample_mode="identity", kv_per_win=4, kv_downsample_ratio=4,
    kv_downsample_kernel=None, param_attention="qkvo", param_routing=False, diff_routing=False, soft_routing=False,
    side_dwconv=5, auto_pad=False, mask_padding=False,
)  # fmt: skip
NOT_OPTIONS = ("batch", "grid", "dim", "heads", "initial_conv")
PADDED = dict(grid=(7, 9), n_win=4, auto_pad=True)
MASKED = PADDED | dict(mask_padding=True)
WHOLE_REGIONS = dict(grid=(8, 8), n_win=7, auto_pad=True)
COARSE = dict(grid=(12, 12), n_win=2, topk=2)
"""Regions of 6 x 6, to be pooled."""
ODD = dict(grid=(14, 10), n_win=2, topk=3)
"""Regions of 7 x 5, which no ratio divides."""


def kv(mode: str, **options: Any) -> dict[str, Any]:
    return {"kv_downsample_mode": mode, **{f"kv_{name}": value for name, value in options.items()}}


class Oracle(NamedTuple):
    out: Tensor
    index: Tensor
    weight: Tensor
    keys: int


def oracle(
    weights: dict[str, Tensor], x: Tensor, heads: int, hard_at: Tensor | None = None, **args: Any
) -> Oracle:  # fmt: skip
    """BRA of an NHWC tensor, by its definition.

    ``hard_at``: routing weights about which differentiable hard routing is linearised; by default its own.
    """
    o = DEFAULTS | args
    (batch, height, width, dim), side = x.shape, o["n_win"]
    qk_dim = o["qk_dim"] or dim
    scale = o["qk_scale"] or 1 / math.sqrt(qk_dim)
    y_size, x_size = math.ceil(height / side), math.ceil(width / side)
    grid = x.new_zeros(batch, side * y_size, side * x_size, dim)
    grid[:, :height, :width] = x
    real = torch.full(grid.shape[1:3], not o["mask_padding"])
    real[:height, :width] = True
    projected = grid @ weights["qkv.qkv.weight"].T + weights["qkv.qkv.bias"]
    tiles = [
        (slice(r * y_size, (r + 1) * y_size), slice(c * x_size, (c + 1) * x_size))
        for r in range(side)
        for c in range(side)
    ]
    out, routes, routing_weights, keys = torch.zeros_like(grid), [], [], 0
    for image in range(batch):
        q, kv = projected[image, ..., :qk_dim], projected[image, ..., qk_dim:]
        index, weight = route(q, kv[..., :qk_dim], real, tiles, scale, weights, o)
        gate = routing_gate(weight, None if hard_at is None else hard_at[image], o)
        reduced = [reduce_region(kv[tile], real[tile], weights, o) for tile in tiles]
        for region, tile in enumerate(tiles):
            gathered = torch.cat([gate[region, i] * reduced[r] for i, r in enumerate(index[region].tolist())])
            keys = len(gathered)
            mixed = softmax_average(
                q[tile].flatten(0, 1), gathered[:, :qk_dim], gathered[:, qk_dim:], heads, scale
            )  # fmt: skip
            out[image][tile] = mixed.view(y_size, x_size, dim)
        if o["side_dwconv"]:
            out[image] += convolve(kv[..., qk_dim:] * real[..., None], weights["lepe.weight"], weights["lepe.bias"])
        routes.append(index)
        routing_weights.append(weight)
    if o["param_attention"] == "qkvo":
        out = out @ weights["wo.weight"].T + weights["wo.bias"]
    return Oracle(out[:, :height, :width], torch.stack(routes), torch.stack(routing_weights), keys)


def route(
    q: Tensor, k: Tensor, real: Tensor, tiles: list[Any], scale: float, weights: dict[str, Tensor], o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    q_r, k_r = (
        torch.stack([t[tile][real[tile]].mean(0) if real[tile].any() else t.new_zeros(t.shape[-1]) for tile in tiles])
        for t in (q, k)
    )
    if not o["diff_routing"]:
        q_r, k_r = q_r.detach(), k_r.detach()
    if o["param_routing"]:
        q_r, k_r = (t @ weights["router.emb.weight"].T + weights["router.emb.bias"] for t in (q_r, k_r))
    inhabited = torch.tensor([i for i, tile in enumerate(tiles) if real[tile].any()])
    scores = (q_r @ k_r[inhabited].T) * scale
    order = scores.detach().argsort(dim=1, descending=True)[:, : o["topk"]]
    best = scores.gather(1, order).exp()
    return inhabited[order], best / best.sum(1, keepdim=True)


def routing_gate(weight: Tensor, hard_at: Tensor | None, o: dict[str, Any]) -> Tensor:
    if o["soft_routing"]:
        return weight
    return 1 + weight - (weight.detach() if hard_at is None else hard_at)


def reduce_region(tile: Tensor, real: Tensor, weights: dict[str, Tensor], o: dict[str, Any]) -> Tensor:
    """The tokens that remain of one region's keys and values, (y, x, d) to (n, d); none for padding alone."""
    mode, kernel = o["kv_downsample_mode"], o["kv_downsample_kernel"] or o["kv_downsample_ratio"]
    if mode == "identity":
        return tile[real]
    if mode == "conv":
        border = (kernel - o["kv_downsample_ratio"] + 1) // 2
        tile = F.pad(tile * real[..., None], (0, 0, border, border, border, border))
        real = F.pad(real, (border, border, border, border))
    tokens = []
    for y0, y1 in cells(tile.shape[0], o, kernel):
        for x0, x1 in cells(tile.shape[1], o, kernel):
            cell, seen = tile[y0:y1, x0:x1], real[y0:y1, x0:x1]
            if not seen.any():
                continue
            if mode == "conv":
                weight = weights["kv_down.conv.weight"][:, 0].permute(1, 2, 0)
                tokens.append((cell * weight).sum((0, 1)) + weights["kv_down.conv.bias"])
            else:
                tokens.append(cell[seen].mean(0) if "avg" in mode else cell[seen].max(0).values)
    return torch.stack(tokens) if tokens else tile.new_zeros(0, tile.shape[-1])


def cells(length: int, o: dict[str, Any], kernel: int) -> list[tuple[int, int]]:
    """Where along an axis the pooled cells begin and end."""
    mode, ratio, per_win = o["kv_downsample_mode"], o["kv_downsample_ratio"], o["kv_per_win"]
    if mode.startswith("ada_"):
        return [(math.floor(i * length / per_win), math.ceil((i + 1) * length / per_win)) for i in range(per_win)]
    if mode == "conv":
        return [(start, start + kernel) for start in range(0, length - kernel + 1, ratio)]
    if mode != "fracpool":
        return [(i * ratio, (i + 1) * ratio) for i in range(length // ratio)]
    count, middle = length // ratio, 0.5
    step = (length - kernel) / max(count - 1, 1)
    starts = [int((i + middle) * step) - int(middle * step) for i in range(count - 1)] + [length - kernel]
    return [(start, start + kernel) for start in starts]


def softmax_average(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    out = []
    for q_head, k_head, v_head in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = scale * q_head @ k_head.T
        shares = (scores - scores.detach().max()).exp()
        out.append(shares / shares.sum(1, keepdim=True) @ v_head)
    return torch.cat(out, 1)


def convolve(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise, zero-padded, of an (h, w, c) tensor."""
    size = weight.shape[-1]
    around = F.pad(v, (0, 0, *[size // 2] * 4))
    shifted = (
        around[i : i + v.shape[0], j : j + v.shape[1]] * weight[:, 0, i, j] for i in range(size) for j in range(size)
    )
    return sum(shifted, start=bias)


class Drawn(NamedTuple):
    """A module in fp64 with random weights that fp32 can hold, and an input."""

    module: nn.Module
    x: Tensor
    heads: int
    options: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone().requires_grad_() for name, p in self.module.named_parameters()}

    def oracle(self) -> Oracle:
        return oracle(self.weights(), self.x, self.heads, **self.options)


def draw(impl: str = "reference", **chosen: Any) -> Drawn:
    torch.manual_seed(3)
    args = dict(batch=1, grid=(8, 8), dim=12, heads=2, n_win=4, side_dwconv=5) | chosen
    taken = {name: value for name, value in args.items() if name not in NOT_OPTIONS}
    module = build("bra", dim=args["dim"], num_heads=args["heads"], impl=impl, **taken).eval()
    for name, parameter in module.named_parameters():
        if not (args.get("initial_conv") and name.startswith("kv_down")):
            nn.init.normal_(parameter, std=0.4)
    x = torch.randn(args["batch"], *args["grid"], args["dim"])
    return Drawn(module.double(), x.double(), args["heads"], taken)


def relative(result: Tensor | None, exact: Tensor | None) -> float:
    """Largest error over the largest exact value; a gradient that was never computed is zero."""
    if exact is None:
        return 0.0 if result is None else result.abs().max().item()
    if result is None:
        return relative(exact, None)
    return ((result - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item()


def run_or_skip(module: nn.Module, x: Tensor) -> Tensor:
    try:
        return module(x)
    except Unsupported as reason:
        pytest.skip(str(reason))


def full_attention(drawn: Drawn) -> Tensor:
    """Every token attends to every token of its image, plus LePE of the values, with the weights of BRA."""
    weights, out = drawn.weights(), []
    for image in drawn.x @ weights["qkv.qkv.weight"].T + weights["qkv.qkv.bias"]:
        q, k, v = image.flatten(0, 1).chunk(3, 1)
        mixed = softmax_average(q, k, v, drawn.heads, q.shape[1] ** -0.5).view_as(drawn.x[0])
        out.append(mixed + convolve(image.chunk(3, 2)[2], weights["lepe.weight"], weights["lepe.bias"]))
    return torch.stack(out) @ weights["wo.weight"].T + weights["wo.bias"]


def pad_with_noise(x: Tensor, rows: int, cols: int) -> Tensor:
    height, width = x.shape[1:3]
    bottom, right = -height % rows, -width % cols
    if not (bottom or right):
        return x
    padded = F.pad(x, (0, 0, 0, right, 0, bottom))
    noise = 9 * torch.randn_like(padded)
    noise[:, :height, :width] = 0
    return padded + noise


def as_function(module: nn.Module) -> Callable[..., Tensor]:
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: functional_call(module, dict(zip(names, values, strict=True)), (x,))


def inputs(drawn: Drawn) -> Iterator[Tensor]:
    yield drawn.x.clone().requires_grad_()
    yield from drawn.weights().values()
