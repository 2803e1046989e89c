"""The prefill oracle against its rules written out one row at a time, and edges known by hand.

Warnings are errors in this project's tests, so the empty cases also show that nothing is divided by zero.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from reference.flash_attention import flash_attention, select_n_of_m
from reference.flash_decode import flash_decode

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
Q_HEADS, KV_HEADS, D, D_V = 4, 2, 3, 2
# Whole sequences, a longer cache, one query, no queries, no keys, and more queries than keys.
LENS_Q, LENS_KV = [19, 7, 1, 0, 4, 9], [19, 23, 11, 5, 0, 5]
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "left": {"window_size": (5, None)},
    "left and right": {"causal": False, "window_size": (2, 3)},
    "right": {"causal": False, "window_size": (None, 1)},
    "causal and right": {"window_size": (6, 2)},
    "own key only": {"window_size": (0, 0)},
    "1:4": {"sparsity_n": 1, "dense_recent_tokens": 0},
    "2:4": {"sparsity_n": 2, "dense_recent_tokens": 0},
    "3:4": {"sparsity_n": 3, "dense_recent_tokens": 0},
    "1:8": {"sparsity_n": 1, "sparsity_m": 8, "dense_recent_tokens": 0},
    "4:8": {"sparsity_n": 4, "sparsity_m": 8, "dense_recent_tokens": 0},
    "7:8": {"sparsity_n": 7, "sparsity_m": 8, "dense_recent_tokens": 0},
    "1:4 sink": {"sparsity_n": 1, "dense_sink_tokens": 3, "dense_recent_tokens": 0},
    "1:8 recent": {"sparsity_n": 1, "sparsity_m": 8, "dense_recent_tokens": 3},
    "2:4 not causal, all exceptions": {
        "causal": False,
        "sparsity_n": 2,
        "dense_sink_tokens": 2,
        "dense_recent_tokens": 5,
    },
    "2:8 window": {"sparsity_n": 2, "sparsity_m": 8, "dense_recent_tokens": 1, "window_size": (9, None)},
    "skip": {"skip_softmax_threshold": 0.5},
    "skip everything below": {"skip_softmax_threshold": 1.0},
    "skip at an edge": {"skip_softmax_threshold": math.exp(-2.0), "causal": False},
    "skip in a window": {"skip_softmax_threshold": 0.7, "window_size": (8, None)},
    "2:4 skip": {"skip_softmax_threshold": 0.6, "sparsity_n": 2, "dense_recent_tokens": 0},
    "1:8 skip": {"skip_softmax_threshold": 0.9, "sparsity_n": 1, "sparsity_m": 8, "dense_recent_tokens": 2},
}


def inputs(seed: int = 0, whole: bool = False) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Packed random arrays with rows that no sequence owns; whole numbers, when asked for, make ties."""
    rng = np.random.default_rng(seed)
    cu_q, cu_kv = np.cumsum([1, *LENS_Q]), np.cumsum([2, *LENS_KV])
    shapes = (cu_q[-1] + 2, Q_HEADS, D), (cu_kv[-1] + 1, KV_HEADS, D), (cu_kv[-1] + 1, KV_HEADS, D_V)
    draw = (lambda s: rng.integers(-2, 3, s).astype(np.float64)) if whole else rng.standard_normal
    q, k, v = (draw(shape) for shape in shapes)
    return q, k, v, {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}


class Row(NamedTuple):
    """What one query sees: its scores by key, and the keys that N:M leaves it."""

    scores: dict[int, float]
    stays: set[int]


def row_written_out(q: list[float], k: list[list[float]], p: int, ranked: bool, scale: float, options: Any) -> Row:
    left, right = options.get("window_size", (None, None))
    n, m = options.get("sparsity_n", 0), options.get("sparsity_m", 4)
    scores = {}
    for j, key in enumerate(k):
        hidden = (options.get("causal", True) and j > p) or (left is not None and j < p - left)
        if not hidden and (right is None or j <= p + right):
            scores[j] = scale * sum(a * b for a, b in zip(q, key, strict=True))
    if not n or not ranked:
        return Row(scores, set(scores))
    stays = set()
    for first in range(0, len(k), m):
        group = [j for j in range(first, first + m) if j in scores]
        for j in group:
            larger = sum(scores[i] > scores[j] or (m == 4 and scores[i] == scores[j] and i < j) for i in group)
            recent = 0 <= p - j < options.get("dense_recent_tokens", 64)
            if larger < n or recent or j < options.get("dense_sink_tokens", 0):
                stays.add(j)
    return Row(scores, stays)


