"""Gated decode: what a launch holds beside its `Skipping` where the device lists the open tiles.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. How the list is made of it: `_sparse_open.py`.
"""

from __future__ import annotations

from contributed._decode_loads import gather
from contributed._decode_state import DMA_ENGINES, MASKED, tile
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


def take_extremes(dst, delta):
    """dst [n, 2, m] = the largest and smallest delta of tiles [n, m, tile_kv], from the last to the first."""
    m = delta.shape[1]
    for i in range(m):
        place = slice(m - 1 - i, m - i)
        nisa.tensor_reduce(dst=dst[:, 0, place], op=nl.maximum, data=delta[:, i], axis=1)
        nisa.tensor_reduce(dst=dst[:, 1, place], op=nl.minimum, data=delta[:, i], axis=1)


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
