"""Slow implementations of manhattan, cosine_window, aggregated and super_token: loops over tokens, for the tests.

Each takes the module for its weights and options, and one image (h, w, c) in fp64.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 12, 3
SIZE = DIM // HEADS
Place = tuple[int, int]


def places(height: int, width: int) -> list[Place]:
    return list(product(range(height), range(width)))


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def softmax(scores: list[Tensor]) -> Tensor:
    weights = torch.stack(scores).exp()
    return weights / weights.sum()


def by_head(x: Tensor, head: int) -> Tensor:
    return x[..., head * SIZE : (head + 1) * SIZE]


# Manhattan


def turned(x: Tensor, index: int) -> Tensor:
    """Pairs of channels as complex numbers, multiplied by exp(i * index * frequency)."""
    out = []
    for pair in range(SIZE // 2):
        angle = index * 10000.0 ** -(pair / max(SIZE // 2 - 1, 1))
        a, b = x[2 * pair], x[2 * pair + 1]
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(out)


def manhattan_oracle(module: Any, x: Tensor) -> Tensor:
    """One image, head by head and token by token."""
    height, width = x.shape[:2]
    q, k, v = module.qkv(x).chunk(3, -1)
    heads = []
    for head in range(HEADS):
        gamma = 1 - 2 ** (-module.initial_decay - module.decay_range * head / HEADS)
        turn = turned if module.rotary else lambda t, index: t
        qs, ks, vs = ({at: by_head(t[at], head) for at in places(height, width)} for t in (q, k, v))
        qs, ks = ({(r, c): turn(t, r * width + c) for (r, c), t in of.items()} for of in (qs, ks))

        def attend(at: Place, keys: list[Place], values: dict[Place, Tensor], of: Any = (qs, ks, gamma)) -> Tensor:
            qs, ks, gamma = of
            weights = softmax([qs[at] @ ks[key] / SIZE**0.5 for key in keys])
            decayed = [w * gamma ** (abs(at[0] - y) + abs(at[1] - z)) for w, (y, z) in zip(weights, keys, strict=True)]
            if module.normalise_decay:
                decayed = [w / sum(decayed) for w in decayed]
            return sum(w * values[key] for w, key in zip(decayed, keys, strict=True))

        if module.decomposed:
            rows = {(r, c): attend((r, c), [(r, z) for z in range(width)], vs) for r, c in vs}
            result = {(r, c): attend((r, c), [(y, c) for y in range(height)], rows) for r, c in vs}
        else:
            result = {at: attend(at, list(vs), vs) for at in vs}
        heads.append(torch.stack([result[at] for at in places(height, width)]))
    out = torch.cat(heads, -1).view(x.shape)
    if module.lce is not None:
        reach = module.lce.kernel_size[0] // 2
        local = []
        for r, c in places(height, width):
            near = [(y, z) for y, z in places(height, width) if abs(y - r) <= reach and abs(z - c) <= reach]
            local.append(sum(module.lce.weight[:, 0, y - r + reach, z - c + reach] * v[y, z] for y, z in near))
        out = out + torch.stack(local).view(x.shape) + module.lce.bias
    return module.proj(out)


# Cosine windows


def network(parameters: nn.Module, y: float, x: float) -> Tensor:
    """Two layers of a pair of coordinates."""
    hidden = parameters.hidden.weight @ torch.tensor([y, x], dtype=torch.float64) + parameters.hidden.bias
    out = parameters.out.weight @ hidden.clamp_min(0)
    return out if parameters.out.bias is None else out + parameters.out.bias


def log_coordinate(displacement: float, side: int) -> float:
    scaled = 8 * displacement / max(side - 1, 1)
    return math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled)


def cosine_oracle(module: Any, x: Tensor) -> Tensor:
    size, shift, side = module.window_size, module.shift, module.pretrained_window_size or module.window_size
    weight = module.qkv.weight
    q, k, v = (x @ part.T for part in weight.chunk(3))
    if module.q_bias is not None:
        q, v = q + module.q_bias, v + module.v_bias
    bias: dict[Place, Tensor] = {}
    out = []
    for r, c in places(*x.shape[:2]):
        keys = [
            (y, z)
            for y, z in places(*x.shape[:2])
            if (y - shift) // size == (r - shift) // size and (z - shift) // size == (c - shift) // size
        ]
        for y, z in keys:
            if (r - y, c - z) not in bias:
                raw = network(module.position_bias, log_coordinate(r - y, side), log_coordinate(c - z, side))
                bias[r - y, c - z] = 16 / (1 + torch.exp(-raw))
        heads = []
        for head in range(HEADS):
            scale = min(module.logit_scale[head, 0, 0], torch.tensor(100.0, dtype=torch.float64).log()).exp()
            near = [by_head(k[key], head) for key in keys]
            scores = [unit(by_head(q[r, c], head)) @ unit(key) * scale for key in near]
            weights = softmax([s + bias[r - y, c - z][head] for s, (y, z) in zip(scores, keys, strict=True)])
            heads.append(sum(w * by_head(v[key], head) for w, key in zip(weights, keys, strict=True)))
        out.append(torch.cat(heads))
    return module.proj(torch.stack(out).view(x.shape))


# Aggregated


def spans(length: int, pooled: int) -> list[range]:
    """The tokens that each adaptive average covers."""
    return [range(i * length // pooled, math.ceil((i + 1) * length / pooled)) for i in range(pooled)]


def pooled_side(module: Any, length: int) -> int:
    if module.pool_size is not None and module.sr_ratio > 1:
        return min(module.pool_size, length)
    return max(length // module.sr_ratio, 1)


def pool_bias(module: Any, height: int, width: int) -> dict[tuple[Place, Place], Tensor]:
    """The bias of every token and pooled token, at the grid's positions or interpolated from those of one grid."""
    grid, trained = (height, width), (module.bias_size,) * 2
    evaluated = trained if module.bias_size else grid
    pools = [spans(side, pooled_side(module, side)) for side in evaluated]
    middles = [[sum(span) / len(span) for span in axis] for axis in pools]
    values = {
        (at, (i, j)): network(
            module.position_network,
            log_coordinate(at[0] - y, module.pretrained_size or height),
            log_coordinate(at[1] - z, module.pretrained_size or width),
        )
        for at in places(*evaluated)
        for (i, y), (j, z) in product(enumerate(middles[0]), enumerate(middles[1]))
    }
    if not module.bias_size:
        return values
    keys = [pooled_side(module, side) for side in grid]
    result = {}
    for at, key in product(places(height, width), places(*keys)):
        axes = [blend(*sides) for sides in zip((*at, *key), (*grid, *keys), (*trained, *map(len, pools)), strict=True)]
        result[at, key] = sum(
            share[0] * share[1] * share[2] * share[3] * values[(y, x), (i, j)]
            for (y, x, i, j), share in (zip(*corner, strict=True) for corner in product(*axes))
        )
    return result


