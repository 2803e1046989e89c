"""Skip-softmax decode against the oracle: results, the tiles that each head skips, and the rows of V that are read."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

import contributed.skip_softmax_decode as kernel_file
from contributed import _decode_launch, _skip_calibration, _sparse_launch
from contributed._cases import SparseCase
from contributed._nki import has_device, run_on_device, simulate_kernel
from contributed.flash_decode import flash_decode
from contributed.skip_softmax_decode import CASES, INSTRUCTIONS_PER_TILE, skip_softmax_decode
from nkisim import Trace, simulate
from reference.budget import check_budget
from reference.rounded_sparse import skip_softmax_decode_rounded
from reference.skip_softmax import SkipSoftmaxDecode
from reference.skip_softmax import skip_softmax_decode as oracle
from tests.kernels.flash import BF16, CEILING, Run, by_case_dtype_and_target, by_dtype, by_layout
from tests.kernels.sparse import rows_read
from tests.kernels.test_flash_decode_properties import assert_same_bits, columns_by_themselves

F32 = np.dtype(np.float32)
GOLDEN = Path(__file__).parents[1] / "golden" / "mo_decode_d64.npz"
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


class Reference(NamedTuple):
    """A case with what has to come out of it."""

    q: Any
    k: Any
    """NaN where no query sees a key."""
    v: Any
    """NaN there, and in the tiles that every head of the group skips."""
    options: dict[str, Any]
    exact: SkipSoftmaxDecode
    v_rows: Any
    """Keys in tiles that some head of the group keeps, [batch, n_kv_heads]."""
    k_rows: Any
    """Keys that the token sees, likewise."""


def reference(case: SparseCase, dtype: Any) -> Reference:
    """Inputs whose decisions are clear, and the oracle's results."""
    return _reference(of_any_launch(case), dtype)


def low_precision(case: SparseCase, dtype: Any) -> tuple[Any, Any]:
    """o and lse with the machine's roundings."""
    return _low_precision(of_any_launch(case), dtype)


def of_any_launch(case: SparseCase) -> SparseCase:
    """What inputs and results depend on."""
    return dataclasses.replace(case, name="", d_major=False, n_cores=1)


@lru_cache(maxsize=256)
def _low_precision(case: SparseCase, dtype: Any) -> tuple[Any, Any]:
    r = _reference(case, dtype)
    return skip_softmax_decode_rounded(r.q, r.k, r.v, **r.options)


@lru_cache(maxsize=256)
def _reference(case: SparseCase, dtype: Any) -> Reference:
    q, k, v, options = case.inputs(dtype)
    options["skip_softmax_threshold"] = case.threshold
    exact = oracle(q, k, v, **options)
    # The numbers are exact in float64, and float32 scores are a hundredth of this from them.
    assert exact.stats.margin.min() > 1e-3, case
    read = exact.stats.values_read
    v_rows, k_rows = (np.zeros(read.shape[:2], np.int64) for _ in range(2))
    for b, n in enumerate(case.lengths):
        keys, values = (of_sequence(x, b, options) for x in (k, v))
        first = 0 if case.window is None else max(0, n - 1 - case.window)
        for x in (keys, values):
            x[:first] = np.nan
        k_rows[b] = n - first
        for h, t in np.argwhere(read[b]):
            v_rows[b, h] += min((t + 1) * case.tile_kv, n) - max(t * case.tile_kv, first)
        for h, t in np.argwhere(~read[b]):
            values[t * case.tile_kv : min((t + 1) * case.tile_kv, n), h] = np.nan
    return Reference(q, k, v, options, exact, v_rows, k_rows)


def of_sequence(x: Any, b: int, options: dict[str, Any]) -> Any:
    """A sequence's rows and what is after them, [rows, n_kv_heads, d]."""
    return x[options["cu_seqlens_kv"][b] :] if x.ndim == 3 else x[b]


