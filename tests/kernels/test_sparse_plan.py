"""Plans of sparse decode, read back row by row and compared with the definitions of tiles, splits and windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contributed._decode_plan import FlatCache, d_major_keys
from contributed._decode_state import MASKED, Columns
from contributed._sparse_plan import TileGeometry, TilePlan, choose_tile_geometry, make_tile_plan, span

Array = np.ndarray[Any, np.dtype[Any]]
P = 128  # partitions
PSUM_BANK = 512  # float32 per partition
KIB = 1024


@dataclass(frozen=True)
class Batch:
    """A call without its numbers. A head dim of 256 in float32 keeps items at 2048 keys."""

    lengths: tuple[int, ...]
    tile_kv: int = 64
    right_to_left: bool = False
    n_kv_heads: int = 1
    group: int = 1
    left: int | None = None
    layout: str = "flat"
    n_splits: int = 1
    n_cores: int = 1
    d: int = 256
    itemsize: int = 4
    seqlen_kv: int = 0

    @property
    def room(self) -> int:
        """Keys that a sequence may have."""
        longest = max(self.seqlen_kv, *self.lengths)
        return d_major_keys(longest) if self.layout == "d_major" else longest + 3

    def cache(self) -> tuple[FlatCache, Array]:
        """The cache, and the rows of V as the layouts define them: [batch, n_kv_heads, room], -1 for none."""
        batch, heads, room = len(self.lengths), self.n_kv_heads, self.room
        if self.layout == "packed":
            # Gaps of some rows between sequences: rows that are not in use.
            first = np.concatenate([[0], np.cumsum([n + 5 for n in self.lengths])])
            rows = np.arange(heads * first[-1]).reshape(heads, first[-1])
            mine = np.full((batch, heads, room), -1)
            for i, n in enumerate(self.lengths):
                mine[i, :, :n] = rows[:, first[i] : first[i] + n]
            return FlatCache(heads, int(first[-1]), tuple(int(n) for n in first[:-1])), mine
        return FlatCache(heads, room), np.arange(batch * heads * room).reshape(batch, heads, room)

    def geometry(self) -> TileGeometry:
        """As `_sparse_launch.tile_launch` chooses it."""
        longest = self.room if self.left is None else min(self.room, self.left + 1)
        n_groups = len(self.lengths) * self.n_kv_heads * self.n_splits
        return choose_tile_geometry(
            longest=-(-longest // self.n_splits),
            n_kv_heads=self.n_kv_heads,
            group=self.group,
            d=self.d,
            itemsize=self.itemsize,
            n_groups=n_groups,
            left=self.left,
            n_splits=self.n_splits,
            n_cores=min(self.n_cores, n_groups),
            tile_kv=self.tile_kv,
            right_to_left=self.right_to_left,
            d_major_keys=self.room if self.layout == "d_major" else None,
        )

    def visible(self, b: int) -> Array:
        """Positions of the keys that the newest token of a sequence sees."""
        n = self.lengths[b]
        return np.arange(0 if self.left is None else max(0, n - 1 - self.left), n)

    def tiles(self, b: int, split: int) -> list[Array]:
        """Visible keys of each tile of a split, in the order of the visit."""
        keys = self.visible(b)
        n_tiles = -(-self.lengths[b] // self.tile_kv)
        per_split = -(-n_tiles // self.n_splits)
        numbers = list(range(split * per_split, min((split + 1) * per_split, n_tiles)))
        found = [keys[keys // self.tile_kv == t] for t in (numbers[::-1] if self.right_to_left else numbers)]
        return [x for x in found if x.size]


@dataclass
class Read:
    """What a group reads: edge keys of its first and its last side, and tiles of its items in their order."""

    sides: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    tiles: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """A plan with what made it."""

    batch: Batch
    geometry: TileGeometry
    plan: TilePlan
    rows: Array

    @classmethod
    def of(cls, batch: Batch, geometry: TileGeometry | None = None) -> Made:
        """With the batch's own geometry, or one that other lengths of the same shape gave."""
        cache, rows = batch.cache()
        geometry = geometry or batch.geometry()
        plan, gates = make_tile_plan(
            cache,
            geometry,
            batch.lengths,
            n_kv_heads=batch.n_kv_heads,
            left=batch.left,
            d=batch.d,
            d_major_keys=batch.room if batch.layout == "d_major" else None,
            most_keys=batch.room,
        )
        assert gates is None
        return cls(batch, geometry, plan, rows)

    @property
    def n_blocks(self) -> int:
        """Blocks of d that K is gathered in of its own, 0 for s-major K."""
        return -(-self.batch.d // P) if self.batch.layout == "d_major" else 0

    @property
    def at(self) -> Any:
        g = self.geometry
        return Columns(1, 1, self.n_blocks * g.chunks, self.n_blocks * g.n_windows, g.n_edges)

    def lanes(self) -> Iterator[tuple[int, int, Array, int, list[Array]]]:
        """Core, trip, its record, lane and its items, in the order of execution."""
        records, items, bounds = self.plan.records, self.plan.items, self.plan.bounds
        for core in range(records.shape[0]):
            for trip in range(bounds.shape[1]):
                second, end = (int(x) for x in bounds[core, trip, :2])
                for lane in range(self.geometry.n_lanes):
                    yield core, trip, records[core, trip], lane, list(items[core, second - 1 : end, :, lane])

    def check(self) -> None:
        """Every tile once and in its place, no other row read, each result written by its group last."""
        batch, at, g = self.batch, self.at, self.geometry
        self.check_bounds()
        owner = np.full(self.rows.max() + 1, -1)
        pairs = list(itertools.product(range(len(batch.lengths)), range(batch.n_kv_heads)))
        for b, h in pairs:
            keys = batch.visible(b)
            owner[self.rows[b, h, keys]] = (b * batch.n_kv_heads + h) * batch.room + keys
        n_units = len(pairs)
        last: dict[int, tuple[int, int, Read]] = {}
        for core, trip, of_trip, lane, items in self.lanes():
            record = of_trip[:, lane]
            for column in (at.unit_in, at.unit_out, at.head):
                assert (record[:, column] == record[0, column]).all()
            unit_in, unit_out, head = (int(record[0, i]) for i in (at.unit_in, at.unit_out, at.head))
            assert unit_out % n_units == unit_in
            assert unit_in % batch.n_kv_heads == head
            if lane == 0:
                self.check_edges(of_trip)
            read = self.read(of_trip, lane, items, unit_in, owner)
            if unit_out in last:
                # Only a lane without a group writes where another one writes later.
                of_core, of_trip_before, before = last[unit_out]
                assert before == Read()
                assert of_core == core
                assert of_trip_before <= trip
            last[unit_out] = core, trip, read
        assert sorted(last) == list(range(batch.n_splits * n_units))
        for unit, (_, _, read) in last.items():
            split, (b, _) = unit // n_units, divmod(unit % n_units, batch.n_kv_heads)
            expected = batch.tiles(b, split)
            assert self.plan.tiles[b, split] == len(expected)
            whole = [x.tolist() for x in expected if x.size == batch.tile_kv]
            assert read.tiles == whole
            # A cut tile is visited before the whole ones or after them; one that is alone belongs to the right side.
            cut = [x for x in expected if x.size < batch.tile_kv]
            right = [x for x in cut if (x[-1] + 1) % batch.tile_kv]
            left = [x for x in cut if not (x[-1] + 1) % batch.tile_kv]
            assert len(left) <= 1
            assert len(right) <= 1
            sides = (right, left) if g.right_to_left else (left, right)
            assert read.sides == tuple(x[0].tolist() if x else [] for x in sides)

    def check_bounds(self) -> None:
        """Trips follow each other, with as many items on both cores."""
        bounds, items = self.plan.bounds, self.plan.items
        n_trips = bounds.shape[1]
        assert self.plan.records.shape[1] == n_trips + 1
        np.testing.assert_array_equal(bounds, np.broadcast_to(bounds[:1], bounds.shape))
        second, end, follows = bounds[0, :, :3].T
        assert second[0] == 1
        assert (end >= second).all()
        np.testing.assert_array_equal(second[1:], end[:-1] + 1)
        np.testing.assert_array_equal(follows, np.arange(n_trips) < n_trips - 1)
        # The last column says whether there are edge keys to be scored.
        at = self.at.visible
        edges = self.plan.records[:, :n_trips, :, :, at : at + self.geometry.n_edges].any(axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(bounds[0, :, 4], edges)
        # Items are asked for two ahead, whatever there is.
        assert end[-1] + 2 <= items.shape[1]
        assert (items[:, end[-1] :, :, :, self.at.v] == -1).all()

    def check_edges(self, of_trip: Array) -> None:
        """Whatever the lanes of a trip share: each key in it is seen by just one of them, and nothing else is."""
        g, at = self.geometry, self.at
        used = of_trip[:, 0, at.v_edge : at.v_edge + g.n_edges] >= 0
        seen = of_trip[..., at.visible : at.visible + g.n_edges]
        assert np.isin(seen, (0, 1)).all()
        np.testing.assert_array_equal(seen.sum(axis=1), used)

    def read(self, of_trip: Array, lane: int, items: list[Array], unit: int, owner: Array) -> Read:
        """Positions of the keys that a lane reads."""
        g, at, tile_kv = self.geometry, self.at, self.batch.tile_kv
        b, head = divmod(unit, self.batch.n_kv_heads)
        newest = self.batch.lengths[b] - 1

        def keys_of(rows: Array) -> Array:
            assert (rows < owner.size).all()
            assert (owner[rows] >= 0).all(), "a row that no query sees"
            of, keys = np.divmod(owner[rows], self.batch.room)
            assert (of == unit).all(), "a row of another sequence or head"
            return np.asarray(keys)

        read = Read()
        record = of_trip[:, lane]
        mine = record[:, at.visible : at.visible + g.n_edges].astype(bool)
        rows = of_trip[:, 0, at.v_edge : at.v_edge + g.n_edges].astype(np.int64)
        relative = of_trip[:, 0, at.rel : at.rel + g.n_edges].copy().view(np.float32)
        for edge in range(g.n_edges):
            window, of_lane = divmod(edge, g.n_lanes)
            if of_lane != lane:
                assert not mine[:, edge].any()
                continue
            keys = keys_of(rows[mine[:, edge], edge])
            np.testing.assert_array_equal(relative[mine[:, edge], edge], keys - newest)
            read.sides[window >= g.n_first].extend(keys.tolist())
            if self.n_blocks:
                columns = self.columns(record, at.k_edge, g.n_windows, window, P, b, head)
                np.testing.assert_array_equal(columns[mine[:, edge]], keys)
        for side in read.sides:
            side.sort()
        for item in items:
            there, granules = self.granules(item, newest, keys_of)
            if self.n_blocks:
                self.check_columns(item, there, granules, b, head)
            # The kernel finds tiles by their place: so many granules one after the other.
            n = tile_kv // g.tokens
            tiles = granules.reshape(-1, n * g.tokens)
            whole = there.reshape(-1, n)
            np.testing.assert_array_equal(whole, np.broadcast_to(whole[:, :1], whole.shape))
            found = [tile.tolist() for tile in tiles[whole[:, 0]]]
            read.tiles.extend(found[::-1] if g.right_to_left else found)
        return read

    def granules(self, item: Array, newest: int, keys_of: Any) -> tuple[Array, Array]:
        """Whether each granule is there, and its keys [128, tokens], in the order of their numbers."""
        g, at = self.geometry, self.at
        rows = item[:, at.v].astype(np.int64)
        there = rows >= 0
        assert (rows[~there] == -1).all()
        np.testing.assert_array_equal(item[:, at.mask].copy().view(np.float32), np.where(there, 0, np.float32(MASKED)))
        keys = np.full((P, g.tokens), -1)
        keys[there] = keys_of((rows[there][:, None] + np.arange(g.tokens)).reshape(-1)).reshape(-1, g.tokens)
        np.testing.assert_array_equal(keys[there], keys[there, :1] + np.arange(g.tokens))
        starts = item[there, at.start].copy().view(np.float32)
        np.testing.assert_array_equal(starts, keys[there, 0] - newest)
        # Granule 16 b + a is on partition 8 a + b.
        number = np.arange(P)
        partition = 8 * (number % 16) + number // 16
        return there[partition], keys[partition]

    def check_columns(self, item: Array, there: Array, granules: Array, b: int, head: int) -> None:
        """The columns of d-major K under a granule are its keys, and no chunk loads that has none."""
        g = self.geometry
        width = g.item_keys // g.chunks
        columns = np.concatenate([self.columns(item, self.at.k, g.chunks, i, width, b, head) for i in range(g.chunks)])
        np.testing.assert_array_equal(columns.reshape(P, g.tokens)[there], granules[there])
        loaded = columns.reshape(g.chunks, -1)[:, 0] >= 0
        needed = np.repeat(there, g.tokens).reshape(g.chunks, -1).any(axis=1)
        np.testing.assert_array_equal(loaded, needed)

    def columns(self, record: Array, first: int, n: int, i: int, width: int, b: int, head: int) -> Array:
        """Keys of the `width` columns of d-major K that gather i of n loads, the same for each row of d; -1: none."""
        d, n_blocks, room = self.batch.d, self.n_blocks, self.batch.room
        db = d // n_blocks
        begin = []
        for block in range(n_blocks):
            elements = record[:, first + block * n + i].astype(np.int64)
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


# -- every tile once


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    tile_kv = draw(st.sampled_from([16, 32, 64, 128, 256, 1024]))
    near = st.integers(0, 4).flatmap(lambda n: st.integers(-2, 2).map(lambda x: max(0, n * max(tile_kv, 64) + x)))
    length = st.one_of(st.integers(0, 20), st.integers(0, 2500), near)
    return Batch(
        tuple(draw(st.lists(length, min_size=1, max_size=4))),
        tile_kv=tile_kv,
        right_to_left=draw(st.booleans()),
        n_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 3, 32])),
        left=draw(st.one_of(st.none(), st.integers(0, 20), st.integers(0, 2000))),
        layout=draw(st.sampled_from(["flat", "packed", "d_major"])),
        n_splits=draw(st.sampled_from([1, 1, 2, 3, 7])),
        n_cores=draw(st.sampled_from([1, 2])),
        d=draw(st.sampled_from([64, 192, 256])),
        itemsize=draw(st.sampled_from([2, 4])),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batches())
