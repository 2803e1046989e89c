"""Gated decode: the tiles that gates leave open, listed before their keys are read.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. A tile is closed if the largest product of an extreme
alpha of its group and an extreme delta of its keys is far below those of the tiles before it. The open ones are written
one after the other, so that items are full whatever share is closed: keys, values, matmuls and exponentials are those
of open tiles.

The first keys wait for as little as can be. A few tiles are tested before all others: those that the first items have
if none is closed (`TilesAhead`). If all of these are open, the first items are known, and their keys come while the
others are tested; else they wait for the list of the first trip. Where no tile at all is closed, the list is the one
that the host knows, which is then in its place before it is asked for.
"""

from __future__ import annotations

from contributed._decode_loads import flat_rows, gather
from contributed._decode_state import DMA_ENGINES, LOWEST, MASKED, tile
from contributed._nki import at_most, nisa, nl

NO_TILE = -1
# Of an item and lane: 1 if it has tiles; if not, but the item before it has; if not.
TURNS = 3
THERE, ENDED, NONE = range(TURNS)
# Columns of what is known of a row: extreme alphas, limit, largest bound so far, open tiles of items so far, and the
# element of the list that its tile would have that is before its first one.
STATE = 6
LOW, HIGH, LIMIT, BEST, COUNT, START = (slice(i, i + 1) for i in range(STATE))
FILL = 512  # of the list's elements per partition that are cleared at once


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


def mask_last_side(w, x, edges):
    """MASKED in place of the scores of a closed last side, of which no key was read."""
    penalty = tile(x.last_open.shape, nl.float32)
    nisa.tensor_scalar(dst=penalty, data=x.last_open, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED)
    for lane in range(w.sizes.n_lanes):
        side = edges[:, lane, :, x.last_edges]
        nisa.tensor_scalar(
            dst=side, data=side, op0=nl.add, operand0=penalty[:, lane : lane + 1], op1=nl.maximum, operand1=MASKED
        )


