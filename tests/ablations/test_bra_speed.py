"""The bra_speed sweep and what it uses: coupled axes, CUDA graphs, FlexAttention, the bound."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from ablations.harness.sweep import Sweep, discover
from ablations.sweeps.bra_speed import SHAPE
from attention_zoo import InvalidOption, Unsupported, build, get, names
from attention_zoo.attentions.bra.flex import _tiles, block_mask
from attention_zoo.ops import flex_backend
from profiling.__main__ import main as profile_one
from profiling.cases.case import Case, available_impls
from profiling.cases.workload import Workload
from profiling.execution import subprocess_runner
from profiling.execution.benchmark import Job, measure, static_analysis_of
from profiling.meters import correctness, peak_memory
from profiling.meters.latency import QUICK

SWEEP = discover()["bra_speed"]
EIGHT = [(64, 2, 56, 1, 7), (128, 4, 28, 4, 7), (256, 8, 14, 16, 7), (64, 2, 112, 4, 7), (64, 2, 224, 4, 7),
         (128, 4, 64, 4, 8), (64, 2, 256, 1, 16), (64, 2, 256, 4, 16)]  # fmt: skip
USERS = ("n_win", 50), ("side_dwconv", 5), ("topk", 4)
BOUND, MODES = "bra_pregathered", ("forward", "forward_backward")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Coupled axes


def test_a_tuple_of_names_is_one_axis() -> None:
    sweep = Sweep(
        "q?", "e", axes={("dim", "num_heads", "grid"): [(8, 2, 4), (16, 4, (6, 10))], "window_size": lambda: (2, 3)},
        fixed={"name": "window"}, keep=lambda v: v["device"] == "cpu" and (v["dim"], v["window_size"]) != (8, 3),
    )  # fmt: skip
    result = [(c.dim, c.num_heads, c.height, c.width, dict(c.options)) for c in sweep.cases("cpu")]
    assert result == [
        (8, 2, 4, 4, {"window_size": 2}), (16, 4, 6, 10, {"window_size": 2}), (16, 4, 6, 10, {"window_size": 3})
    ]  # fmt: skip
    assert not sweep.cases("cuda")


def test_every_name_of_a_coupled_axis_must_be_known() -> None:
    sweep = Sweep("q?", "e", axes={("dim", "heads"): [(8, 2)]}, fixed={"name": "full", "grid": 4})
    with pytest.raises(InvalidOption, match=r"no axis 'heads'; valid: .*num_heads"):
        sweep.cases("cpu")


# CUDA graphs


def test_a_cuda_graph_on_a_cpu_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("bra", 14, 14, cuda_graph=True)
    subprocess_runner.start()
    outcome = subprocess_runner.call(measure, Job(case, stopping=QUICK))
    assert outcome.status == "unsupported" and outcome.value is None
    assert "cuda_graph=True: a CUDA graph records work of a CUDA device, not of cpu" in outcome.reason
    monkeypatch.setattr(Case, "workload", lambda *_: pytest.fail("something ran"))
    with pytest.raises(Unsupported, match="CUDA graph"):
        measure(Job(case))


def test_a_cuda_graph_is_part_of_the_key_and_of_the_name() -> None:
    unmodified, recorded = Case("bra", 14, 14), Case("bra", 14, 14, cuda_graph=True)
    assert unmodified.key("s", "d") != recorded.key("s", "d")
    assert "CUDA graph" in str(recorded) and "CUDA graph" not in str(unmodified)


def test_the_profiler_takes_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_one(["--attention", "bra", "--height", "14", "--width", "14", "--cuda-graph", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["cuda_graph"] is True and row["status"] == "unsupported" and "CUDA device" in row["reason"]
    assert "latency_p50_ms" not in row and row["macs_counted"] > 0


@needs_cuda
@pytest.mark.parametrize("mode", MODES)
def test_replay_equals_the_eager_step(mode: Any) -> None:
    module = nn.Linear(8, 8).cuda()
    work = Workload(module, torch.randn(4, 8, device="cuda"), mode)
    eager = work.step().detach().clone()
    grads = [None if t.grad is None else t.grad.clone() for t in (work.x, *module.parameters())]
    with work.replayed():
        with torch.no_grad():
            work.x.mul_(2)
        doubled = work.step().detach().clone()
        with torch.no_grad():
            work.x.div_(2)
        assert torch.equal(work.step(), eager) and not torch.equal(doubled, eager)
        result = [t.grad for t in (work.x, *module.parameters())]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(result, grads, strict=True))


# The sweep


WHO = ("bra", BOUND)


def shapes(cases: Sequence[Case]) -> set[tuple[Any, ...]]:
    """Contestant, mode, and shape of BRA and of its bound."""
    return {
        (c.name, c.impl, c.mode, c.dim, c.num_heads, c.height, *(dict(c.options)[o] for o in ("topk", "n_win")))
        for c in cases
        if c.name in WHO
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_implementation_runs_every_shape_in_both_modes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("bra"), "impls", (*available_impls("bra"), "another"))
    dtype, more = ("fp32", [(64, 2, 56, topk, 7) for topk in (2, 4, 8, 16)]) if device == "cpu" else ("bf16", [])
    cases = [c for c in SWEEP.cases(device) if not (c.compiled or c.cuda_graph) and c.batch == 1 and c.dtype == dtype]
    impls = {*available_impls("bra"), "another"} - ({"flex", "triton"} if device == "cpu" else {"flex"})
    contestants = [("bra", impl) for impl in impls] + [(BOUND, "sdpa")]
    assert {
        (*key_columns, mode, *shape) for key_columns in contestants for mode in MODES for shape in [*EIGHT, *more]
    } <= shapes(cases)
    grids = {(c.name, c.mode, c.dim, c.height) for c in cases if c.name in ("window", "full") and c.impl == "sdpa"}
    assert grids >= {(name, mode, e[0], e[2]) for name in ("window", "full") for mode in MODES for e in EIGHT}


def test_cpu_cases_are_restricted_to_short_ones() -> None:
    cases = SWEEP.cases("cpu")
    assert {(c.dtype, c.batch, c.cuda_graph) for c in cases} == {("fp32", 1, False)}
    compiled = {(c.name, c.impl, c.height) for c in cases if c.compiled}
    assert compiled == {("bra", impl, 56) for impl in ("reference", "sdpa")}
    assert {c.height for c in cases if c.impl == "flex"} == {14, 28, 56} and "triton" not in {c.impl for c in cases}
    assert {c.replicate for c in cases} == {0} and {c.replicate for c in SWEEP.in_full().cases("cpu")} == {0, 1, 2}


def test_a_gpu_gets_the_most_valuable_cells_first_and_the_slow_ones_last() -> None:
    cases = replace(SWEEP, replicates=1).cases("cuda")
    slow = [c.compiled or c.impl == "flex" for c in cases]
    assert len(cases) <= 260 and slow == sorted(slow) and sum(slow) <= 16 and sum(c.compiled for c in cases) == 2
    assert {(c.dtype, c.batch, c.cuda_graph) for c in cases[:90]} == {("bf16", 1, False)}
    graphs = [c for c in cases if c.cuda_graph]
    assert {c.dtype for c in graphs} == {"bf16"} and {c.height for c in cases if c.batch == 128} == {14, 28, 56}
    assert {(*shape[3:],) for shape in shapes([c for c in graphs if c.batch == 1])} == set(EIGHT)
    assert {(c.impl, c.height) for c in cases if c.dtype == "fp32"} == {
        (impl, grid) for impl in ("reference", "sdpa", "triton") for grid in (56, 112, 256)
    }


def test_users_case_exceeds_memory_with_reference_and_fits_with_sdpa() -> None:
    cases = [c for c in SWEEP.cases("cpu") if c.height == 600 and c.replicate == 0]
    assert {c.shape() for c in cases} == {(1, 600, 500, 20)} and {c.mode for c in cases} == set(MODES)
    sizes = {}
    for impl in ("reference", "sdpa"):
        (case,) = (c for c in cases if (c.name, c.impl, c.mode) == ("bra", impl, "forward_backward"))
        assert case.options == USERS
        sizes[impl] = peak_memory.predict(case.workload("meta")).peak / 2**30
    assert sizes["reference"] > 100 and sizes["sdpa"] < 1


def test_the_bound_is_only_in_its_own_sweep() -> None:
    assert BOUND not in names() and get(BOUND).impls == ("reference", "sdpa")
    for name, sweep in discover().items():
        assert (BOUND in {case.name for case in sweep.cases("cpu")}) == (name == "bra_speed")


def test_smoke_is_one_small_shape() -> None:
    cases = SWEEP.cases("cpu", smoke=True)
    assert {c.height for c in cases} == {14} and {c.name for c in cases} == {"bra", BOUND, "window", "full"}
    assert set(SWEEP.axes) >= {SHAPE, *SWEEP.smoke}


# The bound


def bound(impl: str = "reference", **chosen: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"n_win": 2, "topk": 2, "side_dwconv": 3} | chosen
    return build(BOUND, dim=8, num_heads=2, impl=impl, **options).double()


def test_the_bound_attends_to_evenly_spaced_runs() -> None:
    module, x = bound(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    q, k, v = module.qkv(x).chunk(3, -1)
    out = torch.zeros(48, 8, dtype=torch.float64)
    # Eight regions of six tokens; runs of twelve, which start at 0, 5, ... 35 of the batch's 48 tokens.
    for region in range(8):
        queries, keys = slice(6 * region, 6 * region + 6), slice(5 * region, 5 * region + 12)
        for head in (slice(0, 4), slice(4, 8)):
            scores = q.reshape(48, 8)[queries, head] @ k.reshape(48, 8)[keys, head].T * 8**-0.5
            out[queries, head] = scores.softmax(-1) @ v.reshape(48, 8)[keys, head]
    lepe = module.lepe(v.movedim(-1, 1)).movedim(1, -1)
    assert (module(x) - module.wo(out.reshape(2, 4, 6, 8) + lepe)).abs().max() < 1e-12


def test_gradient_of_the_bound_is_exact_with_one_place_per_token() -> None:
    """With topk 1 and disjoint runs no token has two places, so the gradient is exact."""
    module = bound(topk=1)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


def test_macs_of_the_bound_equal_bra_without_routing() -> None:
    chosen = {"n_win": 7, "topk": 4, "side_dwconv": 5}
    own, whole = (build(name, dim=64, num_heads=2, **chosen).macs(28, 28) for name in (BOUND, "bra"))
    assert own == replace(whole, routing=0) and whole.routing > 0
    result = static_analysis_of(
        Case(BOUND, 28, 28, options=tuple(chosen.items()), impl="sdpa", mode="forward_backward")
    )
    assert result["macs_agree"] and result["macs_counted"] == own.total


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_passes_the_gate_and_its_memory_is_predicted(mode: Any) -> None:
    case = Case(BOUND, 14, 14, options=(("n_win", 7), ("topk", 3)), impl="sdpa", mode=mode, batch=2)
    result = measure(Job(case, stopping=QUICK))
    assert 0 < result["correctness_error"] < result["correctness_tolerance"] and "flash" in result["sdpa_backend"]
    assert static_analysis_of(case)["memory_predicted_bytes"] == pytest.approx(result["memory_peak_bytes"], rel=0.02)


def test_the_bound_rejects_invalid_options() -> None:
    with pytest.raises(InvalidOption, match="n_win=2 does not divide the 3 x 4 grid"):
        bound()(torch.zeros(1, 3, 4, 8, dtype=torch.float64))
    with pytest.raises(InvalidOption, match="valid: 1 to 4"):
        bound(topk=5)


# FlexAttention


def bra(impl: str, dtype: torch.dtype = torch.float64, **chosen: Any) -> nn.Module:
    torch.manual_seed(1)
    module = build("bra", dim=32, num_heads=2, impl=impl, **chosen)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


VARIANTS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "topk 3": ((8, 12), {"n_win": 4, "topk": 3}),
    "topk all": ((8, 8), {"n_win": 2, "topk": 4}),
    "one token per region": ((6, 6), {"n_win": 6, "topk": 5}),
    "ragged": ((7, 9), {"n_win": 4, "topk": 2, "auto_pad": True}),
    "qk_dim, scale, no LePE": ((8, 8), {"n_win": 4, "topk": 3, "qk_dim": 16, "qk_scale": 0.2, "side_dwconv": 0}),
    "fewer keys": ((12, 8), {"n_win": 2, "topk": 2, "kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2}),
    "one key per region": ((12, 12), {"n_win": 3, "topk": 4, "kv_downsample_mode": "ada_avgpool", "kv_per_win": 1}),
    "conv": ((8, 8), {"n_win": 2, "topk": 2, "kv_downsample_mode": "conv", "kv_downsample_ratio": 2}),
    "no output projection": ((8, 8), {"n_win": 2, "topk": 2, "param_attention": "qkv"}),
}  # fmt: skip
each_variant = pytest.mark.parametrize(("grid", "chosen"), VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable the rules about kernels, since none runs."""
    monkeypatch.setattr(flex_backend, "unsupported", lambda *_: None)
    yield


