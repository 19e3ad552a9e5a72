"""Reduction of a region's keys and values before they are gathered.

Keys and values are reduced as one tensor, so that a key and its value always cover the same pixels.
Shape legend: n regions of the whole batch, d channels (keys then values), y x tokens of a region per side.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attention_zoo.core.base import InvalidOption

Mode = Literal["identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool", "fracpool", "conv"]
MODES: tuple[str, ...] = get_args(Mode)


class KVDownsample(nn.Module):
    """One of the seven modes.

    ``conv`` and ``fracpool`` were announced but not published. Here ``conv`` is a strided depthwise
    convolution initialised to the average, so that training starts from ``avgpool``; ``fracpool`` is
    fractional max-pooling (Graham, 2014) with one draw of the pooling borders for all channels of a region,
    and with fixed borders in eval.

    Args:
        channels: d.
        mode: which reduction.
        per_win: for ada_*: tokens per side after the reduction.
        ratio: for the others: reduction per side, rounding down.
        kernel: for conv and fracpool: the kernel, default the ratio.
    """

    def __init__(self, channels: int, mode: Mode, per_win: int, ratio: int, kernel: int | None) -> None:
        super().__init__()
        self.channels, self.mode, self.per_win, self.ratio = channels, mode, per_win, ratio
        self.kernel = kernel or ratio
        if mode == "conv":
            if self.kernel < ratio:
                raise InvalidOption(
                    f"kv_downsample_kernel={self.kernel} would skip tokens at kv_downsample_ratio={ratio}; "
                    f"valid: at least {ratio}"
                )
            self.padding = (self.kernel - ratio + 1) // 2
            self.conv = nn.Conv2d(channels, channels, self.kernel, ratio, self.padding, groups=channels)
            nn.init.constant_(self.conv.weight, self.kernel**-2)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, kv: Float[Tensor, "n d y x"]) -> Float[Tensor, "n d y2 x2"]:
        size = self.out_size(kv.shape[-2], kv.shape[-1])
        if self.mode == "identity":
            return kv
        if self.mode == "conv":
            return self.conv(kv)
        if self.mode == "fracpool":
            pooled = F.fractional_max_pool2d(kv, self.kernel, output_size=size, _random_samples=self._borders(kv))
            # Autocast on CPUs pools in fp32 and leaves the result so; queries stay as they were.
            return pooled.to(kv.dtype)
        if self.mode.startswith("ada_"):
            pool = F.adaptive_avg_pool2d if self.mode == "ada_avgpool" else F.adaptive_max_pool2d
            return pool(kv, self.per_win)
        if self.ratio == 1:
            return kv
        return (F.avg_pool2d if self.mode == "avgpool" else F.max_pool2d)(kv, self.ratio)

    def masked(
        self, kv: Float[Tensor, "n d y x"], valid: Bool[Tensor, "n 1 y x"]
    ) -> tuple[Float[Tensor, "n d y2 x2"], Bool[Tensor, "n 1 y2 x2"]]:
        """The same reduction of valid tokens only, and which reduced tokens contain any.

        An average divides by the number of valid tokens, a maximum ignores the others, a convolution
        reads them as zero.
        """
        if self.mode == "identity":
            return kv, valid
        if "max" in self.mode or self.mode == "fracpool":
            reduced = self(kv.masked_fill(~valid, float("-inf")))
            seen = reduced[:, :1] > float("-inf")
            return reduced.masked_fill(~seen, 0.0), seen
        share = self._share(valid.to(kv.dtype))
        reduced = self(kv.masked_fill(~valid, 0.0))
        if "avg" in self.mode:
            reduced = reduced / share.clamp_min(torch.finfo(share.dtype).tiny)
        return reduced, share > 0

    def _share(self, valid: Float[Tensor, "n 1 y x"]) -> Float[Tensor, "n 1 y2 x2"]:
        """The fraction of valid tokens under each reduced one."""
        if self.mode == "conv":
            return F.avg_pool2d(valid, self.kernel, self.ratio, self.conv.padding)  # type: ignore[arg-type]
        return self(valid)

    def _borders(self, kv: Tensor) -> Tensor:
        # One draw per region, the same for every channel: otherwise keys and values would be pooled differently.
        if not self.training:
            return kv.new_full((1, 1, 1), 0.5).expand(kv.shape[0], kv.shape[1], 2)
        return torch.rand(kv.shape[0], 1, 2, dtype=kv.dtype, device=kv.device).expand(-1, kv.shape[1], -1)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per side of a reduced ``height x width`` region; InvalidOption if there are none."""
        if self.mode == "identity":
            return height, width
        if self.mode.startswith("ada_"):
            return self.per_win, self.per_win
        spare = self.kernel - 2 * self.padding if self.mode == "conv" else self.ratio
        size = tuple((side - spare) // self.ratio + 1 for side in (height, width))
        if min(size) < 1:
            raise InvalidOption(
                f"kv_downsample_ratio={self.ratio} leaves nothing of a {height} x {width} region; "
                f"valid: 1 to {min(height, width)}, or kv_downsample_mode='ada_avgpool'"
            )
        if self.mode == "fracpool" and any(s + self.kernel - 1 > n for s, n in zip(size, (height, width), strict=True)):
            raise InvalidOption(
                f"kv_downsample_kernel={self.kernel} is too large for a {height} x {width} region "
                f"at kv_downsample_ratio={self.ratio}"
            )
        return size[0], size[1]

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one region."""
        if self.mode != "conv":
            return 0
        out = self.out_size(height, width)
        return out[0] * out[1] * self.channels * self.kernel**2
