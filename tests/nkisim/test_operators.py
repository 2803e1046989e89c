"""ALU operators of `op=`, against NumPy and exact integer arithmetic."""

from __future__ import annotations

import operator as python
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nkisim import language as nl
from nkisim.operators import ALU, NamedOperator, activation, alu, listed, op_name

F32 = np.float32
FLOATS = np.array([-np.inf, -3.5, -1.0, -0.0, 0.0, 1e-38, 0.5, 1.0, 2.0, 3.5, np.inf], F32)
X, Y = (a.ravel() for a in np.meshgrid(FLOATS, FLOATS))

ARITHMETIC = {
    "add": python.add,
    "subtract": python.sub,
    "multiply": python.mul,
    "maximum": max,
    "minimum": min,
    "logical_and": lambda x, y: bool(x) and bool(y),
    "logical_or": lambda x, y: bool(x) or bool(y),
    "logical_xor": lambda x, y: bool(x) != bool(y),
    "equal": python.eq,
    "not_equal": python.ne,
    "greater": python.gt,
    "greater_equal": python.ge,
    "less": python.lt,
    "less_equal": python.le,
    "abs_max": lambda x, y: x if abs(x) > abs(y) else y,
    "abs_min": lambda x, y: x if abs(x) < abs(y) else y,
}
UNARY = {
    "abs": abs,
    "square": lambda x: x * x,
    "relu": lambda x: x if x > 0 else F32(0),
    "rsqrt": lambda x: F32(1) / np.sqrt(x),
    "reciprocal": lambda x: F32(1) / x,
}
BITS = {"bitwise_and": python.and_, "bitwise_or": python.or_, "bitwise_xor": python.xor}
INTEGERS = [np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32]


def test_the_documented_table():
    kinds = {
        "bitvec": {"invert", *BITS, "left_shift", "right_shift"},
        "arithmetic": {"add", "multiply", "subtract", "maximum", "minimum", "logical_and", "logical_or", "logical_xor"},
        "compare": {"equal", "not_equal", "greater", "greater_equal", "less", "less_equal"},
        "unary": set(UNARY),
        "other": {"power", "abs_max", "abs_min", "bypass", "average"},
    }
    assert {kind: {o.name for o in ALU.values() if o.kind == kind} for kind in kinds} == kinds
    assert set(ALU) == set().union(*kinds.values())
    assert {o.name for o in ALU.values() if o.is_bitvec} == kinds["bitvec"]
    reductions = kinds["arithmetic"] | set(BITS)
    assert {o.name for o in ALU.values() if o.is_reduction} == reductions
    for name in reductions:
        assert ALU[name].identity is not None


@pytest.mark.parametrize("name", sorted(ARITHMETIC))
def test_binary_operators(name):
    with np.errstate(all="ignore"):
        got = ALU[name].function(X, Y)
        expected = np.array([F32(ARITHMETIC[name](x, y)) for x, y in zip(X, Y, strict=True)], F32)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", sorted(UNARY))
def test_unary_operators(name):
    with np.errstate(all="ignore"):
        got = ALU[name].function(FLOATS)
        expected = np.array([F32(UNARY[name](x)) for x in FLOATS], F32)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_a_column_broadcasts():
    x, column = np.arange(12, dtype=F32).reshape(3, 4), np.array([[1], [2], [3]], F32)
    for name in ARITHMETIC:
        np.testing.assert_array_equal(ALU[name].function(x, column), ALU[name].function(x, np.repeat(column, 4, 1)))
        assert ALU[name].function(column, x).shape == (3, 4)
        assert ALU[name].function(x, F32(2)).dtype == np.float32


def test_ties_by_magnitude_go_to_the_second():
    one = np.ones(1, F32)
    assert ALU["abs_max"].function(one, -one)[0] == -1.0
    assert ALU["abs_min"].function(one, -one)[0] == -1.0


def test_nan():
    nan = np.array([np.nan], F32)
    one = np.ones(1, F32)
    for name in ("equal", "greater", "greater_equal", "less", "less_equal"):
        assert ALU[name].function(nan, one)[0] == 0.0
    assert ALU["not_equal"].function(nan, nan)[0] == 1.0
    assert ALU["logical_and"].function(nan, one)[0] == 1.0
    for name in ("maximum", "minimum", "add"):
        assert np.isnan(ALU[name].function(nan, one))[0]


def test_power():
    x, y = np.array([2, 3, 4, -2, 0.5], F32), np.array([10, 0, 0.5, 3, -2], F32)
    np.testing.assert_array_equal(ALU["power"].function(x, y), np.array([1024, 1, 2, -8, 4], F32))
    assert ALU["power"].function(np.array([3], np.int32), F32(2)).dtype == np.float32


def test_bypass_returns_its_first_input():
    assert ALU["bypass"].function(X) is X
    assert ALU["bypass"].function(X, Y) is X


# -- bit operators


