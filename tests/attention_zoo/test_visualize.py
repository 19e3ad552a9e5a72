"""Pictures of reach and of routes: they match the modules, and every invalid input gives a one-line error."""

import argparse
import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import attention_zoo.__main__ as command
from attention_zoo import MODELS, InvalidOption, names, options
from attention_zoo.attentions.bra import BiLevelRoutingAttention
from attention_zoo.models.biformer import BiFormer
from attention_zoo.models.checkpoint import load_model
from attention_zoo.visualize import receptive_field, route_figure, routes

RED, BLUE = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.8])


def chequered(side: int = 4, pixels: int = 16) -> Tensor:
    """Regions of two colours, alternating, with a little noise; red where row + column is even."""
    red = (torch.arange(side)[:, None] + torch.arange(side)) % 2 == 0
    red = red.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    return torch.where(red, RED[:, None, None], BLUE[:, None, None]) + 0.02 * torch.rand(3, *red.shape)


@pytest.mark.parametrize(("query", "parity"), [((0, 0), 0), ((5, 20), 1), ((63, 63), 0), ((17, 15), 1)])
def test_a_region_is_routed_to_what_looks_like_it(query: tuple[int, int], parity: int) -> None:
    result = routes.by_appearance(chequered(), query, n_win=4)
    assert (result.side, result.region) == (4, query[0] // 16 * 4 + query[1] // 16)
    alike = {region for region in range(16) if (region // 4 + region % 4) % 2 == parity}
    assert set(result.ranked[8][0]) == alike
    assert min(result.ranked[16][1][:8]) > 2 * max(result.ranked[16][1][8:])


@pytest.mark.parametrize("chosen", [{}, {"qk_dim": 16}, {"param_routing": True, "diff_routing": True}, {"n_win": 3}])
def test_routes_rank_by_the_product_of_descriptors(chosen: dict[str, Any]) -> None:
    picture = torch.rand(3, 40, 60)
    result = routes.by_appearance(picture, (39, 30), **chosen)
    side, channels = chosen.get("n_win", 7), chosen.get("qk_dim", receptive_field.DIM)
    grid = side * -(-receptive_field.GRID // side)
    x = receptive_field.features(picture, grid, grid)[0, ..., :channels]
    described = x.view(side, grid // side, side, grid // side, channels).mean((1, 3)).flatten(0, 1)
    assert result.region == (side - 1) * side + side // 2
    scores = described[result.region] @ described.T * channels**-0.5
    for topk, (regions, weights) in result.ranked.items():
        best, index = scores.topk(topk)
        assert regions == index.tolist()
        torch.testing.assert_close(torch.tensor(weights), best.softmax(0))


def test_several_topk_are_drawn_or_the_one_asked_for() -> None:
    picture = chequered()
    assert list(routes.by_appearance(picture, (0, 0)).ranked) == [1, 2, 4, 8, 16]
    assert list(routes.by_appearance(picture, (0, 0), n_win=3).ranked) == [1, 2, 4, 8]
    assert list(routes.by_appearance(picture, (0, 0), n_win=1).ranked) == [1]
    assert list(routes.by_appearance(picture, (0, 0), topk=5).ranked) == [5]
    assert routes.by_appearance(picture, (0, 0), n_win="auto", topk=9).side ** 2 >= 9
    for wrong in ({"topk": 50}, {"n_win": 65}):
        with pytest.raises(InvalidOption, match="valid: 1 to"):
            routes.by_appearance(picture, (0, 0), **wrong)


def checkpoint(path: Path, name: str = "biformer_tiny", **chosen: Any) -> BiFormer:
    """Write random weights to a file and return their model, with BatchNorm means as after training."""
    model = MODELS[name](num_classes=3, **chosen)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    torch.save(model.state_dict(), path)
    return model.eval()


def reaching(model: BiFormer, x: Tensor, stage: int, block: int) -> Tensor:
    """The input of the attention of a block, computed without a hook."""
    for number, (downsample, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True), 1):
        x = downsample(x)
        for count, one in enumerate(getattr(blocks, "blocks", blocks), 1):
            if (number, count) == (stage, block):
                x = x if one.pos_embed is None else x + one.pos_embed(x)
                return one.norm1(x.permute(0, 2, 3, 1))
            x = one(x)
    raise AssertionError("no such block")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "block"), [("biformer_tiny", 1, 2), ("biformer_tiny", 3, 1), ("biformer_stl", 2, 1)]
)
def test_routes_of_a_checkpoint_are_those_of_its_block(name: str, stage: int, block: int, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "w.pth", name, n_win=4)
    model = load_model(name, tmp_path / "w.pth", impl="auto", n_win=4)
    picture = torch.rand(3, 64, 128)
    with torch.no_grad():
        x = (picture - torch.tensor(routes.MEAN)[:, None, None]) / torch.tensor(routes.STD)[:, None, None]
        reached = reaching(made, x[None], stage, block)
    bra = routes.attention_of(made, stage, block)
    index, weight = bra.routes(reached)
    topk = bra.topk
    for row, column in itertools.product(range(4), range(4)):
        query = (16 * row + 15, 32 * column)
        result = routes.of_model(model, picture, query, stage, block)
        assert result.region == 4 * row + column and list(result.ranked) == [1, 2, 4, 8, 16]
        assert result.ranked[topk][0] == index[0, result.region].tolist()
        torch.testing.assert_close(torch.tensor(result.ranked[topk][1]), weight[0, result.region])
        for k, (regions, weights) in result.ranked.items():
            assert regions == result.ranked[16][0][:k] and abs(sum(weights) - 1) < 1e-5
    assert result.source == f"of stage {stage}, block {block}, whose topk is {topk}"
    assert all(m.router.topk == m.topk for m in model.modules() if isinstance(m, BiLevelRoutingAttention))


@pytest.mark.parametrize(("size", "n_win", "fits"), [((512, 500), 7, (560, 448)), ((20, 128), 8, (128, 128))])
def test_a_picture_is_resized_so_that_regions_divide_every_stage(
    size: tuple[int, int], n_win: int, fits: tuple[int, int], tmp_path: Path
) -> None:
    model = MODELS["biformer_tiny"](n_win=n_win, impl="auto").eval()
    picture = torch.full((3, *size), 0.5)
    x = routes.fitted(picture, routes.attention_of(model, 1, 1))
    assert x.shape == (1, 3, *fits)
    torch.testing.assert_close(x[0, :, 0, 0], (0.5 - torch.tensor(routes.MEAN)) / torch.tensor(routes.STD))
    if fits == (128, 128):
        result = routes.of_model(model, picture, (0, 0), 3, 8, topk=3)
        assert list(result.ranked) == [3] and result.source.endswith("picture resized from 20 x 128 to 128 x 128")


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["model", "state_dict", "model module.", "arguments"])
def test_a_checkpoint_may_be_wrapped(wrap: str, tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "w.pth").state_dict()
    if "module." in wrap:
        state = {f"module.{key}": value for key, value in state.items()}
    saved = {"model" if wrap == "arguments" else wrap.split()[0]: state, "epoch": 3}
    if wrap == "arguments":
        saved["args"] = argparse.Namespace(lr=0.1, resume="")
    torch.save(saved, tmp_path / "wrapped.pth")
    loaded = load_model("biformer_tiny", tmp_path / "wrapped.pth")
    assert not loaded.training and loaded.head.out_features == 3
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state.get(name, state.get(f"module.{name}"))), name


