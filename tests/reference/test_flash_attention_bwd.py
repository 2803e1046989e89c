"""The analytic gradients against differences of the forward, sums written out and torch's autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reference.flash_attention import flash_attention
from reference.flash_attention_bwd import flash_attention_bwd

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
Q_HEADS, KV_HEADS, D, D_V = 4, 2, 3, 2
LENS_Q, LENS_KV = [11, 5, 1, 0, 2, 6], [11, 18, 7, 3, 0, 4]
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window_size": (3, None)},
    "window on both sides": {"causal": False, "window_size": (2, 1)},
    "2:4": {"sparsity_n": 2, "dense_recent_tokens": 0},
    "1:4 with exceptions": {"sparsity_n": 1, "dense_sink_tokens": 2, "dense_recent_tokens": 3},
    "3:8": {"sparsity_n": 3, "sparsity_m": 8, "dense_recent_tokens": 1, "causal": False},
    "skip": {"skip_softmax_threshold": 0.6},
    "2:4 skip": {"skip_softmax_threshold": 0.9, "sparsity_n": 2, "dense_recent_tokens": 0},
}
by_option = pytest.mark.parametrize("name", OPTIONS)


def inputs(seed: int = 0) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Packed do, q, k, v with rows that no sequence owns, and what every call is given."""
    rng = np.random.default_rng(seed)
    cu_q, cu_kv = np.cumsum([1, *LENS_Q]), np.cumsum([2, *LENS_KV])
    n, m = int(cu_q[-1]) + 2, int(cu_kv[-1]) + 1
    shapes = (n, Q_HEADS, D_V), (n, Q_HEADS, D), (m, KV_HEADS, D), (m, KV_HEADS, D_V)
    do, q, k, v = (rng.standard_normal(shape) for shape in shapes)
    call = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "softmax_scale": 1.3, "tile_q": 4, "tile_kv": 3}
    return do, q, k, v, call


