"""Threshold-sparse and gated decode: tiles of keys that cannot matter for the softmax are left out.

    x[h, j]  = q[h] . k[j, h // group]  (+ gate[h, j])          unscaled scores of one new token per sequence
    c[t]     = largest x over the visible keys of tile t and all heads of a group together
    skip t   iff softmax_scale * (c[t] - b) < log(softmax_threshold)       b: largest c of the tiles before t
    o, lse   = softmax attention over the visible keys of the tiles that are left

    gate[h, j] = alpha[h] * delta[h // group, j], or its logsigmoid
    u[t]       = largest product of an extreme of the group's alpha and an extreme of the tile's delta
    skip t     iff softmax_scale * (u[t] - u_run) < log(gate_threshold)    u_run: largest u of the tiles before t

The gate is tested first, without k; tiles that pass take the threshold test, among themselves. Tile t holds keys
`t * tile_kv` and after; a split takes `ceil(n_tiles / n_splits)` consecutive tiles of a sequence's cache, visits those
with a visible key from right to left, and starts anew: b and u_run are -inf before its first tile, which is never
skipped. As thresholds are at most 1, a skipped tile is below the running maximum and cannot raise it: the running
maximum is that of all tiles before, and no decision depends on another one.

Comparisons are strict. Both thresholds default to `d / length`, at most 1, with the length of the sequence itself, so
that no result depends on the others of its batch. 0 turns a test off.

The public kernels differ in ways that this does not follow: they pad a group with heads of score and alpha 0, which
join c and the extremes of alpha; they take `d` over the longest length of the batch, which passes 1 for short caches;
and their windows are wider than `(left, right)` and not applied to the first tile they visit. None of their results
in `tests/golden` depends on that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from reference.caches import Cache, caches
from reference.decode import Array, attend
from reference.flash_decode import Options, Window


class TileStats(NamedTuple):
    """Which tiles a call visits and keeps. `n_tiles` is that of the longest sequence; what others lack is False."""

    tiles_total: Array
    """Tiles with a visible key, int64 `[batch, n_kv_heads, n_splits]`."""
    tiles_skipped: Array
    """Those of them that either test skips, int64 `[batch, n_kv_heads, n_splits]`."""
    kept: Array
    """Tiles in the result, whose v is read, bool `[batch, n_kv_heads, n_tiles]`."""
    keys_read: Array
    """Tiles that pass the gate, whose k is read, bool `[batch, n_kv_heads, n_tiles]`; all visited ones without it."""
    margin: Array
    """Distance of the closest decision from the other one, in the tests' units, `[batch, n_kv_heads]`; inf if none."""


class SparseDecode(NamedTuple):
    """Output `o [batch, n_q_heads, d]` and natural log-sum-exp `lse [batch, n_q_heads]`, float64, and `stats`."""

    o: Array
    lse: Array
    stats: TileStats


def sparse_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_threshold: float | None = None,
    tile_kv: int = 128,
    n_splits: int = 1,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
) -> SparseDecode:
    """Decode attention that leaves out tiles far below the largest score seen so far.

    Args:
        q: `[batch, n_q_heads, d]`.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed `[total, n_kv_heads, d]` with `cu_seqlens_kv`.
        v: as k.
        softmax_threshold: in (0, 1]; 0 keeps every tile; None means `min(1, d / length)` of each sequence.
        tile_kv: keys per tile, at least 1.
        n_splits: number of splits, at least 1.
        seqlens_kv: integers `[batch]`, the rows of each sequence in use; None means all.
        cu_seqlens_kv: integers `[batch + 1]`; sequence b owns rows `cu[b]:cu[b + 1]` of the packed cache.
        softmax_scale: finite and above 0; None means `d ** -0.5`.
        window_size: `(left, right)`, as in `reference.flash_decode`.

    Returns:
        The attention and the decisions. Where nothing is visible o = 0 and lse = -inf.

    Raises:
        ValueError, TypeError: shapes that do not fit together, lengths outside the cache, options out of range.
    """
    options = decode_options(q, k, _above_zero(softmax_scale), window_size)
    sequences = caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)
    rules = _Rules.of(softmax_threshold, 0.0, tile_kv, n_splits)
    return _decode(q, sequences, None, options, rules)


