"""Prefill attention: rows of new queries against the keys of their sequence, dense, N:M sparse or with tiles skipped.

    p         = i + len_kv - len_q                    position of query i of a sequence: queries are its last rows
    s[i, j]   = softmax_scale * q[i, h] . k[j, h // group]        -inf where key j is not visible to p
    N:M         of every group of M keys `M t` to `M t + M - 1` the N largest scores of a row stay, others become -inf
    skip        a tile of tile_q rows and tile_kv keys, left to right, iff for all its rows
                max_j s[i, j] < m[i] + log(skip_softmax_threshold)       m: largest s[i] before the tile, -inf at first
    o, lse    = softmax attention over the scores that are left; lse is a natural logarithm

Key j is visible to position p iff j <= p (causal), p - left <= j and j <= p + right. N:M comes before the skip test.

N:M applies to sequences with more than one query. Scores that are not visible rank as -inf. With M = 4 the lower index
wins a tie and N scores stay; with M = 8 every score equal to the N-th largest stays. Keys j < dense_sink_tokens, and
keys with 0 <= p - j < dense_recent_tokens, take part in the ranking and stay whatever their rank.

Each query head decides for itself about its tiles. Rows are counted from the first query of a sequence and keys from
its first key; tiles without a visible key are neither visited nor counted. A row that has seen nothing before a tile
has m = -inf and keeps it. As the threshold is at most 1, a skipped tile cannot raise m: m is the maximum of all tiles
before, and no decision depends on another one.

A row that sees nothing (no keys, a window beside all of them, a causal row before the first key) has o = 0, lse = -inf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from reference.caches import integers
from reference.decode import Array, attend, group_size
from reference.flash_decode import Window
from reference.sparse_decode import keys_of_tiles, log_threshold, running_max, tile_maxima, visible_tiles


class PrefillStats(NamedTuple):
    """Which tiles a call visits and keeps, and how close its decisions are."""

    tiles_total: Array
    """Tiles with a visible key, int64 `[batch, n_q_heads]`."""
    tiles_skipped: Array
    """int64 `[batch, n_q_heads]`."""
    kept: list[Array]
    """Per sequence, bool `[n_q_heads, n_tiles_q, n_tiles_kv]`; False where a tile is not visited."""
    margin: Array
    """Distance of the closest decision about a tile from the other one, in units of s, `[batch, n_q_heads]`.

    inf where nothing is tested: no threshold, decisions that are replayed, tiles that some row sees first.
    """
    selection_margin: Array
    """The same for N:M, `[batch, n_q_heads]`: the smallest distance of a score from the one that it would have to pass.

    Exact ties are left out. Their rule decides them wherever the machine's scores tie too: those of equal keys, and
    those of inputs so coarse that their sums are exact.
    """


class FlashAttention(NamedTuple):
    """Output `o` in the layout of q, natural log-sum-exp `lse` in that of q without d, both float64, and `stats`."""

    o: Array
    lse: Array
    stats: PrefillStats


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    causal: bool = True,
    window_size: Window = (None, None),
    softmax_scale: float | None = None,
    sparsity_n: int | None = 0,
    sparsity_m: int = 4,
    dense_sink_tokens: int = 0,
    dense_recent_tokens: int = 64,
    skip_softmax_threshold: float | None = None,
    tile_q: int = 128,
    tile_kv: int = 128,
    kept: Sequence[Array] | None = None,
) -> FlashAttention:
    """Prefill attention of a batch.

    Args:
        q: `[batch, seqlen_q, n_q_heads, d]`, or packed `[total_q, n_q_heads, d]` with both `cu_seqlens`.
        k: `[batch, seqlen_kv, n_kv_heads, d]`, or packed `[total_kv, n_kv_heads, d]`, as q. Keys that no row of a
            tile sees may hold anything.
        v: as k. Keys that no row and head of a group weighs in a tile of queries may hold anything.
        cu_seqlens_q: integers `[batch + 1]`; sequence b owns rows `cu[b]:cu[b + 1]`. Other rows get o = 0, lse = -inf.
        cu_seqlens_kv: the same for k and v.
        causal: whether keys after a query's own position are hidden.
        window_size: `(left, right)`, keys visible before and after a query's own position; None is unlimited.
        softmax_scale: multiplies q . k; None means `d ** -0.5`.
        sparsity_n: scores of a group that stay, up to sparsity_m; None, 0 and sparsity_m are dense.
        sparsity_m: keys of a group, 4 or 8.
        dense_sink_tokens: first keys that N:M leaves alone.
        dense_recent_tokens: keys up to a query's own position that N:M leaves alone.
        skip_softmax_threshold: in (0, 1]; None or 0 keeps every tile.
        tile_q: query rows per tile, at least 1.
        tile_kv: keys per tile, at least 1.
        kept: decisions to replay, as in `PrefillStats`; nothing is tested against the threshold then.

    Returns:
        The attention and the decisions.

    Raises:
        ValueError, TypeError: shapes that do not fit together, spans outside the arrays, options out of range, a kept
            tile that is not visited.
    """
    call = Prefill.of(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        sparsity_n=sparsity_n,
        sparsity_m=sparsity_m,
        dense_sink_tokens=dense_sink_tokens,
        dense_recent_tokens=dense_recent_tokens,
        skip_softmax_threshold=skip_softmax_threshold,
        tile_q=tile_q,
        tile_kv=tile_kv,
        kept=kept,
    )
    n_q_heads = q.shape[-2]
    o, lse = np.zeros((*call.q.shape[:2], v.shape[-1])), np.full(call.q.shape[:2], -np.inf)
    per_head = (len(call.spans), n_q_heads)
    total, skipped = np.zeros(per_head, np.int64), np.zeros(per_head, np.int64)
    margin, selection_margin = np.full(per_head, np.inf), np.full(per_head, np.inf)
    decided = [np.zeros((n_q_heads, *call.n_tiles(b)), np.bool_) for b in range(len(call.spans))]
    for tile in call.tiles():
        b, heads = tile.sequence, tile.heads
        read = tile.read
        result = attend(tile.scores[..., read], call.v[tile.keys, tile.kv][read])
        o[tile.rows, heads], lse[tile.rows, heads] = result.o.swapaxes(0, 1), result.lse.T
        decided[b][heads, tile.row_tile, tile.tiles.start : tile.tiles.stop] = tile.kept
        total[b, heads] += len(tile.tiles)
        skipped[b, heads] += len(tile.tiles) - tile.kept.sum(axis=1)
        margin[b, heads] = np.minimum(margin[b, heads], tile.margin)
        selection_margin[b, heads] = np.minimum(selection_margin[b, heads], tile.selection_margin)
    stats = PrefillStats(total, skipped, decided, margin, selection_margin)
    return FlashAttention(o.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1]), stats)


class Tile(NamedTuple):
    """The rows of one tile of queries, for the query heads of one KV head, and the keys that some of them see."""

    sequence: int
    row_tile: int
    """The tile's number in its sequence."""
    kv: int
    heads: slice
    """The query heads of the group."""
    rows: slice
    """In the packed q."""
    keys: slice
    """In the packed k and v, n of them."""
    tiles: range
    """The tiles of keys that are visited."""
    kept: Array
    """Which of them each head keeps, bool `[group, len(tiles)]`."""
    scores: Array
    """Float64 `[group, n_rows, n]`, -inf for what is not weighed."""
    margin: Array
    """`[group]`, as in `PrefillStats`."""
    selection_margin: Array
    """`[group]`, as in `PrefillStats`."""

    @property
    def read(self) -> Array:
        """Which of the keys some row and head weighs, bool `[n]`."""
        return np.asarray(~np.isneginf(self.scores).all(axis=(0, 1)))


