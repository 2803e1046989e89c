"""Which keys each group reads where whole tiles of keys may be left out: records for the kernels, made on the host.

As `_decode_plan.py`, with one new token per sequence, but granules and items hold whole tiles of `tile_kv` keys. The
keys of a tile that is cut by a length or by a window are edge keys, one per partition: a *side*. So a group has its
tiles in items and at most one cut tile on the left and one on the right of them; the one that is visited before the
items is the first side, the other one the last.

Which tiles are left out is decided on the device. The plan knows what there is to visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS
from contributed._decode_plan import (
    BANK,
    CHUNK,
    FEW_HEADS,
    LANES_BYTES,
    LARGE_TILE_BYTES,
    MASKED_BITS,
    MOST_LANES,
    NONE,
    RUN_BYTES,
    TILE_BYTES,
    Array,
    FlatCache,
    Geometry,
    Keys,
    Writer,
    arrange,
    deal,
    lanes_in_psum,
)
from contributed._decode_state import SCORE_BANKS, SCORE_BANKS_D_MAJOR, Columns

EDGE_BYTES = 16384  # of the edge keys of all lanes, and of their values
TILE_MIN, TILE_MAX = 16, 1024  # keys of a tile, a power of two
GATED_TILES = 16  # on a partition
GATED_KEYS = 2048  # on a partition
GATE_ROWS = 32  # tested together


@dataclass(frozen=True)
class TileGeometry(Geometry):
    """What a program that leaves out tiles is compiled for.

    Args:
        tile_kv: keys of a tile, a multiple of `tokens`.
        n_first: stretches of edge keys of the first side; the last side has the others.
        right_to_left: order of the visit.
    """

    tile_kv: int
    n_first: int
    right_to_left: bool

    @property
    def tiles_per_item(self) -> int:
        """Tiles of a whole item."""
        return self.item_keys // self.tile_kv


class TilePlan(NamedTuple):
    """A launch's work. Arrays but the last have a leading axis of cores."""

    records: Array
    """int32 [n_cores, n_trips + 1, 128, n_lanes, columns]: edge keys and units of a trip."""
    items: Array
    """int32 [n_cores, n_steps + 2, 128, n_lanes, columns] in the order of the visit."""
    bounds: Array
    """int32 [n_cores, n_trips, 5]: a trip's second item, the end of its items, 1 if a trip follows, and its first item;
    1 if a lane has edge keys, on any core."""
    tiles: Array
    """[batch, n_splits]: tiles with a visible key."""


class GatePlan(NamedTuple):
    """What gates are tested on, for several trips at a time: a block has `n_rows` rows, one per trip and lane.

    Tiles of a row are visited from right to left. They are on `128 // n_rows` neighbouring partitions, those that are
    visited first on the first of them.
    """

    units: Array
    """int32 [n_blocks, n_rows, 1]: sequence and KV head of each row."""
    rows: Array
    """int32 [n_chunks, 128, 1]: first row of K of the tiles on a partition, -1 for none."""
    kinds: Array
    """float32 [n_chunks, 128, tiles]: 1 where items may hold the tile, 2 for the last side's, 0 for none; a partition's
    tiles from the last to the first."""
    first: Array
    """int32 [n_blocks, n_rows, 1]: a row of K from which on the first side's tile is, -1 for none."""
    in_use: Array
    """float32 [n_blocks, n_rows, keys]: 1 for the keys from there on that are its own and in use, else 0."""
    floor: Array
    """float32 [n_blocks, n_rows, 1]: 0 where there is a first side, MASKED elsewhere."""
    start: Array
    """float32 [n_blocks, n_rows, 1]: the element of items [n_steps, 128, n_lanes] that a row's tile would have that is
    before its first one."""
    chunks: Array
    """int32 [n_blocks, 3]: a block's first chunk, its last, and 1 if a row has a first side."""
    bounds: Array
    """int32 [n_blocks, 1, trips, 5]: `TilePlan.bounds` of trips without items."""
    backwards: Array
    """int32 [n_trips - 1, 1], at least 1: trips that another one follows, the last first."""
    ahead: Array
    """int32 [n_lanes * partitions, 1 + tiles]: of the tiles that the first trip's first items have if none is closed, a
    lane's on neighbouring partitions as in `rows`: first row of K of those on a partition, -1 for none; then float32
    bits as in `kinds`."""
    natural: Array
    """int32 [n_items, 128, n_lanes]: items if no tile is closed: those of the first block, or only its first ones if
    blocks may have several chunks."""
    n_tiles: Array
    """float32 [n_rows, 1]: tiles that the first block's rows may have in items."""
    n_steps: int
    """Items that there is room for."""

    @property
    def trips_per_block(self) -> int:
        """Trips whose gates are tested together."""
        return int(self.bounds.shape[2])


