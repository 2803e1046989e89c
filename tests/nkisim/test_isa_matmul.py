"""nc_matmul: values, shapes, types, memories, records."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, integers, normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.matmul_kernels import BF16, E4M3, E4M3FN, E5M2, exact, result, small


def product(a: Any, b: Any) -> Any:
    """A kernel: the product of two HBM tensors in float32."""
    dst = result(a, b)
    nisa.nc_matmul(dst, sb(a), sb(b))
    return out(dst)


# -- values


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3, E5M2])
def test_product_is_exact_where_float32_is(dtype: Any, target: str) -> None:
    a, b = small(96, 40, dtype=dtype), small(96, 72, seed=1, dtype=dtype)
    assert np.array_equal(run(product, a, b, target=target), exact(a, b))


@pytest.mark.parametrize(
    ("left", "right", "target"),
    [
        (BF16, np.float16, "trn1"),
        (E4M3, BF16, "trn2"),
        (E5M2, E4M3, "trn2"),
        (E4M3FN, E5M2, "trn3"),
        (E4M3FN,) * 2 + ("trn3",),
    ],
)
def test_mixed_dtypes(left: Any, right: Any, target: str) -> None:
    a, b = small(32, 8, dtype=left), small(32, 9, seed=1, dtype=right)
    assert np.array_equal(run(product, a, b, target=target), exact(a, b))


def test_every_float8_value_is_decoded() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for dtype, target in ((E4M3, "trn2"), (E5M2, "trn2"), (E4M3FN, "trn3")):
        finite = codes[np.isfinite(codes.view(dtype).astype(np.float32))].view(dtype).reshape(1, -1)
        one = np.ones((1, 1), dtype)
        assert np.array_equal(run(product, one, finite, target=target), finite.astype(np.float32))


def test_full_tile_of_float32() -> None:
    a, b = normal(128, 128), normal(128, 512, seed=1)
    got = run(product, a, b)
    assert got.shape == (128, 512)
    want = a.T.astype(np.float64) @ b
    bound = np.abs(a.T.astype(np.float64)) @ np.abs(b)
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


def test_sums_of_bfloat16_stay_in_float32() -> None:
    # 256 + 1 has no bfloat16.
    a, b = np.array([[16.0], [1.0]], BF16), np.array([[16.0], [1.0]], BF16)
    assert run(product, a, b)[0, 0] == 257.0


def test_tfloat32_operands_have_ten_mantissa_bits() -> None:
    def kernel(a: Any, b: Any) -> Any:
        both, one = result(a, b), result(a, b)
        nisa.nc_matmul(both, sb(a, nl.tfloat32), sb(b, nl.tfloat32))
        nisa.nc_matmul(one, sb(a, nl.tfloat32), sb(b))
        return out(both), out(one)

    b = np.array([[1 + 2.0**-10, 1 + 2.0**-12, 3.0]], np.float32)
    both, one = run(kernel, np.ones((1, 1), np.float32), b)
    assert both.tolist() == [[1 + 2.0**-10, 1.0, 3.0]]
    assert one.tolist() == b.tolist()


@pytest.mark.parametrize("dtype", [np.float32, BF16, E5M2])
def test_views_flatten_their_free_dimensions(dtype: Any) -> None:
    def kernel(a: Any, b: Any) -> Any:
        wide = tile((6, 2, 4, 3), buffer=nl.psum)
        nisa.memset(wide, 7.0)
        stationary = sb(a)[:, 1:3, ::2]
        moving = sb(b).permute((0, 2, 1))
        nisa.nc_matmul(wide[:, 1], stationary, moving)
        return out(wide)

    a, b = small(16, 4, 6, dtype=dtype), small(16, 3, 4, seed=1, dtype=dtype)
    got = run(kernel, a, b)
    want = exact(a[:, 1:3, ::2].reshape(16, 6), b.transpose(0, 2, 1).reshape(16, 12))
    assert np.array_equal(got[:, 1], want.reshape(6, 4, 3))
    assert (got[:, 0] == 7.0).all()


def test_partitions_in_the_middle() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((128, 4), buffer=nl.psum)
        nisa.memset(dst, -1.0)
        nisa.nc_matmul(dst[32:48], sb(a)[64:96], sb(b)[64:96])
        return out(dst)

    a, b = small(128, 16), small(128, 4, seed=1)
    got = run(kernel, a, b)
    assert np.array_equal(got[32:48], exact(a[64:96], b[64:96]))
    assert (got[:32] == -1.0).all()
    assert (got[48:] == -1.0).all()


def test_infinities_and_nans_contaminate_as_in_a_product() -> None:
    a = np.eye(4, dtype=np.float32)
    a[1, 2] = np.inf
    b = np.eye(4, dtype=np.float32)
    got = run(product, a, b)
    assert got[2, 1] == np.inf
    assert np.isnan(got[2, [0, 2, 3]]).all()
    assert np.array_equal(got[[0, 1, 3]], np.eye(4)[[0, 1, 3]])


def test_all_float32_mode_rounds_nothing() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((1, 1), nl.bfloat16, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        wide = tile((1, 1))
        nisa.tensor_copy(wide, dst)
        return out(wide)

    a, b = np.array([[16.0], [1.0]], BF16), np.array([[16.0], [1.0]], BF16)
    assert run(kernel, a, b, target="trn3")[0, 0] == 256.0
    assert run(kernel, a, b, target="trn3", precise=False)[0, 0] == 257.0


def test_bfloat16_destination_on_trn3_rounds_to_even() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = result(a, b, nl.bfloat16)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return out(dst)

    a, b = normal(64, 16, dtype=BF16), normal(64, 24, seed=1, dtype=BF16)
    want = (a.astype(np.float64).T @ b.astype(np.float64)).astype(np.float32).astype(BF16)
    got = run(kernel, a, b, target="trn3")
    assert got.dtype == BF16
    # A float32 sum may differ from the float64 one in its last bit, which moves few roundings.
    assert (got == want).mean() > 0.98
    assert np.allclose(got.astype(np.float32), want.astype(np.float32), rtol=2.0**-7)


# -- shapes, types, memories


@pytest.mark.parametrize(
    ("a", "b", "dst", "operand", "rule", "received", "allowed", "target"),
    [
        ((16, 129), (16, 8), (128, 8), "stationary", "free size", "129", "1..128", "trn2"),
        ((16, 8), (16, 513), (8, 513), "moving", "free size", "513", "1..512", "trn2"),
        ((16, 8), (16, 4097), (8, 4096), "moving", "free size", "4097", "1..4096", "trn3"),
        ((16, 8), (8, 8), (8, 8), "moving", "partitions", "8", "16, those of stationary", "trn2"),
        ((16, 8), (16, 12), (7, 12), "dst", "partitions", "7", "8, the free size of stationary", "trn2"),
        ((16, 8), (16, 12), (8, 13), "dst", "elements per partition", "13", "12, the free size of moving", "trn2"),
    ],
)
def test_shape_rules(
    a: Any, b: Any, dst: Any, operand: str, rule: str, received: str, allowed: str, target: str
) -> None:
    def kernel(x: Any, y: Any) -> Any:
        t = tile(dst, buffer=nl.psum)
        nisa.nc_matmul(t, sb(x), sb(y))

    refused(
        kernel,
        np.zeros(a, np.float32),
        np.zeros(b, np.float32),
        instruction="nc_matmul",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


def test_trn3_fills_psum_with_one_bfloat16_result() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = result(a, b, nl.bfloat16)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return out(dst[:, 0:4096]), out(dst[:, 4096:8192])

    a, b = small(4, 2), small(4, 8192, seed=1)
    left, right = run(kernel, a, b, target="trn3")
    assert np.array_equal(np.concatenate([left, right], 1).astype(np.float32), exact(a, b))

    assert np.array_equal(run(product, a, b[:, :4096], target="trn3"), exact(a, b[:, :4096]))


def test_banks_of_psum() -> None:
    def second_bank(a: Any, b: Any) -> Any:
        dst = tile((8, 2, 512), buffer=nl.psum)
        nisa.nc_matmul(dst[:, 1], sb(a), sb(b))
        return out(dst[:, 1])

    a, b = small(16, 8), small(16, 512, seed=1)
    assert np.array_equal(run(second_bank, a, b), exact(a, b))

    def across(a: Any, b: Any) -> Any:
        dst = tile((8, 1024), buffer=nl.psum)
        nisa.nc_matmul(dst[:, 256:768], sb(a), sb(b))
        return out(dst[:, 256:768])

    refused(
        across,
        a,
        b,
        instruction="nc_matmul",
        operand="dst",
        rule="PSUM bank",
        received="bytes 1024..3071",
        allowed="one bank of 2048 bytes",
    )
    assert np.array_equal(run(across, a, b, target="trn3"), exact(a, b))

    def strided(a: Any, b: Any) -> Any:
        dst = tile((8, 1024), buffer=nl.psum)
        nisa.nc_matmul(dst[:, ::2], sb(a), sb(b))

    refused(
        strided,
        a,
        b,
        instruction="nc_matmul",
        operand="dst",
        rule="PSUM bank",
        received="bytes 0..4091",
        allowed="one bank",
    )

    def placed(a: Any, b: Any) -> Any:
        dst = nl.ndarray((8, 1024), nl.float32, buffer=nl.psum, address=(0, 2048))
        nisa.nc_matmul(dst[:, 512:1024], sb(a), sb(b))
        return out(dst[:, 512:1024])

    assert np.array_equal(run(placed, a, b), exact(a, b))


@pytest.mark.parametrize(
    ("left", "right", "operand", "rule", "received", "allowed", "target"),
    [
        (BF16, np.float32, "moving", "dtype", "float32 with a bfloat16", "only with each other", "trn2"),
        (np.float32, E5M2, "moving", "dtype", "float8_e5m2 with a float32", "only with each other", "trn2"),
        (E4M3, E4M3FN, "moving", "dtype", "float8_e4m3fn with a float8_e4m3", "one of", "trn3"),
        (np.int8, np.int8, "stationary", "dtype", "int8", "bfloat16", "trn2"),
        (BF16, np.int32, "moving", "dtype", "int32", "bfloat16", "trn2"),
    ],
)
def test_dtype_rules(left: Any, right: Any, operand: str, rule: str, received: str, allowed: str, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b))

    refused(
        kernel,
        np.zeros((8, 4), left),
        np.zeros((8, 4), right),
        instruction="nc_matmul",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


def test_ocp_float8_needs_trn3() -> None:
    def kernel(a: Any) -> Any:
        nisa.nc_matmul(result(a, a), tile((8, 4), nl.float8_e4m3fn), sb(a))

    refused(
        kernel,
        small(8, 4),
        instruction="nc_matmul",
        operand="stationary",
        rule="dtype",
        received="float8_e4m3fn on trn2",
        allowed="float8_e4m3 before trn3",
    )


@pytest.mark.parametrize(("dtype", "target"), [(nl.bfloat16, "trn1"), (nl.bfloat16, "trn2"), (nl.float16, "trn3")])
def test_dst_dtype_rules(dtype: Any, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b, dtype), sb(a), sb(b))

    refused(
        kernel,
        small(8, 4),
        small(8, 4),
        instruction="nc_matmul",
        operand="dst",
        rule="dtype",
        received=str(dtype),
        allowed="float32",
        target=target,
    )


def test_buffers() -> None:
    def to_sbuf(a: Any, b: Any) -> Any:
        nisa.nc_matmul(tile((4, 4)), sb(a), sb(b))

    def from_psum(a: Any, b: Any) -> Any:
        nisa.nc_matmul(tile((4, 4), buffer=nl.psum), ps(a), sb(b))

    def from_hbm(a: Any, b: Any) -> Any:
        nisa.nc_matmul(tile((4, 4), buffer=nl.psum), sb(a), b)

    a = small(8, 4)
    common = {"instruction": "nc_matmul", "rule": "buffer"}
    refused(to_sbuf, a, a, operand="dst", received="sbuf", allowed="psum", **common)
    refused(from_psum, a, a, operand="stationary", received="psum", allowed="sbuf", **common)
    refused(from_hbm, a, a, operand="moving", received="hbm", allowed="sbuf", **common)


def test_uninitialized_operands_are_refused() -> None:
    def kernel(a: Any) -> Any:
        nisa.nc_matmul(tile((4, 4), buffer=nl.psum), sb(a), tile((8, 4)))

    refused(
        kernel,
        small(8, 4),
        instruction="nc_matmul",
        operand="moving",
        rule="uninitialized read",
        received="32 of 32",
        allowed="written before",
    )


@pytest.mark.parametrize("operand", ["stationary", "moving"])
def test_a_wrong_onezero_hint_is_refused_for_float32_only(operand: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = result(a, b)
        nisa.nc_matmul(dst, sb(a), sb(b), **{f"is_{operand}_onezero": True})
        return out(dst)

    tiles = {name: integers(8, 4, low=0, high=2, dtype=np.float32, seed=i) for i, name in enumerate(("a", "b"))}
    a, b = tiles["a"], tiles["b"]
    np.testing.assert_array_equal(run(kernel, a, b), a.T @ b)
    wrong = a if operand == "stationary" else b
    wrong[3, 2] = 0.5
    refused(
        kernel,
        a,
        b,
        instruction="nc_matmul",
        operand=f"is_{operand}_onezero",
        rule=f"values of {operand}",
        received="1 other values, the first 0.5",
        allowed="0 and 1",
    )
    half, other = a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(kernel, half, other), a.T @ b)


def test_the_onezero_hint_is_checked_in_transpose_mode() -> None:
    def kernel(a: Any) -> None:
        identity = nl.shared_identity_matrix(8, dtype=nl.float32)
        dst = tile((4, 8), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), identity, is_transpose=True, is_stationary_onezero=True)

    run(kernel, np.ones((8, 4), np.float32))
    refused(
        kernel,
        np.full((8, 4), 2, np.float32),
        instruction="nc_matmul",
        operand="is_stationary_onezero",
        rule="values of stationary",
        received="32 other values, the first 2.0",
        allowed="0 and 1",
    )


@pytest.mark.parametrize("hint", ["is_stationary_onezero", "is_moving_onezero"])
def test_hints_are_bools(hint: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), **{hint: None})

    refused(
        kernel,
        small(8, 4),
        small(8, 4),
        instruction="nc_matmul",
        operand=hint,
        rule="type",
        received="None",
        allowed="True or False",
    )


# -- records


def test_one_record_per_matmul_with_what_its_cost_depends_on() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_moving_onezero=True, name="first")
        nisa.nc_matmul(dst, sb(a), sb(b), tile_position=(0, 0), tile_size=(64, 128))

    records = [
        r
        for r in traced(kernel, small(48, 8, dtype=BF16), small(48, 12, dtype=BF16)).records
        if r.engine is Engine.tensor
    ]
    assert [r.name for r in records] == ["first", None]
    first, second = records
    assert first.instruction == "nc_matmul"
    assert first.attrs == {
        "k": 48,
        "m": 8,
        "n": 12,
        "accumulate": False,
        "perf_mode": "none",
        "is_transpose": False,
        "is_stationary_onezero": False,
        "is_moving_onezero": True,
        "tile_position": (0, 0),
        "tile_size": (128, 128),
    }
    assert second.attrs["accumulate"] is True
    assert second.attrs["tile_size"] == (64, 128)
    assert [(a.operand, a.shape) for a in first.reads] == [("stationary", (48, 8)), ("moving", (48, 12))]
    assert [(a.operand, a.shape) for a in second.reads] == [("stationary", (48, 8)), ("moving", (48, 12))]
    assert [a.operand for a in first.writes] == ["dst"]


def test_records_of_double_row_and_transposes() -> None:
    def kernel(a: Any, eye: Any, b: Any) -> Any:
        nisa.nc_matmul(tile((8, 16), b.dtype, nl.psum), sb(b), sb(eye), is_transpose=True)
        nisa.nc_matmul(tile((4, 4), buffer=nl.psum), sb(a), sb(a), perf_mode=nisa.matmul_perf_mode.double_row)
        nisa.nc_transpose(tile((8, 16), b.dtype, nl.psum), sb(b))
        nisa.nc_transpose(tile((8, 16), b.dtype), sb(b))

    trace = traced(kernel, small(16, 2, 4, dtype=E4M3), np.eye(16, dtype=BF16), small(16, 8, dtype=BF16))
    records = [r for r in trace.records if r.engine is not Engine.dma]
    assert [(r.instruction, r.engine) for r in records] == [
        ("nc_matmul", Engine.tensor),
        ("nc_matmul", Engine.tensor),
        ("nc_transpose", Engine.tensor),
        ("nc_transpose", Engine.vector),
    ]
    assert records[0].attrs["is_transpose"] is True
    assert (records[1].attrs["k"], records[1].attrs["perf_mode"]) == (32, "double_row")
    assert records[2].attrs == {"k": 16, "m": 8, "n": 16, "accumulate": False, "is_transpose": True}
    assert records[3].attrs == {}
