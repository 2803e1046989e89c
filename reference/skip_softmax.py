"""Skip-softmax decode, and the calibration that turns a target sparsity into a threshold.

    s[h, j]  = softmax_scale * q[h] . k[j, h // group]                     one new token per sequence
    skip t   iff max_j s[h, j] < m + log(skip_softmax_threshold)           j: visible keys of tile t, m: largest s[h]
                                                                           of the tiles before t, -inf at first
    o, lse   = softmax attention over the visible keys of the tiles that are left

Each query head decides for itself, over tiles of keys `t * tile_kv` and after, from left to right. Comparisons are
strict. A head's skipped tile weighs nothing; v of a tile that all heads of a group skip is not looked at. As the
threshold is at most 1, a skipped tile cannot raise m: m is the maximum of all tiles before, skipped or not, and one
pass over the scores decides for every threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reference.caches import caches
from reference.decode import Array, attend
from reference.flash_decode import Options, Window, combine_splits
from reference.sparse_decode import (
    decode_options,
    keys_of_tiles,
    log_threshold,
    most_tiles,
    running_max,
    tile_maxima,
    visible_tiles,
)

FIT_RANGE = (0.1, 0.9)
"""Sparsities that the fit of the scale factor takes in: outside, a few tiles make the difference."""


class SkipStats(NamedTuple):
    """Which tiles a call visits and keeps. `n_tiles` is that of the longest sequence; what others lack is False."""

    tiles_total: Array
    """Tiles with a visible key, int64 `[batch, n_q_heads]`."""
    tiles_skipped: Array
    """int64 `[batch, n_q_heads]`."""
    kept: Array
    """bool `[batch, n_q_heads, n_tiles]`."""
    values_read: Array
    """Tiles that some head of the group keeps, bool `[batch, n_kv_heads, n_tiles]`."""
    margin: Array
    """Distance of the closest decision from the other one, in units of s, `[batch, n_q_heads]`; inf if none."""


class SkipSoftmaxDecode(NamedTuple):
    """Output `o [batch, n_q_heads, d]` and natural log-sum-exp `lse [batch, n_q_heads]`, float64, and `stats`."""

    o: Array
    lse: Array
    stats: SkipStats


def skip_softmax_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    skip_softmax_threshold: float | None,
    tile_kv: int = 128,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
) -> SkipSoftmaxDecode:
    """Decode attention that leaves out tiles far below the largest score a head has seen so far.

    Args:
        q: `[batch, n_q_heads, d]`.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed `[total, n_kv_heads, d]` with `cu_seqlens_kv`.
        v: as k. A tile that no head of the group keeps may hold anything.
        skip_softmax_threshold: in (0, 1]; None or 0 keeps every tile.
        tile_kv: keys per tile, at least 1.
        seqlens_kv: integers `[batch]`, the rows of each sequence in use; None means all.
        cu_seqlens_kv: integers `[batch + 1]`; sequence b owns rows `cu[b]:cu[b + 1]` of the packed cache.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.
        window_size: `(left, right)`, as in `reference.flash_decode`.

    Returns:
        The attention and the decisions. Where nothing is visible o = 0 and lse = -inf.

    Raises:
        ValueError, TypeError: shapes that do not fit together, lengths outside the cache, options out of range.
    """
    options = decode_options(q, k, softmax_scale, window_size)
    log_lambda = log_threshold("skip_softmax_threshold", skip_softmax_threshold or 0.0)
    sequences = _sequences(k, v, q, seqlens_kv, cu_seqlens_kv, tile_kv)
    batch, n_q_heads = q.shape[:2]
    n_kv_heads, n_tiles = len(options.scale), most_tiles(sequences, tile_kv)
    group = n_q_heads // n_kv_heads
    o, lse = np.zeros((batch, n_q_heads, v.shape[-1])), np.zeros((batch, n_q_heads))
    total, skipped = (np.zeros((batch, n_q_heads), np.int64) for _ in range(2))
    kept = np.zeros((batch, n_q_heads, n_tiles), np.bool_)
    values_read = np.zeros((batch, n_kv_heads, n_tiles), np.bool_)
    margin = np.full((batch, n_q_heads), np.inf)
    for b, (keys, values) in enumerate(sequences):
        first, last = options.visible(len(keys) - 1)
        tiles = visible_tiles(first, last, tile_kv)
        for kv in range(n_kv_heads):
            heads = slice(kv * group, (kv + 1) * group)
            scores = _scores(q[b, heads], keys[first:last, kv], options)
            if tiles:
                largest = tile_maxima(scores, first, tiles, tile_kv)
                limit = running_max(largest) + log_lambda
                kept[b, heads, tiles.start : tiles.stop] = ~(largest < limit)
                margin[b, heads] = np.abs(largest - limit)[:, 1:].min(axis=1, initial=np.inf)
            total[b, heads] = len(tiles)
            skipped[b, heads] = len(tiles) - kept[b, heads].sum(axis=1)
            values_read[b, kv] = kept[b, heads].any(axis=0)
            inside = keys_of_tiles(kept[b, heads], first, last, tile_kv)
            read = inside.any(axis=0)
            weighed = np.where(inside, scores, -np.inf)[:, read]
            o[b, heads], lse[b, heads] = attend(weighed, values[first:last, kv][read].astype(np.float64))
    return SkipSoftmaxDecode(o, lse, SkipStats(total, skipped, kept, values_read, margin))


class Calibration(NamedTuple):
    """What each threshold costs and saves; float64 `[n_thresholds]`."""

    thresholds: Array
    sparsity: Array
    """Share of the tiles of all query heads that are skipped."""
    values_unread: Array
    """Share of the tiles of all KV heads that no query head keeps."""
    error: Array
    """Largest `|o - dense o| / |dense o|` of a query head, in the Euclidean norm."""


def calibrate(
    q: Array,
    k: Array,
    v: Array,
    thresholds: Sequence[float] | Array,
    *,
    tile_kv: int = 128,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
) -> Calibration:
    """Sparsity and error of `skip_softmax_decode` at several thresholds, from one pass over keys and values.

    Every tile is attended to by itself once; a threshold joins those it keeps, as splits are joined.

    Args:
        q: as in `skip_softmax_decode`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        thresholds: in (0, 1], at least one.
        tile_kv: keys per tile.
        seqlens_kv: `[batch]`.
        cu_seqlens_kv: `[batch + 1]`.
        softmax_scale: None means `d ** -0.5`.
        window_size: `(left, right)`.

    Returns:
        The thresholds in their order, and per threshold the share of tiles skipped and the error.

    Raises:
        ValueError, TypeError: as `skip_softmax_decode`; no key is visible to any query.
    """
    options = decode_options(q, k, softmax_scale, window_size)
    lambdas = np.asarray(thresholds, np.float64)
    if lambdas.ndim != 1 or not len(lambdas) or not ((lambdas > 0) & (lambdas <= 1)).all():
        raise ValueError(f"thresholds: received {thresholds}, allowed one or more numbers above 0 and up to 1")
    n_kv_heads = len(options.scale)
    group = q.shape[1] // n_kv_heads
    n_tiles, skipped, unread = 0, np.zeros(len(lambdas)), np.zeros(len(lambdas))
    error = np.zeros(len(lambdas))
    for b, (keys, values) in enumerate(_sequences(k, v, q, seqlens_kv, cu_seqlens_kv, tile_kv)):
        first, last = options.visible(len(keys) - 1)
        tiles = visible_tiles(first, last, tile_kv)
        if not tiles:
            continue
        cuts = [t * tile_kv - first for t in tiles[1:]]
        n_tiles += n_kv_heads * len(tiles)
        for kv in range(n_kv_heads):
            scores = _scores(q[b, kv * group : (kv + 1) * group], keys[first:last, kv], options)
            values64 = values[first:last, kv].astype(np.float64)
            parts = [
                attend(*part) for part in zip(np.split(scores, cuts, axis=1), np.split(values64, cuts), strict=True)
            ]
            o, lse = np.stack([part.o for part in parts]), np.stack([part.lse for part in parts])
            dense = combine_splits(o, lse).o
            largest = tile_maxima(scores, first, tiles, tile_kv)
            before = running_max(largest)
            for i, log_lambda in enumerate(np.log(lambdas)):
                skip = largest < before + log_lambda
                skipped[i] += skip.sum()
                unread[i] += skip.all(axis=0).sum()
                difference = combine_splits(o, np.where(skip.T, -np.inf, lse)).o - dense
                error[i] = max(error[i], _largest_ratio(difference, dense))
    if not n_tiles:
        raise ValueError("k: received no visible key, needed at least one to calibrate with")
    return Calibration(lambdas, skipped / (n_tiles * group), unread / n_tiles, error)


class ScaleFactor(NamedTuple):
    """`threshold * seqlen_kv = a * exp(b * sparsity)`."""

    a: float
    b: float

    def threshold(self, sparsity: float, seqlen_kv: int) -> float:
        """The threshold to skip a share of the tiles of a cache, at most 1.

        Args:
            sparsity: 0 to 1.
            seqlen_kv: keys of the cache, at least 1.

        Raises:
            ValueError: an argument is out of range.
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity: received {sparsity}, allowed 0 to 1")
        if seqlen_kv < 1:
            raise ValueError(f"seqlen_kv: received {seqlen_kv}, allowed at least 1")
        return min(1.0, self.a * math.exp(self.b * sparsity) / seqlen_kv)


