"""Prefill: loads, scores, exponentials, products with V, and the running state. `w` is the launch's `State`."""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_select import (
    begin_chunk_planes,
    choose,
    compare,
    select,
    select_planes,
    visible_planes,
)
from contributed._prefill_skip import (
    begin_rows,
    bias_of,
    count,
    end_rows,
    keep_decisions,
    tile_bias,
    top_of,
    want,
)
from contributed._prefill_state import (
    CLEARED,
    EMPTY,
    MASKED,
    PT_SLOTS,
    RECORD_COLUMNS,
    TINY,
    TURN_LAG,
    TURNS,
    tile,
)

# ---------------------------------------------------------------------------------------------------
# Loads


def fetch_block(w, records, whole):
    """The queries of the block whose record has come, and the record [128, 3, q_tiles] of the block after it.

    Args:
        w: the launch's `State`.
        records: of the block after it.
        whole: register, 1 if the block has all its rows, 0 if not; None if all blocks of the launch have.
    """
    nisa.tensor_copy(dst=w.block_loading, src=w.block_coming, engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=w.block_coming, src=records)
    if not w.sizes.ragged:
        nisa.dma_copy(dst=w.q_sb, src=block_rows(w, w.q, w.block_loading))
        return

    def all_rows(_):
        nisa.dma_copy(dst=w.q_sb, src=block_rows(w, w.q, w.block_loading))

    def some_rows(_):
        for row_tile in range(w.sizes.q_tiles):
            rows = w.block_loading[:, 0, row_tile : row_tile + 1]
            nisa.dma_copy(dst=w.q_sb[:, row_tile, :], src=chosen_rows(w.q, rows), oob_mode=nisa.oob_mode.skip)

    nl.fori_loop(0, whole, all_rows)
    nl.fori_loop(whole, 1, some_rows)


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


def begin_block(w, records, whole):
    """Take over the block whose queries have come, and load the next one's; `records`, `whole`: `fetch_block`."""
    nisa.tensor_copy(dst=w.block_now, src=w.block_loading, engine=nisa.engine.gpsimd)
    nisa.memset(dst=w.m, value=-w.floor, engine=nisa.engine.gpsimd)
    nisa.memset(dst=w.l, value=0.0, engine=nisa.engine.gpsimd)
    if w.skipping != None:
        begin_rows(w)
    transpose_queries(w)
    fetch_block(w, records, whole)


def transpose_queries(w):
    """Queries of the block to [d, rows], times the sign of the scale."""
    z = w.sizes
    w.turn = 0  # the body of a loop is built once
    for i_block in range(z.n_blocks):
        for first in range(0, z.n_tiles, w.per_turn):
            n = min(w.per_turn, z.n_tiles - first)
            turn = next_turn(w)
            for i in range(n):
                row_tile, head = (first + i) // z.heads, (first + i) % z.heads
                at = head * z.d + i_block * z.db
                transpose(w, turn[0 : z.db, i, :], w.q_sb[:, row_tile, at : at + z.db])
            dst = w.qt_sb[:, i_block, first : first + n, :]
            if first // w.per_turn % 2 == 0:
                nisa.tensor_scalar(dst=dst, data=turn[0 : z.db, 0:n, :], op0=nl.multiply, operand0=w.q_sign)
            else:
                nisa.activation(dst=dst, op=nl.copy, data=turn[0 : z.db, 0:n, :], scale=w.q_sign)
            if w.selection != None and w.selection.by_tensor:
                neg = w.selection.neg_qt[:, first : first + n, :]
                nisa.activation(dst=neg, op=nl.copy, data=turn[0 : z.db, 0:n, :], scale=-w.q_sign)


