"""What holds for every input of the prefill forward: equalities between calls, most of them bit for bit.

Where calls have the same tiles, the simulator's products have the same shapes, and the same sums in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Geometry
from contributed.flash_attention_fwd import flash_attention_fwd
from reference.budget import budget, check_budget
from reference.flash_attention import flash_attention as oracle
from reference.rounded_attention import flash_attention_rounded
from tests.kernels.flash import BF16, CEILING, DTYPES, by_dtype, by_target
from tests.kernels.prefill import Array, assert_same_bits, check, normal, reference, traced

F16 = DTYPES[2]
by_bad = pytest.mark.parametrize(("bad", "target"), [(np.nan, "trn1"), (np.nan, "trn2"), (np.inf, "trn3")])


def run(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """o and lse."""
    o, lse = flash_attention_fwd(q, k, v, return_lse=True, **({"target": "trn2"} | options))
    return o, lse


def cu(*lengths: int) -> Array:
    return np.cumsum([0, *lengths]).astype(np.int32)


# -- any call

# The numbers of queries and keys are around the edges of tiles, and beside each other in any way.
lengths_of = st.lists(
    st.tuples(st.sampled_from([0, 1, 5, 127, 128, 129, 200, 257]), st.sampled_from([0, 1, 64, 128, 130, 300, 513])),
    min_size=1,
    max_size=3,
)
sides = st.sampled_from([None, 0, 1, 100, 128, 200])


@st.composite
def cases(draw: st.DrawFn) -> PrefillCase:
    n_kv_heads = draw(st.sampled_from([1, 2]))
    m = draw(st.sampled_from([4, 4, 8]))
    sparse = draw(st.booleans())
    return PrefillCase(
        "any",
        n_kv_heads * draw(st.sampled_from([1, 2, 3])),
        n_kv_heads,
        draw(st.sampled_from([16, 40, 64, 130])),
        tuple(draw(lengths_of)),
        causal=draw(st.booleans()),
        left=draw(sides),
        right=draw(sides),
        sparsity_n=draw(st.integers(1, m - 1)) if sparse else 0,
        sparsity_m=m,
        sink=draw(st.sampled_from([0, 3, 128])) if sparse else 0,
        recent=draw(st.sampled_from([0, 1, 64, 150])) if sparse else 0,
        unused=draw(st.sampled_from([0, 3])),
        grid=sparse,
        seed=draw(st.integers(0, 99)),
    )


# No shrinking: examples are small, and a shrunk one says no more.
few = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@few
@given(
    cases(),
    st.sampled_from(DTYPES[1:]),
    st.sampled_from(["trn1", "trn2", "trn3"]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([None, (1, 1), (2, 3), (4, 1)]),
)
def test_any_call(case: PrefillCase, dtype: Any, target: str, n_splits: int | None, sizes: Any) -> None:
    """Against the oracle; now and then with blocks and chunks other than those that the shapes would give."""
    r = reference(case, dtype)
    if not r.q.size:
        return
    if sizes is None or case.sparsity_n:
        o, lse = run(r.q, r.k, r.v, target=target, n_splits=n_splits, **r.options)
    else:
        geometry = Geometry(1, *sizes, overhang=2 if case.causal or case.right == 0 else 0, n_splits=n_splits or 1)
        (o, lse), _ = traced(r.q, r.k, r.v, return_lse=True, target=target, geometry=geometry, **r.options)
    assert check_budget("o", o, r.exact.o, r.low[0], dtype) <= CEILING[dtype.name]
    # A row of one key has no luck to make a budget of: scores of order 1 to 10, in float32.
    np.testing.assert_allclose(lse, r.exact.lse, rtol=2e-6, atol=2e-6)


# -- single keys

NEEDLES = (0, 127, 128, 1023, 1024, 1151, 1152, 1199, 1200, 1201, 1279, 1280, 1398, 1399)


@pytest.mark.parametrize(("left", "target"), [(None, "trn1"), (None, "trn2"), (150, "trn3")])
def test_a_huge_score_is_seen_from_its_position_on(left: int | None, target: str) -> None:
    """Every head has it at a position of its own, with queries at 1200 to 1399: who sees it has its value alone."""
    n, before = len(NEEDLES), 1200
    q, k, v = normal(1, 200, n, 32, seed=1), normal(1, 1400, n, 32, seed=2), normal(1, 1400, n, 32, seed=3)
    q[..., 0] = 8.0
    plain = run(q, k, v, window_size=(left, None), target=target)
    for head, position in enumerate(NEEDLES):
        k[0, position, head, 0] = 256.0
    o, lse = run(q, k, v, window_size=(left, None), target=target)
    for head, position in enumerate(NEEDLES):
        rows = np.arange(before, before + 200)
        sees = (position <= rows) & (position >= rows - (1400 if left is None else left))
        expected = np.broadcast_to(v[0, position, head], (sees.sum(), 32))
        assert_same_bits((o[0, sees, head],), (expected,))
        assert (lse[0, sees, head] > 200).all()
        assert_same_bits((o[0, ~sees, head], lse[0, ~sees, head]), [x[0, ~sees, head] for x in plain])


@by_target
def test_a_huge_score_is_seen_up_to_the_right_side_of_a_window(target: str) -> None:
    """A query sees 130 keys after its own position, beyond the next edge of a tile."""
    positions = (0, 127, 128, 129, 130, 255, 256, 399)
    n = len(positions)
    q, k, v = normal(1, 300, n, 16, seed=1), normal(1, 400, n, 16, seed=2), normal(1, 400, n, 16, seed=3)
    q[..., 0] = 8.0
    for head, position in enumerate(positions):
        k[0, position, head, 0] = 256.0
    o, _ = run(q, k, v, causal=False, window_size=(None, 130), target=target)
    for head, position in enumerate(positions):
        sees = position <= np.arange(100, 400) + 130
        alone = (o[0, :, head] == v[0, position, head]).all(axis=-1)
        np.testing.assert_array_equal(alone, sees)


@by_dtype
def test_one_visible_key_is_its_value(dtype: Any) -> None:
    """A window of nothing but the query's own position."""
    q, k, v = (normal(1, n, 2, 64, dtype=dtype, seed=n) for n in (200, 390, 390))
    o, lse = run(q, k, v, window_size=(0, 0), softmax_scale=0.5)
    assert_same_bits((o,), (v[:, 190:],))
    exact = 0.5 * (q.astype(np.float64) * k[:, 190:]).sum(axis=-1)
    np.testing.assert_allclose(lse, exact, rtol=1e-5, atol=1e-5)


