"""Bad input of the prefill forward: refused by name before any work; and where results are written."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _prefill_checks, _prefill_launch
from contributed.flash_attention_fwd import flash_attention_fwd
from reference.budget import check_budget
from reference.flash_attention import flash_attention as oracle
from reference.rounded_attention import flash_attention_rounded

NAN = float("nan")


def zeros(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype)


Q, K = zeros(2, 3, 4, 8), zeros(2, 10, 2, 8)
PACKED_Q, PACKED_K = zeros(6, 4, 8), zeros(20, 2, 8)
CU_Q, CU_KV = np.array([0, 2, 6]), np.array([0, 8, 20])


def frozen(x: Any) -> Any:
    x.flags.writeable = False
    return x


def overlapping() -> dict[str, Any]:
    """float32 o and lse in one buffer."""
    buffer = zeros(192, dtype=np.float32)
    q, k = Q.astype(np.float32), K.astype(np.float32)
    return {"q": q, "k": k, "v": k, "out": buffer.reshape(2, 3, 4, 8), "lse": buffer[168:].reshape(2, 3, 4)}


def packed(**more: Any) -> dict[str, Any]:
    of_call = {"q": PACKED_Q, "k": PACKED_K, "v": PACKED_K, "cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV}
    results = {"out": np.full(PACKED_Q.shape, 7.0, np.float16), "lse": np.full((6, 4), 7.0, np.float32)}
    return of_call | results | more


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # q, k and v
    "q list": ({"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, seqlen, heads, d\]"),
    "k None": ({"k": None}, TypeError, "k: received NoneType, allowed a NumPy array"),
    "v list": ({"v": K.tolist()}, TypeError, "v: received list, allowed a NumPy array"),
    "q ndim": ({"q": Q[0]}, ValueError, r"q shape: received \[3, 4, 8\], allowed \[batch, seqlen, heads, d\]"),
    "k ndim": ({"k": K[0]}, ValueError, r"k shape: received \[10, 2, 8\], allowed \[batch, seqlen, heads, d\]"),
    "v ndim": ({"v": K[0]}, ValueError, r"v shape: received \[10, 2, 8\], allowed \[batch, seqlen, heads, d\]"),
    "q float64": ({"q": Q.astype(np.float64)}, TypeError, "q dtype: received float64, allowed float32, bfloat16,"),
    "q integers": ({"q": Q.astype(np.int32)}, TypeError, "q dtype: received int32, allowed float32"),
    "k float8": ({"k": K.astype(ml_dtypes.float8_e4m3)}, TypeError, "k dtype: received float8_e4m3, allowed float32"),
    "k dtype": ({"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16, that of q"),
    "v dtype": ({"v": K.astype(np.float32)}, TypeError, "v dtype: received float32, allowed float16, that of q"),
    "v shape": ({"v": K[:, :9]}, ValueError, r"v shape: received \[2, 9, 2, 8\], allowed \[2, 10, 2, 8\], that of k"),
    "v d": ({"v": K[..., :4]}, ValueError, r"v shape: received \[2, 10, 2, 4\], allowed \[2, 10, 2, 8\], that of k"),
    "k d": ({"k": K[..., :4], "v": K[..., :4]}, ValueError, r"k shape: received \[2, 10, 2, 4\], allowed head dim 8"),
    "k batch": ({"k": K[:1], "v": K[:1]}, ValueError, r"k shape: received \[1, 10, 2, 8\], allowed batch 2, that of q"),
    "no batch": ({"q": Q[:0], "k": K[:0], "v": K[:0]}, ValueError, r"q shape: received .*, allowed batch at least 1"),
    "d 0": ({"q": zeros(2, 3, 4, 0)}, ValueError, r"head_dim: received 0, allowed 1\.\.128, or even to 256"),
    "d odd": ({"q": zeros(2, 3, 4, 129)}, ValueError, r"head_dim: received 129, allowed 1\.\.128, or even to 256"),
    "d large": ({"q": zeros(2, 3, 4, 258)}, ValueError, r"head_dim: received 258, allowed 1\.\.128, or even to 256"),
    "k no heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, r"heads: received \(4, 0\), allowed at least 1"),
    "q no heads": ({"q": Q[:, :, :0]}, ValueError, r"heads: received \(0, 2\), allowed at least 1 each"),
    "heads": ({"q": Q[:, :, :3]}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
    "fewer heads": ({"q": Q[:, :, :1]}, ValueError, "n_q_heads: received 1, allowed multiples of n_kv_heads=2"),
    # cu_seqlens
    "packed q without cu": (
        {"q": PACKED_Q},
        ValueError,
        r"q shape: received \[6, 4, 8\], allowed \[batch, seqlen, heads, d\]",
    ),
    "batched with cu": (
        {"cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV},
        ValueError,
        r"q shape: received \[2, 3, 4, 8\], allowed \[total, heads, d\] with cu_seqlens_q and cu_seqlens_kv",
    ),
    "packed batched k": (packed(k=K), ValueError, r"k shape: received \[2, 10, 2, 8\], allowed \[total, heads, d\]"),
    **{
        f"{name} {text}": (packed(**{name: value}), error, rf"{name}.*: received {received}, allowed .*{allowed}")
        for name, total in (("cu_seqlens_q", 6), ("cu_seqlens_kv", 20))
        for text, value, error, received, allowed in (
            ("alone", None, TypeError, "NoneType", r"an integer array \[batch \+ 1\]"),
            ("list", [0, 2, 6], TypeError, "list", "an integer array"),
            ("floats", CU_Q * 1.0, TypeError, "float64", "an integer array"),
            ("bool", CU_Q > 1, TypeError, "bool", "an integer array"),
            ("ndim", CU_Q[None], ValueError, r"\[1, 3\]", r"\[batch \+ 1\]"),
            ("one", CU_Q[:1], ValueError, r"\[0\]", f"at least 2 numbers, ascending within 0..{total}"),
            ("none", CU_Q[:0], ValueError, r"\[\]", "at least 2 numbers"),
            ("descends", np.array([0, 5, 4]), ValueError, r"\[0, 5, 4\]", f"ascending within 0..{total}"),
            ("beyond", np.array([0, 5, 21]), ValueError, r"\[0, 5, 21\]", f"ascending within 0..{total}"),
            ("negative", np.array([-1, 5, 6]), ValueError, r"\[-1, 5, 6\]", "ascending within"),
        )
    },
    "cu lengths": (
        packed(cu_seqlens_kv=np.array([0, 20])),
        ValueError,
        "cu_seqlens_kv: received 2 numbers, allowed 3 numbers, as cu_seqlens_q",
    ),
    # what a query sees
    **{
        f"causal {x}": ({"causal": x}, TypeError, f"causal: received {x!r}, allowed True or False")
        for x in (1, None, "yes")
    },
    **{
        f"window {x}": ({"window_size": x}, ValueError, rf"window_size: received {re.escape(str(x))}, allowed \(left,")
        for x in (3, None, (1, 2, 3), (1,), (-1, 0), (0, -1), (1.5, 0), (0, "1"), (True, 0))
    },
    # scale
    "scale nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    "scale inf": ({"softmax_scale": -np.inf}, ValueError, "softmax_scale: received -inf, allowed a finite number"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
    "scale bool": ({"softmax_scale": True}, TypeError, "softmax_scale: received True, allowed a finite number"),
    **{
        f"scale {x}": (
            {"softmax_scale": x},
            ValueError,
            rf"softmax_scale: received {re.escape(str(x))}, allowed 0, or 1e-30\.\.100000000.0 in size",
        )
        for x in (1.1e8, -1e9, 9e-31, -1e-40)
    },
    # selection
    **{
        f"sparsity_m {x}": ({"sparsity_m": x}, ValueError, f"sparsity_m: received {x}, allowed 4 or 8")
        for x in (0, 2, 16, None, True, 4.0, "4")
    },
    **{
        f"sparsity_n {n} of {m}": (
            {"sparsity_n": n, "sparsity_m": m},
            ValueError,
            rf"sparsity_n: received {n}, allowed None or 0\.\.{m}",
        )
        for n, m in ((-1, 4), (5, 4), (9, 8), (2.0, 4), (True, 4), ("2", 4))
    },
    **{
        f"{name} {x}": ({name: x}, ValueError, rf"{name}: received {re.escape(str(x))}, allowed 0\.\.16777215")
        for name in ("dense_sink_tokens", "dense_recent_tokens")
        for x in (-1, 2**24, 1.0, None, True)
    },
    # skip-softmax
    **{
        f"threshold {x}": (
            {"skip_softmax_threshold": x},
            ValueError,
            rf"skip_softmax_threshold: received {re.escape(str(x))}, allowed None, or a number in 0\.\.1",
        )
        for x in (NAN, np.inf, -0.1, 1.001, "0.5", True)
    },
    # launches
    **{
        f"n_splits {x}": ({"n_splits": x}, ValueError, rf"n_splits: received {x}, allowed 1\.\.64")
        for x in (0, -1, 65, 1.5, True, "2")
    },
    "n_splits with threshold": (
        {"n_splits": 2, "skip_softmax_threshold": 0.5},
        ValueError,
        r"n_splits: received 2, allowed 1\.\.1",
    ),
    **{
        f"n_cores {x}": ({"n_cores": x}, ValueError, rf"n_cores: received {x}, allowed 1\.\.2")
        for x in (0, 3, None, 1.0, True)
    },
    "n_cores with threshold": (
        {"n_cores": 2, "skip_softmax_threshold": 0.5, "target": "trn2"},
        ValueError,
        r"n_cores with skip_softmax_threshold: received 2, allowed 1\.\.1",
    ),
    "cores of trn1": ({"n_cores": 2, "target": "trn1"}, ValueError, "n_cores: received 2, allowed 1 on trn1"),
    "cores of inf2": ({"n_cores": 2, "target": "inf2"}, ValueError, "n_cores: received 2, allowed 1 on inf2"),
    # results
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse: received 1, allowed True or False"),
    "return_stats": ({"return_stats": None}, TypeError, "return_stats: received None, allowed True or False"),
    "out list": ({"out": Q.tolist()}, TypeError, "out: received list, allowed a NumPy array or None"),
    "out shape": ({"out": Q[:1].copy()}, ValueError, r"out shape: received \[1, 3, 4, 8\], allowed .*2, 3, 4, 8"),
    "out dtype": ({"out": Q.astype(np.float32)}, TypeError, "out dtype: received float32, allowed float16"),
    "out read-only": ({"out": frozen(Q.copy())}, ValueError, "out: received a read-only array, allowed a writeable"),
    "lse list": ({"lse": [0.0]}, TypeError, "lse: received list, allowed a NumPy array or None"),
    "lse shape": ({"lse": zeros(2, 3, 5, dtype=np.float32)}, ValueError, r"lse shape: received \[2, 3, 5\], allowed"),
    "lse dtype": ({"lse": zeros(2, 3, 4)}, TypeError, "lse dtype: received float16, allowed float32"),
    "lse read-only": ({"lse": frozen(zeros(2, 3, 4, dtype=np.float32))}, ValueError, "lse: received a read-only array"),
    "lse in out": (overlapping(), ValueError, "lse: received an array that overlaps out, allowed memory of its own"),
}  # fmt: skip


def refused(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    """Nothing runs, and results keep what they had."""
    results = {"out": np.full(Q.shape, 7.0, np.float16), "lse": np.full((2, 3, 4), 7.0, np.float32)}
    args = {"q": Q, "k": K, "v": K, **results, **changes}
    before = {name: np.copy(args[name]) for name in ("out", "lse")}
    given = {name: args[name] for name in before}
    operands = [args.pop(name) for name in "qkv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prefill_launch, "simulate_kernel", lambda *_, **__: pytest.fail("a kernel ran"))
        with pytest.raises(error, match=text):
            flash_attention_fwd(*operands, **args)
    for name, x in given.items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize(("changes", "error", "text"), CASES.values(), ids=CASES)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(changes, error, text)


def test_cases_name_every_argument() -> None:
    named = {name for changes, _, _ in CASES.values() for name in changes}
    assert named == set(flash_attention_fwd.__annotations__) - {"return"}


def test_sizes_and_lengths_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller limits, as arrays of those are too large for a test."""
    with monkeypatch.context() as patch:
        patch.setattr(_prefill_checks, "MAX_INDEX", Q.size - 1)
        refused({}, ValueError, f"q size: received {Q.size}, allowed at most {Q.size - 1}")
        patch.setattr(_prefill_checks, "MAX_INDEX", K.size - 1)
        refused({}, ValueError, f"k size: received {K.size}, allowed at most {K.size - 1}")
    monkeypatch.setattr(_prefill_checks, "ROWS_MAX", 65)
    longest = zeros(2, 65, 2, 8)
    refused({"k": longest, "v": longest}, ValueError, "length: received 65, allowed less than 65")
    q = zeros(2, 66, 4, 8)
    refused({"q": q, "out": None, "lse": None}, ValueError, "length: received 66, allowed less than 65")


