"""Calibration of skip-softmax decode, on the host: what each threshold saves and costs, and the threshold to choose.

    c[h, t]  = max_j softmax_scale * q[h] . k[j, h // group]               over the visible keys j of tile t
    skip     iff c[h, t] < max(c[h, :t]) + log(threshold)                  the first tile is never skipped

A threshold is at most 1, so a skipped tile is below the largest score before it and does not become that: one running
maximum serves every threshold, and none depends on what another one skips. So one pass over keys and values, from left
to right, computes the softmax of all tiles and, for every threshold, of those it skips.

The share of tiles that a threshold skips depends on the length of the cache. NVIDIA's ModelOpt takes that out with a
factor: `threshold * seqlen_kv = a * exp(b * sparsity)`, one a and b for all lengths. To find and use them:

    found = [calibrate(q, k, v, thresholds) for q, k, v in samples]        of one length or of several
    factor = fit_scale_factor(
        np.concatenate([x.thresholds for x in found]),
        np.concatenate([x.sparsity for x in found]),
        np.concatenate([np.full(len(thresholds), k.shape[1]) for _, k, _ in samples]),
    )
    factor.threshold(0.5, seqlen_kv)                                       to skip half of the tiles at any length

Numerics  scores, exponentials and the sums of a tile float32; decisions, and sums over tiles, float64. A threshold that
          skips nothing has the error 0, not that of a rounding.
Memory    keys and values of STRETCH keys of one KV head in float32, their scores, and per threshold an output of the
          query heads of that KV head in float64. Nothing depends on seqlen_kv or n_kv_heads.
Oracle    reference/skip_softmax.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from contributed import _decode_checks as checks
from contributed import _sparse_checks as sparse_checks
from contributed._checks import require
from contributed._sparse_checks import TILE_KV

Array = np.ndarray[Any, np.dtype[Any]]

STRETCH = 2048  # keys in float32 at a time: whole tiles of every size, a multiple of TILE_MAX
FIT_MIN, FIT_MAX = 0.1, 0.9  # sparsities that the fit takes in: outside, a few tiles decide


class Calibration(NamedTuple):
    """What each threshold saves and costs; float64 [n_thresholds]."""

    thresholds: Array
    """As given."""
    sparsity: Array
    """Skipped tiles over tiles with a visible key, of all query heads of all sequences."""
    values_unread: Array
    """The same of KV heads: tiles that every query head of the group skips, whose V stays in HBM."""
    error: Array
    """Largest |o - dense o| / |dense o| of a query head of a sequence; | | is the Euclidean norm over d."""


def calibrate(
    q: Any,
    k: Any,
    v: Any,
    thresholds: Sequence[float] | Array,
    *,
    seqlens_kv: Any = None,
    cu_seqlens_kv: Any = None,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    tile_kv: int = TILE_KV,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Tiles skipped and output error of skip-softmax decode at several thresholds, from one pass over the caches.

    Args:
        q: [batch, n_q_heads, d], one new token per sequence; float32, bfloat16 or float16.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d] with `cu_seqlens_kv`; q's dtype. Keys
            beyond a length or before a window are not looked at.
        v: as k.
        thresholds: [n_thresholds], each above 0 and at most 1, in any order.
        seqlens_kv: int [batch], keys in use of each sequence; None means all there is room for.
        cu_seqlens_kv: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1].
        softmax_scale: multiplies q . k; None means d ** -0.5.
        window_size: (left, right), keys visible around the new token; None is unlimited.
        tile_kv: keys of a tile, a power of two from 16 to 1024.
        progress: called with the tiles done and the tiles in all, of all KV heads, after each stretch of a cache.

    Returns:
        The thresholds in their order, with shares and errors.

    Raises:
        ValueError, TypeError: an argument is outside the limits above, no key is visible, or, found on the way, a
            score or a tile's sum of values is not finite in float32.
    """
    q4 = sparse_checks.operands(q, k, v)
    caches = _caches(q4, k, v, seqlens_kv, cu_seqlens_kv)
    batch, n_q_heads, d = q.shape
    n_kv_heads = k.shape[-2]
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
    lambdas = _thresholds(thresholds)
    sparse_checks.tile(tile_kv)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: received {type(progress).__name__}, allowed a function or None")
    used = [len(keys) for keys, _ in caches]
    first = [0 if options.left is None else max(0, n - 1 - options.left) for n in used]
    tiles_total = n_kv_heads * sum(-(-n // tile_kv) - at // tile_kv for n, at in zip(used, first, strict=True))
    require(tiles_total > 0, "k", received=f"{used} keys in use", allowed="at least one in some sequence")

    group = n_q_heads // n_kv_heads
    scale = d**-0.5 if options.softmax_scale is None else options.softmax_scale
    with np.errstate(over="ignore"):
        rows = (scale * q.astype(np.float64)).astype(np.float32).reshape(batch, n_kv_heads, group, d)
    skipped, unread = (np.zeros(len(lambdas), np.int64) for _ in range(2))
    error, done = np.zeros(len(lambdas)), 0
    for b, i_kv in np.ndindex(batch, n_kv_heads):
        if not used[b]:
            continue
        heads = _Heads(rows[b, i_kv], np.log(lambdas))
        for begin in range(first[b] // tile_kv * tile_kv, used[b], STRETCH):
            seen = slice(max(begin, first[b]), min(begin + STRETCH, used[b]))
            k_tiles, v_tiles = (_in_tiles(x[seen, i_kv], seen.start - begin, tile_kv) for x in caches[b])
            skip = heads.attend(k_tiles, v_tiles, slice(seen.start - begin, seen.stop - begin))
            skipped += skip.sum(axis=(0, 2))
            unread += skip.all(axis=0).sum(axis=1)
            done += len(k_tiles)
            if progress is not None:
                progress(done, tiles_total)
        error = np.maximum(error, heads.errors())
    return Calibration(lambdas, skipped / (tiles_total * group), unread / tiles_total, error)


@dataclass(frozen=True)
class ScaleFactor:
    """A law of sparsity: `threshold * seqlen_kv = a * exp(b * sparsity)`.

    Args:
        a: above 0.
        b: finite.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        allowed = "a finite number above 0"
        require(0 < _number("a", self.a, allowed) < math.inf, "a", received=self.a, allowed=allowed)
        allowed = "a finite number"
        require(math.isfinite(_number("b", self.b, allowed)), "b", received=self.b, allowed=allowed)

    def threshold(self, sparsity: float, seqlen_kv: int) -> float:
        """The threshold that skips a share of the tiles of a cache, at most 1.

        Args:
            sparsity: share of the tiles, 0 to 1.
            seqlen_kv: keys of the cache, at least 1.

        Raises:
            ValueError, TypeError: an argument is out of range.
        """
        allowed = "a number from 0 to 1"
        share = _number("sparsity", sparsity, allowed)
        require(0 <= share <= 1, "sparsity", received=sparsity, allowed=allowed)
        checks.count("seqlen_kv", seqlen_kv, checks.SEQLEN_MAX)
        # In logs: before the cut at 1, a steep law is beyond any float.
        return math.exp(min(0.0, math.log(self.a) + self.b * share - math.log(seqlen_kv)))


def fit_scale_factor(
    thresholds: Sequence[float] | Array, sparsity: Sequence[float] | Array, seqlens_kv: Sequence[int] | Array | int
) -> ScaleFactor:
    """The law that is closest to calibrations: least squares of log(threshold * seqlen_kv) over sparsity.

    Args:
        thresholds: [n], each above 0 and at most 1.
        sparsity: [n], the share of tiles that each of them skips, 0 to 1. Points outside 0.1..0.9 are left out.
        seqlens_kv: int [n], keys of the caches where it does, or one number for all.

    Raises:
        ValueError, TypeError: an argument is out of range, or the points left do not determine a law: less than two
            sparsities, or so close together that `a` is not a float.
    """
    lambdas = _thresholds(thresholds)
    layout = f"[{len(lambdas)}], one number from 0 to 1 per threshold"
    shares = _numbers("sparsity", sparsity, "fiu", layout)
    require(shares.shape == lambdas.shape, "sparsity shape", received=list(shares.shape), allowed=layout)
    require(bool(((shares >= 0) & (shares <= 1)).all()), "sparsity", received=shares.tolist(), allowed=layout)
    layout = f"1..{checks.SEQLEN_MAX}, one integer or [{len(lambdas)}]"
    lengths = _numbers("seqlens_kv", seqlens_kv, "iu", layout)
    fits = lengths.shape in ((), lambdas.shape)
    require(fits, "seqlens_kv shape", received=list(lengths.shape), allowed=layout)
    good = bool(((lengths >= 1) & (lengths <= checks.SEQLEN_MAX)).all())
    require(good, "seqlens_kv", received=lengths.tolist(), allowed=layout)

    inside = (shares >= FIT_MIN) & (shares <= FIT_MAX)
    x, y = shares[inside], np.log(lambdas * lengths)[inside]
    (log_a, b), _, rank, _ = np.linalg.lstsq(np.column_stack([np.ones_like(x), x]), y, rcond=None)
    allowed = f"two or more different ones within {FIT_MIN}..{FIT_MAX}"
    require(int(rank) == 2, "sparsity", received=shares.tolist(), allowed=allowed)
    with np.errstate(over="ignore", under="ignore"):
        a = float(np.exp(log_a))
    require(0 < a < math.inf, "sparsity", received=shares.tolist(), allowed=f"{allowed}, further apart")
    return ScaleFactor(a, float(b))


class _Heads:
    """Online softmax of the query heads of one KV head: all tiles, and for each threshold those it skips.

    The state holds what is skipped, not what is left, so that an error is no difference of two almost equal outputs.

    Args:
        q: scaled queries, float32 [group, d].
        logs: logs of the thresholds, float64 [n].
    """

    def __init__(self, q: Array, logs: Array) -> None:
        group, d = q.shape
        self._q, self._logs = q, logs
        # Weighted sums of the values, and in the last column of the weights, all relative to the largest score so far.
        self._m = np.full(group, -np.inf)
        self._all, self._skipped = np.zeros((group, d + 1)), np.zeros((group, len(logs), d + 1))

    def attend(self, keys: Array, values: Array, visible: slice) -> Array:
        """Take in the next tiles, float32 [n_tiles, tile_kv, d]; which are skipped, bool [group, n, n_tiles]."""
        n_tiles, tile_kv, d = keys.shape
        with np.errstate(over="ignore", invalid="ignore"):
            s = self._q @ keys.reshape(-1, d).T
            finite = bool(np.isfinite(s).all())
            require(finite, "q, k", received="a score that is not finite in float32", allowed="finite scores")
            s[:, : visible.start] = -np.inf
            s[:, visible.stop :] = -np.inf
            s = s.reshape(-1, n_tiles, tile_kv)
            largest = s.max(axis=2).astype(np.float64)
            reached = np.maximum.accumulate(np.column_stack([self._m, largest]), axis=1)
            skip = largest[:, None] < reached[:, None, :-1] + self._logs[:, None]
            m = reached[:, -1]
            p = np.exp(s - m[:, None, None].astype(np.float32))
            outputs = (p.swapaxes(0, 1) @ values).swapaxes(0, 1)
        finite = bool(np.isfinite(outputs).all())
        require(finite, "v", received="a tile whose sum is not finite in float32", allowed="finite sums")
        by_tile = np.concatenate([outputs, p.sum(axis=2)[..., None]], axis=2).astype(np.float64)
        correction = np.exp(self._m - m)[:, None]
        self._all = self._all * correction + by_tile.sum(axis=1)
        self._skipped = self._skipped * correction[..., None] + skip.astype(np.float64) @ by_tile
        self._m = m
        return np.asarray(skip)

    def errors(self) -> Array:
        """Largest |o - dense o| / |dense o| of a head, [n]; 0 of a head where they are equal."""
        dense = self._all[:, None, :-1] / self._all[:, None, -1:]
        l, skipped, l_skipped = self._all[:, None, -1:], self._skipped[..., :-1], self._skipped[..., -1:]
        # The tile of the largest score is never skipped, so there is always weight left.
        over = np.linalg.norm((l_skipped * dense - skipped) / (l - l_skipped), axis=2)
        under = np.broadcast_to(np.linalg.norm(dense, axis=2), over.shape)
        ratios = np.zeros_like(over)
        with np.errstate(divide="ignore"):
            np.divide(over, under, out=ratios, where=over > 0)
        return np.asarray(ratios.max(axis=0))


def _in_tiles(rows: Array, before: int, tile_kv: int) -> Array:
    """Rows [n, d] in float32 [n_tiles, tile_kv, d], with `before` rows of 0 before them, and 0 up to a tile's end."""
    n, d = rows.shape
    tiles = np.zeros((-(-(before + n) // tile_kv), tile_kv, d), np.float32)
    tiles.reshape(-1, d)[before : before + n] = rows
    return tiles


def _caches(q: Array, k: Array, v: Array, seqlens_kv: Any, cu_seqlens_kv: Any) -> list[tuple[Array, Array]]:
    """Keys and values in use of each sequence, views [n, n_kv_heads, d]; q has four axes."""
    _, first, used, _ = checks.flat_cache(q, k, v, seqlens_kv, cu_seqlens_kv)
    if first is None:
        return [(k[b, :n], v[b, :n]) for b, n in enumerate(used)]
    return [(k[at : at + n], v[at : at + n]) for at, n in zip(first, used, strict=True)]


def _thresholds(value: Any) -> Array:
    layout = "[n], one or more numbers above 0 and at most 1"
    array = _numbers("thresholds", value, "fiu", layout)
    require(array.ndim == 1 and len(array) > 0, "thresholds shape", received=list(array.shape), allowed=layout)
    good = bool(((array > 0) & (array <= 1)).all())
    require(good, "thresholds", received=array.tolist(), allowed=layout)
    return array


def _number(name: str, value: Any, allowed: str) -> float:
    array = _numbers(name, value, "fiu", allowed)
    require(array.ndim == 0, f"{name} shape", received=list(array.shape), allowed=allowed)
    return float(array)


def _numbers(name: str, value: Any, kinds: str, allowed: str) -> Array:
    """Numbers of some of NumPy's kinds of types as a float64 array of its own."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: received {value!r}, allowed {allowed}") from error
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: received {array.dtype}, allowed {allowed}")
    return array.astype(np.float64)
