"""The Triton kernels of BRA: routing, attention forward, and its backward. Only ``triton_ops`` imports them.

A grid is (b, h, w, d) and flat over its tokens: token n of channel d lies ``pitch`` elements after token n - 1, so
the slices of one projection need no copy. A region is a rectangle of HEIGHT x WIDTH tokens, SIDE x SIDE of them to
an image. Shapes that decide the code are ``constexpr``: divisions by them become multiplications.

A list of visits (which regions a region of queries reads; which queries read a region of keys) is walked in tiles
of BLOCK tokens. PACKED, the tokens of all visits follow one another, so that tiles are full however small the regions;
else every visit begins a tile of its own, and the tile has one region.

Shape legend: b batch, p regions, k routed regions, n tokens of all images, m heads, E and C channels of a head.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _visit(visits, count, tile, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Of each column of a tile: what its visit says, the visit's number, the token within a region, whether it is."""
    if PACKED:
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < count * TOKENS
        visit = at // TOKENS
        return tl.load(visits + visit, mask=inside, other=0).to(tl.int32), visit, at % TOKENS, inside
    else:
        per_visit: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
        visit = tile // per_visit
        token = tile % per_visit * BLOCK + tl.arange(0, BLOCK)
        return tl.load(visits + visit).to(tl.int32), visit, token, token < TOKENS


