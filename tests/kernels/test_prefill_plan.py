"""Prefill plans on the host, read back row by row and compared with the definition of what is visible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from contributed._prefill_launch import visited_tiles
from contributed._prefill_plan import (
    MOST_BYTES,
    MOST_KV_TILES,
    MOST_TILES,
    SELECTION_TILES,
    Geometry,
    Plan,
    Span,
    Sparsity,
    Window,
    choose_geometry,
    hiding,
    make_plan,
    seen_spans,
    visible_keys,
    with_edge,
)

Array = np.ndarray[Any, np.dtype[Any]]
P = 128  # rows of a tile
FIRST_KEY, AFTER_KEYS, FIRST_RECENT, AFTER_RECENT, FIRST_MAXIMUM, RESULT = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Call:
    """A prefill call without its numbers; `lengths` are those of queries and keys, with gaps of rows between keys."""

    lengths: tuple[tuple[int, int], ...]
    n_kv_heads: int = 1
    group: int = 1
    causal: bool = True
    left: int | None = None
    right: int | None = None
    sparsity: Sparsity | None = None
    skips: bool = False
    n_splits: int | None = 1
    n_cores: int = 1
    q_tiles: int | None = None
    kv_tiles: int | None = None
    d: int = 64

    @property
    def window(self) -> Window:
        return Window(self.left, 0 if self.causal else self.right)

    @property
    def spans(self) -> tuple[Span, ...]:
        q = np.cumsum([0, *(n for n, _ in self.lengths)])
        kv = 3 + np.cumsum([0, *(n for _, n in self.lengths)])
        return tuple(Span(int(q[b]), n, int(kv[b]), m) for b, (n, m) in enumerate(self.lengths))

    @property
    def seen(self) -> tuple[Span, ...]:
        """Without queries that see nothing, as `_prefill_launch.launch` plans them."""
        return seen_spans(self.spans, self.window, self.skips)

    @property
    def total_q(self) -> int:
        return sum(n for n, _ in self.lengths)

    def geometry(self) -> Geometry:
        """As `_prefill_launch.launch` chooses it, or with blocks and chunks of other sizes."""
        g = choose_geometry(
            self.seen,
            group=self.group,
            n_kv_heads=self.n_kv_heads,
            d=self.d,
            itemsize=2,
            window=self.window,
            sparsity=self.sparsity,
            skips=self.skips,
            n_splits=self.n_splits,
            n_cores=self.n_cores,
        )
        q_tiles, kv_tiles = self.q_tiles or g.q_tiles, self.kv_tiles or g.kv_tiles
        g = replace(g, q_tiles=q_tiles, kv_tiles=kv_tiles, n_cores=self.n_cores if self.q_tiles else g.n_cores)
        return g if g.left_tiles is None or self.left is None else with_edge(g, self.seen, self.left)

    def plan(self) -> Plan:
        return make_plan(
            self.geometry(),
            self.seen,
            n_q_heads=self.n_kv_heads * self.group,
            n_kv_heads=self.n_kv_heads,
            total_q=self.total_q,
            window=self.window,
        )

    def visible(self, span: Span) -> Array:
        """The definition, bool [queries, keys]."""
        p, j = np.arange(span.len_q)[:, None] + span.len_kv - span.len_q, np.arange(span.len_kv)
        seen = np.ones((span.len_q, span.len_kv), bool)
        if self.left is not None:
            seen &= j >= p - self.left
        if self.causal or self.right is not None:
            seen &= j <= p + (0 if self.causal else self.right or 0)
        return seen


class Coverage:
    """A plan read as the kernel does: how often each query of each head and split meets each visible key."""

    def __init__(self, call: Call) -> None:
        self.call, self.plan = call, call.plan()
        self.g = self.plan.geometry
        self.units = call.n_kv_heads * call.group // self.g.heads
        self.met = [np.zeros((self.g.n_splits, self.units, span.len_q, span.len_kv), np.int64) for span in call.spans]
        self.results = np.zeros(self.g.n_splits * call.total_q * self.units, np.int64)
        self.queries = np.zeros(call.total_q * self.units, np.int64)
        # Whether a mask, guards and blocks of fewer rows are needed.
        self.masked = self.guarded = self.ragged = False
        self.sure_tiles: list[int] = []
        self.computed = 0  # tiles of a unit of heads, of row tiles that there are
        self.visits: list[list[tuple[int, ...]]] = []
        for core in range(self.g.n_cores):
            self.visits.append([])
            for b, bounds in enumerate(self.plan.bounds[core]):
                self.block(core, b, bounds)
        nothing = self.plan.nothing
        if nothing is not None:
            assert (nothing >= 0).any()
            self.results[nothing[nothing >= 0]] += 1

    def block(self, core: int, b: int, bounds: Array) -> None:
        plan, g = self.plan, self.g
        record, (first, end, whole, whole_next, edge, after_edge, start, after_start, after) = (
            plan.blocks[core, b],
            bounds,
        )
        following = plan.bounds[core, b + 1 :]
        assert whole_next == (following[0, 2] if len(following) else 0)
        has_edge, has_start, has_diagonal = after_edge - edge, after_start - start, after - end
        assert {has_edge, has_start, has_diagonal} <= {0, 1}
        assert start == edge + has_edge * g.n_edge
        assert first == start + has_start * g.n_start
        last = end + has_diagonal * g.n_diagonal
        assert 0 <= edge <= first <= end <= last
        assert last == (following[0, 4] if len(following) else last)
        assert last <= plan.chunks.shape[1] - 2
        assert b > 0 or edge == 0
        # Without splits the kernel does not ask.
        assert has_diagonal == (g.n_diagonal > 0) or g.n_splits > 1
        places = [*range(-g.n_edge, 0)] * has_edge + [*range(-g.n_edge - g.n_start, -g.n_edge)] * has_start
        places += [None] * (end - first) + [*range(g.n_diagonal)] * has_diagonal
        rows = record[:, 0].T.ravel()  # [q_tiles * 128]
        results = record[:, RESULT].T.ravel()
        there = rows >= 0
        np.testing.assert_array_equal(results >= 0, there)
        self.sure_tiles.append(int(there.sum()) // P)
        if whole:
            assert there.all()
            np.testing.assert_array_equal(np.diff(rows), self.units)
            np.testing.assert_array_equal(np.diff(results), self.units)
        self.ragged |= not whole
        self.queries[rows[there]] += 1
        self.results[results[there]] += 1
        lo, hi, recent_lo, recent_hi, maximum = (
            record[:, i].view(np.float32).T.ravel() for i in range(FIRST_KEY, RESULT)
        )
        if not there.any():
            for i, place in enumerate(places, edge):
                assert (plan.chunks[core, i] == 0).all()
                self.masked |= place is None
                self.guarded |= place is None
            return
        np.testing.assert_array_equal(rows[there] % self.units, rows[0] % self.units)
        unit = int(rows[0]) % self.units
        span_number = next(i for i, s in enumerate(self.call.spans) if s.q <= rows[0] // self.units < s.q + s.len_q)
        span = self.call.spans[span_number]
        number = rows[there] // self.units - span.q
        np.testing.assert_array_equal(number, np.arange(number[0], number[0] + there.sum()))
        assert (span.q + number[0] - self.call.seen[span_number].q) % (g.q_tiles * P) == 0
        split = int(results[0]) // (self.call.total_q * self.units)
        np.testing.assert_array_equal(results[there], rows[there] + split * self.call.total_q * self.units)
        # What rows see, keep, and begin with.
        seen = np.zeros((len(rows), span.len_kv), bool)
        seen[there] = self.call.visible(span)[number]
        j = np.arange(span.len_kv)
        np.testing.assert_array_equal((j >= lo[:, None]) & (j < hi[:, None]), seen)
        if self.call.sparsity is not None:
            p = number + span.len_kv - span.len_q
            keeps = (j <= p[:, None]) & (j > p[:, None] - self.call.sparsity.recent)
            if self.call.seen[span_number].len_q == 1:
                keeps[:] = True  # also where it is the only one of several that sees a key
            kept = (j >= recent_lo[there, None]) & (j < recent_hi[there, None])
            np.testing.assert_array_equal(kept & seen[there], keeps & seen[there])
        np.testing.assert_array_equal(maximum[there] < -3e38, True)
        np.testing.assert_array_equal(maximum[~there], 0)
        # Chunks on the left edge, of the loop, and on the diagonal.
        for i, place in enumerate(places, edge):
            chunk = plan.chunks[core, i]
            if (chunk == 0).all() and self.g.n_cores > 1:
                # A chunk for the other core.
                self.masked |= place is None
                self.guarded = True
                assert place is None or not plan.plain
                continue
            self.chunk(core, chunk, place, (span_number, span, split, unit, number, there, seen))

    def chunk(self, core: int, chunk: Array, place: int | None, block: tuple[Any, ...]) -> None:
        """`place` as in `Visit`."""
        g, (span_number, span, split, unit, number, there, seen) = self.g, block
        base, stop = (float(x) for x in chunk[0, 1:3].view(np.float32))
        base, stop = int(base), int(stop)
        assert (chunk[:, :3] == chunk[0, :3]).all()
        kv_head = unit * g.heads // self.call.group
        assert chunk[0, 0] == (span.kv + base) * self.call.n_kv_heads + kv_head
        assert base % P == 0
        assert base <= stop
        assert span.kv + base >= 0
        assert span.kv + base + g.keys <= self.plan.rows_kv
        # Which key a partition and tile has, with its planes.
        groups = P // g.planes
        partition = np.arange(P)
        position = base + (partition % groups * g.planes + partition // groups)[:, None] + P * np.arange(g.kv_tiles)
        np.testing.assert_array_equal(chunk[:, 3:], np.where(position < span.len_kv, -1, 0))
        self.guarded |= bool((position >= span.len_kv).any())
        tiles_of_rows = -(-len(there) // P)
        for row_tile in range(tiles_of_rows):
            begin, width = (0, g.kv_tiles) if place is None else g.seen(row_tile, place)
            mine = slice(row_tile * P, (row_tile + 1) * P)
            keys = np.arange(base + begin * P, max(base + begin * P, min(base + width * P, stop, span.len_kv)))
            here = there[mine]
            if not here.any():
                continue
            self.computed += max(0, width - begin) if unit == 0 else 0
            some = number[mine.start : mine.stop]
            self.met[span_number][split, unit, some[:, None], keys] += seen[mine][here][:, keys]
            if place is None:
                # All keys of the chunk are seen by all rows that see anything.
                of_rows = seen[mine][here]
                of_rows = of_rows[of_rows.any(axis=1)]
                self.masked |= stop < base + g.keys or not of_rows[:, keys].all()
            elif self.plan.plain:
                before = np.arange(*(base + n * P for n in g.plain(row_tile, place)))
                assert before.size == 0 or seen[mine][here][:, before].all()
        first = span.q + int(number[0]) - self.call.seen[span_number].q
        self.visits[core].append((span_number, first, unit, base, stop, place))

    def check(self) -> None:
        plan, call = self.plan, self.call
        for span, met in zip(call.spans, self.met, strict=True):
            expected = np.broadcast_to(call.visible(span), met.shape[1:])
            np.testing.assert_array_equal(met.sum(axis=0), expected)
        np.testing.assert_array_equal(self.results, 1)
        # Whoever sees something is in a block.
        sees = np.concatenate([call.visible(span).any(axis=1) for span in call.spans])
        np.testing.assert_array_equal(self.queries[np.repeat(sees, self.units)], self.g.n_splits)
        assert set(self.queries.tolist()) <= {0, self.g.n_splits}
        singles = call.sparsity is not None and any(s.len_q == 1 for s in call.seen)
        loops = any((np.diff(b[:, :2], axis=1) > 0).any() for b in plan.bounds)
        recent = 0 if call.sparsity is None else call.sparsity.recent
        often = recent > (self.g.keys if self.g.overhang else 0)
        assert plan.masked == (self.masked or (loops and (singles or often)))
        assert plan.guarded == self.guarded
        assert plan.ragged == self.ragged
        assert plan.sure_tiles == min(self.sure_tiles)
        assert [[tuple(visit) for visit in visits] for visits in plan.visits] == self.visits
        # What loads run ahead to: rows that are not there, or the first ones.
        expected = np.full_like(plan.blocks[:, -2:], -1 if plan.ragged else 0)
        expected[:, :, :, 0, : plan.sure_tiles] = 0
        np.testing.assert_array_equal(plan.blocks[:, -2:], expected)
        np.testing.assert_array_equal(plan.chunks[:, -2:], 0)
        assert plan.rows_kv >= self.g.keys


lengths = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, 127, 128, 129, 256, 300, 513]), st.sampled_from([0, 1, 77, 128, 256, 300, 640, 1025])
    ),
    min_size=1,
    max_size=4,
).filter(lambda x: sum(n for n, _ in x) > 0)
sides = st.sampled_from([None, 0, 1, 100, 128, 300])


@st.composite
def calls(draw: st.DrawFn) -> Call:
    sparsity = None
    if draw(st.booleans()):
        sparsity = Sparsity(1, draw(st.sampled_from([4, 8])), 0, draw(st.sampled_from([0, 1, 64, 600])))
    return Call(
        tuple(draw(lengths)),
        n_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3])),
        causal=draw(st.booleans()),
        left=draw(sides),
        right=draw(sides),
        sparsity=sparsity,
        n_splits=draw(st.sampled_from([None, 1, 2, 3, 7])),
        n_cores=draw(st.sampled_from([1, 1, 2])),
        q_tiles=draw(st.sampled_from([None, 1, 2, 4])),
        kv_tiles=draw(st.sampled_from([None, 1, 2, 3])),
    )


@settings(max_examples=120, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(calls())
@example(Call(((1280, 1280),)))
@example(Call(((256, 2048 + 256),)))
@example(Call(((300, 700), (0, 9), (5, 0)), n_kv_heads=2, group=2, n_cores=2))
@example(Call(((256, 256),), n_cores=2, q_tiles=1, kv_tiles=1))
@example(Call(((200, 77), (64, 1000)), causal=False, n_splits=3, kv_tiles=2))
@example(Call(((1, 900), (130, 900)), sparsity=Sparsity(1, 4, 0, 0)))
@example(Call(((700, 1300),), left=500, q_tiles=2, kv_tiles=3))
@example(Call(((640, 640), (300, 700)), left=256, group=2, n_cores=2, q_tiles=2, kv_tiles=2))
@example(Call(((900, 1000), (257, 257)), left=200, q_tiles=4, kv_tiles=2))
@example(Call(((256, 640), (256, 256)), left=200, n_cores=2, q_tiles=2, kv_tiles=2))
@example(Call(((1040, 1100),), causal=False, left=100, right=100))
def test_every_visible_key_is_met_once(call: Call) -> None:
    Coverage(call).check()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("left", "right"), [(None, None), (0, 0), (100, None), (None, 5), (300, 128)])
@pytest.mark.parametrize(("len_q", "len_kv"), [(5, 0), (1, 1), (130, 130), (200, 77), (33, 500)])
def test_visible_keys(len_q: int, len_kv: int, left: int | None, right: int | None, causal: bool) -> None:
    """Of queries, and of numbers beyond them, which see nothing."""
    call = Call(((len_q, len_kv),), causal=causal, left=left, right=right)
    lo, hi = visible_keys(call.spans[0], np.arange(len_q + 3), call.window)
    j = np.arange(len_kv)
    got = (j >= lo[:, None]) & (j < hi[:, None])
    np.testing.assert_array_equal(got[:len_q], call.visible(call.spans[0]))
    assert (lo[hi == lo] == 0).all()
    assert (hi[len_q:] == 0).all()


@pytest.mark.parametrize("lengths", [((200, 500), (0, 7), (5, 0)), ((300, 300),), ((200, 77),)])
@pytest.mark.parametrize("left", [None, 60])
@pytest.mark.parametrize("causal", [True, False])
def test_visited_tiles(lengths: tuple[tuple[int, int], ...], left: int | None, causal: bool) -> None:
    call = Call(lengths, causal=causal, left=left, right=90)
    for span, tiles in zip(call.spans, visited_tiles(call.spans, call.window, 3), strict=True):
        seen = call.visible(span)
        assert tiles.shape == (3, -(-span.len_q // P), -(-span.len_kv // P))
        for h, i, t in np.ndindex(*tiles.shape):
            assert tiles[h, i, t] == seen[i * P : (i + 1) * P, t * P : (t + 1) * P].any()


# -- geometry


def chosen(**changes: Any) -> Geometry:
    most = {"lengths": ((4096, 8192),), "n_kv_heads": 1, "group": 1, "d": 128} | changes
    return Call(**most).geometry()


@pytest.mark.parametrize("d", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 12, 64, 67, 128])
def test_blocks_are_as_large_as_their_state_allows(group: int, itemsize: int, d: int) -> None:
    spans = (Span(0, 10**4, 0, 10**4),)
    g = choose_geometry(
        spans,
        group=group,
        n_kv_heads=1,
        d=d,
        itemsize=itemsize,
        window=Window(None, 0),
        sparsity=None,
        skips=False,
        n_splits=1,
        n_cores=1,
    )
    bytes_of_tile = (4 + 3 * itemsize) * d  # state, queries, their transposes and results
    tiles = g.heads * g.q_tiles
    assert group % g.heads == 0
    assert tiles <= MOST_TILES
    assert tiles * bytes_of_tile <= MOST_BYTES[itemsize]
    assert g.q_tiles & (g.q_tiles - 1) == 0
    # Twice the rows, or the next larger number of heads, would be too much.
    most = min(MOST_TILES, MOST_BYTES[itemsize] // bytes_of_tile)
    assert 2 * tiles > most
    assert all(n > most for n in range(g.heads + 1, group + 1) if group % n == 0)
    assert g.kv_tiles == MOST_KV_TILES


def test_blocks_and_chunks_are_not_larger_than_sequences() -> None:
    g = chosen(lengths=((1, 130), (300, 300), (0, 500)))
    assert (g.q_tiles, g.kv_tiles) == (3, 4)
    g = chosen(lengths=((1, 1),), sparsity=Sparsity(2, 4, 0, 7))
    assert (g.q_tiles, g.kv_tiles, g.planes, g.recent) == (1, SELECTION_TILES, 4, 7)


@pytest.mark.parametrize(
    ("lengths", "causal", "overhang"),
    [
        (((256, 256), (1, 129), (128, 640)), True, 1),
        (((256, 256), (256, 257)), True, 2),
        # Its first 128 queries see nothing; of the others positions begin with 0.
        (((256, 128), (300, 77)), True, 1),
        # Sequences without a query or a key do not count.
        (((256, 256), (0, 5), (5, 0)), True, 1),
        (((256, 257),), False, 0),
    ],
)
def test_overhang(lengths: tuple[tuple[int, int], ...], causal: bool, overhang: int) -> None:
    """Tiles of keys that a tile of rows sees beyond those before it; with a diagonal only."""
    g = chosen(lengths=lengths, causal=causal)
    assert g.overhang == overhang
    widths = [end - first for i in range(g.q_tiles) for first, end in (g.seen(i, c) for c in range(g.n_diagonal))]
    assert sum(widths) == sum(i + overhang for i in range(g.q_tiles)) * (overhang > 0)


@pytest.mark.parametrize(
    ("lengths", "right", "overhang"),
    [
        (((4096, 4096),), 1, 2),
        (((4096, 4096),), 128, 2),
        (((4096, 4096),), 129, 3),
        # The last row of a tile is 4 keys further on.
        (((4096, 4100),), 124, 2),
        (((4096, 4100),), 125, 3),
        # All tiles are seen in any case.
        (((4096, 4096),), 4096, 0),
    ],
)
def test_overhang_of_windows_on_both_sides(lengths: tuple[tuple[int, int], ...], right: int, overhang: int) -> None:
    """Where it computes fewer tiles, the right edge is part of the program."""
    for more in ({}, {"skips": True}, {"sparsity": Sparsity(2, 4, 0, 0)}):
        assert chosen(lengths=lengths, causal=False, left=64, right=right, **more).overhang == overhang


@pytest.mark.parametrize(
    ("changes", "n_splits", "n_cores"),
    [
        ({"n_splits": None}, 1, 1),
        ({"n_splits": None, "n_cores": 2, "n_kv_heads": 2, "lengths": ((5, 8192),)}, 1, 2),
        ({"n_splits": None, "n_cores": 2, "lengths": ((5, 8192),)}, 2, 2),
        ({"n_splits": None, "n_cores": 2, "lengths": ((5, 2049),)}, 1, 1),
        ({"n_splits": None, "n_cores": 2, "lengths": ((5, 3073),)}, 2, 2),
        ({"n_splits": 3, "n_cores": 2, "lengths": ((5, 5),)}, 3, 2),
        ({"n_splits": 1, "n_cores": 2, "lengths": ((5, 9000),)}, 1, 1),
    ],
)
def test_splits_and_cores(changes: dict[str, Any], n_splits: int, n_cores: int) -> None:
    """Keys are split of its own accord where a core had no block, and keys are many; cores without one stay away."""
    g = chosen(**changes)
    assert (g.n_splits, g.n_cores) == (n_splits, n_cores)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"sparsity": Sparsity(1, 4, 9, 600)}, True),
        ({"left": 500}, True),
        ({"left": 500, "lengths": ((640, 640), (300, 400))}, True),
        ({"n_splits": 2}, True),
        # The other core has chunks of no keys in place of a diagonal, or of a left edge.
        ({"n_splits": 2, "n_cores": 2}, False),
        ({"lengths": ((128, 640), (128, 640), (128, 128)), "left": 200, "n_cores": 2}, True),
        ({"lengths": ((128, 640), (128, 128)), "left": 200, "n_cores": 2}, False),
        ({"lengths": ((130, 700), (9, 8))}, True),
        ({"lengths": ((130, 700), (9, 8)), "skips": True}, False),
        ({"lengths": ((9, 0),)}, False),
        ({"lengths": ((130, 700), (1, 8))}, True),
        ({"lengths": ((130, 700), (1, 8)), "sparsity": Sparsity(1, 4, 0, 0)}, False),
    ],
)
def test_tiles_between_edge_and_diagonal_are_seen_by_all_rows(changes: dict[str, Any], plain: bool) -> None:
    """Unless queries before the first key, cores of unlike blocks, or single queries under N:M are in the way."""
    assert Call(**({"lengths": ((130, 700),)} | changes)).plan().plain == plain


@pytest.mark.parametrize(
    ("lengths", "left", "q_tiles", "kv_tiles", "tiles"),
    [
        # The first row tiles see 1, 2, .. tiles of keys, all others as many as the window crosses.
        (((2048, 2048),), 511, 4, 2, 1 + 2 + 3 + 4 + 12 * 5),
        (((2048, 2048),), 511, 16, 2, 1 + 2 + 3 + 4 + 12 * 5),
        (((2048, 2048),), 513, 2, 1, 1 + 2 + 3 + 4 + 5 + 11 * 6),
        # A prefix; with positions between tile edges a row tile crosses one more.
        (((512, 2048),), 1023, 4, 3, 4 * 9),
        (((512, 2048 + 40),), 1023, 4, 3, 4 * 10),
    ],
)
def test_tiles_outside_a_window_are_not_computed(
    lengths: tuple[tuple[int, int], ...], left: int, q_tiles: int, kv_tiles: int, tiles: int
) -> None:
    coverage = Coverage(Call(lengths, left=left, q_tiles=q_tiles, kv_tiles=kv_tiles))
    coverage.check()
    assert coverage.computed == tiles


NM = Sparsity(1, 4, 0, 64)


@pytest.mark.parametrize("options", [{}, {"sparsity": NM}, {"skips": True}], ids=["dense", "1-of-4", "skip"])
@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": ((1024, 1024),), "left": 383, "q_tiles": 4},
        {"lengths": ((1024, 1024),), "left": 300, "q_tiles": 8},
        # A row of a tile sees less of its first two tiles than the one before it.
        {"lengths": ((512, 1536),), "left": 640, "q_tiles": 2},
        # Positions between tile edges.
        {"lengths": ((512, 1536 + 40),), "left": 1023, "q_tiles": 4},
        # A block with some of the edge's keys before it, and not all.
        {"lengths": ((1024, 1024),), "left": 600, "q_tiles": 4},
        {"lengths": ((1024, 1536),), "left": 900, "q_tiles": 8},
        {"lengths": ((1024, 1024),), "left": 255, "causal": False, "q_tiles": 4, "kv_tiles": 4},
        {"lengths": ((1024, 1536),), "left": 400, "causal": False, "q_tiles": 8},
        {"lengths": ((1024, 512), (256, 0), (300, 300 - 128)), "q_tiles": 4},
        {"lengths": ((1024, 640),), "left": 255, "q_tiles": 2},
    ],
    ids=str,
)
def test_no_tile_is_computed_that_is_not_seen(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Under windows, and of sequences with more queries than keys."""
    call = Call(**(changes | options))
    coverage = Coverage(call)
    coverage.check()
    visible = sum(int(tiles.sum()) for tiles in visited_tiles(call.spans, call.window, 1))
    assert coverage.computed == visible
    assert not coverage.masked or not call.sparsity


