"""The skip-softmax oracle against the rule written out; the calibration against one call per threshold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reference.flash_decode import flash_decode
from reference.skip_softmax import ScaleFactor, calibrate, fit_scale_factor, skip_softmax_decode

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH, Q_HEADS, KV_HEADS, D, ROWS = 3, 4, 2, 3, 23
LENGTHS = np.array([23, 0, 17])


def inputs(seed: int = 0, whole: bool = False) -> tuple[Any, Any, Any]:
    """Small random arrays; whole numbers, when asked for, make ties."""
    rng = np.random.default_rng(seed)
    shapes = ((BATCH, Q_HEADS, D), (BATCH, ROWS, KV_HEADS, D), (BATCH, ROWS, KV_HEADS, D))
    draw = (lambda s: rng.integers(-2, 3, s).astype(np.float64)) if whole else rng.standard_normal
    q, k, v = (draw(shape) for shape in shapes)
    return q, k, v


def head_written_out(
    q: Any, k: Any, v: Any, threshold: float | None, tile_kv: int, scale: float, left: int | None
) -> tuple[Any, float, list[bool]]:
    """One head, tile after tile with a running maximum and the online update; o, lse and the tiles kept."""
    n, m, total, acc, kept = len(k), -math.inf, 0.0, np.zeros(v.shape[1]), []
    for begin in range(0, n, tile_kv):
        keys = [j for j in range(begin, min(begin + tile_kv, n)) if left is None or j >= n - 1 - left]
        scores = [scale * float(np.dot(q, k[j])) for j in keys]
        skip = not keys or (bool(threshold) and max(scores) < m + math.log(threshold or 1.0))
        kept.append(not skip)
        if skip:
            continue
        new = max(m, *scores)
        p = [math.exp(s - new) for s in scores]
        shrink = math.exp(m - new)
        total, m = total * shrink + sum(p), new
        acc = acc * shrink + sum(w * v[j] for w, j in zip(p, keys, strict=True))
    return (acc / total, m + math.log(total), kept) if total else (acc, -math.inf, kept)


@pytest.mark.parametrize("whole", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("threshold", [None, 0.0, 1e-3, math.exp(-2.0), 0.5, 1.0])
@pytest.mark.parametrize("tile_kv", [1, 2, 5, 128])
def test_the_prefix_maximum_is_the_sequential_rule(tile_kv: int, threshold: float | None, whole: bool) -> None:
    """The oracle decides from prefix maxima at once; here each tile is decided after the one before it."""
    q, k, v = inputs(tile_kv, whole)
    for scale, left in ((1.0, None), (-2.0, 9), (4.0, 0)):
        got = skip_softmax_decode(
            q,
            k,
            v,
            skip_softmax_threshold=threshold,
            tile_kv=tile_kv,
            seqlens_kv=LENGTHS,
            softmax_scale=scale,
            window_size=(left, None),
        )
        n_tiles = got.stats.kept.shape[-1]
        assert n_tiles == math.ceil(23 / tile_kv)
        for b, h in np.ndindex(BATCH, Q_HEADS):
            n, kv = LENGTHS[b], h // 2
            o, lse, kept = head_written_out(q[b, h], k[b, :n, kv], v[b, :n, kv], threshold, tile_kv, scale, left)
            np.testing.assert_allclose(got.o[b, h], o, **CLOSE)
            np.testing.assert_allclose(got.lse[b, h], lse, **CLOSE)
            assert got.stats.kept[b, h].tolist() == kept + [False] * (n_tiles - len(kept))
            unseen = 0 if left is None else max(n - 1 - left, 0) // tile_kv
            assert got.stats.tiles_total[b, h] == len(kept) - unseen
            assert got.stats.tiles_skipped[b, h] == len(kept) - unseen - sum(kept)
            assert got.stats.values_read[b, kv].tolist() == got.stats.kept[b, 2 * kv : 2 * kv + 2].any(axis=0).tolist()


def one_head(scores: list[float]) -> tuple[Any, Any, Any]:
    """One query head whose scores are these, and whose values are the keys' positions."""
    v = np.arange(float(len(scores)))[None, :, None, None]
    return np.ones((1, 1, 1)), np.array(scores)[None, :, None, None], v


