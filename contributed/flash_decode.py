"""Flash decoding: a few new tokens per sequence against long KV caches, grouped queries, ragged lengths, KV splits.

Math      p = i + length - s for new token i of s; x[h, j] = softmax_scale * k_scale * q[h] . k[j, h // group], then
          cap * tanh(x / cap), then + alibi_slopes[h] * (j - p), each if asked for; visible keys
          max(0, p - left) <= j <= p; o[h] = v_scale * softmax(x[h]) v, lse[h] = log(sum exp(x[h])), sinks[h] among the
          summands if given. Nothing visible: o = 0, lse = -inf. The window's right side never removes a key.
Layouts   HBM. q [batch, s, n_q_heads, d]. V [batch, n_kv_heads, seqlen_kv, d], packed [1, n_kv_heads, total, d], or
          pages (`paged_decode.py`). K as V (s-major), or d-major [batch, n_kv_heads, d, seqlen_kv] with seqlen_kv a
          multiple of 128, better of 2048. o [n_splits * batch, s, n_q_heads, d] in q's dtype, float32 for several
          splits; lse likewise without d, float32. `combine_splits`: o [n_splits, rows, d], lse [n_splits, rows].
Limits    d 1..128, or even to 256; s * group 1..128; any lengths, 0 included; q, k, v of one dtype: float32, bfloat16
          or float16; or caches in float8_e4m3, not with float32 q. K of less than 2^31 elements. ALiBi slopes to 1,
          scales and soft caps 1e-30 to 1e8. Keys, values and queries in use must be finite: NaN in one sequence may
          reach others of its launch.
Engines   Per 128 keys and KV head: tensor QK and PV, a transpose of s-major K. All else once per item of up to 16 KiB
          per partition (two bytes, d=128: 8192 keys). Scalar: exponentials, one instruction per row, with scale,
          maximum, mask and row sum in it. Vector: maxima, out of PSUM, and state. GpSimd: descriptors of gathers.
          Instructions per 128 keys, whole items of 8192 keys, 8 heads per KV head: 2.37 with d-major K, 3.43 with
          s-major K (INSTRUCTIONS_PER_TILE), on trn1 3.55.
Numerics  scores, maxima, sums and state float32; probabilities rounded to q's dtype before PV; splits normalised and
          joined in float32. A sequence's result has the same bits in every batch (same max_seqlen_kv, n_splits).
Memory    SBUF per partition: K of all lanes 32 KiB at most, V as much, and scores, probabilities and records beside
          them: 81 KiB in all for 8 KV heads of 8 query heads each, d=128, two bytes; a test holds it to that. Pages of
          few keys have longer records. PSUM: at most the 8 banks. Nothing depends on seqlen_kv.
Oracle    reference/flash_decode.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Design    K stationary, q moving: S^T has keys on partitions and stays in PSUM, and P^T is the moving operand of PV.
          Partition p holds consecutive keys, so that caches and pages load in runs of up to 16 KiB. Lengths, tables
          and windows are data: a plan, made once per step (`_decode_plan.py`), lists the rows to gather. Of V and
          s-major K no other row is read; d-major K loads in chunks of up to 2048 keys, and what is beyond a
          sequence's keys is dropped before it meets anything. Times and bounds: docs/performance.md.
Files     `_decode_state.py`: terms, sizes, tiles; `_decode_loads.py`, `_decode_scores.py`, `_decode_softmax.py`: the
          steps of a trip; here: the loops, the combine kernel and the call from NumPy.

Run `python contributed/flash_decode.py` to check the kernels against the oracle.
"""

from __future__ import annotations

from typing import Any

