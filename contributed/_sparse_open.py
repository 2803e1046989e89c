"""Gated decode: the tiles that gates leave open, listed before their keys are read.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. A tile is closed if the largest product of an extreme
alpha of its group and an extreme delta of its keys is far below those of the tiles before it. The open ones are written
one after the other, so that items are full whatever share is closed: keys, values, matmuls and exponentials are those
of open tiles.

The first keys wait for as little as can be. A few tiles are tested before all others: those that the first items have
if none is closed (`TilesAhead`). If all of these are open, the first items are known, and their keys come while the
others are tested; else they wait for the list of the first trip. Where no tile at all is closed, the list is the one
that the host knows, which is then in its place before it is asked for.
`_sparse_open_state.py` has what all of this stands in.
"""

from __future__ import annotations

from contributed._decode_loads import flat_rows, gather
from contributed._decode_state import LOWEST, MASKED, tile
from contributed._nki import nisa, nl
from contributed._sparse_open_state import (
    BEST,
    COUNT,
    ENDED,
    HIGH,
    LIMIT,
    LOW,
    NO_TILE,
    NONE,
    START,
    STATE,
    THERE,
    TURNS,
    column,
    is_positive,
    largest_product,
    partitions_first,
    take_extremes,
)


def load_first_tiles(w, tiles):
    """What `list_and_begin` begins with, as soon as it can be had: units of the first block's rows, and deltas."""
    tiles.ahead.load()
    ask_for_rows(w, tiles, 0)
    nisa.dma_copy(dst=tiles.n_tiles, src=tiles.gating.n_tiles)
    if tiles.gating.chunks.shape[0] == 1:
        load_first_chunk(tiles, 0)


def load_first_chunk(tiles, block):
    """Deltas of a block's first tiles."""
    nisa.register_load(tiles.chunk, tiles.gating.chunks.select(0, block)[0:1])
    load_tiles(tiles, tiles.chunk)


def test_all(w, x, tiles):
    """Tests all tiles, several trips at a time, and lists them, but for the last ones of the first block.

    These are listed by `write_tiles` and `list_others`, or by `correct_list`.
    """
    n_blocks, n_rows = tiles.gating.chunks.shape[0], tiles.n_rows
    if n_blocks == 1:
        take_extremes(tiles.extremes, tiles.delta)

    def other_block(i):
        load_first_chunk(tiles, i)
        take_extremes(tiles.extremes, tiles.delta)
        ask_for_rows(w, tiles, i)
        begin_block(tiles, i)
        spread_rows(w, tiles)
        test_block(w, tiles, i)
        write_tiles(w, tiles, 0, n_rows)
        follow_tiles(w, tiles)
        end_block(w, x, tiles, i)

    if n_blocks > 1:
        nl.fori_loop(1, n_blocks, other_block)
        load_first_chunk(tiles, 0)
        take_extremes(tiles.extremes, tiles.delta)
        ask_for_rows(w, tiles, 0)
        begin_block(tiles, 0)
    spread_rows(w, tiles)
    test_block(w, tiles, 0)


def list_others(w, x, tiles, n_trips):
    """The first block's list, where the tiles of the first trip are there."""
    follow_tiles(w, tiles)
    end_block(w, x, tiles, 0)
    if tiles.n_rows > w.sizes.n_lanes:
        write_tiles(w, tiles, w.sizes.n_lanes, tiles.n_rows)
    join_trips(tiles, n_trips)


def correct_list(w, x, tiles, n_trips):
    """The first block's list, where none of the first items' tiles is closed.

    If blocks are one chunk each, what the host knows stands there, and stays if no other tile is closed.
    """
    follow_tiles(w, tiles)
    natural, n_rows = tiles.gating.natural, tiles.n_rows

    def correct(_):
        tiles.clear(natural.shape[0])
        write_tiles(w, tiles, 0, n_rows)

    if tiles.is_known:
        closed = column(n_rows)
        nisa.tensor_tensor(dst=closed, data1=tiles.n_tiles, data2=tiles.of_row[:, COUNT], op=nl.subtract)
        nl.fori_loop(0, is_positive(w, closed), correct)
    else:
        write_tiles(w, tiles, 0, n_rows)
    end_block(w, x, tiles, 0)
    join_trips(tiles, n_trips)


