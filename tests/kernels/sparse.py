"""Runs of threshold-sparse and gated decode against their oracles, and what is read off results made to show it."""

from __future__ import annotations

import dataclasses
import inspect
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from contributed import _sparse_launch
from contributed._cases import GatedCase, SparseCase
from contributed.sparse_decode import gated_decode, sparse_decode
from nkisim import Trace, simulate
from reference import sparse_decode as oracle
from reference.budget import check_budget
from reference.rounded_sparse import gated_decode_rounded, sparse_decode_rounded
from reference.sparse_decode import SparseDecode
from tests.kernels.flash import CEILING, Run

WRAPPER = {False: sparse_decode, True: gated_decode}
ORACLE = {False: oracle.sparse_decode, True: oracle.gated_decode}
TWIN = {False: sparse_decode_rounded, True: gated_decode_rounded}


class Reference(NamedTuple):
    """A case's operands, arguments that oracle and wrapper share, and what is expected."""

    operands: tuple[Any, ...]
    options: dict[str, Any]
    exact: SparseDecode
    low: tuple[Any, Any]


def reference(case: SparseCase, dtype: Any) -> Reference:
    """The same for every launch; not to be changed."""
    return _reference(dataclasses.replace(case, name="", d_major=False, n_cores=1), dtype)


@lru_cache(maxsize=128)
def _reference(case: SparseCase, dtype: Any) -> Reference:
    *operands, options = case.inputs(dtype)
    options |= {"softmax_threshold": case.threshold, "n_splits": case.n_splits}
    gated = isinstance(case, GatedCase)
    if isinstance(case, GatedCase):
        alpha, delta, how = case.gate_inputs(dtype)
        operands += [alpha, delta]
        options |= how | {"gate_threshold": case.gate_threshold}
    exact, low = ORACLE[gated](*operands, **options), TWIN[gated](*operands, **options)
    return Reference(tuple(operands), options, exact, low)


def check(case: SparseCase, dtype: Any, target: str = "trn2") -> Reference:
    """o and lse of a case within their ceilings, and every count as it is."""
    r = reference(case, dtype)
    assert r.exact.stats.margin.min() > 1e-3, "another decision would be right too"
    gated = isinstance(case, GatedCase)
    how = {} if gated else case.launch(target)
    got = WRAPPER[gated](*r.operands, **r.options, **how, target=target, return_lse=True, return_stats=True)
    check_results(got[:2], r.operands[0].dtype, r.exact, r.low)
    check_stats(got[2], r.exact, case.lengths, case.window, case.tile_kv, r.operands[0])
    return r


def check_results(got: Any, dtype: Any, exact: SparseDecode, low: tuple[Any, Any]) -> None:
    """o and lse within their ceilings."""
    o, lse = got
    assert o.dtype == dtype
    assert lse.dtype == np.float32
    share = check_budget("o", o, exact.o, low[0], dtype)
    assert share <= CEILING[dtype.name], f"o: {share:.2f} of the budget"
    check_budget("lse", lse, exact.lse, low[1], np.float32)


