"""The four published models: exact parameters, MACs and names, and replaceable attention."""

import logging
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import MODELS, Block, InvalidOption, get, names
from attention_zoo.models.biformer import BiFormer, STLBlock

PARAMETERS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
}
FVCORE = {
    "biformer_tiny": 2_228_044_160,
    "biformer_small": 4_487_312_640,
    "biformer_base": 9_794_514_816,
    "biformer_stl": 4_589_905_728,
}
MATRIX_PRODUCTS = {
    "biformer_tiny": 2_215_901_568,
    "biformer_small": 4_463_629_568,
    "biformer_base": 9_758_990_208,
    "biformer_stl": 4_573_874_496,
}
"""Convolutions, linear maps and matrix products."""


def on_meta(name: str, **args: Any) -> BiFormer:
    with torch.device("meta"):
        return MODELS[name](**args).eval()


def counted(model: BiFormer, side: int, channels: int = 3) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, channels, side, side, device="meta"))
    return counter.get_total_flops() // 2


def test_these_are_the_models() -> None:
    assert set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_macs_are_the_published(name: str) -> None:
    model = on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.macs(224, 224).total == MATRIX_PRODUCTS[name]
    assert counted(model, 224) == MATRIX_PRODUCTS[name]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MODELS)
def test_fvcore_counts_the_published_macs(name: str) -> None:
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(MODELS[name]().eval(), torch.randn(1, 3, 224, 224))
    assert analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total() == FVCORE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("side", "args"),
    [
        (256, {"n_win": 8}),
        (96, {"n_win": 4, "topk": (1, 4, 16, -1), "auto_pad": True, "kv_downsample_mode": "ada_avgpool"}),
        (224, {"attention": (None, "window", "axial", None), "num_classes": 10}),
    ],
)
def test_macs_equal_the_count_at_other_settings(name: str, side: int, args: dict[str, Any]) -> None:
    model = on_meta(name, **args)
    assert model.macs(side, side).total == counted(model, side)


TINY_KEYS = {
    "downsample_layers.0.0.weight": (32, 3, 3, 3), "downsample_layers.0.0.bias": (32,),
    "downsample_layers.0.1.running_mean": (32,), "downsample_layers.0.1.weight": (32,),
    "downsample_layers.0.3.weight": (64, 32, 3, 3), "downsample_layers.0.4.running_var": (64,),
    "downsample_layers.1.0.weight": (128, 64, 3, 3), "downsample_layers.1.1.num_batches_tracked": (),
    "downsample_layers.3.0.bias": (512,), "downsample_layers.3.1.bias": (512,),
    "stages.0.0.pos_embed.weight": (64, 1, 3, 3), "stages.0.0.norm1.weight": (64,),
    "stages.0.0.attn.qkv.qkv.weight": (192, 64), "stages.0.0.attn.qkv.qkv.bias": (192,),
    "stages.0.1.attn.wo.weight": (64, 64), "stages.0.1.attn.lepe.weight": (64, 1, 5, 5),
    "stages.0.1.mlp.0.weight": (192, 64), "stages.0.1.mlp.3.weight": (64, 192),
    "stages.2.7.attn.qkv.qkv.weight": (768, 256), "stages.2.7.norm2.bias": (256,),
    "stages.3.0.attn.qkv.weight": (1536, 512), "stages.3.1.attn.proj.bias": (512,),
    "stages.3.1.attn.lepe.weight": (512, 1, 5, 5), "stages.3.1.mlp.3.bias": (512,),
    "norm.running_mean": (512,), "norm.weight": (512,), "head.weight": (1000, 512), "head.bias": (1000,),
}  # fmt: skip
STL_KEYS = {
    "downsample_layers.0.0.weight": (96, 3, 4, 4), "downsample_layers.0.1.running_mean": (96,),
    "downsample_layers.1.0.running_mean": (96,), "downsample_layers.1.1.weight": (192, 96, 2, 2),
    "downsample_layers.3.0.weight": (384,), "downsample_layers.3.1.weight": (768, 384, 2, 2),
    "stages.0.blocks.0.norm1.weight": (96,), "stages.0.blocks.0.attn.qkv.qkv.weight": (288, 96),
    "stages.0.blocks.1.attn.lepe.bias": (96,), "stages.1.blocks.1.mlp.0.weight": (768, 192),
    "stages.2.blocks.5.mlp.2.weight": (384, 1536), "stages.3.blocks.1.attn.qkv.weight": (2304, 768),
    "stages.3.blocks.1.attn.proj.weight": (768, 768), "norm.bias": (768,), "head.weight": (1000, 768),
}  # fmt: skip
ABSENT = {
    "biformer_tiny": (
        "attn.qkv.bias",
        "mlp.1",
        "mlp.2",
        "gamma",
        "router",
        "kv_down",
        "blocks",
        "downsample_layers.0.2",
    ),
    "biformer_stl": ("attn.qkv.bias", "mlp.1", "mlp.3", "gamma", "router", "kv_down", "pos_embed"),
}


