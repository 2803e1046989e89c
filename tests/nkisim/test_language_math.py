"""nl: element-wise arithmetic, comparisons, bits and logic."""

from __future__ import annotations

import operator as py
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, traced

X = normal(5, 7, seed=1)
Y = normal(5, 7, seed=2)
X[0, :3] = [0.0, 1.0, -2.0]
Y[0, :3] = [0.0, -1.0, 2.0]
BF16 = ml_dtypes.bfloat16


def on_numbers(f: Any) -> Any:
    return lambda x, y: f(x, y).astype(np.float32)


ARITHMETIC = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": on_numbers(py.eq),
    "not_equal": on_numbers(py.ne),
    "less": on_numbers(py.lt),
    "less_equal": on_numbers(py.le),
    "greater": on_numbers(py.gt),
    "greater_equal": on_numbers(py.ge),
    "logical_and": on_numbers(lambda x, y: np.logical_and(x != 0, np.asarray(y) != 0)),
    "logical_or": on_numbers(lambda x, y: np.logical_or(x != 0, np.asarray(y) != 0)),
    "logical_xor": on_numbers(lambda x, y: np.logical_xor(np.asarray(x) != 0, np.asarray(y) != 0)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_two_tiles(name: str) -> None:
    op = getattr(nl, name)

    def kernel(x: Any, y: Any) -> Any:
        return out(op(sb(x), sb(y)))

    np.testing.assert_array_equal(run(kernel, X, Y), ARITHMETIC[name](X, Y))
    (record,) = [r for r in traced(kernel, X, Y).records if r.instruction != "dma_copy"]
    assert (record.instruction, record.engine, record.attrs["op"]) == ("tensor_tensor", Engine.vector, name)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_a_number_on_either_side(name: str) -> None:
    op = getattr(nl, name)

    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(op(t, -2.0)), out(op(1, t))

    right, left = run(kernel, X)
    np.testing.assert_array_equal(right, ARITHMETIC[name](X, np.float32(-2)))
    np.testing.assert_array_equal(left, ARITHMETIC[name](np.float32(1), X))
    assert traced(kernel, X).count("tensor_scalar") == 2


def test_result_type_is_the_tiles_unless_given_and_rounds_once() -> None:
    a, b = X.astype(BF16), Y.astype(BF16)

    def kernel(x: Any, y: Any) -> Any:
        t, u = sb(x), sb(y)
        return tuple(out(r) for r in (nl.multiply(t, u), nl.multiply(t, u, dtype=nl.float32), nl.multiply(t, 1 / 3)))

    same, wide, scaled = run(kernel, a, b)
    exact = a.astype(np.float32) * b.astype(np.float32)
    assert (same.dtype, wide.dtype, scaled.dtype) == (BF16, np.float32, BF16)
    np.testing.assert_array_equal(same, exact.astype(BF16))
    np.testing.assert_array_equal(wide, exact)
    np.testing.assert_array_equal(scaled, (a.astype(np.float32) * np.float32(1 / 3)).astype(BF16))


def test_three_dimensions_views_and_psum() -> None:
    a, b = normal(4, 3, 6, seed=3), normal(4, 3, 6, seed=4)

    def kernel(x: Any, y: Any) -> Any:
        t = nl.add(ps(x), sb(y))
        assert t.buffer is nl.sbuf
        assert t.shape == (4, 3, 6)
        return out(nl.subtract(t[:, 1:, ::2], 1.0))

    np.testing.assert_array_equal(run(kernel, a, b), (a + b)[:, 1:, ::2] - 1)


def test_int32_sums_are_exact_on_gpsimd() -> None:
    a = integers(4, 6, low=2**30, high=2**31 - 1)

    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.subtract(t, nl.copy(t))), out(nl.subtract(t, nl.bitwise_and(t, 255)))

    zero, high = run(kernel, a)
    np.testing.assert_array_equal(zero, a * 0)
    np.testing.assert_array_equal(high, a & ~255)


