"""Prefill: what comes from HBM and goes there, and transposes. `w` is the launch's `State`.

Loads run ahead of the work: the queries of a block while the block before it is in work, K and V of a chunk likewise.
Records of where they are come one earlier still.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_select import begin_chunk_planes
from contributed._prefill_skip import begin_rows
from contributed._prefill_state import EMPTY, MASKED, PART_TILES, RECORD_COLUMNS, RESULTS, TINY, TURNS, tile


def fetch_block(w, records, whole):
    """The queries of the block whose record has come, and the record [128, 7, q_tiles] of the block after it.

    Args:
        w: the launch's `State`.
        records: of the block after it.
        whole: register, 1 if the block has all its rows, 0 if not; None if all blocks of the launch have.
    """
    nisa.tensor_copy(dst=w.block_loading, src=w.block_coming, engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=w.block_coming, src=records)
    z = w.sizes
    rows = w.block_loading[:, 0, :]
    if not z.ragged:
        load_tiles(w, rows, z.q_tiles)
        return

    def all_rows(_):
        load_tiles(w, rows, z.q_tiles)

    def some_rows(_):
        load_tiles(w, rows, z.sure_tiles)
        for row_tile in range(z.sure_tiles, z.q_tiles):
            src = chosen_rows(w.q, rows[:, row_tile : row_tile + 1])
            nisa.dma_copy(dst=w.q_sb[:, row_tile, :], src=src, oob_mode=nisa.oob_mode.skip)

    nl.fori_loop(0, whole, all_rows)
    nl.fori_loop(whole, 1, some_rows)


def load_tiles(w, rows, n_tiles):
    """The first row tiles of the block that is loading, in parts, so that the first one can be worked on early."""
    step = part_rows(w.sizes)
    for first in range(0, n_tiles, step):
        end = min(n_tiles, first + step)
        nisa.dma_copy(dst=w.q_sb[:, first:end, :], src=block_rows(w, w.q, rows, first, end))


def part_rows(z):
    """Row tiles of a part of a block, whose tiles come and go together."""
    return max(1, PART_TILES // z.heads)


def part_tiles(z):
    """The same, of all heads."""
    return part_rows(z) * z.heads


def block_rows(w, x_hbm, rows, first, end):
    """Row tiles first..end of a block, that have all their rows, [128, end - first, width] of `x_hbm`.

    `rows` [128, q_tiles] are numbers of rows; of a row of queries each unit's heads are one.
    """
    pmax, width = nl.tile_size.pmax, x_hbm.shape[1]
    step = w.n_units * width
    pattern = [[step, pmax], [step * pmax, end - first], [1, width]]
    return x_hbm.ap(pattern, offset=first * step * pmax, scalar_offset=rows[0:1, 0:1])


def chosen_rows(x_hbm, rows):
    """Rows rows[p], [128, width]."""
    width = x_hbm.shape[1]
    return x_hbm.ap([[width, nl.tile_size.pmax], [1, width]], vector_offset=rows)


def take_over(w):
    """The record of the block whose queries are loading to the one in work, whose rows have seen nothing yet."""
    nisa.tensor_copy(dst=w.block_now, src=w.block_loading, engine=nisa.engine.gpsimd)
    nisa.memset(dst=w.m, value=-w.floor, engine=nisa.engine.gpsimd)
    nisa.memset(dst=w.l, value=0.0, engine=nisa.engine.gpsimd)
    if w.skipping != None:
        begin_rows(w)


def begin_block(w, records, whole):
    """The queries of the block in work, which have come, and load the next one's; `records`, `whole`: `fetch_block`."""
    transpose_queries(w)
    fetch_block(w, records, whole)


def transpose_queries(w):
    """Queries of the block to [d, rows], times the sign of the scale; there are no scores, whose PSUM they take."""
    z = w.sizes
    n_turns, per_turn = 0, w.row_ps[0].shape[1]
    for i_block in range(z.n_blocks):
        for first in range(0, z.n_tiles, per_turn):
            n = min(per_turn, z.n_tiles - first)
            turn = w.row_ps[n_turns % len(w.row_ps)]
            for i in range(n):
                row_tile, head = (first + i) // z.heads, (first + i) % z.heads
                at = head * z.d + i_block * z.db
                transpose(w, turn[0 : z.db, i, :], w.q_sb[:, row_tile, at : at + z.db])
            dst = w.qt_sb[:, i_block, first : first + n, :]
            if n_turns % 2 == 0:
                nisa.tensor_scalar(dst=dst, data=turn[0 : z.db, 0:n, :], op0=nl.multiply, operand0=w.q_sign)
            else:
                nisa.activation(dst=dst, op=nl.copy, data=turn[0 : z.db, 0:n, :], scale=w.q_sign)
            if w.selection != None and w.selection.by_tensor:
                neg = w.selection.neg_qt[:, first : first + n, :]
                nisa.activation(dst=neg, op=nl.copy, data=turn[0 : z.db, 0:n, :], scale=-w.q_sign)
            n_turns = n_turns + 1