class Unsafe:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def faulty(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pth"
    state = checkpoint(path).state_dict()
    if kind == "missing":
        del state["norm.weight"], state["stages.0.0.attn.wo.bias"]
    elif kind == "unexpected":
        state["extra.weight"] = torch.zeros(1)
    elif kind == "shape":
        state["norm.bias"] = torch.zeros(7)
    torch.save({"model": state, "more": Unsafe(folder / "ran")} if kind == "unsafe" else state, path)
    if kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("# weights\n")
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "none":
        path.unlink()
    return path


NO_CHECKPOINT = "not a checkpoint, or one with more than tensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"does not fit biformer_tiny: 2 missing \(stages.0.0.attn.wo.bias, norm.weight\)"),
        ("unexpected", r"does not fit biformer_tiny: 1 unexpected \(extra.weight\)"),
        ("shape", r"does not fit biformer_tiny: 1 of another shape \(norm.bias\)"),
        ("unsafe", NO_CHECKPOINT),
        ("tensor", "no state dict in it; valid: one by itself, or as 'model' or 'state_dict'"),
        ("empty", NO_CHECKPOINT),
        ("text", NO_CHECKPOINT),
        ("torn", NO_CHECKPOINT),
        ("folder", "Is a directory"),
        ("none", "No such file or directory"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, message: str
) -> None:
    path = faulty(kind, tmp_path)
    assert re.search(message, refused(capsys, f"bra --model biformer_tiny --weights {path}"))
    assert not (tmp_path / "ran").exists()


def refused(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    """The one line on stderr."""
    assert outcome(arguments.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(r"error: [^\n]+\n", shown.err)
    return shown.err


def outcome(arguments: Sequence[str]) -> int:
    try:
        return command.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "unknown attention 'none'; valid: gallery, .*bra.*window"),
        ("", "required: NAME"),
        ("axial --topk 4", "unrecognized arguments: --topk 4; valid: .*--query"),
        ("gallery --topk 4", "unrecognized arguments: --topk 4"),
        ("bra --qurey 1,2", "unrecognized arguments: --qurey 1,2; valid: .*--query.*--n-win"),
        ("bra --query 1", r"--query '1' is not valid; valid: two whole pixels Y,X from 0,0 to 511,511, or two fract"),
        ("bra --query 1,2,3", "--query '1,2,3' is not valid"),
        ("bra --query a,b", "--query 'a,b' is not valid"),
        ("bra --query nan,2", "--query nan,2 is not in the 512 x 512 picture"),
        ("bra --query 512,0", "--query 512,0 is not in the 512 x 512 picture; valid: .* from 0,0 to 511,511"),
        ("bra --query 0.5,200", "--query 0.5,200 is not in"),
        ("axial --query=-1,3", "--query -1,3 is not in"),
        ("bra --query=--", "expected a value, not --"),
        ("bra --query 1,2 --topk 0", "topk='0' is not valid; valid: an integer >= 1"),
        ("bra --query 1,2 --topk 50", "topk=50 exceeds the 49 regions of n_win=7; valid: 1 to 49"),
        ("bra --image README.md", "--image README.md: not an image"),
        ("bra --image nowhere.png", "--image nowhere.png: not an image"),
        ("bra --image tests", "--image tests: not an image"),
        ("bra --output routes", "--output routes: no picture ends so; valid: .*.png"),
        ("bra --query 1,2 --output /dev/null/x.png", "/dev/null"),
        ("bra --weights w.pth", "--weights needs --model; valid: biformer_tiny"),
        ("bra --model biformer_tiny", "--model needs --weights"),
        ("bra --stage 2", "--stage needs --weights"),
        ("axial --weights w.pth --model biformer_tiny", "--weights is about routes, which 'axial' has none of"),
        ("bra --weights w.pth --model none", "unknown model 'none'; valid: biformer_tiny"),
        ("bra --weights w.pth --stage two", "--stage: invalid int value: 'two'"),
        ("bra --plugin none.py", "plugin .*none.py: not a Python file"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert re.search(message, refused(capsys, arguments))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("--stage 4", "--stage 4 has no routes in this model; valid: 1, 2, 3"),
        ("--stage 0", "--stage 0 has no routes"),
        ("--stage 2 --block 3", "--block 3 is not in stage 2; valid: 1 to 2"),
        ("--block -1", "--block -1 is not in stage 3; valid: 1 to 8"),
        ("--topk 17", "topk=17 exceeds the 16 regions; valid: 1 to 16"),
    ],
)
def test_a_block_without_routes_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, chosen: str, message: str
) -> None:
    checkpoint(tmp_path / "w.pth")
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 64)).save(picture)
    args = f"bra --model biformer_tiny --weights {tmp_path / 'w.pth'} --image {picture} --n-win 4 {chosen}"
    assert re.search(message, refused(capsys, args))


