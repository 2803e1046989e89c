"""Decode attention: one new query token per head against a cache of keys and values.

    s[h, j] = softmax_scale * sum_c q[h, c] k[j, h // group, c]        group = n_q_heads / n_kv_heads
    o[h]    = sum_j softmax(s[h])[j] v[j, h // group]
    lse[h]  = log(sum_j exp(s[h, j]))                                   natural logarithm

An empty cache gives o = 0 and lse = -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Attention(NamedTuple):
    """Output `o`, in the layout of q, and `lse`, the log of the softmax denominator; both float64."""

    o: Array
    lse: Array


def decode_attention(q: Array, k: Array, v: Array, *, softmax_scale: float | None = None) -> Attention:
    """One head.

    Args:
        q: `[d]`.
        k: `[seqlen_kv, d]`.
        v: `[seqlen_kv, d]`.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.

    Returns:
        o `[d]` and lse (a scalar array).
    """
    q64, k64, v64 = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    scale = q64.shape[0] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if k64.shape[0] == 0:
        return Attention(np.zeros(v64.shape[1]), np.array(-np.inf))
    s = scale * (k64 @ q64)
    m = s.max()
    e = np.exp(s - m)
    return Attention(e @ v64 / e.sum(), np.array(m + np.log(e.sum())))


def gqa_decode_attention(q: Array, k: Array, v: Array, *, softmax_scale: float | None = None) -> Attention:
    """Grouped-query heads: query head h reads KV head `h // group`.

    Args:
        q: `[n_q_heads, d]`.
        k: `[seqlen_kv, n_kv_heads, d]`.
        v: `[seqlen_kv, n_kv_heads, d]`.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.

    Returns:
        o `[n_q_heads, d]` and lse `[n_q_heads]`.
    """
    n_q_heads, n_kv_heads = q.shape[0], k.shape[1]
    if n_q_heads % n_kv_heads:
        raise ValueError(f"q heads: received {n_q_heads}, allowed a multiple of the {n_kv_heads} KV heads")
    group = n_q_heads // n_kv_heads
    heads = [
        decode_attention(q[h], k[:, h // group], v[:, h // group], softmax_scale=softmax_scale)
        for h in range(n_q_heads)
    ]
    return Attention(np.stack([a.o for a in heads]), np.stack([a.lse for a in heads]))
