"""tensor_tensor, scalar_tensor_tensor and reciprocal."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.operands import BF16, BINARY, BITS, G, S, V, i32, ok, only, op, psum, small, target_of

# ---------------------------------------------------------------------------------------------------
# tensor_tensor


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("engine", ["unknown", "gpsimd"])
def test_tensor_tensor_in_float32_rounded_once(name, engine):
    x = np.concatenate([normal(8, 16), small(8, 16, seed=1)], axis=1)
    y = np.concatenate([normal(8, 16, seed=2), small(8, 16, seed=3)], axis=1).astype(BF16)

    def kernel(x, y):
        wide, narrow = tile(x.shape), tile(x.shape, nl.bfloat16)
        for dst in (wide, narrow):
            nisa.tensor_tensor(dst, sb(x), sb(y), op=op(name), engine=getattr(nisa.engine, engine))
        return out(wide), out(narrow)

    wide, narrow = run(kernel, x, y, target=target_of(name))
    expected = BINARY[name](x, y.astype(np.float32)).astype(np.float32)
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(narrow, expected.astype(BF16))


def test_tensor_tensor_power():
    x, y = np.abs(normal(4, 8)) + np.float32(0.5), normal(4, 8, seed=1)

    def kernel(x, y):
        dst = tile(x.shape)
        nisa.tensor_tensor(dst, sb(x), sb(y), nl.power)
        return out(dst)

    np.testing.assert_allclose(run(kernel, x, y), np.power(x.astype(np.float64), y), rtol=3e-7)
    assert only(traced(kernel, x, y), "tensor_tensor").engine is Engine.gpsimd


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "maximum", "less", "logical_and"])
def test_tensor_tensor_of_32_bit_integers_is_exact_and_wraps_on_gpsimd(name):
    x = integers(4, 16, low=-(2**31), high=2**31 - 1)
    y = integers(4, 16, low=0, high=2**32 - 1, seed=1, dtype=np.uint32)
    x[0, :2], y[0, :2] = [2**24, -1], [1, 2**32 - 1]

    def kernel(x, y):
        dst = tile(x.shape, nl.int32)
        nisa.tensor_tensor(dst, sb(x), sb(y), op(name))
        return out(dst)

    exact = np.asarray(BINARY[name](x.astype(object), y.astype(object)))
    expected = np.array([[int(v) & 0xFFFFFFFF for v in row] for row in exact], np.uint32).view(np.int32)
    if name in ("less", "logical_and"):
        expected = BINARY[name](x.astype(np.int64), y.astype(np.int64)).astype(np.int32)
    np.testing.assert_array_equal(run(kernel, x, y), expected)
    assert only(traced(kernel, x, y), "tensor_tensor").engine is Engine.gpsimd


def test_tensor_tensor_power_of_integers():
    x, y = np.array([[3, -3, 7, 65537]], np.int32), np.array([[20, 3, 0, 2]], np.int32)

    def kernel(x, y):
        dst = tile(x.shape, nl.int32)
        nisa.tensor_tensor(dst, sb(x), sb(y), nl.power)
        return out(dst)

    expected = [(int(a) ** int(b) + 2**31) % 2**32 - 2**31 for a, b in zip(x[0], y[0], strict=True)]
    np.testing.assert_array_equal(run(kernel, x, y), np.array([expected], np.int32))
    with pytest.raises(NotImplementedError, match="tensor_tensor: power"):
        run(kernel, x, -y)


def test_tensor_tensor_of_32_bit_integers_on_vector_goes_through_float32():
    x, y = np.array([[2**24, 2**31 - 1, -5]], np.int32), np.array([[1, 1, 3]], np.int32)

    def kernel(x, y, engine, in_psum):
        dst = tile(x.shape, nl.int32)
        nisa.tensor_tensor(dst, (ps if in_psum else sb)(x), sb(y), nl.add, engine=engine)
        return out(dst)

    expected = np.array([[2**24, 2**31 - 1, -2]], np.int32)
    for engine, in_psum in ((V, False), (nisa.engine.unknown, True)):
        np.testing.assert_array_equal(run(lambda x, y, e=engine, p=in_psum: kernel(x, y, e, p), x, y), expected)
        trace = traced(lambda x, y, e=engine, p=in_psum: kernel(x, y, e, p), x, y)
        assert only(trace, "tensor_tensor").engine is Engine.vector


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (np.int32, np.uint32, np.int32),
        (np.uint32, np.int32, np.uint32),
        (np.int16, np.int16, np.uint16),
        (np.int8, np.uint8, np.int8),
        (np.uint8, np.uint8, np.uint8),
    ],
)
def test_tensor_tensor_on_bit_patterns(name, a, b, c):
    width = 8 * np.dtype(a).itemsize
    unsigned = np.dtype(f"u{width // 8}")
    rng = np.random.default_rng(4)
    x = rng.integers(0, 1 << width, (4, 16), dtype=np.uint64).astype(unsigned)
    y = rng.integers(0, width if "shift" in name else 1 << width, (4, 16), dtype=np.uint64).astype(unsigned)

    def kernel(x, y):
        dst = tile(x.shape, c)
        nisa.tensor_tensor(dst, sb(x), sb(y), op(name))
        return out(dst)

    y_bits = run(kernel, x.view(a), y.view(b))
    assert y_bits.dtype == c
    np.testing.assert_array_equal(y_bits.view(unsigned), BITS[name](x, y))
    assert only(traced(kernel, x.view(a), y.view(b)), "tensor_tensor").engine is Engine.vector


def test_tensor_tensor_of_views_in_place_and_psum():
    x, y = normal(4, 24), normal(4, 12, seed=1)

    def kernel(x, y):
        t, p = sb(x), ps(y)
        even = t.reshape((4, 2, 3, 4))[:, :, :, 0:4:2]
        nisa.tensor_tensor(even, even, p.reshape((4, 2, 6)), nl.subtract)
        nisa.tensor_tensor(p, t[:, 0:12], p, nl.multiply)
        return out(t), out(p)

    t, p = run(kernel, x, y)
    expected = x.copy()
    expected[:, ::2] -= y
    np.testing.assert_array_equal(t, expected)
    np.testing.assert_array_equal(p, expected[:, :12] * y)


def test_tensor_tensor_is_recorded_once():
    def kernel(x):
        nisa.tensor_tensor(sb(x), sb(x), sb(x), nl.add, name="sum")

    record = only(traced(kernel, normal(4, 8)), "tensor_tensor")
    assert (record.engine, record.attrs, record.name) == (Engine.vector, {"op": "add"}, "sum")
    assert [a.operand for a in record.reads + record.writes] == ["data1", "data2", "dst"]


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: nisa.tensor_tensor(ok(), ok((5, 8)), ok(), nl.add), "data1", "partitions", "5", "4"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok((4, 2, 2)), nl.add), "data2", "elements per partition", "4", "8"),
        (lambda: nisa.tensor_tensor(ok(), psum(), psum(), nl.add), "data2", "buffer", "psum", "at most one"),
        (lambda: nisa.tensor_tensor(ok(), ok(), 1.0, nl.add), "data2", "type", "float", "NkiTensor"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.abs), "op", "operator", "abs", "nl.add, nl.multiply"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.invert), "op", "operator", "invert", "nl.add, nl.multiply"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.exp), "op", "operator", "exp", "nl.add, nl.multiply"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), np.add), "op", "operator", "ufunc", "nl.add, nl.multiply"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.abs_max), "op", "abs_max", "trn2", "trn3"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.power, V), "engine", "engine of power", "vector", "gpsimd"),
        (lambda: nisa.tensor_tensor(ok(), psum(), ok(), nl.power), "engine", "PSUM", "power", "sbuf"),
        (lambda: nisa.tensor_tensor(psum(), ok(), ok(), nl.add, G), "engine", "PSUM", "gpsimd", "sbuf"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.add, S), "engine", "engine", "scalar", "vector, gpsimd"),
        (lambda: nisa.tensor_tensor(ok(), ok(), ok(), nl.add, 5), "engine", "type", "5", "nki.isa.engine"),
        (lambda: nisa.tensor_tensor(i32(), i32(), ok(), nl.bitwise_or), "data2", "bit operator", "float32", "int32"),
        (
            lambda: nisa.tensor_tensor(i32(), ok((4, 8), nl.int8), i32(), nl.bitwise_or),
            *("dst", "widths", "data1 int8", "one width"),
        ),
        (
            lambda: nisa.tensor_tensor(i32(), i32(), i32(), nl.bitwise_or, G),
            "engine",
            "bit operator",
            "gpsimd",
            "vector",
        ),
    ],
)
def test_tensor_tensor_refuses(kernel, operand, rule, received, allowed):
    refused(kernel, instruction="tensor_tensor", operand=operand, rule=rule, received=received, allowed=allowed)


# ---------------------------------------------------------------------------------------------------
# scalar_tensor_tensor and reciprocal


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
@pytest.mark.parametrize("buffers", [(sb, sb, sb), (ps, sb, ps), (sb, ps, sb)])
def test_scalar_tensor_tensor(reverse0, reverse1, buffers):
    x, y, c = normal(16, 12, dtype=BF16), normal(16, 12, seed=1), normal(16, 1, seed=2, dtype=BF16)

    def kernel(x, y, c):
        column, number = tile((16, 12), nl.bfloat16), tile((16, 12), buffer=nl.psum)
        a, b = buffers[0](x), buffers[1](y).reshape((16, 3, 4))
        nisa.scalar_tensor_tensor(column, a, nl.subtract, buffers[2](c), nl.subtract, b, reverse0, reverse1)
        nisa.scalar_tensor_tensor(number, a, nl.subtract, 0.1, nl.multiply, b, reverse0, reverse1)
        return out(column), out(number)

    column, number = run(kernel, x, y, c)

    def compute(x, c):
        return c - x if reverse0 else x - c

    first = compute(x.astype(np.float32), c.astype(np.float32))
    np.testing.assert_array_equal(column, (y - first if reverse1 else first - y).astype(BF16))
    np.testing.assert_array_equal(number, compute(x.astype(np.float32), np.float32(0.1)) * y)


@pytest.mark.parametrize("name", BINARY)
def test_scalar_tensor_tensor_operators(name):
    x, y = small(8, 16, seed=1), small(8, 16, seed=2)

    def kernel(x, y):
        t = sb(x)
        nisa.scalar_tensor_tensor(t, t, op(name), 1.0, op(name), sb(y))
        return out(t)

    expected = BINARY[name](BINARY[name](x, np.float32(1)), y)
    np.testing.assert_array_equal(run(kernel, x, y, target=target_of(name)), expected)


def test_scalar_tensor_tensor_is_recorded_once():
    def kernel(x):
        t = sb(x)
        nisa.scalar_tensor_tensor(t, t, nl.multiply, t[:, 0:1], nl.add, t)

    record = only(traced(kernel, normal(4, 8)), "scalar_tensor_tensor")
    assert (record.engine, record.attrs) == (Engine.vector, {"op0": "multiply", "op1": "add"})
    assert sorted(a.operand for a in record.reads) == ["data", "operand0", "operand1"]


def both(*args, **kwargs):
    """A kernel with one scalar_tensor_tensor on float32 tiles."""

    def kernel():
        x = tile((4, 8))
        nisa.memset(x, 1.0)
        nisa.scalar_tensor_tensor(tile((4, 8)), x, *args, x, **kwargs)

    return kernel


STT = nisa.scalar_tensor_tensor


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: STT(ok(), ok((5, 8)), nl.add, 1, nl.add, ok()), "data", "partitions", "5", "4"),
        (lambda: STT(ok(), ok(), nl.add, 1, nl.add, ok((4, 9))), "operand1", "elements per partition", "9", "8"),
        (lambda: STT(ok(), psum(), nl.add, 1, nl.add, psum()), "operand1", "buffer", "psum", "at most one"),
        (lambda: STT(ok(), ok(), nl.add, 1, nl.add, 1.0), "operand1", "type", "float", "NkiTensor"),
        (both(nl.bitwise_and, 1, nl.add), "op0", "operator", "bitwise_and", "arithmetic"),
        (both(nl.add, 1, nl.left_shift), "op1", "operator", "left_shift", "arithmetic"),
        (both(nl.add, 1, nl.power), "op1", "engine of nl.power", "vector", "gpsimd"),
        (both(nl.abs, 0, nl.add), "op0", "operator", "abs", "nl.add, nl.multiply"),
        (both(nl.add, 1, nl.abs_max), "op1", "abs_max", "trn2", "trn3"),
        (both(nl.add, 1, None), "op1", "operator", "None", "nl.add, nl.multiply"),
        (both(nl.add, None, nl.add), "operand0", "type", "NoneType", "number"),
        (both(nl.add, 1, nl.add, reverse0=0), "reverse0", "type", "0", "True or False"),
        (both(nl.add, 1, nl.add, reverse1="no"), "reverse1", "type", "'no'", "True or False"),
        (lambda: STT(ok(), ok(), nl.add, ok(), nl.add, ok()), "operand0", "shape", "[4, 8]", "[4, 1]"),
        (lambda: STT(ok(), ok(), nl.add, 1, nl.add, ok()), "data", "uninitialized read", "32 of 32", "written"),
    ],
)
def test_scalar_tensor_tensor_refuses(kernel, operand, rule, received, allowed):
    refused(kernel, instruction="scalar_tensor_tensor", operand=operand, rule=rule, received=received, allowed=allowed)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int16, np.uint8])
@pytest.mark.parametrize("buffer", [sb, ps])
def test_reciprocal(dtype, buffer):
    x = integers(8, 12, low=1, high=100).astype(dtype)

    def kernel(x):
        wide, narrow = tile((8, 12), buffer=nl.psum), tile((8, 3, 4), nl.bfloat16)
        t = buffer(x)
        nisa.reciprocal(wide, t)
        nisa.reciprocal(narrow, t)
        return out(wide), out(narrow)

    wide, narrow = run(kernel, x)
    expected = (1 / x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(narrow, expected.astype(BF16).reshape(8, 3, 4))


def test_reciprocal_of_special_values_in_place():
    x = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 2.0]], np.float32)

    def kernel(x):
        t = sb(x)
        nisa.reciprocal(t, t)
        return out(t)

    expected = np.array([[np.inf, -np.inf, 0.0, -0.0, np.nan, 0.5]], np.float32)
    y = run(kernel, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[0, :4]), np.signbit(expected[0, :4]))
    record = only(traced(kernel, x), "reciprocal")
    assert (record.engine, record.attrs) == (Engine.vector, {})


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: nisa.reciprocal(ok((5, 8)), ok()), "data", "partitions", "4", "5"),
        (lambda: nisa.reciprocal(ok((4, 2)), ok()), "data", "elements per partition", "8", "2"),
        (lambda: nisa.reciprocal(ok(buffer=nl.shared_hbm), ok()), "dst", "buffer", "hbm", "sbuf or psum"),
        (lambda: nisa.reciprocal(ok(), 2.0), "data", "type", "float", "NkiTensor"),
    ],
)
def test_reciprocal_refuses(kernel, operand, rule, received, allowed):
    refused(kernel, instruction="reciprocal", operand=operand, rule=rule, received=received, allowed=allowed)
