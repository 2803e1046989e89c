"""Sparse decode: a trip over the items of several groups, with a decision between scores and values.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. The values of an item are asked for when it is decided
which of its tiles stay, and used one item later: while they come, the next keys are scored. Keys come an item ahead.
"""

from __future__ import annotations

from contributed._decode_loads import fetch, flat_rows, gather, load_k_edges, load_k_of_lane, unit_rows
from contributed._decode_scores import (
    AHEAD,
    edge_logits,
    lane_maximum,
    lane_rows,
    multiply_keys,
    score_edges,
    score_items,
    scores,
    transpose_keys,
    transpose_queries,
    turns_of,
)
from contributed._decode_softmax import add_total, finish, store, weigh
from contributed._decode_state import LOWEST, MASKED, Sizes, State, tile
from contributed._nki import BACKEND, at_most, nisa, nl
from contributed._sparse_gates import Gates
from contributed._sparse_open import (
    ENDED,
    NO_TILE,
    NONE,
    THERE,
    OpenTiles,
    TilesAhead,
    begin_block,
    copy_known,
    correct_list,
    last_side_open,
    list_others,
    load_first_tiles,
    mask_last_side,
    test_all,
    write_tiles,
)
from contributed._sparse_state import LEVEL, MAXIMUM, OWN, SHARED, Skipping


def attend(
    q,
    k,
    v,
    records,
    items,
    bounds,
    limits,
    n_kv_heads,
    tokens,
    chunks,
    n_windows,
    n_first,
    tile_kv,
    n_splits,
    softmax_scale,
    right_to_left,
    by_group,
    judged,
    with_lse,
    with_stats,
    gating,
):
    """What the kernels of `skip_softmax_decode.py` and `sparse_decode.py` compute.

    Args:
        q: as in the kernels, like all that follows to `softmax_scale` and the last but one.
        k: keys.
        v: values.
        records: of the trips.
        items: of the trips; None with gates.
        bounds: of the items; None with gates.
        limits: of the decisions.
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition.
        chunks: gathers per item and block of d of d-major K, 0 for s-major.
        n_windows: stretches of edge keys per group.
        n_first: those that are visited first.
        tile_kv: keys of a tile.
        n_splits: KV splits.
        softmax_scale: multiplies q . k.
        right_to_left: order of the tiles in an item.
        by_group: whether the rows of a group decide together.
        judged: whether scores decide on tiles; if not, gates alone do.
        with_lse: whether lse is returned.
        with_stats: whether counts are.
        gating: a `Gating`, or None.

    Returns:
        o; and lse, tiles kept, and rows read if asked for.
    """
    results = results_of(q, n_kv_heads, n_splits, with_lse, with_stats)
    o_hbm, lse_hbm, kept_hbm, read_hbm = results
    d = q.shape[3]
    core = nl.program_id(0) if records.shape[0] > 1 else 0
    sizes = Sizes(q.shape, n_kv_heads, tokens, 1, chunks, n_windows, nl.tile_size.pmax, records.shape[3])
    k_rows, v_rows = flat_rows(k, 1 if chunks > 0 else d), flat_rows(v, d)
    w = State(sizes, q, k_rows, v_rows, o_hbm, lse_hbm, softmax_scale, 1.0, None, None, None, None)
    listed = gating != None
    x = Skipping(w, tile_kv, n_first, right_to_left, by_group, judged, limits, kept_hbm, read_hbm, listed)
    if listed:
        w.gates = Gates(w, gating)
        ahead = TilesAhead(w, x, gating, tile_kv)
        w.constants()
        tiles = OpenTiles(w, x, gating, tile_kv, ahead)
        run(w, x, records[core], tiles.by_partition, tiles.bounds, tiles)
    else:
        run(w, x, records[core], items[core], bounds[core], None)
    return given(results)


def results_of(q, n_kv_heads, n_splits, with_lse, with_stats):
    """Tensors in HBM for o, and for lse, tiles kept and rows read or None."""
    batch, s, n_q_heads, d = q.shape
    assert s == 1, f"s: received {s}, allowed 1 new token"
    assert n_q_heads % n_kv_heads == 0, f"n_q_heads: received {n_q_heads}, allowed multiples of {n_kv_heads}"
    o_dtype = q.dtype if n_splits == 1 else nl.float32
    of_heads = (n_splits * batch, s, n_q_heads)
    o_hbm = nl.ndarray((n_splits * batch, s, n_q_heads, d), dtype=o_dtype, buffer=nl.shared_hbm)
    lse_hbm, kept_hbm, read_hbm = None, None, None
    if with_lse:
        lse_hbm = nl.ndarray(of_heads, dtype=nl.float32, buffer=nl.shared_hbm)
    if with_stats:
        kept_hbm = nl.ndarray(of_heads, dtype=nl.float32, buffer=nl.shared_hbm)
        read_hbm = nl.ndarray((2, n_splits * batch, n_kv_heads), dtype=nl.float32, buffer=nl.shared_hbm)
    return o_hbm, lse_hbm, kept_hbm, read_hbm


