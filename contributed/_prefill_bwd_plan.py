"""Prefill, backward: which rows and keys each block and chunk of a launch has, as tables that the kernel reads.

Blocks and chunks are as in `_prefill_plan.py`, of other sizes, on one core and without splits: blocks add to the same
dK and dV in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS
from contributed._prefill_bwd_state import RECORD_COLUMNS
from contributed._prefill_plan import Span, Sparsity, Window, visible_keys
from contributed._prefill_skip import PENALTY

Array = np.ndarray[Any, np.dtype[Any]]

MOST_TILES = 64  # row tiles of a block, all heads together
BANK_FLOATS = 512  # of PSUM: the scores of a chunk, or its dK
MOST_BYTES = 150 * 1024  # of a block's rows, per partition; fewer are left by
CHUNK_BYTES = 3 * 1024  # for each byte of an element: keys and steps
SELECTION_BYTES = 32 * 1024  # with N:M selection


@dataclass(frozen=True)
class Geometry:
    """Sizes of a launch; see `_prefill_bwd_state.Sizes`."""

    heads: int
    q_tiles: int
    kv_tiles: int
    overhang: int
    planes: int = 1
    recent: int = 0

    @property
    def keys(self) -> int:
        """Keys of a chunk."""
        return self.kv_tiles * PARTITIONS

    @property
    def n_diagonal(self) -> int:
        """Chunks of a block that the diagonal crosses."""
        return -(-(self.q_tiles - 1 + self.overhang) // self.kv_tiles) if self.overhang else 0

    def numbers(self) -> Array:
        """Numbers of a chunk's keys as they lie in SBUF, [128, kv_tiles]."""
        in_tile = np.arange(PARTITIONS).reshape(-1, self.planes).T.ravel()
        return in_tile[:, None] + PARTITIONS * np.arange(self.kv_tiles)


