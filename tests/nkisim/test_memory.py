"""Storages: bytes, and the map of what was written, against a map of single bytes."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.dtypes import as_dtype
from nkisim.errors import Site
from nkisim.memory import MemoryRegion, Storage, StorageInfo
from tests.nkisim.harness import normal, out, refused, run, sb, tile

ITEM_BYTES = (1, 2, 4)


def info(shape: tuple[int, ...], dtype: Any = nl.float32, buffer: str = "sbuf", address: Any = None) -> StorageInfo:
    return StorageInfo(1, "t", MemoryRegion[buffer], shape, as_dtype(dtype), Site("k.py", 1, "k"), address)


def storage(shape: tuple[int, ...], dtype: Any = nl.float32, precise: bool = True) -> Storage:
    return Storage(info(shape, dtype), precise)


def is_complete(s: Storage) -> bool:
    """Whether all is known to be written, after which there is no map."""
    assert not s._complete or s._written is None
    return s._complete


# -- sizes


def test_info_counts_bytes():
    i = info((64, 3, 5), nl.bfloat16)
    assert (i.partitions, i.bytes_per_partition, i.nbytes, i.start_partition) == (64, 30, 1920, 0)
    assert info((32, 4), address=(96, 16)).start_partition == 96
    assert (i.first_use, i.last_use, i.is_argument) == (-1, -1, False)


def test_float32_mode_stores_small_floats_wide():
    s = storage((4, 6), nl.bfloat16, precise=False)
    assert (s.nbytes, s.row_bytes) == (96, 24)
    s = storage((4, 6), nl.bfloat16)
    assert (s.nbytes, s.row_bytes) == (48, 12)
    assert storage((4, 6), nl.int16, precise=False).nbytes == 48


def test_array_counts_elements_of_its_dtype():
    data = np.arange(24).astype(np.uint8)
    s = Storage(info((2, 12), nl.uint8), True, data)
    np.testing.assert_array_equal(s.array(np.dtype(np.uint8), (2, 3), (12, 2), 1), [[1, 3, 5], [13, 15, 17]])
    np.testing.assert_array_equal(s.array(np.dtype(np.uint16), (3,), (4,), 2), data.view(np.uint16)[2::4])
    s.array(np.dtype(np.uint8), (2,), (1,), 0)[...] = 99
    assert list(data[:3]) == [99, 99, 2]


# -- the map of written bytes


class Bytes:
    """A model of the map: one flag per byte."""

    def __init__(self, n: int) -> None:
        self.written = np.zeros(n, bool)

    def under(self, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> np.ndarray:
        """Byte numbers of each element of a view, last axis within the element."""
        at = np.full(shape, offset)
        for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            at = at + (np.arange(n) * stride).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return at[..., None] * itemsize + np.arange(itemsize)


@st.composite
def views(draw: st.DrawFn, nbytes: int) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    itemsize = draw(st.sampled_from(ITEM_BYTES))
    total = nbytes // itemsize
    shape, strides, room = [], [], total - 1
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 4))
        stride = draw(st.integers(0, room // (n - 1))) if n > 1 else draw(st.integers(0, 3))
        room -= stride * (n - 1)
        shape.append(n)
        strides.append(stride)
    return itemsize, tuple(shape), tuple(strides), draw(st.integers(0, room))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from([nl.uint8, nl.bfloat16, nl.float32]))
def test_the_map_is_right_to_the_byte(data, dtype):
    s = storage((4, 8), dtype)
    model = Bytes(s.nbytes)
    for _ in range(data.draw(st.integers(1, 6))):
        view = data.draw(views(s.nbytes))
        at = model.under(*view)
        kind = data.draw(st.sampled_from(["write", "mask", "read"]))
        if kind == "write":
            s.mark_written(*view)
            model.written[at] = True
        elif kind == "mask":
            flags = st.lists(st.booleans(), min_size=prod(view[1]), max_size=prod(view[1]))
            mask = np.array(data.draw(flags), bool).reshape(view[1])
            s.mark_where(*view, mask)
            model.written[at[mask]] = True
        seen = model.written[at].all(axis=-1)
        assert s.is_defined(*view) == seen.all()
        np.testing.assert_array_equal(s.defined_map(*view), seen)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), itemsize=st.sampled_from(ITEM_BYTES))
def test_rows_are_marked_and_read(data, itemsize):
    s = storage((8, 4), nl.float32)
    model = Bytes(s.nbytes)
    row = 16 // itemsize
    for write in (True, False):
        starts = np.array(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))) * row + 1
        inner = ((2, 2), (row // 2, 1), 0)
        at = starts[:, None, None, None] * itemsize + model.under(itemsize, *inner)
        if write:
            s.mark_rows(itemsize, starts, *inner[:2])
            model.written[at] = True
        else:
            np.testing.assert_array_equal(s.rows_defined(itemsize, starts, *inner[:2]), model.written[at].all(axis=-1))
    assert s.was_written


def test_no_rows():
    s = storage((4, 4))
    nothing = np.zeros(0, np.int64)
    s.mark_rows(4, nothing, (4,), (1,))
    assert s.rows_defined(4, nothing, (4,), (1,)).shape == (0, 4)


WHOLE = (4, (4, 8), (8, 1), 0)


def test_a_whole_write_completes_the_storage():
    s = storage((4, 8))
    assert not is_complete(s)
    assert not s.was_written
    s.mark_written(*WHOLE)
    assert is_complete(s)
    assert s.was_written
    for view in ((4, (8,), (1,), 24), (1, (128,), (1,), 0)):
        assert s.is_defined(*view)
        assert s.defined_map(*view).all()


def test_a_whole_read_of_a_piecewise_write_completes_it():
    s = storage((4, 8))
    for row in range(4):
        s.mark_written(4, (8,), (1,), 8 * row)
        assert s.is_defined(*WHOLE) == (row == 3)
    assert is_complete(s)


@pytest.mark.parametrize(
    "view",
    [(4, (8, 4), (1, 8), 0), (4, (32,), (0,), 0), (4, (4, 7), (8, 1), 0), (4, (31,), (1,), 1), (2, (32,), (1,), 0)],
)
def test_other_views_do_not_complete_it(view):
    s = storage((4, 8))
    s.mark_written(*view)
    assert not is_complete(s)


def test_given_data_is_complete():
    s = Storage(info((2, 2), buffer="private_hbm"), True, np.zeros(16, np.uint8))
    assert is_complete(s)
    assert not s.was_written
    assert s.is_defined(4, (4,), (1,), 0)
    s.mark_where(4, (4,), (1,), 0, np.array([True] * 4))
    assert s.was_written


# -- seen from a kernel


def test_reading_what_nobody_wrote():
    def kernel():
        t = tile((4, 8))
        nisa.memset(t[:, 0:5], 1.0)
        nisa.tensor_copy(tile((4, 8)), t)

    refused(
        kernel,
        instruction="tensor_copy",
        operand="src",
        rule="uninitialized read",
        received="12 of 32 elements never written, first at (0, 5)",
        allowed="written before",
    )


def test_reading_the_written_part_is_fine():
    def kernel():
        t = tile((4, 8))
        nisa.memset(t[:, 2:7], 3.0)
        nisa.memset(t[0:1, :], 4.0)
        o = tile((4, 3))
        nisa.tensor_copy(o, t[:, 2:7:2])
        return out(o), out(t[0:1, 0:2])

    a, b = run(kernel)
    np.testing.assert_array_equal(a, np.where(np.arange(4)[:, None] == 0, 4.0, 3.0) * np.ones(3))
    np.testing.assert_array_equal(b, [[4.0, 4.0]])


def test_pairs_written_as_bfloat16_are_read_as_float32():
    def kernel(x):
        t = tile((4, 6))
        halves = t.view(nl.bfloat16)
        nisa.memset(halves[:, 0::2], 0.0)
        nisa.dma_copy(halves[:, 1::2], x)
        return out(t)

    x = normal(4, 6, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(kernel, x), x.astype(np.float32))


@pytest.mark.parametrize(("first", "n"), [(0, 12), (1, 12)])
def test_half_a_float32_is_not_defined(first, n):
    def kernel():
        t = tile((4, 3))
        nisa.memset(t.view(nl.bfloat16)[:, first::2], 0.0)
        nisa.tensor_copy(tile((4, 3)), t)

    refused(
        kernel,
        instruction="tensor_copy",
        operand="src",
        rule="uninitialized read",
        received=f"{n} of 12 elements never written, first at (0, 0)",
        allowed="written before",
    )


def test_one_missing_byte():
    def kernel():
        t = tile((2, 2))
        nisa.memset(t.view(nl.uint8)[0:1, :], 0)
        nisa.memset(t.view(nl.uint8)[:, 0:7], 0)
        nisa.tensor_copy(tile((2, 2)), t)

    refused(
        kernel,
        instruction="tensor_copy",
        operand="src",
        rule="uninitialized read",
        received="1 of 4 elements never written, first at (1, 1)",
        allowed="written before",
    )


def test_a_part_of_a_defined_float32_is_defined():
    def kernel(x):
        t = sb(x)
        u = tile((4, 2), nl.uint8)
        nisa.tensor_copy(u, t.view(nl.uint8)[:, 1:3])
        return out(u)

    x = normal(4, 3)
    np.testing.assert_array_equal(run(kernel, x), x.view(np.uint8)[:, 1:3])


def test_undefined_in_float32_mode():
    def kernel():
        t = tile((4, 4), nl.bfloat16)
        nisa.memset(t[:, 0:2], 0.0)
        nisa.tensor_copy(tile((4, 1)), t[:, 2:3])

    with pytest.raises(Exception, match="uninitialized read: received 4 of 4"):
        run(kernel, precise=False)


def test_a_failing_instruction_writes_nothing():
    seen = []

    def kernel(x):
        t = sb(x)
        seen.append(t)
        nisa.tensor_copy(t, tile(x.shape))

    x = normal(2, 3)
    with pytest.raises(Exception, match="uninitialized"):
        run(kernel, x)
    np.testing.assert_array_equal(seen[0].storage.array(seen[0].carrier, (2, 3), (3, 1), 0), x)
