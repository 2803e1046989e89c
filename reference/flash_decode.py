"""Batched decode attention: a few new query tokens per sequence against flat, packed or paged caches.

    p        = i + length - s                      position of new token i of s: the newest rows of its sequence
    x[h, j]  = softmax_scale * k_scale * sum_c q[h, c] k[j, h // group, c]
    x        = softcap * tanh(x / softcap)         when there is a soft cap
    x       += alibi_slopes[h] * (j - p)           when there are slopes
    o[h]     = v_scale * sum_j exp(x[h, j] - lse[h]) v[j, h // group]       over the visible keys j
    lse[h]   = log(sum_j exp(x[h, j]) + exp(sinks[h]))                      natural logarithm

Key j is visible to position p iff max(0, p - left) <= j <= p. Where nothing is visible o = 0, and lse is -inf or the
sink. Keys that no query sees are not looked at, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.caches import Cache, caches, gather_pages
from reference.decode import Array, Attention, attend, group_size

Window = tuple[int | None, int | None]
Factor = float | Sequence[float] | Array


def flash_decode(
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
) -> Attention:
    """Decode attention of a batch.

    Args:
        q: `[batch, n_q_heads, d]`, or `[batch, s, n_q_heads, d]` with s new tokens per sequence, causal among
            themselves. A token whose position is negative (the sequence is shorter than s) sees nothing.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed `[total, n_kv_heads, d]` with `cu_seqlens_kv`.
        v: as k.
        seqlens_kv: integers `[batch]`, the rows of each sequence in use, its first ones; None means all.
        cu_seqlens_kv: integers `[batch + 1]`; sequence b owns rows `cu[b]:cu[b + 1]` of the packed cache.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.
        window_size: `(left, right)`, keys visible before and after the query's own position; None is unlimited.
            No key follows a query that it may see, so right never removes any.
        softcap: bound of the scores, above 0.
        sinks: `[n_q_heads]`, logits that join the softmax denominator, unscaled and without a value.
        alibi_slopes: `[n_q_heads]`.
        k_scale: what a stored key is multiplied by to give the true one; a number or `[n_kv_heads]`.
        v_scale: the same for values.

    Returns:
        o in the shape of q and lse in the shape of q without d, float64.

    Raises:
        ValueError, TypeError: shapes that do not fit together, lengths outside the cache, options out of range.
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
    logits = None if sinks is None else per_head("sinks", sinks, q.shape[-2])
    sequences = caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)
    return _attention(q, sequences, options, [(0, len(keys)) for keys, _ in sequences], logits)


def paged_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    seqlens_kv: Array,
    **options: Any,
) -> Attention:
    """`flash_decode` of a paged cache.

    Args:
        q: as in `flash_decode`.
        k_pages: `[n_blocks, n_kv_heads, block_size, d]`.
        v_pages: as k_pages.
        block_table: integers `[batch, max_blocks]`; row t of sequence b is row `t % block_size` of page
            `block_table[b, t // block_size]`. -1 is no page.
        seqlens_kv: integers `[batch]`.
        options: of `flash_decode`, from softmax_scale on.

    Returns:
        As `flash_decode`.

    Raises:
        ValueError, TypeError: as `flash_decode`; a sequence needs a page that its table does not have.
    """
    k, cu_seqlens_kv = gather_pages(k_pages, block_table, seqlens_kv)
    v, _ = gather_pages(v_pages, block_table, seqlens_kv)
    return flash_decode(q, k, v, cu_seqlens_kv=cu_seqlens_kv, **options)


