"""Prefill in the machine's precision: which roundings it has, that it has no others, and that it decides in float64."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reference.budget import BudgetError, check_budget, epsilon
from reference.flash_attention import flash_attention
from reference.flash_attention_bwd import flash_attention_bwd
from reference.rounded import n_orders
from reference.rounded_attention import flash_attention_bwd_rounded, flash_attention_rounded, round_to

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
ROWS, KEYS, Q_HEADS, KV_HEADS, D = 40, 56, 4, 2, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False, "softmax_scale": 0.5},
    "window": {"window_size": (20, None)},
    "2:4": {"sparsity_n": 2, "dense_recent_tokens": 4},
    "3:8": {"sparsity_n": 3, "sparsity_m": 8, "dense_sink_tokens": 2, "dense_recent_tokens": 0},
    "skip": {"skip_softmax_threshold": 0.5, "softmax_scale": 1.0},
    "2:4 skip": {"sparsity_n": 2, "dense_recent_tokens": 0, "skip_softmax_threshold": 0.5, "softmax_scale": 1.0},
}


def inputs(dtype: Any, batch: int = 1) -> tuple[Any, Any, Any, Any]:
    """do, q, k and v of a batch."""
    rng = np.random.default_rng(11)
    rows, keys = (batch, ROWS, Q_HEADS, D), (batch, KEYS, KV_HEADS, D)
    do, q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in (rows, rows, keys, keys))
    return do, q, k, v


@by_dtype
@pytest.mark.parametrize("name", OPTIONS)
def test_near_the_oracle_by_what_rounding_explains(name: str, dtype: Any) -> None:
    """Probabilities, ds and results lose half a spacing each, and o once more in delta; the rest is float32.

    Scores as in `test_rounded`. The ds of a row add up to at most twice `do . v` in size, and the errors of its
    probabilities to at most that of the largest.
    """
    arrays = inputs(dtype)
    _, q, k, v = arrays
    options = OPTIONS[name] | {"tile_q": 16, "tile_kv": 8}
    exact, (o, lse) = flash_attention(q, k, v, **options), flash_attention_rounded(q, k, v, **options)
    assert (exact.stats.tiles_skipped.sum() > 0) == ("skip" in name)
    assert (o.dtype, lse.dtype) == (np.dtype(dtype), np.float32)
    assert (o.shape, lse.shape) == ((n_orders(q), *q.shape), (n_orders(q), *q.shape[:-1]))
    wide = [np.abs(x.astype(np.float64)) for x in arrays]
    scale, half, half32 = options.get("softmax_scale", D**-0.5), epsilon(dtype) / 2, 2.0**-24
    products = scale * np.einsum("bihc,bjhc->bihj", wide[1], wide[2].repeat(2, axis=2)).max()
    weight = (D + 8) * half32 * products * 2 + 2 * (KEYS + 8) * half32  # relative error of a probability
    bound = (2 * half + weight) * wide[3].max()
    assert 0 < np.abs(o.astype(np.float64) - exact.o).max() <= bound
    assert 0 < np.abs(lse - exact.lse).max() <= weight + 8 * half32 * np.abs(exact.lse).max()
    gradients, low = flash_attention_bwd(*arrays, **options), flash_attention_bwd_rounded(*arrays, **options)
    size = wide[0].sum(axis=-1).max()  # of do
    row = size * bound + 2 * (D + 4) * half32 * size * wide[3].max() + (half + weight) * 2 * size * wide[3].max()
    per_key = ROWS * Q_HEADS // KV_HEADS
    bounds = (
        scale * wide[2].max() * row,
        scale * wide[1].max() * row * per_key,
        (half + weight) * wide[0].max() * per_key,
    )
    for x, want, got, bound in zip(arrays[1:], gradients, low, bounds, strict=True):
        assert (got.dtype, got.shape) == (np.dtype(dtype), (n_orders(q), *x.shape))
        assert 0 < np.abs(got.astype(np.float64) - want).max() <= bound + half * np.abs(want).max()


def test_distances_shrink_with_the_type() -> None:
    """The same inputs, exact in all three types, so that only the roundings differ: 8x and 2**13 apart."""
    arrays = inputs(ml_dtypes.bfloat16)
    exact = (flash_attention(*arrays[1:]).o, *flash_attention_bwd(*arrays))
    distance = []
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        same = [x.astype(np.float32).astype(dtype) for x in arrays]
        low = (flash_attention_rounded(*same[1:])[0], *flash_attention_bwd_rounded(*same))
        distance.append([np.abs(x.astype(np.float64) - want).mean() for x, want in zip(low, exact, strict=True)])
    for bfloat16, float16, float32 in zip(*distance, strict=True):
        assert 4 < bfloat16 / float16 < 16
        assert float16 / float32 > 2**8


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_enters_a_second_matmul_is_rounded(dtype: Any) -> None:
    """Two queries whose gradients of a key nearly cancel, so that what is left is what rounding left.

    Scores of keys 0 and 1 are 0 and x, values 0 and 1, and do has opposite signs: o is p, the weight of key 1, and
    ds of key 1 is do * p * (1 - o), with o rounded.
    """
    a, b = 0.2109375, 0.234375  # exact in either type
    q = np.array([[a, 1.0], [b, 1.0]], dtype)[None, :, None]
    k = np.array([[0.0, 0.0], [1.0, 0.0]], dtype)[None, :, None]
    v, do = np.array([0.0, 1.0], dtype)[None, :, None, None], np.array([1.0, -1.0], dtype)[None, :, None, None]
    _, dk, dv = flash_attention_bwd_rounded(do, q, k, v, causal=False, softmax_scale=1.0)
    p = [1 / (1 + math.exp(-x)) for x in (a, b)]
    p_rounded = [float(np.array(x).astype(dtype)) for x in p]
    ds = [x * (1 - o) for x, o in zip(p, p_rounded, strict=True)]
    ds_rounded = [float(np.array(x).astype(dtype)) for x in ds]
    for got, exact, (first, second) in ((dv[:, 0, 1, 0, 0], p, p_rounded), (dk[:, 0, 1, 0, 1], ds, ds_rounded)):
        assert abs(first - second - (exact[0] - exact[1])) > 8 * epsilon(dtype) * abs(first - second)
        np.testing.assert_allclose(got.astype(np.float64), first - second, rtol=epsilon(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_probabilities_are_rounded_and_their_sum_is_not(dtype: Any) -> None:
    """Values 1 and -exp(-1/2) cancel for exact probabilities; what is left is the rounding of exp(-1/2)."""
    p = math.exp(-0.5)
    q, k = np.ones((1, 1, 1, 1), dtype), np.array([0.0, -0.5], dtype)[None, :, None, None]
    v = np.array([-p, 1.0], np.float32)[None, :, None, None]
    o, lse = flash_attention_rounded(q, k, v)
    rounded = float(np.array(p).astype(dtype))
    assert rounded != p
    np.testing.assert_allclose(o.ravel().astype(np.float64), (rounded - p) / (1 + p), rtol=epsilon(dtype))
    np.testing.assert_allclose(lse.ravel(), math.log(1 + p), rtol=2.0**-22)


def test_orders_of_summation_differ() -> None:
    arrays = inputs(np.float32)
    for x in (flash_attention_rounded(*arrays[1:])[0], *flash_attention_bwd_rounded(*arrays)):
        assert len({y.tobytes() for y in x}) == n_orders(arrays[1])


def test_halves_of_the_keys_are_summed_differently() -> None:
    """All keys equal: an error common to all scores would leave the weights equal and o the exact mean."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((1, 4, 1, 128)).astype(np.float32)
    k = np.broadcast_to(rng.standard_normal(128).astype(np.float32), (1, 2, 1, 128))
    v = np.array([1.0, -1.0], np.float32)[None, :, None, None]
    o, _ = flash_attention_rounded(q, k, v, causal=False, softmax_scale=1.0)
    assert (np.abs(o).max(axis=(1, 2, 3, 4)) > 0).sum() >= n_orders(q) * 3 // 4


