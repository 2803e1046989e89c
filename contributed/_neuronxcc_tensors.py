"""Tensors of the adapter: views with the methods of NKI 0.6 over tensors of `neuronxcc.nki`.

A storage in SBUF or PSUM is a tensor [partitions, elements] of neuronxcc, one in HBM is its tensor, flattened. A view
is an offset, a shape and a stride per dimension, in elements; on chip the stride of dimension 0 is the number of
elements of a partition. An instruction takes a view as slices or as an index expression of `nl.arange` (`tile`), with
`broadcast_to` where a dimension repeats.

Integers of the host are known while the program is built: arrays that a kernel gets, and what is copied from them. The
storage of 32-bit integers has a shadow of the values that are known. Loop bounds and addresses are read from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from contributed._neuronxcc_vendor import nl

Array = np.ndarray[Any, np.dtype[Any]]
Dims = list[tuple[int, int]]  # (stride, count), outermost first


@dataclass(frozen=True)
class Dtype:
    """An element type under its name in NKI 0.6."""

    name: str
    itemsize: int
    vendor: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


SIZES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
}
DTYPES = {name: Dtype(name, size, getattr(nl, name)) for name, size in SIZES.items()}
INTEGERS = ("int32", "uint32")
ON_CHIP = ("sbuf", "psum")


class Shadow:
    """What the host knows of a storage: values, which of them it knows, and which of them have been written at all."""

    def __init__(self, size: int, values: Array | None = None) -> None:
        self.values = np.zeros(size, np.int32) if values is None else values
        self.known = np.full(size, values is not None)
        self.written = self.known.copy()

    def at(self, t: Tensor) -> tuple[Array, Array, Array]:
        """The three of a view, to be written to."""
        view = np.lib.stride_tricks.as_strided
        values: Array = view(self.values[t.offset :], t.shape, [s * 4 for s in t.strides])
        known: Array = view(self.known[t.offset :], t.shape, t.strides)
        written: Array = view(self.written[t.offset :], t.shape, t.strides)
        return values, known, written

    def copy(self) -> Shadow:
        """As it is now."""
        copy = Shadow(0)
        copy.values, copy.known, copy.written = self.values.copy(), self.known.copy(), self.written.copy()
        return copy

    def or_as(self, before: Shadow) -> None:
        """It is as now, or as before. A kernel does not read what may not have been written: there it is as now."""
        self.known &= ~before.written | (before.known & (self.values == before.values))


class Storage:
    """A tensor of neuronxcc and what the adapter knows of it.

    Args:
        buffer: sbuf, psum, hbm, private_hbm or shared_hbm.
        dtype: of the elements.
        shape: as it was asked for.
        argument: number of the kernel's argument that this is, None for others.
        values: the argument's elements, where they are 32-bit integers.
    """

    def __init__(
        self, buffer: str, dtype: Dtype, shape: tuple[int, ...], argument: int | None = None, values: Any = None
    ) -> None:
        self.buffer = buffer
        self.dtype = dtype
        self.shape = shape
        self.argument = argument
        self.on_chip = buffer in ON_CHIP
        self.row_bytes = prod(shape[1:]) * dtype.itemsize  # of a partition
        self.size = prod(shape)
        self.multiplied = False  # whether a matmul has written into it
        self.identity = False  # whether it is an identity matrix
        self.scope = 0  # bodies of device loops around its allocation
        self.vendor: Any = None
        self.clear: Callable[[], None] | None = None  # before its first use
        self._views: dict[str, Any] = {}
        self.shadow: Shadow | None = None
        if dtype.name in INTEGERS and buffer != "psum":
            flat = None if values is None else np.ascontiguousarray(values).reshape(-1).view(np.int32)
            self.shadow = Shadow(self.size, flat)

    def put(self, vendor: Any) -> None:
        """The tensor of neuronxcc."""
        self.vendor = vendor

    def of(self, dtype: Dtype) -> Any:
        """[partitions, elements] on chip, [elements] in HBM, of a type."""
        if self.clear is not None:
            clear, self.clear = self.clear, None
            clear()
        view = self._views.get(dtype.name)
        if view is None:
            view = self.vendor if self.on_chip else self.vendor.reshape((self.size,))
            if dtype != self.dtype:
                view = view.view(dtype.vendor)
            self._views[dtype.name] = view
        return view


@dataclass(frozen=True)
class Dynamic:
    """Part of an address that only the device knows: `index * stride`, of one number or of one per partition."""

    index: Any
    stride: int
    extent: int  # numbers below this are in the tensor
    vector: bool = False


class Tensor:
    """A strided view of a storage."""

    def __init__(
        self,
        storage: Storage,
        dtype: Dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
        dynamic: Dynamic | None = None,
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.offset = offset
        self.dynamic = dynamic

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def on_chip(self) -> bool:
        """Whether dimension 0 is the partition dimension."""
        return self.storage.on_chip

    @property
    def row(self) -> int:
        """Elements of a partition of the storage."""
        return self.storage.row_bytes // self.dtype.itemsize

    @property
    def start(self) -> tuple[int, int]:
        """First partition and column, on chip."""
        return self.offset // self.row, self.offset % self.row

    def dims(self) -> Dims:
        """All dimensions."""
        return list(zip(self.strides, self.shape, strict=True))

    def _with(self, shape: Any, strides: Any, offset: int | None = None, dynamic: Dynamic | None = None) -> Tensor:
        shift = self.offset if offset is None else offset
        return Tensor(self.storage, self.dtype, tuple(shape), tuple(strides), shift, dynamic or self.dynamic)

    def _replaced(self, a: int, b: int, dims: Dims) -> Tensor:
        """The view with other dimensions in place of dimensions `a` to `b`, the latter not included."""
        every = [*self.dims()[:a], *dims, *self.dims()[b:]]
        return self._with([n for _, n in every], [s for s, _ in every])

    def __getitem__(self, key: Any) -> Tensor:
        """Basic indexing, with the rules of NKI 0.6 for dimensions that an integer leaves."""
        keys = key if isinstance(key, tuple) else (key,)
        assert len(keys) <= self.ndim, f"indices: received {len(keys)}, allowed at most {self.ndim}"
        dims: Dims = []
        offset = self.offset
        for i, (k, n, stride) in enumerate(zip(keys, self.shape, self.strides, strict=False)):
            if isinstance(k, slice):
                start, stop = 0 if k.start is None else k.start, n if k.stop is None else k.stop
                step = 1 if k.step is None else k.step
                assert 0 <= start < stop <= n, f"slice of dimension {i}: received {k}, allowed 0..{n}"
                most = 1 if i == 0 and self.on_chip else n
                assert 1 <= step <= most, f"step of dimension {i}: received {k}, allowed 1..{most}"
                dims.append((stride * step, -(-(stop - start) // step)))
            else:
                start = k + n if k < 0 else k
                assert 0 <= start < n, f"index of dimension {i}: received {k}, allowed 0..{n - 1}"
                if i == 0 and self.on_chip:
                    dims.append((stride, 1))
            offset += start * stride
        dims += self.dims()[len(keys) :]
        if len(dims) < (2 if self.on_chip else 1):
            dims.append((self.strides[-1], 1))
        return self._with([n for _, n in dims], [s for s, _ in dims], offset)

    def select(self, dim: int, index: Any) -> Tensor:
        """One element of a dimension, which is removed; `index` may be a register."""
        at = known(index)
        dropped = self._replaced(dim, dim + 1, [])
        if at is None:
            return dropped._moved(index, self.strides[dim], self.shape[dim])
        assert 0 <= at < self.shape[dim], f"index of dimension {dim}: received {at}, allowed 0..{self.shape[dim] - 1}"
        dropped.offset += at * self.strides[dim]
        return dropped

    def _moved(self, index: Any, stride: int, extent: int) -> Tensor:
        assert self.dynamic is None, "one dynamic selection per tensor"
        return self._with(self.shape, self.strides, dynamic=Dynamic(index, stride, extent))

    def permute(self, dims: tuple[int, ...]) -> Tensor:
        """Dimensions in another order."""
        return self._with([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim: int, size: int) -> Tensor:
        """A dimension of size 1 repeated."""
        assert self.shape[dim] == 1, f"dimension {dim}: received {self.shape[dim]}, allowed 1"
        return self._replaced(dim, dim + 1, [(0, size)])

    def expand_dim(self, dim: int) -> Tensor:
        """A dimension of size 1 before another."""
        return self._replaced(dim, dim, [(1, 1)])

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> Tensor:
        """One dimension split; one element of `shape` may be -1."""
        new = _inferred(shape, self.shape[dim])
        return self._replaced(dim, dim + 1, [(s * self.strides[dim], n) for s, n in _row_major(new)])

    def reshape(self, shape: tuple[int, ...]) -> Tensor:
        """The same elements under another shape."""
        new = _inferred(shape, self.size)
        keep = 1 if self.on_chip else 0
        assert new[:keep] == self.shape[:keep], f"partitions: received {new[0]}, allowed {self.shape[0]}"
        strides = _reshaped(self.dims()[keep:], new[keep:])
        return self._with(new, (*self.strides[:keep], *strides))

    def view(self, dtype: Dtype) -> Tensor:
        """The same bytes as another type; the last dimension scales."""
        old, size = self.dtype.itemsize, dtype.itemsize
        shape, strides, offset = list(self.shape), list(self.strides), self.offset
        if size < old:
            k = old // size
            shape[-1], strides, offset = shape[-1] * k, [*[s * k for s in strides[:-1]], 1], offset * k
        elif size > old:
            k = size // old
            assert shape[-1] % k == offset % k == 0, "alignment of a view of a larger type"
            shape[-1], strides, offset = shape[-1] // k, [*[s // k for s in strides[:-1]], 1], offset // k
        return Tensor(self.storage, dtype, tuple(shape), tuple(strides), offset)

    def ap(
        self,
        pattern: Any,
        offset: int = 0,
        scalar_offset: Any = None,
        vector_offset: Tensor | None = None,
        indirect_dim: int = 0,
    ) -> Tensor:
        """An explicit pattern `[[stride, count], ...]`; a run-time index counts steps of dimension `indirect_dim`."""
        shape, strides = [n for _, n in pattern], [s for s, _ in pattern]
        stride, extent = self.strides[indirect_dim], self.shape[indirect_dim]
        t = self._with(shape, strides, self.offset + offset)
        if vector_offset is not None:
            return t._with(shape, strides, dynamic=Dynamic(vector_offset, stride, extent, vector=True))
        if scalar_offset is None:
            return t
        at = known(scalar_offset)
        if at is None:
            return t._moved(scalar_offset, stride, extent)
        t.offset += at * stride
        return t


def new_tensor(storage: Storage) -> Tensor:
    """The whole of a storage."""
    dims = _row_major(storage.shape)
    return Tensor(storage, storage.dtype, storage.shape, tuple(s for s, _ in dims))


class Register:
    """A number: `value` if the host knows it, else `tile`, [1, 1] int32 in SBUF; `most` trips has a loop to it."""

    def __init__(self) -> None:
        self.value: int | None = 0
        self.tile: Tensor | None = None
        self.most: int | None = None


def known(index: Any) -> int | None:
    """The value of a number, register or tensor of one element, None if only the device knows it."""
    if isinstance(index, Register):
        return index.value
    if not isinstance(index, Tensor):
        return int(index)
    assert index.size == 1, f"a number: received a tensor {index.shape}"
    values = known_values(index)
    return None if values is None else int(values.item())


def known_values(t: Tensor) -> Array | None:
    """Values of a view of 32-bit integers, None if only the device knows some of them."""
    shadow = t.storage.shadow
    if shadow is None or t.dynamic is not None or t.dtype.name not in INTEGERS:
        return None
    values, there, _ = shadow.at(t)
    return values if there.all() else None


def note_copy(dst: Tensor, src: Tensor) -> None:
    """dst holds what src does, bit for bit."""
    shadow, source = dst.storage.shadow, src.storage.shadow
    if shadow is None:
        return
    same = src.dtype.name in INTEGERS and dst.dtype.name in INTEGERS
    if source is None or not same or dst.dynamic is not None or src.dynamic is not None:
        note_unknown(dst)
        return
    for to, data in zip(shadow.at(dst), source.at(src), strict=True):
        to[...] = data.reshape(to.shape)


def note_unknown(dst: Tensor, value: int | None = None) -> None:
    """dst holds what only the device knows, or a number."""
    shadow = dst.storage.shadow
    if shadow is None:
        return
    if dst.dtype.itemsize != dst.storage.dtype.itemsize or dst.dynamic is not None:
        shadow.known[:] = False
        shadow.written[:] = True
        return
    values, there, written = shadow.at(dst)
    there[...], written[...] = value is not None, True
    if value is not None:
        values[...] = value


def _inferred(shape: tuple[int, ...], total: int) -> tuple[int, ...]:
    """A shape of `total` elements with its -1 filled in."""
    new = tuple(total // prod(n for n in shape if n != -1) if n == -1 else n for n in shape)
    assert prod(new) == total, f"elements: received {prod(new)} in {shape}, allowed {total}"
    return new


def _row_major(shape: tuple[int, ...]) -> Dims:
    dims: Dims = []
    stride = 1
    for n in reversed(shape):
        dims.append((stride, n))
        stride *= n
    return dims[::-1]


def merged(dims: Dims) -> Dims:
    """The same elements in the same order in as few dimensions as possible."""
    out: Dims = []
    for stride, n in dims:
        if n == 1:
            continue
        if out and out[-1][0] == stride * n:
            out[-1] = (stride, out[-1][1] * n)
        else:
            out.append((stride, n))
    return out


def refined(*views: Dims) -> list[Dims]:
    """The same elements in the same order, all with the same counts, in as few dimensions as that takes."""
    left = [merged(dims) for dims in views]
    out: list[Dims] = [[] for _ in views]
    while any(left):
        n = min(dims[-1][1] for dims in left)
        for dims, new in zip(left, out, strict=True):
            stride, count = dims.pop()
            assert count % n == 0, f"dimensions that do not divide each other: {views}"
            new.append((stride, n))
            if count > n:
                dims.append((stride * n, count // n))
    # Neighbours that are one dimension in all of them.
    joined: list[Dims] = [[] for _ in views]
    for step in zip(*(new[::-1] for new in out), strict=True):
        together = bool(joined[0]) and all(j[-1][0] == stride * n for j, (stride, n) in zip(joined, step, strict=True))
        for j, (stride, n) in zip(joined, step, strict=True):
            if together:
                j[-1] = (stride, j[-1][1] * n)
            else:
                j.append((stride, n))
    return joined


def _reshaped(dims: Dims, shape: tuple[int, ...]) -> list[int]:
    """Strides of a shape over the elements of `dims`, which needs no copy."""
    left = merged(dims)
    strides: list[int] = []
    for n in reversed(shape):
        if n == 1:
            strides.append(1)
            continue
        stride, count = left.pop()
        assert count % n == 0, f"reshape of {dims} to {shape} needs a copy"
        strides.append(stride)
        if count > n:
            left.append((stride * n, count // n))
    return strides[::-1]


_aranges: dict[tuple[int, int, int], Any] = {}


def arange(n: int, axis: int, rank: int) -> Any:
    """0 .. n - 1 along one of several axes."""
    key = (n, axis, rank)
    if key not in _aranges:
        index: list[Any] = [None] * rank
        index[axis] = slice(None)
        _aranges[key] = nl.arange(n)[tuple(index)]
    return _aranges[key]


def forget_indices() -> None:
    """Index expressions belong to a program."""
    _aranges.clear()


def place(t: Tensor, dims: Dims) -> tuple[Any, Any]:
    """The tensor of neuronxcc and the index of a view on chip whose free dimensions are `dims`, none repeated."""
    tensor = t.storage.of(t.dtype)
    first, column = t.start
    if t.dynamic is not None:
        raise NotImplementedError("neuronxcc: an operand on chip at an address that only the device knows")
    if len(dims) <= 1:
        stride, n = dims[0] if dims else (1, 1)
        if stride == 1 or n == 1:
            return tensor, (slice(first, first + t.shape[0]), slice(column, column + n))
    rank = 1 + max(1, len(dims))
    free: Any = column
    for axis, (stride, n) in enumerate(dims, 1):
        free = free + stride * arange(n, axis, rank)
    return tensor, (first + arange(t.shape[0], 0, rank), free)


def tile(t: Tensor, dims: Dims) -> Any:
    """A view on chip whose free dimensions are `dims`, as an operand."""
    if all(stride != 0 for stride, _ in dims):
        tensor, index = place(t, dims)
        return tensor[index]
    tensor, index = place(t, [(stride, n if stride != 0 else 1) for stride, n in dims])
    return tensor[index].broadcast_to((t.shape[0], *[n for _, n in dims]))


def column(t: Any) -> Any:
    """An operand of one element per partition, or a number."""
    if not isinstance(t, Tensor):
        return t
    assert t.size == t.shape[0], f"an operand of one element per partition: received {t.shape}"
    return tile(t, [(1, 1)])
