"""The decode oracles against a plainer computation, identities, and public Triton kernels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from reference.decode import decode_attention, gqa_decode_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "fsa_decode.npz"


def by_hand(q: list[float], k: list[list[float]], v: list[list[float]], scale: float) -> tuple[list[float], float]:
    """Attention with Python floats and no shortcut: exp without a maximum."""
    weights = [math.exp(scale * sum(a * b for a, b in zip(q, key, strict=True))) for key in k]
    total = math.fsum(weights)
    columns = zip(*v, strict=True)
    return [math.fsum(w * x for w, x in zip(weights, c, strict=True)) / total for c in columns], math.log(total)


@pytest.mark.parametrize("seqlen_kv", [1, 2, 17])
@pytest.mark.parametrize("scale", [None, 0.3, -0.7, 0.0])
def test_one_head_equals_the_sum_written_out(seqlen_kv: int, scale: float | None) -> None:
    rng = np.random.default_rng(seqlen_kv)
    q, k, v = rng.standard_normal(5), rng.standard_normal((seqlen_kv, 5)), rng.standard_normal((seqlen_kv, 5))
    got = decode_attention(q, k, v, softmax_scale=scale)
    o, lse = by_hand(q.tolist(), k.tolist(), v.tolist(), 5**-0.5 if scale is None else scale)
    np.testing.assert_allclose(got.o, o, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.lse, lse, rtol=1e-12, atol=1e-12)


def test_query_heads_read_their_group() -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((6, 8)), rng.standard_normal((9, 2, 8)), rng.standard_normal((9, 2, 8))
    got = gqa_decode_attention(q, k, v)
    for h, kv in enumerate([0, 0, 0, 1, 1, 1]):
        o, lse = by_hand(q[h].tolist(), k[:, kv].tolist(), v[:, kv].tolist(), 8**-0.5)
        np.testing.assert_allclose(got.o[h], o, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.lse[h], lse, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    q = np.full(4, 100.0)
    k = np.stack([np.full(4, 100.0), np.full(4, -100.0)])
    got = decode_attention(q, k, np.array([[1.0], [2.0]]), softmax_scale=1.0)
    np.testing.assert_array_equal(got.o, [1.0])
    assert got.lse == 40000.0


def test_empty_cache_gives_zero_and_minus_infinity() -> None:
    got = gqa_decode_attention(np.ones((4, 8)), np.ones((0, 2, 8)), np.ones((0, 2, 8)))
    np.testing.assert_array_equal(got.o, np.zeros((4, 8)))
    np.testing.assert_array_equal(got.lse, np.full(4, -np.inf))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="q heads: received 5, allowed a multiple of the 2 KV heads"):
        gqa_decode_attention(np.ones((5, 8)), np.ones((3, 2, 8)), np.ones((3, 2, 8)))


@pytest.mark.parametrize("batch", [0, 1])
def test_agrees_with_the_public_triton_kernel(batch: int) -> None:
    data = np.load(GOLDEN)
    got = gqa_decode_attention(data["a.q"][batch], data["a.k"][batch], data["a.v"][batch])
    # The golden output is rounded to float16; its log-sum-exp float32.
    spacing = np.spacing(np.abs(got.o).max().astype(np.float16)).astype(np.float64)
    assert np.abs(data["a.dense.o"][batch].astype(np.float64) - got.o).max() <= 2 * spacing
    assert np.abs(data["a.dense.lse"][batch] - got.lse).max() <= 3e-6
