"""Prefill with skip-softmax: the steps of a chunk two at a time, of which those that no row wants are left out.

All pairs of steps are scored and decided about. What follows is in device loops of one trip, or of none where all tiles
of a pair are skipped; in a pair that is not, a bias takes single tiles out. Each engine is a queue, and a branch holds
up all of them until the decision is there, so that it is made well before. In a *stage*

    pair g        is scored, step by step
    pair g - 2    is decided about
    pair g - 3    exponentials of its first step
    pair g - 4    transposes and products of its first step, exponentials and transposes of its second one
    pair g - 5    products of its second step

and the last pairs of a chunk are worked on in the first stages of the next one. The first chunk of a block finds none
that are wanted, nor does the first one behind those on the left edge of a window.
"""

from __future__ import annotations

from contributed._nki import at_most, nisa, nl
from contributed._prefill_loads import begin_chunk, begin_values, finish_some, invert_some, transpose, transpose_chunk
from contributed._prefill_select import choose, compare
from contributed._prefill_skip import clear, decide, end_rows, flag_of, keep_decisions, want
from contributed._prefill_state import FINISHED, PT_SLOTS, SKIP_SLOTS, TURNS
from contributed._prefill_steps import (
    Turn,
    add_sums,
    exponentials,
    product,
    rescale,
    score_maxima,
    score_products,
    settle,
    shrink_sums,
)
from contributed._prefill_units import Unit, all_tiles, as_tiles, in_order, pairs_of, steps_of

DECIDE_LAG = 2  # stages from scores to decisions,
EXP_LAG = 3  # to exponentials of the first step,
WEIGH_LAG = 4  # to products of the first step,
END_LAG = 5  # and of the second one
PAIR = 2  # steps
DRAIN_FINISHED = 4  # tiles whose outputs are finished in a stage without scores


class Run(nl.NKIObject):  # type: ignore[misc]
    """Units first..end of a pair, which have the same width: their tiles `now`."""

    def __init__(self, z, units, first, end):
        self.first = first
        self.end = end
        self.width = units[first].width
        self.now = as_tiles(z, units[first:end])


class Pair(nl.NKIObject):  # type: ignore[misc]
    """Two steps of a chunk whose tiles are `Tiles`, or one.

    Args:
        z: sizes of the launch.
        steps: the steps.
        number: of the pair among those that follow each other without a loop between them.
    """

    def __init__(self, z, steps, number):
        self.steps = steps
        self.number = number
        units: list[Unit] = []
        for i in range(len(steps)):
            steps[i].number = PAIR * number + i
            units.extend(steps[i].units)
        self.units = in_order(units)
        self.now = as_tiles(z, self.units)
        self.runs: list[Run] = []
        self.finals: list[int] = []  # tiles that see no keys of later chunks
        first = 0
        for i in range(len(units)):
            unit = self.units[i]
            unit.pair = number
            unit.group = i
            if unit.is_last:
                self.finals.append(unit.tile)
            if i + 1 == len(units) or self.units[i + 1].width != unit.width:
                self.runs.append(Run(z, self.units, first, i + 1))
                first = i + 1

    def last(self):
        """The last step."""
        return self.steps[len(self.steps) - 1]


class Chunk(nl.NKIObject):  # type: ignore[misc]
    """The pairs of a chunk.

    Args:
        z: sizes of the launch.
        place: as in `steps_of`.
        number: of the first pair.
    """

    def __init__(self, z, place, number):
        steps = steps_of(z, 0, place)
        self.pairs: list[Pair] = []
        i = 0
        for pair in pairs_of(z, units_of_steps(steps)):
            self.pairs.append(Pair(z, steps[i : i + len(pair)], number + len(self.pairs)))
            i = i + len(pair)
        self.every = steps[len(steps) - 1].every
        # Tiles whose sums shrink at the chunk's end, and those of them whose new ones are there. On the diagonal, where
        # tiles end, that is done pair by pair, but for the last ones.
        n, first = len(self.pairs), 0
        if place != None and place >= 0:
            first = max(0, n - END_LAG)
        self.shrunk = tiles_of_pairs(z, self.pairs[first:])
        self.summed = tiles_of_pairs(z, self.pairs[first : max(first, n - WEIGH_LAG)])


def units_of_steps(steps):
    """The units of each of some steps."""
    units: list[list[Unit]] = []
    for step in steps:
        units.append(step.units)
    return units


def tiles_of_pairs(z, pairs):
    """`Tiles` of pairs, as few as it takes."""
    groups = []
    for pair in pairs:
        groups.append(pair.units)
    return all_tiles(z, groups)