@example(Batch((0, 0), n_splits=3, n_cores=2))
@example(Batch((3000,), tile_kv=16, left=2500))
@example(Batch((3000,), tile_kv=16, left=2500, right_to_left=True))
@example(Batch((1500, 3, 1500), tile_kv=1024, left=400, n_splits=2, n_cores=2))
@example(Batch((1024, 1022), layout="d_major", n_kv_heads=2))  # edges where a row of K ends
@example(Batch((300, 100), tile_kv=256, left=130, layout="d_major", right_to_left=True))
def test_every_tile_is_visited_once_and_no_other_row_is_read(batch: Batch) -> None:
    Made.of(batch).check()


SWEEPS = [
    Batch((), tile_kv=16),
    Batch((), tile_kv=128, right_to_left=True, left=200),
    Batch((), tile_kv=32, left=33, layout="packed", right_to_left=True),
    Batch((), tile_kv=256, left=100, layout="d_major"),
    Batch((), tile_kv=64, n_splits=3, layout="d_major", right_to_left=True),
    Batch((), tile_kv=64, n_splits=2, left=300),
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda b: f"{b.layout}-tile{b.tile_kv}-left{b.left}-splits{b.n_splits}")
def test_one_program_serves_every_length(sweep: Batch) -> None:
    """Lengths up to five tiles and around an item: whatever a length or a window cuts fits the sides."""
    shape = {name: value for name, value in vars(sweep).items() if name != "lengths"} | {"seqlen_kv": 2 * 2048 + 20}
    like = Batch((0,) * 16, **shape)
    geometry = like.geometry()
    item, tile = geometry.item_keys, sweep.tile_kv
    lengths = [*range(0, 3 * tile + 2, max(1, tile // 8 - 1)), *(5 * tile + x for x in (-1, 0, 1))]
    lengths += [n * item + x for n in (1, 2) for x in (-1, 0, 1, tile - 1, tile)]
    shapes = set()
    for first in range(0, len(lengths), 16):
        some = (lengths[first:] + [0] * 16)[:16]
        made = Made.of(Batch(tuple(some), **shape), geometry)
        made.check()
        shapes.add((made.plan.records.shape, made.plan.items.shape, made.plan.bounds.shape))
    assert len(shapes) == 1


def test_a_lane_without_a_group_reads_nothing() -> None:
    """Five groups in lanes of several: the lanes that are left are the first, and write what is written again."""
    made = Made.of(Batch((300, 0, 70, 2000, 5), group=32))
    n = made.plan.bounds.shape[1] * made.geometry.n_lanes
    assert n > 5
    visible = slice(made.at.visible, made.at.visible + made.geometry.n_edges)
    empty = [
        all((item[:, made.at.v] == -1).all() for item in items) and not record[:, lane, visible].any()
        for _, _, record, lane, items in made.lanes()
    ]
    assert all(empty[: n - 5])
    made.check()


def test_groups_of_as_many_items_share_a_trip() -> None:
    """Long and short sequences in turn: only the trips of the long ones have further items."""
    shape = {"group": 8, "d": 128, "itemsize": 2, "seqlen_kv": 4 * 8192}
    geometry = Batch((0,) * 8, **shape).geometry()
    lanes = geometry.n_lanes
    assert lanes > 1
    made = Made.of(Batch((4 * geometry.item_keys, 1) * lanes, **shape), geometry)
    np.testing.assert_array_equal(made.plan.bounds[0, :, :3], [[1, 1, 1], [2, 5, 0]])


# -- spans, by hand


@pytest.mark.parametrize(
    ("length", "left", "split", "n_splits", "expected"),
    [
        (0, None, 0, 1, ((0, 0), 0, 0, (0, 0))),
        (5, None, 0, 1, ((0, 0), 0, 0, (0, 5))),
        (10, None, 0, 1, ((0, 0), 0, 10, (10, 10))),
        (25, None, 0, 1, ((0, 0), 0, 20, (20, 25))),
        (25, 100, 0, 1, ((0, 0), 0, 20, (20, 25))),  # the window begins before the first key
        (25, 24, 0, 1, ((0, 0), 0, 20, (20, 25))),
        (25, 23, 0, 1, ((1, 10), 10, 20, (20, 25))),
        (25, 5, 0, 1, ((19, 20), 20, 20, (20, 25))),  # no whole tile between the cut ones
        (25, 4, 0, 1, ((20, 20), 20, 20, (20, 25))),
        (25, 3, 0, 1, ((0, 0), 20, 20, (21, 25))),  # within a tile
        (30, 0, 0, 1, ((29, 30), 30, 30, (30, 30))),
        # Splits of 5 tiles: 3 and 2, seen or not.
        (45, None, 0, 2, ((0, 0), 0, 30, (30, 30))),
        (45, None, 1, 2, ((30, 30), 30, 40, (40, 45))),
        (45, 10, 0, 2, ((0, 0), 0, 0, (0, 0))),
        (45, 10, 1, 2, ((34, 40), 40, 40, (40, 45))),
        (45, 20, 0, 2, ((24, 30), 30, 30, (30, 30))),
        (25, None, 3, 4, ((0, 0), 0, 0, (0, 0))),
    ],
)
def test_span(length: int, left: int | None, split: int, n_splits: int, expected: Any) -> None:
    """Tiles of ten keys; an empty side may stand anywhere."""
    got = span(length, left, split, n_splits, 10)
    for side, wanted in ((got.left, expected[0]), (got.right, expected[3])):
        assert side == wanted or (side[0] == side[1] and wanted[0] == wanted[1])
    assert (got.first, got.end) == (expected[1], expected[2]) or got.first == got.end == expected[1]


# -- gates


def tiles_on(firsts: Any, kinds: Any, tile_kv: int, total: int) -> list[tuple[int, float]]:
    """First rows and kinds of the tiles on some partitions, a partition's from the last to the first."""
    found = []
    for first, kinds_of in zip(firsts.tolist(), kinds.tolist(), strict=True):
        m = len(kinds_of)
        assert any(kinds_of) == (first >= 0)
        assert first < 0 or first + m * tile_kv <= total
        found += [(first + (m - 1 - i) * tile_kv, kind) for i, kind in enumerate(kinds_of) if kind]
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(batches())
@example(Batch((0, 5), left=3))
@example(Batch((2500, 600), tile_kv=16, left=2100, d=64, itemsize=2))  # several tiles per partition
@example(Batch((70,) * 9, tile_kv=16, group=32, n_kv_heads=3))  # several trips
def test_gates_are_tested_on_every_tile(batch: Batch) -> None:
    """Tiles from right to left with what may hold them, and the first side's rows, of every group where its lane is."""
    batch = replace(batch, right_to_left=True, n_cores=1, layout="flat" if batch.layout == "d_major" else batch.layout)
    cache, rows = batch.cache()
    g = batch.geometry()
    heads, n_units = batch.n_kv_heads, len(batch.lengths) * batch.n_kv_heads
    how = {"n_kv_heads": heads, "left": batch.left, "d": batch.d, "most_keys": batch.room}
    plan, gates = make_tile_plan(cache, g, batch.lengths, delta_rows=True, **how)
    assert gates is not None
    np.testing.assert_array_equal(plan.records, make_tile_plan(cache, g, batch.lengths, **how)[0].records)
    at = Columns(1, 1, 0, 0, g.n_edges)
    total = heads * cache.seqlen_kv * (len(batch.lengths) if cache.first is None else 1)
    n_trips = plan.records.shape[1] - 1
    per_row = P // gates.units.shape[1]
    last: dict[int, tuple[int, int]] = {}
    for trip, lane in np.ndindex(n_trips, g.n_lanes):
        last[int(plan.records[0, trip, 0, lane, at.unit_out])] = trip, lane
    used = np.zeros((gates.units.shape[0], gates.units.shape[1]), bool)
    for unit, (trip, lane) in last.items():
        split, (b, h) = unit // n_units, divmod(unit % n_units, heads)
        block, of_block = divmod(trip, gates.trips_per_block)
        row = of_block * g.n_lanes + lane
        used[block, row] = True
        assert gates.units[block, row, 0] == unit % n_units
        first_chunk, last_chunk, first_sides = gates.chunks[block]
        partitions = slice(row * per_row, (row + 1) * per_row)
        found = [
            tile
            for chunk in range(first_chunk, last_chunk + 1)
            for tile in tiles_on(gates.rows[chunk, partitions, 0], gates.kinds[chunk, partitions], batch.tile_kv, total)
        ]
        tiles = batch.tiles(b, split)
        cut = [x for x in tiles if (x[-1] + 1) % batch.tile_kv]
        expected = [
            (rows[b, h, x[0] // batch.tile_kv * batch.tile_kv], 1.0 if x.size == batch.tile_kv else 2.0)
            for x in tiles
            if not (x[-1] + 1) % batch.tile_kv
        ]
        assert found == expected
        # Of the first trip those of the first items once more, and where they are if none is closed.
        whole = [first for first, kind in expected if kind == 1.0]
        if trip == 0:
            n = gates.ahead.shape[0] // g.n_lanes
            firsts, bits = np.split(gates.ahead[lane * n : (lane + 1) * n], [1], axis=1)
            ahead = tiles_on(firsts[:, 0], bits.view(np.float32), batch.tile_kv, total)
            assert ahead == expected[: len(ahead)]
            assert len(ahead) >= min(len(expected), g.tiles_per_item)
        if block == 0:
            assert gates.n_tiles[row, 0] == len(whole)
            granules = [first + i for first in whole for i in range(0, batch.tile_kv, g.tokens)]
            several = gates.rows.shape[0] > gates.units.shape[0]
            n = P if several else gates.natural.shape[0] // gates.trips_per_block * P
            listed = gates.natural[:, :, lane].reshape(-1)[of_block * n : (of_block + 1) * n].tolist()
            assert listed == (granules + [-1] * n)[: len(listed)]
            assert len(listed) == n or (several and trip > 0)
        first, in_use = int(gates.first[block, row, 0]), gates.in_use[block, row]
        assert (first >= 0) == bool(cut)
        assert first_sides or not cut
        assert first + in_use.size <= total or not cut
        assert np.isin(in_use, (0, 1)).all()
        of_side = np.arange(cut[0][0] // batch.tile_kv * batch.tile_kv, batch.lengths[b]) if cut else []
        np.testing.assert_array_equal(first + np.flatnonzero(in_use), rows[b, h, of_side])
        assert gates.floor[block, row, 0] == (0.0 if cut else np.float32(MASKED))
        # The device lists items where the trip's loop looks for them, from one tile before the first on.
        second, _, follows, after, sides = gates.bounds[block, 0, of_block]
        assert gates.start[block, row, 0] == lane + (second - 1 - 1 / g.tiles_per_item) * P * g.n_lanes
        assert sides == plan.bounds[0, trip, 4]
        assert follows == (trip + 1 < n_trips)
        assert after - (second - 1) >= -(-batch.room // g.item_keys) + 2
        assert after + 2 <= gates.n_steps
    for block, row in np.argwhere(~used):
        first_chunk, last_chunk, _ = gates.chunks[block]
        assert not gates.kinds[first_chunk : last_chunk + 1, row * per_row : (row + 1) * per_row].any()
        assert gates.first[block, row] == -1
        assert gates.floor[block, row] == np.float32(MASKED)


# -- cores


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3000), min_size=2, max_size=9), st.integers(1, 3), st.integers(1, 3))
def test_two_cores_share_the_keys(lengths: list[int], n_kv_heads: int, n_splits: int) -> None:
    """What is dealt longest first differs by at most one group, in loops of as many turns on both."""
    made = Made.of(Batch(tuple(lengths), n_kv_heads=n_kv_heads, n_splits=n_splits, n_cores=2))
    made.check()
    read = np.zeros(2, np.int64)
    for core, _, record, lane, items in made.lanes():
        read[core] += (record[:, lane, made.at.visible : made.at.visible + made.geometry.n_edges]).sum()
        read[core] += sum((item[:, made.at.v] >= 0).sum() for item in items) * made.geometry.tokens
    assert read.sum() == n_kv_heads * sum(lengths)
    tiles = [-(-n // 64) for n in lengths]
    largest = max(-(-n // n_splits) * 64 for n in tiles)
    assert abs(int(read[0]) - int(read[1])) <= largest


# -- geometry


@pytest.mark.parametrize("group", [1, 5, 8, 32, 64, 71, 128])
def test_geometry_fits_the_machine(group: int) -> None:
    """The limits that `skip_softmax_decode.py` states, counted from the shapes of its tiles."""
    shapes = itertools.product(
        (1, 80, 128, 256), (2, 4), (1, 129, 10**6), (None, 100, 5000), (None, 128, 4096), (1, 32)
    )
    for (d, itemsize, longest, left, keys, n_groups), tile_kv in itertools.product(shapes, (16, 128, 256, 1024)):
        how = {"group": group, "d": d, "itemsize": itemsize, "n_groups": n_groups, "left": left, "tile_kv": tile_kv}
        seen = longest if left is None else min(longest, left + 1)
        how |= {"longest": seen, "n_kv_heads": min(n_groups, 8), "n_splits": 1, "n_cores": 1, "d_major_keys": keys}
        sides = 1 if left is None else 2
        stretches = sides * -(-(tile_kv - 1) // P)
        if group * stretches > PSUM_BANK:
            assert tile_kv == 1024
            assert group > (64 if left is None else 32)
            with pytest.raises(ValueError, match=f"tile_kv: received {tile_kv}, allowed at most .* for {group} query"):
                choose_tile_geometry(right_to_left=False, **how)
            continue
        g = choose_tile_geometry(right_to_left=left == 100, **how)
        case = (how, g)
        assert g.n_lanes >= 1, case
        assert g.n_lanes * group <= P, case
        # Whole tiles of whole granules, on as many partitions as there are at most.
        assert tile_kv % g.tokens == 0, case
        assert tile_kv // g.tokens <= P, case
        assert g.tiles_per_item * tile_kv == g.item_keys == P * g.tokens, case
        # A side has room for all keys of a tile but one.
        assert g.window == P, case
        assert g.n_windows == stretches, case
        first_side = left is not None or g.right_to_left
        assert g.n_first == (stretches // sides if first_side else 0), case
        # PSUM: two banks of scores, four beside d-major K; a lane's in one or in equal parts of as many as it needs.
        banks = 2 if keys is None else 4
        parts = next(n for n in range(1, g.tokens + 1) if g.tokens % n == 0 and group * g.tokens <= n * PSUM_BANK)
        per_bank = max(1, PSUM_BANK // (group * g.tokens))
        assert -(-g.n_lanes // per_bank) * parts <= banks, case
        assert g.n_lanes * group * g.n_edges <= PSUM_BANK, case
        # SBUF: bytes per partition of a lane's V and K, and of all.
        v = g.tokens * d * itemsize
        k = v if keys is None else -(-d // P) * P * g.tokens * itemsize
        assert max(k, v) <= 16 * KIB, case
        assert max(k, v) * g.n_lanes <= 32 * KIB, case
        # Gathers of d-major K: equal parts of an item, and of a row.
        if keys is not None:
            assert g.item_keys % g.chunks == 0, case
            assert keys % (g.item_keys // g.chunks) == 0, case
