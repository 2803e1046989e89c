"""New tokens' keys and values written into a cache, flat or paged."""

from __future__ import annotations

import numpy as np

from reference.caches import Cache, integers, page_rows
from reference.decode import Array


def append_kv(k: Array, v: Array, k_new: Array, v_new: Array, positions: Array) -> Cache:
    """Write `k_new[b]`, `v_new[b]` to rows `positions[b]` and after of sequence b.

    Args:
        k: `[batch, seqlen_kv, n_kv_heads, d]`, left as it is.
        v: as k.
        k_new: `[batch, s, n_kv_heads, d]`, converted to the dtype of the cache.
        v_new: as k_new.
        positions: integers `[batch]`, the row of a sequence's first new token; -1 is an inactive slot, whose new
            rows are not looked at.

    Returns:
        New arrays for k and v.

    Raises:
        ValueError, TypeError: shapes that do not fit together, rows outside the cache.
    """
    slots = _slots(k, v, k_new, v_new, positions)
    batch, seqlen_kv = k.shape[:2]
    if len(k_new) != batch:
        raise ValueError(f"k_new: received {len(k_new)} sequences, allowed the {batch} of k")
    for _, tokens in slots:
        if len(tokens) and tokens[-1] >= seqlen_kv:
            raise ValueError(f"positions: received rows {tokens[0]} to {tokens[-1]}, allowed 0 to {seqlen_kv - 1}")
    k, v = k.copy(), v.copy()
    for b, tokens in slots:
        k[b, tokens] = k_new[b]
        v[b, tokens] = v_new[b]
    return k, v


def append_kv_paged(
    k_pages: Array, v_pages: Array, k_new: Array, v_new: Array, block_table: Array, positions: Array
) -> Cache:
    """`append_kv` to a paged cache.

    Args:
        k_pages: `[n_blocks, n_kv_heads, block_size, d]`, left as it is.
        v_pages: as k_pages.
        k_new: `[batch, s, n_kv_heads, d]`, converted to the dtype of the cache.
        v_new: as k_new.
        block_table: integers `[batch, max_blocks]`, -1 is no page.
        positions: integers `[batch]`, as in `append_kv`.

    Returns:
        New arrays for k_pages and v_pages.

    Raises:
        ValueError, TypeError: as `append_kv`; a row has no page, or two sequences write the same row.
    """
    slots = _slots(k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2), k_new, v_new, positions)
    table = integers("block_table", block_table, (len(k_new), np.shape(block_table)[-1]))
    rows = [(b, page_rows(table[b], tokens, k_pages.shape)) for b, tokens in slots]
    written = [row for _, (blocks, _, within) in rows for row in zip(blocks.tolist(), within.tolist(), strict=True)]
    if len(set(written)) != len(written):
        raise ValueError(f"block_table: received {table}, allowed no row of a page written twice")
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for b, at in rows:
        k_pages[at] = k_new[b]
        v_pages[at] = v_new[b]
    return k_pages, v_pages


def _slots(k: Array, v: Array, k_new: Array, v_new: Array, positions: Array) -> list[tuple[int, Array]]:
    """Active sequences and the rows of their new tokens; k, v with the token's axis before that of the heads."""
    for name, cache, new in (("k_new", k, k_new), ("v_new", v, v_new)):
        if cache.ndim != 4 or new.ndim != 4 or new.shape[2:] != cache.shape[2:]:
            raise ValueError(f"{name}: received shape {new.shape}, allowed (batch, s, *{cache.shape[2:]})")
    if v.shape[:3] != k.shape[:3] or v_new.shape[:3] != k_new.shape[:3]:
        raise ValueError(
            f"k and v: received {k.shape} and {v.shape}, new {k_new.shape} and {v_new.shape}, allowed equal but for d"
        )
    batch, s = k_new.shape[:2]
    first = integers("positions", positions, (batch,))
    if (first < -1).any():
        raise ValueError(f"positions: received {first}, allowed -1 or a row")
    return [(b, np.arange(p, p + s)) for b, p in enumerate(first.tolist()) if p >= 0]
