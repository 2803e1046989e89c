"""Bad input of skip_softmax_decode: refused by name before any work, results untouched; and where results go."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _decode_launch, _sparse_launch
from contributed._sparse_launch import TileStats
from contributed.skip_softmax_decode import skip_softmax_decode
from reference.budget import check_budget
from reference.rounded_sparse import skip_softmax_decode_rounded
from reference.skip_softmax import skip_softmax_decode as oracle

F8 = ml_dtypes.float8_e4m3
NAN = float("nan")
LIMITS = "allowed None, 0 or a number up to 1"
TILE = "allowed a power of two from 16 to 1024"


def zeros(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype)


Q, K = zeros(2, 4, 8), zeros(2, 10, 2, 8)
PACKED = zeros(20, 2, 8)
CU = np.array([0, 8, 20])
FEW = np.array([3, 10])


def frozen(x: Any) -> Any:
    x.flags.writeable = False
    return x


def overlapping() -> dict[str, Any]:
    """float32 o and lse in one buffer."""
    buffer = zeros(64, dtype=np.float32)
    q, k = Q.astype(np.float32), K.astype(np.float32)
    return {"q": q, "k": k, "v": k, "out": buffer.reshape(2, 4, 8), "lse": buffer[56:].reshape(2, 4)}


def packed(**more: Any) -> dict[str, Any]:
    return {"k": PACKED, "v": PACKED, "cu_seqlens_kv": CU} | more


def wide(group: int, tile_kv: int, **more: Any) -> dict[str, Any]:
    """Groups of more query heads than the keys of a cut tile leave room for."""
    return {"q": zeros(2, 2 * group, 8), "tile_kv": tile_kv, "out": None, "lse": None} | more


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # q
    "q list": ({"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, n_q_heads, d\]"),
    "q ndim 2": ({"q": Q[0]}, ValueError, r"q shape: received \[4, 8\], allowed \[batch, n_q_heads, d\]"),
    "q of several tokens": ({"q": Q[:, None]}, ValueError, r"q shape: received \[2, 1, 4, 8\], allowed \[batch, n_q"),
    "q float64": ({"q": Q.astype(np.float64)}, TypeError, "q dtype: received float64, allowed float32, bfloat16,"),
    "q no batch": ({"q": Q[:0]}, ValueError, r"q shape: received \[0, 4, 8\], allowed .* each at least 1"),
    "d odd": ({"q": zeros(2, 4, 129)}, ValueError, r"head_dim: received 129, allowed 1\.\.128, or even to 256"),
    # k and v
    "k list": ({"k": K.tolist()}, TypeError, "k: received list, allowed a NumPy array"),
    "v list": ({"v": K.tolist()}, TypeError, "v: received list, allowed a NumPy array"),
    "k dtype": ({"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16, that of q"),
    "v dtype": ({"v": K.astype(np.float32)}, TypeError, "v dtype: received float32, allowed float16, that of q"),
    "float8": ({"k": K.astype(F8), "v": K.astype(F8)}, TypeError, "k dtype: received float8_e4m3, allowed float16"),
    "k ndim": ({"k": K[0]}, ValueError, r"k shape: received \[10, 2, 8\], allowed \[2, seqlen_kv, n_kv_heads, 8\]"),
    "k batch": ({"k": K[:1]}, ValueError, r"k shape: received \[1, 10, 2, 8\], allowed \[2, seqlen_kv"),
    "v shape": ({"v": K[:, :9]}, ValueError, r"v shape: received \[2, 9, 2, 8\], allowed \[2, 10, 2, 8\], that of k"),
    "heads": ({"q": Q[:, :3]}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
    "rows": ({"q": zeros(2, 258, 8)}, ValueError, r"n_q_heads / n_kv_heads: received 129, allowed 1\.\.128"),
    # where keys are
    "cu list": (packed(cu_seqlens_kv=[0, 8, 20]), TypeError, r"cu_seqlens_kv: received list, allowed an integer array"),
    "cu shape": (packed(cu_seqlens_kv=CU[:2]), ValueError, r"cu_seqlens_kv shape: received \[2\], allowed \[3\]"),
    "cu beyond": (packed(cu_seqlens_kv=np.array([0, 9, 21])), ValueError, r"cu_seqlens_kv: .*21\], allowed .*0\.\.20"),
    "packed without cu": ({"k": PACKED, "v": PACKED}, ValueError, r"k shape: received \[20, 2, 8\], allowed \[2, seq"),
    "cu d-major": (packed(k_d_major=True), ValueError, "k_d_major: received True, allowed False with cu_seqlens_kv"),
    "lengths list": ({"seqlens_kv": [3, 10]}, TypeError, r"seqlens_kv: received list, allowed an integer array \[2\]"),
    "lengths beyond": ({"seqlens_kv": FEW + 1}, ValueError, r"seqlens_kv\[1\]: received 11, allowed 0\.\.10"),
    "lengths negative": ({"seqlens_kv": FEW - 4}, ValueError, r"seqlens_kv\[0\]: received -1, allowed 0\.\.10"),
    "max_seqlen_kv": (
        {"seqlens_kv": FEW, "max_seqlen_kv": 9},
        ValueError,
        "max_seqlen_kv: received 9, allowed None or 10, the longest of seqlens_kv",
    ),
    # tiles
    **{
        f"tile_kv {x}": ({"tile_kv": x}, ValueError, rf"tile_kv: received {x}, {TILE}")
        for x in (0, 1, 8, 15, 17, 48, 100, 2048, -16, 128.0, True, None, "128")
    },
    # options
    "scale nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
    "window number": ({"window_size": 3}, ValueError, r"window_size: received 3, allowed \(left, right\)"),
    "window left": ({"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed .* None or >= 0"),
    **{f"n_cores {x}": ({"n_cores": x}, ValueError, rf"n_cores: received {x}, allowed 1\.\.2") for x in (0, 3, None)},
    "k_d_major": ({"k_d_major": "yes"}, TypeError, "k_d_major: received 'yes', allowed True or False"),
    # results
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse: received 1, allowed True or False"),
    "return_stats": ({"return_stats": 1}, TypeError, "return_stats: received 1, allowed True or False"),
    "out list": ({"out": Q.tolist()}, TypeError, "out: received list, allowed a NumPy array or None"),
    "out shape": ({"out": Q[:1].copy()}, ValueError, r"out shape: received \[1, 4, 8\], allowed .*2, 4, 8"),
    "out dtype": ({"out": Q.astype(np.float32)}, TypeError, "out dtype: received float32, allowed float16"),
    "out read-only": ({"out": frozen(Q.copy())}, ValueError, "out: received a read-only array, allowed a writeable"),
    "lse shape": ({"lse": zeros(2, 5, dtype=np.float32)}, ValueError, r"lse shape: received \[2, 5\], allowed .*2, 4"),
    "lse dtype": ({"lse": zeros(2, 4)}, TypeError, "lse dtype: received float16, allowed float32"),
    "lse in out": (overlapping(), ValueError, "lse: received an array that overlaps out, allowed memory of its own"),
}  # fmt: skip


# What only a call with a threshold can get wrong.
OF_THE_RULE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{
        f"threshold {x}": ({"skip_softmax_threshold": x}, ValueError, f"_softmax_threshold: received {x}, {LIMITS}")
        for x in (NAN, np.inf, -np.inf, -0.5, -1e-9, 1.0000001, 2, np.float32(1.5), -1)
    },
    **{
        f"threshold {text}": (
            {"skip_softmax_threshold": x},
            TypeError,
            rf"skip_softmax_threshold: received {re.escape(repr(x))}, {LIMITS}",
        )
        for text, x in (("bool", True), ("text", "0.5"), ("array", np.array([0.5])), ("complex", 0.5j), ("list", [0.5]))
    },
    "tile for 128 heads": (wide(128, 1024), ValueError, "tile_kv: received 1024, allowed at most 512 for 128 query"),
    "tile for 65 heads": (wide(65, 1024), ValueError, "tile_kv: received 1024, allowed at most .* for 65 query heads"),
    "tile with a window": (
        wide(33, 1024, window_size=(5, 0)),
        ValueError,
        "tile_kv: received 1024, allowed at most .* for 33 query heads per KV head and a window",
    ),
    "512 with a window": (wide(65, 512, window_size=(5, 0)), ValueError, "tile_kv: received 512, allowed at"),
}  # fmt: skip


def refused(changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a kernel ran")

    for module in (_decode_launch, _sparse_launch):
        monkeypatch.setattr(module, "simulate_kernel", must_not_run)
    results = {"out": np.full((2, 4, 8), 7.0, np.float16), "lse": np.full((2, 4), 7.0, np.float32)}
    args = {"q": Q, "k": K, "v": K, "skip_softmax_threshold": 0.5, **results, **changes}
    q, k, v = (args.pop(name) for name in "qkv")
    with pytest.raises(error, match=text):
        skip_softmax_decode(q, k, v, **args)
    assert all((x == 7.0).all() for x in results.values())


@pytest.mark.parametrize(
    ("changes", "error", "text"), [*CASES.values(), *OF_THE_RULE.values()], ids=[*CASES, *OF_THE_RULE]
)
def test_bad_input_is_named(
    changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(changes, error, text, monkeypatch)


@pytest.mark.parametrize(("changes", "error", "text"), CASES.values(), ids=CASES)
def test_bad_input_is_named_where_nothing_is_skipped(
    changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flash_decode`, which runs then, would take float8 and several tokens."""
    refused({"skip_softmax_threshold": None, **changes}, error, text, monkeypatch)


