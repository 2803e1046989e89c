"""Prefill attention, backward: dq, dk, dv from q, k, v, o, lse and the gradient of o.

Math      s[i, j] = softmax_scale * q[i, h] . k[j, h // group], p = exp(s - lse), 0 where j is not visible to query i;
          delta[i] = sum_c o[i, c] do[i, c]; ds = p * (do v^T - delta); dq = softmax_scale * ds k; dk = softmax_scale *
          ds^T q and dv = p^T do, summed over the heads of the group. p is also 0 for scores that N:M selection drops
          and in tiles that the forward skipped; neither choice is differentiated. Visibility is that of the forward:
          queries are the last rows of their sequence, j <= position if causal, position - left <= j <= position + right
          with a window. A query that sees nothing, and a key that nobody sees, has the gradient 0.
Layouts   HBM. do, q, o, dq [total_q, n_q_heads, d], k, v, dk, dv [total_kv, n_kv_heads, d], lse [total_q, n_q_heads]
          float32; sequences anywhere in them (`_prefill_bwd_plan.py`). k and v have `Plan.rows_kv` rows at least.
Limits    d 1..128, or even to 256; n_q_heads a multiple of n_kv_heads; any lengths, 0 included; do, q, k, v, o of one
          dtype: float32, bfloat16 or float16. softmax_scale 0, or 1e-30 to 1e8 in size. What sequences own must be
          finite, but for an lse of -inf; nothing else is read into a result. N:M selection and skip-softmax as the
          forward's; a sequence of one query stays dense. One core.
Engines   Per tile of 128 queries of a head and 512 keys, d = 128: tensor q k^T, do v^T, p^T do, ds^T q, the transposes
          of ds, and ds k, 512 columns each; scalar the exponentials, out of PSUM, and the transposed ds out of PSUM;
          vector ds, the sum of dq, and masks where a row does not see all keys; GpSimd p to q's dtype. The Tensor
          Engine is the bound: 1280 ns on trn2. N:M selection adds the products of ranks to the Tensor Engine, and to
          the Vector Engine, the bound then, the scores out of PSUM, comparisons and the choice. Skip-softmax gives
          each tile of 128 keys its own bias in the exponentials; what it saves is the host's choice, see Design.
Numerics  scores, p, delta and all sums float32; p rounded to q's dtype before p^T do, ds before both of its products.
          p is not rounded in ds. N:M selection compares the float32 scores that the forward compares, sums of the
          same products in the same order: it drops what the forward drops. A skipped tile has exponents of -1e32,
          so p = 0 and ds = 0 there. dk and dv are summed in float32 over all blocks and heads, in their order.
Memory    SBUF per partition: rows of a block of up to 64 tiles, those of the next one beside them, 144 KiB at most;
          beside these up to 32 KiB; with N:M selection 112 KiB, and up to 64 KiB. PSUM: all 8 banks, two each of
          scores and do v^T, dk, dv, transposed ds, ds k; with N:M selection one of do v^T, and one of ranks.
          HBM: dk and dv in float32 for two-byte types.
Oracle    reference/flash_attention_bwd.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Design    Blocks of queries outside, chunks of keys inside. dk and dv of a chunk stay in PSUM for all tiles of a block
          and are then added to what HBM holds: loaded when the chunk begins, stored when it ends, in program order for
          every row. That this order holds on a device, between transfers whose addresses are known at run time only,
          is up to the compiler; no device has shown it. The other way round, dq would be what moves. Two passes, one
          for dq and one for dk and dv, would move nothing, but compute scores and do v^T twice: 8 products for 6.
          p and ds have queries on partitions, as dk and dv need them; only ds is transposed, for dq.
          With N:M selection keys stand in planes in SBUF, and so do rows of dk and dv on their way to and from HBM.
          The host knows what the forward skipped. It makes blocks smaller, so that fewer tiles are wanted by one of
          their rows, and gathers these: each tile of a chunk has an address of its own. A trip of the loop has then
          several chunks, so that the pipeline is not drained after each. Steps in loops of one trip or none, as in
          the forward, would take five such loops of 0.5 us for what the Tensor Engine does in 1.3 us.
Files     `_prefill_bwd_plan.py`: blocks and chunks; `_prefill_bwd_launch.py`: the call on the host;
          `_prefill_bwd_state.py`: tiles; `_prefill_bwd_loads.py`: loads, sums and results; `_prefill_bwd_steps.py`:
          steps; `_prefill_select.py`: N:M selection; of the forward, `_prefill_plan.py` and `_prefill_state.py`: sizes,
          `_prefill_units.py`: what a step is; here: the loops and the call from NumPy.

Run `python contributed/flash_attention_bwd.py` to check the kernel against the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from contributed import _prefill_checks as checks
from contributed._checks import FLOATS, PARTITIONS, require, require_array, require_same_dtype
from contributed._nki import nisa, nki, nl, simulate_kernel
from contributed._prefill_bwd_launch import backward_launch
from contributed._prefill_bwd_loads import (
    all_deltas,
    fetch_block,
    fetch_chunk,
    fetch_penalties,
    finish_block,
    take_block,
    take_rows,
    transpose_chunk,
    transpose_rows,
)
from contributed._prefill_bwd_state import State
from contributed._prefill_bwd_steps import attend_chunks, parts_in_work, steps_of_chunks, take_trips
from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Span
from contributed._prefill_select import Selection
from contributed._prefill_state import RECORD_COLUMNS, Sizes

FIRST_END = 5  # column of bounds


@nki.jit
def prefill_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    blocks,
    bounds,
    chunks,
    penalties,
    heads,
    kv_tiles,
    overhang,
    left_tiles,
    left_offset,
    edge_tiles,
    per_trip,
    masked,
    plain,
    guarded,
    ragged,
    softmax_scale,
    sparsity_n,
    sparsity_m,
    sink,
    recent,
):
    """Gradients by the plan in `blocks`, `bounds`, `chunks` and `penalties` (`_prefill_bwd_plan.make_plan`).

    Args:
        do: [total_q, n_q_heads, d] in HBM.
        q: as do.
        k: [total_kv, n_kv_heads, d] in HBM.
        v: as k.
        o: as do.
        lse: [total_q, n_q_heads] float32 in HBM.
        blocks: int32 [n_blocks + 2, 128, 3, q_tiles]; with `sparsity_m` 5 in place of 3.
        bounds: int32 [n_blocks, 5 + trip sizes].
        chunks: int32 [n_chunks + 2, 128, 3 + kv_tiles], or [n_chunks + 2, 128, 3 + 2 * kv_tiles] of gathered tiles.
        penalties: float32 [n_chunks + 1, tiles of a block * kv_tiles]; None skips nothing.
        heads: query heads of a block; this and the next ten as in the plan.
        kv_tiles: tiles of 128 keys of a chunk.
        overhang: tiles that a row tile sees from that of its own number on, on the diagonal, 0 without one.
        left_tiles: tiles before its own that a row tile sees, None if the left edge of a window is no part of the
            program; this and the next two as in `_prefill_state.Sizes`.
        left_offset: keys of the first of these that a row tile's first row does not see, at most.
        edge_tiles: tiles of keys of the chunks on the left edge.
        per_trip: chunks of the loop in its largest trips, a power of two; smaller ones take half as many, to one.
        masked: whether a chunk of the loop has keys that a row does not see.
        plain: whether a tile of rows sees all of the diagonal's key tiles before its own number.
        guarded: whether a chunk has rows beyond its sequence.
        ragged: whether a block has fewer rows than others.
        softmax_scale: multiplies q . k.
        sparsity_n: scores that stay of `sparsity_m`.
        sparsity_m: 4 or 8; 0 for no selection.
        sink: keys at the beginning that always stay.
        recent: keys up to a row's position that always stay.

    Returns:
        dq as q, dk and dv as k.
    """
    d = q.shape[2]
    dq_hbm = nl.ndarray(q.shape, dtype=q.dtype, buffer=nl.shared_hbm)
    dk_hbm = nl.ndarray(k.shape, dtype=k.dtype, buffer=nl.shared_hbm)
    dv_hbm = nl.ndarray(k.shape, dtype=k.dtype, buffer=nl.shared_hbm)
    dk_sum, dv_sum = dk_hbm, dv_hbm
    if q.dtype != nl.float32:
        dk_sum = nl.ndarray(k.shape, dtype=nl.float32, buffer=nl.hbm)
        dv_sum = nl.ndarray(k.shape, dtype=nl.float32, buffer=nl.hbm)
    skips = penalties != None
    q_tiles = blocks.shape[3]
    sizes = Sizes(
        d,
        heads,
        q_tiles,
        kv_tiles,
        overhang,
        masked,
        plain,
        guarded,
        ragged,
        sparsity_m,
        recent,
        skips,
        left_tiles,
        left_offset,
        edge_tiles,
        None,
        0,
        q_tiles,
    )
    gathers = chunks.shape[2] > RECORD_COLUMNS + kv_tiles
    n_edge, n_diagonal = sizes.n_edge, sizes.n_diagonal
    streams = [steps_of_chunks(sizes, 0 - n_edge, n_edge), steps_of_chunks(sizes, None, per_trip)]
    streams.append(steps_of_chunks(sizes, 0, n_diagonal))
    w = State(sizes, parts_in_work(streams), gathers, do, q, k, v, o, lse, dq_hbm, dk_sum, dv_sum, softmax_scale)
    if sparsity_m > 0:
        w.selection = Selection(sparsity_n, sparsity_m, sink, recent, sizes, None)
    nisa.dma_copy(dst=w.coming, src=chunks[0])
    nisa.dma_copy(dst=w.block_coming, src=blocks[0])
    w.prepare()
    if w.selection != None:
        w.selection.prepare()
    fetch_chunk(w, chunks[1])
    fetch_penalties(w, penalties[0:1] if skips else None)
    whole = None
    if ragged:
        whole = nisa.register_alloc()
        nisa.register_load(whole, bounds[0, 1:2])
    fetch_block(w, blocks[1], whole)
    clear([w.dk_sum, w.dv_sum])
    transpose_chunk(w)
    transpose_rows(w, 0, 1)
    take_rows(w, slice(0, sizes.n_tiles))
    all_deltas(w)
    take_block(w)

    def block(b):
        whole, whole_next = None, None
        if ragged:
            whole, whole_next = nisa.register_alloc(), nisa.register_alloc()
            nisa.register_load(whole, bounds.select(0, b)[1:2])
            nisa.register_load(whole_next, bounds.select(0, b)[2:3])
        fetch_block(w, blocks[2:].select(0, b), whole_next)

        def edge(j):
            attend_chunks(w, chunks[2:], penalties, j, 0 - n_edge, n_edge)

        if n_edge > 0:
            first_of_edge, end_of_edge = nisa.register_alloc(), nisa.register_alloc()
            nisa.register_load(first_of_edge, bounds.select(0, b)[3:4])
            nisa.register_load(end_of_edge, bounds.select(0, b)[4:5])
            nl.fori_loop(first_of_edge, end_of_edge, edge)
        end = nisa.register_alloc()
        nisa.register_load(end, bounds.select(0, b)[0:1])
        size = per_trip
        for i in range(bounds.shape[1] - FIRST_END):
            first, end = end, nisa.register_alloc()
            nisa.register_load(end, bounds.select(0, b)[FIRST_END + i : FIRST_END + i + 1])
            take_trips(w, chunks[2:], penalties, first, end, size)
            size = size // 2
        if n_diagonal > 0:
            attend_chunks(w, chunks[2:], penalties, end, 0, n_diagonal)
        finish_block(w, whole)

    nl.fori_loop(0, bounds.shape[0], block)
    if q.dtype != nl.float32:
        nisa.dma_copy(dst=dk_hbm, src=dk_sum)
        nisa.dma_copy(dst=dv_hbm, src=dv_sum)
    return dq_hbm, dk_hbm, dv_hbm


def clear(sums):
    """Zeros in rows [n, d] of HBM, each of `sums`."""
    pmax = nl.tile_size.pmax
    n, d = sums[0].shape
    zeros = nl.ndarray((pmax, 1, d), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=zeros, value=0.0)
    per_partition = n // pmax
    whole = per_partition * pmax
    for rows in sums:
        if per_partition > 0:
            dst = rows[0:whole, :].reshape((pmax, per_partition, d))
            nisa.dma_copy(dst=dst, src=zeros.broadcast(1, per_partition))
        if n > whole:
            nisa.dma_copy(dst=rows[whole:n, :], src=zeros[0 : n - whole, 0, :])


def flash_attention_bwd(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    sparsity_n: int | None = 0,
    sparsity_m: int = 4,
    dense_sink_tokens: int = 0,
    dense_recent_tokens: int = 64,
    skip_softmax_threshold: float | None = None,
    kept: Any = None,
    target: str | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of prefill attention in math layout, on the CPU.

    Args:
        do: gradient of o, of q's shape and dtype.
        q: [batch, seqlen_q, n_q_heads, d], or packed [total_q, n_q_heads, d] with both `cu_seqlens`.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total_kv, n_kv_heads, d].
        v: as k.
        o: of the forward, as q.
        lse: of the forward, float32 of q's shape without d.
        cu_seqlens_q: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1] of q.
        cu_seqlens_kv: int [batch + 1], likewise of k and v.
        causal: whether a query sees no later keys.
        window_size: (left, right), keys visible around a query's position; None is unlimited.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        sparsity_n: scores that stay of every `sparsity_m`; None, 0 and `sparsity_m` keep all. A sequence of one query
            stays dense.
        sparsity_m: 4 or 8.
        dense_sink_tokens: first keys that always stay.
        dense_recent_tokens: keys up to a query's own that always stay.
        skip_softmax_threshold: of the forward, in (0, 1]; None or 0 skips nothing. It is not tested against here.
        kept: with a threshold, the forward's decisions, `PrefillStats.kept`: for each sequence bool
            [n_q_heads, tiles of queries, tiles of keys], each of 128; what is there for tiles that nobody sees has no
            effect. None without.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.

    Returns:
        dq, dk and dv, of the shapes and dtype of q, k and v; 0 in rows that no sequence owns.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run.
    """
    x = checks.operands(q, k, v, cu_seqlens_q, cu_seqlens_kv)
    for name, rows in (("do", do), ("o", o)):
        require_array(name, rows, ndim=q.ndim, layout=str(list(q.shape)))
        require(
            rows.shape == q.shape, f"{name} shape", received=list(rows.shape), allowed=f"{list(q.shape)}, that of q"
        )
    require_same_dtype(q=q, do=do, o=o)
    require_array("lse", lse, ndim=q.ndim - 1, layout=str(list(q.shape[:-1])))
    require(lse.shape == q.shape[:-1], "lse shape", received=list(lse.shape), allowed=list(q.shape[:-1]))
    if lse.dtype != FLOATS["float32"]:
        raise TypeError(f"lse dtype: received {lse.dtype}, allowed float32")
    window = checks.window(causal, window_size)
    scale = checks.scale(softmax_scale, q.shape[-1])
    sparsity = checks.sparsity(sparsity_n, sparsity_m, dense_sink_tokens, dense_recent_tokens)
    _check_kept(kept, checks.threshold(skip_softmax_threshold), x.spans, q.shape[-2])

    if len(x.q) == 0:
        return np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dq = np.zeros_like(q).reshape(-1, *q.shape[-2:])
    made = backward_launch(
        prefill_bwd,
        x.spans,
        window,
        n_q_heads=x.q.shape[1],
        n_kv_heads=x.k.shape[1],
        d=x.q.shape[2],
        itemsize=q.dtype.itemsize,
        scale=scale,
        sparsity=sparsity,
        kept=kept,
    )
    padding = ((0, max(0, made.plan.rows_kv - len(x.k))), (0, 0), (0, 0))
    do3, o3, lse2 = (np.ascontiguousarray(y.reshape(-1, *y.shape[q.ndim - 2 :])[x.rows]) for y in (do, o, lse))
    arguments = made.arguments(do3, x.q, np.pad(x.k, padding), np.pad(x.v, padding), o3, lse2)
    of_rows, dk, dv = simulate_kernel(made.kernel, *arguments, target=target)
    dq[x.rows] = of_rows
    return dq.reshape(q.shape), dk[: len(x.k)].reshape(k.shape), dv[: len(x.k)].reshape(v.shape)


