"""Packed and paged caches against flat ones, and splits against the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reference.decode import Attention
from reference.flash_decode import combine_splits, flash_decode, paged_decode, split_decode

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH, Q_HEADS, KV_HEADS, D, ROWS = 3, 4, 2, 6, 37
LENGTHS = np.array([37, 0, 18])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
OPTIONS: dict[str, Any] = {"window_size": (20, None), "softcap": 3.0, "alibi_slopes": SLOPES, "v_scale": 2.0}


def inputs(s: int = 2) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(5)
    shapes = ((BATCH, s, Q_HEADS, D), (BATCH, ROWS, KV_HEADS, D), (BATCH, ROWS, KV_HEADS, D))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v


def assert_same(got: Attention, expected: Attention) -> None:
    np.testing.assert_array_equal(got.o, expected.o)
    np.testing.assert_array_equal(got.lse, expected.lse)


def paged(x: Any, block_size: int, seed: int) -> tuple[Any, Any]:
    """The rows in use on pages in a random order, everything else NaN, and the table that finds them, row by row."""
    owners = [(b, n) for b in range(BATCH) for n in range(-(-int(LENGTHS[b]) // block_size))]
    pages = np.full((len(owners) + 2, KV_HEADS, block_size, D), np.nan)
    table = np.full((BATCH, ROWS // block_size + 3), -1, np.int32)
    for (b, n), block in zip(owners, np.random.default_rng(seed).permutation(len(pages)), strict=False):
        table[b, n] = block
        for row in range(min(block_size, int(LENGTHS[b]) - n * block_size)):
            pages[block, :, row] = x[b, n * block_size + row]
    return pages, table


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("gaps", [False, True], ids=["end to end", "gaps"])
def test_packed_equals_flat(options: dict[str, Any], gaps: bool) -> None:
    q, k, v = inputs()
    room = LENGTHS + (np.array([2, 1, 3]) if gaps else 0)
    cu = np.concatenate([[0], np.cumsum(room)])
    packed = [np.full((cu[-1], KV_HEADS, D), np.nan) for _ in "kv"]
    for b, n in enumerate(LENGTHS):
        for whole, x in zip(packed, (k, v), strict=True):
            whole[cu[b] : cu[b] + n] = x[b, :n]
    used = LENGTHS if gaps else None
    got = flash_decode(q, *packed, cu_seqlens_kv=cu, seqlens_kv=used, **options)
    assert_same(got, flash_decode(q, k, v, seqlens_kv=LENGTHS, **options))


@pytest.mark.parametrize("cu", [[-1, 3, 5], [0, 4, 3], [0, 3, 6]], ids=["negative", "descending", "too long"])
def test_bad_offsets_are_refused(cu: list[int]) -> None:
    packed = np.zeros((5, KV_HEADS, D))
    with pytest.raises(ValueError, match=r"cu_seqlens_kv: received .* allowed to ascend from 0 to 5"):
        flash_decode(np.zeros((2, Q_HEADS, D)), packed, packed, cu_seqlens_kv=np.array(cu))


@pytest.mark.parametrize("options", [{}, {**OPTIONS, "sinks": SLOPES}], ids=["plain", "options"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_paged_equals_flat_wherever_the_pages_are(options: dict[str, Any], block_size: int, seed: int) -> None:
    q, k, v = inputs()
    (k_pages, table), (v_pages, _) = (paged(x, block_size, seed) for x in (k, v))
    got = paged_decode(q, k_pages, v_pages, table, LENGTHS, **options)
    assert np.isfinite(got.o).all()
    assert_same(got, flash_decode(q, k, v, seqlens_kv=LENGTHS, **options))


def test_pages_may_be_shared() -> None:
    """Two sequences with the same first page: a common prefix."""
    q, k, v = inputs()
    k[2, :16], v[2, :16] = k[0, :16], v[0, :16]
    (k_pages, table), (v_pages, _) = (paged(x, 16, 0) for x in (k, v))
    k_pages[table[2, 0]] = v_pages[table[2, 0]] = np.nan
    table[2, 0] = table[0, 0]
    assert_same(paged_decode(q, k_pages, v_pages, table, LENGTHS), flash_decode(q, k, v, seqlens_kv=LENGTHS))


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        ([[0, -1], [1, 2]], [5, 8], "block_table: received .* needed pages 0 to 2"),
        ([[0, 3], [1, 2]], [5, 8], "block_table: received .* needed pages 0 to 2"),
        ([[0, 1], [1, 2]], [9, 8], "block_table: received 2 blocks of 4, needed 3"),
        ([[0, 1], [1, 2]], [-1, 8], "seqlens_kv: received -1"),
        ([[0, 1]], [1, 8], r"seqlens_kv: received shape \(2,\), allowed \(1,\)"),
    ],
    ids=["hole", "no such page", "too long", "negative", "batch"],
)
def test_bad_tables_are_refused(table: list[list[int]], lengths: list[int], message: str) -> None:
    pages = np.zeros((3, KV_HEADS, 4, D))
    with pytest.raises(ValueError, match=message):
        paged_decode(np.zeros((2, Q_HEADS, D)), pages, pages, np.array(table), np.array(lengths))


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("tile_kv", [1, 8, 64])
@pytest.mark.parametrize("n_splits", [1, 2, 3, 5, 40])
def test_combined_splits_equal_the_whole_in_any_order(n_splits: int, tile_kv: int, options: dict[str, Any]) -> None:
    q, k, v = inputs()
    whole = flash_decode(q, k, v, seqlens_kv=LENGTHS, **options)
    parts = split_decode(q, k, v, n_splits=n_splits, tile_kv=tile_kv, seqlens_kv=LENGTHS, **options)
    assert parts.o.shape == (n_splits, *q.shape)
    assert parts.lse.shape == (n_splits, *q.shape[:-1])
    for order in (range(n_splits), np.random.default_rng(n_splits).permutation(n_splits)):
        got = combine_splits(parts.o[order], parts.lse[order])
        np.testing.assert_allclose(got.o, whole.o, **CLOSE)
        np.testing.assert_allclose(got.lse, whole.lse, **CLOSE)


@pytest.mark.parametrize(
    ("n_splits", "seen"),
    [
        (1, [range(0, 10)]),
        (2, [range(0, 6), range(6, 10)]),
        (3, [range(0, 6), range(6, 10), range(0)]),
        (4, [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]),
        (5, [range(0, 3), range(3, 6), range(6, 9), range(9, 10), range(0)]),
    ],
    ids=str,
)
def test_a_split_is_a_run_of_tiles(n_splits: int, seen: list[range]) -> None:
    """Ten keys are four tiles of three: values are unit vectors and all scores equal, so o says who saw which key."""
    q, k, v = np.zeros((1, 1, 12)), np.zeros((1, 12, 1, 12)), np.eye(12)[None, :, None]
    parts = split_decode(q, k, v, n_splits=n_splits, tile_kv=3, seqlens_kv=np.array([10]))
    for i, keys in enumerate(seen):
        expected = [1 / len(keys) if j in keys else 0.0 for j in range(12)]
        np.testing.assert_allclose(parts.o[i, 0, 0], expected, **CLOSE)
        assert parts.lse[i, 0, 0] == pytest.approx(math.log(len(keys)) if keys else -math.inf)


def test_tiles_are_counted_from_the_first_key_and_not_from_the_window() -> None:
    q, k, v = np.zeros((1, 1, 12)), np.zeros((1, 12, 1, 12)), np.eye(12)[None, :, None]
    parts = split_decode(q, k, v, n_splits=3, tile_kv=4, window_size=(4, None))
    seen: list[set[int]] = [set(), {7}, {8, 9, 10, 11}]
    assert [set(np.flatnonzero(o[0, 0]).tolist()) for o in parts.o] == seen


def test_combining_by_hand() -> None:
    """Weights 1, 3 and 0: lse log(1), log(3) and nothing."""
    o = np.array([[[8.0, 0.0]], [[4.0, 1.0]], [[0.0, 0.0]]])
    lse = np.array([[0.0], [math.log(3)], [-np.inf]])
    got = combine_splits(o, lse)
    np.testing.assert_allclose(got.o, [[5.0, 0.75]], **CLOSE)
    np.testing.assert_allclose(got.lse, [math.log(4)], **CLOSE)


def test_combining_nothing() -> None:
    with np.errstate(all="raise"):
        got = combine_splits(np.zeros((3, 2, 5)), np.full((3, 2), -np.inf))
    np.testing.assert_array_equal(got.o, np.zeros((2, 5)))
    np.testing.assert_array_equal(got.lse, np.full(2, -np.inf))


def test_a_sink_is_one_more_split() -> None:
    q, k, v = inputs()
    sinks = np.array([0.5, -1.0, 2.0, 0.0])
    parts = split_decode(q, k, v, n_splits=2, tile_kv=8)
    o = np.concatenate([parts.o, np.zeros((1, *q.shape))])
    lse = np.concatenate([parts.lse, np.broadcast_to(sinks, (1, *q.shape[:-1]))])
    got, expected = combine_splits(o, lse), flash_decode(q, k, v, sinks=sinks)
    np.testing.assert_allclose(got.o, expected.o, **CLOSE)
    np.testing.assert_allclose(got.lse, expected.lse, **CLOSE)


def test_bad_splits_are_refused() -> None:
    q, k, v = inputs()
    for bad in ({"n_splits": 0, "tile_kv": 8}, {"n_splits": 1, "tile_kv": 0}):
        with pytest.raises(ValueError, match="n_splits, tile_kv: received"):
            split_decode(q, k, v, **bad)
    with pytest.raises(TypeError, match="sinks"):
        split_decode(q, k, v, n_splits=1, tile_kv=8, sinks=SLOPES)
    with pytest.raises(ValueError, match=r"lse: received shape \(2,\), allowed \(2, 3\)"):
        combine_splits(np.zeros((2, 3, 4)), np.zeros(2))
