"""neuronxcc.nki.isa: selection, the eight largest, affine patterns, gathers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nkisim.legacy.isa_kernels import BF16, full, integers, nisa, nl, normal, refused, run, traced

MIN = np.float32(-3.4028235e38)

# -- range_select and select_reduce


def test_range_select_and_its_row_maximum():
    x, low, high = normal(32, 50), integers(32, 1, high=30), integers(32, 1, high=60, seed=1)

    def body(a, b0, b1):
        top = nl.ndarray((32, 1), dtype=nl.float32)
        y = nl.ndarray((32, 51), dtype=nl.float32)
        y[:, 0:50] = nisa.range_select(
            on_true_tile=a,
            comp_op0=np.greater_equal,
            comp_op1=np.less,
            bound0=b0,
            bound1=b1,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
            reduce_res=top,
            range_start=5,
        )
        y[:, 50:51] = nisa.tensor_copy(top)
        return y

    got = run(body, x, low.astype(np.float32), high.astype(np.float32))
    i = np.arange(5, 55)
    expected = np.where((i >= low) & (i < high), x, MIN)
    np.testing.assert_array_equal(got[:, :50], expected)
    np.testing.assert_array_equal(got[:, 50], expected.max(axis=1))


def test_range_select_under_a_mask_counts_positions_of_the_whole_row():
    x = normal(32, 50)

    def body(a):
        i_p, i_f = nl.arange(32)[:, None], nl.arange(50)[None, :]
        y = full((32, 50), 1.0)
        y[i_p, i_f] = nisa.range_select(
            on_true_tile=a[i_p, i_f],
            comp_op0=np.greater_equal,
            comp_op1=np.less,
            bound0=full((32, 1), 15.0),
            bound1=full((32, 1), 25.0),
            mask=i_f >= 20,
        )
        return y

    expected = np.ones((32, 50), np.float32)
    expected[:, 20:] = np.where(np.arange(20, 50) < 25, x[:, 20:], MIN)
    np.testing.assert_array_equal(run(body, x), expected)


def test_range_select_under_a_mask_over_an_inner_dimension_is_refused():
    def body(a):
        i_p, i_x, i_y = nl.mgrid[0:8, 0:3, 0:5]
        b = full((8, 1), 1.0)
        return nisa.range_select(
            on_true_tile=a[i_p, i_x, i_y], comp_op0=np.less, comp_op1=np.less, bound0=b, bound1=b, mask=i_y < 3
        )

    with pytest.raises(NotImplementedError, match="inner dimensions of a row"):
        run(body, normal(8, 3, 5))


def test_range_select_by_default_reduces_nothing():
    def body(a):
        top = nl.ndarray((8, 1), dtype=nl.float32)
        bound = full((8, 1), 1.0)
        return nisa.range_select(
            on_true_tile=a, comp_op0=np.less, comp_op1=np.less, bound0=bound, bound1=bound, reduce_res=top
        )

    refused("result under idle", body, normal(8, 8))


def test_trn1_has_no_range_select():
    def body(a):
        b = full((8, 1), 1.0)
        return nisa.range_select(on_true_tile=a, comp_op0=np.less, comp_op1=np.less, bound0=b, bound1=b)

    refused("NeuronCore-v3 or newer", body, normal(8, 8), target="trn1")


@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
@pytest.mark.parametrize("reverse", [False, True])
def test_select_reduce(kind, reverse):
    x, other, p = normal(32, 40), normal(32, 1, seed=1), integers(32, 40, high=2).astype(kind)

    def body(a, b, pred):
        y = nl.ndarray((32, 41), dtype=nl.float32)
        top = nl.ndarray((32, 1), dtype=nl.float32)
        nisa.select_reduce(
            dst=y[:, 0:40],
            predicate=pred,
            on_true=a,
            on_false=b,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
            reduce_res=top,
            reduce_op=nl.max,
            reverse_pred=reverse,
        )
        y[:, 40:41] = nisa.tensor_copy(top)
        return y

    got = run(body, x, other, p)
    expected = np.where((p != 0) ^ reverse, x, other)
    np.testing.assert_array_equal(got[:, :40], expected)
    np.testing.assert_array_equal(got[:, 40], expected.max(axis=1))


def test_select_reduce_without_a_reduction_under_a_mask_that_splits_rows():
    x, p = normal(16, 4, 5), integers(16, 4, 5, high=2, dtype=np.uint16)

    def body(a, pred):
        i_p, i_x, i_y = nl.mgrid[0:16, 0:4, 0:5]
        y = full((16, 4, 5), 9.0)
        where = i_y <= i_x
        nisa.select_reduce(
            dst=y[i_p, i_x, i_y],
            predicate=pred[i_p, i_x, i_y],
            on_true=a[i_p, i_x, i_y],
            on_false=0.0,
            mask=where,
        )
        return y

    expected = np.where(p != 0, x, 0)
    i_x, i_y = np.mgrid[0:4, 0:5]
    np.testing.assert_array_equal(run(body, x, p), np.where(i_y <= i_x, expected, 9))


def test_a_named_destination_has_its_own_type():
    def body(a):
        y = nl.ndarray((8, 8), dtype=nl.float32)
        nisa.select_reduce(dst=y, predicate=full((8, 8), 1, np.uint8), on_true=a, on_false=0.0, dtype=nl.bfloat16)
        return y

    refused("type of a named destination", body, normal(8, 8))


# -- the eight largest


def test_max8_in_descending_order_of_a_tile_of_four_dimensions():
    x = normal(16, 3, 4, 5)
    got = run(lambda a: nisa.max8(src=a), x)
    np.testing.assert_array_equal(got, -np.sort(-x.reshape(16, 60), axis=1)[:, :8])


def test_max8_under_a_mask():
    x = normal(64, 40)

    def body(a):
        i_p, i_f = nl.arange(64)[:, None], nl.arange(40)[None, :]
        return nisa.max8(src=a[i_p, i_f], mask=i_f < 12)

    np.testing.assert_array_equal(run(body, x), -np.sort(-x[:, :12], axis=1)[:, :8])


@pytest.mark.parametrize("dtype", [None, np.uint16])
def test_nc_find_index8(dtype):
    x = normal(16, 40)
    got = run(lambda a: nisa.nc_find_index8(data=a, vals=nisa.max8(src=a), dtype=dtype), x)
    assert got.dtype == (dtype or np.uint32)
    np.testing.assert_array_equal(got, np.argsort(-x, axis=1)[:, :8])


def test_positions_may_be_assigned_to_another_type():
    x = normal(16, 40)

    def body(a):
        index = nl.ndarray((16, 8), dtype=np.int32)
        index[...] = nisa.nc_find_index8(data=a, vals=nisa.max8(src=a))
        return index

    got = run(body, x)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.argsort(-x, axis=1)[:, :8])


def test_nc_find_index8_has_integer_results():
    def body(a):
        return nisa.nc_find_index8(data=a, vals=nisa.max8(src=a), dtype=np.int32)

    refused("type of the indices", body, normal(8, 8))


def test_positions_under_a_mask_count_from_the_row_start():
    def body(a):
        i_p, i_f = nl.arange(8)[:, None], nl.arange(30)[None, :]
        return nisa.nc_find_index8(data=a[i_p, i_f], vals=nisa.max8(src=a), mask=i_f >= 10)

    with pytest.raises(NotImplementedError, match="leaves out the beginning of a row"):
        run(body, normal(8, 30))


def listing(data, vals, imm):
    """nc_match_replace8 as the page of 2.26 lists it: values first to last, each takes its first occurrence."""
    y, index = data.copy(), np.zeros(vals.shape, np.uint32)
    for p in range(data.shape[0]):
        for j in range(8):
            i = np.flatnonzero(y[p] == vals[p, j])[0]
            index[p, j] = i
            y[p, i] = imm
    return y, index


def test_nc_match_replace8_takes_equal_values_in_order():
    x = integers(16, 40, high=5).astype(np.float32)

    def body(a):
        y = nl.ndarray((16, 48), dtype=nl.float32)
        index = nl.ndarray((16, 8), dtype=nl.uint32)
        y[:, 0:40] = nisa.nc_match_replace8(data=a, vals=nisa.max8(src=a), imm=-1.0, dst_idx=index)
        y[:, 40:48] = nisa.tensor_copy(index)
        return y

    replaced, index = listing(x, -np.sort(-x, axis=1)[:, :8], -1.0)
    got = run(body, x)
    np.testing.assert_array_equal(got[:, :40], replaced)
    np.testing.assert_array_equal(got[:, 40:], index)
    assert (index == 0).any(axis=1).sum() >= 3  # equal values are there to be ordered


def test_nc_match_replace8_in_place_keeps_three_dimensions():
    x = normal(16, 4, 10)

    def body(a):
        a[...] = nisa.nc_match_replace8(data=a, vals=nisa.max8(src=a), imm=float("-inf"))
        return a

    replaced, _ = listing(x.reshape(16, 40), -np.sort(-x.reshape(16, 40), axis=1)[:, :8], -np.inf)
    np.testing.assert_array_equal(run(body, x), replaced.reshape(16, 4, 10))


# -- affine patterns


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p, f: f, np.arange(20)[None, :]),
        (lambda p, f: p, np.arange(50)[:, None]),
        (lambda p, f: 5 + p * 2 - f * 3, 5 + np.arange(50)[:, None] * 2 - np.arange(20)[None, :] * 3),
    ],
)
def test_iota(make, expected):
    i_p, i_f = nl.arange(50)[:, None], nl.arange(20)[None, :]
    got = run(lambda: nisa.iota(make(i_p, i_f), dtype=np.int32))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)


def test_iota_of_three_free_dimensions_under_a_mask():
    def body():
        p, x, y, z = nl.mgrid[0:32, 0:3, 0:4, 0:5]
        out = nisa.memset((32, 3, 4, 5), -1, np.int32)
        out[p, x, y, z] = nisa.iota(p * 1000 + x * 100 + y * 10 + z, dtype=np.int32, mask=(y >= 2) & (z < 3))
        return out

    p, x, y, z = np.mgrid[0:32, 0:3, 0:4, 0:5]
    np.testing.assert_array_equal(run(body), np.where((y >= 2) & (z < 3), p * 1000 + x * 100 + y * 10 + z, -1))


def test_iota_takes_affine_expressions():
    refused("affine expression of nl.arange", lambda a: nisa.iota(a, dtype=np.int32), normal(8, 8))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p, f: f < p, lambda p, f: f < p),
        (lambda p, f: f <= p + 3, lambda p, f: f <= p + 3),
        (lambda p, f: 2 * p > f - 4, lambda p, f: 2 * p > f - 4),
        (lambda p, f: f == p, lambda p, f: f == p),
    ],
)
def test_affine_select(make, expected):
    x = normal(64, 40)

    def body(a):
        i_p, i_f = nl.arange(64)[:, None], nl.arange(40)[None, :]
        return nisa.affine_select(pred=make(i_p, i_f), on_true_tile=a, on_false_value=nl.fp32.min)

    p, f = np.mgrid[0:64, 0:40]
    np.testing.assert_array_equal(run(body, x), np.where(expected(p, f), x, MIN))


def test_affine_select_is_one_instruction_whatever_the_shape_of_the_predicate():
    def body(a):
        i_p, i_f = nl.mgrid[0:64, 0:40]
        return nisa.affine_select(pred=(i_f < i_p), on_true_tile=a, on_false_value=0.0, dtype=nl.bfloat16)

    assert sum(r.instruction == "affine_select" for r in traced(body, normal(64, 40)).records) == 1
    assert run(body, normal(64, 40)).dtype == BF16


def test_affine_select_of_a_tile_in_psum_is_a_copy_and_a_selection():
    x = normal(16, 16)

    def body(a):
        i_p, i_f = nl.mgrid[0:16, 0:16]
        y = nisa.nc_matmul(a, a)
        return nisa.affine_select(pred=(i_f < i_p), on_true_tile=y, on_false_value=0.0)

    np.testing.assert_allclose(run(body, x), np.tril(x.T.astype(np.float64) @ x, -1), rtol=1e-5, atol=1e-5)
    assert [r.instruction for r in traced(body, x).records][1:4] == ["nc_matmul", "tensor_copy", "affine_select"]


def test_affine_select_takes_one_comparison():
    def body(a):
        i_p, i_f = nl.mgrid[0:8, 0:8]
        return nisa.affine_select(pred=(i_f < i_p) & (i_p < 4), on_true_tile=a, on_false_value=0.0)

    refused("number of comparisons", body, normal(8, 8))


@pytest.mark.parametrize(
    ("pred", "match"),
    [
        (lambda: nl.arange(9)[None, :] < 4, "pred: shape"),
        (lambda: full((8, 8), 1.0), "pred: type: received Tile"),
        (lambda: (nl.arange(8)[None, :] < 4) & (nl.arange(8)[:, None] < 4), "number of comparisons"),
    ],
)
def test_rules_of_predicates(pred, match):
    refused(match, lambda a: nisa.affine_select(pred=pred(), on_true_tile=a, on_false_value=0.0), normal(8, 8))


@pytest.mark.parametrize("pred", [True, False])
def test_a_predicate_of_loop_indices_is_a_constant(pred):
    x = normal(8, 8)
    got = run(lambda a: nisa.affine_select(pred=pred, on_true_tile=a, on_false_value=-2.0), x)
    np.testing.assert_array_equal(got, x if pred else np.full((8, 8), -2, np.float32))


def test_affine_select_takes_no_wide_integers():
    def body(a):
        i_p, i_f = nl.mgrid[0:8, 0:8]
        return nisa.affine_select(pred=i_f < i_p, on_true_tile=a, on_false_value=0.0)

    refused("floats and integers of 8 or 16 bits", body, integers(8, 8))


# -- over partitions, gathers, bounds


@pytest.mark.parametrize(("op", "expected"), [(np.add, np.sum), (np.max, np.max)])
def test_tensor_partition_reduce(op, expected):
    x = normal(64, 3, 5)
    got = run(lambda a: nisa.tensor_partition_reduce(op, a), x)
    assert got.shape == (1, 3, 5)
    np.testing.assert_allclose(got, expected(x, axis=0, keepdims=True), rtol=1e-4, atol=1e-5)


def test_the_gpsimd_engine_reaches_sbuf_only():
    def body(a):
        return nisa.tensor_partition_reduce(np.add, nisa.nc_matmul(a, a))

    refused("err_unsupported_memory", body, normal(8, 8))


def test_local_gather_of_runs():
    x = normal(32, 30, 4)
    index = integers(32, 3, high=30, dtype=np.uint16)
    got = run(lambda a, i: nisa.local_gather(a, i, 4, 48), x, index * 4)
    assert got.shape == (32, 3, 16, 4)
    for g in range(2):
        order = index[16 * g : 16 * (g + 1)].flatten(order="F")
        expected = x[16 * g : 16 * (g + 1)][:, order]
        np.testing.assert_array_equal(got[16 * g : 16 * (g + 1)].reshape(16, 48, 4), expected)


def test_local_gather_of_some_of_the_indices():
    x, index = normal(16, 30), integers(16, 2, high=30, dtype=np.uint16)
    got = run(lambda a, i: nisa.local_gather(a, i, num_valid_indices=20), x, index)
    np.testing.assert_array_equal(got[:, :, 0], x[:, index.flatten(order="F")[:20]])


def test_local_gather_has_no_mask():
    x, index = normal(16, 30), integers(16, 2, high=30, dtype=np.uint16)
    with pytest.raises(NotImplementedError, match="no rectangles to cut"):
        run(lambda a, i: nisa.local_gather(a, i, mask=nl.arange(16)[:, None] < 8), x, index)


def test_sequence_bounds():
    ids = np.array([[0, 1, 1, 3, 3, 3, 0, 2]], np.int32)
    got = run(lambda a: nisa.sequence_bounds(segment_ids=a), ids)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got[0], [[8, 1, 1, 3, 3, 3, 8, 7], [-1, 3, 3, 6, 6, 6, -1, 8]])


def test_sequence_bounds_in_another_type():
    def body(dtype):
        return lambda a: nisa.sequence_bounds(segment_ids=a, dtype=dtype)

    ids = np.array([[1, 1, 2]], np.float32)
    assert run(body(np.int32), ids).dtype == np.int32
    refused("allowed float32, int32", body(np.int16), ids)
