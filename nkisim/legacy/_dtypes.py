"""Element types as `neuronxcc.nki` shows them: NumPy's own, and which of two wins in an operation."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nkisim import dtypes
from nkisim.dtypes import DType, as_dtype

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8_e4m3 = np.dtype(ml_dtypes.float8_e4m3)
float8_e5m2 = np.dtype(ml_dtypes.float8_e5m2)
tfloat32 = np.dtype("V4")  # NumPy has no such type; the documentation shows four raw bytes
bool_ = np.bool_
float16 = np.float16
float32 = np.float32
int8 = np.int8
int16 = np.int16
int32 = np.int32
uint8 = np.uint8
uint16 = np.uint16
uint32 = np.uint32

_RANK = {  # width of a float type in promotion
    dtypes.float8_e4m3: 1,
    dtypes.float8_e4m3fn: 1,
    dtypes.float8_e5m2: 1,
    dtypes.float16: 2,
    dtypes.bfloat16: 2,
    dtypes.tfloat32: 3,
    dtypes.float32: 4,
}


def kind_of(dtype: Any, what: str = "dtype") -> DType:
    """The simulator's element type for what a kernel writes as `dtype=`.

    Raises:
        TypeError: NKI has no such type.
    """
    if isinstance(dtype, np.dtype) and dtype == tfloat32:
        return dtypes.tfloat32
    if dtype is bool:
        return dtypes.bool_
    return as_dtype(dtype, what)


def user_dtype(kind: DType) -> np.dtype[Any]:
    """The NumPy type by which a kernel knows an element type."""
    if kind is dtypes.tfloat32:
        return tfloat32
    return np.dtype(np.bool_) if kind is dtypes.bool_ else kind.numpy


def weak(value: Any) -> DType:
    """The type that a number takes part with in promotion: Python's are the widest, NumPy's their own."""
    if isinstance(value, np.generic):
        return dtypes.float32 if value.dtype == np.float64 else as_dtype(_narrow(value.dtype))
    if isinstance(value, bool):
        return dtypes.uint8
    return dtypes.int32 if isinstance(value, int) else dtypes.float32


def _narrow(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.int32) if dtype == np.int64 else dtype


def promote(first: DType, *others: DType) -> DType:
    """The type of a result from those of its inputs, by the type promotion rules of SDK 2.26."""
    result = first
    for other in others:
        result = _promote(result, other)
    return result


def _promote(a: DType, b: DType) -> DType:
    if a is b:
        return a
    a, b = (dtypes.uint8 if t is dtypes.bool_ else t for t in (a, b))
    if a.is_float or b.is_float:
        return _wider_float(a, b)
    if a.kind != b.kind:
        signed, unsigned = (a, b) if a.kind == "int" else (b, a)
        # A signed type that holds both; none of more than 32 bits.
        if signed.itemsize > unsigned.itemsize:
            return signed
        return {1: dtypes.int16, 2: dtypes.int32}.get(unsigned.itemsize, dtypes.float32)
    return a if a.itemsize >= b.itemsize else b


def _wider_float(a: DType, b: DType) -> DType:
    if not (a.is_float and b.is_float):
        return a if a.is_float else b
    if a is b:
        return a
    if _RANK[a] != _RANK[b]:
        return a if _RANK[a] > _RANK[b] else b
    return dtypes.bfloat16 if _RANK[a] == 1 else dtypes.float32
