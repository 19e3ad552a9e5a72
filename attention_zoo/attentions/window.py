"""Window attention: tokens attend within fixed-size windows that do not overlap, optionally shifted.

Shape legend: b batch, p windows, n tokens of a window, m heads, d channels of a head, r rows of the bias table.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast0, AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads
from attention_zoo.ops.token_partition import TokenPartition


@register("window")
class WindowAttention(Attention):
    """Attention within non-overlapping windows of window_size x window_size tokens: softmax(q k^T / sqrt(d) + B) v.

    B is a learned bias per head and relative position. The cited publication has it in every model; here it is off by
    default, so that ``window`` differs from ``full`` in its windows only. ``relative_position_bias=True`` is Swin's
    unshifted block.

    A grid that the window does not divide is zero-padded at the bottom and right. By default the padding is masked:
    windows at the border are smaller. Swin's code for detection and segmentation does not mask it: queries also
    attend to padding, whose keys and values are the bias of the projection. ``attend_padding=True`` computes that.
    Swin's code for classification refuses such a grid.

    A shift first rolls the grid by ``shift`` tokens and masks query-key pairs that the roll brings together from
    opposite borders, with -inf; Swin's code with -100, which leaves such a pair a weight where scores differ as much.

    Args:
        window_size: tokens per side of a window; published: 7.
        shift: displacement of the windows in tokens, less than window_size; 0: none.
        relative_position_bias: add the bias B; published: true.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
        attend_padding: do not mask the padding of a grid that window_size does not divide.
    """

    family = "local"
    attends_to = "its window"
    citation = "Liu et al., Swin Transformer, ICCV 2021, section 3.2, equation 4"
    equation = "softmax(q kᵀ/√d + B) v in windows (Swin, eq. 4)"
    left_open = "nothing: sizes are options"
    departs = "B off by default; padding masked (theirs: attend_padding); mask of -inf instead of -100"
    impls = ("reference", "sdpa")
    exponent = 1
    minimal_options = {"window_size": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        window_size: AtLeast1 = 7,
        shift: AtLeast0 = 0,
        relative_position_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if shift >= window_size:
            raise InvalidOption(f"shift={shift} is not valid; valid: 0 to window_size - 1 = {window_size - 1}")
        self.window_size = window_size
        self.shift = shift
        self.attend_padding = attend_padding
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty((2 * window_size - 1) ** 2, num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def groups(self, height: int, width: int) -> TokenPartition:
        """The windows of a ``height x width`` grid."""
        return self._partition(height, width, shift=(self.shift, self.shift))

    def _partition(
        self, height: int, width: int, dilation: tuple[int, int] = (1, 1), shift: tuple[int, int] = (0, 0)
    ) -> TokenPartition:
        size = self.window_size, self.window_size
        return TokenPartition(height, width, size, dilation, shift, mask_padding=not self.attend_padding)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        groups = self.groups(x.shape[1], x.shape[2])
        windows = groups.partition(x)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(windows).chunk(3, dim=-1))
        out = groups.merge(
            merge_heads(softmax_attention(q, k, v, self.scale, self._bias(groups, q), self.chosen_impl(x)))
        )
        return self.proj(out)

    def _bias(self, groups: TokenPartition, like: Tensor) -> Tensor | None:
        """The sum of relative position bias (m, n, n) and mask (p, 1, n, n); None if neither is needed."""
        mask, table = groups.mask(like), self._bias_table()
        if table is None:
            return mask
        index = relative_index(self.window_size, like.device)
        # Contiguous, as published: otherwise fused attention copies it once per window.
        bias = rearrange(table[index], "q k m -> m q k").to(like.dtype).contiguous()
        return bias if mask is None else mask + bias

    def _bias_table(self) -> Float[Tensor, "r m"] | None:
        """The bias of each relative position, in the order of :func:`relative_index`; None: no bias."""
        return self.relative_position_bias_table

    def grid_multiple(self, height: int, width: int) -> int:
        return self.window_size

    def macs(self, height: int, width: int) -> Macs:
        padded = math.prod(self.groups(height, width).padded)
        return Macs(
            projection=(3 * padded + height * width) * self.dim**2,
            attention=2 * padded * self.window_size**2 * self.dim,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        return self.groups(height, width).mean_keys()


def relative_index(size: int, device: torch.device) -> Int[Tensor, "n n"]:
    """For each pair of tokens of a size x size window, the row of the relative position bias table."""
    y, x = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(size, device=device), torch.arange(size, device=device), indexing="ij")
    )
    dy = y[:, None] - y[None, :] + size - 1
    dx = x[:, None] - x[None, :] + size - 1
    return dy * (2 * size - 1) + dx
