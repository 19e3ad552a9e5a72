"""Slow implementations of deformable and quadtree attention: loops over tokens, for the tests.

Each takes one image (rows, columns, channels) in fp64 and weights with the names and shapes of the authors' code, those
of convolutions as (out, in / groups, rows, columns). ``*_from`` maps these to the parameters of the zoo's module.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

DIM, HEADS = 8, 4
SIZE = DIM // HEADS
State = dict[str, Tensor]
Place = tuple[int, int]


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """A linear map of the last axis; its weight may be that of a 1x1 convolution."""
    out = x @ state[f"{name}.weight"].flatten(1).T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def depthwise(state: State, name: str, x: Tensor, row: int, col: int) -> Tensor:
    """A depthwise convolution of (rows, columns, channels), centred on one place, zeros outside."""
    weight, out = state[f"{name}.weight"], state[f"{name}.bias"]
    reach = weight.shape[-1] // 2
    for dy, dx in product(range(-reach, reach + 1), repeat=2):
        if 0 <= row + dy < x.shape[0] and 0 <= col + dx < x.shape[1]:
            out = out + weight[:, 0, dy + reach, dx + reach] * x[row + dy, col + dx]
    return out


def normed(state: State, name: str, x: Tensor) -> Tensor:
    """All of x together to mean 0 and variance 1, then scaled and shifted per channel."""
    centred = x - x.mean()
    return centred / ((centred**2).mean() + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


# Deformable


def deformable_shapes(kernel: int, groups: int, side: int) -> dict[str, tuple[int, ...]]:
    """The authors' layout, of 2022 and of 2023."""
    convolutions = {f"proj_{name}": (DIM, DIM, 1, 1) for name in ("q", "k", "v", "out")}
    part = DIM // groups
    return (
        {f"{name}.weight": shape for name, shape in convolutions.items()}
        | {f"{name}.bias": (DIM,) for name in convolutions}
        | {"conv_offset.0.weight": (part, 1, kernel, kernel), "conv_offset.0.bias": (part,)}
        | {"conv_offset.1.norm.weight": (part,), "conv_offset.1.norm.bias": (part,)}
        | {"conv_offset.3.weight": (2, part, 1, 1), "rpe_table": (HEADS, 2 * side - 1, 2 * side - 1)}
    )


def deformable_from(state: State, offsets: bool = True, biased: bool = True) -> State:
    flat = {name: value.flatten(1) if value.shape[-2:] == (1, 1) else value for name, value in state.items()}
    mapped = {
        f"{ours}.{kind}": torch.cat([flat[f"proj_{name}.{kind}"] for name in theirs])
        for ours, theirs in (("q", ["q"]), ("kv", ["k", "v"]), ("proj", ["out"]))
        for kind in ("weight", "bias")
    }
    if offsets:
        for ours, theirs in (("depthwise", "0"), ("norm", "1.norm")):
            for kind in ("weight", "bias"):
                mapped[f"offset.{ours}.{kind}"] = flat[f"conv_offset.{theirs}.{kind}"]
        mapped["offset.to_offset.weight"] = flat["conv_offset.3.weight"]
    return mapped | ({"relative_position_bias_table": flat["rpe_table"]} if biased else {})


