"""BiFormer-T, -S, -B and BiFormer-STL, as published, with a configurable attention per stage."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.core.base import InvalidOption, Macs
from attention_zoo.core.registry import get
from attention_zoo.models.block import Block

HEAD_DIM = 32
TOPK = (1, 4, 16, -2)
ATTENTIONS = ("bra", "lepe")
"""The attentions that TOPK stands for."""


class STLBlock(Block):
    """The block of the Swin-T layout: no slot for a convolution in the MLP."""

    @staticmethod
    def make_mlp(dim: int, hidden: int, dwconv: bool) -> nn.Sequential:
        if dwconv:
            raise InvalidOption("the STL block has no mlp_dwconv")
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class STLStage(nn.Module):
    """A named list of blocks, as in the published STL checkpoints."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.blocks(x)


class BiFormer(nn.Module):
    """Four stages of blocks, each after a downsampling; NCHW images in, logits out.

    Args:
        depths: blocks per stage.
        dims: channels per stage; heads are dims // 32.
        mlp_ratio: of every block.
        swin_layout: the STL variant's stem, patch merging and blocks.
        num_classes: of the head; 0 returns the pooled features.
        in_chans: channels of the image.
        drop_path_rate: of the last block; grows linearly from 0 at the first.
        topk: per stage, as in Block.
        attention: a registered name for all stages, or one name (or None, as published) per stage.
        attention_options: options of the attentions named in ``attention``; options not given are as published for
            the stage, or the defaults.
        **block: further arguments of every Block, such as n_win or auto_pad.

    Raises:
        InvalidOption: a sequence does not cover all four stages, or a Block rejects its arguments.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratio: float | int,
        swin_layout: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | int = 0.0,
        topk: Sequence[int] = TOPK,
        attention: str | Sequence[str | None] | None = None,
        attention_options: dict[str, Any] | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        per_stage = [attention] * 4 if attention is None or isinstance(attention, str) else list(attention)
        if len(per_stage) != 4 or len(topk) != 4:
            raise InvalidOption(f"attention={attention!r}, topk={topk!r}: a model has four stages; name one or four")
        settings: dict[str, Any] = {"kv_downsample_mode": "identity", "side_dwconv": 5} | block
        if swin_layout:
            settings["before_attn_dwconv"] = 0
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.downsample_layers = nn.ModuleList(_downsample(swin_layout, in_chans, dims))
        self.stages = nn.ModuleList()
        for stage, (depth, dim, k, name) in enumerate(zip(depths, dims, topk, per_stage, strict=True)):
            named = {} if name is None else {"attention": name, **(attention_options or {})}
            make = STLBlock if swin_layout else Block
            arguments = _published(name, stage) | settings | named | {"num_heads": dim // HEAD_DIM}
            if name in (None, "bra"):
                arguments["topk"] = _all_regions(k, settings) if named else k
            blocks = [make(dim, drop_path=next(rates), mlp_ratio=mlp_ratio, **arguments) for _ in range(depth)]
            self.stages.append(STLStage(blocks) if swin_layout else nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x).mean(dim=(2, 3)))

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens in each stage, for an image of ``height x width`` pixels."""
        result = []
        for downsample in self.downsample_layers:
            for layer in downsample.modules():
                if isinstance(layer, nn.Conv2d):
                    height, width = _size_after(layer, height, width)
            result.append((height, width))
        return result

    def macs(self, height: int, width: int) -> Macs:
        """The analytic cost of one image, from its convolutions, linear maps and matrix products."""
        cost = Macs()
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            for layer in downsample.modules():
                if isinstance(layer, nn.Conv2d):
                    height, width = _size_after(layer, height, width)
                    cost += Macs(other=height * width * layer.weight.numel())
            for block in stage.modules():
                if isinstance(block, Block):
                    cost += block.macs(height, width)
        return cost + Macs(other=self.head.weight.numel() if isinstance(self.head, nn.Linear) else 0)


def _size_after(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    rows, columns = (
        (side + 2 * int(layer.padding[axis]) - layer.kernel_size[axis]) // layer.stride[axis] + 1
        for axis, side in enumerate((height, width))
    )
    return rows, columns


def _published(name: str | None, stage: int) -> dict[str, Any]:
    """The options that the publication of the attention ``name`` sets for ``stage``."""
    declared = {} if name is None else getattr(get(name), "by_stage", {})
    return {option: values[stage] for option, values in declared.items()}


def _all_regions(topk: int, settings: dict[str, Any]) -> int:
    """BRA's topk in a stage; all regions where the published stage has full attention (n_win auto: max(TOPK))."""
    n_win = settings.get("n_win", 7)
    return topk if topk > 0 else n_win**2 if isinstance(n_win, int) else max(TOPK)


def _downsample(swin_layout: bool, in_chans: int, dims: Sequence[int]) -> list[nn.Sequential]:
    if swin_layout:
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
        merges = [nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(dims)]
        return [stem, *merges]
    half = dims[0] // 2
    stem = nn.Sequential(
        nn.Conv2d(in_chans, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU(),
        nn.Conv2d(half, dims[0], 3, 2, 1), nn.BatchNorm2d(dims[0]),
    )  # fmt: skip
    merges = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in pairwise(dims)]
    return [stem, *merges]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def biformer_tiny(**options: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G MACs at 224 x 224. Options as in BiFormer."""
    return BiFormer((2, 2, 8, 2), (64, 128, 256, 512), 3, **options)


def biformer_small(**options: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G MACs at 224 x 224. Options as in BiFormer."""
    return BiFormer((4, 4, 18, 4), (64, 128, 256, 512), 3, **options)


def biformer_base(**options: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G MACs at 224 x 224. Options as in BiFormer."""
    return BiFormer((4, 4, 18, 4), (96, 192, 384, 768), 3, **options)


def biformer_stl(**options: Any) -> BiFormer:
    """BiFormer in the Swin-T layout: 28.4 M parameters, 4.6 G MACs at 224 x 224. Options as in BiFormer."""
    return BiFormer((2, 2, 6, 2), (96, 192, 384, 768), 4, swin_layout=True, **options)


MODELS: dict[str, Callable[..., BiFormer]] = {
    make.__name__: make for make in (biformer_tiny, biformer_small, biformer_base, biformer_stl)
}
