"""Index expressions, and the views of tensors that they and basic indices make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import NkiError
from nkisim.legacy._index import Index
from tests.nkisim.legacy.isa_kernels import nisa, nki, nl, normal, refused, run


def values(index: Index) -> Any:
    """An index expression written out, by the meaning of its name alone: offset + sum of coefficient times index."""
    grids = np.indices(index.shape)
    return index.offset + sum(c * g for c, g in zip(index.coeffs, grids, strict=True))


def test_expressions_are_what_numpy_makes_of_the_same_arithmetic() -> None:
    for xp in (nl, np):
        p, f = xp.arange(5)[:, None], xp.arange(3, 24, 7)[None, :]
        made = [p, f, 4 * p + f - 2, 10 - p, -(p - f) * 3, p + 1, np.int64(2) * p, f + p]
        if xp is nl:
            ours = [values(i) for i in made]
            assert [i.shape for i in made] == [np.shape(v) for v in ours]
    for mine, numpys in zip(ours, made, strict=True):
        np.testing.assert_array_equal(mine, numpys)


def test_mgrid_is_dense_and_has_named_axes() -> None:
    ours, theirs = nl.mgrid[0:4, 2:8:3, 1:3], np.mgrid[0:4, 2:8:3, 1:3]
    for i, (mine, numpys) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(values(mine), numpys)
        assert mine is getattr(ours, "pxyzw"[i])
    with pytest.raises(NkiError, match=r"mgrid\.z: dimensions: received 3"):
        _ = ours.z


def test_bounds() -> None:
    index = 10 - 2 * nl.arange(4)[:, None] + 3 * nl.arange(3)[None, :]
    assert index.bounds() == (4, 16)


@pytest.mark.parametrize(
    ("operation", "match"),
    [
        (lambda i: i % 2, "not affine: received operator %"),
        (lambda i: i // 2, "not affine: received operator //"),
        (lambda i: i * i, r"not affine: received operator \*"),
        (lambda i: i != 2, "not affine: received operator !="),
        (bool, "err_control_flow_condition_depending_on_arange"),
        (lambda i: i.__setitem__((0, 5), 1), "err_cannot_assign_to_index"),
        (lambda i: i[0], "new axes only"),
        (lambda i: nl.arange(3)[:, None] + nl.arange(4)[:, None], "do not broadcast"),
        (lambda i: nl.arange(4, 4), "number of elements: received 0"),
        (lambda i: nl.arange(2.5), "integers known when the kernel is built"),
        (lambda i: nl.mgrid[4], "slices start:stop"),
        (lambda i: nl.par_dim(0), "par_dim: size: received 0"),
    ],
)
def test_what_an_expression_cannot_be(operation: Any, match: str) -> None:
    with pytest.raises(NkiError, match=match):
        operation(nl.arange(8)[:, None])


X = np.arange(64 * 6 * 8, dtype=np.float32).reshape(64, 6, 8)
GRID = nl.mgrid[0:64, 0:6, 0:8]


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("slices", lambda t: t[3:40, 1:5, 2:8:3]),
        ("integers", lambda t: t[:, 4, :]),
        ("ellipsis", lambda t: t[..., 5:6]),
        ("views of views", lambda t: t[2:60][:, 1:6][5:20, 2:4, 1:3]),
        ("pieces", lambda t: t[nl.ds(8, 16), 2, nl.ds(1, 4)]),
    ],
)
def test_basic_indices_of_hbm(name: str, view: Any) -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        part = nl.load(view(x))
        out = nl.ndarray(part.shape, dtype=part.dtype, buffer=nl.shared_hbm)
        nl.store(out, part)
        return out

    expected = {
        "slices": X[3:40, 1:5, 2:8:3],
        "integers": X[:, 4, :],
        "ellipsis": X[..., 5:6],
        "views of views": X[7:22, 3:5, 1:3],
        "pieces": X[8:24, 2, 1:5],
    }[name]
    np.testing.assert_array_equal(kernel(X), expected)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda t: t[0:32, 1], X[0:32, 1]),
        (lambda t: t[32:64, :, 3], X[32:64, :, 3]),
        (lambda t: t[32, 2, 3:5], X[32:33, 2, 3:5]),  # the partition dimension stays
        (lambda t: t[:, 2, 3], X[:, 2, 3:4]),  # and so does one free dimension
        (lambda t: t[0, 0, 0], X[0:1, 0, 0:1]),
        (lambda t: t[nl.arange(64)[:, None], 2, nl.arange(4)[None, :] * 2 + 1], X[:, 2, 1::2]),
        (lambda t: t[nl.arange(64)[:, None], nl.arange(6)[None, :], 7], X[:, :, 7]),
        (lambda t: t[GRID.p, GRID.x, 7 - GRID.y], X[:, :, ::-1]),
        (
            lambda t: t[nl.arange(64)[:, None, None], nl.arange(6)[None, None, :], nl.arange(8)[None, :, None]],
            X.transpose(0, 2, 1),
        ),
        (lambda t: t[:, 1:5][nl.arange(64)[:, None], nl.arange(4)[None, :], 2], X[:, 1:5, 2]),
    ],
)  # fmt: skip
def test_views_on_chip(view: Any, expected: Any) -> None:
    np.testing.assert_array_equal(run(lambda t: nl.copy(view(t)), X), expected)


def test_pooling_windows_as_five_dimensions() -> None:
    x = normal(16, 6, 8)
    i = nl.mgrid[0:16, 0:3, 0:2, 0:4, 0:2]
    got = run(lambda t: nl.max(t[i[0], 2 * i[1] + i[2], 2 * i[3] + i[4]], axis=[2, 4]), x)
    np.testing.assert_array_equal(got, x.reshape(16, 3, 2, 4, 2).max(axis=(2, 4)))


def test_writes_through_index_expressions() -> None:
    def body(t: Any) -> Any:
        out = nl.ndarray((64, 48), dtype=nl.float32)
        p, a, b = nl.arange(64)[:, None, None], nl.arange(6)[None, :, None], nl.arange(8)[None, None, :]
        out[p, b * 6 + a] = nl.copy(t[p, a, b])
        return out

    np.testing.assert_array_equal(run(body, X), X.transpose(0, 2, 1).reshape(64, 48))


def test_block_dimensions() -> None:
    def body(t: Any) -> Any:
        blocks = nl.ndarray((2, 3, nl.par_dim(64), 8), dtype=nl.float32)
        for i in nl.affine_range(2):
            for j in nl.affine_range(3):
                blocks[i, j] = nl.copy(t[:, 3 * i + j, :])
        total = nl.zeros((64, 8), dtype=nl.float32)
        for i in nl.affine_range(2):
            for j in nl.affine_range(3):
                total[...] += blocks[i][j] * (10**i * 3**j)
        return total

    weights = np.array([1, 3, 9, 10, 30, 90], np.float32)
    np.testing.assert_allclose(run(body, X), np.einsum("pij,i->pj", X, weights), rtol=1e-6)


# -- index tiles

ROWS = np.array([[5], [0], [63], [5], [17]], np.int32)


def test_rows_by_an_index_tile() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any, rows: Any) -> Any:
        index = nl.load(rows)
        p, f = nl.arange(5)[:, None], nl.arange(8)[None, :]
        out = nl.ndarray((64, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        inner = nl.ndarray((3, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, 0.0)
        nl.store(out[index, f], nl.load(x[index[p, 0], 2, f]))
        # Another dimension than the first one, and rows that a mask leaves out.
        nl.store(inner, nl.load(x[9, index, f], mask=p >= 2)[2:5])
        return out, inner

    with pytest.raises(NkiError, match=r"row index out of bounds .*: received 63, allowed 0\.\.5"):
        kernel(X, ROWS)
    few = np.array([[5], [0], [3], [5], [1]], np.int32)
    out, inner = kernel(X, few)
    expected = np.zeros((64, 8), np.float32)
    expected[few[:, 0]] = X[few[:, 0], 2]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(inner, X[9][few[2:, 0]])


def test_an_index_tile_outside_the_tensor() -> None:
    def body(rows: Any) -> Any:
        table = nl.ndarray((10, 4), dtype=nl.float32, buffer=nl.hbm)
        nl.store(table, 1.0)
        return nl.load(table[rows, nl.arange(4)[None, :]])

    refused(r"row index out of bounds in partition 2: received 63, allowed 0\.\.9", body, ROWS)


def refuse_index(match: str, view: Any) -> None:
    refused(match, lambda t: nl.copy(view(t)), X)


P, F = nl.arange(64)[:, None], nl.arange(8)[None, :]


@pytest.mark.parametrize(
    ("match", "view"),
    [
        ("err_unsupported_mixing_basic_advanced_tensor_indexing", lambda t: t[P, 1, :]),
        ("err_unsupported_mixing_basic_advanced_tensor_indexing", lambda t: t[P, F]),
        ("err_1d_arange_not_supported", lambda t: t[nl.arange(64), 1, 2]),
        (r"err_tensor_access_out_of_bound: indices of dimension 2 of .*received 4\.\.11", lambda t: t[P, 1, F + 4]),
        (r"err_tensor_access_out_of_bound: index of dimension 1: received 6", lambda t: t[:, 6]),
        ("err_tensor_access_out_of_bound: index of dimension 1: received -1", lambda t: t[:, -1]),
        (
            r"err_tensor_access_out_of_bound: indices of dimension 2 of .*received 4\.\.8, allowed 0\.\.7",
            lambda t: t[:, 1, 4:9],
        ),
        (r"err_tensor_access_out_of_bound: index of dimension 2: received slice\(8, 9", lambda t: t[:, 1, 8:9]),
        (r"err_tensor_access_out_of_bound: index of dimension 1: received slice\(0, 5", lambda t: t[:, 1, 0:4][:, 0:5]),
        ("err_tensor_access_out_of_bound: indices of dimension 2 of a view", lambda t: t[:, :, 0:4][P, 1, F]),
        ("err_failed_to_infer_tile_from_local_tensor", lambda t: t[F, 1, 0]),
        (r"partition stride: received 96, allowed 48", lambda t: t[2 * nl.arange(32)[:, None], 1, F]),
        ("err_failed_to_infer_tile_from_local_tensor", lambda t: nl.zeros((2, nl.par_dim(8), 4), dtype=np.float32)),
        ("number of indices: received 4", lambda t: t[0, 0, 0, 0]),
        ("an integer, a slice", lambda t: t[0.5]),
        ("err_dynamic_control_flow_not_supported: a tensor's value as a Python number", lambda t: [1, 2][t[0, 0, 0]]),
        ("err_indirect_indices_free_dim", lambda t: nl.load(_table()[P, _index()])),
        ("err_indirect_indices_free_dim", lambda t: t[_index(), 0, F]),
        (
            "err_indirect_indices_are_not_supported_with_nki_api",
            lambda t: nl.load_transpose2d(_table()[_index(), F]),
        ),
    ],
)
def test_refused_indices(match: str, view: Any) -> None:
    refuse_index(match, view)


def _table() -> Any:
    table = nl.ndarray((64, 8), dtype=nl.float32, buffer=nl.hbm)
    nl.store(table, 1.0)
    return table


def _index() -> Any:
    return nisa.iota(nl.arange(64)[:, None], dtype=nl.int32)
