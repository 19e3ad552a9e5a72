"""Convolutions instead of attention: a control that mixes tokens locally with fixed weights."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.registry import register


@register("pseudo_conv")
class PseudoConv(Attention):
    """1x1 conv, 5x5 depthwise conv, 1x1 conv; the Block's topk = 0. num_heads has no effect.

    Its definition is BiFormer's code. All three have biases, and nothing nonlinear stands between them.
    """

    family = "local"
    attends_to = "a 5 x 5 neighbourhood, with fixed weights"
    citation = "Zhu et al., BiFormer, CVPR 2023: the published Block's topk = 0"
    equation = "a depthwise convolution and linear maps, as the Block with topk = 0"
    left_open = "nothing"
    departs = "nothing"
    exponent = 1

    def __init__(self, dim: int, num_heads: int, impl: Impl = "auto") -> None:
        super().__init__(dim, num_heads, impl)
        # The published block is a Sequential. Its items 0 and 4 only permute, hence these names.
        self.add_module("1", nn.Conv2d(dim, dim, 1))
        self.add_module("2", nn.Conv2d(dim, dim, 5, padding=2, groups=dim))
        self.add_module("3", nn.Conv2d(dim, dim, 1))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = rearrange(x, "b h w c -> b c h w")
        for conv in self.children():
            x = conv(x)
        return rearrange(x, "b c h w -> b h w c")

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        return Macs(projection=2 * n * self.dim**2, local_conv=25 * n * self.dim)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return _mean_overlap(height, 5) * _mean_overlap(width, 5)


def _mean_overlap(length: int, kernel: int) -> float:
    reach = kernel // 2
    return sum(min(i + reach, length - 1) - max(i - reach, 0) + 1 for i in range(length)) / length
