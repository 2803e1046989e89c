"""Arrays of NumPy and PyTorch at the border of a kernel call. torch is used only if the caller has it."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from nkisim.dtypes import Array

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


def to_torch(array: Array) -> Any:
    """A NumPy array as a torch tensor of the same element type."""
    torch = sys.modules["torch"]
    for name, (bits, numpy_type) in _TORCH_BITS.items():
        if array.dtype == numpy_type:
            plain = np.ascontiguousarray(array).view(np.dtype(bits))
            return torch.from_numpy(plain).view(getattr(torch, name))
    return torch.from_numpy(np.ascontiguousarray(array))
