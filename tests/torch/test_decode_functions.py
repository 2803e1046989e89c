"""The decode functions of flash-sparse-attn's names: against the oracles, public results, and the NumPy wrappers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contributed._cases import FlashCase, GatedCase, SparseCase
from contributed._checks import FLOATS
from contributed._sparse_launch import TileLaunch
from contributed.flash_decode import flash_decode
from reference.budget import check_budget
from tests.kernels import flash, sparse, test_flash_decode_golden, test_sparse_golden

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from tests.torch.tensors import DTYPES, arrays, by_case, equal, numbers, random, tensors  # noqa: E402

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
NAMES = {"seqlens_kv": "seqused_k", "cu_seqlens_kv": "cu_seqlens_k"}


def call(kind: str, operands: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """o and lse as arrays, from arguments of the NumPy wrapper."""
    given: dict[str, Any] = {"return_lse": True}
    for name, value in options.items():
        if isinstance(value, np.ndarray):
            given[NAMES[name]] = torch.from_numpy(value)
        elif name not in ("softcap", "k_scale", "v_scale", "fast_logsigmoid"):
            given[name] = value
    form = "_varlen" if "cu_seqlens_k" in given else ""
    if form:
        given["max_seqlen_k"] = int(np.diff(options["cu_seqlens_kv"]).max())
    function = getattr(nki_torch, f"flash_{kind}_attn{form}_with_kvcache_func")
    o, lse = function(*tensors(*operands), **given)
    return arrays(o, lse)


DENSE = [
    FlashCase("flat", 8, 2, 64, (130, 130)),
    FlashCase("packed", 4, 2, 80, (0, 1, 129, 33), packed=True, window=50, unused=3),
    FlashCase("one-key", 2, 1, 128, (1,), softmax_scale=0.3),
]


@by_case(DENSE)
def test_dense(case: FlashCase, dtype: str) -> None:
    kind = FLOATS[dtype]
    q, k, v, options = flash.inputs(flash.of_any_launch(case), kind, 1)
    for_o, for_lse = flash.references(flash.of_any_launch(case), kind, 1)
    o, lse = call("dense", (q, k, v), options)
    assert o.dtype == kind
    assert check_budget("o", o, *for_o, kind) <= flash.CEILING[dtype]
    check_budget("lse", lse, *for_lse, np.float32)


LEFT_OUT = [
    SparseCase("sparse", 4, 2, 64, (200, 200), 0.5, tile_kv=32),
    SparseCase("sparse-packed", 4, 1, 64, (129, 0, 100, 1), 0.3, tile_kv=16, packed=True, window=90, unused=3),
    GatedCase("gated", 4, 2, 64, (200, 200), 0.3, tile_kv=32),
    GatedCase("gated-packed", 2, 1, 64, (129, 0, 90), 0.3, tile_kv=16, packed=True, is_logsigmoid=False, unused=2),
]


@by_case(LEFT_OUT)
def test_sparse_and_gated(case: SparseCase, dtype: str) -> None:
    kind = FLOATS[dtype]
    r = sparse.reference(case, kind)
    assert r.exact.stats.margin.min() > 1e-3, "another decision would be right too"
    assert r.exact.stats.tiles_skipped.sum() > 0
    options = {**r.options, "n_splits": 1}
    o, lse = call("gated" if isinstance(case, GatedCase) else "sparse", r.operands, options)
    assert o.dtype == kind
    assert check_budget("o", o, r.exact.o, r.low[0], kind) <= flash.CEILING[dtype]
    check_budget("lse", lse, r.exact.lse, r.low[1], np.float32)


# Of results that differ in thresholds alone those that left out most, and one of each other kind.
GOLDEN_CALLS = [
    ("a", "varlen_sparse_0.1"),
    ("b", "splits1.sparse_0.5"),
    ("b", "splits3.gated_ls1_s0.1_g0.5"),
    ("c", "gated_ls0_s1e-09_g0.5"),
    ("c", "sparse_default"),
]


@pytest.mark.parametrize(("problem", "variant"), GOLDEN_CALLS)
def test_public_results_of_sparse_and_gated(problem: str, variant: str) -> None:
    operands, options = test_sparse_golden.operands(problem, variant)
    got = call("gated" if "gated" in variant else "sparse", operands, options)
    test_sparse_golden.check(problem, variant, got)


@pytest.mark.parametrize(("problem", "variant"), [("a", "dense"), ("c", "varlen_dense_used")])
def test_public_results_of_dense(problem: str, variant: str) -> None:
    q, k, v, *golden = test_flash_decode_golden.load(problem, "q", "k", "v", f"{variant}.o", f"{variant}.lse")
    options = {}
    if variant == "varlen_dense_used":
        tokens, used, _ = test_flash_decode_golden.PROBLEMS[problem]
        k, v = (np.concatenate([x[b, :n] for b, n in enumerate(tokens)]) for x in (k, v))
        options = {"cu_seqlens_kv": np.cumsum([0, *tokens]), "seqlens_kv": np.array(used)}
    expected = test_flash_decode_golden.references(q, k, v, **options)
    test_flash_decode_golden.check(call("dense", (q, k, v), options), tuple(golden), *expected)


def test_default_thresholds_are_the_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """d over the room of a flat cache, over max_seqlen_k of a packed one; not over each sequence's own length."""
    made: list[Any] = []
    limits = TileLaunch.limits
    monkeypatch.setattr(TileLaunch, "limits", lambda *args: made.append(args[2]) or limits(*args))
    q, k, v, alpha, delta = random(1, "float32", (2, 2, 32), (2, 80, 1, 32), (2, 80, 1, 32), (2, 2), (2, 1, 80))
    nki_torch.flash_sparse_attn_with_kvcache_func(q, k, v)
    packed = (k[:, :35].flatten(0, 1), v[:, :35].flatten(0, 1))
    cu = numbers(0, 20, 70)
    nki_torch.flash_sparse_attn_varlen_with_kvcache_func(q, *packed, cu, 64)
    nki_torch.flash_gated_attn_with_kvcache_func(q, k, v, alpha, delta)
    nki_torch.flash_gated_attn_varlen_with_kvcache_func(q, *packed, alpha, delta[0, :, :70], cu, 64, None, 0.0)
    nki_torch.flash_sparse_attn_with_kvcache_func(q, k[:, :9], v[:, :9])
    assert made == [[0.4, 0.4], [0.5, 0.5], [0.4, 0.4], [0.4, 0.4], [0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]


def test_a_threshold_of_0_is_dense() -> None:
    q, k, v = random(2, "bfloat16", (2, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64))
    dense = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, return_lse=True)
    assert equal(nki_torch.flash_sparse_attn_with_kvcache_func(q, k, v, None, 0.0, return_lse=True), dense)


