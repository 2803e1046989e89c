"""Which rows of a cache belong to a sequence: flat, packed and paged layouts, lengths and block tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from reference.decode import Array

Cache = tuple[Array, Array]


def caches(
    k: Array, v: Array, batch: int, seqlens_kv: Array | None = None, cu_seqlens_kv: Array | None = None
) -> list[Cache]:
    """Keys and values `[length, n_kv_heads, d]` of each sequence: views of a flat or packed cache, rows in use only."""
    ndim, layout = (4, "batch, seqlen_kv") if cu_seqlens_kv is None else (3, "total")
    if k.ndim != ndim or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k, v: received shapes {k.shape}, {v.shape}, allowed the same ({layout}, n_kv_heads, d)")
    if cu_seqlens_kv is None:
        if k.shape[0] != batch:
            raise ValueError(f"k: received {k.shape[0]} sequences, allowed the {batch} of q")
        owned = list(zip(k, v, strict=True))
    else:
        cu = integers("cu_seqlens_kv", cu_seqlens_kv, (batch + 1,))
        if cu[0] < 0 or cu[-1] > k.shape[0] or (np.diff(cu) < 0).any():
            raise ValueError(f"cu_seqlens_kv: received {cu}, allowed to ascend from 0 to {k.shape[0]}")
        owned = [(k[a:b], v[a:b]) for a, b in pairwise(cu)]
    if seqlens_kv is None:
        return owned
    used = integers("seqlens_kv", seqlens_kv, (batch,))
    for n, (keys, _) in zip(used, owned, strict=True):
        if not 0 <= n <= len(keys):
            raise ValueError(f"seqlens_kv: received {n}, allowed 0 to {len(keys)}")
    return [(keys[:n], values[:n]) for n, (keys, values) in zip(used, owned, strict=True)]


def gather_pages(pages: Array, block_table: Array, seqlens_kv: Array) -> tuple[Array, Array]:
    """The rows in use of a paged cache, packed `[total, n_kv_heads, d]`, and their `cu_seqlens_kv`."""
    batch = len(block_table)
    table = integers("block_table", block_table, (batch, np.shape(block_table)[-1]))
    used = integers("seqlens_kv", seqlens_kv, (batch,))
    rows = []
    for entries, n in zip(table, used, strict=True):
        if n < 0:
            raise ValueError(f"seqlens_kv: received {n}, allowed at least 0")
        rows.append(pages[page_rows(entries, np.arange(n), pages.shape)])
    cu_seqlens_kv = np.concatenate([[0], np.cumsum(used)])
    empty = np.zeros((0, pages.shape[1], pages.shape[3]), pages.dtype)
    return np.concatenate([empty, *rows]), cu_seqlens_kv


def page_rows(entries: Array, tokens: Array, pages: tuple[int, ...]) -> tuple[Array, slice, Array]:
    """Index into pages of the given shape of a sequence's `tokens`, through its row of the block table."""
    n_blocks, _, block_size, _ = pages
    needed = tokens // block_size
    if len(tokens) and needed.max() >= len(entries):
        raise ValueError(f"block_table: received {len(entries)} blocks of {block_size}, needed {needed.max() + 1}")
    blocks = entries[needed]
    if ((blocks < 0) | (blocks >= n_blocks)).any():
        raise ValueError(f"block_table: received {entries}, needed pages 0 to {n_blocks - 1} for every row in use")
    return blocks, slice(None), tokens % block_size


def integers(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """An argument that has to be an integer array of a shape, as int64."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: received {array.dtype}, allowed integers")
    if array.shape != shape:
        raise ValueError(f"{name}: received shape {array.shape}, allowed {shape}")
    return array.astype(np.int64)
