"""nc_matmul and nc_transpose: values, accumulation in PSUM, limits, records."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16
E4M3, E4M3FN, E5M2 = ml_dtypes.float8_e4m3, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def small(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Integers that every matmul dtype holds exactly; their sums of products are exact in float32."""
    return integers(*shape, low=-8, high=9, seed=seed).astype(dtype)


def exact(stationary: np.ndarray, moving: np.ndarray) -> np.ndarray:
    return (stationary.astype(np.float64).T @ moving.astype(np.float64)).astype(np.float32)


def result(a: Any, b: Any, dtype: Any = nl.float32) -> Any:
    """Inside a kernel: the PSUM tile for the product of two HBM tensors."""
    return tile((a.shape[1], b.shape[1]), dtype, nl.psum)


def product(a: Any, b: Any) -> Any:
    """A kernel: the product of two HBM tensors in float32."""
    dst = result(a, b)
    nisa.nc_matmul(dst, sb(a), sb(b))
    return out(dst)


# ---------------------------------------------------------------------------------------------------
# Values


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


# ---------------------------------------------------------------------------------------------------
# Accumulation


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["explicit", "inferred"])
def test_accumulates_over_tiles_of_the_contraction(how: str, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        for i in range(3):
            accumulate = (i > 0) if how == "explicit" else None
            nisa.nc_matmul(dst, sb(a[i * 32 : i * 32 + 32]), sb(b[i * 32 : i * 32 + 32]), accumulate=accumulate)
        return out(dst)

    a, b = small(96, 8), small(96, 16, seed=1)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a, b))


def test_accumulate_false_overwrites() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=np.bool_(False))
        return out(dst)

    a, b = small(32, 8), small(32, 16, seed=1)
    assert np.array_equal(run(kernel, a, b), exact(a, b))


def test_a_tile_that_was_evicted_still_accumulates() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        first = out(dst)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return first, out(dst)

    a, b = small(32, 8), small(32, 16, seed=1)
    first, second = run(kernel, a, b)
    assert np.array_equal(first, exact(a, b))
    assert np.array_equal(second, 2 * exact(a, b))


@pytest.mark.parametrize("target", TARGETS)
def test_overlapping_results_add_where_a_matmul_wrote(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 12), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        stationary, moving = sb(a), sb(b)
        nisa.nc_matmul(dst[:, 0:8], stationary, moving)
        nisa.nc_matmul(dst[:, 4:12], stationary, moving)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    one = exact(a, b)
    want = np.zeros((4, 12), np.float32)
    want[:, 0:8] += one
    want[:, 4:12] += one
    assert np.array_equal(run(kernel, a, b, target=target), want)


@pytest.mark.parametrize("target", TARGETS)
def test_none_overwrites_what_only_other_instructions_wrote(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a, b))


@pytest.mark.parametrize("accumulate", [True, None])
def test_trn3_adds_to_a_result_that_was_rescaled_in_psum(accumulate: bool | None) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.tensor_scalar(dst, dst, nl.multiply, 0.5)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=accumulate)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target="trn3"), np.float32(1.5) * exact(a, b))


def test_trn3_adds_to_an_initial_value() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target="trn3"), 100 + exact(a, b))


def test_bfloat16_psum_adds_in_float32_and_rounds_once() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((1, 2), nl.bfloat16, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a[1:2]), sb(b[1:2]), accumulate=True)
        return out(dst)

    # 256 + 1 rounds to 256 (even), 256 + 3 to 260; then 256 + 1 again, 260 + 3 to 264 (even).
    a = np.array([[1.0], [1.0]], np.float32)
    b = np.array([[256.0, 256.0], [1.0, 3.0]], np.float32)
    assert run(kernel, a, b, target="trn3").astype(np.float32).tolist() == [[256.0, 264.0]]


def test_accumulation_is_tracked_through_views_of_another_width() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 16), nl.bfloat16, nl.psum)
        nisa.memset(dst, 0.0)
        wide = dst.view(nl.float32)
        nisa.nc_matmul(wide, sb(a), sb(b))
        nisa.nc_matmul(wide, sb(a), sb(b))
        nisa.memset(dst[:, 0:2], 0.0)
        nisa.nc_matmul(wide[:, 1:8], sb(a), sb(b[:, 1:8]))
        return out(wide)

    a, b = small(16, 4), small(16, 8, seed=1)
    want = 3 * exact(a, b)
    want[:, 0] = 0
    assert np.array_equal(run(kernel, a, b), want)


