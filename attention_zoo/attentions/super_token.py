"""Super token attention: tokens are gathered into fewer super tokens, which attend to each other, and are read back.

Shape legend: b batch, p super tokens (r s grid), n tokens of a super token's cell, k its 3 x 3 neighbours, c channels.
"""

from contextlib import nullcontext
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops import regions
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads
from attention_zoo.ops.token_partition import TokenPartition

AROUND = tuple(product((-1, 0, 1), repeat=2))
"""The cells whose super tokens a token can belong to, relative to its own: rows down, columns right."""


@register("super_token")
class SuperTokenAttention(Attention):
    """Super tokens S attend to each other: Q softmax(...) S, with a sparse association Q of tokens to super tokens.

    S begins as the averages of square cells. Q is a softmax of q . s / sqrt(dim), over the 3 x 3 cells around each
    token, of the input itself, without projections and heads. S is then the average of the tokens, weighted by Q,
    ``iterations`` times. After attention, Q takes the super tokens back to the tokens; there is no further projection.

    As in the published code, a cell beyond the border takes part in the softmax with score 0, and what it gets is
    lost. The published code treats Q as constant in the backward pass; ``detach_association`` chooses. A grid that
    super_token_size does not divide is zero-padded at the bottom and right. The padding belongs to no super token; in
    the published code it does, and lowers their averages: ``mask_padding`` chooses. The weights of q, k and v are
    ordered by head first, as published. ``macs`` counts the association and the way back as ``other``, since they
    grow linearly.

    Args:
        super_token_size: tokens per side of a cell; published: 8, 4, 1, 1 by stage. 1: attention among all tokens.
        iterations: how often the association is computed.
        refine: what happens among super tokens: attention, convolutions (1x1, 5x5 depthwise, 1x1) or nothing.
        qk_scale: factor of the scores of attention; None: head_dim ** -0.5.
        qkv_bias: whether the projections to q, k and v have a bias.
        detach_association: treat Q as constant in the backward pass.
        mask_padding: whether padding belongs to no super token.

    Raises:
        InvalidOption: super_token_size 1 with refine "none", which does nothing.
    """

    family = "pooled"
    attends_to = "super tokens, gathered around it"
    citation = "Huang et al., Vision Transformer with Super Token Sampling, CVPR 2023 (super token attention)"
    equation = "Q = softmax(x sᵀ/√d) over 3 x 3 cells, S = normalised Qᵀx, Q MHSA(S)"
    left_open = "cells beyond the border: score 0, as the code; gradient through Q: none, as the code; padding: masked"
    departs = "padding (theirs counts it: mask_padding=False); shifts instead of identity convolutions"
    impls = ("reference", "sdpa")
    # The association's gradients are left out by default, which finite differences would notice.
    minimal_options = {"super_token_size": 2, "detach_association": False}
    by_stage = {"super_token_size": (8, 4, 1, 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        super_token_size: AtLeast1 = 8,
        iterations: AtLeast1 = 1,
        refine: Literal["attention", "conv", "none"] = "attention",
        qk_scale: float | int | None = None,
        qkv_bias: bool = True,
        detach_association: bool = True,
        mask_padding: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if super_token_size == 1 and refine == "none":
            raise InvalidOption("super_token_size=1 with refine='none' does nothing; valid refine: attention, conv")
        self.exponent = 2 if refine == "attention" else 1
        self.super_token_size, self.iterations = super_token_size, iterations
        self.detach_association, self.mask_padding = detach_association, mask_padding
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = self.proj = self.conv = None
        if refine == "attention":
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)
        if refine == "conv":
            self.conv = nn.Sequential(
                nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1)
            )

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        impl = self.chosen_impl(x)
        if self.super_token_size == 1:
            return self._refined(x, impl)
        cells = self.cells(x.shape[1], x.shape[2])
        tokens, real = cells.partition(x), self._real(cells, x)
        rows, cols = (padded // self.super_token_size for padded in cells.padded)
        with torch.no_grad() if self.detach_association else nullcontext():
            association = self._association(tokens, real, rows, cols)
        super_tokens = self._refined(_gathered(tokens, association, rows, cols), impl)
        return cells.merge(association @ _neighbours(super_tokens).transpose(-2, -1))

    def cells(self, height: int, width: int) -> TokenPartition:
        """The cells of a ``height x width`` grid, one per super token."""
        return TokenPartition(height, width, (self.super_token_size, self.super_token_size))

    def _real(self, cells: TokenPartition, like: Tensor) -> Float[Tensor, "p n 1"] | None:
        """1 where a token is not padding; None if every token counts."""
        if not self.mask_padding or cells.padded == (cells.height, cells.width):
            return None
        inside = regions.inside(cells.height, cells.width, cells.padded, like.device).to(like.dtype)
        return cells.partition(inside[None, :, :, None])[0]

    def _association(
        self, tokens: Float[Tensor, "b p n c"], real: Float[Tensor, "p n 1"] | None, rows: int, cols: int
    ) -> Float[Tensor, "b p n k"]:
        """The shares of each token in the super tokens around it; those of padding are 0."""
        means = tokens.mean(dim=2) if real is None else tokens.sum(dim=2) / real.sum(dim=1)
        super_tokens = rearrange(means, "b (r s) c -> b r s c", r=rows)
        for _ in range(self.iterations - 1):
            super_tokens = _gathered(tokens, self._shares(tokens, real, super_tokens), rows, cols)
        return self._shares(tokens, real, super_tokens)

    def _shares(
        self,
        tokens: Float[Tensor, "b p n c"],
        real: Float[Tensor, "p n 1"] | None,
        super_tokens: Float[Tensor, "b r s c"],
    ) -> Float[Tensor, "b p n k"]:
        shares = torch.softmax(tokens @ _neighbours(super_tokens) * self.dim**-0.5, dim=-1)
        return shares if real is None else shares * real

    def _refined(self, x: Float[Tensor, "b r s c"], impl: str) -> Float[Tensor, "b r s c"]:
        if self.conv is not None:
            return rearrange(self.conv(rearrange(x, "b r s c -> b c r s")), "b c r s -> b r s c")
        if self.qkv is None or self.proj is None:
            return x
        tokens = split_heads(rearrange(self.qkv(x), "b r s c -> b (r s) c"), self.num_heads)
        q, k, v = tokens.chunk(3, dim=-1)
        out = merge_heads(softmax_attention(q, k, v, self.scale, impl=impl))
        return self.proj(rearrange(out, "b (r s) c -> b r s c", r=x.shape[1]))

    def grid_multiple(self, height: int, width: int) -> int:
        return self.super_token_size

    def macs(self, height: int, width: int) -> Macs:
        padded = self.cells(height, width).padded
        size, tokens = self.super_token_size, padded[0] * padded[1]
        count = int(self.kv_tokens_per_query(height, width))
        cost = Macs()
        if size > 1:
            cost += Macs(other=len(AROUND) * tokens * self.dim * (2 * self.iterations + 1))
        if self.qkv is not None:
            cost += Macs(projection=4 * count * self.dim**2, attention=2 * count**2 * self.dim)
        if self.conv is not None:
            cost += Macs(projection=2 * count * self.dim**2, local_conv=25 * count * self.dim)
        return cost

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """The number of super tokens."""
        padded = self.cells(height, width).padded
        return padded[0] // self.super_token_size * (padded[1] // self.super_token_size)


def _neighbours(super_tokens: Float[Tensor, "b r s c"]) -> Float[Tensor, "b p c k"]:
    """The super tokens of the 3 x 3 cells around each cell, row by row, zero beyond the border."""
    # F.unfold would copy what is not contiguous out of sight, also in the backward pass.
    near = [_moved(super_tokens, -down, -right) for down, right in AROUND]
    return rearrange(torch.stack(near, dim=-1), "b r s c k -> b (r s) c k")


def _gathered(
    tokens: Float[Tensor, "b p n c"], association: Float[Tensor, "b p n k"], rows: int, cols: int
) -> Float[Tensor, "b r s c"]:
    """The average of the tokens of each super token, weighted by the association."""

    def summed(parts: Float[Tensor, "b p d k"]) -> Float[Tensor, "b r s d"]:
        """Over the cells around each super token, what each has for it: the transpose of :func:`_neighbours`."""
        grids = rearrange(parts, "b (r s) d k -> b r s d k", r=rows).unbind(-1)
        return torch.stack([_moved(grid, *way) for grid, way in zip(grids, AROUND, strict=True)], dim=-1).sum(dim=-1)

    total = summed(association.sum(dim=2, keepdim=True))
    return summed(tokens.transpose(-2, -1) @ association) / (total + 1e-12)


def _moved(grid: Float[Tensor, "b r s d"], down: int, right: int) -> Float[Tensor, "b r s d"]:
    """The grid moved by that many cells; what leaves it is lost, and zeros follow."""
    return F.pad(grid, (0, 0, right, -right, down, -down))
