"""KV caches that are written and read: append in place, and FlashAttention's function that does both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contributed.flash_decode import MOST_SPLITS
from contributed.paged_decode import BLOCK_MAX
from nki_torch import _check as check
from nki_torch import _ops as ops
from nki_torch._decode_impl import BHSD, BSHD, D_MAJOR, PAGES, PAGES_BSHD
from nki_torch.decode import Result, soft_cap


def append_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    k_d_major: bool = False,
    block_table: Tensor | None = None,
) -> None:
    """Write new tokens into a cache in the kernels' own layout, in place.

    Args:
        k_cache: [batch, n_kv_heads, keys, d]; with `k_d_major` [batch, n_kv_heads, d, keys]; with `block_table` pages
            [n_blocks, n_kv_heads, block_size, d]. float32, bfloat16 or float16.
        v_cache: [batch, n_kv_heads, keys, d], or pages.
        k: [batch, s, n_kv_heads, d], of k_cache's type.
        v: as k.
        positions: int32 or int64 [batch], row of each sequence's first new token; -1: it gets none.
        k_d_major: whether K has d before the keys.
        block_table: int32 or int64 [batch, max_blocks]: page of each block of keys, -1 for none.

    Raises:
        ValueError, TypeError: an argument is outside these limits, or two tokens go to one row; nothing is written.
        RuntimeError: a tensor requires grad where gradients are recorded.
    """
    check.flag("k_d_major", k_d_major)
    cache = "[n_blocks, n_kv_heads, block_size, d]" if block_table is not None else "[batch, n_kv_heads, keys, d]"
    new = "[batch, s, n_kv_heads, d]"
    caches = (("k_cache", k_cache, "[batch, n_kv_heads, d, keys]" if k_d_major else cache), ("v_cache", v_cache, cache))
    check.operands(("k", k, new), ("v", v, new), *caches)
    batch, _, n_kv_heads, d = k.shape
    check.shape("v", v, tuple(k.shape), "that of k")
    check.integers("positions", positions, (batch,), "[batch]")
    check.shape("v_cache", v_cache, (batch if block_table is None else None, n_kv_heads, None, d))
    n, _, keys, _ = v_cache.shape
    check.shape("k_cache", k_cache, (n, n_kv_heads, d, keys) if k_d_major else (n, n_kv_heads, keys, d))
    if block_table is not None:
        if k_d_major:
            check.refuse("k_d_major", True, "False with block_table")
        check.integers("block_table", block_table, (batch, None), "[batch, max_blocks]")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.written(name, x)
    check.no_gradient("append_cache", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    layout = PAGES if block_table is not None else D_MAJOR if k_d_major else BHSD
    ops.append(k_cache, v_cache, k, v, positions, block_table, layout, "positions", True)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of new tokens over a cache, which gets their keys and values first; FlashAttention's function.

    Args:
        q: [batch, seqlen_q, n_q_heads, d], float32, bfloat16 or float16: the last tokens of their sequences.
        k_cache: [batch, seqlen_cache, n_kv_heads, d], or with `block_table` pages [n_blocks, page_size, n_kv_heads, d].
            With `k` it is changed in place.
        v_cache: as k_cache.
        k: [batch, seqlen_new, n_kv_heads, d], written from row `cache_seqlens` on; or None.
        v: as k.
        rotary_cos: None; rotary embeddings are not supported.
        rotary_sin: None.
        cache_seqlens: keys of each sequence before the new ones, an int or int32 or int64 [batch]; None: all rows of
            the cache, and no new ones.
        cache_batch_idx: None; not supported.
        cache_leftpad: None; not supported.
        block_table: int32 or int64 [batch, max_blocks]: page of each block of keys, -1 for none.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        causal: whether a query sees no keys after its own position.
        window_size: (left, right), keys visible around a query's own position; -1 is unlimited.
        softcap: cap of the scores, 0 for none; like `alibi_slopes` and `num_splits` for at most 128 rows (seqlen_q
            times query heads per KV head) that are causal, or of one query.
        rotary_interleaved: of rotary embeddings, which are not supported.
        alibi_slopes: float32 [n_q_heads], or None.
        num_splits: KV splits, 0 to choose.
        return_softmax_lse: whether (o, lse) is returned.

    Returns:
        o as q; with `return_softmax_lse` also lse, float32 [batch, n_q_heads, seqlen_q].

    Raises:
        ValueError, TypeError: an argument is outside these limits; nothing has run, and no cache has changed, but
            where a key of before has no page.
        NotImplementedError: an option that no kernel has.
        RuntimeError: a tensor requires grad where gradients are recorded.
    """
    function = "flash_attn_with_kvcache"
    for name, x in (
        ("rotary_cos", rotary_cos),
        ("rotary_sin", rotary_sin),
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
    ):
        if x is not None:
            check.unsupported(function, name, "a tensor", "None")
    paged = block_table is not None
    of_cache = "[n_blocks, page_size, n_kv_heads, d]" if paged else "[batch, seqlen_cache, n_kv_heads, d]"
    new = "[batch, seqlen_new, n_kv_heads, d]"
    operands: list[tuple[str, Any, str]] = [("k_cache", k_cache, of_cache), ("v_cache", v_cache, of_cache)]
    if k is not None or v is not None:
        operands += [("k", k, new), ("v", v, new)]
    check.operands(("q", q, "[batch, seqlen_q, n_q_heads, d]"), *operands)
    batch, seqlen_q, n_q_heads, d = q.shape
    if batch < 1 or seqlen_q < 1:
        check.refuse("q shape", list(q.shape), "batch and seqlen_q at least 1")
    check.shape("k_cache", k_cache, (None if paged else batch, None, None, d))
    check.shape("v_cache", v_cache, tuple(k_cache.shape), "that of k_cache")
    size, n_kv_heads = k_cache.shape[1:3]
    check.heads(n_q_heads, n_kv_heads)
    room = size
    if block_table is not None:
        check.integers("block_table", block_table, (batch, None), "[batch, max_blocks]")
        if not (1 <= size <= BLOCK_MAX):
            check.refuse("page_size", size, f"1..{BLOCK_MAX}")
        room = size * block_table.shape[1]
    check.flag("causal", causal)
    check.flag("rotary_interleaved", rotary_interleaved)
    check.flag("return_softmax_lse", return_softmax_lse)
    scale = check.scale("softmax_scale", softmax_scale)
    left, right = check.window(window_size, unlimited=-1)
    cap = soft_cap(None if softcap == 0 and not isinstance(softcap, bool) else softcap)
    _check_slopes(alibi_slopes, n_q_heads)
    check.whole("num_splits", num_splits)
    if num_splits > MOST_SPLITS:
        check.refuse("num_splits", num_splits, f"0..{MOST_SPLITS}")
    check.no_gradient(function, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, alibi_slopes=alibi_slopes)
    lengths = _lengths(cache_seqlens, batch, room)
    # Of one query, or with nothing to its right, there are no later keys to see.
    ordered = causal or right == 0 or seqlen_q == 1
    decodes = ordered and seqlen_q * (n_q_heads // n_kv_heads) <= check.MOST_ROWS
    if not decodes:
        allowed = "for more than 128 rows, or rows that see later keys"
        if cap is not None:
            check.unsupported(function, "softcap", cap, f"0 {allowed}")
        if alibi_slopes is not None:
            check.unsupported(function, "alibi_slopes", "a tensor", f"None {allowed}")
        if num_splits > 1:
            check.unsupported(function, "num_splits", num_splits, f"0 or 1 {allowed}")
    if k is not None and v is not None:
        if cache_seqlens is None:
            check.refuse("cache_seqlens", None, "an int or a tensor with k and v")
        check.shape("k", k, (batch, None, n_kv_heads, d))
        check.shape("v", v, tuple(k.shape), "that of k")
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
            check.written(name, x)
        layout = PAGES_BSHD if paged else BSHD
        ops.append(k_cache, v_cache, k, v, lengths, block_table, layout, "cache_seqlens", False)
        lengths = lengths + k.shape[1]
    names = "cache_seqlens,,"
    if decodes:
        o, lse = ops.dense_decode(
            q,
            k_cache,
            v_cache,
            lengths,
            None,
            block_table,
            PAGES_BSHD if paged else BSHD,
            names,
            None,
            scale,
            left,
            cap,
            None,
            None if alibi_slopes is None else alibi_slopes.float(),
            num_splits or None,
            return_softmax_lse,
        )
    else:
        o, lse = _prefill(
            q, k_cache, v_cache, lengths, block_table, room, scale, left, 0 if ordered else right, return_softmax_lse
        )
    return (o, lse.transpose(1, 2)) if return_softmax_lse else o


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    room: int,
    scale: float | None,
    left: int | None,
    right: int | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """More rows than decode takes: o as q and lse [batch, seqlen_q, n_q_heads]."""
    batch, seqlen_q, n_q_heads, d = q.shape
    starts = torch.arange(0, batch, dtype=torch.int64)
    flat = block_table is None
    o, lse, _, _ = ops.prefill(
        q.flatten(0, 1),
        k_cache.flatten(0, 1) if flat else k_cache,
        v_cache.flatten(0, 1) if flat else v_cache,
        starts * seqlen_q,
        torch.full((batch,), seqlen_q, dtype=torch.int64),
        seqlen_q,
        starts * room if flat else None,
        lengths,
        room,
        block_table,
        ",,,cache_seqlens,block_table",
        float(d) ** -0.5 if scale is None else scale,
        left,
        right,
        0,
        4,
        0,
        0,
        None,
        with_lse,
    )
    return o.reshape(q.shape), lse.reshape(batch, seqlen_q, n_q_heads) if with_lse else lse


def _check_slopes(slopes: Any, n_q_heads: int) -> None:
    if slopes is None:
        return
    if isinstance(slopes, Tensor) and slopes.ndim == 2:
        check.unsupported("flash_attn_with_kvcache", "alibi_slopes", "slopes of each sequence", "[n_q_heads]")
    check.floats("alibi_slopes", slopes, "[n_q_heads]")
    check.shape("alibi_slopes", slopes, (n_q_heads,))


def _lengths(cache_seqlens: Any, batch: int, room: int) -> Tensor:
    """Keys in the cache, [batch]."""
    if isinstance(cache_seqlens, Tensor):
        check.integers("cache_seqlens", cache_seqlens, (batch,), "[batch]")
        return cache_seqlens
    if cache_seqlens is not None:
        check.whole("cache_seqlens", cache_seqlens)
        if cache_seqlens > room:
            check.refuse("cache_seqlens", cache_seqlens, f"0..{room}")
    return torch.full((batch,), room if cache_seqlens is None else cache_seqlens, dtype=torch.int64)
