"""Sparse decode in the precision of the machine: the roundings of `reference.rounded`, over the tiles that are kept.

Which tiles are kept is decided in float64. A machine that decides in float32 agrees wherever the `margin` of the
decisions is larger than the error of its scores; on other inputs there is nothing to compare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.caches import caches
from reference.decode import Array
from reference.flash_decode import Options
from reference.rounded import flash_decode_rounded
from reference.skip_softmax import skip_softmax_decode
from reference.sparse_decode import (
    decode_options,
    gate_scores,
    gated_decode,
    keys_of_tiles,
    logsigmoid,
    sequence_deltas,
    sparse_decode,
)


def sparse_decode_rounded(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """`reference.sparse_decode.sparse_decode` in several orders of summation.

    Args:
        q: as in `sparse_decode`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        options: of `sparse_decode`.

    Returns:
        o `[n_orders, batch, n_q_heads, d]` in q's dtype and lse `[n_orders, batch, n_q_heads]` in float32.
    """
    kept = sparse_decode(q, k, v, **options).stats.kept
    return _attend(q, _pieces(q, k, v, kept, options), options.get("softmax_scale"))


def gated_decode_rounded(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    delta: Array,
    *,
    is_logsigmoid_gate: bool = True,
    fast_logsigmoid: bool = True,
    **options: Any,
) -> tuple[Array, Array]:
    """`reference.sparse_decode.gated_decode` in several orders; gates are float32 operations of their own.

    A gate is one more product of a score's sum. In float32 there are as many orders again, in which it comes after the
    others, a logsigmoid in two parts: a score of 80 under a gate of -40 has the rounding errors of 80 only where the
    gate comes late, and in float32 no rounding of probabilities is larger than those.

    Args:
        q: as in `gated_decode`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        alpha: `[batch, n_q_heads]`.
        delta: `[batch, n_kv_heads, seqlen_kv]`, or `[n_kv_heads, total]`.
        is_logsigmoid_gate: whether gates are logsigmoids.
        fast_logsigmoid: whether those are the polynomial.
        options: of `gated_decode`, the others.

    Returns:
        As `sparse_decode_rounded`, of float32 with twice as many orders.
    """
    kept = gated_decode(
        q, k, v, alpha, delta, is_logsigmoid_gate=is_logsigmoid_gate, fast_logsigmoid=fast_logsigmoid, **options
    ).stats.kept
    deltas = sequence_deltas(k, delta, q.shape[0], options.get("seqlens_kv"), options.get("cu_seqlens_kv"))
    group = q.shape[1] // k.shape[-2]
    anywhere, last = [], []
    for piece in _pieces(q, k, v, kept, options):
        b, h = piece.sequence, piece.head
        heads = alpha[b, h : h + group].astype(np.float32)
        rows = deltas[b][piece.rows, h // group].astype(np.float32)
        anywhere.append(piece.plus(gate_scores(heads, rows, is_logsigmoid_gate, fast_logsigmoid)))
        y = heads[:, None] * rows
        # logsigmoid(y) = min(y, 0) + logsigmoid(|y|), and so is the polynomial.
        parts = (np.minimum(y, 0), logsigmoid(np.abs(y), fast_logsigmoid)) if is_logsigmoid_gate else (y,)
        last.append(piece.plus(*parts))
    scale = q.shape[-1] ** -0.5 if options.get("softmax_scale") is None else options["softmax_scale"]
    results = [_attend(q, anywhere, scale)]
    if q.dtype == np.float32:
        results.append(_attend(q, last, scale, n_last=2 * group if is_logsigmoid_gate else group))
    o, lse = (np.concatenate(x) for x in zip(*results, strict=True))
    return o, lse


def skip_softmax_decode_rounded(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """`reference.skip_softmax.skip_softmax_decode` in several orders of summation.

    Args:
        q: as in `skip_softmax_decode`, like all arguments.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed.
        v: as k.
        options: of `skip_softmax_decode`.

    Returns:
        As `sparse_decode_rounded`.
    """
    kept = skip_softmax_decode(q, k, v, **options).stats.kept
    return _attend(q, _pieces(q, k, v, kept, options), options.get("softmax_scale"))


class _Piece(NamedTuple):
    """Heads of one sequence that keep the same tiles."""

    sequence: int
    head: int
    """The first query head."""
    queries: Array
    """`[n_heads, d]`."""
    keys: Array
    """The kept ones, `[n, d]`."""
    values: Array
    """`[n, d]`."""
    rows: Array
    """Their positions in the sequence, `[n]`."""

    def plus(self, *terms: Array) -> _Piece:
        """With terms `[n_heads, n]` in float32 added to the scores.

        Each is a product of its own: a column of k for each head, which meets a 1 in its q and 0 in others.
        """
        ones = np.eye(len(self.queries), dtype=self.queries.dtype)
        queries = np.concatenate([self.queries, *(ones for _ in terms)], axis=1)
        keys = np.concatenate([self.keys.astype(np.float32), *(x.T for x in terms)], axis=1)
        return self._replace(queries=queries, keys=keys)


def _pieces(q: Array, k: Array, v: Array, kept: Array, options: dict[str, Any]) -> list[_Piece]:
    """Where `kept` is `[batch, n, n_tiles]`, the n runs of query heads of each sequence in their order."""
    window: Options = decode_options(q, k, options.get("softmax_scale"), options.get("window_size", (None, None)))
    sequences = caches(k, v, q.shape[0], options.get("seqlens_kv"), options.get("cu_seqlens_kv"))
    run, group = q.shape[1] // kept.shape[1], q.shape[1] // k.shape[-2]
    pieces = []
    for b, (keys, values) in enumerate(sequences):
        first, last = window.visible(len(keys) - 1)
        for h in range(0, q.shape[1], run):
            inside = keys_of_tiles(kept[b, h // run], first, last, options.get("tile_kv", 128))
            rows = first + np.flatnonzero(inside)
            kv = h // group
            pieces.append(_Piece(b, h, q[b, h : h + run], keys[rows, kv], values[rows, kv], rows))
    return pieces


def _attend(q: Array, pieces: list[_Piece], softmax_scale: float | None, n_last: int = 0) -> tuple[Array, Array]:
    """Dense attention of every piece as a sequence of its own with one KV head, in the shapes of q.

    The last `n_last` products of a score are added last.
    """
    o, lse = flash_decode_rounded(
        np.stack([piece.queries for piece in pieces]),
        np.concatenate([piece.keys for piece in pieces])[:, None],
        np.concatenate([piece.values for piece in pieces])[:, None],
        cu_seqlens_kv=np.cumsum([0, *(len(piece.rows) for piece in pieces)]),
        softmax_scale=softmax_scale,
        n_last=n_last,
    )
    return o.reshape(len(o), *q.shape[:2], o.shape[-1]), lse.reshape(len(lse), *q.shape[:2])
