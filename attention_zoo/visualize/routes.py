"""Routes on a picture: the regions that BRA routes a query's region to, for several topk.

Without a checkpoint the real module routes by colour and gradients: its projections are set to the identity, so
that the product of two region descriptors measures their similarity. With a checkpoint, a block of the trained
model routes its own input activations.

Shape legend: h w pixels, b batch, y x grid, c channels, p regions (S x S, row-major).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attentions.bra import BiLevelRoutingAttention
from attention_zoo.core.base import InvalidOption
from attention_zoo.models.biformer import BiFormer
from attention_zoo.models.block import Block
from attention_zoo.visualize.receptive_field import DIM, GRID, HEADS, features

TOPK = (1, 2, 4, 8, 16)
"""The values of topk that are drawn by default."""
MOST_REGIONS = 64
"""Most regions per side that a figure can show."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's colours, which normalise the inputs of trained models."""


@dataclass(frozen=True)
class Routes:
    """The routes of the region of a query, or with per_token_routing of its token.

    Attributes:
        side: regions per side S.
        region: the query's region, an index of S x S in row-major order.
        ranked: for each topk the routed regions, best first, and their weights, which add up to 1.
        source: the origin of the routes, in words.
    """

    side: int
    region: int
    ranked: dict[int, tuple[list[int], list[float]]]
    source: str


def by_appearance(picture: Float[Tensor, "3 h w"], query: tuple[int, int], **options: Any) -> Routes:
    """Routes by colour and gradients, of BRA with identity projections.

    Args:
        query: row and column of a pixel.
        options: of BRA; if ``topk`` is given, only that one is drawn.
    """
    asked = options.get("topk")
    bra = BiLevelRoutingAttention(DIM, HEADS, **({"topk": 1, "side_dwconv": 0} | options)).eval()
    side = bra.n_win if isinstance(bra.n_win, int) else 1
    if side > MOST_REGIONS:
        raise InvalidOption(f"n_win={side} is more than a picture can show; valid: 1 to {MOST_REGIONS}, auto")
    _relate_what_looks_alike(bra)
    grid = side * -(-GRID // side)
    routes = _routes(bra, features(picture, grid, grid), picture, query, asked)
    return Routes(*routes, "by colour and gradients")


def of_model(
    model: BiFormer,
    picture: Float[Tensor, "3 h w"],
    query: tuple[int, int],
    stage: int,
    block: int,
    topk: int | None = None,
) -> Routes:
    """Routes of one block of a model, on the block's input activations.

    The picture is resized only as far as needed for S to divide the grid of every stage.

    Args:
        stage, block: indices counted from 1.
        topk: the only one drawn; None: several. The router's scores do not depend on topk.
    """
    bra = attention_of(model, stage, block)
    seen: list[Tensor] = []
    hook = bra.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = fitted(picture, bra)
    try:
        with torch.no_grad():
            model(x)
    finally:
        hook.remove()
    height, width = picture.shape[1:]
    source = f"of stage {stage}, block {block}, whose topk is {bra.topk}"
    if x.shape[2:] != (height, width):
        source += f"; picture resized from {height} x {width} to {x.shape[2]} x {x.shape[3]}"
    return Routes(*_routes(bra, seen[0], picture, query, topk), source)


def attention_of(model: BiFormer, stage: int, block: int) -> BiLevelRoutingAttention:
    """The attention of a block, stage and block counted from 1; InvalidOption if it does not exist or is not BRA."""
    blocks = [[m.attn for m in part.modules() if isinstance(m, Block)] for part in model.stages]
    routed = [str(n) for n, result in enumerate(blocks, 1) if isinstance(result[0], BiLevelRoutingAttention)]
    if str(stage) not in routed:
        raise InvalidOption(f"--stage {stage} has no routes in this model; valid: {', '.join(routed) or 'none'}")
    if not 1 <= block <= len(blocks[stage - 1]):
        raise InvalidOption(f"--block {block} is not in stage {stage}; valid: 1 to {len(blocks[stage - 1])}")
    result = blocks[stage - 1][block - 1]
    assert isinstance(result, BiLevelRoutingAttention)
    return result


def fitted(picture: Float[Tensor, "3 h w"], bra: BiLevelRoutingAttention) -> Float[Tensor, "1 3 h2 w2"]:
    """A picture as model input: ImageNet's normalisation, and sides that the regions of every stage divide."""
    # The third stage, the last with routing, has 1/16 of the pixels per side.
    multiple = 16 * (bra.n_win if isinstance(bra.n_win, int) else 4)
    size = [max(1, round(side / multiple)) * multiple for side in picture.shape[1:]]
    x = picture[None]
    if size != list(picture.shape[1:]):
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _routes(
    bra: BiLevelRoutingAttention,
    x: Float[Tensor, "1 y x c"],
    picture: Float[Tensor, "3 h w"],
    query: tuple[int, int],
    topk: int | None,
) -> tuple[int, int, dict[int, tuple[list[int], list[float]]]]:
    side = bra.regions_per_side(x.shape[1], x.shape[2])
    if topk is not None and not 1 <= topk <= side**2:
        raise InvalidOption(f"topk={topk} exceeds the {side**2} regions; valid: 1 to {side**2}")
    row, column = (at * side // pixels for at, pixels in zip(query, picture.shape[1:], strict=True))
    region = row * side + column
    token = tuple(at * n // pixels for at, n, pixels in zip(query, x.shape[1:3], picture.shape[1:], strict=True))
    place = (0, *token) if bra.per_token_routing else (0, region)
    ranked = {}
    trained = bra.router.topk
    for k in _shown(side**2) if topk is None else [topk]:
        bra.router.topk = k
        index, weight = bra.routes(x)
        ranked[k] = index[place].tolist(), weight[place].tolist()
    bra.router.topk = trained
    return side, region, ranked


def _shown(regions: int) -> Sequence[int]:
    return [k for k in TOPK if k <= regions]


def _relate_what_looks_alike(bra: BiLevelRoutingAttention) -> None:
    """Set the projections to the identity, so that queries and keys equal the input."""
    with torch.no_grad():
        same = torch.eye(bra.qk_dim, bra.dim)
        bra.qkv.qkv.weight.copy_(torch.cat([same, same, torch.eye(bra.dim)]))
        bra.qkv.qkv.bias.zero_()
        if isinstance(bra.router.emb, nn.Linear):
            bra.router.emb.weight.copy_(torch.eye(bra.qk_dim))
            bra.router.emb.bias.zero_()
