"""BRA's coarse_gate and per_token_routing equal an oracle of loops over images, tokens and heads."""

from typing import Any

import pytest
import torch
from bra_options_oracle import AROUND, BOTH, CASES, CHOSEN, GATE, TOKEN, exact, oracle
from bra_oracle import MASKED, as_function, draw, inputs, kv, pad_with_noise, relative, run_or_skip
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from attention_zoo import MODELS, Block, InvalidOption, Unsupported, build
from attention_zoo.attentions.bra import BiLevelRoutingAttention, kv_downsample, sdpa
from attention_zoo.ops import flex_backend, regions
from profiling.cases.case import Case
from profiling.cases.workload import Dtype
from profiling.meters import correctness


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


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("more", [{}, dict(soft_routing=True, diff_routing=True)], ids=str)
def test_they_pass_the_correctness_gate(chosen: dict[str, Any], more: dict[str, Any]) -> None:
    case = Case("bra", 14, 14, 16, 4, options=tuple((chosen | more).items()), impl="sdpa", batch=2)
    result = correctness.check(case)
    assert result is not None and result.ok and result.flipped is not None, result


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "bf16_params"])
@pytest.mark.parametrize("mode", kv_downsample.MODES)
def test_every_reduction_passes_it_in_half_precision(mode: str, dtype: Dtype) -> None:
    # All regions: routes that nearly tie would be chosen by rounding errors.
    chosen = dict(n_win=2, topk=4, **kv(mode, downsample_ratio=2, per_win=2))
    result = correctness.check(Case("bra", 8, 8, 16, 2, tuple(chosen.items()), impl="sdpa", dtype=dtype))
    assert result is not None and result.ok, result


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
