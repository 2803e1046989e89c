"""nl: reductions, softmax, rms_norm."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, normal, out, ps, refused, run, sb, traced

BF16 = ml_dtypes.bfloat16
X = normal(6, 40, seed=11)
CUBE = normal(5, 3, 4, 8, seed=12)
PLAIN: dict[str, Any] = {"sum": np.sum, "max": np.max, "min": np.min, "mean": np.mean, "prod": np.prod, "var": np.var}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("axis", [-1, 3, (3,), [2, 3], (1, 2, 3), (-2, -1), (3, 2)])
def test_reductions(name: str, axis: Any) -> None:
    function = getattr(nl, name)
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)

    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(function(t, axis)), out(function(t, axis=axis, keepdims=True))

    plain, kept = run(kernel, CUBE)
    expected = PLAIN[name](CUBE.astype(np.float64), axis=axes, keepdims=True)
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)
    assert kept.shape == expected.shape
    dropped = tuple(n for d, n in enumerate(CUBE.shape) if d not in {a % 4 for a in axes})
    dropped = dropped if len(dropped) > 1 else (*dropped, 1)
    assert plain.shape == (expected.shape if name == "var" else dropped)
    np.testing.assert_array_equal(plain.ravel(), kept.ravel())


@pytest.mark.parametrize("name", PLAIN)
def test_reductions_of_bfloat16_from_psum_round_once(name: str) -> None:
    half = X.astype(BF16)
    function = getattr(nl, name)

    def kernel(x: Any) -> Any:
        t = ps(x)
        return out(function(t, 1)), out(function(t, 1, dtype=nl.float32))

    same, wide = run(kernel, half)
    assert (same.dtype, wide.dtype) == (BF16, np.float32)
    np.testing.assert_allclose(wide[:, 0], PLAIN[name](half.astype(np.float64), axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(same, wide.astype(BF16))


def test_all() -> None:
    x = np.ones((4, 6), np.float32)
    x[1, 3] = 0
    x[2] = -7

    def kernel(x: Any) -> Any:
        t = sb(x)
        return out(nl.all(t, axis=1)), out(nl.all(t, 1, dtype=nl.uint8))

    same, byte = run(kernel, x)
    np.testing.assert_array_equal(same[:, 0], [1, 0, 1, 1])
    assert (same.dtype, byte.dtype) == (np.float32, np.uint8)


def test_one_instruction_each() -> None:
    def kernel(x: Any) -> Any:
        return out(nl.sum(sb(x), axis=1))

    assert traced(kernel, X).count("tensor_reduce", engine=Engine.vector) == 1


@pytest.mark.parametrize("name", ["sum", "mean", "var", "all", "softmax"])
def test_axes_that_are_refused(name: str) -> None:
    function = getattr(nl, name)

    def partition(x: Any) -> Any:
        return function(sb(x), axis=0)

    def everything(x: Any) -> Any:
        return function(sb(x), axis=(0, 1, 2, 3))

    def middle(x: Any) -> Any:
        return function(sb(x), axis=(1, 2))

    def gap(x: Any) -> Any:
        return function(sb(x), axis=(1, 3))

    def twice(x: Any) -> Any:
        return function(sb(x), axis=(3, 3))

    def beyond(x: Any) -> Any:
        return function(sb(x), axis=4)

    def fraction(x: Any) -> Any:
        return function(sb(x), axis=1.0)

    for kernel, received in (
        (partition, "0"),
        (everything, "(0, 1, 2, 3)"),
        (middle, "(1, 2)"),
        (gap, "(1, 3)"),
        (twice, "(3, 3)"),
        (beyond, "4"),
    ):
        refused(
            kernel,
            CUBE,
            instruction=name,
            operand="axis",
            rule="reduced dimensions",
            received=received,
            allowed="[3], [2, 3], [1, 2, 3]",
        )
    refused(fraction, CUBE, instruction=name, operand="axis", rule="type", received="1.0", allowed="an int")


def soft(x: np.ndarray, axes: Any) -> np.ndarray:
    e = np.exp(x - x.max(axes, keepdims=True))
    return e / e.sum(axes, keepdims=True)


@pytest.mark.parametrize("axis", [-1, (2, 3), (1, 2, 3)])
def test_softmax(axis: Any) -> None:
    x = CUBE * 4
    x[0, 0, 0, 0] = 300.0
    x[1, 1, 1, 1] = -np.inf

    def kernel(x: Any) -> Any:
        return out(nl.softmax(sb(x), axis))

    np.testing.assert_allclose(run(kernel, x), soft(x.astype(np.float64), axis), rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_of_rows_takes_one_activation(target: str) -> None:
    half = (X * 3).astype(BF16)

    def kernel(x: Any) -> Any:
        return out(nl.softmax(ps(x))), out(nl.softmax(sb(x), axis=1, dtype=nl.float32))

    same, wide = run(kernel, half, target=target)
    expected = soft(half.astype(np.float64), 1)
    np.testing.assert_allclose(wide, expected, rtol=1e-5)
    np.testing.assert_array_equal(same, wide.astype(BF16))
    trace = traced(kernel, half, target=target)
    assert trace.count("activation") == 2
    assert trace.count("tensor_reduce") == 2


@pytest.mark.parametrize("axis", [1, -1])
def test_rms_norm(axis: int) -> None:
    w = normal(6, 40, seed=13)

    def kernel(x: Any, w: Any) -> Any:
        t, u = sb(x), sb(w)
        return (
            out(nl.rms_norm(t, u, axis, 40)),
            out(nl.rms_norm(t, u, axis, n=10, epsilon=0.5, dtype=nl.bfloat16)),
        )

    plain, other = run(kernel, X, w)
    x = X.astype(np.float64)
    total = (x * x).sum(1, keepdims=True)
    np.testing.assert_allclose(plain, x / np.sqrt(total / 40 + 1e-6) * w, rtol=1e-5, atol=1e-6)
    assert other.dtype == BF16
    np.testing.assert_allclose(other.astype(np.float64), x / np.sqrt(total / 10 + 0.5) * w, rtol=5e-3, atol=1e-6)


def test_rms_norm_over_part_of_the_dimensions_and_in_a_compute_type() -> None:
    w = np.ones_like(CUBE)

    def kernel(x: Any, w: Any) -> Any:
        t, u = sb(x), sb(w)
        return out(nl.rms_norm(t, u, (2, 3), 32)), out(nl.rms_norm(t, u, (2, 3), 32, compute_dtype=nl.bfloat16))

    wide, half = run(kernel, CUBE, w)
    x = CUBE.astype(np.float64)
    rms = np.sqrt((x * x).mean((2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(wide, x / rms, rtol=1e-5)
    np.testing.assert_array_equal(half, half.astype(BF16).astype(np.float32))
    np.testing.assert_allclose(half, x / rms, rtol=1e-2)


def test_rms_norm_refusals() -> None:
    def weights(x: Any) -> Any:
        t = sb(x)
        return nl.rms_norm(t, t[:, 0:1], 1, 40)

    def count(x: Any) -> Any:
        t = sb(x)
        return nl.rms_norm(t, t, 1, 0)

    def epsilon(x: Any) -> Any:
        t = sb(x)
        return nl.rms_norm(t, t, 1, 40, epsilon=t)

    refused(weights, X, instruction="rms_norm", operand="w", rule="shape", received="[6, 1]", allowed="[6, 40]")
    refused(count, X, instruction="rms_norm", operand="n", rule="value", received="0", allowed="positive")
    refused(epsilon, X, instruction="rms_norm", operand="epsilon", rule="type", received="NkiTensor", allowed="number")
