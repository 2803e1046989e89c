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
        rows: `GatePlan.rows`.
        first_side: `GatePlan.first`.
        floor: `GatePlan.floor`.
        counts: `GatePlan.counts`.
        n_steps: items that there is room for.
        is_logsigmoid: whether a gate is the logsigmoid of alpha * delta, else the product.
        fast: whether that is the polynomial.
    """

    def __init__(self, alpha, delta, limits, rows, first_side, floor, counts, n_steps, is_logsigmoid, fast):
        self.alpha = alpha
        self.delta = flat_rows(delta, 1)
        self.limits = flat_rows(limits, 1)
        self.rows = rows
        self.first_side = first_side
        self.floor = floor
        self.counts = counts
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
        self.edge_delta = tile((pmax, z.n_edges), dtype)
        nisa.memset(dst=self.edge_delta, value=0.0)
        self.delta = []
        for _ in range(z.n_lanes):
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

    def load_edges(self, w):
        """Deltas of the keys of a trip's sides."""
        at = w.sizes.at
        for e in range(w.sizes.n_edges):
            index = w.now[:, 0, at.v_edge + e : at.v_edge + e + 1]
            gather(self.edge_delta[:, e : e + 1], self.gating.delta, index)

    def add_to_item(self, w, lane, dst, src):
        """dst = src + gates of a lane's item, [128, parts, rows, keys]."""
        parts, keys = dst.shape[1], dst.shape[3]
        delta = self.delta[lane].reshape_dim(1, (parts, 1, keys))
        self.add(w, lane, dst, src, delta)

    def add_to_edges(self, w, lane, dst, src):
        """The same for edge keys, [128, 1, rows, n_edges]."""
        n = dst.shape[3]
        self.add(w, lane, dst, src, self.edge_delta.reshape((dst.shape[0], 1, 1, n)))

    def add(self, w, lane, dst, src, delta):
        """dst = src + gate(alpha * delta), in units of q . k."""
        shape = dst.shape
        alpha = self.alpha[:, lane].reshape((shape[0], 1, shape[2], 1)).broadcast(1, shape[1]).broadcast(3, shape[3])
        product = tile(shape, nl.float32)
        nisa.tensor_tensor(dst=product, data1=alpha, data2=delta.broadcast(2, shape[2]), op=nl.multiply)
        if not self.gating.is_logsigmoid:
            nisa.tensor_tensor(dst=dst, data1=product, data2=src, op=nl.add)
            return
        size, curve = tile(shape, nl.float32), tile(shape, nl.float32)
        nisa.activation(dst=size, op=nl.abs, data=product)
        if self.gating.fast:
            nisa.tensor_scalar(dst=size, data=size, op0=nl.minimum, operand0=CUT)
            nisa.tensor_scalar(dst=curve, data=size, op0=nl.multiply, operand0=SQUARE, op1=nl.add, operand1=LINEAR)
            nisa.tensor_tensor(dst=curve, data1=curve, data2=size, op=nl.multiply)
        else:
            # -log(1 + exp(-|x|))
            nisa.activation(dst=size, op=nl.exp, data=size, scale=-1.0)
            nisa.activation(dst=size, op=nl.log, data=size, bias=w.ones[:, 0:1])
            nisa.tensor_scalar(dst=curve, data=size, op0=nl.multiply, operand0=-1.0)
        nisa.scalar_tensor_tensor(dst=curve, data=product, op0=nl.minimum, operand0=0.0, op1=nl.add, operand1=curve)
        constant = CONSTANT if self.gating.fast else 0.0
        nisa.scalar_tensor_tensor(dst=dst, data=curve, op0=nl.add, operand0=constant, op1=nl.add, operand1=src)