@by_dtype
def test_bits_of_the_numpy_wrapper(dtype: str) -> None:
    q, k, v = random(3, dtype, (2, 4, 64), (2, 150, 2, 64), (2, 150, 2, 64))
    got = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, window_size=(40, 3), return_lse=True)
    expected = flash_decode(*arrays(q, k, v), window_size=(40, 3), return_lse=True)
    assert equal(got, tensors(*expected))


def test_results_go_where_the_caller_says() -> None:
    q, k, v = random(4, "bfloat16", (2, 4, 64), (2, 30, 2, 64), (2, 30, 2, 64))
    alone = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
    wide = torch.full((2, 8, 64), 7.0, dtype=q.dtype)
    out, lse = wide[:, ::2], torch.empty(2, 4)
    got = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, out=out, lse=lse)
    assert got is out
    assert torch.equal(out, alone)
    assert bool((wide[:, 1::2] == 7).all())
    o, logs = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, return_lse=True)
    assert torch.equal(logs, lse)
    again = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, return_lse=True, lse=lse)
    assert again[1] is lse
    assert torch.equal(o, again[0])


def test_operands_of_any_strides() -> None:
    q, k, v = random(5, "bfloat16", (64, 2, 4), (2, 2, 30, 64), (30, 2, 2, 64))
    views = q.permute(1, 2, 0), k.permute(0, 2, 1, 3), v.permute(1, 0, 2, 3)
    got = nki_torch.flash_dense_attn_with_kvcache_func(*views)
    assert torch.equal(got, nki_torch.flash_dense_attn_with_kvcache_func(*(x.contiguous() for x in views)))


def test_gradients_are_refused() -> None:
    q, k, v = random(6, "float32", (1, 2, 32), (1, 9, 1, 32), (1, 9, 1, 32))
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="query requires grad, and flash_dense_attn_with_kvcache_func has no back"):
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
    with torch.no_grad():
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
    alpha, delta = torch.ones(1, 2), torch.ones(1, 1, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="delta requires grad"):
        nki_torch.flash_gated_attn_with_kvcache_func(q.detach(), k, v, alpha, delta)
