"""A decode call on the host: geometry and plan, the kernels' arguments, and the kernels one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contributed._decode_plan import (
    Cache,
    Geometry,
    Plan,
    choose_geometry,
    choose_n_splits,
    d_major_keys,
    make_plan,
)
from contributed._nki import nl, simulate_kernel

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Options:
    """What changes scores and results; None is off.

    Args:
        softmax_scale: multiplies q . k; None means d ** -0.5.
        left: window to the left.
        softcap: cap of the scores.
        sinks: float32 [n_q_heads].
        slopes: ALiBi's, float32 [n_q_heads].
        k_scale: factor of stored keys, a number or float32 [n_kv_heads].
        v_scale: factor of stored values, likewise.
    """

    softmax_scale: float | None = None
    left: int | None = None
    softcap: float | None = None
    sinks: Array | None = None
    slopes: Array | None = None
    k_scale: float | Array | None = None
    v_scale: float | Array | None = None


def kernel_layout(k: Array, v: Array, k_d_major: bool) -> tuple[Array, Array]:
    """K and V in math layout, [batch, seqlen_kv, n_kv_heads, d] or packed without batch, as the kernels take them.

    Returns [batch, n_kv_heads, seqlen_kv, d] (batch 1 if packed); with `k_d_major` K [batch, n_kv_heads, d, seqlen_kv],
    both padded to a length that loads in few gathers.
    """
    pair = (k[None], v[None]) if k.ndim == 3 else (k, v)
    k4, v4 = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in pair)
    batch, heads, keys, d = k4.shape
    if keys == 0:
        # A gather needs a row to skip.
        k4, v4 = (np.zeros((batch, heads, 1, d), x.dtype) for x in (k4, v4))
    if not k_d_major:
        return k4, v4
    room = d_major_keys(k4.shape[2])
    padded = np.zeros((batch, heads, d, room), k4.dtype)
    padded[..., : k4.shape[2]] = k4.swapaxes(2, 3)
    return padded, np.concatenate([v4, np.zeros((batch, heads, room - v4.shape[2], d), v4.dtype)], axis=2)


def nl_type(x: Any) -> Any:
    """The element type that a kernel makes results of, from an array or a tensor."""
    return getattr(nl, str(x.dtype).rpartition(".")[2])


@dataclass(frozen=True)
class Launch:
    """The kernels of one call, for caches of any content.

    `kernels` are imported by who makes it, so that this module does not import a kernel file.
    """

    geometry: Geometry
    plan: Plan
    options: Options
    n_kv_heads: int
    decode: Any
    combine: Any
    with_lse: bool

    def arguments(self, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        """Arguments of `flash_decode_fwd`; q [batch, s, n_q_heads, d], k and v in kernel layout.

        Operands, sinks and slopes are arrays, or tensors of another framework.
        """
        g, o = self.geometry, self.options
        splits = g.n_splits > 1
        scale = float(q.shape[3]) ** -0.5 if o.softmax_scale is None else float(o.softmax_scale)
        k_scale = 1.0 if o.k_scale is None else o.k_scale
        v_scale = 1.0 if o.v_scale is None else o.v_scale
        kv_scales = None
        if not isinstance(k_scale, float) or not isinstance(v_scale, float):
            columns = [np.broadcast_to(np.asarray(x, np.float32), (self.n_kv_heads,)) for x in (k_scale, v_scale)]
            kv_scales = np.ascontiguousarray(np.stack(columns, axis=1))
        else:
            scale *= k_scale
        return (
            q,
            k,
            v,
            self.plan.records,
            self.plan.items,
            self.plan.bounds,
            self.n_kv_heads,
            g.tokens,
            g.granules,
            g.chunks,
            g.n_windows,
            g.window,
            g.n_splits,
            scale,
            1.0 if kv_scales is not None else v_scale,
            o.softcap,
            None if splits else self._per_head(o.sinks),
            self._per_head(o.slopes),
            kv_scales,
            self.with_lse or splits,
        )

    def run(self, q: Array, k: Array, v: Array, target: str | None) -> tuple[Array, Array | None]:
        """o [batch, s, n_q_heads, d] and lse [batch, s, n_q_heads] or None, simulated on the CPU."""
        kernel = self.decode[2] if self.geometry.n_cores == 2 else self.decode
        result = simulate_kernel(kernel, *self.arguments(q, k, v), target=target)
        if self.geometry.n_splits == 1:
            return (result[0], result[1]) if self.with_lse else (result, None)
        o, lse = simulate_kernel(self.combine, *self.combine_arguments(q, *result), target=target)
        return o.reshape(q.shape), lse.reshape(q.shape[:3])

    def combine_arguments(self, q: Any, o: Any, lse: Any) -> tuple[Any, ...]:
        """Arguments of `combine_splits` for what the decode kernel returned."""
        n_splits, d = self.geometry.n_splits, q.shape[3]
        sinks = None
        if self.options.sinks is not None:
            sinks = self.options.sinks[None][[0] * (q.shape[0] * q.shape[1])].reshape(-1)
        return o.reshape(n_splits, -1, d), lse.reshape(n_splits, -1), nl_type(q), sinks

    def _per_head(self, values: Any) -> Any:
        return None if values is None else values.reshape(self.n_kv_heads, -1)


def launch(
    decode: Any,
    combine: Any,
    cache: Cache,
    lengths: Sequence[int],
    options: Options,
    *,
    q_shape: tuple[int, ...],
    n_kv_heads: int,
    itemsize: int,
    most_keys: int,
    n_splits: int | None,
    n_cores: int,
    with_lse: bool,
    d_major_keys: int | None = None,
) -> Launch:
    """Choose geometry and splits, and plan.

    Args:
        decode: `flash_decode_fwd`.
        combine: `combine_splits`.
        cache: where keys lie.
        lengths: keys of each sequence.
        options: of the call.
        q_shape: [batch, s, n_q_heads, d].
        n_kv_heads: KV heads.
        itemsize: bytes per element of the cache.
        most_keys: keys that a sequence may have; decides the size of items.
        n_splits: KV splits, None to choose.
        n_cores: cores of the launch.
        with_lse: whether lse is wanted.
        d_major_keys: keys per row of d-major K, None for s-major.
    """
    batch, s, n_q_heads, d = q_shape
    visible = [length if options.left is None else min(length, options.left + s) for length in lengths]
    if n_splits is None:
        n_splits = choose_n_splits([n for n in visible for _ in range(n_kv_heads)], n_cores)
    longest = most_keys if options.left is None else min(most_keys, options.left + s)
    n_groups = batch * n_kv_heads * n_splits
    n_cores = min(n_cores, n_groups)
    geometry = choose_geometry(
        longest=-(-longest // n_splits),
        s=s,
        n_kv_heads=n_kv_heads,
        group=n_q_heads // n_kv_heads,
        d=d,
        itemsize=itemsize,
        n_groups=n_groups,
        left=options.left,
        n_splits=n_splits,
        n_cores=n_cores,
        run=cache.run,
        d_major_keys=d_major_keys,
    )
    plan = make_plan(
        cache,
        geometry,
        lengths,
        n_kv_heads=n_kv_heads,
        s=s,
        left=options.left,
        d=d,
        d_major_keys=d_major_keys,
        most_keys=most_keys,
    )
    return Launch(geometry, plan, options, n_kv_heads, decode, combine, with_lse)
