"""Prefill, backward: which rows and keys each block and chunk of a launch has, as tables that the kernel reads.

Blocks and chunks are as in `_prefill_plan.py`, of other sizes, on one core and without splits: blocks add to the same
dK and dV in turn. The host knows which tiles the forward skipped, so that the loop has only chunks with tiles that some
row of the block weighs; where all rows see all keys of the loop such tiles are gathered, whatever is between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS
from contributed._prefill_plan import (
    Geometry,
    Span,
    Sparsity,
    Window,
    chunk_record,
    stretches,
    tiles_of,
    visible_keys,
    with_diagonal,
    with_edge,
)
from contributed._prefill_skip import PENALTY
from contributed._prefill_state import RECORD_COLUMNS

Array = np.ndarray[Any, np.dtype[Any]]

MOST_TILES = 64  # row tiles of a block, all heads together
BANK_FLOATS = 512  # of PSUM: the scores of a chunk, or its dK
MOST_BYTES = 150 * 1024  # of a block's rows, per partition; fewer are left by
CHUNK_BYTES = 3 * 1024  # for each byte of an element: keys and steps
SELECTION_BYTES = 32 * 1024  # with N:M selection
# What a block, a trip of the loop, and a chunk cost beside their tiles, in tiles, about: the drain of the pipeline;
# K's and V's transposes. And what a gathered tile costs at least: six transfers that follow each other in a queue.
BLOCK_COST = 40
TRIP_COST = 20
CHUNK_COST = 4
GATHER_COST = 12


@dataclass(frozen=True)
class Plan:
    """Tables of a launch.

    Args:
        geometry: sizes.
        blocks: int32 [n_blocks + 2, 128, 3, q_tiles]: rows of q in units of a block's heads, -1 for none; first key
            that a row sees, and the one after its last (float32 bits). With N:M selection 5 in place of 3: also the
            first key that a row always keeps, and the one after its last.
        bounds: int32 [n_blocks, 5 + trip sizes]: first chunk of the loop; 1 if the block has all its rows, else 0; the
            same of the block after it; first chunk of the block, and that plus 1 if it is on the left edge of a window,
            else plus 0; for each size of trips of the loop the chunk after the last that they take, the last of which
            begins the diagonal.
        chunks: int32 [n_chunks + 2, 128, 3 + kv_tiles]: the first key's row in units of KV heads; position of that
            key, and of the one after the last (float32 bits); for each tile, -1 where a partition has a key, else 0.
            Where `gathers`, kv_tiles more: the first row of each tile.
        per_trip: chunks of the loop in its largest trips, see `trip_sizes`.
        gathers: whether a chunk's tiles are anywhere.
        masked: whether a chunk of the loop has keys that a row does not see.
        plain: whether, on diagonals, a tile of rows sees all key tiles before its own number.
        guarded: whether a chunk has rows beyond its sequence.
        ragged: whether a block has fewer rows than others.
        rows_kv: rows that k and v must have.
        penalties: float32 [n_chunks + 1, tiles of a block * kv_tiles]: what is added to the exponents of each tile of a
            chunk, far below all of them if it is skipped, else 0; None if none ever is.
    """

    geometry: Geometry
    blocks: Array
    bounds: Array
    chunks: Array
    per_trip: int
    gathers: bool
    masked: bool
    plain: bool
    guarded: bool
    ragged: bool
    rows_kv: int
    penalties: Array | None


def choose_geometry(
    spans: Sequence[Span],
    *,
    group: int,
    d: int,
    itemsize: int,
    window: Window,
    sparsity: Sparsity | None = None,
    kept: Sequence[Array] | None = None,
) -> Geometry:
    """Blocks as large as their rows allow: what a block costs beside its steps is shared by more of them.

    They are smaller where that leaves fewer tiles to compute, of a window or of those that are `kept`, see `make_plan`.
    """
    most_bytes = MOST_BYTES - itemsize * CHUNK_BYTES - (SELECTION_BYTES if sparsity is not None else 0)
    # q, do and o of the next block, q and do of this one, both ways round, and dQ.
    most = max(1, min(MOST_TILES, most_bytes // ((7 * itemsize + 4) * d)))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    # A power of two: the chunks before a block are then whole ones where a sequence begins with its first query.
    q_tiles = 1 << ((most // heads).bit_length() - 1)
    q_tiles = max(1, min(q_tiles, tiles_of(max((s.len_q for s in spans), default=1))))
    kv_tiles = min(BANK_FLOATS // PARTITIONS, BANK_FLOATS // d)
    kv_tiles = max(1, min(kv_tiles, tiles_of(max((s.len_kv for s in spans), default=1))))
    geometry = Geometry(heads, q_tiles, kv_tiles, 0)
    if sparsity is not None:
        geometry = replace(geometry, planes=sparsity.m, recent=sparsity.recent)
    right, left = window.right, window.left
    sizes = [geometry]
    if kept is not None or left is not None:
        sizes = [replace(geometry, q_tiles=q_tiles >> i) for i in range(q_tiles.bit_length())]
    choices = list(sizes)
    if right is not None and right <= MOST_TILES * PARTITIONS:
        # The program is not to be much longer.
        choices = ([] if right == 0 else choices) + [with_diagonal(g, spans, right) for g in sizes]
    if left is not None and all(s.len_kv >= s.len_q for s in spans if s.len_q > 0 and s.len_kv > 0):
        # Of blocks at the beginning of a sequence that have some of the edge's keys and not all, the loop has them.
        edges = [replace(with_edge(g, spans, left), start=None) for g in choices if g.overhang or right is None]
        choices = edges + [g for g in choices if not g.overhang]
    if len(choices) == 1:
        return choices[0]
    return min(choices, key=lambda g: _cost(g, spans, window, kept))


def trip_sizes(g: Geometry, kept: Sequence[Array] | None) -> list[int]:
    """Chunks of the loop in a trip: as many as there is room for while there are as many, then half as many, to one.

    One each, but where blocks are small for having few tiles to compute.
    """
    most = 1 if kept is None else max(1, MOST_TILES // (g.heads * g.q_tiles))
    return [1 << i for i in range(most.bit_length())][::-1]


def _cost(g: Geometry, spans: Sequence[Span], window: Window, kept: Sequence[Array] | None) -> int:
    """About what blocks cost, in tiles, for all heads that there are decisions of, or for those of one block."""
    n_tiles, per_trip = g.heads * g.q_tiles, trip_sizes(g, kept)[0]
    gathers = kept is not None and _gathers(g, spans, window, kept)

    def static_cost(chunks: range) -> int:
        seen = [g.seen(row_tile, i) for i in chunks for row_tile in range(g.q_tiles)]
        return CHUNK_COST * len(chunks) + g.heads * sum(max(0, end - begin) for begin, end in seen)

    of_chunk = CHUNK_COST + n_tiles * g.kv_tiles
    if gathers:
        of_chunk = max(of_chunk, GATHER_COST * g.kv_tiles)
    of_edge, of_block = TRIP_COST + static_cost(range(-g.n_edge, 0)), BLOCK_COST + static_cost(range(g.n_diagonal))
    total = 0
    for b, span in enumerate(spans):
        for first in range(0, span.len_q, g.q_tiles * PARTITIONS):
            edge, loop, _ = _stretches(g, span, first, window)
            for unit in range(1 if kept is None else len(kept[b]) // g.heads):
                wanted = None if kept is None else _wanted(g, kept[b], unit, first)
                n = len(_chosen(g, loop, wanted, gathers))
                total += of_block + (of_edge if edge else 0) + n * of_chunk
                total += TRIP_COST * (n // per_trip + (n % per_trip).bit_count())
    return total


class _Block(NamedTuple):
    record: Array
    chunks: list[Array]
    on_edge: bool
    n_loop: int
    whole: bool


def make_plan(
    geometry: Geometry,
    spans: Sequence[Span],
    *,
    n_q_heads: int,
    n_kv_heads: int,
    window: Window,
    kept: Sequence[Array] | None = None,
) -> Plan:
    """Blocks and chunks of all sequences and KV heads, in the order in which the kernel takes them.

    `kept`: for each sequence the tiles that are not skipped, bool [n_q_heads, tiles of queries, tiles of keys].
    """
    g = geometry
    block_rows = g.q_tiles * PARTITIONS
    units = n_q_heads // g.heads  # blocks of heads
    per_kv = units // n_kv_heads
    blocks: list[_Block] = []
    guarded, rows_kv = False, g.keys
    # N:M leaves a single query alone: it always keeps what it sees, wherever that is.
    singles = g.planes > 1 and any(s.len_q == 1 for s in spans)
    # Tiles with keys that always stay are counted from the diagonal; these may be in any of a chunk.
    anywhere = singles or (g.planes > 1 and g.recent > 0 and not g.overhang)
    gathers = kept is not None and _gathers(g, spans, window, kept)
    masked = not gathers and _loop_is_masked(g, spans, window, anywhere)
    penalties: list[Array] = []
    n_most = 0  # chunks that there would be if no tile were skipped
    for number_of_span, span in enumerate(spans):
        for first in range(0, span.len_q, block_rows):
            number = first + np.arange(block_rows)
            lo, hi = visible_keys(span, number, window)
            edge, loop, diagonal = _stretches(g, span, first, window)
            n_most += units * len(edge + loop + diagonal)
            bounds_of_rows = [lo, hi]
            if g.planes > 1:
                end = np.where(lo < hi, number + span.len_kv - span.len_q + 1, 0)
                bounds_of_rows += [np.maximum(0, end - (span.len_kv if span.len_q == 1 else g.recent)), end]
            rows = np.where(number < span.len_q, (span.q + number) * units, -1)
            for unit in range(units):
                wanted = None if kept is None else _wanted(g, kept[number_of_span], unit, first)
                chosen = _chosen(g, loop, wanted, gathers)
                every = [*((_run(g, base), stop) for base, stop in edge), *chosen]
                every += [(_run(g, base), stop) for base, stop in diagonal]
                after_last = max((max(tiles) + 1 for tiles, _ in every), default=0) * PARTITIONS
                rows_kv = max(rows_kv, span.kv + after_last)
                guarded |= after_last > span.len_kv
                chunks = [_chunk(g, span, n_kv_heads, unit // per_kv, *keys, gathers) for keys in every]
                record = _block_record(np.where(rows < 0, -1, rows + unit), bounds_of_rows)
                blocks.append(_Block(record, chunks, len(edge) > 0, len(chosen), bool((rows >= 0).all())))
                if kept is not None:
                    of_heads = _of_block(g, kept[number_of_span], unit, first)
                    for i, (tiles, _) in enumerate(every):
                        in_loop = len(edge) <= i < len(edge) + len(chosen)
                        end_of_loop = tiles_of(loop[-1][1]) if in_loop else None
                        penalties.append(_penalties(g, of_heads, tiles, end_of_loop))
    ragged = not all(block.whole for block in blocks)
    sizes = trip_sizes(g, kept)
    bounds: list[tuple[int, ...]] = []
    chunks = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        begin = len(chunks)
        first = begin + (g.n_edge if block.on_edge else 0)
        ends = [first + block.n_loop // size * size for size in sizes]
        whole_after = after is not None and after.whole
        bounds.append((first, block.whole, whole_after, begin, begin + block.on_edge, *ends))
        chunks.extend(block.chunks)
    # Tables have the same shapes whatever is skipped. Loops that are never entered still name a chunk.
    missing = max(1, n_most) - len(chunks)
    records = [block.record for block in blocks]
    # Loads run ahead of the work; those after the last find no rows, or the first ones.
    last = np.full_like(records[0], -1 if ragged else 0)
    nothing = np.zeros((PARTITIONS, RECORD_COLUMNS + g.kv_tiles * (2 if gathers else 1)), np.int32)
    none = np.zeros(g.q_tiles * g.heads * g.kv_tiles, np.float32)
    return Plan(
        g,
        np.stack([*records, last, last]),
        np.array(bounds, np.int32),
        np.stack([*chunks, *[nothing] * (missing + 2)]),
        sizes[0],
        gathers,
        masked,
        window.left is None and all(s.len_kv >= s.len_q for s in spans if s.len_q > 0),
        guarded,
        ragged,
        rows_kv,
        None if kept is None else np.stack([*penalties, *[none] * (missing + 1)]),
    )


_Stretch = list[tuple[int, int]]
_Keys = tuple[Sequence[int], int]  # tiles of a chunk, and the position after its last key


def _stretches(g: Geometry, span: Span, first: int, window: Window) -> tuple[_Stretch, _Stretch, _Stretch]:
    """Positions (first, after last) of the keys of a block's chunks, those of the loop without one of no keys."""
    edge, _, loop, diagonal = stretches(g, span, first, window, 0)
    return edge, [keys for keys in loop if keys[1] > 0], diagonal


