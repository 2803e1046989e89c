"""The adapter's views, dimensions and shadows against NumPy's, element by element."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

from contributed import _neuronxcc_tensors as tensors
from contributed._neuronxcc_dma import _pieces, _runs, _split
from contributed._neuronxcc_tensors import (
    DTYPES,
    Dynamic,
    Register,
    Storage,
    Tensor,
    known,
    known_values,
    merged,
    new_tensor,
    note_copy,
    note_unknown,
    refined,
)


def whole(shape: tuple[int, ...], buffer: str = "hbm", dtype: str = "float32") -> tuple[Tensor, Any]:
    """A tensor, and the numbers of its elements in memory as NumPy has them."""
    return new_tensor(Storage(buffer, DTYPES[dtype], shape)), np.arange(prod(shape)).reshape(shape)


def numbers(t: Tensor) -> Any:
    """Numbers of a view's elements in memory."""
    out = np.full(t.shape, t.offset)
    for axis, (stride, n) in enumerate(t.dims()):
        out += (stride * np.arange(n)).reshape([-1 if a == axis else 1 for a in range(t.ndim)])
    return out


def numbers_of(dims: Any, offset: int = 0) -> Any:
    t, _ = whole((1,))
    return numbers(Tensor(t.storage, t.dtype, tuple(n for _, n in dims), tuple(s for s, _ in dims), offset)).reshape(-1)


VIEWS = {
    "slice": (lambda t: t[1:3, 2:7], lambda x: x[1:3, 2:7]),
    "slice with steps": (lambda t: t[1:3, 1:8:3, 2:11:2], lambda x: x[1:3, 1:8:3, 2:11:2]),
    "slice with a step of a reshaped dimension": (
        lambda t: t.reshape_dim(1, (4, 2))[:, 0:4:3, 1:2],
        lambda x: x.reshape(4, 4, 2, 12)[:, 0:4:3, 1:2],
    ),
    "last": (lambda t: t[:, -1], lambda x: x[:, -1]),
    "select": (lambda t: t.select(1, 2), lambda x: x[:, 2]),
    "permute": (lambda t: t.permute((0, 2, 1)), lambda x: x.transpose(0, 2, 1)),
    "reshape": (lambda t: t.reshape((4, 96)), lambda x: x.reshape(4, 96)),
    "reshape with -1": (lambda t: t.reshape((4, 3, -1)), lambda x: x.reshape(4, 3, 32)),
    "reshape of a slice": (
        lambda t: t[:, :, 4:8].reshape((4, 4, 2, 2, 2)),
        lambda x: x[:, :, 4:8].reshape(4, 4, 2, 2, 2),
    ),
    "reshape_dim": (lambda t: t.reshape_dim(1, (2, -1)), lambda x: x.reshape(4, 2, 4, 12)),
    "expand and broadcast": (
        lambda t: t.expand_dim(1).broadcast(1, 5),
        lambda x: np.broadcast_to(x[:, None], (4, 5, 8, 12)),
    ),
    "column broadcast": (lambda t: t[:, 0, 3:4].broadcast(1, 6), lambda x: np.broadcast_to(x[:, 0, 3:4], (4, 6))),
    "ap": (lambda t: t[1:].ap([[96, 2], [2, 5]], offset=3), lambda x: x.reshape(4, 96)[1:3, 3:13:2]),
    "permute and merge": (
        lambda t: t.reshape_dim(2, (3, 4)).permute((0, 3, 1, 2)),
        lambda x: x.reshape(4, 8, 3, 4).transpose(0, 3, 1, 2),
    ),
}