def fetch_keys(w, records):
    """K of the chunk whose record has come, and the record of the chunk after it."""
    nisa.tensor_copy(dst=w.loading, src=w.coming, engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=w.coming, src=records)
    fetch_rows(w, w.k_next, w.k)


def fetch_values(w):
    """V of the chunk whose K is loading."""
    fetch_rows(w, w.v_next, w.v)


def fetch_rows(w, dst, x_hbm):
    """Rows [128, kv_tiles, d] of the chunk that is loading, plane by plane."""
    z = w.sizes
    pmax, step, m = nl.tile_size.pmax, w.kv_heads * z.d, z.planes
    groups = pmax // m
    for i in range(m):
        pattern = [[step * m, groups], [step * pmax, z.kv_tiles], [1, z.d]]
        src = x_hbm.ap(pattern, offset=i * step, scalar_offset=w.loading[0:1, 0:1])
        nisa.dma_copy(dst=dst[i * groups : (i + 1) * groups], src=src)


def begin_chunk(w, records):
    """Take over the chunk that has been loaded and whose K is transposed, and load the next one's K."""
    z = w.sizes
    # Decisions about tiles of the chunk before still keep the GpSimd Engine busy, if there are any.
    engine = nisa.engine.gpsimd if w.skipping == None else nisa.engine.vector
    nisa.tensor_copy(dst=w.now, src=w.loading, engine=engine)
    fetch_keys(w, records)
    # Rows see keys lo..hi of their sequence, the chunk has base..stop of them.
    base, stop = column(w.now, 1), column(w.now, 2)
    lo, hi = w.block_now[:, 1, :].view(nl.float32), w.block_now[:, 2, :].view(nl.float32)
    nisa.tensor_tensor(dst=w.lo, data1=lo, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=engine)
    nisa.tensor_tensor(dst=w.hi, data1=hi, data2=stop.broadcast(1, z.q_tiles), op=nl.minimum, engine=engine)
    nisa.tensor_tensor(dst=w.hi, data1=w.hi, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=engine)
    if w.selection != None:
        begin_chunk_planes(w, base, w.block_now)


def begin_values(w):
    """Take over the chunk's V, and load the next one's."""
    take(w, w.v_sb, w.v_next, w.now)
    fetch_values(w)


def column(record, i):
    """A float32 column of a record."""
    return record[:, i : i + 1].view(nl.float32)


def take(w, dst, src, record):
    """A chunk's rows [128, kv_tiles, d]; with guards, zeros in place of rows that belong to no key."""
    z = w.sizes
    if not z.guarded:
        nisa.tensor_copy(dst=dst, src=src)
        return
    # Bits, as numbers that are none would stay. An odd number of two-byte elements is no number of four-byte ones.
    bits = nl.int32 if dst.dtype == nl.float32 else nl.int16
    for t in range(z.kv_tiles):
        guard = record[:, RECORD_COLUMNS + t : RECORD_COLUMNS + t + 1].view(bits)[:, 0:1]
        nisa.tensor_scalar(
            dst=dst[:, t, :].view(bits), data=src[:, t, :].view(bits), op0=nl.bitwise_and, operand0=guard
        )


