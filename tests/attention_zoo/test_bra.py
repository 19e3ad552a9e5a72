"""BRA in every implementation equals the oracle, and full attention where all regions are chosen."""

from typing import Any

import pytest
import torch
from bra_oracle import (
    COARSE,
    MASKED,
    ODD,
    PADDED,
    WHOLE_REGIONS,
    draw,
    full_attention,
    kv,
    oracle,
    relative,
    run_or_skip,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import InvalidOption, build, get
from attention_zoo.attentions.bra import sdpa
from attention_zoo.attentions.bra.kv_downsample import MODES
from profiling.cases.workload import Workload
from profiling.meters import macs

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


@pytest.mark.parametrize(("n_win", "grid"), [(1, (8, 8)), (2, (8, 8)), (4, (8, 12)), (8, (8, 8))])
def test_all_regions_are_full_attention(n_win: int, grid: tuple[int, int]) -> None:
    drawn = draw(n_win=n_win, topk=n_win**2, grid=grid, batch=2)
    assert relative(drawn.module(drawn.x), full_attention(drawn)) < 1e-12


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