def _blocks(g: Geometry, spans: Sequence[Span], window: Window) -> Iterator[tuple[int, int, _Stretch]]:
    """Number of its sequence, first row and loop of each block."""
    for number, span in enumerate(spans):
        for first in range(0, span.len_q, g.q_tiles * PARTITIONS):
            yield number, first, _stretches(g, span, first, window)[1]


def _hides(g: Geometry, span: Span, first: int, window: Window, begin: int, end: int) -> bool:
    """Whether a row of a block that sees any keys does not see those at the positions begin..end."""
    lo, hi = visible_keys(span, first + np.arange(g.q_tiles * PARTITIONS), window)
    return bool(((lo < hi) & ((lo > begin) | (hi < end))).any())


def _loop_is_masked(g: Geometry, spans: Sequence[Span], window: Window, anywhere: bool) -> bool:
    """Whether a chunk of the loop has keys that a row does not see, or `anywhere` is asked for and there is one."""
    for b, first, loop in _blocks(g, spans, window):
        if len(loop) > 0:
            short = any(stop < base + g.keys for base, stop in loop)
            if anywhere or short or _hides(g, spans[b], first, window, loop[0][0], loop[-1][1]):
                return True
    return False


def _gathers(g: Geometry, spans: Sequence[Span], window: Window, kept: Sequence[Array]) -> bool:
    """Whether gathering makes fewer chunks, in loops whose keys are all seen by all rows."""
    if g.planes > 1:
        return False  # what always stays is found by the order of tiles
    fewer = False
    for b, first, loop in _blocks(g, spans, window):
        # To the end of the last tile, which may be behind the last key.
        if len(loop) > 0 and _hides(g, spans[b], first, window, loop[0][0], tiles_of(loop[-1][1]) * PARTITIONS):
            return False
        for unit in range(len(kept[b]) // g.heads):
            wanted = _wanted(g, kept[b], unit, first)
            fewer |= len(_chosen(g, loop, wanted, True)) < len(_chosen(g, loop, wanted, False))
    return fewer


def _run(g: Geometry, base: int) -> range:
    """Tiles of a chunk that begins at a position."""
    return range(base // PARTITIONS, base // PARTITIONS + g.kv_tiles)


def _of_block(g: Geometry, kept: Array, unit: int, first: int) -> Array:
    """[heads, row tiles, tiles of keys] of a block."""
    row_tile = first // PARTITIONS
    return kept[unit * g.heads : (unit + 1) * g.heads, row_tile : row_tile + g.q_tiles]


def _wanted(g: Geometry, kept: Array, unit: int, first: int) -> Array:
    """Tiles of keys that a block has to do with, bool [tiles of keys]."""
    return np.asarray(_of_block(g, kept, unit, first).any(axis=(0, 1)))


def _chosen(g: Geometry, loop: _Stretch, wanted: Array | None, gathers: bool) -> list[_Keys]:
    """The chunks of a loop that have a wanted tile; gathered, with none but these as far as they go round."""
    if len(loop) == 0 or wanted is None:
        return [(_run(g, base), stop) for base, stop in loop]
    if not gathers:
        runs = [(_run(g, base), stop) for base, stop in loop]
        return [(run, stop) for run, stop in runs if wanted[run.start : tiles_of(stop)].any()]
    first, end = loop[0][0] // PARTITIONS, tiles_of(loop[-1][1])
    there = [first + int(i) for i in np.flatnonzero(wanted[first:end])]
    others = (i for i in count(first) if i >= end or not wanted[i])
    tiles = list(chain(there, islice(others, -len(there) % g.kv_tiles)))
    chunks = [tiles[i : i + g.kv_tiles] for i in range(0, len(tiles), g.kv_tiles)]
    return [(chunk, (max(chunk) + 1) * PARTITIONS) for chunk in chunks]


def _penalties(g: Geometry, kept: Array, tiles: Sequence[int], end: int | None) -> Array:
    """[q_tiles * heads * kv_tiles] of a chunk: `kept` of its block's heads and rows, but no tiles from `end` on."""
    penalties = np.zeros((g.q_tiles, g.heads, g.kv_tiles), np.float32)
    for i, tile in enumerate(tiles):
        if end is not None and tile >= end:
            penalties[:, :, i] = -PENALTY
        elif tile < kept.shape[2]:
            penalties[: kept.shape[1], :, i] = np.where(kept[:, :, tile].T, 0.0, -PENALTY)
    return penalties.ravel()


def _chunk(
    g: Geometry, span: Span, n_kv_heads: int, kv_head: int, tiles: Sequence[int], stop: int, gathers: bool
) -> Array:
    """[128, 3 + kv_tiles], or where it `gathers` [128, 3 + 2 * kv_tiles], of a chunk of some tiles."""
    record = chunk_record(g, span, n_kv_heads, kv_head, tiles[0] * PARTITIONS, stop)
    if not gathers:
        return record
    first = np.array(tiles, np.int32) * PARTITIONS
    record[:, RECORD_COLUMNS:] = np.where(first + np.arange(PARTITIONS)[:, None] < span.len_kv, -1, 0)
    rows = (span.kv + first) * n_kv_heads + kv_head
    return np.concatenate([record, np.broadcast_to(rows, (PARTITIONS, g.kv_tiles))], axis=1)


def _block_record(rows: Array, bounds: Sequence[Array]) -> Array:
    """[128, 1 + bounds, q_tiles] of a block's rows, one after the other."""
    columns = [rows.astype(np.int32), *(x.astype(np.float32).view(np.int32) for x in bounds)]
    return np.stack([x.reshape(-1, PARTITIONS).T for x in columns], axis=1)
