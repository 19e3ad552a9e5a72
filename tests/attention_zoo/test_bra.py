"""BRA against an independent oracle: loops over images, regions and heads, written from the definition."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, Unsupported, build, get
from attention_zoo.attentions.bra import sdpa
from attention_zoo.attentions.bra.kv_downsample import MODES, KVDownsample
from attention_zoo.attentions.bra.routing import optimal_regions_per_side
from attention_zoo.ops import regions
from profiling.cases.workload import Workload
from profiling.meters import macs

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


SETS: dict[str, dict[str, Any]] = {
    "topk 1": dict(topk=1),
    "topk 3": dict(topk=3),
    "topk all": dict(topk=16),
    "one region": dict(n_win=1, topk=1),
    "one token per region": dict(n_win=8, topk=9),
    "n_win 7, batch 2": dict(grid=(14, 14), n_win=7, topk=4, batch=2, heads=3),
    "1 head": dict(heads=1),
    "3 heads": dict(heads=3),
    "4 heads, batch 2": dict(heads=4, batch=2),
    "qk_dim below dim": dict(qk_dim=6),
    "qk_dim above dim": dict(qk_dim=20, heads=4),
    "qk_scale": dict(qk_scale=0.13),
    "no output projection": dict(param_attention="qkv"),
    "no LePE": dict(side_dwconv=0),
    "LePE 3": dict(side_dwconv=3),
    "wide grid": dict(grid=(4, 12)),
    "tall grid, batch 2": dict(grid=(12, 8), batch=2),
    "avgpool": COARSE | kv("avgpool", downsample_ratio=3),
    "avgpool, remainder": ODD | kv("avgpool", downsample_ratio=2),
    "avgpool 1": COARSE | kv("avgpool", downsample_ratio=1),
    "maxpool": COARSE | kv("maxpool", downsample_ratio=3),
    "maxpool, remainder": ODD | kv("maxpool", downsample_ratio=4),
    "ada_avgpool": COARSE | kv("ada_avgpool", per_win=3),
    "ada_avgpool, uneven": ODD | kv("ada_avgpool", per_win=4),
    "ada_avgpool, more than there are": ODD | kv("ada_avgpool", per_win=6),
    "ada_maxpool": COARSE | kv("ada_maxpool", per_win=2),
    "ada_maxpool, uneven, qk_dim": ODD | kv("ada_maxpool", per_win=4) | dict(qk_dim=6),
    "fracpool": COARSE | kv("fracpool", downsample_ratio=2),
    "fracpool, uneven": ODD | kv("fracpool", downsample_ratio=2, downsample_kernel=3),
    "conv as it starts": COARSE | kv("conv", downsample_ratio=3) | dict(initial_conv=True),
    "conv": COARSE | kv("conv", downsample_ratio=3),
    "conv, kernel 3": ODD | kv("conv", downsample_ratio=2, downsample_kernel=3),
    "conv, kernel 5, qk_dim": ODD | kv("conv", downsample_ratio=2, downsample_kernel=5) | dict(qk_dim=6, batch=2),
    "diff": dict(diff_routing=True),
    "diff, soft": dict(diff_routing=True, soft_routing=True),
    "soft": dict(soft_routing=True),
    "param, diff": dict(param_routing=True, diff_routing=True, heads=3),
    "param, diff, soft": dict(param_routing=True, diff_routing=True, soft_routing=True, batch=2),
    "param, diff, soft, pooled": COARSE
    | kv("ada_avgpool", per_win=2)
    | dict(param_routing=True, diff_routing=True, soft_routing=True, qk_dim=8),
    "padded": PADDED,
    "padded, batch 2, LePE 3": dict(grid=(5, 11), n_win=3, auto_pad=True, batch=2, side_dwconv=3),
    "padded, whole regions": WHOLE_REGIONS,
    "padded, pooled": dict(grid=(10, 11), n_win=3, auto_pad=True) | kv("maxpool", downsample_ratio=2),
    "padded, diff, soft": PADDED | dict(diff_routing=True, soft_routing=True),
    "padded, nothing to pad": dict(auto_pad=True),
    "masked": MASKED,
    "masked, topk all": MASKED | dict(topk=16, batch=2),
    "masked, whole regions": WHOLE_REGIONS | dict(mask_padding=True),
    "masked, whole regions, topk all": WHOLE_REGIONS | dict(mask_padding=True, topk=49),
    "masked, param, diff": MASKED | dict(param_routing=True, diff_routing=True),
    "masked, param, diff, soft": WHOLE_REGIONS
    | dict(mask_padding=True, topk=20, param_routing=True, diff_routing=True, soft_routing=True),
} | {
    f"masked, {mode}": dict(grid=(10, 11), n_win=3, topk=3, auto_pad=True, mask_padding=True, qk_dim=8)
    | kv(mode, per_win=3, downsample_ratio=2, downsample_kernel=3 if mode == "conv" else None)
    for mode in MODES
}  # fmt: skip


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


def parity(name: str, impl: str) -> tuple[dict[str, float], float]:
    """Errors of output and gradients in fp64, and of the output in fp32, of one option set."""
    drawn = draw(impl, **SETS[name])
    weights, x = drawn.weights(), drawn.x.clone().requires_grad_()
    exact = oracle(weights, x, drawn.heads, **drawn.options).out
    result = run_or_skip(drawn.module, args := drawn.x.clone().requires_grad_())
    gradient = torch.randn(result.shape, dtype=result.dtype)
    exact.backward(gradient)
    result.backward(gradient)
    errors = {"output": relative(result, exact), "gradient of the input": relative(args.grad, x.grad)}
    for parameter, value in drawn.module.named_parameters():
        errors[f"gradient of {parameter}"] = relative(value.grad, weights[parameter].grad)
    with torch.no_grad():
        errors["output without gradients"] = relative(run_or_skip(drawn.module, drawn.x), exact)
    single = run_or_skip(drawn.module.float(), drawn.x.float())
    return errors, relative(single.double(), exact)


@pytest.mark.parametrize("impl", get("bra").impls)
@pytest.mark.parametrize("name", SETS)
def test_output_and_gradients_equal_the_oracle(name: str, impl: str) -> None:
    errors, single = parity(name, impl)
    assert max(errors.values()) < 1e-9, errors
    assert single < 1e-5


@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
@pytest.mark.parametrize("name", ["n_win 7, batch 2", "conv, kernel 5, qk_dim", "param, diff, soft, pooled", "diff"])
def test_chunks_of_query_regions_add_up(name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sdpa.CHUNK_BYTES, "cpu", chunk_bytes)
    errors, single = parity(name, "sdpa")
    assert max(errors.values()) < 1e-9, errors
    assert single < 1e-5


@pytest.mark.parametrize("convolved_from", [0, 1 << 62])
@pytest.mark.parametrize("name", [name for name in SETS if not name.startswith("masked")])
def test_sdpa_without_gradients_equals_the_oracle(
    name: str, convolved_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "CONVOLVED_FROM", convolved_from)
    drawn = draw("sdpa", **SETS[name])
    exact = drawn.oracle().out
    with torch.no_grad():
        assert relative(drawn.module.float()(drawn.x.float()).double(), exact) < 1e-5


@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_runs_the_hooks_and_subclasses_of_its_parts(grad: bool) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def seen_by(module: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name in ("qkv", "qkv.qkv", "lepe", "wo"):
            part = module.get_submodule(name)
            part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        return seen

    drawn = draw("sdpa", **SETS["topk 3"])
    reference = draw("reference", **SETS["topk 3"])
    reference.module.load_state_dict(drawn.module.state_dict())
    for module in (drawn.module, reference.module):
        adapted = Adapted(*module.wo.weight.T.shape).double()
        adapted.load_state_dict(module.wo.state_dict())
        module.wo = adapted
    with torch.set_grad_enabled(grad):
        assert relative(drawn.module(drawn.x), reference.module(drawn.x)) < 1e-12
        fast, slow = seen_by(drawn.module), seen_by(reference.module)
        assert relative(drawn.module(drawn.x), reference.module(drawn.x)) < 1e-12
    assert set(fast) == set(slow) == {"qkv", "qkv.qkv", "lepe", "wo"}
    for name in ("lepe", "wo"):
        assert relative(fast[name], slow[name]) < 1e-12, name


def test_sdpa_takes_a_routing_factor_of_another_type() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 3, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    factor = torch.rand(4, 2, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0]])
    sdpa._RoutedAttention.apply(q, k, v, index, factor, 2, 0.5)[0].sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, factor)]
    sdpa._RoutedAttention.apply(*exact[:3], index, exact[3], 2, 0.5)[0].sum().backward()
    for result, expected in zip((q, k, v, factor), exact, strict=True):
        assert result.grad.dtype == result.dtype
        assert relative(result.grad.double(), expected.grad) < 0.02


@pytest.mark.parametrize("name", [name for name in SETS if not name.startswith("masked")])
def test_macs_and_key_count_are_what_runs(name: str) -> None:
    drawn = draw(**SETS[name])
    height, width = drawn.x.shape[1:3]
    assert drawn.module.kv_tokens_per_query(height, width) == drawn.oracle().keys
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        drawn.module.to("meta")(drawn.x[:1].to("meta"))
    assert drawn.module.macs(height, width).total == counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize("impl", get("bra").impls)
@pytest.mark.parametrize("name", [name for name in SETS if not name.startswith("masked")])
def test_fvcore_counts_every_implementation(name: str, impl: str, unchecked: None) -> None:
    drawn = draw(impl, **SETS[name])
    run_or_skip(drawn.module, drawn.x)
    counted = macs.by_fvcore(Workload(drawn.module, drawn.x))
    products = drawn.module.macs(*drawn.x.shape[1:3]).total * len(drawn.x)
    # fvcore also counts adaptive pooling, which is no product.
    assert products <= counted <= 1.05 * products


def test_the_comparison_can_fail() -> None:
    drawn = draw()
    weights = drawn.weights()
    right = drawn.module(drawn.x)
    assert relative(oracle(weights, drawn.x, 2, **drawn.options | dict(topk=3)).out, right) > 1e-3
    assert relative(oracle(weights, drawn.x, 2, **drawn.options | dict(qk_scale=0.2)).out, right) > 1e-3
    assert relative(oracle(weights, drawn.x, 3, **drawn.options).out, right) > 1e-3
    weights["qkv.qkv.weight"].data[0, 0] += 1e-6
    assert relative(oracle(weights, drawn.x, 2, **drawn.options).out, right) > 1e-9


def as_stripes(x: Tensor, side: int) -> Tensor:
    """Replace the windows by runs of consecutive tokens, as a wrong reshape of the grid would."""
    batch, height, width, dim = x.shape
    runs = x.reshape(batch, side, side, height // side, width // side, dim)
    return runs.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def from_stripes(x: Tensor, side: int) -> Tensor:
    batch, height, width, dim = x.shape
    windows = x.reshape(batch, side, height // side, side, width // side, dim)
    return windows.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def test_regions_are_windows_not_stripes() -> None:
    drawn = draw(side_dwconv=0)
    assert torch.equal(from_stripes(as_stripes(drawn.x, 4), 4), drawn.x)
    striped = oracle(drawn.weights(), as_stripes(drawn.x, 4), 2, **drawn.options).out
    assert relative(drawn.module(drawn.x), drawn.oracle().out) < 1e-9
    assert relative(drawn.module(drawn.x), from_stripes(striped, 4)) > 1e-2


def full_attention(drawn: Drawn) -> Tensor:
    """Every token attends to every token of its image, plus LePE of the values, with the weights of BRA."""
    weights, out = drawn.weights(), []
    for image in drawn.x @ weights["qkv.qkv.weight"].T + weights["qkv.qkv.bias"]:
        q, k, v = image.flatten(0, 1).chunk(3, 1)
        mixed = softmax_average(q, k, v, drawn.heads, q.shape[1] ** -0.5).view_as(drawn.x[0])
        out.append(mixed + convolve(image.chunk(3, 2)[2], weights["lepe.weight"], weights["lepe.bias"]))
    return torch.stack(out) @ weights["wo.weight"].T + weights["wo.bias"]


@pytest.mark.parametrize(("n_win", "grid"), [(1, (8, 8)), (2, (8, 8)), (4, (8, 12)), (8, (8, 8))])
def test_all_regions_are_full_attention(n_win: int, grid: tuple[int, int]) -> None:
    drawn = draw(n_win=n_win, topk=n_win**2, grid=grid, batch=2)
    assert relative(drawn.module(drawn.x), full_attention(drawn)) < 1e-12


@pytest.mark.parametrize("case", [MASKED | dict(topk=16), WHOLE_REGIONS | dict(topk=49, mask_padding=True)])
def test_all_regions_with_masked_padding_are_full_attention_of_the_unpadded_grid(case: dict[str, Any]) -> None:
    drawn = draw(**case, batch=2)
    assert relative(drawn.module(drawn.x), full_attention(drawn)) < 1e-12
    attends_padding = draw(**case | dict(mask_padding=False), batch=2)
    assert relative(attends_padding.module(drawn.x), full_attention(drawn)) > 1e-3


def pad_with_noise(x: Tensor, rows: int, cols: int) -> Tensor:
    height, width = x.shape[1:3]
    bottom, right = -height % rows, -width % cols
    if not (bottom or right):
        return x
    padded = F.pad(x, (0, 0, 0, right, 0, bottom))
    noise = 9 * torch.randn_like(padded)
    noise[:, :height, :width] = 0
    return padded + noise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("grid", "n_win"), [((10, 11), 3), ((8, 8), 7)])
def test_masked_padding_does_not_reach_a_real_token(
    mode: str, grid: tuple[int, int], n_win: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = kv(mode, per_win=2, downsample_ratio=2)
    masked = draw(grid=grid, n_win=n_win, auto_pad=True, mask_padding=True, **small)
    open_to_it = draw(grid=grid, n_win=n_win, auto_pad=True, **small)
    before = masked.module(masked.x), open_to_it.module(masked.x)
    monkeypatch.setattr(regions, "pad_to_multiple", pad_with_noise)
    assert relative(masked.module(masked.x), before[0]) < 1e-12
    assert relative(open_to_it.module(masked.x), before[1]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_masking_changes_nothing_where_nothing_is_padded(mode: str) -> None:
    options = COARSE | dict(auto_pad=True) | kv(mode, per_win=2, downsample_ratio=2)
    unmodified, masked = draw(**options), draw(**options, mask_padding=True)
    assert torch.equal(unmodified.module(unmodified.x), masked.module(unmodified.x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("topk", [1, 3, 9])
@pytest.mark.parametrize(("grid", "n_win"), [((8, 8), 7), ((7, 7), 3), ((9, 4), 4)])
def test_masked_results_and_gradients_are_finite(mode: str, topk: int, grid: tuple[int, int], n_win: int) -> None:
    routing = dict(diff_routing=True, soft_routing=True, param_routing=True, auto_pad=True, mask_padding=True)
    smallest_side = min(-(-side // n_win) for side in grid)
    for ratio in range(1, min(2, smallest_side) + 1):
        drawn = draw(grid=grid, n_win=n_win, topk=topk, **routing, **kv(mode, per_win=2, downsample_ratio=ratio))
        x = drawn.x.clone().requires_grad_()
        out = drawn.module(x)
        out.square().sum().backward()
        assert out.isfinite().all()
        for gradient in (x.grad, *(p.grad for p in drawn.module.parameters())):
            assert gradient.isfinite().all() and (gradient.any() or topk == 1)


def test_masked_average_is_of_real_tokens_only() -> None:
    tile = torch.arange(32.0).reshape(1, 2, 4, 4)
    valid = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    valid[..., :3, :2] = True
    for mode, options in (("avgpool", (4, 2)), ("ada_avgpool", (2, 4))):
        reduced, seen = KVDownsample(2, mode, *options, None).masked(tile, valid)
        assert seen.tolist() == [[[[True, False], [True, False]]]]
        assert reduced[0, :, :, 0].tolist() == [[2.5, 8.5], [18.5, 24.5]]


def test_routes() -> None:
    drawn = draw(batch=2, grid=(8, 12), topk=5)
    index, weight = drawn.module.routes(drawn.x)
    exact = drawn.oracle()
    assert torch.equal(index, exact.index)
    assert relative(weight, exact.weight) < 1e-12
    assert index.shape == weight.shape == (2, 16, 5)
    assert torch.allclose(weight.sum(-1), torch.ones(2, 16, dtype=weight.dtype), atol=1e-12)
    assert (weight.diff(dim=-1) <= 0).all() and weight[..., 0].min() > weight[..., -1].max() / 10
    assert all(len(set(row)) == 5 for row in index.flatten(0, 1).tolist())
    assert not weight.requires_grad


def test_masked_routes_end_with_regions_of_padding_at_weight_zero() -> None:
    drawn = draw(**WHOLE_REGIONS, mask_padding=True, topk=20)
    index, weight = drawn.module.routes(drawn.x)
    exact = drawn.oracle()
    real = torch.tensor([7 * row + column for row in range(4) for column in range(4)])
    assert torch.equal(index[0, real, :16], exact.index[0, real])
    assert relative(weight[0, real, :16], exact.weight[0, real]) < 1e-12
    assert torch.isin(index[..., :16], real).all() and not torch.isin(index[..., 16:], real).any()
    assert not weight[..., 16:].any()


def gradients(drawn: Drawn, output_gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = drawn.module(drawn.x)
    return out, dict(
        zip(
            dict(drawn.module.named_parameters()),
            torch.autograd.grad(out, list(drawn.module.parameters()), output_gradient),
            strict=True,
        )
    )


def test_differentiable_hard_routing_is_plain_forward_and_soft_backward() -> None:
    unmodified, hard = draw(), draw(diff_routing=True)
    output_gradient = torch.randn_like(unmodified.x)
    (out, detached), (same, through) = gradients(unmodified, output_gradient), gradients(hard, output_gradient)
    assert torch.equal(out, same)
    assert relative(through["qkv.qkv.weight"][:24], detached["qkv.qkv.weight"][:24]) > 1e-3
    assert relative(through["qkv.qkv.weight"][24:], detached["qkv.qkv.weight"][24:]) < 1e-12


def test_differentiable_hard_routing_by_finite_differences() -> None:
    """Linearised about its routing weights, hard routing is differentiable."""
    drawn = draw(param_routing=True, diff_routing=True, topk=3)
    output_gradient = torch.randn_like(drawn.x)
    result = gradients(drawn, output_gradient)[1]
    at = drawn.oracle().weight.detach()

    def loss(name: str, entry: tuple[int, ...], step: float) -> float:
        weights = drawn.weights()
        weights[name].data[entry] += step
        return (oracle(weights, drawn.x, 2, at, **drawn.options).out * output_gradient).sum().item()

    for name, entry in (("router.emb.weight", (2, 5)), ("router.emb.bias", (7,)), ("qkv.qkv.weight", (13, 4))):
        slope = (loss(name, entry, 1e-5) - loss(name, entry, -1e-5)) / 2e-5
        assert abs(slope) > 1e-3
        assert result[name][entry].item() == pytest.approx(slope, rel=1e-6)


def test_soft_routing_alone_sends_nothing_back_through_the_routes() -> None:
    soft, both = draw(soft_routing=True), draw(soft_routing=True, diff_routing=True)
    output_gradient = torch.randn_like(soft.x)
    (out, detached), (same, through) = gradients(soft, output_gradient), gradients(both, output_gradient)
    assert torch.equal(out, same)
    fixed = soft.oracle().weight.detach()
    hard = soft.options | dict(soft_routing=False)

    def loss(step: float) -> float:
        weights = soft.weights()
        weights["qkv.qkv.weight"].data[13, 4] += step
        # Linear hard routing has the gate 1 + weight - hard_at: this makes it ``fixed``, whatever the weights.
        hard_at = 1 + oracle(weights, soft.x, 2, **hard).weight - fixed
        return (oracle(weights, soft.x, 2, hard_at, **hard).out * output_gradient).sum().item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert detached["qkv.qkv.weight"][13, 4].item() == pytest.approx(slope, rel=1e-6)
    assert through["qkv.qkv.weight"][13, 4].item() != pytest.approx(slope, rel=1e-2)


def test_routing_parameters_get_gradients() -> None:
    for soft in (False, True):
        drawn = draw(param_routing=True, diff_routing=True, soft_routing=soft)
        result = gradients(drawn, torch.randn_like(drawn.x))[1]
        assert result["router.emb.weight"].norm() > 1e-3 and result["router.emb.bias"].norm() > 1e-3


def test_fracpool_is_fixed_in_eval_and_random_in_training() -> None:
    drawn = draw(**ODD, **kv("fracpool", downsample_ratio=2))
    assert torch.equal(drawn.module(drawn.x), drawn.module(drawn.x))
    drawn.module.train()
    first, *others = [drawn.module(drawn.x) for _ in range(4)]
    assert any(relative(other, first) > 1e-3 for other in others)
    torch.manual_seed(5)
    again = drawn.module(drawn.x)
    torch.manual_seed(5)
    assert torch.equal(drawn.module(drawn.x), again)


def test_fracpool_samples_all_channels_of_a_region_alike() -> None:
    pool = KVDownsample(6, "fracpool", 4, 2, 2).train()
    one = torch.randn(40, 1, 9, 11)
    pooled = pool(one.expand(-1, 6, -1, -1).contiguous())
    assert torch.equal(pooled, pooled[:, :1].expand_as(pooled))
    same_region = pool(one[:1].expand(40, 6, -1, -1).contiguous())
    assert len({tuple(region.flatten().tolist()) for region in same_region}) > 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ratio", "kernel"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (3, 5)])
def test_predicted_sizes_of_reduced_regions(mode: str, ratio: int, kernel: int) -> None:
    pool = KVDownsample(4, mode, 3, ratio, kernel).eval()
    for height in range(3, 12):
        tile = torch.randn(2, 4, height, 7)
        try:
            size = pool.out_size(height, 7)
        except InvalidOption:
            with pytest.raises(InvalidOption):
                pool(tile)
            continue
        reduced = pool(tile)
        assert size == tuple(reduced.shape[2:])
        assert reduced.isfinite().all()


STAGES = [(56, 1, 13.0, 14), (28, 4, 10.4, 14), (14, 16, 8.2, 7)]


@pytest.mark.parametrize(("side", "topk", "optimum", "chosen"), STAGES)
def test_auto_regions_of_the_models_stages(side: int, topk: int, optimum: float, chosen: int) -> None:
    assert round(optimal_regions_per_side(side * side, topk), 1) == optimum
    auto = build("bra", dim=8, num_heads=2, n_win="auto", topk=topk)
    admissible = [s for s in range(1, side + 1) if side % s == 0 and s * s >= topk]
    cost = {s: build("bra", dim=8, num_heads=2, n_win=s, topk=topk).macs(side, side).total for s in admissible}
    assert auto.regions_per_side(side, side) == min(cost, key=cost.__getitem__) == chosen
    assert auto.macs(side, side).total == cost[chosen]


@pytest.mark.parametrize("auto_pad", [False, True])
@pytest.mark.parametrize("topk", [1, 4, 9])
@pytest.mark.parametrize("grid", [(56, 56), (28, 42), (16, 64), (60, 36), (37, 37), (100, 40)])
def test_auto_regions_cost_least(grid: tuple[int, int], topk: int, auto_pad: bool) -> None:
    def built(n_win: int | str) -> nn.Module:
        return build("bra", dim=8, num_heads=2, n_win=n_win, topk=topk, auto_pad=auto_pad)

    admissible = [
        s for s in range(1, min(grid) + 1) if s * s >= topk and (auto_pad or not (grid[0] % s or grid[1] % s))
    ]
    assert built("auto").macs(*grid).total == min(built(s).macs(*grid).total for s in admissible)


def test_auto_regions_give_the_result_of_that_number() -> None:
    auto = draw(n_win="auto", topk=2, grid=(12, 12))
    chosen = auto.module.regions_per_side(12, 12)
    assert 12 % chosen == 0
    fixed = draw(n_win=chosen, topk=2, grid=(12, 12))
    assert torch.equal(auto.module(auto.x), fixed.module(auto.x))


TINY = {
    "plain": dict(),
    "pooled by a convolution": kv("conv", downsample_ratio=2),
    "soft and differentiable": dict(param_routing=True, diff_routing=True, soft_routing=True),
    "masked": dict(grid=(3, 3), auto_pad=True, mask_padding=True),
    "masked, soft, pooled": dict(grid=(3, 3), auto_pad=True, mask_padding=True, diff_routing=True, soft_routing=True)
    | kv("ada_avgpool", per_win=1),
}


@pytest.mark.parametrize("impl", get("bra").impls)
@pytest.mark.parametrize("name", TINY)
def test_gradcheck(name: str, impl: str) -> None:
    drawn = draw(impl, **dict(dim=4, grid=(4, 4), n_win=2, topk=2, side_dwconv=3) | TINY[name])
    run_or_skip(drawn.module, drawn.x)
    assert torch.autograd.gradcheck(as_function(drawn.module), tuple(inputs(drawn)), fast_mode=True)


@pytest.mark.parametrize("impl", get("bra").impls)
def test_second_derivatives_are_correct_or_unsupported(impl: str) -> None:
    drawn = draw(impl, dim=4, grid=(4, 4), n_win=2, topk=2, side_dwconv=0)
    with suppress(Unsupported):
        assert torch.autograd.gradgradcheck(as_function(drawn.module), tuple(inputs(drawn)), fast_mode=True)


def as_function(module: nn.Module) -> Callable[..., Tensor]:
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: functional_call(module, dict(zip(names, values, strict=True)), (x,))


def inputs(drawn: Drawn) -> Iterator[Tensor]:
    yield drawn.x.clone().requires_grad_()
    yield from drawn.weights().values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(param_routing=True), "diff_routing"),
        (dict(topk=17), "1 to 16"),
        (dict(qk_dim=7), "not divisible"),
        (dict(side_dwconv=4), "odd"),
        (dict(grid=(8, 10)), "auto_pad"),
        (dict(grid=(7, 5), n_win="auto"), "auto_pad"),
        (kv("conv", downsample_ratio=2, downsample_kernel=1), "at least 2"),
        (kv("avgpool", downsample_ratio=3), "1 to 2"),
        (kv("fracpool", downsample_ratio=1, downsample_kernel=3), "too large"),
    ],
)
def test_what_is_not_valid_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        drawn = draw(**options)
        drawn.module(drawn.x)


def test_a_refused_grid_has_no_macs_either() -> None:
    with pytest.raises(InvalidOption, match="auto_pad"):
        build("bra", dim=8, num_heads=2, n_win=4, topk=1).macs(8, 10)
