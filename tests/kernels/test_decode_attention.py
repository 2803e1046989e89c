"""The teaching kernels against the oracle, on every target and in every dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import decode_attention as module
from contributed._cases import DecodeCase
from contributed._nki import has_device, run_on_device, simulate_kernel
from contributed.decode_attention import CASES, decode_attention, decode_attention_fwd, decode_attention_gqa_fwd
from nkisim import NkiError, Trace, simulate
from reference.budget import BudgetError, check_budget
from reference.decode import gqa_decode_attention
from reference.rounded import gqa_decode_attention_rounded
from tests.kernels.flash import CEILING, DTYPES, by_case_dtype_and_target, by_dtype, by_target

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def check(case: DecodeCase, dtype: Any, target: str, seed: int = 0) -> float:
    q, k, v = case.inputs(dtype, seed)
    return check_arrays(q, k, v, dtype, target)


def check_arrays(q: Any, k: Any, v: Any, dtype: Any, target: str, scale: float | None = None) -> float:
    got = decode_attention(q, k, v, softmax_scale=scale, target=target)
    assert got.dtype == dtype
    exact = gqa_decode_attention(q, k, v, softmax_scale=scale)
    low, _ = gqa_decode_attention_rounded(q, k, v, softmax_scale=scale)
    return check_budget("o", got, exact.o, low, dtype)


@by_case_dtype_and_target(CASES)
def test_matches_the_oracle(case: DecodeCase, dtype: Any, target: str) -> None:
    assert check(case, dtype, target, seed=1) <= CEILING[dtype.name]


@by_dtype
@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("n_q_heads", [1, 4])
def test_head_dims(head_dim: int, n_q_heads: int, dtype: Any) -> None:
    check(DecodeCase("d", n_q_heads, 1, head_dim, 150), dtype, "trn2")


@pytest.mark.parametrize("seqlen_kv", [1, 2, 63, 127, 128, 129, 255, 256, 257, 513])
@pytest.mark.parametrize("n_q_heads", [1, 4])
def test_lengths_on_and_off_the_tile_edge(seqlen_kv: int, n_q_heads: int) -> None:
    for dtype in DTYPES:
        check(DecodeCase("s", n_q_heads, 1, 64, seqlen_kv), dtype, "trn2")


@pytest.mark.parametrize(
    ("n_q_heads", "n_kv_heads"), [(2, 2), (2, 1), (3, 1), (6, 2), (12, 4), (40, 8), (10, 1), (71, 1)]
)
def test_groups(n_q_heads: int, n_kv_heads: int) -> None:
    for dtype in DTYPES:
        check(DecodeCase("g", n_q_heads, n_kv_heads, 64, 140), dtype, "trn1")


NEEDLES = [
    DecodeCase(f"{position}-of-{n_q_heads}", n_q_heads, 1, 128, 300, needles=(position,))
    for n_q_heads in (1, 4)
    for position in (0, 127, 128, 255, 256, 299)
]


@by_case_dtype_and_target(NEEDLES)
def test_a_needle_is_found_wherever_it_is(case: DecodeCase, dtype: Any, target: str) -> None:
    check(case, dtype, target)


@by_target
@by_dtype
@pytest.mark.parametrize("n_q_heads", [1, 4])
def test_logits_of_ten_thousand(n_q_heads: int, dtype: Any, target: str) -> None:
    check(DecodeCase("large", n_q_heads, 1, 64, 200, logits=1e4), dtype, target)


@by_dtype
def test_everything_but_the_operands_of_matmuls_is_float32(dtype: Any) -> None:
    case = DecodeCase("trace", 4, 2, 64, 300)
    q, k, v = case.inputs(dtype)
    trace = Trace()
    args = (q.T.copy(), k.transpose(1, 2, 0).copy(), v.transpose(1, 2, 0).copy(), 4, 2)
    simulate(decode_attention_gqa_fwd, target="trn2", trace=trace)(*args)
    for record in trace.records:
        if record.instruction in ("nc_matmul", "scalar_tensor_tensor", "tensor_tensor", "tensor_reduce", "reciprocal"):
            assert [a.dtype for a in record.writes] == ["float32"], record.site
    rounded = {r.site.function for r in trace.records for a in r.writes if a.dtype != "float32"}
    # Inputs, probabilities, transposed operands and the result: the roundings the docstring names.
    expected = {"_load", "_identity", "_to_sbuf", "_store_normalised", "decode_attention_gqa_fwd"}
    assert rounded == (set() if dtype == np.float32 else expected)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.5, -0.5])
@pytest.mark.parametrize("n_q_heads", [1, 4])
def test_softmax_scale(scale: float, n_q_heads: int) -> None:
    q, k, v = DecodeCase("scale", n_q_heads, 1, 64, 200).inputs(np.float32)
    check_arrays(q, k, v, np.float32, "trn2", scale)


def test_one_key_returns_its_value() -> None:
    q, k, v = DecodeCase("one", 4, 2, 64, 1).inputs(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(decode_attention(q, k, v, target="trn2"), v[0].repeat(2, axis=0))


def test_two_runs_are_bit_equal() -> None:
    q, k, v = CASES[6].inputs(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        decode_attention(q, k, v, target="trn2").view(np.uint16),
        decode_attention(q, k, v, target="trn2").view(np.uint16),
    )


def test_heads_of_other_groups_do_not_matter() -> None:
    q, k, v = DecodeCase("groups", 8, 2, 64, 200).inputs(ml_dtypes.bfloat16)
    whole = decode_attention(q, k, v, target="trn2")
    k[:, 1], v[:, 1] = np.nan, np.nan
    np.testing.assert_array_equal(decode_attention(q, k, v, target="trn2")[:4], whole[:4])


def test_inputs_stay_untouched() -> None:
    q, k, v = CASES[6].inputs(np.float32)
    copies = [x.copy() for x in (q, k, v)]
    decode_attention(q, k, v, target="trn2")
    for x, copy in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_the_pair_agrees_on_one_head() -> None:
    """Both kernels in their own layouts: the second is the first with tiles."""
    q, k, v = DecodeCase("pair", 1, 1, 96, 333).inputs(np.float32)
    qd, kd, vd = q.T.copy(), k[:, 0].T.copy(), v[:, 0].T.copy()
    one = simulate_kernel(decode_attention_fwd, qd, kd, vd, target="trn2")
    tiled = simulate_kernel(decode_attention_gqa_fwd, qd, kd[None], vd[None], 1, 1, target="trn2")
    assert one.shape == tiled.shape == (1, 96)
    exact = gqa_decode_attention(q, k, v).o
    low, _ = gqa_decode_attention_rounded(q, k, v)
    check_budget("one tile", one, exact, low, np.float32)
    check_budget("online", tiled, exact, low, np.float32)


# -- what breaks them


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for i_tile in range(n_tiles):", "for i_tile in range(max(1, n_tiles - 1)):"),  # a dropped tile
        ("heads = slice(i_kv * group", "heads = slice(0 * i_kv * group"),  # the wrong query heads
        ("k_sb = _load(k[i_kv,", "k_sb = _load(k[0,"),  # the wrong KV head
        ("v_sb = _load(v[i_kv,", "v_sb = _load(v[0,"),
        ("dst=acc, data=acc, op0=nl.multiply, operand0=correction", "dst=acc, data=acc, op0=nl.multiply, operand0=1.0"),
        ("dst=l, data=l, op0=nl.multiply, operand0=correction", "dst=l, data=l, op0=nl.multiply, operand0=1.0"),
        ("m = m_new", "m = m"),  # the maximum is forgotten
        ("start = i_tile * tile_kv", "start = max(0, i_tile * tile_kv - 1)"),  # tiles that overlap
        ("nisa.memset(dst=s_sb, value=MASKED)", "nisa.memset(dst=s_sb, value=0.0)"),  # keys that are not there
        ("operand0=scale)", "operand0=1.0)"),
        ("accumulate=(i_tile > 0)", "accumulate=False"),  # only the last tile's values
        ("MASKED = -3.0e38", "MASKED = -1.0e3"),  # not below every score
        ("acc = _filled((group, d), 0.0)", "acc = nl.zeros((group, d), dtype=q.dtype)"),  # undocumented roundings
        ("s_sb = nl.ndarray((group, n), dtype=nl.float32", "s_sb = nl.ndarray((group, n), dtype=q.dtype"),
        ("l = _filled((group, 1), 0.0)", "l = nl.zeros((group, 1), dtype=q.dtype)"),
    ],
)
def test_a_mutated_kernel_fails(old: str, new: str, tmp_path: Any) -> None:
    """Each one-line fault is over budget or refused in some case, so the suite would be red."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "mutant", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    small_first = sorted(CASES, key=lambda case: case.n_kv_heads * case.seqlen_kv)
    assert any(fails(namespace["decode_attention"], case, dtype) for case in small_first for dtype in DTYPES)


