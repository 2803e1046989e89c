"""Gated decode against the oracle: gates, the tiles that they close before K is read, and what is read of others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from contributed import _sparse_launch
from contributed._cases import GatedCase
from contributed._nki import has_device, run_on_device
from contributed.sparse_decode import CASES, gated_decode
from reference.rounded_sparse import gated_decode_rounded
from reference.sparse_decode import gated_decode as oracle
from tests.kernels.flash import BF16, DTYPES, by_case_dtype_and_target, by_dtype, normal
from tests.kernels.sparse import check, check_results, check_stats, reference, rows_read, show, stay, traced, visits
from tests.kernels.test_flash_decode_properties import assert_same_bits, columns_by_themselves

GATED = [case for case in CASES if isinstance(case, GatedCase)]
by_case = pytest.mark.parametrize("case", GATED, ids=lambda c: c.name)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


@by_case_dtype_and_target(GATED)
def test_matches_the_oracle(case: GatedCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


@by_case
def test_cases_close_tiles_with_room_to_spare(case: GatedCase) -> None:
    """No decision of a case is close in any type, and in all but these gates close tiles and so do scores."""
    for dtype in DTYPES:
        stats = reference(case, dtype).exact.stats
        assert stats.margin.min() > 1e-3
        assert stats.tiles_total.sum() > stats.keys_read.sum()
        left_out = stats.keys_read.sum() > stats.kept.sum()
        assert left_out == (case.name != "gates-alone")


# -- gates


@by_dtype
@pytest.mark.parametrize("how", [(True, True), (True, False), (False, True)], ids=["fast", "exact", "linear"])
def test_gates_are_added_with_both_tests_off(how: tuple[bool, bool], dtype: Any) -> None:
    """Products from -9 to 9, on both sides of the cut of the polynomial at 4."""
    case = GatedCase("g", 4, 2, 64, (200,), 0.0, 64, gate_threshold=0.0, negative=True, gates=0.4)
    r = check(dataclasses.replace(case, is_logsigmoid=how[0], fast=how[1]), dtype)
    products = np.repeat(r.operands[4][0], 2, axis=0).astype(float) * r.operands[3][0].astype(float)[:, None]
    assert products.min() < -6
    assert products.max() > 6
    assert r.exact.stats.kept.sum() == r.exact.stats.tiles_total.sum()


def test_a_large_gate_after_a_large_score_in_float32() -> None:
    """77 - 33 for the key of the largest weight: rounded as 77 is, and not as 44."""
    check(GatedCase("f", 71, 1, 64, (300,), 0.5, 32, locality=4.0, negative=True, seed=1030), F32)


def test_a_linear_gate_is_another_dimension() -> None:
    """With one head per KV head: alpha in q, delta in k."""
    q, k, v = normal(2, 3, 16, dtype=F32), normal(2, 90, 3, 16, dtype=F32), normal(2, 90, 3, 16, dtype=F32, seed=1)
    alpha, delta = normal(2, 3, dtype=F32, seed=2), normal(2, 3, 90, dtype=F32, seed=3)
    how: dict[str, Any] = {"softmax_scale": 0.4, "softmax_threshold": 0.0, "return_lse": True, "target": "trn2"}
    o, lse = gated_decode(q, k, v, alpha, delta, is_logsigmoid_gate=False, gate_threshold=0.0, tile_kv=32, **how)
    x = 0.4 * (np.einsum("bhd,bjhd->bhj", q, k) + alpha[..., None] * delta).astype(np.float64)
    np.testing.assert_allclose(lse, np.log(np.exp(x).sum(axis=-1)), rtol=1e-6)
    p = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(o, np.einsum("bhj,bjhd->bhd", p, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "alpha_type", "delta_type"), [DTYPES, (BF16, F16, F32), (F16, F32, BF16)])
def test_types_of_gates(dtype: Any, alpha_type: Any, delta_type: Any) -> None:
    """Any of the three beside any type of q; `CASES` have gates in q's own."""
    case = GatedCase("t", 4, 2, 16, (300, 40), 0.1, 16, window=200, negative=True, seed=1)
    q, k, v, options = case.inputs(dtype)
    alpha, delta, _ = case.gate_inputs(F32)
    operands = q, k, v, alpha.astype(alpha_type), delta.astype(delta_type)
    options |= {"softmax_threshold": 0.1, "gate_threshold": 0.5}
    exact, low = oracle(*operands, **options), gated_decode_rounded(*operands, **options)
    assert exact.stats.margin.min() > 1e-3
    o, lse, stats = gated_decode(*operands, **options, return_lse=True, return_stats=True, target="trn2")
    check_results((o, lse), dtype, exact, low)
    check_stats(stats, exact, case.lengths, case.window, case.tile_kv, q)


