"""Calibration of skip-softmax decode: against its oracle, by hand, its memory, and the law of sparsity it fits."""

from __future__ import annotations

import gc
import math
import re
import sys
import tracemalloc
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _skip_calibration as module
from contributed._skip_calibration import ScaleFactor, calibrate, fit_scale_factor
from reference.skip_softmax import SkipSoftmaxDecode, skip_softmax_decode
from reference.skip_softmax import calibrate as oracle
from reference.skip_softmax import fit_scale_factor as fit_oracle

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
DTYPES = [F32, BF16, np.dtype(np.float16)]
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
    Case("sink-local-several-stretches", "sink-local", (4166, 4096), head_dim=64, tile_kv=128),
    Case("sink-local-one-head", "sink-local", (800,), n_q_heads=1, n_kv_heads=1, head_dim=7),
    Case("rising", "rising", (4097,), head_dim=128),
    Case("packed", "sink-local", (300, 0, 411), packed=True, n_q_heads=2, n_kv_heads=1),
    Case("packed-unused", "random", (130, 2100, 0, 1), packed=True, unused=3, tile_kv=1024, softmax_scale=0.7),
    Case("window", "random", (900, 30, 0), window=333, unused=2),
    Case("window-of-whole-tiles", "sink-local", (1024,), window=511),
    Case("window-several-stretches", "random", (5000,), window=4500, tile_kv=128, softmax_scale=-0.5),
)
NAMED = {case.name: case for case in CASES}
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


class Call:
    """Arguments of a calibration, and what the oracles say of them: each once, for all that asks."""

    def __init__(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
        self.arrays = q, k, v
        self.options = options
        self._decoded: dict[float | None, SkipSoftmaxDecode] = {}
        self._calibrated: dict[tuple[float, ...], Any] = {}

    def decoded(self, threshold: float | None) -> SkipSoftmaxDecode:
        if threshold not in self._decoded:
            self._decoded[threshold] = skip_softmax_decode(
                *self.arrays, skip_softmax_threshold=threshold, **self.options
            )
        return self._decoded[threshold]

    def calibrated(self, thresholds: Any) -> Any:
        key = tuple(thresholds)
        if key not in self._calibrated:
            self._calibrated[key] = oracle(*self.arrays, thresholds, **self.options)
        return self._calibrated[key]

    @cached_property
    def largest(self) -> list[float]:
        """Largest norms of a key and of a value."""
        return [float(np.nanmax(np.linalg.norm(x.astype(np.float64), axis=-1))) for x in self.arrays[1:]]

    @cached_property
    def clear_thresholds(self) -> list[float]:
        """Thresholds, in no order, at which no decision is within 1e-3; rounding moves scores by far less."""
        candidates = np.exp(-np.random.default_rng(0).permutation(np.linspace(0.0, 8.0, 25)))
        clear = [x for x in candidates.tolist() if self.decoded(x).stats.margin.min() > 1e-3]
        assert len(clear) >= 12
        return clear


@cache
def call(case: Case, dtype: Any) -> Call:
    found = Call(*case.inputs(dtype))
    for x in found.arrays:
        x.flags.writeable = False
    return found


def error_bound(c: Call, threshold: float, error: float) -> float:
    """How far rounding can take the error of a threshold that decides every tile as the oracle does.

    To first order. A score is a dot product of d terms of a scaled query: off by (d + 2) UNIT sum |q||k| scale. So is,
    relatively, its weight, and further by the subtraction of the maximum (weights do not vanish for less than 104), the
    exponential and the sums over a tile: `eps` in all, of any sum of weights, and of any weighted sum of values that
    are at most V long. With r the share of the weight that is skipped, o - dense o = r o - (skipped weights) v / l. r
    is off by 2 eps r, o by 2 eps V and the last term by 2 eps r V: 6 eps r V. The dense o, below, is off by 2 eps V.
    """
    got, dense = c.decoded(threshold), c.decoded(None)
    q, d = c.arrays[0], c.arrays[0].shape[2]
    scale = abs(c.options["softmax_scale"] or d**-0.5)
    largest_k, largest_v = c.largest
    bound = 0.0
    for b, h in np.ndindex(*q.shape[:2]):
        if not got.stats.tiles_total[b, h]:
            continue
        scores = (d + 2) * UNIT * scale * np.linalg.norm(q[b, h].astype(np.float64)) * largest_k
        eps = scores + (104 + 4 + 1 + c.options["tile_kv"]) * UNIT
        skipped = -math.expm1(got.lse[b, h] - dense.lse[b, h])
        size = np.linalg.norm(dense.o[b, h])
        bound = max(bound, (6 * eps * skipped * largest_v + error * 2 * eps * largest_v) / size)
    return bound


def check_against_oracle(got: Any, c: Call) -> None:
    """Shares equal the oracle's at clear thresholds; errors are as close as rounding allows."""
    want = c.calibrated(got.thresholds)
    assert len(np.unique(want.sparsity)) >= 5
    assert all(x.dtype == np.float64 for x in got)
    np.testing.assert_array_equal(got.sparsity, want.sparsity)
    np.testing.assert_array_equal(got.values_unread, want.values_unread)
    assert got.error.shape == want.error.shape
    for threshold, x, y in zip(got.thresholds, got.error, want.error, strict=True):
        bound = error_bound(c, threshold, y)
        assert abs(x - y) <= bound, (threshold, x, y, bound)
        assert bound <= 0.02 * y + 1e-9, "a bound that would pass a wrong error"


def check(case: Case, dtype: Any, m: Any = module) -> None:
    c = call(case, dtype)
    got = m.calibrate(*c.arrays, c.clear_thresholds, **c.options)
    np.testing.assert_array_equal(got.thresholds, c.clear_thresholds)
    check_against_oracle(got, c)


@by_dtype
@by_case
def test_against_the_oracle(case: Case, dtype: Any) -> None:
    check(case, dtype)


def test_it_takes_views() -> None:
    """Caches that are stored [batch, n_kv_heads, seqlen_kv, d], and every other sequence of a larger one."""
    c = call(NAMED["sink-local"], BF16)
    q, k, v = c.arrays
    stored = (q, *(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v)))
    every_other = tuple(np.repeat(x, 2, axis=0)[::2] for x in (q, k, v))
    assert not any(x.flags.c_contiguous for x in (*stored[1:], *every_other))
    for views in (stored, every_other):
        check_against_oracle(calibrate(*views, c.clear_thresholds, **c.options), c)


