"""The benchmarks `skip_softmax_decode`, `sparse_decode` and `gated_decode`: one new token, tiles of keys left out.

Inputs are drawn by `benchmarks/sparse_inputs.py`, and `threshold_for` finds the threshold that skips the share of tiles
that a case asks for. Before any time, a result has to agree with the float64 oracle, and so has every count: tiles that
are kept, rows of K and V as the kernel counts them, and bytes of K and V as the simulator saw them leave HBM.

The bound is the time to read K and V of the tiles in use once: K of the tiles that are scored, V of those that some
query head keeps. Gates are not in it. The baseline is `flash_decode` on the same K and V in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

import nkisim
from benchmarks.calibration._model import modelled
from benchmarks.cases import Baseline, Benchmark, Check, Goal, Published, Result, Skipped, Timing
from benchmarks.flash_decode import DTYPES, LLAMA_70B, Array, K
from benchmarks.sparse_inputs import AttentionPattern, Drawn, draw, threshold_for
from contributed._decode_launch import Options, kernel_layout, launch
from contributed._decode_plan import FlatCache
from contributed._sparse_launch import Counts, TileLaunch, tile_launch
from contributed.flash_decode import combine_splits, flash_decode_fwd
from contributed.skip_softmax_decode import skip_softmax_decode_fwd
from contributed.sparse_decode import gated_decode_fwd, sparse_decode_fwd
from nkisim import resolve_target
from nkisim.latency import estimate
from nkisim.latency.constants import Constants
from nkisim.latency.transfers import core_rate
from reference.budget import share_of_budget
from reference.rounded_sparse import gated_decode_rounded, skip_softmax_decode_rounded, sparse_decode_rounded
from reference.skip_softmax import skip_softmax_decode as skip_softmax_oracle
from reference.sparse_decode import gated_decode as gated_oracle
from reference.sparse_decode import keys_of_tiles
from reference.sparse_decode import sparse_decode as sparse_oracle

DTYPE, D, TILE_KV = DTYPES["bfloat16"], 128, 128
ROW_BYTES = D * DTYPE.itemsize
PATTERN = AttentionPattern()
CHECKED_SCORES = 2**19  # kept scores of all query heads that the computation in the machine's precision may have
LEAST_MARGIN = 1e-4  # of every decision, in units of s: ten times the error of float32 scores
ORACLES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "skip_softmax": (skip_softmax_oracle, skip_softmax_decode_rounded),
    "sparse": (sparse_oracle, sparse_decode_rounded),
    "gate": (gated_oracle, gated_decode_rounded),
}


@dataclass(frozen=True)
class Problem:
    """One decode step of one sequence, and a rule that decides on tiles.

    Args:
        rule: as in `benchmarks.sparse_inputs`.
        share: of the (KV head, tile) pairs that are skipped, 0 to below 1; the test is on, also at 0, and gates are
            the only test of their rule. None: all thresholds of the rule are their defaults.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        keys: of the sequence.
    """

    rule: str
    share: float | None
    n_q_heads: int = 64
    n_kv_heads: int = 8
    keys: int = 32 * K

    @property
    def drawn(self) -> Drawn:
        """The operands; the same for all rules."""
        return _drawn(self.n_q_heads, self.n_kv_heads, self.keys)

    @property
    def threshold(self) -> float:
        """Of the rule."""
        if self.share is None:
            return min(1.0, D / self.keys)
        return threshold_for(self.rule, self.drawn, self.share, tile_kv=TILE_KV).value

    def options(self, threshold: float) -> dict[str, float]:
        """Thresholds of the oracle for a threshold of the rule; at 0 no test is on."""
        if self.rule == "gate":
            return {"gate_threshold": threshold, "softmax_threshold": threshold if self.share is None else 0.0}
        return {"skip_softmax_threshold" if self.rule == "skip_softmax" else "softmax_threshold": threshold}

    def operands(self, kv: int | None = None) -> tuple[Array, ...]:
        """Of the oracle; of one KV head."""
        x, group = self.drawn, self.n_q_heads // self.n_kv_heads
        one, heads = (
            (slice(None), slice(None)) if kv is None else (slice(kv, kv + 1), slice(kv * group, (kv + 1) * group))
        )
        found = x.q[:, heads], x.k[:, :, one], x.v[:, :, one]
        return (*found, x.alpha[:, heads], x.delta[:, one]) if self.rule == "gate" else found


@lru_cache(maxsize=2)
def _drawn(n_q_heads: int, n_kv_heads: int, keys: int) -> Drawn:
    return draw(PATTERN, 1, n_q_heads, n_kv_heads, keys, D, DTYPE)


@dataclass(frozen=True)
class TileCase:
    """A problem with K in one layout; V is s-major.

    Args:
        name: on the command line.
        problem: which one.
        layout: of K: "d-major" or "s-major".
        model: whose heads these are.
        goals: what it should reach.
        published: what others measured.
    """

    name: str
    problem: Problem
    layout: str = "d-major"
    model: str = LLAMA_70B
    goals: tuple[Goal, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def shape(self) -> str:
        """The problem in short."""
        p = self.problem
        heads = f"{self.model}: batch 1, {p.n_q_heads}/{p.n_kv_heads} heads, d {D}, {p.keys} keys"
        tests = "default thresholds" if p.share is None else f"{p.share:.0%} of tiles to skip"
        return f"{heads}, {self.layout} K, {DTYPE}, {tests}"

    @property
    def d_major(self) -> bool:
        """Whether K is."""
        return self.layout == "d-major"

    def refused(self, target: str) -> str:  # noqa: ARG002
        """Why it cannot run on a target: there is no reason."""
        return ""

    def launch(self, keys: int) -> TileLaunch:
        """The kernel's launch, as the wrappers in `contributed/` make it, for a cache of as many keys."""
        p = self.problem
        kernels = {"skip_softmax": skip_softmax_decode_fwd, "sparse": sparse_decode_fwd, "gate": gated_decode_fwd}
        return tile_launch(
            kernels[p.rule],
            combine_splits,
            FlatCache(p.n_kv_heads, keys),
            [p.keys],
            q_shape=(1, 1, p.n_q_heads, D),
            n_kv_heads=p.n_kv_heads,
            itemsize=DTYPE.itemsize,
            most_keys=keys,
            tile_kv=TILE_KV,
            right_to_left=p.rule != "skip_softmax",
            softmax_scale=None,
            left=None,
            d_major_keys=keys if self.d_major else None,
            gated=p.rule == "gate",
        )

    def arguments(self, made: TileLaunch, q: Array, k: Array, v: Array) -> tuple[Any, ...]:
        """Arguments of a launch's kernel; operands in kernel layout."""
        p = self.problem
        options = p.options(expected(p).threshold)
        if p.rule != "gate":
            return made.arguments(q, k, v, list(options.values()))
        softmax, gate = options["softmax_threshold"], options["gate_threshold"]
        gates = p.drawn.alpha.astype(np.float32), p.drawn.delta
        return made.gated_arguments(q, k, v, *gates, [softmax], [gate], is_logsigmoid=True, fast=True)