def test_by_hand() -> None:
    """Left to right, tiles of two: maxima 3, 1, 5, 4. 1 is 2 below 3; 4 is only 1 below 5."""
    got = skip_softmax_decode(
        *one_head([3.0, 0.0, 1.0, 1.0, 5.0, 2.0, 4.0, 0.0]), skip_softmax_threshold=math.exp(-1.5), tile_kv=2
    )
    assert got.stats.kept.tolist() == [[[True, False, True, True]]]
    assert got.stats.tiles_total.tolist() == [[4]]
    assert got.stats.tiles_skipped.tolist() == [[1]]
    assert got.stats.margin.tolist() == [[0.5]]
    weights = {0: math.exp(3), 1: 1.0, 4: math.exp(5), 5: math.exp(2), 6: math.exp(4), 7: 1.0}
    total = sum(weights.values())
    np.testing.assert_allclose(got.o[0, 0, 0], sum(j * w for j, w in weights.items()) / total, **CLOSE)
    np.testing.assert_allclose(got.lse[0, 0], math.log(total), **CLOSE)


@pytest.mark.parametrize(("below", "kept"), [(0.0, True), (1e-9, False)], ids=["tie", "below"])
@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-6])
def test_a_tie_is_kept(threshold: float, below: float, kept: bool) -> None:
    scores = one_head([0.0, math.log(threshold) - below])
    got = skip_softmax_decode(*scores, skip_softmax_threshold=threshold, tile_kv=1)
    assert got.stats.kept.tolist() == [[[True, kept]]]


def test_a_head_that_skips_what_another_keeps() -> None:
    """Tile 1 matters to head 1 only: it is read, and weighs nothing for head 0. Nobody wants tile 2."""
    q = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    k = np.array([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])[None, :, None]
    v = np.array([[1.0, 1.0], [7.0, 7.0], [np.nan, np.nan]])[None, :, None]
    got = skip_softmax_decode(q, k, v, skip_softmax_threshold=0.5, tile_kv=1, softmax_scale=1.0)
    assert got.stats.kept.tolist() == [[[True, False, False], [True, True, False]]]
    assert got.stats.values_read.tolist() == [[[True, True, False]]]
    assert got.stats.tiles_skipped.tolist() == [[2, 1]]
    assert got.o[0, 0].tolist() == [1.0, 1.0]
    assert got.lse[0, 0] == 5.0
    np.testing.assert_allclose(got.o[0, 1], (1 + 7 * math.exp(5)) / (1 + math.exp(5)), **CLOSE)


@pytest.mark.parametrize("off", [None, 0, 0.0])
@pytest.mark.parametrize("window", [(None, None), (6, 0)], ids=["all", "window"])
def test_off_is_dense(off: float | None, window: Any) -> None:
    q, k, v = inputs(1)
    options: dict[str, Any] = {"seqlens_kv": LENGTHS, "window_size": window, "softmax_scale": 3.0}
    got = skip_softmax_decode(q, k, v, skip_softmax_threshold=off, tile_kv=2, **options)
    want = flash_decode(q, k, v, **options)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
    assert got.stats.tiles_skipped.sum() == 0
    assert np.isinf(got.stats.margin).all()


def test_empty_and_single_tile() -> None:
    q, k, v = inputs(2)
    got = skip_softmax_decode(q, k, v, skip_softmax_threshold=1.0, tile_kv=4, seqlens_kv=np.array([0, 1, 4]))
    assert not got.o[0].any()
    assert np.isneginf(got.lse[0]).all()
    assert got.stats.tiles_total.tolist() == [[0] * 4, [1] * 4, [1] * 4]
    assert got.stats.tiles_skipped.sum() == 0
    np.testing.assert_allclose(got.o[1], np.repeat(v[1, 0], 2, axis=0), **CLOSE)
    nothing = skip_softmax_decode(q, k[:, :0], v[:, :0], skip_softmax_threshold=0.5)
    assert nothing.stats.kept.shape == (BATCH, Q_HEADS, 0)
    assert not nothing.o.any()