def last_side_open(w, x, tiles, trip):
    """Of a trip: 1.0 in the lanes where the last side's tile is open, [128, n_lanes]; elsewhere its keys are not read."""
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    windows = z.n_windows - x.n_first
    first = z.at.v_edge + x.last_edges.start
    is_open, closed = tile((pmax, n_lanes), nl.float32), tile((pmax, 1, n_lanes), nl.float32)
    nisa.dma_copy(dst=is_open, src=tiles.last.select(0, trip))
    nisa.tensor_scalar(dst=closed[:, 0], data=is_open, op0=nl.less, operand0=0.5)
    none = tile((pmax, windows, n_lanes), nl.int32)
    nisa.memset(dst=none, value=NO_TILE)
    nisa.tensor_copy_predicated(
        dst=w.now[:, 0, first : first + windows * n_lanes].reshape_dim(1, (windows, n_lanes)),
        src=none,
        predicate=closed.view(nl.uint32).broadcast(1, windows),
    )
    return is_open


def mask_last_side(w, x, edges, is_open):
    """MASKED in place of the scores of a closed last side, of which no key was read."""
    penalty = tile(is_open.shape, nl.float32)
    nisa.tensor_scalar(
        dst=penalty, data=is_open, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED
    )
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
        n_trips, n_steps = gating.counts.shape[0], gating.n_steps
        pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
        self.gating = gating
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        # Rows of K and V: one per granule of the items of all trips, in the order of the visit.
        self.items = nl.ndarray((n_steps, pmax, n_lanes), dtype=nl.int32, buffer=nl.private_hbm)
        # Of each trip: its second item, the end of its items, and 1 if a trip follows.
        self.bounds = nl.ndarray((n_trips, 3), dtype=nl.int32, buffer=nl.private_hbm)
        # Of each trip and lane: 1.0 if the last side's tile is open, the same on every partition.
        self.last = nl.ndarray((n_trips, pmax, n_lanes), dtype=nl.float32, buffer=nl.private_hbm)
        self.step = column(n_lanes)  # first item of the trip
        self.lane = column(n_lanes)
        self.best = column(n_lanes)  # largest bound so far
        self.count = column(n_lanes)  # open tiles so far
        self.in_items = column(n_lanes)  # those of them that items hold
        self.limit = column(n_lanes)
        self.low = column(n_lanes)  # extremes of alpha
        self.high = column(n_lanes)
        self.delta = tile((pmax, n_lanes, tile_kv), gating.delta.dtype)
        self.inside = tile((pmax, x.outer, x.inner), nl.int32)  # keys of a tile before each granule
        nisa.memset(dst=self.delta, value=0.0)
        nisa.memset(dst=self.step, value=0.0)
        nisa.iota(dst=self.lane, pattern=[[0, 1]], channel_multiplier=1)
        nisa.iota(dst=self.inside, pattern=[[DMA_ENGINES * z.tokens, x.outer], [z.tokens, x.inner]])
        none = tile((pmax, FILL), nl.int32)
        nisa.memset(dst=none, value=NO_TILE)
        flat = self.items.reshape((pmax, n_steps * n_lanes))
        for first in range(0, n_steps * n_lanes, FILL):
            n = min(FILL, n_steps * n_lanes - first)
            nisa.dma_copy(dst=flat[:, first : first + n], src=none[:, 0:n])


def list_tiles(w, x, tiles, records):
    """Fills `tiles`, trip by trip; of the trips' `records` the units are needed."""
    gating = tiles.gating

    def trip(i):
        first, end = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(first, gating.counts.select(0, i)[0:1])
        nisa.register_load(end, gating.counts.select(0, i)[1:2])
        load_group(w, tiles, records.select(0, i))
        begin_trip(w, x, tiles, gating.first_side.select(0, i), gating.floor.select(0, i))

        def chunk(j):
            test_tiles(w, x, tiles, gating.rows.select(0, j))

        nl.fori_loop(first, end, chunk)
        end_trip(w, x, tiles, gating.counts.select(0, i), tiles.bounds.select(0, i), tiles.last.select(0, i))

    nl.fori_loop(0, gating.counts.shape[0], trip)