class Expected(NamedTuple):
    """What the oracle says of a problem."""

    threshold: float
    """Of the rule."""
    o: Array
    """float64 [1, n_q_heads, d]."""
    dense: Array
    """o with every tile in it."""
    kept: Array
    """Tiles in the result, [1, n_q_heads]."""
    k_tiles: Array
    """Tiles that are scored, bool [n_kv_heads, n_tiles]."""
    v_tiles: Array
    """Tiles whose V is read, bool [n_kv_heads, n_tiles]."""

    def skipped(self, o: Array) -> Skipped:
        """What is left out of a result."""
        size = np.linalg.norm(self.dense, axis=-1)
        error = np.linalg.norm(o.astype(np.float64) - self.dense, axis=-1) / size
        k_tiles, v_tiles = (int((~x).sum()) for x in (self.k_tiles, self.v_tiles))
        return Skipped(self.threshold, k_tiles, v_tiles, self.v_tiles.size, float(error.max()))


@lru_cache(maxsize=4)
def expected(problem: Problem) -> Expected:
    """The oracle's word.

    Raises:
        ValueError: a decision is so close that a correct kernel may decide otherwise.
    """
    oracle, _ = ORACLES[problem.rule]
    threshold, operands = problem.threshold, problem.operands()
    o, _, stats = oracle(*operands, **problem.options(threshold))
    if stats.margin.min() < LEAST_MARGIN:
        raise ValueError(
            f"threshold: received {threshold}, {stats.margin.min()} from a decision, allowed {LEAST_MARGIN}"
        )
    dense = oracle(*operands, **problem.options(0.0)).o
    kept = stats.kept.sum(axis=-1)
    if problem.rule == "skip_softmax":
        return Expected(threshold, o, dense, kept, np.ones_like(stats.values_read[0]), stats.values_read[0])
    group = problem.n_q_heads // problem.n_kv_heads
    return Expected(threshold, o, dense, kept.repeat(group, axis=1), stats.keys_read[0], stats.kept[0])