# -- what must not be read into a result


@by_bad
def test_rows_of_no_sequence_may_hold_anything(bad: float, target: str) -> None:
    for options in ({}, {"sparsity_n": 2}, {"causal": False, "skip_softmax_threshold": 0.5}):
        q, k, v = normal(3 + 150, 2, 32), normal(5 + 230, 1, 32), normal(5 + 230, 1, 32, seed=1)
        how = {"cu_seqlens_q": 2 + cu(33, 117), "cu_seqlens_kv": 3 + cu(70, 160), "target": target} | options
        clean = run(q, k, v, **how)
        for x, first, end in ((q, 2, 152), (k, 3, 233), (v, 3, 233)):
            x[:first] = x[end:] = bad
        got = run(q, k, v, **how)
        assert_same_bits(got, clean)
        assert (got[0][[0, 1, 152]] == 0).all()
        assert (got[1][[0, 1, 152]] == -np.inf).all()
        assert np.isfinite(got[1][2:152]).all()


@by_bad
def test_other_sequences_may_hold_anything(bad: float, target: str) -> None:
    """NaN among the keys and values of a sequence stays with it."""
    lengths = ((130, 200), (5, 129), (64, 64), (1, 300))
    q, k, v = normal(200, 2, 32), normal(693, 1, 32), normal(693, 1, 32, seed=1)
    ends_q, ends_kv = (cu(*(n[i] for n in lengths)) for i in (0, 1))
    every = [{}, {"sparsity_n": 2}, {"n_splits": 2}, {"causal": False}, {"skip_softmax_threshold": 0.5}]
    for options in every[::2] if target == "trn1" else every[1:4]:
        how = {"cu_seqlens_q": ends_q, "cu_seqlens_kv": ends_kv, "target": target} | options
        clean = run(q, k, v, **how)
        for good in (0, 1):
            of_q, of_kv = (np.repeat(np.arange(4) % 2, np.diff(ends)) == good for ends in (ends_q, ends_kv))
            got = run(q, *(np.where(of_kv[:, None, None], x, x.dtype.type(bad)) for x in (k, v)), **how)
            assert_same_bits([x[of_q] for x in got], [x[of_q] for x in clean])


