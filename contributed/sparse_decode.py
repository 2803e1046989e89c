"""Threshold-sparse and gated decode (work in progress)."""

from __future__ import annotations

from contributed._nki import nki
from contributed._sparse_gates import Gating
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
        None,
    )


@nki.jit
def gated_decode_fwd(
    q,
    k,
    v,
    alpha,
    delta,
    records,
    limits,
    gate_limits,
    units,
    rows,
    kinds,
    first_side,
    floor,
    start,
    chunks,
    gate_bounds,
    n_steps,
    n_kv_heads,
    tokens,
    n_windows,
    n_first,
    tile_kv,
    n_splits,
    softmax_scale,
    is_logsigmoid=True,
    fast=True,
    with_lse=False,
    with_stats=False,
):
    """x"""
    gating = Gating(
        alpha,
        delta,
        gate_limits,
        units,
        rows,
        kinds,
        first_side,
        floor,
        start,
        chunks,
        gate_bounds,
        n_steps,
        is_logsigmoid,
        fast,
    )
    return attend(
        q,
        k,
        v,
        records,
        None,
        None,
        limits,
        n_kv_heads,
        tokens,
        0,
        n_windows,
        n_first,
        tile_kv,
        n_splits,
        softmax_scale,
        False,
        True,
        with_lse,
        with_stats,
        gating,
    )
