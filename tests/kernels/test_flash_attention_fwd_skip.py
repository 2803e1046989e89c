"""Skip-softmax in the prefill forward: which tiles of 128 x 128 each head keeps, exactly.

Cases of real numbers are compared with the oracle, whose decisions have to be clear (`tests.kernels.prefill.MARGIN`).
Elsewhere scores are quarters and the rule is written out here; what is kept is read off the output as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Geometry, Span, with_edge
from contributed.flash_attention_fwd import CASES, flash_attention_fwd
from reference.flash_attention import flash_attention as oracle
from tests.kernels.flash import BF16, DTYPES, by_target
from tests.kernels.prefill import Array, check, check_results, check_tiles, normal, reference, traced

F32 = DTYPES[0]
TARGETS = ("trn1", "trn2", "trn3")


def rule(scores: Array, visible: Array, threshold: float) -> Array:
    """The definition, bool [heads, tiles of rows, tiles of keys], of scores [heads, rows, keys]."""
    heads, rows, keys = scores.shape
    kept = np.zeros((heads, -(-rows // 128), -(-keys // 128)), bool)
    for h, i in np.ndindex(kept.shape[:2]):
        of_rows = slice(i * 128, (i + 1) * 128)
        best = np.full(visible[of_rows].shape[0], -np.inf)
        for t in range(kept.shape[2]):
            seen = visible[of_rows, t * 128 : (t + 1) * 128]
            if not seen.any():
                continue
            largest = np.where(seen, scores[h, of_rows, t * 128 : (t + 1) * 128], -np.inf).max(axis=1)
            # Minus infinity is not below minus infinity.
            kept[h, i, t] = not (largest < best + np.log(threshold)).all()
            if kept[h, i, t]:
                best = np.maximum(best, largest)
    return kept


def decided(
    levels: Array,
    patterns: Array,
    len_q: int,
    len_kv: int,
    threshold: float,
    causal: bool = True,
    left: int | None = None,
    right: int | None = None,
    scale: float = 1.0,
    **how: Any,
) -> Array:
    """Which tiles a call keeps, after comparing them with the rule.

    Row i of head h has `levels[h, patterns[i], t]` as its largest score in tile t, at keys of its own.

    Args:
        levels: [n_q_heads, n_patterns, n_tiles].
        patterns: [len_q].
        len_q: queries.
        len_kv: keys.
        threshold: of the call.
        causal: of the call.
        left: of the call.
        right: of the call.
        scale: of the call; the scores are the same.
        how: others of the call.
    """
    heads, n_patterns, n_tiles = levels.shape
    rng = np.random.default_rng(n_tiles)
    # Of ten neighbouring keys one has the largest score, so that windows and diagonals meet it too.
    below = rng.integers(1, 9, (heads, n_patterns, len_kv)) / 4 * (rng.integers(0, 10, len_kv) > 0)
    of_keys = np.repeat(levels, 128, axis=2)[..., :len_kv] - below
    d = max(16, heads * n_patterns, n_tiles)
    q, k, v = np.zeros((1, len_q, heads, d)), np.zeros((1, len_kv, 1, d)), np.zeros((1, len_kv, 1, d))
    for h in range(heads):
        q[0, np.arange(len_q), h, h * n_patterns + patterns] = 1.0 / scale
        k[0, :, 0, h * n_patterns : (h + 1) * n_patterns] = of_keys[h].T
    v[0, np.arange(len_kv), 0, np.arange(len_kv) // 128] = 1.0
    distance = np.arange(len_q)[:, None] + len_kv - len_q - np.arange(len_kv)
    visible = np.ones(distance.shape, bool)
    visible &= (distance >= 0) | (not causal)
    visible &= (left is None) | (distance <= (left or 0))
    visible &= (right is None) | (-distance <= (right or 0))
    window = {"causal": causal, "window_size": (left, right), "softmax_scale": scale}
    (o, stats), _ = traced(
        *(x.astype(np.float32) for x in (q, k, v)),
        skip_softmax_threshold=threshold,
        return_stats=True,
        **window,
        **how,
    )
    expected = rule(of_keys[:, patterns], visible, threshold)
    sees = np.stack([visible[:, t * 128 : (t + 1) * 128].any(axis=1) for t in range(n_tiles)], axis=1)
    np.testing.assert_array_equal(stats.kept[0], expected)
    np.testing.assert_array_equal(stats.tiles_total[0] - stats.tiles_skipped[0], expected.sum(axis=(1, 2)))
    in_output = np.repeat(expected, 128, axis=1)[:, :len_q] & sees
    np.testing.assert_array_equal((o[0, ..., :n_tiles] > 0).swapaxes(0, 1), in_output)
    return stats.kept[0]


# -- against the oracle


def test_cases_of_the_kernel_skip_some_tiles() -> None:
    for case in CASES:
        if case.threshold is not None:
            stats = reference(case, BF16).exact.stats
            assert 0 < stats.tiles_skipped.sum() < stats.tiles_total.sum(), case.name


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.01])
@pytest.mark.parametrize(
    "case",
    [
        PrefillCase("causal", 2, 1, 32, ((200, 1300), (130, 130), (1, 700), (0, 5)), seed=4, unused=2),
        PrefillCase("window", 2, 1, 32, ((200, 900),), left=400, seed=5),
        PrefillCase("encoder", 2, 1, 32, ((140, 640),), causal=False, seed=3),
        PrefillCase("both sides", 3, 1, 32, ((300, 700),), causal=False, left=300, right=150, seed=2),
        PrefillCase("2-of-4", 2, 1, 64, ((130, 700),), sparsity_n=2, recent=20, sink=3, grid=True, seed=1),
        PrefillCase("3-of-8", 2, 1, 160, ((130, 700),), sparsity_n=3, sparsity_m=8, grid=True, seed=4),
        PrefillCase("negative", 2, 1, 32, ((130, 800),), softmax_scale=-0.3, seed=5),
    ],
    ids=lambda c: c.name,
)
def test_counts_and_tiles(case: PrefillCase, threshold: float) -> None:
    i = int(10 * threshold)
    clear = replace(case, threshold=threshold, locality=6.0)
    check(clear, DTYPES[i % 3], TARGETS[(i + len(case.name)) % 3])


def test_which_of_these_skip() -> None:
    """The tests above are of little use if nothing is."""
    case = PrefillCase("causal", 2, 1, 32, ((200, 1300), (130, 130), (1, 700), (0, 5)), seed=4, unused=2)
    skipped = [
        reference(replace(case, threshold=x, locality=6.0), BF16).exact.stats.tiles_skipped.sum()
        for x in (1.0, 0.5, 0.01)
    ]
    assert skipped[0] >= skipped[1] > skipped[2] > 0


@by_target
def test_stats_without_a_threshold(target: str) -> None:
    """All tiles with a visible key, and none of them skipped; also of calls without a query, or a key."""
    for lengths in (((200, 1300), (130, 130), (1, 300), (5, 0), (0, 9)), ((0, 5), (0, 0)), ((3, 0),)):
        for options in ({}, {"left": 100}, {"causal": False, "right": 3}):
            case = PrefillCase("dense", 2, 1, 16, lengths, **options)
            q, k, v, how = case.inputs(BF16)
            _, stats = flash_attention_fwd(q, k, v, return_stats=True, target=target, **how)
            check_tiles(stats, oracle(q, k, v, **how))
            assert (stats.tiles_skipped == 0).all()


def test_stats_of_no_query_with_a_threshold() -> None:
    q, k, v, how = PrefillCase("none", 2, 1, 16, ((0, 5), (0, 0)), threshold=0.5).inputs(BF16)
    _, stats = flash_attention_fwd(q, k, v, return_stats=True, target="trn2", **how)
    check_tiles(stats, oracle(q, k, v, **how))


# -- tile by tile


@pytest.mark.parametrize("threshold", [0.2, 0.9])
@pytest.mark.parametrize(
    ("len_q", "len_kv", "options"),
    [
        (300, 1500, {}),
        (256, 1280, {}),
        (90, 1050, {"causal": False}),
        (200, 1400, {"left": 600}),
        (300, 900, {"causal": False, "left": 300, "right": 200}),
        (128, 128, {}),
    ],
)
def test_every_tile_by_itself(len_q: int, len_kv: int, options: dict[str, Any], threshold: float) -> None:
    """Three heads of a group, each with two kinds of rows."""
    rng = np.random.default_rng(len_kv)
    n_tiles = -(-len_kv // 128)
    levels = rng.integers(-8, 9, (3, 1, n_tiles)) / 4 + rng.integers(0, 2, (3, 2, n_tiles)) / 4
    target = TARGETS[(len_q + int(threshold * 10)) % 3]
    kept = decided(levels, np.arange(len_q) % 2, len_q, len_kv, threshold, target=target, **options)
    assert len_kv == 128 or not kept.all()


@pytest.mark.parametrize("geometry", [Geometry(1, 1, 1, 2), Geometry(3, 2, 3, 2), Geometry(1, 4, 2, 2)], ids=str)
def test_decisions_do_not_depend_on_blocks_and_chunks(geometry: Geometry) -> None:
    """Running maxima go from chunk to chunk, and begin anew with every block."""
    levels = np.random.default_rng(7).integers(-8, 9, (3, 2, 7)) / 4
    for target in ("trn1", "trn2"):
        decided(levels, np.arange(400) % 2, 400, 860, 0.6, geometry=geometry, target=target)


@by_target
def test_ties_are_kept_and_less_is_skipped(target: str) -> None:
    """At threshold 1 a tile stays if its largest score is that of the tiles before it."""
    levels = np.array([[[1, 1, 0.75, 2, 2, 1, 2]], [[2, 1.75, 2, 2, 2.25, 2.25, 2]], [[0, -1, -2, -3, -4, -5, 0]]])
    expected = np.array([[1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1]], bool)
    kept = decided(levels, np.zeros(50, int), 50, 7 * 128, 1.0, causal=False, target=target)
    np.testing.assert_array_equal(kept[:, 0], expected)


@pytest.mark.parametrize("scale", [1.0, -0.5, 4.0])
def test_tiny_thresholds(scale: float) -> None:
    """At 1e-30, whose logarithm is -69.08: 69 below stays, 69.25 does not."""
    levels = np.array([[[0, -69, -69.25, 0.25, -68.75, -69]]])
    kept = decided(levels, np.zeros(40, int), 40, 6 * 128, 1e-30, causal=False, scale=scale)
    np.testing.assert_array_equal(kept[0, 0], np.array([1, 1, 0, 1, 1, 0], bool))


@by_target
@pytest.mark.parametrize("row", [0, 1, 77, 127, 128, 139])
def test_one_row_keeps_a_tile(row: int, target: str) -> None:
    """For all rows of its tile, and for no other tile of rows."""
    patterns = np.zeros(140, int)
    patterns[row] = 1
    levels = np.array([[[4, 0, 0, 0], [0, 0, -8, 1]]])
    kept = decided(levels, patterns, 140, 512, 0.5, causal=False, target=target)
    expected = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool)
    expected[row // 128] = [1, 1, 0, 1]
    np.testing.assert_array_equal(kept[0], expected)


@by_target
def test_rows_that_see_nothing_of_a_tile_do_not_keep_it(target: str) -> None:
    """Queries at 100 to 227: 28 of them see nothing of the second tile, and do not mind."""
    kept = decided(np.array([[[0, -4]]]), np.zeros(128, int), 128, 228, 0.5, target=target)
    np.testing.assert_array_equal(kept[0], [[True, False]])


@by_target
def test_rows_that_have_seen_nothing_keep_what_they_see(target: str) -> None:
    """Within 50 keys, those at 178 to 227 see nothing but the second tile; within 100 all see the first one."""
    levels = np.array([[[0, -4]]])
    kept = decided(levels, np.zeros(128, int), 128, 228, 0.5, left=50, target=target)
    np.testing.assert_array_equal(kept[0], [[True, True]])
    kept = decided(levels, np.zeros(128, int), 128, 228, 0.5, left=100, target=target)
    np.testing.assert_array_equal(kept[0], [[True, False]])


@by_target
def test_rows_before_the_first_key(target: str) -> None:
    """They see nothing at all, and keep the one tile that rows beside them see; -inf is their lse, not NaN."""
    q, k = normal(1, 300, 2, 16), normal(1, 77, 1, 16)
    o, lse, stats = flash_attention_fwd(
        q, k, k, skip_softmax_threshold=1.0, return_lse=True, return_stats=True, target=target
    )
    assert stats.kept[0].tolist() == [[[False], [True], [True]]] * 2
    assert (lse[0, :223] == -np.inf).all()
    assert (o[0, :223] == 0).all()
    assert np.isfinite(lse[0, 223:]).all()


@by_target
@pytest.mark.parametrize("geometry", [None, Geometry(1, 2, 1, 0), Geometry(1, 1, 2, 0)], ids=["chosen", "2x1", "1x2"])
def test_rows_that_there_are_not_keep_nothing(geometry: Geometry | None, target: str) -> None:
    """Tiles of rows are filled up with queries of the sequence before, which want every tile of this one's keys."""
    q, k = np.zeros((261, 1, 16), np.float32), np.zeros((1024, 1, 16), np.float32)
    q[:256, 0, 0] = q[256:, 0, 1] = 1.0
    k[:, 0, 0] = np.repeat([0, 1, 2, 3, 4, 5, 6, 7], 128)
    k[:, 0, 1] = -k[:, 0, 0]
    how = {"cu_seqlens_q": np.array([0, 256, 261]), "cu_seqlens_kv": np.array([0, 512, 1024])}
    options = {"causal": False, "softmax_scale": 1.0, "skip_softmax_threshold": 0.5, "target": target}
    (_, stats), _ = traced(q, k, k, return_stats=True, geometry=geometry, **how, **options)
    assert stats.kept[0].all()
    np.testing.assert_array_equal(stats.kept[1], [[[True, False, False, False]]])


