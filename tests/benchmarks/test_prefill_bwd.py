"""The benchmark of the backward: bounds, the comparison of all gradients, the documentation."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cases, prefill_bwd, run
from benchmarks.cases import Goal
from benchmarks.prefill import PrefillResult, times_line
from benchmarks.prefill_bwd import BENCHMARK, BackwardCase, run_case

DOCS = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
SMALL = BackwardCase("small", "nobody", 2, 1, ((300, 300),), d=64)


@functools.cache
def result() -> PrefillResult:
    return run_case(SMALL, "trn2")


def rows(name: str) -> list[dict[str, str]]:
    part = DOCS.split(f"<!-- {name} -->\n")[1].split(f"<!-- end {name} -->")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_shapes_and_goals_that_were_asked_for() -> None:
    assert BENCHMARK in run.BENCHMARKS
    found = {(case.length, case.nm, case.share) for case in BENCHMARK.cases}
    assert found >= {(n * 1024, None, None) for n in (4, 16, 64)} | {(4096, nm, None) for nm in ((2, 4), (4, 8))}
    assert {share for _, _, share in found} >= {0.0, 0.5, 0.75, 0.9}
    for case in BENCHMARK.cases:
        assert (case.d, case.causal, case.goals) == (128, True, (Goal("slow_down", 2.7, over="the forward"),))


def test_bounds() -> None:
    case = BackwardCase("a", "m", 4, 1, ((512, 512),))
    # Ten tiles of each of four heads; five products and a transpose of 128 columns.
    assert case.useful_us("trn2") == pytest.approx(40 * 5 * 128 / 2400)
    assert case.bound_us("trn2") == pytest.approx(40 * 6 * 128 / 2400)
    assert case.useful_us("trn2", 15) == pytest.approx(25 * 5 * 128 / 2400)
    assert case.bound_us("trn2", 15) == pytest.approx(25 * 6 * 128 / 2400)
    # ds, a fourth of dq; scores out of PSUM, the choice; six and 28 pairs of groups at half rate, the latter twice.
    for nm, pairs in (((2, 4), 6 * 32), ((4, 8), 2 * 28 * 16)):
        cycles = 128 + 32 + 2 * 128 + 2 * pairs
        assert replace(case, nm=nm).bound_us("trn2") == pytest.approx(40 * cycles / 960)
    # do, q, o of four heads, k and v of one.
    assert case.dma_bound_us("trn2") == pytest.approx((12 + 2) * 512 * 256 / 368e3)


@pytest.mark.parametrize(
    ("n", "heads", "rows"),
    [(300, 2, (0, 300)), (4096, 8, (2816, 3328)), (16384, 2, (12032, 12544)), (65536, 1, (49024, 49280))],
)
def test_checked_rows_cross_the_end_of_a_block(n: int, heads: int, rows: tuple[int, int]) -> None:
    found = BackwardCase("a", "m", heads, 1, ((n, n),)).checked
    assert (found.start, found.stop) == rows
    assert n == 300 or found.start % 1024 > found.stop % 1024 > 0


def test_a_case_from_end_to_end() -> None:
    r = result()
    assert r.timing is not None, r.check.failure
    assert (r.check.checked, r.check.of, r.check.failure) == (300, 300, "")
    assert 0.0 < r.check.share <= 1.0
    assert r.baseline is not None
    assert r.baseline.us is not None
    assert r.timing.modelled_us > r.baseline.us > 0.0
    assert r.values(r.timing)["slow_down"] == pytest.approx(r.timing.modelled_us / r.baseline.us)
    assert times_line(r).split(" | ")[:2] == ["| `small`", "nobody: 2/1 heads, d 64, 300 queries"]
    parts = cases.blocks(BENCHMARK, [r])
    assert list(parts) == ["flash_attention_bwd trn2 times", "flash_attention_bwd trn2 work"]
    assert "| forward, modelled us | time over forward |" in parts["flash_attention_bwd trn2 times"]


@pytest.mark.parametrize(
    ("which", "at", "factor", "words"),
    [
        (0, 150, 1.1, "dq: difference"),
        (1, 150, 1.1, "dk: difference"),
        (2, 150, 1.1, "dv: difference"),
        (0, 5, np.nan, "the result is not finite"),
        (0, 5, 1.1, "dq: not 0 where no gradient comes from"),
        (1, 280, 1.1, "dk: not 0 where no gradient comes from"),
    ],
    ids=str,
)
def test_a_wrong_gradient_fails(
    which: int, at: int, factor: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = prefill_bwd.flash_attention_bwd

    def wrong(*arguments: Any, **options: Any) -> Any:
        got = right(*arguments, **options)
        row = got[which][0, at]
        got[which][0, at] = row.astype(np.float32) * factor if row.any() else factor
        return got

    monkeypatch.setattr(prefill_bwd, "flash_attention_bwd", wrong)
    monkeypatch.setattr(BackwardCase, "checked", slice(100, 228))
    r = run_case(SMALL, "trn2")
    assert r.failed
    assert r.check.failure.startswith(words)


@pytest.mark.parametrize("part", ["times", "skip"])
def test_documentation_has_a_line_for_every_case(part: str) -> None:
    times = rows(f"flash_attention_bwd trn2 {part}")
    found = [c for c in BENCHMARK.cases if (c.share is not None) == (part == "skip")]
    assert [(row["case"], row["shape"]) for row in times] == [(f"`{c.name}`", c.shape) for c in found]
    for case, row in zip(found, times, strict=True):
        ours, forward = (float(row[x].replace(",", "")) for x in ("modelled us", "forward, modelled us"))
        skipped = int(row["tiles skipped"].split()[0].replace(",", "")) if part == "skip" else 0
        assert row["bound us"] == cases.number(case.bound_us("trn2", skipped))
        assert float(row["time over forward"]) == pytest.approx(ours / forward, rel=0.001)
        assert ("**not met**" in row["goal"]) == (ours > 2.7 * forward)
        assert float(row["useful TensorE"].rstrip("%")) == pytest.approx(
            100 * case.useful_us("trn2", skipped) / ours, abs=0.1
        )


@pytest.mark.parametrize("options", [{"nm": (2, 4)}, {"share": 0.25}, {"window": 100}], ids=str)
def test_options_from_end_to_end(options: dict[str, Any]) -> None:
    """The forward beside it has the same ones; what was skipped is counted."""
    r = run_case(replace(SMALL, lengths=((900, 900),), d=128, **options), "trn2")
    assert r.timing is not None, r.check.failure
    assert 0.0 < r.check.share <= 1.0
    assert (r.skipped is not None) == ("share" in options)
    if r.skipped is not None:
        assert 0 < r.skipped.v_tiles < r.skipped.of == 2 * 36
        assert list(cases.blocks(BENCHMARK, [r])) == ["flash_attention_bwd trn2 skip", "flash_attention_bwd trn2 work"]
        assert "| error |" not in cases.blocks(BENCHMARK, [r])["flash_attention_bwd trn2 skip"]


def test_other_targets() -> None:
    assert replace(SMALL, d=128).refused("trn1") != ""
