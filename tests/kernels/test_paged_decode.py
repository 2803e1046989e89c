"""Paged decode against the oracle on every target and in every dtype; which rows it reads; what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from contributed import _decode_launch, flash_decode, paged_decode
from contributed._cases import FlashCase
from contributed._decode_launch import Launch
from contributed._nki import has_device, run_on_device
from contributed.append_kv import append_kv_paged
from contributed.paged_decode import CASES, PagedCase
from nkisim import Trace
from nkisim.nki import recording
from reference import append as append_oracle
from reference.budget import check_budget
from reference.caches import gather_pages
from reference.flash_decode import paged_decode as oracle
from reference.rounded import flash_decode_rounded
from tests.kernels.flash import CEILING, by_case_dtype_and_target, by_dtype, by_target

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def references(args: Any, options: dict[str, Any]) -> tuple[tuple[Any, Any], ...]:
    """For o and for lse: the oracle's, and in the machine's precision."""
    q, k_pages, v_pages, table, lengths = args
    (k, cu), (v, _) = (gather_pages(pages, table, lengths) for pages in (k_pages, v_pages))
    low = flash_decode_rounded(q, k, v, cu_seqlens_kv=cu, **options)
    return tuple(zip(oracle(q, k_pages, v_pages, table, lengths, **options), low, strict=True))


def within_budget(got: Any, expected: tuple[tuple[Any, Any], ...], dtype: Any) -> None:
    (o, lse), (of_o, of_lse) = got, expected
    assert o.dtype == np.dtype(dtype)
    assert lse.dtype == np.float32
    assert check_budget("o", o, *of_o, dtype) <= CEILING[np.dtype(dtype).name]
    check_budget("lse", lse, *of_lse, np.float32)


def same_bits(got: Any, expected: Any) -> bool:
    return got.dtype == expected.dtype and bool(
        np.array_equal(got.view(f"u{got.itemsize}"), expected.view(f"u{got.itemsize}"))
    )


def assert_same(got: Any, expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        assert same_bits(x, y)


def named(name: str) -> PagedCase:
    return next(case for case in CASES if case.name == name)


def check(case: PagedCase, dtype: Any, target: str = "trn2") -> None:
    *args, options = case.inputs(dtype)
    got = paged_decode.paged_decode(*args, return_lse=True, target=target, **options, **case.launch(target))
    within_budget(got, references(args, options), dtype)


@by_case_dtype_and_target(CASES)
def test_matches_the_oracle(case: PagedCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


def visible(case: PagedCase) -> list[list[int]]:
    """Keys of each sequence that one of its new tokens sees, by the definition."""
    s, left = case.flat.s, case.flat.window
    found = []
    for length in case.flat.lengths:
        seen = set()
        for p in range(length - s, length):
            seen |= {j for j in range(length) if j <= p and (left is None or j >= p - left)}
        found.append(sorted(seen))
    return found


@by_case
def test_what_no_query_sees_is_nan(case: PagedCase) -> None:
    """Whole pages, rest of last pages, rows before windows; so every test of CASES shows that they are left alone."""
    _, k_pages, v_pages, table, _, _ = case.inputs(BF16)
    size, seen = case.block_size, visible(case)
    rows = {(int(table[b, j // size]), j % size) for b, keys in enumerate(seen) for j in keys}
    for pages in (k_pages, v_pages):
        numbers = np.isfinite(pages.astype(np.float32)).any(axis=(1, 3))
        assert numbers.sum() == sum(map(len, seen)) - case.shared * size
        assert set(zip(*(x.tolist() for x in np.nonzero(numbers)), strict=True)) == rows
        assert not numbers.any(axis=1).all()


class PlannedError(Exception):
    """The wrapper has come as far as its plan."""


def planned(module: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Launch:
    """What a module's wrapper would launch."""
    made, original = [], _decode_launch.launch

    def launch(*args: Any, **kwargs: Any) -> Launch:
        made.append(original(*args, **kwargs))
        raise PlannedError

    wrapper = getattr(module, module.__name__.split(".")[-1])
    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", launch)
        with pytest.raises(PlannedError):
            wrapper(*args, **options)
    return made[0]


