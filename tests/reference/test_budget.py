"""The error budget: what it accepts, what it must never accept."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from reference.budget import BudgetError, budget, check_budget, epsilon, share_of_budget
from reference.decode import gqa_decode_attention
from reference.rounded import gqa_decode_attention_rounded, n_orders

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_epsilon_is_the_spacing_above_one(dtype: type) -> None:
    assert epsilon(dtype) == float(ml_dtypes.finfo(dtype).eps)


def test_budget_is_twice_error_plus_half_a_spacing() -> None:
    exact = np.array([1.0, -4.0])
    low = np.array([[1.0, -4.0], [1.25, -4.0]])
    assert budget(exact, low, np.float16) == 2 * (0.25 + 2.0**-11 * 4.0)


def test_every_row_has_its_own_budget() -> None:
    exact = np.array([[1000.0, 0.0], [1.0, 0.0]])
    low = exact[None] + np.array([[[1.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(budget(exact, low, np.float32), [2 * (1.0 + 2.0**-24 * 1000), 2 * 2.0**-24])
    assert check_budget("o", exact + np.array([[1.0, 0.0], [0.0, 0.0]]), exact, low, np.float32) < 0.6
    with pytest.raises(BudgetError):
        check_budget("o", exact + np.array([[0.0, 0.0], [1e-3, 0.0]]), exact, low, np.float32)


def test_nan_and_infinity_never_pass() -> None:
    exact, low = np.ones(3), np.ones((1, 3))
    for bad in (np.nan, np.inf, -np.inf):
        got = np.array([1.0, bad, 1.0])
        assert share_of_budget(got, exact, low, np.float32) == (np.inf, np.inf)
        with pytest.raises(BudgetError, match="o: difference inf"):
            check_budget("o", got, exact, low, np.float32)


def test_minus_infinity_must_be_met_exactly() -> None:
    exact = np.array([-np.inf, 2.0])
    low = exact[None]
    assert check_budget("lse", exact, exact, low, np.float32) == 0.0
    with pytest.raises(BudgetError):
        check_budget("lse", np.array([-1e30, 2.0]), exact, low, np.float32)
    with pytest.raises(BudgetError):
        check_budget("lse", np.array([-np.inf, -np.inf]), exact, low, np.float32)
    with pytest.raises(BudgetError):
        check_budget("lse", np.array([-np.inf, np.nan]), np.full(2, -np.inf), np.full((1, 2), -np.inf), np.float32)


def test_nothing_is_broadcast() -> None:
    with pytest.raises(BudgetError, match=r"result: shape \(1,\), allowed \(3,\)"):
        check_budget("o", np.ones(1), np.ones(3), np.ones((1, 3)), np.float32)
    with pytest.raises(BudgetError, match="low_precision: shape"):
        check_budget("o", np.ones(3), np.ones(3), np.ones(3), np.float32)


def test_zero_budget_takes_only_equality() -> None:
    zero = np.zeros(2)
    assert check_budget("o", zero, zero, zero[None], np.float32) == 0.0
    with pytest.raises(BudgetError):
        check_budget("o", np.array([0.0, 1e-30]), zero, zero[None], np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["dropped tile", "wrong KV head"])
def test_a_broken_kernel_is_over_budget(dtype: type, fault: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((8, 64), (4096, 2, 64), (4096, 2, 64)))
    exact, low = gqa_decode_attention(q, k, v), gqa_decode_attention_rounded(q, k, v)
    broken = (k[:-128], v[:-128]) if fault == "dropped tile" else (k[:, ::-1], v[:, ::-1])
    got = gqa_decode_attention(q, *broken).o.astype(dtype)
    with pytest.raises(BudgetError):
        check_budget("o", got, exact.o, low[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_computation_is_near_the_oracle(dtype: type) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((4, 32), (300, 2, 32), (300, 2, 32)))
    exact, (o, lse) = gqa_decode_attention(q, k, v), gqa_decode_attention_rounded(q, k, v)
    assert o.dtype == dtype
    assert o.shape == (n_orders(q), 4, 32)
    assert np.abs(o.astype(np.float64) - exact.o).max() < 4 * epsilon(dtype) * np.abs(exact.o).max() + 1e-6
    assert np.abs(lse - exact.lse).max() < 1e-5


def test_rounded_computation_of_an_empty_cache() -> None:
    o, lse = gqa_decode_attention_rounded(np.ones((2, 8), np.float32), np.ones((0, 1, 8)), np.ones((0, 1, 8)))
    assert not o.any()
    assert np.isneginf(lse).all()
