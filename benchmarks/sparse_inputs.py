"""Inputs for benchmarks of sparse decode: one new token whose scores look like those of a trained model.

    s[h, j]   = d ** -0.5 * q[h] . k[j, h // group] = mean[h, j] + noise
    mean      = sink_score                               of the first keys, for every head
              = local_score + rate[h] * relevance[j]     of other keys
              = retrieved_score                          of a few short runs of keys, each for some of the heads
    relevance = passage[j] - decay * log(1 + x / near)   x: distance from the newest key; passages are runs of 96 keys
    delta[j]  = d ** 0.5 * min(0, gate * (relevance[j] + noise))       0 at sinks and retrieved keys

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

`draw_prefill` draws the queries of a whole sequence in the same way. For the query at p and the key at j

    mean      = sink_score                                                       of the first keys
              = local_score + passage[j] + decay * sum_r step * (rate[h] * cos((p - j) * f[r]) - 1)
                + topic_score * topic[p] . topic[j]                              of other keys

with frequencies f like those of rotary embeddings, `step` apart on a logarithmic scale: the sum falls nearly as the
logarithm of the distance does. Passages take their topics, directions of length 1, from a small stock, so that a query
looks for its own passage and for a few far ones. Queries of a passage share their topic and most of the rest, and those
next to each other all but a little of w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from benchmarks.flash_decode import POOL
from contributed._checks import FLOATS
from reference.sparse_decode import running_max, tile_maxima

Array = np.ndarray[Any, np.dtype[Any]]

RULES = ("skip_softmax", "sparse", "gate")
PASSAGE = 96  # keys; tiles are powers of two, and not in step with it
RUN = 8  # retrieved keys side by side, from a multiple of it on: in one tile
SINK_VALUES = 0.1  # size of a sink's values: heads look there that have nothing to add
GATE_NOISE = 0.5  # of a passage, in units of that of its relevance
ALPHA = (0.75, 1.25)  # range
# Squares of w; runs share theirs. What is missing from 1 is the rest, and REST_OF_GROUP the group's part of it.
COMMON, DISTANCE, RETRIEVED, REST_OF_GROUP = 0.25, 0.2, 0.25, 0.75
# The same of the queries of a prefill, in place of DISTANCE and RETRIEVED.
WAVES, TOPIC = 0.35, 0.15
N_WAVES, TOPIC_SIZE, N_TOPICS = 24, 16, 32
WAVE_LEAST_D = 2 * N_WAVES + TOPIC_SIZE + 2
SHORTEST_WAVE = 64.0  # keys per radian: what happens inside a tile does not matter to it
TOPIC_SCORE = 4.0
RATE_SPREAD_MAX = 0.5  # up to here, the squares of the largest w add up to less than 1
LEAST_MARGIN = 1e-3  # in units of s; the error of float32 scores is a hundredth of it
MOST_OFF = 0.02  # largest difference of the share skipped from the one asked for


@dataclass(frozen=True)
class AttentionPattern:
    """What a new token looks at. Scores are scaled, as they enter the softmax.

    Args:
        n_sinks: keys at the start with `sink_score`, at least 0.
        sink_score: of sinks, for every head.
        local_score: of the newest keys.
        decay: what a score loses when the distance grows e-fold, above 0.
        near: distance from which scores fall, in keys, above 0.
        rate_spread: the rate of a head is between 1 - rate_spread and 1 + rate_spread; 0 to 0.5.
        passage_noise: standard deviation of the relevance of passages, at least 0.
        noise: standard deviation of a score of a key, at least 0.
        n_retrieved: runs of keys that some heads of a KV head look for, at least 0.
        retrieved_score: of these keys, for these heads; for others they are like the oldest keys.
        gate: what delta takes off a score at alpha 1, as a share of the relevance that a key lacks; above 0.
        seed: of everything that is drawn, at least 0.

    Raises:
        ValueError, TypeError: a count is no integer, another number is not finite, or one is out of range.
    """

    n_sinks: int = 4
    sink_score: float = 7.0
    local_score: float = 4.0
    decay: float = 1.8
    near: float = 16.0
    rate_spread: float = 0.1
    passage_noise: float = 1.0
    noise: float = 1.5
    n_retrieved: int = 4
    retrieved_score: float = 4.0
    gate: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name), type(field.default))
        for name in ("n_sinks", "passage_noise", "noise", "n_retrieved", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: received {getattr(self, name)}, allowed at least 0")
        for name in ("decay", "near", "gate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: received {getattr(self, name)}, allowed above 0")
        if not 0 <= self.rate_spread <= RATE_SPREAD_MAX:
            raise ValueError(f"rate_spread: received {self.rate_spread}, allowed 0 to {RATE_SPREAD_MAX}")


class Drawn(NamedTuple):
    """Operands of one decode step, in the layouts of `reference`."""

    q: Array
    """`[batch, n_q_heads, d]`."""
    k: Array
    """`[batch, seqlen_kv, n_kv_heads, d]`, in q's dtype."""
    v: Array
    """As k. Independent numbers: the error of an approximation is nearly the weight that it leaves out."""
    alpha: Array
    """Of gates, float32 `[batch, n_q_heads]`, above 0."""
    delta: Array
    """Of gates, float32 `[batch, n_kv_heads, seqlen_kv]`, at most 0. `_replace` it to have it in another dtype."""
    retrieved: Array
    """First key of each run that is retrieved, int64 `[batch, n_kv_heads, n_retrieved]`, ascending."""