def wrapped(value: int, dtype: Any) -> int:
    """`value` modulo the type's range."""
    bits = np.dtype(dtype).itemsize * 8
    low = np.iinfo(dtype).min
    return (value - low) % 2**bits + low


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(INTEGERS))
def test_bit_operators_by_python_integers(data, dtype):
    info = np.iinfo(dtype)
    number = st.integers(int(info.min), int(info.max))
    values = data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=6))
    x = np.array([v[0] for v in values], dtype)
    y = np.array([v[1] for v in values], dtype)
    for name, function in BITS.items():
        got = ALU[name].function(x, y)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.array([function(a, b) for a, b in values], dtype))
    np.testing.assert_array_equal(ALU["invert"].function(x), np.array([wrapped(~a, dtype) for a, _ in values], dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(INTEGERS))
def test_shifts_move_bits(data, dtype):
    info = np.iinfo(dtype)
    width = np.dtype(dtype).itemsize * 8
    number, distance = st.integers(int(info.min), int(info.max)), st.integers(0, width + 3)
    values = data.draw(st.lists(st.tuples(number, distance), min_size=1, max_size=6))
    x = np.array([v[0] for v in values], dtype)
    y = np.array([v[1] for v in values], dtype)
    left = [wrapped(a << n, dtype) for a, n in values]
    right = [wrapped((a % 2**width) >> n, dtype) for a, n in values]
    for name, expected in (("left_shift", left), ("right_shift", right)):
        got = ALU[name].function(x, y)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.array(expected, dtype))


def test_shift_by_a_column_of_another_width():
    x = np.array([[-128, 64, 3]], np.int8)
    by = np.array([[1]], np.int32)
    np.testing.assert_array_equal(ALU["left_shift"].function(x, by), np.array([[0, -128, 6]], np.int8))
    np.testing.assert_array_equal(ALU["right_shift"].function(x, by), np.array([[64, 32, 1]], np.int8))


# -- reductions

REDUCED = {
    "add": lambda v: sum(v),
    "multiply": lambda v: np.prod(v),
    "subtract": lambda v: 0 - sum(v),
    "maximum": max,
    "minimum": min,
    "logical_and": lambda v: float(all(v)),
    "logical_or": lambda v: float(any(v)),
    "logical_xor": lambda v: float(sum(x != 0 for x in v) % 2),
}


@pytest.mark.parametrize("name", sorted(REDUCED))
@pytest.mark.parametrize("axis", [0, 1, (1, 2), 2])
def test_reductions(name, axis):
    x = np.random.default_rng(1).integers(-2, 3, (3, 4, 5)).astype(F32)
    got = ALU[name].reduce(x, axis=axis)
    assert got.dtype == np.float32
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = [i for i in range(3) if i not in axes]
    columns = x.transpose(*kept, *axes).reshape(*[x.shape[i] for i in kept], -1)
    expected = np.apply_along_axis(lambda v: REDUCED[name](list(v)), -1, columns)
    np.testing.assert_array_equal(got, expected.astype(F32))


@pytest.mark.parametrize("name", sorted(BITS))
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bit_reductions(name, dtype):
    x = np.random.default_rng(2).integers(0, 100, (3, 7)).astype(dtype)
    expected = []
    for row in x:
        total = int(row[0])
        for value in row[1:]:
            total = BITS[name](total, int(value))
        expected.append(total)
    got = ALU[name].reduce(x, axis=1)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.array(expected, dtype))


@pytest.mark.parametrize("name", sorted(set(REDUCED) - {"subtract"}))
def test_identities_change_nothing(name):
    op = ALU[name]
    x = np.array([-2.0, 0.0, 3.0], F32)
    expected = (x != 0).astype(F32) if name.startswith("logical") else x
    np.testing.assert_array_equal(op.function(x, F32(op.identity)), expected)


def test_bit_identities_change_nothing():
    x = np.array([0, 5, -7], np.int32)
    for name in BITS:
        np.testing.assert_array_equal(ALU[name].function(x, np.int32(ALU[name].identity)), x)


# -- naming


def test_operators_are_named_by_the_language():
    assert alu(nl.add) is ALU["add"]
    assert alu(nl.bypass) is ALU["bypass"]
    assert activation(nl.exp) is not None
    assert activation(nl.exp).name == "exp"
    assert op_name(nl.multiply) == "multiply"
    assert (alu(nl.exp), activation(nl.add)) == (None, None)


@pytest.mark.parametrize("op", [None, 3, "add", np.add, max, object()])
def test_other_objects_are_no_operators(op):
    assert alu(op) is None
    assert activation(op) is None
    assert op_name(op) == repr(op)


def test_named_operators_are_not_callable():
    op = NamedOperator("average")
    assert repr(op) == "nl.average"
    with pytest.raises(TypeError, match=r"nl\.average is an operator name for op= arguments"):
        op(1, 2)


def test_names_for_messages():
    assert op_name(nl.add) == "add"
    assert op_name(nl.divide) == "nl.divide"
    assert op_name(nl.load) == "nl.load"
    assert op_name(np.add) == "<ufunc 'add'>"
    assert op_name(None) == "None"
    assert listed(("add", "exp")) == "nl.add, nl.exp"
