"""nl: functions of one tile: activations, copy, reciprocal, rsqrt, trigonometry, rounding."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, integers, normal, out, ps, refused, run, sb, traced

BF16 = ml_dtypes.bfloat16
X = np.clip(normal(6, 11, seed=7), -1.5, 1.5)
X[0, 0] = 0.0
POSITIVE = np.abs(X) + 0.25


def each(f: Any) -> Any:
    return np.vectorize(f, otypes=[np.float64])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def slope(f: Any) -> Any:
    """Derivative by central differences in float64."""
    return lambda x: (f(x + 1e-6) - f(x - 1e-6)) / 2e-6


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + each(math.erf)(x / math.sqrt(2)))


FUNCTIONS: dict[str, Any] = {
    "abs": np.abs,
    "square": np.square,
    "exp": np.exp,
    "tanh": np.tanh,
    "arctan": np.arctan,
    "sign": np.sign,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_dx": slope(gelu),
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": slope(lambda x: x * sigmoid(1.702 * x)),
    "gelu_apprx_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": slope(lambda x: x * sigmoid(x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "erf": each(math.erf),
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
    "log": np.log,
    "sqrt": np.sqrt,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name: str) -> None:
    function = getattr(nl, name)
    x = POSITIVE if name in ("log", "sqrt") else X

    def kernel(x: Any) -> Any:
        return out(function(sb(x))), out(function(ps(x), dtype=nl.bfloat16))

    wide, half = run(kernel, x)
    expected = FUNCTIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(wide, expected, rtol=2e-6, atol=2e-7)
    assert half.dtype == BF16
    np.testing.assert_array_equal(half, wide.astype(BF16))
    trace = traced(kernel, x)
    assert trace.count("activation", engine=Engine.scalar) == 2
    assert {r.attrs["op"] for r in trace.records if r.instruction == "activation"} == {name}


def test_outside_the_valid_range_the_result_is_invalid() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.log(t)), out(nl.sqrt(t)), out(nl.arctan(t))

    log, root, angle = run(kernel, np.array([[-1.0, 0.0, 2.0]], np.float32))
    np.testing.assert_array_equal(np.isnan(log), [[True, True, False]])
    np.testing.assert_array_equal(np.isnan(root), [[True, True, False]])
    np.testing.assert_array_equal(np.isnan(angle), [[False, False, True]])


def test_reciprocal_runs_on_the_vector_engine_without_range() -> None:
    x = np.array([[0.0, 1e-30, 3.0, -8.0, 1e30]], np.float32)

    def kernel(x: Any) -> Any:
        return out(nl.reciprocal(sb(x)))

    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(run(kernel, x), np.float32(1) / x)
    assert traced(kernel, x).count("reciprocal", engine=Engine.vector) == 1


def test_rsqrt_runs_on_gpsimd_which_has_no_psum() -> None:
    def kernel(x: Any) -> Any:
        return out(nl.rsqrt(sb(x)))

    def in_psum(x: Any) -> Any:
        return nl.rsqrt(ps(x))

    np.testing.assert_allclose(run(kernel, POSITIVE), POSITIVE.astype(np.float64) ** -0.5, rtol=1e-6)
    assert traced(kernel, POSITIVE).count("tensor_scalar", engine=Engine.gpsimd) == 1
    refused(in_psum, POSITIVE, instruction="rsqrt", operand="x", rule="buffer", received="psum", allowed="sbuf")


def test_copy_is_bit_exact_and_comes_to_sbuf() -> None:
    whole = integers(4, 5, low=2**24 + 1, high=2**31 - 1)

    def kernel(x: Any, y: Any) -> Any:
        t = nl.copy(ps(x))
        assert t.buffer is nl.sbuf
        return out(t), out(nl.copy(sb(x), dtype=nl.float16)), out(nl.copy(sb(y)))

    same, half, ints = run(kernel, X, whole)
    np.testing.assert_array_equal(same, X)
    np.testing.assert_array_equal(half, X.astype(np.float16))
    np.testing.assert_array_equal(ints, whole)

    def one(x: Any) -> Any:
        return out(nl.copy(sb(x)))

    assert traced(one, X).count("tensor_copy", engine=Engine.vector) == 1


ANGLES = np.concatenate(
    [
        np.linspace(-50, 50, 997),
        np.arange(-16, 17) * math.pi / 4,
        np.random.default_rng(8).uniform(-5e4, 5e4, 4000),
        # Half turns, where the number of turns is a tie.
        (2 * np.arange(-8000, 8000, 13) + 1) * math.pi,
        [9.0, 1e4, -2e4, 5e4, 0.0, 1e-20, -1e-8],
    ]
).astype(np.float32)[None]


@pytest.mark.parametrize("target", TARGETS)
def test_sine_and_cosine_of_any_angle(target: str) -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.sin(t)), out(nl.cos(t))

    sine, cosine = run(kernel, ANGLES, target=target)
    exact = ANGLES.astype(np.float64)
    np.testing.assert_allclose(sine, np.sin(exact), atol=1e-6)
    np.testing.assert_allclose(cosine, np.cos(exact), atol=1e-6)
    # Near 0 the reduction must not cost relative precision.
    np.testing.assert_allclose(sine[0, -2:], exact[0, -2:], rtol=1e-6)


def test_the_engine_sees_no_angle_outside_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    centres = (np.arange(-40, 41) * (math.pi / 2)).astype(np.float32)
    around = np.concatenate([centres, np.nextafter(centres, 100), np.nextafter(centres, -100)])[None]
    seen = []
    activation = nisa.activation

    def spy(dst: Any, op: Any, data: Any) -> Any:
        seen.append(data.storage.array(np.dtype(np.float32), data.shape, data.strides, data.offset).copy())
        return activation(dst=dst, op=op, data=data)

    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.sin(t)), out(nl.cos(t))

    monkeypatch.setattr(nisa, "activation", spy)
    run(kernel, around)
    assert len(seen) == 2
    assert max(np.abs(angles).max() for angles in seen) <= np.float32(math.pi)


def test_activation_alone_does_not_reduce_the_range() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        nisa.activation(dst=t, op=nl.sin, data=t)
        return out(t)

    assert abs(run(kernel, np.array([[9.0]], np.float32))[0, 0]) > 1


def test_tangent() -> None:
    x = np.linspace(-20, 20, 401, dtype=np.float32)[None]

    def kernel(x: Any) -> Any:
        return out(nl.tan(sb(x)))

    exact = np.tan(x.astype(np.float64))
    # The slope of the tangent multiplies the error of the reduced angle.
    assert np.all(np.abs(run(kernel, x) - exact) <= 2e-6 * (1 + exact**2))


def test_trigonometry_of_bfloat16_rounds_once() -> None:
    x = normal(4, 40, seed=9, dtype=BF16) * BF16(3)

    def kernel(x: Any) -> Any:
        return out(nl.sin(sb(x))), out(nl.cos(ps(x), dtype=nl.float32))

    sine, cosine = run(kernel, x)
    exact = x.astype(np.float64)
    assert (sine.dtype, cosine.dtype) == (BF16, np.float32)
    np.testing.assert_array_equal(sine, np.sin(exact).astype(np.float32).astype(BF16))
    np.testing.assert_allclose(cosine, np.cos(exact), atol=1e-6)


ROUNDED = np.array(
    [
        [0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.7, -3.2],
        [1.0, -1.0, 0.99999994, -0.99999994, 8388607.5, -8388607.5, 8388609.0, 4194303.8],
        [2.0**31, -(2.0**31), 3e9, -3e38, np.inf, -np.inf, np.nan, 1e-40],
    ],
    np.float32,
)


@pytest.mark.parametrize("name", ["ceil", "floor", "trunc"])
def test_rounding(name: str) -> None:
    function = getattr(nl, name)

    def kernel(x: Any, h: Any) -> Any:
        return out(function(sb(x))), out(function(ps(x), dtype=nl.bfloat16)), out(function(sb(h)))

    halves = ROUNDED[:2].astype(BF16)
    wide, cast, half = run(kernel, ROUNDED, halves)
    expected = getattr(np, name)(ROUNDED)
    np.testing.assert_array_equal(wide, expected)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(cast.astype(np.float32), expected.astype(BF16).astype(np.float32))
    np.testing.assert_array_equal(half, getattr(np, name)(halves.astype(np.float32)).astype(BF16))


def test_rounding_leaves_integers_alone() -> None:
    a = integers(3, 4, low=2**24 + 1, high=2**31 - 1)

    def kernel(x: Any) -> Any:
        return out(nl.floor(sb(x)))

    np.testing.assert_array_equal(run(kernel, a), a)


@pytest.mark.parametrize(
    "name", ["exp", "reciprocal", "rsqrt", "copy", "sin", "cos", "tan", "floor", "negative", "logical_not"]
)
def test_functions_take_tiles(name: str) -> None:
    function = getattr(nl, name)

    def number(x: Any) -> Any:
        return function(2.0)

    def hbm(x: Any) -> Any:
        return function(x)

    refused(number, X, instruction=name, operand="x", rule="type", received="float", allowed="a tile")
    refused(hbm, X, instruction=name, operand="x", rule="buffer", received="private_hbm", allowed="sbuf")