def draw(
    pattern: AttentionPattern, batch: int, n_q_heads: int, n_kv_heads: int, seqlen_kv: int, d: int, dtype: Any
) -> Drawn:
    """Draw a decode step, for `softmax_scale = d ** -0.5`.

    Args:
        pattern: what scores look like.
        batch: sequences, at least 1.
        n_q_heads: a multiple of n_kv_heads.
        n_kv_heads: at least 1.
        seqlen_kv: keys of every sequence, at least 8 per sink and 32 per retrieved run.
        d: head dim, at least `n_retrieved + 3`.
        dtype: of q, k and v: float32, bfloat16 or float16. The numbers before rounding do not depend on it.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    least_keys = max(1, 8 * pattern.n_sinks, 4 * RUN * pattern.n_retrieved)
    least_d = pattern.n_retrieved + 3
    _check_shape(
        n_q_heads, n_kv_heads, dtype, ("batch", batch, 1), ("seqlen_kv", seqlen_kv, least_keys), ("d", d, least_d)
    )
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(pattern.seed)
    group, sinks = n_q_heads // n_kv_heads, slice(pattern.n_sinks)
    # Drawing every element would take longer than all the rest. The size of the pool is odd, so that rows differ.
    size = seqlen_kv * d
    pool = np.resize(rng.standard_normal(POOL, np.float32), POOL + size)
    values = pool.astype(dtype)
    q = np.empty((batch, n_q_heads, d), dtype)
    k, v = (np.empty((batch, seqlen_kv, n_kv_heads, d), dtype) for _ in "kv")
    alpha = rng.uniform(*ALPHA, (batch, n_q_heads)).astype(np.float32)
    delta = np.empty((batch, n_kv_heads, seqlen_kv), np.float32)
    retrieved = np.empty((batch, n_kv_heads, pattern.n_retrieved), np.int64)
    for b, kv in np.ndindex(batch, n_kv_heads):
        u = np.linalg.qr(rng.standard_normal((d, d)))[0].T
        q[b, kv * group : (kv + 1) * group] = d**0.5 * _weights(rng, pattern, group, d) @ u
        retrieved[b, kv] = runs = _runs(rng, seqlen_kv, pattern.n_retrieved)
        c, gate = _keys(rng, pattern, seqlen_kv, runs)
        in_k, in_v = (slice(start, start + size) for start in rng.integers(POOL, size=2))
        keys = np.float32(pattern.noise) * pool[in_k].reshape(seqlen_kv, d)
        # Not one product of matrices: libraries round those in different ways, and counts of tiles are published.
        for along, direction in zip(c.T, u.astype(np.float32), strict=False):
            keys += along[:, None] * direction
        k[b, :, kv] = keys
        v[b, :, kv] = values[in_v].reshape(seqlen_kv, d)
        v[b, sinks, kv] = np.float32(SINK_VALUES) * pool[in_v].reshape(seqlen_kv, d)[sinks]
        delta[b, kv] = d**0.5 * pattern.gate * np.minimum(gate, 0.0)
    return Drawn(q, k, v, alpha, delta, retrieved)


class DrawnPrefill(NamedTuple):
    """Operands of a prefill of one sequence."""

    q: Array
    """`[seqlen, n_q_heads, d]`."""
    k: Array
    """`[seqlen, n_kv_heads, d]`, in q's dtype."""
    v: Array
    """As k; values as in `Drawn`."""


