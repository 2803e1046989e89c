"""Element types: names as in `nki.language`, how NumPy stores them, and the hardware's casts.

A type is a string (`nl.float32 == "float32"`), as documented, with its size and storage attached.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class DType(str):
    """Name of an element type, with its size in bytes, its kind and the NumPy type that stores it.

    There is one object per type, also after a copy or a pickle, so that `is` compares types.
    """

    itemsize: int
    kind: str  # "float", "int", "uint", "bool" or "packed" (four small floats in one element)
    numpy: np.dtype[Any]
    is_float: bool  # arithmetic on it goes through float32
    is_integer: bool  # signed or unsigned (bool_ is not)
    is_low_precision: bool  # the all-float32 mode stores it as float32

    __slots__ = ("is_float", "is_integer", "is_low_precision", "itemsize", "kind", "numpy")

    def __new__(cls, name: str, itemsize: int, kind: str, storage: Any) -> DType:
        """The type called `name`, stored as the NumPy type `storage`."""
        self = super().__new__(cls, name)
        self.itemsize = itemsize
        self.kind = kind
        self.numpy = np.dtype(storage)
        self.is_float = kind == "float"
        self.is_integer = kind in ("int", "uint")
        self.is_low_precision = self.is_float and itemsize < 4 and name != "float8_e8m0fnu"
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return as_dtype, (str(self),)

    def carrier(self, precise: bool) -> np.dtype[Any]:
        """NumPy type one element is stored in, in precise or in all-float32 mode."""
        return self.numpy if precise or not self.is_low_precision else _FLOAT32


_FLOAT32 = np.dtype(np.float32)
bool_ = DType("bool_", 1, "bool", np.uint8)
int8 = DType("int8", 1, "int", np.int8)
int16 = DType("int16", 2, "int", np.int16)
int32 = DType("int32", 4, "int", np.int32)
uint8 = DType("uint8", 1, "uint", np.uint8)
uint16 = DType("uint16", 2, "uint", np.uint16)
uint32 = DType("uint32", 4, "uint", np.uint32)
float16 = DType("float16", 2, "float", np.float16)
float32 = DType("float32", 4, "float", np.float32)
bfloat16 = DType("bfloat16", 2, "float", ml_dtypes.bfloat16)
tfloat32 = DType("tfloat32", 4, "float", np.float32)
float8_e4m3 = DType("float8_e4m3", 1, "float", ml_dtypes.float8_e4m3)
float8_e4m3fn = DType("float8_e4m3fn", 1, "float", ml_dtypes.float8_e4m3fn)
float8_e5m2 = DType("float8_e5m2", 1, "float", ml_dtypes.float8_e5m2)
float8_e8m0fnu = DType("float8_e8m0fnu", 1, "float", ml_dtypes.float8_e8m0fnu)
float8_e5m2_x4 = DType("float8_e5m2_x4", 4, "packed", np.uint32)
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", 4, "packed", np.uint32)
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", 2, "packed", np.uint16)

# fmt: off
ALL: dict[str, DType] = {
    str(d): d
    for d in (
        bool_, int8, int16, int32, uint8, uint16, uint32, float16, float32, bfloat16, tfloat32,
        float8_e4m3, float8_e4m3fn, float8_e5m2, float8_e8m0fnu,
        float8_e5m2_x4, float8_e4m3fn_x4, float4_e2m1fn_x4,
    )
}
# fmt: on
FLOATS = tuple(d for d in ALL.values() if d.kind == "float")
INTEGERS = tuple(d for d in ALL.values() if d.is_integer)
ORDINARY = tuple(d for d in ALL.values() if d.kind != "packed")

# A NumPy type names the NKI type it is stored as; tfloat32 and the packed types have names only.
_by_numpy: dict[np.dtype[Any], DType] = {d.numpy: d for d in (*INTEGERS, *FLOATS) if d is not tfloat32}
_by_numpy[np.dtype(np.bool_)] = bool_


def as_dtype(value: Any, what: str = "dtype") -> DType:
    """The `DType` meant by a name, a NumPy or ml_dtypes type, or an array's dtype.

    Raises:
        TypeError: no element type of NKI has that name (there is no 64-bit type, and no byte-swapped one).
    """
    if type(value) is DType:
        return value
    found = None
    if isinstance(value, str):
        found = ALL.get("bool_" if value == "bool" else value)
    else:
        with contextlib.suppress(TypeError, ValueError):
            found = _by_numpy.get(np.dtype(value))
    if found is None:
        raise TypeError(f"{what}: received {value!r}, allowed {', '.join(ALL)}")
    return found


def to_float32(stored: Array, dtype: DType) -> Array:
    """The stored elements as float32; a new array unless they are float32 already.

    Raises:
        TypeError: a packed type, which holds four values per element.
    """
    if stored.dtype == _FLOAT32:
        return stored
    if dtype.kind == "packed":
        raise TypeError(f"{dtype} holds four values per element and has no float32 form")
    return stored.astype(np.float32)


_INTEGER_RANGE = {d: (np.iinfo(d.numpy).min, np.iinfo(d.numpy).max) for d in INTEGERS}
_TF32_HALF = np.uint32(0x0FFF)
_TF32_MASK = np.uint32(0xFFFFE000)


def cast(values: Array, dtype: DType, *, precise: bool = True) -> Array:
    """`values` as the hardware stores them in `dtype`: through float32, to nearest even.

    A float too large for a float type becomes infinity, in float8_e4m3fn (which has none) NaN. Float to
    integer rounds to nearest even and saturates; NaN becomes 0 (assumed: no document says).
    `precise=False` leaves floats of every width in float32, but for the scales in float8_e8m0fnu.
    NumPy may warn of overflow here; a launch silences it.

    Raises:
        TypeError: a packed type; only `quantize_mx` and copies write those.
    """
    if values.dtype == dtype.numpy and dtype is not tfloat32 and dtype is not bool_:
        return values
    f: Array = values if values.dtype == _FLOAT32 else values.astype(np.float32)
    if dtype.is_float:
        if dtype is float32 or (not precise and dtype is not float8_e8m0fnu):
            return f  # tfloat32 included: the mode rounds nothing
        if dtype is tfloat32:
            return _round_tfloat32(f)
        return f.astype(dtype.numpy)
    if dtype is bool_:
        return np.not_equal(f, 0).astype(np.uint8)
    if dtype.kind == "packed":
        raise TypeError(f"{dtype} is written by quantize_mx and by copies only")
    low, high = _INTEGER_RANGE[dtype]
    # float64 holds every bound exactly; float32 would round 2**31 - 1 up and wrap.
    rounded = np.rint(f.astype(np.float64))
    return np.where(np.isnan(rounded), 0.0, np.clip(rounded, low, high)).astype(dtype.numpy)


def _round_tfloat32(f: Array) -> Array:
    """float32 to a 10-bit mantissa, nearest even; NaN and infinities stay."""
    bits = f.view(np.uint32)
    rounded = (bits + _TF32_HALF + ((bits >> np.uint32(13)) & np.uint32(1))) & _TF32_MASK
    return np.where(np.isfinite(f), rounded.view(np.float32), f)
