"""Every function of the legacy `nki.language`, against NumPy."""

from __future__ import annotations

import inspect
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import Trace, dtypes
from nkisim.legacy._dtypes import promote, weak
from nkisim.nki import recording
from tests.nkisim.legacy.isa_kernels import BF16, full, instructions, nisa, nki, nl, normal, refused, run, traced

X, Y = normal(32, 24), normal(32, 24, seed=1)

erf = np.vectorize(math.erf)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def normal_cdf(x: Any) -> Any:
    return 0.5 * (1 + erf(x / np.sqrt(2)))


FUNCTIONS: dict[str, Any] = {
    "abs": np.abs,
    "arctan": np.arctan,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": erf,
    "erf_dx": lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x),
    "exp": np.exp,
    "floor": np.floor,
    "gelu": lambda x: x * normal_cdf(x),
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "gelu_apprx_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_dx": lambda x: normal_cdf(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
    "log": np.log,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "negative": np.negative,
    "reciprocal": np.reciprocal,
    "relu": lambda x: np.maximum(x, 0),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    "sin": np.sin,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}
POSITIVE = ("log", "rsqrt", "sqrt", "reciprocal")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_tile(name: str) -> None:
    x = np.abs(X) + 0.2 if name in POSITIVE else np.clip(X, -1.5, 1.5) if name in ("arctan", "tan") else 2 * X
    function = getattr(nl, name)
    expected = FUNCTIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(run(function, x), expected, rtol=2e-5, atol=2e-6)
    as_bf16 = run(lambda t: function(t, dtype=nl.bfloat16), x)
    assert as_bf16.dtype == BF16
    np.testing.assert_allclose(as_bf16.astype(np.float64), expected, rtol=2**-7, atol=1e-5)
    masked = run(lambda t: function(t, mask=nl.arange(24)[None, :] < 10), x)
    np.testing.assert_allclose(masked[:, :10], expected[:, :10], rtol=2e-5, atol=2e-6)
    assert np.isnan(masked[:, 10:]).all()


BINARY = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "equal", "not_equal", "less", "less_equal"]
BINARY += ["greater", "greater_equal", "logical_and", "logical_or", "logical_xor"]


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two(name: str) -> None:
    ours, numpys = getattr(nl, name), getattr(np, name)
    x, y = np.round(X), np.round(Y)
    y = np.where(y == 0, 1, y) if name == "divide" else y
    for f in (
        lambda g, a, b: g(a, b),
        lambda g, a, b: g(a, 2.0),
        lambda g, a, b: g(3.0, b),
        lambda g, a, b: g(a, b[:, 0:1]),
        lambda g, a, b: g(a[:, 5:6], b),
        lambda g, a, b: g(a[0:1], b),
    ):
        got, expected = run(lambda a, b: f(ours, a, b), x, y), f(numpys, x, y)  # noqa: B023
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_integer_functions() -> None:
    n = np.arange(1, 65, dtype=np.int32).reshape(8, 8)
    m = n[::-1].copy()
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "maximum", "add", "multiply", "subtract"):
        got = run(lambda a, b: getattr(nl, name)(a, b), n, m)  # noqa: B023
        np.testing.assert_array_equal(got, getattr(np, name)(n, m))
    np.testing.assert_array_equal(run(lambda a: nl.left_shift(a, 3), n), n << 3)
    np.testing.assert_array_equal(run(lambda a: nl.right_shift(a, 1), n), n >> 1)
    np.testing.assert_array_equal(run(nl.invert, n), ~n)
    np.testing.assert_array_equal(run(nl.logical_not, n - 1), n == 1)
    refused("invert.x: dtype", nl.invert, X)


def test_remainders_and_powers() -> None:
    x = np.round(4 * X)
    for y in (3.0, -4.0):
        np.testing.assert_allclose(run(lambda t: nl.mod(t, y), x), np.mod(x, y), atol=1e-5)  # noqa: B023
        np.testing.assert_allclose(run(lambda t: nl.fmod(t, y), x), np.fmod(x, y), atol=1e-5)  # noqa: B023
    base = np.abs(X) + 0.1
    np.testing.assert_allclose(run(lambda a, b: nl.power(a, b), base, Y), base**Y, rtol=1e-5)
    refused("divide.y: value: received 0", lambda t: nl.divide(t, 0), X)
    refused("add.y: type: received str", lambda t: nl.add(t, "1"), X)
    refused("add.x: type: received float and float, allowed at least one tile", lambda t: nl.add(1.0, 2.0), X)
    refused("add: shapes that do not broadcast", lambda t: nl.add(t, t[:, 0:5]), X)