def draw_prefill(
    pattern: AttentionPattern, n_q_heads: int, n_kv_heads: int, seqlen: int, d: int, dtype: Any
) -> DrawnPrefill:
    """Draw a prefill, for `softmax_scale = d ** -0.5`; nothing is retrieved but passages of the same topic.

    Args:
        pattern: what scores look like; `near`, `n_retrieved`, `retrieved_score` and `gate` have no part in it.
        n_q_heads: a multiple of n_kv_heads.
        n_kv_heads: at least 1.
        seqlen: queries and keys, at least 128.
        d: head dim, at least 66.
        dtype: of q, k and v: float32, bfloat16 or float16.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """
    _check_shape(
        n_q_heads, n_kv_heads, dtype, ("seqlen", seqlen, max(128, 8 * pattern.n_sinks)), ("d", d, WAVE_LEAST_D)
    )
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(pattern.seed)
    group, sinks, position = n_q_heads // n_kv_heads, slice(pattern.n_sinks), np.arange(seqlen)
    passage = position // PASSAGE
    step = math.log(max(seqlen / SHORTEST_WAVE, math.e)) / N_WAVES
    angle = np.multiply.outer(position, np.exp(-step * np.arange(N_WAVES)) / SHORTEST_WAVE)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    q = np.empty((seqlen, n_q_heads, d), dtype)
    k, v = (np.empty((seqlen, n_kv_heads, d), dtype) for _ in "kv")
    for kv in range(n_kv_heads):
        u = np.linalg.qr(rng.standard_normal((d, d)))[0].T
        stock = rng.standard_normal((N_TOPICS, TOPIC_SIZE))
        stock /= np.linalg.norm(stock, axis=1, keepdims=True)
        topic = stock[rng.integers(N_TOPICS, size=passage[-1] + 1)][passage]
        relevance = pattern.passage_noise * rng.standard_normal(passage[-1] + 1)[passage]
        # What waves add to a score at distance 0.
        mean = pattern.local_score + relevance - pattern.decay * step * N_WAVES
        mean[sinks] = pattern.sink_score
        parts = [
            mean[:, None] / COMMON**0.5,
            pattern.decay * step / (WAVES / N_WAVES) ** 0.5 * waves,
            TOPIC_SCORE / TOPIC**0.5 * topic,
        ]
        parts[1][sinks], parts[2][sinks] = 0.0, 0.0
        c = np.concatenate(parts, axis=1).astype(np.float32)
        keys = np.float32(pattern.noise) * rng.standard_normal((seqlen, d), np.float32)
        for along, direction in zip(c.T, u.astype(np.float32), strict=False):
            keys += along[:, None] * direction
        k[:, kv] = keys
        values = rng.standard_normal((seqlen, d), np.float32)
        values[sinks] *= np.float32(SINK_VALUES)
        v[:, kv] = values
        own = d - c.shape[1]
        shared = rng.standard_normal((passage[-1] + 1, own))[passage]
        for head in range(kv * group, (kv + 1) * group):
            rest = REST_OF_GROUP**0.5 * shared + (1 - REST_OF_GROUP) ** 0.5 * rng.standard_normal((seqlen, own))
            rate = rng.uniform(1 - pattern.rate_spread, 1 + pattern.rate_spread)
            w = np.concatenate(
                [np.full((seqlen, 1), COMMON**0.5), rate * (WAVES / N_WAVES) ** 0.5 * waves, TOPIC**0.5 * topic], axis=1
            )
            missing = 1 - np.square(w).sum(axis=1, keepdims=True)
            w = np.concatenate([w, rest * np.sqrt(missing / np.square(rest).sum(axis=1, keepdims=True))], axis=1)
            queries = np.zeros((seqlen, d), np.float32)
            for along, direction in zip(w.T.astype(np.float32), u.astype(np.float32), strict=True):
                queries += along[:, None] * direction
            q[:, head] = np.float32(d**0.5) * queries
    return DrawnPrefill(q, k, v)


class Threshold(NamedTuple):
    """A threshold, and what it does."""

    value: float
    """Above 0, at most 1."""
    margin: float
    """Distance of its logarithm from the closest decision of the rule, in units of s."""
    skipped: int
    """(KV head, tile) pairs that it skips."""
    total: int
    """All pairs."""

    @property
    def share(self) -> float:
        """Of the pairs that it skips."""
        return self.skipped / self.total


