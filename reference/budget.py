"""How far a result may be from its oracle: a bound per row taken from the data, not from habit."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FACTOR = 2.0


class BudgetError(AssertionError):
    """A result is further from the oracle than rounding explains, or is not comparable with it."""


@cache
def epsilon(dtype: Any) -> float:
    """Distance from 1 to the next larger number of a floating-point type."""
    one = np.ones((), np.float64)
    step = 1.0
    while (one + step / 2).astype(dtype).astype(np.float64) > 1.0:
        step /= 2
    return step


def budget(oracle: Array, low_precision: Array, dtype: Any) -> Array:
    """The bound of each row: twice (its largest error in low precision + half a spacing of its largest value).

    A row is the last axis: a head's output is not excused by the errors of a larger one.

    Args:
        oracle: float64 result.
        low_precision: the same computation with the machine's roundings, in several orders of summation
            along a leading axis (`reference.rounded`).
        dtype: type the result is stored in.

    Returns:
        The bounds, of the oracle's shape without its last axis.
    """
    exact = np.asarray(oracle, np.float64)
    low = np.asarray(low_precision)
    if exact.ndim == 0 or low.ndim == 0 or low.shape[1:] != exact.shape or low.shape[0] == 0:
        raise BudgetError(f"low_precision: shape {low.shape}, allowed (n, *{exact.shape}) with n >= 1")
    finite = np.isfinite(exact)
    everywhere = bool(finite.all())
    worst = np.zeros_like(exact)
    for order in low:
        x = order.astype(np.float64)
        if not everywhere and not np.array_equal(exact[~finite], x[~finite]):
            raise BudgetError("low_precision: non-finite values differ from the oracle's")
        with np.errstate(invalid="ignore"):
            np.subtract(x, exact, out=x)
        np.maximum(worst, np.abs(x, out=x), out=worst)
    largest = np.abs(exact)
    if not everywhere:
        worst[~finite] = largest[~finite] = 0.0
    return np.asarray(FACTOR * (worst.max(axis=-1) + epsilon(dtype) / 2 * largest.max(axis=-1)))


def share_of_budget(got: Array, oracle: Array, low_precision: Array, dtype: Any) -> tuple[float, float]:
    """Largest difference between `got` and the oracle, and the largest share that a row uses of its budget.

    Non-finite values of the oracle (an lse of -inf) must be met exactly; anything else that is not
    finite gives an infinite difference, and so does a difference in a row whose budget is zero.

    Raises:
        BudgetError: shapes differ; nothing is broadcast.
    """
    exact = np.asarray(oracle, np.float64)
    result = np.asarray(got).astype(np.float64)
    if result.shape != exact.shape:
        raise BudgetError(f"result: shape {result.shape}, allowed {exact.shape}")
    bounds = budget(oracle, low_precision, dtype)
    finite = np.isfinite(exact)
    if not np.array_equal(np.isfinite(result), finite) or not np.array_equal(result[~finite], exact[~finite]):
        return float("inf"), float("inf")
    rows = np.zeros_like(exact)
    np.subtract(result, exact, out=rows, where=finite)
    np.abs(rows, out=rows)
    differences = rows.max(axis=-1)
    used = differences > 0.0
    shares = np.zeros_like(differences)
    with np.errstate(divide="ignore"):
        np.divide(differences, bounds, out=shares, where=used)
    return float(differences.max()), float(shares.max())


def check_budget(name: str, got: Array, oracle: Array, low_precision: Array, dtype: Any) -> float:
    """The share of the budget used.

    Raises:
        BudgetError: it is above 1 or not a number.
    """
    difference, share = share_of_budget(got, oracle, low_precision, dtype)
    if not share <= 1.0:
        raise BudgetError(f"{name}: difference {difference:.3e} is {share:.2f} of the budget, allowed 1")
    return share
