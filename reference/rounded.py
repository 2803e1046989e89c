"""Attention in the precision of the machine, to measure what rounding alone costs.

Inputs as given, products and sums in float32, probabilities rounded to the input dtype before they
meet the values, output rounded to the input dtype: the roundings the kernels document. Written from
that sentence and not from a kernel; the distance to the float64 oracle is the error budget's unit.

The machine's order of summation is not specified, and where a few scores dominate the softmax one order
can be right by luck. So the computation runs in several orders, and neighbouring keys are summed in
different ones, because an error common to all scores would cancel. The budget takes the worst of 8, in float32 of 16.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np

from reference.caches import caches
from reference.decode import Array, softmax
from reference.flash_decode import Factor, Options, Window, per_head

ORDERS = 8
# In float32 the sums' orders are all there is, where two-byte types have the rounding of every probability.
ORDERS_FLOAT32 = 16
# Elements of which several orders are worked on together: as many as a core's cache holds.
_BLOCK = 1 << 16


def n_orders(q: Array) -> int:
    """Orders of summation for queries of this type."""
    return ORDERS_FLOAT32 if q.dtype == np.float32 else ORDERS


def flash_decode_rounded(
    q: Array,
    k: Array,
    v: Array,
    *,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    k_scale: Factor | None = None,
    v_scale: Factor | None = None,
    n_last: int = 0,
) -> tuple[Array, Array]:
    """`reference.flash_decode.flash_decode` in several orders of summation (`n_orders`).

    Soft cap, slopes, sinks and scales are float32 operations of their own. Eight-bit caches are exact when widened.

    Args:
        q: as in `flash_decode`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        seqlens_kv: `[batch]`.
        cu_seqlens_kv: `[batch + 1]`.
        softmax_scale: None means `d ** -0.5`.
        window_size: `(left, right)`.
        softcap: bound of the scores.
        sinks: `[n_q_heads]`.
        alibi_slopes: `[n_q_heads]`.
        k_scale: a number or `[n_kv_heads]`.
        v_scale: a number or `[n_kv_heads]`.
        n_last: products that every order adds last and one after the other: those of the last elements of d.

    Returns:
        o `[n_orders, *q.shape]` in q's dtype and lse `[n_orders, *q.shape[:-1]]` in float32.
    """
    options = Options.of(
        q,
        k,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    logits = None if sinks is None else per_head("sinks", sinks, q.shape[-2]).astype(np.float32)
    sequences = caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)
    tokens = q if q.ndim == 4 else q[:, None]
    batch, s, n_q_heads, _ = tokens.shape
    group = n_q_heads // len(options.scale)
    orders = n_orders(q)
    o = np.zeros((orders, batch, s, n_q_heads, v.shape[-1]), q.dtype)
    lse = np.zeros((orders, batch, s, n_q_heads), np.float32)
    factors = [x.astype(np.float32) for x in (options.scale, options.v_scale)]
    for b, (keys, values) in enumerate(sequences):
        # Between the first token's first key and the end of the cache every key is seen by some token.
        begin, _ = options.visible(len(keys) - s)
        columns = np.moveaxis(keys[begin:].astype(np.float32), 0, 2)  # [n_kv_heads, d, n_keys]
        rows = values[begin:].astype(np.float32)
        by_head = np.moveaxis(tokens[b].astype(np.float32).reshape(s, -1, group, q.shape[-1]), 1, 0)
        queries = by_head.reshape(len(columns), s * group, -1)
        every = _scores(queries, columns, orders, n_last).reshape(orders, len(columns), s, group, columns.shape[2])
        for kv, (scale, v_scale) in enumerate(zip(*factors, strict=True)):
            heads = slice(kv * group, (kv + 1) * group)
            sink = None if logits is None else logits[heads]
            scores = every[:, kv] * scale
            for i in range(s):
                position = i + len(keys) - s
                first, last = options.visible(position)
                seen = slice(first - begin, last - begin)
                of_orders, mine = options.logits(scores[:, i, :, seen], first, position, heads), rows[seen, kv]
                for order, x in enumerate(of_orders):
                    turn = _turn(order, x.shape[1])
                    p, total, lse[order, b, i, heads] = softmax(x[:, turn], sink)
                    weighted = np.einsum("gs,sd->gd", p.astype(q.dtype).astype(np.float32), mine[turn])
                    o[order, b, i, heads] = (v_scale * (weighted / total[:, None])).astype(q.dtype)
    return (o, lse) if q.ndim == 4 else (o[:, :, 0], lse[:, :, 0])


def gqa_decode_attention_rounded(
    q: Array, k: Array, v: Array, *, softmax_scale: float | None = None
) -> tuple[Array, Array]:
    """`reference.decode.gqa_decode_attention`: one token of one sequence.

    Args:
        q: `[n_q_heads, d]`.
        k: `[seqlen_kv, n_kv_heads, d]`.
        v: `[seqlen_kv, n_kv_heads, d]`.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.

    Returns:
        o `[n_orders, n_q_heads, d]` in q's dtype and lse `[n_orders, n_q_heads]` in float32.
    """
    o, lse = flash_decode_rounded(q[None], k[None], v[None], softmax_scale=softmax_scale)
    return o[:, 0], lse[:, 0]


def _scores(queries: Array, columns: Array, orders: int, n_last: int) -> Array:
    """Queries `[n_kv_heads, n, d]` times keys `[n_kv_heads, d, n_keys]` as `[orders, n_kv_heads, n, n_keys]`.

    Float32 sums over d, one product after the other. Even keys are summed in one order and odd keys in another, but for
    the last `n_last` elements of d.
    """
    d = columns.shape[1]
    scores = np.empty((orders, *queries.shape[:2], columns.shape[2]), np.float32)
    elements = np.ascontiguousarray(np.moveaxis(queries, 2, 0))
    for odd in range(2):
        keys = np.ascontiguousarray(np.moveaxis(columns[:, :, odd::2], 1, 0))
        shape = (*queries.shape[:2], keys.shape[2])
        together = max(1, _BLOCK // max(1, prod(shape)))
        for first in range(0, orders, together):
            some = range(orders)[first : first + together]
            turns = np.stack([_terms(order, d, n_last)[odd] for order in some])
            sums = np.zeros((len(some), *shape), np.float32)
            product = np.empty_like(sums)
            for c in turns.T:
                # Of one order a view, of several a copy.
                at = c if len(c) > 1 else slice(c[0], c[0] + 1)
                np.multiply(elements[at][..., None], keys[at][:, :, None], out=product)
                sums += product
            scores[first : first + together, :, :, odd::2] = sums
    return scores


@lru_cache(maxsize=256)
def _terms(order: int, d: int, n_last: int) -> Array:
    """The elements of d in the order in which even and odd keys add their products, `[2, d]`."""
    rng = np.random.default_rng(order)
    return np.stack([np.append(rng.permutation(d - n_last), np.arange(d - n_last, d)) for _ in range(2)])


@lru_cache(maxsize=256)
def _turn(order: int, n_keys: int) -> Array:
    """In which order a sequence's keys are added."""
    return np.random.default_rng(order).permutation(n_keys)