@dataclass(frozen=True)
class Plan:
    """Tables of a launch.

    Args:
        geometry: sizes.
        blocks: int32 [n_blocks + 2, 128, 3, q_tiles]: rows of q in units of a block's heads, -1 for none; first key
            that a row sees, and the one after its last (float32 bits). With N:M selection 5 in place of 3: also the
            first key that a row always keeps, and the one after its last.
        bounds: int32 [n_blocks, 4]: first chunk of the loop, and the one after its last, which begins the diagonal;
            1 if the block has all its rows, else 0; the same of the block after it.
        chunks: int32 [n_chunks + 2, 128, 3 + kv_tiles]: the first key's row in units of KV heads; position of that
            key, and of the one after the last (float32 bits); for each tile, -1 where a partition has a key, else 0.
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
    masked: bool
    plain: bool
    guarded: bool
    ragged: bool
    rows_kv: int
    penalties: Array | None


def choose_geometry(
    spans: Sequence[Span], *, group: int, d: int, itemsize: int, causal: bool, sparsity: Sparsity | None = None
) -> Geometry:
    """Blocks as large as their rows allow: what a block costs beside its steps is shared by more of them."""
    most_bytes = MOST_BYTES - itemsize * CHUNK_BYTES - (SELECTION_BYTES if sparsity is not None else 0)
    # q, do and o of the next block, q and do of this one, both ways round, and dQ.
    most = max(1, min(MOST_TILES, most_bytes // ((7 * itemsize + 4) * d)))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    # A power of two: the chunks before a block are then whole ones where a sequence begins with its first query.
    q_tiles = 1 << ((most // heads).bit_length() - 1)
    q_tiles = max(1, min(q_tiles, _tiles(max((s.len_q for s in spans), default=1))))
    kv_tiles = min(BANK_FLOATS // PARTITIONS, BANK_FLOATS // d)
    kv_tiles = max(1, min(kv_tiles, _tiles(max((s.len_kv for s in spans), default=1))))
    before = [s.len_kv - s.len_q for s in spans if s.len_q > 0 and s.len_kv > 0]
    aligned = all(n >= 0 and n % PARTITIONS == 0 for n in before)
    overhang = (1 if aligned else 2) if causal else 0
    if sparsity is None:
        return Geometry(heads, q_tiles, kv_tiles, overhang)
    return Geometry(heads, q_tiles, kv_tiles, overhang, sparsity.m, sparsity.recent)


class _Block(NamedTuple):
    record: Array
    loop: list[Array]
    diagonal: list[Array]
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
    masked, guarded, rows_kv = False, False, g.keys
    # N:M leaves a single query alone: it always keeps what it sees, wherever that is.
    singles = g.planes > 1 and any(s.len_q == 1 for s in spans)
    penalties: list[Array] = []
    for number_of_span, span in enumerate(spans):
        for first in range(0, span.len_q, block_rows):
            number = first + np.arange(block_rows)
            lo, hi = visible_keys(span, number, window)
            loop, diagonal = _stretches(g, span, first, lo, hi)
            here = lo < hi
            for base, stop in loop:
                masked |= bool((here & ((lo > base) | (hi < base + g.keys))).any()) or stop < base + g.keys
            # Tiles with keys that always stay are counted from the diagonal; these may be in any of a chunk.
            anywhere = singles or (g.recent > 0 and not g.overhang)
            masked |= anywhere and len(loop) > 0
            bounds_of_rows = [lo, hi]
            if g.planes > 1:
                end = np.where(here, number + span.len_kv - span.len_q + 1, 0)
                bounds_of_rows += [np.maximum(0, end - (span.len_kv if span.len_q == 1 else g.recent)), end]
            ends = [base + g.keys for base, _ in loop + diagonal]
            rows_kv = max([rows_kv, *(span.kv + end for end in ends)])
            guarded |= max(ends, default=0) > span.len_kv
            rows = np.where(number < span.len_q, (span.q + number) * units, -1)
            for unit in range(units):
                record = _block_record(np.where(rows < 0, -1, rows + unit), bounds_of_rows)
                parts = [
                    [_chunk_record(g, span, n_kv_heads, unit // per_kv, *keys) for keys in part]
                    for part in (loop, diagonal)
                ]
                blocks.append(_Block(record, parts[0], parts[1], bool((rows >= 0).all())))
                if kept is not None:
                    of_heads = kept[number_of_span][unit * g.heads : (unit + 1) * g.heads, first // PARTITIONS :]
                    penalties += [_penalties(g, of_heads, base // PARTITIONS) for base, _ in loop + diagonal]
    ragged = not all(block.whole for block in blocks)
    bounds: list[tuple[int, int, bool, bool]] = []
    chunks: list[Array] = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        whole_after = after is not None and after.whole
        bounds.append((len(chunks), len(chunks) + len(block.loop), block.whole, whole_after))
        chunks.extend([*block.loop, *block.diagonal])
    records = [block.record for block in blocks]
    # Loads run ahead of the work; those after the last find no rows, or the first ones.
    last = np.full_like(records[0], -1 if ragged else 0)
    nothing = np.zeros((PARTITIONS, RECORD_COLUMNS + g.kv_tiles), np.int32)
    return Plan(
        g,
        np.stack([*records, last, last]),
        np.array(bounds, np.int32),
        np.stack([*chunks, nothing, nothing]),
        masked,
        window.left is None and all(s.len_kv >= s.len_q for s in spans if s.len_q > 0),
        guarded,
        ragged,
        rows_kv,
        None if kept is None else np.stack([*penalties, np.zeros(g.q_tiles * g.heads * g.kv_tiles, np.float32)]),
    )


def _stretches(
    g: Geometry, span: Span, first: int, lo: Array, hi: Array
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Positions (first, after last) of the keys of a block's chunks: those of the loop, and those on the diagonal."""
    seen = lo < hi
    start = int(lo[seen].min()) // PARTITIONS * PARTITIONS if seen.any() else 0
    stop = int(hi[seen].max()) if seen.any() else 0
    begin = max(0, first + span.len_kv - span.len_q) // PARTITIONS * PARTITIONS if g.overhang else stop
    loop = [(base, min(base + g.keys, begin)) for base in range(start, begin, g.keys)]
    diagonal = [(begin + i * g.keys, max(begin + i * g.keys, stop)) for i in range(g.n_diagonal)]
    return loop, diagonal


def _penalties(g: Geometry, kept: Array, first: int) -> Array:
    """[q_tiles * heads * kv_tiles] of a chunk: `kept` of its block's heads and rows, its tiles from `first` on."""
    penalties = np.zeros((g.q_tiles, g.heads, g.kv_tiles), np.float32)
    tiles = kept[:, : g.q_tiles, first : first + g.kv_tiles].swapaxes(0, 1)
    penalties[: tiles.shape[0], :, : tiles.shape[2]] = np.where(tiles, 0.0, -PENALTY)
    return penalties.ravel()


def _block_record(rows: Array, bounds: Sequence[Array]) -> Array:
    """[128, 1 + bounds, q_tiles] of a block's rows, one after the other."""
    columns = [rows.astype(np.int32), *(x.astype(np.float32).view(np.int32) for x in bounds)]
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