from contributed import _decode_checks as checks
from contributed._cases import FlashCase
from contributed._checks import FLOATS
from contributed._decode_launch import kernel_layout, launch
from contributed._decode_loads import fetch, flat_rows, load_k, load_k_edges, load_options, load_v, load_v_edges
from contributed._decode_plan import FlatCache
from contributed._decode_scores import transpose_queries
from contributed._decode_softmax import attend_first, attend_next, finish
from contributed._decode_state import EMPTY, LOWEST, MASKED, TINY, Sizes, State
from contributed._nki import nisa, nki, nl

# Executed instructions, DMA included and loop control not, per 128 keys and KV head of a further item of two lanes of
# 8192 keys, 8 rows each; by whether K is d-major. A test pins them.
INSTRUCTIONS_PER_TILE = {True: 303 / 128, False: 439 / 128}
MOST_SPLITS = 64


@nki.jit
def flash_decode_fwd(
    q,
    k,
    v,
    records,
    items,
    bounds,
    n_kv_heads,
    tokens,
    granules,
    chunks,
    n_windows,
    window,
    n_splits,
    softmax_scale,
    v_scale=1.0,
    softcap=None,
    sinks=None,
    slopes=None,
    kv_scales=None,
    with_lse=False,
):
    """Decode attention of a batch by the plan in `records`, `items` and `bounds` (`_decode_plan.make_plan`).

    Args:
        q: [batch, s, n_q_heads, d] in HBM.
        k: rows of d elements in any shape, or d-major [batch, n_kv_heads, d, seqlen_kv] if `chunks` > 0.
        v: rows of d elements in any shape.
        records: int32 [n_cores, n_trips + 1, 128, n_lanes, columns].
        items: int32 [n_cores, n_steps + 1, 128, n_lanes, columns].
        bounds: int32 [n_cores, n_trips, 2].
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition; this and the next five as in the plan's geometry.
        granules: gathers per item.
        chunks: gathers per item and block of d of d-major K, 0 for s-major.
        n_windows: stretches of edge keys per group.
        window: keys of a stretch.
        n_splits: KV splits.
        softmax_scale: multiplies q . k.
        v_scale: multiplies the output.
        softcap: cap of the scores, or None.
        sinks: [n_kv_heads, group] float32, or None; not with splits, for a sink counts once.
        slopes: [n_kv_heads, group] float32, or None.
        kv_scales: [n_kv_heads, 2] float32: factors of k and v per KV head, or None.
        with_lse: whether lse is returned.

    Returns:
        o [n_splits * batch, s, n_q_heads, d], and with `with_lse` lse [n_splits * batch, s, n_q_heads].
    """
    batch, s, n_q_heads, d = q.shape
    assert n_q_heads % n_kv_heads == 0, f"n_q_heads: received {n_q_heads}, allowed multiples of {n_kv_heads}"
    assert n_splits == 1 or sinks == None, "sinks with splits: give them to combine_splits"
    o_dtype = q.dtype if n_splits == 1 else nl.float32
    o_hbm = nl.ndarray((n_splits * batch, s, n_q_heads, d), dtype=o_dtype, buffer=nl.shared_hbm)
    lse_hbm = None
    if with_lse:
        lse_hbm = nl.ndarray((n_splits * batch, s, n_q_heads), dtype=nl.float32, buffer=nl.shared_hbm)
    core = nl.program_id(0) if records.shape[0] > 1 else 0
    sizes = Sizes(q.shape, n_kv_heads, tokens, granules, chunks, n_windows, window, records.shape[3])
    k_rows, v_rows = flat_rows(k, 1 if chunks > 0 else d), flat_rows(v, d)
    w = State(sizes, q, k_rows, v_rows, o_hbm, lse_hbm, softmax_scale, v_scale, softcap, sinks, slopes, kv_scales)
    _run(w, records[core], items[core], bounds[core])
    if with_lse:
        return o_hbm, lse_hbm
    return o_hbm


