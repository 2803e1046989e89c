"""Moving data: loads and stores, transposes, products, gathers, selection."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim.dtypes import FLOATS, float32, uint8
from nkisim.isa._call import Call
from nkisim.language._activation import copy
from nkisim.language._creation import ndarray
from nkisim.language._math import not_equal
from nkisim.language._wrap import KNOWN_ISSUES, dtype_of, hbm_tensor, refuse, tile
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """An HBM tensor in a new SBUF tile of its shape."""
    src = hbm_tensor("load", "src", src)
    dst = ndarray(src.shape, dtype_of("load", dtype, src.dtype))
    nisa.dma_copy(dst=dst, src=src)
    return dst


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Write an SBUF tile to an HBM tensor."""
    dst, value = hbm_tensor("store", "dst", dst), tile("store", "value", value)
    if value.buffer is MemoryRegion.psum:
        refuse("store", "value", "buffer", "psum", "sbuf: nl.copy brings a tile there", KNOWN_ISSUES)
    nisa.dma_copy(dst=dst, src=value)


def load_transpose2d(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A two-dimensional HBM tensor in a new SBUF tile, rows and columns exchanged, by `dma_transpose`."""
    src = hbm_tensor("load_transpose2d", "src", src)
    if src.ndim != 2:
        refuse("load_transpose2d", "src", "dimensions", src.ndim, 2)
    kind = dtype_of("load_transpose2d", dtype, src.dtype)
    dst = ndarray((src.shape[1], src.shape[0]), src.dtype)
    nisa.dma_transpose(dst=dst, src=src)
    return dst if kind is src.dtype else copy(dst, kind)


def transpose(x: Any, dtype: Any = None) -> NkiTensor:
    """A two-dimensional tile with partitions and columns exchanged, in PSUM, by the Tensor Engine."""
    x = tile("transpose", "x", x)
    if x.ndim != 2:
        refuse("transpose", "x", "dimensions", x.ndim, 2)
    kind = dtype_of("transpose", dtype, x.dtype)
    dst = ndarray((x.shape[1], x.shape[0]), x.dtype, MemoryRegion.psum)
    nisa.nc_transpose(dst=dst, data=x, engine=nisa.engine.tensor)
    if kind is x.dtype:
        return dst
    converted = ndarray(dst.shape, kind, MemoryRegion.psum)
    nisa.tensor_copy(dst=converted, src=dst)
    return converted


def matmul(x: Any, y: Any, transpose_x: bool = False) -> NkiTensor:
    """x.T @ y in float32 in PSUM, for x of [K, M] and y of [K, N]; `transpose_x` must be True."""
    x, y = tile("matmul", "x", x), tile("matmul", "y", y)
    if transpose_x is not True:
        allowed = "True: store x with the contraction on partitions, or call nl.transpose first"
        refuse("matmul", "transpose_x", "value", transpose_x, allowed, KNOWN_ISSUES)
    for operand, t in (("x", x), ("y", y)):
        if t.ndim != 2:
            refuse("matmul", operand, "dimensions", t.ndim, 2)
    dst = ndarray((x.shape[1], y.shape[1]), float32, MemoryRegion.psum)
    nisa.nc_matmul(dst=dst, stationary=x, moving=y)
    return dst


def gather_flattened(data: NkiTensor, indices: NkiTensor, axis: int = 0, dtype: Any = None) -> NkiTensor:
    """out[p, j] = data[p].flatten()[indices[p, j]] by `nc_n_gather`."""
    data, indices = tile("gather_flattened", "data", data), tile("gather_flattened", "indices", indices)
    if axis != 0 or isinstance(axis, bool):
        raise NotImplementedError(f"gather_flattened.axis: received {axis!r}; no document says what but 0 means")
    kind = dtype_of("gather_flattened", dtype, data.dtype)
    dst = ndarray(indices.shape, data.dtype)
    nisa.nc_n_gather(dst=dst, data=data, indices=indices)
    return dst if kind is data.dtype else copy(dst, kind)


def expand_dims(x: Any, axis: Any) -> NkiTensor:
    """A view of a tile with a dimension of size 1 at `axis`."""
    t = tile("expand_dims", "x", x)
    if not isinstance(axis, int) or isinstance(axis, bool) or not -t.ndim - 1 <= axis <= t.ndim:
        refuse("expand_dims", "axis", "value", axis, f"{-t.ndim - 1}..{t.ndim}")
    return t.expand_dim(axis + t.ndim + 1 if axis < 0 else axis)


def broadcast_to(x: Any, shape: Any, dtype: Any = None) -> NkiTensor:
    """`x` repeated along its dimensions of size 1, in a new SBUF tile; x itself where nothing changes."""
    x = tile("broadcast_to", "x", x)
    kind = dtype_of("broadcast_to", dtype, x.dtype)
    shape = tuple(shape)
    if len(shape) != x.ndim:
        refuse("broadcast_to", "shape", "dimensions", len(shape), f"{x.ndim}, those of x")
    if any(n != old and old != 1 for n, old in zip(shape, x.shape, strict=True)):
        refuse("broadcast_to", "shape", "size", list(shape), f"{list(x.shape)} with dimensions of 1 repeated")
    if shape == x.shape:
        return x if kind is x.dtype else copy(x, kind)
    dst = ndarray(shape, kind)
    repeated = x
    for d in range(1, x.ndim):
        if x.shape[d] != shape[d]:
            repeated = repeated.broadcast(d, shape[d])
    done = x.shape[0]
    nisa.tensor_copy(dst=dst[0:done], src=repeated)
    # No engine reads one partition into many; DMA doubles the partitions that are done.
    while done < shape[0]:
        more = min(done, shape[0] - done)
        nisa.dma_copy(dst=dst[done : done + more], src=dst[0:more])
        done += more
    return dst


def where(condition: Any, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x` where `condition` is not 0, else y: a copy of y, and x over it by `tensor_copy_predicated`."""
    tiles = {operand: tile("where", operand, t) for operand, t in (("condition", condition), ("x", x), ("y", y))}
    condition, x, y = tiles.values()
    if condition.dtype not in FLOATS:
        refuse("where", "condition", "dtype", condition.dtype, f"{', '.join(FLOATS)}: 1.0 for true, 0.0 for false")
    for operand, t in tiles.items():
        if t.shape != condition.shape:
            allowed = f"{list(condition.shape)}, that of condition: tiles are not broadcast"
            refuse("where", operand, "shape", list(t.shape), allowed, KNOWN_ISSUES)
    if dtype is None and x.dtype is not y.dtype:
        refuse("where", "dtype", "result type of unequal inputs", f"{x.dtype} and {y.dtype}", "equal dtypes, or dtype=")
    kind = dtype_of("where", dtype, x.dtype)
    predicate = not_equal(condition, 0.0, dtype=uint8)
    dst = copy(y, kind)
    nisa.tensor_copy_predicated(dst=dst, src=x if x.dtype is kind else copy(x, kind), predicate=predicate)
    return dst


def dropout(x: Any, rate: Any, dtype: Any = None) -> NkiTensor:
    """`x` with elements replaced by 0 with probability `rate`, a number or a [P, 1] tile."""
    x = tile("dropout", "x", x)
    kind = dtype_of("dropout", dtype, x.dtype)
    dst = ndarray(x.shape, x.dtype)
    nisa.dropout(dst=dst, data=x, prob=rate)
    return dst if kind is x.dtype else copy(dst, kind)


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Write `print_prefix` and the values of a tensor in SBUF or HBM to standard output."""
    if not isinstance(print_prefix, str):
        refuse("device_print", "print_prefix", "type", type(print_prefix).__name__, "a constant string")
    if not isinstance(tensor, NkiTensor):
        refuse("device_print", "tensor", "type", type(tensor).__name__, "a tensor")
    if tensor.buffer is MemoryRegion.psum:
        refuse("device_print", "tensor", "buffer", "psum", "sbuf or HBM: nl.copy brings a tile there")
    call = Call("device_print")
    call.source = "nki.language.device_print, NKI 0.6"
    values = call.read("tensor", tensor)
    sys.stdout.write(f"{print_prefix}\n{np.array2string(values)}\n")