def test_heads_decide_for_themselves() -> None:
    levels = np.array([[[0, -4, 1, -4]], [[-4, 0, -4, -4]], [[0, 0, 0, 0]]])
    kept = decided(levels, np.zeros(30, int), 30, 512, 0.5, causal=False)
    expected = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(kept[:, 0], expected)


def test_a_skipped_tile_may_hold_any_value_in_v() -> None:
    """Finite numbers of any size: the output does not have them."""
    q, k = np.zeros((1, 40, 1, 16), np.float32), np.zeros((1, 512, 1, 16), np.float32)
    q[..., 0] = 1.0
    k[0, :, 0, 0] = np.repeat([2, -2, 3, -2], 128)
    v = np.ones_like(k)
    v[0, 128:256] = v[0, 384:] = 1e30
    how = {"causal": False, "softmax_scale": 1.0, "target": "trn2"}
    o, stats = flash_attention_fwd(q, k, v, skip_softmax_threshold=0.5, return_stats=True, **how)
    assert stats.tiles_skipped.tolist() == [[2]]
    np.testing.assert_allclose(o, 1.0, rtol=1e-6)


# -- branches: steps of 128 rows of a head come in pairs, here two heads, and skip what follows the maxima together


def pairs_of_heads(kept: Array) -> Array:
    """Levels [16, 1, tiles] of 16 heads that keep the tiles of `kept`, [8, tiles]: those of each pair of heads."""
    levels = np.where(kept, 0.0, -8.0)
    levels[:, 0] = 0.0
    return np.repeat(levels, 2, axis=0)[:, None]