@each_variant
def test_uncompiled_flex_attention_equals_the_reference(
    grid: tuple[int, int], chosen: dict[str, Any], any_dtype: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_backend, "compiled", lambda: flex_attention)
    x = torch.randn(2, *grid, 32, dtype=torch.float64)
    with torch.no_grad():
        exact, result = (bra(impl, **chosen).forward_with_routes(x) for impl in ("reference", "flex"))
    assert torch.equal(exact[1], result[1])
    assert (exact[0] - result[0]).abs().max() < 1e-12 * exact[0].abs().max()


@each_variant
def test_the_blocks_that_are_visited_give_the_references_gradients(
    grid: tuple[int, int], chosen: dict[str, Any], any_dtype: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the kernel: attention to what is in the lists of blocks alone, as the compiled kernel reads them."""
    monkeypatch.setattr(flex_backend, "compiled", lambda: attend_to_blocks)
    x = torch.randn(2, *grid, 32, dtype=torch.float64)
    result = []
    for impl in ("reference", "flex"):
        module, leaf = bra(impl, **chosen), x.clone().requires_grad_()
        out = module(leaf)
        torch.manual_seed(3)
        out.backward(torch.randn_like(out))
        result.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    for exact, tensor in zip(*result, strict=True):
        # The gradient of the bias of the keys is zero but for rounding.
        assert (exact - tensor).abs().max() < 1e-10 * exact.abs().max().clamp_min(1)


def attend_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, kernel_options: dict[str, int] | None
) -> Tensor:
    """Softmax attention over the full blocks of a mask, and no partial ones."""
    assert kernel_options is None and not block_mask.kv_num_blocks.any()
    queries, keys = block_mask.BLOCK_SIZE
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for image, row in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[2] // queries)).tolist():
        count = block_mask.full_kv_num_blocks[image, 0, row]
        visited = block_mask.full_kv_indices[image, 0, row, :count].tolist()
        tokens = [keys * block + token for block in visited for token in range(keys)]
        of_row = slice(row * queries, (row + 1) * queries)
        mixed = F.scaled_dot_product_attention(
            q[image, :, of_row], k[image, :, tokens], v[image, :, tokens], scale=scale
        )
        out[image, :, of_row] = mixed
    return out


def test_mask_agrees_by_blocks_by_tokens_and_transposed() -> None:
    routes = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(6)]) for _ in range(2)])
    mask = block_mask(routes, 4, 2)
    expected = torch.zeros(2, 6, 6, dtype=torch.bool).scatter_(2, routes, True)
    assert torch.equal(mask.to_dense()[:, 0].bool(), expected)
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(24), torch.arange(12), indexing="ij")
    by_token = expected.repeat_interleave(4, 1).repeat_interleave(2, 2)
    assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), q, k), by_token)
    for image, key in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        count = mask.full_q_num_blocks[image, 0, key]
        queries = mask.full_q_indices[image, 0, key, :count].tolist()
        assert sorted(queries) == expected[image, :, key].nonzero().flatten().tolist()
    assert mask.seq_lengths == (24, 12) and mask.BLOCK_SIZE == (4, 2)


@pytest.mark.slow
def test_compiled_flex_attention_follows_the_routes_of_each_input(compiler: None) -> None:
    module, exact = bra("flex", torch.float32, n_win=4, topk=3), bra("reference", n_win=4, topk=3)
    for seed in (5, 6):
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 12, 32)
        with torch.no_grad():
            expected = exact(x.double())
            assert (module(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_forward_cell_of_flex_is_measured_on_a_cpu_and_a_training_cell_is_unsupported(compiler: None) -> None:
    case = Case("bra", 8, 12, dim=32, options=(("n_win", 4), ("topk", 3)), impl="flex")
    assert static_analysis_of(case)["macs_agree"] and static_analysis_of(case)["memory_predicted_bytes"] is None
    # Other tests of this process have compiled other shapes.
    torch._dynamo.reset()
    result = measure(Job(case, stopping=QUICK))
    assert result["impl"] == "flex" and result["latency_p50_ms"] > 0
    assert 0 < result["correctness_error"] < result["correctness_tolerance"] < 1e-4
    with pytest.raises(Unsupported, match=r"no backward pass on cpu; valid there: steps under torch\.no_grad\(\)"):
        measure(Job(replace(case, mode="forward_backward")))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"soft_routing": True}, "soft_routing and diff_routing"),
        ({"diff_routing": True}, "soft_routing and diff_routing"),
        ({"auto_pad": True, "mask_padding": True}, "masks no padding"),
    ],
)
def test_flex_rejects_unsupported_inputs(chosen: dict[str, Any], words: str) -> None:
    x = torch.zeros(1, 7, 9, 32)
    with torch.no_grad(), pytest.raises(Unsupported, match=words):
        bra("flex", torch.float32, n_win=1 if "auto_pad" not in chosen else 4, topk=1, **chosen)(x)
    with torch.no_grad(), pytest.raises(Unsupported, match="fp64"):
        bra("flex", n_win=1, topk=1)(x.double())


def test_auto_does_not_take_flex_on_a_cpu() -> None:
    module = bra("auto", torch.float32, n_win=2, topk=1)
    for x in (torch.zeros(1, 4, 4, 32), torch.zeros(1, 4, 4, 32, device="meta")):
        with torch.no_grad():
            assert module.chosen_impl(x) != "flex"


@pytest.mark.parametrize(
    ("blocks", "tiles"),
    [((256, 256), {}), ((64, 16), {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 16}), ((480, 128), {"fwd_BLOCK_M": 32})],
)
def test_tiles_divide_the_blocks(blocks: tuple[int, int], tiles: dict[str, int]) -> None:
    assert _tiles(*blocks) == tiles


@pytest.mark.slow
def test_compiled_sdpa_is_measured(compiler: None) -> None:
    """Its backward pass, which differentiates what it recomputes, compiles too."""
    chosen: Any = {"options": (("n_win", 4), ("topk", 2)), "mode": "forward_backward"}
    case = Case("bra", 8, 8, dim=16, impl="sdpa", compiled=True, **chosen)
    subprocess_runner.start()
    # In a new process without shape checks, which the compiler cannot trace.
    outcome = subprocess_runner.call(measure, Job(case, stopping=QUICK))
    assert outcome.status == "ok", outcome
    result = outcome.value
    assert 0 < result["correctness_error"] < result["correctness_tolerance"] and "flash" in result["sdpa_backend"]
    assert 0 < result["latency_p50_ms"] < result["compile_ms"]


@pytest.mark.parametrize(("grid", "n_win", "checked"), [(112, 7, 56), (224, 7, 56), (256, 16, 128), (63, 7, 63)])
def test_flex_is_checked_on_regions_that_its_blocks_can_take(grid: int, n_win: int, checked: int) -> None:
    case = Case("bra", grid, grid, 64, 2, impl="flex", options=(("n_win", n_win), ("topk", 4)))
    assert correctness._small_grid(case) == (checked, checked)