def given(results):
    """What a kernel returns: the results that were asked for."""
    there = []
    for x in results:
        if x != None:
            there.append(x)
    return there[0] if len(there) == 1 else tuple(there)


def run(w, x, records, items, bounds, tiles):
    """Every group of `records`: a trip of the outer loop takes the first items of its lanes, the inner one further.

    The first items of a trip are scored before the one before it is finished, so that the keys after them are on
    their way meanwhile. With gates `tiles` is an `OpenTiles`, whose items and bounds these are; else None.
    """
    if tiles == None:
        fetch(w, records[0])
        x.fetch(w)
        x.ask_for_item(w, items[0])
        w.prepare()
        begin_items(w, x)
        x.ask_for_item(w, items[1])
    else:
        list_and_begin(w, x, records, tiles)
    take_queries(w)
    if tiles == None:
        sides_coming = ask_for_sides(w, x, bounds[0], None)
    else:
        sides_coming = ask_for_sides(w, x, tiles.gating.bounds[0, 0, 0], tiles.last[0])
    look(w, x, items[2], None)
    score_sides(w, x, sides_coming)

    def trip(i):
        second, end, more, first, sides = (
            nisa.register_alloc(),
            nisa.register_alloc(),
            nisa.register_alloc(),
            nisa.register_alloc(),
            nisa.register_alloc(),
        )
        nisa.register_load(second, bounds.select(0, i)[0:1])
        nisa.register_load(end, bounds.select(0, i)[1:2])
        nisa.register_load(more, bounds.select(0, i)[2:3])
        nisa.register_load(first, bounds.select(0, i)[3:4])
        nisa.register_load(sides, bounds.select(0, i)[4:5])
        # Records and queries of the trip are there; those of the next one come.
        nisa.tensor_copy(dst=w.now, src=w.of_k)
        nisa.tensor_copy(dst=x.edges, src=x.edges_coming)
        x.reset(w)
        if x.kept_hbm != None:
            at = w.sizes.at.v_edge
            count_rows(w, x, 0, w.now[:, 0, at : at + w.sizes.n_edges], w.sizes.n_windows)
        fetch(w, records[1:].select(0, i))
        x.fetch(w)

        def open_side(_):
            open_first_side(w, x)

        def weigh_side_of_trip(_):
            weigh_first_side(w, x)

        def use_side(_):
            use_first_side(w, x)

        if x.n_first > 0:
            nl.fori_loop(0, sides, open_side)
        compare(w, x)
        first_left_out = None
        if x.judged:
            first_left_out = decide(w, x)
            ask(w, x)
        if x.n_first > 0:
            nl.fori_loop(0, sides, weigh_side_of_trip)
        rise(w, x, first_left_out)
        fade(w, x.decay)
        if x.n_first > 0:
            nl.fori_loop(0, sides, use_side)

        def step(j):
            left_out = None
            if x.judged:
                look(w, x, items[2:].select(0, j), x)
                # The Tensor Engine has values to weigh while the others come to a decision.
                n_lanes = w.sizes.n_lanes
                weigh_lanes(w, x, 0, n_lanes // 4)
                compare(w, x)
                weigh_lanes(w, x, n_lanes // 4, (3 * n_lanes + 3) // 4)
                left_out = decide(w, x)
                weigh_lanes(w, x, (3 * n_lanes + 3) // 4, n_lanes)
                ask(w, x)
            else:
                look_by_lane(w, x, items[2:].select(0, j), tiles.turns[1:].select(0, j), False)
                compare(w, x)
            rise(w, x, left_out)
            settle(w, x)
            fade(w, x.decay)

        nl.fori_loop(second, at_most(end, 0 if tiles == None else tiles.room - 1), step)
        if x.judged:
            for lane in range(w.sizes.n_lanes):
                x.exponentials(w, lane)

        def next_trip(_):
            take_queries(w)
            last = None if tiles == None else tiles.last[1:].select(0, i)
            sides_coming = ask_for_sides(w, x, bounds[1:].select(0, i), last)
            if x.judged:
                look(w, x, items[2:].select(0, first), None)
            else:
                look_by_lane(w, x, items[2:].select(0, first), tiles.turns.select(0, end), True)
            score_sides(w, x, sides_coming)

        def no_trip(_):
            drain(w, x, tiles.turns.select(0, end))

        nl.fori_loop(0, more, next_trip)
        if not x.judged:
            nl.fori_loop(more, 1, no_trip)
        close(w, x)
        if w.gates != None:
            w.gates.add_constant(w)
        finish(w)
        report(w, x)

    nl.fori_loop(0, records.shape[0] - 1, trip)


def list_and_begin(w, x, records, tiles):
    """The first items, and the list of all.

    Their keys are asked for as soon as it is known that none of the tiles is closed that they have in that case; else
    when the list of the first trip is there.
    """
    load_first_tiles(w, tiles)
    fetch(w, records[0])
    x.fetch(w)
    tiles.constants(w)
    # By the Scalar Engine alone, which has nothing else to do.
    w.key_tiles(w.k.dtype, 0)
    begin_block(tiles, 0)
    tiles.ahead.turn(w)
    # While the Tensor Engine has work.
    tiles.order(w)
    # neuronxcc makes the trips of all loops that the device decides on, and in those it cannot store a list.
    one_closed = 1 if BACKEND == "neuronxcc" else tiles.ahead.is_one_closed(w, tiles.of_row)
    w.value_tiles(w.v.dtype, 0)

    n_trips = records.shape[0] - 1

    def begin_early(_):
        copy_known(tiles)
        begin_items(w, x)

    def list_and_ask(_):
        write_tiles(w, tiles, 0, w.sizes.n_lanes)
        x.ask_for_item(w, tiles.by_partition[0])
        begin_items(w, x)
        x.take_rows_of_v(w.item_of_v[:, :, w.sizes.at.v])
        list_others(w, x, tiles, n_trips)
        x.ask_for_item(w, tiles.by_partition[1])

    def list_meanwhile(_):
        correct_list(w, x, tiles, n_trips)
        x.ask_for_item(w, tiles.by_partition[1])
        if not x.judged:
            # Behind the small transfers before them. With the next keys come no values then.
            x.take_rows_of_v(w.item_of_v[:, :, w.sizes.at.v])
            nisa.tensor_copy(dst=x.v_index, src=x.rows_of_v, engine=nisa.engine.gpsimd)
            nisa.memset(dst=x.rows_of_v, value=NO_TILE, engine=nisa.engine.gpsimd)
            ask(w, x)

    nl.fori_loop(one_closed, 1, begin_early)
    test_all(w, x, tiles)
    nl.fori_loop(0, one_closed, list_and_ask)
    nl.fori_loop(one_closed, 1, list_meanwhile)
    w.gates.constants(w)
    w.option_tiles()


def begin_items(w, x):
    """Keys of the first items, whose records or rows have come."""
    x.take_item(w, nisa.engine.gpsimd)
    take_keys(w, x, False)


def take_queries(w):
    """Queries that have come, and their alphas, are those of the items from now on."""
    transpose_queries(w)
    if w.gates != None:
        w.gates.take_alphas(w)


def look(w, x, ahead, behind):
    """Scores of the items, after the exponentials `behind` them; then the keys of the next ones are asked for."""
    next_item(w, x, ahead)
    score_items(w, w.item_now, x.top, behind)
    take_keys(w, x, not x.judged)


def next_item(w, x, ahead):
    """The item whose keys come is the one in work, and the one after it that whose keys are asked for next."""
    nisa.tensor_copy(dst=w.item_now, src=w.item_of_v)
    if x.listed:
        mask = w.item_now[:, :, w.sizes.at.mask].view(nl.float32)
        rows = w.item_now[:, :, w.sizes.at.v]
        nisa.tensor_scalar(dst=mask, data=rows, op0=nl.less, operand0=0.0, op1=nl.multiply, operand1=MASKED)
    # The record after the next one is asked for before the next one's keys: it would have to wait for those.
    x.take_item(w, nisa.engine.gpsimd if x.listed else nisa.engine.vector)
    x.ask_for_item(w, ahead)


def look_by_lane(w, x, ahead, turns, over):
    """As `look`, where no decision is waited for: the items behind are weighed, and lanes without an item do nothing.

    Args:
        w: the launch's `State`.
        x: its `Skipping`.
        ahead: rows of items that are asked for.
        turns: [n_lanes, ...] of `OpenTiles.turns`, of the items; with `over` of those behind.
        over: whether the items are the first of a trip, which every lane has, and those behind the last of another one.
    """
    next_item(w, x, ahead)
    forget(w, x)
    there, other = nisa.register_alloc(), nisa.register_alloc()
    for lane in range(w.sizes.n_lanes):
        nisa.register_load(there, turns[lane, THERE : THERE + 1])
        which = NONE if over else ENDED
        nisa.register_load(other, turns[lane, which : which + 1])
        look_at_lane(w, x, lane, there, other, over)
    # The item in work is another one before the last lane's values can be asked for.
    x.take_rows_of_v(w.item_now[:, :, w.sizes.at.v])
    take_keys(w, x, True)


def look_at_lane(w, x, lane, there, other, over):
    """A lane of `look_by_lane`, as two registers of 1 or 0 say."""

    def go_on(_):
        score_item(w, x, lane, True)

    def begin_or_end(_):
        if over:
            score_item(w, x, lane, False)
        else:
            weigh_item(w, x, lane)

    nl.fori_loop(0, at_most(there, 1), go_on)
    nl.fori_loop(0, at_most(other, 1), begin_or_end)


def drain(w, x, turns):
    """The last items of all; `turns` says which lanes have one."""
    forget(w, x)
    there = nisa.register_alloc()
    for lane in range(w.sizes.n_lanes):
        nisa.register_load(there, turns[lane, THERE : THERE + 1])
        drain_lane(w, x, lane, there)


def drain_lane(w, x, lane, there):
    """A lane of `drain`, as a register of 1 or 0 says."""

    def end(_):
        weigh_item(w, x, lane)

    nl.fori_loop(0, at_most(there, 1), end)


def weigh_item(w, x, lane):
    """A lane's probabilities, and the values that they weigh."""
    x.exponentials(w, lane)
    x.weigh(w, lane)


def forget(w, x):
    """Lanes that are done add nothing."""
    nisa.memset(dst=x.total, value=0.0)
    nisa.memset(dst=w.o_ps, value=0.0)


def score_item(w, x, lane, behind):
    """Scores of a lane's item; with `behind` also exponentials and weighed values of the one before it."""
    n_turns = turns_of(w, w.sizes.tokens)
    if behind:
        x.exponentials(w, lane)
    w.gates.begin_item(w, lane)
    for turn in range(n_turns + AHEAD):
        if turn < n_turns:
            transpose_keys(w, w.k_sb[lane], w.sizes.tokens, turn, lane * n_turns + turn)
        if turn == n_turns - 1:
            w.gates.turn_parts(w, lane)
        if behind and turn == n_turns:
            x.weigh(w, lane)
        done = turn - AHEAD
        if done >= 0:
            multiply_keys(w, scores(w, lane), w.sizes.tokens, done, lane * n_turns + done, lane_rows(w, lane))
    lane_maximum(w, lane, w.item_now, x.top)


def take_keys(w, x, values):
    """Keys of the item that comes next, lane by lane, as a lane's index is in use until its last keys are there.

    With `values` those of the item before it, as `x.rows_of_v` says, are asked for among them.
    """
    v, end, gpsimd = w.sizes.at.v, w.sizes.at.mask, nisa.engine.gpsimd
    for lane in range(w.sizes.n_lanes):
        nisa.tensor_copy(dst=w.item_of_k[:, lane, 0:end], src=w.item_of_v[:, lane, 0:end], engine=gpsimd)
        load_k_of_lane(w, lane, w.item_of_k)
        if w.gates != None:
            w.gates.load_item(lane, w.item_of_k[:, lane, v : v + 1])
        if values:
            index = x.v_index[:, lane : lane + 1]
            nisa.tensor_copy(dst=index, src=x.rows_of_v[:, lane : lane + 1], engine=gpsimd)
            gather(w.v_sb[lane], w.v, index)


def compare(w, x):
    """Largest scores by granule with rows on partitions: of each row, and of its group if that decides."""
    z = w.sizes
    pmax, n_rows = nl.tile_size.pmax, z.n_rows
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    there = tile((pmax, z.n_lanes, z.rows), nl.float32)
    nisa.tensor_tensor(dst=there, data1=x.top, data2=mask, op=nl.add)
    turn(w, OWN, there.reshape((pmax, n_rows)))
    if x.judged and x.by_group:
        turn(w, SHARED, of_group(w, there))


def decide(w, x):
    """Which tiles of an item stay: their rows of V into `v_index`, and `bias` far below 0 where a row leaves them out.

    Returns 1.0 for the tiles that are left out, [n_rows, n_tiles].
    """
    z = w.sizes
    pmax, n_rows, n = nl.tile_size.pmax, z.n_rows, x.n_tiles
    judged = x.running[:, 0, 0:n]
    nisa.tensor_reduce(
        dst=judged.reshape_dim(1, (x.n_high, x.n_low)),
        op=nl.maximum,
        data=x.by_tile(w.m_ps[0:n_rows, SHARED if x.by_group else OWN, :]),
        axis=(3, 4),
    )
    left_out = tile((n_rows, n), nl.float32)
    nisa.scalar_tensor_tensor(
        dst=left_out, data=best_before(w, x), op0=nl.add, operand0=x.limit, op1=nl.greater, operand1=judged
    )
    level = tile((n_rows, pmax), nl.float32)
    spread = left_out.reshape((n_rows, x.n_high, x.n_low, 1, 1)).broadcast(3, x.outer).broadcast(4, x.inner)
    nisa.tensor_scalar(dst=x.by_tile(level), data=spread, op0=nl.multiply, operand0=x.penalty)
    turn_back(w, LEVEL, level)
    if not x.by_group:
        # What a row leaves out is below its maximum.
        nisa.tensor_copy(dst=x.maximum, src=x.best)
        everywhere(w, MAXIMUM, x.best)
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    lower_bias(w, x, LEVEL, mask)
    highest, stays = tile((pmax, z.n_lanes), nl.float32), tile((pmax, z.n_lanes), nl.float32)
    nisa.tensor_reduce(dst=highest, op=nl.maximum, data=x.bias, axis=2)
    nisa.tensor_scalar(dst=stays, data=highest, op0=nl.greater, operand0=-0.5 * x.penalty * w.scale)
    nisa.memset(dst=x.v_index, value=-1)
    nisa.tensor_copy_predicated(dst=x.v_index, src=w.item_now[:, :, z.at.v], predicate=stays.view(nl.uint32))
    if x.kept_hbm != None:
        count_tiles(x, left_out)
        count_item(w, x, stays)
    return left_out


def rise(w, x, left_out):
    """The maxima of what stays: the rest of the exponentials' bias, which is then mask[p] - scale * maximum[row].

    `left_out` is None where no score decides.
    """
    n_rows, n = w.sizes.n_rows, x.n_tiles
    if not x.judged:
        rise_to_all(w, x)
        return
    if x.by_group:
        # A row's own maximum may be in a tile that its group leaves out.
        own, staying, largest = (
            tile((n_rows, n), nl.float32),
            tile((n_rows, n), nl.float32),
            tile((n_rows, 1), nl.float32),
        )
        nisa.tensor_reduce(
            dst=own.reshape_dim(1, (x.n_high, x.n_low)),
            op=nl.maximum,
            data=x.by_tile(w.m_ps[0:n_rows, OWN, :]),
            axis=(3, 4),
        )
        nisa.scalar_tensor_tensor(
            dst=staying, data=left_out, op0=nl.multiply, operand0=-x.penalty, op1=nl.add, operand1=own
        )
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=staying, axis=1)
        nisa.tensor_tensor(dst=x.maximum, data1=x.maximum, data2=largest, op=nl.maximum)
        everywhere(w, MAXIMUM, x.maximum)
    lower_bias(w, x, MAXIMUM, x.bias)


def rise_to_all(w, x):
    """As `rise`, where all tiles of an item stay."""
    z = w.sizes
    largest = tile((z.n_rows, 1), nl.float32)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=w.m_ps[0 : z.n_rows, OWN, :], axis=1)
    nisa.tensor_tensor(dst=x.maximum, data1=x.maximum, data2=largest, op=nl.maximum)
    everywhere(w, MAXIMUM, x.maximum)
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    lower_bias(w, x, MAXIMUM, mask)
    if x.kept_hbm != None:
        there = tile((nl.tile_size.pmax, z.n_lanes), nl.float32)
        nisa.tensor_scalar(dst=there, data=w.item_now[:, :, z.at.v], op0=nl.greater_equal, operand0=0.0)
        count_item(w, x, there)
        absent = tile((z.n_rows, x.n_tiles), nl.float32)
        nisa.tensor_reduce(
            dst=absent.reshape_dim(1, (x.n_high, x.n_low)),
            op=nl.maximum,
            data=x.by_tile(w.m_ps[0 : z.n_rows, OWN, :]),
            axis=(3, 4),
        )
        nisa.tensor_scalar(dst=absent, data=absent, op0=nl.less_equal, operand0=LOWEST)
        count_tiles(x, absent)


def everywhere(w, part, column):
    """A column [n_rows, 1] on every partition, in a part of m_ps."""
    pmax = nl.tile_size.pmax
    wide = tile((w.sizes.n_rows, pmax), nl.float32)
    nisa.tensor_copy(dst=wide, src=column.broadcast(1, pmax))
    turn_back(w, part, wide)


def lower_bias(w, x, part, data):
    """bias = data - scale * a part of m_ps."""
    z = w.sizes
    level_ps = w.m_ps[:, part, 0 : z.n_rows].reshape_dim(1, (z.n_lanes, z.rows))
    nisa.scalar_tensor_tensor(
        dst=x.bias, data=level_ps, op0=nl.multiply, operand0=w.neg_exp_scale[0], op1=nl.add, operand1=data
    )


def best_before(w, x):
    """The largest of the tiles before each in the order of the visit, [n_rows, n_tiles], of those in `x.running`.

    `x.best` is brought on.
    """
    n = x.n_tiles
    if not x.right_to_left:
        judged, runs = x.running[:, 0, 0:n], x.running[:, 1]
        nisa.tensor_copy(dst=runs[:, 0:1], src=x.best)
        nisa.tensor_tensor_scan(
            dst=runs[:, 1 : n + 1], data0=judged, data1=judged, initial=x.best, op0=nl.maximum, op1=nl.maximum
        )
        nisa.tensor_copy(dst=x.best, src=runs[:, n : n + 1])
        return runs[:, 0:n]
    # Largest of 2, 4, 8 ... neighbours on the right, past the end of which stands the best so far.
    past = x.best.reshape((w.sizes.n_rows, 1, 1)).broadcast(1, 3).broadcast(2, n)
    nisa.tensor_copy(dst=x.running[:, :, n : 2 * n], src=past)
    source, dst = 0, 1
    reach = 1
    while reach < n:
        nisa.tensor_tensor(
            dst=x.running[:, dst, 0:n],
            data1=x.running[:, source, 0:n],
            data2=x.running[:, source, reach : reach + n],
            op=nl.maximum,
        )
        source, dst = dst, 3 - dst
        reach = 2 * reach
    nisa.tensor_tensor(dst=x.best, data1=x.best, data2=x.running[:, source, 0:1], op=nl.maximum)
    return x.running[:, source, 1 : n + 1]


def ask(w, x):
    """Values of the tiles that stay, into the place of those that have been used."""
    for lane in range(w.sizes.n_lanes):
        gather(w.v_sb[lane], w.v, x.v_index[:, lane : lane + 1])


def fade(w, decay):
    """What the state is worth under the new maximum, [db, 1, rows]."""
    z = w.sizes
    gap = tile((z.db, z.n_rows), nl.float32)
    top_ps = w.m_ps[:, MAXIMUM, 0 : z.n_rows]
    nisa.tensor_tensor(dst=gap, data1=w.m[0 : z.db], data2=top_ps[0 : z.db], op=nl.subtract)
    nisa.tensor_copy(dst=w.m, src=top_ps)
    nisa.activation(dst=decay[:, 0, :], op=nl.exp, data=gap, scale=w.exp_scale[0])


def weigh_lanes(w, x, begin_lane, end_lane):
    """Values of some lanes' items that have come, times their probabilities."""
    for lane in range(begin_lane, end_lane):
        x.weigh(w, lane)


def settle(w, x):
    """The item whose values have come joins the state."""
    add_total(w, x.total)
    join(w, x.decay)


def join(w, decay):
    """acc = acc * decay + o_ps."""
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=decay.broadcast(1, w.sizes.n_blocks + 1), op=nl.multiply)
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=w.o_ps, op=nl.add)


