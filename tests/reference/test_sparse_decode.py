"""The oracles of threshold-sparse and gated decode against the rules written out, ties and edges known by hand."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from reference.flash_decode import flash_decode
from reference.sparse_decode import SparseDecode, gated_decode, logsigmoid, sparse_decode

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH, Q_HEADS, KV_HEADS, D, ROWS = 3, 4, 2, 3, 23
LENGTHS = [23, 0, 17]


def inputs(seed: int = 0, whole: bool = False) -> dict[str, Any]:
    """Small random arrays; whole numbers, when asked for, make ties."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (BATCH, Q_HEADS, D),
        "k": (BATCH, ROWS, KV_HEADS, D),
        "v": (BATCH, ROWS, KV_HEADS, D),
        "alpha": (BATCH, Q_HEADS),
        "delta": (BATCH, KV_HEADS, ROWS),
    }
    draw = (lambda s: rng.integers(-2, 3, s).astype(np.float64)) if whole else (lambda s: rng.standard_normal(s))
    return {name: draw(shape) for name, shape in shapes.items()}


def call(arrays: dict[str, Any], gated: bool, **options: Any) -> SparseDecode:
    q, k, v = (arrays[x] for x in "qkv")
    if gated:
        return gated_decode(q, k, v, arrays["alpha"], arrays["delta"], **options)
    return sparse_decode(q, k, v, **options)


def group_written_out(
    q: Any, k: Any, v: Any, alpha: Any, delta: Any, options: dict[str, Any]
) -> tuple[list[Any], list[list[int]], set[int], set[int]]:
    """The heads of one KV head, tile after tile with running maxima and the online update, split after split.

    Returns (o, lse) of each head, [total, skipped] of each split, tiles kept, tiles whose keys were read.
    """
    n, d, tile_kv = len(k), q.shape[1], options.get("tile_kv", 128)
    scale = options.get("softmax_scale") or d**-0.5
    left = options.get("window_size", (None, None))[0]
    n_tiles = math.ceil(n / tile_kv)
    run = math.ceil(n_tiles / options.get("n_splits", 1))
    thresholds = [options.get(x) for x in ("softmax_threshold", "gate_threshold")]
    thresholds = [min(1.0, d / max(n, 1)) if x is None else x for x in thresholds]
    log_softmax, log_gate = (math.log(x) if x else -math.inf for x in thresholds)
    parts, counts, kept, read = [], [], set(), set()
    for split in range(options.get("n_splits", 1)):
        b, u_run = -math.inf, -math.inf
        m, total = [-math.inf] * len(q), [0.0] * len(q)
        acc = np.zeros((len(q), v.shape[1]))
        count = [0, 0]
        for t in range(min((split + 1) * run, n_tiles) - 1, split * run - 1, -1):
            inside = range(t * tile_kv, min((t + 1) * tile_kv, n))
            keys = [j for j in inside if left is None or j >= n - 1 - left]
            if not keys:
                continue
            count[0] += 1
            if alpha is not None:
                deltas = [delta[j] for j in inside] + [0.0] * ((t + 1) * tile_kv > n)
                u = max(x * y for x in (max(alpha), min(alpha)) for y in (max(deltas), min(deltas)))
                if u_run > -math.inf and scale * (u - u_run) < log_gate:
                    count[1] += 1
                    continue
                u_run = max(u_run, u)
            read.add(t)
            x = np.array([[float(np.dot(row, k[j])) for j in keys] for row in q])
            if alpha is not None:
                gates = np.array([[a * delta[j] for j in keys] for a in alpha])
                if options.get("is_logsigmoid_gate", True):
                    c = np.minimum(abs(gates), 4)
                    fast = np.minimum(gates, 0) - 0.0567487 * c**2 + 0.37664706 * c - 0.65169323
                    gates = fast if options.get("fast_logsigmoid", True) else np.log(1 / (1 + np.exp(-gates)))
                x += gates
            if b > -math.inf and scale * (x.max() - b) < log_softmax:
                count[1] += 1
                continue
            b = max(b, x.max())
            kept.add(t)
            for h in range(len(q)):
                new = max(m[h], scale * x[h].max())
                p = [math.exp(scale * s - new) for s in x[h]]
                shrink = math.exp(m[h] - new)
                total[h] = total[h] * shrink + sum(p)
                acc[h] = acc[h] * shrink + sum(w * v[j] for w, j in zip(p, keys, strict=True))
                m[h] = new
        parts.append([(a / s, x + math.log(s)) if s else (a, -math.inf) for a, s, x in zip(acc, total, m, strict=True)])
        counts.append(count)
    heads = []
    for h in range(len(q)):
        lse = np.logaddexp.reduce([part[h][1] for part in parts])
        o = sum(math.exp(x - lse) * a for a, x in (part[h] for part in parts) if x > -math.inf)
        heads.append((o if lse > -math.inf else np.zeros(v.shape[1]), lse))
    return heads, counts, kept, read