@by_target
@pytest.mark.parametrize("before", [0, 100, 1000, 1024])
def test_tiles_past_the_diagonal_may_hold_anything(before: int, target: str) -> None:
    """Rows that see nothing of a tile, and of no tile after it, do not notice NaN there."""
    q, k, v = normal(1, 300, 1, 32), normal(1, before + 300, 1, 32), normal(1, before + 300, 1, 32, seed=1)
    clean = run(q, k, v, target=target)
    for row_tile in range(2):
        last = before + row_tile * 128 + 127
        k[:, (last // 128 + 1) * 128 :] = v[:, (last // 128 + 1) * 128 :] = np.nan
        if row_tile == 0:
            got = run(q, k, v, target=target)
            assert_same_bits([x[:, :128] for x in got], [x[:, :128] for x in clean])
            assert np.isnan(got[0][:, 256:]).all()
            k, v = (normal(1, before + 300, 1, 32, seed=seed) for seed in (0, 1))
        else:
            got = run(q, k, v, target=target)
            assert_same_bits([x[:, :256] for x in got], [x[:, :256] for x in clean])


@by_target
@pytest.mark.parametrize("n_splits", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_outside_of_windows_may_hold_anything(causal: bool, n_splits: int, target: str) -> None:
    """The first query, at 1300, sees keys from 1100 on: what is before their tile is not read."""
    q, k, v = normal(1, 100, 2, 32), normal(1, 1400, 1, 32), normal(1, 1400, 1, 32, seed=1)
    how = {"causal": causal, "window_size": (200, 20), "n_splits": n_splits, "target": target}
    clean = run(q, k, v, **how)
    k[:, :1024] = v[:, :1024] = np.nan
    assert_same_bits(run(q, k, v, **how), clean)


def test_results_are_written_by_this_call() -> None:
    """Rows that see nothing are 0 and -inf, whatever was in memory; the others are finite."""
    q, k = normal(1, 300, 2, 64), normal(1, 77, 1, 64)
    out, lse = np.full(q.shape, np.nan, BF16), np.full(q.shape[:3], np.nan, np.float32)
    flash_attention_fwd(q, k, k, out=out, lse=lse, target="trn2")
    assert (out[:, : 300 - 77] == 0).all()
    assert (lse[:, : 300 - 77] == -np.inf).all()
    assert np.isfinite(lse[:, 300 - 77 :]).all()


@by_target
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_blocks_begin_with_outputs_of_0(threshold: float | None, target: str) -> None:
    """Rows of a second sequence that see nothing, where the first one has outputs that were finished early."""
    q, k = normal(1, 1200, 4, 16)[0], normal(1, 1100, 1, 16)[0]
    ends = {"cu_seqlens_q": np.array([0, 600, 1200]), "cu_seqlens_kv": np.array([0, 600, 1100])}
    o, lse = run(q, k, k, skip_softmax_threshold=threshold, target=target, **ends)
    assert (o[600:700] == 0).all()
    assert (lse[600:700] == -np.inf).all()


# -- batches and layouts

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window_size": (90, None)},
    {"sparsity_n": 2},
    {"skip_softmax_threshold": 0.7},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=["causal", "encoder", "window", "2-of-4", "skip"])


@by_options
def test_sequences_in_another_order(options: dict[str, Any]) -> None:
    """The same bits, and the same tiles."""
    lengths = [(130, 200), (5, 17), (0, 40), (257, 257), (64, 300), (1, 1)]
    parts = [[normal(n, heads, 32, seed=i) for n, heads in ((q, 2), (kv, 1), (kv, 1))] for i, (q, kv) in
             enumerate(lengths)]  # fmt: skip

    def call(order: list[int]) -> tuple[list[Array], list[Array], Any]:
        q, k, v = (np.concatenate([parts[b][i] for b in order]) for i in range(3))
        ends = [cu(*(lengths[b][i] for b in order)) for i in (0, 1)]
        how = {"cu_seqlens_q": ends[0], "cu_seqlens_kv": ends[1], "return_lse": True, "return_stats": True}
        o, lse, stats = flash_attention_fwd(q, k, v, target="trn2", **how, **options)
        return np.split(o, ends[0][1:-1]), np.split(lse, ends[0][1:-1]), stats

    first = call([0, 1, 2, 3, 4, 5])
    order = [4, 2, 5, 0, 3, 1]
    moved = call(order)
    for i, b in enumerate(order):
        assert_same_bits((moved[0][i], moved[1][i]), (first[0][b], first[1][b]))
        np.testing.assert_array_equal(moved[2].kept[i], first[2].kept[b])
        np.testing.assert_array_equal(moved[2].tiles_skipped[i], first[2].tiles_skipped[b])


@by_options
def test_batched_equals_packed(options: dict[str, Any]) -> None:
    q, k, v = normal(2, 140, 2, 32), normal(2, 270, 1, 32), normal(2, 270, 1, 32, seed=1)
    batched = run(q, k, v, **options)
    packed = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    got = run(*packed, cu_seqlens_q=cu(140, 140), cu_seqlens_kv=cu(270, 270), **options)
    assert_same_bits(got, [x.reshape(-1, *x.shape[2:]) for x in batched])


@by_options
def test_grouped_queries_equal_repeated_heads(options: dict[str, Any]) -> None:
    """Both within the budget of one oracle, whose result is the same."""
    case = PrefillCase("gqa", 6, 2, 32, ((140, 270),), batched=True, grid="sparsity_n" in options)
    q, k, v, _ = case.inputs(F16)
    options = options | {"dense_recent_tokens": 10}
    exact, low = oracle(q, k, v, **options), flash_attention_rounded(q, k, v, **options)
    for keys, values in ((k, v), (np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2))):
        np.testing.assert_allclose(oracle(q, keys, values, **options).o, exact.o, atol=1e-12)
        o, lse = run(q, keys, values, **options)
        assert check_budget("o", o, exact.o, low[0], F16) <= 0.5
        check_budget("lse", lse, exact.lse, low[1], np.float32)


def test_heads_in_another_order() -> None:
    """KV heads with their query heads: the results move with them."""
    q, k, v = normal(1, 140, 6, 32), normal(1, 270, 3, 32), normal(1, 270, 3, 32, seed=1)
    o, lse = run(q, k, v)
    moved = run(q[:, :, [4, 5, 0, 1, 2, 3]], k[:, :, [2, 0, 1]], v[:, :, [2, 0, 1]])
    assert_same_bits(moved, (o[:, :, [4, 5, 0, 1, 2, 3]], lse[:, :, [4, 5, 0, 1, 2, 3]]))


@by_dtype
@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2, "grid": True, "left": 130, "recent": 5}])
def test_chunked_prefill_equals_one_call(options: dict[str, Any], dtype: Any) -> None:
    """Later rows alone, with all keys before them: other tiles and another order of sums, the same result."""
    whole = reference(PrefillCase("whole", 4, 2, 32, ((290, 290),), batched=True, **options), dtype)
    o, lse = run(whole.q, whole.k, whole.v, **whole.options)
    for first in (128, 150):
        late = slice(first, None)
        got = run(whole.q[:, late], whole.k, whole.v, **whole.options)
        for x, one, exact, low in zip(got, (o, lse), (whole.exact.o, whole.exact.lse), whole.low, strict=True):
            kind = dtype if x.ndim == 4 else np.float32
            assert check_budget("late", x, exact[:, late], low[:, :, late], kind) <= 1.0
            apart = np.abs(x.astype(np.float64) - one[:, late].astype(np.float64))
            bound = 2 * budget(exact, low, kind)[:, late]
            assert (apart.max(axis=-1) <= bound).all()