# -- types

PROMOTION = [
    ("int32", "float16", "float16"),
    ("uint16", "tfloat32", "tfloat32"),
    ("float32", "tfloat32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float16", "bfloat16", "float32"),
    ("float8_e4m3", "float16", "float16"),
    ("float8_e4m3", "bfloat16", "bfloat16"),
    ("float8_e4m3", "float8_e5m2", "bfloat16"),
    ("int16", "int32", "int32"),
    ("uint8", "uint16", "uint16"),
    ("uint16", "int32", "int32"),
    ("int8", "uint8", "int16"),
    ("int8", "uint16", "int32"),
    ("int32", "uint32", "float32"),
]


@pytest.mark.parametrize(("a", "b", "expected"), PROMOTION)
def test_promotion_is_the_documented_table(a: str, b: str, expected: str) -> None:
    x, y = dtypes.ALL[a], dtypes.ALL[b]
    assert promote(x, y) is promote(y, x) is dtypes.ALL[expected]


def test_numbers_are_weakly_typed_and_widest() -> None:
    assert [weak(v) for v in (True, 3, 2.5, np.int8(2), np.float16(1), np.float64(1))] == [
        dtypes.uint8,
        dtypes.int32,
        dtypes.float32,
        dtypes.int8,
        dtypes.float16,
        dtypes.float32,
    ]
    small = np.arange(8, dtype=np.int8).reshape(2, 4)
    for value, expected in ((2, np.int32), (np.int8(2), np.int8), (1.5, np.float32)):
        assert run(lambda t: nl.add(t, value), small).dtype == expected  # noqa: B023
    half = small.astype(np.float16)
    assert run(lambda t: t * 1.2, half).dtype == np.float32
    assert run(lambda t: t * np.float16(1.2), half).dtype == np.float16
    assert run(lambda a, b: a + b, half, small.astype(BF16)).dtype == np.float32


def test_types_and_constants() -> None:
    names = ["float16", "float32", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool_"]
    assert all(getattr(nl, n) is getattr(np, n) for n in names)
    assert nl.bfloat16 == np.dtype(ml_dtypes.bfloat16)
    assert (nl.tfloat32.itemsize, nl.float8_e4m3, nl.float8_e5m2) == (
        4,
        np.dtype(ml_dtypes.float8_e4m3),
        np.dtype(ml_dtypes.float8_e5m2),
    )
    assert (nl.fp32.min, nl.bfp16.min) == (float(np.finfo(np.float32).min), -np.inf)
    assert np.float32(nl.fp32.min).view(np.uint32) == 0xFF7FFFFF
    assert nl.finfo(nl.bfloat16).max == ml_dtypes.finfo(ml_dtypes.bfloat16).max
    size = nl.tile_size
    assert (size.pmax, size.psum_fmax, size.gemm_stationary_fmax, size.gemm_moving_fmax, size.bn_stats_fmax) == (
        128,
        512,
        128,
        512,
        512,
    )
    for grid, columns in ((nl.gemm_grid(), 512), (nl.gemm_stationary_grid(), 128)):
        got = run(lambda _, grid=grid: nisa.iota(1000 * grid.p + grid.x, dtype=nl.int32), normal(2, 2))
        np.testing.assert_array_equal(got, 1000 * np.arange(128)[:, None] + np.arange(columns))
    np.testing.assert_array_equal(nl.static_cast(np.ones(3), nl.bfloat16), np.ones(3, BF16))


# -- reductions


@pytest.mark.parametrize("name", ["sum", "max", "min", "prod", "mean"])
@pytest.mark.parametrize("axis", [2, (1, 2), 1, [1, 3], -1])
def test_reductions(name: str, axis: Any) -> None:
    x = normal(16, 3, 4, 5) * 0.7
    as_tuple = tuple(axis) if isinstance(axis, (list, tuple)) else axis
    expected = getattr(np, name)(x.astype(np.float64), axis=as_tuple)
    got = run(lambda t: getattr(nl, name)(t, axis=axis), x)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    kept = run(lambda t: getattr(nl, name)(t, axis=axis, keepdims=True), x)
    assert kept.shape == getattr(np, name)(x, axis=as_tuple, keepdims=True).shape
    np.testing.assert_array_equal(kept.ravel(), got.ravel())


def test_all_and_var() -> None:
    x = normal(16, 3, 5)
    bits = (np.abs(x) > 0.3).astype(np.float32)
    got = run(lambda t: nl.all(t, axis=2), bits)
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(got, bits.all(axis=2))
    np.testing.assert_allclose(run(lambda t: nl.var(t, axis=(1, 2)), x)[:, 0], x.var(axis=(1, 2)), rtol=1e-5)
    integers = np.arange(48, dtype=np.int32).reshape(8, 6)
    got = run(lambda t: nl.mean(t, axis=1), integers)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:, 0], integers.mean(axis=1), rtol=1e-6)
    for axis in (0, 3, (1, 1), "x", ()):
        refused("sum.axis: reduced dimensions", lambda t: nl.sum(t, axis=axis), x)  # noqa: B023


