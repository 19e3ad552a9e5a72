"""The settings of a step."""

import pytest
import torch
from small_modules import workload
from torch import nn

from profiling.cases.workload import Dtype, Workload


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_settings_hold_inside_and_are_restored(dtype: Dtype) -> None:
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    work = Workload(nn.Linear(4, 4), torch.randn(2, 4), dtype=dtype, deterministic=True)
    with work.settings():
        assert torch.get_float32_matmul_precision() == ("high" if dtype == "tf32" else "highest")
        assert torch.are_deterministic_algorithms_enabled()
        assert work.step().dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_step_starts_without_gradients() -> None:
    work = workload("linear", "forward_backward")
    work.step()
    first = work.x.grad
    weights = [p.grad for p in work.module.parameters()]
    work.step()
    assert first is not None and work.x.grad is not first and torch.equal(work.x.grad, first)
    for parameter, gradient in zip(work.module.parameters(), weights, strict=True):
        assert gradient is not None and torch.equal(parameter.grad, gradient)
