"""Runs of the prefill forward against its oracle, traces of them, and which keys a row weighs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from contributed import _prefill_launch
from contributed._prefill_cases import PrefillCase
from contributed._prefill_plan import Geometry
from contributed.flash_attention_fwd import flash_attention_fwd
from nkisim import Trace, simulate
from nkisim.trace import Engine
from reference.budget import check_budget
from reference.flash_attention import FlashAttention
from reference.flash_attention import flash_attention as oracle
from reference.rounded_attention import flash_attention_rounded
from tests.kernels.flash import BF16, CEILING

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 128  # rows, and keys, of a tile
# Float32 scores of order 1 are within a thousandth of this of the oracle's, so that decisions are the same.
MARGIN = 1e-3


class Reference(NamedTuple):
    """A case with what has to come out of it; not to be changed."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]
    exact: FlashAttention
    low: tuple[Array, Array]
    """o and lse with the machine's roundings, in several orders of summation."""


def reference(case: PrefillCase, dtype: Any) -> Reference:
    """Inputs whose decisions are clear, and the oracle's results."""
    return _reference(replace(case, name=""), dtype)


@lru_cache(maxsize=256)
def _reference(case: PrefillCase, dtype: Any) -> Reference:
    q, k, v, options = case.inputs(dtype)
    exact = oracle(q, k, v, **options)
    stats = exact.stats
    assert stats.margin.min(initial=np.inf) > MARGIN, case
    assert stats.selection_margin.min(initial=np.inf) > MARGIN, case
    return Reference(q, k, v, options, exact, flash_attention_rounded(q, k, v, **options))


def check(case: PrefillCase, dtype: Any = BF16, target: str = "trn2", **launch: Any) -> None:
    """o and lse of a case within their ceilings, and the tiles of every head exactly the oracle's."""
    r = reference(case, dtype)
    got = flash_attention_fwd(r.q, r.k, r.v, return_lse=True, return_stats=True, target=target, **r.options, **launch)
    check_results(got, r)


def check_results(got: Any, r: Reference) -> None:
    """o, lse and stats of a call."""
    o, lse, stats = got
    assert o.dtype == r.q.dtype
    assert lse.dtype == np.float32
    share = check_budget("o", o, r.exact.o, r.low[0], o.dtype)
    assert share <= CEILING[o.dtype.name], f"o: {share:.2f} of the budget"
    check_budget("lse", lse, r.exact.lse, r.low[1], np.float32)
    check_tiles(stats, r.exact)


def check_tiles(stats: Any, exact: FlashAttention) -> None:
    """Counts, and which tiles."""
    for name in ("tiles_total", "tiles_skipped"):
        got, expected = getattr(stats, name), getattr(exact.stats, name)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected, err_msg=name)
    assert len(stats.kept) == len(exact.stats.kept)
    for got, expected in zip(stats.kept, exact.stats.kept, strict=True):
        assert got.dtype == np.bool_
        np.testing.assert_array_equal(got, expected)


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_bits(got: Any, expected: Any) -> None:
    """Arrays of the same types, and equal to the sign of zero."""
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))


@dataclass(frozen=True)
class Run:
    """A kernel's trace and its arguments by name."""

    trace: Trace
    arguments: dict[str, Any]

    def bytes_read(self, name: str) -> int:
        """Bytes of an argument that the kernel reads."""
        reads = (access for record in self.trace.records for access in record.reads)
        return sum(a.nbytes for a in reads if a.storage.is_argument and a.storage.name == name)

    def program(self) -> list[Any]:
        """What its instructions are and how large."""
        return [
            (r.core, r.engine, r.instruction, *((a.shape, a.dtype) for a in (*r.writes, *r.reads)))
            for r in self.trace.records
        ]

    def tiles_of(self, function: str) -> float:
        """Tiles of 128 x 128 that the Scalar Engine takes a function of; what is smaller does not count."""
        taken = [r.writes[0] for r in self.trace.records if r.attrs.get("op") == function]
        return sum(x.n_elements for x in taken if x.free_size >= TILE) / TILE**2

    def compared(self) -> tuple[bool, bool]:
        """Whether N:M selection has scores compared by the Tensor Engine, and by the Vector Engine."""
        records = self.trace.records
        by_vector = any(r.attrs.get("op") == "greater_equal" and r.engine is Engine.vector for r in records)
        return any(r.attrs.get("op") == "sign" for r in records), by_vector


def traced(*args: Any, target: str = "trn2", geometry: Geometry | None = None, **kwargs: Any) -> tuple[Any, list[Run]]:
    """What `flash_attention_fwd` returns and the kernels it ran; `geometry` replaces the one it would choose."""
    runs = []

    def record(kernel: Any, *kernel_args: Any, target: str | None = None) -> Any:
        runs.append(Run(Trace(), dict(inspect.signature(kernel.function).bind(*kernel_args).arguments)))
        return simulate(kernel, target=target, trace=runs[-1].trace)(*kernel_args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prefill_launch, "simulate_kernel", record)
        if geometry is not None:
            patch.setattr(_prefill_launch, "choose_geometry", lambda *_, **__: geometry)
        return flash_attention_fwd(*args, target=target, **kwargs), runs


def normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def weighed(scores: Array, len_q: int, d: int = 64, dtype: Any = BF16, **options: Any) -> tuple[Array, list[Run]]:
    """Which keys each query weighs, bool [len_q, n_keys], read off the output; and the kernel's runs.

    Query i is a unit vector, and has scores[i % len(scores)]; values are unit vectors, those of as many KV heads as it
    takes to tell all keys apart.

    Args:
        scores: [patterns, n_keys], numbers of at most 16 in size that bfloat16 has.
        len_q: queries of the one sequence.
        d: head dim, at least `patterns`.
        dtype: of q, k and v.
        options: of `flash_attention_fwd` and `traced`.
    """
    patterns, n_keys = scores.shape
    n_heads = -(-n_keys // d)
    q, k, v = (np.zeros((1, n, n_heads, d)) for n in (len_q, n_keys, n_keys))
    q[0, np.arange(len_q), :, np.arange(len_q) % patterns] = 1.0
    k[0, :, :, :patterns] = scores.T[:, None]
    v[0, np.arange(n_keys), np.arange(n_keys) // d, np.arange(n_keys) % d] = 1.0
    arrays = [x.astype(dtype) for x in (q, k, v)]
    o, runs = traced(*arrays, softmax_scale=1.0, **options)
    return o[0].reshape(len_q, n_heads * d)[:, :n_keys] > 0, runs