@pytest.mark.parametrize("other", [0.0, 1e30, np.inf])
@pytest.mark.parametrize("name", ["random-ragged", "packed-unused", "window"])
def test_rows_that_no_query_sees_may_be_anything(name: str, other: float) -> None:
    c = call(NAMED[name], F32)
    q, k, v = c.arrays
    filled = (np.where(np.isnan(x), np.float32(other), x) for x in (k, v))
    check_against_oracle(calibrate(q, *filled, c.clear_thresholds, **c.options), c)


def test_empty_sequences_count_for_nothing() -> None:
    """The oracle does not get them."""
    q, k, v, options = NAMED["random-ragged"].inputs(np.float32)
    some = options["seqlens_kv"] > 0
    assert some.tolist() == [True, False, True, True, True]
    without = Call(q[some], k[some], v[some], options | {"seqlens_kv": options["seqlens_kv"][some]})
    check_against_oracle(calibrate(q, k, v, without.clear_thresholds, **options), without)


def test_the_right_side_of_a_window_hides_nothing() -> None:
    c = call(NAMED["window"], F32)
    got = calibrate(*c.arrays, c.clear_thresholds, **(c.options | {"window_size": (333, 0)}))
    check_against_oracle(got, c)


# -- by hand


def tiles(*scores: list[float]) -> tuple[Any, Any]:
    """q [1, n_heads, n_heads] and k: head h gives every key of tile t the score scores[h][t]. Tiles of 16."""
    n = len(scores)
    return np.eye(n, dtype=np.float32)[None], np.repeat(np.array(scores, np.float32).T, 16, axis=0)[None, :, None]


def weighed(scores: list[float], values: list[tuple[float, ...]], kept: list[int]) -> tuple[float, ...]:
    """Softmax attention over some of the tiles, all keys of a tile alike."""
    total = sum(math.exp(scores[t]) for t in kept)
    return tuple(sum(math.exp(scores[t]) * values[t][c] for t in kept) / total for c in range(len(values[0])))