def ask_for_sides(w, x, bounds, last):
    """Keys of both sides of the trip whose record has come. Returns a register of 1 or 0: whether there are any.

    `bounds` are that trip's; with gates `last` is its part of `OpenTiles.last`, else None.
    """
    nisa.tensor_copy(dst=w.of_k, src=w.coming)
    there = nisa.register_alloc()
    nisa.register_load(there, bounds[4:5])

    def load(_):
        if x.last_open != None:
            last_side_open(w, x, w.of_k, last)
        load_k_edges(w, w.of_k)
        if w.gates != None:
            w.gates.load_edges(w, w.of_k)

    nl.fori_loop(0, there, load)
    return there


def score_sides(w, x, there):
    """Their scores, MASKED where a lane has no key; `there` as `ask_for_sides` returns it."""
    nisa.memset(dst=x.edges_coming, value=MASKED)

    def score(_):
        score_edges(w)
        edges = edge_logits(w, w.of_k)
        if x.last_open != None:
            mask_last_side(w, x, edges)
        nisa.tensor_copy(dst=x.edges_coming, src=edges)

    nl.fori_loop(0, there, score)


def open_first_side(w, x):
    """The first side begins the state: nothing is before it, so it stays."""
    z = w.sizes
    at = z.at.v_edge
    for e in range(x.first_edges.stop):
        gather(w.v_edge[:, e, :], w.v, w.now[:, 0, at + e : at + e + 1])
    largest_of_side(w, x, x.first_edges)
    row_maximum(w, x.maximum, OWN)
    row_maximum(w, x.best, SHARED if x.by_group else OWN)
    if x.kept_hbm != None:
        nisa.tensor_scalar(dst=x.kept, data=x.maximum, op0=nl.greater, operand0=LOWEST)
        count_rows(w, x, 1, w.now[:, 0, at : at + x.first_edges.stop], x.n_first)
    nisa.tensor_copy(dst=x.side_maximum, src=x.maximum)


