"""The state of a tensor view, how further views are made from it, and the checks they share.

`NkiTensor` in tensor.py adds the documented operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import numpy as np

from nkisim.dtypes import DType, as_dtype
from nkisim.errors import NkiError
from nkisim.hardware import TRN3
from nkisim.layout import row_major_strides, span
from nkisim.memory import ON_CHIP, MemoryRegion, Storage
from nkisim.objects import NKIObject, VirtualRegister
from nkisim.unknown import Unknown

GUIDE = "NKI language guide, tensor indexing (NKI 0.6)"
AP_GUIDE = "NKI access patterns guide (NKI 0.6)"
MAX_DIMS = TRN3.view_max_dims

# Functions that do what an operator says.
_INSTEAD = {
    "+": "nl.add(x, y), nki.isa.tensor_tensor or nki.isa.tensor_scalar",
    "-": "nl.subtract(x, y), nl.negative(x), nki.isa.tensor_tensor or nki.isa.tensor_scalar",
    "*": "nl.multiply(x, y), nki.isa.tensor_tensor or nki.isa.tensor_scalar",
    "/": "nl.reciprocal(y) and nl.multiply(x, ...)",
    "**": "nl.power(x, y) or nl.square(x)",
    "@": "nl.matmul(x, y) or nki.isa.nc_matmul",
    "==": "nl.equal(x, y) or nki.isa.tensor_scalar",
    "<": "nl.less(x, y) or nki.isa.tensor_scalar",
    "<=": "nl.less_equal(x, y) or nki.isa.tensor_scalar",
    ">": "nl.greater(x, y) or nki.isa.tensor_scalar",
    ">=": "nl.greater_equal(x, y) or nki.isa.tensor_scalar",
    "&": "nl.bitwise_and(x, y)",
    "|": "nl.bitwise_or(x, y)",
    "^": "nl.bitwise_xor(x, y)",
    "~": "nl.invert(x)",
    "<<": "nl.left_shift(x, y)",
    ">>": "nl.right_shift(x, y)",
    "abs()": "nl.abs(x)",
}

_View = TypeVar("_View", bound="View")


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

    kind: Literal["scalar", "vector", "columns"]
    index: Any
    stride: int
    extent: int | None = None


class View(NKIObject, Unknown):
    """A strided view of a storage."""

    storage: Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: DType
    name: str
    dynamic: Dynamic | None
    buffer: MemoryRegion
    on_chip: bool  # in SBUF or PSUM, where dimension 0 is the partition dimension
    carrier: np.dtype[Any]  # NumPy type that one element is stored in

    __slots__ = ("buffer", "carrier", "dtype", "dynamic", "name", "offset", "on_chip", "shape", "storage", "strides")
    __hash__: ClassVar[Any] = object.__hash__
    __iter__: ClassVar[None] = None  # else Python would iterate by [0], [1], ... until an error

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
        self.on_chip = buffer in ON_CHIP
        self.name = name
        self.dynamic = None
        # Without a storage the tensor is a placeholder that no instruction takes.
        self.carrier = self.dtype.numpy if storage is None else self.dtype.carrier(storage.precise)
        if storage is not None:
            self._check_storage(storage)

    def _check_storage(self, storage: Storage) -> None:
        info = storage.info
        if self.shape == info.shape and self.dtype is info.dtype and self.buffer is info.buffer:
            return
        self._check_bits(info.dtype, self.dtype)
        fits = self.size * self.carrier.itemsize == storage.nbytes
        if not fits or self.buffer is not info.buffer or (self.on_chip and self.shape[0] != info.partitions):
            allowed = f"{info.dtype}{list(info.shape)} in {info.buffer.name}"
            self._refuse("", "storage", "tensor and storage differ", repr(self), allowed)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def free_size(self) -> int:
        """Elements per partition: the product of all dimensions but the first."""
        shape = self.shape
        return shape[1] if len(shape) == 2 else prod(shape[1:])

    @property
    def element_bytes(self) -> int:
        """Bytes one element takes in the simulator's storage."""
        return self.carrier.itemsize

    @property
    def row_elements(self) -> int:
        """Elements of this dtype that one partition of the storage holds (on chip)."""
        return self.storage.row_bytes // self.carrier.itemsize

    @property
    def storage_elements(self) -> int:
        """Elements of this dtype that the whole storage holds."""
        return self.storage.nbytes // self.carrier.itemsize

    @property
    def start_partition(self) -> int:
        """First partition the view touches (on chip)."""
        storage = self.storage
        address = storage.info.address
        first = 0 if address is None else address[0]
        return first + self.offset * self.carrier.itemsize // storage.row_bytes if self.offset else first

    def __repr__(self) -> str:
        return f"NkiTensor({self.name}: {self.dtype}{list(self.shape)} in {self.buffer.name})"

    def __bool__(self) -> NoReturn:
        self._refuse(
            "__bool__", "", "value of a tensor in Python control flow", repr(self), "compile-time values", GUIDE
        )

    def __eq__(self, other: object) -> bool:
        # Python would answer False, and the kernel's `if t == 0:` silently take a branch.
        if isinstance(other, (int, float, np.generic, VirtualRegister)):
            self._refuse_operator("==")
        return self is other

    def _refuse_operator(self, symbol: str) -> NoReturn:
        self._refuse(
            f"operator {symbol}",
            "",
            "Python operator on a tensor, whose contents are not known while the kernel is built",
            repr(self),
            _INSTEAD.get(symbol, "an nki.isa instruction or a function of nki.language"),
            GUIDE,
        )

    # -- further views

    def _make(
        self: _View,
        method: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dynamic: Dynamic | None,
        dtype: DType | None = None,
    ) -> _View:
        if self.dynamic is not None and self.dynamic.kind == "columns":
            self._refuse(method, "", "view of an .indirect() view", repr(self), "an instruction's operand only")
        ndim, least = len(shape), 2 if self.on_chip else 1
        if ndim < least or (ndim > MAX_DIMS and ndim > len(self.shape)):
            self._refuse(method, "", "number of dimensions", f"{len(shape)}: {shape}", f"{least}..{MAX_DIMS}", GUIDE)
        t = object.__new__(type(self))
        t.shape = shape
        t.strides = strides
        t.offset = offset
        t.storage = self.storage
        t.buffer = self.buffer
        t.on_chip = self.on_chip
        t.name = self.name
        t.dynamic = dynamic
        if dtype is None or dtype is self.dtype:
            t.dtype = self.dtype
            t.carrier = self.carrier
        else:
            t.dtype = dtype
            t.carrier = dtype.carrier(self.storage.precise)
            if t.on_chip and t.storage.row_bytes % t.carrier.itemsize:
                allowed = f"a multiple of {t.carrier.itemsize} to become {dtype}"
                self._refuse(method, "dtype", "bytes per partition of the tensor", t.storage.row_bytes, allowed)
        return t

    def _reshaped(self: _View, method: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> _View:
        return self._make(method, shape, strides, self.offset, self.dynamic)

    def _replaced(self: _View, method: str, a: int, b: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> _View:
        """The view with other dimensions in place of dimensions `a` to `b`, the latter not included."""
        return self._reshaped(
            method, self.shape[:a] + shape + self.shape[b:], self.strides[:a] + strides + self.strides[b:]
        )

    def _infer(self, method: str, shape: Any, total: int) -> tuple[int, ...]:
        """A requested shape of `total` elements, with its -1 filled in."""
        new: list[int] = []
        for given in shape if isinstance(shape, (tuple, list)) else ():
            n = as_int(given)
            if n is None or (n < 1 and n != -1):
                self._refuse(method, "shape", "size", repr(given), "a positive int, or one -1")
            new.append(n)
        if not new or new.count(-1) > 1:
            self._refuse(method, "shape", "value", repr(shape), "a tuple of positive ints with at most one -1")
        if -1 in new:
            new[new.index(-1)] = max(total // prod(n for n in new if n != -1), 1)
        if prod(new) != total:
            self._refuse(method, "shape", "number of elements", f"{prod(new)} in {tuple(shape)}", total)
        return tuple(new)

    # -- checks

    def _is_gather(self) -> bool:
        return self.dynamic is not None and self.dynamic.kind == "vector"

    def _dim(self, method: str, operand: str, dim: Any) -> int:
        number = as_int(dim)
        if number is None or not 0 <= number < self.ndim:
            self._refuse(method, operand, "value", repr(dim), f"0..{self.ndim - 1}")
        return number

    def _keep_dim0(self, method: str, operand: str, received: object) -> None:
        """Refuse a change of dimension 0 where it is the partition or the gathered dimension."""
        if self.on_chip:
            self._refuse(method, operand, "partition dimension", received, "dimension 0 unchanged on chip")
        if self._is_gather():
            self._refuse(method, operand, "indirect dimension", received, "dimension 0 unchanged after vector_select")

    def _check_dim0_range(self, method: str, start: int | None, size: int, step: int) -> None:
        if self._is_gather() and (start, size, step) != (0, self.shape[0], 1):
            self._refuse(method, "key", "index of an indirect dimension", 0, "dimensions that are not looked up")
        if step != 1 and size != 1:
            self._refuse(method, "key", "step of the partition dimension", step, "1", AP_GUIDE)

    def _check_not_dynamic(self, method: str) -> None:
        if self.dynamic is not None:
            self._refuse(method, "", "indirect view", self.dynamic.kind, "one dynamic selection per tensor")

    def _check_vector(self, method: str, index: Any, columns: bool = False) -> None:
        # Several columns are legal under dma_transpose only, which the instruction checks.
        if (
            not isinstance(index, View)
            or index.buffer is not MemoryRegion.sbuf
            or index.ndim != 2
            or (index.shape[1] != 1 and not columns)
            or index.dtype not in ("int32", "uint32")
        ):
            allowed = "an SBUF tensor of shape (P, 1), int32 or uint32"
            self._refuse(method, "vector_offset", "index", repr(index), allowed)

    def _check_scalar(self, method: str, operand: str, index: Any) -> None:
        if isinstance(index, VirtualRegister):
            return
        if (
            not isinstance(index, View)
            or index.size != 1
            or index.buffer is not MemoryRegion.sbuf
            or not index.dtype.is_integer
        ):
            self._refuse(method, operand, "index", repr(index), "a register or an integer 1x1 SBUF tensor")

    def _check_bits(self, old: DType, new: DType) -> None:
        if old is new or self.storage.precise or not (old.is_low_precision or new.is_low_precision):
            return
        raise NotImplementedError(
            f"NkiTensor.view: the all-float32 mode stores {old} and {new} as float32, so there are no bits to "
            "reinterpret; run in precise mode"
        )

    def _check_bounds(self, method: str) -> None:
        low, high = span(self.shape, self.strides)
        if self.offset + low < 0 or self.offset + high >= self.storage_elements:
            received = f"{self.offset + low}..{self.offset + high}"
            self._refuse(method, "pattern", "addresses", received, f"0..{self.storage_elements - 1}", AP_GUIDE)
        if self.on_chip:
            row = self.row_elements
            column = self.offset % row
            low, high = span(self.shape[1:], self.strides[1:])
            if column + low < 0 or column + high >= row:
                received = f"{column + low}..{column + high}"
                self._refuse(method, "pattern", "columns", received, f"0..{row - 1} in a partition", AP_GUIDE)

    def _refuse(
        self, method: str, operand: str, rule: str, received: object, allowed: object, source: str = ""
    ) -> NoReturn:
        where = f"NkiTensor.{method}" if method else "NkiTensor"
        source = source or f"nki.language.{where}, NKI 0.6"
        raise NkiError(where, operand, rule, received=received, allowed=allowed, source=source)


def as_int(value: Any) -> int | None:
    """A compile-time integer (Python's or NumPy's) as an int, else None."""
    if type(value) is int:
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return None
