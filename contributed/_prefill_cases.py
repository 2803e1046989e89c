"""Cases of the prefill kernels' self-checks and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PrefillCase:
    """One call of prefill attention. Rows that no sequence owns hold NaN.

    Args:
        name: id in tables and tests; a model's name where heads and head dim are that model's.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        head_dim: d.
        lengths: (queries, keys) of each sequence.
        causal: whether a query sees no later keys.
        left: keys visible before a query's position, None for all.
        right: keys visible after it, None for all.
        sparsity_n: scores kept of every `sparsity_m`, 0 for all.
        sparsity_m: 4 or 8.
        sink: keys at the beginning that are always kept.
        recent: keys up to a query's position that are always kept.
        threshold: of skip-softmax, None for off.
        unused: rows before the first and after the last sequence.
        batched: [batch, seqlen, heads, d] in place of packed sequences; all have the same lengths.
        softmax_scale: None means d ** -0.5.
        grid: whether q and k are small multiples of 1/4, so that scores are exact in every order of summation and
            often equal. A choice among scores does then not hang on rounding.
        locality: scores of a tile of keys have a mean of about this size beside noise of size 1, so that some tiles
            matter more than others.
        seed: of the numbers.
    """

    name: str
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    lengths: tuple[tuple[int, int], ...]
    causal: bool = True
    left: int | None = None
    right: int | None = None
    sparsity_n: int = 0
    sparsity_m: int = 4
    sink: int = 0
    recent: int = 0
    threshold: float | None = None
    unused: int = 0
    batched: bool = False
    softmax_scale: float | None = None
    grid: bool = False
    locality: float = 0.0
    seed: int = 0

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        q, kv = (max(n[i] for n in self.lengths) for i in (0, 1))
        return f"b{len(self.lengths)} q{self.n_q_heads}/kv{self.n_kv_heads} d{self.head_dim} {q}x{kv}"

    def inputs(self, dtype: Any) -> tuple[Array, Array, Array, dict[str, Any]]:
        """q, k, v, and the keyword arguments of oracle and wrapper."""
        rng = np.random.default_rng(self.seed)
        firsts = [self.unused + np.cumsum([0, *(n[i] for n in self.lengths)]) for i in (0, 1)]
        rows = [int(first[-1]) + self.unused for first in firsts]
        q, k, v = (
            self._draw(rng, (n, heads, self.head_dim), x)
            for n, heads, x in ((rows[0], self.n_q_heads, "q"), *((rows[1], self.n_kv_heads, x) for x in "kv"))
        )
        if self.locality:
            # The heads' queries have a direction in common, in which tiles of keys differ.
            shared = rng.standard_normal((self.n_kv_heads, self.head_dim))
            q += np.repeat(shared, self.n_q_heads // self.n_kv_heads, axis=0)
            level = rng.standard_normal((-(-rows[1] // 96), self.n_kv_heads, 1))
            k += self.locality * self.head_dim**-0.5 * np.repeat(level, 96, axis=0)[: rows[1]] * shared
            if self.grid:
                q, k = (np.round(4.0 * x) / 4.0 for x in (q, k))
        for x, first in ((q, firsts[0]), (k, firsts[1]), (v, firsts[1])):
            x[: first[0]] = x[first[-1] :] = np.nan
        options: dict[str, Any] = {
            "causal": self.causal,
            "window_size": (self.left, self.right),
            "softmax_scale": self.softmax_scale,
            "sparsity_n": self.sparsity_n,
            "sparsity_m": self.sparsity_m,
            "dense_sink_tokens": self.sink,
            "dense_recent_tokens": self.recent,
            "skip_softmax_threshold": self.threshold,
        }
        arrays = [x.astype(dtype) for x in (q, k, v)]
        if self.batched:
            arrays = [x.reshape(len(self.lengths), -1, *x.shape[1:]) for x in arrays]
        else:
            options |= {"cu_seqlens_q": firsts[0].astype(np.int32), "cu_seqlens_kv": firsts[1].astype(np.int32)}
        return arrays[0], arrays[1], arrays[2], options

    def _draw(self, rng: np.random.Generator, shape: tuple[int, ...], name: str) -> Array:
        if self.grid and name != "v":
            return rng.integers(-4, 5, shape) / 4.0
        return rng.standard_normal(shape)
