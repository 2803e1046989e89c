"""Checks of the arguments that forward and backward prefill have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from contributed._checks import PARTITIONS, require, require_array, require_same_dtype, require_scale
from contributed._decode_checks import D_MAX, MAX_INDEX, SCALE_MAX, SCALE_MIN, flag, integers
from contributed._prefill_plan import Span, Sparsity, Window

Array = np.ndarray[Any, np.dtype[Any]]

ROWS_MAX = 2**24  # positions are float32
GROUPS = {4: (1, 2, 3, 4), 8: (1, 2, 3, 4, 5, 6, 7, 8)}  # M, and the N that go with it; N = M is dense


class Operands(NamedTuple):
    """Packed, [rows, heads, d], and the sequences in them; of q only `rows`, those that sequences own."""

    q: Array
    k: Array
    v: Array
    spans: tuple[Span, ...]
    rows: slice


def operands(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any) -> Operands:
    """q, k and v packed with both `cu_seqlens`, or [batch, seqlen, heads, d] without."""
    packed = cu_seqlens_q is not None or cu_seqlens_kv is not None
    layout = "[total, heads, d] with cu_seqlens_q and cu_seqlens_kv" if packed else "[batch, seqlen, heads, d]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_array(name, x, ndim=3 if packed else 4, layout=layout)
    require_same_dtype(q=q, k=k, v=v)
    require(v.shape == k.shape, "v shape", received=list(v.shape), allowed=f"{list(k.shape)}, that of k")
    d = q.shape[-1]
    allowed = f"1..{PARTITIONS}, or even to {D_MAX}"
    good = 1 <= d <= D_MAX and (d <= PARTITIONS or d % 2 == 0)
    require(good, "head_dim", received=d, allowed=allowed)
    require(k.shape[-1] == d, "k shape", received=list(k.shape), allowed=f"head dim {d}, that of q")
    n_q_heads, n_kv_heads = q.shape[-2], k.shape[-2]
    require(n_kv_heads >= 1 and n_q_heads >= 1, "heads", received=(n_q_heads, n_kv_heads), allowed="at least 1 each")
    allowed = f"multiples of n_kv_heads={n_kv_heads}"
    require(n_q_heads % n_kv_heads == 0, "n_q_heads", received=n_q_heads, allowed=allowed)
    for name, x in (("q", q), ("k", k)):
        require(x.size <= MAX_INDEX, f"{name} size", received=x.size, allowed=f"at most {MAX_INDEX}")
    if packed:
        firsts = []
        for name, cu, total in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_kv", cu_seqlens_kv, len(k))):
            array = integers(name, cu, (-1,), "[batch + 1]").astype(np.int64)
            good = array.size >= 2 and array[0] >= 0 and bool((np.diff(array) >= 0).all()) and array[-1] <= total
            require(good, name, received=array.tolist(), allowed=f"at least 2 numbers, ascending within 0..{total}")
            firsts.append(array)
        same = firsts[0].size == firsts[1].size
        allowed = f"{firsts[0].size} numbers, as cu_seqlens_q"
        require(same, "cu_seqlens_kv", received=f"{firsts[1].size} numbers", allowed=allowed)
    else:
        require(q.shape[0] >= 1, "q shape", received=list(q.shape), allowed="batch at least 1")
        batch = q.shape[0]
        require(k.shape[0] == batch, "k shape", received=list(k.shape), allowed=f"batch {batch}, that of q")
        firsts = [np.arange(batch + 1) * x.shape[1] for x in (q, k)]
    rows = [(int(a[b]), int(a[b + 1] - a[b])) for a in firsts for b in range(firsts[0].size - 1)]
    n = firsts[0].size - 1
    first, end = int(firsts[0][0]), int(firsts[0][-1])
    spans = tuple(Span(rows[b][0] - first, rows[b][1], *rows[n + b]) for b in range(n))
    longest = max(max(s.len_q, s.len_kv) for s in spans)
    require(longest < ROWS_MAX, "length", received=longest, allowed=f"less than {ROWS_MAX}")
    q3, k3, v3 = (np.ascontiguousarray(x.reshape(-1, *x.shape[-2:])) for x in (q, k, v))
    return Operands(q3[first:end], k3, v3, spans, slice(first, end))


def window(causal: Any, window_size: Any) -> Window:
    """What a query sees; `causal` is a right side of 0."""
    flag("causal", causal)
    allowed = "(left, right), each None or >= 0"
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    require(pair, "window_size", received=window_size, allowed=allowed)
    for side in window_size:
        good = side is None or (isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 0)
        require(bool(good), "window_size", received=window_size, allowed=allowed)
    left, right = (None if side is None else int(side) for side in window_size)
    return Window(left, 0 if causal else right)


def scale(softmax_scale: Any, d: int) -> float:
    """What multiplies q . k."""
    require_scale(softmax_scale)
    value = float(d) ** -0.5 if softmax_scale is None else float(softmax_scale)
    good = value == 0 or SCALE_MIN <= abs(value) <= SCALE_MAX
    require(good, "softmax_scale", received=softmax_scale, allowed=f"0, or {SCALE_MIN}..{SCALE_MAX} in size")
    return value


def sparsity(n: Any, m: Any, sink: Any, recent: Any) -> Sparsity | None:
    """The selection, or None if it is off: n is 0, None or m."""
    for name, x in (("dense_sink_tokens", sink), ("dense_recent_tokens", recent)):
        good = isinstance(x, (int, np.integer)) and not isinstance(x, bool) and 0 <= x < ROWS_MAX
        require(bool(good), name, received=x, allowed=f"0..{ROWS_MAX - 1}")
    whole = [isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in (n, m)]
    require(whole[1] and m in GROUPS, "sparsity_m", received=m, allowed=" or ".join(map(str, GROUPS)))
    if n is None:
        return None
    require(whole[0] and (n == 0 or n in GROUPS[m]), "sparsity_n", received=n, allowed=f"None or 0..{m}")
    return None if n in (0, m) else Sparsity(int(n), int(m), int(sink), int(recent))


def threshold(value: Any) -> float | None:
    """The threshold of skip-softmax, or None if it is off."""
    if value is None:
        return None
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    good = number and bool(np.isfinite(value)) and 0 <= value <= 1
    require(bool(good), "skip_softmax_threshold", received=value, allowed="None, or a number in 0..1")
    return None if value == 0 else float(value)
