"""Inputs for benchmarks of sparse decode: one new token whose scores look like those of a trained model.

    s[h, j]   = d ** -0.5 * q[h] . k[j, h // group] = mean[h, j] + noise
    mean      = sink_score                               of the first keys, for every head
              = local_score + rate[h] * relevance[j]     of other keys
              = retrieved_score                          of a few short runs of keys, each for some of the heads
    relevance = passage[j] - decay * log(1 + x / near)   x: distance from the newest key; passages are runs of 96 keys
    delta[j]  = gate * relevance[j] + noise, at most 0, in units of q . k; 0 at sinks and retrieved keys

On scores without such a structure the largest of every tile are nearly the same, and a threshold skips next to nothing
or next to all. Here the share of skipped tiles grows smoothly with the threshold, and so does the error. The heads of a
group differ in their rate, in a part of the noise and in what they retrieve: a tile that one of them skips, most of the
others skip too.

Keys have coefficients along a few orthonormal directions u, and noise n in all d: `k[j] = sum_r c[j, r] u[r] + noise *
n[j]`. Queries are `q[h] = d ** 0.5 * sum_r w[h, r] u[r]` with w of length 1, so that the mean of a score is `sum_r
w[h, r] c[j, r]` and its noise has the standard deviation `noise`. The directions are

    common        the part of a mean that is the same for all heads
    distance      relevance; w is proportional to the head's rate
    retrieved     one per run; w is 0 for heads that do not look for it
    rest          no c: noise, of the group together and of each head

`threshold_for` finds thresholds from the scores: for a share of tiles, and away from every decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from benchmarks.flash_decode import POOL
from reference.sparse_decode import running_max, tile_maxima

Array = np.ndarray[Any, np.dtype[Any]]

RULES = ("skip_softmax", "sparse", "gate")
PASSAGE = 96  # keys; no tile is a multiple of it
RETRIEVED_KEYS = 8  # of a run, which begins at a multiple: it lies in one tile
SINK_VALUES = 0.1  # size of a sink's values: heads look there that have nothing to add
GATE_NOISE = 0.5  # of a passage, in units of that of its relevance
ALPHA = (0.75, 1.25)  # range
# Squares of w; retrieved directions share theirs. The rest is what is missing from 1, in part the group's.
COMMON, DISTANCE, RETRIEVED, REST_OF_GROUP = 0.25, 0.2, 0.25, 0.75
RATE_SPREAD_MAX = 0.5  # up to here, the squares of the largest w stay below 1
LEAST_MARGIN = 1e-3  # of a threshold, in units of s
MOST_OFF = 0.02  # largest difference of the share skipped from the one asked for


@dataclass(frozen=True)
class AttentionPattern:
    """What a new token looks at. Scores are scaled, as they enter the softmax.

    Args:
        n_sinks: keys at the start with `sink_score`, at least 0.
        sink_score: of sinks, for every head.
        local_score: of the newest keys.
        decay: what a score loses when the distance grows e-fold, above 0.
        near: distance, in keys, from which scores fall; above 0.
        rate_spread: a head's rate is within 1 - and 1 + this, 0 to 0.5.
        passage_noise: standard deviation of the relevance of passages.
        noise: standard deviation of every score.
        n_retrieved: runs of keys that some heads of a KV head look for, at least 0.
        retrieved_score: of these keys, for these heads.
        gate: what delta takes off a score at alpha 1, as a share of its lack of relevance; above 0.
        seed: of all that is drawn.

    Raises:
        ValueError: a number is not finite or out of range.
    """

    n_sinks: int = 4
    sink_score: float = 6.0
    local_score: float = 4.0
    decay: float = 1.8
    near: float = 16.0
    rate_spread: float = 0.1
    passage_noise: float = 1.0
    noise: float = 1.0
    n_retrieved: int = 4
    retrieved_score: float = 4.0
    gate: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise ValueError(f"{field.name}: received {getattr(self, field.name)}, allowed a finite number")
        for name in ("n_sinks", "n_retrieved", "passage_noise", "noise", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: received {getattr(self, name)}, allowed at least 0")
        for name in ("decay", "near", "gate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: received {getattr(self, name)}, allowed above 0")
        if not 0 <= self.rate_spread <= RATE_SPREAD_MAX:
            raise ValueError(f"rate_spread: received {self.rate_spread}, allowed 0 to {RATE_SPREAD_MAX}")


class Drawn(NamedTuple):
    """Operands of one decode step, in the layout of `reference`."""

    q: Array
    """`[batch, n_q_heads, d]`."""
    k: Array
    """`[batch, seqlen_kv, n_kv_heads, d]`, in q's dtype like v."""
    v: Array
    """As k: independent numbers, which is the hardest case for an approximation."""
    alpha: Array
    """Of gates, float32 `[batch, n_q_heads]`, above 0."""
    delta: Array
    """Of gates, float32 `[batch, n_kv_heads, seqlen_kv]`, at most 0."""
    retrieved: Array
    """First key of each retrieved run, int64 `[batch, n_kv_heads, n_retrieved]`, ascending."""


