"""`NkiTensor`: a strided view of a storage, and the view operations of the NKI language guide.

An element's address is `offset + sum(stride * index)`, in elements of the view's dtype from the start
of the storage, on chip and in HBM alike; on chip dimension 0 is the partition dimension and its
stride is the number of elements one partition holds.
"""

from __future__ import annotations

from math import prod
from typing import Any, NoReturn

from nkisim.dtypes import DType, as_dtype
from nkisim.layout import is_row_major, merge, reshape_strides, row_major_strides
from nkisim.memory import MemoryRegion
from nkisim.objects import VirtualRegister
from nkisim.view import AP_GUIDE, GUIDE, Dynamic, DynamicSlice, View, as_int

ALL = slice(None)


class NkiTensor(View):
    """A view of a storage. Create one with `nl.ndarray`; every view operation shares the storage.

    On chip a view has at least two dimensions and keeps the partition dimension first. No operation
    makes a view of more than five dimensions; a tensor in HBM may have been created with more. Only
    `[]` takes negative numbers: they are not documented for the methods.
    """

    def is_contiguous(self) -> bool:
        """Whether the view is dense in row-major order; on chip within each partition."""
        first = 1 if self.on_chip else 0
        return is_row_major(self.shape[first:], self.strides[first:])

    def get_pattern(self) -> list[list[int]]:
        """The view as `[[stride, count], ...]`, as `ap` takes it."""
        return [[stride, n] for stride, n in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self) -> bool:
        """Whether part of the address is known only at run time."""
        return self.dynamic is not None

    # -- indexing

    def __getitem__(self, key: Any) -> NkiTensor:
        """NumPy-style basic indexing: int, slice, Ellipsis, `nl.ds`, a run-time index, and tuples of them.

        An integer drops its dimension, but on chip the partition dimension stays with size 1, and so
        does the last dimension where nothing else would be left beside it (in HBM: at all).
        """
        return self._index("__getitem__", key if type(key) is tuple else (key,))

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise NotImplementedError(
            "NkiTensor.__setitem__: assignment into a tensor is not documented for NKI 0.6; "
            "write with an nki.isa instruction that has dst= instead"
        )

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Elements `start:end:step` of one dimension."""
        dim = self._dim("slice", "dim", dim)
        n = self.shape[dim]
        first, last, by = as_int(start), as_int(end), as_int(step)
        if first is None or last is None or not 0 <= first < last <= n:
            self._refuse("slice", "end", f"bounds of dimension {dim}", f"{start}:{end}", f"0 <= start < end <= {n}")
        if by is None or by < 1:
            self._refuse("slice", "step", "value", step, "an int >= 1")
        return self._index("slice", (*[ALL] * dim, slice(first, last, by)))

    def select(self, dim: int, index: Any) -> NkiTensor:
        """One element of a dimension, which is removed; `index` is an int, a register or a 1x1 SBUF tensor."""
        dim = self._dim("select", "dim", dim)
        at = as_int(index)
        if at is not None and not 0 <= at < self.shape[dim]:
            self._refuse("select", "index", f"index of dimension {dim}", index, f"0..{self.shape[dim] - 1}")
        return self._index("select", (*[ALL] * dim, index))

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Row `vector_offset[p]` of dimension 0 for partition p; HBM only."""
        method = "vector_select"
        if as_int(dim) != 0:
            self._refuse(method, "dim", "value", dim, "0")
        if self.on_chip:
            self._refuse(method, "", "buffer", self.buffer.name, "HBM")
        self._check_not_dynamic(method)
        self._check_vector(method, vector_offset)
        if self.strides[0] == 0 or any(
            s > self.strides[0] for s, n in zip(self.strides, self.shape, strict=True) if n > 1
        ):
            # Only a dimension of the base tensor can be looked up, and only the outermost one.
            self._refuse(method, "dim", "strides", self.strides, "dimension 0 not permuted and not broadcast", AP_GUIDE)
        dynamic = Dynamic("vector", vector_offset, self.strides[0], self.shape[0])
        shape = (vector_offset.shape[0], *self.shape[1:])
        return self._make(method, shape, (0, *self.strides[1:]), self.offset, dynamic)

    # -- shape

    def permute(self, dims: tuple[int, ...]) -> NkiTensor:
        """Dimensions in another order."""
        order = tuple(dims)
        if sorted(order) != list(range(self.ndim)):
            self._refuse("permute", "dims", "order", order, f"a permutation of 0..{self.ndim - 1}")
        if order[0] != 0:
            self._keep_dim0("permute", "dims", order)
        return self._reshaped("permute", tuple(self.shape[d] for d in order), tuple(self.strides[d] for d in order))

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat a dimension of size 1 `size` times, with stride 0."""
        dim = self._dim("broadcast", "dim", dim)
        times = as_int(size)
        if times is None or times < 1:
            self._refuse("broadcast", "size", "value", size, "an int >= 1")
        if self.shape[dim] != 1:
            self._refuse("broadcast", "dim", f"size of dimension {dim}", self.shape[dim], "1")
        if dim == 0:
            self._keep_dim0("broadcast", "dim", dim)
        return self._replaced("broadcast", dim, dim + 1, (times,), (0,))

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert a dimension of size 1 before dimension `dim`."""
        at = as_int(dim)
        if at is None or not 0 <= at <= self.ndim:
            self._refuse("expand_dim", "dim", "value", dim, f"0..{self.ndim}")
        if at == 0:
            self._keep_dim0("expand_dim", "dim", dim)
        stride = self.shape[at] * self.strides[at] if at < self.ndim else 1
        return self._replaced("expand_dim", at, at, (1,), (stride,))

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove a dimension of size 1."""
        dim = self._dim("squeeze_dim", "dim", dim)
        if self.shape[dim] != 1:
            self._refuse("squeeze_dim", "dim", f"size of dimension {dim}", self.shape[dim], "1")
        if dim == 0:
            self._keep_dim0("squeeze_dim", "dim", dim)
        return self._replaced("squeeze_dim", dim, dim + 1, (), ())

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> NkiTensor:
        """Split one dimension; one element of `shape` may be -1."""
        dim = self._dim("reshape_dim", "dim", dim)
        new = self._infer("reshape_dim", shape, self.shape[dim])
        if dim == 0 and len(new) > 1:
            self._keep_dim0("reshape_dim", "dim", dim)
        strides = tuple(stride * self.strides[dim] for stride in row_major_strides(new))
        return self._replaced("reshape_dim", dim, dim + 1, new, strides)

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge dimensions `start_dim..end_dim` (inclusive), which must be contiguous."""
        a, b = self._dim("flatten_dims", "start_dim", start_dim), self._dim("flatten_dims", "end_dim", end_dim)
        if a > b:
            self._refuse("flatten_dims", "end_dim", "order", f"{a}..{b}", "start_dim <= end_dim")
        if a == 0:
            self._keep_dim0("flatten_dims", "start_dim", start_dim)
        merged = merge(self.shape[a : b + 1], self.strides[a : b + 1])
        if merged is None:
            received = self.get_pattern()[a : b + 1]
            self._refuse("flatten_dims", "end_dim", "[stride, count] of dimensions", received, "contiguous in memory")
        return self._replaced("flatten_dims", a, b + 1, (merged[0],), (merged[1],))

    def reshape(self, shape: tuple[int, ...]) -> NkiTensor:
        """The same elements under another shape, without a copy."""
        new = self._infer("reshape", shape, self.size)
        keep = 1 if self.on_chip or self._is_gather() else 0
        if keep and new[0] != self.shape[0]:
            self._keep_dim0("reshape", "shape", new)
        strides = reshape_strides(self.shape[keep:], self.strides[keep:], new[keep:])
        if strides is None:
            received = f"{new} of {self.get_pattern()}"
            self._refuse("reshape", "shape", "layout", received, "a shape that needs no copy")
        return self._reshaped("reshape", new, self.strides[:keep] + strides)

    def rearrange(
        self,
        src_pattern: tuple[Any, ...],
        dst_pattern: tuple[Any, ...],
        fixed_sizes: dict[str, int] | None = None,
    ) -> NkiTensor:
        """Split, reorder and merge dimensions by name: `t.rearrange(('p', ('h', 'w')), ('p', 'w', 'h'), {'h': 4})`."""
        source, target = _groups(src_pattern), _groups(dst_pattern)
        names = [name for group in source for name in group]
        if len(source) != self.ndim or not all(source) or len(set(names)) != len(names):
            allowed = f"{self.ndim} names or tuples of names, each name once"
            self._refuse("rearrange", "src_pattern", "names", src_pattern, allowed)
        if not all(target) or sorted(name for group in target for name in group) != sorted(names):
            self._refuse("rearrange", "dst_pattern", "names", dst_pattern, f"each of {names} once")
        sizes: dict[str, int] = {}
        for name, given in (fixed_sizes or {}).items():
            size = as_int(given)
            if name not in names or size is None or size < 1:
                self._refuse(
                    "rearrange", "fixed_sizes", "entry", f"{name!r}: {given!r}", f"a size >= 1 for one of {names}"
                )
            sizes[name] = size
        strides: dict[str, int] = {}
        for group, n, stride in zip(source, self.shape, self.strides, strict=True):
            unknown = [name for name in group if name not in sizes]
            if len(unknown) > 1:
                self._refuse("rearrange", "fixed_sizes", "sizes not given", unknown, f"all but one of {group}")
            known = prod(sizes[name] for name in group if name in sizes)
            sizes.update(dict.fromkeys(unknown, n // known))
            split = tuple(sizes[name] for name in group)
            if prod(split) != n:
                self._refuse("rearrange", "fixed_sizes", f"sizes of {group}", split, f"a product of {n}")
            strides.update(zip(group, (step * stride for step in row_major_strides(split)), strict=True))
        if source[0] != target[0] or len(source[0]) > 1:
            self._keep_dim0("rearrange", "dst_pattern", dst_pattern)
        merged = []
        for group in target:
            dimension = merge(tuple(sizes[name] for name in group), tuple(strides[name] for name in group))
            if dimension is None:
                received = [[strides[name], sizes[name]] for name in group]
                self._refuse(
                    "rearrange", "dst_pattern", f"[stride, count] of {group}", received, "contiguous in memory"
                )
            merged.append(dimension)
        return self._reshaped("rearrange", tuple(n for n, _ in merged), tuple(stride for _, stride in merged))

    # -- reinterpretation

    def view(self, dtype: Any) -> NkiTensor:
        """The same bytes as another dtype; the last dimension scales by the ratio of the sizes."""
        new = as_dtype(dtype, "NkiTensor.view dtype")
        if self.dynamic is not None:
            self._refuse("view", "", "indirect view", self.dynamic.kind, "a view before the dynamic selection")
        self._check_bits(self.dtype, new)
        old_size, new_size = self.dtype.itemsize, new.itemsize
        shape, strides, offset = self.shape, self.strides, self.offset
        if old_size != new_size and shape[-1] != 1 and strides[-1] != 1:
            self._refuse("view", "dtype", "stride of the last dimension", strides[-1], "1, contiguous in memory")
        if new_size < old_size:
            k = old_size // new_size
            shape, strides, offset = (*shape[:-1], shape[-1] * k), (*[s * k for s in strides[:-1]], 1), offset * k
        elif new_size > old_size:
            k = new_size // old_size
            if shape[-1] % k:
                self._refuse(
                    "view", "dtype", "size of the last dimension", shape[-1], f"a multiple of {k} to become {new}"
                )
            if offset % k or any(s % k for s, n in zip(strides[:-1], shape[:-1], strict=True) if n != 1):
                received = f"offset {offset}, strides {strides}"
                self._refuse("view", "dtype", "alignment", received, f"offset and outer strides in multiples of {k}")
            shape, strides, offset = (*shape[:-1], shape[-1] // k), (*[s // k for s in strides[:-1]], 1), offset // k
        return self._make("view", shape, strides, offset, None, new)

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

        `offset` adds to the view's own offset (the API reference's reading; the guides say the view's
        offset is ignored, which is the same for a tensor that was not sliced). A run-time index counts
        elements of this view's dimension `indirect_dim`, whatever `dtype` is.
        """
        new = self.dtype if dtype is None else as_dtype(dtype, "NkiTensor.ap dtype")
        strides, shape = self._pattern(pattern)
        shift = 0 if offset is None else as_int(offset)
        if shift is None:
            self._refuse("ap", "offset", "type", repr(offset), "an int; scalar_offset takes run-time values", AP_GUIDE)
        self._check_not_dynamic("ap")
        self._check_bits(self.dtype, new)
        if self.offset * self.dtype.itemsize % new.itemsize:
            received = f"{self.offset} elements of {self.dtype}"
            self._refuse("ap", "dtype", "offset of the view", received, f"a whole number of {new} elements", AP_GUIDE)
        base = self.offset * self.dtype.itemsize // new.itemsize
        t = self._make("ap", shape, strides, base + shift, None, new)
        if t.on_chip and shape[0] != 1 and strides[0] * t.element_bytes != t.storage.row_bytes:
            allowed = f"{t.row_elements}, the elements per partition"
            self._refuse("ap", "pattern", "partition stride", strides[0], allowed, AP_GUIDE)
        if scalar_offset is not None and vector_offset is not None:
            self._refuse("ap", "scalar_offset", "scalar_offset and vector_offset", "both", "at most one", AP_GUIDE)
        dim = as_int(indirect_dim)
        if dim is None or not 0 <= dim < self.ndim:
            self._refuse("ap", "indirect_dim", "value", indirect_dim, f"0..{self.ndim - 1}", AP_GUIDE)
        if scalar_offset is not None:
            self._check_scalar("ap", "scalar_offset", scalar_offset)
            if t.on_chip and dim == 0 and self.shape[0] != 1:
                self._refuse("ap", "indirect_dim", "dynamic index on the partition dimension", dim, "a free dimension")
            t.dynamic = Dynamic("scalar", scalar_offset, self._index_stride(dim, new))
        elif vector_offset is not None:
            if t.on_chip:
                self._refuse("ap", "vector_offset", "buffer", self.buffer.name, "HBM", AP_GUIDE)
            if dim != 0:
                self._refuse("ap", "indirect_dim", "value under vector_offset", dim, "0", AP_GUIDE)
            self._check_vector("ap", vector_offset, columns=True)
            if vector_offset.size < shape[0]:
                allowed = f"at least {shape[0]}"
                self._refuse("ap", "vector_offset", "number of elements", vector_offset.size, allowed, AP_GUIDE)
            t.strides = (0, *strides[1:])
            t.dynamic = Dynamic("vector", vector_offset, self._index_stride(0, new), self.shape[0])
        else:
            t._check_bounds("ap")
        return t

    def indirect(self, index: Any, num_elem: int | None = None) -> NkiTensor:
        """Columns named by `index` (NeuronCore-v4): element i uses `index[i % G, i // G]` of its partition group."""
        method = "indirect"
        if not isinstance(index, NkiTensor) or index.buffer is not MemoryRegion.sbuf or index.ndim != 2:
            self._refuse(method, "index", "type", repr(index), "a 2-D SBUF tensor")
        if not index.dtype.is_integer:
            self._refuse(method, "index", "dtype", index.dtype, "an integer type")
        if not self.on_chip:
            self._refuse(method, "", "buffer", self.buffer.name, "sbuf or psum")
        if index.shape[0] != self.shape[0]:
            self._refuse(method, "index", "partitions", index.shape[0], f"{self.shape[0]}, those of the view")
        self._check_not_dynamic(method)
        if not self.is_contiguous():
            received = self.get_pattern()[1:]
            self._refuse(method, "", "[stride, count] of free dimensions", received, "contiguous in memory")
        count = index.size if num_elem is None else as_int(num_elem)
        if count is None or not 1 <= count <= index.size:
            self._refuse(method, "num_elem", "value", num_elem, f"1..{index.size}")
        dynamic = Dynamic("columns", index, 1, self.free_size)
        return self._make(method, (self.shape[0], count), (self.row_elements, 0), self.offset, dynamic)

    def _index(self, method: str, keys: tuple[Any, ...]) -> NkiTensor:
        """`__getitem__` with a tuple of keys; dimensions after the last key stay whole."""
        if len(keys) > len(self.shape):
            keys = self._filled(keys)
        shape: list[int] = []
        strides: list[int] = []
        offset, dynamic, on_chip = self.offset, self.dynamic, self.on_chip
        # What has no rule of its own comes first: kernels take several views for each instruction.
        looked_up = dynamic is not None and dynamic.kind == "vector"
        for dim, (k, n, stride) in enumerate(zip(keys, self.shape, self.strides, strict=False)):
            start: Any
            step, keep = 1, True
            plain = dim > 0 or not looked_up
            if type(k) is slice:
                first, stop = k.start, k.stop
                if k.step is None:
                    if stop is None:
                        stop = n
                    if first is None:
                        if stop is n:
                            shape.append(n)
                            strides.append(stride)
                            continue
                        first = 0
                    if plain and type(first) is int and type(stop) is int and 0 <= first < stop <= n:
                        shape.append(stop - first)
                        strides.append(stride)
                        offset += first * stride
                        continue
                start, size, step = self._slice_range(method, dim, k)
            elif type(k) is int and plain and 0 <= k < n:
                offset += k * stride
                if dim == 0 and on_chip:
                    shape.append(1)
                    strides.append(stride)
                continue
            elif k is Ellipsis:
                return self._index(method, self._filled(keys))
            elif isinstance(k, DynamicSlice):
                start, size = as_int(k.start), self._ds_size(method, dim, k)
            else:
                start, size, keep = as_int(k), 1, dim == 0 and on_chip
                if start is not None and start < 0:
                    start += n
            if start is None:
                dynamic = self._dynamic_start(method, dim, k, size, dynamic)
            elif 0 <= start <= n - size:
                offset += start * stride
            else:
                allowed = f"0..{n - size}" if isinstance(k, DynamicSlice) else f"{-n}..{n - 1}"
                self._refuse(method, "key", f"index of dimension {dim}", k, allowed, GUIDE)
            if dim == 0 and (on_chip or looked_up):
                self._check_dim0_range(method, start, size, step)
            if keep:
                shape.append(size)
                strides.append(stride * step)
        if len(keys) < len(self.shape):
            shape.extend(self.shape[len(keys) :])
            strides.extend(self.strides[len(keys) :])
        elif len(shape) < (2 if on_chip else 1):
            shape.append(1)
            strides.append(self.strides[-1])
        return self._make(method, tuple(shape), tuple(strides), offset, dynamic)

    def _filled(self, keys: tuple[Any, ...]) -> tuple[Any, ...]:
        """The keys with full slices in place of the Ellipsis."""
        dots = [i for i, k in enumerate(keys) if k is Ellipsis]
        missing = len(self.shape) - len(keys) + 1
        if len(dots) != 1 or missing < 0:
            allowed = f"at most {len(self.shape)} and one Ellipsis"
            self._refuse("__getitem__", "key", "number of indices", len(keys), allowed, GUIDE)
        return (*keys[: dots[0]], *[ALL] * missing, *keys[dots[0] + 1 :])

    def _slice_range(self, method: str, dim: int, k: Any) -> tuple[int, int, int]:
        """Start, size and step of a slice; negative bounds count from the end."""
        n = self.shape[dim]
        start = 0 if k.start is None else as_int(k.start)
        stop = n if k.stop is None else as_int(k.stop)
        step = 1 if k.step is None else as_int(k.step)
        if start is None or stop is None or step is None:
            self._refuse(method, "key", f"slice of dimension {dim}", k, "ints; nl.ds takes a register as start", GUIDE)
        if start < 0:
            start += n
        if stop < 0:
            stop += n
        if step < 1:
            self._refuse(method, "key", f"step of dimension {dim}", step, ">= 1", GUIDE)
        if not 0 <= start < stop <= n:
            # NumPy would shorten the slice; a kernel that relies on that has a wrong bound.
            self._refuse(method, "key", f"slice of dimension {dim}", k, f"0 <= start < stop <= {n}", GUIDE)
        return start, (stop - start + step - 1) // step, step

    def _ds_size(self, method: str, dim: int, k: DynamicSlice) -> int:
        size = as_int(k.size)
        if size is None or not 1 <= size <= self.shape[dim]:
            self._refuse(method, "key", f"size of nl.ds in dimension {dim}", k.size, f"1..{self.shape[dim]}", GUIDE)
        return size

    def _dynamic_start(self, method: str, dim: int, k: Any, size: int, before: Dynamic | None) -> Dynamic:
        """The run-time part of the address where dimension `dim` starts at a register or a 1x1 tensor."""
        index = k.start if isinstance(k, DynamicSlice) else k
        if not isinstance(index, (VirtualRegister, NkiTensor)):
            allowed = "an int, slice, Ellipsis, nl.ds, register or 1x1 SBUF tensor"
            self._refuse(method, "key", f"index of dimension {dim}", repr(index), allowed, GUIDE)
        if before is not None:
            self._refuse(method, "key", "second dynamic index", before.kind, "one dynamic selection per tensor")
        if self.on_chip and dim == 0:
            self._refuse(method, "key", "dynamic index on the partition dimension", dim, "a free dimension")
        self._check_scalar(method, "index", index)
        if self.strides[dim] == 0:
            self._refuse(method, "key", "dynamic index on a broadcast dimension", dim, "a dimension of the base tensor")
        return Dynamic("scalar", index, self.strides[dim], self.shape[dim] - size + 1)

    def _pattern(self, pattern: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides and shape of an `ap` pattern."""
        strides: list[int] = []
        shape: list[int] = []
        for pair in pattern if isinstance(pattern, (list, tuple)) else ():
            numbers = [as_int(x) for x in pair] if isinstance(pair, (list, tuple)) else []
            stride, count = numbers if len(numbers) == 2 else (None, None)
            if stride is None or count is None or count < 1:
                self._refuse("ap", "pattern", "[stride, count] pair", pair, "two ints, the count >= 1", AP_GUIDE)
            strides.append(stride)
            shape.append(count)
        if not shape:
            self._refuse("ap", "pattern", "type", repr(pattern), "a list of [stride, count] pairs", AP_GUIDE)
        return tuple(strides), tuple(shape)

    def _index_stride(self, dim: int, new: DType) -> int:
        """Elements of `new` that one step of a run-time index on dimension `dim` moves."""
        step: int = self.strides[dim] * self.dtype.itemsize
        if step % new.itemsize:
            allowed = f"a whole number of {new} elements"
            self._refuse("ap", "dtype", f"bytes per index of dimension {dim}", step, allowed, AP_GUIDE)
        return step // new.itemsize


def _groups(pattern: Any) -> list[tuple[str, ...]]:
    """The entries of a `rearrange` pattern as tuples of names."""
    return [(entry,) if isinstance(entry, str) else tuple(entry) for entry in pattern]