def check_by_hand(m: Any = module) -> None:
    """Head 0: tiles 1, 2, 3 are 1, 3, 2 below the largest before. Head 1: 1 is 3 below, 2 leads, 3 is 2.5 below."""
    first, second = [0.0, -1.0, -3.0, -2.0], [0.0, -3.0, 5.0, 2.5]
    values = [(1.0, 0.0), (3.0, 1.0), (0.0, -2.0), (2.0, 5.0)]
    q, k = tiles(first, second)
    v = np.repeat(np.array(values, np.float32), 16, axis=0)[None, :, None]
    got = m.calibrate(q, k, v, np.exp([-0.5, -1.5, -2.75, -4.0]), tile_kv=16, softmax_scale=1.0)
    kept = [
        ([0], [0, 2]),  # 3 + 2 skipped; 1 and 3 by both
        ([0, 1], [0, 2]),  # 2 + 2; 3 by both
        ([0, 1, 3], [0, 2, 3]),  # 1 + 1; none by both
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ]
    assert got.sparsity.tolist() == [5 / 8, 4 / 8, 2 / 8, 0.0]
    assert got.values_unread.tolist() == [2 / 4, 1 / 4, 0.0, 0.0]
    assert got.error[3] == 0.0
    for i, by_head in enumerate(kept[:3]):
        errors = []
        for scores, those in zip((first, second), by_head, strict=True):
            dense = weighed(scores, values, [0, 1, 2, 3])
            errors.append(math.dist(weighed(scores, values, those), dense) / math.hypot(*dense))
        np.testing.assert_allclose(got.error[i], max(errors), rtol=1e-6)


def test_by_hand() -> None:
    check_by_hand()


@pytest.mark.parametrize(("below", "sparsity"), [(0.0, 0.0), (1e-6, 0.5)], ids=["tie", "below"])
def test_a_tie_is_kept(below: float, sparsity: float) -> None:
    check_tie(below, sparsity)


def check_tie(below: float, sparsity: float, m: Any = module) -> None:
    q, k = tiles([1.0, 1.0 - below])
    assert m.calibrate(q, k, k, [1.0], tile_kv=16).sparsity.tolist() == [sparsity]


def test_without_a_dense_output() -> None:
    """Values of nothing but 0 cost nothing; a difference from an output of 0 is infinitely larger."""
    q, k = tiles([0.0, -1.0])
    assert calibrate(q, k, 0 * k, [0.5], tile_kv=16).error.tolist() == [0.0]
    # Opposite values weigh the same in tiles 0 and 1, and tile 2 is nothing; only tile 1 is skipped.
    q, k = tiles([0.0, 0.0, 1.0, 0.0])
    v = np.repeat(np.array([1.0, -1.0, 0.0, 0.0], np.float32), 16)[None, :, None, None]
    assert calibrate(q, k, v, [1.0], tile_kv=16).error.tolist() == [0.0]
    v = np.repeat(np.array([1.0, 0.0, 0.0, -1.0], np.float32), 16)[None, :, None, None]
    assert calibrate(q, k, v, [1.0], tile_kv=16).error.tolist() == [math.inf]


def test_scores_at_the_end_of_float32() -> None:
    q, k = tiles([0.0, 3e38, -3e38])
    got = calibrate(q, k, np.ones_like(k), [1.0, 1e-300], tile_kv=16, softmax_scale=1.0)
    assert got.sparsity.tolist() == [1 / 3, 1 / 3]
    assert got.error.tolist() == [0.0, 0.0]


# -- properties


@by_dtype
@pytest.mark.parametrize("case", [NAMED["random-ragged"], *CASES[8:11]], ids=lambda c: c.name)
def test_a_larger_threshold_skips_no_less(case: Case, dtype: Any) -> None:
    q, k, v, options = case.inputs(dtype)
    thresholds = np.geomspace(1e-6, 1.0, 60)
    got = calibrate(q, k, v, thresholds, **options)
    assert (np.diff(got.sparsity) >= 0).all()
    assert (np.diff(got.values_unread) >= 0).all()
    assert (got.values_unread <= got.sparsity).all()
    assert got.sparsity[-1] - got.sparsity[0] > 0.2
    assert ((got.error == 0) == (got.sparsity == 0)).all()


def test_inputs_are_left_alone() -> None:
    q, k, v, options = CASES[0].inputs(np.float32)
    thresholds = np.array([0.1, 0.2])
    for x in (q, k, v, thresholds):
        x.flags.writeable = False
    got = calibrate(q, k, v, thresholds, **options)
    assert not np.shares_memory(got.thresholds, thresholds)