@pytest.mark.parametrize("name", ["abs_max", "abs_min"])
def test_by_magnitude(name: str) -> None:
    op = getattr(nl, name)
    x = np.array([[-5, 1, 2, -2], [3, -1, 0, 7]], np.float32)
    y = np.array([[3, -1, -2, 2], [-4, 1, -9, -7]], np.float32)
    first = np.abs(x) > np.abs(y) if name == "abs_max" else np.abs(x) < np.abs(y)

    def kernel(x: Any, y: Any) -> Any:
        t, u = sb(x), sb(y)
        return out(op(t, u)), out(op(t, u[:, 0:1])), out(op(t, 2.0))

    full, column, number = run(kernel, x, y, target="trn3")
    np.testing.assert_array_equal(full, np.where(first, x, y))
    for got, other in ((column, y[:, :1]), (number, np.float32(2))):
        keep = np.abs(x) > np.abs(other) if name == "abs_max" else np.abs(x) < np.abs(other)
        np.testing.assert_array_equal(got, np.where(keep, x, other))

    def on_trn2(x: Any) -> Any:
        t = sb(x)
        return out(op(t, t))

    refused(
        on_trn2, x, instruction="tensor_tensor", operand="op", rule=name, received="trn2", allowed="trn3", target="trn2"
    )


def test_power_of_tiles_runs_on_gpsimd() -> None:
    base = np.abs(X) + 0.5

    def kernel(x: Any, y: Any) -> Any:
        return out(nl.power(sb(x), sb(y)))

    np.testing.assert_allclose(run(kernel, base, Y), base.astype(np.float64) ** Y, rtol=1e-5)
    assert traced(kernel, base, Y).count("tensor_tensor", engine=Engine.gpsimd) == 1


def test_power_of_numbers_is_refused() -> None:
    def exponent(x: Any) -> Any:
        return nl.power(sb(x), 2.0)

    def base(x: Any) -> Any:
        return nl.power(2.0, sb(x))

    refused(exponent, X, instruction="power", operand="y", rule="type", received="float", allowed="nl.full")
    refused(base, X, instruction="power", operand="x", rule="type", received="float", allowed="a tile")


BITS = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": lambda x, y: (x.astype(np.int64) << (y & 7)).astype(x.dtype),
    "right_shift": lambda x, y: (x.view(f"u{x.itemsize}") >> (y & 7).view(f"u{x.itemsize}")).view(x.dtype),
}


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int8])
@pytest.mark.parametrize("name", BITS)
def test_bits(name: str, dtype: Any) -> None:
    op = getattr(nl, name)
    info = np.iinfo(dtype)
    a = integers(4, 9, low=info.min, high=info.max, seed=5, dtype=dtype)
    b = integers(4, 9, low=info.min, high=info.max, seed=6, dtype=dtype)
    if name.endswith("shift"):
        b = b & dtype(7)

    def kernel(x: Any, y: Any) -> Any:
        t = sb(x)
        return out(op(t, sb(y))), out(op(t, 3))

    tiles, number = run(kernel, a, b)
    np.testing.assert_array_equal(tiles, BITS[name](a, b))
    np.testing.assert_array_equal(number, BITS[name](a, np.full_like(a, 3)))
    assert tiles.dtype == dtype


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint8])
def test_invert(dtype: Any) -> None:
    a = integers(3, 8, low=0, high=100, dtype=dtype)

    def kernel(x: Any) -> Any:
        return out(nl.invert(sb(x)))

    np.testing.assert_array_equal(run(kernel, a), ~a)


def test_logical_not_of_zeros_and_ones() -> None:
    a = (X > 0).astype(np.float32)
    b = np.array([[0, 1, 2, 3]], np.int32)

    def kernel(x: Any, y: Any) -> Any:
        return out(nl.logical_not(sb(x))), out(nl.logical_not(sb(y)))

    floats, ints = run(kernel, a, b)
    np.testing.assert_array_equal(floats, 1 - a)
    np.testing.assert_array_equal(ints, b ^ 1)