def test_routes_are_drawn_where_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "w.pth")
    Image.new("RGB", (130, 64), "teal").save(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    assert command.main(["bra", "--image", "p.png", "--query", "0.5,0.5"]) == 0
    assert command.main(
        ["--image", "p.png", "bra", "--weights", "w.pth", "--model", "biformer_tiny", "--n-win", "4", "--topk", "3",
         "--output", "new/mine.png"]
    ) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert shown.out == "results/figures/routes.png\nnew/mine.png\n"
    assert shown.err.splitlines() == [
        "routes by colour and gradients",
        "routes of stage 3, block 1, whose topk is 16; picture resized from 64 x 130 to 64 x 128",
    ]
    sizes = [Image.open(tmp_path / path).size for path in shown.out.split()]
    # Two rows of panels against one.
    assert sizes[0][0] == sizes[1][0] == 960 and sizes[0][1] > sizes[1][1] > 300


def test_figure_shows_the_computed_routes() -> None:
    result = routes.by_appearance(chequered(pixels=10), (5, 25), n_win=4)
    figure = route_figure.figure_of(result, chequered(pixels=10), (5, 25))
    first, *panels = [axes for axes in figure.axes if axes.images]
    assert first.get_title() == "the query and 4 x 4 regions" and len(first.images) == 1
    for axes, (topk, (regions, weights)) in zip(panels, result.ranked.items(), strict=True):
        assert axes.get_title().startswith(f"topk = {topk}, weight")
        veil = torch.tensor(axes.images[1].get_array().data)[..., 3].flatten()
        assert set((veil == 0).nonzero().flatten().tolist()) == set(regions)
        # Each rank at the centre of its region.
        places = {
            int(y // 10 * 4 + x // 10): int(text.get_text()) for text in axes.texts for x, y in [text.get_position()]
        }
        assert places == {region: rank for rank, region in enumerate(regions, 1)}
        assert len(axes.patches) == topk + 1 and axes.patches[-1].get_xy()[0] // 10 == 2
        (dot,) = axes.lines
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (25.5, 5.5)
        if topk > 1:
            assert f"{weights[0]:.2f} to {weights[-1]:.2f}" in axes.get_title()


def test_the_query_is_in_pixels_or_fractions() -> None:
    picture = torch.zeros(3, 100, 200)
    for text, pixel in (
        ("0,0", (0, 0)), ("0.5,0.25", (50, 50)), ("1,1", (99, 199)), ("99,199", (99, 199)), ("2,1", (2, 1)),
        (" 3 , 4.0", (3, 4)),
    ):  # fmt: skip
        assert command._pixel(text, picture) == pixel


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1"])
def test_any_kind_of_image_is_read(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 3), "white")
    image.putpixel((4, 1), (0, 0, 0))
    image.convert(mode).save(path := tmp_path / ("p.tif" if mode == "CMYK" else "p.png"))
    result = receptive_field.read_image(path)
    expected = torch.ones(3, 3, 5)
    expected[:, 1, 4] = 0
    torch.testing.assert_close(result, expected)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "p.png", exif=turned)
    assert receptive_field.read_image(tmp_path / "p.png").shape == (3, 6, 4)