def copy_known(tiles):
    """What the host knows of the first block's list if no tile is closed."""
    natural = tiles.gating.natural
    if tiles.is_known:
        nisa.dma_copy(dst=tiles.items[0 : natural.shape[0]], src=natural)


def test_block(w, tiles, block):
    """A block's tiles from those on that have been asked for; the last ones are tested, but not yet in the list."""
    last = nisa.register_alloc()
    nisa.register_load(last, tiles.gating.chunks.select(0, block)[1:2])

    def chunk(j):
        test_tiles(w, tiles)
        write_tiles(w, tiles, 0, tiles.n_rows)
        follow_tiles(w, tiles)
        load_tiles(tiles, j, 1)
        take_extremes(tiles.extremes, tiles.delta)

    nl.fori_loop(tiles.chunk, last, chunk)
    test_tiles(w, tiles)


def join_trips(tiles, n_trips):
    """Each trip's first two items also after the last one of the trip before, where they are asked for.

    From the last trip on, as the second of them may be that of a further one.
    """
    backwards = tiles.gating.backwards

    def join(i):
        trip, end, first = nisa.register_alloc(), nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(trip, backwards.select(0, i)[0:1])
        nisa.register_load(end, tiles.bounds.select(0, trip)[1:2])
        nisa.register_load(first, tiles.bounds.select(0, trip)[3:4])
        for further in range(2):
            nisa.dma_copy(dst=tiles.items[further:].select(0, end), src=tiles.items[further:].select(0, first))

    nl.fori_loop(0, n_trips - 1, join)


def ask_for_rows(w, tiles, block):
    """Units of a block's rows, their alphas and limits, and where their first sides are."""
    gating = tiles.gating
    # By descriptors made on the device where there are any: other static loads are many, and in line.
    mode = nisa.dge_mode.hwdge if w.has_hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=tiles.units, src=gating.units.select(0, block), dge_mode=mode)
    gather(tiles.alphas, tiles.by_unit, tiles.units)
    gather(tiles.of_row[:, LIMIT], gating.limits, tiles.units)
    nisa.dma_copy(dst=tiles.first_side, src=gating.first_side.select(0, block))
    nisa.dma_copy(dst=tiles.in_use, src=gating.in_use.select(0, block))
    nisa.dma_copy(dst=tiles.floor, src=gating.floor.select(0, block))


def begin_block(tiles, block):
    """Extreme alphas and first places of a block's rows, and the bounds of their first sides' tiles.

    Such a tile is cut by the sequence's end, and so has a delta of 0 among its own.
    """
    gating, n_rows, n_keys = tiles.gating, tiles.n_rows, tiles.gating.in_use.shape[2]
    nisa.dma_copy(dst=tiles.of_row[:, START], src=gating.start.select(0, block))
    nisa.dma_copy(dst=tiles.row_bounds, src=gating.bounds.select(0, block))
    low, high = tiles.of_row[:, LOW], tiles.of_row[:, HIGH]
    nisa.tensor_reduce(dst=high, op=nl.maximum, data=tiles.alphas, axis=1)
    nisa.tensor_reduce(dst=low, op=nl.minimum, data=tiles.alphas, axis=1)
    nisa.memset(dst=tiles.of_row[:, BEST], value=LOWEST)
    nisa.memset(dst=tiles.of_row[:, COUNT], value=0.0)
    nisa.memset(dst=tiles.opened, value=0.0)

    def first_sides(_):
        # What is not in use may be NaN.
        found, delta = tile((n_rows, n_keys), gating.delta.dtype), tile((n_rows, n_keys), gating.delta.dtype)
        nisa.memset(dst=found, value=0.0)
        nisa.memset(dst=delta, value=0.0)
        gather(found, gating.delta, tiles.first_side)
        nisa.tensor_copy_predicated(dst=delta, src=found, predicate=tiles.in_use.view(nl.uint32))
        extremes, bound = tile((n_rows, 2, 1), nl.float32), column(n_rows)
        nisa.tensor_reduce(dst=extremes[:, 0], op=nl.maximum, data=delta, axis=1)
        nisa.tensor_reduce(dst=extremes[:, 1], op=nl.minimum, data=delta, axis=1)
        largest_product(bound, extremes, low, high)
        nisa.tensor_tensor(dst=bound, data1=bound, data2=tiles.floor, op=nl.add)
        nisa.tensor_scalar(dst=tiles.of_row[:, BEST], data=bound, op0=nl.maximum, operand0=LOWEST)

    there = nisa.register_alloc()
    nisa.register_load(there, gating.chunks.select(0, block)[2:3])
    nl.fori_loop(0, there, first_sides)


