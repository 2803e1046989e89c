"""Bad input of sparse_decode and gated_decode: refused by name before any work; and where results go."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _decode_launch, _sparse_launch
from contributed.sparse_decode import gated_decode, sparse_decode
from reference.budget import check_budget
from tests.kernels.sparse import ORACLE, TWIN

NAN = float("nan")
BOTH, GATED, PLAIN = (False, True), (True,), (False,)


def zeros(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype)


Q, K = zeros(2, 4, 8), zeros(2, 10, 2, 8)
ALPHA, DELTA = zeros(2, 4), zeros(2, 2, 10)
PACKED, PACKED_DELTA = zeros(20, 2, 8), zeros(2, 20)
CU = np.array([0, 8, 20])
FEW = np.array([3, 10])
ROWS = np.broadcast_to(np.float16(0), (2, 2**23 + 1, 1, 1))


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


CASES: dict[str, tuple[tuple[bool, ...], dict[str, Any], type[Exception], str]] = {
    # q, k and v
    "q list": (BOTH, {"q": Q.tolist()}, TypeError, r"q: received list, allowed a NumPy array \[batch, n_q_heads, d\]"),
    "q two axes": (BOTH, {"q": Q[0]}, ValueError, r"q shape: received \[4, 8\], allowed \[batch, n_q_heads, d\]$"),
    "q new tokens": (BOTH, {"q": Q[:, None]}, ValueError, r"q shape: received \[2, 1, 4, 8\], allowed \[batch, n_q_"),
    "q float64": (BOTH, {"q": Q.astype(float)}, TypeError, "q dtype: received float64, allowed float32, bfloat16,"),
    "q no heads": (BOTH, {"q": Q[:, :0]}, ValueError, r"q shape: received \[2, 0, 8\], allowed .* each at least 1"),
    "q no batch": (BOTH, {"q": Q[:0]}, ValueError, r"q shape: received \[0, 4, 8\], allowed .* each at least 1"),
    "d odd": (BOTH, {"q": zeros(2, 4, 129)}, ValueError, r"head_dim: received 129, allowed 1\.\.128, or even to 256"),
    "d large": (BOTH, {"q": zeros(2, 4, 258)}, ValueError, r"head_dim: received 258, allowed 1\.\.128, or even to"),
    "k list": (BOTH, {"k": K.tolist()}, TypeError, "k: received list, allowed a NumPy array"),
    "v None": (BOTH, {"v": None}, TypeError, "v: received NoneType, allowed a NumPy array"),
    "k dtype": (BOTH, {"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16, that of q"),
    "v float8": (
        BOTH,
        {"v": K.astype(ml_dtypes.float8_e4m3)},
        TypeError,
        "v dtype: received float8_e4m3, allowed float16, that of q",
    ),
    "k axes": (BOTH, {"k": K[0]}, ValueError, r"k shape: received \[10, 2, 8\], allowed \[2, seqlen_kv, n_kv_heads, 8"),
    "k d": (BOTH, {"k": K[..., :4]}, ValueError, r"k shape: received \[2, 10, 2, 4\], allowed \[2, seqlen_kv"),
    "v shape": (BOTH, {"v": K[:, :9]}, ValueError, r"v shape: received \[2, 9, 2, 8\], allowed \[2, 10, 2, 8\], that"),
    "heads": (BOTH, {"q": Q[:, :3]}, ValueError, "n_q_heads: received 3, allowed multiples of n_kv_heads=2"),
    "rows": (BOTH, {"q": zeros(2, 258, 8)}, ValueError, r"s \* n_q_heads / n_kv_heads: received 129, allowed 1\.\.128"),
    # gates
    "alpha list": (GATED, {"alpha": ALPHA.tolist()}, TypeError, r"alpha: received list, allowed a NumPy array \[batch"),
    "alpha axes": (GATED, {"alpha": ALPHA[0]}, ValueError, r"alpha shape: received \[4\], allowed \[batch, n_q_heads"),
    "alpha shape": (GATED, {"alpha": ALPHA[:, :2]}, ValueError, r"alpha shape: received \[2, 2\], allowed \[2, 4\]"),
    "alpha type": (GATED, {"alpha": ALPHA.astype(float)}, TypeError, "alpha dtype: received float64, allowed float32"),
    "alpha nan": (GATED, {"alpha": ALPHA + np.float16(NAN)}, ValueError, "alpha: received .*nan.*, allowed finite num"),
    "alpha inf": (GATED, {"alpha": ALPHA + np.float16(np.inf)}, ValueError, "alpha: received .*inf.*, allowed finite"),
    "delta list": (GATED, {"delta": DELTA.tolist()}, TypeError, r"delta: received list, allowed a NumPy array \[batch"),
    "delta axes": (GATED, {"delta": DELTA[0]}, ValueError, r"delta shape: received \[2, 10\], allowed \[batch, n_kv"),
    "delta order": (
        GATED,
        {"delta": DELTA.swapaxes(1, 2)},
        ValueError,
        r"delta shape: received \[2, 10, 2\], allowed \[2, 2, 10\]",
    ),
    "delta type": (GATED, {"delta": DELTA.astype(int)}, TypeError, "delta dtype: received int64, allowed float32, bfl"),
    "delta packed": (
        GATED,
        packed(delta=PACKED_DELTA[:, :19]),
        ValueError,
        r"delta shape: received \[2, 19\], allowed \[2, 20\]",
    ),
    "delta flat with packed": (
        GATED,
        packed(),
        ValueError,
        r"delta shape: received \[2, 2, 10\], allowed \[n_kv_heads, total\]",
    ),
    "gated rows": (
        GATED,
        {"q": zeros(2, 1, 1), "k": ROWS, "v": ROWS, "alpha": ALPHA[:, :1], "delta": ROWS[:, None, :, 0, 0]}
        | {"out": None, "lse": None},
        ValueError,
        r"batch \* n_kv_heads \* seqlen_kv: received 16777218, allowed at most 16777216 with gates",
    ),
    "gated packed rows": (
        GATED,
        {"q": zeros(1, 2, 1), "k": ROWS.reshape(-1, 2, 1), "v": ROWS.reshape(-1, 2, 1), "alpha": ALPHA[:1, :2]}
        | {"cu_seqlens_kv": CU[:2], "delta": ROWS[..., 0, 0], "out": None, "lse": None},
        ValueError,
        r"n_kv_heads \* total: received 16777218, allowed at most 16777216 with gates",
    ),
    **{
        f"{name} {x!r}": (GATED, {name: x}, TypeError, rf"{name}: received {x!r}, allowed True or False")
        for name in ("is_logsigmoid_gate", "fast_logsigmoid")
        for x in (1, None, "yes")
    },
    # thresholds
    **{
        f"{name} {x}": (which, {name: x}, ValueError, rf"{name}: received {x}, allowed None, 0 or a number up to 1")
        for name, which in (("softmax_threshold", BOTH), ("gate_threshold", GATED))
        for x in (NAN, np.inf, -np.inf, -1e-9, 1.001, 2, -1, np.float32(1.5))
    },
    **{
        f"{name} {x!r}": (which, {name: x}, TypeError, rf"{name}: received .*, allowed None, 0 or a number up to 1")
        for name, which in (("softmax_threshold", BOTH), ("gate_threshold", GATED))
        for x in ("0.5", True, np.bool_(False), [0.5], np.array(0.5), 0.5j)
    },
    # tiles and splits
    **{
        f"tile_kv {x}": (BOTH, {"tile_kv": x}, ValueError, rf"tile_kv: received {x}, allowed a power of two from 16 to")
        for x in (0, -16, 8, 24, 48, 2048, 16.0, True, None, "16")
    },
    "tile_kv of a group": (
        BOTH,
        {"q": zeros(2, 256, 8), "tile_kv": 1024, "alpha": zeros(2, 256), "out": None, "lse": None},
        ValueError,
        "tile_kv: received 1024, allowed at most 512 for 128 query heads per KV head$",
    ),
    "tile_kv of a group and window": (
        BOTH,
        {"q": zeros(2, 256, 8), "tile_kv": 512, "alpha": zeros(2, 256), "out": None, "lse": None}
        | {"window_size": (5, None)},
        ValueError,
        "tile_kv: received 512, allowed at most 256 for 128 query heads per KV head and a window",
    ),
    **{
        f"n_splits {x}": (BOTH, {"n_splits": x}, ValueError, rf"n_splits: received {x}, allowed 1\.\.64")
        for x in (0, -1, 65, 1.5, True, "2")
    },
    # where sequences are
    "cu list": (BOTH, packed(cu_seqlens_kv=[0, 8, 20]), TypeError, "cu_seqlens_kv: received list, allowed an integer"),
    "cu shape": (BOTH, packed(cu_seqlens_kv=CU[:2]), ValueError, r"cu_seqlens_kv shape: received \[2\], allowed \[3\]"),
    "cu descends": (BOTH, packed(cu_seqlens_kv=CU[::-1]), ValueError, r"cu_seqlens_kv: received .*, allowed ascending"),
    "cu beyond": (BOTH, packed(cu_seqlens_kv=CU + 1), ValueError, r"cu_seqlens_kv: .*21\], allowed .* within 0\.\.20"),
    "cu with batched": (BOTH, {"cu_seqlens_kv": CU}, ValueError, r"k shape: received .*, allowed \[total, n_kv_heads"),
    "packed without cu": (BOTH, {"k": PACKED, "v": PACKED}, ValueError, r"k shape: received \[20, 2, 8\], allowed \[2"),
    "lengths list": (BOTH, {"seqlens_kv": [3, 10]}, TypeError, r"seqlens_kv: received list, allowed an integer array"),
    "lengths floats": (BOTH, {"seqlens_kv": FEW * 1.0}, TypeError, "seqlens_kv: received float64, allowed an integer"),
    "lengths beyond": (BOTH, {"seqlens_kv": FEW + 1}, ValueError, r"seqlens_kv\[1\]: received 11, allowed 0\.\.10"),
    "lengths negative": (BOTH, {"seqlens_kv": FEW - 4}, ValueError, r"seqlens_kv\[0\]: received -1, allowed 0\.\.10"),
    "lengths beyond cu": (BOTH, packed(seqlens_kv=FEW + 6), ValueError, r"seqlens_kv\[0\]: received 9, allowed 0\.\.8"),
    **{
        f"max_seqlen_kv {x}": (BOTH, {"max_seqlen_kv": x}, ValueError, f"max_seqlen_kv: received {x}, allowed None or")
        for x in (9, -1, 10.5, True, 2**24 + 1)
    },
    # scale and window
    **{
        f"scale {x}": (BOTH, {"softmax_scale": x}, ValueError, rf"softmax_scale: received {x}, allowed a number above")
        for x in (0, 0.0, -0.5)
    },
    "scale nan": (BOTH, {"softmax_scale": NAN}, ValueError, "softmax_scale: received nan, allowed a finite number"),
    "scale text": (BOTH, {"softmax_scale": "1"}, TypeError, "softmax_scale: received '1', allowed a finite number or"),
    "scale large": (BOTH, {"softmax_scale": 1e39}, ValueError, r"softmax_scale: received 1e\+39, allowed a number"),
    "scale tiny": (BOTH, {"softmax_scale": 1e-38}, ValueError, r"softmax_scale .*received 1e-38, allowed 0, or 1e-30"),
    "window number": (BOTH, {"window_size": 3}, ValueError, r"window_size: received 3, allowed \(left, right\)"),
    "window left": (BOTH, {"window_size": (-1, 0)}, ValueError, r"window_size: received \(-1, 0\), allowed .* or >= 0"),
    # launches
    "k_d_major": (PLAIN, {"k_d_major": "yes"}, TypeError, "k_d_major: received 'yes', allowed True or False"),
    "d-major packed": (PLAIN, packed(k_d_major=True), ValueError, "k_d_major: received True, allowed False with cu"),
    **{
        f"n_cores {x}": (PLAIN, {"n_cores": x}, ValueError, rf"n_cores: received {x}, allowed 1\.\.2")
        for x in (0, 3, None, 1.0)
    },
    "cores of trn1": (PLAIN, {"n_cores": 2, "target": "trn1"}, ValueError, "n_cores: received 2, allowed 1 on trn1"),
    # results
    "return_lse": (BOTH, {"return_lse": 1}, TypeError, "return_lse: received 1, allowed True or False"),
    "return_stats": (BOTH, {"return_stats": None}, TypeError, "return_stats: received None, allowed True or False"),
    "out list": (BOTH, {"out": Q.tolist()}, TypeError, "out: received list, allowed a NumPy array or None"),
    "out shape": (BOTH, {"out": Q[:1].copy()}, ValueError, r"out shape: received \[1, 4, 8\], allowed .*2, 4, 8"),
    "out dtype": (BOTH, {"out": Q.astype(np.float32)}, TypeError, "out dtype: received float32, allowed float16"),
    "out read-only": (BOTH, {"out": frozen(Q.copy())}, ValueError, "out: received a read-only array, allowed a write"),
    "lse shape": (BOTH, {"lse": zeros(2, 5, dtype=np.float32)}, ValueError, r"lse shape: received \[2, 5\], allow"),
    "lse dtype": (BOTH, {"lse": zeros(2, 4)}, TypeError, "lse dtype: received float16, allowed float32"),
    "lse in out": (BOTH, overlapping(), ValueError, "lse: received an array that overlaps out, allowed memory of its"),
}  # fmt: skip
# Each with a threshold, and with 0 where that is not what is wrong, nor a limit of the tests of tiles.
CALLS = {
    f"{'gated' if gated else 'sparse'}{' off' if off else ''} {name}": (
        gated,
        {"softmax_threshold": 0} | changes if off else changes,
        *expected,
    )
    for name, (which, changes, *expected) in CASES.items()
    for gated in which
    for off in (False, True)
    if not (off and ("softmax_threshold" in changes or name.startswith("tile_kv of a group")))
}


@pytest.mark.parametrize(("gated", "changes", "error", "text"), CALLS.values(), ids=CALLS)
def test_bad_input_is_named(
    gated: bool, changes: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_decode_launch, _sparse_launch):
        monkeypatch.setattr(module, "simulate_kernel", lambda *_, **__: pytest.fail("a kernel ran"))
    results = {"out": np.full((2, 4, 8), 7.0, np.float16), "lse": np.full((2, 4), 7.0, np.float32)}
    args = {"q": Q, "k": K, "v": K, "alpha": ALPHA, "delta": DELTA, **results, **changes}
    operands = [args.pop(name) for name in ("q", "k", "v", "alpha", "delta")]
    decode = gated_decode if gated else sparse_decode
    with pytest.raises(error, match=text):
        decode(*operands[: 5 if gated else 3], **args)
    assert all((x == 7.0).all() for x in results.values())


def test_cases_name_every_argument() -> None:
    for gated, decode in ((False, sparse_decode), (True, gated_decode)):
        named = {name for which, changes, _, _ in CASES.values() if gated in which for name in changes}
        arguments = set(decode.__annotations__) - {"return", "target"}
        assert arguments <= named


def test_a_list_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 40 rows are not too many, but the runs of keys that their splits have room for."""
    monkeypatch.setattr("contributed.sparse_decode.INDEX_MAX", 40)
    monkeypatch.setattr(_sparse_launch, "simulate_kernel", lambda *_, **__: pytest.fail("a kernel ran"))
    out = np.full((2, 4, 8), 7.0, np.float16)
    text = (
        r"batch \* n_kv_heads \* n_splits: received 12, with room for \d+ runs of keys, allowed those with at most 40"
    )
    with pytest.raises(ValueError, match=text):
        gated_decode(Q, K, K, ALPHA, DELTA, n_splits=3, out=out)
    assert (out == 7.0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("off", [False, True])
def test_a_target_that_there_is_not(off: bool, gated: bool) -> None:
    results = {"out": np.full((2, 4, 8), 7.0, np.float16), "lse": np.full((2, 4), 7.0, np.float32)}
    decode, operands = (gated_decode, (Q, K, K, ALPHA, DELTA)) if gated else (sparse_decode, (Q, K, K))
    with pytest.raises(ValueError, match="target: received 'h100', allowed trn1"):
        decode(*operands, softmax_threshold=0 if off else 0.5, target="h100", **results)
    assert all((x == 7.0).all() for x in results.values())


# -- where results go


def inputs(gated: bool) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(x.shape).astype(np.float16) for x in (Q, K, K, ALPHA, DELTA)]
    return tuple(arrays if gated else arrays[:3])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("returned", "n_splits", "threshold"),
    [((False, False), 1, 0.5), ((True, False), 2, 0.5), ((False, True), 1, 0), ((True, True), 2, 0.5)],
)
def test_results_are_written_and_returned(
    returned: tuple[bool, bool], n_splits: int, threshold: float, gated: bool
) -> None:
    """`lse` is written whether or not it is returned too."""
    operands, decode = inputs(gated), gated_decode if gated else sparse_decode
    # Every other row of a larger array: results need not be contiguous.
    out, lse = np.full((4, 4, 8), 7.0, np.float16), np.full((4, 4), 7.0, np.float32)
    options: dict[str, Any] = {"softmax_threshold": threshold, "n_splits": n_splits, "tile_kv": 16}
    got = decode(
        *operands,
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
        assert results[-1].tiles_total.tolist() == [[[1, 0][:n_splits]] * 2] * 2
    exact, low = ORACLE[gated](*operands, **options), TWIN[gated](*operands, **options)
    check_budget("o", out[::2], exact.o, low[0], np.float16)
    check_budget("lse", lse[::2], exact.lse, low[1], np.float32)
    assert (out[1::2] == 7.0).all()
    assert (lse[1::2] == 7.0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_not_asked_for_is_not_returned(gated: bool) -> None:
    operands, decode = inputs(gated), gated_decode if gated else sparse_decode
    alone = decode(*operands, tile_kv=16, target="trn2")
    assert isinstance(alone, np.ndarray)
    o, lse = decode(*operands, tile_kv=16, target="trn2", return_lse=True)
    np.testing.assert_array_equal(alone, o)
    assert lse.shape == (2, 4)
    assert lse.dtype == np.float32


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_threshold": np.float32(0.5), "tile_kv": np.int64(16), "n_splits": np.int32(2)},
        {"softmax_threshold": 1, "window_size": (np.int64(3), 0), "tile_kv": 16},
    ],
    ids=["numbers of NumPy", "whole numbers"],
)
def test_kinds_of_numbers(options: dict[str, Any]) -> None:
    plain = {
        name: tuple(int(y) for y in x) if isinstance(x, tuple) else float(x) if name == "softmax_threshold" else int(x)
        for name, x in options.items()
    }
    for gated, decode in ((False, sparse_decode), (True, gated_decode)):
        operands = inputs(gated)
        np.testing.assert_array_equal(decode(*operands, **options), decode(*operands, **plain))
