"""The benchmark command: results come before times, bounds are what they say, the documentation has every case."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nkisim
from benchmarks import cases, flash_decode, run
from benchmarks.cases import Baseline, Benchmark, Check, Goal, Published, Result, Timing
from benchmarks.flash_decode import CASES, DecodeCase, run_case
from contributed.decode_attention import decode_attention_gqa_fwd

DOCS = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
FAST = "llama-3-70b-512"
SMALL = DecodeCase("small", "nobody", 8, 2, (300, 130), published=(Published("theirs", 5.0, "trn2", "them"),))


@pytest.fixture(scope="module")
def small() -> Result:
    return run_case(SMALL, "trn2")


@pytest.fixture
def only_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BENCHMARKS", (replace(flash_decode.BENCHMARK, cases=(SMALL,)),))


def block(name: str) -> list[str]:
    return DOCS.split(f"<!-- {name} -->\n")[1].split(f"<!-- end {name} -->")[0].splitlines()


# -- the registry


def test_names_are_unique() -> None:
    names = [b.name for b in run.BENCHMARKS]
    assert "flash_decode" in names
    assert len(set(names)) == len(names)
    for benchmark in run.BENCHMARKS:
        found = [case.name for case in benchmark.cases]
        assert len(set(found)) == len(found)


def test_the_lengths_and_goals_that_were_asked_for() -> None:
    by_name = {case.name: case for case in CASES}
    for keys in (8, 16, 32, 64, 128):
        case = by_name[f"llama-3-70b-{keys}k"]
        assert (case.pairs, case.lengths, case.group, case.d) == (8, (keys * 1024,), 8, 128)
        assert Goal("ratio", 1.15) in case.goals
    assert by_name["one-pair-32k"].pairs == 1
    assert by_name["one-pair-32k"].goals == (Goal("ratio", 1.3),)
    for name, pairs in (("xpu-perf-4k", 128), ("64-pairs-4k-lnc2", 64)):
        case = by_name[name]
        assert (case.pairs, set(case.lengths), case.n_cores, case.goals) == (
            pairs, {4096}, 2, (Goal("modelled_us", 460.0),),
        )  # fmt: skip
    assert Goal("speed_up", 20.0) in by_name["llama-3-70b-8k"].goals
    assert {case.block_size for case in CASES if Goal("ratio", 1.25) in case.goals} == {0, 16, 32, 64, 128}
    assert {min(case.lengths) for case in CASES} >= {512}
    assert max(max(case.lengths) for case in CASES) == 131072
    for model in ("Llama-3-8B", "Llama-3-70B", "Qwen3-8B", "Qwen3-0.6B", "Mistral-7B", "Gemma-2-9B", "Gemma-3-1B"):
        assert any(case.model == model for case in CASES), model


def test_ragged_cases_have_the_same_keys() -> None:
    ragged, even = (flash_decode.BENCHMARK.case(name) for name in ("ragged-512-32k", "ragged-same-sum"))
    assert sum(ragged.lengths) == sum(even.lengths) == 68096
    assert ragged.bound_us("trn2") == even.bound_us("trn2")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == [word for b in run.BENCHMARKS for word in (f"{b.name}:", *(case.name for case in b.cases))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "benchmark: received none, allowed flash_decode"),
        (["flash_decode", "--case", "no-such"], "case: received 'no-such', allowed llama-3-70b-512"),
        (["flash_decode", "--case", FAST, "--update", "page.md"], "received a selection of cases"),
        (["flash_decode", "--case", "xpu-perf-4k", "--target", "trn1"], "2 cores per launch, trn1 has 1"),
        (["flash_decode", "--json", "--markdown"], "not allowed with"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# -- bounds and inputs


@pytest.mark.parametrize(
    ("case", "target", "us"),
    [
        # 2 x 8192 keys x 8 heads x 128 x 2 bytes over 16 engines of 23 GB/s.
        (DecodeCase("a", "m", 64, 8, (8192,)), "trn2", 33554432 / 368e3),
        (DecodeCase("a", "m", 64, 8, (8192,)), "trn1", 33554432 / 272e3),
        (DecodeCase("a", "m", 64, 8, (8192,), n_cores=2), "trn2", 33554432 / 736e3),
        (DecodeCase("a", "m", 64, 8, (8192,), cache_dtype="float8_e4m3"), "trn2", 16777216 / 368e3),
        (DecodeCase("a", "m", 8, 1, (100, 28), dtype="float32"), "trn2", 131072 / 368e3),
        # Four tokens with a window of 64 keys see 67 keys, and all 50 of the short sequence.
        (DecodeCase("a", "m", 8, 1, (100, 50), s=4, window=64), "trn2", 2 * 117 * 256 / 368e3),
    ],
)
def test_bound(case: DecodeCase, target: str, us: float) -> None:
    assert case.bound_us(target) == pytest.approx(us, rel=1e-12)


@pytest.mark.parametrize("layout", ["d-major", "s-major", "paged"])
def test_inputs_hold_nan_where_no_sequence_is(layout: str) -> None:
    case = replace(SMALL, layout=layout, block_size=16)
    inputs = flash_decode._Inputs(case)
    used = 0
    for b, n in enumerate(case.lengths):
        for head in range(2):
            for x in inputs.pair(b, head):
                assert x.shape == (n, 128)
                assert np.isfinite(x.astype(np.float32)).all()
                used += x.size
    kept = sum(int(np.isfinite(x.astype(np.float32)).sum()) for x in (inputs.k, inputs.v))
    assert kept == used == 2 * 2 * 430 * 128
    assert inputs.k.size + inputs.v.size > used


# -- a case


def test_a_case_from_end_to_end(small: Result) -> None:
    t, base = small.timing, small.baseline
    assert t is not None
    assert base is not None
    assert (small.check.checked, small.check.of, small.check.failure) == (4, 4, "")
    assert 0.0 < small.check.share <= 1.0
    # 2 x 430 keys x 2 heads x 128 x 2 bytes.
    assert t.dma_bound_us == pytest.approx(440320 / 368e3)
    assert t.hbm_read_bytes >= 440320
    assert t.hbm_write_bytes >= 2 * 8 * 128 * 2
    assert t.modelled_us >= t.traffic_bound_us >= t.dma_bound_us
    assert all(0.0 < us <= t.modelled_us for us in t.busy_us.values())
    assert sum(t.path_us.values()) == pytest.approx(t.modelled_us)
    teaching = 0.0
    for n in (300, 130):
        trace = nkisim.Trace()
        cache = np.zeros((2, 128, n), small.case.cache)  # type: ignore[attr-defined]
        q = np.zeros((128, 8), cache.dtype)
        nkisim.simulate(decode_attention_gqa_fwd, target="trn2", trace=trace)(q, cache, cache, 8, 2)
        teaching += nkisim.latency.estimate(trace).total_us
    assert base == Baseline(pytest.approx(teaching), "")
    assert small.speed_up == pytest.approx(teaching / t.modelled_us)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "s-major", "s": 3, "window": 100},
        {"layout": "paged", "block_size": 16, "softcap": 5.0},
        {"cache_dtype": "float8_e4m3"},
        {"dtype": "float32", "d": 64},
    ],
    ids=str,
)
def test_options_are_checked_against_the_oracle(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_decode, "_teaching", lambda inputs, target: Baseline(None, "left out"))
    result = run_case(replace(SMALL, **changes), "trn2")
    assert (result.failed, result.check.checked) == (False, 4)


def test_two_cores_add_the_kernel_that_joins_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_decode, "_teaching", lambda inputs, target: Baseline(None, "left out"))
    seen = []

    def spy(trace: nkisim.Trace) -> Any:
        seen.append((len({r.core for r in trace.records}), nkisim.latency.estimate(trace).total_us))
        return nkisim.latency.estimate(trace)

    monkeypatch.setattr(flash_decode, "estimate", spy)
    result = run_case(DecodeCase("pair", "m", 8, 1, (600,), n_cores=2), "trn2")
    assert result.timing is not None
    assert [cores for cores, _ in seen] == [2, 1]
    assert result.timing.modelled_us == pytest.approx(sum(us for _, us in seen))


def test_the_teaching_kernel_is_extrapolated_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = flash_decode._Inputs(DecodeCase("long", "m", 8, 1, (2500, 2500)))
    whole = flash_decode._teaching(inputs, "trn2")
    monkeypatch.setattr(flash_decode, "TEACHING_TILES", 19)
    few = flash_decode._teaching(inputs, "trn2")
    assert whole.how == ""
    assert few.how == "extrapolated from 1024 and 2048 keys"
    assert few.us == pytest.approx(whole.us, rel=0.02)
    assert few.us != whole.us


def wrong_kernel(change: Any) -> Any:
    """`flash_decode_fwd` with changed arguments."""
    function = flash_decode.flash_decode_fwd.function

    @functools.wraps(function)
    def wrong(*arguments: Any) -> Any:
        return function(*change(arguments))

    return nkisim.jit(wrong)


def test_a_wrong_kernel_fails_and_shows_no_time(
    only_small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scale = 13
    assert flash_decode._Inputs(SMALL).launch().arguments(np.zeros((2, 1, 8, 128)), None, None)[scale] == 128**-0.5  # type: ignore[arg-type]
    wrong = wrong_kernel(lambda a: (*a[:scale], a[scale] * 1.1, *a[scale + 1 :]))
    monkeypatch.setattr(flash_decode, "flash_decode_fwd", wrong)
    assert run.main(["flash_decode"]) == 1
    shown = capsys.readouterr()
    assert "FAIL sequence 0, KV head 0: difference" in shown.out
    assert "FAIL small" in shown.err
    assert "modelled" not in shown.out
    assert run.main(["flash_decode", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["cases"][0]["correct"] is False
    assert document["cases"][0]["check"]["share"] > 1.0
    assert not [key for key in document["cases"][0] if key.endswith("_us")]
    page = tmp_path / "page.md"
    page.write_text("as before", encoding="utf-8")
    assert run.main(["flash_decode", "--update", str(page)]) == 1
    assert page.read_text(encoding="utf-8") == "as before"


def test_a_refused_kernel_fails(
    only_small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = 7
    too_many = wrong_kernel(lambda a: (*a[:tokens], 4096, *a[tokens + 1 :]))
    monkeypatch.setattr(flash_decode, "flash_decode_fwd", too_many)
    assert run.main(["flash_decode"]) == 1
    assert "FAIL the simulator refuses the kernel" in capsys.readouterr().out


def test_a_result_that_is_not_finite_fails() -> None:
    inputs = flash_decode._Inputs(SMALL)
    o = np.zeros(inputs.q.shape, np.float32)
    o[1, 0, 7, 5] = np.nan
    assert flash_decode._check(inputs, o).failure == "the result is not finite"


# -- output


def test_json(only_small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["flash_decode", "--json"]) == 0
    shown = capsys.readouterr()
    assert "[1/1, 0 s] small" in shown.err
    document = json.loads(shown.out)
    assert {key: document[key] for key in ("benchmark", "target", "times", "left_out")} == {
        "benchmark": "flash_decode", "target": "trn2", "times": "modelled", "left_out": {},
    }  # fmt: skip
    (case,) = document["cases"]
    assert set(case) == {
        "case", "shape", "target", "correct", "check", "modelled_us", "dma_bound_us", "traffic_bound_us", "busy_us",
        "hbm_read_bytes", "hbm_write_bytes", "path_us", "instructions", "ratio", "baseline", "skipped", "speed_up",
        "goals", "published",
    }  # fmt: skip
    assert (case["baseline"]["kernel"], case["baseline"]["how"], case["skipped"]) == ("teaching kernel", "", None)
    assert case["speed_up"] == pytest.approx(case["baseline"]["us"] / case["modelled_us"])
    assert set(case["busy_us"]) == {"tensor", "vector", "scalar", "gpsimd", "dma"}
    assert case["ratio"] == pytest.approx(case["modelled_us"] / case["dma_bound_us"])
    assert case["published"] == [{"what": "theirs", "us": 5.0, "target": "trn2", "by": "them"}]


def made(us: float, teaching: float | None = None, *goals: Goal) -> Result:
    """A result with a bound of 10 us."""
    timing = Timing(us, 10.0, 11.0, dict.fromkeys(cases.ENGINES, 1.0), 1, 2, {"dma_copy": us}, 3)
    return Result(replace(SMALL, goals=goals), "trn2", Check(1, 2, "pairs", 0.5), timing, Baseline(teaching, "why"))


@pytest.mark.parametrize(
    ("result", "verdicts"),
    [
        (made(11.5, None, Goal("ratio", 1.15)), [("1.15x the bound", True)]),
        (made(11.6, None, Goal("ratio", 1.15)), [("1.15x the bound", False)]),
        (made(12.0, None, Goal("modelled_us", 12.0)), [("at most 12 us", True)]),
        (made(12.1, None, Goal("modelled_us", 12.0)), [("at most 12 us", False)]),
        (made(12.0, 240.0, Goal("speed_up", 20.0)), [("20x the teaching kernel", True)]),
        (made(12.0, 239.0, Goal("speed_up", 20.0)), [("20x the teaching kernel", False)]),
        (made(12.0, 199.0, Goal("speed_up", 20.0)), [("20x the teaching kernel (the bound is at 19.9x)", False)]),
        (made(12.0, None, Goal("speed_up", 20.0)), [("20x the teaching kernel", False)]),
        (made(12.0, 18.0, Goal("speed_up", 1.5, over="other")), [("1.5x other", True)]),
        (made(10.5, 10.0, Goal("slow_down", 1.05, over="other")), [("at most 1.05x the time of other", True)]),
        (made(10.6, 10.0, Goal("slow_down", 1.05, over="other")), [("at most 1.05x the time of other", False)]),
        (made(10.5, None, Goal("slow_down", 1.05, over="other")), [("at most 1.05x the time of other", False)]),
        (made(99.0, None, Goal("ratio", 1.15, target="trn3")), []),
    ],
)
def test_verdicts(result: Result, verdicts: list[tuple[str, bool]]) -> None:
    assert result.verdicts() == verdicts


def test_tables() -> None:
    parts = cases.blocks(flash_decode.BENCHMARK, [made(12.0, 240.0, Goal("ratio", 1.15))])
    assert list(parts) == ["flash_decode trn2 times", "flash_decode trn2 work", "flash_decode trn2 published"]
    shape = "nobody: batch 2, 8/2 heads, d 128, 130..300 keys, d-major K, bfloat16"
    assert parts["flash_decode trn2 times"].splitlines()[2:] == [
        f"| `small` | {shape} | 12 | 10 | 1.200 | 1.15x the bound: **not met** | 240 (why) | 20.0x | "
        "1 of 2 pairs, 0.50 of the budget |"
    ]
    assert parts["flash_decode trn2 published"].splitlines()[2:] == ["| `small` | 12 | 5 | theirs | them |"]
    assert parts["flash_decode trn2 work"].splitlines()[2].endswith("| 0.000 | 0.000 | 3 | dma_copy 100% |")
    for text in parts.values():
        assert len({line.count("|") for line in text.splitlines()}) == 1
    with pytest.raises(ValueError, match="received failed cases small"):
        cases.blocks(flash_decode.BENCHMARK, [Result(SMALL, "trn2", Check(1, 2, "pairs", 3.0, "wrong"))])


def test_update_replaces_only_its_parts(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "top\n<!-- a -->\nstale\n<!-- end a -->\nkept\n<!-- b -->\nother\n<!-- end b -->\n"
    page.write_text(text, encoding="utf-8")
    cases.replace_blocks(page, {"a": "new"})
    assert page.read_text(encoding="utf-8") == text.replace("stale", "new")
    before = page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"received no <!-- c --> \.\.\. <!-- end c -->"):
        cases.replace_blocks(page, {"a": "newer", "c": "x"})
    assert page.read_text(encoding="utf-8") == before


# -- the documentation


@pytest.mark.parametrize(
    ("benchmark", "target"),
    [
        *((b, "trn2") for b in run.BENCHMARKS if b.tables is None),
        (flash_decode.BENCHMARK, "trn1"),
        (flash_decode.BENCHMARK, "trn3"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_documentation_has_a_line_for_every_case(benchmark: Benchmark, target: str) -> None:
    chosen = [case for case in benchmark.cases if not case.refused(target)]
    times = block(f"{benchmark.name} {target} times")
    assert [line.split(" | ")[:2] for line in times[2:]] == [[f"| `{case.name}`", case.shape] for case in chosen]
    work = block(f"{benchmark.name} {target} work")
    assert [line.split(" | ")[0] for line in work[2:]] == [f"| `{case.name}`" for case in chosen]
    columns = [cell.strip() for cell in times[0].split("|")[1:-1]]
    for case, line in zip(chosen, times[2:], strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        shown, bound = (float(cells[name].replace(",", "")) for name in ("modelled us", "DMA bound us"))
        assert float(cells["ratio"]) == pytest.approx(shown / bound, rel=0.001)
        speed_up = float(cells["speed-up"].rstrip("x") or 0)
        for goal in case.goals if target == "trn2" else ():
            value = {"ratio": float(cells["ratio"]), "modelled_us": shown}.get(goal.quantity, speed_up)
            limit = 1 / goal.limit if goal.quantity == "slow_down" else goal.limit
            met = value >= limit if goal.quantity in ("speed_up", "slow_down") else value <= limit
            # Of a value that rounding brings to the limit, the table's word is as good as its number.
            near = value == pytest.approx(limit, abs=0.0005)
            assert near or ("**not met**" in cells["goal"].split(str(goal))[1].split(";")[0]) != met


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_documented_bounds_come_from_the_cases_alone(target: str) -> None:
    chosen = [case for case in CASES if not case.refused(target)]
    bounds = [line.split(" | ")[3] for line in block(f"flash_decode {target} times")[2:]]
    assert bounds == [cases.number(case.bound_us(target)) for case in chosen]


def test_documentation_has_every_published_time() -> None:
    lines = block("flash_decode trn2 published")[2:]
    published = [(case, p) for case in CASES for p in case.published]
    assert len(lines) == len(published) > 0
    for line, (case, p) in zip(lines, published, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert [cells[0], *cells[2:]] == [f"`{case.name}`", cases.number(p.us), p.what, p.by]


def test_documentation_shows_the_result_of_a_fast_case() -> None:
    result = run_case(flash_decode.BENCHMARK.case(FAST), "trn2")
    assert cases.times_line(result) in block("flash_decode trn2 times")
    assert cases.work_line(result) in block("flash_decode trn2 work")
