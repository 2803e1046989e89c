"""What the decode operators do: lengths and tables read on the host, a launch for them, the kernels on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contributed._checks import PARTITIONS, require
from contributed._decode_checks import MAX_INDEX, SEQLEN_MAX, SINK_MAX, SLOPE_MAX
from contributed._decode_launch import Options, launch, nl_type
from contributed._decode_plan import FlatCache, PagedCache
from contributed._sparse_launch import TileLaunch, tile_launch
from contributed.flash_decode import combine_splits, flash_decode_fwd
from contributed.skip_softmax_decode import skip_softmax_decode_fwd
from contributed.sparse_decode import INDEX_MAX, gated_decode_fwd, sparse_decode_fwd
from nki_torch import _check as check
from nki_torch._device import is_simulated, kept_launch, n_cores, one_core, run

Array = np.ndarray[Any, np.dtype[Any]]

BSHD = "bshd"  # [batch, keys, n_kv_heads, d]
PACKED = "packed"  # [total, n_kv_heads, d] with cu_seqlens
BHSD = "bhsd"  # [batch, n_kv_heads, keys, d], as kernels take it
D_MAJOR = "d-major"  # K [batch, n_kv_heads, d, keys], V as BHSD
PAGES = "pages"  # [n_blocks, n_kv_heads, block_size, d] with a block table
PAGES_BSHD = "pages-bshd"  # [n_blocks, block_size, n_kv_heads, d] with a block table


@dataclass(frozen=True)
class Keys:
    """A KV cache in kernel layout, and which keys of it are used.

    Args:
        k: [batch, n_kv_heads, keys, d] (batch 1 if packed), pages, or [batch, n_kv_heads, d, keys].
        v: as the first two.
        n_kv_heads: KV heads.
        lengths: keys of each sequence.
        room: keys that a sequence may have.
        longest: what no sequence is longer than, at least 1.
        cache: where keys lie.
        d_major_keys: keys per row of d-major K, None for s-major.
        data: what the cache depends on beside its shape.
    """

    k: Tensor
    v: Tensor
    n_kv_heads: int
    lengths: tuple[int, ...]
    room: int
    longest: int
    cache: FlatCache | PagedCache
    d_major_keys: int | None
    data: tuple[Any, ...]


def keys_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    names: tuple[str, str, str],
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    max_seqlen: int | None,
    left: int | None,
) -> Keys:
    """The cache of a call; q [batch, s, n_q_heads, d]. `names` are the caller's of seqlens, cu_seqlens, max_seqlen."""
    batch, s, _, d = q.shape
    first: tuple[int, ...] | None = None
    table: Array | None = None
    cache: FlatCache | PagedCache
    if layout == PACKED:
        assert cu_seqlens is not None
        cu = check.ascending(names[1], cu_seqlens, k.shape[0])
        first, room = cu[:-1], np.diff(cu)
    elif layout in (PAGES, PAGES_BSHD):
        assert block_table is not None
        table = check.read(block_table)
        room = np.full(batch, table.shape[1] * k.shape[2 if layout == PAGES else 1])
    else:
        room = np.full(batch, k.shape[{BSHD: 1, BHSD: 2, D_MAJOR: 3}[layout]])
    used = tuple(int(n) for n in room) if seqlens is None else check.lengths(names[0], seqlens, room)
    longest = max(1, int(room.max()))
    if max_seqlen is not None:
        allowed = f"{max(used)}, the longest of the sequences, .. {SEQLEN_MAX}"
        require(max(used) <= max_seqlen <= SEQLEN_MAX, names[2], received=max_seqlen, allowed=allowed)
        longest = max(1, max_seqlen)
    size = k.numel() // d if layout in (PAGES, PAGES_BSHD) else k.numel()
    require(size <= MAX_INDEX, "size of the cache", received=size, allowed=f"at most {MAX_INDEX}")

    if layout == PACKED:
        k, v = (x[None].transpose(1, 2) for x in (k, v))
    elif layout == BSHD:
        k, v = (x.transpose(1, 2) for x in (k, v))
    elif table is not None:
        n_blocks, block_size = k.shape[0], k.shape[2 if layout == PAGES else 1]
        firsts = _check_pages(table, used, s, left, n_blocks, block_size)
        if layout == PAGES_BSHD:
            table, pages = _used_pages(table, used, firsts, block_size)
            index = torch.from_numpy(pages).to(k.device)
            k, v = (x.index_select(0, index).transpose(1, 2) for x in (k, v))
    if v.shape[2] == 0 or v.shape[0] == 0:
        # A gather needs a row to skip.
        k, v = (x.new_zeros(max(1, x.shape[0]), x.shape[1], max(1, x.shape[2]), d) for x in (k, v))
    n_kv_heads = k.shape[1]
    data: tuple[Any, ...] = (used,)
    if table is None:
        cache = FlatCache(n_kv_heads, v.shape[2], first)
        data += (first,)
    else:
        cache = PagedCache(n_kv_heads, k.shape[2], table)
        data += (table.shape, table.tobytes())
    d_major_keys = k.shape[3] if layout == D_MAJOR else None
    most = int(room.max())
    return Keys(k.contiguous(), v.contiguous(), n_kv_heads, used, most, longest, cache, d_major_keys, data)


