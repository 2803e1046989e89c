"""tensor_scalar_cumulative and tensor_tensor_scan."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.reduce_kernels import CMD, bf16, f32, only


def cumulative(op0: Any, op1: Any, imm0: Any, dtype: Any = None, **kwargs: Any) -> Any:
    def kernel(x):
        dst = tile(x.shape, dtype or x.dtype)
        nisa.tensor_scalar_cumulative(dst, sb(x), op0, op1, imm0, **kwargs)
        return out(dst)

    return kernel


STEPS = {
    "add": (0.0, lambda y, r: y + r),
    "subtract": (0.0, lambda y, r: y - r),
    "multiply": (1.0, lambda y, r: y * r),
    "maximum": (-np.inf, np.maximum),
    "minimum": (np.inf, np.minimum),
}


def running(y: Any, name: str, start: Any = None) -> Any:
    """r = op1(y, r) along axis 1, in float32 step by step."""
    first, step = STEPS[name]
    r = np.full(y.shape[0], first if start is None else start, f32)
    result = np.empty(y.shape, f32)
    for i in range(y.shape[1]):
        r = step(y[:, i].astype(f32), r).astype(f32)
        result[:, i] = r
    return result


# -- tensor_scalar_cumulative


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [f32, bf16, np.float16, np.int8, np.uint16, ml_dtypes.float8_e5m2])
def test_cumulative_values(name, dtype):
    x = np.abs(normal(6, 9, seed=2) * 4).astype(dtype)
    got = run(cumulative(nl.add, getattr(nl, name), f32(0.5), nl.float32), x)
    np.testing.assert_array_equal(got, running(x.astype(f32) + f32(0.5), name))


def test_cumulative_keeps_float32_between_elements():
    # In bfloat16 the running sum would stop at 256.
    x = np.ones((1, 300), bf16)
    got = run(cumulative(nl.multiply, nl.add, 1.0), x)
    np.testing.assert_array_equal(got[0], np.arange(1, 301).astype(f32).astype(bf16))


def test_cumulative_other_first_operators_and_flattening():
    x = integers(4, 3, 5, low=-5, high=6, dtype=f32)
    imm = integers(4, 1, low=-5, high=6, seed=9, dtype=f32)

    def kernel(x, imm):
        a, dst = ps(x), tile((4, 15), nl.float16, nl.psum)
        nisa.tensor_scalar_cumulative(dst, a, nl.greater, nl.add, sb(imm))
        nisa.tensor_scalar_cumulative(a, a, nl.maximum, nl.minimum, 0.0)
        return out(dst), out(a)

    dst, a = run(kernel, x, imm)
    flat = x.reshape(4, 15)
    np.testing.assert_array_equal(dst, np.cumsum(flat > imm, axis=1).astype(np.float16))
    np.testing.assert_array_equal(a.reshape(4, 15), np.minimum.accumulate(np.maximum(flat, 0), axis=1))


def test_cumulative_chain_and_load():
    x = integers(3, 4, low=-5, high=6, dtype=f32)
    init = np.array([[100.0], [200.0], [300.0]], f32)

    def kernel(x, init):
        data, a, b, c, res = sb(x), tile((3, 4)), tile((3, 4)), tile((3, 4)), tile((3, 1))
        nisa.tensor_scalar_cumulative(a, data, nl.add, nl.add, 0.0, sb(init), CMD.load_reduce)
        nisa.tensor_scalar_cumulative(b, data, nl.multiply, nl.add, 2.0, reduce_cmd=CMD.reduce)
        # The registers are those of tensor_scalar_reduce too.
        nisa.tensor_scalar_reduce(c, data, nl.add, 0.0, nl.add, res, reduce_cmd=CMD.reduce)
        nisa.tensor_scalar_cumulative(c, data, nl.add, nl.subtract, 0.0, 7.0, CMD.load_reduce)
        return out(a), out(b), out(res), out(c)

    a, b, res, c = run(kernel, x, init)
    np.testing.assert_array_equal(a, init + np.cumsum(x, axis=1))
    np.testing.assert_array_equal(b, a[:, -1:] + np.cumsum(2 * x, axis=1))
    np.testing.assert_array_equal(res, b[:, -1:] + x.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(c, running(x, "subtract", 7.0))


def test_cumulative_record():
    record = only(traced(cumulative(nl.add, nl.multiply, 0.0), normal(4, 6)), "tensor_scalar_cumulative")
    assert record.attrs == {"op0": "add", "op1": "multiply", "reduce_cmd": "reset_reduce"}


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"op0": "bitwise_or"}, "op0", "operator", "bitwise_or", "arithmetic"),
        ({"op0": "abs"}, "op0", "operator", "abs", "nl.add, nl.multiply"),
        ({"op1": "greater"}, "op1", "operator", "greater", "nl.add, nl.subtract, nl.multiply, nl.maximum, nl.minimum"),
        ({"op1": "logical_or"}, "op1", "operator", "logical_or", "nl.add, nl.subtract"),
        ({"imm0": None}, "imm0", "type", "NoneType", "a number"),
        ({"imm1": 1.0}, "imm1", "start value under reset_reduce", "a value", "None unless"),
        ({"reduce_cmd": CMD.load_reduce}, "imm1", "start value under load_reduce", "None", "a value"),
        ({"reduce_cmd": CMD.idle}, "reduce_cmd", "value", "idle", "reset_reduce, reduce, load_reduce"),
        ({"reduce_cmd": CMD.reduce}, "reduce_cmd", "undefined accumulator", "reduce", "reset_reduce"),
        ({"dtype": nl.int32}, "dst", "dtype", "int32", "bfloat16"),
        ({"dtype": nl.tfloat32}, "dst", "dtype", "tfloat32", "bfloat16"),
    ],
)
def test_cumulative_refusals(kwargs, operand, rule, received, allowed):
    options = {"op0": "add", "op1": "add", "imm0": 1.0, "dtype": nl.float32, **kwargs}
    op0, op1 = getattr(nl, options.pop("op0")), getattr(nl, options.pop("op1"))

    def kernel(x):
        dst = tile((4, 3), options.pop("dtype"))
        nisa.tensor_scalar_cumulative(dst, sb(x), op0, op1, **options)

    refused(
        kernel,
        np.ones((4, 3), f32),
        instruction="tensor_scalar_cumulative",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_cumulative_refuses_wide_integers_and_narrow_columns():
    def wide(x):
        nisa.tensor_scalar_cumulative(tile((4, 3)), sb(x), nl.add, nl.add, 0.0)

    def column(x):
        data = sb(x)
        nisa.tensor_scalar_cumulative(tile((4, 3)), data, nl.add, nl.add, data[:, 0:1])

    name = "tensor_scalar_cumulative"
    refused(
        wide,
        np.ones((4, 3), np.uint32),
        instruction=name,
        operand="src",
        rule="dtype",
        received="uint32",
        allowed="int16",
    )
    refused(
        column,
        np.ones((4, 3), bf16),
        instruction=name,
        operand="imm0",
        rule="dtype",
        received="bfloat16",
        allowed="float32",
    )


def scanned(x0: Any, x1: Any, start: Any, f: Any, g: Any) -> Any:
    """r = g(f(x0, r), x1) along axis 1, in float32 step by step."""
    r = np.broadcast_to(np.asarray(start, f32).reshape(-1), (x0.shape[0],))
    result = np.empty(x0.shape, f32)
    for i in range(x0.shape[1]):
        r = np.asarray(f(x0[:, i].astype(f32), r), f32)
        r = np.asarray(g(r, x1[:, i].astype(f32)), f32)
        result[:, i] = r
    return result


def scan(op0: Any, op1: Any, initial: Any, dtype: Any = nl.float32, **kwargs: Any) -> Any:
    def kernel(a, b):
        dst = tile(a.shape, dtype)
        nisa.tensor_tensor_scan(dst, sb(a), sb(b), initial, op0, op1, **kwargs)
        return out(dst)

    return kernel


BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "greater": np.greater,
    "logical_and": lambda x, y: (x != 0) & (y != 0),
}


# -- tensor_tensor_scan


@pytest.mark.parametrize(
    ("op0", "op1"),
    [
        ("multiply", "add"),
        ("add", "add"),
        ("multiply", "multiply"),
        ("maximum", "maximum"),
        ("minimum", "minimum"),
        ("subtract", "subtract"),
        ("subtract", "multiply"),
        ("multiply", "minimum"),
        ("greater", "add"),
        ("logical_and", "maximum"),
    ],
)
def test_scan_values(op0, op1):
    a, b = normal(7, 11, seed=1), normal(7, 11, seed=2)
    got = run(scan(getattr(nl, op0), getattr(nl, op1), 0.75), a, b)
    np.testing.assert_array_equal(got, scanned(a, b, 0.75, BINARY[op0], BINARY[op1]))


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
def test_scan_reversed(reverse0, reverse1):
    a, b = normal(4, 9, seed=3), normal(4, 9, seed=4)
    sub = lambda x, y: x - y  # noqa: E731
    rsub = lambda x, y: y - x  # noqa: E731
    got = run(scan(nl.subtract, nl.subtract, -1.5, reverse0=reverse0, reverse1=reverse1), a, b)
    want = scanned(a, b, -1.5, rsub if reverse0 else sub, rsub if reverse1 else sub)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [bf16, np.float16, np.int16])
def test_scan_keeps_float32_and_rounds_on_the_way_out(dtype):
    a, b = np.ones((2, 300), dtype), np.ones((2, 300), dtype)
    got = run(scan(nl.multiply, nl.add, 0.0, nl.bfloat16), a, b)
    np.testing.assert_array_equal(got[1], np.arange(1, 301).astype(f32).astype(bf16))


@pytest.mark.parametrize("psum", ["data0", "data1"])
def test_scan_initial_column_psum_in_place(psum):
    a, b = normal(5, 3, 4, seed=5), normal(5, 12, seed=6)
    initial = normal(5, 1, seed=7).astype(np.float16)

    def kernel(a, b, initial):
        x = ps(a) if psum == "data0" else sb(a)
        y = ps(b) if psum == "data1" else sb(b)
        nisa.tensor_tensor_scan(x, x, y, sb(initial), nl.multiply, nl.add)
        return out(x)

    want = scanned(a.reshape(5, 12), b, initial.astype(f32), np.multiply, np.add)
    np.testing.assert_array_equal(run(kernel, a, b, initial), want.reshape(5, 3, 4))


def test_scan_record():
    x = normal(4, 6)
    record = only(traced(scan(nl.multiply, nl.add, 0.0), x, x), "tensor_tensor_scan")
    assert record.attrs == {"op0": "multiply", "op1": "add"}


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"op0": "bitwise_and"}, "op0", "operator", "bitwise_and", "arithmetic"),
        ({"op1": "power"}, "op1", "engine of nl.power", "vector", "gpsimd"),
        ({"op1": "square"}, "op1", "operator", "square", "nl.add, nl.multiply"),
        ({"op0": "abs_max"}, "op0", "abs_max on target", "trn2", "trn3"),
        ({"reverse0": 1}, "reverse0", "type", "1", "True or False"),
        ({"reverse1": None}, "reverse1", "type", "None", "True or False"),
        ({"initial": None}, "initial", "type", "NoneType", "a number"),
    ],
)
def test_scan_refusals(kwargs, operand, rule, received, allowed):
    options = {"op0": "add", "op1": "add", "initial": 0.0, **kwargs}
    for k in ("op0", "op1"):
        options[k] = getattr(nl, options[k])

    def kernel(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x), **options)

    x = np.ones((4, 3), f32)
    name = "tensor_tensor_scan"
    refused(kernel, x, instruction=name, operand=operand, rule=rule, received=received, allowed=allowed)


def test_scan_refuses_layouts():
    x = np.ones((4, 3), f32)

    def both_psum(x):
        nisa.tensor_tensor_scan(tile((4, 3)), ps(x), ps(x), 0.0, nl.add, nl.add)

    def free_size(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x)[:, 0:2], 0.0, nl.add, nl.add)

    def partitions(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x)[0:2], sb(x), 0.0, nl.add, nl.add)

    def initial(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x), sb(x), nl.add, nl.add)

    def gather(x):
        index = tile((4, 1), nl.int32)
        nisa.memset(index, 0)
        view = sb(x).indirect(index, 3)
        nisa.tensor_tensor_scan(tile((4, 3)), view, sb(x), 0.0, nl.add, nl.add)

    name = "tensor_tensor_scan"
    refused(both_psum, x, instruction=name, operand="data1", rule="buffer", received="psum", allowed="at most one")
    refused(free_size, x, instruction=name, operand="data1", rule="elements per", received="2", allowed="3")
    refused(partitions, x, instruction=name, operand="data0", rule="partitions", received="2", allowed="4")
    refused(initial, x, instruction=name, operand="initial", rule="shape", received="[4, 3]", allowed="[4, 1]")
    refused(
        gather,
        x,
        instruction=name,
        operand="data0",
        rule="indirection",
        received="indirect",
        allowed="ordinary",
        target="trn3",
    )
