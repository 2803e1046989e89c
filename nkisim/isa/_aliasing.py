"""Which destinations an instruction may have: no address twice, and none that it reads as another element.

Engines and DMA stream: when an element is written others are still to be read, and how many is documented
nowhere. In place, where an element is written over the one that it is computed from, all is defined.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nkisim.dtypes import Array
from nkisim.layout import span
from nkisim.memory import UnitMap
from nkisim.tensor import NkiTensor

if TYPE_CHECKING:
    from nkisim.isa._access import Where


class Place(NamedTuple):
    """An operand at its run-time address; `where` only if rows or columns are addressed one by one."""

    operand: str
    tensor: NkiTensor
    offset: int
    where: Where | None = None


def repeats(t: NkiTensor) -> bool:
    """Whether a view names one address several times; what run-time indices name does not count."""
    shape, strides = t.shape, t.strides
    if t.dynamic is not None and t.dynamic.kind == "columns":
        return False
    if t.dynamic is not None and t.dynamic.kind == "vector":
        shape, strides = shape[1:], strides[1:]
    if _nested(zip(reversed(strides), reversed(shape), strict=True)):
        return False
    dims = sorted((abs(stride), n) for stride, n in zip(strides, shape, strict=True) if n > 1)
    if _nested(dims):
        return False
    address = np.zeros(1, np.int64)
    for stride, n in dims:
        address = np.add.outer(address, stride * np.arange(n)).reshape(-1)
    return np.unique(address).size != address.size


def _nested(dims: Iterable[tuple[int, int]]) -> bool:
    """Whether each (stride, size) steps over all that the ones before reach, so that addresses differ."""
    reach = 0
    for stride, n in dims:
        if n > 1:
            step = abs(stride)
            if step <= reach:
                return False
            reach += step * (n - 1)
    return True


def disturbs(target: Place, source: Place) -> bool:
    """Whether writing `target` changes elements of `source`, of the same storage, in no defined order.

    A [P, 1] input is read before the elements of its partition stream, and a [P, 1] result is written
    after them, so these may lie within the other operand.
    """
    a, b = target.tensor, source.tensor
    if _same_addresses(target, source):
        return False
    if a.on_chip and (a.free_size == 1 or b.free_size == 1) and _partitions(target) == _partitions(source):
        return False
    return _boxes_meet(target, source) and _elements_meet(target, source)


def _partitions(place: Place) -> tuple[int, int]:
    t = place.tensor
    return place.offset // t.row_elements, t.shape[0]


def _same_addresses(a: Place, b: Place) -> bool:
    if a.offset != b.offset or a.tensor.element_bytes != b.tensor.element_bytes:
        return False
    if a.where is None and b.where is None:
        return _walk(a.tensor) == _walk(b.tensor)
    if a.where is None or b.where is None or _walk(a.tensor) != _walk(b.tensor):
        return False
    return all(
        np.array_equal(x, y) if x is not None and y is not None else x is y
        for x, y in ((a.where.starts, b.where.starts), (a.where.columns, b.where.columns))
    )


def _walk(t: NkiTensor) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that give a view's addresses in the same order."""
    dims: list[tuple[int, int]] = []
    for n, stride in zip(t.shape, t.strides, strict=True):
        if n > 1 and dims and dims[-1][1] == stride * n:
            dims[-1] = (dims[-1][0] * n, stride)
        elif n > 1:
            dims.append((n, stride))
    return dims


def _boxes_meet(a: Place, b: Place) -> bool:
    """Whether the ranges of partitions and of bytes in them overlap; in HBM everything is one partition."""
    (rows_a, bytes_a), (rows_b, bytes_b) = _box(a), _box(b)
    return all(x[0] < y[1] and y[0] < x[1] for x, y in ((rows_a, rows_b), (bytes_a, bytes_b)))


def _box(place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
    t, where = place.tensor, place.where
    size = t.element_bytes
    if where is not None:
        storage = t.storage
        return ((0, t.storage.info.shape[0]), (0, storage.row_bytes)) if t.on_chip else ((0, 1), (0, storage.nbytes))
    first = 1 if t.on_chip else 0
    low, high = span(t.shape[first:], t.strides[first:])
    row, start = divmod(place.offset, t.row_elements) if t.on_chip else (0, place.offset)
    rows = (row, row + t.shape[0]) if t.on_chip else (0, 1)
    return rows, ((start + low) * size, (start + high + 1) * size)


def _elements_meet(a: Place, b: Place) -> bool:
    touched = a.tensor.storage.new_map(np.bool_)
    for place in (a, b):
        # The unit has to be settled before views are taken.
        touched.under(place.tensor.element_bytes, (), (), 0)
    flags, chosen = _flags(touched, a)
    flags[chosen] = True
    flags, chosen = _flags(touched, b)
    return bool(flags[chosen].any())


def _flags(touched: UnitMap, place: Place) -> tuple[Array, Any]:
    """Flags in which a place's elements are those at the returned index."""
    t, where = place.tensor, place.where
    size = t.element_bytes
    if where is None:
        return touched.under(size, t.shape, t.strides, place.offset), ...
    if where.starts is not None:
        starts = where.starts[where.valid]
        first, last = (int(starts.min()), int(starts.max())) if starts.size else (0, 0)
        return touched.under(size, (last - first + 1, *t.shape[1:]), (1, *t.strides[1:]), first), starts - first
    assert where.columns is not None
    column0 = t.offset % t.row_elements
    rows = touched.under(size, (t.shape[0], t.row_elements), (t.row_elements, 1), t.offset - column0)
    return rows, (np.arange(t.shape[0])[:, np.newaxis], where.columns + column0)
