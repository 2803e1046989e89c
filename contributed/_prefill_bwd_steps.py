"""Prefill, backward: the steps of chunks, probabilities and their gradients. `w` is the launch's `State`.

The rows of a block are consecutive queries, as in the forward, and so are its steps. dK and dV of a chunk add up in
PSUM over the steps of a block.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_bwd_loads import (
    begin_chunk,
    begin_counts,
    fetch_sums,
    finish_chunk,
    finish_tiles,
    next_deltas,
    next_turn,
    transpose,
    transpose_chunk,
    transpose_rows,
)
from contributed._prefill_bwd_state import (
    DS_SLOTS,
    GROUP,
    LAG,
    LATE,
    LOADED,
    MASKED,
    PARTS,
    SCORE_SLOTS,
    SLOTS,
    TURN_LAG,
)
from contributed._prefill_select import choose, compare, visible_planes
from contributed._prefill_units import steps_of


def steps_of_chunks(z, first, n):
    """Steps of n chunks that follow each other.

    Args:
        z: sizes.
        first: number of the first one among those on the diagonal, below 0 on the left edge; None for the loop's.
        n: how many.
    """
    steps = []
    for i in range(n):
        steps.extend(steps_of(z, i, None if first == None else first + i, True))
    return steps


def parts_in_work(streams):
    """How many chunks have begun when dQ of the first of them takes its keys for the last time; `PARTS` at least."""
    most = PARTS
    for steps in streams:
        for u in range(len(steps)):
            if steps[u].last:
                begun = steps[min(u + LAG + TURN_LAG, len(steps) - 1)].part
                most = max(most, begun - steps[u].part + 1)
    return most


def attend_chunks(w, chunks, penalties, number, first, n):
    """All tiles of the block with n chunks, which are the block's last ones if they are on the diagonal.

    Args:
        w: the launch's `State`.
        chunks: records, from that of the second chunk of the launch on.
        penalties: float32 [n_chunks + 1, n_tiles * kv_tiles] in HBM, or None.
        number: register, of the first chunk.
        first: as in `steps_of_chunks`.
        n: how many.
    """
    records, rows = [], []
    for i in range(n):
        records.append(chunks[i:].select(0, number))
        rows.append(row_of(penalties, 1 + i, number))
    attend(w, steps_of_chunks(w.sizes, first, n), records, rows, first != None and first >= 0)


def take_trips(w, chunks, penalties, first, end, n):
    """Chunks first..end, registers, of the loop, in trips of n; other arguments as above."""

    def trip(j):
        attend_chunks(w, chunks, penalties, j, None, n)

    nl.fori_loop(first, end, trip, n)


def row_of(table, i, number):
    """Row i + `number`, a register, of a table, [1, columns]; None without one."""
    if table == None:
        return None
    return table[i:].select(0, number).reshape((1, table.shape[1]))


def attend(w, steps, records, penalties, ends_block):
    """A stream of steps, of one chunk or several, each beginning before the ones before it are done.

    Args:
        w: the launch's `State`.
        steps: what `steps_of_chunks` returns.
        records: for each chunk, the record of the second chunk after it.
        penalties: for each chunk, those of the chunk after it, [1, n_tiles * kv_tiles] in HBM, or None.
        ends_block: whether the block ends with these steps.
    """
    last_step = [0] * w.sizes.n_tiles
    for u in range(len(steps)):
        for unit in steps[u].units:
            last_step[unit.tile] = u
    if ends_block:
        begin_counts(w)
    # The body of a loop is built once.
    w.turn = 0
    w.n_turned = 0
    w.n_queries = 0
    n_steps = len(steps)
    for u in range(n_steps + LATE):
        begin_step(w, u, steps, records, penalties)
        if u >= LATE:
            add_queries(w, steps[u - LATE])
        if u >= 1 and u <= n_steps:
            differentiate(w, u - 1, steps[u - 1])
        if u >= LAG and u < n_steps + LAG:
            weigh_values(w, u - LAG, steps[u - LAG])
        if w.selection == None and u < n_steps:
            end_step(w, u, steps[u])
        if u >= LAG and u < n_steps + LAG:
            weigh_keys(w, u - LAG, steps[u - LAG])
        if u >= LAG + TURN_LAG and u < n_steps + LAG + TURN_LAG:
            weigh_queries(w, u - LAG - TURN_LAG, steps[u - LAG - TURN_LAG])
        if w.selection != None and u < n_steps:
            # The Tensor Engine has all else to do while the Vector Engine compares.
            choose(w, u, steps[u].units, w.x[:, u % SLOTS])
            probabilities(w, u, steps[u])
            end_step(w, u, steps[u])
        if ends_block:
            end_block(w, u, n_steps, last_step)


def begin_step(w, u, steps, records, penalties):
    """Step u, if there is one: scores, and probabilities or comparisons; before the first of a chunk, the chunk."""
    if u < len(steps):
        step = steps[u]
        if step.first:
            begin_chunk(w, step, records[step.part], penalties[step.part])
        multiply(w, step, w.s_ps[u % SCORE_SLOTS], w.qt_sb, w.kt_sb)
        if w.selection == None:
            probabilities(w, u, step)
        else:
            compare_scores(w, u, step)


def end_step(w, u, step):
    """Step u: dP; after the last of a chunk, the next chunk's keys."""
    multiply(w, step, w.dp_ps[u % len(w.dp_ps)], w.dot_sb, w.vt_sb)
    if step.last:
        transpose_chunk(w)


