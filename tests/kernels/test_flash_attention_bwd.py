"""The backward of prefill against the oracle, and what the kernel computes, reads and keeps in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed._prefill_bwd_launch import backward_launch
from contributed._prefill_bwd_plan import Plan, choose_geometry, make_plan
from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Span, Sparsity, Window
from contributed.flash_attention_bwd import CASES, flash_attention_bwd, inputs, prefill_bwd
from contributed.flash_attention_fwd import flash_attention_fwd
from nkisim import Trace, simulate
from reference.budget import budget, check_budget, share_of_budget
from reference.flash_attention import flash_attention
from reference.flash_attention_bwd import flash_attention_bwd as oracle
from reference.rounded_attention import flash_attention_bwd_rounded, flash_attention_rounded
from tests.reference.test_golden_flash_attention import WITH_GRADIENTS, options_of, with_float16_deltas

NAMES = ("dq", "dk", "dv")
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
CAUSAL, ALL = Window(None, 0), Window(None, None)
GOLDEN = Path(__file__).parents[1] / "golden"
ON = [(BF16, "trn2"), (F32, "trn3"), (F16, "trn1")]  # all of both: the self-check
# Of N:M selection and skip-softmax each case on one: where a scale or a window is off, the dense cases tell.
RUNS = [(c, *on) for i, c in enumerate(CASES) for on in ((ON[i % 3],) if c.sparsity_n or c.threshold else ON)]
# Scores of float32 are within a thousandth of this of the oracle's, so that decisions are the same.
MARGIN = 1e-3


def given(case: PrefillCase, dtype: Any) -> Any:
    return inputs(case, dtype, decided, flash_attention_rounded)


def decided(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The oracle's forward, whose decisions have to be clear."""
    result = flash_attention(q, k, v, **options)
    assert result.stats.margin.min(initial=np.inf) > MARGIN
    assert 0 < result.stats.tiles_skipped.sum() < result.stats.tiles_total.sum()
    return result


@lru_cache(maxsize=64)
def references(case: PrefillCase, dtype: Any) -> Any:
    do, q, k, v, _, _, options = given(case, dtype)
    return oracle(do, q, k, v, **options), flash_attention_bwd_rounded(do, q, k, v, **options)


def within(name: str, got: Any, exact: Any, low: Any) -> None:
    """In the budget; in two-byte types in half of it, but for rows that are 0 and hold the errors of float32."""
    check_budget(name, got, exact, low, got.dtype)
    if got.dtype != F32:
        nonzero = np.where((exact == 0).all(axis=-1, keepdims=True), 0, got.astype(np.float64))
        zero = np.where((exact == 0).all(axis=-1, keepdims=True), 0, low.astype(np.float64))
        assert share_of_budget(nonzero, exact, zero, got.dtype)[1] <= 0.5, name


@pytest.mark.parametrize(
    ("case", "dtype", "target"), RUNS, ids=[f"{c.name}-{dtype.name}-{where}" for c, dtype, where in RUNS]
)
def test_matches_the_oracle(case: PrefillCase, dtype: Any, target: str) -> None:
    do, q, k, v, o, lse, options = given(case, dtype)
    got = flash_attention_bwd(do, q, k, v, o, lse, target=target, **options)
    for name, x, like, exact, low in zip(NAMES, got, (q, k, v), *references(case, dtype), strict=True):
        assert (x.shape, x.dtype) == (like.shape, dtype)
        within(name, x, exact, low)


@pytest.mark.parametrize(("problem", "variant"), [(p, x) for p, names in WITH_GRADIENTS.items() for x in names])
def test_golden(problem: str, variant: str) -> None:
    """The public gradients and ours differ by both budgets at most."""
    with np.load(GOLDEN / f"{problem}.npz") as data:
        do, q, k, v = (data[x] for x in ("do", "q", "k", "v"))
        golden = [data[f"{variant}.{x}"] for x in NAMES]
    options = options_of(problem, variant)
    exact, low = oracle(do, q, k, v, **options), flash_attention_bwd_rounded(do, q, k, v, **options)
    o, lse = flash_attention_rounded(q, k, v, **options)
    got = flash_attention_bwd(do, q, k, v, o[0], lse[0], target="trn2", **options)
    theirs = [*with_float16_deltas(problem, variant, options, low[:2]), low[2]]
    for i, name in enumerate(NAMES):
        within(name, got[i], exact[i], low[i])
        apart = np.abs(got[i].astype(np.float64) - golden[i]).max(axis=-1)
        assert (apart <= budget(exact[i], low[i], F16) + budget(exact[i], theirs[i], F16)).all(), name


