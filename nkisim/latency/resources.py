"""What instructions take turns at: the room in a memory, the DMA engines, and paths that two engines share."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from nkisim.hardware import GEN3, Hardware
from nkisim.memory import MemoryRegion, StorageInfo
from nkisim.trace import Access, Engine, Record

# No byte moves in so little time, and sums of times up to seconds are more exact.
ROUNDING_NS = 1e-6


class Calendar:
    """When something is taken. Instructions come in program order but are served as they are ready.

    One that cannot be interrupted looks for a gap of its length and takes it; one that can, fills what time is free.
    Times taken without a gap in between are kept as one, with the owner that ends it.
    """

    def __init__(self) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._owners: list[int] = []

    def gap(self, earliest: float, duration: float) -> tuple[float, int | None]:
        """Begin of the first gap from `earliest` on, and whoever had to be waited for."""
        i = bisect_right(self._ends, earliest)
        begin, holder = earliest, None
        while i < len(self._begins) and self._begins[i] < begin + duration:
            begin, holder = self._ends[i], self._owners[i]
            i += 1
        return begin, holder

    def fill(self, earliest: float, duration: float, owner: int) -> tuple[float, float, int | None]:
        """Take the first free time from `earliest` on, in as many pieces as it needs.

        Between the first and the last piece no time stays free. Differences of times that only rounding makes are no
        time: neither a gap to be taken nor a rest that is left for the next one.

        Returns begin of the first piece, end of the last one, and whoever had to be waited for before the first.
        Without a duration nothing is taken and nobody waited for.
        """
        if duration <= ROUNDING_NS:
            return earliest, earliest, None
        first = bisect_right(self._ends, earliest)
        begin, holder = earliest, None
        while first < len(self._begins) and self._begins[first] <= begin + ROUNDING_NS:
            begin, holder = self._ends[first], self._owners[first]
            first += 1
        at, left, i = begin, duration, first
        while i < len(self._begins) and self._begins[i] - at < left - ROUNDING_NS:
            left -= self._begins[i] - at
            at = self._ends[i]
            i += 1
        end = at + left
        if i < len(self._begins) and self._begins[i] <= end + ROUNDING_NS:
            end = self._begins[i]
        # All from begin to end is taken now, by this owner or by those it gave way to.
        del self._begins[first:i], self._ends[first:i], self._owners[first:i]
        self._mark(begin, end, owner)
        return begin, end, holder

    def take(self, begin: float, duration: float, owner: int) -> None:
        """Mark a gap as taken."""
        self._mark(begin, begin + duration, owner)

    def _mark(self, begin: float, end: float, owner: int) -> None:
        i = bisect_right(self._ends, begin)
        if i and self._ends[i - 1] == begin:
            i -= 1
            self._ends[i], self._owners[i] = end, owner
        else:
            self._begins.insert(i, begin)
            self._ends.insert(i, end)
            self._owners.insert(i, owner)
        if i + 1 < len(self._begins) and self._begins[i + 1] == self._ends[i]:
            self._ends[i], self._owners[i] = self._ends[i + 1], self._owners[i + 1]
            del self._begins[i + 1], self._ends[i + 1], self._owners[i + 1]


class Room:
    """Room in one memory of one core, in bytes per partition.

    A tile takes the place of the tiles that the program used up first, and has to wait for their last users.
    PSUM is given out by banks, which smaller tiles share. Tiles that the kernel placed stand where it says: they
    take their bytes out of what is left for the others, and wait only for placed tiles on the same bytes.
    """

    def __init__(self, buffer: MemoryRegion, hw: Hardware, capacity: int, storages: list[StorageInfo]) -> None:
        self._bank = hw.psum_bank_bytes if buffer is MemoryRegion.psum else 0
        placed = [s for s in storages if s.buffer is buffer and s.address is not None]
        self._free = capacity - _union([(s.address[1], s.bytes_per_partition) for s in placed if s.address])
        self._released: deque[tuple[int, set[int]]] = deque()  # bytes, last users
        self._left: list[tuple[StorageInfo, set[int]]] = []  # placed tiles no longer used

    def take(self, info: StorageInfo) -> set[int]:
        """Give a tile its place; the slots to wait for."""
        if info.address is not None:
            before = [(other, users) for other, users in self._left if _overlap(info, other)]
            # Who comes after this tile need not look behind it.
            self._left = [entry for entry in self._left if not _same_place(info, entry[0])]
            return set().union(*(users for _, users in before))
        need = self._bytes(info)
        found: set[int] = set()
        while self._free < need and self._released:
            size, users = self._released.popleft()
            self._free += size
            found |= users
        self._free -= need
        return found

    def give(self, info: StorageInfo, users: set[int]) -> None:
        """A tile is used up; `users` are who used it last."""
        if info.address is not None:
            self._left.append((info, users))
        else:
            self._released.append((self._bytes(info), users))

    def _bytes(self, info: StorageInfo) -> int:
        size = info.bytes_per_partition
        if not self._bank:
            return size
        if size >= self._bank:
            return -(-size // self._bank) * self._bank
        return self._bank // (self._bank // max(size, 1))


def _union(ranges: list[tuple[int, int]]) -> int:
    """Bytes that ranges (start, size) cover together."""
    covered, reached = 0, 0
    for start, size in sorted(ranges):
        covered += max(0, start + size - max(start, reached))
        reached = max(reached, start + size)
    return covered


def _overlap(a: StorageInfo, b: StorageInfo) -> bool:
    assert a.address is not None
    assert b.address is not None
    partitions = a.address[0] < b.address[0] + b.partitions and b.address[0] < a.address[0] + a.partitions
    low, high = a.address[1], a.address[1] + a.bytes_per_partition
    return partitions and low < b.address[1] + b.bytes_per_partition and b.address[1] < high


def _same_place(a: StorageInfo, b: StorageInfo) -> bool:
    return (a.address, a.partitions, a.bytes_per_partition) == (b.address, b.partitions, b.bytes_per_partition)


def shared_paths(record: Record, hw: Hardware) -> set[tuple[object, ...]]:
    """Paths to memory that the record's engine shares with another one, both of which use them by turns.

    On NeuronCore-v2 the Vector and GpSimd Engines share SBUF, the Vector and Scalar Engines PSUM; later the
    latter two share each PSUM bank. Of tiles that the kernel did not place it is not known which banks they
    share, so there the tile itself stands for its bank. The bus that the Vector Engine's performance modes
    borrow from GpSimd on newer generations is left out: no document says what that costs.
    """
    found: set[tuple[object, ...]] = set()
    operands = (*record.writes, *record.reads)
    if hw.generation < GEN3:
        if record.engine in (Engine.vector, Engine.gpsimd):
            found.update(("sbuf",) for a in operands if a.storage.buffer is MemoryRegion.sbuf)
        if record.engine in (Engine.vector, Engine.scalar):
            found.update(("psum",) for a in operands if a.storage.buffer is MemoryRegion.psum)
    elif record.engine in (Engine.vector, Engine.scalar):
        for a in operands:
            if a.storage.buffer is MemoryRegion.psum:
                found.update(_banks(a, hw.psum_bank_bytes))
    return found


def _banks(a: Access, bank: int) -> set[tuple[object, ...]]:
    size = a.dtype.itemsize
    free = list(zip(a.shape[1:], a.strides[1:], strict=True))
    column = a.offset % max(1, a.storage.bytes_per_partition // size)
    low = (column + sum(min(0, s * (n - 1)) for n, s in free)) * size
    high = (column + sum(max(0, s * (n - 1)) for n, s in free) + 1) * size - 1
    start, owner = (0, a.storage.id) if a.storage.address is None else (a.storage.address[1], None)
    return {("bank", owner, k) for k in range((start + low) // bank, (start + high) // bank + 1)}