# -- shapes


@pytest.mark.parametrize("head_dim", [1, 130, 256])
def test_head_dims(head_dim: int) -> None:
    check(GatedCase("d", 2, 1, head_dim, (300, 17), 0.5, tile_kv=32, unused=1), BF16)


@pytest.mark.parametrize("group", [1, 3, 128])
def test_groups(group: int) -> None:
    check(GatedCase("g", group, 1, 64, (200,), 0.5, tile_kv=64, negative=True, seed=2), F16)


@pytest.mark.parametrize("window", [0, 3, 64, 65, 200])
def test_windows(window: int) -> None:
    """Smaller than a tile, in one tile or over the edge of two, and around whole tiles."""
    check(GatedCase("w", 2, 1, 64, (300, 128, 2), 0.5, tile_kv=64, window=window, unused=2), BF16)


LENGTHS = (0, 1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 2064, 4096)


@pytest.mark.parametrize("gate_threshold", [0.0, 0.3])
def test_lengths_around_the_edges_of_tiles_items_and_tests(gate_threshold: float) -> None:
    """Items of 16 keys by 128 partitions, and tests of 128 tiles; several trips of lanes with unlike lengths."""
    case = GatedCase("n", 1, 1, 16, LENGTHS, 0.05, 16, locality=6.0, gate_threshold=gate_threshold, seed=8)
    r = check(case, BF16)
    _, (run,) = traced(True, *r.operands, **r.options)
    assert run.item_keys == 2048


def test_loops_over_sixteen_lanes_keep_to_the_registers_of_an_engine() -> None:
    """64 on trn2, and no more of them for 16 lanes than for one: where gates alone decide, lanes are passed over."""
    case = GatedCase("l", 16, 8, 16, (4096, 2048, 100), 0.0, 64, gate_threshold=0.9)
    r = reference(case, BF16)
    assert r.exact.stats.margin.min() > 1e-3
    (o, lse, stats), (run,) = traced(True, *r.operands, **r.options, return_lse=True, return_stats=True, target="trn2")
    assert run.arguments["records"].shape[3] == 16
    check_results((o, lse), BF16, r.exact, r.low)
    check_stats(stats, r.exact, case.lengths, case.window, case.tile_kv, r.operands[0])


def test_tiles_larger_than_the_cache() -> None:
    check(GatedCase("c", 4, 2, 128, (40, 3, 0), 0.5, 1024, packed=True, window=30, negative=True), BF16)


def test_several_tiles_on_a_partition() -> None:
    """Beside NaN, and keys of other sequences."""
    case = GatedCase("m", 2, 1, 16, (2600, 100, 2300), 0.01, 16, packed=True, unused=3, gate_threshold=0.1, seed=2)
    check(case, BF16)
    check(dataclasses.replace(case, window=2200), BF16)
    # One whole tile, on a partition with room for more.
    check(dataclasses.replace(case, lengths=(2600, 20, 2300), packed=False), BF16)