def end_block(w, u, n_steps, last_step):
    """Beside the steps that end a block: its tiles as they are complete, and the rows of the next block."""
    if u >= n_steps:
        transpose_rows(w, u - n_steps, LATE)
    elif u >= min(LOADED, n_steps // 4):
        next_deltas(w)
    end = w.n_finished
    while end < min(w.n_deltas, w.n_finished + GROUP) and last_step[end] <= u - LATE:
        end = end + 1
    finish_tiles(w, end)


def multiply(w, step, dst, stationary, moving):
    """dst = products of a step's rows with the chunk's keys, both transposed."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    for unit in step.units:
        for i_block in range(z.n_blocks):
            nisa.nc_matmul(
                dst=dst[:, columns(unit)],
                stationary=stationary[:, i_block, unit.tile, :],
                moving=moving[:, i_block, unit.begin * pmax : (unit.begin + unit.width) * pmax],
                accumulate=i_block > 0,
            )


def compare_scores(w, u, step):
    """Step u, with N:M selection: scores as rows see them, and who beats whom."""
    s_ps, x = w.s_ps[u % SCORE_SLOTS], w.x[:, u % SLOTS, :]
    for unit in step.units:
        here = columns(unit)
        visible_planes(w, unit, x[:, here], s_ps[:, here], unit.tile // w.sizes.heads, None)
    for early in (True, False):
        compare(w, u, step.units, x, early)


def probabilities(w, u, step):
    """Step u: probabilities, in float32 and as they are multiplied."""
    z = w.sizes
    s_ps, x = w.s_ps[u % SCORE_SLOTS], w.x[:, u % SLOTS, :]
    for unit in step.units:
        row_tile, head = unit.tile // z.heads, unit.tile % z.heads
        here = columns(unit)
        source = s_ps[:, here]
        if w.selection != None:
            source = x[:, here]
        elif unit.plain < unit.width:
            visible(w, x[:, here], source, row_tile, unit.begin)
            source = x[:, here]
        if z.skips:
            exponentials_of_tiles(w, unit, x[:, here], source, w.tile_bias[step.part % len(w.tile_bias)])
            continue
        bias = w.neg_lse[:, row_tile, head : head + 1]
        nisa.activation(dst=x[:, here], op=nl.exp, data=source, scale=w.scale, bias=bias)
    if not w.is_float32:
        every = slice(0, step.width() * nl.tile_size.pmax)
        nisa.tensor_copy(dst=w.p[:, u % SLOTS, every], src=x[:, every], engine=nisa.engine.gpsimd)


def exponentials_of_tiles(w, unit, x, scores, bias):
    """The same of a unit, each tile with its own bias, of [128, n_tiles, kv_tiles]: 0 for skipped ones."""
    pmax = nl.tile_size.pmax
    for t in range(unit.width):
        here = slice(t * pmax, (t + 1) * pmax)
        b = bias[:, unit.tile, unit.begin + t : unit.begin + t + 1]
        nisa.activation(dst=x[:, here], op=nl.exp, data=scores[:, here], scale=w.scale, bias=b)


def visible(w, x, s_ps, row_tile, begin):
    """x = scores of a chunk's tiles from `begin` on, with those masked that a row does not see."""
    lo, hi = w.lo[:, row_tile : row_tile + 1], w.hi[:, row_tile : row_tile + 1]
    before = begin * nl.tile_size.pmax
    if not w.is_gen2:
        nisa.range_select(
            dst=x,
            on_true_tile=s_ps,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=lo,
            bound1=hi,
            range_start=before,
        )
        return
    # At first 1 for what is outside, else 0.
    position = w.position[:, before : before + x.shape[1]]
    nisa.tensor_scalar(dst=x, data=position, op0=nl.less, operand0=lo)
    nisa.scalar_tensor_tensor(dst=x, data=position, op0=nl.greater_equal, operand0=hi, op1=nl.maximum, operand1=x)
    nisa.scalar_tensor_tensor(dst=x, data=x, op0=nl.multiply, operand0=MASKED, op1=nl.add, operand1=s_ps)


def differentiate(w, u, step):
    """Step u: dS, without the scale."""
    for unit in step.units:
        here = columns(unit)
        nisa.scalar_tensor_tensor(
            dst=w.ds[:, u % DS_SLOTS, here],
            data=w.dp_ps[u % len(w.dp_ps)][:, here],
            op0=nl.subtract,
            operand0=w.delta[:, unit.tile : unit.tile + 1],
            op1=nl.multiply,
            operand1=w.x[:, u % SLOTS, here],
        )


def weigh_values(w, u, step):
    """Step u: its part in dV."""
    if step.first:
        fetch_sums(w, step)
    add_rows(w, step, w.dv_ps, w.p[:, u % SLOTS, :], w.do_sb)


def weigh_keys(w, u, step):
    """Step u: its part in dK; dS is transposed."""
    w.begun = add_rows(w, step, w.dk_ps, w.ds[:, u % DS_SLOTS, :], w.q_sb)
    turn_over(w, u, step)
    if step.last:
        finish_chunk(w, step)


def add_rows(w, step, dst, weights, rows):
    """dst[:, t] += weights_t^T rows for each tile t of keys. Returns how many have been added to in this chunk."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    begun = w.begun
    for unit in step.units:
        row_tile, head = unit.tile // z.heads, unit.tile % z.heads
        for t in range(unit.width):
            at, key_tile = (unit.at + t) * pmax, unit.begin + t
            nisa.nc_matmul(
                dst=dst[:, key_tile, :],
                stationary=weights[:, at : at + pmax],
                moving=rows[:, row_tile, head * z.d : (head + 1) * z.d],
                accumulate=key_tile < begun,
            )
        # Those before it have been added to, as the first row tile of a chunk begins with its first tile of keys.
        begun = max(begun, unit.begin + unit.width)
    return begun


def turn_over(w, u, step):
    """Step u: dS with keys first."""
    pmax = nl.tile_size.pmax
    turn, n = next_turn(w), step.width()
    for j in range(n):
        transpose(w, turn[:, j, :], w.ds[:, u % DS_SLOTS, j * pmax : (j + 1) * pmax])
    nisa.activation(dst=w.dst_sb[u % SLOTS][:, 0:n, :], op=nl.copy, data=turn[:, 0:n, :])


def weigh_queries(w, u, step):
    """Step u: its part in dQ."""
    k = w.k_sb[step.part % len(w.k_sb)]
    for unit in step.units:
        dq_ps = w.dq_ps[w.n_turned % len(w.dq_ps)]
        w.n_turned = w.n_turned + 1
        for t in range(unit.width):
            nisa.nc_matmul(
                dst=dq_ps,
                stationary=w.dst_sb[u % SLOTS][:, unit.at + t, :],
                moving=k[:, unit.begin + t, :],
                accumulate=t > 0,
            )


def add_queries(w, step):
    """A step's part in dQ, added up."""
    for unit in step.units:
        dq_ps = w.dq_ps[w.n_queries % len(w.dq_ps)]
        w.n_queries = w.n_queries + 1
        dq = w.dq[:, unit.tile, :]
        nisa.scalar_tensor_tensor(
            dst=dq, data=dq_ps, op0=nl.multiply, operand0=w.softmax_scale, op1=nl.add, operand1=dq
        )


def columns(unit):
    """A unit's keys among those of its step."""
    pmax = nl.tile_size.pmax
    return slice(unit.at * pmax, unit.end * pmax)
