"""What the prefill forward leaves out: tiles outside of windows, queries that see nothing, other splits' chunks.

Blocks are small here, so that short sequences have several of them: at the beginning of a sequence, with some of a left
edge's keys, with all of them, and with keys between the edge and the diagonal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from contributed import _prefill_plan
from contributed._prefill_cases import PrefillCase
from contributed.flash_attention_fwd import flash_attention_fwd
from reference.budget import check_budget
from tests.kernels.flash import BF16, CEILING, DTYPES
from tests.kernels.prefill import TILE, Array, assert_same_bits, check_tiles, normal, reference, traced

NM: dict[str, Any] = {"sparsity_n": 2, "recent": 170, "sink": 5, "grid": True}
NM_8: dict[str, Any] = {"sparsity_n": 3, "sparsity_m": 8, "recent": 3, "sink": 131, "grid": True}
SKIP: dict[str, Any] = {"threshold": 0.5, "locality": 6.0}
BOTH: dict[str, Any] = {**SKIP, **NM}
by_target = pytest.mark.parametrize("target", ["trn1", "trn2"])

ALIGNED = PrefillCase("aligned", 1, 1, 16, ((1024, 1280),), left=300)
RAGGED = PrefillCase("ragged", 1, 1, 32, ((640, 700), (300, 340), (130, 400)), left=200, unused=2)
LEFT = PrefillCase("left side alone", 1, 1, 16, ((1024, 1024),), causal=False, left=300)
MORE = PrefillCase("more queries than keys", 1, 1, 32, ((400, 144), (300, 0), (260, 260), (700, 640)), unused=2)
# The first row that sees a key sees one, and the last row of its tile all of the first 128.
RIGHT = PrefillCase("right side alone", 1, 1, 16, ((640, 128),), causal=False, right=100)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of rows, and two of keys."""
    for name, n in (("MOST_TILES", 4), ("MOST_KV_TILES", 2), ("SELECTION_TILES", 2)):
        monkeypatch.setattr(_prefill_plan, name, n)


def check(case: PrefillCase, dtype: Any, target: str, **how: Any) -> None:
    """As `prefill.check`, but for lse: rows of one key have no luck to make a budget of."""
    r = reference(case, dtype)
    how |= {"return_lse": True, "return_stats": True, "target": target}
    o, lse, stats = flash_attention_fwd(r.q, r.k, r.v, **r.options, **how)
    assert check_budget("o", o, r.exact.o, r.low[0], dtype) <= CEILING[dtype.name]
    np.testing.assert_allclose(lse, r.exact.lse, rtol=2e-6, atol=2e-6)
    check_tiles(stats, r.exact)


@by_target
@pytest.mark.parametrize(
    ("case", "several"),
    [(ALIGNED, [NM_8, SKIP, BOTH]), (RAGGED, [NM, SKIP]), (LEFT, [NM, SKIP]), (MORE, [{}, BOTH]), (RIGHT, [NM])],
    ids=lambda x: x.name if isinstance(x, PrefillCase) else "",
)
def test_matches_the_oracle(case: PrefillCase, several: list[dict[str, Any]], target: str) -> None:
    """Results, and with a threshold which tiles are skipped."""
    for i, options in enumerate(several):
        check(replace(case, seed=i, **options), DTYPES[1 + i % 2], target)


def test_decisions_of_several_heads_about_wide_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that leaves pairs to what follows finds none that the chunks on the left edge have left."""
    for name, n in (("MOST_TILES", 16), ("MOST_KV_TILES", 4)):
        monkeypatch.setattr(_prefill_plan, name, n)
    case = PrefillCase("heads", 4, 1, 16, ((512, 1792),), left=1100, **SKIP)
    check(case, BF16, "trn2")
    skipped = ~reference(case, BF16).exact.stats.kept[0]
    first, end = first_and_end(case)
    assert skipped[:, 1:, first[1] + 1].any()
    assert (end - first == 10).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2}, {"skip_softmax_threshold": 0.5}], ids=str)
def test_nothing_is_seen_at_all(causal: bool, options: dict[str, Any]) -> None:
    q, k = normal(1, 130, 1, 16), np.zeros((1, 0, 1, 16), BF16)
    o, lse = flash_attention_fwd(q, k, k, causal=causal, return_lse=True, target="trn2", **options)
    assert (o == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("n_cores", [1, 2])
@pytest.mark.parametrize(("case", "options"), [(ALIGNED, NM), (RAGGED, {}), (MORE, {})], ids=["2-of-4", "", "more"])
def test_splits(case: PrefillCase, options: dict[str, Any], n_cores: int) -> None:
    """The first has the left edge, the last the diagonal; a core may get chunks of neither in their place."""
    check(replace(case, **options), BF16, "trn2", n_splits=2, n_cores=n_cores)


def first_and_end(case: PrefillCase) -> tuple[Array, Array]:
    """The first tile of keys that each tile of rows of a case's one sequence sees, and the one after its last."""
    ((len_q, len_kv),) = case.lengths
    first_row = np.arange(0, len_q, TILE) + len_kv - len_q
    last_row = np.minimum(first_row + TILE, len_kv) - 1
    first = np.maximum(0, first_row - (len_kv if case.left is None else case.left)) // TILE
    return first, (last_row if case.causal else np.full_like(last_row, len_kv - 1)) // TILE + 1