def split_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    n_splits: int,
    tile_kv: int,
    seqlens_kv: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    **options: Any,
) -> Attention:
    """The partial results that `combine_splits` joins: each split attends to a run of consecutive key tiles.

    Tiles are counted from the first key of each sequence's cache, windows or not, and a split takes
    `ceil(n_tiles / n_splits)` of them; the last splits may be empty. There are no sinks: a sink counts once, not
    once per split.

    Args:
        q: as in `flash_decode`.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        n_splits: number of splits, at least 1.
        tile_kv: keys per tile, at least 1.
        seqlens_kv: as in `flash_decode`.
        cu_seqlens_kv: as in `flash_decode`.
        options: of `flash_decode`, from softmax_scale on, without sinks.

    Returns:
        o `[n_splits, *q.shape]` and lse `[n_splits, *q.shape[:-1]]`, each split normalised by itself, float64.
    """
    if n_splits < 1 or tile_kv < 1:
        raise ValueError(f"n_splits, tile_kv: received {n_splits}, {tile_kv}, allowed at least 1")
    checked = Options.of(q, k, **options)
    sequences = caches(k, v, q.shape[0], seqlens_kv, cu_seqlens_kv)
    tiles = [-(-len(keys) // tile_kv) for keys, _ in sequences]
    runs = [-(-n // n_splits) * tile_kv for n in tiles]
    parts = [_attention(q, sequences, checked, [(i * run, (i + 1) * run) for run in runs]) for i in range(n_splits)]
    return Attention(np.stack([part.o for part in parts]), np.stack([part.lse for part in parts]))


def combine_splits(o: Array, lse: Array) -> Attention:
    """Join partial results: attention over the splits, with their lse as scores and their o as values.

    Args:
        o: `[n_splits, ..., d]`.
        lse: `[n_splits, ...]`; -inf where a split saw nothing.

    Returns:
        o `[..., d]` and lse `[...]`, float64.
    """
    if o.ndim == 0 or o.shape[:-1] != lse.shape:
        raise ValueError(f"lse: received shape {lse.shape}, allowed {o.shape[:-1]}")
    scores = np.moveaxis(lse.astype(np.float64), 0, -1)
    joined = attend(scores[..., None, :], np.moveaxis(o.astype(np.float64), 0, -2))
    return Attention(joined.o[..., 0, :], joined.lse[..., 0])


class Options(NamedTuple):
    """What one call does to scores and values; arrays are float64 and per head."""

    scale: Array
    """`softmax_scale * k_scale`, `[n_kv_heads]`."""
    v_scale: Array
    """`[n_kv_heads]`."""
    left: int | None
    """Keys visible before a query's own position."""
    softcap: float | None
    slopes: Array | None
    """`[n_q_heads]`."""

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        *,
        softmax_scale: float | None = None,
        window_size: Window = (None, None),
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        k_scale: Factor | None = None,
        v_scale: Factor | None = None,
    ) -> Options:
        """Check and complete the options that `flash_decode` describes."""
        if q.ndim not in (3, 4):
            raise ValueError(f"q: received shape {q.shape}, allowed (batch, n_q_heads, d) or (batch, s, n_q_heads, d)")
        (n_q_heads, d), n_kv_heads = q.shape[-2:], k.shape[-2]
        if k.shape[-1] != d:
            raise ValueError(f"k: received head dim {k.shape[-1]}, allowed the {d} of q")
        group_size(n_q_heads, n_kv_heads)
        if any(side is not None and side < 0 for side in window_size):
            raise ValueError(f"window_size: received {window_size}, allowed None or at least 0 on each side")
        if softcap is not None and not 0 < softcap < np.inf:
            raise ValueError(f"softcap: received {softcap}, allowed None or a finite number above 0")
        scale = d**-0.5 if softmax_scale is None else float(softmax_scale)
        return cls(
            scale=scale * _factor("k_scale", k_scale, n_kv_heads),
            v_scale=_factor("v_scale", v_scale, n_kv_heads),
            left=window_size[0],
            softcap=softcap,
            slopes=None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes, n_q_heads),
        )

    def visible(self, position: int) -> tuple[int, int]:
        """First visible key and the one after the last, for a query at `position`."""
        last = max(0, position + 1)
        return (0 if self.left is None else max(0, min(position - self.left, last))), last

    def logits(self, scores: Array, begin: int, position: int, heads: slice) -> Array:
        """Soft cap and slopes on scaled scores `[heads, n]` of keys `begin` and after, in the dtype of the scores."""
        if self.softcap is not None:
            cap = scores.dtype.type(self.softcap)
            scores = cap * np.tanh(scores / cap)
        if self.slopes is not None:
            distance = np.arange(begin - position, begin - position + scores.shape[-1]).astype(scores.dtype)
            scores = scores + self.slopes[heads, None].astype(scores.dtype) * distance
        return scores


def per_head(name: str, value: Any, n_heads: int) -> Array:
    """An argument that has to hold one number per head, as float64."""
    array = np.asarray(value).astype(np.float64)
    if array.shape != (n_heads,):
        raise ValueError(f"{name}: received shape {array.shape}, allowed ({n_heads},)")
    return array


def _factor(name: str, value: Factor | None, n_heads: int) -> Array:
    value = 1.0 if value is None else value
    return per_head(name, np.full(n_heads, value) if np.ndim(value) == 0 else value, n_heads)


def _attention(
    q: Array, sequences: list[Cache], options: Options, spans: list[tuple[int, int]], sinks: Array | None = None
) -> Attention:
    """Attention of every sequence to the visible ones of its keys in a span."""
    tokens = (q if q.ndim == 4 else q[:, None]).astype(np.float64)
    batch, s, n_q_heads, d = tokens.shape
    group = n_q_heads // len(options.scale)
    d_v = sequences[0][1].shape[-1] if sequences else d
    o, lse = np.zeros((batch, s, n_q_heads, d_v)), np.zeros((batch, s, n_q_heads))
    for b, ((k, v), span) in enumerate(zip(sequences, spans, strict=True)):
        for kv, (scale, v_scale) in enumerate(zip(options.scale, options.v_scale, strict=True)):
            heads = slice(kv * group, (kv + 1) * group)
            keys, values = k[:, kv].astype(np.float64), v[:, kv].astype(np.float64)
            for i in range(s):
                position = i + len(k) - s
                first, last = options.visible(position)
                first, last = max(first, span[0]), min(last, span[1])
                seen = slice(first, last)
                scores = scale * (tokens[b, i, heads] @ keys[seen].T)
                sink = None if sinks is None else sinks[heads]
                result = attend(options.logits(scores, first, position, heads), values[seen], sink)
                o[b, i, heads], lse[b, i, heads] = v_scale * result.o, result.lse
    return Attention(o, lse) if q.ndim == 4 else Attention(o[:, 0], lse[:, 0])