def blend(index: int, length: int, source: int) -> list[tuple[int, float]]:
    """Where a bilinear resize of ``source`` to ``length`` reads, cell centres on cell centres."""
    at = max((index + 0.5) * source / length - 0.5, 0.0)
    low = int(at)
    return [(low, 1 - (at - low)), (min(low + 1, source - 1), at - low)]


def aggregated_oracle(module: Any, x: Tensor) -> Tensor:
    height, width = x.shape[:2]
    q, kv = module.q(x), module.kv(x)
    rows, cols = (spans(side, pooled_side(module, side)) for side in (height, width))
    far = places(len(rows), len(cols))
    if module.pool is None:
        pooled = {key: kv[key] for key in far}
    else:
        weight, norm = module.pool.linear.weight, module.pool.norm
        hidden = F.gelu(x @ weight.T + module.pool.linear.bias)
        pooled = {}
        for i, j in far:
            mean = sum(hidden[at] for at in product(rows[i], cols[j])) / (len(rows[i]) * len(cols[j]))
            centred = mean - mean.mean()
            pooled[i, j] = module.kv(centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias)
    bias, reach, out = pool_bias(module, height, width), module.window_size // 2, []
    for r, c in places(height, width):
        near = [
            (n, (r + dy, c + dx))
            for n, (dy, dx) in enumerate(product(range(-reach, reach + 1), repeat=2))
            if module.window is not None and 0 <= r + dy < height and 0 <= c + dx < width
        ]
        heads = []
        for head in range(HEADS):
            query = unit(by_head(q[r, c], head))
            factor = torch.log1p(module.temperature[head, 0, 0].exp()) * math.log(len(near) + len(far))
            scaled = (query + module.query_embedding[head, 0]) * factor
            scores = [scaled @ unit(by_head(kv[at], head)) + module.window.bias[head, n] for n, at in near]
            scores += [scaled @ unit(by_head(pooled[key], head)) + bias[(r, c), key][head] for key in far]
            weights = softmax(scores)
            extra = [query @ module.window.tokens[head, :, n] + module.window.offset[head, 0, n] for n, _ in near]
            extra += [torch.zeros(())] * len(far)
            values = [by_head(kv[at][DIM:], head) for _, at in near] + [by_head(pooled[key][DIM:], head) for key in far]
            heads.append(sum((w + e) * value for w, e, value in zip(weights, extra, values, strict=True)))
        out.append(torch.cat(heads))
    return module.proj(torch.stack(out).view(x.shape))