def _check_kept(kept: Any, threshold: float | None, spans: Sequence[Span], n_q_heads: int) -> None:
    """Refuse decisions about tiles that do not fit the call, or that are there without a threshold, or are not."""
    if threshold is None:
        require(kept is None, "kept", received=type(kept).__name__, allowed="None without skip_softmax_threshold")
        return
    allowed = f"a list of {len(spans)} bool arrays, PrefillStats.kept of the forward, with skip_softmax_threshold"
    is_list = isinstance(kept, (list, tuple))
    received = f"{len(kept)} arrays" if is_list else type(kept).__name__
    require(is_list and len(kept) == len(spans), "kept", received=received, allowed=allowed)
    for b, (tiles, span) in enumerate(zip(kept, spans, strict=True)):
        shape = (n_q_heads, -(-span.len_q // PARTITIONS), -(-span.len_kv // PARTITIONS))
        is_array = isinstance(tiles, np.ndarray)
        received = f"{tiles.dtype} {list(tiles.shape)}" if is_array else type(tiles).__name__
        good = is_array and tiles.dtype == np.bool_ and tiles.shape == shape
        require(good, f"kept[{b}]", received=received, allowed=f"bool {list(shape)}")


CASES = (
    PrefillCase("one-token", 1, 1, 64, ((1, 1),)),
    PrefillCase("tile-edges", 2, 1, 80, ((127, 127), (128, 128), (129, 129), (1, 257)), unused=5, seed=7),
    PrefillCase("no-keys", 2, 1, 64, ((3, 0), (0, 5), (200, 60), (0, 0)), unused=1, seed=4),
    PrefillCase("llama-3-8b", 8, 2, 128, ((129, 129),), batched=True, seed=6),
    PrefillCase("prefix-cache", 2, 1, 128, ((140, 600), (30, 200)), unused=9),
    PrefillCase("bidirectional", 2, 2, 64, ((70, 70), (130, 513)), causal=False, seed=3),
    PrefillCase("mistral-window", 1, 1, 128, ((400, 400),), left=129, unused=3, seed=6),
    PrefillCase("window-both-sides", 2, 1, 96, ((300, 300), (130, 90)), causal=False, left=70, right=33),
    PrefillCase("gemma-2-9b", 2, 1, 256, ((140, 270),), unused=2),
    PrefillCase("short-chunks", 1, 1, 256, ((385, 386),)),
    PrefillCase("phi-3-mini", 2, 2, 96, ((130, 130), (70, 70))),
    PrefillCase("many-heads", 34, 1, 256, ((2, 30),)),
    PrefillCase("longer-ones-before", 1, 1, 16, ((520, 520), (400, 400)), seed=2),
    PrefillCase("odd-d", 2, 1, 65, ((33, 200), (70, 70)), unused=1),
    PrefillCase("negative-scale", 2, 1, 64, ((140, 140),), softmax_scale=-0.3),
    PrefillCase("scale-0", 2, 1, 64, ((140, 140),), softmax_scale=0.0),
    PrefillCase(
        "2-of-4", 2, 1, 64, ((130, 130), (33, 160), (1, 70)), sparsity_n=2, sink=5, recent=64, unused=3, grid=True
    ),
    PrefillCase("1-of-4-long", 1, 1, 128, ((128, 1152),), sparsity_n=1, recent=64, grid=True),
    PrefillCase("recent-600", 1, 1, 16, ((128, 1152),), sparsity_n=1, recent=600, grid=True),
    PrefillCase("3-of-4-window", 1, 1, 64, ((150, 700),), left=300, sparsity_n=3, recent=10, grid=True),
    PrefillCase("2-of-4-encoder", 1, 1, 64, ((150, 512),), causal=False, sparsity_n=2, recent=64, grid=True),
    PrefillCase("one-query-beside", 2, 1, 64, ((1, 600), (70, 150)), sparsity_n=2, recent=0, grid=True),
    PrefillCase("4-of-8", 1, 1, 16, ((130, 700),), sparsity_n=4, sparsity_m=8, sink=130, recent=70, grid=True),
    PrefillCase("7-of-8-d-256", 1, 1, 256, ((64, 300),), sparsity_n=7, sparsity_m=8, recent=3, grid=True),
    PrefillCase("2-of-8-both-sides", 2, 1, 64, ((100, 600),), False, 70, 33, 2, 8, recent=20, grid=True),
    PrefillCase("skip", 2, 1, 64, ((200, 200), (40, 700)), threshold=0.5, locality=3.0, seed=5),
    PrefillCase("skip-window", 2, 1, 128, ((300, 900),), left=300, threshold=0.9, locality=6.0, unused=2),
    PrefillCase("skip-encoder", 2, 1, 64, ((200, 900),), causal=False, threshold=0.9, locality=6.0, seed=5),
    PrefillCase(
        "skip-2-of-4", 2, 1, 64, ((130, 700),), sparsity_n=2, recent=20, threshold=0.5, grid=True, locality=3.0
    ),
)


@cache  # for every target again
def inputs(case: PrefillCase, dtype: Any, decide: Any, forward: Any) -> tuple[Any, ...]:
    """do, q, k, v, o, lse and keyword arguments of a case; NaN in rows that no sequence owns.

    o and lse are those of `forward`, `reference.rounded_attention.flash_attention_rounded`: in the machine's precision,
    as a kernel's would be, and with errors that the budget is made with. Decisions about tiles are those of `decide`,
    `reference.flash_attention.flash_attention`.
    """
    q, k, v, options = case.inputs(dtype)
    if case.threshold is not None:
        options["kept"] = decide(q, k, v, **options).stats.kept
    of_o, of_lse = (x[0] for x in forward(q, k, v, **options))
    unowned = np.isnan(q.astype(np.float32))
    upstream = np.random.default_rng(case.seed + 1).standard_normal(q.shape)
    do, o = (np.where(unowned, np.nan, x).astype(dtype) for x in (upstream, of_o))
    return do, q, k, v, o, np.where(unowned[..., 0], np.float32(np.nan), of_lse), options


def main() -> int:
    """Check dq, dk and dv of every case against the oracle; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference.flash_attention import flash_attention
    from reference.flash_attention_bwd import flash_attention_bwd as oracle
    from reference.rounded_attention import flash_attention_bwd_rounded, flash_attention_rounded

    def results(case: PrefillCase, dtype: str, target: str | None) -> Any:
        do, q, k, v, o, lse, options = inputs(case, FLOATS[dtype], flash_attention, flash_attention_rounded)
        return (joined(flash_attention_bwd(do, q, k, v, o, lse, target=target, **options)),)

    def references(case: PrefillCase, dtype: str) -> Any:
        do, q, k, v, _, _, options = inputs(case, FLOATS[dtype], flash_attention, flash_attention_rounded)
        low = flash_attention_bwd_rounded(do, q, k, v, **options)
        return ((joined(oracle(do, q, k, v, **options)), joined(low, 1)),)

    return budget_check(__doc__ or "", results, references, CASES, names=("dq, dk, dv",))


def joined(gradients: Any, leading: int = 0) -> Any:
    """Rows of d of all gradients, one after the other, behind so many leading axes."""
    return np.concatenate([x.reshape(*x.shape[:leading], -1, x.shape[-1]) for x in gradients], axis=leading)


if __name__ == "__main__":
    raise SystemExit(main())
