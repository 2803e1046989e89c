"""Inputs of the sparse benchmarks: scores are what the pattern says, and thresholds skip what they promise.

Shares and decisions are those of the oracles in `reference`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from benchmarks.sparse_inputs import PASSAGE, AttentionPattern, Drawn, draw, draw_prefill, threshold_for
from reference.skip_softmax import skip_softmax_decode
from reference.sparse_decode import gated_decode, sparse_decode

BF16 = np.dtype(ml_dtypes.bfloat16)
PATTERN = AttentionPattern()
SILENT = replace(PATTERN, noise=0.0, passage_noise=0.0)
KEYS, GROUP, KV_HEADS, D = 4096, 8, 2, 64
OLDEST = 4.0 - 1.8 * math.log(1 + 4095 / 16)  # mean of the oldest key, at a rate of 1

by_rule = pytest.mark.parametrize("rule", ["skip_softmax", "sparse", "gate"])


@cache
def small(pattern: AttentionPattern = PATTERN, dtype: Any = BF16, batch: int = 1, keys: int = KEYS) -> Drawn:
    return draw(pattern, batch, GROUP * KV_HEADS, KV_HEADS, keys, D, dtype)


def scores(drawn: Drawn) -> Any:
    """s in float64, `[n_kv_heads, group, seqlen_kv]` of the first sequence."""
    q, k = drawn.q[0].astype(np.float64), drawn.k[0].astype(np.float64)
    heads = q.reshape(k.shape[1], -1, q.shape[-1])
    return q.shape[-1] ** -0.5 * np.einsum("ghd,sgd->ghs", heads, k)


class Outcome(NamedTuple):
    """What an oracle does with a threshold."""

    skipped: int
    margin: float
    kept: Any  # [batch, n_kv_heads, n_tiles]
    o: Any


def outcome(rule: str, drawn: Drawn, threshold: float, tile_kv: int = 128) -> Outcome:
    q, k, v = drawn.q, drawn.k, drawn.v
    if rule == "skip_softmax":
        skip = skip_softmax_decode(q, k, v, skip_softmax_threshold=threshold, tile_kv=tile_kv)
        kept = skip.stats.values_read
        return Outcome(int((~kept).sum()), float(skip.stats.margin.min()), kept, skip.o)
    if rule == "sparse":
        got = sparse_decode(q, k, v, softmax_threshold=threshold, tile_kv=tile_kv)
    else:
        gates = {"gate_threshold": threshold, "softmax_threshold": 0.0}
        got = gated_decode(q, k, v, drawn.alpha, drawn.delta, tile_kv=tile_kv, **gates)
    return Outcome(int(got.stats.tiles_skipped.sum()), float(got.stats.margin.min()), got.stats.kept, got.o)


def error(rule: str, drawn: Drawn, threshold: float, tile_kv: int) -> float:
    """Largest |o - dense o| / |dense o| of a head."""
    dense = outcome(rule, drawn, 0.0).o
    difference = outcome(rule, drawn, threshold, tile_kv).o - dense
    return float((np.linalg.norm(difference, axis=-1) / np.linalg.norm(dense, axis=-1)).max())


# -- the scores


def test_without_noise_every_score_is_the_mean_that_the_pattern_states() -> None:
    drawn = small(SILENT, np.float32)
    x = np.arange(KEYS)[::-1]
    for kv, s in enumerate(scores(drawn)):
        plain = np.ones(KEYS, np.bool_)
        plain[:4] = False
        for first in drawn.retrieved[0, kv]:
            plain[first : first + 8] = False
        np.testing.assert_allclose(s[:, :4], 7.0, atol=1e-4)
        np.testing.assert_allclose(s[:, -1], 4.0, atol=1e-4)
        fall = 1.8 * np.log(1 + x[plain] / 16)
        rates = (4.0 - s[:, plain][:, :-1]) / fall[:-1]
        np.testing.assert_allclose(rates, np.broadcast_to(rates[:, :1], rates.shape), atol=1e-3)
        assert ((rates[:, 0] >= 0.9) & (rates[:, 0] <= 1.1)).all()
        assert rates[:, 0].min() < 0.97
        assert rates[:, 0].max() > 1.03


def test_each_run_is_retrieved_by_half_of_the_heads() -> None:
    drawn = small(SILENT, np.float32)
    found = set()
    for kv, s in enumerate(scores(drawn)):
        runs = drawn.retrieved[0, kv]
        assert runs.shape == (4,)
        assert (runs % 8 == 0).all()
        assert (runs >= 512).all()
        assert (runs + 8 <= 3584).all()
        assert (np.diff(runs // 768) >= 0).all()
        assert len(set((runs - 512) // 768)) == 4  # each quarter of the middle has one
        for first in runs:
            run = s[:, first : first + 8]
            high = run[:, 0] > 0.0
            assert high.sum() == 4
            np.testing.assert_allclose(run, np.where(high, 4.0, OLDEST)[:, None] + np.zeros(8), atol=1e-3)
            found.add((kv, tuple(high.tolist())))
    assert len(found) > 4


def test_noise_has_its_size_and_is_common_to_a_group_for_the_most_part() -> None:
    """The same seed draws the same means."""
    noise = scores(small(replace(PATTERN, passage_noise=0.0), np.float32)) - scores(small(SILENT, np.float32))
    np.testing.assert_allclose(noise.std(axis=-1), 1.5, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=-1), 0.0, atol=0.15)
    for group in noise:
        alike = np.corrcoef(group)[np.triu_indices(GROUP, 1)]
        assert 0.7 < alike.mean() < 0.95
    assert abs(np.corrcoef(noise[:, 0])[0, 1]) < 0.1


def test_passages_move_all_keys_of_a_run_together() -> None:
    pattern = replace(SILENT, passage_noise=1.0, n_retrieved=0, n_sinks=0, rate_spread=0.0)
    moved = scores(small(pattern, np.float32)) - scores(small(replace(pattern, passage_noise=0.0), np.float32))
    np.testing.assert_allclose(moved[0], np.broadcast_to(moved[0, 0], (GROUP, KEYS)), atol=1e-3)
    steps = np.flatnonzero(np.abs(np.diff(moved[0, 0])) > 1e-3)
    assert PASSAGE == 96
    assert set(np.diff(steps)) == {96}
    assert 0.6 < moved[:, 0, ::96].std() < 1.4


def test_queries_have_unit_variance_and_sinks_small_values() -> None:
    drawn = small(dtype=np.float32)
    np.testing.assert_allclose(np.linalg.norm(drawn.q, axis=-1), 8.0, rtol=1e-5)
    assert 0.98 < drawn.v[:, 4:].std() < 1.02
    assert 0.08 < drawn.v[:, :4].std() < 0.12


def test_bfloat16_moves_scores_little() -> None:
    """A margin of 1e-3 is for float32 scores of the same operands; operands themselves are rounded before."""
    rounded, exact = small(), small(dtype=np.float32)
    for name in ("q", "k", "v"):
        assert (getattr(rounded, name) == getattr(exact, name).astype(BF16)).all()
    assert np.abs(scores(rounded) - scores(exact)).max() < 0.1
    q, k = rounded.q[0, :GROUP].astype(np.float32), rounded.k[0, :, 0].astype(np.float32)
    assert np.abs(np.float32(D**-0.5) * (q @ k.T) - scores(rounded)[0]).max() < 2e-5


def test_gates_close_with_distance_and_stay_open_at_sinks_and_retrieved_keys() -> None:
    drawn = small()
    assert drawn.alpha.dtype == drawn.delta.dtype == np.float32
    assert drawn.alpha.shape == (1, GROUP * KV_HEADS)
    assert ((drawn.alpha >= 0.75) & (drawn.alpha <= 1.25)).all()
    assert drawn.delta.shape == (1, KV_HEADS, KEYS)
    assert (drawn.delta <= 0).all()
    for kv, delta in enumerate(drawn.delta[0]):
        scaled = D**-0.5 * delta
        kept = [drawn.retrieved[0, kv] + i for i in range(8)]
        assert (scaled[:4] == 0).all()
        assert (scaled[np.concatenate(kept)] == 0).all()
        # 0.4 * 1.8 * log(1 + x / 16): 0.2 at 5, 1.2 at 67, 3.5 at 2048 and 4.0 at 4095; passages add 0.4 * 1.1.
        assert scaled[-8:].mean() > -1.0
        assert -4.2 < scaled[KEYS // 4 : KEYS // 2].mean() < -3.0
        assert scaled[KEYS // 2 :].mean() > scaled[8 : KEYS // 2].mean() + 0.5


def test_sequences_and_heads_differ() -> None:
    drawn = small(batch=2)
    pairs = [drawn.k[b, :, kv].tobytes() for b in range(2) for kv in range(2)]
    pairs += [drawn.v[b, :, kv].tobytes() for b in range(2) for kv in range(2)]
    assert len(set(pairs)) == 8
    assert len({drawn.delta[b, kv].tobytes() for b in range(2) for kv in range(2)}) == 4
    assert len({row.tobytes() for row in drawn.q.reshape(-1, D)}) == 2 * GROUP * KV_HEADS


def test_no_key_comes_twice_where_the_noise_is_used_up() -> None:
    """40000 keys of 128 numbers are more than the pool has."""
    drawn = draw(PATTERN, 1, 1, 1, 40000, 128, BF16)
    for x in (drawn.k, drawn.v):
        assert len({row.tobytes() for row in x[0, :, 0]}) == 40000


def test_a_seed_draws_the_same_again() -> None:
    again, other = draw(PATTERN, 1, GROUP * KV_HEADS, KV_HEADS, KEYS, D, BF16), small(replace(PATTERN, seed=1))
    for x, y, z in zip(small(), again, other, strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
        assert x.tobytes() != z.tobytes()


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (PATTERN, (2, 4, 2, 1000, 16)),
        (PATTERN, (1, 1, 1, 128, 7)),
        (replace(PATTERN, n_sinks=0, n_retrieved=0), (1, 3, 3, 1, 3)),
        (replace(PATTERN, n_retrieved=0), (1, 128, 1, 33, 256)),
        (replace(PATTERN, rate_spread=0.5, n_retrieved=1), (1, 64, 2, 500, 4)),
    ],
    ids=["batch", "least", "one-key", "wide", "spread"],
)
def test_shapes(pattern: AttentionPattern, shape: tuple[int, ...]) -> None:
    batch, n_q_heads, n_kv_heads, keys, d = shape
    drawn = draw(pattern, *shape, np.float16)
    assert drawn.q.shape == (batch, n_q_heads, d)
    assert drawn.k.shape == drawn.v.shape == (batch, keys, n_kv_heads, d)
    assert drawn.alpha.shape == (batch, n_q_heads)
    assert drawn.delta.shape == (batch, n_kv_heads, keys)
    assert drawn.retrieved.shape == (batch, n_kv_heads, pattern.n_retrieved)
    assert [x.dtype.name for x in drawn] == ["float16"] * 3 + ["float32"] * 2 + ["int64"]
    for x in drawn:
        assert np.isfinite(x).all()
    np.testing.assert_allclose(np.linalg.norm(drawn.q.astype(np.float64), axis=-1), d**0.5, rtol=1e-3)


# -- what thresholds do to them


@by_rule
def test_a_sweep_of_thresholds_goes_smoothly_from_nothing_to_nearly_all(rule: str) -> None:
    """256 pairs with tiles of 32 keys, in 16 equal steps of the threshold's logarithm. Gates reach less far."""
    lowest = 6.4 if rule == "gate" else 16.0
    logs = np.linspace(-lowest, 0.0, 17)
    shares = [outcome(rule, small(), math.exp(x), 32).skipped / 256 for x in logs]
    assert shares[0] == 0.0
    assert shares[-1] > 0.95
    steps = np.diff(shares)
    assert (steps >= 0).all()
    assert steps.max() < 0.35
    assert np.count_nonzero(steps > 0.02) >= 5


