"""The Transformer block around any attention: position convolution, attention, MLP."""

import inspect
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.lepe import depthwise
from attention_zoo.core.base import InvalidOption, Macs
from attention_zoo.core.registry import build
from attention_zoo.core.registry import options as declared

HEADS_OF_FULL_ATTENTION = 8
"""The published block does not pass num_heads to its full attention (topk -1, -2), which therefore has 8 heads."""


class Block(nn.Module):
    """The block of BiFormer (section 3.4): NCHW in, NCHW out.

    ``topk`` selects the attention as published: > 0 ``bra``, -1 ``full``, -2 ``lepe``, 0 ``pseudo_conv``.
    ``attention`` selects any registered one instead and passes it ``num_heads`` and ``**options``.

    Args:
        dim: channels.
        drop_path: rate of stochastic depth on both residual branches.
        layer_scale_init_value: if > 0, both branches have learned per-channel factors with this initial value.
        num_heads, n_win, qk_dim, qk_scale, kv_*, topk, param_*, *_routing, side_dwconv, auto_pad,
        mask_padding, coarse_gate, per_token_routing: options of BiLevelRoutingAttention, documented there.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        mlp_dwconv: put a 3x3 depthwise convolution into the MLP.
        before_attn_dwconv: kernel of the depthwise convolution that is added to x before attention; 0: none.
        pre_norm: normalise before each branch; else after each residual sum.
        attention: a registered name, in place of the choice by topk.
        impl: the attention's implementation; the default is the published code.
        **options: options of ``attention``.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float | int = 0.0,
        layer_scale_init_value: float | int = -1,
        num_heads: int = 8,
        n_win: int | str = 7,
        qk_dim: int | None = None,
        qk_scale: float | int | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "ada_avgpool",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        mlp_ratio: float | int = 4,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        auto_pad: bool = False,
        mask_padding: bool = False,
        coarse_gate: bool = False,
        per_token_routing: bool = False,
        attention: str | None = None,
        impl: str = "reference",
        **options: Any,
    ) -> None:
        super().__init__()
        self.dim, self.pre_norm = dim, pre_norm
        routed = dict(
            n_win=n_win, topk=topk, qk_dim=qk_dim, qk_scale=qk_scale, kv_downsample_mode=kv_downsample_mode,
            kv_per_win=kv_per_win, kv_downsample_ratio=kv_downsample_ratio,
            kv_downsample_kernel=kv_downsample_kernel, param_attention=param_attention,
            param_routing=param_routing, diff_routing=diff_routing, soft_routing=soft_routing,
            side_dwconv=side_dwconv, auto_pad=auto_pad, mask_padding=mask_padding, coarse_gate=coarse_gate,
            per_token_routing=per_token_routing,
        )  # fmt: skip
        if attention is None and options:
            raise InvalidOption(f"Block has no option {next(iter(options))!r}; name an attention= that takes it")
        name, heads, values = _choose(attention, topk, num_heads, routed, options, side_dwconv)
        self.pos_embed = depthwise(dim, before_attn_dwconv, "before_attn_dwconv") if before_attn_dwconv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = build(name, dim=dim, num_heads=heads, impl=impl, **values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.hidden, self.mlp_dwconv = int(mlp_ratio * dim), mlp_dwconv
        self.mlp = self.make_mlp(dim, self.hidden, mlp_dwconv)
        self.drop_path = DropPath(drop_path)
        self.gamma1: Tensor | float = 1.0
        self.gamma2: Tensor | float = 1.0
        if layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))

    @staticmethod
    def make_mlp(dim: int, hidden: int, dwconv: bool) -> nn.Sequential:
        """The MLP. Its second slot always exists, so that parameter names do not change."""
        middle = DepthwiseNHWC(hidden) if dwconv else nn.Identity()
        return nn.Sequential(nn.Linear(dim, hidden), middle, nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = rearrange(x, "b c h w -> b h w c")
        if self.pre_norm:
            x = x + self._branch(self.gamma1, self.attn(self.norm1(x)))
            x = x + self._branch(self.gamma2, self.mlp(self.norm2(x)))
        else:
            x = self.norm1(x + self._branch(self.gamma1, self.attn(x)))
            x = self.norm2(x + self._branch(self.gamma2, self.mlp(x)))
        return rearrange(x, "b h w c -> b c h w")

    def _branch(self, gamma: Tensor | float, x: Tensor) -> Tensor:
        return self.drop_path(gamma * x if isinstance(gamma, Tensor) else x)

    def macs(self, height: int, width: int) -> Macs:
        """The analytic cost of one forward pass, batch 1; AttributeError if the attention declares none."""
        n = height * width
        conv = 0 if self.pos_embed is None else self.pos_embed.kernel_size[0] ** 2
        mlp = n * self.hidden * (2 * self.dim + (9 if self.mlp_dwconv else 0))
        return self.attn.macs(height, width) + Macs(local_conv=n * self.dim * conv, other=mlp)  # type: ignore[operator]


def _choose(
    attention: str | None, topk: int, num_heads: int, routed: dict[str, Any], options: dict[str, Any], side_dwconv: int
) -> tuple[str, int, dict[str, Any]]:
    """The attention's name, heads and options."""
    if attention == "bra" or (attention is None and topk > 0):
        return "bra", num_heads, routed | options
    if attention is not None:
        # Arguments of Block that are also options of the attention, if they differ from their defaults.
        defaults = {name: parameter.default for name, parameter in inspect.signature(Block).parameters.items()}
        shared = {
            name: routed[name] for name in declared(attention) if name in routed and routed[name] != defaults[name]
        }
        return attention, num_heads, shared | options
    if topk == -1:
        return "full", HEADS_OF_FULL_ATTENTION, {}
    if topk == -2:
        return "lepe", HEADS_OF_FULL_ATTENTION, {"side_dwconv": side_dwconv}
    if topk == 0:
        return "pseudo_conv", 1, {}
    raise InvalidOption(f"topk={topk} is not valid; valid: > 0 (bra), 0 (pseudo_conv), -1 (full), -2 (lepe)")


class DepthwiseNHWC(nn.Module):
    """A 3x3 depthwise convolution of an NHWC tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return rearrange(self.dwconv(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, zero a sample's branch with probability ``rate``."""

    def __init__(self, rate: float | int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise InvalidOption(f"drop_path={rate} is not valid; valid: at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *g c"]) -> Float[Tensor, "b *g c"]:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)