def load_tiles(tiles, chunk, further=0):
    """Deltas of some tiles of every row."""
    gating, used, m, delta = tiles.gating, tiles.used, tiles.m, tiles.delta
    nisa.dma_copy(dst=tiles.first, src=gating.rows[further:].select(0, chunk)[0:used])
    nisa.dma_copy(dst=tiles.kind, src=gating.kinds[further:].select(0, chunk)[0:used])
    # In two parts, of which the first can be worked at while the second comes.
    part = max(1, m // 2)
    for begin in range(0, m, part):
        keys = part * delta.shape[2]
        src = gating.delta.ap([[1, used], [1, keys]], offset=begin * delta.shape[2], vector_offset=tiles.first)
        nisa.dma_copy(dst=delta[:, begin : begin + part], src=src, oob_mode=nisa.oob_mode.skip)
    first = tiles.first.broadcast(1, m * tiles.n_granules)
    nisa.tensor_tensor(dst=tiles.keys, data1=first, data2=tiles.inside, op=nl.add)


def test_tiles(w, tiles):
    """The tiles that have come against their gates' limits: the list's elements of the open ones, and their keys."""
    used, m, kind = tiles.used, tiles.m, tiles.kind
    low, high, limit = tiles.spread[:, LOW], tiles.spread[:, HIGH], tiles.spread[:, LIMIT]

    product, bound = tile((used, m), nl.float32), tile((used, m), nl.float32)
    nisa.memset(dst=bound, value=MASKED)
    largest_product(product, tiles.extremes, low, high)
    # A partition may hold keys that are no tile of its row's, NaN among them.
    nisa.tensor_copy_predicated(dst=bound, src=product, predicate=kind.view(nl.uint32))

    # The largest of the tiles before each: of the partitions before its own, and then along the partition.
    largest, wide, before = column(used), tile((used, used), nl.float32), tile((used, used + 1), nl.float32)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=bound, axis=1)
    nisa.tensor_scalar(dst=wide, data=largest.broadcast(1, used), op0=nl.maximum, operand0=LOWEST)
    turned_ps = w.m_ps.reshape((nl.tile_size.pmax, w.t_ps.shape[1]))[0:used, 0:used]
    partitions_first(w, turned_ps, wide)
    nisa.tensor_tensor(dst=before[:, 0:used], data1=turned_ps, data2=tiles.masked, op=nl.add)
    nisa.tensor_copy(dst=before[:, used : used + 1], src=tiles.spread[:, BEST])
    runs = tile((used, m + 1), nl.float32)
    nisa.tensor_reduce(dst=runs[:, 0:1], op=nl.maximum, data=before, axis=1)
    nisa.tensor_tensor_scan(
        dst=runs[:, 1 : m + 1], data0=bound, data1=bound, initial=runs[:, 0:1], op0=nl.maximum, op1=nl.maximum
    )
    is_open = tile((used, m), nl.float32)
    nisa.scalar_tensor_tensor(
        dst=is_open, data=runs[:, 0:m], op0=nl.add, operand0=limit, op1=nl.less_equal, operand1=bound
    )
    listed = is_open
    if tiles.has_last_sides:
        # The last side's tile, the last of all, has no place in an item.
        listed = tile((used, m), nl.float32)
        nisa.scalar_tensor_tensor(dst=listed, data=kind, op0=nl.less, operand0=1.5, op1=nl.multiply, operand1=is_open)
    nisa.tensor_reduce(dst=tiles.counts[:, 0:1], op=nl.add, data=listed, axis=1)
    count_ps, base, places = w.t_ps[0:used, 0:1], column(used), tile((used, m), nl.float32)
    before = tiles.before.reshape((used, used))
    nisa.nc_matmul(dst=count_ps, stationary=before, moving=tiles.counts[:, 0:1], accumulate=False)
    nisa.tensor_tensor(dst=base, data1=count_ps, data2=tiles.spread[:, COUNT], op=nl.add)
    ones = w.ones[0:used, 0:m]
    nisa.tensor_tensor_scan(dst=places, data0=ones, data1=listed, initial=base, op0=nl.multiply, op1=nl.add)
    element = tile((used, m), nl.int32)
    per_tile = float(tiles.n_granules * w.sizes.n_lanes)
    nisa.tensor_scalar(
        dst=element, data=places, op0=nl.multiply, operand0=per_tile, op1=nl.add, operand1=tiles.spread[:, START]
    )
    nisa.memset(dst=tiles.index, value=NO_TILE)
    nisa.tensor_copy_predicated(dst=tiles.index, src=element, predicate=listed.view(nl.uint32))
    nisa.tensor_reduce(dst=tiles.counts[:, 1:2], op=nl.add, data=is_open, axis=1)