def drawn(*shapes: tuple[int, ...], dtype: Any = F32, seed: int = 5) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def run(do: Any, q: Any, k: Any, v: Any, target: str = "trn2", **options: Any) -> Any:
    forward = flash_attention(q, k, v, **options)
    o, lse = forward.o.astype(q.dtype), forward.lse.astype(np.float32)
    return flash_attention_bwd(do, q, k, v, o, lse, target=target, **options)


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize(("row", "keys"), [(0, (0, 61)), (127, (57, 188)), (128, (58, 189)), (199, (129, 260))])
def test_one_row_reaches_what_it_sees(row: int, keys: tuple[int, int], target: str) -> None:
    """A do of one row and head has a dq there alone, and dk and dv of exactly the keys of the row's window."""
    q, k, v = drawn((1, 200, 4, 64), (1, 260, 2, 64), (1, 260, 2, 64))
    do = np.zeros_like(q)
    do[0, row, 2] = 1.0
    dq, dk, dv = run(do, q, k, v, target, window_size=(130, None))
    first, end = max(0, row + 60 - 130), row + 60 + 1
    assert (max(0, first), end) == keys if row else end == 61
    assert np.flatnonzero(dq[0].any(axis=(1, 2))).tolist() == [row]
    assert np.flatnonzero(dq[0, row].any(axis=1)).tolist() == [2]
    for x in (dk, dv):
        assert not x[0, :, 0].any()
        assert np.flatnonzero(x[0, :, 1].any(axis=1)).tolist() == list(range(first, end))


def test_heads_of_a_group_add_up() -> None:
    """Two equal heads double dk and dv, to the bit: one tile of rows, one of keys, one addition."""
    do, q, k, v = drawn((1, 100, 1, 32), (1, 100, 1, 32), (1, 100, 1, 32), (1, 100, 1, 32))
    dq, dk, dv = run(do, q, k, v)
    twice = run(do.repeat(2, axis=2), q.repeat(2, axis=2), k, v)
    np.testing.assert_array_equal(twice[0], dq.repeat(2, axis=2))
    np.testing.assert_array_equal(twice[1], 2 * dk)
    np.testing.assert_array_equal(twice[2], 2 * dv)


def test_sequences_do_not_depend_on_each_other() -> None:
    """Packed beside others, a sequence's gradients have the same bits as alone, where its blocks are the same."""
    lengths = [(130, 300), (250, 250), (5, 17)]
    cu_q, cu_k = (np.cumsum([0, *(n[i] for n in lengths)]) for i in (0, 1))
    do, q, k, v = drawn(*((n[-1], heads, 64) for n, heads in ((cu_q, 2), (cu_q, 2), (cu_k, 1), (cu_k, 1))), dtype=BF16)
    together = run(do, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k)
    other = [x.copy() for x in (do, q, k, v)]
    for x, cu in zip(other, (cu_q, cu_q, cu_k, cu_k), strict=True):
        x[: cu[1]] *= 3
        x[cu[2] :] *= -2
    changed = run(*other, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k)
    for x, y, cu in zip(together, changed, (cu_q, cu_k, cu_k), strict=True):
        np.testing.assert_array_equal(x[cu[1] : cu[2]], y[cu[1] : cu[2]])
        assert (x[: cu[1]] != y[: cu[1]]).any()


def test_no_queries_and_no_keys() -> None:
    do, k = drawn((0, 2, 64), (7, 1, 64))
    dq, dk, dv = run(do, do, k, k, cu_seqlens_q=np.array([0, 0]), cu_seqlens_kv=np.array([0, 7]))
    assert dq.shape == (0, 2, 64)
    assert not dk.any()
    assert not dv.any()
    do, k = drawn((7, 2, 64), (0, 1, 64))
    ends = {"cu_seqlens_q": np.array([0, 7]), "cu_seqlens_kv": np.array([0, 0])}
    for options in ({}, {"causal": False}, {"causal": False, "window_size": (3, 5), "sparsity_n": 2}):
        dq, dk, dv = run(do, do, k, k, **ends, **options)
        assert dq.shape == (7, 2, 64)
        assert not dq.any()
        assert dk.shape == dv.shape == (0, 1, 64)