def test_cases_name_every_argument() -> None:
    named = {name for changes, _, _ in (*CASES.values(), *OF_THE_RULE.values()) for name in changes}
    assert named == set(skip_softmax_decode.__annotations__) - {"return", "target"}


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": "h100"}, "target: received 'h100', allowed trn1"),
        ({"target": "trn1", "n_cores": 2}, r"n_cores: received 2, allowed 1 on trn1"),
    ],
    ids=["target", "two cores on trn1"],
)
def test_what_the_simulator_refuses(changes: dict[str, Any], text: str, threshold: float | None) -> None:
    out, lse = np.full((2, 4, 8), 7.0, np.float16), np.full((2, 4), 7.0, np.float32)
    with pytest.raises(ValueError, match=text):
        skip_softmax_decode(Q, K, K, skip_softmax_threshold=threshold, out=out, lse=lse, **changes)
    assert (out == 7.0).all()
    assert (lse == 7.0).all()


@pytest.mark.parametrize("threshold", [np.int64(1), np.float16(0.5), 5e-324])
def test_thresholds_of_any_type_of_number(threshold: Any) -> None:
    q, k, v = inputs()
    rule = {"skip_softmax_threshold": threshold, "tile_kv": 16}
    _, stats = skip_softmax_decode(q, k, v, return_stats=True, target="trn2", **rule)
    exact = oracle(q, k, v, **rule).stats
    np.testing.assert_array_equal(stats.tiles_skipped, exact.tiles_skipped)
    assert exact.tiles_skipped.any() == (threshold > 0.1)


