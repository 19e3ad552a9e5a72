"""Multi-scale ReLU linear attention: linear attention among tokens, and among convolved tokens.

Shape legend: b batch, h w grid, n tokens, s scales including the tokens themselves, m heads, d channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast0
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads

EPSILON = 1e-15
"""Added to the denominator, as in the published code."""


@register("relu_linear")
class ReLULinearAttention(Attention):
    """Linear attention with ReLU as feature map, at the scale of tokens and of their aggregations, then a projection.

    Each head attends ReLU(q) (ReLU(k)^T v) / (ReLU(q) sum ReLU(k)^T), once with q, k and v of the tokens and once per
    scale with q, k and v that a depthwise convolution aggregates, followed by a linear map of the channels of each of
    q, k and v of a head. The projection joins the heads of all scales.

    Open in the paper, and here as in the published code: no bias anywhere, batch normalisation after the projection,
    and 1e-15 in the denominator. Channels of qkv are ordered by head, then q, k, v. In half precision the division
    runs in fp32. It has no position encoding and fits every grid.

    Departs from the published code: with no more tokens than channels of a head that code multiplies q with k first,
    which is the same function. A single token of a batch has no variance: in training that code refuses it, here it is
    normalised by the running statistics. The code's heads have 16 channels (models B0 and B1) or 32; here num_heads
    decides.

    Args:
        scales: kernel of the aggregation, odd; several are separated by commas, as in 3,5; 0: none. Published: 5, and
            3 for some layers of larger models.
        proj_norm: whether batch normalisation follows the projection. In training it depends on the whole batch.
        qkv_bias: whether the qkv projection and the aggregation have biases.
    """

    family = "linear"
    attends_to = "summaries of all tokens, at several scales"
    citation = "Cai et al., EfficientViT, ICCV 2023, section 3.1 (ReLU linear attention, multi-scale tokens)"
    equation = (
        "ReLU(q)(ReLU(k)ᵀv) / ReLU(q)ΣReLU(k)ᵀ at the scales of tokens and of their aggregations, then a projection"
    )
    left_open = "biases: none; batch normalisation after the projection; denominator: + 1e-15"
    departs = (
        "num_heads sets the channels of a head (theirs: 16 or 32); a single token in training uses running "
        "statistics (theirs refuses it)"
    )
    exponent = 1
    minimal_options = {"scales": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        scales: AtLeast0 | str = 5,
        proj_norm: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.kernels = _kernels(scales)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.aggregation = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * dim, 3 * dim, kernel, padding=kernel // 2, groups=3 * dim, bias=qkv_bias),
                nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * num_heads, bias=qkv_bias),
            )
            for kernel in self.kernels
        )
        self.proj = nn.Linear((1 + len(self.kernels)) * dim, dim, bias=False)
        self.norm = nn.BatchNorm2d(dim) if proj_norm else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        self.chosen_impl(x)
        tokens = rearrange(self.qkv(x), "b h w c -> b c h w")
        scales = torch.cat([tokens, *(aggregate(tokens) for aggregate in self.aggregation)], dim=1)
        groups = (1 + len(self.kernels)) * self.num_heads
        q, k, v = rearrange(scales, "b (g p d) h w -> p b g (h w) d", g=groups, p=3)
        out = merge_heads(_attend(F.relu(q), F.relu(k), v))
        return self._normalised(self.proj(rearrange(out, "b (h w) c -> b h w c", h=x.shape[1])))

    def _normalised(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        if self.norm is None:
            return x
        image = rearrange(x, "b h w c -> b c h w")
        if self.norm.training and x.shape[:-1].numel() == 1:
            mean, variance = self.norm.running_mean, self.norm.running_var
            image = F.batch_norm(image, mean, variance, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        else:
            image = self.norm(image)
        return rearrange(image, "b c h w -> b h w c")

    def macs(self, height: int, width: int) -> Macs:
        n, head = height * width, self.dim // self.num_heads
        scales = 1 + len(self.kernels)
        return Macs(
            projection=(3 + scales) * n * self.dim**2,
            attention=scales * n * self.dim * (2 * head + 1),
            local_conv=sum(3 * n * self.dim * (kernel**2 + head) for kernel in self.kernels),
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return (1 + len(self.kernels)) * height * width


def _attend(q: Float[Tensor, "b g n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]) -> Tensor:
    """Linear attention of non-negative q and k, of shape (b, g, n, d)."""
    weighted = q @ (k.transpose(-2, -1) @ v)
    total = q @ k.sum(dim=-2)[..., None]
    if weighted.dtype in (torch.float16, torch.bfloat16):
        # Epsilon and its inverse are out of the range of fp16: a query that the ReLU sets to zero is divided by 1.
        return (weighted.float() / (total.masked_fill(total == 0, 1).float() + EPSILON)).to(weighted.dtype)
    return weighted / (total + EPSILON)


def _kernels(scales: int | str) -> tuple[int, ...]:
    """The kernels of the aggregation."""
    parts = [] if scales == 0 else str(scales).split(",")
    try:
        kernels = tuple(map(int, parts))
    except ValueError:
        kernels = (0,)
    if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise InvalidOption(
            f"scales={scales!r} is not valid; valid: an odd integer, several separated by commas (as in 3,5), or 0"
        )
    return kernels