def test_accumulating_onto_uninitialized_psum_is_refused() -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), accumulate=True)

    for target in TARGETS:
        refused(
            kernel,
            small(16, 4),
            small(16, 8),
            instruction="nc_matmul",
            operand="accumulate",
            rule="uninitialized PSUM",
            received="True, 32 of 32 elements of dst never written",
            allowed="False for the first matmul",
            target=target,
        )


def test_accumulating_onto_a_partly_written_tile_is_refused() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 12), buffer=nl.psum)
        nisa.nc_matmul(dst[:, 0:8], sb(a), sb(b))
        nisa.nc_matmul(dst[:, 4:12], sb(a), sb(b), accumulate=True)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="uninitialized PSUM",
        received="True, 16 of 32 elements",
        allowed="False",
    )


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_accumulating_onto_an_initial_value_is_refused_before_trn3(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 0.0)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received="True, 32 of 32 elements",
        allowed="False to overwrite",
        target=target,
    )


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("accumulate", [True, None])
def test_adding_to_a_result_that_another_instruction_changed_is_refused_before_trn3(
    accumulate: bool | None, target: str
) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.tensor_scalar(dst[:, 2:4], dst[:, 2:4], nl.multiply, 0.5)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=accumulate)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received=f"{accumulate}, 8 of 32 elements",
        allowed="False to overwrite",
        target=target,
    )


def test_accumulate_takes_bools_and_none_only() -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), accumulate=1)

    refused(
        kernel,
        small(4, 4),
        small(4, 4),
        instruction="nc_matmul",
        operand="accumulate",
        rule="type",
        received="1",
        allowed="True or False",
    )


# ---------------------------------------------------------------------------------------------------
# Double row


@pytest.mark.parametrize(
    ("left", "right", "target"), [(E4M3, E4M3, "trn2"), (E4M3, E5M2, "trn2"), (E4M3FN, E5M2, "trn3")]
)
def test_double_row_contracts_pairs(left: Any, right: Any, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((a.shape[2], b.shape[2]), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)
        return out(dst)

    a, b = small(48, 2, 8, dtype=left), small(48, 2, 12, seed=1, dtype=right)
    want = exact(a[:, 0], b[:, 0]) + exact(a[:, 1], b[:, 1])
    assert np.array_equal(run(kernel, a, b, target=target), want)


def test_double_row_takes_256_contraction_elements_and_full_tiles() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((128, 512), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)
        return out(dst)

    a, b = small(128, 2, 128, dtype=E4M3), small(128, 2, 512, seed=1, dtype=E4M3)
    assert np.array_equal(run(kernel, a, b), exact(a.reshape(256, 128), b.reshape(256, 512)))


def test_double_row_rules() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 4), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)

    pair = small(16, 2, 4, dtype=E4M3)
    common = {"instruction": "nc_matmul"}
    refused(
        kernel, pair, pair, operand="perf_mode", rule="target", received="trn1", allowed="v3", target="trn1", **common
    )
    bf16 = pair.astype(BF16)
    refused(
        kernel, bf16, pair, operand="stationary", rule="dtype", received="bfloat16", allowed="float8_e5m2", **common
    )
    flat = pair.reshape(16, 8)
    refused(kernel, pair, flat, operand="moving", rule="shape", received="[16, 8]", allowed="[partitions, 2", **common)
    fours = small(16, 4, 2, dtype=E4M3)
    refused(
        kernel,
        fours,
        pair,
        operand="stationary",
        rule="shape",
        received="[16, 4, 2]",
        allowed="[partitions, 2",
        **common,
    )

    def transposing(a: Any, b: Any) -> Any:
        dst = tile((4, 4), nl.float8_e4m3, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, perf_mode=nisa.matmul_perf_mode.double_row)

    refused(
        transposing, pair, pair, operand="perf_mode", rule="transpose", received="double_row", allowed="none", **common
    )

    def named(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), perf_mode="double_row")

    refused(
        named,
        small(4, 4),
        small(4, 4),
        operand="perf_mode",
        rule="type",
        received="'double_row'",
        allowed="matmul_perf_mode",
        **common,
    )