@pytest.mark.parametrize("buffer", ["hbm", "sbuf", "psum"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_those_of_numpy(name: str, buffer: str) -> None:
    t, x = whole((4, 8, 12), buffer)
    view, expected = VIEWS[name]
    np.testing.assert_array_equal(numbers(view(t)), expected(x))


def test_an_integer_keeps_the_partitions_and_a_dimension_beside_them() -> None:
    t, x = whole((4, 8), "sbuf")
    np.testing.assert_array_equal(numbers(t[2]), x[2:3])
    np.testing.assert_array_equal(numbers(t[1:3, 5]), x[1:3, 5:6])
    t, x = whole((4, 8))
    np.testing.assert_array_equal(numbers(t[2]), x[2])
    np.testing.assert_array_equal(numbers(t[2, 3]), x[2, 3:4])


def test_a_slice_past_the_end_is_refused() -> None:
    t, _ = whole((4, 8), "sbuf")
    with pytest.raises(AssertionError, match=r"slice of dimension 1: received slice\(2, 9, None\), allowed 0..8"):
        t[:, 2:9]
    with pytest.raises(AssertionError, match=r"step of dimension 1: received slice\(2, 7, 0\), allowed 1..8"):
        t[:, 2:7:0]
    with pytest.raises(AssertionError, match=r"step of dimension 0: received slice\(0, 4, 2\), allowed 1..1"):
        t[0:4:2]
    with pytest.raises(AssertionError, match=r"index of dimension 0: received 4, allowed 0..3"):
        t[4]


@pytest.mark.parametrize(("dtype", "factor"), [("int16", 2), ("uint8", 4), ("int32", 1)])
def test_a_view_of_a_smaller_type_has_more_elements(dtype: str, factor: int) -> None:
    t, _ = whole((4, 8), "sbuf")
    bytes_of = numbers(t[1:3, 2:4].view(DTYPES[dtype])) * DTYPES[dtype].itemsize
    expected = np.arange(4 * 8 * 4).reshape(4, 32)[1:3, 8 : 16 : 4 // factor]
    np.testing.assert_array_equal(bytes_of, expected)


def test_a_view_of_a_larger_type_undoes_one_of_a_smaller() -> None:
    t, x = whole((4, 8), "sbuf")
    back = t.view(DTYPES["int16"])[:, 4:8].view(DTYPES["float32"])
    np.testing.assert_array_equal(numbers(back), x[:, 2:4])


@pytest.mark.parametrize(
    "dims", [[(12, 4), (1, 12)], [(96, 4), (1, 12), (12, 8)], [(0, 3), (0, 2), (1, 5)], [(5, 1), (3, 7)], [(1, 1)]]
)
def test_merged_dimensions_have_the_same_elements(dims: Any) -> None:
    np.testing.assert_array_equal(numbers_of(merged(dims)), numbers_of(dims))
    assert len(merged(dims)) <= len(dims)


def test_contiguous_dimensions_become_one() -> None:
    assert merged([(96, 4), (12, 8), (1, 12)]) == [(1, 384)]
    assert merged([(0, 3), (0, 2)]) == [(0, 6)]


@pytest.mark.parametrize(
    "views",
    [
        ([(1, 24)], [(4, 6), (1, 4)]),
        ([(12, 2), (1, 12)], [(1, 2), (8, 3), (2, 4)], [(0, 24)]),
        ([(1, 6), (6, 4)], [(4, 6), (1, 4)]),
        ([(1, 1)], [(5, 1)]),
    ],
)
def test_refined_dimensions_have_the_same_counts_and_elements(views: Any) -> None:
    out = refined(*views)
    assert len({tuple(n for _, n in dims) for dims in out}) == 1
    for dims, view in zip(out, views, strict=True):
        np.testing.assert_array_equal(numbers_of(dims), numbers_of(view))


def test_a_pattern_is_split_at_the_partitions() -> None:
    dims = [(100, 3), (10, 8), (1, 10)]
    for partitions in (3, 6, 24):
        outer, inner = _split(dims, partitions)
        assert prod(n for _, n in outer) == partitions
        np.testing.assert_array_equal(numbers_of([*outer, *inner]), numbers_of(dims))
    with pytest.raises(AssertionError, match="5 partitions of a pattern"):
        _split(dims, 5)


@pytest.mark.parametrize("seed", range(5))
def test_runs_list_every_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.integers(-1, 30, 12), rng.integers(1, 9, 12))
    values += np.where(rng.random(values.size) < 0.7, np.arange(values.size), 0)
    values[rng.random(values.size) < 0.2] = -1
    extent = 40
    found = {}
    for row, n, first, step in _runs(values, Dynamic(None, 1, extent, vector=True), True):
        found.update({row + i: first + i * step for i in range(n)})
    assert found == {p: int(v) for p, v in enumerate(values) if 0 <= v < extent}


def test_rows_outside_of_a_tensor_are_refused_unless_skipped() -> None:
    with pytest.raises(AssertionError, match=r"row numbers: received \[-1\], allowed 0..3"):
        _runs(np.array([0, -1, 2]), Dynamic(None, 1, 4, vector=True), False)


@pytest.mark.parametrize("width", [1, 4, 6, 64])
@pytest.mark.parametrize(
    ("free", "elements"), [([(1, 24)], [(1, 24)]), ([(1, 24)], [(3, 24)]), ([(8, 3), (2, 4)], [(10, 3), (1, 4)])]
)
def test_pieces_are_parts_of_rows_and_cover_a_pattern(free: Any, elements: Any, width: int) -> None:
    pairs = []
    for piece in _pieces(5, free, elements, width):
        columns = piece.column + piece.step * np.arange(piece.size)
        assert 0 <= columns.min() <= columns.max() < width
        pairs += zip(piece.shift + piece.by * np.arange(piece.size), piece.row * width + columns, strict=True)
    assert pairs == list(zip(numbers_of(free), numbers_of(elements, 5), strict=True))


# -- what the host knows


def integers(values: Any) -> Tensor:
    x = np.array(values, np.int32)
    return new_tensor(Storage("hbm", DTYPES["int32"], x.shape, 0, x))


def test_the_host_knows_what_is_copied_from_an_argument() -> None:
    source = integers(np.arange(24).reshape(2, 12))
    tile = new_tensor(Storage("sbuf", DTYPES["int32"], (2, 6)))
    assert known_values(tile) is None
    note_copy(tile, source[:, 3:9])
    np.testing.assert_array_equal(known_values(tile[:, 1:3]), [[4, 5], [16, 17]])
    note_unknown(tile[0:1, 2:3])
    assert known_values(tile) is None
    assert known(tile[0:1, 2:3]) is None
    assert known(tile[1:2, 2:3]) == 17
    note_unknown(tile, 7)
    assert known(tile[0:1, 2:3]) == 7


def test_the_host_does_not_know_numbers_of_another_type_or_a_run_time_address() -> None:
    tile = new_tensor(Storage("sbuf", DTYPES["int32"], (2, 6)))
    note_copy(tile, integers(np.zeros((2, 6))))
    assert known_values(tile.view(DTYPES["float32"])) is None
    register = Register()
    register.value = None
    note_copy(tile[:, 0:1], integers(np.zeros((2, 6)))[:, 1:2].select(1, register).expand_dim(1))
    assert known_values(tile[:, 0:1]) is None
    np.testing.assert_array_equal(known_values(tile[:, 1:]), np.zeros((2, 5)))


def test_a_known_number_is_part_of_the_address() -> None:
    t, x = whole((6, 4))
    register = Register()
    register.value = 3
    np.testing.assert_array_equal(numbers(t[1:].select(0, register)), x[4])
    at = t.ap([[4, 2], [1, 4]], scalar_offset=register)
    np.testing.assert_array_equal(numbers(at), x[3:5])
    assert at.dynamic is None
    register.value = None
    assert t.select(0, register).dynamic == Dynamic(register, 4, 6)


def test_every_element_type_has_its_size() -> None:
    import ml_dtypes

    for name, dtype in tensors.DTYPES.items():
        assert dtype.itemsize == np.dtype(getattr(ml_dtypes, name, None) or name).itemsize