class Rules(NamedTuple):
    """The options of one call, checked."""

    scale: float
    causal: bool
    left: int | None
    right: int | None
    sparsity_n: int
    """0 is dense."""
    sparsity_m: int
    dense_sink_tokens: int
    dense_recent_tokens: int
    log_lambda: float
    """-inf keeps every tile."""
    tile_q: int
    tile_kv: int

    def span(self, first: int, last: int, len_kv: int) -> tuple[int, int]:
        """First key that some query at positions `first` to `last` sees, and the one after the last."""
        begin = 0 if self.left is None else max(0, first - self.left)
        ahead = 0 if self.causal else self.right
        end = len_kv if ahead is None else min(len_kv, last + ahead + 1)
        return (begin, end) if begin < end else (0, 0)

    def visible(self, positions: Array, keys: Array) -> Array:
        """Whether each position sees each key: bool `[len(positions), len(keys)]`."""
        distance = positions[:, None] - keys
        seen = np.ones(distance.shape, np.bool_)
        if self.causal:
            seen &= distance >= 0
        if self.left is not None:
            seen &= distance <= self.left
        if self.right is not None:
            seen &= -distance <= self.right
        return seen

    def exempt(self, positions: Array, keys: Array) -> Array:
        """Whether N:M leaves a key alone: bool `[len(positions), len(keys)]`."""
        distance = positions[:, None] - keys
        recent = (distance >= 0) & (distance < self.dense_recent_tokens)
        return np.asarray(recent | (keys < self.dense_sink_tokens))


