"""The benchmark `flash_attention_bwd`: dq, dk and dv of prefill attention, beside the forward on the same q, k and v.

o and lse are those of the forward kernel. do is 0 but in a run of rows in the later part of the sequence, across the
end of a block of queries where there is one: the oracle looks at these rows only, and gives dq of all rows and dk and
dv of all keys, with which all of the kernel's are compared. Times do not depend on the numbers.

The bound is that of the Tensor Engine: QK, do V^T, P^T do, ds^T Q, ds K, and the transposes of ds for the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import nkisim
from benchmarks.cases import Baseline, Benchmark, Check, Goal, Timing
from benchmarks.flash_decode import LLAMA_70B, POOL, Array, K
from benchmarks.prefill import (
    DTYPE,
    PrefillCase,
    PrefillResult,
    as_text,
    dense,
    failed,
    inputs,
    is_finite,
    tables,
)
from benchmarks.prefill_bounds import Work, products, weighing
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
    """One sequence without a prefix, dense and causal."""

    def useful_us(self, target: str, skipped: int = 0) -> float:
        """Time of the Tensor Engine for the five products of the visible tiles."""
        assert skipped == 0, "no tile is skipped"
        return ((products(self.d) * 2 + weighing(self.d) * 3) * self.n_tiles).ns(target)["tensor"] / 1e3

    def bound_us(self, target: str, skipped: int = 0) -> float:
        """The same with the transposes of ds."""
        return self.useful_us(target, skipped) + (Work(tensor=PARTITIONS) * self.n_tiles).ns(target)["tensor"] / 1e3

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


def run_case(case: BackwardCase, target: str) -> PrefillResult:
    """Run a case in the simulator, compare with the oracle, and only then model its time."""
    q, k, v = inputs(case)
    forward = dense(case.lengths, case.n_q_heads, case.n_kv_heads, case.d, "normal", target)
    pool = np.random.default_rng(1).standard_normal(POOL, np.float32).astype(DTYPE)
    do = np.zeros_like(q)
    do[case.checked] = np.resize(pool, do[case.checked].shape)
    try:
        with recording() as traces:
            got = flash_attention_bwd(*(x[None] for x in (do, q, k, v, forward.o, forward.lse)), target=target)
    except nkisim.NkiError as error:
        return failed(case, target, f"the simulator refuses the kernel: {error}")
    if not is_finite(got):
        return failed(case, target, "the result is not finite")
    check = _check(case, do, (got[0][0], got[1][0], got[2][0]))
    if check.failure:
        return PrefillResult(case, target, check)
    timing = Timing.of([estimate(traces[KERNEL])], case.dma_bound_us(target))
    bound_us, useful_us = case.bound_us(target), case.useful_us(target)
    baseline = Baseline(forward.us, "", "forward")
    return PrefillResult(case, target, check, timing, baseline, bound_us=bound_us, useful_us=useful_us)


def _check(case: BackwardCase, do: Array, got: tuple[Array, Array, Array]) -> Check:
    """Compare all rows, with an oracle that gets those of `case.checked` as the last ones of their keys."""
    q, k, v = inputs(case)
    rows, n = case.checked, case.length
    problem = [x[None] for x in (do[rows], q[rows], k[: rows.stop], v[: rows.stop])]
    exact, low = oracle(*problem), flash_attention_bwd_rounded(*problem)
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


GOALS = (Goal("slow_down", 2.7, over="the forward"),)
BENCHMARK = Benchmark(
    "flash_attention_bwd",
    "contributed/flash_attention_bwd.py; the bound is the Tensor Engine's work for the visible tiles",
    tuple(
        BackwardCase(name, LLAMA_70B, heads, 1, ((n, n),), goals=GOALS)
        for name, heads, n in (("llama-3-70b-1k", 8, K), ("llama-3-70b-4k", 8, 4 * K), ("llama-3-70b-16k", 2, 16 * K))
    ),
    run_case,
    tables,
    as_text,
)