def test_a_target_that_there_is_not() -> None:
    out, lse = np.full(Q.shape, 7.0, np.float16), np.full((2, 3, 4), 7.0, np.float32)
    with pytest.raises(ValueError, match="target: received 'h100', allowed trn1"):
        flash_attention_fwd(Q, K, K, out=out, lse=lse, target="h100")
    assert (out == 7.0).all()
    assert (lse == 7.0).all()


# -- where results go


def inputs(is_packed: bool) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    shapes = (PACKED_Q, PACKED_K, PACKED_K) if is_packed else (Q, K, K)
    arrays = [rng.standard_normal(x.shape).astype(np.float16) for x in shapes]
    return arrays, {"cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV} if is_packed else {}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("returned", "options"),
    [
        ((False, False), {}),
        ((True, False), {"n_splits": 2}),
        ((False, True), {"skip_softmax_threshold": 0.9}),
        ((True, True), {}),
    ],
)
def test_results_are_written_and_returned(
    returned: tuple[bool, bool], options: dict[str, Any], is_packed: bool
) -> None:
    """`lse` is written whether or not it is returned too."""
    operands, spans = inputs(is_packed)
    n, shape = operands[0].shape[0], operands[0].shape[1:]
    # Every other row of a larger array: results need not be contiguous.
    out, lse = np.full((2 * n, *shape), 7.0, np.float16), np.full((2 * n, *shape[:-1]), 7.0, np.float32)
    got = flash_attention_fwd(
        *operands,
        **spans,
        **options,
        out=out[::2],
        lse=lse[::2],
        return_lse=returned[0],
        return_stats=returned[1],
        target="trn2",
    )
    results = got if any(returned) else (got,)
    assert len(results) == 1 + sum(returned)
    assert np.shares_memory(results[0], out)
    if returned[0]:
        assert np.shares_memory(results[1], lse)
    if returned[1]:
        assert results[-1].tiles_total.tolist() == [[1] * 4] * 2
    options = {name: x for name, x in options.items() if name != "n_splits"}
    exact, low = oracle(*operands, **spans, **options), flash_attention_rounded(*operands, **spans, **options)
    check_budget("o", out[::2], exact.o, low[0], np.float16)
    check_budget("lse", lse[::2], exact.lse, low[1], np.float32)
    assert (out[1::2] == 7.0).all()
    assert (lse[1::2] == 7.0).all()


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_is_not_asked_for_is_not_returned(is_packed: bool) -> None:
    operands, spans = inputs(is_packed)
    alone = flash_attention_fwd(*operands, **spans, target="trn2")
    assert isinstance(alone, np.ndarray)
    o, lse = flash_attention_fwd(*operands, **spans, target="trn2", return_lse=True)
    np.testing.assert_array_equal(alone, o)
    assert lse.shape == o.shape[:-1]
    assert lse.dtype == np.float32