# ---------------------------------------------------------------------------------------------------
# Transpose mode


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_transpose_mode_moves_bits(dtype: Any, target: str) -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = tile((a.shape[1], a.shape[0]), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(eye), is_transpose=True)
        return out(dst)

    a = normal(24, 40, dtype=dtype)
    a[3, 5], a[4, 6], a[5, 7] = np.nan, np.inf, -0.0
    unsigned = np.dtype(f"u{a.itemsize}")
    a.view(unsigned)[7, 8] |= unsigned.type(np.float32(np.nan).astype(dtype).view(unsigned) | 5)
    got = run(kernel, a, np.eye(24, dtype=dtype), target=target)
    assert got.dtype == a.dtype
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


def test_is_transpose_is_a_label_on_trn1() -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = result(a, eye)
        nisa.nc_matmul(dst, sb(a), sb(eye), is_transpose=True)
        return out(dst)

    a = normal(8, 6, dtype=BF16)
    a[2, 3] = np.nan
    got = run(kernel, a, np.eye(8, dtype=BF16), target="trn1")
    assert got.dtype == np.float32
    assert np.isnan(got[3]).all()
    rest = [0, 1, 2, 4, 5]
    assert np.array_equal(got[rest], a.astype(np.float32).T[rest])
    b = small(8, 5, dtype=BF16)
    assert np.array_equal(run(kernel, b, b, target="trn1"), exact(b, b))


def test_transpose_mode_rules() -> None:
    common = {"instruction": "nc_matmul"}

    def kernel(a: Any, b: Any) -> Any:
        dst = tile((a.shape[1], b.shape[1]), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True)

    eye = np.eye(8, dtype=BF16)
    a = normal(8, 6, dtype=BF16)
    twice = 2 * eye
    refused(
        kernel,
        a,
        twice,
        operand="moving",
        rule="transpose mode",
        received="another",
        allowed="the identity [8, 8]",
        **common,
    )
    part = np.ascontiguousarray(eye[:, :7])
    refused(
        kernel,
        a,
        part,
        operand="moving",
        rule="transpose mode",
        received="[8, 7]",
        allowed="the identity [8, 8]",
        **common,
    )
    bytes_ = small(8, 6, dtype=E4M3)
    refused(
        kernel,
        bytes_,
        eye,
        operand="stationary",
        rule="dtype in transpose mode",
        received="float8_e4m3",
        allowed="2 or 4 bytes",
        **common,
    )

    def widening(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), is_transpose=True)

    refused(widening, a, eye, operand="dst", rule="dtype", received="float32", allowed="bfloat16", **common)

    def accumulating(a: Any, b: Any) -> Any:
        dst = tile((6, 8), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, accumulate=False)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, accumulate=False)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True)

    refused(
        accumulating,
        a,
        eye,
        operand="accumulate",
        rule="transpose mode",
        received="None where a matmul wrote before",
        allowed="False",
        **common,
    )

    def flagged(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), is_transpose=1)

    refused(flagged, a, eye, operand="is_transpose", rule="type", received="1", allowed="True or False", **common)


# ---------------------------------------------------------------------------------------------------
# Tiles of the array


@pytest.mark.parametrize(
    ("rows", "start", "target"), [(32, 96, "trn2"), (64, 64, "trn1"), (32, 32, "trn3"), (128, 0, "trn1")]
)
def test_row_tiles(rows: int, start: int, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        k = slice(start, start + rows)
        nisa.nc_matmul(dst, sb(a)[k], sb(b)[k], tile_position=(start, 0), tile_size=[rows, 128])
        return out(dst)

    a, b = small(128, 8), small(128, 12, seed=1)
    k = slice(start, start + rows)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a[k], b[k]))


