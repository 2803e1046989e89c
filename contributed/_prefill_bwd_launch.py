"""A backward prefill call on the host: geometry and plan, and the kernel's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contributed._prefill_bwd_plan import Plan, choose_geometry, make_plan
from contributed._prefill_plan import Geometry, Span, Sparsity, Window, hiding

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class BackwardLaunch:
    """The kernel of one call. It is handed in, so that this module does not import a kernel file."""

    geometry: Geometry
    plan: Plan
    scale: float
    selection: tuple[int, int, int, int]
    kernel: Any

    def arguments(self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any) -> tuple[Any, ...]:
        """Arguments of `prefill_bwd`; operands packed, k and v with at least `plan.rows_kv` rows.

        Operands are arrays, or tensors of another framework.
        """
        g, p = self.geometry, self.plan
        tables = (p.blocks, p.bounds, p.chunks, p.penalties)
        left = (g.left_tiles, g.left_offset, g.edge_tiles)
        sizes = (g.heads, g.kv_tiles, g.overhang, *left, p.per_trip, p.masked, p.plain, p.guarded, p.ragged)
        return (do, q, k, v, o, lse, *tables, *sizes, self.scale, *self.selection)


def backward_launch(
    kernel: Any,
    spans: tuple[Span, ...],
    window: Window,
    *,
    n_q_heads: int,
    n_kv_heads: int,
    d: int,
    itemsize: int,
    scale: float,
    sparsity: Sparsity | None,
    kept: Sequence[Array] | None,
) -> BackwardLaunch:
    """Choose the geometry, and plan.

    Args:
        kernel: `prefill_bwd`.
        spans: the sequences; they own all rows of q.
        window: what queries see.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        d: head dim.
        itemsize: bytes per element.
        scale: multiplies q . k.
        sparsity: N:M selection, or None.
        kept: the forward's decisions about tiles, or None.
    """
    if all(span.len_q <= 1 for span in spans):
        sparsity = None  # single queries stay dense
    window = hiding(spans, window)
    geometry = choose_geometry(
        spans,
        group=n_q_heads // n_kv_heads,
        d=d,
        itemsize=itemsize,
        window=window,
        sparsity=sparsity,
        kept=kept,
    )
    plan = make_plan(geometry, spans, n_q_heads=n_q_heads, n_kv_heads=n_kv_heads, window=window, kept=kept)
    selection = (0, 0, 0, 0)
    if sparsity is not None:
        # A single query always keeps what it sees, whether or not others keep recent keys.
        recent = max(sparsity.recent, 1 if any(span.len_q == 1 for span in spans) else 0)
        selection = (sparsity.n, sparsity.m, sparsity.sink, recent)
    return BackwardLaunch(geometry, plan, scale, selection, kernel)
