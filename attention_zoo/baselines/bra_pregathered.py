"""A baseline for BRA, not an attention of the zoo: its keys and values are already gathered.

Shape legend: b batch, h w grid, t tokens of the whole batch, r query regions of the whole batch, n tokens of a
region, l keys of a region, m heads, c dim, e channels of a head.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.bra.sdpa import project
from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.memory_simulation import device_type
from attention_zoo.core.options import AtLeast0, AtLeast1
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, softmax_attention, split_heads


@register("bra_pregathered")
class PregatheredAttention(Attention):
    """As many products and as many keys per region as BRA, but no routing, gather or scatter.

    Each group of n consecutive tokens attends to a run of topk * n consecutive tokens. The runs overlap and are views
    of the projected keys and values. Projections and LePE are those of BRA.

    Args:
        n_win: regions per side; must divide the grid.
        topk: routed regions per query region.
        side_dwconv: kernel of LePE, 0: none.
    """

    impls = ("reference", "sdpa")
    exponent = 2
    minimal_options = {"n_win": 2, "topk": 1}
    listed = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        n_win: AtLeast1 = 7,
        topk: AtLeast1 = 4,
        side_dwconv: AtLeast0 = 3,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if topk > n_win**2:
            raise InvalidOption(f"topk={topk} exceeds the {n_win**2} regions of n_win={n_win}; valid: 1 to {n_win**2}")
        self.n_win, self.topk, self.scale = n_win, topk, dim**-0.5
        self.qkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = depthwise(dim, side_dwconv, "side_dwconv") if side_dwconv else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        batch, height, width = x.shape[:3]
        count, keys, impl = batch * self.n_win**2, self.kv_tokens_per_query(height, width), self.chosen_impl(x)
        # The same projection as BRA's, so that BRA has no advantage over it.
        as_sdpa = impl == "sdpa" and device_type(x) == "cpu"
        if as_sdpa:
            parts = (t.split(self.dim) for t in (self.qkv.weight, self.qkv.bias))
            q, k, v = (project(x, weight, bias) for weight, bias in zip(*parts, strict=True))
        else:
            q, k, v = self.qkv(x).split(self.dim, dim=-1)
        k_runs, v_runs = (_Runs.apply(t.flatten(0, 2), count, keys) for t in (k, v))
        queries = q.reshape(count, -1, self.dim)
        heads = [split_heads(t, self.num_heads) for t in (queries, k_runs, v_runs)]
        out = merge_heads(softmax_attention(heads[0], heads[1], heads[2], self.scale, impl=impl))
        out = out.reshape(x.shape)
        if self.lepe is not None:
            out = out + rearrange(self.lepe(rearrange(v, "b h w c -> b c h w")), "b c h w -> b h w c")
        return project(out, self.wo.weight, self.wo.bias) if as_sdpa else self.wo(out)

    def macs(self, height: int, width: int) -> Macs:
        tokens, lepe = height * width, 0 if self.lepe is None else self.lepe.kernel_size[0] ** 2
        return Macs(
            projection=4 * tokens * self.dim**2,
            attention=2 * tokens * self.kv_tokens_per_query(height, width) * self.dim,
            local_conv=tokens * self.dim * lepe,
        )

    def grid_multiple(self, height: int, width: int) -> int:
        return self.n_win

    def kv_tokens_per_query(self, height: int, width: int) -> int:
        if height % self.n_win or width % self.n_win:
            raise InvalidOption(f"n_win={self.n_win} does not divide the {height} x {width} grid")
        return self.topk * height * width // self.n_win**2


class _Runs(torch.autograd.Function):
    """Evenly spaced runs of consecutive tokens.

    In the backward pass, a token gets the gradient of one of its occurrences, not the sum over all: the baseline
    excludes that sum.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Float[Tensor, "t c"], count: int, length: int) -> Float[Tensor, "r l c"]:
        ctx.share = len(tokens) // count
        step = (len(tokens) - length) // max(1, count - 1)
        row, channel = tokens.stride()
        return tokens.as_strided(
            (count, length, tokens.shape[1]), (step * row, row, channel), tokens.storage_offset()
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "r l c"]) -> tuple[Tensor | None, ...]:
        return grad[:, : ctx.share].reshape(-1, grad.shape[2]), None, None
