"""Tensors with contents: constants, random numbers, the identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim.dtypes import DType, as_dtype, uint8, uint32
from nkisim.hardware import GEN4
from nkisim.language._creation import ndarray, sbuf, shared_constant
from nkisim.language._math import multiply, right_shift
from nkisim.language._wrap import dtype_of, refuse
from nkisim.machine import current_core
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import NkiTensor

# Elements per partition of the SBUF tiles that HBM tensors are filled from.
_STAGE = 2048
# Random bits that a float32 holds exactly.
_MANTISSA = 24


def full(shape: Any, fill_value: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """A new tensor of `fill_value`: by `memset` on chip, in HBM by DMA from a filled tile."""
    t = ndarray(shape, dtype, buffer, name)
    if t.buffer in ON_CHIP:
        nisa.memset(dst=t, value=fill_value)
        return t
    stage: NkiTensor | None = None
    for block in _blocks(t):
        if stage is None:
            stage = ndarray(block.shape, t.dtype)
            nisa.memset(dst=stage, value=fill_value)
        nisa.dma_copy(dst=block, src=stage[0 : block.shape[0], 0 : block.shape[1]])
    return t


def _blocks(t: NkiTensor) -> Iterator[NkiTensor]:
    """All of a dense HBM tensor as [rows, columns] views that fit a tile; the first is the largest."""
    flat = t.reshape((t.size,))
    partitions = current_core("nki.language.full").hardware.partitions
    columns = min(-(-t.size // partitions), _STAGE)
    at = 0
    while at < t.size:
        rows = min((t.size - at) // columns, partitions)
        shape = (rows, columns) if rows else (1, t.size - at)
        size = shape[0] * shape[1]
        yield flat[at : at + size].reshape(shape)
        at += size


def _same_class(value: int, dtype: DType) -> int | float:
    """The number as `memset` takes it: a float for float types, else an int."""
    return float(value) if dtype.is_float else value


def zeros(shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """A new tensor of zeros."""
    return full(shape, _same_class(0, as_dtype(dtype, "nki.language.zeros dtype")), dtype, buffer, name)


def ones(shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """A new tensor of ones."""
    return full(shape, _same_class(1, as_dtype(dtype, "nki.language.ones dtype")), dtype, buffer, name)


def zeros_like(x: Any, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    """A new tensor of zeros with the shape and dtype of `x`, in SBUF unless `buffer` says otherwise."""
    # Its documentation names sbuf as the default; that of empty_like names x's buffer.
    x = _tensor("zeros_like", x)
    return zeros(x.shape, dtype_of("zeros_like", dtype, x.dtype), sbuf if buffer is None else buffer, name)


def empty_like(x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = "") -> NkiTensor:
    """A new tensor of undefined contents with the shape, dtype and buffer of `x`."""
    x = _tensor("empty_like", x)
    return ndarray(x.shape, dtype_of("empty_like", dtype, x.dtype), x.buffer if buffer is None else buffer, name)


def _tensor(what: str, x: Any) -> NkiTensor:
    if not isinstance(x, NkiTensor):
        refuse(what, "x", "type", type(x).__name__, "a tensor")
    return x


def rand(shape: Any, dtype: Any, buffer: MemoryRegion = sbuf, name: str = "") -> NkiTensor:
    """A new tensor of uniform random numbers between 0 and 1, from the Vector Engine's generator.

    `rand2` on NeuronCore-v4, before it `rng` and a conversion of its upper 24 bits.
    """
    t = ndarray(shape, dtype, buffer, name)
    if t.buffer in ON_CHIP:
        _randomize(t)
        return t
    for block in _blocks(t):
        stage = ndarray(block.shape, t.dtype)
        _randomize(stage)
        nisa.dma_copy(dst=block, src=stage)
    return t


def _randomize(t: NkiTensor) -> None:
    if current_core("nki.language.rand").hardware.generation >= GEN4:
        nisa.rand2(dst=t, min=0.0, max=1.0)
        return
    bits = ndarray(t.shape, uint32)
    # The documentation leaves the engine open before trn3; this is the one that random_seed seeds.
    nisa.rng(dst=bits, engine=nisa.engine.vector)
    nisa.tensor_scalar(dst=bits, data=bits, op0=right_shift, operand0=32 - _MANTISSA)
    nisa.tensor_scalar(dst=t, data=bits, op0=multiply, operand0=2.0**-_MANTISSA)


def random_seed(seed: Any) -> None:
    """Seed the Vector Engine's generator with a [1, 1] tile of a 32-bit value."""
    nisa.set_rng_seed(src_seeds=seed)


def shared_identity_matrix(n: Any, dtype: Any = uint8, dst: Any = None) -> NkiTensor:
    """The n by n identity in SBUF by DMA from a constant in HBM: in `dst` if given, else in a new read-only tile."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        refuse("shared_identity_matrix", "n", "value", n, "a positive integer")
    kind = as_dtype(dtype, "nki.language.shared_identity_matrix dtype")
    if kind.kind == "packed":
        refuse("shared_identity_matrix", "dtype", "value", kind, "a type of one number per element")
    identity = ndarray((n, n), kind, name="identity") if dst is None else dst
    if not isinstance(identity, NkiTensor) or identity.buffer is not sbuf or identity.shape != (n, n):
        refuse("shared_identity_matrix", "dst", "tile", dst, f"an SBUF tile of shape {(n, n)}")
    nisa.dma_copy(dst=identity, src=shared_constant(np.eye(n, dtype=kind.numpy)))
    if dst is None:
        identity.storage.freeze()
    return identity
