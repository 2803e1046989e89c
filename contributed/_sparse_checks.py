"""Checks of what kernels that leave out tiles of keys have in common, and how counts join their results."""

from __future__ import annotations

from typing import Any

import numpy as np

from contributed import _decode_checks as checks
from contributed._checks import require, require_array, require_same_dtype
from contributed._sparse_launch import TileStats
from contributed._sparse_plan import TILE_MAX, TILE_MIN

Array = np.ndarray[Any, np.dtype[Any]]

TILE_KV = 128  # keys of a tile, unless the caller says how many


def operands(q: Any, k: Any, v: Any) -> Array:
    """q as [batch, 1, n_q_heads, d]; K and V are arrays of its dtype."""
    require_array("q", q, ndim=3, layout="[batch, n_q_heads, d]")
    q4 = checks.queries(q)
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, np.ndarray):
            layout = "[batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d]"
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a NumPy array {layout}")
    require_same_dtype(q=q, k=k, v=v)
    return q4


def threshold(name: str, value: Any) -> float | None:
    """A threshold as a float, 0 for none at all; None stays."""
    if value is None:
        return None
    allowed = "None, 0 or a number up to 1"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: received {value!r}, allowed {allowed}")
    require(bool(0 <= value <= 1), name, received=value, allowed=allowed)
    return float(value)


def tile(tile_kv: Any) -> None:
    """Keys of a tile."""
    whole = isinstance(tile_kv, (int, np.integer)) and not isinstance(tile_kv, bool)
    good = whole and TILE_MIN <= tile_kv <= TILE_MAX and tile_kv & (tile_kv - 1) == 0
    require(bool(good), "tile_kv", received=tile_kv, allowed=f"a power of two from {TILE_MIN} to {TILE_MAX}")


def with_stats(results: Any, stats: TileStats | None, return_lse: bool) -> Any:
    """What `_decode_checks.deliver` returned, and the counts after it if there are any."""
    if stats is None:
        return results
    return (*results, stats) if return_lse else (results, stats)
