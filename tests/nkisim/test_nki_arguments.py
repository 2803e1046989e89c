"""Arguments and results of kernel calls."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import nki
from nkisim import typing as nt
from tests.nkisim.harness import normal, out, refused, sb

BF16 = ml_dtypes.bfloat16
TARGET = "NEURON_PLATFORM_TARGET_OVERRIDE"
X = normal(4, 6, seed=31)


@nki.jit
def double(x: Any) -> Any:
    """2 x."""
    return out(nl.add(sb(x), sb(x)))


def negate_in_place(x: Any) -> None:
    """x = -x."""
    nl.store(x, nl.negative(nl.load(x)))


# ---------------------------------------------------------------------------------------------------
# Arguments


def test_arrays_that_the_kernel_writes_are_updated_in_place() -> None:
    plain = X.copy()
    strided = np.zeros((8, 6), np.float32)
    strided[::2] = X
    transposed = np.asfortranarray(X)
    for array in (plain, strided[::2], transposed):
        nki.simulate(negate_in_place)(array)
    np.testing.assert_array_equal(plain, -X)
    np.testing.assert_array_equal(strided[::2], -X)
    np.testing.assert_array_equal(strided[1::2], 0)
    np.testing.assert_array_equal(transposed, -X)


def test_arrays_that_the_kernel_only_reads_may_be_read_only() -> None:
    x = X.copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(double(x), 2 * X)
    np.testing.assert_array_equal(double(np.broadcast_to(x[:1], (4, 6))), np.broadcast_to(2 * X[:1], (4, 6)))
    for read_only in (x, x.T, np.broadcast_to(X[:1], (4, 6))):
        refused(
            negate_in_place,
            read_only,
            instruction="dma_copy",
            operand="dst",
            rule="read-only",
            received="an argument",
            allowed="writable",
        )


def test_a_result_does_not_change_with_its_argument() -> None:
    def kernel(x: Any) -> Any:
        nl.store(x, nl.negative(nl.load(x)))
        return x

    x = X.copy()
    returned = nki.simulate(kernel)(x)
    x[...] = 0
    np.testing.assert_array_equal(returned, -X)


def test_scalar_array_becomes_one_element() -> None:
    def kernel(x: Any) -> Any:
        assert x.shape == (1,)
        t = nl.ndarray((1, 1), nl.float32)
        nisa.dma_copy(dst=t, src=x)
        nisa.dma_copy(dst=x, src=nl.add(t, 1.0))

    x = np.array(2.0, np.float32)
    nki.simulate(kernel)(x)
    assert x == 3


Pair = namedtuple("Pair", "left right")


@dataclass
class Config(nl.NKIObject):
    scale: float
    weights: Any


def test_arrays_inside_tuples_dicts_and_objects() -> None:
    seen: list[Any] = []

    def kernel(pair: Any, table: Any, config: Any, none: Any, flag: bool, dtype: Any, text: str, *rest: Any) -> Any:
        seen.extend([type(pair).__name__, type(config).__name__, none, flag, dtype, text, config.scale])
        total = nl.add(sb(pair.left), sb(pair.right[0]))
        total = nl.add(total, sb(table["a"]["b"]))
        total = nl.add(total, nl.multiply(sb(config.weights), config.scale))
        return out(nl.add(total, sb(rest[1])))

    config = Config(2.0, X)
    got = nki.simulate(kernel)(Pair(X, (X,)), {"a": {"b": X}}, config, None, True, nl.bfloat16, "s", 7, X)
    np.testing.assert_allclose(got, 6 * X, rtol=1e-6)
    assert seen == ["Pair", "Config", None, True, nl.bfloat16, "s", 2.0]
    assert config.weights is X


def test_names_of_arguments_are_in_messages() -> None:
    def kernel(query: Any, *rest: Any, scale: Any = None) -> Any:
        return None

    simulated = nki.simulate(kernel)
    with pytest.raises(TypeError, match=r"query: received dtype\('int64'\), allowed .*int32"):
        simulated(np.arange(3))
    with pytest.raises(TypeError, match=r"rest\[1\]: received a list, allowed a tuple"):
        simulated(X, 1, [X])
    with pytest.raises(TypeError, match=r"scale\['a'\]: received dtype\('float64'\)"):
        simulated(X, scale={"a": np.zeros(3)})
    with pytest.raises(TypeError, match="scale: received a dict with the key 1, allowed string keys"):
        simulated(X, scale={1: X})
    with pytest.raises(ValueError, match=r"query: received shape \(0, 3\), allowed at least one element"):
        simulated(np.zeros((0, 3), np.float32))
    with pytest.raises(TypeError, match="kernel: missing a required argument: 'query'"):
        simulated()


def test_objects_that_are_no_arrays_of_numpy() -> None:
    class Other:
        def __array__(self) -> Any:
            return X

    leaked = []
    nki.simulate(lambda x: leaked.append(x))(X)
    with pytest.raises(TypeError, match="x: received Other, allowed a NumPy array or a torch tensor"):
        double(Other())
    with pytest.raises(TypeError, match="x: received an NkiTensor"):
        double(leaked[0])


def test_numpy_scalars_and_types_are_compile_time_values() -> None:
    def kernel(x: Any, scale: Any, dtype: Any) -> Any:
        return out(nl.multiply(sb(x), scale, dtype=dtype))

    got = nki.simulate(kernel)(X, np.float32(3), np.float16)
    np.testing.assert_array_equal(got, (X * 3).astype(np.float16))


@pytest.mark.parametrize(("target", "seen_as"), [("trn2", "float8_e4m3"), ("trn3", "float8_e4m3fn")])
def test_float8_e4m3fn_arguments_before_trn3(target: str, seen_as: str) -> None:
    x = np.array([[0.5, -240.0, 1.0]], ml_dtypes.float8_e4m3fn)
    seen = []

    def kernel(x: Any) -> Any:
        seen.append(x.dtype)
        nl.store(x, nl.negative(nl.load(x)))

    nki.simulate(kernel, target=target)(x)
    assert seen == [seen_as]
    np.testing.assert_array_equal(x.astype(np.float32), [[-0.5, 240.0, -1.0]])


def test_bool_arguments_come_back_as_bool() -> None:
    x = np.array([[True, False, True]])

    def kernel(x: Any) -> Any:
        return out(nl.load(x))

    got = nki.simulate(kernel)(x)
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(got, x)


# ---------------------------------------------------------------------------------------------------
# nki.typing


def typed(x: nt.tensor[4, 6], y: "nt.tensor[(6,)]" = None, z: "nt.tensor[Unknown]" = None) -> Any:  # noqa: F821, UP037
    return out(sb(x))


def test_declared_shapes_are_checked() -> None:
    call = nki.simulate(typed)
    np.testing.assert_array_equal(call(X), X)
    np.testing.assert_array_equal(call(X, X[0], X), X)
    with pytest.raises(
        nkisim.NkiError, match=r"argument\.x: .*annotation: received \[6, 4\], allowed \[4, 6\]"
    ) as caught:
        call(X.T)
    assert caught.value.site.function == "test_declared_shapes_are_checked"
    with pytest.raises(nkisim.NkiError, match=r"argument\.y: .*annotation: received \[4, 6\], allowed \[6\]"):
        call(X, X)
    with pytest.raises(TypeError, match="x: received float, allowed a tensor"):
        call(1.0)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, -1), ("n",), (True,), 2.5])
def test_declared_shapes_are_positive_sizes(shape: Any) -> None:
    with pytest.raises(TypeError, match=r"nki\.typing\.tensor: received"):
        nt.tensor[shape]


def test_typing_names() -> None:
    assert nt.tensor[5] == nt.TensorType((5,))
    assert repr(nt.tensor) == "nki.typing.tensor"


# ---------------------------------------------------------------------------------------------------
# Results


def test_results_keep_their_structure() -> None:
    def kernel(x: Any) -> Any:
        o = out(sb(x))
        return {"a": o, "b": (o, None, [o])}, Pair(o, o[1:3])

    first, pair = nki.simulate(kernel)(X)
    assert list(first) == ["a", "b"]
    assert first["b"][1] is None
    assert isinstance(first["b"][2], list)
    assert isinstance(pair, Pair)
    np.testing.assert_array_equal(pair.right, X[1:3])


def test_no_result() -> None:
    assert nki.simulate(lambda x: None)(X) is None


def test_results_that_are_refused() -> None:
    def on_chip(x: Any) -> Any:
        return sb(x)

    def private(x: Any) -> Any:
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.hbm, name="o")
        nisa.dma_copy(dst=o, src=x)
        return o

    def part(x: Any) -> Any:
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm, name="o")
        nisa.dma_copy(dst=o[0:3], src=x[0:3])
        return o

    def number(x: Any) -> Any:
        return x, 3

    def moving(x: Any) -> Any:
        o = out(sb(x))
        return o.select(0, nisa.register_alloc(1))

    def refused_return(kernel: Any, **facts: str) -> None:
        error = refused(kernel, X, instruction="return", **facts)
        assert error.site.function in (kernel.__name__, "sb", "out", "refused_return", "run")

    with pytest.raises(nkisim.NkiError, match=r"return\.t\d+: buffer of a returned tensor: received sbuf"):
        nki.simulate(on_chip)(X)
    refused_return(private, operand="o", rule="buffer", received="private_hbm", allowed="shared_hbm")
    refused_return(
        part,
        operand="o",
        rule="not fully written",
        received="6 of 24 elements never written, first at (3, 0)",
        allowed="every element",
    )
    with pytest.raises(nkisim.NkiError, match="return: type: received int, allowed tensors, or None"):
        nki.simulate(number)(X)
    with pytest.raises(nkisim.NkiError, match="a view with a run-time index"):
        nki.simulate(moving)(X)


def test_a_returned_view_needs_only_its_own_elements() -> None:
    def kernel(x: Any) -> Any:
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=o[0:3], src=x[0:3])
        return o[0:3]

    np.testing.assert_array_equal(nki.simulate(kernel)(X), X[:3])


def test_packed_types_come_back_as_bits() -> None:
    def kernel() -> Any:
        return out(nl.zeros((2, 3), nl.float8_e5m2_x4))

    got = nki.simulate(kernel, target="trn3")()
    np.testing.assert_array_equal(got, np.zeros((2, 3), np.uint32))


def test_an_argument_may_be_returned_and_a_private_tensor_not() -> None:
    x = np.arange(4, dtype=np.float32)

    def same(a: Any) -> Any:
        return a

    np.testing.assert_array_equal(nkisim.simulate(same)(x), x)

    def private(a: Any) -> Any:
        t = nl.ndarray((4,), nl.float32, buffer=nl.private_hbm)
        nisa.dma_copy(t, a)
        return t

    with pytest.raises(nkisim.NkiError, match="received private_hbm, allowed shared_hbm, or an argument"):
        nkisim.simulate(private)(x)
