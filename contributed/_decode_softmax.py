"""Decode: maxima, exponentials, their product with V, and the running state of each row.

`w` is the launch's `State`, `z` its `Sizes`. Matmuls, maxima and exponentials go lane by lane as keys arrive; what is
left is small and done once for all lanes.
"""

from __future__ import annotations

from contributed._decode_loads import unit_rows
from contributed._decode_scores import edge_logits, lane_rows, logits_of, score_edges, score_items
from contributed._decode_state import EMPTY, LOWEST, MASKED, TINY, reciprocal, tile
from contributed._nki import nisa, nl


def attend_first(w):
    """The first items and the edges: they begin the running state."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    top = tile((pmax, z.n_lanes, z.rows), nl.float32)
    score_items(w, w.now, top, None)
    score_edges(w)
    edges = edge_logits(w, w.now)
    floor = tile((pmax, z.n_rows), nl.float32)
    nisa.tensor_reduce(dst=floor, op=nl.maximum, data=edges, axis=3)
    bias = maximum(w, top, w.now, floor)
    nisa.tensor_copy(dst=w.m, src=w.m_ps[:, 1, 0 : z.n_rows])

    # The edge keys' exponentials; their maximum is on every partition.
    gap = tile(edges.shape, nl.float32)
    m = w.m.reshape((pmax, z.n_lanes, z.rows, 1)).broadcast(3, z.n_edges)
    nisa.tensor_tensor(dst=gap, data1=edges, data2=m, op=nl.subtract)
    e = tile(edges.shape, nl.float32)
    for lanes in w.spans:
        nisa.activation(dst=e[:, lanes], op=nl.exp, data=gap[:, lanes], scale=w.exp_scale[lanes.start])
    edge_total = tile((pmax, z.n_rows), nl.float32)
    nisa.tensor_reduce(dst=edge_total, op=nl.add, data=e, axis=3)
    p_edge = tile(edges.shape, w.q.dtype)
    nisa.tensor_copy(dst=p_edge, src=e)

    total = tile((pmax, z.n_rows), nl.float32)
    for lane in range(z.n_lanes):
        p = tile(logits_of(w, lane).shape, w.q.dtype)
        exponentials(w, lane, p, bias, total)
        weigh(w, w.v_sb[lane], p, lane_rows(w, lane), False)
    # A lane's probabilities of the others' edge keys are 0.
    weigh(w, w.v_edge, p_edge.reshape((pmax, 1, z.n_rows, z.n_edges)), slice(0, z.n_rows), True)
    # Not added to `total`: which partitions edge keys are on depends on the lane, and no bit of a result may.
    add_total(w, total)
    add_total(w, edge_total, True)
    nisa.tensor_copy(dst=w.acc, src=w.o_ps)


def attend_next(w):
    """Further items: the running state is rescaled to the new maximum and added to."""
    z = w.sizes
    pmax, db, n_rows = nl.tile_size.pmax, z.db, z.n_rows
    top = tile((pmax, z.n_lanes, z.rows), nl.float32)
    score_items(w, w.item_now, top, None)
    bias = maximum(w, top, w.item_now, w.m)
    gap = tile((db, n_rows), nl.float32)
    m_ps = w.m_ps[:, 1, 0:n_rows]
    nisa.tensor_tensor(dst=gap, data1=w.m[0:db, :], data2=m_ps[0:db, :], op=nl.subtract)
    nisa.tensor_copy(dst=w.m, src=m_ps)
    decay = tile((db, 1, n_rows), nl.float32)
    for lanes in w.spans:
        span = rows_of(w, lanes)
        scale = on_partitions(w.exp_scale[lanes.start], db)
        nisa.activation(dst=decay[:, 0, span], op=nl.exp, data=gap[:, span], scale=scale)
    total = tile((pmax, n_rows), nl.float32)
    for lane in range(z.n_lanes):
        p = tile(logits_of(w, lane).shape, w.q.dtype)
        exponentials(w, lane, p, bias, total)
        weigh(w, w.v_sb[lane], p, lane_rows(w, lane), False)
    add_total(w, total)
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=decay.broadcast(1, z.n_blocks + 1), op=nl.multiply)
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=w.o_ps, op=nl.add)


def maximum(w, top, now, floor):
    """Maxima of each row, of `top` and `floor`, into m_ps[:, 1], the same on every partition.

    Returns the bias of the exponentials, [128, lanes, rows]: mask[p] - scale * maximum[row].
    """
    z = w.sizes
    pmax, n_rows = nl.tile_size.pmax, z.n_rows
    mask = now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    nisa.tensor_tensor(dst=top, data1=top, data2=mask, op=nl.add)
    raised = tile((pmax, n_rows), nl.float32)
    nisa.tensor_tensor(dst=raised, data1=top.reshape((pmax, n_rows)), data2=floor, op=nl.maximum)
    across = w.m_ps[0:n_rows, 0, :]
    nisa.nc_matmul(dst=across, stationary=raised, moving=w.identity_f32, is_transpose=True, accumulate=False)
    column = tile((n_rows, 1), nl.float32)
    nisa.tensor_reduce(dst=column, op=nl.maximum, data=across, axis=1)
    wide = tile((n_rows, pmax), nl.float32)
    nisa.tensor_scalar(dst=wide, data=column.broadcast(1, pmax), op0=nl.maximum, operand0=LOWEST)
    m_ps = w.m_ps[:, 1, 0:n_rows]
    square = w.identity_f32[0:n_rows, 0:n_rows]
    nisa.nc_matmul(dst=m_ps, stationary=wide, moving=square, is_transpose=True, accumulate=False)
    bias = tile((pmax, z.n_lanes, z.rows), nl.float32)
    for lanes in w.spans:
        nisa.scalar_tensor_tensor(
            dst=bias[:, lanes],
            data=m_ps.reshape_dim(1, (z.n_lanes, z.rows))[:, lanes],
            op0=nl.multiply,
            operand0=w.neg_exp_scale[lanes.start],
            op1=nl.add,
            operand1=mask[:, lanes],
        )
    return bias


def exponentials(w, lane, p, bias, total):
    """p = exp(scale * logits + bias) in q's type, and the float32 sums over the keys of a partition into `total`."""
    z = w.sizes
    logits = logits_of(w, lane)
    for row in range(z.rows):
        column = lane * z.rows + row
        nisa.activation(
            dst=p[:, :, row, :],
            op=nl.exp,
            data=logits[:, :, row, :],
            bias=bias[:, lane, row : row + 1],
            scale=w.exp_scale[lane],
            reduce_op=nl.add,
            reduce_res=total[:, column : column + 1],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )


