"""The operators `torch.ops.nki_torch.*`: what each returns for real tensors and for fake ones, and its gradient.

Shapes of results follow from shapes and constants alone, so that graphs are traced without running anything. Lengths,
offsets and tables are tensors, whose values are read on the host when an operator runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contributed._checks import PARTITIONS
from contributed._decode_launch import Options
from nki_torch import _append_impl as append_impl
from nki_torch import _decode_impl as impl
from nki_torch import _prefill_impl as prefill_impl


@torch.library.custom_op("nki_torch::dense_decode", mutates_args=())
def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    layout: str,
    names: str,
    max_seqlen: int | None,
    softmax_scale: float | None,
    left: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    n_splits: int | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Decode attention of [batch, s, n_q_heads, d] queries.

    Args:
        q: [batch, s, n_q_heads, d], s new tokens per sequence, the last of its keys.
        k: cache in `layout`, one of `_decode_impl`'s.
        v: as k.
        seqlens: integers [batch], keys in use.
        cu_seqlens: integers [batch + 1] of a packed cache.
        block_table: integers [batch, max_blocks] of pages.
        layout: of the cache.
        names: what the caller calls seqlens, cu_seqlens and max_seqlen, with commas; for messages.
        max_seqlen: bound of all lengths.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        left: keys visible to the left.
        softcap: cap of the scores.
        sinks: float32 [n_q_heads].
        alibi_slopes: float32 [n_q_heads].
        n_splits: KV splits, None to choose.
        with_lse: whether lse is wanted.

    Returns:
        o as q, and lse float32 [batch, s, n_q_heads], or [0] if it is not wanted.
    """
    of_caller = _three(names)
    keys = impl.keys_of(q, k, v, layout, of_caller, seqlens, cu_seqlens, block_table, max_seqlen, left)
    options = Options(
        softmax_scale=softmax_scale,
        left=left,
        softcap=softcap,
        sinks=impl.per_head("sinks", sinks),
        slopes=impl.per_head("alibi_slopes", alibi_slopes),
    )
    return impl.dense(q.contiguous(), keys, options, n_splits, with_lse)


@dense_decode.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse(q, args[-1])


@torch.library.custom_op("nki_torch::sparse_decode", mutates_args=())
def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: str,
    layout: str,
    names: str,
    max_seqlen: int | None,
    softmax_scale: float | None,
    threshold: float | None,
    left: int | None,
    tile_kv: int,
    n_splits: int,
    with_lse: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode attention that leaves out tiles of keys; one new token per sequence, a flat or packed cache.

    Args:
        q: [batch, 1, n_q_heads, d].
        k: as in `dense_decode`, like all arguments that are not described.
        v: as k.
        seqlens: integers [batch].
        cu_seqlens: integers [batch + 1].
        rule: "sparse_decode" or "skip_softmax_decode".
        layout: of the cache, not pages.
        names: of arguments.
        max_seqlen: bound of all lengths.
        softmax_scale: multiplies q . k.
        threshold: above 0, to 1; None means `default_threshold`.
        left: keys visible to the left.
        tile_kv: keys of a tile.
        n_splits: KV splits.
        with_lse: whether lse is wanted.
        with_stats: whether counts are.

    Returns:
        o, lse or [0], and int64 (tiles of all query heads, those left out) or [0].
    """
    keys = impl.keys_of(q, k, v, layout, _three(names), seqlens, cu_seqlens, None, max_seqlen, left)
    how = {
        "softmax_scale": softmax_scale,
        "left": left,
        "tile_kv": tile_kv,
        "n_splits": n_splits,
        "with_stats": with_stats,
    }
    limit = impl.default_threshold(keys, max_seqlen) if threshold is None else threshold
    return impl.sparse(q.contiguous(), keys, limit, how, with_lse=with_lse, rule=rule)


@sparse_decode.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_lse, with_stats = args
    return q.new_empty(q.shape), _lse(q, with_lse), q.new_empty(2 if with_stats else 0, dtype=torch.int64)


@torch.library.custom_op("nki_torch::gated_decode", mutates_args=())
def gated_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    delta: Tensor,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
    names: str,
    max_seqlen: int | None,
    softmax_scale: float | None,
    softmax_threshold: float | None,
    gate_threshold: float | None,
    is_logsigmoid_gate: bool,
    left: int | None,
    tile_kv: int,
    n_splits: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`sparse_decode` by its rule of scores, with gates added to them and tiles closed by gates alone.

    Args:
        q: [batch, 1, n_q_heads, d].
        k: as in `sparse_decode`, like all arguments that are not described.
        v: as k.
        alpha: [batch, n_q_heads].
        delta: [batch, n_kv_heads, keys], or [n_kv_heads, total] of a packed cache.
        seqlens: integers [batch].
        cu_seqlens: integers [batch + 1].
        layout: "bshd" or "packed".
        names: of arguments.
        max_seqlen: bound of all lengths.
        softmax_scale: multiplies scores and gates.
        softmax_threshold: 0 turns the test of scores off; None means `default_threshold`.
        gate_threshold: 0 turns the test of gates off; None means `default_threshold`.
        is_logsigmoid_gate: whether the gate is the logsigmoid of alpha * delta (the public kernel's polynomial).
        left: keys visible to the left.
        tile_kv: keys of a tile.
        n_splits: KV splits.
        with_lse: whether lse is wanted.

    Returns:
        o, and lse or [0].
    """
    keys = impl.keys_of(q, k, v, layout, _three(names), seqlens, cu_seqlens, None, max_seqlen, left)
    how = {
        "softmax_scale": softmax_scale,
        "left": left,
        "tile_kv": tile_kv,
        "n_splits": n_splits,
        "with_stats": False,
    }
    default = impl.default_threshold(keys, max_seqlen)
    limit = default if softmax_threshold is None else softmax_threshold
    gate_limit = default if gate_threshold is None else gate_threshold
    q4 = q.contiguous()
    o, lse, _ = impl.gated(q4, keys, alpha, delta, limit, gate_limit, is_logsigmoid_gate, how, with_lse=with_lse)
    return o, lse