@by_rule
def test_the_error_is_small_at_first_and_grows_with_the_share(rule: str) -> None:
    drawn, shares = small(), (0.2, 0.5, 0.8, 0.9, 0.95)
    errors = [error(rule, drawn, threshold_for(rule, drawn, share, tile_kv=32).value, 32) for share in shares]
    assert errors[0] > 0
    assert (np.diff(errors) > 0).all()
    assert errors[1] < 0.03
    assert errors[2] < 0.1
    assert errors[4] > 0.1


@by_rule
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("tile_kv", "keys", "batch", "dtype"),
    [(64, 4096, 1, BF16), (128, 8100, 2, BF16), (32, 2047, 3, np.float32)],
    ids=["whole", "cut", "float32"],
)
def test_oracles_skip_what_is_promised(
    rule: str, share: float, tile_kv: int, keys: int, batch: int, dtype: Any
) -> None:
    drawn = small(dtype=np.dtype(dtype), keys=keys, batch=batch)
    found = threshold_for(rule, drawn, share, tile_kv=tile_kv)
    got = outcome(rule, drawn, found.value, tile_kv)
    assert found.total == got.kept.size == batch * KV_HEADS * math.ceil(keys / tile_kv)
    assert found.skipped == got.skipped
    assert found.share == got.skipped / got.kept.size
    assert abs(found.share - share) <= 0.02
    assert 0 < found.value <= 1
    assert found.margin >= 1e-3
    assert found.margin == pytest.approx(got.margin, abs=1e-9)
    assert (found.skipped == 0) == (share == 0.0)


