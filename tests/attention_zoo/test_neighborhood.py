"""Neighborhood attention, its dilation and its stride: token by token, from the publications' definitions."""

from functools import partial
from itertools import product
from typing import Any

import conftest
import pytest
import torch
from torch import Tensor

from attention_zoo import InvalidOption, Unsupported, build
from attention_zoo.attentions.neighborhood import flex
from attention_zoo.attentions.neighborhood.axis import Axis
from attention_zoo.ops import flex_backend

DIM, HEADS = 12, 3
SIZE = DIM // HEADS
made, image = partial(conftest.made, dim=DIM, heads=HEADS), partial(conftest.image, dim=DIM)
CASES: list[tuple[dict[str, int], tuple[int, int]]] = [
    (dict(kernel_size=3), (6, 7)),
    (dict(kernel_size=5), (3, 8)),
    (dict(kernel_size=1), (2, 3)),
    (dict(kernel_size=7), (2, 4)),
    (dict(kernel_size=3, dilation=2), (6, 7)),
    (dict(kernel_size=3, dilation=3), (7, 4)),
    (dict(kernel_size=3, dilation=4), (2, 9)),
    (dict(kernel_size=5, stride=2), (8, 7)),
    (dict(kernel_size=3, stride=3), (6, 8)),
    (dict(kernel_size=4, stride=2), (7, 5)),
    (dict(kernel_size=4, stride=4), (9, 3)),
    (dict(kernel_size=3, stride=2, dilation=2), (9, 6)),
]


