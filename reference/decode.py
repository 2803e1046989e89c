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


def softmax(scores: Array, sink: Array | None = None) -> tuple[Array, Array, Array]:
    """Numerators, denominator and log-sum-exp over the last axis, in the dtype of the scores.

    Args:
        scores: `[..., n]`; n may be 0, and scores may be -inf.
        sink: `[...]`, a logit that joins the denominator and has no numerator.

    Returns:
        Numerators `[..., n]` and denominators `[...]`, both relative to the largest logit of the row, and
        lse `[...]`. A row without a finite logit has numerators 0, denominator 1 and lse -inf.
    """
    m = scores.max(axis=-1, initial=-np.inf)
    if sink is not None:
        m = np.maximum(m, sink)
    # -inf minus -inf is not a number; such a row has nothing to scale.
    shift = np.where(np.isneginf(m), np.zeros_like(m), m)
    e = scores - shift[..., None]
    np.exp(e, out=e)
    total = e.sum(axis=-1)
    if sink is not None:
        total = total + np.exp(sink - shift)
    total = np.where(total == 0.0, np.ones_like(total), total)
    return e, total, m + np.log(total)


def attend(scores: Array, v: Array, sink: Array | None = None) -> Attention:
    """The values `[..., n, d]` averaged by the softmax of the scores `[..., n]`: o `[..., d]` and lse `[...]`."""
    e, total, lse = softmax(scores, sink)
    return Attention(e @ v / total[..., None], np.asarray(lse))


def group_size(n_q_heads: int, n_kv_heads: int) -> int:
    """Query heads per KV head.

    Raises:
        ValueError: the query heads do not divide among the KV heads.
    """
    if n_kv_heads == 0 or n_q_heads % n_kv_heads:
        raise ValueError(f"q heads: received {n_q_heads}, allowed a multiple of the {n_kv_heads} KV heads")
    return n_q_heads // n_kv_heads


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
    return attend(scale * (k64 @ q64), v64)


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
    n_q_heads = q.shape[0]
    group = group_size(n_q_heads, k.shape[1])
    heads = [
        decode_attention(q[h], k[:, h // group], v[:, h // group], softmax_scale=softmax_scale)
        for h in range(n_q_heads)
    ]
    return Attention(np.stack([a.o for a in heads]), np.stack([a.lse for a in heads]))
