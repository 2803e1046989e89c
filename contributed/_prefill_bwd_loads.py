"""Prefill, backward: what comes from HBM and goes there, transposes, and what blocks and chunks add up to.

Rows of a block, and their dQ, which adds up over its chunks in SBUF; keys of a chunk, and their dK and dV, which add up
from block to block in HBM. `w` is the launch's `State`.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_bwd_state import (
    GROUP,
    NOTHING,
    SLOTS,
)
from contributed._prefill_select import begin_chunk_planes
from contributed._prefill_state import RECORD_COLUMNS, tile

# ---------------------------------------------------------------------------------------------------
# Blocks


def fetch_block(w, records, whole):
    """The rows of the block whose record has come, and the record [128, 3, q_tiles] of the block after it.

    Args:
        w: the launch's `State`.
        records: of the block after it.
        whole: register, 1 if the block has all its rows, 0 if not; None if all blocks of the launch have.
    """
    nisa.tensor_copy(dst=w.block_loading, src=w.block_coming, engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=w.block_coming, src=records)

    def all_rows(_):
        load_block(w, w.q_next, w.q)
        load_block(w, w.do_next, w.do)
        load_block(w, w.lse_next, w.lse)
        load_block(w, w.o_sb, w.o)  # last, as it has to wait until the dQ before it has left

    def some_rows(_):
        load_rows(w, w.q_next, w.q)
        load_rows(w, w.do_next, w.do)
        load_rows(w, w.lse_next, w.lse)
        load_rows(w, w.o_sb, w.o)

    if not w.sizes.ragged:
        all_rows(0)
        return
    nl.fori_loop(0, whole, all_rows)
    nl.fori_loop(whole, 1, some_rows)


def load_block(w, dst, x_hbm):
    """All rows of the block that is loading."""
    nisa.dma_copy(dst=dst, src=block_rows(w, x_hbm, w.block_loading))


def load_rows(w, dst, x_hbm):
    """Those rows that there are of the block that is loading."""
    for row_tile in range(w.sizes.q_tiles):
        rows = chosen_rows(x_hbm, w.block_loading[:, 0, row_tile : row_tile + 1])
        nisa.dma_copy(dst=dst[:, row_tile, :], src=rows, oob_mode=nisa.oob_mode.skip)


def block_rows(w, x_hbm, record):
    """The rows of a whole block, [128, q_tiles, width], of `x_hbm`, whose rows are those of a block's heads."""
    z = w.sizes
    pmax, width = nl.tile_size.pmax, x_hbm.shape[1]
    step = w.n_units * width
    return x_hbm.ap([[step, pmax], [step * pmax, z.q_tiles], [1, width]], scalar_offset=record[0:1, 0, 0:1])


def chosen_rows(x_hbm, rows):
    """Rows rows[p], [128, width]."""
    width = x_hbm.shape[1]
    return x_hbm.ap([[width, nl.tile_size.pmax], [1, width]], vector_offset=rows)