class TilesAhead(nl.NKIObject):  # type: ignore[misc]
    """Tiles that the first trip's first items have if none is closed, tested before all others.

    If all of them are open, these items are known, and their keys come while the other tiles are tested.

    Args:
        w: the launch's `State`.
        x: its `Skipping`.
        gating: its `Gating`.
        tile_kv: keys of a tile.
    """

    def __init__(self, w, x, gating, tile_kv):
        n_lanes, used, few = w.sizes.n_lanes, gating.ahead.shape[0], gating.ahead.shape[1] - 1
        self.few = few  # tiles on a partition
        self.of_lane = used // n_lanes  # partitions
        self.gating = gating
        self.table = tile((used, 1 + few), nl.int32)
        nisa.dma_copy(dst=self.table, src=gating.ahead)
        self.kinds = self.table[:, 1 : 1 + few].view(nl.float32)
        self.delta = tile((used, few, tile_kv), gating.delta.dtype)
        nisa.memset(dst=self.delta, value=0.0)
        # Extreme deltas of each tile, and its kind.
        self.found = tile((used, 3, few), nl.float32)
        nisa.memset(dst=self.found, value=0.0)
        # The items as they are then.
        x.ask_for_item(w, by_partition(gating.natural)[0])

    def load(self):
        """Their deltas."""
        gather(self.delta, self.gating.delta, self.table[:, 0:1])

    def turn(self, w):
        """Their extreme deltas and kinds, lanes on partitions and their tiles in the order of the visit."""
        n_lanes, of_lane, few = w.sizes.n_lanes, self.of_lane, self.few
        used, n = n_lanes * of_lane, of_lane * few
        eye = w.identity_f32[0:used, 0:used].reshape_dim(1, (n_lanes, of_lane))
        own, place = tile((used, n_lanes), nl.float32), tile((used, of_lane), nl.float32)
        nisa.tensor_reduce(dst=own, op=nl.add, data=eye, axis=2)
        nisa.tensor_reduce(dst=place, op=nl.add, data=eye.permute((0, 2, 1)), axis=2)

        extremes = tile((used, 2, few), nl.float32)
        take_extremes(extremes, self.delta)
        # A partition may hold keys that are no tile of its lane's, NaN among them.
        predicate = self.kinds.view(nl.uint32).expand_dim(1).broadcast(1, 2)
        nisa.tensor_copy_predicated(dst=self.found[:, 0:2], src=extremes, predicate=predicate)
        nisa.tensor_copy(dst=self.found[:, 2], src=self.kinds)
        by_place = tile((used, 3, of_lane, few), nl.float32)
        nisa.tensor_tensor(
            dst=by_place,
            data1=self.found.expand_dim(2).broadcast(2, of_lane),
            data2=place.reshape((used, 1, of_lane, 1)).broadcast(1, 3).broadcast(3, few),
            op=nl.multiply,
        )
        found_ps = w.t_ps[0:n_lanes, 0 : 3 * n]
        nisa.nc_matmul(dst=found_ps, stationary=own, moving=by_place.reshape((used, 3 * n)), accumulate=False)

    def is_one_closed(self, w, of_row):
        """A register that is 1 if one of them is closed, else 0. `of_row` is that of `OpenTiles`."""
        n_lanes, n = w.sizes.n_lanes, self.of_lane * self.few
        by_kind = w.t_ps[0:n_lanes, 0 : 3 * n].reshape_dim(1, (3, n))
        bound, runs = tile((n_lanes, n), nl.float32), tile((n_lanes, n + 1), nl.float32)
        closed, one = tile((n_lanes, n), nl.float32), column(n_lanes)
        low, high, limit = of_row[0:n_lanes, LOW], of_row[0:n_lanes, HIGH], of_row[0:n_lanes, LIMIT]
        nisa.tensor_copy(dst=runs[:, 0:1], src=of_row[0:n_lanes, BEST])
        largest_product(bound, by_kind[:, 0:2], low, high)
        nisa.tensor_tensor_scan(
            dst=runs[:, 1 : n + 1], data0=bound, data1=bound, initial=runs[:, 0:1], op0=nl.maximum, op1=nl.maximum
        )
        nisa.scalar_tensor_tensor(
            dst=closed, data=runs[:, 0:n], op0=nl.add, operand0=limit, op1=nl.greater, operand1=bound
        )
        # The last side's tile has no place in an item.
        nisa.scalar_tensor_tensor(
            dst=closed, data=by_kind[:, 2], op0=nl.equal, operand0=1.0, op1=nl.multiply, operand1=closed
        )
        nisa.tensor_reduce(dst=one, op=nl.add, data=closed, axis=1)
        return is_positive(w, one)


def is_positive(w, x):
    """A register that is 1 if one of x [n, 1], which are at least 0, is 1 or more, else 0."""
    sum_ps, found, register = w.t_ps[0:1, 0:1], tile((1, 1), nl.int32), nisa.register_alloc()
    nisa.nc_matmul(dst=sum_ps, stationary=x, moving=w.ones[0 : x.shape[0], 0:1], accumulate=False)
    nisa.tensor_scalar(dst=found, data=sum_ps, op0=nl.greater, operand0=0.5)
    nisa.register_load(register, found)
    return at_most(register, 1)


