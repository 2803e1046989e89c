"""Append kernels against the oracle: every bit of the caches, on every target and in every dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contributed import append_kv as module
from contributed._nki import has_device, run_on_device, simulate_kernel
from contributed.append_kv import (
    CACHE_FLOATS,
    CASES,
    AppendCase,
    append_kv,
    append_kv_paged,
    append_rows,
    append_rows_k_d_major,
    random_bits,
    row_indices,
)
from nkisim import NkiError, Trace, simulate
from nkisim.latency import estimate
from reference import append as oracle

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3
TARGETS = ["trn1", "trn2", "trn3"]

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", CACHE_FLOATS.values(), ids=CACHE_FLOATS)
by_target = pytest.mark.parametrize("target", TARGETS)


def same_bits(got: Any, expected: Any) -> bool:
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and bool(np.array_equal(got.view(f"u{got.itemsize}"), expected.view(f"u{got.itemsize}")))
    )


def assert_same(got: Any, expected: Any) -> None:
    """K and V equal to the bit, every row that was not addressed included."""
    for x, y in zip(got, expected, strict=True):
        assert same_bits(x, y)


def check(case: AppendCase, dtype: Any, target: str | None, seed: int = 1, m: Any = module) -> None:
    args = case.inputs(dtype, seed)
    if case.block_size is None:
        expected = oracle.append_kv(*args)
        assert m.append_kv(*args, k_d_major=case.k_d_major, target=target) is None
    else:
        expected = oracle.append_kv_paged(*args)
        assert m.append_kv_paged(*args, target=target) is None
    assert_same(args[:2], expected)


@by_target
@by_dtype
@by_case
def test_matches_the_oracle(case: AppendCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


def test_the_cases_hold_nan() -> None:
    """So that equal bits say that NaN stays what it was, and where it was."""
    for dtype in CACHE_FLOATS.values():
        k, v, k_new, v_new, _ = next(c for c in CASES if c.name == "llama-3-8b").inputs(dtype)
        for x in (k, v, k_new, v_new):
            with np.errstate(invalid="ignore"):  # of signalling ones
                nan = x[np.isnan(x)].view(f"u{x.itemsize}")
            assert np.unique(nan).size > 1  # payloads or signs


@by_target
@pytest.mark.parametrize("k_d_major", [False, True])
def test_literal_rows(k_d_major: bool, target: str) -> None:
    """Written out by hand: two sequences of three rows, two KV heads; the second slot is inactive."""
    k, v = np.zeros((2, 3, 2, 2), np.float32), np.zeros((2, 3, 2, 1), np.float32)
    k_new = np.arange(1, 17, dtype=np.float32).reshape(2, 2, 2, 2)
    v_new = -np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2, 1)
    append_kv(k, v, k_new, v_new, np.array([1, -1], np.int32), k_d_major=k_d_major, target=target)
    assert k[0].tolist() == [[[0, 0], [0, 0]], [[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert v[0].tolist() == [[[0], [0]], [[-1], [-2]], [[-3], [-4]]]
    assert not k[1].any()
    assert not v[1].any()


@by_target
def test_literal_pages(target: str) -> None:
    """Rows 1 and 2 of a sequence on pages 3 and 1 of two rows."""
    k_pages, v_pages = np.zeros((4, 1, 2, 1), np.float32), np.zeros((4, 1, 2, 1), np.float32)
    new = np.array([5.0, 6.0], np.float32).reshape(1, 2, 1, 1)
    table, positions = np.array([[3, 1, -1]], np.int32), np.array([1], np.int32)
    append_kv_paged(k_pages, v_pages, new, -new, table, positions, target=target)
    assert k_pages[:, 0, :, 0].tolist() == [[0, 0], [6, 0], [0, 0], [0, 5]]
    assert v_pages[:, 0, :, 0].tolist() == [[0, 0], [-6, 0], [0, 0], [0, -5]]


@by_dtype
@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 112, 128, 192, 256])
def test_head_dims(head_dim: int, dtype: Any) -> None:
    check(AppendCase("flat", 3, 2, head_dim, 5, s=2), dtype, "trn2")
    check(AppendCase("d-major", 3, 2, head_dim, 5, s=2, k_d_major=True), dtype, "trn2")
    check(AppendCase("paged", 3, 2, head_dim, 40, s=2, block_size=16), dtype, "trn2")


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 255, 256, 257])
def test_numbers_of_rows_on_and_off_the_tile_edge(rows: int) -> None:
    for batch, s, heads in ((rows, 1, 1), (1, rows, 1), (1, 1, rows)):
        check(AppendCase("edge", batch, heads, 8, s + 3, s=s, block_size=16), BF16, "trn2")
        check(AppendCase("edge", batch, heads, 8, s + 3, s=s, k_d_major=True), BF16, "trn2")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_table_and_positions(data: st.DataObject) -> None:
    """Pages in any order, some inactive slots, tokens across pages."""
    batch, s = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    heads, block_size, per_sequence = (data.draw(st.integers(1, n)) for n in (3, 4, 3))
    s = min(s, block_size * per_sequence)
    n_blocks = batch * per_sequence + data.draw(st.integers(0, 2))
    pages = data.draw(st.permutations(range(n_blocks)))[: batch * per_sequence]
    table = np.array(pages, np.int32).reshape(batch, per_sequence)
    last = block_size * per_sequence - s
    positions = np.array(data.draw(st.lists(st.integers(-1, last), min_size=batch, max_size=batch)), np.int32)
    unused = np.arange(per_sequence) * block_size > (positions + s - 1)[:, None]
    table[unused] = -1
    rng = np.random.default_rng(0)
    shape = (n_blocks, heads, block_size, 3)
    args = [random_bits(rng, x, BF16) for x in (shape, shape, (batch, s, heads, 3), (batch, s, heads, 3))]
    expected = oracle.append_kv_paged(*args, table, positions)
    append_kv_paged(*args, table, positions, target="trn2")
    assert_same(args[:2], expected)


def check_packed(m: Any = module, k_d_major: bool = False) -> None:
    """Three sequences one after the other, the second empty, rows left over at both ends."""
    rng = np.random.default_rng(3)
    cu, positions = np.array([2, 9, 9, 20], np.int32), np.array([4, -1, 0], np.int32)
    k, v = random_bits(rng, (23, 3, 16), BF16), random_bits(rng, (23, 3, 8), BF16)
    k_new, v_new = random_bits(rng, (3, 3, 3, 16), BF16), random_bits(rng, (3, 3, 3, 8), BF16)
    expected = k.copy(), v.copy()
    for b in (0, 2):
        rows, one = slice(cu[b], cu[b + 1]), slice(b, b + 1)
        own = (expected[0][None, rows], expected[1][None, rows], k_new[one], v_new[one], positions[one])
        expected[0][rows], expected[1][rows] = (x[0] for x in oracle.append_kv(*own))
    m.append_kv(k, v, k_new, v_new, positions, cu_seqlens_kv=cu, k_d_major=k_d_major, target="trn2")
    assert_same((k, v), expected)


@pytest.mark.parametrize("k_d_major", [False, True])
def test_packed_caches(k_d_major: bool) -> None:
    check_packed(k_d_major=k_d_major)


def test_a_slot_mapping_becomes_row_numbers() -> None:
    """Slots count pages * block_size + row, as serving stacks write them; -1 is no slot."""
    slots = np.array([35, -1, 0])
    index = row_indices(slots // 16, slots % 16, 2, 16)
    assert index.dtype == np.int32
    assert index.tolist() == [(2 * 2 + 0) * 16 + 3, (2 * 2 + 1) * 16 + 3, -1, -1, 0, 16]


@pytest.mark.parametrize("outside", [-1, -5, 12, 2**31 - 1, -(2**31)])
def test_rows_outside_the_cache_are_skipped(outside: int) -> None:
    rng = np.random.default_rng(2)
    k, v = random_bits(rng, (2, 2, 3, 8), BF16), random_bits(rng, (2, 2, 3, 8), BF16)
    new = random_bits(rng, (2, 1, 2, 8), BF16)
    expected = k.copy(), v.copy()
    expected[0].reshape(12, 8)[[7, 11]] = expected[1].reshape(12, 8)[[7, 11]] = new.reshape(4, 8)[[0, 3]]
    rows = np.array([7, outside, outside, 11], np.int32)
    returned = simulate_kernel(append_rows, k, v, new, new, rows, target="trn2")
    assert_same((k, v), expected)
    assert_same(returned, expected)


def test_row_numbers_that_float32_does_not_hold() -> None:
    """Above 2^24, odd ones included: nothing on the way computes with them."""
    n = 2**24 + 8
    k, v = np.zeros((1, n, 1, 1), F8), np.zeros((1, n, 1, 1), F8)
    new = np.ones((1, 2, 1, 1), F8)
    append_kv(k, v, new, new, np.array([n - 3], np.int32), target="trn2")
    for x in (k, v):
        assert np.flatnonzero(x.view(np.uint8)).tolist() == [n - 3, n - 2]


def test_new_tokens_may_lie_in_the_cache_and_caches_in_one_array() -> None:
    """The first row goes to the last one; K and V are interleaved, so that neither is contiguous."""
    kv = random_bits(np.random.default_rng(5), (2, 4, 2, 3, 16), BF16)
    k, v = kv[:, :, 0], kv[:, :, 1]
    args = (k, v, k[:, :1], v[:, :1], np.array([3, 3], np.int32))
    expected = oracle.append_kv(*args)
    append_kv(*args, target="trn2")
    assert_same((k.copy(), v.copy()), expected)
    pages = random_bits(np.random.default_rng(6), (3, 2, 2, 4, 16), BF16)
    k, v = pages[:, 0], pages[:, 1]
    new = k[:1, :, :2].swapaxes(1, 2), v[:1, :, :2].swapaxes(1, 2)
    paged = (k, v, *new, np.array([[2, 0]], np.int32), np.array([3], np.int32))
    expected = oracle.append_kv_paged(*paged)
    append_kv_paged(*paged, target="trn2")
    assert_same((k.copy(), v.copy()), expected)


def test_arguments_other_than_the_caches_stay() -> None:
    args = CASES[-1].inputs(BF16)
    before = [x.copy() for x in args]
    append_kv_paged(*args, target="trn2")
    for x, y in zip(args[2:], before[2:], strict=True):
        assert same_bits(x, y)


# -- into float8


def float8(x: Any, scale: Any) -> Any:
    """x / scale [heads] in float64, limited to the largest float8_e4m3, rounded once."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.float64(x) / np.float64(scale)[:, None], -240.0, 240.0).astype(F8)