def follow_tiles(w, tiles):
    """What the rows' next tiles go on from."""
    n_rows, used = tiles.n_rows, tiles.used
    of_rows_ps = w.t_ps[0:n_rows, 0:2]
    nisa.nc_matmul(dst=of_rows_ps, stationary=tiles.row_of, moving=tiles.counts, accumulate=False)
    count, best = tiles.of_row[:, COUNT], tiles.of_row[:, BEST]
    nisa.tensor_tensor(dst=count, data1=count, data2=of_rows_ps[:, 0:1], op=nl.add)
    nisa.tensor_tensor(dst=tiles.opened, data1=tiles.opened, data2=of_rows_ps[:, 1:2], op=nl.add)
    masked, largest = tile((n_rows, used), nl.float32), column(n_rows)
    own, turned_ps = tiles.own.reshape((n_rows, used)), w.m_ps.reshape((nl.tile_size.pmax, w.t_ps.shape[1]))
    nisa.tensor_scalar(dst=masked, data=own, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED)
    nisa.tensor_tensor(dst=masked, data1=turned_ps[0:n_rows, 0:used], data2=masked, op=nl.add)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=masked, axis=1)
    nisa.tensor_tensor(dst=best, data1=best, data2=largest, op=nl.maximum)
    spread_rows(w, tiles)


def spread_rows(w, tiles):
    """What is known of the rows, onto their partitions."""
    spread_ps = w.t_ps[0 : tiles.used, 0:STATE]
    own = tiles.own.reshape((tiles.n_rows, tiles.used))
    nisa.nc_matmul(dst=spread_ps, stationary=own, moving=tiles.of_row, accumulate=False)
    nisa.tensor_copy(dst=tiles.spread, src=spread_ps)


def write_tiles(w, tiles, first_row, end_row):
    """The keys of some rows' open tiles into the list."""
    flat, n = flat_rows(tiles.items, 1), tiles.n_granules
    rows = slice(first_row * tiles.per_row, end_row * tiles.per_row)
    for i in range(tiles.m):
        dst = flat.ap([[1, rows.stop - rows.start], [w.sizes.n_lanes, n]], vector_offset=tiles.index[rows, i : i + 1])
        nisa.dma_copy(dst=dst, src=tiles.keys[rows, i * n : (i + 1) * n], oob_mode=nisa.oob_mode.skip)


