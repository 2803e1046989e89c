"""nl: loads and stores, transposes, products, gathers, selection, printing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, traced

BF16 = ml_dtypes.bfloat16
X = normal(6, 10, seed=21)

# ---------------------------------------------------------------------------------------------------
# Loads, stores, shapes


def test_load_and_store() -> None:
    def kernel(x: Any) -> Any:
        t = nl.load(x[1:5, 2:9], dtype=nl.bfloat16)
        assert (t.buffer, t.shape, t.dtype) == (nl.sbuf, (4, 7), nl.bfloat16)
        o = nl.zeros(x.shape, nl.float32, buffer=nl.shared_hbm)
        assert nl.store(o[1:5, 2:9], value=t) is None
        return o

    expected = np.zeros_like(X)
    expected[1:5, 2:9] = X[1:5, 2:9].astype(BF16)
    np.testing.assert_array_equal(run(kernel, X), expected)


def test_load_and_store_refusals() -> None:
    def load(x: Any) -> Any:
        return nl.load(sb(x))

    def load_row(x: Any) -> Any:
        return nl.load(x[0])

    def store_psum(x: Any) -> Any:
        nl.store(x, ps(x))

    def store_on_chip(x: Any) -> Any:
        nl.store(sb(x), sb(x))

    def store_hbm(x: Any) -> Any:
        nl.store(x, x)

    refused(load, X, instruction="load", operand="src", rule="buffer", received="sbuf", allowed="private_hbm")
    refused(load_row, X, instruction="ndarray", rule="dimensions of an on-chip", received="1", allowed="at least 2")
    refused(store_psum, X, instruction="store", operand="value", rule="buffer", received="psum", allowed="nl.copy")
    refused(store_on_chip, X, instruction="store", operand="dst", rule="buffer", received="sbuf", allowed="shared_hbm")
    refused(store_hbm, X, instruction="store", operand="value", rule="buffer", received="private_hbm", allowed="sbuf")


def test_load_transpose2d() -> None:
    half = normal(16, 24, seed=22, dtype=BF16)

    def kernel(x: Any) -> Any:
        t = nl.load_transpose2d(x)
        return out(t), out(nl.load_transpose2d(x, dtype=nl.float32))

    same, wide = run(kernel, half)
    np.testing.assert_array_equal(same, half.T)
    np.testing.assert_array_equal(wide, half.T.astype(np.float32))
    assert traced(kernel, half).count("dma_transpose") == 2

    def cube(x: Any) -> Any:
        return nl.load_transpose2d(x.reshape((4, 4, 24)))

    refused(cube, half, instruction="load_transpose2d", operand="src", rule="dimensions", received="3", allowed="2")


def test_transpose() -> None:
    def kernel(x: Any) -> Any:
        t = nl.transpose(sb(x))
        u = nl.transpose(sb(x), dtype=nl.bfloat16)
        assert (t.buffer, u.buffer) == (nl.psum, nl.psum)
        return out(t), out(u)

    same, half = run(kernel, X)
    np.testing.assert_array_equal(same, X.T)
    np.testing.assert_array_equal(half, X.T.astype(BF16))
    assert traced(kernel, X).count("nc_transpose", engine=Engine.tensor) == 2

    def cube(x: Any) -> Any:
        return nl.transpose(sb(x).reshape((6, 2, 5)))

    def from_psum(x: Any) -> Any:
        return nl.transpose(ps(x))

    refused(cube, X, instruction="transpose", operand="x", rule="dimensions", received="3", allowed="2")
    refused(from_psum, X, instruction="nc_transpose", operand="data", rule="buffer", received="psum", allowed="sbuf")


def test_matmul() -> None:
    x, y = normal(20, 6, seed=23), normal(20, 33, seed=24)

    def kernel(x: Any, y: Any) -> Any:
        t = nl.matmul(sb(x), sb(y), transpose_x=True)
        assert (t.buffer, t.dtype, t.shape) == (nl.psum, nl.float32, (6, 33))
        return out(t)

    np.testing.assert_allclose(run(kernel, x, y), x.T.astype(np.float64) @ y, rtol=1e-5, atol=1e-5)
    assert traced(kernel, x, y).count("nc_matmul") == 1

    def plain(x: Any, y: Any) -> Any:
        return nl.matmul(sb(x), sb(y))

    def cube(x: Any, y: Any) -> Any:
        return nl.matmul(sb(x), sb(y).reshape((20, 3, 11)), transpose_x=True)

    def depth(x: Any, y: Any) -> Any:
        return nl.matmul(sb(x), sb(y)[0:10], transpose_x=True)

    refused(plain, x, y, instruction="matmul", operand="transpose_x", rule="value", received="False", allowed="True")
    refused(cube, x, y, instruction="matmul", operand="y", rule="dimensions", received="3", allowed="2")
    with pytest.raises(nkisim.NkiError, match="nc_matmul"):
        run(depth, x, y)


def test_gather_flattened() -> None:
    data = normal(4, 3, 8, seed=25)
    at = integers(4, 10, low=0, high=24, seed=26, dtype=np.uint32)

    def kernel(x: Any, i: Any) -> Any:
        t, j = sb(x), sb(i)
        return out(nl.gather_flattened(t, j)), out(nl.gather_flattened(data=t, indices=j, dtype=nl.bfloat16))

    same, half = run(kernel, data, at)
    expected = np.take_along_axis(data.reshape(4, 24), at.astype(np.int64), 1)
    np.testing.assert_array_equal(same, expected)
    np.testing.assert_array_equal(half, expected.astype(BF16))

    def other_axis(x: Any, i: Any) -> Any:
        return nl.gather_flattened(sb(x), sb(i), axis=1)

    with pytest.raises(NotImplementedError, match=r"gather_flattened\.axis"):
        run(other_axis, data, at)


def test_expand_dims_is_a_view() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        shapes = [nl.expand_dims(t, axis).shape for axis in (1, 2, -1, -2)]
        assert shapes == [(6, 1, 10), (6, 10, 1), (6, 10, 1), (6, 1, 10)]
        nisa.memset(dst=nl.expand_dims(t, 1)[:, :, 0:2], value=0.0)
        return out(t)

    expected = X.copy()
    expected[:, :2] = 0
    np.testing.assert_array_equal(run(kernel, X), expected)

    def partition(x: Any) -> Any:
        return nl.expand_dims(sb(x), 0)

    def beyond(x: Any) -> Any:
        return nl.expand_dims(sb(x), 3)

    with pytest.raises(nkisim.NkiError, match="partition dimension"):
        run(partition, X)
    refused(beyond, X, instruction="expand_dims", operand="axis", rule="value", received="3", allowed="-3..2")


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 1, 7), (70, 5, 7), (128, 1, 7), (3, 5, 7)])
def test_broadcast_to(shape: tuple[int, ...]) -> None:
    row = normal(1, 1, 7, seed=27)
    whole = integers(1, 1, 7, low=2**24 + 1, high=2**31 - 1)

    def kernel(x: Any, i: Any) -> Any:
        return (
            out(nl.broadcast_to(ps(x), shape)),
            out(nl.broadcast_to(sb(i), shape)),
            out(nl.broadcast_to(sb(x), list(shape), dtype=nl.bfloat16)),
        )

    same, ints, half = run(kernel, row, whole)
    np.testing.assert_array_equal(same, np.broadcast_to(row, shape))
    np.testing.assert_array_equal(ints, np.broadcast_to(whole, shape))
    np.testing.assert_array_equal(half, np.broadcast_to(row, shape).astype(BF16))


def test_broadcast_to_what_it_is() -> None:
    def kernel(x: Any) -> Any:
        t = sb(x)
        assert nl.broadcast_to(t, (6, 10)) is t
        return out(nl.broadcast_to(t, (6, 10), dtype=nl.bfloat16))

    np.testing.assert_array_equal(run(kernel, X), X.astype(BF16))

    def rank(x: Any) -> Any:
        return nl.broadcast_to(sb(x), (6, 1, 10))

    def size(x: Any) -> Any:
        return nl.broadcast_to(sb(x), (6, 20))

    refused(rank, X, instruction="broadcast_to", operand="shape", rule="dimensions", received="3", allowed="2")
    refused(size, X, instruction="broadcast_to", operand="shape", rule="size", received="[6, 20]", allowed="[6, 10]")


def test_where() -> None:
    y = normal(6, 10, seed=28)
    y[0] = -np.inf

    def kernel(x: Any, y: Any) -> Any:
        t, u = sb(x), sb(y)
        chosen = nl.greater(t, 0.0)
        return out(nl.where(chosen, t, ps(y))), out(nl.where(chosen, t, u, dtype=nl.bfloat16)), out(u)

    same, half, untouched = run(kernel, X, y)
    np.testing.assert_array_equal(same, np.where(X > 0, X, y))
    np.testing.assert_array_equal(half, np.where(X > 0, X, y).astype(BF16))
    np.testing.assert_array_equal(untouched, y)


def test_where_refusals() -> None:
    def integer_condition(x: Any) -> Any:
        t = sb(x)
        return nl.where(nl.greater(t, 0.0, dtype=nl.uint8), t, t)

    def number(x: Any) -> Any:
        t = sb(x)
        return nl.where(t, t, 0.0)

    def shape(x: Any) -> Any:
        t = sb(x)
        return nl.where(t, t[:, 0:1], t)

    def types(x: Any) -> Any:
        t = sb(x)
        return nl.where(t, t, nl.copy(t, dtype=nl.float16))

    refused(
        integer_condition, X, instruction="where", operand="condition", rule="dtype", received="uint8", allowed="float"
    )
    refused(number, X, instruction="where", operand="y", rule="type", received="float", allowed="a tile")
    refused(shape, X, instruction="where", operand="x", rule="shape", received="[6, 1]", allowed="[6, 10]")
    refused(types, X, instruction="where", operand="dtype", rule="result", received="float16", allowed="dtype=")


def test_dropout() -> None:
    x = np.ones((64, 100), np.float32)
    rates = np.linspace(0, 1, 64, dtype=np.float32)[:, None]

    def kernel(x: Any, r: Any) -> Any:
        t = sb(x)
        return (
            out(nl.dropout(t, 0.25)),
            out(nl.dropout(t, rate=sb(r))),
            out(nl.dropout(t, 0.0, dtype=nl.bfloat16)),
            out(nl.dropout(t, 1.0)),
        )

    some, graded, none, every = run(kernel, x, rates)
    assert set(np.unique(some)) == {0, 1}
    assert abs((some == 0).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(graded[0], x[0])
    np.testing.assert_array_equal(graded[-1], 0 * x[0])
    assert abs((graded == 0).mean() - 0.5) < 0.03
    np.testing.assert_array_equal(none, x.astype(BF16))
    np.testing.assert_array_equal(every, 0 * x)


# ---------------------------------------------------------------------------------------------------
# Printing


def test_device_print(capsys: pytest.CaptureFixture[str]) -> None:
    def kernel(x: Any) -> Any:
        nl.device_print("tile:", sb(x)[0:1, 0:3])
        nl.device_print("row:", x[1, 0:2])
        return out(sb(x))

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    run(kernel, x)
    assert capsys.readouterr().out == "tile:\n[[0. 1. 2.]]\nrow:\n[3. 4.]\n"
    assert traced(kernel, x).count("device_print") == 0


def test_device_print_refusals() -> None:
    def psum(x: Any) -> Any:
        nl.device_print("x", ps(x))

    def undefined() -> Any:
        nl.device_print("x", nl.ndarray((2, 2), nl.float32))

    def prefix(x: Any) -> Any:
        nl.device_print(3, x)

    def value() -> Any:
        nl.device_print("x", 3)

    error = refused(
        undefined, instruction="device_print", operand="tensor", rule="uninitialized", received="4", allowed="written"
    )
    assert "language" in error.source
    refused(psum, X, instruction="device_print", operand="tensor", rule="buffer", received="psum", allowed="sbuf")
    refused(prefix, X, instruction="device_print", operand="print_prefix", rule="type", received="int", allowed="str")
    refused(value, instruction="device_print", operand="tensor", rule="type", received="int", allowed="a tensor")