def fetch_chunk(w, records):
    """K and V of the chunk whose record has come, and the record of the chunk after it."""
    fetch_keys(w, records)
    fetch_values(w)


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
    nisa.tensor_copy(dst=w.now, src=w.loading, engine=nisa.engine.gpsimd)
    fetch_keys(w, records)
    # Rows see keys lo..hi of their sequence, the chunk has base..stop of them.
    base, stop = column(w.now, 1), column(w.now, 2)
    lo, hi = w.block_now[:, 1, :].view(nl.float32), w.block_now[:, 2, :].view(nl.float32)
    gpsimd = nisa.engine.gpsimd
    nisa.tensor_tensor(dst=w.lo, data1=lo, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=gpsimd)
    nisa.tensor_tensor(dst=w.hi, data1=hi, data2=stop.broadcast(1, z.q_tiles), op=nl.minimum, engine=gpsimd)
    nisa.tensor_tensor(dst=w.hi, data1=w.hi, data2=base.broadcast(1, z.q_tiles), op=nl.subtract, engine=gpsimd)
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


def transpose_chunk(w):
    """K of the chunk that is loading, to [d, keys]."""
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
            evict(w, dst, turn[0 : z.db, 0:n, :].reshape((z.db, n * pmax)))


# ---------------------------------------------------------------------------------------------------
# Steps


class Unit(nl.NKIObject):  # type: ignore[misc]
    """A tile of rows of one head with the keys of a chunk that it sees.

    Args:
        tile: number of the row tile and head.
        width: tiles of keys.
        at: tiles of the units before it in its step.
        plain: tiles, from the first on, of which all rows see all keys.
        recent: first tile with keys that rows always keep, or `width`.
    """

    def __init__(self, tile, width, at, plain, recent):
        self.tile = tile
        self.width = width
        self.plain = min(plain, width)
        self.recent = min(recent, width)
        self.at = at
        self.end = at + width
        self.pair = 0  # of steps, and its group of columns there, see `_prefill_skip.py`
        self.group = 0


class Step(nl.NKIObject):  # type: ignore[misc]
    """Units whose scores share a slot of PSUM.

    Args:
        part: number of the chunk among those of a stream.
        masked: whether there are keys that a row does not see.
    """

    def __init__(self, part, masked):
        self.part = part
        self.masked = masked
        self.units = []
        self.first = False  # of its chunk
        self.last = False
        self.first_tile = 0  # of the chunk's; those after it all see keys of the chunk

    def width(self):
        """Tiles of keys of all units."""
        return 0 if len(self.units) == 0 else self.units[len(self.units) - 1].end

    def tiles(self):
        """The units' tiles."""
        return slice(self.units[0].tile, self.units[len(self.units) - 1].tile + 1)