def test_negative() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.negative(t)), out(nl.negative(t, dtype=nl.bfloat16))

    full, half = run(kernel, X)
    np.testing.assert_array_equal(full, -X)
    np.testing.assert_array_equal(half, (-X).astype(BF16))


def test_comparison_as_uint8() -> None:
    def kernel(x: Any, y: Any) -> Any:
        return out(nl.less(sb(x), sb(y), dtype=nl.uint8))

    got = run(kernel, X, Y)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, (X < Y).astype(np.uint8))


@pytest.mark.parametrize(("name", "hint"), [("divide", "nl.reciprocal"), ("mod", "nl.floor"), ("fmod", "nl.trunc")])
def test_division_is_not_on_hardware(name: str, hint: str) -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return getattr(nl, name)(t, t)

    refused(kernel, X, instruction=name, rule="no such hardware operation", received=f"nl.{name}", allowed=hint)


def test_tiles_are_not_broadcast() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return nl.add(t, t[:, 0:1])

    error = refused(kernel, X, instruction="add", operand="y", rule="shape", received="[5, 1]", allowed="not broadcast")
    assert "known limitations" in error.source


def test_unequal_types_need_a_result_type() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return nl.add(t, nl.copy(t, dtype=nl.bfloat16))

    refused(
        kernel,
        X,
        instruction="add",
        operand="dtype",
        rule="result type",
        received="float32 and bfloat16",
        allowed="dtype=",
    )

    def given(x: Any) -> Any:
        t = sb(x)
        return out(nl.add(t, nl.copy(t, dtype=nl.bfloat16), dtype=nl.float32))

    np.testing.assert_array_equal(run(given, X), X + X.astype(BF16).astype(np.float32))


def test_operands_that_are_no_tiles() -> None:
    def numbers() -> Any:
        return nl.add(1.0, 2.0)

    def text(x: Any) -> Any:
        return nl.add(sb(x), "2")

    def truth(x: Any) -> Any:
        return nl.multiply(True, sb(x))

    def in_hbm(x: Any) -> Any:
        return nl.add(x, 1.0)

    def register(x: Any) -> Any:
        return nl.add(sb(x), nisa.VirtualRegister(3))

    def unary(x: Any) -> Any:
        return nl.invert(sb(x))

    refused(numbers, instruction="add", operand="x", rule="type", received="float and float", allowed="one tile")
    refused(text, X, instruction="add", operand="y", rule="type", received="str", allowed="a number")
    refused(truth, X, instruction="multiply", operand="x", rule="type", received="bool", allowed="a number")
    refused(in_hbm, X, instruction="add", operand="x", rule="buffer", received="private_hbm", allowed="nl.load")
    refused(register, X, instruction="add", operand="y", rule="type", received="VirtualRegister", allowed="a number")
    refused(unary, X, instruction="invert", operand="x", rule="dtype", received="float32", allowed="int32")


def test_strictness_of_the_instructions_reaches_the_wrappers() -> None:
    def both_in_psum(x: Any) -> Any:
        t = ps(x)
        return nl.add(t, t)

    def bits_of_floats(x: Any) -> Any:
        return nl.bitwise_and(sb(x), 3)

    def undefined() -> Any:
        return nl.add(nl.ndarray((2, 2), nl.float32), 1.0)

    refused(
        both_in_psum, X, instruction="tensor_tensor", operand="data2", rule="buffer", received="psum", allowed="one"
    )
    refused(
        bits_of_floats, X, instruction="tensor_scalar", operand="dst", rule="dtype", received="float32", allowed="int"
    )
    refused(
        undefined,
        instruction="tensor_scalar",
        operand="data",
        rule="uninitialized",
        received="4 of 4",
        allowed="written",
    )


def test_outside_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="outside a kernel"):
        nl.zeros((2, 2), nl.float32)


@pytest.mark.parametrize("name", ["bypass", "prelu", "average"])
def test_operator_names_are_not_callable(name: str) -> None:
    with pytest.raises(TypeError, match=f"nl.{name}"):
        getattr(nl, name)(1.0)
