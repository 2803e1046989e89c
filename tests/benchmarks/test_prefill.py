"""Benchmarks of prefill: bounds are what they say, nothing wrong gets a time, the documentation has every case."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nkisim
from benchmarks import cases, prefill, run
from benchmarks.cases import Benchmark, Check, Goal
from benchmarks.prefill import PrefillCase, PrefillResult, run_case
from benchmarks.prefill_bounds import flows
from benchmarks.skip_pairs import pairs_with_a_tile
from contributed._prefill_launch import Launch

DOCS = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
BENCHMARKS = {b.name: b for b in prefill.BENCHMARKS}
FAST = ("qwen3-8b-512", "chunked-64-of-1k")
SMALL = PrefillCase("small", "nobody", 2, 1, ((200, 300), (130, 130)), d=64)
SKIP = PrefillCase("skip", "nobody", 2, 1, ((640, 640),), share=0.2)
by_benchmark = pytest.mark.parametrize("benchmark", prefill.BENCHMARKS, ids=lambda b: b.name)


@functools.cache
def result(case: PrefillCase) -> PrefillResult:
    return run_case(case, "trn2")


def block(name: str) -> list[str]:
    return DOCS.split(f"<!-- {name} -->\n")[1].split(f"<!-- end {name} -->")[0].splitlines()


def rows(name: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block(name)]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def shown(cell: str) -> float:
    return float(cell.replace(",", ""))


# -- what each engine has to do


@pytest.mark.parametrize(
    ("name", "tensor", "vector", "scalar", "dma"),
    [
        # Columns of 2.4 GHz, elements of 0.96 and 1.2 GHz; sums are read in 64 cycles per 1024 or 512 keys.
        ("A:", (512 + 512 + 512) / 2.4, (512 + 128 + 64) / 0.96, (512 + 32 + 256) / 1.2, 0),
        ("A with P transposed by DMA", 1024 / 2.4, (512 + 64) / 0.96, 544 / 1.2, 2 * 128 * 512 * 2 / 368),
        ("B: keys", (512 + 516) / 2.4, 0, 512 / 1.2, 0),
        ("B after", (512 + 516 + 512 + 512) / 2.4, 512 / 0.96, 512 / 1.2, 0),
        ("C:", (512 + 516 + 512 + 512) / 2.4, (512 + 64) / 0.96, 512 / 1.2, 0),
        # Differences and ranks: 3 products per score each for M = 4, 7 for M = 8.
        ("A with 2:4, diff", 512 * (3 + 2 * 3) / 2.4, 512 * 2.5 / 0.96, (512 * (1 + 1.5) + 64 + 256) / 1.2, 0),
        ("A with 4:8, diff", 512 * (3 + 2 * 7) / 2.4, 512 * 2.5 / 0.96, (512 * (1 + 7) + 64 + 256) / 1.2, 0),
        ("A with 2:4, comp", 512 * (3 + 3) / 2.4, 512 * (2.5 + 3) / 0.96, (512 + 64 + 256) / 1.2, 0),
        ("A with 4:8, comp", 512 * (3 + 7) / 2.4, 512 * (2.5 + 14) / 0.96, (512 + 64 + 256) / 1.2, 0),
        ("A with a tile skipped", 512 / 2.4, 512 / 0.96, 0, 0),
    ],
)
def test_flows(name: str, tensor: float, vector: float, scalar: float, dma: float) -> None:
    (work,) = [work for found, work, _ in flows() if found.startswith(name)]
    ns = (work * 4).ns("trn2")
    assert ns == pytest.approx({"tensor": tensor, "vector": vector, "scalar": scalar, "dma": dma}, rel=1e-9)
    assert (work * 4).bound_ns("trn2") == pytest.approx(max(tensor, vector, scalar, dma))


def test_documented_flows_follow_from_their_costs() -> None:
    found = rows("flash_attention_fwd trn2 flows")
    assert [row["data flow"] for row in found] == [name for name, _, _ in flows()]
    for row, (_, work, exact) in zip(found, flows(), strict=True):
        times = [shown(row[f"{engine} ns"]) for engine in ("tensor", "vector", "scalar", "dma")]
        assert times == [round(x) for x in (work * 4).ns("trn2").values()]
        assert row["bound ns"].startswith(f"**{max(times):.0f}**")
        columns = 512 if "skipped" in row["data flow"] else 1024
        assert row["useful TensorE"] == f"{columns / 2.4 / max((work * 4).ns('trn2').values()):.0%}"
        assert row["exact"] == exact


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (PrefillCase("a", "m", 1, 1, ((512, 512),)), 1 + 2 + 3 + 4),
        (PrefillCase("a", "m", 4, 2, ((512, 512),)), 40),
        (PrefillCase("a", "m", 1, 1, ((512, 512),), causal=False), 16),
        (PrefillCase("a", "m", 1, 1, ((200, 300), (130, 130))), 2 + 3 + 1 + 2),
        (PrefillCase("a", "m", 1, 1, ((512, 512),), window=128), 1 + 2 + 2 + 2),
        (PrefillCase("a", "m", 1, 1, ((512, 512),), window=130), 1 + 2 + 3 + 3),
    ],
)
def test_visible_tiles(case: PrefillCase, tiles: int) -> None:
    assert case.n_tiles == tiles
    # QK and PV are 128 columns each; the Vector Engine has the most to do.
    assert case.useful_us("trn2") == pytest.approx(tiles * 256 / 2400)
    assert case.bound_us("trn2") == pytest.approx(tiles * (128 + 32 + 16) / 960)


def test_bounds_of_selection_and_of_skipped_tiles() -> None:
    case = PrefillCase("a", "m", 1, 1, ((512, 512),))
    assert case.bound_us("trn2", 4) == pytest.approx((10 * 128 + 6 * 48) / 960)
    assert case.useful_us("trn2", 4) == pytest.approx((10 + 6) * 128 / 2400)
    assert replace(case, nm=(2, 4)).bound_us("trn2") == pytest.approx(10 * 128 * 9 / 2400)
    assert replace(case, nm=(4, 8)).bound_us("trn2") == pytest.approx(10 * (128 * 8.5 + 16) / 1200)
    # q once per head, k and v once per KV head, over 16 engines of 23 GB/s.
    assert replace(case, n_q_heads=4).dma_bound_us("trn2") == pytest.approx((4 + 2) * 512 * 256 / 368e3)


# -- cases


def test_the_shapes_and_goals_that_were_asked_for() -> None:
    assert list(BENCHMARKS) == ["flash_attention_fwd", "flash_attention_fwd_nm", "flash_attention_fwd_skip"]
    assert set(BENCHMARKS) <= {b.name for b in run.BENCHMARKS}
    dense = {case.name: case for case in BENCHMARKS["flash_attention_fwd"].cases}
    for length in (4, 16, 64):
        case = dense[f"llama-3-70b-{length}k"]
        assert (case.d, case.causal, case.lengths) == (128, True, ((length * 1024,) * 2,))
        assert case.goals == (Goal("over_busiest", 1.25), Goal("useful", 0.5))
    assert {(case.nm, case.lengths[0][0]) for case in BENCHMARKS["flash_attention_fwd_nm"].cases} == {
        (nm, n) for nm in ((2, 4), (4, 8)) for n in (4096, 16384, 65536)
    }
    for case in BENCHMARKS["flash_attention_fwd_nm"].cases:
        assert case.goals == (Goal("ratio", 1.25),)
    skip = BENCHMARKS["flash_attention_fwd_skip"].cases
    for length, shares in ((4096, (0.0, 0.25, 0.5, 0.75)), (16384, (0.0, 0.25, 0.5, 0.75, 0.9)), (65536, (0.0, 0.75))):
        assert tuple(case.share for case in skip if case.lengths == ((length, length),)) == shares
    for case in skip:
        assert case.goals == (Goal("ratio", 1.25), Goal("slow_down", 1.03, over="dense"))


@pytest.mark.parametrize("target", ["trn1", "inf2"])
def test_other_data_flows_are_refused(target: str) -> None:
    assert SMALL.refused(target) == f"bounds are of another data flow than that of {target}"
    assert SMALL.refused("trn3") == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 150},
        {"causal": False},
        {"nm": (2, 4), "recent": 0},
        {"nm": (4, 8)},
    ],
    ids=str,
)
def test_a_case_from_end_to_end(changes: dict[str, Any]) -> None:
    r = result(replace(SMALL, **changes))
    t = r.timing
    assert t is not None, r.check.failure
    # Two tiles of rows of each sequence and head.
    assert (r.check.checked, r.check.of, r.check.failure) == (8, 8, "")
    assert 0.0 < r.check.share <= 1.0
    engine, us = prefill.busiest(t)
    assert us == max(t.busy_us.values()) == t.busy_us[engine]
    assert r.useful_us < t.busy_us["tensor"]
    assert t.modelled_us >= r.bound_us > r.useful_us
    assert r.values(t)["useful"] == pytest.approx(r.useful_us / t.modelled_us)
    assert r.values(t)["ratio"] == pytest.approx(t.modelled_us / r.bound_us)
    assert (r.baseline is not None) == ("nm" in changes)


def test_selection_costs_more_than_dense() -> None:
    r, dense = result(replace(SMALL, nm=(4, 8))), result(replace(SMALL, nm=(4, 8))).baseline
    assert dense is not None
    assert dense.us is not None
    assert r.timing is not None
    assert r.timing.modelled_us > dense.us > 0


# -- skip-softmax


def kept_tiles(threshold: float) -> Any:
    """Tiles that each head keeps, bool `[2, 5, 5]`: the rule tile by tile, as semantics has it."""
    q, k, _ = prefill.operands(SKIP.lengths, 2, 1, 128, "pattern")
    kept = np.zeros((2, 5, 5), np.bool_)
    for head in range(2):
        s = q[:, head].astype(np.float64) @ k[:, 0].astype(np.float64).T / np.sqrt(128)
        s = np.where(np.tri(640, dtype=np.bool_), s, -np.inf)
        for row in range(5):
            best = np.full(128, -np.inf)
            for column in range(row + 1):
                largest = s[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128].max(axis=1)
                kept[head, row, column] = not (largest < best + np.log(threshold)).all()
                best = np.maximum(best, largest)
    return kept


def test_skipped_tiles_are_those_of_the_rule() -> None:
    r = result(SKIP)
    assert r.timing is not None, r.check.failure
    assert r.skipped is not None
    assert r.baseline is not None
    kept = kept_tiles(r.skipped.threshold)
    assert (r.skipped.v_tiles, r.skipped.of) == (30 - kept.sum(), 30)
    assert abs(r.skipped.v_tiles - 6) <= 1
    assert np.array_equal(prefill.expected(SKIP).kept, kept)
    assert r.bound_us == pytest.approx((30 * 128 + kept.sum() * 48) / 960)
    assert 0.0 < r.skipped.error < 0.5


def test_decisions_of_every_tile_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Launch.stats

    def wrong(self: Launch, *arguments: Any) -> Any:
        stats = right(self, *arguments)
        stats.kept[0][1, 4, 4] = False
        return stats

    monkeypatch.setattr(Launch, "stats", wrong)
    failure = run_case(SKIP, "trn2").check.failure
    assert failure == "head 1, rows 512, keys 512: 1 decisions, this the first, are not those of float64"


# -- a wrong one


def change(monkeypatch: pytest.MonkeyPatch, how: Callable[[dict[str, Any]], None]) -> None:
    """Runs the kernel with arguments by name that `how` has changed."""
    function = prefill.prefill_fwd.function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrong(*arguments: Any) -> Any:
        named = signature.bind(*arguments).arguments
        how(named)
        return function(**named)

    monkeypatch.setattr(prefill, "prefill_fwd", nkisim.jit(wrong))


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, lambda a: a.update(softmax_scale=1.1 * a["softmax_scale"]))
    r = run_case(SMALL, "trn2")
    assert r.failed
    assert r.check.failure.startswith("o of head 0, rows 0..128: difference")


def test_a_result_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nkisim.simulate

    def simulate(*arguments: Any, **options: Any) -> Any:
        kernel = right(*arguments, **options)

        def run_it(*operands: Any) -> Any:
            o, lse = kernel(*operands)
            o[3, 1, 5] = np.nan
            return o, lse

        return run_it

    monkeypatch.setattr(prefill.nkisim, "simulate", simulate)
    assert run_case(SMALL, "trn2").check.failure == "the result is not finite"


def test_a_wrong_lse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nkisim.simulate

    def simulate(*arguments: Any, **options: Any) -> Any:
        kernel = right(*arguments, **options)

        def run_it(*operands: Any) -> Any:
            o, lse = kernel(*operands)
            lse[3, 1] += 1e-3
            return o, lse

        return run_it

    monkeypatch.setattr(prefill.nkisim, "simulate", simulate)
    assert run_case(SMALL, "trn2").check.failure.startswith("lse of head 1, rows 0..128: difference 0.001")


# -- output


def made(**changes: Any) -> PrefillResult:
    timing = cases.Timing(12.0, 3.0, 4.0, dict.fromkeys(cases.ENGINES, 6.0) | {"vector": 8.0}, 1, 2, {"exp": 12.0}, 3)
    case = replace(SMALL, goals=prefill.DENSE_GOALS)
    return replace(
        PrefillResult(case, "trn2", Check(1, 2, "row tiles", 0.5), timing, bound_us=10.0, useful_us=6.6), **changes
    )


def test_line_and_text() -> None:
    parts = cases.blocks(BENCHMARKS["flash_attention_fwd"], [made()])
    assert list(parts) == [f"flash_attention_fwd trn2 {part}" for part in ("times", "work", "flows")]
    assert parts["flash_attention_fwd trn2 times"].splitlines()[2] == (
        "| `small` | nobody: 2/1 heads, d 64, 2 sequences of 130..200 | 12 | vector | 8 | 1.500 | 55.0% | 10 | 1.200 | "
        "1.25x the busiest engine: **not met**; 50% useful TensorE: met | 1 of 2 row tiles, 0.50 of the budget |"
    )
    text = prefill.as_text(made())
    assert "12 us, 1.500 of the 8 us of vector, 55.0% useful TensorE; bound 10 us, ratio 1.200" in text
    assert "1.25x the busiest engine: NOT MET" in text


def test_line_of_a_skip_case() -> None:
    skipped, base = cases.Skipped(0.0123, 0, 15, 60, 0.034), cases.Baseline(11.0, "", "dense")
    parts = cases.blocks(
        BENCHMARKS["flash_attention_fwd_skip"],
        [made(case=replace(SKIP, goals=prefill.SKIP_GOALS), skipped=skipped, baseline=base)],
    )
    assert parts["flash_attention_fwd_skip trn2 times"].splitlines()[2] == (
        "| `skip` | nobody: 2/1 heads, d 128, 640 queries, 20% of tiles to skip | 0.0123 | 15 of 60 (25.0%) | 3.40e-02 "
        "| 12 | vector | 8 | 1.500 | 55.0% | 10 | 1.200 | 11 | 1.091 | 1.25x the bound: met; at most 1.03x the time of "
        "dense: **not met** | 1 of 2 row tiles, 0.50 of the budget |"
    )


def test_json() -> None:
    found = made().as_json()
    assert (found["busiest"], found["busiest_us"], found["bound_us"]) == ("vector", 8.0, 10.0)
    assert (found["over_busiest"], found["ratio"], found["useful"]) == (1.5, 1.2, pytest.approx(0.55))


# -- the documentation


@by_benchmark
def test_documentation_has_a_line_for_every_case(benchmark: Benchmark) -> None:
    times = rows(f"{benchmark.name} trn2 times")
    assert [(row["case"], row["shape"]) for row in times] == [(f"`{c.name}`", c.shape) for c in benchmark.cases]
    assert [row["case"] for row in rows(f"{benchmark.name} trn2 work")] == [f"`{c.name}`" for c in benchmark.cases]
    for case, row in zip(benchmark.cases, times, strict=True):
        ours, skipped = shown(row["modelled us"]), 0
        if case.share is not None:
            n, _, of, _ = row["tiles skipped"].replace(",", "").split()
            skipped = int(n)
            assert int(of) == case.n_tiles
            assert abs(skipped - case.share * case.n_tiles) <= 0.02 * case.n_tiles
        assert row["bound us"] == cases.number(case.bound_us("trn2", skipped))
        assert float(row["ratio"]) == pytest.approx(ours / shown(row["bound us"]), rel=0.001)
        assert float(row["time over it"]) == pytest.approx(ours / shown(row["its us"]), rel=0.001)
        assert float(row["useful TensorE"].rstrip("%")) == pytest.approx(
            100 * case.useful_us("trn2", skipped) / ours, abs=0.1
        )
        values = {
            "ratio": float(row["ratio"]),
            "over_busiest": float(row["time over it"]),
            "useful": float(row["useful TensorE"].rstrip("%")) / 100,
        }
        if case.nm is not None or case.share is not None:
            values["slow_down"] = float(row["time over dense"])
            assert values["slow_down"] == pytest.approx(ours / shown(row["dense, modelled us"]), rel=0.001)
        for goal in case.goals:
            near = values[goal.quantity] == pytest.approx(goal.limit, abs=0.0005)
            said = row["goal"].split(str(goal))[1].split(";")[0]
            assert near or ("**not met**" in said) != goal.met(values[goal.quantity])


def test_documentation_shows_the_results_of_fast_cases() -> None:
    for name in FAST:
        found = result(BENCHMARKS["flash_attention_fwd"].case(name))
        assert prefill.times_line(found) in block("flash_attention_fwd trn2 times")
        assert cases.work_line(found) in block("flash_attention_fwd trn2 work")


def test_pairs_with_a_tile_are_as_documented() -> None:
    cases = {case.name: case for case in BENCHMARKS["flash_attention_fwd_skip"].cases}
    none = pairs_with_a_tile(cases["4k-skip-0"])
    # Blocks of eight row tiles of eight heads: 36 steps on the diagonal, 64 for each chunk of eight tiles before it.
    assert none == (
        4 * 18 + 6 * 32,
        4 * 18 + 6 * 32,
        4 * 36 + 6 * 64,
        4 * 36 + 6 * 64,
        cases["4k-skip-0"].bound_us("trn2"),
    )
    found = [pairs_with_a_tile(cases[f"4k-skip-{share}"]) for share in (50, 75)]
    pairs = [f"{x.kept_pairs / x.pairs:.0%}"[:-1] for x in found]
    steps = [f"{x.kept_steps / x.steps:.0%}"[:-1] for x in found]
    assert f"There {pairs[0]} and {pairs[1]} % of the pairs still have a tile" in DOCS
    assert f"which is {found[0].bound_us:.0f} and {found[1].bound_us:.0f} us by the same bound" in DOCS
    assert f"Of single steps {steps[0]} and {steps[1]} % have a tile" in DOCS