def row_maximum(w, dst, part):
    """dst [n_rows, 1] = the largest of a part of m_ps, LOWEST at least."""
    n_rows = w.sizes.n_rows
    nisa.tensor_reduce(dst=dst, op=nl.maximum, data=w.m_ps[0:n_rows, part, :], axis=1)
    nisa.tensor_scalar(dst=dst, data=dst, op0=nl.maximum, operand0=LOWEST)


def weigh_first_side(w, x):
    """The first side's probabilities, for which its lanes' first items do not have to wait."""
    everywhere(w, LEVEL, x.side_maximum)
    nisa.tensor_copy(dst=w.m, src=w.m_ps[:, LEVEL, 0 : w.sizes.n_rows])
    weigh_side(w, x, x.first_edges, LEVEL)


def by_edge(w, part, n):
    """A part of m_ps for each of n edge keys on a partition, [128, lanes, rows, n]."""
    z = w.sizes
    level = w.m_ps[:, part, 0 : z.n_rows].reshape_dim(1, (z.n_lanes, z.rows))
    return level.expand_dim(3).broadcast(3, n)


def use_first_side(w, x):
    """The first side's values."""
    values_of_side(w, x, x.first_edges)
    nisa.tensor_copy(dst=w.acc, src=w.o_ps)


def close(w, x):
    """The last item's values and the last side, of which the decision comes first and the values last."""
    z = w.sizes
    n_rows = z.n_rows
    if x.last_edges.start == x.last_edges.stop:
        if x.judged:
            weigh_lanes(w, x, 0, z.n_lanes)
        settle(w, x)
        return
    largest_of_side(w, x, x.last_edges)
    own, judged = tile((n_rows, 1), nl.float32), tile((n_rows, 1), nl.float32)
    nisa.tensor_reduce(dst=own, op=nl.maximum, data=w.m_ps[0:n_rows, OWN, :], axis=1)
    nisa.tensor_reduce(dst=judged, op=nl.maximum, data=w.m_ps[0:n_rows, SHARED if x.by_group else OWN, :], axis=1)
    left_out = tile((n_rows, 1), nl.float32)
    nisa.scalar_tensor_tensor(dst=left_out, data=x.best, op0=nl.add, operand0=x.limit, op1=nl.greater, operand1=judged)
    staying, level = tile((n_rows, 1), nl.float32), tile((n_rows, 1), nl.float32)
    nisa.scalar_tensor_tensor(
        dst=staying, data=left_out, op0=nl.multiply, operand0=-x.penalty, op1=nl.add, operand1=own
    )
    nisa.tensor_tensor(dst=x.maximum, data1=x.maximum, data2=staying, op=nl.maximum)
    nisa.tensor_scalar(dst=level, data=left_out, op0=nl.multiply, operand0=x.penalty)
    everywhere(w, LEVEL, level)
    everywhere(w, MAXIMUM, x.maximum)
    ask_for_side(w, x)
    if x.kept_hbm != None:
        count_tiles(x, left_out)
        count_rows(w, x, 1, x.v_edge_index[:, x.last_edges], z.n_windows - x.n_first)
    decay = tile((z.db, 1, n_rows), nl.float32)
    fade(w, decay)
    weigh_side(w, x, x.last_edges, MAXIMUM)
    if x.judged:
        weigh_lanes(w, x, 0, z.n_lanes)
    settle(w, x)
    values_of_side(w, x, x.last_edges)
    join(w, decay)


