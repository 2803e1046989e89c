"""neuronxcc.nki.isa: activation, element-wise arithmetic, reductions and scans."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nkisim.legacy.isa_kernels import BF16, full, instructions, integers, nisa, nl, normal, refused, run, traced

# -- activation


def test_activation_scales_and_adds_before_the_function():
    x, b = normal(64, 40), normal(64, 1, seed=1)
    got = run(lambda a, c: nisa.activation(np.exp, a, bias=c, scale=0.5), x, b)
    np.testing.assert_allclose(got, np.exp(x * 0.5 + b), rtol=1e-6)


def test_activation_takes_a_scale_per_partition_and_a_result_type():
    x, s = normal(64, 40), normal(64, 1, seed=1)
    got = run(lambda a, c: nisa.activation(nl.square, a, scale=c, dtype=nl.bfloat16), x, s)
    np.testing.assert_array_equal(got, np.square(x * s).astype(BF16))


def test_activation_result_has_the_input_type():
    x = normal(16, 8).astype(BF16)
    assert run(lambda a: nisa.activation(np.tanh, a), x).dtype == BF16


@pytest.mark.parametrize("reduce", ["activation", "activation_reduce"])
def test_row_sums(reduce):
    x = normal(32, 50)

    def body(a):
        sums = nl.ndarray((32, 1), dtype=nl.float32)
        if reduce == "activation":
            command = nisa.reduce_cmd.reset_reduce
            y = nisa.activation(nl.exp, a, reduce_op=np.add, reduce_res=sums, reduce_cmd=command)
        else:
            y = nisa.activation_reduce(nl.exp, a, reduce_op=np.add, reduce_res=sums)
        both = nl.ndarray((32, 51), dtype=nl.float32)
        both[:, 0:50] = nisa.tensor_copy(y)
        both[:, 50:51] = nisa.tensor_copy(sums)
        return both

    expected = np.exp(x.astype(np.float64))
    got = run(body, x)
    np.testing.assert_allclose(got[:, :50], expected, rtol=1e-6)
    np.testing.assert_allclose(got[:, 50], expected.sum(axis=1), rtol=1e-5)


def test_row_sums_over_several_calls():
    x = normal(32, 60)

    def body(a):
        sums = nl.ndarray((32, 1), dtype=nl.float32)
        y = nl.ndarray((32, 60), dtype=nl.float32)
        y[:, 0:20] = nisa.activation(nl.copy, a[:, 0:20], reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        # Integers pass as members: 2 is reduce.
        y[:, 20:60] = nisa.activation(nl.copy, a[:, 20:60], reduce_op=nl.add, reduce_cmd=2, reduce_res=sums)
        return sums

    np.testing.assert_allclose(run(body, x), x.sum(axis=1, keepdims=True, dtype=np.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"bias": 1.0}, "err_activation_bias_invalid_type"),
        ({"bias": ((64, 1), np.int8)}, "err_activation_bias_invalid_type"),
        ({"bias": ((64, 2), np.float32)}, "shape of an operand per partition"),
        ({"scale": ((64, 1), np.float16)}, "err_activation_scale_invalid_type"),
        ({"scale": ((64, 64), np.float32)}, "err_activation_scale_scalar_or_vector"),
        ({"scale": ((1, 64), np.float32)}, "err_activation_scale_scalar_or_vector"),
    ],
)
def test_rules_of_bias_and_scale(kwargs, match):
    def body(a):
        tiles = {k: full(v[0], 1, v[1]) if isinstance(v, tuple) else v for k, v in kwargs.items()}
        return nisa.activation(nl.exp, a, **tiles)

    refused(match, body, normal(64, 64))


def test_operators_that_are_no_activation_are_refused():
    refused("activation function", lambda a: nisa.activation(np.add, a), normal(8, 8))


def test_a_masked_activation_leaves_the_rest():
    x = normal(64, 40)

    def body(a):
        i_p, i_f = nl.arange(64)[:, None], nl.arange(40)[None, :]
        y = full((64, 40), 7.0)
        y[i_p, i_f] = nisa.activation(nl.square, a[i_p, i_f], mask=(i_p < 32) & (i_f < 10))
        return y

    expected = np.full((64, 40), 7, np.float32)
    expected[:32, :10] = np.square(x[:32, :10])
    np.testing.assert_array_equal(run(body, x), expected)


# -- element-wise


def test_tensor_tensor_promotes():
    x, y = normal(32, 20), normal(32, 20, seed=1).astype(BF16)
    got = run(lambda a, b: nisa.tensor_tensor(a, b, op=np.subtract), x, y)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x - y.astype(np.float32))
    assert run(lambda a, b: nisa.tensor_tensor(b, b, nl.add), x, y).dtype == BF16
    half = run(lambda a, b: nisa.tensor_tensor(a, b, nl.add), y.astype(np.float16), y)
    assert half.dtype == np.float32


def test_tensor_tensor_on_the_gpsimd_engine():
    x = integers(16, 8, high=2**30)
    got = run(lambda a: nisa.tensor_tensor(a, a, np.add, engine=nisa.gpsimd_engine), x)
    np.testing.assert_array_equal(got, x + x)


def test_tensor_tensor_refuses_two_inputs_in_psum():
    def body(a):
        p = nisa.nc_matmul(a, a)
        q = nisa.nc_matmul(a, a)
        return nisa.tensor_tensor(p, q, nl.add)

    refused("at most one input in PSUM", body, normal(32, 32))


def test_tensor_tensor_refuses_unequal_partitions():
    refused("err_num_partition_mismatch", lambda a, b: nisa.tensor_tensor(a, b, nl.add), normal(16, 8), normal(1, 8))


@pytest.mark.parametrize("shape", [(16, 24), (16, 2, 12), (16, 24, 1)])
def test_operands_have_as_many_elements_in_any_shape(shape):
    x, y = normal(16, 4, 6), normal(*shape, seed=1)
    expected = x + y.reshape(16, 4, 6)
    np.testing.assert_array_equal(run(lambda a, b: nisa.tensor_tensor(a, b, np.add), x, y), expected)

    def body(a, b):
        return nisa.scalar_tensor_tensor(data=a, op0=np.add, operand0=0.0, op1=np.add, operand1=b)

    np.testing.assert_array_equal(run(body, x, y), expected)


@pytest.mark.parametrize(("first", "second"), [((16, 24), (16, 1)), ((16, 1, 5), (16, 3, 1))])
def test_tensor_tensor_repeats_free_dimensions_of_size_one(first, second):
    x, y = normal(*first), normal(*second, seed=1)
    np.testing.assert_array_equal(run(lambda a, b: nisa.tensor_tensor(a, b, np.multiply), x, y), x * y)
    np.testing.assert_array_equal(run(lambda a, b: nisa.tensor_tensor(a, b, np.multiply), y, x), x * y)


@pytest.mark.parametrize(("shape", "match"), [((16, 12), "do not broadcast"), ((16, 1, 8), "elements per partition")])
def test_operands_of_other_sizes_are_refused(shape, match):
    def body(a, b):
        return nisa.tensor_tensor(a, b, np.add)

    refused(match, body, normal(16, 24), normal(*shape))


def test_a_scan_repeats_nothing():
    def body(a, b):
        return nisa.tensor_tensor_scan(a, b, 0.0, np.multiply, np.add)

    refused("elements per partition", body, normal(16, 24), normal(16, 1))


def test_a_mask_over_operands_of_different_shapes():
    def body(columns):
        def add(a, b):
            i_p, i_x = nl.arange(16)[:, None, None], nl.arange(4)[None, :, None]
            return nisa.tensor_tensor(a, b, np.add, mask=(i_x < 2) if columns else (i_p < 8))[0:8]

        return add

    x, y = normal(16, 4, 6), normal(16, 24, seed=1)
    np.testing.assert_array_equal(run(body(False), x, y), x[:8] + y.reshape(16, 4, 6)[:8])
    with pytest.raises(NotImplementedError, match="operands of different shapes"):
        run(body(True), x, y)


def test_tensor_scalar_with_numbers_and_columns_of_any_type():
    x, c = normal(64, 30), normal(64, 1, seed=1).astype(BF16)

    def body(a, b):
        return nisa.tensor_scalar(a, np.multiply, b, op1=np.subtract, operand1=2.5, reverse1=True)

    got = run(body, x, c)
    np.testing.assert_array_equal(got, 2.5 - x * c.astype(np.float32))
    # The current instruction takes float32 columns; the copy that makes one is in the trace.
    assert instructions(traced(body, x, c)).count("tensor_copy") == 1


def test_tensor_scalar_on_bits():
    x = integers(16, 12, high=255, dtype=np.uint8)
    got = run(lambda a: nisa.tensor_scalar(a, np.right_shift, 2, op1=np.bitwise_and, operand1=3), x)
    np.testing.assert_array_equal(got, (x >> 2) & 3)


@pytest.mark.parametrize("op", [np.logical_not, nl.logical_not])
def test_logical_not_is_an_operator(op):
    x = integers(16, 12, high=3).astype(np.float32)
    got = run(lambda a: nisa.tensor_scalar(a, np.subtract, 1.0, op1=op, operand1=0), x)
    np.testing.assert_array_equal(got, (x == 1).astype(np.float32))


def test_tensor_scalar_refuses_a_wide_column():
    refused("shape of an operand per partition", lambda a: nisa.tensor_scalar(a, nl.add, a), normal(8, 8))


def test_the_scalar_engine_of_trn1_has_no_tensor_scalar():
    def body(a):
        return nisa.tensor_scalar(a, nl.multiply, 2.0, engine=nisa.scalar_engine)

    np.testing.assert_array_equal(run(body, normal(8, 8), target="trn2"), normal(8, 8) * 2)
    refused("Scalar Engine on target", body, normal(8, 8), target="trn1")


def test_scalar_tensor_tensor():
    x, y = normal(40, 30), normal(40, 30, seed=1)

    def body(a, b):
        return nisa.scalar_tensor_tensor(
            data=a, op0=np.subtract, operand0=3, op1=np.multiply, operand1=b, reverse0=True
        )

    np.testing.assert_array_equal(run(body, x, y), (3 - x) * y)


def test_reciprocal_in_another_type():
    x = normal(24, 30) + 5
    np.testing.assert_array_equal(run(lambda a: nisa.reciprocal(a, dtype=nl.bfloat16), x), (1 / x).astype(BF16))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_of_nothing_and_everything(rate):
    x = normal(16, 64)
    np.testing.assert_array_equal(run(lambda a: nisa.dropout(a, rate), x), x * (1 - rate))


def test_dropout_rates_per_partition_above_one_drop_everything():
    x = np.ones((128, 512), np.float32)
    rates = np.linspace(0, 4, 128, dtype=np.float32)[:, None]
    got = run(lambda a, p: nisa.dropout(a, p, dtype=nl.bfloat16), x, rates)
    kept = got.astype(np.float32).mean(axis=1)
    assert got.dtype == BF16
    assert not kept[rates[:, 0] >= 1].any()
    # 512 draws: five standard deviations of the share kept.
    np.testing.assert_allclose(kept[rates[:, 0] < 1], 1 - rates[rates < 1], atol=5 * 0.5 / 512**0.5)


def test_dropout_of_integers_keeps_their_type():
    refused("type of an integer tile's result", lambda a: nisa.dropout(a, 0.5, dtype=nl.float32), integers(8, 8))


# -- reductions


@pytest.mark.parametrize(
    ("axis", "over"),
    [(1, (3,)), ([1], (3,)), (3, (3,)), ([2, 3], (2, 3)), ([1, 2], (2, 3)), ((1, 2, 3), (1, 2, 3))],
)
def test_tensor_reduce_counts_axes_from_the_most_minor(axis, over):
    x = normal(16, 3, 4, 5)
    expected = x.max(axis=over)
    if expected.ndim == 1:
        expected = expected[:, None]
    np.testing.assert_array_equal(run(lambda a: nisa.tensor_reduce(np.max, a, axis), x), expected)
    kept = run(lambda a: nisa.tensor_reduce(nl.max, a, axis, keepdims=True), x)
    np.testing.assert_array_equal(kept, x.max(axis=over, keepdims=True))


@pytest.mark.parametrize("axis", [0, [0, 1], [1, 3], [2], -1, 4, "1", []])
def test_other_axes_are_refused(axis):
    refused("axis", lambda a: nisa.tensor_reduce(np.add, a, axis), normal(16, 3, 4, 5))


def test_tensor_reduce_negates():
    x = normal(16, 30)
    got = run(lambda a: nisa.tensor_reduce(np.add, a, axis=[1], negate=True, dtype=nl.bfloat16), x)
    np.testing.assert_allclose(got.astype(np.float32), -x.sum(axis=1, keepdims=True), rtol=0.01, atol=0.02)
    assert got.dtype == BF16


def test_tensor_reduce_under_a_mask_sees_what_it_leaves():
    x = normal(64, 30)

    def body(a):
        i_p, i_f = nl.arange(64)[:, None], nl.arange(30)[None, :]
        y = full((64, 1), 9.0)
        y[i_p, 0] = nisa.tensor_reduce(np.max, a[i_p, i_f], axis=1, mask=(i_p < 32) & (i_f < 7))
        return y

    expected = np.full((64, 1), 9, np.float32)
    expected[:32, 0] = x[:32, :7].max(axis=1)
    np.testing.assert_array_equal(run(body, x), expected)


def test_a_reduction_under_a_mask_that_splits_rows_is_refused():
    def body(a):
        i_p, i_a, i_b = nl.arange(32)[:, None, None], nl.arange(6)[None, :, None], nl.arange(6)[None, None, :]
        return nisa.tensor_reduce(np.add, a[i_p, i_a, i_b], axis=[1, 2], mask=i_b < i_a)

    with pytest.raises(NotImplementedError, match=r"tensor_reduce\.mask: .*several instructions"):
        run(body, normal(32, 6, 6))


@pytest.mark.parametrize(
    ("op", "expected"), [(nl.max, np.max), (np.add, np.sum), (nl.subtract, lambda y, axis: -np.sum(y, axis=axis))]
)
def test_tensor_scalar_reduce(op, expected):
    x = normal(16, 30)

    def body(a):
        result = nl.ndarray((16, 1), dtype=nl.float32)
        y = nl.ndarray((16, 31), dtype=nl.float32)
        y[:, 0:30] = nisa.tensor_scalar_reduce(data=a, op0=np.multiply, operand0=2.0, reduce_op=op, reduce_res=result)
        y[:, 30:31] = nisa.tensor_copy(result)
        return y

    got = run(body, x)
    np.testing.assert_array_equal(got[:, :30], x * 2)
    np.testing.assert_allclose(got[:, 30], expected(x * 2, axis=1), rtol=1e-5, atol=1e-5)


def test_tensor_scalar_reduce_needs_a_result():
    def body(a):
        return nisa.tensor_scalar_reduce(data=a, op0=nl.add, operand0=1, reduce_op=nl.add, reduce_res=None)

    refused("result of the reduction", body, normal(8, 8))


def test_tensor_tensor_scan_goes_on_from_a_column():
    x, y = normal(32, 40), normal(32, 40, seed=1)

    def body(a, b):
        c = nl.ndarray((32, 40), dtype=nl.float32)
        c[:, 0:25] = nisa.tensor_tensor_scan(a[:, 0:25], b[:, 0:25], initial=0, op0=np.multiply, op1=np.add)
        c[:, 25:40] = nisa.tensor_tensor_scan(a[:, 25:40], b[:, 25:40], initial=c[:, 24], op0=np.multiply, op1=np.add)
        return c

    expected = np.zeros((32, 40))
    state = np.zeros(32)
    for i in range(40):
        state = expected[:, i] = x[:, i] * state + y[:, i]
    np.testing.assert_allclose(run(body, x, y), expected, rtol=1e-4, atol=1e-4)


def test_bn_stats_and_bn_aggr():
    x = normal(32, 300)

    def body(a):
        stats = nl.ndarray((32, 12), dtype=nl.float32)
        i_p, i_s = nl.mgrid[0:32, 0:6]
        for i in range(2):
            stats[i_p, i * 6 + i_s] = nisa.bn_stats(a[:, i * 150 : (i + 1) * 150])
        return nisa.bn_aggr(stats)

    expected = np.stack([x.mean(axis=1), x.var(axis=1)], axis=1)
    np.testing.assert_allclose(run(body, x), expected, rtol=1e-5, atol=1e-6)


def test_bn_stats_takes_512_elements_per_partition():
    refused("bn_stats", lambda a: nisa.bn_stats(a), normal(4, 513))


# -- the table of activation functions that NumPy has too


@pytest.mark.parametrize(
    "function",
    [np.copy, np.square, np.tanh, np.exp, np.log, np.sin, np.arctan, np.sqrt, np.reciprocal, np.sign, np.abs],
    ids=lambda f: f.__name__,
)
def test_numpy_functions_name_activations(function):
    x = np.abs(normal(8, 40)) + np.float32(0.1)
    x = np.minimum(x, 1.5)  # arctan's range
    np.testing.assert_allclose(run(lambda a: nisa.activation(function, a), x), function(x), rtol=2e-6)