def check_scaled(dtype: Any, target: str | None, m: Any = module, shape: Any = (5, 6, 7, 16)) -> None:
    """Scales are powers of two, so that x / scale and x * (1 / scale) are the same number."""
    rng = np.random.default_rng(4)
    batch, s, heads, d = shape
    k_scale, v_scale = 2.0 ** rng.integers(-5, 5, heads), 0.25
    k_new, v_new = ((100 * rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    k_new[0, 0, 0, :8] = [np.inf, -np.inf, np.nan, 6e4, -6e4, 0.0, -0.0, 1e-7]
    k, v = random_bits(rng, (batch, s + 2, heads, d), F8), random_bits(rng, (batch, s + 2, heads, d), F8)
    positions = np.array([2, 0, -1, 1, 1], np.int32)
    stored = float8(k_new, k_scale), float8(v_new, np.full(heads, v_scale))
    expected = oracle.append_kv(k, v, *stored, positions)
    m.append_kv(k, v, k_new, v_new, positions, k_scale=k_scale, v_scale=v_scale, target=target)
    nan = np.isnan(k[0, 2, 0, 2])  # whose sign is the machine's
    expected[0][0, 2, 0, 2] = k[0, 2, 0, 2]
    assert nan
    assert_same((k, v), expected)
    assert np.abs(k[0, 2:, :, :].astype(np.float32)[~np.isnan(k[0, 2:])]).max() == 240.0


@by_target
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
def test_new_tokens_are_scaled_into_float8(dtype: Any, target: str) -> None:
    check_scaled(dtype, target)


def test_other_scales_differ_by_the_rounding_of_their_reciprocal() -> None:
    """Of 16384 values the few next to a tie may round the other way; none is further off than half a spacing."""
    x = (30 * np.random.default_rng(8).standard_normal((1, 128, 1, 128))).astype(BF16)
    k, v = np.zeros((1, 128, 1, 128), F8), np.zeros((1, 128, 1, 128), F8)
    append_kv(k, v, x, x, np.array([0], np.int32), k_scale=0.37, v_scale=np.array([3.1]), target="trn2")
    for cache, scale in ((k, 0.37), (v, 3.1)):
        product = (np.float32(x) * np.float32(1 / scale)).clip(-240, 240)
        assert same_bits(cache, product.astype(F8))
        true = np.float64(x).clip(-240 * scale, 240 * scale)
        spacing = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(product), 1e-9))) - 3), 2.0**-9)
        assert (np.abs(np.float64(cache) * scale - true) <= scale * spacing * (0.5 + 1e-6)).all()


