"""neuronxcc.nki.isa: `mask=` of every function that takes one and returns a tile."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nkisim.legacy.isa_kernels import full, nisa, nl, normal, run

P, F = 64, 24
X, Y = normal(P, F) + 4, normal(P, F, seed=1) + 4
PARTITION, COLUMN = np.mgrid[0:P, 0:F]
INSIDE = (PARTITION < 32) & (COLUMN >= 5) & (COLUMN < 20)
KEPT = 7.0  # what stands in the destination before


# fmt: off
ELEMENTWISE = {
    "activation": (lambda a, b, i, j, m: nisa.activation(np.square, a, scale=0.5, mask=m), np.square(X * 0.5)),
    "tensor_tensor": (lambda a, b, i, j, m: nisa.tensor_tensor(a, b, np.subtract, mask=m), X - Y),
    "tensor_scalar": (lambda a, b, i, j, m: nisa.tensor_scalar(a, np.add, b[i, 0], mask=m), X + Y[:, :1]),
    "scalar_tensor_tensor": (
        lambda a, b, i, j, m: nisa.scalar_tensor_tensor(
            data=a, op0=np.add, operand0=b[i, 3], op1=np.multiply, operand1=b, mask=m
        ),
        (X + Y[:, 3:4]) * Y,
    ),
    "reciprocal": (lambda a, b, i, j, m: nisa.reciprocal(a, mask=m), 1 / X),
    "tensor_copy": (lambda a, b, i, j, m: nisa.tensor_copy(a, mask=m), X),
    "memset": (lambda a, b, i, j, m: nisa.memset((P, F), 2.5, nl.float32, mask=m), np.full((P, F), 2.5, np.float32)),
    "dropout": (lambda a, b, i, j, m: nisa.dropout(a, 1.0, mask=m), np.zeros((P, F), np.float32)),
    "iota": (
        lambda a, b, i, j, m: nisa.iota(i * 100 + j, dtype=nl.float32, mask=m),
        (PARTITION * 100 + COLUMN).astype(np.float32),
    ),
    "affine_select": (
        lambda a, b, i, j, m: nisa.affine_select(j < i, a, -1.0, mask=m), np.where(COLUMN < PARTITION, X, -1),
    ),
    "range_select": (
        lambda a, b, i, j, m: nisa.range_select(
            on_true_tile=a, comp_op0=np.greater, comp_op1=np.less, bound0=full((P, 1), 7.0), bound1=full((P, 1), 15.0),
            mask=m,
        ),
        np.where((COLUMN > 7) & (COLUMN < 15), X, np.finfo(np.float32).min),
    ),
}
# fmt: on


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements_outside_the_mask_stay(name):
    instruction, expected = ELEMENTWISE[name]

    def body(a, b):
        i, j = nl.arange(P)[:, None], nl.arange(F)[None, :]
        y = full((P, F), KEPT)
        y[i, j] = instruction(a, b, i, j, (i < 32) & (j >= 5) & (j < 20))
        return y

    np.testing.assert_allclose(run(body, X, Y), np.where(INSIDE, expected, KEPT), rtol=1e-6)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_mask_without_rectangle_is_cut_into_some(name):
    instruction, expected = ELEMENTWISE[name]

    def body(a, b):
        i, j = nl.arange(P)[:, None], nl.arange(F)[None, :]
        y = full((P, F), KEPT)
        # Whole quadrants of partitions, so that every rectangle starts where an engine can.
        y[i, j] = instruction(a, b, i, j, 32 * j + 31 >= 10 * i)
        return y

    inside = 32 * COLUMN + 31 >= 10 * PARTITION
    np.testing.assert_allclose(run(body, X, Y), np.where(inside, expected, KEPT), rtol=1e-6)


@pytest.mark.parametrize("mask", [True, False])
def test_masks_of_loop_indices_are_constants(mask):
    def body(a):
        y = full((P, F), KEPT)
        y[:, :] = nisa.tensor_copy(a, mask=mask)
        return y

    np.testing.assert_array_equal(run(body, X), X if mask else np.full((P, F), KEPT, np.float32))


ROWS = {
    "tensor_reduce": (lambda a, m: nisa.tensor_reduce(np.add, a, 1, mask=m), lambda x: x.sum(axis=1, keepdims=True)),
    "max8": (lambda a, m: nisa.max8(src=a, mask=m), lambda x: -np.sort(-x, axis=1)[:, :8]),
    "bn_aggr": (
        lambda a, m: nisa.bn_aggr(nisa.bn_stats(a, mask=m)),
        lambda x: np.stack([x.mean(axis=1), x.var(axis=1)], axis=1),
    ),
    "tensor_partition_reduce": (
        lambda a, m: nisa.tensor_partition_reduce(np.max, a, mask=m)[:, 5:20],
        lambda x: x.max(axis=0, keepdims=True),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_reductions_see_what_the_mask_leaves(name):
    instruction, expected = ROWS[name]

    def body(a):
        i, j = nl.arange(P)[:, None], nl.arange(F)[None, :]
        made = instruction(a[i, j], (i < 32) & (j >= 5) & (j < 20))
        return made if made.shape[0] == 1 else made[0:32]

    np.testing.assert_allclose(run(body, X), expected(X[:32, 5:20]), rtol=1e-5)


def test_a_scan_under_a_mask_begins_where_it_does():
    def body(a, b):
        i, j = nl.arange(P)[:, None], nl.arange(F)[None, :]
        y = full((P, F), KEPT)
        y[i, j] = nisa.tensor_tensor_scan(
            a[i, j], b[i, j], initial=1.0, op0=np.add, op1=np.maximum, mask=(i < 32) & (j >= 5) & (j < 20)
        )
        return y

    expected = np.full((P, F), KEPT, np.float32)
    state = np.ones(32, np.float32)
    for c in range(5, 20):
        state = expected[:32, c] = np.maximum(X[:32, c] + state, Y[:32, c])
    np.testing.assert_allclose(run(body, X, Y), expected, rtol=1e-6)


def column(value):
    return nisa.memset((32, 1), value, nl.float32)


PIECES = {
    "tensor_reduce": lambda a, m: nisa.tensor_reduce(np.add, a, (1, 2), mask=m),
    "tensor_scalar_reduce": lambda a, m: nisa.tensor_scalar_reduce(
        data=a, op0=np.add, operand0=1.0, reduce_op=np.add, reduce_res=column(0.0), mask=m
    ),
    "activation": lambda a, m: nisa.activation(
        np.exp, a, reduce_op=np.add, reduce_res=column(0.0), reduce_cmd=nisa.reduce_cmd.reset_reduce, mask=m
    ),
    "activation_reduce": lambda a, m: nisa.activation_reduce(
        np.exp, a, reduce_op=np.add, reduce_res=column(0.0), mask=m
    ),
    "tensor_tensor_scan": lambda a, m: nisa.tensor_tensor_scan(a, a, 0.0, np.add, np.add, mask=m),
    "bn_stats": lambda a, m: nisa.bn_stats(a, mask=m),
    "max8": lambda a, m: nisa.max8(src=a, mask=m),
    "nc_find_index8": lambda a, m: nisa.nc_find_index8(data=a, vals=nisa.max8(src=a), mask=m),
    "nc_match_replace8": lambda a, m: nisa.nc_match_replace8(data=a, vals=nisa.max8(src=a), imm=0.0, mask=m),
    "range_select": lambda a, m: nisa.range_select(
        on_true_tile=a, comp_op0=np.greater_equal, comp_op1=np.less, bound0=column(0.0), bound1=column(9.0), mask=m,
        reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=column(0.0), reduce_op=np.max,
    ),
    "select_reduce": lambda a, m: nisa.select_reduce(
        dst=nl.ndarray(a.shape, dtype=nl.float32), predicate=nl.greater(a, 0.0, dtype=nl.uint8), on_true=a,
        on_false=0.0, reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=column(0.0), reduce_op=np.max, mask=m,
    ),
    "tensor_partition_reduce": lambda a, m: nisa.tensor_partition_reduce(np.max, a, mask=m),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_what_takes_a_row_as_a_whole_refuses_masks_that_leave_pieces_of_it(name):
    def body(a):
        i, j, k = nl.mgrid[0:32, 0:2, 0:8]
        # Another run of each row's last dimension per j; of each column, for every row another set of columns.
        return PIECES[name](
            a[0:32, 0:16].reshape((32, 2, 8)), (k + j < 6) if name != "tensor_partition_reduce" else i >= k
        )

    with pytest.raises(NotImplementedError, match=rf"nki\.isa\.{name}\.mask: .* takes several instructions"):
        run(body, X)