# -- launches


@by_options
def test_two_cores_equal_one(options: dict[str, Any]) -> None:
    """However blocks are shared out; with a threshold one core is allowed."""
    if "skip_softmax_threshold" in options:
        return
    for n_kv_heads in (2, 3):
        q, k, v = (normal(1, n, n_kv_heads, 32, seed=n) for n in (130, 270, 271))
        how = {"target": ("trn2", "trn3")[n_kv_heads % 2], "n_splits": 1} | options
        assert_same_bits(run(q, k, v[:, :270], n_cores=2, **how), run(q, k, v[:, :270], **how))
    one = run(q, k, v[:, :270], n_splits=2, **options)
    assert_same_bits(run(q, k, v[:, :270], n_splits=2, n_cores=2, **options), one)


@pytest.mark.parametrize("m", [0, 4])
def test_blocks_of_another_size_on_the_other_core(m: int) -> None:
    """One core's loop has a chunk and the other's has none, so that it gets one of no keys, with NaN in its rows."""
    q, k, v = (normal(3 + 256, 1, 32, seed=i) for i in range(3))
    for x in (q, k, v):
        x[:3] = np.nan
    ends = {"cu_seqlens_q": 3 + cu(256), "cu_seqlens_kv": 3 + cu(256)}
    how = {"return_lse": True, "sparsity_n": m // 2, "dense_recent_tokens": 0} | ends
    one, two = (Geometry(1, 1, 1, 1, planes=max(1, m), n_cores=n) for n in (1, 2))
    got, (run_of,) = traced(q, k, v, geometry=two, **how)
    assert np.diff(run_of.arguments["bounds"][..., :2]).ravel().tolist() == [1, 1]
    assert_same_bits(got, traced(q, k, v, geometry=one, **how)[0])
    assert np.isfinite(got[1][3:]).all()


def test_two_runs_are_equal_and_leave_their_inputs() -> None:
    q, k, v = normal(1, 130, 2, 32), normal(1, 1300, 1, 32), normal(1, 1300, 1, 32, seed=1)
    before = [x.copy() for x in (q, k, v)]
    first = run(q, k, v, n_splits=2)
    assert_same_bits(run(q, k, v, n_splits=2), first)
    assert_same_bits((q, k, v), before)


# -- what is off costs nothing

OFF: list[dict[str, Any]] = [
    {"sparsity_n": 0},
    {"sparsity_n": None},
    {"sparsity_n": 4},
    {"sparsity_n": 8, "sparsity_m": 8},
    {"sparsity_n": 0, "sparsity_m": 8, "dense_sink_tokens": 9, "dense_recent_tokens": 300},
    {"skip_softmax_threshold": 0},
    {"skip_softmax_threshold": 0.0, "sparsity_n": 4, "dense_recent_tokens": 0},
    {"return_stats": True},
    {"n_splits": 1},
]


@pytest.mark.parametrize(
    ("shape", "target"), [((130, 300), "trn1"), ((130, 300), "trn2"), ((128, 1300), "trn3"), ((1, 200), "trn2")]
)
def test_what_is_off_adds_no_instruction(shape: tuple[int, int], target: str) -> None:
    """The same bits by the same instructions."""
    q, k, v = normal(1, shape[0], 2, 32), normal(1, shape[1], 1, 32), normal(1, shape[1], 1, 32, seed=1)
    plain, (dense,) = traced(q, k, v, target=target)
    for options in OFF:
        got, (run_of,) = traced(q, k, v, target=target, **options)
        assert_same_bits((got[0] if "return_stats" in options else got,), (plain,))
        assert run_of.program() == dense.program(), options
    for options in ({"skip_softmax_threshold": 1e-3}, {"return_lse": True}, {"sparsity_n": 3}):
        _, (run_of,) = traced(q, k, v, target=target, **options)
        more = len(run_of.program()) > len(dense.program())
        assert more == (options != {"sparsity_n": 3} or shape[0] > 1), options


@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2}, {"skip_softmax_threshold": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("lengths", "window"),
    [((130, 300), (299, None)), ((300, 300), (400, None)), ((300, 200), (199, None)), ((300, 200), (None, 299))],
)
def test_a_window_that_hides_nothing_is_none(
    lengths: tuple[int, int], window: tuple[int | None, int | None], options: dict[str, Any]
) -> None:
    """The same bits by the same instructions."""
    q, k, v = normal(1, lengths[0], 1, 32), normal(1, lengths[1], 1, 32), normal(1, lengths[1], 1, 32, seed=1)
    how = {"causal": window[1] is None, "return_lse": True} | options
    dense, (plain,) = traced(q, k, v, **how)
    got, (run_of,) = traced(q, k, v, window_size=window, **how)
    assert_same_bits(got, dense)
    assert run_of.program() == plain.program()