def test_without_scales_a_value_in_range_is_only_rounded() -> None:
    x = np.random.default_rng(9).uniform(-240, 240, (2, 3, 2, 64)).astype(BF16)
    k, v = np.zeros((2, 3, 2, 64), F8), np.ones((2, 3, 2, 64), F8)
    args = (k, v, x, -x, np.array([0, -1], np.int32))
    expected = oracle.append_kv(*args)
    append_kv(*args, target="trn2")
    assert_same((k, v), expected)


def test_paged_and_d_major_caches_take_scales() -> None:
    x = np.full((1, 2, 2, 4), 6.0, np.float32)
    k, v = np.zeros((3, 2, 2, 4), F8), np.zeros((3, 2, 2, 4), F8)
    table, positions = np.array([[2, 0]], np.int32), np.array([1], np.int32)
    append_kv_paged(k, v, x, x, table, positions, k_scale=np.array([2.0, 3.0], np.float32), v_scale=4, target="trn2")
    for page, row in ((2, 1), (0, 0)):
        assert (k[page, :, row].astype(float) == [[3.0] * 4, [2.0] * 4]).all()
        assert (v[page, :, row].astype(float) == 1.5).all()
    assert np.count_nonzero(k.astype(float)) == np.count_nonzero(v.astype(float)) == 16
    k, v = np.zeros((1, 3, 2, 4), F8), np.zeros((1, 3, 2, 4), F8)
    append_kv(k, v, x, x, positions, k_scale=2.0, k_d_major=True, target="trn2")
    assert (k[0, 1:].astype(float) == 3.0).all()
    assert (v[0, 1:].astype(float) == 6.0).all()
    assert not k[0, 0].astype(float).any()