def test_it_decides_as_the_oracle() -> None:
    """Key 1 is larger by what float32 sums lose; were it a tie, key 0 would stay, or its tile not be skipped."""
    q = np.ones((1, 2, 1, 2), np.float32)
    k = np.array([[1.0, 0.0], [1.0, 2.0**-30], [-50.0, 0.0], [-50.0, 0.0]], np.float32)[None, :, None]
    v = np.arange(4, dtype=np.float32)[None, :, None, None]
    options: dict[str, Any] = {"causal": False, "softmax_scale": 1.0}
    o, _ = flash_attention_rounded(q, k, v, sparsity_n=1, dense_recent_tokens=0, **options)
    assert (o == 1).all()
    o, _ = flash_attention_rounded(q, k[:, ::-1], v, skip_softmax_threshold=1.0, tile_kv=1, **options)
    weights = np.exp([-51.0, -51.0, 0.0])
    np.testing.assert_allclose(o, weights @ [0, 1, 2] / weights.sum(), rtol=1e-6)


def test_the_twins_round_to_their_oracles() -> None:
    """In float32 they are much closer to their oracles than those are to dense: the same keys in the same tiles."""
    arrays = inputs(np.float32)
    dense = (flash_attention(*arrays[1:]).o, *flash_attention_bwd(*arrays))
    for name in ("2:4", "3:8", "2:4 skip"):
        options = OPTIONS[name] | {"softmax_scale": D**-0.5, "tile_q": 16, "tile_kv": 8}
        if "skip" in name:
            options["skip_softmax_threshold"] = 0.9
        exact = (flash_attention(*arrays[1:], **options).o, *flash_attention_bwd(*arrays, **options))
        low = (flash_attention_rounded(*arrays[1:], **options)[0], *flash_attention_bwd_rounded(*arrays, **options))
        for x, want, full in zip(low, exact, dense, strict=True):
            assert 0 < np.abs(x - want).max() < 1e-3 * np.abs(full - want).max()


