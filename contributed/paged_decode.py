"""Paged decode: `flash_decode.py` over pages of keys and values that a block table names.

Math      Flash decoding of the keys k_pages[block_table[b, t // block_size], h, t % block_size], t < seqlens_kv[b].
Layouts   HBM. q [batch, s, n_q_heads, d], K and V pages [n_blocks, n_kv_heads, block_size, d], o as q.
Limits    block_size 1..256, best powers of two from 16 on; others as in `flash_decode.py`. Table entries past a
          sequence's keys may be any number, -1 or a page; what they name is not read.
Engines   As in `flash_decode.py`: the kernel is the same, `flash_decode_fwd`, and knows no pages. The plan writes row
          numbers; pages of fewer keys than a partition holds take a gather each, 16 keys being 4 KiB at d=128.
Numerics  As in `flash_decode.py`. A key's place in tiles depends on its position alone, so that a permutation of pages
          changes no bit.
Memory    As in `flash_decode.py`.
Oracle    reference/flash_decode.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.

Run `python contributed/paged_decode.py` to check the kernel against the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from contributed import _decode_checks as checks
from contributed._cases import FlashCase
from contributed._checks import FLOATS, require
from contributed._decode_launch import launch
from contributed._decode_plan import PagedCache
from contributed.flash_decode import MOST_SPLITS, combine_splits, flash_decode_fwd

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_MAX = 256


def paged_decode(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    seqlens_kv: Any,
    *,
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
    max_seqlen_kv: int | None = None,
    n_cores: int = 1,
) -> Any:
    """Decode attention over pages, on the CPU.

    Args:
        q: [batch, n_q_heads, d], or [batch, s, n_q_heads, d]: s new tokens per sequence, the last of its keys.
        k_pages: [n_blocks, n_kv_heads, block_size, d]; q's dtype or float8_e4m3.
        v_pages: as k_pages.
        block_table: int [batch, max_blocks]: page of each block of a sequence's keys, -1 for none.
        seqlens_kv: int [batch], keys of each sequence.
        softmax_scale: as the options below, as in `flash_decode`.
        window_size: keys visible to the left; pages that lie before the window are not read.
        n_splits: KV splits per sequence; None chooses.
        return_lse: whether (o, lse) is returned.
        out: where o is written, of q's shape and dtype.
        lse: where lse is written, float32 of q's shape without d.
        target: generation to simulate.
        softcap: cap of the scores.
        sinks: [n_q_heads].
        alibi_slopes: [n_q_heads].
        k_scale: factor of stored keys, a number or [n_kv_heads].
        v_scale: factor of stored values, likewise.
        max_seqlen_kv: bound of all lengths, which the size of items follows; None means what there is room for.
        n_cores: 1, or 2 from trn2 on.

    Returns:
        o of q's shape and dtype; with `return_lse` also lse, float32, natural logarithm.

    Raises:
        ValueError, TypeError: an argument is outside the limits; nothing has run, `out` and `lse` are as before.
    """
    q4 = checks.queries(q)
    checks.cache_dtypes(q4, k_pages=k_pages, v_pages=v_pages)
    batch, _, _, d = q4.shape
    fits = k_pages.ndim == 4 and k_pages.shape[3] == d and k_pages.size > 0
    require(fits, "k_pages shape", received=list(k_pages.shape), allowed=f"[n_blocks, n_kv_heads, block_size, {d}]")
    same = v_pages.shape == k_pages.shape
    require(same, "v_pages shape", received=list(v_pages.shape), allowed=f"{list(k_pages.shape)}, that of k_pages")
    n_blocks, n_kv_heads, block_size, _ = k_pages.shape
    checks.heads(q4, n_kv_heads)
    require(block_size <= BLOCK_MAX, "block_size", received=block_size, allowed=f"1..{BLOCK_MAX}")
    rows = k_pages.size // d
    require(rows <= checks.MAX_INDEX, "k_pages rows", received=rows, allowed=f"at most {checks.MAX_INDEX}")
    table = checks.integers("block_table", block_table, (batch, -1), f"[{batch}, max_blocks]").astype(np.int64)
    room = table.shape[1] * block_size
    used = checks.lengths(seqlens_kv, batch, room)
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
    for b, n in enumerate(used):
        # The first new token's window begins here; pages before it may be gone.
        first = 0 if options.left is None else max(0, n - q4.shape[1] - options.left)
        entries = table[b, first // block_size : -(-n // block_size)]
        good = bool(((entries >= 0) & (entries < n_blocks)).all())
        allowed = f"pages 0..{n_blocks - 1} for keys {first}..{n - 1} of sequence {b}"
        require(good, f"block_table[{b}]", received=entries.tolist(), allowed=allowed)
    if n_splits is not None:
        checks.count("n_splits", n_splits, MOST_SPLITS)
    checks.cores(n_cores, target)
    checks.results(q.shape, q.dtype, out, lse, return_lse)

    made = launch(
        flash_decode_fwd,
        combine_splits,
        PagedCache(n_kv_heads, block_size, table),
        used,
        options,
        q_shape=q4.shape,
        n_kv_heads=n_kv_heads,
        itemsize=k_pages.dtype.itemsize,
        most_keys=longest,
        n_splits=n_splits,
        n_cores=n_cores,
        with_lse=return_lse or lse is not None,
    )
    k4, v4 = np.ascontiguousarray(k_pages), np.ascontiguousarray(v_pages)
    o4, lse3 = made.run(q4, k4, v4, target)
    return checks.deliver(o4, lse3, q.shape, out, lse, return_lse)


@dataclass(frozen=True)
class PagedCase:
    """One call of `paged_decode`, and how a flat cache's keys are dealt onto pages. What no query sees holds NaN.

    Args:
        flat: keys, queries and options; flat, s-major.
        block_size: keys per page.
        shared: blocks at the beginning of the first two sequences that are the same pages.
    """

    flat: FlashCase
    block_size: int
    shared: int = 0

    @property
    def name(self) -> str:
        """Id in tables and tests; a serving stack's name where the block size is one of that stack's."""
        return self.flat.name

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        return f"{self.flat.shape} page{self.block_size}"

    def inputs(self, dtype: Any, seed: int = 0) -> tuple[Array, Array, Array, Array, Array, dict[str, Any]]:
        """q, k_pages, v_pages, block_table, seqlens_kv, and keyword arguments of oracle and wrapper alike.

        Pages are dealt at random. Table entries that no sequence uses are -1 or name a page of NaN, and so do those of
        blocks that lie before a window.
        """
        q, k, v, options = self.flat.inputs(dtype, seed)
        options.pop("seqlens_kv", None)
        size, lengths = self.block_size, np.array(self.flat.lengths, np.int32)
        needed = -(-lengths // size)
        n_blocks = int(needed.sum()) - self.shared + 3
        order = np.random.default_rng(seed).permutation(n_blocks).astype(np.int32)
        unused, free = order[0], list(order[1:])
        table = np.full((len(lengths), needed.max() + 2), -1, np.int32)
        table[:, 1::2] = unused
        shape = (n_blocks, self.flat.n_kv_heads, size, self.flat.head_dim)
        k_pages, v_pages = np.full(shape, np.nan, k.dtype), np.full(shape, np.nan, v.dtype)
        for b, length in enumerate(self.flat.lengths):
            own = 0
            if b == 1 and self.shared:
                own = self.shared
                table[1, :own] = table[0, :own]
                for x in (k, v):
                    x[1, : own * size] = x[0, : own * size]
            for i in range(own, needed[b]):
                table[b, i] = free.pop()
            first = 0 if self.flat.window is None else max(0, length - self.flat.s - self.flat.window)
            rows = np.arange(first, length)
            for x, pages in ((k, k_pages), (v, v_pages)):
                pages[table[b, rows // size], :, rows % size] = x[b, rows]
            table[b, : first // size] = unused
        return q, k_pages, v_pages, table, lengths, options

    def launch(self, target: str | None) -> dict[str, Any]:
        """Keyword arguments of the wrapper alone: splits and cores."""
        options = self.flat.launch(target)
        return {name: options[name] for name in ("n_splits", "n_cores")}


# Block sizes are called by a stack that uses them: 16 is vLLM's default, 32 usual with NxDI's block layout; SGLang's
# backends have pages of 1, 64 and 128; FlashAttention-2 takes multiples of 256.
# Models are there with the heads of one of two ranks.
CASES = (
    PagedCase(FlashCase("one-key", 1, 1, 64, (1,)), 16),
    PagedCase(FlashCase("vllm-16-llama-3-8b", 16, 4, 128, (100, 0, 17)), 16),
    PagedCase(FlashCase("vllm-16-prefix", 8, 4, 128, (75, 61, 16)), 16, shared=3),
    PagedCase(FlashCase("vllm-16-mistral", 16, 4, 128, (131, 60), window=50), 16),
    PagedCase(FlashCase("vllm-16-two-pages", 8, 1, 64, (2300, 390)), 16),
    PagedCase(FlashCase("vllm-16-wide-window", 8, 1, 64, (2300, 2177), window=2100), 16),
    PagedCase(FlashCase("nxdi-32-llama-3-70b", 32, 4, 128, (90, 0, 1)), 32),
    PagedCase(FlashCase("nxdi-32-new-4", 8, 2, 64, (70, 3, 0, 333), s=4), 32),
    PagedCase(FlashCase("nxdi-32-float8", 8, 2, 128, (200, 95), float8=True, k_scale=(0.5, 2.0), v_scale=2.0), 32),
    PagedCase(FlashCase("nxdi-32-items", 32, 1, 64, (17, 2177), s=4), 32),
    PagedCase(FlashCase("page-4-items", 2, 1, 192, (4700,)), 4),
    PagedCase(FlashCase("page-48-window", 6, 2, 80, (700, 450, 2), s=4, window=333), 48),
    PagedCase(FlashCase("page-48-splits", 6, 2, 96, (800, 400, 1), n_splits=2), 48),
    PagedCase(FlashCase("sglang-1", 4, 2, 64, (140, 37, 0, 1)), 1),
    PagedCase(FlashCase("sglang-64", 20, 4, 128, (129, 63)), 64),
    PagedCase(FlashCase("sglang-64-splits", 12, 4, 64, (900, 30, 0), n_splits=2, n_cores=2), 64),
    PagedCase(FlashCase("page-80-options", 8, 2, 64, (300, 81, 0), 2, softcap=3.0, sinks=True, alibi=True), 80),
    PagedCase(FlashCase("page-80-gemma-2", 8, 4, 256, (170, 80), softcap=50.0, window=100), 80),
    PagedCase(FlashCase("sglang-128-sinks", 32, 4, 64, (140, 128), sinks=True, window=128), 128),
    PagedCase(FlashCase("sglang-128-needles", 8, 2, 128, (390, 129), needles=(0, 127, 128, 389)), 128),
    PagedCase(FlashCase("fa2-256", 71, 1, 128, (513, 256)), 256),
    PagedCase(FlashCase("fa2-256-logits", 8, 4, 64, (300, 700), logits=1e4), 256),
)


def main() -> int:
    """Check o and lse of every case against the oracle; non-zero if one fails."""
    from contributed._selfcheck import budget_check
    from reference.caches import gather_pages
    from reference.flash_decode import paged_decode as oracle
    from reference.rounded import flash_decode_rounded

    def results(case: PagedCase, dtype: str, target: str | None) -> Any:
        q, k_pages, v_pages, table, lengths, options = case.inputs(FLOATS[dtype])
        options |= {"return_lse": True, "target": target, **case.launch(target)}
        return paged_decode(q, k_pages, v_pages, table, lengths, **options)

    def references(case: PagedCase, dtype: str) -> Any:
        q, k_pages, v_pages, table, lengths, options = case.inputs(FLOATS[dtype])
        (k, cu), (v, _) = (gather_pages(pages, table, lengths) for pages in (k_pages, v_pages))
        low = flash_decode_rounded(q, k, v, cu_seqlens_kv=cu, **options)
        return tuple(zip(oracle(q, k_pages, v_pages, table, lengths, **options), low, strict=True))

    return budget_check(__doc__ or "", results, references, CASES)


if __name__ == "__main__":
    raise SystemExit(main())