def gated_decode(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    delta: Array,
    *,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    fast_logsigmoid: bool = True,
    tile_kv: int = 128,
    n_splits: int = 1,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
) -> SparseDecode:
    """`sparse_decode` with a gate added to the scores, and tiles left out by their gates alone.

    The extremes of delta are those of all rows in use of a tile, visible or not. A tile that sticks out past the
    length counts a 0 among its deltas.

    Args:
        q: as in `sparse_decode`, like all arguments below that are not described.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed. A tile that the gate skips may hold anything.
        v: as k. A tile that is not kept may hold anything.
        alpha: `[batch, n_q_heads]`.
        delta: `[batch, n_kv_heads, seqlen_kv]`, or `[n_kv_heads, total]` for a packed cache.
        softmax_threshold: in (0, 1]; 0 is off; None means `min(1, d / length)`.
        gate_threshold: the same for the gate.
        is_logsigmoid_gate: add `logsigmoid(alpha * delta)`, else `alpha * delta`.
        fast_logsigmoid: take the polynomial of `logsigmoid`, else the function.
        tile_kv: keys per tile.
        n_splits: number of splits.
        seqlens_kv: `[batch]`.
        cu_seqlens_kv: `[batch + 1]`.
        softmax_scale: multiplies scores and gates alike; None means `d ** -0.5`.
        window_size: `(left, right)`.

    Returns:
        As `sparse_decode`.

    Raises:
        ValueError, TypeError: as `sparse_decode`; alpha or delta do not have their shape.
    """
    options = decode_options(q, k, _above_zero(softmax_scale), window_size)
    sequences = caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)
    rules = _Rules.of(softmax_threshold, gate_threshold, tile_kv, n_splits)
    deltas = sequence_deltas(k, delta, q.shape[0], seqlens_kv, cu_seqlens_kv)
    if alpha.shape != q.shape[:2]:
        raise ValueError(f"alpha: received shape {alpha.shape}, allowed {q.shape[:2]}")
    gates = _Gates(alpha.astype(np.float64), deltas, is_logsigmoid_gate, fast_logsigmoid)
    return _decode(q, sequences, gates, options, rules)


def logsigmoid(x: Array, fast: bool) -> Array:
    """Log of the logistic function, in the dtype of x.

    Args:
        x: any shape.
        fast: take the public kernel's polynomial `min(x, 0) - 0.05674870 c^2 + 0.37664706 c - 0.65169323` with
            `c = min(|x|, 4)`: -0.65 at 0 instead of -0.69, and off by 0.053 at most, for large x.

    Returns:
        An array of the shape of x.
    """
    if not fast:
        return np.asarray(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))))
    c = np.minimum(np.abs(x), 4)
    return np.asarray(np.minimum(x, 0) - 0.05674870 * c * c + 0.37664706 * c - 0.65169323)


def gate_scores(alpha: Array, delta: Array, is_logsigmoid: bool, fast: bool) -> Array:
    """Gates `[group, n]` of alpha `[group]` and delta `[n]`, in their dtype."""
    product = alpha[:, None] * delta
    return logsigmoid(product, fast) if is_logsigmoid else product


def sequence_deltas(
    k: Array, delta: Array, batch: int, seqlens_kv: Array | None, cu_seqlens_kv: Array | None
) -> list[Array]:
    """The rows in use of delta: float64 `[length, n_kv_heads]` of each sequence."""
    rows = np.moveaxis(delta, -2, -1) if delta.ndim >= 2 else delta
    if rows.shape != k.shape[:-1]:
        raise ValueError(f"delta: received shape {delta.shape}, allowed {(*k.shape[:-3], k.shape[-2], k.shape[-3])}")
    owned = caches(k, rows[..., None], batch, seqlens_kv, cu_seqlens_kv)
    return [x[..., 0].astype(np.float64) for _, x in owned]


