"""Decode: scores with keys on partitions, S^T = K q^T, up to what the exponential takes.

`w` is the launch's `State`, `z` its `Sizes`.
"""

from __future__ import annotations

from contributed._decode_state import DMA_ENGINES, KT_BANKS, MASKED, tile
from contributed._nki import nisa, nl

AHEAD = KT_BANKS - 1  # banks that are transposed before their products are taken


def transpose_queries(w):
    """q [rows, d] to q^T [d, rows], times the sign of the scale."""
    z = w.sizes
    n_rows, db = z.n_rows, z.db
    for i_block in range(z.n_blocks):
        nisa.nc_matmul(
            dst=w.t_ps[0:db, i_block * n_rows : (i_block + 1) * n_rows],
            stationary=w.q_sb[:, i_block * db : (i_block + 1) * db],
            moving=w.identity[0:n_rows, 0:n_rows],
            accumulate=False,
        )
    qt_ps = w.t_ps[0:db, 0 : z.n_blocks * n_rows]
    nisa.tensor_scalar(dst=w.qt_sb, data=qt_ps, op0=nl.multiply, operand0=w.q_sign)


def score_items(w, now, top, behind):
    """Scores of every lane's item, 128 keys per matmul, and their maxima by partition into `top`.

    Args:
        w: the launch's `State`.
        now: records of the items.
        top: [128, lanes, rows].
        behind: a `Skipping` of which a lane's exponentials are due before its scores are replaced, or None.
    """
    z = w.sizes
    if z.d_major:
        for lane in range(z.n_lanes):
            if behind != None:
                behind.exponentials(w, lane)
            # Tile t has key t of every granule, in the order of their partitions.
            keys = w.k_sb[lane].reshape_dim(2, (-1, DMA_ENGINES, z.tokens)).permute((0, 1, 4, 3, 2))
            score_columns(w, scores(w, lane), keys, z.tokens, lane_rows(w, lane))
            lane_maximum(w, lane, now, top)
        return
    # The transposes of a lane go on while the last products of the lane before it wait for theirs, and its maximum
    # waits until a few of them have left PSUM, but not until another lane takes its place there.
    n_turns = turns_of(w, z.tokens)
    lag = min(AHEAD, (z.slots - 1) * n_turns)
    for turn in range(z.n_lanes * n_turns + AHEAD + lag):
        if turn < z.n_lanes * n_turns:
            if w.gates != None:
                prepare_gates(w, turn, n_turns, behind)
            elif behind != None and turn % n_turns == 0:
                behind.exponentials(w, turn // n_turns)
            transpose_keys(w, w.k_sb[turn // n_turns], z.tokens, turn % n_turns, turn)
        done = turn - AHEAD
        if done >= 0 and done < z.n_lanes * n_turns:
            lane = done // n_turns
            multiply_keys(w, scores(w, lane), z.tokens, done % n_turns, done, lane_rows(w, lane))
        ended = done - lag
        if ended >= 0 and ended % n_turns == n_turns - 1:
            lane_maximum(w, ended // n_turns, now, top)


def prepare_gates(w, turn, n_turns, behind):
    """Gates of the lane that is scored. Begun during the lane before, after what is `behind`."""
    lane, at = turn // n_turns, turn % n_turns
    for begun in range(0 if lane == 0 else lane + 1, min(lane + 2, w.sizes.n_lanes)):
        if at == 0:
            if behind != None:
                behind.exponentials(w, begun)
            w.gates.begin_item(w, begun)
    if at == n_turns // 2:
        w.gates.turn_parts(w, lane)


def lane_maximum(w, lane, now, top):
    """A lane's logits are there: top[p, lane, row] = largest of the keys on partition p."""
    logits = item_logits(w, lane, now)
    nisa.tensor_reduce(dst=top[:, lane], op=nl.maximum, data=logits.permute((0, 2, 1, 3)), axis=(2, 3))


def score_edges(w):
    """Scores of the edge keys, with the queries of every lane."""
    z = w.sizes
    dst, every = w.edge_ps.expand_dim(1), slice(0, z.n_rows)
    if z.d_major:
        score_columns(w, dst, w.k_edge, z.n_edges, every)
    else:
        score_rows(w, dst, w.k_edge, z.n_edges, every)


def lane_rows(w, lane):
    """A lane's rows among all."""
    rows = w.sizes.rows
    return slice(lane * rows, (lane + 1) * rows)


def scores(w, lane):
    """A lane's scores in PSUM, [128, parts, rows, keys of a part]."""
    z = w.sizes
    keys = z.tokens // z.n_parts
    slot = lane % z.slots
    first = slot % z.per_bank * z.rows * keys
    bank = slot // z.per_bank * z.n_parts
    banks = w.s_ps[:, bank : bank + z.n_parts, first : first + z.rows * keys]
    return banks.reshape_dim(2, (z.rows, keys))


def score_columns(w, dst, keys, tokens, rows):
    """dst [128, parts, rows, n], of `tokens` tiles of d-major keys [db, blocks, tile, key]."""
    z = w.sizes
    n = dst.shape[3]
    for t in range(tokens):
        for i_block in range(z.n_blocks):
            nisa.nc_matmul(
                dst=dst[:, t // n, :, t % n],
                stationary=keys[:, i_block, t],
                moving=w.qt_sb[:, i_block, rows],
                accumulate=i_block > 0,
            )


def score_rows(w, dst, keys, tokens, rows):
    """dst [128, parts, rows, n], of `tokens` tiles of s-major keys [128, tile, d]."""
    n_turns = turns_of(w, tokens)
    for turn in range(n_turns + AHEAD):
        if turn < n_turns:
            transpose_keys(w, keys, tokens, turn, turn)
        if turn >= AHEAD:
            multiply_keys(w, dst, tokens, turn - AHEAD, turn - AHEAD, rows)


def turns_of(w, tokens):
    """Banks that the transposed keys of `tokens` tiles fill."""
    return (tokens * w.sizes.n_blocks + w.per_turn - 1) // w.per_turn


def transpose_keys(w, keys, tokens, turn, number):
    """A bank of keys [128, tile, d], transposed by matmul and moved to SBUF, both to where `number` has its turn."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    first, end = turn * w.per_turn, min((turn + 1) * w.per_turn, tokens * z.n_blocks)
    kt_ps, kt_sb = w.kt_ps[number % KT_BANKS], w.kt_sb[number % KT_BANKS]
    for i in range(first, end):
        i_block = i % z.n_blocks
        nisa.nc_matmul(
            dst=kt_ps[:, (i - first) * pmax : (i - first + 1) * pmax],
            stationary=keys[:, i // z.n_blocks, i_block * z.db : (i_block + 1) * z.db],
            moving=w.identity,
            is_transpose=w.by_bits,
            accumulate=False,
        )
    width = (end - first) * pmax
    # Three of eight to the Scalar Engine, which is slower at it and has the exponentials; none where it has gates too.
    share = 3 if w.gates == None else 0
    if (share * number + 7) % 8 >= share:
        nisa.tensor_copy(dst=kt_sb[:, 0:width], src=kt_ps[:, 0:width])
    else:
        nisa.activation(dst=kt_sb[:, 0:width], op=nl.copy, data=kt_ps[:, 0:width])


def multiply_keys(w, dst, tokens, turn, number, rows):
    """Scores of a bank of transposed keys, in dst [128, parts, rows, n]."""
    z = w.sizes
    pmax, n = nl.tile_size.pmax, dst.shape[3]
    first, end = turn * w.per_turn, min((turn + 1) * w.per_turn, tokens * z.n_blocks)
    kt_sb = w.kt_sb[number % KT_BANKS]
    for i in range(first, end):
        t, i_block = i // z.n_blocks, i % z.n_blocks
        nisa.nc_matmul(
            dst=dst[:, t // n, :, t % n],
            stationary=kt_sb[:, (i - first) * pmax : (i - first + 1) * pmax],
            moving=w.qt_sb[:, i_block, rows],
            accumulate=i_block > 0,
        )


def item_logits(w, lane, now):
    """A lane's scores as the exponential takes them, in PSUM or SBUF; what no key stands behind is finite."""
    z = w.sizes
    logits = scores(w, lane)
    if w.x == None:
        return logits
    x = w.x[:, lane]
    if z.d_major:
        # Columns past the last granule are whatever the cache holds there, NaN included.
        absent = now[:, lane, z.at.mask : z.at.mask + 1].view(nl.uint32)
        nisa.tensor_copy_predicated(dst=x, src=logits, predicate=spread(absent, x.shape), reverse_pred=True)
        logits = x
    if w.gates != None:
        w.gates.add_to_item(w, lane, x, logits)
        logits = x
    if w.softcap != None:
        cap(w, lane, x, logits)
        logits = x
    if w.slopes != None:
        positions = tile(w.step.shape, nl.float32)
        start = now[:, lane, z.at.start : z.at.start + 1].view(nl.float32)
        nisa.tensor_scalar(dst=positions, data=w.step, op0=nl.add, operand0=start)
        add_bias(w, lane, x, logits, positions)
    return x


def logits_of(w, lane):
    """Where `item_logits` left a lane's."""
    return scores(w, lane) if w.x == None else w.x[:, lane]


def edge_logits(w, now):
    """The edge keys' scores [128, lanes, rows, n_edges] in SBUF, MASKED where a new token does not see the key.

    `now` is the trip's record.
    """
    z = w.sizes
    at, s, group, n_lanes, n_edges = z.at, z.s, z.group, z.n_lanes, z.n_edges
    pmax = nl.tile_size.pmax
    logits = w.edge_ps.reshape_dim(1, (n_lanes, z.rows))
    if w.softcap != None or w.slopes != None or w.gates != None:
        changed = tile((pmax, n_lanes, z.rows, n_edges), nl.float32)
        positions = now[:, 0, at.rel : at.rel + n_edges].view(nl.float32).reshape((pmax, 1, 1, n_edges))
        for lane in range(n_lanes):
            of_lane, source = changed[:, lane : lane + 1], logits[:, lane : lane + 1]
            if w.gates != None:
                w.gates.add_to_edges(lane, of_lane, source)
                source = of_lane
            if w.softcap != None:
                cap(w, lane, of_lane, source)
                source = of_lane
            if w.slopes != None:
                add_bias(w, lane, of_lane, source, positions)
        logits = changed
    masked = tile((pmax, n_lanes, z.rows, n_edges), nl.float32)
    nisa.memset(dst=masked, value=MASKED)
    for lane in range(n_lanes):
        seen = now[:, lane, at.visible : at.visible + s * n_edges].view(nl.uint32)
        nisa.tensor_copy_predicated(
            dst=masked[:, lane].reshape_dim(1, (s, group)),
            src=logits[:, lane].reshape_dim(1, (s, group)),
            predicate=seen.reshape((pmax, s, 1, n_edges)).broadcast(2, group),
        )
    return masked


def cap(w, lane, dst, src):
    """dst = tanh(score / cap); the factor cap is in the exponential's scale."""
    nisa.activation(dst=dst, op=nl.tanh, data=src, scale=w.cap_scale[lane])


def add_bias(w, lane, dst, src, positions):
    """dst = src + ALiBi's bias, for positions [128, parts, 1, n] relative to the newest key."""
    z = w.sizes
    bias = tile(dst.shape, nl.float32)
    slope = w.slope[:, lane].reshape((dst.shape[0], 1, z.rows, 1))
    slope = slope.broadcast(1, dst.shape[1]).broadcast(3, dst.shape[3])
    by_row = positions.broadcast(2, z.rows)
    nisa.tensor_tensor(dst=bias, data1=slope, data2=by_row, op=nl.multiply, engine=nisa.engine.gpsimd)
    nisa.tensor_tensor(dst=dst, data1=src, data2=bias, op=nl.add)
    if z.s > 1:
        shift = w.shift[:, lane].reshape((dst.shape[0], 1, z.rows, 1))
        shift = shift.broadcast(1, dst.shape[1]).broadcast(3, dst.shape[3])
        nisa.tensor_tensor(dst=dst, data1=dst, data2=shift, op=nl.add)


def spread(column, shape):
    """A column [P, 1] as a tile of `shape`, four dimensions, by broadcasting."""
    x = column.reshape((shape[0], 1, 1, 1))
    return x.broadcast(1, shape[1]).broadcast(2, shape[2]).broadcast(3, shape[3])
