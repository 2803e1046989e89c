"""Attention in the precision of the machine, to measure what rounding alone costs.

Inputs as given, products and sums in float32, probabilities rounded to the input dtype before they
meet the values, output rounded to the input dtype: the roundings the kernels document. Written from
that sentence and not from a kernel; the distance to the float64 oracle is the error budget's unit.

The machine's order of summation is not specified, and where a few scores dominate the softmax one order
can be right by luck. So the computation runs in several orders, and neighbouring keys are summed in
different ones, because an error common to all scores would cancel. The budget takes the worst of 8, in float32 of 16.
"""

from __future__ import annotations

import numpy as np

from reference.caches import caches
from reference.decode import Array, softmax
from reference.flash_decode import Factor, Options, Window, per_head

ORDERS = 8
# In float32 the sums' orders are all there is, where two-byte types have the rounding of every probability.
ORDERS_FLOAT32 = 16


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
        for order in range(orders):
            every = _scores(queries, columns, order).reshape(len(columns), s, group, columns.shape[2])
            for kv, (scale, v_scale) in enumerate(zip(*factors, strict=True)):
                heads = slice(kv * group, (kv + 1) * group)
                sink = None if logits is None else logits[heads]
                scores = every[kv] * scale
                for i in range(s):
                    position = i + len(keys) - s
                    first, last = options.visible(position)
                    seen = slice(first - begin, last - begin)
                    x = options.logits(scores[i, :, seen], first, position, heads)
                    turn = np.random.default_rng(order).permutation(x.shape[1])
                    p, total, lse[order, b, i, heads] = softmax(x[:, turn], sink)
                    weighted = np.einsum("gs,sd->gd", p.astype(q.dtype).astype(np.float32), rows[seen, kv][turn])
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


def _scores(queries: Array, columns: Array, order: int) -> Array:
    """Queries `[n_kv_heads, n, d]` times keys `[n_kv_heads, d, n_keys]`, all heads at once: float32 sums over d.

    Even keys are summed in one order and odd keys in another.
    """
    rng = np.random.default_rng(order)
    scores = np.zeros((*queries.shape[:2], columns.shape[2]), np.float32)
    for odd in range(2):
        keys = np.ascontiguousarray(columns[:, :, odd::2])
        sums = np.zeros((*queries.shape[:2], keys.shape[2]), np.float32)
        product = np.empty_like(sums)
        for c in rng.permutation(columns.shape[1]):
            np.multiply(queries[:, :, c, None], keys[:, None, c], out=product)
            sums += product
        scores[:, :, odd::2] = sums
    return scores
