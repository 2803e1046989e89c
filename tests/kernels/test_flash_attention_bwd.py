"""The backward of prefill against the oracle, and what the kernel computes, reads and keeps in memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed._prefill_bwd_plan import choose_geometry, make_plan
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
    dq, dk, dv = run(do, do, k, k, cu_seqlens_q=np.array([0, 7]), cu_seqlens_kv=np.array([0, 0]))
    assert dq.shape == (7, 2, 64)
    assert not dq.any()
    assert dk.shape == dv.shape == (0, 1, 64)


def traced(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    d: int,
    dtype: Any,
    target: str,
    causal: bool,
    sparsity: Sparsity | None = None,
    kept: bool | None = None,
) -> Trace:
    """The trace of a launch of one sequence, with `kept` as every decision about a tile."""
    spans = [Span(0, lengths[0], 0, lengths[1])]
    geometry = choose_geometry(
        spans, group=heads[0] // heads[1], d=d, itemsize=dtype.itemsize, causal=causal, sparsity=sparsity
    )
    tiles = None if kept is None else [np.full((heads[0], *(-(-n // 128) for n in lengths)), kept)]
    window = Window(None, 0 if causal else None)
    plan = make_plan(geometry, spans, n_q_heads=heads[0], n_kv_heads=heads[1], window=window, kept=tiles)
    q, k = np.ones((lengths[0], heads[0], d), dtype), np.ones((max(plan.rows_kv, lengths[1]), heads[1], d), dtype)
    lse = np.full(q.shape[:2], 10.0, np.float32)
    flags = (plan.masked, plan.plain, plan.guarded, plan.ragged)
    tables = (plan.blocks, plan.bounds, plan.chunks, plan.penalties)
    selection = (0, 0, 0, 0) if sparsity is None else sparsity
    trace = Trace()
    simulate(prefill_bwd, target=target, trace=trace)(
        q, q, k, k, q, lse, *tables, geometry.heads, geometry.overhang, *flags, d**-0.5, *selection
    )
    return trace


@pytest.mark.parametrize(("causal", "tiles"), [(True, 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8), (False, 8 * 8)])
def test_tensor_engine_has_six_products(causal: bool, tiles: int) -> None:
    """Per tile of queries and of keys that meet, 6 times 128 columns; beside that transposes of rows, twice each."""
    trace = traced((1024, 1024), (1, 1), 128, BF16, "trn2", causal)
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
        trace = traced((256, 512), (1, 1), 128, BF16, "trn2", False, sparsity)
        extra.append(sum(r.attrs["n"] for r in trace.records if r.instruction == "nc_matmul"))
        comparisons = [r for r in trace.records if r.attrs.get("op") in ("greater", "greater_equal")]
        compared.append(sum(r.writes[0].n_elements for r in comparisons))
    assert extra[1] - extra[0] == 8 * per_tile
    assert compared == [0, 8 * passes * 128 * 128]


def test_cost_of_skipping() -> None:
    """As many exponentials, in tiles of their own; and no other work on the Tensor and Vector Engines."""
    dense, skipping = (
        [(r.engine.name, r.instruction, r.attrs.get("op"), r.writes[0].n_elements) for r in trace.records if r.writes]
        for trace in (traced((256, 512), (1, 1), 128, BF16, "trn2", False, kept=x) for x in (None, True))
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
    traced((1000, 1100), (heads, 1), d, dtype, "trn1", causal=True)


@pytest.mark.parametrize(("heads", "d"), [(26, 128), (13, 256)])
def test_fits_the_smallest_memory_with_selection(heads: int, d: int) -> None:
    """As many heads as a block has room for; with decisions about tiles as well."""
    traced((100, 500), (heads, 1), d, F32, "trn1", False, Sparsity(4, 8, 10, 20), True)


CALLS = [
    ([(700, 700)], Window(None, 0)),
    ([(300, 900), (64, 64)], Window(None, 0)),
    ([(900, 100)], Window(None, 0)),
    ([(513, 1300)], Window(100, 0)),
    ([(513, 1300), (0, 9), (9, 0), (1, 1)], Window(3, 200)),
    ([(257, 255)], Window(None, None)),
]


@pytest.mark.parametrize("most_tiles", [2, 64])
@pytest.mark.parametrize(("lengths", "window"), CALLS)
def test_plan_has_every_pair_once(
    lengths: list[tuple[int, int]], window: Window, most_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and chunks meet each visible pair of query and key once, for every head, and no other unmasked."""
    monkeypatch.setattr("contributed._prefill_bwd_plan.MOST_TILES", most_tiles)
    firsts = np.cumsum([(0, 0), *lengths], axis=0)
    spans = [Span(int(q), n, int(k), m) for (q, k), (n, m) in zip(firsts, lengths, strict=False)]
    geometry = choose_geometry(spans, group=2, d=128, itemsize=2, causal=window.right == 0)
    plan = make_plan(geometry, spans, n_q_heads=4, n_kv_heads=2, window=window)
    met = np.zeros((firsts[-1][0], 4 // geometry.heads, firsts[-1][1] + 1), np.int32)
    for b, (first, end, _, _) in enumerate(plan.bounds):
        rows, (lo, hi) = plan.blocks[b, :, 0].T, plan.blocks[b, :, 1:].view(np.float32).transpose(1, 2, 0)
        for c in range(first, end + geometry.n_diagonal):
            base, stop = plan.chunks[c, 0, 1:3].view(np.float32)
            for t in range(geometry.q_tiles):
                width = geometry.kv_tiles
                if c >= end:
                    width = min(width, t + geometry.overhang - (c - end) * geometry.kv_tiles)
                keys = np.arange(base, base + max(0, width) * 128)
                seen = (keys >= lo[t][:, None]) & (keys < np.minimum(hi[t], stop)[:, None])
                if plan.plain and c >= end and t >= (c - end + 1) * geometry.kv_tiles:
                    assert (seen | (rows[t] < 0)[:, None]).all()
                if not plan.masked and c < end:
                    assert (seen | (rows[t] < 0)[:, None]).all()
                row, unit = np.divmod(rows[t], met.shape[1])
                p, i = np.nonzero(seen)
                kv_head = unit[p] // (met.shape[1] // 2)
                np.add.at(met, (row[p], unit[p], (plan.chunks[c, 0, 0] - kv_head) // 2 + i), 1)
    expected = np.zeros_like(met)
    for s in spans:
        for i in range(s.len_q):
            p = i + s.len_kv - s.len_q
            lo = 0 if window.left is None else max(0, p - window.left)
            hi = s.len_kv if window.right is None else min(s.len_kv, p + window.right + 1)
            expected[s.q + i, :, s.kv + lo : s.kv + max(lo, hi)] = 1
    np.testing.assert_array_equal(met, expected)


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
