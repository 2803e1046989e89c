"""Shapes and inputs that self-checks and tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class DecodeCase:
    """One shape of a decode kernel and how its inputs are drawn.

    Args:
        name: id in tables and tests; a model's name where the shape is that model's.
        logits: size of the largest scaled scores; None leaves q and k standard normal; negative makes every
            score negative.
        needles: keys at these positions equal the sum of their group's queries, so that one of them
            dominates the softmax and a dropped or misplaced key shows.
    """

    name: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    seqlen_kv: int
    logits: float | None = None
    needles: tuple[int, ...] = ()

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        return f"q{self.n_q_heads}/kv{self.n_kv_heads} d{self.head_dim} s{self.seqlen_kv}"

    def inputs(self, dtype: Any, seed: int = 0) -> tuple[Array, Array, Array]:
        """q [n_q_heads, d], k and v [seqlen_kv, n_kv_heads, d] in `dtype`."""
        rng = np.random.default_rng(seed)
        q = rng.standard_normal((self.n_q_heads, self.head_dim))
        k = rng.standard_normal((self.seqlen_kv, self.n_kv_heads, self.head_dim))
        v = rng.standard_normal((self.seqlen_kv, self.n_kv_heads, self.head_dim))
        group = self.n_q_heads // self.n_kv_heads
        for position in self.needles:
            k[position] = q.reshape(self.n_kv_heads, group, self.head_dim).sum(axis=1)
        if self.logits is not None:
            if self.logits < 0:
                q, k = np.abs(q), -np.abs(k)
            scores = np.einsum("hgd,shd->hgs", q.reshape(self.n_kv_heads, group, -1), k) * self.head_dim**-0.5
            factor = np.sqrt(abs(self.logits) / np.abs(scores).max())
            q, k = q * factor, k * factor
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)


@dataclass(frozen=True)
class FlashCase:
    """One call of a batched decode kernel and how its inputs are drawn. Rows that no sequence uses hold NaN.

    Args:
        name: id in tables and tests; a model's name where heads, head dim and options are that model's.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        head_dim: d.
        lengths: keys of each sequence.
        s: new tokens per sequence.
        unused: rows of the cache after each sequence's keys; with `packed` also before the first sequence.
        packed: sequences lie one after the other in [total, n_kv_heads, d].
        d_major: the kernel gets K with d before the keys.
        n_splits: KV splits, None to let the wrapper choose.
        n_cores: of the launch, where a target has pairs.
        softmax_scale: None means d ** -0.5.
        window: keys visible to the left of a token, None for all.
        softcap: of the scores.
        sinks: whether there are sink logits.
        alibi: whether there are slopes, 2 ** (-8 h / n_q_heads) for head h = 1, 2, ...
        float8: K and V hold float8_e4m3 numbers, in that type beside a two-byte q and in q's type beside float32.
        k_scale: factor of keys, a number or one per KV head.
        v_scale: likewise of values.
        logits: as in `DecodeCase`.
        needles: as in `DecodeCase`, in every sequence that is long enough; the queries are the newest token's.
    """

    name: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    s: int = 1
    unused: int = 0
    packed: bool = False
    d_major: bool = False
    n_splits: int | None = None
    n_cores: int = 1
    softmax_scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    float8: bool = False
    k_scale: float | tuple[float, ...] | None = None
    v_scale: float | tuple[float, ...] | None = None
    logits: float | None = None
    needles: tuple[int, ...] = ()

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        heads = f"b{len(self.lengths)} q{self.n_q_heads}/kv{self.n_kv_heads} d{self.head_dim}"
        return f"{heads} s{max(self.lengths)}" + (f" new{self.s}" if self.s > 1 else "")

    def inputs(self, dtype: Any, seed: int = 0) -> tuple[Array, Array, Array, dict[str, Any]]:
        """q, k, v and keyword arguments of oracle and wrapper alike.

        q is [batch, s, n_q_heads, d], without s for one new token.
        """
        rng = np.random.default_rng(seed)
        batch, group = len(self.lengths), self.n_q_heads // self.n_kv_heads
        q = rng.standard_normal((batch, self.s, self.n_q_heads, self.head_dim))
        k, v = (rng.standard_normal((batch, max(self.lengths), self.n_kv_heads, self.head_dim)) for _ in "kv")
        by_group = q.reshape(batch, self.s, self.n_kv_heads, group, self.head_dim)
        for position in self.needles:
            for b in np.flatnonzero(np.array(self.lengths) > position):
                k[b, position] = by_group[b, -1].sum(axis=1)
        if self.logits is not None:
            if self.logits < 0:
                np.abs(q, out=q)
                np.negative(np.abs(k), out=k)
            scores = np.einsum("bihgd,bjhd->bihgj", by_group, k) * self.head_dim**-0.5
            factor = np.sqrt(abs(self.logits) / np.abs(scores).max())
            q, k = q * factor, k * factor
        options: dict[str, Any] = {"softmax_scale": self.softmax_scale, "softcap": self.softcap}
        options |= {"window_size": (self.window, None), "k_scale": self.k_scale, "v_scale": self.v_scale}
        if self.sinks:
            options["sinks"] = 3.0 * rng.standard_normal(self.n_q_heads)
        if self.alibi:
            options["alibi_slopes"] = 2.0 ** (-8.0 / self.n_q_heads * np.arange(1, self.n_q_heads + 1))
        stored = []
        for x in (k, v):
            x = x.astype(ml_dtypes.float8_e4m3) if self.float8 else x
            x = x if self.float8 and np.dtype(dtype).itemsize == 2 else x.astype(dtype)
            stored.append(in_cache(x, self.lengths, self.unused, self.packed))
        options |= cache_options(self.lengths, self.unused, self.packed)
        q = q.astype(dtype)
        return q if self.s > 1 else q[:, 0], stored[0], stored[1], options

    def launch(self, target: str | None) -> dict[str, Any]:
        """Keyword arguments of the wrapper alone: layout, splits and cores. trn1 and inf2 have no pairs of cores."""
        n_cores = 1 if target in ("trn1", "inf2") else self.n_cores
        return {"k_d_major": self.d_major, "n_splits": self.n_splits, "n_cores": n_cores}


@dataclass(frozen=True)
class SparseCase:
    """One call of a decode kernel that leaves out tiles of keys. Rows that no sequence uses hold NaN.

    Args:
        name: id in tables and tests; a model's name where heads and head dim are that model's.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        head_dim: d.
        lengths: keys of each sequence.
        threshold: below which a tile is left out.
        tile_kv: keys of a tile.
        n_splits: KV splits, for rules that have them.
        unused: as in `FlashCase`, like the next five.
        packed: sequences lie one after the other.
        d_major: the kernel gets K with d before the keys.
        n_cores: of the launch, where a target has pairs.
        softmax_scale: None means d ** -0.5.
        window: keys visible to the left of a token, None for all.
        needles: as in `FlashCase`.
        locality: scores of a run of neighbouring keys have a mean of about this size beside noise of size 1 (for
            softmax_scale None), so that some tiles matter more than others. Runs are three quarters of a tile. The
            heads of a group share most of a mean, as their queries have a part in common.
        seed: of the numbers.
    """

    name: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    threshold: float
    tile_kv: int = 128
    n_splits: int = 1
    unused: int = 0
    packed: bool = False
    d_major: bool = False
    n_cores: int = 1
    softmax_scale: float | None = None
    window: int | None = None
    needles: tuple[int, ...] = ()
    locality: float = 2.0
    seed: int = 0

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        heads = f"b{len(self.lengths)} q{self.n_q_heads}/kv{self.n_kv_heads} d{self.head_dim}"
        return f"{heads} s{max(self.lengths)} t{self.tile_kv}"

    def inputs(self, dtype: Any) -> tuple[Array, Array, Array, dict[str, Any]]:
        """q [batch, n_q_heads, d], k, v, and keyword arguments of oracle and wrapper, without thresholds and splits."""
        rng = np.random.default_rng(self.seed)
        batch, keys, group = len(self.lengths), max(self.lengths), self.n_q_heads // self.n_kv_heads
        shared, own = (rng.standard_normal((batch, self.n_kv_heads, n, self.head_dim)) for n in (1, group))
        by_group = 0.5**0.5 * (shared + own)
        k, v = (rng.standard_normal((batch, keys, self.n_kv_heads, self.head_dim)) for _ in "kv")
        run = 3 * self.tile_kv // 4
        levels = [rng.standard_normal((batch, -(-keys // run), self.n_kv_heads, n)) for n in (1, group)]
        means = [np.einsum("brhg,bhgd->brhd", *x) for x in zip(levels, (shared, own), strict=True)]
        mean = self.locality * (2 / self.head_dim) ** 0.5 * (means[0] + 0.5 * means[1])
        k += np.repeat(mean, run, axis=1)[:, :keys]
        for position in self.needles:
            for b in np.flatnonzero(np.array(self.lengths) > position):
                k[b, position] = by_group[b].sum(axis=1)
        options: dict[str, Any] = {"tile_kv": self.tile_kv, "softmax_scale": self.softmax_scale}
        options |= {"window_size": (self.window, None)} | cache_options(self.lengths, self.unused, self.packed)
        k, v = (in_cache(x.astype(dtype), self.lengths, self.unused, self.packed) for x in (k, v))
        q = by_group.reshape(batch, self.n_q_heads, self.head_dim).astype(dtype)
        return q, k, v, options

    def launch(self, target: str | None) -> dict[str, Any]:
        """Keyword arguments of the wrapper alone: layout and cores. trn1 and inf2 have no pairs of cores."""
        return {"k_d_major": self.d_major, "n_cores": 1 if target in ("trn1", "inf2") else self.n_cores}


def in_cache(x: Array, lengths: tuple[int, ...], unused: int, packed: bool) -> Array:
    """Rows [batch, keys, ...] of a batch as a cache holds them, NaN in the others.

    Returns [batch, keys + unused, ...]; or packed [total, ...], with `unused` rows before and after each sequence's.
    """
    if packed:
        first = _first_rows(lengths, unused)
        rows = np.full((first[-1], *x.shape[2:]), np.nan, x.dtype)
        for b, length in enumerate(lengths):
            rows[first[b] : first[b] + length] = x[b, :length]
        return rows
    rows = np.full((x.shape[0], x.shape[1] + unused, *x.shape[2:]), np.nan, x.dtype)
    for b, length in enumerate(lengths):
        rows[b, :length] = x[b, :length]
    return rows


def cache_options(lengths: tuple[int, ...], unused: int, packed: bool) -> dict[str, Any]:
    """Where sequences are in what `in_cache` returns: `cu_seqlens_kv` and `seqlens_kv`, each if it says something."""
    options: dict[str, Any] = {}
    if packed:
        options["cu_seqlens_kv"] = _first_rows(lengths, unused)
    if unused or (not packed and min(lengths) < max(lengths)):
        options["seqlens_kv"] = np.array(lengths, np.int32)
    return options


def _first_rows(lengths: tuple[int, ...], unused: int) -> Array:
    return unused + np.cumsum([0, *(n + unused for n in lengths)]).astype(np.int32)


@dataclass(frozen=True)
class GatedCase(SparseCase):
    """A `SparseCase` with gates, whose `threshold` is that of the scores. No d-major K, one core.

    Args:
        gate_threshold: below which a gate closes a tile.
        is_logsigmoid: whether gates are logsigmoids.
        fast: whether those are the polynomial.
        negative: whether every other head of a group has an alpha below 0.
        gates: scaled gates of a run of neighbouring keys have a mean of about this size, beside noise of a quarter.
        gate_dtype: of alpha and delta; None means that of q.
    """

    gate_threshold: float = 0.5
    is_logsigmoid: bool = True
    fast: bool = True
    negative: bool = False
    gates: float = 1.0
    gate_dtype: str | None = None

    def gate_inputs(self, dtype: Any) -> tuple[Array, Array, dict[str, Any]]:
        """alpha [batch, n_q_heads], delta with keys last and NaN where no sequence uses them, and keyword arguments."""
        rng = np.random.default_rng(self.seed + 1)
        batch, keys = len(self.lengths), max(self.lengths)
        kind = np.dtype(dtype) if self.gate_dtype is None else np.dtype(self.gate_dtype)
        alpha = rng.uniform(0.5, 1.5, (batch, self.n_q_heads))
        if self.negative:
            alpha[:, 1::2] *= -1
        run = 3 * self.tile_kv // 4
        level = rng.standard_normal((batch, -(-keys // run), self.n_kv_heads))
        noise = rng.standard_normal((batch, keys, self.n_kv_heads))
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        delta = self.gates / scale * (np.repeat(level, run, axis=1)[:, :keys] + 0.25 * noise)
        stored = in_cache(delta.astype(kind), self.lengths, self.unused, self.packed)
        options = {"is_logsigmoid_gate": self.is_logsigmoid, "fast_logsigmoid": self.fast}
        return alpha.astype(kind), np.moveaxis(stored, -1, -2).copy(), options
