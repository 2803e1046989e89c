"""Scalar Engine: the functions of the activation table, their ranges and what lies outside."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.operators import ACTIVATIONS
from tests.nkisim.harness import out, run, sb, tile

erf = np.vectorize(math.erf, otypes=[np.float64])
erfc = np.vectorize(math.erfc, otypes=[np.float64])


def phi(x):
    return 0.5 * erfc(-x / math.sqrt(2))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


# Each function in float64, with the ends of the inputs it is tried on.
FUNCTIONS = {
    "copy": (lambda x: x, -9, 9),
    "square": (np.square, -9, 9),
    "sigmoid": (sigmoid, -30, 30),
    "relu": (lambda x: np.where(x > 0, x, 0), -9, 9),
    "gelu": (lambda x: x * phi(x), -8, 8),
    "gelu_dx": (lambda x: phi(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), -8, 8),
    "gelu_apprx_tanh": (gelu_tanh, -4, 8),
    "gelu_apprx_sigmoid": (lambda x: x * sigmoid(1.702 * x), -9, 9),
    "gelu_apprx_sigmoid_dx": (
        lambda x: sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - sigmoid(1.702 * x))),
        -9,
        9,
    ),
    "silu": (lambda x: x * sigmoid(x), -30, 30),
    "silu_dx": (lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))), -9, 9),
    "tanh": (np.tanh, -9, 9),
    "softplus": (softplus, -9, 30),
    "mish": (lambda x: x * np.tanh(softplus(x)), -9, 9),
    "erf": (erf, -5, 5),
    "erf_dx": (lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x), -5, 5),
    "exp": (np.exp, -80, 80),
    "log": (np.log, 2.0**-64, 2.0**64),
    "sin": (np.sin, -math.pi, math.pi),
    "arctan": (np.arctan, -math.pi / 2, math.pi / 2),
    "sqrt": (np.sqrt, 2.0**-116, 2.0**118),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-87, 2.0**97),
    "reciprocal": (lambda x: 1 / x, 2.0**-42, 2.0**42),
    "sign": (np.sign, -9, 9),
    "abs": (np.abs, -9, 9),
}


def apply(op, x, target="trn2", **kwargs):
    """`activation` of an array with numbers as arguments."""

    def kernel(x):
        y = tile(x.shape)
        nisa.activation(y, op, sb(x), **kwargs)
        return out(y)

    return run(kernel, x, target=target)


def test_every_function_of_the_table_is_tried():
    assert set(FUNCTIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_follows_float64_over_its_range(name):
    function, low, high = FUNCTIONS[name]
    if low > 0:
        x = np.geomspace(low, high, 4 * 500).astype(np.float32)
        x[[0, -1]] = low, high
    else:
        x = np.linspace(low, high, 4 * 500).astype(np.float32)
    x = x.reshape(4, 500)
    exact = function(x.astype(np.float64))
    np.testing.assert_allclose(apply(getattr(nl, name), x), exact, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("name", ["sigmoid", "exp", "silu"])
def test_small_results_keep_their_relative_precision(name):
    x = np.linspace(-60, -20, 64, dtype=np.float32).reshape(2, 32)
    np.testing.assert_allclose(apply(getattr(nl, name), x), FUNCTIONS[name][0](x.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("log", [2.0**-64, 2.0**64], [0.0, -1.0, 2.0**-65, 2.0**65, np.inf]),
        ("arctan", [-1.5707963, 1.5707963], [1.6, -1.6]),
        ("sqrt", [2.0**-116, 2.0**118], [0.0, -1.0, 2.0**-117, 2.0**119]),
        ("rsqrt", [2.0**-87, 2.0**97], [0.0, -1.0, 2.0**-88, 2.0**98]),
        ("reciprocal", [2.0**-42, -(2.0**-42), 2.0**42, -(2.0**42)], [0.0, 2.0**-43, -(2.0**43), np.inf]),
    ],
)
def test_outside_of_the_valid_range_is_nan(name, inside, outside):
    op = getattr(nl, name)
    assert np.isfinite(apply(op, np.array([inside], np.float32))).all()
    assert np.isnan(apply(op, np.array([outside], np.float32))).all()
    assert np.isnan(apply(op, np.array([[np.nan]], np.float32))).all()


def test_range_is_checked_after_scale_and_bias():
    x = np.array([[1.0, 3.0]], np.float32)
    y = apply(nl.sqrt, x, scale=-1.0, bias=2.0)
    assert y[0, 0] == 1.0
    assert np.isnan(y[0, 1])


def test_sin_extrapolates_a_cubic_outside_of_pi():
    y = apply(nl.sin, np.array([[9.0, -9.0, 3.1415, 3.1417]], np.float32))
    np.testing.assert_allclose(y[0, :2], [27.65, -27.65], atol=0.01)
    np.testing.assert_allclose(y[0, 2:], np.sin([3.1415, 3.1417]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "at_minus", "at_plus"),
    [
        ("sigmoid", 0, 1),
        ("relu", 0, np.inf),
        ("gelu", 0, np.inf),
        ("gelu_dx", 0, 1),
        ("gelu_apprx_tanh", 0, np.inf),
        ("gelu_apprx_sigmoid", 0, np.inf),
        ("gelu_apprx_sigmoid_dx", 0, 1),
        ("silu", 0, np.inf),
        ("silu_dx", 0, 1),
        ("tanh", -1, 1),
        ("softplus", 0, np.inf),
        ("mish", 0, np.inf),
        ("erf", -1, 1),
        ("erf_dx", 0, 0),
        ("exp", 0, np.inf),
        ("sign", -1, 1),
        ("abs", np.inf, np.inf),
    ],
)
def test_infinities_are_in_the_range_of_unlimited_functions(name, at_minus, at_plus):
    x = np.array([[-np.inf, np.inf, -3e38, np.nan]], np.float32)
    y = apply(getattr(nl, name), x)
    np.testing.assert_array_equal(y[0, :2], [at_minus, at_plus])
    assert np.isfinite(y[0, 2]) or name in ("abs",)
    assert np.isnan(y[0, 3])
