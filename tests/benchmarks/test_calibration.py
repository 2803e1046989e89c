"""The calibration: its kernels compute what they say, its rows are honest, the documentation shows their results."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from benchmarks.calibration import __main__ as command
from benchmarks.calibration import decode, mamba, matmul, report, tkg
from benchmarks.calibration._model import extrapolated, modelled, zeros
from benchmarks.calibration._row import Result, Row
from benchmarks.calibration.rows import ALL, NOT_USED
from nkisim.hardware import TARGETS, Hardware

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "latency-model.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "benchmarks" / "calibration").glob("*.py"))
FAST = [row for row in ALL if row.fast]


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def run(kernel: Any, *args: Any, target: str) -> Any:
    return nkisim.simulate(kernel, target=target)(*args)


def softmax_attention(q: Any, k: Any, v: Any) -> Any:
    """[heads, d] of q [heads, d] over k, v [keys, d] in float64, without a scale."""
    s = q @ k.T
    p = np.exp(s - s.max(1, keepdims=True))
    return p @ v / p.sum(1, keepdims=True)


# -- the rows


@pytest.mark.parametrize("row", FAST, ids=lambda row: row.key)
def test_documentation_shows_the_result_of_a_fast_row(row: Row) -> None:
    result = Result(row, row.model())
    assert 0.0 < result.modelled < 1e9
    assert report.line(result) in DOCS.splitlines()


def test_every_row_is_in_the_documentation_once() -> None:
    lines = [text for text in DOCS.splitlines() if text.startswith("| `")]
    for row in ALL:
        found = [text for text in lines if text.startswith(f"| `{row.key}` | {row.what} | {row.target} |")]
        assert len(found) == 1, row.key
        assert f"| {report.number(row.measured)} {row.unit} |" in found[0]


def test_a_row_that_is_off_says_what_is_missing() -> None:
    off = [text.split("`")[1] for text in DOCS.splitlines() if "| **off** |" in text]
    assert off
    by_key = {row.key: row for row in ALL}
    for key in off:
        assert by_key[key].missing, key
        assert f"`{key}` (" in DOCS


def test_ratios_in_the_documentation_are_those_of_its_numbers() -> None:
    for text in DOCS.splitlines():
        if not text.startswith("| `") or text.count("|") != 9:
            continue
        cells = [cell.strip() for cell in text.split("|")[1:-1]]
        measured, shown = (float(cells[i].split()[0].replace(",", "")) for i in (3, 4))
        assert shown / measured == pytest.approx(float(cells[5]), abs=0.006, rel=0.002)
        if cells[6] in ("within 25 %", "**off**"):
            assert (abs(float(cells[5]) - 1) <= 0.25) == (cells[6] == "within 25 %")


def test_generated_lists_are_current() -> None:
    for name in ("assumed", "not-used"):
        block = DOCS.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end {name} -->")[0]
        assert block == {"assumed": report.assumed(), "not-used": report.not_used()}[name]


def test_rows_are_well_formed() -> None:
    keys = [row.key for row in ALL]
    assert len(set(keys)) == len(keys)
    known = {f.name for f in fields(Hardware)}
    for row in ALL:
        assert row.target in TARGETS
        assert row.unit in ("ns", "us", "ms", "share")
        assert row.measured > 0
        assert "SDK" in row.source, row.key
        assert not row.defines or set(row.defines.split(", ")) <= known, row.key
    assert all(len(entry) == 3 and all(entry) for entry in NOT_USED)
    chips = {TARGETS[row.target].generation for row in ALL if row.is_check}
    assert chips == {2, 3}


def test_no_row_adjusts_the_model() -> None:
    """A modelled value depends on the kernel and the published constants alone."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names = attributes | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & {"setattr", "replace", "Constants", "Scheduler", "TRN1", "TRN2", "TRN3"}, path
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & {f"nkisim.latency.{m}" for m in ("constants", "costs", "transfers", "schedule")}, path
        if path.name not in ("_row.py", "report.py", "__main__.py"):
            assert "measured" not in attributes, path


