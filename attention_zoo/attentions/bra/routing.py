"""Region-to-region routing: which regions each region attends to.

Shape legend: b batch, p query regions (or, with per_token_routing, query tokens), r key regions, k routed regions,
c channels of queries and keys.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.core.base import InvalidOption


class Router(nn.Module):
    """Top-k regions by the product of region descriptors (BiFormer, eq. 3-4).

    Args:
        qk_dim: channels of the descriptors.
        topk: how many regions each region is routed to.
        scale: factor of the query descriptors.
        param_routing: first apply one learned linear map to both descriptors.
        diff_routing: keep the gradient; otherwise descriptors are detached.

    Attributes:
        imposed: (b, p, k) routes that override the scores, to compare two implementations on the same routes.
    """

    def __init__(self, qk_dim: int, topk: int, scale: float | int, param_routing: bool, diff_routing: bool) -> None:
        super().__init__()
        self.qk_dim, self.topk, self.scale, self.diff_routing = qk_dim, topk, scale, diff_routing
        self.emb = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()
        self.imposed: Tensor | None = None

    def forward(
        self, q: Float[Tensor, "b p c"], k: Float[Tensor, "b r c"], empty: Bool[Tensor, "b r"] | None = None
    ) -> tuple[Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
        """Indices of the routed regions, best first, and the softmax over their scores.

        Args:
            q, k: descriptors of the regions' queries and keys; or the queries of single tokens.
            empty: key regions that contain only masked padding; they rank last, with weight 0.
        """
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        scores = (self.emb(q) * self.scale) @ self.emb(k).transpose(-2, -1)
        if empty is not None:
            scores = scores.masked_fill(empty[:, None], float("-inf"))
        if self.imposed is not None:
            return self.imposed, torch.softmax(scores.gather(-1, self.imposed), dim=-1)
        best, index = torch.topk(scores, self.topk, dim=-1)
        return index, torch.softmax(best, dim=-1)

    def macs(self, queries: int, count: int) -> int:
        """Multiply-accumulates for as many query descriptors and ``count`` regions."""
        embedding = 0 if isinstance(self.emb, nn.Identity) else (queries + count) * self.qk_dim**2
        return queries * count * self.qk_dim + embedding


def optimal_regions_per_side(tokens: int, topk: int) -> float:
    """The S that minimises BRA's cost for ``tokens`` tokens: (topk * tokens ** 2 / 2) ** (1 / 6) (section 3.3)."""
    return (topk * tokens**2 / 2) ** (1 / 6)


def auto_regions_per_side(
    height: int, width: int, dim: int, topk: int, any_size: bool, per_token: bool = False, coarse: bool = False
) -> int:
    """The integer S of least cost (in MACs per channel) that has at least ``topk`` regions.

    ``any_size`` allows an S that does not divide the grid; its padding is part of the cost, as is that of
    ``per_token`` routing (then the optimum is near (2 * topk * tokens) ** (1 / 4)) and of a ``coarse`` gate.

    Raises:
        InvalidOption: no such S exists.
    """

    def cost(side: int) -> float:
        tokens = side**2 * -(-height // side) * -(-width // side)
        routing = (tokens if per_token else side**2) * side**2
        return (4 + coarse) * tokens * dim + routing + 2 * coarse * side**4 + 2 * topk * tokens**2 / side**2

    sides = [
        side
        for side in range(1, min(height, width) + 1)
        if side**2 >= topk and (any_size or not (height % side or width % side))
    ]
    if not sides:
        raise InvalidOption(
            f"n_win='auto': no common divisor S of a {height} x {width} grid has S * S >= topk={topk}; "
            f"pass auto_pad=True or a smaller topk"
        )
    return min(sides, key=cost)