def test_the_reach_of_a_window_is_that_window() -> None:
    x = receptive_field.features(torch.rand(3, 30, 40), 14, 14)
    result = receptive_field.reach("window", x, (9, 3), window_size=7) > 0
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[7:, :7] = True
    assert torch.equal(result, expected)


def test_the_reach_is_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["bra", "--topk", "2"]) == 0
    assert command.main(["window", "--query", "500,30", "--output", "w.png"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "bra.png\nw.png\n" and shown.err == ""
    assert all(Image.open(tmp_path / path).size == (750, 810) for path in ("bra.png", "w.png"))


def test_a_plugin_is_drawn_or_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plugin = tmp_path / "drawn_plugin.py"
    plugin.write_text(
        "from torch import nn\nfrom attention_zoo import register\n"
        "@register('near')\nclass Near(nn.Module):\n"
        "    def __init__(self, dim: int, num_heads: int, impl: str = 'auto', *, reach: int = 3, flip: bool = False):\n"
        "        super().__init__()\n"
        "        self.mix = nn.Conv2d(dim, dim, reach, padding=reach // 2, groups=dim)\n"
        "    def forward(self, x):\n"
        "        return self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)\n"
        "@register('clash')\nclass Clash(Near):\n"
        "    def __init__(self, dim: int, num_heads: int, *, image: int = 3):\n        pass\n"
    )
    args = ["--plugin", str(plugin), "near", "--reach", "5", "--flip", "--output", str(tmp_path / "near.png")]
    assert command.main(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'near.png'}\n"
    # The first run has registered it.
    assert "option 'image' of 'clash' has the name of a flag; taken: " in refused(capsys, "clash")


@pytest.mark.parametrize("name", ["", *names()])
def test_help_helps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert outcome([*name.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "examples:" in shown.out and "\x1b" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    message = " ".join(shown.out.split())
    flags = [f"--{option.replace('_', '-')}" for option in (options(name) if name else ())]
    for word in (*names(), *MODELS, "gallery", *flags):
        assert word in message


def test_the_examples_parse() -> None:
    lines = re.sub(r"\\\n +", "", command.EXAMPLES).splitlines()[1:]
    examples = [line.strip().removeprefix("python -m attention_zoo ").split("   ")[0].split() for line in lines]
    assert len(examples) >= 5
    for words in examples:
        if "--help" not in words:
            parsed = command._parser(words)[0].parse_args(words)
            command._check(parsed)


FLAGS = ["--image", "--query", "--output", "--plugin", "--weights", "--model", "--stage", "--block", "--topk",
         "--n-win", "--window-size", "--help", "--no"]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["bra", "window", "gallery", "", "0", "1", "4", "auto", "0,0", "5,5", "1e9,0", "inf,0", "0.5,0.5", "x.png",
         "--", "biformer_tiny", "/dev/null", "%s", "[/red]", "9" * 5000]
    ),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=8),
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.one_of(VALUES, st.tuples(st.sampled_from(FLAGS), VALUES).map(list)), max_size=5))
def test_fuzzed_arguments_give_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[Any]
) -> None:
    monkeypatch.setattr(receptive_field, "save", lambda *args, **chosen: Path(args[3]))
    monkeypatch.setattr(receptive_field, "gallery", lambda *args: Path(args[2]))
    monkeypatch.setattr(route_figure, "save", lambda *args: Path(args[3]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = outcome([word for part in words for word in (part if isinstance(part, list) else [part])])
    message = capsys.readouterr()
    assert status in (0, 2) and (status == 0 or re.fullmatch(r"error: [^\n]+\n", message.err))