# Super tokens


def super_token_oracle(module: Any, x: Tensor) -> Tensor:
    size, (height, width) = module.super_token_size, x.shape[:2]
    if size == 1:
        return refined(module, {at: x[at] for at in places(height, width)}, x.shape)
    cells = places(-(-height // size), -(-width // size))
    tokens = {at: x[at] for at in places(height, width)}
    if not module.mask_padding:
        filled = places(-(-height // size) * size, -(-width // size) * size)
        tokens = {at: tokens.get(at, torch.zeros(DIM, dtype=x.dtype)) for at in filled}

    def shares_in(supers: dict[Place, Tensor]) -> dict[Place, dict[Place, Tensor]]:
        result = {}
        for (r, c), token in tokens.items():
            around = [(r // size + dy, c // size + dx) for dy, dx in product((-1, 0, 1), repeat=2)]
            zero = torch.zeros((), dtype=x.dtype)
            weights = softmax([token @ supers[cell] / DIM**0.5 if cell in supers else zero for cell in around])
            result[r, c] = {cell: w for cell, w in zip(around, weights, strict=True) if cell in supers}
        return result

    def gathered(shares: dict[Place, dict[Place, Tensor]]) -> dict[Place, Tensor]:
        result = {}
        for cell in cells:
            members = {at: of[cell] for at, of in shares.items() if cell in of}
            result[cell] = sum(w * tokens[at] for at, w in members.items()) / sum(members.values())
        return result

    supers = {}
    for cell in cells:
        members = [token for (r, c), token in tokens.items() if (r // size, c // size) == cell]
        supers[cell] = sum(members) / len(members)
    for turn in range(module.iterations):
        shares = shares_in(supers)
        if turn == module.iterations - 1 and module.detach_association:
            shares = {at: {cell: w.detach() for cell, w in of.items()} for at, of in shares.items()}
        supers = gathered(shares)
    values = refined(module, supers, (cells[-1][0] + 1, cells[-1][1] + 1, DIM))
    back = [sum(w * values[cell] for cell, w in shares[at].items()) for at in places(height, width)]
    return torch.stack(back).view(x.shape)


def refined(module: Any, supers: dict[Place, Tensor], shape: tuple[int, ...]) -> Tensor:
    """What happens among the super tokens; attention has its weights by head: the first rows are q, k, v of head 0."""
    if module.conv is not None:
        grid = torch.stack(list(supers.values())).view(shape).permute(2, 0, 1)[None]
        for conv in module.conv:
            grid = F.conv2d(grid, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
        return grid[0].permute(1, 2, 0)
    if module.qkv is None:
        return torch.stack(list(supers.values())).view(shape)
    mixed = []
    for at in supers:
        heads = []
        for head in range(HEADS):
            part = slice(3 * SIZE * head, 3 * SIZE * (head + 1))
            q, k, v = zip(*(module.qkv(token)[part].chunk(3) for token in supers.values()), strict=True)
            query = q[list(supers).index(at)]
            weights = softmax([query @ key * module.scale for key in k])
            heads.append(sum(w * value for w, value in zip(weights, v, strict=True)))
        mixed.append(torch.cat(heads))
    return module.proj(torch.stack(mixed).view(shape))


ORACLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "manhattan": manhattan_oracle,
    "cosine_window": cosine_oracle,
    "aggregated": aggregated_oracle,
    "super_token": super_token_oracle,
}
