"""The sparse, gated and skip-softmax results of public Triton kernels, with their tiles and splits.

The tolerance is that of `test_golden_fsa_decode`: the budget made from the kernels' roundings, of which a two-byte
output uses less than half. Decisions are exact: the count of skipped tiles where the kernel gives it, and elsewhere by
the output, which one tile more or less moves out of its budget.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.budget import BudgetError, check_budget
from reference.flash_decode import flash_decode
from reference.rounded_sparse import gated_decode_rounded, skip_softmax_decode_rounded, sparse_decode_rounded
from reference.skip_softmax import skip_softmax_decode
from reference.sparse_decode import SparseDecode, gated_decode, sparse_decode

GOLDEN = Path(__file__).parents[1] / "golden"
# Per problem: tokens of each sequence in the packed cache, keys per tile of the kernel, and the splits of results
# without a number of splits in their name.
PROBLEMS: dict[str, tuple[list[int], int, int]] = {
    "a": ([300, 100], 256, 1),
    "b": ([2048], 128, 16),
    "c": ([128, 42, 65], 256, 1),
}
by_problem = pytest.mark.parametrize("problem", PROBLEMS)
SPARSE = ["sparse_1e-06", "sparse_0.01", "sparse_0.1", "sparse_0.5", "sparse_default", "varlen_sparse_0.1"]
SPARSE += [f"splits{n}.sparse_{x}" for n in (1, 3) for x in (0.01, 0.1, 0.5)]
GATED = [f"gated_ls{x}_{y}" for x in (1, 0) for y in ("s1e-09_g1e-09", "s0.1_g1e-09", "s1e-09_g0.5")]
GATED += [f"splits{n}.gated_ls1_{x}" for n in (1, 3) for x in ("s0.1_g1e-09", "s1e-09_g0.5", "s0.1_g0.5")]
# Results in which a tile is missing, and how many of how many. Elsewhere everything is kept.
SKIPPED = {
    "b.splits1.sparse_0.01": (14, 16),
    "b.splits1.sparse_0.1": (14, 16),
    "b.splits1.sparse_0.5": (14, 16),
    "b.splits3.sparse_0.01": (3, 16),
    "b.splits3.sparse_0.1": (3, 16),
    "b.splits3.sparse_0.5": (6, 16),
    "b.splits1.gated_ls1_s0.1_g1e-09": (14, 16),
    "b.splits1.gated_ls1_s0.1_g0.5": (14, 16),
    "b.splits3.gated_ls1_s0.1_g1e-09": (3, 16),
    "b.splits3.gated_ls1_s0.1_g0.5": (3, 16),
}
SKIP = {"noncausal_dense": 0, "skip_0.5_measured": 77, "skip_0.1_measured": 72, "skip_0.01_measured": 61}


@cache
def arrays_of(problem: str) -> dict[str, Any]:
    """Not to be changed."""
    with np.load(GOLDEN / "fsa_decode.npz") as data:
        return {name: data[f"{problem}.{name}"] for name in ("q", "k", "v", "alpha", "delta")}


@cache
def golden(file: str, variant: str) -> Any:
    """Not to be changed."""
    with np.load(GOLDEN / file) as data:
        return data[variant]


def options_of(problem: str, variant: str) -> dict[str, Any]:
    """The arguments of a result, from its name."""
    _, tile_kv, n_splits = PROBLEMS[problem]
    *prefix, rule = variant.split(".", 1) if variant.startswith("splits") else ["", variant]
    if prefix[0]:
        n_splits = int(prefix[0].removeprefix("splits"))
    options: dict[str, Any] = {"tile_kv": tile_kv, "n_splits": n_splits}
    parts = rule.removeprefix("varlen_").split("_")
    if parts[0] == "sparse":
        options["softmax_threshold"] = None if parts[1] == "default" else float(parts[1])
        return options
    options |= {"softmax_threshold": float(parts[2][1:]), "gate_threshold": float(parts[3][1:])}
    return options | {"is_logsigmoid_gate": parts[1] == "ls1"}


def check_fsa(problem: str, variant: str, got: SparseDecode, low: tuple[Any, Any]) -> None:
    o, lse = (golden("fsa_decode.npz", f"{problem}.{variant}.{x}") for x in ("o", "lse"))
    assert check_budget("o", o, got.o, low[0], np.float16) <= 0.5
    check_budget("lse", lse, got.lse, low[1], np.float32)


def check_counts(problem: str, variant: str, got: SparseDecode) -> None:
    total = int(got.stats.tiles_total.sum())
    assert (got.stats.tiles_skipped.sum(), total) == SKIPPED.get(f"{problem}.{variant}", (0, total))
    # Half floats in, so a kernel's float32 scores decide as float64 does.
    assert got.stats.margin.min() > 1e-3


@by_problem
@pytest.mark.parametrize("variant", SPARSE)
def test_sparse(problem: str, variant: str) -> None:
    arrays, options = arrays_of(problem), options_of(problem, variant)
    q, k, v = (arrays[x] for x in "qkv")
    if variant.startswith("varlen"):
        tokens = PROBLEMS[problem][0]
        k, v = (np.concatenate([x[b, :n] for b, n in enumerate(tokens)]) for x in (k, v))
        options["cu_seqlens_kv"] = np.cumsum([0, *tokens])
    got = sparse_decode(q, k, v, **options)
    check_fsa(problem, variant, got, sparse_decode_rounded(q, k, v, **options))
    check_counts(problem, variant, got)


@by_problem
@pytest.mark.parametrize("variant", GATED)
def test_gated(problem: str, variant: str) -> None:
    """No gate of these results closes a tile; `test_sparse_decode` has the rule by hand and written out."""
    arrays, options = arrays_of(problem), options_of(problem, variant)
    got = gated_decode(**arrays, **options)
    check_fsa(problem, variant, got, gated_decode_rounded(**arrays, **options))
    check_counts(problem, variant, got)
    assert got.stats.keys_read.sum() == got.stats.tiles_total.sum()


def test_no_result_is_left_out() -> None:
    with np.load(GOLDEN / "fsa_decode.npz") as data:
        names = {name.removesuffix(".lse") for name in data if name.endswith(".lse") and "dense" not in name}
    assert names == {f"{problem}.{variant}" for problem in PROBLEMS for variant in SPARSE + GATED}
    with np.load(GOLDEN / "mo_decode_d64.npz") as data:
        assert {name.removesuffix(".o") for name in data if name.endswith(".o")} == {*SKIP, "skip_0.1"}


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("splits1.sparse_0.1", {"n_splits": 2}),
        ("splits1.sparse_0.1", {"tile_kv": 64}),
        ("splits1.sparse_0.1", {"softmax_threshold": 0.0}),
        ("splits3.sparse_0.1", {"softmax_threshold": 0.5}),
        ("splits3.sparse_0.5", {"n_splits": 2}),
        ("splits3.gated_ls1_s0.1_g0.5", {"softmax_threshold": 0.0}),
        ("splits3.gated_ls1_s0.1_g0.5", {"fast_logsigmoid": False}),
        ("splits3.gated_ls1_s0.1_g0.5", {"is_logsigmoid_gate": False}),
    ],
)
def test_another_rule_is_noticed(variant: str, changed: dict[str, Any]) -> None:
    """The tolerance is small enough to see other tiles, other thresholds and another gate."""
    arrays, options = arrays_of("b"), options_of("b", variant) | changed
    if "gated" in variant:
        got, low = gated_decode(**arrays, **options), gated_decode_rounded(**arrays, **options)
    else:
        q, k, v = (arrays[x] for x in "qkv")
        got, low = sparse_decode(q, k, v, **options), sparse_decode_rounded(q, k, v, **options)
    with pytest.raises(AssertionError):  # BudgetError, or above half of the budget
        check_fsa("b", variant, got, low)


def test_left_to_right_is_noticed() -> None:
    """The keys of each split the other way round, so that it starts at its first one."""
    arrays, options = arrays_of("b"), options_of("b", "splits3.sparse_0.5")
    turn = np.concatenate([run[::-1] for run in np.split(np.arange(2048), [6 * 128, 12 * 128])])
    q, k, v = arrays["q"], arrays["k"][:, turn], arrays["v"][:, turn]
    with pytest.raises(AssertionError):  # BudgetError, or above half of the budget
        check_fsa(
            "b", "splits3.sparse_0.5", sparse_decode(q, k, v, **options), sparse_decode_rounded(q, k, v, **options)
        )


def skip_arrays() -> tuple[Any, Any, Any, Any]:
    with np.load(GOLDEN / "mo_decode_d64.npz") as data:
        return data["q"], data["k"], data["v"], np.cumsum([0, *data["lens_k"]])


@pytest.mark.parametrize("variant", [*SKIP, "skip_0.1"])
def test_skip_softmax(variant: str) -> None:
    """`skip_0.1` ran with tiles of 32 keys and did not count them: the output is the evidence."""
    q, k, v, cu = skip_arrays()
    threshold = None if variant == "noncausal_dense" else float(variant.split("_")[1])
    options = {
        "skip_softmax_threshold": threshold,
        "cu_seqlens_kv": cu,
        "tile_kv": 32 if variant == "skip_0.1" else 128,
    }
    got = skip_softmax_decode(q, k, v, **options)
    low, _ = skip_softmax_decode_rounded(q, k, v, **options)
    assert check_budget("o", golden("mo_decode_d64.npz", f"{variant}.o"), got.o, low, np.float16) <= 0.5
    if variant in SKIP:
        assert (got.stats.tiles_total.sum(), got.stats.tiles_skipped.sum()) == (120, SKIP[variant])
    assert got.stats.margin.min() > 1e-4


@pytest.mark.parametrize(("tile_kv", "threshold"), [(32, 0.0), (32, 0.5), (64, 0.1), (16, 0.1)])
def test_other_skips_are_noticed(tile_kv: int, threshold: float) -> None:
    q, k, v, cu = skip_arrays()
    options = {"skip_softmax_threshold": threshold, "cu_seqlens_kv": cu, "tile_kv": tile_kv}
    got = skip_softmax_decode(q, k, v, **options)
    low, _ = skip_softmax_decode_rounded(q, k, v, **options)
    with pytest.raises(BudgetError):
        check_budget("o", golden("mo_decode_d64.npz", "skip_0.1.o"), got.o, low, np.float16)


def test_the_twins_round_to_their_oracles() -> None:
    """In float32 they are much closer to their oracles than those are to dense: the same tiles, heads and gates."""
    arrays = {name: x.astype(np.float32) for name, x in arrays_of("a").items()}
    q, k, v = arrays["q"], arrays["k"] * np.float32(2), arrays["v"]
    gates = arrays["alpha"], arrays["delta"]
    lengths: dict[str, Any] = {"seqlens_kv": np.array([293, 40]), "window_size": (200, None)}
    options = lengths | {"tile_kv": 16}
    sparse = {"softmax_threshold": 0.1} | options
    gate, skip = {"gate_threshold": 0.9} | sparse, {"skip_softmax_threshold": 0.1} | options
    off = {"softmax_threshold": 0.0, "gate_threshold": 0.0} | options
    dense, gated = flash_decode(q, k, v, **lengths), gated_decode(q, k, v, *gates, **off)
    for low, exact, full in (
        (sparse_decode_rounded(q, k, v, **sparse), sparse_decode(q, k, v, **sparse), dense),
        (gated_decode_rounded(q, k, v, *gates, **gate), gated_decode(q, k, v, *gates, **gate), gated),
        (skip_softmax_decode_rounded(q, k, v, **skip), skip_softmax_decode(q, k, v, **skip), dense),
    ):
        for i in range(2):
            assert low[i].dtype == np.float32
            assert low[i].shape[1:] == exact[i].shape
            assert 0 < np.abs(low[i] - exact[i]).max() < 1e-3 * np.abs(full[i] - exact[i]).max()
            assert len(np.unique(low[i], axis=0)) > 1, "orders of summation have to differ"
