"""What the append operator does: numbers of the rows that new tokens go to, and the kernel that writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from contributed._checks import require
from contributed.append_kv import MAX_INDEX, append_rows, append_rows_k_d_major, row_indices
from nki_torch import _check as check
from nki_torch._decode_impl import BSHD, D_MAJOR, PAGES_BSHD
from nki_torch._device import is_simulated, n_cores, run

Array = np.ndarray[Any, np.dtype[Any]]


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    layout: str,
    name: str,
    inactive: bool,
) -> None:
    """Write k and v [batch, s, n_kv_heads, d] into caches of a layout of `_decode_impl`, from row `positions` on."""
    s, n_kv_heads, d = k.shape[1:]
    size = v_cache.shape[1 if layout in (BSHD, PAGES_BSHD) else 2]
    first = check.read(positions)
    table = None if block_table is None else check.read(block_table)
    room = size if table is None else size * table.shape[1]
    for b, position in enumerate(first):
        allowed = f"{'-1, or ' if inactive else ''}0..{room - s}: {s} new tokens in {room} rows"
        good = 0 <= position <= room - s or (inactive and position == -1)
        require(bool(good), f"{name}[{b}]", received=int(position), allowed=allowed)
    if k.numel() == 0 or bool((first == -1).all()):
        return
    tokens = first[:, None] + np.arange(s)
    if table is None:
        owner = np.where(first[:, None] < 0, -1, np.broadcast_to(np.arange(len(first))[:, None], tokens.shape))
        within = tokens
    else:
        owner, within = _pages(table, first, tokens, size, v_cache.shape[0])
    elements = k_cache.numel() if layout == D_MAJOR else k_cache.numel() // d
    require(elements <= MAX_INDEX, "size of the cache", received=elements, allowed=f"at most {MAX_INDEX}")
    caches = [x if x.is_contiguous() else x.contiguous() for x in (k_cache, v_cache)]
    new = (k.contiguous(), v.contiguous())
    if layout in (BSHD, PAGES_BSHD):
        # Heads lie next to each other: a token's row is its number among all, times the heads.
        rows = row_indices(np.where(owner < 0, -1, owner * size + within), np.zeros_like(within), n_kv_heads, 1)
    else:
        rows = row_indices(owner, within, n_kv_heads, size)
    kernel = append_rows
    numbers: tuple[Array, ...] = (rows,)
    if layout == D_MAJOR:
        kernel, numbers = append_rows_k_d_major, (row_indices(owner, within, n_kv_heads, size * d), rows)
    if n_cores(k.device) == 2:
        kernel = kernel[2]
    written = run(kernel, (*caches, *new, *numbers, None), k.device)
    for cache, work, result in zip((k_cache, v_cache), caches, written, strict=True):
        if not is_simulated(k.device):
            cache.copy_(result)
        elif work is not cache:
            cache.copy_(work)


def _pages(table: Array, first: Array, tokens: Array, size: int, n_blocks: int) -> tuple[Array, Array]:
    """Page and row of every new token; -1 for sequences that get none."""
    owner, within = np.full(tokens.shape, -1), np.zeros(tokens.shape, np.int64)
    for b in np.flatnonzero(first >= 0):
        owner[b], within[b] = table[b, tokens[b] // size], tokens[b] % size
        good = bool(((owner[b] >= 0) & (owner[b] < n_blocks)).all())
        allowed = f"pages 0..{n_blocks - 1} for rows {tokens[b, 0]}..{tokens[b, -1]}"
        require(good, f"block_table[{b}]", received=owner[b].tolist(), allowed=allowed)
    written = (owner * size + within)[owner >= 0]
    unique = np.unique(written).size == written.size
    require(unique, "block_table", received=table.tolist(), allowed="no row of a page for two of the new tokens")
    return owner, within
