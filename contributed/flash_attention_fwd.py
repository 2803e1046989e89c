"""Prefill: many queries per sequence, causal or windowed, grouped heads, ragged batches, N:M and skip-softmax.

Math      p = i + len_kv - len_q for query i; s[h, j] = softmax_scale * q[i, h] . k[j, h // group] for visible keys
          max(0, p - left) <= j <= min(len_kv - 1, p + right), causal: right = 0. N:M: of every m keys the best n stay
          (m = 4: the lower of equals; m = 8: all equals), and j < sink, p - recent < j <= p. Skip-softmax: a tile of
          128 x 128 is left out if in every row max s < (max of the tiles before) + log(threshold). o = softmax(s) v,
          lse = log(sum exp(s)). Nothing visible: o = 0, lse = -inf.
Layouts   HBM. q, o [total_q, n_q_heads, d]; k, v [total_kv, n_kv_heads, d], sequences packed; lse [total_q, n_q_heads]
          float32. Several splits: o float32 and lse of each, one after the other, for `combine_splits`.
Limits    d 1..128, or even to 256; q, k, v of one dtype: float32, bfloat16 or float16; lengths below 2^24, 0 included;
          scales 0, or 1e-30..1e8; m 4 with n 1..3, m 8 with n 1..7; thresholds in (0, 1]. Elements below 2^31. Queries
          must be finite, and keys and values in tiles of 128 that rows may see or in the two before these; what no
          sequence owns may hold anything.
Engines   Per 128 queries and 1024 keys: tensor QK, transposes of P, PV, 1280 ns; vector row maxima with masks, half of
          the transposes out of PSUM, the output's rescaling, 1467 ns; scalar exponentials with row sums and the other
          half, 1361 ns (trn2, d=128, two bytes). N:M: tensor takes differences of scores pairwise and adds up their
          signs, which scalar takes. Bounds of other data flows: docs/performance.md.
Numerics  scores, maxima, sums and state float32; probabilities rounded to q's dtype before PV. N:M compares scores
          rounded to float32, the sums of the same products in the same order for equal keys.
Memory    SBUF per partition: 64 tiles of 128 rows per block (d=128, two bytes): 144 KiB in all. PSUM: 8 banks.
          Nothing depends on lengths.
Oracle    reference/flash_attention.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Design    Queries on partitions, scores in PSUM. A block of rows keeps its state in SBUF while keys stream by in chunks
          that all its heads share; K is transposed once per block and chunk. The steps of a chunk are a software
          pipeline: scores, exponentials and products of different tiles at a time. Row tiles that see few and many of
          a chunk's keys share steps, so that these are full. Tiles past the diagonal are not in the program, nor tiles
          before a window, with a block's first chunks on its left edge; queries that see nothing are in no block, and
          only the last KV split of a block has its diagonal. What is still computed to no effect, in launches of unlike
          sequences and at the end of sequences, is in docs/performance.md. Where keys of several rows end is data
          (`_prefill_plan.py`), as are lengths. With a threshold, branches leave out what follows the maxima of two
          steps, 2 x 128 rows and 1024 keys, if all of their tiles are skipped; a single tile that is skipped is worked
          on to no effect, and its values are loaded, as those of a block are for all of its rows.
Files     `_prefill_state.py`: sizes, tiles; `_prefill_units.py`: steps; `_prefill_loads.py`: loads and results;
          `_prefill_steps.py`: the pipeline; `_prefill_select.py`: N:M; `_prefill_skip.py`: skip-softmax,
          `_prefill_pairs.py`: its pipeline; `_prefill_plan.py`, `_prefill_launch.py`: the host's part.

Run `python contributed/flash_attention_fwd.py` to check the kernel against the oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contributed import _decode_checks, _prefill_checks
from contributed._checks import FLOATS
from contributed._nki import nisa, nki, nl
from contributed._prefill_cases import PrefillCase
from contributed._prefill_launch import PrefillStats, launch, visited_tiles
from contributed._prefill_loads import (
    Results,
    begin_block,
    fetch_block,
    fetch_keys,
    fetch_values,
    finish_block,
    store_nothing,
    take_over,
    transpose_chunk,
)
from contributed._prefill_pairs import attend_and_skip, skip_on_edge
from contributed._prefill_select import Selection
from contributed._prefill_skip import Skipping
from contributed._prefill_state import RECORD_COLUMNS, Sizes, State
from contributed._prefill_steps import attend, attend_chunks
from contributed._prefill_units import steps_of
from contributed.flash_decode import MOST_SPLITS, combine_splits


@nki.jit
def prefill_fwd(
    q,
    k,
    v,
    blocks,
    bounds,
    chunks,
    heads,
    overhang,
    masked,
    plain,
    guarded,
    ragged,
    n_splits,
    softmax_scale,
    sparsity_n=0,
    sparsity_m=0,
    sink=0,
    recent=0,
    skip_limit=None,
    with_lse=False,
    left_tiles=None,
    left_offset=0,
    edge_tiles=0,
    start=None,
    start_tiles=0,
    sure_tiles=0,
    nothing=None,
):
    """Prefill attention of a batch by the plan in `blocks`, `bounds` and `chunks` (`_prefill_plan.make_plan`).

    Args:
        q: [total_q, n_q_heads, d] in HBM.
        k: [rows, n_kv_heads, d] in HBM, with as many rows as the plan asks for.
        v: as k.
        blocks: int32 [n_cores, n_blocks + 2, 128, 7, q_tiles].
        bounds: int32 [n_cores, n_blocks, 9].
        chunks: int32 [n_cores, n_chunks + 2, 128, 3 + kv_tiles].
        heads: query heads of a block; this and the next five as in `_prefill_state.Sizes`.
        overhang: tiles that a row tile sees from that of its own number on, on the diagonal, 0 without one.
        masked: whether chunks of the loop have keys that a row may not see.
        plain: whether rows see all of the key tiles that neither edge nor diagonal cross.
        guarded: whether chunks have rows that belong to no key of their sequence.
        ragged: whether blocks may have fewer rows.
        n_splits: KV splits.
        softmax_scale: multiplies q . k.
        sparsity_n: scores that stay of `sparsity_m`.
        sparsity_m: 4 or 8; 0 for no selection.
        sink: keys at the beginning that always stay.
        recent: keys up to a row's position that always stay.
        skip_limit: logarithm of the threshold over the scale, or None.
        with_lse: whether lse is returned.
        left_tiles: tiles before its own that a row tile sees, None if the left edge of a window is no part of the
            program; this and the next five as in `_prefill_state.Sizes`.
        left_offset: keys of the first of these that a row tile's first row does not see, at most.
        edge_tiles: tiles of keys of the chunks on the left edge.
        start: tiles of keys before blocks with an edge at the beginning of a sequence.
        start_tiles: tiles of keys of the chunks on that.
        sure_tiles: row tiles that every block has in full.
        nothing: int32 [n_cores, n, 128, columns]: rows of o that no block has, -1 for none; or None.

    Returns:
        o [n_splits * total_q, n_q_heads, d]; with `with_lse` lse [n_splits * total_q, n_q_heads]; with `skip_limit`
        float32 [n_cores, n_chunks, tiles of the block * kv_tiles], 1 for each tile of a chunk that was skipped.
    """
    total_q, n_q_heads, d = q.shape
    o_dtype = q.dtype if n_splits == 1 else nl.float32
    o_hbm = nl.ndarray((n_splits * total_q, n_q_heads, d), dtype=o_dtype, buffer=nl.shared_hbm)
    lse_hbm = None
    if with_lse:
        lse_hbm = nl.ndarray((n_splits * total_q, n_q_heads), dtype=nl.float32, buffer=nl.shared_hbm)
    n_cores = blocks.shape[0]
    core = nl.program_id(0) if n_cores > 1 else 0
    blocks, bounds, chunks = blocks[core], bounds[core], chunks[core]
    skips = skip_limit != None
    kv_tiles = chunks.shape[2] - RECORD_COLUMNS
    sizes = Sizes(
        d,
        heads,
        blocks.shape[3],
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
        start,
        start_tiles,
        sure_tiles,
    )
    w = State(sizes, q, k, v, o_hbm, lse_hbm, softmax_scale)
    selection, skipping = None, None
    if sparsity_m > 0:
        selection = Selection(sparsity_n, sparsity_m, sink, recent, sizes, q.dtype)
        w.selection = selection
    skipped_hbm, skipped = None, None
    if skips:
        shape = (n_cores, chunks.shape[0] - 2, sizes.n_tiles * kv_tiles)
        skipped_hbm = nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm)
        skipped = skipped_hbm[core]
        skipping = Skipping(skip_limit, w.floor, skipped, sizes)
        w.skipping = skipping
    nisa.dma_copy(dst=w.coming, src=chunks[0])
    nisa.dma_copy(dst=w.block_coming, src=blocks[0])
    w.prepare()
    fetch_keys(w, chunks[1])
    whole = None
    if ragged:
        whole = nisa.register_alloc()
        nisa.register_load(whole, bounds[0, 2:3])
    fetch_block(w, blocks[1], whole)
    fetch_values(w)
    w.prepare_rest()
    if selection != None:
        selection.prepare()
    if skipping != None:
        skipping.prepare()
    transpose_chunk(w)
    if nothing != None:
        store_nothing(w, nothing[core])

    def block(b):
        first, end = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(first, bounds.select(0, b)[0:1])
        nisa.register_load(end, bounds.select(0, b)[1:2])
        whole, whole_next = None, None
        if ragged:
            whole, whole_next = nisa.register_alloc(), nisa.register_alloc()
            nisa.register_load(whole, bounds.select(0, b)[2:3])
            nisa.register_load(whole_next, bounds.select(0, b)[3:4])
        begin_block(w, blocks[2:].select(0, b), whole_next)
        results = Results(sizes)

        def chunk(j):
            attend(w, steps_of(sizes, 0, None), [chunks[2:].select(0, j)], None)

        def edge(j):
            attend_edge(w, -sizes.n_edge, sizes.n_edge, chunks, skipped, j)

        def edge_at_start(j):
            attend_edge(w, -sizes.n_edge - sizes.n_start, sizes.n_start, chunks, skipped, j)

        def diagonal(j):
            attend_chunks(w, 0, records_of(chunks, sizes.n_diagonal, j), None)

        if sizes.n_edge > 0:
            first_of_edge, end_of_edge = nisa.register_alloc(), nisa.register_alloc()
            nisa.register_load(first_of_edge, bounds.select(0, b)[4:5])
            nisa.register_load(end_of_edge, bounds.select(0, b)[5:6])
            nl.fori_loop(first_of_edge, end_of_edge, edge)
        if sizes.n_start > 0:
            first_of_edge, end_of_edge = nisa.register_alloc(), nisa.register_alloc()
            nisa.register_load(first_of_edge, bounds.select(0, b)[6:7])
            nisa.register_load(end_of_edge, bounds.select(0, b)[7:8])
            nl.fori_loop(first_of_edge, end_of_edge, edge_at_start)
        if skips:
            attend_and_skip(w, chunks[2:], skipped, first, end, results)
        else:
            nl.fori_loop(first, end, chunk)
            if n_splits == 1:
                attend_chunks(w, 0, records_of(chunks, sizes.n_diagonal, end), results)
            elif sizes.n_diagonal > 0:
                end_of_diagonal = nisa.register_alloc()
                nisa.register_load(end_of_diagonal, bounds.select(0, b)[8:9])
                nl.fori_loop(end, end_of_diagonal, diagonal)
        finish_block(w, results, whole)

    take_over(w)  # the others, when the one before them ends
    nl.fori_loop(0, bounds.shape[0], block)
    returned = [o_hbm]
    if with_lse:
        returned.append(lse_hbm)
    if skips:
        returned.append(skipped_hbm)
    return returned[0] if len(returned) == 1 else tuple(returned)


def attend_edge(w, place, n, chunks, skipped, j):
    """All tiles of the block with n chunks on the left edge of the window, of which number j is the first."""
    if w.skipping != None:
        skip_on_edge(w, place, n, chunks[2:], skipped, j)
    else:
        attend_chunks(w, place, records_of(chunks, n, j), None)


def records_of(chunks, n, j):
    """For each of n chunks, of which number j is the first, the record of the second one after it."""
    records = []
    for i in range(n):
        records.append(chunks[2 + i :].select(0, j))
    return records


def flash_attention_fwd(
    q: Any,
    k: Any,
    v: Any,
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
    return_lse: bool = False,
    return_stats: bool = False,
    out: Any = None,
    lse: Any = None,
    n_splits: int | None = None,
    n_cores: int = 1,
    target: str | None = None,
) -> Any:
    """Prefill attention in math layout, on the CPU. Queries are the last rows of their sequence's keys.

    Args:
        q: [batch, seqlen_q, n_q_heads, d], or packed [total_q, n_q_heads, d] with both `cu_seqlens`.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total_kv, n_kv_heads, d].
        v: as k.
        cu_seqlens_q: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1]; other rows get o = 0, lse = -inf.
        cu_seqlens_kv: the same for k and v.
        causal: whether a query sees no keys after its own position.
        window_size: (left, right), keys visible around a query's own position; None is unlimited.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        sparsity_n: scores that stay of every `sparsity_m`; None, 0 and `sparsity_m` keep all. A sequence of one query
            stays dense.
        sparsity_m: 4 or 8.
        dense_sink_tokens: first keys that always stay.
        dense_recent_tokens: keys up to a query's own that always stay.
        skip_softmax_threshold: in (0, 1]; None or 0 skips nothing.
        return_lse: whether lse is returned.
        return_stats: whether stats are.
        out: where o is written, of q's shape and dtype.
        lse: where lse is written, float32 of q's shape without d.
        n_splits: KV splits, 1 with a threshold; None chooses: more than 1 only where cores would have nothing to do.
        n_cores: 1, or 2 from trn2 on; with a threshold 1.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.

    Returns:
        o of q's shape and dtype; with `return_lse` lse, float32, natural logarithm; with `return_stats`
        `PrefillStats`.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run, `out` and `lse` are as before.
    """
    x = _prefill_checks.operands(q, k, v, cu_seqlens_q, cu_seqlens_kv)
    window = _prefill_checks.window(causal, window_size)
    scale = _prefill_checks.scale(softmax_scale, q.shape[-1])
    selection = _prefill_checks.sparsity(sparsity_n, sparsity_m, dense_sink_tokens, dense_recent_tokens)
    threshold = _prefill_checks.threshold(skip_softmax_threshold)
    if n_splits is not None:
        _decode_checks.count("n_splits", n_splits, MOST_SPLITS if threshold is None else 1)
    _decode_checks.cores(n_cores, target)
    if threshold is not None:
        _decode_checks.count("n_cores with skip_softmax_threshold", n_cores, 1)
    _decode_checks.flag("return_stats", return_stats)
    _decode_checks.results(q.shape, q.dtype, out, lse, return_lse)

    o_all = np.zeros((q.size // (q.shape[-2] * q.shape[-1]), *q.shape[-2:]), q.dtype)
    lse_all = np.full(o_all.shape[:2], -np.inf, np.float32)
    n_q_heads, with_lse = q.shape[-2], return_lse or lse is not None
    stats = None
    if x.q.shape[0] > 0:
        made = launch(
            prefill_fwd,
            combine_splits,
            x.spans,
            window,
            q_shape=x.q.shape,
            n_kv_heads=x.k.shape[1],
            itemsize=q.dtype.itemsize,
            scale=scale,
            sparsity=selection,
            threshold=threshold,
            with_lse=with_lse,
            n_splits=n_splits,
            n_cores=n_cores,
        )
        o_rows, lse_rows, stats = made.run(x.q, x.k, x.v, target)
        o_all[x.rows] = o_rows
        if lse_rows is not None:
            lse_all[x.rows] = lse_rows
    results = _decode_checks.deliver(o_all, lse_all if with_lse else None, q.shape, out, lse, return_lse)
    if not return_stats:
        return results
    if stats is None:
        kept = visited_tiles(x.spans, window, n_q_heads)
        total = np.array([tiles.sum(axis=(1, 2)) for tiles in kept], np.int64)
        stats = PrefillStats(total, 0 * total, kept)
    return (*results, stats) if return_lse else (results, stats)


CASES = (
    PrefillCase("one-query", 1, 1, 64, ((1, 1),)),
    PrefillCase("no-keys", 2, 1, 64, ((5, 0), (1, 1), (0, 7))),
    PrefillCase("tile-edges", 2, 1, 80, ((127, 127), (128, 128), (129, 129), (256, 257)), unused=3),
    PrefillCase("llama-3-8b", 8, 2, 128, ((150, 150),), batched=True),
    PrefillCase("chunked-prefill", 2, 1, 128, ((33, 1290), (70, 400), (1, 300))),
    PrefillCase("prefix-of-whole-chunks", 2, 1, 128, ((256, 1280),)),
    PrefillCase("mistral-7b-window", 2, 1, 128, ((150, 500),), left=127),
    PrefillCase("phi-3-mini", 2, 2, 96, ((200, 200),)),
    PrefillCase("gemma-2-9b", 2, 1, 256, ((150, 270),)),
    PrefillCase("encoder", 2, 2, 64, ((130, 130), (70, 70)), causal=False),
    PrefillCase("two-sided-window", 2, 2, 64, ((200, 1300),), causal=False, left=60, right=30),
    PrefillCase("more-queries-than-keys", 2, 1, 64, ((200, 77),)),
    PrefillCase("negative-scale", 2, 1, 112, ((140, 300),), softmax_scale=-0.1),
    PrefillCase("large-block", 1, 1, 64, ((1100, 1100),)),
    PrefillCase("2-of-4", 2, 1, 64, ((130, 130), (33, 160), (1, 70)), sparsity_n=2, sink=5, recent=64, grid=True),
    PrefillCase("1-of-4-long", 1, 1, 128, ((128, 1664),), sparsity_n=1, recent=64, grid=True),
    PrefillCase("3-of-4-window", 1, 1, 64, ((150, 700),), left=300, sparsity_n=3, recent=10, grid=True),
    PrefillCase("4-of-8", 1, 1, 64, ((130, 700),), sparsity_n=4, sparsity_m=8, sink=130, grid=True),
    PrefillCase("7-of-8-d-256", 1, 1, 256, ((64, 300),), sparsity_n=7, sparsity_m=8, recent=3, grid=True),
    PrefillCase("2-of-8-both-sides", 2, 1, 64, ((100, 600),), causal=False, sparsity_n=2, sparsity_m=8, grid=True),
    PrefillCase("skip", 2, 1, 64, ((200, 200), (40, 1200)), threshold=0.5, locality=3.0),
    PrefillCase("skip-window", 1, 1, 128, ((300, 900),), left=300, threshold=0.3, locality=3.0),
    PrefillCase("skip-encoder", 1, 1, 64, ((200, 900),), causal=False, threshold=0.1, locality=3.0, seed=3),
    PrefillCase(
        "skip-2-of-4", 2, 1, 64, ((130, 700),), threshold=0.5, sparsity_n=2, recent=20, grid=True, locality=3.0
    ),
)


def main() -> int:
    """Check o, lse and skipped tiles of every case against the oracle; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference.flash_attention import flash_attention as oracle
    from reference.rounded_attention import flash_attention_rounded

    def results(case: PrefillCase, dtype: str, target: str | None) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        o, lse, stats = flash_attention_fwd(q, k, v, return_lse=True, return_stats=True, target=target, **options)
        return o, lse, stats.tiles_skipped.astype(np.float32)

    def references(case: PrefillCase, dtype: str) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        exact = oracle(q, k, v, **options)
        o, lse = flash_attention_rounded(q, k, v, **options)
        # A number of tiles is not rounded: its budget is below 1.
        skipped = exact.stats.tiles_skipped
        return (exact.o, o), (exact.lse, lse), (skipped, skipped[None])

    return budget_check(__doc__ or "", results, references, CASES, names=("o", "lse", "tiles"))


if __name__ == "__main__":
    raise SystemExit(main())