class Head(NamedTuple):
    o: list[list[float]]
    lse: list[float]
    visited: set[tuple[int, int]]
    kept: set[tuple[int, int]]


def head_written_out(q: Any, k: Any, v: Any, tile_q: int, tile_kv: int, scale: float, options: Any) -> Head:
    """One head of one sequence: every tile after the one before it, with the online update of every row."""
    threshold = options.get("skip_softmax_threshold")
    log_lambda = math.log(threshold) if threshold else -math.inf
    head = Head([], [], set(), set())
    for top in range(0, len(q), tile_q):
        rows = [
            row_written_out(q[i].tolist(), k.tolist(), i + len(k) - len(q), len(q) > 1, scale, options)
            for i in range(top, min(top + tile_q, len(q)))
        ]
        m, total, acc = [-math.inf] * len(rows), [0.0] * len(rows), [np.zeros(v.shape[1]) for _ in rows]
        for begin in range(0, len(k), tile_kv):
            if not any(begin <= j < begin + tile_kv for row in rows for j in row.scores):
                continue
            at = top // tile_q, begin // tile_kv
            head.visited.add(at)
            left = [{j: row.scores[j] for j in row.stays if begin <= j < begin + tile_kv} for row in rows]
            largest = [max(x.values(), default=-math.inf) for x in left]
            if all(x < y + log_lambda for x, y in zip(largest, m, strict=True)):
                continue
            head.kept.add(at)
            for i, x in enumerate(left):
                if x:
                    new = max(m[i], largest[i])
                    shrink = math.exp(m[i] - new)
                    total[i] = total[i] * shrink + sum(math.exp(s - new) for s in x.values())
                    acc[i] = acc[i] * shrink + sum(math.exp(s - new) * v[j] for j, s in x.items())
                    m[i] = new
        for x, y, z in zip(m, total, acc, strict=True):
            head.o.append((z / y).tolist() if y else z.tolist())
            head.lse.append(x + math.log(y) if y else -math.inf)
    return head