class Prefill(NamedTuple):
    """One call, with its sequences packed end to end; float64."""

    q: Array
    """`[total_q, n_q_heads, d]`."""
    k: Array
    """`[total_kv, n_kv_heads, d]`."""
    v: Array
    spans: list[tuple[slice, slice]]
    """Rows of q and of k and v, per sequence."""
    rules: Rules
    replayed: Sequence[Array] | None

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        *,
        cu_seqlens_q: Array | None = None,
        cu_seqlens_kv: Array | None = None,
        causal: bool = True,
        window_size: Window = (None, None),
        softmax_scale: float | None = None,
        sparsity_n: int | None = 0,
        sparsity_m: int = 4,
        dense_sink_tokens: int = 0,
        dense_recent_tokens: int = 64,
        skip_softmax_threshold: float | None = None,
        tile_q: int = 128,
        tile_kv: int = 128,
        kept: Sequence[Array] | None = None,
    ) -> Prefill:
        """Check and complete the arguments that `flash_attention` describes."""
        spans = _spans(q, k, v, cu_seqlens_q, cu_seqlens_kv)
        if k.shape[-1] != q.shape[-1]:
            raise ValueError(f"k: received head dim {k.shape[-1]}, allowed the {q.shape[-1]} of q")
        group_size(q.shape[-2], k.shape[-2])
        left, right = window_size
        if any(side is not None and side < 0 for side in window_size):
            raise ValueError(f"window_size: received {window_size}, allowed None or at least 0 on each side")
        if sparsity_m not in (4, 8):
            raise ValueError(f"sparsity_m: received {sparsity_m}, allowed 4 or 8")
        if not 0 <= (sparsity_n or 0) <= sparsity_m:
            raise ValueError(f"sparsity_n: received {sparsity_n}, allowed None or 0 to {sparsity_m}")
        if dense_sink_tokens < 0 or dense_recent_tokens < 0:
            received = f"{dense_sink_tokens}, {dense_recent_tokens}"
            raise ValueError(f"dense_sink_tokens, dense_recent_tokens: received {received}, allowed at least 0")
        if tile_q < 1 or tile_kv < 1:
            raise ValueError(f"tile_q, tile_kv: received {tile_q}, {tile_kv}, allowed at least 1")
        rules = Rules(
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
            causal=causal,
            left=left,
            right=right,
            sparsity_n=(sparsity_n or 0) % sparsity_m,
            sparsity_m=sparsity_m,
            dense_sink_tokens=dense_sink_tokens,
            dense_recent_tokens=dense_recent_tokens,
            log_lambda=log_threshold("skip_softmax_threshold", skip_softmax_threshold or 0.0),
            tile_q=tile_q,
            tile_kv=tile_kv,
        )
        packed = [x.reshape(-1, *x.shape[-2:]).astype(np.float64) for x in (q, k, v)]
        call = cls(packed[0], packed[1], packed[2], spans, rules, kept)
        if kept is not None:
            call._check_replayed(kept)
        return call

    def n_tiles(self, b: int) -> tuple[int, int]:
        """Tiles of queries and of keys of a sequence."""
        len_q, len_kv = self.lengths(b)
        return -(-len_q // self.rules.tile_q), -(-len_kv // self.rules.tile_kv)

    def lengths(self, b: int) -> tuple[int, int]:
        """Queries and keys of a sequence."""
        rows, keys = self.spans[b]
        return rows.stop - rows.start, keys.stop - keys.start

    def visits(self, b: int) -> list[tuple[int, int, int, int]]:
        """Rows begin, end and keys first, last of every tile of queries of a sequence, counted from its start."""
        len_q, len_kv = self.lengths(b)
        tile_q, ahead = self.rules.tile_q, len_kv - len_q
        edges = [(begin, min(begin + tile_q, len_q)) for begin in range(0, len_q, tile_q)]
        return [(begin, end, *self.rules.span(begin + ahead, end - 1 + ahead, len_kv)) for begin, end in edges]

    def tiles(self) -> Iterator[Tile]:
        """Every tile of queries of every sequence and KV head that sees a key."""
        rules, group = self.rules, self.q.shape[1] // self.k.shape[1]
        for b, (q_rows, k_rows) in enumerate(self.spans):
            len_q, len_kv = self.lengths(b)
            sparse = rules.sparsity_n > 0 and len_q > 1
            for kv in range(self.k.shape[1]):
                heads = slice(kv * group, (kv + 1) * group)
                queries = self.q[q_rows, heads].swapaxes(0, 1)
                for row_tile, (begin, end, first, last) in enumerate(self.visits(b)):
                    tiles = visible_tiles(first, last, rules.tile_kv)
                    if not tiles:
                        continue
                    keys = slice(k_rows.start + first, k_rows.start + last)
                    positions, columns = np.arange(begin, end) + len_kv - len_q, np.arange(first, last)
                    scores = _scores(queries[:, begin:end], self.k[keys, kv], rules.scale, sparse)
                    scores = np.where(rules.visible(positions, columns), scores, -np.inf)
                    selection_margin = np.full(group, np.inf)
                    if sparse:
                        scores, selection_margin = _select(scores, positions, columns, rules)
                    if self.replayed is None:
                        kept, margin = _decide(scores, first, tiles, rules)
                    else:
                        kept = self.replayed[b][heads, row_tile, tiles.start : tiles.stop]
                        margin = np.full(group, np.inf)
                    starts = first - tiles.start * rules.tile_kv
                    inside = keys_of_tiles(kept, starts, starts + last - first, rules.tile_kv)
                    scores = np.where(inside[:, None], scores, -np.inf)
                    rows = slice(q_rows.start + begin, q_rows.start + end)
                    yield Tile(b, row_tile, kv, heads, rows, keys, tiles, kept, scores, margin, selection_margin)

    def _check_replayed(self, kept: Sequence[Array]) -> None:
        if len(kept) != len(self.spans):
            raise ValueError(f"kept: received {len(kept)} sequences, allowed {len(self.spans)}")
        for b, decisions in enumerate(kept):
            shape = (self.q.shape[1], *self.n_tiles(b))
            if decisions.dtype != np.bool_ or decisions.shape != shape:
                raise ValueError(f"kept: received {decisions.dtype} {decisions.shape}, allowed bool {shape}")
            for row_tile, (_, _, first, last) in enumerate(self.visits(b)):
                tiles = visible_tiles(first, last, self.rules.tile_kv)
                if decisions[:, row_tile, : tiles.start].any() or decisions[:, row_tile, tiles.stop :].any():
                    received = f"{decisions[:, row_tile]} for tile {row_tile} of the queries"
                    raise ValueError(f"kept: received {received}, allowed only the visited {list(tiles)}")


def select_n_of_m(scores: Array, first: int, n: int, m: int) -> tuple[Array, Array]:
    """Which scores are among the n largest of their group of m.

    Args:
        scores: `[..., n_keys]` of keys `first` and after; -inf where a key is not visible.
        first: position of the first key.
        n: 1 to m - 1.
        m: 4, where ties go to the lower index, or 8, where all those tied with the n-th largest stay.

    Returns:
        Whether each score stays, and its distance from the one that it would have to pass: below it the largest
        of those that do not stay, above it the smallest of those that do. Both `[..., n_keys]`; where there is
        nothing to pass the distance is inf.
    """
    n_keys = scores.shape[-1]
    before, after = first % m, -(first + n_keys) % m
    filled = np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(before, after)], constant_values=-np.inf)
    groups = filled.reshape(*scores.shape[:-1], -1, m)
    ordered = np.sort(groups, axis=-1)
    smallest, largest_out = ordered[..., m - n, None], ordered[..., m - n - 1, None]
    stays = ~(groups < smallest)  # so that a score that is not a number stays, and shows
    if m == 4:
        tied = groups == smallest
        room = n - (groups > smallest).sum(axis=-1, keepdims=True)
        stays &= ~(tied & (np.cumsum(tied, axis=-1) > room))
    with np.errstate(invalid="ignore"):
        distance = np.where(stays, groups - largest_out, smallest - groups)
    distance = np.where(np.isnan(distance), np.inf, distance)  # what is not visible, of groups with too few to choose
    own = slice(before, before + n_keys)
    return stays.reshape(filled.shape)[..., own], distance.reshape(filled.shape)[..., own]