def test_packed_is_flat_and_hidden_rows_may_be_anything() -> None:
    q, k, v = inputs(3)
    cu = np.array([1, 24, 24, 41])
    packed_k, packed_v = np.full((2, 44, KV_HEADS, D), np.nan)
    for b, n in enumerate(LENGTHS):
        packed_k[cu[b] : cu[b] + n], packed_v[cu[b] : cu[b] + n] = k[b, :n], v[b, :n]
    options: dict[str, Any] = {"skip_softmax_threshold": 0.3, "tile_kv": 2, "softmax_scale": 2.0}
    got = skip_softmax_decode(q, packed_k, packed_v, cu_seqlens_kv=cu, **options)
    want = skip_softmax_decode(q, k, v, seqlens_kv=LENGTHS, **options)
    assert want.stats.tiles_skipped.sum() > 0
    np.testing.assert_array_equal(got.stats.kept, want.stats.kept)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    # Rows before the window, in a tile of its own keys or not.
    windowed = skip_softmax_decode(q, k, v, window_size=(4, None), **options)
    k[:, :18], v[:, :18] = np.nan, np.nan
    np.testing.assert_array_equal(skip_softmax_decode(q, k, v, window_size=(4, None), **options).o, windowed.o)


def test_invariances() -> None:
    q, k, v = inputs(4)
    options: dict[str, Any] = {"skip_softmax_threshold": 0.3, "tile_kv": 3, "softmax_scale": 2.0}
    want = skip_softmax_decode(q, k, v, **options)
    # A key added to all keys moves a head's scores alike.
    moved = skip_softmax_decode(q, k + np.array([0.5, -1.0, 0.25]), v, **options)
    np.testing.assert_array_equal(moved.stats.kept, want.stats.kept)
    np.testing.assert_allclose(moved.o, want.o, **CLOSE)
    np.testing.assert_allclose(moved.lse, want.lse + 2.0 * (q @ np.array([0.5, -1.0, 0.25])), **CLOSE)
    # Query heads decide alone, so each one by itself gives the same.
    alone = skip_softmax_decode(q[:, ::2], k, v, **options)
    np.testing.assert_array_equal(alone.stats.kept, want.stats.kept[:, ::2])
    np.testing.assert_allclose(alone.o, want.o[:, ::2], **CLOSE)
    # Keys of the second tile in another order.
    turn = [0, 1, 2, 5, 3, 4, *range(6, ROWS)]
    turned = skip_softmax_decode(q, k[:, turn], v[:, turn], **options)
    np.testing.assert_array_equal(turned.stats.kept, want.stats.kept)
    np.testing.assert_allclose(turned.o, want.o, **CLOSE)


@pytest.mark.parametrize("value", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_thresholds_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="skip_softmax_threshold: received"):
        skip_softmax_decode(*inputs(), skip_softmax_threshold=value)
    with pytest.raises(ValueError, match="thresholds: received"):
        calibrate(*inputs(), [0.5, value])


def test_arguments_out_of_range() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="tile_kv: received 0"):
        skip_softmax_decode(q, k, v, skip_softmax_threshold=0.5, tile_kv=0)
    with pytest.raises(ValueError, match="q: received shape"):
        skip_softmax_decode(q[:, None], k, v, skip_softmax_threshold=0.5)
    for thresholds in ([], [0.0], [[0.5]]):
        with pytest.raises(ValueError, match="thresholds: received"):
            calibrate(q, k, v, thresholds)
    with pytest.raises(ValueError, match="no visible key"):
        calibrate(q, k, v, [0.5], seqlens_kv=np.zeros(BATCH, np.int64))