def transpose_chunk(w, by_scalar=False):
    """K of the chunk that is loading, to [d, keys]; `by_scalar`: out of PSUM by the Scalar Engine alone."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    k = w.k_next
    if z.guarded:
        take(w, k, k, w.loading)
    for i_block in range(z.n_blocks):
        for first in range(0, z.kv_tiles, w.per_turn):
            n = min(w.per_turn, z.kv_tiles - first)
            turn = next_turn(w)
            for i in range(n):
                transpose(w, turn[0 : z.db, i, :], k[:, first + i, i_block * z.db : (i_block + 1) * z.db])
            dst = w.kt_sb[:, i_block, first * pmax : (first + n) * pmax]
            src = turn[0 : z.db, 0:n, :].reshape((z.db, n * pmax))
            if by_scalar:
                nisa.activation(dst=dst, op=nl.copy, data=src)
            else:
                evict(w, dst, src)


def next_turn(w):
    """The bank of transposed tiles whose turn it is."""
    turn = w.t_ps[w.turn % TURNS]
    w.turn = w.turn + 1
    return turn


def transpose(w, dst, src):
    """dst [n, 128] in PSUM = src [128, n] the other way round."""
    nisa.nc_matmul(dst=dst, stationary=src, moving=w.identity, is_transpose=w.by_bits, accumulate=False)


def evict(w, dst, src, by_vector=False):
    """Transposed tiles out of PSUM; the Vector and the Scalar Engine take turns."""
    if by_vector or w.turn % 2 == 0:
        nisa.tensor_copy(dst=dst, src=src)
    else:
        nisa.activation(dst=dst, op=nl.copy, data=src)


class Results(nl.NKIObject):  # type: ignore[misc]
    """Which outputs of a block are complete, and which of these are normalised.

    Args:
        sizes: of the launch.
    """

    def __init__(self, sizes):
        z = sizes
        self.part = part_tiles(z)  # tiles whose outputs are stored together
        self.missing: list[int] = []  # of each part, tiles whose outputs are not complete
        for first in range(0, z.n_tiles, self.part):
            self.missing.append(min(self.part, z.n_tiles - first))
        self.n_tiles = z.n_tiles
        # First tiles of parts that are complete; how many of these have their sums inverted, how many are normalised,
        # and tiles that are of the next one.
        self.ready: list[int] = []
        self.n_inverted = 0
        self.n_parts = 0
        self.n_finished = 0

    def complete(self, tile):
        """The output of a tile is complete."""
        i = tile // self.part
        self.missing[i] = self.missing[i] - 1
        if self.missing[i] == 0:
            self.ready.append(i * self.part)

    def end(self):
        """All outputs are complete. Returns tiles that are not normalised, part by part."""
        for i in range(len(self.missing)):
            if self.missing[i] > 0:
                self.ready.append(i * self.part)
                self.missing[i] = 0
        rest: list[slice] = []
        n_done = self.n_finished
        for first in self.ready[self.n_parts :]:
            rest.append(slice(first + n_done, min(first + self.part, self.n_tiles)))
            n_done = 0
        return rest


def invert_some(w, results):
    """Sums of the parts that are complete and what their outputs are multiplied by, in time for `finish_some`."""
    if results.n_inverted == 0 and len(results.ready) > 0:
        begin_results(w)
    i = results.n_inverted
    while i < len(results.ready):
        # Parts that follow each other at once.
        first, end = results.ready[i], results.ready[i] + results.part
        i = i + 1
        while i < len(results.ready) and results.ready[i] == end:
            i, end = i + 1, end + results.part
        invert_sums(w, slice(first, min(end, w.sizes.n_tiles)))
    results.n_inverted = len(results.ready)


def finish_some(w, results, n):
    """Outputs of up to n tiles of a part whose sums are inverted, by the GpSimd Engine, while others are in work."""
    z, gpsimd = w.sizes, nisa.engine.gpsimd
    if results.n_parts == results.n_inverted:
        return
    part = results.ready[results.n_parts]
    first, end_of_part = part + results.n_finished, min(part + results.part, z.n_tiles)
    end = min(first + n, end_of_part)
    o = w.o[:, first:end, :]
    factor = w.inverse[:, first:end].expand_dim(2).broadcast(2, z.d)
    nisa.tensor_tensor(dst=outputs(w)[:, first:end, :], data1=o, data2=factor, op=nl.multiply, engine=gpsimd)
    nisa.memset(dst=o, value=0.0, engine=gpsimd)
    results.n_finished = end - part
    if end == end_of_part:
        results.n_parts = results.n_parts + 1
        results.n_finished = 0
        if not z.ragged:
            store_part(w, part // z.heads)


def finish_block(w, results, whole):
    """Normalise the block's other outputs, store them and all lse, and take over the next block.

    Args:
        w: the launch's `State`.
        results: of the block.
        whole: as in `fetch_block`.
    """
    z = w.sizes
    rest = results.end()
    invert_some(w, results)
    if w.lse_hbm != None:
        lse, empty = w.lse_sb.reshape(w.l.shape), tile(w.l.shape, nl.float32)
        nisa.activation(dst=lse, op=nl.log, data=w.sums)
        nisa.scalar_tensor_tensor(dst=lse, data=w.m, op0=nl.multiply, operand0=w.scale, op1=nl.add, operand1=lse)
        # Twice MASKED is beyond float32: an empty row's lse becomes -inf.
        nisa.tensor_scalar(dst=empty, data=w.sums, op0=nl.less, operand0=EMPTY, op1=nl.multiply, operand1=MASKED)
        nisa.scalar_tensor_tensor(dst=lse, data=empty, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=lse)
        if z.ragged:
            store_rows(w, w.lse_hbm, w.lse_sb, whole)
        else:
            nisa.dma_copy(dst=block_rows(w, w.lse_hbm, w.block_storing[:, RESULTS, :], 0, z.q_tiles), src=w.lse_sb)
    # Nobody reads them any more, and the next block waits for them, not for its outputs.
    take_over(w)
    for tiles in rest:
        for i in range(tiles.start, tiles.stop):
            dst, factor = outputs(w)[:, i, :], w.inverse[:, i : i + 1]
            if i % 2 == 0:
                nisa.tensor_scalar(dst=dst, data=w.o[:, i, :], op0=nl.multiply, operand0=factor)
            else:
                nisa.activation(dst=dst, op=nl.copy, data=w.o[:, i, :], scale=factor)
        nisa.memset(dst=w.o[:, tiles, :], value=0.0, engine=nisa.engine.gpsimd)
        if not z.ragged:
            store_part(w, tiles.start // results.part * results.part // z.heads)
    if z.ragged:
        store_rows(w, w.o_hbm, w.o_sb, whole)


def store_nothing(w, rows):
    """o = 0 and lse = -inf of rows that no block has, int32 [n, 128, columns], -1 for none."""
    pmax, z = nl.tile_size.pmax, w.sizes
    numbers = tile((pmax, rows.shape[2]), nl.int32)
    o, lse = tile((pmax, z.heads * z.d), w.o_sb.dtype), tile((pmax, z.heads), nl.float32)
    nisa.memset(dst=o, value=0.0)
    nisa.memset(dst=lse, value=float("-inf"))

    def some_rows(i):
        nisa.dma_copy(dst=numbers, src=rows.select(0, i))
        for j in range(rows.shape[2]):
            some = numbers[:, j : j + 1]
            nisa.dma_copy(dst=chosen_rows(w.o_hbm, some), src=o, oob_mode=nisa.oob_mode.skip)
            if w.lse_hbm != None:
                nisa.dma_copy(dst=chosen_rows(w.lse_hbm, some), src=lse, oob_mode=nisa.oob_mode.skip)

    nl.fori_loop(0, rows.shape[0], some_rows)


def begin_results(w):
    """Where the block's results go: a copy, as stores hold it for long."""
    nisa.tensor_copy(dst=w.block_storing, src=w.block_now)