@by_dtype
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("plain", {"window_size": (54, None)}),
        ("plain", {"softmax_scale": 0.25 * 1.01}),
        ("2:4", {"dense_recent_tokens": 5}),
        ("2:4", {"sparsity_n": 3}),
        ("3:8", {"dense_sink_tokens": 3}),
        ("skip", {"skip_softmax_threshold": 0.45}),
        ("skip", {"tile_kv": 16}),
    ],
    ids=str,
)
def test_a_fault_is_over_budget(name: str, fault: dict[str, Any], dtype: Any) -> None:
    arrays = inputs(dtype)
    options = OPTIONS[name] | {"tile_q": 16, "tile_kv": 8}
    right, wrong = (
        (flash_attention(*arrays[1:], **x).o, *flash_attention_bwd(*arrays, **x)) for x in (options, options | fault)
    )
    low = (flash_attention_rounded(*arrays[1:], **options)[0], *flash_attention_bwd_rounded(*arrays, **options))
    for got, exact, rounded in zip(wrong, right, low, strict=True):
        check_budget("right", exact.astype(dtype), exact, rounded, dtype)
        with pytest.raises(BudgetError):
            check_budget("wrong", got.astype(dtype), exact, rounded, dtype)


@by_dtype
def test_another_delta_is_over_budget(dtype: Any) -> None:
    """Gradients of a backward that forgets delta, or takes it of one row for another."""
    do, q, k, v = arrays = inputs(dtype)
    exact, (dq, dk, _) = flash_attention_bwd(*arrays), flash_attention_bwd_rounded(*arrays)
    # Without delta ds is p * (do . v), and what is missing in dq is scale * delta times the mean key.
    delta = (flash_attention(q, k, v).o * do.astype(np.float64)).sum(axis=-1, keepdims=True)
    mean_key = flash_attention(q, k, k).o
    for error in (delta, delta - np.roll(delta, 1, axis=2)):
        with pytest.raises(BudgetError):
            check_budget("dq", (exact.dq + D**-0.5 * error * mean_key).astype(dtype), exact.dq, dq, dtype)
        missing = D**-0.5 * flash_attention_bwd(error * q.astype(np.float64), q, k, v).dv
        with pytest.raises(BudgetError):
            check_budget("dk", (exact.dk + missing).astype(dtype), exact.dk, dk, dtype)


