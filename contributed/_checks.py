"""Checks of a caller's arguments: before any work, with the name, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

PARTITIONS = 128  # of SBUF and PSUM on every generation (nl.tile_size.pmax)


def require(ok: bool, name: str, *, received: object, allowed: object) -> None:
    """Raise `ValueError` unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: received {received}, allowed {allowed}")


def require_array(name: str, value: Any, *, ndim: int, layout: str) -> None:
    """Raise unless `value` is a NumPy array of `ndim` dimensions and a float type that kernels take."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: received {type(value).__name__}, allowed a NumPy array {layout}")
    require(value.ndim == ndim, f"{name} shape", received=list(value.shape), allowed=layout)
    if value.dtype not in FLOATS.values():
        raise TypeError(f"{name} dtype: received {value.dtype}, allowed {', '.join(FLOATS)}")


def require_same_dtype(**arrays: Any) -> None:
    """Raise `TypeError` unless all arrays have one dtype."""
    names = list(arrays)
    first = arrays[names[0]].dtype
    for name in names[1:]:
        if arrays[name].dtype != first:
            raise TypeError(f"{name} dtype: received {arrays[name].dtype}, allowed {first}, that of {names[0]}")


def require_scale(softmax_scale: Any) -> None:
    """Raise unless `softmax_scale` is None or a finite number."""
    if softmax_scale is None:
        return
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float, np.floating, np.integer)):
        raise TypeError(f"softmax_scale: received {softmax_scale!r}, allowed a finite number or None")
    require(bool(np.isfinite(softmax_scale)), "softmax_scale", received=softmax_scale, allowed="a finite number")
