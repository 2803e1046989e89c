"""Appending to a cache: every row is the old one or the new one, and nothing else changes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reference.append import append_kv, append_kv_paged
from reference.flash_decode import flash_decode, paged_decode

BATCH, ROWS, HEADS, D, S = 3, 8, 2, 4, 2
POSITIONS = np.array([5, -1, 0])


def inputs(dtype: Any = np.float64) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(7)
    shapes = [(BATCH, ROWS, HEADS, D)] * 2 + [(BATCH, S, HEADS, D)] * 2
    k, v, k_new, v_new = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return k, v, k_new, v_new


def test_rows_are_new_or_as_they_were() -> None:
    k, v, k_new, v_new = inputs()
    before = k.copy(), v.copy()
    got = append_kv(k, v, k_new, v_new, POSITIONS)
    for cache, old, new in zip(got, before, (k_new, v_new), strict=True):
        for b, row in np.ndindex(BATCH, ROWS):
            i = row - int(POSITIONS[b])
            written = POSITIONS[b] >= 0 and 0 <= i < S
            np.testing.assert_array_equal(cache[b, row], new[b, i] if written else old[b, row])
    np.testing.assert_array_equal(k, before[0])
    np.testing.assert_array_equal(v, before[1])


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_paged_rows_are_new_or_as_they_were(block_size: int) -> None:
    """Tables that run backwards; with blocks of 2 the first sequence's two rows lie on two pages."""
    _, _, k_new, v_new = inputs()
    per_sequence = ROWS // block_size
    table = np.arange(BATCH * per_sequence)[::-1].reshape(BATCH, per_sequence)
    shape = (BATCH * per_sequence, HEADS, block_size, D)
    k_pages, v_pages = np.zeros(shape), np.ones(shape)
    got = append_kv_paged(k_pages, v_pages, k_new, v_new, table, POSITIONS)
    expected = k_pages.copy(), v_pages.copy()
    for b, first in ((0, 5), (2, 0)):
        for i in range(S):
            page, row = table[b, (first + i) // block_size], (first + i) % block_size
            expected[0][page, :, row], expected[1][page, :, row] = k_new[b, i], v_new[b, i]
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    assert not k_pages.any()
    assert (v_pages == 1.0).all()


def test_inactive_slots_need_no_page_and_no_new_rows() -> None:
    k, v, k_new, v_new = inputs()
    k_new[1] = v_new[1] = np.nan
    assert np.isfinite(append_kv(k, v, k_new, v_new, POSITIONS)).all()
    pages = np.zeros((2, HEADS, ROWS, D))
    table = np.array([[0], [-1], [1]])
    assert np.isfinite(append_kv_paged(pages, pages, k_new, v_new, table, POSITIONS)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_new_rows_take_the_dtype_of_the_cache(dtype: Any) -> None:
    k, v, _, _ = inputs(dtype)
    new = np.full((BATCH, S, HEADS, D), 1.0 + 2.0**-12, np.float32)
    for cache in append_kv(k, v, new, new, POSITIONS):
        assert cache.dtype == dtype
        assert (cache[0, 5:7].astype(np.float64) == 1.0).all()


def test_decode_after_appending_sees_the_new_tokens() -> None:
    """The whole cache at once and its last two rows appended give the same attention, flat and paged."""
    k, v, _, _ = inputs()
    q = np.random.default_rng(8).standard_normal((BATCH, S, 2 * HEADS, D))
    lengths = np.array([7, 8, 2])
    expected = flash_decode(q, k, v, seqlens_kv=lengths)
    k_new, v_new = (np.stack([x[b, n - S : n] for b, n in enumerate(lengths)]) for x in (k, v))
    for b, n in enumerate(lengths):
        k[b, n - S :] = v[b, n - S :] = np.nan
    got = flash_decode(q, *append_kv(k, v, k_new, v_new, lengths - S), seqlens_kv=lengths)
    np.testing.assert_array_equal(got.o, expected.o)
    table = np.array([[4, 1], [0, 3], [5, -1]])
    pages = [np.full((6, HEADS, 4, D), np.nan) for _ in "kv"]
    for b, n in np.argwhere(table >= 0):
        for paged, x in zip(pages, (k, v), strict=True):
            paged[table[b, n]] = x[b, 4 * n : 4 * n + 4].swapaxes(0, 1)
    pages = list(append_kv_paged(*pages, k_new, v_new, table, lengths - S))
    np.testing.assert_array_equal(paged_decode(q, *pages, table, lengths).o, expected.o)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([7, -1, 0], ValueError, "positions: received rows 7 to 8, allowed 0 to 7"),
        ([-2, -1, 0], ValueError, "positions: received .* allowed -1 or a row"),
        ([0, 0], ValueError, r"positions: received shape \(2,\), allowed \(3,\)"),
        ([0.0, 0.0, 0.0], TypeError, "positions: received float64, allowed integers"),
    ],
    ids=["past the end", "below -1", "batch", "floats"],
)
def test_bad_positions_are_refused(positions: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        append_kv(*inputs(), np.array(positions))


def test_bad_shapes_are_refused() -> None:
    k, v, k_new, v_new = inputs()
    with pytest.raises(ValueError, match="k_new: received shape"):
        append_kv(k, v, k_new[..., :3], v_new, POSITIONS)
    with pytest.raises(ValueError, match="v_new: received shape"):
        append_kv(k, v, k_new, v_new[:, :, :1], POSITIONS)
    with pytest.raises(ValueError, match="k and v: received"):
        append_kv(k, v, k_new, v_new[:, :1], POSITIONS)
    with pytest.raises(ValueError, match="k_new: received 3 sequences, allowed the 2 of k"):
        append_kv(k[:2], v[:2], k_new, v_new, POSITIONS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, -1], [-1, -1], [2, 3]], "needed pages 0 to 3 for every row in use"),
        ([[0, 4], [-1, -1], [2, 3]], "needed pages 0 to 3 for every row in use"),
        ([[0, 1], [-1, -1], [1, 3]], "allowed no row of a page written twice"),
    ],
    ids=["no page", "no such page", "one page for two"],
)
def test_bad_tables_are_refused(table: list[list[int]], message: str) -> None:
    _, _, k_new, v_new = inputs()
    pages = np.zeros((4, HEADS, 4, D))
    with pytest.raises(ValueError, match=message):
        append_kv_paged(pages, pages, k_new, v_new, np.array(table), np.array([4, -1, 0]))


def test_a_table_that_is_too_short_is_refused() -> None:
    _, _, k_new, v_new = inputs()
    pages = np.zeros((4, HEADS, 4, D))
    table = np.array([[0, 1], [-1, -1], [2, 3]])
    with pytest.raises(ValueError, match="block_table: received 2 blocks of 4, needed 3"):
        append_kv_paged(pages, pages, k_new, v_new, table, np.array([7, -1, 0]))
