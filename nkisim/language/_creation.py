"""Tensors: allocation, filled tensors, constants."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nkisim import dtypes
from nkisim.dtypes import as_dtype
from nkisim.errors import NkiError
from nkisim.hardware import source_of
from nkisim.machine import current_core
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.view import DynamicSlice

NDARRAY = "nki.language.ndarray, NKI 0.6"
GUIDE = "NKI language guide, tensors (NKI 0.6)"
MIGRATION = "NKI migration guide, NKI 0.6"

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
private_hbm = MemoryRegion.private_hbm
hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm


def ndarray(
    shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "", address: tuple[int, int] | None = None
) -> NkiTensor:
    """A new tensor of undefined contents; on chip dimension 0 is the partition dimension.

    Args:
        shape: positive sizes; at least two of them on chip, the first at most 128.
        dtype: element type.
        buffer: `nl.sbuf`, `nl.psum`, `nl.hbm` or `nl.shared_hbm`.
        name: shown in errors and traces.
        address: `(partition, byte in the partition)` to place an on-chip tensor by hand; the migration
            guide calls the second part an element offset in its text and uses bytes in its examples.

    Raises:
        NkiError: shape, buffer or address that no memory has.
    """
    core = current_core("nki.language.ndarray")
    hw = core.hardware

    def refuse(rule: str, received: object, allowed: object, source: str = NDARRAY) -> None:
        raise NkiError("ndarray", name, rule, received=received, allowed=allowed, source=source)

    kind = as_dtype(dtype, "nki.language.ndarray dtype")
    if not isinstance(buffer, MemoryRegion):
        refuse("buffer", repr(buffer), "nl.sbuf, nl.psum, nl.hbm or nl.shared_hbm; strings are refused since NKI 0.3")
    if not isinstance(shape, (tuple, list)):
        refuse("shape", repr(shape), "a tuple of positive integers")
    shape = tuple(int(n) if isinstance(n, np.integer) else n for n in shape)
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape):
        refuse("shape", shape, "positive integers")
    if buffer in ON_CHIP:
        if len(shape) < 2:
            refuse("dimensions of an on-chip tensor", len(shape), "at least 2: partition and free", GUIDE)
        if shape[0] > hw.partitions:
            refuse("partition dimension", shape[0], f"1..{hw.partitions}", source_of("partitions"))
        in_psum = buffer is MemoryRegion.psum
        fact = "psum_bank_bytes" if in_psum else "sbuf_usable_partition_bytes"
        limit = hw.psum_partition_bytes if in_psum else hw.sbuf_usable_partition_bytes
        need = prod(shape[1:]) * kind.itemsize
        if need > limit:
            refuse("bytes per partition", need, f"1..{limit} on {hw.target}", source_of(fact, hw.generation))
        if address is not None:
            _check_address(name, shape, need, limit, buffer, address)
    elif address is not None:
        refuse("address", address, "None for a tensor in HBM")
    storage = core.allocate(shape, kind, buffer, name, None if address is None else (address[0], address[1]))
    return NkiTensor(shape, kind, storage, buffer, storage.info.name)


def _check_address(
    name: str, shape: tuple[int, ...], need: int, limit: int, buffer: MemoryRegion, address: Any
) -> None:
    hw = current_core("nki.language.ndarray").hardware

    def refuse(rule: str, received: object, allowed: object, source: str = NDARRAY) -> None:
        raise NkiError("ndarray", name, rule, received=received, allowed=allowed, source=source)

    pair = isinstance(address, (tuple, list)) and len(address) == 2
    if not pair or not all(isinstance(a, int) and not isinstance(a, bool) and a >= 0 for a in address):
        refuse("address", address, "(partition, byte offset), both >= 0")
    partition, byte = address
    if partition + shape[0] > hw.partitions:
        refuse("address partitions", f"{partition}..{partition + shape[0] - 1}", f"0..{hw.partitions - 1}")
    if byte + need > limit:
        refuse("address bytes", f"{byte}..{byte + need - 1}", f"0..{limit - 1}")
    if buffer is MemoryRegion.psum and byte % hw.psum_bank_bytes:
        banks = ", ".join(str(bank * hw.psum_bank_bytes) for bank in range(hw.psum_banks))
        refuse("address of a PSUM tensor", byte, f"the start of a bank: {banks}", MIGRATION)


def ds(start: Any, size: int) -> DynamicSlice:
    """The slice `start : start + size` inside `[]`; `start` may be a register."""
    return DynamicSlice(start, size)


def is_sbuf(buffer: Any) -> bool:
    """Whether a buffer is SBUF."""
    return buffer is MemoryRegion.sbuf


def is_psum(buffer: Any) -> bool:
    """Whether a buffer is PSUM."""
    return buffer is MemoryRegion.psum


def is_hbm(buffer: Any) -> bool:
    """Whether a buffer is private or shared HBM."""
    return buffer in (MemoryRegion.private_hbm, MemoryRegion.shared_hbm)


def is_on_chip(buffer: Any) -> bool:
    """Whether a buffer is SBUF or PSUM."""
    return buffer in ON_CHIP


def shared_constant(constant: Any) -> NkiTensor:
    """A read-only shared HBM tensor that holds a NumPy array, or the array in a `.npy` file named by a path."""
    core = current_core("nki.language.shared_constant")
    array = np.load(constant) if isinstance(constant, str) else constant
    if not isinstance(array, np.ndarray):
        raise TypeError(f"shared_constant.constant: received {type(constant).__name__}, allowed an array or a path")
    kind = as_dtype(array.dtype, "shared_constant.constant")
    if array.size == 0:
        raise ValueError(f"shared_constant.constant: received shape {array.shape}, allowed at least one element")
    stored = np.array(array, dtype=kind.carrier(core.precise), order="C")
    data = stored.reshape(-1).view(np.uint8)
    shape = array.shape or (1,)
    storage = core.allocate(shape, kind, shared_hbm, "constant", data=data)
    storage.freeze()
    return NkiTensor(shape, kind, storage, shared_hbm, storage.info.name)


# Types documented for the bodies of NKI programs that name them.
DType = dtypes.DType