def test_a_kernel_does_not_cast_without_factors_nor_limit_without_float8() -> None:
    k, new = np.zeros((1, 1, 2, 4), F8), np.zeros((1, 1, 1, 4), BF16)
    rows, factors = np.zeros(1, np.int32), np.ones((1, 2), np.float32)
    with pytest.raises(AssertionError, match="k_new dtype: received bfloat16, allowed float8_e4m3, the cache's"):
        simulate_kernel(append_rows, k, k.copy(), new, new, rows, target="trn2")
    with pytest.raises(AssertionError, match="k dtype with factors: received bfloat16, allowed float8_e4m3"):
        simulate_kernel(append_rows, k.astype(BF16), k.astype(BF16), new, new, rows, factors, target="trn2")


# -- what it does and costs


def kernel_arguments(
    batch: int, s: int, heads: int, d: int, seqlen_kv: int, k_d_major: bool = False, dtype: Any = BF16
) -> tuple[Any, ...]:
    """Zero caches and ones as new tokens, from row 1 on; kernel layouts."""
    k = np.zeros((batch, heads, d, seqlen_kv) if k_d_major else (batch, heads, seqlen_kv, d), dtype)
    v, new = np.zeros((batch, heads, seqlen_kv, d), dtype), np.ones((batch, s, heads, d), BF16)
    owner, within = np.repeat(np.arange(batch), s), np.tile(1 + np.arange(s), batch)
    rows = row_indices(owner, within, heads, seqlen_kv)
    columns = (row_indices(owner, within, heads, seqlen_kv * d),) if k_d_major else ()
    return (k, v, new, new, *columns, rows)


def traced(kernel: Any, *args: Any, target: str = "trn2") -> Trace:
    trace = Trace()
    simulate(kernel, target=target, trace=trace)(*args)
    return trace


def elements(trace: Trace, name: str, core: int | None = None) -> list[int]:
    """Elements of an argument that are written, as often as they are."""
    found: list[int] = []
    for record in trace.records:
        for a in record.writes:
            if a.storage.name == name and core in (None, record.core):
                assert a.rows is not None
                inner = sum(np.ix_(*(np.arange(n) * x for n, x in zip(a.shape[1:], a.strides[1:], strict=True))))
                found += [row + int(i) for row in a.rows for i in np.ravel(inner)]
    return found