@gated_decode.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse(q, args[-1])


def _lse(q: Tensor, with_lse: bool) -> Tensor:
    """A fake lse."""
    return q.new_empty(q.shape[:-1] if with_lse else (0,), dtype=torch.float32)


def _three(names: str) -> tuple[str, str, str]:
    seqlens, cu_seqlens, max_seqlen = names.split(",")
    return seqlens, cu_seqlens, max_seqlen


@torch.library.custom_op("nki_torch::append", mutates_args=("k_cache", "v_cache"))
def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    layout: str,
    names: str,
    inactive: bool,
) -> None:
    """New tokens written into caches, in place.

    Args:
        k_cache: cache in `layout`, one of `_decode_impl`'s but not packed.
        v_cache: as k_cache.
        k: [batch, s, n_kv_heads, d].
        v: as k.
        positions: integers [batch], row of each sequence's first new token.
        block_table: integers [batch, max_blocks] of pages.
        layout: of the cache.
        names: what the caller calls positions.
        inactive: whether -1 stands for a sequence that gets no tokens.
    """
    append_impl.append(k_cache, v_cache, k, v, positions, block_table, layout, names, inactive)


@append.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("nki_torch::prefill", mutates_args=())
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    longest_q: int,
    starts_k: Tensor | None,
    lengths_k: Tensor,
    longest_k: int,
    block_table: Tensor | None,
    names: str,
    softmax_scale: float,
    left: int | None,
    right: int | None,
    sparsity_n: int,
    sparsity_m: int,
    dense_sink_tokens: int,
    dense_recent_tokens: int,
    skip_softmax_threshold: float | None,
    with_lse: bool,
    with_stats: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of sequences in packed rows, whose queries are the last rows of their keys.

    Args:
        q: [total_q, n_q_heads, d].
        k: [total_k, n_kv_heads, d]; with `block_table` pages [n_blocks, page_size, n_kv_heads, d].
        v: as k.
        starts_q: integers [batch], first row of q of each sequence.
        lengths_q: integers [batch].
        longest_q: bound of lengths_q.
        starts_k: as starts_q, of k; None with `block_table`.
        lengths_k: integers [batch].
        longest_k: bound of lengths_k.
        block_table: integers [batch, max_blocks], or None.
        names: what the caller calls starts_q, lengths_q, starts_k, lengths_k and block_table, with commas.
        softmax_scale: multiplies q . k.
        left: keys visible to the left of a query's position, None for all.
        right: to the right; 0 is causal.
        sparsity_n: scores that stay of every `sparsity_m`, 0 for all.
        sparsity_m: 4 or 8.
        dense_sink_tokens: first keys that always stay.
        dense_recent_tokens: last keys that always stay.
        skip_softmax_threshold: above 0, to 1, or None.
        with_lse: whether lse and, with a threshold, decisions about tiles are wanted, as the backward does.
        with_stats: whether tiles are counted, with a threshold.

    Returns:
        o as q; lse float32 [total_q, n_q_heads]; bool [batch, n_q_heads, tiles of longest_q, tiles of longest_k], tiles
        of 128 that were kept; int64 (tiles, those skipped). What is not wanted is [0]. Rows that no sequence owns have
        o = 0 and lse = -inf.
    """
    of_q, len_q, of_k, len_k, table = names.split(",")
    queries = prefill_impl.queries((of_q, len_q), starts_q, lengths_q, longest_q, q)
    if block_table is not None:
        keys, pages = prefill_impl.pages((table, len_k), block_table, lengths_k, longest_k, k)
        k, v = (x.index_select(0, pages).flatten(0, 1) for x in (k, v))
    else:
        assert starts_k is not None
        keys = prefill_impl.owned((of_k, len_k), starts_k, lengths_k, longest_k, k)
    rules = prefill_impl.Rules(
        softmax_scale,
        left,
        right,
        sparsity_n,
        sparsity_m,
        dense_sink_tokens,
        dense_recent_tokens,
        skip_softmax_threshold,
    )
    shape = _tiles(q, lengths_q, longest_q, longest_k)
    return prefill_impl.forward(q, k, v, prefill_impl.Call(queries, keys), rules, shape, with_lse, with_stats)


@prefill.register_fake
def _(
    q: Tensor, _k: Tensor, _v: Tensor, _starts: Tensor, lengths_q: Tensor, longest_q: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest_k, threshold, with_lse = args[2], args[12], args[13]
    with_stats = args[14:] != (False,)  # a default is not handed on
    skips = threshold is not None
    kept_shape = _tiles(q, lengths_q, longest_q, longest_k) if skips and with_lse else (0,)
    kept = q.new_empty(kept_shape, dtype=torch.bool)
    counts = q.new_empty(2 if skips and with_stats else 0, dtype=torch.int64)
    return q.new_empty(q.shape), _lse(q, with_lse), kept, counts


@torch.library.custom_op("nki_torch::prefill_backward", mutates_args=())
def prefill_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kept: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    longest_q: int,
    starts_k: Tensor,
    lengths_k: Tensor,
    longest_k: int,
    names: str,
    softmax_scale: float,
    left: int | None,
    right: int | None,
    sparsity_n: int,
    sparsity_m: int,
    dense_sink_tokens: int,
    dense_recent_tokens: int,
    skip_softmax_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `prefill` with the forward's results; its selection is repeated, its decisions about tiles replayed.

    Args:
        do: gradient of o, as q.
        q: as in `prefill`, like all arguments that are not described.
        k: [total_k, n_kv_heads, d].
        v: as k.
        o: of the forward.
        lse: of the forward.
        kept: of the forward.
        starts_q: first rows.
        lengths_q: lengths.
        longest_q: bound.
        starts_k: first rows.
        lengths_k: lengths.
        longest_k: bound.
        names: of arguments.
        softmax_scale: multiplies q . k.
        left: of the window.
        right: of the window.
        sparsity_n: of N:M.
        sparsity_m: of N:M.
        dense_sink_tokens: of N:M.
        dense_recent_tokens: of N:M.
        skip_softmax_threshold: of the forward.

    Returns:
        dq, dk and dv as q, k and v; 0 in rows that no sequence owns.
    """
    of_q, len_q, of_k, len_k, _ = names.split(",")
    queries = prefill_impl.queries((of_q, len_q), starts_q, lengths_q, longest_q, q)
    keys = prefill_impl.owned((of_k, len_k), starts_k, lengths_k, longest_k, k)
    rules = prefill_impl.Rules(
        softmax_scale,
        left,
        right,
        sparsity_n,
        sparsity_m,
        dense_sink_tokens,
        dense_recent_tokens,
        skip_softmax_threshold,
    )
    return prefill_impl.backward(do, q, k, v, o, lse, kept, prefill_impl.Call(queries, keys), rules)