def test_a_rows_result_does_not_depend_on_what_was_measured() -> None:
    row = FAST[0]
    other = replace(row, measured=2 * row.measured)
    assert row.model() == other.model()
    assert Result(other, 10.0).ratio == pytest.approx(Result(row, 10.0).ratio / 2)


# -- the report


def _row(**changes: Any) -> Row:
    return replace(Row("k", "what", "trn2", 100.0, "us", "somebody, SDK 2.32", lambda: 1.0, missing="why"), **changes)


def test_verdicts_and_summary() -> None:
    results = [
        Result(_row(), 125.0),
        Result(_row(), 126.0),
        Result(_row(), 74.0),
        Result(_row(defines="semaphore_ns"), 300.0),
        Result(_row(comparable=False), 300.0),
    ]
    verdicts = [report.line(r).split(" | ")[6] for r in results]
    assert verdicts == ["within 25 %", "**off**", "**off**", "source of `semaphore_ns`", "another kernel"]
    assert report.summary(results).startswith("1 of 3 rows that check the model are within 25%")
    assert report.misses(results) == "- `k` (1.26), `k` (0.74): why"
    assert report.misses(results[:1]) == "None."


@pytest.mark.parametrize(
    ("value", "text"), [(0.20831, "0.2083"), (56.789, "56.79"), (999.96, "1000"), (1234.4, "1,234"), (12.0, "12")]
)
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


def test_update_replaces_only_its_parts() -> None:
    results = [Result(_row(how="so"), 125.0)]
    names = list(report.blocks(results))
    text = "top\n" + "".join(f"<!-- {n} -->\nstale {n}\n<!-- end {n} -->\nuntouched\n" for n in names)
    new = report.updated(text, results)
    assert new.startswith("top\n<!-- calibration -->\n| row |")
    assert new.count("untouched") == len(names)
    assert "stale" not in new
    assert report.updated(new, results) == new
    with pytest.raises(ValueError, match=r"received no <!-- misses --> \.\.\. <!-- end misses -->"):
        report.updated(text.replace("<!-- misses -->", ""), results)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["table-trn2"]) == 0
    shown = capsys.readouterr()
    assert "measured    1,280 ns    modelled    1,280 ns    ratio  1.00" in shown.out
    assert "[1/1, 0 s] table-trn2" in shown.err
    assert command.main(["table-trn2", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| `table-trn2` |" in text
    with pytest.raises(SystemExit):
        command.main(["exp-128", "--update", "page.md"])
    assert "received a selection of rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["no-such-row"])


# -- the kernels


@pytest.mark.parametrize("version", [matmul.tiled, matmul.hoisted, matmul.blocked], ids=lambda v: v.__name__)
@pytest.mark.parametrize(("dtype", "target"), [(np.float32, "trn2"), (ml_dtypes.bfloat16, "trn1")])
def test_matmul_versions(version: Any, dtype: Any, target: str, rng: np.random.Generator) -> None:
    a, b = (rng.integers(-4, 5, shape).astype(dtype) for shape in ((256, 256), (256, 1024)))
    want = (a.astype(np.float64).T @ b.astype(np.float64)).astype(dtype)
    np.testing.assert_array_equal(run(version, a, b, target=target), want)


@pytest.mark.parametrize(
    ("dtype", "target", "queues"),
    [(np.float32, "trn2", {"dma gpsimd"}), (ml_dtypes.bfloat16, "trn1", {"dma load", "dma store"})],
)
def test_matmul_has_as_many_transfers_as_the_profile_and_its_queue(dtype: Any, target: str, queues: Any) -> None:
    seen = set()

    def transfers(e: Any) -> float:
        seen.update(s.queue for s in e.slots if s.queue.startswith("dma "))
        return float(sum(s.record.instruction == "dma_copy" for s in e.slots))

    assert matmul.matmul(matmul.tiled, dtype, target, transfers) == 66048
    assert seen == queues


def test_matmul_in_blocks_of_all_dimensions(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-4, 5, (2048, 1024)).astype(np.float32) for _ in range(2))
    np.testing.assert_array_equal(run(matmul.blocked_all, a, b, target="trn2"), a.T @ b)


def test_extrapolation_is_what_the_whole_takes() -> None:
    def total(units: int) -> float:
        args = zeros(1024, 128, dtype=ml_dtypes.bfloat16), zeros(1024, units * 512, dtype=ml_dtypes.bfloat16)
        return modelled(matmul.tiled, *args, target="trn1").total_us

    assert extrapolated(total, 1, 2, 8) == pytest.approx(total(8), rel=0.02)
    assert extrapolated(float, 3, 5, 11) == 11.0


def scanned(delta: Any, u: Any, a: Any, b: Any, c: Any) -> Any:
    """The selective scan in float64."""
    y = np.zeros(delta.shape)
    for n in range(a.shape[1]):
        state = np.zeros(delta.shape[0])
        for t in range(delta.shape[1]):
            state = np.exp(delta[:, t] * a[:, n]) * state + delta[:, t] * u[:, t] * b[n, t]
            y[:, t] += state * c[n, t]
    return y


@pytest.mark.parametrize(
    ("version", "channels", "steps"),
    [(mamba.v1, 256, 8), (mamba.v2, 128, 512), (mamba.v2, 128, 1024), (mamba.v2_as_written, 128, 8)],
)
def test_mamba_versions(version: Any, channels: int, steps: int, rng: np.random.Generator) -> None:
    delta, u = (rng.random((channels, steps)).astype(np.float32) for _ in range(2))
    a = -rng.random((channels, 2)).astype(np.float32)
    b, c = (rng.standard_normal((2, steps)).astype(np.float32) for _ in range(2))
    got = run(version, delta, u, a, b, c, target="trn1")
    np.testing.assert_allclose(got, scanned(*(x.astype(np.float64) for x in (delta, u, a, b, c))), rtol=2e-4, atol=2e-4)


def test_decode_with_the_published_mix(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 4), (2, 64, 256), (2, 64, 256)))
    want = [
        softmax_attention(
            q.astype(np.float64).T[2 * h : 2 * h + 2] / 8, k[h].astype(np.float64).T, v[h].astype(np.float64).T
        )
        for h in range(2)
    ]
    np.testing.assert_allclose(
        run(decode.published_mix, q, k, v, target="inf2"), np.concatenate(want), rtol=1e-4, atol=1e-5
    )