def around(at: int, length: int, kernel: int, dilation: int = 1, stride: int = 1) -> list[tuple[int, int]]:
    """The keys of a token along one axis, each with its displacement in steps of the dilation.

    The window moves one token at a time from its leader until it is inside the tokens of equal residue.
    """
    own = [token for token in range(length) if token % dilation == at % dilation]
    block = [member for member in range(len(own)) if member // stride == own.index(at) // stride]
    middle = block[0] + stride // 2
    leader = middle if middle < len(own) else len(own) - 1
    first = leader - kernel // 2
    while first + kernel > len(own):
        first -= 1
    while first < 0:
        first += 1
    return [(own[i], i - own.index(at)) for i in range(first, min(first + kernel, len(own)))]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of one query to its keys, head by head; ``bias`` is (heads, keys)."""
    out = []
    for head in range(HEADS):
        part = slice(head * SIZE, (head + 1) * SIZE)
        shares = (k[:, part] @ q[part] / SIZE**0.5 + (0 if bias is None else bias[head])).exp()
        out.append(shares @ v[:, part] / shares.sum())
    return torch.cat(out)


def oracle(module: Any, x: Tensor, size: tuple[int, int], options: dict[str, int]) -> tuple[Tensor, list[int]]:
    """The output on the ``size`` first rows and columns of x, and the number of keys of each token."""
    out, keys, table, kernel = x.new_zeros(len(x), *size, DIM), [], module.relative_position_bias_table, None
    kernel = options["kernel_size"]
    for one, (row, col) in product(range(len(x)), product(range(size[0]), range(size[1]))):
        q, k, v = module.qkv(x[one]).chunk(3, -1)
        ys = around(row, x.shape[1], kernel, options.get("dilation", 1), options.get("stride", 1))
        xs = around(col, x.shape[2], kernel, options.get("dilation", 1), options.get("stride", 1))
        at = tuple(torch.tensor([(y, z) for (y, _), (z, _) in product(ys, xs)]).T)
        bias = None
        if table is not None:
            bias = torch.stack([table[:, dy + kernel - 1, dx + kernel - 1] for (_, dy), (_, dx) in product(ys, xs)], 1)
        out[one, row, col] = softmax_attention(q[row, col], k[at], v[at], bias)
        keys.append(len(at[0]))
    return module.proj(out), keys


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn_like(out))]


def assert_close(result: list[Tensor], exact: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(result, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < tolerance * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(("options", "size"), CASES)
def test_token_by_token(options: dict[str, int], size: tuple[int, int], impl: str, biased: bool) -> None:
    module = made("neighborhood", impl, relative_position_bias=biased, **options)
    x = image(*size, batch=1).requires_grad_()
    inputs = [x, *module.parameters()]
    exact, keys = oracle(module, x, size, options)
    assert_close(gradients(module(x), inputs), gradients(exact, inputs))
    assert module.kv_tokens_per_query(*size) == pytest.approx(sum(keys) / len(keys), rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(kernel_size=5), (3, 8)),
        (dict(kernel_size=3, dilation=2), (4, 9)),
        (dict(kernel_size=3, stride=2), (2, 2)),
        (dict(kernel_size=3), (5, 4)),
    ],
)
def test_padding_that_is_attended_to(options: dict[str, int], size: tuple[int, int], impl: str) -> None:
    """NATTEN before 0.20: a side shorter than kernel_size * dilation gets zeros at its end, keys like any other."""
    module = made("neighborhood", impl, relative_position_bias=True, attend_padding=True, **options)
    least, x = options["kernel_size"] * options.get("dilation", 1), image(*size, batch=1)
    padded = x.new_zeros(1, max(size[0], least), max(size[1], least), DIM)
    padded[:, : size[0], : size[1]] = x
    exact, keys = oracle(module, padded, size, options)
    assert_close([module(x)], [exact])
    assert module.kv_tokens_per_query(*size) == keys[0] == options["kernel_size"] ** 2


@pytest.mark.parametrize("options", [dict(kernel_size=9), dict(kernel_size=15), dict(kernel_size=9, stride=4)])
def test_a_neighborhood_of_the_whole_grid_is_full_attention(options: dict[str, int]) -> None:
    module, full, x = made("neighborhood", **options), made("full", qkv_bias=True), image(9, 6)
    full.load_state_dict(module.state_dict())
    assert_close([module(x)], [full(x)], 1e-11)


@pytest.mark.parametrize("kernel", [3, 4])
def test_stride_of_the_kernel_is_window_attention(kernel: int) -> None:
    module, x = made("neighborhood", kernel_size=kernel, stride=kernel), image(12, 24)
    window = made("window", window_size=kernel)
    window.load_state_dict(module.state_dict())
    assert_close([module(x)], [window(x)], 1e-11)


def test_dilation_is_the_attention_of_each_dilated_grid() -> None:
    module, undilated, x = (
        made("neighborhood", kernel_size=3, dilation=2),
        made("neighborhood", kernel_size=3),
        image(7, 9),
    )
    for down, right in product(range(2), repeat=2):
        assert_close([module(x)[:, down::2, right::2]], [undilated(x[:, down::2, right::2])], 1e-11)


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        (dict(kernel_size=4), "kernel_size=4 is even.*valid: an odd integer, or a stride of at least 2"),
        (dict(kernel_size=3, stride=4), "stride=4.*valid: 1 to kernel_size = 3"),
        (dict(dilation=0), "dilation=0.*>= 1"),
    ],
)
def test_invalid_options_name_the_valid_ones(options: dict[str, int], valid: str) -> None:
    with pytest.raises(InvalidOption, match=valid):
        build("neighborhood", dim=DIM, num_heads=HEADS, **options)


FLEX_CASES = [
    (dict(kernel_size=3), (9, 20)),
    (dict(kernel_size=7), (17, 33)),
    (dict(kernel_size=11), (8, 16)),
    (dict(kernel_size=5), (26, 3)),
    (dict(kernel_size=3, dilation=3), (19, 34)),
    (dict(kernel_size=7, dilation=8), (5, 41)),
    (dict(kernel_size=5, stride=2), (17, 20)),
    (dict(kernel_size=6, stride=4, dilation=2), (23, 18)),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("options", "grid"), FLEX_CASES)
def test_flex_attention_equals_the_reference(
    options: dict[str, int], grid: tuple[int, int], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but PyTorch's kernel, which has no backward pass on a CPU: blocks, mask, bias and order of tokens."""
    monkeypatch.setattr(flex_backend, "compiled", lambda: dense_flex_attention)
    monkeypatch.setattr(flex_backend, "unsupported", lambda *_: None)
    result = []
    for impl in ("reference", "flex"):
        module = made("neighborhood", impl, relative_position_bias=biased, **options)
        x = image(*grid).requires_grad_()
        result.append(gradients(module(x), [x, *module.parameters()]))
    assert_close(*result)


def dense_flex_attention(q: Tensor, k: Tensor, v: Tensor, biased: Any, mask: Any, scale: float) -> Tensor:
    """The definition of flex_attention, with every score written out."""
    tokens, heads = torch.arange(q.shape[2]), torch.arange(q.shape[1])[:, None, None]
    where = torch.zeros_like(tokens)[:, None], heads, tokens[:, None], tokens[None, :]
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores if biased is None else biased(scores, *where)
    blocks = mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1).bool()
    return torch.softmax(scores.masked_fill(~(blocks & mask.mask_mod(*where)), float("-inf")), -1) @ v


