"""Scalar Engine: activate2."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.isa import reduce_cmd
from tests.nkisim.harness import normal, out, ps, refused, run, sb, tile

BF16 = ml_dtypes.bfloat16
X = normal(8, 6)


PAIRS = {
    ("multiply", "add"): lambda x, a, b: x * a + b,
    ("multiply", "subtract"): lambda x, a, b: x * a - b,
    ("multiply", "bypass"): lambda x, a, b: x * a,
    ("add", "bypass"): lambda x, a, b: x + a,
    ("subtract", "bypass"): lambda x, a, b: x - a,
    ("bypass", "bypass"): lambda x, a, b: x,
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [None, np.float32, BF16])
def test_activate2_pairs(pair, dtype):
    x = normal(16, 30)
    a, b = np.full((16, 1), 0.75, np.float32), np.full((16, 1), -1.25, np.float32)
    if dtype is not None:
        a, b = normal(16, 1, seed=1).astype(dtype), normal(16, 1, seed=2).astype(dtype)

    def kernel(x, a, b):
        y = tile(x.shape)
        t = sb(x)
        imm0, imm1 = (0.75, -1.25) if dtype is None else (sb(a), ps(b))
        nisa.activate2(y, nl.square, t, imm0, imm1, getattr(nl, pair[0]), getattr(nl, pair[1]))
        return out(y), out(t)

    y, t = run(kernel, x, a, b, target="trn3")
    f = PAIRS[pair](x, a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_array_equal(y, f * f)
    np.testing.assert_array_equal(t, x)


@pytest.mark.parametrize(("reverse0", "reverse1"), [(True, False), (False, True), (True, True)])
def test_activate2_reversed(reverse0, reverse1):
    x = normal(8, 20)

    def kernel(x):
        t, y, z = sb(x), tile(x.shape, nl.bfloat16), tile(x.shape)
        nisa.activate2(y, nl.copy, t, 2.0, 0.5, nl.multiply, nl.subtract, 0.0, reverse0, reverse1)
        nisa.activate2(z, nl.copy, t, 2.0, 0.5, nl.subtract, nl.bypass, reverse0=True)
        return out(y), out(z)

    y, z = run(kernel, x, target="trn3")
    np.testing.assert_array_equal(y, (0.5 - x * 2 if reverse1 else x * 2 - 0.5).astype(BF16))
    np.testing.assert_array_equal(z, 2 - x)


@pytest.mark.parametrize("slope", [0.0, 0.25, -2.0, None])
def test_activate2_prelu(slope):
    x = normal(8, 20)
    column = normal(8, 1, seed=3)

    def kernel(x, column):
        y = tile(x.shape)
        param = sb(column) if slope is None else slope
        nisa.activate2(y, nl.prelu, sb(x), 2.0, 0.5, nl.multiply, nl.add, relu_param=param)
        return out(y)

    f = x * 2 + np.float32(0.5)
    factor = column if slope is None else np.float32(slope)
    np.testing.assert_array_equal(run(kernel, x, column, target="trn3"), np.where(f >= 0, f, f * factor))


@pytest.mark.parametrize("name", ["add", "maximum", "minimum", "abs_max", "abs_min"])
def test_activate2_reductions_start_at_their_identity_and_chain(name):
    a, b = normal(16, 7), normal(16, 9, seed=1)

    def kernel(a, b):
        ya, yb, one, two, start = tile(a.shape), tile(b.shape), tile((16, 1)), tile((16, 1)), tile((16, 1))
        common = {"imm0": 0.0, "imm1": 0.0, "op0": nl.bypass, "op1": nl.bypass, "reduce_op": getattr(nl, name)}
        nisa.activate2(ya, nl.copy, sb(a), **common, reduce_res=one, reduce_cmd=reduce_cmd.reset_reduce)
        nisa.activate2(yb, nl.copy, sb(b), **common, reduce_res=two, reduce_cmd=reduce_cmd.reduce)
        nisa.activate2(yb, nl.copy, sb(b), **common, reduce_res=start, reduce_cmd=reduce_cmd.reset)
        return out(one), out(two), out(start)

    def reduce(x):
        rows = np.arange(16)
        return {
            "add": lambda: x.astype(np.float64).sum(1),
            "maximum": lambda: x.max(1),
            "minimum": lambda: x.min(1),
            "abs_max": lambda: x[rows, np.abs(x).argmax(1)],
            "abs_min": lambda: x[rows, np.abs(x).argmin(1)],
        }[name]()

    one, two, start = run(kernel, a, b, target="trn3")
    np.testing.assert_allclose(one[:, 0], reduce(a), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two[:, 0], reduce(np.concatenate([a, b], 1)), rtol=1e-5, atol=1e-6)
    identity = {"add": 0.0, "maximum": -np.inf, "minimum": np.inf, "abs_max": 0.0, "abs_min": np.inf}[name]
    np.testing.assert_array_equal(start, np.full((16, 1), identity))


def test_activate2_magnitude_ties_go_to_the_later_element():
    x = np.array([[2.0, -2.0, 1.0], [-2.0, 2.0, -1.0], [3.0, -3.0, 3.0]], np.float32)

    def kernel(x):
        results = []
        for op in (nl.abs_max, nl.abs_min):
            y, result = tile(x.shape), tile((3, 1))
            nisa.activate2(
                y,
                nl.copy,
                sb(x),
                0.0,
                0.0,
                nl.bypass,
                nl.bypass,
                reduce_op=op,
                reduce_res=result,
                reduce_cmd=reduce_cmd.reset_reduce,
            )
            results.append(out(result))
        return tuple(results)

    largest, smallest = run(kernel, x, target="trn3")
    np.testing.assert_array_equal(largest[:, 0], [-2.0, 2.0, 3.0])
    np.testing.assert_array_equal(smallest[:, 0], [1.0, -1.0, 3.0])


def test_activate2_shares_the_registers_of_activation():
    x = normal(8, 6)

    def kernel(x):
        t, y, total = sb(x), tile(x.shape), tile((8, 1))
        nisa.activation_reduce(y, nl.copy, t, nl.add, None)
        nisa.activate2(
            y,
            nl.copy,
            t,
            2.0,
            0.0,
            nl.multiply,
            nl.bypass,
            reduce_op=nl.add,
            reduce_res=total,
            reduce_cmd=reduce_cmd.reduce,
        )
        return out(total)

    np.testing.assert_allclose(run(kernel, x, target="trn3")[:, 0], 3 * x.astype(np.float64).sum(1), atol=1e-5)


# -- refusals


@pytest.mark.parametrize(
    ("change", "operand", "rule", "received", "allowed"),
    [
        ({"op0": nl.bypass, "op1": nl.add}, "op0", "operators", "(bypass, add)", "(nl.multiply, nl.add)"),
        ({"op0": nl.add, "op1": nl.multiply}, "op0", "operators", "(add, multiply)", "(nl.add, nl.bypass)"),
        ({"op0": nl.maximum}, "op0", "operators", "(maximum, add)", "(nl.bypass, nl.bypass)"),
        ({"op1": None}, "op0", "operators", "(multiply, None)", "nl.bypass"),
        ({"op1": nl.bypass, "reverse1": True}, "reverse1", "bypassed operator", "True", "False"),
        (
            {"op0": nl.bypass, "op1": nl.bypass, "reverse0": True},
            "reverse0",
            "bypassed operator",
            "True",
            "False",
        ),
        ({"reverse0": 1}, "reverse0", "type", "1", "True or False"),
        ({"op": nl.maximum}, "op", "activation function", "maximum", "prelu"),
        ({"relu_param": 0.5}, "relu_param", "parameter of nl.exp", "0.5", "nl.prelu"),
        ({"imm0": None}, "imm0", "type", "NoneType", "a number"),
        ({"imm1": "x"}, "imm1", "type", "str", "a number"),
        ({"reduce_op": nl.multiply}, "reduce_op", "operator", "multiply", "nl.abs_min"),
        ({"reduce_cmd": reduce_cmd.reset}, "reduce_op", "operator under reset", "None", "identity"),
        ({"reduce_cmd": reduce_cmd.reset_reduce}, "reduce_op", "operator under reset_reduce", "None", "nl.maximum"),
        ({"reduce_cmd": reduce_cmd.load_reduce}, "reduce_cmd", "value", "load_reduce", "idle, reset"),
        (
            {"reduce_op": nl.add, "reduce_cmd": reduce_cmd.reduce},
            "reduce_cmd",
            "undefined accumulator",
            "reduce",
            "reset_reduce",
        ),
    ],
)
def test_activate2_refuses(change, operand, rule, received, allowed):
    def kernel(x):
        arguments = {"op": nl.exp, "imm0": 1.0, "imm1": 0.0, "op0": nl.multiply, "op1": nl.add, **change}
        nisa.activate2(dst=tile(x.shape), data=sb(x), **arguments)

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, X, instruction="activate2", target="trn3", **facts)


def test_activate2_needs_neuroncore_v4():
    def kernel(x):
        nisa.activate2(tile(x.shape), nl.exp, sb(x), 1.0, 0.0, nl.multiply, nl.add)

    refused(
        kernel,
        X,
        instruction="activate2",
        rule="target",
        received="trn2",
        allowed="NeuronCore-v4",
        target="trn2",
    )


def test_activate2_immediates_have_one_dtype_and_one_column():
    def dtypes(x):
        a, b = tile((8, 1), nl.float32), tile((8, 1), nl.bfloat16)
        nisa.activate2(tile(x.shape), nl.exp, sb(x), a, b, nl.multiply, nl.add)

    facts = {"rule": "dtype", "received": "bfloat16", "allowed": "float32"}
    refused(dtypes, X, instruction="activate2", operand="imm1", target="trn3", **facts)

    def unused(x):
        nisa.activate2(tile(x.shape), nl.exp, sb(x), 1.0, tile((8, 2)), nl.multiply, nl.bypass)

    facts = {"rule": "shape", "received": "[8, 2]", "allowed": "[8, 1]"}
    refused(unused, X, instruction="activate2", operand="imm1", target="trn3", **facts)

    def unread(x):
        y = tile(x.shape)
        nisa.activate2(y, nl.copy, sb(x), 1.0, tile((8, 1)), nl.multiply, nl.bypass)
        return out(y)

    np.testing.assert_array_equal(run(unread, X, target="trn3"), X)