@pytest.mark.parametrize("changes", [{}, {"left": 767}, {"left": 300}])
@pytest.mark.parametrize("n_splits", [2, 5])
def test_splits_compute_each_tile_once(changes: dict[str, Any], n_splits: int) -> None:
    """The first has the left edge, the last the diagonal."""
    call = Call(((256, 1280),), n_splits=n_splits, kv_tiles=2, q_tiles=2, **changes)
    coverage = Coverage(call)
    coverage.check()
    assert coverage.computed == sum(int(tiles.sum()) for tiles in visited_tiles(call.spans, call.window, 1))


@pytest.mark.parametrize(
    ("changes", "left_tiles"),
    [
        ({}, None),
        ({"left": 0}, 0),
        ({"left": 128}, 1),
        ({"left": 129}, 2),
        ({"left": 129, "causal": False}, 2),
        ({"left": 129, "causal": False, "right": 64}, 2),
        ({"left": 8190}, 64),
        ({"left": 129, "skips": True}, 2),
        ({"left": 129, "n_splits": 2}, 2),
        ({"left": 129, "sparsity": Sparsity(1, 4, 0, 0)}, 2),
        ({"left": 60, "lengths": ((200, 77),)}, 1),
        # Rows are whole tiles and one key further on.
        ({"left": 129, "lengths": ((512, 1025),)}, 1),
        ({"left": 129, "lengths": ((512, 1025), (512, 1024))}, 2),
    ],
)
def test_left_edges_that_are_part_of_the_program(changes: dict[str, Any], left_tiles: int | None) -> None:
    """Tiles from a row tile's first key to its own."""
    assert chosen(**changes).left_tiles == left_tiles