@by_option
def test_central_differences(name: str) -> None:
    """Along random directions. No decision is closer to the other one than a step moves the scores."""
    do, q, k, v, call = inputs(1)
    call |= OPTIONS[name]
    stats = flash_attention(q, k, v, **call).stats
    assert (stats.tiles_skipped.sum() > 0) == ("skip" in name)
    assert np.isfinite(stats.selection_margin).any() == ("sparsity_n" in call)
    step = 1e-5
    assert min(stats.margin.min(), stats.selection_margin.min()) > 100 * step
    gradients = flash_attention_bwd(do, q, k, v, **call)
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        assert np.abs(gradient).max() > 0.1
        for _ in range(5):
            direction = rng.standard_normal(gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = [q, k, v]
                moved[i] = moved[i] + sign * step * direction
                ends.append((do * flash_attention(moved[0], moved[1], moved[2], **call).o).sum())
            np.testing.assert_allclose(
                (gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-7
            )


def weights_written_out(q: Any, k: Any, v: Any, call: dict[str, Any]) -> dict[tuple[int, int, int], float]:
    """p of every query row, head and key row that counts, found by giving one key at a time the value 1."""
    weights = {}
    for j in range(len(k)):
        v = np.zeros((*k.shape[:2], 1))
        v[j] = 1.0
        o = flash_attention(q, k, v, **call).o[..., 0]
        weights |= {(int(i), int(h), j): float(o[i, h]) for i, h in np.argwhere(o)}
    return weights


@by_option
def test_sums_written_out(name: str) -> None:
    """From the probabilities alone, each one alone."""
    do, q, k, v, call = inputs(3)
    call |= OPTIONS[name]
    o, scale = flash_attention(q, k, v, **call).o, call["softmax_scale"]
    want = [np.zeros_like(x) for x in (q, k, v)]
    for (i, h, j), p in weights_written_out(q, k, v, call).items():
        kv = h // 2
        ds = p * (do[i, h] @ v[j, kv] - o[i, h] @ do[i, h])
        want[0][i, h] += scale * ds * k[j, kv]
        want[1][j, kv] += scale * ds * q[i, h]
        want[2][j, kv] += p * do[i, h]
    for got, expected in zip(flash_attention_bwd(do, q, k, v, **call), want, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, **CLOSE)


@by_option
def test_autograd(name: str) -> None:
    """Torch differentiates a softmax whose mask is that of the forward's probabilities."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    do, q, k, v, call = inputs(4)
    call |= OPTIONS[name]
    weights = weights_written_out(q, k, v, call)
    mask = torch.zeros(Q_HEADS, len(q), len(k), dtype=torch.bool)
    for i, h, j in weights:
        mask[h, i, j] = True
    leaves = [torch.tensor(x.tolist(), dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    tq, tk, tv = (x.transpose(0, 1) for x in leaves)
    tk, tv = (x.repeat_interleave(2, dim=0) for x in (tk, tv))
    scores = (call["softmax_scale"] * tq @ tk.transpose(1, 2)).masked_fill(~mask, -1e300)
    p = torch.softmax(scores, dim=-1) * mask.any(dim=-1, keepdim=True)
    ((p @ tv).transpose(0, 1) * torch.tensor(do.tolist(), dtype=torch.float64)).sum().backward()
    for got, leaf in zip(flash_attention_bwd(do, q, k, v, **call), leaves, strict=True):
        np.testing.assert_allclose(got, leaf.grad.tolist(), **CLOSE)


def test_one_row_by_hand() -> None:
    """Two keys of weight 1/4 and 3/4, values 0 and 4, do 2: o is 3, delta 6, ds -1.5 and 1.5."""
    k = np.array([0.0, math.log(3.0)])[None, :, None, None]
    v, one = np.array([0.0, 4.0])[None, :, None, None], np.ones((1, 1, 1, 1))
    dq, dk, dv = flash_attention_bwd(2 * one, one, k, v, softmax_scale=1.0)
    np.testing.assert_allclose(dq.ravel(), 1.5 * math.log(3.0), **CLOSE)
    np.testing.assert_allclose(dk.ravel(), [-1.5, 1.5], **CLOSE)
    np.testing.assert_allclose(dv.ravel(), [0.5, 1.5], **CLOSE)


def test_decisions_are_those_of_the_running_maximum() -> None:
    """Scores 0 and 5: the first tile is kept, as nothing came before, though it is far below the final lse.

    A test of the tiles against lse would give its value no gradient.
    """
    k = np.array([0.0, 5.0])[None, :, None, None]
    v, one = np.array([1.0, 3.0])[None, :, None, None], np.ones((1, 1, 1, 1))
    options: dict[str, Any] = {"softmax_scale": 1.0, "skip_softmax_threshold": 0.1, "tile_kv": 1}
    dv = flash_attention_bwd(one, one, k, v, **options).dv
    np.testing.assert_allclose(dv.ravel(), [1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))], **CLOSE)
    turned = flash_attention_bwd(one, one, k[:, ::-1], v[:, ::-1], **options).dv
    assert turned.ravel().tolist() == [1.0, 0.0]


def test_replayed_decisions() -> None:
    """Decisions of other scores: gradients of attention with the keys of the dropped tiles out of sight."""
    do, q, k, v, call = inputs(5)
    kept = flash_attention(q, k[::-1], v, skip_softmax_threshold=0.9, **call).stats.kept
    got = flash_attention_bwd(do, q, k, v, kept=kept, **call)
    own = flash_attention_bwd(do, q, k, v, skip_softmax_threshold=0.9, **call)
    dense = flash_attention_bwd(do, q, k, v, **call)
    assert min(np.abs(a - b).max() for other in (own, dense) for a, b in zip(got, other, strict=True)) > 0.1
    weights = weights_written_out(q, k, v, call | {"kept": kept})
    want = np.zeros_like(v)
    for (i, h, j), p in weights.items():
        want[j, h // 2] += p * do[i, h]
    np.testing.assert_allclose(got.dv, want, **CLOSE)
    again = flash_attention_bwd(do, q, k, v, skip_softmax_threshold=0.9, kept=kept, **call)
    for a, b in zip(again, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_seen_has_no_gradient() -> None:
    """Rows of no sequence, queries without keys, keys that no query sees; and they may hold anything."""
    do, q, k, v, call = inputs(6)
    call |= {"window_size": (3, None), "sparsity_n": 2}
    want = flash_attention_bwd(do, q, k, v, **call)
    cu_q, cu_kv = call["cu_seqlens_q"], call["cu_seqlens_kv"]
    blind = [0, *range(cu_q[4], cu_q[5] + 2), cu_q[-1], cu_q[-1] + 1]
    unread = [0, 1, cu_kv[-1], *range(cu_kv[1], cu_kv[2] - 5 - 3), *range(cu_kv[2], cu_kv[3] - 1 - 3)]
    unread += range(cu_kv[3], cu_kv[4])
    assert not want.dq[blind].any()
    assert not want.dk[unread].any()
    assert not want.dv[unread].any()
    assert (np.abs(np.delete(want.dv, unread, axis=0)) > 0).all()
    k[unread], v[unread] = np.nan, np.nan
    for a, b in zip(flash_attention_bwd(do, q, k, v, **call), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_is_its_sequences_end_to_end() -> None:
    rng = np.random.default_rng(7)
    shapes = ((2, 6, Q_HEADS, D_V), (2, 6, Q_HEADS, D), (2, 8, KV_HEADS, D), (2, 8, KV_HEADS, D_V))
    arrays = [rng.standard_normal(s) for s in shapes]
    packed = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    got = flash_attention_bwd(*arrays, tile_q=4)
    want = flash_attention_bwd(*packed, cu_seqlens_q=np.array([0, 6, 12]), cu_seqlens_kv=np.array([0, 8, 16]), tile_q=4)
    for a, b, x in zip(got, want, arrays[1:], strict=True):
        assert a.shape == x.shape
        np.testing.assert_array_equal(a, b.reshape(x.shape))


def test_arguments_out_of_range() -> None:
    do, q, k, v, call = inputs()
    for wrong in (do[:-1], do[..., :1], do[None]):
        with pytest.raises(ValueError, match="do: received shape"):
            flash_attention_bwd(wrong, q, k, v, **call)
    with pytest.raises(ValueError, match="sparsity_m: received 5"):
        flash_attention_bwd(do, q, k, v, sparsity_m=5, **call)
