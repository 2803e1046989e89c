"""Scalar Engine: activation and activation_reduce; records and signatures of all its instructions."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.isa import reduce_cmd
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16


def apply(op, x, target="trn2", **kwargs):
    """`activation` of an array with numbers as arguments."""

    def kernel(x):
        y = tile(x.shape)
        nisa.activation(y, op, sb(x), **kwargs)
        return out(y)

    return run(kernel, x, target=target)


# -- scale, bias, layouts, dtypes


def test_softmax_numerator_and_its_row_sum_in_one_instruction():
    x = 4 * normal(128, 96)
    bias = -np.abs(normal(128, 1, seed=1))
    scale = 0.125

    def kernel(x, bias):
        y, total = tile(x.shape), tile((128, 1))
        nisa.activation(
            dst=y,
            op=nl.exp,
            data=ps(x),
            bias=sb(bias),
            scale=scale,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=reduce_cmd.reset_reduce,
        )
        return out(y), out(total)

    y, total = run(kernel, x, bias)
    exact = np.exp(x.astype(np.float64) * scale + bias)
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    np.testing.assert_allclose(total, exact.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.int8, np.uint8, np.int32, np.uint16])
@pytest.mark.parametrize("place", [sb, ps])
def test_inputs_of_every_kind_are_computed_in_float32(dtype, place):
    x = integers(8, 33, low=0, high=100).astype(dtype)

    def kernel(x):
        y = tile(x.shape)
        nisa.activation(y, nl.copy, place(x), bias=0.7, scale=1.3)
        return out(y)

    f = x.astype(np.float32)
    np.testing.assert_array_equal(run(kernel, x), f * np.float32(1.3) + np.float32(0.7))


@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [
        (nl.bfloat16, BF16),
        (nl.float16, np.float16),
        (nl.float8_e5m2, ml_dtypes.float8_e5m2),
        (nl.float8_e4m3, ml_dtypes.float8_e4m3),
    ],
)
@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
def test_results_are_rounded_once_to_the_destination(dtype, numpy, buffer):
    x = normal(16, 40)

    def kernel(x):
        y = tile(x.shape, dtype, buffer)
        nisa.activation(y, nl.square, sb(x), scale=1.1)
        return out(y)

    f = x * np.float32(1.1)
    np.testing.assert_array_equal(run(kernel, x).astype(np.float32), (f * f).astype(numpy).astype(np.float32))


def test_integer_destination_rounds_to_nearest_even_and_saturates():
    x = np.array([[0.5, 1.5, 2.5, 300.0, -300.0, np.nan]], np.float32)

    def kernel(x):
        y = tile(x.shape, nl.int8)
        nisa.activation(y, nl.copy, sb(x))
        return out(y)

    np.testing.assert_array_equal(run(kernel, x), [[0, 2, 2, 127, -128, 0]])


@pytest.mark.parametrize("place", [sb, ps])
@pytest.mark.parametrize("bias_dtype", [np.float32, BF16, np.float16, np.int8])
def test_scale_and_bias_per_partition(place, bias_dtype):
    x, s = normal(32, 21), normal(32, 1, seed=1)
    b = (8 * normal(32, 1, seed=2)).astype(bias_dtype)

    def kernel(x, s, b):
        y = tile(x.shape)
        nisa.activation(y, nl.copy, sb(x), place(b), place(s))
        return out(y)

    np.testing.assert_array_equal(run(kernel, x, s, b, target="trn1"), x * s + b.astype(np.float32))


@pytest.mark.parametrize("scale", [1.0, 1, 2, 0.0, np.float32(1), np.float64(0.1)])
@pytest.mark.parametrize("bias", [None, 0.0, 3])
def test_numbers_as_scale_and_bias(scale, bias):
    x = normal(4, 10)
    expected = x * np.float32(scale) + np.float32(bias or 0)
    np.testing.assert_array_equal(apply(nl.copy, x, scale=scale, bias=bias), expected)


def test_the_input_is_left_alone_and_may_be_the_output():
    x = normal(16, 20)

    def kernel(x):
        t, y, whole = sb(x), tile(x.shape), tile((16, 1))
        nisa.activation(y, nl.square, t, scale=3.0, bias=1.0)
        nisa.activation(y, nl.exp, t)
        first = out(t)
        nisa.activation(t, nl.square, t, bias=1.0)
        nisa.activation_reduce(t, nl.copy, t, nl.add, whole)
        return first, out(t), out(whole)

    first, second, total = run(kernel, x)
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(second, (x + 1) * (x + 1))
    np.testing.assert_allclose(total[:, 0], ((x + 1.0) ** 2).sum(1), rtol=1e-5)


def test_strided_views_of_different_rank():
    x = normal(8, 24)

    def kernel(x):
        t, y = sb(x), tile((8, 3, 10))
        nisa.memset(y, 0.0)
        nisa.activation(y[:, :, 1:9:2], nl.square, t[:, 0:24:2], scale=2.0)
        return out(y)

    expected = np.zeros((8, 3, 10), np.float32)
    expected[:, :, 1:9:2] = np.square(2 * x[:, ::2]).reshape(8, 3, 4)
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_all_float32_mode_does_not_round():
    x = normal(4, 9)

    def kernel(x):
        y = tile(x.shape, nl.bfloat16)
        nisa.activation(y, nl.square, sb(x, nl.bfloat16))
        return out(y)

    rounded = np.square(x.astype(BF16).astype(np.float32)).astype(BF16)
    np.testing.assert_array_equal(run(kernel, x), rounded)
    np.testing.assert_array_equal(run(kernel, x, precise=False), np.square(x).astype(BF16))


def test_gather_and_scatter_of_columns():
    x = normal(16, 12)
    index = np.zeros((16, 1), np.uint16)
    index[:6, 0] = [3, 1, 0, 11, 7, 5]

    def kernel(x, index):
        i, t, y, z = sb(index), sb(x), tile((16, 6)), tile((16, 12))
        nisa.memset(z, 0.0)
        nisa.activation(y, nl.square, t.indirect(i, 6))
        nisa.activation(z.indirect(i, 6), nl.copy, y, scale=2.0)
        return out(y), out(z)

    y, z = run(kernel, x, index, target="trn3")
    columns = index[:6, 0]
    np.testing.assert_array_equal(y, np.square(x[:, columns]))
    expected = np.zeros_like(x)
    expected[:, columns] = 2 * np.square(x[:, columns])
    np.testing.assert_array_equal(z, expected)


# -- accumulator registers


def test_commands_chain_over_instructions():
    a, b = normal(8, 10), normal(8, 6, seed=1)

    def kernel(a, b):
        y, z = tile(a.shape), tile(b.shape)
        results = [tile((8, 1)) for _ in range(4)]
        ta, tb = sb(a), sb(b)
        nisa.activation(y, nl.square, ta, reduce_op=nl.add, reduce_cmd=reduce_cmd.reset_reduce)
        nisa.activation(z, nl.copy, tb)  # idle: the registers stay
        nisa.activation(z, nl.abs, tb, reduce_op=nl.add, reduce_res=results[0], reduce_cmd=reduce_cmd.reduce)
        nisa.activation(z, nl.copy, tb, reduce_res=results[1])  # idle reads them out
        nisa.activation(z, nl.copy, tb, reduce_res=results[2], reduce_cmd=reduce_cmd.reset)
        nisa.activation(z, nl.copy, tb, reduce_op=nl.add, reduce_res=results[3], reduce_cmd=reduce_cmd.reduce)
        return tuple(out(r) for r in results)

    both, again, none, last = run(kernel, a, b)
    expected = np.square(a.astype(np.float64)).sum(1) + np.abs(b.astype(np.float64)).sum(1)
    np.testing.assert_allclose(both[:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(again, both)
    np.testing.assert_array_equal(none, np.zeros((8, 1)))
    np.testing.assert_allclose(last[:, 0], b.astype(np.float64).sum(1), rtol=1e-5, atol=1e-6)


def test_registers_belong_to_partitions_and_to_this_engine():
    x = normal(64, 5)

    def kernel(x):
        t, y, first, second = sb(x), tile(x.shape), tile((64, 1)), tile((64, 1))
        nisa.activation_reduce(y[:32], nl.copy, t[:32], nl.add, None)
        nisa.activation_reduce(y[32:], nl.square, t[32:], nl.add, None)
        nisa.tensor_scalar_reduce(tile(x.shape), t, nl.multiply, 0.0, nl.add, first)  # the Vector Engine's own
        nisa.activation(y, nl.copy, t, reduce_res=second)
        return out(second)

    expected = np.concatenate([x[:32].sum(1), np.square(x[32:]).sum(1)])
    np.testing.assert_allclose(run(kernel, x)[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_sum_is_of_the_results_before_they_are_rounded():
    x = np.full((4, 64), 1.0 + 2.0**-12, np.float32)

    def kernel(x):
        y, total = tile(x.shape, nl.bfloat16), tile((4, 1))
        nisa.activation_reduce(y, nl.copy, sb(x), nl.add, total)
        return out(y), out(total)

    y, total = run(kernel, x)
    np.testing.assert_array_equal(y.astype(np.float32), np.ones((4, 64)))
    np.testing.assert_array_equal(total, np.full((4, 1), 64 * (1 + 2.0**-12)))


def test_result_may_alias_the_destination_and_is_rounded():
    x = np.full((4, 3), 1.0 + 2.0**-9, np.float32)

    def kernel(x):
        y = tile((4, 3), nl.bfloat16, nl.psum)
        nisa.activation_reduce(y, nl.copy, sb(x), nl.add, y[:, 1:2], bias=1.0)
        return out(y)

    one = np.float32(2.0 + 2.0**-9)
    expected = np.array([[one, 3 * one, one]] * 4, np.float32).astype(BF16)
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_reduce_res_without_a_command_is_told_of_the_default():
    def kernel(x):
        nisa.activation(tile(x.shape), nl.exp, sb(x), reduce_op=nl.add, reduce_res=tile((4, 1)))

    error = refused(
        kernel,
        normal(4, 5),
        instruction="activation",
        operand="reduce_res",
        rule="undefined accumulator registers",
        received="reduce_cmd is idle (its default)",
        allowed="reduce_cmd=reset_reduce, or reduce",
    )
    assert "Vector" not in str(error)


# -- records and signatures


def test_one_record_on_the_scalar_engine():
    def kernel(x):
        t, y, s = sb(x), tile(x.shape), tile((4, 1))
        nisa.activation(y, nl.exp, t, name="e")
        nisa.activation_reduce(y, nl.square, t, nl.add, s, name="r")
        nisa.activate2(y, nl.prelu, t, 1.0, 0.0, nl.multiply, nl.bypass, relu_param=0.1, name="a")

    records = traced(kernel, normal(4, 5), target="trn3").records[1:]
    assert [r.engine for r in records] == [Engine.scalar] * 3
    assert [r.instruction for r in records] == ["activation", "activation_reduce", "activate2"]
    assert [r.name for r in records] == ["e", "r", "a"]
    assert records[0].attrs == {"op": "exp", "reduce_cmd": "idle"}
    assert records[1].attrs == {"op": "square", "reduce_cmd": "reset_reduce"}
    assert records[2].attrs == {"op": "prelu", "reduce_cmd": "idle", "op0": "multiply", "op1": "bypass"}
    assert [[a.operand for a in r.reads] for r in records] == [["data"]] * 3
    assert [[a.operand for a in r.writes] for r in records] == [["dst"], ["dst", "reduce_res"], ["dst"]]
    assert records[0].writes[0].shape == (4, 5)


def test_signatures():
    def names(f):
        return list(inspect.signature(f).parameters)

    assert names(nisa.activation) == [
        *("dst", "op", "data", "bias", "scale", "reduce_op", "reduce_res", "reduce_cmd", "name")
    ]
    assert names(nisa.activation_reduce) == [
        *("dst", "op", "data", "reduce_op", "reduce_res", "bias", "scale", "name"),
    ]
    assert names(nisa.activate2) == [
        *("dst", "op", "data", "imm0", "imm1", "op0", "op1", "relu_param", "reverse0", "reverse1"),
        *("reduce_op", "reduce_res", "reduce_cmd", "name"),
    ]
    defaults = {k: p.default for k, p in inspect.signature(nisa.activation).parameters.items()}
    assert defaults["scale"] == 1.0
    assert defaults["bias"] is None
    assert defaults["reduce_cmd"] is reduce_cmd.idle


# -- refusals

X = normal(8, 6)


def test_nothing_is_written_when_refused():
    written = []

    def kernel(x):
        y, total = tile(x.shape), tile((8, 1))
        nisa.memset(y, 7.0)
        nisa.memset(total, 8.0)
        try:
            nisa.activation(y, nl.copy, sb(x), reduce_op=nl.add, reduce_res=total, reduce_cmd=reduce_cmd.reduce)
        except nisa.NkiValidationError as error:
            written.append(error.rule)
        return out(y), out(total)

    y, total = run(kernel, X)
    assert written == ["undefined accumulator registers"]
    assert (y == 7).all()
    assert (total == 8).all()


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda t: {"op": nl.prelu}, "op", "activation function", "prelu", "sigmoid"),
        (lambda t: {"op": nl.add}, "op", "activation function", "add", "exp"),
        (lambda t: {"op": "exp"}, "op", "activation function", "'exp'", "exp"),
        (lambda t: {"scale": tile((8, 1), nl.bfloat16)}, "scale", "dtype", "bfloat16", "float32"),
        (lambda t: {"scale": t}, "scale", "shape", "[8, 6]", "[8, 1]"),
        (lambda t: {"scale": tile((4, 1))}, "scale", "shape", "[4, 1]", "[8, 1]"),
        (lambda t: {"scale": "2"}, "scale", "type", "str", "a number"),
        (lambda t: {"scale": True}, "scale", "type", "bool", "a number"),
        (lambda t: {"scale": nisa.VirtualRegister(1)}, "scale", "type", "VirtualRegister", "a number"),
        (lambda t: {"bias": tile((8, 1), nl.tfloat32)}, "bias", "dtype", "tfloat32", "bfloat16"),
        (lambda t: {"bias": tile((8, 2))}, "bias", "shape", "[8, 2]", "[8, 1]"),
        (lambda t: {"bias": tile((8, 1))}, "bias", "uninitialized read", "8 of 8", "written"),
        (lambda t: {"reduce_op": nl.maximum}, "reduce_op", "operator", "maximum", "nl.add"),
        (lambda t: {"reduce_cmd": reduce_cmd.reset_reduce}, "reduce_op", "operator under reset_reduce", "None", "add"),
        (lambda t: {"reduce_cmd": reduce_cmd.reduce}, "reduce_op", "operator under reduce", "None", "nl.add"),
        (lambda t: {"reduce_cmd": reduce_cmd.load_reduce}, "reduce_cmd", "value", "load_reduce", "reset_reduce"),
        (lambda t: {"reduce_cmd": 2}, "reduce_cmd", "type", "2", "nki.isa.reduce_cmd"),
        (lambda t: {"reduce_res": tile((8, 2))}, "reduce_res", "shape", "[8, 2]", "[8, 1]"),
        (lambda t: {"reduce_res": tile((4, 1))}, "reduce_res", "shape", "[4, 1]", "[8, 1]"),
        (lambda t: {"reduce_res": tile((8, 1))}, "reduce_res", "undefined accumulator", "idle", "reset_reduce"),
        (lambda t: {"dst": tile((4, 6))}, "data", "partitions", "8", "4"),
        (lambda t: {"dst": tile((8, 7))}, "data", "elements per partition", "6", "7"),
        (lambda t: {"dst": 3}, "dst", "type", "int", "NkiTensor"),
        (lambda t: {"dst": tile((8, 6), nl.float8_e4m3fn)}, "dst", "dtype", "float8_e4m3fn on trn2", "float8_e4m3"),
        (lambda t: {"dst": tile((8, 6), nl.float8_e4m3fn_x4)}, "dst", "dtype", "float8_e4m3fn_x4", "float32"),
        (lambda t: {"data": tile((8, 6))}, "data", "uninitialized read", "48 of 48", "written"),
    ],
)
def test_activation_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        t = sb(x)
        nisa.activation(**{"dst": tile(x.shape), "op": nl.exp, "data": t, **make(t)})

    refused(kernel, X, instruction="activation", operand=operand, rule=rule, received=received, allowed=allowed)


def test_activation_refuses_hbm():
    def kernel(x):
        nisa.activation(tile(x.shape), nl.exp, x)

    refused(
        kernel,
        X,
        instruction="activation",
        operand="data",
        rule="buffer",
        received="private_hbm",
        allowed="sbuf or psum",
    )


def test_constant_bias_needs_neuroncore_v3():
    def kernel(x):
        nisa.activation(tile(x.shape), nl.exp, sb(x), bias=0.0)

    refused(
        kernel,
        X,
        instruction="activation",
        operand="bias",
        rule="constant bias on trn1",
        received="0.0",
        allowed="[8, 1]",
        target="trn1",
    )
    run(kernel, X, target="trn2")


def test_reciprocal_takes_no_bias_before_neuroncore_v3():
    def kernel(x, b):
        nisa.activation(tile(x.shape), nl.reciprocal, sb(x), bias=sb(b))

    facts = {"operand": "bias", "rule": "bias of nl.reciprocal", "received": "a bias", "allowed": "None"}
    refused(kernel, X, X[:, :1].copy(), instruction="activation", target="trn1", **facts)
    run(kernel, X, X[:, :1].copy(), target="trn2")


def test_activation_reduce_refuses_as_activation_does():
    def kernel(x):
        nisa.activation_reduce(tile(x.shape), nl.exp, sb(x), nl.maximum, tile((8, 1)))

    for target in ("trn1", "trn3"):
        refused(
            kernel,
            X,
            instruction="activation_reduce",
            operand="reduce_op",
            rule="operator",
            received="maximum",
            allowed="nl.add",
            target=target,
        )


def test_indirection_is_refused_before_neuroncore_v4_and_for_columns():
    index = np.zeros((8, 1), np.uint16)

    def gathers(x, index):
        nisa.activation(tile((8, 4)), nl.exp, sb(x).indirect(sb(index), 4))

    facts = {"rule": "tensor indirection", "received": "trn2", "allowed": "NeuronCore-v4"}
    refused(gathers, X, index, instruction="activation", operand="data", **facts)

    def scale(x, index):
        nisa.activation(tile(x.shape), nl.exp, sb(x), scale=sb(x).indirect(sb(index), 1))

    refused(
        scale,
        X,
        index,
        instruction="activation",
        operand="scale",
        rule="tensor indirection",
        received=".indirect() view",
        allowed="an ordinary view",
        target="trn3",
    )

    def psum(x, index):
        y = tile(x.shape, nl.float32, nl.psum)
        nisa.activation(y.indirect(sb(index), 6), nl.exp, sb(x))

    refused(
        psum,
        X,
        index,
        instruction="activation",
        operand="dst",
        rule="scatter on the Scalar Engine",
        received="psum",
        allowed="sbuf",
        target="trn3",
    )