def traced(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    d: int,
    dtype: Any,
    target: str,
    window: Window,
    sparsity: Sparsity | None = None,
    kept: Any = None,
) -> Trace:
    """The trace of a launch of one sequence; decisions about tiles are all `kept`, or one for each head and tile."""
    spans = (Span(0, lengths[0], 0, lengths[1]),)
    tiles = None if kept is None else [np.broadcast_to(kept, (heads[0], *(-(-n // 128) for n in lengths)))]
    made = backward_launch(
        prefill_bwd,
        spans,
        window,
        n_q_heads=heads[0],
        n_kv_heads=heads[1],
        d=d,
        itemsize=dtype.itemsize,
        scale=d**-0.5,
        sparsity=sparsity,
        kept=tiles,
    )
    q, k = np.ones((lengths[0], heads[0], d), dtype), np.ones((max(made.plan.rows_kv, lengths[1]), heads[1], d), dtype)
    lse = np.full(q.shape[:2], 10.0, np.float32)
    trace = Trace()
    simulate(made.kernel, target=target, trace=trace)(*made.arguments(q, q, k, k, q, lse))
    return trace


@pytest.mark.parametrize("window", [Window(299, 0), Window(400, None), Window(None, 199)])
def test_a_window_that_hides_nothing_is_none(window: Window) -> None:
    """The same instructions on as many elements."""
    none = Window(None, 0 if window.right == 0 else None)
    programs = [
        [(r.engine, r.instruction, [x.shape for x in (*r.writes, *r.reads)]) for r in trace.records]
        for trace in (traced((200, 300), (1, 1), 32, BF16, "trn2", x) for x in (window, none))
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize(("causal", "tiles"), [(True, 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8), (False, 8 * 8)])
def test_tensor_engine_has_six_products(causal: bool, tiles: int) -> None:
    """Per tile of queries and of keys that meet, 6 times 128 columns; beside that transposes of rows, twice each."""
    trace = traced((1024, 1024), (1, 1), 128, BF16, "trn2", CAUSAL if causal else ALL)
    columns = sum(r.attrs["n"] for r in trace.records if r.instruction == "nc_matmul")
    # q and do of the block, and of what is loaded after it; K and V of its chunks of four tiles, and of one after them.
    rows = 2 * 2 * 8 * 128
    chunks = 2 * (2 + 1) * 4 * 128
    assert columns == tiles * 6 * 128 + rows + chunks


@pytest.mark.parametrize(("n", "m", "per_tile", "passes"), [(2, 4, 2 * 6 * 32, 1.5), (4, 8, 2 * 28 * 16, 7.0)])
def test_cost_of_selection(n: int, m: int, per_tile: int, passes: float) -> None:
    """Each pair of a group once for the key that wins and once for the one that loses; and as many comparisons.

    With ties that keep both, comparisons are made twice. Without N:M there are none, nor other products.
    """
    extra, compared = [], []
    for sparsity in (None, Sparsity(n, m, 0, 0)):
        trace = traced((256, 512), (1, 1), 128, BF16, "trn2", ALL, sparsity)
        extra.append(sum(r.attrs["n"] for r in trace.records if r.instruction == "nc_matmul"))
        comparisons = [r for r in trace.records if r.attrs.get("op") in ("greater", "greater_equal")]
        compared.append(sum(r.writes[0].n_elements for r in comparisons))
    assert extra[1] - extra[0] == 8 * per_tile
    assert compared == [0, 8 * passes * 128 * 128]


def test_cost_of_skipping() -> None:
    """As many exponentials, in tiles of their own; and no other work on the Tensor and Vector Engines."""
    dense, skipping = (
        [(r.engine.name, r.instruction, r.attrs.get("op"), r.writes[0].n_elements) for r in trace.records if r.writes]
        for trace in (traced((256, 512), (1, 1), 128, BF16, "trn2", ALL, kept=x) for x in (None, True))
    )
    for engine in ("tensor", "vector"):
        assert [x for x in dense if x[0] == engine] == [x for x in skipping if x[0] == engine]
    for records, shapes in ((dense, 2 * [128 * 512]), (skipping, 8 * [128 * 128])):
        assert [x[3] for x in records if x[2] == "exp" and x[3] > 1] == shapes


@pytest.mark.parametrize(
    ("heads", "d", "dtype"), [(8, 128, BF16), (4, 128, F32), (2, 256, F32), (1, 256, F32), (4, 256, F16)], ids=str
)
def test_fits_the_smallest_memory(heads: int, d: int, dtype: Any) -> None:
    """The largest blocks there are, with masks and guards: the simulator refuses what trn1 has no room for."""
    traced((1000, 1100), (heads, 1), d, dtype, "trn1", CAUSAL)


@pytest.mark.parametrize(("heads", "d"), [(26, 128), (13, 256)])
def test_fits_the_smallest_memory_with_selection(heads: int, d: int) -> None:
    """As many heads as a block has room for; with decisions about tiles as well."""
    traced((100, 500), (heads, 1), d, F32, "trn1", ALL, Sparsity(4, 8, 10, 20), True)


CALLS = [
    ([(700, 700)], Window(None, 0)),
    ([(300, 900), (64, 64)], Window(None, 0)),
    ([(900, 100)], Window(None, 0)),
    ([(513, 1300)], Window(100, 0)),
    ([(513, 1300), (0, 9), (9, 0), (1, 1)], Window(3, 200)),
    ([(257, 255)], Window(None, None)),
    ([(800, 800), (640, 1024)], Window(383, 0)),
    ([(513, 1300), (257, 276)], Window(200, 300)),
    ([(500, 500)], Window(128, None)),
]


def met_by(plan: Plan, spans: Sequence[Span], n_q_heads: int, n_kv_heads: int) -> tuple[Any, int]:
    """How often each row of q and head meets each row of k that it sees and weighs; and tiles of a head computed."""
    g, group = plan.geometry, n_q_heads // n_kv_heads
    met = np.zeros((max(s.q + s.len_q for s in spans), n_q_heads, max(s.kv + s.len_kv for s in spans)), np.int32)
    units, computed = n_q_heads // g.heads, 0
    ends = plan.bounds[:, 5:]
    assert (np.diff(ends, axis=1) >= 0).all()
    for i, end in enumerate(ends.T):
        # Trips take powers of two, each but the first once at most.
        assert ((end - plan.bounds[:, 0]) % (plan.per_trip >> i) == 0).all()
        assert i == 0 or (end - ends[:, i - 1] < plan.per_trip >> (i - 1)).all()
    for b, (first, whole, _, begin, end_of_edge, *_) in enumerate(plan.bounds):
        rows, (lo, hi) = plan.blocks[b, :, 0].T, plan.blocks[b, :, 1:3].view(np.float32).transpose(1, 2, 0)
        assert (rows >= 0).all() == whole
        end = ends[b, -1]
        assert first - begin == g.n_edge * (end_of_edge - begin)
        span = next(s for s in spans if s.q <= rows[0, 0] // units < s.q + s.len_q)
        for c in range(begin, end + g.n_diagonal):
            in_loop = first <= c < end
            unit = rows[0, 0] % units
            record, kv_head = plan.chunks[c, 0], unit * g.heads // group
            base, stop = record[1:3].view(np.float32)
            firsts = (record[0] - kv_head) // n_kv_heads + 128 * np.arange(g.kv_tiles)
            if plan.gathers:
                firsts = (record[-g.kv_tiles :] - kv_head) // n_kv_heads
                stop = np.inf if in_loop else stop
            else:
                assert firsts[0] == span.kv + base
            assert firsts.max() + 128 <= plan.rows_kv
            guards = plan.chunks[c][:, 3 : 3 + g.kv_tiles]
            n_keys = np.clip(span.len_kv - (firsts - span.kv), 0, 128)
            np.testing.assert_array_equal((guards < 0).sum(axis=0), n_keys)
            assert plan.guarded or (guards < 0).all()
            bias = np.zeros(g.q_tiles * g.heads * g.kv_tiles) if plan.penalties is None else plan.penalties[c]
            weighed = bias.reshape(g.q_tiles, g.heads, g.kv_tiles) == 0
            for t in range(g.q_tiles):
                begin_seen, end_seen = (0, g.kv_tiles) if in_loop else g.seen(t, c - end if c >= end else c - first)
                computed += g.heads * max(0, end_seen - begin_seen)
                for j in range(begin_seen, end_seen):
                    keys = firsts[j] - span.kv + np.arange(128)
                    seen = (keys >= lo[t][:, None]) & (keys < np.minimum(hi[t], stop)[:, None])
                    plain = plan.plain and c >= end and j < t - (c - end) * g.kv_tiles
                    if plain or (in_loop and not plan.masked):
                        # Not masked: all of it is seen, but where it is not weighed.
                        assert (seen | (rows[t] < 0)[:, None] | ~weighed[t, :, j].any()).all()
                    n_rows, n_columns = (rows[t] >= 0).sum(), max(0, met.shape[2] - firsts[j])
                    assert not seen[n_rows:].any()
                    assert not seen[:, n_columns:].any()
                    of_row = slice(rows[t, 0] // units, rows[t, 0] // units + n_rows)
                    for head in np.flatnonzero(weighed[t, :, j]) if n_rows else ():
                        of_key = slice(firsts[j], firsts[j] + 128)
                        met[of_row, unit * g.heads + head, of_key] += seen[:n_rows, :n_columns]
    return met, computed


def spans_of(lengths: Sequence[tuple[int, int]]) -> list[Span]:
    firsts = np.cumsum([(0, 0), *lengths], axis=0)
    return [Span(int(q), n, int(k), m) for (q, k), (n, m) in zip(firsts, lengths, strict=False)]


def visible(span: Span, window: Window) -> Any:
    """The definition, bool [queries, keys]."""
    ahead = np.arange(span.len_kv) - (np.arange(span.len_q)[:, None] + span.len_kv - span.len_q)
    left, right = (10**9 if x is None else x for x in window)
    return (ahead >= -left) & (ahead <= right)


@pytest.mark.parametrize("most_tiles", [2, 64])
@pytest.mark.parametrize(("lengths", "window"), CALLS)
def test_plan_has_every_pair_once(
    lengths: list[tuple[int, int]], window: Window, most_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and chunks meet each visible pair of query and key once, for every head, and no other unmasked."""
    monkeypatch.setattr("contributed._prefill_bwd_plan.MOST_TILES", most_tiles)
    spans = spans_of(lengths)
    geometry = choose_geometry(spans, group=2, d=128, itemsize=2, window=window)
    plan = make_plan(geometry, spans, n_q_heads=4, n_kv_heads=2, window=window)
    met, _ = met_by(plan, spans, 4, 2)
    expected = np.zeros_like(met)
    for s in spans:
        expected[s.q : s.q + s.len_q, :, s.kv : s.kv + s.len_kv] = visible(s, window)[:, None]
    np.testing.assert_array_equal(met, expected)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("sparsity", [None, Sparsity(2, 4, 0, 64)], ids=["", "2:4"])
@pytest.mark.parametrize("window", [Window(None, 0), Window(383, 0), Window(None, None), Window(383, None)], ids=str)
def test_plan_has_what_was_kept(window: Window, sparsity: Sparsity | None, share: float) -> None:
    """The same of pairs in tiles that were kept; chunks that no row of a block keeps are not there."""
    lengths = [(900, 900), (256, 1500)]
    spans = spans_of(lengths)
    rng = np.random.default_rng(2)
    kept = [rng.random((4, -(-n // 128), -(-m // 128))) < share for n, m in lengths]
    geometry = choose_geometry(spans, group=2, d=128, itemsize=2, window=window, sparsity=sparsity, kept=kept)
    plans = [
        make_plan(geometry, spans, n_q_heads=4, n_kv_heads=2, window=window, kept=x)
        for x in (kept, [np.ones_like(x) for x in kept])
    ]
    expected = np.zeros((1156, 4, 2400), np.int32)
    for s, tiles in zip(spans, kept, strict=True):
        of_pairs = tiles.repeat(128, axis=1)[:, : s.len_q].repeat(128, axis=2)[:, :, : s.len_kv]
        of_rows = (of_pairs & visible(s, window)).swapaxes(0, 1)
        expected[s.q : s.q + s.len_q, :, s.kv : s.kv + s.len_kv] = of_rows
    (met, computed), (_, most) = (met_by(plan, spans, 4, 2) for plan in plans)
    np.testing.assert_array_equal(met, expected)
    assert computed < most or (share, window.left) != (0.05, None)
    assert plans[0].chunks.shape[:2] == plans[1].chunks.shape[:2]
    assert not plans[1].gathers


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("sparsity", [None, Sparsity(2, 4, 0, 64)], ids=["", "2:4"])
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ((2048, 2048), Window(511, 0)),
        ((1024, 2048), Window(640, 0)),
        ((1024, 2048), Window(300, 0)),
        ((1024, 2048 + 37), Window(129, 0)),
        ((1024, 2048 - 37), Window(900, 0)),
        ((512, 2048), Window(100, 200)),
    ],
)
def test_tiles_outside_a_window_are_not_computed(
    lengths: tuple[int, int], window: Window, sparsity: Sparsity | None, group: int
) -> None:
    """As many tiles as have a visible pair; a right edge has those that would follow the last key as well."""
    spans = spans_of([lengths])
    geometry = choose_geometry(spans, group=group, d=128, itemsize=2, window=window, sparsity=sparsity)
    plan = make_plan(geometry, spans, n_q_heads=group, n_kv_heads=1, window=window)
    more = window.right or 0
    some = visible(Span(0, lengths[0] + more, 0, lengths[1] + more), window)[: lengths[0]]
    tiles = np.pad(some, [(0, -n % 128) for n in some.shape]).reshape(lengths[0] // 128, 128, -1, 128).any(axis=(1, 3))
    assert met_by(plan, spans, group, 1)[1] == group * tiles.sum()


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (4, 8) for n in range(1, m)])
def test_every_n_of_m(n: int, m: int) -> None:
    """On scores that are often equal, of which some always stay."""
    dtype, target = ON[n % 3]
    case = PrefillCase("n-of-m", 2, 1, 16, ((40, 200),), sparsity_n=n, sparsity_m=m, sink=3, recent=5, grid=True)
    q, k, v, options = case.inputs(dtype)
    (do,) = drawn(q.shape, dtype=dtype)
    low = flash_attention_bwd_rounded(do, q, k, v, **options)
    for name, x, exact, rounded in zip(
        NAMES, run(do, q, k, v, target, **options), oracle(do, q, k, v, **options), low, strict=True
    ):
        check_budget(name, x, exact, rounded, dtype)


@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)])
def test_selection_is_that_of_the_forward(n: int, m: int, d: int) -> None:
    """Where a choice hangs on the rounding of float32: scores of a group differ by about the last bit.

    They are sums of two products, so that no order of summation makes a difference, and the same in all heads. Values
    are unit vectors, each head's for other keys, and so are the rows of do: o has the probabilities of a row, and dv
    those of a key.
    """
    rng = np.random.default_rng(1)
    len_q, len_kv = 128, 512
    heads = len_kv // d
    k, q = np.zeros((1, len_kv, heads, d), F32), np.zeros((1, len_q, heads, d), F32)
    k[..., 0] = np.repeat(rng.uniform(1.0, 2.0, len_kv // m), m)[:, None]
    k[..., d - 1] = (rng.integers(-8, 9, len_kv) * 2.0**-25)[:, None]
    q[..., 0], q[..., d - 1] = rng.choice([-0.5, 1.0, 2.0], (2, len_q))[:, :, None]
    v, do = np.zeros_like(k), np.zeros_like(q)
    keys, rows = np.arange(len_kv), np.arange(len_q)
    v[0, keys, keys // d, keys % d] = 1.0
    do[0, rows, :, rows] = 1.0
    options = {"causal": False, "sparsity_n": n, "sparsity_m": m, "dense_recent_tokens": 0}
    o, lse = flash_attention_fwd(q, k, v, return_lse=True, target="trn3", **options)
    weighed = o[0].reshape(len_q, len_kv) > 0
    _, _, dv = flash_attention_bwd(do, q, k, v, o, lse, target="trn3", **options)
    for head in range(heads):
        np.testing.assert_array_equal(dv[0, :, head, :len_q].T > 0, weighed)
    exact = np.sort((q[0, :, 0].astype(np.float64) @ k[0, :, 0].T).reshape(len_q, -1, m), axis=-1)
    rounded = exact.astype(np.float32)
    tied = rounded[..., m - n - 1] == rounded[..., m - n]
    assert (tied & (exact[..., m - n - 1] < exact[..., m - n])).any()
    assert (~tied).any()
    # For M = 8 both stay.
    np.testing.assert_array_equal(weighed.reshape(len_q, -1, m).sum(axis=-1) > n, tied & (m == 8))


@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2, "dense_recent_tokens": 20}])
def test_from_the_forward_to_the_gradients(options: dict[str, Any]) -> None:
    """o, lse and decisions about tiles of the kernel, not of the oracle."""
    case = PrefillCase("skip", 2, 1, 64, ((130, 400),), threshold=0.5, grid=True, locality=3.0)
    q, k, v, rest = case.inputs(BF16)
    options = rest | options
    (do,) = drawn(q.shape, dtype=BF16)
    o, lse, stats = flash_attention_fwd(q, k, v, return_lse=True, return_stats=True, target="trn2", **options)
    assert 0 < stats.tiles_skipped.sum() < stats.tiles_total.sum()
    got = flash_attention_bwd(do, q, k, v, o, lse, kept=stats.kept, target="trn2", **options)
    low = flash_attention_bwd_rounded(do, q, k, v, **options)
    for name, x, exact, rounded in zip(NAMES, got, oracle(do, q, k, v, **options), low, strict=True):
        within(name, x, exact, rounded)


def test_a_skipped_tile_has_no_gradient() -> None:
    """Even if its scores are the largest, and lse as if it were there: what is replayed is not decided again."""
    do, q, k, v = drawn((1, 200, 2, 64), (1, 200, 2, 64), (1, 300, 1, 64), (1, 300, 1, 64))
    do[0, :128] = 0.0
    do[0, :, 1] = 0.0
    forward = flash_attention(q, k, v, causal=False)
    o, lse = forward.o.astype(F32), forward.lse.astype(F32)
    options = {"causal": False, "skip_softmax_threshold": 1e-3, "target": "trn2"}
    whole = np.ones((2, 2, 3), bool)
    dense = flash_attention_bwd(do, q, k, v, o, lse, target="trn2", causal=False)
    for x, y in zip(flash_attention_bwd(do, q, k, v, o, lse, kept=[whole], **options), dense, strict=True):
        np.testing.assert_array_equal(x, y)
    for head, row_tile, key_tile in ((0, 1, 1), (0, 0, 1), (1, 1, 1)):
        kept = whole.copy()
        kept[head, row_tile, key_tile] = False
        dq, dk, dv = flash_attention_bwd(do, q, k, v, o, lse, kept=[kept], **options)
        matters = (head, row_tile) == (0, 1)  # no other rows have a do
        for x, y in ((dk, dense[1]), (dv, dense[2])):
            assert x[0, 128:256].any() != matters
            np.testing.assert_array_equal(x[0, :128], y[0, :128])
            np.testing.assert_array_equal(x[0, 256:], y[0, 256:])
        assert (dq[0, 128:, 0] != dense[0][0, 128:, 0]).any() == matters
        np.testing.assert_array_equal(dq[0, :128], dense[0][0, :128])


@pytest.mark.parametrize("most_tiles", [2, 64])
def test_replay_over_blocks_and_chunks(most_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions as no forward would make them, of several blocks, and of several chunks on a diagonal."""
    monkeypatch.setattr("contributed._prefill_bwd_plan.MOST_TILES", most_tiles)
    shape = (1, 640, 2, 64)
    do, q, k, v = drawn(shape, shape, shape, shape, dtype=BF16)
    kept = [np.tril(np.random.default_rng(3).random((2, 5, 5)) > 0.4) | np.eye(5, dtype=bool)]
    options = {"skip_softmax_threshold": 0.5, "kept": kept}
    low = flash_attention_bwd_rounded(do, q, k, v, **options)
    for name, x, exact, rounded in zip(
        NAMES, run(do, q, k, v, **options), oracle(do, q, k, v, **options), low, strict=True
    ):
        check_budget(name, x, exact, rounded, BF16)


@pytest.mark.parametrize(
    ("dtype", "target", "lengths", "options"),
    [
        (BF16, "trn2", (640, 1024), {"window_size": (300, None)}),
        (F32, "trn1", (500, 1061), {"window_size": (129, None)}),
        (F32, "trn2", (512, 900), {"window_size": (200, 150), "causal": False}),
        (F32, "trn3", (640, 1061), {"window_size": (700, None), "sparsity_n": 2, "dense_recent_tokens": 70}),
        (F16, "trn1", (384, 900), {"window_size": (200, None), "sparsity_n": 3, "sparsity_m": 8}),
        (BF16, "trn2", (640, 1024), {"window_size": (383, None), "skip_softmax_threshold": 0.5}),
        (F32, "trn1", (500, 520), {"window_size": (100, None), "sparsity_n": 2, "dense_sink_tokens": 200}),
    ],
    ids=["causal", "unaligned", "both-sides", "2-of-4", "3-of-8", "skip", "sink"],
)
def test_windows_over_blocks_and_chunks(
    dtype: Any, target: str, lengths: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges as parts of the program; tiles of keys that no query sees hold NaN, and get the gradient 0."""
    monkeypatch.setattr("contributed._prefill_bwd_plan.MOST_TILES", 4)
    monkeypatch.setattr("contributed._prefill_bwd_plan.BLOCK_COST", 10**6)  # blocks of 4 row tiles
    rng = np.random.default_rng(8)
    q, do = (rng.integers(-4, 5, (1, lengths[0], 1, 16)) / 4.0 for _ in range(2))
    k, v = (rng.integers(-4, 5, (1, lengths[1], 1, 16)) / 4.0 for _ in range(2))
    do, q, k, v = (x.astype(dtype) for x in (do, q, k, v))
    if "skip_softmax_threshold" in options:
        ahead = np.arange(8) - np.arange(5)[:, None]
        kept = (rng.random((5, 8)) < 0.5) & (ahead >= 0) & (ahead <= 3) | (ahead == 3)
        options = options | {"kept": [kept[None]]}
    forward = flash_attention(q, k, v, **options)
    exact = oracle(do, q, k, v, **options)
    low = flash_attention_bwd_rounded(do, q, k, v, **options)
    unseen = max(0, lengths[1] - lengths[0] - options["window_size"][0]) // 128 * 128
    k[:, :unseen] = v[:, :unseen] = np.nan
    o, lse = forward.o.astype(dtype), forward.lse.astype(np.float32)
    got = flash_attention_bwd(do, q, k, v, o, lse, target=target, **options)
    for name, x, right, rounded in zip(NAMES, got, exact, low, strict=True):
        check_budget(name, x, right, rounded, dtype)
    assert not got[1][0, :unseen].any()


@pytest.mark.parametrize(("dtype", "target", "d"), [(BF16, "trn2", 16), (F32, "trn1", 64)])
def test_gathered_tiles(dtype: Any, target: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles are kept: blocks are small, and chunks have tiles from anywhere, in trips of 2 and 1."""
    monkeypatch.setattr("contributed._prefill_bwd_plan.MOST_TILES", 4)
    for name in ("BLOCK_COST", "TRIP_COST", "GATHER_COST"):
        monkeypatch.setattr(f"contributed._prefill_bwd_plan.{name}", 0)
    rng = np.random.default_rng(4)
    lengths = [(256, 1300), (200, 1203)]
    do, q, k, v = drawn(*((sum(n[i] for n in lengths), 2, d) for i in (0, 0, 1, 1)), dtype=dtype)
    kept = [rng.random((2, 2, 11)) < 0.4, rng.random((2, 2, 10)) < 0.4]
    for tiles, first in zip(kept, (9, 8), strict=True):
        tiles[:, 0, first:], tiles[:, 1, first + 1 :] = False, False
        tiles[:, :, 0] = True  # no row is without a tile
    cu_q, cu_k = (np.cumsum([0, *(n[i] for n in lengths)]) for i in (0, 1))
    options = {"skip_softmax_threshold": 0.5, "kept": kept, "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_k}
    spans = tuple(spans_of(lengths))
    made = backward_launch(
        prefill_bwd, spans, CAUSAL, n_q_heads=2, n_kv_heads=2, d=d, itemsize=2, scale=1.0, sparsity=None, kept=kept
    )
    assert made.plan.gathers
    assert made.plan.per_trip in (2, 4)
    low = flash_attention_bwd_rounded(do, q, k, v, **options)
    for name, x, exact, rounded in zip(
        NAMES, run(do, q, k, v, target, **options), oracle(do, q, k, v, **options), low, strict=True
    ):
        check_budget(name, x, exact, rounded, dtype)


def test_tiles_that_nobody_sees_are_not_decided_about() -> None:
    do, q, k, v = drawn((1, 300, 1, 16), (1, 300, 1, 16), (1, 300, 1, 16), (1, 300, 1, 16))
    forward = flash_attention(q, k, v)
    given = (do, q, k, v, forward.o.astype(F32), forward.lse.astype(F32))
    seen = np.tril(np.ones((1, 3, 3), bool))
    options = {"skip_softmax_threshold": 0.5, "target": "trn3"}
    results = [flash_attention_bwd(*given, kept=[kept], **options) for kept in (seen, np.ones_like(seen))]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_byte_sums_are_float32() -> None:
    """Many equal parts of dv: in a two-byte sum most of them would be lost."""
    n = 1600
    q = np.zeros((1, n, 1, 16), BF16)
    k, do = np.zeros((1, 100, 1, 16), BF16), np.ones((1, n, 1, 16), BF16)
    _, _, dv = run(do, q, k, k, causal=False)
    np.testing.assert_array_equal(dv.astype(np.float64), 16.0)