def check(case: SparseCase, dtype: Any = BF16, target: str = "trn2", **launch: Any) -> None:
    """o and lse within their budgets, counts exact, and no NaN of a row that nobody needs in the result."""
    r = reference(case, dtype)
    how = case.launch(target) | launch
    o, lse, stats = skip_softmax_decode(
        r.q, r.k, r.v, return_lse=True, return_stats=True, target=target, **r.options, **how
    )
    assert o.dtype == dtype
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(stats.tiles_total, r.exact.stats.tiles_total)
    np.testing.assert_array_equal(stats.tiles_skipped, r.exact.stats.tiles_skipped)
    row_bytes = case.head_dim * dtype.itemsize
    np.testing.assert_array_equal(stats.v_bytes_read, r.v_rows * row_bytes)
    np.testing.assert_array_equal(stats.k_bytes_read, r.k_rows * row_bytes)
    low = low_precision(case, dtype)
    share = check_budget("o", o, r.exact.o, low[0], dtype)
    assert share <= CEILING[dtype.name], f"o: {share:.2f} of the budget"
    check_budget("lse", lse, r.exact.lse, low[1], np.float32)


def traced(*args: Any, target: str = "trn2", **kwargs: Any) -> tuple[Any, Run]:
    """What `skip_softmax_decode` returns, and its kernel's run."""
    runs = []

    def record(kernel: Any, *kernel_args: Any, target: str | None = None) -> Any:
        runs.append(Run(Trace(), dict(inspect.signature(kernel.function).bind(*kernel_args).arguments)))
        return simulate(kernel, target=target, trace=runs[-1].trace)(*kernel_args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_launch, "simulate_kernel", record)
        results = skip_softmax_decode(*args, target=target, **kwargs)
    assert len(runs) == 1
    return results, runs[0]