# -- where results go


def inputs() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(x.shape).astype(np.float16) for x in (Q, zeros(2, 90, 2, 8), zeros(2, 90, 2, 8)))
    return q, 3 * k, v


@lru_cache
def references(threshold: float | None) -> Any:
    q, k, v = inputs()
    rule = {"skip_softmax_threshold": threshold, "tile_kv": 16}
    return oracle(q, k, v, **rule), skip_softmax_decode_rounded(q, k, v, **rule)


@pytest.mark.parametrize(
    ("return_lse", "return_stats", "threshold"),
    [
        (False, False, 0.5),
        (True, False, 0.5),
        (False, True, 0.5),
        (True, True, 0.5),
        (False, True, None),
        (True, True, 0),
    ],
)
def test_results_are_written_and_returned(return_lse: bool, return_stats: bool, threshold: float | None) -> None:
    """`lse` is written whether or not it is returned too."""
    q, k, v = inputs()
    rule = {"skip_softmax_threshold": threshold, "tile_kv": 16}
    # Every other row of a larger array: results need not be contiguous.
    out, lse = np.full((4, 4, 8), 7.0, np.float16), np.full((4, 4), 7.0, np.float32)
    how = {"return_lse": return_lse, "return_stats": return_stats, "target": "trn2"}
    got = skip_softmax_decode(q, k, v, out=out[::2], lse=lse[::2], **rule, **how)
    returned = got if isinstance(got, tuple) else (got,)
    assert len(returned) == 1 + return_lse + return_stats
    for x, buffer in zip(returned[: 1 + return_lse], (out, lse), strict=False):
        assert np.shares_memory(x, buffer)
    exact, low = references(threshold)
    assert exact.stats.tiles_skipped.any() == bool(threshold)
    check_budget("o", out[::2], exact.o, low[0], np.float16)
    check_budget("lse", lse[::2], exact.lse, low[1], np.float32)
    assert (out[1::2] == 7.0).all()
    assert (lse[1::2] == 7.0).all()
    if return_stats:
        stats = returned[-1]
        assert isinstance(stats, TileStats)
        for x, shape in zip(stats, ((2, 4), (2, 4), (2, 2), (2, 2)), strict=True):
            assert (x.dtype, x.shape) == (np.int64, shape)
            assert x.flags.writeable
        np.testing.assert_array_equal(stats.tiles_skipped, exact.stats.tiles_skipped)


def test_what_is_not_asked_for_changes_nothing() -> None:
    """Results have the same bits, alone or beside others, and inputs stay as they are."""
    q, k, v = inputs()
    before = [x.copy() for x in (q, k, v)]
    how = {"skip_softmax_threshold": 0.5, "tile_kv": 16, "target": "trn2"}
    alone = skip_softmax_decode(q, k, v, **how)
    assert isinstance(alone, np.ndarray)
    o, lse, _ = skip_softmax_decode(q, k, v, return_lse=True, return_stats=True, **how)
    np.testing.assert_array_equal(alone, o)
    assert (lse.shape, lse.dtype) == ((2, 4), np.float32)
    np.testing.assert_array_equal(skip_softmax_decode(q, k, v, return_lse=True, **how)[1], lse)
    for x, y in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, y)
