"""Prefill: which rows and keys each block and chunk of a launch has, as tables that the kernel reads.

A block's rows are consecutive queries of one sequence. The keys that they see are taken by the device loop in chunks
of whole tiles, up to the tile in which the diagonal begins; from there on chunks are part of the program, so that tiles
past the diagonal cost nothing. Without a diagonal the loop has them all.
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
    diagonal: int  # its number on the diagonal, below 0 in the loop


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

    @property
    def keys(self) -> int:
        """Keys of a chunk."""
        return self.kv_tiles * PARTITIONS

    @property
    def n_diagonal(self) -> int:
        """Chunks of a block that the diagonal crosses."""
        return -(-(self.q_tiles - 1 + self.overhang) // self.kv_tiles) if self.overhang else 0

    def width(self, row_tile: int, i_chunk: int) -> int:
        """Tiles of keys of a chunk on the diagonal that a tile of rows sees, as `Sizes.width`."""
        return max(0, min(self.kv_tiles, row_tile + self.overhang - i_chunk * self.kv_tiles))

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
        bounds: int32 [n_cores, n_blocks, 4]: first chunk of the loop, and the one after its last, which begins the
            diagonal; 1 if the block has all its rows, else 0; the same of the block after it.
        chunks: int32 [n_cores, n_chunks + 2, 128, 3 + kv_tiles]: the first key's row in units of KV heads; position of
            that key, and of the one after the last (float32 bits); for each tile, -1 where a partition has a key,
            else 0.
        masked: whether a chunk of the loop has keys that a row does not see.
        plain: whether, on the diagonal, tiles of keys before those that it crosses are seen by all rows.
        guarded: whether a chunk has rows beyond its sequence.
        ragged: whether a block has fewer rows than others.
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
    rows_kv: int
    visits: list[list[Visit]]


def choose_geometry(
    spans: Sequence[Span],
    *,
    group: int,
    n_kv_heads: int,
    d: int,
    itemsize: int,
    causal: bool,
    sparsity: Sparsity | None,
    n_splits: int | None,
    n_cores: int,
) -> Geometry:
    """Blocks as large as their state allows: what a block costs beside its steps is shared by more of them."""
    most = min(MOST_TILES, MOST_BYTES[itemsize] // ((4 + 3 * itemsize) * d))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    # A power of two: the chunks before a block are then whole ones where a sequence begins with its first query.
    q_tiles = 1 << ((most // heads).bit_length() - 1)
    q_tiles = max(1, min(q_tiles, _tiles(max((s.len_q for s in spans), default=1))))
    kv_tiles = max(1, min(MOST_KV_TILES, _tiles(max((s.len_kv for s in spans), default=1))))
    before = [s.len_kv - s.len_q for s in spans if s.len_q > 0 and s.len_kv > 0]
    aligned = all(n >= 0 and n % PARTITIONS == 0 for n in before)
    overhang = (1 if aligned else 2) if causal else 0
    geometry = Geometry(heads, q_tiles, kv_tiles, overhang)
    if sparsity is not None:
        geometry = Geometry(heads, q_tiles, SELECTION_TILES, overhang, sparsity.m, sparsity.recent)
    n_blocks = sum(-(-s.len_q // (q_tiles * PARTITIONS)) for s in spans) * n_kv_heads * (group // heads)
    if n_splits is None:
        # Cores without a block get a part of one's keys, if those are many.
        chunks = max((-(-s.len_kv // geometry.keys) for s in spans if s.len_q > 0), default=1)
        n_splits = 1 if n_blocks >= n_cores else max(1, min(n_cores, chunks // LEAST_CHUNKS))
    return replace(geometry, n_splits=n_splits, n_cores=min(n_cores, max(1, n_blocks * n_splits)))


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
                loop, diagonal = _stretches(g, span, first, lo, hi, split)
                end = np.where(here, number + span.len_kv - span.len_q + 1, 0)
                # Rows that there are not have maxima above those of masked scores: they want no tile.
                first_maxima = np.where(number < span.len_q, np.finfo(np.float32).min, 0)
                recent = (np.maximum(0, end - (span.len_kv if span.len_q == 1 else g.recent)), end)
                for base, stop in loop:
                    masked |= bool((here & ((lo > base) | (hi < base + g.keys))).any()) or stop < base + g.keys
                # Keys that always stay are looked for near the diagonal, if there is one and they are few.
                far = g.recent > g.keys or (g.recent > 0 and not g.overhang)
                masked |= (far or singles) and len(loop) > 0
                ends = [base + g.keys for base, _ in loop + diagonal]
                rows_kv = max([rows_kv, *(span.kv + end for end in ends)])
                guarded |= max(ends, default=0) > span.len_kv
                rows = np.where(number < span.len_q, (span.q + number) * units, -1)
                for unit in range(units):
                    queries = np.where(rows < 0, -1, rows + unit)
                    results = np.where(rows < 0, -1, queries + split * total_q * units)
                    record = _block_record(queries, (lo, hi, *recent, first_maxima), results)
                    chunks = [_chunk_record(g, span, n_kv_heads, unit // per_kv, *keys) for keys in loop + diagonal]
                    visits = [
                        Visit(number_of_span, first, unit, base, stop, i - len(loop))
                        for i, (base, stop) in enumerate(loop + diagonal)
                    ]
                    blocks.append(_Block(record, chunks, len(loop), bool((rows >= 0).all()), visits))
    ragged = not all(block.whole for block in blocks) or len(blocks) % g.n_cores != 0
    shares, filled = _shares(g, blocks)
    cores = [_tables(g, share, ragged) for share in shares]
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
        rows_kv,
        [[visit for block in share for visit in block.visits] for share in shares],
    )


class _Block(NamedTuple):
    record: Array
    chunks: list[Array]
    n_loop: int
    whole: bool
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
    idle = _Block(record, [nothing] * g.n_diagonal, 0, False, [])
    order = sorted(blocks, key=lambda block: -block.n_loop)
    order += [idle] * (-len(order) % g.n_cores)
    shares: list[list[_Block]] = [[] for _ in range(g.n_cores)]
    filled = False
    for i in range(0, len(order), g.n_cores):
        together = order[i : i + g.n_cores]
        n_loop, whole = together[0].n_loop, all(block.whole for block in together)
        for share, block in zip(shares, together, strict=True):
            missing = n_loop - block.n_loop
            filled |= missing > 0
            chunks = block.chunks[: block.n_loop] + [nothing] * missing + block.chunks[block.n_loop :]
            share.append(_Block(block.record, chunks, n_loop, whole, block.visits))
    return shares, filled


def _tables(g: Geometry, blocks: list[_Block], ragged: bool) -> tuple[Array, Array, Array]:
    """Records of blocks, bounds, and records of chunks of a core."""
    bounds: list[tuple[int, int, bool, bool]] = []
    chunks: list[Array] = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        whole_after = after is not None and after.whole
        bounds.append((len(chunks), len(chunks) + block.n_loop, block.whole, whole_after))
        chunks.extend(block.chunks)
    records = [block.record for block in blocks]
    # Loads run ahead of the work; those after the last find no rows, or the first ones.
    last = np.full_like(records[0], -1 if ragged else 0)
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


def _stretches(
    g: Geometry, span: Span, first: int, lo: Array, hi: Array, split: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Positions (first, after last) of the keys of a block's chunks: those of the loop, and those on the diagonal.

    Splits share what the loop has; the last one has the diagonal.
    """
    seen = lo < hi
    start = int(lo[seen].min()) // PARTITIONS * PARTITIONS if seen.any() else 0
    stop = int(hi[seen].max()) if seen.any() else 0
    begin = stop
    if g.overhang:
        begin = max(0, first + span.len_kv - span.len_q) // PARTITIONS * PARTITIONS
    share = -(-_tiles(begin - start) // g.n_splits) * PARTITIONS
    end = min(begin, start + (split + 1) * share)
    loop = [(base, min(base + g.keys, end)) for base in range(start + split * share, end, g.keys)]
    if split < g.n_splits - 1:
        stop = begin
    diagonal = [(begin + i * g.keys, max(begin + i * g.keys, stop)) for i in range(g.n_diagonal)]
    return loop, diagonal


def _block_record(queries: Array, bounds: Sequence[Array], results: Array) -> Array:
    """[128, 7, q_tiles] of a block's rows, one after the other."""
    columns = [queries.astype(np.int32), *(x.astype(np.float32).view(np.int32) for x in bounds)]
    columns.append(results.astype(np.int32))
    return np.stack([x.reshape(-1, PARTITIONS).T for x in columns], axis=1)


def _chunk_record(g: Geometry, span: Span, n_kv_heads: int, kv_head: int, base: int, stop: int) -> Array:
    """[128, 3 + kv_tiles] of a chunk."""
    record = np.empty((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    record[:, 0] = (span.kv + base) * n_kv_heads + kv_head
    record[:, 1:3] = np.array([base, stop], np.float32).view(np.int32)
    position = base + g.numbers()
    record[:, RECORD_COLUMNS:] = np.where(position < span.len_kv, -1, 0)
    return record


def _tiles(n: int) -> int:
    return -(-n // PARTITIONS)