def test_softmax_and_rms_norm() -> None:
    x, w = 3 * normal(32, 4, 6), normal(1, 4, 6, seed=2)
    for axis in ((1, 2), 2):
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        expected = e / e.sum(axis=axis, keepdims=True)
        np.testing.assert_allclose(run(lambda t: nl.softmax(t, axis=axis), x), expected, rtol=1e-5)  # noqa: B023
    rms = x / np.sqrt((x**2).sum(axis=(1, 2), keepdims=True) / 24 + 1e-3) * w
    got = run(lambda t, u: nl.rms_norm(t, u, axis=(1, 2), n=24, epsilon=1e-3), x, w)
    np.testing.assert_allclose(got, rms, rtol=1e-5, atol=1e-6)
    low = run(lambda t: nl.softmax(t, axis=2, dtype=nl.bfloat16, compute_dtype=nl.bfloat16), x)
    assert low.dtype == BF16


# -- moving


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.int8, np.uint32])
def test_transposes_keep_every_bit(dtype: Any) -> None:
    x = np.arange(60 * 40).reshape(60, 40) * 7919
    x = x.astype(np.int32).view(np.float32) if dtype is np.float32 else (x % 251 - 120).astype(dtype)
    x = np.where(np.isfinite(x), x, 1).astype(dtype) if dtype is np.float32 else x
    np.testing.assert_array_equal(run(nl.transpose, x), x.T)
    got = run(lambda t: nl.transpose(t, dtype=nl.float32), x)
    np.testing.assert_array_equal(got, x.T.astype(np.float32))

    @nki.jit(mode="simulation")
    def loaded(x: Any) -> Any:
        out = nl.ndarray((40, 60), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.load_transpose2d(x))
        return out

    np.testing.assert_array_equal(loaded(x), x.T)


def test_long_and_masked_transposed_loads() -> None:
    x = normal(300, 20)

    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray((20, 300), dtype=nl.bfloat16, buffer=nl.shared_hbm)
        some = nl.ndarray((20, 300), dtype=nl.float32, buffer=nl.shared_hbm)
        nl.store(out, nl.load_transpose2d(x, dtype=nl.bfloat16))
        nl.store(some, nl.load_transpose2d(x, mask=nl.arange(300)[None, :] < 140))
        return out, some

    out, some = kernel(x)
    np.testing.assert_array_equal(out, x.T.astype(BF16))
    np.testing.assert_array_equal(some[:, :140], x.T[:, :140])
    assert np.isnan(some[:, 140:]).all()


def test_matmul_of_both_layouts() -> None:
    x, y = normal(48, 64), normal(64, 80, seed=1)
    expected = x.astype(np.float64) @ y
    np.testing.assert_allclose(run(lambda a, b: nl.matmul(a, b), x, y), expected, rtol=1e-4, atol=1e-4)
    transposed = run(lambda a, b: nl.matmul(a, b, transpose_x=True), x.T.copy(), y)
    np.testing.assert_allclose(transposed, expected, rtol=1e-4, atol=1e-4)
    refused("err_num_partition_mismatch: contraction", lambda a, b: nl.matmul(a, b, transpose_x=True), x, y)


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("err_exceed_max_supported_dimension: dimensions: received 3", lambda t: nl.transpose(t.reshape((32, 4, 6)))),
        ("err_size_of_dimension_exceed_arch_limit: .* 1: received 512", lambda t: nl.transpose(full((32, 512), 1))),
        ("err_unsupported_memory", lambda t: nl.transpose(nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.hbm))),
        ("gather_flattened.data: err_exceed_max", lambda t: nl.gather_flattened(t.reshape((32, 2, 2, 2, 3)), t)),
        ("device_print.prefix: type", lambda t: nl.device_print(3, t)),
        ("broadcast_to.shape: size", lambda t: nl.broadcast_to(t, shape=(32, 48))),
        ("expand_dims.axis: value: received 0", lambda t: nl.expand_dims(t, 0)),
        ("atomic_rmw.op: operator: received <ufunc 'multiply'>", lambda t: nl.atomic_rmw(_hbm(), t, np.multiply)),
        ("atomic_rmw.dst: index", lambda t: nl.atomic_rmw(_hbm(), t, np.add)),
        ("err_store_dst_shape_smaller", lambda t: nl.store(_hbm()[:, 0:1], t)),
    ],
)  # fmt: skip
def test_refused_moves(match: str, body: Any) -> None:
    refused(match, body, X)