@pytest.mark.parametrize(("name", "keys"), [("biformer_tiny", TINY_KEYS), ("biformer_stl", STL_KEYS)])
def test_names_and_shapes_are_those_of_the_checkpoints(name: str, keys: dict[str, tuple[int, ...]]) -> None:
    state = on_meta(name).state_dict()
    assert {key: tuple(state[key].shape) for key in keys if key in state} == keys
    assert not [key for key in state for part in ABSENT[name] if f".{part}" in f".{key}"]


@pytest.mark.parametrize(("name", "depths"), [
    ("biformer_tiny", [2, 2, 8, 2]), ("biformer_small", [4, 4, 18, 4]),
    ("biformer_base", [4, 4, 18, 4]), ("biformer_stl", [2, 2, 6, 2]),
])  # fmt: skip
def test_stages(name: str, depths: list[int]) -> None:
    model = on_meta(name)
    stages = [blocks_of(stage) for stage in model.stages]
    assert [len(stage) for stage in stages] == depths
    assert [[type(block.attn) for block in stage] for stage in stages] == [
        [get(attention)] * depth for attention, depth in zip(("bra", "bra", "bra", "lepe"), depths, strict=True)
    ]
    assert [stage[0].attn.topk for stage in stages[:3]] == [1, 4, 16]
    for stage in stages[:3]:
        assert (stage[0].attn.n_win, stage[0].attn.kv_down.mode) == (7, "identity")
        assert stage[0].attn.dim // stage[0].attn.num_heads == 32
    assert stages[3][0].attn.num_heads == 8


def blocks_of(stage: torch.nn.Module) -> list[Block]:
    return [module for module in stage.modules() if isinstance(module, Block)]


def small(dims: tuple[int, ...] = (64, 128, 192, 256), **args: Any) -> BiFormer:
    """Four stages of one block, whose grids are 16, 8, 4 and 2 tokens wide for an image of 64 pixels."""
    settings: dict[str, Any] = {"n_win": 2, "topk": (1, 2, 4, -2), "num_classes": 7} | args
    return BiFormer((1, 1, 1, 1), dims, 2, **settings).eval()


@pytest.fixture
def photo() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("swin_layout", [False, True])
@pytest.mark.parametrize("name", names())
def test_any_attention_in_every_stage(name: str, swin_layout: bool, photo: Tensor) -> None:
    # As in the published models, heads double from stage to stage: deformable divides them into 1, 2, 4, 8 groups.
    model = small((64, 128, 256, 512), attention=name, swin_layout=swin_layout)
    assert [type(block.attn) for block in blocks_of(model)] == [get(name)] * 4
    out = model(photo)
    assert out.shape == (2, 7) and out.isfinite().all()
    assert (out[0] - out[1]).abs().max() > 1e-4