def _spans(
    q: Array, k: Array, v: Array, cu_seqlens_q: Array | None, cu_seqlens_kv: Array | None
) -> list[tuple[slice, slice]]:
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        raise ValueError("cu_seqlens_q, cu_seqlens_kv: received one, allowed both or none")
    ndim, layout = (4, "batch, seqlen") if cu_seqlens_q is None else (3, "total")
    if q.ndim != ndim:
        raise ValueError(f"q: received shape {q.shape}, allowed ({layout}, n_q_heads, d)")
    if k.ndim != ndim or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k, v: received shapes {k.shape}, {v.shape}, allowed the same ({layout}, n_kv_heads, d)")
    if cu_seqlens_q is None:
        batch = q.shape[0]
        if k.shape[0] != batch:
            raise ValueError(f"k: received {k.shape[0]} sequences, allowed the {batch} of q")
        bounds = [[b * x.shape[1] for b in range(batch + 1)] for x in (q, k)]
    else:
        batch = max(np.size(cu_seqlens_q) - 1, 0)
        bounds = [
            _cu_seqlens("cu_seqlens_q", cu_seqlens_q, batch, len(q)),
            _cu_seqlens("cu_seqlens_kv", cu_seqlens_kv, batch, len(k)),
        ]
    rows, keys = ([slice(a, b) for a, b in pairwise(cu)] for cu in bounds)
    return list(zip(rows, keys, strict=True))


