"""Arrays of NumPy and PyTorch at the border of a kernel call. torch is used only if the caller has it."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from nkisim.dtypes import Array, DType, as_dtype

# torch dtypes that NumPy lacks: the integer type of the same width, and the ml_dtypes type.
_TORCH_BITS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": ("uint8", ml_dtypes.float8_e8m0fnu),
}


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor (False where torch was never imported)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(tensor: Any) -> Array:
    """A torch CPU tensor as a NumPy array that shares its memory where the tensor is contiguous."""
    torch = sys.modules["torch"]
    t = tensor.detach()
    name = str(t.dtype).removeprefix("torch.")
    if name in _TORCH_BITS:
        bits, numpy_type = _TORCH_BITS[name]
        array: Array = t.contiguous().view(getattr(torch, bits)).numpy().view(numpy_type)
        return array
    array = t.numpy()
    return array


def is_torch_dtype(value: Any) -> bool:
    """Whether `value` is a torch element type."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.dtype)


def torch_dtype(value: Any, what: str) -> DType:
    """The element type that a torch element type names."""
    return as_dtype(str(value).removeprefix("torch."), what)


def to_torch(array: Array) -> Any:
    """A NumPy array as a torch tensor of the same element type.

    float8_e4m3, which torch lacks, keeps its bits and becomes float8_e4m3fn, as arguments do on the way in.
    """
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.float8_e4m3:
        array = np.ascontiguousarray(array).view(ml_dtypes.float8_e4m3fn)
    for name, (bits, numpy_type) in _TORCH_BITS.items():
        if array.dtype == numpy_type:
            plain = np.ascontiguousarray(array).view(np.dtype(bits))
            return torch.from_numpy(plain).view(getattr(torch, name))
    return torch.from_numpy(np.ascontiguousarray(array))