def ask_for_side(w, x):
    """V of the last side in the lanes where a row keeps it."""
    z = w.sizes
    level = w.m_ps[:, LEVEL, 0 : z.n_rows].reshape_dim(1, (z.n_lanes, z.rows))
    lowest = tile((nl.tile_size.pmax, 1, z.n_lanes), nl.float32)
    nisa.tensor_reduce(dst=lowest[:, 0], op=nl.minimum, data=level, axis=2)
    stays = tile(lowest.shape, nl.float32)
    nisa.tensor_scalar(dst=stays, data=lowest, op0=nl.less, operand0=0.5 * x.penalty)
    index = x.v_edge_index[:, x.last_edges]
    nisa.memset(dst=index, value=-1)
    windows = z.n_windows - x.n_first
    first = z.at.v_edge + x.last_edges.start
    nisa.tensor_copy_predicated(
        dst=index.reshape_dim(1, (windows, z.n_lanes)),
        src=w.now[:, 0, first : first + windows * z.n_lanes].reshape_dim(1, (windows, z.n_lanes)),
        predicate=stays.view(nl.uint32).broadcast(1, windows),
    )
    for e in range(x.last_edges.start, x.last_edges.stop):
        gather(w.v_edge[:, e, :], w.v, x.v_edge_index[:, e : e + 1])