@by_target
@pytest.mark.parametrize("k_d_major", [False, True])
def test_nothing_but_the_addressed_rows_is_written_and_caches_are_not_read(k_d_major: bool, target: str) -> None:
    k, v, *rest = kernel_arguments(3, 2, 2, 5, 7, k_d_major)
    for index in rest[2:]:
        index[4:8] = -1  # the second sequence is inactive
    trace = traced(append_rows_k_d_major if k_d_major else append_rows, k, v, *rest, target=target)
    for name, cache in (("k", k), ("v", v)):
        written = elements(trace, name)
        assert len(written) == 2 * 2 * 2 * 5  # sequences, tokens, heads, d: each once
        assert sorted(written) == np.flatnonzero(cache.astype(np.float32)).tolist()
    assert {a.storage.name for r in trace.records for a in r.reads if a.storage.is_argument} == (
        {"k_new", "v_new", "rows"} | ({"columns"} if k_d_major else set())
    )
    scatters = [r for r in trace.records if r.writes[0].rows is not None]
    assert [r.attrs["rows_skipped"] for r in scatters] == [4, 4]
    assert {r.attrs["dge"] for r in scatters} == {"swdge"}


@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (128, 1), (129, 2), (512, 4)])
def test_instructions_per_128_rows(rows: int, tiles: int) -> None:
    """What the docstring says: loads of indices, K and V, and two scatters."""
    assert traced(append_rows, *kernel_arguments(rows, 1, 1, 8, 4)).counts() == {"dma_copy": 5 * tiles}
    d_major = traced(append_rows_k_d_major, *kernel_arguments(rows, 1, 1, 8, 4, k_d_major=True))
    assert d_major.counts() == {"dma_copy": 6 * tiles}
    factors = np.ones((rows, 2), np.float32)
    scaled = traced(append_rows, *kernel_arguments(rows, 1, 1, 8, 4, dtype=F8), factors)
    assert scaled.counts() == {"dma_copy": 6 * tiles, "tensor_scalar": 4 * tiles}


def test_memory_does_not_depend_on_the_sizes() -> None:
    """One tile: a row number, and 128 elements of K and V in two bytes."""
    for batch, s, seqlen_kv in ((16, 1, 8), (16, 1, 64), (64, 5, 8)):
        used = traced(append_rows, *kernel_arguments(batch, s, 8, 128, seqlen_kv)).memory[0]
        assert used.sbuf.amount == 4 + 2 * 128 * 2
        assert used.psum.amount == 0


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_two_cores_share_the_rows(batch: int, target: str) -> None:
    check_two_cores(batch, target)


def check_two_cores(batch: int, target: str, m: Any = module) -> None:
    one, two = (kernel_arguments(batch, 3, 3, 8, 6) for _ in range(2))
    traced(m.append_rows, *one, target=target)
    trace = traced(m.append_rows[2], *two, target=target)
    assert_same(two[:2], one[:2])
    assert np.count_nonzero(two[0].astype(np.float32)) == batch * 3 * 3 * 8
    shares = [len(elements(trace, "v", core)) for core in (0, 1)]
    assert sum(shares) == batch * 3 * 3 * 8
    assert abs(shares[0] - shares[1]) <= 8  # one row


def test_the_docstring_says_what_the_model_says() -> None:
    shape = (64, 1, 8, 128, 16)
    flat = kernel_arguments(*shape)
    one = estimate(traced(append_rows, *flat)).total_us
    two = estimate(traced(append_rows[2], *flat)).total_us
    d_major = estimate(traced(append_rows_k_d_major, *kernel_arguments(*shape, k_d_major=True))).total_us
    text = " ".join((module.__doc__ or "").split())
    assert f"modelled: {one:.1f} us, on two cores {two:.1f} us" in text
    assert f"128 runs of 2 bytes, modelled {d_major:.1f} us" in text


