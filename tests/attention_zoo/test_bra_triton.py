"""BRA's Triton kernels against the fp64 reference, by the interpreter where there is no GPU.

The interpreter takes some milliseconds for each program of a kernel, so shapes are small: a program is one tile of one
region for one head.
"""

from typing import Any

import numpy as np
import pytest
import torch
from bra_triton_setting import DEVICE, FEW, GPU, HALVES, made, results
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_zoo import Unsupported
from attention_zoo.attentions.bra import triton
from attention_zoo.attentions.bra import triton_ops as bra
from attention_zoo.attentions.bra.kv_downsample import MODES
from profiling.cases.case import Case
from profiling.meters import correctness

DTYPES = [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in HALVES)]


@pytest.fixture
def bf16_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as integers, multiplies these and drops digits: here it has the numbers, rounded."""
    if GPU:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(number: Any) -> Any:
        if number.dtype.scalar != tl.bfloat16:
            return number
        return TensorHandle((number.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def multiply_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    def cast_rounded(self: Any, number: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return cast(self, widened(number), dtype)
        if number.dtype.scalar == tl.bfloat16:
            return number
        rounded = torch.from_numpy(np.array(number.data, np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_numbers)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounded)
    monkeypatch.setattr(triton, "INTERPRETS_BF16", True)


def check(
    grid: tuple[int, int], batch: int, dim: int, heads: int, dtype: torch.dtype = torch.float32, **chosen: Any
) -> None:
    """Errors against the fp64 reference must be about as small as those of the reference in the same type.

    All have the parameters of that type, and the routes that the kernels chose: half precision decides ties otherwise.
    """
    torch.manual_seed(2)
    x, grad = torch.randn(2, batch, *grid, dim).to(dtype).unbind()
    fast, own, exact = (made(impl, dtype, dim, heads, **chosen) for impl in ("triton", "reference", "reference"))
    fast.keep_routes = True
    result = results(fast, x, grad)
    if dtype != torch.float32:
        own.router.imposed = exact.router.imposed = fast.kept_routes
    allowed, expected = results(own, x, grad), results(exact.double(), x, grad)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.norm().clamp_min(1e-9)
        room = correctness.ROOM * max(((allowed[name] - value).norm() / scale).item(), 1e-6)
        error = ((result[name] - value).norm() / scale).item()
        assert error <= room, (name, error, room)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Any options, for kernels of few programs."""
    side = draw(st.integers(1, 3))
    heads = draw(st.integers(1, 3 if side == 1 else 2 if side == 2 else 1))
    batch = draw(st.integers(1, 2 if side * heads < 3 else 1))
    longest = 16 if side * heads * batch == 1 else 5
    region = [draw(st.integers(1, longest)) for _ in range(2)]
    ragged = [draw(st.integers(0, min(size, 3) - 1)) for size in region]
    head, qk_head = (draw(st.sampled_from([3, 5, 16, 24, 32, 64, 96, 128])) for _ in range(2))
    return dict(
        grid=tuple(side * size - cut for size, cut in zip(region, ragged, strict=True)),
        batch=batch,
        dim=head * heads,
        qk_dim=qk_head * heads,
        heads=heads,
        n_win=side,
        topk=draw(st.integers(1, side**2)),
        kv_downsample_mode=draw(st.sampled_from(MODES)) if min(region) > 2 else "identity",
        kv_downsample_ratio=2,
        kv_per_win=2,
        soft_routing=draw(st.booleans()),
        diff_routing=draw(st.booleans()),
        side_dwconv=draw(st.sampled_from([0, 3])),
        auto_pad=True,
        mask_padding=draw(st.booleans()),
    )


@pytest.mark.slow
@FEW
@given(shape=shapes())
def test_random_shapes_equal_the_reference(shape: dict[str, Any]) -> None:
    check(**shape)


@pytest.mark.slow
@pytest.mark.usefixtures("bf16_interpreted")
@settings(FEW, max_examples=8)
@given(shape=shapes(), dtype=st.sampled_from(HALVES))
def test_random_shapes_in_half_precision_equal_the_reference(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check(**shape, dtype=dtype)


CASES: dict[str, dict[str, Any]] = {
    "tiles of several regions": dict(grid=(6, 9), n_win=3, topk=7),
    "one token per region": dict(grid=(3, 3), n_win=3, topk=4),
    "tiles that divide a region": dict(grid=(16, 16), n_win=1, topk=1, heads=1),
    "tiles that do not": dict(grid=(10, 15), n_win=1, topk=1, heads=1),
    "96 channels": dict(grid=(4, 6), n_win=2, dim=192, qk_dim=32),
    "factors": dict(grid=(6, 6), n_win=2, soft_routing=True, diff_routing=True, param_routing=True),
    "a factor of one": dict(grid=(6, 6), n_win=2, diff_routing=True),
    "masked": dict(grid=(5, 7), n_win=3, topk=5, auto_pad=True, mask_padding=True),
    "masked, whole regions": dict(grid=(5, 5), n_win=3, topk=9, auto_pad=True, mask_padding=True, heads=1),
    "masked, factors": dict(
        grid=(5, 7), n_win=2, auto_pad=True, mask_padding=True, soft_routing=True, diff_routing=True
    ),
}  # fmt: skip


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    check(**dict(batch=1, dim=32, heads=2, topk=2, dtype=dtype) | CASES[name])


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_masked_and_reduced_keys_equal_the_reference(mode: str, dtype: torch.dtype) -> None:
    check((7, 8), 1, 16, 1, dtype, n_win=2, topk=2, auto_pad=True, mask_padding=True, kv_per_win=2,
          kv_downsample_mode=mode, kv_downsample_ratio=2)  # fmt: skip


@pytest.mark.skipif(GPU, reason="knows bf16")
def test_bf16_is_refused_where_the_interpreter_does_not_know_it() -> None:
    with pytest.raises(Unsupported, match="bf16"):
        made("triton", torch.bfloat16, 16, 1, n_win=2, topk=2)(torch.zeros(1, 4, 4, 16, dtype=torch.bfloat16))


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["tf32", "bf16", "fp16", "bf16_params"])
def test_other_types_pass_the_agreement_gate(dtype: str) -> None:
    # All regions: routes that nearly tie would be chosen by rounding errors.
    case = Case("bra", 6, 6, dim=32, num_heads=2, impl="triton", dtype=dtype, device=DEVICE,
                options=(("n_win", 2), ("topk", 4)))  # fmt: skip
    result = correctness.check(case)
    assert result is not None and result.ok, result


def test_which_of_the_regions_of_padding_are_routed_to_does_not_matter() -> None:
    """They are all alike, and the kernel's top-k breaks ties otherwise than PyTorch's."""
    case = Case("bra", 2, 2, dim=16, num_heads=1, impl="triton", device=DEVICE,
                options=(("n_win", 3), ("topk", 3), ("auto_pad", True)))  # fmt: skip
    result = correctness.check(case)
    assert result is not None and result.ok and result.flipped == 0, result


@pytest.mark.usefixtures("bf16_interpreted")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_comparison_can_fail(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bra, "LOG2_E", bra.LOG2_E * (1 + error))
    with pytest.raises(AssertionError, match="output"):
        check((4, 4), 1, 16, 1, dtype, n_win=2, topk=2)