def by_partition(items):
    """Items [n, 128, n_lanes] in the order of the visit as a trip takes them, see DMA_ENGINES."""
    n, pmax, n_lanes = items.shape
    return items.reshape((n, pmax // DMA_ENGINES, DMA_ENGINES, n_lanes)).permute((0, 2, 1, 3))


class OpenTiles(nl.NKIObject):  # type: ignore[misc]
    """Lists of open tiles in HBM, made on the device.

    A *row* is a lane of a trip. Its tiles are on neighbouring partitions, both in the order of the visit.

    Args:
        w: the launch's `State`.
        x: its `Skipping`.
        gating: its `Gating`.
        tile_kv: keys of a tile.
        ahead: its `TilesAhead`.
    """

    def __init__(self, w, x, gating, tile_kv, ahead):
        z = w.sizes
        pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
        n_blocks, n_rows = gating.units.shape[0], gating.units.shape[1]
        self.gating = gating
        self.ahead = ahead
        self.n_rows = n_rows
        self.n_trips = n_rows // n_lanes  # of a block
        self.m = gating.kinds.shape[2]  # tiles on a partition
        self.per_row = pmax // n_rows  # partitions
        self.used = n_rows * self.per_row
        self.n_granules = x.outer * x.inner  # of a tile
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        # Rows of K and V: one per granule of the items, granules in the order of the visit. A trip's items have room
        # for all its tiles; after the last one come the next trip's first two.
        self.items = nl.ndarray((gating.n_steps, pmax, n_lanes), dtype=nl.int32, buffer=nl.private_hbm)
        self.by_partition = by_partition(self.items)
        self.bounds = nl.ndarray((n_blocks * self.n_trips, 5), dtype=nl.int32, buffer=nl.private_hbm)
        # Of each trip and lane: 1.0 if the last side's tile is open, the same on every partition.
        self.last = nl.ndarray((n_blocks * self.n_trips, pmax, n_lanes), dtype=nl.float32, buffer=nl.private_hbm)
        self.room = (gating.n_steps - 2) // (n_blocks * self.n_trips)  # items of a trip
        # Of each item and lane, THERE and the names beside it; before the first one an element of no meaning.
        shape = (1 + n_blocks * self.n_trips * self.room, n_lanes, TURNS)
        self.turns = nl.ndarray(shape, dtype=nl.int32, buffer=nl.private_hbm)
        self.units = tile((n_rows, 1), nl.int32)
        self.alphas = tile((n_rows, self.by_unit.shape[1]), nl.float32)
        # Of the first sides' tiles.
        self.first_side = tile((n_rows, 1), nl.int32)
        self.in_use = tile((n_rows, gating.in_use.shape[2]), nl.float32)
        self.floor = column(n_rows)
        # Of each row, LOW and the names beside it, and the same on all its partitions.
        self.of_row = tile((n_rows, STATE), nl.float32)
        self.spread = tile((self.used, STATE), nl.float32)
        self.has_last_sides = x.last_edges.start < x.last_edges.stop
        self.is_known = gating.rows.shape[0] == n_blocks  # whether blocks are one chunk each
        self.n_tiles = column(n_rows)  # of the first block
        self.row_bounds = tile((1, self.n_trips, 5), nl.int32)  # of a block's trips
        self.opened = column(n_rows)  # open tiles so far, the last side's among them
        self.first = tile((self.used, 1), nl.int32)
        self.delta = tile((self.used, self.m, tile_kv), gating.delta.dtype)
        self.extremes = tile((self.used, 2, self.m), nl.float32)
        self.index = tile((self.used, self.m), nl.int32)
        self.keys = tile((self.used, self.m * self.n_granules), nl.int32)
        self.kind = tile((self.used, self.m), nl.float32)
        self.counts = tile((self.used, 2), nl.float32)  # open ones on a partition that items hold, and all
        self.chunk = nisa.register_alloc()
        # Keys before each granule of a partition's tiles.
        self.inside = tile((self.used, self.m * self.n_granules), nl.int32)
        pattern = [[-tile_kv, self.m], [z.tokens, self.n_granules]]
        nisa.iota(dst=self.inside, pattern=pattern, offset=(self.m - 1) * tile_kv)
        nisa.memset(dst=self.delta, value=0.0)
        self.own = tile((n_rows, n_rows, self.per_row), nl.float32)  # 1 for a row's own partitions
        self.row_of = tile((self.used, n_rows), nl.float32)  # the same, turned
        self.before = tile((self.used, n_rows, self.per_row), nl.float32)  # 1 for those after it in its row
        self.masked = tile((self.used, self.used), nl.float32)  # 0 for those before it in its row, else MASKED
        self.tiles_before = column(pmax)  # of items, which are on partitions
        nisa.iota(dst=self.tiles_before, pattern=[[0, 1]], channel_multiplier=x.n_tiles)
        self.behind = tile((self.used, self.used), nl.float32)  # by how much a partition is behind another one
        nisa.iota(dst=self.behind, pattern=[[1, self.used]], channel_multiplier=-1)
        self.none = tile((pmax, FILL), nl.int32)
        nisa.memset(dst=self.none, value=NO_TILE)
        self.clear(gating.n_steps)

    def clear(self, n_steps):
        """No tiles in the first items."""
        pmax, n = nl.tile_size.pmax, n_steps * self.items.shape[2]
        flat = self.items[0:n_steps].reshape((pmax, n))
        for first in range(0, n, FILL):
            end = min(first + FILL, n)
            nisa.dma_copy(dst=flat[:, first:end], src=self.none[:, 0 : end - first])

    def constants(self, w):
        """Which partitions are a row's."""
        n_rows, per_row, used = self.n_rows, self.per_row, self.used
        own = w.identity_f32[0:n_rows, 0:n_rows].reshape((n_rows, n_rows, 1)).broadcast(2, per_row)
        nisa.tensor_copy(dst=self.own, src=own)
        turned = w.t_ps[0:used, 0:n_rows]
        partitions_first(w, turned, self.own.reshape((n_rows, used)))
        nisa.tensor_copy(dst=self.row_of, src=turned)

    def order(self, w):
        """Which of them come before which."""
        n_rows, used = self.n_rows, self.used
        # 1 where two partitions are of one row, of which below the diagonal is left.
        pairs_ps = w.m_ps.reshape((nl.tile_size.pmax, w.t_ps.shape[1]))[0:used, 0:used]
        own = self.own.reshape((n_rows, used))
        nisa.nc_matmul(dst=pairs_ps, stationary=own, moving=own, accumulate=False)
        before, earlier = self.before.reshape((used, used)), tile((used, used), nl.float32)
        nisa.scalar_tensor_tensor(
            dst=before, data=self.behind, op0=nl.greater, operand0=0.0, op1=nl.multiply, operand1=pairs_ps
        )
        nisa.scalar_tensor_tensor(
            dst=earlier, data=self.behind, op0=nl.less, operand0=0.0, op1=nl.multiply, operand1=pairs_ps
        )
        nisa.tensor_scalar(
            dst=self.masked, data=earlier, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED
        )


def load_first_tiles(w, tiles):
    """What `list_tiles` begins with, as soon as it can be had: units of the first block's rows, and deltas."""
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


def take_extremes(dst, delta):
    """dst [n, 2, m] = the largest and smallest delta of tiles [n, m, tile_kv], from the last to the first."""
    m = delta.shape[1]
    for i in range(m):
        place = slice(m - 1 - i, m - i)
        nisa.tensor_reduce(dst=dst[:, 0, place], op=nl.maximum, data=delta[:, i], axis=1)
        nisa.tensor_reduce(dst=dst[:, 1, place], op=nl.minimum, data=delta[:, i], axis=1)


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


def largest_product(dst, extremes, low, high):
    """dst [n, m] = the largest of the products of an extreme delta [n, 2, m] and an extreme alpha, a column."""
    by_low, by_high = tile(extremes.shape, nl.float32), tile(extremes.shape, nl.float32)
    nisa.tensor_scalar(dst=by_low, data=extremes, op0=nl.multiply, operand0=low)
    nisa.tensor_scalar(dst=by_high, data=extremes, op0=nl.multiply, operand0=high)
    nisa.tensor_tensor(dst=by_low, data1=by_low, data2=by_high, op=nl.maximum)
    nisa.tensor_tensor(dst=dst, data1=by_low[:, 0], data2=by_low[:, 1], op=nl.maximum)


def partitions_first(w, dst, data):
    """dst [n, n_rows] in PSUM = the transpose of [n_rows, n]."""
    n_rows = data.shape[0]
    square = w.identity_f32[0:n_rows, 0:n_rows]
    nisa.nc_matmul(dst=dst, stationary=data, moving=square, is_transpose=True, accumulate=False)


def column(n):
    """A new float32 column."""
    return tile((n, 1), nl.float32)


def log2(n):
    """Of a power of two."""
    bits = 0
    while 2**bits < n:
        bits = bits + 1
    return bits