def steps_of(z, part, i_diagonal):
    """Steps of a chunk: units one after the other, as many as have room."""
    masked = z.masked or i_diagonal != None
    steps = [Step(part, masked)]
    for i in range(z.n_tiles):
        width = z.kv_tiles if i_diagonal == None else z.width(i // z.heads, i_diagonal)
        if width > 0:
            at = steps[len(steps) - 1].width()
            if at + width > z.kv_tiles:
                steps.append(Step(part, masked))
                at = 0
            row_tile = i // z.heads
            plain, recent = z.plain_tiles(row_tile, i_diagonal), z.first_recent(row_tile, i_diagonal)
            steps[len(steps) - 1].units.append(Unit(i, width, at, plain, recent))
    last = steps[len(steps) - 1]
    steps[0].first = True
    last.last = True
    last.first_tile = steps[0].tiles().start
    return steps


def follows_closely(lag, before, after):
    """Whether a chunk's steps may begin before those of the chunk before are done with what they share.

    That is V, which is taken over with the first product, and factors of the state, which a tile's next step replaces.
    """
    if len(before) < lag + TURN_LAG + 1:
        return False
    for i_after in range(len(after)):
        for unit in after[i_after].units:
            for i_before in range(len(before)):
                tiles = before[i_before].tiles()
                here = tiles.start <= unit.tile and unit.tile < tiles.stop
                if here and len(before) - i_before + i_after < lag + TURN_LAG:
                    return False
    return True


def attend_diagonal(w, records, rows):
    """All tiles of the block with the chunks on the diagonal; `records` and `rows` as in `attend`."""
    z = w.sizes
    begun = 0
    steps: list[Step] = []
    before: list[Step] = []
    for i in range(z.n_diagonal):
        after = steps_of(z, i - begun, i)
        if i > begun and not follows_closely(z.lag, before, after):
            attend(w, steps, records[begun:i], rows[begun:i])
            begun, steps, after = i, [], steps_of(z, 0, i)
        steps.extend(after)
        before = after
    if z.n_diagonal > 0:
        attend(w, steps, records[begun : z.n_diagonal], rows[begun : z.n_diagonal])


def attend(w, steps, records, rows):
    """A stream of steps, of one chunk or several, each beginning before the ones before it are done.

    Args:
        w: the launch's `State`.
        steps: what `steps_of` returns.
        records: for each chunk, the record of the second chunk after it.
        rows: for each chunk, where its decisions go, [1, n_tiles * kv_tiles] in HBM, or None.
    """
    w.turn = 0  # the body of a loop is built once
    w.n_weighed = 0
    n_steps = len(steps)
    exp_lag, lag = w.sizes.exp_lag, w.sizes.lag
    number_pairs(steps)
    waiting: list[Turn] = []
    for u in range(n_steps + lag):
        if u > 0 and u <= n_steps and steps[u - 1].last:
            transpose_chunk(w)
        if u < n_steps:
            if steps[u].first:
                begin_chunk(w, records[steps[u].part])
            score(w, u, steps[u])
        if w.skipping != None and u >= 2 and u < n_steps + 2:
            skip(w, u - 2, steps, rows)
        if u >= exp_lag and u < n_steps + exp_lag:
            exponentials(w, u - exp_lag, steps[u - exp_lag])
            decay(w, u - exp_lag, steps)
        if u >= lag:
            # At the end, when there are no scores, the Vector Engine has the time.
            weigh(w, u - lag, steps[u - lag], waiting, u > n_steps)
        if w.skipping != None and u >= 1 and u < n_steps + 1 and len(pair_of(u - 1, steps)) > 0:
            count(w, pair_of(u - 1, steps))
        if u < n_steps:
            end_scores(w, u, steps)
        if w.selection != None:
            if u < n_steps:
                compare(w, u, steps[u].units, w.x[:, u % w.sizes.x_slots], True)
            if u >= 1 and u <= n_steps:
                choose(w, u - 1, steps[u - 1].units, w.x[:, (u - 1) % w.sizes.x_slots])
            if u < n_steps:
                compare(w, u, steps[u].units, w.x[:, u % w.sizes.x_slots], False)
    for turn in waiting:
        multiply(w, turn)


def skip(w, u, steps, rows):
    """Decisions about the tiles of every second step, and after the last one of a chunk to HBM."""
    units = pair_of(u, steps)
    if len(units) > 0:
        bias_of(w, units)
    if steps[u].last:
        keep_decisions(w, rows[steps[u].part])


def number_pairs(steps):
    """Tell units which pair of steps they are in, and their number there."""
    for u in range(len(steps)):
        units = pair_of(u, steps)
        for i in range(len(units)):
            units[i].pair = u // 2
            units[i].group = i


def score(w, u, step):
    """Step u: scores, and the new maxima."""
    z = w.sizes
    units = step.units
    pmax = nl.tile_size.pmax
    gpsimd = nisa.engine.gpsimd
    s_ps = w.s_ps[u % len(w.s_ps)]
    for unit in units:
        first = unit.at
        while first < unit.end:
            # A product stays in a bank.
            end = min(unit.end, (first // w.per_turn + 1) * w.per_turn)
            for i_block in range(z.n_blocks):
                nisa.nc_matmul(
                    dst=s_ps[:, first * pmax : end * pmax],
                    stationary=w.qt_sb[:, i_block, unit.tile, :],
                    moving=w.kt_sb[:, i_block, (first - unit.at) * pmax : (end - unit.at) * pmax],
                    accumulate=i_block > 0,
                )
            first = end
    for unit in units:
        visible(w, u, unit, s_ps[:, unit.at * pmax : unit.end * pmax], step.masked)
    if w.skipping == None:
        now = step.tiles()
        nisa.tensor_tensor(dst=w.m_new[:, now], data1=w.m[:, now], data2=w.top[:, now], op=nl.maximum, engine=gpsimd)
        settle(w, now)


def settle(w, now):
    """What follows from new maxima of some tiles: the bias of the exponentials, and how far the maxima rise."""
    gpsimd = nisa.engine.gpsimd
    neg_scale = w.neg_scale.broadcast(1, now.stop - now.start)
    nisa.tensor_tensor(dst=w.bias[:, now], data1=w.m_new[:, now], data2=neg_scale, op=nl.multiply, engine=gpsimd)
    nisa.tensor_tensor(dst=w.rise[:, now], data1=w.m[:, now], data2=w.m_new[:, now], op=nl.subtract, engine=gpsimd)


def end_scores(w, u, steps):
    """What follows the scores of a step: of every second one what rows want, of a chunk's last the new maxima."""
    units = pair_of(u, steps)
    if w.skipping != None and len(units) > 0:
        want(w, units)
        settle(w, slice(units[0].tile, units[len(units) - 1].tile + 1))
    if steps[u].last:
        every = slice(steps[u].first_tile, w.sizes.n_tiles)
        nisa.tensor_copy(dst=w.m[:, every], src=w.m_new[:, every], engine=nisa.engine.gpsimd)
        if w.skipping != None:
            end_rows(w, every)


def pair_of(u, steps):
    """The units of two steps of a chunk, if step u is the second or there is no second; none otherwise."""
    if u % 2 == 0 and not steps[u].last:
        return []
    if u % 2 == 0 or steps[u].first:
        return steps[u].units
    return steps[u - 1].units + steps[u].units


def visible(w, u, unit, s_ps, masked):
    """Scores with those masked that a row does not see, and their maximum into `top`."""
    pmax = nl.tile_size.pmax
    i, n = unit.tile, s_ps.shape[1]
    top = w.top[:, i : i + 1]
    row_tile = i // w.sizes.heads
    lo, hi = w.lo[:, row_tile : row_tile + 1], w.hi[:, row_tile : row_tile + 1]
    x = w.x[:, u % w.sizes.x_slots, unit.at * pmax : unit.end * pmax]
    if w.skipping != None:
        visible_tiles(w, unit, x, s_ps, row_tile)
        return
    if w.selection != None:
        visible_planes(w, unit, x, s_ps, row_tile, top)
        return
    if not w.is_gen2:
        # Also where all is seen: it costs the same as a maximum, and gives PSUM back at once.
        nisa.range_select(
            dst=x,
            on_true_tile=s_ps,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=lo,
            bound1=hi,
            reduce_op=nl.maximum,
            reduce_res=top,
        )
        return
    if not masked:
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=s_ps, axis=1)
        return
    outside, position = w.outside[:, 0:n], w.position[:, 0:n]
    nisa.tensor_scalar(dst=outside, data=position, op0=nl.less, operand0=lo)
    nisa.scalar_tensor_tensor(
        dst=outside, data=position, op0=nl.greater_equal, operand0=hi, op1=nl.maximum, operand1=outside
    )
    nisa.scalar_tensor_tensor(dst=x, data=outside, op0=nl.multiply, operand0=MASKED, op1=nl.add, operand1=s_ps)
    nisa.tensor_reduce(dst=top, op=nl.maximum, data=x, axis=1)


def visible_tiles(w, unit, x, s_ps, row_tile):
    """The same with a maximum for each tile of keys."""
    pmax = nl.tile_size.pmax
    if w.is_gen2 and w.selection != None:
        visible_planes(w, unit, x, s_ps, row_tile, None)
    lo, hi = w.lo[:, row_tile : row_tile + 1], w.hi[:, row_tile : row_tile + 1]
    for t in range(unit.width):
        at, top = slice(t * pmax, (t + 1) * pmax), top_of(w, unit, t)
        if w.is_gen2:
            if w.selection == None:
                select(w, x[:, at], s_ps[:, at], lo, hi, None, True, False, t)
            nisa.tensor_reduce(dst=top, op=nl.maximum, data=x[:, at], axis=1)
        elif w.selection == None or t < unit.plain:
            select(w, x[:, at], s_ps[:, at], lo, hi, top, True, True, t)
        else:
            select_planes(w, x[:, at], s_ps[:, at], row_tile, top, t)


def exponentials(w, u, step):
    """Step u: probabilities."""
    plain = w.is_gen2 and not step.masked and w.selection == None and w.skipping == None
    x = w.s_ps[u % len(w.s_ps)] if plain else w.x[:, u % w.sizes.x_slots]
    for unit in step.units:
        now = slice(unit.tile, unit.tile + 1)
        if w.skipping == None:
            exponential(w, u, unit.at, unit.end, x, w.bias[:, now], nisa.reduce_cmd.reset_reduce, w.total[:, now])
            continue
        for t in range(unit.width):
            command = nisa.reduce_cmd.reset_reduce if t == 0 else nisa.reduce_cmd.reduce
            total = w.total[:, now] if t == unit.width - 1 else None
            exponential(w, u, unit.at + t, unit.at + t + 1, x, tile_bias(w, unit, t), command, total)


def exponential(w, u, first, end, x, bias, command, total):
    """Probabilities of some tiles of a step, and, if `total` is not None, their sum and that of the calls before."""
    keys = slice(first * nl.tile_size.pmax, end * nl.tile_size.pmax)
    nisa.activation(
        dst=w.p[:, u % w.sizes.p_slots, keys],
        op=nl.exp,
        data=x[:, keys],
        scale=w.scale,
        bias=bias,
        reduce_op=nl.add,
        reduce_res=total,
        reduce_cmd=command,
    )


def decay(w, u, steps):
    """What the state shrinks by, of two steps at a time; and of the last one of a chunk the sums."""
    units = pair_of(u, steps)
    if len(units) > 0:
        now = slice(units[0].tile, units[len(units) - 1].tile + 1)
        nisa.activation(dst=w.decay[:, now], op=nl.exp, data=w.rise[:, now], scale=w.scale)
    if steps[u].last:
        gpsimd = nisa.engine.gpsimd
        every = slice(steps[u].first_tile, w.sizes.n_tiles)
        l = w.l[:, every]
        nisa.tensor_tensor(dst=l, data1=l, data2=w.decay[:, every], op=nl.multiply, engine=gpsimd)
        nisa.tensor_tensor(dst=l, data1=l, data2=w.total[:, every], op=nl.add, engine=gpsimd)


class Turn(nl.NKIObject):  # type: ignore[misc]
    """Transposed probabilities of some tiles of keys, in SBUF.

    Args:
        step: their step.
        first: number of the first tile in the step.
        p: [128, tiles, 128].
    """

    def __init__(self, step, first, p):
        self.step = step
        self.first = first
        self.p = p


def weigh(w, u, step, waiting, by_vector):
    """Step u: probabilities are transposed, turn by turn; the turns before them, `waiting`, are multiplied with V."""
    pmax = nl.tile_size.pmax
    p = w.p[:, u % w.sizes.p_slots]
    n_tiles = step.width()
    for first in range(0, n_tiles, w.per_turn):
        n = min(w.per_turn, n_tiles - first)
        pt_sb = w.pt_sb[w.n_weighed % PT_SLOTS][:, 0:n, :]
        w.n_weighed = w.n_weighed + 1
        turn = next_turn(w)
        for j in range(n):
            transpose(w, turn[:, j, :], p[:, (first + j) * pmax : (first + j + 1) * pmax])
        evict(w, pt_sb, turn[:, 0:n, :], by_vector)
        waiting.append(Turn(step, first, pt_sb))
        if len(waiting) > TURN_LAG:
            multiply(w, waiting.pop(0))


def multiply(w, turn):
    """Product of a turn with V; where a unit ends, its output is rescaled to the new maximum and added to."""
    if turn.step.first and turn.first == 0:
        begin_values(w)
    end = turn.first + turn.p.shape[1]
    for unit in turn.step.units:
        o_ps = w.o_ps[unit.tile % len(w.o_ps)]
        for at in range(max(unit.at, turn.first), min(unit.end, end)):
            nisa.nc_matmul(
                dst=o_ps,
                stationary=turn.p[:, at - turn.first, :],
                moving=w.v_sb[:, at - unit.at, :],
                accumulate=at > unit.at,
            )
        if unit.end > turn.first and unit.end <= end:
            i = unit.tile
            o = w.o[:, i, :]
            nisa.scalar_tensor_tensor(
                dst=o, data=o, op0=nl.multiply, operand0=w.decay[:, i : i + 1], op1=nl.add, operand1=o_ps
            )


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


# ---------------------------------------------------------------------------------------------------
# Results


def finish_block(w, whole):
    """Normalise the block's outputs and store them, with their lse; then begin anew. `whole` as in `fetch_block`."""
    z = w.sizes
    # A copy, as stores hold it for long.
    nisa.tensor_copy(dst=w.block_storing, src=w.block_now)
    d = z.d
    l, inverse = tile(w.l.shape, nl.float32), tile(w.l.shape, nl.float32)
    nisa.tensor_scalar(dst=l, data=w.l, op0=nl.maximum, operand0=TINY)
    nisa.reciprocal(dst=inverse, data=l)
    for i in range(z.n_tiles):
        row_tile, head = i // z.heads, i % z.heads
        dst, factor = w.o_sb[:, row_tile, head * d : (head + 1) * d], inverse[:, i : i + 1]
        if i % 2 == 0:
            nisa.tensor_scalar(dst=dst, data=w.o[:, i, :], op0=nl.multiply, operand0=factor)
        else:
            nisa.activation(dst=dst, op=nl.copy, data=w.o[:, i, :], scale=factor)
        if i % CLEARED == CLEARED - 1 or i == z.n_tiles - 1:
            nisa.memset(dst=w.o[:, i // CLEARED * CLEARED : i + 1, :], value=0.0, engine=nisa.engine.gpsimd)
    if w.lse_hbm != None:
        lse, empty = w.lse_sb.reshape(w.l.shape), tile(w.l.shape, nl.float32)
        nisa.activation(dst=lse, op=nl.log, data=l)
        nisa.scalar_tensor_tensor(dst=lse, data=w.m, op0=nl.multiply, operand0=w.scale, op1=nl.add, operand1=lse)
        # Twice MASKED is beyond float32: an empty row's lse becomes -inf.
        nisa.tensor_scalar(dst=empty, data=l, op0=nl.less, operand0=EMPTY, op1=nl.multiply, operand1=MASKED)
        nisa.scalar_tensor_tensor(dst=lse, data=empty, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=lse)
    store(w, w.o_hbm, w.o_sb, whole)
    if w.lse_hbm != None:
        store(w, w.lse_hbm, w.lse_sb, whole)


def store(w, x_hbm, x_sb, whole):
    """The block's rows of a result; `whole` as in `fetch_block`."""
    if not w.sizes.ragged:
        nisa.dma_copy(dst=block_rows(w, x_hbm, w.block_storing), src=x_sb)
        return

    def all_rows(_):
        nisa.dma_copy(dst=block_rows(w, x_hbm, w.block_storing), src=x_sb)

    def some_rows(_):
        for row_tile in range(w.sizes.q_tiles):
            dst = chosen_rows(x_hbm, w.block_storing[:, 0, row_tile : row_tile + 1])
            nisa.dma_copy(dst=dst, src=x_sb[:, row_tile, :], oob_mode=nisa.oob_mode.skip)

    nl.fori_loop(0, whole, all_rows)
    nl.fori_loop(whole, 1, some_rows)