def transpose_rows(w, part, n_parts):
    """A part of the rows of the block that has been loaded, to [d, rows]; q times the sign of the scale."""
    if part == 0:
        w.row_turn = 0
    n_turns = w.sizes.n_blocks * ((w.sizes.n_tiles + w.per_row_turn - 1) // w.per_row_turn)
    for turn in range(2 * n_turns * part // n_parts, 2 * n_turns * (part + 1) // n_parts):
        if turn < n_turns:
            turn_rows(w, w.qt_sb, w.q_next, w.q_sign, turn)
        else:
            turn_rows(w, w.dot_sb, w.do_next, 1.0, turn - n_turns)


def turn_rows(w, dst, src, factor, number):
    """A bank of transposed rows, times a factor."""
    z = w.sizes
    i_block, first = number % z.n_blocks, number // z.n_blocks * w.per_row_turn
    n = min(w.per_row_turn, z.n_tiles - first)
    turn = w.row_ps[w.row_turn % len(w.row_ps)]
    for i in range(n):
        row_tile, head = (first + i) // z.heads, (first + i) % z.heads
        at = head * z.d + i_block * z.db
        transpose(w, turn[0 : z.db, i, :], src[:, row_tile, at : at + z.db])
    out = dst[:, i_block, first : first + n, :]
    if w.row_turn % 2 == 0:
        nisa.tensor_scalar(dst=out, data=turn[0 : z.db, 0:n, :], op0=nl.multiply, operand0=factor)
    else:
        nisa.activation(dst=out, op=nl.copy, data=turn[0 : z.db, 0:n, :], scale=factor)
    w.row_turn = w.row_turn + 1


def negate_lse(w):
    """lse of the block that has been loaded times -1; a row that sees nothing gets one whose exponentials are 0."""
    z = w.sizes
    lo, hi = w.block_loading[:, 1, :].view(nl.float32), w.block_loading[:, 2, :].view(nl.float32)
    nothing = tile((nl.tile_size.pmax, z.q_tiles, 1), nl.float32)
    nisa.tensor_tensor(dst=nothing[:, :, 0], data1=hi, data2=lo, op=nl.less_equal)
    x = w.lse_next
    # An lse of -inf becomes a number.
    nisa.tensor_scalar(dst=x, data=x, op0=nl.maximum, operand0=NOTHING / 2, op1=nl.multiply, operand1=-1.0)
    nisa.scalar_tensor_tensor(
        dst=x, data=nothing.broadcast(2, z.heads), op0=nl.multiply, operand0=NOTHING, op1=nl.add, operand1=x
    )


def all_deltas(w):
    """delta of the first block, by all that have nothing else to do; probabilities' tiles have room for products."""
    z = w.sizes
    nisa.memset(dst=w.dq, value=0.0, engine=nisa.engine.gpsimd)
    negate_lse(w)
    n = max(1, SLOTS * z.keys // z.d // 2)
    room = w.x.reshape((nl.tile_size.pmax, SLOTS * z.keys))
    for first in range(0, z.n_tiles, n):
        these = slice(first, min(first + n, z.n_tiles))
        by_vector = first // n % 2 == 0
        # A chunk of one tile of keys has room for one product of the largest d.
        at = 0 if by_vector or 2 * n * z.d > room.shape[1] else n * z.d
        engine = nisa.engine.vector if by_vector else nisa.engine.gpsimd
        products = room[:, at : at + (these.stop - first) * z.d].reshape_dim(1, (these.stop - first, z.d))
        multiply_rows(w, products, these, engine)
        add_products(w, products, these)


def next_deltas(w):
    """delta of the tiles whose products there are, and the products o * do of some more of the block that has come."""
    first, n_done = w.n_products, w.n_deltas
    w.n_deltas = first
    w.n_products = min(first + GROUP, w.sizes.n_tiles)
    if first == 0:
        negate_lse(w)
    if first < w.n_products:
        products = w.products[first // GROUP % 2][:, 0 : w.n_products - first, :]
        multiply_rows(w, products, slice(first, w.n_products), nisa.engine.gpsimd)
    if n_done < first:
        add_products(w, w.products[n_done // GROUP % 2][:, 0 : first - n_done, :], slice(n_done, first))


def begin_counts(w):
    """Before a block's rows are done, and the next one's begun: the body of a loop is built once."""
    w.n_products = 0
    w.n_deltas = 0
    w.n_finished = 0
    w.n_cleared = 0


def multiply_rows(w, dst, tiles, engine):
    """dst = o * do of some tiles of the block that has been loaded."""
    o, do = by_tile(w, w.o_sb), by_tile(w, w.do_next)
    nisa.tensor_tensor(dst=dst, data1=o[:, tiles, :], data2=do[:, tiles, :], op=nl.multiply, engine=engine)


def add_products(w, products, tiles):
    """delta of some tiles."""
    for i in range(products.shape[1]):
        at = tiles.start + i
        nisa.activation(
            dst=products[:, i, :],
            op=nl.copy,
            data=products[:, i, :],
            reduce_op=nl.add,
            reduce_res=w.delta_next[:, at : at + 1],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )


def by_tile(w, rows):
    """[128, q_tiles, heads * d] of a block as [128, tiles, d]."""
    return rows.reshape((nl.tile_size.pmax, w.sizes.n_tiles, w.sizes.d))


def finish_tiles(w, end):
    """dQ of the tiles up to `end`, which are complete, to where o was, their sums to 0, and rows of the next block."""
    first = w.n_finished
    while w.n_deltas < end:
        next_deltas(w)
    these = slice(first, end)
    if first < end:
        nisa.tensor_copy(dst=by_tile(w, w.o_sb)[:, these, :], src=w.dq[:, these, :], engine=nisa.engine.gpsimd)
        take_rows(w, these)
    # Sums of the ones before, so that this does not have to wait.
    last = end if end == w.sizes.n_tiles else first
    if w.n_cleared < last:
        nisa.memset(dst=w.dq[:, w.n_cleared : last, :], value=0.0)
        w.n_cleared = last
    w.n_finished = end


def take_rows(w, tiles):
    """Some tiles' do and q of the block that has been loaded."""
    nisa.tensor_copy(dst=by_tile(w, w.do_sb)[:, tiles, :], src=by_tile(w, w.do_next)[:, tiles, :])
    nisa.tensor_copy(dst=by_tile(w, w.q_sb)[:, tiles, :], src=by_tile(w, w.q_next)[:, tiles, :])


def finish_block(w, whole):
    """Store dQ of the block, and take over the one that has been loaded; `whole` as in `fetch_block`."""
    z = w.sizes
    if z.n_diagonal == 0:
        begin_counts(w)
        transpose_rows(w, 0, 1)
    finish_tiles(w, z.n_tiles)
    # A copy, as stores hold it for long.
    nisa.tensor_copy(dst=w.block_storing, src=w.block_now)

    def all_rows(_):
        nisa.dma_copy(dst=block_rows(w, w.dq_hbm, w.block_storing), src=w.o_sb)

    def some_rows(_):
        for row_tile in range(z.q_tiles):
            dst = chosen_rows(w.dq_hbm, w.block_storing[:, 0, row_tile : row_tile + 1])
            nisa.dma_copy(dst=dst, src=w.o_sb[:, row_tile, :], oob_mode=nisa.oob_mode.skip)

    if z.ragged:
        nl.fori_loop(0, whole, all_rows)
        nl.fori_loop(whole, 1, some_rows)
    else:
        all_rows(0)
    take_block(w)


def take_block(w):
    """The record, delta and lse of the block that has been loaded become those of the block in work."""
    nisa.tensor_copy(dst=w.block_now, src=w.block_loading, engine=nisa.engine.gpsimd)
    nisa.tensor_copy(dst=w.neg_lse, src=w.lse_next)
    nisa.tensor_copy(dst=w.delta, src=w.delta_next)


# ---------------------------------------------------------------------------------------------------
# Chunks


def fetch_chunk(w, records):
    """K and V of the chunk whose record has come, and the record of the chunk after it."""
    nisa.tensor_copy(dst=w.loading, src=w.coming, engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=w.coming, src=records)
    load_keys(w, w.k_next, w.k, w.loading)
    load_keys(w, w.v_next, w.v, w.loading)


def fetch_penalties(w, row):
    """Those of the next chunk, on every partition; `row`: [1, n_tiles * kv_tiles] of the table, None without one."""
    if row != None:
        nisa.dma_copy(dst=w.penalty_next, src=row.broadcast(0, nl.tile_size.pmax))


def load_keys(w, dst, x_hbm, record):
    """A chunk's rows, [128, kv_tiles, d], plane by plane or tile by tile."""
    for part in parts_of_chunk(w, x_hbm, record):
        nisa.dma_copy(dst=dst[part.partitions, part.tiles, :], src=part.rows)


def store_keys(w, x_hbm, src, record):
    """The way back."""
    for part in parts_of_chunk(w, x_hbm, record):
        nisa.dma_copy(dst=part.rows, src=src[part.partitions, part.tiles, :])


class Part(nl.NKIObject):  # type: ignore[misc]
    """Keys of a chunk that come and go in one transfer: `rows` in HBM, [partitions, tiles, d]."""

    def __init__(self, partitions, tiles, rows):
        self.partitions = partitions
        self.tiles = tiles
        self.rows = rows


def parts_of_chunk(w, x_hbm, record):
    """All keys of a chunk."""
    z = w.sizes
    pmax, step = nl.tile_size.pmax, w.kv_heads * z.d
    parts = []
    if w.gathers:
        for t in range(z.kv_tiles):
            first = RECORD_COLUMNS + z.kv_tiles + t
            pattern = [[step, pmax], [step * pmax, 1], [1, z.d]]
            rows = x_hbm.ap(pattern, scalar_offset=record[0:1, first : first + 1])
            parts.append(Part(slice(0, pmax), slice(t, t + 1), rows))
        return parts
    groups = pmax // z.planes
    for i in range(z.planes):
        pattern = [[step * z.planes, groups], [step * pmax, z.kv_tiles], [1, z.d]]
        rows = x_hbm.ap(pattern, offset=i * step, scalar_offset=record[0:1, 0:1])
        parts.append(Part(slice(i * groups, (i + 1) * groups), slice(0, z.kv_tiles), rows))
    return parts


def take(w, rows, record):
    """A chunk's rows [128, kv_tiles, d] with zeros in place of those that belong to no key."""
    words = nl.int32 if w.is_float32 or w.sizes.d % 2 == 0 else nl.int16
    for t in range(w.sizes.kv_tiles):
        bits = rows[:, t, :].view(words)
        guard = record[:, RECORD_COLUMNS + t : RECORD_COLUMNS + t + 1].view(words)[:, 0:1]
        nisa.tensor_scalar(dst=bits, data=bits, op0=nl.bitwise_and, operand0=guard)


def column(record, i):
    """A float32 column of a record."""
    return record[:, i : i + 1].view(nl.float32)


def transpose_chunk(w):
    """K and V of the chunk that is loading, to [d, keys]."""
    if w.sizes.guarded:
        take(w, w.k_next, w.loading)
        take(w, w.v_next, w.loading)
    for i_block in range(w.sizes.n_blocks):
        nisa.tensor_copy(dst=w.kt_sb[:, i_block, :], src=turn_keys(w, w.k_next, i_block))
        nisa.activation(dst=w.vt_sb[:, i_block, :], op=nl.copy, data=turn_keys(w, w.v_next, i_block))


def turn_keys(w, rows, i_block):
    """A block of d of a chunk's rows, transposed, in PSUM."""
    z = w.sizes
    turn = next_turn(w)
    for i in range(z.kv_tiles):
        transpose(w, turn[0 : z.db, i, :], rows[:, i, i_block * z.db : (i_block + 1) * z.db])
    return turn[0 : z.db, 0 : z.kv_tiles, :].reshape((z.db, z.keys))


def begin_chunk(w, step, records, penalties):
    """Take over the chunk whose keys are transposed, and load the next one's; `records`, `penalties`: `attend`."""
    z = w.sizes
    gpsimd = nisa.engine.gpsimd
    part = step.part % len(w.now)
    now = w.now[part]
    nisa.tensor_copy(dst=now, src=w.loading, engine=gpsimd)
    if step.masked or w.selection != None:
        # Rows see keys lo..hi of their sequence, the chunk has base..stop of them.
        base, stop = column(now, 1), column(now, 2)
        lo, hi = w.block_now[:, 1, :].view(nl.float32), w.block_now[:, 2, :].view(nl.float32)
        nisa.tensor_tensor(dst=w.lo, data1=lo, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=gpsimd)
        nisa.tensor_tensor(dst=w.hi, data1=hi, data2=stop.broadcast(1, z.q_tiles), op=nl.minimum, engine=gpsimd)
        nisa.tensor_tensor(dst=w.hi, data1=w.hi, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=gpsimd)
        if w.selection != None:
            begin_chunk_planes(w, base, w.block_now)
    if z.skips:
        lse = w.neg_lse.reshape((nl.tile_size.pmax, z.n_tiles)).expand_dim(2).broadcast(2, z.kv_tiles)
        penalty = w.penalty_next.reshape_dim(1, (z.n_tiles, z.kv_tiles))
        nisa.tensor_tensor(dst=w.tile_bias[part], data1=lse, data2=penalty, op=nl.add, engine=gpsimd)
    nisa.tensor_copy(dst=w.k_sb[part], src=w.k_next, engine=gpsimd)
    fetch_chunk(w, records)
    fetch_penalties(w, penalties)


def fetch_sums(w, step):
    """What dK and dV of the chunk add to: loaded when the chunk before it is stored, as that may be the same one."""
    now = w.now[step.part % len(w.now)]
    load_keys(w, w.dv_sb, w.dv_sum, now)
    load_keys(w, w.dk_sb, w.dk_sum, now)
    w.begun = 0


def finish_chunk(w, step):
    """dK and dV of the chunk to HBM."""
    now = w.now[step.part % len(w.now)]
    add_sums(w, w.dv_sum, w.dv_sb, w.dv_ps, 1.0, now)
    add_sums(w, w.dk_sum, w.dk_sb, w.dk_ps, w.softmax_scale, now)


def add_sums(w, x_hbm, x_sb, x_ps, factor, record):
    """A chunk's rows of a sum in HBM: what they were plus a factor times those in PSUM."""
    x = x_sb[:, 0 : w.begun, :]
    nisa.scalar_tensor_tensor(
        dst=x, data=x_ps[:, 0 : w.begun, :], op0=nl.multiply, operand0=factor, op1=nl.add, operand1=x
    )
    store_keys(w, x_hbm, x_sb, record)


# ---------------------------------------------------------------------------------------------------
# Transposes


def next_turn(w):
    """The bank of transposed tiles whose turn it is."""
    turn = w.t_ps[w.turn % len(w.t_ps)]
    w.turn = w.turn + 1
    return turn


def transpose(w, dst, src):
    """dst [n, 128] in PSUM = src [128, n] the other way round."""
    nisa.nc_matmul(dst=dst, stationary=src, moving=w.identity, is_transpose=w.by_bits, accumulate=False)
