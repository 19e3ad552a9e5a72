"""The registry, options and plugins: valid input is built, invalid input is rejected with the valid choices."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import InvalidOption, build, get, load_plugin, names, options, register
from attention_zoo.core import registry
from attention_zoo.core.options import AtLeast0, AtLeast1, Option, options_of

PLUGIN = """
import torch
from torch import nn
from attention_zoo import register


@register("{name}")
class Mine(nn.Module):
    def __init__(self, dim, num_heads, **options):
        super().__init__()
        self.options = options
        self.scale = nn.Parameter(torch.full((dim,), 1.0 + num_heads))

    def forward(self, x):
        return self.scale * x
"""


def written(folder: Path, name: str, source: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(source)
    return path


def test_the_attentions_that_the_block_and_the_sweeps_name() -> None:
    assert {"bra", "full", "lepe", "pseudo_conv", "window", "axial"} <= set(names())
    assert names() == sorted(names())


def test_a_taken_name_is_refused_and_stays_what_it_was() -> None:
    before = get("full")
    with pytest.raises(InvalidOption, match=r"'full' is already registered; taken names: .*bra, .*full, "):
        register("full")(nn.Identity)
    assert get("full") is before


def test_register_returns_the_class_and_build_finds_it() -> None:
    class Scaled(nn.Module):
        def __init__(self, dim: int, num_heads: int, factor: float = 2.0) -> None:
            super().__init__()
            self.factor = factor * dim * num_heads

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    assert register("scaled")(Scaled) is Scaled
    assert "scaled" in names() and get("scaled") is Scaled
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(build("scaled", dim=4, num_heads=2)(x), 16 * x)
    assert torch.equal(build("scaled", dim=4, num_heads=2, factor=0.5)(x), 4 * x)
    with pytest.raises(InvalidOption, match=r"no option 'facter'; valid: factor"):
        build("scaled", dim=4, num_heads=2, facter=3.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("fulll", {}, f"unknown attention 'fulll'; valid: {', '.join(names())}$"),
        ("full", {"n_win": 7}, r"'full' has no option 'n_win'; valid: qkv_bias"),
        ("pseudo_conv", {"n_win": 7}, r"no option 'n_win'; valid: none"),
        ("bra", {"topk": 0}, r"topk=0 is not valid; valid: an integer >= 1"),
        ("bra", {"topk": 4.0}, r"topk=4.0 is not valid"),
        ("bra", {"topk": True}, r"topk=True is not valid"),
        ("bra", {"n_win": "seven"}, r"n_win='seven' is not valid; valid: an integer >= 1, auto"),
        ("bra", {"qk_dim": -1}, r"qk_dim=-1 is not valid; valid: an integer >= 1, none"),
        ("bra", {"kv_downsample_mode": "mean"}, r"valid: identity, avgpool, maxpool, ada_avgpool, ada_maxpool, frac"),
        ("bra", {"soft_routing": 1}, r"soft_routing=1 is not valid; valid: true, false"),
        ("bra", {"param_attention": "qkvx"}, r"valid: qkvo, qkv"),
        ("bra", {"topk": 50}, r"valid: 1 to 49"),
        ("window", {"window_size": 0}, r"window_size=0 is not valid; valid: an integer >= 1"),
        ("window", {"window_size": 4, "shift": 4}, r"shift=4 is not valid; valid: 0 to window_size - 1 = 3"),
        ("lepe", {"side_dwconv": 4}, r"side_dwconv=4 is even"),
        ("full", {"impl": "tritton"}, r"impl='tritton' is not one of: auto, reference, sdpa"),
        ("pseudo_conv", {"impl": "sdpa"}, r"impl='sdpa' is not one of: auto, reference"),
    ],
)
def test_what_is_not_valid_is_refused_with_the_valid_choices(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        build(name, dim=8, num_heads=2, **args)


@pytest.mark.parametrize("name", names())
def test_heads_must_divide_the_channels(name: str) -> None:
    with pytest.raises(InvalidOption, match=r"dim=12 is not divisible by num_heads=5; valid num_heads: 1, 2, 3, 4, 6"):
        build(name, dim=12, num_heads=5)
    for dim, heads in ((12, 0), (0, 1), (12, -3)):
        with pytest.raises(InvalidOption):
            build(name, dim=dim, num_heads=heads)


DECLARED = [pytest.param(o, id=f"{name}.{o.name}") for name in names() for o in options(name).values()]


@pytest.mark.parametrize("option", DECLARED)
def test_options_survive_being_written(option: Option) -> None:
    literals = [alternative.literal for alternative in option.alternatives if alternative.literal is not None]
    tried = 0
    for value in (option.default, None, False, True, 0, 1, 7, -2.5, 1e-3, *literals):
        try:
            option.check(value)
        except InvalidOption:
            continue
        read = option.parse(str(value))
        same_number = isinstance(read, float) and type(value) is int
        assert read == value and (type(read) is type(value) or same_number)
        tried += 1
    assert tried >= 2


class Declares:
    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        count: AtLeast1 = 3,
        reach: AtLeast0 | None = None,
        sides: AtLeast1 | Literal["auto"] = "auto",
        rate: float = 0.5,
        on: bool = False,
        mode: Literal["a", "b"] = "a",
        free=None,
    ) -> None: ...


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("count", "12", 12),
        ("reach", "0", 0),
        ("reach", "none", None),
        ("reach", "", None),
        ("sides", "auto", "auto"),
        ("sides", "7", 7),
        ("rate", "1e-2", 0.01),
        ("rate", "2", 2.0),
        ("on", "true", True),
        ("on", "False", False),
        ("mode", "b", "b"),
        ("free", "any thing", "any thing"),
    ],
)
def test_parse(option: str, text: str, value: Any) -> None:
    read = options_of(Declares)[option].parse(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("option", "text", "valid"),
    [
        ("count", "0", "an integer >= 1"),
        ("count", "2.0", "an integer >= 1"),
        ("count", "none", "an integer >= 1"),
        ("reach", "-1", "an integer >= 0, none"),
        ("sides", "Auto", "an integer >= 1, auto"),
        ("rate", "much", "a number"),
        ("on", "1", "true, false"),
        ("mode", "c", "a, b"),
    ],
)
def test_parse_refuses_and_lists_the_valid(option: str, text: str, valid: str) -> None:
    with pytest.raises(InvalidOption) as refusal:
        options_of(Declares)[option].parse(text)
    assert str(refusal.value) == f"{option}={text!r} is not valid; valid: {valid}"


def test_options_are_those_of_the_signature_in_its_order() -> None:
    result = options_of(Declares)
    assert list(result) == ["count", "reach", "sides", "rate", "on", "mode", "free"]
    assert [option.default for option in result.values()] == [3, None, "auto", 0.5, False, "a", None]


def test_plugin_of_a_bare_module(tmp_path: Path) -> None:
    path = written(tmp_path, "mine", PLUGIN.format(name="mine"))
    assert load_plugin(path) == ["mine"]
    x = torch.randn(2, 5, 6, 8)
    module = build("mine", dim=8, num_heads=2, whatever=3, other="x")
    assert torch.equal(module(x), 3 * x)
    assert module.options == {"whatever": 3, "other": "x"}
    assert options("mine") == {}
    assert load_plugin(str(path)) == []
    with pytest.raises(InvalidOption, match="one implementation"):
        build("mine", dim=8, num_heads=2, impl="sdpa")


def test_plugin_of_two_attentions(tmp_path: Path) -> None:
    source = PLUGIN.format(name="zwei") + PLUGIN.format(name="eins").replace("class Mine", "class Yours")
    assert load_plugin(written(tmp_path, "two_of_them", source)) == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("x = 1 / 0\n", "ZeroDivisionError"),
        ("x = 1\n", "registers no attention"),
        (PLUGIN.format(name="bra"), "'bra' is already registered"),
        (PLUGIN.format(name="fresh") + PLUGIN.format(name="bra"), "'bra' is already registered"),
        (PLUGIN.format(name="fresh") + "raise RuntimeError('late')\n", "RuntimeError: late"),
    ],
)
def test_a_plugin_that_fails_leaves_the_registry_as_it_was(tmp_path: Path, source: str, message: str) -> None:
    before = dict(registry._CLASSES)
    path = written(tmp_path, "plugin_that_fails", source)
    for _ in range(2):
        with pytest.raises(InvalidOption, match=message) as refusal:
            load_plugin(path)
        assert str(path) in str(refusal.value)
        assert dict(registry._CLASSES) == before


def test_failed_plugin_loads_once_fixed(tmp_path: Path) -> None:
    path = written(tmp_path, "mended", "x = 1\n")
    with pytest.raises(InvalidOption):
        load_plugin(path)
    written(tmp_path, "mended", PLUGIN.format(name="mended_name"))
    assert load_plugin(path) == ["mended_name"]


@pytest.mark.parametrize("missing", ["nowhere.py", "", "notes.txt"])
def test_a_plugin_that_is_no_python_file(tmp_path: Path, missing: str) -> None:
    (tmp_path / "notes.txt").write_text("x = 1")
    with pytest.raises(InvalidOption, match="not a Python file"):
        load_plugin(tmp_path / missing)


def test_two_plugins_of_one_file_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder, "attention", PLUGIN.format(name=f"of_{folder}"))
        assert load_plugin(path) == [f"of_{folder}"]
    assert load_plugin(tmp_path / "a" / "attention.py") == []
