"""Prefill: which rows and keys each block and chunk of a launch has, as tables that the kernel reads.

A block's rows are consecutive queries of one sequence. The keys that they see are taken by the device loop in chunks
of whole tiles, up to the tile in which the diagonal begins; from there on chunks are part of the program, so that tiles
past the diagonal cost nothing. Without a diagonal the loop has them all. Behind a window's left edge it is the other
way round: chunks that the edge crosses are part of the program, the loop begins where all of the block's rows see.
Queries before all keys that they could see are in no block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS
from contributed._prefill_state import RECORD_COLUMNS, RESULTS

Array = np.ndarray[Any, np.dtype[Any]]

MOST_TILES = 64  # row tiles of a block, all heads together
MOST_KV_TILES = 8  # of a chunk: its scores take two banks of PSUM
SELECTION_TILES = 4  # of a chunk with N:M selection, whose tiles of comparisons need the room
LEAST_CHUNKS = 2  # of a split
# What a step and a chunk cost beside their tiles, in tiles, about: the output's rescaling and the start of
# instructions; the drain of the pipeline and K's transposes. With decisions about tiles the pipeline is longer; with
# N:M selection a tile takes three times as long.
STEP_COST = 2
CHUNK_COST = 33
SKIP_CHUNK_COST = 60
SELECTION_CHUNK_COST = 11
NOTHING_COLUMNS = 8  # of 128 rows that no block has, in one trip of a loop
MOST_BYTES = {2: 80 * 1024, 4: 60 * 1024}  # of a block's queries and outputs, per partition, by bytes per element


class Sparsity(NamedTuple):
    """N:M selection: the best `n` of every `m` keys stay, and the first `sink` and the last `recent` ones."""

    n: int
    m: int
    sink: int
    recent: int


class Window(NamedTuple):
    """Keys visible around a query's position, None for all."""

    left: int | None
    right: int | None


class Span(NamedTuple):
    """One sequence: its queries are rows `q..q + len_q` of q, the last of its keys, rows `kv..kv + len_kv` of k."""

    q: int
    len_q: int
    kv: int
    len_kv: int


class Visit(NamedTuple):
    """A chunk: number of its sequence, first row and unit of heads of its block, positions of its keys."""

    span: int
    first: int
    unit: int
    base: int
    stop: int
    place: int | None  # None in the loop; else its number on the diagonal, or, up to -1, on the left edge, and before
    # these on that of blocks at the beginning of a sequence


