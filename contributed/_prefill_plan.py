"""Prefill: which rows and keys each block and chunk of a launch has, as tables that the kernel reads.

A block's rows are consecutive queries of one sequence. The keys that they see are taken by the device loop in chunks
of whole tiles, up to the tile in which the diagonal begins; from there on chunks are part of the program, so that tiles
past the diagonal cost nothing. Without a diagonal the loop has them all. Behind a window's left edge it is the other
way round: chunks that the edge crosses are part of the program, the loop begins where all of the block's rows see.
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
# N:M selection where not all rows see all keys a tile takes three times as long.
STEP_COST = 2
CHUNK_COST = 33
SKIP_CHUNK_COST = 60
SELECTION_CHUNK_COST = 11
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
    diagonal: int  # its number on the diagonal, below 0 before it


@dataclass(frozen=True)
class Geometry:
    """Sizes of a launch; see `_prefill_state.Sizes`."""

    heads: int
    q_tiles: int
    kv_tiles: int
    overhang: int
    planes: int = 1
    recent: int = 0
    n_splits: int = 1
    n_cores: int = 1
    left_tiles: int | None = None

    @property
    def keys(self) -> int:
        """Keys of a chunk."""
        return self.kv_tiles * PARTITIONS

    @property
    def edge_tiles(self) -> int:
        """Tiles of keys before the diagonal that the left edge of a block's window crosses.

        With those up to a whole number of chunks between them and the diagonal.
        """
        if self.left_tiles is None:
            return 0
        seen_by_all = max(0, self.left_tiles - (self.q_tiles - 1))
        return self.left_tiles - seen_by_all // self.kv_tiles * self.kv_tiles

    @property
    def n_edge(self) -> int:
        """Chunks of these."""
        return -(-self.edge_tiles // self.kv_tiles)

    @property
    def n_diagonal(self) -> int:
        """Chunks of a block that the diagonal crosses."""
        return -(-(self.q_tiles - 1 + self.overhang) // self.kv_tiles) if self.overhang else 0

    def seen(self, row_tile: int, i_chunk: int) -> tuple[int, int]:
        """Tiles of keys, first and end, of a chunk on the diagonal or below 0 an edge that a tile of rows sees."""
        if i_chunk < 0:
            before = (i_chunk + self.n_edge) * self.kv_tiles
            first, end = row_tile - before, self.edge_tiles - before
        else:
            before = i_chunk * self.kv_tiles
            first, end = 0, row_tile + self.overhang - before
            if self.left_tiles is not None:
                first = row_tile - self.left_tiles - before
        return max(0, first), max(0, min(self.kv_tiles, end))

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
        bounds: int32 [n_cores, n_blocks, 6]: first chunk of the loop, and the one after its last, which begins the
            diagonal; 1 if the block has all its rows, else 0; the same of the block after it; first chunk of the block,
            and that plus 1 if it is on the left edge of a window, else plus 0.
        chunks: int32 [n_cores, n_chunks + 2, 128, 3 + kv_tiles]: the first key's row in units of KV heads; position of
            that key, and of the one after the last (float32 bits); for each tile, -1 where a partition has a key,
            else 0.
        masked: whether a chunk of the loop has keys that a row does not see.
        plain: whether, on the diagonal, tiles of keys before those that it crosses are seen by all rows.
        guarded: whether a chunk has rows beyond its sequence.
        ragged: whether a block has fewer rows than others.
        sure_tiles: row tiles, from the first on, that blocks have in full even if they do not have all their rows.
        rows_kv: rows that k and v must have.
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
    visits: list[list[Visit]]


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

    Chunks are smaller where that leaves fewer tiles to compute. So are blocks under a window with selection or
    decisions, as their loop takes all chunks of the window as a whole.
    """
    most = min(MOST_TILES, MOST_BYTES[itemsize] // ((4 + 3 * itemsize) * d))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    # A power of two: the chunks before a block are then whole ones where a sequence begins with its first query.
    q_tiles = 1 << ((most // heads).bit_length() - 1)
    q_tiles = max(1, min(q_tiles, tiles_of(max((s.len_q for s in spans), default=1))))
    kv_tiles = max(1, min(MOST_KV_TILES, tiles_of(max((s.len_kv for s in spans), default=1))))
    before = [s.len_kv - s.len_q for s in spans if s.len_q > 0 and s.len_kv > 0]
    aligned = all(n >= 0 and n % PARTITIONS == 0 for n in before)
    overhang = (1 if aligned else 2) if window.right == 0 else 0  # windows on both sides: see below
    geometry = Geometry(heads, q_tiles, kv_tiles, overhang)
    if sparsity is not None:
        geometry = Geometry(heads, q_tiles, SELECTION_TILES, overhang, sparsity.m, sparsity.recent)
    windowed = window.left is not None or window.right not in (None, 0)
    if windowed and (sparsity is not None or skips):
        chunk_cost = SELECTION_CHUNK_COST if sparsity is not None else SKIP_CHUNK_COST
        smaller = [replace(geometry, q_tiles=n) for n in (q_tiles, 32, 16, 8, 4, 2, 1) if n <= q_tiles]
        geometry = min(smaller, key=lambda g: _cost(g, spans, window, chunk_cost))
        q_tiles = geometry.q_tiles
    n_blocks = sum(-(-s.len_q // (q_tiles * PARTITIONS)) for s in spans) * n_kv_heads * (group // heads)
    if n_splits is None:
        # Cores without a block get a part of one's keys, if those are many.
        chunks = max((-(-s.len_kv // geometry.keys) for s in spans if s.len_q > 0), default=1)
        n_splits = 1 if n_blocks >= n_cores else max(1, min(n_cores, chunks // LEAST_CHUNKS))
    geometry = replace(geometry, n_splits=n_splits, n_cores=min(n_cores, max(1, n_blocks * n_splits)))
    if sparsity is not None or skips:
        return geometry
    sizes = [replace(geometry, kv_tiles=n) for n in range(kv_tiles, kv_tiles // 2, -1)]
    if window.right is not None and 0 < window.right <= MOST_TILES * PARTITIONS:
        # The last key that a row tile sees is that far from the first row's tile. The program is not to be much longer.
        last = PARTITIONS - 1 + window.right + (0 if aligned else PARTITIONS - 1)
        sizes += [replace(g, overhang=last // PARTITIONS + 1) for g in sizes]
    if n_splits == 1 and window.left is not None and all(n >= 0 for n in before):
        sizes = [replace(g, left_tiles=tiles_of(window.left)) if g.overhang else g for g in sizes]
    return min(sizes, key=lambda g: _cost(g, spans, window, CHUNK_COST))


def _cost(g: Geometry, spans: Sequence[Span], window: Window, chunk_cost: int) -> int:
    """About what the chunks of a launch cost, for one unit of heads, in tiles; `chunk_cost` is a chunk's share."""

    def static_cost(chunks: range) -> int:
        seen = [g.seen(row_tile, i) for i in chunks for row_tile in range(g.q_tiles)]
        widths = [end - begin for begin, end in seen if begin < end]
        return chunk_cost * len(chunks) + g.heads * (sum(widths) + STEP_COST * len(widths))

    of_loop = chunk_cost + g.heads * g.q_tiles * (g.kv_tiles + STEP_COST)
    of_edge, of_diagonal = static_cost(range(-g.n_edge, 0)), static_cost(range(g.n_diagonal))
    total = 0
    for span in spans:
        for first in range(0, span.len_q, g.q_tiles * PARTITIONS):
            edge, loop, _ = stretches(g, span, first, window, 0)
            total += len(loop) * of_loop + of_diagonal + (of_edge if edge else 0)
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
    plain = window.left is None and g.n_splits == 1 and all(s.len_q <= s.len_kv for s in spans)
    # N:M leaves a single query alone: it always keeps what it sees, wherever that is.
    singles = g.planes > 1 and any(s.len_q == 1 for s in spans)
    plain = plain and not singles
    for split in range(g.n_splits):
        for number_of_span, span in enumerate(spans):
            for first in range(0, span.len_q, block_rows):
                number = first + np.arange(block_rows)
                lo, hi = visible_keys(span, number, window)
                here = lo < hi
                edge, loop, diagonal = stretches(g, span, first, window, split)
                every = edge + loop + diagonal
                end = np.where(here, number + span.len_kv - span.len_q + 1, 0)
                # Rows that there are not have maxima above those of masked scores: they want no tile.
                first_maxima = np.where(number < span.len_q, np.finfo(np.float32).min, 0)
                recent = (np.maximum(0, end - (span.len_kv if span.len_q == 1 else g.recent)), end)
                for base, stop in loop:
                    masked |= bool((here & ((lo > base) | (hi < base + g.keys))).any()) or stop < base + g.keys
                # Keys that always stay are looked for near the diagonal, if there is one and they are few.
                far = g.recent > g.keys or (g.recent > 0 and not g.overhang)
                masked |= (far or singles) and len(loop) > 0
                ends = [base + g.keys for base, _ in every]
                rows_kv = max([rows_kv, *(span.kv + end for end in ends)])
                guarded |= max(ends, default=0) > span.len_kv
                rows = np.where(number < span.len_q, (span.q + number) * units, -1)
                for unit in range(units):
                    queries = np.where(rows < 0, -1, rows + unit)
                    results = np.where(rows < 0, -1, queries + split * total_q * units)
                    record = _block_record(queries, (lo, hi, *recent, first_maxima), results)
                    chunks = [chunk_record(g, span, n_kv_heads, unit // per_kv, *keys) for keys in every]
                    visits = [
                        Visit(number_of_span, first, unit, base, stop, i - len(edge + loop))
                        for i, (base, stop) in enumerate(every)
                    ]
                    n_whole = int((rows >= 0).sum()) // PARTITIONS
                    blocks.append(_Block(record, chunks, len(edge) > 0, len(loop), n_whole, visits))
    shares, filled = _shares(g, blocks)
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
        plain,
        guarded or filled,
        ragged,
        sure_tiles,
        rows_kv,
        [[visit for block in share for visit in block.visits] for share in shares],
    )


class _Block(NamedTuple):
    record: Array
    chunks: list[Array]
    on_edge: bool
    n_loop: int
    n_whole: int  # row tiles that have all their rows
    visits: list[Visit]


def _shares(g: Geometry, blocks: list[_Block]) -> tuple[list[list[_Block]], bool]:
    """The blocks of each core, and whether some of them were filled up.

    Cores run the same loops, so blocks with the same number are those next to each other in size, and the smaller ones
    get chunks of no keys, or of no rows at all.
    """
    if g.n_cores == 1:
        return [blocks], False
    nothing = np.zeros((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    record = np.zeros_like(blocks[0].record)
    record[:, [0, RESULTS]] = -1
    idle = _Block(record, [nothing] * g.n_diagonal, False, 0, 0, [])
    order = sorted(blocks, key=lambda block: (-block.on_edge, -block.n_loop))
    order += [idle] * (-len(order) % g.n_cores)
    shares: list[list[_Block]] = [[] for _ in range(g.n_cores)]
    filled = False
    for i in range(0, len(order), g.n_cores):
        together = order[i : i + g.n_cores]
        on_edge, n_loop = together[0].on_edge, max(block.n_loop for block in together)
        n_whole = min(block.n_whole for block in together)
        for share, block in zip(shares, together, strict=True):
            n_edge = g.n_edge if block.on_edge else 0
            missing = n_loop - block.n_loop
            filled |= missing > 0 or on_edge > block.on_edge
            chunks = block.chunks[: n_edge + block.n_loop] + [nothing] * missing + block.chunks[n_edge + block.n_loop :]
            if on_edge and not block.on_edge:
                chunks = [nothing] * g.n_edge + chunks
            share.append(_Block(block.record, chunks, on_edge, n_loop, n_whole, block.visits))
    return shares, filled


def _tables(g: Geometry, blocks: list[_Block], sure_tiles: int) -> tuple[Array, Array, Array]:
    """Records of blocks, bounds, and records of chunks of a core."""
    bounds: list[tuple[int, ...]] = []
    chunks: list[Array] = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        whole = block.n_whole == g.q_tiles
        whole_after = after is not None and after.n_whole == g.q_tiles
        begin = len(chunks)
        first = begin + (g.n_edge if block.on_edge else 0)
        bounds.append((first, first + block.n_loop, whole, whole_after, begin, begin + block.on_edge))
        chunks.extend(block.chunks)
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


_Stretch = list[tuple[int, int]]


def stretches(g: Geometry, span: Span, first: int, window: Window, split: int) -> tuple[_Stretch, _Stretch, _Stretch]:
    """Positions (first, after last) of the keys of a block's chunks: on the left edge, in the loop, on the diagonal.

    Splits share what the loop has; the last one has the diagonal. A left edge is apart where all of its keys are there.
    """
    lo, hi = visible_keys(span, first + np.arange(g.q_tiles * PARTITIONS), window)
    seen = lo < hi
    start = int(lo[seen].min()) // PARTITIONS * PARTITIONS if seen.any() else 0
    stop = int(hi[seen].max()) if seen.any() else 0
    begin = stop
    if g.overhang:
        begin = max(0, first + span.len_kv - span.len_q) // PARTITIONS * PARTITIONS
    edge = []
    if g.left_tiles is not None and begin >= g.left_tiles * PARTITIONS and stop > 0:
        start = begin - g.left_tiles * PARTITIONS
        after_edge = start + g.edge_tiles * PARTITIONS
        edge = [(base, min(base + g.keys, after_edge)) for base in range(start, after_edge, g.keys)]
        start = after_edge
    share = -(-tiles_of(begin - start) // g.n_splits) * PARTITIONS
    end = min(begin, start + (split + 1) * share)
    loop = [(base, min(base + g.keys, end)) for base in range(start + split * share, end, g.keys)]
    if split < g.n_splits - 1:
        stop = begin
    diagonal = [(begin + i * g.keys, max(begin + i * g.keys, stop)) for i in range(g.n_diagonal)]
    return edge, loop, diagonal


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