def weigh(w, v_tile, p, rows, add):
    """o_ps of some rows += V^T P, 128 keys per matmul; from 0 unless `add`."""
    z = w.sizes
    n = p.shape[3]
    for t in range(v_tile.shape[1]):
        for i_block in range(z.n_blocks):
            nisa.nc_matmul(
                dst=w.o_ps[:, i_block, rows],
                stationary=v_tile[:, t, i_block * z.db : (i_block + 1) * z.db],
                moving=p[:, t // n, :, t % n],
                accumulate=add or t > 0,
            )


def add_total(w, total, add=False):
    """o_ps[:, n_blocks] = sums over all partitions, on every partition; or += them."""
    z = w.sizes
    sums = w.o_ps[:, z.n_blocks, :]
    nisa.nc_matmul(dst=sums, stationary=w.ones[:, 0 : z.db], moving=total, accumulate=add)


def finish(w):
    """Normalise the outputs and store them, with their lse."""
    z = w.sizes
    n_rows, rows, d = z.n_rows, z.rows, z.d
    for i_block in range(z.n_blocks):
        nisa.nc_matmul(
            dst=w.t_ps[0:n_rows, i_block * z.db : (i_block + 1) * z.db],
            stationary=w.acc[:, i_block, :],
            moving=w.identity_f32[0 : z.db, 0 : z.db],
            is_transpose=True,
            accumulate=False,
        )
    one = w.ones[0:1, 0:1]
    sums_ps = w.t_ps[0:n_rows, d : d + 1]
    nisa.nc_matmul(dst=sums_ps, stationary=w.acc[0:1, z.n_blocks, :], moving=one, accumulate=False)
    l = tile((n_rows, 1), nl.float32)
    nisa.tensor_scalar(dst=l, data=sums_ps, op0=nl.maximum, operand0=TINY)
    factor = reciprocal(l)
    units = tile((1, z.n_lanes), nl.int32)  # a copy, as the stores hold it for long
    nisa.tensor_copy(dst=units, src=w.now[0:1, :, z.at.unit_out])
    if w.lse_hbm != None or w.sinks != None:
        lse = log_sum(w, l)
        if w.sinks != None:
            lse, kept = with_sink(lse, w.sink)
            nisa.tensor_tensor(dst=factor, data1=factor, data2=kept, op=nl.multiply)
        else:
            # Twice MASKED is beyond float32: an empty row's lse becomes -inf.
            empty = tile((n_rows, 1), nl.float32)
            nisa.tensor_scalar(dst=empty, data=l, op0=nl.less, operand0=EMPTY, op1=nl.multiply, operand1=MASKED)
            nisa.scalar_tensor_tensor(dst=lse, data=lse, op0=nl.add, operand0=empty, op1=nl.add, operand1=empty)
    o_sb = tile((n_rows, d), w.o_hbm.dtype)
    nisa.tensor_scalar(
        dst=o_sb,
        data=w.t_ps[0:n_rows, 0:d],
        op0=nl.multiply,
        operand0=factor,
        op1=nl.multiply,
        operand1=w.v_scale if w.kv_scales == None else w.out_factor,
    )
    for lane in range(z.n_lanes):
        store(w, lane, unit_rows(w, w.o_hbm, d, units[:, lane : lane + 1]), o_sb[lane * rows : (lane + 1) * rows])
    if w.lse_hbm != None:
        for lane in range(z.n_lanes):
            store(w, lane, unit_rows(w, w.lse_hbm, 1, units[:, lane : lane + 1]), lse[lane * rows : (lane + 1) * rows])


def store(w, lane, dst, src):
    """A lane's results; lanes take turns at the two engines that start hardware DMA, where there is such."""
    if w.has_hwdge and lane % 2 == 1:
        nisa.dma_copy(dst=dst, src=src, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
    else:
        nisa.dma_copy(dst=dst, src=src)


def log_sum(w, l):
    """scale * maximum + log(sum), [rows, 1]."""
    z = w.sizes
    n_rows, d = z.n_rows, z.d
    m_ps = w.t_ps[0:n_rows, d + 1 : d + 2]
    for lanes in w.spans:
        m = w.m[0:1, rows_of(w, lanes)]
        nisa.tensor_scalar(dst=m, data=m, op0=nl.multiply, operand0=on_partitions(w.exp_scale[lanes.start], 1))
    nisa.nc_matmul(dst=m_ps, stationary=w.m[0:1, :], moving=w.ones[0:1, 0:1], accumulate=False)
    log_l = tile((n_rows, 1), nl.float32)
    nisa.activation(dst=log_l, op=nl.log, data=l)
    lse = tile((n_rows, 1), nl.float32)
    nisa.tensor_tensor(dst=lse, data1=m_ps, data2=log_l, op=nl.add)
    return lse


def rows_of(w, lanes):
    """The rows of consecutive lanes."""
    z = w.sizes
    return slice(lanes.start * z.rows, lanes.stop * z.rows)


def with_sink(lse, sink):
    """log(exp(lse) + exp(sink)), and the share of exp(lse) in it; columns."""
    top = tile(lse.shape, nl.float32)
    nisa.tensor_tensor(dst=top, data1=lse, data2=sink, op=nl.maximum)
    parts = tile((lse.shape[0], 2), nl.float32)
    nisa.tensor_tensor(dst=parts[:, 0:1], data1=lse, data2=top, op=nl.subtract)
    nisa.tensor_tensor(dst=parts[:, 1:2], data1=sink, data2=top, op=nl.subtract)
    e = tile((lse.shape[0], 2), nl.float32)
    nisa.activation(dst=e, op=nl.exp, data=parts)
    total = tile(lse.shape, nl.float32)
    nisa.tensor_reduce(dst=total, op=nl.add, data=e, axis=1)
    kept = tile(lse.shape, nl.float32)
    nisa.tensor_tensor(dst=kept, data1=e[:, 0:1], data2=reciprocal(total), op=nl.multiply)
    log_total = tile(lse.shape, nl.float32)
    nisa.activation(dst=log_total, op=nl.log, data=total)
    both = tile(lse.shape, nl.float32)
    nisa.tensor_tensor(dst=both, data1=top, data2=log_total, op=nl.add)
    return both, kept


def on_partitions(scale, partitions):
    """A scale that is a number, or a column of which the first partitions are needed."""
    return scale if isinstance(scale, float) else scale[0:partitions]
