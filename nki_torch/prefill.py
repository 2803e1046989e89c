"""Attention of whole sequences on tensors, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nki_torch import _check as check
from nki_torch import _ops as ops
from nki_torch.decode import attach_counts

NAMES = "b_start_loc,b_seq_len,b_start_loc_k,b_seq_len_k,block_table"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    *,
    sparsity_n: int = 0,
    sparsity_m: int = 4,
    dense_sink_tokens: int = 0,
    dense_recent_tokens: int = 64,
    skip_softmax_threshold: float | None = None,
    measure_sparsity: bool = False,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int = 16,
) -> Tensor:
    """Attention of a ragged batch with grouped heads, N:M sparse softmax and skip-softmax; ModelOpt's `attention`.

    Queries are the last rows of their sequence's keys. Gradients flow to q, k and v: N:M and skipped tiles act on them
    as they acted on the result, tiles exactly as decided there.

    Args:
        q: [total_q, n_q_heads, d], float32, bfloat16 or float16; d 1..128, or even to 256.
        k: [total_k, n_kv_heads, d], of q's type; of a paged call only its heads and its type matter.
        v: as k.
        b_start_loc: int32 or int64 [batch], first row of q of each sequence; sequences do not overlap.
        b_seq_len: int32 or int64 [batch], rows of q of each sequence.
        max_input_len: bound of b_seq_len.
        is_causal: whether a query sees no keys after its own position.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        b_start_loc_k: [batch], first row of k and v; None means b_start_loc. Sequences may share rows.
        b_seq_len_k: [batch], rows of k and v; None means b_seq_len.
        max_input_len_k: bound of b_seq_len_k; None means what there is room for.
        sparsity_n: scores that stay of every `sparsity_m` keys; 0 keeps all. A sequence of one query stays dense.
        sparsity_m: 4 or 8.
        dense_sink_tokens: first keys that always stay.
        dense_recent_tokens: keys up to a query's own that always stay.
        skip_softmax_threshold: tiles of 128 queries x 128 keys whose largest scores are all further than the log of it
            below the largest ones so far are left out; to 1, None and 0 leave out nothing.
        measure_sparsity: with a threshold, the result has attributes `_sparsity_total` and `_sparsity_skipped`, ints:
            tiles of all heads, those past the diagonal not counted. Not in a graph.
        k_cache: pages [n_blocks, page_size, n_kv_heads, d] that are read instead of k, with `b_seq_len_k` (or
            `b_seq_len`) keys of each sequence; forward only.
        v_cache: as k_cache.
        block_table: int32 or int64 [batch, max_blocks]: page of each block of keys, -1 for none.
        page_size: rows of a page.

    Returns:
        As q; 0 in rows that no sequence owns.

    Raises:
        ValueError, TypeError: an argument is outside these limits; nothing has run.
        NotImplementedError: gradients of a paged call, or counts in a graph.
    """
    check.operands(
        ("q", q, "[total_q, n_q_heads, d]"),
        ("k", k, "[total_k, n_kv_heads, d]"),
        ("v", v, "[total_k, n_kv_heads, d]"),
    )
    _, n_q_heads, d = q.shape
    check.shape("k", k, (None, None, d))
    check.shape("v", v, tuple(k.shape), "that of k")
    check.heads(n_q_heads, k.shape[1])
    check.integers("b_start_loc", b_start_loc, (None,), "[batch]")
    batch = b_start_loc.shape[0]
    if batch < 1:
        check.refuse("b_start_loc shape", [batch], "batch at least 1")
    check.integers("b_seq_len", b_seq_len, (batch,), "[batch]")
    check.whole("max_input_len", max_input_len)
    check.flag("is_causal", is_causal)
    scale = check.scale("softmax_scale", softmax_scale)
    check.sparsity(sparsity_n, sparsity_m, dense_sink_tokens, dense_recent_tokens)
    threshold = check.threshold("skip_softmax_threshold", skip_softmax_threshold)
    check.flag("measure_sparsity", measure_sparsity)
    starts_k, names = b_start_loc_k, NAMES
    for name, x in (("b_start_loc_k", b_start_loc_k), ("b_seq_len_k", b_seq_len_k)):
        if x is not None:
            check.integers(name, x, (batch,), "[batch]")
    if starts_k is None:
        starts_k, names = b_start_loc, names.replace("b_start_loc_k", "b_start_loc")
    lengths_k = b_seq_len_k
    if lengths_k is None:
        lengths_k, names = b_seq_len, names.replace("b_seq_len_k", "b_seq_len")
    paged = _check_pages(k, k_cache, v_cache, block_table, page_size, batch, d)
    if paged:
        assert k_cache is not None
        assert v_cache is not None
        assert block_table is not None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, k_cache, v_cache)):
            check.unsupported("attention", "k_cache", "pages where a tensor requires grad", "pages under no_grad")
        k, v, starts_k, room = k_cache, v_cache, None, block_table.shape[1] * page_size
    else:
        room = k.shape[0]
    longest_k = room
    if max_input_len_k is not None:
        check.whole("max_input_len_k", max_input_len_k)
        longest_k = max_input_len_k
    elif b_seq_len_k is None:
        longest_k = max_input_len
    with_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    o: Tensor
    o, _, _, counts = ops.prefill(
        q,
        k,
        v,
        b_start_loc,
        b_seq_len,
        max_input_len,
        starts_k,
        lengths_k,
        longest_k,
        block_table,
        names,
        float(d) ** -0.5 if scale is None else scale,
        None,
        0 if is_causal else None,
        sparsity_n,
        sparsity_m,
        dense_sink_tokens,
        dense_recent_tokens,
        threshold or None,
        with_lse,
        measure_sparsity,
    )
    if measure_sparsity and threshold:
        attach_counts(o, counts)
    return o


def _check_pages(k: Tensor, k_cache: Any, v_cache: Any, table: Any, page_size: Any, batch: int, d: int) -> bool:
    """Whether the call is paged: all three arguments or none."""
    given = {"k_cache": k_cache, "v_cache": v_cache, "block_table": table}
    if all(x is None for x in given.values()):
        return False
    for name, x in given.items():
        if x is None:
            check.refuse(name, None, "a tensor where others of k_cache, v_cache, block_table are")
    check.whole("page_size", page_size, 1)
    layout = "[n_blocks, page_size, n_kv_heads, d]"
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.floats(name, x, layout)
        check.like(name, x, "q", k)
        check.shape(name, x, (k_cache.shape[0], page_size, k.shape[1], d), "with page_size and the heads of k")
    check.integers("block_table", table, (batch, None), "[batch, max_blocks]")
    return True


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Dense attention with the arguments of torch's function of this name, and gradients.

    Args:
        query: [batch, n_q_heads, seqlen_q, d], or without batch; float32, bfloat16 or float16.
        key: [batch, n_kv_heads, seqlen_k, d].
        value: as key.
        attn_mask: None; other masks are not supported.
        dropout_p: 0.
        is_causal: whether query i sees keys 0..i only. As in torch i counts from the first key, not from the last.
        scale: multiplies q . k; None means d ** -0.5.
        enable_gqa: whether n_q_heads may be a multiple of n_kv_heads.

    Returns:
        As query.

    Raises:
        ValueError, TypeError: an argument is outside these limits; nothing has run.
        NotImplementedError: a mask, or dropout.
    """
    function = "scaled_dot_product_attention"
    if attn_mask is not None:
        check.unsupported(function, "attn_mask", "a mask", "None, or is_causal")
    check.number("dropout_p", dropout_p, "0")
    if dropout_p != 0:
        check.unsupported(function, "dropout_p", dropout_p, "0")
    check.flag("is_causal", is_causal)
    check.flag("enable_gqa", enable_gqa)
    batched = getattr(query, "ndim", None) != 3
    lead = "batch, " if batched else ""
    of_keys = f"[{lead}n_kv_heads, seqlen_k, d]"
    check.operands(
        ("query", query, f"[{lead}n_q_heads, seqlen_q, d]"), ("key", key, of_keys), ("value", value, of_keys)
    )
    if not batched:
        query, key, value = query[None], key[None], value[None]
    batch, n_q_heads, seqlen_q, d = query.shape
    if batch < 1:
        check.refuse("query shape", list(query.shape), "batch at least 1")
    check.shape("key", key, (batch, None, None, d))
    check.shape("value", value, tuple(key.shape), "that of key")
    check.heads(n_q_heads, key.shape[1])
    if not enable_gqa and key.shape[1] != n_q_heads:
        check.refuse("heads of key", key.shape[1], f"{n_q_heads}, as query has, without enable_gqa")
    factor = check.scale("scale", scale)
    seqlen_k = key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if not is_causal or seqlen_q == seqlen_k:
        o = _batch(q, k, v, is_causal, factor)
    elif seqlen_q < seqlen_k:
        # Nobody sees the keys that are left out.
        o = _batch(q, k[:, :seqlen_q], v[:, :seqlen_q], True, factor)
    else:
        seen = [_batch(q[:, :seqlen_k], k, v, True, factor), _batch(q[:, seqlen_k:], k, v, False, factor)]
        o = torch.cat(seen, dim=1)
    o = o.transpose(1, 2)
    return o if batched else o[0]


def _batch(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Attention of [batch, seqlen, heads, d]."""
    batch, seqlen_q = q.shape[:2]
    starts, lengths = [], []
    for x in (q, k):
        n = x.shape[1]
        starts.append(torch.arange(0, batch, dtype=torch.int64) * n)
        lengths.append(torch.full((batch,), n, dtype=torch.int64))
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
    sequences = (starts[0], lengths[0], seqlen_q, is_causal, scale, starts[1], lengths[1], k.shape[1])
    return attention(q3, k3, v3, *sequences).reshape(q.shape)
