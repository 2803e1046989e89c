"""Attention in the precision of the machine, to measure what rounding alone costs.

Inputs as given, products and sums in float32, probabilities rounded to the input dtype before they
meet the values, output rounded to the input dtype: the roundings the kernels document. Written from
that sentence and not from a kernel; the distance to the float64 oracle is the error budget's unit.

The machine's order of summation is not specified, and where a few scores dominate the softmax one order
can be right by luck. So the computation runs in several orders, and neighbouring keys are summed in
different ones, because an error common to all scores would cancel. The budget takes the worst.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ORDERS = 4


def gqa_decode_attention_rounded(
    q: Array, k: Array, v: Array, *, softmax_scale: float | None = None
) -> tuple[Array, Array]:
    """Decode attention in `ORDERS` orders of summation.

    Args:
        q: `[n_q_heads, d]`.
        k: `[seqlen_kv, n_kv_heads, d]`.
        v: `[seqlen_kv, n_kv_heads, d]`.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.

    Returns:
        o `[ORDERS, n_q_heads, d]` in q's dtype and lse `[ORDERS, n_q_heads]` in float32.
    """
    scale = np.float32(q.shape[1] ** -0.5 if softmax_scale is None else softmax_scale)
    results = [_in_one_order(q, k, v, scale, np.random.default_rng(order)) for order in range(ORDERS)]
    return np.stack([o for o, _ in results]), np.stack([lse for _, lse in results])


def _in_one_order(q: Array, k: Array, v: Array, scale: np.float32, rng: np.random.Generator) -> tuple[Array, Array]:
    n_q_heads, d = q.shape
    seqlen_kv, n_kv_heads, _ = k.shape
    o = np.zeros((n_q_heads, d), q.dtype)
    lse = np.full(n_q_heads, -np.inf, np.float32)
    if seqlen_kv == 0:
        return o, lse
    group = n_q_heads // n_kv_heads
    even, odd = rng.permutation(d), rng.permutation(d)
    for kv in range(n_kv_heads):
        heads = slice(kv * group, (kv + 1) * group)
        keys, values = k[:, kv].astype(np.float32), v[:, kv].astype(np.float32)
        queries = q[heads].astype(np.float32)
        scores = np.zeros((group, seqlen_kv), np.float32)
        for c0, c1 in zip(even, odd, strict=True):
            scores[:, 0::2] += queries[:, c0, None] * keys[0::2, c0]
            scores[:, 1::2] += queries[:, c1, None] * keys[1::2, c1]
        scores *= scale
        m = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - m)
        total = p.sum(axis=1, dtype=np.float32)
        weighted = np.einsum("gs,sd->gd", p.astype(q.dtype).astype(np.float32), values)
        o[heads] = (weighted / total[:, None]).astype(q.dtype)
        lse[heads] = m[:, 0] + np.log(total)
    return o, lse