def threshold_for(
    rule: str, drawn: Drawn, share: float, *, tile_kv: int = 128, margin: float = LEAST_MARGIN
) -> Threshold:
    """The threshold that skips as nearly as possible a share of the (KV head, tile) pairs of all sequences together.

    Args:
        rule: "skip_softmax": a pair is skipped if all heads of the group skip it in `reference.skip_softmax`; "sparse":
            if `reference.sparse_decode.sparse_decode` skips it, in one split; "gate": if the gate of `gated_decode`
            skips it, in one split. That then tests the others with `softmax_threshold`, which is not looked at here.
        drawn: the operands; alpha and delta of any dtype.
        share: 0 to below 1. 0: the test is on and skips nothing.
        tile_kv: keys per tile, at least 1.
        margin: least distance of the threshold's logarithm from every decision, those of single heads included,
            above 0 and below 1. Kernels whose scores are closer than that to the exact ones decide alike.

    Raises:
        ValueError, TypeError: an argument is out of range; or every threshold with that margin is off by more than
            `MOST_OFF` and one pair. The more decisions there are, the closer together: a smaller margin may do.
    """
    if rule not in RULES:
        raise ValueError(f"rule: received {rule!r}, allowed {', '.join(RULES)}")
    if not 0 <= share < 1:
        raise ValueError(f"share: received {share}, allowed 0 to below 1")
    _check_number("tile_kv", tile_kv, int)
    if tile_kv < 1:
        raise ValueError(f"tile_kv: received {tile_kv}, allowed at least 1")
    if not 0 < margin < 1:
        raise ValueError(f"margin: received {margin}, allowed above 0 and below 1")

    above = _above(rule, drawn, tile_kv)
    return nearest_threshold(above.max(axis=1), above, share, margin)


def nearest_threshold(closest: Array, above: Array, share: float, margin: float) -> Threshold:
    """The threshold that skips most nearly a share of the pairs.

    Args:
        closest: of each pair, the least logarithm of a threshold that skips it, inf if none does.
        above: of each decision that has to keep a distance, the logarithm at which it changes; may hold inf.
        share: of the pairs.
        margin: least distance.

    Raises:
        ValueError: as `threshold_for`.
    """
    decisions = np.unique(above[np.isfinite(above)])
    # Below all decisions, in the middle between two, and the largest there is.
    middles = (decisions[1:] + decisions[:-1]) / 2
    thresholds = np.exp([decisions.min(initial=0.0) - 1.0, *middles[middles < 0], 0.0])
    logs = np.log(thresholds)
    after = np.searchsorted(decisions, logs)
    ends = np.concatenate([[-np.inf], decisions, [np.inf]])
    margins = np.minimum(logs - ends[after], ends[after + 1] - logs)
    skipped = np.searchsorted(np.sort(closest, axis=None), logs)
    total = closest.size
    off = np.abs(skipped - share * total)
    best = np.lexsort((-margins, np.where(margins < margin, np.inf, off)))[0]
    found = Threshold(float(thresholds[best]), float(margins[best]), int(skipped[best]), total)
    if off[best] > max(1.0, MOST_OFF * total):
        raise ValueError(f"share: received {share}, allowed {found.share:.4f}, the nearest with a margin of {margin}")
    return found


def _check_shape(n_q_heads: int, n_kv_heads: int, dtype: Any, *sizes: tuple[str, int, int]) -> None:
    """Heads, sizes (name, value, least) and dtype of what is drawn."""
    for name, value, least in (("n_q_heads", n_q_heads, 1), ("n_kv_heads", n_kv_heads, 1), *sizes):
        _check_number(name, value, int)
        if value < least:
            raise ValueError(f"{name}: received {value}, allowed at least {least}")
    if n_q_heads % n_kv_heads:
        raise ValueError(f"n_q_heads: received {n_q_heads}, allowed a multiple of the {n_kv_heads} KV heads")
    if np.dtype(dtype) not in FLOATS.values():
        raise TypeError(f"dtype: received {np.dtype(dtype)}, allowed {', '.join(FLOATS)}")


def _check_number(name: str, value: Any, of: type) -> None:
    kinds = (int, np.integer) if of is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: received {value!r}, allowed {'an integer' if of is int else 'a number'}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: received {value}, allowed a finite number")


