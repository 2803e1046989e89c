"""Decode attention on tensors: one new token per sequence against its KV cache; forward only.

The functions with names of the flash-sparse-attn package take its arguments; windows, thresholds and empty sequences
mean what they mean in `contributed`: a window counts from the new token, keys ahead of it do not exist, and a sequence
without keys has o = 0 and lse = -inf. Tensors of lengths and tables are best on the CPU, where they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contributed._checks import PARTITIONS
from contributed._decode_checks import SCALE_MAX, SCALE_MIN
from contributed._sparse_checks import TILE_KV, tile
from contributed.flash_decode import MOST_SPLITS
from contributed.paged_decode import BLOCK_MAX
from nki_torch import _check as check
from nki_torch import _ops as ops
from nki_torch._decode_impl import BHSD, BSHD, D_MAJOR, PACKED, PAGES

Window = tuple[int | None, int | None]
Result = Tensor | tuple[Tensor, Tensor]

NAMES = "seqused_k,cu_seqlens_k,max_seqlen_k"


def flash_dense_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Result:
    """Decode attention over whole flat caches.

    Args:
        query: [batch, n_q_heads, d], float32, bfloat16 or float16; d 1..128, or even to 256.
        key: [batch, seqlen_k, n_kv_heads, d], of query's type; n_q_heads / n_kv_heads 1..128.
        value: as key.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        window_size: (left, right), keys visible around the new token; None is unlimited.
        return_lse: whether (o, lse) is returned.
        out: where o is written, as query.
        lse: where lse is written, float32 [batch, n_q_heads].

    Returns:
        o as query; with `return_lse` also lse, float32, natural logarithm.

    Raises:
        ValueError, TypeError: an argument is outside these limits; nothing has run.
        RuntimeError: query, key or value requires grad where gradients are recorded.
    """
    return _dense(
        "flash_dense_attn_with_kvcache_func", query, key, value, softmax_scale, window_size, return_lse, out, lse
    )


def flash_dense_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Result:
    """Decode attention over packed caches.

    Args:
        query: [batch, n_q_heads, d].
        key: [total_k, n_kv_heads, d].
        value: as key.
        cu_seqlens_k: int32 or int64 [batch + 1]: sequence b owns rows cu[b]:cu[b + 1].
        max_seqlen_k: bound of all lengths, which the program is made for.
        softmax_scale: as the other arguments, as in `flash_dense_attn_with_kvcache_func`.
        window_size: (left, right).
        seqused_k: int32 or int64 [batch], keys in use of each sequence, its first ones; None means all.
        return_lse: whether (o, lse) is returned.
        out: where o is written.
        lse: where lse is written.

    Returns:
        As `flash_dense_attn_with_kvcache_func`.

    Raises:
        ValueError, TypeError, RuntimeError: likewise.
    """
    name = "flash_dense_attn_varlen_with_kvcache_func"
    packed = (cu_seqlens_k, max_seqlen_k, seqused_k)
    return _dense(name, query, key, value, softmax_scale, window_size, return_lse, out, lse, packed)


def flash_sparse_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None = None,
    softmax_threshold: float | None = None,
    window_size: Window = (None, None),
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    tile_kv: int = TILE_KV,
    n_splits: int = 1,
) -> Result:
    """Decode attention that leaves out tiles of keys far below the largest score of their group so far.

    Args:
        query: [batch, n_q_heads, d].
        key: [batch, seqlen_k, n_kv_heads, d].
        value: as key.
        softmax_scale: multiplies q . k; above 0; None means d ** -0.5.
        softmax_threshold: to 1; None means min(1, d / seqlen_k); 0 leaves out nothing.
        window_size: as the next ones, as in `flash_dense_attn_with_kvcache_func`.
        return_lse: whether (o, lse) is returned.
        out: where o is written.
        lse: where lse is written.
        tile_kv: keys of a tile, a power of two 16..1024; the public kernel's own is 256 for d to 64, 128 for d to 128.
        n_splits: KV splits per sequence; each begins anew, so that they change which tiles are left out. Where
            `softmax_threshold` is 0 it and `tile_kv` change nothing.

    Returns:
        As `flash_dense_attn_with_kvcache_func`.

    Raises:
        ValueError, TypeError, RuntimeError: likewise.
    """
    name = "flash_sparse_attn_with_kvcache_func"
    rule = (softmax_threshold, tile_kv, n_splits)
    return _sparse(name, query, key, value, softmax_scale, window_size, return_lse, out, lse, rule)


def flash_sparse_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    softmax_threshold: float | None = None,
    window_size: Window = (None, None),
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    tile_kv: int = TILE_KV,
    n_splits: int = 1,
) -> Result:
    """`flash_sparse_attn_with_kvcache_func` over packed caches.

    Args:
        query: [batch, n_q_heads, d].
        key: [total_k, n_kv_heads, d].
        value: as key.
        cu_seqlens_k: as in `flash_dense_attn_varlen_with_kvcache_func`.
        max_seqlen_k: likewise.
        softmax_scale: as in `flash_sparse_attn_with_kvcache_func`, like the other arguments.
        softmax_threshold: to 1; None means min(1, d / max_seqlen_k); 0 leaves out nothing.
        window_size: (left, right).
        seqused_k: as in `flash_dense_attn_varlen_with_kvcache_func`.
        return_lse: whether (o, lse) is returned.
        out: where o is written.
        lse: where lse is written.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.

    Returns:
        As `flash_dense_attn_with_kvcache_func`.

    Raises:
        ValueError, TypeError, RuntimeError: likewise.
    """
    name = "flash_sparse_attn_varlen_with_kvcache_func"
    rule = (softmax_threshold, tile_kv, n_splits)
    packed = (cu_seqlens_k, max_seqlen_k, seqused_k)
    return _sparse(name, query, key, value, softmax_scale, window_size, return_lse, out, lse, rule, packed)


def flash_gated_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    softmax_scale: float | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    window_size: Window = (None, None),
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    tile_kv: int = TILE_KV,
    n_splits: int = 1,
) -> Result:
    """`flash_sparse_attn_with_kvcache_func` with a gate added to every score, and tiles closed by gates alone.

    Args:
        query: [batch, n_q_heads, d].
        key: [batch, seqlen_k, n_kv_heads, d].
        value: as key.
        alpha: [batch, n_q_heads], float32, bfloat16 or float16; finite.
        delta: [batch, n_kv_heads, seqlen_k], likewise; finite in use.
        softmax_scale: multiplies scores and gates alike; above 0; None means d ** -0.5.
        softmax_threshold: to 1; None means min(1, d / seqlen_k); 0 turns the test of scores off.
        gate_threshold: to 1; None means the same; 0 turns the test of gates off.
        is_logsigmoid_gate: add logsigmoid(alpha * delta), by the public kernel's polynomial, else alpha * delta.
        window_size: as the others, as in `flash_sparse_attn_with_kvcache_func`.
        return_lse: whether (o, lse) is returned.
        out: where o is written.
        lse: where lse is written.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.

    Returns:
        As `flash_dense_attn_with_kvcache_func`.

    Raises:
        ValueError, TypeError, RuntimeError: likewise.
    """
    name = "flash_gated_attn_with_kvcache_func"
    rule = (softmax_threshold, tile_kv, n_splits)
    gates = (alpha, delta, gate_threshold, is_logsigmoid_gate)
    return _gated(name, query, key, value, gates, softmax_scale, window_size, return_lse, out, lse, rule)


def flash_gated_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    window_size: Window = (None, None),
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    tile_kv: int = TILE_KV,
    n_splits: int = 1,
) -> Result:
    """`flash_gated_attn_with_kvcache_func` over packed caches.

    Args:
        query: [batch, n_q_heads, d].
        key: [total_k, n_kv_heads, d].
        value: as key.
        alpha: [batch, n_q_heads].
        delta: [n_kv_heads, total_k].
        cu_seqlens_k: as in `flash_dense_attn_varlen_with_kvcache_func`.
        max_seqlen_k: likewise.
        softmax_scale: as in `flash_gated_attn_with_kvcache_func`, like the other arguments.
        softmax_threshold: to 1; None means min(1, d / max_seqlen_k); 0 turns the test of scores off.
        gate_threshold: to 1; None means the same; 0 turns the test of gates off.
        is_logsigmoid_gate: which gate is added.
        window_size: (left, right).
        seqused_k: as in `flash_dense_attn_varlen_with_kvcache_func`.
        return_lse: whether (o, lse) is returned.
        out: where o is written.
        lse: where lse is written.
        tile_kv: keys of a tile.
        n_splits: KV splits per sequence.

    Returns:
        As `flash_dense_attn_with_kvcache_func`.

    Raises:
        ValueError, TypeError, RuntimeError: likewise.
    """
    name = "flash_gated_attn_varlen_with_kvcache_func"
    rule = (softmax_threshold, tile_kv, n_splits)
    gates = (alpha, delta, gate_threshold, is_logsigmoid_gate)
    packed = (cu_seqlens_k, max_seqlen_k, seqused_k)
    return _gated(name, query, key, value, gates, softmax_scale, window_size, return_lse, out, lse, rule, packed)


Packed = tuple[Any, Any, Any]  # cu_seqlens_k, max_seqlen_k, seqused_k
Rule = tuple[Any, Any, Any]  # softmax_threshold, tile_kv, n_splits


def _dense(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: Any,
    window_size: Any,
    return_lse: Any,
    out: Any,
    lse: Any,
    packed: Packed | None = None,
) -> Result:
    scale = check.scale("softmax_scale", softmax_scale)
    left, layout, bound = _checked(name, query, key, value, window_size, return_lse, out, lse, packed)
    cu_seqlens, _, used = packed or (None, None, None)
    with_lse = return_lse or lse is not None
    o, logs = ops.dense_decode(
        query[:, None],
        key,
        value,
        used,
        cu_seqlens,
        None,
        layout,
        NAMES,
        bound,
        scale,
        left,
        None,
        None,
        None,
        None,
        with_lse,
    )
    return _deliver(o[:, 0], logs[:, 0] if with_lse else None, out, lse, return_lse)


def _sparse(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: Any,
    window_size: Any,
    return_lse: Any,
    out: Any,
    lse: Any,
    rule: Rule,
    packed: Packed | None = None,
) -> Result:
    threshold, tile_kv, n_splits = _rule(rule)
    scale = check.scale("softmax_scale", softmax_scale, positive=True)
    if threshold == 0:
        return _dense(name, query, key, value, softmax_scale, window_size, return_lse, out, lse, packed)
    left, layout, bound = _checked(name, query, key, value, window_size, return_lse, out, lse, packed)
    cu_seqlens, _, used = packed or (None, None, None)
    with_lse = return_lse or lse is not None
    o, logs, _ = ops.sparse_decode(
        query[:, None],
        key,
        value,
        used,
        cu_seqlens,
        "sparse_decode",
        layout,
        NAMES,
        bound,
        scale,
        threshold,
        left,
        tile_kv,
        n_splits,
        with_lse,
        False,
    )
    return _deliver(o[:, 0], logs[:, 0] if with_lse else None, out, lse, return_lse)


def _gated(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: tuple[Any, Any, Any, Any],
    softmax_scale: Any,
    window_size: Any,
    return_lse: Any,
    out: Any,
    lse: Any,
    rule: Rule,
    packed: Packed | None = None,
) -> Result:
    threshold, tile_kv, n_splits = _rule(rule)
    alpha, delta, gate, is_logsigmoid_gate = gates
    gate_threshold = check.threshold("gate_threshold", gate)
    check.flag("is_logsigmoid_gate", is_logsigmoid_gate)
    scale = check.scale("softmax_scale", softmax_scale, positive=True)
    left, layout, bound = _checked(name, query, key, value, window_size, return_lse, out, lse, packed)
    check.floats("alpha", alpha, "[batch, n_q_heads]")
    check.shape("alpha", alpha, (query.shape[0], query.shape[1]))
    check.floats("delta", delta, "[n_kv_heads, total_k]" if packed else "[batch, n_kv_heads, seqlen_k]")
    check.shape("delta", delta, (*key.shape[:-3], key.shape[-2], key.shape[-3]))
    for gate_name, x in (("alpha", alpha), ("delta", delta)):
        if x.device != query.device:
            check.refuse(f"{gate_name} device", x.device, query.device)
    check.no_gradient(name, alpha=alpha, delta=delta)
    cu_seqlens, _, used = packed or (None, None, None)
    with_lse = return_lse or lse is not None
    o, logs = ops.gated_decode(
        query[:, None],
        key,
        value,
        alpha,
        delta,
        used,
        cu_seqlens,
        layout,
        NAMES,
        bound,
        scale,
        threshold,
        gate_threshold,
        is_logsigmoid_gate,
        left,
        tile_kv,
        n_splits,
        with_lse,
    )
    return _deliver(o[:, 0], logs[:, 0] if with_lse else None, out, lse, return_lse)


def _rule(rule: Rule) -> tuple[float | None, int, int]:
    threshold, tile_kv, n_splits = rule
    tile(tile_kv)
    check.whole("n_splits", n_splits, 1)
    if n_splits > MOST_SPLITS:
        check.refuse("n_splits", n_splits, f"1..{MOST_SPLITS}")
    return check.threshold("softmax_threshold", threshold), tile_kv, n_splits


def _checked(
    name: str,
    query: Any,
    key: Any,
    value: Any,
    window_size: Any,
    return_lse: Any,
    out: Any,
    lse: Any,
    packed: Packed | None,
) -> tuple[int | None, str, int | None]:
    """What the functions for one token have in common. Returns the window's left side, the layout, and a bound."""
    layout = "[batch, seqlen_k, n_kv_heads, d]" if packed is None else "[total_k, n_kv_heads, d]"
    check.operands(("query", query, "[batch, n_q_heads, d]"), ("key", key, layout), ("value", value, layout))
    batch, n_q_heads, d = query.shape
    if batch < 1:
        check.refuse("query shape", list(query.shape), "batch at least 1")
    check.shape("key", key, (None, None, d) if packed is not None else (batch, None, None, d))
    check.shape("value", value, tuple(key.shape), "that of key")
    check.heads(n_q_heads, key.shape[-2])
    group = n_q_heads // key.shape[-2]
    if group > PARTITIONS:
        check.refuse("query heads per KV head", group, f"1..{PARTITIONS}")
    left, _ = check.window(window_size)
    check.flag("return_lse", return_lse)
    check.results(query, out, lse, (batch, n_q_heads))
    check.no_gradient(name, query=query, key=key, value=value)
    if packed is None:
        return left, BSHD, None
    cu_seqlens, bound, used = packed
    check.integers("cu_seqlens_k", cu_seqlens, (batch + 1,), "[batch + 1]")
    check.whole("max_seqlen_k", bound)
    if used is not None:
        check.integers("seqused_k", used, (batch,), "[batch]")
    return left, PACKED, bound