@pytest.mark.parametrize("window", [(None, None), (12, 0)], ids=["all", "window"])
def test_calibration_is_one_call_per_threshold(window: Any) -> None:
    q, k, v = inputs(5)
    thresholds = [0.9, 1e-12, 0.05, 0.3, 1.0]
    options: dict[str, Any] = {"tile_kv": 2, "seqlens_kv": LENGTHS, "softmax_scale": 2.0, "window_size": window}
    got = calibrate(q, k, v, thresholds, **options)
    dense = flash_decode(q, k, v, seqlens_kv=LENGTHS, softmax_scale=2.0, window_size=window).o
    assert got.thresholds.tolist() == thresholds
    for i, threshold in enumerate(thresholds):
        want = skip_softmax_decode(q, k, v, skip_softmax_threshold=threshold, **options)
        total = want.stats.tiles_total.sum()
        assert got.sparsity[i] == want.stats.tiles_skipped.sum() / total
        np.testing.assert_allclose(got.values_unread[i], 1 - want.stats.values_read.sum() / (total / 2), atol=1e-15)
        errors = [
            math.dist(want.o[b, h], dense[b, h]) / math.hypot(*dense[b, h])
            for b, h in np.ndindex(BATCH, Q_HEADS)
            if LENGTHS[b]
        ]
        np.testing.assert_allclose(got.error[i], max(errors), rtol=1e-9, atol=1e-14)
    assert 0 == got.sparsity[1] < got.sparsity[2] < got.sparsity[3] < got.sparsity[0] <= got.sparsity[4]
    assert got.values_unread[4] > 0


def test_the_fit_finds_the_curve() -> None:
    """Points on threshold * seqlen_kv = 3 exp(5 sparsity), and two outside the range that are not."""
    sparsity = np.array([0.05, 0.2, 0.5, 0.7, 0.95])
    lengths = np.array([1000, 4096, 2048, 8192, 100])
    thresholds = 3.0 * np.exp(5.0 * sparsity) / lengths
    thresholds[[0, -1]] = 1.0
    fit = fit_scale_factor(thresholds, sparsity, lengths)
    np.testing.assert_allclose(fit, [3.0, 5.0], rtol=1e-12)
    np.testing.assert_allclose(fit.threshold(0.5, 32768), 3.0 * math.exp(2.5) / 32768, rtol=1e-12)
    np.testing.assert_allclose(fit.threshold(0.5, 65536) * 2, fit.threshold(0.5, 32768), rtol=1e-12)
    assert fit.threshold(1.0, 16) == 1.0


def test_the_fit_is_of_least_squares() -> None:
    """In log: (0.2, 0), (0.5, 3), (0.8, 3); slope 5, mean 2 at 0.5."""
    thresholds = np.exp([0.0, 3.0, 3.0]) / 64
    fit = fit_scale_factor(thresholds, [0.2, 0.5, 0.8], 64)
    np.testing.assert_allclose(fit, [math.exp(2.0 - 2.5), 5.0], rtol=1e-12)


def test_the_fit_needs_two_points_in_the_range() -> None:
    for sparsity in ([0.5, 0.5, 0.95], [0.0, 0.05, 0.95], [0.09, 0.3, 0.91]):
        with pytest.raises(ValueError, match="sparsity: received"):
            fit_scale_factor([0.1, 0.2, 0.3], sparsity, 64)
    with pytest.raises(ValueError, match="sparsity: received shape"):
        fit_scale_factor([0.1, 0.2, 0.3], [0.5, 0.6], 64)
    with pytest.raises(ValueError, match="thresholds: received"):
        fit_scale_factor([0.1, 0.0], [0.5, 0.6], 64)
    with pytest.raises(ValueError, match="seqlens_kv: received"):
        fit_scale_factor([0.1, 0.2], [0.5, 0.6], [64, 0])
    for sparsity, seqlen_kv, name in ((1.1, 64, "sparsity"), (math.nan, 64, "sparsity"), (0.5, 0, "seqlen_kv")):
        with pytest.raises(ValueError, match=f"{name}: received"):
            ScaleFactor(1.0, 1.0).threshold(sparsity, seqlen_kv)


def test_a_fitted_threshold_reaches_its_sparsity() -> None:
    """Scores of 64 tiles whose largest fall evenly: at threshold exp(-x) the tiles more than x below are skipped."""
    q = np.ones((1, 1, 1))
    k = np.concatenate([[0.0], np.linspace(-0.1, -6.4, 64)])[None, :, None, None]
    found = calibrate(q, k, np.cos(k), np.exp(-np.linspace(0.05, 6.45, 65)), tile_kv=1)
    fit = fit_scale_factor(found.thresholds, found.sparsity, 65)
    for target in (0.25, 0.5, 0.75):
        got = skip_softmax_decode(q, k, k, skip_softmax_threshold=fit.threshold(target, 65), tile_kv=1)
        assert abs(got.stats.tiles_skipped.sum() / 65 - target) <= 1 / 65
