"""The kernel that joins KV splits, against its oracle in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contributed._nki import nl, simulate_kernel
from contributed.flash_decode import combine_splits
from reference.flash_decode import combine_splits as oracle

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def parts(n_splits: int, rows: int, d: int, spread: float, empty: float, seed: int = 0) -> tuple[Array, Array]:
    """Partial results as the decode kernel leaves them: o is 0 where lse is -inf."""
    rng = np.random.default_rng(seed)
    o = rng.standard_normal((n_splits, rows, d)).astype(np.float32)
    lse = (rng.uniform(-0.5, 0.5, (n_splits, rows)) * spread).astype(np.float32)
    gone = rng.random((n_splits, rows)) < empty
    o[gone], lse[gone] = 0.0, -np.inf
    return o, lse


def run(o: Array, lse: Array, dtype: str = "float32", sinks: Any = None, target: str = "trn2") -> tuple[Array, Array]:
    joined, total = simulate_kernel(combine_splits, o, lse, getattr(nl, dtype), sinks, target=target)
    rows, d = o.shape[1:]
    assert joined.shape == (rows, d)
    assert total.size == rows
    assert joined.dtype == np.dtype(DTYPES[dtype])
    assert total.dtype == np.float32
    return joined, total.reshape(rows)


def check(got: tuple[Array, Array], o: Array, lse: Array, dtype: str = "float32", sinks: Any = None) -> None:
    """Bounds from the roundings there are, for n splits.

    The weights exp(lse - top) and 1 / sum: the difference is rounded once, relative to itself, of which only about 104
    matter before the exponential is 0 in float32; the exponential, the sums and products take an epsilon each. Nothing
    else is rounded but the result.
    """
    exact = oracle(o, lse)
    if sinks is not None:
        sink = np.concatenate([lse, sinks[None].astype(np.float32)])
        exact = oracle(np.concatenate([o, np.zeros_like(o[:1])]), sink)
    n, eps = len(o) + 1, EPSILON["float32"]
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isfinite(lse), exact.lse - lse, np.inf)
    relevant = np.where(gap < 104, gap, 0.0).max(axis=0)
    weights = (2 * n + 6 + np.maximum(relevant, 1.0)) * eps
    size = np.abs(o).max(axis=(0, 2))
    bound = weights * size + EPSILON[dtype] * np.abs(exact.o).max(axis=-1)
    difference = np.abs(got[0].astype(np.float64) - exact.o).max(axis=-1)
    assert (difference <= bound).all(), (difference / bound).max()
    finite = np.isfinite(exact.lse)
    np.testing.assert_array_equal(got[1][~finite], exact.lse[~finite])
    allowed = weights[finite] + eps * np.abs(exact.lse[finite])
    assert (np.abs(got[1][finite] - exact.lse[finite]) <= allowed).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([1, 8, 64, 130]),
    st.sampled_from([1.0, 20.0, 1e4]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["trn1", "trn2", "trn3"]),
)
@example(9, 300, 256, 1e4, 0.3, "float32", "trn2")
@example(64, 3, 8, 1.0, 0.3, "float32", "trn2")
def test_matches_the_oracle(
    n_splits: int, rows: int, d: int, spread: float, empty: float, dtype: str, target: str
) -> None:
    o, lse = parts(n_splits, rows, d, spread, empty)
    check(run(o, lse, dtype, target=target), o, lse, dtype)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 256, 300])
def test_one_split_is_copied(rows: int) -> None:
    o, lse = parts(1, rows, 16, 30.0, 0.3)
    joined, total = run(o, lse)
    np.testing.assert_array_equal(joined, o[0])
    np.testing.assert_array_equal(total, lse[0])


@pytest.mark.parametrize("n_splits", [1, 2, 9])
def test_nothing_visible_in_any_split(n_splits: int) -> None:
    o, lse = np.zeros((n_splits, 130, 8), np.float32), np.full((n_splits, 130), -np.inf, np.float32)
    joined, total = run(o, lse)
    np.testing.assert_array_equal(joined, 0.0)
    np.testing.assert_array_equal(total, -np.inf)


def test_an_empty_split_changes_no_bit() -> None:
    o, lse = parts(3, 200, 16, 10.0, 0.0)
    gap_o = np.insert(o, 1, 0.0, axis=0)
    gap_lse = np.insert(lse, 1, -np.inf, axis=0)
    for x, y in zip(run(gap_o, gap_lse), run(o, lse), strict=True):
        np.testing.assert_array_equal(x, y)


def test_equal_splits_are_averaged() -> None:
    """Two of equal weight: the mean, and log 2 more."""
    o = np.stack([np.full((3, 4), 1.0), np.full((3, 4), 4.0)]).astype(np.float32)
    joined, total = run(o, np.full((2, 3), 5.0, np.float32))
    np.testing.assert_array_equal(joined, 2.5)
    np.testing.assert_allclose(total, 5.0 + np.log(2.0), rtol=1e-7)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.permutations(range(7)), st.sampled_from([1.0, 1e4]))
def test_order_of_splits(order: list[int], spread: float) -> None:
    o, lse = parts(7, 140, 16, spread, 0.2)
    got = run(o[order].copy(), lse[order].copy())
    check(got, o, lse)


@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("n_splits", [1, 2, 5])
def test_sinks_count_once(n_splits: int, spread: float) -> None:
    """A sink joins the sum as one more split without a value, and stands alone where all splits are empty."""
    o, lse = parts(n_splits, 140, 16, spread, 0.3)
    lse[:, 7], o[:, 7] = -np.inf, 0.0
    sinks = (np.random.default_rng(1).uniform(-0.5, 0.5, 140) * spread).astype(np.float32)
    got = run(o, lse, sinks=sinks)
    check(got, o, lse, sinks=sinks)
    np.testing.assert_array_equal(got[0][7], 0.0)
    assert got[1][7] == sinks[7]


def test_a_large_spread_keeps_the_largest_alone() -> None:
    """Weights of exp(-1e4) are 0, not NaN, whichever split is the largest."""
    o, _ = parts(3, 2, 8, 1.0, 0.0)
    lse = np.array([[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]], np.float32)
    joined, total = run(o, lse)
    np.testing.assert_array_equal(joined, np.stack([o[0, 0], o[2, 1]]))
    np.testing.assert_array_equal(total, [1e4, 1e4])
