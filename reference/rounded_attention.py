"""Prefill attention and its gradients in the precision of the machine, to measure what rounding alone costs.

Inputs as given, products and sums in float32, results rounded to the input dtype, and so is what enters a second
matmul: the probabilities, and in the backward their gradients ds. `reference.rounded` says why there are several orders
of summation. Here a matrix product sums in the order of its operands, and those are permuted: all rows and heads that
share keys are taken at once, and either half of the keys has its own order of the head dim.

Which scores N:M drops and which tiles are skipped is decided in float64, or replayed (`kept`). A machine that decides
in float32 agrees wherever the margins are larger than the error of its scores; on other inputs there is nothing to
compare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.decode import Array, softmax
from reference.flash_attention import Prefill, Tile
from reference.flash_attention_bwd import check_do
from reference.rounded import n_orders


def flash_attention_rounded(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """`reference.flash_attention.flash_attention` in several orders of summation (`n_orders`).

    Args:
        q: as in `flash_attention`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        options: of `flash_attention`.

    Returns:
        o `[n_orders, *q.shape]` in q's dtype and lse `[n_orders, *q.shape[:-1]]` in float32.
    """
    call, orders = Prefill.of(q, k, v, **options), n_orders(q)
    o = np.zeros((orders, *call.q.shape[:2], v.shape[-1]), q.dtype)
    lse = np.full((orders, *call.q.shape[:2]), -np.inf, np.float32)
    for tile in call.tiles():
        operands = _Operands.of(call, tile)
        for order in range(orders):
            rng = _Order(order)
            x = operands.permuted(rng)
            o[order, x.rows, x.heads], lse[order, x.rows, x.heads] = _forward(x, call.rules.scale, q.dtype, rng)
    return o.reshape(orders, *q.shape[:-1], v.shape[-1]), lse.reshape(orders, *q.shape[:-1])


def flash_attention_bwd_rounded(do: Array, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array, Array]:
    """`reference.flash_attention_bwd.flash_attention_bwd` in several orders of summation.

    o, rounded, and lse are those of the forward in the same order; the scores are summed anew, in another one.

    Args:
        do: as in `flash_attention_bwd`, like all arguments.
        q: `[batch, seqlen_q, n_q_heads, d]`, or packed.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        options: of `flash_attention`.

    Returns:
        dq `[n_orders, *q.shape]`, dk `[n_orders, *k.shape]` and dv `[n_orders, *v.shape]` in the dtypes of q, k and v.
    """
    call, orders = Prefill.of(q, k, v, **options), n_orders(q)
    check_do(do, q, v)
    upstream = do.reshape(-1, *do.shape[-2:]).astype(np.float32)
    scale = np.float32(call.rules.scale)
    dq, dk, dv = (np.zeros((orders, *x.shape), np.float32) for x in (call.q, call.k, call.v))
    for tile in call.tiles():
        operands = _Operands.of(call, tile)
        for order in range(orders):
            rng = _Order(order)
            x = operands.permuted(rng)
            o, lse = _forward(x, call.rules.scale, q.dtype, rng)
            g = upstream[x.rows, x.heads]
            delta = (o * g).sum(axis=-1)
            shift = np.where(np.isneginf(lse), np.zeros_like(lse), lse)
            p = _scores(x, call.rules.scale, rng)
            p -= shift[:, None]
            np.exp(p, out=p)
            ds = _products(g, x.values, rng)
            ds -= delta[:, None]
            ds *= p
            p, ds = round_to(p, q.dtype), round_to(ds, q.dtype)
            dq[order, x.rows, x.heads] = scale * (ds @ x.columns)
            dk[order, x.keys, tile.kv] += ds.T @ x.queries
            dv[order, x.keys, tile.kv] += p.T @ g
    dk *= scale
    like = ((dq, q), (dk, k), (dv, v))
    results = [gradient.reshape(orders, *x.shape).astype(x.dtype) for gradient, x in like]
    return results[0], results[1], results[2]


def round_to(x: Array, dtype: Any) -> Array:
    """Float32 numbers rounded to a type and widened again."""
    if dtype == np.float32:
        return x
    if dtype != np.float16:
        return x.astype(dtype).astype(np.float32)
    # NumPy takes a float16 apart one at a time, which would be most of the time of a call. 13 bits of the significand
    # go, nearest even; next to 0.75 float32 has the spacing of the subnormal numbers of float16.
    bits = x.view(np.uint32)
    shorter = bits >> np.uint32(13)
    shorter &= np.uint32(1)
    shorter += bits
    shorter += np.uint32(0xFFF)
    shorter &= np.uint32(0xFFFFE000)
    size = np.abs(x)
    result = np.where(size < np.float32(2**-14), (x + np.float32(0.75)) - np.float32(0.75), shorter.view(np.float32))
    above = size >= np.float32(65520)
    result[above] = np.copysign(np.float32(np.inf), x[above])
    return result


class _Operands(NamedTuple):
    """Rows of a tile, all heads of the group, and the keys that they read; float32."""

    rows: Array
    """In the packed q, `[n_rows]`: those of every head."""
    heads: Array
    """The query head of each row."""
    keys: Array
    """In the packed k, `[n]`."""
    queries: Array
    """`[n_rows, d]`."""
    columns: Array
    """Keys `[n, d]`."""
    values: Array
    """`[n, d]`."""
    weighed: Array
    """bool `[n_rows, n]`."""

    @classmethod
    def of(cls, call: Prefill, tile: Tile) -> _Operands:
        group, n_rows, _ = tile.scores.shape
        heads = np.repeat(np.arange(tile.heads.start, tile.heads.stop), n_rows)
        rows = np.tile(np.arange(tile.rows.start, tile.rows.stop), group)
        keys = tile.keys.start + np.flatnonzero(tile.read)
        queries, columns, values = call.q[rows, heads], call.k[keys, tile.kv], call.v[keys, tile.kv]
        queries, columns, values = (x.astype(np.float32) for x in (queries, columns, values))
        weighed = ~np.isneginf(tile.scores[..., tile.read]).reshape(group * n_rows, -1)
        return cls(rows, heads, keys, queries, columns, values, weighed)

    def permuted(self, rng: _Order) -> _Operands:
        """Rows and keys in another order."""
        i, j = rng.permutation(len(self.rows)), rng.permutation(len(self.keys))
        queries, columns, values = self.queries[i], self.columns[j], self.values[j]
        return _Operands(self.rows[i], self.heads[i], self.keys[j], queries, columns, values, self.weighed[i][:, j])


class _Order:
    """Permutations of one order of summation; the first order leaves everything as it comes, as machines often do."""

    def __init__(self, number: int) -> None:
        self._rng = np.random.default_rng(number) if number else None

    def permutation(self, n: int) -> Array:
        """The numbers 0..n - 1."""
        return np.arange(n) if self._rng is None else self._rng.permutation(n)


def _products(left: Array, right: Array, rng: _Order) -> Array:
    """`left @ right.T` of `[n_rows, d]` and `[n, d]`, with another order of the sums over d in either half of the n."""
    half = len(right) // 2
    result = np.empty((len(left), len(right)), np.float32)
    for part in (slice(half), slice(half, None)):
        turn = rng.permutation(left.shape[1])
        result[:, part] = left[:, turn] @ right[part, turn].T
    return result


def _scores(x: _Operands, scale: float, rng: _Order) -> Array:
    """Scaled scores, -inf for what is not weighed."""
    scores = _products(x.queries, x.columns, rng)
    scores *= np.float32(scale)
    np.copyto(scores, np.float32(-np.inf), where=~x.weighed)
    return scores


def _forward(x: _Operands, scale: float, dtype: Any, rng: _Order) -> tuple[Array, Array]:
    """o, rounded to a type, `[n_rows, d]` and lse `[n_rows]`."""
    p, total, lse = softmax(_scores(x, scale, rng))
    return round_to(round_to(p, dtype) @ x.values / total[:, None], dtype), lse
