"""Skip-softmax decode: flash decoding of one new token per sequence that does not read V where no head needs it.

Math      s[h, j] = softmax_scale * q[h] . k[j, h // group] for visible keys max(0, length - 1 - left) <= j < length.
          Tile t holds keys t * tile_kv and after; c[h, t] = max of s[h] over its visible keys. Query head h skips tile
          t iff c[h, t] < max(c[h, u] for u < t) + log(skip_softmax_threshold), so never its first tile.
          o[h] = softmax(s[h]) v, lse[h] = log(sum exp(s[h])) over the visible keys of the tiles that h keeps. Nothing
          visible: o = 0, lse = -inf. The window's right side never removes a key.
Layouts   HBM. q [batch, 1, n_q_heads, d]; K and V of q's dtype, as in `flash_decode.py`. o as q, lse float32 without d.
          Tiles kept [batch, 1, n_q_heads] and rows of K and of V read [2, batch, n_kv_heads], both float32.
Limits    One new token. float32, bfloat16 or float16. d, lengths and scales as in `flash_decode.py`. tile_kv a power of
          two, 16..1024. Query heads per KV head 1..128; to 64 for tiles of 1024 keys, and with a window to 64 for tiles
          of 512 keys and 32 for 1024.
Engines   As in `flash_decode.py`, and one decision per item, which has at most 128 tiles: however many, 15 small Vector
          instructions and three transposes by the Tensor Engine, where that has five and two.
          Instructions per 128 keys, whole items of 8192 keys, 8 heads per KV head: 2.43 with d-major K, 3.52 with
          s-major K (INSTRUCTIONS_PER_TILE), on trn1 3.65.
Numerics  As in `flash_decode.py`. Decisions are float32: the log of the threshold is rounded once, in units of q . k.
          A sequence's result has the same bits in every batch (same max_seqlen_kv).
Memory    SBUF per partition: as in `flash_decode.py`, and probabilities and edge keys of whole tiles beside it: 86 KiB
          for 8 KV heads of 8 query heads each, d=128, two bytes, tiles of 128 keys; a test holds it to that. PSUM: at
          most the 8 banks. Nothing depends on seqlen_kv.
Oracle    reference/skip_softmax.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Design    Keys are scored for all tiles. An item's decision stands between its scores and its values: V is asked for in
          the partitions of the tiles that some head of the group keeps, and comes while the next keys are scored. As
          a threshold is at most 1, a skipped tile never has a head's largest score: one running maximum serves for
          decisions and softmax alike. The keys of a tile that a length or a window cuts are edge keys.
Files     `_sparse_plan.py`: which keys are where; `_sparse_state.py`, `_sparse_steps.py`: the trip over items;
          of that `_sparse_items.py`: keys, scores, values, `_sparse_decide.py`: which tiles stay, `_sparse_sides.py`:
          tiles that are cut, `_sparse_counts.py`: counts, all shared with `sparse_decode.py`;
          `_skip_calibration.py`: thresholds for a share of tiles, on the host.

Run `python contributed/skip_softmax_decode.py` to check the kernel against the oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contributed import _decode_checks as checks
from contributed import _sparse_checks as sparse_checks
from contributed._cases import SparseCase
from contributed._checks import FLOATS
from contributed._decode_launch import kernel_layout
from contributed._decode_plan import FlatCache
from contributed._nki import nki
from contributed._skip_calibration import Calibration, ScaleFactor, calibrate, fit_scale_factor
from contributed._sparse_checks import TILE_KV
from contributed._sparse_launch import TileStats, tile_launch
from contributed._sparse_steps import attend
from contributed.flash_decode import combine_splits, flash_decode

__all__ = [
    "Calibration",
    "ScaleFactor",
    "TileStats",
    "calibrate",
    "fit_scale_factor",
    "skip_softmax_decode",
    "skip_softmax_decode_fwd",
]

# As in `flash_decode.py`: of a further item of two lanes of 8192 keys, 8 rows each; by whether K is d-major.
INSTRUCTIONS_PER_TILE = {True: 311 / 128, False: 451 / 128}


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
    """Skip-softmax decode of a batch by the plan in `records`, `items` and `bounds` (`_sparse_plan.make_tile_plan`).

    Args:
        q: [batch, 1, n_q_heads, d] in HBM.
        k: rows of d elements in any shape, or d-major [batch, n_kv_heads, d, seqlen_kv] if `chunks` > 0.
        v: rows of d elements in any shape.
        records: int32 [n_cores, n_trips + 1, 128, n_lanes, columns].
        items: int32 [n_cores, n_steps + 2, 128, n_lanes, columns].
        bounds: int32 [n_cores, n_trips, 4].
        limits: [batch, 1, n_q_heads] float32: log(threshold) in units of q . k.
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition; this and the next five as in the plan's geometry.
        chunks: gathers per item and block of d of d-major K, 0 for s-major.
        n_windows: stretches of edge keys per group.
        n_first: those of them that are visited before the items.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.
        softmax_scale: multiplies q . k.
        with_lse: whether lse is returned.
        with_stats: whether counts are.

    Returns:
        o [n_splits * batch, 1, n_q_heads, d]; with `with_lse` lse [n_splits * batch, 1, n_q_heads]; with `with_stats`
        tiles kept [n_splits * batch, 1, n_q_heads], and rows of K and of V read [2, n_splits * batch, n_kv_heads].
    """
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
        True,
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
    tile_kv: int = TILE_KV,
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
    """Decode attention that leaves out tiles far below the largest score so far, in math layout, on the CPU.

    Args:
        q: [batch, n_q_heads, d], one new token per sequence, the last of its keys.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d] with `cu_seqlens_kv`; q's dtype.
        v: as k.
        skip_softmax_threshold: to 1; None or 0 skips nothing: `flash_decode` runs, with its results bit for bit.
        tile_kv: keys of a tile, a power of two 16..1024.
        seqlens_kv: int [batch], keys in use of each sequence; None means all there is room for.
        cu_seqlens_kv: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1].
        softmax_scale: multiplies q . k; None means d ** -0.5.
        window_size: (left, right), keys visible around the new token; None is unlimited.
        return_lse: whether lse is returned.
        return_stats: whether a `TileStats` is.
        out: where o is written, of q's shape and dtype.
        lse: where lse is written, float32 of q's shape without d.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.
        k_d_major: whether the kernel gets K with d before the keys.
        max_seqlen_kv: bound of all lengths, which the size of items follows; None means what there is room for, of
            packed sequences the longest.
        n_cores: 1, or 2 from trn2 on.

    Returns:
        o of q's shape and dtype; with `return_lse` after it lse, float32, natural logarithm; with `return_stats` last
        the counts, tiles by query head and bytes by KV head.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run, `out` and `lse` are as before.
    """
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
        stats = _nothing_skipped(q, k, used, options.left, tile_kv) if return_stats else None
        return sparse_checks.with_stats(results, stats, return_lse)

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
        tile_kv=int(tile_kv),
        right_to_left=False,
        softmax_scale=options.softmax_scale,
        left=options.left,
        n_cores=n_cores,
        with_lse=return_lse or lse is not None,
        with_stats=return_stats,
        d_major_keys=keys if k_d_major else None,
    )
    o4, lse3, counts = made.run(q4, made.arguments(q4, k4, v4, [threshold] * len(used)), target)
    results = checks.deliver(o4, lse3, q.shape, out, lse, return_lse)
    stats = None
    if counts is not None:
        total = np.repeat(made.plan.tiles, q.shape[1], axis=1)
        row_bytes = q.shape[2] * k.dtype.itemsize
        stats = TileStats(total, total - counts.kept[0], counts.k_rows * row_bytes, counts.v_rows * row_bytes)
    return sparse_checks.with_stats(results, stats, return_lse)


def _nothing_skipped(q: Any, k: Any, used: list[int], left: int | None, tile_kv: int) -> TileStats:
    """What `flash_decode` visits."""
    firsts = [0 if left is None else max(0, n - 1 - left) for n in used]
    tiles = [-(-n // tile_kv) - first // tile_kv for n, first in zip(used, firsts, strict=True)]
    total = np.repeat(np.array(tiles, np.int64)[:, None], q.shape[1], axis=1)
    rows = np.repeat(np.array(used, np.int64)[:, None] - np.array(firsts)[:, None], k.shape[-2], axis=1)
    row_bytes = q.shape[2] * k.dtype.itemsize
    return TileStats(total, 0 * total, rows * row_bytes, rows * row_bytes)


CASES = (
    SparseCase("one-key", 1, 1, 64, (1,), 0.5),
    SparseCase("no-keys", 2, 1, 64, (0, 1, 0), 0.5),
    SparseCase("tile-edges", 1, 1, 80, (127, 128, 129, 255, 256, 257), 0.8, unused=3, seed=3),
    SparseCase("qwen2.5-0.5b", 14, 2, 64, (400,), 0.3, tile_kv=64, unused=20, seed=3),
    SparseCase("d-major", 4, 2, 128, (300,), 0.5, tile_kv=64, unused=20, d_major=True, seed=5),
    SparseCase("gemma-3-1b-window", 4, 1, 256, (900,), 0.5, tile_kv=64, window=511, unused=5, seed=1),
    SparseCase("tiles-of-16", 2, 1, 96, (300, 77), 0.3, tile_kv=16, seed=8),
    SparseCase("tiles-of-1024", 2, 1, 64, (4000, 1024), 0.9, tile_kv=1024, seed=8),
    SparseCase("window-in-a-tile", 2, 1, 64, (400, 140), 0.5, tile_kv=256, window=40, unused=2),
    SparseCase("window-d-major", 4, 2, 64, (400,), 0.5, tile_kv=32, window=200, unused=2, d_major=True, seed=8),
    SparseCase("needles", 4, 2, 64, (1025,), 0.01, needles=(127, 128, 600, 1024)),
    SparseCase("threshold-1", 4, 2, 64, (900,), 1.0),
    SparseCase("threshold-small", 4, 2, 64, (900,), 1e-6, locality=8.0, seed=9),
    SparseCase("negative-scale", 3, 1, 112, (500,), 0.3, softmax_scale=-0.1, seed=2),
    SparseCase("packed", 2, 2, 64, (129, 0, 500), 0.3, packed=True, seed=1),
    SparseCase("packed-unused", 2, 1, 192, (129, 0, 400), 0.3, tile_kv=64, packed=True, window=300, unused=7, seed=3),
    SparseCase("three-items", 2, 1, 32, (4500, 2049), 0.05, tile_kv=16, unused=1, seed=21),
    SparseCase("two-cores", 4, 2, 64, (700, 30), 0.3, n_cores=2, unused=1),
    SparseCase("two-cores-d-major", 4, 2, 32, (1500, 100), 0.3, n_cores=2, d_major=True, seed=3),
)


def main() -> int:
    """Check o, lse and the tiles that are skipped against the oracle in every case; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference.rounded_sparse import skip_softmax_decode_rounded
    from reference.skip_softmax import skip_softmax_decode as oracle

    def options_of(case: SparseCase, dtype: str) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        return q, k, v, options | {"skip_softmax_threshold": case.threshold}

    def results(case: SparseCase, dtype: str, target: str | None) -> Any:
        q, k, v, options = options_of(case, dtype)
        how = {"return_lse": True, "return_stats": True, "target": target} | case.launch(target)
        o, lse, stats = skip_softmax_decode(q, k, v, **options, **how)
        return o, lse, stats.tiles_skipped.astype(np.float32)

    def references(case: SparseCase, dtype: str) -> Any:
        q, k, v, options = options_of(case, dtype)
        exact, (o, lse) = oracle(q, k, v, **options), skip_softmax_decode_rounded(q, k, v, **options)
        # A number of tiles is not rounded: its budget is below 1.
        skipped = exact.stats.tiles_skipped
        return (exact.o, o), (exact.lse, lse), (skipped, skipped[None])

    return budget_check(__doc__ or "", results, references, CASES, names=("o", "lse", "tiles"))


if __name__ == "__main__":
    raise SystemExit(main())
