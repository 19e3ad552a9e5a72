"""Neighborhood attention: every token attends to the kernel_size x kernel_size tokens around it.

Shape legend: b batch, h w grid, n tokens, k keys of a token, m heads, e channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.neighborhood import flex
from attention_zoo.attentions.neighborhood.axis import Axis
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops import flex_backend, regions
from attention_zoo.ops.softmax_attention import softmax_attention


@register("neighborhood")
class NeighborhoodAttention(Attention):
    """A window centred on its query; at the border it stays inside the grid (NAT).

    With ``dilation`` d (DiNAT) the tokens whose rows are equal modulo d, and whose columns are, form a grid of their
    own; the window is centred and stays inside in that grid. A relative position counts its tokens. DiNAT alternates
    dilation 1 and, from stage to stage, 8, 4, 2, 1: the largest that fits a kernel of 7 at 224 x 224 pixels.

    With ``stride`` s (generalised neighborhood attention) the queries of a block of s x s tokens share the window of
    their leader, which is the block's middle token, after the middle if s is even; of a block that the border cuts
    short, the leader is the last token if it has no middle. Stride 1 is NAT. Stride kernel_size is ``window`` on a
    grid that it divides. With both options, blocks are blocks of the dilated grid.

    Every query has exactly kernel_size ** 2 keys on a grid of at least kernel_size * dilation tokens per side. On a
    shorter side the window spans the query's tokens of that side. The authors' first code (NATTEN before 0.20) pads
    such a side with zeros to kernel_size * dilation and does not mask the padding; ``attend_padding=True`` computes
    that. Their later code refuses such a grid.

    The publication of generalised neighborhood attention has no relative position bias; here the two combine.

    Args:
        kernel_size: tokens per side of a window; odd, or with a stride any: an even one has its extra token before
            the leader.
        dilation: distance of the keys of a window, in tokens.
        stride: tokens per side of a block of queries that share a window, at most kernel_size.
        relative_position_bias: add a learned bias per head and relative position; on in the published models.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor of the scores; None or 0: head_dim ** -0.5.
        attend_padding: pad a side shorter than kernel_size * dilation to that length, without a mask.
        impl: ``reference`` and ``sdpa`` gather the keys of each query; ``flex`` is PyTorch's FlexAttention with a
            block mask that is built in every step. ``auto`` takes flex on CUDA only.

    Raises:
        InvalidOption: stride exceeds kernel_size, or kernel_size is even and stride is 1.
    """

    family = "local"
    attends_to = "the tokens around it"
    citation = (
        "Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (neighborhood attention); dilation: Hassani "
        "and Shi, DiNAT, 2022; stride: Hassani et al., Generalized Neighborhood Attention, 2025"
    )
    equation = "softmax over the nearest k x k tokens of q kᵀ/√d + B; dilation and stride as DiNAT and GNA"
    left_open = "small grids: the window spans the side; bias with stride: of the leader's window"
    departs = "bias off by default; the first code pads small grids (attend_padding), later ones refuse them"
    impls = ("reference", "sdpa", "flex")
    exponent = 1
    minimal_options = {"kernel_size": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        kernel_size: AtLeast1 = 7,
        dilation: AtLeast1 = 1,
        stride: AtLeast1 = 1,
        relative_position_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if kernel_size % 2 == 0 and stride == 1:
            raise InvalidOption(
                f"kernel_size={kernel_size} is even and has no middle; valid: an odd integer, or a stride of at least 2"
            )
        if stride > kernel_size:
            raise InvalidOption(f"stride={stride} leaves tokens out; valid: 1 to kernel_size = {kernel_size}")
        self.kernel_size, self.dilation, self.stride = kernel_size, dilation, stride
        self.attend_padding = attend_padding
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if relative_position_bias:
            table = torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def axes(self, height: int, width: int) -> tuple[Axis, Axis]:
        """The rows and the columns of a ``height x width`` grid, with padding that is attended to."""
        least = self.kernel_size * self.dilation if self.attend_padding else 0
        rows, cols = (Axis(max(side, least), self.kernel_size, self.dilation, self.stride) for side in (height, width))
        return rows, cols

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl, (height, width) = self.chosen_impl(x), x.shape[1:3]
        rows, cols = self.axes(height, width)
        if (rows.length, cols.length) != (height, width):
            x = F.pad(x, (0, 0, 0, cols.length - width, 0, rows.length - height))
        qkv = self.qkv(x)
        if impl == "flex" and not x.is_meta:
            mixed = flex.attend(qkv, self.num_heads, (rows, cols), self.scale, self.relative_position_bias_table)
        else:
            mixed = self._gathered(qkv, rows, cols, impl)
        return self.proj(regions.crop(mixed, height, width))

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        # On meta tensors flex counts the products of the gathered implementation, which are the same.
        if impl != "flex" or (x.is_meta and self.impl == "flex"):
            return None
        if self.impl == "auto" and not x.is_cuda:
            return "auto compiles no kernel for a CPU; valid there: impl='flex' under torch.no_grad()"
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        return flex_backend.unsupported(x, self.dim // self.num_heads, gradients)

    def _gathered(
        self, qkv: Float[Tensor, "b h w threec"], rows: Axis, cols: Axis, impl: str
    ) -> Float[Tensor, "b h w c"]:
        tokens = rearrange(qkv, "b h w c -> b (h w) c")
        q, kv = tokens.split([self.dim, 2 * self.dim], dim=-1)
        down, right = rows.keys(qkv.device), cols.keys(qkv.device)
        index = rearrange(down[:, None, :, None] * cols.length + right[None, :, None, :], "h w y x -> (h w) (y x)")
        near = kv.contiguous().index_select(1, index.flatten())
        k, v = rearrange(near, "b (n k) (t m e) -> t b n m k e", n=len(index), t=2, m=self.num_heads)
        q = rearrange(q, "b n (m e) -> b n m 1 e", m=self.num_heads)
        out = softmax_attention(q, k, v, self.scale, self._bias(rows, cols, q), impl)
        return rearrange(out, "b (h w) m 1 e -> b h w (m e)", h=rows.length)

    def _bias(self, rows: Axis, cols: Axis, like: Tensor) -> Tensor | None:
        """The bias of each token's keys (n, m, 1, k) and the mask of keys it lacks (n, 1, 1, k), summed, or None."""
        mask = None
        if rows.ragged or cols.ragged:
            real = rows.present(like.device)[:, None, :, None] & cols.present(like.device)[None, :, None, :]
            absent = ~rearrange(real, "h w y x -> (h w) 1 1 (y x)")
            mask = torch.zeros((), dtype=like.dtype, device=like.device).masked_fill(absent, float("-inf"))
        if self.relative_position_bias_table is None:
            return mask
        dy, dx = (axis.displacements(like.device) + self.kernel_size - 1 for axis in (rows, cols))
        index = dy[:, None, :, None] * (2 * self.kernel_size - 1) + dx[None, :, None, :]
        bias = self.relative_position_bias_table.flatten(1).index_select(1, index.flatten())
        bias = rearrange(bias, "m (n k) -> n m 1 k", n=rows.length * cols.length).to(like.dtype)
        return bias if mask is None else bias + mask

    def macs(self, height: int, width: int) -> Macs:
        rows, cols = self.axes(height, width)
        padded = rows.length * cols.length
        return Macs(
            projection=(3 * padded + height * width) * self.dim**2,
            attention=2 * padded * rows.most_keys * cols.most_keys * self.dim,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        rows, cols = self.axes(height, width)
        return rows.mean_keys(height) * cols.mean_keys(width)
