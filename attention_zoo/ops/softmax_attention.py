"""Softmax attention over given queries, keys and values: readable reference code, and PyTorch's fused attention.

Shape legend: g any leading axes, m heads, q queries, k keys, d channels of a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def softmax_attention(
    q: Float[Tensor, "*g m q d"],
    k: Float[Tensor, "*g m k d"],
    v: Float[Tensor, "*g m k e"],
    scale: float | int,
    bias: Float[Tensor, "..."] | None = None,
    impl: str = "reference",
) -> Float[Tensor, "*g m q e"]:
    """softmax(q k^T * scale + bias) v, with ``bias`` broadcast to the scores and -inf where a key is masked."""
    if impl == "sdpa":
        return _fused(q, k, v, scale, bias)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | int, bias: Tensor | None) -> Tensor:
    # PyTorch's fused kernels take exactly one batch axis; with more they fall back to the unfused code.
    lead = q.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    if bias is not None:
        bias = bias.expand(*lead, *bias.shape[-3:]).reshape(-1, *bias.shape[-3:])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.reshape(*lead, *out.shape[1:])


def split_heads(x: Float[Tensor, "*g n d"], heads: int) -> Float[Tensor, "*g m n e"]:
    """Split channels into (heads, channels of a head), with heads before tokens."""
    # Avoids einops: its 8 us per call are significant when a whole step takes 2 ms.
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def merge_heads(x: Float[Tensor, "*g m n e"]) -> Float[Tensor, "*g n d"]:
    """Undo :func:`split_heads`."""
    return x.transpose(-3, -2).flatten(-2)


def unit_length(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """``x`` divided by its norm along an axis; zeros, such as the keys of padding, stay zeros."""
    # The default epsilon, 1e-12, is 0 in fp16.
    return F.normalize(x, dim=dim, eps=max(1e-12, torch.finfo(x.dtype).smallest_normal))