def bilinear(values: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate (rows, columns, channels) at a position from -1 to 1 between the corner entries, zero outside."""
    near = []
    for side, at in zip(values.shape, (y, x), strict=False):
        entry = (at + 1) / 2 * (side - 1)
        near.append((1 - (torch.arange(side, dtype=values.dtype) - entry).abs()).clamp_min(0))
    return torch.einsum("y,x,yxc->c", *near, values)


def reference(kind: str, index: int, count: int) -> float:
    """Where a point is along an axis, before it is displaced."""
    if count == 1:
        return 0.0
    return {
        "paper": -1 + index * 2 / (count - 1),
        "centres": -1 + (index + 0.5) * 2 / count,
        "shifted": -1 + (index + 0.5) * 2 / (count - 1),
    }[kind]


def positions(kind: str, point: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.tensor([reference(kind, *pair) for pair in zip(point, counts, strict=True)], dtype=torch.float64)


def deformable_oracle(
    state: State, x: Tensor, *, stride: int, groups: int, kind: str, factor: float, biased: bool = True
) -> Tensor:
    """One image (rows, columns, channels). Factor None: no offsets."""
    sides = x.shape[:2]
    counts = [math.ceil(side / stride) for side in sides]
    q, part, per_group = linear(state, "proj_q", x), DIM // groups, HEADS // groups
    keys, places = [], []
    for point in product(*map(range, counts)):
        sampled, at = [], []
        for group in range(groups):
            channels = slice(group * part, (group + 1) * part)
            position = positions(kind, point, counts)
            if factor != 0:
                seen = depthwise(state, "conv_offset.0", q[..., channels], *(stride * index for index in point))
                shift = linear(state, "conv_offset.3", gelu(normed(state, "conv_offset.1.norm", seen)))
                if factor == -1:
                    position = (position + shift).clamp(-1, 1)
                else:
                    half = [1 / (n if kind == "centres" else max(n - 1, 1)) for n in counts]
                    position = position + factor * shift.tanh() * torch.tensor(half, dtype=x.dtype)
            at.append(position)
            sampled.append(bilinear(x[..., channels], *position))
        keys.append(torch.cat(sampled))
        places.append(at)
    k, v = (linear(state, name, torch.stack(keys)) for name in ("proj_k", "proj_v"))
    out = []
    for row, col in product(*map(range, sides)):
        axis = "centres" if kind == "centres" else "paper"
        here = positions(axis, (row, col), sides)
        heads = []
        for head in range(HEADS):
            mine = slice(head * SIZE, (head + 1) * SIZE)
            scores = k[:, mine] @ q[row, col, mine] / math.sqrt(SIZE)
            if biased:
                table = state["rpe_table"][head][..., None]
                away = [(here - at[head // per_group]) / 2 for at in places]
                scores = scores + torch.cat([bilinear(table, *displacement) for displacement in away])
            heads.append(torch.softmax(scores, 0) @ v[:, mine])
        out.append(torch.cat(heads))
    return linear(state, "proj_out", torch.stack(out).view_as(x))


# Quadtree


def quadtree_shapes(levels: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """The authors' layout of the vision backbone. Branches are from fine to coarse, get_vs from coarse to fine."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": (DIM, DIM, 1, 1) for name in "qkv"}
    shapes |= {f"{name}_proj.bias": (DIM,) for name in "qkv"} if bias else {}
    shapes |= {"proj.weight": (DIM, DIM), "proj.bias": (DIM,), "py_att.weight": (levels,)}
    for level in range(levels):
        shapes |= {f"py_att.get_vs.{level}.weight": (DIM, 1, 3, 3), f"py_att.get_vs.{level}.bias": (DIM,)}
    for branch in range(levels - 1):
        for layer, shape in ((0, (DIM,)), (2, (DIM, DIM, 2, 2)), (3, (DIM,)), (5, (DIM, DIM, 1, 1))):
            shapes |= {f"value_branchs.{branch}.{layer}.weight": shape, f"value_branchs.{branch}.{layer}.bias": (DIM,)}
    return shapes


def quadtree_from(state: State, learned: bool = True, lepe: bool = True) -> State:
    mapped = {name: state[name] for name in ("proj.weight", "proj.bias")}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            parts = torch.cat([state[f"{name}_proj.{kind}"] for name in "qkv"])
            mapped[f"qkv.{kind}"] = parts[..., 0, 0] if kind == "weight" else parts
    if len(state["py_att.weight"]) > 1:
        mapped["weight"] = state["py_att.weight"]
    names = {"0": "norm1", "2": "reduce", "3": "norm2", "5": "mix"}
    for name, value in state.items():
        first, *rest = name.split(".")
        if learned and first == "value_branchs":
            mapped[f"value_pools.{rest[0]}.{names[rest[1]]}.{rest[2]}"] = value
        if lepe and rest[:1] == ["get_vs"]:
            mapped[".".join(["lepe", *rest[1:]])] = value
    return mapped


def averages(values: Tensor, cell: int) -> Tensor:
    """Over squares of cell x cell tokens, of those that are there."""
    rows = [values[top : top + cell] for top in range(0, values.shape[0], cell)]
    return torch.stack(
        [torch.stack([row[:, i : i + cell].mean((0, 1)) for i in range(0, row.shape[1], cell)]) for row in rows]
    )


def pooled_values(state: State, branch: int, v: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The next coarser level's values: every 2 x 2 square of those that are there."""
    name = f"value_branchs.{branch}"
    v = activation(normed(state, f"{name}.0", v))
    rows = []
    for top in range(0, v.shape[0], 2):
        row = []
        for left in range(0, v.shape[1], 2):
            out = state[f"{name}.2.bias"]
            for dy, dx in product(range(2), repeat=2):
                if top + dy < v.shape[0] and left + dx < v.shape[1]:
                    out = out + state[f"{name}.2.weight"][:, :, dy, dx] @ v[top + dy, left + dx]
            row.append(out)
        rows.append(torch.stack(row))
    return linear(state, f"{name}.5", activation(normed(state, f"{name}.3", torch.stack(rows))))


def quadtree_oracle(
    state: State,
    x: Tensor,
    *,
    topk: int,
    levels: int,
    coarsest_topk: int | None = None,
    learned: bool = True,
    lepe: bool = True,
    activation: Callable[[Tensor], Tensor] = gelu,
) -> Tensor:
    """Head by head and token by token, on row-major grids of one image, from the coarsest level to the finest."""
    q, k, v = (linear(state, f"{name}_proj", x) for name in "qkv")
    values = [v]
    for branch in range(levels - 1):
        values.append(
            pooled_values(state, branch, values[-1], activation) if learned else averages(v, 2 ** (branch + 1))
        )
    kept = len(state["py_att.weight"]) - levels
    weight = torch.softmax(state["py_att.weight"][kept:], 0)
    out = torch.zeros_like(x)
    looked_at: dict[tuple[int, int, int], list[Place]] = {}
    for level in range(levels):
        cell = 2 ** (levels - 1 - level)
        a, b, c = averages(q, cell), averages(k, cell), values[levels - 1 - level]
        places = list(product(range(a.shape[0]), range(a.shape[1])))
        looking = {}
        for (y, z), head in product(places, range(HEADS)):
            part = slice(head * SIZE, (head + 1) * SIZE)
            keys = places
            if level:
                parents = looked_at[y // 2, z // 2, head]
                children = ((2 * i + di, 2 * j + dj) for i, j in parents for di, dj in product((0, 1), (0, 1)))
                keys = [key for key in children if key in places]
            scores = torch.stack([a[y, z, part] @ b[key][part] for key in keys]) / math.sqrt(SIZE)
            message = torch.softmax(scores, 0) @ torch.stack([c[key][part] for key in keys])
            if lepe:
                message = message + depthwise(state, f"py_att.get_vs.{kept + level}", c, y, z)[part]
            out[y * cell : (y + 1) * cell, z * cell : (z + 1) * cell, part] += weight[level] * message
            kept_keys = topk if level or coarsest_topk is None else coarsest_topk
            looking[y, z, head] = [keys[i] for i in scores.argsort(descending=True)[:kept_keys].tolist()]
        looked_at = looking
    return linear(state, "proj", out)
