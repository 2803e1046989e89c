"""Kernels and inputs that the tests of matmuls and transposes share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nkisim import language as nl
from tests.nkisim.harness import integers, tile

BF16 = ml_dtypes.bfloat16


E4M3, E4M3FN, E5M2 = ml_dtypes.float8_e4m3, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def small(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Integers that every matmul dtype holds exactly; their sums of products are exact in float32."""
    return integers(*shape, low=-8, high=9, seed=seed).astype(dtype)


def exact(stationary: np.ndarray, moving: np.ndarray) -> np.ndarray:
    return (stationary.astype(np.float64).T @ moving.astype(np.float64)).astype(np.float32)


def result(a: Any, b: Any, dtype: Any = nl.float32) -> Any:
    """Inside a kernel: the PSUM tile for the product of two HBM tensors."""
    return tile((a.shape[1], b.shape[1]), dtype, nl.psum)
