"""The benchmark `flash_decode`: decode attention over flat and paged caches, in the kernels' own layouts.

Inputs are drawn in kernel layout, and the oracle looks at the same arrays through views. The bound is the time to read
the keys and values that some query sees once, at the DMA rate of the cores of the launch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import nkisim
from benchmarks.calibration._model import extrapolated, modelled
from benchmarks.calibration.rows import DECODES, XPU_PERF
from benchmarks.cases import Baseline, Benchmark, Check, Goal, Published, Result, Timing
from contributed._checks import PARTITIONS
from contributed._decode_launch import Launch, Options, launch
from contributed._decode_plan import Cache, FlatCache, PagedCache, d_major_keys
from contributed.decode_attention import decode_attention_gqa_fwd
from contributed.flash_decode import combine_splits, flash_decode_fwd
from nkisim import resolve_target
from nkisim.latency import estimate
from nkisim.latency.constants import Constants
from nkisim.latency.transfers import core_rate
from reference.budget import share_of_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
}
POOL = 2**22 + 1  # random numbers that caches are filled from; odd, so that no two rows of a long pair are the same
CHECKED_KEYS = 2**18  # the oracle looks at as many keys of a case; enough for all pairs of most
TEACHING_TILES = 512  # tiles times KV heads that the teaching kernel is simulated with in full
TEACHING_FEW, TEACHING_MORE = 8, 16  # tiles per KV head that a longer run is extrapolated from


@dataclass(frozen=True)
class DecodeCase:
    """One decode step.

    Args:
        name: on the command line.
        model: whose heads these are.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        lengths: keys of each sequence.
        d: head dim.
        s: new tokens per sequence.
        layout: of the cache: "d-major" (K; V is always s-major), "s-major" or "paged".
        block_size: keys per page.
        dtype: of q, and of the cache unless `cache_dtype` says otherwise.
        cache_dtype: of K and V.
        window: keys visible to a token, its own among them; None for all.
        softcap: of the scores.
        n_cores: of the launch.
        goals: what it should reach.
        published: what others measured.
    """

    name: str
    model: str
    n_q_heads: int
    n_kv_heads: int
    lengths: tuple[int, ...]
    d: int = 128
    s: int = 1
    layout: str = "d-major"
    block_size: int = 0
    dtype: str = "bfloat16"
    cache_dtype: str = ""
    window: int | None = None
    softcap: float | None = None
    n_cores: int = 1
    goals: tuple[Goal, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def pairs(self) -> int:
        """Sequences times KV heads."""
        return len(self.lengths) * self.n_kv_heads

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.n_q_heads // self.n_kv_heads

    @property
    def left(self) -> int | None:
        """Keys visible before a token's own."""
        return None if self.window is None else self.window - 1

    @property
    def cache(self) -> Any:
        """Dtype of K and V."""
        return DTYPES[self.cache_dtype or self.dtype]

    @property
    def shape(self) -> str:
        """The problem in short."""
        low, high = min(self.lengths), max(self.lengths)
        keys = f"{high}" if low == high else f"{low}..{high}"
        parts = [f"{self.model}: batch {len(self.lengths)}, {self.n_q_heads}/{self.n_kv_heads} heads, d {self.d}"]
        parts.append(f"{keys} keys")
        parts.append(f"pages of {self.block_size}" if self.layout == "paged" else f"{self.layout} K")
        parts.append(self.cache_dtype or self.dtype)
        parts += [f"{self.s} new tokens"] if self.s > 1 else []
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += [f"soft cap {self.softcap:g}"] if self.softcap is not None else []
        parts += [f"{self.n_cores} cores"] if self.n_cores > 1 else []
        return ", ".join(parts)

    @property
    def visible(self) -> tuple[int, ...]:
        """Keys of each sequence that some new token sees."""
        return tuple(n if self.left is None else min(n, self.left + self.s) for n in self.lengths)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that have to be read."""
        return 2 * sum(self.visible) * self.n_kv_heads * self.d * int(self.cache.itemsize)

    @property
    def scales(self) -> dict[str, Any]:
        """Factors of stored keys and values."""
        return {"k_scale": 0.5, "v_scale": 2.0} if self.cache_dtype else {}

    def refused(self, target: str) -> str:
        """Why it cannot run on a target."""
        most = resolve_target(target).cores_per_launch_max
        return f"{self.n_cores} cores per launch, {target} has {most}" if self.n_cores > most else ""

    def bound_us(self, target: str) -> float:
        """Time to read those bytes once."""
        gbps = core_rate(Constants(resolve_target(target)))
        return self.kv_bytes / (gbps * 1e3) / self.n_cores


LLAMA_70B, LLAMA_8B, QWEN_8B, QWEN_06B = "Llama-3-70B", "Llama-3-8B", "Qwen3-8B", "Qwen3-0.6B"
MISTRAL, GEMMA_9B, GEMMA_1B = "Mistral-7B", "Gemma-2-9B", "Gemma-3-1B"
K = 1024
WITHIN_15 = (Goal("ratio", 1.15),)
WITHIN_25 = (Goal("ratio", 1.25),)
MEASURED = {row.key: row for row in DECODES}


def _tkg(key: str) -> Published:
    """A row of the calibration."""
    row = MEASURED[key]
    return Published(f"{row.what}, 2 cores", row.measured, row.target, row.source)


def _xla(keys: int, us: float) -> Published:
    """Attention as the compiler makes it, without a kernel, at the shape of those rows."""
    return Published(f"XLA's scaled_dot_product_attention, the same shape, {keys} keys", us, "trn2", XPU_PERF)


RAGGED = (512, K, 2 * K, 3 * K, 4 * K, 8 * K, 16 * K, 32 * K)

CASES = (
    DecodeCase("llama-3-70b-512", LLAMA_70B, 64, 8, (512,)),
    DecodeCase("llama-3-70b-2k", LLAMA_70B, 64, 8, (2 * K,)),
    DecodeCase("llama-3-70b-8k", LLAMA_70B, 64, 8, (8 * K,), goals=(*WITHIN_15, Goal("speed_up", 20.0))),
    DecodeCase("llama-3-70b-16k", LLAMA_70B, 64, 8, (16 * K,), goals=WITHIN_15),
    DecodeCase("llama-3-70b-32k", LLAMA_70B, 64, 8, (32 * K,), goals=WITHIN_15),
    DecodeCase("llama-3-70b-64k", LLAMA_70B, 64, 8, (64 * K,), goals=WITHIN_15),
    DecodeCase("llama-3-70b-128k", LLAMA_70B, 64, 8, (128 * K,), goals=WITHIN_15),
    DecodeCase("one-pair-32k", LLAMA_70B, 8, 1, (32 * K,), goals=(Goal("ratio", 1.3),)),
    DecodeCase("one-pair-128k-lnc2", LLAMA_70B, 8, 1, (128 * K,), n_cores=2),
    DecodeCase("s-major-8k", LLAMA_70B, 64, 8, (8 * K,), layout="s-major", goals=WITHIN_25),
    DecodeCase("s-major-32k", LLAMA_70B, 64, 8, (32 * K,), layout="s-major", goals=WITHIN_25),
    *(
        DecodeCase(f"paged-{n}-8k", LLAMA_70B, 64, 8, (8 * K,), layout="paged", block_size=n, goals=WITHIN_25)
        for n in (16, 32, 64, 128)
    ),
    DecodeCase("xpu-perf-4k", LLAMA_70B, 64, 8, (4 * K,) * 16, n_cores=2, goals=(Goal("modelled_us", 460.0),),
               published=(_tkg("tkg-4096"), _xla(4096, 940.0))),
    DecodeCase("xpu-perf-4k-80-heads", "xpu-perf's shape", 80, 8, (4 * K,) * 16, layout="paged", block_size=128,
               n_cores=2, published=(_tkg("tkg-4096"), _xla(4096, 940.0))),
    DecodeCase("xpu-perf-4k-flat", "xpu-perf's shape", 80, 8, (4 * K,) * 16, layout="s-major", n_cores=2,
               published=(_tkg("tkg-4096-flat"),)),
    DecodeCase("xpu-perf-16k", "xpu-perf's shape", 80, 8, (16 * K,) * 16, layout="paged", block_size=128, n_cores=2,
               published=(_tkg("tkg-16384"), _xla(16384, 15847.0))),
    DecodeCase("64-pairs-4k-lnc2", LLAMA_70B, 64, 8, (4 * K,) * 8, n_cores=2, goals=(Goal("modelled_us", 460.0),)),
    DecodeCase("ragged-512-32k", LLAMA_70B, 8, 1, RAGGED),
    DecodeCase("ragged-same-sum", LLAMA_70B, 8, 1, (sum(RAGGED) // len(RAGGED),) * len(RAGGED)),
    DecodeCase("ragged-paged-16", LLAMA_70B, 8, 1, RAGGED, layout="paged", block_size=16),
    DecodeCase("new-4-8k", LLAMA_70B, 64, 8, (8 * K,), s=4),
    DecodeCase("float8-8k", LLAMA_70B, 64, 8, (8 * K,), cache_dtype="float8_e4m3"),
    DecodeCase("float32-8k", LLAMA_70B, 64, 8, (8 * K,), dtype="float32"),
    DecodeCase("llama-3-8b-8k", LLAMA_8B, 32, 8, (8 * K,)),
    DecodeCase("llama-3-8b-1k-batch-8", LLAMA_8B, 32, 8, (K,) * 8),
    DecodeCase("qwen3-8b-32k", QWEN_8B, 32, 8, (32 * K,)),
    DecodeCase("qwen3-0.6b-4k-batch-4", QWEN_06B, 16, 8, (4 * K,) * 4),
    DecodeCase("mistral-7b-32k-window", MISTRAL, 32, 8, (32 * K,), window=4 * K),
    DecodeCase("gemma-2-9b-8k", GEMMA_9B, 16, 8, (8 * K,), d=256, softcap=50.0),
    DecodeCase("gemma-2-9b-8k-window", GEMMA_9B, 16, 8, (8 * K,), d=256, softcap=50.0, window=4 * K),
    DecodeCase("gemma-3-1b-32k", GEMMA_1B, 4, 1, (32 * K,), d=256),
)  # fmt: skip


class _Inputs:
    """q, and the cache in kernel layout; every row and page that no sequence uses holds NaN."""

    def __init__(self, case: DecodeCase, seed: int = 0) -> None:
        self.case = case
        rng = np.random.default_rng(seed)
        batch, heads, d = len(case.lengths), case.n_kv_heads, case.d
        self.q = rng.standard_normal((batch, case.s, case.n_q_heads, d), np.float32).astype(DTYPES[case.dtype])
        self.most_keys = max(case.lengths)
        self.table: Array | None = None
        self.layout: Cache
        if case.layout == "paged":
            shape = self._pages(rng)
            k_shape = shape
        else:
            if case.layout == "d-major":
                self.most_keys = d_major_keys(self.most_keys)
            shape = (batch, heads, self.most_keys, d)
            k_shape = (batch, heads, d, self.most_keys) if case.layout == "d-major" else shape
            self.layout = FlatCache(heads, self.most_keys)
        self.k, self.v = np.empty(k_shape, case.cache), np.empty(shape, case.cache)
        # Drawing every element of a large cache would take longer than simulating the kernel.
        self.pool = rng.standard_normal(min(POOL, self.v.size), np.float32).astype(case.cache)
        nan = np.array(np.nan, case.cache)
        if self.table is not None:
            self.k[-1] = self.v[-1] = nan
        for b, n in enumerate(case.lengths):
            for head in range(heads):
                for x, transposed in ((self.k, case.layout == "d-major"), (self.v, False)):
                    self._fill(rng, x, b, head, n, transposed, nan)

    def _pages(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Deals pages at random; the last page belongs to nobody, and the table ends with -1."""
        size = self.case.block_size
        needed = [-(-n // size) for n in self.case.lengths]
        self.table = np.full((len(needed), max(needed)), -1, np.int32)
        order = list(rng.permutation(sum(needed)).astype(np.int32))
        for b, n in enumerate(needed):
            self.table[b, :n], order = order[:n], order[n:]
        self.most_keys = max(needed) * size
        self.layout = PagedCache(self.case.n_kv_heads, size, self.table)
        return sum(needed) + 1, self.case.n_kv_heads, size, self.case.d

    def _fill(
        self, rng: np.random.Generator, x: Array, b: int, head: int, n: int, transposed: bool, nan: Array
    ) -> None:
        """Random rows for the keys of one pair."""
        if self.table is not None:
            size = self.case.block_size
            pages = self.table[b, : -(-n // size)]
            rows = np.full((len(pages) * size, self.case.d), nan, x.dtype)
            rows[:n] = self._random(rng, n, self.case.d)
            x[pages, head] = rows.reshape(len(pages), size, self.case.d)
            return
        pair = x[b, head]
        if transposed:
            pair[:, :n] = self._random(rng, self.case.d, n)
            pair[:, n:] = nan
        else:
            pair[:n] = self._random(rng, n, self.case.d)
            pair[n:] = nan

    def _random(self, rng: np.random.Generator, rows: int, columns: int) -> Array:
        """The pool from a random element on, round and round; its size makes rows of a pair differ."""
        start, n = int(rng.integers(self.pool.size)), rows * columns
        drawn = np.empty(n, self.pool.dtype)
        first = min(n, self.pool.size - start)
        drawn[:first] = self.pool[start : start + first]
        drawn[first:] = np.resize(self.pool, n - first)
        return drawn.reshape(rows, columns)

    def pair(self, b: int, head: int) -> tuple[Array, Array]:
        """K and V [length, d] of a pair; views of a flat cache."""
        n = self.case.lengths[b]
        if self.table is not None:
            pages = self.table[b, : -(-n // self.case.block_size)]
            k, v = (x[pages, head].reshape(-1, self.case.d)[:n] for x in (self.k, self.v))
            return k, v
        k = self.k[b, head].T if self.case.layout == "d-major" else self.k[b, head]
        return k[:n], self.v[b, head, :n]

    def launch(self) -> Launch:
        """The kernels' launch, as the wrappers in `contributed/` make it."""
        case = self.case
        return launch(
            flash_decode_fwd,
            combine_splits,
            self.layout,
            list(case.lengths),
            Options(left=case.left, softcap=case.softcap, **case.scales),
            q_shape=self.q.shape,
            n_kv_heads=case.n_kv_heads,
            itemsize=case.cache.itemsize,
            most_keys=self.most_keys,
            n_splits=None,
            n_cores=case.n_cores,
            with_lse=False,
            d_major_keys=self.most_keys if case.layout == "d-major" else None,
        )


def run_case(case: DecodeCase, target: str) -> Result:
    """Run a case in the simulator, compare with the oracle, and only then model its time."""
    inputs = _Inputs(case)
    made = inputs.launch()
    kernel = made.decode[2] if made.geometry.n_cores == 2 else made.decode
    traces = [nkisim.Trace()]
    try:
        result = nkisim.simulate(kernel, target=target, trace=traces[0])(*made.arguments(inputs.q, inputs.k, inputs.v))
        o = result
        if made.geometry.n_splits > 1:
            traces.append(nkisim.Trace())
            arguments = made.combine_arguments(inputs.q, *result)
            o, _ = nkisim.simulate(made.combine, target=target, trace=traces[1])(*arguments)
    except nkisim.NkiError as error:
        return Result(case, target, Check(0, case.pairs, "pairs", 0.0, f"the simulator refuses the kernel: {error}"))
    check = _check(inputs, np.asarray(o).reshape(inputs.q.shape))
    if check.failure:
        return Result(case, target, check)
    timing = Timing.of([estimate(trace) for trace in traces], case.bound_us(target))
    return Result(case, target, check, timing, _teaching(inputs, target))


def _check(inputs: _Inputs, o: Array) -> Check:
    """Compare as many (sequence, KV head) pairs as `CHECKED_KEYS` allows, spread evenly; all must be finite."""
    case = inputs.case
    if not np.isfinite(o.astype(np.float32)).all():
        return Check(0, case.pairs, "pairs", 0.0, "the result is not finite")
    count = min(case.pairs, max(2, CHECKED_KEYS * case.pairs // (sum(case.visible) * case.n_kv_heads)))
    chosen = sorted({round(i) for i in np.linspace(0, case.pairs - 1, count)})
    options: dict[str, Any] = {"window_size": (case.left, None), "softcap": case.softcap, **case.scales}
    worst = 0.0
    for number in chosen:
        b, head = divmod(number, case.n_kv_heads)
        heads = slice(head * case.group, (head + 1) * case.group)
        k, v = (x[None, :, None] for x in inputs.pair(b, head))
        problem = inputs.q[b : b + 1, :, heads], k, v
        exact, low = oracle(*problem, **options).o, flash_decode_rounded(*problem, **options)[0]
        difference, share = share_of_budget(o[b : b + 1, :, heads], exact, low, inputs.q.dtype)
        worst = max(worst, share)
        if not share <= 1.0:
            where = f"sequence {b}, KV head {head}: difference {difference:.3g} is {share:.3g} of the budget"
            return Check(len(chosen), case.pairs, "pairs", share, where)
    return Check(len(chosen), case.pairs, "pairs", worst)


def _teaching(inputs: _Inputs, target: str) -> Baseline:
    """`decode_attention_gqa_fwd` on the same keys, put in its layout: one launch per sequence, on one core."""
    case = inputs.case
    for refused, why in (
        (case.d > PARTITIONS, f"none: d > {PARTITIONS}"),
        (case.s > 1, "none: one new token"),
        (case.window is not None, "none: no window"),
        (case.softcap is not None, "none: no soft cap"),
        (bool(case.cache_dtype), "none: one dtype"),
    ):
        if refused:
            return Baseline(None, why)
    total, how = 0.0, ""
    for n, count in Counter(case.lengths).items():
        run = partial(_teaching_us, inputs, case.lengths.index(n), target)
        tiles = -(-n // PARTITIONS)
        if tiles * case.n_kv_heads <= TEACHING_TILES:
            total += count * run(n / PARTITIONS)
        else:
            total += count * extrapolated(run, TEACHING_FEW, TEACHING_MORE, tiles)
            how = f"extrapolated from {TEACHING_FEW * PARTITIONS} and {TEACHING_MORE * PARTITIONS} keys"
    return Baseline(total, how)


def _teaching_us(inputs: _Inputs, b: int, target: str, tiles: float) -> float:
    """Modelled time of the teaching kernel on the first tiles of a sequence's keys."""
    case, n = inputs.case, round(tiles * PARTITIONS)
    k, v = (np.empty((case.n_kv_heads, case.d, n), case.cache) for _ in "kv")
    for head in range(case.n_kv_heads):
        rows = inputs.pair(b, head)
        k[head], v[head] = (x[:n].T for x in rows)
    q = np.ascontiguousarray(inputs.q[b, 0].T)
    return modelled(decode_attention_gqa_fwd, q, k, v, case.n_q_heads, case.n_kv_heads, target=target).total_us


BENCHMARK = Benchmark(
    "flash_decode",
    "contributed/flash_decode.py and paged_decode.py; the DMA bound is K and V of the visible keys, read once",
    CASES,
    run_case,
)