@dataclass(frozen=True)
class Geometry:
    """Sizes of a launch; see `_prefill_state.Sizes`.

    Of windows without a right side `behind` is the number of tiles of keys from the first query's on.
    """

    heads: int
    q_tiles: int
    kv_tiles: int
    overhang: int
    planes: int = 1
    recent: int = 0
    n_splits: int = 1
    n_cores: int = 1
    left_tiles: int | None = None
    left_offset: int = 0
    behind: int = 0
    start: int | None = None

    @property
    def keys(self) -> int:
        """Keys of a chunk."""
        return self.kv_tiles * PARTITIONS

    @property
    def crossed(self) -> int:
        """Tiles of keys that the left edge of a row tile's window crosses, at most."""
        return 0 if self.left_tiles is None else tiles_of(self.left_offset + PARTITIONS - 1)

    @property
    def edge_tiles(self) -> int:
        """Tiles of keys that the left edge of a block's window crosses, and what `_with_rest` adds."""
        if self.left_tiles is None:
            return 0
        return self._with_rest(0, self.left_tiles + (0 if self.overhang else self.behind))

    @property
    def start_tiles(self) -> int:
        """The same from the first key on, of blocks with `start` tiles of keys before their own."""
        if self.left_tiles is None or self.start is None:
            return 0
        return self._with_rest(self.start - self.left_tiles, self.start + (0 if self.overhang else self.behind))

    def _with_rest(self, first: int, end: int) -> int:
        """Tiles from a left edge that begins at tile `first`, so that whole chunks are left up to tile `end`.

        That is the diagonal, or without one the last key. N:M selection has the loop begin where rows see all keys, not
        only some of each tile.
        """
        least = first + self.q_tiles - 1 + (self.crossed if self.planes > 1 else 0)
        return end - max(0, end - least) // self.kv_tiles * self.kv_tiles

    @property
    def n_edge(self) -> int:
        """Chunks of an edge."""
        return -(-self.edge_tiles // self.kv_tiles)

    @property
    def n_start(self) -> int:
        """Chunks of an edge at the beginning of a sequence."""
        return -(-self.start_tiles // self.kv_tiles)

    @property
    def n_diagonal(self) -> int:
        """Chunks of a block that the diagonal crosses."""
        return -(-(self.q_tiles - 1 + self.overhang) // self.kv_tiles) if self.overhang else 0

    def _own(self, row_tile: int, place: int) -> int:
        """Tiles of keys from a chunk's first one up to that of a tile of rows' own number; `place`: `Visit`."""
        if place < -self.n_edge:
            return (self.start or 0) + row_tile - (place + self.n_edge + self.n_start) * self.kv_tiles
        if place < 0:
            return (self.left_tiles or 0) + row_tile - (place + self.n_edge) * self.kv_tiles
        return row_tile - place * self.kv_tiles

    def seen(self, row_tile: int, place: int) -> tuple[int, int]:
        """Tiles of keys, first and end, that a tile of rows sees of a chunk in the program; `place`: `Visit`."""
        own = self._own(row_tile, place)
        if place < -self.n_edge:
            end = self.start_tiles - (place + self.n_edge + self.n_start) * self.kv_tiles
        elif place < 0:
            end = self.edge_tiles - (place + self.n_edge) * self.kv_tiles
        else:
            end = own + self.overhang
        first = 0 if self.left_tiles is None else own - self.left_tiles
        return max(0, first), max(0, min(self.kv_tiles, end))

    def plain(self, row_tile: int, place: int) -> tuple[int, int]:
        """Those of them that neither edge nor diagonal cross."""
        first, end = self.seen(row_tile, place)
        own = self._own(row_tile, place)
        if self.left_tiles is not None:
            first = max(first, own - self.left_tiles + self.crossed)
        return first, end if place < 0 else min(end, own)

    def numbers(self) -> Array:
        """Numbers of a chunk's keys as they lie in SBUF, [128, kv_tiles]."""
        groups = PARTITIONS // self.planes
        in_tile = np.arange(PARTITIONS).reshape(groups, self.planes).T.ravel()
        return in_tile[:, None] + PARTITIONS * np.arange(self.kv_tiles)


@dataclass(frozen=True)
class Plan:
    """Tables of a launch.

    Args:
        geometry: sizes.
        blocks: int32 [n_cores, n_blocks + 2, 128, 7, q_tiles]: rows of q in units of a block's heads, -1 for none;
            first key that a row sees, and the one after its last; the same of the keys it always keeps; its first
            maximum for skip-softmax (float32 bits); rows of o, as of q.
        bounds: int32 [n_cores, n_blocks, 9]: first chunk of the loop, and the one after its last, which begins the
            diagonal; 1 if the block has all its rows, else 0; the same of the block after it; of the left edge, of one
            at the beginning of a sequence, and of the diagonal the first chunk, and that plus 1 if the block has it,
            else plus 0; of the diagonal, whose first chunk is above, only the latter.
        chunks: int32 [n_cores, n_chunks + 2, 128, 3 + kv_tiles]: the first key's row in units of KV heads; position of
            that key, and of the one after the last (float32 bits); for each tile, -1 where a partition has a key,
            else 0.
        masked: whether a chunk of the loop has keys that a row does not see.
        plain: whether, on edge and diagonal, tiles of keys that neither crosses are seen by all rows.
        guarded: whether a chunk has rows beyond its sequence.
        ragged: whether a block has fewer rows than others.
        sure_tiles: row tiles, from the first on, that blocks have in full even if they do not have all their rows.
        rows_kv: rows that k and v must have.
        nothing: int32 [n_cores, n, 128, columns]: rows of o, as of blocks, that no block has, -1 for none; or None.
        visits: for each core, what its chunks are, but for those that fill blocks up.
    """

    geometry: Geometry
    blocks: Array
    bounds: Array
    chunks: Array
    masked: bool
    plain: bool
    guarded: bool
    ragged: bool
    sure_tiles: int
    rows_kv: int
    nothing: Array | None
    visits: list[list[Visit]]


def hiding(spans: Sequence[Span], window: Window) -> Window:
    """The window without a side behind which no query has a key; but a diagonal stays one."""
    left, right = window
    if left is not None and all(span.len_kv - 1 <= left for span in spans if span.len_q > 0):
        left = None
    if right and all(span.len_q - 1 <= right for span in spans if span.len_kv > 0):
        right = None
    return Window(left, right)


def seen_spans(spans: Sequence[Span], window: Window, skips: bool) -> tuple[Span, ...]:
    """The sequences without queries at their beginning that see nothing, all of them if none sees anything.

    With decisions about tiles whole tiles of rows only, as their rows decide together.
    """
    seen = []
    for span in spans:
        lo, hi = visible_keys(span, np.arange(span.len_q), window)
        first = int(np.argmax(lo < hi)) if (lo < hi).any() else span.len_q
        if skips and first < span.len_q:
            first = first // PARTITIONS * PARTITIONS
        seen.append(Span(span.q + first, span.len_q - first, span.kv, span.len_kv))
    return tuple(seen) if any(span.len_q for span in seen) else tuple(spans)


def choose_geometry(
    spans: Sequence[Span],
    *,
    group: int,
    n_kv_heads: int,
    d: int,
    itemsize: int,
    window: Window,
    sparsity: Sparsity | None,
    skips: bool,
    n_splits: int | None,
    n_cores: int,
) -> Geometry:
    """Blocks as large as their state allows: what a block costs beside its steps is shared by more of them.

    Chunks are smaller where that leaves fewer tiles to compute.
    """
    most = min(MOST_TILES, MOST_BYTES[itemsize] // ((4 + 3 * itemsize) * d))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    # A power of two: the chunks before a block are then whole ones where a sequence begins with its first query.
    q_tiles = 1 << ((most // heads).bit_length() - 1)
    q_tiles = max(1, min(q_tiles, tiles_of(max((s.len_q for s in spans), default=1))))
    kv_tiles = max(1, min(MOST_KV_TILES, tiles_of(max((s.len_kv for s in spans), default=1))))
    geometry = Geometry(heads, q_tiles, kv_tiles, 0)
    if sparsity is not None:
        geometry = Geometry(heads, q_tiles, SELECTION_TILES, 0, sparsity.m, sparsity.recent)
    if window.right == 0:
        geometry = with_diagonal(geometry, spans, window.right)
    n_blocks = sum(-(-s.len_q // (q_tiles * PARTITIONS)) for s in spans) * n_kv_heads * (group // heads)
    if n_splits is None:
        # Cores without a block get a part of one's keys, if those are many.
        chunks = max((-(-s.len_kv // geometry.keys) for s in spans if s.len_q > 0), default=1)
        n_splits = 1 if n_blocks >= n_cores else max(1, min(n_cores, chunks // LEAST_CHUNKS))
    geometry = replace(geometry, n_splits=n_splits, n_cores=min(n_cores, max(1, n_blocks * n_splits)))
    sizes, chunk_cost = [geometry], SELECTION_CHUNK_COST if sparsity is not None else SKIP_CHUNK_COST
    if sparsity is None and not skips:
        sizes, chunk_cost = [replace(geometry, kv_tiles=n) for n in range(kv_tiles, kv_tiles // 2, -1)], CHUNK_COST
    if window.right is not None and 0 < window.right <= MOST_TILES * PARTITIONS:
        # The program is not to be much longer.
        sizes += [with_diagonal(g, spans, window.right) for g in sizes]
    if window.left is not None:
        edges = [with_edge(g, spans, window.left) for g in sizes if g.overhang or window.right is None]
        # With N:M selection tiles of a loop that rows do not see as a whole take three times as long.
        always = window.right == 0 or (window.right is None and sparsity is not None)
        sizes = edges if always else edges + sizes
    return min(sizes, key=lambda g: _cost(g, spans, window, chunk_cost))


def _own(g: Geometry, span: Span, first: int) -> int:
    """Position of the first key of the tile that a block's row tiles are counted from, that of its first row's."""
    position = first + span.len_kv - span.len_q
    return (max(0, position) if g.overhang else position) // PARTITIONS * PARTITIONS


def _offsets(g: Geometry, spans: Sequence[Span]) -> list[int]:
    """Positions of the first rows of blocks, counted from these keys."""
    return [
        first + span.len_kv - span.len_q - _own(g, span, first)
        for span in spans
        for first in range(0, span.len_q if span.len_kv else 0, g.q_tiles * PARTITIONS)
    ] or [0]


def with_diagonal(g: Geometry, spans: Sequence[Span], right: int) -> Geometry:
    """With the right edge of the window as a part of the program.

    The last key that a row tile sees is that far from its last row. Of 1 the kernel takes it that it is none, and that
    positions of first rows are multiples of 128; but with decisions about tiles they may be before the first key.
    """
    g = replace(g, overhang=1)
    last = PARTITIONS - 1 + right + max(_offsets(g, spans))
    return replace(g, overhang=max(1 if right == 0 else 2, last // PARTITIONS + 1))


def with_edge(g: Geometry, spans: Sequence[Span], left: int) -> Geometry:
    """With the left edge of the window as a part of the program."""
    offsets = _offsets(g, spans)
    left_tiles = tiles_of(left - min(offsets))
    behind = max((tiles_of(s.len_kv) - _own(g, s, 0) // PARTITIONS for s in spans if s.len_q > 0), default=0)
    offset = max(offsets) - left + left_tiles * PARTITIONS
    g = replace(g, left_tiles=left_tiles, left_offset=offset, behind=behind)
    # Blocks with some of the edge's keys and not all: those with as many keys before them as most have.
    before = [
        _own(g, span, first) // PARTITIONS
        for span in spans
        for first in range(0, span.len_q if span.len_kv else 0, g.q_tiles * PARTITIONS)
    ]
    crossed = g.crossed if g.planes > 1 else 0
    some = [n for n in before if 0 <= n < left_tiles < n + g.q_tiles - 1 + crossed and (n > 0 or not g.overhang)]
    return replace(g, start=max(some, key=lambda n: (some.count(n), n), default=None))


def _cost(g: Geometry, spans: Sequence[Span], window: Window, chunk_cost: int) -> int:
    """About what the chunks of a launch cost, for one unit of heads, in tiles; `chunk_cost` is a chunk's share."""

    def static_cost(chunks: range) -> int:
        seen = [g.seen(row_tile, i) for i in chunks for row_tile in range(g.q_tiles)]
        widths = [end - begin for begin, end in seen if begin < end]
        return chunk_cost * len(chunks) + g.heads * (sum(widths) + STEP_COST * len(widths))

    of_loop = chunk_cost + g.heads * g.q_tiles * (g.kv_tiles + STEP_COST)
    of_edge, of_diagonal = static_cost(range(-g.n_edge, 0)), static_cost(range(g.n_diagonal))
    of_start = static_cost(range(-g.n_edge - g.n_start, -g.n_edge))
    total = 0
    for span in spans:
        for first in range(0, span.len_q, g.q_tiles * PARTITIONS):
            every = stretches(replace(g, n_splits=1), span, first, window, 0)
            total += len(every.loop) * of_loop + of_diagonal
            total += of_edge if every.edge else of_start if every.start else 0
    return total


def make_plan(
    geometry: Geometry,
    spans: Sequence[Span],
    *,
    n_q_heads: int,
    n_kv_heads: int,
    total_q: int,
    window: Window,
) -> Plan:
    """Blocks and chunks of all sequences, KV heads and splits, in the order in which the kernel takes them."""
    g = geometry
    block_rows = g.q_tiles * PARTITIONS
    units = n_q_heads // g.heads  # blocks of heads
    per_kv = units // n_kv_heads
    blocks: list[_Block] = []
    # Loads run ahead of the work, to the first rows if there is none.
    masked, guarded, rows_kv = False, False, g.keys
    # N:M leaves a single query alone: it always keeps what it sees, wherever that is.
    singles = g.planes > 1 and any(s.len_q == 1 for s in spans)
    plain = not singles
    for split in range(g.n_splits):
        for number_of_span, span in enumerate(spans):
            for first in range(0, span.len_q, block_rows):
                number = first + np.arange(block_rows)
                lo, hi = visible_keys(span, number, window)
                here = lo < hi
                every = stretches(g, span, first, window, split)
                loop, keys_of_chunks = every.loop, [keys for stretch in every for keys in stretch]
                end = np.where(here, number + span.len_kv - span.len_q + 1, 0)
                # Rows that there are not have maxima above those of masked scores: they want no tile.
                first_maxima = np.where(number < span.len_q, np.finfo(np.float32).min, 0)
                recent = (np.maximum(0, end - (span.len_kv if span.len_q == 1 else g.recent)), end)
                for base, stop in loop:
                    masked |= bool((here & ((lo > base) | (hi < base + g.keys))).any()) or stop < base + g.keys
                # Keys that always stay are looked for near the diagonal, if there is one and they are few.
                far = g.recent > g.keys or (g.recent > 0 and not g.overhang)
                masked |= (far or singles) and len(loop) > 0
                places = _places(g, every)
                plain = plain and _is_plain(g, lo, hi, number < span.len_q, keys_of_chunks, places)
                ends = [base + g.keys for base, _ in keys_of_chunks]
                rows_kv = max([rows_kv, *(span.kv + end for end in ends)])
                guarded |= max(ends, default=0) > span.len_kv
                rows = np.where(number < span.len_q, (span.q + number) * units, -1)
                for unit in range(units):
                    queries = np.where(rows < 0, -1, rows + unit)
                    results = np.where(rows < 0, -1, queries + split * total_q * units)
                    record = _block_record(queries, (lo, hi, *recent, first_maxima), results)
                    chunks = [
                        [chunk_record(g, span, n_kv_heads, unit // per_kv, *keys) for keys in stretch]
                        for stretch in every
                    ]
                    visits = [
                        Visit(number_of_span, first, unit, base, stop, place)
                        for (base, stop), place in zip(keys_of_chunks, places, strict=True)
                    ]
                    blocks.append(_Block(record, chunks, int((rows >= 0).sum()) // PARTITIONS, visits))
    shares, filled, mixed = _shares(g, blocks)
    sure_tiles = min(block.n_whole for share in shares for block in share)
    ragged = sure_tiles < g.q_tiles
    cores = [_tables(g, share, sure_tiles) for share in shares]
    n_chunks = max(len(chunks) for _, _, chunks in cores)
    return Plan(
        geometry,
        np.stack([records for records, _, _ in cores]),
        np.stack([bounds for _, bounds, _ in cores]),
        np.stack([np.pad(chunks, ((0, n_chunks - len(chunks)), (0, 0), (0, 0))) for _, _, chunks in cores]),
        masked or filled,
        plain and not mixed,
        guarded or filled or mixed,
        ragged,
        sure_tiles,
        rows_kv,
        _nothing(g, spans, total_q, units),
        [[visit for block in share for visit in block.visits] for share in shares],
    )


class _Block(NamedTuple):
    record: Array
    chunks: list[list[Array]]  # of each of `Stretches`
    n_whole: int  # row tiles that have all their rows
    visits: list[Visit]


def _is_plain(
    g: Geometry, lo: Array, hi: Array, there: Array, chunks: list[tuple[int, int]], places: list[int | None]
) -> bool:
    """Whether a block's rows that are `there` see all of the tiles of keys that neither edge nor diagonal cross.

    And none of them sees nothing.
    """
    n_rows = int(there.sum())
    if (lo == hi)[:n_rows].any():
        return False
    for row_tile in range(tiles_of(n_rows)):
        rows = slice(row_tile * PARTITIONS, min((row_tile + 1) * PARTITIONS, n_rows))
        first, end = int(lo[rows].max()), int(hi[rows].min())
        for (base, _), place in zip(chunks, places, strict=True):
            if place is not None:
                begin, stop = (base + n * PARTITIONS for n in g.plain(row_tile, place))
                if begin < stop and (begin < first or end < stop):
                    return False
    return True


def _nothing(g: Geometry, spans: Sequence[Span], total_q: int, units: int) -> Array | None:
    """Rows of all splits' results that no block has, see `Plan`."""
    owned = np.zeros(total_q, bool)
    for span in spans:
        owned[span.q : span.q + span.len_q] = True
    rows = np.flatnonzero(~np.tile(np.repeat(owned, units), g.n_splits)).astype(np.int32)
    if rows.size == 0:
        return None
    columns = min(NOTHING_COLUMNS, -(-rows.size // (g.n_cores * PARTITIONS)))
    rows = np.pad(rows, (0, -rows.size % (g.n_cores * PARTITIONS * columns)), constant_values=-1)
    return rows.reshape(g.n_cores, -1, columns, PARTITIONS).swapaxes(2, 3).copy()


def _shares(g: Geometry, blocks: list[_Block]) -> tuple[list[list[_Block]], bool, bool]:
    """The blocks of each core, and whether loops of some of them were filled up, and edges or diagonals.

    Cores run the same loops, so blocks with the same number are those next to each other in size, and the smaller ones
    get chunks of no keys, or of no rows at all.
    """
    if g.n_cores == 1:
        return [blocks], False, False
    nothing = np.zeros((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    record = np.zeros_like(blocks[0].record)
    record[:, [0, RESULTS]] = -1
    idle = _Block(record, [[], [], [], []], 0, [])
    order = sorted(blocks, key=lambda block: [-len(chunks) for chunks in block.chunks])
    order += [idle] * (-len(order) % g.n_cores)
    shares: list[list[_Block]] = [[] for _ in range(g.n_cores)]
    filled = mixed = False
    for i in range(0, len(order), g.n_cores):
        together = order[i : i + g.n_cores]
        lengths = [max(len(x) for x in stretches) for stretches in zip(*(b.chunks for b in together), strict=True)]
        n_whole = min(block.n_whole for block in together)
        for share, block in zip(shares, together, strict=True):
            missing = Stretches(*(n - len(chunks) for chunks, n in zip(block.chunks, lengths, strict=True)))
            filled |= missing.loop > 0
            mixed |= block is not idle and max(missing.edge, missing.start, missing.diagonal) > 0
            chunks = [[*some, *[nothing] * n] for some, n in zip(block.chunks, missing, strict=True)]
            share.append(_Block(block.record, chunks, n_whole, block.visits))
    return shares, filled, mixed


def _tables(g: Geometry, blocks: list[_Block], sure_tiles: int) -> tuple[Array, Array, Array]:
    """Records of blocks, bounds, and records of chunks of a core."""
    bounds: list[tuple[int, ...]] = []
    chunks: list[Array] = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        whole = block.n_whole == g.q_tiles
        whole_after = after is not None and after.n_whole == g.q_tiles
        of_edge, of_start, of_loop, of_diagonal = block.chunks
        edge = len(chunks)
        start = edge + len(of_edge)
        loop = start + len(of_start)
        diagonal = loop + len(of_loop)
        ends = (edge, edge + bool(of_edge), start, start + bool(of_start), diagonal + bool(of_diagonal))
        bounds.append((loop, diagonal, whole, whole_after, *ends))
        chunks.extend(chunk for some in block.chunks for chunk in some)
    records = [block.record for block in blocks]
    # Loads run ahead of the work; those after the last find no rows, or the first ones.
    last = np.full_like(records[0], -1 if sure_tiles < g.q_tiles else 0)
    last[:, 0, :sure_tiles] = 0
    nothing = np.zeros((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    return np.stack([*records, last, last]), np.array(bounds, np.int32), np.stack([*chunks, nothing, nothing])


def visible_keys(span: Span, number: Array, window: Window) -> tuple[Array, Array]:
    """First key that each query of a sequence sees, and the one after its last; the same number if none."""
    position = number + span.len_kv - span.len_q
    lo, hi = np.zeros_like(position), np.full_like(position, span.len_kv)
    if window.left is not None:
        lo = np.maximum(lo, position - window.left)
    if window.right is not None:
        hi = np.minimum(hi, position + window.right + 1)
    seen = (lo < hi) & (number < span.len_q)
    return np.where(seen, lo, 0), np.where(seen, hi, 0)


class Stretches(NamedTuple):
    """Of each kind of a block's chunks something, in the order in which they come."""

    edge: Any
    start: Any
    loop: Any
    diagonal: Any


def stretches(g: Geometry, span: Span, first: int, window: Window, split: int) -> Stretches:
    """Positions (first, after last) of the keys of a block's chunks: on the left edge, in the loop, on the diagonal.

    Splits share what the loop has; the first one has the edge, the last one the diagonal. An edge is apart where all of
    its keys are there, or at the beginning of a sequence as many as `Geometry.start` says.
    """
    lo, hi = visible_keys(span, first + np.arange(g.q_tiles * PARTITIONS), window)
    seen = lo < hi
    start = int(lo[seen].min()) // PARTITIONS * PARTITIONS if seen.any() else 0
    stop = int(hi[seen].max()) if seen.any() else 0
    own = _own(g, span, first)
    begin = own if g.overhang else stop
    n_edge, at_start, diagonal = 0, False, []
    if g.left_tiles is not None and seen.any():
        at_start = g.start is not None and own == g.start * PARTITIONS
        if own >= g.left_tiles * PARTITIONS:
            start, n_edge = own - g.left_tiles * PARTITIONS, g.edge_tiles
        elif at_start:
            start, n_edge = 0, g.start_tiles
    after_edge = start + n_edge * PARTITIONS
    edge = [(base, min(base + g.keys, after_edge)) for base in range(start, after_edge, g.keys)]
    if split > 0:
        edge = []
    share = -(-tiles_of(begin - after_edge) // (g.kv_tiles * g.n_splits)) * g.keys
    end = min(begin, after_edge + (split + 1) * share)
    loop = [(base, min(base + g.keys, end)) for base in range(after_edge + split * share, end, g.keys)]
    if not seen.any() and not g.overhang:
        loop = [(0, 0)]  # a launch of rows that see nothing has a chunk, too
    if split == g.n_splits - 1:
        diagonal = [(begin + i * g.keys, max(begin + i * g.keys, stop)) for i in range(g.n_diagonal)]
    return Stretches([] if at_start else edge, edge if at_start else [], loop, diagonal)


def _places(g: Geometry, every: Stretches) -> list[int | None]:
    """The places of a block's chunks, see `Visit`."""
    of_edge = range(-len(every.edge), 0)
    of_start = range(-g.n_edge - len(every.start), -g.n_edge)
    return [*of_edge, *of_start, *[None] * len(every.loop), *range(len(every.diagonal))]


def _block_record(queries: Array, bounds: Sequence[Array], results: Array) -> Array:
    """[128, 7, q_tiles] of a block's rows, one after the other."""
    columns = [queries.astype(np.int32), *(x.astype(np.float32).view(np.int32) for x in bounds)]
    columns.append(results.astype(np.int32))
    return np.stack([x.reshape(-1, PARTITIONS).T for x in columns], axis=1)


def chunk_record(g: Geometry, span: Span, n_kv_heads: int, kv_head: int, base: int, stop: int) -> Array:
    """[128, 3 + kv_tiles] of a chunk."""
    record = np.empty((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    record[:, 0] = (span.kv + base) * n_kv_heads + kv_head
    record[:, 1:3] = np.array([base, stop], np.float32).view(np.int32)
    position = base + g.numbers()
    record[:, RECORD_COLUMNS:] = np.where(position < span.len_kv, -1, 0)
    return record


def tiles_of(n: int) -> int:
    return -(-n // PARTITIONS)
