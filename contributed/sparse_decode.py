"""Threshold-sparse and gated decode: flash decoding of one new token per sequence without the tiles of low scores.

Math      x[h, j] = q[h] . k[j, h // group] + gate[h, j] for visible keys max(0, length - 1 - left) <= j < length; no
          gate in `sparse_decode`. Tile t holds keys t * tile_kv and after; a split has ceil(n_tiles / n_splits) tiles
          in a row, and goes from right to left through those with a visible key. c[t] = max of x over the visible keys
          of tile t and all heads of a group; the group leaves out t iff
          softmax_scale * (c[t] - max(c[u] for u visited before)) < log(softmax_threshold), so never its first tile.
          gate = f(alpha[h] * delta[h // group, j]), f(y) = y, or the logsigmoid of y, or for that the polynomial
          min(y, 0) - 0.05674870 z^2 + 0.37664706 z - 0.65169323 with z = min(|y|, 4). Gates close tiles before K is
          read: u[t] = the largest product of an extreme alpha of the group and an extreme delta of the keys in use of
          tile t, visible or not, and of 0 if the sequence ends inside t; t is closed iff
          softmax_scale * (u[t] - max(u[r] for r visited before)) < log(gate_threshold). c is compared among open tiles.
          o[h] = softmax(softmax_scale * x[h]) v, lse[h] = log(sum exp(softmax_scale * x[h])) over the visible keys of
          the tiles that are left. Nothing visible: o = 0, lse = -inf. The window's right side never removes a key.
Layouts   HBM. q [batch, 1, n_q_heads, d]; K and V as in `flash_decode.py`, of q's dtype; with gates K is s-major. Of
          delta an element for each row of K. o [n_splits * batch, 1, n_q_heads, d] in q's dtype, float32 for several
          splits; lse without d, float32. Tiles kept as lse; rows of K and of V read [2, n_splits * batch, n_kv_heads],
          float32.
Limits    One new token. float32, bfloat16 or float16; alpha and delta each in any of them. d and lengths as in
          `flash_decode.py`; softmax_scale 1e-30 to 1e8. Scores, gates included, and bounds of gates below 1e30 in size,
          where maxima begin, and scaled scores to 4e19, as 1e20 is taken off those that are left out. tile_kv a power
          of two, 16..1024. Query heads per KV head 1..128; of tiles of 1024 keys to 64, with a window to 32, and of 512
          keys with a window to 64. Gated: caches of at most 2^24 rows (batch * n_kv_heads * seqlen_kv), and not so many
          short sequences or splits that the list of open tiles passes 2^24 runs of keys. Keys, values, alpha and delta
          in use must be finite; a closed tile's keys and a left-out tile's values are not read.
Engines   As in `skip_softmax_decode.py`, whose trips over items these are; the running maximum of a decision comes by
          doubling from the right, log2 of the tiles of an item instructions, and not by a scan. Instructions per 128
          keys, whole items of 8192 keys, 8 heads per KV head, no gates: 2.52 with d-major K, 3.61 with s-major K
          (INSTRUCTIONS_PER_TILE), on trn1 3.73. Gated: TensorE adds min(alpha delta, 0) to the scores, a product of
          alphas with both parts of the deltas, and ScalarE makes the rest of a lane's gates while the lane before is
          scored; VectorE moves all keys. Gates are tested up to 2048 tiles on all partitions at a time, and GpSimd's
          descriptors write the open ones one after the other into a list of items in HBM. The tiles that the first
          items have if none is closed are tested before: if all are open, their keys are asked for while the rest is
          tested, else when the first trip is listed. Where gates alone decide (softmax_threshold 0) an item's values
          are asked for with the keys of the next one, and device loops of one turn or none pass over lanes whose tiles
          are done.
Numerics  As in `flash_decode.py`. Decisions are float32: logs of thresholds are rounded once, in units of q . k. Gates
          are float32 operations on float32 alpha and delta. A sequence's result has the same bits in every batch (same
          max_seqlen_kv, n_splits), and on one core or two.
Memory    SBUF per partition, 8 KV heads of 8 query heads each, d=128, two bytes, tiles of 128 keys: 85 KiB, with gates
          99 KiB; tests hold them to that. PSUM: at most the 8 banks. Nothing on the chip depends on seqlen_kv. HBM,
          gated: a list of an int32 for each run of up to tile_kv keys on a partition, of at most 2^24.
Oracle    reference/sparse_decode.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Design    A split begins with a running maximum of its own, so n_splits changes which tiles are left out: None means 1,
          whatever the number of cores. As thresholds are at most 1, a tile that is left out never raises a running
          maximum: that of all tiles before decides, and an item's tiles are decided at once. It may hold a row's own
          largest score where another head of the group is larger, so decisions and softmax have maxima of their own.
          The tile that the sequence ends in comes first and is never left out, so its values are asked for at once; the
          one that a window cuts comes last. Full tiles that gates leave open fill items without gaps: work follows the
          open tiles. d-major K is not offered with gates: it loads in chunks of keys, which a tile could not leave.
Files     `_sparse_plan.py`: which keys are where; `_sparse_state.py`, `_sparse_steps.py`: the trip over items;
          of that `_sparse_items.py`: keys, scores, values, `_sparse_decide.py`: which tiles stay, `_sparse_sides.py`:
          tiles that are cut, `_sparse_counts.py`: counts, all shared with `skip_softmax_decode.py`;
          `_sparse_gates.py`: gates; `_sparse_open_state.py`, `_sparse_open.py`: the list of open tiles.

Run `python contributed/sparse_decode.py` to check the kernels against the oracle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from contributed import _decode_checks as checks
from contributed import _sparse_checks as sparse_checks
from contributed._cases import GatedCase, SparseCase
from contributed._checks import FLOATS, PARTITIONS, require, require_array
from contributed._decode_launch import kernel_layout
from contributed._decode_plan import FlatCache
from contributed._nki import nki
from contributed._sparse_checks import TILE_KV
from contributed._sparse_gates import Gating
from contributed._sparse_launch import Counts, TileLaunch, TileStats, tile_launch
from contributed._sparse_steps import attend
from contributed.flash_decode import MOST_SPLITS, combine_splits, flash_decode

Array = np.ndarray[Any, np.dtype[Any]]

# As in `flash_decode.py`: of a further item of two lanes of 8192 keys, 8 rows each, no gates; by whether K is d-major.
INSTRUCTIONS_PER_TILE = {True: 322 / 128, False: 462 / 128}
INDEX_MAX = 2**24  # of rows and of the list of open tiles: the device counts them in float32


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
    """Threshold-sparse decode of a batch by a plan in `records`, `items` and `bounds` (`_sparse_plan.make_tile_plan`).

    Args:
        q: [batch, 1, n_q_heads, d] in HBM.
        k: rows of d elements in any shape, or d-major [batch, n_kv_heads, d, seqlen_kv] if `chunks` > 0.
        v: rows of d elements in any shape.
        records: int32 [n_cores, n_trips + 1, 128, n_lanes, columns].
        items: int32 [n_cores, n_steps + 3, 128, n_lanes, columns].
        bounds: int32 [n_cores, n_trips, 5].
        limits: [batch, 1, n_q_heads] float32: log(threshold) in units of q . k.
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition; this and the next five as in the plan's geometry.
        chunks: gathers per item and block of d of d-major K, 0 for s-major.
        n_windows: stretches of edge keys per group.
        n_first: those of them that are visited before the items.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.
        softmax_scale: multiplies q . k; above 0.
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
        True,
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
    in_use,
    floor,
    start,
    chunks,
    gate_bounds,
    backwards,
    ahead,
    natural,
    n_tiles,
    n_steps,
    n_kv_heads,
    tokens,
    n_windows,
    n_first,
    tile_kv,
    n_splits,
    softmax_scale,
    judged=True,
    is_logsigmoid=True,
    fast=True,
    with_lse=False,
    with_stats=False,
):
    """Gated decode of a batch: the items of a trip are those that its gates leave open, listed before K is read.

    Args:
        q: [batch, 1, n_q_heads, d] in HBM.
        k: rows of d elements in any shape.
        v: as k.
        alpha: [batch, 1, n_q_heads] float32.
        delta: an element for each row of k, float32, bfloat16 or float16.
        records: int32 [1, n_trips + 1, 128, n_lanes, columns] of `_sparse_plan.make_tile_plan`.
        limits: [batch, 1, n_q_heads] float32: log(softmax_threshold) in units of q . k.
        gate_limits: [batch, 1, n_kv_heads] float32: log(gate_threshold) in units of q . k.
        units: this and the next twelve as in `_sparse_plan.GatePlan`.
        rows: of it.
        kinds: of it.
        first_side: its `first`.
        in_use: of it.
        floor: of it.
        start: of it.
        chunks: of it.
        gate_bounds: its `bounds`.
        backwards: of it.
        ahead: of it.
        natural: of it.
        n_tiles: of it.
        n_steps: of it.
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition; this and the next four as in the plan's geometry.
        n_windows: stretches of edge keys per group.
        n_first: those of them that are visited before the items.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.
        softmax_scale: multiplies q . k and gates; above 0.
        judged: whether scores decide on tiles too; if not, `limits` are those of a threshold of 0.
        is_logsigmoid: whether a gate is the logsigmoid of alpha * delta, else the product.
        fast: whether that is the polynomial.
        with_lse: whether lse is returned.
        with_stats: whether counts are.

    Returns:
        As `sparse_decode_fwd`.
    """
    gating = Gating(
        alpha,
        delta,
        gate_limits,
        units,
        rows,
        kinds,
        first_side,
        in_use,
        floor,
        start,
        chunks,
        gate_bounds,
        backwards,
        ahead,
        natural,
        n_tiles,
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
        judged,
        with_lse,
        with_stats,
        gating,
    )


