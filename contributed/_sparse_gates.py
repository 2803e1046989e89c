"""Gated decode: gates added to scores, and the tiles that gates leave open listed before any key is read.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`, `gates` its `Gates`. A tile is closed if the largest
product of an extreme alpha of its group and an extreme delta of its keys is far below those of the tiles before it. The
open ones are written one after the other, so that items are full whatever share is closed: keys, values, matmuls and
exponentials are those of open tiles.
"""

from __future__ import annotations

from contributed._decode_loads import flat_rows, gather
from contributed._decode_state import DMA_ENGINES, LOWEST, MASKED, tile
from contributed._nki import nisa, nl

# logsigmoid(x) = min(x, 0) + SQUARE c^2 + LINEAR c + CONSTANT with c = min(|x|, CUT).
CUT, SQUARE, LINEAR, CONSTANT = 4.0, -0.05674870, 0.37664706, -0.65169323
NO_TILE = -1
FILL = 512  # of the list's elements per partition that are cleared at once


class Gating(nl.NKIObject):  # type: ignore[misc]
    """What gates are made of and tested on; all in HBM but the last three.

    Args:
        alpha: [batch, 1, n_q_heads] float32.
        delta: an element for each row of K.
        limits: [batch, 1, n_kv_heads] float32: log(threshold) in units of q . k.
        units, rows, kinds, first_side, in_use, floor, start, chunks, bounds, backwards: arrays of a `GatePlan`.
        n_steps: items that there is room for.
        is_logsigmoid: whether a gate is the logsigmoid of alpha * delta, else the product.
        fast: whether that is the polynomial.
    """

    def __init__(
        self,
        alpha,
        delta,
        limits,
        units,
        rows,
        kinds,
        first_side,
        in_use,
        floor,
        start,
        chunks,
        bounds,
        backwards,
        n_steps,
        is_logsigmoid,
        fast,
    ):
        self.alpha = alpha
        self.delta = flat_rows(delta, 1)
        self.limits = flat_rows(limits, 1)
        self.units = units
        self.rows = rows
        self.kinds = kinds
        self.first_side = first_side
        self.in_use = in_use
        self.floor = floor
        self.start = start
        self.chunks = chunks
        self.bounds = bounds
        self.backwards = backwards
        self.n_steps = n_steps
        self.is_logsigmoid = is_logsigmoid
        self.fast = fast


