"""Full attention with a locally-enhanced position encoding."""

from typing import Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.full import FullAttention
from attention_zoo.core.base import Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast0
from attention_zoo.core.registry import register


@register("lepe")
class LePEAttention(FullAttention):
    """Full attention plus a depthwise convolution of its input, before the output projection; topk = -2.

    LePE was published as a convolution of the values (CSWin: softmax(q k^T / sqrt(d)) v + DWConv(v), kernel 3).
    BiFormer's Block convolves the attention's input instead (kernel 5), which is the default here; its authors' later
    version for NCHW convolves the values. CSWin's code does this in stripes (``cross_shaped``); its last stage has a
    single stripe, which is ``lepe_of="values"`` with side_dwconv 3 and qkv_bias.

    Args:
        side_dwconv: kernel of the depthwise convolution, odd; 0: none.
        lepe_of: what is convolved.
    """

    family = "full"
    attends_to = "every token, plus a local convolution"
    citation = "Dong et al., CSWin Transformer, CVPR 2022 (LePE); BiFormer's Block applies it to the input"
    equation = "softmax(q kᵀ/√d) v + DWConv(v)"
    left_open = "kernel: an option"
    departs = "the input is convolved, as in BiFormer's Block; lepe_of=values for CSWin"
    minimal_options = {"side_dwconv": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        qkv_bias: bool = False,
        side_dwconv: AtLeast0 = 5,
        lepe_of: Literal["input", "values"] = "input",
    ) -> None:
        super().__init__(dim, num_heads, impl, qkv_bias=qkv_bias)
        self.lepe_of = lepe_of
        self.lepe = depthwise(dim, side_dwconv, "side_dwconv") if side_dwconv else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        if self.lepe is None:
            return self.proj(self._mix(x))
        if self.lepe_of == "values":
            return self.proj(self._mix(x, self._convolved))
        return self.proj(self._mix(x) + self._convolved(x))

    def _convolved(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        assert self.lepe is not None
        return rearrange(self.lepe(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")

    def macs(self, height: int, width: int) -> Macs:
        kernel = 0 if self.lepe is None else self.lepe.kernel_size[0]
        return super().macs(height, width) + Macs(local_conv=height * width * self.dim * kernel**2)


def depthwise(channels: int, kernel: int, option: str) -> nn.Conv2d:
    """A depthwise convolution that keeps the grid's size; InvalidOption (naming ``option``) for an even kernel."""
    if kernel % 2 == 0:
        raise InvalidOption(f"{option}={kernel} is even and would change the grid's size; valid: 0 or an odd integer")
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
