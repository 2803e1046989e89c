"""Which keys each group of query rows reads, as records for the kernel: made on the host, once per step.

A plan depends on shapes, lengths and tables only, so all layers of a model share one. The program that runs it depends
on shapes only: lengths and tables are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from contributed._checks import PARTITIONS
from contributed._decode_state import DMA_ENGINES, MASKED, SCORE_BANKS, SCORE_BANKS_D_MAJOR, Columns

Array = np.ndarray[Any, np.dtype[Any]]

NONE = -1  # no row: the gather leaves the partition alone
TILE_BYTES = 8192  # of a K or V tile per partition
RUN_BYTES = 2048  # that a gather should find in one place: each descriptor takes GpSimd time
# With one or two KV heads a sequence may be alone with its core, and a load has to outlast the computation before it.
FEW_HEADS, LARGE_TILE_BYTES = 2, 16384
LANES_BYTES = 32768  # of all K tiles, and of all V tiles
BANK = 512  # scores of a PSUM bank
MOST_LANES = 16
CHUNK = 2048  # keys of d-major K in one gather: 4 KiB per row of two-byte keys
GRANULE = np.arange(PARTITIONS).reshape(-1, DMA_ENGINES).T.reshape(-1)  # on each partition, see DMA_ENGINES
MASKED_BITS = np.float32(MASKED).view(np.int32)
IMBALANCE = 1.1  # of two cores, above which sequences are split


def d_major_keys(keys: int) -> int:
    """The least room for `keys` keys in d-major K that loads in few gathers."""
    unit = PARTITIONS
    while unit < min(keys, CHUNK):
        unit *= 2
    return -(-max(keys, 1) // unit) * unit


class Cache(Protocol):
    """Where keys lie.

    `run`: how many consecutive keys have consecutive rows if the first is a multiple of it; None: all of a sequence.
    """

    @property
    def run(self) -> int | None:
        """Keys."""

    def rows(self, sequence: int, head: int, positions: Array) -> Array:
        """Row of each key in K (s-major) and V."""
        ...


@dataclass(frozen=True)
class FlatCache:
    """[batch, n_kv_heads, seqlen_kv, d], or packed [1, n_kv_heads, total, d] with the first key of each sequence."""

    n_kv_heads: int
    seqlen_kv: int
    first: tuple[int, ...] | None = None
    run: int | None = None

    def rows(self, sequence: int, head: int, positions: Array) -> Array:
        """Row of each key."""
        if self.first is None:
            return (sequence * self.n_kv_heads + head) * self.seqlen_kv + positions
        return head * self.seqlen_kv + self.first[sequence] + positions


@dataclass(frozen=True)
class PagedCache:
    """[n_blocks, n_kv_heads, block_size, d] and a block table [batch, max_blocks]."""

    n_kv_heads: int
    block_size: int
    block_table: Array

    @property
    def run(self) -> int:
        """Keys of a block lie together."""
        return self.block_size

    def rows(self, sequence: int, head: int, positions: Array) -> Array:
        """Row of each key."""
        blocks: Array = self.block_table[sequence, positions // self.block_size].astype(np.int64)
        rows: Array = (blocks * self.n_kv_heads + head) * self.block_size + positions % self.block_size
        return rows


@dataclass(frozen=True)
class Geometry:
    """What a program is compiled for, beside its operands' shapes.

    Args:
        tokens: consecutive keys per partition of an item.
        granules: gathers per item.
        chunks: gathers per item and block of d of d-major K; 0 for s-major K.
        n_windows: stretches of edge keys per group.
        window: keys of a stretch.
        n_lanes: groups in work at a time.
        n_splits: KV splits per sequence.
        n_cores: cores of the launch.
        grid: granules begin at multiples of it.
    """

    tokens: int
    granules: int
    chunks: int
    n_windows: int
    window: int
    n_lanes: int
    n_splits: int
    n_cores: int
    grid: int

    @property
    def lanes_per_tile(self) -> int:
        """Lanes of which a tile of edge keys holds a stretch."""
        return PARTITIONS // self.window

    @property
    def edge_tiles(self) -> int:
        """Tiles that hold a stretch of every lane."""
        return -(-self.n_lanes // self.lanes_per_tile)

    @property
    def n_edges(self) -> int:
        """Tiles of edge keys in a trip."""
        return self.n_windows * self.edge_tiles

    @property
    def item_keys(self) -> int:
        """Keys of a whole item."""
        return PARTITIONS * self.tokens

    @property
    def split_keys(self) -> int:
        """Splits begin at multiples of this."""
        return int(np.lcm(PARTITIONS, self.grid))


class Plan(NamedTuple):
    """A launch's work: `records`, `items` and `bounds` of a kernel, with a leading axis of cores."""

    records: Array
    items: Array
    bounds: Array
    keys: Array  # per core: how many keys its groups read