def test_an_attention_per_stage(photo: Tensor) -> None:
    model = small(attention=("window", None, "axial", "full"))
    kinds = [get(name) for name in ("window", "bra", "axial", "full")]
    assert [type(block.attn) for block in blocks_of(model)] == kinds
    assert model(photo).shape == (2, 7)


def test_bra_in_place_of_full_attention_takes_all_regions() -> None:
    attentions = [block.attn for block in blocks_of(small(attention="bra"))]
    assert [attention.topk for attention in attentions] == [1, 2, 4, 4]
    assert [attention.num_heads for attention in attentions] == [2, 4, 6, 8]


def test_options_of_the_attention_are_passed_on(photo: Tensor) -> None:
    model = small(attention="window", attention_options={"window_size": 3, "shift": 1})
    assert {(block.attn.window_size, block.attn.shift) for block in blocks_of(model)} == {(3, 1)}
    assert model(photo).shape == (2, 7)
    with pytest.raises(InvalidOption, match="'full' has no option 'window_size'"):
        small(attention="full", attention_options={"window_size": 3})


@pytest.mark.parametrize(
    "args", [{"topk": (1, 4, 16)}, {"attention": ("window", None)}, {"attention": ["full"] * 5}, {"topk": (1,) * 5}]
)
def test_anything_but_four_stages_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="four"):
        small(**args)


@pytest.mark.parametrize(("depths", "dims"), [((1, 1, 1), (32,) * 4), ((1,) * 4, (32,) * 3), ((1,) * 5, (32,) * 5)])
def test_depths_and_dims_of_anything_but_four_stages_are_refused(
    depths: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError):
        BiFormer(depths, dims, 2, n_win=2)


def test_a_model_is_its_parts_in_order(photo: Tensor) -> None:
    model = small(attention=(None, "window", None, None))
    x = photo
    for index in range(4):
        for layer in model.downsample_layers[index]:
            x = layer(x)
        assert x.shape == (2, 64 * (index + 1), 16 >> index, 16 >> index)
        for block in model.stages[index]:
            x = block(x)
    features = model.norm(x).flatten(2).mean(2)
    assert torch.allclose(model(photo), features @ model.head.weight.T + model.head.bias, atol=1e-5)


def test_no_classes_returns_the_pooled_features(photo: Tensor) -> None:
    headless, model = small(num_classes=0), small()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, strict=True)
    features = headless(photo)
    assert features.shape == (2, 256)
    assert torch.allclose(model.head(features), model(photo), atol=1e-6)


@pytest.mark.parametrize("swin_layout", [False, True])
def test_channels_of_the_image(swin_layout: bool) -> None:
    model = small(in_chans=1, swin_layout=swin_layout)
    assert model.downsample_layers[0][0].in_channels == 1
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_drop_path_grows_linearly_over_the_blocks(name: str) -> None:
    rates = [block.drop_path.rate for block in blocks_of(on_meta(name, drop_path_rate=0.3))]
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))], abs=1e-7)
    assert {block.drop_path.rate for block in blocks_of(on_meta(name))} == {0.0}


def test_drop_path_acts_in_training_alone(photo: Tensor) -> None:
    model = small(drop_path_rate=0.5)
    assert torch.equal(model(photo), model(photo))
    for module in model.modules():
        if isinstance(module, Block):
            module.train()
    assert not torch.equal(model(photo), model(photo))


def test_the_swin_layout_has_no_convolution_in_the_mlp() -> None:
    with pytest.raises(InvalidOption, match="mlp_dwconv"):
        STLBlock(32, mlp_dwconv=True)
    assert all(block.pos_embed is None for block in blocks_of(small(swin_layout=True, before_attn_dwconv=3)))


def test_learning_reaches_every_parameter(photo: Tensor) -> None:
    model = small(topk=(1, 2, 4, -2)).train()
    model(photo).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
