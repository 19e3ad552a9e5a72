"""BRA's coarse_gate and per_token_routing against an oracle: loops over images, tokens and heads."""

import itertools
import math
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from bra_oracle import (
    COARSE,
    MASKED,
    ODD,
    PADDED,
    WHOLE_REGIONS,
    Drawn,
    as_function,
    convolve,
    draw,
    inputs,
    kv,
    pad_with_noise,
    reduce_region,
    relative,
    run_or_skip,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import MODELS, Block, InvalidOption, Unsupported, build, get, options
from attention_zoo.attentions.bra import BiLevelRoutingAttention, sdpa
from attention_zoo.ops import flex_backend, regions
from attention_zoo.visualize import receptive_field, routes
from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.meters import correctness, macs, operator_times, peak_memory

IMPLS = get("bra").impls
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


def errors(impl: str, chosen: dict[str, Any], single: bool = False) -> dict[str, float]:
    """Of the output and of all gradients."""
    drawn = draw(impl, **chosen)
    weights, x = drawn.weights(), drawn.x.clone().requires_grad_()
    expected = exact(drawn, weights, x).out
    module, seen = (drawn.module.float(), drawn.x.float()) if single else (drawn.module, drawn.x.clone())
    result = run_or_skip(module, seen.requires_grad_())
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    result.backward(gradient.to(result.dtype))
    found = {
        "output": relative(result.double(), expected),
        "gradient of the input": relative(seen.grad.double(), x.grad),
    }
    for name, parameter in module.named_parameters():
        own = None if parameter.grad is None else parameter.grad.double()
        found[f"gradient of {name}"] = relative(own, weights[name].grad)
    return found


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("chosen", CASES)
def test_output_and_gradients_equal_the_oracle(chosen: dict[str, Any], impl: str) -> None:
    found = errors(impl, chosen)
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("around", ["unmodified", "soft", "masked, whole regions", "padded", "masked, conv"])
def test_triton_with_a_coarse_gate_equals_the_oracle(around: str) -> None:
    found = errors("triton", GATE | AROUND[around], single=True)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize(
    "around", [name for name in AROUND if not any(word in name for word in ("masked", "soft", "diff"))]
)
def test_uncompiled_flex_attention_with_a_coarse_gate_equals_the_oracle(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_backend, "compiled", lambda: flex_attention)
    monkeypatch.setattr(flex_backend, "unsupported", lambda *_: None)
    drawn = draw("flex", **GATE | AROUND[around])
    with torch.no_grad():
        assert relative(drawn.module(drawn.x), exact(drawn).out) < 1e-9


@pytest.mark.parametrize("around", ["unmodified", "diff", "conv, batch 2", "padded, soft, batch 2"])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_sdpa_in_fp32_without_gradients_equals_the_oracle(chosen: dict[str, Any], around: str) -> None:
    drawn = draw("sdpa", **chosen | AROUND[around])
    expected = exact(drawn).out
    with torch.no_grad():
        assert relative(drawn.module.float()(drawn.x.float()).double(), expected) < 1e-5


@pytest.mark.parametrize("chunk_bytes", [1, 4000])
@pytest.mark.parametrize("around", ["unmodified", "diff", "param, diff, soft, pooled", "one token per region, batch 2"])
def test_chunks_of_query_tokens_add_up(around: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sdpa.CHUNK_BYTES, "cpu", chunk_bytes)
    found = errors("sdpa", BOTH | AROUND[around])
    assert max(found.values()) < 1e-9, found


def test_the_comparison_can_fail() -> None:
    drawn = draw(**BOTH, topk=3)
    right = drawn.module(drawn.x)
    for wrong in (dict(topk=2), dict(per_token_routing=False), dict(coarse_gate=False), dict(qk_scale=0.2)):
        assert relative(exact(drawn, **wrong).out, right) > 1e-3, wrong


TINY = {
    "plain": {},
    "pooled by a convolution": kv("conv", downsample_ratio=2),
    "soft and differentiable": dict(param_routing=True, diff_routing=True, soft_routing=True),
    "masked, soft": dict(grid=(3, 3), auto_pad=True, mask_padding=True, diff_routing=True, soft_routing=True),
}


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("around", TINY)
def test_gradients_by_finite_differences(around: str, chosen: dict[str, Any], impl: str) -> None:
    drawn = draw(impl, **dict(dim=4, grid=(4, 4), n_win=2, topk=2, side_dwconv=3) | TINY[around] | chosen)
    run_or_skip(drawn.module, drawn.x)
    assert torch.autograd.gradcheck(as_function(drawn.module), tuple(inputs(drawn)), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_differentiable_hard_routing_of_tokens_by_finite_differences(impl: str) -> None:
    """Linearised about its routing weights, hard routing is differentiable."""
    drawn = draw(impl, **TOKEN, param_routing=True, diff_routing=True, topk=3, grid=(4, 4), n_win=2)
    output_gradient, at = torch.randn_like(drawn.x), [weight.detach() for weight in exact(drawn).weight]
    drawn.module(drawn.x).backward(output_gradient)

    def loss(name: str, entry: tuple[int, ...], step: float) -> float:
        weights = drawn.weights()
        weights[name].data[entry] += step
        return (oracle(weights, drawn.x, drawn.heads, at, **drawn.options).out * output_gradient).sum().item()

    for name, entry in (("router.emb.weight", (2, 5)), ("router.emb.bias", (7,)), ("qkv.qkv.weight", (13, 4))):
        slope = (loss(name, entry, 1e-5) - loss(name, entry, -1e-5)) / 2e-5
        assert abs(slope) > 1e-3
        assert drawn.module.get_parameter(name).grad[entry].item() == pytest.approx(slope, rel=1e-6)


def test_the_coarse_term_passes_gradients_to_queries_and_keys_that_routing_detaches() -> None:
    """With one key per region and topk 1 the fine softmax is constant, and so are its gradients."""
    fine = dict(topk=1, **kv("ada_avgpool", per_win=1))
    for gate in (False, True):
        drawn = draw(**fine, coarse_gate=gate)
        drawn.module(drawn.x).square().sum().backward()
        of_queries = drawn.module.get_parameter("qkv.qkv.weight").grad[:12].abs().max().item()
        assert of_queries > 1e-3 if gate else of_queries < 1e-9


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("more", [{}, dict(soft_routing=True), GATE], ids=str)
def test_regions_of_one_token_are_routed_as_their_token(more: dict[str, Any], impl: str) -> None:
    tokens, whole = (draw(impl, grid=(6, 6), n_win=6, topk=5, per_token_routing=on, **more) for on in (True, False))
    assert relative(tokens.module(tokens.x), whole.module(whole.x)) < 1e-12


def test_routing_to_all_regions_is_alike_for_tokens_and_regions() -> None:
    tokens, whole = (draw(topk=16, per_token_routing=on) for on in (True, False))
    assert relative(tokens.module(tokens.x), whole.module(whole.x)) < 1e-12
    fewer, some = (draw(topk=3, per_token_routing=on) for on in (True, False))
    assert relative(fewer.module(fewer.x), some.module(some.x)) > 1e-3


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_token_looks_only_at_its_own_regions(impl: str) -> None:
    """One head, unlike its neighbour, reads no token of a region that it did not choose."""
    drawn = draw(impl, **TOKEN, topk=2, heads=1, side_dwconv=0)
    index = drawn.module.routes(drawn.x)[0]  # type: ignore[operator]
    assert any(len(set(map(tuple, tile.sort(-1).values.flatten(0, 1).tolist()))) > 1 for tile in index[0].split(2, 1))
    for row, column in ((0, 0), (3, 5), (7, 7)):
        x = drawn.x.clone().requires_grad_()
        drawn.module(x)[0, row, column].sum().backward()
        met = x.grad.abs().sum(-1)[0].view(4, 2, 4, 2).sum((1, 3)).flatten() > 1e-12
        own = {row // 2 * 4 + column // 2}
        assert set(met.nonzero().flatten().tolist()) | own == set(index[0, row, column].tolist()) | own


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "around",
    ["unmodified", "masked, whole regions", "padded"],
)
def test_routes_of_tokens_lie_on_the_grid(around: str, impl: str) -> None:
    drawn = draw(impl, **TOKEN | AROUND[around] | (dict(grid=(7, 11), batch=2) if around == "padded" else {}))
    try:
        index, weight = drawn.module.routes(drawn.x)  # type: ignore[operator]
    except Unsupported as reason:
        pytest.skip(str(reason))
    expected = exact(drawn)
    assert index.shape == weight.shape == (*drawn.x.shape[:3], expected.index[0].shape[-1])
    assert torch.equal(index.flatten(1, 2), torch.stack(expected.index))
    assert relative(weight.flatten(1, 2), torch.stack(expected.weight)) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_gate_of_zero_is_no_gate_and_of_one_adds_full_attention_of_single_tokens(impl: str) -> None:
    tokens = dict(grid=(6, 6), n_win=6, side_dwconv=0)
    gated, off = (draw(impl, topk=5, coarse_gate=on, **tokens) for on in (True, False))
    everything, x = draw(impl, topk=36, **tokens), off.x
    for one in (gated, everything):
        one.module.load_state_dict(off.module.state_dict(), strict=False)
    gate: Any = gated.module.coarse_gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.zero_()
        assert torch.equal(gated.module(x), off.module(x))
        gate.bias.fill_(1.0)
        both = off.module(x) + everything.module(x) - off.module.get_parameter("wo.bias")
        assert relative(gated.module(x), both) < 1e-12


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("mode", ["identity", "avgpool", "conv", "fracpool"])
def test_masked_padding_reaches_no_real_token(
    mode: str, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for grid, n_win in (((10, 11), 3), ((8, 8), 7)):
        padded = dict(grid=grid, n_win=n_win, auto_pad=True, **kv(mode, downsample_ratio=1 if n_win == 7 else 2))
        masked, open_to_it = (draw(**padded, **chosen, mask_padding=on) for on in (True, False))
        before = masked.module(masked.x), open_to_it.module(masked.x)
        with monkeypatch.context() as patch:
            patch.setattr(regions, "pad_to_multiple", pad_with_noise)
            assert relative(masked.module(masked.x), before[0]) < 1e-12
            assert relative(open_to_it.module(masked.x), before[1]) > 1e-3


def test_off_they_add_no_parameter_and_on_only_the_gate() -> None:
    names = {how: list(draw(**chosen).module.state_dict()) for how, chosen in ({"off": {}} | CHOSEN).items()}
    assert names["off"] == ["qkv.qkv.weight", "qkv.qkv.bias", "lepe.weight", "lepe.bias", "wo.weight", "wo.bias"]
    assert names["token"] == names["off"] and DEFAULTS["coarse_gate"] is DEFAULTS["per_token_routing"] is False
    assert names["gate"] == names["both"] == [*names["off"], "coarse_gate.weight", "coarse_gate.bias"]


def test_the_gate_leaves_the_other_weights_of_a_seed_as_they_are() -> None:
    made = []
    for on in (False, True):
        torch.manual_seed(0)
        made.append(build("bra", dim=8, num_heads=2, n_win=2, topk=1, coarse_gate=on).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_macs_by_hand() -> None:
    """A 56 x 56 grid of 7 x 7 regions, dim 64, topk 4: the split of each option against that without."""
    off, gate, token, both = (
        build("bra", dim=64, num_heads=2, n_win=7, topk=4, **chosen).macs(56, 56)  # type: ignore[operator]
        for chosen in ({}, GATE, TOKEN, BOTH)
    )
    assert (off.projection, off.routing, off.attention) == (4 * 3136 * 64**2, 49**2 * 64, 3136 * 256 * 128)
    assert (gate.projection, gate.routing) == (5 * 3136 * 64**2, 49**2 * 64)
    assert (token.projection, token.routing, token.attention) == (off.projection, 3136 * 49 * 64, off.attention)
    assert gate.attention == off.attention + 49**2 * 128 == both.attention
    assert (both.projection, both.routing) == (gate.projection, token.routing)
    assert len({part.local_conv for part in (off, gate, token, both)}) == 1


@pytest.mark.parametrize("chosen", CASES)
def test_macs_and_key_count_are_what_runs(chosen: dict[str, Any]) -> None:
    for impl in IMPLS:
        drawn = draw(impl, **chosen)
        height, width = drawn.x.shape[1:3]
        module = drawn.module.float().to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad(), suppress(Unsupported):
            module(drawn.x[:1].float().to("meta"))
            assert module.macs(height, width).total == counter.get_total_flops() // 2, impl  # type: ignore[operator]
        assert counter.get_total_flops() or impl != "reference"
    without = draw(impl, **chosen | dict(coarse_gate=False)).module
    coarse = module.regions_per_side(height, width) ** 2 if chosen.get("coarse_gate") else 0  # type: ignore[operator]
    keys = (m.kv_tokens_per_query(height, width) for m in (module, without))  # type: ignore[operator]
    assert next(keys) == next(keys) + coarse


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_fvcore_counts_them(chosen: dict[str, Any], impl: str, unchecked: None) -> None:
    drawn = draw(impl, **chosen, topk=3)
    run_or_skip(drawn.module, drawn.x)
    assert macs.by_fvcore(Workload(drawn.module, drawn.x)) == drawn.module.macs(8, 8).total  # type: ignore[operator]


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("auto_pad", [False, True])
@pytest.mark.parametrize("grid", [(56, 56), (16, 64), (60, 36), (37, 37)])
def test_auto_regions_cost_least(grid: tuple[int, int], auto_pad: bool, chosen: dict[str, Any]) -> None:
    def built(n_win: int | str) -> Any:
        return build("bra", dim=8, num_heads=2, n_win=n_win, topk=4, auto_pad=auto_pad, **chosen)

    admissible = [s for s in range(2, min(grid) + 1) if auto_pad or not (grid[0] % s or grid[1] % s)]
    if admissible:
        assert built("auto").macs(*grid).total == min(built(s).macs(*grid).total for s in admissible)


def test_exponents() -> None:
    def exponent(**chosen: Any) -> float:
        return build("bra", dim=8, num_heads=2, **chosen).exponent  # type: ignore[return-value]

    assert [exponent(n_win="auto", **chosen) for chosen in CHOSEN.values()] == [4 / 3, 3 / 2, 3 / 2]
    assert [exponent(**chosen) for chosen in CHOSEN.values()] == [2, 2, 2]
    for chosen, power in (({}, 4 / 3), (TOKEN, 3 / 2)):
        # From 64 to 4096 tokens per side the best S grows by a whole number of doublings.
        auto = build("bra", dim=8, num_heads=2, n_win="auto", **chosen)
        costs = [auto.macs(side, side) for side in (2**6, 2**12)]  # type: ignore[operator]
        small, large = (cost.routing + cost.attention for cost in costs)
        assert math.log(large / small, 2**12) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_predicted_memory_is_the_measured(chosen: dict[str, Any], impl: str, mode: Any) -> None:
    case = Case("bra", 28, 28, options=tuple(chosen.items()), impl=impl, mode=mode)
    measured, predicted = peak_memory.measure(case.workload("cpu")), peak_memory.predict(case.workload("meta"))
    assert predicted.base == measured.base < predicted.peak
    assert predicted.peak == pytest.approx(measured.peak, rel=1e-3 if impl == "reference" else 2e-2)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_the_coarse_term_is_a_stage(impl: str) -> None:
    for chosen in CHOSEN.values():
        module = build("bra", dim=8, num_heads=2, n_win=2, topk=1, impl=impl, **chosen)
        work = Workload(module, torch.randn(1, 8, 8, 8), "forward_backward")
        stages = {one["name"]: one for one in operator_times.breakdown(work, "cpu")["stages"]}
        gated = {"bra.coarse"} if "coarse_gate" in chosen else set()
        assert set(stages) == {"bra.project", "bra.route", "bra.attend", "bra.lepe", "bra.output"} | gated
        # The means of keys that sdpa routes by serve the coarse term too.
        shared = {"bra.route"} if gated and impl == "sdpa" else set()
        assert {name for name, part in stages.items() if part["backward_ms"]} == set(stages) - {"bra.route"} | shared


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("more", [{}, dict(soft_routing=True, diff_routing=True)], ids=str)
def test_they_pass_the_correctness_gate(chosen: dict[str, Any], more: dict[str, Any]) -> None:
    case = Case("bra", 14, 14, 16, 4, options=tuple((chosen | more).items()), impl="sdpa", batch=2)
    result = correctness.check(case)
    assert result is not None and result.ok and result.flipped is not None, result


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_routes_of_tokens_can_be_imposed(impl: str) -> None:
    drawn = draw(impl, **TOKEN, topk=3)
    drawn.module.keep_routes = True
    before = drawn.module(drawn.x)
    router: Any = drawn.module.router
    router.imposed = drawn.module.kept_routes.flip(-1)
    assert relative(drawn.module(drawn.x), before) < 1e-12
    router.imposed = (drawn.module.kept_routes + 1) % 16
    assert relative(drawn.module(drawn.x), before) > 1e-3


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("flex", "FlexAttention's mask.*per_token_routing=True.*valid"),
        ("triton", "kernels.*per_token_routing=True.*valid"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_who_routes_no_single_tokens_says_so(impl: str, message: str, device: str) -> None:
    module = build("bra", dim=8, num_heads=2, n_win=1, topk=1, impl=impl, **TOKEN).to(device)
    with torch.no_grad(), pytest.raises(Unsupported, match=f"impl='{impl}': .*{message}"):
        module(torch.randn(1, 8, 8, 8, device=device))
    module.impl = "auto"
    assert module.chosen_impl(torch.randn(1, 8, 8, 8, device=device)) == "sdpa"  # type: ignore[operator]


@pytest.mark.parametrize("impl", ["sdpa", "flex"])
def test_masked_padding_is_still_refused_by_who_masks_none(impl: str) -> None:
    drawn = draw(impl, **GATE | MASKED)
    with torch.no_grad(), pytest.raises(Unsupported, match=r"masks no padding|regions are"):
        drawn.module.float()(drawn.x.float())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(coarse_gate=1), "coarse_gate=1 is not valid; valid: true, false"),
        (dict(per_token_routing="yes"), "per_token_routing='yes' is not valid; valid: true, false"),
        (TOKEN | dict(param_routing=True), "param_routing=True needs diff_routing=True"),
        (TOKEN | dict(topk=17), "exceeds the 16 regions of n_win=4; valid: 1 to 16"),
        (BOTH | dict(grid=(8, 10)), "n_win=4 does not divide the 8 x 10 grid; pass auto_pad=True"),
        (BOTH | kv("avgpool", downsample_ratio=3), "valid: 1 to 2"),
    ],
)
def test_what_is_not_valid_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        drawn = draw(**chosen)
        drawn.module(drawn.x)


def test_a_block_and_a_model_pass_them_on() -> None:
    for attention in (None, "bra"):
        block = Block(8, num_heads=2, n_win=2, topk=1, attention=attention, **BOTH)
        assert block.attn.per_token_routing and isinstance(block.attn.coarse_gate, nn.Linear)
        off = Block(8, num_heads=2, n_win=2, topk=1, attention=attention)
        assert not off.attn.per_token_routing and off.attn.coarse_gate is None
    for topk in (0, -1, -2):
        assert [n for n, _ in Block(8, topk=topk, **BOTH).named_parameters()] == [
            n for n, _ in Block(8, topk=topk).named_parameters()
        ]
    with torch.device("meta"):
        model = MODELS["biformer_tiny"](**BOTH)
        attentions = [m for m in model.modules() if isinstance(m, BiLevelRoutingAttention)]
        assert len(attentions) == 12 and all(m.per_token_routing and m.coarse_gate for m in attentions)
        assert MODELS["biformer_tiny"](**TOKEN).state_dict().keys() == MODELS["biformer_tiny"]().state_dict().keys()


def test_a_model_with_them_counts_its_macs() -> None:
    with torch.device("meta"):
        model, x = MODELS["biformer_tiny"](**BOTH), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        assert model.macs(224, 224).total == counter.get_total_flops() // 2  # type: ignore[operator]


def test_drawn_routes_are_those_of_the_token_asked_for() -> None:
    picture = torch.rand(3, 40, 60)
    side, channels = 7, receptive_field.DIM
    grid = side * -(-receptive_field.GRID // side)
    x = receptive_field.features(picture, grid, grid)[0]
    keys = x.view(side, grid // side, side, grid // side, channels).mean((1, 3)).flatten(0, 1)
    drawn = set()
    for query in ((39, 30), (36, 26), (0, 0)):
        result = routes.by_appearance(picture, query, **TOKEN)
        token = x[query[0] * grid // 40, query[1] * grid // 60]
        best, index = (token @ keys.T * channels**-0.5).topk(8)
        assert result.ranked[8][0] == index.tolist()
        torch.testing.assert_close(torch.tensor(result.ranked[8][1]), best.softmax(0))
        drawn.add((result.region, tuple(result.ranked[8][0])))
    assert len(drawn) == 3 and len({region for region, _ in drawn}) == 2


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_hooks_see_the_gate(chosen: dict[str, Any]) -> None:
    for impl in ("reference", "sdpa"):
        drawn, seen = draw(impl, **chosen), []
        for name, part in drawn.module.named_modules():
            if name == "coarse_gate":
                part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        drawn.module(drawn.x)
        assert len(seen) == ("coarse_gate" in chosen)