def fit_scale_factor(
    thresholds: Sequence[float] | Array, sparsity: Sequence[float] | Array, seqlens_kv: Sequence[int] | Array | int
) -> ScaleFactor:
    """The line `log(threshold * seqlen_kv) = log(a) + b * sparsity` of least squares.

    Args:
        thresholds: `[n]`, above 0.
        sparsity: `[n]`, the share of tiles each of them skips; points outside `FIT_RANGE` are left out.
        seqlens_kv: keys of the caches where it does, `[n]` or one number for all; at least 1.

    Raises:
        ValueError: the points in the range have less than two different sparsities; numbers out of range.
    """
    lambdas, x = np.asarray(thresholds, np.float64), np.asarray(sparsity, np.float64)
    lengths = np.broadcast_to(np.asarray(seqlens_kv, np.float64), lambdas.shape)
    if lambdas.ndim != 1 or x.shape != lambdas.shape:
        raise ValueError(f"sparsity: received shape {x.shape}, allowed the {lambdas.shape} of thresholds, [n]")
    if not ((lambdas > 0) & (lambdas <= 1)).all():
        raise ValueError(f"thresholds: received {thresholds}, allowed numbers above 0 and up to 1")
    if not (lengths >= 1).all():
        raise ValueError(f"seqlens_kv: received {seqlens_kv}, allowed at least 1")
    inside = (x >= FIT_RANGE[0]) & (x <= FIT_RANGE[1])
    x, y = x[inside], np.log(lambdas[inside] * lengths[inside])
    if len(np.unique(x)) < 2:
        raise ValueError(f"sparsity: received {x} within {FIT_RANGE}, needed two different ones")
    spread = x - x.mean()
    b = float(spread @ y / (spread @ spread))
    return ScaleFactor(math.exp(float(y.mean()) - b * float(x.mean())), b)


def _sequences(
    k: Array, v: Array, q: Array, seqlens_kv: Array | None, cu_seqlens_kv: Array | None, tile_kv: int
) -> list[tuple[Array, Array]]:
    if tile_kv < 1:
        raise ValueError(f"tile_kv: received {tile_kv}, allowed at least 1")
    return caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)


def _scores(q: Array, k: Array, options: Options) -> Array:
    """Scaled scores `[group, n]` of q `[group, d]` and k `[n, d]`; the scale is that of every KV head."""
    return np.asarray(options.scale[0] * (q.astype(np.float64) @ k.astype(np.float64).T))


def _largest_ratio(difference: Array, dense: Array) -> float:
    """Largest norm of a row of the difference over that of the dense row; rows that do not differ count 0."""
    over, under = np.linalg.norm(difference, axis=-1), np.linalg.norm(dense, axis=-1)
    ratios = np.zeros_like(over)
    with np.errstate(divide="ignore"):
        np.divide(over, under, out=ratios, where=over > 0)
    return float(ratios.max())