def _deliver(o: Tensor, logs: Tensor | None, out: Tensor | None, lse: Tensor | None, return_lse: bool) -> Result:
    """Results, in what the caller allocated."""
    if out is not None:
        o = out.copy_(o)
    if logs is not None and lse is not None:
        logs = lse.copy_(logs)
    if not return_lse:
        return o
    assert logs is not None
    return o, logs


def decode_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k_d_major: bool = False,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window_size: Window = (None, None),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    skip_softmax_threshold: float | None = None,
    n_splits: int | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
    measure_sparsity: bool = False,
) -> Result:
    """Decode attention over a cache in the kernels' own layout: nothing is copied or transposed.

    Args:
        query: [batch, n_q_heads, d], or [batch, s, n_q_heads, d]: s new tokens per sequence, the last of its keys;
            s * n_q_heads / n_kv_heads 1..128.
        k_cache: [batch, n_kv_heads, keys, d]; with `k_d_major` [batch, n_kv_heads, d, keys], keys a multiple of 128
            (`contributed._decode_plan.d_major_keys` is the best room); with `block_table` pages
            [n_blocks, n_kv_heads, block_size, d], block_size 1..256. Of query's type.
        v_cache: [batch, n_kv_heads, keys, d], or pages.
        cache_seqlens: int32 or int64 [batch], keys of each sequence, the new tokens' among them.
        k_d_major: whether K has d before the keys.
        block_table: int32 or int64 [batch, max_blocks]: page of each block of keys, -1 for none.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        window_size: (left, right), keys visible around a token's own; None is unlimited.
        softcap: cap of the scores, or None.
        sinks: [n_q_heads], logits that join the softmax's sum alone, or None.
        alibi_slopes: [n_q_heads], or None.
        skip_softmax_threshold: to 1, for one new token and a flat cache, without softcap, sinks and slopes; None or 0
            skips nothing.
        n_splits: KV splits, None to choose; 1 with a threshold.
        max_seqlen: bound of all lengths, which the program is made for; None means what there is room for.
        return_lse: whether (o, lse) is returned.
        measure_sparsity: with a threshold, count tiles of 128 keys: o has attributes `_sparsity_total` and
            `_sparsity_skipped`, ints. Not in a graph.

    Returns:
        o as query; with `return_lse` also lse, float32 of query's shape without d.

    Raises:
        ValueError, TypeError: an argument is outside these limits; nothing has run.
        RuntimeError: a tensor requires grad where gradients are recorded.
    """
    one_token = getattr(query, "ndim", None) == 3
    cache = "[n_blocks, n_kv_heads, block_size, d]" if block_table is not None else "[batch, n_kv_heads, keys, d]"
    check.flag("k_d_major", k_d_major)
    check.operands(
        ("query", query, "[batch, n_q_heads, d]" if one_token else "[batch, s, n_q_heads, d]"),
        ("k_cache", k_cache, "[batch, n_kv_heads, d, keys]" if k_d_major else cache),
        ("v_cache", v_cache, cache),
    )
    q = query[:, None] if one_token else query
    batch, s, n_q_heads, d = q.shape
    if batch < 1 or s < 1:
        check.refuse("query shape", list(query.shape), "each at least 1")
    if block_table is not None:
        if k_d_major:
            check.refuse("k_d_major", True, "False with block_table")
        check.integers("block_table", block_table, (batch, None), "[batch, max_blocks]")
        size = v_cache.shape[2]
        if not (1 <= size <= BLOCK_MAX):
            check.refuse("block_size", size, f"1..{BLOCK_MAX}")
    rows = None if block_table is not None else batch
    check.shape("v_cache", v_cache, (rows, None, None, d))
    n, n_kv_heads, keys, _ = v_cache.shape
    check.shape("k_cache", k_cache, (n, n_kv_heads, d, keys) if k_d_major else (n, n_kv_heads, keys, d))
    if k_d_major and (keys < 1 or keys % PARTITIONS != 0):
        check.refuse("keys of k_cache", keys, f"multiples of {PARTITIONS} with k_d_major")
    check.heads(n_q_heads, n_kv_heads)
    width = s * (n_q_heads // n_kv_heads)
    if width > PARTITIONS:
        check.refuse("new tokens times query heads per KV head", width, f"1..{PARTITIONS}")
    check.integers("cache_seqlens", cache_seqlens, (batch,), "[batch]")
    left, _ = check.window(window_size)
    threshold = check.threshold("skip_softmax_threshold", skip_softmax_threshold)
    scale = check.scale("softmax_scale", softmax_scale)
    cap = soft_cap(softcap)
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            check.floats(name, x, "[n_q_heads]")
            check.shape(name, x, (n_q_heads,))
    if n_splits is not None:
        check.whole("n_splits", n_splits, 1)
        if n_splits > MOST_SPLITS:
            check.refuse("n_splits", n_splits, f"None or 1..{MOST_SPLITS}")
    if max_seqlen is not None:
        check.whole("max_seqlen", max_seqlen)
    check.flag("return_lse", return_lse)
    check.flag("measure_sparsity", measure_sparsity)
    check.no_gradient("decode_cache", query=query, k_cache=k_cache, v_cache=v_cache, sinks=sinks, slopes=alibi_slopes)
    names = "cache_seqlens,,max_seqlen"
    layout = PAGES if block_table is not None else D_MAJOR if k_d_major else BHSD
    if threshold:
        if s != 1:
            check.refuse("skip_softmax_threshold", threshold, f"None or 0 for {s} new tokens")
        for name, value in (
            ("block_table", block_table),
            ("softcap", softcap),
            ("sinks", sinks),
            ("alibi_slopes", alibi_slopes),
        ):
            given = "a tensor" if isinstance(value, Tensor) else value
            if value is not None:
                check.refuse(name, given, "None with skip_softmax_threshold")
        if n_splits not in (None, 1):
            check.refuse("n_splits", n_splits, "None or 1 with skip_softmax_threshold")
        counted = measure_sparsity
        o, logs, counts = ops.sparse_decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            None,
            "skip_softmax_decode",
            layout,
            names,
            max_seqlen,
            scale,
            threshold,
            left,
            TILE_KV,
            1,
            return_lse,
            counted,
        )
    else:
        counted = False
        o, logs = ops.dense_decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            None,
            block_table,
            layout,
            names,
            max_seqlen,
            scale,
            left,
            cap,
            None if sinks is None else sinks.float(),
            None if alibi_slopes is None else alibi_slopes.float(),
            n_splits,
            return_lse,
        )
    if one_token:
        o, logs = o[:, 0], logs[:, 0] if return_lse else logs
    if counted:
        attach_counts(o, counts)
    return (o, logs) if return_lse else o


def attach_counts(o: Tensor, counts: Tensor) -> None:
    """Tiles of a call, and those left out, as the attributes of the result that ModelOpt's `attention` has."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("measure_sparsity: received True in a graph, allowed in eager mode")
    total, skipped = counts.tolist()
    o._sparsity_total = total  # type: ignore[attr-defined]
    o._sparsity_skipped = skipped  # type: ignore[attr-defined]


def soft_cap(softcap: Any) -> float | None:
    """Cap of the scores, or None."""
    if softcap is None:
        return None
    allowed = f"None or {SCALE_MIN}..{SCALE_MAX}"
    check.number("softcap", softcap, allowed)
    if not (SCALE_MIN <= softcap <= SCALE_MAX):
        check.refuse("softcap", softcap, allowed)
    return float(softcap)
