"""Calibration of skip-softmax decode: against its oracle, by hand, its memory, and the law of sparsity it fits."""

from __future__ import annotations

import gc
import math
import re
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _skip_calibration as module
from contributed._skip_calibration import STRETCH, ScaleFactor, calibrate, fit_scale_factor
from reference.flash_decode import flash_decode as dense_oracle
from reference.skip_softmax import calibrate as oracle
from reference.skip_softmax import fit_scale_factor as fit_oracle
from reference.skip_softmax import skip_softmax_decode

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]
UNIT = 2.0**-24  # largest relative error of a rounding to float32
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Inputs of one call; rows that must not be looked at hold NaN.

    `pattern`: "random"; "sink-local": the first 4 and the last 200 keys of a sequence score high; "rising": scores rise
    with the position, so that the maximum does in every tile.
    """

    name: str
    pattern: str
    lengths: tuple[int, ...]
    n_q_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    tile_kv: int = 32
    packed: bool = False
    unused: int = 0
    window: int | None = None
    softmax_scale: float | None = None

    def inputs(self, dtype: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        rng = np.random.default_rng(len(self.name))
        d, kv, room = self.head_dim, self.n_kv_heads, max(self.lengths) + self.unused
        towards = rng.standard_normal(d)
        towards *= d**0.5 / np.linalg.norm(towards)
        q = 2.0 * rng.standard_normal((len(self.lengths), self.n_q_heads, d))
        if self.pattern != "random":
            q = towards + 0.3 * q
        options: dict[str, Any] = {"tile_kv": self.tile_kv, "softmax_scale": self.softmax_scale}
        options |= {"window_size": (self.window, None)}
        total = sum(self.lengths) + self.unused * (len(self.lengths) + 1)
        shape = (total, kv, d) if self.packed else (len(self.lengths), room, kv, d)
        k, v = np.full(shape, NAN), np.full(shape, NAN)
        begins = self.unused + np.cumsum([0, *(n + self.unused for n in self.lengths)])
        for b, n in enumerate(self.lengths):
            keys, values = rng.standard_normal((2, n, kv, d))
            place = np.arange(n)
            if self.pattern == "sink-local":
                keys += np.where((place < 4) | (place >= n - 200), 1.1, 0.0)[:, None, None] * towards
            elif self.pattern == "rising":
                keys += (2.0 * place / n)[:, None, None] * towards
            # Values have something in common, as in models; else the output nearly vanishes.
            values += towards
            first = 0 if self.window is None else max(0, n - 1 - self.window)
            for x, rows in ((k, keys), (v, values)):
                owned = x[begins[b] :] if self.packed else x[b]
                owned[first:n] = rows[first:]
        if self.packed:
            options["cu_seqlens_kv"] = begins
            if self.unused:
                options["seqlens_kv"] = np.array(self.lengths, np.int32)
        elif min(self.lengths) < room:
            options["seqlens_kv"] = np.array(self.lengths)
        return q.astype(dtype), k.astype(dtype), v.astype(dtype), options


CASES = (
    Case("random", "random", (1000,), tile_kv=128),
    Case("random-whole-tiles", "random", (64, 512)),
    Case("random-ragged", "random", (700, 0, 33, 16, 1), unused=5, tile_kv=16),
    Case("random-several-stretches", "random", (5000,), n_q_heads=8, tile_kv=64),
    Case("sink-local", "sink-local", (1500, 900), n_q_heads=8),
    Case("sink-local-several-stretches", "sink-local", (2 * STRETCH + 70, 2 * STRETCH), head_dim=64, tile_kv=128),
    Case("sink-local-one-head", "sink-local", (800,), n_q_heads=1, n_kv_heads=1, head_dim=7),
    Case("rising", "rising", (2 * STRETCH + 1,), head_dim=128),
    Case("packed", "sink-local", (300, 0, 411), packed=True, n_q_heads=2, n_kv_heads=1),
    Case("packed-unused", "random", (130, 2100, 0, 1), packed=True, unused=3, tile_kv=1024, softmax_scale=0.7),
    Case("window", "random", (900, 30, 0), window=333, unused=2),
    Case("window-of-whole-tiles", "sink-local", (1024,), window=511),
    Case("window-several-stretches", "random", (5000,), window=4500, tile_kv=128, softmax_scale=-0.5),
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


def error_bound(q: Any, k: Any, v: Any, options: dict[str, Any], threshold: float, error: float) -> float:
    """How far rounding can take the error of a threshold that decides every tile as the oracle does.

    To first order. A score is a dot product of d terms of a scaled query: off by (d + 2) UNIT sum |q||k| scale. So is,
    relatively, its weight, and further by the subtraction of the maximum (weights do not vanish for less than 104), the
    exponential and the sums over a tile: `eps` in all, of any sum of weights, and of any weighted sum of values that
    are at most V long. With r the share of the weight that is skipped, o - dense o = r o - (skipped weights) v / l. r
    is off by 2 eps r, o by 2 eps V and the last term by 2 eps r V: 6 eps r V. The dense o, below, is off by 2 eps V.
    """
    got = skip_softmax_decode(q, k, v, skip_softmax_threshold=threshold, **options)
    dense = skip_softmax_decode(q, k, v, skip_softmax_threshold=None, **options)
    group, d = q.shape[1] // k.shape[-2], q.shape[2]
    scale = abs(options["softmax_scale"] or d**-0.5)
    largest_k, largest_v = (np.nanmax(np.linalg.norm(x.astype(np.float64), axis=-1)) for x in (k, v))
    bound = 0.0
    for b, h in np.ndindex(*q.shape[:2]):
        if not got.stats.tiles_total[b, h]:
            continue
        scores = (d + 2) * UNIT * scale * np.linalg.norm(q[b, h].astype(np.float64)) * largest_k
        eps = scores + (104 + 4 + 1 + options["tile_kv"]) * UNIT
        skipped = -math.expm1(got.lse[b, h] - dense.lse[b, h])
        size = np.linalg.norm(dense.o[b, h])
        bound = max(bound, (6 * eps * skipped * largest_v + error * 2 * eps * largest_v) / size)
    assert group >= 1
    return bound


def check(case: Case, dtype: Any, m: Any = module) -> None:
    """Shares equal the oracle's where no decision is close; errors are as close as rounding allows."""
    q, k, v, options = case.inputs(dtype)
    # Shuffled: nothing may depend on the order. Rounding moves a decision by far less than 1e-3.
    candidates = np.exp(-np.random.default_rng(0).permutation(np.linspace(0.0, 8.0, 25)))
    clear = [
        x
        for x in candidates
        if skip_softmax_decode(q, k, v, skip_softmax_threshold=x, **options).stats.margin.min() > 1e-3
    ]
    assert len(clear) >= 12
    want, got = oracle(q, k, v, clear, **options), m.calibrate(q, k, v, clear, **options)
    assert all(x.dtype == np.float64 and x.shape == (len(clear),) for x in got)
    np.testing.assert_array_equal(got.thresholds, clear)
    np.testing.assert_array_equal(got.sparsity, want.sparsity)
    np.testing.assert_array_equal(got.values_unread, want.values_unread)
    assert len(np.unique(want.sparsity)) >= 5
    for threshold, x, y in zip(clear, got.error, want.error, strict=True):
        bound = error_bound(q, k, v, options, threshold, y)
        assert abs(x - y) <= bound, (threshold, x, y, bound)
        assert bound <= 0.01 * y + 1e-9, "a bound that would pass a wrong error"


@by_dtype
@by_case
def test_against_the_oracle(case: Case, dtype: Any) -> None:
    check(case, dtype)
