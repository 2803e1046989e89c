"""A prefill call on the host: geometry and plan, the kernel's arguments, and what its decisions mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS
from contributed._nki import nl, simulate_kernel
from contributed._prefill_plan import (
    Geometry,
    Plan,
    Span,
    Sparsity,
    Window,
    choose_geometry,
    hiding,
    make_plan,
    seen_spans,
    visible_keys,
)

Array = np.ndarray[Any, np.dtype[Any]]


class PrefillStats(NamedTuple):
    """Tiles of 128 queries and 128 keys of a call, those with a key that one of the queries sees.

    Args:
        tiles_total: int64 [batch, n_q_heads].
        tiles_skipped: int64 [batch, n_q_heads].
        kept: for each sequence, bool [n_q_heads, tiles of queries, tiles of keys]; False where nothing is seen.
    """

    tiles_total: Array
    tiles_skipped: Array
    kept: list[Array]


@dataclass(frozen=True)
class Launch:
    """The kernels of one call. They are handed in, so that this module does not import a kernel file."""

    geometry: Geometry
    plan: Plan
    spans: tuple[Span, ...]
    seen_spans: tuple[Span, ...]
    window: Window
    n_kv_heads: int
    scale: float
    sparsity: Sparsity | None
    threshold: float | None
    with_lse: bool
    kernel: Any
    combine: Any

    def arguments(self, q: Array, k: Array, v: Array) -> tuple[Any, ...]:
        """Arguments of `prefill_fwd`; q, k and v packed."""
        g, p = self.geometry, self.plan
        k, v = (self.with_room(x) for x in (k, v))
        selection = (0, 0, 0, 0)
        if self.sparsity is not None:
            # A single query always keeps what it sees, whether or not others keep recent keys.
            recent = max(g.recent, 1 if any(span.len_q == 1 for span in self.spans) else 0)
            selection = (self.sparsity.n, self.sparsity.m, self.sparsity.sink, recent)
        # In units of q . k; a scale of 0 makes all of them 0.
        limit = None if self.threshold is None else math.log(self.threshold) / (abs(self.scale) or 1.0)
        sizes = (g.heads, g.overhang, p.masked, p.plain, p.guarded, p.ragged, g.n_splits)
        lse = self.with_lse or g.n_splits > 1
        tables = (p.blocks, p.bounds, p.chunks)
        left = (g.left_tiles, g.left_offset, g.edge_tiles, g.start, g.start_tiles)
        return (q, k, v, *tables, *sizes, self.scale, *selection, limit, lse, *left, p.sure_tiles, p.nothing)

    def with_room(self, x: Array) -> Array:
        """k or v with as many rows as chunks reach; those behind the last key are not looked at."""
        missing = self.plan.rows_kv - x.shape[0]
        if missing <= 0:
            return x
        return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

    def run(self, q: Array, k: Array, v: Array, target: str | None) -> tuple[Array, Array | None, PrefillStats | None]:
        """o [total_q, n_q_heads, d], lse [total_q, n_q_heads] or None, stats or None, simulated on the CPU."""
        g = self.geometry
        kernel = self.kernel[2] if g.n_cores == 2 else self.kernel
        result = simulate_kernel(kernel, *self.arguments(q, k, v), target=target)
        results = list(result) if isinstance(result, tuple) else [result]
        stats = None if self.threshold is None else self.stats(results.pop(), q.shape[1])
        if g.n_splits > 1:
            rows = (results[0].reshape(g.n_splits, -1, q.shape[2]), results[1].reshape(g.n_splits, -1))
            o, lse = simulate_kernel(self.combine, *rows, getattr(nl, q.dtype.name), None, target=target)
            return o.reshape(q.shape), lse.reshape(q.shape[:2]), stats
        return results[0], results[1] if self.with_lse else None, stats

    def stats(self, skipped: Array, n_q_heads: int) -> PrefillStats:
        """What the kernel's decisions, float32 [1, n_chunks, tiles * kv_tiles], say about each tile."""
        g = self.geometry
        kept = visited_tiles(self.spans, self.window, n_q_heads)
        total = np.array([x.sum(axis=(1, 2)) for x in kept], np.int64).reshape(len(kept), n_q_heads)
        decisions = skipped[0].reshape(-1, g.q_tiles, g.heads, g.kv_tiles) > 0
        for visit, of_chunk in zip(self.plan.visits[0], decisions, strict=True):
            of_span = kept[visit.span][visit.unit * g.heads : (visit.unit + 1) * g.heads]
            first_row = self.seen_spans[visit.span].q - self.spans[visit.span].q + visit.first
            row, column = first_row // PARTITIONS, visit.base // PARTITIONS
            for i in range(min(g.q_tiles, of_span.shape[1] - row)):
                first, end = 0, -(-(visit.stop - visit.base) // PARTITIONS)
                if visit.place is not None:
                    first, end = g.seen(i, visit.place)
                tiles = of_span[:, row + i, column + first : column + max(first, end)]
                tiles &= ~of_chunk[i, :, : tiles.shape[1]]
        left = np.array([x.sum(axis=(1, 2)) for x in kept], np.int64).reshape(total.shape)
        return PrefillStats(total, total - left, kept)


def visited_tiles(spans: Sequence[Span], window: Window, n_q_heads: int) -> list[Array]:
    """For each sequence, the tiles with a key that a query sees, bool [n_q_heads, tiles of queries, tiles of keys]."""
    visited = []
    for span in spans:
        shape = tuple(-(-n // PARTITIONS) for n in (span.len_q, span.len_kv))
        seen = np.zeros(shape, bool)
        for tile in range(shape[0]):
            number = np.arange(tile * PARTITIONS, min((tile + 1) * PARTITIONS, span.len_q))
            lo, hi = visible_keys(span, number, window)
            for first, end in zip(lo[lo < hi], hi[lo < hi], strict=True):
                seen[tile, first // PARTITIONS : -(-end // PARTITIONS)] = True
        visited.append(np.repeat(seen[None], n_q_heads, axis=0))
    return visited


def launch(
    kernel: Any,
    combine: Any,
    spans: tuple[Span, ...],
    window: Window,
    *,
    q_shape: tuple[int, ...],
    n_kv_heads: int,
    itemsize: int,
    scale: float,
    sparsity: Sparsity | None = None,
    threshold: float | None = None,
    with_lse: bool = False,
    n_splits: int | None = None,
    n_cores: int = 1,
) -> Launch:
    """Choose the geometry, and plan.

    Args:
        kernel: `prefill_fwd`.
        combine: `combine_splits`.
        spans: the sequences; they own all rows of q.
        window: what queries see.
        q_shape: [total_q, n_q_heads, d].
        n_kv_heads: KV heads.
        itemsize: bytes per element.
        scale: multiplies q . k.
        sparsity: N:M selection, or None.
        threshold: of skip-softmax, or None.
        with_lse: whether lse is wanted.
        n_splits: KV splits, None to choose.
        n_cores: cores of the launch.
    """
    total_q, n_q_heads, d = q_shape
    if all(span.len_q <= 1 for span in spans):
        sparsity = None  # single queries stay dense
    if threshold is not None:
        n_splits, n_cores = 1, 1  # tiles are visited one after the other
    window = hiding(spans, window)
    seen = seen_spans(spans, window, threshold is not None)
    geometry = choose_geometry(
        seen,
        group=n_q_heads // n_kv_heads,
        n_kv_heads=n_kv_heads,
        d=d,
        itemsize=itemsize,
        window=window,
        sparsity=sparsity,
        skips=threshold is not None,
        n_splits=n_splits,
        n_cores=n_cores,
    )
    plan = make_plan(geometry, seen, n_q_heads=n_q_heads, n_kv_heads=n_kv_heads, total_q=total_q, window=window)
    return Launch(
        geometry, plan, spans, seen, window, n_kv_heads, scale, sparsity, threshold, with_lse, kernel, combine
    )
