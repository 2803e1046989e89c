"""Checks of the arguments that flat and paged decode have in common."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from contributed._checks import FLOATS, PARTITIONS, require, require_array, require_scale
from contributed._decode_launch import Options
from contributed._decode_plan import d_major_keys
from contributed._nki import default_target

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3)
D_MAX = 2 * PARTITIONS
# Between these, times a score or a mask, numbers stay in float32 and masks below every score.
SCALE_MIN, SCALE_MAX = 1e-30, 1e8
SINK_MAX = 1e30
SEQLEN_MAX = 2**24  # positions are float32
SLOPE_MAX = 1.0  # ALiBi's are below; the bias is a difference of two products, which rounds with the slope
MAX_INDEX = 2**31 - 1  # rows and elements are int32


def queries(q: Any) -> Array:
    """q as [batch, s, n_q_heads, d]."""
    if not isinstance(q, np.ndarray):
        raise TypeError(f"q: received {type(q).__name__}, allowed a NumPy array [batch, n_q_heads, d]")
    layout = "[batch, n_q_heads, d] or [batch, s, n_q_heads, d]"
    require(q.ndim in (3, 4), "q shape", received=list(q.shape), allowed=layout)
    require_array("q", q, ndim=q.ndim, layout=layout)
    require(q.size > 0, "q shape", received=list(q.shape), allowed=f"{layout}, each at least 1")
    d = q.shape[-1]
    allowed = f"1..{PARTITIONS}, or even to {D_MAX}"
    require(d <= PARTITIONS or (d <= D_MAX and d % 2 == 0), "head_dim", received=d, allowed=allowed)
    return np.ascontiguousarray(q if q.ndim == 4 else q[:, None])


def cache_dtypes(q: Array, **caches: Any) -> None:
    """K and V are arrays of q's dtype, or both float8_e4m3 beside a two-byte q."""
    types = (q.dtype,) if q.dtype == FLOATS["float32"] else (q.dtype, FLOAT8)
    first = None
    for name, x in caches.items():
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a NumPy array")
        allowed = " or ".join(map(str, types)) if first is None else f"{first}, that of {next(iter(caches))}"
        if x.dtype not in types or (first is not None and x.dtype != first):
            raise TypeError(f"{name} dtype: received {x.dtype}, allowed {allowed}")
        first = x.dtype


def flat_cache(
    q: Array, k: Array, v: Array, seqlens_kv: Any, cu_seqlens_kv: Any
) -> tuple[int, tuple[int, ...] | None, list[int], int]:
    """K and V [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d]; q has four axes.

    Returns KV heads, first rows of packed sequences or None, keys of each sequence, and the most there is room for.
    """
    batch, d = q.shape[0], q.shape[3]
    packed = cu_seqlens_kv is not None
    layout = f"[total, n_kv_heads, {d}] with cu_seqlens_kv" if packed else f"[{batch}, seqlen_kv, n_kv_heads, {d}]"
    fits = k.ndim == (3 if packed else 4) and k.shape[-1] == d and (packed or k.shape[0] == batch)
    require(fits, "k shape", received=list(k.shape), allowed=layout)
    require(v.shape == k.shape, "v shape", received=list(v.shape), allowed=f"{list(k.shape)}, that of k")
    heads(q, k.shape[-2])
    require(k.size <= MAX_INDEX, "k size", received=k.size, allowed=f"at most {MAX_INDEX}")
    first, room = None, np.full(batch, k.shape[1])
    if packed:
        cu = integers("cu_seqlens_kv", cu_seqlens_kv, (batch + 1,), f"[{batch + 1}]").astype(np.int64)
        ascends = cu[0] >= 0 and bool((np.diff(cu) >= 0).all()) and cu[-1] <= k.shape[0]
        require(ascends, "cu_seqlens_kv", received=cu.tolist(), allowed=f"ascending within 0..{k.shape[0]}")
        first, room = tuple(int(n) for n in cu[:-1]), np.diff(cu)
    used = [int(n) for n in room] if seqlens_kv is None else lengths(seqlens_kv, batch, room)
    return k.shape[-2], first, used, int(room.max())