def choose_geometry(
    *,
    longest: int,
    s: int,
    n_kv_heads: int,
    group: int,
    d: int,
    itemsize: int,
    n_groups: int,
    left: int | None,
    n_splits: int,
    n_cores: int,
    run: int | None = None,
    d_major_keys: int | None = None,
) -> Geometry:
    """The geometry for a cache: the size of items, then all that it allows.

    What a key meets on its way into a result depends on the size of items, and that on neither lengths nor batch: a
    sequence's result has the same bits in every batch.

    Args:
        longest: keys that a sequence and split may see.
        s: new tokens per sequence.
        n_kv_heads: KV heads.
        group: query heads per KV head.
        d: head dim.
        itemsize: bytes per element of the cache.
        n_groups: sequences x KV heads x splits.
        left: window, or None.
        n_splits: KV splits.
        n_cores: cores.
        run: consecutive keys of a paged cache, None for a flat one.
        d_major_keys: keys per row of d-major K, None for s-major.
    """
    rows = s * group
    banks = SCORE_BANKS if d_major_keys is None else SCORE_BANKS_D_MAJOR
    tile = TILE_BYTES if n_kv_heads > FEW_HEADS else LARGE_TILE_BYTES
    key_bytes = (d if d_major_keys is None else -(-d // PARTITIONS) * PARTITIONS) * itemsize
    most = min(tile // key_bytes, banks * BANK // rows, PARTITIONS)
    tokens = 1
    run_bytes = RUN_BYTES if d_major_keys is None else 0
    while tokens * 2 <= most and (tokens * PARTITIONS < longest or tokens * d * itemsize < run_bytes):
        tokens *= 2
    granules, chunks, grid = 1, 0, 1
    if run is not None:
        whole = [n for n in range(1, tokens + 1) if (n % run == 0 or run % n == 0) and (rows * n <= BANK or n % 2 == 0)]
        tokens = whole[-1]
        granules = max(1, tokens // run)
        grid = min(run, tokens)
    if d_major_keys is not None:
        keys = PARTITIONS * tokens
        chunk = min(keys, CHUNK)
        while d_major_keys % chunk:
            chunk //= 2
        chunks, grid = keys // chunk, tokens
    tail = tokens - 1 + s - 1
    head = 0 if left is None else grid - 1 + s - 1
    # Edge keys of d-major K load as stretches; rows load one by one.
    parts = (tail, head) if d_major_keys is not None else (tail + head,)
    window = min(PARTITIONS, max(1, *parts))
    n_windows = max(1, sum(-(-n // window) for n in parts))
    n_lanes = min(
        -(-n_groups // n_cores),
        MOST_LANES,
        lanes_in_psum(rows, tokens, banks),
        PARTITIONS // rows,
        max(1, LANES_BYTES // (tokens * key_bytes)),
    )
    g = Geometry(tokens, granules, chunks, n_windows, window, n_lanes, n_splits, n_cores, grid)
    while g.n_lanes * rows * g.n_edges > BANK:
        g = replace(g, n_lanes=g.n_lanes - 1)
    return g


def lanes_in_psum(rows: int, tokens: int, banks: int) -> int:
    """Lanes whose scores [rows, tokens] fit into banks."""
    return banks * (BANK // (rows * tokens)) if rows * tokens <= BANK else banks // -(-rows * tokens // BANK)


@dataclass(frozen=True)
class Keys:
    """The keys of one sequence and split, positions in the sequence."""

    base: int  # of the first item
    first: int  # granule
    end: int
    edges: list[tuple[int, int]]  # stretches

    @property
    def n_keys(self) -> int:
        return self.end - self.first + sum(b - a for a, b in self.edges)


def _keys(length: int, s: int, left: int | None, split: int, g: Geometry, chunk: int) -> Keys:
    """Granules for the keys that all new tokens see, edges for the rest."""
    # Splits share what is seen, from the last whole tile before it on.
    begin = 0 if left is None else max(0, length - s - left) // g.split_keys * g.split_keys
    tiles = -(-(length - begin) // g.split_keys)
    per_split = -(-tiles // g.n_splits) * g.split_keys
    low, high = begin + split * per_split, min(begin + (split + 1) * per_split, length)
    seen = max(low, 0 if left is None else length - s - left)
    seen_by_all = max(low, 0 if left is None else length - 1 - left)
    first = -(-seen_by_all // g.grid) * g.grid
    whole = max(0, min(high, length - s + 1) - first) // g.tokens
    end = first + whole * g.tokens
    if not whole:
        first = end = min(first, max(high, 0))
    edges = [(a, b) for a, b in ((seen, first), (end, high)) if a < b]
    if not whole and len(edges) == 2:
        edges = [(seen, high)]
    return Keys(first // chunk * chunk, first, end, edges)


def make_plan(
    cache: Cache,
    geometry: Geometry,
    lengths: Sequence[int],
    *,
    n_kv_heads: int,
    s: int,
    left: int | None,
    d: int = 0,
    d_major_keys: int | None = None,
    most_keys: int,
) -> Plan:
    """Records, further items and their bounds for a batch.

    Args:
        cache: where keys lie.
        geometry: what the program was compiled for.
        lengths: keys of each sequence, the new tokens' included.
        n_kv_heads: KV heads.
        s: new tokens per sequence.
        left: window to the left of each new token, or None.
        d: head dim; needed for d-major K.
        d_major_keys: keys per row of d-major K, None for s-major.
        most_keys: keys that a sequence of this cache may have; decides how many items there is room for.
    """
    g = geometry
    batch = len(lengths)
    n_blocks = -(-d // PARTITIONS) if d_major_keys is not None else 0
    k_edges = n_blocks * g.n_windows if d_major_keys is not None else 0
    at: Any = Columns(s, g.granules, n_blocks * g.chunks, k_edges, g.n_edges)
    chunk = g.item_keys // g.chunks if g.chunks else g.grid
    work = [[_keys(length, s, left, split, g, chunk) for split in range(g.n_splits)] for length in lengths]
    n_units = batch * s * n_kv_heads
    groups = [
        (b, head, split, (split * n_units) + b * s * n_kv_heads + head)
        for split in range(g.n_splits)
        for b in range(batch)
        for head in range(n_kv_heads)
    ]
    n_items = [max(1, -(-(work[b][split].end - work[b][split].base) // g.item_keys)) for b, _, split, _ in groups]
    cores = deal(groups, [work[b][split].n_keys for b, _, split, _ in groups], g.n_cores)

    n_trips = -(-max(1, *(len(core) for core in cores)) // g.n_lanes)
    n_steps = n_trips * (-(-most_keys // g.item_keys))
    records = np.zeros((g.n_cores, n_trips + 1, PARTITIONS, g.n_lanes, at.width), np.int32)
    records[..., : at.visible] = NONE
    items = np.full((g.n_cores, n_steps + 1, PARTITIONS, g.n_lanes, at.item_width), NONE, np.int32)
    items[..., at.mask] = MASKED_BITS
    items[..., at.start] = 0
    bounds = np.zeros((g.n_cores, n_trips, 2), np.int32)
    writer = Writer(cache, g, at, n_blocks, d, d_major_keys, n_kv_heads)
    trips = [arrange(core, n_items, n_trips, g.n_lanes) for core in cores]
    used = 0
    for trip in range(n_trips):
        # Both cores of a launch go the same way through its loops.
        steps = max(n_items[n] for c in range(g.n_cores) for n in trips[c][trip] if n is not None) - 1
        bounds[:, trip] = used, used + steps
        for c in range(g.n_cores):
            real = [number for number in trips[c][trip] if number is not None] or cores[c][:1]
            for lane, number in enumerate(trips[c][trip]):
                in_trip = records[c, trip]
                record = in_trip[:, lane]
                b, head, split, unit_out = groups[real[0] if number is None else number]
                keys = Keys(0, 0, 0, []) if number is None else work[b][split]
                record[:, at.unit_in] = b * s * n_kv_heads + head
                record[:, at.unit_out] = unit_out
                record[:, at.head] = head
                writer.edges(in_trip, lane, b, head, keys.edges, lengths[b], s, left)
                writer.item(record, b, head, keys, keys.base, lengths[b])
                for k in range(1, 1 if number is None else n_items[number]):
                    further = items[c, used + k - 1, :, lane]
                    writer.item(further, b, head, keys, keys.base + k * g.item_keys, lengths[b])
        used += steps
    keys_of = [sum(work[groups[n][0]][groups[n][2]].n_keys for n in core) for core in cores]
    return Plan(records, items, bounds, np.array(keys_of))


def deal(groups: Sequence[Any], keys: Sequence[int], n_cores: int) -> list[list[int]]:
    """Groups of each core, in order: the longest first to the core with the fewest keys."""
    if n_cores == 1:
        return [list(range(len(groups)))]
    cores: list[list[int]] = [[] for _ in range(n_cores)]
    load = [0] * n_cores
    for i in sorted(range(len(groups)), key=lambda i: (-keys[i], i)):
        c = min(range(n_cores), key=lambda c: (load[c], len(cores[c])))
        cores[c].append(i)
        load[c] += keys[i]
    return [sorted(core) for core in cores]


def arrange(core: Sequence[int], n_items: Sequence[int], n_trips: int, n_lanes: int) -> list[list[int | None]]:
    """A core's groups in the lanes of its trips: groups of as many items share one.

    Lanes without a group stand first and write where one after them in their trip does.
    """
    alike = sorted(core, key=lambda number: (n_items[number], number))
    lanes: list[int | None] = [*[None] * (n_trips * n_lanes - len(core)), *alike]
    return [lanes[i : i + n_lanes] for i in range(0, len(lanes), n_lanes)]


def choose_n_splits(keys: Sequence[int], n_cores: int) -> int:
    """KV splits per sequence: 1, or as many as cores where whole (sequence, KV head) pairs do not balance them.

    One core streams one pair at a time at full bandwidth, so splits gain nothing on one core.

    Args:
        keys: of every (sequence, KV head) pair.
        n_cores: cores.
    """
    if n_cores == 1 or sum(keys) == 0:
        return 1
    load = [sum(keys[i] for i in core) for core in deal(keys, keys, n_cores)]
    return 1 if max(load) * n_cores <= IMBALANCE * sum(load) else n_cores


@dataclass(frozen=True)
class Writer:
    """Fills records."""

    cache: Cache
    g: Geometry
    at: Any
    n_blocks: int
    d: int
    d_major_keys: int | None
    n_kv_heads: int

    def item(self, record: Array, b: int, head: int, keys: Keys, base: int, length: int) -> None:
        """An item whose first granule would begin at `base`."""
        g, at = self.g, self.at
        starts = base + GRANULE * g.tokens
        there = (starts >= keys.first) & (starts < keys.end)
        run = g.tokens // g.granules
        for i in range(g.granules):
            column = np.full(PARTITIONS, NONE, np.int64)
            column[there] = self.cache.rows(b, head, starts[there] + i * run)
            record[:, at.v + i] = column
        record[:, at.mask] = np.where(there, 0, MASKED_BITS)
        record[:, at.start] = (starts - (length - 1)).astype(np.float32).view(np.int32)
        if self.d_major_keys is not None:
            chunk = g.item_keys // g.chunks
            for i in range(g.chunks):
                first = base + i * chunk
                needed = keys.first < keys.end and first < keys.end and first + chunk > keys.first
                for block in range(self.n_blocks):
                    elements = self._elements(b, head, block, first) if needed else NONE
                    record[:, at.k + block * g.chunks + i] = elements

    def edges(
        self,
        record: Array,
        lane: int,
        b: int,
        head: int,
        stretches: list[tuple[int, int]],
        length: int,
        s: int,
        left: int | None,
        first_window: int = 0,
    ) -> None:
        """A lane's edge keys in a trip's record, from a window on; of d-major K stretches of columns."""
        g, at = self.g, self.at
        slots = np.full(g.n_windows * g.window, NONE, np.int64)
        if self.d_major_keys is None:
            positions = np.concatenate([np.arange(a, e) for a, e in stretches] or [np.zeros(0, np.int64)])
            begin = first_window * g.window
            slots[begin : begin + positions.size] = positions
        else:
            firsts = [(first, e) for a, e in stretches for first in range(a, e, g.window)]
            for i, (first, e) in enumerate(firsts, first_window):
                begin = min(first, self.d_major_keys - g.window)
                positions = begin + np.arange(g.window)
                inside = (positions >= first) & (positions < e)
                slots[i * g.window : (i + 1) * g.window] = np.where(inside, positions, NONE)
                for block in range(self.n_blocks):
                    record[:, lane, at.k_edge + block * g.n_windows + i] = self._elements(b, head, block, begin)
        tile = np.arange(slots.size) // g.window * g.edge_tiles + lane // g.lanes_per_tile
        partition = lane % g.lanes_per_tile * g.window + np.arange(slots.size) % g.window
        used = slots >= 0
        tile, partition, keys = tile[used], partition[used], slots[used]
        record[partition, 0, at.v_edge + tile] = self.cache.rows(b, head, keys)
        record[partition, 0, at.rel + tile] = (keys - (length - 1)).astype(np.float32).view(np.int32)
        for i in range(s):
            p = length - s + i
            seen = (keys <= p) & (p >= 0)
            if left is not None:
                seen &= keys >= p - left
            record[partition, lane, at.visible + i * g.n_edges + tile] = seen

    def _elements(self, b: int, head: int, block: int, key: int) -> Array:
        """Element of d-major K at `key` for each row of a block of d; NONE on partitions past the block."""
        assert self.d_major_keys is not None
        db = self.d // self.n_blocks
        row = (b * self.n_kv_heads + head) * self.d + block * db + np.arange(PARTITIONS)
        return np.where(np.arange(PARTITIONS) < db, row * self.d_major_keys + key, NONE)