class Tail(nl.NKIObject):  # type: ignore[misc]
    """For each of the things to do, the pairs of a chunk that wait for it when all are scored and decided about.

    Args:
        z: sizes of the launch.
        pairs: of the chunk; none of a chunk that leaves nothing.
    """

    def __init__(self, z, pairs):
        n = len(pairs)
        self.exps = pairs[max(0, n - EXP_LAG) :]
        self.weighs = pairs[max(0, n - WEIGH_LAG) :]
        self.ends = pairs[max(0, n - END_LAG) :]
        self.sums = tiles_of_pairs(z, self.weighs)


def leaves(before, after):
    """Whether a chunk with some pairs may leave its last ones to the one that follows it."""
    if len(before) < END_LAG or len(after) < END_LAG:
        return False
    # Factors of the state of the first two pairs are written before those of the last one have been used, and of the
    # first one before those of the last but one.
    for pair in before[len(before) - DECIDE_LAG :]:
        for i in range(DECIDE_LAG):
            for unit in after[i].units:
                for other in pair.units:
                    if unit.tile == other.tile:
                        return False
    return True


def skip_on_edge(w, first, n, records, rows, j):
    """All tiles of the block with chunks on the left edge of the window.

    Nothing is left over: the loop that follows finds no pair that is wanted.

    Args:
        w: the launch's `State`.
        first: place of the first chunk, see `_prefill_state.Sizes.before_own`.
        n: chunks.
        records: as in `attend_and_skip`.
        rows: likewise.
        j: register, number of the first chunk.
    """
    chunks = []
    number = 0
    for i in range(n):
        chunks.append(Chunk(w.sizes, first + i, number))
        number = number + len(chunks[i].pairs)
    score_products(w, chunks[0].pairs[0].steps[0])
    attend_in_turn(w, chunks, records, rows, j, Tail(w.sizes, []), None)
    nisa.memset(dst=w.skipping.flags, value=0, engine=nisa.engine.gpsimd)


def attend_and_skip(w, records, rows, first, end, results):
    """All tiles of the block with its chunks in the loop and on the diagonal.

    Args:
        w: the launch's `State`.
        records: of chunks, from the second one of the launch on.
        rows: where decisions go, [n_chunks, n_tiles * kv_tiles] in HBM.
        first: register, number of the loop's first chunk.
        end: register, number of the first one on the diagonal.
        results: the block's `Results`.
    """
    z = w.sizes
    inner = Chunk(z, None, 0)
    pairs = inner.pairs
    # A slot of a pair is that of the pair with the same number in the next trip.
    leave = leaves(pairs, pairs) and len(pairs) % SKIP_SLOTS == 0
    tail = Tail(z, pairs if leave else [])

    def chunk(j):
        attend_pairs(w, inner, records.select(0, j), rows.select(0, j), tail, leave, pairs[0], None)

    score_products(w, pairs[0].steps[0])
    nl.fori_loop(first, end, chunk)
    chunks = []
    number = len(pairs)
    for i in range(z.n_diagonal):
        chunks.append(Chunk(z, i, number))
        number = number + len(chunks[i].pairs)
    if leave and (z.n_diagonal == 0 or not leaves(pairs, chunks[0].pairs)):
        drain(w, tail, True, None)
        tail = Tail(z, [])
    if z.n_diagonal > 0:
        # In place of those of a chunk of the loop.
        score_products(w, chunks[0].pairs[0].steps[0])
        attend_in_turn(w, chunks, records, rows, end, tail, results)


def attend_in_turn(w, chunks, records, rows, j, tail, results):
    """Chunks that are part of the program, the products of whose first step are in PSUM.

    Args:
        w: the launch's `State`.
        chunks: the chunks.
        records: of chunks, from the second one of the launch on.
        rows: where decisions go, [n_chunks, n_tiles * kv_tiles] in HBM.
        j: register, number of the first of them.
        tail: what the chunk before them left.
        results: the block's `Results`, if the chunks are on the diagonal; else None.
    """
    for i in range(len(chunks)):
        following, leave = None, False
        if i + 1 < len(chunks):
            following = chunks[i + 1].pairs[0]
            leave = leaves(chunks[i].pairs, chunks[i + 1].pairs)
        attend_pairs(w, chunks[i], records[i:].select(0, j), rows[i:].select(0, j), tail, leave, following, results)
        tail = Tail(w.sizes, chunks[i].pairs if leave else [])