def d_major(q: Array, k: Array, k_d_major: Any, *, packed: bool) -> None:
    """The kernel may get K with d before the keys."""
    flag("k_d_major", k_d_major)
    require(not (packed and k_d_major), "k_d_major", received=True, allowed="False with cu_seqlens_kv")
    if k_d_major:
        size = k.shape[0] * k.shape[2] * q.shape[3] * d_major_keys(k.shape[1])
        require(size <= MAX_INDEX, "k size with k_d_major", received=size, allowed=f"at most {MAX_INDEX}")


def heads(q: Array, n_kv_heads: int) -> None:
    """Query heads in groups per KV head, whose rows fit one tile."""
    s, n_q_heads = q.shape[1], q.shape[2]
    require(n_kv_heads >= 1, "n_kv_heads", received=n_kv_heads, allowed=">= 1")
    allowed = f"multiples of n_kv_heads={n_kv_heads}"
    require(n_q_heads % n_kv_heads == 0, "n_q_heads", received=n_q_heads, allowed=allowed)
    rows = s * (n_q_heads // n_kv_heads)
    require(rows <= PARTITIONS, "s * n_q_heads / n_kv_heads", received=rows, allowed=f"1..{PARTITIONS}")


def integers(name: str, value: Any, shape: tuple[int, ...], layout: str) -> Array:
    """An integer array of a shape; a dimension of -1 is free."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        received = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: received {received}, allowed an integer array {layout}")
    fits = value.ndim == len(shape) and all(n in (m, -1) or m == -1 for n, m in zip(value.shape, shape, strict=True))
    require(fits, f"{name} shape", received=list(value.shape), allowed=layout)
    return value


def lengths(value: Any, batch: int, most: Any) -> list[int]:
    """`seqlens_kv` as a list; `most` is the limit of all, or an array of one per sequence."""
    array = integers("seqlens_kv", value, (batch,), f"[{batch}], one length per sequence")
    limits = np.broadcast_to(np.asarray(most), (batch,))
    for b in range(batch):
        n = int(array[b])
        require(0 <= n <= int(limits[b]), f"seqlens_kv[{b}]", received=n, allowed=f"0..{int(limits[b])}")
    return [int(n) for n in array]


def longest(max_seqlen_kv: Any, used: list[int], room: int) -> int:
    """What no sequence is longer than, at least 1."""
    if max_seqlen_kv is None:
        return max(1, room)
    whole = isinstance(max_seqlen_kv, (int, np.integer)) and not isinstance(max_seqlen_kv, bool)
    allowed = f"None or {max(used)}, the longest of seqlens_kv, .. {SEQLEN_MAX}"
    require(
        whole and max(used) <= max_seqlen_kv <= SEQLEN_MAX, "max_seqlen_kv", received=max_seqlen_kv, allowed=allowed
    )
    return max(1, int(max_seqlen_kv))


def options(
    q: Array,
    n_kv_heads: int,
    *,
    softmax_scale: Any,
    window_size: Any,
    softcap: Any,
    sinks: Any,
    alibi_slopes: Any,
    k_scale: Any,
    v_scale: Any,
) -> Options:
    """Everything that is optional, checked."""
    require_scale(softmax_scale)
    # Kernels compute in float32, where a large number is infinite and a small one 0.
    fits = softmax_scale is None or bool(np.isfinite(_float32(np.asarray(softmax_scale))))
    require(fits, "softmax_scale", received=softmax_scale, allowed="a number that is finite in float32")
    left = _window(window_size)
    if softcap is not None:
        number = isinstance(softcap, (int, float, np.floating, np.integer)) and not isinstance(softcap, bool)
        good = number and SCALE_MIN <= softcap <= SCALE_MAX
        require(bool(good), "softcap", received=softcap, allowed=f"{SCALE_MIN}..{SCALE_MAX} or None")
        softcap = float(softcap)
    n_q_heads = q.shape[2]
    sinks, slopes = _per_head("sinks", sinks, n_q_heads), _per_head("alibi_slopes", alibi_slopes, n_q_heads)
    for name, x, most in (("sinks", sinks, SINK_MAX), ("alibi_slopes", slopes, SLOPE_MAX)):
        small = x is None or bool((np.abs(x) <= most).all())
        require(small, name, received=None if x is None else x.tolist(), allowed=f"finite numbers in -{most}..{most}")
    k_factor = _factor("k_scale", k_scale, n_kv_heads)
    product = abs(1.0 if softmax_scale is None else float(softmax_scale)) * np.asarray(
        1.0 if k_factor is None else k_factor, np.float64
    )
    useful = bool(((product == 0) | ((product >= SCALE_MIN) & (product <= SCALE_MAX))).all())
    allowed = f"0, or {SCALE_MIN}..{SCALE_MAX} in size"
    require(useful, "softmax_scale * k_scale", received=product.tolist(), allowed=allowed)
    return Options(
        None if softmax_scale is None else float(softmax_scale),
        left,
        softcap,
        sinks,
        slopes,
        k_factor,
        _factor("v_scale", v_scale, n_kv_heads),
    )


def _window(window_size: Any) -> int | None:
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    require(pair, "window_size", received=window_size, allowed="(left, right), each None or >= 0")
    for side in window_size:
        good = side is None or (isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 0)
        require(bool(good), "window_size", received=window_size, allowed="(left, right), each None or >= 0")
    return None if window_size[0] is None else int(window_size[0])


def _per_head(name: str, value: Any, n: int) -> Array | None:
    if value is None:
        return None
    array = _numbers(name, value, f"numbers [{n}], one per query head")
    require(array.shape == (n,), f"{name} shape", received=list(array.shape), allowed=f"[{n}], one per query head")
    require(bool(np.isfinite(array).all()), name, received=array.tolist(), allowed="finite numbers")
    return array


def _factor(name: str, value: Any, n_kv_heads: int) -> float | Array | None:
    if value is None:
        return None
    allowed = f"a number, or [{n_kv_heads}], one per KV head"
    array = _numbers(name, value, allowed)
    require(array.shape in ((), (n_kv_heads,)), f"{name} shape", received=list(array.shape), allowed=allowed)
    good = bool((np.isfinite(array) & (array > 0)).all())
    require(good, name, received=value, allowed="positive finite numbers")
    return float(array) if array.ndim == 0 else array


def _numbers(name: str, value: Any, allowed: str) -> Array:
    """A number, sequence or array as float32."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: received {value!r}, allowed {allowed}") from error
    if array.dtype.kind not in "fiu" and array.dtype not in (*FLOATS.values(), FLOAT8):
        raise TypeError(f"{name}: received {array.dtype}, allowed {allowed}")
    return _float32(array)


