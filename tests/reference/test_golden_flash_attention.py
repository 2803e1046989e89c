"""The prefill results of a public Triton kernel: N:M sparse softmax, skip-softmax, prefix caches, and gradients.

The tolerance of o and dv is that of `test_golden_fsa_decode`: the budget made from the kernel's roundings, of which a
two-byte output uses less than half. Decisions are exact: counts of skipped tiles where the kernel gives them, and
elsewhere by the output.

dq and dk have one more rounding: the public backward multiplies and sums o and do for delta in float16. A query that
sees only itself shows it (`test_the_public_delta_is_float16`): its dq is 0 in exact arithmetic, and theirs about 1e-3.
`with_float16_deltas` adds that to the budget of these two.

No gradient of the golden data has skipped tiles, where the public backward would decide anew, from lse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.budget import BudgetError, check_budget, share_of_budget
from reference.flash_attention import FlashAttention, flash_attention
from reference.flash_attention_bwd import flash_attention_bwd
from reference.rounded_attention import flash_attention_bwd_rounded, flash_attention_rounded

GOLDEN = Path(__file__).parents[1] / "golden"
N_M = ["nm_2_4", "nm_4_8", "nm_2_4_sink4_recent64", "nm_4_8_sink8_recent16"]
ALL_N_M = [*N_M, "nm_1_4", "nm_3_4", "nm_1_8"]
# Tiles that the kernel counted and how many of them it skipped.
COUNTS = {
    "mo_gqa_d64": {"skip_0.1_measured": (16, 0), "nm_2_4_skip_0.1_measured": (16, 0)},
    "mo_sink_d128": {
        "skip_0.5_measured": (20, 6),
        "skip_0.1_measured": (20, 2),
        "skip_0.01_measured": (20, 0),
        "nm_2_4_skip_0.1_measured": (20, 2),
    },
    "mo_suffix_d80": {
        "skip_0.5_measured": (28, 7),
        "skip_0.1_measured": (28, 6),
        "skip_0.01_measured": (28, 1),
        "nm_2_4_skip_0.1_measured": (28, 6),
    },
}
VARIANTS = {
    "mo_gqa_d64": ["dense", "noncausal", *ALL_N_M, *COUNTS["mo_gqa_d64"]],
    "mo_sink_d128": ["dense", *N_M, "skip_0.1", *COUNTS["mo_sink_d128"]],
    "mo_suffix_d80": ["dense", "noncausal", *ALL_N_M, "skip_0.1", *COUNTS["mo_suffix_d80"]],
}
WITH_GRADIENTS = {
    "mo_gqa_d64": ["dense", "noncausal", "nm_2_4", "nm_4_8_sink8_recent16"],
    "mo_sink_d128": ["dense", "nm_2_4", "nm_4_8_sink8_recent16"],
    "mo_suffix_d80": ["dense", "noncausal", "nm_2_4", "nm_4_8_sink8_recent16"],
}
ORDERS = 16
"""Orders of a float16 sum: with 8 there are rows where all of them are right by luck."""


def load(problem: str, *names: str) -> list[Any]:
    with np.load(GOLDEN / f"{problem}.npz") as data:
        return [data[name] for name in names]


def options_of(problem: str, variant: str) -> dict[str, Any]:
    """The arguments of a result, from its name; tiles of 16 and 32 unless the kernel counted."""
    lens_q, lens_k = load(problem, "lens_q", "lens_k")
    options: dict[str, Any] = {"cu_seqlens_q": np.cumsum([0, *lens_q]), "cu_seqlens_kv": np.cumsum([0, *lens_k])}
    options |= {"causal": variant != "noncausal", "dense_recent_tokens": 0}
    words = variant.split("_")
    if words[0] == "nm":
        options |= {"sparsity_n": int(words[1]), "sparsity_m": int(words[2])}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "skip":
            options |= {"skip_softmax_threshold": float(following)}
        elif word.startswith("sink"):
            options |= {"dense_sink_tokens": int(word.removeprefix("sink"))}
        elif word.startswith("recent"):
            options |= {"dense_recent_tokens": int(word.removeprefix("recent"))}
    if variant == "skip_0.1":
        options |= {"tile_q": 16, "tile_kv": 32}
    return options


def check(problem: str, variant: str, options: dict[str, Any]) -> FlashAttention:
    o, q, k, v = load(problem, f"{variant}.o", "q", "k", "v")
    got = flash_attention(q, k, v, **options)
    low, _ = flash_attention_rounded(q, k, v, kept=got.stats.kept, **options)
    assert check_budget("o", o, got.o, low, np.float16) <= 0.5
    return got


@pytest.mark.parametrize(("problem", "variant"), [(p, x) for p, names in VARIANTS.items() for x in names])
def test_outputs_and_counts(problem: str, variant: str) -> None:
    got = check(problem, variant, options_of(problem, variant))
    counts = int(got.stats.tiles_total.sum()), int(got.stats.tiles_skipped.sum())
    if variant in COUNTS[problem]:
        assert counts == COUNTS[problem][variant]
    elif variant != "skip_0.1":
        assert counts[1] == 0
    # Half floats in, so a kernel's float32 scores decide about tiles as float64 does.
    assert got.stats.margin.min() > 0.05


@pytest.mark.parametrize(("problem", "skipped"), [("mo_sink_d128", (544, 392)), ("mo_suffix_d80", (360, 278))])
def test_small_tiles_skip_most(problem: str, skipped: tuple[int, int]) -> None:
    """The kernel did not count these; `test_another_rule_is_noticed` has what other tiles would do to the output."""
    q, k, v = load(problem, "q", "k", "v")
    stats = flash_attention(q, k, v, **options_of(problem, "skip_0.1")).stats
    assert (stats.tiles_total.sum(), stats.tiles_skipped.sum()) == skipped


def test_no_result_is_left_out() -> None:
    for problem, names in VARIANTS.items():
        with np.load(GOLDEN / f"{problem}.npz") as data:
            assert {x.removesuffix(".o") for x in data if x.endswith(".o")} == set(names)
            assert {x.removesuffix(".dq") for x in data if x.endswith(".dq")} == set(WITH_GRADIENTS[problem])


@pytest.mark.parametrize(
    ("problem", "variant", "changed"),
    [
        ("mo_suffix_d80", "dense", {"causal": False}),
        ("mo_gqa_d64", "nm_2_4", {"sparsity_n": 3}),
        ("mo_gqa_d64", "nm_4_8", {"sparsity_m": 4, "sparsity_n": 2}),
        ("mo_gqa_d64", "nm_2_4_sink4_recent64", {"dense_sink_tokens": 5}),
        ("mo_gqa_d64", "nm_4_8_sink8_recent16", {"dense_recent_tokens": 15}),
        ("mo_suffix_d80", "nm_2_4_sink4_recent64", {"dense_recent_tokens": 65}),
        ("mo_suffix_d80", "nm_2_4_skip_0.1_measured", {"sparsity_n": 0}),
        ("mo_sink_d128", "skip_0.1", {"skip_softmax_threshold": 0.2}),
        ("mo_sink_d128", "skip_0.1", {"tile_q": 32}),
        ("mo_sink_d128", "skip_0.1", {"tile_kv": 16}),
        ("mo_suffix_d80", "skip_0.1", {"tile_q": 8}),
        ("mo_suffix_d80", "skip_0.1", {"tile_kv": 64}),
    ],
)
def test_another_rule_is_noticed(problem: str, variant: str, changed: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):  # BudgetError, or above half of the budget
        check(problem, variant, options_of(problem, variant) | changed)


def float16_sum(x: Any) -> Any:
    """Over the last axis: runs of 8, as a thread of a GPU takes them, and then the runs."""
    runs = np.add.accumulate(x.reshape(*x.shape[:-1], -1, 8), axis=-1)[..., -1]
    return np.add.accumulate(runs, axis=-1)[..., -1].astype(np.float64)


def with_float16_deltas(problem: str, variant: str, options: dict[str, Any], low: tuple[Any, Any]) -> list[Any]:
    """dq and dk in the machine's precision, `low`, with delta summed in float16 in several orders.

    Both are linear in delta. Where it is off by e, dq is off by `-softmax_scale * e * sum_j p k`, which is the output
    with keys for values, and dk by `-softmax_scale * sum_i p e q`, which is the dv of a do of `e * q`.
    """
    o, do, q, k = load(problem, f"{variant}.o", "do", "q", "k")
    d, products = q.shape[-1], o * do
    exact = (o.astype(np.float64) * do).sum(axis=-1)
    turns = [np.random.default_rng(order).permutation(d) for order in range(ORDERS)]
    errors = np.stack([float16_sum(products[..., turn]) - exact for turn in turns])
    dq = -(d**-0.5) * errors[..., None] * flash_attention(q, k, k, **options).o
    upstream = np.moveaxis(errors[..., None] * q.astype(np.float64), 0, 2).reshape(*q.shape[:2], -1)
    dv = flash_attention_bwd(upstream, q, k, np.zeros((*k.shape[:2], ORDERS * d)), **options).dv
    dk = -(d**-0.5) * np.moveaxis(dv.reshape(*k.shape[:2], ORDERS, d), 2, 0)
    return [np.resize(x.astype(np.float64), error.shape) + error for x, error in zip(low, (dq, dk), strict=True)]


def gradient_shares(problem: str, variant: str, options: dict[str, Any]) -> list[float]:
    """Shares that the public dq, dk and dv use of their budgets."""
    do, q, k, v = load(problem, "do", "q", "k", "v")
    exact = flash_attention_bwd(do, q, k, v, **options)
    dq, dk, dv = flash_attention_bwd_rounded(do, q, k, v, **options)
    lows = [*with_float16_deltas(problem, variant, options, (dq, dk)), dv]
    golden = load(problem, *(f"{variant}.{x}" for x in ("dq", "dk", "dv")))
    return [share_of_budget(*x, np.float16)[1] for x in zip(golden, exact, lows, strict=True)]


@pytest.mark.parametrize(("problem", "variant"), [(p, x) for p, names in WITH_GRADIENTS.items() for x in names])
def test_gradients(problem: str, variant: str) -> None:
    dq, dk, dv = gradient_shares(problem, variant, options_of(problem, variant))
    assert dq <= 1
    assert dk <= 1
    assert dv <= 0.5


@pytest.mark.parametrize(
    ("problem", "variant", "changed"),
    [
        ("mo_suffix_d80", "noncausal", {"causal": True}),
        ("mo_gqa_d64", "nm_2_4", {"sparsity_n": 3}),
        ("mo_gqa_d64", "nm_4_8_sink8_recent16", {"dense_recent_tokens": 17}),
    ],
)
def test_gradients_of_another_rule_are_noticed(problem: str, variant: str, changed: dict[str, Any]) -> None:
    assert min(gradient_shares(problem, variant, options_of(problem, variant) | changed)) > 2


def test_the_public_delta_is_float16() -> None:
    """The first query of a causal sequence sees one key: `dq = softmax_scale * (do . v - delta) * k`, with o = v."""
    o, do, k, v, dq = load("mo_gqa_d64", "dense.o", "do", "k", "v", "dense.dq")
    for row in (0, 160):
        keys, values = (x[row].repeat(2, axis=0).astype(np.float64) for x in (k, v))
        np.testing.assert_array_equal(o[row], values)
        exact = (do[row] * values).sum(axis=-1)
        ds = (dq[row] * keys).sum(axis=-1) / (keys * keys).sum(axis=-1) * 8.0
        delta = exact - ds
        assert (np.abs(ds) > 2e-5 * np.abs(delta)).all()  # float32 would be off by 1e-7
        # Two roundings of ds lie between delta and what is found of it.
        np.testing.assert_allclose(
            delta, delta.astype(np.float16).astype(np.float64), rtol=0, atol=2**-10 * np.abs(ds).max()
        )


def test_the_budget_without_float16_deltas_is_not_enough() -> None:
    do, q, k, v, dq = load("mo_gqa_d64", "do", "q", "k", "v", "dense.dq")
    options = options_of("mo_gqa_d64", "dense")
    exact, low = flash_attention_bwd(do, q, k, v, **options), flash_attention_bwd_rounded(do, q, k, v, **options)
    with pytest.raises(BudgetError):
        check_budget("dq", dq, exact.dq, low[0], np.float16)
