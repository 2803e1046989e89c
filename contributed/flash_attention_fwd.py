"""Prefill."""

from __future__ import annotations

from contributed._nki import nisa, nki, nl
from contributed._prefill_select import Selection
from contributed._prefill_skip import Skipping
from contributed._prefill_state import RECORD_COLUMNS, Sizes, State
from contributed._prefill_steps import (
    attend,
    attend_diagonal,
    begin_block,
    fetch_block,
    fetch_chunk,
    finish_block,
    steps_of,
    transpose_chunk,
)


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
):
    """Prefill."""
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
    sizes = Sizes(d, heads, blocks.shape[3], kv_tiles, overhang, masked, plain, guarded, ragged, sparsity_m, recent, skips)
    w = State(sizes, q, k, v, o_hbm, lse_hbm, softmax_scale)
    if sparsity_m > 0:
        w.selection = Selection(sparsity_n, sparsity_m, sink, recent, sizes, q.dtype)
    skipped_hbm, skipped = None, None
    if skips:
        shape = (n_cores, chunks.shape[0] - 2, sizes.n_tiles * kv_tiles)
        skipped_hbm = nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm)
        skipped = skipped_hbm[core]
        w.skipping = Skipping(skip_limit, w.floor, skipped, sizes)
    nisa.dma_copy(dst=w.coming, src=chunks[0])
    nisa.dma_copy(dst=w.block_coming, src=blocks[0])
    w.prepare()
    if sparsity_m > 0:
        w.selection.prepare()
    if skips:
        w.skipping.prepare()
    fetch_chunk(w, chunks[1])
    whole = None
    if ragged:
        whole = nisa.register_alloc()
        nisa.register_load(whole, bounds[0, 2:3])
    fetch_block(w, blocks[1], whole)
    transpose_chunk(w)

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

        def chunk(j):
            attend(w, steps_of(sizes, 0, None), [chunks[2:].select(0, j)], [row_of(skipped, 0, j)])

        nl.fori_loop(first, end, chunk)
        records, rows = [], []
        for i in range(sizes.n_diagonal):
            records.append(chunks[2 + i :].select(0, end))
            rows.append(row_of(skipped, i, end))
        attend_diagonal(w, records, rows)
        finish_block(w, whole)

    nl.fori_loop(0, bounds.shape[0], block)
    results = [o_hbm]
    if with_lse:
        results.append(lse_hbm)
    if skips:
        results.append(skipped_hbm)
    return results[0] if len(results) == 1 else tuple(results)


def row_of(skipped, i, number):
    """Row i + `number`, a register, of the decisions; None without any."""
    if skipped == None:
        return None
    return skipped[i:].select(0, number)