def attend_pairs(w, chunk, record, row, tail, leave, following, results):
    """All pairs of a chunk, the products of whose first step are in PSUM.

    Args:
        w: the launch's `State`.
        chunk: the chunk.
        record: of the second chunk after it.
        row: where its decisions go, [1, n_tiles * kv_tiles] in HBM.
        tail: what the chunk before it left.
        leave: whether it leaves its last pairs to the one that follows.
        following: first pair of the chunk that follows, or None.
        results: the block's `Results`, if the chunk is on the diagonal, where row tiles end; else None.
    """
    w.turn = 0  # the body of a loop is built once
    pairs = chunk.pairs
    n = len(pairs)
    begin_chunk(w, record)
    for g in range(n):
        t = Stage()
        t.scored = pairs[g]
        t.before = pairs[g - 1] if g > 0 else None
        t.decided = pairs[g - DECIDE_LAG] if g >= DECIDE_LAG else None
        t.exp = due(tail.exps, g, pairs, EXP_LAG)
        t.weigh = due(tail.weighs, g, pairs, WEIGH_LAG)
        t.end = due(tail.ends, g, pairs, END_LAG)
        t.sums = tail.sums if g == len(tail.weighs) - 1 else []
        t.reload = g == 0
        t.is_last = g == n - 1
        t.begins_values = g == WEIGH_LAG
        stage(w, t)
        want(w, pairs[g])
        settle(w, pairs[g].now)
        if results != None:
            # First those that are complete for longer: inverting sums that have just been added up has to wait.
            invert_some(w, results)
            if g + 1 < n:
                # Decisions about the last pairs are waited for.
                finish_some(w, results, FINISHED)
            if g >= END_LAG:
                shrink_sums(w, t.end.now)
                add_up(w, [t.end.now])
                complete(results, [t.end])
            elif g + 1 == END_LAG:
                # Their last products are in this stage, and all sums have been added.
                complete(results, tail.ends)
    every = chunk.every
    nisa.tensor_copy(dst=w.m[:, every], src=w.m_new[:, every], engine=nisa.engine.gpsimd)
    end_rows(w, every)
    if w.selection != None:
        # Comparisons of scores need K until now.
        choose_between(w, pairs[n - 1].last(), None)
        transpose_chunk(w, True)
    if following != None:
        # Ahead of what waits for the last decisions.
        score_products(w, following.steps[0])
    for pair in pairs[max(0, n - DECIDE_LAG) :]:
        decide(w, pair)
    keep_decisions(w, row)
    for tiles in chunk.shrunk:
        shrink_sums(w, tiles)
    add_up(w, chunk.summed)
    if leave:
        return
    if n <= WEIGH_LAG:
        begin_values(w)
    drain(w, Tail(w.sizes, pairs), False, results)


def complete(results, pairs):
    """Outputs of some pairs' tiles that see no more keys."""
    for pair in pairs:
        for tile in pair.finals:
            results.complete(tile)


def due(waiting, g, pairs, lag):
    """Of the pairs that wait for something, `lag` stages after their scores, the one whose turn it is, or None."""
    if g < len(waiting):
        return waiting[g]
    return pairs[g - lag] if g >= lag else None


def drain(w, tail, reload, results):
    """What is left to do for some pairs; `reload` as in `Stage`, `results` as in `attend_pairs`."""
    n = len(tail.exps)
    for i in range(n + 2):
        i_weigh, i_end = i - 1 + len(tail.weighs) - n, i - 2 + len(tail.ends) - n
        t = Stage()
        t.exp = tail.exps[i] if i < n else None
        t.weigh = tail.weighs[i_weigh] if i_weigh >= 0 and i_weigh < len(tail.weighs) else None
        t.end = tail.ends[i_end] if i_end >= 0 and i_end < len(tail.ends) else None
        t.sums = tail.sums if i == n and results == None else []
        t.reload = reload and i == 0
        stage(w, t)
        if results != None:
            invert_some(w, results)
            finish_some(w, results, DRAIN_FINISHED)
            if t.weigh != None:
                add_up(w, [t.weigh.now])
            if t.end != None:
                complete(results, [t.end])


class Stage(nl.NKIObject):  # type: ignore[misc]
    """Pairs that are worked on side by side, None where there is none."""

    def __init__(self):
        self.scored = None
        self.before = None  # the pair scored before it
        self.decided = None
        self.exp = None
        self.weigh = None
        self.end = None
        self.sums = []  # `Tiles` whose sums go to the state after the exponentials of `weigh`
        self.reload = False  # whether registers of `weigh` and `end` were loaded in another trip of a loop
        self.is_last = False  # whether the chunk's last scores are in it,
        self.begins_values = False  # and whether its first products with V are


def stage(w, t):
    """One step's worth of everything, then the second one's, so that no engine has to wait for long."""
    scored, weigh = t.scored, t.weigh
    if t.reload:
        for pair in (weigh, t.end):
            if pair != None:
                load(w, pair)
    if scored != None:
        clear(w, scored)
        if t.before != None:
            score_products(w, scored.steps[0])
        if t.is_last and len(scored.steps) == 1:
            next_keys(w)
        score_maxima(w, scored.steps[0])
        if weigh != None:
            weigh_first(w, weigh, False)
    if t.end != None:
        weigh_last(w, t.end)
    if t.begins_values:
        begin_values(w)
    if scored == None and weigh != None:
        # Later, as there are no scores that could be taken while transposes wait for exponentials.
        weigh_first(w, weigh, True)
    add_up(w, t.sums)
    if scored != None and w.selection != None:
        choose_between(w, t.before.last() if t.before != None else None, scored.steps[0])
    if scored != None and len(scored.steps) == PAIR:
        score_products(w, scored.steps[1])
        if t.is_last:
            next_keys(w)
        score_maxima(w, scored.steps[1])
    if t.decided != None:
        decide(w, t.decided)
    if weigh != None:
        weigh_second(w, weigh, scored == None)
    if t.exp != None:
        load(w, t.exp)
        first_exponentials(w, t.exp)
    if scored != None and w.selection != None and len(scored.steps) == PAIR:
        choose_between(w, scored.steps[0], scored.steps[1])