@pytest.mark.parametrize(("n_open", "last"), [(1, 0), (31, 0), (32, 5), (33, 0), (64, 5)])
def test_open_tiles_around_the_edges_of_items(n_open: int, last: int) -> None:
    """Of 140 whole tiles, strewn among closed ones; with a cut tile or none, beside a sequence with one open tile."""
    tile_kv, n_tiles, d = 32, 140, 64
    length = n_tiles * tile_kv + last
    rng = np.random.default_rng(n_open)
    q, k, v = (rng.standard_normal((2, *x)).astype(BF16) for x in ((2, d), (length, 1, d), (length, 1, d)))
    is_open = np.zeros(n_tiles, bool)
    is_open[rng.permutation(n_tiles - 1)[: n_open - 1]] = is_open[-1] = True
    delta = np.full((2, 1, length), -90.0, np.float32)
    delta[0, 0, : length - last] = np.repeat(np.where(is_open, 0.0, -90.0), tile_kv)
    delta[1, 0, -1 - last] = 0.0
    alpha = np.array([[1.0, 0.5]] * 2, np.float32)
    options = {"tile_kv": tile_kv, "gate_threshold": 0.5, "softmax_threshold": 0.1}
    exact, low = (f(q, k, v, alpha, delta, **options) for f in (oracle, gated_decode_rounded))
    assert exact.stats.keys_read.sum(axis=-1).tolist() == [[n_open + (last > 0)], [1 + (last > 0)]]
    assert exact.stats.margin.min() > 1e-3
    (o, lse, stats), (run,) = traced(
        True, q, k, v, alpha, delta, **options, return_lse=True, return_stats=True, max_seqlen_kv=length
    )
    assert run.item_keys == 32 * tile_kv * (128 // tile_kv)
    check_results((o, lse), BF16, exact, low)
    check_stats(stats, exact, [length] * 2, None, tile_kv, q)


# -- decisions, read off the output


def bounds(alpha: Any, delta: Any, tile_kv: int) -> Any:
    """Largest product of an alpha and a delta of each tile, and of 0 where the sequence ends inside it."""
    tiles = [delta[i : i + tile_kv] for i in range(0, len(delta), tile_kv)]
    return [max(np.outer(alpha, x).max(), -np.inf if len(x) == tile_kv else 0.0) for x in tiles]


@pytest.mark.parametrize(
    ("tile_kv", "length", "window", "n_splits"),
    [
        (16, 4007, None, 1),
        (16, 4096, 3000, 2),
        (16, 100, None, 7),
        (32, 3001, 2000, 2),
        (128, 3001, 1900, 1),
        (128, 1664, 1200, 3),
        (256, 2500, 1900, 1),
        (1024, 5000, 3000, 2),
    ],
)
def test_every_tile_by_itself(tile_kv: int, length: int, window: int | None, n_splits: int) -> None:
    """Gates first, scores among the open tiles. Quarters, as no threshold's log is."""
    n_tiles = -(-length // tile_kv)
    rng = np.random.default_rng(tile_kv)
    levels = rng.integers(-12, 13, (2, 2, n_tiles)) / 4
    alpha = np.array([[1.0, 0.5], [-1.0, 0.25]])
    delta = (rng.integers(-8, 9, (2, n_tiles, 1)) + rng.integers(-4, 5, (2, n_tiles, tile_kv))) / 4
    delta = delta.reshape(2, -1)[:, :length]
    # Gates are taken out of the scores, so that levels are the sums' largest.
    options: dict[str, Any] = {"gate_threshold": 0.3, "softmax_threshold": 0.2}
    options |= {"is_logsigmoid_gate": False, "n_splits": n_splits, "window": window, "alpha": alpha, "delta": delta}
    got = show(levels, tile_kv, length, **options)
    first = 0 if window is None else length - 1 - window
    for kv in range(2):
        u = bounds(alpha[kv], delta[kv], tile_kv)
        orders = visits(length, tile_kv, n_splits, window)
        opened = [stay(u, order, 0.3) for order in orders]
        left = [stay(levels[kv].max(axis=0), order, 0.2) for order in opened]
        tiles, open_tiles, kept = (sum(map(len, x)) for x in (orders, opened, left))
        assert kept < open_tiles < tiles or tiles < 40
        assert np.flatnonzero(got.kept[kv]).tolist() == sorted(t for x in left for t in x)
        assert got.skipped[kv].tolist() == [len(x) - len(y) for x, y in zip(orders, left, strict=True)]
        rows = [min(length, (t + 1) * tile_kv) - max(first, t * tile_kv) for x in opened for t in x]
        assert got.read[kv] == sum(rows)


def opened(alpha: list[float], deltas: list[tuple[float, ...]], last: int = 16, **options: Any) -> list[bool]:
    """Tiles of 16 keys that a gate of threshold 0.5 opens at scale 1; a tile's keys have its deltas in turn."""
    delta = np.concatenate([np.resize(x, 16) for x in deltas])[: 16 * (len(deltas) - 1) + last]
    levels = np.zeros((1, len(alpha), len(deltas)))
    options = {"softmax_threshold": 0.0, "gate_threshold": 0.5} | options
    got = show(levels, 16, len(delta), alpha=[alpha], delta=[delta], **options)
    kept: list[bool] = got.kept[0].tolist()
    return kept


def test_each_product_of_extremes_counts() -> None:
    """The left tile is open for one product alone; by the others it is 2 or more below the right one."""
    assert opened([2.0, 1.0], [(2.0, -9.0), (2.0,)]) == [True, True]  # 2 * 2
    assert opened([-2.0, -1.0], [(4.0, 9.0), (4.0,)]) == [True, True]  # -1 * 4
    assert opened([2.0, 1.0], [(-9.0, -4.0), (-4.0,)]) == [True, True]  # 1 * -4
    assert opened([-2.0, 1.0], [(-3.0, 0.0), (4.0,)]) == [True, True]  # -2 * -3
    # As large a product in the right tile closes the left one.
    assert opened([2.0, 1.0], [(1.0,), (2.0, -9.0)]) == [False, True]
    assert opened([-2.0, -1.0], [(6.0,), (4.0, 9.0)]) == [False, True]
    assert opened([2.0, 1.0], [(-6.0,), (-9.0, -4.0)]) == [False, True]
    assert opened([-2.0, 1.0], [(4.0,), (-3.0, 0.0)]) == [False, True]


def test_gates_by_hand() -> None:
    assert opened([1.0], [(1.0, 2.0), (0.0, 3.0)]) == [False, True]
    assert opened([1.0], [(3.0, 0.0), (2.0, 2.0)]) == [True, True]
    # Right to left, and against the largest so far.
    assert opened([1.0], [(3.0,), (2.0,), (1.0,), (0.0,)]) == [True] * 4
    assert opened([1.0], [(0.0,), (1.0,), (2.0,), (3.0,)]) == [False, False, False, True]
    assert opened([1.0], [(5.0,), (2.0,), (4.0,), (1.0,), (3.0,)]) == [True, False, True, False, True]
    # -9 in the last tile alone would be 8 below; its missing keys count 0.
    assert opened([1.0], [(-1.0,), (-9.0,)], last=15) == [False, True]
    assert opened([1.0], [(-1.0,), (-9.0,)]) == [True, True]
    assert opened([-1.0], [(1.0,), (9.0,)], last=1) == [False, True]
    # A cut tile is visited first and counts like any other.
    assert opened([1.0], [(3.0,), (4.0,)], last=5) == [False, True]
    # No head of alpha 0 joins a group.
    assert opened([1.0], [(-9.0,), (-1.0,)]) == [False, True]
    # The bound is the product, not its logsigmoid, in which 6 and 5 are nearly the same.
    assert opened([1.0], [(5.0,), (6.0,)]) == [False, True]


@pytest.mark.parametrize("last", [7, 16])
def test_rows_in_use_count_visible_or_not(last: int) -> None:
    """The left tile's deltas are 3, then -9; at 2.5 on the right it is open, whichever of its keys are to be seen."""
    length = 32 + last
    deltas = [(3.0, *[-9.0] * 15), (2.5,), (2.5,)]
    for window in (length - 2, length - 16):
        assert opened([1.0], deltas, last, window=window) == [True, True, True]
    deltas[0] = (-9.0,)
    for window in (length - 2, length - 16):
        assert opened([1.0], deltas, last, window=window) == [False, True, True]
    # A tile out of sight does not count at all.
    assert opened([1.0], [(9.0,), (2.0,), (2.5,)], last, window=length - 17) == [False, True, True]


def test_each_split_begins_anew() -> None:
    deltas: list[tuple[float, ...]] = [(1.0,), (2.0,), (1.0,), (4.0,), (1.0,), (2.0,)]
    assert opened([1.0], deltas) == [False, False, False, True, False, True]
    assert opened([1.0], deltas, n_splits=2) == [False, True, True, True, False, True]
    assert opened([1.0], deltas, n_splits=3) == [False, True, False, True, False, True]
    assert opened([1.0], deltas, n_splits=7) == [True] * 6


def test_gates_and_scores_have_maxima_of_their_own() -> None:
    """The middle tile's scores are the largest, but its gate closes it before they are seen."""
    how = {"levels": [[[1.0, 9.0, 0.0]]], "tile_kv": 16, "length": 48, "alpha": [[1.0]], "softmax_threshold": 0.5}
    closed = {"delta": [np.repeat([0.0, -9.0, 0.0], 16)], "gate_threshold": 0.5, "is_logsigmoid_gate": False}
    assert show(**how, **closed).kept[0].tolist() == [True, False, True]
    # Open, it keeps the left one out.
    assert show(**how, **closed | {"delta": [np.zeros(48)]}).kept[0].tolist() == [False, True, True]


def test_alphas_are_those_of_their_heads() -> None:
    """Every (sequence, KV head) pair has its own alphas, and opens the left tile or not."""
    alpha = np.array([[1.0, 0.5, -1.0, -0.5], [-0.25, -1.0, 0.25, 1.0], [1.0, -1.0, 0.1, 0.1]], np.float32)
    delta = np.zeros((3, 2, 32), np.float32)
    delta[..., :16] = -9.0  # largest products are -4.5, 9, and so on; on the right they are 0
    q, k = np.zeros((3, 4, 8), np.float32), np.zeros((3, 32, 2, 8), np.float32)
    how: dict[str, Any] = {"gate_threshold": 0.5, "softmax_scale": 1.0, "tile_kv": 16, "target": "trn2"}
    _, stats = gated_decode(q, k, k, alpha, delta, softmax_threshold=0.0, return_stats=True, **how)
    assert stats.tiles_skipped[..., 0].tolist() == [[1, 0], [0, 1], [0, 1]]


def test_default_thresholds_are_those_of_each_length() -> None:
    """d / length, at most 1: per sequence a tile whose gate is just above its log, and one just below."""
    d, lengths = 64, [400, 90, 65, 40, 16]
    q, k = np.zeros((5, 1, d), np.float32), np.zeros((5, 400, 1, d), np.float32)
    delta = np.zeros((5, 1, 400), np.float32)
    for b, n in enumerate(lengths):
        log = np.log(min(1.0, d / n))
        delta[b, 0, 16:32] = log + 0.01
        delta[b, 0, :16] = log - 0.01
    how: dict[str, Any] = {"seqlens_kv": np.array(lengths), "tile_kv": 16, "softmax_scale": 1.0, "return_stats": True}
    alpha = np.ones((5, 1), np.float32)
    _, stats = gated_decode(q, k, k, alpha, delta, softmax_threshold=0.0, target="trn2", **how)
    # Of 40 keys the log is 0, not that of 1.6, which would close both; 16 keys are one tile.
    assert stats.tiles_skipped[:, 0, 0].tolist() == [1, 1, 1, 1, 0]
    # With the same numbers in K, and gates of 0, it is the test of scores that leaves tiles out.
    k[..., 0], q[..., 0] = delta[:, 0, :, None], 1.0
    _, stats = gated_decode(q, k, k, alpha, 0 * delta, gate_threshold=0.0, target="trn2", **how)
    assert stats.tiles_skipped[:, 0, 0].tolist() == [1, 1, 1, 1, 0]


# -- the first items, whose keys are asked for before all tiles are tested


# Heads and keys, and then trips, blocks and chunks: three items of one lane; two trips; three chunks of tiles, of which
# first items hold two; two blocks, the second with the last trip.
PLACES = {
    "items": ((1, 5000), (1, 1, 1)),
    "trips": ((17, 1000), (2, 1, 1)),
    "chunks": ((17, 2100), (2, 1, 3)),
    "blocks": ((33, 300), (3, 2, 2)),
}


def extremes_before_keys(run: Any) -> int:
    """Extremes of deltas that were taken before keys were first asked for."""
    tile_kv, n = run.arguments["tile_kv"], 0
    for record in run.trace.records:
        if any(a.storage.is_argument and a.storage.name == "k" for a in record.reads):
            return n
        # Of tiles on all partitions; sides are fewer.
        if record.instruction == "tensor_reduce" and record.reads[0].shape == (128, tile_kv):
            n += 1
    return n


CLOSED = ("none", "last", "last side", "first", "by the cut tile")


@pytest.mark.parametrize(
    ("place", "closed"),
    [
        *(("items", closed) for closed in CLOSED),
        *(("trips", closed) for closed in CLOSED[:4]),
        *(("chunks", closed) for closed in CLOSED[1:]),
        *(("blocks", closed) for closed in CLOSED[::2]),
    ],
)
def test_keys_come_before_all_tiles_are_tested(place: str, closed: str) -> None:
    """If none of the tiles is closed that the first items would have; no closed tile is read even then."""
    (n_kv_heads, length), sizes = PLACES[place]
    tile_kv, d = 16, 8
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((1, *x)).astype(BF16) for x in ((n_kv_heads, d), *[(length, n_kv_heads, d)] * 2))
    alpha, delta = np.ones((1, n_kv_heads), np.float32), np.full((1, n_kv_heads, length), 3.0, np.float32)
    # The last side is a tile that the window cuts.
    unseen = 5 if closed == "last side" else 0
    if closed in ("last", "last side"):
        delta[0, 0 if unseen else -1, :tile_kv] = -90.0
    elif closed == "first":
        delta[0, 0, length // tile_kv * tile_kv - 3 * tile_kv :][:tile_kv] = -90.0
    elif closed == "by the cut tile":
        delta[0, 0, -1], delta[0, 0, : -2 * tile_kv] = 5.0, 5.0
    window = length - 1 - unseen
    options = {
        "tile_kv": tile_kv,
        "window_size": (window if unseen else None, None),
        "gate_threshold": 0.5,
        "softmax_threshold": 0.0,
        "softmax_scale": 1.0,
    }
    exact, low = (f(q, k, v, alpha, delta, **options) for f in (oracle, gated_decode_rounded))
    assert exact.stats.margin.min() > 1e-3
    assert (~exact.stats.keys_read).sum() == (closed != "none")
    used = np.repeat(exact.stats.keys_read[0], tile_kv, axis=1)[:, :length]
    used[:, :unseen] = False
    k[0, ~used.T] = v[0, ~used.T] = np.nan
    (o, lse, stats), (run,) = traced(True, q, k, v, alpha, delta, **options, return_lse=True, return_stats=True)
    check_results((o, lse), BF16, exact, low)
    check_stats(stats, exact, [length], window, tile_kv, q)
    np.testing.assert_array_equal(rows_read(run, "k").reshape(used.shape), used)
    np.testing.assert_array_equal(rows_read(run, "v").reshape(used.shape), used)
    n_trips = run.arguments["records"].shape[1] - 1
    assert (n_trips, run.arguments["units"].shape[0], run.arguments["rows"].shape[0]) == sizes
    n_ahead, n_all = run.arguments["ahead"].shape[1] - 1, run.arguments["kinds"].shape[2]
    if closed in ("none", "last", "last side"):
        assert extremes_before_keys(run) == 2 * n_ahead
    else:
        assert extremes_before_keys(run) >= 2 * (n_ahead + n_all)


# -- what is read


READ = GatedCase("r", 4, 2, 32, (500, 77), 0.3, 32, 2, unused=9, window=400, negative=True)


def seen_rows(case: GatedCase, tiles: Any) -> Any:
    """Visible rows of the tiles [batch, n_kv_heads, n_tiles] that are True, as the cache has them."""
    rows = np.zeros((len(case.lengths), case.n_kv_heads, max(case.lengths) + case.unused), int)
    for b, kv, t in np.argwhere(tiles):
        n = case.lengths[b]
        first = 0 if case.window is None else max(0, n - 1 - case.window)
        rows[b, kv, max(first, t * case.tile_kv) : min(n, (t + 1) * case.tile_kv)] = 1
    return rows


def test_rows_in_use_are_read_once_and_no_others() -> None:
    """K in sight of open tiles and V of those that stay, none twice; the counts and the oracle's say the same."""
    r = reference(READ, BF16)
    (_, stats), (run, _) = traced(True, *r.operands, **r.options, return_stats=True)
    want = r.exact.stats
    k, v = seen_rows(READ, want.keys_read), seen_rows(READ, want.kept)
    assert 0 < v.sum() < k.sum() < seen_rows(READ, np.ones_like(want.kept)).sum()
    np.testing.assert_array_equal(rows_read(run, "k").reshape(k.shape), k)
    np.testing.assert_array_equal(rows_read(run, "v").reshape(v.shape), v)
    np.testing.assert_array_equal(stats.k_bytes_read, k.sum(axis=-1) * 64)
    np.testing.assert_array_equal(stats.v_bytes_read, v.sum(axis=-1) * 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_left_out_may_hold_anything(bad: float) -> None:
    """K and V of closed tiles, V of others that are left out, everything beyond lengths, K and V before windows."""
    r = reference(READ, BF16)
    how = r.options | {"return_lse": True, "return_stats": True, "target": "trn2"}
    q, k, v, alpha, delta = (np.nan_to_num(x) for x in r.operands)
    want = gated_decode(q, k, v, alpha, delta, **how)
    stats = r.exact.stats
    assert (~stats.keys_read[0, :, 3]).any(), "the tile that the window cuts has to be closed"
    assert (stats.keys_read & ~stats.kept).any()
    k[seen_rows(READ, stats.keys_read).swapaxes(1, 2) == 0] = bad
    v[seen_rows(READ, stats.kept).swapaxes(1, 2) == 0] = bad
    for b, n in enumerate(READ.lengths):
        delta[b, :, n:] = bad
    got = gated_decode(q, k, v, alpha, delta, **how)
    assert_same_bits(got[:2], want[:2])
    for x, y in zip(got[2], want[2], strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_closed_tile_at_the_edge_of_a_window_is_not_read() -> None:
    """1024 keys in one tile, of which 1000 are in sight: none of their keys is read."""
    length, window = 3 * 1024, 3047
    q, k = normal(1, 2, 16), normal(1, length, 1, 16)
    delta = np.zeros((1, 1, length), np.float32)
    delta[..., :1024] = -99.0
    k[:, :1024] = np.nan
    how: dict[str, Any] = {"tile_kv": 1024, "window_size": (window, None), "gate_threshold": 0.1}
    (o, stats), (run,) = traced(
        True, q, k, k, np.ones((1, 2), np.float32), delta, softmax_threshold=0.0, return_stats=True, **how
    )
    assert np.isfinite(o.astype(float)).all()
    assert rows_read(run, "k").tolist() == rows_read(run, "v").tolist() == [0] * 1024 + [1] * 2048
    assert stats.k_bytes_read.tolist() == [[2048 * 32]]
    assert (stats.tiles_total.sum(), stats.tiles_skipped.sum()) == (3, 1)


# -- what results do not depend on


@pytest.mark.parametrize("n_splits", [1, 2])
def test_a_result_does_not_depend_on_the_batch(n_splits: int) -> None:
    """Alone, in another order and beside sequences of other lengths: the same bits and tiles."""
    case = GatedCase("b", 2, 1, 16, (300, 37, 129, 0), 0.3, 16, n_splits, window=250, negative=True)
    r = reference(case, BF16)
    lengths = np.array(case.lengths)

    def run(rows: Any, at: Any = lengths) -> Any:
        how = r.options | {"seqlens_kv": at[rows], "max_seqlen_kv": 300, "target": "trn2"}
        return gated_decode(*(x[rows] for x in r.operands), return_lse=True, return_stats=True, **how)

    with columns_by_themselves():
        whole = run(slice(None))
        for rows in ([2, 0, 3, 1], [0], [1]):
            o, lse, stats = run(rows)
            assert_same_bits((o, lse), (whole[0][rows], whole[1][rows]))
            for x, y in zip(stats, whole[2], strict=True):
                np.testing.assert_array_equal(x, y[rows])
        among = run([0, 1, 2], np.array([300, 20, 64]))
        assert_same_bits((among[0][:1], among[1][:1]), (whole[0][:1], whole[1][:1]))


def test_packed_is_flat() -> None:
    case = GatedCase("p", 4, 2, 64, (129, 0, 300), 0.3, 32, unused=7, negative=True)
    packed = dataclasses.replace(case, packed=True)
    with columns_by_themselves():
        results = [
            gated_decode(*r.operands, **r.options, return_lse=True, max_seqlen_kv=400, target="trn2")
            for r in (reference(case, BF16), reference(packed, BF16))
        ]
    assert_same_bits(*results)


def test_many_trips_of_unlike_groups() -> None:
    """27 sequences of lengths that have nothing to do with each other, some of them empty."""
    lengths = (*np.random.default_rng(2).integers(0, 200, 25).tolist(), 0, 200)
    check(GatedCase("t", 2, 1, 8, lengths, 0.2, 16, window=180, unused=1, negative=True), BF16)


@st.composite
def cases(draw: st.DrawFn) -> GatedCase:
    length = st.one_of(st.integers(0, 400), st.sampled_from([0, 1, 127, 128, 129, 256]))
    group, heads = draw(st.sampled_from([1, 2, 5, 8])), draw(st.integers(1, 2))
    return GatedCase(
        "drawn",
        group * heads,
        heads,
        draw(st.sampled_from([24, 64, 130])),
        tuple(draw(st.lists(length, min_size=1, max_size=3))),
        draw(st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0])),
        draw(st.sampled_from([16, 32, 128, 256])),
        draw(st.sampled_from([1, 1, 2, 4])),
        unused=draw(st.integers(0, 9)),
        packed=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(0, 300))),
        locality=draw(st.sampled_from([1.0, 4.0, 12.0])),
        seed=draw(st.integers(0, 99)),
        gate_threshold=draw(st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0])),
        is_logsigmoid=draw(st.booleans()),
        fast=draw(st.booleans()),
        negative=draw(st.booleans()),
        gates=draw(st.sampled_from([0.3, 1.0, 5.0])),
    )


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(cases(), st.sampled_from([BF16, F16]), st.sampled_from(["trn1", "trn2", "trn3"]))
@example(GatedCase("last side", 3, 1, 24, (388, 70), 0.3, 128, 3, window=260), BF16, "trn2")
def test_any_case(case: GatedCase, dtype: Any, target: str) -> None:
    assume(reference(case, dtype).exact.stats.margin.min() > 1e-3)
    check(case, dtype, target)


