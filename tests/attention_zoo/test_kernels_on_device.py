"""BRA's kernels on a GPU, at the shapes that are measured: output and every gradient against fp64, on equal routes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import build
from profiling.meters import correctness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(64, 2, 56, 1, 7), (128, 4, 28, 4, 7), (256, 8, 14, 16, 7), (64, 2, 112, 4, 7), (64, 2, 224, 4, 7),
          (128, 4, 64, 4, 8), (64, 2, 256, 1, 16), (64, 2, 256, 4, 16)]  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft": {"soft_routing": True},
    "diff": {"diff_routing": True},
    "masked": {"auto_pad": True, "mask_padding": True},
    "reduced": {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2},
    "as initialised": {},
}
LARGEST_REFERENCE = 112
"""For larger grids the published gather takes too much memory in fp64, so the chunked one is the oracle."""


def made(impl: str, variant: str, dim: int, heads: int, topk: int, n_win: int) -> Any:
    torch.manual_seed(1)
    options = {"n_win": n_win, "topk": topk, "side_dwconv": 5} | VARIANTS[variant]
    module = build("bra", dim=dim, num_heads=heads, impl=impl, **options).eval()
    if variant != "as initialised":
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=dim**-0.5)
    return module.cuda()


def results(module: nn.Module, x: Tensor, grad: Tensor, half: bool) -> dict[str, Tensor]:
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        out = module(x)
    out.backward(grad.to(out.dtype))
    result = {"output": out.detach(), "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: value.double() for name, value in result.items() if value is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, ...], dtype: str, variant: str) -> None:
    dim, heads, grid, topk, n_win = shape
    torch.manual_seed(2)
    height, width = (grid - 1, grid - 3) if variant == "masked" and grid > 14 else (grid, grid)
    x, grad = torch.randn(2, 1, height, width, dim, device="cuda").unbind()
    oracle = "reference" if grid <= LARGEST_REFERENCE or variant == "masked" else "sdpa"
    fast, exact, own = (made(impl, variant, dim, heads, topk, n_win) for impl in ("triton", oracle, oracle))
    fast.keep_routes = True
    result = results(fast, x, grad, dtype == "bf16")
    for module in (exact, own):
        module.router.imposed = fast.kept_routes
    expected, allowed = results(exact.double(), x, grad, False), results(own, x, grad, dtype == "bf16")
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.norm().clamp_min(1e-9)
        room = correctness.ROOM * max(((allowed[name] - value).norm() / scale).item(), correctness.ROUNDING)
        error = ((result[name] - value).norm() / scale).item()
        # A gradient that is zero in exact arithmetic, as that of the keys' bias, is rounding error in all results.
        assert error <= room or (result[name] - value).norm() < 1e-3 * expected["input"].norm() * room, (
            name,
            error,
            room,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routes_are_those_of_fp64(shape: tuple[int, ...]) -> None:
    dim, heads, grid, topk, n_win = shape
    torch.manual_seed(2)
    x = torch.randn(2, grid, grid, dim, device="cuda")
    fast, exact = (made(impl, "plain", dim, heads, topk, n_win) for impl in ("triton", "reference"))
    if grid > LARGEST_REFERENCE:
        exact.impl = "sdpa"
    routes, expected = fast.routes(x)[0].sort(-1).values, exact.double().routes(x.double())[0].sort(-1).values
    assert (routes != expected).float().mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_bits_in_two_runs_and_in_a_graph(shape: tuple[int, ...]) -> None:
    dim, heads, grid, topk, n_win = shape
    module = made("triton", "plain", dim, heads, topk, n_win)
    x, grad = torch.randn(2, 2, grid, grid, dim, device="cuda").unbind()
    runs = [results(module, x, grad, True)]
    module.zero_grad(set_to_none=True)
    runs.append(results(module, x, grad, True))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        eager = module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        graph.replay()
        assert torch.equal(out, eager)
