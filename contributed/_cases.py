"""Shapes and inputs that self-checks and tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