def default_threshold(keys: Keys, max_seqlen: int | None) -> float:
    """The public functions' own: d over the keys that there is room for, or over `max_seqlen`."""
    d = keys.v.shape[3]
    return min(1.0, d / max(1, keys.room if max_seqlen is None else max_seqlen))


def _check_pages(
    table: Array, used: tuple[int, ...], s: int, left: int | None, n_blocks: int, size: int
) -> tuple[int, ...]:
    """Every key that a query sees has a page; those before a window may be gone. Returns the first block in use."""
    firsts = []
    for b, n in enumerate(used):
        first = 0 if left is None else max(0, n - s - left)
        firsts.append(first // size)
        entries = table[b, first // size : -(-n // size)]
        good = bool(((entries >= 0) & (entries < n_blocks)).all())
        allowed = f"pages 0..{n_blocks - 1} for keys {first}..{n - 1} of sequence {b}"
        require(good, f"block_table[{b}]", received=entries.tolist(), allowed=allowed)
    return tuple(firsts)


def _used_pages(table: Array, used: tuple[int, ...], firsts: tuple[int, ...], size: int) -> tuple[Array, Array]:
    """A table over the pages in use alone, and which they are; of these a power of two, as `padded` says."""
    blocks = np.arange(table.shape[1])
    ends = -(-np.array(used) // size)
    seen = (blocks >= np.array(firsts)[:, None]) & (blocks < ends[:, None])
    pages, numbers = np.unique(table[seen], return_inverse=True)
    compact = np.full_like(table, -1)
    compact[seen] = numbers.reshape(-1)
    return compact, padded(pages)


def padded(pages: Array) -> Array:
    """Numbers of pages, and the first of them again up to a power of two: few shapes, and few programs, for any use."""
    most = 1 << max(0, pages.size - 1).bit_length()
    return np.concatenate([pages, np.full(most - pages.size if pages.size else 0, pages[:1].sum())]).astype(np.int64)


def per_head(name: str, x: Tensor | None) -> Array | None:
    """Sinks or slopes on the host."""
    if x is None:
        return None
    values: Array = x.detach().cpu().numpy()
    most = SINK_MAX if name == "sinks" else SLOPE_MAX
    allowed = f"finite numbers in -{most}..{most}"
    require(bool((np.abs(values) <= most).all()), name, received=values.tolist(), allowed=allowed)
    return values


def dense(
    q: Tensor,
    keys: Keys,
    options: Options,
    n_splits: int | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`flash_decode`: o of q's shape, [batch, s, n_q_heads, d], and lse [batch, s, n_q_heads] or [0]."""
    cores = n_cores(q.device)

    def make() -> Any:
        return launch(
            flash_decode_fwd,
            combine_splits,
            keys.cache,
            keys.lengths,
            Options(left=options.left),
            q_shape=tuple(q.shape),
            n_kv_heads=keys.n_kv_heads,
            itemsize=keys.k.element_size(),
            most_keys=keys.longest,
            n_splits=n_splits,
            n_cores=cores,
            with_lse=with_lse,
            d_major_keys=keys.d_major_keys,
        )

    how = {
        "left": options.left,
        "n_splits": n_splits,
        "max_seqlen": keys.longest,
        "lse": with_lse,
        "k_d_major": keys.d_major_keys is not None,
        "n_cores": cores,
    }
    kept = kept_launch("flash_decode", (q, keys.k, keys.v), make, options=how, data=keys.data)
    made = replace(kept.launch, options=options)
    g = made.geometry
    kernel = made.decode[2] if g.n_cores == 2 else made.decode
    o, *rest = run(kernel, made.arguments(q, keys.k, keys.v), q.device, kept)
    if g.n_splits > 1:
        o, *rest = run(made.combine, made.combine_arguments(q, o, rest[0]), q.device)
    lse = rest[0].reshape(q.shape[:3]) if with_lse else nothing(q)
    return o.reshape(q.shape), lse


def nothing(q: Tensor) -> Tensor:
    """In the place of results that nobody asked for."""
    return q.new_empty(0, dtype=torch.float32)


def tiles(
    rule: str,
    q: Tensor,
    keys: Keys,
    *,
    softmax_scale: float | None,
    left: int | None,
    tile_kv: int,
    n_splits: int,
    with_lse: bool,
    with_stats: bool,
    arguments: Callable[[TileLaunch], tuple[Any, ...]],
) -> tuple[Tensor, Tensor, Tensor]:
    """A rule that leaves out tiles of keys: o, lse or [0], and int64 (tiles, those left out) or [0].

    Tiles are counted per query head, summed over all of them.
    """
    kernel, right_to_left, gated = {
        "skip_softmax_decode": (skip_softmax_decode_fwd, False, False),
        "sparse_decode": (sparse_decode_fwd, True, False),
        "gated_decode": (gated_decode_fwd, True, True),
    }[rule]
    assert isinstance(keys.cache, FlatCache)
    cache = keys.cache
    if gated:
        one_core(q.device, rule)
    cores = 1 if gated else n_cores(q.device)

    def make() -> TileLaunch:
        return tile_launch(
            kernel,
            combine_splits,
            cache,
            keys.lengths,
            q_shape=tuple(q.shape),
            n_kv_heads=keys.n_kv_heads,
            itemsize=keys.k.element_size(),
            most_keys=keys.longest,
            tile_kv=tile_kv,
            right_to_left=right_to_left,
            softmax_scale=softmax_scale,
            left=left,
            n_splits=n_splits,
            n_cores=cores,
            with_lse=with_lse,
            with_stats=with_stats,
            d_major_keys=keys.d_major_keys,
            gated=gated,
        )

    how = {
        "softmax_scale": softmax_scale,
        "left": left,
        "tile_kv": tile_kv,
        "n_splits": n_splits,
        "max_seqlen": keys.longest,
        "lse": with_lse,
        "stats": with_stats,
        "k_d_major": keys.d_major_keys is not None,
        "n_cores": cores,
    }
    kept = kept_launch(rule, (q, keys.k, keys.v), make, options=how, data=keys.data)
    made: TileLaunch = kept.launch
    on_cores = made.kernel[2] if made.geometry.n_cores == 2 else made.kernel
    o, *rest = run(on_cores, arguments(made), q.device, kept)
    lse = rest.pop(0) if with_lse or n_splits > 1 else None
    counts = nothing(q).to(torch.int64)
    if with_stats:
        # Of a sequence and split, tiles of one KV head; every query head decides on as many, or its group does.
        total = int(made.plan.tiles.sum()) * q.shape[2]
        kept_tiles = rest[0].round().to(torch.int32).sum()
        counts = torch.stack([torch.full_like(kept_tiles, total), total - kept_tiles])
    if n_splits > 1:
        assert lse is not None
        rows = (o.reshape(n_splits, -1, q.shape[3]), lse.reshape(n_splits, -1))
        o, lse = run(made.combine, (*rows, nl_type(q), None), q.device)
    return o.reshape(q.shape), lse.reshape(q.shape[:3]) if with_lse and lse is not None else nothing(q), counts


def sparse(
    q: Tensor, keys: Keys, threshold: float, arguments: dict[str, Any], *, with_lse: bool, rule: str = "sparse_decode"
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_decode` or `skip_softmax_decode` with a threshold above 0."""
    return tiles(
        rule,
        q,
        keys,
        **arguments,
        with_lse=with_lse,
        arguments=lambda made: made.arguments(q, keys.k, keys.v, [threshold] * len(keys.lengths)),
    )


def gated(
    q: Tensor,
    keys: Keys,
    alpha: Tensor,
    delta: Tensor,
    softmax_threshold: float,
    gate_threshold: float,
    is_logsigmoid_gate: bool,
    arguments: dict[str, Any],
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_decode`; delta has an element for each row of K, in its order."""
    require(delta.numel() <= INDEX_MAX, "delta size", received=delta.numel(), allowed=f"at most {INDEX_MAX}")
    if is_simulated(alpha.device):
        finite = bool(torch.isfinite(alpha).all())
        require(finite, "alpha", received=alpha.tolist(), allowed="finite numbers")
    # An empty cache is one row, which is not used.
    deltas = delta.contiguous() if delta.numel() else delta.new_zeros(keys.k.shape[:3])
    n = len(keys.lengths)

    def of(made: TileLaunch) -> tuple[Any, ...]:
        assert made.gates is not None
        listed = made.gates.n_steps * PARTITIONS * made.geometry.n_lanes
        received = f"work with room for {listed} runs of keys"
        require(listed <= INDEX_MAX, "batch * n_kv_heads", received=received, allowed=f"at most {INDEX_MAX}")
        return made.gated_arguments(
            q,
            keys.k,
            keys.v,
            alpha.float(),
            deltas,
            [softmax_threshold] * n,
            [gate_threshold] * n,
            is_logsigmoid=is_logsigmoid_gate,
            fast=True,
        )

    return tiles("gated_decode", q, keys, **arguments, with_lse=with_lse, arguments=of)
