"""The computation in the machine's precision: which roundings it has, and that it has no others."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reference.budget import epsilon
from reference.flash_decode import flash_decode
from reference.rounded import flash_decode_rounded, n_orders

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
BATCH, S, Q_HEADS, KV_HEADS, D, ROWS = 2, 3, 4, 2, 16, 200
LENGTHS = np.array([200, 77])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.5},
    "lengths": {"seqlens_kv": LENGTHS},
    "window": {"seqlens_kv": LENGTHS, "window_size": (50, 0)},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": np.array([2.0, 5.0, -1.0, 0.0])},
    "slopes": {"alibi_slopes": SLOPES},
    "cache scales": {"k_scale": np.array([0.5, 2.0]), "v_scale": 0.3},
}
OPTIONS["all"] = {name: value for one in list(OPTIONS.values()) for name, value in one.items()}


def inputs(dtype: Any, s: int | None = S, rows: int = ROWS) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(11)
    new = () if s is None else (s,)
    shapes = ((BATCH, *new, Q_HEADS, D), (BATCH, rows, KV_HEADS, D), (BATCH, rows, KV_HEADS, D))
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_near_the_oracle_by_what_rounding_explains(name: str, dtype: Any) -> None:
    """Probabilities and output lose half a spacing each; the rest is float32.

    In float32 a score is off by at most half a spacing of the sum of its absolute products per operation, d of them
    and a few for scale, cap and slope; probabilities are relatively off by as much on either side of the
    division, and sums over n keys by n half spacings.
    """
    q, k, v = inputs(dtype)
    options = OPTIONS[name]
    exact, (o, lse) = flash_decode(q, k, v, **options), flash_decode_rounded(q, k, v, **options)
    assert (o.dtype, lse.dtype) == (np.dtype(dtype), np.float32)
    assert (o.shape, lse.shape) == ((n_orders(q), *q.shape), (n_orders(q), *q.shape[:-1]))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    products = np.einsum("bihc,bjhc->bihj", np.abs(wide[0]), np.abs(wide[1]).repeat(2, axis=2)).max()
    largest = float(np.max(options.get("k_scale", 1.0))) * options.get("softmax_scale", D**-0.5) * products
    if "alibi_slopes" in options:
        largest += SLOPES.max() * ROWS
    half32 = 2.0**-24
    score = (D + 8) * half32 * largest
    values = np.abs(wide[2]).max() * options.get("v_scale", 1.0)
    bound = (epsilon(dtype) + 2 * score + 2 * (ROWS + 4) * half32) * values
    assert 0 < np.abs(o.astype(np.float64) - exact.o).max() <= bound
    assert 0 < np.abs(lse - exact.lse).max() <= score + (ROWS + 4) * half32 + 8 * half32 * np.abs(exact.lse).max()


def test_distances_shrink_with_the_type() -> None:
    """The same inputs, exact in all three types, so that only the roundings differ: 8x and 2**13 apart."""
    q, k, v = inputs(ml_dtypes.bfloat16)
    exact = flash_decode(q, k, v).o
    distance = []
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        o, _ = flash_decode_rounded(*(x.astype(np.float32).astype(dtype) for x in (q, k, v)))
        distance.append(np.abs(o.astype(np.float64) - exact).mean())
    assert 4 < distance[0] / distance[1] < 16
    assert distance[1] / distance[2] > 2**8


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_probabilities_are_rounded_and_their_sum_is_not(dtype: Any) -> None:
    """Values 1 and -exp(-1/2) cancel for exact probabilities; what is left is the rounding of exp(-1/2)."""
    p = math.exp(-0.5)
    q, k = np.ones((1, 1, 1), dtype), np.array([0.0, -0.5], dtype)[None, :, None, None]
    v = np.array([-p, 1.0], np.float32)[None, :, None, None]
    o, lse = flash_decode_rounded(q, k, v)
    rounded = float(np.array(p).astype(dtype))
    assert rounded != p
    np.testing.assert_allclose(o[:, 0, 0, 0].astype(np.float64), (rounded - p) / (1 + p), rtol=epsilon(dtype))
    np.testing.assert_allclose(lse[:, 0, 0], math.log(1 + p), rtol=2.0**-22)


def test_orders_of_summation_differ() -> None:
    q, k, v = inputs(np.float32)
    o, lse = flash_decode_rounded(q, k, v)
    assert len({x.tobytes() for x in o}) == n_orders(q)
    assert len({x.tobytes() for x in lse}) > n_orders(q) // 2  # of few numbers some come out equal


def test_even_and_odd_keys_are_summed_differently() -> None:
    """All keys equal: an error common to all scores would leave the weights equal and o the exact mean."""
    rng = np.random.default_rng(1)
    q, key = rng.standard_normal((1, 1, 128)).astype(np.float32), rng.standard_normal(128).astype(np.float32)
    k = np.broadcast_to(key, (1, 2, 1, 128))
    v = np.stack([np.ones(128, np.float32), -np.ones(128, np.float32)])[None, :, None]
    o, _ = flash_decode_rounded(q, k, v, softmax_scale=1.0)
    assert (np.abs(o).max(axis=(1, 2, 3)) > 0).sum() >= n_orders(q) * 3 // 4


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3])
def test_eight_bit_caches_are_exact_when_widened(dtype: Any) -> None:
    q, k, v = inputs(np.float32)
    small = k.astype(dtype), v.astype(dtype)
    options = {"k_scale": np.array([0.5, 2.0]), "v_scale": 0.3}
    q = q.astype(ml_dtypes.bfloat16)
    got = flash_decode_rounded(q, *small, **options)
    expected = flash_decode_rounded(q, *(x.astype(np.float32) for x in small), **options)
    assert got[0].dtype == ml_dtypes.bfloat16
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_before_the_sequence_see_nothing() -> None:
    q, k, v = inputs(np.float32)
    short = np.array([1, 2])
    exact, (o, lse) = flash_decode(q, k, v, seqlens_kv=short), flash_decode_rounded(q, k, v, seqlens_kv=short)
    seen = np.array([[False, False, True], [False, True, True]])
    assert not o[:, ~seen].any()
    assert np.isneginf(lse[:, ~seen]).all()
    np.testing.assert_allclose(o[:, seen], np.broadcast_to(exact.o[seen], o[:, seen].shape), rtol=1e-4, atol=1e-5)


def test_one_token_is_the_last_of_several() -> None:
    q, k, v = inputs(np.float32)
    several, one = flash_decode_rounded(q, k, v), flash_decode_rounded(q[:, -1], k, v)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a[:, :, -1], b)


@pytest.mark.parametrize("unused", [np.nan, np.inf])
@pytest.mark.parametrize("window", [(None, None), (9, None)], ids=str)
def test_packed_is_flat_and_unused_rows_are_not_looked_at(window: Any, unused: float) -> None:
    q, k, v = inputs(np.float16)
    expected = flash_decode_rounded(q, k, v, seqlens_kv=LENGTHS, window_size=window)
    packed = [np.concatenate([x[b, :n] for b, n in enumerate(LENGTHS)]) for x in (k, v)]
    for b, n in enumerate(LENGTHS):
        for x in (k, v):
            x[b, n:] = unused
            if window[0] is not None:
                x[b, : n - S - window[0]] = unused
    cu = np.array([0, 200, 277])
    with np.errstate(all="raise", under="ignore"):
        flat = flash_decode_rounded(q, k, v, seqlens_kv=LENGTHS, window_size=window)
    for got in (flat, flash_decode_rounded(q, *packed, cu_seqlens_kv=cu, window_size=window)):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("s", [None, 3])
def test_nothing_visible(s: int | None) -> None:
    q, k, v = inputs(np.float16, s, rows=2)
    sinks = np.array([0.5, -40.0, 900.0, -np.inf])
    with np.errstate(all="raise"):
        o, lse = flash_decode_rounded(q, k, v, seqlens_kv=np.array([0, 0]))
        sunk, sunk_lse = flash_decode_rounded(q, k, v, seqlens_kv=np.array([0, 0]), sinks=sinks)
    assert not o.any()
    assert not sunk.any()
    assert np.isneginf(lse).all()
    np.testing.assert_array_equal(sunk_lse, np.broadcast_to(sinks, sunk_lse.shape))
