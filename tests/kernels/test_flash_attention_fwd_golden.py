"""The prefill forward against a public Triton kernel: dense, N:M, and skip-softmax of tiles of 128 x 128.

Both lie within half the budget of the oracle (`tests/reference/test_golden_flash_attention.py` has theirs) and so
within the whole of it from each other. Results with tiles of 16 x 32 are left to the oracle.

Of the N:M data some scores are next to those they would have to pass: 5e-7 apart in `mo_sink_d128`, which is below the
error of a float32 score of 10. Which of two such keys stays is then luck; both weigh the same, and here the public
kernel, the oracle and ours agree on all, as `test_selection_margins` and the results show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from contributed.flash_attention_fwd import flash_attention_fwd
from reference.budget import BudgetError, budget, check_budget
from reference.flash_attention import FlashAttention, flash_attention
from reference.rounded_attention import flash_attention_rounded
from tests.kernels.prefill import check_tiles
from tests.reference.test_golden_flash_attention import COUNTS, VARIANTS, load, options_of

RUNS = [(problem, variant) for problem, names in VARIANTS.items() for variant in names if variant != "skip_0.1"]


@cache
def references(problem: str, variant: str) -> tuple[FlashAttention, tuple[Any, Any]]:
    q, k, v = load(problem, "q", "k", "v")
    options = options_of(problem, variant)
    return flash_attention(q, k, v, **options), flash_attention_rounded(q, k, v, **options)


def check(problem: str, variant: str, target: str, **changed: Any) -> None:
    o, q, k, v = load(problem, f"{variant}.o", "q", "k", "v")
    exact, low = references(problem, variant)
    got, lse, stats = flash_attention_fwd(
        q, k, v, return_lse=True, return_stats=True, target=target, **options_of(problem, variant) | changed
    )
    assert got.dtype == np.float16
    for x in (got, o):
        assert check_budget("o", x, exact.o, low[0], np.float16) <= 0.5
    check_budget("lse", lse, exact.lse, low[1], np.float32)
    apart = np.abs(got.astype(np.float64) - o.astype(np.float64)).max(axis=-1)
    assert (apart <= budget(exact.o, low[0], np.float16)).all()
    check_tiles(stats, exact)
    if variant in COUNTS[problem]:
        counts = int(stats.tiles_total.sum()), int(stats.tiles_skipped.sum())
        assert counts == COUNTS[problem][variant]


@pytest.mark.parametrize(("problem", "variant"), RUNS)
def test_golden(problem: str, variant: str) -> None:
    check(problem, variant, ("trn1", "trn2", "trn3")[RUNS.index((problem, variant)) % 3])


def test_selection_margins() -> None:
    """Half floats in: all but a few scores are as far apart as float32 tells them apart."""
    margins = {run: references(*run)[0].stats.selection_margin.min() for run in RUNS}
    assert {problem for (problem, _), margin in margins.items() if margin < 1e-6} == {"mo_sink_d128"}


@pytest.mark.parametrize(
    ("problem", "variant", "changed"),
    [
        ("mo_suffix_d80", "dense", {"causal": False}),
        ("mo_gqa_d64", "nm_2_4", {"sparsity_n": 3}),
        ("mo_sink_d128", "nm_2_4_sink4_recent64", {"dense_sink_tokens": 5}),
        ("mo_sink_d128", "nm_4_8_sink8_recent16", {"dense_recent_tokens": 15}),
        ("mo_suffix_d80", "nm_2_4_skip_0.1_measured", {"sparsity_n": 0}),
        ("mo_sink_d128", "skip_0.5_measured", {"skip_softmax_threshold": 0.1}),
    ],
)
def test_another_rule_is_noticed(problem: str, variant: str, changed: dict[str, Any]) -> None:
    with pytest.raises((BudgetError, AssertionError)):
        check(problem, variant, "trn2", **changed)
