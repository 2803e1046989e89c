"""N:M selection in the prefill forward: which keys of every group a query weighs, read off the output.

Keys that all rows of a tile see are compared by the Tensor Engine, if a head dim is at most 128, and so are those on a
diagonal and on the left edge of a window where positions of first rows are multiples of 128; those on others, and those
of larger head dims, by the Vector Engine. Scores here are whole numbers, so that both are
exact, and equal ones are frequent. `PATHS` are shapes for either; each test says by its trace which one it took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from contributed._prefill_cases import PrefillCase
from tests.kernels.flash import BF16, DTYPES, by_dtype, by_target
from tests.kernels.prefill import Array, check, normal, traced, weighed
from tests.kernels.test_flash_decode_properties import columns_by_themselves

ALL_N = [*((n, 4) for n in (1, 2, 3)), *((n, 8) for n in range(1, 8))]
by_n_of_m = pytest.mark.parametrize(("n", "m"), ALL_N, ids=[f"{n}-of-{m}" for n, m in ALL_N])


@dataclass(frozen=True)
class Path:
    """Queries and keys of a sequence, and who compares its scores."""

    name: str
    len_q: int
    len_kv: int
    d: int
    by_tensor: bool
    by_vector: bool
    left: int | None = None
    causal: bool = True


PATHS = [
    # A loop of one chunk of 512 keys that all rows see, and the two tiles that the diagonal crosses.
    Path("tensor and vector", 128, 648, 128, True, True),
    # On the diagonal the second tile of rows sees all of the first tile of keys.
    Path("on a diagonal", 256, 256, 128, True, False),
    Path("large head dim", 128, 640, 160, False, True),
    # Its left edge crosses two of three tiles, then the diagonal crosses two.
    Path("window", 128, 550, 128, True, True, left=400),
    Path("encoder", 130, 380, 128, False, True, causal=False),
    # All rows see all four tiles.
    Path("tensor alone", 128, 512, 128, True, False, causal=False),
]
# A loop of one chunk, whose last tile has keys that rows may have to keep, and the tile on the diagonal; and a diagonal
# over two chunks. Then left edges, that cross two tiles, one, or the one that the diagonal crosses.
KNOWN = [
    Path("loop and diagonal", 128, 640, 128, True, False),
    Path("long diagonal", 640, 640, 128, True, False),
    Path("window", 128, 896, 128, True, False, left=700),
    Path("narrow window", 384, 384, 128, True, False, left=129),
    Path("window of whole tiles", 256, 768, 128, True, False, left=127),
    Path("very narrow window", 256, 256, 128, True, False, left=5),
]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)


def rule(scores: Array, path: Path, n: int, m: int, sink: int = 0, recent: int = 0) -> Array:
    """The definition, key by key, bool [len_q, len_kv]: fewer than n of its group beat a key that stays."""
    i, j = np.arange(path.len_q)[:, None], np.arange(path.len_kv)
    distance = i + path.len_kv - path.len_q - j
    visible = np.ones(distance.shape, bool)
    if path.causal:
        visible &= distance >= 0
    if path.left is not None:
        visible &= distance <= path.left
    x = np.where(visible, scores[np.arange(path.len_q) % len(scores)], -np.inf)
    x = np.pad(x, ((0, 0), (0, -path.len_kv % m)), constant_values=-np.inf).reshape(path.len_q, -1, m)
    beaten = np.zeros(x.shape, int)
    for one in range(m):
        for other in range(m):
            wins = x[..., other] >= x[..., one] if m == 4 and other < one else x[..., other] > x[..., one]
            beaten[..., one] += wins
    stays = (beaten < n).reshape(path.len_q, -1)[:, : path.len_kv]
    return np.asarray(visible & (stays | (j < sink) | ((distance >= 0) & (distance < recent))))


def drawn(path: Path, levels: int, seed: int = 0) -> Array:
    """Scores of as many patterns as there are elements of a query, from so many different numbers."""
    return np.random.default_rng(seed).integers(0, levels, (min(path.d, 64), path.len_kv)).astype(np.float64)


def compare(path: Path, scores: Array, n: int, m: int, sink: int = 0, recent: int = 0, **how: Any) -> None:
    options = {"sparsity_n": n, "sparsity_m": m, "dense_sink_tokens": sink, "dense_recent_tokens": recent}
    window = {"causal": path.causal, "window_size": (path.left, None)}
    got, (run,) = weighed(scores, path.len_q, path.d, **options, **window, **how)
    assert run.compared() == (path.by_tensor, path.by_vector)
    np.testing.assert_array_equal(got, rule(scores, path, n, m, sink, recent))


@by_n_of_m
@pytest.mark.parametrize("several", [PATHS[:3], PATHS[3:]], ids=["causal", "others"])
def test_every_n_of_m(several: list[Path], n: int, m: int) -> None:
    """Four different scores, or two: groups of all kinds of ties. Of the paths one of three."""
    for i, path in enumerate(several):
        if (i + n) % 3 == 0:
            compare(path, drawn(path, 4 if n % 2 else 2), n, m, target=("trn1", "trn2", "trn3")[(n // 3 + i) % 3])


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize(("path", "target"), [(PATHS[0], "trn2"), (PATHS[1], "trn1"), (PATHS[2], "trn3")])
def test_every_pattern_of_ties(path: Path, m: int, target: str) -> None:
    """Each order of at most three scores of four keys, 81; of eight keys some thousand, each with two scores."""
    n_groups = path.len_kv // m
    scores = np.zeros((64, n_groups, m))
    for i in range(64):
        for g in range(n_groups):
            pattern = i * n_groups + g
            scores[i, g] = [pattern // (3 if m == 4 else 2) ** e % (3 if m == 4 else 2) for e in range(m)]
    compare(path, scores.reshape(64, -1), m // 2, m, target=target)
    compare(path, scores.reshape(64, -1), 1, m, target=target)


@by_dtype
def test_all_scores_equal(dtype: Any) -> None:
    """Of four the first n stay, of eight all."""
    for path, n, m in ((PATHS[1], 2, 4), (PATHS[1], 3, 8), (PATHS[3], 3, 8)):
        compare(path, np.full((1, path.len_kv), 2.0), n, m, dtype=dtype)


@pytest.mark.parametrize("m", [4, 8])
@by_target
def test_negative_scores_and_zeros(m: int, target: str) -> None:
    """What is masked ranks below all of them; a product of 0 and a negative number is no different from 0."""
    path = PATHS[1]
    compare(path, drawn(path, 5) - 4.0, m // 2, m, target=target)
    compare(path, -(drawn(path, 2) % 2), 1, m, target=target)


# -- keys that always stay


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("path", PATHS[:4], ids=lambda p: p.name)
def test_sink_at_every_offset(path: Path, m: int) -> None:
    """Exact to the token, wherever in a group, in a tile, and beyond the first one."""
    offsets = [*range(1, m + 2), 127, 128, 129] if path.name == "on a diagonal" else [m + m // 2 - 1, 130]
    for i, sink in enumerate(offsets):
        compare(path, drawn(path, 3), 1, m, sink=sink, target=("trn2", "trn1")[i % 2])


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("path", PATHS[:5], ids=lambda p: p.name)
def test_recent_at_every_offset(path: Path, m: int) -> None:
    """Exact to the token; rows are at all offsets of a group, so that any number of keys is."""
    for i, recent in enumerate((1, 127, 128, 129, m - 1, m, m + 1, 64, 200)):
        if path.name == "on a diagonal" or i < 2:
            compare(path, drawn(path, 3), 1, m, recent=recent, target=("trn2", "trn1")[i % 2])


@pytest.mark.parametrize(
    ("path", "m", "target"),
    [
        *((KNOWN[0], 4, "trn3"), (KNOWN[0], 8, "trn2"), (KNOWN[1], 4, "trn2")),
        *((KNOWN[2], 8, "trn2"), (KNOWN[3], 4, "trn1"), (KNOWN[4], 8, "trn3"), (KNOWN[5], 4, "trn2")),
    ],
)
def test_where_the_program_knows_what_rows_see(path: Path, m: int, target: str) -> None:
    """With keys to keep in none of the tiles before a row's own, in one, in two and in all of a chunk."""
    for i, (sink, recent) in enumerate(((0, 0), (3, 64), (0, 200), (0, 512))):
        if path.left is not None and recent % 64 == 0 and recent != 64:
            continue
        compare(path, drawn(path, 3, seed=i), 1 + i % 2, m, sink=sink, recent=recent, target=target)


