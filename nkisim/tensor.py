"""`NkiTensor`: a strided view of a storage, and the view operations of the NKI language guide.

An element's address is `offset + sum(stride * index)`, in elements of the view's dtype from the start
of the storage, on chip and in HBM alike; on chip dimension 0 is the partition dimension and its
stride is the number of elements one partition holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NoReturn

from nkisim.dtypes import DType, as_dtype
from nkisim.errors import NkiError
from nkisim.hardware import TRN3
from nkisim.memory import HBM, ON_CHIP, MemoryRegion, Storage, is_row_major, row_major_strides

GUIDE = "NKI language guide, tensor views (NKI 0.6)"
AP_GUIDE = "NKI access patterns guide (NKI 0.6)"
MAX_DIMS = TRN3.view_max_dims


class NKIObject:
    """Base of the classes that a kernel may use; keyword arguments become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


@dataclass(frozen=True)
class DynamicSlice:
    """`nl.ds(start, size)`: the slice `start : start + size`; `start` may be a register."""

    start: Any
    size: int


@dataclass(frozen=True)
class Dynamic:
    """A run-time part of an address.

    kind "scalar": one index moves the whole view by `index * stride` elements.
    kind "vector": partition p's view starts at `index[p] * stride`; dim 0's own stride does not count.
    kind "columns": `.indirect`; partition p reads the columns that its group's indices name.
    `extent` is the number of valid index values where the view was made by selecting a dimension.
    """

    kind: str
    index: Any
    stride: int
    extent: int | None = None
    dim: int = 0


