"""tensor_scalar."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.operands import BF16, BINARY, BITS, G, S, T, V, i32, ok, only, op, psum, small, target_of


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("reverse", [False, True])
def test_tensor_scalar_with_one_operator(name, reverse):
    x = np.concatenate([normal(8, 16), small(8, 16, seed=1)], axis=1)

    def kernel(x):
        dst = tile(x.shape)
        nisa.tensor_scalar(dst, sb(x), op(name), -1, reverse0=reverse)
        return out(dst)

    y = np.full_like(x, -1)
    expected = BINARY[name](*((y, x) if reverse else (x, y)))
    np.testing.assert_array_equal(run(kernel, x, target=target_of(name)), expected)


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
@pytest.mark.parametrize("columns", ["", "0", "1", "01"])
def test_tensor_scalar_with_two_operators_and_columns(reverse0, reverse1, columns):
    x, a, b = normal(16, 6, dtype=BF16), normal(16, 1, seed=1), normal(16, 1, seed=2)

    def kernel(x, a, b):
        dst = tile((16, 2, 3), nl.float16)
        operand0 = sb(a) if "0" in columns else 0.1
        operand1 = ps(b) if "1" in columns else -3
        nisa.tensor_scalar(dst, ps(x), nl.subtract, operand0, reverse0, nl.subtract, operand1, reverse1)
        return out(dst)

    y = x.astype(np.float32)
    for reverse, operand in (
        (reverse0, a if "0" in columns else np.float32(0.1)),
        (reverse1, b if "1" in columns else np.float32(-3)),
    ):
        y = operand - y if reverse else y - operand
    np.testing.assert_array_equal(run(kernel, x, a, b), y.astype(np.float16).reshape(16, 2, 3))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float16, BF16])
def test_tensor_scalar_casts_through_float32(dtype):
    x = np.array([[0, 1, 2, 3, 100, 101]]).astype(dtype)

    def kernel(x):
        dst = tile(x.shape, dtype)
        nisa.tensor_scalar(dst, sb(x), nl.multiply, 2.5, op1=nl.add, operand1=1)
        return out(dst)

    y = x.astype(np.float32) * np.float32(2.5) + 1
    if np.dtype(dtype).kind in "iu":
        y = np.clip(np.rint(y), np.iinfo(dtype).min, np.iinfo(dtype).max)
    np.testing.assert_array_equal(run(kernel, x), y.astype(dtype))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("abs", np.abs),
        ("square", lambda x: x * x),
        ("relu", lambda x: np.where(x > 0, x, np.float32(0))),
        ("reciprocal", lambda x: np.float32(1) / x),
    ],
)
@pytest.mark.parametrize("operand0", [None, 0, 0.0])
def test_tensor_scalar_with_a_unary_operator(name, function, operand0):
    x = normal(4, 8)

    def kernel(x):
        dst = tile(x.shape)
        nisa.tensor_scalar(dst, sb(x), op(name), operand0, op1=nl.add, operand1=0.25)
        return out(dst)

    np.testing.assert_array_equal(run(kernel, x, target=target_of(name)), function(x) + np.float32(0.25))


def test_tensor_scalar_with_a_unary_second_operator():
    x = normal(4, 8)

    def kernel(x):
        dst = tile(x.shape)
        nisa.tensor_scalar(dst, sb(x), nl.subtract, 0.5, op1=nl.abs)
        return out(dst)

    np.testing.assert_array_equal(run(kernel, x), np.abs(x - np.float32(0.5)))


@pytest.mark.parametrize("engine", ["unknown", "gpsimd"])
def test_tensor_scalar_rsqrt_runs_on_gpsimd(engine):
    x = np.abs(normal(4, 8)) + np.float32(1e-3)

    def kernel(x):
        dst = tile(x.shape)
        nisa.tensor_scalar(dst, sb(x), nl.rsqrt, 0.0, engine=getattr(nisa.engine, engine))
        return out(dst)

    np.testing.assert_allclose(run(kernel, x), 1 / np.sqrt(x.astype(np.float64)), rtol=2e-7)
    assert only(traced(kernel, x), "tensor_scalar").engine is Engine.gpsimd


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint8])
def test_tensor_scalar_on_bit_patterns(name, reverse, dtype):
    width = 8 * np.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{width // 8}")
    limit = width if "shift" in name else 1 << width
    x = np.random.default_rng(3).integers(0, limit if reverse else 1 << width, (4, 8), dtype=np.uint64).astype(unsigned)
    c = np.random.default_rng(4).integers(0, limit, (4, 1), dtype=np.uint64).astype(unsigned)
    if reverse:
        c[:] = np.iinfo(unsigned).max - 5

    def kernel(x, c):
        column, number = tile(x.shape, dtype), tile(x.shape, dtype)
        nisa.tensor_scalar(column, sb(x), op(name), sb(c), reverse0=reverse)
        nisa.tensor_scalar(number, sb(x), op(name), 3, reverse, nl.invert)
        return out(column), out(number)

    column, number = run(kernel, x.view(dtype), c.view(dtype))
    three = np.full_like(x, 3)
    np.testing.assert_array_equal(column.view(unsigned), BITS[name](*((c, x) if reverse else (x, c))))
    np.testing.assert_array_equal(number.view(unsigned), ~BITS[name](*((three, x) if reverse else (x, three))))


def test_tensor_scalar_takes_negative_numbers_as_bit_patterns():
    x = np.array([[0x0F, 0xF0]], np.uint8)

    def kernel(x):
        dst = tile(x.shape, nl.uint8)
        nisa.tensor_scalar(dst, sb(x), nl.bitwise_and, -16, op1=nl.bitwise_or, operand1=1)
        return out(dst)

    np.testing.assert_array_equal(run(kernel, x), np.array([[0x01, 0xF1]], np.uint8))


def test_tensor_scalar_in_place_and_strided():
    x = normal(4, 12)

    def kernel(x):
        t = sb(x)
        nisa.tensor_scalar(t[:, 0:12:3], t[:, 0:12:3], nl.multiply, t[:, 1:2])
        return out(t)

    expected = x.copy()
    expected[:, ::3] *= x[:, 1:2]
    np.testing.assert_array_equal(run(kernel, x), expected)


@pytest.mark.parametrize(
    ("target", "op0", "op1", "allowed"),
    [
        ("trn1", "add", None, False),
        ("trn2", "add", None, True),
        ("trn2", "multiply", None, True),
        ("trn2", "multiply", "add", True),
        ("trn2", "add", "multiply", False),
        ("trn2", "multiply", "multiply", False),
        ("trn2", "subtract", None, False),
        ("trn2", "abs", None, False),
        ("trn3", "add", "multiply", True),
        ("trn3", "maximum", "less", True),
        ("trn3", "abs", None, True),
    ],
)
def test_tensor_scalar_on_the_scalar_engine(target, op0, op1, allowed):
    x = normal(4, 8)

    def kernel(x):
        dst = tile(x.shape)
        operand0 = 0 if op0 == "abs" else 1.5
        second = {} if op1 is None else {"op1": op(op1), "operand1": 2.5}
        nisa.tensor_scalar(dst, sb(x), op(op0), operand0, engine=S, **second)

    if allowed:
        assert only(traced(kernel, x, target=target), "tensor_scalar").engine is Engine.scalar
    else:
        refused(
            kernel,
            x,
            target=target,
            instruction="tensor_scalar",
            operand="engine",
            rule="Scalar Engine",
            received=target if target == "trn1" else f"op0={op0}, op1={op1}",
            allowed="vector"
            if target == "trn1"
            else "op0=multiply, op1=add; op0=multiply, op1=None; op0=add, op1=None",
        )


def test_tensor_scalar_is_recorded_once():
    x = normal(4, 8)

    def kernel(x):
        t = sb(x)
        nisa.tensor_scalar(t, t, nl.add, t[:, 0:1], op1=nl.maximum, operand1=0.0)

    record = only(traced(kernel, x), "tensor_scalar")
    assert (record.engine, record.attrs) == (Engine.vector, {"op0": "add", "op1": "maximum"})
    assert sorted((a.operand, a.shape) for a in record.reads) == [("data", (4, 8)), ("operand0", (4, 1))]

    def single(x):
        nisa.tensor_scalar(sb(x), sb(x), nl.add, 1)

    assert only(traced(single, x), "tensor_scalar").attrs == {"op0": "add", "op1": None}


def scalar(*args, **kwargs):
    """A kernel with one tensor_scalar on float32 tiles."""

    def kernel():
        x = tile((4, 8))
        nisa.memset(x, 1.0)
        nisa.tensor_scalar(
            tile((4, 8)), x, *[a() if callable(a) and not hasattr(a, "nki_op") else a for a in args], **kwargs
        )

    return kernel


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: nisa.tensor_scalar(ok(), ok((5, 8)), nl.add, 1), "data", "partitions", "5", "4"),
        (lambda: nisa.tensor_scalar(ok(), ok((4, 9)), nl.add, 1), "data", "elements per partition", "9", "8"),
        (scalar(None, 1), "op0", "operator", "None", "nl.add, nl.multiply"),
        (scalar(nl.exp, 1), "op0", "operator", "exp", "nl.add, nl.multiply"),
        (scalar(nl.power, 2), "op0", "operator", "power", "tensor_tensor(op=nl.power)"),
        (scalar(nl.add, 1, op1=nl.power, operand1=2), "op1", "operator", "power", "tensor_tensor"),
        (scalar(nl.square, 0), "op0", "square on target", "trn2", "v4"),
        (scalar(nl.relu, 0), "op0", "relu on target", "trn2", "v4"),
        (scalar(nl.abs_min, 0), "op0", "abs_min on target", "trn2", "v4"),
        (scalar(nl.add, None), "operand0", "type", "NoneType", "a number or a [P, 1] tensor"),
        (scalar(nl.add, True), "operand0", "type", "bool", "a number or a [P, 1] tensor"),
        (scalar(nl.add, ok), "operand0", "shape", "[4, 8]", "[4, 1]"),
        (scalar(nl.add, lambda: i32((4, 1))), "operand0", "dtype", "int32", "float32"),
        (scalar(nl.add, 1, op1=nl.add, operand1=None), "operand1", "type", "NoneType", "number"),
        (scalar(nl.add, 1, operand1=2), "op1", "without op1", "operand1=2", "operand1=None"),
        (scalar(nl.add, 1, reverse1=True), "op1", "without op1", "reverse1=True", "reverse1=False"),
        (scalar(nl.add, 1, reverse0=1), "reverse0", "type", "1", "True or False"),
        (scalar(nl.add, 1, reverse1=0), "reverse1", "type", "0", "True or False"),
        (scalar(nl.abs, 1), "operand0", "unary abs", "1", "None or 0"),
        (scalar(nl.abs, lambda: ok((4, 1))), "operand0", "unary abs", "NkiTensor", "None or 0"),
        (scalar(nl.abs, 0, reverse0=True), "reverse0", "unary abs", "True", "False"),
        (scalar(nl.add, 1, op1=nl.abs, operand1=2.0), "operand1", "unary abs", "2.0", "None or 0"),
        (scalar(nl.rsqrt, 0, op1=nl.add, operand1=1), "op1", "beside rsqrt", "rsqrt and add", "alone"),
        (scalar(nl.rsqrt, 0, engine=V), "engine", "engine of rsqrt", "vector", "gpsimd"),
        (lambda: nisa.tensor_scalar(ok(), psum(), nl.rsqrt, 0), "engine", "PSUM", "rsqrt", "sbuf"),
        (scalar(nl.add, 1, engine=G), "engine", "engine of add", "gpsimd", "vector, scalar"),
        (scalar(nl.add, 1, engine=T), "engine", "engine of add", "tensor", "vector, scalar"),
        (scalar(nl.add, 1, op1=nl.bitwise_and, operand1=1), "op1", "kinds", "add and bitwise_and", "two"),
        (scalar(nl.bitwise_and, 1), "dst", "bit operator", "float32", "int32"),
        (lambda: nisa.tensor_scalar(i32(), i32(), nl.invert, 0, engine=S), "engine", "bit", "scalar", "vector"),
        (lambda: nisa.tensor_scalar(i32(), i32(), nl.bitwise_or, 1.0), "operand0", "type", "1.0", "an integer"),
        (
            lambda: nisa.tensor_scalar(i32(), i32(), nl.bitwise_or, 2**32),
            "operand0",
            "32 bits",
            "4294967296",
            "4294967295",
        ),
        (lambda: nisa.tensor_scalar(i32(), i32(), nl.bitwise_or, ok((4, 1))), "operand0", "dtype", "float32", "int32"),
        (lambda: nisa.tensor_scalar(i32(), i32(), nl.bitwise_or, i32()), "operand0", "shape", "[4, 8]", "[4, 1]"),
        (
            lambda: nisa.tensor_scalar(i32(), i32(), nl.bitwise_or, ok((4, 1), nl.int8)),
            *("dst", "widths", "operand0 int8", "one width"),
        ),
    ],
)
def test_tensor_scalar_refuses(kernel, operand, rule, received, allowed):
    refused(kernel, instruction="tensor_scalar", operand=operand, rule=rule, received=received, allowed=allowed)


@pytest.mark.parametrize("name", ["square", "relu", "abs_max"])
def test_tensor_scalar_takes_the_operators_of_trn3_first_only(name):
    second = {"op1": op(name), "operand1": 1.0 if name == "abs_max" else 0}
    refused(
        scalar(nl.add, 1, **second),
        target="trn3",
        instruction="tensor_scalar",
        operand="op1",
        rule="operator",
        received=name,
        allowed="as op0 only",
    )


def test_a_function_that_is_no_operator_is_named():
    def kernel():
        nisa.tensor_scalar(ok(), ok(), nl.divide, 2.0)

    refused(
        kernel,
        instruction="tensor_scalar",
        operand="op0",
        rule="operator",
        received="nl.divide",
        allowed="nl.add, nl.multiply",
    )