def outputs(w):
    """The block's outputs as they are stored, [128, tiles, d]."""
    return w.o_sb.reshape((nl.tile_size.pmax, w.sizes.n_tiles, w.sizes.d))


def invert_sums(w, tiles):
    """Sums of some tiles' exponentials, and what their outputs are multiplied by."""
    nisa.tensor_scalar(dst=w.sums[:, tiles], data=w.l[:, tiles], op0=nl.maximum, operand0=TINY)
    nisa.reciprocal(dst=w.inverse[:, tiles], data=w.sums[:, tiles])


def store_part(w, first):
    """Outputs of the row tiles of a part, the first of which is given."""
    end = min(w.sizes.q_tiles, first + part_rows(w.sizes))
    rows = w.block_storing[:, RESULTS, :]
    nisa.dma_copy(dst=block_rows(w, w.o_hbm, rows, first, end), src=w.o_sb[:, first:end, :])


def store_rows(w, x_hbm, x_sb, whole):
    """The rows of a result of a block that may have fewer; `whole` as in `fetch_block`."""
    z = w.sizes
    rows = w.block_storing[:, RESULTS, :]

    def all_rows(_):
        nisa.dma_copy(dst=block_rows(w, x_hbm, rows, 0, z.q_tiles), src=x_sb)

    def some_rows(_):
        if z.sure_tiles > 0:
            nisa.dma_copy(dst=block_rows(w, x_hbm, rows, 0, z.sure_tiles), src=x_sb[:, 0 : z.sure_tiles, :])
        for row_tile in range(z.sure_tiles, z.q_tiles):
            dst = chosen_rows(x_hbm, rows[:, row_tile : row_tile + 1])
            nisa.dma_copy(dst=dst, src=x_sb[:, row_tile, :], oob_mode=nisa.oob_mode.skip)

    nl.fori_loop(0, whole, all_rows)
    nl.fori_loop(whole, 1, some_rows)