def test_a_tensor_without_address_stands_on_the_rows_of_the_tile() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = result(a, b)
        nisa.nc_matmul(dst, sb(a), sb(b), tile_position=(64, 0), tile_size=(32, 128))
        return out(dst)

    a, b = small(32, 8), small(32, 12, seed=1)
    assert np.array_equal(run(kernel, a, b), exact(a, b))


@pytest.mark.parametrize(
    ("options", "operand", "rule", "received", "allowed", "target"),
    [
        ({"tile_size": (64, 128)}, "tile_position", "tiling mode", "not set", "both", "trn2"),
        ({"tile_position": (0, 0)}, "tile_size", "tiling mode", "not set", "both", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (32, 128)}, "tile_size", "row size", "32", "64, 128 on trn1", "trn1"),
        ({"tile_position": (0, 0), "tile_size": (96, 128)}, "tile_size", "row size", "96", "32, 64, 128", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (64, 64)}, "tile_size", "column size", "64", "128", "trn2"),
        ({"tile_position": (0, 32), "tile_size": (64, 128)}, "tile_position", "start column", "32", "0", "trn2"),
        ({"tile_position": (32, 0), "tile_size": (64, 128)}, "tile_position", "start row", "32", "0, 64", "trn2"),
        ({"tile_position": (128, 0), "tile_size": (64, 128)}, "tile_position", "start row", "128", "0, 64", "trn2"),
        ({"tile_position": (-64, 0), "tile_size": (64, 128)}, "tile_position", "start row", "-64", "0, 64", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (32, 128)}, "stationary", "partitions", "48", "1..32", "trn2"),
        ({"tile_position": 0, "tile_size": (64, 128)}, "tile_position", "type", "0", "two integers", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (64, 128.0)}, "tile_size", "type", "(64, 128.0)", "two int", "trn2"),
    ],
)
def test_tiling_rules(
    options: dict[str, Any], operand: str, rule: str, received: str, allowed: str, target: str
) -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), **options)

    refused(
        kernel,
        small(48, 8),
        small(48, 12),
        instruction="nc_matmul",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


def test_operands_feed_the_rows_of_the_tile() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a)[0:64], sb(b)[0:64], tile_position=(64, 0), tile_size=(64, 128))

    refused(
        kernel,
        small(128, 8),
        small(128, 12),
        instruction="nc_matmul",
        operand="tile_position",
        rule="rows of the tile",
        received="64..127, operands in partitions 0..63",
        allowed="64..127",
    )


def test_stationary_and_moving_stand_on_the_same_partitions() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a)[0:32], sb(b)[32:64])

    refused(
        kernel,
        small(128, 8),
        small(128, 12),
        instruction="nc_matmul",
        operand="moving",
        rule="start partition",
        received="32",
        allowed="0, that of stationary",
    )

    def placed(a: Any, b: Any) -> Any:
        moving = nl.ndarray(b.shape, b.dtype, address=(64, 0))
        nisa.dma_copy(dst=moving, src=b)
        dst = tile((8, 12), buffer=nl.psum)
        stationary = sb(a)
        nisa.nc_matmul(dst, stationary, moving)
        return out(dst)

    a, b = small(32, 8), small(32, 12, seed=1)
    # A stationary tensor of one quadrant can be put next to the placed moving tensor, one of 128 partitions cannot.
    assert np.array_equal(run(placed, a, b), exact(a, b))


# ---------------------------------------------------------------------------------------------------
# Shapes, types, memories


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


# ---------------------------------------------------------------------------------------------------
# Indirection


