"""Accesses and records made by hand, and the bytes that an access touches."""

from __future__ import annotations

import itertools
from typing import Any

from nkisim.dtypes import DType, float32
from nkisim.errors import Site
from nkisim.memory import MemoryRegion, StorageInfo
from nkisim.trace import Access, Engine, Record

SITE = Site("kernel.py", 1, "kernel")


def storage(
    shape: tuple[int, ...],
    buffer: MemoryRegion = MemoryRegion.sbuf,
    dtype: DType = float32,
    number: int = 1,
    address: tuple[int, int] | None = None,
) -> StorageInfo:
    return StorageInfo(number, f"t{number}", buffer, shape, dtype, SITE, address)


def access(
    info: StorageInfo,
    shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    dtype: DType | None = None,
    rows: tuple[int, ...] | None = None,
    operand: str = "x",
    dynamic: bool = False,
) -> Access:
    """Part of a storage; all of it by default."""
    shape = info.shape if shape is None else shape
    if strides is None:
        steps = [1]
        for n in reversed(shape[1:]):
            steps.append(steps[-1] * n)
        strides = tuple(reversed(steps))
    return Access(operand, info, dtype or info.dtype, shape, strides, offset, rows, dynamic)


def record(
    index: int,
    engine: Engine,
    instruction: str,
    writes: tuple[Access, ...] = (),
    reads: tuple[Access, ...] = (),
    core: int = 0,
    name: str | None = None,
    **attrs: Any,
) -> Record:
    return Record(index, core, engine, instruction, name, SITE, writes, reads, attrs)


def touched_bytes(a: Access) -> set[int]:
    """Every byte of the storage that an access touches, one by one."""
    size = a.dtype.itemsize
    starts = (a.offset,) if a.rows is None else a.rows
    shape, strides = (a.shape, a.strides) if a.rows is None else (a.shape[1:], a.strides[1:])
    found: set[int] = set()
    for start in starts:
        for i in itertools.product(*(range(n) for n in shape)):
            first = (start + sum(s * k for s, k in zip(strides, i, strict=True))) * size
            found.update(range(first, first + size))
    return found