def test_a_threshold_that_skips_nothing_changes_nothing_but_rounding() -> None:
    check(PrefillCase("never", 2, 1, 32, ((130, 300), (1, 1)), threshold=1e-30))


# -- single queries stay dense under N:M


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_single_queries_stay_dense(target: str) -> None:
    """Alone as a dense call, bit for bit; beside others within the budget of a dense oracle."""
    q, k, v = normal(3, 2, 32), normal(1700, 1, 32), normal(1700, 1, 32, seed=1)
    how = {"cu_seqlens_q": cu(1, 1, 1), "cu_seqlens_kv": cu(77, 1300, 323), "target": target}
    assert_same_bits(run(q, k, v, sparsity_n=1, dense_recent_tokens=0, **how), run(q, k, v, **how))
    case = PrefillCase("some", 2, 1, 32, ((1, 77), (130, 300), (1, 1300)), sparsity_n=1, sparsity_m=8, grid=True)
    check(case, BF16, target)
    # Whole chunks of the loop, of which all rows see all keys.
    check(replace(case, lengths=((128, 640), (1, 513), (1, 577))), BF16, target)
    r = reference(case, BF16)
    o, lse = run(r.q, r.k, r.v, target=target, **r.options)
    dense = r.options | {"sparsity_n": 0}
    exact, low = oracle(r.q, r.k, r.v, **dense), flash_attention_rounded(r.q, r.k, r.v, **dense)
    for row in (0, 131):
        one = slice(row, row + 1)
        check_budget("o", o[one], exact.o[one], low[0][:, one], BF16)
        check_budget("lse", lse[one], exact.lse[one], low[1][:, one], np.float32)