PAIRS = Geometry(16, 1, 2, 0)  # eight pairs in a chunk of two tiles of keys: as many as leave the last ones to the next


def exponentials(kept: Array, causal: bool = False, **options: Any) -> float:
    """Tiles of exponentials that a run takes of 128 queries and as many tiles of keys as `kept` has columns."""
    n_keys = 128 * kept.shape[1]
    q, k, v = np.zeros((1, 128, 16, 16)), np.zeros((1, n_keys, 1, 16)), np.zeros((1, n_keys, 1, 16))
    q[0, :, np.arange(16), np.arange(16)] = 1.0
    k[0, :, 0, :] = np.repeat(pairs_of_heads(kept)[:, 0], 128, axis=1).T
    v[0, np.arange(n_keys), 0, np.arange(n_keys) // 128 % 16] = 1.0
    (o, stats), runs = traced(
        *(x.astype(BF16) for x in (q, k, v)),
        causal=causal,
        softmax_scale=1.0,
        skip_softmax_threshold=0.5,
        return_stats=True,
        geometry=Geometry(16, 1, 2, 1) if causal else PAIRS,
        **options,
    )
    kept = kept.copy()
    kept[:, 0] = True
    np.testing.assert_array_equal(stats.kept[0][:, 0], np.repeat(kept, 2, axis=0))
    weights = np.repeat(kept, 2, axis=0) / np.repeat(kept, 2, axis=0).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(o[0, 127].astype(float)[:, : kept.shape[1]], weights, rtol=2**-8)
    return runs[0].tiles_of("exp")


@by_target
def test_pairs_without_a_tile_take_no_exponentials(target: str) -> None:
    """Of ten tiles, 128 for each of 16 heads, all, or those of the first chunk, which every pair wants one of."""
    assert exponentials(np.ones((8, 10), bool), target=target) == 16 * 10
    assert exponentials(np.zeros((8, 10), bool), target=target) == 16 * 2


def test_tiles_past_the_diagonal_want_no_pair() -> None:
    """Where a chunk has two tiles, and its second one was wanted in the loop, but the diagonal has one."""
    kept = np.ones((8, 3), bool)
    assert exponentials(kept, causal=True) == 16 * 3
    kept[:, 2] = False
    assert exponentials(kept, causal=True) == 16 * 2


@pytest.mark.parametrize("seed", range(3))
def test_pairs_take_exponentials_of_chunks_with_a_tile(seed: int) -> None:
    """Whatever is before and after them, and from one chunk to the next."""
    kept = np.random.default_rng(seed).random((8, 10)) < (0.1, 0.3, 0.6)[seed]
    kept[:, 0] = True
    chunks = kept.reshape(8, 5, 2).any(axis=2).sum()
    assert chunks < 40
    assert exponentials(kept, target=TARGETS[seed]) == 2 * 2 * chunks


def test_blocks_do_not_finish_each_others_pairs() -> None:
    """The second of two sequences begins with no pair left, though the first one's last pairs were wanted."""
    levels = pairs_of_heads(np.ones((8, 4), bool))
    kept = decided(levels, np.zeros(200, int), 200, 512, 0.5, causal=False, geometry=PAIRS)
    assert kept.all()


def test_chunks_leave_pairs_to_the_diagonal() -> None:
    """From the loop to the first chunk of the diagonal, and from there to the second one, of 16 heads and 260 rows."""
    levels = pairs_of_heads(np.random.default_rng(5).random((8, 6)) < 0.3)
    kept = decided(levels, np.zeros(260, int), 260, 6 * 128 - 40, 0.5, geometry=Geometry(16, 3, 2, 2))
    assert not kept.all()


def test_blocks_and_chunks_of_any_size_against_the_oracle() -> None:
    case = PrefillCase("any", 2, 1, 32, ((300, 700), (130, 513), (1, 130)), threshold=0.5, locality=6.0, seed=3)
    r = reference(case, BF16)
    for geometry in (Geometry(1, 1, 1, 2), Geometry(2, 1, 3, 2), Geometry(2, 4, 2, 2)):
        got, _ = traced(r.q, r.k, r.v, return_lse=True, return_stats=True, geometry=geometry, **r.options)
        check_results(got, r)


def test_outputs_are_finished_beside_the_last_pairs() -> None:
    """Eight heads of eight row tiles: most of them end before the last pairs of the only chunk are worked on."""
    check(PrefillCase("eight", 8, 1, 16, ((1000, 1000),), threshold=0.3, locality=4.0))


@pytest.mark.parametrize(("heads", "sparsity_n"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 2), (3, 2)])
def test_row_tiles_that_share_steps(heads: int, sparsity_n: int) -> None:
    """Of pairs of steps some have one only, where their tiles are no rows and heads at equal distances."""
    selection = {"sparsity_n": sparsity_n, "recent": 20, "grid": True} if sparsity_n else {}
    check(PrefillCase("shared", heads, 1, 16, ((1100, 1100),), threshold=0.3, locality=4.0, **selection))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_row_tiles_that_share_steps_on_both_sides(heads: int) -> None:
    check(PrefillCase("shared", heads, 1, 16, ((1000, 1800),), left=700, threshold=0.3, locality=4.0))


def test_sums_of_rows_with_keys_before_the_diagonal() -> None:
    """Pair by pair they shrink to the new maxima, from what the loop has left."""
    check(PrefillCase("prefix", 4, 1, 16, ((1000, 2024),), threshold=0.3, locality=4.0))


@pytest.mark.parametrize("kv_tiles", [4, 5])
def test_pairs_of_rows_that_end_are_left_to_the_next_chunk(kv_tiles: int) -> None:
    """With a left edge in the program, chunks on the diagonal leave pairs whose tiles see no more keys."""
    r = reference(PrefillCase("left", 8, 1, 16, ((1024, 1024),), left=256, threshold=0.1, locality=3.0), BF16)
    geometry = with_edge(Geometry(8, 8, kv_tiles, 1), [Span(0, 1024, 0, 1024)], 256)
    got, _ = traced(r.q, r.k, r.v, return_lse=True, return_stats=True, geometry=geometry, **r.options)
    check_results(got, r)


def test_a_block_that_ends_with_part_of_a_part() -> None:
    """Outputs of half of a part's tiles are normalised beside the last pairs, the others after them; in two blocks."""
    check(PrefillCase("part", 8, 2, 16, ((1000, 1000),), threshold=0.3, locality=4.0))
