"""Aggregated attention: one softmax over the window around a token and a pooled grid (TransNeXt).

Shape legend: b batch, h w grid, n tokens, y x pooled grid, s pooled tokens, k tokens of a window, m heads, e channels
of a head.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.attentions.cosine_window import PositionNetwork, log_spaced
from attention_zoo.core.base import Attention, Impl, InvalidOption, Macs
from attention_zoo.core.options import AtLeast1, Range
from attention_zoo.core.registry import register
from attention_zoo.ops.softmax_attention import merge_heads, split_heads, unit_length

FIRST_TEMPERATURE = 0.24


@register("aggregated")
class AggregatedAttention(Attention):
    """Pixel-focused attention with a query embedding and learned tokens: fine keys nearby, pooled keys everywhere.

    Queries and keys have length 1, and a learned embedding is added to the queries. Scores are multiplied by a learned
    temperature per head (softplus, 1 / 0.24 at first) and by the logarithm of the number of a query's keys. Scores of
    the window get a learned bias per position; those of pooled keys a bias from a network of log-spaced relative
    positions, as Swin V2's, without its sigmoid. After the softmax, the weights in the window get the products of the
    query with learned tokens, and a learned number per position. Window keys outside the grid are masked. Pooled
    features are a 1x1 convolution, GELU, adaptive average and LayerNorm; both kinds share the projection to k and v.

    ``sr_ratio`` 1 is the published last stage: cosine attention to all tokens with embedding, temperature and position
    bias, without window, learned tokens and pooling. There the last bias of the position network cancels in the
    softmax and is omitted.

    The published code for classification is built for one resolution; here, as in that for dense prediction, positions
    and lengths follow the grid. Both need sides of at least sr_ratio, or longer than a fixed pooled grid's, and divide
    by zero for a side of one token; here a side keeps at least one pooled token, and that token's coordinate is 0. The
    code evaluates the position network at distinct relative positions; so does this, but where pooling is uneven also
    at those between. There is no fused implementation: fused attention would copy the pooled keys for each query,
    since the window's keys differ from query to query.

    Args:
        sr_ratio: tokens per pooled token and side, rounded down to a whole number of them; published: 8, 4, 2, 1.
        window_size: tokens per side of the window, odd.
        pool_size: tokens per side of the pooled grid, at most the grid's; None: by sr_ratio. A fixed one makes the
            cost linear in the number of tokens (the published linear mode). No effect with sr_ratio 1.
        pretrained_size: tokens per side by which positions are normalised, as for a model trained at that size; None:
            the grid's.
        position_bias: computed at the grid's positions, or computed for one grid and interpolated bilinearly over keys
            and queries, as the published code for dense prediction does by default.
        bias_size: tokens per side of the grid that an interpolated bias is computed for; None: pretrained_size.
            Published for Mask R-CNN and UPerNet: 200, 100, 50, 25 by stage, with pretrained_size 56, 28, 14, 7.
        qkv_bias: whether the projections to q, k and v have a bias.

    Attributes:
        table_dtype: dtype in which positions, and lengths with a window, are computed; None: that of the input, at
            least fp32. The published code computes them in fp32 for every input.

    Raises:
        InvalidOption: window_size is even, position_bias "interpolated" comes without pretrained_size, or bias_size
            without position_bias "interpolated".
    """

    family = "pooled"
    attends_to = "the tokens around it, and a pooled grid, in one softmax"
    citation = "Shi, TransNeXt: Robust Foveal Visual Perception for Vision Transformers, CVPR 2024, section 3"
    equation = "softmax([window; pooled]) of (q̂ + QE) softplus(τ) log N k̂ + B; then + (q̂ T + b) in the window"
    left_open = (
        "other resolutions: all from the grid; pooled size: sr_ratio or pool_size; position bias: computed or "
        "interpolated"
    )
    departs = (
        "any grid (theirs: one resolution, sides of 2 and sr_ratio or more, longer than pool_size); a bias without "
        "effect omitted, separate q layer at sr_ratio 1; 1x1 convolution is a Linear"
    )
    exponent = 2
    minimal_options = {"sr_ratio": 2, "pretrained_size": 4}
    by_stage = {"sr_ratio": (8, 4, 2, 1)}
    table_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        impl: Impl = "auto",
        *,
        sr_ratio: AtLeast1 = 8,
        window_size: AtLeast1 = 3,
        pool_size: AtLeast1 | None = None,
        pretrained_size: Annotated[int, Range(2)] | None = None,
        position_bias: Literal["computed", "interpolated"] = "computed",
        bias_size: AtLeast1 | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, impl)
        if window_size % 2 == 0:
            raise InvalidOption(f"window_size={window_size} is even and has no middle; valid: an odd integer")
        if position_bias == "interpolated" and pretrained_size is None:
            raise InvalidOption("position_bias='interpolated' needs pretrained_size; valid: an integer >= 2")
        if position_bias == "computed" and bias_size is not None:
            raise InvalidOption(f"bias_size={bias_size} needs position_bias='interpolated'; valid otherwise: None")
        self.sr_ratio, self.window_size, self.pool_size = sr_ratio, window_size, pool_size
        self.exponent = 1 if pool_size and sr_ratio > 1 else 2
        self.pretrained_size = pretrained_size
        self.bias_size = (bias_size or pretrained_size) if position_bias == "interpolated" else None
        head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.query_embedding = nn.Parameter(_small(num_heads, 1, head_dim, std=0.02))
        temperature = torch.full((num_heads, 1, 1), 1 / FIRST_TEMPERATURE)
        self.temperature = nn.Parameter(temperature.expm1().log())
        self.position_network = PositionNetwork(num_heads, bias=sr_ratio > 1)
        self.window = WindowParameters(num_heads, head_dim, window_size) if sr_ratio > 1 else None
        self.pool = Pool(dim) if sr_ratio > 1 else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        height, width = x.shape[1:3]
        keys = self._pooled_size(height, width)
        q = unit_length(split_heads(rearrange(self.q(x), "b h w c -> b (h w) c"), self.num_heads))
        kv = self.kv(x)
        pooled = kv if self.pool is None else self.kv(self.pool(x, keys))
        k, v = (split_heads(part, self.num_heads) for part in rearrange(pooled, "b y x c -> b (y x) c").chunk(2, -1))
        inside = None if self.window is None else in_window(height, width, self.window_size, x.device)
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * self._log_length(inside, k, q.dtype)
        scores = scaled.to(v.dtype) @ unit_length(k).to(v.dtype).transpose(-2, -1)
        scores = scores + self._bias((height, width), keys, scores.dtype)
        if self.window is None or inside is None:
            out = torch.softmax(scores, dim=-1) @ v
        else:
            out = self._with_window(q, scaled, scores, v, kv, self.window, inside)
        return self.proj(rearrange(merge_heads(out), "b (h w) c -> b h w c", h=height))

    def _with_window(
        self,
        q: Float[Tensor, "b m n e"],
        scaled: Float[Tensor, "b m n e"],
        scores: Float[Tensor, "b m n s"],
        v: Float[Tensor, "b m s e"],
        kv: Float[Tensor, "b h w twoc"],
        window: "WindowParameters",
        inside: Bool[Tensor, "n k"],
    ) -> Float[Tensor, "b m n e"]:
        """The output with the window's keys in the same softmax as the pooled ones."""
        k, near_v = self._window_keys(kv)
        near = (scaled.to(k.dtype)[..., None, :] @ k)[..., 0, :] + window.bias[:, None]
        near = near.masked_fill(~inside, float("-inf"))
        weights = torch.softmax(torch.cat([near, scores.to(near.dtype)], dim=-1), dim=-1)
        near, far = weights.split([near.shape[-1], scores.shape[-1]], dim=-1)
        near = q.to(v.dtype) @ window.tokens + window.offset + near
        return (near.to(v.dtype)[..., None, :] @ near_v.transpose(-2, -1))[..., 0, :] + far.to(v.dtype) @ v

    def _window_keys(
        self, kv: Float[Tensor, "b h w twoc"]
    ) -> tuple[Float[Tensor, "b m n e k"], Float[Tensor, "b m n e k"]]:
        """The keys, of length 1, and values of each token's window; 0 outside the grid."""
        k, v = kv.chunk(2, dim=-1)
        k = unit_length(rearrange(k, "b h w (m e) -> b h w m e", m=self.num_heads)).flatten(-2)
        image = rearrange(torch.cat([k.to(v.dtype), v], dim=-1), "b h w c -> b c h w")
        around = F.unfold(image, self.window_size, padding=self.window_size // 2)
        k, v = rearrange(around, "b (t m e k) n -> t b m n e k", t=2, m=self.num_heads, k=self.window_size**2)
        return k, v

    def _log_length(
        self, inside: Bool[Tensor, "n k"] | None, keys: Float[Tensor, "b m s e"], dtype: torch.dtype
    ) -> Float[Tensor, "n 1"] | Float[Tensor, "1 1"]:
        """The logarithm of the number of each query's keys."""
        exact = torch.promote_types(dtype, torch.float32)
        if inside is None:
            return torch.full((1, 1), keys.shape[2], dtype=exact, device=keys.device).log().to(dtype)
        exact = self.table_dtype or exact
        return (inside.sum(dim=1, keepdim=True) + keys.shape[2]).to(exact).log().to(dtype)

    def _bias(self, grid: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "m n s"]:
        if self.bias_size is None:
            return self._computed_bias(grid, keys).to(dtype)
        trained = self.bias_size, self.bias_size
        pooled = self._pooled_size(*trained)
        bias = rearrange(self._computed_bias(trained, pooled), "m n (y x) -> m n y x", y=pooled[0])
        bias = F.interpolate(bias, keys, mode="bilinear")
        bias = rearrange(bias, "m (h w) y x -> m (y x) h w", h=trained[0])
        return rearrange(F.interpolate(bias, grid, mode="bilinear"), "m s h w -> m (h w) s").to(dtype)

    def _computed_bias(self, grid: tuple[int, int], keys: tuple[int, int]) -> Float[Tensor, "m n s"]:
        like = self.temperature
        dtype = self.table_dtype or torch.promote_types(like.dtype, torch.float32)
        index, coordinates = [], []
        for length, pooled in zip(grid, keys, strict=True):
            first, step, count = _half_steps(length, pooled)
            steps = torch.arange(count, dtype=dtype, device=like.device) * step + first
            coordinates.append(log_spaced(steps / 2, self.pretrained_size or length))
            index.append((_displacements(length, pooled, like.device) - first) // step)
        table = self.position_network(*coordinates)
        bias = table[index[0][:, None, :, None], index[1][None, :, None, :]]
        return rearrange(bias, "h w y x m -> m (h w) (y x)")

    def _pooled_size(self, height: int, width: int) -> tuple[int, int]:
        if self.pool_size is None or self.sr_ratio == 1:
            return max(height // self.sr_ratio, 1), max(width // self.sr_ratio, 1)
        return min(self.pool_size, height), min(self.pool_size, width)

    def macs(self, height: int, width: int) -> Macs:
        n, keys = height * width, self._pooled_size(height, width)
        pooled = keys[0] * keys[1]
        grid = (height, width)
        if self.bias_size is not None:
            grid = self.bias_size, self.bias_size
            keys = self._pooled_size(*grid)
        positions = _half_steps(grid[0], keys[0])[2] * _half_steps(grid[1], keys[1])[2]
        cost = Macs(
            projection=4 * n * self.dim**2,
            attention=2 * n * pooled * self.dim,
            shared=self.position_network.macs(positions),
        )
        if self.window is None:
            return cost
        near = n * self.window_size**2 * self.dim
        return cost + Macs(projection=(n + 2 * pooled) * self.dim**2, attention=3 * near)

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """Pooled tokens, and on average the tokens of the window that are inside the grid."""
        rows, cols = self._pooled_size(height, width)
        if self.window is None:
            return rows * cols
        return rows * cols + _mean_inside(height, self.window_size) * _mean_inside(width, self.window_size)


class WindowParameters(nn.Module):
    """Per head: the bias of the window's scores, the learned tokens, and a number added to each weight."""

    def __init__(self, num_heads: int, head_dim: int, window_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(_small(num_heads, window_size**2, std=0.0004))
        self.tokens = nn.Parameter(_small(num_heads, head_dim, window_size**2, std=0.02))
        self.offset = nn.Parameter(torch.zeros(num_heads, 1, window_size**2))


class Pool(nn.Module):
    """A 1x1 convolution, as a linear layer of each token, GELU, adaptive average and LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b h w c"], size: tuple[int, int]) -> Float[Tensor, "b y x c"]:
        image = rearrange(F.gelu(self.linear(x)), "b h w c -> b c h w")
        return self.norm(rearrange(F.adaptive_avg_pool2d(image, size), "b c y x -> b y x c"))


def in_window(height: int, width: int, window: int, device: torch.device) -> Bool[Tensor, "n k"]:
    """Whether each position of each token's window is inside the grid."""
    rows, cols = (
        torch.arange(side, device=device)[:, None] + torch.arange(window, device=device) - window // 2
        for side in (height, width)
    )
    rows, cols = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
    return rearrange(rows[:, None, :, None] & cols[None, :, None, :], "h w y x -> (h w) (y x)")


def _displacements(length: int, pooled: int, device: torch.device) -> Int[Tensor, "q k"]:
    """Twice the displacement of each token from the middle of each pooled one, along one axis."""
    key = torch.arange(pooled, device=device)
    first, end = key * length // pooled, ((key + 1) * length + pooled - 1) // pooled
    return 2 * torch.arange(length, device=device)[:, None] - (first + end - 1)


def _half_steps(length: int, pooled: int) -> tuple[int, int, int]:
    """The least of :func:`_displacements`, the step between them, and how many steps cover them."""
    middles = [key * length // pooled + -(-(key + 1) * length // pooled) - 1 for key in range(pooled)]
    # By ==, not by a set: while torch.jit traces, as for fvcore, these are tensors, which a set never finds equal.
    step = 2 if all(middle % 2 == middles[0] % 2 for middle in middles) else 1
    return -middles[-1], step, (2 * (length - 1) - middles[0] + middles[-1]) // step + 1


def _mean_inside(length: int, window: int) -> float:
    reach = window // 2
    return sum(min(i + reach, length - 1) - max(i - reach, 0) + 1 for i in range(length)) / length


def _small(*shape: int, std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=std)
