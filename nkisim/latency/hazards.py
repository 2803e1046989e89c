"""Who must wait for whom: the last writer and the last readers of every element of a storage.

A write waits for earlier reads and writes of the same bytes, a read for earlier writes. Tiles keep maps
along the partitions and the free dimension, as coarse as all accesses so far allow; HBM storages keep the
accesses themselves and compare their runs of contiguous bytes. Both are exact: strided accesses that
interleave do not meet. Fresh storages have no history, so a new tile in every iteration of a loop does
not serialise it and a tile that is reused does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np

from nkisim.hardware import TRN3
from nkisim.memory import ON_CHIP, StorageInfo
from nkisim.trace import Access, Engine, Record

Array = np.ndarray[Any, np.dtype[Any]]
QUADRANT = TRN3.partition_quadrant  # the same on every generation
NOBODY = -1
NEVER = -np.inf


def touched(record: Record, a: Access) -> Access:
    """What an operand may touch: of an `.indirect` one whole partitions, as the trace does not list its columns."""
    if not is_gathered(record, a):
        return a
    row = a.storage.bytes_per_partition // a.dtype.itemsize
    return replace(a, shape=(a.shape[0], row), strides=(row, 1), offset=a.offset // row * row)


def is_gathered(record: Record, a: Access) -> bool:
    """Whether the operand is an `.indirect` view: columns named by an index tensor."""
    if not a.dynamic or a.rows is not None or a.storage.buffer not in ON_CHIP:
        return False
    return any(r.operand == f"{a.operand} index" and r.n_elements > 1 for r in record.reads)


# ---------------------------------------------------------------------------------------------------
# SBUF and PSUM


class TileHistory:
    """Who used each element of a tile last.

    An engine finishes its instructions in order, so of each engine the last reader stands for all; of
    transfers, which overtake each other, the one that is done last.
    """

    def __init__(self, info: StorageInfo) -> None:
        self._partitions = info.shape[0]
        self._row_bytes = info.bytes_per_partition
        self._nbytes = info.nbytes
        # While every access covers the whole tile these do; maps are made at the first partial one.
        self._writer = NOBODY
        self._readers: dict[Engine, int] = {}
        self._dma_end = NEVER
        self._writers: Array | None = None
        self._reader_maps: dict[Engine, Array] = {}
        self._dma_ends: Array | None = None
        self._unit = info.dtype.itemsize  # bytes that a map's element stands for
        self._by_partition = False  # whether a map's row is a partition, else a quadrant

    def producers(self, access: Access) -> set[int]:
        """Who wrote what a read needs."""
        if not access.n_elements:
            return set()
        if self._writers is None:
            return {self._writer} - {NOBODY}
        parts = self._parts(access)
        return self._users(self._writers, parts)

    def blockers(self, access: Access) -> set[int]:
        """Whose reads and writes a write has to wait for."""
        if not access.n_elements:
            return set()
        if self._writers is None:
            return {self._writer, *self._readers.values()} - {NOBODY}
        parts = self._parts(access)
        return self._users(self._writers, parts).union(*(self._users(m, parts) for m in self._reader_maps.values()))

    def read(self, access: Access, who: int, end: float, engine: Engine) -> None:
        """`who` reads until `end`; later writes wait for it."""
        if self._writers is None and self._covers(access):
            if engine is not Engine.dma or end >= self._dma_end:
                self._readers[engine] = who
            if engine is Engine.dma:
                self._dma_end = max(end, self._dma_end)
            return
        self._make_maps()
        assert self._writers is not None
        for part in self._parts(access):
            if engine not in self._reader_maps:
                self._reader_maps[engine] = np.full(self._writers.shape, NOBODY, np.int64)
            if engine is not Engine.dma:
                self._view(self._reader_maps[engine], part)[...] = who
                continue
            if self._dma_ends is None:
                self._dma_ends = np.full(self._writers.shape, NEVER)
            ends = self._view(self._dma_ends, part)
            later = ends <= end
            self._view(self._reader_maps[engine], part)[later] = who
            ends[later] = end

    def written(self, access: Access, who: int) -> None:
        """`who` writes; later reads wait for it and earlier readers are settled."""
        if self._covers(access):
            self._writer, self._readers, self._dma_end = who, {}, NEVER
            self._writers, self._reader_maps, self._dma_ends = None, {}, None
            return
        self._make_maps()
        for part in self._parts(access):
            assert self._writers is not None
            self._view(self._writers, part)[...] = who
            for readers in self._reader_maps.values():
                self._view(readers, part)[...] = NOBODY
            if self._dma_ends is not None:
                self._view(self._dma_ends, part)[...] = NEVER

    def _covers(self, access: Access) -> bool:
        """Whether the access touches every byte of the tile, each once."""
        if access.rows is not None or access.n_elements * access.dtype.itemsize != self._nbytes:
            return False
        step = 1
        dims = zip(access.shape, access.strides, strict=True)
        for n, stride in sorted((d for d in dims if d[0] != 1), key=lambda d: d[1]):
            if stride != step:
                return False
            step *= n
        return True

    def _make_maps(self) -> None:
        if self._writers is not None:
            return
        rows = self._partitions if self._by_partition else -(-self._partitions // QUADRANT)
        shape = (rows, self._row_bytes // self._unit)
        self._writers = np.full(shape, self._writer, np.int64)
        self._reader_maps = {e: np.full(shape, who, np.int64) for e, who in self._readers.items()}
        self._dma_ends = np.full(shape, self._dma_end) if Engine.dma in self._readers else None
        self._readers, self._dma_end = {}, NEVER

    def _parts(self, access: Access) -> list[Access]:
        """Accesses with one offset each, after the maps were made fine enough for them."""
        row = self._row_bytes // access.dtype.itemsize
        if access.rows is not None:
            parts = [replace(access, shape=(1, *access.shape[1:]), offset=o, rows=None) for o in access.rows]
        elif access.shape[0] > 1 and access.strides[0] != row:
            step = access.strides[0]
            starts = [access.offset + i * step for i in range(access.shape[0])]
            parts = [replace(access, shape=(1, *access.shape[1:]), offset=o) for o in starts]
        else:
            parts = [access]
        for part in parts:
            first = part.offset // row
            end = first + part.shape[0]
            if first % QUADRANT or (end % QUADRANT and end != self._partitions):
                self._split_quadrants()
        if access.dtype.itemsize % self._unit:
            self._split_units(gcd(access.dtype.itemsize, self._unit))
        return parts

    def _split_quadrants(self) -> None:
        if not self._by_partition:
            self._change(lambda m: np.repeat(m, QUADRANT, axis=0)[: self._partitions].copy())
            self._by_partition = True

    def _split_units(self, unit: int) -> None:
        finer = self._unit // unit
        self._change(lambda m: np.repeat(m, finer, axis=1))
        self._unit = unit

    def _change(self, f: Any) -> None:
        assert self._writers is not None
        self._writers = f(self._writers)
        self._reader_maps = {e: f(m) for e, m in self._reader_maps.items()}
        self._dma_ends = None if self._dma_ends is None else f(self._dma_ends)

    def _users(self, users: Array, parts: list[Access]) -> set[int]:
        """Everybody whom a map names under an access."""
        found: set[int] = set()
        for part in parts:
            flat = self._view(users, part).ravel()
            if flat.size and (flat == flat[0]).all():
                found.add(int(flat[0]))
            else:
                found.update(np.unique(flat).tolist())
        return found - {NOBODY}

    def _view(self, users: Array, part: Access) -> Array:
        """The part of a map under an access."""
        size, row = part.dtype.itemsize, self._row_bytes // part.dtype.itemsize
        k = size // self._unit
        first, column = divmod(part.offset, row)
        rows = part.shape[0]
        if not self._by_partition:
            first, rows = first // QUADRANT, -(-rows // QUADRANT)
        item = users.itemsize
        shape: tuple[int, ...] = (rows, *part.shape[1:])
        strides: tuple[int, ...] = (users.strides[0], *(s * k * item for s in part.strides[1:]))
        if k > 1:
            shape, strides = (*shape, k), (*strides, item)
        return np.ndarray(shape, users.dtype, users, first * users.strides[0] + column * k * item, strides)


# ---------------------------------------------------------------------------------------------------
# HBM


@dataclass
class _Use:
    """One access to an HBM storage."""

    access: Access
    who: int
    writes: bool

    @cached_property
    def runs(self) -> tuple[Array, int]:
        """Ascending first bytes of the runs of contiguous bytes touched, and their length."""
        size, starts, dims = self.access.dtype.itemsize, np.array(self.access.rows or (self.access.offset,)), []
        if self.access.rows == ():
            return np.zeros(0, np.int64), size
        first = 0 if self.access.rows is None else 1
        for n, stride in zip(self.access.shape[first:], self.access.strides[first:], strict=True):
            if n == 0:
                return np.zeros(0, np.int64), size
            if n > 1 and stride:
                starts = starts + min(0, stride * (n - 1))
                dims.append((abs(stride), n))
        run = 1
        for stride, n in sorted(dims):
            if stride <= run:
                run += stride * (n - 1)
            else:
                starts = (starts[:, np.newaxis] + np.arange(n) * stride).ravel()
        return np.unique(starts).astype(np.int64) * size, run * size

    @cached_property
    def span(self) -> tuple[int, int]:
        """First byte and the one after the last."""
        starts, length = self.runs
        return (int(starts[0]), int(starts[-1]) + length) if starts.size else (0, 0)

    def meets(self, other: _Use) -> bool:
        """Whether both touch a byte."""
        (low, high), (other_low, other_high) = self.span, other.span
        if not (low < other_high and other_low < high):
            return False
        (starts, length), (few, short) = self.runs, other.runs
        if few.size > starts.size:
            (starts, length), (few, short) = (few, short), (starts, length)
        i = np.searchsorted(starts, few - length, side="right")
        inside = i < starts.size
        return bool((starts[np.minimum(i, starts.size - 1)] < few + short)[inside].any())

    def covers(self, other: _Use) -> bool:
        """Whether it touches every byte that `other` does (seen for dense accesses and equal ones only)."""
        (starts, length), (low, high) = self.runs, other.span
        if starts.size == 1:
            return int(starts[0]) <= low and high <= int(starts[0]) + length
        return length == other.runs[1] and np.array_equal(starts, other.runs[0])


class HbmHistory:
    """The accesses to an HBM storage that no later write has covered."""

    def __init__(self) -> None:
        self._uses: list[_Use] = []

    def producers(self, access: Access) -> set[int]:
        """Who wrote what a read needs."""
        mine = _Use(access, NOBODY, False)
        return {use.who for use in self._uses if use.writes and use.meets(mine)}

    def blockers(self, access: Access) -> set[int]:
        """Whose reads and writes a write has to wait for."""
        mine = _Use(access, NOBODY, True)
        return {use.who for use in self._uses if use.meets(mine)}

    def read(self, access: Access, who: int, _end: float, _engine: Engine) -> None:
        """`who` reads; later writes wait for it."""
        self._uses.append(_Use(access, who, False))

    def written(self, access: Access, who: int) -> None:
        """`who` writes; later reads wait for it and earlier readers are settled."""
        mine = _Use(access, who, True)
        self._uses = [use for use in self._uses if not mine.covers(use)]
        self._uses.append(mine)


History = TileHistory | HbmHistory


def history(info: StorageInfo) -> History:
    """An empty history of a storage."""
    return TileHistory(info) if info.buffer in ON_CHIP else HbmHistory()