class Gates(nl.NKIObject):  # type: ignore[misc]
    """Gates of the keys in work.

    Args:
        w: the launch's `State`.
        gating: its `Gating`.
    """

    def __init__(self, w, gating):
        z = w.sizes
        pmax, dtype = nl.tile_size.pmax, gating.delta.dtype
        self.gating = gating
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        self.alpha_coming = tile((pmax, z.n_lanes, z.rows), nl.float32)
        self.alpha = tile((pmax, z.n_lanes, z.rows), nl.float32)
        self.negative = tile((pmax, z.n_lanes, z.rows), nl.float32)
        # |alpha delta| and max(-alpha delta, 0) of an item to come.
        shape = (pmax, z.n_parts, z.rows, z.tokens // z.n_parts)
        self.size = tile(shape, nl.float32)
        self.below = tile(shape, nl.float32)
        self.edge_delta = tile((pmax, z.n_edges), dtype)
        nisa.memset(dst=self.edge_delta, value=0.0)
        self.delta = []
        self.of_item = []
        for _ in range(z.n_lanes):
            self.of_item.append(tile((pmax, z.n_parts, z.rows, z.tokens // z.n_parts), nl.float32))
            delta = tile((pmax, z.tokens), dtype)
            nisa.memset(dst=delta, value=0.0)
            self.delta.append(delta)

    def load_item(self, lane, index):
        """Deltas of a lane's item."""
        gather(self.delta[lane], self.gating.delta, index)

    def fetch(self, w):
        """Alphas of the trip whose records are coming."""
        z = w.sizes
        for lane in range(z.n_lanes):
            unit = w.coming[0:1, lane, z.at.unit_in : z.at.unit_in + 1]
            alpha = self.by_unit.ap([[0, nl.tile_size.pmax], [1, z.group]], scalar_offset=unit)
            nisa.dma_copy(dst=self.alpha_coming[:, lane, :], src=alpha)

    def take_alphas(self):
        """They are those of the items and sides from now on."""
        nisa.tensor_copy(dst=self.alpha, src=self.alpha_coming)
        nisa.tensor_scalar(dst=self.negative, data=self.alpha_coming, op0=nl.multiply, operand0=-1.0)

    def load_edges(self, w, record):
        """Deltas of the keys of a trip's sides."""
        at = w.sizes.at
        for e in range(w.sizes.n_edges):
            index = record[:, 0, at.v_edge + e : at.v_edge + e + 1]
            gather(self.edge_delta[:, e : e + 1], self.gating.delta, index)

    def begin_item(self, lane):
        """The part of a lane's gates that is the Scalar Engine's; its scores need not be there."""
        gates = self.of_item[lane]
        delta = self.delta[lane].reshape_dim(1, (gates.shape[1], gates.shape[3]))
        self.multiply(lane, gates, delta, self.size, self.below)

    def end_item(self, w, lane):
        """The rest."""
        self.bend(w, self.of_item[lane], self.size, self.below)

    def add_to_item(self, lane, dst, src):
        """dst = src + gates, [128, parts, rows, keys]."""
        nisa.tensor_tensor(dst=dst, data1=src, data2=self.of_item[lane], op=nl.add)

    def add_to_edges(self, w, lane, dst, src):
        """The same for edge keys, [128, 1, rows, n_edges]."""
        size, below = tile(dst.shape, nl.float32), tile(dst.shape, nl.float32)
        self.multiply(lane, dst, self.edge_delta.reshape((dst.shape[0], 1, dst.shape[3])), size, below)
        self.bend(w, dst, size, below)
        nisa.tensor_tensor(dst=dst, data1=dst, data2=src, op=nl.add)

    def multiply(self, lane, dst, delta, size, below):
        """size, below [128, parts, rows, keys] = |alpha delta|, max(-alpha delta, 0); dst = alpha delta if that is all.

        Row by row on the Scalar Engine, as the Vector Engine is slow with two operands.
        """
        for row in range(dst.shape[2]):
            alpha, negative = self.alpha[:, lane, row : row + 1], self.negative[:, lane, row : row + 1]
            if self.gating.is_logsigmoid:
                nisa.activation(dst=size[:, :, row, :], op=nl.abs, data=delta, scale=alpha)
                nisa.activation(dst=below[:, :, row, :], op=nl.relu, data=delta, scale=negative)
            else:
                nisa.activation(dst=dst[:, :, row, :], op=nl.copy, data=delta, scale=alpha)

    def bend(self, w, dst, size, below):
        """dst = gates in units of q . k, without the polynomial's constant (`add_constant`)."""
        if not self.gating.is_logsigmoid:
            return
        if self.gating.fast:
            # a = SQUARE c; SQUARE c^2 + LINEAR c = (a + LINEAR) a / SQUARE
            nisa.tensor_scalar(dst=size, data=size, op0=nl.minimum, operand0=CUT, op1=nl.multiply, operand1=SQUARE)
            nisa.scalar_tensor_tensor(dst=size, data=size, op0=nl.add, operand0=LINEAR, op1=nl.multiply, operand1=size)
            factor = 1.0 / SQUARE
        else:
            nisa.activation(dst=size, op=nl.exp, data=size, scale=-1.0)
            nisa.activation(dst=size, op=nl.log, data=size, bias=w.ones[:, 0:1])
            factor = -1.0
        nisa.scalar_tensor_tensor(dst=dst, data=size, op0=nl.multiply, operand0=factor, op1=nl.subtract, operand1=below)

    def add_constant(self, w):
        """What `bend` leaves out of the polynomial, into the maxima, where it reaches the lse.

        Nothing else depends on it: it is the same for all keys.
        """
        if self.gating.is_logsigmoid and self.gating.fast:
            nisa.tensor_scalar(dst=w.m, data=w.m, op0=nl.add, operand0=CONSTANT)


def last_side_open(w, x, record, last):
    """1.0 in the lanes where the last side's tile is open, [128, n_lanes]; elsewhere `record` has no keys of it.

    `last` is the trip's part of `OpenTiles.last`.
    """
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    windows = z.n_windows - x.n_first
    first = z.at.v_edge + x.last_edges.start
    is_open, closed = tile((pmax, n_lanes), nl.float32), tile((pmax, 1, n_lanes), nl.float32)
    nisa.dma_copy(dst=is_open, src=last)
    nisa.tensor_scalar(dst=closed[:, 0], data=is_open, op0=nl.less, operand0=0.5)
    none = tile((pmax, windows, n_lanes), nl.int32)
    nisa.memset(dst=none, value=NO_TILE)
    nisa.tensor_copy_predicated(
        dst=record[:, 0, first : first + windows * n_lanes].reshape_dim(1, (windows, n_lanes)),
        src=none,
        predicate=closed.view(nl.uint32).broadcast(1, windows),
    )
    return is_open


def mask_last_side(w, x, edges, is_open):
    """MASKED in place of the scores of a closed last side, of which no key was read."""
    penalty = tile(is_open.shape, nl.float32)
    nisa.tensor_scalar(dst=penalty, data=is_open, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED)
    for lane in range(w.sizes.n_lanes):
        side = edges[:, lane, :, x.last_edges]
        nisa.tensor_scalar(
            dst=side, data=side, op0=nl.add, operand0=penalty[:, lane : lane + 1], op1=nl.maximum, operand1=MASKED
        )


class OpenTiles(nl.NKIObject):  # type: ignore[misc]
    """Lists of open tiles in HBM, made on the device.

    Args:
        w: the launch's `State`.
        x: its `Skipping`.
        gating: its `Gating`.
        tile_kv: keys of a tile.
    """

    def __init__(self, w, x, gating, tile_kv):
        z = w.sizes
        pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
        n_blocks, n_rows = gating.units.shape[0], gating.units.shape[1]
        self.gating = gating
        self.n_rows = n_rows
        self.n_trips = n_rows // n_lanes  # of a block
        self.m = gating.kinds.shape[3]  # tiles on a partition
        self.width = self.m * pmax
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        # Rows of K and V: one per granule of the items, granules in the order of the visit. A trip's items have room
        # for all its tiles; after the last one come the next trip's first two.
        self.items = nl.ndarray((gating.n_steps, pmax, n_lanes), dtype=nl.int32, buffer=nl.private_hbm)
        # By partition, see DMA_ENGINES.
        by_granule = self.items.reshape((gating.n_steps, pmax // DMA_ENGINES, DMA_ENGINES, n_lanes))
        self.by_partition = by_granule.permute((0, 2, 1, 3))
        self.bounds = nl.ndarray((n_blocks * self.n_trips, 4), dtype=nl.int32, buffer=nl.private_hbm)
        # Of each trip and lane: 1.0 if the last side's tile is open, the same on every partition.
        self.last = nl.ndarray((n_blocks * self.n_trips, pmax, n_lanes), dtype=nl.float32, buffer=nl.private_hbm)
        self.units = tile((n_rows, 1), nl.int32)
        self.start = column(n_rows)
        self.best = column(n_rows)  # largest bound so far
        self.count = column(n_rows)  # open tiles so far
        self.in_items = column(n_rows)  # those of them that items hold
        self.limit = column(n_rows)
        self.low = column(n_rows)  # extremes of alpha
        self.high = column(n_rows)
        self.delta = tile((pmax, n_rows, self.m, tile_kv), gating.delta.dtype)
        self.ones = tile((n_rows, self.width), nl.float32)
        # Keys before each granule of a partition's tiles.
        self.inside = tile((pmax, 1, self.m * x.outer * x.inner), nl.int32)
        pattern = [[tile_kv, self.m], [z.tokens, x.outer * x.inner]]
        nisa.iota(dst=self.inside, pattern=pattern)
        nisa.memset(dst=self.delta, value=0.0, engine=nisa.engine.gpsimd)
        nisa.memset(dst=self.ones, value=1.0)
        none = tile((pmax, FILL), nl.int32)
        nisa.memset(dst=none, value=NO_TILE)
        n = gating.n_steps * n_lanes
        flat = self.items.reshape((pmax, n))
        for first in range(0, n, FILL):
            end = min(first + FILL, n)
            nisa.dma_copy(dst=flat[:, first:end], src=none[:, 0 : end - first])


def list_tiles(w, x, tiles):
    """Fills `tiles`, several trips at a time."""
    gating = tiles.gating

    def block(i):
        first, end = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(first, gating.chunks.select(0, i)[0:1])
        nisa.register_load(end, gating.chunks.select(0, i)[1:2])
        load_groups(tiles, i)
        begin_block(tiles, i)

        def chunk(j):
            test_tiles(w, x, tiles, gating.rows.select(0, j), gating.kinds.select(0, j))

        nl.fori_loop(first, end, chunk)
        end_block(w, x, tiles, i)

    nl.fori_loop(0, gating.units.shape[0], block)


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


def load_groups(tiles, block):
    """Limits and extreme alphas of a block's groups."""
    gating, n_rows = tiles.gating, tiles.n_rows
    nisa.dma_copy(dst=tiles.units, src=gating.units.select(0, block))
    nisa.dma_copy(dst=tiles.start, src=gating.start.select(0, block))
    alphas = tile((n_rows, tiles.by_unit.shape[1]), nl.float32)
    gather(alphas, tiles.by_unit, tiles.units)
    gather(tiles.limit, gating.limits, tiles.units)
    nisa.tensor_reduce(dst=tiles.high, op=nl.maximum, data=alphas, axis=1)
    nisa.tensor_reduce(dst=tiles.low, op=nl.minimum, data=alphas, axis=1)


def begin_block(tiles, block):
    """The bound of the first side's tile, which is cut by the sequence's end and so has a delta of 0 among its own."""
    gating, n_rows, n_keys = tiles.gating, tiles.n_rows, tiles.gating.in_use.shape[2]
    first, floor = tile((n_rows, 1), nl.int32), column(n_rows)
    in_use = tile((n_rows, n_keys), nl.float32)
    nisa.dma_copy(dst=first, src=gating.first_side.select(0, block))
    nisa.dma_copy(dst=in_use, src=gating.in_use.select(0, block))
    nisa.dma_copy(dst=floor, src=gating.floor.select(0, block))
    # What is not in use may be NaN.
    found, delta = tile((n_rows, n_keys), gating.delta.dtype), tile((n_rows, n_keys), gating.delta.dtype)
    nisa.memset(dst=found, value=0.0)
    nisa.memset(dst=delta, value=0.0)
    gather(found, gating.delta, first)
    nisa.tensor_copy_predicated(dst=delta, src=found, predicate=in_use.view(nl.uint32))
    high, low, bound = column(n_rows), column(n_rows), column(n_rows)
    nisa.tensor_reduce(dst=high, op=nl.maximum, data=delta, axis=1)
    nisa.tensor_reduce(dst=low, op=nl.minimum, data=delta, axis=1)
    largest_product(tiles, bound, high, low)
    nisa.tensor_tensor(dst=bound, data1=bound, data2=floor, op=nl.add)
    nisa.tensor_scalar(dst=tiles.best, data=bound, op0=nl.maximum, operand0=LOWEST)
    nisa.memset(dst=tiles.count, value=0.0)
    nisa.memset(dst=tiles.in_items, value=0.0)


def test_tiles(w, x, tiles, rows, kinds):
    """Some tiles of every row against their gates' limits, and the keys of the open ones into the list."""
    pmax, n_rows, m, width = nl.tile_size.pmax, tiles.n_rows, tiles.m, tiles.width
    first = tile((pmax, n_rows), nl.int32)
    kind = tile((pmax, 1, n_rows, m), nl.float32)
    nisa.dma_copy(dst=first, src=rows)
    nisa.dma_copy(dst=kind[:, 0], src=kinds)
    for row in range(n_rows):
        gather(tiles.delta[:, row], tiles.gating.delta, first[:, row : row + 1])
    found, extremes = tile((pmax, 2, n_rows, m), nl.float32), tile((pmax, 2, n_rows, m), nl.float32)
    for row in range(n_rows):
        nisa.tensor_reduce(dst=found[:, 0, row], op=nl.maximum, data=tiles.delta[:, row], axis=2)
        nisa.tensor_reduce(dst=found[:, 1, row], op=nl.minimum, data=tiles.delta[:, row], axis=2)
    # A partition may hold keys that are no tile of its row's, NaN among them.
    nisa.memset(dst=extremes, value=0.0)
    nisa.tensor_copy_predicated(dst=extremes, src=found, predicate=kind.view(nl.uint32).broadcast(1, 2))
    high, low, kind_ps = w.s_ps[0:n_rows, 0], w.m_ps[0:n_rows].reshape((n_rows, w.t_ps.shape[1])), w.t_ps[0:n_rows]
    in_order(w, high, extremes[:, 0])
    in_order(w, low, extremes[:, 1])
    in_order(w, kind_ps, kind[:, 0])

    shape = (n_rows, width)
    bound, absent = tile(shape, nl.float32), tile(shape, nl.float32)
    largest_product(tiles, bound, high[:, 0:width], low[:, 0:width])
    nisa.tensor_scalar(
        dst=absent, data=kind_ps[:, 0:width], op0=nl.less, operand0=0.5, op1=nl.multiply, operand1=MASKED
    )
    nisa.tensor_tensor(dst=bound, data1=bound, data2=absent, op=nl.add)
    runs = tile((n_rows, width + 1), nl.float32)
    nisa.tensor_copy(dst=runs[:, 0:1], src=tiles.best)
    nisa.tensor_tensor_scan(
        dst=runs[:, 1 : width + 1], data0=bound, data1=bound, initial=tiles.best, op0=nl.maximum, op1=nl.maximum
    )
    nisa.tensor_copy(dst=tiles.best, src=runs[:, width : width + 1])
    is_open, listed = tile(shape, nl.float32), tile(shape, nl.float32)
    nisa.scalar_tensor_tensor(
        dst=is_open, data=runs[:, 0:width], op0=nl.add, operand0=tiles.limit, op1=nl.less_equal, operand1=bound
    )
    nisa.scalar_tensor_tensor(
        dst=listed, data=kind_ps[:, 0:width], op0=nl.less, operand0=1.5, op1=nl.multiply, operand1=is_open
    )
    # The last side's tile is the last of all and takes no place from another one.
    places = tile(shape, nl.float32)
    nisa.tensor_tensor_scan(
        dst=places, data0=tiles.ones, data1=is_open, initial=tiles.count, op0=nl.multiply, op1=nl.add
    )
    nisa.tensor_copy(dst=tiles.count, src=places[:, width - 1 : width])
    added = column(n_rows)
    nisa.tensor_reduce(dst=added, op=nl.add, data=listed, axis=1)
    nisa.tensor_tensor(dst=tiles.in_items, data1=tiles.in_items, data2=added, op=nl.add)
    index = elements(w, x, tiles, places, listed)

    n_granules = x.outer * x.inner
    keys = tile((pmax, n_rows, m * n_granules), nl.int32)
    nisa.tensor_tensor(
        dst=keys,
        data1=first.reshape((pmax, n_rows, 1)).broadcast(2, m * n_granules),
        data2=tiles.inside.broadcast(1, n_rows),
        op=nl.add,
    )
    flat = flat_rows(tiles.items, 1)
    n_lanes = w.sizes.n_lanes
    for row in range(n_rows):
        for i in range(m):
            dst = flat.ap([[1, pmax], [n_lanes, n_granules]], vector_offset=index[:, i, row : row + 1])
            src = keys[:, row, i * n_granules : (i + 1) * n_granules]
            nisa.dma_copy(dst=dst, src=src, oob_mode=nisa.oob_mode.skip)


def in_order(w, dst, data):
    """dst [n_rows, tiles] in PSUM = [128, n_rows, m], the tiles of a partition from the last to the first."""
    pmax, m = nl.tile_size.pmax, data.shape[2]
    by_tile = dst[:, 0 : pmax * m].reshape_dim(1, (pmax, m))
    for i in range(m):
        rows_first(w, by_tile[:, :, m - 1 - i], data[:, :, i])


def elements(w, x, tiles, places, listed):
    """Element of the list for each tile's first granule, int32 [128, tiles on a partition, n_rows]; -1 for none."""
    pmax, n_rows, m, width, n_lanes = nl.tile_size.pmax, tiles.n_rows, tiles.m, tiles.width, w.sizes.n_lanes
    element = tile((n_rows, width), nl.float32)
    per_tile = float(x.outer * x.inner * n_lanes)
    # Plus 1, so that a product with 0 is none.
    nisa.tensor_scalar(dst=element, data=places, op0=nl.multiply, operand0=per_tile, op1=nl.add, operand1=tiles.start)
    nisa.tensor_tensor(dst=element, data1=element, data2=listed, op=nl.multiply)
    by_tile = element.reshape((n_rows, pmax, m))
    on_partitions = w.m_ps.reshape((pmax, w.t_ps.shape[1]))[:, 0 : m * n_rows].reshape_dim(1, (m, n_rows))
    for i in range(m):
        partitions_first(w, on_partitions[:, i, :], by_tile[:, :, m - 1 - i])
    index = tile((pmax, m, n_rows), nl.int32)
    nisa.tensor_scalar(dst=index, data=on_partitions, op0=nl.add, operand0=-1.0)
    return index


def end_block(w, x, tiles, block):
    """Trips' bounds: as many items as the lane with the most open tiles needs."""
    n_lanes, n_rows, n_trips = w.sizes.n_lanes, tiles.n_rows, tiles.n_trips
    pmax = nl.tile_size.pmax
    across = w.m_ps[0:1, 0, 0:n_rows]
    partitions_first(w, across, tiles.in_items)
    most, bounds = tile((1, n_trips), nl.int32), tile((1, n_trips, 4), nl.int32)
    nisa.dma_copy(dst=bounds, src=tiles.gating.bounds.select(0, block))
    nisa.tensor_reduce(dst=most, op=nl.maximum, data=across.reshape_dim(1, (n_trips, n_lanes)), axis=2)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.add, operand0=x.n_tiles - 1)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.right_shift, operand0=log2(x.n_tiles))
    nisa.tensor_scalar(dst=most, data=most, op0=nl.maximum, operand0=1)
    nisa.tensor_tensor(dst=bounds[:, :, 1], data1=bounds[:, :, 1], data2=most, op=nl.add)
    by_block = tiles.bounds.reshape((tiles.gating.units.shape[0], 1, n_trips, 4))
    nisa.dma_copy(dst=by_block.select(0, block), src=bounds)

    if x.last_edges.start < x.last_edges.stop:
        difference, is_open = column(n_rows), tile((n_rows, pmax), nl.float32)
        nisa.tensor_tensor(dst=difference, data1=tiles.count, data2=tiles.in_items, op=nl.subtract)
        nisa.tensor_copy(dst=is_open, src=difference.broadcast(1, pmax))
        open_ps = w.m_ps[:, 1, 0:n_rows]
        partitions_first(w, open_ps, is_open)
        on_partitions = tile((pmax, n_trips, n_lanes), nl.float32)
        nisa.tensor_copy(dst=on_partitions, src=open_ps.reshape_dim(1, (n_trips, n_lanes)))
        by_block = tiles.last.reshape((tiles.gating.units.shape[0], n_trips, pmax, n_lanes)).permute((0, 2, 1, 3))
        nisa.dma_copy(dst=by_block.select(0, block), src=on_partitions)


def largest_product(tiles, dst, high, low):
    """The largest of the products of an extreme alpha and an extreme delta; alphas are columns of `tiles`."""
    nisa.tensor_scalar(dst=dst, data=high, op0=nl.multiply, operand0=tiles.high)
    raise_to_product(dst, high, tiles.low)
    raise_to_product(dst, low, tiles.high)
    raise_to_product(dst, low, tiles.low)


def raise_to_product(dst, data, column):
    """dst = the larger of dst and data times a column."""
    nisa.scalar_tensor_tensor(dst=dst, data=data, op0=nl.multiply, operand0=column, op1=nl.maximum, operand1=dst)


def rows_first(w, dst, data):
    """dst [n_rows, 128] in PSUM = the transpose of [128, n_rows]."""
    nisa.nc_matmul(dst=dst, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)


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
