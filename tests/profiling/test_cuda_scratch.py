"""Scratch of CUDA kernels: with it, predictions are the peaks that were measured on an NVIDIA H100 (PyTorch 2.11)."""

from typing import Any

import pytest
import torch

from profiling.cases.case import Case
from profiling.meters import peak_memory
from profiling.meters.cuda_scratch import ColumnSum, TiledBackward, irregular, is_opaque, scratch
from profiling.meters.operator_call import Call

WINDOW, BRA = {"window_size": 7}, {"n_win": 7, "topk": 4, "side_dwconv": 5}
TRAINING = "forward_backward"
SUM, MEAN = torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim


def call(func: Any, x: torch.Tensor, *rest: Any) -> Call:
    return Call.of(func, (x, *rest), {})


@pytest.mark.parametrize(
    ("name", "impl", "grid", "dim", "heads", "options", "mode", "dtype", "batch", "measured"),
    [
        # The gradient of the bias of queries, keys and values decides; at batch 128 of 28 x 28, attention does.
        ("window", "sdpa", (56, 56), 64, 2, WINDOW, TRAINING, "bf16", 1, 8_562_696),
        ("window", "sdpa", (224, 224), 64, 2, WINDOW, TRAINING, "bf16", 1, 135_006_216),
        ("window", "sdpa", (64, 64), 128, 4, {"window_size": 8}, TRAINING, "bf16", 1, 22_548_492),
        ("window", "sdpa", (14, 14), 256, 8, WINDOW, TRAINING, "bf16", 128, 256_122_904),
        ("window", "sdpa", (28, 28), 128, 4, WINDOW, TRAINING, "bf16", 128, 388_991_760),
        # cuDNN's backward pass.
        ("full", "sdpa", (112, 112), 64, 2, {}, TRAINING, "bf16", 1, 24_392_464),
        ("full", "sdpa", (14, 14), 256, 8, {}, TRAINING, "bf16", 1, 3_224_080),
        ("bra", "sdpa", (64, 64), 128, 4, BRA | {"n_win": 8}, TRAINING, "bf16", 1, 38_482_704),
        # The memory-efficient kernel's.
        ("bra", "sdpa", (112, 112), 64, 2, BRA, TRAINING, "fp32", 1, 106_500_992),
        ("bra", "sdpa", (56, 56), 64, 2, BRA | {"topk": 1}, TRAINING, "fp32", 1, 17_060_704),
        # The backward pass of a softmax.
        ("bra", "reference", (56, 56), 64, 2, BRA | {"topk": 49}, TRAINING, "fp32", 1, 401_517_064),
        ("bra", "reference", (112, 112), 64, 2, BRA, TRAINING, "bf16", 1, 441_668_000),
        # FlashAttention, with channels padded from 20 to 24.
        ("bra", "sdpa", (600, 500), 20, 1, BRA | {"n_win": 50}, "forward", "bf16", 1, 314_628_824),
        ("bra", "sdpa", (600, 500), 20, 1, BRA | {"n_win": 50}, TRAINING, "bf16", 1, 625_214_984),
    ],
)  # fmt: skip
def test_predictions_are_what_was_measured_on_an_h100(
    name: str, impl: str, grid: tuple[int, int], dim: int, heads: int, options: dict[str, Any], mode: Any, dtype: Any,
    batch: int, measured: int,
) -> None:  # fmt: skip
    case = Case(
        name, *grid, dim, heads, tuple(options.items()), impl=impl, mode=mode, dtype=dtype, device="cuda", batch=batch
    )
    assert peak_memory.predict(case.workload("meta"), "cuda").peak == pytest.approx(measured, rel=0.004)


@pytest.mark.parametrize(
    ("rows", "columns", "vector", "itemsize", "expected"),
    [
        # As measured: beside what was alive then, these were the peaks of the cells above.
        (3136, 192, 4, 4, 4_816_904), (50176, 192, 4, 4, 77_070_344), (4096, 384, 4, 4, 12_582_924),
        (25088, 768, 4, 4, 138_412_056),
        # Few rows; so many columns that blocks need not share one; and a single column.
        (1000, 192, 4, 4, 0), (1 << 16, 1 << 21, 4, 4, 0), (512, 1, 1, 4, 0),
    ],
)  # fmt: skip
def test_scratch_of_a_sum(rows: int, columns: int, vector: int, itemsize: int, expected: int) -> None:
    assert ColumnSum(rows, columns, vector, itemsize).scratch() == expected


def test_rows_and_columns_of_a_sum_are_those_of_its_layout() -> None:
    x = torch.empty(8, 100, 6, device="meta")
    assert irregular(call(SUM, x, [0, 1])) == ColumnSum(800, 6, 2)
    assert irregular(call(SUM, x, [0], True)) == ColumnSum(8, 600, 4)
    assert irregular(call(MEAN, x, [-2])) == ColumnSum(100, 48, 2)
    assert irregular(call(SUM, x.double(), [0])) == ColumnSum(8, 600, 4, 8)
    # Transposed, other values are adjacent.
    assert irregular(call(SUM, x.transpose(1, 2), [0, 2])) == ColumnSum(800, 6, 2)
    for over in ([2], [1, 2], [0, 1, 2], None, []):
        assert irregular(call(SUM, x, over)) is None
    assert irregular(call(SUM, torch.empty((), device="meta"), [])) is None
    assert irregular(call(SUM, torch.empty(0, 3, device="meta"), [0])) is None
    assert irregular(call(torch.ops.aten.add.Tensor, x, x)) is None


def test_the_backward_pass_of_a_softmax_multiplies_first() -> None:
    grad, probabilities = torch.empty(4, 8, device="meta"), torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    backward = torch.ops.aten._softmax_backward_data.default
    assert is_opaque(backward) and not is_opaque(torch.ops.aten._softmax.default)
    assert scratch(Call.of(backward, (grad, grad, -1, torch.float32), {})) == 4 * 8 * 4
    assert scratch(Call.of(backward, (probabilities, probabilities, -1, torch.bfloat16), {})) == 4 * 8 * 2


def test_the_memory_efficient_kernel_works_in_tiles() -> None:
    q, sums = torch.empty(3, 2, 65, 24, device="meta"), torch.empty(3, 2, 65, device="meta")
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    made = Call.of(backward, (q, q, q, q, q, sums, 0.0, False), {})
    assert irregular(made) == TiledBackward(6, 65, 64)
    # Two tiles of 64 queries for each head.
    assert scratch(made) == 4 * 6 * 65 + 12 * (16 + 4 * 64 * 64)
    half = [tensor.bfloat16() for tensor in (q, q, q, q, q)]
    assert irregular(Call.of(backward, (*half, sums, 0.0, False), {})) is None


def test_a_layer_normalisation_copies_an_input_that_is_not_contiguous() -> None:
    image, weight = torch.empty(2, 16, 5, 7, device="meta"), torch.empty(16, device="meta")
    for x, copied in ((image.permute(0, 2, 3, 1), 4 * image.numel()), (torch.empty(2, 5, 7, 16, device="meta"), 0)):
        forward = Call.of(torch.ops.aten.native_layer_norm.default, (x, [16], weight, weight, 1e-5), {})
        grad, sums = torch.empty(2, 5, 7, 16, device="meta"), torch.empty(2, 5, 7, 1, device="meta")
        args = grad, x, [16], sums, sums, weight, weight, [True] * 3
        assert scratch(forward) == copied
        assert scratch(Call.of(torch.ops.aten.native_layer_norm_backward.default, args, {})) == copied
