"""Prefill: scores, exponentials, products with V, and the running state. `w` is the launch's `State`.

The steps of a chunk are a software pipeline, `attend`, or with skip-softmax that of `_prefill_pairs.py`: every engine
is a queue, so what has to wait long is never put in front of what could go on.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_loads import (
    begin_chunk,
    begin_values,
    evict,
    finish_some,
    invert_some,
    next_turn,
    transpose,
    transpose_chunk,
)
from contributed._prefill_select import (
    choose,
    compare,
    mask_hidden,
    select,
    select_planes,
    visible_planes,
)
from contributed._prefill_skip import tile_bias, top_of
from contributed._prefill_state import FINISHED, PT_SLOTS, TURN_LAG
from contributed._prefill_units import Step, steps_of


def follows_closely(lag, before, after):
    """Whether a chunk's steps may begin before those of the chunk before are done with what they share.

    That is V, which is taken over with the first product, and factors of the state, which a tile's next step replaces.
    """
    if len(before) < lag + TURN_LAG + 1:
        return False
    for i_after in range(len(after)):
        for unit in after[i_after].units:
            for i_before in range(max(0, len(before) + i_after - lag - TURN_LAG + 1), len(before)):
                for other in before[i_before].units:
                    if other.tile == unit.tile:
                        return False
    return True


def attend_chunks(w, first, records, results):
    """All tiles of the block with chunks that are part of the program: on the diagonal, below 0 on the left edge.

    Args:
        w: the launch's `State`.
        first: number of the first chunk.
        records: as in `attend`.
        results: as in `attend`.
    """
    z = w.sizes
    begun = 0
    steps: list[Step] = []
    before: list[Step] = []
    for i in range(len(records)):
        after = steps_of(z, i - begun, first + i)
        if i > begun and not follows_closely(z.lag, before, after):
            attend(w, steps, records[begun:i], results)
            begun, steps, after = i, [], steps_of(z, 0, first + i)
        steps.extend(after)
        before = after
    if len(records) > 0:
        attend(w, steps, records[begun : len(records)], results)


def attend(w, steps, records, results):
    """A stream of steps, of one chunk or several, each beginning before the ones before it are done.

    Args:
        w: the launch's `State`.
        steps: what `steps_of` returns.
        records: for each chunk, the record of the second chunk after it.
        results: the block's `Results`, if the chunks are on the diagonal, where row tiles end; else None.
    """
    w.turn = 0  # the body of a loop is built once
    w.n_weighed = 0
    n_steps = len(steps)
    exp_lag, lag = w.sizes.exp_lag, w.sizes.lag
    waiting: list[Turn] = []
    for u in range(n_steps):
        steps[u].number = u
    for u in range(n_steps + lag):
        if u > 0 and u <= n_steps and steps[u - 1].last:
            transpose_chunk(w)
        if u < n_steps:
            if steps[u].first:
                begin_chunk(w, records[steps[u].part])
            score(w, steps[u])
        if u >= exp_lag and u < n_steps + exp_lag:
            exponentials(w, steps[u - exp_lag])
            decay(w, steps[u - exp_lag])
        if u >= lag:
            # At the end, when there are no scores, the Vector Engine has the time.
            weigh(w, u - lag, steps[u - lag], waiting, u > n_steps, results)
        if u < n_steps:
            end_scores(w, u, steps)
        if results != None:
            invert_some(w, results)
            finish_some(w, results, FINISHED)
        if w.selection != None:
            if u < n_steps:
                compare(w, u, steps[u].units, w.x[:, u % w.sizes.x_slots], True)
            if u >= 1 and u <= n_steps:
                choose(w, u - 1, steps[u - 1].units, w.x[:, (u - 1) % w.sizes.x_slots])
            if u < n_steps:
                compare(w, u, steps[u].units, w.x[:, u % w.sizes.x_slots], False)
    for turn in waiting:
        multiply(w, turn, results)


def score(w, step):
    """Scores, and the new maxima."""
    score_products(w, step)
    score_maxima(w, step)
    now, gpsimd = step.now, nisa.engine.gpsimd
    nisa.tensor_tensor(dst=now.of(w.m_new), data1=now.of(w.m), data2=now.of(w.top), op=nl.maximum, engine=gpsimd)
    settle(w, now)


def score_products(w, step):
    """Products of queries and keys."""
    z = w.sizes
    units = step.units
    pmax = nl.tile_size.pmax
    s_ps = w.s_ps[step.number % len(w.s_ps)]
    for unit in units:
        first, begin = unit.at, unit.begin - unit.at
        while first < unit.end:
            # A product stays in a bank.
            end = min(unit.end, (first // w.per_turn + 1) * w.per_turn)
            for i_block in range(z.n_blocks):
                nisa.nc_matmul(
                    dst=s_ps[:, first * pmax : end * pmax],
                    stationary=w.qt_sb[:, i_block, unit.tile, :],
                    moving=w.kt_sb[:, i_block, (begin + first) * pmax : (begin + end) * pmax],
                    accumulate=i_block > 0,
                )
            first = end
        if w.selection != None:
            mask_hidden(w.selection, unit, s_ps)


def score_maxima(w, step):
    """Scores to SBUF, masked, and their maxima."""
    s_ps = w.s_ps[step.number % len(w.s_ps)]
    pmax = nl.tile_size.pmax
    for unit in step.units:
        visible(w, step.number, unit, s_ps[:, unit.at * pmax : unit.end * pmax], step.masked)


def settle(w, now):
    """What follows from new maxima of some tiles: the bias of the exponentials, and how far the maxima rise."""
    m_new, gpsimd = now.of(w.m_new), nisa.engine.gpsimd
    nisa.tensor_tensor(dst=now.of(w.bias), data1=m_new, data2=now.spread(w.neg_scale), op=nl.multiply, engine=gpsimd)
    nisa.tensor_tensor(dst=now.of(w.rise), data1=now.of(w.m), data2=m_new, op=nl.subtract, engine=gpsimd)


def end_scores(w, u, steps):
    """What follows the scores of a chunk's last step: the new maxima."""
    if steps[u].last:
        every = steps[u].every
        nisa.tensor_copy(dst=w.m[:, every], src=w.m_new[:, every], engine=nisa.engine.gpsimd)