def _hbm() -> Any:
    return nl.ndarray((32, 24), dtype=nl.float32, buffer=nl.hbm)


def test_where() -> None:
    c = X > 0
    for x, y in ((1.0, 0.0), (None, 2.0), (3.0, None), (None, None)):
        expected = np.where(c, Y if x is None else x, -X if y is None else y).astype(np.float32)
        got = run(lambda t, u: nl.where(t > 0.0, u if x is None else x, -t if y is None else y), X, Y)  # noqa: B023
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(run(lambda t, u: nl.where(t, u, 0.0), c.astype(np.float32), Y), np.where(c, Y, 0))
    np.testing.assert_array_equal(
        run(lambda t, u: nl.where(t[:, 3:4] > 0.0, u, u[0:1, :]), X, Y), np.where(c[:, 3:4], Y, Y[0:1])
    )

    def in_place(t: Any, u: Any) -> Any:
        u[...] = nl.where(t > 0.0, u, t)  # the first of its two instructions may not overwrite u
        return u

    def in_place_by_another_shape(t: Any, u: Any) -> Any:
        view = u.reshape((32, 4, 6))
        view[...] = nl.where(t.reshape((32, 4, 6)) > 0.0, u.reshape((32, 4, 6)), 0.0)
        return u

    np.testing.assert_array_equal(run(in_place, X, Y), np.where(c, Y, X))
    np.testing.assert_array_equal(run(in_place_by_another_shape, X, Y), np.where(c, Y, 0))


def test_gather_flattened_and_broadcast_to() -> None:
    index = np.random.default_rng(0).integers(0, 24, (32, 2, 5)).astype(np.uint32)
    got = run(lambda t, i: nl.gather_flattened(t.reshape((32, 4, 6)), i), X, index)
    np.testing.assert_array_equal(got, np.take_along_axis(X, index.reshape(32, 10).astype(int), 1).reshape(32, 2, 5))
    row = normal(1, 20)
    got = run(lambda t: nl.broadcast_to(t, shape=(100, 20)), row)
    np.testing.assert_array_equal(got, np.broadcast_to(row, (100, 20)))
    # As AWS's architecture guide says: a product with ones, here brought out of PSUM by the Scalar Engine.
    wide = normal(1, 700)
    wide[0, :3] = np.inf, np.nan, -0.0
    twice = lambda t: nl.broadcast_to(t, shape=(100, 700)) + nl.broadcast_to(t, shape=(100, 700))  # noqa: E731
    np.testing.assert_array_equal(run(twice, wide), np.broadcast_to(2 * wide, (100, 700)))
    pieces = ["nc_matmul", "activation"] * 4
    assert instructions(traced(twice, wide)) == ["memset", *pieces, "tensor_tensor"]
    numbers = np.arange(20, dtype=np.int32)[None] * 100_000_007
    got = run(lambda t: nl.broadcast_to(t, shape=(100, 20)), numbers)
    np.testing.assert_array_equal(got, np.broadcast_to(numbers, (100, 20)))
    assert instructions(traced(lambda t: nl.broadcast_to(t, shape=(100, 20)), numbers)) == ["nc_stream_shuffle"] * 4
    half = run(lambda t: nl.broadcast_to(t, shape=(64, 2, 3)), normal(1, 2, 3).astype(np.float16))
    assert (half == normal(1, 2, 3).astype(np.float16)).all()
    got = run(lambda t: nl.copy(nl.broadcast_to(t[7:8, 0:1], shape=(64, 3, 5))), X[:, :1])
    np.testing.assert_array_equal(got, np.full((64, 3, 5), X[7, 0]))