def test_the_cases_reach_every_way_to_read_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pages per partition and several partitions per page, further items, more than one trip, splits, cores."""
    several, parts, further, trips, splits, cores = (set[str]() for _ in range(6))
    for case in CASES:
        *args, options = case.inputs(BF16)
        made = planned(paged_decode, monkeypatch, *args, **options, **case.launch("trn2"))
        g, bounds = made.geometry, made.plan.bounds
        for names, reached in (
            (several, g.granules > 1),
            (parts, 1 < g.tokens < case.block_size),
            (further, bool((bounds[..., 1] > bounds[..., 0]).any())),
            (trips, bounds.shape[1] > 1),
            (splits, g.n_splits > 1),
            (cores, g.n_cores > 1),
        ):
            names |= {case.name} if reached else set()
    windows = {case.name for case in CASES if case.flat.window is not None}
    sizes_of_two = {case.name for case in CASES if case.block_size & (case.block_size - 1) == 0}
    for names in (several & windows, parts & windows, several & further, parts & further, parts - sizes_of_two):
        assert names
    for names in (trips, splits & cores, splits - cores):
        assert names


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 15, 16, 17, 100, 112, 255, 256])
def test_block_sizes(block_size: int) -> None:
    lengths = (2 * block_size + 1, block_size, block_size - 1, 0, 150)
    check(PagedCase(FlashCase("b", 4, 2, 64, lengths), block_size), BF16)


@pytest.mark.parametrize(
    ("block_size", "group", "s"), [(11, 12, 1), (11, 3, 4), (13, 40, 1), (127, 5, 1), (251, 128, 1)]
)
def test_prime_block_sizes_and_many_rows(block_size: int, group: int, s: int) -> None:
    """A partition's scores need several PSUM banks, and a prime number of keys does not fall into equal parts."""
    check(PagedCase(FlashCase("prime", group, 1, 16, (700, 30), s=s), block_size), BF16)


@pytest.mark.parametrize("head_dim", [1, 32, 80, 96, 112, 192, 256])
def test_head_dims(head_dim: int) -> None:
    check(PagedCase(FlashCase("d", 6, 2, head_dim, (150, 31)), 16), np.float16)


# No shrinking: examples are small, and a shrunk one says no more.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_shape_lengths_and_window(data: st.DataObject) -> None:
    draw = data.draw
    s = draw(st.integers(1, 5))
    lengths = tuple(draw(st.lists(st.integers(0, 200), min_size=1, max_size=4)))
    window = draw(st.none() | st.integers(0, 150))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    splits = draw(st.none() | st.integers(1, 4))
    flat = FlashCase("any", heads * group, heads, 64, lengths, s=s, window=window, n_splits=splits)
    check(PagedCase(flat, draw(st.integers(1, 40))), draw(st.sampled_from([BF16, np.float16])))


# -- pages


PERMUTED = (
    PagedCase(FlashCase("p", 4, 2, 64, (70, 0, 33, 48), s=2, window=40), 16),
    PagedCase(FlashCase("p", 8, 1, 32, (150, 97), n_splits=2), 1, shared=5),
)


