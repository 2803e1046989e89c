"""sparse_decode and gated_decode against the results of public Triton kernels, with the tolerance of the oracles.

Golden outputs and ours both lie within half the budget of the oracle (`tests/reference/test_golden_sparse.py` says
why), so they differ by at most one budget; as many tiles are left out as by the public kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from contributed.sparse_decode import gated_decode, sparse_decode
from reference.budget import budget, check_budget
from tests.kernels.sparse import ORACLE, TWIN, check_stats
from tests.reference.test_golden_sparse import (
    GATED,
    PROBLEMS,
    SKIPPED,
    SPARSE,
    arrays_of,
    golden,
    options_of,
)

RESULTS: dict[tuple[Any, ...], Any] = {}
# Where nothing is left out, a smaller threshold leaves out nothing either: of results that differ in thresholds alone
# the largest ones are enough. `tests/reference/test_golden_sparse.py` has the oracles against all.
LARGEST = [
    "sparse_0.5", "sparse_default", "varlen_sparse_0.1", "splits1.sparse_0.5", "splits3.sparse_0.5",
    *(f"gated_ls{x}_{y}" for x in (1, 0) for y in ("s0.1_g1e-09", "s1e-09_g0.5")),
    *(f"splits{n}.gated_ls1_s0.1_g0.5" for n in (1, 3)),
]  # fmt: skip
CALLS = [
    (problem, variant)
    for problem in PROBLEMS
    for variant in SPARSE + GATED
    if variant in LARGEST or any(name.startswith(f"{problem}.") for name in SKIPPED)
]


def operands(problem: str, variant: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """q, k, v, with gates alpha and delta, and the options of a result."""
    arrays, options = arrays_of(problem), options_of(problem, variant)
    if "gated" in variant:
        return tuple(arrays.values()), options
    q, k, v = (arrays[x] for x in "qkv")
    if variant.startswith("varlen"):
        tokens = PROBLEMS[problem][0]
        k, v = (np.concatenate([x[b, :n] for b, n in enumerate(tokens)]) for x in (k, v))
        options["cu_seqlens_kv"] = np.cumsum([0, *tokens])
    return (q, k, v), options


@cache
def references(problem: str, variant: str) -> tuple[Any, Any]:
    """The oracle's, and in the machine's precision."""
    arrays, options = operands(problem, variant)
    gated = "gated" in variant
    return ORACLE[gated](*arrays, **options), TWIN[gated](*arrays, **options)


def check(problem: str, variant: str, got: tuple[Any, Any]) -> None:
    """Within half of the budget of the oracle, like the golden result, and within one of that."""
    exact, low = references(problem, variant)
    theirs = [golden("fsa_decode.npz", f"{problem}.{variant}.{x}") for x in ("o", "lse")]
    for o, lse in (got, theirs):
        assert o.dtype == np.float16
        assert lse.dtype == np.float32
        assert check_budget("o", o, exact.o, low[0], np.float16) <= 0.5
        check_budget("lse", lse, exact.lse, low[1], np.float32)
    apart = np.abs(got[0].astype(np.float64) - theirs[0].astype(np.float64)).max(axis=-1)
    assert (apart <= budget(exact.o, low[0], np.float16)).all()
    assert (np.abs(got[1] - theirs[1]).max(axis=-1) <= 2 * budget(exact.lse, low[1], np.float32)).all()


def run(problem: str, variant: str, target: str = "trn2", **how: Any) -> None:
    arrays, options = operands(problem, variant)
    decode = gated_decode if "gated" in variant else sparse_decode
    # Results of one split and those without a number of splits may be the same call.
    key = (problem, decode, target, repr((options, how)))
    if key not in RESULTS:
        RESULTS[key] = decode(*arrays, **options, **how, return_lse=True, return_stats=True, target=target)
    o, lse, stats = RESULTS[key]
    check(problem, variant, (o, lse))
    total = int(stats.tiles_total.sum())
    assert (stats.tiles_skipped.sum(), total) == SKIPPED.get(f"{problem}.{variant}", (0, total))
    tokens = PROBLEMS[problem][0]
    lengths = tokens if variant.startswith("varlen") else [arrays[1].shape[1]] * len(tokens)
    check_stats(stats, references(problem, variant)[0], lengths, None, options["tile_kv"], arrays[0])


@pytest.mark.parametrize(("problem", "variant"), CALLS)
def test_every_result(problem: str, variant: str) -> None:
    run(problem, variant)


@pytest.mark.parametrize("variant", ["splits3.sparse_0.5", "splits3.gated_ls1_s0.1_g0.5"])
@pytest.mark.parametrize("target", ["trn1", "trn3"])
def test_other_targets(target: str, variant: str) -> None:
    run("b", variant, target)


@pytest.mark.parametrize("variant", ["splits1.sparse_0.1", "splits3.sparse_0.5"])
@pytest.mark.parametrize("how", [{"k_d_major": True}, {"n_cores": 2}], ids=["d-major", "two cores"])
def test_other_launches(how: dict[str, Any], variant: str) -> None:
    run("b", variant, **how)


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("splits1.sparse_0.1", {"n_splits": 2}),
        ("splits1.sparse_0.1", {"tile_kv": 64}),
        ("splits1.sparse_0.1", {"softmax_threshold": 0.0}),
        ("splits3.sparse_0.5", {"softmax_threshold": 0.1}),
        ("splits3.gated_ls1_s0.1_g0.5", {"softmax_threshold": 0.0}),
        ("splits3.gated_ls1_s0.1_g0.5", {"fast_logsigmoid": False}),
        ("splits3.gated_ls1_s0.1_g0.5", {"is_logsigmoid_gate": False}),
    ],
)
def test_another_rule_is_noticed(variant: str, changed: dict[str, Any]) -> None:
    """The tolerance is small enough to see other tiles, other thresholds and another gate."""
    arrays, options = operands("b", variant)
    decode = gated_decode if "gated" in variant else sparse_decode
    got = decode(*arrays, **options | changed, return_lse=True, target="trn2")
    with pytest.raises(AssertionError):  # BudgetError, or above half of the budget
        check("b", variant, got)