@pytest.mark.parametrize("whole", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_rules_written_out(name: str, whole: bool) -> None:
    """The oracle ranks groups by sorting and decides about tiles from prefix maxima; here everything is in order."""
    options, scale = OPTIONS[name], 1.0 if whole else 1.7
    q, k, v, spans = inputs(3, whole)
    skipped = 0
    for tile_q, tile_kv in ((4, 3), (8, 16)):
        got = flash_attention(q, k, v, softmax_scale=scale, tile_q=tile_q, tile_kv=tile_kv, **spans, **options)
        assert got.o.dtype == got.lse.dtype == np.float64
        assert (got.o.shape, got.lse.shape) == ((*q.shape[:2], D_V), q.shape[:2])
        for b, h in np.ndindex(len(LENS_Q), Q_HEADS):
            rows, keys = (slice(*spans[x][b : b + 2]) for x in ("cu_seqlens_q", "cu_seqlens_kv"))
            want = head_written_out(q[rows, h], k[keys, h // 2], v[keys, h // 2], tile_q, tile_kv, scale, options)
            np.testing.assert_allclose(got.o[rows, h], np.array(want.o).reshape(-1, D_V), **CLOSE)
            np.testing.assert_allclose(got.lse[rows, h], want.lse, **CLOSE)
            kept = got.stats.kept[b][h]
            assert kept.shape == (math.ceil(LENS_Q[b] / tile_q), math.ceil(LENS_KV[b] / tile_kv))
            assert {(int(i), int(t)) for i, t in zip(*np.nonzero(kept), strict=True)} == want.kept
            assert got.stats.tiles_total[b, h] == len(want.visited)
            assert got.stats.tiles_skipped[b, h] == len(want.visited) - len(want.kept)
            skipped += len(want.visited) - len(want.kept)
    assert (skipped > 0) == ("skip" in name)


def test_every_option_has_its_own_result() -> None:
    """A table of options that were neutral would test nothing."""
    q, k, v, spans = inputs(3)
    results = [
        flash_attention(q, k, v, softmax_scale=1.7, tile_q=4, tile_kv=3, **spans, **options).o
        for options in OPTIONS.values()
    ]
    for i, name in enumerate(OPTIONS):
        assert min(np.abs(results[i] - x).max() for x in results[:i] + results[i + 1 :]) > 1e-3, name


def test_rows_that_see_nothing() -> None:
    """Rows that no sequence owns, a sequence without keys, and causal queries older than the first key."""
    q, k, v, spans = inputs()
    with np.errstate(all="raise"):
        got = flash_attention(q, k, v, skip_softmax_threshold=0.5, sparsity_n=2, tile_q=4, tile_kv=3, **spans)
    cu = spans["cu_seqlens_q"]
    blind = [0, *range(cu[4], cu[5]), *range(cu[5], cu[5] + 4), cu[-1], cu[-1] + 1]
    assert sorted(np.flatnonzero(np.isneginf(got.lse).all(axis=1))) == blind
    assert np.isfinite(np.delete(got.lse, blind, axis=0)).all()
    assert not got.o[blind].any()
    assert not got.stats.tiles_total[3:5].any()


def test_no_queries_and_no_sequences() -> None:
    """Sequences of no rows, and none at all."""
    k = np.ones((5, KV_HEADS, D))
    for cu_q, cu_kv in (([0, 0, 0], [0, 2, 5]), ([0], [5])):
        got = flash_attention(k[:0].repeat(2, axis=1), k, k, cu_seqlens_q=np.array(cu_q), cu_seqlens_kv=np.array(cu_kv))
        assert got.o.shape == (0, Q_HEADS, D)
        assert got.stats.tiles_total.shape == (len(cu_q) - 1, Q_HEADS)
        assert [x.shape for x in got.stats.kept] == [(Q_HEADS, 0, 1)] * (len(cu_q) - 1)
    assert flash_attention(np.zeros((2, 0, 4, 3)), np.zeros((2, 5, 2, 3)), np.zeros((2, 5, 2, 1))).o.shape == (
        2,
        0,
        4,
        1,
    )


def test_a_batch_is_its_sequences_end_to_end() -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal(s) for s in ((3, 6, Q_HEADS, D), (3, 11, KV_HEADS, D), (3, 11, KV_HEADS, D_V)))
    options: dict[str, Any] = {"sparsity_n": 2, "dense_recent_tokens": 1, "tile_q": 4, "tile_kv": 3}
    options["skip_softmax_threshold"] = 0.9
    got = flash_attention(q, k, v, **options)
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    spans = {"cu_seqlens_q": np.arange(4) * 6, "cu_seqlens_kv": np.arange(4) * 11}
    want = flash_attention(packed[0], packed[1], packed[2], **spans, **options)
    np.testing.assert_array_equal(got.o, want.o.reshape(got.o.shape))
    np.testing.assert_array_equal(got.lse, want.lse.reshape(3, 6, Q_HEADS))
    assert got.stats.tiles_skipped.sum() > 0
    for a, b in zip(got.stats.kept, want.stats.kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [(None, None), (4, None), (3, 2)], ids=str)
def test_new_tokens_of_decode(window: Any) -> None:
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal(s) for s in ((2, 5, Q_HEADS, D), (2, 9, KV_HEADS, D), (2, 9, KV_HEADS, D)))
    got, want = flash_attention(q, k, v, window_size=window), flash_decode(q, k, v, window_size=window)
    np.testing.assert_allclose(got.o, want.o, **CLOSE)
    np.testing.assert_allclose(got.lse, want.lse, **CLOSE)


@pytest.mark.parametrize("n", [0, None, 4, 8])
def test_dense_to_the_bit(n: int | None) -> None:
    q, k, v, spans = inputs(7)
    got = flash_attention(
        q, k, v, sparsity_n=n, sparsity_m=8 if n == 8 else 4, dense_recent_tokens=0, skip_softmax_threshold=0, **spans
    )
    want = flash_attention(q, k, v, **spans)
    np.testing.assert_array_equal(got.o, want.o)
    np.testing.assert_array_equal(got.lse, want.lse)
    assert np.isinf(got.stats.margin).all()
    assert np.isinf(got.stats.selection_margin).all()


def test_one_query_stays_dense() -> None:
    q, k, v, spans = inputs(8)
    got, dense = (
        flash_attention(q, k, v, sparsity_n=1, dense_recent_tokens=0, **spans),
        flash_attention(q, k, v, **spans),
    )
    one = int(spans["cu_seqlens_q"][2])
    np.testing.assert_allclose(got.o[one], dense.o[one], **CLOSE)
    assert np.abs(got.o[one - 1] - dense.o[one - 1]).max() > 1e-3


@pytest.mark.parametrize(
    ("scores", "first", "n", "m", "stays"),
    [
        ([1, 3, 2, 4], 0, 2, 4, "0101"),
        ([2, 2, 2, 2], 0, 1, 4, "1000"),
        ([2, 2, 2, 2], 0, 3, 4, "1110"),
        ([1, 2, 3, 2], 0, 2, 4, "0110"),
        ([3, 2, 2, 3], 0, 3, 4, "1101"),
        ([5, 5, 1, 5, 9, 1, 1, 1, 1, 9], 0, 2, 4, "1100110011"),  # the last group is filled up with -inf
        ([5, 1, 9, 1, 1, 1], 3, 1, 4, "101001"),  # key 3, keys 4 to 7 and key 8: three groups
        ([-math.inf, 1, -math.inf, 2, 0], 0, 2, 4, "_1_11"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0, 3, 8, "00000111"),
        ([7, 7, 1, 7, 2, 7, 3, 0], 0, 2, 8, "11010100"),  # four tie for two places and all stay
        ([7, 7, 1, 7, 2, 7, 3, 0], 0, 5, 8, "11010110"),
        ([0] * 8, 0, 1, 8, "11111111"),
        ([-math.inf] * 7 + [-3], 0, 4, 8, "_______1"),
        ([1, 2, 0, 3], 6, 1, 8, "0101"),
    ],
    ids=str,
)
def test_who_stays(scores: list[float], first: int, n: int, m: int, stays: str) -> None:
    """By hand; what is not visible, `_`, has no part in it."""
    got, _ = select_n_of_m(np.array(scores, np.float64), first, n, m)
    assert "".join("_" if want == "_" else str(int(x)) for x, want in zip(got, stays, strict=True)) == stays


def test_distances_of_a_selection() -> None:
    """2 of 4: a score that stays may fall to the third, one that does not has to pass the second."""
    scores = np.array([9.0, 4.0, 3.5, 1.0, 2.0, 7.0, 2.0, -np.inf, -np.inf, 5.0, -np.inf, -np.inf, 5.0, 1.0])
    _, distance = select_n_of_m(scores, 0, 2, 4)
    assert distance.tolist() == [5.5, 0.5, 0.5, 3.0, 0.0, 5.0, 0.0] + [np.inf] * 7


def one_head(scores: Any) -> tuple[Any, Any, Any]:
    """Rows whose scores are these, `[n_rows, n_keys]`: row i of q picks column i of k. Values are positions."""
    table = np.asarray(scores, np.float64)
    v = np.arange(float(table.shape[1]))[None, :, None, None]
    return np.eye(len(table))[None, :, None], table.T[None, :, None], v


def test_selection_margin_by_hand() -> None:
    """Row 0 has 0.5 between its second and third; row 1 a tie, which does not count, and 2 below it."""
    scores = [[9.0, 4.0, 3.5, 1.0], [6.0, 3.0, 3.0, 1.0]]
    options: dict[str, Any] = {"causal": False, "softmax_scale": 1.0, "sparsity_n": 2}
    for tile_q in (1, 2):
        got = flash_attention(*one_head(scores), dense_recent_tokens=0, tile_q=tile_q, **options)
        assert got.stats.selection_margin.tolist() == [[0.5]]
    # Row 0 is at position 2 and row 1 at 3, so that keys 1 and 2, or 2 and 3, and the sink stay anyway.
    exempt = flash_attention(*one_head(scores), dense_recent_tokens=2, dense_sink_tokens=1, **options)
    assert exempt.stats.selection_margin.tolist() == [[3.0]]
    some = flash_attention(*one_head([[9.0, 4.0, 1.0, 3.0]] * 2), dense_sink_tokens=2, dense_recent_tokens=0, **options)
    assert some.stats.selection_margin.tolist() == [[1.0]]


def test_exceptions_are_exact_to_the_token() -> None:
    """Scores fall from key to key, so that 1 of 4 is the first of each group; row i of four is at position 8 + i."""
    scores = np.tile(-1e-9 * np.arange(12.0), (4, 1))
    options: dict[str, Any] = {"softmax_scale": 1.0, "sparsity_n": 1}
    q, k, _ = one_head(scores)
    v = np.eye(12)[None, :, None]
    for sink, recent, keys in (
        (0, 0, [{0, 4, 8}] * 4),
        (3, 0, [{0, 1, 2, 4, 8}] * 4),
        (6, 0, [{0, 1, 2, 3, 4, 5, 8}] * 4),
        (0, 1, [{0, 4, 8}, {0, 4, 8, 9}, {0, 4, 8, 10}, {0, 4, 8, 11}]),
        (0, 3, [{0, 4, 6, 7, 8}, {0, 4, 7, 8, 9}, {0, 4, 8, 9, 10}, {0, 4, 8, 9, 10, 11}]),
        (0, 64, [set(range(9)), set(range(10)), set(range(11)), set(range(12))]),
    ):
        got = flash_attention(q, k, v, dense_sink_tokens=sink, dense_recent_tokens=recent, **options)
        assert [set(np.flatnonzero(row)) for row in got.o[0, :, 0]] == keys


def test_a_key_after_the_query_is_not_recent() -> None:
    """Not causal: position p - j of -1 is no exception."""
    scores = np.tile([2.0, 1.0, 1.0, 1.0], (2, 1))
    q, k, _ = one_head(scores)
    got = flash_attention(
        q, k, np.eye(4)[None, :, None], causal=False, softmax_scale=1.0, sparsity_n=1, dense_recent_tokens=1
    )
    assert [set(np.flatnonzero(row)) for row in got.o[0, :, 0]] == [{0, 2}, {0, 3}]


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("d", [61, 64, 127])
def test_equal_keys_tie_wherever_they_are(d: int, m: int) -> None:
    """Sums of float32 products are not exact in float64; a matrix product tells equal keys apart by their place."""
    rng = np.random.default_rng(9)
    q = rng.standard_normal((1, 5, 1, d)).astype(np.float32)
    k = np.broadcast_to(rng.standard_normal(d).astype(np.float32), (1, 203, 1, d))
    v = rng.standard_normal((1, 203, 1, 2))
    for left in range(194, 198):
        got = flash_attention(q, k, v, sparsity_n=1, sparsity_m=m, dense_recent_tokens=0, window_size=(left, None))
        for i, p in enumerate(range(198, 203)):
            keys = [j for j in range(p - left, p + 1) if m == 8 or j % 4 == 0 or j == p - left]
            np.testing.assert_allclose(got.o[0, i, 0], v[0, keys, 0].mean(axis=0), **CLOSE)


def test_skip_by_hand() -> None:
    """Tiles of two rows and one key; a row that is not below its maximum keeps the tile for the other."""
    scores = [[3.0, 0.0, 1.0, 5.0, 4.0], [1.0, -4.0, 0.5, -9.0, -9.0]]
    got = flash_attention(
        *one_head(scores), causal=False, softmax_scale=1.0, skip_softmax_threshold=math.exp(-1.5), tile_q=2, tile_kv=1
    )
    # Key 1: 3 and 5 below. Key 2: 2 and only 0.5 below. Key 3 is larger. Key 4: only 1 and 10 below.
    assert got.stats.kept[0].tolist() == [[[True, False, True, True, True]]]
    assert got.stats.tiles_total.tolist() == [[5]]
    assert got.stats.tiles_skipped.tolist() == [[1]]
    np.testing.assert_allclose(got.stats.margin, [[0.5]], rtol=1e-12)
    for i, row in enumerate(scores):
        weights = [math.exp(x) for j, x in enumerate(row) if j != 1]
        np.testing.assert_allclose(got.lse[0, i, 0], math.log(sum(weights)), **CLOSE)
    # One row per tile: row 0 skips keys 1 and 2, row 1 all but 0 and 2.
    alone = flash_attention(
        *one_head(scores), causal=False, softmax_scale=1.0, skip_softmax_threshold=math.exp(-1.5), tile_q=1, tile_kv=1
    )
    assert alone.stats.kept[0].astype(int).tolist() == [[[1, 0, 0, 1, 1], [1, 0, 1, 0, 0]]]
    np.testing.assert_allclose(alone.stats.margin, [[0.5]], rtol=1e-12)


@pytest.mark.parametrize(("below", "kept"), [(0.0, True), (1e-9, False)], ids=["tie", "below"])
@pytest.mark.parametrize("threshold", [1.0, 0.5, 1e-6])
def test_a_tie_keeps_the_tile(threshold: float, below: float, kept: bool) -> None:
    got = flash_attention(
        *one_head([[0.0, math.log(threshold) - below]] * 2),
        causal=False,
        softmax_scale=1.0,
        skip_softmax_threshold=threshold,
        tile_kv=1,
    )
    assert got.stats.kept[0].tolist() == [[[True, kept]]]


def test_a_row_that_has_seen_nothing_keeps_the_tile() -> None:
    """Window of one key before: row 1 of a tile does not see key 0 or 1 of the first tile, but has no maximum yet."""
    scores = [[0.0, 9.0, -9.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    q, k, v = one_head(scores)
    options: dict[str, Any] = {"softmax_scale": 1.0, "window_size": (1, None), "skip_softmax_threshold": 0.5}
    both = flash_attention(q, k, v, tile_q=2, tile_kv=1, **options)
    assert both.stats.kept[0].astype(int).tolist() == [[[0, 1, 1, 1]]]
    alone = flash_attention(q, k, v, tile_q=1, tile_kv=1, **options)
    assert alone.stats.kept[0].astype(int).tolist() == [[[0, 1, 0, 0], [0, 0, 1, 1]]]


@pytest.mark.parametrize(
    ("len_q", "len_kv", "options", "visited"),
    [
        (4, 4, {}, ["1000", "1100", "1110", "1111"]),
        (2, 4, {}, ["1110", "1111"]),
        (4, 2, {}, ["00", "00", "10", "11"]),
        (3, 4, {"causal": False}, ["1111"] * 3),
        (4, 4, {"window_size": (1, None)}, ["1000", "1100", "0110", "0011"]),
        (4, 4, {"causal": False, "window_size": (0, 1)}, ["1100", "0110", "0011", "0001"]),
        (3, 2, {"causal": False, "window_size": (0, 0)}, ["00", "10", "01"]),
    ],
    ids=str,
)
def test_tiles_that_are_visited(len_q: int, len_kv: int, options: dict[str, Any], visited: list[str]) -> None:
    """Four rows and three keys per tile, all tiles full: the picture of visible keys, tile by tile."""
    q, k = np.zeros((1, 4 * len_q, 1, 1)), np.zeros((1, 4 * len_kv, 1, 1))
    if "window_size" in options:
        options = options | {"window_size": tuple(x and 4 * x for x in options["window_size"])}
    got = flash_attention(q, k, k, tile_q=4, tile_kv=4, **options)
    picture = ["".join(str(int(x)) for x in row) for row in got.stats.kept[0][0]]
    assert picture == visited
    assert got.stats.tiles_total.sum() == sum(row.count("1") for row in visited)


def test_unread_rows_may_hold_anything() -> None:
    """Rows of no sequence, keys past the diagonal of the last row, keys before every window, values skipped by all."""
    q, k, v, spans = inputs(10)
    options: dict[str, Any] = {"window_size": (3, None), "tile_q": 4, "tile_kv": 3, "sparsity_n": 2}
    want = flash_attention(q, k, v, **spans, **options)
    cu = spans["cu_seqlens_kv"]
    unread = [0, 1, cu[-1], *range(cu[1], cu[2] - 7 - 3), *range(cu[2], cu[3] - 1 - 3), *range(cu[3], cu[4])]
    k[unread], v[unread] = np.nan, np.nan
    q[[0, -1]] = np.nan
    got = flash_attention(q, k, v, **spans, **options)
    np.testing.assert_array_equal(got.o, want.o)
    np.testing.assert_array_equal(got.lse, want.lse)


def test_keys_after_a_tile_of_queries_do_not_reach_it() -> None:
    q, k, v, _ = inputs(11)
    q, k, v = q[None, :8], k[None, :8], v[None, :8]
    want = flash_attention(q, k, v, tile_q=4, tile_kv=4)
    k[:, 4:], v[:, 4:] = np.nan, np.nan
    got = flash_attention(q, k, v, tile_q=4, tile_kv=4)
    np.testing.assert_array_equal(got.o[:, :4], want.o[:, :4])
    assert np.isnan(got.o[:, 4:]).all()


def test_values_that_the_whole_group_skips() -> None:
    """Heads 0 and 1 see key 1 far below; the value of key 2, that head 1 keeps, is read for both and weighs nothing."""
    q = np.array([[1.0, 0.0], [0.0, 1.0]])[None, None]
    k = np.array([[9.0, 9.0], [0.0, 0.0], [0.0, 9.0]])[None, :, None]
    v = np.array([[1.0], [np.nan], [3.0]])[None, :, None]
    got = flash_attention(q, k, v, softmax_scale=1.0, skip_softmax_threshold=0.5, tile_kv=1)
    assert got.stats.kept[0][:, 0].tolist() == [[True, False, False], [True, False, True]]
    assert got.o[0, 0, :, 0].tolist() == [1.0, 2.0]
    assert got.lse[0, 0].tolist() == [9.0, 9.0 + math.log(2.0)]


@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2, "dense_recent_tokens": 0}, {"skip_softmax_threshold": 0.5}])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_key_that_is_read_shows(name: str, options: dict[str, Any]) -> None:
    q, k, v, _ = inputs(12)
    q, k, v = q[None, :4], k[None, :4], v[None, :4]
    (k if name == "k" else v)[0, 0] = np.nan
    options = options | {"sparsity_m": 4, "causal": name == "v"}
    got = flash_attention(q, k, v, **options)
    assert np.isnan(got.o[0, 0]).all()


