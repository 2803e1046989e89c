"""The benchmark `flash_attention_bwd`: dq, dk and dv of prefill attention, beside the forward with the same options.

o, lse and decisions about tiles are those of the forward kernel on the same q, k and v; decisions have to be those of
float64 for every tile. do is 0 but in a run of rows in the later part of the sequence, across the end of a block of
queries where there is one: the oracle looks at these rows only, and gives dq of all rows and dk and dv of all keys,
with which all of the kernel's are compared. Times do not depend on the numbers, but for decisions.

The bound is that of the engine that visible tiles keep busy the longest, by `benchmarks/prefill_bounds.py`; of tiles
that the forward skipped there is none, as nothing of them has to be known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import NamedTuple

import numpy as np

import nkisim
from benchmarks.cases import WORK, Baseline, Benchmark, Check, Goal, Skipped, Timing, table, work_line
from benchmarks.flash_decode import LLAMA_70B, POOL, Array, K
from benchmarks.prefill import (
    DTYPE,
    PrefillCase,
    PrefillResult,
    as_text,
    expected,
    failed,
    inputs,
    is_finite,
    tables,
)
from benchmarks.prefill_bounds import Work, backward, backward_selection, backward_useful
from contributed._checks import PARTITIONS
from contributed.flash_attention_bwd import flash_attention_bwd
from nkisim.latency import estimate
from nkisim.nki import recording
from reference.budget import share_of_budget
from reference.flash_attention_bwd import flash_attention_bwd as oracle
from reference.rounded_attention import flash_attention_bwd_rounded

KERNEL = "prefill_bwd"
CHECKED_SCORES = 2**24  # scores of all heads that the oracle looks at
BLOCK_ROWS = 1024  # blocks of queries end at multiples of it, or hold the whole sequence


@dataclass(frozen=True)
class BackwardCase(PrefillCase):
    """One causal sequence without a prefix."""

    def useful_us(self, target: str, skipped: int = 0) -> float:
        """Time of the Tensor Engine for the five products of the visible tiles, but for so many that are skipped."""
        return (backward_useful(self.d) * (self.n_tiles - skipped)).ns(target)["tensor"] / 1e3

    def bound_us(self, target: str, skipped: int = 0) -> float:
        """Time of the engine that these tiles keep busy the longest."""
        work = backward(self.d)
        if self.nm is not None:
            work += backward_selection(self.nm[1])
        return (work * (self.n_tiles - skipped)).bound_ns(target) / 1e3

    def dma_bound_us(self, target: str) -> float:
        """Time to read the rows of do, q, o, k and v once."""
        rows = self.length * (3 * self.n_q_heads + 2 * self.n_kv_heads)
        return Work(dma=rows * self.d * DTYPE.itemsize).ns(target)["dma"] / 1e3

    @property
    def length(self) -> int:
        """Queries, and keys."""
        return self.lengths[0][0]

    @property
    def checked(self) -> slice:
        """Rows whose do is not 0."""
        n = self.length
        rows = min(n, max(2 * PARTITIONS, CHECKED_SCORES // (n * self.n_q_heads)))
        middle = max(n * 3 // 4 // BLOCK_ROWS * BLOCK_ROWS, rows - rows // 2)
        end = min(n, middle + rows // 2)
        return slice(end - rows, end)


class Forward(NamedTuple):
    """What the forward kernel gives."""

    o: Array
    lse: Array
    kept: list[Array] | None
    us: float
    """Modelled."""


def forward(case: BackwardCase, threshold: float | None, target: str) -> Forward:
    """The forward kernel on the inputs of a case; not checked but for what its caller looks at."""
    made = case.launch(threshold)
    trace = nkisim.Trace()
    results = nkisim.simulate(made.kernel, target=target, trace=trace)(*made.arguments(*inputs(case)))
    kept = None if threshold is None else made.stats(results[2], case.n_q_heads).kept
    return Forward(results[0], results[1], kept, estimate(trace).total_us)


def run_case(case: BackwardCase, target: str) -> PrefillResult:
    """Run a case in the simulator, compare with the oracle, and only then model its time."""
    q, k, v = inputs(case)
    wanted = None if case.share is None else expected(case)
    options = case.options
    before = forward(case, None if wanted is None else wanted.threshold, target)
    if wanted is not None:
        assert before.kept is not None, "a launch with a threshold"
        if (before.kept[0] != wanted.kept).any():
            return failed(case, target, "decisions of the forward are not those of float64")
        options |= {"skip_softmax_threshold": wanted.threshold, "kept": before.kept}
    pool = np.random.default_rng(1).standard_normal(POOL, np.float32).astype(DTYPE)
    do = np.zeros_like(q)
    do[case.checked] = np.resize(pool, do[case.checked].shape)
    try:
        with recording() as traces:
            got = flash_attention_bwd(*(x[None] for x in (do, q, k, v, before.o, before.lse)), target=target, **options)
    except nkisim.NkiError as error:
        return failed(case, target, f"the simulator refuses the kernel: {error}")
    if not is_finite(got):
        return failed(case, target, "the result is not finite")
    check = _check(case, do, (got[0][0], got[1][0], got[2][0]), None if wanted is None else wanted.kept)
    if check.failure:
        return PrefillResult(case, target, check)
    timing = Timing.of([estimate(traces[KERNEL])], case.dma_bound_us(target))
    skipped, n_skipped = None, 0
    if wanted is not None:
        n_skipped = case.n_tiles - int(wanted.kept.sum())
        skipped = Skipped(wanted.threshold, n_skipped, n_skipped, case.n_tiles, nan)
    bound_us, useful_us = case.bound_us(target, n_skipped), case.useful_us(target, n_skipped)
    baseline = Baseline(before.us, "", "forward")
    return PrefillResult(case, target, check, timing, baseline, skipped, bound_us=bound_us, useful_us=useful_us)


def _check(case: BackwardCase, do: Array, got: tuple[Array, Array, Array], kept: Array | None) -> Check:
    """Compare all rows, with an oracle that gets those of `case.checked` as the last ones of their keys.

    `kept`: tiles that are not skipped, bool [n_q_heads, tiles of rows, tiles of keys].
    """
    q, k, v = inputs(case)
    rows, n = case.checked, case.length
    problem = [x[None] for x in (do[rows], q[rows], k[: rows.stop], v[: rows.stop])]
    options = case.options
    if kept is not None:
        first, end = rows.start // PARTITIONS, -(-rows.stop // PARTITIONS)
        options["kept"] = [kept[:, first:end, :end]]
    exact, low = oracle(*problem, **options), flash_attention_bwd_rounded(*problem, **options)
    worst = 0.0
    for name, x, right, rounded in zip(("dq", "dk", "dv"), got, exact, low, strict=True):
        own = rows if name == "dq" else slice(rows.stop)
        others = np.concatenate([x[: own.start or 0], x[own.stop :]])
        if (others != 0).any():
            return Check(0, n, "queries", np.inf, f"{name}: not 0 where no gradient comes from")
        difference, share = share_of_budget(x[own][None], right, rounded, x.dtype)
        worst = max(worst, share)
        if not share <= 1.0:
            failure = f"{name}: difference {difference:.3g} is {share:.3g} of the budget"
            return Check(rows.stop - rows.start, n, "queries", share, failure)
    return Check(rows.stop - rows.start, n, "queries", worst)


def both_tables(results: Sequence[PrefillResult]) -> dict[str, str]:
    """Times, those with skipped tiles in a table of their own, and work."""
    found: dict[str, str] = {}
    for name, of in (("times", [r for r in results if not r.skipped]), ("skip", [r for r in results if r.skipped])):
        if of:
            found[name] = tables(of)["times"]
    return found | {"work": table(WORK, [work_line(r) for r in results])}


GOALS = (Goal("slow_down", 2.7, over="the forward"),)


def _case(
    name: str,
    heads: int,
    n: int,
    nm: tuple[int, int] | None = None,
    share: float | None = None,
    window: int | None = None,
) -> BackwardCase:
    return BackwardCase(name, LLAMA_70B, heads, 1, ((n, n),), window=window, nm=nm, share=share, goals=GOALS)


DENSE = (
    _case("llama-3-70b-1k", 8, K),
    _case("llama-3-70b-4k", 8, 4 * K),
    _case("llama-3-70b-16k", 2, 16 * K),
    _case("llama-3-70b-64k", 1, 64 * K),
    _case("llama-3-70b-16k-window", 2, 16 * K, window=4 * K),
)
NM = tuple(
    _case(f"{n}-of-{m}-{length // K}k", heads, length, nm=(n, m))
    for length, heads in ((4 * K, 2), (16 * K, 1))
    for n, m in ((2, 4), (4, 8))
)
SKIP = tuple(
    _case(f"{n // K}k-skip-{share:.0%}".rstrip("%"), 2, n, share=share)
    for n, share in ((4 * K, 0.75), *((16 * K, share) for share in (0.0, 0.5, 0.75, 0.9)))
)
BENCHMARK = Benchmark(
    "flash_attention_bwd",
    "contributed/flash_attention_bwd.py; the bound is the busiest engine's work for the visible tiles that are kept",
    DENSE + NM + SKIP,
    run_case,
    both_tables,
    as_text,
)
