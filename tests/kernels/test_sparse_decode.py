"""Threshold-sparse decode against the oracle: results, tiles that groups leave out, and what is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from contributed import _sparse_launch
from contributed._cases import GatedCase, SparseCase
from contributed._nki import has_device, run_on_device
from contributed.flash_decode import flash_decode
from contributed.sparse_decode import CASES, INSTRUCTIONS_PER_TILE, sparse_decode
from reference.sparse_decode import sparse_decode as oracle
from tests.kernels.flash import BF16, DTYPES, by_case_dtype_and_target, by_dtype, by_layout, normal
from tests.kernels.sparse import check, check_stats, reference, rows_read, show, stay, traced, visits
from tests.kernels.test_flash_decode_properties import assert_same_bits, columns_by_themselves

SPARSE = [case for case in CASES if not isinstance(case, GatedCase)]
by_case = pytest.mark.parametrize("case", SPARSE, ids=lambda c: c.name)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


@by_case_dtype_and_target(SPARSE)
def test_matches_the_oracle(case: SparseCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


@by_case
def test_cases_leave_out_tiles_with_room_to_spare(case: SparseCase) -> None:
    """No decision of a case is close in any type, and all but those of one tile per split have one to make."""
    for dtype in DTYPES:
        stats = reference(case, dtype).exact.stats
        assert stats.margin.min() > 1e-3
        assert stats.tiles_skipped.any() == (case.name not in ("no-keys", "window-in-a-tile"))


# -- shapes


@by_layout
@pytest.mark.parametrize("head_dim", [1, 130, 256])
def test_head_dims(head_dim: int, d_major: bool) -> None:
    check(SparseCase("d", 2, 1, head_dim, (300, 17), 0.5, tile_kv=32, d_major=d_major, unused=1), BF16)


@by_layout
@pytest.mark.parametrize("group", [1, 3, 128])
def test_groups(group: int, d_major: bool) -> None:
    check(SparseCase("g", group, 1, 64, (300,), 0.5, tile_kv=64, d_major=d_major), F16)


@by_layout
@pytest.mark.parametrize("window", [0, 3, 64, 65, 200])
def test_windows(window: int, d_major: bool) -> None:
    """Smaller than a tile, in one tile or over the edge of two, and around whole tiles."""
    check(SparseCase("w", 2, 1, 64, (300, 128, 2), 0.5, tile_kv=64, window=window, d_major=d_major, unused=2), BF16)


LENGTHS = (0, 1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 2064, 4096)


@by_layout
def test_lengths_around_the_edges_of_tiles_and_items(d_major: bool) -> None:
    """Items of 16 keys by 128 partitions."""
    case = SparseCase("n", 1, 1, 16, LENGTHS, 0.1, tile_kv=16, d_major=d_major, locality=6.0)
    r = check(case, BF16)
    _, (run,) = traced(False, *r.operands, **r.options, **case.launch("trn2"))
    assert run.item_keys == 2048


# -- decisions, read off the output


@pytest.mark.parametrize(
    ("tile_kv", "length", "window", "n_splits", "d_major"),
    [
        (16, 4007, None, 1, False),
        (16, 2049, 1900, 3, True),
        (16, 100, None, 7, False),
        (32, 3001, 2000, 2, False),
        (64, 1501, None, 1, True),
        (128, 3001, 1900, 1, True),
        (128, 1664, 1200, 3, False),
        (256, 2500, 1900, 1, False),
        (1024, 5000, 3000, 2, True),
    ],
)
def test_every_tile_by_itself(tile_kv: int, length: int, window: int | None, n_splits: int, d_major: bool) -> None:
    """Wherever in items, between items and beside them; levels are quarters, as no threshold's log is."""
    n_tiles = -(-length // tile_kv)
    levels = np.random.default_rng(tile_kv).integers(-12, 13, (2, 2, n_tiles)) / 4
    options = {"softmax_threshold": 0.2, "k_d_major": d_major, "n_splits": n_splits, "window": window}
    got = show(levels, tile_kv, length, **options)
    orders = visits(length, tile_kv, n_splits, window)
    for kv in range(2):
        stays = [stay(levels[kv].max(axis=0), order, 0.2) for order in orders]
        assert np.flatnonzero(got.kept[kv]).tolist() == sorted(t for x in stays for t in x)
        assert got.skipped[kv].tolist() == [len(x) - len(y) for x, y in zip(orders, stays, strict=True)]
        assert got.read[kv] == (length if window is None else window + 1)


# Of seven tiles from left to right; visited from the right they are 2, 1, 3, 3, 2, 3, 4.
LEVELS = [[[4.0, 3.0, 2.0, 3.0, 3.0, 1.0, 2.0]]]
KEPT = [True, True, False, True, True, False, True]


@by_layout
@pytest.mark.parametrize("begin", [0, 60])
@pytest.mark.parametrize("last", [5, 128])
def test_right_to_left_and_ties_stay(last: int, begin: int, d_major: bool) -> None:
    """At threshold 1 a tile stays if it reaches the largest before it; the first and last visited are cut or whole."""
    length = 6 * 128 + last
    window = length - 1 - begin if begin else None
    options: dict[str, Any] = {"softmax_threshold": 1.0, "k_d_major": d_major, "window": window}
    assert show(LEVELS, 128, length, **options).kept[0].tolist() == KEPT
    # The other way round 4 is visited first; nothing else reaches it.
    mirrored = np.array(LEVELS)[..., ::-1]
    assert show(mirrored, 128, length, **options).kept[0].tolist() == [False] * 6 + [True]


@by_layout
@pytest.mark.parametrize("window", [None, 436, 3])
@pytest.mark.parametrize("length", [8 * 64 - 11, 8 * 64])
def test_the_first_visited_tile_is_never_left_out(length: int, window: int | None, d_major: bool) -> None:
    """Far below zero, and then all others far below it: a whole tile, a cut one, and one that is first and last."""
    levels = np.full((1, 2, 8), -1e5)
    levels[0, :, 7] = -20.0
    options: dict[str, Any] = {"softmax_threshold": 1e-30, "k_d_major": d_major, "window": window}
    assert show(levels, 64, length, **options).kept[0].tolist() == [False] * 7 + [True]
    levels[0, :, 7] = -2e5
    first = 0 if window is None else (length - 1 - window) // 64
    if first < 7:  # o has weights of exp(-1e5) as 0: the counts say which tiles are there
        q, k = np.zeros((1, 2, 64), np.float32), np.zeros((1, length, 1, 64), np.float32)
        q[..., 0], k[0, :, 0, 0] = 1.0, np.repeat(levels[0, 0], 64)[:length]
        how = {"tile_kv": 64, "softmax_scale": 1.0, "window_size": (window, None), "return_stats": True}
        _, stats = sparse_decode(q, k, k, softmax_threshold=1e-30, target="trn2", **how)
        assert stats.tiles_skipped.sum() == 0


def test_each_split_begins_anew() -> None:
    """Seven tiles in runs of ceil(7 / n); a low tile stays where it is the first of its split."""
    levels = [[[4.0, 3.0, 2.0, 1.0, 3.0, 1.0, 2.0]]]
    for n_splits, kept in (
        (1, [True, True, False, False, True, False, True]),
        (2, [True, True, True, True, True, False, True]),  # from the right: 1, 2, 3, 4 and 2, 1, 3
        (3, [True, True, True, False, True, True, True]),  # 2, 3, 4 and 1, 3, 1 and 2
        (6, [True] * 7),  # 3, 4 and 1, 2 and 1, 3 and 2, and two splits without tiles
        (7, [True] * 7),
    ):
        got = show(levels, 16, 100, softmax_threshold=1.0, n_splits=n_splits)
        assert got.kept[0].tolist() == kept, n_splits
        assert got.skipped.shape == (1, n_splits)


def test_splits_are_one_unless_asked_for() -> None:
    """Whatever the number of cores: one sequence and KV head leaves the second core without work."""
    for n_cores in (1, 2):
        got = show(LEVELS, 16, 100, softmax_threshold=1.0, n_cores=n_cores)
        assert got.kept[0].tolist() == KEPT
        assert got.skipped.tolist() == [[2]]


@by_layout
def test_one_head_keeps_a_tile_for_its_group(d_major: bool) -> None:
    """Head 0 has its largest scores on the right, head 1 on the left; another KV head decides for itself."""
    levels = [[[0.0, 9.0, 9.0], [8.0, 0.0, 0.0]], [[0.0, 9.0, 9.0], [0.0, 0.0, 0.0]]]
    got = show(levels, 32, 90, softmax_threshold=0.1, k_d_major=d_major)
    assert got.kept.tolist() == [[True, True, True], [False, True, True]]


@by_layout
@pytest.mark.parametrize("window", [None, 250])
def test_a_row_whose_own_maximum_is_left_out(window: int | None, d_major: bool) -> None:
    """Head 1 scores 200 where its group's 250 are 49 below: its softmax is over what is left, where it scores up to 1.

    Under a maximum of 200 the others' exponentials would be 0.
    """
    length, tile_kv, d = 290, 64, 64
    rng = np.random.default_rng(3)
    left = 0 if window is None else length - 1 - window
    for low_tile in (0, 2):
        k, v = np.zeros((1, length, 1, d)), rng.standard_normal((1, length, 1, d))
        k[0, :, 0, 0], k[0, :, 0, 1] = rng.uniform(299, 300, length), rng.uniform(0, 1, length)
        out = slice(low_tile * tile_kv, (low_tile + 1) * tile_kv)
        k[0, out, 0, 0], k[0, out, 0, 1] = 250.0, 200.0
        q = np.eye(2, d)[None]
        arrays = [x.astype(np.float32) for x in (q, k, v)]
        how = {"softmax_scale": 1.0, "tile_kv": tile_kv, "window_size": (window, None), "k_d_major": d_major}
        o, lse, stats = sparse_decode(
            *arrays, softmax_threshold=1e-4, return_lse=True, return_stats=True, target="trn2", **how
        )
        assert stats.tiles_skipped.sum() == 1
        there = np.ones(length, bool)
        there[:left] = there[out] = False
        x = k[0, there, 0, :2].T
        p = np.exp(x - x.max(axis=1, keepdims=True))
        total = p.sum(axis=1)
        np.testing.assert_allclose(lse[0], x.max(axis=1) + np.log(total), rtol=1e-6)
        np.testing.assert_allclose(o[0], p @ v[0, there, 0] / total[:, None], rtol=1e-3, atol=1e-4)


@by_layout
def test_a_needle_is_found_at_every_position(d_major: bool) -> None:
    """640 keys in tiles of 64, one for each query row of five KV heads: o is its value, bit by bit."""
    length, heads, group, d = 640, 5, 128, 64
    rng = np.random.default_rng(5)
    positions = rng.permutation(length).reshape(heads, group)
    q = rng.standard_normal((heads, group, d))
    # Rows of norm 8 and needles that score 64; every tile has one of each KV head, so none may be left out.
    q = (8 * q / np.linalg.norm(q, axis=-1, keepdims=True)).astype(BF16)
    k, v = (rng.standard_normal((1, length, heads, d)).astype(BF16) for _ in "kv")
    v[v == 0] = 1  # o has no sign of zero
    for h in range(heads):
        k[0, positions[h], h] = q[h]
        assert len(set(positions[h] // 64)) == 10
    how = {"softmax_threshold": 0.01, "tile_kv": 64, "softmax_scale": 1.0, "k_d_major": d_major}
    o, stats = sparse_decode(q.reshape(1, -1, d), k, v, return_stats=True, target="trn2", **how)
    assert stats.tiles_skipped.sum() == 0
    for h in range(heads):
        np.testing.assert_array_equal(o[0, h * group : (h + 1) * group], v[0, positions[h], h], err_msg=f"head {h}")


# -- thresholds


def test_default_threshold_is_that_of_each_length() -> None:
    """d / length, at most 1: per sequence one tile just above its log, and one just below."""
    d, tile_kv = 64, 16
    lengths = [400, 90, 65, 40, 16]
    room = max(lengths)
    q, k = np.zeros((5, 1, d), np.float32), np.zeros((5, room, 1, d), np.float32)
    q[..., 0] = 1.0
    for b, n in enumerate(lengths):
        log = np.log(min(1.0, d / n))
        k[b, 16:32, 0, 0] = log + 0.01
        k[b, :16, 0, 0] = log - 0.01
    how = {"seqlens_kv": np.array(lengths), "tile_kv": tile_kv, "softmax_scale": 1.0, "return_stats": True}
    _, stats = sparse_decode(q, k, k, target="trn2", **how)
    # Of 40 keys the log is 0, not that of 1.6, which would leave out both; 16 keys are one tile.
    assert stats.tiles_skipped[:, 0, 0].tolist() == [1, 1, 1, 1, 0]
    _, stats = sparse_decode(q, k, k, softmax_threshold=64 / 400, target="trn2", **how)
    assert stats.tiles_skipped[:, 0, 0].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_softmax_scale(scale: float) -> None:
    check(SparseCase("scale", 4, 2, 64, (300, 31), 0.8, tile_kv=16, softmax_scale=scale, n_splits=2), BF16)


OFF: dict[str, dict[str, Any]] = {
    "plain": {},
    "one split": {"n_splits": 1, "window_size": (300, 0)},
    "d-major": {"k_d_major": True, "n_splits": 2},
    "two cores": {"n_cores": 2, "n_splits": 4, "window_size": (300, 0)},
    "scale and room": {"softmax_scale": 0.3, "max_seqlen_kv": 1500},
}


@pytest.mark.parametrize("options", OFF.values(), ids=OFF)
def test_off_is_flash_decode_bit_for_bit(options: dict[str, Any]) -> None:
    lengths = np.array([400, 0, 129])
    q, k, v = normal(3, 4, 64), normal(3, 401, 2, 64, seed=1), normal(3, 401, 2, 64, seed=2)
    how = {"seqlens_kv": lengths, "return_lse": True, "target": "trn2"} | options
    got = sparse_decode(q, k, v, softmax_threshold=0, tile_kv=64, return_stats=True, **how)
    assert_same_bits(got[:2], flash_decode(q, k, v, **how))
    shared = {name: x for name, x in options.items() if name in ("n_splits", "window_size", "softmax_scale")}
    exact = oracle(q, k, v, softmax_threshold=0.0, tile_kv=64, seqlens_kv=lengths, **shared)
    check_stats(got[2], exact, lengths, options.get("window_size", (None, None))[0], 64, q)


def test_off_runs_no_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_launch, "simulate_kernel", lambda *_, **__: pytest.fail("a kernel ran"))
    sparse_decode(normal(1, 2, 8), normal(1, 40, 1, 8), normal(1, 40, 1, 8), softmax_threshold=0.0, target="trn2")


# -- what is read


@by_layout
def test_rows_in_use_are_read_once_and_no_others(d_major: bool) -> None:
    """Rows of K in sight and of V in tiles that stay, none twice; the counts and the oracle's say the same."""
    case = SparseCase("r", 4, 2, 32, (700, 256), 0.3, 32, 3, unused=9, d_major=d_major, window=500)
    r = reference(case, BF16)
    (_, stats), (run, _) = traced(False, *r.operands, **r.options, **case.launch("trn2"), return_stats=True)
    keys = r.operands[1].shape[1]
    expected = {name: np.zeros((2, 2, keys), int) for name in ("k", "v")}
    for b, n in enumerate(case.lengths):
        first = max(0, n - 1 - 500)
        for kv in range(2):
            expected["k"][b, kv, first:n] = 1
            for t in np.flatnonzero(r.exact.stats.kept[b, kv]):
                expected["v"][b, kv, max(first, t * 32) : min(n, (t + 1) * 32)] = 1
    row_bytes = 32 * 2
    assert 0 < expected["v"].sum() < expected["k"].sum()
    for name, bytes_read in (("k", stats.k_bytes_read), ("v", stats.v_bytes_read)):
        np.testing.assert_array_equal(bytes_read, expected[name].sum(axis=-1) * row_bytes)
        if name == "v" or not d_major:
            # d-major K and V beside it are longer than the cache.
            rows = rows_read(run, name).reshape(2, 2, -1)
            np.testing.assert_array_equal(rows[:, :, :keys], expected[name], err_msg=name)
            assert rows[:, :, keys:].sum() == 0


@pytest.mark.parametrize(("bad", "d_major"), [(np.nan, False), (np.inf, False), (np.nan, True)])
def test_what_is_left_out_may_hold_anything(bad: float, d_major: bool) -> None:
    """V of tiles that are left out, K and V beyond lengths and before windows."""
    case = SparseCase("nan", 4, 2, 32, (500, 77), 0.3, 32, 2, unused=9, d_major=d_major, window=400)
    r = reference(case, BF16)
    how = r.options | case.launch("trn2") | {"return_lse": True, "return_stats": True, "target": "trn2"}
    q, *clean = (np.nan_to_num(x) for x in r.operands)
    dirty = [x.copy() for x in clean]
    for b, n in enumerate(case.lengths):
        for x in dirty:
            x[b, n:] = x[b, : max(0, n - 401)] = bad
        for kv, t in np.argwhere(~r.exact.stats.kept[b]):
            dirty[1][b, t * 32 : (t + 1) * 32, kv] = bad
    assert (~np.isfinite(dirty[1][0, 400:500])).any(), "a tile in sight has to be left out"
    want, got = sparse_decode(q, *clean, **how), sparse_decode(q, *dirty, **how)
    assert_same_bits(got[:2], want[:2])
    for x, y in zip(got[2], want[2], strict=True):
        np.testing.assert_array_equal(x, y)


# -- what results do not depend on


@pytest.mark.parametrize(("n_splits", "d_major"), [(3, False), (1, True)])
def test_two_cores_equal_one(n_splits: int, d_major: bool) -> None:
    case = SparseCase("2", 4, 2, 16, (300, 37), 0.3, 16, n_splits, d_major=d_major, window=250)
    r = reference(case, BF16)
    how = r.options | {"k_d_major": d_major, "return_lse": True, "return_stats": True, "target": "trn2"}
    with columns_by_themselves():
        one, two = (sparse_decode(*r.operands, n_cores=n, **how) for n in (1, 2))
    assert_same_bits(two[:2], one[:2])
    for x, y in zip(two[2], one[2], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("n_splits", "d_major"), [(2, False), (1, True)])
def test_a_result_does_not_depend_on_the_batch(n_splits: int, d_major: bool) -> None:
    """Alone, in another order and beside sequences of other lengths: the same bits and tiles."""
    case = SparseCase("b", 2, 1, 16, (300, 37, 129, 0), 0.3, 16, n_splits, d_major=d_major, window=250)
    r = reference(case, BF16)
    q, k, v = r.operands
    lengths = np.array(case.lengths)

    def run(rows: Any, at: Any = lengths) -> Any:
        how = r.options | {"seqlens_kv": at[rows], "max_seqlen_kv": 300, "k_d_major": d_major, "target": "trn2"}
        return sparse_decode(q[rows], k[rows], v[rows], return_lse=True, return_stats=True, **how)

    with columns_by_themselves():
        whole = run(slice(None))
        for rows in ([2, 0, 3, 1], [0], [1]):
            o, lse, stats = run(rows)
            assert_same_bits((o, lse), (whole[0][rows], whole[1][rows]))
            for x, y in zip(stats, whole[2], strict=True):
                np.testing.assert_array_equal(x, y[rows])
        among = run([0, 1, 2], np.array([300, 20, 64]))
        assert_same_bits((among[0][:1], among[1][:1]), (whole[0][:1], whole[1][:1]))


def test_both_layouts_leave_out_the_same_tiles() -> None:
    case = SparseCase("l", 8, 2, 64, (500, 129), 0.3, 32, 2, window=400)
    assert reference(case, BF16).exact.stats.kept.any()
    for d_major in (False, True):
        check(dataclasses.replace(case, d_major=d_major), BF16)


@st.composite
def cases(draw: st.DrawFn) -> SparseCase:
    length = st.one_of(st.integers(0, 400), st.sampled_from([0, 1, 127, 128, 129, 256]))
    group, heads = draw(st.sampled_from([1, 2, 5, 8])), draw(st.integers(1, 2))
    return SparseCase(
        "drawn",
        group * heads,
        heads,
        draw(st.sampled_from([24, 64, 130])),
        tuple(draw(st.lists(length, min_size=1, max_size=3))),
        draw(st.sampled_from([1e-6, 0.01, 0.3, 0.9, 1.0])),
        draw(st.sampled_from([16, 32, 128, 256])),
        draw(st.sampled_from([1, 1, 2, 4])),
        unused=draw(st.integers(0, 9)),
        d_major=draw(st.booleans()),
        n_cores=draw(st.sampled_from([1, 2])),
        window=draw(st.one_of(st.none(), st.integers(0, 300))),
        locality=draw(st.sampled_from([1.0, 4.0, 12.0])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(cases(), st.sampled_from(DTYPES), st.sampled_from(["trn1", "trn2", "trn3"]))
@example(SparseCase("last side", 3, 1, 24, (388, 70), 0.3, 128, 3, window=260, d_major=True), BF16, "trn2")
def test_any_case(case: SparseCase, dtype: Any, target: str) -> None:
    assume(reference(case, dtype).exact.stats.margin.min() > 1e-3)
    check(case, dtype, target)


def test_packed_is_flat() -> None:
    """The same sequences one after the other, with rows between them that nobody uses."""
    case = SparseCase("p", 4, 2, 64, (129, 0, 300), 0.3, 32, unused=7)
    packed = dataclasses.replace(case, packed=True)
    with columns_by_themselves():
        results = [
            sparse_decode(*r.operands, **r.options, return_lse=True, max_seqlen_kv=400, target="trn2")
            for r in (reference(case, BF16), reference(packed, BF16))
        ]
    assert_same_bits(*results)


def test_two_runs_are_equal_and_leave_their_inputs() -> None:
    q, k, v = normal(2, 4, 64), normal(2, 300, 2, 64), normal(2, 300, 2, 64, seed=1)
    before = [x.copy() for x in (q, k, v)]
    results = [sparse_decode(q, k, v, tile_kv=16, return_lse=True, target="trn2") for _ in range(2)]
    assert_same_bits(*results)
    for x, y in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_cache_without_rows() -> None:
    q, k = normal(2, 4, 8), normal(2, 0, 2, 8)
    for how in ({"n_splits": 2}, {"k_d_major": True}):
        o, lse, stats = sparse_decode(q, k, k, tile_kv=16, return_lse=True, return_stats=True, target="trn2", **how)
        assert (o == 0).all()
        assert (lse == -np.inf).all()
        assert all(not x.any() for x in stats)


# -- what is issued and kept


@pytest.mark.parametrize(("d_major", "target"), [(False, "trn1"), (False, "trn2"), (True, "trn2")])
def test_instructions_per_tile_of_128_keys(d_major: bool, target: str) -> None:
    """All instructions of a further item of two lanes, loads included, over its tiles of 128 keys."""
    q, k = normal(2, 8, 128), np.zeros((2, 2 * 8192, 1, 128), BF16)
    _, (run,) = traced(False, q, k, k, softmax_threshold=0.5, k_d_major=d_major, target=target)
    assert run.item_keys == 8192
    assert run.arguments["records"].shape[3] == 2  # lanes
    counts = [len(step) for step in run.inner_steps()]
    # trn1 transposes into float32: a bank holds half as many tiles, and there are 8 more copies per lane.
    more = 16 if target == "trn1" and not d_major else 0
    assert counts == [INSTRUCTIONS_PER_TILE[d_major] * 128 + more]


@by_layout
def test_memory_of_four_lanes(d_major: bool) -> None:
    """What the docstring says of eight KV heads of eight query heads each."""
    q, k = normal(1, 64, 128), normal(1, 300, 8, 128)
    _, (run,) = traced(False, q, k, k, softmax_threshold=0.5, k_d_major=d_major, max_seqlen_kv=8192)
    use = run.trace.memory[0]
    assert 64 * 1024 < use.sbuf.amount <= 85 * 1024
    assert use.psum.amount <= 8


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: SparseCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()
    monkeypatch.setattr(_sparse_launch, "simulate_kernel", lambda kernel, *args, target: run_on_device(kernel, *args))
    check(case, dtype)
