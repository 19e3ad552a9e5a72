"""Bi-Level Routing Attention: the module, its options and its cost. The mathematics is in ``reference``.

Shape legend: b batch, h w grid, p regions (S x S, row-major), k routed regions, c channels.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from attention_zoo.attentions.bra import flex, reference, sdpa, triton
from attention_zoo.attentions.bra.kv_downsample import KVDownsample, Mode
from attention_zoo.attentions.bra.routing import Router, auto_regions_per_side
from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast0, AtLeast1
from attention_zoo.core.profiler_ranges import stage
from attention_zoo.core.registry import register
from attention_zoo.ops import regions


class QKVLinear(nn.Module):
    """One linear map to queries, keys (qk_dim channels each) and values (dim channels)."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)

    def forward(self, x: Float[Tensor, "*g c"]) -> Float[Tensor, "*g e"]:
        return self.qkv(x)


@register("bra")
class BiLevelRoutingAttention(Attention):
    """Each region of queries attends to the tokens of its ``topk`` most related regions (BiFormer, section 3.2).

    Args:
        n_win: regions per side S; ``auto`` takes the S that minimises the cost (section 3.3) for each input.
        topk: routed regions per query region, at most S * S.
        qk_dim: channels of queries and keys, default ``dim``.
        qk_scale: scale of the scores, default ``qk_dim ** -0.5`` (not head_dim).
        kv_downsample_mode: how a region's keys and values are reduced before they are gathered.
        kv_per_win: ada_*: a region's keys and values become kv_per_win x kv_per_win tokens.
        kv_downsample_ratio: avgpool, maxpool, conv, fracpool: the reduction per side.
        kv_downsample_kernel: conv, fracpool: the kernel, default the ratio.
        param_attention: ``qkvo`` projects q, k, v and the output; ``qkv`` has no output projection.
        param_routing: apply a linear map to the region descriptors; needs diff_routing.
        diff_routing: let gradients flow through the routing scores. Without soft_routing the forward pass is
            unchanged and the gradient is the soft one (a straight-through estimator).
        soft_routing: scale the gathered keys and values by the softmax of their routing scores.
        side_dwconv: kernel of the depthwise convolution of the values that is added to the output (LePE); 0: none.
        auto_pad: zero-pad the bottom and right of a grid that S does not divide; otherwise such a grid is rejected.
        mask_padding: exclude that padding from descriptors, pooling, attention and LePE. The published code,
            and the default here, attends to it.
        coarse_gate: add multi-head attention among the regions' mean queries, keys and values, with the same scale,
            times a gate that a linear map projects from the input: one factor per token and channel. It is added
            before the output projection, like the coarse stage of video sparse attention (VSA, section 2.2), but
            without a gate of the fine stage, which VSA's code leaves out too. Means are taken before any reduction,
            of real tokens if padding is masked, and pass gradients on. Routes do not change: in VSA the scores of
            the coarse stage choose them, for each head. To adapt a checkpoint, start with a gate of zero (there,
            section 2.3); it is initialised like any linear map. In ``macs`` its parts are projection and attention.
        per_token_routing: each token chooses its regions by its own query against the regions' mean keys, as in
            mixture of block attention (MoBA, eq. 4 to 6); routing weights are per token then. Heads still share
            routes, and no region is always chosen: there each head chooses, and a token's own block is always met.
        impl: ``flex`` is PyTorch's FlexAttention, with a block mask built from the routes in every step. It is forward
            only on a CPU, and ``auto`` prefers ``sdpa`` where that can run. ``triton`` is custom kernels, on CUDA.
            Only ``reference`` and ``sdpa`` route single tokens.

    VSA is Zhang et al., Faster Video Diffusion with Trainable Sparse Attention, 2025, arXiv 2505.13389; MoBA is Lu et
    al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025, arXiv 2502.13189.

    Attributes:
        keep_routes: whether each forward pass stores its routes in ``kept_routes``: (b, p, k), or (b, q, k) for the
            query tokens of one region after another.
    """

    family = "routed"
    attends_to = "its region's topk most related regions"
    citation = "Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv 2303.08810"
    equation = "regions choose topk regions by q_r k_rᵀ; softmax(q kᵀ/√d) v over their tokens + LePE(v)"
    left_open = (
        "grids that n_win does not divide: refused, or padded before the projection, as the first code (the later one "
        "for NCHW: after it), and masked by an option"
    )
    departs = (
        "kv_downsample_mode conv and fracpool, diff_routing without soft_routing, announced and never published; "
        "coarse_gate and per_token_routing are other papers'"
    )
    impls = ("reference", "flex", "sdpa", "triton")
    minimal_options = {"n_win": 2, "topk": 1, "side_dwconv": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        n_win: AtLeast1 | Literal["auto"] = 7,
        topk: AtLeast1 = 4,
        qk_dim: AtLeast1 | None = None,
        qk_scale: float | int | None = None,
        kv_downsample_mode: Mode = "identity",
        kv_per_win: AtLeast1 = 4,
        kv_downsample_ratio: AtLeast1 = 4,
        kv_downsample_kernel: AtLeast1 | None = None,
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: AtLeast0 = 3,
        auto_pad: bool = False,
        mask_padding: bool = False,
        coarse_gate: bool = False,
        per_token_routing: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        self.qk_dim = qk_dim or dim
        _check(self.qk_dim, num_heads, n_win, topk, param_routing, diff_routing)
        self.n_win, self.topk = n_win, topk
        self.exponent = (3 / 2 if per_token_routing else 4 / 3) if n_win == "auto" else 2
        self.scale = qk_scale or self.qk_dim**-0.5
        self.keep_routes = False
        self.kept_routes: Tensor | None = None
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.auto_pad, self.mask_padding, self.per_token_routing = auto_pad, mask_padding, per_token_routing
        self.qkv = QKVLinear(dim, self.qk_dim)
        self.router = Router(self.qk_dim, topk, self.scale, param_routing, diff_routing)
        self.kv_down = KVDownsample(
            self.qk_dim + dim, kv_downsample_mode, kv_per_win, kv_downsample_ratio, kv_downsample_kernel
        )
        self.lepe = depthwise(dim, side_dwconv, "side_dwconv") if side_dwconv else None
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.coarse_gate = nn.Linear(dim, dim) if coarse_gate else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.forward_with_routes(x)[0]

    def forward_with_routes(
        self, x: Float[Tensor, "b h w c"]
    ) -> tuple[Float[Tensor, "b h w c"], Int[Tensor, "b p k"], Float[Tensor, "b p k"]]:
        """The output, and for each query region the indices of its routed regions and their weights, best first.

        With ``per_token_routing`` p are the query tokens of one region after another, padding included.
        """
        impl = self.chosen_impl(x)
        height, width = x.shape[1:3]
        side = self.regions_per_side(height, width)
        padded = regions.pad_to_multiple(x, side, side)
        valid = None
        if self.mask_padding and padded is not x:
            valid = regions.inside(height, width, (padded.shape[1], padded.shape[2]), x.device)
        if impl == "flex" and not x.is_meta:
            out, index, weight = flex.forward(self, padded, side)
        elif impl in ("sdpa", "flex"):
            # On meta tensors flex counts the products of sdpa, which are the same.
            out, index, weight = sdpa.forward(self, padded, side)
        elif impl == "triton":
            out, index, weight = triton.forward(self, padded, side, valid)
        else:
            out, index, weight = reference.forward(self, padded, side, valid)
        if self.keep_routes:
            self.kept_routes = index.detach()
        with stage("bra.output"):
            if impl == "sdpa" and sdpa.is_plain(self.wo):
                out = sdpa.project(out, self.wo.weight, self.wo.bias)
            elif impl == "triton" and sdpa.is_plain(self.wo):
                out = triton.triton_ops.linear(out, self.wo)
            else:
                out = self.wo(out)
            return regions.crop(out, height, width), index, weight

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        if impl == "triton":
            return triton.unsupported(self, x)
        if (
            impl in ("sdpa", "flex")
            and self.mask_padding
            and any(size % self.regions_per_side(*x.shape[1:3]) for size in x.shape[1:3])
        ):
            return f"it masks no padding, which mask_padding=True asks for on a {x.shape[1]} x {x.shape[2]} grid"
        return flex.unsupported(self, x) if impl == "flex" else None

    def routes(self, x: Float[Tensor, "b h w c"]) -> tuple[Int[Tensor, "b *p k"], Float[Tensor, "b *p k"]]:
        """The routed regions of each query region and their weights: softmax over the k routing scores.

        They are (b, p, k), or (b, h, w, k) with ``per_token_routing``.
        """
        with torch.no_grad():
            index, weight = self.forward_with_routes(x)[1:]
        return (self._on_grid(index, x), self._on_grid(weight, x)) if self.per_token_routing else (index, weight)

    def _on_grid(self, routes: Shaped[Tensor, "b q k"], x: Float[Tensor, "b h w c"]) -> Shaped[Tensor, "b h w k"]:
        height, width = x.shape[1:3]
        side = self.regions_per_side(height, width)
        tiles = routes.view(len(x), side**2, -(-height // side), -(-width // side), -1)
        return regions.crop(regions.from_regions(tiles, side, side), height, width)

    def regions_per_side(self, height: int, width: int) -> int:
        """S for a grid of this size.

        Raises:
            InvalidOption: S does not divide the grid and auto_pad is off, or the regions are too small for the
                kv downsampling.
        """
        side = self.n_win
        if side == "auto":
            options = self.per_token_routing, self.coarse_gate is not None
            side = auto_regions_per_side(height, width, self.dim, self.topk, self.auto_pad, *options)
        if not self.auto_pad and (height % side or width % side):
            raise InvalidOption(
                f"n_win={side} does not divide the {height} x {width} grid; "
                f"pass auto_pad=True or a common divisor of both sides"
            )
        self.kv_down.out_size(-(-height // side), -(-width // side))
        return side

    def grid_multiple(self, height: int, width: int) -> int:
        if self.n_win == "auto":
            return 1
        side = self.regions_per_side(height, width)
        # The blocks of FlexAttention are regions, which must have enough tokens for its tiles.
        return side * math.gcd(flex.REGION_SIDE, -(-height // side), -(-width // side)) if self.impl == "flex" else side

    def macs(self, height: int, width: int) -> Macs:
        side = self.regions_per_side(height, width)
        region = -(-height // side), -(-width // side)
        tokens = side**2 * region[0] * region[1]
        square = self.dim**2 * ((not isinstance(self.wo, nn.Identity)) + (self.coarse_gate is not None))
        coarse = 0 if self.coarse_gate is None else side**4
        lepe = 0 if self.lepe is None else self.dim * self.lepe.kernel_size[0] ** 2
        return Macs(
            projection=tokens * (self.dim * (2 * self.qk_dim + self.dim) + square),
            routing=self.router.macs(tokens if self.per_token_routing else side**2, side**2),
            attention=(tokens * self._routed_keys(*region) + coarse) * (self.qk_dim + self.dim),
            local_conv=tokens * lepe + side**2 * self.kv_down.macs(*region),
        )

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """Keys of the routed regions; with ``coarse_gate`` also the regions that the query's region attends to."""
        side = self.regions_per_side(height, width)
        coarse = 0 if self.coarse_gate is None else side**2
        return self._routed_keys(-(-height // side), -(-width // side)) + coarse

    def _routed_keys(self, height: int, width: int) -> int:
        """Keys of topk regions of ``height x width`` tokens."""
        kept = self.kv_down.out_size(height, width)
        return self.topk * kept[0] * kept[1]


def _check(qk_dim: int, num_heads: int, n_win: int | str, topk: int, param_routing: bool, diff_routing: bool) -> None:
    if qk_dim % num_heads:
        raise InvalidOption(f"qk_dim={qk_dim} is not divisible by num_heads={num_heads}")
    if isinstance(n_win, int) and topk > n_win**2:
        raise InvalidOption(f"topk={topk} exceeds the {n_win**2} regions of n_win={n_win}; valid: 1 to {n_win**2}")
    if param_routing and not diff_routing:
        raise InvalidOption("param_routing=True needs diff_routing=True: nothing else would train it")