def test_atomic_add_to_rows() -> None:
    rows = np.array([[3], [0], [9]], np.int32)

    @nki.jit(mode="simulation")
    def kernel(x: Any, rows: Any) -> Any:
        out = nl.ndarray((10, 24), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, 1.0)
        nl.atomic_rmw(out[nl.load(rows), nl.arange(24)[None, :]], nl.load(x[0:3]), np.add)
        return out

    expected = np.ones((10, 24), np.float32)
    expected[rows[:, 0]] += X[:3]
    np.testing.assert_allclose(kernel(X, rows), expected, rtol=1e-6)


def test_stores_broadcast() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray((3, 32, 24), dtype=x.dtype, buffer=nl.shared_hbm)
        flat = nl.ndarray((32,), dtype=x.dtype, buffer=nl.shared_hbm)
        tile = nl.load(x)
        nl.store(out[0], 3)
        nl.store(out[1, :, 0:12], tile[0:1, 0:12])
        nl.store(out[1, :, 12:24], tile[:, 5:6])
        nl.store(out[2], nl.transpose(nl.transpose(tile)))  # from PSUM
        nl.store(flat, nl.load(x[:, 2]))
        return out, flat

    out, flat = kernel(X)
    assert (out[0] == 3).all()
    np.testing.assert_array_equal(out[1], np.concatenate([np.tile(X[0:1, :12], (32, 1)), np.tile(X[:, 5:6], 12)], 1))
    np.testing.assert_array_equal(out[2], X)
    np.testing.assert_array_equal(flat, X[:, 2])


# -- making


def test_making_tensors() -> None:
    def body(t: Any) -> Any:
        a = nl.ones((8, 4), dtype=nl.float32) + nl.full((8, 4), 2, dtype=nl.float32)
        b = nl.zeros_like(a) + nl.zeros((8, 4), nl.float32, buffer=nl.psum)
        c = nl.empty_like(a)
        c[...] = nl.static_cast(nl.zeros((8, 4), dtype=np.int8), nl.float32)
        blocks = nl.full((2, nl.par_dim(8), 4), 5.0, dtype=nl.float32, buffer=nl.sbuf)
        return a + b + c + blocks[1] + nl.ones((8, 1), dtype=nl.float32)

    np.testing.assert_array_equal(run(body, X), np.full((8, 4), 9))


def test_random_numbers_and_dropout() -> None:
    def uniform(seed: int) -> Any:
        def body(t: Any) -> Any:
            nl.random_seed(seed)
            return nl.rand((64, 200))

        return run(body, X)

    a = uniform(1)
    assert a.dtype == np.float32
    assert (a >= 0).all()
    assert (a < 1).all()
    assert abs(a.mean() - 0.5) < 0.01
    np.testing.assert_array_equal(a, uniform(1))
    assert (a != uniform(2)).any()
    x = np.ones((64, 200), np.float32)
    kept = run(lambda t: nl.dropout(t, rate=0.25), x) != 0
    assert abs(kept.mean() - 0.75) < 0.02


def test_constants() -> None:
    table = np.arange(40, dtype=np.float32).reshape(8, 5)

    def body(t: Any) -> Any:
        constant = nl.load(nl.shared_constant(table))
        eye = nl.shared_identity_matrix(8, dtype=nl.float32)
        return nl.matmul(eye, constant, transpose_x=True)

    np.testing.assert_array_equal(run(body, X), table)
    refused("err_cannot_update_immutable_parameter", lambda t: nl.store(nl.shared_constant(table), 1.0), X)
    small = run(lambda t: nl.load(nl.shared_constant(table, dtype=nl.bfloat16)), X)
    assert small.dtype == BF16
    with pytest.raises(TypeError, match=r"shared_constant\.constant: received int"):
        run(lambda t: nl.shared_constant(3), X)


def test_device_print(capsys: pytest.CaptureFixture[str]) -> None:
    def body(t: Any) -> Any:
        nl.device_print("rows:", t[0:2, 0:3])
        nl.device_print("some:", t, mask=(nl.arange(4)[:, None] < 1) & (nl.arange(3)[None, :] < 2))
        return t

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    run(body, x)
    assert capsys.readouterr().out == "rows:\n[[0. 1. 2.]\n [3. 4. 5.]]\nsome:\n[[0. 1.]]\n"


# -- the whole module