def _float32(array: Array) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: received {value!r}, allowed True or False")


def count(name: str, value: Any, most: int) -> None:
    """An int in 1..most."""
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= most
    require(bool(good), name, received=value, allowed=f"1..{most}")


def cores(n_cores: Any, target: str | None) -> None:
    """Physical cores of a launch that the generation has."""
    count("n_cores", n_cores, 2)
    name = target or default_target()
    require(n_cores == 1 or name not in ("trn1", "inf2"), "n_cores", received=n_cores, allowed=f"1 on {name}")


def results(q_shape: tuple[int, ...], dtype: Any, out: Any, lse: Any, return_lse: bool) -> None:
    """Preallocated results fit."""
    flag("return_lse", return_lse)
    for name, x, shape, kind in (("out", out, q_shape, dtype), ("lse", lse, q_shape[:-1], np.dtype(np.float32))):
        if x is None:
            continue
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a NumPy array or None")
        require(x.shape == shape, f"{name} shape", received=list(x.shape), allowed=list(shape))
        if x.dtype != kind:
            raise TypeError(f"{name} dtype: received {x.dtype}, allowed {kind}")
        require(x.flags.writeable, name, received="a read-only array", allowed="a writeable one")
    apart = out is None or lse is None or not np.shares_memory(out, lse)
    require(apart, "lse", received="an array that overlaps out", allowed="memory of its own")


def deliver(
    o: Array, lse: Array | None, q_shape: tuple[int, ...], out: Array | None, lse_out: Array | None, return_lse: bool
) -> Any:
    """Results in q's shape, written into what the caller allocated."""
    o = np.asarray(o).reshape(q_shape)
    if out is not None:
        out[...] = o
        o = out
    if lse is not None:
        lse = np.asarray(lse).reshape(q_shape[:-1])
        if lse_out is not None:
            lse_out[...] = lse
            lse = lse_out
    return (o, lse) if return_lse else o