def load_group(w, tiles, records):
    """Limits and extreme alphas of a trip's groups, with lanes on partitions."""
    z = w.sizes
    units = tile((1, z.n_lanes), nl.int32)
    nisa.dma_copy(dst=units, src=records[0:1, :, z.at.unit_in])
    alphas = tile((z.n_lanes, z.group), nl.float32)
    for lane in range(z.n_lanes):
        unit = units[:, lane : lane + 1]
        of_group = tiles.by_unit.ap([[z.group, 1], [1, z.group]], scalar_offset=unit)
        nisa.dma_copy(dst=alphas[lane : lane + 1], src=of_group)
        nisa.dma_copy(dst=tiles.limit[lane : lane + 1], src=tiles.gating.limits.ap([[1, 1], [1, 1]], scalar_offset=unit))
    nisa.tensor_reduce(dst=tiles.high, op=nl.maximum, data=alphas, axis=1)
    nisa.tensor_reduce(dst=tiles.low, op=nl.minimum, data=alphas, axis=1)


def begin_trip(w, x, tiles, first_side, floor):
    """The bound of the first side's tile, which is cut by the sequence's end and so has a delta of 0 among its own."""
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    shape = (pmax, n_lanes, x.n_first)
    index, delta = tile(shape, nl.int32), tile(shape, tiles.gating.delta.dtype)
    nisa.dma_copy(dst=index, src=first_side)
    nisa.memset(dst=delta, value=0.0)
    for lane in range(n_lanes):
        for i in range(x.n_first):
            gather(delta[:, lane, i : i + 1], tiles.gating.delta, index[:, lane, i : i + 1])
    extremes = []
    for part, op in ((0, nl.maximum), (1, nl.minimum)):
        by_partition = tile((pmax, n_lanes), nl.float32)
        nisa.tensor_reduce(dst=by_partition, op=op, data=delta, axis=2)
        lanes_first(w, part, by_partition)
        extreme = column(n_lanes)
        nisa.tensor_reduce(dst=extreme, op=op, data=w.m_ps[0:n_lanes, part, :], axis=1)
        extremes.append(extreme)
    bound = column(n_lanes)
    largest_product(tiles, bound, extremes[0], extremes[1])
    floors = column(n_lanes)
    nisa.dma_copy(dst=floors, src=floor)
    nisa.tensor_tensor(dst=bound, data1=bound, data2=floors, op=nl.add)
    nisa.tensor_scalar(dst=tiles.best, data=bound, op0=nl.maximum, operand0=LOWEST)
    nisa.memset(dst=tiles.count, value=0.0)
    nisa.memset(dst=tiles.in_items, value=0.0)


def test_tiles(w, x, tiles, rows):
    """128 tiles of every lane against their gates' limits, and the rows of the open ones into the list."""
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    record = tile((pmax, n_lanes, 2), nl.int32)
    nisa.dma_copy(dst=record, src=rows)
    for lane in range(n_lanes):
        gather(tiles.delta[:, lane, :], tiles.gating.delta, record[:, lane, 0:1])
    shape = (pmax, n_lanes)
    high, low, absent = tile(shape, nl.float32), tile(shape, nl.float32), tile(shape, nl.float32)
    nisa.tensor_reduce(dst=high, op=nl.maximum, data=tiles.delta, axis=2)
    nisa.tensor_reduce(dst=low, op=nl.minimum, data=tiles.delta, axis=2)
    nisa.tensor_scalar(dst=absent, data=record[:, :, 0], op0=nl.less, operand0=0.0, op1=nl.multiply, operand1=MASKED)
    for part, data in ((0, high), (1, low), (2, absent), (3, record[:, :, 1].view(nl.float32))):
        lanes_first(w, part, data)
    across = w.m_ps[0:n_lanes]

    shape = (n_lanes, pmax)
    bound = tile(shape, nl.float32)
    largest_product(tiles, bound, across[:, 0, :], across[:, 1, :])
    nisa.tensor_tensor(dst=bound, data1=bound, data2=across[:, 2, :], op=nl.add)
    runs = tile((n_lanes, pmax + 1), nl.float32)
    nisa.tensor_copy(dst=runs[:, 0:1], src=tiles.best)
    nisa.tensor_tensor_scan(
        dst=runs[:, 1 : pmax + 1], data0=bound, data1=bound, initial=tiles.best, op0=nl.maximum, op1=nl.maximum
    )
    nisa.tensor_copy(dst=tiles.best, src=runs[:, pmax : pmax + 1])
    closed = tile(shape, nl.float32)
    nisa.scalar_tensor_tensor(
        dst=closed, data=runs[:, 0:pmax], op0=nl.add, operand0=tiles.limit, op1=nl.greater, operand1=bound
    )
    is_open = tile(shape, nl.float32)
    nisa.tensor_scalar(dst=is_open, data=closed, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=1.0)
    listed = tile(shape, nl.float32)
    nisa.tensor_tensor(dst=listed, data1=is_open, data2=across[:, 3, :], op=nl.multiply)
    # The last side's tile is the last of all and takes no place from another one.
    places = tile(shape, nl.float32)
    ones = w.ones[0:n_lanes, :]
    nisa.tensor_tensor_scan(dst=places, data0=ones, data1=is_open, initial=tiles.count, op0=nl.multiply, op1=nl.add)
    nisa.tensor_copy(dst=tiles.count, src=places[:, pmax - 1 : pmax])
    added = column(n_lanes)
    nisa.tensor_reduce(dst=added, op=nl.add, data=listed, axis=1)
    nisa.tensor_tensor(dst=tiles.in_items, data1=tiles.in_items, data2=added, op=nl.add)

    spread_open(w, x, tiles, record, places, listed)