class Span(NamedTuple):
    """The visible keys of a sequence and split, positions in the sequence."""

    left: tuple[int, int]
    """Keys of the tile that is cut on the left; empty if none is."""
    first: int
    """Of the whole tiles."""
    end: int
    right: tuple[int, int]


def choose_tile_geometry(
    *,
    longest: int,
    n_kv_heads: int,
    group: int,
    d: int,
    itemsize: int,
    n_groups: int,
    left: int | None,
    n_splits: int,
    n_cores: int,
    tile_kv: int,
    right_to_left: bool,
    d_major_keys: int | None = None,
    gated: bool = False,
) -> TileGeometry:
    """The geometry for a cache; items are as large as those of `choose_geometry` where tiles are not smaller.

    Args:
        longest: keys that a sequence and split may see.
        n_kv_heads: KV heads.
        group: query heads per KV head.
        d: head dim.
        itemsize: bytes per element of the cache.
        n_groups: sequences x KV heads x splits.
        left: window, or None.
        n_splits: KV splits.
        n_cores: cores.
        tile_kv: keys of a tile.
        right_to_left: order of the visit.
        d_major_keys: keys per row of d-major K, None for s-major.
        gated: whether gates decide what there is to do, and more lanes at a time make up for what they close.

    Raises:
        ValueError: the edge keys' scores of one group do not fit a bank of PSUM.
    """
    banks = SCORE_BANKS if d_major_keys is None else SCORE_BANKS_D_MAJOR
    tile = TILE_BYTES if n_kv_heads > FEW_HEADS else LARGE_TILE_BYTES
    key_bytes = (d if d_major_keys is None else -(-d // PARTITIONS) * PARTITIONS) * itemsize
    most = min(tile // key_bytes, banks * BANK // group, tile_kv)
    tokens = max(1, tile_kv // PARTITIONS)
    run_bytes = RUN_BYTES if d_major_keys is None else 0
    while tokens * 2 <= most and (tokens * PARTITIONS < longest or tokens * d * itemsize < run_bytes):
        tokens *= 2
    chunks = 0
    if d_major_keys is not None:
        keys = PARTITIONS * tokens
        chunk = min(keys, 2 * CHUNK)
        while d_major_keys % chunk:
            chunk //= 2
        chunks = keys // chunk
    per_side = -(-(tile_kv - 1) // PARTITIONS)
    sides = 1 if left is None else 2
    n_first = per_side if right_to_left or left is not None else 0
    if group * sides * per_side > BANK:
        most_kv = 2 ** int(np.log2(BANK // (group * sides) * PARTITIONS))
        raise ValueError(
            f"tile_kv: received {tile_kv}, allowed at most {most_kv} for {group} query "
            f"heads per KV head{'' if left is None else ' and a window'}"
        )
    n_lanes = min(
        -(-n_groups // n_cores),
        MOST_LANES,
        # With gates lanes take turns in PSUM.
        MOST_LANES if gated else lanes_in_psum(group, tokens, banks),
        PARTITIONS // group,
        max(1, LANES_BYTES // (tokens * key_bytes)),
    )
    g = TileGeometry(
        tokens=tokens,
        granules=1,
        chunks=chunks,
        n_windows=sides * per_side,
        window=PARTITIONS,
        n_lanes=n_lanes,
        n_splits=n_splits,
        n_cores=n_cores,
        grid=tokens,
        tile_kv=tile_kv,
        n_first=n_first,
        right_to_left=right_to_left,
    )
    while g.n_lanes > 1 and (g.n_lanes * group * g.n_edges > BANK or g.n_edges * d * itemsize > EDGE_BYTES):
        g = replace(g, n_lanes=g.n_lanes - 1)
    return g


def span(length: int, left: int | None, split: int, n_splits: int, tile_kv: int) -> Span:
    """What a split of a sequence visits: splits cut all tiles of the cache, seen or not."""
    n_tiles = -(-length // tile_kv)
    per_split = -(-n_tiles // n_splits) * tile_kv
    begin = 0 if left is None else max(0, length - 1 - left)
    low, high = max(begin, split * per_split), min(length, (split + 1) * per_split)
    if low >= high:
        return Span((0, 0), 0, 0, (0, 0))
    first, end = -(-low // tile_kv) * tile_kv, high // tile_kv * tile_kv
    if first > end:
        return Span((0, 0), end, end, (low, high))
    return Span((low, first), first, end, (end, high))


def make_tile_plan(
    cache: FlatCache,
    geometry: TileGeometry,
    lengths: Sequence[int],
    *,
    n_kv_heads: int,
    left: int | None,
    d: int,
    d_major_keys: int | None = None,
    most_keys: int,
    delta_rows: bool = False,
) -> tuple[TilePlan, GatePlan | None]:
    """Records, items and their bounds for a batch; with `delta_rows` also what gates need, and no items.

    Args:
        cache: where keys lie.
        geometry: what the program was compiled for.
        lengths: keys of each sequence, the new token's included.
        n_kv_heads: KV heads.
        left: window to the left of the new token, or None.
        d: head dim.
        d_major_keys: keys per row of d-major K, None for s-major.
        most_keys: keys that a sequence may have; decides how many items there is room for.
        delta_rows: whether the device makes the items; on one core.
    """
    g, batch = geometry, len(lengths)
    n_blocks = -(-d // PARTITIONS) if d_major_keys is not None else 0
    k_edges = n_blocks * g.n_windows if d_major_keys is not None else 0
    at: Any = Columns(1, 1, n_blocks * g.chunks, k_edges, g.n_edges)
    chunk = g.item_keys // g.chunks if g.chunks else 1
    spans = [[span(length, left, i, g.n_splits, g.tile_kv) for i in range(g.n_splits)] for length in lengths]
    groups = [(b, head, split) for split in range(g.n_splits) for b in range(batch) for head in range(n_kv_heads)]
    bases = [s.first // chunk * chunk for b, _, split in groups for s in (spans[b][split],)]
    n_items = [
        max(1, -(-(spans[b][split].end - base) // g.item_keys))
        for (b, _, split), base in zip(groups, bases, strict=True)
    ]
    cores = deal(groups, [_n_keys(spans[b][split]) for b, _, split in groups], g.n_cores)
    n_trips = -(-max(1, *(len(core) for core in cores)) // g.n_lanes)
    most_items = -(-most_keys // g.item_keys)
    records = np.zeros((g.n_cores, n_trips + 1, PARTITIONS, g.n_lanes, at.width), np.int32)
    records[..., : at.visible] = NONE
    n_steps = 0 if delta_rows else n_trips * most_items
    items = np.full((g.n_cores, n_steps + 2, PARTITIONS, g.n_lanes, at.item_width), NONE, np.int32)
    items[..., at.mask] = MASKED_BITS
    items[..., at.start] = 0
    bounds = np.zeros((g.n_cores, n_trips, 5), np.int32)
    gates = None
    if delta_rows:
        total_rows = n_kv_heads * cache.seqlen_kv * (1 if cache.first is not None else batch)
        gates = _GateWriter.of(cache, g, n_trips, most_keys, left, total_rows)
    writer = Writer(cache, g, at, n_blocks, d, d_major_keys, n_kv_heads)
    trips = [arrange(core, n_items, n_trips, g.n_lanes) for core in cores]
    used = 0
    for trip in range(n_trips):
        # Both cores of a launch go the same way through its loops.
        steps = max(n_items[n] for c in range(g.n_cores) for n in trips[c][trip] if n is not None)
        in_trip = [groups[n] for c in range(g.n_cores) for n in trips[c][trip] if n is not None]
        sides = any(s.left[0] < s.left[1] or s.right[0] < s.right[1] for b, _, i in in_trip for s in (spans[b][i],))
        bounds[:, trip] = used + 1, used + steps, trip + 1 < n_trips, used + steps, sides
        if gates is not None:
            block, of_block = divmod(trip, gates.plan.trips_per_block)
            gates.plan.bounds[block, 0, of_block, 4] = sides
        for c in range(g.n_cores):
            real = [number for number in trips[c][trip] if number is not None] or cores[c][:1]
            for lane, number in enumerate(trips[c][trip]):
                record = records[c, trip]
                b, head, split = groups[real[0] if number is None else number]
                record[:, lane, at.unit_in] = b * n_kv_heads + head
                record[:, lane, at.unit_out] = (split * batch + b) * n_kv_heads + head
                record[:, lane, at.head] = head
                if number is None:
                    continue
                s = spans[b][split]
                first_side, last_side = (s.right, s.left) if g.right_to_left else (s.left, s.right)
                for side, window in ((first_side, 0), (last_side, g.n_first)):
                    if side[0] < side[1]:
                        writer.edges(record, lane, b, head, [side], lengths[b], 1, left, window)
                if gates is not None:
                    gates.write(trip, lane, b, head, s, lengths[b])
                    continue
                keys = Keys(bases[number], s.first, s.end, [])
                for k in range(n_items[number]):
                    turn = n_items[number] - 1 - k if g.right_to_left else k
                    writer.item(items[c, used + k, :, lane], b, head, keys, keys.base + turn * g.item_keys, lengths[b])
        used += steps
    tiles = np.array([[_n_tiles(s, g.tile_kv) for s in of_sequence] for of_sequence in spans], np.int64)
    return TilePlan(records, items, bounds, tiles), None if gates is None else gates.plan


def _n_keys(s: Span) -> int:
    return s.end - s.first + s.left[1] - s.left[0] + s.right[1] - s.right[0]


def _n_tiles(s: Span, tile_kv: int) -> int:
    return (s.end - s.first) // tile_kv + (s.left[0] < s.left[1]) + (s.right[0] < s.right[1])


@dataclass(frozen=True)
class _GateWriter:
    """Fills a `GatePlan`."""

    cache: FlatCache
    g: TileGeometry
    per_partition: int  # tiles
    total_rows: int
    plan: GatePlan

    @classmethod
    def of(
        cls, cache: FlatCache, g: TileGeometry, n_trips: int, most_keys: int, left: int | None, total_rows: int
    ) -> _GateWriter:
        """Room for all tiles there may be."""
        most_tiles = most_keys // g.tile_kv + (left is not None)
        trips = max(1, min(n_trips, GATE_ROWS // g.n_lanes))
        n_blocks = -(-n_trips // trips)
        n_rows = trips * g.n_lanes
        per_row = PARTITIONS // n_rows
        # Several tiles in one place have a descriptor in common.
        per_partition = 1
        while (
            per_partition * per_row < most_tiles
            and 2 * per_partition <= GATED_TILES
            and 2 * per_partition * g.tile_kv <= GATED_KEYS
            and (4 * per_partition + 1) * g.tile_kv <= total_rows
        ):
            per_partition *= 2
        n_chunks = max(1, -(-most_tiles // (per_row * per_partition)))
        room = max(1, -(-most_keys // g.item_keys)) + 2
        trip = np.arange(n_blocks * trips)
        start = (trip[:, None] * room - 1 / g.tiles_per_item) * PARTITIONS * g.n_lanes + np.arange(g.n_lanes)
        bounds = np.stack([trip * room + 1, trip * room, trip + 1 < n_trips, (trip + 1) * room, 0 * trip], axis=1)
        chunks = n_chunks * np.arange(n_blocks)[:, None] * np.array([1, 1, 0])
        shape = (n_blocks * n_chunks, PARTITIONS)
        # As few tiles on a partition as can be: keys wait for these.
        few = 1
        while few * PARTITIONS < g.n_lanes * g.tiles_per_item and 2 * few * g.tile_kv <= total_rows:
            few *= 2
        ahead = np.zeros((g.n_lanes * min(g.tiles_per_item // few, PARTITIONS // g.n_lanes), 1 + few), np.int32)
        ahead[:, 0] = NONE
        plan = GatePlan(
            units=np.zeros((n_blocks, n_rows, 1), np.int32),
            rows=np.full((*shape, 1), NONE, np.int32),
            kinds=np.zeros((*shape, per_partition), np.float32),
            first=np.full((n_blocks, n_rows, 1), NONE, np.int32),
            in_use=np.zeros((n_blocks, n_rows, min(g.tile_kv, total_rows)), np.float32),
            floor=np.full((n_blocks, n_rows, 1), MASKED_BITS, np.int32).view(np.float32),
            start=start.reshape(n_blocks, n_rows, 1).astype(np.float32),
            chunks=chunks.astype(np.int32),
            bounds=bounds.reshape(n_blocks, 1, trips, 5).astype(np.int32),
            backwards=np.arange(n_trips - 1, -1, -1, dtype=np.int32)[1 if n_trips > 1 else 0 :, None].copy(),
            ahead=ahead,
            natural=np.full((trips * room if n_chunks == 1 else 1, PARTITIONS, g.n_lanes), NONE, np.int32),
            n_tiles=np.zeros((n_rows, 1), np.float32),
            n_steps=n_blocks * trips * room + 2,
        )
        return cls(cache, g, per_partition, total_rows, plan)

    def write(self, trip: int, lane: int, b: int, head: int, s: Span, length: int) -> None:
        """A group's tiles. The rows of a side's tile that are in use count, visible or not."""
        g, plan, m = self.g, self.plan, self.per_partition
        block, of_block = divmod(trip, plan.trips_per_block)
        row = of_block * g.n_lanes + lane
        plan.units[block, row] = b * self.cache.n_kv_heads + head
        low = s.left[1] - g.tile_kv if s.left[0] < s.left[1] else s.first
        end, lowest = (int(self.cache.rows(b, head, np.array(at))) for at in (s.end, low))
        begin, kinds = self._on_partitions(m, lowest, end, low < s.first)
        number = np.arange(begin.size)
        per_row = PARTITIONS // plan.units.shape[1]
        chunk, partition = plan.chunks[block, 0] + number // per_row, row * per_row + number % per_row
        plan.rows[chunk, partition, 0] = begin
        plan.kinds[chunk, partition] = kinds
        if number.size:
            plan.chunks[block, 1] = max(plan.chunks[block, 1], int(chunk[-1]))
        if trip == 0:
            few, of_lane = plan.ahead.shape[1] - 1, plan.ahead.shape[0] // g.n_lanes
            begin, kinds = self._on_partitions(few, lowest, end, low < s.first)
            number = np.arange(min(begin.size, of_lane))
            plan.ahead[lane * of_lane + number, 0] = begin[number]
            plan.ahead[lane * of_lane + number, 1:] = kinds[number].view(np.int32)
        if block == 0:
            plan.n_tiles[row] = (s.end - s.first) // g.tile_kv
            # Granules, tiles from right to left; as many as there is room for.
            granule = np.arange((s.end - s.first) // g.tokens).reshape(-1, g.tile_kv // g.tokens)
            rows = (end - (s.end - s.first) + granule[::-1] * g.tokens).reshape(-1)
            room = plan.natural.reshape(-1, g.n_lanes)[plan.bounds[0, 0, trip, 1] * PARTITIONS :, lane]
            room[: rows.size] = rows[: room.size]
        if s.right[0] < s.right[1]:
            keys = np.array([s.right[0] // g.tile_kv * g.tile_kv, length])
            begin, end = self.cache.rows(b, head, keys)
            first = min(begin, self.total_rows - plan.in_use.shape[2])
            plan.first[block, row] = first
            plan.in_use[block, row, begin - first : end - first] = 1.0
            plan.floor[block, row] = 0.0
            plan.chunks[block, 2] = 1

    def _on_partitions(self, m: int, lowest: int, end: int, is_cut: bool) -> tuple[Array, Array]:
        """Tiles of the rows of K from `lowest` to `end`, `m` on a partition: first rows [partitions], and kinds.

        With `is_cut` the leftmost one is the last side's.
        """
        tile = self.g.tile_kv
        number = np.arange(-(-(end - lowest) // (m * tile)))
        # What the leftmost partition has too much of is another one's, or not this sequence's: it counts for nothing.
        begin = np.maximum(end - (number + 1) * m * tile, lowest)
        begin -= -(-np.maximum(begin + m * tile - self.total_rows, 0) // tile) * tile
        at = begin[:, None] + np.arange(m)[::-1] * tile
        there = (at >= lowest) & (at < (end - number * m * tile)[:, None])
        cut = (at == lowest) & is_cut
        return begin, np.where(there, np.where(cut, 2.0, 1.0), 0.0).astype(np.float32)