def gather_index(index: np.ndarray, partitions: int, columns: int) -> np.ndarray:
    """The columns of each partition under `.indirect` on the Tensor Engine, spelled out."""
    result = np.zeros((partitions, columns), np.int64)
    for p in range(partitions):
        first = p - p % 32
        height = min(32, partitions - first)
        for i in range(columns):
            result[p, i] = index[first + i % height, i // height]
    return result


def test_gathered_operands_and_a_scattered_result() -> None:
    def kernel(a: Any, b: Any, ia: Any, ib: Any, io: Any) -> Any:
        wide = tile((16, 10), nl.bfloat16, nl.psum)
        nisa.memset(wide, -1.0)
        stationary, moving = sb(a).indirect(sb(ia), 16), sb(b).indirect(sb(ib), 5)
        dst = wide.indirect(sb(io), 5)
        nisa.nc_matmul(dst, stationary, moving)
        nisa.nc_matmul(dst, stationary, moving)
        return out(wide)

    a, b = small(64, 24, dtype=BF16), small(64, 7, seed=1, dtype=BF16)
    ia = integers(64, 1, low=0, high=24)
    ib = integers(64, 1, low=0, high=7, seed=1)
    io = np.zeros((16, 1), np.int32)
    io[:5, 0] = [9, 2, 4, 0, 7]
    got = run(kernel, a, b, ia, ib, io, target="trn3").astype(np.float32)
    left = np.take_along_axis(a, gather_index(ia, 64, 16), 1)
    right = np.take_along_axis(b, gather_index(ib, 64, 5), 1)
    want = np.full((16, 10), -1.0, np.float32)
    once = exact(left, right).astype(BF16).astype(np.float32)
    want[:, [9, 2, 4, 0, 7]] = (once + exact(left, right)).astype(BF16)
    assert np.array_equal(got, want)


def test_indirection_rules() -> None:
    common = {"instruction": "nc_matmul", "target": "trn3"}
    a, wide, index = small(32, 8, dtype=BF16), small(32, 8), np.zeros((32, 1), np.int32)

    def gathering(a: Any, index: Any) -> Any:
        nisa.nc_matmul(tile((8, 4), buffer=nl.psum), sb(a), sb(a).indirect(sb(index), 4))

    refused(
        gathering, wide, index, operand="moving", rule="dtype of an", received="float32", allowed="bfloat16", **common
    )
    refused(
        gathering,
        a,
        index,
        instruction="nc_matmul",
        operand="moving",
        rule="tensor indirection",
        received="trn2",
        allowed="v4",
        target="trn2",
    )

    square = small(32, 32, dtype=BF16)

    def scattering(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), buffer=nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b))

    refused(
        scattering,
        square,
        a,
        index,
        operand="dst",
        rule="dtype of an",
        received="float32",
        allowed="bfloat16",
        **common,
    )

    def tiled(a: Any, index: Any) -> Any:
        moving = sb(a).indirect(sb(index), 4)
        options = {"tile_position": (32, 0), "tile_size": (32, 128)}
        nisa.nc_matmul(tile((8, 4), buffer=nl.psum), sb(a), moving, **options)

    refused(tiled, a, index, operand="tile_position", rule="indirect", received="(32, 0)", allowed="(0, 0)", **common)

    def transposing(a: Any, index: Any) -> Any:
        nisa.nc_matmul(tile((8, 4), nl.bfloat16, nl.psum), sb(a), sb(a).indirect(sb(index), 4), is_transpose=True)

    refused(
        transposing,
        a,
        index,
        operand="moving",
        rule="indirection in transpose",
        received="indirect",
        allowed="ordinary",
        **common,
    )

    def twice(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), nl.bfloat16, nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        twice,
        square,
        a,
        index,
        operand="dst",
        rule="columns while accumulating",
        received="twice",
        allowed="distinct",
        **common,
    )

    def undefined(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), nl.bfloat16, nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        undefined,
        square,
        a,
        index,
        operand="accumulate",
        rule="uninitialized PSUM",
        received="256 of 256",
        allowed="False",
        **common,
    )


@pytest.mark.parametrize("operand", ["dst", "moving"])
def test_indices_stand_where_their_operand_does(operand: str) -> None:
    def kernel(a: Any, b: Any, index: Any) -> Any:
        i = nl.ndarray(index.shape, index.dtype, address=(32, 0))
        nisa.dma_copy(dst=i, src=index)
        x = nl.ndarray(a.shape, a.dtype, address=(64, 64))
        y = nl.ndarray(b.shape, b.dtype, address=(64, 256))
        nisa.dma_copy(dst=x, src=a)
        nisa.dma_copy(dst=y, src=b)
        dst = tile((32, 8), nl.bfloat16, nl.psum)
        if operand == "dst":
            nisa.nc_matmul(dst.indirect(i, 8), x, y)
        else:
            nisa.nc_matmul(dst, x, y.indirect(i, 8))

    refused(
        kernel,
        small(32, 32, dtype=BF16),
        small(32, 8, dtype=BF16),
        np.zeros((32, 1), np.int32),
        instruction="nc_matmul",
        operand=operand,
        rule="start partition of the index",
        received="32",
        allowed="64, that of " + ("stationary" if operand == "dst" else "moving"),
        target="trn3",
    )