class _Call(NamedTuple):
    """What both wrappers find in their arguments."""

    q: Array
    """[batch, 1, n_q_heads, d]."""
    n_kv_heads: int
    first: tuple[int, ...] | None
    """First rows of packed sequences."""
    lengths: list[int]
    longest: int
    """What no sequence is longer than."""
    tile_kv: int
    n_splits: int
    softmax_scale: float | None
    left: int | None

    def thresholds(self, threshold: float | None) -> list[float]:
        """Of each sequence, by its own length if there is none."""
        d = self.q.shape[3]
        return [min(1.0, d / max(1, n)) if threshold is None else threshold for n in self.lengths]

    def launch(self, kernel: Any, k: Array, v: Array, **how: Any) -> TileLaunch:
        """For K and V in kernel layout."""
        keys = v.shape[2]
        return tile_launch(
            kernel,
            combine_splits,
            FlatCache(self.n_kv_heads, keys, self.first),
            self.lengths,
            q_shape=self.q.shape,
            n_kv_heads=self.n_kv_heads,
            itemsize=k.dtype.itemsize,
            most_keys=self.longest,
            tile_kv=self.tile_kv,
            right_to_left=True,
            softmax_scale=self.softmax_scale,
            left=self.left,
            n_splits=self.n_splits,
            **how,
        )

    def stats(self, tiles: Array, counts: Counts) -> TileStats:
        """Of `tiles` [batch, n_splits] with a visible key, and of what the device counted."""
        # All heads of a group keep the same tiles.
        group = self.q.shape[2] // self.n_kv_heads
        kept = counts.kept[:, :, ::group].transpose(1, 2, 0)
        total = np.repeat(tiles[:, None, :], self.n_kv_heads, axis=1)
        row_bytes = self.q.shape[3] * self.q.dtype.itemsize
        return TileStats(total, total - kept, counts.k_rows * row_bytes, counts.v_rows * row_bytes)

    def nothing_left_out(self) -> TileStats:
        """What `flash_decode` visits."""
        lengths = np.array(self.lengths, np.int64)
        first = np.zeros_like(lengths) if self.left is None else np.maximum(0, lengths - 1 - self.left)
        n_tiles = -(-lengths // self.tile_kv)
        # Of each sequence and split: its run of tiles, without those before the first visible key.
        begin = -(-n_tiles // self.n_splits)[:, None] * np.arange(self.n_splits + 1)
        tiles = np.diff(np.clip(begin, (first // self.tile_kv)[:, None], n_tiles[:, None]), axis=1)
        rows = np.repeat((lengths - first)[:, None], self.n_kv_heads, axis=1)
        kept = np.repeat(tiles.T[:, :, None], self.q.shape[2], axis=2)
        return self.stats(tiles, Counts(kept, rows, rows))


def _checked(
    q: Any,
    k: Any,
    v: Any,
    *,
    tile_kv: Any,
    n_splits: Any,
    seqlens_kv: Any,
    cu_seqlens_kv: Any,
    softmax_scale: Any,
    window_size: Any,
    return_lse: Any,
    return_stats: Any,
    out: Any,
    lse: Any,
    max_seqlen_kv: Any,
) -> _Call:
    """The arguments that both wrappers have."""
    q4 = sparse_checks.operands(q, k, v)
    sparse_checks.tile(tile_kv)
    n_kv_heads, first, used, room = checks.flat_cache(q4, k, v, seqlens_kv, cu_seqlens_kv)
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
    # A larger product has to be a larger score.
    scale = options.softmax_scale
    require(scale is None or scale > 0, "softmax_scale", received=softmax_scale, allowed="a number above 0 or None")
    if n_splits is not None:
        checks.count("n_splits", n_splits, MOST_SPLITS)
    checks.results(q.shape, q.dtype, out, lse, return_lse)
    checks.flag("return_stats", return_stats)
    splits = 1 if n_splits is None else int(n_splits)
    return _Call(q4, n_kv_heads, first, used, longest, int(tile_kv), splits, scale, options.left)


def sparse_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_threshold: float | None = None,
    tile_kv: int = TILE_KV,
    n_splits: int | None = None,
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
    """Decode attention that leaves out tiles far below the largest score of their group so far, on the CPU.

    Args:
        q: [batch, n_q_heads, d], one new token per sequence, the last of its keys.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d] with `cu_seqlens_kv`; q's dtype.
        v: as k.
        softmax_threshold: to 1; None means min(1, d / length) of each sequence; 0 leaves out nothing: `flash_decode`
            runs, with its results bit for bit.
        tile_kv: keys of a tile, a power of two 16..1024.
        n_splits: KV splits per sequence. Each begins anew, so that they change which tiles are left out: None means 1
            (with a threshold of 0 what it means to `flash_decode`).
        seqlens_kv: int [batch], keys in use of each sequence; None means all there is room for.
        cu_seqlens_kv: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1].
        softmax_scale: multiplies q . k; above 0; None means d ** -0.5.
        window_size: (left, right), keys visible around the new token; None is unlimited.
        return_lse: whether lse is returned.
        return_stats: whether a `TileStats` is.
        out: where o is written, of q's shape and dtype.
        lse: where lse is written, float32 of q's shape without d.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.
        k_d_major: whether the kernel gets K with d before the keys.
        max_seqlen_kv: bound of all lengths, which the size of items follows; None means what there is room for, of
            packed sequences the longest.
        n_cores: 1, or 2 from trn2 on; results do not depend on it.

    Returns:
        o of q's shape and dtype; with `return_lse` after it lse, float32, natural logarithm; with `return_stats` last
        the counts, int64: tiles [batch, n_kv_heads, n_splits] and bytes [batch, n_kv_heads].

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run, `out` and `lse` are as before.
    """
    threshold = sparse_checks.threshold("softmax_threshold", softmax_threshold)
    call = _checked(
        q,
        k,
        v,
        tile_kv=tile_kv,
        n_splits=n_splits,
        seqlens_kv=seqlens_kv,
        cu_seqlens_kv=cu_seqlens_kv,
        softmax_scale=softmax_scale,
        window_size=window_size,
        return_lse=return_lse,
        return_stats=return_stats,
        out=out,
        lse=lse,
        max_seqlen_kv=max_seqlen_kv,
    )
    checks.d_major(call.q, k, k_d_major, packed=call.first is not None)
    checks.cores(n_cores, target)
    if threshold == 0:
        results = flash_decode(
            q,
            k,
            v,
            seqlens_kv=seqlens_kv,
            cu_seqlens_kv=cu_seqlens_kv,
            softmax_scale=softmax_scale,
            window_size=window_size,
            n_splits=n_splits,
            return_lse=return_lse,
            out=out,
            lse=lse,
            target=target,
            k_d_major=k_d_major,
            max_seqlen_kv=max_seqlen_kv,
            n_cores=n_cores,
        )
        return sparse_checks.with_stats(results, call.nothing_left_out() if return_stats else None, return_lse)

    k4, v4 = kernel_layout(k, v, k_d_major)
    made = call.launch(
        sparse_decode_fwd,
        k4,
        v4,
        n_cores=n_cores,
        with_lse=return_lse or lse is not None,
        with_stats=return_stats,
        d_major_keys=v4.shape[2] if k_d_major else None,
    )
    o4, lse3, counts = made.run(call.q, made.arguments(call.q, k4, v4, call.thresholds(threshold)), target)
    results = checks.deliver(o4, lse3, q.shape, out, lse, return_lse)
    stats = None if counts is None else call.stats(made.plan.tiles, counts)
    return sparse_checks.with_stats(results, stats, return_lse)


def gated_decode(
    q: Any,
    k: Any,
    v: Any,
    alpha: Any,
    delta: Any,
    *,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    fast_logsigmoid: bool = True,
    tile_kv: int = TILE_KV,
    n_splits: int | None = None,
    seqlens_kv: Any = None,
    cu_seqlens_kv: Any = None,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    return_lse: bool = False,
    return_stats: bool = False,
    out: Any = None,
    lse: Any = None,
    target: str | None = None,
    max_seqlen_kv: int | None = None,
) -> Any:
    """`sparse_decode` with a gate added to every score, and tiles left out by their gates before K is read.

    Args:
        q: as in `sparse_decode`, like all arguments that are not described.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d].
        v: as k.
        alpha: [batch, n_q_heads], float32, bfloat16 or float16.
        delta: [batch, n_kv_heads, seqlen_kv], or [n_kv_heads, total] for a packed cache; likewise.
        softmax_threshold: to 1; None means min(1, d / length) of each sequence; 0 turns the test of scores off.
        gate_threshold: to 1; None means the same; 0 turns the test of gates off. With both off gates are still added.
        is_logsigmoid_gate: add logsigmoid(alpha * delta), else alpha * delta.
        fast_logsigmoid: take the polynomial for the logsigmoid, else the function.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence; None means 1.
        seqlens_kv: int [batch].
        cu_seqlens_kv: int [batch + 1].
        softmax_scale: multiplies scores and gates alike; above 0; None means d ** -0.5.
        window_size: (left, right).
        return_lse: whether lse is returned.
        return_stats: whether a `TileStats` is; bytes are those of K and V, without delta's.
        out: where o is written.
        lse: where lse is written.
        target: generation to simulate.
        max_seqlen_kv: bound of all lengths.

    Returns:
        As `sparse_decode`.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run, `out` and `lse` are as before.
    """
    softmax = sparse_checks.threshold("softmax_threshold", softmax_threshold)
    gate = sparse_checks.threshold("gate_threshold", gate_threshold)
    checks.flag("is_logsigmoid_gate", is_logsigmoid_gate)
    checks.flag("fast_logsigmoid", fast_logsigmoid)
    call = _checked(
        q,
        k,
        v,
        tile_kv=tile_kv,
        n_splits=n_splits,
        seqlens_kv=seqlens_kv,
        cu_seqlens_kv=cu_seqlens_kv,
        softmax_scale=softmax_scale,
        window_size=window_size,
        return_lse=return_lse,
        return_stats=return_stats,
        out=out,
        lse=lse,
        max_seqlen_kv=max_seqlen_kv,
    )
    _check_gates(q, k, alpha, delta)

    k4, v4 = kernel_layout(k, v, False)
    # An empty cache is one row, which is not used.
    deltas = np.ascontiguousarray(delta) if delta.size else np.zeros(v4.shape[:3], delta.dtype)
    made = call.launch(
        gated_decode_fwd, k4, v4, with_lse=return_lse or lse is not None, with_stats=return_stats, gated=True
    )
    assert made.gates is not None
    listed = made.gates.n_steps * PARTITIONS * made.geometry.n_lanes
    require(
        listed <= INDEX_MAX,
        "batch * n_kv_heads * n_splits",
        received=f"{call.q.shape[0] * call.n_kv_heads * call.n_splits}, with room for {listed} runs of keys",
        allowed=f"those with at most {INDEX_MAX}",
    )
    arguments = made.gated_arguments(
        call.q,
        k4,
        v4,
        alpha.astype(np.float32),
        deltas,
        call.thresholds(softmax),
        call.thresholds(gate),
        is_logsigmoid=bool(is_logsigmoid_gate),
        fast=bool(fast_logsigmoid),
    )
    o4, lse3, counts = made.run(call.q, arguments, target)
    results = checks.deliver(o4, lse3, q.shape, out, lse, return_lse)
    stats = None if counts is None else call.stats(made.plan.tiles, counts)
    return sparse_checks.with_stats(results, stats, return_lse)


def _check_gates(q: Any, k: Any, alpha: Any, delta: Any) -> None:
    """alpha and delta fit q and K, whose rows the device can count."""
    require_array("alpha", alpha, ndim=2, layout="[batch, n_q_heads]")
    require(alpha.shape == q.shape[:2], "alpha shape", received=list(alpha.shape), allowed=list(q.shape[:2]))
    finite = bool(np.isfinite(alpha.astype(np.float32)).all())
    require(finite, "alpha", received=alpha.tolist(), allowed="finite numbers")
    layout = "[n_kv_heads, total]" if k.ndim == 3 else "[batch, n_kv_heads, seqlen_kv]"
    require_array("delta", delta, ndim=k.ndim - 1, layout=layout)
    shape = (*k.shape[:-3], k.shape[-2], k.shape[-3])
    require(delta.shape == shape, "delta shape", received=list(delta.shape), allowed=list(shape))
    rows = "n_kv_heads * total" if k.ndim == 3 else "batch * n_kv_heads * seqlen_kv"
    require(delta.size <= INDEX_MAX, rows, received=delta.size, allowed=f"at most {INDEX_MAX} with gates")


CASES = (
    SparseCase("no-keys", 2, 1, 64, (0, 1, 0), 0.5),
    SparseCase("tile-edges", 2, 1, 80, (127, 128, 129, 257), 0.8, unused=3),
    SparseCase("llama-3.2-1b", 32, 8, 64, (300,), 0.4, tile_kv=64, unused=20),
    SparseCase("qwen3-0.6b-d-major", 16, 8, 128, (200,), 0.5, tile_kv=32, unused=20, d_major=True),
    SparseCase("gemma-3-1b-window", 4, 1, 256, (900,), 0.5, tile_kv=64, window=511, unused=5),
    SparseCase("gemma-3-1b-d-major", 4, 1, 256, (900,), 0.5, tile_kv=64, window=511, unused=5, d_major=True),
    SparseCase("falcon-7b", 71, 1, 64, (300, 3), 0.5, tile_kv=32, locality=4.0),
    SparseCase("one-head-per-group", 2, 2, 96, (300, 1), 0.5, tile_kv=32),
    SparseCase("tiles-of-1024", 2, 1, 64, (4000, 1024), 0.9, tile_kv=1024),
    SparseCase("window-in-a-tile", 4, 2, 64, (400, 140), 0.5, tile_kv=256, window=40, unused=2),
    SparseCase("splits", 12, 1, 96, (700,), 0.3, tile_kv=64, n_splits=3, unused=30),
    SparseCase("splits-without-tiles", 8, 1, 64, (200,), 0.5, tile_kv=32, n_splits=5, window=150, seed=9),
    SparseCase("threshold-1", 2, 1, 112, (500,), 1.0, softmax_scale=1.5),
    SparseCase("threshold-small", 4, 1, 64, (900,), 1e-6, locality=8.0),
    SparseCase("packed", 2, 1, 192, (129, 0, 400, 1), 0.3, tile_kv=64, packed=True, window=300, unused=7),
    SparseCase("several-items", 2, 1, 128, (5000, 2049), 0.2, tile_kv=16, unused=1),
    SparseCase("two-cores", 4, 2, 64, (400, 30), 0.3, tile_kv=32, n_cores=2, unused=1),
    SparseCase("two-cores-splits", 4, 1, 128, (1500, 100), 0.3, n_splits=2, n_cores=2, d_major=True, seed=1),
    GatedCase("gated-tile-edges", 2, 1, 80, (0, 1, 127, 128, 129), 0.3, tile_kv=32, unused=3, seed=2),
    GatedCase("gated-qwen2.5-0.5b", 14, 2, 64, (300,), 0.2, tile_kv=32, unused=20),
    GatedCase("gated-window", 4, 1, 256, (900,), 0.1, tile_kv=64, window=511, unused=5, negative=True, seed=2),
    GatedCase("gated-falcon-7b", 71, 1, 64, (300,), 0.5, tile_kv=32, locality=4.0, negative=True),
    GatedCase("gated-linear", 3, 3, 112, (500,), 0.1, tile_kv=32, is_logsigmoid=False),
    GatedCase("gated-exact", 4, 2, 64, (500,), 0.1, tile_kv=32, fast=False, negative=True),
    GatedCase("gated-tiles-of-1024", 2, 1, 64, (4000, 1024), 0.5, tile_kv=1024, gates=3.0, window=3500, seed=11),
    GatedCase("gated-splits", 8, 1, 64, (900,), 0.3, tile_kv=32, n_splits=3, unused=9, window=600),
    GatedCase("gated-packed", 2, 1, 192, (129, 0, 300), 0.3, tile_kv=16, packed=True, unused=7, gate_dtype="float32"),
    GatedCase("gates-alone", 8, 1, 128, (700,), 0.0, tile_kv=64, gate_threshold=0.9),
    GatedCase("gated-several-items", 2, 1, 128, (5000, 2049), 0.05, tile_kv=16, gate_threshold=0.01, unused=1),
)  # fmt: skip


def main() -> int:
    """Check o, lse and the tiles that are left out against the oracle in every case; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference import rounded_sparse as twin
    from reference import sparse_decode as oracle

    def inputs(case: SparseCase, dtype: str) -> Any:
        """Operands, and arguments of oracle, twin and wrapper."""
        *operands, options = case.inputs(FLOATS[dtype])
        options |= {"softmax_threshold": case.threshold, "n_splits": case.n_splits}
        if isinstance(case, GatedCase):
            *gates, how = case.gate_inputs(FLOATS[dtype])
            return (*operands, *gates), options | how | {"gate_threshold": case.gate_threshold}
        return operands, options

    def results(case: SparseCase, dtype: str, target: str | None) -> Any:
        operands, options = inputs(case, dtype)
        options |= {"return_lse": True, "return_stats": True, "target": target}
        if isinstance(case, GatedCase):
            o, lse, stats = gated_decode(*operands, **options)
        else:
            options |= case.launch(target)
            o, lse, stats = sparse_decode(*operands, **options)
        return o, lse, stats.tiles_skipped.astype(np.float32)

    def references(case: SparseCase, dtype: str) -> Any:
        operands, options = inputs(case, dtype)
        if isinstance(case, GatedCase):
            exact, (o, lse) = oracle.gated_decode(*operands, **options), twin.gated_decode_rounded(*operands, **options)
        else:
            exact, (o, lse) = (
                oracle.sparse_decode(*operands, **options),
                twin.sparse_decode_rounded(*operands, **options),
            )
        # A number of tiles is not rounded: its budget is below 1.
        skipped = exact.stats.tiles_skipped
        return (exact.o, o), (exact.lse, lse), (skipped, skipped[None])

    return budget_check(__doc__ or "", results, references, CASES, names=("o", "lse", "tiles"))


if __name__ == "__main__":
    raise SystemExit(main())
