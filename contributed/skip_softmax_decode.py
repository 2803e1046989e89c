"""Skip-softmax decode: flash decoding of one new token that leaves the V of tiles with small scores in HBM.

Math      s[h, j] = softmax_scale * q[h] . k[j, h // group] for the visible keys max(0, length - 1 - left) <= j.
          Tiles of keys t * tile_kv .. (t + 1) * tile_kv - 1 from left to right; c[h, t] = max of s[h] over the visible
          keys of tile t. Head h skips tile t iff c[h, t] < max(c[h, u] for u < t) + log(skip_softmax_threshold); the
          first tile with a visible key stays. o[h] = softmax(s[h]) v and lse[h] = log(sum exp(s[h])) over the keys of
          the tiles that h keeps. Nothing visible: o = 0, lse = -inf. The window's right side never removes a key.
Layouts   As in `flash_decode.py`: q [batch, 1, n_q_heads, d], K s-major or d-major, V s-major; o in q's shape and
          dtype, lse float32. Counts in float32: tiles kept per query head, rows of V read per KV head.
"""

from __future__ import annotations

from typing import Any

from contributed import _decode_checks as checks
from contributed import _sparse_checks as sparse_checks
from contributed._cases import SparseCase
from contributed._checks import FLOATS
from contributed._decode_launch import kernel_layout
from contributed._decode_plan import FlatCache
from contributed._nki import nki
from contributed._sparse_launch import TileStats, tile_launch
from contributed._sparse_plan import span
from contributed._sparse_steps import attend
from contributed.flash_decode import combine_splits, flash_decode


@nki.jit
def skip_softmax_decode_fwd(
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
        False,
        False,
        with_lse,
        with_stats,
        None,
    )


def skip_softmax_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    skip_softmax_threshold: float | None,
    tile_kv: int = 128,
    seqlens_kv: Any = None,
    cu_seqlens_kv: Any = None,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    return_lse: bool = False,
    return_stats: bool = False,
    out: Any = None,
    lse: Any = None,
    target: str | None = None,
    k_d_major: bool = False,
    max_seqlen_kv: int | None = None,
    n_cores: int = 1,
) -> Any:
    """Decode attention."""
    q4 = sparse_checks.operands(q, k, v)
    threshold = sparse_checks.threshold("skip_softmax_threshold", skip_softmax_threshold)
    sparse_checks.tile(tile_kv)
    n_kv_heads, first, used, room = checks.flat_cache(q4, k, v, seqlens_kv, cu_seqlens_kv)
    checks.d_major(q4, k, k_d_major, packed=first is not None)
    longest = checks.longest(max_seqlen_kv, used, room)
    options = checks.options(
        q4,
        n_kv_heads,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        k_scale=None,
        v_scale=None,
    )
    checks.cores(n_cores, target)
    checks.results(q.shape, q.dtype, out, lse, return_lse)
    checks.flag("return_stats", return_stats)
    row_bytes = q.shape[2] * k.dtype.itemsize
    if not threshold:
        results = flash_decode(
            q,
            k,
            v,
            seqlens_kv=seqlens_kv,
            cu_seqlens_kv=cu_seqlens_kv,
            softmax_scale=softmax_scale,
            window_size=window_size,
            return_lse=return_lse,
            out=out,
            lse=lse,
            target=target,
            k_d_major=k_d_major,
            max_seqlen_kv=max_seqlen_kv,
            n_cores=n_cores,
        )
        return results

    k4, v4 = kernel_layout(k, v, k_d_major)
    keys = v4.shape[2]
    made = tile_launch(
        skip_softmax_decode_fwd,
        combine_splits,
        FlatCache(n_kv_heads, keys, first),
        used,
        q_shape=q4.shape,
        n_kv_heads=n_kv_heads,
        itemsize=k.dtype.itemsize,
        most_keys=longest,
        tile_kv=tile_kv,
        right_to_left=False,
        softmax_scale=options.softmax_scale,
        left=options.left,
        n_cores=n_cores,
        with_lse=return_lse or lse is not None,
        with_stats=return_stats,
        d_major_keys=keys if k_d_major else None,
    )
    o4, lse3, counts = made.run(q4, made.arguments(q4, k4, v4, [threshold] * len(used)), target)
    stats = None
    if return_stats:
        total = made.plan.tiles.sum(axis=1)[:, None]
        stats = TileStats(
            0 * counts.kept[0] + total, total - counts.kept[0], counts.k_rows * row_bytes, counts.v_rows * row_bytes
        )
    return sparse_checks.deliver(o4, lse3, stats, q.shape, out, lse, return_lse)
