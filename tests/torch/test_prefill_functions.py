"""`attention` and `scaled_dot_product_attention` against the oracle, public results and torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contributed._checks import FLOATS
from contributed._prefill_cases import PrefillCase
from reference.budget import check_budget
from reference.rounded_attention import flash_attention_rounded
from tests.kernels.flash import CEILING
from tests.kernels.prefill import reference
from tests.kernels.test_flash_attention_fwd_golden import references as golden_references
from tests.reference.test_golden_flash_attention import COUNTS, load, options_of

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from tests.torch.tensors import arrays, attention64, by_case, equal, numbers, random, tensors  # noqa: E402

UNCHANGED = ("sparsity_n", "sparsity_m", "dense_sink_tokens", "dense_recent_tokens", "skip_softmax_threshold")


def sequences(options: dict[str, Any]) -> dict[str, Any]:
    """Starts and lengths of packed sequences, as `attention` names them."""
    found: dict[str, Any] = {}
    for suffix, key in (("", "q"), ("_k", "kv")):
        cu = options[f"cu_seqlens_{key}"]
        found[f"b_start_loc{suffix}"] = torch.from_numpy(np.asarray(cu[:-1], np.int32))
        found[f"b_seq_len{suffix}"] = torch.from_numpy(np.diff(cu).astype(np.int64))
        found[f"max_input_len{suffix}"] = int(np.diff(cu).max())
    return found


def call(q: Any, k: Any, v: Any, options: dict[str, Any], **more: Any) -> Any:
    """`attention` with the NumPy wrapper's arguments."""
    given = {name: options[name] for name in UNCHANGED if name in options}
    given |= {"is_causal": options.get("causal", True), "softmax_scale": options.get("softmax_scale")}
    return nki_torch.attention(*tensors(q, k, v), **sequences(options), **given, **more)


CASES = [
    PrefillCase("ragged", 4, 2, 64, ((130, 130), (1, 200), (0, 7), (33, 33)), unused=3),
    PrefillCase("bidirectional", 2, 1, 80, ((70, 150), (1, 1)), causal=False, softmax_scale=0.2),
    PrefillCase("2-of-4", 2, 1, 64, ((130, 130), (1, 200)), sparsity_n=2, sink=5, recent=40, grid=True),
    PrefillCase("4-of-8-skip", 2, 1, 64, ((130, 400),), True, None, None, 4, 8, 0, 20, 0.5, grid=True, locality=3.0),
]


@by_case(CASES)
def test_attention(case: PrefillCase, dtype: str) -> None:
    r = reference(case, FLOATS[dtype])
    o = call(r.q, r.k, r.v, r.options, measure_sparsity=True)
    got = arrays(o)[0]
    assert got.dtype == r.q.dtype
    assert check_budget("o", got, r.exact.o, r.low[0], got.dtype) <= CEILING[dtype]
    if case.threshold is not None:
        stats = r.exact.stats
        assert (o._sparsity_total, o._sparsity_skipped) == (stats.tiles_total.sum(), stats.tiles_skipped.sum())
        assert o._sparsity_skipped > 0
    else:
        assert not hasattr(o, "_sparsity_total")


# One of each kind; all of them are in `tests/kernels`.
GOLDEN = [
    ("mo_gqa_d64", "noncausal"),
    ("mo_sink_d128", "nm_2_4_sink4_recent64"),
    ("mo_sink_d128", "skip_0.5_measured"),
    ("mo_suffix_d80", "nm_2_4_skip_0.1_measured"),
]


@pytest.mark.parametrize(("problem", "variant"), GOLDEN)
def test_public_results(problem: str, variant: str) -> None:
    golden, q, k, v = load(problem, f"{variant}.o", "q", "k", "v")
    exact, low = golden_references(problem, variant)
    o = call(q, k, v, options_of(problem, variant), measure_sparsity=True)
    for x in (*arrays(o), golden):
        assert check_budget("o", x, exact.o, low[0], np.float16) <= 0.5
    if variant in COUNTS[problem]:
        assert (o._sparsity_total, o._sparsity_skipped) == COUNTS[problem][variant]


