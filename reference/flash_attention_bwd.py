"""Gradients of prefill attention, from their formulas.

    p[i, j]   = exp(s[i, j] - lse[i])                       0 where N:M or a skipped tile leaves a score out
    delta[i]  = sum_c o[i, c] do[i, c]
    dv[j]     = sum_i p[i, j] do[i]
    ds[i, j]  = p[i, j] * (do[i] . v[j] - delta[i])
    dq[i]     = softmax_scale * sum_j ds[i, j] k[j]
    dk[j]     = softmax_scale * sum_i ds[i, j] q[i]

dk and dv are sums over the query heads of the group. Which scores are left out is that of the forward and is not
differentiated. In particular, skipped tiles are those that the forward skipped, when its running maximum was still
that of the tiles before: the public kernels test against the final lse instead, and lose gradients of tiles that their
forward weighed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.decode import Array, softmax
from reference.flash_attention import Prefill


class Gradients(NamedTuple):
    """Gradients in the layouts of q, k and v, float64."""

    dq: Array
    dk: Array
    dv: Array


def flash_attention_bwd(do: Array, q: Array, k: Array, v: Array, **options: Any) -> Gradients:
    """Gradients of `sum(do * o)`, where o is that of `reference.flash_attention.flash_attention`.

    Args:
        do: as q, with the head dim of v.
        q: as in `flash_attention`, like all arguments below.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        options: of `flash_attention`. With `kept` the decisions about tiles are replayed, else they are made anew by
            the forward's rule.

    Returns:
        The gradients; 0 in rows that no sequence owns, of queries that see nothing and of keys that none weighs.

    Raises:
        ValueError, TypeError: as `flash_attention`; do does not have its shape.
    """
    call = Prefill.of(q, k, v, **options)
    check_do(do, q, v)
    upstream = do.reshape(-1, *do.shape[-2:]).astype(np.float64)
    dq, dk, dv = (np.zeros(x.shape) for x in (call.q, call.k, call.v))
    scale = call.rules.scale
    for tile in call.tiles():
        read = tile.read
        keys = np.arange(tile.keys.start, tile.keys.stop)[read]
        queries, g = (x[tile.rows, tile.heads].swapaxes(0, 1) for x in (call.q, upstream))
        columns, values = call.k[keys, tile.kv], call.v[keys, tile.kv]
        e, total, _ = softmax(tile.scores[..., read])
        p = e / total[..., None]
        delta = ((p @ values) * g).sum(axis=-1)
        ds = p * (g @ values.T - delta[..., None])
        dq[tile.rows, tile.heads] = scale * (ds @ columns).swapaxes(0, 1)
        dk[keys, tile.kv] += scale * (ds.swapaxes(1, 2) @ queries).sum(axis=0)
        dv[keys, tile.kv] += (p.swapaxes(1, 2) @ g).sum(axis=0)
    return Gradients(dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape))


def check_do(do: Array, q: Array, v: Array) -> None:
    """Refuse a gradient of o that does not have the shape of o."""
    if do.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(f"do: received shape {do.shape}, allowed {(*q.shape[:-1], v.shape[-1])}")