def _cu_seqlens(name: str, value: Any, batch: int, total: int) -> list[int]:
    cu = integers(name, value, (batch + 1,))
    if cu[0] < 0 or cu[-1] > total or (np.diff(cu) < 0).any():
        raise ValueError(f"{name}: received {cu}, allowed to ascend from 0 to {total}")
    return [int(x) for x in cu]


def _scores(q: Array, k: Array, scale: float, ranked: bool) -> Array:
    """Scaled scores `[group, n_rows, n]` of q `[group, n_rows, d]` and k `[n, d]`.

    Ranked scores are all summed in the same order, so that equal keys tie; a matrix product does not promise that.
    """
    products = np.einsum("gic,jc->gij", np.ascontiguousarray(q), k) if ranked else q @ k.T
    return np.asarray(scale * products)


def _select(scores: Array, positions: Array, keys: Array, rules: Rules) -> tuple[Array, Array]:
    """Scores with -inf where N:M drops them, and the margin `[group]` of the selection."""
    stays, distance = select_n_of_m(scores, int(keys[0]), rules.sparsity_n, rules.sparsity_m)
    exempt = rules.exempt(positions, keys)
    distance = np.where(exempt | (distance == 0), np.inf, distance)
    return np.where(stays | exempt, scores, -np.inf), distance.min(axis=(1, 2), initial=np.inf)


def _decide(scores: Array, first: int, tiles: range, rules: Rules) -> tuple[Array, Array]:
    """Which tiles each head keeps, `[group, len(tiles)]`, and the margin `[group]` of the decisions."""
    largest = tile_maxima(scores, first, tiles, rules.tile_kv)
    limit = running_max(largest) + rules.log_lambda
    above = np.full_like(largest, np.inf)
    np.subtract(largest, limit, out=above, where=~np.isneginf(limit))
    closest = above.max(axis=1)
    return ~(closest < 0), np.abs(closest).min(axis=1, initial=np.inf)