def test_decode_has_25_instructions_per_tile() -> None:
    def counts(keys: int) -> dict[str, int]:
        trace = nkisim.Trace()
        cache = zeros(1, 128, keys)
        nkisim.simulate(decode.published_mix, target="inf2", trace=trace)(zeros(128, 4), cache, cache)
        return {
            name: sum(r.engine.name == name for r in trace.records) for name in ("dma", "tensor", "scalar", "vector")
        }

    one, two = counts(128), counts(256)
    assert {name: two[name] - one[name] for name in one} == {"dma": 2, "tensor": 4, "scalar": 2, "vector": 17}


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "flat"])
@pytest.mark.parametrize("tile", [512, 256], ids=["one tile", "two tiles"])
def test_attention_tkg(paged: bool, tile: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(tkg, "KEY_TILE_MAX", tile)
    n_seq, group, d, keys, page = 4, 3, 64, 512, 2
    q, k, v = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((d, n_seq * group), *[(n_seq, keys, d)] * 2))
    lengths = np.array([512, 300, 1, 129])
    want = np.concatenate(
        [
            softmax_attention(*(x.astype(np.float64) for x in (q.T[i * group : (i + 1) * group], k[i, :n], v[i, :n])))
            for i, n in enumerate(lengths)
        ]
    )
    table = None
    if paged:
        folds = keys // (page * 128)
        pages = rng.permutation(n_seq * folds * 128)
        table = np.ascontiguousarray(pages.reshape(n_seq * folds, 128).T.astype(np.uint32))
        caches = [np.empty((pages.size, page, d), ml_dtypes.bfloat16) for _ in range(2)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[pages] = x.reshape(-1, page, d)
        k, v = caches
    visible = np.broadcast_to(lengths.astype(np.float32), (128, n_seq)).copy()
    got = run(tkg.attention_tkg, q, k, v, table, visible, 2, keys, target="trn2")
    np.testing.assert_allclose(got.astype(np.float64).T, want, rtol=0.05, atol=0.05)