def test_no_other_threshold_with_the_margin_is_nearer() -> None:
    drawn = draw(replace(PATTERN, n_retrieved=0), 1, 2, 1, 1024, 16, np.float32)
    outcomes = [outcome("skip_softmax", drawn, math.exp(-x), 16) for x in np.linspace(0.0, 14.0, 700)]
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        found = threshold_for("skip_softmax", drawn, share, tile_kv=16)
        nearest = min(abs(x.skipped - 64 * share) for x in outcomes if x.margin >= 1e-3)
        assert abs(found.skipped - 64 * share) <= nearest


@by_rule
def test_nothing_skipped_is_far_from_every_decision(rule: str) -> None:
    found = threshold_for(rule, small(), 0.0)
    assert found.skipped == outcome(rule, small(), found.value).skipped == 0
    assert found.margin == pytest.approx(1.0)
    assert outcome(rule, small(), found.value * math.exp(1.01)).skipped == (1 if rule != "skip_softmax" else 0)


def test_heads_of_a_group_share_most_tiles_but_not_those_they_retrieve() -> None:
    drawn = small()
    threshold = threshold_for("skip_softmax", drawn, 0.8, tile_kv=32).value
    stats = skip_softmax_decode(drawn.q, drawn.k, drawn.v, skip_softmax_threshold=threshold, tile_kv=32).stats
    of_heads = stats.tiles_skipped.sum() / stats.tiles_total.sum()
    assert 0.8 < of_heads < 0.93
    kept = stats.kept.reshape(KV_HEADS, GROUP, 128)
    who = [kept[kv][:, drawn.retrieved[0, kv] // 32].T.tolist() for kv in range(KV_HEADS)]
    assert all(4 <= sum(heads) < GROUP for runs in who for heads in runs)
    assert len({tuple(heads) for runs in who for heads in runs}) > 4


@by_rule
def test_sinks_the_newest_tile_and_what_is_retrieved_are_kept_at_80_percent(rule: str) -> None:
    for seed in range(3):
        drawn = small(replace(PATTERN, seed=seed))
        kept = outcome(rule, drawn, threshold_for(rule, drawn, 0.8, tile_kv=32).value, 32).kept
        assert kept.shape == (1, KV_HEADS, 128)
        assert kept[..., 0].all()
        assert kept[..., -1].all()
        for kv in range(KV_HEADS):
            assert kept[0, kv, drawn.retrieved[0, kv] // 32].all()


def test_gates_in_the_dtype_of_q() -> None:
    """Rounding makes gates of tiles equal, or puts them close together."""
    drawn = small()
    drawn = drawn._replace(alpha=drawn.alpha.astype(BF16), delta=drawn.delta.astype(BF16))
    for share in (0.0, 0.3, 0.7):
        found = threshold_for("gate", drawn, share, tile_kv=32)
        got = outcome("gate", drawn, found.value, 32)
        assert found.skipped == got.skipped
        assert found.margin == pytest.approx(got.margin, abs=1e-9)
        assert found.margin >= 1e-3


def test_a_smaller_margin_comes_nearer() -> None:
    """40000 decisions lie within 15 units, most of them much closer to the next one than 1e-3."""
    drawn = draw(PATTERN, 5, 64, 2, 2048, 64, np.float32)
    nearest = r"share: received 0\.3, allowed 0\.\d{4}, the nearest with a margin of 0\.001"
    with pytest.raises(ValueError, match=nearest):
        threshold_for("skip_softmax", drawn, 0.3, tile_kv=16)
    found = threshold_for("skip_softmax", drawn, 0.3, tile_kv=16, margin=1e-4)
    assert found.margin >= 1e-4
    assert abs(found.share - 0.3) < 0.01
    assert outcome("skip_softmax", drawn, found.value, 16).skipped == found.skipped


def test_the_largest_threshold_is_one() -> None:
    """Sinks above everything else: at 1 all tiles but theirs are skipped, and the closest of them is far below."""
    drawn = small(replace(PATTERN, sink_score=20.0, n_retrieved=0))
    found = threshold_for("skip_softmax", drawn, 0.97)
    assert (found.value, found.skipped, found.total) == (1.0, 62, 64)
    assert found.margin > 1.0


def test_tiles_that_raise_the_maximum_are_never_skipped() -> None:
    """Without high sinks the maximum rises from left to right; more than a threshold of 1 skips is not to be had."""
    drawn = small(replace(PATTERN, sink_score=-20.0, n_retrieved=0))
    most = outcome("skip_softmax", drawn, 1.0).skipped
    assert 0 < most < 40
    with pytest.raises(ValueError, match=r"share: received 0\.9, allowed 0\."):
        threshold_for("skip_softmax", drawn, 0.9)
    found = threshold_for("skip_softmax", drawn, most / 64)
    assert found.value <= 1.0
    assert abs(found.skipped - most) <= 1


def test_one_tile_is_never_skipped() -> None:
    drawn = draw(PATTERN, 1, 2, 1, 128, 16, np.float32)
    for rule in ("skip_softmax", "sparse", "gate"):
        found = threshold_for(rule, drawn, 0.0)
        assert (found.skipped, found.total, found.margin) == (0, 1, math.inf)


# -- prefill


def prefill_scores(pattern: AttentionPattern) -> Any:
    """s in float64, `[n_q_heads, n, n]`, of 4 heads on 2 KV heads."""
    q, k, _ = (x.astype(np.float64) for x in draw_prefill(pattern, 4, 2, 2048, 128, np.float32))
    return 128**-0.5 * (q.swapaxes(0, 1) @ np.repeat(k, 2, axis=1).transpose(1, 2, 0))


def test_scores_of_a_prefill_fall_with_the_distance() -> None:
    s = prefill_scores(replace(SILENT, rate_spread=0.0))
    assert s[:, :, :4] == pytest.approx(np.full((4, 2048, 4), 7.0), abs=1e-4)
    distance = np.subtract.outer(np.arange(2048), np.arange(2048))
    seen = np.arange(2048) >= 4
    # A query's own key has the local score, and the 4 that one topic has in common.
    assert s[:, seen, seen] == pytest.approx(np.full((4, 2044), 8.0), abs=1e-3)
    edges = [0, 8, 64, 256, 1024, 2048]
    means = [s[:, (distance >= a) & (distance < b) & seen].mean() for a, b in pairwise(edges)]
    assert all(a > b + 0.5 for a, b in pairwise(means))
    # Beyond the shortest wave, one decay for each e-fold.
    assert means[2] - means[4] == pytest.approx(1.8 * math.log(1536 / 160), abs=1.0)


def test_neighbouring_queries_of_a_prefill_share_a_direction() -> None:
    q = draw_prefill(PATTERN, 4, 2, 2048, 128, np.float32).q.astype(np.float64)
    assert np.linalg.norm(q, axis=-1) == pytest.approx(np.full((2048, 4), math.sqrt(128)), rel=1e-5)
    alike = [(q[:-n] * q[n:]).sum(axis=-1).mean() / 128 for n in (1, 64, 1024)]
    assert alike[0] > 0.9
    assert alike[0] > alike[1] + 0.1 > alike[2] + 0.3
    assert (q[:, 0] * q[:, 1]).sum(axis=-1).mean() / 128 > 0.85
    assert abs((q[:, 0] * q[:, 2]).sum(axis=-1).mean()) / 128 < 0.1


def test_a_prefill_is_drawn_anew_from_its_seed() -> None:
    first, same, other = (draw_prefill(replace(PATTERN, seed=i), 2, 1, 256, 66, BF16) for i in (0, 0, 1))
    assert [x.shape for x in first] == [(256, 2, 66), (256, 1, 66), (256, 1, 66)]
    for a, b, c in zip(first, same, other, strict=True):
        assert a.dtype == BF16
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)
    sinks, rest = (np.abs(first.v[x].astype(np.float64)).mean() for x in (slice(4), slice(4, 256)))
    assert sinks < 0.2 * rest


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((8, 3, 256, 128), "n_q_heads: received 8, allowed a multiple of the 3 KV heads"),
        ((8, 1, 127, 128), "seqlen: received 127, allowed at least 128"),
        ((8, 1, 256, 65), "d: received 65, allowed at least 66"),
    ],
)
def test_bad_shapes_of_a_prefill(shape: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        draw_prefill(PATTERN, *shape, BF16)


# -- bad arguments


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"n_sinks": -1}, ValueError, "n_sinks: received -1, allowed at least 0"),
        ({"n_sinks": 1.0}, TypeError, "n_sinks: received 1.0, allowed an integer"),
        ({"n_retrieved": True}, TypeError, "n_retrieved: received True, allowed an integer"),
        ({"seed": -1}, ValueError, "seed: received -1, allowed at least 0"),
        ({"noise": -0.1}, ValueError, "noise: received -0.1, allowed at least 0"),
        ({"passage_noise": -0.1}, ValueError, "passage_noise: received -0.1, allowed at least 0"),
        ({"sink_score": math.nan}, ValueError, "sink_score: received nan, allowed a finite number"),
        ({"local_score": "4"}, TypeError, "local_score: received '4', allowed a number"),
        ({"decay": 0.0}, ValueError, "decay: received 0.0, allowed above 0"),
        ({"near": 0.0}, ValueError, "near: received 0.0, allowed above 0"),
        ({"gate": -1.0}, ValueError, "gate: received -1.0, allowed above 0"),
        ({"rate_spread": 0.6}, ValueError, "rate_spread: received 0.6, allowed 0 to 0.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_patterns(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        AttentionPattern(**changes)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "text"),
    [
        ((0, 8, 1, 256, 64), BF16, ValueError, "batch: received 0, allowed at least 1"),
        ((1, 8, 0, 256, 64), BF16, ValueError, "n_kv_heads: received 0, allowed at least 1"),
        ((1, 0, 1, 256, 64), BF16, ValueError, "n_q_heads: received 0, allowed at least 1"),
        ((1, 8, 3, 256, 64), BF16, ValueError, "n_q_heads: received 8, allowed a multiple of the 3 KV heads"),
        ((1, 8, 1, 127, 64), BF16, ValueError, "seqlen_kv: received 127, allowed at least 128"),
        ((1, 8, 1, 256, 6), BF16, ValueError, "d: received 6, allowed at least 7"),
        ((1, 8, 1, 256.0, 64), BF16, TypeError, "seqlen_kv: received 256.0, allowed an integer"),
        ((1, 8, 1, 256, 64), np.int32, TypeError, "dtype: received int32, allowed float32, bfloat16, float16"),
    ],
    ids=["batch", "kv-heads", "q-heads", "multiple", "keys", "head-dim", "integer", "dtype"],
)
def test_bad_shapes(shape: Any, dtype: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        draw(PATTERN, *shape, dtype)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("rule", "share", "options", "kind", "text"),
    [
        ("skip", 0.5, {}, ValueError, "rule: received 'skip', allowed skip_softmax, sparse, gate"),
        ("gate", 1.0, {}, ValueError, "share: received 1.0, allowed 0 to below 1"),
        ("gate", -0.1, {}, ValueError, "share: received -0.1, allowed 0 to below 1"),
        ("gate", math.nan, {}, ValueError, "share: received nan, allowed 0 to below 1"),
        ("gate", 0.5, {"tile_kv": 0}, ValueError, "tile_kv: received 0, allowed at least 1"),
        ("gate", 0.5, {"tile_kv": 64.0}, TypeError, "tile_kv: received 64.0, allowed an integer"),
        ("gate", 0.5, {"margin": 0.0}, ValueError, "margin: received 0.0, allowed above 0 and below 1"),
        ("gate", 0.5, {"margin": 1.0}, ValueError, "margin: received 1.0, allowed above 0 and below 1"),
    ],
    ids=["rule", "one", "negative", "nan", "no-tile", "integer", "no-margin", "margin"],
)
def test_bad_wishes(rule: str, share: float, options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        threshold_for(rule, small(), share, **options)
    assert str(raised.value) == text
