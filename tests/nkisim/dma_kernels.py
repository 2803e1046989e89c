"""Kernels that the tests of DMA share."""

from __future__ import annotations

from typing import Any

import ml_dtypes

from nkisim import isa as nisa
from nkisim import language as nl

BF16 = ml_dtypes.bfloat16


def hbm(shape: Any, dtype: Any = nl.float32) -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def fill(t: Any, value: Any) -> Any:
    nisa.memset(t, value)
    return t