# ---------------------------------------------------------------------------------------------------
# nc_transpose


def transpose(a: Any, buffer: Any = nl.psum, engine: Any = nisa.engine.unknown) -> Any:
    """Inside a kernel: one nc_transpose of an HBM tensor into a new tile."""
    dst = tile((a.shape[1], a.shape[0]), a.dtype, buffer)
    nisa.nc_transpose(dst=dst, data=sb(a), engine=engine)
    return dst


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.int32, np.uint16])
def test_tensor_engine_transposes_bits(dtype: Any, target: str) -> None:
    def kernel(a: Any) -> Any:
        return out(transpose(a))

    bits = integers(128, 96, low=0, high=2**16, dtype=np.uint32)
    a = bits.astype(np.uint16).view(dtype) if np.dtype(dtype).itemsize == 2 else (bits * 65521).view(dtype)
    unsigned = np.dtype(f"u{a.itemsize}")
    got = run(kernel, a, target=target)
    assert got.dtype == a.dtype
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, E5M2])
def test_tensor_engine_multiplies_by_the_identity_on_trn1(dtype: Any) -> None:
    def kernel(a: Any) -> Any:
        return out(transpose(a))

    a = small(24, 16, dtype=dtype)
    a[3, 5], a[7, 9] = np.nan, np.inf
    got = run(kernel, a, target="trn1").astype(np.float32)
    want = a.astype(np.float32).T
    want[5] = np.nan
    want[9] = np.nan
    want[9, 7] = np.inf
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8, E5M2])
@pytest.mark.parametrize(("source", "to"), [("sbuf", "sbuf"), ("psum", "sbuf"), ("sbuf", "psum"), ("psum", "psum")])
def test_vector_engine_transposes_bits_between_any_memories(dtype: Any, source: str, to: str, target: str) -> None:
    def kernel(a: Any) -> Any:
        data = ps(a) if source == "psum" else sb(a)
        dst = tile((a.shape[1], a.shape[0]), a.dtype, getattr(nl, to))
        nisa.nc_transpose(dst, data, nisa.engine.vector)
        return out(dst)

    a = integers(24, 32, low=0, high=256).astype(np.uint8)
    a = a.view(dtype) if np.dtype(dtype).itemsize == 1 else a.astype(np.float32).astype(dtype)
    if np.dtype(dtype) in (np.float32, BF16):
        a[1, 2] = np.nan
    got = run(kernel, a, target=target)
    unsigned = np.dtype(f"u{a.itemsize}")
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


def test_packed_types_move_as_one_element() -> None:
    def kernel(a: Any) -> Any:
        data = sb(a).view(nl.float8_e4m3fn_x4)
        dst = tile((4, 8), nl.float8_e4m3fn_x4)
        nisa.nc_transpose(dst, data)
        return out(dst.view(nl.uint32))

    a = integers(8, 4, low=0, high=2**31, dtype=np.uint32)
    assert np.array_equal(run(kernel, a, target="trn3"), a.T)


def test_transposes_of_views() -> None:
    def kernel(a: Any) -> Any:
        dst = tile((12, 2, 8), buffer=nl.psum)
        nisa.memset(dst, -1.0)
        nisa.nc_transpose(dst[:, 1].reshape((12, 2, 4)), sb(a)[:, ::2])
        return out(dst)

    a = normal(8, 6, 4)
    got = run(kernel, a)
    assert np.array_equal(got[:, 1], a[:, ::2].reshape(8, 12).T)
    assert (got[:, 0] == -1).all()