def spread_open(w, x, tiles, record, places, listed):
    """Rows of the granules of open tiles, to where items [n_steps, 128, n_lanes] have them."""
    z = w.sizes
    pmax, n_lanes = nl.tile_size.pmax, z.n_lanes
    shape = (n_lanes, pmax)
    number, step, spot = tile(shape, nl.int32), tile(shape, nl.int32), tile(shape, nl.int32)
    nisa.tensor_scalar(dst=number, data=places, op0=nl.add, operand0=-1.0)
    nisa.tensor_scalar(dst=step, data=number, op0=nl.right_shift, operand0=log2(x.n_tiles))
    nisa.tensor_scalar(dst=spot, data=number, op0=nl.bitwise_and, operand0=x.n_tiles - 1)
    low, high = tile(shape, nl.int32), tile(shape, nl.int32)
    nisa.tensor_scalar(dst=low, data=spot, op0=nl.bitwise_and, operand0=x.n_low - 1)
    nisa.tensor_scalar(dst=high, data=spot, op0=nl.right_shift, operand0=log2(x.n_low))
    # Element (step, partition, lane) of the list; the partition is that of the tile's first granule.
    per_b = pmax // DMA_ENGINES
    start = column(n_lanes)
    nisa.scalar_tensor_tensor(
        dst=start, data=tiles.step, op0=nl.multiply, operand0=float(pmax * n_lanes), op1=nl.add, operand1=tiles.lane
    )
    element = tile(shape, nl.float32)
    nisa.tensor_scalar(
        dst=element, data=step, op0=nl.multiply, operand0=float(pmax * n_lanes), op1=nl.add, operand1=start
    )
    for data, stride in ((low, per_b * x.inner * n_lanes), (high, x.outer * n_lanes)):
        nisa.scalar_tensor_tensor(
            dst=element, data=data, op0=nl.multiply, operand0=float(stride), op1=nl.add, operand1=element
        )
    nisa.scalar_tensor_tensor(dst=element, data=element, op0=nl.add, operand0=1.0, op1=nl.multiply, operand1=listed)
    nisa.tensor_scalar(dst=element, data=element, op0=nl.add, operand0=float(NO_TILE))
    square = w.identity_f32[0:n_lanes, 0:n_lanes]
    element_ps = w.m_ps[:, 0, 0:n_lanes]
    nisa.nc_matmul(dst=element_ps, stationary=element, moving=square, is_transpose=True, accumulate=False)
    index = tile((pmax, n_lanes), nl.int32)
    nisa.tensor_copy(dst=index, src=element_ps)

    rows = tile((pmax, n_lanes, x.outer, x.inner), nl.int32)
    first = record[:, :, 0].reshape((pmax, n_lanes, 1, 1)).broadcast(2, x.outer).broadcast(3, x.inner)
    inside = tiles.inside.expand_dim(1).broadcast(1, n_lanes)
    nisa.tensor_tensor(dst=rows, data1=first, data2=inside, op=nl.add)
    flat = flat_rows(tiles.items, 1)
    for lane in range(n_lanes):
        places_of_tile = [[1, pmax], [n_lanes, x.outer], [per_b * n_lanes, x.inner]]
        dst = flat.ap(places_of_tile, vector_offset=index[:, lane : lane + 1])
        nisa.dma_copy(dst=dst, src=rows[:, lane], oob_mode=nisa.oob_mode.skip)