@lru_cache(maxsize=32)
def _rounded(problem: Problem, kv: int) -> Array:
    """o of one KV head's query heads in the machine's precision, `[n_orders, 1, group, d]`."""
    _, rounded = ORACLES[problem.rule]
    o, _ = rounded(*problem.operands(kv), **problem.options(expected(problem).threshold))
    return np.asarray(o)


def run_case(case: TileCase, target: str) -> Result:
    """Run a case in the simulator, compare with the oracle, and only then model its time; that run counts nothing."""
    p = case.problem
    found = expected(p)
    q = p.drawn.q[:, None]
    k, v = kernel_layout(p.drawn.k, p.drawn.v, case.d_major)
    made = case.launch(v.shape[2])
    counting = replace(made, with_stats=True)
    trace = nkisim.Trace()
    try:
        o4 = nkisim.simulate(made.kernel, target=target, trace=trace)(*case.arguments(made, q, k, v))
        counted, _, counts = counting.run(q, case.arguments(counting, q, k, v), target)
    except nkisim.NkiError as error:
        return _failed(case, target, f"the simulator refuses the kernel: {error}")
    assert counts is not None, "a launch that counts"
    o = np.asarray(o4).reshape(found.o.shape)
    failure = (
        _not_finite(o)
        or ("" if np.array_equal(o4, counted) else "the result is another one when the kernel counts")
        or _wrong_counts(p, found, counts)
        or _wrong_bytes(case, found, trace, k.nbytes)
    )
    if failure:
        return _failed(case, target, failure)
    check = _check(p, found, o)
    if check.failure:
        return Result(case, target, check)
    row_us = ROW_BYTES / (core_rate(Constants(resolve_target(target))) * 1e3)
    bound_us = float(_rows(p, found.k_tiles).sum() + _rows(p, found.v_tiles).sum()) * row_us
    baseline = Baseline(_flash_us(p.n_q_heads, p.n_kv_heads, p.keys, case.d_major, target), "", "flash_decode")
    return Result(case, target, check, Timing.of([estimate(trace)], bound_us), baseline, found.skipped(o))


def _failed(case: TileCase, target: str, failure: str) -> Result:
    return Result(case, target, Check(0, case.problem.n_kv_heads, "pairs", 0.0, failure))


def _not_finite(o: Array) -> str:
    return "" if np.isfinite(o.astype(np.float32)).all() else "the result is not finite"


def _rows(problem: Problem, tiles: Array) -> Array:
    """Keys of the tiles of each KV head."""
    return np.asarray(keys_of_tiles(tiles, 0, problem.keys, TILE_KV).sum(axis=1))


def _wrong_counts(problem: Problem, found: Expected, counts: Counts) -> str:
    """The first count of the kernel that is not the oracle's; empty if there is none."""
    for what, of, got, right in (
        ("tiles kept", "query head", counts.kept[0, 0], found.kept[0]),
        ("rows of K read", "KV head", counts.k_rows[0], _rows(problem, found.k_tiles)),
        ("rows of V read", "KV head", counts.v_rows[0], _rows(problem, found.v_tiles)),
    ):
        if (wrong := np.flatnonzero(got != right)).size:
            i = wrong[0]
            return f"{of} {i}: the kernel counts {got[i]} {what}, the oracle {right[i]}"
    return ""


