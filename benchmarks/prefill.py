"""The benchmarks `flash_attention_fwd`, `flash_attention_fwd_nm` and `flash_attention_fwd_skip`: prefill attention.

All results come with lse. Before any time they have to agree with the float64 oracle on whole tiles of 128 rows of one
head, spread evenly over all of them; decisions of skip-softmax have to be those of float64 for every tile.

The bound of a case is what its visible tiles cost the engine that is busy the longest, by
`benchmarks/prefill_bounds.py`; where tiles are skipped, of those only what cannot be skipped. Baselines are the dense
launch on the same q, k and v.

Inputs of dense cases are independent normal numbers. Those of N:M lie on a coarse grid, small multiples of 1/4, so that
all scores are exact and a selection does not hang on rounding. Those of skip-softmax are drawn by `sparse_inputs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite, isnan
from typing import Any, NamedTuple

import numpy as np

import nkisim
from benchmarks.calibration.report import number
from benchmarks.cases import (
    ENGINES,
    PUBLISHED,
    WORK,
    Baseline,
    Benchmark,
    Check,
    Goal,
    Published,
    Result,
    Skipped,
    Timing,
    line,
    published_lines,
    table,
    work_line,
)
from benchmarks.flash_decode import DTYPES, GEMMA_9B, LLAMA_8B, LLAMA_70B, MISTRAL, POOL, QWEN_8B, Array, K
from benchmarks.prefill_bounds import (
    CHUNK_TILES,
    SELECTION_CHUNK_TILES,
    Work,
    always,
    flows_table,
    kept,
    products,
    selection,
    weighing,
)
from benchmarks.sparse_inputs import AttentionPattern, draw_prefill, nearest_threshold
from contributed._checks import PARTITIONS
from contributed._prefill_launch import Launch, launch
from contributed._prefill_plan import Geometry, Span, Sparsity, Window
from contributed.flash_attention_fwd import prefill_fwd
from contributed.flash_decode import combine_splits
from nkisim import resolve_target
from nkisim.hardware import GEN3
from nkisim.latency import estimate
from reference.budget import share_of_budget
from reference.flash_attention import flash_attention as oracle
from reference.rounded_attention import flash_attention_rounded
from reference.sparse_decode import running_max, tile_maxima

DTYPE = DTYPES["bfloat16"]
PATTERN = AttentionPattern()
CHECKED_SCORES = 2**24  # scores that the oracle looks at
MOST_CHECKED = 24  # tiles of rows
LEAST_MARGIN = 1e-4  # of every decision about a tile, in units of s; the error of float32 scores is a tenth of it


@dataclass(frozen=True)
class PrefillCase:
    """One prefill on one core.

    Args:
        name: on the command line.
        model: whose heads these are.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        lengths: (queries, keys) of each sequence; queries are the last rows of their keys.
        d: head dim.
        causal: whether a query sees no later keys.
        window: keys visible to a query, its own among them; None for all.
        nm: scores that stay of every so many; None for all.
        recent: keys up to a query's own that N:M leaves alone.
        share: of the tiles, that skip-softmax is to skip, 0 to below 1; the test is on, also at 0. None: off.
        goals: what it should reach.
        published: what others measured.
    """

    name: str
    model: str
    n_q_heads: int
    n_kv_heads: int
    lengths: tuple[tuple[int, int], ...]
    d: int = 128
    causal: bool = True
    window: int | None = None
    nm: tuple[int, int] | None = None
    recent: int = 64
    share: float | None = None
    goals: tuple[Goal, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def shape(self) -> str:
        """The problem in short."""
        parts = [f"{self.model}: {self.n_q_heads}/{self.n_kv_heads} heads, d {self.d}"]
        if len(self.lengths) > 1:
            of = [n for n, _ in self.lengths]
            parts.append(f"{len(of)} sequences of {min(of)}..{max(of)}")
        else:
            ((queries, keys),) = self.lengths
            parts.append(f"{queries} queries" if queries == keys else f"{queries} queries of {keys} keys")
        parts += [] if self.causal else ["not causal"]
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += [f"{self.nm[0]}:{self.nm[1]}"] if self.nm is not None else []
        parts += [f"{self.share:.0%} of tiles to skip"] if self.share is not None else []
        return ", ".join(parts)

    @property
    def left(self) -> int | None:
        """Keys visible before a query's own."""
        return None if self.window is None else self.window - 1

    @property
    def spans(self) -> tuple[Span, ...]:
        """The sequences, packed one after the other."""
        first = np.cumsum([(0, 0), *self.lengths], axis=0)
        return tuple(Span(int(q), n, int(kv), m) for (q, kv), (n, m) in zip(first, self.lengths, strict=False))

    @property
    def options(self) -> dict[str, Any]:
        """Of the oracle, without a threshold."""
        n, m = self.nm or (0, 4)
        return {
            "causal": self.causal,
            "window_size": (self.left, None),
            "sparsity_n": n,
            "sparsity_m": m,
            "dense_recent_tokens": self.recent,
        }

    def refused(self, target: str) -> str:
        """Why it cannot run on a target."""
        hardware = resolve_target(target)
        return "" if hardware.generation >= GEN3 else f"bounds are of another data flow than that of {target}"

    def row_tiles(self) -> Iterator[RowTile]:
        """Tiles of rows of all sequences, of one head."""
        for span in self.spans:
            for first in range(0, span.len_q, PARTITIONS):
                end = min(first + PARTITIONS, span.len_q)
                ahead = span.len_kv - span.len_q
                begin = 0 if self.left is None else max(0, first + ahead - self.left)
                yield RowTile(span, first, end, begin, end + ahead if self.causal else span.len_kv)

    @property
    def n_tiles(self) -> int:
        """Visible tiles of 128 rows and 128 keys, of all query heads."""
        return self.n_q_heads * sum(tile.n_tiles for tile in self.row_tiles())

    def useful_us(self, target: str, skipped: int = 0) -> float:
        """Time of the Tensor Engine for the products of the visible tiles, with so many of them skipped."""
        work = products(self.d) * self.n_tiles + weighing(self.d) * (self.n_tiles - skipped)
        return work.ns(target)["tensor"] / 1e3

    def bound_us(self, target: str, skipped: int = 0) -> float:
        """Time of the engine that visible tiles keep busy the longest, with so many of them skipped."""
        chunk = CHUNK_TILES if self.nm is None else SELECTION_CHUNK_TILES
        work = always(self.d) * self.n_tiles + kept(self.d, chunk) * (self.n_tiles - skipped)
        if self.nm is not None:
            work += selection(self.nm[1]) * self.n_tiles
        return work.bound_ns(target) / 1e3

    def dma_bound_us(self, target: str) -> float:
        """Time to read the rows of q, k and v once."""
        queries, keys = (sum(n[i] for n in self.lengths) for i in (0, 1))
        rows = queries * self.n_q_heads + 2 * keys * self.n_kv_heads
        return Work(dma=rows * self.d * DTYPE.itemsize).ns(target)["dma"] / 1e3

    def launch(self, threshold: float | None) -> Launch:
        """The kernel's launch, as `flash_attention_fwd` makes it."""
        return launch(
            prefill_fwd,
            combine_splits,
            self.spans,
            Window(self.left, 0 if self.causal else None),
            q_shape=(sum(q for q, _ in self.lengths), self.n_q_heads, self.d),
            n_kv_heads=self.n_kv_heads,
            itemsize=DTYPE.itemsize,
            scale=self.d**-0.5,
            sparsity=None if self.nm is None else Sparsity(*self.nm, 0, self.recent),
            threshold=threshold,
            with_lse=True,
            n_cores=1,
        )


