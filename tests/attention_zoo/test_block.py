"""The Block: names and defaults as published, and its arithmetic composed by hand."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_zoo import Block, InvalidOption, build, get
from attention_zoo.models.block import DropPath

DEFAULTS = {
    "drop_path": 0.0, "layer_scale_init_value": -1, "num_heads": 8, "n_win": 7, "qk_dim": None, "qk_scale": None,
    "kv_per_win": 4, "kv_downsample_ratio": 4, "kv_downsample_kernel": None, "kv_downsample_mode": "ada_avgpool",
    "topk": 4, "param_attention": "qkvo", "param_routing": False, "diff_routing": False, "soft_routing": False,
    "mlp_ratio": 4, "mlp_dwconv": False, "side_dwconv": 5, "before_attn_dwconv": 3, "pre_norm": True,
    "auto_pad": False,
}  # fmt: skip


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def depthwise(name: str, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels, 1, kernel, kernel), f"{name}.bias": (channels,)}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


AROUND = (
    depthwise("pos_embed", 16, 3)
    | norm("norm1", 16)
    | norm("norm2", 16)
    | linear("mlp.0", 64, 16)
    | linear("mlp.3", 16, 64)
)
BRA = linear("attn.qkv.qkv", 48, 16) | linear("attn.wo", 16, 16) | depthwise("attn.lepe", 16, 5)
FULL = {"attn.qkv.weight": (48, 16)} | linear("attn.proj", 16, 16)
PSEUDO_CONV = {
    "attn.1.weight": (16, 16, 1, 1), "attn.1.bias": (16,), "attn.2.weight": (16, 1, 5, 5), "attn.2.bias": (16,),
    "attn.3.weight": (16, 16, 1, 1), "attn.3.bias": (16,),
}  # fmt: skip


def without(keys: dict[str, tuple[int, ...]], *starts: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in keys.items() if not name.startswith(starts)}


PUBLISHED: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ({}, AROUND | BRA),
    ({"topk": -1}, AROUND | FULL),
    ({"topk": -2}, AROUND | FULL | depthwise("attn.lepe", 16, 5)),
    ({"topk": -2, "side_dwconv": 0}, AROUND | FULL),
    ({"topk": 0}, AROUND | PSEUDO_CONV),
    ({"kv_downsample_mode": "identity"}, AROUND | BRA),
    ({"mlp_dwconv": True}, AROUND | BRA | depthwise("mlp.1.dwconv", 64, 3)),
    ({"mlp_ratio": 3}, AROUND | BRA | linear("mlp.0", 48, 16) | linear("mlp.3", 16, 48)),
    ({"layer_scale_init_value": 0.1}, AROUND | BRA | {"gamma1": (16,), "gamma2": (16,)}),
    ({"before_attn_dwconv": 0}, without(AROUND, "pos_embed") | BRA),
    ({"before_attn_dwconv": 5}, AROUND | BRA | depthwise("pos_embed", 16, 5)),
    ({"side_dwconv": 0}, AROUND | without(BRA, "attn.lepe")),
    ({"param_attention": "qkv"}, AROUND | without(BRA, "attn.wo")),
    ({"qk_dim": 8}, AROUND | BRA | linear("attn.qkv.qkv", 32, 16)),
    ({"param_routing": True, "diff_routing": True}, AROUND | BRA | linear("attn.router.emb", 16, 16)),
    (
        {"param_routing": True, "diff_routing": True, "soft_routing": True, "qk_dim": 8},
        AROUND | BRA | linear("attn.qkv.qkv", 32, 16) | linear("attn.router.emb", 8, 8),
    ),
    ({"pre_norm": False, "auto_pad": True}, AROUND | BRA),
]


@pytest.mark.parametrize(("args", "keys"), PUBLISHED, ids=lambda value: str(value)[:60])
def test_published_checkpoints_load(args: dict[str, Any], keys: dict[str, tuple[int, ...]]) -> None:
    block = Block(16, **args)
    checkpoint = {name: torch.randn(shape) for name, shape in keys.items()}
    block.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[name]) for name, value in block.state_dict().items())


def test_defaults_are_the_published() -> None:
    parameters = inspect.signature(Block).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    assert list(parameters)[:3] == ["dim", "drop_path", "layer_scale_init_value"]


def random_block(dim: int = 16, **args: Any) -> Block:
    block = Block(dim, **{"num_heads": 2, "n_win": 2, "topk": 2, "kv_per_win": 2} | args).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def image(dim: int = 16, batch: int = 2, height: int = 8, width: int = 6) -> Tensor:
    return torch.randn(batch, dim, height, width, dtype=torch.float64)


def normed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    hidden = x @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    if "mlp.1.dwconv.weight" in state:
        weight, bias = state["mlp.1.dwconv.weight"], state["mlp.1.dwconv.bias"]
        hidden = F.conv2d(hidden.movedim(-1, 1), weight, bias, padding=1, groups=len(weight)).movedim(1, -1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ state["mlp.3.weight"].T + state["mlp.3.bias"]


def composed(block: Block, x: Tensor, pre_norm: bool = True) -> Tensor:
    state = block.state_dict()
    if "pos_embed.weight" in state:
        kernel = state["pos_embed.weight"].shape[-1]
        weight, bias = state["pos_embed.weight"], state["pos_embed.bias"]
        x = x + F.conv2d(x, weight, bias, padding=kernel // 2, groups=x.shape[1])
    x = x.movedim(1, -1)
    gamma1, gamma2 = state.get("gamma1", 1), state.get("gamma2", 1)
    if pre_norm:
        x = x + gamma1 * block.attn(normed(x, state, "norm1"))
        x = x + gamma2 * mlp(normed(x, state, "norm2"), state)
    else:
        x = normed(x + gamma1 * block.attn(x), state, "norm1")
        x = normed(x + gamma2 * mlp(x, state), state, "norm2")
    return x.movedim(-1, 1)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"pre_norm": False},
        {"layer_scale_init_value": 0.1},
        {"layer_scale_init_value": 0.1, "pre_norm": False},
        {"mlp_dwconv": True},
        {"mlp_ratio": 2.5},
        {"before_attn_dwconv": 0},
        {"before_attn_dwconv": 5},
        {"before_attn_dwconv": 5, "mlp_dwconv": True, "pre_norm": False, "layer_scale_init_value": 2.0},
        {"topk": 0},
        {"topk": -2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["unit input", "input at which the norm's eps shows"])
def test_block_by_hand(args: dict[str, Any], size: float) -> None:
    block, x = random_block(**args), size * image()
    exact = composed(block, x, args.get("pre_norm", True))
    assert (block(x) - exact).abs().max() < 1e-11 * exact.abs().max()


def test_pre_norm_and_post_norm_differ() -> None:
    block, x = random_block(), image()
    assert (block(x) - composed(block, x, pre_norm=False)).abs().max() > 1e-2


def test_layer_scale_starts_at_its_value() -> None:
    block = Block(16, layer_scale_init_value=0.25)
    assert block.gamma1.tolist() == block.gamma2.tolist() == [0.25] * 16
    assert block.gamma1.requires_grad and block.gamma1 is not block.gamma2


def full_attention(x: Tensor, state: dict[str, Tensor], heads: int, lepe: bool) -> Tensor:
    """Of NHWC tokens, with a scale of head_dim ** -0.5, and the depthwise convolution of its input."""
    out = []
    for one in x:
        q, k, v = (one.flatten(0, 1) @ state["attn.qkv.weight"].T).chunk(3, -1)
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        mixed = [torch.softmax(a @ b.T * (x.shape[-1] // heads) ** -0.5, -1) @ c for a, b, c in parts]
        out.append(torch.cat(mixed, -1).view_as(one))
    mixed = torch.stack(out)
    if lepe:
        weight, bias = state["attn.lepe.weight"], state["attn.lepe.bias"]
        mixed = mixed + F.conv2d(x.movedim(-1, 1), weight, bias, padding=2, groups=len(weight)).movedim(1, -1)
    return mixed @ state["attn.proj.weight"].T + state["attn.proj.bias"]


@pytest.mark.parametrize("topk", [-1, -2])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_full_attention_has_eight_heads_whatever_is_asked_for(topk: int, num_heads: int) -> None:
    block, x = random_block(topk=topk, num_heads=num_heads), image().movedim(1, -1)
    state = block.state_dict()
    assert block.attn.num_heads == 8
    exact = full_attention(x, state, 8, lepe=topk == -2)
    assert (block.attn(x) - exact).abs().max() < 1e-12 * exact.abs().max()
    wrong = full_attention(x, state, 2, lepe=topk == -2)
    assert (block.attn(x) - wrong).abs().max() > 1e-3


def test_full_attention_refuses_channels_that_eight_does_not_divide() -> None:
    with pytest.raises(InvalidOption, match="dim=12 is not divisible by num_heads=8"):
        Block(12, num_heads=2, topk=-1)


@pytest.mark.parametrize(("topk", "name"), [(4, "bra"), (1, "bra"), (-1, "full"), (-2, "lepe"), (0, "pseudo_conv")])
def test_topk_chooses_the_attention(topk: int, name: str) -> None:
    assert type(Block(16, topk=topk).attn) is get(name)


def test_bra_gets_every_option_of_the_block() -> None:
    args = dict(
        n_win=3, topk=2, qk_dim=8, qk_scale=0.3, kv_downsample_mode="conv", kv_downsample_ratio=2,
        kv_downsample_kernel=3, param_attention="qkv", param_routing=True, diff_routing=True, soft_routing=True,
        side_dwconv=3, auto_pad=True, mask_padding=True,
    )  # fmt: skip
    block = random_block(num_heads=4, **args)
    alone = build("bra", dim=16, num_heads=4, impl="reference", **args).double().eval()
    alone.load_state_dict(block.attn.state_dict())
    x = torch.randn(1, 7, 8, 16, dtype=torch.float64)
    assert torch.equal(block.attn(x), alone(x))
    for changed in ({"qk_scale": 0.4}, {"mask_padding": False}, {"soft_routing": False}, {"topk": 3}, {"n_win": 2}):
        other = build("bra", dim=16, num_heads=4, **args | changed).double().eval()
        other.load_state_dict(block.attn.state_dict())
        assert (other(x) - alone(x)).abs().max() > 1e-6, changed


def test_an_attention_by_name_takes_heads_and_options() -> None:
    block = random_block(num_heads=4, attention="window", window_size=3, shift=1, relative_position_bias=True)
    attention = block.attn
    assert (type(attention), attention.num_heads) == (get("window"), 4)
    assert (attention.window_size, attention.shift) == (3, 1)
    x = image()
    exact = composed(block, x)
    assert (block(x) - exact).abs().max() < 1e-11 * exact.abs().max()
    assert type(Block(16, topk=-1, attention="axial").attn) is get("axial")
    assert type(Block(16, attention="bra", n_win=2, topk=3).attn) is get("bra")
    assert Block(16, num_heads=4, attention="full", impl="sdpa").attn.impl == "sdpa"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"topk": -3}, r"topk=-3 is not valid; valid: > 0 \(bra\), 0 \(pseudo_conv\), -1 \(full\), -2 \(lepe\)"),
        ({"attention": "swim"}, "unknown attention 'swim'; valid: .*bra, .*window"),
        ({"attention": "window", "windowsize": 3}, "'window' has no option 'windowsize'"),
        ({"window_size": 3}, "no option 'window_size'"),
        ({"kv_downsample_mode": "mean"}, "valid: identity, avgpool"),
        ({"before_attn_dwconv": 4}, "before_attn_dwconv=4 is even"),
        ({"param_routing": True}, "diff_routing"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": -0.1}, "drop_path"),
    ],
)
def test_what_is_not_valid_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        Block(16, **args)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop, x = DropPath(0.3).train(), torch.ones(4000, 2, 3, 2)
    out = drop(x).flatten(1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    kept = out[:, 0] != 0
    assert torch.allclose(out[kept], torch.tensor(1 / 0.7))
    # Five standard deviations of the share of 4000 draws.
    assert abs(kept.double().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_drop_path_is_on_each_branch_of_the_block() -> None:
    block, x = random_block(drop_path=0.5), image(batch=32)
    state = block.state_dict()
    assert torch.equal(block(x), block(x))
    start = (x + block.pos_embed(x)).movedim(1, -1)
    seen = set()
    attended = start + 2 * block.attn(normed(start, state, "norm1"))
    both = {
        (attention, last): middle + 2 * last * mlp(normed(middle, state, "norm2"), state)
        for attention, middle in ((0, start), (1, attended))
        for last in (0, 1)
    }
    out = block.train()(x).movedim(1, -1)
    for sample in range(32):
        errors = {which: (out[sample] - value[sample]).abs().max().item() for which, value in both.items()}
        which = min(errors, key=errors.__getitem__)
        assert errors[which] < 1e-10
        seen.add(which)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "args",
    [
        {"n_win": 2},
        {"n_win": 2, "mlp_dwconv": True, "before_attn_dwconv": 5},
        {"topk": -2},
        {"topk": -1, "before_attn_dwconv": 0},
        {"topk": 0, "mlp_ratio": 2.5},
        {"attention": "window", "window_size": 3, "layer_scale_init_value": 0.1},
    ],
    ids=str,
)
def test_macs_equal_the_count(args: dict[str, Any]) -> None:
    block = Block(16, **{"topk": 2} | args).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.empty(1, 16, 8, 6, device="meta"))
    assert block.macs(8, 6).total == counter.get_total_flops() // 2