SIGNATURES = """
abs arctan ceil cos erf erf_dx exp floor gelu gelu_apprx_sigmoid gelu_apprx_tanh gelu_dx invert log mish negative
reciprocal relu rsqrt sigmoid sign silu silu_dx sin softplus sqrt square tan tanh trunc transpose: x * dtype mask
logical_not: x * dtype mask
add bitwise_and bitwise_or bitwise_xor divide left_shift maximum minimum multiply power right_shift
subtract: x y * dtype mask
equal greater greater_equal less less_equal logical_and logical_or logical_xor not_equal: x y * dtype mask
fmod mod: x y dtype mask
max mean min prod sum: x axis * dtype mask keepdims
all var: x axis * dtype mask
softmax: x axis * dtype compute_dtype mask
rms_norm: x w axis n epsilon * dtype compute_dtype mask
load load_transpose2d copy: src * mask dtype
store: dst value * mask
atomic_rmw: dst value op * mask
broadcast_to: src * shape
device_print: prefix x * mask
dropout: x rate * dtype mask
expand_dims: data axis
gather_flattened: data indices * mask dtype
matmul: x y * transpose_x mask
where: condition x y * dtype mask
loop_reduce: x op loop_indices * dtype mask
all_reduce: x op program_axes * dtype mask parallel_reduce asynchronous
ndarray: shape dtype * buffer name
ones zeros: shape dtype * buffer name lazy_initialization
full: shape fill_value dtype * buffer name lazy_initialization
empty_like zeros_like: a dtype * buffer name
rand: shape dtype
random_seed: seed * mask
shared_constant: constant dtype
shared_identity_matrix: n dtype
static_cast: input_data dtype
num_programs: axes
program_id: axis
program_ndim gemm_grid gemm_stationary_grid:
finfo: dtype
ds: start size
"""
OTHERS = """
affine_range arange bfloat16 bfp16 bool_ float16 float32 float8_e4m3 float8_e5m2 fp32 hbm int16 int32 int8 mgrid nc
par_dim private_hbm psum sbuf sequential_range shared_hbm spmd_dim static_range tfloat32 tile_size uint16 uint32 uint8
"""


def documented() -> dict[str, str]:
    found, names = {}, ""
    for line in SIGNATURES.strip().splitlines():
        before, colon, parameters = line.partition(":")
        names += " " + before
        if colon:
            found.update(dict.fromkeys(names.split(), " ".join(parameters.split())))
            names = ""
    return found


def test_the_module_has_the_documented_names_and_signatures() -> None:
    found = documented()
    assert set(nl.__all__) == {*found, *OTHERS.split(), "bypass"}
    assert all(hasattr(nl, name) for name in nl.__all__)
    for name, parameters in found.items():
        written: list[str] = []
        for p in inspect.signature(getattr(nl, name)).parameters.values():
            if p.kind is p.KEYWORD_ONLY and "*" not in written:
                written.append("*")
            written.append(p.name)
        assert " ".join(written) == parameters, name


def test_functions_name_operators_as_numpys_do() -> None:
    for op in (nl.add, np.add, nl.max, np.max, nl.sum, np.minimum, nl.multiply):
        assert run(lambda a, b: nisa.tensor_tensor(a, b, op=op), X, Y).shape == (32, 24)  # noqa: B023
    for op in (nl.load, np.sort, "add", 3):
        refused("tensor_tensor.op: operator", lambda a, b: nisa.tensor_tensor(a, b, op=op), X, Y)  # noqa: B023


def test_a_legacy_kernel_is_traced_and_timed() -> None:
    from nkisim.latency import estimate

    with recording() as found:
        run(lambda t: nl.exp(t), X)
    trace = found["kernel"]
    assert isinstance(trace, Trace)
    assert [r.instruction for r in trace.records] == ["dma_copy", "activation", "dma_copy"]
    assert estimate(trace).total_us > 0


@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.int32], ids=["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_column_of_any_type_is_repeated(kind: Any, reverse: bool) -> None:
    x = np.round(normal(16, 6) * 8)

    def body(t: Any) -> Any:
        column = nl.copy(t[:, 0:1], dtype=kind)
        return column - t if reverse else t - column

    expected = x - x[:, :1]
    np.testing.assert_array_equal(run(body, x), -expected if reverse else expected)


def test_the_quotient_of_integers_is_a_float() -> None:
    def body(t: Any) -> Any:
        whole = nl.copy(t, dtype=nl.int32)
        quotient = nl.divide(whole, 4)
        assert quotient.dtype == np.float32
        return quotient + nl.divide(whole, nl.full((16, 6), 2, dtype=nl.int32))

    x = np.round(normal(16, 6) * 8)
    np.testing.assert_array_equal(run(body, x), x / 4 + x / 2)