def decode_options(q: Array, k: Array, softmax_scale: float | None, window_size: Window) -> Options:
    """Scale and window of one token per sequence."""
    if q.ndim != 3:
        raise ValueError(f"q: received shape {q.shape}, allowed (batch, n_q_heads, d)")
    return Options.of(q, k, softmax_scale=softmax_scale, window_size=window_size)


def log_threshold(name: str, threshold: float) -> float:
    """Natural log of a threshold; 0 is off and gives -inf, below which nothing is.

    Raises:
        ValueError: not a number from 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name}: received {threshold}, allowed None, 0 or a number up to 1")
    return math.log(threshold) if threshold else -math.inf


def visible_tiles(first: int, last: int, tile_kv: int) -> range:
    """The tiles that hold keys from first to before last."""
    return range(first // tile_kv, -(-last // tile_kv)) if first < last else range(0)


def tile_maxima(scores: Array, first: int, tiles: range, tile_kv: int) -> Array:
    """Largest score of each visible tile, `[..., len(tiles)]`, of the scores `[..., n]` of keys `first` and after."""
    starts = [max(t * tile_kv - first, 0) for t in tiles]
    return np.maximum.reduceat(scores, np.array(starts, np.int64), axis=-1)


def running_max(maxima: Array) -> Array:
    """Largest value before each one along the last axis; -inf before the first."""
    before = np.full_like(maxima, -np.inf)
    before[..., 1:] = np.maximum.accumulate(maxima, axis=-1)[..., :-1]
    return before


def keys_of_tiles(kept: Array, first: int, last: int, tile_kv: int) -> Array:
    """Whether each key from first to before last is in a kept tile: `[..., last - first]` from `[..., n_tiles]`."""
    return np.repeat(kept, tile_kv, axis=-1)[..., first:last]


def most_tiles(sequences: list[Cache], tile_kv: int) -> int:
    """Tiles of the longest sequence."""
    return max((-(-len(keys) // tile_kv) for keys, _ in sequences), default=0)


def _above_zero(softmax_scale: float | None) -> float | None:
    """The scale; a larger unscaled score has to be a larger score."""
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: received {softmax_scale}, allowed None or a finite number above 0")
    return softmax_scale


class _Rules(NamedTuple):
    """How tiles are cut and tested; a threshold of None depends on the length."""

    softmax_threshold: float | None
    gate_threshold: float | None
    tile_kv: int
    n_splits: int

    @classmethod
    def of(cls, softmax_threshold: float | None, gate_threshold: float | None, tile_kv: int, n_splits: int) -> _Rules:
        for name, threshold in (("softmax_threshold", softmax_threshold), ("gate_threshold", gate_threshold)):
            if threshold is not None:
                log_threshold(name, threshold)
        if n_splits < 1 or tile_kv < 1:
            raise ValueError(f"n_splits, tile_kv: received {n_splits}, {tile_kv}, allowed at least 1")
        return cls(softmax_threshold, gate_threshold, tile_kv, n_splits)

    def logs(self, d: int, length: int) -> tuple[float, float]:
        """Logs of the softmax and the gate threshold for a sequence of a length above 0."""
        default = min(1.0, d / length)
        softmax, gate = (default if x is None else x for x in (self.softmax_threshold, self.gate_threshold))
        return log_threshold("softmax_threshold", softmax), log_threshold("gate_threshold", gate)

    def splits(self, tiles: range, length: int) -> list[list[int]]:
        """Those of the tiles that each split of a sequence visits, in its order."""
        n_tiles = -(-length // self.tile_kv)
        run = -(-n_tiles // self.n_splits)
        return [[t for t in reversed(tiles) if t // run == i] for i in range(self.n_splits)]


class _Gates(NamedTuple):
    """The gates of a batch, float64."""

    alpha: Array
    """`[batch, n_q_heads]`."""
    deltas: list[Array]
    """`[length, n_kv_heads]` of each sequence."""
    is_logsigmoid: bool
    fast: bool

    def scores(self, b: int, kv: int, heads: slice, seen: slice) -> Array:
        """Gates `[group, n]` of the keys in a slice."""
        return gate_scores(self.alpha[b, heads], self.deltas[b][seen, kv], self.is_logsigmoid, self.fast)

    def bound(self, b: int, kv: int, heads: slice, tile: int, tile_kv: int) -> float:
        """Largest product of an extreme alpha of the heads and an extreme delta of the tile."""
        alpha, delta = self.alpha[b, heads], self.deltas[b][tile * tile_kv : (tile + 1) * tile_kv, kv]
        if len(delta) < tile_kv:
            delta = np.append(delta, 0.0)
        return max(float(x * y) for x in (alpha.max(), alpha.min()) for y in (delta.max(), delta.min()))


def _decode(q: Array, sequences: list[Cache], gates: _Gates | None, options: Options, rules: _Rules) -> SparseDecode:
    batch, n_q_heads, d = q.shape
    n_kv_heads, tile_kv = len(options.scale), rules.tile_kv
    group = n_q_heads // n_kv_heads
    o, lse = np.zeros((batch, n_q_heads, sequences[0][1].shape[-1] if sequences else d)), np.zeros((batch, n_q_heads))
    total, skipped = (np.zeros((batch, n_kv_heads, rules.n_splits), np.int64) for _ in range(2))
    kept, keys_read = (np.zeros((batch, n_kv_heads, most_tiles(sequences, tile_kv)), np.bool_) for _ in range(2))
    margin = np.full((batch, n_kv_heads), np.inf)
    for b, (keys, values) in enumerate(sequences):
        first, last = options.visible(len(keys) - 1)
        tiles = visible_tiles(first, last, tile_kv)
        seen = slice(first, last)
        for kv in range(n_kv_heads):
            heads = slice(kv * group, (kv + 1) * group)
            scores = q[b, heads].astype(np.float64) @ keys[seen, kv].astype(np.float64).T
            if gates is not None:
                scores = scores + gates.scores(b, kv, heads, seen)
            if tiles:
                largest = tile_maxima(scores.max(axis=0), first, tiles, tile_kv)
                scale = float(options.scale[kv])
                log_softmax, log_gate = rules.logs(d, len(keys))
                for i, order in enumerate(rules.splits(tiles, len(keys))):
                    visited = np.array(order, np.int64)
                    total[b, kv, i] = len(visited)
                    passed = visited
                    if gates is not None:
                        bounds = np.array([gates.bound(b, kv, heads, t, tile_kv) for t in order])
                        stays, gate_margin = _test(scale, bounds, log_gate)
                        passed, margin[b, kv] = visited[stays], min(margin[b, kv], gate_margin)
                    stays, softmax_margin = _test(scale, largest[passed - tiles.start], log_softmax)
                    margin[b, kv] = min(margin[b, kv], softmax_margin)
                    keys_read[b, kv, passed] = True
                    kept[b, kv, passed[stays]] = True
                    skipped[b, kv, i] = len(visited) - stays.sum()
            inside = keys_of_tiles(kept[b, kv], first, last, tile_kv)
            values64 = values[seen, kv][inside].astype(np.float64)
            o[b, heads], lse[b, heads] = attend(float(options.scale[kv]) * scores[:, inside], values64)
    return SparseDecode(o, lse, TileStats(total, skipped, kept, keys_read, margin))


def _test(scale: float, values: Array, log_of_threshold: float) -> tuple[Array, float]:
    """Which of the tiles, in the order of the visit, stay, and the distance of the closest decision."""
    above = scale * (values - running_max(values))
    distances = np.abs(above[1:] - log_of_threshold)
    return ~(above < log_of_threshold), float(distances.min(initial=np.inf))
