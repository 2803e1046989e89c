"""Flash decoding over head dims, groups, new tokens and lengths, and keys at the edges of what is worked on at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed._cases import FlashCase
from contributed.flash_decode import flash_decode
from reference.flash_decode import flash_decode as oracle
from tests.kernels.flash import BF16, by_layout, by_target, check, geometry_of, normal, traced


@by_layout
@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 112, 128, 192, 256])
def test_head_dims(head_dim: int, d_major: bool) -> None:
    """Of elements of four bytes and of two."""
    for dtype in (np.dtype(np.float32), BF16):
        check(FlashCase("d", 4, 2, head_dim, (150, 17), d_major=d_major, unused=1), dtype, "trn2")


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 10, 12, 16, 33, 64, 71, 128])
def test_groups(group: int) -> None:
    """Each in both layouts, in turn of two KV heads or of one with several tiles."""
    for one, d_major in enumerate((group % 2 == 0, group % 2 == 1)):
        case = FlashCase("g", group, 1, 64, (1100,)) if one else FlashCase("g", 2 * group, 2, 64, (140, 5))
        check(replace(case, d_major=d_major), (BF16, np.dtype(np.float16))[one], ("trn1", "trn3")[one])


@pytest.mark.parametrize(("s", "group"), [(1, 128), (2, 3), (2, 64), (4, 8), (4, 32), (7, 1), (7, 18), (128, 1)])
def test_new_tokens(s: int, group: int) -> None:
    """Also of sequences that are shorter than their new tokens: the first of these see nothing."""
    lengths = (150, s, s + 1, max(s - 1, 0))
    more = group > 8  # in turn the layout of the simple case and of the other
    check(FlashCase("s", 2 * group, 2, 64, lengths, s=s, d_major=more, unused=2), BF16, "trn2")
    check(FlashCase("s", group, 1, 64, lengths, s=s, d_major=not more, window=3, alibi=True), BF16, "trn2")


def test_a_token_before_its_sequence_sees_nothing() -> None:
    q, k = normal(2, 4, 2, 64), normal(2, 3, 1, 64)
    o, lse = flash_decode(q, k, k, seqlens_kv=np.array([2, 0]), return_lse=True, target="trn2")
    for b, hidden in ((0, 2), (1, 4)):
        assert (o[b, :hidden].astype(np.float32) == 0).all()
        assert (lse[b, :hidden] == -np.inf).all()
    np.testing.assert_array_equal(o[0, 2], k[0, :1, 0].repeat(2, axis=0))
    assert np.isfinite(lse[0, 2:]).all()


@by_layout
def test_lengths_around_the_edges_of_tiles_and_items(d_major: bool) -> None:
    """A group of 128 makes items of at most 1024 keys or 2048."""
    q, k = normal(1, 128, 16), normal(1, 4200, 1, 16)
    item = geometry_of(q, k, k, k_d_major=d_major).item_keys
    tokens = item // 128
    assert 2 * item + 1 <= 4200
    edges = [0, 1, tokens - 1, tokens, tokens + 1, 127, 128, 129, item - 1, item, item + 1]
    lengths = tuple(sorted({max(0, n) for n in [*edges, item + tokens, 2 * item - 1, 2 * item, 2 * item + 1]}))
    unused = 4200 - max(lengths)  # the same room, and with it the same items
    check(FlashCase("n", 128, 1, 16, lengths, d_major=d_major, unused=unused), BF16, "trn2")


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513])
def test_short_lengths_alone_and_with_others(length: int, dtype: Any) -> None:
    check(FlashCase("n", 2, 1, 64, (length,)), dtype, "trn2")
    check(FlashCase("n", 2, 1, 64, (length, 0, 600)), dtype, "trn2", seed=2)


# -- needles: each query row has a key of its own, which takes all of the softmax


def found(
    positions: Any, length: int, n_kv_heads: int, d: int = 64, k_type: Any = BF16, target: str = "trn2", **options: Any
) -> Any:
    """Look for needles at `positions`, a multiple of `n_kv_heads` in number; o has to be their values, bit by bit."""
    rng = np.random.default_rng(5)
    positions = np.asarray(positions).reshape(n_kv_heads, -1)
    group = positions.shape[1]
    q = rng.standard_normal((n_kv_heads, group, d))
    # Rows of norm 8, and needles that score 64 * 8 / 8.
    q = (8 * q / np.linalg.norm(q, axis=-1, keepdims=True)).astype(BF16)
    k, v = (rng.standard_normal((1, length, n_kv_heads, d)).astype(k_type) for _ in "kv")
    v[v == 0] = 1  # o has no sign of zero
    for h in range(n_kv_heads):
        k[0, positions[h], h] = q[h].astype(k_type)
    queries = q.reshape(1, n_kv_heads * group, d)
    (o, lse), runs = traced(queries, k, v, softmax_scale=1.0, return_lse=True, target=target, **options)
    for h in range(n_kv_heads):
        rows = slice(h * group, (h + 1) * group)
        np.testing.assert_array_equal(o[0, rows], v[0, positions[h], h].astype(BF16), err_msg=f"head {h}")
    exact = oracle(queries, k, v, softmax_scale=1.0)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5)
    return runs[0]


@pytest.mark.parametrize(("n_splits", "d_major"), [(1, False), (3, True)])
def test_a_needle_is_found_at_every_position(n_splits: int, d_major: bool) -> None:
    """1152 keys, 128 query rows for each of nine KV heads: granules, edges and splits."""
    found(np.random.default_rng(1).permutation(1152), 1152, 9, n_splits=n_splits, k_d_major=d_major)


@by_layout
@by_target
def test_needles_where_items_begin_and_end(target: str, d_major: bool) -> None:
    """Keys around the edges of items, granules and the edge keys of a long cache."""
    length, options = 9011, {"target": target, "k_d_major": d_major}
    q, k = np.zeros((1, 16, 128), BF16), np.zeros((1, length, 1, 128), BF16)
    geometry = geometry_of(q, k, k, **options)
    item, tokens = geometry.item_keys, geometry.tokens
    last = length // tokens * tokens  # where edges begin
    edges = [i * item + offset for i in range(length // item + 1) for offset in (-1, 0, 1, tokens - 1, tokens)]
    edges += [last - 1, last, last + 1, length - 2, length - 1, tokens * 127, tokens * 127 - 1, 127, 128, 2047, 2048]
    positions = sorted({n for n in edges if 0 <= n < length})
    positions += [n for n in range(5000, 5100) if n not in positions][: -len(positions) % 16]
    run = found(positions, length, len(positions) // 16, d=128, **options)
    assert run.item_keys == item
    assert len(list(run.inner_steps())) >= 1


@by_layout
def test_needles_in_float8_caches(d_major: bool) -> None:
    found(range(0, 300, 5), 300, 2, k_type=ml_dtypes.float8_e4m3, k_d_major=d_major)


@by_layout
@pytest.mark.parametrize("window", [40, 127, 128, 200])
def test_needles_at_the_edges_of_a_window(window: int, d_major: bool) -> None:
    """Keys on both sides of the first visible one, for each of three new tokens."""
    s, length, group = 3, 401, 8
    q, k, v = normal(1, s, group, 64), normal(1, length, 1, 64), normal(1, length, 1, 64, seed=1)
    for i in range(s):
        p = length - s + i
        for h, position in enumerate((*range(p - window - 2, p - window + 3), p - 1, p, min(p + 1, length - 1))):
            k[0, position, 0] += q[0, i, h]
    options: dict[str, Any] = {"window_size": (window, 0), "softmax_scale": 0.5}
    o, lse = flash_decode(q, k, v, return_lse=True, k_d_major=d_major, target="trn2", **options)
    exact = oracle(q, k, v, **options)
    # Scores of about 32 in float32, and probabilities in bfloat16.
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5)
    np.testing.assert_allclose(o.astype(float), exact.o, atol=0.03)


@by_layout
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_maxima_that_rise_or_fall_from_item_to_item(order: int, d_major: bool) -> None:
    """Scores from 0 to 30 along 3000 keys in three items: every item changes the maximum, or none does."""
    group, d = 128, 64
    q, k, v = np.ones((1, group, d)), np.zeros((1, 3000, 1, d)), normal(1, 3000, 1, d)
    q[0, :, 0] = np.linspace(0.5, 1.0, group)
    k[0, ::order, 0, 0] = np.linspace(0, 30, 3000)
    q, k = q.astype(BF16), k.astype(BF16)
    (o, lse), (run,) = traced(q, k, v, softmax_scale=1.0, return_lse=True, k_d_major=d_major)
    assert len(list(run.inner_steps())) >= 1
    exact = oracle(q, k, v, softmax_scale=1.0)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)
    np.testing.assert_allclose(o.astype(float), exact.o, atol=2.0**-8)


@pytest.mark.parametrize(
    ("lengths", "n_kv_heads", "group", "d"),
    [((9000, 100), 1, 4, 128), ((2100, 0, 1), 1, 128, 64), ((300,) * 5, 1, 8, 64), ((0, 0), 1, 2, 64)],
)
@by_layout
def test_two_cores_with_unequal_work(
    lengths: tuple[int, ...], n_kv_heads: int, group: int, d: int, d_major: bool
) -> None:
    for n_splits in (1, 3 if d_major else None):
        case = FlashCase("2", group * n_kv_heads, n_kv_heads, d, lengths, n_cores=2, n_splits=n_splits, d_major=d_major)
        check(case, BF16, "trn3")
