"""HBM, SBUF and PSUM: storages, and which of their bytes are defined.

A storage is one allocation. Its bytes are addressed linearly, row-major over its shape, in every
memory: on chip the rows are the partitions. Reading what nobody wrote is an error, so each storage
keeps a map of what was written, until all of it is and the map is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import gcd, prod
from typing import Any

import numpy as np

from nkisim.dtypes import Array, DType
from nkisim.errors import Site
from nkisim.layout import is_row_major


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

    `address` is (partition, byte in the partition) where the kernel placed it, else None. `first_use`
    and `last_use` are positions in the core's program; -1 means never used.
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
    # The dynamic loop whose body declared it, once that trip has ended.
    scope_end: Site | None = None
    # The line of the kernel that led to `site`, where that is in another function.
    caller: Site | None = None

    def __post_init__(self) -> None:
        # What it is to the bodies of loops that did not declare it.
        self.place = (self.id,)

    @property
    def bytes_per_partition(self) -> int:
        """Bytes in each partition (on-chip storages)."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def start_partition(self) -> int:
        """First partition taken: 0 unless the kernel placed it (on-chip storages)."""
        return self.address[0] if self.address is not None else 0

    @property
    def partitions(self) -> int:
        """Number of partitions taken (on-chip storages)."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return prod(self.shape) * self.dtype.itemsize


# Views of one storage that are remembered, so that many addresses in HBM do not fill the host's memory.
_REMEMBERED = 256

# How matmuls see a PSUM element: none wrote it yet; one did, and another instruction since; one wrote it last.
NO_MATMUL, OVERWRITTEN, BY_MATMUL = np.uint8(0), np.uint8(1), np.uint8(2)


class UnitMap:
    """A flag of one byte for each unit of a storage; the unit shrinks to what views of it need.

    Args:
        nbytes: size of the storage.
        unit: bytes that one flag stands for, at first.
        kind: NumPy type of the flags, which are 0 at first.
    """

    __slots__ = ("_flags", "_unit")

    def __init__(self, nbytes: int, unit: int, kind: type[np.generic]) -> None:
        self._unit = unit
        self._flags: Array = np.zeros(nbytes // unit, kind)

    def under(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """The flags of a view's elements, as a view: with one more dimension if an element has several."""
        if itemsize % self._unit:
            unit = gcd(itemsize, self._unit)
            self._flags = np.repeat(self._flags, self._unit // unit)
            self._unit = unit
        k = itemsize // self._unit
        kind = self._flags.dtype
        if k == 1:
            return np.ndarray(shape, kind, self._flags, offset, strides)
        return np.ndarray((*shape, k), kind, self._flags, offset * k, (*[s * k for s in strides], 1))


class Storage:
    """The bytes of one allocation and the map of those that were written.

    Args:
        info: what the storage is.
        data: its bytes, one-dimensional uint8; `None` allocates them, undefined.
        precise: whether elements are stored in their own dtype, or every float as float32.
    """

    __slots__ = (
        "_arrays",
        "_complete",
        "_defined",
        "_written",
        "data",
        "info",
        "matmul_written",
        "precise",
        "row_bytes",
        "users",
        "was_written",
    )

    def __init__(self, info: StorageInfo, precise: bool, data: Array | None = None) -> None:
        self.info = info
        self.precise = precise
        self.was_written = False
        # Most tiles are first written as a whole and need no map.
        self._complete = data is not None
        self._written: UnitMap | None = None
        # Views found to be defined, which they stay, and arrays over the data; loops come back to the same ones.
        self._defined: set[tuple[int, tuple[int, ...], tuple[int, ...], int]] = set()
        self._arrays: dict[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...], int], Array] = {}
        size = prod(info.shape) * info.dtype.carrier(precise).itemsize
        self.data: Array = np.empty(size, np.uint8) if data is None else data
        # On chip, the bytes that one partition holds.
        self.row_bytes: int = self.data.size // info.shape[0]
        # PSUM: NO_MATMUL, OVERWRITTEN or BY_MATMUL per element; made by the first matmul (`psum_state`).
        self.matmul_written: UnitMap | None = None
        # LNC-2 shared HBM: who wrote (bits 0, 1) and read (bits 2, 3) an element since the last barrier.
        self.users: UnitMap | None = None

    @property
    def nbytes(self) -> int:
        """Size of the stored data, which in all-float32 mode exceeds the nominal size."""
        return int(self.data.size)

    def freeze(self) -> None:
        """Refuse writes from now on: what the storage holds is a constant."""
        self.data.flags.writeable = False

    def new_map(self, kind: type[np.generic] = np.uint8) -> UnitMap:
        """A map of this storage, of zeros, with one flag per element."""
        return UnitMap(self.nbytes, self.info.dtype.carrier(self.precise).itemsize, kind)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """A NumPy view; `strides` and `offset` count elements of `dtype`."""
        key = (dtype, shape, strides, offset)
        known = self._arrays.get(key)
        if known is not None:
            return known
        if len(self._arrays) >= _REMEMBERED:
            self._arrays.clear()
        size = dtype.itemsize
        array = np.ndarray(shape, dtype, self.data, offset * size, tuple([s * size for s in strides]))
        self._arrays[key] = array
        return array

    def is_defined(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> bool:
        """Whether every byte of the view was written."""
        if self._complete or (itemsize, shape, strides, offset) in self._defined:
            return True
        if not np.logical_and.reduce(self._map(itemsize, shape, strides, offset), axis=None):
            return False
        self._note_defined(itemsize, shape, strides, offset)
        return True

    def defined_map(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """Per element of the view, whether all of it was written."""
        if self._complete:
            return np.ones(shape, np.bool_)
        seen = self._map(itemsize, shape, strides, offset)
        return np.logical_and.reduce(seen, axis=-1) if seen.ndim > len(shape) else seen.copy()

    def mark_written(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        """Remember that every byte of the view is defined from now on."""
        self.was_written = True
        if self._complete or (itemsize, shape, strides, offset) in self._defined:
            return
        self._note_defined(itemsize, shape, strides, offset)
        if not self._complete:
            self._map(itemsize, shape, strides, offset)[...] = True

    def mark_rows(self, itemsize: int, starts: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """`mark_written` for one view of `shape` at each of `starts` (an indirect write)."""
        self.was_written = True
        if not self._complete and starts.size:
            first, last = int(starts.min()), int(starts.max())
            # Windows that overlap: entry i begins i elements after the first of `starts`.
            self._map(itemsize, (last - first + 1, *shape), (1, *strides), first)[starts - first] = True

    def rows_defined(self, itemsize: int, starts: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
        """`defined_map` for one view of `shape` at each of `starts`."""
        if self._complete or not starts.size:
            return np.ones((starts.size, *shape), np.bool_)
        first, last = int(starts.min()), int(starts.max())
        seen: Array = self._map(itemsize, (last - first + 1, *shape), (1, *strides), first)[starts - first]
        return np.logical_and.reduce(seen, axis=-1) if seen.ndim > len(shape) + 1 else seen

    def mark_where(
        self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, mask: Array
    ) -> None:
        """`mark_written` for the elements of the view that `mask` selects."""
        self.was_written = True
        if not self._complete:
            self._map(itemsize, shape, strides, offset)[mask] = True

    def psum_state(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """The view of `matmul_written` under a view of the storage."""
        if self.matmul_written is None:
            self.matmul_written = self.new_map()
        return self.matmul_written.under(itemsize, shape, strides, offset)

    def mark_overwritten(
        self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, mask: Array | None = None
    ) -> None:
        """Remember that an instruction other than a matmul wrote the elements (those in `mask`) of a view."""
        state = self.psum_state(itemsize, shape, strides, offset)
        where: Any = True if mask is None else mask if mask.ndim == state.ndim else mask[..., np.newaxis]
        np.minimum(state, OVERWRITTEN, out=state, where=where)

    def _note_defined(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        if prod(shape) * itemsize == self.data.size and is_row_major(shape, strides):
            self._complete = True
            self._written = None
            self._defined.clear()
        else:
            if len(self._defined) >= _REMEMBERED:
                self._defined.clear()
            self._defined.add((itemsize, shape, strides, offset))

    def _map(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
        """The written-map under a view."""
        if self._written is None:
            self._written = self.new_map(np.bool_)
        return self._written.under(itemsize, shape, strides, offset)
