"""Sparse decode: the items of a trip, from the keys that are asked for to the values that join the state.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. The values of an item are asked for when it is decided
which of its tiles stay, and used one item later: while they come, the next keys are scored. Keys come an item ahead.
"""

from __future__ import annotations

from contributed._decode_loads import gather, load_k_of_lane
from contributed._decode_scores import (
    AHEAD,
    lane_maximum,
    lane_rows,
    multiply_keys,
    score_items,
    scores,
    transpose_keys,
    turns_of,
)
from contributed._decode_softmax import add_total
from contributed._decode_state import MASKED
from contributed._nki import at_most, nisa, nl
from contributed._sparse_open_state import ENDED, NONE, THERE


def look(w, x, ahead, behind):
    """Scores of the items, after the exponentials `behind` them; then the keys of the next ones are asked for."""
    next_item(w, x, ahead)
    score_items(w, w.item_now, x.top, behind)
    take_keys(w, x, not x.judged)


def next_item(w, x, ahead):
    """The item whose keys come is the one in work, and the one after it that whose keys are asked for next."""
    nisa.tensor_copy(dst=w.item_now, src=w.item_of_v)
    if x.listed:
        mask = w.item_now[:, :, w.sizes.at.mask].view(nl.float32)
        rows = w.item_now[:, :, w.sizes.at.v]
        nisa.tensor_scalar(dst=mask, data=rows, op0=nl.less, operand0=0.0, op1=nl.multiply, operand1=MASKED)
    # The record after the next one is asked for before the next one's keys: it would have to wait for those.
    x.take_item(w, nisa.engine.gpsimd if x.listed else nisa.engine.vector)
    x.ask_for_item(w, ahead)


def look_by_lane(w, x, ahead, turns, over):
    """As `look`, where no decision is waited for: the items behind are weighed, and lanes without an item do nothing.

    Args:
        w: the launch's `State`.
        x: its `Skipping`.
        ahead: rows of items that are asked for.
        turns: [n_lanes, ...] of `OpenTiles.turns`, of the items; with `over` of those behind.
        over: whether the items are the first of a trip, which every lane has, and those behind the last of another one.
    """
    next_item(w, x, ahead)
    forget(w, x)
    there, other = nisa.register_alloc(), nisa.register_alloc()
    for lane in range(w.sizes.n_lanes):
        nisa.register_load(there, turns[lane, THERE : THERE + 1])
        which = NONE if over else ENDED
        nisa.register_load(other, turns[lane, which : which + 1])
        look_at_lane(w, x, lane, there, other, over)
    # The item in work is another one before the last lane's values can be asked for.
    x.take_rows_of_v(w.item_now[:, :, w.sizes.at.v])
    take_keys(w, x, True)


def look_at_lane(w, x, lane, there, other, over):
    """A lane of `look_by_lane`, as two registers of 1 or 0 say."""

    def go_on(_):
        score_item(w, x, lane, True)

    def begin_or_end(_):
        if over:
            score_item(w, x, lane, False)
        else:
            weigh_item(w, x, lane)

    nl.fori_loop(0, at_most(there, 1), go_on)
    nl.fori_loop(0, at_most(other, 1), begin_or_end)


def drain(w, x, turns):
    """The last items of all; `turns` says which lanes have one."""
    forget(w, x)
    there = nisa.register_alloc()
    for lane in range(w.sizes.n_lanes):
        nisa.register_load(there, turns[lane, THERE : THERE + 1])
        drain_lane(w, x, lane, there)


def drain_lane(w, x, lane, there):
    """A lane of `drain`, as a register of 1 or 0 says."""

    def end(_):
        weigh_item(w, x, lane)

    nl.fori_loop(0, at_most(there, 1), end)


def weigh_item(w, x, lane):
    """A lane's probabilities, and the values that they weigh."""
    x.exponentials(w, lane)
    x.weigh(w, lane)


def forget(w, x):
    """Lanes that are done add nothing."""
    nisa.memset(dst=x.total, value=0.0)
    nisa.memset(dst=w.o_ps, value=0.0)


def score_item(w, x, lane, behind):
    """Scores of a lane's item; with `behind` also exponentials and weighed values of the one before it."""
    n_turns = turns_of(w, w.sizes.tokens)
    if behind:
        x.exponentials(w, lane)
    w.gates.begin_item(w, lane)
    for turn in range(n_turns + AHEAD):
        if turn < n_turns:
            transpose_keys(w, w.k_sb[lane], w.sizes.tokens, turn, lane * n_turns + turn)
        if turn == n_turns - 1:
            w.gates.turn_parts(w, lane)
        if behind and turn == n_turns:
            x.weigh(w, lane)
        done = turn - AHEAD
        if done >= 0:
            multiply_keys(w, scores(w, lane), w.sizes.tokens, done, lane * n_turns + done, lane_rows(w, lane))
    lane_maximum(w, lane, w.item_now, x.top)


def take_keys(w, x, values):
    """Keys of the item that comes next, lane by lane, as a lane's index is in use until its last keys are there.

    With `values` those of the item before it, as `x.rows_of_v` says, are asked for among them.
    """
    v, end, gpsimd = w.sizes.at.v, w.sizes.at.mask, nisa.engine.gpsimd
    for lane in range(w.sizes.n_lanes):
        nisa.tensor_copy(dst=w.item_of_k[:, lane, 0:end], src=w.item_of_v[:, lane, 0:end], engine=gpsimd)
        load_k_of_lane(w, lane, w.item_of_k)
        if w.gates != None:
            w.gates.load_item(lane, w.item_of_k[:, lane, v : v + 1])
        if values:
            index = x.v_index[:, lane : lane + 1]
            nisa.tensor_copy(dst=index, src=x.rows_of_v[:, lane : lane + 1], engine=gpsimd)
            gather(w.v_sb[lane], w.v, index)


def ask(w, x):
    """Values of the tiles that stay, into the place of those that have been used."""
    for lane in range(w.sizes.n_lanes):
        gather(w.v_sb[lane], w.v, x.v_index[:, lane : lane + 1])


def weigh_lanes(w, x, begin_lane, end_lane):
    """Values of some lanes' items that have come, times their probabilities."""
    for lane in range(begin_lane, end_lane):
        x.weigh(w, lane)


def settle(w, x):
    """The item whose values have come joins the state."""
    add_total(w, x.total)
    join(w, x.decay)


def join(w, decay):
    """acc = acc * decay + o_ps."""
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=decay.broadcast(1, w.sizes.n_blocks + 1), op=nl.multiply)
    nisa.tensor_tensor(dst=w.acc, data1=w.acc, data2=w.o_ps, op=nl.add)
