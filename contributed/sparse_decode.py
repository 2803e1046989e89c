"""Threshold-sparse and gated decode (work in progress)."""

from __future__ import annotations

from contributed._nki import nki
from contributed._sparse_steps import attend


@nki.jit
def sparse_decode_fwd(
    q,
    k,
    v,
    records,
    items,
    bounds,
    limits,
    n_kv_heads,
    tokens,
    chunks,
    n_windows,
    n_first,
    tile_kv,
    n_splits,
    softmax_scale,
    with_lse=False,
    with_stats=False,
):
    """x"""
    return attend(
        q,
        k,
        v,
        records,
        items,
        bounds,
        limits,
        n_kv_heads,
        tokens,
        chunks,
        n_windows,
        n_first,
        tile_kv,
        n_splits,
        softmax_scale,
        True,
        True,
        with_lse,
        with_stats,
    )