def check_stats(stats: Any, exact: SparseDecode, lengths: Any, window: int | None, tile_kv: int, q: Any) -> None:
    """Tiles of each split, and of the tiles whose K or V is read the rows that can be seen."""
    want = exact.stats
    rows = np.zeros((len(lengths), 1, want.kept.shape[-1]), np.int64)
    for b, n in enumerate(lengths):
        for key in range(0 if window is None else max(0, n - 1 - window), n):
            rows[b, 0, key // tile_kv] += 1
    row_bytes = q.shape[-1] * q.dtype.itemsize
    expected = {
        "tiles_total": want.tiles_total,
        "tiles_skipped": want.tiles_skipped,
        "k_bytes_read": row_bytes * (want.keys_read * rows).sum(axis=-1),
        "v_bytes_read": row_bytes * (want.kept * rows).sum(axis=-1),
    }
    assert stats._fields == tuple(expected)
    for name, x in expected.items():
        assert getattr(stats, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(stats, name), x, err_msg=name)


def traced(gated: bool, *operands: Any, target: str = "trn2", **options: Any) -> tuple[Any, list[Run]]:
    """What the wrapper returns, and the runs of its kernels: decode, and combine with splits."""
    runs = []

    def record(kernel: Any, *args: Any, target: str | None = None) -> Any:
        runs.append(Run(Trace(), dict(inspect.signature(kernel.function).bind(*args).arguments)))
        return simulate(kernel, target=target, trace=runs[-1].trace)(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_launch, "simulate_kernel", record)
        return WRAPPER[gated](*operands, target=target, **options), runs


def rows_read(run: Run, name: str) -> Any:
    """How often gathers read each row of s-major K, or of V."""
    x = run.arguments[name]
    width = x.shape[-1]
    counts = np.zeros(x.size // width, np.int64)
    for record in run.trace.records:
        for access in record.reads:
            if access.storage.is_argument and access.storage.name == name:
                assert access.rows is not None
                for start in access.rows:
                    counts[start // width : start // width + access.free_size // width] += 1
    return counts


class Shown(NamedTuple):
    """What a run says of one sequence."""

    kept: Any
    """Tiles in the result of each KV head: [n_kv_heads, n_tiles], read off o."""
    read: Any
    """Rows of K read by each KV head, from the counts."""
    skipped: Any
    """[n_kv_heads, n_splits]."""


def show(levels: Any, tile_kv: int, length: int, *, window: int | None = None, **options: Any) -> Shown:
    """Which tiles are in the result of one sequence whose scores are made for it, at a scale of 1.

    Args:
        levels: [n_kv_heads, group, n_tiles], a head's largest score in each tile, at a key of its own; other scores are
            0 to 2 below. With linear gates that is so with the gate.
        tile_kv: keys of a tile.
        length: keys.
        window: keys to the left; keys before it would have scores of 100.
        options: of the call; with `delta` [n_kv_heads, length] and `alpha` [n_kv_heads, group] the gated one.
    """
    rng = np.random.default_rng(length)
    levels = np.asarray(levels, np.float64)
    n_kv_heads, group, n_tiles = levels.shape
    assert n_tiles == -(-length // tile_kv)
    d = 256
    first = 0 if window is None else max(0, length - 1 - window)
    # Head h has its scores in element h of keys; values say of which tile they are.
    q, k, v = np.zeros((1, n_kv_heads * group, d)), np.zeros((1, length, n_kv_heads, d)), np.zeros((1, length, d))
    for kv, h in np.ndindex(n_kv_heads, group):
        q[0, kv * group + h, h] = 1.0
        for t in range(first // tile_kv, n_tiles):
            seen = slice(max(first, t * tile_kv), min(length, (t + 1) * tile_kv))
            scores = levels[kv, h, t] - rng.integers(0, 9, seen.stop - seen.start) / 4
            scores[rng.integers(scores.size)] = levels[kv, h, t]
            k[0, seen, kv, h] = scores
    k[:, :first, :, :group] = 100.0
    assert n_tiles <= d
    v[0, np.arange(length), np.arange(length) // tile_kv] = 1.0
    operands = [q, k, np.repeat(v[:, :, None], n_kv_heads, axis=2)]
    gated = "delta" in options
    if gated:
        alpha, delta = np.asarray(options.pop("alpha")), np.asarray(options.pop("delta"))
        operands += [alpha.reshape(1, -1), delta[None]]
        if not options.get("is_logsigmoid_gate", True):
            k[0, first:, :, :group] -= np.einsum("hg,hj->jhg", alpha, delta[:, first:])
    how = {"tile_kv": tile_kv, "window_size": (window, None), "return_stats": True, "softmax_scale": 1.0} | options
    o, stats = WRAPPER[gated](*(x.astype(np.float32) for x in operands), target="trn2", **how)
    # A tile's weights are added up in its element of o; every head of a group has the same tiles.
    by_group = (o[0, :, :n_tiles] > 0).reshape(n_kv_heads, group, n_tiles)
    assert (by_group == by_group[:, :1]).all()
    assert (o[0, :, n_tiles:] == 0).all()
    kept = by_group[:, 0]
    assert (stats.tiles_total[0].sum(axis=-1) == n_tiles - first // tile_kv).all()
    np.testing.assert_array_equal((stats.tiles_total - stats.tiles_skipped)[0].sum(axis=-1), kept.sum(axis=-1))
    return Shown(kept, stats.k_bytes_read[0] // (4 * d), stats.tiles_skipped[0])


def visits(length: int, tile_kv: int, n_splits: int = 1, window: int | None = None) -> list[list[int]]:
    """Tiles with a visible key in the order in which each split visits them."""
    first = 0 if window is None else max(0, length - 1 - window)
    n_tiles = -(-length // tile_kv)
    run = -(-n_tiles // n_splits)
    seen = range(first // tile_kv, n_tiles)
    return [[t for t in range((i + 1) * run - 1, i * run - 1, -1) if t in seen] for i in range(n_splits)]


def stay(values: Any, order: list[int], threshold: float) -> list[int]:
    """The tiles of `order` that one test leaves, tile by tile as the rule says it."""
    best, left = -np.inf, []
    for t in order:
        if values[t] - best < np.log(threshold):
            continue
        left.append(t)
        best = max(best, values[t])
    return left
