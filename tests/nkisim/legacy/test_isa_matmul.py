"""neuronxcc.nki.isa: nc_matmul and nc_transpose."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.nkisim.legacy.isa_kernels import BF16, full, instructions, nisa, nl, normal, refused, run, traced

F8 = ml_dtypes.float8_e5m2


def product(x, y):
    return x.astype(np.float64).T @ y.astype(np.float64)


def test_nc_matmul_is_a_float32_product_of_the_stationary_transposed():
    x, y = normal(96, 40), normal(96, 200, seed=1)
    got = run(lambda a, b: nisa.nc_matmul(a, b), x.astype(BF16), y.astype(BF16))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, product(x.astype(BF16), y.astype(BF16)), rtol=1e-5, atol=1e-4)


def test_nc_matmul_keeps_the_free_dimensions_of_moving():
    x, y = normal(32, 16), normal(32, 6, 10, seed=1)
    got = run(lambda a, b: nisa.nc_matmul(a, b), x, y)
    assert got.shape == (16, 6, 10)
    np.testing.assert_allclose(got, product(x, y.reshape(32, 60)).reshape(16, 6, 10), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeroed", [True, False])
def test_psum_accumulates_products(zeroed):
    x, y = normal(3 * 64, 48), normal(3 * 64, 80, seed=1)

    def body(a, b):
        make = nl.zeros if zeroed else nl.ndarray
        total = make((48, 80), dtype=nl.float32, buffer=nl.psum)
        for _ in nl.affine_range(1):
            total[...] += nisa.nc_matmul(a[:, 0, :], b[:, 0, :])
        for i in nl.affine_range(2):
            total[...] += nisa.nc_matmul(a[:, 1 + i, :], b[:, 1 + i, :])
        return nisa.tensor_copy(total)

    blocks = [z.reshape(3, 64, -1).transpose(1, 0, 2).copy() for z in (x, y)]
    np.testing.assert_allclose(run(body, *blocks), product(x, y), rtol=1e-5, atol=1e-4)
    matmuls = [r for r in traced(body, *blocks).records if r.instruction == "nc_matmul"]
    assert [m.attrs["accumulate"] for m in matmuls] == [False, True, True]


def test_assignment_writes_the_bank_itself():
    x = normal(64, 64)

    def body(a):
        total = nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.psum)
        total[...] = nisa.nc_matmul(a, a)
        return nisa.tensor_copy(total)

    assert instructions(traced(body, x)) == ["nc_matmul", "tensor_copy"]


def test_a_bank_of_another_type_gets_a_copy():
    x = normal(64, 64)

    def body(a):
        total = nl.ndarray((64, 64), dtype=nl.bfloat16, buffer=nl.psum)
        total[...] = nisa.nc_matmul(a, a)
        return nisa.tensor_copy(total)

    np.testing.assert_array_equal(run(body, x), run(lambda a: nisa.nc_matmul(a, a), x).astype(BF16))
    assert instructions(traced(body, x)) == ["nc_matmul", "tensor_copy", "tensor_copy"]


def test_an_operand_mask_cuts_its_columns():
    x, y = normal(32, 48), normal(32, 64, seed=1)

    def body(a, b):
        i_p, i_f, i_n = nl.arange(32)[:, None], nl.arange(48)[None, :], nl.arange(64)[None, :]
        out = nl.zeros((48, 64), dtype=nl.float32)
        out[0:20, 0:33] = nisa.tensor_copy(nisa.nc_matmul(a[i_p, i_f][i_f < 20], b[i_p, i_n][i_n < 33])[0:20, 0:33])
        return out

    expected = np.zeros((48, 64))
    expected[:20, :33] = product(x[:, :20], y[:, :33])
    np.testing.assert_allclose(run(body, x, y), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_over_the_partitions_cuts_the_contraction():
    x, y = normal(64, 16), normal(64, 24, seed=1)
    got = run(lambda a, b: nisa.nc_matmul(a, b, mask=nl.arange(64)[:, None] < 50), x, y)
    np.testing.assert_allclose(got, product(x[:50], y[:50]), rtol=1e-5, atol=1e-5)


def test_an_operand_mask_that_leaves_nothing_adds_nothing():
    x = normal(32, 16)

    def body(a):
        i_p, i_f = nl.mgrid[0:32, 0:16]
        total = nl.zeros((16, 16), dtype=nl.float32, buffer=nl.psum)
        total[...] += nisa.nc_matmul(a, a)
        total[...] += nisa.nc_matmul(a[i_p, i_f][i_f < 0], a)
        return nisa.tensor_copy(total)

    np.testing.assert_allclose(run(body, x), product(x, x), rtol=1e-5, atol=1e-5)


def test_operand_masks_leave_rectangles_of_two_dimensional_operands():
    def triangle(a):
        i_p, i_f = nl.mgrid[0:32, 0:16]
        return nisa.nc_matmul(a[i_p, i_f][i_f < i_p], a)

    with pytest.raises(NotImplementedError, match="more than a rectangle"):
        run(triangle, normal(32, 16))

    def three(a):
        i_p, i_x, i_y = nl.mgrid[0:32, 0:4, 0:4]
        return nisa.nc_matmul(a[i_p, i_x, i_y][i_x < 2], a)

    with pytest.raises(NotImplementedError, match="more than two dimensions"):
        run(three, normal(32, 4, 4))


def test_a_mask_over_columns_is_refused():
    def body(a, b):
        return nisa.nc_matmul(a, b, mask=nl.arange(24)[None, :] < 5)

    with pytest.raises(NotImplementedError, match="cut the operand"):
        run(body, normal(64, 16), normal(64, 24))


@pytest.mark.parametrize("position", [(0, 0), (64, 0), (0, 64), (64, 64)])
def test_row_and_column_tiles_give_the_product(position):
    x, y = normal(64, 64), normal(64, 100, seed=1)
    got = run(lambda a, b: nisa.nc_matmul(a, b, tile_position=position, tile_size=(64, 64)), x, y)
    np.testing.assert_allclose(got, product(x, y), rtol=1e-5, atol=1e-4)
    record = next(
        r
        for r in traced(lambda a, b: nisa.nc_matmul(a, b, tile_position=position, tile_size=(64, 64)), x, y).records
        if r.instruction == "nc_matmul"
    )
    assert record.attrs["tile_position"] == (position[0], 0)
    assert record.attrs["tile_size"] == (64, 128)


@pytest.mark.parametrize(
    ("position", "size", "target", "match"),
    [
        ((0, 0), (), "trn2", "both arguments or neither"),
        ((0, 16), (64, 64), "trn2", "multiples of 32"),
        ((96, 0), (64, 64), "trn2", r"within 0\.\.128"),
        ((0, 0), (32, 64), "trn2", "rows of stationary"),
        ((0, 0), (64, 32), "trn2", "columns of stationary"),
    ],
)
def test_rules_of_array_tiles(position, size, target, match):
    def body(a, b):
        return nisa.nc_matmul(a, b, tile_position=position, tile_size=size)

    refused(match, body, normal(64, 64), normal(64, 32), target=target)


def test_trn1_has_no_tiles_of_32_rows_and_columns():
    def body(a, b):
        return nisa.nc_matmul(a, b, tile_position=(32, 32), tile_size=(32, 32))

    x = normal(32, 32)
    np.testing.assert_allclose(run(body, x, x, target="trn2"), product(x, x), rtol=1e-5, atol=1e-5)
    refused("another size before NeuronCore-v3", body, x, x, target="trn1")


def test_double_rows_sum_over_partitions_and_pairs():
    x = np.random.default_rng(0).integers(-3, 4, (64, 2, 16)).astype(F8)
    y = np.random.default_rng(1).integers(-3, 4, (64, 2, 24)).astype(F8)
    got = run(lambda a, b: nisa.nc_matmul(a, b, perf_mode="double_row_gen3"), x, y)
    np.testing.assert_array_equal(got, np.einsum("kim,kin->mn", x.astype(np.float64), y.astype(np.float64)))


def test_other_performance_modes_have_no_counterpart():
    with pytest.raises(NotImplementedError, match="double_column_gen3"):
        run(lambda a: nisa.nc_matmul(a, a, perf_mode="double_column_gen3"), normal(32, 32))


def test_operands_in_psum_are_refused():
    refused("err_unsupported_memory", lambda a: nisa.nc_matmul(nisa.nc_matmul(a, a), a), normal(32, 32))


def test_a_transpose_that_was_assigned_nowhere_is_an_operand():
    x, y = normal(64, 100), normal(64, 30, seed=1)

    def body(a, b):
        t = nisa.nc_transpose(a)
        return nisa.nc_matmul(t, nisa.nc_transpose(b))

    # Transposes of [64, 100] and [64, 30] do not contract: the second one's own transpose does.
    def matching(a, b):
        return nisa.nc_matmul(nisa.nc_transpose(a), nisa.tensor_copy(nisa.nc_transpose(b)))

    z = normal(50, 100, seed=2)
    np.testing.assert_allclose(run(matching, x, z), x.astype(np.float64) @ z.T, rtol=1e-5, atol=1e-4)
    refused("err_num_partition_mismatch", body, x, y)
    names = instructions(traced(matching, x, z))
    assert names[:5] == ["nc_transpose", "nc_transpose", "tensor_copy", "tensor_copy", "nc_matmul"]


def test_a_transpose_that_was_assigned_to_psum_is_not():
    def body(a):
        t = nl.ndarray((32, 32), dtype=nl.float32, buffer=nl.psum)
        t[...] = nisa.nc_transpose(a, engine=nisa.tensor_engine)
        return nisa.nc_matmul(t, a)

    refused("err_unsupported_memory", body, normal(32, 32))


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_float8_is_transposed_in_place(target):
    x = np.random.default_rng(0).integers(-8, 9, (128, 128)).astype(F8)

    def body(a):
        a[...] = nisa.nc_transpose(a)
        return a

    np.testing.assert_array_equal(run(body, x, target=target).astype(np.float32), x.T.astype(np.float32))


def test_contractions_must_agree():
    refused("err_num_partition_mismatch", lambda a, b: nisa.nc_matmul(a, b), normal(32, 32), normal(16, 32))


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="received keyword 'acc'"):
        run(lambda a: nisa.nc_matmul(a, a, acc=True), normal(32, 32))


def test_the_transpose_hint_moves_bits_on_trn2_and_multiplies_on_trn1():
    x = normal(64, 32).astype(BF16)
    eye = np.eye(64, dtype=BF16)

    def body(a, e):
        return nisa.nc_matmul(a, e, is_transpose=True)

    got = run(body, x, eye)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, x.T)
    assert run(body, x, eye, target="trn1").dtype == np.float32


def test_the_transpose_hint_with_a_float32_result_is_a_product():
    x = normal(64, 32).astype(BF16)

    def body(a, e):
        out = nl.ndarray((32, 64), dtype=nl.float32, buffer=nl.psum)
        out[...] = nisa.nc_matmul(a, e, is_transpose=True)
        return nisa.tensor_copy(out)

    np.testing.assert_array_equal(run(body, x, np.eye(64, dtype=BF16)), x.astype(np.float32).T)


def transposed(engine: Any = nisa.unknown_engine, **kwargs: Any) -> Any:
    return lambda a: nisa.nc_transpose(a, engine=engine, **kwargs)


@pytest.mark.parametrize(
    ("shape", "engine", "ran"),
    [
        ((32, 20), nisa.unknown_engine, "vector"),
        ((32, 20), nisa.tensor_engine, "tensor"),
        ((100, 128), nisa.unknown_engine, "tensor"),
        ((32, 32), nisa.vector_engine, "vector"),
    ],
)
def test_nc_transpose_by_shape_or_engine(shape, engine, ran):
    x = normal(*shape).astype(BF16)
    got = run(transposed(engine), x)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, x.T)
    record = next(r for r in traced(transposed(engine), x).records if r.instruction == "nc_transpose")
    assert record.engine.name == ran


def test_nc_transpose_flattens_the_free_dimensions():
    x = normal(16, 3, 5)
    np.testing.assert_array_equal(run(transposed(), x), x.reshape(16, 15).T)


def test_nc_transpose_to_another_type_is_a_second_instruction():
    x = normal(64, 100)
    np.testing.assert_array_equal(run(transposed(dtype=nl.bfloat16), x), x.T.astype(BF16))
    assert instructions(traced(transposed(dtype=nl.bfloat16), x))[:2] == ["nc_transpose", "tensor_copy"]


def test_nc_transpose_into_a_float32_bank():
    x = normal(64, 100).astype(BF16)

    def body(a):
        out = nl.ndarray((100, 64), dtype=nl.float32, buffer=nl.psum)
        out[...] = nisa.nc_transpose(a)
        return nisa.tensor_copy(out, dtype=nl.bfloat16)

    np.testing.assert_array_equal(run(body, x), x.T)


def test_the_vector_engine_transposes_up_to_32():
    refused("tile size", transposed(nisa.vector_engine), normal(33, 8))


def test_nc_transpose_has_no_mask():
    with pytest.raises(NotImplementedError, match="cut the operand"):
        run(transposed(mask=nl.arange(32)[:, None] < 5), normal(32, 32))


def test_the_engine_must_be_one_of_the_enumeration():
    with pytest.raises(TypeError, match=r"engine: received 4, allowed engine\.tensor"):
        run(transposed(4), normal(32, 32))
    # Integers pass as members in the older API: 5 is the Vector Engine.
    x = normal(32, 32)
    np.testing.assert_array_equal(run(transposed(5), x), x.T)


def test_full_makes_a_stationary_of_ones():
    x = normal(100, 60)
    got = run(lambda a: nisa.nc_matmul(full((100, 1), 1.0), a), x)
    np.testing.assert_allclose(got, x.sum(axis=0, keepdims=True, dtype=np.float64), rtol=1e-5, atol=1e-5)