def test_sequences_in_any_order_with_rows_between_and_shared_keys() -> None:
    """A row's result does not depend on where its sequence lies, and rows of nobody are 0 whatever is there."""
    q, k, v = random(1, "bfloat16", (100, 4, 32), (100, 2, 32), (100, 2, 32))
    for x in (q, k, v):
        x[[0, 50, 99]] = torch.nan
    starts, lengths = numbers(60, 1, 51), numbers(39, 20, 9)
    starts_k, lengths_k = numbers(1, 1, 70), numbers(45, 20, 29)
    o = nki_torch.attention(q, k, v, starts, lengths, 39, True, None, starts_k, lengths_k, 45)
    rows = torch.zeros(100, dtype=torch.bool)
    for b in range(3):
        of_q = slice(int(starts[b]), int(starts[b] + lengths[b]))
        of_k = slice(int(starts_k[b]), int(starts_k[b] + lengths_k[b]))
        n, m = int(lengths[b]), int(lengths_k[b])
        parts = (q[of_q], k[of_k], v[of_k])
        alone = nki_torch.attention(*parts, numbers(0), numbers(n), n, True, None, numbers(0), numbers(m), m)
        assert equal([o[of_q]], [alone])
        rows[of_q] = True
    assert bool((o[~rows] == 0).all())
    assert int(rows.sum()) == 68


def test_pages() -> None:
    """The same bits as over the rows that the pages hold; pages that no key is on are not read."""
    q, k, v = random(2, "float16", (60, 4, 64), (100, 2, 64), (100, 2, 64))
    lengths, lengths_k, starts = numbers(40, 20), numbers(57, 43), numbers(0, 40)
    flat = nki_torch.attention(q, k, v, starts, lengths, 40, True, None, numbers(0, 57), lengths_k, 57)
    table = torch.tensor([[5, 2, 9, 0, -1], [3, 8, 1, 7, 5]], dtype=torch.int64)
    pages = [torch.full((10, 16, 2, 64), torch.nan, dtype=q.dtype) for _ in "kv"]
    for x, cache in zip((k, v), pages, strict=True):
        for b, (start, n) in enumerate(((0, 57), (57, 43))):
            for row in range(n):
                cache[table[b, row // 16], row % 16] = x[start + row]
    dummies = torch.empty(0, 2, 64, dtype=q.dtype), torch.empty(0, 2, 64, dtype=q.dtype)
    caches = {"k_cache": pages[0], "v_cache": pages[1], "block_table": table, "page_size": 16}
    paged = nki_torch.attention(q, *dummies, starts, lengths, 40, True, None, None, lengths_k, 57, **caches)
    assert equal([paged], [flat])
    with pytest.raises(NotImplementedError, match=r"attention\.k_cache: received pages where a tensor requires grad"):
        nki_torch.attention(
            q.requires_grad_(), *dummies, starts, lengths, 40, True, None, None, lengths_k, 57, **caches
        )


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 9), (9, 5), (1, 140), (3, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scaled_dot_product_attention(n: int, m: int, is_causal: bool) -> None:
    """As torch's in float64, whose causal mask counts from the first key, in the budget of the same operands."""
    q, k, v = random(3, "float32", (2, 4, n, 32), (2, 2, m, 32), (2, 2, m, 32))
    got = nki_torch.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    # Of the rows that see as many keys as there are before them, and of those that see all.
    seen = min(n, m) if is_causal else 0
    rows = [np.ascontiguousarray(x.transpose(1, 2).numpy()) for x in (q, k, v)]
    low = [
        flash_attention_rounded(x, *(y[:, :keys] for y in rows[1:]), causal=causal, softmax_scale=0.3)[0]
        for x, keys, causal in ((rows[0][:, :seen], seen, True), (rows[0][:, seen:], m, False))
        if x.shape[1]
    ]
    low = np.concatenate(low, axis=2).swapaxes(2, 3)
    check_budget("o", got.numpy(), expected.numpy(), low, np.float32)


def test_one_sequence_without_batch() -> None:
    q, k, v = random(4, "bfloat16", (2, 7, 32), (2, 9, 32), (2, 9, 32))
    alone = nki_torch.scaled_dot_product_attention(q, k, v)
    assert torch.equal(alone, nki_torch.scaled_dot_product_attention(q[None], k[None], v[None])[0])


def test_float64_attention_of_the_tests_is_torchs() -> None:
    q, k, v = random(5, "float32", (6, 4, 8), (9, 2, 8), (9, 2, 8))
    o, lse = attention64(q, k, v, causal=False, left=3, right=2)
    position, key = torch.arange(6)[:, None] + 3, torch.arange(9)[None]
    mask = (key >= position - 3) & (key <= position + 2)
    operands = [x.double().transpose(0, 1) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*operands, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(o.transpose(0, 1), expected, rtol=0, atol=1e-14)
    assert lse.shape == (4, 6)
