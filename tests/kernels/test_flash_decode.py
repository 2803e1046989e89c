"""Flash decoding against the oracle, and what the kernels read, issue and keep in memory."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest

from contributed import _decode_launch
from contributed._cases import FlashCase
from contributed._checks import FLOATS
from contributed._nki import has_device, nl, run_on_device
from contributed._selfcheck import budget_check
from contributed.flash_decode import CASES, INSTRUCTIONS_PER_TILE, combine_splits
from nkisim import simulate
from reference.budget import check_budget
from reference.flash_decode import combine_splits as combine_oracle
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded
from tests.kernels.flash import (
    BF16,
    DTYPES,
    by_case_dtype_and_target,
    by_dtype,
    by_layout,
    by_target,
    check,
    geometry_of,
    normal,
    traced,
)

two_byte = pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "f16"])
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@by_case_dtype_and_target(CASES)
def test_matches_the_oracle(case: FlashCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


@pytest.mark.parametrize(
    "options",
    [{"sinks": True, "s": 2}, {"alibi": True}, {"softcap": 1.5}, {"n_splits": 2}, {"d_major": True}],
    ids=lambda options: next(iter(options)),
)
def test_softmax_scale(options: dict[str, Any]) -> None:
    """Nothing, small, one and negative, in either two-byte type."""
    case = FlashCase("scale", 4, 2, 64, (200, 31), **options)
    for i, scale in enumerate((0.0, 0.01, 1.0, -0.5)):
        check(dataclasses.replace(case, softmax_scale=scale), DTYPES[1 + i % 2], "trn2")


@by_layout
@two_byte
def test_every_option_at_once(dtype: Any, d_major: bool) -> None:
    case = FlashCase("all", 10, 2, 64, (300, 2, 141), s=3, window=60, softcap=2.0, sinks=True, alibi=True)
    scales = {"float8": True, "k_scale": (0.5, 2.0), "v_scale": (3.0, 0.25), "unused": 4}
    check(dataclasses.replace(case, d_major=d_major, n_splits=2, **scales), dtype, "trn2")
    check(dataclasses.replace(case, d_major=d_major, softmax_scale=-0.2, n_cores=2, **scales), dtype, "trn2")


@by_layout
@pytest.mark.parametrize("window", [0, 1, 3, 127, 128, 129, 250, 1000])
def test_windows(window: int, d_major: bool) -> None:
    for s in (1, 3):
        check(FlashCase("w", 4, 2, 64, (300, 128, 2), s=s, window=window, d_major=d_major, unused=2), BF16, "trn2")


@pytest.mark.parametrize("n_splits", [1, 2, 3, 10])
def test_splits(n_splits: int) -> None:
    check(FlashCase("splits", 8, 2, 64, (700, 129, 0), n_splits=n_splits, sinks=True), BF16, "trn2")


@by_layout
def test_two_cores_do_half_of_the_work_each(d_major: bool) -> None:
    q, k = normal(4, 8, 64), normal(4, 640, 2, 64)
    _, (run,) = traced(q, k, k, k_d_major=d_major, n_cores=2)
    products = [run.trace.count("nc_matmul", core=core) for core in (0, 1)]
    assert products[0] == products[1] > 0


@by_dtype
def test_one_pair_on_two_cores_is_split(dtype: Any) -> None:
    q, k = normal(1, 8, 64, dtype=dtype), normal(1, 1500, 1, 64, dtype=dtype)
    _, (run, combine) = traced(q, k, k, n_cores=2)
    assert run.arguments["n_splits"] == 2
    assert {record.core for record in run.trace.records} == {0, 1}
    assert combine.arguments["o"].shape == (2, 8, 64)


@by_dtype
@pytest.mark.parametrize("with_sinks", [False, True])
def test_combine_splits(with_sinks: bool, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    o, lse = rng.standard_normal((5, 130, 64)).astype(np.float32), (40 * rng.standard_normal((5, 130))).astype("f4")
    lse[rng.random(lse.shape) < 0.3] = -np.inf
    lse[:, 7] = -np.inf
    o[np.isinf(lse)] = 0.0
    sinks = rng.standard_normal(130).astype("f4") if with_sinks else None
    got, got_lse = simulate(combine_splits, target="trn2")(o, lse, getattr(nl, dtype.name), sinks)
    parts = (o, lse) if sinks is None else (np.concatenate([o, 0 * o[:1]]), np.concatenate([lse, sinks[None]]))
    exact = combine_oracle(*parts)
    assert got.dtype == dtype
    # A weight is exp of a difference of two float32 numbers up to 200: 2^-17 of it.
    np.testing.assert_allclose(got.astype(float), exact.o, rtol=2.0**-7 if dtype == BF16 else 2.0**-10, atol=1e-4)
    np.testing.assert_allclose(got_lse[:, 0], exact.lse, rtol=1e-6, atol=1e-6)
    assert np.isinf(exact.lse[7]) == (not with_sinks)


# -- what is read


def of_3000_keys(dtype: Any) -> tuple[Any, Any]:
    return normal(2, 4, 64, dtype=dtype), normal(2, 3000, 2, 64, dtype=dtype)


@cache
def of_3000_keys_expected(dtype: Any, lengths: tuple[int, int]) -> tuple[Any, Any]:
    q, k = of_3000_keys(dtype)
    how = {"seqlens_kv": np.array(lengths)}
    return oracle(q, k, k, **how).o, flash_decode_rounded(q, k, k, **how)[0]


@by_layout
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=["f32", "bf16"])
def test_a_program_reads_what_its_lengths_need(dtype: Any, d_major: bool) -> None:
    """One program, compiled for 3000 keys, with ever shorter lengths: every key in use is read once and no other."""
    q, k = of_3000_keys(dtype)
    geometry = geometry_of(q, k, k, k_d_major=d_major)
    row = 64 * dtype.itemsize
    programs = set()
    for lengths in ((3000, 3000), (3000, 700), (1501, 0), (129, 1), (0, 0)):
        padded = k.copy()
        for b, n in enumerate(lengths):
            padded[b, n:] = np.nan
        seqlens = np.array(lengths)
        o, (run,) = traced(q, padded, padded, seqlens_kv=seqlens, k_d_major=d_major, geometry=geometry)
        assert np.isfinite(o.astype(np.float32)).all()
        used = 2 * sum(lengths) * row
        assert run.bytes_read("v") == used
        if d_major:
            # Whole gathers of at most 2048 keys, and stretches of edge keys: two heads of two sequences.
            assert used <= run.bytes_read("k") <= used + 4 * (2048 + 2 * 128) * row
        else:
            assert run.bytes_read("k") == used
        check_budget("o", o, *of_3000_keys_expected(dtype, lengths), dtype)
        programs.add(tuple(np.shape(run.arguments[name]) for name in ("q", "k", "v", "records", "items", "bounds")))
    assert len(programs) == 1


def test_rows_past_the_lengths_are_not_touched() -> None:
    q, k = normal(2, 4, 64), normal(2, 700, 2, 64)
    _, (run,) = traced(q, k, k, seqlens_kv=np.array([300, 77]), window_size=(255, None))
    seen = {name: np.zeros(2 * 2 * 700, int) for name in ("k", "v")}
    for record in run.trace.records:
        for access in record.reads:
            if access.storage.is_argument and access.storage.name in seen:
                assert access.rows is not None
                for start in access.rows:
                    first, n = start // 64, access.free_size // 64
                    seen[access.storage.name][first : first + n] += 1
    expected = np.zeros((2, 2, 700), int)
    expected[0, :, 300 - 256 : 300] = 1
    expected[1, :, :77] = 1
    for name in seen:
        np.testing.assert_array_equal(seen[name].reshape(2, 2, 700), expected, err_msg=name)


@pytest.mark.parametrize("length", [128, 256, 2048])
def test_loads_of_d_major_keys_stay_in_their_rows(length: int) -> None:
    """The last edge keys are at the end of a row; what follows is another row, or beyond the cache."""
    q, k = normal(1, 3, 4, 64), normal(1, length, 1, 64)
    _, (run,) = traced(q, k, k, k_d_major=True)
    assert run.arguments["k"].shape == (1, 1, 64, length)
    reads = [a for record in run.trace.records for a in record.reads if a.storage.name == "k" and a.rows]
    ends = [start % length + access.free_size for access in reads for start in access.rows or ()]
    assert max(ends) == length


@by_layout
def test_a_window_of_a_long_cache_costs_the_window(d_major: bool) -> None:
    q, k = np.zeros((1, 4, 64), BF16), np.zeros((1, 8192, 1, 64), BF16)
    _, (run,) = traced(q, k, k, window_size=(511, 0), k_d_major=d_major)
    assert run.bytes_read("v") == 512 * 64 * 2
    assert run.bytes_read("k") <= (512 + 2048 * d_major) * 64 * 2
    assert list(run.inner_steps()) == [] or run.item_keys < 512


# -- what is issued and kept


@by_target
@by_layout
def test_instructions_per_tile_of_128_keys(d_major: bool, target: str) -> None:
    """All instructions of a further item of two lanes, loads included, over its tiles."""
    q, k = np.zeros((2, 8, 128), BF16), np.zeros((2, 3 * 8192, 1, 128), BF16)
    _, (run,) = traced(q, k, k, k_d_major=d_major, target=target)
    assert run.item_keys == 8192
    assert run.arguments["records"].shape[3] == 2  # lanes
    counts = [len(step) for step in run.inner_steps()]
    # trn1 transposes into float32: a bank holds half as many tiles, and there are 8 more copies per lane.
    more = 16 if target == "trn1" and not d_major else 0
    assert counts == [INSTRUCTIONS_PER_TILE[d_major] * 128 + more] * 2


@by_layout
def test_memory_does_not_grow_with_the_cache(d_major: bool) -> None:
    q, k = np.zeros((1, 8, 128), BF16), np.zeros((1, 65536, 1, 128), BF16)
    geometry = geometry_of(q, k, k, k_d_major=d_major)
    peaks = []
    for keys in (16384, 65536):
        _, (run,) = traced(q, k[:, :keys], k[:, :keys], k_d_major=d_major, geometry=geometry)
        use = run.trace.memory[0]
        peaks.append((use.sbuf.amount, use.psum.amount))
    assert peaks[0] == peaks[1]
    # 16 KiB each of K and V, and about 20 KiB more; eight banks.
    assert peaks[0][0] <= (2 * 16 + 20) * 1024
    assert peaks[0][1] <= 8


@by_layout
def test_memory_of_four_lanes(d_major: bool) -> None:
    """What the docstring says of eight KV heads of eight query heads each."""
    q, k = np.zeros((1, 64, 128), BF16), np.zeros((1, 8192, 8, 128), BF16)
    _, (run,) = traced(q, k, k, k_d_major=d_major)
    use = run.trace.memory[0]
    assert 64 * 1024 < use.sbuf.amount <= 81 * 1024
    assert use.psum.amount <= 8


# -- the self-check


@pytest.mark.parametrize(("fault", "text"), [(0.0, "pass"), (1e-3, "FAIL (lse)"), (np.nan, "FAIL (lse)")])
def test_the_self_check_compares_lse_too(fault: float, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def references(case: FlashCase, dtype: str) -> Any:
        q, k, v, options = case.inputs(FLOATS[dtype])
        return tuple(zip(oracle(q, k, v, **options), flash_decode_rounded(q, k, v, **options), strict=True))

    def results(case: FlashCase, dtype: str, target: str | None) -> Any:
        (o, _), (lse, _) = references(case, dtype)
        return o.astype(FLOATS[dtype]), (lse + fault).astype(np.float32)

    code = budget_check("text", results, references, CASES[:1], ["--target", "trn2", "--dtype", "bfloat16"])
    assert code == (text != "pass")
    assert capsys.readouterr().out.splitlines()[-2].endswith(f"  {text}")


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: FlashCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()
    monkeypatch.setattr(_decode_launch, "simulate_kernel", lambda kernel, *args, target: run_on_device(kernel, *args))
    check(case, dtype, "trn2")