def largest_of_side(w, x, side):
    """A side's largest scores with rows on partitions, in the places of an item's."""
    z = w.sizes
    top = tile((nl.tile_size.pmax, z.n_lanes, z.rows), nl.float32)
    nisa.tensor_reduce(dst=top, op=nl.maximum, data=x.edges[:, :, :, side], axis=3)
    turn(w, OWN, top.reshape((nl.tile_size.pmax, z.n_rows)))
    if x.by_group:
        turn(w, SHARED, of_group(w, top))


def weigh_side(w, x, side, part):
    """A side's probabilities under the maximum in a part of m_ps, and of the last side under LEVEL, and their sums."""
    z = w.sizes
    pmax, n_rows = nl.tile_size.pmax, z.n_rows
    n = side.stop - side.start
    gap = tile((pmax, z.n_lanes, z.rows, n), nl.float32)
    nisa.tensor_tensor(dst=gap, data1=x.edges[:, :, :, side], data2=by_edge(w, part, n), op=nl.subtract)
    if part == MAXIMUM:
        nisa.tensor_tensor(dst=gap, data1=gap, data2=by_edge(w, LEVEL, n), op=nl.subtract)
    e = tile(gap.shape, nl.float32)
    nisa.activation(dst=e, op=nl.exp, data=gap, scale=w.exp_scale[0])
    nisa.tensor_reduce(dst=x.edge_total, op=nl.add, data=e.reshape((pmax, n_rows, n)), axis=2)
    nisa.tensor_copy(dst=x.p_edge[:, 0, :, side], src=e.reshape((pmax, n_rows, n)))