def _runs(rng: np.random.Generator, seqlen_kv: int, n: int) -> Array:
    """First keys of n runs in the middle three quarters, each in a stretch of its own."""
    edges = np.linspace(seqlen_kv / 8, seqlen_kv * 7 / 8, n + 1) / RUN
    return np.asarray(RUN * rng.integers(np.ceil(edges[:-1]), np.floor(edges[1:])), np.int64)


def _weights(rng: np.random.Generator, pattern: AttentionPattern, group: int, d: int) -> Array:
    """w, `[group, d]`: what the heads look at."""
    used = 2 + pattern.n_retrieved
    w = np.zeros((group, d))
    w[:, 0] = COMMON**0.5
    w[:, 1] = DISTANCE**0.5 * rng.uniform(1 - pattern.rate_spread, 1 + pattern.rate_spread, group)
    for run in range(2, used):
        heads = rng.permutation(group)[: -(-group // 2)]  # one half
        w[heads, run] = (RETRIEVED / pattern.n_retrieved) ** 0.5
    own, shared = rng.standard_normal((group, d - used)), rng.standard_normal(d - used)
    rest = REST_OF_GROUP**0.5 * shared + (1 - REST_OF_GROUP) ** 0.5 * own
    missing = 1 - np.square(w).sum(axis=1, keepdims=True)
    w[:, used:] = rest * np.sqrt(missing / np.square(rest).sum(axis=1, keepdims=True))
    return w


def _keys(rng: np.random.Generator, pattern: AttentionPattern, n: int, runs: Array) -> tuple[Array, Array]:
    """c, float32 `[n, 2 + n_retrieved]`, and the relevance of keys to their gates, `[n]`."""
    x = np.arange(n)[::-1]
    fall = pattern.decay * np.log1p(x / pattern.near)
    number = (x + rng.integers(PASSAGE)) // PASSAGE  # the newest passage may be short
    passages = pattern.passage_noise * rng.standard_normal((2, number[0] + 1))
    relevance = passages[0, number] - fall
    gate = relevance + GATE_NOISE * passages[1, number]
    mean = np.full(n, pattern.local_score)
    to_runs = np.zeros((n, len(runs)))
    oldest = pattern.local_score - fall[0]
    for i, first in enumerate(runs):
        run = slice(first, first + RUN)
        mean[run], relevance[run], gate[run] = oldest, 0.0, 0.0
        to_runs[run, i] = (pattern.retrieved_score - oldest) / (RETRIEVED / len(runs)) ** 0.5
    sinks = slice(pattern.n_sinks)
    mean[sinks], relevance[sinks], gate[sinks] = pattern.sink_score, 0.0, 0.0
    c = np.column_stack([mean / COMMON**0.5, relevance / DISTANCE**0.5, to_runs])
    return c.astype(np.float32), gate


def _above(rule: str, drawn: Drawn, tile_kv: int) -> Array:
    """How far each tile is above the largest before it, in units of s, `[pairs, heads that decide, n_tiles]`.

    A pair is skipped iff that is below the logarithm of the threshold for all of these heads. Tiles are in the order of
    the visit; the first one is inf.
    """
    batch, n_q_heads, d = drawn.q.shape
    n, n_kv_heads = drawn.k.shape[1:3]
    group = n_q_heads // n_kv_heads
    n_tiles = -(-n // tile_kv)
    of_pairs = []
    for b, kv in np.ndindex(batch, n_kv_heads):
        heads = slice(kv * group, (kv + 1) * group)
        if rule == "gate":
            rows = np.zeros(n_tiles * tile_kv)  # a tile that sticks out counts a 0
            rows[:n] = drawn.delta[b, kv]
            tiles, alpha = rows.reshape(n_tiles, tile_kv), drawn.alpha[b, heads].astype(np.float64)
            products = np.multiply.outer([alpha.min(), alpha.max()], [tiles.min(axis=1), tiles.max(axis=1)])
            largest = products.max(axis=(0, 1))[None]
        else:
            scores = drawn.q[b, heads].astype(np.float64) @ drawn.k[b, :, kv].astype(np.float64).T
            largest = tile_maxima(scores, 0, range(n_tiles), tile_kv)
        if rule == "sparse":
            largest = largest.max(axis=0, keepdims=True)
        if rule != "skip_softmax":
            largest = largest[:, ::-1]  # from right to left
        of_pairs.append(d**-0.5 * (largest - running_max(largest)))
    return np.stack(of_pairs)
