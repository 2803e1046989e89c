"""Benchmarks of kernels that leave out tiles: nothing wrong gets a time, counts are the oracle's, the picture too."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import nkisim
from benchmarks import cases, flash_decode, plots, run, sparse_decode
from benchmarks.cases import Baseline, Check, Goal, Result, Skipped, Timing
from benchmarks.plots import Point
from benchmarks.sparse_decode import Problem, TileCase, run_case
from contributed._sparse_launch import Counts, TileLaunch

DOCS = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
BENCHMARKS = {b.name: b for b in sparse_decode.BENCHMARKS}
KERNELS = {"skip_softmax": "skip_softmax_decode_fwd", "sparse": "sparse_decode_fwd", "gate": "gated_decode_fwd"}
KEYS = 2100  # 16 tiles, and one of 52 keys
SHARE = 0.5


def small(rule: str, layout: str = "s-major", share: float | None = SHARE) -> TileCase:
    return TileCase("small", Problem(rule, share, 8, 2, KEYS), layout, "nobody")


by_rule = pytest.mark.parametrize("rule", list(KERNELS))
every = pytest.mark.parametrize(
    ("rule", "layout"), [(r, y) for r in KERNELS for y in ("s-major", "d-major") if (r, y) != ("gate", "d-major")]
)


@functools.cache
def result(rule: str, layout: str, share: float | None = SHARE) -> Result:
    return run_case(small(rule, layout, share), "trn2")


@functools.cache
def flash_us(layout: str) -> float:
    """Modelled time of the other benchmark's launch."""
    inputs = flash_decode._Inputs(flash_decode.DecodeCase("same", "nobody", 8, 2, (2100,), layout=layout))
    made, trace = inputs.launch(), nkisim.Trace()
    nkisim.simulate(made.decode, target="trn2", trace=trace)(*made.arguments(inputs.q, inputs.k, inputs.v))
    return nkisim.latency.estimate(trace).total_us


def scores(problem: Problem) -> Any:
    """s in float64, `[n_kv_heads, group, keys]`; gates by the formula of the public kernel."""
    x = problem.drawn
    q, k = x.q[0].astype(np.float64), x.k[0].astype(np.float64)
    s = np.einsum("hgd,nhd->hgn", q.reshape(k.shape[1], -1, 128), k)
    if problem.rule == "gate":
        product = x.alpha[0].reshape(k.shape[1], -1, 1).astype(np.float64) * x.delta[0, :, None].astype(np.float64)
        c = np.minimum(np.abs(product), 4)
        s += np.minimum(product, 0) - 0.05674870 * c**2 + 0.37664706 * c - 0.65169323
    return 128**-0.5 * s


def kept_tiles(problem: Problem, threshold: float) -> Any:
    """Tiles that each head keeps, bool `[n_kv_heads, group, 17]`: the rules tile by tile, as semantics has them."""
    s, x = scores(problem), problem.drawn
    n_kv_heads, group, _ = s.shape
    kept = np.zeros((n_kv_heads, group, 17), np.bool_)
    for kv in range(n_kv_heads):
        alpha = x.alpha[0, kv * group : (kv + 1) * group].astype(np.float64)
        best = np.full(group, -np.inf)
        for t in range(17) if problem.rule == "skip_softmax" else range(16, -1, -1):
            largest = s[kv, :, t * 128 : (t + 1) * 128].max(axis=1)
            if problem.rule == "sparse":
                largest = np.full(group, largest.max())
            if problem.rule == "gate":
                delta = x.delta[0, kv, t * 128 : (t + 1) * 128].astype(np.float64)
                delta = np.append(delta, [0.0] * (delta.size < 128))
                largest = np.full(group, 128**-0.5 * max(a * d for a in (min(alpha), max(alpha)) for d in delta))
            kept[kv, :, t] = ~(largest < best + np.log(threshold))
            best = np.maximum(best, largest)
    return kept


# -- cases


