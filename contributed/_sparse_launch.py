"""A sparse decode call on the host: geometry and plan, the kernel's arguments, the kernels, and what they counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from contributed._decode_launch import Array
from contributed._decode_plan import FlatCache
from contributed._nki import nl, simulate_kernel
from contributed._sparse_plan import GatePlan, TileGeometry, TilePlan, choose_tile_geometry, make_tile_plan
from contributed._sparse_state import NEVER


class TileStats(NamedTuple):
    """What a call visited and left out."""

    tiles_total: Array
    """Tiles with a visible key, int64."""
    tiles_skipped: Array
    """Those of them that are not in the result, int64."""
    k_bytes_read: Array
    """Of K, int64: [batch, n_kv_heads]. From d-major K chunks of keys are read; this counts those in use."""
    v_bytes_read: Array
    """Of V, likewise."""


class Counts(NamedTuple):
    """What the device counted, int64."""

    kept: Array
    """Tiles in the result: [n_splits, batch, n_q_heads]."""
    k_rows: Array
    """Rows of K read, all of whose tile was tested: [batch, n_kv_heads]."""
    v_rows: Array
    """Rows of V read: [batch, n_kv_heads]."""


@dataclass(frozen=True)
class TileLaunch:
    """The kernels of one call, for caches of any content.

    Args:
        geometry: what the program is compiled for.
        plan: this step's work.
        gates: what gates need, None without.
        n_kv_heads: KV heads.
        lengths: keys of each sequence.
        softmax_scale: multiplies q . k.
        kernel: imported by who makes the launch, so that this module imports no kernel file.
        combine: `combine_splits`.
        with_lse: whether lse is wanted.
        with_stats: whether counts are.
    """

    geometry: TileGeometry
    plan: TilePlan
    gates: GatePlan | None
    n_kv_heads: int
    lengths: tuple[int, ...]
    softmax_scale: float
    kernel: Any
    combine: Any
    with_lse: bool
    with_stats: bool

    def limits(self, n_heads: int, thresholds: Sequence[float]) -> Array:
        """log(threshold) of each sequence in units of q . k, for every head: [batch, 1, n_heads]; 0 is off."""
        scale = abs(self.softmax_scale) if self.softmax_scale != 0 else 1.0
        logs = [np.log(t) / scale if t else NEVER for t in thresholds]
        return np.repeat(np.array(logs, np.float32), n_heads).reshape(len(logs), 1, n_heads)

    def arguments(self, q: Any, k: Any, v: Any, thresholds: Sequence[float]) -> tuple[Any, ...]:
        """Arguments of `sparse_decode_fwd` and `skip_softmax_decode_fwd`; operands in kernel layout.

        Operands are arrays, or tensors of another framework.
        """
        g = self.geometry
        return (
            q,
            k,
            v,
            self.plan.records,
            self.plan.items,
            self.plan.bounds,
            self.limits(q.shape[2], thresholds),
            self.n_kv_heads,
            g.tokens,
            g.chunks,
            g.n_windows,
            g.n_first,
            g.tile_kv,
            g.n_splits,
            self.softmax_scale,
            self.with_lse or g.n_splits > 1,
            self.with_stats,
        )

    def gated_arguments(
        self,
        q: Any,
        k: Any,
        v: Any,
        alpha: Any,
        delta: Any,
        thresholds: Sequence[float],
        gate_thresholds: Sequence[float],
        *,
        is_logsigmoid: bool,
        fast: bool,
    ) -> tuple[Any, ...]:
        """Arguments of `gated_decode_fwd`; alpha float32 [batch, n_q_heads], an element of delta for each row of k.

        Operands are arrays, or tensors of another framework.
        """
        g, gates = self.geometry, self.gates
        assert gates is not None, "a launch without gates"
        return (
            q,
            k,
            v,
            alpha.reshape(alpha.shape[0], 1, -1),
            delta,
            self.plan.records,
            self.limits(q.shape[2], thresholds),
            self.limits(self.n_kv_heads, gate_thresholds),
            *gates,
            self.n_kv_heads,
            g.tokens,
            g.n_windows,
            g.n_first,
            g.tile_kv,
            g.n_splits,
            self.softmax_scale,
            any(thresholds),
            is_logsigmoid,
            fast,
            self.with_lse or g.n_splits > 1,
            self.with_stats,
        )

    def run(
        self, q: Array, arguments: tuple[Any, ...], target: str | None
    ) -> tuple[Array, Array | None, Counts | None]:
        """o and lse, and counts if asked for; simulated on the CPU."""
        n_splits, batch = self.geometry.n_splits, q.shape[0]
        kernel = self.kernel[2] if self.geometry.n_cores == 2 else self.kernel
        result = simulate_kernel(kernel, *arguments, target=target)
        parts = list(result) if isinstance(result, tuple) else [result]
        o, lse, counts = parts.pop(0), None, None
        if self.with_lse or n_splits > 1:
            lse = parts.pop(0)
        if self.with_stats:
            kept, rows = (np.rint(x).astype(np.int64) for x in parts)
            rows = rows.reshape(2, n_splits, batch, self.n_kv_heads).sum(axis=1)
            counts = Counts(kept.reshape(n_splits, batch, q.shape[2]), rows[0], rows[1])
        if n_splits > 1:
            assert lse is not None
            rows_of_splits = (o.reshape(n_splits, -1, q.shape[3]), lse.reshape(n_splits, -1))
            o, lse = simulate_kernel(self.combine, *rows_of_splits, getattr(nl, q.dtype.name), None, target=target)
        return o, lse, counts


def tile_launch(
    kernel: Any,
    combine: Any,
    cache: FlatCache,
    lengths: Sequence[int],
    *,
    q_shape: tuple[int, ...],
    n_kv_heads: int,
    itemsize: int,
    most_keys: int,
    tile_kv: int,
    right_to_left: bool,
    softmax_scale: float | None,
    left: int | None,
    n_splits: int = 1,
    n_cores: int = 1,
    with_lse: bool = False,
    with_stats: bool = False,
    d_major_keys: int | None = None,
    gated: bool = False,
) -> TileLaunch:
    """Choose the geometry, and plan.

    Args:
        kernel: of the rule.
        combine: `combine_splits`.
        cache: where keys lie.
        lengths: keys of each sequence.
        q_shape: [batch, 1, n_q_heads, d].
        n_kv_heads: KV heads.
        itemsize: bytes per element of the cache.
        most_keys: keys that a sequence may have; decides the size of items.
        tile_kv: keys of a tile.
        right_to_left: order of the visit.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        left: window to the left, or None.
        n_splits: KV splits.
        n_cores: cores of the launch.
        with_lse: whether lse is wanted.
        with_stats: whether counts are.
        d_major_keys: keys per row of d-major K, None for s-major.
        gated: whether the device lists the tiles.

    Raises:
        ValueError: `tile_kv` is too large for the heads.
    """
    batch, _, n_q_heads, d = q_shape
    longest = most_keys if left is None else min(most_keys, left + 1)
    n_groups = batch * n_kv_heads * n_splits
    geometry = choose_tile_geometry(
        longest=-(-longest // n_splits),
        n_kv_heads=n_kv_heads,
        group=n_q_heads // n_kv_heads,
        d=d,
        itemsize=itemsize,
        n_groups=n_groups,
        left=left,
        n_splits=n_splits,
        n_cores=min(n_cores, n_groups),
        tile_kv=tile_kv,
        right_to_left=right_to_left,
        d_major_keys=d_major_keys,
        gated=gated,
    )
    plan, gates = make_tile_plan(
        cache,
        geometry,
        lengths,
        n_kv_heads=n_kv_heads,
        left=left,
        d=d,
        d_major_keys=d_major_keys,
        most_keys=most_keys,
        delta_rows=gated,
    )
    scale = float(d) ** -0.5 if softmax_scale is None else float(softmax_scale)
    return TileLaunch(geometry, plan, gates, n_kv_heads, tuple(lengths), scale, kernel, combine, with_lse, with_stats)
