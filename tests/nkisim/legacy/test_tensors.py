"""Tiles: assignment, operators, results computed in place, PSUM accumulation, other views."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import NkiError
from tests.nkisim.legacy.isa_kernels import BF16, instructions, nisa, nki, nl, normal, refused, run, traced

X, Y = normal(32, 12), normal(32, 12, seed=1)

OPERATORS: dict[str, Any] = {
    "x + y": lambda x, y: x + y,
    "x - 2": lambda x, y: x - 2.0,
    "2 - x": lambda x, y: 2.0 - x,
    "x * y": lambda x, y: x * y,
    "x / 4": lambda x, y: x / 4.0,
    "1 / y": lambda x, y: 1.0 / y,
    "x / y": lambda x, y: x / y,
    "-x": lambda x, y: -x,
    "abs(x)": lambda x, y: abs(x),
    "column": lambda x, y: x - y[:, 3:4],
    "row": lambda x, y: x * y[0:1, :],
    "corner": lambda x, y: x + y[0:1, 0:1],
    "numpy scalar first": lambda x, y: np.float32(3) * x,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_numpys(name: str) -> None:
    got = run(OPERATORS[name], X, Y)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, OPERATORS[name](X, Y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "compare",
    [
        lambda x, y: x < y,
        lambda x, y: x <= 0.0,
        lambda x, y: x > y,
        lambda x, y: x >= y,
        lambda x, y: x == x,
        lambda x, y: x != y,
        lambda x, y: (x > 0.0) & (y > 0.0),
        lambda x, y: (x > 0.0) | (y > 0.0),
        lambda x, y: (x > 0.0) ^ (y > 0.0),
        lambda x, y: ~(x > 0.0),
    ],
)
def test_comparisons_are_bools(compare: Any) -> None:
    got = run(compare, X, Y)
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(got, compare(X, Y))


def test_bits_of_integers() -> None:
    n = np.arange(64, dtype=np.int32).reshape(8, 8)
    for f in (lambda x: x & 12, lambda x: x | 3, lambda x: x ^ x, lambda x: x << 2, lambda x: x >> 1, lambda x: ~x):
        np.testing.assert_array_equal(run(f, n), f(n))


def test_powers() -> None:
    x = np.abs(X) + 0.5
    np.testing.assert_allclose(run(lambda t: t**3, x), x**3, rtol=1e-5)
    np.testing.assert_allclose(run(lambda t: 2.0**t, x), 2.0**x, rtol=1e-5)


# -- assignment


def test_a_result_that_is_assigned_at_once_is_computed_in_place() -> None:
    def direct(t: Any) -> Any:
        out = nl.ndarray((32, 24), dtype=nl.float32)
        out[:, 0:12] = nl.exp(t)
        out[:, 12:24] = nisa.tensor_scalar(t, np.multiply, 2.0)
        return out

    def named(t: Any) -> Any:
        out = nl.ndarray((32, 24), dtype=nl.float32)
        e = nl.exp(t)
        out[:, 0:12] = e
        e[...] = 0.0  # a tile of its own
        out[:, 12:24] = t * 2.0
        return out

    expected = np.concatenate([np.exp(X), 2 * X], axis=1)
    for body in (direct, named):
        np.testing.assert_allclose(run(body, X), expected, rtol=1e-6)
    assert instructions(traced(direct, X)) == ["activation", "tensor_scalar"]
    assert instructions(traced(named, X)) == ["activation", "tensor_copy", "memset", "tensor_scalar"]


def test_loads_go_straight_to_any_partitions_and_to_another_type() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        tile = nl.ndarray((24, 12), dtype=nl.bfloat16)
        tile[5:17] = nl.load(x[0:12])
        tile[0:5] = nl.load(x[12:17])
        tile[17:24] = nl.load(x[17:24])
        out = nl.ndarray((24, 12), dtype=nl.bfloat16, buffer=nl.shared_hbm)
        nl.store(out, tile)
        return out

    x = X[:24].astype(BF16)
    np.testing.assert_array_equal(kernel(x), np.concatenate([x[12:17], x[0:12], x[17:]]))


def test_partitions_that_no_engine_reaches_are_copied_by_dma() -> None:
    def body(t: Any) -> Any:
        out = nl.zeros((32, 12), dtype=nl.float32)
        out[3:7] = t[9:13]
        out[7:8] = nl.exp(t[0:1])
        out[9, 2] = 5
        return out

    expected = np.zeros((32, 12), np.float32)
    expected[3:7], expected[7], expected[9, 2] = X[9:13], np.exp(X[0]), 5
    np.testing.assert_allclose(run(body, X), expected, rtol=1e-6)


def test_the_element_type_of_a_result() -> None:
    def rounded(t: Any) -> Any:
        out = nl.ndarray((32, 12), dtype=nl.float32)
        out[...] = nl.multiply(t, 1.0, dtype=nl.bfloat16)  # a bfloat16 result, as it says
        return out

    def straight(t: Any) -> Any:
        out = nl.ndarray((32, 12), dtype=nl.bfloat16)
        out[...] = t * 1.0
        return out

    np.testing.assert_array_equal(run(rounded, X), X.astype(BF16).astype(np.float32))
    np.testing.assert_array_equal(run(straight, X), X.astype(BF16))
    assert instructions(traced(straight, X)) == ["tensor_scalar"]


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((32, 12), (32, 1)),
        ((32, 3, 4), (32, 3, 1)),
        ((32, 1, 12), (32, 12)),
        ((32, 12), (32, 1, 12)),
        ((32, 12), (1, 12)),
    ],
)
def test_assignment_broadcasts(shape: tuple[int, ...], value: tuple[int, ...]) -> None:
    x = normal(*value)

    def body(t: Any) -> Any:
        out = nl.ndarray(shape, dtype=nl.float32)
        out[...] = t
        return out

    expected = x.reshape(shape) if x.size == np.prod(shape) else np.broadcast_to(x, shape)
    np.testing.assert_array_equal(run(body, x), expected)


def test_in_place_operators() -> None:
    def body(x: Any, y: Any) -> Any:
        total = nl.copy(x)
        total += y
        total[:, 0:6] -= 1.0
        total[:, 6:12] *= y[:, 6:12]
        total /= 2.0
        alias = total
        alias += 1.0
        return total

    expected = X + Y
    expected[:, :6] -= 1
    expected[:, 6:] *= Y[:, 6:]
    np.testing.assert_allclose(run(body, X, Y), expected / 2 + 1, rtol=1e-6, atol=1e-6)
    assert instructions(traced(body, X, Y)).count("tensor_copy") == 1


def test_operands_are_not_stale() -> None:
    def body(t: Any) -> Any:
        first = nl.exp(t)
        t[...] = 0.0
        return first + t

    np.testing.assert_allclose(run(body, X), np.exp(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("err_store_dst_shape_smaller_than_other_shape", lambda t: _zeros(32, 1).__setitem__(..., t)),
        ("err_store_dst_shape_smaller_than_other_shape", lambda t: _zeros(32, 2, 12).__setitem__(..., t)),
        ("err_unsupported_memory: memory: received private_hbm", lambda t: t.__setitem__(..., _hbm())),
        ("err_copy_dynamic_indirect_indices_not_natively_supported", lambda t: nl.copy(t).__setitem__((0, 0), _at(t))),
        ("value: type: received str", lambda t: t.__setitem__(..., "one")),
        ("value of a int32 tile: received 0.5", lambda t: nl.zeros((4, 4), dtype=nl.int32).__setitem__(..., 0.5)),
        ("err_failed_to_infer_tile_from_local_tensor", lambda t: nl.add(_zeros(4, nl.par_dim(8), 8), 32)),
        ("err_unsupported_memory: memory: received sbuf, allowed private_hbm or shared_hbm", nl.load),
        ("err_unsupported_memory: memory: received private_hbm, allowed sbuf or psum", lambda t: nl.exp(_hbm())),
        ("err_ambiguous_tensor_truth_value", lambda t: nl.copy(t) if t else None),
        ("err_dynamic_control_flow_not_supported", lambda t: nl.copy(t) if t[0:1, 0:1] else None),
        ("err_dynamic_control_flow_not_supported: a loop bound", lambda t: list(nl.affine_range(t[0:1, 0:1]))),
        ("err_num_partition_exceed_arch_limit: partitions: received 256", lambda t: _zeros(256, 4)),
        ("err_hbm_tensor_with_init_value_not_supported", lambda t: nl.full((4, 4), 1.0, nl.float32, buffer=nl.hbm)),
        ("err_num_partition_mismatch", lambda t: nisa.tensor_tensor(t, t[0:1], op=nl.add)),
        ("uninitialized read", lambda t: nl.exp(nl.ndarray((4, 4), dtype=nl.float32))),
        ("par_dim: received dimensions", lambda t: nl.ndarray((nl.par_dim(2), nl.par_dim(4), 1), dtype=nl.float32)),
        ("buffer: received 'rom'", lambda t: nl.ndarray((4, 4), dtype=nl.float32, buffer="rom")),
        ("shape: received", lambda t: nl.ndarray((4, 2.5), dtype=nl.float32)),
    ],
)  # fmt: skip
def test_refused(match: str, body: Any) -> None:
    refused(match, body, X)


def _at(t: Any) -> Any:
    """An element at an index that the device knows."""
    return t[nl.arange(1)[:, None], nisa.memset((1, 1), 3, nl.int32)]


def _zeros(*shape: int) -> Any:
    return nl.zeros(shape, dtype=nl.float32)


def _hbm() -> Any:
    return nl.ndarray((32, 12), dtype=nl.float32, buffer=nl.hbm)


def test_errors_name_the_line_that_issued_the_instruction() -> None:
    def body(t: Any) -> Any:
        wrong = nl.exp(t[5:6])  # THE LINE
        other = nl.square(t)
        return wrong + other

    with pytest.raises(NkiError) as error:
        run(body, X)
    with open(__file__, encoding="utf-8") as source:
        assert "# THE LINE" in source.read().splitlines()[error.value.site.line - 1]


# -- PSUM


def product(a: Any, b: Any) -> Any:
    return a.astype(np.float64).T @ b.astype(np.float64)


def test_psum_sums_cost_nothing_but_the_matmuls() -> None:
    def body(a: Any, b: Any) -> Any:
        total = nl.zeros((2, nl.par_dim(12), 12), dtype=nl.float32, buffer=nl.psum)
        for i in nl.affine_range(2):
            for _ in nl.affine_range(3):
                total[i] += nl.matmul(a, b, transpose_x=True)
        return total[0] + total[1]

    np.testing.assert_allclose(run(body, X, Y), 6 * product(X, Y), rtol=1e-5, atol=1e-5)
    assert instructions(traced(body, X, Y)) == ["nc_matmul"] * 6 + ["tensor_copy", "tensor_tensor"]


def test_promised_zeros_are_there_when_they_are_read() -> None:
    def body(a: Any, b: Any) -> Any:
        total = nl.zeros((12, 24), dtype=nl.float32, buffer=nl.psum)
        total[:, 0:12] += nl.matmul(a, b, transpose_x=True)
        return nl.copy(total)

    expected = np.concatenate([product(X, Y), np.zeros((12, 12))], axis=1)
    np.testing.assert_allclose(run(body, X, Y), expected, rtol=1e-5, atol=1e-5)
    untouched = run(lambda t: nl.zeros((8, 4), dtype=nl.float32, buffer=nl.psum) + 1.0, X)
    np.testing.assert_array_equal(untouched, np.ones((8, 4)))


def test_a_product_is_added_to_what_no_matmul_wrote_by_the_vector_engine() -> None:
    def body(a: Any, b: Any) -> Any:
        total = nl.ndarray((12, 12), dtype=nl.float32, buffer=nl.psum)
        total[...] = 2.0
        total += nl.matmul(a, b, transpose_x=True)
        return nl.copy(total)

    np.testing.assert_allclose(run(body, X, Y), 2 + product(X, Y), rtol=1e-5, atol=1e-5)


def test_a_named_product_stays() -> None:
    def body(a: Any, b: Any) -> Any:
        total = nl.zeros((12, 12), dtype=nl.float32, buffer=nl.psum)
        p = nl.matmul(a, b, transpose_x=True)
        total += p
        total += nl.matmul(a, b, transpose_x=True)
        return total + p

    np.testing.assert_allclose(run(body, X, Y), 3 * product(X, Y), rtol=1e-5, atol=1e-5)


def test_products_go_to_sbuf_through_psum() -> None:
    def body(a: Any, b: Any) -> Any:
        out = nl.ndarray((12, 12), dtype=nl.bfloat16)
        out[...] = nl.matmul(a, b, transpose_x=True)
        return out

    np.testing.assert_array_equal(run(body, X, Y).astype(np.float32).shape, (12, 12))
    assert instructions(traced(body, X, Y)) == ["nc_matmul", "tensor_copy"]


# -- other views


def test_reshape_view_astype_broadcast_expand() -> None:
    def body(t: Any) -> Any:
        wide = t.reshape((32, 3, 4))[:, 1, :]
        bits = wide.view(nl.int32)
        column = t[:, 2:3].broadcast_to((32, 4))
        row = t[0:1, 0:4].broadcast_to((32, 4))
        total = bits.view(np.float32) + column + row
        assert total.expand_dims(1).shape == (32, 1, 4)
        assert total.assert_shape((32, 4)) is total
        assert (total.ndim, total.itemsize, total.dtype) == (2, 4, np.float32)
        return total.astype(nl.bfloat16).expand_dims(2)

    expected = X[:, 4:8] + X[:, 2:3] + X[0:1, 0:4]
    np.testing.assert_array_equal(run(body, X), expected.astype(ml_dtypes.bfloat16)[:, :, None])
    refused("err_annotation_shape_mismatch", lambda t: t.assert_shape((3, 4)), X)


def test_blocks_reshape() -> None:
    def body(t: Any) -> Any:
        blocks = nl.ndarray((2, nl.par_dim(32), 12), dtype=nl.float32)
        blocks[1] = nl.copy(t)
        return nl.copy(blocks[1].reshape((32, 3, 4)))

    np.testing.assert_array_equal(run(body, X), X.reshape(32, 3, 4))
    refused("reshape: err_failed_to_infer_tile", lambda t: _zeros(2, nl.par_dim(4), 3).reshape((4, 6)), X)


def test_hbm_tensors_reshape() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray((12, 32), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out.reshape((32, 12)), nl.load(x.reshape((384,)).reshape((32, 12))))
        return out

    np.testing.assert_array_equal(kernel(X), X.reshape(12, 32))


@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
def test_filled_tensors_may_be_initialized_lazily(buffer: Any) -> None:
    def body(t: Any) -> Any:
        made = nl.zeros((16, 4), dtype=nl.float32, buffer=buffer, lazy_initialization=True)
        return (
            made
            + nl.ones((16, 4), dtype=nl.float32, lazy_initialization=True)
            + nl.full((16, 4), 2.5, dtype=nl.float32, lazy_initialization=False)
        )

    np.testing.assert_array_equal(run(body, normal(16, 4)), np.full((16, 4), 3.5, np.float32))
    for make in (nl.zeros, nl.ones):
        with pytest.raises(TypeError, match=rf"{make.__name__}\.lazy_initialization: received 1, allowed a bool"):
            run(
                lambda _, make=make: make((16, 4), dtype=nl.float32, buffer=buffer, lazy_initialization=1), normal(2, 2)
            )