# -- a long cache


def test_progress() -> None:
    """2048 keys at a time: 16 tiles and 1 per KV head of the first sequence, none of the second, 1 of the last."""
    q, k = np.zeros((3, 2, 4), np.float32), np.zeros((3, 2176, 2, 4), np.float32)
    calls: list[tuple[int, int]] = []
    lengths = np.array([2049, 0, 128])
    calibrate(q, k, k, [0.5], seqlens_kv=lengths, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 36) for n in (16, 17, 33, 34, 35, 36)]


def peak_bytes(seqlen_kv: int, n_kv_heads: int) -> int:
    """Most memory that a calibration of 4 query heads per KV head holds beside its inputs."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 4 * n_kv_heads, 64)).astype(BF16)
    k = rng.standard_normal((1, seqlen_kv, n_kv_heads, 64), np.float32).astype(BF16)
    gc.collect()
    tracemalloc.start()
    try:
        calibrate(q, k, k, np.geomspace(1e-6, 1.0, 20))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_stretch() -> None:
    """16384 keys of 8 KV heads are 16 MiB in bfloat16, and K and V 128 MiB in float64."""
    peak = peak_bytes(16384, 8)
    assert peak < 3 * 2**20
    for seqlen_kv, n_kv_heads in ((8192, 8), (16384, 2)):
        assert abs(peak_bytes(seqlen_kv, n_kv_heads) - peak) < 2**16


# -- the law of sparsity


def test_the_fit_by_hand() -> None:
    check_fit_by_hand()


def check_fit_by_hand(m: Any = module) -> None:
    """Logs (0.1, 0), (0.5, 1), (0.9, 5): means 0.5 and 2, slope (0.8 + 1.2) / 0.32. Those outside are no part of it."""
    logs, sparsity = np.array([-3.0, 0.0, 1.0, 5.0, 0.0]), [0.09, 0.1, 0.5, 0.9, 0.91]
    fit = m.fit_scale_factor(np.exp(logs) / 1024, sparsity, 1024)
    np.testing.assert_allclose([fit.a, fit.b], [math.exp(2 - 0.5 * 6.25), 6.25], rtol=1e-12)


@pytest.mark.parametrize("several", [False, True], ids=["one length", "lengths"])
def test_the_fit_is_the_oracle_s(several: bool) -> None:
    rng = np.random.default_rng(0)
    thresholds, sparsity = rng.uniform(1e-4, 1.0, 40), rng.uniform(0.0, 1.0, 40)
    lengths: Any = rng.integers(1, 200000, 40) if several else 4096
    fit, want = fit_scale_factor(thresholds, sparsity, lengths), fit_oracle(thresholds, sparsity, lengths)
    np.testing.assert_allclose([fit.a, fit.b], want, rtol=1e-10)
    for share, n in ((0.0, 1), (0.3, 100), (1.0, 100000)):
        np.testing.assert_allclose(fit.threshold(share, n), want.threshold(share, n), rtol=1e-10)


def test_a_threshold_of_a_law() -> None:
    law = ScaleFactor(2.0, 5.0)
    np.testing.assert_allclose(law.threshold(0.5, 4096), 2 * math.exp(2.5) / 4096, rtol=1e-14)
    assert law.threshold(1.0, 296) == 1.0  # 2 exp(5) is 296.8
    assert 0.999 < law.threshold(1.0, 297) < 1.0
    assert ScaleFactor(1.0, 1e6).threshold(1, 1) == 1.0
    assert ScaleFactor(1.0, -1e6).threshold(np.float32(1), np.int64(9)) == 0.0


def drawn_from_the_law(n_tiles: int) -> tuple[Any, Any]:
    """Tiles of 16 keys of which a threshold of 2 exp(5 i / n_tiles) / (16 n_tiles) skips just i, for all i.

    Tile 0 leads with score 0, and tile i falls behind log(threshold) between i - 1 and i; they come in any order.
    """
    log_a = math.log(2.0 / (16 * n_tiles))
    falling = [log_a + 5.0 * (i - 0.5) / n_tiles for i in range(1, n_tiles)]
    order = np.random.default_rng(n_tiles).permutation(falling)
    return tiles([0.0, *order])


def check_there_and_back(m: Any = module) -> None:
    """Calibrated at 1024 and 2048 keys, used at 8192: of 512 tiles the law's 0.25, 0.5 and 0.75."""
    thresholds, sparsity, lengths = [], [], []
    for n_tiles in (64, 128):
        q, k = drawn_from_the_law(n_tiles)
        steps = np.arange(1, 60) / 64
        found = m.calibrate(q, k, k, 2 * np.exp(5 * steps) / (16 * n_tiles), tile_kv=16, softmax_scale=1.0)
        np.testing.assert_array_equal(found.sparsity, steps)
        thresholds.extend(found.thresholds)
        sparsity.extend(found.sparsity)
        lengths.extend([16 * n_tiles] * len(steps))
    fit = m.fit_scale_factor(thresholds, sparsity, lengths)
    np.testing.assert_allclose([fit.a, fit.b], [2.0, 5.0], rtol=1e-12)
    q, k = drawn_from_the_law(512)
    for target in (0.25, 0.5, 0.75):
        threshold = fit.threshold(target, 8192)
        assert m.calibrate(q, k, k, [threshold], tile_kv=16, softmax_scale=1.0).sparsity.tolist() == [target]
        got = skip_softmax_decode(q, k, k, skip_softmax_threshold=threshold, tile_kv=16, softmax_scale=1.0)
        assert got.stats.tiles_skipped.sum() == target * 512