def visible(w, u, unit, s_ps, masked):
    """Scores with those masked that a row does not see, and their maximum into `top`."""
    pmax = nl.tile_size.pmax
    i = unit.tile
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
    if w.is_gen2 and not masked:
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=s_ps, axis=1)
        return
    # On others also where all is seen: it costs the same as a maximum, and gives PSUM back at once.
    select(w, x, s_ps, lo, hi, top, True, True, unit.begin)
    if w.is_gen2:
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
                select(w, x[:, at], s_ps[:, at], lo, hi, None, True, False, unit.begin + t)
            nisa.tensor_reduce(dst=top, op=nl.maximum, data=x[:, at], axis=1)
        elif w.selection == None or (unit.first_plain <= t and t < unit.plain):
            select(w, x[:, at], s_ps[:, at], lo, hi, top, True, True, unit.begin + t)
        else:
            select_planes(w, x[:, at], s_ps[:, at], row_tile, top, unit.begin + t)


def exponentials(w, step):
    """Probabilities."""
    u = step.number
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


def decay(w, step):
    """What the state shrinks by, of two steps at a time; and the sums, of tiles that go on with a chunk's last step."""
    for tiles in step.settled:
        nisa.activation(dst=tiles.of(w.decay), op=nl.exp, data=tiles.of(w.rise), scale=w.scale)
    for tiles in step.ended:
        shrink_sums(w, tiles)
        add_sums(w, tiles)


def shrink_sums(w, tiles):
    """Sums of exponentials of some tiles, to their new maxima."""
    l = tiles.of(w.l)
    nisa.tensor_tensor(dst=l, data1=l, data2=tiles.of(w.decay), op=nl.multiply, engine=nisa.engine.gpsimd)


def add_sums(w, tiles):
    """Sums of a chunk's exponentials to those of some tiles."""
    l = tiles.of(w.l)
    nisa.tensor_tensor(dst=l, data1=l, data2=tiles.of(w.total), op=nl.add, engine=nisa.engine.gpsimd)


class Turn(nl.NKIObject):  # type: ignore[misc]
    """Transposed probabilities of some tiles of keys, in SBUF.

    Args:
        step: their step.
        first: number of the first tile in the step.
        p: [128, tiles, 128].
        number: of the place of `p` among those of turns.
    """

    def __init__(self, step, first, p, number):
        self.step = step
        self.first = first
        self.end = first + p.shape[1]
        self.p = p
        self.number = number

    def ends(self, unit):
        """Whether a unit's last tile is one of them."""
        return unit.end > self.first and unit.end <= self.end


def weigh(w, u, step, waiting, by_vector, results):
    """Step u: probabilities are transposed, turn by turn; the turns before them, `waiting`, are multiplied with V."""
    pmax = nl.tile_size.pmax
    p = w.p[:, u % w.sizes.p_slots]
    n_tiles = step.width()
    for first in range(0, n_tiles, w.per_turn):
        n = min(w.per_turn, n_tiles - first)
        number = w.n_weighed % PT_SLOTS
        pt_sb = w.pt_sb[number][:, 0:n, :]
        w.n_weighed = w.n_weighed + 1
        turn = next_turn(w)
        for j in range(n):
            transpose(w, turn[:, j, :], p[:, (first + j) * pmax : (first + j + 1) * pmax])
        evict(w, pt_sb, turn[:, 0:n, :], by_vector)
        waiting.append(Turn(step, first, pt_sb, number))
        if len(waiting) > TURN_LAG:
            multiply(w, waiting.pop(0), results)


def multiply(w, turn, results):
    """Product of a turn with V; where a unit ends, its output is rescaled to the new maximum and added to."""
    if turn.step.first and turn.first == 0:
        begin_values(w)
    for unit in turn.step.units:
        product(w, turn, unit)
        if turn.ends(unit):
            rescale(w, unit)
            if results != None and unit.is_last:
                results.complete(unit.tile)


def product(w, turn, unit):
    """Product of a unit's tiles of a turn with V."""
    o_ps = w.o_ps[unit.number % len(w.o_ps)]
    for at in range(max(unit.at, turn.first), min(unit.end, turn.end)):
        nisa.nc_matmul(
            dst=o_ps,
            stationary=turn.p[:, at - turn.first, :],
            moving=w.v_sb[:, unit.begin + at - unit.at, :],
            accumulate=at > unit.at,
        )


def rescale(w, unit):
    """A unit's output to the new maximum, and its products added."""
    i = unit.tile
    o, o_ps = w.o[:, i, :], w.o_ps[unit.number % len(w.o_ps)]
    nisa.scalar_tensor_tensor(dst=o, data=o, op0=nl.multiply, operand0=w.decay[:, i : i + 1], op1=nl.add, operand1=o_ps)