def _wrong_bytes(case: TileCase, found: Expected, trace: nkisim.Trace, k_bytes: int) -> str:
    """Whether other bytes of K and V left HBM than those of the oracle's tiles; empty if not.

    Of d-major K whole chunks of keys are read, room for more keys included, and a tile that the length cuts once more.
    """
    p = case.problem
    cut = -(-(p.keys % TILE_KV) // TILE_KV) * p.n_kv_heads * TILE_KV * ROW_BYTES
    for name, tiles in (("k", found.k_tiles), ("v", found.v_tiles)):
        accesses = [a for r in trace.records for a in r.reads if a.storage.is_argument and a.storage.name == name]
        got, right = sum(a.nbytes for a in accesses), int(_rows(p, tiles).sum()) * ROW_BYTES
        most = k_bytes + cut if name == "k" and case.d_major else right
        if not right <= got <= most:
            return f"{name}: {got} bytes leave HBM, the oracle uses {right}"
    return ""


def _check(problem: Problem, found: Expected, o: Array) -> Check:
    """Compare as many KV heads as `CHECKED_SCORES` allows, spread evenly."""
    n, group = problem.n_kv_heads, problem.n_q_heads // problem.n_kv_heads
    kept = max(1, int(found.kept.sum()) * TILE_KV)
    chosen = sorted({round(i) for i in np.linspace(0, n - 1, min(n, max(2, CHECKED_SCORES * n // kept)))})
    worst = 0.0
    for kv in chosen:
        heads = slice(kv * group, (kv + 1) * group)
        difference, share = share_of_budget(o[:, heads], found.o[:, heads], _rounded(problem, kv), o.dtype)
        worst = max(worst, share)
        if not share <= 1.0:
            where = f"KV head {kv}: difference {difference:.3g} is {share:.3g} of the budget"
            return Check(len(chosen), n, "pairs", share, where)
    return Check(len(chosen), n, "pairs", worst)


@lru_cache(maxsize=16)
def _flash_us(n_q_heads: int, n_kv_heads: int, keys: int, d_major: bool, target: str) -> float:
    """Modelled time of `flash_decode` on the same operands; it adds no gates."""
    drawn = _drawn(n_q_heads, n_kv_heads, keys)
    q = drawn.q[:, None]
    k, v = kernel_layout(drawn.k, drawn.v, d_major)
    room = v.shape[2]
    made = launch(
        flash_decode_fwd,
        combine_splits,
        FlatCache(n_kv_heads, room),
        [keys],
        Options(),
        q_shape=q.shape,
        n_kv_heads=n_kv_heads,
        itemsize=DTYPE.itemsize,
        most_keys=room,
        n_splits=1,
        n_cores=1,
        with_lse=False,
        d_major_keys=room if d_major else None,
    )
    return modelled(made.decode, *made.arguments(q, k, v), target=target).total_us


FASTER, NO_SLOWER = Goal("speed_up", 1.5, over="flash_decode"), Goal("slow_down", 1.05, over="flash_decode")
GATED_FASTER = Goal("speed_up", 3.0, over="flash_decode")


def _cases(rule: str) -> tuple[TileCase, ...]:
    """Of a rule that scores every key."""
    return (
        TileCase("llama-3-70b-32k-0", Problem(rule, 0.0), goals=(NO_SLOWER,)),
        TileCase("llama-3-70b-32k-50", Problem(rule, 0.5)),
        TileCase("llama-3-70b-32k-80", Problem(rule, 0.8), goals=(FASTER,)),
        TileCase("llama-3-70b-32k-95", Problem(rule, 0.95)),
        TileCase("s-major-32k-0", Problem(rule, 0.0), "s-major"),
        TileCase("s-major-32k-80", Problem(rule, 0.8), "s-major"),
        TileCase("llama-3-70b-8k-80", Problem(rule, 0.8, keys=8 * K)),
        TileCase("one-pair-32k-0", Problem(rule, 0.0, 8, 1)),
        TileCase("one-pair-32k-80", Problem(rule, 0.8, 8, 1)),
    )


BENCHMARKS = (
    Benchmark(
        "skip_softmax_decode",
        "contributed/skip_softmax_decode.py; the DMA bound is K, and V of the tiles that some query head keeps",
        _cases("skip_softmax"),
        run_case,
    ),
    Benchmark(
        "sparse_decode",
        "contributed/sparse_decode.py; the DMA bound is K, and V of the tiles that are kept",
        _cases("sparse"),
        run_case,
    ),
    Benchmark(
        "gated_decode",
        "contributed/sparse_decode.py; the DMA bound is K of the tiles that pass the gate, and V of those kept",
        (
            TileCase("llama-3-70b-32k-0", Problem("gate", 0.0), "s-major", goals=(NO_SLOWER,)),
            TileCase("llama-3-70b-32k-50", Problem("gate", 0.5), "s-major"),
            TileCase("llama-3-70b-32k-80", Problem("gate", 0.8), "s-major", goals=(GATED_FASTER,)),
            TileCase("llama-3-70b-32k-95", Problem("gate", 0.95), "s-major"),
            TileCase("llama-3-70b-32k-defaults", Problem("gate", None), "s-major"),
        ),
        run_case,
    ),
)