# -- scales


@by_options
def test_a_power_of_two_moves_between_queries_and_scale(options: dict[str, Any]) -> None:
    q, k, v = normal(1, 140, 2, 32), normal(1, 270, 1, 32), normal(1, 270, 1, 32, seed=1)
    plain = run(q, k, v, softmax_scale=0.25, **options)
    for power in (-3, 2):
        scaled = (q.astype(np.float32) * 2.0**power).astype(BF16)
        assert_same_bits(run(scaled, k, v, softmax_scale=0.25 * 2.0**-power, **options), plain)


@by_options
@by_target
def test_a_negative_scale_is_that_of_negative_queries(options: dict[str, Any], target: str) -> None:
    q, k, v = normal(1, 140, 2, 32), normal(1, 270, 1, 32), normal(1, 270, 1, 32, seed=1)
    got = run(q, k, v, softmax_scale=-0.25, target=target, **options)
    assert_same_bits(got, run(-q, k, v, softmax_scale=0.25, target=target, **options))


@by_target
def test_a_scale_of_0_is_the_mean(target: str) -> None:
    """Of all visible values; lse is the logarithm of their number. N:M keeps the first two of every four."""
    q, k, v = (
        normal(1, 140, 2, 32, dtype=np.float32),
        *(normal(1, 270, 1, 32, dtype=np.float32, seed=i) for i in (1, 2)),
    )
    ends = 131 + np.arange(140)
    o, lse = run(q, k, v, softmax_scale=0.0, target=target)
    means = np.cumsum(v[0, :, 0].astype(np.float64), axis=0)[ends - 1] / ends[:, None]
    np.testing.assert_allclose(o[0, :, 1], means, atol=1e-5)
    np.testing.assert_allclose(lse[0, :, 0], np.log(ends), rtol=1e-6)
    o, lse = run(q, k, v, softmax_scale=0.0, sparsity_n=2, dense_recent_tokens=0, target=target)
    stays = np.arange(270) % 4 < 2
    sums = np.cumsum(v[0, :, 0] * stays[:, None].astype(np.float64), axis=0)[ends - 1]
    counts = np.cumsum(stays)[ends - 1]
    np.testing.assert_allclose(o[0, :, 0], sums / counts[:, None], atol=1e-5)
    np.testing.assert_allclose(lse[0, :, 1], np.log(counts), rtol=1e-6)


@by_dtype
def test_values_are_averaged(dtype: Any) -> None:
    """Equal values are the result, and no result is outside of the values."""
    q, k, v = normal(1, 200, 2, 32, dtype=dtype), normal(1, 330, 1, 32, dtype=dtype), normal(1, 330, 1, 32, dtype=dtype)
    o, _ = run(q, k, np.full_like(v, 0.75))
    np.testing.assert_allclose(o.astype(np.float64), 0.75, rtol=2.0 ** (-7 if dtype == BF16 else -10))
    o, _ = run(q, k, v)
    assert (np.abs(o.astype(np.float64)) <= 1.01 * np.abs(v.astype(np.float64)).max()).all()