@prefill_backward.register_fake
def _(_do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, starts_q, lengths_q, longest_q, starts_k, lengths_k, longest_k, block_table, names = inputs[:11]
    *rules, with_lse, _ = inputs[11:]
    o, lse, kept, counts = output
    ctx.mark_non_differentiable(lse, kept, counts)
    if block_table is not None or not with_lse:
        ctx.options = None
        return
    ctx.save_for_backward(q, k, v, o, lse, kept, starts_q, lengths_q, starts_k, lengths_k)
    ctx.options = (longest_q, longest_k, names, rules)


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    if ctx.options is None:
        raise NotImplementedError("nki_torch::prefill: no backward over pages, or without the forward's lse")
    *of_forward, starts_q, lengths_q, starts_k, lengths_k = ctx.saved_tensors
    longest_q, longest_k, names, rules = ctx.options
    sequences = (starts_q, lengths_q, longest_q, starts_k, lengths_k, longest_k)
    gradients = prefill_backward(do.contiguous(), *of_forward, *sequences, names, *rules)
    return (*gradients, *[None] * (len(sequences) + 4 + len(rules)))


prefill.register_autograd(_backward, setup_context=_save)


def _tiles(q: Tensor, lengths_q: Tensor, longest_q: int, longest_k: int) -> tuple[int, int, int, int]:
    """Shape of the decisions about tiles."""
    return lengths_q.shape[0], q.shape[1], -(-longest_q // PARTITIONS), -(-longest_k // PARTITIONS)