def draw(
    pattern: AttentionPattern, batch: int, n_q_heads: int, n_kv_heads: int, seqlen_kv: int, d: int, dtype: Any
) -> Drawn:
    """Draw a decode step.

    Args:
        pattern: what the scores are like, for `softmax_scale = d ** -0.5`.
        batch: sequences, at least 1.
        n_q_heads: a multiple of n_kv_heads.
        n_kv_heads: at least 1.
        seqlen_kv: keys of every sequence; at least `n_sinks + 1`, and room for the runs in the middle three quarters.
        d: head dim, at least `n_retrieved + 4`.
        dtype: of q, k and v. Only their rounding depends on it.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value in (("batch", batch), ("n_kv_heads", n_kv_heads)):
        if value < 1:
            raise ValueError(f"{name}: received {value}, allowed at least 1")
    if n_q_heads < 1 or n_q_heads % n_kv_heads:
        raise ValueError(f"n_q_heads: received {n_q_heads}, allowed a multiple of the {n_kv_heads} KV heads")
    if d < pattern.n_retrieved + 4:
        raise ValueError(f"d: received {d}, allowed at least {pattern.n_retrieved + 4}, for the directions")
    least = max(1, 8 * pattern.n_sinks, 4 * RETRIEVED_KEYS * pattern.n_retrieved)
    if seqlen_kv < least:
        raise ValueError(f"seqlen_kv: received {seqlen_kv}, allowed at least {least}, for sinks and retrieved keys")
    rng = np.random.default_rng(pattern.seed)
    group, dtype = n_q_heads // n_kv_heads, np.dtype(dtype)
    # Drawing every element would take longer than all the rest. The pool's size is odd, so that rows differ.
    noise = np.resize(rng.standard_normal(POOL, np.float32), POOL + seqlen_kv * d)
    values = noise.astype(dtype)
    q = np.empty((batch, n_q_heads, d), dtype)
    k, v = (np.empty((batch, seqlen_kv, n_kv_heads, d), dtype) for _ in "kv")
    alpha = rng.uniform(*ALPHA, (batch, n_q_heads)).astype(np.float32)
    delta = np.empty((batch, n_kv_heads, seqlen_kv), np.float32)
    retrieved = np.empty((batch, n_kv_heads, pattern.n_retrieved), np.int64)
    for b, kv in np.ndindex(batch, n_kv_heads):
        directions = np.linalg.qr(rng.standard_normal((d, d)))[0].T
        retrieved[b, kv] = _runs(rng, seqlen_kv, pattern.n_retrieved)
        c, worth = _keys(rng, pattern, seqlen_kv, retrieved[b, kv])
        q[b, kv * group : (kv + 1) * group] = d**0.5 * _weights(rng, pattern, group, d) @ directions
        for_k, for_v = (slice(start, start + seqlen_kv * d) for start in rng.integers(POOL, size=2))
        keys = c @ directions[: c.shape[1]].astype(np.float32)
        keys += np.float32(pattern.noise) * noise[for_k].reshape(keys.shape)
        k[b, :, kv] = keys
        v[b, :, kv] = values[for_v].reshape(keys.shape)
        v[b, : pattern.n_sinks, kv] *= np.array(SINK_VALUES, dtype)
        delta[b, kv] = d**0.5 * pattern.gate * np.minimum(worth, 0.0)
    return Drawn(q, k, v, alpha, delta, retrieved)


class Threshold(NamedTuple):
    """A threshold, and what it does."""

    value: float
    """Above 0, at most 1."""
    margin: float
    """Distance of log(value) from the closest decision of the rule, in units of s."""
    skipped: int
    """(KV head, tile) pairs whose values are not read."""
    total: int
    """All pairs."""

    @property
    def share(self) -> float:
        """Of the pairs that are skipped."""
        return self.skipped / self.total


def threshold_for(rule: str, drawn: Drawn, share: float, *, tile_kv: int = 128) -> Threshold:
    """The threshold that skips as near as possible to a share of the (KV head, tile) pairs of all sequences.

    Args:
        rule: "skip_softmax": tiles that all heads of the group skip in `reference.skip_softmax`; "sparse":
            tiles that `reference.sparse_decode.sparse_decode` skips in one split; "gate": tiles that `gated_decode`
            skips in one split by their gates, which are all if its `softmax_threshold` is 0.
        drawn: the operands.
        share: 0 to below 1. With 0 the test is on and skips nothing.
        tile_kv: keys per tile, at least 1.

    Returns:
        The threshold. It is `LEAST_MARGIN` or more from every decision, of every head where heads decide.

    Raises:
        ValueError: an argument is out of range, or every threshold with the margin is more than `MOST_OFF` off.
    """
    if rule not in RULES:
        raise ValueError(f"rule: received {rule!r}, allowed {', '.join(RULES)}")
    if not 0 <= share < 1:
        raise ValueError(f"share: received {share}, allowed 0 to below 1")
    if tile_kv < 1:
        raise ValueError(f"tile_kv: received {tile_kv}, allowed at least 1")
    above = _above(rule, drawn, tile_kv)
    decisions = np.unique(above[np.isfinite(above)])
    # Below all decisions, in the middle between two, and the largest there is.
    between = (decisions[1:] + decisions[:-1]) / 2
    thresholds = np.exp([decisions.min(initial=0.0) - 1.0, *between[between < 0], 0.0])
    logs = np.log(thresholds)
    margins = np.abs(logs[:, None] - _neighbours(decisions, logs)).min(axis=1)
    skipped = np.searchsorted(np.sort(above.max(axis=1), axis=None), logs)
    n_pairs, _, n_tiles = above.shape
    total = n_pairs * n_tiles
    off = np.abs(skipped - share * total)
    allowed = margins >= LEAST_MARGIN
    best = min(np.flatnonzero(allowed), key=lambda i: (off[i], -margins[i]))
    found = Threshold(float(thresholds[best]), float(margins[best]), int(skipped[best]), total)
    if off[best] > max(1.0, MOST_OFF * total):
        raise ValueError(f"share: received {share}, allowed {found.share:.3f}, the nearest with a margin of {LEAST_MARGIN}")
    return found


def _neighbours(ascending: Array, x: Array) -> Array:
    """The numbers before and after each x, `[n, 2]`; infinite at the ends."""
    ends = np.concatenate([[-np.inf], ascending, [np.inf]])
    after = np.searchsorted(ascending, x) + 1
    return np.stack([ends[after - 1], ends[after]], axis=1)


def _above(rule: str, drawn: Drawn, tile_kv: int) -> Array:
    """How far above the largest of the tiles before each tile is, scaled, `[pairs, heads that decide, n_tiles]`.

    It is skipped iff that is below log(threshold) for all of these heads. inf for the first tile of the visit.
    """
    batch, n_q_heads, d = drawn.q.shape
    n, n_kv_heads = drawn.k.shape[1:3]
    group = n_q_heads // n_kv_heads
    tiles = range(-(-n // tile_kv))
    rows = []
    for b, kv in np.ndindex(batch, n_kv_heads):
        heads = slice(kv * group, (kv + 1) * group)
        if rule == "gate":
            deltas = np.zeros(len(tiles) * tile_kv)  # a tile that sticks out has a 0 among its deltas
            deltas[:n] = drawn.delta[b, kv]
            of_tile = deltas.reshape(-1, tile_kv)
            extremes = np.stack([of_tile.min(axis=1), of_tile.max(axis=1)])
            alpha = drawn.alpha[b, heads].astype(np.float64)
            largest = np.max([extremes * alpha.min(), extremes * alpha.max()], axis=(0, 1))[None]
        else:
            scores = drawn.q[b, heads].astype(np.float64) @ drawn.k[b, :, kv].astype(np.float64).T
            largest = tile_maxima(scores, 0, tiles, tile_kv)
        if rule == "sparse":
            largest = largest.max(axis=0, keepdims=True)
        if rule != "skip_softmax":  # these go from right to left
            largest = largest[:, ::-1]
        rows.append(d**-0.5 * (largest - running_max(largest)))
    return np.stack(rows)


def _runs(rng: np.random.Generator, seqlen_kv: int, n: int) -> Array:
    """First key of each retrieved run: one in each nth of the middle three quarters."""
    edges = np.linspace(seqlen_kv / 8, seqlen_kv * 7 / 8, n + 1) / RETRIEVED_KEYS
    return RETRIEVED_KEYS * rng.integers(np.ceil(edges[:-1]), np.floor(edges[1:]))


def _weights(rng: np.random.Generator, pattern: AttentionPattern, group: int, d: int) -> Array:
    """w `[group, d]`: what each head looks at."""
    n = pattern.n_retrieved
    w = np.zeros((group, d))
    w[:, 0] = COMMON**0.5
    w[:, 1] = DISTANCE**0.5 * rng.uniform(1 - pattern.rate_spread, 1 + pattern.rate_spread, group)
    for run in range(2, 2 + n):
        # Half of the heads look for a run.
        w[rng.permutation(group)[: -(-group // 2)], run] = (RETRIEVED / n) ** 0.5
    own, shared = rng.standard_normal((group, d - 2 - n)), rng.standard_normal(d - 2 - n)
    rest = REST_OF_GROUP**0.5 * shared + (1 - REST_OF_GROUP) ** 0.5 * own
    left = 1 - (w * w).sum(axis=1, keepdims=True)
    w[:, 2 + n :] = rest * (left / (rest * rest).sum(axis=1, keepdims=True)) ** 0.5
    return w


def _keys(rng: np.random.Generator, pattern: AttentionPattern, n: int, runs: Array) -> tuple[Array, Array]:
    """c `[n, 2 + n_retrieved]` float32, what keys have for those who look; and relevance as gates see it, `[n]`."""
    x = np.arange(n)[::-1]
    fall = pattern.decay * np.log1p(x / pattern.near)
    # Where the newest passage ends is left to chance.
    passage = (x + rng.integers(PASSAGE)) // PASSAGE
    of_passage = pattern.passage_noise * rng.standard_normal((2, passage[0] + 1))
    relevance = of_passage[0, passage] - fall
    gate = relevance + GATE_NOISE * of_passage[1, passage]
    c = np.zeros((n, 2 + len(runs)))
    c[:, 0] = pattern.local_score
    c[:, 1] = relevance
    sinks = slice(pattern.n_sinks)
    c[sinks, 0], c[sinks, 1], gate[sinks] = pattern.sink_score, 0.0, 0.0
    # To heads that do not look for them, retrieved keys are like the oldest ones.
    floor = pattern.local_score - fall[0]
    for i, start in enumerate(runs):
        run = slice(start, start + RETRIEVED_KEYS)
        c[run, 0], c[run, 1], gate[run] = floor, 0.0, 0.0
        c[run, 2 + i] = (pattern.retrieved_score - floor) / (RETRIEVED / len(runs)) ** 0.5
    c[:, 0] /= COMMON**0.5
    c[:, 1] /= DISTANCE**0.5
    return c.astype(np.float32), gate
