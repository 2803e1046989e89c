"""Masks: the rectangles that they leave, and that nothing else is read or written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import NkiError
from nkisim.legacy._mask import boxes
from tests.nkisim.legacy.isa_kernels import instructions, nisa, nki, nl, normal, refused, run, traced


def covered(mask: Any, shape: tuple[int, ...]) -> Any:
    """How many rectangles cover each element."""
    count = np.zeros(shape, int)
    for box in boxes("test", mask, shape):
        count[tuple(slice(start, start + n) for start, n in box)] += 1
    return count


def grid(xp: Any, shape: tuple[int, ...]) -> list[Any]:
    """Index expressions of a shape, of `nl` or as arrays."""
    rank = len(shape)
    return [xp.arange(n)[tuple(slice(None) if e == d else None for e in range(rank))] for d, n in enumerate(shape)]


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((7, 9), lambda i, j: (i < 4) & (j >= 3)),
        ((7, 9), lambda i, j: (2 * i + 1 <= 8) & (j < 9)),
        ((12, 12), lambda i, j: i >= j),
        ((12, 12), lambda i, j: i <= j),
        ((12, 10), lambda i, j: (3 * i - 2 * j < 7) & (i + j > 4) & (j < 8)),
        ((5, 6), lambda i, j: i + 2 * j == 7),
        ((5, 6), lambda i, j: (i == 3) & (j > 1)),
        ((5, 6), lambda i, j: i > 10),
        ((4, 5, 6), lambda i, j, k: (i + j >= k) & (k < 5)),
        ((4, 5, 6), lambda i, j, k: (j < k) & (i > 0)),
        ((4, 3, 4, 3), lambda i, j, k, m: (3 * i + j >= 3 * k + m) & (i < 3)),
    ],
)
def test_rectangles_cover_what_the_mask_leaves_once(shape: tuple[int, ...], make: Any) -> None:
    expected = np.broadcast_to(make(*grid(np, shape)), shape).astype(int)
    np.testing.assert_array_equal(covered(make(*grid(nl, shape)), shape), expected)


def test_masks_by_chance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(1, 8, rng.integers(2, 4)).tolist())
        coeffs, offsets = rng.integers(-3, 4, (2, len(shape))).tolist(), rng.integers(-6, 10, 2).tolist()

        def make(axes: list[Any], coeffs: Any = coeffs, offsets: Any = offsets) -> Any:
            first, second = (
                sum(c * a for c, a in zip(cs, axes, strict=True)) + o for cs, o in zip(coeffs, offsets, strict=True)
            )
            return (first >= 0) & (second > 0)

        np.testing.assert_array_equal(
            covered(make(grid(nl, shape)), shape), np.broadcast_to(make(grid(np, shape)), shape).astype(int)
        )


def test_a_triangle_is_one_rectangle_for_each_run_of_equal_rows() -> None:
    i, j = grid(nl, (8, 6))
    assert boxes("test", i >= 2 * j, (8, 6)) == [((2 * n, 2), (0, n + 1)) for n in range(4)]
    # By columns every rectangle starts at partition 0, where engines can begin.
    i, j = grid(nl, (6, 6))
    assert boxes("test", i <= j, (6, 6)) == [((0, n + 1), (n, 1)) for n in range(6)]


def test_trivial_masks() -> None:
    assert boxes("test", None, (3, 4)) == boxes("test", True, (3, 4)) == [((0, 3), (0, 4))]
    assert boxes("test", False, (3, 4)) == boxes("test", np.int64(3) < 2, (3, 4)) == []
    i, _ = grid(nl, (3, 4))
    assert boxes("test", (i < 2) & True, (3, 4)) == [((0, 2), (0, 4))]
    assert boxes("test", False & (i < 2), (3, 4)) == []


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("err_unsupported_expression_in_mask: masks are joined by & only", lambda i: (i < 2) | (i > 3)),
        ("operator ~", lambda i: ~(i < 2)),
        (r"operator \^", lambda i: (i < 2) ^ (i > 0)),
        ("err_control_flow_condition_depending_on_arange: a mask", lambda i: i < 2 and i > 0),
        ("err_cannot_assign_to_index: a mask", lambda i: (i < 2).__setitem__(0, True)),
        (r"shape of its index expressions: received \(5, 1\)", lambda i: boxes("t", i < 2, (4, 4))),
        ("err_unsupported_expression_in_mask: type: received ndarray", lambda i: boxes("t", np.ones((5, 4)), (5, 4))),
    ],
)
def test_refused_masks(match: str, make: Any) -> None:
    with pytest.raises(NkiError, match=match):
        make(nl.arange(5)[:, None])


# -- kernels


def test_loads_and_stores_of_a_ragged_tail() -> None:
    x = normal(300, 40)

    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        p, f = nl.arange(128)[:, None], nl.arange(40)[None, :]
        for i in nl.affine_range(3):
            rows = i * 128 + p
            tile = nl.load(x[rows, f], mask=rows < 300)
            # Unmasked on purpose: what was left out is garbage, and is not stored.
            nl.store(out[rows, f], tile * 2.0, mask=rows < 300)
        return out

    np.testing.assert_array_equal(kernel(x), 2 * x)


def test_what_a_mask_leaves_out_is_not_read() -> None:
    def body() -> Any:
        half = nl.ndarray((64, 8), dtype=nl.float32)
        half[:, 0:4] = nl.full((64, 4), 3.0, dtype=nl.float32)
        return nl.exp(half, mask=nl.arange(8)[None, :] < 4)[:, 0:4]

    np.testing.assert_allclose(run(body), np.full((64, 4), np.exp(3.0)), rtol=1e-6)

    def unmasked() -> Any:
        half = nl.ndarray((64, 8), dtype=nl.float32)
        half[:, 0:4] = nl.full((64, 4), 3.0, dtype=nl.float32)
        return nl.exp(half)

    refused("uninitialized read: received 256 of 512 elements never written", unmasked)


def test_what_a_mask_leaves_out_is_not_written() -> None:
    x = normal(32, 8)
    p, f = nl.arange(32)[:, None], nl.arange(8)[None, :]

    def body(t: Any) -> Any:
        out = nl.full((32, 8), 7.0, dtype=nl.float32)
        out[...] = nl.square(t, mask=(p < 16) & (f >= 5))
        return out

    expected = np.full((32, 8), 7, np.float32)
    expected[:16, 5:] = x[:16, 5:] ** 2
    np.testing.assert_array_equal(run(body, x), expected)

    @nki.jit(mode="simulation")
    def stored(x: Any) -> Any:
        out = nl.ndarray((32, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, 7.0)
        nl.store(out[p, f], nl.load(x), mask=p >= f)
        return out

    np.testing.assert_array_equal(stored(x), np.where(np.arange(32)[:, None] >= np.arange(8), x, 7))


def test_left_out_elements_are_garbage_that_shows() -> None:
    p = nl.arange(16)[:, None]
    x, n = normal(16, 4), np.arange(64, dtype=np.int32).reshape(16, 4)
    got = run(lambda t: nl.exp(t, mask=p < 3), x)
    np.testing.assert_allclose(got[:3], np.exp(x[:3]), rtol=1e-6)
    assert np.isnan(got[3:]).all()
    got = run(lambda t: nl.copy(t, mask=p < 3), n)
    np.testing.assert_array_equal(got, np.where(np.arange(16)[:, None] < 3, n, 2**31 - 1))


def test_masked_reductions_and_products() -> None:
    x, y = normal(64, 20), normal(64, 30, seed=1)
    f = nl.arange(20)[None, :]
    np.testing.assert_allclose(
        run(lambda t: nl.sum(t, axis=1, mask=f < 11), x)[:, 0], x[:, :11].sum(1), rtol=1e-5, atol=1e-5
    )
    i = nl.arange(20)[:, None]
    j = nl.arange(30)[None, :]
    got = run(lambda a, b: nl.copy(nl.matmul(a, b, transpose_x=True, mask=(i < 5) & (j < 7))), x, y)
    np.testing.assert_allclose(got[:5, :7], (x.T @ y)[:5, :7], rtol=1e-4, atol=1e-4)
    assert np.isnan(got[5:]).all()
    cut = run(lambda a, b: nl.copy(nl.matmul(a[f < 9], b, transpose_x=True)), x, y)
    np.testing.assert_allclose(cut, x[:, :9].T @ y, rtol=1e-4, atol=1e-4)


def test_a_mask_that_leaves_nothing_issues_nothing() -> None:
    def body(t: Any) -> Any:
        out = nl.copy(t)
        out[...] = nl.exp(t, mask=nl.arange(4)[None, :] > 9)
        return out

    x = normal(8, 4)
    np.testing.assert_array_equal(run(body, x), x)
    assert instructions(traced(body, x)) == ["tensor_copy"]


def test_a_mask_that_starts_where_no_engine_can() -> None:
    refused(
        r"start partition of 59 partitions: received 5",
        lambda t: nl.exp(t, mask=nl.arange(64)[:, None] >= 5),
        normal(64, 4),
    )


def test_masks_by_loop_indices_and_program_ids_are_numbers() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray((4, 8, 2), dtype=x.dtype, buffer=nl.shared_hbm)
        for i in nl.affine_range(4):
            nl.store(out[i], 0.0)
            nl.store(out[i], nl.load(x[i], mask=i < 4), mask=(2 * i + 1 < 4) & (nl.arange(8)[:, None] < 6))
        return out

    x = normal(4, 8, 2)
    expected = np.zeros_like(x)
    expected[:2, :6] = x[:2, :6]
    np.testing.assert_array_equal(kernel(x), expected)


def test_an_out_of_bounds_access_needs_a_mask() -> None:
    def body(t: Any) -> Any:
        return nl.copy(t[nl.arange(8)[:, None], 2 + nl.arange(4)[None, :]])

    refused(
        r"err_tensor_access_out_of_bound: indices of dimension 1 .*received 2\.\.5, allowed 0\.\.3", body, normal(8, 4)
    )
    x = normal(8, 4)
    j = nl.arange(4)[None, :]
    got = run(lambda t: nl.copy(t[nl.arange(8)[:, None], 2 + j], mask=2 + j < 4)[:, 0:2], x)
    np.testing.assert_array_equal(got, x[:, 2:4])


def test_a_slice_may_end_behind_the_tensor_under_a_mask() -> None:
    i_p = nl.arange(8)[:, None]

    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        for start in (0, 8, 16):
            inside = start + i_p < 21
            tile = nl.load(x[start : start + 8, :], mask=inside)
            nl.store(out[nl.ds(start, 8), :], tile * 2.0, mask=inside)
        return out

    x = normal(21, 5)
    np.testing.assert_array_equal(kernel(x), 2 * x)


# -- masked results that are assigned


@pytest.mark.parametrize("dtype", [None, nl.bfloat16], ids=["straight", "through a tile of another type"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_mask_keeps_what_it_leaves_out_of_the_destination(dtype: Any, axis: int) -> None:
    kept = nl.mgrid[0:64, 0:8][axis] < 6

    def body(t: Any) -> Any:
        dst = nl.full((64, 8), 7.0, dtype=nl.float32)
        dst[...] = nl.multiply(t, 2.0, dtype=dtype, mask=kept)
        return dst

    x = np.round(normal(64, 8) * 8)  # whole numbers, which bfloat16 holds
    expected = np.where(np.indices(x.shape)[axis] < 6, 2 * x, 7.0)
    np.testing.assert_array_equal(run(body, x), expected)


@pytest.mark.parametrize("dtype", [None, nl.bfloat16], ids=["straight", "through a tile of another type"])
def test_a_masked_result_leaves_garbage_in_a_new_destination(dtype: Any) -> None:
    def body(t: Any) -> Any:
        tiles = nl.ndarray((2, nl.par_dim(8), 4), dtype=nl.float32)
        for i in nl.affine_range(2):
            tiles[i] = nl.multiply(t, 2.0, dtype=dtype, mask=i < 1)
        # Computed with, as AWS's kernels do, and not used.
        nl.add(tiles[1], 1.0)
        return tiles[1]

    assert np.isnan(run(body, np.round(normal(8, 4)))).all()


def test_a_destination_may_be_left_under_a_mask() -> None:
    def body(t: Any) -> Any:
        dst = nl.ndarray((6, 4), dtype=nl.float32)
        i_p, i_f = nl.mgrid[0:8, 0:4]
        dst[i_p, i_f] = nl.multiply(t, 2.0, mask=i_p < 6)
        return dst

    x = normal(8, 4)
    np.testing.assert_array_equal(run(body, x), 2 * x[:6])
    refused(
        r"assignment\.dst: err_tensor_access_out_of_bound: indices of dimension 0 .*received 0\.\.6, allowed 0\.\.5",
        lambda t: _assigned(t, nl.arange(8)[:, None] < 7),
        x,
    )


def _assigned(t: Any, mask: Any) -> Any:
    dst = nl.ndarray((6, 4), dtype=nl.float32)
    dst[nl.arange(8)[:, None], nl.arange(4)[None, :]] = nl.multiply(t, 2.0, mask=mask)
    return dst


@pytest.mark.parametrize("first", [0, 1, 2])
def test_products_that_a_mask_leaves_out_of_a_sum(first: int) -> None:
    """`first`: the first trip that adds; 2 is none, and the sum is garbage."""

    def body(t: Any) -> Any:
        total = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.psum)
        for i in nl.affine_range(2):
            total += nisa.nc_matmul(t, t, mask=i >= first)
        return nl.copy(total)

    x = normal(8, 4)
    got = run(body, x)
    if first == 2:
        assert np.isnan(got).all()
    else:
        np.testing.assert_allclose(got, (2 - first) * (x.T @ x), rtol=1e-5, atol=1e-5)
