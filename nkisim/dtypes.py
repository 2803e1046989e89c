"""Element types: names as in `nki.language`, how NumPy stores them, and the hardware's casts.

A type is a string (`nl.float32 == "float32"`), as documented, with its size and storage attached.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class DType(str):
    """Name of an element type, with its size in bytes, its kind and the NumPy type that stores it."""

    itemsize: int
    kind: str  # "float", "int", "uint", "bool" or "packed" (four small floats in one element)
    numpy: np.dtype[Any]

    __slots__ = ("itemsize", "kind", "numpy")

    def __new__(cls, name: str, itemsize: int, kind: str, storage: Any) -> DType:
        self = super().__new__(cls, name)
        self.itemsize = itemsize
        self.kind = kind
        self.numpy = np.dtype(storage)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (str(self), self.itemsize, self.kind, self.numpy)

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it goes through float32."""
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """Whether it is a signed or unsigned integer (bool_ is not)."""
        return self.kind in ("int", "uint")

    @property
    def is_low_precision(self) -> bool:
        """Whether the all-float32 mode stores it as float32."""
        return self.kind == "float" and self.itemsize < 4 and self != "float8_e8m0fnu"

    def carrier(self, precise: bool) -> np.dtype[Any]:
        """NumPy type one element is stored in, in precise or in all-float32 mode."""
        return self.numpy if precise or not self.is_low_precision else np.dtype(np.float32)


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

_by_numpy: dict[np.dtype[Any], DType] = {d.numpy: d for d in (*INTEGERS, *FLOATS) if d is not tfloat32}
_by_numpy[np.dtype(np.bool_)] = bool_


def as_dtype(value: Any, what: str = "dtype") -> DType:
    """The `DType` meant by a name, a NumPy or ml_dtypes type, or an array's dtype.

    Raises:
        TypeError: no element type of NKI has that name (there is no 64-bit type).
    """
    if type(value) is DType:
        return value
    if isinstance(value, str):
        found = ALL.get("bool_" if value == "bool" else value)
        if found is not None:
            return found
    else:
        name = getattr(value, "name", None) or getattr(value, "__name__", None)
        if isinstance(name, str) and name in ALL:
            return ALL[name]
        try:
            return _by_numpy[np.dtype(value)]
        except (TypeError, KeyError):
            pass
    raise TypeError(f"{what}: received {value!r}, allowed {', '.join(ALL)}")


def to_float32(stored: Array, dtype: DType) -> Array:
    """The stored elements as float32; a new array unless they are float32 already."""
    if stored.dtype == np.float32:
        return stored
    if dtype.kind == "packed":
        raise TypeError(f"{dtype} holds four values per element and has no float32 form")
    return stored.astype(np.float32)


_INTEGER_RANGE = {d: (np.iinfo(d.numpy).min, np.iinfo(d.numpy).max) for d in INTEGERS}
_TF32_HALF = np.uint32(0x0FFF)
_TF32_MASK = np.uint32(0xFFFFE000)


def cast(values: Array, dtype: DType, *, precise: bool = True) -> Array:
    """`values` as the hardware stores them in `dtype`: through float32, to nearest even.

    Float to integer rounds to nearest even and saturates; NaN becomes 0 (assumed: no document says).
    `precise=False` leaves floats of every width in float32.
    """
    if values.dtype == dtype.numpy and dtype is not tfloat32 and dtype is not bool_:
        return values
    f = values if values.dtype == np.float32 else values.astype(np.float32)
    if dtype.kind == "float":
        if dtype is float32 or (not precise and dtype is not float8_e8m0fnu):
            return f  # tfloat32 included: the mode rounds nothing
        if dtype is tfloat32:
            return _round_tfloat32(f)
        with np.errstate(over="ignore", invalid="ignore"):
            return f.astype(dtype.numpy)
    if dtype is bool_:
        return (f != 0).astype(np.uint8)
    if dtype.kind == "packed":
        raise TypeError(f"{dtype} is written by quantize_mx and by copies only")
    low, high = _INTEGER_RANGE[dtype]
    rounded = np.rint(f.astype(np.float64))
    rounded[np.isnan(rounded)] = 0.0
    return np.clip(rounded, low, high).astype(dtype.numpy)


def _round_tfloat32(f: Array) -> Array:
    """float32 to a 10-bit mantissa, nearest even; NaN and infinities stay."""
    bits = f.view(np.uint32)
    rounded = (bits + _TF32_HALF + ((bits >> np.uint32(13)) & np.uint32(1))) & _TF32_MASK
    finite = np.isfinite(f)
    return np.where(finite, rounded.view(np.float32), f)