class NkiTensor(NKIObject):
    """A view of a storage. Create one with `nl.ndarray`; every view operation shares the storage."""

    # Slots live on the instance dict otherwise; NKIObject keeps a __dict__, so these are plain fields.
    storage: Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: DType
    name: str
    dynamic: Dynamic | None
    buffer: MemoryRegion

    __hash__: ClassVar[Any] = object.__hash__

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        storage: Any,
        buffer: MemoryRegion = MemoryRegion.sbuf,
        name: str = "",
    ) -> None:
        self.shape = tuple(shape)
        self.strides = row_major_strides(self.shape)
        self.offset = 0
        self.dtype = as_dtype(dtype)
        self.storage = storage
        self.buffer = buffer
        self.name = name
        self.dynamic = None

    # -- attributes

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
        """Whether it lives in SBUF or PSUM, where dimension 0 is the partition dimension."""
        return self.buffer in ON_CHIP

    @property
    def free_size(self) -> int:
        """Elements per partition: the product of all dimensions but the first."""
        return prod(self.shape[1:])

    @property
    def row_elements(self) -> int:
        """Elements of this dtype that one partition of the storage holds (on chip)."""
        return self.storage.nbytes // self.storage.info.partitions // self.element_bytes

    @property
    def element_bytes(self) -> int:
        """Bytes one element takes in the simulator's storage."""
        return self.dtype.itemsize if self.storage.precise else self.dtype.carrier(False).itemsize

    @property
    def start_partition(self) -> int:
        """First partition the view touches (on chip)."""
        base = self.storage.info.address[0] if self.storage.info.address else 0
        return base + self.offset // self.row_elements

    def is_contiguous(self) -> bool:
        """Whether the view is dense in row-major order; on chip within each partition."""
        if self.on_chip:
            return is_row_major(self.shape[1:], self.strides[1:])
        return is_row_major(self.shape, self.strides)

    def get_pattern(self) -> list[list[int]]:
        """The view as `[[stride, count], ...]`, as `ap` takes it."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self) -> bool:
        """Whether part of the address is known only at run time."""
        return self.dynamic is not None

    def __repr__(self) -> str:
        return f"NkiTensor({self.name}: {self.dtype}{list(self.shape)} in {self.buffer.name})"

    def __bool__(self) -> NoReturn:
        raise self._refused(
            "bool()", "a tensor's values are not known when the kernel is built", self, "compile-time values", GUIDE
        )

    def __eq__(self, other: object) -> bool:
        return self is other

    # -- indexing

    def __getitem__(self, key: Any) -> NkiTensor:
        """NumPy-style basic indexing: int, slice, Ellipsis, `nl.ds` and tuples of them."""
        keys = key if isinstance(key, tuple) else (key,)
        n_given = sum(1 for k in keys if k is not Ellipsis)
        if len(keys) - n_given > 1 or n_given > self.ndim:
            self._refuse("[]", "number of indices", keys, f"at most {self.ndim} and one Ellipsis")
        full: list[Any] = []
        for k in keys:
            if k is Ellipsis:
                full.extend([slice(None)] * (self.ndim - n_given))
            else:
                full.append(k)
        full.extend([slice(None)] * (self.ndim - len(full)))

        t = self
        dropped: list[int] = []
        for dim, k in enumerate(full):
            n = self.shape[dim]
            if isinstance(k, slice):
                if k.start is None and k.stop is None and k.step is None:
                    continue
                start, stop, step = self._slice_bounds(dim, k)
                t = t._sliced(dim, start, stop, step)
            elif isinstance(k, DynamicSlice):
                t = t._dynamic_slice(dim, k)
            elif isinstance(k, int) and not isinstance(k, bool):
                at = k + n if k < 0 else k
                if not 0 <= at < n:
                    self._refuse("[]", f"index of dimension {dim}", k, f"{-n}..{n - 1}")
                t = t._sliced(dim, at, at + 1, 1)
                dropped.append(dim)
            elif hasattr(k, "__index__") and not isinstance(k, bool) and not _is_register(k):
                full[dim] = int(k)
                return self[tuple(full)]
            elif _is_register(k) or isinstance(k, NkiTensor):
                # A register as an index of an HBM or free dimension selects at run time.
                t = t._dynamic_slice(dim, DynamicSlice(k, 1))
                dropped.append(dim)
            else:
                self._refuse("[]", f"index of dimension {dim}", repr(k), "int, slice, Ellipsis, nl.ds or a register")
        return t._drop(dropped)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise NotImplementedError(
            "NkiTensor.__setitem__: assignment into a tensor is not documented for NKI 0.6; "
            "write with an nki.isa instruction that has dst= instead"
        )

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Elements `start:end:step` of one dimension."""
        dim = self._dim("slice", dim)
        n = self.shape[dim]
        if not (_is_int(start) and _is_int(end) and 0 <= start < end <= n):
            self._refuse("slice", f"bounds of dimension {dim}", f"{start}:{end}", f"0 <= start < end <= {n}")
        if not (_is_int(step) and step >= 1):
            self._refuse("slice", "step", step, ">= 1")
        return self._sliced(dim, start, end, step)

    def select(self, dim: int, index: Any) -> NkiTensor:
        """One element of a dimension, which is removed; `index` is an int, a register or a 1x1 SBUF tensor."""
        dim = self._dim("select", dim)
        n = self.shape[dim]
        if _is_int(index):
            if not 0 <= index < n:
                self._refuse("select", f"index of dimension {dim}", index, f"0..{n - 1}")
            return self._sliced(dim, index, index + 1, 1)._drop([dim])
        if not (_is_register(index) or isinstance(index, NkiTensor)):
            self._refuse("select", "index", repr(index), "an int, a register or a 1x1 SBUF tensor")
        return self._dynamic_slice(dim, DynamicSlice(index, 1))._drop([dim])

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Row `vector_offset[p]` of dimension 0 for partition p; HBM only."""
        if dim != 0:
            self._refuse("vector_select", "dim", dim, "0")
        if self.on_chip:
            self._refuse("vector_select", "buffer", self.buffer.name, "HBM")
        self._check_not_dynamic("vector_select")
        self._check_vector("vector_select", vector_offset)
        dynamic = Dynamic("vector", vector_offset, self.strides[0], self.shape[0])
        return self._make((vector_offset.shape[0], *self.shape[1:]), (0, *self.strides[1:]), self.offset, dynamic)

    # -- shape

    def permute(self, dims: tuple[int, ...]) -> NkiTensor:
        """Dimensions in another order."""
        dims = tuple(dims)
        if sorted(dims) != list(range(self.ndim)):
            self._refuse("permute", "dims", dims, f"a permutation of 0..{self.ndim - 1}")
        self._keep_dim0("permute", dims[0] != 0, dims)
        return self._make(
            tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims), self.offset, self.dynamic
        )

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a dimension of size 1 `size` times, with stride 0."""
        dim = self._dim("broadcast", dim)
        if self.shape[dim] != 1:
            self._refuse("broadcast", f"size of dimension {dim}", self.shape[dim], "1")
        self._keep_dim0("broadcast", dim == 0, dim)
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._make(tuple(shape), tuple(strides), self.offset, self.dynamic)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a dimension of size 1 before dimension `dim`."""
        if not 0 <= dim <= self.ndim:
            self._refuse("expand_dim", "dim", dim, f"0..{self.ndim}")
        self._keep_dim0("expand_dim", dim == 0, dim)
        inner = self.shape[dim] * self.strides[dim] if dim < self.ndim else 1
        return self._make(
            (*self.shape[:dim], 1, *self.shape[dim:]),
            (*self.strides[:dim], inner, *self.strides[dim:]),
            self.offset,
            self.dynamic,
        )

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a dimension of size 1."""
        dim = self._dim("squeeze_dim", dim)
        if self.shape[dim] != 1:
            self._refuse("squeeze_dim", f"size of dimension {dim}", self.shape[dim], "1")
        self._keep_dim0("squeeze_dim", dim == 0, dim)
        return self._make(
            self.shape[:dim] + self.shape[dim + 1 :],
            self.strides[:dim] + self.strides[dim + 1 :],
            self.offset,
            self.dynamic,
        )

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> NkiTensor:
        """Split one dimension; one element of `shape` may be -1."""
        dim = self._dim("reshape_dim", dim)
        new = self._infer("reshape_dim", tuple(shape), self.shape[dim])
        if len(new) > 1 or new[0] != self.shape[dim]:
            self._keep_dim0("reshape_dim", dim == 0, dim)
        inner = tuple(s * self.strides[dim] for s in row_major_strides(new))
        return self._make(
            self.shape[:dim] + new + self.shape[dim + 1 :],
            self.strides[:dim] + inner + self.strides[dim + 1 :],
            self.offset,
            self.dynamic,
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge dimensions `start_dim..end_dim` (inclusive), which must be contiguous."""
        a, b = self._dim("flatten_dims", start_dim), self._dim("flatten_dims", end_dim)
        if a > b:
            self._refuse("flatten_dims", "dims", (start_dim, end_dim), "start_dim <= end_dim")
        self._keep_dim0("flatten_dims", a == 0 and b > 0, start_dim)
        merged = _merge(self.shape[a : b + 1], self.strides[a : b + 1])
        if merged is None:
            self._refuse("flatten_dims", "layout", self.get_pattern(), "dimensions contiguous in memory")
        return self._make(
            (*self.shape[:a], merged[0], *self.shape[b + 1 :]),
            (*self.strides[:a], merged[1], *self.strides[b + 1 :]),
            self.offset,
            self.dynamic,
        )

    def reshape(self, shape: tuple[int, ...]) -> NkiTensor:
        """The same elements under another shape, without a copy."""
        new = self._infer("reshape", tuple(shape), self.size)
        self._keep_dim0("reshape", (new[:1] or (0,))[0] != self.shape[0], new)
        keep = 1 if self.on_chip or self.dynamic is not None and self.dynamic.kind == "vector" else 0
        strides = _reshape_strides(self.shape[keep:], self.strides[keep:], new[keep:])
        if strides is None:
            self._refuse("reshape", f"layout for shape {new}", self.get_pattern(), "a view without a copy")
        return self._make(new, self.strides[:keep] + strides, self.offset, self.dynamic)

    def rearrange(
        self,
        src_pattern: tuple[Any, ...],
        dst_pattern: tuple[Any, ...],
        fixed_sizes: dict[str, int] | None = None,
    ) -> NkiTensor:
        """Split, reorder and merge dimensions by name: `t.rearrange(('p', ('h', 'w')), ('p', 'w', 'h'), {'h': 4})`."""
        sizes = dict(fixed_sizes or {})
        if len(src_pattern) != self.ndim:
            self._refuse("rearrange", "src_pattern", src_pattern, f"{self.ndim} entries")
        t, at, names = self, 0, []
        for entry, n in zip(src_pattern, self.shape, strict=True):
            group = (entry,) if isinstance(entry, str) else tuple(entry)
            unknown = [g for g in group if g not in sizes]
            known = prod(sizes[g] for g in group if g in sizes)
            if len(unknown) > 1:
                self._refuse("rearrange", "fixed_sizes", fixed_sizes, f"sizes for all but one of {group}")
            if unknown:
                sizes[unknown[0]] = n // known if known else 0
            if prod(sizes[g] for g in group) != n:
                self._refuse("rearrange", f"sizes of {group}", [sizes[g] for g in group], f"a product of {n}")
            if len(group) > 1:
                t = t._wide(tuple(sizes[g] for g in group), at)
            names.extend(group)
            at += len(group)
        flat = [g for e in dst_pattern for g in ((e,) if isinstance(e, str) else e)]
        if sorted(flat) != sorted(names) or len(set(names)) != len(names):
            self._refuse("rearrange", "dst_pattern", dst_pattern, f"the names {names}")
        t = t.permute(tuple(names.index(g) for g in flat))
        for i, entry in enumerate(dst_pattern):
            if not isinstance(entry, str) and len(entry) > 1:
                t = t.flatten_dims(i, i + len(entry) - 1)
        return t._check_rank("rearrange")

    # -- reinterpretation

    def view(self, dtype: Any) -> NkiTensor:
        """The same bytes as another dtype; the last dimension scales by the ratio of the sizes."""
        new = as_dtype(dtype, "NkiTensor.view dtype")
        if self.dynamic is not None:
            self._refuse("view", "indirect view", self.dynamic.kind, "a view before select")
        self._check_bits(new)
        old_size, new_size = self.dtype.itemsize, new.itemsize
        if old_size == new_size:
            return self._make(self.shape, self.strides, self.offset, None, new)
        if self.shape[-1] != 1 and self.strides[-1] != 1:
            self._refuse("view", "last dimension's stride", self.strides[-1], "1")
        if new_size < old_size:
            k = old_size // new_size
            return self._make(
                (*self.shape[:-1], self.shape[-1] * k),
                (*[s * k for s in self.strides[:-1]], 1),
                self.offset * k,
                None,
                new,
            )
        k = new_size // old_size
        if self.shape[-1] % k:
            self._refuse("view", "last dimension", self.shape[-1], f"a multiple of {k} to become {new}")
        if self.offset % k or any(s % k for s, n in zip(self.strides[:-1], self.shape, strict=False) if n != 1):
            self._refuse("view", "alignment", self.get_pattern(), f"offset and strides in multiples of {k}")
        return self._make(
            (*self.shape[:-1], self.shape[-1] // k),
            (*[s // k for s in self.strides[:-1]], 1),
            self.offset // k,
            None,
            new,
        )

    reinterpret_cast = view

    def ap(
        self,
        pattern: Any,
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """An explicit access pattern `[[stride, count], ...]`, outermost first, over the storage.

        `offset` adds to the view's own offset (the API reference's reading; the language guide says the
        view's offset is ignored, which is the same for a tensor that was not sliced).
        """
        pairs = [tuple(p) for p in pattern]
        if not pairs or any(len(p) != 2 or not all(_is_int(x) for x in p) or p[1] < 1 for p in pairs):
            self._refuse("ap", "pattern", pattern, "pairs [stride, count >= 1]", AP_GUIDE)
        if self.dynamic is not None:
            self._refuse("ap", "indirect view", self.dynamic.kind, "a view without dynamic offset", AP_GUIDE)
        new = self.dtype if dtype is None else as_dtype(dtype, "NkiTensor.ap dtype")
        base = self.offset + (offset if offset is not None else 0)
        if new is not self.dtype:
            self._check_bits(new)
            if self.offset * self.dtype.itemsize % new.itemsize:
                self._refuse("ap", "offset", self.offset, f"a whole number of {new} elements", AP_GUIDE)
            base = self.offset * self.dtype.itemsize // new.itemsize + (offset if offset is not None else 0)
        strides, shape = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        t = self._make(shape, strides, base, None, new)._check_rank("ap")
        if scalar_offset is not None and vector_offset is not None:
            self._refuse("ap", "scalar_offset and vector_offset", "both", "at most one", AP_GUIDE)
        if not 0 <= indirect_dim < self.ndim:
            self._refuse("ap", "indirect_dim", indirect_dim, f"0..{self.ndim - 1}", AP_GUIDE)
        if t.on_chip and (strides[0] != t.row_elements and shape[0] != 1):
            self._refuse(
                "ap", "partition stride", strides[0], f"{t.row_elements}, the elements per partition", AP_GUIDE
            )
        if scalar_offset is not None:
            if not (_is_register(scalar_offset) or isinstance(scalar_offset, NkiTensor)):
                self._refuse("ap", "scalar_offset", repr(scalar_offset), "a register or a 1x1 SBUF tensor", AP_GUIDE)
            t.dynamic = Dynamic("scalar", scalar_offset, prod(self.shape[indirect_dim + 1 :]), None, indirect_dim)
        elif vector_offset is not None:
            if t.on_chip:
                self._refuse("ap", "buffer under vector_offset", self.buffer.name, "HBM", AP_GUIDE)
            if indirect_dim != 0:
                self._refuse("ap", "indirect_dim under vector_offset", indirect_dim, "0", AP_GUIDE)
            self._check_vector("ap", vector_offset)
            if vector_offset.shape[0] != shape[0]:
                self._refuse("ap", "vector_offset partitions", vector_offset.shape[0], shape[0], AP_GUIDE)
            t.strides = (0, *strides[1:])
            t.dynamic = Dynamic("vector", vector_offset, prod(self.shape[1:]), self.shape[0])
        else:
            t._check_bounds("ap")
        return t

    def indirect(self, index: NkiTensor, num_elem: int | None = None) -> NkiTensor:
        """Columns named by `index` (NeuronCore-v4): element i uses `index[i % G, i // G]` of its partition group."""
        if not isinstance(index, NkiTensor) or index.buffer is not MemoryRegion.sbuf or index.ndim != 2:
            self._refuse("indirect", "index", index, "a 2-D SBUF tensor")
        if not self.on_chip or index.shape[0] != self.shape[0]:
            self._refuse("indirect", "index partitions", index.shape[0], f"{self.shape[0]}, those of an on-chip view")
        if not index.dtype.is_integer:
            self._refuse("indirect", "index dtype", index.dtype, "an integer type")
        self._check_not_dynamic("indirect")
        count = index.size if num_elem is None else num_elem
        if not 1 <= count <= index.size:
            self._refuse("indirect", "num_elem", num_elem, f"1..{index.size}")
        dynamic = Dynamic("columns", index, 1, self.free_size)
        return self._make((self.shape[0], count), (self.row_elements, 0), self.offset, dynamic)

    # -- helpers

    def _make(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dynamic: Dynamic | None,
        dtype: DType | None = None,
    ) -> NkiTensor:
        t = NkiTensor.__new__(NkiTensor)
        t.shape = shape
        t.strides = strides
        t.offset = offset
        t.dtype = dtype if dtype is not None else self.dtype
        t.storage = self.storage
        t.buffer = self.buffer
        t.name = self.name
        t.dynamic = dynamic
        return t

    def _sliced(self, dim: int, start: int, stop: int, step: int) -> NkiTensor:
        if self.dynamic is not None and self.dynamic.kind in ("vector", "columns") and dim == self.dynamic.dim:
            if (start, stop, step) != (0, self.shape[dim], 1):
                self._refuse("slice", "an indirect dimension", dim, "dimensions that take no part in the indirection")
            return self
        shape, strides = list(self.shape), list(self.strides)
        shape[dim] = -(-(stop - start) // step)
        offset = self.offset + start * strides[dim]
        strides[dim] *= step
        if dim == 0 and step != 1 and self.on_chip and shape[0] > 1:
            self._refuse("slice", "partition step", step, "1: the hardware has no partition striding")
        return self._make(tuple(shape), tuple(strides), offset, self.dynamic)

    def _slice_bounds(self, dim: int, k: slice) -> tuple[int, int, int]:
        n = self.shape[dim]
        values = []
        for v, default in ((k.start, 0), (k.stop, n), (k.step, 1)):
            if v is None:
                values.append(default)
            elif _is_int(v):
                values.append(v)
            elif hasattr(v, "__index__") and not _is_register(v):
                values.append(int(v))
            else:
                self._refuse(
                    "[]", f"slice of dimension {dim}", k, "compile-time integers (nl.ds takes a register start)"
                )
        start, stop, step = values
        start = start + n if start < 0 else start
        stop = stop + n if stop < 0 else stop
        if step < 1:
            self._refuse("[]", f"step of dimension {dim}", step, ">= 1")
        if not 0 <= start < stop <= n:
            self._refuse("[]", f"slice of dimension {dim}", f"{start}:{stop}", f"0 <= start < stop <= {n}")
        return start, stop, step

    def _dynamic_slice(self, dim: int, key: DynamicSlice) -> NkiTensor:
        n = self.shape[dim]
        if not (_is_int(key.size) and 1 <= key.size <= n):
            self._refuse("ds", "size", key.size, f"1..{n}")
        if _is_int(key.start):
            if not 0 <= key.start <= n - key.size:
                self._refuse("ds", f"start of dimension {dim}", key.start, f"0..{n - key.size}")
            return self._sliced(dim, key.start, key.start + key.size, 1)
        self._check_not_dynamic("select")
        if self.on_chip and dim == 0:
            self._refuse("select", "dynamic index on the partition dimension", dim, "a free dimension")
        if isinstance(key.start, NkiTensor) and (
            key.start.size != 1 or key.start.buffer is not MemoryRegion.sbuf or not key.start.dtype.is_integer
        ):
            self._refuse("select", "index", key.start, "an integer 1x1 SBUF tensor or a register")
        shape = list(self.shape)
        shape[dim] = key.size
        dynamic = Dynamic("scalar", key.start, self.strides[dim], n - key.size + 1, dim)
        return self._make(tuple(shape), self.strides, self.offset, dynamic)

    def _drop(self, dims: list[int]) -> NkiTensor:
        """Remove indexed dims; on chip dim 0 stays and the result keeps two dims, in HBM one."""
        if not dims:
            return self
        floor = 1
        drop = list(dims)
        if self.on_chip:
            drop = [d for d in drop if d != 0]
            floor = 2
        keep_last = self.ndim - len(drop) < floor
        if keep_last and drop:
            drop = drop[:-1] if self.ndim - len(drop) + 1 >= floor else drop
        keep = [d for d in range(self.ndim) if d not in drop]
        if len(keep) == self.ndim:
            return self
        return self._make(
            tuple(self.shape[d] for d in keep), tuple(self.strides[d] for d in keep), self.offset, self.dynamic
        )

    def _wide(self, split: tuple[int, ...], at: int) -> NkiTensor:
        """`reshape_dim` for `rearrange`, whose intermediate views may split dim 0 trivially only."""
        return self.reshape_dim(at, split)

    def _infer(self, method: str, shape: tuple[int, ...], total: int) -> tuple[int, ...]:
        if not all(_is_int(n) and (n >= 1 or n == -1) for n in shape) or shape.count(-1) > 1 or not shape:
            self._refuse(method, "shape", shape, "positive sizes, at most one -1")
        if -1 in shape:
            rest = prod(n for n in shape if n != -1)
            shape = tuple(total // rest if n == -1 else n for n in shape)
        if prod(shape) != total:
            self._refuse(method, "number of elements", f"{shape}: {prod(shape)}", total)
        return shape

    def _dim(self, method: str, dim: int) -> int:
        if not (_is_int(dim) and -self.ndim <= dim < self.ndim):
            self._refuse(method, "dim", dim, f"{-self.ndim}..{self.ndim - 1}")
        return dim + self.ndim if dim < 0 else dim

    def _keep_dim0(self, method: str, breaks: bool, received: object) -> None:
        if not breaks:
            return
        if self.on_chip:
            self._refuse(method, "partition dimension", received, "dimension 0 unchanged on chip")
        if self.dynamic is not None and self.dynamic.kind == "vector":
            self._refuse(method, "indirect dimension", received, "dimension 0 unchanged after vector_select")

    def _check_rank(self, method: str) -> NkiTensor:
        if self.ndim > MAX_DIMS:
            self._refuse(method, "number of dimensions", self.ndim, f"at most {MAX_DIMS}")
        return self

    def _check_not_dynamic(self, method: str) -> None:
        if self.dynamic is not None:
            self._refuse(method, "indirect view", self.dynamic.kind, "one dynamic selection per tensor")

    def _check_vector(self, method: str, index: Any) -> None:
        if (
            not isinstance(index, NkiTensor)
            or index.buffer is not MemoryRegion.sbuf
            or index.ndim != 2
            or index.shape[1] != 1
            or index.dtype not in ("int32", "uint32")
        ):
            self._refuse(method, "vector_offset", index, "an SBUF tensor of shape (P, 1), int32 or uint32")

    def _check_bits(self, new: DType) -> None:
        if not self.storage.precise and new is not self.dtype and (self.dtype.is_low_precision or new.is_low_precision):
            raise NotImplementedError(
                f"NkiTensor.view: the all-float32 mode stores {self.dtype} and {new} as float32, so there are no bits "
                "to reinterpret; run in precise mode"
            )

    def _check_bounds(self, method: str) -> None:
        low = self.offset + sum(min(0, s * (n - 1)) for s, n in zip(self.strides, self.shape, strict=True))
        high = self.offset + sum(max(0, s * (n - 1)) for s, n in zip(self.strides, self.shape, strict=True))
        total = self.storage.nbytes // self.element_bytes
        if low < 0 or high >= total:
            self._refuse(method, "addresses", f"{low}..{high}", f"0..{total - 1}", AP_GUIDE)
        if self.on_chip:
            row = self.row_elements
            inner = sum(max(0, s * (n - 1)) for s, n in zip(self.strides[1:], self.shape[1:], strict=True))
            below = sum(min(0, s * (n - 1)) for s, n in zip(self.strides[1:], self.shape[1:], strict=True))
            column = self.offset % row
            if column + inner >= row or column + below < 0:
                self._refuse(
                    method, "columns", f"{column + below}..{column + inner}", f"0..{row - 1} in a partition", AP_GUIDE
                )

    def _refused(self, method: str, rule: str, received: object, allowed: object, source: str) -> NkiError:
        return NkiError(f"NkiTensor.{method}", "", rule, received=received, allowed=allowed, source=source)

    def _refuse(self, method: str, rule: str, received: object, allowed: object, source: str = GUIDE) -> NoReturn:
        raise self._refused(method, rule, received, allowed, source)


class VirtualRegister(NKIObject):
    """A 32-bit scalar in an engine's register file; its value exists at run time only."""

    value: int | float

    def __init__(self, state: Any = None, frozen: bool = False) -> None:
        self.value = 0 if state is None else state
        self.frozen = frozen

    def __bool__(self) -> bool:
        # `while reg:` is the documented (deprecated) dynamic loop of the parser front end.
        return self.value != 0

    def __index__(self) -> NoReturn:
        raise TypeError(
            "VirtualRegister: a register's value is not known while the kernel is built, so int() and range() "
            "do not take one; use nl.fori_loop, nl.while_loop or scalar_offset"
        )

    __int__ = __index__

    def __repr__(self) -> str:
        return f"VirtualRegister({self.value})"


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_register(x: object) -> bool:
    return isinstance(x, VirtualRegister)


def _merge(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """One dimension for several, or None where they are not contiguous."""
    size, stride = 1, 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = s
        elif s != size * stride:
            return None
        size *= n
    return size, stride


def _reshape_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of `new` over the same elements, or None where that needs a copy."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    out: list[int] = []
    i = 0
    j = 0
    while j < len(new):
        if new[j] == 1:
            out.append(1)
            j += 1
            continue
        ni, nj, i1, j1 = 1, new[j], i, j + 1
        if i >= len(old):
            return None
        ni = old[i][0]
        i1 = i + 1
        while ni != nj:
            if ni < nj:
                if i1 >= len(old):
                    return None
                ni *= old[i1][0]
                i1 += 1
            else:
                if j1 >= len(new):
                    return None
                nj *= new[j1]
                j1 += 1
        block = _merge(tuple(n for n, _ in old[i:i1]), tuple(s for _, s in old[i:i1]))
        if block is None:
            return None
        out.extend(s * block[1] for s in row_major_strides(new[j:j1]))
        i, j = i1, j1
    return tuple(out)


def is_hbm(buffer: MemoryRegion) -> bool:
    """Whether a buffer is HBM."""
    return buffer in HBM
