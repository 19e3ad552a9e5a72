"""Small modules whose MACs and memory are known, and workloads of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profiling.cases.workload import Dtype, Mode, Workload

MODES: tuple[Mode, ...] = ("forward", "forward_backward")


class NHWC(nn.Module):
    """A convolution of an NHWC tensor, by way of a view of it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Transposed(nn.Module):
    """A linear layer of tokens by images. What is not contiguous has its bias added in place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(0, 1))


class OneHead(nn.Module):
    """A depthwise convolution within the heads of every image, of which there may be one: an axis of any stride."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.conv = heads, nn.Conv2d(dim // heads, dim // heads, 5, padding=2, groups=dim // heads)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w = x.shape[:3]
        heads = x.chunk(3, dim=-1)[2].reshape(b, h * w, self.heads, -1).transpose(1, 2)
        images = heads.unflatten(2, (h, w)).permute(0, 1, 4, 2, 3).reshape(b * self.heads, -1, h, w)
        return self.conv(images)


class Fused(nn.Module):
    """PyTorch's fused attention; queries, keys and values are thirds of the last axis. A learned bias unfuses it."""

    def __init__(self, *bias: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, self.bias)


class Gather(nn.Module):
    """Every token receives some tokens of its image, chosen by content."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        values = self.mix(x)
        chosen = (x @ x.transpose(1, 2)).topk(4, dim=-1).indices
        pairs = values.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        return torch.gather(pairs, 2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[2])).sum(2)


class Tied(nn.Module):
    """One weight under two names, and a buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 32), (2, 50, 64)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 20, 20)),
    "strided convolution": (lambda: nn.Conv2d(8, 16, 2, stride=2), (1, 8, 30, 26)),
    "convolution, channels last": (lambda: NHWC(nn.Conv2d(16, 24, 3, padding=1)), (2, 20, 20, 16)),
    "depthwise convolution": (lambda: nn.Conv2d(32, 32, 5, padding=2, groups=32), (1, 32, 24, 24)),
    "depthwise, channels last": (lambda: NHWC(nn.Conv2d(32, 32, 5, padding=2, groups=32)), (1, 24, 24, 32)),
    "depthwise, one head": (lambda: OneHead(24, 1), (1, 12, 28, 72)),
    "linear, transposed": (lambda: Transposed(16), (40, 30, 16)),
    "mlp": (lambda: mlp(32), (2, 100, 32)),
    "fused attention": (Fused, (2, 2, 150, 48)),
    "attention with a learned bias": (lambda: Fused(2, 150, 150), (2, 2, 150, 48)),
    "gather": (lambda: Gather(16), (2, 60, 16)),
    "tied weights": (lambda: Tied(40), (1, 9, 40)),
    "softmax": (lambda: nn.Sequential(nn.Linear(24, 24), nn.Softmax(-1)), (3, 7, 24)),
}


def workload(name: str, mode: Mode = "forward", dtype: Dtype = "fp32", device: str = "cpu") -> Workload:
    """One of MODULES on random numbers."""
    make, shape = MODULES[name]
    with torch.device(device):
        return Workload(make(), torch.randn(shape), mode, dtype)