@pytest.mark.parametrize(
    ("options", "grid"), [*FLEX_CASES, (dict(kernel_size=7), (30, 70)), (dict(kernel_size=21), (64, 33))]
)
def test_flex_attention_visits_the_blocks_that_hold_a_key(options: dict[str, int], grid: tuple[int, int]) -> None:
    kernel, dilation, stride = (options.get(name, 1) for name in ("kernel_size", "dilation", "stride"))
    axes = tuple(Axis(side, kernel, dilation, stride) for side in grid)
    mask = flex.block_mask(axes, torch.device("cpu"))
    # Rows and columns are sorted by their residue, then cut into tiles of 8 x 16.
    tiles = []
    for side, tile in zip(grid, (8, 16), strict=True):
        order = sorted(range(side), key=lambda at: (at % dilation, at))
        tiles.append([order.index(at) // tile for at in range(side)])
    cols, needed = max(tiles[1]) + 1, set()
    for axis_pairs in product(*(_tile_pairs(side, t, options) for side, t in zip(grid, tiles, strict=True))):
        (row, y), (col, x) = axis_pairs
        needed.add((row * cols + col, y * cols + x))
    assert {tuple(pair) for pair in mask.to_dense()[0, 0].nonzero().tolist()} == needed


def _tile_pairs(side: int, tiles: list[int], options: dict[str, int]) -> set[tuple[int, int]]:
    settings = options["kernel_size"], options.get("dilation", 1), options.get("stride", 1)
    return {(tiles[at], tiles[key]) for at in range(side) for key, _ in around(at, side, *settings)}


def test_flex_attention_raises_unsupported_with_reason() -> None:
    with pytest.raises(Unsupported, match=r"no backward pass on cpu; valid there: steps under torch.no_grad\(\)"):
        build("neighborhood", dim=64, num_heads=2, impl="flex")(torch.zeros(1, 8, 8, 64))
    with pytest.raises(Unsupported, match="fp64"), torch.no_grad():
        build("neighborhood", dim=64, num_heads=2, impl="flex").double()(torch.zeros(1, 8, 8, 64).double())
    for device, gradients in product(("cpu", "meta"), (False, True)):
        with torch.set_grad_enabled(gradients):
            x = torch.zeros(1, 8, 8, 64, device=device)
            assert build("neighborhood", dim=64, num_heads=2).chosen_impl(x) == "sdpa"


def test_flex_attention_can_run_on_a_cpu_without_gradients(compiler: None) -> None:
    x, module = torch.zeros(1, 8, 8, 64), build("neighborhood", dim=64, num_heads=2, impl="flex")
    with torch.no_grad():
        assert module.chosen_impl(x) == "flex"
    assert module.requires_grad_(False).chosen_impl(x) == "flex"


@pytest.mark.slow
def test_compiled_flex_attention_equals_the_reference_on_a_cpu(compiler: None) -> None:
    options = dict(dim=64, num_heads=4, kernel_size=5, dilation=2, stride=2, relative_position_bias=True)
    reference, fast = build("neighborhood", impl="reference", **options), build("neighborhood", impl="flex", **options)
    fast.load_state_dict(reference.state_dict())
    x = torch.randn(2, 13, 22, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), reference(x), rtol=1e-4, atol=1e-5)
