"""The dense results of public Triton kernels: single launches, splits, and packed caches with and without lengths.

Their roundings are the ones `reference.rounded` describes (probabilities and output in float16, sums in
float32), so the budget made from it is the tolerance. In two-byte types a result that rounds where it says
stays below half of it, as the kernels of this project have to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.budget import BudgetError, check_budget
from reference.flash_decode import combine_splits, flash_decode, split_decode
from reference.rounded import flash_decode_rounded

GOLDEN = Path(__file__).parents[1] / "golden" / "fsa_decode.npz"
# Per problem: tokens of each sequence in the packed cache, how many of them are in use, keys per tile of the
# kernel, and the splits of the result without a number of splits in its name.
PROBLEMS: dict[str, tuple[list[int], list[int], int, int]] = {
    "a": ([300, 100], [293, 93], 256, 1),
    "b": ([2048], [2041], 128, 16),
    "c": ([128, 42, 65], [121, 35, 58], 256, 1),
}
by_problem = pytest.mark.parametrize("problem", PROBLEMS)


def inputs(problem: str) -> tuple[Any, Any, Any]:
    with np.load(GOLDEN) as data:
        q, k, v = (data[f"{problem}.{name}"] for name in "qkv")
    return q, k, v


def golden(problem: str, variant: str) -> tuple[Any, Any]:
    with np.load(GOLDEN) as data:
        return data[f"{problem}.{variant}.o"], data[f"{problem}.{variant}.lse"]


def check(result: tuple[Any, Any], exact: tuple[Any, Any], low: tuple[Any, Any]) -> None:
    assert check_budget("o", result[0], exact[0], low[0], np.float16) <= 0.5
    check_budget("lse", result[1], exact[1], low[1], np.float32)


@by_problem
@pytest.mark.parametrize("variant", ["dense", "splits1.dense", "splits3.dense"])
def test_dense(problem: str, variant: str) -> None:
    q, k, v = inputs(problem)
    check(golden(problem, variant), flash_decode(q, k, v), flash_decode_rounded(q, k, v))


@by_problem
@pytest.mark.parametrize("variant", ["dense", "splits1.dense", "splits3.dense"])
def test_splits(problem: str, variant: str) -> None:
    q, k, v = inputs(problem)
    _, _, tile_kv, by_default = PROBLEMS[problem]
    n_splits = {"dense": by_default, "splits1.dense": 1, "splits3.dense": 3}[variant]
    parts = split_decode(q, k, v, n_splits=n_splits, tile_kv=tile_kv)
    check(golden(problem, variant), combine_splits(*parts), flash_decode_rounded(q, k, v))


@by_problem
@pytest.mark.parametrize("variant", ["varlen_dense", "varlen_dense_used"])
def test_packed(problem: str, variant: str) -> None:
    q, k, v = inputs(problem)
    tokens, used, _, _ = PROBLEMS[problem]
    lengths: dict[str, Any] = {"cu_seqlens_kv": np.concatenate([[0], np.cumsum(tokens)])}
    if variant == "varlen_dense_used":
        lengths["seqlens_kv"] = np.array(used)
    k, v = (np.concatenate([x[b, :n] for b, n in enumerate(tokens)]) for x in (k, v))
    exact, low = flash_decode(q, k, v, **lengths), flash_decode_rounded(q, k, v, **lengths)
    check(golden(problem, variant), exact, low)


@by_problem
def test_one_key_less_is_noticed(problem: str) -> None:
    """The tolerance is small enough to see a length that is off by one."""
    q, k, v = inputs(problem)
    short = np.full(len(q), k.shape[1] - 1)
    with pytest.raises(BudgetError):
        check(
            golden(problem, "dense"),
            flash_decode(q, k, v, seqlens_kv=short),
            flash_decode_rounded(q, k, v, seqlens_kv=short),
        )
