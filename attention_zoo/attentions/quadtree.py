"""Quadtree attention: from coarse to fine, queries attend to the children of their parent's highest-scoring keys.

Tokens are in Z-order: the children of token j of a level are tokens 4j to 4j + 3 of the next finer one.
Shape legend: b batch, m heads, n tokens of a level, p groups of s queries that share k keys, d channels.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from attention_zoo.core.base import Attention, Impl, Macs
from attention_zoo.core.options import AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops import regions
from attention_zoo.ops.softmax_attention import softmax_attention

Level = tuple[Tensor, Tensor | None]
"""Queries, keys and values of a level's tokens, and the fraction of each token that is not padding (None: all)."""


@register("quadtree")
class QuadtreeAttention(Attention):
    """QuadTree-B: full attention on the coarsest grid, then on the children of each query's topk keys.

    Queries, keys and values of a level are the 2x2 averages of the next finer one. Every level computes a message.
    Messages are summed, weighted by a softmax over one learned number per level; a coarse message is added to all
    its descendants. Each head and each query selects its own topk keys. This is the variant of
    feature matching. The published vision backbone also pools values by a learned stack and adds a position convolution
    of the values; neither is built here.

    A grid that 2 ** (levels - 1) does not divide is zero-padded at the bottom and right; averages exclude the
    padding and no query attends to it. A grid too small for ``levels`` has as many as fit its shorter side, without
    the coarsest ones. ``sdpa`` fuses only the finest level: the topk needs the scores of the others.

    Args:
        levels: number of grids from coarse to fine (published: 3 where the grid is largest).
        topk: keys selected per query, at most all of them; only their children are keys of the next level
            (published for classification: 8).
        qkv_bias: whether the qkv projection has a bias.
    """

    family = "routed"
    attends_to = "the finest descendants of its best coarse keys"
    citation = "Tang et al., QuadTree Attention for Vision Transformers, ICLR 2022 (QuadTree-B)"
    equation = "Σ over levels of w · softmax(q kᵀ/√d) v among the children of the parents' topk keys"
    left_open = "padding: masked; small grids: fewer levels"
    departs = "the variant of feature matching: the vision backbone's pools values by a learned stack and adds LePE"
    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"levels": 2, "topk": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        levels: AtLeast1 = 3,
        topk: AtLeast1 = 8,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.levels, self.topk = levels, topk
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.weight = nn.Parameter(torch.randn(levels)) if levels > 1 else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        height, width = x.shape[1:3]
        depth = self.depth(height, width)
        grid = regions.pad_to_multiple(self.qkv(x), 2**depth, 2**depth)
        rows, cols = grid.shape[1], grid.shape[2]
        tokens = rearrange(to_z_order(grid, depth), "b n (t m d) -> b m n (t d)", t=3, m=self.num_heads)
        share = None
        if (rows, cols) != (height, width):
            inside = regions.inside(height, width, (rows, cols), x.device).to(x.dtype)
            share = rearrange(to_z_order(inside[None, :, :, None], depth), "1 n 1 -> n")
        out = self._coarse_to_fine(_pyramid(tokens, share, depth), self.chosen_impl(x))
        out = from_z_order(rearrange(out, "b m n d -> b n (m d)"), rows, cols, depth)
        return self.proj(regions.crop(out, height, width))

    def depth(self, height: int, width: int) -> int:
        """How many times a grid of this size is halved."""
        return min(self.levels, min(height, width).bit_length()) - 1

    def _coarse_to_fine(self, pyramid: list[Level], impl: str) -> Float[Tensor, "b m n d"]:
        if self.weight is None or len(pyramid) == 1:
            q, k, v = pyramid[0][0].chunk(3, dim=-1)
            return softmax_attention(q, k, v, self.scale, impl=impl)
        weight = torch.softmax(self.weight[-len(pyramid) :], dim=0)
        messages = self._messages(pyramid, impl)
        out = weight[0] * next(messages)[:, :, 0]
        for factor, message in zip(weight[1:], messages, strict=True):
            out = rearrange(out[..., None, :] + factor * message, "b m p s d -> b m (p s) d")
        return out

    def _messages(self, pyramid: list[Level], impl: str) -> Iterator[Float[Tensor, "b m p s d"]]:
        """The message of each level to its queries, coarsest level first."""
        best = None
        for level, (tokens, share) in enumerate(pyramid):
            size = tokens.shape[-1] // 3
            q, kv = tokens.split([size, 2 * size], dim=-1)
            q = rearrange(q, "b m (p s) d -> b m p s d", s=q.shape[2] if best is None else 4)
            index, kv = _all_keys(kv) if best is None else _children(kv, best)
            k, v = kv.chunk(2, dim=-1)
            bias = None if share is None else torch.log((share > 0).to(q.dtype))[index][..., None, :]
            if level == len(pyramid) - 1:
                yield softmax_attention(q, k, v, self.scale, bias, impl)
            else:
                message, best = self._message_and_best(q, k, v, bias, index)
                yield message

    def _message_and_best(
        self,
        q: Float[Tensor, "b m p s d"],
        k: Float[Tensor, "b m p k d"],
        v: Float[Tensor, "b m p k d"],
        bias: Float[Tensor, "..."] | None,
        index: Int[Tensor, "#b #m p k"],
    ) -> tuple[Float[Tensor, "b m p s d"], Int[Tensor, "b m n best"]]:
        """The message of a level, and for each of its queries the topk keys to refine at the next level."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        chosen = scores.detach().topk(min(self.topk, scores.shape[-1]), dim=-1).indices
        best = torch.gather(index[..., None, :].expand(scores.shape), -1, chosen)
        return torch.softmax(scores, dim=-1) @ v, rearrange(best, "b m p s k -> b m (p s) k")

    def macs(self, height: int, width: int) -> Macs:
        depth, keys = self.depth(height, width), self._keys(height, width)
        padded = -(-height // 2**depth) * -(-width // 2**depth) * 4**depth
        pairs = sum(padded // 4 ** (depth - level) * count for level, count in enumerate(keys))
        return Macs(projection=4 * height * width * self.dim**2, attention=2 * pairs * self.dim)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """Keys of all levels together, including masked padding."""
        return sum(self._keys(height, width))

    def _keys(self, height: int, width: int) -> list[int]:
        """Keys per query of each level, coarsest first."""
        depth = self.depth(height, width)
        keys = [-(-height // 2**depth) * -(-width // 2**depth)]
        for _ in range(depth):
            keys.append(4 * min(self.topk, keys[-1]))
        return keys


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


def _pyramid(tokens: Float[Tensor, "b m n d"], share: Float[Tensor, " n"] | None, depth: int) -> list[Level]:
    """Levels, coarsest first: averages of the real tokens, and the fraction of real tokens in each (None: all)."""
    levels: list[Level] = [(tokens, share)]
    for _ in range(depth):
        tokens = rearrange(tokens, "b m (n s) d -> b m n s d", s=4).mean(dim=3)
        if share is None:
            levels.insert(0, (tokens, None))
        else:
            share = rearrange(share, "(n s) -> n s", s=4).mean(dim=1)
            levels.insert(0, (tokens / share.clamp_min(4.0**-depth)[:, None], share))
    return levels


def _all_keys(kv: Float[Tensor, "b m n d"]) -> tuple[Int[Tensor, "1 1 1 n"], Float[Tensor, "b m 1 n d"]]:
    """The indices and values of all tokens, for one group of queries."""
    return torch.arange(kv.shape[2], device=kv.device)[None, None, None], kv[:, :, None]


def _children(
    kv: Float[Tensor, "b m n d"], parents: Int[Tensor, "b m p k"]
) -> tuple[Int[Tensor, "b m p fourk"], Float[Tensor, "b m p fourk d"]]:
    """For each group of queries, the children of its parents: their indices and values."""
    index = (4 * parents[..., None] + torch.arange(4, device=kv.device)).flatten(3)
    families = rearrange(kv, "b m (n s) d -> b m n (s d)", s=4)
    chosen_parents = parents.flatten(2)[..., None].expand(-1, -1, -1, families.shape[-1])
    chosen = torch.gather(families, 2, chosen_parents)
    return index, rearrange(chosen, "b m (p k) (s d) -> b m p (k s) d", k=parents.shape[3], s=4)