def _run(w, records, items, bounds):
    """Every group of `records`: a trip of the outer loop takes first items, the inner loop further ones."""
    gpsimd = nisa.engine.gpsimd
    fetch(w, records[0])
    w.prepare()

    def trip(i):
        first, end = nisa.register_alloc(), nisa.register_alloc()
        nisa.register_load(first, bounds.select(0, i)[0:1])
        nisa.register_load(end, bounds.select(0, i)[1:2])
        nisa.tensor_copy(dst=w.of_k, src=w.coming, engine=gpsimd)
        load_k(w, w.of_k)
        load_k_edges(w, w.of_k)
        nisa.tensor_copy(dst=w.of_v, src=w.coming, engine=gpsimd)
        transpose_queries(w)
        nisa.dma_copy(dst=w.item_coming, src=items.select(0, first))
        fetch(w, records[1:].select(0, i))
        load_v(w, w.of_v)
        load_v_edges(w, w.of_v)
        nisa.tensor_copy(dst=w.now, src=w.of_v)
        load_options(w)
        attend_first(w)

        def step(j):
            nisa.tensor_copy(dst=w.item_of_k, src=w.item_coming, engine=gpsimd)
            load_k(w, w.item_of_k)
            nisa.tensor_copy(dst=w.item_of_v, src=w.item_coming, engine=gpsimd)
            nisa.dma_copy(dst=w.item_coming, src=items[1:].select(0, j))
            load_v(w, w.item_of_v)
            nisa.tensor_copy(dst=w.item_now, src=w.item_of_v)
            attend_next(w)

        nl.fori_loop(first, end, step)
        finish(w)

    nl.fori_loop(0, bounds.shape[0], trip)


@nki.jit
def combine_splits(o, lse, dtype, sinks=None):
    """Join the results of KV splits: o = sum_i w_i o_i / sum_i w_i, w_i = exp(lse_i - max lse).

    Args:
        o: [n_splits, rows, d] float32 in HBM.
        lse: [n_splits, rows] float32 in HBM, -inf for an empty split.
        dtype: of the result.
        sinks: [rows] float32 in HBM, logits that join the sum of the weights alone, or None.

    Returns:
        o [rows, d] in `dtype` and lse [rows] float32.
    """
    n_splits, rows, d = o.shape
    o_hbm = nl.ndarray((rows, d), dtype=dtype, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    n_columns = n_splits if sinks == None else n_splits + 1
    pmax = nl.tile_size.pmax
    for first in range(0, rows, pmax):
        n = min(pmax, rows - first)
        logs = _tile((n, n_columns))
        nisa.dma_copy(dst=logs[:, 0:n_splits], src=lse.ap([[1, n], [rows, n_splits]], offset=first))
        if sinks != None:
            nisa.dma_copy(dst=logs[:, n_splits:n_columns], src=sinks.ap([[1, n], [1, 1]], offset=first))
        nisa.tensor_scalar(dst=logs, data=logs, op0=nl.maximum, operand0=MASKED)
        top = _tile((n, 1))
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=logs, axis=1)
        nisa.tensor_scalar(dst=top, data=top, op0=nl.maximum, operand0=LOWEST)
        neg_top = _tile((n, 1))
        nisa.tensor_scalar(dst=neg_top, data=top, op0=nl.multiply, operand0=-1.0)
        weights, total = _tile((n, n_columns)), _tile((n, 1))
        nisa.activation(
            dst=weights,
            op=nl.exp,
            data=logs,
            bias=neg_top,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
        nisa.tensor_scalar(dst=total, data=total, op0=nl.maximum, operand0=TINY)
        inverse = _tile((n, 1))
        nisa.reciprocal(dst=inverse, data=total)

        joined = _tile((n, d))
        nisa.memset(dst=joined, value=0.0)
        for split in range(n_splits):
            part = _tile((n, d))
            nisa.dma_copy(dst=part, src=o[split, first : first + n, :])
            weight = weights[:, split : split + 1]
            nisa.scalar_tensor_tensor(
                dst=joined, data=part, op0=nl.multiply, operand0=weight, op1=nl.add, operand1=joined
            )
        o_sb = nl.ndarray((n, d), dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=o_sb, data=joined, op0=nl.multiply, operand0=inverse)
        nisa.dma_copy(dst=o_hbm[first : first + n, :], src=o_sb)

        log_total, empty = _tile((n, 1)), _tile((n, 1))
        nisa.activation(dst=log_total, op=nl.log, data=total)
        nisa.tensor_scalar(dst=empty, data=total, op0=nl.less, operand0=EMPTY, op1=nl.multiply, operand1=MASKED)
        nisa.tensor_tensor(dst=top, data1=top, data2=log_total, op=nl.add)
        # Twice MASKED is beyond float32: an empty row's lse becomes -inf.
        nisa.scalar_tensor_tensor(dst=top, data=top, op0=nl.add, operand0=empty, op1=nl.add, operand1=empty)
        nisa.dma_copy(dst=lse_hbm[first : first + n, :], src=top)
    return o_hbm, lse_hbm


def _tile(shape):
    """A new float32 SBUF tile."""
    return nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)


