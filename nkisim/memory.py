"""HBM, SBUF and PSUM: storages, which of their elements are defined, and what is alive when.

A storage is one allocation. Its bytes are addressed linearly, row-major over its shape, in every
memory: on chip the rows are the partitions. Reading an element nobody wrote is an error, so each
storage keeps a map of the written units, until everything is written and the map is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from math import gcd, prod
from typing import Any

import numpy as np

from nkisim.dtypes import Array, DType
from nkisim.errors import NkiError, Site
from nkisim.hardware import Hardware, source_of


class MemoryRegion(Enum):
    """Where a tensor lives; the members are `nl.sbuf`, `nl.psum`, `nl.private_hbm` and `nl.shared_hbm`."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    # Members are singletons; identity hashing keeps the membership tests of every operand cheap.
    __hash__ = object.__hash__


SBUF = (MemoryRegion.sbuf,)
PSUM = (MemoryRegion.psum,)
ON_CHIP = (MemoryRegion.sbuf, MemoryRegion.psum)
HBM = (MemoryRegion.private_hbm, MemoryRegion.shared_hbm)
DMA_ABLE = (MemoryRegion.sbuf, *HBM)


@dataclass(eq=False)
class StorageInfo:
    """What is known of a storage without its data: kept by traces and by the capacity check.

    `first_use` and `last_use` are positions in the core's program; -1 means never used.
    """

    id: int
    name: str
    buffer: MemoryRegion
    shape: tuple[int, ...]
    dtype: DType
    site: Site
    address: tuple[int, int] | None = None
    first_use: int = -1
    last_use: int = -1
    is_argument: bool = False

    @property
    def bytes_per_partition(self) -> int:
        """Bytes in each partition (on-chip storages)."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def partitions(self) -> int:
        """Partitions taken (on-chip storages)."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return prod(self.shape) * self.dtype.itemsize