def check_written_out(arrays: dict[str, Any], gated: bool, lengths: list[int], **options: Any) -> tuple[int, int]:
    """Returns how many tiles were skipped by their gates and how many in all."""
    got = call(arrays, gated, seqlens_kv=np.array(lengths), **options)
    group = Q_HEADS // KV_HEADS
    n_tiles = got.stats.kept.shape[-1]
    assert n_tiles == math.ceil(max(lengths) / options["tile_kv"])
    for b, kv in np.ndindex(BATCH, KV_HEADS):
        heads, n = slice(kv * group, (kv + 1) * group), lengths[b]
        want, counts, kept, read = group_written_out(
            arrays["q"][b, heads],
            arrays["k"][b, :n, kv],
            arrays["v"][b, :n, kv],
            arrays["alpha"][b, heads] if gated else None,
            arrays["delta"][b, kv, :n] if gated else None,
            options,
        )
        for mask, tiles in ((got.stats.kept, kept), (got.stats.keys_read, read)):
            assert mask[b, kv].tolist() == [t in tiles for t in range(n_tiles)]
        assert got.stats.tiles_total[b, kv].tolist() == [count[0] for count in counts]
        assert got.stats.tiles_skipped[b, kv].tolist() == [count[1] for count in counts]
        for h, (o, lse) in enumerate(want):
            np.testing.assert_allclose(got.o[b, kv * group + h], o, **CLOSE)
            np.testing.assert_allclose(got.lse[b, kv * group + h], lse, **CLOSE)
    skipped = int(got.stats.tiles_skipped.sum())
    return int(got.stats.tiles_total.sum() - got.stats.keys_read.sum()), skipped


