"""The batched decode oracle against sums written out, identities and edges known by hand.

Warnings are errors in this project's tests, so the empty cases also show that nothing is divided by zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reference.decode import Attention, gqa_decode_attention
from reference.flash_decode import flash_decode

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH, S, Q_HEADS, KV_HEADS, D, ROWS = 2, 3, 4, 2, 5, 9
LENGTHS = [9, 4]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": -0.7},
    "window": {"window_size": (2, None)},
    "window on both sides": {"window_size": (3, 1)},
    "soft cap": {"softcap": 0.8},
    "sinks": {"sinks": np.array([0.5, -3.0, 2.0, 0.0])},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, -0.125, 0.0])},
    "one scale per cache": {"k_scale": 0.5, "v_scale": 3.0},
    "a scale per head": {"k_scale": np.array([0.5, 2.0]), "v_scale": [3.0, -1.0]},
}
OPTIONS["all"] = {name: value for one in list(OPTIONS.values()) for name, value in one.items()}


def inputs(s: int | None = S, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    new = () if s is None else (s,)
    shapes = ((BATCH, *new, Q_HEADS, D), (BATCH, ROWS, KV_HEADS, D), (BATCH, ROWS, KV_HEADS, D))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v


def head_written_out(
    q: list[float], k: list[list[float]], v: list[list[float]], p: int, h: int, options: dict[str, Any]
) -> tuple[list[float], float]:
    """One head of one token at position p: floats, each key asked if it is visible, exp without a maximum."""
    kv = h // (Q_HEADS // KV_HEADS)
    scale = options.get("softmax_scale", len(q) ** -0.5)
    left, right = options.get("window_size", (None, None))
    k_scale, v_scale = (np.broadcast_to(options.get(x, 1.0), KV_HEADS).tolist()[kv] for x in ("k_scale", "v_scale"))
    weights: list[float] = []
    for j, key in enumerate(k):
        x = scale * sum(a * b * k_scale for a, b in zip(q, key, strict=True))
        if "softcap" in options:
            x = options["softcap"] * math.tanh(x / options["softcap"])
        if "alibi_slopes" in options:
            x += float(options["alibi_slopes"][h]) * (j - p)
        hidden = j > p or (left is not None and j < p - left) or (right is not None and j > p + right)
        weights.append(0.0 if hidden else math.exp(x))
    total = math.fsum(weights)
    if "sinks" in options:
        total += math.exp(options["sinks"][h])
    if total == 0.0:
        return [0.0] * len(q), -math.inf
    o = [
        math.fsum(w * x * v_scale for w, x in zip(weights, column, strict=True)) / total
        for column in zip(*v, strict=True)
    ]
    return o, math.log(total)


def check_written_out(got: Attention, q: Any, k: Any, v: Any, lengths: list[int], options: dict[str, Any]) -> None:
    """q with the axis of new tokens."""
    assert got.o.dtype == got.lse.dtype == np.float64
    assert got.o.shape == q.shape
    assert got.lse.shape == q.shape[:-1]
    for b, i, h in np.ndindex(q.shape[:3]):
        n, kv = lengths[b], h // (Q_HEADS // KV_HEADS)
        keys, values = (x[b, :n, kv].tolist() for x in (k, v))
        p = i + n - q.shape[1]
        o, lse = head_written_out(q[b, i, h].tolist(), keys, values, p, h, options)
        np.testing.assert_allclose(got.o[b, i, h], o, **CLOSE)
        np.testing.assert_allclose(got.lse[b, i, h], lse, **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_token_equals_the_sum_written_out(name: str) -> None:
    q, k, v = inputs(None)
    got = flash_decode(q, k, v, seqlens_kv=np.array(LENGTHS), **OPTIONS[name])
    check_written_out(Attention(got.o[:, None], got.lse[:, None]), q[:, None], k, v, LENGTHS, OPTIONS[name])
    assert got.o.shape == (BATCH, Q_HEADS, D)
    assert got.lse.shape == (BATCH, Q_HEADS)


@pytest.mark.parametrize("name", OPTIONS)
def test_new_tokens_equal_the_sum_written_out(name: str) -> None:
    q, k, v = inputs()
    check_written_out(
        flash_decode(q, k, v, seqlens_kv=np.array(LENGTHS), **OPTIONS[name]), q, k, v, LENGTHS, OPTIONS[name]
    )


@pytest.mark.parametrize("lengths", [[2, 1], [0, 9], [3, 0]], ids=str)
def test_sequences_shorter_than_their_new_tokens(lengths: list[int]) -> None:
    q, k, v = inputs()
    got = flash_decode(q, k, v, seqlens_kv=np.array(lengths))
    check_written_out(got, q, k, v, lengths, {})
    blind = [(b, i) for b in range(BATCH) for i in range(S) if i + lengths[b] < S]
    assert blind == [(b, i) for b, i in np.ndindex(BATCH, S) if np.isneginf(got.lse[b, i]).all()]


def test_every_option_changes_the_result() -> None:
    """A table of options that were neutral would test nothing."""
    q, k, v = inputs()
    plain = flash_decode(q, k, v).o
    for name in set(OPTIONS) - {"plain"}:
        assert np.abs(flash_decode(q, k, v, **OPTIONS[name]).o - plain).max() > 1e-3, name


def test_one_sequence_is_the_single_sequence_oracle() -> None:
    q, k, v = inputs(None)
    got = flash_decode(q, k, v)
    for b in range(BATCH):
        one = gqa_decode_attention(q[b], k[b], v[b])
        np.testing.assert_allclose(got.o[b], one.o, **CLOSE)
        np.testing.assert_allclose(got.lse[b], one.lse, **CLOSE)


def test_uniform_scores_give_the_mean() -> None:
    q, k, v = inputs(None)
    got = flash_decode(q, np.ones_like(k), v, seqlens_kv=np.array([7, 2]), softmax_scale=0.0)
    for b, n in enumerate([7, 2]):
        np.testing.assert_allclose(got.o[b], v[b, :n].mean(axis=0).repeat(2, axis=0), **CLOSE)
        np.testing.assert_allclose(got.lse[b], math.log(n), **CLOSE)


def test_one_visible_key_gives_its_value() -> None:
    q, k, v = inputs()
    got = flash_decode(q, k, v, seqlens_kv=np.array(LENGTHS), window_size=(0, 0))
    for b, i, h in np.ndindex(BATCH, S, Q_HEADS):
        p = LENGTHS[b] - S + i
        np.testing.assert_array_equal(got.o[b, i, h], v[b, p, h // 2])
        np.testing.assert_allclose(got.lse[b, i, h], D**-0.5 * (q[b, i, h] @ k[b, p, h // 2]), **CLOSE)


@pytest.mark.parametrize(
    ("length", "s", "window", "seen"),
    [
        (6, 1, (None, None), [{0, 1, 2, 3, 4, 5}]),
        (6, 1, (2, None), [{3, 4, 5}]),
        (6, 1, (0, 3), [{5}]),
        (6, 1, (5, 0), [{0, 1, 2, 3, 4, 5}]),
        (6, 1, (4, 0), [{1, 2, 3, 4, 5}]),
        (6, 3, (None, None), [{0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]),
        (6, 3, (1, None), [{2, 3}, {3, 4}, {4, 5}]),
        (6, 3, (4, 9), [{0, 1, 2, 3}, {0, 1, 2, 3, 4}, {1, 2, 3, 4, 5}]),
        (2, 4, (1, None), [set(), set(), {0}, {0, 1}]),
        (2, 4, (None, 0), [set(), set(), {0}, {0, 1}]),
    ],
    ids=str,
)
def test_edges_of_window_and_causality(length: int, s: int, window: Any, seen: list[set[int]]) -> None:
    """Values are unit vectors and all scores equal, so o says which keys were seen."""
    v = np.eye(8)[None, :, None]
    got = flash_decode(
        np.zeros((1, s, 1, 8)), np.zeros((1, 8, 1, 8)), v, seqlens_kv=np.array([length]), window_size=window
    )
    for i, keys in enumerate(seen):
        expected = np.array([1 / len(keys) if j in keys else 0.0 for j in range(8)])
        np.testing.assert_allclose(got.o[0, i, 0], expected, **CLOSE)
        assert got.lse[0, i, 0] == pytest.approx(math.log(len(keys)) if keys else -math.inf)


def test_nothing_visible_gives_zero_and_the_sink() -> None:
    q, k, v = inputs()
    none = np.array([0, 0])
    with np.errstate(all="raise"):
        got = flash_decode(q, k, v, seqlens_kv=none, softcap=2.0, alibi_slopes=np.ones(Q_HEADS))
        sunk = flash_decode(q, k, v, seqlens_kv=none, sinks=np.array([0.5, -40.0, 900.0, -np.inf]))
    np.testing.assert_array_equal(got.o, np.zeros_like(q))
    np.testing.assert_array_equal(got.lse, np.full((BATCH, S, Q_HEADS), -np.inf))
    np.testing.assert_array_equal(sunk.o, np.zeros_like(q))
    np.testing.assert_array_equal(sunk.lse, np.broadcast_to([0.5, -40.0, 900.0, -np.inf], (BATCH, S, Q_HEADS)))


@pytest.mark.parametrize("unused", [np.nan, np.inf])
def test_unused_rows_are_not_looked_at(unused: float) -> None:
    q, k, v = inputs()
    clean = flash_decode(q, k, v, seqlens_kv=np.array(LENGTHS), window_size=(1, None))
    for b, n in enumerate(LENGTHS):
        for x in (k, v):
            x[b, n:] = unused
            x[b, : n - S - 1] = unused  # before the window of the first new token
    with np.errstate(all="raise"):
        got = flash_decode(q, k, v, seqlens_kv=np.array(LENGTHS), window_size=(1, None))
    np.testing.assert_array_equal(got.o, clean.o)
    np.testing.assert_array_equal(got.lse, clean.lse)


def test_nan_in_a_used_row_shows() -> None:
    q, k, v = inputs(None)
    k[0, 0] = np.nan
    got = flash_decode(q, k, v)
    assert np.isnan(got.o[0]).all()
    assert np.isfinite(got.o[1]).all()


def one_head(seed: int = 3) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1, 1, 4)), rng.standard_normal((1, 6, 1, 4)), rng.standard_normal((1, 6, 1, 4))


def test_slopes_are_a_bias_in_one_more_dimension() -> None:
    q, k, v = one_head()
    bias = 0.3 * (np.arange(6.0) - 5)
    wide_q = np.concatenate([q, np.full((1, 1, 1), 2.0)], axis=-1)
    wide_k = np.concatenate([k, bias[None, :, None, None]], axis=-1)
    got = flash_decode(q, k, v, alibi_slopes=np.array([0.3]), softmax_scale=0.5)
    expected = flash_decode(wide_q, wide_k, v, softmax_scale=0.5)
    np.testing.assert_allclose(got.o, expected.o, **CLOSE)
    np.testing.assert_allclose(got.lse, expected.lse, **CLOSE)


def test_a_sink_is_a_key_without_value() -> None:
    q, k, v = one_head()
    wide_q = np.concatenate([q, np.full((1, 1, 1), 2.0)], axis=-1)
    wide_k = np.zeros((1, 7, 1, 5))
    wide_k[:, 1:, :, :4], wide_k[:, 0, :, 4] = k, 1.25
    wide_v = np.concatenate([np.zeros((1, 1, 1, 4)), v], axis=1)
    got = flash_decode(q, k, v, sinks=np.array([1.25]), softmax_scale=0.5)
    expected = flash_decode(wide_q, wide_k, wide_v, softmax_scale=0.5)
    np.testing.assert_allclose(got.o, expected.o, **CLOSE)
    np.testing.assert_allclose(got.lse, expected.lse, **CLOSE)


def test_soft_cap_at_its_limits() -> None:
    """cap * tanh(x / cap) is x - x^3 / (3 cap^2) for a large cap, and the sign of x times a small one."""
    q, k, v = inputs()
    plain, wide = flash_decode(q, k, v), flash_decode(q, k, v, softcap=1e4)
    x = np.abs(D**-0.5 * np.einsum("bihc,bjhc->bihj", q, k.repeat(2, axis=2))).max()
    bound = x**3 / (3 * 1e4**2)
    assert 0 < np.abs(wide.lse - plain.lse).max() <= bound
    narrow = flash_decode(q, k, v, softcap=1e-9)
    np.testing.assert_allclose(narrow.lse[:, -1], math.log(ROWS), rtol=1e-8)


def test_scales_are_those_of_the_stored_cache() -> None:
    q, k, v = inputs()
    ks, vs = np.array([0.25, 3.0]), np.array([7.0, 0.5])
    got = flash_decode(q, k / ks[:, None], v / vs[:, None], k_scale=ks, v_scale=vs)
    expected = flash_decode(q, k, v)
    np.testing.assert_allclose(got.o, expected.o, **CLOSE)
    np.testing.assert_allclose(got.lse, expected.lse, **CLOSE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seqlens_kv": np.array([10, 1])}, ValueError, "seqlens_kv: received 10, allowed 0 to 9"),
        ({"seqlens_kv": np.array([-1, 1])}, ValueError, "seqlens_kv: received -1, allowed 0 to 9"),
        ({"seqlens_kv": np.array([1])}, ValueError, r"seqlens_kv: received shape \(1,\), allowed \(2,\)"),
        ({"seqlens_kv": np.array([1.0, 2.0])}, TypeError, "seqlens_kv: received float64, allowed integers"),
        ({"cu_seqlens_kv": np.array([0, 1, 2])}, ValueError, "k, v: received shapes"),
        ({"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed"),
        ({"softcap": 0.0}, ValueError, "softcap: received 0.0, allowed"),
        ({"softcap": math.nan}, ValueError, "softcap: received nan, allowed"),
        ({"sinks": np.zeros(2)}, ValueError, r"sinks: received shape \(2,\), allowed \(4,\)"),
        ({"alibi_slopes": 0.5}, ValueError, r"alibi_slopes: received shape \(\), allowed \(4,\)"),
        ({"k_scale": np.ones(4)}, ValueError, r"k_scale: received shape \(4,\), allowed \(2,\)"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_decode(*inputs(), **options)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="q heads: received 3, allowed a multiple of the 2 KV heads"):
        flash_decode(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="q: received shape"):
        flash_decode(q[0, 0], k, v)
    with pytest.raises(ValueError, match="k, v: received shapes"):
        flash_decode(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="k: received head dim 4, allowed the 5 of q"):
        flash_decode(q, k[..., :4], v)
    with pytest.raises(ValueError, match="k: received 1 sequences, allowed the 2 of q"):
        flash_decode(q, k[:1], v[:1])