@triton.jit
@no_type_check
def _tiles(count, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """How many tiles ``count`` visits take."""
    if PACKED:
        return (count * TOKENS + BLOCK - 1) // BLOCK
    else:
        return count * ((TOKENS + BLOCK - 1) // BLOCK)


@triton.jit
@no_type_check
def _place(region, token, SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The index of a region's token in its image."""
    row = region // SIDE * HEIGHT + token // WIDTH
    return row * (SIDE * WIDTH) + region % SIDE * WIDTH + token % WIDTH


@triton.jit
@no_type_check
def _program(HEADS: tl.constexpr, TILES: tl.constexpr, REGIONS: tl.constexpr):
    """Head, tile, region and image of this program. Heads follow one another: they share the lines of the cache."""
    program = tl.program_id(0)
    rest = program // HEADS
    return program % HEADS, rest % TILES, rest // TILES % REGIONS, (rest // (TILES * REGIONS)).to(tl.int64)


@triton.jit
@no_type_check
def _channels(place, pitch, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of the channels of a head, for each token of a tile."""
    channel = tl.arange(0, BLOCK_D)
    # 64 bits: a batch of large images has more than 2 ** 31 elements.
    offset = place.to(tl.int64)[:, None] * pitch + channel[None, :]
    if D == BLOCK_D:
        return offset, inside[:, None]
    else:
        return offset, inside[:, None] & (channel < D)[None, :]


@triton.jit
@no_type_check
def _load(base, place, pitch, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offset, mask = _channels(place, pitch, inside, D, BLOCK_D)
    return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store(base, place, pitch, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offset, mask = _channels(place, pitch, inside, D, BLOCK_D)
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def attend_forward(
    q, k, v, routes, factor, valid, out, lse, q_pitch, k_pitch, v_pitch, topk, tokens, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and base-2 log-sum-exp (m, n) of one tile of a region's queries, for one head."""
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    head, tile, region, image = _program(HEADS, (Q_TOKENS + BLOCK_M - 1) // BLOCK_M, REGIONS)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query_in = token < Q_TOKENS
    query = image * (REGIONS * Q_TOKENS) + _place(region, token, SIDE, Q_HEIGHT, Q_WIDTH)
    query_tile = _load(q + head * E, query, q_pitch, query_in, E, BLOCK_E)
    list_start = (image * REGIONS + region) * topk
    k += image * (REGIONS * K_TOKENS) * k_pitch + head * E
    v += image * (REGIONS * K_TOKENS) * v_pitch + head * C
    top = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for at in range(0, _tiles(topk, K_TOKENS, BLOCK_N, PACKED)):
        source, visit, key, inside = _visit(routes + list_start, topk, at, K_TOKENS, BLOCK_N, PACKED)
        place = _place(source, key, SIDE, K_HEIGHT, K_WIDTH)
        key_tile = _load(k, place, k_pitch, inside, E, BLOCK_E)
        score = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * scale_log2
        if factor is not None:
            gate = tl.load(factor + list_start + visit, mask=visit < topk, other=0.0)
            score *= gate[None, :] if PACKED else gate
        seen = inside
        if valid is not None:
            seen = inside & (tl.load(valid + place, mask=inside, other=0) != 0)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(share, 1)
        if factor is not None:
            share *= gate[None, :] if PACKED else gate
        value_tile = _load(v, place, v_pitch, inside, C, BLOCK_C)
        mixed = tl.dot(share.to(value_tile.dtype), value_tile, mixed * fade[:, None], input_precision=PRECISION)
        top = higher
    _store(out + head * C, query, HEADS * C, query_in, mixed / total[:, None], C, BLOCK_C)
    tl.store(lse + head.to(tl.int64) * tokens + query, top + tl.log2(total), mask=query_in)


@triton.jit
@no_type_check
def attend_backward_queries(
    q, k, v, routes, factor, valid, out, lse, grad, dq, delta, dfactor, q_pitch, k_pitch, v_pitch, grad_pitch, topk,
    tokens, scale, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of a region's queries, for one head, and rowsum(output x its gradient), ``delta`` (m, n).

    With factors, also the tile's part of their gradient, (b, p, k, key tiles, query tiles, m): then never PACKED.
    """
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    Q_TILES: tl.constexpr = (Q_TOKENS + BLOCK_M - 1) // BLOCK_M
    head, tile, region, image = _program(HEADS, Q_TILES, REGIONS)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query_in = token < Q_TOKENS
    query = image * (REGIONS * Q_TOKENS) + _place(region, token, SIDE, Q_HEIGHT, Q_WIDTH)
    row = head.to(tl.int64) * tokens + query
    query_tile = _load(q + head * E, query, q_pitch, query_in, E, BLOCK_E)
    grad_tile = _load(grad + head * C, query, grad_pitch, query_in, C, BLOCK_C)
    out_tile = _load(out + head * C, query, HEADS * C, query_in, C, BLOCK_C)
    own = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, own, mask=query_in)
    # Infinite where there is no query: its shares are then zero.
    norm = tl.load(lse + row, mask=query_in, other=float("inf"))
    list_start = (image * REGIONS + region) * topk
    k += image * (REGIONS * K_TOKENS) * k_pitch + head * E
    v += image * (REGIONS * K_TOKENS) * v_pitch + head * C
    found = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    count = _tiles(topk, K_TOKENS, BLOCK_N, PACKED)
    for at in range(0, count):
        source, visit, key, inside = _visit(routes + list_start, topk, at, K_TOKENS, BLOCK_N, PACKED)
        place = _place(source, key, SIDE, K_HEIGHT, K_WIDTH)
        seen = inside
        if valid is not None:
            seen = inside & (tl.load(valid + place, mask=inside, other=0) != 0)
        key_tile = _load(k, place, k_pitch, inside, E, BLOCK_E)
        value_tile = _load(v, place, v_pitch, inside, C, BLOCK_C)
        product = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        dshare = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)
        if factor is not None:
            gate = tl.load(factor + list_start + visit)
            share = tl.exp2(product * (scale_log2 * gate) - norm[:, None])
            share = tl.where(seen[None, :], share, 0.0)
            dscore = share * (dshare * gate - own[:, None])
            part = tl.sum(tl.sum(dscore * product * scale + share * dshare, 1), 0)
            tl.store(
                dfactor + ((image * REGIONS + region) * count + at) * (Q_TILES * HEADS) + tile * HEADS + head, part
            )
            dscore *= gate
        else:
            share = tl.exp2(product * scale_log2 - norm[:, None])
            share = tl.where(seen[None, :], share, 0.0)
            dscore = share * (dshare - own[:, None])
        found = tl.dot(dscore.to(key_tile.dtype), key_tile, found, input_precision=PRECISION)
    _store(dq + head * E, query, HEADS * E, query_in, found * scale, E, BLOCK_E)


@triton.jit
@no_type_check
def attend_backward_keys(
    q, k, v, visitors, starts, factor, valid, lse, grad, delta, dk, dv, q_pitch, k_pitch, v_pitch, grad_pitch, topk,
    tokens, scale, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a region's keys and values, for one head, from all queries that were routed to it."""
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    head, tile, region, image = _program(HEADS, (K_TOKENS + BLOCK_N - 1) // BLOCK_N, REGIONS)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in = token < K_TOKENS
    place = _place(region, token, SIDE, K_HEIGHT, K_WIDTH)
    key = image * (REGIONS * K_TOKENS) + place
    key_tile = _load(k + head * E, key, k_pitch, key_in, E, BLOCK_E)
    value_tile = _load(v + head * C, key, v_pitch, key_in, C, BLOCK_C)
    seen = key_in
    if valid is not None:
        seen = key_in & (tl.load(valid + place, mask=key_in, other=0) != 0)
    first = tl.load(starts + image * (REGIONS + 1) + region)
    count = tl.load(starts + image * (REGIONS + 1) + region + 1) - first
    routes_start = image * REGIONS * topk
    image_start = image * (REGIONS * Q_TOKENS)
    q += image_start * q_pitch + head * E
    grad += image_start * grad_pitch + head * C
    lse += head.to(tl.int64) * tokens + image_start
    delta += head.to(tl.int64) * tokens + image_start
    found_k = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    found_v = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for at in range(0, _tiles(count, Q_TOKENS, BLOCK_M, PACKED)):
        visitor, _, query_token, inside = _visit(visitors + routes_start + first, count, at, Q_TOKENS, BLOCK_M, PACKED)
        query = _place(visitor // topk, query_token, SIDE, Q_HEIGHT, Q_WIDTH)
        query_tile = _load(q, query, q_pitch, inside, E, BLOCK_E)
        grad_tile = _load(grad, query, grad_pitch, inside, C, BLOCK_C)
        # Infinite where there is no query: its shares are then zero.
        norm = tl.load(lse + query, mask=inside, other=float("inf"))
        own = tl.load(delta + query, mask=inside, other=0.0)
        score = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION) * scale_log2
        dshare = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)
        if factor is not None:
            gate = tl.load(factor + routes_start + visitor)
            gate = gate[None, :] if PACKED else gate
            score *= gate
            dshare *= gate
        share = tl.where(seen[:, None], tl.exp2(score - norm[None, :]), 0.0)
        dscore = share * (dshare - own[None, :])
        if factor is not None:
            share *= gate
            dscore *= gate
        found_v = tl.dot(share.to(grad_tile.dtype), grad_tile, found_v, input_precision=PRECISION)
        found_k = tl.dot(dscore.to(query_tile.dtype), query_tile, found_k, input_precision=PRECISION)
    _store(dk + head * E, key, HEADS * E, key_in, found_k * scale, E, BLOCK_E)
    _store(dv + head * C, key, HEADS * C, key_in, found_v, C, BLOCK_C)


@triton.jit
@no_type_check
def invert_routes(routes, visitors, starts, entries, REGIONS: tl.constexpr, BLOCK: tl.constexpr):
    """For one key region of one image, the positions in ``routes`` (p * k, flat) that hold it, in ascending order.

    They are written at ``starts`` of the region, which is how many positions hold an earlier region.
    """
    region, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    routes += image * entries
    visitors += image * entries
    before = 0
    for at in range(0, entries, BLOCK):
        position = at + tl.arange(0, BLOCK)
        held = tl.load(routes + position, mask=position < entries, other=REGIONS)
        before += tl.sum((held < region).to(tl.int32), 0)
    tl.store(starts + image * (REGIONS + 1) + region, before)
    for at in range(0, entries, BLOCK):
        position = at + tl.arange(0, BLOCK)
        held = tl.load(routes + position, mask=position < entries, other=REGIONS)
        hit = (held == region).to(tl.int32)
        tl.store(visitors + before + tl.cumsum(hit, 0) - 1, position, mask=hit != 0)
        before += tl.sum(hit, 0)
    if region == REGIONS - 1:
        tl.store(starts + image * (REGIONS + 1) + REGIONS, before)


@triton.jit
@no_type_check
def pool_regions(
    x, pooled, pitch, channels,
    SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The mean over a region's tokens, in fp32, of a block of channels."""
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    region, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for at in range(0, TOKENS, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        place = image * (SIDE * SIDE * TOKENS) + _place(region, token, SIDE, HEIGHT, WIDTH)
        inside = (token < TOKENS)[:, None] & (channel < channels)[None, :]
        tile = tl.load(x + place[:, None] * pitch + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    at = (image * (SIDE * SIDE) + region) * channels + channel
    tl.store(pooled + at, total / TOKENS, mask=channel < channels)


@triton.jit
@no_type_check
def choose_routes(
    pooled, index, strength, channels, scale,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one query region, the TOPK key regions of highest score, best first, and the softmax over their scores.

    ``pooled`` is (b, p, 2 x channels): descriptors of queries, then of keys. Of equal scores the first region wins.
    """
    region, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = tl.arange(0, BLOCK_R)
    pooled += image * (REGIONS * 2) * channels
    score = tl.zeros([BLOCK_R], tl.float32)
    for at in range(0, channels, BLOCK_C):
        channel = at + tl.arange(0, BLOCK_C)
        known = channel < channels
        query = tl.load(pooled + region * 2 * channels + channel, mask=known, other=0.0)
        keys = pooled + key[:, None] * (2 * channels) + (channels + channel)[None, :]
        score += tl.sum(tl.load(keys, mask=(key < REGIONS)[:, None] & known[None, :], other=0.0) * query[None, :], 1)
    score = tl.where(key < REGIONS, score * scale, float("-inf"))
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int64)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for place in range(0, TOPK):
        # A score that is not a number must not lead outside of the grid.
        winner = tl.minimum(tl.argmax(score, 0), REGIONS - 1)
        chosen = tl.where(slot == place, winner.to(tl.int64), chosen)
        best = tl.where(slot == place, tl.max(score, 0), best)
        score = tl.where(key == winner, float("-inf"), score)
    share = tl.exp(best - tl.max(best, 0))
    at = (image * REGIONS + region) * TOPK + slot
    tl.store(index + at, chosen, mask=slot < TOPK)
    tl.store(strength + at, share / tl.sum(share, 0), mask=slot < TOPK)