@pytest.mark.parametrize("gated", [False, True], ids=["sparse", "gated"])
@pytest.mark.parametrize("whole", [False, True], ids=["random", "ties"])
def test_the_prefix_maximum_is_the_sequential_rule(gated: bool, whole: bool) -> None:
    """The oracle decides from prefix maxima at once; here each tile is decided after the one before it."""
    skipped = np.zeros(2, np.int64)
    thresholds = (None, 0.0, 1e-3, math.exp(-2.0), 0.5, 1.0)
    for seed, (tile_kv, n_splits) in enumerate(product((1, 2, 4, 128), (1, 2, 3, 40))):
        threshold, gate = thresholds[seed % 6], thresholds[(seed // 2 + 3) % 6]
        options: dict[str, Any] = {"tile_kv": tile_kv, "n_splits": n_splits, "softmax_threshold": threshold}
        options["softmax_scale"] = (1.0, None, 4.0)[seed % 3]
        if gated:
            options |= {"gate_threshold": gate, "is_logsigmoid_gate": seed % 2 == 0, "fast_logsigmoid": seed % 4 == 0}
        for left in (None, 0, 9):
            arrays = inputs(seed, whole)
            skipped += check_written_out(arrays, gated, LENGTHS, window_size=(left, None), **options)
    # The loops have to have had something to skip, by either test.
    assert skipped[1] - skipped[0] > 20
    assert (skipped[0] > 20) == gated


def one_head(scores: list[float]) -> dict[str, Any]:
    """One query head whose unscaled scores are these, and whose values are the keys' positions."""
    return {
        "q": np.ones((1, 1, 1)),
        "k": np.array(scores)[None, :, None, None],
        "v": np.arange(float(len(scores)))[None, :, None, None],
    }


def test_by_hand() -> None:
    """Right to left, tiles of two: maxima 5, 1, 4, 3. 1 is 3 below 4; the others are not below the largest before."""
    arrays = one_head([5.0, 0.0, 1.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    got = call(arrays, False, softmax_threshold=math.exp(-2.5), tile_kv=2)
    assert got.stats.kept.tolist() == [[[True, False, True, True]]]
    assert got.stats.tiles_total.tolist() == [[[4]]]
    assert got.stats.tiles_skipped.tolist() == [[[1]]]
    assert got.stats.margin[0, 0] == 0.5  # 1 - 4 + 2.5
    weights = {0: math.exp(5), 1: 1.0, 4: math.exp(4), 5: math.exp(2), 6: math.exp(3), 7: 1.0}
    total = sum(weights.values())
    np.testing.assert_allclose(got.o[0, 0, 0], sum(j * w for j, w in weights.items()) / total, **CLOSE)
    np.testing.assert_allclose(got.lse[0, 0], math.log(total), **CLOSE)


def test_each_split_starts_anew() -> None:
    """In two splits of two tiles, 1 is the first tile visited on the left, and the 5 after it raises the maximum."""
    arrays = one_head([5.0, 0.0, 1.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    got = call(arrays, False, softmax_threshold=math.exp(-2.5), tile_kv=2, n_splits=2)
    assert got.stats.kept.all()
    assert got.stats.tiles_total.tolist() == [[[2, 2]]]
    got = call(arrays, False, softmax_threshold=1.0, tile_kv=2, n_splits=3)
    assert got.stats.tiles_total.tolist() == [[[2, 2, 0]]], "runs of ceil(4 / 3) tiles leave the last split empty"


@pytest.mark.parametrize(("below", "kept"), [(0.0, True), (1e-9, False)], ids=["tie", "below"])
@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-6])
def test_a_tie_is_kept(threshold: float, below: float, kept: bool) -> None:
    arrays = one_head([math.log(threshold) - below, 0.0])
    got = call(arrays, False, softmax_threshold=threshold, tile_kv=1)
    assert got.stats.kept.tolist() == [[[kept, True]]]
    arrays |= {"alpha": np.ones((1, 1)), "delta": np.array([[[math.log(threshold) - below, 0.0]]])}
    got = call(arrays, True, softmax_threshold=0.0, gate_threshold=threshold, tile_kv=1)
    assert got.stats.keys_read.tolist() == [[[kept, True]]]


def test_one_head_keeps_a_tile_for_its_group() -> None:
    """Head 0 alone would skip key 0; head 1, of the same group, has its largest score there."""
    q = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    k = np.array([[-9.0, 3.0], [3.0, 0.0]])[None, :, None]
    options = {"softmax_threshold": 0.5, "tile_kv": 1, "softmax_scale": 1.0}
    assert sparse_decode(q, k, k, **options).stats.kept.tolist() == [[[True, True]]]
    assert sparse_decode(q[:, :1], k, k, **options).stats.kept.tolist() == [[[False, True]]]
    # As KV heads of their own they decide by themselves.
    alone = sparse_decode(q, np.repeat(k, 2, axis=2), np.repeat(k, 2, axis=2), **options)
    assert alone.stats.kept.tolist() == [[[False, True], [True, True]]]


def test_heads_that_pad_a_group_do_not_join() -> None:
    """With all scores below 0, a head of score 0 would be every tile's maximum and nothing would be skipped."""
    got = call(one_head([-9.0, -2.0]), False, softmax_threshold=0.5, tile_kv=1)
    assert got.stats.kept.tolist() == [[[False, True]]]


@pytest.mark.parametrize("gated", [False, True], ids=["sparse", "gated"])
def test_default_thresholds(gated: bool) -> None:
    """d over the length of each sequence, whatever the others' are, and at most 1."""
    arrays = inputs(3)
    arrays["q"] *= 2
    lengths = np.array([23, 2, 17])
    got = call(arrays, gated, seqlens_kv=lengths, tile_kv=1)
    assert got.stats.tiles_skipped.all(axis=-1)[[0, 2]].all()
    for b, n in enumerate(lengths):
        row = {name: x[b : b + 1] for name, x in arrays.items()}
        value = min(1.0, D / n)
        options = {"softmax_threshold": value} | ({"gate_threshold": value} if gated else {})
        want = call(row, gated, seqlens_kv=lengths[b : b + 1], tile_kv=1, **options)
        np.testing.assert_array_equal(got.o[b], want.o[0])
        assert got.stats.kept[b, :, :n].tolist() == want.stats.kept[0].tolist()


OFF = {"softmax_threshold": 0.0}


@pytest.mark.parametrize("n_splits", [1, 3])
@pytest.mark.parametrize("window", [(None, None), (6, 0)], ids=["all", "window"])
def test_off_is_dense(n_splits: int, window: Any) -> None:
    arrays = inputs(1)
    options: dict[str, Any] = {"seqlens_kv": np.array(LENGTHS), "window_size": window, "softmax_scale": 3.0}
    got = call(arrays, False, tile_kv=2, n_splits=n_splits, **OFF, **options)
    want = flash_decode(arrays["q"], arrays["k"], arrays["v"], **options)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)
    assert got.stats.tiles_skipped.sum() == 0
    assert np.isinf(got.stats.margin).all()


def test_gates_off_is_dense_with_another_dimension() -> None:
    """For one head per KV head a linear gate is a product like the others: alpha in q, delta in k."""
    arrays = {name: x[:, :2] if name in ("q", "alpha") else x for name, x in inputs(2).items()}
    got = call(arrays, True, gate_threshold=0.0, is_logsigmoid_gate=False, softmax_scale=0.7, tile_kv=4, **OFF)
    q = np.concatenate([arrays["q"], arrays["alpha"][..., None]], axis=-1)
    k = np.concatenate([arrays["k"], np.moveaxis(arrays["delta"], 1, 2)[..., None]], axis=-1)
    want = flash_decode(q, k, arrays["v"], softmax_scale=0.7)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)


def test_as_many_splits_as_tiles_is_dense() -> None:
    arrays = inputs(4)
    got = call(arrays, False, softmax_threshold=1.0, tile_kv=2, n_splits=12, softmax_scale=9.0)
    want = flash_decode(arrays["q"], arrays["k"], arrays["v"], softmax_scale=9.0)
    assert got.stats.tiles_skipped.sum() == 0
    np.testing.assert_allclose(got.o, want.o, **CLOSE)


@pytest.mark.parametrize("gated", [False, True], ids=["sparse", "gated"])
def test_empty_and_single_tile(gated: bool) -> None:
    arrays = inputs(5)
    options = {"softmax_threshold": 1.0} | ({"gate_threshold": 1.0} if gated else {})
    got = call(arrays, gated, seqlens_kv=np.array([0, 1, 4]), tile_kv=4, **options)
    assert not got.o[0].any()
    assert np.isneginf(got.lse[0]).all()
    assert got.stats.tiles_total[..., 0].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert got.stats.kept[..., 0].tolist() == [[False, False], [True, True], [True, True]]
    np.testing.assert_allclose(got.o[1], np.repeat(arrays["v"][1, 0], 2, axis=0), **CLOSE)
    nothing = call({x: y[:, :0] if x in "kv" else y[..., :0] if x == "delta" else y for x, y in arrays.items()}, gated)
    assert nothing.stats.kept.shape == (BATCH, KV_HEADS, 0)
    assert not nothing.o.any()


@pytest.mark.parametrize("gated", [False, True], ids=["sparse", "gated"])
def test_packed_is_flat(gated: bool) -> None:
    arrays = inputs(6)
    cu = np.array([1, 24, 24, 41])
    options = {"softmax_threshold": 0.4, "tile_kv": 2, "n_splits": 2, "softmax_scale": 2.0}
    options |= {"gate_threshold": 0.4} if gated else {}
    packed = dict(arrays)
    for name in "kv":
        packed[name] = np.full((44, KV_HEADS, D), np.nan)
    packed["delta"] = np.full((KV_HEADS, 44), np.nan)
    for b, n in enumerate(LENGTHS):
        rows = slice(cu[b], cu[b] + n)
        packed["k"][rows], packed["v"][rows] = arrays["k"][b, :n], arrays["v"][b, :n]
        packed["delta"][:, rows] = arrays["delta"][b, :, :n]
    got = call(packed, gated, cu_seqlens_kv=cu, **options)
    want = call(arrays, gated, seqlens_kv=np.array(LENGTHS), **options)
    np.testing.assert_array_equal(got.stats.kept, want.stats.kept)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    used = call(packed, gated, cu_seqlens_kv=cu, seqlens_kv=np.array([20, 0, 5]), **options)
    want = call(arrays, gated, seqlens_kv=np.array([20, 0, 5]), **options)
    np.testing.assert_allclose(used.o, want.o, **CLOSE)


def test_what_is_not_read_may_be_anything() -> None:
    arrays = inputs(7)
    options: dict[str, Any] = {"softmax_threshold": 0.5, "gate_threshold": 0.5, "softmax_scale": 2.0, "tile_kv": 3}
    options |= {"seqlens_kv": np.array(LENGTHS), "window_size": (19, None)}
    want = call(arrays, True, **options)
    dirty = {name: x.copy() for name, x in arrays.items()}
    tiles = want.stats.kept.shape[-1]
    for b, kv, t in np.ndindex(BATCH, KV_HEADS, tiles):
        rows = slice(3 * t, 3 * t + 3)
        if not want.stats.keys_read[b, kv, t]:
            dirty["k"][b, rows, kv] = np.nan
        if not want.stats.kept[b, kv, t]:
            dirty["v"][b, rows, kv] = np.nan
    for b, n in enumerate(LENGTHS):
        dirty["k"][b, n:], dirty["v"][b, n:], dirty["delta"][b, :, n:] = np.nan, np.nan, np.nan
        dirty["k"][b, : max(n - 20, 0)] = dirty["v"][b, : max(n - 20, 0)] = np.nan
    assert np.isnan(dirty["k"][0]).any()
    got = call(dirty, True, **options)
    np.testing.assert_array_equal(got.o, want.o)
    np.testing.assert_array_equal(got.stats.kept, want.stats.kept)


def test_a_window_hides_maxima() -> None:
    """Key 2, of the largest score, shares a tile with visible keys; it neither weighs nor keeps its tile."""
    arrays = one_head([0.0, 0.0, 9.0, -5.0, 1.0, 0.0])
    got = call(arrays, False, softmax_threshold=0.5, tile_kv=2, window_size=(2, None))
    assert got.stats.kept.tolist() == [[[False, False, True]]]
    assert got.stats.tiles_total.tolist() == [[[2]]]
    assert call(arrays, False, softmax_threshold=0.5, tile_kv=2).stats.kept.tolist() == [[[False, True, True]]]


def gate_bounds(alpha: list[float], delta: list[float], **options: Any) -> list[bool]:
    """Which tiles of two keys pass a gate of threshold 0.5 at scale 1, with scores of 0."""
    zeros = np.zeros((1, len(delta), 1, 1))
    q = np.zeros((1, len(alpha), 1))
    gates = np.array([alpha]), np.array([[delta]])
    stats = gated_decode(q, zeros, zeros, *gates, gate_threshold=0.5, tile_kv=2, **OFF, **options).stats
    read: list[bool] = stats.keys_read[0, 0].tolist()
    return read


def test_gate_bounds_by_hand() -> None:
    assert gate_bounds([1.0], [1.0, 2.0, 0.0, 3.0]) == [False, True]
    # Two negative extremes make a large product: -2 * -3 is above 1 * 4.
    assert gate_bounds([-2.0, 1.0], [-3.0, 0.0, 4.0, 4.0]) == [True, True]
    assert gate_bounds([1.0], [-3.0, 0.0, 4.0, 4.0]) == [False, True]
    # -9 in the last tile alone would be 8 below; its missing key counts 0.
    assert gate_bounds([1.0], [-1.0, -1.0, -9.0]) == [False, True]
    assert gate_bounds([1.0], [-1.0, -1.0, -9.0, -9.0]) == [True, True]
    # No head of alpha 0 joins a group: the tiles' largest products are -9 and -1.
    assert gate_bounds([1.0], [-9.0, -9.0, -1.0, -1.0]) == [False, True]
    # The bound is on the product, not on its logsigmoid, in which 6 and 5 are nearly the same.
    assert gate_bounds([1.0], [5.0, 5.0, 6.0, 6.0]) == [False, True]
    # Rows in use count, visible or not: the window shows keys 1 to 3 only, and 3 is at key 0.
    assert gate_bounds([1.0], [3.0, 0.0, 2.0, 2.0], window_size=(2, None)) == [True, True]
    assert gate_bounds([1.0], [0.0, 3.0, 9.0, 9.0, 2.0, 2.0]) == [False, True, True]


def test_gate_skipped_tiles_do_not_raise_the_maximum_of_scores() -> None:
    """The middle tile's scores are the largest, but its gate closes it before they are seen."""
    arrays = one_head([1.0, 9.0, 0.0]) | {"alpha": np.ones((1, 1)), "delta": np.array([[[0.0, -9.0, 0.0]]])}
    options = {"softmax_threshold": 0.5, "is_logsigmoid_gate": False, "tile_kv": 1}
    assert call(arrays, True, gate_threshold=0.5, **options).stats.kept.tolist() == [[[True, False, True]]]
    arrays["delta"][...] = 0.0
    assert call(arrays, True, gate_threshold=0.5, **options).stats.kept.tolist() == [[[False, True, True]]]


def test_logsigmoid() -> None:
    x = np.linspace(-30, 30, 6001)
    exact = -np.log1p(np.exp(-x))
    np.testing.assert_allclose(logsigmoid(x, fast=False), exact, rtol=1e-12)
    assert logsigmoid(np.array(0.0), fast=True) == -0.65169323
    assert logsigmoid(np.array([-1e4]), fast=False) == -1e4
    errors = np.abs(logsigmoid(x, fast=True) - exact)
    assert 0.05 < errors.max() < 0.0531
    assert logsigmoid(x.astype(np.float32), fast=True).dtype == np.float32


def test_invariances() -> None:
    arrays = inputs(8)
    options: dict[str, Any] = {"softmax_threshold": 0.6, "gate_threshold": 0.6, "softmax_scale": 3.0, "tile_kv": 3}
    options["seqlens_kv"] = np.array(LENGTHS)
    want = call(arrays, True, **options)
    assert 0 < want.stats.tiles_skipped.sum() < want.stats.tiles_total.sum()
    # Query heads of a group in another order.
    turn = [1, 0, 3, 2]
    got = call(arrays | {"q": arrays["q"][:, turn], "alpha": arrays["alpha"][:, turn]}, True, **options)
    np.testing.assert_array_equal(got.stats.kept, want.stats.kept)
    np.testing.assert_allclose(got.o, want.o[:, turn], **CLOSE)
    # Keys of the first tile in another order.
    turned = [2, 0, 1, *range(3, ROWS)]
    moved = {name: arrays[name][:, turned] for name in "kv"} | {"delta": arrays["delta"][..., turned]}
    got = call(arrays | moved, True, **options)
    np.testing.assert_array_equal(got.stats.kept, want.stats.kept)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    # Sequences in another order.
    turn = [2, 0, 1]
    shuffled = {name: x[turn] for name, x in arrays.items()}
    got = call(shuffled, True, **options | {"seqlens_kv": np.array(LENGTHS)[turn]})
    np.testing.assert_array_equal(got.o, want.o[turn])
    np.testing.assert_array_equal(got.stats.tiles_skipped, want.stats.tiles_skipped[turn])


def test_more_threshold_skips_more() -> None:
    arrays = inputs(9)
    counts = [
        int(call(arrays, False, softmax_threshold=x, tile_kv=1, softmax_scale=2.0).stats.tiles_skipped.sum())
        for x in (0.0, 1e-4, 1e-2, 0.3, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[-1]


@pytest.mark.parametrize("value", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["softmax_threshold", "gate_threshold"])
def test_thresholds_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: received"):
        call(inputs(), True, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_kv": 0}, "n_splits, tile_kv: received 1, 0"),
        ({"n_splits": 0}, "n_splits, tile_kv: received 0, 128"),
        ({"softmax_scale": 0.0}, "softmax_scale: received 0.0"),
        ({"softmax_scale": -1.0}, "softmax_scale: received -1.0"),
        ({"softmax_scale": math.nan}, "softmax_scale: received nan"),
        ({"window_size": (-1, None)}, "window_size: received"),
        ({"seqlens_kv": np.array([24, 0, 0])}, "seqlens_kv: received 24"),
        ({"q": np.zeros((BATCH, 1, Q_HEADS, D))}, "q: received shape"),
        ({"q": np.zeros((BATCH, 3, D))}, "q heads: received 3"),
        ({"alpha": np.zeros((BATCH, KV_HEADS))}, "alpha: received shape"),
        ({"delta": np.zeros((BATCH, ROWS, KV_HEADS))}, r"delta: received shape \(3, 23, 2\), allowed \(3, 2, 23\)"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    arrays = inputs()
    changed = {name: x for name, x in options.items() if name in arrays}
    rest = {name: x for name, x in options.items() if name not in arrays}
    with pytest.raises(ValueError, match=message):
        call(arrays | changed, True, **rest)