def test_two_runs_are_equal_and_leave_their_inputs() -> None:
    arrays = [normal(2, 4, 64), normal(2, 300, 2, 64), normal(2, 300, 2, 64, seed=1), normal(2, 4), normal(2, 2, 300)]
    before = [x.copy() for x in arrays]
    results = [gated_decode(*arrays, tile_kv=16, return_lse=True, target="trn2") for _ in range(2)]
    assert_same_bits(*results)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_delta_need_not_be_contiguous() -> None:
    r = reference(READ, BF16)
    *operands, delta = r.operands
    turned = np.ascontiguousarray(delta.swapaxes(1, 2)).swapaxes(1, 2)
    assert not turned.flags.c_contiguous
    how = r.options | {"return_lse": True, "target": "trn2"}
    assert_same_bits(gated_decode(*operands, turned, **how), gated_decode(*operands, delta, **how))


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_without_rows(packed: bool) -> None:
    q = normal(2, 4, 8)
    k, delta = (normal(0, 2, 8), normal(2, 0)) if packed else (normal(2, 0, 2, 8), normal(2, 2, 0))
    how: dict[str, Any] = {"cu_seqlens_kv": np.zeros(3, np.int32)} if packed else {}
    o, lse, stats = gated_decode(
        q, k, k, normal(2, 4), delta, return_lse=True, return_stats=True, n_splits=2, tile_kv=16, target="trn2", **how
    )
    assert (o == 0).all()
    assert (lse == -np.inf).all()
    assert all(not x.any() for x in stats)


def test_memory_of_four_lanes() -> None:
    """What the docstring says of eight KV heads of eight query heads each."""
    q, k = normal(1, 64, 128), np.zeros((1, 8192, 8, 128), BF16)
    gates = normal(1, 64), np.zeros((1, 8, 8192), BF16)
    peaks = []
    for most in (8192, 2**17):
        _, (run,) = traced(True, q, k, k, *gates, seqlens_kv=np.array([300]), max_seqlen_kv=most)
        use = run.trace.memory[0]
        peaks.append((use.sbuf.amount, use.psum.amount))
    assert peaks[0] == peaks[1], "nothing depends on the number of keys"
    assert 64 * 1024 < peaks[0][0] <= 99 * 1024
    assert peaks[0][1] <= 8


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: GatedCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()
    monkeypatch.setattr(_sparse_launch, "simulate_kernel", lambda kernel, *args, target: run_on_device(kernel, *args))
    check(case, dtype)