@pytest.mark.parametrize(
    ("lengths", "window", "expected"),
    [
        (((300, 8192), (20, 0)), (8191, 0), (None, 0)),
        (((300, 8192), (20, 0)), (8190, 0), (8190, 0)),
        (((300, 9), (1, 1)), (8, None), (None, None)),
        (((0, 9), (1, 1)), (0, None), (None, None)),
        (((300, 200), (400, 0)), (None, 299), (None, None)),
        (((300, 200), (400, 0)), (None, 298), (None, 298)),
        (((300, 200), (301, 302)), (7, 299), (7, 299)),
        (((1, 200),), (None, 0), (None, 0)),
    ],
)
def test_sides_of_windows_that_hide_keys(lengths: Any, window: Any, expected: Any) -> None:
    """The last query is that far from the first key, and the first query from the last key."""
    assert hiding([Span(0, len_q, 0, len_kv) for len_q, len_kv in lengths], Window(*window)) == expected


@pytest.mark.parametrize(
    ("lengths", "causal", "kv_tiles"),
    [
        (((4680, 6240),), False, 7),  # 49 tiles of keys
        (((4096, 4096),), False, 8),
        (((512, 9 * 128),), False, 5),
        (((4096, 4096),), True, 8),
    ],
)
def test_chunks_leave_little_room(lengths: tuple[tuple[int, int], ...], causal: bool, kv_tiles: int) -> None:
    assert chosen(lengths=lengths, causal=causal).kv_tiles == kv_tiles


def test_cores_have_the_same_loops() -> None:
    """Blocks of the same number have as many chunks, and are whole on both cores or on none."""
    plan = Call(((300, 1500), (256, 3000), (128, 128), (7, 900)), n_cores=2, kv_tiles=2, q_tiles=1).plan()
    trips = plan.bounds[..., 1] - plan.bounds[..., 0]
    np.testing.assert_array_equal(trips[0], trips[1])
    np.testing.assert_array_equal(plan.bounds[0, :, 2], plan.bounds[1, :, 2])
    # Neighbours in size are together, so that little is added.
    assert plan.chunks.shape[1] - 2 <= sum(len(visits) for visits in plan.visits) / 2 + 4