def flash_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    seqlens_kv: Any = None,
    cu_seqlens_kv: Any = None,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    n_splits: int | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    target: str | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_d_major: bool = False,
    max_seqlen_kv: int | None = None,
    n_cores: int = 1,
) -> Any:
    """Decode attention in math layout, on the CPU.

    Args:
        q: [batch, n_q_heads, d], or [batch, s, n_q_heads, d]: s new tokens per sequence, the last of its keys.
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d] with `cu_seqlens_kv`; q's dtype or
            float8_e4m3.
        v: as k.
        seqlens_kv: int [batch], keys in use of each sequence; None means all there is room for.
        cu_seqlens_kv: int [batch + 1]: sequence b owns rows cu[b]:cu[b + 1].
        softmax_scale: multiplies q . k; None means d ** -0.5.
        window_size: (left, right), keys visible around a token's own; None is unlimited.
        n_splits: KV splits per sequence; None chooses (`_decode_plan.choose_n_splits`).
        return_lse: whether (o, lse) is returned.
        out: where o is written, of q's shape and dtype.
        lse: where lse is written, float32 of q's shape without d.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.
        softcap: cap of the scores.
        sinks: [n_q_heads], logits that join the softmax's sum alone.
        alibi_slopes: [n_q_heads].
        k_scale: factor of stored keys, a number or [n_kv_heads].
        v_scale: factor of stored values, likewise.
        k_d_major: whether the kernel gets K with d before the keys, as caches of some inference stacks hold it.
        max_seqlen_kv: bound of all lengths, which the size of items follows; None means what there is room for, of
            packed sequences the longest.
        n_cores: 1, or 2 from trn2 on.

    Returns:
        o of q's shape and dtype; with `return_lse` also lse, float32, natural logarithm.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run, `out` and `lse` are as before.
    """
    q4 = checks.queries(q)
    checks.cache_dtypes(q4, k=k, v=v)
    n_kv_heads, first, used, room = checks.flat_cache(q4, k, v, seqlens_kv, cu_seqlens_kv)
    checks.d_major(q4, k, k_d_major, packed=first is not None)
    longest = checks.longest(max_seqlen_kv, used, room)
    options = checks.options(
        q4,
        n_kv_heads,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if n_splits is not None:
        checks.count("n_splits", n_splits, MOST_SPLITS)
    checks.cores(n_cores, target)
    checks.results(q.shape, q.dtype, out, lse, return_lse)

    k4, v4 = kernel_layout(k, v, k_d_major)
    keys = v4.shape[2]
    made = launch(
        flash_decode_fwd,
        combine_splits,
        FlatCache(n_kv_heads, keys, first),
        used,
        options,
        q_shape=q4.shape,
        n_kv_heads=n_kv_heads,
        itemsize=k.dtype.itemsize,
        most_keys=longest,
        n_splits=n_splits,
        n_cores=n_cores,
        with_lse=return_lse or lse is not None,
        d_major_keys=keys if k_d_major else None,
    )
    o4, lse3 = made.run(q4, k4, v4, target)
    return checks.deliver(o4, lse3, q.shape, out, lse, return_lse)


CASES = (
    FlashCase("one-key", 1, 1, 64, (1,)),
    FlashCase("no-keys", 4, 2, 64, (0, 1, 0)),
    FlashCase("tile-edges", 2, 1, 80, (127, 128, 129, 255, 256, 257), unused=3),
    FlashCase("llama-3-8b", 32, 8, 128, (300, 0), unused=20),
    FlashCase("llama-3-70b-d-major", 64, 8, 128, (290,), unused=20, d_major=True),
    FlashCase("qwen3-0.6b-verify", 16, 8, 128, (131, 3), s=4, unused=9),
    FlashCase("qwen2.5-14b", 40, 8, 128, (200,)),
    FlashCase("mistral-7b-window", 32, 8, 128, (400,), window=127, unused=5),
    FlashCase("mistral-large", 96, 8, 128, (161,), d_major=True),
    FlashCase("phi-3-mini", 32, 32, 96, (200,)),
    FlashCase("gemma-2-9b", 16, 8, 256, (270,), softcap=50.0, window=200, unused=2),
    FlashCase("gemma-2-9b-d-major", 16, 8, 256, (270,), s=2, d_major=True, softcap=50.0, unused=2),
    FlashCase("gpt-oss-20b", 64, 8, 64, (300,), window=127, sinks=True, n_splits=2),
    FlashCase("mpt-7b", 32, 32, 128, (133,), alibi=True),
    FlashCase("falcon-7b", 71, 1, 64, (500, 3)),
    FlashCase("alibi-verify", 8, 2, 112, (333, 2, 64), s=4, alibi=True, softcap=3.0, window=100, sinks=True),
    FlashCase("large-logits", 8, 2, 64, (300, 77), logits=1e4),
    FlashCase("negative-logits", 8, 2, 64, (300, 77), logits=-1e5, n_splits=2),
    FlashCase("needles", 8, 2, 128, (1025, 700), needles=(0, 7, 8, 127, 128, 511, 512, 1023, 1024)),
    FlashCase("splits", 12, 1, 96, (1000, 100, 0), n_splits=3, unused=30),
    FlashCase("packed", 8, 2, 128, (129, 0, 300, 1), packed=True),
    FlashCase("packed-unused", 8, 2, 192, (129, 0, 300, 1), s=2, packed=True, unused=7),
    FlashCase("float8", 8, 2, 128, (300, 128), float8=True, k_scale=0.5, v_scale=2.0, unused=3),
    FlashCase("float8-by-head", 10, 2, 64, (300,), d_major=True, float8=True, k_scale=(0.5, 2.0), v_scale=(3.0, 0.1)),
    FlashCase("several-items", 128, 1, 64, (2100, 1025), unused=1),
    FlashCase("llama-3-8b-9k", 4, 1, 128, (9000,), unused=24),
    FlashCase("two-cores", 16, 4, 64, (700, 30, 300), n_cores=2, unused=1),
    FlashCase("two-cores-splits", 64, 1, 128, (2500,), n_cores=2, d_major=True),
)


def main() -> int:
    """Check o and lse of every case against the oracle; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference.flash_decode import flash_decode as oracle
    from reference.rounded import flash_decode_rounded

    def results(case: FlashCase, dtype: str, target: str | None) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        return flash_decode(q, k, v, return_lse=True, target=target, **options, **case.launch(target))

    def references(case: FlashCase, dtype: str) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        return tuple(zip(oracle(q, k, v, **options), flash_decode_rounded(q, k, v, **options), strict=True))

    return budget_check(__doc__ or "", results, references, CASES)


if __name__ == "__main__":
    raise SystemExit(main())