# -- what breaks it


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* size + np.asarray(within", "* (size + 1) + np.asarray(within"),  # the wrong head stride
        ("np.arange(n_kv_heads)) * size", "np.arange(n_kv_heads)[::-1]) * size"),  # heads the wrong way round
        ("(token * n_kv_heads +", "(token +"),  # the wrong distance of sequences
        ("np.asarray(within, np.int64).reshape(-1, 1)\n", "np.asarray(within, np.int64).reshape(-1, 1) + 1\n"),
        ("vector_offset=at_sb, ", "offset=cache.shape[1], vector_offset=at_sb, "),  # one row further on the device
        ("[step, d]]", "[1, d]]"),  # d-major keys as if they were contiguous
        ("_table(k, 1), k.shape[3]", "_table(k, 1), k.shape[2]"),  # the wrong distance of a key's elements
        ("v_at = k_at if v_index == None else", "v_at = k_at if True else"),
        ("_scatter(v_cache, v_at, 1, v_sb)", "_scatter(v_cache, v_at, 1, k_sb)"),
        ("_scatter(v_cache, v_at, 1, v_sb)", "_scatter(k_cache, v_at, 1, v_sb)"),
        ("v_sb = _load(v_rows[rows, :])", "v_sb = _load(v_rows[0 : rows.stop - rows.start, :])"),  # the first tile
        ("oob_mode=nisa.oob_mode.skip", "oob_mode=nisa.oob_mode.error"),
        ("(core + 1) // cores\n", "(core + 1) // cores - 1\n"),  # the last row is lost
        ("range(n_rows * core // cores, end", "range(0, end"),  # both cores write the first half
        ("tokens % block_size\n", "(tokens + 1) % block_size\n"),
        ("tokens // block_size], ", "(tokens + 1) // block_size], "),
        ("(begins + first)[:, None]", "first[:, None]"),  # packed sequences all at the start
        ("op1=nl.minimum, operand1=FLOAT8_MAX", "op1=nl.minimum, operand1=2 * FLOAT8_MAX"),
        ("operand0=-FLOAT8_MAX", "operand0=-2 * FLOAT8_MAX"),
        ("factors_sb[:, 1:2]", "factors_sb[:, 0:1]"),  # the scale of K for V
        ("_load(factors[rows, :])", "_load(factors[0 : rows.stop - rows.start, :])"),
        ("np.tile(factors, (k_new.shape[0] * k_new.shape[1], 1))", "np.repeat(factors, len(k_new) * 6, 0)"),
        ("1.0 / value", "value"),
    ],
)  # fmt: skip
def test_a_mutated_kernel_fails(old: str, new: str) -> None:
    """Each one-line fault fails in a check that is a test above, so the suite would be red."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    mutant = ModuleType("mutant")
    sys.modules["mutant"] = mutant  # where dataclasses look for it
    try:
        exec(compile(text.replace(old, new), "mutant.py", "exec"), mutant.__dict__)
        with pytest.raises((AssertionError, NkiError)):
            every_check(mutant)
    finally:
        del sys.modules["mutant"]


def every_check(m: Any) -> None:
    for case in CASES:
        check(case, BF16, "trn2", m=m)
    for k_d_major in (False, True):
        check_packed(m, k_d_major)
    check_scaled(BF16, "trn2", m)
    check_two_cores(40, "trn2", m)


def test_the_unmutated_kernel_passes_every_check() -> None:
    every_check(module)


# -- bad input

K, NEW = np.zeros((2, 5, 2, 8), BF16), np.zeros((2, 1, 2, 8), BF16)
POSITIONS = np.array([4, -1], np.int32)
PAGES, TABLE = np.zeros((4, 2, 16, 8), BF16), np.array([[0, 1], [3, -1]], np.int32)
FLAT = {"k": K, "v": K.copy(), "k_new": NEW, "v_new": NEW, "positions": POSITIONS}
PAGED = {"k_pages": PAGES, "v_pages": PAGES.copy(), "k_new": NEW, "v_new": NEW, "block_table": TABLE,
         "positions": POSITIONS}  # fmt: skip
READ_ONLY = K.copy()
READ_ONLY.flags.writeable = False


def i32(*values: Any) -> Any:
    return np.array(values, np.int32)


def refused(function: Any, args: dict[str, Any], error: type[Exception], text: str) -> None:
    """The call raises, and no array that it was given has changed."""
    rng = np.random.default_rng(1)
    args = {n: x.copy() if isinstance(x, np.ndarray) and x.flags.writeable else x for n, x in args.items()}
    arrays = {n: x for n, x in args.items() if isinstance(x, np.ndarray) and x.dtype == BF16 and x.flags.writeable}
    for x in arrays.values():
        x[...] = random_bits(rng, x.shape, BF16) if x.size else x
    before = {n: x.copy() for n, x in arrays.items()}
    with pytest.raises(error, match=text):
        function(**args)
    for n, x in arrays.items():
        assert same_bits(x, before[n])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": K.tolist()}, TypeError, r"k: received list, allowed a NumPy array \[batch, seqlen_kv, n_kv_heads, d\]"),
        ({"k": K[0]}, ValueError, r"k shape: received \[5, 2, 8\], allowed \[batch, seqlen_kv, n_kv_heads, d\]"),
        ({"v_new": NEW[0]}, ValueError, r"v_new shape: received \[1, 2, 8\], allowed \[batch, s, n_kv_heads, d\]"),
        ({"k": K.astype(np.float64)}, TypeError, "k dtype: received float64, allowed float32, bfloat16, float16"),
        ({"v": K.astype(np.float16)}, TypeError, "v dtype: received float16, allowed bfloat16, that of k"),
        ({"k_new": NEW.astype(np.float32)}, TypeError, "k_new dtype: received float32, allowed bfloat16"),
        ({"k_new": NEW.astype(F8)}, TypeError, "k_new dtype: received float8_e4m3, allowed bfloat16"),
        ({"v_new": NEW.astype(np.float16)}, TypeError, "v_new dtype: received float16, allowed bfloat16, that of k"),
        ({"k": READ_ONLY}, ValueError, "k: received a read-only array, allowed one that can be changed in place"),
        ({"k_new": NEW[:, :0]}, ValueError, r"k_new shape: received \[2, 0, 2, 8\], allowed .*each at least 1"),
        ({"v": K[:, :4]}, ValueError, r"v shape: received \[2, 4, 2, 8\], allowed \[2, 5, 2, 'd'\], as k"),
        ({"k_new": NEW[:, :, :1]}, ValueError, r"k_new shape: received \[2, 1, 1, 8\], allowed \[2, 1, 2, 8\]"),
        ({"v_new": NEW[..., :4]}, ValueError, r"v_new shape: received \[2, 1, 2, 4\], allowed \[2, 1, 2, 8\]"),
        ({"v_new": NEW[:1]}, ValueError, r"v_new shape: received \[1, 1, 2, 8\], allowed \[2, 1, 2, 8\]"),
        ({"k_new": NEW[:1], "v_new": NEW[:1], "positions": POSITIONS[:1]}, ValueError,
         "k batch: received 2, allowed 1, that of k_new"),
        ({"positions": [4, -1]}, TypeError, r"positions: received list, allowed a NumPy array of integers \[2\]"),
        ({"positions": POSITIONS.astype(np.float32)}, TypeError, "positions: received float32, allowed a NumPy array"),
        ({"positions": POSITIONS.astype(np.uint64)}, TypeError, "positions: received uint64, allowed a NumPy array"),
        ({"positions": POSITIONS[:1]}, ValueError, r"positions shape: received \[1\], allowed \[2\]"),
        ({"positions": i32(0, 5)}, ValueError, r"positions\[1\]: received 5, allowed -1, or 0\.\.4: 1 new tokens in 5"),
        ({"positions": i32(-2, 0)}, ValueError, r"positions\[0\]: received -2, allowed -1, or 0\.\.4"),
        ({"k_scale": 2.0}, ValueError, "k_scale: received 2.0, allowed None where new tokens come in bfloat16 already"),
        ({"target": "h100"}, ValueError, "target: received 'h100', allowed trn1"),
        ({"cu_seqlens_kv": i32(0, 5, 5)}, ValueError, r"k shape: received .*allowed \[total, n_kv_heads, d\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(append_kv, {**FLAT, **change}, error, text)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k_pages": PAGES[0]}, ValueError, r"k_pages shape: .*allowed \[n_blocks, n_kv_heads, block_size, d\]"),
        ({"v_pages": PAGES[:3]}, ValueError, r"v_pages shape: received \[3, 2, 16, 8\], allowed \[4, 2, 16, 'd'\]"),
        ({"block_table": TABLE.tolist()}, TypeError, "block_table: received list, allowed a NumPy array of integers"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table shape: received \[1, 2\], allowed \[2, 2\]"),
        ({"block_table": TABLE[0]}, ValueError, r"block_table shape: received \[2\], allowed \[2, 1\]"),
        ({"block_table": i32([0, 1], [4, -1])}, ValueError, r"block_table: received .*allowed pages 0\.\.3, -1"),
        ({"block_table": i32([0, 1], [3, -2])}, ValueError, r"block_table: received .*allowed pages 0\.\.3, -1"),
        ({"positions": i32(32, -1)}, ValueError,
         r"positions\[0\]: received 32, allowed -1, or 0\.\.31: 1 new tokens in 2 blocks of 16"),
        ({"positions": i32(0, 16)}, ValueError, r"block_table\[1\]: received \[3, -1\], allowed a page for each of"),
        ({"positions": i32(5, 5), "block_table": i32([0, 1], [0, 2])}, ValueError,
         "block_table: received .*allowed no row of a page for two of the new tokens"),
        ({"positions": i32(-2, 0)}, ValueError, r"positions\[0\]: received -2, allowed -1, or 0\.\.31"),
        ({"v_scale": 1.0}, ValueError, "v_scale: received 1.0, allowed None"),
        ({"target": "h100"}, ValueError, "target: received 'h100', allowed trn1"),
    ],
)  # fmt: skip
def test_bad_paged_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(append_kv_paged, {**PAGED, **change}, error, text)


def test_the_arguments_above_are_right_without_the_change() -> None:
    append_kv(**{n: x.copy() for n, x in FLAT.items()}, target="trn2")
    append_kv_paged(**{n: x.copy() for n, x in PAGED.items()}, target="trn2")


@pytest.mark.parametrize(
    ("cu", "positions", "text"),
    [
        (i32(0, 6, 5), POSITIONS, r"cu_seqlens_kv: received \[0, 6, 5\], allowed ascending from 0 to 10"),
        (i32(0, 5, 11), POSITIONS, r"cu_seqlens_kv: received \[0, 5, 11\], allowed ascending from 0 to 10"),
        (i32(-1, 5, 10), POSITIONS, r"cu_seqlens_kv: received \[-1, 5, 10\], allowed ascending from 0 to 10"),
        (i32(0, 5), POSITIONS, r"cu_seqlens_kv shape: received \[2\], allowed \[3\]"),
        (i32(0, 4, 10), POSITIONS, r"positions\[0\]: received 4, allowed -1, or 0\.\.3: 1 new tokens in 4 rows"),
    ],
)
def test_bad_packed_input_is_named(cu: Any, positions: Any, text: str) -> None:
    packed = {"k": K.reshape(10, 2, 8), "v": K.reshape(10, 2, 8).copy(), "cu_seqlens_kv": cu, "positions": positions}
    refused(append_kv, {**FLAT, **packed}, ValueError, text)


@pytest.mark.parametrize(
    ("scale", "error", "text"),
    [
        (0.0, ValueError, "k_scale: received 0.0, allowed positive numbers whose reciprocals float32 holds"),
        (-1.0, ValueError, "k_scale: received -1.0, allowed positive numbers"),
        (float("nan"), ValueError, "k_scale: received nan, allowed positive numbers"),
        (1e-40, ValueError, "k_scale: received 1e-40, allowed positive numbers"),
        (1e60, ValueError, r"k_scale: received 1e\+60, allowed positive numbers"),
        (np.ones(3), ValueError, r"k_scale shape: received \(3,\), allowed \(\) or \(2,\)"),
        ("1", TypeError, r"k_scale: received '1', allowed a number or \[n_kv_heads\], or None"),
        (True, TypeError, "k_scale: received True, allowed a number"),
    ],
)
def test_bad_scales_are_named(scale: Any, error: type[Exception], text: str) -> None:
    refused(append_kv, {**FLAT, "k": K.astype(F8), "v": K.astype(F8), "k_scale": scale}, error, text)


def test_k_and_v_in_one_place_are_refused() -> None:
    k = K.copy()
    with pytest.raises(ValueError, match="v: received memory of k, allowed memory of its own"):
        append_kv(k, k[:], NEW, NEW, POSITIONS, target="trn2")


# -- on a device


@pytest.mark.device
@by_dtype
def test_matches_the_oracle_on_a_device(dtype: Any) -> None:
    assert has_device()
    case = next(c for c in CASES if c.name == "paged-llama-3-8b")
    k, v, k_new, v_new, table, positions = case.inputs(dtype)
    pages = np.where(positions < 0, -1, table[np.arange(case.batch), positions // case.block_size])
    rows = row_indices(pages, positions % case.block_size, case.n_kv_heads, case.block_size)
    expected = oracle.append_kv_paged(k, v, k_new, v_new, table, positions)
    got = run_on_device(append_rows, k, v, k_new, v_new, rows)
    assert_same([np.asarray(x) for x in got], expected)
