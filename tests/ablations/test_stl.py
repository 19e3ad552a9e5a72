"""The Swin-T layout with each attention in place of BRA."""

from typing import Any

import pytest
import torch

from attention_zoo import MODELS, names
from profiling.cases.workload import Workload
from profiling.meters.macs import counted

SWIN_T_PARAMETERS = 28_288_354
"""Published with torchvision's swin_t and the paper's 28.29 M."""


def test_shifted_windows_have_swin_t_parameters_but_for_the_patch_merging() -> None:
    """Swin merges with LayerNorm(4 C) and a linear map without bias; STL with BatchNorm(C) and a biased convolution.

    Per merging that is 8 C parameters of the norm there, 2 C here, and 2 C of the bias: 4 C fewer.
    """
    with torch.device("meta"):
        model = MODELS["biformer_stl"](attention="shifted_window")
    difference = sum(4 * c for c in (96, 192, 384))
    assert sum(p.numel() for p in model.parameters()) == SWIN_T_PARAMETERS - difference


@pytest.mark.parametrize(
    ("name", "option", "published"),
    [
        ("pooled", "sr_ratio", [8, 4, 2, 1]),
        ("spatially_separable", "sr_ratio", [8, 4, 2, 1]),
        ("cross_shaped", "stripe_width", [1, 2, 7, 7]),
        ("deformable", "stride", [8, 4, 2, 1]),
        ("quadtree", "levels", [4, 3, 2, 1]),
        ("window", "window_size", [7, 7, 7, 7]),
    ],
)
def test_options_by_stage_are_the_published(name: str, option: str, published: list[int]) -> None:
    def chosen(**options: Any) -> list[int]:
        with torch.device("meta"):
            stages = MODELS["biformer_stl"](attention=name, **options).stages
        first = [next(m for m in stage.modules() if hasattr(m, option)) for stage in stages]
        return [getattr(module, option) for module in first]

    assert chosen() == published
    assert chosen(attention_options={option: 3}) == chosen(**{option: 3}) == [3, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_macs_of_the_layout_with_each_attention(name: str) -> None:
    with torch.device("meta"):
        model = MODELS["biformer_stl"](attention=name, auto_pad=True).eval()
        work = Workload(model, torch.empty(1, 3, 224, 224))
    assert counted(work)[0] == model.macs(224, 224).total