def test_the_shapes_and_goals_that_were_asked_for() -> None:
    assert list(BENCHMARKS) == ["skip_softmax_decode", "sparse_decode", "gated_decode"]
    for rule, name in (("skip_softmax", "skip_softmax_decode"), ("sparse", "sparse_decode")):
        found = {(c.problem, c.layout): c.goals for c in BENCHMARKS[name].cases}
        assert found == {
            (Problem(rule, 0.0, 64, 8, 32768), "d-major"): (Goal("slow_down", 1.05, over="flash_decode"),),
            (Problem(rule, 0.5, 64, 8, 32768), "d-major"): (),
            (Problem(rule, 0.8, 64, 8, 32768), "d-major"): (Goal("speed_up", 1.5, over="flash_decode"),),
            (Problem(rule, 0.95, 64, 8, 32768), "d-major"): (),
            (Problem(rule, 0.0, 64, 8, 32768), "s-major"): (),
            (Problem(rule, 0.8, 64, 8, 32768), "s-major"): (),
            (Problem(rule, 0.8, 64, 8, 8192), "d-major"): (),
            (Problem(rule, 0.0, 8, 1, 32768), "d-major"): (),
            (Problem(rule, 0.8, 8, 1, 32768), "d-major"): (),
        }
    assert [(c.problem.share, c.goals) for c in BENCHMARKS["gated_decode"].cases] == [
        (0.0, (Goal("slow_down", 1.05, over="flash_decode"),)),
        (0.5, ()),
        (0.8, (Goal("speed_up", 3.0, over="flash_decode"),)),
        (0.95, ()),
        (None, ()),
    ]
    assert {(c.problem.rule, c.problem.keys, c.layout) for c in BENCHMARKS["gated_decode"].cases} == {
        ("gate", 32768, "s-major")
    }


def test_thresholds_of_the_other_test() -> None:
    assert small("gate").problem.options(0.3) == {"gate_threshold": 0.3, "softmax_threshold": 0.0}
    defaults = small("gate", share=None).problem
    assert defaults.threshold == 128 / 2100
    assert defaults.options(0.3) == {"gate_threshold": 0.3, "softmax_threshold": 0.3}
    assert Problem("gate", None, 8, 2, 100).threshold == 1.0


# -- a correct case


@every
def test_a_case_from_end_to_end(rule: str, layout: str) -> None:
    r = result(rule, layout)
    t, base, left_out = r.timing, r.baseline, r.skipped
    assert t is not None
    assert base is not None
    assert left_out is not None
    assert (r.check.checked, r.check.of, r.check.failure) == (2, 2, "")
    assert 0.0 < r.check.share <= 1.0
    kept = kept_tiles(small(rule).problem, left_out.threshold).any(axis=1)
    assert (left_out.v_tiles, left_out.of) == ((~kept).sum(), 34)
    assert abs(left_out.v_tiles - 17) <= 1
    assert left_out.k_tiles == (left_out.v_tiles if rule == "gate" else 0)
    keys = np.array([128] * 16 + [52])
    in_use = (kept @ keys).sum() + ((kept @ keys).sum() if rule == "gate" else 2 * 2100)
    assert t.dma_bound_us == pytest.approx(in_use * 256 / 368e3)
    assert t.modelled_us >= t.traffic_bound_us >= t.dma_bound_us
    assert base == Baseline(pytest.approx(flash_us(layout)), "", "flash_decode")
    assert r.speed_up == pytest.approx(flash_us(layout) / t.modelled_us)


@by_rule
def test_error_is_that_of_the_worst_head_against_all_tiles(rule: str) -> None:
    problem, found = small(rule).problem, result(rule, "s-major").skipped
    assert found is not None
    s, v = scores(problem), problem.drawn.v[0].astype(np.float64)
    kept = np.repeat(kept_tiles(problem, found.threshold), 128, axis=-1)[..., :2100]
    o = []
    for seen in (np.ones_like(kept), kept):
        p = np.exp(s - s.max(axis=-1, keepdims=True)) * seen
        o.append(np.einsum("hgn,nhd->hgd", p / p.sum(axis=-1, keepdims=True), v))
    dense, sparse = o
    error = np.linalg.norm(sparse - dense, axis=-1) / np.linalg.norm(dense, axis=-1)
    # What rounding to bfloat16 adds is less than this.
    assert found.error == pytest.approx(error.max(), rel=0.05, abs=4e-3)
    assert error.max() > 0.01 or rule == "gate"


@by_rule
def test_a_test_that_is_on_and_skips_nothing(rule: str) -> None:
    found = result(rule, "s-major", 0.0).skipped
    assert found is not None
    assert found.threshold > 0.0
    assert (found.k_tiles, found.v_tiles) == (0, 0)
    assert found.error < 8e-3


def test_default_thresholds_test_gates_and_scores() -> None:
    found = result("gate", "s-major", None).skipped
    assert found is not None
    passed = kept_tiles(small("gate").problem, 128 / 2100)[:, 0]
    assert found.k_tiles == (~passed).sum()
    assert found.k_tiles < found.v_tiles


def test_decisions_that_rounding_may_turn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_decode, "LEAST_MARGIN", 10.0)
    with pytest.raises(ValueError, match=r"threshold: received .* from a decision, allowed 10"):
        sparse_decode.expected.__wrapped__(small("sparse").problem)


# -- a wrong one


