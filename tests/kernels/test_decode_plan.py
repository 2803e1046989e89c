"""Decode plans on the host, read back row by row and compared with the definition of what is visible."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contributed._decode_plan import (
    Cache,
    FlatCache,
    Geometry,
    PagedCache,
    Plan,
    choose_geometry,
    choose_n_splits,
    d_major_keys,
    make_plan,
)
from contributed._decode_state import MASKED, Columns

Array = np.ndarray[Any, np.dtype[Any]]
P = 128  # partitions
PSUM_BANK = 512  # float32 per partition
KIB = 1024


@dataclass(frozen=True)
class Batch:
    """A decode call without its numbers. A head dim of 256 in float32 keeps items at 2048 keys, 128 rows at 1024."""

    lengths: tuple[int, ...]
    n_kv_heads: int = 1
    s: int = 1
    group: int = 1
    left: int | None = None
    layout: str = "flat"
    block_size: int = 16
    n_splits: int = 1
    n_cores: int = 1
    d: int = 256
    itemsize: int = 4
    seqlen_kv: int = 0

    @property
    def room(self) -> int:
        """Keys that a sequence may have."""
        longest = max(self.seqlen_kv, *self.lengths)
        if self.layout == "d_major":
            return d_major_keys(longest)
        longest += 3
        return -(-longest // self.block_size) * self.block_size if self.layout == "paged" else longest

    def cache(self) -> tuple[Cache, Array]:
        """The cache, and the rows of V as the layouts define them: [batch, n_kv_heads, room], -1 for none."""
        batch, heads, room = len(self.lengths), self.n_kv_heads, self.room
        b, h, j = (np.arange(n) for n in (batch, heads, room))
        if self.layout == "packed":
            # Gaps of some rows between sequences: rows that are not in use.
            first = np.concatenate([[0], np.cumsum([n + 5 for n in self.lengths])])
            rows = np.arange(heads * first[-1]).reshape(heads, first[-1])
            mine = np.full((batch, heads, room), -1)
            for i, n in enumerate(self.lengths):
                mine[i, :, :n] = rows[:, first[i] : first[i] + n]
            return FlatCache(heads, int(first[-1]), tuple(int(n) for n in first[:-1])), mine
        if self.layout == "paged":
            n_blocks = room // self.block_size
            table = np.random.default_rng(0).permutation(batch * n_blocks + 2)[: batch * n_blocks]
            table = table.reshape(batch, n_blocks)
            rows = np.arange((batch * n_blocks + 2) * heads * self.block_size)
            pages = rows.reshape(-1, heads, self.block_size)
            blocks, within = table[:, None, j // self.block_size], j % self.block_size
            cut = table.astype(np.int32)
            for i, n in enumerate(self.lengths):
                cut[i, -(-n // self.block_size) :] = -1
            return PagedCache(heads, self.block_size, cut), pages[blocks, h[None, :, None], within]
        rows = np.arange(batch * heads * room).reshape(batch, heads, room)
        return FlatCache(heads, room), rows[b[:, None, None], h[None, :, None], j]

    def geometry(self, cache: Cache) -> Geometry:
        """As `_decode_launch.launch` chooses it."""
        longest = self.room if self.left is None else min(self.room, self.left + self.s)
        n_groups = len(self.lengths) * self.n_kv_heads * self.n_splits
        return choose_geometry(
            longest=-(-longest // self.n_splits),
            s=self.s,
            n_kv_heads=self.n_kv_heads,
            group=self.group,
            d=self.d,
            itemsize=self.itemsize,
            n_groups=n_groups,
            left=self.left,
            n_splits=self.n_splits,
            n_cores=min(self.n_cores, n_groups),
            run=cache.run,
            d_major_keys=self.room if self.layout == "d_major" else None,
        )

    def visible(self) -> Array:
        """[batch, s, room]: key j from max(0, p - left) to p = i + length - s."""
        p = (np.arange(self.s) + np.array(self.lengths)[:, None] - self.s)[..., None]
        j = np.arange(self.room)
        first = 0 if self.left is None else np.maximum(0, p - self.left)
        return (j >= first) & (j <= p)


@dataclass(frozen=True)
class Made:
    """A plan with what made it."""

    batch: Batch
    geometry: Geometry
    plan: Plan
    rows: Array

    @classmethod
    def of(cls, batch: Batch, geometry: Geometry | None = None) -> Made:
        """With the batch's own geometry, or one that other lengths of the same shape gave."""
        cache, rows = batch.cache()
        geometry = geometry or batch.geometry(cache)
        plan = make_plan(
            cache,
            geometry,
            batch.lengths,
            n_kv_heads=batch.n_kv_heads,
            s=batch.s,
            left=batch.left,
            d=batch.d,
            d_major_keys=batch.room if batch.layout == "d_major" else None,
            most_keys=batch.room,
        )
        return cls(batch, geometry, plan, rows)

    @property
    def n_blocks(self) -> int:
        """Blocks of d that K is gathered in of its own, 0 for s-major K."""
        return -(-self.batch.d // P) if self.batch.layout == "d_major" else 0

    @property
    def at(self) -> Any:
        g = self.geometry
        return Columns(self.batch.s, g.granules, self.n_blocks * g.chunks, self.n_blocks * g.n_windows, g.n_edges)

    def lanes(self) -> Iterator[tuple[int, Array, int, list[Array]]]:
        """Core, record of the trip, lane and its further items, in the order of execution."""
        records, items, bounds = self.plan.records, self.plan.items, self.plan.bounds
        for core in range(records.shape[0]):
            for trip, (first, end) in enumerate(bounds[core]):
                assert 0 <= first <= end < items.shape[1]
                for lane in range(self.geometry.n_lanes):
                    yield core, records[core, trip], lane, list(items[core, first:end, :, lane])

    def check(self) -> None:
        """Every visible key once, none else read, each result written by its group last."""
        batch, at = self.batch, self.at
        owner = np.full(self.rows.max() + 1, -1)
        visible = self.batch.visible()
        of_any = visible.any(axis=1)
        for b, h in itertools.product(range(len(batch.lengths)), range(batch.n_kv_heads)):
            owner[self.rows[b, h, of_any[b]]] = (b * batch.n_kv_heads + h) * batch.room + np.flatnonzero(of_any[b])
        n_units = len(batch.lengths) * batch.s * batch.n_kv_heads
        last: dict[int, tuple[int, Array | None]] = {}
        for core, of_trip, lane, further in self.lanes():
            record = of_trip[:, lane]
            for column in (at.unit_in, at.unit_out, at.head):
                assert (record[:, column] == record[0, column]).all()
            unit_in, unit_out, head = (int(record[0, i]) for i in (at.unit_in, at.unit_out, at.head))
            assert unit_out % n_units == unit_in
            assert unit_in % (batch.s * batch.n_kv_heads) == head
            b = unit_in // (batch.s * batch.n_kv_heads)
            if lane == 0:
                self.check_edges(of_trip)
            counts = self.count(of_trip, lane, further, b, head, owner)
            if unit_out in last:
                # Only a lane without a group writes where another one writes later.
                assert last[unit_out] == (core, None)
            last[unit_out] = core, counts
        assert sorted(last) == [
            split * n_units + b * batch.s * batch.n_kv_heads + h
            for split in range(batch.n_splits)
            for b in range(len(batch.lengths))
            for h in range(batch.n_kv_heads)
        ]
        total = np.zeros((len(batch.lengths), batch.n_kv_heads, batch.s, batch.room), np.int64)
        for unit, (_, counts) in last.items():
            if counts is not None:
                b, h = divmod(unit % n_units, batch.s * batch.n_kv_heads)
                total[b, h] += counts
        np.testing.assert_array_equal(total, np.broadcast_to(visible[:, None], total.shape))

    def check_edges(self, of_trip: Array) -> None:
        """Whatever the lanes of a trip share: each key in it is seen by just one of them, and nothing else is."""
        g, at, s = self.geometry, self.at, self.batch.s
        used = of_trip[:, 0, at.v_edge : at.v_edge + g.n_edges] >= 0
        seen = of_trip[..., at.visible : at.visible + s * g.n_edges].reshape(P, g.n_lanes, s, g.n_edges)
        assert np.isin(seen, (0, 1)).all()
        np.testing.assert_array_equal(seen.any(axis=2).sum(axis=1), used)

    def count(self, of_trip: Array, lane: int, further: list[Array], b: int, head: int, owner: Array) -> Array | None:
        """How often each new token counts each key, [s, room]; None if the lane reads nothing."""
        g, at, s = self.geometry, self.at, self.batch.s
        record = of_trip[:, lane]
        newest = self.batch.lengths[b] - 1
        counts = np.zeros((s, self.batch.room), np.int64)

        def keys_of(rows: Array) -> Array:
            assert (rows < owner.size).all()
            assert (owner[rows] >= 0).all(), "a row that no query sees"
            of, keys = np.divmod(owner[rows], self.batch.room)
            assert (of == b * self.batch.n_kv_heads + head).all(), "a row of another sequence or head"
            return np.asarray(keys)

        for item in (record, *further):
            gathers = item[:, at.v : at.v + g.granules].astype(np.int64)
            there = gathers[:, 0] >= 0
            assert (gathers[~there] == -1).all()
            np.testing.assert_array_equal(item[:, at.mask].view(np.float32), np.where(there, 0, np.float32(MASKED)))
            run = g.tokens // g.granules
            keys = keys_of((gathers[there][..., None] + np.arange(run)).reshape(-1, g.tokens))
            np.testing.assert_array_equal(keys, keys[:, :1] + np.arange(g.tokens))
            np.testing.assert_array_equal(item[there, at.start].view(np.float32), keys[:, 0] - newest)
            np.add.at(counts, (slice(None), keys.reshape(-1)), 1)
            if self.n_blocks:
                self.check_columns(item, there, keys, b, head)
        seen = record[:, at.visible : at.visible + s * g.n_edges].reshape(P, s, g.n_edges).astype(bool)
        mine = seen.any(axis=1)
        edges = keys_of(of_trip[:, 0, at.v_edge : at.v_edge + g.n_edges][mine].astype(np.int64))
        np.testing.assert_array_equal(
            of_trip[:, 0, at.rel : at.rel + g.n_edges].copy().view(np.float32)[mine], edges - newest
        )
        for i in range(s):
            np.add.at(counts[i], edges, seen[:, i][mine])
        if self.n_blocks:
            where = np.full((P, g.n_edges), -1)
            for i in range(g.n_windows):
                per_tile = P // g.window
                tile, place = i * -(-g.n_lanes // per_tile) + lane // per_tile, lane % per_tile * g.window
                columns = self.columns(record, at.k_edge, g.n_windows, i, g.window, b, head)
                where[place : place + g.window, tile] = columns
            np.testing.assert_array_equal(where[mine], edges)
        return counts if counts.any() else None

    def check_columns(self, item: Array, there: Array, keys: Array, b: int, head: int) -> None:
        """The columns of d-major K under a granule are its keys; granule 16 b + a is on partition 8 a + b."""
        g = self.geometry
        width = g.item_keys // g.chunks
        columns = np.concatenate([self.columns(item, self.at.k, g.chunks, i, width, b, head) for i in range(g.chunks)])
        partition = np.arange(P)
        granule = 16 * (partition % 8) + partition // 8
        by_partition = columns.reshape(P, g.tokens)[granule]
        np.testing.assert_array_equal(by_partition[there], keys)
        in_use = np.zeros(P, bool)
        in_use[granule] = there
        loaded, needed = columns.reshape(g.chunks, -1)[:, 0] >= 0, np.repeat(in_use, g.tokens).reshape(g.chunks, -1)
        np.testing.assert_array_equal(loaded, needed.any(axis=1))

    def columns(self, item: Array, first: int, n: int, i: int, width: int, b: int, head: int) -> Array:
        """Keys of the `width` columns of d-major K that gather i of n loads, the same for each row of d; -1: none."""
        d, n_blocks, room = self.batch.d, self.n_blocks, self.batch.room
        db = d // n_blocks
        begin = []
        for block in range(n_blocks):
            elements = item[:, first + block * n + i].astype(np.int64)
            assert (elements[db:] == -1).all()
            if (elements == -1).all():
                begin.append(-1)
                continue
            rows, position = np.divmod(elements[:db], room)
            np.testing.assert_array_equal(rows, (b * self.batch.n_kv_heads + head) * d + block * db + np.arange(db))
            assert (position == position[0]).all()
            assert position[0] + width <= room, "a gather leaves its row"
            begin.append(int(position[0]))
        assert len(set(begin)) == 1
        return np.full(width, -1) if begin[0] < 0 else begin[0] + np.arange(width)


# -- every key once


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    s = draw(st.sampled_from([1, 1, 2, 5, 16]))
    group = draw(st.sampled_from([1, 3, 128 // s]))
    layout = draw(st.sampled_from(["flat", "packed", "paged", "d_major"]))
    tile = 1024
    near = st.integers(0, 3).flatmap(lambda n: st.integers(-2, 2).map(lambda x: max(0, n * tile + x)))
    length = st.one_of(st.integers(0, 20), st.integers(0, 3 * tile), near)
    return Batch(
        tuple(draw(st.lists(length, min_size=1, max_size=4))),
        n_kv_heads=draw(st.sampled_from([1, 2, 3])),
        s=s,
        group=group,
        left=draw(st.one_of(st.none(), st.integers(0, 20), st.integers(0, 2 * tile))),
        layout=layout,
        block_size=draw(st.sampled_from([1, 3, 8, 16, 48, 128, 256])),
        n_splits=draw(st.sampled_from([1, 1, 2, 3, 7])),
        n_cores=draw(st.sampled_from([1, 2])),
        d=draw(st.sampled_from([64, 96, 192, 256])),
        itemsize=draw(st.sampled_from([2, 4])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
@example(Batch((1100,), s=128, left=900))  # more edge keys than fit beside each other
@example(Batch((1100,), s=128, left=900, layout="d_major"))
@example(Batch((1024, 1022), s=3, layout="d_major"))  # edges where a row of K ends
@example(Batch((0, 0), n_splits=3, n_cores=2))
@example(Batch((3, 5), s=16, group=8, left=2))  # tokens before the first key
@example(Batch((2048, 1), n_kv_heads=3, n_cores=2, layout="packed"))
def test_every_visible_key_counts_once_and_no_other_row_is_read(batch: Batch) -> None:
    Made.of(batch).check()


SWEEPS = [
    Batch((), group=128),
    Batch((), group=128, left=700),
    Batch((), s=2, group=64, left=1500, n_splits=2),
    Batch((), s=16, group=8, left=130, layout="packed"),
    Batch((), group=128, layout="paged", block_size=16, left=77),
    Batch((), group=128, layout="paged", block_size=256),
    Batch((), s=3, group=42, layout="paged", block_size=6),
    Batch((), group=128, layout="d_major"),
    Batch((), s=4, group=32, layout="d_major", left=600),
    Batch((), s=2, group=64, layout="d_major", left=3, n_splits=3),
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda b: f"{b.layout}-s{b.s}-left{b.left}-splits{b.n_splits}")
def test_edges_suffice_for_every_length(sweep: Batch) -> None:
    """Lengths up to three items in one program: wherever an item or a window ends, the rest fits the edges.

    Of s-major K without a window every length of an item; beyond it, and elsewhere, in steps that meet every grid.
    """
    shape = {name: value for name, value in vars(sweep).items() if name != "lengths"}
    shape["seqlen_kv"] = 3 * 2048
    like = Batch((0,) * 64, **shape)
    geometry = like.geometry(like.cache()[0])
    item = geometry.item_keys
    every = item if sweep.left is None and sweep.layout == "flat" else 0
    # 13 is prime to every grid.
    lengths = [*range(every), *range(every, 3 * item + 2, 13), *(n * item + x for n in (1, 2, 3) for x in (-1, 0, 1))]
    # A few at a time, because reading a plan back takes memory for every key of every sequence.
    for first in range(0, len(lengths), 64):
        made = Made.of(Batch(tuple(lengths[first : first + 64]), **shape), geometry)
        made.check()


def test_a_lane_without_a_group_reads_nothing() -> None:
    """Five groups in lanes of several: the lanes that are left are the first, and write what is written again."""
    made = Made.of(Batch((300, 0, 70, 2000, 5), group=32))
    g = made.geometry
    n = (made.plan.records.shape[1] - 1) * g.n_lanes
    assert n > 5
    empty = [(trip[:, lane, made.at.v : made.at.v + g.granules] == -1).all() for _, trip, lane, _ in made.lanes()]
    assert all(empty[: n - 5])
    made.check()


def test_groups_of_as_many_items_share_a_trip() -> None:
    """Long and short sequences in turn: only the trips of the long ones have further items."""
    shape = {"group": 8, "d": 128, "itemsize": 2, "seqlen_kv": 4 * 8192}
    like = Batch((0,) * 8, **shape)
    geometry = like.geometry(like.cache()[0])
    lanes = geometry.n_lanes
    assert lanes > 1
    made = Made.of(Batch((4 * geometry.item_keys, 1) * lanes, **shape), geometry)
    np.testing.assert_array_equal(made.plan.bounds[0], [[0, 0], [0, 3]])


# -- cores


def test_splits_share_what_a_window_sees() -> None:
    """One long sequence with a window: two cores get about half of the visible keys each."""
    made = Made.of(Batch((20000,), left=4095, n_splits=2, n_cores=2))
    assert sum(made.plan.keys) == 4096
    assert max(made.plan.keys) <= 4096 * 0.55
    made.check()


def test_one_pair_on_two_cores_is_split() -> None:
    assert choose_n_splits([4096], 2) == 2
    assert choose_n_splits([4096], 1) == 1


@pytest.mark.parametrize(
    ("keys", "n_splits"),
    [
        ([100, 100], 1),
        ([100, 1], 2),
        ([10, 10, 10], 2),
        ([30, 20, 10], 1),
        ([10, 20, 30], 1),  # dealt longest first
        ([1] * 9, 2),  # 5 and 4: 1.11 of the mean
        ([1] * 11, 1),  # 6 and 5: 1.09
        ([0, 0], 1),
        ([0, 7], 2),
        ([100] + [1] * 100, 1),
    ],
)
def test_whole_pairs_are_kept_where_they_balance(keys: list[int], n_splits: int) -> None:
    assert choose_n_splits(keys, 2) == n_splits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3000), min_size=2, max_size=9), st.integers(1, 3), st.integers(1, 3))
def test_two_cores_share_the_keys(lengths: list[int], n_kv_heads: int, n_splits: int) -> None:
    """Whatever is dealt longest first differs by at most one group, and nothing is counted twice."""
    made = Made.of(Batch(tuple(lengths), n_kv_heads=n_kv_heads, n_splits=n_splits, n_cores=2))
    keys = made.plan.keys
    assert keys.shape == (2,)
    assert keys.sum() == n_kv_heads * sum(lengths)
    largest = max(-(-n // n_splits) + made.geometry.split_keys for n in lengths)
    assert abs(int(keys[0]) - int(keys[1])) <= largest
    read = np.zeros(2, np.int64)
    at, g = made.at, made.geometry
    for core, trip, lane, further in made.lanes():
        if lane == 0:
            read[core] += (trip[:, 0, at.v_edge : at.v_edge + g.n_edges] >= 0).sum()
        for item in (trip[:, lane], *further):
            read[core] += (item[:, at.v] >= 0).sum() * g.tokens
    np.testing.assert_array_equal(read, keys)


def test_a_split_pair_is_halved() -> None:
    keys = Made.of(Batch((8192,), n_splits=2, n_cores=2)).plan.keys
    np.testing.assert_array_equal(keys, [4096, 4096])


# -- geometry

ROWS = [(1, 1), (1, 5), (1, 8), (1, 100), (1, 128), (2, 8), (3, 7), (16, 8), (64, 2), (100, 1), (128, 1)]
LAYOUTS: list[tuple[int | None, int | None]] = [
    (None, None),
    *((run, None) for run in (1, 3, 9, 16, 48, 100, 127, 128, 255, 256)),
    *((None, keys) for keys in (128, 384, 1024, 4096)),
]


@pytest.mark.parametrize(("s", "group"), ROWS)
def test_geometry_fits_the_machine(s: int, group: int) -> None:
    """The limits that `flash_decode.py` states, counted from the shapes of its tiles."""
    rows = s * group
    shapes = itertools.product(
        (1, 16, 64, 80, 128, 192, 256), (1, 2, 4), (0, 129, 1000, 20000, 10**6), (None, 0, 100, 5000), LAYOUTS, (1, 32)
    )
    for d, itemsize, longest, left, (run, keys), n_groups in shapes:
        g = choose_geometry(
            longest=longest if left is None else min(longest, left + s),
            s=s,
            n_kv_heads=min(n_groups, 8),
            group=group,
            d=d,
            itemsize=itemsize,
            n_groups=n_groups,
            left=left,
            n_splits=1,
            n_cores=1,
            run=run,
            d_major_keys=keys,
        )
        case = (d, itemsize, longest, left, run, keys, n_groups, g)
        assert g.n_lanes >= 1, case
        assert g.n_lanes * rows <= P, case
        # PSUM: two banks of scores, four beside d-major K; a lane's in one or in equal parts of as many as it needs.
        banks = 2 if keys is None else 4
        parts = next(n for n in range(1, g.tokens + 1) if g.tokens % n == 0 and rows * g.tokens <= n * PSUM_BANK)
        per_bank = max(1, PSUM_BANK // (rows * g.tokens))
        assert -(-g.n_lanes // per_bank) * parts <= banks, case
        assert g.n_lanes * rows * g.n_edges <= PSUM_BANK, case
        # SBUF: bytes per partition of a lane's V and K, and of all.
        v = g.tokens * d * itemsize
        k = v if keys is None else -(-d // P) * P * g.tokens * itemsize
        assert max(k, v) <= 16 * KIB, case
        assert max(k, v) * g.n_lanes <= 32 * KIB, case
        # Gathers: equal parts; of a page's keys; of a row of d-major K.
        assert g.tokens % g.granules == 0, case
        if run is not None:
            part = g.tokens // g.granules
            assert run % part == 0 or part % run == 0, case
            assert part <= run, case
        if keys is not None:
            assert g.item_keys % g.chunks == 0, case
            assert keys % (g.item_keys // g.chunks) == 0, case


@pytest.mark.parametrize(
    ("keys", "room"),
    [(0, 128), (1, 128), (128, 128), (129, 256), (1000, 1024), (1025, 2048), (2048, 2048), (2049, 4096), (5000, 6144)],
)
def test_room_for_d_major_keys(keys: int, room: int) -> None:
    assert d_major_keys(keys) == room