def next_keys(w):
    """K of the next chunk, while the Vector Engine takes maxima; but comparisons of scores need K for longer."""
    if w.selection == None:
        transpose_chunk(w, True)


def choose_between(w, before, step):
    """N:M selection of a step, and the end of that of the one before it, as in `_prefill_steps.attend`."""
    if step != None:
        x = w.x[:, step.number % w.sizes.x_slots]
        compare(w, step.index, step.units, x, True)
    if before != None:
        choose(w, before.index, before.units, w.x[:, before.number % w.sizes.x_slots])
    if step != None:
        compare(w, step.index, step.units, x, False)


def register_of(w, pair):
    """How many trips loops of a pair have."""
    return at_most(w.skipping.registers[pair.number % SKIP_SLOTS], 1)


def load(w, pair):
    """Whether a pair is wanted, to its register."""
    nisa.register_load(register_of(w, pair), flag_of(w, pair))


def first_exponentials(w, pair):
    """Exponentials of a pair's first step, if it is wanted."""

    def body(_):
        exponentials(w, pair.steps[0])

    nl.fori_loop(0, register_of(w, pair), body)


def weigh_first(w, pair, by_vector):
    """Transposes of a pair's first step and exponentials of the second one, if it is wanted; as `turn_over`."""

    def body(_):
        for turn in turns_of(w, pair, 0):
            turn_over(w, turn, by_vector)
        if len(pair.steps) == PAIR:
            exponentials(w, pair.steps[1])

    nl.fori_loop(0, register_of(w, pair), body)


def weigh_second(w, pair, by_vector):
    """Products of a pair's first step and transposes of the second one, if it is wanted; as `turn_over`."""

    def body(_):
        before, after = turns_of(w, pair, 0), turns_of(w, pair, 1)
        for i in range(max(len(before), len(after))):
            if i < len(after):
                turn_over(w, after[i], by_vector)
            if i < len(before):
                weigh_turn(w, before[i])

    nl.fori_loop(0, register_of(w, pair), body)


def weigh_last(w, pair):
    """Products of a pair's second step, if it is wanted."""

    def body(_):
        for turn in turns_of(w, pair, 1):
            weigh_turn(w, turn)

    if len(pair.steps) == PAIR:
        nl.fori_loop(0, register_of(w, pair), body)


def turns_of(w, pair, i):
    """Turns of a pair's step i, none if there is no such step. The second one has tiles in PSUM and SBUF of its own."""
    turns: list[Turn] = []
    if i < len(pair.steps):
        step = pair.steps[i]
        for first in range(0, step.width(), w.per_turn):
            n = min(w.per_turn, step.width() - first)
            number = i * PT_SLOTS // PAIR + len(turns)
            turns.append(Turn(step, first, w.pt_sb[number][:, 0:n, :], number))
    return turns


def turn_over(w, turn, by_vector):
    """Transposes of a turn, copied out of PSUM `by_vector`, or by the Scalar and the Vector Engine in turns."""
    pmax = nl.tile_size.pmax
    n = turn.p.shape[1]
    p = w.p[:, turn.step.number % w.sizes.p_slots]
    t_ps = w.t_ps[turn.number % TURNS][:, 0:n, :]
    for j in range(n):
        transpose(w, t_ps[:, j, :], p[:, (turn.first + j) * pmax : (turn.first + j + 1) * pmax])
    if turn.number % 2 == 0 and not by_vector:
        nisa.activation(dst=turn.p, op=nl.copy, data=t_ps)
    else:
        nisa.tensor_copy(dst=turn.p, src=t_ps)


def weigh_turn(w, turn):
    """Products of a turn with V, and the outputs of the units that end in it."""
    for unit in turn.step.units:
        product(w, turn, unit)
        if turn.ends(unit):
            rescale(w, unit)


def add_up(w, sums):
    """Sums of exponentials to those of some `Tiles`; they begin at 0, as pairs that are skipped write none."""
    for tiles in sums:
        add_sums(w, tiles)
        nisa.memset(dst=tiles.of(w.total), value=0.0, engine=nisa.engine.gpsimd)