def test_queries_and_keys_need_not_be_contiguous() -> None:
    (q, k, v), _ = inputs(False)
    o = flash_attention_fwd(q, k, v, target="trn2")
    apart = [np.repeat(x, 2, axis=1)[:, ::2] for x in (q, k, v)]
    np.testing.assert_array_equal(flash_attention_fwd(*apart, target="trn2"), o)


@pytest.mark.parametrize("no", ["queries", "keys", "either"])
def test_nothing_to_do(no: str) -> None:
    q, k = Q[:, : 0 if no != "keys" else 3], K[:, : 0 if no != "queries" else 10]
    o, lse = flash_attention_fwd(q, k, k, return_lse=True, target="trn2")
    assert o.shape == q.shape
    assert (o == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("causal", [True, False])
def test_no_sequence_has_a_key(causal: bool) -> None:
    rows = zeros(4, 2, 8)
    for keys in (rows[:0], rows):
        how = {"cu_seqlens_q": np.array([0, 3, 4]), "cu_seqlens_kv": np.array([0, 0, 0])}
        o, lse = flash_attention_fwd(rows, keys, keys, causal=causal, return_lse=True, target="trn2", **how)
        assert (o == 0).all()
        assert (lse == -np.inf).all()


def test_kinds_of_numbers() -> None:
    """Those of NumPy are as good as Python's, and cu_seqlens may be of any integer type."""
    operands, spans = inputs(True)
    plain = {"softmax_scale": 1.0, "window_size": (5, 1), "sparsity_n": 2, "dense_sink_tokens": 1, "n_splits": 1}
    numpy = {"softmax_scale": np.float32(1), "window_size": [np.int64(5), np.int8(1)], "sparsity_n": np.int32(2)}
    numpy |= {"dense_sink_tokens": np.int64(1), "n_splits": np.int16(1), "causal": np.bool_(True)}
    kinds = {name: x.astype(np.uint8) for name, x in spans.items()}
    o = flash_attention_fwd(*operands, **spans, **plain, target="trn2")
    np.testing.assert_array_equal(flash_attention_fwd(*operands, **kinds, **numpy, target="trn2"), o)
    skipping = [flash_attention_fwd(*operands, **spans, skip_softmax_threshold=x, target="trn2") for x in (1, 1.0)]
    np.testing.assert_array_equal(*skipping)