def fails(wrapper: Any, case: DecodeCase, dtype: Any) -> bool:
    q, k, v, exact, low = drawn(case, dtype)
    try:
        return check_budget("o", wrapper(q, k, v, target="trn2"), exact, low, dtype) > CEILING[dtype.name]
    except (BudgetError, NkiError):
        return True


@cache
def drawn(case: DecodeCase, dtype: Any) -> tuple[Any, ...]:
    """q, k, v, and o of the oracle and in the machine's precision."""
    q, k, v = case.inputs(dtype)
    return q, k, v, gqa_decode_attention(q, k, v).o, gqa_decode_attention_rounded(q, k, v)[0]


def test_budget_error_is_what_a_wrong_result_raises() -> None:
    q, k, v = CASES[6].inputs(np.float32)
    exact, low = gqa_decode_attention(q, k, v).o, gqa_decode_attention_rounded(q, k, v)[0]
    with pytest.raises(BudgetError, match="o: difference"):
        check_budget("o", decode_attention(q, k, v, target="trn2") + np.float32(1e-3), exact, low, np.float32)


# -- bad input

Q, K = np.zeros((4, 64), np.float32), np.zeros((10, 2, 64), np.float32)


@pytest.mark.parametrize(
    ("q", "k", "v", "kwargs", "error", "text"),
    [
        (Q.tolist(), K, K, {}, TypeError, r"q: received list, allowed a NumPy array \[n_q_heads, d\]"),
        (Q[0], K, K, {}, ValueError, r"q shape: received \[64\], allowed \[n_q_heads, d\]"),
        (Q, K[0], K, {}, ValueError, r"k shape: received \[2, 64\], allowed \[seqlen_kv, n_kv_heads, d\]"),
        (Q, K, K[:9], {}, ValueError, r"v shape: received \[9, 2, 64\], allowed \[10, 2, 64\], that of k"),
        (Q.astype(np.float64), K, K, {}, TypeError, "q dtype: received float64, allowed float32, bfloat16, float16"),
        (Q, K.astype(np.float16), K, {}, TypeError, "k dtype: received float16, allowed float32, that of q"),
        (Q[:, :32], K, K, {}, ValueError, "k head_dim: received 64, allowed 32, that of q"),
        (Q[:3], K, K, {}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
        (Q, K[:0], K[:0], {}, ValueError, "seqlen_kv: received 0, allowed >= 1"),
        (np.zeros((2, 129), np.float32), np.zeros((3, 2, 129), np.float32), np.zeros((3, 2, 129), np.float32), {},
         ValueError, r"head_dim: received 129, allowed 1\.\.128"),
        (np.zeros((129, 8), np.float32), np.zeros((3, 1, 8), np.float32), np.zeros((3, 1, 8), np.float32), {},
         ValueError, r"group \(n_q_heads / n_kv_heads\): received 129, allowed 1\.\.128"),
        (Q, K, K, {"softmax_scale": float("nan")}, ValueError, "softmax_scale: received nan, allowed a finite number"),
        (Q, K, K, {"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or None"),
        (Q, K, K, {"target": "h100"}, ValueError, "target: received 'h100', allowed trn1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(q: Any, k: Any, v: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        decode_attention(q, k, v, **kwargs)


# -- on a device


@pytest.mark.device
@by_dtype
@by_case
def test_matches_the_oracle_on_a_device(case: DecodeCase, dtype: Any) -> None:
    assert has_device()
    q, k, v = case.inputs(dtype)
    args = (q.T.copy(), k.transpose(1, 2, 0).copy(), v.transpose(1, 2, 0).copy(), case.n_q_heads, case.n_kv_heads)
    got = run_on_device(decode_attention_gqa_fwd, *args)
    low, _ = gqa_decode_attention_rounded(q, k, v)
    check_budget("o", np.asarray(got), gqa_decode_attention(q, k, v).o, low, dtype)
