"""Decode: what a trip loads. `w` is the launch's `State`, `z` its `Sizes`.

Loads run ahead of the computation: the K of the next trip is gathered as soon as the scores of this one are there, the
V as soon as it is used, records one trip earlier still. A gather holds its index until its last byte, so K and V read
copies of their own.
"""

from __future__ import annotations

from contributed._decode_state import reciprocal
from contributed._nki import nisa, nl


def fetch(w, records):
    """The records [128, n_lanes, width] of a trip, and its queries."""
    z = w.sizes
    nisa.dma_copy(dst=w.coming, src=records)
    for lane in range(z.n_lanes):
        unit = w.coming[0:1, lane, z.at.unit_in : z.at.unit_in + 1]
        dst = w.q_sb[lane * z.rows : (lane + 1) * z.rows, :]
        nisa.dma_copy(dst=dst, src=unit_rows(w, w.q, z.d, unit))


def load_k(w, record):
    """K of every lane's item."""
    for lane in range(w.sizes.n_lanes):
        load_k_of_lane(w, lane, record)


def load_k_of_lane(w, lane, record):
    """K of a lane's item."""
    z = w.sizes
    at, run = z.at, z.tokens // z.granules
    k_sb = w.k_sb[lane]
    if z.d_major:
        width = nl.tile_size.pmax * z.tokens // z.chunks
        for i_block in range(z.n_blocks):
            for i in range(z.chunks):
                column = at.k + i_block * z.chunks + i
                index = record[0 : z.db, lane, column : column + 1]
                gather(k_sb[:, i_block, i * width : (i + 1) * width], w.k, index)
    else:
        for i in range(z.granules):
            index = record[:, lane, at.v + i : at.v + i + 1]
            gather(k_sb[:, i * run : (i + 1) * run, :], w.k, index)


def load_v(w, record):
    """V of every lane's item."""
    z = w.sizes
    at, run = z.at, z.tokens // z.granules
    for lane in range(z.n_lanes):
        for i in range(z.granules):
            index = record[:, lane, at.v + i : at.v + i + 1]
            gather(w.v_sb[lane][:, i * run : (i + 1) * run, :], w.v, index)


def load_k_edges(w, record):
    """K of all lanes' edge keys."""
    z = w.sizes
    at = z.at
    if not z.d_major:
        for e in range(z.n_edges):
            gather(w.k_edge[:, e, :], w.k, record[:, 0, at.v_edge + e : at.v_edge + e + 1])
        return
    for lane in range(z.n_lanes):
        for i in range(z.n_windows):
            e = i * z.edge_tiles + lane // z.lanes_per_tile
            first = lane % z.lanes_per_tile * z.window
            for i_block in range(z.n_blocks):
                column = at.k_edge + i_block * z.n_windows + i
                dst = w.k_edge[:, i_block, e, first : first + z.window]
                gather(dst, w.k, record[0 : z.db, lane, column : column + 1])


def load_v_edges(w, record):
    """V of all lanes' edge keys."""
    z = w.sizes
    at = z.at
    for e in range(z.n_edges):
        gather(w.v_edge[:, e, :], w.v, record[:, 0, at.v_edge + e : at.v_edge + e + 1])


def load_options(w):
    """What depends on the KV heads in work."""
    z = w.sizes
    pmax, s, group, rows = nl.tile_size.pmax, z.s, z.group, z.rows
    for lane in range(z.n_lanes):
        head = w.now[0:1, lane, z.at.head : z.at.head + 1]
        of_lane = slice(lane * rows, (lane + 1) * rows)
        if w.kv_scales != None:
            load_scales(w, lane, head)
        if w.slopes != None:
            per_row = w.slopes.ap([[0, pmax], [0, s], [1, group]], scalar_offset=head)
            nisa.dma_copy(dst=w.slope[:, lane], src=per_row)
            # In units of what the exponential's scale multiplies.
            scale, slope = w.exp_scale[lane], w.slope[:, lane]
            inverse = 1.0 / scale if isinstance(scale, float) else reciprocal(scale)
            nisa.tensor_scalar(dst=slope, data=slope, op0=nl.multiply, operand0=inverse)
            nisa.tensor_tensor(
                dst=w.shift[:, lane].reshape_dim(1, (s, group)),
                data1=slope.reshape_dim(1, (s, group)),
                data2=w.newer.broadcast(2, group),
                op=nl.multiply,
            )
        if w.sinks != None:
            per_row = w.sinks.ap([[0, s], [1, group]], scalar_offset=head)
            nisa.dma_copy(dst=w.sink[of_lane], src=per_row)


def load_scales(w, lane, head):
    """Scales of the caches of a lane's KV head."""
    z = w.sizes
    pmax, rows = nl.tile_size.pmax, z.rows
    factors, scaled = w.factors[:, lane], w.scaled[:, lane]
    nisa.dma_copy(dst=factors, src=w.kv_scales.ap([[0, pmax], [1, 2]], scalar_offset=head))
    v_factor = w.kv_scales.ap([[0, rows], [1, 1]], offset=1, scalar_offset=head)
    nisa.dma_copy(dst=w.out_factor[lane * rows : (lane + 1) * rows], src=v_factor)
    if w.softcap == None:
        nisa.tensor_scalar(dst=scaled[:, 0:1], data=factors[:, 0:1], op0=nl.multiply, operand0=w.scale)
        nisa.tensor_scalar(dst=scaled[:, 1:2], data=factors[:, 0:1], op0=nl.multiply, operand0=-w.scale)
        w.exp_scale[lane] = scaled[:, 0:1]
        w.neg_exp_scale[lane] = scaled[:, 1:2]
    else:
        factor = w.scale / w.softcap
        nisa.tensor_scalar(dst=scaled[:, 0:1], data=factors[:, 0:1], op0=nl.multiply, operand0=factor)
        w.cap_scale[lane] = scaled[:, 0:1]


def unit_rows(w, x_hbm, width, unit):
    """The [s, group, width] elements that a unit's rows have in [batch, s, n_q_heads, width]."""
    z = w.sizes
    size = z.group * width
    units = x_hbm.reshape((x_hbm.shape[0] * z.s * z.n_kv_heads, size))
    return units.ap([[z.n_kv_heads * size, z.s], [width, z.group], [1, width]], scalar_offset=unit)


def flat_rows(x_hbm, width):
    """An HBM tensor as rows of `width` elements."""
    size = 1
    for n in x_hbm.shape:
        size = size * n
    return x_hbm.reshape((size // width, width))


def gather(dst, src, index):
    """dst[p, ...] = consecutive elements of `src` from row index[p] on; where that is -1, dst[p] stays."""
    width = 1
    for n in dst.shape[1:]:
        width = width * n
    rows = src.ap([[src.shape[1], dst.shape[0]], [1, width]], vector_offset=index)
    nisa.dma_copy(dst=dst, src=rows, oob_mode=nisa.oob_mode.skip)