def test_a_transpose_overwrites_and_counts_as_a_matmul() -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = tile((8, 8), buffer=nl.psum)
        nisa.nc_transpose(dst, sb(a))
        nisa.nc_transpose(dst, sb(a))
        once = out(dst)
        nisa.nc_matmul(dst, sb(a), sb(eye))
        return once, out(dst)

    a = small(8, 8)
    for target in TARGETS:
        once, added = run(kernel, a, np.eye(8, dtype=np.float32), target=target)
        assert np.array_equal(once, a.T)
        assert np.array_equal(added, 2 * a.T)


def test_a_vector_engine_transpose_is_no_matmul() -> None:
    def kernel(a: Any) -> Any:
        dst = tile((8, 8), buffer=nl.psum)
        nisa.nc_transpose(dst, sb(a), engine=nisa.engine.vector)
        nisa.nc_matmul(dst, sb(a), sb(a), accumulate=True)

    refused(
        kernel,
        small(8, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received="64 of 64",
        allowed="False",
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "buffer", "engine", "operand", "rule", "received", "allowed", "target"),
    [
        ((16, 129), np.float32, "psum", "tensor", "data", "tile size", "[16, 129]", "[128, 128]", "trn2"),
        ((33, 8), np.float32, "sbuf", "unknown", "data", "tile size", "[33, 8]", "[32, 32]", "trn2"),
        ((8, 33), np.float32, "psum", "vector", "data", "tile size", "[8, 33]", "[32, 32]", "trn2"),
        ((8, 8), np.float32, "sbuf", "tensor", "dst", "buffer", "sbuf", "psum", "trn2"),
        ((8, 8), np.uint8, "psum", "tensor", "data", "dtype in transpose", "uint8", "2 or 4 bytes", "trn2"),
        ((8, 8), E5M2, "psum", "unknown", "data", "dtype in transpose", "float8_e5m2", "2 or 4", "trn3"),
        ((8, 8), np.int32, "psum", "tensor", "data", "dtype", "int32", "bfloat16", "trn1"),
        ((8, 8), np.float32, "psum", "scalar", "engine", "value", "scalar", "tensor, vector", "trn2"),
    ],
)
def test_transpose_rules(
    shape: Any, dtype: Any, buffer: str, engine: str, operand: str, rule: str, received: str, allowed: str, target: str
) -> None:
    def kernel(a: Any) -> Any:
        dst = tile((min(a.shape[1], 128), a.shape[0]), a.dtype, getattr(nl, buffer))
        nisa.nc_transpose(dst, sb(a), nisa.engine[engine])

    refused(
        kernel,
        np.zeros(shape, dtype),
        instruction="nc_transpose",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


@pytest.mark.parametrize(
    ("dst", "dtype", "operand", "rule", "received", "allowed"),
    [
        ((6, 8), nl.bfloat16, "dst", "dtype", "bfloat16", "float32, that of data"),
        ((7, 8), nl.float32, "dst", "partitions", "7", "6, the elements"),
        ((6, 9), nl.float32, "dst", "elements per partition", "9", "8, the partitions"),
    ],
)
@pytest.mark.parametrize("buffer", ["sbuf", "psum"])
def test_transpose_destination_rules(
    buffer: str, dst: Any, dtype: Any, operand: str, rule: str, received: str, allowed: str
) -> None:
    def kernel(a: Any) -> Any:
        nisa.nc_transpose(tile(dst, dtype, getattr(nl, buffer)), sb(a))

    refused(
        kernel,
        np.zeros((8, 6), np.float32),
        instruction="nc_transpose",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_tensor_engine_reads_sbuf_only_and_writes_one_bank() -> None:
    def from_psum(a: Any) -> Any:
        nisa.nc_transpose(tile((6, 8), buffer=nl.psum), ps(a), nisa.engine.tensor)

    def across(a: Any) -> Any:
        dst = tile((6, 1024), buffer=nl.psum)
        nisa.nc_transpose(dst[:, 508:516], sb(a))

    a = normal(8, 6)
    common = {"instruction": "nc_transpose"}
    refused(from_psum, a, operand="data", rule="buffer", received="psum", allowed="sbuf", **common)
    refused(across, a, operand="dst", rule="PSUM bank", received="2032..2063", allowed="2048", **common)


# ---------------------------------------------------------------------------------------------------
# Records


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
