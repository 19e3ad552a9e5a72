"""Manhattan self-attention: weights decay with the Manhattan distance, over the whole grid or along the axes in turn.

Shape legend: b batch, h w grid, l tokens of an axis or of the grid, g any leading axes, m heads, e channels of a head.
"""

from typing import Annotated, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast0, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import softmax_attention


@register("manhattan")
class ManhattanAttention(Attention):
    """Softmax attention whose weights are multiplied by gamma ** (|dy| + |dx|), plus a convolution of the values (RMT).

    gamma = 1 - 2 ** -(initial_decay + decay_range * head / num_heads): the first heads are the most local.
    ``decomposed`` attends along each row, then along each column to the results, with gamma ** |dx| and gamma ** |dy|.

    The paper's formula multiplies the weights by the decay after the softmax. The published code adds log(gamma) *
    distance to the scores, that is, normalises again after the multiplication, and its authors say that this is meant
    (issue 21 of their repository). The code is the default; ``normalise_decay`` chooses. The code also rotates queries
    and keys by their position, as RetNet does. A position is a row-major index, so the rotation depends on the grid's
    width. An odd number of channels per head fails there, too. The published projections to q, k and v are three
    layers; here they are one.

    Args:
        decomposed: along the axes in turn instead of over the whole grid; published: in the first three of four stages
            (the smallest model: two).
        initial_decay: decay of the first head.
        decay_range: span of decay over the heads; published for the small model: 4, 4, 6, 6 by stage.
        normalise_decay: whether the weights are normalised after the decay (code) or before it (the paper's formula).
        rotary: rotate pairs of channels of q and k by position; needs an even number of channels per head.
        lce_kernel: kernel of the depthwise convolution of the values (local context enhancement), odd; 0: none.
        qkv_bias: whether the projections to q, k and v have a bias.

    Attributes:
        table_dtype: dtype of angles and decays; None: that of the input, at least fp32. The published code computes
            them in fp32 for every input.

    Raises:
        InvalidOption: rotary with an odd number of channels per head, or an even lce_kernel.
    """

    family = "axial"
    attends_to = "every token, less with Manhattan distance, by row and column"
    citation = "Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024 (MaSA, decomposed MaSA, LCE)"
    equation = "(softmax(q kᵀ) ⊙ g^(|dy|+|dx|)) v + DWConv(v); or rows with g^|dx|, then columns with g^|dy|"
    left_open = (
        "normalise before or after decay: after, as the code; rotation of q, k: on; g: 1 - 2^-(2 + 4 head/heads)"
    )
    departs = "one qkv layer; tables not rounded to fp32"
    impls = ("reference", "sdpa")
    minimal_options = {"lce_kernel": 3}
    by_stage = {"decomposed": (True, True, True, False), "decay_range": (4, 4, 6, 6)}
    table_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        decomposed: bool = True,
        initial_decay: Annotated[float | int, Range(0.01)] = 2,
        decay_range: Annotated[float | int, Range(0)] = 4,
        rotary: bool = True,
        lce_kernel: AtLeast0 = 5,
        qkv_bias: bool = True,
        normalise_decay: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if rotary and dim // num_heads % 2:
            raise InvalidOption(
                f"rotary=True needs an even number of channels per head, not dim / num_heads = {dim // num_heads}; "
                "valid: rotary=False, or another num_heads"
            )
        self.exponent = 1.5 if decomposed else 2
        self.decomposed, self.rotary, self.normalise_decay = decomposed, rotary, normalise_decay
        self.initial_decay, self.decay_range = initial_decay, decay_range
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lce = depthwise(dim, lce_kernel, "lce_kernel") if lce_kernel else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl = self.chosen_impl(x)
        q, k, values = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(part, "b h w (m e) -> b h w m e", m=self.num_heads) for part in (q, k, values))
        if self.rotary:
            q, k = self._rotated(q), self._rotated(k)
        out = self._by_axes(q, k, v, impl) if self.decomposed else self._whole(q, k, v, impl)
        if self.lce is not None:
            out = out + rearrange(self.lce(rearrange(values, "b h w c -> b c h w")), "b c h w -> b h w c")
        return self.proj(out)

    def _by_axes(
        self, q: Float[Tensor, "b h w m e"], k: Float[Tensor, "b h w m e"], v: Float[Tensor, "b h w m e"], impl: str
    ) -> Float[Tensor, "b h w c"]:
        """Along the rows, then along the columns to the rows' results, with the same queries and keys."""
        height, width = q.shape[1:3]
        by_row = [rearrange(part, "b h w m e -> b h m w e") for part in (q, k, v)]
        mixed = self._attend(by_row[0], by_row[1], by_row[2], _distances(width, q), impl)
        q, k = (rearrange(part, "b h w m e -> b w m h e") for part in (q, k))
        mixed = rearrange(mixed, "b h m w e -> b w m h e")
        return rearrange(self._attend(q, k, mixed, _distances(height, q), impl), "b w m h e -> b h w (m e)")

    def _whole(
        self, q: Float[Tensor, "b h w m e"], k: Float[Tensor, "b h w m e"], v: Float[Tensor, "b h w m e"], impl: str
    ) -> Float[Tensor, "b h w c"]:
        height, width = q.shape[1:3]
        down, right = _distances(height, q), _distances(width, q)
        apart = rearrange(down[:, None, :, None] + right[None, :, None, :], "h w y x -> (h w) (y x)")
        q, k, v = (rearrange(part, "b h w m e -> b m (h w) e") for part in (q, k, v))
        return rearrange(self._attend(q, k, v, apart, impl), "b m (h w) e -> b h w (m e)", h=height)

    def _attend(
        self,
        q: Float[Tensor, "*g m l e"],
        k: Float[Tensor, "*g m l e"],
        v: Float[Tensor, "*g m l e"],
        distance: Float[Tensor, "l l"],
        impl: str,
    ) -> Float[Tensor, "*g m l e"]:
        decay = (self._decay(distance)[:, None, None] * distance).to(v.dtype)
        if self.normalise_decay:
            return softmax_attention(q, k, v, self.scale, decay, impl)
        weights = torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1)
        return (weights * decay.exp()) @ v

    def _decay(self, like: Tensor) -> Float[Tensor, " m"]:
        """The logarithm of gamma of each head."""
        heads = torch.arange(self.num_heads, dtype=self.table_dtype or like.dtype, device=like.device)
        exponent = -self.initial_decay - self.decay_range * heads / self.num_heads
        return torch.log(1 - 2**exponent).to(like.dtype)

    def _rotated(self, x: Float[Tensor, "b h w m e"]) -> Float[Tensor, "b h w m e"]:
        """Each pair of neighbouring channels rotated by the token's row-major index times the pair's frequency."""
        height, width, pairs = x.shape[1], x.shape[2], x.shape[4] // 2
        dtype = torch.promote_types(x.dtype, torch.float32)
        share = torch.linspace(0, 1, pairs, dtype=self.table_dtype or dtype, device=x.device)
        frequency = (1.0 / 10000**share).to(dtype)
        phase = torch.arange(height * width, dtype=dtype, device=x.device)[:, None] * frequency
        phase = rearrange(phase, "(h w) e -> h w 1 e", h=height)
        cos, sin = phase.cos(), phase.sin()
        even, odd = x.unflatten(-1, (pairs, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        """Why ``impl`` cannot run on ``x``."""
        if impl == "sdpa" and not self.normalise_decay:
            return "fused attention cannot scale weights after the softmax; valid: normalise_decay=True"
        return None

    def macs(self, height: int, width: int) -> Macs:
        n = height * width
        kernel = 0 if self.lce is None else self.lce.kernel_size[0]
        return Macs(
            projection=4 * n * self.dim**2,
            attention=2 * n * int(self.kv_tokens_per_query(height, width)) * self.dim,
            local_conv=n * self.dim * kernel**2,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """The tokens of a row and of a column, or of the grid."""
        return height + width if self.decomposed else height * width


def _distances(length: int, like: Tensor) -> Float[Tensor, "l l"]:
    """The distance of every two tokens of an axis, in tokens, at least in fp32."""
    at = torch.arange(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return (at[:, None] - at[None, :]).abs()
