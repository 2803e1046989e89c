"""Sparse decode: the kernels' common body, trips over the items of several groups.

`w` is the launch's `State`, `x` its `Skipping`. What a trip does with its items is in `_sparse_items.py`, with its
sides in `_sparse_sides.py`; the decision between scores and values is in `_sparse_decide.py`.
"""

from __future__ import annotations

from contributed._decode_loads import fetch, flat_rows
from contributed._decode_scores import transpose_queries
from contributed._decode_softmax import finish
from contributed._decode_state import Sizes, State
from contributed._nki import BACKEND, at_most, nisa, nl
from contributed._sparse_counts import count_rows, report
from contributed._sparse_decide import compare, decide, fade, rise
from contributed._sparse_gates import Gates
from contributed._sparse_items import ask, drain, look, look_by_lane, settle, take_keys, weigh_lanes
from contributed._sparse_open import (
    begin_block,
    copy_known,
    correct_list,
    list_others,
    load_first_tiles,
    test_all,
    write_tiles,
)
from contributed._sparse_open_state import NO_TILE, OpenTiles, TilesAhead
from contributed._sparse_sides import (
    ask_for_sides,
    close,
    open_first_side,
    score_sides,
    use_first_side,
    weigh_first_side,
)
from contributed._sparse_state import Skipping


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