def change(monkeypatch: pytest.MonkeyPatch, rule: str, how: Callable[[dict[str, Any]], None]) -> None:
    """Runs the rule's kernel with arguments by name that `how` has changed."""
    function = getattr(sparse_decode, KERNELS[rule]).function
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrong(*arguments: Any) -> Any:
        named = dict(zip(names, arguments, strict=True))
        how(named)
        return function(*named.values())

    monkeypatch.setattr(sparse_decode, KERNELS[rule], nkisim.jit(wrong))


def skip_nothing(monkeypatch: pytest.MonkeyPatch, which: Callable[[TileLaunch], bool]) -> None:
    """The limits of some launches are below every score."""
    right = TileLaunch.limits
    monkeypatch.setattr(TileLaunch, "limits", lambda self, *a: right(self, *a) - np.float32(1e6 if which(self) else 0))


def failure(rule: str, layout: str = "s-major") -> str:
    r = run_case(small(rule, layout), "trn2")
    assert (r.failed, r.skipped, r.baseline) == (True, None, None)
    return r.check.failure


@by_rule
def test_a_wrong_result_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In units of q . k decisions stay as they are.
    change(monkeypatch, rule, lambda a: a.update(softmax_scale=1.1 * a["softmax_scale"]))
    assert "of the budget" in failure(rule)


@by_rule
def test_a_wrong_count_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_nothing(monkeypatch, lambda launch: True)
    assert failure(rule).startswith("query head 0: the kernel counts 17 tiles kept, the oracle ")


def test_every_count_is_compared() -> None:
    problem = small("gate").problem
    found = sparse_decode.expected(problem)
    rows = [(tiles @ np.array([128] * 16 + [52]))[None] for tiles in (found.k_tiles, found.v_tiles)]
    right = Counts(found.kept[None], *rows)
    assert sparse_decode._wrong_counts(problem, found, right) == ""
    for i, words in enumerate(("query head 1: .* tiles kept", "KV head 1: .* rows of K", "KV head 1: .* rows of V")):
        wrong = [x.copy() for x in right]
        wrong[i].reshape(-1)[1] += 1
        with pytest.raises(AssertionError, match=words):
            assert sparse_decode._wrong_counts(problem, found, Counts(*wrong)) == ""