@by_case_dtype_and_target(CASES)
def test_matches_the_oracle(case: SparseCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


def test_cases_skip_tiles() -> None:
    """Heads do, and groups, so that V stays in HBM."""
    for case in CASES:
        r = reference(case, BF16)
        skips = r.exact.stats.tiles_skipped.any() and r.v_rows.sum() < r.k_rows.sum()
        assert skips == (case.name not in ("one-key", "no-keys", "window-in-a-tile")), case.name


# -- golden data


def golden(*names: str) -> list[Any]:
    with np.load(GOLDEN) as data:
        return [data[name] for name in names]


# Tiles skipped of 120; `skip_0.1` ran with tiles of 32 keys and did not count them.
SKIPPED = {"noncausal_dense": 0, "skip_0.5_measured": 77, "skip_0.1_measured": 72, "skip_0.01_measured": 61}


@pytest.mark.parametrize(
    ("variant", "d_major"), [*((variant, False) for variant in (*SKIPPED, "skip_0.1")), ("skip_0.1_measured", True)]
)
def test_golden(variant: str, d_major: bool) -> None:
    """Outputs of a public Triton kernel and ours, each within half of its budget of the oracle, and the same tiles."""
    q, k, v, lengths, theirs = golden("q", "k", "v", "lens_k", f"{variant}.o")
    cu = np.cumsum([0, *lengths])
    threshold = None if variant == "noncausal_dense" else float(variant.split("_")[1])
    options = {"skip_softmax_threshold": threshold, "tile_kv": 32 if variant == "skip_0.1" else 128}
    packed = {"cu_seqlens_kv": cu}
    exact, low = golden_references(variant, tuple(options.items()))
    if d_major:
        packed = {"seqlens_kv": lengths, "k_d_major": True}
        padded = [np.full((len(lengths), max(lengths), *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
        for x, rows in zip(padded, (k, v), strict=True):
            for b, n in enumerate(lengths):
                x[b, :n] = rows[cu[b] : cu[b + 1]]
        k, v = padded
    o, lse, stats = skip_softmax_decode(q, k, v, return_lse=True, return_stats=True, target="trn2", **options, **packed)
    for result in (o, theirs):
        assert check_budget("o", result, exact.o, low[0], np.float16) <= 0.5
    check_budget("lse", lse, exact.lse, low[1], np.float32)
    np.testing.assert_array_equal(stats.tiles_skipped, exact.stats.tiles_skipped)
    if variant in SKIPPED:
        assert (stats.tiles_total.sum(), stats.tiles_skipped.sum()) == (120, SKIPPED[variant])


@lru_cache
def golden_references(variant: str, options: tuple[tuple[str, Any], ...]) -> tuple[SkipSoftmaxDecode, tuple[Any, Any]]:
    q, k, v, lengths = golden("q", "k", "v", "lens_k")
    call = dict(options) | {"cu_seqlens_kv": np.cumsum([0, *lengths])}
    return oracle(q, k, v, **call), skip_softmax_decode_rounded(q, k, v, **call)


# -- shapes


@pytest.mark.parametrize(("head_dim", "d_major"), [(1, False), (80, True), (96, True), (192, True), (256, True)])
def test_head_dims(head_dim: int, d_major: bool) -> None:
    check(SparseCase("d", 2, 1, head_dim, (300, 17), 0.5, tile_kv=32, d_major=d_major, unused=1))


@pytest.mark.parametrize(
    ("group", "d_major"), [(1, False), (2, True), (3, False), (8, True), (71, False), (71, True), (128, False)]
)
def test_groups(group: int, d_major: bool) -> None:
    check(SparseCase("g", group, 1, 8, (300,), 0.5, tile_kv=64, d_major=d_major), np.dtype(np.float16))


@pytest.mark.parametrize(
    ("window", "d_major"),
    [(0, False), (0, True), (3, False), (63, True), (64, False), (65, True), (200, False), (200, True), (1000, False)],
)
def test_windows(window: int, d_major: bool) -> None:
    """Smaller than a tile, in one tile or over the edge of two, around whole tiles, and beyond all keys."""
    check(SparseCase("w", 2, 1, 16, (300, 128, 2), 0.5, tile_kv=64, window=window, d_major=d_major, unused=2))


LENGTHS = (0, 1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 2063, 2064, 4095, 4096, 4097)


@by_layout
def test_lengths_around_the_edges_of_tiles_and_items(d_major: bool) -> None:
    """Items of 16 keys by 128 partitions."""
    case = SparseCase("n", 1, 1, 16, LENGTHS, 0.3, tile_kv=16, d_major=d_major, locality=6.0)
    check(case if not d_major else dataclasses.replace(case, window=2000))
    q, k = np.zeros((1, 1, 16), BF16), np.zeros((1, 1, 1, 16), BF16)
    _, run = traced(q, k, k, skip_softmax_threshold=0.3, tile_kv=16, k_d_major=d_major, max_seqlen_kv=max(LENGTHS))
    assert run.item_keys == 2048


# -- decisions, read off the output


def kept_tiles(
    levels: Any,
    tile_kv: int,
    length: int,
    threshold: float,
    window: int | None = None,
    n_kv_heads: int = 1,
    **options: Any,
) -> Any:
    """Tiles in the result of each head, bool [n_q_heads, n_tiles].

    Args:
        levels: [n_q_heads, n_tiles], a head's largest score in each tile, at a key of its own.
        tile_kv: keys of a tile.
        length: keys.
        threshold: of the call.
        window: keys to the left.
        n_kv_heads: KV heads, each for as many of the query heads.
        options: others of the call.
    """
    rng = np.random.default_rng(length)
    n_q_heads, n_tiles = levels.shape
    group, d = n_q_heads // n_kv_heads, 256
    first = 0 if window is None else max(0, length - 1 - window)
    # Head h has its scores in element h % group of keys; values say of which tile they are.
    q, k, v = np.zeros((1, n_q_heads, d)), np.zeros((1, length, n_kv_heads, d)), np.zeros((1, length, n_kv_heads, d))
    for h in range(n_q_heads):
        q[0, h, h % group] = 1.0
        for t in range(first // tile_kv, n_tiles):
            seen = slice(max(first, t * tile_kv), min(length, (t + 1) * tile_kv))
            scores = levels[h, t] - rng.integers(0, 9, seen.stop - seen.start) / 4
            scores[rng.integers(scores.size)] = levels[h, t]
            k[0, seen, h // group, h % group] = scores
    k[:, :first] = 100.0
    v[0, np.arange(length), :, np.arange(length) // tile_kv] = 1.0
    o, stats = skip_softmax_decode(
        *(x.astype(np.float32) for x in (q, k, v)),
        skip_softmax_threshold=threshold,
        tile_kv=tile_kv,
        softmax_scale=1.0,
        window_size=(window, None),
        return_stats=True,
        target="trn2",
        **options,
    )
    kept = o[0, :, :n_tiles] > 0
    np.testing.assert_array_equal(stats.tiles_total[0], n_tiles - first // tile_kv)
    np.testing.assert_array_equal(stats.tiles_total[0] - stats.tiles_skipped[0], kept.sum(axis=1))
    return kept


def rule(levels: Any, first: int, threshold: float) -> Any:
    """The definition, tile by tile."""
    kept = np.zeros(levels.shape, bool)
    for h, of_head in enumerate(levels):
        best = -np.inf
        for t in range(first, len(of_head)):
            kept[h, t] = not of_head[t] < best + np.log(threshold)
            best = max(best, of_head[t])
    return kept


@pytest.mark.parametrize(
    ("tile_kv", "length", "window", "d_major"),
    [
        (16, 4007, None, False),
        (16, 2049, 1900, True),
        (32, 3001, 2000, False),
        (64, 1501, None, True),
        (128, 3001, None, False),
        (256, 2500, 1900, True),
        (512, 3001, None, False),
        (1024, 5000, None, False),
        (1024, 5000, 3000, True),
    ],
)
def test_every_tile_by_itself(tile_kv: int, length: int, window: int | None, d_major: bool) -> None:
    """Each head's tiles, wherever in items, between items and beside them; levels are quarters, as no decision is."""
    n_tiles = -(-length // tile_kv)
    levels = np.random.default_rng(tile_kv).integers(-12, 13, (4, n_tiles)) / 4
    first = 0 if window is None else (length - 1 - window) // tile_kv
    kept = kept_tiles(levels, tile_kv, length, 0.2, window, n_kv_heads=2, k_d_major=d_major)
    np.testing.assert_array_equal(kept, rule(levels, first, 0.2))


@by_layout
def test_ties_are_kept(d_major: bool) -> None:
    """At threshold 1 a tile stays if its largest score is that of the tiles before it, in items and in cut tiles."""
    levels = np.array([[1, 1, 0.75, 2, 2, 1, 2], [2, 1.75, 2, 2, 2.25, 2.25, 2], [0, -1, -2, -3, -4, -5, 0]])
    expected = np.array([[1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(kept_tiles(levels, 128, 6 * 128 + 5, 1.0, k_d_major=d_major), expected)
    # The first tile is a cut one.
    kept = kept_tiles(levels, 128, 6 * 128 + 5, 1.0, 6 * 128 - 60, k_d_major=d_major)
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize(
    ("window", "d_major"), [(None, False), (None, True), (490, False), (436, True), (60, False), (3, True)]
)
def test_the_first_tile_is_never_skipped(window: int | None, d_major: bool) -> None:
    """Far below zero, and then all others far below it: a whole tile, a cut one, and one that is first and last."""
    length = 8 * 64 - 11
    first = 0 if window is None else (length - 1 - window) // 64
    levels = np.full((2, 8), -1e6)
    levels[0, first] = -20.0
    levels[1, first:] = -1e5 - 20.0 * np.arange(levels[1, first:].size)
    expected = np.zeros((2, 8), bool)
    expected[:, first] = True
    np.testing.assert_array_equal(kept_tiles(levels, 64, length, 0.9, window, k_d_major=d_major), expected)


@pytest.mark.parametrize("size", [1e10, 1e21])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_any_size(sign: int, size: float) -> None:
    """All of one sign: each head has a single key that counts, and keeps the tiles in which its maximum rises."""
    case = SparseCase("large", 4, 2, 16, (300, 75), 0.5, tile_kv=32, window=200)
    q, k, v, options = case.inputs(F32)
    q, k = np.abs(q) * np.float32(size**0.5), sign * np.abs(k) * np.float32(size**0.5)
    options["skip_softmax_threshold"] = case.threshold
    exact = oracle(q, k, v, **options)
    o, lse, stats = skip_softmax_decode(q, k, v, return_lse=True, return_stats=True, target="trn2", **options)
    np.testing.assert_array_equal(stats.tiles_skipped, exact.stats.tiles_skipped)
    assert stats.tiles_skipped.any()
    assert (stats.v_bytes_read < stats.k_bytes_read).any()
    np.testing.assert_array_equal(o, exact.o.astype(np.float32))
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)


@by_layout
def test_needles_at_the_edges_of_tiles(d_major: bool) -> None:
    """A head for each position: its key alone is above the first tile, in a tile that the other heads skip."""
    tile_kv, length = 128, 1290
    positions = [x for t in range(1, 11) for x in (t * tile_kv, t * tile_kv + tile_kv - 1) if x < length] + [length - 1]
    group, d = len(positions), 32
    rng = np.random.default_rng(0)
    q, k, v = np.zeros((1, group, d)), np.zeros((1, length, 1, d)), rng.standard_normal((1, length, 1, d))
    q[0, np.arange(group), np.arange(group)] = 1.0
    k[0, :tile_kv, 0, :group] = 20.0  # the others are at 0, and skipped
    k[0, positions, 0, np.arange(group)] = 60.0
    # Of the tiles with a needle all values are read; only the needle's may show.
    q, k, v = (x.astype(BF16) for x in (q, k, v))
    v[v == 0] = 1
    (o, stats), run = traced(
        q, k, v, skip_softmax_threshold=0.5, softmax_scale=1.0, return_stats=True, k_d_major=d_major
    )
    np.testing.assert_array_equal(o[0], v[0, positions, 0])
    np.testing.assert_array_equal(stats.tiles_skipped[0], 11 - 2)
    assert run.bytes_read("v") == stats.v_bytes_read.sum() == length * d * 2


def test_a_tile_that_one_head_keeps_weighs_nothing_for_the_others() -> None:
    """Larger values in it change the results of the heads that keep it, and no bit of the others'."""
    case = SparseCase("one", 8, 2, 64, (700, 300), 0.5, tile_kv=64, unused=1)
    r = reference(case, BF16)
    kept = r.exact.stats.kept.reshape(2, 2, 4, -1)
    mixed = np.argwhere(kept.any(axis=2) & ~kept.all(axis=2))
    assert len(mixed) > 4
    plain = skip_softmax_decode(r.q, r.k, r.v, target="trn2", **r.options)
    for b, h, t in mixed[:: len(mixed) // 4]:
        v = r.v.copy()
        v[b, t * 64 : (t + 1) * 64, h] *= 100
        changed = (skip_softmax_decode(r.q, r.k, v, target="trn2", **r.options) != plain).any(axis=-1)
        expected = np.zeros((2, 2, 4), bool)
        expected[b, h] = kept[b, h, :, t]
        np.testing.assert_array_equal(changed.reshape(2, 2, 4), expected)


# -- what is read


@by_layout
@pytest.mark.parametrize("window", [None, 250])
def test_every_row_of_v_that_is_needed_is_read_once_and_no_other(window: int | None, d_major: bool) -> None:
    case = SparseCase("v", 4, 2, 64, (700, 300), 0.5, tile_kv=64, window=window, d_major=d_major, unused=4)
    r = reference(case, BF16)
    _, run = traced(r.q, r.k, r.v, **r.options, **case.launch("trn2"))
    keys = run.arguments["v"].shape[2]
    # Rows that nobody needs are NaN.
    needed = np.zeros((2, 2, keys), int)
    needed[:, :, :704] = ~np.isnan(r.v[..., 0].astype(np.float32)).swapaxes(1, 2)
    np.testing.assert_array_equal(rows_read(run, "v").reshape(2, 2, keys), needed)
    assert 0 < needed.sum() < sum(min(n, n if window is None else window + 1) for n in case.lengths) * 2
    if not d_major:
        assert run.bytes_read("k") == r.k_rows.sum() * 64 * 2


@by_layout
def test_values_that_are_not_read_change_no_bit(d_major: bool) -> None:
    """Several trips, whose buffers hold what the trips before left."""
    case = SparseCase("nan", 30, 1, 64, (500, 300, 420, 64, 199), 0.4, tile_kv=64, d_major=d_major, seed=0)
    r = reference(case, BF16)
    how = {"return_lse": True, "target": "trn2"} | r.options | case.launch("trn2")
    poisoned, run = traced(r.q, r.k, r.v, **how)
    assert run.arguments["records"].shape[1] > 2
    _, _, clean, _ = case.inputs(BF16)
    assert np.isnan(r.v.astype(np.float32)).sum() > np.isnan(clean.astype(np.float32)).sum()
    assert_same_bits(poisoned, skip_softmax_decode(r.q, r.k, clean, **how))


# -- equalities between calls


@pytest.mark.parametrize(
    "case",
    [
        SparseCase("plain", 4, 2, 64, (300, 77, 0), 0.3, softmax_scale=-0.3, unused=3),
        SparseCase("d-major", 4, 2, 64, (300, 77), 0.3, d_major=True),
        SparseCase("window", 4, 1, 64, (300, 77), 0.3, window=100),
        SparseCase("packed", 4, 2, 64, (129, 0, 40), 0.3, packed=True, unused=2),
        SparseCase("two-cores", 4, 1, 64, (1000, 77), 0.3, n_cores=2),
    ],
    ids=lambda c: c.name,
)
def test_off_is_flash_decode(case: SparseCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels with the same arguments, and the same bits."""
    calls: list[Any] = []

    def record(kernel: Any, *args: Any, target: str | None = None) -> Any:
        shown = [(x.shape, hash(x.tobytes())) if isinstance(x, np.ndarray) else x for x in args]
        calls.append((kernel.function, target, shown))
        return simulate_kernel(kernel, *args, target=target)

    monkeypatch.setattr(_decode_launch, "simulate_kernel", record)
    q, k, v, options = case.inputs(BF16)
    exact = oracle(q, k, v, skip_softmax_threshold=None, **options).stats
    tile_kv = options.pop("tile_kv")
    how = options | case.launch("trn2") | {"target": "trn2", "return_lse": True, "max_seqlen_kv": 4000}
    dense = flash_decode(q, k, v, **how)
    expected = calls.copy()
    calls.clear()
    visible = [n if case.window is None else min(n, case.window + 1) for n in case.lengths]
    for off in (None, 0) if case.name == "plain" else (None,):
        out, lse_out = np.zeros_like(dense[0]), np.zeros_like(dense[1])
        o, lse, stats = skip_softmax_decode(
            q, k, v, skip_softmax_threshold=off, tile_kv=tile_kv, return_stats=True, out=out, lse=lse_out, **how
        )
        assert_same_bits((o, lse), dense)
        assert_same_bits((out, lse_out), dense)
        assert calls == expected
        calls.clear()
        np.testing.assert_array_equal(stats.tiles_total, exact.tiles_total)
        assert not stats.tiles_skipped.any()
        for rows in (stats.k_bytes_read, stats.v_bytes_read):
            np.testing.assert_array_equal(rows, np.repeat(np.array(visible)[:, None] * 64 * 2, k.shape[-2], axis=1))


def test_a_threshold_that_skips_nothing_is_within_the_budget_of_dense() -> None:
    case = SparseCase("all", 4, 2, 64, (500, 77), 1e-30, tile_kv=32)
    assert not reference(case, BF16).exact.stats.tiles_skipped.any()
    check(case)


@pytest.mark.parametrize(("window", "d_major"), [(None, False), (150, True)])
def test_a_sequence_has_the_same_bits_in_every_batch(window: int | None, d_major: bool) -> None:
    case = SparseCase("b", 6, 3, 16, (200, 64, 1, 293, 0), 0.4, tile_kv=32, window=window, d_major=d_major)
    r = reference(case, BF16)
    how = {"return_lse": True, "return_stats": True, "max_seqlen_kv": 300, "target": "trn2"} | case.launch("trn2")
    options = {name: x for name, x in r.options.items() if name != "seqlens_kv"}
    with columns_by_themselves():
        whole = skip_softmax_decode(r.q, r.k, r.v, **r.options, **how)
        for some in ([3, 0], [4, 1, 2]):
            lengths = np.array(case.lengths)[some]
            part = skip_softmax_decode(r.q[some], r.k[some], r.v[some], seqlens_kv=lengths, **options, **how)
            assert_same_bits(part[:2], (whole[0][some], whole[1][some]))
            for got, expected in zip(part[2], whole[2], strict=True):
                np.testing.assert_array_equal(got, expected[some])


def test_two_cores_equal_one() -> None:
    case = SparseCase("c", 6, 3, 16, (400, 64, 300), 0.4, tile_kv=32, window=250)
    r = reference(case, BF16)
    how = {"return_lse": True, "return_stats": True, "target": "trn2"} | case.launch("trn2") | r.options
    with columns_by_themselves():
        one, two = (skip_softmax_decode(r.q, r.k, r.v, **how | {"n_cores": n}) for n in (1, 2))
    assert_same_bits(two[:2], one[:2])
    for got, expected in zip(two[2], one[2], strict=True):
        np.testing.assert_array_equal(got, expected)
    _, run = traced(r.q, r.k, r.v, **how | {"n_cores": 2})
    products = [run.trace.count("nc_matmul", core=core) for core in (0, 1)]
    assert products[0] == products[1] > 0


def test_another_sequence_may_hold_any_finite_number() -> None:
    case = SparseCase("f", 30, 1, 16, (200, 5, 270), 0.4, tile_kv=32)
    r = reference(case, BF16)
    how = {"return_lse": True, "target": "trn2"} | r.options
    clean = skip_softmax_decode(r.q, r.k, r.v, **how)
    for b, n in enumerate(case.lengths):
        k, v = r.k.copy(), r.v.copy()
        k[b, :n] *= 1e4
        v[b, :n] = 1e30
        got = skip_softmax_decode(r.q, k, v, **how)
        others = np.arange(3) != b
        assert_same_bits((got[0][others], got[1][others]), (clean[0][others], clean[1][others]))


@st.composite
def cases(draw: st.DrawFn) -> SparseCase:
    length = st.one_of(st.integers(0, 400), st.sampled_from([0, 1, 127, 128, 129, 256]))
    packed = draw(st.booleans())
    n_kv_heads = draw(st.integers(1, 3))
    return SparseCase(
        "any",
        n_kv_heads * draw(st.sampled_from([1, 2, 3])),
        n_kv_heads,
        draw(st.sampled_from([24, 64])),
        tuple(draw(st.lists(length, min_size=1, max_size=2))),
        draw(st.sampled_from([1e-3, 0.1, 0.5, 1.0])),
        tile_kv=draw(st.sampled_from([16, 32, 64, 128, 256])),
        unused=draw(st.integers(0, 20)),
        packed=packed,
        d_major=not packed and draw(st.booleans()),
        n_cores=draw(st.integers(1, 2)),
        window=draw(st.one_of(st.none(), st.integers(0, 300))),
        seed=draw(st.integers(0, 99)),
    )


# No shrinking: examples are small, and a shrunk one says no more.
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(cases(), st.sampled_from([BF16, np.dtype(np.float16), F32]), st.sampled_from(["trn1", "trn2", "trn3"]))
@example(SparseCase("many", 9, 9, 24, (130, 5, 0, 300), 0.1, tile_kv=64, window=70, n_cores=2), BF16, "trn2")
def test_any_shape(case: SparseCase, dtype: Any, target: str) -> None:
    q, k, v, options = case.inputs(dtype)
    assume(oracle(q, k, v, skip_softmax_threshold=case.threshold, **options).stats.margin.min() > 1e-3)
    check(case, dtype, target)


# -- what is issued and kept


@pytest.mark.parametrize(
    ("d_major", "tile_kv", "target"),
    [(False, 128, "trn2"), (True, 1024, "trn2"), (False, 64, "trn1")],
)
def test_instructions_per_tile_of_128_keys(d_major: bool, tile_kv: int, target: str) -> None:
    """All instructions of a further item of two lanes, loads included, however many tiles it has."""
    q, k = np.zeros((2, 8, 128), BF16), np.zeros((2, 2 * 8192, 1, 128), BF16)
    _, run = traced(q, k, k, skip_softmax_threshold=0.1, tile_kv=tile_kv, k_d_major=d_major, target=target)
    assert run.item_keys == 8192
    assert run.arguments["records"].shape[3] == 2  # lanes
    counts = [len(step) for step in run.inner_steps()]
    # As of `flash_decode`: on trn1 there are 8 more copies per lane of s-major K.
    more = 16 if target == "trn1" and not d_major else 0
    assert counts == [INSTRUCTIONS_PER_TILE[d_major] * 128 + more]


def memory(n_kv_heads: int, keys: int, d_major: bool = False) -> tuple[int, int]:
    """Bytes of SBUF per partition and banks of PSUM of a program for 8 query heads per KV head and so many keys."""
    q, k = np.zeros((1, 8 * n_kv_heads, 128), BF16), np.zeros((1, 300, n_kv_heads, 128), BF16)
    how = {"max_seqlen_kv": keys, "k_d_major": d_major, "return_stats": True}
    _, run = traced(q, k, k, skip_softmax_threshold=0.1, **how)
    use = run.trace.memory[0]
    return use.sbuf.amount, use.psum.amount


def test_memory_does_not_grow_with_the_cache() -> None:
    assert memory(1, 16384) == memory(1, 2**20)


@by_layout
def test_memory_of_four_lanes(d_major: bool) -> None:
    """What the docstring says of eight KV heads of eight query heads each."""
    sbuf, psum = memory(8, 8192, d_major)
    assert 80 * 1024 < sbuf <= 86 * 1024
    assert psum <= 8


# -- calibration, and the self-check


def test_calibration_counts_the_tiles_that_the_kernel_skips() -> None:
    for name in ("Calibration", "ScaleFactor", "calibrate", "fit_scale_factor"):
        assert getattr(kernel_file, name) is getattr(_skip_calibration, name)
    case = SparseCase("cal", 8, 2, 64, (700, 300), 0.5, tile_kv=64, unused=4, window=600)
    q, k, v, options = case.inputs(BF16)
    thresholds = [0.5, 0.05, 1.0]
    found = kernel_file.calibrate(q, k, v, thresholds, **options)
    for i, threshold in enumerate(thresholds):
        _, stats = skip_softmax_decode(
            q, k, v, skip_softmax_threshold=threshold, return_stats=True, target="trn2", **options
        )
        assert found.sparsity[i] == stats.tiles_skipped.sum() / stats.tiles_total.sum() > 0


@pytest.mark.parametrize("wrong", ["", "lse", "tiles"])
def test_the_self_check_compares_tiles_too(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(*args: Any, **kwargs: Any) -> Any:
        o, lse, stats = skip_softmax_decode(*args, **kwargs)
        if wrong == "tiles":
            stats.tiles_skipped[-1, -1] += 1
        elif wrong == "lse":
            lse[-1] += 1
        return o, lse, stats

    monkeypatch.setattr(kernel_file, "skip_softmax_decode", changed)
    monkeypatch.setattr(kernel_file, "CASES", [case for case in CASES if case.name == "qwen2.5-0.5b"])
    monkeypatch.setattr(sys, "argv", ["skip_softmax_decode.py", "--target", "trn2", "--dtype", "bfloat16"])
    assert kernel_file.main() == bool(wrong)
    assert capsys.readouterr().out.splitlines()[-2].endswith(f"  FAIL ({wrong})" if wrong else "  pass")


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: SparseCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()
    monkeypatch.setattr(_sparse_launch, "simulate_kernel", lambda kernel, *args, target: run_on_device(kernel, *args))
    check(case, dtype)


@pytest.mark.parametrize("d", [192, 256])
def test_large_tiles_under_a_window_fit_the_chip(d: int) -> None:
    """Keys of cut tiles lie in SBUF one per partition, for both sides of every lane: lanes give way to them."""
    q, k = np.zeros((2, 4, d), np.float32), np.ones((2, 4096, 4, d), np.float32)
    o = skip_softmax_decode(q, k, k, skip_softmax_threshold=0.5, tile_kv=1024, window_size=(3000, None))
    np.testing.assert_allclose(o, 1.0, rtol=1e-5)