def test_recent_and_sink_of_more_keys_than_there_are() -> None:
    """Dense then, also where they are more than a chunk, or just less than one."""
    path = KNOWN[0]
    for recent in (512, 513, 5000):
        # Chunks with keys to keep anywhere are compared by the Vector Engine.
        of_loop = recent <= 512
        like = Path("", 128, 640, 128, of_loop, not of_loop)
        compare(like, drawn(path, 3), 1, 4, recent=recent)
    compare(path, drawn(path, 3), 1, 4, sink=5000)
    compare(path, drawn(path, 3), 2, 8, sink=600, recent=30)


# -- groups at edges


@by_target
@pytest.mark.parametrize("m", [4, 8])
def test_the_diagonal_inside_of_a_group(m: int, target: str) -> None:
    """Later keys of a row's last group have scores above all others, and do not count before they are seen."""
    for len_kv in (96, 104):
        path = Path("", 96, len_kv, 96, len_kv == 96, len_kv > 96)
        scores = np.tile(np.arange(m, dtype=np.float64), len_kv // m)[None]
        compare(path, scores, 1, m, target=target)
        compare(path, scores, 2, m, target=target)


@by_target
@pytest.mark.parametrize("m", [4, 8])
def test_a_window_inside_of_a_group(m: int, target: str) -> None:
    """Earlier keys of a row's first group have scores above all others."""
    path = Path("", 96, 200, 100, False, True, left=41)
    scores = np.tile(np.arange(m, 0, -1, dtype=np.float64), 200 // m)[None]
    compare(path, scores, m // 2, m, target=target)


@pytest.mark.parametrize("m", [4, 8])
def test_a_last_group_that_is_not_full(m: int) -> None:
    for len_kv in range(130, 130 + m):
        path = Path("", 5, len_kv, 32, False, True, causal=False)
        compare(path, drawn(path, 3, seed=len_kv), m // 2, m)


@pytest.mark.parametrize("m", [4, 8])
def test_groups_are_counted_from_the_first_key_of_a_sequence(m: int) -> None:
    """Not from the first row of the packed keys; and a sequence does not take part in groups of another one."""
    lengths = ((3, 5), (130, 131), (40, 211), (2, 7))
    for sink, recent in ((0, 0), (6, 3)):
        case = PrefillCase("g", 2, 1, 32, lengths, sparsity_n=2, sparsity_m=m, sink=sink, recent=recent, grid=True)
        check(case, BF16, "trn2" if sink else "trn1")


# -- results


@by_n_of_m
def test_results_over_several_chunks(n: int, m: int) -> None:
    """Of odd n in two splits."""
    case = PrefillCase("n", 1, 1, 64, ((40, 1064),), sparsity_n=n, sparsity_m=m, recent=n, sink=m - n, grid=True)
    check(case, DTYPES[n % 3], ("trn1", "trn2", "trn3")[n % 3], n_splits=1 + n % 2)


@pytest.mark.parametrize("d", [16, 96, 128, 130, 256])
def test_head_dims(d: int) -> None:
    for i, (n, m) in enumerate(((2, 4), (4, 8))):
        check(PrefillCase("d", 1, 1, d, ((130, 642),), sparsity_n=n, sparsity_m=m, grid=True), DTYPES[i], "trn2")


@by_target
def test_equal_keys_tie_though_their_scores_are_not_exact(target: str) -> None:
    """On either path: scores of equal keys are the same sums in the same order."""
    q = normal(1, 40, 1, 16, dtype=np.float32)
    k = normal(1, 160, 1, 16, dtype=np.float32, seed=1).repeat(4, axis=1)
    v = np.zeros((1, 640, 1, 16), np.float32)
    v[0, np.arange(640), 0, np.arange(640) % 4] = 1.0
    options = {"causal": False, "sparsity_n": 3, "dense_recent_tokens": 0, "target": target}
    with columns_by_themselves():
        for n, paths in ((640, (False, True)), (512, (True, False))):
            o, (run,) = traced(q, k[:, :n], v[:, :n], **options)
            assert run.compared() == paths
            np.testing.assert_allclose(o[..., :4], np.broadcast_to([1 / 3] * 3 + [0], o[..., :4].shape), atol=1e-5)