@every
def test_bytes_that_no_tile_in_use_holds_fail(rule: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is timed reads every tile; the one that counts is right."""
    skip_nothing(monkeypatch, lambda launch: not launch.with_stats)
    monkeypatch.setattr(np, "array_equal", lambda *_: True)
    of = "k" if rule == "gate" else "v"
    assert failure(rule, layout).startswith(f"{of}: {2 * 2100 * 256} bytes leave HBM, the oracle uses ")


def test_a_result_that_depends_on_counting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, "sparse", lambda a: a["with_stats"] or a.update(softmax_scale=1.01 * a["softmax_scale"]))
    assert failure("sparse") == "the result is another one when the kernel counts"


def test_a_result_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, "sparse", lambda a: a.update(softmax_scale=float("nan")))
    assert failure("sparse") == "the result is not finite"


def test_a_refused_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, "skip_softmax", lambda a: a.update(tokens=4096))
    assert failure("skip_softmax").startswith("the simulator refuses the kernel")


# -- output


def made(**changes: Any) -> Result:
    timing = Timing(12.0, 10.0, 11.0, dict.fromkeys(cases.ENGINES, 1.0), 1, 2, {"dma_copy": 12.0}, 3)
    goals = (Goal("speed_up", 1.5, over="flash_decode"), Goal("slow_down", 1.05, over="flash_decode"))
    case = replace(small("sparse"), goals=goals)
    base, left_out = Baseline(18.0, "", "flash_decode"), Skipped(1.25e-5, 0, 1639, 2048, 0.0123)
    return replace(Result(case, "trn2", Check(1, 2, "pairs", 0.5), timing, base, left_out), **changes)


def test_table() -> None:
    parts = cases.blocks(BENCHMARKS["sparse_decode"], [made()])
    head, _, line = parts["sparse_decode trn2 times"].splitlines()
    assert head == (
        "| case | shape | threshold | K tiles not read | V tiles not read | error | modelled us | DMA bound us | "
        "ratio | goal | flash_decode, modelled us | speed-up | checked |"
    )
    assert line == (
        "| `small` | nobody: batch 1, 8/2 heads, d 128, 2100 keys, s-major K, bfloat16, 50% of tiles to skip | "
        "1.25e-05 | 0 of 2,048 | 1,639 of 2,048 (80.0%) | 1.23e-02 | 12 | 10 | 1.200 | 1.5x flash_decode: met; "
        "at most 1.05x the time of flash_decode: met | 18 | 1.500x | 1 of 2 pairs, 0.50 of the budget |"
    )


def test_text_and_json() -> None:
    text = run.as_text(made())
    assert "threshold  1.25e-05: 0 tiles of K and 1,639 of V of 2,048 not read (80.0% of V), error 1.23e-02" in text
    assert "baseline   flash_decode: 18 us modelled, speed-up 1.500x" in text
    document = made().as_json()
    assert document["baseline"] == {"kernel": "flash_decode", "us": 18.0, "how": ""}
    assert document["skipped"] == {
        "threshold": 1.25e-5, "k_tiles": 0, "v_tiles": 1639, "of": 2048, "error": 0.0123, "share": 1639 / 2048,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_documented_bounds_and_speed_ups_follow_from_their_cells(name: str) -> None:
    lines = DOCS.split(f"<!-- {name} trn2 times -->\n")[1].split(f"<!-- end {name} trn2 times -->")[0].splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    for case, line in zip(BENCHMARKS[name].cases, lines[2:], strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        skipped = []
        for cell in (cells["K tiles not read"], cells["V tiles not read"]):
            n, _, of = cell.replace(",", "").split()[:3]
            assert int(of) == case.problem.n_kv_heads * case.problem.keys // 128
            skipped.append(int(n))
        assert skipped[0] == (0 if name != "gated_decode" else skipped[0])
        if case.problem.share is not None:
            assert abs(skipped[1] - case.problem.share * int(of)) <= 0.02 * int(of)
        # Tiles of 128 keys of 128 elements of 2 bytes, over 16 engines of 23 GB/s.
        assert cells["DMA bound us"] == cases.number((2 * int(of) - sum(skipped)) * 32768 / 368e3)
        ours, flash = (float(cells[x].replace(",", "")) for x in ("modelled us", "flash_decode, modelled us"))
        assert float(cells["speed-up"].rstrip("x")) == pytest.approx(flash / ours, rel=0.002)


# -- the picture

SVG = "{http://www.w3.org/2000/svg}"
POINTS = {
    rule: [Point(10.0 ** -(i + j), 0.1 * j, 1.0 - 0.1 * j, 0.9 - 0.1 * j, 0.01 * (j + 1)) for j in range(3)]
    for i, rule in enumerate(plots.LAYOUTS)
}


def test_a_point_is_relative_to_the_baseline() -> None:
    assert Point.of(made()) == Point(1.25e-5, 1639 / 2048, 12 / 18, 10 / 18, 0.0123)


def test_the_picture_is_the_same_for_the_same_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        plots.draw(POINTS, "some shape", path)
    assert first.read_bytes() == second.read_bytes()
    assert b"dc:date" not in first.read_bytes()
    svg = ElementTree.parse(first)
    texts = {e.text for e in svg.iter(f"{SVG}text")}
    assert {"Sparse decode, some shape: modelled time and error", "threshold", "skip_softmax_decode"} <= texts
    # Three points of three rules in four panels.
    assert sum(len(g.findall(f"{SVG}use")) for g in svg.iter(f"{SVG}g") if "clip-path" in g.attrib) == 36


@pytest.fixture
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "KEYS", 2048)
    monkeypatch.setattr(plots, "SHARES", (0.0, 0.5))
    monkeypatch.setattr(plots, "LAYOUTS", {"sparse": "d-major", "gate": "s-major"})


def test_the_sweep_draws_what_it_prints(
    short_sweep: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    seen: list[Any] = []
    monkeypatch.setattr(plots, "draw", lambda *a: seen.append(a))
    path = tmp_path / "x.svg"
    assert plots.main([str(path), "--kv-heads", "1"]) == 0
    ((points, shape, where),) = seen
    assert (shape, where) == ("8/1 heads, 2048 keys, trn2", path)
    assert {rule: [p.share for p in found] for rule, found in points.items()} == {
        "sparse": [0.0, 0.5], "gate": [0.0, 0.5],
    }  # fmt: skip
    assert points["gate"][1].bound == pytest.approx(points["gate"][0].bound / 2)
    assert points["sparse"][1].bound == pytest.approx(points["sparse"][0].bound * 3 / 4)
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [float(line[2]) for line in printed] == [round(p.time, 3) for of_rule in points.values() for p in of_rule]


def test_the_sweep_stops_at_a_wrong_result(
    short_sweep: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    change(monkeypatch, "sparse", lambda a: a.update(softmax_scale=1.1 * a["softmax_scale"]))
    assert plots.main([str(tmp_path / "x.svg"), "--kv-heads", "1"]) == 1
    assert "FAIL sparse_decode-0%: KV head 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png"], "FILE.svg: received x.png, allowed a name that ends in .svg"),
        (["x.svg", "--kv-heads", "0"], "--kv-heads: received 0, allowed at least 1"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plots.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "run_case", lambda *_: pytest.fail("a case ran"))
    with pytest.raises(SystemExit):
        plots.main(["x.svg"])
    assert "needs matplotlib; install the extra: pip install -e '.[bench]'" in capsys.readouterr().err