@pytest.mark.parametrize(
    ("options", "n_splits"), [({}, 1), (NM, 1), (SKIP, 1), ({}, 3)], ids=["dense", "2-of-4", "skip", "splits"]
)
@pytest.mark.parametrize(
    "case",
    [ALIGNED, LEFT, replace(ALIGNED, lengths=((512, 512 + 280),)), replace(ALIGNED, lengths=((640, 512),), left=100)],
    ids=["aligned", "left side alone", "off tile edges", "more queries"],
)
def test_no_tile_is_computed_that_is_not_seen(case: PrefillCase, n_splits: int, options: dict[str, Any]) -> None:
    """Products of queries and keys, and exponentials, where nothing is skipped."""
    q, k, v, how = replace(case, **options).inputs(BF16)
    if options is SKIP:
        how["skip_softmax_threshold"] = 1e-30
    _, runs = traced(q, k, v, n_splits=n_splits, **how)
    first, end = first_and_end(case)
    assert runs[0].tiles_of("exp") == np.maximum(0, end - first).sum()


@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2}, {"skip_softmax_threshold": 0.5}, {"n_splits": 2}], ids=str)
@pytest.mark.parametrize(
    ("len_q", "len_kv", "causal", "target"),
    [(300, 630, True, "trn1"), (384, 512, True, "trn2"), (300, 330, False, "trn1")],
)
def test_rows_do_not_notice_what_their_tile_does_not_see(
    len_q: int, len_kv: int, causal: bool, target: str, options: dict[str, Any]
) -> None:
    """NaN in all keys and values before the first tile that a tile of rows sees, and behind the last one."""
    case = PrefillCase("nan", 1, 1, 32, ((len_q, len_kv),), left=140, causal=causal)
    first, end = first_and_end(case)
    q, k, v = normal(1, len_q, 1, 32), normal(1, len_kv, 1, 32), normal(1, len_kv, 1, 32, seed=1)
    how = {"causal": causal, "window_size": (140, None), "return_lse": True, "target": target} | options
    clean = flash_attention_fwd(q, k, v, **how)
    for row_tile in (1, 2):
        seen = np.zeros((1, len_kv, 1, 1), bool)
        seen[:, first[row_tile] * TILE : end[row_tile] * TILE] = True
        got = flash_attention_fwd(q, *(np.where(seen, x, x.dtype.type(np.nan)) for x in (k, v)), **how)
        rows = slice(row_tile * TILE, (row_tile + 1) * TILE)
        assert_same_bits([x[:, rows] for x in got], [x[:, rows] for x in clean])


@pytest.mark.parametrize("options", [{}, {"sparsity_n": 2}, {"skip_softmax_threshold": 0.5}, {"n_splits": 2}], ids=str)
def test_keys_far_before_what_is_seen_may_hold_anything(options: dict[str, Any]) -> None:
    """Sequences begin at other positions in a tile, so that a row tile of one may see a tile more than of the other."""
    q, k, v = normal(256, 1, 16), normal(896, 1, 16), normal(896, 1, 16, seed=1)
    ends = {"cu_seqlens_q": np.array([0, 129, 256]), "cu_seqlens_kv": np.array([0, 640, 896])}
    how = {"window_size": (100, None), "return_lse": True, "target": "trn2"} | ends | options
    clean = flash_attention_fwd(q, k, v, **how)
    # The first key that the first query sees, at 511, is at 411; one tile before that counts as well.
    k[:256] = v[:256] = np.nan
    assert_same_bits(flash_attention_fwd(q, k, v, **how), clean)


@by_target
def test_queries_before_the_first_key_take_no_part(target: str) -> None:
    """They may hold anything; their rows are written though no block has them."""
    q, k = normal(1, 700, 1, 32), normal(1, 150, 1, 32)
    clean = flash_attention_fwd(q, k, k, return_lse=True, target=target)
    q[:, :550] = np.nan
    (o, lse), (run,) = traced(q, k, k, return_lse=True, target=target)
    assert_same_bits((o, lse), clean)
    assert (o[:, :550] == 0).all()
    assert (lse[:, :550] == -np.inf).all()
    # A block of two tiles of rows.
    assert run.tiles_of("exp") == 1 + 2
    assert run.arguments["blocks"].shape[1:] == (1 + 2, TILE, 7, 2)
