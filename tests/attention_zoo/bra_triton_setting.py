"""What tests of BRA's Triton kernels share: the device, fixed weights and inputs, a kernel that launches nothing."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn

from attention_zoo import build
from attention_zoo.attentions.bra import triton_ops as bra

pytest.importorskip("triton", reason="Triton is not installed")
kernels = importlib.import_module("attention_zoo.attentions.bra.triton_kernels")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.bfloat16, torch.float16]


class Launches:
    """In place of a kernel: its launches are noted, and nothing is launched."""

    def __init__(self, noted: list[str], name: str = "") -> None:
        self.noted, self.name = noted, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.noted.append(self.name)


def made(impl: str, dtype: torch.dtype, dim: int, heads: int, **chosen: Any) -> nn.Module:
    """With the same weights for each impl, large enough that the softmax is far from uniform."""
    torch.manual_seed(1)
    module = build("bra", dim=dim, num_heads=heads, impl=impl, **chosen).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return module.to(DEVICE, dtype)


def results(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and every parameter."""
    dtype = next(module.parameters()).dtype
    x = x.detach().clone().to(DEVICE, dtype).requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(x)
    out.backward(grad.to(out))
    result = {"output": out, "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: value.detach().double().clone() for name, value in result.items() if value is not None}


FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def arguments(dtype: torch.dtype = torch.float32, **other: Any) -> dict[str, Any]:
    """Of the attention: one projection, factors, a mask."""
    torch.manual_seed(4)
    tokens = torch.randn(2, 4, 6, 40, dtype=dtype, device=DEVICE)
    index = torch.tensor([[1, 0], [2, 3], [3, 1], [2, 1]], device=DEVICE).repeat(2, 1, 1)
    valid = torch.arange(24, device=DEVICE).view(4, 6) % 5 != 0
    given = dict(tokens=tokens, small=None, index=index, factor=torch.rand(2, 4, 2, device=DEVICE), valid=valid,
                 taps=None, bias=None, qk_dim=12, heads=2, side=2, scale=0.4)  # fmt: skip
    return given | other


def backward(grad: Tensor, given: dict[str, Any]) -> list[Tensor]:
    out, total, lse = bra.bra_attend(*given.values(), True)
    return [out, total, lse, *bra.bra_backward(*list(given.values())[:7], out, lse, grad, *list(given.values())[7:])]
