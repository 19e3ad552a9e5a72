"""Quadtree attention: from coarse to fine, queries attend to the children of their parent's highest-scoring keys.

Tokens are in Z-order: the children of token j of a level are tokens 4j to 4j + 3 of the next finer one.
Shape legend: b batch, m heads, n tokens of a level, p groups of s queries that share k keys, d channels.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops import regions
from attention_zoo.ops.softmax_attention import softmax_attention


class Level(NamedTuple):
    """A grid of the pyramid, its tokens in Z-order.

    Attributes:
        q: queries; k: keys; v: values.
        mask: 0 for a token, -inf for padding; None: no padding.
    """

    q: Float[Tensor, "b m n d"]
    k: Float[Tensor, "b m n d"]
    v: Float[Tensor, "b m n d"]
    mask: Float[Tensor, " n"] | None


@register("quadtree")
class QuadtreeAttention(Attention):
    """QuadTree-B: full attention on the coarsest grid, then on the children of each query's topk keys.

    Queries and keys of a level are the 2x2 averages of the next finer one. Every level computes a message. Messages are
    summed, weighted by a softmax over one learned number per level; a coarse message is added to all its descendants.
    Each head and each query selects its own topk keys.

    The defaults are the published vision backbone's. Its values are not averaged from level to level but reduced by
    GroupNorm, GELU, a 2x2 convolution of stride 2, GroupNorm, GELU and a 1x1 convolution, where GroupNorm has one group
    and so the statistics of the whole grid. It adds to each message LePE, a 3x3 depthwise convolution of that level's
    values. The authors' module for feature matching averages values and has no LePE and no bias:
    ``value_pooling="average", lepe=False, qkv_bias=False``, with 3 levels and coarsest_topk 16. Their backbone for
    detection has ReLU instead of GELU, and a topk of 32.

    The authors' code refuses a grid that 2 ** (levels - 1) does not divide, and one whose coarsest grid has fewer than
    topk tokens, also with one level. It computes in fp32 whatever the input, and its kernels hold at most 8 heads. Here
    a level has ceil(side / 2) tokens per side: averages are of the tokens that there are, the 2x2 convolution reads
    zeros beyond the border, and no query attends to padding. A grid too small for ``levels`` has as many as fit its
    shorter side, without the coarsest ones. ``sdpa`` fuses only the finest level: the topk needs the scores of the
    others. The cost is quadratic in the coarsest grid only: with four levels and topk 8, that part exceeds the others
    from 415 tokens per side.

    Args:
        levels: number of grids from coarse to fine; published: 4, 3, 2, 1 by stage.
        topk: keys selected per query, at most all of them; only their children are keys of the next level. Published:
            8 in every level and stage.
        coarsest_topk: topk of the coarsest level; None: topk.
        value_pooling: how the values of a level become those of the next coarser one.
        activation: of the learned pooling.
        lepe: add the convolution of the values.
        qkv_bias: whether the qkv projection has a bias.
    """

    family = "routed"
    attends_to = "the finest descendants of its best coarse keys"
    citation = "Tang et al., QuadTree Attention for Vision Transformers, ICLR 2022 (QuadTree-B)"
    equation = "Σ over levels of w · (softmax(q kᵀ/√d) v + LePE(v)) among the children of the parents' topk keys"
    left_open = (
        "pooling of the values: learned, as the backbone's code; padding: masked; small grids: fewer levels, all keys"
    )
    departs = (
        "one qkv layer; computes in the input's dtype (theirs: fp32, at most 8 heads); any grid (theirs: sides that "
        "2^(levels - 1) divides, topk coarse tokens or more)"
    )
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"levels": 2, "topk": 2}
    by_stage = {"levels": (4, 3, 2, 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        levels: AtLeast1 = 4,
        topk: AtLeast1 = 8,
        coarsest_topk: AtLeast1 | None = None,
        value_pooling: Literal["learned", "average"] = "learned",
        activation: Literal["gelu", "relu"] = "gelu",
        lepe: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.levels, self.topk, self.coarsest_topk = levels, topk, coarsest_topk or topk
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.weight = nn.Parameter(torch.randn(levels)) if levels > 1 else None
        self.value_pools = None
        if value_pooling == "learned":
            self.value_pools = nn.ModuleList(ValuePooling(dim, activation) for _ in range(levels - 1))
        self.lepe = nn.ModuleList(depthwise(dim, 3, "lepe") for _ in range(levels)) if lepe else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        height, width = x.shape[1:3]
        depth = self.depth(height, width)
        qkv = rearrange(self.qkv(x), "b h w (t c) -> t b c h w", t=3)
        queries, keys = (averages(part, depth) for part in qkv[:2])
        values = self._values(qkv[2].contiguous(), depth)
        weight = None if self.weight is None else torch.softmax(self.weight[-depth - 1 :], dim=0)
        pyramid = self._pyramid(queries, keys, values)
        out = self._coarse_to_fine(pyramid, weight, self.chosen_impl(x))
        rows, cols = (-(-side // 2**depth) * 2**depth for side in (height, width))
        out = regions.crop(from_z_order(rearrange(out, "b m n d -> b n (m d)"), rows, cols, depth), height, width)
        if self.lepe is not None:
            out = out + rearrange(self._local(values, weight), "b c h w -> b h w c")
        return self.proj(out)

    def depth(self, height: int, width: int) -> int:
        """How many times a grid of this size is halved."""
        # While torch.jit traces, as for fvcore, sides are tensors.
        return min(self.levels, int(min(height, width)).bit_length()) - 1

    def _values(self, finest: Float[Tensor, "b c h w"], depth: int) -> list[Float[Tensor, "b c _ _"]]:
        """The values of every level, finest first."""
        if self.value_pools is None:
            return averages(finest, depth)
        values = [finest]
        for pool in self.value_pools[:depth]:
            values.append(pool(values[-1]))
        return values

    def _pyramid(self, queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Level]:
        """The levels in Z-order, coarsest first, each padded to whole descendants of the coarsest tokens."""
        levels, depth = [], len(values) - 1
        coarsest = values[-1].shape[2:]
        padded = any(2**depth * few != many for few, many in zip(coarsest, values[0].shape[2:], strict=True))
        for halvings, images in enumerate(zip(reversed(queries), reversed(keys), reversed(values), strict=True)):
            rows, cols = (2**halvings * side for side in coarsest)
            mask = None
            if padded:
                height, width = images[0].shape[2:]
                inside = regions.inside(height, width, (rows, cols), images[0].device)
                mask = to_z_order(inside[None, :, :, None], halvings)[0, :, 0].to(images[0].dtype).log()
            q, k, v = (self._in_z_order(image, halvings) for image in images)
            levels.append(Level(q, k, v, mask))
        return levels

    def _in_z_order(self, image: Float[Tensor, "b c h w"], halvings: int) -> Float[Tensor, "b m n d"]:
        grid = regions.pad_to_multiple(rearrange(image, "b c h w -> b h w c"), 2**halvings, 2**halvings)
        return rearrange(to_z_order(grid, halvings), "b n (m d) -> b m n d", m=self.num_heads)

    def _coarse_to_fine(
        self, pyramid: list[Level], weight: Float[Tensor, " levels"] | None, impl: str
    ) -> Float[Tensor, "b m n d"]:
        if weight is None or len(pyramid) == 1:
            return softmax_attention(*pyramid[0][:3], self.scale, impl=impl)
        messages = self._messages(pyramid, impl)
        out = weight[0] * next(messages)[:, :, 0]
        for factor, message in zip(weight[1:], messages, strict=True):
            out = rearrange(out[..., None, :] + factor * message, "b m p s d -> b m (p s) d")
        return out

    def _messages(self, pyramid: list[Level], impl: str) -> Iterator[Float[Tensor, "b m p s d"]]:
        """The message of each level to its queries, coarsest level first."""
        best = None
        for level, (q, k, v, mask) in enumerate(pyramid):
            if best is None:
                index = torch.arange(k.shape[2], device=k.device)[None, None, None]
                q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
            else:
                index = (4 * best[..., None] + torch.arange(4, device=k.device)).flatten(3)
                q = rearrange(q, "b m (p s) d -> b m p s d", s=4)
                k, v = _children(k, best), _children(v, best)
            bias = None if mask is None else mask[index][..., None, :]
            if level == len(pyramid) - 1:
                yield softmax_attention(q, k, v, self.scale, bias, impl)
            else:
                topk = self.topk if level else self.coarsest_topk
                message, best = self._message_and_best(q, k, v, bias, index, topk)
                yield message

    def _message_and_best(
        self,
        q: Float[Tensor, "b m p s d"],
        k: Float[Tensor, "b m p k d"],
        v: Float[Tensor, "b m p k d"],
        bias: Float[Tensor, "..."] | None,
        index: Int[Tensor, "#b #m p k"],
        topk: int,
    ) -> tuple[Float[Tensor, "b m p s d"], Int[Tensor, "b m n best"]]:
        """The message of a level, and for each of its queries the topk keys to refine at the next level."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        chosen = scores.detach().topk(min(topk, scores.shape[-1]), dim=-1).indices
        best = torch.gather(index[..., None, :].expand(scores.shape), -1, chosen)
        return torch.softmax(scores, dim=-1) @ v, rearrange(best, "b m p s k -> b m (p s) k")

    def _local(
        self, values: list[Float[Tensor, "b c _ _"]], weight: Float[Tensor, " levels"] | None
    ) -> Float[Tensor, "b c h w"]:
        """LePE of every level, weighted as its message, and added to all descendants of its tokens."""
        assert self.lepe is not None
        convolutions = self.lepe[-len(values) :]
        out = convolutions[0](values[-1])
        if weight is None or len(values) == 1:
            return out
        out = weight[0] * out
        for factor, convolution, image in zip(weight[1:], convolutions[1:], values[-2::-1], strict=True):
            height, width = image.shape[2:]
            parents = repeat(out, "b c h w -> b c (h y) (w x)", y=2, x=2)[..., :height, :width]
            out = parents + factor * convolution(image)
        return out

    def macs(self, height: int, width: int) -> Macs:
        depth, keys = self.depth(height, width), self._keys(height, width)
        grids = [-(-height // 2**level) * -(-width // 2**level) for level in range(depth + 1)]
        padded = grids[-1] * 4**depth
        pairs = sum(padded // 4 ** (depth - level) * count for level, count in enumerate(keys))
        pooling = 0 if self.value_pools is None else 5 * sum(grids[1:])
        return Macs(
            projection=(4 * height * width + pooling) * self.dim**2,
            attention=2 * pairs * self.dim,
            local_conv=0 if self.lepe is None else 9 * sum(grids) * self.dim,
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """Keys of all levels together, including masked padding."""
        return sum(self._keys(height, width))

    def _keys(self, height: int, width: int) -> list[int]:
        """Keys per query of each level, coarsest first."""
        depth = self.depth(height, width)
        keys = [-(-height // 2**depth) * -(-width // 2**depth)]
        for level in range(depth):
            keys.append(4 * min(self.topk if level else self.coarsest_topk, keys[-1]))
        return keys


class ValuePooling(nn.Module):
    """The next coarser level's values, as the published backbone learns them; an odd side is padded with a zero."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.activation = F.gelu if activation == "gelu" else F.relu
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.reduce, self.mix = nn.Conv2d(dim, dim, 2, stride=2), nn.Conv2d(dim, dim, 1)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        image = self.activation(self.norm1(image))
        bottom, right = (side % 2 for side in image.shape[2:])
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.mix(self.activation(self.norm2(self.reduce(image))))


def averages(finest: Float[Tensor, "b c h w"], depth: int) -> list[Float[Tensor, "b c _ _"]]:
    """The grid, then the averages over 2 x 2, 4 x 4 ... of its tokens, at the border of those that there are."""
    image = finest.contiguous() if depth else finest
    return [finest, *(F.avg_pool2d(image, 2**level, ceil_mode=True) for level in range(1, depth + 1))]


def to_z_order(grid: Shaped[Tensor, "b h w d"], depth: int) -> Shaped[Tensor, "b n d"]:
    """The tokens of a grid in Z-order: the four of each 2 x 2 square are consecutive, recursively ``depth`` times."""
    x = regions.to_regions(grid, grid.shape[1] // 2**depth, grid.shape[2] // 2**depth)
    for _ in range(depth):
        x = rearrange(x, "b p (i y) (j x) d -> b (p i j) y x d", i=2, j=2)
    return rearrange(x, "b n 1 1 d -> b n d")


def from_z_order(tokens: Shaped[Tensor, "b n d"], rows: int, cols: int, depth: int) -> Shaped[Tensor, "b h w d"]:
    """Undo :func:`to_z_order` for a grid of ``rows x cols`` tokens."""
    x = rearrange(tokens, "b n d -> b n 1 1 d")
    for _ in range(depth):
        x = rearrange(x, "b (p i j) y x d -> b p (i y) (j x) d", i=2, j=2)
    return regions.from_regions(x, rows // 2**depth, cols // 2**depth)


def _children(tokens: Float[Tensor, "b m n d"], parents: Int[Tensor, "b m p k"]) -> Float[Tensor, "b m p fourk d"]:
    """For each group of queries, the children of its parents."""
    families = rearrange(tokens, "b m (n s) d -> b m n (s d)", s=4)
    index = parents.flatten(2)[..., None].expand(-1, -1, -1, families.shape[-1])
    chosen = torch.gather(families, 2, index)
    return rearrange(chosen, "b m (p k) (s d) -> b m p (k s) d", k=parents.shape[3], s=4)