def end_block(w, x, tiles, block):
    """Trips' bounds: as many items as the lane with the most open tiles needs."""
    n_lanes, n_rows, n_trips = w.sizes.n_lanes, tiles.n_rows, tiles.n_trips
    pmax = nl.tile_size.pmax
    across = w.m_ps[0:1, 0, 0:n_rows]
    partitions_first(w, across, tiles.of_row[:, COUNT])
    most, bounds = tile((1, n_trips), nl.int32), tiles.row_bounds
    nisa.tensor_reduce(dst=most, op=nl.maximum, data=across.reshape_dim(1, (n_trips, n_lanes)), axis=2)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.add, operand0=x.n_tiles - 1)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.right_shift, operand0=log2(x.n_tiles))
    nisa.tensor_scalar(dst=most, data=most, op0=nl.maximum, operand0=1)
    # Not by the GpSimd Engine, which has descriptors to make. Below 2^24 that is exact.
    ends = bounds[:, :, 1]
    nisa.tensor_tensor(dst=ends, data1=ends, data2=most, op=nl.add, engine=nisa.engine.vector)
    by_block = tiles.bounds.reshape((tiles.gating.units.shape[0], 1, n_trips, 5))
    nisa.dma_copy(dst=by_block.select(0, block), src=bounds)

    write_turns(w, x, tiles, block)
    if tiles.has_last_sides:
        difference, is_open = column(n_rows), tile((n_rows, pmax), nl.float32)
        nisa.tensor_tensor(dst=difference, data1=tiles.opened, data2=tiles.of_row[:, COUNT], op=nl.subtract)
        nisa.tensor_copy(dst=is_open, src=difference.broadcast(1, pmax))
        open_ps = w.m_ps[:, 1, 0:n_rows]
        partitions_first(w, open_ps, is_open)
        on_partitions = tile((pmax, n_trips, n_lanes), nl.float32)
        nisa.tensor_copy(dst=on_partitions, src=open_ps.reshape_dim(1, (n_trips, n_lanes)))
        by_block = tiles.last.reshape((tiles.gating.units.shape[0], n_trips, pmax, n_lanes)).permute((0, 2, 1, 3))
        nisa.dma_copy(dst=by_block.select(0, block), src=on_partitions)


def write_turns(w, x, tiles, block):
    """What there is to do for each item and lane of a block's trips, items on partitions."""
    n_lanes, n_rows, n_trips, pmax = w.sizes.n_lanes, tiles.n_rows, tiles.n_trips, nl.tile_size.pmax
    shape = (tiles.gating.units.shape[0], n_trips, tiles.room, n_lanes, TURNS)
    by_item = tiles.turns[1:].reshape(shape).permute((0, 2, 1, 3, 4)).select(0, block)
    counts, counts_ps = tile((n_rows, pmax), nl.float32), w.m_ps[:, 1, 0:n_rows]
    # A lane without tiles has an item without tiles.
    count = tiles.of_row[:, COUNT].broadcast(1, pmax)
    nisa.tensor_scalar(dst=counts, data=count, op0=nl.maximum, operand0=1.0)
    partitions_first(w, counts_ps, counts)
    for first in range(0, tiles.room, pmax):
        n = min(pmax, tiles.room - first)
        before, item_before = column(pmax), column(pmax)
        nisa.tensor_scalar(dst=before, data=tiles.tiles_before, op0=nl.add, operand0=float(first * x.n_tiles))
        nisa.tensor_scalar(dst=item_before, data=before, op0=nl.add, operand0=-float(x.n_tiles))
        there, turns = tile((pmax, n_rows), nl.float32), tile((pmax, n_rows, TURNS), nl.int32)
        nisa.tensor_scalar(dst=there, data=counts_ps, op0=nl.greater, operand0=before)
        nisa.tensor_copy(dst=turns[:, :, THERE], src=there)
        nisa.tensor_scalar(dst=turns[:, :, NONE], data=counts_ps, op0=nl.less_equal, operand0=before)
        nisa.scalar_tensor_tensor(
            dst=turns[:, :, ENDED],
            data=counts_ps,
            op0=nl.greater,
            operand0=item_before,
            op1=nl.subtract,
            operand1=there,
        )
        nisa.dma_copy(dst=by_item[first : first + n], src=turns[0:n].reshape_dim(1, (n_trips, n_lanes)))


def log2(n):
    """Of a power of two."""
    bits = 0
    while 2**bits < n:
        bits = bits + 1
    return bits
