"""Gated decode: gates added to scores, and the tiles that gates leave open listed before any key is read.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`, `gates` its `Gates`. A tile is closed if the largest
product of an extreme alpha of its group and an extreme delta of its keys is far below those of the tiles before it. The
open ones are written one after the other, so that items are full whatever share is closed: keys, values, matmuls and
exponentials are those of open tiles. What waits for no key is on the way to the first one: in the order of the program
deltas come first, then the list of the first trip.
"""

from __future__ import annotations

from contributed._decode_loads import flat_rows, gather
from contributed._decode_scores import AHEAD, turns_of
from contributed._decode_state import DMA_ENGINES, LOWEST, MASKED, tile
from contributed._nki import nisa, nl

# logsigmoid(y) = min(y, 0) + SQUARE z^2 + LINEAR z + CONSTANT with z = min(|y|, CUT). In u = max(CUT - |y|, 0) =
# CUT - z that is min(y, 0) - (ROOT (u - LOWEST_AT))^2 + LEFT_OUT.
CUT, SQUARE, LINEAR, CONSTANT = 4.0, -0.05674870, 0.37664706, -0.65169323
ROOT = (-SQUARE) ** 0.5
LOWEST_AT = CUT + LINEAR / (2.0 * SQUARE)
LEFT_OUT = SQUARE * (CUT * CUT - LOWEST_AT * LOWEST_AT) + LINEAR * CUT + CONSTANT
NO_TILE = -1
# Of an item and lane: 1 if it has tiles; if not, but the item before it has; if not.
TURNS = 3
THERE, ENDED, NONE = range(TURNS)
# Columns of what is known of a row: extreme alphas, limit, largest bound so far, open tiles of items so far, and the
# element of the list that its tile would have that is before its first one.
STATE = 6
LOW, HIGH, LIMIT, BEST, COUNT, START = (slice(i, i + 1) for i in range(STATE))
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

    A gate is a line with a bend at 0, minus a curve: min(y, 0) - curve(|y|), or y alone. The Tensor Engine adds the
    line, as a product of alphas with the positive and the negative parts of deltas; the Scalar Engine makes the curve.

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
        self.size = tile((pmax, z.n_lanes, z.rows), nl.float32)  # -|alpha| or |alpha|, as the curve takes it
        self.edge_delta = tile((pmax, z.n_edges), dtype)
        nisa.memset(dst=self.edge_delta, value=0.0)
        # Keys of a partition whose lines are added at once: both parts of their deltas have to be on partitions.
        keys = z.tokens // z.n_parts
        self.run = keys
        while 2 * self.run > pmax:
            self.run = self.run // 2
        # Of the parts (part, key) on partitions, factors [rows, run]: nonzero for the key itself.
        self.lines = tile((2 * self.run, z.n_lanes, z.rows, self.run), nl.float32)
        self.own_key = tile((2 * self.run, self.run), nl.float32)
        self.sign = tile((pmax, 1), nl.float32)
        self.cut = tile((pmax, 1), nl.float32)
        self.shift = tile((pmax, 1), nl.float32)
        # Both parts of deltas, of a lane and the one after it, and the same turned, until a lane's scores are complete
        # (`score_items`); lanes take turns.
        n_runs, n_turns = z.tokens // self.run, turns_of(w, z.tokens)
        n_turned = 2
        while (n_turned - 1) * n_turns + n_turns // 2 < 2 * AHEAD:
            n_turned = n_turned + 1
        self.both = []
        self.parts = []
        for _ in range(min(2, z.n_lanes)):
            self.both.append(tile((pmax, n_runs, 2, self.run), nl.float32))
        for _ in range(min(n_turned, z.n_lanes)):
            self.parts.append(tile((2 * self.run, n_runs, pmax), nl.float32))
        self.delta = []
        for _ in range(z.n_lanes):
            delta = tile((pmax, z.tokens), dtype)
            nisa.memset(dst=delta, value=0.0)
            self.delta.append(delta)

    def constants(self, w):
        """What does not depend on alphas."""
        run = self.run
        nisa.tensor_tensor(
            dst=self.own_key,
            data1=w.identity_f32[0 : 2 * run, 0:run],
            data2=w.identity_f32[0 : 2 * run, run : 2 * run],
            op=nl.add,
        )
        # 1 for the positive, -1 for the negative parts of deltas.
        nisa.tensor_reduce(dst=self.sign, op=nl.add, data=w.identity_f32[:, 0:run], axis=1)
        nisa.tensor_scalar(dst=self.sign, data=self.sign, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=-1.0)
        nisa.memset(dst=self.cut, value=CUT)
        nisa.memset(dst=self.shift, value=-ROOT * LOWEST_AT)
        self.one = w.ones[:, 0:1]

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

    def take_alphas(self, w):
        """They are those of the items and sides from now on."""
        z, n = w.sizes, 2 * self.run
        nisa.tensor_copy(dst=self.alpha, src=self.alpha_coming)
        factor = tile((n, z.n_lanes, z.rows), nl.float32)
        if self.gating.is_logsigmoid:
            # min(alpha delta, 0) = min(alpha, 0) max(delta, 0) + min(-alpha, 0) max(-delta, 0)
            nisa.tensor_scalar(
                dst=factor,
                data=self.alpha[0:n],
                op0=nl.multiply,
                operand0=self.sign[0:n],
                op1=nl.minimum,
                operand1=0.0,
            )
            nisa.activation(dst=self.size, op=nl.abs, data=self.alpha)
            if self.gating.fast:
                nisa.tensor_scalar(dst=self.size, data=self.size, op0=nl.multiply, operand0=-1.0)
        else:
            nisa.tensor_scalar(dst=factor, data=self.alpha[0:n], op0=nl.multiply, operand0=self.sign[0:n])
        for lane in range(z.n_lanes):
            for row in range(z.rows):
                of_row = factor[:, lane, row : row + 1]
                nisa.activation(dst=self.lines[:, lane, row, :], op=nl.copy, data=self.own_key, scale=of_row)

    def load_edges(self, w, record):
        """Deltas of the keys of a trip's sides."""
        at = w.sizes.at
        for e in range(w.sizes.n_edges):
            index = record[:, 0, at.v_edge + e : at.v_edge + e + 1]
            gather(self.edge_delta[:, e : e + 1], self.gating.delta, index)

    def begin_item(self, w, lane):
        """What the Scalar Engine does for a lane's item: both parts of its deltas, and its curves where logits will be.

        Its scores need not be there, but the exponentials of the item before it have to be taken.
        """
        delta, both, curve = self.delta[lane], self.both[lane % 2], w.x[:, lane]
        by_run = delta.reshape_dim(1, (both.shape[1], both.shape[3]))
        nisa.activation(dst=both[:, :, 0], op=nl.relu, data=by_run)
        nisa.activation(dst=both[:, :, 1], op=nl.relu, data=by_run, scale=-1.0)
        self.bend(lane, curve, delta.reshape_dim(1, (curve.shape[1], curve.shape[3])))

    def turn_parts(self, w, lane):
        """Those parts with keys on partitions."""
        pmax, n = nl.tile_size.pmax, 2 * self.run
        both, parts = self.both[lane % 2], self.parts[lane % len(self.parts)]
        for i in range(both.shape[1]):
            parts_ps, data = w.t_ps[0:n, 0:pmax], both[:, i].reshape((pmax, n))
            nisa.nc_matmul(dst=parts_ps, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)
            nisa.tensor_copy(dst=parts[:, i], src=parts_ps)

    def add_to_item(self, w, lane, dst, scores):
        """dst = scores + gates, [128, parts, rows, keys]; scores are in PSUM and get the lines, dst has the curves."""
        keys, run = scores.shape[3], self.run
        for i in range(w.sizes.tokens // run):
            part, first = i * run // keys, i * run % keys
            nisa.nc_matmul(
                dst=scores[:, part, :, first : first + run],
                stationary=self.parts[lane % len(self.parts)][:, i],
                moving=self.lines[:, lane],
                accumulate=True,
            )
        if self.gating.is_logsigmoid:
            nisa.tensor_tensor(dst=dst, data1=scores, data2=dst, op=nl.subtract)
        else:
            nisa.tensor_copy(dst=dst, src=scores)

    def add_to_edges(self, lane, dst, src):
        """The same for edge keys, [128, 1, rows, n_edges], of which there are few."""
        line, curve = tile(dst.shape, nl.float32), tile(dst.shape, nl.float32)
        delta = self.edge_delta.reshape((dst.shape[0], 1, dst.shape[3]))
        for row in range(dst.shape[2]):
            nisa.activation(dst=line[:, :, row, :], op=nl.copy, data=delta, scale=self.alpha[:, lane, row : row + 1])
        if not self.gating.is_logsigmoid:
            nisa.tensor_tensor(dst=dst, data1=line, data2=src, op=nl.add)
            return
        nisa.scalar_tensor_tensor(dst=dst, data=line, op0=nl.minimum, operand0=0.0, op1=nl.add, operand1=src)
        self.bend(lane, curve, delta)
        nisa.tensor_tensor(dst=dst, data1=dst, data2=curve, op=nl.subtract)

    def bend(self, lane, dst, delta):
        """dst [128, parts, rows, keys] = curves, without the polynomial's constant (`add_constant`).

        Row by row on the Scalar Engine, which takes a factor for each partition.
        """
        if not self.gating.is_logsigmoid:
            return
        size = tile(delta.shape, nl.float32)
        nisa.activation(dst=size, op=nl.abs, data=delta)
        for row in range(dst.shape[2]):
            factor, of_row = self.size[:, lane, row : row + 1], dst[:, :, row, :]
            if self.gating.fast:
                nisa.activation(dst=of_row, op=nl.relu, data=size, scale=factor, bias=self.cut)
            else:
                nisa.activation(dst=of_row, op=nl.copy, data=size, scale=factor)
        if self.gating.fast:
            nisa.activation(dst=dst, op=nl.square, data=dst, scale=ROOT, bias=self.shift)
        else:
            nisa.activation(dst=dst, op=nl.exp, data=dst, scale=-1.0)
            nisa.activation(dst=dst, op=nl.log, data=dst, bias=self.one)

    def add_constant(self, w):
        """What `bend` leaves out of the polynomial, into the maxima, where it reaches the lse.

        Nothing else depends on it: it is the same for all keys.
        """
        if self.gating.is_logsigmoid and self.gating.fast:
            nisa.tensor_scalar(dst=w.m, data=w.m, op0=nl.add, operand0=LEFT_OUT)


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

    A *row* is a lane of a trip. Its tiles are on neighbouring partitions, both in the order of the visit.

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
        self.m = gating.kinds.shape[2]  # tiles on a partition
        self.per_row = pmax // n_rows  # partitions
        self.used = n_rows * self.per_row
        self.n_granules = x.outer * x.inner  # of a tile
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        # Rows of K and V: one per granule of the items, granules in the order of the visit. A trip's items have room
        # for all its tiles; after the last one come the next trip's first two.
        self.items = nl.ndarray((gating.n_steps, pmax, n_lanes), dtype=nl.int32, buffer=nl.private_hbm)
        # By partition, see DMA_ENGINES.
        by_granule = self.items.reshape((gating.n_steps, pmax // DMA_ENGINES, DMA_ENGINES, n_lanes))
        self.by_partition = by_granule.permute((0, 2, 1, 3))
        self.bounds = nl.ndarray((n_blocks * self.n_trips, 5), dtype=nl.int32, buffer=nl.private_hbm)
        # Of each trip and lane: 1.0 if the last side's tile is open, the same on every partition.
        self.last = nl.ndarray((n_blocks * self.n_trips, pmax, n_lanes), dtype=nl.float32, buffer=nl.private_hbm)
        self.room = (gating.n_steps - 2) // (n_blocks * self.n_trips)  # items of a trip
        # Of each item and lane, THERE and the names beside it; before the first one an element of no meaning.
        shape = (1 + n_blocks * self.n_trips * self.room, n_lanes, TURNS)
        self.turns = nl.ndarray(shape, dtype=nl.int32, buffer=nl.private_hbm)
        self.units = tile((n_rows, 1), nl.int32)
        # Of each row, LOW and the names beside it, and the same on all its partitions.
        self.of_row = tile((n_rows, STATE), nl.float32)
        self.spread = tile((self.used, STATE), nl.float32)
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
        nisa.memset(dst=self.delta, value=0.0, engine=nisa.engine.gpsimd)
        self.own = tile((n_rows, n_rows, self.per_row), nl.float32)  # 1 for a row's own partitions
        self.row_of = tile((self.used, n_rows), nl.float32)  # the same, turned
        self.before = tile((self.used, n_rows, self.per_row), nl.float32)  # 1 for those after it in its row
        self.masked = tile((self.used, self.used), nl.float32)  # 0 for those before it in its row, else MASKED
        none = tile((pmax, FILL), nl.int32)
        nisa.memset(dst=none, value=NO_TILE)
        n = gating.n_steps * n_lanes
        flat = self.items.reshape((pmax, n))
        for first in range(0, n, FILL):
            end = min(first + FILL, n)
            nisa.dma_copy(dst=flat[:, first:end], src=none[:, 0 : end - first])

    def constants(self, w):
        """Which partitions are a row's, and in which order."""
        n_rows, per_row, used = self.n_rows, self.per_row, self.used
        own = w.identity_f32[0:n_rows, 0:n_rows].reshape((n_rows, n_rows, 1)).broadcast(2, per_row)
        nisa.tensor_copy(dst=self.own, src=own)
        turned = w.t_ps[0:used, 0:n_rows]
        partitions_first(w, turned, self.own.reshape((n_rows, used)))
        nisa.tensor_copy(dst=self.row_of, src=turned)
        # 1 where two partitions are of one row, of which below the diagonal is left.
        pairs_ps = w.t_ps[0:used, 0:used]
        own = self.own.reshape((n_rows, used))
        nisa.nc_matmul(dst=pairs_ps, stationary=own, moving=own, accumulate=False)
        pairs, earlier = tile((used, used), nl.float32), tile((used, used), nl.float32)
        nisa.tensor_copy(dst=pairs, src=pairs_ps)
        before = self.before.reshape((used, used))
        pattern = [[1, used]]
        nisa.affine_select(
            dst=before,
            pattern=pattern,
            channel_multiplier=-1,
            on_true_tile=pairs,
            on_false_value=0.0,
            cmp_op=nl.greater,
        )
        nisa.tensor_tensor(dst=earlier, data1=pairs, data2=before, op=nl.subtract)
        nisa.tensor_tensor(dst=earlier, data1=earlier, data2=w.identity_f32[0:used, 0:used], op=nl.subtract)
        nisa.tensor_scalar(
            dst=self.masked, data=earlier, op0=nl.multiply, operand0=-MASKED, op1=nl.add, operand1=MASKED
        )


def load_first_tiles(tiles):
    """Deltas that `list_tiles` begins with, as soon as they can be had."""
    chunks = tiles.gating.chunks
    if chunks.shape[0] == 1:
        nisa.register_load(tiles.chunk, chunks[0, 0:1])
        load_tiles(tiles, tiles.chunk)


def list_tiles(w, x, tiles):
    """Fills `tiles`, several trips at a time, but for what `list_other_trips` leaves for later."""
    chunks = tiles.gating.chunks

    def other_block(i):
        nisa.register_load(tiles.chunk, chunks.select(0, i)[0:1])
        load_tiles(tiles, tiles.chunk)
        list_block(w, x, tiles, i, tiles.n_rows)

    if chunks.shape[0] > 1:
        nl.fori_loop(1, chunks.shape[0], other_block)
        nisa.register_load(tiles.chunk, chunks[0, 0:1])
        load_tiles(tiles, tiles.chunk)
    list_block(w, x, tiles, 0, w.sizes.n_lanes)


def list_block(w, x, tiles, block, end_row):
    """A block's tiles from those on that have been asked for; of the last ones those of the first rows."""
    last = nisa.register_alloc()
    nisa.register_load(last, tiles.gating.chunks.select(0, block)[1:2])
    half = max(1, tiles.m // 2)
    take_extremes(tiles, 0, half)
    begin_block(w, tiles, block)
    take_extremes(tiles, half, tiles.m)

    def chunk(j):
        test_tiles(w, tiles)
        write_tiles(w, tiles, 0, tiles.n_rows)
        follow_tiles(w, tiles)
        load_tiles(tiles, j, 1)
        take_extremes(tiles, 0, tiles.m)

    nl.fori_loop(tiles.chunk, last, chunk)
    test_tiles(w, tiles)
    write_tiles(w, tiles, 0, end_row)
    follow_tiles(w, tiles)
    end_block(w, x, tiles, block)


def list_other_trips(w, tiles):
    """What the first trip does not wait for: the last tiles of the other ones of its block."""
    if tiles.n_trips > 1:
        write_tiles(w, tiles, w.sizes.n_lanes, tiles.n_rows)


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


def begin_block(w, tiles, block):
    """Limits, extreme alphas and first places of a block's rows, and the bounds of their first sides' tiles.

    Such a tile is cut by the sequence's end, and so has a delta of 0 among its own.
    """
    gating, n_rows, n_keys = tiles.gating, tiles.n_rows, tiles.gating.in_use.shape[2]
    first, floor = tile((n_rows, 1), nl.int32), column(n_rows)
    in_use = tile((n_rows, n_keys), nl.float32)
    nisa.dma_copy(dst=tiles.units, src=gating.units.select(0, block))
    nisa.dma_copy(dst=first, src=gating.first_side.select(0, block))
    nisa.dma_copy(dst=in_use, src=gating.in_use.select(0, block))
    nisa.dma_copy(dst=floor, src=gating.floor.select(0, block))
    nisa.dma_copy(dst=tiles.of_row[:, START], src=gating.start.select(0, block))
    alphas = tile((n_rows, tiles.by_unit.shape[1]), nl.float32)
    gather(alphas, tiles.by_unit, tiles.units)
    gather(tiles.of_row[:, LIMIT], gating.limits, tiles.units)
    low, high = tiles.of_row[:, LOW], tiles.of_row[:, HIGH]
    nisa.tensor_reduce(dst=high, op=nl.maximum, data=alphas, axis=1)
    nisa.tensor_reduce(dst=low, op=nl.minimum, data=alphas, axis=1)
    nisa.memset(dst=tiles.of_row[:, BEST], value=LOWEST)
    nisa.memset(dst=tiles.of_row[:, COUNT], value=0.0)
    nisa.memset(dst=tiles.opened, value=0.0)

    def first_sides(_):
        # What is not in use may be NaN.
        found, delta = tile((n_rows, n_keys), gating.delta.dtype), tile((n_rows, n_keys), gating.delta.dtype)
        nisa.memset(dst=found, value=0.0)
        nisa.memset(dst=delta, value=0.0)
        gather(found, gating.delta, first)
        nisa.tensor_copy_predicated(dst=delta, src=found, predicate=in_use.view(nl.uint32))
        extremes, bound = tile((n_rows, 2, 1), nl.float32), column(n_rows)
        nisa.tensor_reduce(dst=extremes[:, 0], op=nl.maximum, data=delta, axis=1)
        nisa.tensor_reduce(dst=extremes[:, 1], op=nl.minimum, data=delta, axis=1)
        largest_product(bound, extremes, low, high)
        nisa.tensor_tensor(dst=bound, data1=bound, data2=floor, op=nl.add)
        nisa.tensor_scalar(dst=tiles.of_row[:, BEST], data=bound, op0=nl.maximum, operand0=LOWEST)

    there = nisa.register_alloc()
    nisa.register_load(there, gating.chunks.select(0, block)[2:3])
    nl.fori_loop(0, there, first_sides)
    spread_rows(w, tiles)


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


def take_extremes(tiles, begin, end):
    """Largest and smallest delta of some tiles, the tiles of a partition from the last to the first."""
    m = tiles.m
    for i in range(begin, end):
        place = slice(m - 1 - i, m - i)
        nisa.tensor_reduce(dst=tiles.extremes[:, 0, place], op=nl.maximum, data=tiles.delta[:, i], axis=1)
        nisa.tensor_reduce(dst=tiles.extremes[:, 1, place], op=nl.minimum, data=tiles.delta[:, i], axis=1)


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
    is_open, listed = tile((used, m), nl.float32), tile((used, m), nl.float32)
    nisa.scalar_tensor_tensor(
        dst=is_open, data=runs[:, 0:m], op0=nl.add, operand0=limit, op1=nl.less_equal, operand1=bound
    )
    # The last side's tile, the last of all, has no place in an item.
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
    first = tiles.first.broadcast(1, m * tiles.n_granules)
    nisa.tensor_tensor(dst=tiles.keys, data1=first, data2=tiles.inside, op=nl.add)
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
    most, bounds = tile((1, n_trips), nl.int32), tile((1, n_trips, 5), nl.int32)
    nisa.dma_copy(dst=bounds, src=tiles.gating.bounds.select(0, block))
    nisa.tensor_reduce(dst=most, op=nl.maximum, data=across.reshape_dim(1, (n_trips, n_lanes)), axis=2)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.add, operand0=x.n_tiles - 1)
    nisa.tensor_scalar(dst=most, data=most, op0=nl.right_shift, operand0=log2(x.n_tiles))
    nisa.tensor_scalar(dst=most, data=most, op0=nl.maximum, operand0=1)
    nisa.tensor_tensor(dst=bounds[:, :, 1], data1=bounds[:, :, 1], data2=most, op=nl.add)
    by_block = tiles.bounds.reshape((tiles.gating.units.shape[0], 1, n_trips, 5))
    nisa.dma_copy(dst=by_block.select(0, block), src=bounds)

    write_turns(w, x, tiles, block)
    if x.last_edges.start < x.last_edges.stop:
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
        before, item_before = tile((pmax, 1), nl.float32), tile((pmax, 1), nl.float32)
        nisa.iota(dst=before, pattern=[[0, 1]], offset=first * x.n_tiles, channel_multiplier=x.n_tiles)
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