@pytest.mark.parametrize("case", PERMUTED, ids=["page-16-window", "page-1-splits"])
def test_a_permutation_of_pages_changes_no_bit(case: PagedCase) -> None:
    q, k_pages, v_pages, table, lengths, options = case.inputs(BF16)
    run: Callable[..., Any] = paged_decode.paged_decode
    options = {**options, **case.launch("trn2"), "return_lse": True, "target": "trn2"}
    expected = run(q, k_pages, v_pages, table, lengths, **options)
    assert np.isfinite(expected[0].astype(np.float32)).all()

    @settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.permutations(range(len(k_pages))))
    def permuted(order: list[int]) -> None:
        """Page i moves to place[i]."""
        place = np.array(order, np.int32)
        moved = [np.empty_like(x) for x in (k_pages, v_pages)]
        for x, pages in zip(moved, (k_pages, v_pages), strict=True):
            x[place] = pages
        assert_same(run(q, *moved, np.where(table < 0, -1, place[table]), lengths, **options), expected)

    permuted()


def test_pages_before_the_window_may_be_gone() -> None:
    """Their table entries are -1, as where a stack gives such pages back."""
    case = named("nxdi-32-new-4")
    *args, options = PagedCase(replace(case.flat, window=40), case.block_size).inputs(BF16)
    q, k_pages, v_pages, table, lengths = args
    expected = paged_decode.paged_decode(*args, return_lse=True, target="trn2", **options)
    gone = table.copy()
    for b, n in enumerate(lengths):
        gone[b, : max(0, int(n) - case.flat.s - 40) // case.block_size] = -1
    got = paged_decode.paged_decode(q, k_pages, v_pages, gone, lengths, return_lse=True, target="trn2", **options)
    assert_same(got, expected)


def test_other_sequences_do_not_matter() -> None:
    """Other numbers in pages and queries of all but one sequence change no bit of its result."""
    case = named("nxdi-32-new-4")
    q, k_pages, v_pages, table, lengths, options = case.inputs(BF16)
    options = {**options, "return_lse": True, "target": "trn2"}
    expected = paged_decode.paged_decode(q, k_pages, v_pages, table, lengths, **options)
    for b in range(len(lengths)):
        own = table[b, : -(-lengths[b] // case.block_size)]
        other_q, *others = (x * BF16(-1.5) for x in (q, k_pages, v_pages))
        other_q[b] = q[b]
        for x, pages in zip(others, (k_pages, v_pages), strict=True):
            x[own] = pages[own]
        got = paged_decode.paged_decode(other_q, *others, table, lengths, **options)
        assert_same([x[b] for x in got], [x[b] for x in expected])


def test_a_shared_prefix_is_as_good_as_a_copy_of_it() -> None:
    case = named("vllm-16-prefix")
    q, k_pages, v_pages, table, lengths, options = case.inputs(BF16)
    assert (table[0, :3] == table[1, :3]).all()
    n = len(k_pages)
    copied = table.copy()
    copied[1, :3] = np.arange(n, n + 3)
    pages = [np.concatenate([x, x[table[0, :3]]]) for x in (k_pages, v_pages)]
    options = {**options, "return_lse": True, "target": "trn2"}
    expected = paged_decode.paged_decode(q, *pages, copied, lengths, **options)
    assert_same(paged_decode.paged_decode(q, k_pages, v_pages, table, lengths, **options), expected)


def traced(*args: Any, **options: Any) -> tuple[Any, Trace]:
    """What a call of the wrapper returns, and the trace of its decode kernel."""
    with recording() as traces:
        results = paged_decode.paged_decode(*args, **options)
    return results, traces["flash_decode_fwd"]


def elements(trace: Trace, name: str) -> Any:
    """Elements of an argument that DMA reads, as often as it does, sorted."""
    found = [np.zeros(0, np.int64)]
    for record in trace.records:
        for a in record.reads:
            if a.storage.name == name:
                assert record.instruction == "dma_copy"
                assert a.rows is not None
                inner = sum(np.ix_(*(np.arange(n) * x for n, x in zip(a.shape[1:], a.strides[1:], strict=True))))
                found.append((np.array(a.rows, np.int64)[:, None] + np.ravel(inner)).ravel())
    return np.sort(np.concatenate(found))


class Shown(NamedTuple):
    """What a case returns, and what it reads of K and V: elements, sorted, and bytes."""

    results: tuple[Any, Any]
    read: dict[str, Any]
    nbytes: int


@cache
def shown(case: PagedCase) -> Shown:
    """A case in bfloat16 on trn2."""
    *args, options = case.inputs(BF16)
    results, trace = traced(*args, return_lse=True, target="trn2", **options, **case.launch("trn2"))
    nbytes = sum(a.nbytes for r in trace.records for a in r.reads if a.storage.name in ("k", "v"))
    return Shown(results, {name: elements(trace, name) for name in ("k", "v")}, nbytes)


@by_case
def test_flat_decode_of_the_gathered_cache(case: PagedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are equal where both cut the keys alike: without a window, whose left side depends on the size of pages."""
    *args, options = case.inputs(BF16)
    q, k_pages, v_pages, table, lengths = args
    room = table.shape[1] * case.block_size
    flat = [np.full((len(lengths), room, *x.shape[1::2]), np.nan, x.dtype) for x in (k_pages, v_pages)]
    for x, pages in zip(flat, (k_pages, v_pages), strict=True):
        rows, cu = gather_pages(pages, table, lengths)
        for b, n in enumerate(lengths):
            x[b, :n] = rows[cu[b] : cu[b] + n]
    both = {**options, **case.launch("trn2"), "target": "trn2"}
    expected = flash_decode.flash_decode(q, *flat, seqlens_kv=lengths, return_lse=True, **both)
    if case.flat.window is not None:
        within_budget(expected, references(args, options), BF16)
        return
    assert_same(shown(case).results, expected)
    made = planned(paged_decode, monkeypatch, *args, **both)
    alike = planned(flash_decode, monkeypatch, q, *flat, seqlens_kv=lengths, **both)
    assert made.geometry.tokens == alike.geometry.tokens


# -- what is read


@by_case
def test_the_visible_rows_are_read_and_nothing_else(case: PagedCase) -> None:
    """Every element of them once per sequence, so that the bytes of K and V are those of the visible keys."""
    _, pages, _, table, _, _ = case.inputs(BF16)
    place = np.arange(pages.size).reshape(pages.shape)
    expected = [
        place[table[b, j // case.block_size], :, j % case.block_size].ravel()
        for b, keys in enumerate(visible(case))
        for j in keys
    ]
    for name in ("k", "v"):
        np.testing.assert_array_equal(shown(case).read[name], np.sort(np.concatenate(expected)))
    row_bytes = case.flat.head_dim * pages.itemsize
    assert shown(case).nbytes == 2 * sum(map(len, visible(case))) * case.flat.n_kv_heads * row_bytes


@by_target
def test_an_empty_batch_reads_nothing(target: str) -> None:
    """Two sequences without keys: nothing of the pages, and no table to look at."""
    q, pages = np.ones((2, 4, 64), BF16), np.full((1, 2, 16, 64), np.nan, BF16)
    for table in (np.zeros((2, 0), np.int32), np.full((2, 3), -1, np.int32)):
        call = (q, pages, pages, table, np.zeros(2, np.int32))
        (o, lse), trace = traced(*call, return_lse=True, target=target)
        assert elements(trace, "k").size == elements(trace, "v").size == 0
        assert not o.astype(np.float32).any()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize("entry", [-(2**31), -2, 7, 2**31 - 1])
def test_entries_past_a_sequences_keys_may_be_anything(entry: int) -> None:
    q, k_pages, v_pages, table, lengths, _ = named("vllm-16-llama-3-8b").inputs(BF16)
    expected = paged_decode.paged_decode(q, k_pages, v_pages, table, lengths, return_lse=True, target="trn2")
    needed = -(-lengths // 16)
    assert needed.tolist() == [7, 0, 2]
    for b, n in enumerate(needed):
        table[b, n:] = entry
    assert_same(
        paged_decode.paged_decode(q, k_pages, v_pages, table, lengths, return_lse=True, target="trn2"), expected
    )


# -- a decoder's steps


@pytest.mark.parametrize(("target", "float8"), [("trn1", True), ("trn2", False), ("trn2", True), ("trn3", False)])
def test_append_then_decode(float8: bool, target: str) -> None:
    """Three steps of three slots: one crosses into a new page, one begins empty, one is inactive."""
    rng = np.random.default_rng(5)
    batch, heads, size, d = 3, 2, 16, 64
    scales = {"k_scale": 0.5, "v_scale": np.array([2.0, 0.25], np.float32)} if float8 else {}
    pages = [np.full((7, heads, size, d), np.nan, F8 if float8 else BF16) for _ in "kv"]
    table = np.array([[5, -1, -1], [-1, -1, -1], [2, 0, -1]], np.int32)
    free = [3, 6]
    lengths, active = np.array([15, 0, 20], np.int32), np.array([True, True, False])
    for x in pages:
        x[5, :, :15], x[2], x[0, :, :4] = (rng.standard_normal((heads, n, d)) for n in (15, size, 4))
    for _ in range(3):
        for b in np.flatnonzero(active):
            if lengths[b] % size == 0 or table[b, lengths[b] // size] < 0:
                table[b, lengths[b] // size] = free.pop()
        new = [rng.standard_normal((batch, 1, heads, d)).astype(BF16) for _ in "kv"]
        positions = np.where(active, lengths, -1).astype(np.int32)
        # Scales are powers of two: x / scale is exact.
        stored = new
        if float8:
            factors = (np.full(heads, scales["k_scale"]), scales["v_scale"])
            stored = [(np.float64(x) / f[:, None]).astype(F8) for x, f in zip(new, factors, strict=True)]
        expected = append_oracle.append_kv_paged(*pages, *stored, table, positions)
        append_kv_paged(*pages, *new, table, positions, target=target, **scales)
        assert_same(pages, expected)
        lengths = lengths + active.astype(np.int32)
        q = rng.standard_normal((batch, 8, d)).astype(BF16)
        got = paged_decode.paged_decode(q, *pages, table, lengths, return_lse=True, target=target, **scales)
        within_budget(got, references((q, *expected, table, lengths), scales), BF16)
    assert lengths.tolist() == [18, 3, 20]
    assert not free


# -- arguments


def test_inputs_stay_and_results_land_where_they_are_wanted() -> None:
    *args, options = named("page-80-options").inputs(BF16)
    options = {**options, "target": "trn2"}
    before = [x.copy() for x in args]
    expected = paged_decode.paged_decode(*args, return_lse=True, **options)
    out, lse = np.full(args[0].shape, np.nan, BF16), np.full(args[0].shape[:-1], np.nan, np.float32)
    assert paged_decode.paged_decode(*args, out=out, lse=lse, **options) is out
    assert_same((out, lse), expected)
    out[...], lse[...] = np.nan, np.nan
    returned = paged_decode.paged_decode(*args, out=out, lse=lse, return_lse=True, **options)
    assert returned[0] is out
    assert returned[1] is lse
    assert_same((out, lse), expected)
    o = paged_decode.paged_decode(*args, **options)
    assert same_bits(o, expected[0])
    assert_same(args, before)


def test_pages_may_be_views_and_tables_of_other_integers() -> None:
    """K and V interleaved in one array with the heads after the rows, as some stacks hold them."""
    q, k_pages, v_pages, table, lengths, _ = named("nxdi-32-llama-3-70b").inputs(BF16)
    expected = paged_decode.paged_decode(q, k_pages, v_pages, table, lengths, target="trn2")
    kv = np.stack([k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)], axis=1)
    views = kv[:, 0].swapaxes(1, 2), kv[:, 1].swapaxes(1, 2)
    assert not views[0].flags.c_contiguous
    for kind in (np.int64, np.uint32):
        got = paged_decode.paged_decode(q, *views, table.astype(kind), lengths.astype(kind), target="trn2")
        assert same_bits(got, expected)


Q, PAGES = np.zeros((2, 4, 64), BF16), np.zeros((6, 2, 16, 64), BF16)
TABLE, LENGTHS = np.array([[0, 3, -1], [5, -1, -1]], np.int32), np.array([20, 16], np.int32)
GOOD = {"q": Q, "k_pages": PAGES, "v_pages": PAGES.copy(), "block_table": TABLE, "seqlens_kv": LENGTHS}
READ_ONLY = np.zeros(Q.shape, BF16)
READ_ONLY.flags.writeable = False


def i32(*values: Any) -> Any:
    return np.array(values, np.int32)


def both(x: Any) -> dict[str, Any]:
    return {"k_pages": x, "v_pages": x}


def wide(shape: tuple[int, ...]) -> Any:
    """An array of any size that has one element."""
    return np.broadcast_to(np.zeros((1,) * len(shape), BF16), shape)


BAD = [
    ({"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, n_q_heads, d\]"),
    ({"q": Q[0]}, ValueError, r"q shape: received \[4, 64\], allowed \[batch, n_q_heads, d\] or \[batch, s, n_q_heads"),
    ({"q": Q[:0]}, ValueError, r"q shape: received \[0, 4, 64\], allowed .*each at least 1"),
    ({"q": Q.astype(np.float64)}, TypeError, "q dtype: received float64, allowed float32, bfloat16, float16"),
    ({"q": Q.astype(F8)}, TypeError, "q dtype: received float8_e4m3, allowed float32, bfloat16, float16"),
    ({"q": wide((2, 4, 193))}, ValueError, r"head_dim: received 193, allowed 1\.\.128, or even to 256"),
    ({"q": wide((2, 4, 258))}, ValueError, r"head_dim: received 258, allowed 1\.\.128, or even to 256"),
    ({"q": Q[:, :3]}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
    ({"q": wide((2, 258, 64))}, ValueError, r"s \* n_q_heads / n_kv_heads: received 129, allowed 1\.\.128"),
    ({"q": wide((2, 43, 6, 64))}, ValueError, r"s \* n_q_heads / n_kv_heads: received 129, allowed 1\.\.128"),
    ({"k_pages": PAGES.tolist()}, TypeError, "k_pages: received list, allowed a NumPy array"),
    ({"v_pages": None}, TypeError, "v_pages: received NoneType, allowed a NumPy array"),
    ({"k_pages": PAGES.astype(np.float32)}, TypeError,
     "k_pages dtype: received float32, allowed bfloat16 or float8_e4m3"),
    ({"q": Q.astype(np.float32), **both(PAGES.astype(F8))}, TypeError,
     "k_pages dtype: received float8_e4m3, allowed float32"),
    ({"v_pages": PAGES.astype(F8)}, TypeError,
     "v_pages dtype: received float8_e4m3, allowed bfloat16, that of k_pages"),
    (both(PAGES[0]), ValueError,
     r"k_pages shape: received \[2, 16, 64\], allowed \[n_blocks, n_kv_heads, block_size, 64\]"),
    (both(PAGES[..., :32]), ValueError, r"k_pages shape: received \[6, 2, 16, 32\], allowed .*block_size, 64\]"),
    (both(PAGES[:0]), ValueError, r"k_pages shape: received \[0, 2, 16, 64\], allowed \[n_blocks, n_kv_heads"),
    (both(PAGES[:, :0]), ValueError, r"k_pages shape: received \[6, 0, 16, 64\], allowed \[n_blocks, n_kv_heads"),
    ({"v_pages": PAGES[:5]}, ValueError,
     r"v_pages shape: received \[5, 2, 16, 64\], allowed \[6, 2, 16, 64\], that of k_pages"),
    ({"v_pages": PAGES[..., :32]}, ValueError, r"v_pages shape: received \[6, 2, 16, 32\], allowed \[6, 2, 16, 64\]"),
    (both(wide((6, 2, 257, 64))), ValueError, r"block_size: received 257, allowed 1\.\.256"),
    (both(wide((2**23, 2, 128, 64))), ValueError, "k_pages rows: received 2147483648, allowed at most 2147483647"),
    ({"block_table": TABLE.tolist()}, TypeError,
     r"block_table: received list, allowed an integer array \[2, max_blocks\]"),
    ({"block_table": TABLE.astype(np.float32)}, TypeError, "block_table: received float32, allowed an integer array"),
    ({"block_table": TABLE > 0}, TypeError, "block_table: received bool, allowed an integer array"),
    ({"block_table": TABLE[0]}, ValueError, r"block_table shape: received \[3\], allowed \[2, max_blocks\]"),
    ({"block_table": TABLE[:1]}, ValueError, r"block_table shape: received \[1, 3\], allowed \[2, max_blocks\]"),
    ({"block_table": i32([0, 6, -1], [5, -1, -1])}, ValueError,
     r"block_table\[0\]: received \[0, 6\], allowed pages 0\.\.5 for keys 0\.\.19 of sequence 0"),
    ({"block_table": i32([0, 3, -1], [-1, 5, 5])}, ValueError,
     r"block_table\[1\]: received \[-1\], allowed pages 0\.\.5 for keys 0\.\.15 of sequence 1"),
    ({"block_table": np.array([[0, 2**64 - 1], [5, 0]], np.uint64)}, ValueError, r"block_table\[0\]: received \[0, "),
    ({"block_table": TABLE[:, :0]}, ValueError, r"seqlens_kv\[0\]: received 20, allowed 0\.\.0"),
    ({"seqlens_kv": [20, 16]}, TypeError, r"seqlens_kv: received list, allowed an integer array \[2\]"),
    ({"seqlens_kv": None}, TypeError, r"seqlens_kv: received NoneType, allowed an integer array \[2\]"),
    ({"seqlens_kv": LENGTHS.astype(np.float32)}, TypeError, "seqlens_kv: received float32, allowed an integer array"),
    ({"seqlens_kv": LENGTHS[:1]}, ValueError, r"seqlens_kv shape: received \[1\], allowed \[2\]"),
    ({"seqlens_kv": i32(20, 49)}, ValueError, r"seqlens_kv\[1\]: received 49, allowed 0\.\.48"),
    ({"seqlens_kv": i32(-1, 16)}, ValueError, r"seqlens_kv\[0\]: received -1, allowed 0\.\.48"),
    ({"seqlens_kv": i32(20, 17)}, ValueError, r"block_table\[1\]: received \[5, -1\], allowed pages 0\.\.5"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
    ({"window_size": 5}, ValueError, r"window_size: received 5, allowed \(left, right\), each None or >= 0"),
    ({"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed \(left, right\)"),
    ({"window_size": (3, 1.5)}, ValueError, r"window_size: received \(3, 1.5\), allowed \(left, right\)"),
    ({"n_splits": 0}, ValueError, r"n_splits: received 0, allowed 1\.\.64"),
    ({"n_splits": 65}, ValueError, r"n_splits: received 65, allowed 1\.\.64"),
    ({"n_splits": 2.0}, ValueError, r"n_splits: received 2.0, allowed 1\.\.64"),
    ({"n_splits": True}, ValueError, r"n_splits: received True, allowed 1\.\.64"),
    ({"n_cores": 3}, ValueError, r"n_cores: received 3, allowed 1\.\.2"),
    ({"n_cores": None}, ValueError, r"n_cores: received None, allowed 1\.\.2"),
    ({"return_lse": 1}, TypeError, "return_lse: received 1, allowed True or False"),
    ({"softcap": 0.0}, ValueError, "softcap: received 0.0, allowed 1e-30"),
    ({"softcap": "50"}, ValueError, "softcap: received 50, allowed 1e-30"),
    ({"sinks": np.zeros(3)}, ValueError, r"sinks shape: received \[3\], allowed \[4\], one per query head"),
    ({"sinks": ["a"] * 4}, TypeError, r"sinks: received <U1, allowed numbers \[4\]"),
    ({"sinks": [0, 0, 0, np.inf]}, ValueError, r"sinks: received \[0.0, 0.0, 0.0, inf\], allowed finite numbers"),
    ({"alibi_slopes": np.zeros((2, 4))}, ValueError, r"alibi_slopes shape: received \[2, 4\], allowed \[4\]"),
    ({"alibi_slopes": [0, 0, 0, np.nan]}, ValueError, "alibi_slopes: received .*allowed finite numbers"),
    ({"k_scale": 0.0}, ValueError, "k_scale: received 0.0, allowed positive finite numbers"),
    ({"k_scale": np.ones(4)}, ValueError, r"k_scale shape: received \[4\], allowed a number, or \[2\], one per KV"),
    ({"v_scale": np.inf}, ValueError, "v_scale: received inf, allowed positive finite numbers"),
    ({"v_scale": "1"}, TypeError, r"v_scale: received <U1, allowed a number"),
    ({"out": Q.tolist()}, TypeError, "out: received list, allowed a NumPy array or None"),
    ({"out": Q[:, :2]}, ValueError, r"out shape: received \[2, 2, 64\], allowed \[2, 4, 64\]"),
    ({"out": Q.astype(np.float32)}, TypeError, "out dtype: received float32, allowed bfloat16"),
    ({"out": READ_ONLY}, ValueError, "out: received a read-only array, allowed a writeable one"),
    ({"lse": np.zeros((2, 4), BF16)}, TypeError, "lse dtype: received bfloat16, allowed float32"),
    ({"lse": np.zeros((2, 4, 1), np.float32)}, ValueError, r"lse shape: received \[2, 4, 1\], allowed \[2, 4\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_bad_input_is_named(
    change: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing has run or changed."""

    def simulate_kernel(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel runs")

    monkeypatch.setattr(_decode_launch, "simulate_kernel", simulate_kernel)
    refused({"target": "trn2", **change}, error, text)


def refused(change: dict[str, Any], error: type[Exception], text: str) -> None:
    """The call raises, and `out` and `lse` are as before."""
    results = {"out": np.full(Q.shape, 7, BF16), "lse": np.full(Q.shape[:-1], 7, np.float32)}
    with pytest.raises(error, match=text):
        paged_decode.paged_decode(**{**GOOD, **results, **change})
    for x in results.values():
        assert (x == 7).all()


def test_the_arguments_above_are_right_without_the_change() -> None:
    o = paged_decode.paged_decode(**GOOD, out=np.ones(Q.shape, BF16), lse=np.ones((2, 4), np.float32), target="trn2")
    assert not o.astype(np.float32).any()


def test_a_target_that_is_not_there_is_named() -> None:
    refused({"target": "h100"}, ValueError, "target: received 'h100', allowed trn1")


@pytest.mark.parametrize("target", ["trn1", "inf2"])
def test_two_cores_need_a_generation_that_pairs_them(target: str) -> None:
    refused({"target": target, "n_cores": 2}, ValueError, rf"n_cores: received 2, allowed 1 on {target}")


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: PagedCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()

    def on_device(kernel: Any, *args: Any, target: str | None) -> Any:
        result = run_on_device(kernel, *args)
        return tuple(map(np.asarray, result)) if isinstance(result, tuple) else np.asarray(result)

    monkeypatch.setattr(_decode_launch, "simulate_kernel", on_device)
    *args, options = case.inputs(dtype)
    got = paged_decode.paged_decode(*args, return_lse=True, **options, **case.launch(None))
    within_budget(got, references(args, options), dtype)
