"""The prefill forward against the oracle, and what the kernel computes, reads and keeps in memory."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import numpy as np
import pytest

import contributed.flash_attention_fwd as kernel_file
from contributed import _prefill_launch
from contributed._nki import has_device, run_on_device
from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Geometry
from contributed.flash_attention_fwd import CASES, flash_attention_fwd
from tests.kernels.flash import BF16, DTYPES, TARGETS, by_dtype, by_target
from tests.kernels.prefill import TILE, assert_same_bits, check, check_results, normal, reference, traced

F32, F16 = DTYPES[0], DTYPES[2]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


# Of nine pairs of types and targets each case sees two; neighbouring cases see other ones. The self-check has them all.
RUNS = [
    pytest.param(case, DTYPES[(i + j) % 3], TARGETS[(i + j + i // 3) % 3], id=f"{case.name}-{j}")
    for i, case in enumerate(CASES)
    for j in range(2)
]


@pytest.mark.parametrize(("case", "dtype", "target"), RUNS)
def test_matches_the_oracle(case: PrefillCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


def test_every_type_and_target_has_a_case_of_each_kind() -> None:
    def kind(case: PrefillCase) -> tuple[bool, bool]:
        return case.sparsity_n > 0, case.threshold is not None

    seen: dict[tuple[bool, bool], set[Any]] = {}
    for run in RUNS:
        case, dtype, target = run.values
        seen.setdefault(kind(case), set()).update((dtype, target))
    assert set(seen) == {(False, False), (True, False), (False, True), (True, True)}
    for some, of_kind in seen.items():
        if some != (True, True):  # one case
            assert of_kind == {*DTYPES, *TARGETS}


class _CalledError(Exception):
    """A kernel was to run."""


def arguments_of(case: PrefillCase) -> dict[str, Any]:
    """What the kernel is called with; nothing runs."""
    calls = []

    def keep(kernel: Any, *args: Any, target: str | None = None) -> Any:
        calls.append(dict(inspect.signature(kernel.function).bind(*args).arguments))
        raise _CalledError

    q, k, v, options = case.inputs(BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prefill_launch, "simulate_kernel", keep)
        with pytest.raises(_CalledError):
            flash_attention_fwd(q, k, v, **options)
    return calls[0]


# No chunk has a row too many if each sequence is as long as a chunk, or ends with one.
WHOLE = PrefillCase("whole-tiles", 4, 2, 64, ((256, 256), (256, 256)), unused=1)


def test_whole_tiles() -> None:
    for dtype, target in zip(DTYPES, TARGETS, strict=True):
        check(WHOLE, dtype, target)
    check(dataclasses.replace(WHOLE, lengths=((1024, 1024),), n_q_heads=2))


def test_cases_see_every_kind_of_program() -> None:
    """Each flag of the program on and off, loops of no, one and several chunks, several chunks on the diagonal."""
    seen = [arguments_of(case) for case in (*CASES, WHOLE)]
    for flag in ("masked", "plain", "guarded", "ragged"):
        assert {call[flag] for call in seen} == {False, True}, flag
    assert {call["overhang"] for call in seen} == {0, 1, 2}
    loops = np.concatenate([np.diff(call["bounds"][..., :2]).ravel() for call in seen])
    assert {0, 1, 2} <= set(loops.tolist())
    geometries = [Geometry(x["heads"], x["blocks"].shape[4], x["chunks"].shape[3] - 3, x["overhang"]) for x in seen]
    assert max(g.n_diagonal for g in geometries) > 1
    for m in (4, 8):
        assert {0, m} <= {call["sparsity_m"] for call in seen}


def test_cases_skip_and_keep_tiles() -> None:
    for case in CASES:
        if case.threshold is not None:
            stats = reference(case, BF16).exact.stats
            assert 0 < stats.tiles_skipped.sum() < stats.tiles_total.sum(), case.name


# -- shapes


@pytest.mark.parametrize("head_dim", [1, 16, 32, 80, 96, 127, 130, 192, 256])
@pytest.mark.parametrize("long", [False, True])
def test_head_dims(head_dim: int, long: bool) -> None:
    """In float32 on a diagonal, and in a loop of two bytes."""
    if long:
        check(PrefillCase("d", 2, 1, head_dim, ((40, 1300),)), BF16, "trn3")
    else:
        check(PrefillCase("d", 2, 1, head_dim, ((131, 131),)), F32, "trn1" if head_dim % 32 else "trn2")


@pytest.mark.parametrize(("group", "n_kv_heads"), [(1, 3), (2, 2), (3, 1), (4, 1), (5, 2), (8, 1), (16, 1), (67, 1)])
def test_groups(group: int, n_kv_heads: int) -> None:
    """Of 67, a prime above the tiles of a block, every head has blocks of its own."""
    batched = group % 2 == 0
    check(PrefillCase("g", group * n_kv_heads, n_kv_heads, 16, ((130, 200),), batched=batched), (BF16, F16)[batched])


@pytest.mark.parametrize("options", [{}, {"skip_softmax_threshold": 0.3}], ids=["dense", "skip"])
def test_blocks_begin_without_the_outputs_of_others(options: dict[str, Any]) -> None:
    """Those of the first one are infinite, and in part normalised while others are in work."""
    q, k, v = normal(1, 600, 16, 16), normal(1, 600, 2, 16, seed=1), normal(1, 600, 2, 16, seed=2)
    v[:, :, 0] = 3e38
    o = flash_attention_fwd(q, k, v, **options)
    assert not np.isfinite(o[0, 1:, :8].astype(np.float32)).all()
    assert_same_bits([o[:, :, 8:]], [flash_attention_fwd(q[:, :, 8:], k[:, :, 1:], v[:, :, 1:], **options)])


def test_lengths_around_the_edges_of_tiles() -> None:
    edges = (0, 1, 2, 127, 128, 129, 255, 256, 257)
    same = tuple((n, n) for n in edges)
    longer = tuple((n, n + more) for n in edges[1:] for more in (1, 127, 128))
    shorter = tuple((n, max(0, n - less)) for n in edges[1:] for less in (1, 128))
    for i, lengths in enumerate((same, longer, shorter, tuple((3, n) for n in edges))):
        check(PrefillCase("n", 1, 1, 16, lengths, unused=2, seed=1), DTYPES[i % 3], "trn2")
        check(PrefillCase("n", 1, 1, 16, lengths, unused=2, seed=1, causal=False), DTYPES[(i + 1) % 3], "trn1")


@pytest.mark.parametrize("len_kv", [1023, 1024, 1025, 1152, 2047, 2048, 2049])
def test_lengths_around_the_edges_of_chunks(len_kv: int) -> None:
    for i, len_q in enumerate((1, 128, 129)):
        check(PrefillCase("n", 1, 1, 16, ((len_q, len_kv),), causal=i != 1), DTYPES[i])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [None, 0, 1, 127, 128, 300])
def test_windows(left: int | None, causal: bool) -> None:
    """Right sides count beside a causal mask only if there is none."""
    for i, right in enumerate((None, 130) if causal else (None, 0, 1, 130)):
        case = PrefillCase("w", 2, 1, 16, ((150, 400), (129, 129), (5, 3)), causal, left, right, unused=1)
        check(case, (BF16, F16)[i % 2], ("trn1", "trn2")[i // 2])


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.5, -1e-3, 1e-30])
def test_softmax_scale(scale: float) -> None:
    for i, options in enumerate(({}, {"left": 60}, {"causal": False, "threshold": 0.9})):
        case = PrefillCase("scale", 2, 1, 64, ((130, 300),), softmax_scale=scale, locality=3.0, **options)
        if case.threshold and abs(scale) < 0.01:
            continue  # nothing to decide
        check(case, DTYPES[i], "trn2")


def test_nothing_is_wanted_of_a_scale_of_0_with_a_threshold() -> None:
    """All scores are equal, so no tile is below another one."""
    check(PrefillCase("scale", 2, 1, 64, ((130, 300),), softmax_scale=0.0, threshold=0.5))


def test_a_large_scale() -> None:
    """Scores of order 1 by products of 1e-8; an empty sequence beside them stays empty."""
    q, k = (np.full((5, 1, 64), 1e-5, np.float32) for _ in "qk")
    how = {"cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_kv": np.array([0, 0, 5])}
    o, lse = flash_attention_fwd(q, k, k, softmax_scale=1e8, return_lse=True, causal=False, target="trn1", **how)
    assert (o[:2] == 0).all()
    assert (lse[:2] == -np.inf).all()
    np.testing.assert_allclose(o[2:], 1e-5, rtol=1e-6)
    np.testing.assert_allclose(lse[2:], 0.64 + np.log(5), rtol=1e-6)


# -- launches


GEOMETRIES = [Geometry(*x, overhang=2) for x in ((1, 1, 1), (1, 2, 2), (2, 1, 3), (2, 4, 1), (1, 4, 8), (2, 2, 5))]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g.heads}x{g.q_tiles}x{g.kv_tiles}")
@pytest.mark.parametrize("options", [{}, {"left": 200}], ids=["dense", "window"])
def test_blocks_and_chunks_of_any_size(geometry: Geometry, options: dict[str, Any]) -> None:
    """What large inputs have: several blocks of a sequence, whole and not, and several chunks of all kinds."""
    case = PrefillCase("any", 2, 1, 32, ((300, 700), (513, 513), (1, 130)), seed=3, **options)
    r = reference(case, BF16)
    target = TARGETS[(GEOMETRIES.index(geometry) + len(options)) % 3]
    how = {"return_lse": True, "return_stats": True, "target": target}
    got, (run,) = traced(r.q, r.k, r.v, geometry=geometry, **how, **r.options)
    assert run.arguments["chunks"].shape[3] == 3 + geometry.kv_tiles
    check_results(got, r)


EDGES = [Geometry(*x, overhang=2) for x in ((1, 1, 3), (1, 2, 1), (2, 1, 3), (1, 4, 2), (1, 4, 8), (2, 2, 1))]


@pytest.mark.parametrize("geometry", EDGES, ids=lambda g: f"{g.heads}x{g.q_tiles}x{g.kv_tiles}")
@pytest.mark.parametrize("right", [0, 100])
def test_left_edges_of_windows(geometry: Geometry, right: int) -> None:
    """Of blocks that have all of it, with keys between it and the diagonal and without, and of blocks that do not."""
    lengths = ((300, 700), (641, 641), (1, 330))
    case = PrefillCase("edge", 2, 1, 32, lengths, seed=3, causal=right == 0, left=200, right=right)
    r = reference(case, BF16)
    # The last row of a tile sees up to 100 keys more, and positions may be up to 127 beyond the first row's tile.
    geometry = dataclasses.replace(geometry, left_tiles=2, overhang=2 if right == 0 else 3)
    how = {"return_lse": True, "return_stats": True, "target": TARGETS[geometry.q_tiles % 3]}
    got, (run,) = traced(r.q, r.k, r.v, geometry=geometry, **how, **r.options)
    edges = np.diff(run.arguments["bounds"][..., 4:6]).ravel()
    assert set(edges.tolist()) == {0, 1}
    check_results(got, r)


@pytest.mark.parametrize(
    ("len_q", "len_kv", "left", "right", "tiles"),
    # Row tiles see as many tiles of keys as the window crosses, the first and the last ones fewer.
    [
        (1024, 1024, 255, None, 1 + 2 + 6 * 3),
        (512, 2048, 1023, None, 4 * 9),
        (1024, 1024, 128, 128, 2 + 6 * 3 + 2),
    ],
)
def test_tiles_outside_a_window_are_not_computed(
    len_q: int, len_kv: int, left: int, right: int | None, tiles: int
) -> None:
    """All heads and rows of a block share chunks; one beyond the last key is computed in part."""
    q, k = np.zeros((1, len_q, 2, 16), BF16), np.zeros((1, len_kv, 1, 16), BF16)
    how = {"causal": right is None, "window_size": (left, right)}
    (_, stats), (run,) = traced(q, k, k, return_stats=True, **how)
    assert stats.tiles_total.tolist() == [[tiles, tiles]]
    assert run.tiles_of("exp") == 2 * (tiles + (0 if right is None else 1))


def test_row_tiles_that_all_blocks_have_are_moved_as_a_whole() -> None:
    """Two of three, and one row by row."""
    q = normal(1, 300, 1, 64)
    _, (run,) = traced(q, q, q)
    assert run.arguments["sure_tiles"] == 2
    moved = [x.writes[0].shape for x in run.trace.records if x.instruction == "dma_copy"]
    # Queries of the block and, ahead of the work, of one that there is not; results.
    assert moved.count((128, 2, 64)) == moved.count((128, 64)) == 3


def test_left_edges_on_two_cores() -> None:
    """A block with all of its edge beside one without: the other core gets chunks of no keys."""
    r = reference(PrefillCase("edge", 2, 1, 32, ((256, 640), (128, 128)), left=200), BF16)
    geometries = [Geometry(2, 1, 2, 1, n_cores=n, left_tiles=2) for n in (1, 2)]
    got, other = (
        traced(r.q, r.k, r.v, return_lse=True, return_stats=True, geometry=g, **r.options)[0] for g in geometries
    )
    check_results(other, r)
    for a, b in zip(got[:2], other[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("geometry", [Geometry(2, 2, n, 0) for n in (1, 3)], ids=lambda g: f"{g.kv_tiles}")
def test_chunks_without_a_diagonal(geometry: Geometry) -> None:
    r = reference(PrefillCase("any", 2, 1, 32, ((300, 700), (40, 129)), causal=False, left=400, right=150), F16)
    got, _ = traced(r.q, r.k, r.v, return_lse=True, return_stats=True, geometry=geometry, **r.options)
    check_results(got, r)


SPLIT = PrefillCase("splits", 2, 1, 32, ((33, 1290), (130, 400), (1, 300), (4, 0)))


@pytest.mark.parametrize(
    ("n_splits", "options"),
    [
        (2, {}),
        (3, {"causal": False}),
        (3, {"left": 500}),
        (10, {}),
        (2, {"sparsity_n": 2, "grid": True, "recent": 20}),
    ],
    ids=["causal", "encoder", "window", "10", "2-of-4"],
)
def test_splits(n_splits: int, options: dict[str, Any]) -> None:
    """Some of them have nothing."""
    check(dataclasses.replace(SPLIT, **options), (BF16, F16)[n_splits % 2], "trn2", n_splits=n_splits)


def test_splits_of_the_other_targets_and_types() -> None:
    for target in ("trn1", "trn3"):
        check(SPLIT, F32, target, n_splits=2)


def test_two_cores_do_half_of_the_work_each() -> None:
    q, k = normal(1, 256, 4, 64), normal(1, 640, 4, 64)
    _, (run,) = traced(q, k, k, n_cores=2)
    products = [run.trace.count("nc_matmul", core=core) for core in (0, 1)]
    assert products[0] == products[1] > 0


def test_one_block_on_two_cores_is_split_if_its_keys_are_many() -> None:
    q, long, short = normal(1, 5, 4, 64), normal(1, 4096, 1, 64), normal(1, 600, 1, 64)
    _, (run, combine) = traced(q, long, long, n_cores=2)
    assert run.arguments["n_splits"] == 2
    assert {record.core for record in run.trace.records} == {0, 1}
    assert combine.arguments["o"].shape == (2, 20, 64)
    _, (run,) = traced(q, short, short, n_cores=2)
    assert run.arguments["n_splits"] == 1


# -- what is computed and read


@by_target
@pytest.mark.parametrize(
    ("len_q", "len_kv", "tiles"),
    # Of n tiles of rows 1 + 2 + .. + n; between tile edges one more for each tile of rows that crosses one.
    [(1, 1, 1), (128, 128, 1), (512, 512, 10), (1100, 1100, 45), (128, 1152, 9), (128, 1100, 9), (130, 1154, 19)],
)
def test_tiles_past_the_diagonal_are_not_computed(len_q: int, len_kv: int, tiles: int, target: str) -> None:
    """Exponentials are of those tiles that hold a visible score, beside at most one for a tile of rows.

    Chunks of the loop are computed as a whole, so that these sequences have whole ones, or the whole of a shorter one.
    """
    q, k = np.zeros((1, len_q, 2, 16), BF16), np.zeros((1, len_kv, 1, 16), BF16)
    (_, stats), (run,) = traced(q, k, k, return_stats=True, target=target)
    assert stats.tiles_total.tolist() == [[tiles, tiles]]
    n_row_tiles = -(-len_q // TILE)
    beside = 0 if (len_kv - len_q) % TILE == 0 else n_row_tiles
    assert 2 * tiles <= run.tiles_of("exp") <= 2 * (tiles + beside)


def test_keys_and_values_are_read_once_for_all_heads_of_a_group() -> None:
    """A whole chunk, and the one that begins the next loads; twice as many heads read no more."""
    read = []
    for group in (4, 8):
        q, k = normal(1, 128, group, 64), normal(1, 2048 + 128, 1, 64)
        _, (run,) = traced(q, k, k)
        read.append((run.bytes_read("k"), run.bytes_read("v")))
    assert read[0] == read[1]
    # Three chunks of 1024 keys, and those that loads run ahead by.
    for n in read[0]:
        assert 3 * 1024 * 64 * 2 <= n <= 5 * 1024 * 64 * 2


def test_a_window_of_a_long_sequence_costs_the_window() -> None:
    q, k = np.zeros((1, 128, 1, 64), BF16), np.zeros((1, 8192, 1, 64), BF16)
    _, (run,) = traced(q, k, k, window_size=(511, 0))
    # Two chunks of 1024 keys, and those that loads run ahead by.
    assert run.bytes_read("k") <= 4 * 1024 * 64 * 2
    assert run.tiles_of("exp") < 14


# -- memory


def test_memory_does_not_grow_with_the_keys() -> None:
    peaks = []
    for n in (2048, 6144):
        q, k = np.zeros((1, 1, 8, 128), BF16), np.zeros((1, n, 1, 128), BF16)
        _, (run,) = traced(q, k, k)
        use = run.trace.memory[0]
        peaks.append((use.sbuf.amount, use.psum.amount))
    assert peaks[0] == peaks[1]


def full_block(d: int, dtype: Any, target: str, n_keys: int = 2, **options: Any) -> Any:
    """The run of 64 heads, and chunks as of 1024 keys, though queries need no more than `n_keys`."""
    q, k = np.zeros((2, 64, d), dtype), np.ones((n_keys + 1024, 1, d), dtype)
    how = {"cu_seqlens_q": np.array([0, 2, 2]), "cu_seqlens_kv": np.array([0, n_keys, n_keys + 1024])}
    o, (run,) = traced(q, k, k, target=target, **how, **options)
    np.testing.assert_allclose(o.astype(np.float32), 1.0, rtol=2.0**-7)
    assert run.arguments["chunks"].shape[3] == 3 + (4 if "sparsity_n" in options else 8)
    return run


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_memory_of_a_full_block(target: str) -> None:
    """What the docstring says of 64 tiles of rows, and a head dim of 128 in two bytes."""
    run = full_block(128, BF16, target)
    assert run.arguments["heads"] == 64
    use = run.trace.memory[0]
    assert 100 * 1024 < use.sbuf.amount <= 144 * 1024
    assert use.psum.amount <= 8


EVERYTHING = {"sparsity_n": 4, "sparsity_m": 8, "skip_softmax_threshold": 0.5, "dense_sink_tokens": 1}


@pytest.mark.parametrize(
    ("d", "dtype", "options"),
    [
        (64, F32, EVERYTHING),
        (80, F32, {"skip_softmax_threshold": 0.5}),
        (128, BF16, EVERYTHING),
        (128, BF16, {"sparsity_n": 4, "sparsity_m": 8, "window_size": (100, None), "n_keys": 130}),
        (160, F32, {"skip_softmax_threshold": 0.5}),
        (256, F16, {}),
    ],
)
def test_full_blocks_of_other_sizes_fit_the_chip(d: int, dtype: Any, options: dict[str, Any]) -> None:
    """The simulator refuses what trn1, which has the least, has no room for."""
    assert full_block(d, dtype, "trn1", **options).arguments["heads"] >= 16


# -- the self-check


@pytest.mark.parametrize("wrong", ["", "lse", "tiles"])
def test_the_self_check_compares_tiles_too(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(*args: Any, **kwargs: Any) -> Any:
        o, lse, stats = flash_attention_fwd(*args, **kwargs)
        if wrong == "tiles":
            stats.tiles_skipped[-1, -1] += 1
        elif wrong == "lse":
            lse[-1] += 1
        return o, lse, stats

    monkeypatch.setattr(kernel_file, "flash_attention_fwd", changed)
    monkeypatch.setattr(kernel_file, "CASES", [case for case in CASES if case.name == "skip-encoder"])
    monkeypatch.setattr(sys, "argv", ["flash_attention_fwd.py", "--target", "trn2", "--dtype", "bfloat16"])
    assert kernel_file.main() == bool(wrong)
    assert capsys.readouterr().out.splitlines()[-2].endswith(f"  FAIL ({wrong})" if wrong else "  pass")


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: PrefillCase, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_device()
    monkeypatch.setattr(_prefill_launch, "simulate_kernel", lambda kernel, *args, target: run_on_device(kernel, *args))
    check(case, dtype)
