"""Bad input of flash_decode: refused by name before any work, results untouched; and where results are written."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _decode_launch
from contributed.flash_decode import flash_decode
from reference.budget import check_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded

F8 = ml_dtypes.float8_e4m3
NAN = float("nan")


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


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # q
    "q list": ({"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, n_q_heads, d\]"),
    "q None": ({"q": None}, TypeError, "q: received NoneType, allowed a NumPy array"),
    "q ndim 2": ({"q": Q[0]}, ValueError, r"q shape: received \[4, 8\], allowed \[batch, n_q_heads, d\] or"),
    "q ndim 5": ({"q": Q[None, None]}, ValueError, r"q shape: received \[1, 1, 2, 4, 8\], allowed"),
    "q float64": ({"q": Q.astype(np.float64)}, TypeError, "q dtype: received float64, allowed float32, bfloat16,"),
    "q integers": ({"q": Q.astype(np.int32)}, TypeError, "q dtype: received int32, allowed float32"),
    "q float8": ({"q": Q.astype(F8)}, TypeError, "q dtype: received float8_e4m3, allowed float32"),
    "q no batch": ({"q": Q[:0]}, ValueError, r"q shape: received \[0, 4, 8\], allowed .* each at least 1"),
    "q no heads": ({"q": Q[:, :0]}, ValueError, r"q shape: received \[2, 0, 8\], allowed .* each at least 1"),
    "q no tokens": ({"q": zeros(2, 0, 4, 8)}, ValueError, r"q shape: received \[2, 0, 4, 8\], allowed"),
    "d odd": ({"q": zeros(2, 4, 129)}, ValueError, r"head_dim: received 129, allowed 1\.\.128, or even to 256"),
    "d large": ({"q": zeros(2, 4, 258)}, ValueError, r"head_dim: received 258, allowed 1\.\.128, or even to 256"),
    # k and v
    "k list": ({"k": K.tolist()}, TypeError, "k: received list, allowed a NumPy array"),
    "v list": ({"v": K.tolist()}, TypeError, "v: received list, allowed a NumPy array"),
    "k dtype": ({"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16 or float8_e4m3"),
    "v dtype": ({"v": K.astype(F8)}, TypeError, "v dtype: received float8_e4m3, allowed float16, that of k"),
    "k other float8": (
        {"k": K.astype(ml_dtypes.float8_e5m2)},
        TypeError,
        "k dtype: received float8_e5m2, allowed float16 or float8_e4m3",
    ),
    "float8 beside float32": (
        {"q": Q.astype(np.float32), "k": K.astype(F8), "v": K.astype(F8)},
        TypeError,
        "k dtype: received float8_e4m3, allowed float32",
    ),
    "k ndim": ({"k": K[0]}, ValueError, r"k shape: received \[10, 2, 8\], allowed \[2, seqlen_kv, n_kv_heads, 8\]"),
    "k batch": ({"k": K[:1]}, ValueError, r"k shape: received \[1, 10, 2, 8\], allowed \[2, seqlen_kv"),
    "k d": ({"k": K[..., :4]}, ValueError, r"k shape: received \[2, 10, 2, 4\], allowed \[2, seqlen_kv"),
    "v shape": ({"v": K[:, :9]}, ValueError, r"v shape: received \[2, 9, 2, 8\], allowed \[2, 10, 2, 8\], that of k"),
    "k no heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, "n_kv_heads: received 0, allowed >= 1"),
    "heads": (
        {"q": Q[:, :3]},
        ValueError,
        "n_q_heads: received 3, allowed multiples of n_kv_heads=2",
    ),
    "fewer heads": ({"q": Q[:, :1]}, ValueError, "n_q_heads: received 1, allowed multiples of n_kv_heads=2"),
    "rows": (
        {"q": zeros(2, 33, 8, 8)},
        ValueError,
        r"s \* n_q_heads / n_kv_heads: received 132, allowed 1\.\.128",
    ),
    # cu_seqlens_kv
    "cu list": (packed(cu_seqlens_kv=[0, 8, 20]), TypeError, r"cu_seqlens_kv: received list, allowed an integer array"),
    "cu floats": (packed(cu_seqlens_kv=CU * 1.0), TypeError, "cu_seqlens_kv: received float64, allowed an integer"),
    "cu shape": (packed(cu_seqlens_kv=CU[:2]), ValueError, r"cu_seqlens_kv shape: received \[2\], allowed \[3\]"),
    "cu ndim": (packed(cu_seqlens_kv=CU[None]), ValueError, r"cu_seqlens_kv shape: received \[1, 3\], allowed \[3\]"),
    "cu descends": (
        packed(cu_seqlens_kv=np.array([0, 9, 8])),
        ValueError,
        r"cu_seqlens_kv: received \[0, 9, 8\], allowed ascending within 0\.\.20",
    ),
    "cu beyond": (packed(cu_seqlens_kv=np.array([0, 9, 21])), ValueError, r"cu_seqlens_kv: .*21\], allowed .*0\.\.20"),
    "cu negative": (packed(cu_seqlens_kv=np.array([-1, 9, 20])), ValueError, r"cu_seqlens_kv: .*\[-1, .* ascending"),
    "cu with batched": ({"cu_seqlens_kv": CU}, ValueError, r"k shape: received .*, allowed \[total, n_kv_heads, 8\]"),
    "packed without cu": ({"k": PACKED, "v": PACKED}, ValueError, r"k shape: received \[20, 2, 8\], allowed \[2, seq"),
    "cu d-major": (packed(k_d_major=True), ValueError, "k_d_major: received True, allowed False with cu_seqlens_kv"),
    # seqlens_kv
    "lengths list": ({"seqlens_kv": [3, 10]}, TypeError, r"seqlens_kv: received list, allowed an integer array \[2\]"),
    "lengths floats": ({"seqlens_kv": FEW * 1.0}, TypeError, "seqlens_kv: received float64, allowed an integer array"),
    "lengths bool": ({"seqlens_kv": FEW > 3}, TypeError, "seqlens_kv: received bool, allowed an integer array"),
    "lengths shape": ({"seqlens_kv": FEW[:1]}, ValueError, r"seqlens_kv shape: received \[1\], allowed \[2\]"),
    "lengths beyond": ({"seqlens_kv": FEW + 1}, ValueError, r"seqlens_kv\[1\]: received 11, allowed 0\.\.10"),
    "lengths negative": ({"seqlens_kv": FEW - 4}, ValueError, r"seqlens_kv\[0\]: received -1, allowed 0\.\.10"),
    "lengths beyond cu": (packed(seqlens_kv=FEW + 6), ValueError, r"seqlens_kv\[0\]: received 9, allowed 0\.\.8"),
    # options
    "scale nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
    "scale bool": ({"softmax_scale": True}, TypeError, "softmax_scale: received True, allowed a finite number"),
    "scale large": ({"softmax_scale": 1e39}, ValueError, r"softmax_scale: received 1e\+39, allowed a number that is f"),
    "window number": ({"window_size": 3}, ValueError, r"window_size: received 3, allowed \(left, right\)"),
    "window long": ({"window_size": (1, 2, 3)}, ValueError, r"window_size: received \(1, 2, 3\), allowed \(left, r"),
    "window left": ({"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed .* None or >= 0"),
    "window right": ({"window_size": (0, -1)}, ValueError, r"window_size: received \(0, -1\), allowed .* >= 0"),
    "window float": ({"window_size": (1.5, 0)}, ValueError, r"window_size: received \(1.5, 0\), allowed .* >= 0"),
    "window bool": ({"window_size": (True, 0)}, ValueError, r"window_size: received \(True, 0\), allowed .* >= 0"),
    "scale tiny": (
        {"softmax_scale": 1e-38},
        ValueError,
        r"softmax_scale \* k_scale: received 1e-38, allowed 0, or 1e-30",
    ),
    "scales tiny": (
        {"softmax_scale": 1e-20, "k_scale": 1e-19},
        ValueError,
        r"softmax_scale \* k_scale: received .*e-40, allowed 0, or 1e-30",
    ),
    "sinks huge": ({"sinks": np.full(4, -5e30)}, ValueError, r"sinks: received .*, allowed finite numbers in -1e\+30"),
    "slopes steep": (
        {"alibi_slopes": np.full(4, 1.5)},
        ValueError,
        r"alibi_slopes: received .*1.5.*, allowed .*-1.0..1.0",
    ),
    "max_seqlen_kv huge": (
        {"max_seqlen_kv": 2**31},
        ValueError,
        "max_seqlen_kv: received 2147483648, allowed .*16777216",
    ),
    **{
        f"softcap {x}": ({"softcap": x}, ValueError, rf"softcap: received {re.escape(str(x))}, allowed 1e-30")
        for x in (0, -1.0, NAN, np.inf, True, "1", 1e39, 1e-50)
    },
    **{
        f"{name} {text}": ({name: value}, error, rf"{name}.*: received .*{received}, allowed .*{allowed}")
        for name in ("sinks", "alibi_slopes")
        for text, value, error, received, allowed in (
            ("shape", np.zeros(3), ValueError, r"\[3\]", r"\[4\], one per query head"),
            ("number", 1.0, ValueError, r"\[\]", r"\[4\], one per query head"),
            ("nan", [0, 0, 0, NAN], ValueError, r"nan\]", "finite numbers"),
            ("large", [0, 0, 0, 1e39], ValueError, r"inf\]", "finite numbers"),
            ("text", ["a"] * 4, TypeError, "<U1", r"numbers \[4\]"),
            ("bool", [True] * 4, TypeError, "bool", r"numbers \[4\]"),
            ("ragged", [[1], [1, 2]], ValueError, r"\[1, 2\]\]", r"numbers \[4\]"),
            ("void", np.zeros(4, "V4"), TypeError, "V4", r"numbers \[4\]"),
        )
    },
    **{
        f"{name} {text}": ({name: value}, error, rf"{name}.*: received .*{received}, allowed .*{allowed}")
        for name in ("k_scale", "v_scale")
        for text, value, error, received, allowed in (
            ("shape", np.ones(3), ValueError, r"\[3\]", r"\[2\], one per KV head"),
            ("0", 0.0, ValueError, "0.0", "positive finite numbers"),
            ("negative", [1, -1], ValueError, r"-1\]", "positive finite numbers"),
            ("nan", NAN, ValueError, "nan", "positive finite numbers"),
            ("large", 1e39, ValueError, r"1e\+39", "positive finite numbers"),
            ("text", "1", TypeError, "<U1", r"\[2\], one per KV head"),
            ("bool", True, TypeError, "bool", r"\[2\], one per KV head"),
        )
    },
    **{
        f"n_splits {x}": ({"n_splits": x}, ValueError, rf"n_splits: received {x}, allowed 1\.\.64")
        for x in (0, -1, 65, 1.5, True, "2")
    },
    **{
        f"n_cores {x}": ({"n_cores": x}, ValueError, rf"n_cores: received {x}, allowed 1\.\.2")
        for x in (0, 3, None, 1.0)
    },
    **{
        f"max_seqlen_kv {x}": (
            {"seqlens_kv": FEW, "max_seqlen_kv": x},
            ValueError,
            f"max_seqlen_kv: received {x}, allowed None or 10, the longest of seqlens_kv, .. 16777216",
        )
        for x in (9, -1, 10.5, True, "10")
    },
    "k_d_major": ({"k_d_major": "yes"}, TypeError, "k_d_major: received 'yes', allowed True or False"),
    # results
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse: received 1, allowed True or False"),
    "out list": ({"out": Q.tolist()}, TypeError, "out: received list, allowed a NumPy array or None"),
    "out shape": ({"out": Q[:1].copy()}, ValueError, r"out shape: received \[1, 4, 8\], allowed .*2, 4, 8"),
    "out dtype": ({"out": Q.astype(np.float32)}, TypeError, "out dtype: received float32, allowed float16"),
    "out read-only": ({"out": frozen(Q.copy())}, ValueError, "out: received a read-only array, allowed a writeable"),
    "lse list": ({"lse": [0.0]}, TypeError, "lse: received list, allowed a NumPy array or None"),
    "lse shape": ({"lse": zeros(2, 5, dtype=np.float32)}, ValueError, r"lse shape: received \[2, 5\], allowed .*2, 4"),
    "lse dtype": ({"lse": zeros(2, 4)}, TypeError, "lse dtype: received float16, allowed float32"),
    "lse read-only": ({"lse": frozen(zeros(2, 4, dtype=np.float32))}, ValueError, "lse: received a read-only array"),
    "lse in out": (overlapping(), ValueError, "lse: received an array that overlaps out, allowed memory of its own"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), CASES.values(), ids=CASES)
def test_bad_input_is_named(
    changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a kernel ran")

    monkeypatch.setattr(_decode_launch, "simulate_kernel", must_not_run)
    results = {"out": np.full((2, 4, 8), 7.0, np.float16), "lse": np.full((2, 4), 7.0, np.float32)}
    args = {"q": Q, "k": K, "v": K, **results, **changes}
    q, k, v = (args.pop(name) for name in "qkv")
    with pytest.raises(error, match=text):
        flash_decode(q, k, v, **args)
    assert all((x == 7.0).all() for x in results.values())


def test_cases_name_every_argument() -> None:
    named = {name for changes, _, _ in CASES.values() for name in changes}
    arguments = set(flash_decode.__annotations__) - {"return", "target"}
    assert named == arguments


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"target": "h100"}, ValueError, "target: received 'h100', allowed trn1"),
        ({"target": "trn1", "n_cores": 2}, ValueError, r"n_cores: received 2, allowed 1 on trn1"),
    ],
    ids=["target", "two cores on trn1"],
)
def test_what_the_simulator_refuses(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    out, lse = np.full((2, 4, 8), 7.0, np.float16), np.full((2, 4), 7.0, np.float32)
    with pytest.raises(error, match=text):
        flash_decode(Q, K, K, out=out, lse=lse, **changes)
    assert (out == 7.0).all()
    assert (lse == 7.0).all()


# -- where results go


def inputs() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*x.shape[:-1], 64)).astype(np.float16) for x in (Q, K, K))
    return q, k, v


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("s", [None, 2])
def test_results_are_written_and_returned(s: int | None, return_lse: bool, n_splits: int) -> None:
    """`lse` is written whether or not it is returned too."""
    q, k, v = inputs()
    if s is not None:
        q = np.stack([q] * s, axis=1)
    # Every other row of a larger array: results need not be contiguous.
    out = np.full((2 * q.shape[0], *q.shape[1:]), 7.0, np.float16)
    lse = np.full(out.shape[:-1], 7.0, np.float32)
    got = flash_decode(q, k, v, out=out[::2], lse=lse[::2], return_lse=return_lse, n_splits=n_splits, target="trn2")
    returned = got if return_lse else (got,)
    assert len(returned) == 1 + return_lse
    for x, buffer in zip(returned, (out, lse), strict=False):
        assert np.shares_memory(x, buffer)
    exact, low = oracle(q, k, v), flash_decode_rounded(q, k, v)
    check_budget("o", out[::2], exact.o, low[0], np.float16)
    check_budget("lse", lse[::2], exact.lse, low[1], np.float32)
    assert (out[1::2] == 7.0).all()
    assert (lse[1::2] == 7.0).all()


def test_what_is_not_asked_for_is_not_returned() -> None:
    q, k, v = inputs()
    alone = flash_decode(q, k, v, target="trn2")
    assert isinstance(alone, np.ndarray)
    o, lse = flash_decode(q, k, v, target="trn2", return_lse=True)
    np.testing.assert_array_equal(alone, o)
    assert lse.shape == (2, 4)
    assert lse.dtype == np.float32


def test_the_largest_scale_leaves_an_empty_sequence_empty() -> None:
    """Masks times the scale stay finite: an empty sequence is 0 beside one whose scores are of order 1."""
    q, k = np.full((2, 1, 64), 1e-5, np.float32), np.full((2, 8, 1, 64), 1e-5, np.float32)
    o, lse = flash_decode(q, k, k, seqlens_kv=np.array([0, 8]), softmax_scale=1e8, return_lse=True)
    assert (o[0] == 0).all()
    assert lse[0, 0] == -np.inf
    np.testing.assert_allclose(o[1], 1e-5, rtol=1e-6)
    np.testing.assert_allclose(lse[1], 0.64 + np.log(8), rtol=1e-6)
