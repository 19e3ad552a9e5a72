"""The Triton kernels of BRA: routing, attention and LePE, forward and backward. Only ``triton_ops`` imports them.

A grid (b, h, w, d) is flat over its tokens: consecutive tokens are ``pitch`` elements apart, so slices of one
projection need no copy. A region is a rectangle of HEIGHT x WIDTH tokens; an image has SIDE x SIDE regions. Shapes
that determine the code are ``constexpr``: divisions by them become multiplications.

A list of visits (the regions that a query region reads; the queries that read a key region) is processed in tiles of
BLOCK tokens. If PACKED, the tokens of all visits are consecutive, so tiles are full even for small regions. Otherwise
every visit starts a new tile, and a tile has one region.

Shape legend: b batch, p regions, k routed regions, n tokens of all images, m heads, E and C channels of a head.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _visit(visits, count, tile, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """For each column of a tile: the entry and index of its visit, the token within a region, whether it exists."""
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
    """Head, tile, region and image of this program. Heads are consecutive, since they share cache lines."""
    program = tl.program_id(0)
    rest = program // HEADS
    return program % HEADS, rest % TILES, rest // TILES % REGIONS, (rest // (TILES * REGIONS)).to(tl.int64)


@triton.jit
@no_type_check
def _channels(place, pitch, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr):
    """Offsets and mask of the channels of a head, for each token of a tile."""
    channel = tl.arange(0, BLOCK_D)
    if LONG:
        place = place.to(tl.int64)
    offset = place[:, None] * pitch + channel[None, :]
    if D == BLOCK_D:
        return offset, inside[:, None]
    else:
        return offset, inside[:, None] & (channel < D)[None, :]


@triton.jit
@no_type_check
def _load(
    base, place, pitch, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    offset, mask = _channels(place, pitch, inside, D, BLOCK_D, LONG)
    if FULL and D == BLOCK_D:
        return tl.load(base + offset)
    else:
        return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store(base, place, pitch, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr):
    offset, mask = _channels(place, pitch, inside, D, BLOCK_D, LONG)
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def attend_forward(
    q, k, v, routes, factor, valid, out, lse, q_pitch, k_pitch, v_pitch, topk, tokens, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Output and base-2 log-sum-exp (m, n) of one tile of a region's queries, for one head."""
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    head, tile, region, image = _program(HEADS, (Q_TOKENS + BLOCK_M - 1) // BLOCK_M, REGIONS)
    ALL_QUERIES: tl.constexpr = Q_TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = K_TOKENS % BLOCK_N == 0 and not PACKED
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query_in = token < Q_TOKENS
    query = _place(region, token, SIDE, Q_HEIGHT, Q_WIDTH)
    first = image * (REGIONS * Q_TOKENS)
    query_tile = _load(q + first * q_pitch + head * E, query, q_pitch, query_in, E, BLOCK_E, LONG, ALL_QUERIES)
    list_start = (image * REGIONS + region) * topk
    k += image * (REGIONS * K_TOKENS) * k_pitch + head * E
    v += image * (REGIONS * K_TOKENS) * v_pitch + head * C
    top = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for at in range(0, _tiles(topk, K_TOKENS, BLOCK_N, PACKED)):
        source, visit, key, inside = _visit(routes + list_start, topk, at, K_TOKENS, BLOCK_N, PACKED)
        place = _place(source, key, SIDE, K_HEIGHT, K_WIDTH)
        key_tile = _load(k, place, k_pitch, inside, E, BLOCK_E, LONG, ALL_KEYS)
        score = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        if factor is not None:
            gate = tl.load(factor + list_start + visit, mask=visit < topk, other=0.0)
            score *= gate[None, :] if PACKED else gate
        if valid is not None:
            seen = inside & (tl.load(valid + place, mask=inside, other=0) != 0)
            score = tl.where(seen[None, :], score, float("-inf"))
        elif not ALL_KEYS:
            score = tl.where(inside[None, :], score, float("-inf"))
        # The scale is positive, so it can be applied after the maximum, which saves a product per score.
        higher = tl.maximum(top, tl.max(score, 1) * scale_log2)
        share = tl.exp2(score * scale_log2 - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(share, 1)
        if factor is not None:
            share *= gate[None, :] if PACKED else gate
        value_tile = _load(v, place, v_pitch, inside, C, BLOCK_C, LONG, ALL_KEYS)
        mixed = tl.dot(share.to(value_tile.dtype), value_tile, mixed * fade[:, None], input_precision=PRECISION)
        top = higher
    result = mixed / total[:, None]
    _store(out + first * (HEADS * C) + head * C, query, HEADS * C, query_in, result, C, BLOCK_C, LONG)
    tl.store(lse + head.to(tl.int64) * tokens + first + query, top + tl.log2(total), mask=query_in)


@triton.jit
@no_type_check
def _invert(
    routes, visitors, starts, slots, first_slots, region, image, entries, shared,
    REGIONS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For one key region of one image, the positions in ``routes`` (p * k, flat) that hold it, in ascending order.

    They are written from index ``starts`` of the region, the number of positions that hold an earlier region. A region
    with more than CHUNK positions takes a slot for every CHUNK: ``slots`` (b, shared) holds the region of each slot, -1
    if unused, and ``first_slots`` (b, p) the first slot of each region.
    """
    routes += image * entries
    visitors += image * entries
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, entries, BLOCK):
        position = at + tl.arange(0, BLOCK)
        # Positions beyond the end count for a bin outside the regions.
        held = tl.load(routes + position, mask=position < entries, other=REGIONS).to(tl.int32)
        counts += tl.histogram(held, BINS)
    counts = tl.where(bins < REGIONS, counts, 0)
    chunks = tl.where(counts > CHUNK, (counts + CHUNK - 1) // CHUNK, 0)
    before = tl.sum(tl.where(bins < region, counts, 0), 0)
    own = tl.sum(tl.where(bins == region, chunks, 0), 0)
    slot = tl.sum(tl.where(bins < region, chunks, 0), 0)
    tl.store(starts + image * (REGIONS + 1) + region, before)
    tl.store(first_slots + image * REGIONS + region, slot)
    for at in range(0, own):
        tl.store(slots + image * shared + slot + at, region)
    if region == REGIONS - 1:
        tl.store(starts + image * (REGIONS + 1) + REGIONS, entries)
        for at in range(slot + own, shared):
            tl.store(slots + image * shared + at, -1)
    for at in range(0, entries, BLOCK):
        position = at + tl.arange(0, BLOCK)
        held = tl.load(routes + position, mask=position < entries, other=REGIONS)
        hit = (held == region).to(tl.int32)
        tl.store(visitors + before + tl.cumsum(hit, 0) - 1, position, mask=hit != 0)
        before += tl.sum(hit, 0)


@triton.jit
@no_type_check
def attend_backward_queries(
    q, k, v, routes, factor, valid, out, lse, grad, dq, delta, dfactor, visitors, starts, slots, first_slots, q_pitch,
    k_pitch, v_pitch, grad_pitch, dq_pitch, topk, tokens, shared, scale, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of a region's queries, for one head, and rowsum(output x its gradient), ``delta`` (m, n).

    With factors, also the tile's part of their gradient, (b, p, k, key tiles, query tiles, m); PACKED is then false.
    The first program of a region inverts the routes for ``attend_backward_keys``, which saves a launch.
    """
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    Q_TILES: tl.constexpr = (Q_TOKENS + BLOCK_M - 1) // BLOCK_M
    head, tile, region, image = _program(HEADS, Q_TILES, REGIONS)
    if head + tile == 0:
        _invert(
            routes, visitors, starts, slots, first_slots, region, image, REGIONS * topk, shared,
            REGIONS, BINS, BLOCK, CHUNK,
        )  # fmt: skip
    ALL_QUERIES: tl.constexpr = Q_TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = K_TOKENS % BLOCK_N == 0 and not PACKED
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query_in = token < Q_TOKENS
    query = _place(region, token, SIDE, Q_HEIGHT, Q_WIDTH)
    first = image * (REGIONS * Q_TOKENS)
    row = head.to(tl.int64) * tokens + first + query
    query_tile = _load(q + first * q_pitch + head * E, query, q_pitch, query_in, E, BLOCK_E, LONG, ALL_QUERIES)
    grad_tile = _load(grad + first * grad_pitch + head * C, query, grad_pitch, query_in, C, BLOCK_C, LONG, ALL_QUERIES)
    out_tile = _load(out + first * (HEADS * C) + head * C, query, HEADS * C, query_in, C, BLOCK_C, LONG, ALL_QUERIES)
    own = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + row, own, mask=query_in)
    # Infinite where there is no query, so that its shares are zero.
    norm = tl.load(lse + row, mask=query_in, other=float("inf"))
    list_start = (image * REGIONS + region) * topk
    k += image * (REGIONS * K_TOKENS) * k_pitch + head * E
    v += image * (REGIONS * K_TOKENS) * v_pitch + head * C
    result = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    count = _tiles(topk, K_TOKENS, BLOCK_N, PACKED)
    for at in range(0, count):
        source, visit, key, inside = _visit(routes + list_start, topk, at, K_TOKENS, BLOCK_N, PACKED)
        place = _place(source, key, SIDE, K_HEIGHT, K_WIDTH)
        seen = inside
        if valid is not None:
            seen = inside & (tl.load(valid + place, mask=inside, other=0) != 0)
        key_tile = _load(k, place, k_pitch, inside, E, BLOCK_E, LONG, ALL_KEYS)
        value_tile = _load(v, place, v_pitch, inside, C, BLOCK_C, LONG, ALL_KEYS)
        product = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        dshare = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)
        if factor is not None:
            gate = tl.load(factor + list_start + visit)
            share = tl.exp2(product * (scale_log2 * gate) - norm[:, None])
            if valid is not None or not ALL_KEYS:
                share = tl.where(seen[None, :], share, 0.0)
            dscore = share * (dshare * gate - own[:, None])
            part = tl.sum(tl.sum(dscore * product * scale + share * dshare, 1), 0)
            tl.store(
                dfactor + ((image * REGIONS + region) * count + at) * (Q_TILES * HEADS) + tile * HEADS + head, part
            )
            dscore *= gate
        else:
            share = tl.exp2(product * scale_log2 - norm[:, None])
            if valid is not None or not ALL_KEYS:
                share = tl.where(seen[None, :], share, 0.0)
            dscore = share * (dshare - own[:, None])
        result = tl.dot(dscore.to(key_tile.dtype), key_tile, result, input_precision=PRECISION)
    _store(dq + first * dq_pitch + head * E, query, dq_pitch, query_in, result * scale, E, BLOCK_E, LONG)


@triton.jit
@no_type_check
def attend_backward_keys(
    q, k, v, visitors, starts, slots, first_slots, factor, valid, lse, grad, delta, dk, dv, parts, q_pitch, k_pitch,
    v_pitch, grad_pitch, dk_pitch, dv_pitch, topk, tokens, shared, scale, scale_log2,
    HEADS: tl.constexpr, SIDE: tl.constexpr, Q_HEIGHT: tl.constexpr, Q_WIDTH: tl.constexpr, K_HEIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a region's keys and values, for one head, from at most CHUNK of its visits.

    The first REGIONS units of an image are regions; those with at most CHUNK visits are completed here. Each of the
    following ``shared`` units is a slot: up to CHUNK visits of a region that has more. A slot's partial gradients are
    stored in ``parts`` (b, slots, key tokens, channels of k then of v), in fp32.
    """
    REGIONS: tl.constexpr = SIDE * SIDE
    Q_TOKENS: tl.constexpr = Q_HEIGHT * Q_WIDTH
    K_TOKENS: tl.constexpr = K_HEIGHT * K_WIDTH
    TILES: tl.constexpr = (K_TOKENS + BLOCK_N - 1) // BLOCK_N
    ALL_QUERIES: tl.constexpr = Q_TOKENS % BLOCK_M == 0 and not PACKED
    ALL_KEYS: tl.constexpr = K_TOKENS % BLOCK_N == 0
    program = tl.program_id(0)
    head, tile, unit = program % HEADS, program // HEADS % TILES, program // (HEADS * TILES) % (REGIONS + shared)
    image = (program // (HEADS * TILES) // (REGIONS + shared)).to(tl.int64)
    region = unit
    slot = unit - REGIONS
    if unit >= REGIONS:
        region = tl.load(slots + image * shared + slot)
    # The region of an unused slot is -1.
    if region < 0:
        return
    first = tl.load(starts + image * (REGIONS + 1) + region)
    count = tl.load(starts + image * (REGIONS + 1) + region + 1) - first
    if unit < REGIONS:
        if count > CHUNK:
            return
    else:
        earlier = slot - tl.load(first_slots + image * REGIONS + region)
        first += earlier * CHUNK
        count = tl.minimum(count - earlier * CHUNK, CHUNK)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_in = token < K_TOKENS
    key = _place(region, token, SIDE, K_HEIGHT, K_WIDTH)
    keys_start = image * (REGIONS * K_TOKENS)
    key_tile = _load(k + keys_start * k_pitch + head * E, key, k_pitch, key_in, E, BLOCK_E, LONG, ALL_KEYS)
    value_tile = _load(v + keys_start * v_pitch + head * C, key, v_pitch, key_in, C, BLOCK_C, LONG, ALL_KEYS)
    seen = key_in
    if valid is not None:
        seen = key_in & (tl.load(valid + key, mask=key_in, other=0) != 0)
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
        query_tile = _load(q, query, q_pitch, inside, E, BLOCK_E, LONG, ALL_QUERIES)
        grad_tile = _load(grad, query, grad_pitch, inside, C, BLOCK_C, LONG, ALL_QUERIES)
        # Infinite where there is no query, so that its shares are zero.
        norm = tl.load(lse + query, mask=inside, other=float("inf"))
        own = tl.load(delta + query, mask=inside, other=0.0)
        score = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION) * scale_log2
        dshare = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)
        if factor is not None:
            gate = tl.load(factor + routes_start + visitor)
            gate = gate[None, :] if PACKED else gate
            score *= gate
            dshare *= gate
        share = tl.exp2(score - norm[None, :])
        if valid is not None or not ALL_KEYS:
            share = tl.where(seen[:, None], share, 0.0)
        dscore = share * (dshare - own[None, :])
        if factor is not None:
            share *= gate
            dscore *= gate
        found_v = tl.dot(share.to(grad_tile.dtype), grad_tile, found_v, input_precision=PRECISION)
        found_k = tl.dot(dscore.to(query_tile.dtype), query_tile, found_k, input_precision=PRECISION)
    if unit < REGIONS:
        dk += keys_start * dk_pitch + head * E
        dv += keys_start * dv_pitch + head * C
        _store(dk, key, dk_pitch, key_in, found_k * scale, E, BLOCK_E, LONG)
        _store(dv, key, dv_pitch, key_in, found_v, C, BLOCK_C, LONG)
    else:
        WIDE: tl.constexpr = HEADS * (E + C)
        parts += (image * shared + slot) * (K_TOKENS * WIDE)
        _store(parts + head * E, token, WIDE, key_in, found_k * scale, E, BLOCK_E, LONG)
        _store(parts + HEADS * E + head * C, token, WIDE, key_in, found_v, C, BLOCK_C, LONG)


@triton.jit
@no_type_check
def _tap(token, row, column, dy, dx, real, GRID_H: tl.constexpr, GRID_W: tl.constexpr):
    """The index of a token's neighbour, and whether the neighbour is within the grid."""
    inside = (row + dy >= 0) & (row + dy < GRID_H) & (column + dx >= 0) & (column + dx < GRID_W)
    return token + (dy * GRID_W + dx), inside & real


@triton.jit
@no_type_check
def add_depthwise(
    x, taps, bias, base, out, x_pitch, base_pitch, out_pitch, channels, tokens,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, KERNEL: tl.constexpr, LONG: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``base`` plus a depthwise convolution of ``x`` (n, d) by ``taps`` (KERNEL * KERNEL, d); in place or not."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real, known = token < tokens, channel < channels
    row, column = token // GRID_W % GRID_H, token % GRID_W
    if LONG:
        token = token.to(tl.int64)
    within = real[:, None] & known[None, :]
    total = tl.load(base + token[:, None] * base_pitch + channel[None, :], mask=within, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(0, KERNEL * KERNEL):
        dy, dx = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
        place, inside = _tap(token, row, column, dy, dx, real, GRID_H, GRID_W)
        mask = inside[:, None] & known[None, :]
        tile = tl.load(x + place[:, None] * x_pitch + channel[None, :], mask=mask, other=0.0)
        factor = tl.load(taps + tap * channels + channel, mask=known, other=0.0)
        total += tile.to(tl.float32) * factor.to(tl.float32)[None, :]
    tl.store(out + token[:, None] * out_pitch + channel[None, :], total.to(out.dtype.element_ty), mask=within)


@triton.jit
@no_type_check
def _sum_parts(
    parts, starts, first_slots, token, row, column, real, channel, known, shared,
    SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For tokens of regions with more than CHUNK visits, the sum of the slots' parts, in order; the tokens' mask."""
    REGIONS: tl.constexpr = SIDE * SIDE
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    image = (token // (REGIONS * TOKENS)).to(tl.int64)
    region = row // HEIGHT * SIDE + column // WIDTH
    at = starts + image * (REGIONS + 1) + region
    count = tl.load(at + 1, mask=real, other=0) - tl.load(at, mask=real, other=0)
    split = count > CHUNK
    chunks = tl.where(split, (count + CHUNK - 1) // CHUNK, 0)
    slot = image * shared + tl.load(first_slots + image * REGIONS + region, mask=split, other=0)
    parts += (slot * TOKENS + row % HEIGHT * WIDTH + column % WIDTH)[:, None] * WIDE + channel[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for part in range(0, tl.max(chunks, 0)):
        total += tl.load(parts, mask=(part < chunks)[:, None] & known[None, :], other=0.0)
        parts += TOKENS * WIDE
    return total, split


@triton.jit
@no_type_check
def finish_keys(
    parts, starts, first_slots, dk, dv, v, grad, taps, weight_parts, dk_pitch, dv_pitch, v_pitch, grad_pitch, shared,
    tokens, steps,
    SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, KERNEL: tl.constexpr, LONG: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Complete the gradients of keys and values after ``attend_backward_keys``, for ``steps`` x BLOCK_T tokens.

    If SPLIT, regions of more than CHUNK visits get the sum of their ``parts``. With ``taps`` (KERNEL * KERNEL, d),
    LePE's gradient, a transposed convolution, is added to that of values, and ``weight_parts`` (programs,
    (KERNEL * KERNEL + 1) * d) gets these tokens' contribution to the gradients of LePE's weight (d, KERNEL, KERNEL) and
    bias. Both read the same neighbours.
    The programs of the second axis are blocks of BLOCK_D channels of the values and then, if SPLIT, of the keys.
    """
    GRID_H: tl.constexpr = SIDE * HEIGHT
    GRID_W: tl.constexpr = SIDE * WIDTH
    FIELD: tl.constexpr = KERNEL * KERNEL
    VALUES: tl.constexpr = (C + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(1)
    first = tl.program_id(0) * (steps * BLOCK_T)
    if block >= VALUES:
        channel = (block - VALUES) * BLOCK_D + tl.arange(0, BLOCK_D)
        known = channel < E
        for step in range(0, steps):
            token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
            total, split = _sum_parts(
                parts, starts, first_slots, token, token // GRID_W % GRID_H, token % GRID_W, token < tokens, channel,
                known, shared, SIDE, HEIGHT, WIDTH, E + C, CHUNK, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            if LONG:
                token = token.to(tl.int64)
            at = dk + token[:, None] * dk_pitch + channel[None, :]
            tl.store(at, total.to(dk.dtype.element_ty), mask=split[:, None] & known[None, :])
    else:
        channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
        known = channel < C
        tap_of = tl.arange(0, BLOCK_F)[:, None]
        sums = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        for step in range(0, steps):
            token = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
            real = token < tokens
            row, column = token // GRID_W % GRID_H, token % GRID_W
            written = real
            if SPLIT:
                total, split = _sum_parts(
                    parts, starts, first_slots, token, row, column, real, E + channel, known, shared,
                    SIDE, HEIGHT, WIDTH, E + C, CHUNK, BLOCK_T, BLOCK_D,
                )  # fmt: skip
                written = split
            if LONG:
                token = token.to(tl.int64)
            at = dv + token[:, None] * dv_pitch + channel[None, :]
            if taps is not None:
                within = real[:, None] & known[None, :]
                if SPLIT:
                    total += tl.load(at, mask=within & (split == 0)[:, None], other=0.0).to(tl.float32)
                else:
                    total = tl.load(at, mask=within, other=0.0).to(tl.float32)
                value = tl.load(v + token[:, None] * v_pitch + channel[None, :], mask=within, other=0.0).to(tl.float32)
                for tap in tl.static_range(0, FIELD):
                    dy, dx = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
                    place, inside = _tap(token, row, column, -dy, -dx, real, GRID_H, GRID_W)
                    mask = inside[:, None] & known[None, :]
                    slope = tl.load(grad + place[:, None] * grad_pitch + channel[None, :], mask=mask, other=0.0)
                    slope = slope.to(tl.float32)
                    factor = tl.load(taps + tap * C + channel, mask=known, other=0.0)
                    total += slope * factor.to(tl.float32)[None, :]
                    sums += tl.where(tap_of == tap, tl.sum(slope * value, 0)[None, :], 0.0)
                    if tap == FIELD // 2:
                        # The centre tap reads the token itself: its gradient is summed for the bias.
                        sums += tl.where(tap_of == FIELD, tl.sum(slope, 0)[None, :], 0.0)
                written = real
            tl.store(at, total.to(dv.dtype.element_ty), mask=written[:, None] & known[None, :])
        if taps is not None:
            at = tl.where(tap_of < FIELD, channel[None, :] * FIELD + tap_of, FIELD * C + channel[None, :])
            at += tl.program_id(0) * ((FIELD + 1) * C)
            tl.store(weight_parts + at, sums, mask=(tap_of <= FIELD) & known[None, :])


@triton.jit
@no_type_check
def sum_columns(
    x, sums, pitch, channels, tokens, steps, LONG: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sum ``steps`` x BLOCK_T rows of ``x`` (n, d) into one row of ``sums`` (programs, d)."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    known = channel < channels
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for step in range(0, steps):
        token = (tl.program_id(0) * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (token < tokens)[:, None] & known[None, :]
        if LONG:
            token = token.to(tl.int64)
        total += tl.load(x + token[:, None] * pitch + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + tl.program_id(0) * channels + channel, result, mask=known)


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
    """For one query region, the TOPK key regions of highest score, best first, and the softmax over their scores.

    ``pooled`` is (b, p, 2 x channels): descriptors of queries, then of keys. Ties go to the first region.
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
    score = tl.where((key < REGIONS) & (score == score), score * scale, float("-inf"))
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int64)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for place in range(0, TOPK):
        # A NaN score must not select a region outside the grid.
        winner = tl.minimum(tl.argmax(score, 0), REGIONS - 1)
        chosen = tl.where(slot == place, winner.to(tl.int64), chosen)
        best = tl.where(slot == place, tl.max(score, 0), best)
        score = tl.where(key == winner, float("-inf"), score)
    share = tl.exp(best - tl.max(best, 0))
    at = (image * REGIONS + region) * TOPK + slot
    tl.store(index + at, chosen, mask=slot < TOPK)
    tl.store(strength + at, share / tl.sum(share, 0), mask=slot < TOPK)