class RowTile(NamedTuple):
    """Rows first..end of a sequence's queries, and positions begin..stop of the keys that they see."""

    span: Span
    first: int
    end: int
    begin: int
    stop: int

    @property
    def n_tiles(self) -> int:
        """Tiles of 128 keys that they see."""
        return -(-self.stop // PARTITIONS) - self.begin // PARTITIONS


@lru_cache(maxsize=2)
def operands(
    lengths: tuple[tuple[int, int], ...], n_q_heads: int, n_kv_heads: int, d: int, kind: str
) -> tuple[Array, Array, Array]:
    """q, k and v, packed.

    Args:
        lengths: (queries, keys) of each sequence.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        d: head dim.
        kind: "normal", "grid" or "pattern"; the last of one sequence without a prefix.
    """
    if kind == "pattern":
        return tuple(draw_prefill(PATTERN, n_q_heads, n_kv_heads, lengths[0][1], d, DTYPE))  # type: ignore[return-value]
    rng = np.random.default_rng(0)
    shapes = [(sum(n[i] for n in lengths), heads, d) for i, heads in ((0, n_q_heads), (1, n_kv_heads), (1, n_kv_heads))]
    drawn = []
    for i, shape in enumerate(shapes):
        pool = rng.integers(-4, 5, POOL) / 4.0 if kind == "grid" and i < 2 else rng.standard_normal(POOL, np.float32)
        start = int(rng.integers(POOL))
        drawn.append(np.resize(np.roll(pool.astype(DTYPE), -start), shape))
    return drawn[0], drawn[1], drawn[2]


def inputs(case: PrefillCase) -> tuple[Array, Array, Array]:
    """q, k and v of a case, packed."""
    kind = "pattern" if case.share is not None else "grid" if case.nm is not None else "normal"
    return operands(case.lengths, case.n_q_heads, case.n_kv_heads, case.d, kind)


@lru_cache(maxsize=1)
def closest(lengths: tuple[tuple[int, int], ...], n_q_heads: int, n_kv_heads: int, d: int) -> tuple[Array, Array]:
    """Logarithm of the least threshold that skips each tile of a causal sequence, in float64.

    Returns:
        `[n_q_heads, n_tiles, n_tiles]`, tiles of rows and of keys: inf where none does; and whether tiles are visible,
        bool `[n_tiles, n_tiles]`.
    """
    q, k, _ = (x.astype(np.float64) for x in operands(lengths, n_q_heads, n_kv_heads, d, "pattern"))
    ((n, _),) = lengths
    count = -(-n // PARTITIONS)
    found = np.full((n_q_heads, count, count), np.inf)
    for head, i in np.ndindex(n_q_heads, count):
        first, end = i * PARTITIONS, min((i + 1) * PARTITIONS, n)
        s = d**-0.5 * (q[first:end, head] @ k[:end, head * n_kv_heads // n_q_heads].T)
        np.copyto(s[:, first:], -np.inf, where=~np.tri(end - first, dtype=np.bool_))
        largest = tile_maxima(s[None], 0, range(i + 1), PARTITIONS)[0]
        # A row keeps the first tile: it has nothing before it.
        found[head, i, 1 : i + 1] = (largest - running_max(largest[None])[0])[:, 1:].max(axis=0)
    return found, np.tri(count, dtype=np.bool_)


class Expected(NamedTuple):
    """A threshold, and the tiles that float64 keeps with it, bool `[n_q_heads, tiles of rows, tiles of keys]`."""

    threshold: float
    kept: Array


def expected(case: PrefillCase) -> Expected:
    """The threshold of a case's share."""
    assert case.share is not None, "a case with a threshold"
    above, visible = closest(case.lengths, case.n_q_heads, case.n_kv_heads, case.d)
    seen = above[:, visible]
    found = nearest_threshold(seen, seen, case.share, LEAST_MARGIN)
    return Expected(found.value, visible & ~(above < np.log(found.value)))


@dataclass(frozen=True)
class PrefillResult(Result):
    """A case that ran.

    Args:
        bound_us: of its tiles, see `PrefillCase.bound_us`.
        useful_us: of the Tensor Engine for QK and PV.
        v_loaded: with a threshold, tiles of V that blocks load, each for all of its row tiles that see it,
        v_wanted: and those of them that one of these keeps.
    """

    bound_us: float = field(kw_only=True, default=0.0)
    useful_us: float = field(kw_only=True, default=0.0)
    v_wanted: int = field(kw_only=True, default=0)
    v_loaded: int = field(kw_only=True, default=0)

    def values(self, timing: Timing) -> dict[str, float]:
        """What goals speak of."""
        _, busiest_us = busiest(timing)
        return super().values(timing) | {
            "ratio": timing.modelled_us / self.bound_us,
            "over_busiest": timing.modelled_us / busiest_us,
            "useful": self.useful_us / timing.modelled_us,
        }

    def as_json(self) -> dict[str, Any]:
        """As that of other benchmarks, with the bound of the tiles."""
        found = super().as_json()
        if self.timing is not None:
            engine, us = busiest(self.timing)
            values = {name: x for name, x in self.values(self.timing).items() if isfinite(x)}
            found |= {"bound_us": self.bound_us, "busiest": engine, "busiest_us": us} | values
        return found


def busiest(timing: Timing) -> tuple[str, float]:
    """The engine that works the longest, and its time in us."""
    engine = max(ENGINES, key=lambda name: timing.busy_us[name])
    return engine, timing.busy_us[engine]


def run_case(case: PrefillCase, target: str) -> PrefillResult:
    """Run a case in the simulator, compare with the oracle, and only then model its time."""
    q, k, v = inputs(case)
    wanted = None if case.share is None else expected(case)
    made = case.launch(None if wanted is None else wanted.threshold)
    trace = nkisim.Trace()
    try:
        results = nkisim.simulate(made.kernel, target=target, trace=trace)(*made.arguments(q, k, v))
    except nkisim.NkiError as error:
        return failed(case, target, f"the simulator refuses the kernel: {error}")
    if not is_finite(results):
        return failed(case, target, "the result is not finite")
    n_skipped, v_wanted, v_loaded = 0, 0, 0
    if wanted is not None:
        stats = made.stats(results[2], case.n_q_heads)
        wrong = np.argwhere(stats.kept[0] != wanted.kept)
        if wrong.size:
            head, row, column = wrong[0]
            where = f"head {head}, rows {row * PARTITIONS}, keys {column * PARTITIONS}: "
            return failed(case, target, f"{where}{len(wrong)} decisions, this the first, are not those of float64")
        n_skipped = int(stats.tiles_skipped.sum())
        visible = np.tri(len(wanted.kept[0]), dtype=np.bool_)[None]
        v_wanted, v_loaded = (_tiles_of_blocks(x, made.geometry) for x in (wanted.kept, visible))
        v_loaded *= case.n_q_heads // made.geometry.heads
    check, away = _check(case, results[0], results[1], wanted)
    if check.failure:
        return PrefillResult(case, target, check)
    timing = Timing.of([estimate(trace)], case.dma_bound_us(target))
    skipped = None if wanted is None else Skipped(wanted.threshold, 0, n_skipped, case.n_tiles, away)
    baseline = None
    if case.nm is not None or wanted is not None:
        kind = "pattern" if wanted is not None else "grid"
        us = dense(case.lengths, case.n_q_heads, case.n_kv_heads, case.d, kind, target).us
        baseline = Baseline(us, "", "dense")
    bound_us, useful_us = case.bound_us(target, n_skipped), case.useful_us(target, n_skipped)
    return PrefillResult(
        case,
        target,
        check,
        timing,
        baseline,
        skipped,
        bound_us=bound_us,
        useful_us=useful_us,
        v_wanted=v_wanted,
        v_loaded=v_loaded,
    )


def _tiles_of_blocks(tiles: Array, g: Geometry) -> int:
    """Tiles of keys that are true for some row tile of a block, in all blocks; [heads, row tiles, tiles of keys]."""
    heads = min(g.heads, len(tiles))
    firsts = np.arange(0, tiles.shape[1], g.q_tiles)
    of_rows = np.logical_or.reduceat(tiles, firsts, axis=1)
    return int(np.logical_or.reduceat(of_rows, np.arange(0, len(tiles), heads), axis=0).sum())


def failed(case: PrefillCase, target: str, failure: str) -> PrefillResult:
    """A case without a time."""
    return PrefillResult(case, target, Check(0, _n_row_tiles(case), "row tiles", 0.0, failure))


def is_finite(results: Sequence[Array]) -> bool:
    """Whether all numbers are."""
    return all(bool(np.isfinite(x.astype(np.float32)).all()) for x in results)


def _n_row_tiles(case: PrefillCase) -> int:
    return case.n_q_heads * len(list(case.row_tiles()))


def _check(case: PrefillCase, o: Array, lse: Array, wanted: Expected | None) -> tuple[Check, float]:
    """Compare as many tiles of rows of a head as `CHECKED_SCORES` allows, spread evenly; and the largest error of one.

    The oracle gets a tile's rows as the last ones of the keys up to the last that they see.
    """
    q, k, v = inputs(case)
    tiles, group = list(case.row_tiles()), case.n_q_heads // case.n_kv_heads
    total = case.n_q_heads * len(tiles)
    mean = sum(tile.stop for tile in tiles) / len(tiles) * PARTITIONS
    count = min(total, MOST_CHECKED, max(2, int(CHECKED_SCORES / mean)))
    chosen = sorted({round(i) for i in np.linspace(0, total - 1, count)})
    worst, error = 0.0, 0.0
    for i in chosen:
        head, at = divmod(i, len(tiles))
        tile, kv = tiles[at], head // group
        rows = slice(tile.span.q + tile.first, tile.span.q + tile.end)
        keys = slice(tile.span.kv, tile.span.kv + tile.stop)
        problem = [x[None, :, None] for x in (q[rows, head], k[keys, kv], v[keys, kv])]
        options = case.options
        if wanted is not None:
            without = oracle(*problem, **options).o[0, :, 0]
            options["kept"] = [wanted.kept[head, at, : tile.n_tiles][None, None]]
        exact, low = oracle(*problem, **options), flash_attention_rounded(*problem, **options)
        for name, got, right, rounded, dtype in (
            ("o", o[rows, head][None, :, None], exact.o, low[0], o.dtype),
            ("lse", lse[rows, head][None, :, None], exact.lse, low[1], lse.dtype),
        ):
            # lse of a row is one number: each has its own budget.
            a, b, c = (x[..., None] if name == "lse" else x for x in (got, right, rounded))
            difference, share = share_of_budget(a, b, c, dtype)
            worst = max(worst, share)
            if not share <= 1.0:
                where = f"{name} of head {head}, rows {rows.start}..{rows.stop}"
                failure = f"{where}: difference {difference:.3g} is {share:.3g} of the budget"
                return Check(len(chosen), total, "row tiles", share, failure), error
        if wanted is not None:
            away = np.linalg.norm(o[rows, head].astype(np.float64) - without) / np.linalg.norm(without)
            error = max(error, float(away))
    return Check(len(chosen), total, "row tiles", worst), error


class Dense(NamedTuple):
    """A causal launch without options."""

    o: Array
    lse: Array
    us: float
    """Modelled."""


@lru_cache(maxsize=2)
def dense(
    lengths: tuple[tuple[int, int], ...], n_q_heads: int, n_kv_heads: int, d: int, kind: str, target: str
) -> Dense:
    """Such a launch on `operands` of these arguments; not checked."""
    made = PrefillCase("dense", "", n_q_heads, n_kv_heads, lengths, d).launch(None)
    trace = nkisim.Trace()
    arguments = made.arguments(*operands(lengths, n_q_heads, n_kv_heads, d, kind))
    o, lse = nkisim.simulate(made.kernel, target=target, trace=trace)(*arguments)
    return Dense(o, lse, estimate(trace).total_us)


# -- output

TIMES = (
    "case", "shape", "modelled us", "busiest engine", "its us", "time over it", "useful TensorE", "bound us", "ratio",
)  # fmt: skip
LEFT_OUT = ("threshold", "tiles skipped", "V tiles of blocks that nobody wants", "error")
LAST = ("goal", "checked")


def times_line(result: PrefillResult) -> str:
    """A line of the table of times."""
    t, base, x = result.timing, result.baseline, result.skipped
    assert t is not None, "a failed case has no times"
    values = result.values(t)
    engine, us = busiest(t)
    cells = [f"`{result.case.name}`", result.case.shape]
    if x is not None:
        cells += [f"{x.threshold:.3g}", f"{x.v_tiles:,} of {x.of:,} ({x.share:.1%})"]
        cells += [] if result.v_loaded == 0 else [f"{result.v_loaded - result.v_wanted:,} of {result.v_loaded:,}"]
        cells += [] if isnan(x.error) else [f"{x.error:.2e}"]
    cells += [number(t.modelled_us), engine, number(us), f"{values['over_busiest']:.3f}", f"{values['useful']:.1%}"]
    cells += [number(result.bound_us), f"{values['ratio']:.3f}"]
    if base is not None and base.us is not None:
        cells += [number(base.us), f"{t.modelled_us / base.us:.3f}"]
    goals = "; ".join(f"{goal}: {'met' if met else '**not met**'}" for goal, met in result.verdicts())
    return line(*cells, goals, str(result.check))


def tables(results: Sequence[PrefillResult]) -> dict[str, str]:
    """Times, work, and what others published."""
    first = results[0]
    left_out = () if first.skipped is None else LEFT_OUT[:2] if isnan(first.skipped.error) else LEFT_OUT
    beside = (f"{first.baseline.kernel}, modelled us", f"time over {first.baseline.kernel}") if first.baseline else ()
    columns = (*TIMES[:2], *left_out, *TIMES[2:], *beside, *LAST)
    found = {
        "times": table(columns, [times_line(r) for r in results]),
        "work": table(WORK, [work_line(r) for r in results]),
    }
    if first.baseline is None:
        found["flows"] = flows_table(first.target)
    published = published_lines(results)
    if published:
        found["published"] = table(PUBLISHED, published)
    return found


def as_text(result: PrefillResult) -> str:
    """A result for the terminal."""
    lines = [f"{result.case.name} on {result.target}: {result.case.shape}"]
    t = result.timing
    if t is None:
        return "\n".join([*lines, f"  FAIL {result.check.failure}"])
    engine, us = busiest(t)
    values = result.values(t)
    lines += [
        f"  correct    {result.check}",
        f"  modelled   {number(t.modelled_us)} us, {values['over_busiest']:.3f} of the {number(us)} us of {engine}, "
        f"{values['useful']:.1%} useful TensorE; bound {number(result.bound_us)} us, ratio {values['ratio']:.3f}",
    ]
    lines += [f"  goal       {goal}: {'met' if met else 'NOT MET'}" for goal, met in result.verdicts()]
    lines.append("  busy us    " + ", ".join(f"{name} {number(t.busy_us[name])}" for name in ENGINES))
    lines.append(f"  HBM        {t.hbm_read_bytes:,} bytes read, {t.hbm_write_bytes:,} written")
    if (x := result.skipped) is not None:
        lines.append(f"  threshold  {x.threshold:.3g}: {x.v_tiles:,} of {x.of:,} tiles skipped ({x.share:.1%})")
        unwanted = result.v_loaded - result.v_wanted
        lines.append(
            f"  V          {unwanted:,} of {result.v_loaded:,} tiles of blocks are wanted by none of their row tiles"
        )
    if (base := result.baseline) is not None and base.us is not None:
        lines.append(f"  baseline   {base.kernel}: {number(base.us)} us modelled, {t.modelled_us / base.us:.3f} of it")
    lines += [
        f"  published  {number(p.us)}, {p.by}: {p.what}" for p in result.case.published if p.target == result.target
    ]
    return "\n".join(lines)


# -- cases

DENSE_GOALS = (Goal("over_busiest", 1.25), Goal("useful", 0.5))
NM_GOALS = (Goal("ratio", 1.25),)
SKIP_GOALS = (Goal("ratio", 1.25), Goal("slow_down", 1.03, over="dense"))
SAMPLES = "nki-samples, latency parameter of its tests; chip and unit are not stated, read as us"
RAGGED = (64, 300, 511, 1024, 1500, 2048, 3000, 4096)


def _self(n: int) -> tuple[tuple[int, int], ...]:
    """One sequence without a prefix."""
    return ((n, n),)


def _samples(what: str, us: float) -> tuple[Published, ...]:
    return (Published(what, us, "trn2", SAMPLES),)


DENSE = (
    PrefillCase("llama-3-70b-4k", LLAMA_70B, 64, 8, _self(4 * K), goals=DENSE_GOALS),
    PrefillCase("llama-3-70b-16k", LLAMA_70B, 4, 1, _self(16 * K), goals=DENSE_GOALS),
    PrefillCase("llama-3-70b-64k", LLAMA_70B, 1, 1, _self(64 * K), goals=DENSE_GOALS),
    PrefillCase("mha-4k", "multi-head", 8, 8, _self(4 * K)),
    PrefillCase("d-64-4k", "d 64", 8, 1, _self(4 * K), d=64),
    PrefillCase("gemma-2-9b-4k", GEMMA_9B, 4, 2, _self(4 * K), d=256),
    PrefillCase("ragged-64-4k", LLAMA_70B, 8, 1, tuple((n, n) for n in RAGGED)),
    PrefillCase("chunked-512-of-16k", LLAMA_70B, 8, 1, ((512, 16 * K + 512),)),
    PrefillCase("chunked-64-of-1k", LLAMA_70B, 8, 1, ((64, K + 64),)),
    PrefillCase("mistral-7b-16k-window", MISTRAL, 4, 1, _self(16 * K), window=4 * K),
    PrefillCase("llama-3-8b-1k", LLAMA_8B, 32, 8, _self(K)),
    PrefillCase("qwen3-8b-512", QWEN_8B, 4, 1, _self(512)),
    PrefillCase("self-forcing", "Self-Forcing", 12, 12, ((4680, 6240),), causal=False,
                published=(Published("attention_cte, 12 heads, 4680 by 6240; d, dtype, mask, cores not stated",
                                     3850.0, "trn2", "Self-Forcing, pull request 93"),)),
    PrefillCase("samples-16k", "nki-samples", 1, 1, _self(16 * K), d=96,
                published=_samples("flash_fwd, 1 head, d 96, 16384 by 16384, causal, bfloat16", 4000.0)),
    PrefillCase("samples-16k-window", "nki-samples", 1, 1, _self(16 * K), d=96, window=4 * K,
                published=_samples("the same with a sliding window of 4096", 3000.0)),
    PrefillCase("samples-4k", "nki-samples", 1, 1, _self(4 * K), causal=False,
                published=(*_samples("fused self-attention, 1 head, d 128, 4096 by 4096, bfloat16", 536.0),
                           *_samples("the same with allocation by hand", 380.0))),
)  # fmt: skip

NM = tuple(
    PrefillCase(f"{n}-of-{m}-{length // K}k", LLAMA_70B, heads, 1, _self(length), nm=(n, m), goals=NM_GOALS)
    for length, heads in ((4 * K, 2), (16 * K, 1), (64 * K, 1))
    for n, m in ((2, 4), (4, 8))
)

SKIP = tuple(
    PrefillCase(
        f"{length // K}k-skip-{share:.0%}".rstrip("%"),
        LLAMA_70B,
        heads,
        1,
        _self(length),
        share=share,
        goals=SKIP_GOALS,
    )
    for length, heads, shares in (
        (4 * K, 8, (0.0, 0.25, 0.5, 0.75)),
        (16 * K, 2, (0.0, 0.25, 0.5, 0.75, 0.9)),
        (64 * K, 1, (0.0, 0.75)),
    )
    for share in shares
)

_WHAT = "contributed/flash_attention_fwd.py"
BENCHMARKS = (
    Benchmark(
        "flash_attention_fwd",
        f"{_WHAT}; the bound is the busiest engine's work for the visible tiles",
        DENSE,
        run_case,
        tables,
        as_text,
    ),
    Benchmark(
        "flash_attention_fwd_nm",
        f"{_WHAT} with N:M selection; the bound has what the selection costs",
        NM,
        run_case,
        tables,
        as_text,
    ),
    Benchmark(
        "flash_attention_fwd_skip",
        f"{_WHAT} with skip-softmax; the bound has only scores and maxima of skipped tiles",
        SKIP,
        run_case,
        tables,
        as_text,
    ),
)