def values_of_side(w, x, side):
    """o_ps = a side's values times their probabilities, and their sums."""
    weigh(w, w.v_edge[:, side], x.p_edge[:, :, :, side], slice(0, w.sizes.n_rows), False)
    add_total(w, x.edge_total)


def of_group(w, top):
    """[128, lanes, rows] as [128, n_rows] with the largest of each lane in all its rows."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    largest = tile((pmax, z.n_lanes, 1), nl.float32)
    nisa.tensor_reduce(dst=largest[:, :, 0], op=nl.maximum, data=top, axis=2)
    shared = tile((pmax, z.n_lanes, z.rows), nl.float32)
    nisa.tensor_copy(dst=shared, src=largest.broadcast(2, z.rows))
    return shared.reshape((pmax, z.n_rows))


def turn(w, part, data):
    """[128, n_rows] to [n_rows, 128] in a part of m_ps."""
    dst = w.m_ps[0 : w.sizes.n_rows, part, :]
    nisa.nc_matmul(dst=dst, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)


def turn_back(w, part, data):
    """[n_rows, 128] to [128, n_rows] in a part of m_ps."""
    n_rows = w.sizes.n_rows
    square = w.identity_f32[0:n_rows, 0:n_rows]
    dst = w.m_ps[:, part, 0:n_rows]
    nisa.nc_matmul(dst=dst, stationary=data, moving=square, is_transpose=True, accumulate=False)


def count_tiles(x, left_out):
    """Tiles that each row keeps; one that has no key counts as left out."""
    n = left_out.shape[1]
    out = tile((left_out.shape[0], 1), nl.float32)
    nisa.tensor_reduce(dst=out, op=nl.add, data=left_out, axis=1)
    nisa.tensor_scalar(dst=out, data=out, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=float(n))
    nisa.tensor_tensor(dst=x.kept, data1=x.kept, data2=out, op=nl.add)


def count_rows(w, x, part, index, windows):
    """Rows of K (part 0) or V (1) that the indices [128, windows * lanes] of edge keys ask for."""
    n_lanes = w.sizes.n_lanes
    asked = tile((nl.tile_size.pmax, windows, n_lanes), nl.float32)
    by_window = index.reshape_dim(1, (windows, n_lanes))
    nisa.tensor_scalar(dst=asked, data=by_window, op0=nl.greater_equal, operand0=0.0)
    of_lane = tile((nl.tile_size.pmax, n_lanes), nl.float32)
    nisa.tensor_reduce(dst=of_lane, op=nl.add, data=asked.permute((0, 2, 1)), axis=2)
    nisa.tensor_tensor(dst=x.read[:, part], data1=x.read[:, part], data2=of_lane, op=nl.add)


def count_item(w, x, stays):
    """Rows of K that an item has, and of V that stay of it."""
    z = w.sizes
    there = tile((nl.tile_size.pmax, z.n_lanes), nl.float32)
    nisa.tensor_scalar(dst=there, data=w.item_now[:, :, z.at.v], op0=nl.greater_equal, operand0=0.0)
    count_granules(w, x, 0, there)
    count_granules(w, x, 1, stays)


def count_granules(w, x, part, asked):
    """Rows of K (part 0) or V (1) of the granules that are asked for, 1.0 in [128, lanes]."""
    read, tokens = x.read[:, part], float(w.sizes.tokens)
    nisa.scalar_tensor_tensor(dst=read, data=asked, op0=nl.multiply, operand0=tokens, op1=nl.add, operand1=read)


def report(w, x):
    """Stores what was counted."""
    z = w.sizes
    if x.kept_hbm == None:
        return
    n_lanes, rows = z.n_lanes, z.rows
    units = tile((1, n_lanes), nl.int32)
    nisa.tensor_copy(dst=units, src=w.now[0:1, :, z.at.unit_out])
    read_ps = w.t_ps[0:1, 0 : 2 * n_lanes]
    nisa.nc_matmul(dst=read_ps, stationary=w.ones[:, 0:1], moving=x.read, accumulate=False)
    read = tile((1, 2, n_lanes), nl.float32)
    nisa.tensor_copy(dst=read, src=read_ps.reshape_dim(1, (2, n_lanes)))
    n_units = x.read_hbm.shape[1] * z.n_kv_heads
    by_unit = x.read_hbm.reshape((2 * n_units, 1))
    for lane in range(n_lanes):
        unit = units[:, lane : lane + 1]
        store(w, lane, unit_rows(w, x.kept_hbm, 1, unit), x.kept[lane * rows : (lane + 1) * rows])
        # K's and V's numbers of a unit lie n_units apart.
        store(w, lane, by_unit.ap([[1, 1], [n_units, 2]], scalar_offset=unit), read[:, :, lane])