def test_there_and_back() -> None:
    check_there_and_back()


# -- what breaks it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("largest[:, None] < reached", "largest[:, None] <= reached"),  # a tie is skipped
        ("reached[:, None, :-1] +", "reached[:, None, -1:] +"),  # compared with the maximum of later tiles too
        ("np.column_stack([self._m, largest])", "np.column_stack([self._m - np.inf, largest])"),  # m is forgotten
        ("        self._m = m\n", ""),
        ("self._skipped * correction[..., None]", "self._skipped"),
        ("self._all * correction", "self._all"),
        ("skip.astype(np.float64) @", "(~skip).astype(np.float64) @"),  # what is left, not what is skipped
        ("(l - l_skipped)", "l"),
        ("s[:, : visible.start] = -np.inf", "pass"),  # keys before the window are 0
        ("s[:, visible.stop :] = -np.inf", "pass"),  # and so are those beyond the length
        ("n - 1 - options.left)", "n - options.left)"),
        ("skip.all(axis=0)", "skip.any(axis=0)"),
        ("first[b] // tile_kv * tile_kv, used", "first[b], used"),  # tiles begin with the window
        ("np.maximum(error, heads.errors())", "heads.errors()"),  # the last heads' error
        ("x[seen, i_kv]", "x[seen, 0]"),  # the wrong KV head
        ("rows[b, i_kv]", "rows[b, 0]"),
        ("d**-0.5 if", "1.0 if"),
        ("m[:, None, None].astype(np.float32))\n", "m[:, None, None].astype(np.float32)).astype(np.float16)\n"),
        ("self._q @", "self._q.astype(np.float16) @"),
        ("np.linalg.norm(dense, axis=2)", "1.0"),  # absolute
        ("tiles_total * group", "tiles_total"),
        ("k[b, :n], v[b, :n]", "k[b, :n], v[b, :n][::-1]"),
        ("FIT_MIN, FIT_MAX = 0.1, 0.9", "FIT_MIN, FIT_MAX = 0.0, 1.0"),
        ("np.log(lambdas * lengths)", "np.log(lambdas)"),
        ("- math.log(seqlen_kv)", ""),
    ],
)  # fmt: skip
def test_a_mutated_module_fails(old: str, new: str) -> None:
    """Each one-line fault fails in a check that is a test above, so the suite would be red."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    mutant = ModuleType("mutant")
    sys.modules["mutant"] = mutant  # where dataclasses look for it
    try:
        exec(compile(text.replace(old, new), "mutant.py", "exec"), mutant.__dict__)
        with np.errstate(all="ignore"), pytest.raises(AssertionError):
            every_check(mutant)
    finally:
        del sys.modules["mutant"]


def every_check(m: Any) -> None:
    check_by_hand(m)
    check_tie(0.0, 0.0, m)
    check_fit_by_hand(m)
    for name in ("random-ragged", "sink-local-several-stretches", "packed-unused", "window"):
        check(NAMED[name], F32, m)
    check_there_and_back(m)


def test_the_unmutated_module_passes_every_check() -> None:
    every_check(module)


# -- bad input


def zeros(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype)


Q, K = zeros(2, 4, 8), zeros(2, 10, 2, 8)
PACKED = zeros(20, 2, 8)
CU = np.array([0, 8, 20])
FEW = np.array([3, 10])
INTEGERS = "allowed an integer array"


def packed(**more: Any) -> dict[str, Any]:
    return {"k": PACKED, "v": PACKED, "cu_seqlens_kv": CU} | more


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q list": ({"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, n_q_heads, d\]"),
    "q ndim": ({"q": Q[:, None]}, ValueError, r"q shape: received \[2, 1, 4, 8\], allowed \[batch, n_q_heads, d\]"),
    "q float64": ({"q": Q.astype(np.float64)}, TypeError, "q dtype: received float64, allowed float32, bfloat16, fl"),
    "q no batch": ({"q": Q[:0]}, ValueError, r"q shape: received \[0, 4, 8\], allowed .* each at least 1"),
    "d odd": ({"q": zeros(2, 4, 129), "k": zeros(2, 10, 2, 129), "v": zeros(2, 10, 2, 129)}, ValueError,
              r"head_dim: received 129, allowed 1\.\.128, or even to 256"),
    "k list": ({"k": K.tolist()}, TypeError,
               r"k: received list, allowed a NumPy array \[batch, seqlen_kv, n_kv_heads, d"),
    "v None": ({"v": None}, TypeError, "v: received NoneType, allowed a NumPy array"),
    "k dtype": ({"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16, that of q"),
    "v dtype": ({"v": K.astype(BF16)}, TypeError, "v dtype: received bfloat16, allowed float16, that of q"),
    "float8": ({"k": K.astype(ml_dtypes.float8_e4m3)}, TypeError,
               "k dtype: received float8_e4m3, allowed float16, that of q"),
    "k ndim": ({"k": K[0]}, ValueError, r"k shape: received \[10, 2, 8\], allowed \[2, seqlen_kv, n_kv_heads, 8\]"),
    "k batch": ({"k": K[:1]}, ValueError, r"k shape: received \[1, 10, 2, 8\], allowed \[2, seqlen_kv"),
    "k d": ({"k": K[..., :4]}, ValueError, r"k shape: received \[2, 10, 2, 4\], allowed \[2, seqlen_kv"),
    "v shape": ({"v": K[:, :9]}, ValueError, r"v shape: received \[2, 9, 2, 8\], allowed \[2, 10, 2, 8\], that of k"),
    "k no heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, "n_kv_heads: received 0, allowed >= 1"),
    "heads": ({"q": Q[:, :3]}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
    "group": ({"q": zeros(2, 258, 8)}, ValueError, r"n_q_heads / n_kv_heads: received 129, allowed 1\.\.128"),
    "cu list": (packed(cu_seqlens_kv=[0, 8, 20]), TypeError, f"cu_seqlens_kv: received list, {INTEGERS}"),
    "cu floats": (packed(cu_seqlens_kv=CU * 1.0), TypeError, f"cu_seqlens_kv: received float64, {INTEGERS}"),
    "cu shape": (packed(cu_seqlens_kv=CU[:2]), ValueError, r"cu_seqlens_kv shape: received \[2\], allowed \[3\]"),
    "cu descends": (packed(cu_seqlens_kv=np.array([0, 9, 8])), ValueError,
                    r"cu_seqlens_kv: received \[0, 9, 8\], allowed ascending within 0\.\.20"),
    "cu beyond": (packed(cu_seqlens_kv=CU + 1), ValueError, r"cu_seqlens_kv: .*21\], allowed .*0\.\.20"),
    "cu negative": (packed(cu_seqlens_kv=CU - 1), ValueError, r"cu_seqlens_kv: .*\[-1, .* ascending"),
    "cu with batched": ({"cu_seqlens_kv": CU}, ValueError, r"k shape: received .*, allowed \[total, n_kv_heads, 8\]"),
    "packed without cu": ({"k": PACKED, "v": PACKED}, ValueError, r"k shape: received \[20, 2, 8\], allowed \[2, se"),
    "packed d": (packed(k=PACKED[..., :4]), ValueError, r"k shape: received \[20, 2, 4\], allowed \[total, n_kv_head"),
    "lengths list": ({"seqlens_kv": [3, 10]}, TypeError, f"seqlens_kv: received list, {INTEGERS}"),
    "lengths bool": ({"seqlens_kv": FEW > 3}, TypeError, f"seqlens_kv: received bool, {INTEGERS}"),
    "lengths shape": ({"seqlens_kv": FEW[:1]}, ValueError, r"seqlens_kv shape: received \[1\], allowed \[2\]"),
    "lengths beyond": ({"seqlens_kv": FEW + 1}, ValueError, r"seqlens_kv\[1\]: received 11, allowed 0\.\.10"),
    "lengths negative": ({"seqlens_kv": FEW - 4}, ValueError, r"seqlens_kv\[0\]: received -1, allowed 0\.\.10"),
    "lengths beyond cu": (packed(seqlens_kv=FEW + 6), ValueError, r"seqlens_kv\[0\]: received 9, allowed 0\.\.8"),
    "no keys": ({"seqlens_kv": 0 * FEW}, ValueError, r"k: received \[0, 0\] keys in use, allowed at least one"),
    "no rows": ({"k": K[:, :0], "v": K[:, :0]}, ValueError, r"k: received \[0, 0\] keys in use, allowed at least one"),
    "scale nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
    "window number": ({"window_size": 3}, ValueError, r"window_size: received 3, allowed \(left, right\)"),
    "window left": ({"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed .* None or >= 0"),
    "window right": ({"window_size": (0, 1.5)}, ValueError, r"window_size: received \(0, 1.5\), allowed .* >= 0"),
    "progress": ({"progress": True}, TypeError, "progress: received bool, allowed a function or None"),
    **{
        f"tile_kv {x}": ({"tile_kv": x}, ValueError, f"tile_kv: received {x}, allowed a power of two from 16 to 1024")
        for x in (0, 1, 8, 48, 2048, -16, 64.0, True, None, "64")
    },
    **{
        f"thresholds {x}": ({"thresholds": x}, ValueError, rf"thresholds.*: received .*{received}, allowed .*at most 1")
        for x, received in (
            ([], r"\[0\]"),
            ([[0.5]], r"\[1, 1\]"),
            (0.5, r"\[\]"),
            ([[0.5], [0.1, 0.2]], re.escape("[[0.5], [0.1, 0.2]]")),
            ([0.5, 0.0], r"0.0\]"),
            ([0.5, -0.1], r"-0.1\]"),
            ([0.5, 1.0001], r"1.0001\]"),
            ([0.5, NAN], r"nan\]"),
            ([0.5, math.inf], r"inf\]"),
        )
    },
    **{
        f"thresholds {x}": ({"thresholds": x}, TypeError, f"thresholds: received {received}, allowed .*at most 1")
        for x, received in ((None, "object"), (["a"], "<U1"), ([True], "bool"), ([0.5 + 1j], "complex128"))
    },
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_named(
    changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any) -> Any:
        pytest.fail("work began")

    monkeypatch.setattr(module, "_Heads", must_not_run)
    with pytest.raises(error, match=text):
        calibrate(**({"q": Q, "k": K, "v": K, "thresholds": [0.5]} | changes))


def test_calls_name_every_argument() -> None:
    named = {name for changes, _, _ in BAD_CALLS.values() for name in changes}
    assert named == set(calibrate.__annotations__) - {"return"}


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_is_found_on_the_way(name: str, value: float) -> None:
    """3e38 is finite, and twice or four times it is not."""
    arrays = {x: np.ones((1, 1, 4) if x == "q" else (1, 100, 1, 4), np.float32) for x in "qkv"}
    arrays[name][:, -2:] = value
    text = r"v: received a tile whose sum" if name == "v" else "q, k: received a score that is not finite"
    with pytest.raises(ValueError, match=text):
        calibrate(*arrays.values(), [0.5], softmax_scale=1.0)


BAD_POINTS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "thresholds 0": (([0.1, 0.0], [0.5, 0.6], 64), ValueError, r"thresholds: received \[0.1, 0.0\], .* above 0"),
    "thresholds text": ((["a"], [0.5], 64), TypeError, "thresholds: received <U1, allowed"),
    "sparsity shape": (([0.1, 0.2], [0.5], 64), ValueError, r"sparsity shape: received \[1\], allowed \[2\]"),
    "sparsity ragged": (([0.1, 0.2], [[0.5], [1, 0]], 64), ValueError, r"sparsity: received \[\[0.5\], \[1, 0\]\], a"),
    "sparsity below": (([0.1, 0.2], [-0.1, 0.6], 64), ValueError, r"sparsity: received \[-0.1, .* from 0 to 1"),
    "sparsity above": (([0.1, 0.2], [0.5, 50], 64), ValueError, r"sparsity: received .*50.0\], .* from 0 to 1"),
    "sparsity nan": (([0.1, 0.2], [0.5, NAN], 64), ValueError, r"sparsity: received .*nan\], allowed .* from 0 to 1"),
    "sparsity bool": (([0.1, 0.2], [False, True], 64), TypeError, "sparsity: received bool, allowed"),
    "lengths 0": (([0.1, 0.2], [0.5, 0.6], [64, 0]), ValueError, r"seqlens_kv: received .*0.0\], .* 1\.\.16777216"),
    "lengths long": (([0.1, 0.2], [0.5, 0.6], 2**24 + 1), ValueError, r"seqlens_kv: received 16777217.*, allowed 1"),
    "lengths shape": (([0.1, 0.2], [0.5, 0.6], [64]), ValueError, r"seqlens_kv shape: received \[1\], .* or \[2\]"),
    "lengths floats": (([0.1, 0.2], [0.5, 0.6], 64.0), TypeError, "seqlens_kv: received float64, allowed .* integer"),
    **{
        f"few {x}": (([0.1, 0.2, 0.3], x, 64), ValueError, r"sparsity: received .*, allowed two .* 0\.1\.\.0\.9$")
        for x in ([0.5, 0.5, 0.95], [0.0, 0.05, 0.95], [0.09, 0.3, 0.91])
    },
    "steep": (([0.1, 0.2], [0.5, 0.5000001], 64), ValueError, "sparsity: received .*, allowed .*, further apart"),
    "steep down": (([0.2, 0.1], [0.5, 0.5000001], 64), ValueError, "sparsity: received .*, allowed .*, further apart"),
}  # fmt: skip


@pytest.mark.parametrize(("points", "error", "text"), BAD_POINTS.values(), ids=BAD_POINTS)
def test_bad_points_are_named(points: tuple[Any, Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fit_scale_factor(*points)


@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        (0.0, 1.0, ValueError, "a: received 0.0, allowed a finite number above 0"),
        (math.inf, 1.0, ValueError, "a: received inf, allowed a finite number above 0"),
        (NAN, 1.0, ValueError, "a: received nan, allowed a finite number above 0"),
        ("1", 1.0, TypeError, "a: received <U1, allowed a finite number above 0"),
        (1.0, NAN, ValueError, "b: received nan, allowed a finite number"),
        (1.0, -math.inf, ValueError, "b: received -inf, allowed a finite number"),
        (1.0, [1.0], ValueError, r"b shape: received \[1\], allowed a finite number"),
    ],
)
def test_bad_laws_are_named(a: Any, b: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ScaleFactor(a, b)


@pytest.mark.parametrize(
    ("sparsity", "seqlen_kv", "error", "text"),
    [
        (1.1, 64, ValueError, "sparsity: received 1.1, allowed a number from 0 to 1"),
        (-0.1, 64, ValueError, "sparsity: received -0.1, allowed a number from 0 to 1"),
        (NAN, 64, ValueError, "sparsity: received nan, allowed a number from 0 to 1"),
        ("0.5", 64, TypeError, "sparsity: received <U3, allowed a number from 0 to 1"),
        (True, 64, TypeError, "sparsity: received bool, allowed a number from 0 to 1"),
        (0.5, 0, ValueError, r"seqlen_kv: received 0, allowed 1\.\.16777216"),
        (0.5, 2**24 + 1, ValueError, r"seqlen_kv: received 16777217, allowed 1\.\.16777216"),
        (0.5, 64.0, ValueError, r"seqlen_kv: received 64.0, allowed 1\.\.16777216"),
    ],
)
def test_bad_targets_are_named(sparsity: Any, seqlen_kv: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ScaleFactor(1.0, 1.0).threshold(sparsity, seqlen_kv)
