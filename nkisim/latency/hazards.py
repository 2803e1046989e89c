"""Who must wait for whom: the last writer and the last reader of every element of a storage.

On-chip storages are tracked element by element along the free dimension and in quadrants of 32
partitions, which is as fine as start partitions go; HBM by address ranges. A write waits for earlier
reads and writes of the same elements, a read for earlier writes. Fresh storages have no history, so a
new tile in every iteration of a loop does not serialise it and a tile that is reused does.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nkisim.memory import ON_CHIP, StorageInfo
from nkisim.trace import Access

Array = np.ndarray[Any, np.dtype[Any]]
QUADRANT = 32
NOBODY = -1


class History:
    """Last writer and last reader of one storage, as positions in the schedule."""

    def __init__(self, info: StorageInfo) -> None:
        self._info = info
        self._on_chip = info.buffer in ON_CHIP
        self._itemsize = info.dtype.itemsize
        self._row = prod(info.shape[1:]) if self._on_chip else 0
        # While every access covers the whole storage two numbers do; maps are made at the first partial one.
        self._writer = NOBODY
        self._readers: dict[int, float] = {}  # with the time each is done
        self._writers_map: Array | None = None
        self._readers_map: Array | None = None  # per element the reader that is done last
        self._read_ends: Array | None = None
        self._ranges: list[tuple[int, int, int, bool]] = []  # HBM: first byte, last byte, who, writes

    def producers(self, access: Access) -> set[int]:
        """Who wrote what a read needs."""
        if not self._on_chip:
            low, high = _byte_range(access)
            return {who for a, b, who, writes in self._ranges if writes and a <= high and low <= b}
        if self._writers_map is None:
            return {self._writer} - {NOBODY}
        return _distinct(self._view(self._writers_map, access))

    def blockers(self, access: Access) -> set[int]:
        """Whose reads and writes a write has to wait for."""
        if not self._on_chip:
            low, high = _byte_range(access)
            return {who for a, b, who, _ in self._ranges if a <= high and low <= b}
        if self._writers_map is None or self._readers_map is None:
            return {self._writer, *self._readers} - {NOBODY}
        return _distinct(self._view(self._writers_map, access)) | _distinct(self._view(self._readers_map, access))

    def read(self, access: Access, who: int, end: float) -> None:
        """`who` reads until `end`; later writes wait for it."""
        if not self._on_chip:
            self._ranges.append((*_byte_range(access), who, False))
        elif self._writers_map is None and self._covers(access):
            self._readers[who] = end
        else:
            self._spread()
            assert self._readers_map is not None
            assert self._read_ends is not None
            ends = self._view(self._read_ends, access)
            later = ends < end
            ends[later] = end
            self._view(self._readers_map, access)[later] = who

    def written(self, access: Access, who: int) -> None:
        """`who` writes; later reads wait for it and earlier readers are settled."""
        if not self._on_chip:
            low, high = _byte_range(access)
            self._ranges = [r for r in self._ranges if not (low <= r[0] and r[1] <= high)]
            self._ranges.append((low, high, who, True))
        elif self._covers(access):
            self._writer, self._readers = who, {}
            self._writers_map = self._readers_map = self._read_ends = None
        else:
            self._spread()
            assert self._writers_map is not None
            assert self._readers_map is not None
            self._view(self._writers_map, access)[...] = who
            assert self._read_ends is not None
            self._view(self._readers_map, access)[...] = NOBODY
            self._view(self._read_ends, access)[...] = -np.inf

    def _covers(self, access: Access) -> bool:
        """Whether the access touches every element of the storage."""
        return (
            access.rows is None
            and access.n_elements * access.dtype.itemsize == self._info.nbytes
            and 0 not in access.strides[: len(access.shape)]
        )

    def _spread(self) -> None:
        if self._writers_map is None:
            quadrants = -(-self._info.shape[0] // QUADRANT)
            self._writers_map = np.full((quadrants, self._row), self._writer, np.int64)
            last = max(self._readers, key=self._readers.__getitem__, default=NOBODY)
            self._readers_map = np.full((quadrants, self._row), last, np.int64)
            self._read_ends = np.full((quadrants, self._row), self._readers.get(last, -np.inf))

    def _view(self, elements: Array, access: Access) -> Array:
        """The part of a map under an access."""
        size = access.dtype.itemsize
        row = self._row * self._itemsize // size
        first, column = divmod(access.offset, row)
        q0, q1 = first // QUADRANT, (first + access.shape[0] - 1) // QUADRANT + 1
        free, steps = access.shape[1:], access.strides[1:]
        if size == self._itemsize:
            return np.ndarray(
                (q1 - q0, *free),
                elements.dtype,
                elements,
                (q0 * self._row + column) * 8,
                (self._row * 8, *[s * 8 for s in steps]),
            )
        low = column + sum(min(0, s * (n - 1)) for s, n in zip(steps, free, strict=True))
        high = column + sum(max(0, s * (n - 1)) for s, n in zip(steps, free, strict=True))
        return elements[q0:q1, low * size // self._itemsize : (high + 1) * size // self._itemsize + 1]


def _distinct(map_view: Array) -> set[int]:
    flat = map_view.ravel()
    first = int(flat[0])
    if (flat == first).all():
        return {first} - {NOBODY}
    return set(np.unique(flat).tolist()) - {NOBODY}


def _byte_range(access: Access) -> tuple[int, int]:
    """First and last byte an access touches."""
    size = access.dtype.itemsize
    inner = 1 if access.rows is not None else 0
    low = sum(min(0, s * (n - 1)) for s, n in zip(access.strides[inner:], access.shape[inner:], strict=True))
    high = sum(max(0, s * (n - 1)) for s, n in zip(access.strides[inner:], access.shape[inner:], strict=True))
    starts = access.rows if access.rows is not None else (access.offset,)
    if not starts:
        return (0, -1)
    return (min(starts) + low) * size, (max(starts) + high + 1) * size - 1