class Storage:
    """The bytes of one allocation and the map of those that were written.

    Args:
        info: what the storage is.
        data: its bytes, one-dimensional uint8; `None` allocates them, undefined.
        precise: whether elements are stored in their own dtype, or every float as float32.
    """

    __slots__ = ("_unit", "_written", "data", "info", "matmul_written", "on_chip", "precise", "was_written", "writer")

    def __init__(self, info: StorageInfo, precise: bool, data: Array | None = None) -> None:
        self.info = info
        self.precise = precise
        carrier = info.dtype.carrier(precise)
        self.on_chip = info.buffer in ON_CHIP
        self.was_written = False
        self._unit = carrier.itemsize
        if data is None:
            n = prod(info.shape)
            self.data: Array = np.empty(n * carrier.itemsize, np.uint8)
            self._written: Array | None = np.zeros(n, np.bool_)
        else:
            self.data = data
            self._written = None
        # PSUM elements whose last write was a matmul (see isa/tensor_engine.py).
        self.matmul_written: Array | None = None
        # LNC-2 shared HBM: rank + 1 of the core that wrote an element since the last barrier, else 0.
        self.writer: Array | None = None

    @property
    def nbytes(self) -> int:
        """Size of the stored data, which in all-float32 mode exceeds the nominal size."""
        return int(self.data.size)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """A NumPy view; `strides` and `offset` count elements of `dtype`."""
        size = dtype.itemsize
        return np.ndarray(shape, dtype, self.data, offset * size, tuple([s * size for s in strides]))

    def is_defined(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> bool:
        """Whether every byte of the view was written."""
        if self._written is None:
            return True
        if bool(self._map(itemsize, shape, strides, offset).all()):
            if self._written.all():
                self._written = None
            return True
        return False

    def defined_map(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """Per element of the view, whether all of it was written."""
        if self._written is None:
            return np.ones(shape, np.bool_)
        seen = self._map(itemsize, shape, strides, offset)
        return seen.all(axis=-1) if seen.ndim > len(shape) else seen.copy()

    def mark_written(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        """Remember that every byte of the view is defined from now on."""
        self.was_written = True
        if self._written is None:
            return
        if offset == 0 and prod(shape) * itemsize == self.data.size and is_row_major(shape, strides):
            self._written = None
        else:
            self._map(itemsize, shape, strides, offset)[...] = True

    def mark_rows(self, itemsize: int, starts: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """`mark_written` for one view of `shape` at each of `starts` (an indirect write)."""
        self.was_written = True
        if self._written is not None:
            for start in starts:
                self._map(itemsize, shape, strides, int(start))[...] = True

    def forget(self) -> None:
        """Make every element undefined again."""
        self._unit = self.info.dtype.carrier(self.precise).itemsize
        self._written = np.zeros(self.data.size // self._unit, np.bool_)

    def _map(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """The written-map under a view; refined first when the view's elements are narrower than its units."""
        assert self._written is not None
        if itemsize % self._unit:
            unit = gcd(itemsize, self._unit)
            self._written = np.repeat(self._written, self._unit // unit)
            self._unit = unit
        k = itemsize // self._unit
        if k == 1:
            return np.ndarray(shape, np.bool_, self._written, offset, strides)
        return np.ndarray((*shape, k), np.bool_, self._written, offset * k, (*[s * k for s in strides], 1))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the view walks addresses one by one in row-major order (size-1 dims do not count)."""
    step = 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


# ---------------------------------------------------------------------------------------------------
# Capacity


@dataclass(frozen=True)
class Peak:
    """Most bytes (SBUF) or banks (PSUM) per partition alive at once, and the storages alive then."""

    amount: int
    position: int
    alive: tuple[StorageInfo, ...]


@dataclass
class MemoryUse:
    """Peak use of a core's SBUF (bytes per partition) and PSUM (banks)."""

    sbuf: Peak = field(default_factory=lambda: Peak(0, -1, ()))
    psum: Peak = field(default_factory=lambda: Peak(0, -1, ()))


def measure(storages: Iterable[StorageInfo], hardware: Hardware) -> MemoryUse:
    """Peak memory use; a storage is alive from its first to its last use, in program order.

    PSUM storages of up to one bank share a bank if their bytes fit; a larger one takes whole banks.
    """
    used = [s for s in storages if s.first_use >= 0]
    sbuf = [s for s in used if s.buffer is MemoryRegion.sbuf]
    psum = [s for s in used if s.buffer is MemoryRegion.psum]
    return MemoryUse(_sbuf_peak(sbuf), _psum_peak(psum, hardware))


def check_capacity(storages: Iterable[StorageInfo], hardware: Hardware) -> MemoryUse:
    """`measure`, and raise `NkiError` where SBUF, PSUM or two placed storages do not fit.

    The error stands at the allocation whose first use goes over the limit.
    """
    storages = list(storages)
    use = measure(storages, hardware)
    limit = hardware.sbuf_usable_partition_bytes
    if use.sbuf.amount > limit:
        _refuse_peak(use.sbuf, "SBUF capacity", "bytes per partition", limit, "sbuf_usable_partition_bytes", hardware)
    if use.psum.amount > hardware.psum_banks:
        _refuse_peak(use.psum, "PSUM capacity", "banks", hardware.psum_banks, "psum_banks", hardware)
    _check_placed(storages)
    return use


def _sbuf_peak(storages: list[StorageInfo]) -> Peak:
    if not storages:
        return Peak(0, -1, ())
    first = np.array([s.first_use for s in storages])
    last = np.array([s.last_use for s in storages])
    size = np.array([s.bytes_per_partition for s in storages])
    delta = np.zeros(int(last.max()) + 2, np.int64)
    np.add.at(delta, first, size)
    np.subtract.at(delta, last + 1, size)
    total = np.cumsum(delta)
    position = int(total.argmax())
    alive = tuple(s for s in storages if s.first_use <= position <= s.last_use)
    return Peak(int(total[position]), position, alive)


def _psum_peak(storages: list[StorageInfo], hardware: Hardware) -> Peak:
    bank = hardware.psum_bank_bytes
    peak = Peak(0, -1, ())
    alive: list[StorageInfo] = []
    for s in sorted(storages, key=lambda s: s.first_use):
        alive = [a for a in alive if a.last_use >= s.first_use]
        alive.append(s)
        banks = sum(-(-a.bytes_per_partition // bank) for a in alive if a.bytes_per_partition >= bank)
        room: list[int] = []
        for size in sorted((a.bytes_per_partition for a in alive if a.bytes_per_partition < bank), reverse=True):
            for i, free in enumerate(room):
                if size <= free:
                    room[i] -= size
                    break
            else:
                room.append(bank - size)
        if banks + len(room) > peak.amount:
            peak = Peak(banks + len(room), s.first_use, tuple(alive))
    return peak


def _refuse_peak(peak: Peak, rule: str, unit: str, limit: int, number: str, hardware: Hardware) -> None:
    last = max(peak.alive, key=lambda s: s.first_use)
    largest = sorted(peak.alive, key=lambda s: -s.bytes_per_partition)[:5]
    listing = "; ".join(f"{s.bytes_per_partition} B {s.dtype}{list(s.shape)} from line {s.site.line}" for s in largest)
    raise NkiError(
        "ndarray",
        last.name,
        rule,
        received=f"{peak.amount} {unit} alive at once in {len(peak.alive)} tensors (largest: {listing})",
        allowed=f"{limit} {unit} on {hardware.target}",
        source=source_of(number),
        site=last.site,
    )


def _check_placed(storages: list[StorageInfo]) -> None:
    placed = [s for s in storages if s.address is not None and s.first_use >= 0]
    placed.sort(key=lambda s: s.first_use)
    for i, a in enumerate(placed):
        for b in placed[i + 1 :]:
            if b.first_use > a.last_use or a.buffer is not b.buffer:
                continue
            assert a.address is not None
            assert b.address is not None
            apart = (
                a.address[0] + a.partitions <= b.address[0]
                or b.address[0] + b.partitions <= a.address[0]
                or a.address[1] + a.bytes_per_partition <= b.address[1]
                or b.address[1] + b.bytes_per_partition <= a.address[1]
            )
            if not apart:
                raise NkiError(
                    "ndarray",
                    "address",
                    "two tensors placed on the same bytes while both are in use",
                    received=f"{b.name} at {b.address} over {a.name} at {a.address} from line {a.site.line}",
                    allowed="addresses that do not overlap, or uses that do not",
                    source="nki.language.ndarray, NKI 0.6",
                    site=b.site,
                )
