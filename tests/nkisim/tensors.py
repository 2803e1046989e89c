"""Tensors outside of kernels: their views as NumPy arrays, and the text of refusals."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import language as nl
from nkisim.dtypes import as_dtype
from nkisim.errors import Site
from nkisim.memory import MemoryRegion, Storage, StorageInfo
from nkisim.tensor import NkiTensor


def tensor(
    shape: tuple[int, ...],
    dtype: Any = nl.float32,
    buffer: str = "sbuf",
    address: tuple[int, int] | None = None,
    precise: bool = True,
) -> Any:
    """A tensor outside of any kernel; its elements are 0, 1, 2, ... in storage order."""
    kind = as_dtype(dtype)
    region = MemoryRegion[buffer]
    with np.errstate(over="ignore"):
        data = np.arange(prod(shape)).astype(kind.carrier(precise)).view(np.uint8)
    info = StorageInfo(0, "t", region, shape, kind, Site("kernel.py", 7, "kernel"), address)
    return NkiTensor(shape, kind, Storage(info, precise, data), region, "t")


def values(t: Any) -> np.ndarray:
    """What the view shows."""
    return t.storage.array(t.carrier, t.shape, t.strides, t.offset)


def array_like(t: Any) -> np.ndarray:
    """The elements of a fresh `tensor` as a NumPy array."""
    with np.errstate(over="ignore"):
        return np.arange(t.size).astype(t.carrier).reshape(t.shape)


def refusal(make: Any, *args: Any) -> nkisim.NkiError:
    with pytest.raises(nkisim.NkiError) as caught:
        make(*args)
    return caught.value


def assert_refused(make: Any, method: str, operand: str, rule: str, received: str, allowed: str) -> None:
    error = refusal(make)
    assert (error.instruction, error.operand) == (f"NkiTensor.{method}", operand), str(error)
    assert rule in error.rule, str(error)
    assert received in str(error.received), str(error)
    assert allowed in str(error.allowed), str(error)
    assert error.source
    assert error.site.file == make.__code__.co_filename, str(error)