def test_replayed_decisions() -> None:
    """Any decisions, not those of a threshold: dense attention to the keys of the tiles that are kept."""
    q, k, v, spans = inputs(13)
    dense = flash_attention(q, k, v, tile_q=4, tile_kv=3, **spans)
    rng = np.random.default_rng(1)
    kept = [visited & (rng.random(visited.shape) < 0.5) for visited in dense.stats.kept]
    got = flash_attention(q, k, v, tile_q=4, tile_kv=3, kept=kept, skip_softmax_threshold=1.0, **spans)
    assert got.stats.tiles_total.tolist() == dense.stats.tiles_total.tolist()
    assert np.isinf(got.stats.margin).all()
    for b, h in np.ndindex(len(LENS_Q), Q_HEADS):
        np.testing.assert_array_equal(got.stats.kept[b], kept[b])
        assert got.stats.tiles_skipped[b, h] == dense.stats.tiles_total[b, h] - kept[b][h].sum()
        first_q, first_kv = (int(spans[x][b]) for x in ("cu_seqlens_q", "cu_seqlens_kv"))
        for i in range(LENS_Q[b]):
            keys = [j for j in range(i + LENS_KV[b] - LENS_Q[b] + 1) if kept[b][h, i // 4, j // 3]]
            row = first_q + i, h
            weights = [math.exp(D**-0.5 * (q[row] @ k[first_kv + j, h // 2])) for j in keys]
            want = sum((w * v[first_kv + j, h // 2] for w, j in zip(weights, keys, strict=True)), np.zeros(D_V))
            np.testing.assert_allclose(got.o[row], want / (sum(weights) or 1.0), **CLOSE)
            np.testing.assert_allclose(got.lse[row], math.log(sum(weights)) if keys else -math.inf, **CLOSE)
    own = flash_attention(q, k, v, tile_q=4, tile_kv=3, skip_softmax_threshold=0.9, **spans)
    again = flash_attention(q, k, v, tile_q=4, tile_kv=3, kept=own.stats.kept, **spans)
    assert own.stats.tiles_skipped.sum() > 0
    np.testing.assert_array_equal(again.o, own.o)


def test_decisions_that_cannot_be_replayed() -> None:
    q, k, v, spans = inputs()
    kept = flash_attention(q, k, v, tile_q=4, tile_kv=3, **spans).stats.kept
    past = [x.copy() for x in kept]
    past[0][2, 0, -1] = True
    for wrong in (
        kept[:-1],
        [x.astype(np.int64) for x in kept],
        [x[:, :, :-1] for x in kept],
        [x[:1] for x in kept],
        past,
    ):
        with pytest.raises(ValueError, match="kept: received"):
            flash_attention(q, k, v, tile_q=4, tile_kv=3, kept=wrong, **spans)
    with pytest.raises(ValueError, match="kept: received"):  # tiles before a window
        flash_attention(q, k, v, tile_q=4, tile_kv=3, kept=kept, window_size=(2, None), **spans)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window_size", {"window_size": (-1, None)}),
        ("window_size", {"window_size": (None, -1)}),
        ("sparsity_m", {"sparsity_m": 6}),
        ("sparsity_m", {"sparsity_m": 0}),
        ("sparsity_n", {"sparsity_n": 5}),
        ("sparsity_n", {"sparsity_n": -1}),
        ("sparsity_n", {"sparsity_n": 9, "sparsity_m": 8}),
        ("dense_sink_tokens", {"dense_sink_tokens": -1}),
        ("dense_recent_tokens", {"dense_recent_tokens": -1}),
        ("tile_q", {"tile_q": 0}),
        ("tile_kv", {"tile_kv": 0}),
        *(("skip_softmax_threshold", {"skip_softmax_threshold": x}) for x in (-0.1, 1.001, math.nan, math.inf)),
        ("cu_seqlens_q, cu_seqlens_kv", {"cu_seqlens_q": None}),
        ("cu_seqlens_q, cu_seqlens_kv", {"cu_seqlens_kv": None}),
        ("cu_seqlens_q", {"cu_seqlens_q": np.array([0, 5, 4, 6, 7, 8, 9])}),
        ("cu_seqlens_q", {"cu_seqlens_q": np.array([-1, 5, 6, 6, 7, 8, 9])}),
        ("cu_seqlens_q", {"cu_seqlens_q": np.array([[0, 1]])}),
        ("cu_seqlens_kv", {"cu_seqlens_kv": np.array([0, 5])}),
        ("cu_seqlens_kv", {"cu_seqlens_kv": np.array([0, 5, 6, 6, 7, 8, 1000])}),
    ],
    ids=str,
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    q, k, v, spans = inputs()
    with pytest.raises(ValueError, match=f"{name}.*: received"):
        flash_attention(q, k, v, **(spans | options))


def test_shapes_that_do_not_fit() -> None:
    q, k, v, spans = inputs()
    for name, args in (
        ("q", (q[None], k, v)),
        ("k, v", (q, k[None], v)),
        ("k, v", (q, k, v[:-1])),
        ("k", (q, k[..., :2], v)),
        ("q heads", (q[:, :3], k, v)),
    ):
        with pytest.raises(ValueError, match=f"{name}: received"):
            flash_attention(*args, **spans)
    with pytest.raises(ValueError, match="q: received shape"):
        flash_attention(q, k, v)
    with pytest.raises(ValueError, match="k: received 1 sequences"):
        flash_attention(np.zeros((2, 3, 4, 5)), np.zeros((1, 3, 2, 5)), np.zeros((1, 3, 2, 5)))
    with pytest.raises(TypeError, match="cu_seqlens_q: received float64"):
        flash_attention(q, k, v, cu_seqlens_q=spans["cu_seqlens_q"] * 1.0, cu_seqlens_kv=spans["cu_seqlens_kv"])