def test_packed_is_a_batch_and_unread_rows_may_hold_anything() -> None:
    _, q, k, v = arrays = inputs(np.float16, batch=2)
    options = OPTIONS["2:4 skip"] | {"tile_q": 16, "tile_kv": 8, "window_size": (10, None)}
    want = (*flash_attention_rounded(q, k, v, **options), *flash_attention_bwd_rounded(*arrays, **options))
    spans = {"cu_seqlens_q": np.array([0, ROWS, 2 * ROWS]), "cu_seqlens_kv": np.array([0, KEYS, 2 * KEYS])}
    k[:, : KEYS - ROWS - 10], v[:, : KEYS - ROWS - 10] = np.nan, np.nan
    padding = np.full((3, Q_HEADS, D), np.nan, np.float16)
    packed = [np.concatenate([x.reshape(-1, *x.shape[2:]), padding[:, : x.shape[2]]]) for x in arrays]
    with np.errstate(all="raise", under="ignore"):
        got = (
            *flash_attention_rounded(packed[1], packed[2], packed[3], **spans, **options),
            *flash_attention_bwd_rounded(packed[0], packed[1], packed[2], packed[3], **spans, **options),
        )
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(a[:, :-3], b.reshape(len(b), -1, *b.shape[3:]))
        assert (np.isneginf(a[:, -3:]) if i == 1 else a[:, -3:] == 0).all()


def test_nothing_visible() -> None:
    do, q, k, v = inputs(np.float32)
    with np.errstate(all="raise"):
        o, lse = flash_attention_rounded(q, k[:, :0], v[:, :0])
        gradients = flash_attention_bwd_rounded(do, q, k[:, :0], v[:, :0])
        assert not flash_attention_bwd_rounded(do, q, k[:, :1], v[:, :1], window_size=(0, 0))[0][:, :, :-1].any()
    assert not o.any()
    assert np.isneginf(lse).all()
    assert not any(x.any() for x in gradients)
    none = flash_attention_rounded(q[:, :0], k, v)[0], *flash_attention_bwd_rounded(do[:, :0], q[:, :0], k, v)
    assert [x.shape[1:] for x in none] == [(1, 0, Q_HEADS, D), (1, 0, Q_HEADS, D), k.shape, v.shape]
    assert not any(x.any() for x in none)
    with np.errstate(all="raise", under="ignore"):
        o, lse = flash_attention_rounded(q, k[:, :2], v[:, :2])
    assert np.isneginf(lse).sum() == lse.size * (ROWS - 2) // ROWS
    np.testing.assert_array_equal(o[:, :, -2], np.tile(v[:, 0].repeat(2, axis=1), (len(o), 1, 1, 1)))


def test_shape_of_do() -> None:
    do, q, k, v = inputs(np.float32)
    with pytest.raises(ValueError, match="do: received shape"):
        flash_attention_bwd_rounded(do[:, 1:], q, k, v)


@by_dtype
def test_rounding_is_that_of_the_type(dtype: Any) -> None:
    """Every number of two bytes as float32, its neighbours, and the middles between two of them."""
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.append((finite[1:] + finite[:-1]) / 2, np.array([65519.0, 65520.0, 65536.0, 1e30], np.float32))
    x = np.concatenate([finite, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e38))])
    x = np.concatenate([x, -x, np.random.default_rng(3).standard_normal(1000).astype(np.float32), [np.inf, -np.inf]])
    with np.errstate(over="ignore"):
        want = x.astype(np.float32).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(round_to(x.astype(np.float32), dtype), want)
    assert np.isnan(round_to(np.array([np.nan], np.float32), dtype)).all()