def end_trip(w, x, tiles, counts, bounds, last):
    """A trip's bounds: as many items as the lane with the most open tiles needs."""
    z = w.sizes
    n_lanes, pmax = z.n_lanes, nl.tile_size.pmax
    identity = w.identity_f32[0:n_lanes, 0:n_lanes]
    across = w.m_ps[0:1, 0, 0:n_lanes]
    nisa.nc_matmul(dst=across, stationary=tiles.in_items, moving=identity, is_transpose=True, accumulate=False)
    most, items = tile((1, 1), nl.int32), tile((1, 1), nl.float32)
    nisa.tensor_reduce(dst=most, op=nl.maximum, data=across, axis=1)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.add, operand0=x.n_tiles - 1)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.right_shift, operand0=log2(x.n_tiles))
    nisa.tensor_scalar(dst=items, data=most, op0=nl.maximum, operand0=1.0)
    row = tile((1, 3), nl.int32)
    nisa.dma_copy(dst=row[:, 2:3], src=counts[2:3])
    step = tiles.step[0:1]
    nisa.tensor_scalar(dst=row[:, 0:1], data=step, op0=nl.add, operand0=1.0)
    nisa.tensor_tensor(dst=row[:, 1:2], data1=step, data2=items, op=nl.add)
    nisa.dma_copy(dst=bounds, src=row)

    if x.last_edges.start < x.last_edges.stop:
        is_open = tile((n_lanes, pmax), nl.float32)
        difference = column(n_lanes)
        nisa.tensor_tensor(dst=difference, data1=tiles.count, data2=tiles.in_items, op=nl.subtract)
        nisa.tensor_copy(dst=is_open, src=difference.broadcast(1, pmax))
        open_ps = w.m_ps[:, 1, 0:n_lanes]
        nisa.nc_matmul(dst=open_ps, stationary=is_open, moving=identity, is_transpose=True, accumulate=False)
        on_partitions = tile((pmax, n_lanes), nl.float32)
        nisa.tensor_copy(dst=on_partitions, src=open_ps)
        nisa.dma_copy(dst=last, src=on_partitions)

    # The next trip's items come after these.
    items_ps = w.m_ps[0:n_lanes, 2, 0:1]
    nisa.nc_matmul(dst=items_ps, stationary=w.ones[0:1, 0:n_lanes], moving=items, accumulate=False)
    nisa.tensor_tensor(dst=tiles.step, data1=tiles.step, data2=items_ps, op=nl.add)


def largest_product(tiles, dst, high, low):
    """The largest of the products of an extreme alpha and an extreme delta; alphas are columns of `tiles`."""
    nisa.tensor_scalar(dst=dst, data=high, op0=nl.multiply, operand0=tiles.high)
    for delta, alpha in ((high, tiles.low), (low, tiles.high), (low, tiles.low)):
        nisa.scalar_tensor_tensor(dst=dst, data=delta, op0=nl.multiply, operand0=alpha, op1=nl.maximum, operand1=dst)


def lanes_first(w, part, data):
    """[128, n_lanes] to [n_lanes, 128] in a part of m_ps."""
    dst = w.m_ps[0 : w.sizes.n_lanes, part, :]
    nisa.nc_matmul(dst=dst, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)


def column(n):
    """A new float32 column."""
    return tile((n, 1), nl.float32)


def log2(n):
    """Of a power of two."""
    bits = 0
    while 2**bits < n:
        bits = bits + 1
    return bits
