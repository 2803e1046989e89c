"""Sparse decode: the sides of a trip, tiles that a length or a window cuts, with one key per partition.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. The first side is visited before all items and begins
the state; the last side is visited after them, and is decided on like any other tile. Both are scored a trip ahead.
"""

from __future__ import annotations

from contributed._decode_loads import gather, load_k_edges
from contributed._decode_scores import edge_logits, score_edges
from contributed._decode_softmax import add_total, weigh
from contributed._decode_state import LOWEST, MASKED, tile
from contributed._nki import nisa, nl
from contributed._sparse_counts import count_rows, count_tiles
from contributed._sparse_decide import everywhere, fade, of_group, turn
from contributed._sparse_items import join, settle, weigh_lanes
from contributed._sparse_open_state import NO_TILE
from contributed._sparse_state import LEVEL, MAXIMUM, OWN, SHARED


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


def last_side_open(w, x, record, last):
    """`x.last_open`: 1.0 in the lanes where the last side's tile is open; elsewhere `record` has no keys of it.

    `last` is the trip's part of `OpenTiles.last`.
    """
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    windows = z.n_windows - x.n_first
    first = z.at.v_edge + x.last_edges.start
    closed = tile((pmax, 1, n_lanes), nl.float32)
    nisa.dma_copy(dst=x.last_open, src=last)
    nisa.tensor_scalar(dst=closed[:, 0], data=x.last_open, op0=nl.less, operand0=0.5)
    none = tile((pmax, windows, n_lanes), nl.int32)
    nisa.memset(dst=none, value=NO_TILE)
    nisa.tensor_copy_predicated(
        dst=record[:, 0, first : first + windows * n_lanes].reshape_dim(1, (windows, n_lanes)),
        src=none,
        predicate=closed.view(nl.uint32).broadcast(1, windows),
    )


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


def mask_last_side(w, x, edges):
    """MASKED in place of the scores of a closed last side, of which no key was read."""
    penalty = tile(x.last_open.shape, nl.float32)
    nisa.tensor_scalar(dst=penalty, data=x.last_open, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED)
    for lane in range(w.sizes.n_lanes):
        side = edges[:, lane, :, x.last_edges]
        nisa.tensor_scalar(
            dst=side, data=side, op0=nl.add, operand0=penalty[:, lane : lane + 1], op1=nl.maximum, operand1=MASKED
        )


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


def by_edge(w, part, n):
    """A part of m_ps for each of n edge keys on a partition, [128, lanes, rows, n]."""
    z = w.sizes
    level = w.m_ps[:, part, 0 : z.n_rows].reshape_dim(1, (z.n_lanes, z.rows))
    return level.expand_dim(3).broadcast(3, n)


def values_of_side(w, x, side):
    """o_ps = a side's values times their probabilities, and their sums."""
    weigh(w, w.v_edge[:, side], x.p_edge[:, :, :, side], slice(0, w.sizes.n_rows), False)
    add_total(w, x.edge_total)
