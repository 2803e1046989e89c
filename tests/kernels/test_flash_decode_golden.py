"""flash_decode against the dense results of public Triton kernels, with the tolerance of the oracle's own test.

Kernels and golden data round alike (probabilities and output in float16), so that the golden outputs and ours both lie
within half the budget of the oracle in `tests/reference/test_golden_fsa_decode.py`; here they are compared with each
other as well, and differ by at most the sum.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contributed.flash_decode import flash_decode
from reference.budget import BudgetError, budget, check_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded

GOLDEN = Path(__file__).parents[1] / "golden" / "fsa_decode.npz"
# Per problem: tokens of each sequence in the packed cache, how many of them are in use, and the splits of the result
# without a number of splits in its name.
PROBLEMS: dict[str, tuple[list[int], list[int], int]] = {
    "a": ([300, 100], [293, 93], 1),
    "b": ([2048], [2041], 16),
    "c": ([128, 42, 65], [121, 35, 58], 1),
}
by_problem = pytest.mark.parametrize("problem", PROBLEMS)


def load(problem: str, *names: str) -> Any:
    with np.load(GOLDEN) as data:
        return [data[f"{problem}.{name}"] for name in names]


@cache
def dense(problem: str) -> tuple[Any, Any]:
    """The oracle's result of a problem's whole cache, and in the machine's precision."""
    return references(*load(problem, "q", "k", "v"))


def references(q: Any, k: Any, v: Any, **lengths: Any) -> tuple[Any, Any]:
    return oracle(q, k, v, **lengths), flash_decode_rounded(q, k, v, **lengths)


def check(got: tuple[Any, Any], golden: tuple[Any, Any], exact: Any, low: Any) -> None:
    """Kernel and golden data within their budgets of the oracle, and within both of each other."""
    for o, lse in (got, golden):
        assert check_budget("o", o, exact.o, low[0], np.float16) <= 0.5
        check_budget("lse", lse, exact.lse, low[1], np.float32)
    apart = np.abs(got[0].astype(np.float64) - golden[0].astype(np.float64)).max(axis=-1)
    assert (apart <= budget(exact.o, low[0], np.float16)).all()
    assert (np.abs(got[1] - golden[1]).max(axis=-1) <= 2 * budget(exact.lse, low[1], np.float32)).all()


def run(q: Any, k: Any, v: Any, target: str, **how: Any) -> tuple[Any, Any]:
    o, lse = flash_decode(q, k, v, return_lse=True, target=target, **how)
    assert o.dtype == np.float16
    assert lse.dtype == np.float32
    return o, lse


@by_problem
@pytest.mark.parametrize("variant", ["dense", "splits1.dense", "splits3.dense"])
@pytest.mark.parametrize("k_d_major", [False, True])
def test_dense(problem: str, variant: str, k_d_major: bool) -> None:
    q, k, v, *golden = load(problem, "q", "k", "v", f"{variant}.o", f"{variant}.lse")
    n_splits = {"dense": PROBLEMS[problem][2], "splits1.dense": 1, "splits3.dense": 3}[variant]
    check(run(q, k, v, "trn2", n_splits=n_splits, k_d_major=k_d_major), tuple(golden), *dense(problem))


@by_problem
@pytest.mark.parametrize("variant", ["varlen_dense", "varlen_dense_used"])
def test_packed(problem: str, variant: str) -> None:
    q, k, v, *golden = load(problem, "q", "k", "v", f"{variant}.o", f"{variant}.lse")
    tokens, used, _ = PROBLEMS[problem]
    lengths: dict[str, Any] = {"cu_seqlens_kv": np.concatenate([[0], np.cumsum(tokens)])}
    if variant == "varlen_dense_used":
        lengths["seqlens_kv"] = np.array(used)
    k, v = (np.concatenate([x[b, :n] for b, n in enumerate(tokens)]) for x in (k, v))
    check(run(q, k, v, "trn2", **lengths), tuple(golden), *references(q, k, v, **lengths))


@pytest.mark.parametrize("target", ["trn1", "trn3"])
def test_other_targets(target: str) -> None:
    q, k, v, *golden = load("a", "q", "k", "v", "splits3.dense.o", "splits3.dense.lse")
    check(run(q, k, v, target, n_splits=3), tuple(golden), *dense("a"))


@by_problem
def test_one_key_less_is_noticed(problem: str) -> None:
    """The tolerance is small enough to see a length that is off by one."""
    q, k, v, *golden = load(problem, "q", "k", "v", "dense.o", "dense.lse")
    short = run(q, k, v, "trn2", seqlens_kv=np.full(len(q), k.shape[1] - 1))
    with pytest.raises(BudgetError):
        check(short, tuple(golden), *dense(problem))
